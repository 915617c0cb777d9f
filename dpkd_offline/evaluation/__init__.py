"""How good a student is: responses to prompts with references, their numbers, and a table that people read.

Prompts here are never those of the training. The numbers themselves are made in `metrics/`.
"""
