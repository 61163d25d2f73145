"""Random numbers that are addressed, not drawn in turn: any of them can be had alone and in any order.

Philox, a counter-based generator of NumPy, serves a handful of decisions about one thing; SplitMix64 serves
millions of single words, where a generator object for each would cost more than what it decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SPLITMIX_STEP = 0x9E3779B97F4A7C15
"""SplitMix64's increment: words of one stream lie this far apart."""


def philox(key: Sequence[int], counter: Sequence[int], num_words: int) -> np.ndarray:
    """Raw words uint64 [num_words] of Philox 4x64-10 under a key of two words, from a counter of four on.

    Counter word 2 names the stream by convention, so that no two kinds of decision share numbers.
    """
    generator = np.random.Philox(
        key=np.array(key, dtype=np.uint64), counter=np.array(counter, dtype=np.uint64)
    )
    return generator.random_raw(num_words)


def permute(m: int, seed: int, epoch: int, stream: int, i: int) -> np.ndarray:
    """A permutation of range(m), int64 [m]: the argsort of m raw Philox words that carry their index.

    The index replaces the lowest bits that can hold m - 1, so no two words are equal and every sort gives
    the same answer.
    """
    words = philox((seed, epoch), (0, stream, i, 0), m)
    index_mask = np.uint64((1 << max(m - 1, 0).bit_length()) - 1)
    words &= ~index_mask
    words |= np.arange(m, dtype=np.uint64)
    words.sort()
    words &= index_mask
    return words.view(np.int64)


def splitmix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), elementwise on uint64; arithmetic wraps."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
