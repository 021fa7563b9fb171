"""Settings of the server: models, batches, replicas, limits.

Nothing here imports torch or ray: help and mistakes on the command line are answered without them.
"""

from __future__ import annotations

import dataclasses
import importlib.util

from tavq.base.bounds import check_bounds
from tavq.base.device import Device
from tavq.base.weights import CHECKPOINT
from tavq.generator.config import MAX_MICRO_BATCH, Precision


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """What `tavq.serve.application:build` takes, as arguments of a Serve config file or of `tavq serve`."""

    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/, generator/ and captioner/."""
    device: Device = "auto"
    """Where the models of a replica run."""
    precision: Precision = "float32"
    """Precision of the weights while decoding. int8 (for CPUs) and bfloat16 (for CUDA) are faster and change
    a few tokens."""
    max_batch: int = 16
    """Images that are decoded together, at most."""
    batch_wait_ms: float = 20.0
    """Milliseconds that the first request of a batch waits for others."""
    replicas: int = 1
    """Copies of the models, each with its own cores; the fewest with --max-replicas."""
    max_replicas: int = 0
    """Largest number of replicas; more are started as load grows. 0 keeps `replicas`."""
    cpus_per_replica: float = 1.0
    """Cores of a replica; also the threads that torch uses."""
    gpus_per_replica: float = 0.0
    """GPUs of a replica; 0.5 lets two replicas share one."""
    max_waiting: int = 256
    """Images and other requests that may wait for a replica; further ones are refused with status 503."""
    max_images: int = 16
    """Images that one request may ask for, its candidates (best_of) included."""
    request_mib: float = 20.0
    """Size of a request."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            max_batch=(1, MAX_MICRO_BATCH),
            batch_wait_ms=(0, 10_000),
            replicas=(1, 10_000),
            max_replicas=(0, 10_000),
            cpus_per_replica=(0, 10_000),
            gpus_per_replica=(0, 1_000),
            max_waiting=(1, 1_000_000),
            max_images=(1, 1024),
            request_mib=(0.01, 1_000),
        )
        if self.max_replicas and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas} and replicas {self.replicas}; raise max_replicas, or "
                "leave it out"
            )


def check_ray() -> None:
    """Raise ValueError where Ray is not installed."""
    if not importlib.util.find_spec("ray"):
        raise ValueError("this needs ray, not installed; pip install 'ta-vq[scale]'")
