"""What every floor stands on: errors and exit codes, files that are whole or absent, hashes, places, console.

Nothing here knows what a dataset, a model or a loss is. What only one folder needs belongs there.
"""
