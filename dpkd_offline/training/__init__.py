"""Stage two: a student is trained on a dataset, and the teacher is not in memory.

Nothing here imports `engines/`: a teacher cannot be loaded, its log-probs come from the dataset. The equations are in
`losses.py`, on tensors alone; `trainer.py` reads from the set-up to the step. Imports inside the folder point downward
too: pyproject.toml says in which order.
"""
