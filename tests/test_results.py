"""Result files, their comparison, the commands that make and show them."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from tavq.cli import main
from tavq.eval import cells, report, results, table
from tavq.eval.results import compare, make_protocol, measured, read_results, with_intervals, write_results

from .conftest import save_network

FIXTURE = Path(__file__).parent / "fixtures/coco_captions.json"


def make(path: Path, values: np.ndarray, task: str = "tokenizer", **fields) -> Path:
    ids = [f"{i}.jpg" for i in range(len(values))]
    protocol = {
        "split": "test",
        "resize": "none",
        "feature_network": {"name": "net", "sha256": "ab" * 32},
    } | fields
    per_image = {"PSNR": values}
    metrics = with_intervals(per_image) | {
        "rFD-net": measured(100.0, len(values), low=99, high=101, over="3 seeds")
    }
    write_results(
        path,
        metrics,
        make_protocol(task=task, ids=ids, started=time.monotonic(), **protocol),
        per_image=per_image,
        ids=ids,
    )
    return path


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    values = np.random.default_rng(0).normal(20, 3, size=100)
    better = values + np.random.default_rng(1).normal(0.5, 0.2, size=100)
    return make(tmp_path / "a.json", values), make(tmp_path / "b.json", better, label="ours")


@pytest.fixture
def coco(tmp_path) -> tuple[Path, Path]:
    content = json.loads(FIXTURE.read_text())
    (tmp_path / "results.json").write_text(json.dumps(content["results"]))
    (tmp_path / "references.json").write_text(json.dumps({"annotations": content["annotations"]}))
    return tmp_path / "results.json", tmp_path / "references.json"


def test_comparison_has_the_paired_interval(pair):
    row = next(row for row in compare(*pair) if row.metric == "PSNR")
    assert row.difference == pytest.approx(row.b - row.a)
    assert 0.4 < row.interval.low < row.difference < row.interval.high < 0.6
    fd = next(row for row in compare(*pair) if row.metric == "rFD-net")
    assert fd.difference == 0 and fd.interval is None
    text = results.format_comparison(*pair)
    assert "PSNR" in text and "no per-image scores" in text


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("split", {"split": "val"}),
        ("resize", {"resize": "bicubic"}),
        ("feature_network.sha256", {"feature_network": {"name": "net", "sha256": "cd" * 32}}),
        ("feature_network.name", {"feature_network": {"name": "other", "sha256": "ab" * 32}}),
        ("seeds", {"seeds": [1, 2]}),
        ("task", {"task": "t2i"}),
        ("kid.kid_subset_size", {"kid": {"kid_subset_size": 100}}),
    ],
)
def test_each_mismatch_is_refused_by_name(tmp_path, pair, field, fields):
    other = make(tmp_path / "other.json", np.ones(100), **fields)
    with pytest.raises(ValueError, match=re.escape(f"unlike protocols, differing in {field} ")):
        compare(pair[0], other)


def test_other_images_or_libraries_are_refused(tmp_path, pair, monkeypatch):
    with pytest.raises(ValueError, match="differing in n, ids_sha256"):
        compare(pair[0], make(tmp_path / "few.json", np.ones(99)))
    monkeypatch.setattr(results, "library_versions", lambda names: dict.fromkeys(names, "0"))
    with pytest.raises(ValueError, match=r"libraries\.torch-fidelity"):
        compare(pair[0], make(tmp_path / "old.json", np.ones(100)))


def test_fields_of_earlier_versions_are_compared_under_their_names_of_today(tmp_path):
    earlier = make(tmp_path / "earlier.json", np.ones(100), sampling={"guidance": 4.5, "top_k": 100})
    today = make(tmp_path / "today.json", np.ones(100), sampling={"guidance_scale": 4.5, "top_k": 100})
    assert compare(earlier, today)
    other = make(tmp_path / "other.json", np.ones(100), sampling={"guidance_scale": 3.0, "top_k": 100})
    with pytest.raises(ValueError, match=r"differing in sampling\.guidance_scale "):
        compare(earlier, other)


def test_what_may_differ(tmp_path):
    free = {
        "label": "x",
        "checkpoints": {"tokenizer": "12"},
        "backend": "python",
        "generated_sha256": "1",
        "skipped": {"a": "b"},
    }
    first = make(tmp_path / "first.json", np.zeros(100), decoding={"seed": 0, "beam": 5})
    free |= {"decoding": {"seed": 3, "beam": 5, "alignment": 4.0}}
    assert len(compare(first, make(tmp_path / "free.json", np.ones(100), **free))) == 2
    with pytest.raises(ValueError, match=r"differing in decoding\.beam "):
        compare(first, make(tmp_path / "greedy.json", np.ones(100), decoding={"seed": 0, "beam": 1}))


def test_what_one_side_did_not_measure_is_absent(tmp_path):
    """A file without a judge compares with any; two judges never share a comparison, nor a table."""
    plain = make(tmp_path / "plain.json", np.zeros(100), judge=None)
    weights = {"a": "1" * 16, "b": "2" * 16}
    judged = {
        n: make(tmp_path / f"{n}.json", np.ones(100), judge={"tokenizer": h}) for n, h in weights.items()
    }
    content = json.loads(judged["a"].read_text())
    content["metrics"]["rFD-judge"] = {"value": 7.5, "n": 100}
    judged["a"].write_text(json.dumps(content))

    for pair in ((plain, judged["a"]), (judged["a"], plain)):
        line = results.format_comparison(*pair).splitlines()[-1].split()
        assert line == ["rFD-judge", *("absent" if path == plain else "7.5" for path in pair)]
    with pytest.raises(ValueError, match=r"differing in judge\.tokenizer "):
        compare(judged["a"], judged["b"])
    groups = table.group_by_protocol([read_results(path) for path in (plain, judged["a"], judged["b"])])
    assert [len(group) for group in groups] == [2, 1]


def test_spectral_figures_are_ratios_of_sums_over_images(tmp_path):
    rows = {"power 3-6": np.array([[1.0, 1.0, 1.0], [3.0, 9.0, 3.0]]), "PSNR": np.array([20.0, 30.0])}
    metrics = with_intervals(rows)
    assert metrics["power 3-6"]["value"] == 0.4 and metrics["PSNR"]["value"] == 25
    paths = []
    for name, factor in (("a", 1), ("b", 2)):
        path = tmp_path / f"{name}.json"
        per_image = {"power 3-6": rows["power 3-6"] * [factor, 1, factor]}
        protocol = make_protocol(task="tokenizer", ids=["1", "2"], started=time.monotonic())
        write_results(path, with_intervals(per_image), protocol, per_image=per_image, ids=["1", "2"])
        paths.append(path)
    row = compare(*paths)[0]
    assert row.difference == pytest.approx(0.4) and row.interval.low > 0.3
    text = table.make_tables([read_results(path) for path in paths])
    assert "| power 3-6 |" in text and "| 0.40 [0.33, 1.00] |" in text
    assert "power: of the reconstruction over the photo's, by cycles an image." in text


def test_killed_while_writing_leaves_the_old_file(tmp_path, pair, monkeypatch):
    before = pair[0].read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_results(pair[0], {"PSNR": measured(1, 1)}, {})
    with pytest.raises(KeyboardInterrupt):
        write_results(tmp_path / "new.json", {"PSNR": measured(1, 1)}, {})
    assert pair[0].read_bytes() == before
    assert not (tmp_path / "new.json").exists() and not list(tmp_path.glob(".*"))


def test_refused_files(tmp_path):
    with pytest.raises(ValueError, match="finite value and n"):
        write_results(tmp_path / "x.json", {"PSNR": measured(float("nan"), 3)}, {})
    with pytest.raises(FileNotFoundError, match="no result file"):
        read_results(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="is no result file"):
        read_results(tmp_path / "x.json")


def test_score_captions(tmp_path, coco):
    arguments = ["captions", *map(str, coco), "--backend", "python", "--out"]
    main(["score", *arguments, str(tmp_path / "a.json")])
    main(["score", *arguments, str(tmp_path / "b.json"), "--compare", str(tmp_path / "a.json")])
    first, second = read_results(tmp_path / "a.json"), read_results(tmp_path / "b.json")
    assert first.metrics == second.metrics
    expected = json.loads(FIXTURE.read_text())["pycocoevalcap"]
    assert first.metrics["CIDEr"]["value"] == pytest.approx(expected["CIDEr"], abs=1e-9)
    assert first.metrics["CIDEr"]["low"] < expected["CIDEr"] < first.metrics["CIDEr"]["high"]
    assert first.protocol["skipped"].keys() == {"METEOR", "SPICE"}
    assert set(first.per_image()) == {"ids", *first.metrics}


def test_score_captions_karpathy(tmp_path, coco):
    """The same references in the Karpathy layout, by coco id: the same scores and the same protocol."""
    by_image: dict[int, list[str]] = {}
    for item in json.loads(FIXTURE.read_text())["annotations"]:
        by_image.setdefault(item["image_id"], []).append(item["caption"])
    images = [
        {
            "cocoid": i,
            "imgid": n,
            "filename": f"{i}.jpg",
            "split": "test",
            "sentences": [{"raw": c} for c in captions],
        }
        for n, (i, captions) in enumerate(by_image.items())
    ]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": images}))
    stems = {f"{i}.jpg": f"stem-{i}" for i in by_image}
    for image in images:
        image["filename"] = stems[image["filename"]] + ".jpg"
    renamed = [row | {"image_id": f"stem-{row['image_id']}"} for row in json.loads(coco[0].read_text())]
    (tmp_path / "renamed.json").write_text(json.dumps(renamed))
    (tmp_path / "stems.json").write_text(json.dumps({"images": images}))
    for name, captions_, references in (
        ("a", coco[0], coco[1]),
        ("b", coco[0], tmp_path / "karpathy.json"),
        ("c", tmp_path / "renamed.json", tmp_path / "stems.json"),
    ):
        out = str(tmp_path / f"{name}.json")
        main(["score", "captions", str(captions_), str(references), "--backend", "python", "--out", out])
    assert all(row.difference == 0 for row in compare(tmp_path / "a.json", tmp_path / "b.json"))
    a, c = (read_results(tmp_path / f"{name}.json").metrics["CIDEr"]["value"] for name in "ac")
    assert a == c
    ours = json.loads((tmp_path / "a.json").read_text())
    ours["protocol"]["decoding"] = {"beam": 5}
    (tmp_path / "a.json").write_text(json.dumps(ours))
    assert all(row.difference == 0 for row in compare(tmp_path / "a.json", tmp_path / "b.json"))


@pytest.mark.parametrize(
    ("results_", "words"),
    [
        ([{"image_id": 1}], "is no caption file"),
        ([], "holds no caption"),
        ([{"image_id": 404464, "caption": "a"}] * 2, "several captions for image 404464"),
        ([{"image_id": -1, "caption": "a"}], "no captions for 1 of 1 images"),
    ],
)
def test_score_captions_refuses(tmp_path, coco, capsys, results_, words):
    coco[0].write_text(json.dumps(results_))
    with pytest.raises(SystemExit) as exit_:
        main(["score", "captions", *map(str, coco), "--out", str(tmp_path / "out.json")])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out.json").exists()


def test_score_images(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from PIL import Image

    monkeypatch.setenv("TAVQ_CACHE", str(tmp_path / "cache"))
    for n, folder in enumerate(("g", "r")):
        (tmp_path / folder).mkdir()
        for i in range(12):
            pixels = np.random.default_rng(100 * n + i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    network = torch.jit.trace(
        lambda x: x.float().mean(dim=(2, 3)), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    )
    save_network(network, tmp_path / "mean_features.pt")
    options = [
        "--features",
        str(tmp_path / "mean_features.pt"),
        "--kid-subset-size",
        "6",
        "--kid-subsets",
        "3",
    ]
    for name in ("a", "b"):
        folders = [str(tmp_path / "g"), str(tmp_path / "r")]
        main(["score", "images", *folders, *options, "--out", str(tmp_path / f"{name}.json")])
    first, second = read_results(tmp_path / "a.json"), read_results(tmp_path / "b.json")
    assert first.metrics == second.metrics
    assert set(first.metrics) == {"FD-mean", "KID", "precision", "recall"}
    assert first.metrics["FD-mean"]["n"] == 12
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_table(tmp_path, pair, capsys):
    readme = tmp_path / "README.md"
    begin, end = "<!-- results: begin -->", "<!-- results: end -->"
    readme.write_text(f"# Title\n{begin}\nold\n{end}\nend\n")
    arguments = [*map(str, pair), "--readme", str(readme)]
    with pytest.raises(SystemExit) as exit_:
        table.main([*arguments, "--check"])
    assert exit_.value.code == 2 and "stale" in capsys.readouterr().err
    table.main(arguments)
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("end\n") and "old" not in text
    assert "| ours |" in text and text.count("| a |") == 1
    table.main([*arguments, "--check"])
    capsys.readouterr()
    table.main([*map(str, pair)])
    assert capsys.readouterr().out.strip() in text and readme.read_text() == text, "printed, not written"
    table.main([*map(str, pair), "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["path"] for line in lines] == [str(path) for path in pair] and lines[0]["metrics"]
    with pytest.raises(ValueError, match="speed: begin"):
        table.write_block(readme, "speed", "| fast |")
    with pytest.raises(FileNotFoundError, match="no file"):
        table.write_block(tmp_path / "nowhere.md", "speed", "| fast |")
    assert readme.read_text() == text


def test_unlike_protocols_never_share_a_table(tmp_path, pair):
    other = make(tmp_path / "val.json", np.ones(100), split="val")
    tables = table.make_tables([read_results(path) for path in (*pair, other)])
    assert tables.count("| --- |") == 2
    lines = tables.splitlines()
    assert lines.count("|  | a | ours | ours - a |") == 1, "few results: one row a metric"
    assert any(line.startswith("| PSNR |") and "| **+0.49 [" in line for line in lines)
    assert any(line.startswith("| rFD-net |") and line.endswith("| +0.0 |") for line in lines)
    assert tables.count(f" - {read_results(pair[0]).label} |") == 1
    three = [read_results(path) for path in (*pair, pair[0])]
    assert table.make_tables(three).count(f" - {three[0].label} |") == 2
    assert f" - {three[0].label} |" not in table.make_tables(three, differences=False)


def test_cells():
    assert (
        cells.format_metric("CIDEr", {"value": 0.59979, "low": 0.564, "high": 0.637}) == "60.0 [56.4, 63.7]"
    )
    assert cells.format_metric("KID", {"value": 0.00347, "deviation": 0.0006}) == "0.0035 ± 0.0006"
    assert cells.format_metric("t2i_R@10", {"value": 0.2041}) == "20.4"
    assert cells.format_metric("recall", {"value": 0.76}) == "0.760"
    assert cells.format_metric("METEOR", None) == "-"


def test_report(tmp_path, pair):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "samples.png")
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "usage": 0.1}\n{"step": 2, "loss": 1.5}\n{"st')
    report.main([str(tmp_path), "--out", str(tmp_path / "page" / "report.html"), "--runs", str(run)])
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "ours" in page and "ids_sha256" in page and "http://" not in page and 'src="data:' in page


def test_report_without_results(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--out", str(tmp_path / "report.html")])
    assert "holds no result file" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


MARKERS = "<!-- summary: begin -->\n<!-- summary: end -->\n<!-- models: begin -->\n<!-- models: end -->\n"


def test_the_summary_sets_each_result_among_its_reference_points_from_best_to_worst(tmp_path):
    common = {"split": "test", "data": "flickr8k", "n": 200, "ids_sha256": "abc"}
    captions = {"floors": {"CIDEr of human captions": 0.7, "CIDEr of the next image's captions": 0.04}}
    write_results(
        tmp_path / "caption.json",
        {"CIDEr": {"value": 0.39, "low": 0.36, "high": 0.42, "n": 200}, "PSNR": {"value": 18.0, "n": 200}},
        {"task": "captions", "label": "mine", **common, **captions},
    )
    write_results(
        tmp_path / "baselines.json",
        {"CIDEr of the consensus": {"value": 0.37, "n": 200}},
        {"task": "baselines", **common},
    )
    write_results(
        tmp_path / "t2i.json",
        {"FD-moments": {"value": 400.0, "n": 200}, "t2i_R@10": {"value": 0.3, "n": 200}},
        {"task": "t2i", "label": "mine", **common, "floors": {"FD-moments of noise": 1000.0}},
    )
    readme = tmp_path / "README.md"
    readme.write_text(MARKERS)
    files = [str(tmp_path / f"{name}.json") for name in ("caption", "baselines", "t2i")]
    table.main([*files, "--readme", str(readme)])
    rows = readme.read_text().splitlines()
    start = next(number for number, row in enumerate(rows) if row.startswith("| **Captions: CIDEr**"))
    assert rows[start - 2] == "| flickr8k, test split, n = 200 | score |"
    assert rows[start + 1 : start + 5] == [
        "| human captions | 70.0 |",
        "| **weights `mine`** | **39.0 [36.0, 42.0]** |",
        "| consensus | 37.0 |",
        "| next image's captions | 4.0 |",
    ]
    start = next(
        number for number, row in enumerate(rows) if row.startswith("| **Text to image: FD-moments**")
    )
    assert rows[start + 1 : start + 3] == ["| **weights `mine`** | **400.0** |", "| noise | 1000.0 |"]
    assert rows.index("| **weights `mine`** | **30.0** |") + 1 == rows.index("| chance | 5.0 |")
    assert any(re.match(r"\| `flickr8k/tokenizer` \| image <-> ids \| \d\.\d M \|", row) for row in rows)
    table.main([*files, "--readme", str(readme), "--check"])


def test_a_summary_of_different_images_and_a_file_without_markers_are_refused(tmp_path, capsys):
    for number in range(2):
        protocol = {"task": "captions", "split": "test", "data": "d", "n": 2, "ids_sha256": str(number)}
        write_results(tmp_path / f"{number}.json", {"CIDEr": {"value": 0.4, "n": 2}}, protocol)
    readme = tmp_path / "README.md"
    for text, words in ((MARKERS, "different images"), ("# Title\n", "has no marker line")):
        readme.write_text(text)
        with pytest.raises(SystemExit):
            table.main([str(tmp_path / "0.json"), str(tmp_path / "1.json"), "--readme", str(readme)])
        assert words in capsys.readouterr().err and readme.read_text() == text
