"""Stage two: the objectives, the stream of examples, the student, its optimizer, checkpoints, validation and rounds.

Nothing here imports `engines/`: a teacher cannot be loaded, its log-probs come from the dataset. The equations are in
`losses.py`, on tensors alone.
"""
