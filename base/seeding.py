"""Seeds for any place in a run, from one seed."""

from __future__ import annotations

DRAW_STRIDE = 1_000_003  # a prime larger than any draw index in use keeps (seed, draw) pairs apart


def mixed_seed(seed: int, *place: int) -> int:
    """A 63-bit seed from a run's seed and a place in it; unlike places give unlike seeds (splitmix64
    finaliser)."""
    value = seed
    for part in place:
        value = (value * DRAW_STRIDE + part + 0x9E3779B97F4A7C15) % 2**64
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
        value ^= value >> 31
    return value % 2**63
