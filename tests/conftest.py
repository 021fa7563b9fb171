"""Fixtures that several test files share: the photos where they are, and tiny real models."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TAVQ_CACHE", str(Path(tempfile.gettempdir()) / "tavq-tests"))

import pytest
import torch

from tavq.captioner.model import PRESETS as CAPTIONER_PRESETS
from tavq.captioner.model import Captioner, CaptionerConfig
from tavq.data.text_encoder import TextEncoder
from tavq.generator.model import PRESETS as GENERATOR_PRESETS
from tavq.generator.model import GeneratorConfig, GeneratorModel
from tavq.pipeline import Pipeline
from tavq.tokenizer.model import PRESETS, TAVQTokenizer, TokenizerConfig
from tavq.tokenizer.provenance import TokenizerProvenance

torch.set_num_threads(1)  # the models are tiny, and two threads collapse where another process is busy

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The photos and feature networks beside the repository; the test skips where they are absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the photos and networks in ../shared, which is absent")
    return folder


class ThreeMaps(torch.nn.Module):
    """Feature maps at strides 1, 2 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.second = torch.nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.third = torch.nn.Conv2d(12, 16, 3, stride=2, padding=1)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        first = torch.relu(self.first(images))
        second = torch.relu(self.second(first))
        return [first, second, torch.relu(self.third(second))]


@pytest.fixture(scope="session")
def perceptual_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small frozen network, as --perceptual takes it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("networks") / "maps.pt"
    torch.jit.script(ThreeMaps()).save(str(path))
    return path


@pytest.fixture(scope="session")
def flickr8k_dir(shared_dir: Path) -> Path:
    """Flickr8k in the Karpathy layout; the test skips where it is absent."""
    return shared_dir / "data" / "flickr8k"


@pytest.fixture(scope="session")
def tiny_tokenizer() -> TAVQTokenizer:
    """A tokenizer of the `tiny` preset with random weights, which calls itself aligned."""
    torch.manual_seed(0)
    provenance = TokenizerProvenance(
        align="ot", aligned_levels=(1, 2, 3), text_encoder="minilm", text_encoder_hash=TextEncoder().hash
    )
    return TAVQTokenizer(TokenizerConfig.of(PRESETS["tiny"], provenance=provenance)).eval()


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_tokenizer: TAVQTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tokenizer/, generator/ and captioner/ of the `tiny` presets, random weights."""
    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    shared = {"num_codes": tiny_tokenizer.num_codes, "grid_size": tiny_tokenizer.grid_size}
    shared["codebook_hash"] = tiny_tokenizer.codebook_hash
    torch.manual_seed(0)
    generator = GeneratorConfig.of(GENERATOR_PRESETS["tiny"], text_encoder_hash=TextEncoder().hash, **shared)
    words = tuple("a dog cat runs jumps over the log man woman red black in on grass water".split())
    captioner = CaptionerConfig(CAPTIONER_PRESETS["tiny"], code_dim=16, words=words, **shared)
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    GeneratorModel(generator).save_pretrained(folder / "generator")
    Captioner(captioner).save_pretrained(folder / "captioner")
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_checkpoint: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_checkpoint)
