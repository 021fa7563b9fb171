"""Reader of datasets of the Hugging Face hub, and of folders of parquet files as that hub has them.

`datasets` finds configuration, splits, files and features. Rows are read by number, not with its streams,
which have no random access. No code of a repository is run: `datasets` 4 and later cannot.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from tavq.base.arrays import build_once
from tavq.base.cache import cache_directory

from .config import SPLITS
from .contained import LinkCheck
from .dataset import Example
from .layouts_folder import SPLIT_NAMES, captions_of, long_text_of, named_split
from .layouts_shards import read_shards
from .parquet_rows import ImageColumn, ParquetImage, open_parquet, state_of
from .remote import RemoteFile

OPTIONS = ("config", "image", "captions", *SPLITS)
"""What may follow a `?` behind the name of a dataset."""
_NAME = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", flags=re.ASCII)
_CAPTIONS = ("text", "caption", "captions")  # taken without being asked for, as in other layouts
_NO_CAPTIONS = ("split", "long_text")  # columns that say something else


@dataclasses.dataclass(frozen=True)
class Source:
    """What `--data` names: a dataset of the hub, or a folder of parquet files.

    Attributes:
        path: as it was typed, without the options.
        repository: OWNER/NAME on the hub; "" for a folder.
        revision: branch, tag or commit; None takes `main`.
        options: by their names in `OPTIONS`.
    """

    path: str
    repository: str = ""
    revision: str | None = None
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the dataset is called."""
        return self.repository.partition("/")[2] or Path(self.path).resolve().name


def named_source(path: str) -> Source | None:
    """Return the dataset of the hub that `path` names, `hf:OWNER/NAME[@REVISION][?OPTION=VALUE&...]`, or the
    folder with options, `photos/?image=photo`; None where it is neither.

    Raises:
        ValueError: the name or the options are wrong.
    """
    name, mark, query = path.partition("?")
    is_hub = path.startswith("hf:") and not path.startswith("hf://")
    if not is_hub and not (mark and not Path(path).exists() and Path(name).is_dir()):
        return None

    options = dict(parse_qsl(query, keep_blank_values=True))
    wrong = [option for option, value in options.items() if option not in OPTIONS or not value]
    if wrong or (mark and not options):
        raise ValueError(
            f"{path} has {', '.join(wrong) or 'nothing'} behind the ?, expected some of "
            f"{', '.join(OPTIONS)}, as in ?image=COLUMN&captions=COLUMN"
        )
    if not is_hub:
        return Source(name, options=options)
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(
            f"{path} names no dataset of the hub; expected hf:OWNER/NAME, perhaps with @REVISION and "
            "?image=COLUMN&captions=COLUMN behind it"
        )
    return Source(name, found["repository"], found["revision"], options)


def read_hub(source: Source) -> Iterator[Example]:
    """Read the rows of parquet files, or the WebDataset shards that `datasets` finds; the id is FILE/ROW.

    A dataset without splits, which `datasets` calls "train", is divided as other layouts without splits are.

    Raises:
        FileNotFoundError: there is no such dataset, or it may not be read.
        ValueError: it has other files, or splits or columns that must be named.
    """
    files = _files_by_split(source)
    names = [file for group in files.values() for file in group]
    if all(name.endswith(".tar") for name in names):
        for split, group in files.items():
            yield from read_shards([_file(name) for name in group], split)
        return
    if not all(name.endswith(".parquet") for name in names):
        kinds = sorted({Path(name).suffix or name for name in names})
        way_out = (
            f"; the hub keeps most datasets as parquet, too: hf:{source.repository}@refs/convert/parquet"
        )
        raise ValueError(
            f"{source.path} has {', '.join(kinds)} files, expected .parquet or .tar"
            + (way_out if source.repository else "")
        )
    columns = _find_columns(source, _file(names[0]))
    without_caption: list[str] = []
    for split, group in files.items():
        for name in group:
            yield from _read_file(source, name, columns, split, without_caption)
    if without_caption:
        warnings.warn(
            f"left out {len(without_caption)} images without a caption, first {without_caption[0]}",
            stacklevel=2,
        )


def _files_by_split(source: Source) -> dict[str, list[str]]:
    """Return the files of train, val and test; under "" where the dataset has no splits."""
    found = _find_files(source)
    _check_places(source, found)
    wanted = {source.options[split]: split for split in SPLITS if split in source.options}
    missing = [name for name in wanted if name not in found]
    unknown = [] if wanted else [name for name in found if name not in SPLIT_NAMES]
    if missing or unknown:
        raise ValueError(
            f"{source.path} has the splits {', '.join(found)}"
            + (f", and none called {missing[0]}" if missing else "")
            + "; say which is which, as in ?train=NAME&val=NAME"
        )
    if wanted:
        return {split: found[name] for name, split in wanted.items()}
    if list(found) == ["train"]:
        return {"": found["train"]}
    return {SPLIT_NAMES[name]: files for name, files in found.items()}


def _find_files(source: Source) -> dict[str, list[str]]:
    """Let `datasets` find the files of each split."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{source.path} needs the package datasets: pip install datasets") from error

    # A folder: without `hf:`, the library would take a mistyped one for a name on the hub.
    name = source.repository or str(Path(source.path).resolve())
    try:
        builder = datasets.load_dataset_builder(
            name,
            source.options.get("config"),
            revision=source.revision,
            cache_dir=str(cache_directory("remote_shards")),  # for its locks
        )
        files = builder.config.data_files or {}
    except Exception as error:  # the library has many, and passes on those of the connection
        reason = " ".join(str(error).split())
        if "Config name is missing" in reason:
            reason += " (name it with ?config=NAME)"
        raise FileNotFoundError(f"{source.path} cannot be opened: {reason}") from error
    return {str(split): [str(file) for file in group] for split, group in files.items()}


def _check_places(source: Source, files: Mapping[str, Sequence[str]]) -> None:
    """The README of a dataset names its files, and could name any; theirs alone are read."""
    if not any(files.values()):
        raise ValueError(f"{source.path} has no data files; expected .parquet or .tar")
    if not source.repository:
        links = LinkCheck(Path(source.path))
    for name in (name for group in files.values() for name in group):
        if not source.repository:
            links.check(Path(name))
        elif not name.startswith(f"hf://datasets/{source.repository}@") or "/../" in name:
            raise ValueError(f"{source.path} names {name}, which leads out of the dataset")


def _file(name: str) -> Path | RemoteFile:
    return RemoteFile(name) if name.startswith("hf://") else Path(name)


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Which columns hold what."""

    image: str
    captions: str
    others: tuple[str, ...]
    """Of split and long_text, those that there are."""


def _find_columns(source: Source, file: Path | RemoteFile) -> _Columns:
    """Find the columns by name and type; where several would do, the user names one.

    Raises:
        ValueError: none or several would do.
    """
    import datasets

    with open_parquet(file) as table:
        features = datasets.Features.from_arrow_schema(table.schema_arrow)
    images = [name for name, feature in features.items() if _may_be_image(feature)]
    texts = [
        name for name, feature in features.items() if _may_be_captions(feature) and name not in _NO_CAPTIONS
    ]
    listed = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())

    def choose(option: str, columns: list[str], usual: Sequence[str]) -> str:
        named = source.options.get(option)
        if named is not None and named not in features:
            raise ValueError(f"{source.path} has no column {named}; it has {listed}")
        if named is not None and named not in columns:
            raise ValueError(f"{source.path}: column {named} cannot be read as {option}; it has {listed}")
        likely = [name for name in columns if name in usual] or columns
        if named is None and len(likely) != 1:
            number = "several columns that may hold" if likely else "no column of"
            raise ValueError(
                f"{source.path} has {number} {option} ({listed}); name one with ?{option}=COLUMN"
            )
        return named or likely[0]

    others = tuple(name for name in _NO_CAPTIONS if name in features and _may_be_captions(features[name]))
    return _Columns(choose("image", images, ("image",)), choose("captions", texts, _CAPTIONS), others)


def _may_be_image(feature: Any) -> bool:
    import datasets

    if isinstance(feature, dict):
        return "bytes" in feature and _may_be_image(feature["bytes"])
    is_bytes = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    return is_bytes or isinstance(feature, datasets.Image)


def _may_be_captions(feature: Any) -> bool:
    """Whether the values are strings, lists of them, or lists of objects with a `raw` text (Karpathy's)."""
    import datasets

    if isinstance(feature, datasets.List | datasets.LargeList):
        inner = feature.feature
        return _may_be_captions(inner.get("raw") if isinstance(inner, dict) else inner)
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "string_view")


def _type_name(feature: Any) -> str:
    import datasets

    if isinstance(feature, datasets.List | datasets.LargeList):
        return f"list of {_type_name(feature.feature)}"
    if isinstance(feature, dict):
        return "object"
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def _read_file(
    source: Source, name: str, columns: _Columns, split: str, without_caption: list[str]
) -> Iterator[Example]:
    file = _file(name)
    image_column = ImageColumn(file, columns.image)
    # Files of several folders may have the same name.
    root = source.repository and name.partition("@")[2].partition("/")[2]
    place = root or Path(name).relative_to(Path(source.path).resolve()).as_posix()
    stem = place.removesuffix(".parquet")
    rows = _list_remote(file, columns) if isinstance(file, RemoteFile) else _list_rows(file, columns)
    for number, (group, row, size, text) in enumerate(rows):
        where = f"{name}, row {number}"
        captions = captions_of(text, where)
        if not captions:
            without_caption.append(where)
            continue
        image = ParquetImage(image_column, group, row, size)
        own_split = named_split(text, where) or split
        yield Example(f"{stem}/{number}", image, captions, long_text_of(text, where), own_split)


_Row = tuple[int, int, int, dict[str, Any]]
"""Number of the group, number in the group, bytes of the group's images, and the text of the row."""


def _list_rows(file: Path | RemoteFile, columns: _Columns) -> Iterator[_Row]:
    """Read the columns of text alone, group by group."""
    with open_parquet(file, pre_buffer=True) as table:
        missing = {columns.image, columns.captions, *columns.others} - set(table.schema_arrow.names)
        if missing:
            raise ValueError(f"{file} has no column {min(missing)}, which the first file of the dataset has")
        for group in range(table.num_row_groups):
            size = _bytes_of(table.metadata.row_group(group), columns.image)
            texts = table.read_row_group(group, columns=[columns.captions, *columns.others])
            for row, values in enumerate(texts.to_pylist()):
                captions = values.pop(columns.captions)
                captions = captions if isinstance(captions, list) else [captions]
                texts_only = [text["raw"] if isinstance(text, dict) else text for text in captions]
                yield group, row, size, {"captions": [t for t in texts_only if t], **values}


def _bytes_of(group: Any, column: str) -> int:
    parts = [group.column(number) for number in range(group.num_columns)]
    return sum(p.total_uncompressed_size for p in parts if p.path_in_schema.partition(".")[0] == column)


def _list_remote(file: RemoteFile, columns: _Columns) -> Iterator[_Row]:
    """List a remote file from the cache; the texts are fetched once."""

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as lines:
            lines.writelines(f"{json.dumps(row)}\n" for row in _list_rows(file, columns))

    key = hashlib.sha256(f"{file.url} {state_of(file)} {columns}".encode()).hexdigest()[:24]
    path = build_once(cache_directory("remote_shards") / f"{key}.jsonl", write)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            group, row, size, text = json.loads(line)
            yield group, row, size, text
