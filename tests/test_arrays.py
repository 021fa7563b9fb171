"""Arrays that may be larger than memory: what is written is read again, by us and by safetensors."""

from __future__ import annotations

import pickle
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tavq.base import arrays
from tavq.base.arrays import ArrayWriter, build_once, open_arrays, open_ragged, write_ragged


@pytest.fixture
def written(tmp_path):
    """A file of 7 rows, written in three parts, and a second array."""
    rows = np.arange(21, dtype=np.float16).reshape(7, 3)
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        writer = ArrayWriter(file, "rows")
        for part in (rows[:2], rows[2:2], rows[2:]):
            writer.append(part)
        writer.finish(ends=np.array([7], np.int64))
    return path, rows


def test_rows_are_read_as_written_by_safetensors_too(written):
    path, rows = written
    stored = load_file(path)
    assert np.array_equal(stored["rows"], rows) and stored["ends"].tolist() == [7]
    array = open_arrays(path)["rows"]
    assert (array.shape, array.dtype, len(array)) == ((7, 3), np.float16, 7)
    for index in (3, slice(2, 5), [6, 0, 6], (slice(None), 1)):
        assert np.array_equal(array[index], rows[index])


def test_a_copy_is_returned_and_pages_that_were_given_back_are_read_again(written, monkeypatch):
    monkeypatch.setattr(arrays, "_MAPPED_BYTES", 1)
    path, rows = written
    array = open_arrays(path)["rows"]
    first = array[2:4]
    first[:] = 0
    assert np.array_equal(array[2:4], rows[2:4])


def test_an_array_reaches_another_process(written):
    path, rows = written
    assert np.array_equal(pickle.loads(pickle.dumps(open_arrays(path)["rows"]))[:], rows)


def test_ragged_rows_may_be_empty(tmp_path):
    lists = [[1, 2], [], [3], []]
    first = np.array([1, 2, 3], np.int32), np.array([2, 0, 1])
    groups = [first, (np.array([], np.int32), np.array([0]))]
    write_ragged(tmp_path / "r", "words", groups)
    ragged = open_ragged(tmp_path / "r", "words")
    assert [row.tolist() for row in ragged] == lists and len(ragged) == 4


def test_rows_of_another_kind_are_refused(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        writer = ArrayWriter(file, "rows")
        writer.append(np.zeros((1, 3), np.float16))
        with pytest.raises(ValueError, match=r"rows are float32 \(3,\), the others float16"):
            writer.append(np.zeros((1, 3), np.float32))


def test_a_file_is_built_once_and_not_at_all_where_that_fails(tmp_path):
    built = []

    def build(path):
        built.append(path)
        time.sleep(0.1)
        path.write_text("there")

    threads = [threading.Thread(target=build_once, args=(tmp_path / "file", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ZeroDivisionError):
        build_once(tmp_path / "other", lambda path: 1 / 0)
    assert not (tmp_path / "other").exists()
