"""The Ray cluster that jobs and servers run on."""

from __future__ import annotations

import logging
import math
import os

import ray


def connect(address: str, *, cores: float = 0, object_store_bytes: int | None = None) -> None:
    """Connect to a Ray cluster, or start one of this machine alone.

    Args:
        address: auto, HOST:PORT or ray://HOST:PORT; empty starts one, which ends with this process.
        cores: that a cluster started here shall offer at least, even where the machine has fewer.
        object_store_bytes: shared memory of a cluster started here; Ray's own default if None.

    Raises:
        ValueError: no cluster answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 would starve them on a busy machine
    options: dict = {"logging_level": logging.WARNING, "log_to_driver": True}
    if address:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"no Ray cluster at {address} ({reason}); start one with ray start") from error
        return

    ray.init(
        address="local",  # else Ray joins a cluster that happens to run here
        num_cpus=max(math.ceil(cores), os.cpu_count() or 1),
        object_store_memory=object_store_bytes,
        include_dashboard=False,
        **options,
    )
