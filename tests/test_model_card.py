"""Model cards: one page, no path of the machine, the licence that the training images allow."""

import re
from pathlib import Path

import pytest
import yaml

from tavq.training.card import RUNS_KEY, earlier_runs, model_card

ROOT = Path(__file__).resolve().parent.parent
LOG = [{"step": 50, "loss": 2.0}, {"step": 100, "val/l1": 0.25, "val/PSNR": 18.0}]
FORMER_CARD = """---
license: apache-2.0
library_name: ta-vq
---
# TA-VQ tokenizer

Trained on the training split of `flickr8k`.

700 steps, 11,200 examples, about 21 minutes on x86_64 with
1 thread(s), torch 2.13.0+cpu.

# What it went on from: TA-VQ tokenizer

Trained on the training split of `flickr8k`.

2,000 steps, 32,000 examples, about 1.0 hours on x86_64
"""


def resolved(data: str = "/home/anna/photos", **more: object) -> dict:
    return {"data": data, "out": "/home/anna/runs/mine", "align": "ot", "training": {"steps": 100}, **more}


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_is_a_page_that_names_no_path():
    values = resolved(
        perceptual="/home/anna/nets/squeezenet_layers.pt", text_encoder="minilm", images=["/home/anna/more"]
    )
    card = model_card("tokenizer", values, LOG, 1600, 120.0)
    assert "/home" not in card and "anna" not in card
    assert len(card.split("<details>")[0].splitlines()) < 60
    run = front(card)[RUNS_KEY][0]
    assert (run["steps"], run["examples"], run["minutes"]) == (100, 1600, 2)
    assert run["networks"] == ["squeezenet_layers.pt", "minilm"] and run["data"] == "photos, more"
    assert "| l1 | 0.2500 |" in card and "| PSNR | 18.0000 |" in card and "| loss" not in card
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, flags=re.DOTALL)[1])["data"] == "photos"


@pytest.mark.parametrize(
    ("data", "licence", "notices"),
    [
        ("/data/flickr8k", "other", ["Flickr8k"]),
        ("/data/Flickr8k_Dataset", "other", ["Flickr8k"]),
        ("/data/coco5000/images", "other", ["COCO"]),
        ("hf:anna/flickr8k@refs/convert/parquet?captions=text", "other", ["Flickr8k"]),
        ("/data/photos", "other", []),
        ("shapes", "apache-2.0", []),
    ],
)
def test_the_licence_follows_the_training_images(data, licence, notices):
    card = model_card("tokenizer", resolved(data), LOG, 1600, 120.0)
    assert front(card)["license"] == licence and ("license_name" in front(card)) == (licence == "other")
    assert [name for name in ("Flickr8k", "COCO") if f"photos of {name}" in card] == notices


def test_a_continued_run_adds_a_row_and_keeps_the_licence_of_the_first():
    first = model_card("tokenizer", resolved("flickr8k", text_encoder="minilm"), LOG, 1600, 120.0)
    second = model_card("tokenizer", resolved("photos", tokenizer="runs/first"), LOG, 800, 60.0, first)
    runs = front(second)[RUNS_KEY]
    assert [(run["stage"], run["data"]) for run in runs] == [
        ("tokenizer", "flickr8k"),
        ("decoder alone", "photos"),
    ]
    assert "Flickr30k" in second, "the first run read vectors of MiniLM"
    assert front(second)["license_name"] == "research-only-training-photos"
    assert front(second)["datasets"] == ["flickr8k", "photos"]
    assert second.count("<details>") == second.count("# TA-VQ") == 1


def test_runs_of_a_card_of_version_0_1_are_found_in_its_text():
    runs = earlier_runs(FORMER_CARD)
    assert [(run["steps"], run["examples"], run["data"]) for run in runs] == [
        (2000, 32000, "flickr8k"),
        (700, 11200, "flickr8k"),
    ]
    assert "| earlier | flickr8k | 2,000 | 32,000 |" in model_card(
        "tokenizer", resolved(), LOG, 9, 9.0, FORMER_CARD
    )
    assert earlier_runs("") == [] and earlier_runs("# Weights\n\nNo training is recorded.\n") == []
