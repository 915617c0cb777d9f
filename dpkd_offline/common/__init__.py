"""What all other folders use: errors and exit codes, files that are whole or absent, hashes, URLs, console,
how a process ends.

Nothing in this folder knows what a dataset, a model or a loss is. What only one other folder needs belongs there.
"""
