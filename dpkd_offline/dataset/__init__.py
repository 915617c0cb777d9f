"""The dataset directory: its tables and columns, shards and manifests, provenance, checks of rows and files, its card.

Reads and writes datasets, and checks whether what they say can be true. `schema.py` and `layout.py` say what a dataset
holds; a new column or table begins there. Who samples, scores, trains or recombines is above and imports this folder.
"""
