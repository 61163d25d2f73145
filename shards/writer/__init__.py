"""Passes that write datasets: plan, items, receipts, manifest.

`commit` is the protocol that makes a pass exactly-once under kills and second drivers; `prepare` writes
image shards with it, `layers` code layers. The token pass is in `tokenizer.precompute`.
"""
