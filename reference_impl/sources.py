"""Where do preference rows come from, and on which line of the file does each stand?

A source is a path (.jsonl, .json, both also .gz; .parquet), `hub:name[:split]`, or rows in memory.
Files are read row by row, so that only tokens are held in memory. What cannot be read is refused with its line.
"""

import difflib
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

BOM = b"\xef\xbb\xbf"  # some editors put it in front of UTF-8
EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


class DataError(ValueError):
    """The data cannot be trained on. The message says where, what was given, what is allowed and what to do.

    `report` is the DataReport where every row was read and none is left, else None.
    """

    report: Any = None


@dataclass(frozen=True)
class SourceRow:
    """One row as given: `index` counts rows from 0, `place` is what a person looks up ("train.jsonl line 7")."""

    index: int
    place: str
    fields: Mapping[str, Any]


def source_name(source: object) -> str:
    """How messages and reports call the source."""
    return str(source) if isinstance(source, (str, os.PathLike)) else f"a {type(source).__name__} in memory"


def read_rows(source: object) -> Iterator[SourceRow]:
    """The rows of `source` in order. Raises DataError where a row cannot be read, and for a source without rows."""
    empty = True
    for row in _dispatch(source):
        empty = False
        yield row
    if empty:
        raise DataError(f"{source_name(source)} has no rows: a preference set needs at least one pair")


def _dispatch(source: object) -> Iterator[SourceRow]:
    if isinstance(source, str) and source.startswith("hub:"):
        return _hub_rows(source)
    if isinstance(source, (str, os.PathLike)):
        return _file_rows(Path(source).expanduser())
    if isinstance(source, Mapping):
        keys = ", ".join(map(repr, list(source)[:5]))
        raise DataError(f"the rows are a mapping with keys {keys}; give a list of rows, or one split of the dataset")
    if isinstance(source, Iterable) and not isinstance(source, bytes):
        return _memory_rows(source)
    raise DataError(
        f"a data source is a path, 'hub:name[:split]' or a list of rows, not {type(source).__name__} {source!r:.60}"
    )


def _as_row(index: int, place: str, value: object) -> SourceRow:
    if not isinstance(value, Mapping):
        raise DataError(
            f'{place}: a row is an object such as {{"prompt": ..., "chosen": ..., "rejected": ...}}, '
            f"not {type(value).__name__} {value!r:.60}"
        )
    return SourceRow(index, place, value)


def _memory_rows(rows: Iterable[Any]) -> Iterator[SourceRow]:
    for index, value in enumerate(rows):
        yield _as_row(index, f"row {index}", value)


def _file_rows(path: Path) -> Iterator[SourceRow]:
    name = path.name.lower()
    if path.is_dir():
        found = sorted(p.name for p in path.iterdir() if p.name.lower().endswith(EXTENSIONS))[:5]
        hint = f"data files in it: {', '.join(found)}" if found else "no data file is in it"
        raise DataError(f"{path} is a folder, not a data file; {hint}")
    if not name.endswith(EXTENSIONS):
        raise DataError(f"{path}: unknown file type {path.suffix!r}; allowed are {', '.join(EXTENSIONS)}")
    if not path.exists():
        raise DataError(f"{path} does not exist{_near_files(path)}")
    if name.endswith(".parquet"):
        return _parquet_rows(path)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl_rows(path)
    return _json_rows(path)


def _near_files(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f", nor does the folder {folder}"
    names = [p.name for p in folder.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if not close:
        close = sorted(n for n in names if n.lower().endswith(EXTENSIONS))[:5]
    return f"; did you mean {' or '.join(close)}?" if close else f"; the folder {folder} holds no data file"


def _open(path: Path) -> BinaryIO:
    try:
        return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number from 1 and text of each line, decoded strictly."""
    number = 0
    with _open(path) as stream:
        try:
            for raw in stream:
                number += 1
                yield number, _decode(raw.removeprefix(BOM) if number == 1 else raw, f"{path} line {number}")
        except gzip.BadGzipFile as error:
            raise DataError(f"{path} is not a gzip file ({error}); rename it without .gz or compress it") from error
        except (EOFError, zlib.error) as error:
            raise DataError(f"{path} is damaged after line {number} ({error}); copy the file again") from error
        except OSError as error:
            raise DataError(f"{path} cannot be read after line {number}: {error.strerror or error}") from error


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: byte {error.start + 1} ({raw[error.start]:#04x}) is not valid UTF-8; convert the file to UTF-8"
        ) from error


def _jsonl_rows(path: Path) -> Iterator[SourceRow]:
    index = 0
    for number, line in _lines(path):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            array = index == 0 and line.lstrip()[0] == "["
            hint = "; the file starts like one JSON array: name it .json" if array else ""
            raise DataError(f"{place}: not valid JSON ({error}): {line.strip()[:60]!r}{hint}") from error
        if isinstance(value, list) and index == 0:
            raise DataError(f"{place}: a JSON array, where each line must be one row (an object); name the file .json")
        yield _as_row(index, place, value)
        index += 1


def _json_rows(path: Path) -> Iterator[SourceRow]:
    text = "".join(line for _, line in _lines(path))
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; it looks like one object per line: name it .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path} line {error.lineno}: not valid JSON ({error.msg}){hint}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, list):
        keys = f" with keys {', '.join(map(repr, list(value)[:5]))}" if isinstance(value, dict) else ""
        raise DataError(
            f"{path} holds one JSON {type(value).__name__}{keys}; a .json file must hold an array of rows "
            "(one object per line is .jsonl)"
        )
    for index, item in enumerate(value):
        yield _as_row(index, f"{path} row {index}", item)


def _parquet_rows(path: Path) -> Iterator[SourceRow]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow; pip install 'dpocheck[train]'") from error
    index = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                yield _as_row(index, f"{path} row {index}", value)
                index += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def _hub_rows(source: str) -> Iterator[SourceRow]:
    name, _, split = source.removeprefix("hub:").partition(":")
    if not name:
        raise DataError(f"{source!r} names no dataset; write hub:name or hub:name:split")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{source}: hub datasets need the package datasets; pip install 'dpocheck[train]'") from error
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises a dozen unrelated types here; all of them mean "not loaded"
        raise DataError(f"{source} cannot be loaded: {type(error).__name__}: {error}") from error
    for index, value in enumerate(rows):
        yield _as_row(index, f"{source} row {index}", value)
