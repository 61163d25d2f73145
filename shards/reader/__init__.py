"""Streaming a dataset to a training loop.

`order` says which sample stands at which position, `reader` delivers batches in that order with the threads
and buffers of `workers`; `lookahead` has shards fetched before they are needed, `open_shards` keeps those in
use, `disk_cache` those of remote stores on this node, and `figures` say where the time went.
"""
