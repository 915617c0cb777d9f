"""Looking at datasets, checking them, recombining them, and bringing them in and out of other formats.

Nothing here runs a model: what is there is read, and new datasets are made of its rows.
"""
