"""Where rows come from: JSON lines, a JSON array, a table (CSV, Parquet, Arrow), a dataset on disk or on the hub.

What can be told from the file as a whole is told here, before a single row is looked at: that it is missing, empty,
cut off, in another encoding. A wrong file must not end as a million bad rows.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from itertools import chain
from pathlib import Path

BOM = b"\xef\xbb\xbf"
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}  # by how a file begins
NOT_TEXT = {  # how a file begins -> (what it is, what to do)
    b"\x28\xb5\x2f\xfd": ("is compressed (zstd)", "unpack it with unzstd"),
    b"PK\x03\x04": ("is a ZIP archive", "unpack it"),
    b"\x80\x04": ("is a pickle", "save it as JSON lines or Parquet"),
    b"\x80\x05": ("is a pickle", "save it as JSON lines or Parquet"),
    b"\xff\xfe": ("is UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("is UTF-16 text", "save it as UTF-8"),
}
PARQUET, ARROW = b"PAR1", (b"ARROW1", b"\xff\xff\xff\xff")  # an Arrow file, or a stream
TAR = (257, b"ustar")  # where in it what stands, after a name that is filled up with NUL bytes
CSV = {".csv": ",", ".tsv": "\t"}  # suffix -> what is between cells
PACKED_SUFFIXES = (".gz", ".bz2", ".xz")
FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", *CSV, *PACKED_SUFFIXES)
"""A source that ends so is a file, never a dataset of the hub."""
ROWS_NAMES = ("data", "rows", "train", "examples", "instances")
"""The list of an object that goes by such a name is the rows, whatever else is in the object."""


class InputError(ValueError):
    """The user's input or request cannot be used; the message names file, line, field and remedy where there are
    any."""


class RepeatedKey(Exception):
    """A JSON object has this key twice: json itself would keep the last value without a word. No ValueError, which
    stands for text that is no JSON."""


def object_of(pairs: list[tuple[str, object]]) -> dict:
    """json's `object_pairs_hook`. Raises RepeatedKey."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RepeatedKey(next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1))
    return found


def lines(source: str) -> Iterator[tuple[int, bytes]]:
    """(number, JSON text) of every row, from 1, whatever the form of the source; nothing is parsed for JSON lines. The
    number is that of the line, where a row has one. Cells of a CSV file are strings, or null where empty.

    Raises InputError for a source that cannot be read at all."""
    return _lines(source, _rows_of_object)


def values(source: str) -> Iterator[tuple[int, object]]:
    """(number from 1, value) of every line or element of a source that is not made of our rows: any JSON values, with
    or without ids. Of a `.json` file that is one object of lists (`{"name": [row, ...], ...}`) the elements of the
    lists. Raises InputError naming file and line."""
    for number, line in _lines(source, _elements_of_object):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as fault:
            raise InputError(f"{source}, line {number}: not valid JSON ({fault})") from fault


def _lines(source: str, rows_of_object: Callable[[dict], list]) -> Iterator[tuple[int, bytes]]:
    path = Path(source)
    if not path.is_file():
        yield from _as_lines(enumerate(_dataset(source), 1))
        return
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith((PARQUET, *ARROW)) or path.suffix.lower() == ".arrow":
        yield from _as_lines(enumerate(_columns(path, start), 1))
        return
    unpack = next((unpack for magic, unpack in PACKED.items() if start.startswith(magic)), open)
    try:
        with unpack(path, "rb") as file:
            if delimiter := CSV.get(_form(path)):
                yield from _as_lines(_cells(source, file, delimiter))
            else:
                yield from _json_lines(source, file, rows_of_object)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as fault:
        if unpack is open:
            raise
        raise InputError(f"{source} is damaged ({fault}): fetch it, or pack it, again") from fault


def is_table(source: str) -> bool:
    """Whether it is a table of any form, whose numbers and messages may be text, and not JSON, which has its own."""
    path = Path(source)
    return not path.is_file() or _form(path) in (*CSV, ".parquet", ".arrow")


def _form(path: Path) -> str:
    """Its suffix, without that of what packed it."""
    suffix = path.suffix.lower()
    return _form(path.with_suffix("")) if suffix in PACKED_SUFFIXES else suffix


def _as_lines(rows: Iterable[tuple[int, dict]]) -> Iterator[tuple[int, bytes]]:
    for number, row in rows:
        yield number, json.dumps(row, default=_plain).encode("ascii")


def _plain(value: object) -> object:
    """What JSON has for a value of another kind: binary columns of Parquet are mostly text (null where they are not),
    dates and the like are what they print as."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return float(value) if isinstance(value, Decimal) else str(value)


def _json_lines(
    source: str, file: io.BufferedIOBase, rows_of_object: Callable[[dict], list]
) -> Iterator[tuple[int, bytes]]:
    start = file.read(4096)
    for magic, (what, remedy) in NOT_TEXT.items():
        if start.startswith(magic):
            raise InputError(f"{source} {what}, not JSONL: {remedy}")
    if start[TAR[0] :].startswith(TAR[1]) and b"\0" in start[: TAR[0]]:
        raise InputError(f"{source} is a tar archive, not JSONL: unpack it")
    file.seek(0)
    whole = None
    try:
        if start.removeprefix(BOM).lstrip().startswith(b"["):
            whole = _array(source, file.read())
        elif _form(Path(source)) == ".json" and (found := _object(file)) is not None:
            whole = rows_of_object(found)
    except RepeatedKey as key:
        raise InputError(f"{source}: an object in it has the key `{key}` twice: drop one of them") from key
    if whole is not None:
        yield from _as_lines(enumerate(whole, 1))
        return
    file.seek(0)
    for number, line in enumerate(file, 1):
        line = line.removeprefix(BOM).strip(b" \t\r\n")  # files that were joined have one in the middle, too
        if line:
            yield number, line


def _object(file: io.BufferedIOBase) -> dict | None:
    """The one object that a `.json` file is; None where it is none, or has rows, one a line."""
    first = file.readline().removeprefix(BOM)
    try:
        json.loads(first)
        whole = first  # a line is a whole value: with more behind it, these are JSON lines
        if file.read(4096).strip():
            return None
    except (ValueError, RecursionError):
        whole = first + file.read()
    try:
        found = json.loads(whole, object_pairs_hook=object_of)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _rows_of_object(whole: dict) -> list:
    """The rows of a file that is one object: its one list of objects, if nothing else is in it (`{"data": [...]}`) or
    the list goes by one of `ROWS_NAMES`; otherwise itself, for a list may be a field of a row."""
    lists = [name for name, value in whole.items() if value and isinstance(value, list) and isinstance(value[0], dict)]
    if len(lists) != 1 or whole.keys() & {"prompt", "chosen"}:
        return [whole]
    (name,) = lists
    alone = len(whole) == 1 and "role" not in whole[name][0]  # a row may be messages and nothing else
    return whole[name] if alone or name in ROWS_NAMES else [whole]


def _elements_of_object(whole: dict) -> list:
    lists = whole and all(isinstance(value, list) for value in whole.values())
    return list(chain.from_iterable(whole.values())) if lists else _rows_of_object(whole)


def _cells(source: str, file: io.BufferedIOBase, delimiter: str) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    try:
        begins = reader.line_num + 1 if reader.fieldnames else 1  # which reads the first line
        twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1 and name]
        if twice:
            raise InputError(f"{source}, line 1: the column `{twice[0]}` is there twice: rename or drop one of them")
        for row in reader:
            if None in row:
                raise InputError(f"{source}, line {begins}: more cells than the first line has names")
            yield begins, {name: cell or None for name, cell in row.items()}
            begins = reader.line_num + 1  # of rows whose cells have line breaks the first one
    except (csv.Error, UnicodeDecodeError) as fault:
        raise InputError(f"{source}, line {reader.line_num + 1}: no CSV ({fault}); save it again, as UTF-8") from fault


def _columns(path: Path, start: bytes) -> Iterator[dict]:
    """Rows of a Parquet or an Arrow file (of either form: the datasets library writes streams)."""
    import pyarrow
    import pyarrow.parquet

    try:
        if start.startswith(PARQUET):
            batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        elif start.startswith(ARROW[0]):
            reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        for batch in batches:
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as fault:
        raise InputError(f"{path} is damaged, or no table ({fault}): fetch it, or write it, again") from fault


def _array(source: str, data: bytes) -> list | None:
    """The elements of the file's JSON array; None where an array on the first line is only a (bad) row among lines.

    Raises InputError for an array that is broken or cut off.
    """
    data = data.removeprefix(BOM).lstrip()
    try:
        return json.loads(data, object_pairs_hook=object_of)
    except (ValueError, RecursionError) as fault:
        try:
            json.loads(data.partition(b"\n")[0])
            return None
        except (ValueError, RecursionError):
            where = f", line {fault.lineno}, column {fault.colno}" if isinstance(fault, json.JSONDecodeError) else ""
            raise InputError(
                f"{source}{where}: not a whole JSON array ({fault}); it may have been cut off: write it again, "
                "or as one JSON object a line"
            ) from fault


def _dataset(source: str) -> Iterable[dict]:
    """Rows of a directory (of files, or of `save_to_disk`) as `DIR[:split]`, or of a dataset of the hub as
    `owner/name[:split]` or `owner/name:config:split`."""
    if source == "-" or (Path(source).exists() and not Path(source).is_dir()):
        raise InputError(
            f"{source} is a pipe or a device, and rows are read more than once: write them to a file first"
        )
    name, *further = [source] if Path(source).is_dir() else source.split(":")
    path = Path(name)
    if not path.is_dir() and (path.suffix in FILE_SUFFIXES or path.is_absolute() or name.startswith(".")):
        raise InputError(f"{source} does not exist: check the name, and the directory this is run from ({Path.cwd()})")
    if len(further) > (1 if path.is_dir() else 2):
        raise InputError(f"{source}: give a dataset as owner/name, owner/name:split or owner/name:config:split")
    import datasets  # takes a second, and only datasets need it

    config = further[0] if len(further) == 2 else None
    split = further[-1] if further else None
    saved = any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config, split=split or "train")
    except Exception as fault:  # of many kinds: a script, a file that is none, no network
        if path.is_dir():
            raise InputError(
                f"{name} is a directory, and the datasets library finds no {split or 'train'} data in it: "
                f"name the file to read ({fault})"
            ) from fault
        raise InputError(
            f"{source} is no file here, and the hub does not give it as a dataset: check the name; without network "
            f"give a file, or a directory that `save_to_disk` wrote ({fault})"
        ) from fault
    if not saved:
        return found
    parts = found if isinstance(found, datasets.DatasetDict) else {str(found.split or "train"): found}
    wanted = split or ("train" if "train" in parts or len(parts) > 1 else next(iter(parts)))
    if wanted not in parts:
        remedy = f"name one as {source.removesuffix(f':{split}')}:{next(iter(parts))}"
        raise InputError(f"{source} has no split {wanted}; it has {', '.join(parts)}: {remedy}")
    return parts[wanted]
