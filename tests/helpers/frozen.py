"""Imported last by the server that tests fork processes from: what is there then is no garbage to any of them."""

import gc

gc.collect()
gc.freeze()
