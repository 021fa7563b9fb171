"""Repositories of the Hugging Face hub, written `hf:OWNER/NAME[@REVISION]`.

Everything else that a user types for a model is a path: a mistyped path is an error, never a download.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HUB_PREFIX = "hf:"
TRANSFORMERS_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
"""What is downloaded of a model of transformers: no code and no pickles."""
DATA_ONLY: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""For `from_pretrained` of transformers, which else asks on stdin whether to run a model's code."""
_HUB_ID = re.compile(r"hf:(?P<repo_id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", flags=re.ASCII)


def directory_of(
    source: str | Path,
    files: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return the directory that `source` names; that of a hub repository is downloaded to the cache.

    Args:
        source: a directory, or `hf:OWNER/NAME[@REVISION]`.
        files: glob patterns of the files that are needed of a repository; `*` matches `/`, too.
        revision: branch, tag or commit; instead of `@REVISION`.
        token: of the hub; True takes the one that `hf auth login` stored.
        cache_dir: where downloads lie; huggingface_hub's own place if None.
        local_files_only: take what lies in the cache, and download nothing.
        force_download: download what lies in the cache, too.

    Raises:
        FileNotFoundError: no such directory, or no such repository on the hub or in the cache.
        ValueError: `source` begins with `hf:` and is no hub id, or names a second revision.
    """
    if not str(source).startswith(HUB_PREFIX):
        if not Path(source).is_dir():
            raise FileNotFoundError(
                f"no directory {source}; a repository of the hub is written {HUB_PREFIX}OWNER/NAME"
            )
        return Path(source)

    named = _HUB_ID.fullmatch(str(source))
    if named is None:
        raise ValueError(f"{source} is no hub id; expected {HUB_PREFIX}OWNER/NAME[@REVISION]")
    if revision is not None and named["revision"] is not None:
        raise ValueError(f"{source} names a revision, and so does revision={revision!r}; give one of them")

    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            named["repo_id"],
            revision=revision or named["revision"],
            allow_patterns=list(files),
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    except (OSError, ValueError) as error:  # errors of HTTP are among OSError, bad names among ValueError
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{source} cannot be had from the hub ({reason}); check name, revision and connection"
        ) from error
    return Path(folder)
