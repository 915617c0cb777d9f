"""Rows of a source become token ids: files and their columns, templates, filters, duplicates, another model's tokens.

What comes in is a user's and may be wrong: errors name file, row and column. What is sampled is not here.
"""
