"""The device that a command runs on."""

from __future__ import annotations

from typing import Annotated

import tyro

Device = Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda|mps")]


def choose_device(name: str) -> str:
    """`auto` takes a GPU where there is one; a device that is asked for and absent is an error, never a
    fallback."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available.get(name.split(":")[0], False):
        raise ValueError(
            f"no device {name} here; choose one of: {', '.join(d for d, ok in available.items() if ok)}"
        )
    return name
