"""A whole experiment from one recipe: its stages, each in a process of its own, rounds, and what it will cost.

Stages are started as a user would start them. What a stage does is in the folders below.
"""
