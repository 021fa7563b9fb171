"""Files from strangers are data, never code: a hostile file ends a command with exit code 2 and one line."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import struct
import tarfile
import tomllib
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image

from tavq import cli
from tavq.base.files import file_sha256
from tavq.base.torchscript import load_torchscript, trust
from tavq.captioner.caption_folder import caption_folder
from tavq.captioner.decoding import Caption
from tavq.commands.caption import main as caption
from tavq.commands.export import main as export
from tavq.commands.generate import main as generate
from tavq.commands.tokenize import main as tokenize
from tavq.commands.train_generator import main as train_generator
from tavq.data.layouts import open_dataset
from tavq.data.text_encoder import minilm_directory
from tavq.data.token_writer import write_tokens
from tavq.data.tokens import TokenMeta, TokenRecord, open_tokens

from .conftest import ROOT
from .test_tokenizer_adapters import diffusers_model


class Bomb:
    """Unpickling this makes the file `exploded`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def refused(main, *arguments: object) -> str:
    """Run a command that must refuse its input; return the one line that it says."""
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr("sys.stderr", stderr)
        main([str(argument) for argument in arguments])
    lines = [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]
    assert exit_.value.code == 2 and len(lines) == 1 and "Traceback" not in stderr.getvalue()
    return lines[0]


def put_tokens(directory: Path) -> Path:
    records = [TokenRecord(s, s, np.zeros((1, 2, 4), int), ("A dog.",)) for s in ("train", "val")]
    write_tokens(directory, records, TokenMeta(8, (2, 4), "codebook", "tokenizer", "made up", 16))
    return directory


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth"])
def test_a_pickle_in_a_token_shard_is_refused_by_name_and_never_runs(tmp_path, extension):
    tokens, exploded = put_tokens(tmp_path / "tokens"), tmp_path / "exploded"
    content = pickle.dumps(Bomb(exploded))
    with tarfile.open(tokens / "train-000000.tar", "a") as archive:
        member = tarfile.TarInfo(f"00000000.{extension}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    line = refused(train_generator, "--preset", "tiny", "--tokens", tokens, "--out", tmp_path / "out")
    assert f"train-000000.tar holds 00000000.{extension}, expected .json and .npy files alone" in line
    assert not exploded.exists()


def test_pickled_objects_in_an_npy_file_are_refused_and_never_run(tmp_path):
    tokens, exploded = put_tokens(tmp_path / "tokens"), tmp_path / "exploded"
    file = io.BytesIO()
    objects = np.full((1, 2, 4), None)
    objects[0, 0, 0] = Bomb(exploded)
    np.save(file, objects, allow_pickle=True)
    with tarfile.open(tokens / "train-000000.tar", "w") as archive:
        for name, content in {"0.json": b'{"id": "a", "captions": ["A"]}', "0.npy": file.getvalue()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    line = refused(train_generator, "--preset", "tiny", "--tokens", tokens, "--out", tmp_path / "out")
    assert "train-000000.tar, sample 0: ids are object" in line
    assert not exploded.exists()


def test_a_token_folder_whose_name_is_a_shell_command_is_just_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens = put_tokens(Path("pipe:touch exploded;#"))
    assert list(open_tokens(tokens, "train").names) == ["train"]
    assert os.listdir() == [str(tokens)]
    line = refused(train_generator, "--preset", "tiny", "--tokens", "pipe:touch exploded;#no", "--out", "out")
    assert "no token set in pipe:touch exploded;#no" in line
    assert os.listdir() == [str(tokens)]


def png(width: int, height: int) -> bytes:
    """The head of a PNG of that size, without the pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk
    return data + struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IDAT" + bytes(4)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda image: pytest.fail("was decoded"))
    (tmp_path / "large.png").write_bytes(png(10_000, 10_000))
    line = refused(caption, tmp_path / "large.png", "--checkpoint", tiny_checkpoint)
    assert "large.png: image is 10000 x 10000 px, that is 100 million pixels, and at most 89 million" in line


def test_a_named_pipe_is_no_image_and_nobody_waits_for_it(tmp_path, tiny_checkpoint):
    folder = tmp_path / "images"
    folder.mkdir()
    os.mkfifo(folder / "pipe.jpg")
    line = refused(caption, folder / "pipe.jpg", "--checkpoint", tiny_checkpoint)
    assert "pipe.jpg: not a regular file" in line
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    with pytest.warns(UserWarning, match=r"skipped 1 of 2 images .*pipe\.jpg: not a regular file"):
        describe = lambda images: [[Caption("red", 0.0, ())] for _ in images]  # noqa: E731
        assert caption_folder(folder, tmp_path / "out.jsonl", describe) == 1


def test_postscript_that_calls_itself_jpg_never_reaches_ghostscript(tmp_path, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    (tmp_path / "a.jpg").write_bytes(script)
    line = refused(caption, tmp_path / "a.jpg", "--checkpoint", tiny_checkpoint)
    assert "a.jpg: not an image of a known format (AVIF, BMP," in line


class TestPathsOutOfTheDataset:
    """A file outside that really is an image, and annotations that name it."""

    @pytest.fixture
    def data(self, tmp_path) -> Path:
        Image.new("RGB", (16, 16)).save(tmp_path / "secret.png")
        (tmp_path / "data" / "images").mkdir(parents=True)
        return tmp_path / "data"

    @pytest.fixture(params=["../secret.png", "images/../../secret.png", "{outside}/secret.png"])
    def name(self, request, tmp_path) -> str:
        return request.param.format(outside=tmp_path)

    def refused(self, data: Path, tmp_path: Path) -> str:
        return refused(tokenize, "--data", data, "--out", tmp_path / "out", "--checkpoint", self.tokenizer)

    @pytest.fixture(autouse=True)
    def checkpoint(self, tiny_checkpoint):
        self.tokenizer = tiny_checkpoint / "tokenizer"

    def test_karpathy(self, data, name, tmp_path):
        entry = {"filename": name, "split": "train", "sentences": [{"raw": "A dog."}]}
        (data / "dataset_a.json").write_text(json.dumps({"images": [entry]}))
        assert f"dataset_a.json, image 0 names '{name}', which leads out of the dataset" in self.refused(
            data, tmp_path
        )

    def test_karpathy_folder(self, data, tmp_path):
        entry = {"filename": "secret.png", "filepath": "../..", "split": "train", "sentences": [{"raw": "A"}]}
        (data / "dataset_a.json").write_text(json.dumps({"images": [entry]}))
        assert "names '../..', which leads out" in self.refused(data, tmp_path)

    def test_coco(self, data, name, tmp_path):
        (data / "annotations").mkdir()
        content = {
            "images": [{"id": 1, "file_name": name}],
            "annotations": [{"image_id": 1, "caption": "A dog."}],
        }
        (data / "annotations" / "captions_train2017.json").write_text(json.dumps(content))
        assert f"names '{name}', which leads out of the dataset" in self.refused(data, tmp_path)

    def test_flickr8k(self, data, name, tmp_path):
        (data / "captions.txt").write_text(f"image,caption\n{name},A dog.\n")
        assert f"captions.txt names '{name}', which leads out" in self.refused(data, tmp_path)

    def test_metadata(self, data, name, tmp_path):
        (data / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "A dog."}) + "\n")
        assert f"metadata.jsonl, line 1 names '{name}', which leads out" in self.refused(data, tmp_path)

    def test_links_to_files_and_folders(self, data, tmp_path, monkeypatch):
        (data / "a.png").symlink_to(tmp_path / "secret.png")
        (data / "linked").symlink_to(tmp_path)
        for name in ("a.png", "linked/secret.png"):
            row = {"file_name": name, "text": "A dog.", "split": "train"}
            (data / "metadata.jsonl").write_text(json.dumps(row) + "\n")
            line = self.refused(data, tmp_path)
            assert f"{name} leads to {tmp_path / 'secret.png'}, out of the dataset {data}" in line
        monkeypatch.setenv("TAVQ_FOLLOW_LINKS", "1")
        assert open_dataset(data, "train").load_image(0).size == (16, 16)

    def test_a_link_to_a_text(self, data, tmp_path):
        (tmp_path / "secret.txt").write_text("A secret.")
        Image.new("RGB", (16, 16)).save(data / "a.png")
        (data / "a.txt").symlink_to(tmp_path / "secret.txt")
        assert f"a.txt leads to {tmp_path / 'secret.txt'}" in self.refused(data, tmp_path)

    def test_links_that_stay_inside_or_lead_to_the_blobs_of_the_hub_are_followed(self, tmp_path):
        snapshot = tmp_path / "datasets--somebody--photos" / "snapshots" / "abc"
        blobs = snapshot.parent.parent / "blobs"
        for folder in (snapshot / "train", blobs):
            folder.mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(blobs / "0123", format="PNG")
        (snapshot / "train" / "a.png").symlink_to("../../../blobs/0123")
        (snapshot / "train" / "b.png").symlink_to("a.png")
        rows = [{"file_name": f"train/{name}.png", "text": "A dog."} for name in "ab"]
        (snapshot / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "link").symlink_to(snapshot)
        assert len(open_dataset(tmp_path / "link", "train")) == 2


def put_checkpoint(source: Path, directory: Path, **changes: object) -> Path:
    """Copy a checkpoint; `changes` replace fields of its config.json, by dotted names."""
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    for name, value in changes.items():
        *parents, field = name.split(".")
        functools.reduce(dict.__getitem__, parents, config)[field] = value
    (directory / "config.json").write_text(json.dumps(config))
    return directory


ABSURD = [
    ("tokenizer", "quantizer.num_codes", 10**9, "num_codes is 1000000000, expected 2 to"),
    ("tokenizer", "quantizer.num_codes", 2**24, "asks for more than"),
    ("tokenizer", "quantizer.code_dim", 17, "do not fit each other"),
    ("tokenizer", "trunk_blocks", 10**6, "trunk_blocks is 1000000, expected 1 to 1000"),
    ("tokenizer", "trunk_blocks", 1000, "asks for more than"),
    ("tokenizer", "blocks_per_stage", -1, "blocks_per_stage is -1"),
    ("tokenizer", "patch_px", 0, "patch_px is 0, expected 1 to"),
    ("tokenizer", "image_size_px", 10**9, "image_size_px is 1000000000"),
    ("tokenizer", "channels", [], "channels is empty"),
    ("tokenizer", "num_heads", 0, "num_heads is 0"),
    ("tokenizer", "transport_temperature", float("nan"), "NaN is no finite number"),
    ("tokenizer", "transport_temperature", float("-inf"), "-Infinity is no finite number"),
    ("tokenizer", "text_dim", "many", 'wrong value type for field "text_dim"'),
    ("generator", "num_layers", 10**6, "num_layers is 1000000"),
    ("generator", "num_layers", 1000, "asks for more than"),
    ("generator", "width", 0, "width is 0"),
    ("generator", "num_heads", 0, "num_heads is 0"),
    ("generator", "hidden_width", 2**18, "asks for more than"),
    ("generator", "grid_size", [10**5, 10**5], "grid_size is (100000, 100000)"),
    ("captioner", "shape.encoder_layers", 10**6, "encoder_layers is 1000000"),
    ("captioner", "shape.max_words", 10**9, "max_words is 1000000000"),
    ("captioner", "decoder_config", {"model_type": "gpt2", "n_layer": 10**6}, "asks for more than"),
    ("captioner", "decoder_config", {"model_type": "gpt2", "n_embd": 12 * 10**8}, "asks for more than"),
    ("captioner", "decoder_config", {"model_type": "evil"}, "do not fit each other"),
]


@pytest.mark.parametrize(("part", "field", "value", "message"), ABSURD)
def test_an_absurd_configuration_is_refused_before_memory_is_taken(
    tiny_checkpoint, tmp_path, part, field, value, message
):
    directory = put_checkpoint(tiny_checkpoint / part, tmp_path / part, **{field: value})
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**30, limits[1]))
    try:
        line = refused(export, directory, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no configuration"),
        (b"[1, 2]", "it holds no object"),
        (b"\xff\xfe", "is no configuration"),
        (b"[" * 10**5, "is no configuration"),
        (b'{"kind": "ta-vq-tokenizer", "transport_temperature": 1e999}', "1e999 is no finite number"),
        (b" " * (2**24 + 1), "larger than"),
    ],
)
def test_a_configuration_that_is_none_is_named(tiny_checkpoint, tmp_path, content, message):
    directory = put_checkpoint(tiny_checkpoint / "tokenizer", tmp_path / "tokenizer")
    (directory / "config.json").write_bytes(content)
    line = refused(export, directory, "--out", tmp_path / "out")
    assert str(directory / "config.json") in line and message in line


@pytest.mark.parametrize("length", [0, 4, 100, 20_000])
def test_truncated_weights_are_named(tiny_checkpoint, tmp_path, length):
    directory = put_checkpoint(tiny_checkpoint / "generator", tmp_path / "generator")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    assert f"{weights} is damaged" in refused(export, directory, "--out", tmp_path / "out")


def test_flipped_bits_in_the_weights_are_found(tiny_checkpoint, tmp_path):
    directory = put_checkpoint(tiny_checkpoint / "captioner", tmp_path / "captioner")
    weights = directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 64
    weights.write_bytes(content)
    line = refused(export, directory, "--out", tmp_path / "out")
    assert f"{weights} is not the file that config.json was saved with" in line


def test_a_pickle_in_the_place_of_weights_never_runs(tiny_checkpoint, tmp_path):
    directory = put_checkpoint(tiny_checkpoint / "tokenizer", tmp_path / "tokenizer")
    exploded = tmp_path / "exploded"
    (directory / "model.safetensors").write_bytes(pickle.dumps(Bomb(exploded)))
    assert "model.safetensors is damaged" in refused(export, directory, "--out", tmp_path / "out")
    assert not exploded.exists()


class WritesFile(torch.nn.Module):
    """A network whose every call fills a file with ones."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = str(path)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        ones = torch.from_file(self.path, True, 4).fill_(1.0)
        return images.float().mean(dim=(2, 3)) * ones.mean()


@pytest.mark.parametrize(
    "command",
    [
        "eval tokenizer --data shapes --limit 4 --checkpoint CHECKPOINT --out OUT.json --features NETWORK",
        "eval t2i --data shapes --limit 4 --checkpoint CHECKPOINT --out OUT.json --features NETWORK",
        "score images PHOTOS PHOTOS --out OUT.json --features NETWORK",
        "train tokenizer --preset tiny --data shapes --align none --out OUT --perceptual NETWORK",
        "train tokenizer --preset tiny --data shapes --align none --out OUT --distill NETWORK",
        "train decoder --preset tiny --tokenizer CHECKPOINT/tokenizer --out OUT --perceptual NETWORK",
        "align --base diffusers:FOREIGN --data shapes --out OUT --perceptual NETWORK",
    ],
    ids=lambda command: " ".join(re.findall(r"^[a-z]+ [a-z0-9]*|--\w+(?= NETWORK)", command)),
)
def test_a_torchscript_network_of_unknown_hash_never_runs(tmp_path, tiny_checkpoint, command):
    network, exploded = tmp_path / "network.pt", tmp_path / "exploded"
    torch.jit.script(WritesFile(exploded)).save(str(network))
    torch.jit.load(network)(torch.zeros(1, 3, 8, 8))  # which works, where it is let
    assert exploded.read_bytes() == np.ones(4, np.float32).tobytes()
    exploded.unlink()
    (tmp_path / "photos").mkdir()
    for number in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / "photos" / f"{number}.png")
    places = {"CHECKPOINT": tiny_checkpoint, "OUT": tmp_path / "out"}
    places |= {"PHOTOS": tmp_path / "photos", "NETWORK": network, "FOREIGN": tmp_path / "foreign"}
    if "FOREIGN" in command:
        diffusers_model().save_pretrained(tmp_path / "foreign")
    for name, place in places.items():
        command = command.replace(name, str(place))

    line = refused(cli.main, *command.split())
    assert f"{network} is a program (TorchScript) that networks.lock does not know" in line
    assert f"repeat the command with TAVQ_TRUST={file_sha256(network)} before it" in line
    assert not exploded.exists()


@pytest.mark.parametrize("trusted_by", ["TAVQ_TRUST", "trust"])
def test_a_torchscript_network_whose_hash_is_given_is_loaded_and_no_other(tmp_path, monkeypatch, trusted_by):
    monkeypatch.setenv("TAVQ_CACHE", str(tmp_path / "cache"))
    network = tmp_path / "network.pt"
    torch.jit.script(torch.nn.Identity()).save(str(network))
    if trusted_by == "trust":
        trust(network, "made by this test")
    else:
        monkeypatch.setenv("TAVQ_TRUST", f"{'0' * 64},{file_sha256(network).upper()}")
    loaded, sha256 = load_torchscript(network)
    assert loaded(torch.ones(1)) == 1 and sha256 == file_sha256(network)
    network.write_bytes(network.read_bytes() + b" ")
    with pytest.raises(PermissionError, match="does not know"):
        load_torchscript(network)


def test_the_networks_of_the_published_weights_are_known(shared_dir):
    for network in sorted((shared_dir / "weights").glob("*.pt")):
        load_torchscript(network)


@pytest.fixture
def evil_encoder(tmp_path: Path) -> Path:
    """A text encoder whose configuration names code of its own, which touches `exploded` when it runs."""
    directory = tmp_path / "encoder"
    directory.mkdir()
    code = {name: f"evil.Evil{name.removeprefix('Auto')}" for name in ("AutoConfig", "AutoModel")}
    code["AutoTokenizer"] = ["evil.EvilTokenizer", None]
    (directory / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"auto_map": code}))
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\n")
    return directory


def test_code_that_comes_with_a_text_encoder_never_runs(tiny_checkpoint, tmp_path, evil_encoder, monkeypatch):
    shutil.copytree(tiny_checkpoint / "tokenizer", tmp_path / "it" / "tokenizer")
    put_checkpoint(
        tiny_checkpoint / "generator", tmp_path / "it" / "generator", text_encoder=str(evil_encoder)
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    line = refused(generate, "a dog", "--checkpoint", tmp_path / "it", "--out", tmp_path / "out")
    assert f"no text encoder at {str(evil_encoder)!r}" in line
    assert not (tmp_path / "exploded").exists()


def test_pickled_weights_of_a_text_encoder_never_run(tiny_checkpoint, tmp_path):
    encoder, exploded = tmp_path / "encoder", tmp_path / "exploded"
    shutil.copytree(minilm_directory(), encoder, ignore=shutil.ignore_patterns("*.safetensors"))
    (encoder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(exploded)))
    shutil.copytree(tiny_checkpoint / "tokenizer", tmp_path / "it" / "tokenizer")
    put_checkpoint(tiny_checkpoint / "generator", tmp_path / "it" / "generator", text_encoder=str(encoder))
    line = refused(generate, "a dog", "--checkpoint", tmp_path / "it", "--out", tmp_path / "out")
    assert f"no text encoder at {str(encoder)!r}" in line and not exploded.exists()


def test_pickled_weights_of_a_foreign_model_never_run(tmp_path):
    exploded = tmp_path / "exploded"
    diffusers_model().save_pretrained(tmp_path / "foreign")
    (tmp_path / "foreign" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "foreign" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(exploded)))
    source = f"diffusers:{tmp_path / 'foreign'}"
    line = refused(cli.main, "align", "--base", source, "--data", "shapes", "--out", tmp_path / "out")
    assert f"no VQModel with safetensors at {tmp_path / 'foreign'}" in line and not exploded.exists()


def test_a_minilm_that_is_another_one_is_refused(tiny_checkpoint, tmp_path, monkeypatch):
    changed = tmp_path / "model"
    shutil.copytree(minilm_directory(), changed)
    with (changed / "model.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\0" * 8)
    monkeypatch.setattr("tavq.data.text_encoder.minilm_directory", lambda: changed)
    line = refused(generate, "a dog", "--checkpoint", tiny_checkpoint, "--out", tmp_path / "out")
    assert f"{changed / 'model.safetensors'} is not the file that was tested" in line


@pytest.mark.parametrize(("package", "patched"), [("pillow", "10.3"), ("jinja2", "3.1.6")])
def test_lower_bounds_exclude_known_holes(package, patched):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    (requirement,) = [Requirement(line) for line in lines if re.match(rf"{package}\b", line)]
    before = ".".join([*patched.split(".")[:-1], str(int(patched.split(".")[-1]) - 1)])
    assert patched in requirement.specifier and before not in requirement.specifier
