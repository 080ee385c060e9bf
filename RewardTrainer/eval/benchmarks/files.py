"""Public benchmarks in upstream's own files: where they lie, how they are read, how a bad row is told apart.

A benchmark is looked for in `<data_dir>/<name>/`, at any depth (a clone of upstream's repository may lie there), and
is otherwise fetched from the hub. JSON (an array), JSONL and parquet are read.

Unlike a preference file of the user's, an empty response is kept: upstream's numbers include such rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path

from distiller.records import InputError, prompt_messages
from RewardTrainer.eval.base import Item

SUFFIXES = (".json", ".jsonl", ".parquet")

Found = tuple[str, dict | InputError]
"""(place for messages, row or what is wrong with it)"""


def local_files(data_dir: Path | None, *folders: str) -> list[Path]:
    """Data files below the first of `<data_dir>/<folder>/` that exists, sorted; empty where none does.

    Raises:
        InputError: the folder is there and holds no data file
    """
    for folder in folders if data_dir is not None else ():
        place = data_dir / folder
        if place.is_dir():
            files = sorted(path for path in place.rglob("*") if path.suffix in SUFFIXES and path.is_file())
            if not files:
                raise InputError(f"{place}: no {', '.join(SUFFIXES)} file in it")
            return files
    return []


def pick(files: list[Path], wanted: Callable[[Path], bool], expected: str) -> list[Path]:
    """Those that are wanted. Raises InputError naming what was expected where none is."""
    picked = [path for path in files if wanted(path)]
    if files and not picked:
        raise InputError(f"{files[0].parent}: {expected} expected, found {', '.join(path.name for path in files[:5])}")
    return picked


def file_rows(path: Path) -> Iterator[Found]:
    """Rows of a file. Raises InputError where the file as a whole cannot be read."""
    if path.suffix == ".parquet":
        import pyarrow  # comes with datasets
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as fault:
            raise InputError(f"{path}: cannot be read as parquet: {fault}") from fault
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"{path}: cannot be read: {fault}") from fault
    if text.lstrip().startswith("["):
        rows = parse_json(text, str(path))
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, parse_json(line, "")
            except InputError as fault:
                yield where, fault


def parse_json(text: str, where: str) -> object:
    """Raises InputError for what is no JSON, NaN and infinite numbers included."""

    def refuse(constant: str) -> float:
        raise InputError(f"{where}: a number is NaN or infinite".removeprefix(": "))

    try:
        return json.loads(text, parse_constant=refuse)
    except InputError:
        raise
    except (ValueError, RecursionError) as fault:
        raise InputError(f"{where}: not valid JSON".removeprefix(": ")) from fault


def hub_rows(dataset: str, split: str, remedy: str, **options: str) -> Iterator[Found]:
    """Rows of a hub dataset. Raises InputError, with `remedy`, where the hub does not give it."""
    import datasets  # takes a second

    try:
        rows = datasets.load_dataset(dataset, split=split, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as fault:
        raise InputError(f"{dataset} ({split}) cannot be fetched from the hub: {fault}\n{remedy}") from fault
    for number, row in enumerate(rows, 1):
        yield f"{dataset} {split}, row {number}", row


def collect(rows: Iterable[Found], make_item: Callable[[dict, str], Item]) -> tuple[list[Item], list[str]]:
    """Rows as items, beside one message for each row left out: malformed, refused by `make_item`, or with the subset
    and id of a row before it."""
    items: list[Item] = []
    skipped: list[str] = []
    seen: dict[tuple[str, str], str] = {}
    for where, row in rows:
        try:
            if isinstance(row, InputError):
                raise row
            if not isinstance(row, dict):
                raise InputError(f"a JSON object expected, not {type(row).__name__}")
            item = make_item(row, where)
            if item.key in seen:
                raise InputError(f"subset {item.subset!r}, id {item.id!r} came before, in {seen[item.key]}")
        except InputError as fault:
            skipped.append(f"{where}: {fault}")
            continue
        seen[item.key] = where
        items.append(item)
    return items, skipped


def text(row: dict, name: str, *inner: str) -> str:
    """A string field, possibly of an object in the row (`text(row, "chosen", "answer")`). Raises InputError."""
    value: object = row
    path = ""
    for part in (name, *inner):
        path = f"{path}.{part}".lstrip(".")
        if not isinstance(value, dict):
            raise InputError(f"field `{path.rpartition('.')[0]}` must be an object, not {type(value).__name__}")
        value = value.get(part)
        if value is None:
            raise InputError(f"field `{path}` is missing")
    return _string(value, path)


def subset(row: dict, name: str, known: Container[str] | None = None) -> str:
    """The subset of a row, one of the known ones where those are given: a row of another one would be averaged as a
    subset that upstream does not have. Raises InputError."""
    value = text(row, name)
    if not value.strip() or (known is not None and value not in known):
        raise InputError(f"field `{name}` is no subset of this benchmark: {value[:40]!r}")
    return value


def right_of_two(row: dict, name: str) -> int:
    """Index of the right one of two responses, from a label 1 or 2. Raises InputError."""
    value = row.get(name)
    if isinstance(value, bool) or value not in (1, 2, "1", "2"):
        raise InputError(f"field `{name}` must be 1 or 2, not {value!r}")
    return int(value) - 1


def texts(row: dict, name: str) -> list[str]:
    """A field that is a list of strings, not empty. Raises InputError."""
    values = row.get(name)
    if not isinstance(values, list) or not values:
        raise InputError(f"field `{name}` must be a list of strings")
    return [_string(value, f"{name}[{index}]") for index, value in enumerate(values)]


def name_of(row: dict, name: str) -> str:
    """An id: a string that is not empty, or an integer, as a string. Raises InputError."""
    value = row.get(name)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)  # a column of integers with a null in it comes back from parquet as floats
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(f"field `{name}` must be a non-empty string or an integer")
    return _string(str(value), name)


def prompt(row: dict, name: str) -> list[dict[str, str]]:
    """The prompt as chat messages, from a string or a list of messages. Raises InputError."""
    try:
        return prompt_messages(row.get(name))
    except InputError as fault:
        raise InputError(f"field `{name}` {fault}") from fault


def _string(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"field `{path}` must be a string, not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as fault:  # legal in JSON as an escape; no tokenizer takes it
        raise InputError(f"field `{path}` has a lone surrogate, which is no character") from fault
    return value
