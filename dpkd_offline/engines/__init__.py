"""Engines run a model: they sample responses and score them. Stages know these two verbs and nothing else.

`base.py` says what an engine is, `factory.py` which one is taken; each other file is one engine, or a part of one. No
engine imports another, and nobody outside asks which one it has. A new engine is a file with a class like those here,
and its name and entry in `config/engines.py`.
"""
