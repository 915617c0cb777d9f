"""Numbers from texts and from numbers: Rouge-L, exact match, repetition, spreads.

Pure functions, without models, files or torch. What runs a model to get the texts is `evaluation/` or `training/`.
"""
