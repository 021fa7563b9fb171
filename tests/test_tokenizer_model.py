"""The tokenizer itself: only Z_3 is decoded, text is never needed, checkpoints come back bit for bit."""

import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from tavq.tokenizer.config import PRESETS
from tavq.tokenizer.encode_dataset import variants
from tavq.tokenizer.model import TAVQTokenizer
from tavq.tokenizer.retrieval import image_to_text_ranks, recall_at, text_to_image_ranks


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_decode_of_encode_equals_the_forward_output(tiny_tokenizer, images):
    encoded = tiny_tokenizer(images)
    ids = tiny_tokenizer.encode(images)
    assert torch.equal(ids, encoded.ids) and ids.shape == (3, *tiny_tokenizer.grid_size)
    assert torch.allclose(tiny_tokenizer.decode(ids), encoded.images.clamp(-1, 1), atol=1e-5)
    assert torch.equal(tiny_tokenizer.decode(ids.flatten(1)), tiny_tokenizer.decode(ids))


def test_only_the_last_level_enters_the_decoder(tiny_tokenizer, images):
    encoded = tiny_tokenizer(images)
    gradients = torch.autograd.grad(encoded.images.sum(), encoded.latents, allow_unused=True)
    assert gradients[0] is None and gradients[1] is None and gradients[2].norm() > 0


def test_the_last_level_of_all_levels_is_what_encode_gives(tiny_tokenizer, images):
    levels = tiny_tokenizer.encode_levels(images)
    assert levels.shape == (3, 3, *tiny_tokenizer.grid_size)
    assert torch.equal(levels[:, -1], tiny_tokenizer.encode(images))


@pytest.mark.slow
def test_no_text_encoder_is_loaded_to_encode_or_decode(images, tmp_path):
    import subprocess

    code = (
        "import sys, torch\n"
        "from tavq.tokenizer.config import PRESETS\n"
        "from tavq.tokenizer.model import TAVQTokenizer\n"
        "t = TAVQTokenizer(PRESETS['tiny']).eval()\n"
        "t.decode(t.encode(torch.zeros(1, 3, 32, 32)))\n"
        "assert not {'transformers', 'textblob', 'nltk'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_checkpoint_comes_back_bit_for_bit(tiny_tokenizer, images, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = TAVQTokenizer.from_pretrained(tmp_path)
    assert loaded.config == tiny_tokenizer.config
    assert torch.equal(loaded.encode(images), tiny_tokenizer.encode(images))
    assert loaded.codebook_hash == tiny_tokenizer.codebook_hash


@pytest.mark.parametrize("name", ["nearest", "cvq", "simvq", "ibq"])
def test_half_precision_keeps_the_ids_of_every_quantiser(name, tmp_path):
    config = PRESETS["tiny"]
    quantizer = dataclasses.replace(config.quantizer, name=name)
    tokenizer = TAVQTokenizer(dataclasses.replace(config, quantizer=quantizer)).eval()
    tokenizer.save_pretrained(tmp_path, half=True)
    assert TAVQTokenizer.from_pretrained(tmp_path).codebook_hash == tokenizer.codebook_hash


def test_half_precision_keeps_the_codebook_in_full(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path, half=True)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["quantizer.weight"].dtype == torch.float32
    assert stored["decoder.proj_in.weight"].dtype == torch.float16
    assert TAVQTokenizer.from_pretrained(tmp_path).codebook_hash == tiny_tokenizer.codebook_hash


def test_bad_checkpoints_are_refused_with_a_way_out(tiny_tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        TAVQTokenizer.from_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"colour": 1}))
    with pytest.raises(ValueError, match="colour"):
        TAVQTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"kind": "ta-vq-generator"}))
    with pytest.raises(ValueError, match="holds a ta-vq-generator, expected a ta-vq-tokenizer"):
        TAVQTokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no directory"):
        TAVQTokenizer.from_pretrained(tmp_path / "nowhere")


def test_wrong_input_is_named(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"expected \(B, 3, 32, 32\)"):
        tiny_tokenizer.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"expected \[0, 64\)"):
        tiny_tokenizer.decode(torch.full((1, 4, 4), 64))
    with pytest.raises(ValueError, match="multiple of the downsampling"):
        dataclasses.replace(PRESETS["tiny"], image_size_px=30)


def test_variants_begin_with_the_photo_and_its_mirror_image():
    from PIL import Image

    picture = Image.linear_gradient("L").rotate(90).convert("RGB")
    views = variants(picture, 32, crops=3, seed=1)
    assert views.shape == (5, 3, 32, 32)
    assert torch.equal(views[1], views[0].flip(-1))
    assert torch.equal(views, variants(picture, 32, crops=3, seed=1))
    assert not torch.equal(views, variants(picture, 32, crops=3, seed=2))


def test_ranks_by_hand():
    scores = torch.tensor([[0.9, 0.2, 0.5], [0.1, 0.3, 0.6], [0.0, 0.1, 0.6]])
    owners = torch.tensor([0, 1, 2])
    assert text_to_image_ranks(scores, owners).tolist() == [0, 0, 1]  # a tie counts against the query
    assert image_to_text_ranks(scores, owners).tolist() == [0, 1, 0]
    assert recall_at(torch.tensor([0, 0, 1]), 1) == pytest.approx(2 / 3)
    two_texts = torch.tensor([0, 0, 1])  # the first image owns two texts, its better one counts
    assert image_to_text_ranks(scores[:2], two_texts).tolist() == [0, 0]
