"""Seeds for any place in a run, from one seed."""

from __future__ import annotations

import operator
import random

RANDOM = -1
"""Stands for a seed that is chosen at random."""
RANDOM_SEEDS = 2**31
"""Seeds that are chosen at random lie below it: short enough to be typed again."""
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


def random_seed() -> int:
    """Choose a seed that nobody can predict; it is to be shown or stored, so that it can be used again."""
    return random.SystemRandom().randrange(RANDOM_SEEDS)


def image_seeds(first: int, num_images: int) -> list[int]:
    """Return the seeds of several images: image i has first + i; -1 chooses the first one at random.

    Raises:
        ValueError: a seed lies outside [0, 2**63), or there is no image.
        TypeError: the seed is no integer.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}, expected 1 or more")
    first = operator.index(first)
    if not RANDOM <= first < 2**63 - num_images:
        raise ValueError(f"seed is {first}, expected 0 or more, or -1 for a random one")
    if first == RANDOM:
        first = random_seed()
    return [first + number for number in range(num_images)]
