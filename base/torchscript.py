"""TorchScript networks, which are programs: loaded only when their SHA-256 is trusted.

Trusted are the hashes in `networks.lock` beside this file, those that `trust` wrote down on this machine, and
those in `$TAVQ_TRUST`.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any

from .cache import cache_root
from .files import atomic_write, file_sha256

LOCK = "networks.lock"
_SHA256 = re.compile(r"\b[0-9a-f]{64}\b")


def load_torchscript(path: Path) -> tuple[Any, str]:
    """Load a network on the CPU, in evaluation mode.

    Args:
        path: what `torch.jit.save` wrote.

    Returns:
        The network (a `torch.jit.ScriptModule`) and the SHA-256 of its file.

    Raises:
        FileNotFoundError: no such file.
        PermissionError: its hash is not trusted; nothing of it has been read as a network.
        ValueError: it holds no TorchScript.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no network {path}; give the path of a TorchScript file (.pt)")
    content = path.read_bytes()  # read once: what is loaded is what was hashed
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 not in trusted_hashes():
        raise PermissionError(
            f"{path} is a program (TorchScript) that {LOCK} does not know, and it was not loaded; "
            f"if you trust who made it, repeat the command with TAVQ_TRUST={sha256} before it"
        )

    import torch

    try:
        return torch.jit.load(io.BytesIO(content), map_location="cpu").eval(), sha256
    except RuntimeError as error:
        raise ValueError(f"{path} is not a TorchScript file; save the network with torch.jit.save") from error


def trusted_hashes() -> set[str]:
    """The SHA-256 of all networks that may be loaded."""
    shipped = Path(__file__).with_name(LOCK).read_text()
    own = cache_root() / LOCK
    texts = [shipped, own.read_text() if own.is_file() else "", os.environ.get("TAVQ_TRUST", "").lower()]
    return {sha256 for text in texts for sha256 in _SHA256.findall(text)}


def trust(path: Path, why: str) -> None:
    """Let commands of this user load a network from now on: note its hash in the cache directory."""
    own = cache_root() / LOCK
    lines = own.read_text().splitlines() if own.is_file() else []
    line = f"{file_sha256(path)}  {path.name}  {why}"
    if line not in lines:
        with atomic_write(own) as temporary:
            temporary.write_text("\n".join([*lines, line]) + "\n")
