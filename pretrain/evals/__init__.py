"""What a backbone or a codebook is worth (paper §3 and the figures).

Linear probe, k-NN, robustness under shifts and corruptions, and statistics of the codes.
"""
