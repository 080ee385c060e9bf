"""Where rows come from: the lines of a JSONL file, the elements of a JSON array, a dataset of the hub.

What can be told from the file as a whole is told here, before a single row is looked at: that it is missing, empty,
compressed, cut off, in another encoding. A wrong file must not end as a million bad rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

BOM = b"\xef\xbb\xbf"
NOT_TEXT = {  # how a file begins -> (what it is, what to do)
    b"\x1f\x8b": ("is compressed (gzip)", "unpack it with gunzip"),
    b"BZh": ("is compressed (bzip2)", "unpack it with bunzip2"),
    b"\xfd7zXZ\x00": ("is compressed (xz)", "unpack it with unxz"),
    b"\x28\xb5\x2f\xfd": ("is compressed (zstd)", "unpack it with unzstd"),
    b"PK\x03\x04": ("is a ZIP archive", "unpack it"),
    b"PAR1": ("is a Parquet file", "put it alone in a directory and name that, or convert it to JSONL"),
    b"ARROW1": ("is an Arrow file", "put it alone in a directory and name that, or convert it to JSONL"),
    b"\xff\xfe": ("is UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("is UTF-16 text", "save it as UTF-8"),
}


class InputError(ValueError):
    """The user's input or request cannot be used; the message names file, line, field and remedy where there are
    any."""


def lines(source: str) -> Iterator[tuple[int, bytes]]:
    """(number, text) of every row, from 1, whatever the form of the source; nothing is parsed for JSONL. Raises
    InputError for a source that cannot be read at all."""
    path = Path(source)
    if not path.is_file():
        yield from _hub_lines(source)
        return
    with path.open("rb") as file:
        start = file.read(4096)
        for magic, (what, remedy) in NOT_TEXT.items():
            if start.startswith(magic):
                raise InputError(f"{source} {what}, not JSONL: {remedy}")
        file.seek(0)
        if start.removeprefix(BOM).lstrip().startswith(b"["):
            array = _array(source, file.read())
            if array is not None:
                yield from ((number, json.dumps(element).encode("ascii")) for number, element in enumerate(array, 1))
                return
            file.seek(0)
        for number, line in enumerate(file, 1):
            line = (line.removeprefix(BOM) if number == 1 else line).strip(b" \t\r\n")
            if line:
                yield number, line


def values(source: str) -> Iterator[tuple[int, object]]:
    """(number from 1, value) of every line or element of a source that is not made of our rows: any JSON values, with
    or without ids. Of a `.json` file that is one object of lists (`{"name": [row, ...], ...}`) the elements of the
    lists. Raises InputError naming file and line."""
    whole = _object(Path(source))
    if whole is not None:
        lists = all(isinstance(value, list) for value in whole.values())
        yield from enumerate(chain.from_iterable(whole.values()) if lists else [whole], 1)
        return
    for number, line in lines(source):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as fault:
            raise InputError(f"{source}, line {number}: not valid JSON ({fault})") from fault


def _object(path: Path) -> dict | None:
    """The one object that a `.json` file is; None for any other file."""
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        whole = json.loads(path.read_bytes().removeprefix(BOM))
    except (ValueError, RecursionError):
        return None
    return whole if isinstance(whole, dict) else None


def _array(source: str, data: bytes) -> list | None:
    """The elements of the file's JSON array; None where an array on the first line is only a (bad) row among lines.

    Raises InputError for an array that is broken or cut off.
    """
    data = data.removeprefix(BOM).lstrip()
    try:
        return json.loads(data)
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


def _hub_lines(source: str) -> Iterator[tuple[int, bytes]]:
    name, _, split = (source, "", "") if Path(source).is_dir() else source.partition(":")
    path = Path(name)
    if not path.is_dir() and (path.suffix in (".jsonl", ".json") or path.is_absolute() or name.startswith(".")):
        raise InputError(f"{source} does not exist: check the name, and the directory this is run from ({Path.cwd()})")
    import datasets  # takes a second, and only hub data needs it

    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as fault:
        if path.is_dir():
            raise InputError(
                f"{name} is a directory, and the datasets library finds no {split or 'train'} data in it: "
                f"name the file to read ({fault})"
            ) from fault
        raise InputError(
            f"{source} is no file here, and the hub does not give it as a dataset: check the name ({fault})"
        ) from fault
    for number, row in enumerate(rows, 1):
        yield number, json.dumps(row, default=str).encode("ascii")
