"""What the commands of `chaos.py` work on: photos, a checkpoint with random weights, tokens, a chat server.

Everything is tiny, so that a command takes a second or two.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = {"train": 40, "val": 10, "test": 10}


class World:
    """What the commands work on, in a folder; made once.

    Attributes:
        folder: holds all of it.
        endpoint: address of the chat server that `describe` asks.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.endpoint = ""

    def places(self) -> dict[str, str]:
        """Return the names that `Job.arguments` may hold -> paths."""
        names = {"photos", "checkpoint", "tokens"}
        files = {"prompts": "prompts.txt", "preferences": "preferences.jsonl", "network": "mean_features.pt"}
        places = {name: str(self.folder / name) for name in names}
        places |= {name: str(self.folder / file) for name, file in files.items()}
        return places | {"endpoint": self.endpoint}

    def build(self) -> None:
        """Make what is missing."""
        ready = self.folder / "ready"
        if ready.exists():
            return
        self._write_photos()
        self._write_checkpoint()
        self._write_network()
        from tavq import cli

        places = self.places()
        tokenize = f"tokenize --data {places['photos']} --checkpoint {places['checkpoint']}/tokenizer"
        cli.main([*tokenize.split(), "--out", places["tokens"]])
        preferences = f"preferences --data {places['photos']} --checkpoint {places['checkpoint']}"
        cli.main(
            [*preferences.split(), "--prompts", "24", "--candidates", "2", "--out", places["preferences"]]
        )
        ready.touch()

    def _write_photos(self) -> None:
        from tavq.data.layouts import open_dataset

        prompts = []
        for split, count in PHOTOS.items():
            dataset = open_dataset("shapes", split).take(count)
            (self.folder / "photos" / split).mkdir(parents=True, exist_ok=True)
            for number, example in enumerate(dataset.examples):
                # Names are unlike in all splits: captions are stored by id.
                path = self.folder / "photos" / split / f"{split}-{number:03d}.png"
                dataset.load_image(number).save(path)
                path.with_suffix(".txt").write_text("\n".join(example.captions))
                prompts.append(example.captions[0])
        (self.folder / "prompts.txt").write_text("\n".join(dict.fromkeys(prompts[:24])) + "\n")

    def _write_checkpoint(self) -> None:
        """Write tokenizer/, generator/ and captioner/ of the tiny presets, with random weights."""
        import torch

        from tavq.captioner.config import PRESETS as CAPTIONER
        from tavq.captioner.model import Captioner, CaptionerConfig
        from tavq.data.text_encoder import TextEncoder
        from tavq.generator.config import PRESETS as GENERATOR
        from tavq.generator.model import GeneratorConfig, GeneratorModel
        from tavq.tokenizer.config import PRESETS as TOKENIZERS
        from tavq.tokenizer.model import TAVQTokenizer, TokenizerConfig
        from tavq.tokenizer.provenance import TokenizerProvenance

        torch.manual_seed(0)
        text = TextEncoder().hash
        provenance = TokenizerProvenance(
            align="ot", aligned_levels=(1, 2, 3), text_encoder="minilm", text_encoder_hash=text
        )
        tokenizer = TAVQTokenizer(TokenizerConfig.of(TOKENIZERS["tiny"], provenance=provenance))
        shared: dict[str, Any] = {"num_codes": tokenizer.num_codes, "grid_size": tokenizer.grid_size}
        shared["codebook_hash"] = tokenizer.codebook_hash
        words = tuple(
            "a large small red green blue circle square star and above below on white black".split()
        )
        code_dim = tokenizer.codebook.shape[1]
        parts = {
            "tokenizer": tokenizer,
            "generator": GeneratorModel(
                GeneratorConfig.of(GENERATOR["tiny"], text_encoder_hash=text, **shared)
            ),
            "captioner": Captioner(
                CaptionerConfig(CAPTIONER["tiny"], code_dim=code_dim, words=words, **shared)
            ),
        }
        for name, model in parts.items():
            model.save_pretrained(self.folder / "checkpoint" / name)

    def _write_network(self) -> None:
        """Write a feature network: mean and deviation of each colour in nine fields."""
        import torch

        def moments(images: torch.Tensor) -> torch.Tensor:
            fields = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 3).flatten(1)
            return torch.cat([fields, fields.square()], dim=1)

        example = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
        torch.jit.trace(moments, example).save(self.places()["network"])


CHAT = """
import sys, time
sys.path.insert(0, {tests!r})
from chat_server import ChatServer
answer = lambda level, prompt: f"A plain image of level {{level}}. It shows some shapes."
with ChatServer(answer, delay_s=0.02) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


def start_chat_server() -> tuple[subprocess.Popen[str], str]:
    """Start the chat server of the tests in a process of its own; return it with its address."""
    code = CHAT.format(tests=str(ROOT / "tests"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def drop_privileges() -> None:
    """Let root obey the rights of files, too, in this process; others do so anyway. Linux alone."""
    if os.geteuid() != 0:
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    data = (ctypes.c_uint32 * 6)(*[0] * 6)  # none effective, permitted or inheritable
    if libc.capset(ctypes.byref(header), ctypes.byref(data)) != 0:
        raise OSError(ctypes.get_errno(), "the capabilities of root cannot be dropped")
