"""Ray, and nothing but Ray: the only door to it.

Connecting to a cluster or starting one, a pool of actors that works through items, a group of training
workers with restarts, and how its ranks find out which of them is missing. With `num_workers` 0 all of it
runs in this process, without Ray.
"""
