"""Checkpoints: where they come from, what is recorded beside the weights, and what is checked of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from tavq.base.weights import shipped_checkpoint
from tavq.commands.train_captioner import main as train_captioner
from tavq.commands.train_generator import main as train_generator
from tavq.commands.train_tokenizer import main as train_tokenizer
from tavq.data.text_encoder import TextEncoder
from tavq.data.token_writer import write_tokens
from tavq.data.tokens import TokenMeta, TokenRecord
from tavq.generator.model import GeneratorModel
from tavq.pipeline import Pipeline
from tavq.tokenizer.config import PRESETS
from tavq.tokenizer.model import TAVQTokenizer
from tavq.training import building

ROOT = Path(__file__).resolve().parent.parent


class Hub:
    """Stands in for the hub: repositories are folders below `repositories`, downloads are copies."""

    def __init__(self, root: Path):
        self.repositories = root / "repositories"
        self.cache = root / "cache"
        self.calls: list[dict[str, Any]] = []
        self.commits: list[dict[str, Any]] = []

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        repository = self.repositories / repo_id
        if not repository.is_dir():
            raise OSError(f"404 Client Error\n\nRepository Not Found: {repo_id}")
        names = [path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, self.cache / name)
        return str(self.cache)

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.commits.append({"repo_id": repo_id, **options})

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> str:
        shutil.copytree(folder_path, self.repositories / repo_id)
        self.commits.append({"repo_id": repo_id, **options})
        return f"https://huggingface.co/{repo_id}/commit/1"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: stand_in)
    return stand_in


def test_a_pipeline_comes_from_the_hub_without_what_else_lies_there(hub, tiny_checkpoint):
    repository = hub.repositories / "someone" / "tiny"
    shutil.copytree(tiny_checkpoint, repository)
    for name in ("train.py", "tokenizer/pytorch_model.bin", "generator/state.pkl", "results.json"):
        (repository / name).write_text("not needed")
    pipeline = Pipeline.from_pretrained("hf:someone/tiny@v1", cache_dir="there", local_files_only=True)
    assert pipeline.generator and pipeline.captioner
    (call,) = hub.calls
    expected = {"repo_id": "someone/tiny", "revision": "v1", "cache_dir": "there", "local_files_only": True}
    assert call.items() >= expected.items()
    names = [path.name for path in hub.cache.rglob("*") if path.is_file()]
    assert sorted(names) == ["README.md"] * 3 + ["config.json"] * 3 + ["model.safetensors"] * 3


def test_what_is_pushed_comes_back(hub, tiny_tokenizer):
    address = tiny_tokenizer.push_to_hub(
        "hf:someone/tokenizer", commit_message="first", private=True, branch="trial", create_pr=True
    )
    assert address == "https://huggingface.co/someone/tokenizer/commit/1"
    assert hub.commits[0].items() >= {"repo_id": "someone/tokenizer", "private": True}.items()
    commit = {"revision": "trial", "create_pr": True, "commit_message": "first"}
    assert hub.commits[1].items() >= commit.items()
    loaded = TAVQTokenizer.from_pretrained("hf:someone/tokenizer", revision="trial", token="secret")
    assert hub.calls[0].items() >= {"revision": "trial", "token": "secret"}.items()
    assert loaded.codebook_hash == tiny_tokenizer.codebook_hash


@pytest.mark.slow
def test_a_text_encoder_comes_from_the_hub_without_its_code(hub):
    from tavq.data.text_encoder import minilm_directory

    repository = hub.repositories / "someone" / "encoder"
    shutil.copytree(minilm_directory(), repository)
    (repository / "modeling_encoder.py").write_text("raise SystemExit")
    assert TextEncoder("hf:someone/encoder").hash == TextEncoder().hash
    assert not list(hub.cache.rglob("*.py")) and not list(hub.cache.rglob("*.bin"))


@pytest.mark.parametrize("source", ["checkpoints/flickr9k", "openai/clip", "./no", "/no/where", "flickr8k"])
def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(hub, source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no directory {source}; a repository of the hub is written"):
        Pipeline.from_pretrained(source)
    with pytest.raises(FileNotFoundError, match=f"no directory {source}"):
        TextEncoder(source)
    assert hub.calls == []


@pytest.mark.parametrize("source", ["hf:flickr8k", "hf:", "hf:a/b/c", "hf:a/b@", "hf:a/b c", "hf:../x/y"])
def test_what_is_no_hub_id_is_named(hub, source):
    with pytest.raises(ValueError, match="is no hub id; expected hf:OWNER/NAME"):
        Pipeline.from_pretrained(source)
    assert hub.calls == []


def test_a_repository_that_is_not_there_and_two_revisions_are_named(hub):
    with pytest.raises(FileNotFoundError, match=r"hf:a/b cannot be had from the hub \(404 Client Error\)"):
        Pipeline.from_pretrained("hf:a/b")
    with pytest.raises(ValueError, match="hf:a/b@v1 names a revision, and so does revision='v2'"):
        Pipeline.from_pretrained("hf:a/b@v1", revision="v2")


def test_without_a_network_a_hub_id_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="cannot be had from the hub") as error:
        Pipeline.from_pretrained("hf:someone/tiny", cache_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_the_shipped_weights_are_the_default():
    assert shipped_checkpoint() == ROOT / "checkpoints" / "flickr8k"
    assert Pipeline.from_pretrained().directory == shipped_checkpoint()


def test_the_hash_of_the_weights_is_recorded_and_a_flipped_bit_is_found(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    recorded = json.loads((tmp_path / "config.json").read_text())["weights_sha256"]
    assert recorded == hashlib.sha256(content).hexdigest()
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that config\.json was saved"):
        TAVQTokenizer.from_pretrained(tmp_path)


def test_checkpoints_from_before_the_hash_still_load(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["weights_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert TAVQTokenizer.from_pretrained(tmp_path).codebook_hash == tiny_tokenizer.codebook_hash


def test_the_check_before_loading_takes_no_memory_and_leaves_the_random_state(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    building.check_fits(TAVQTokenizer, PRESETS["tiny"], tmp_path / "model.safetensors", str)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.nn.Linear(2, 2).weight.is_meta  # the hooks and the device are gone


def test_a_model_that_cannot_be_trained_here_is_refused_before_it_is_built():
    config = GeneratorModel.config_class(width=2**14, num_layers=1000, hidden_width=2**16)
    with pytest.raises(ValueError, match=r"training it needs more than this machine's .* GB of memory"):
        GeneratorModel.from_config(config)
    tiny = GeneratorModel.config_class(width=32, num_layers=2, num_heads=2, hidden_width=64)
    assert next(GeneratorModel.from_config(tiny).parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (train_tokenizer, ["--model.quantizer.num-codes", 2**24, "--model.quantizer.code-dim", 2**14]),
        (train_generator, ["--model.width", 2**15, "--model.num-layers", 1000]),
        (train_captioner, ["--model.width", 2**14, "--model.decoder-layers", 1000]),
    ],
)
def test_a_training_that_this_machine_has_no_memory_for_ends_in_one_line(main, flags, tmp_path, capsys):
    records = [TokenRecord(s, s, np.zeros((1, 8, 8), int), ("A dog.",)) for s in ("train", "val")]
    write_tokens(tmp_path / "tokens", records, TokenMeta(8, (8, 8), "codebook", "tokenizer", "made up", 32))
    data = ["--tokens", tmp_path / "tokens"]
    if main is train_tokenizer:
        data = ["--data", "shapes", "--align", "none"]
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in ("--preset", "tiny", *data, *flags, "--out", tmp_path / "run")])
    assert stopped.value.code == 2
    assert "error: training it needs more than this machine's" in capsys.readouterr().err
