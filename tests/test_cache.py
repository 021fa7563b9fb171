"""The caches: one place for all, the same bits at every call, and `tavq cache` to see and clear them."""

from __future__ import annotations

import pytest
import torch

from tavq.base.cache import CACHES, cache_directory, cache_root, cached_tensors
from tavq.cli import main
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.text_encoder import TextEncoder
from tavq.generator.text_states import pack_states


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TAVQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "/home/me/.cache/tavq"),
        ("linux", {"XDG_CACHE_HOME": "/fast"}, "/fast/tavq"),
        ("darwin", {}, "/home/me/Library/Caches/tavq"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/tavq"),
        ("linux", {"TAVQ_CACHE": "/mine", "XDG_CACHE_HOME": "/fast"}, "/mine"),
    ],
)
def test_caches_lie_where_the_platform_or_the_user_says(monkeypatch, platform, variables, expected):
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("TAVQ_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_root().as_posix() == expected
    assert [cache_directory(name).as_posix() for name in CACHES] == [f"{expected}/{name}" for name in CACHES]


def test_tensors_are_computed_once_for_each_key(tmp_path):
    calls = []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"transposed": torch.arange(6.0).view(2, 3).T}

    first = cached_tensors(tmp_path, "one", compute)["transposed"]
    assert torch.equal(cached_tensors(tmp_path, "one", compute)["transposed"], first) and len(calls) == 1
    assert torch.equal(first, torch.arange(6.0).view(2, 3).T)
    cached_tensors(tmp_path, "two", compute)
    assert len(calls) == 2


def test_nothing_is_cached_where_computing_fails(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cached_tensors(tmp_path, "one", lambda: {"a": torch.tensor(1 / 0)})
    assert list(tmp_path.iterdir()) == []


def test_the_command_lists_sizes_and_clears_one_cache_or_all(root, capsys):
    encoder = TextEncoder()
    EmbeddingCache(encoder).encode(["a dog"])
    pack_states(encoder, ["a dog"], 8)
    (root / "teacher_maps").mkdir()
    (root / "teacher_maps" / "key.safetensors").write_bytes(bytes(1_500_000))
    (root / "mine.txt").write_text("not ours")

    main(["cache"])
    shown = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:])
    assert list(shown) == [*CACHES, "total"]
    assert shown["teacher_maps"] == "1.5" and shown["image_features"] == "0"
    assert float(shown["text_vectors"]) > 0 and float(shown["token_states"]) > 0

    main(["cache", "--clear", "teacher_maps"])
    assert capsys.readouterr().out == "teacher_maps: cleared 1.5 MB\n"
    assert sorted(path.name for path in root.iterdir()) == ["mine.txt", "text_vectors", "token_states"]

    main(["cache", "--clear"])
    assert [path.name for path in root.iterdir()] == ["mine.txt"]
    main(["cache", "--clear"])
    assert capsys.readouterr().out.splitlines()[-1] == "image_features: cleared 0 B"


def test_an_unknown_cache_is_refused_and_nothing_is_cleared(root, capsys):
    (root / "teacher_maps").mkdir(parents=True)
    with pytest.raises(SystemExit) as exit_:
        main(["cache", "--clear", "teacher_maps", "../home"])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error: unknown cache '../home'; choose one of")
    assert (root / "teacher_maps").is_dir()
