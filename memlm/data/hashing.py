"""Counter-based random numbers: every draw is a pure function of (seed, index, draw)."""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser (Steele et al., 2014), elementwise on uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniform(seed: int, indices: np.ndarray, draws: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [len(indices), draws]; `seed` and indices are >= 0."""
    with np.errstate(over="ignore"):
        start = _mix(np.array([seed], dtype=np.uint64) * _GOLDEN + np.uint64(1))
        rows = _mix(_mix(np.asarray(indices, dtype=np.uint64) * _GOLDEN + start))
        counters = np.arange(1, draws + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(rows[:, None] + counters[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def text_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the place of a document in the split."""
    digest = hashlib.blake2b(text.encode("utf-8", errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
