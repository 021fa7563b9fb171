"""Where results of the commands go: files, and JSON on stdout."""

import json
from pathlib import Path

import pytest

from .test_commands import PHOTO, PROMPTS, ROOT, checkpoint, refused, run

__all__ = ["checkpoint", "refused"]  # fixtures


def test_named_images_are_described_into_a_file(tmp_path, checkpoint, tiny_pipeline, capsys):
    text = tiny_pipeline.caption(PHOTO)[0].text
    run("caption", PHOTO, "--out", tmp_path / "one.json", *checkpoint)
    assert capsys.readouterr().out == f"1 image described in {tmp_path / 'one.json'}\n"
    (row,) = json.loads((tmp_path / "one.json").read_text())
    assert (row["image"], row["caption"]) == (str(PHOTO), text)
    run("caption", PHOTO, "--out", tmp_path / "texts", *checkpoint)
    assert [path.name for path in (tmp_path / "texts").iterdir()] == ["cat.txt"]


@pytest.mark.slow
def test_results_are_printed_as_lines_of_json(tmp_path, checkpoint, tiny_pipeline, capsys):
    def said(*arguments: str | Path) -> list[dict]:
        capsys.readouterr()
        run(*arguments, "--json")
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    out = ["--out", tmp_path, *checkpoint]
    images = said("generate", PROMPTS[0], "--seed", -1, "--num-images", 2, *out)
    assert [image["file"] for image in images] == [str(tmp_path / f"00000{n}.png") for n in range(2)]
    assert images[1]["seed"] == images[0]["seed"] + 1 and images[0]["prompt"] == PROMPTS[0]
    (captioned,) = said("caption", PHOTO, "--n-best", 2, *checkpoint)
    assert captioned["image"] == str(PHOTO) and len(captioned["captions"]) == 2
    assert captioned["captions"][0]["text"] == tiny_pipeline.caption(PHOTO)[0].text
    (rebuilt,) = said("reconstruct", PHOTO, *out)
    assert rebuilt["ids"] == tiny_pipeline.encode(PHOTO)[0].tolist()
    (completed,) = said("complete", PHOTO, "a cat", "--keep", "top", "--seed", -1, *out)
    assert completed["file"].endswith("000002.png") and completed["completed_tokens"] == 8
    (heat,) = said("heatmap", PHOTO, "a cat", *out)
    assert heat["units"][0]["unit"] == "cat" and len(heat["units"][0]["map"]) > 1
    (units,) = said("units", "A dog runs.")
    assert units["words"][0] == "dog" and units["sentences"] == ["A dog runs."]
    assert set(said("cache")[0]) == {"directory", "bytes"}


@pytest.mark.parametrize(
    "command", ["generate x", "complete photo.jpg x --keep top", "reconstruct photo.jpg"]
)
def test_an_output_that_is_a_file_is_refused_before_anything_is_loaded(tmp_path, refused, command):
    words = [str(PHOTO) if word == "photo.jpg" else word for word in command.split()]
    message = refused(*words, "--out", ROOT / "README.md", "--checkpoint", tmp_path / "absent")
    assert "README.md is a file, and --out needs a directory" in message
