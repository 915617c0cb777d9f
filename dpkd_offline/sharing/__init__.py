"""Shares datasets between teams: push and pull, destinations, checks of what leaves and of what arrives.

What arrives is checked before it is stored under its name. Checks that do not depend on sharing are in `dataset/`.
"""
