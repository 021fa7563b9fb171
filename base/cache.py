"""Where caches lie."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_directory() -> Path:
    """`$TAVQ_CACHE`, or ~/.cache/tavq."""
    return Path(os.environ.get("TAVQ_CACHE") or Path.home() / ".cache" / "tavq")
