"""Where a long job runs: in this process, or on a Ray cluster. Nothing here imports ray."""

from __future__ import annotations

import dataclasses
from typing import Literal

from .bounds import check_bounds

Engine = Literal["local", "ray"]


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Where the job runs."""

    engine: Engine = "local"
    """local works in this process; ray spreads the work over a Ray cluster, with the same result."""
    address: str = ""
    """Ray cluster: auto, HOST:PORT or ray://HOST:PORT. By default Ray is started on this machine. All nodes
    must see inputs and outputs under the same paths."""
    cpus_per_task: float = 1.0
    """Cores that Ray reserves for a task; torch uses as many threads."""
    gpus_per_task: float = 0.0
    """GPUs that Ray reserves for a task."""

    def __post_init__(self) -> None:
        check_bounds(self, cpus_per_task=(0, 10_000), gpus_per_task=(0, 1_000))
        if self.address and self.engine != "ray":
            raise ValueError("--address is that of a Ray cluster; add --engine ray")
