"""The dataset directory: schema and columns, shards and manifests, provenance, checks of rows and files, its card.

Here is what is on the disk and whether it can be true. Who samples, scores, trains or recombines is above; models are
beside, and neither imports the other.
"""
