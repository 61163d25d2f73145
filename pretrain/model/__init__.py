"""The backbone, the heads that pretrain it and the classifier on top (paper §2.3 and §3).

Also their artifacts, position tables at other sizes, and the names of other people's checkpoints.
"""
