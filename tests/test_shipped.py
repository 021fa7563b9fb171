"""The weights that ship with the project: they load, fit one another, and do better than chance."""

from pathlib import Path

import numpy as np
import pytest

from tavq.data.images import load_image
from tavq.pipeline import Pipeline

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "app" / "examples").glob("*.jpg"))


@pytest.fixture(scope="module")
def shipped() -> Pipeline:
    return Pipeline.from_pretrained(ROOT / "checkpoints" / "flickr8k")


def test_the_parts_fit_one_another_and_name_what_shaped_them(shipped):
    assert shipped.generator.config.codebook_hash == shipped.tokenizer.codebook_hash
    assert shipped.captioner.config.codebook_hash == shipped.tokenizer.codebook_hash
    provenance = shipped.tokenizer.config.provenance
    assert (provenance.align, provenance.data, provenance.aligned_levels) == ("ot", "flickr8k", (1, 2, 3))
    assert provenance.text_encoder_hash and provenance.taught_by


def test_reconstructions_are_nearer_to_their_photo_than_to_any_other(shipped):
    photos = [load_image(path) for path in EXAMPLES]
    size = (shipped.tokenizer.decode_size_px,) * 2
    wanted = np.stack([np.asarray(photo.resize(size), dtype=float).ravel() for photo in photos])
    rebuilt = np.stack([np.asarray(r.image, dtype=float).ravel() for r in shipped.reconstruct(photos)])
    distances = np.square(rebuilt[:, None] - wanted[None]).mean(axis=-1)
    assert (distances.argmin(axis=1) == np.arange(len(photos))).all()


@pytest.mark.slow
def test_a_prompt_gives_a_picture_and_a_photo_a_sentence(shipped):
    picture = shipped.generate(["a brown dog runs through the grass"], [7])[0]
    assert np.asarray(picture.image).std() > 20, "not one flat colour"
    caption = shipped.caption([load_image(EXAMPLES[0])])[0][0]
    assert len(caption.text.split()) >= 4 and all(0 < word.probability <= 1 for word in caption.words)
