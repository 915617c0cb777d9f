"""Checks datasets, shows what they hold, recombines them, and converts them from and to other formats.

Nothing in this folder runs a model. It reads what a dataset holds, and makes new datasets of the rows of others.
"""
