"""Rows of a source become token ids: files and their columns, templates, filters, duplicates, another model's tokens.

What comes in is a user's and may be wrong: errors name file, row and column. A new layout of columns is a function and
an entry in `columns.py`. Responses that a model samples are made in `generation/`.
"""
