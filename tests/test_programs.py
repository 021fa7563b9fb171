"""`tavq export --format pt2`: programs of torch.export compute what the models compute, at any batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tavq.cli import main
from tavq.generator.model import GeneratorModel
from tavq.tokenizer.model import TAVQTokenizer

pytestmark = pytest.mark.slow

SIZES = (1, 5)  # they are exported with 2


def exported(checkpoint: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Export a model, and load the programs that it is told of."""
    with torch.inference_mode(False):
        main(["export", str(checkpoint), "--out", str(out), "--format", "pt2"])
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(paths) == sorted(out.iterdir())
    return {path.stem: torch.export.load(path).module() for path in paths}


@torch.inference_mode()
def test_encoder_and_decoder(tiny_checkpoint, tiny_tokenizer: TAVQTokenizer, tmp_path, capsys):
    programs = exported(tiny_checkpoint / "tokenizer", tmp_path / "programs", capsys)
    assert set(programs) == {"encoder", "decoder"}
    size = tiny_tokenizer.image_size_px
    torch.manual_seed(0)
    for batch in SIZES:
        images = torch.rand(batch, 3, size, size) * 2 - 1
        ids = tiny_tokenizer.encode(images)
        assert torch.equal(programs["encoder"](images), ids) and ids.unique().numel() > 5
        torch.testing.assert_close(programs["decoder"](ids), tiny_tokenizer.decode(ids))


def test_prefill_and_step_give_the_logits_of_the_generator(tiny_checkpoint, tmp_path, capsys):
    model = GeneratorModel.from_pretrained(tiny_checkpoint / "generator").eval()
    torch.manual_seed(0)
    for weight in model.parameters():  # else the logits are 0 before training
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "generator")
    programs = exported(tmp_path / "generator", tmp_path / "programs", capsys)
    assert set(programs) == {"prefill", "step"}

    config = model.config
    for batch in SIZES:
        states = torch.randn(batch, config.max_text_tokens, config.text_dim)
        mask = torch.rand(batch, config.max_text_tokens) > 0.4
        mask[0] = False  # the null text
        ids = torch.randint(config.num_codes, (batch, config.num_tokens))
        with torch.no_grad():
            expected = model(ids, states, mask)
            keys, values, seen = programs["prefill"](states, mask)
            for position in range(config.num_tokens):
                previous = ids[:, max(position - 1, 0)]
                place = torch.tensor([position])
                logits, keys, values = programs["step"](previous, place, keys, values, seen)
                torch.testing.assert_close(logits, expected[:, position], atol=1e-4, rtol=1e-4)


def test_a_captioner_is_refused(tiny_checkpoint, tmp_path, capsys):
    command = ["export", str(tiny_checkpoint / "captioner"), "--out", str(tmp_path / "x"), "--format", "pt2"]
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 2 and "pt2 is for tokenizers and generators" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
