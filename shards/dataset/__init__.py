"""A finished dataset, opened.

Its parts (base, added views, code layers) seen as one, several datasets or a subset as one corpus, rows and
their images, counts of codes and the summary that people read.
"""
