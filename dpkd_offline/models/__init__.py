"""A model on disk, and log-probs of it: what is known without its weights, loading, chunked log-probs, shared prompts.

Whose model it is, teacher or student, is not known here. Engines, which sample and score by the thousand, are above.
"""
