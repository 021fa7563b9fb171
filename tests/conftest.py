"""Fixtures that several test files share: the photos where they are, and tiny real models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TAVQ_CACHE", str(Path(tempfile.gettempdir()) / "tavq-tests"))

import numpy as np
import pytest
import torch

from tavq.base.files import file_sha256
from tavq.captioner.config import PRESETS as CAPTIONER_PRESETS
from tavq.captioner.model import Captioner, CaptionerConfig
from tavq.data.text_encoder import TextEncoder
from tavq.data.token_writer import write_tokens
from tavq.data.tokens import TokenMeta, TokenRecord
from tavq.generator.config import PRESETS as GENERATOR_PRESETS
from tavq.generator.model import GeneratorConfig, GeneratorModel
from tavq.pipeline import Pipeline
from tavq.tokenizer.config import PRESETS
from tavq.tokenizer.model import TAVQTokenizer, TokenizerConfig
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


def save_network(network: torch.nn.Module | torch.jit.ScriptModule, path: Path) -> Path:
    """Write a network as TorchScript, and let the commands of these tests load it."""
    scripted = network if isinstance(network, torch.jit.ScriptModule) else torch.jit.script(network)
    scripted.save(str(path))
    return trusted(path)


def trusted(path: Path) -> Path:
    """Let the commands of these tests load a TorchScript file; the processes that they start, too."""
    hashes = [*os.environ.get("TAVQ_TRUST", "").split(), file_sha256(path)]
    os.environ["TAVQ_TRUST"] = " ".join(dict.fromkeys(hashes))
    return path


@pytest.fixture(scope="session")
def perceptual_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small frozen network, as --perceptual takes it."""
    torch.manual_seed(0)
    return save_network(ThreeMaps(), tmp_path_factory.mktemp("networks") / "maps.pt")


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


class Moments(torch.nn.Module):
    """The smallest feature network: mean and deviation of each colour."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.float().flatten(2) / 255
        return torch.cat([pixels.mean(2), pixels.std(2)], dim=1)


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small feature network, as --features takes it."""
    return save_network(Moments(), tmp_path_factory.mktemp("network") / "moments_features.pt")


@pytest.fixture
def judge(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with another codebook than `tiny_checkpoint`."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "judge")
    tokenizer = TAVQTokenizer.from_pretrained(folder / "tokenizer")
    torch.nn.init.normal_(tokenizer.quantizer.weight, generator=torch.Generator().manual_seed(1))
    tokenizer.save_pretrained(folder / "tokenizer")
    for part in ("generator", "captioner"):  # which name their codebook
        path = folder / part / "config.json"
        config = json.loads(path.read_text()) | {"codebook_hash": tokenizer.codebook_hash}
        path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_checkpoint: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_vision_language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with random weights, as transformers saves it."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = [*special.values(), "<image>", *"a dog runs on the grass near two trees . yes no".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **special
    )
    heads = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16, "initializer_range": 1.0}
    vision = hf.CLIPVisionConfig(image_size=16, patch_size=8, num_hidden_layers=2, **heads)
    text = hf.LlamaConfig(vocab_size=len(words), num_hidden_layers=1, num_key_value_heads=2, **heads)
    text.pad_token_id, text.bos_token_id, text.eos_token_id = 1, 2, 3
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    size = {"height": 16, "width": 16}
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size=size, crop_size=size),
        fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    torch.manual_seed(1)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=4)
    model = hf.LlavaForConditionalGeneration(config)
    model.model.multi_modal_projector.linear_2.weight.data.normal_()  # so that it sees differences of images
    model.lm_head.weight.data[:5] = 0  # it says words, and no special tokens
    folder = tmp_path_factory.mktemp("vision_language")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_in_processes(count: int, *arguments: object, fails: bool = False, **environment: str) -> str:
    """Run `python ARGUMENTS` in `count` processes that form one group; return what they print."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    # `accelerate launch --cpu` would start one process and not say so.
    common = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *(launch if count > 1 else []), *map(str, arguments)],
        env=os.environ | common | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="session")
def run_processes() -> Callable[..., str]:
    return run_in_processes


Runs = Sequence[tuple[str, Sequence[object]]]


@pytest.fixture(scope="session")
def train_in_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Train several models, one after the other, in one group of processes; see train_in_processes.py."""

    def train(count: int, runs: Runs, **options: object) -> str:
        listed = tmp_path_factory.mktemp("runs") / "runs.json"
        listed.write_text(json.dumps([[command, list(map(str, flags))] for command, flags in runs]))
        return run_in_processes(count, ROOT / "tests" / "train_in_processes.py", listed, **options)

    return train


@pytest.fixture(scope="session")
def small_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token set of 12 images with captions of unlike length."""
    random = np.random.default_rng(0)
    records = []
    for split in ("train", "val"):
        for number in range(12):
            ids = random.integers(0, 8, (2, 2, 4))
            captions = (f"A dog by {number}" + " and a ball" * (number % 4) + ".", "A cat by water.")
            records.append(TokenRecord(f"{split}{number}", split, ids, captions))
    directory = tmp_path_factory.mktemp("small-tokens") / "tokens"
    write_tokens(directory, records, TokenMeta(8, (2, 4), "codebook", "tokenizer", "made up", 16), 5)
    return directory
