"""python tests/train_in_processes.py RUNS.json: train what a file lists, in the group of torchrun or alone.

`RUNS.json` holds pairs of a command, such as "captioner", and its flags; "{rank}" in a flag is the process's
number. Weights, averaged weights and buffers must be equal in all processes after every step. Dropout is off:
each process draws its own. With `TAVQ_TEST_DIES_AT=STEP` the last process is killed there, with
`TAVQ_TEST_FSDP2=1` the weights are sharded.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tavq.data.layouts import open_dataset
from tavq.tokenizer import train, train_decoder
from tavq.training import loop

NUM_IMAGES = 24
FSDP2 = "TAVQ_TEST_FSDP2" in os.environ
DIES_AT = int(os.environ.get("TAVQ_TEST_DIES_AT", "-1"))


class CheckedTrainer(loop.Trainer):
    def __init__(self, task: Any, *arguments: Any):
        for module in task.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        super().__init__(task, *arguments)

    def _prepare_model(self) -> None:
        if FSDP2:  # by hand: accelerate takes its settings for GPUs alone, and uses DDP on a CPU
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["Block"],
                cpu_ram_efficient_loading=False,
            )
            self.accelerator.state.distributed_type = DistributedType.FSDP
        super()._prepare_model()
        if FSDP2:
            sharded = [isinstance(parameter, DTensor) for parameter in self.model.parameters()]
            assert sharded and all(sharded)

    def train_step(self, batches: Any) -> dict[str, float]:
        if self.state.step == DIES_AT and rank() == world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        report = super().train_step(batches)
        if torch.distributed.is_initialized():
            hashes: list[Any] = [None] * world_size()
            torch.distributed.all_gather_object(hashes, self.hashes())
            differing = [name for name in hashes[0] if len({part[name] for part in hashes}) > 1]
            assert not differing, f"after step {self.state.step} processes differ in {differing}"
        return report

    def hashes(self) -> dict[str, str]:
        found = {}
        for module in (None if FSDP2 else self.model, self.averaged, self.discriminator):
            for name, tensor in [] if module is None else module.state_dict().items():
                found[f"{type(module).__name__}.{name}"] = hashlib.sha256(content(tensor)).hexdigest()
        return found


def content(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def main() -> None:
    loop.Trainer = CheckedTrainer
    for module in (train, train_decoder):
        module.open_dataset = lambda path, split: open_dataset(path, split).take(NUM_IMAGES)
    for command, flags in json.loads(Path(sys.argv[1]).read_text()):
        flags = [flag.replace("{rank}", str(rank())) for flag in flags]
        importlib.import_module(f"tavq.commands.train_{command}").main(flags)


if __name__ == "__main__":
    main()
