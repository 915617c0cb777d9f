"""What a user can say: one typed, frozen config per command, and the way to it from a recipe's YAML and from flags.

A setting is said here once; flag, help, recipe key and Python keyword follow from its field. Nothing here imports torch
or reads a dataset, so that `--help` and a wrong key cost no time. What a setting does is written where it is done.
"""
