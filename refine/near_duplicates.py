"""Near duplicates among a million texts, in bounded memory: MinHash signatures (Broder 1997) in buckets of
locality-sensitive hashing.

A text is the set of its shingles: every run of SHINGLE words. How alike two texts are is the Jaccard similarity of
their sets, the share of all shingles that both have. A signature has PLACES places, and two signatures agree in each
with just that probability: so the share of places that agree estimates it, with a standard deviation of at most
0.5 / sqrt(PLACES) = 0.044 (0.035 at 0.8).

To compare a text with few others, the signature is cut into bands, and only texts that agree in all places of one
band, that is, lie in one of its buckets, are looked at. `banding` makes the bands so narrow that at least 99 % of the
pairs right at the threshold share one. What is left is the noise of the estimate: at a threshold of 0.8 about half of
the pairs of 0.8 are taken, nearly all of 0.9 and about one in a hundred of 0.7.

A kept text costs 4 * (PLACES + bands) bytes, 592 at a threshold of 0.8; the buckets cost up to 4 MiB a band. No I/O.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

PLACES = 128
SHINGLE = 3
BUCKETS = 1 << 20
CROWD = 64
"""Most texts of one bucket that are looked at, the latest ones: rows made from one template all meet in some buckets,
and comparing each with each would be quadratic. Texts that are truly alike meet in other buckets too."""
BLOCK = 4096
"""Shingles hashed at a time: 4 MiB."""

_RANDOM = np.random.default_rng(0)  # the same hash functions in every run
_WORD_FACTORS = _RANDOM.integers(1, 1 << 63, size=SHINGLE, dtype=np.uint64) * 2 + 1
_FACTORS = _RANDOM.integers(1, 1 << 63, size=PLACES, dtype=np.uint64) * 2 + 1
_ADDENDS = _RANDOM.integers(0, 1 << 63, size=PLACES, dtype=np.uint64)
_BAND_FACTORS = _RANDOM.integers(1, 1 << 63, size=PLACES, dtype=np.uint64) * 2 + 1
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


def signature(parts: Iterable[list[str]]) -> np.ndarray | None:
    """The MinHash signature, (PLACES,) uint32, of a text in several parts (lists of words) that no shingle crosses; of
    a part shorter than a shingle all words are one. None where there is no word at all."""
    hashes = [_shingle_hashes(words) for words in parts if words]
    if not hashes:
        return None
    shingles = np.concatenate(hashes)
    lowest = np.full(PLACES, np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(shingles), BLOCK):
        values = (shingles[start : start + BLOCK, None] * _FACTORS + _ADDENDS) >> np.uint64(32)  # (block, PLACES)
        np.minimum(lowest, values.min(axis=0).astype(np.uint32), out=lowest)
    return lowest


def _shingle_hashes(words: list[str]) -> np.ndarray:
    """(shingles,) uint64, each a 32-bit hash of SHINGLE words in their order."""
    hashes = np.array([zlib.crc32(word.encode()) for word in words] + [0] * (SHINGLE - len(words)), dtype=np.uint64)
    count = len(hashes) - SHINGLE + 1
    mixed = sum(hashes[i : i + count] * factor for i, factor in enumerate(_WORD_FACTORS))  # wraps at 2^64
    return ((mixed ^ (mixed >> np.uint64(32))) * _MIX) >> np.uint64(32)


def banding(threshold: float) -> int:
    """Places a band: the most with which two texts as alike as `threshold` share a band with probability 0.99 or
    more."""
    widths = [width for width in range(1, 17) if 1 - (1 - threshold**width) ** (PLACES // width) >= 0.99]
    return max(widths, default=1)


class NearDuplicates:
    """The texts kept so far, by their signatures. Numbers them from 0 in the order of `add`."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.width = banding(threshold)
        self.bands = np.arange(PLACES // self.width)
        self.count = 0
        self.signatures = np.empty((0, PLACES), dtype=np.uint32)
        # The texts of a bucket are a chain: its latest one, and for each text and band the one before it. Both hold
        # number + 1, and 0 for the end.
        self.latest = np.zeros((len(self.bands), BUCKETS), dtype=np.uint32)
        self.before = np.empty((0, len(self.bands)), dtype=np.uint32)

    def find(self, signature: np.ndarray) -> tuple[int, float] | None:
        """(number, estimated Jaccard similarity) of the most alike kept text, the earliest of several; None where none
        reaches the threshold."""
        bands = self.bands
        chain = self.latest[bands, self._buckets(signature)]
        met = []
        for _ in range(CROWD):
            bands, chain = bands[chain > 0], chain[chain > 0]
            if not len(chain):
                break
            met.append(chain)
            chain = self.before[chain - 1, bands]
        if not met:
            return None
        numbers = np.unique(np.concatenate(met)) - 1
        alike = (self.signatures[numbers] == signature).mean(axis=1)  # (numbers,)
        best = int(alike.argmax())
        return (int(numbers[best]), float(alike[best])) if alike[best] >= self.threshold else None

    def add(self, signature: np.ndarray) -> None:
        """Keep a text."""
        if self.count == len(self.signatures):
            size = self.count + self.count // 4 + 1024
            for table in (self.signatures, self.before):
                table.resize((size, table.shape[1]), refcheck=False)  # in place: there is never a second copy
        buckets = self._buckets(signature)
        self.signatures[self.count] = signature
        self.before[self.count] = self.latest[self.bands, buckets]
        self.count += 1
        self.latest[self.bands, buckets] = self.count

    def _buckets(self, signature: np.ndarray) -> np.ndarray:
        """(bands,) the bucket of each band."""
        used = len(self.bands) * self.width
        terms = (signature[:used] * _BAND_FACTORS[:used]).reshape(len(self.bands), self.width)
        return (terms.sum(axis=1) * _MIX) >> np.uint64(64 - BUCKETS.bit_length() + 1)
