"""Scores and verdicts as they lie in files: what an evaluation or a judge wrote, or what somebody published.

    scores.jsonl     benchmark, id, subset, response, score
                     `response`: index of the response in its row, from 0; `score`: a number, null where there is none
    verdicts.jsonl   benchmark, id, subset, order, verdict, raw
                     `order`: indices of the responses as the judge saw them, `[1, 0]` (or "AB" as in the row, "BA"
                     swapped); `verdict`: what the judge said of them in that order: "A" the first one shown, "B" the
                     second, ... (or "A>B", "B>A"), "tie" (or "A=B"), null where its reply could not be read; `raw`:
                     its reply, not read here

A judge that rates one response at a time has `raw` in its scores, and in its verdicts `ratings`, those of the
responses as shown, from which its verdicts were made.

Lines of other benchmarks are passed over. A file is read strictly: a line that cannot be used, or that contradicts one
before it, ends with its number and its field, because a metric over a damaged file would be a wrong number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from distiller.records import InputError
from RewardTrainer.eval.base import TIE, Item, Scores, Verdict
from RewardTrainer.eval.benchmarks.files import file_rows

ORDERS = {"AB": [0, 1], "BA": [1, 0]}
WORDS = {"A>B": "A", "B>A": "B", "A=B": TIE, TIE: TIE}


@dataclass(frozen=True)
class Stored:
    """What a file says about the rows of a benchmark."""

    items: list[Item]
    """Rows with something said about them, in the benchmark's order."""
    said: list
    """Scores (`Scores`) or verdicts (`list[Verdict]`) of each."""
    missing: list[str]
    """One message for each row with nothing, or with not all of its responses, in the file."""
    unknown: int
    """Lines about rows that the benchmark does not have."""
    rated: bool = False
    """`said` holds the ratings of a judge that sees one response at a time, of either file."""


def read_scores(path: Path, benchmark: str, items: Sequence[Item]) -> Stored:
    """The scores of a benchmark's rows; a row counts only with a line for each of its responses.

    Raises:
        InputError: the file or a line of it cannot be used, or nothing in it is about this benchmark
    """
    by_key = {item.key: item for item in items}
    scores: dict[tuple[str, str], dict[int, float | None]] = {}
    unknown, rated = 0, False
    for where, row, key in _lines(path, benchmark):
        rated = rated or "raw" in row
        index = row.get("response")
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise InputError(f"{where}: field `response` must be an index from 0, not {index!r}")
        if "score" not in row:
            raise InputError(f"{where}: field `score` is missing; null is how a file says that there is none")
        score = row["score"]
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or _infinite(score)):
            raise InputError(f"{where}: field `score` must be a number or null, not {score!r}")
        if key not in by_key:
            unknown += 1
            continue
        if index >= len(by_key[key].responses):
            raise InputError(f"{where}: response {index} of a row that has {len(by_key[key].responses)}")
        if index in scores.setdefault(key, {}):
            raise InputError(f"{where}: id {key[1]!r}, response {index} came before in the file")
        scores[key][index] = None if score is None else float(score)
    found: list[tuple[Item, Scores]] = []
    missing = []
    for item in items:
        row = scores.get(item.key, {})
        if len(row) == len(item.responses):
            found.append((item, [row[index] for index in range(len(row))]))
        else:
            missing.append(f"{item.where}: {len(row)} of its {len(item.responses)} responses have a line in {path}")
    return _stored(path, benchmark, found, missing, unknown, rated)


def read_verdicts(path: Path, benchmark: str, items: Sequence[Item]) -> Stored:
    """The verdicts on a benchmark's rows, or the ratings they were made from. Raises InputError as `read_scores`."""
    by_key = {item.key: item for item in items}
    verdicts: dict[tuple[str, str], list[Verdict]] = {}
    ratings: dict[tuple[str, str], dict[int, float | None]] = {}
    unknown = 0
    for where, row, key in _lines(path, benchmark):
        verdict = _verdict(row, where)
        if key not in by_key:
            unknown += 1
            continue
        if max(verdict.order) >= len(by_key[key].responses):
            raise InputError(f"{where}: field `order` goes over the row's {len(by_key[key].responses)} responses")
        said = verdicts.setdefault(key, [])
        if any(verdict.order == other.order for other in said):
            raise InputError(f"{where}: id {key[1]!r}, order {list(verdict.order)} came before in the file")
        said.append(verdict)
        if "ratings" in row:
            rated = ratings.setdefault(key, {})
            for index, rating in zip(verdict.order, _ratings(row["ratings"], verdict, where), strict=True):
                if rated.setdefault(index, rating) != rating:
                    raise InputError(f"{where}: field `ratings` rates response {index} unlike a line before it")
    if ratings:
        whole = {i.key: i for i in items if len(ratings.get(i.key, {})) == len(i.responses)}
        missing = [f"{item.where}: not all of its responses are rated in {path}" for item in items]
        missing = [message for item, message in zip(items, missing, strict=True) if item.key not in whole]
        found = [(i, [ratings[key][index] for index in range(len(i.responses))]) for key, i in whole.items()]
        return _stored(path, benchmark, found, missing, unknown, rated=True)
    found = [(item, verdicts[item.key]) for item in items if item.key in verdicts]
    missing = [f"{item.where}: no line in {path}" for item in items if item.key not in verdicts]
    return _stored(path, benchmark, found, missing, unknown)


def _ratings(ratings: object, verdict: Verdict, where: str) -> list[float | None]:
    """Raises InputError where they are not one number or null for each response shown, or say another verdict."""
    numbers = isinstance(ratings, list) and len(ratings) == len(verdict.order) == 2
    for rating in ratings if numbers else []:
        if rating is not None and (isinstance(rating, bool) or not isinstance(rating, int | float)):
            numbers = False
    if not numbers:
        raise InputError(f"{where}: field `ratings` must hold a number or null for each response, not {ratings!r}")
    winner = None
    if None not in ratings:
        winner = TIE if ratings[0] == ratings[1] else verdict.order[ratings[0] < ratings[1]]
    if winner != verdict.winner:
        raise InputError(f"{where}: fields `ratings` and `verdict` contradict each other")
    return ratings


def _verdict(row: dict, where: str) -> Verdict:
    order = row.get("order")
    order = ORDERS.get(order, order) if isinstance(order, str) else order
    if (
        not isinstance(order, list)
        or len(order) < 2
        or not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in order)
        or len(set(order)) < len(order)
    ):
        raise InputError(f"{where}: field `order` must be the indices shown, [0, 1], or AB or BA, not {order!r}")
    if "verdict" not in row:
        raise InputError(f"{where}: field `verdict` is missing; null is how a file says that it could not be read")
    said = row["verdict"]
    if said is None:
        return Verdict(tuple(order), None)
    word = WORDS.get(said, said) if isinstance(said, str) else said
    if word == TIE:
        return Verdict(tuple(order), TIE)
    letters = ascii_uppercase[: len(order)]
    if not isinstance(word, str) or len(word) != 1 or word not in letters:
        raise InputError(f"{where}: field `verdict` must be one of {', '.join(letters)}, tie or null, not {said!r}")
    return Verdict(tuple(order), order[letters.index(word)])


def _lines(path: Path, benchmark: str) -> Iterator[tuple[str, dict, tuple[str, str]]]:
    """(place, row, (subset, id)) of the lines about this benchmark."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    rows = list(file_rows(path))
    for where, row in rows:
        if isinstance(row, InputError):
            raise InputError(f"{where}: {row}")
        if not isinstance(row, dict):
            raise InputError(f"{where}: a JSON object expected, not {type(row).__name__}")
        if not isinstance(row.get("benchmark", ""), str):
            raise InputError(f"{where}: field `benchmark` must be a string, not {row['benchmark']!r}")
    mine = {benchmark}
    if not any(row.get("benchmark", benchmark) == benchmark for _, row in rows):
        # A preference file goes by its path, which differs with the directory the command was run from.
        file_name = Path(benchmark).name
        mine = {row["benchmark"] for _, row in rows if Path(row["benchmark"]).name == file_name}
    for where, row in rows:
        if row.get("benchmark", benchmark) not in mine:
            continue
        key = []
        for name in ("subset", "id"):
            value = row.get(name)
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise InputError(f"{where}: field `{name}` must be a string, not {value!r}")
            key.append(str(value))
        yield where, row, (key[0], key[1])


def _stored(
    path: Path, benchmark: str, found: list[tuple], missing: list[str], unknown: int, rated: bool = False
) -> Stored:
    if not found:
        raise InputError(
            f"{path}: no row of {benchmark} is whole in it ({len(missing)} rows without all of their lines, {unknown} "
            "lines about rows the benchmark does not have)"
        )
    return Stored([item for item, _ in found], [said for _, said in found], missing, unknown, rated)


def _infinite(score: int | float) -> bool:
    try:
        return not math.isfinite(score)
    except OverflowError:  # JSON integers have no limit
        return True
