"""Bounds of configuration fields."""

from __future__ import annotations

from typing import Any


def check_bounds(config: Any, **bounds: tuple[float, float]) -> None:
    """Raise ValueError for the first field of `config` that lies outside its bounds.

    Args:
        config: a dataclass.
        bounds: lowest and highest value of each named field; of each entry where the field is a tuple, which
            must not be empty. NaN lies outside every bound.
    """
    for name, (lowest, highest) in bounds.items():
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers:
            raise ValueError(f"{name} is empty, expected one number or more")
        for number in numbers:
            if not lowest <= number <= highest:
                raise ValueError(f"{name} is {value}, expected {lowest} to {highest}")
