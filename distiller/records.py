"""The record that flows between the stages: one JSON object a line, read strictly and row by row.

    for row in read_rows("data/pairs.jsonl", required={"rejected": "python refine/..."}):
        ...                                        # a dict with an "id", or a BadRow where the line cannot be used

What a row must look like is checked here, once, so that no stage meets a missing field, a NaN score or an id seen
twice. A line that cannot be used becomes a BadRow and harms only itself; with `strict=True` (training) it raises
InputError.

Fields keep the form they came in (a string, or TRL's list of messages); `prompt_messages` and `response_text` turn
either into what a stage works with. Two conversational forms are rewritten to `prompt` + one assistant message while
reading: TRL's implicit prompt (`chosen` and `rejected` are whole conversations, there is no `prompt`), and whole
conversations beside a `prompt`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

RAW_LIMIT = 2000
"""Characters of a bad line that are kept."""
MISFIT_ROWS = 100
"""A file whose first rows (this many, or all where it is shorter) are bad for one and the same reason is refused as a
whole: it is the wrong file, and failing each of its rows would only hide that."""

RESPONSE_FIELDS = ("chosen", "rejected", "response", "teacher_response", "refined_response", "original_chosen")
NUMBER_FIELDS = ("chosen_score", "rejected_score", "original_chosen_score", "margin", "edit_similarity")
IDENTITY_FIELDS = ("prompt", "chosen", "rejected", "response", "model")
ROLES = ("system", "user", "assistant", "tool")


class InputError(ValueError):
    """The user's input or request cannot be used; the message names file, line, field and remedy where there are
    any."""


@dataclass(frozen=True)
class BadRow:
    """A line that cannot be used, with all the failed file needs to say about it."""

    id: str
    """The row's own id; `<id>#<line>` for a repeated one; `line-<line>` where the line has none to offer."""
    file: str
    line: int
    """Counted from 1; in a JSON array or a hub dataset the number of the element."""
    reason: str
    """The same words for the same fault, so that reasons can be counted."""
    remedy: str
    raw: str
    """The line's text, at most RAW_LIMIT characters."""

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Rows:
    """The rows of a source; can be iterated more than once and holds none of them. See `read_rows`."""

    source: str
    columns: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    required: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    strict: bool = False

    def __iter__(self) -> Iterator[dict | BadRow]:
        rows = islice(self._checked(), self.limit)
        head = list(islice(rows, MISFIT_ROWS))
        if not head:
            raise InputError(f"{self.source} has no rows")
        first = head[0]
        if isinstance(first, BadRow) and all(isinstance(r, BadRow) and r.reason == first.reason for r in head):
            raise InputError(f"{first} (all of the first {len(head)} rows: the file does not fit this command)")
        for part in (head, rows):
            for row in part:
                if self.strict and isinstance(row, BadRow):
                    raise InputError(str(row))
                yield row

    def _checked(self) -> Iterator[dict | BadRow]:
        seen: set[int] = set()  # 8-byte hashes of ids, not the rows
        for number, line in _lines(self.source):
            reason, remedy, row = "", "", None
            try:
                row = _parse(line)
                _rename(row, self.columns)
                _split_conversations(row)
            except InputError as fault:
                reason = str(fault)
            row_key, fault_of_id = _own_id(row, number)
            reason = reason or fault_of_id
            for name in (*self.required, *self.optional) if not reason else ():
                if row.get(name) is None:
                    if name in self.required:
                        column = f" (column `{self.columns[name]}`)" if name in self.columns else ""
                        reason, remedy = f"field `{name}`{column} is missing", self.required[name]
                else:
                    try:
                        _check_field(name, row[name])
                    except InputError as fault:
                        reason = f"field `{name}` {fault}"
                if reason:
                    break
            if id_key(row_key) in seen:
                reason = reason or "this id, or this same content without an id, came before in the file"
                while id_key(row_key) in seen:
                    row_key = f"{row_key}#{number}"
            seen.add(id_key(row_key))
            if reason:
                raw = line.decode("utf-8", "backslashreplace")[:RAW_LIMIT]
                remedy = f"to get it, run: {remedy}" if remedy else ""
                yield BadRow(row_key, self.source, number, reason, remedy, raw)
            else:
                yield {**row, "id": row_key}


def read_rows(
    source: str | Path,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    *,
    required: Mapping[str, str] | None = None,
    optional: tuple[str, ...] = (),
    strict: bool = False,
) -> Rows:
    """The rows of a JSONL file, a JSON array or a hub dataset (`owner/name` or `owner/name:split`, split "train" by
    default).

    `columns` maps our field names to the source's: `{"prompt": "instruction"}`. `required` maps each field that must
    be there to the command that makes it (or ""); `optional` names those that are checked where present. `limit` takes
    the first rows. A row without an id gets `row_id`; an id must be a non-empty string or an int, which is kept as its
    string. Of two rows with one id the first keeps it, the later one is bad. Blank lines are skipped, CRLF and a
    byte-order mark accepted; a JSON array is read whole, JSONL line by line. Raises InputError (on iteration) for a
    missing, empty or wholly unfit file, and for any bad row if `strict`.
    """
    return Rows(str(source), dict(columns or {}), limit, dict(required or {}), tuple(optional), strict)


def survey(source: str | Path) -> tuple[int, str]:
    """(number of rows, bad ones included; sha256 hex of their text) of a source, read through once."""
    count, digest = 0, hashlib.sha256()
    for _, line in _lines(str(source)):
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
    """16 hex digits that depend on the row's content alone (prompt, chosen, rejected, response, model)."""
    content = json.dumps([row.get(name) for name in IDENTITY_FIELDS], sort_keys=True)
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


def prompt_messages(prompt: str | list[dict]) -> list[dict]:
    """`[{"role", "content"}, ...]`: a string is one user message, a list is checked and copied. Raises InputError."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = _messages(prompt)
    if messages[-1]["role"] == "assistant":
        raise InputError("ends with an assistant message: there is nothing left to answer")
    if not messages[-1]["content"].strip():
        raise InputError("is empty")
    return messages


def response_text(response: str | list[dict]) -> str:
    """The text of a response: itself, or that of `[{"role": "assistant", "content": text}]`. Raises InputError."""
    if not isinstance(response, str):
        messages = _messages(response)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise InputError("must be one assistant message")
        response = messages[0]["content"]
    if not response.strip():
        raise InputError("is empty")
    return _text(response)


def _lines(source: str) -> Iterator[tuple[int, bytes]]:
    """(number, text) of every row, from 1, whatever the form of the source; nothing is parsed for JSONL."""
    path = Path(source)
    if not path.is_file():
        yield from _hub_lines(source)
        return
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        array = _array(file.read()) if start.startswith(b"[") else None
        if array is not None:
            yield from ((number, json.dumps(element).encode("ascii")) for number, element in enumerate(array, 1))
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            line = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip(b" \t\r\n")
            if line:
                yield number, line


def _array(text: bytes) -> list | None:
    """The elements, or None where the text is not one JSON array (then it is taken for lines)."""
    try:
        return json.loads(text.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        return None


def _hub_lines(source: str) -> Iterator[tuple[int, bytes]]:
    name, _, split = (source, "", "") if Path(source).is_dir() else source.partition(":")
    path = Path(name)
    if not path.is_dir() and (path.suffix in (".jsonl", ".json") or path.is_absolute() or name.startswith(".")):
        raise InputError(f"{source} does not exist")
    import datasets  # takes a second, and only hub data needs it

    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as fault:
        raise InputError(f"{source} is no file here, and the hub does not give it as a dataset: {fault}") from fault
    for number, row in enumerate(rows, 1):
        yield number, json.dumps(row, default=str).encode("ascii")


def _not_json(constant: str) -> float:
    raise InputError("a number is NaN or infinite")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _not_json(text)


def _parse(line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_not_json, parse_float=_finite)
    except InputError:
        raise
    except UnicodeDecodeError as fault:
        raise InputError("not valid UTF-8") from fault
    except (ValueError, RecursionError) as fault:
        raise InputError("not valid JSON") from fault
    if not isinstance(row, dict):
        raise InputError("not a JSON object")
    return row


def _rename(row: dict, columns: Mapping[str, str]) -> None:
    """All at once, so that `chosen=rejected,rejected=chosen` swaps the two."""
    values = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    for theirs in columns.values():
        row.pop(theirs, None)
    row.update(values)


def _split_conversations(row: dict) -> None:
    """Turn whole conversations in `chosen` / `rejected` into `prompt` and one assistant message each, in place.

    Beside a `prompt` that they do not begin with they are left as they are: a stage that needs them will say so.
    """
    whole = {}
    for name in ("chosen", "rejected"):
        if isinstance(row.get(name), list) and len(row[name]) > 1:
            try:
                whole[name] = _messages(row[name])
            except InputError as fault:
                raise InputError(f"field `{name}` {fault}") from fault
    if row.get("prompt") is None and whole:
        first, *others = whole.values()
        size = min(len(messages) for messages in whole.values()) - 1
        for other in others:
            size = next((i for i in range(size) if first[i] != other[i]), size)
        if not size:
            raise InputError("`chosen` and `rejected` have no prompt in common")
        row["prompt"] = first[:size]
    try:
        prompt = prompt_messages(row["prompt"]) if whole else []
    except InputError as fault:
        raise InputError(f"field `prompt` {fault}") from fault
    for name, messages in whole.items():
        if messages[:-1] == prompt:
            row[name] = messages[-1:]


def _own_id(row: dict | None, number: int) -> tuple[str, str]:
    """(id, what is wrong with it or "")"""
    if row is None:
        return f"line-{number}", ""
    identifier = row.get("id")
    if identifier is None:
        return row_id(row), ""
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        return str(identifier), ""
    if isinstance(identifier, str) and identifier:
        return identifier, ""
    return f"line-{number}", "field `id` must be a non-empty string or an integer"


def _check_field(name: str, value: object) -> None:
    if name == "prompt":
        prompt_messages(value)
    elif name in RESPONSE_FIELDS:
        response_text(value)
    elif name in NUMBER_FIELDS and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise InputError(f"must be a number, not {type(value).__name__}")


def _messages(value: object) -> list[dict]:
    if not isinstance(value, list):
        raise InputError(f"must be a string or a list of messages, not {type(value).__name__}")
    if not value:
        raise InputError("is empty")
    messages = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(f"has a message without a role out of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise InputError("has a message whose content is not a string")
        messages.append({"role": message["role"], "content": _text(message["content"])})
    return messages


def _text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as fault:  # tokenizers and servers take UTF-8 alone
        raise InputError("has a lone surrogate, which is no character") from fault
    return text
