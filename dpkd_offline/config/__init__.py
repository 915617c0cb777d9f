"""What a user can set: a typed, frozen config per command, the objectives, and recipes.

A setting is a field of a config. Its flag, help, recipe key and Python keyword follow from the field. Nothing here
imports torch or reads a dataset, so that `--help` and a wrong key take no time. What a setting does is described where
it is done.
"""
