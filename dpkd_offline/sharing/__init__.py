"""Datasets between teams: push and pull, where they go, what must not leave, and what comes from strangers.

What arrives is checked before it has a name. What a dataset is, and whether it is whole, is said in `dataset/`.
"""
