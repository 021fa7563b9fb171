"""`--engine ray`: on a cluster of two nodes, of which one dies, a job writes what one process writes."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tavq import photo_index
from tavq.base.engine import EngineConfig
from tavq.cli import main
from tavq.eval import captioning, reconstruction, t2i

pytest.importorskip("ray", reason="needs ray, of the extra `scale`")

import ray
from ray.cluster_utils import Cluster

from tavq.serve.ray_jobs import PartJob, clear_parts
from tavq.tokenizer import describe_dataset

pytestmark = pytest.mark.slow

ON_RAY = EngineConfig(engine="ray")
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
SECONDS = 300


class TwoNodes:
    """A Ray cluster of two nodes on this machine."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        self.second = None
        ray.init(address=self.cluster.address, log_to_driver=False)

    def make_whole(self) -> None:
        """Start the second node, unless it lives."""
        if self.second is None:
            self.second = self.cluster.add_node(**NODE)
            self.cluster.wait_for_nodes()

    def kill_one_when(self, happened: Callable[[], bool]) -> threading.Thread:
        """Kill the second node as soon as something has happened."""

        def watch() -> None:
            deadline = time.monotonic() + SECONDS
            while not happened() and time.monotonic() < deadline:
                time.sleep(0.01)
            self.cluster.remove_node(self.second, allow_graceful=False)
            self.second = None

        thread = threading.Thread(target=watch)
        thread.start()
        return thread

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def started() -> Iterator[TwoNodes]:
    os.environ["RAY_worker_niceness"] = "0"
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import tests
    nodes = TwoNodes()
    yield nodes
    nodes.close()


@pytest.fixture
def nodes(started: TwoNodes) -> TwoNodes:
    started.make_whole()
    return started


def open_slow_writer(log: Path) -> Callable[[Sequence[int], Path], None]:
    """Write the squares of numbers, slowly; note in `log` who wrote what. A number below 0 cannot be had."""
    # Asked at once: a worker whose node was killed may live a moment longer, without it.
    node = ray.get_runtime_context().get_node_id()

    def write(numbers: Sequence[int], path: Path) -> None:
        time.sleep(0.3)
        if min(numbers) < 0 and not log.with_name("repaired").exists():
            raise ValueError(f"{min(numbers)} is below 0")
        with log.open("a") as file:
            file.write(f"{node} {numbers[0]}\n")
        path.write_text("".join(f"{number**2}\n" for number in numbers))

    return write


class StopsAtTheSecondBatch:
    """A connection to SQLite that is stopped as by Ctrl-C when it is given the second batch of photos."""

    def __init__(self, connection: sqlite3.Connection):
        self.connection = connection
        self.batches = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def __enter__(self) -> Any:
        return self.connection.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self.connection.__exit__(*error)

    def executemany(self, command: str, rows: Any) -> Any:
        self.batches += command.startswith("INSERT INTO photos")
        if self.batches == 2:
            raise KeyboardInterrupt
        return self.connection.executemany(command, rows)


def dump(index: Path) -> list[str]:
    """All that the tables of an index hold."""
    return list(sqlite3.connect(index / "photos.sqlite").iterdump())


def job_of(folder: Path, numbers: Sequence[int], fingerprint: str = "") -> PartJob:
    log = folder.parent / "log.txt"
    return PartJob(folder, numbers, 3, open_slow_writer, (log,), fingerprint=fingerprint)


def test_parts_of_a_node_that_dies_are_computed_by_the_other(nodes, tmp_path):
    job = job_of(tmp_path / "parts", range(120))
    log = tmp_path / "log.txt"

    def nodes_that_worked() -> set[str]:
        return {line.split()[0] for line in log.read_text().splitlines()} if log.exists() else set()

    killer = nodes.kill_one_when(lambda: len(nodes_that_worked()) == 2)
    paths = job.run(ON_RAY)
    written = [path.read_text() for path in paths]
    killer.join()
    assert "".join(written).split() == [str(number**2) for number in range(120)]
    assert len(nodes_that_worked()) == 2

    before = log.read_text()
    assert job.run(ON_RAY) == paths and log.read_text() == before, "finished parts are not computed again"
    clear_parts(job.folder)
    assert not job.folder.exists()


def test_a_job_that_failed_goes_on_where_it_stopped(nodes, tmp_path):
    job = job_of(tmp_path / "parts", [*range(12), -1])
    with pytest.raises(ValueError, match=r"^-1 is below 0$"):
        job.run(ON_RAY)
    first = set(job.folder.glob("part-*"))
    (tmp_path / "repaired").touch()
    stamps = {path: path.stat().st_mtime_ns for path in first}
    assert [line for path in job.run(ON_RAY) for line in path.read_text().split()][-1] == "1"
    assert {path: path.stat().st_mtime_ns for path in first} == stamps


def test_parts_of_another_job_are_refused(tmp_path):
    job = job_of(tmp_path / "parts", range(3))
    job._claim()
    job._claim()
    for other in (job_of(job.folder, range(4)), job_of(job.folder, range(3), "other weights")):
        with pytest.raises(ValueError, match="holds parts of another job"):
            other.run(ON_RAY)


def test_a_job_whose_parts_were_partly_used_is_taken_up_with_what_is_left(tmp_path):
    job = job_of(tmp_path / "parts", range(7))
    paths = job._claim()
    left = job_of(job.folder, [2, 5])
    with pytest.raises(ValueError, match="holds parts of another job"):
        left.run(ON_RAY)
    for path in paths:
        path.touch()
    assert left.run(ON_RAY) == paths
    with pytest.raises(ValueError, match="holds parts of another job"):
        job_of(job.folder, [2, 7]).run(ON_RAY)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seventy images, two of them in a folder below; one cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    for number in range(70):
        name = f"below/{number}.png" if number < 2 else f"{number:03d}.jpg"
        colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
        image = Image.new("RGB", (40, 30), colour)
        image.paste(colour[::-1], (5, 5, 5 + number % 30, 20))
        image.save(folder / name)
    (folder / "013.jpg").write_text("no image")
    return folder


def captions(photos: Path, out: Path, checkpoint: Path, capsys: Any, *more: str) -> bytes:
    command = ["caption", str(photos), "--out", str(out), "--checkpoint", str(checkpoint), "--beam", "2"]
    capsys.readouterr()
    main([*command, *more])
    assert "skipped 1 of 70 images that cannot be read: 013.jpg" in capsys.readouterr().err
    return out.read_bytes()


def test_captions_have_the_bytes_of_one_process_though_a_node_dies(
    nodes, photos, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("tavq.commands.caption.BATCHES_PER_PART", 1)
    local = captions(photos, tmp_path / "local.jsonl", tiny_checkpoint, capsys)
    parts = tmp_path / "ray.jsonl.parts"
    killer = nodes.kill_one_when(lambda: any(parts.glob("part-*")))
    spread = captions(photos, tmp_path / "ray.jsonl", tiny_checkpoint, capsys, "--engine", "ray")
    killer.join()
    assert spread == local and len(local.splitlines()) == 69
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local.jsonl", "ray.jsonl"]

    # What is described already is left as it is; only a new image is work.
    more = tmp_path / "more"
    shutil.copytree(photos, more)
    shutil.copy(photos / "020.jpg", more / "new.jpg")
    (more / "013.jpg").unlink()
    command = ["caption", str(more), "--out", str(tmp_path / "ray.jsonl"), "--beam", "2", "--engine", "ray"]
    main([*command, "--checkpoint", str(tiny_checkpoint)])
    added = (tmp_path / "ray.jsonl").read_bytes().removeprefix(local).splitlines()
    assert len(added) == 1 and b'"new.jpg"' in added[0]


def test_images_have_the_bytes_of_one_process_though_a_node_dies(nodes, tiny_checkpoint, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a dog in a café {number}\n" for number in range(20)))
    common = ["generate", "--prompts-file", str(prompts), "--num-images", "2", "--seed", "3"]
    common += ["--checkpoint", str(tiny_checkpoint)]
    main([*common, "--out", str(tmp_path / "local")])
    said = capsys.readouterr().out
    parts = tmp_path / "ray" / "parts"
    killer = nodes.kill_one_when(lambda: any(parts.glob("part-*")))
    main([*common, "--out", str(tmp_path / "ray"), "--engine", "ray"])
    killer.join()

    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    spread = {path.name: path.read_bytes() for path in (tmp_path / "ray").iterdir()}
    assert len(local) == 41 and spread == local
    printed = capsys.readouterr().out.splitlines()  # Ray's own words on the dead node among it
    assert [line for line in printed if line.endswith(".png")] == [
        line.replace(str(tmp_path / "local"), str(tmp_path / "ray")) for line in said.splitlines()
    ]

    main([*common, "--out", str(tmp_path / "ray"), "--engine", "ray"])
    assert capsys.readouterr().out == "", "all of it is there"
    with pytest.raises(SystemExit) as left:
        main([*common, "--out", str(tmp_path / "ray"), "--engine", "ray", "--temperature", "0.5"])
    assert left.value.code == 2 and "holds other images" in capsys.readouterr().err


def test_token_sets_have_the_bytes_of_one_process_though_a_node_dies(
    nodes, photos, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("tavq.commands.tokenize.BATCHES_PER_PART", 1)
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    for path in [*data.glob("*.jpg"), *data.glob("*/*.png")]:
        path.with_suffix(".txt").write_text(f"a dog {path.stem}\n")
    common = ["tokenize", "--data", str(data), "--checkpoint", str(tiny_checkpoint / "tokenizer")]
    main([*common, "--out", str(tmp_path / "local")])
    parts = tmp_path / "ray.parts"
    killer = nodes.kill_one_when(lambda: any(parts.glob("*/part-*")))
    main([*common, "--out", str(tmp_path / "ray"), "--engine", "ray"])
    killer.join()

    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    spread = {path.name: path.read_bytes() for path in (tmp_path / "ray").iterdir()}
    assert spread == local and "meta.json" in local and len(local) == 4
    assert not parts.exists()


def test_an_index_has_the_rows_and_vectors_of_one_process_though_a_node_dies(
    nodes, photos, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("tavq.commands.index.PHOTOS_PER_PART", 16)
    common = ["index", str(photos), "--checkpoint", str(tiny_checkpoint), "--json", "--out"]
    main([*common, str(tmp_path / "local")])
    said = json.loads(capsys.readouterr().out)
    parts = tmp_path / "ray.parts"
    killer = nodes.kill_one_when(lambda: any(parts.glob("part-*")))

    # Stopped as rows are written, behind the first 32: what was encoded is not encoded again.
    connect = photo_index._connect
    monkeypatch.setattr(photo_index, "_connect", lambda directory: StopsAtTheSecondBatch(connect(directory)))
    with pytest.raises(SystemExit):
        main([*common, str(tmp_path / "ray"), "--engine", "ray"])
    killer.join()
    monkeypatch.setattr(photo_index, "_connect", connect)
    monkeypatch.setattr(PartJob, "_finished", lambda *_: pytest.fail("all parts are there"))
    capsys.readouterr()
    main([*common, str(tmp_path / "ray"), "--engine", "ray"])
    again = json.loads(capsys.readouterr().out)

    assert (said["added"], again["added"], again["unchanged"]) == (69, 37, 32)
    assert again["unreadable"] == said["unreadable"] and "013.jpg" in said["unreadable"][0]
    assert not parts.exists()
    local, spread = tmp_path / "local", tmp_path / "ray"
    assert (spread / "vectors.faiss").read_bytes() == (local / "vectors.faiss").read_bytes()
    assert dump(spread) == dump(local) and len(dump(local)) > 69


def test_descriptions_have_the_bytes_of_one_process_though_a_node_dies(
    nodes, photos, tiny_vision_language, tmp_path, monkeypatch, capsys
):
    data = tmp_path / "data"
    data.mkdir()
    for path in sorted(photos.glob("*.jpg"))[:20]:
        shutil.copy(path, data)
        (data / path.name).with_suffix(".txt").write_text(f"a dog {path.stem}\n")
    common = ["describe", "--data", str(data), "--model", str(tiny_vision_language), "--max-tokens", "12"]
    common += ["--fuse", "--json", "--out"]
    main([*common, str(tmp_path / "local" / "long.jsonl")])
    said = json.loads(capsys.readouterr().out)
    out = tmp_path / "ray" / "long.jsonl"
    parts = tmp_path / "ray" / "long.jsonl.parts"
    killer = nodes.kill_one_when(lambda: any(parts.glob("part-*")))

    # Stopped as rows are written: what was described is not described again.
    append, written = describe_dataset.append_row, []

    def stop_at_the_fourth(journal: Path, row: dict[str, Any]) -> None:
        written.append(row)
        if len(written) == 4:
            raise KeyboardInterrupt
        append(journal, row)

    monkeypatch.setattr(describe_dataset, "append_row", stop_at_the_fourth)
    with pytest.raises(SystemExit):
        main([*common, str(out), "--engine", "ray"])
    killer.join()
    monkeypatch.setattr(describe_dataset, "append_row", append)
    monkeypatch.setattr(PartJob, "_finished", lambda *_: pytest.fail("all parts are there"))
    capsys.readouterr()
    main([*common, str(out), "--engine", "ray"])
    again = json.loads(capsys.readouterr().out)

    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    spread = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    assert spread == local and sum(content.count(b"\n") for content in local.values()) == 19
    assert again["written"] + sum(again["dropped"].values()) == 16
    assert said["unanswered"] == again["unanswered"] == []


def test_what_ray_cannot_help_is_refused_with_it(photos, capsys):
    for more, reason in (
        (["--endpoint", "http://x"], "leave out --engine or --endpoint"),
        (["--sample", "3"], "--sample"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["describe", "--data", str(photos), "--model", "m", "--engine", "ray", *more])
        assert left.value.code == 2 and reason in capsys.readouterr().err


EVALUATIONS = {
    "tokenizer": (reconstruction, ["--limit", "70", "--no-retrieval"], 1),
    "t2i": (t2i, ["--limit", "36", "--seeds", "1", "--no-floors"], 38),
    "caption": (captioning, ["--limit", "36", "--beam", "2", "--backend", "python"], 2),
}
"""Task -> its module, flags, and number of files beside the result: arrays, images, captions."""


@pytest.mark.parametrize("task", EVALUATIONS)
def test_evaluations_have_the_figures_of_one_process_though_a_node_dies(
    nodes, task, tiny_checkpoint, judge, network, tmp_path, monkeypatch
):
    module, flags, num_files = EVALUATIONS[task]
    common = ["eval", task, "--data", "shapes", "--checkpoint", str(tiny_checkpoint), *flags]
    if task != "caption":
        common += ["--features", str(network), "--judge", str(judge)]
    main([*common, "--out", str(tmp_path / "local" / "result.json")])
    out = tmp_path / "ray" / "result.json"
    parts = out.with_suffix(".parts")
    killer = nodes.kill_one_when(lambda: any(parts.glob("*/part-*")))

    # Stopped when all is computed: it is not computed again.
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(module, "write_results", stop)
        main([*common, "--out", str(out), "--engine", "ray"])
    killer.join()
    monkeypatch.setattr(PartJob, "_finished", lambda *_: pytest.fail("all parts are there"))
    main([*common, "--out", str(out), "--engine", "ray"])

    assert not parts.exists()
    assert figures(out) == figures(tmp_path / "local" / "result.json") and len(figures(out)["metrics"]) > 2
    others = [
        path.relative_to(out.parent) for path in out.parent.rglob("*") if path.is_file() and path != out
    ]
    assert len(others) == num_files
    for path in others:
        assert (out.parent / path).read_bytes() == (tmp_path / "local" / path).read_bytes(), path


def figures(result: Path) -> dict[str, Any]:
    """All that a result file holds, but for when it was made and how long that took."""
    content = json.loads(result.read_text())
    del content["protocol"]["seconds"], content["protocol"]["date"]
    return content
