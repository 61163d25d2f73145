"""Streaming a dataset to a training loop.

`order` says which sample stands at which position, `reader` delivers batches in that order; shards are
fetched ahead, kept open while they are in use and cached on disk, and figures say where the time went.
"""
