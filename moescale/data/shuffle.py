"""Pseudo-random numbers and permutations that depend on nothing but their arguments.

NumPy promises no stable stream across its versions; a run resumed years later on another version must still see the
same order. A keyed permutation also needs no memory: any position of any epoch is computed on its own.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 8


def mix(values: np.ndarray, key: int) -> np.ndarray:
    """Hash uint64 ``values`` under ``key`` to uint64: the finalizer of SplitMix64 (Steele et al., OOPSLA 2014)."""
    mixed = values + np.uint64((key * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = int(mix(np.array([part & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64), key)[0])
    return key


def hashes(seed: int, first: int, count: int) -> np.ndarray:
    """Return uint64 [count]: a hash under ``seed`` of each index from ``first`` on."""
    return mix(np.arange(first, first + count, dtype=np.uint64), _key(seed))


def chosen(seed: int, first: int, count: int, fraction: float) -> np.ndarray:
    """Return bool [count]: which of the indices from ``first`` on a draw of ``fraction`` under ``seed`` takes."""
    return (hashes(seed, first, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53 < fraction


def permuted(positions: np.ndarray, size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Map ``positions`` in ``range(size)`` through the permutation that belongs to ``(seed, epoch)``.

    A balanced Feistel network over the next power of four, walked until the value falls back into ``range(size)``
    (Black and Rogaway, CT-RSA 2002); fewer than four rounds of walking are expected.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [_key(seed, epoch, number) for number in range(_ROUNDS)]

    def encipher(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for key in keys:
            left, right = right, left ^ (mix(right, key) & mask)
        return (left << half) | right

    result = encipher(np.asarray(positions, dtype=np.uint64))
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = encipher(result[outside])
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)
