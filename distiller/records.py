"""The record that flows between the stages: one JSON object a line, read strictly and row by row.

    for row in read_rows("data/pairs.jsonl", required={"rejected": "python refine/..."}):
        ...                                        # a dict with an "id", or a BadRow where the line cannot be used

What a row must look like is checked here, once, so that no stage meets a missing field, a NaN score or an id seen
twice. A line that cannot be used becomes a BadRow and harms only itself; with `strict=True` (training) it raises
InputError.

Fields keep the form they came in (a string, or TRL's list of messages); `prompt_messages` and `response_text` turn
either into what a stage works with. Whole conversations are rewritten to `prompt` + one assistant message while
reading, as messages or as text, with a `prompt` of their own or without (TRL's implicit prompt); so are the cells of a
CSV file (`distiller/fields.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from distiller.fields import (
    NUMBER_FIELDS,
    Unfit,
    check_field,
    kind_of,
    prompt_messages,
    read_cells,
    read_sharegpt,
    response_text,
    split_conversations,
)
from distiller.sources import InputError, RepeatedKey, is_table, lines, object_of

__all__ = [
    "BadRow",
    "InputError",
    "Rows",
    "dump_line",
    "id_key",
    "parse_columns",
    "prompt_messages",
    "read_rows",
    "response_text",
    "row_id",
    "survey",
]

RAW_LIMIT = 2000
"""Characters of a bad line that are kept."""
MISFIT_ROWS = 100
"""A file whose first rows (this many, or all where it is shorter) are bad for one and the same reason is refused as a
whole: it is the wrong file, and failing each of its rows would only hide that."""

DEEPEST = 100
"""Levels of nesting in a row. Python's own limit comes between reading a row and writing it: a row read at 985 levels
could not be written."""
IDENTITY_FIELDS = ("prompt", "chosen", "rejected", "response", "model")
FURTHER_FIELDS = ("messages", "responses", "teacher_response")
"""Part of the identity where a row has them."""


_REPEATED_ROW = Unfit("the row came before in the file", "drop the repetition, or give both an id of their own")
_REPEATED_ID = Unfit("field `id` came before in the file, with other content", "give every row an id of its own")
_REPEATED_CONTENT = Unfit(
    "this content came before in the file, and the row has no `id`", "drop the repetition, or give both an id"
)


@dataclass(frozen=True)
class BadRow:
    """A line that cannot be used, with all the failed file needs to say about it."""

    id: str
    """The row's own id; `<id>#<line>` for a repeated one; `line-<line>` where the line has none to offer."""
    file: str
    line: int
    """Counted from 1; where a row is no line (a JSON array, Parquet, a hub dataset) the number of the element."""
    reason: str
    """The same words for the same fault, so that reasons can be counted."""
    remedy: str
    raw: str
    """The line's text, at most RAW_LIMIT characters."""

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}" + (f"; {self.remedy}" if self.remedy else "")

    def as_failed(self) -> dict:
        """The line of the failed file."""
        place = {"file": self.file, "line": self.line}
        return {"id": self.id, "reason": self.reason, "raw": self.raw, "remedy": self.remedy, **place}


@dataclass(frozen=True)
class Rows:
    """The rows of a source; can be iterated more than once and holds none of them. See `read_rows`."""

    source: str
    columns: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    required: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    strict: bool = False
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    check: Callable[[dict], Unfit | None] | None = None
    renames: bool = True
    """Whether the command has --columns."""

    def __iter__(self) -> Iterator[dict | BadRow]:
        unseen = dict(self.columns)
        rows = islice(self._checked(unseen), self.limit)
        head = list(islice(rows, MISFIT_ROWS))
        if not head:
            raise InputError(
                f"{self.source} has no rows; where a command of this repository wrote it, "
                f"{self.source}.failed.jsonl and {self.source}.filtered.jsonl say what became of them"
            )
        first = head[0]
        if isinstance(first, BadRow) and all(isinstance(r, BadRow) and r.reason == first.reason for r in head):
            raise InputError(f"{first} (all of the first {len(head)} rows: the file does not fit this command)")
        for ours, theirs in unseen.items():
            raise InputError(
                f"{self.source}, lines 1 to {len(head)}: no row has a field `{theirs}`; "
                f"correct --columns {ours}={theirs}, or leave it out"
            )
        for part in (head, rows):
            for row in part:
                if self.strict and isinstance(row, BadRow):
                    raise InputError(str(row))
                yield row

    def _checked(self, unseen: dict[str, str]) -> Iterator[dict | BadRow]:
        """Every row, good or bad; takes the columns it meets out of `unseen`."""
        from_cells = is_table(self.source)
        seen: dict[int, int] = {}  # 8-byte hashes: of ids, and of the lines they stood in
        for number, line in lines(self.source):
            row, fault = _parse(line)
            if row is not None:
                for ours in [ours for ours, theirs in unseen.items() if theirs in row]:
                    del unseen[ours]
                _rename(row, self.columns)
                fault = fault or self._read_values(row, from_cells)
                read_sharegpt(row)
            key, fault_of_id = _own_id(row, number)
            fault = fault or fault_of_id or self._fault(row)
            if id_key(key) in seen:
                same = _REPEATED_ROW if seen[id_key(key)] == hash(line.strip()) else _REPEATED_ID
                fault = fault or (same if row.get("id") is not None else _REPEATED_CONTENT)
                while id_key(key) in seen:
                    key = f"{key}#{number}"
            seen[id_key(key)] = hash(line.strip())
            if fault:
                raw = line.decode("utf-8", "backslashreplace")[:RAW_LIMIT]
                yield BadRow(key, self.source, number, fault.reason, fault.remedy, raw)
            else:
                yield {**row, "id": key}

    def _read_values(self, row: dict, from_cells: bool) -> Unfit | None:
        """Make numbers and messages of the cells of a table of text, and null of what is not finite (pandas writes
        NaN for what is missing), in place. The fault of a row that lacks a number so, or has an infinite one."""
        try:
            if from_cells:
                read_cells(row)
        except Unfit as fault:
            return fault
        for name, value in row.items():
            if _has_not_finite(value):
                # NaN alone differs from itself, and stands for nothing where a number may be missing.
                if name in NUMBER_FIELDS and (name in self.required or (name in self.optional and value == value)):
                    return Unfit(f"field `{name}` is NaN or infinite", "write a number, or null")
                row[name] = _finite_only(value)
        return None

    def _fault(self, row: dict) -> Unfit | None:
        """What is wrong with the row's fields; conversations in it are split in place."""
        try:
            split_conversations(row)
        except Unfit as fault:
            return fault
        for name in (*self.required, *self.optional):
            value = row.get(name)
            if value is None and name in self.required:
                return self._missing(name, row)
            try:
                if value is not None:
                    check_field(name, value, self.ranges.get(name))
            except Unfit as fault:
                return fault.within(name)
        return self.check(row) if self.check else None

    def _missing(self, name: str, row: dict) -> Unfit:
        column = f" (column `{self.columns[name]}`)" if name in self.columns else ""
        if command := self.required[name]:
            remedy = f"to get it, run: {command}"
        elif name in row:
            remedy = "give it a value, or leave the row out"
        else:
            own = [self.columns.get(field, field) for field in row]  # as the file has them
            rename = "rename one of them" + (" (--columns)" if self.renames else "")
            remedy = f"the row has {_listed(own)}: {rename}, or leave the row out"
            inner = [field for field, value in row.items() if _is_rows(value)]
            if inner:
                remedy = f"the row has {_listed(own)}: if rows stand in `{inner[0]}`, write them one a line"
            elif name == "prompt" and {"chosen", "rejected"} <= row.keys():
                remedy = (
                    "give it one, or write the whole conversations as messages, "
                    '[{"role": "user", "content": "..."}, ...]; as text they are read in one form alone: '
                    "Human: ... and Assistant: ..., with an empty line before each"
                )
        return Unfit(f"field `{name}`{column} is {'null' if name in row else 'missing'}", remedy)


def read_rows(
    source: str | Path,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    *,
    required: Mapping[str, str] | None = None,
    optional: tuple[str, ...] = (),
    strict: bool = False,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    check: Callable[[dict], Unfit | None] | None = None,
) -> Rows:
    """The rows of a file (JSON lines, a JSON array, CSV, Parquet, Arrow; gzip and the like), of a directory of files
    or of `save_to_disk`, or of a hub dataset (`owner/name`, `owner/name:split`, `owner/name:config:split`; split
    "train" by default).

    `columns` maps our field names to the source's: `{"prompt": "instruction"}`; None says that the user has no way to
    rename them. `required` maps each field that must be there to the command that makes it (or ""); `optional` names
    those that are checked where present; `ranges` has the lowest and the highest value of a number; `check` says what
    else is wrong with a row whose fields are right. `limit` takes the first rows. A row without an id gets `row_id`;
    an id must be a non-empty string or an int, which is kept as its string. Of two rows with one id the first keeps
    it, the later one is bad. Blank lines are skipped, CRLF and a byte-order mark accepted; one JSON array or object is
    read whole, all else row by row. Raises InputError (on iteration) for a missing, empty or wholly unfit file, for a
    column that no row has, and for any bad row if `strict`.
    """
    required, ranges = dict(required or {}), dict(ranges or {})
    renames = columns is not None
    return Rows(str(source), dict(columns or {}), limit, required, tuple(optional), strict, ranges, check, renames)


def survey(source: str | Path) -> tuple[int, str]:
    """(number of rows, bad ones included; sha256 hex of their text) of a source, read through once."""
    count, digest = 0, hashlib.sha256()
    for _, line in lines(str(source)):
        count += 1
        digest.update(line + b"\n")
    return count, digest.hexdigest()


def parse_columns(text: str | None) -> dict[str, str]:
    """`"prompt=instruction,rejected=worse"` (ours=theirs) -> `{"prompt": "instruction", "rejected": "worse"}`. Raises
    InputError."""
    columns = {}
    for pair in text.split(",") if text else ():
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (ours and equals and theirs):
            raise InputError(f"--columns wants ours=theirs,ours=theirs,... and not {pair!r}")
        if ours in columns:
            raise InputError(f"--columns names `{ours}` twice")
        columns[ours] = theirs
    return columns


def row_id(row: Mapping) -> str:
    """16 hex digits that depend on the row's content alone (`IDENTITY_FIELDS`, `FURTHER_FIELDS`)."""
    further = [[name, row[name]] for name in FURTHER_FIELDS if row.get(name) is not None]
    content = json.dumps([*(row.get(name) for name in IDENTITY_FIELDS), *further], sort_keys=True)
    return hashlib.sha256(content.encode("ascii")).hexdigest()[:16]


def id_key(identifier: str) -> int:
    """A 64-bit hash of an id: sets of ids take a few bytes an id, however long the ids are."""
    return int.from_bytes(hashlib.blake2b(identifier.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def dump_line(row: Mapping) -> bytes:
    """The row as one line of JSON, newline included. Raises ValueError for a NaN or infinite number: they are not
    JSON."""
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8 form, but it has a JSON escape
        return (json.dumps(row, allow_nan=False) + "\n").encode("ascii")


def _parse(line: bytes) -> tuple[dict | None, Unfit | None]:
    """(the object, None where there is none; what is wrong)"""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=object_of)
    except UnicodeDecodeError as error:
        return None, Unfit("not valid UTF-8", f"byte {error.start + 1} of the line; save the file as UTF-8")
    except RepeatedKey as key:
        return None, Unfit("has a key twice in one object", f"`{key}`: drop one of them")
    except (ValueError, RecursionError) as error:
        if b"\0" in line:
            return None, Unfit("has NUL bytes", "the file was damaged, or is no UTF-8 text: write the line again")
        where = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        return None, Unfit("not valid JSON", f"{where}; write one whole JSON object a line")
    if line.count(b"{") + line.count(b"[") > DEEPEST and _deeper_than(row, DEEPEST):
        return None, Unfit("not valid JSON", f"nested more than {DEEPEST} deep: write it flatter")
    if not isinstance(row, dict):
        return None, Unfit("not a JSON object", f'a line is {{"prompt": ..., ...}}, not {kind_of(row)}')
    return row, None


def _is_rows(value: object) -> bool:
    """Whether a value is a list of objects that are no messages."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and not first.keys() & {"role", "from", "type"}


def _has_not_finite(value: object) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_has_not_finite, parts))


def _finite_only(value: object) -> object:
    """The same with null for each number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite_only(part) for name, part in value.items()}
    return [_finite_only(part) for part in value] if isinstance(value, list) else value


def _deeper_than(value: object, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        parents = [item for item in level if isinstance(item, dict | list)]
        level = [part for item in parents for part in (item.values() if isinstance(item, dict) else item)]
    return any(isinstance(item, dict | list) for item in level)


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:12]) or "no fields"


def _rename(row: dict, columns: Mapping[str, str]) -> None:
    """All at once, so that `chosen=rejected,rejected=chosen` swaps the two."""
    values = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    for theirs in columns.values():
        row.pop(theirs, None)
    row.update(values)


def _own_id(row: dict | None, number: int) -> tuple[str, Unfit | None]:
    """(id, what is wrong with it)"""
    if row is None:
        return f"line-{number}", None
    identifier = row.get("id")
    if identifier is None:
        return row_id(row), None
    if isinstance(identifier, float) and identifier.is_integer():  # as pandas writes ids where one is missing
        identifier = int(identifier)
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        return str(identifier), None
    if isinstance(identifier, str) and identifier:
        return identifier, None
    remedy = f"it is {kind_of(identifier)}: write a string, or leave it out to have one made from the content"
    return f"line-{number}", Unfit("field `id` must be a non-empty string or an integer", remedy)
