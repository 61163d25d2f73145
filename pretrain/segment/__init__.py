"""Semantic segmentation with UperNet (paper §3.2 and Table 11).

The loop, the head, pairs of images and label maps, and the score.
"""
