"""Tokenizing a corpus once.

The pass that crops, encodes, decodes and tokenizes images into token shards, what it will cost, and the
proof that stored codes belong to stored pixels.
"""
