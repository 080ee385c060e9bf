"""Which pairs to train on and which to hold out: records read strictly, completed with a margin, split by prompt.

Two rules. A held-out prompt is never trained on, in none of its rows: pairs of one prompt share most of their text, so
a split by row would test on what was learned. And nothing is dropped in silence: rows that are left out are logged
with their number, and a row that cannot be used ends the command. How often the rows of a file are seen is decided
last, among what is trained on.
"""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distiller.records import BadRow, InputError, prompt_messages, read_rows, survey
from distiller.sources import FILE_SUFFIXES

logger = logging.getLogger(__name__)

NUMBERS = ("margin", "chosen_score", "rejected_score")
REMEDIES = {
    "prompt": "",
    "chosen": "",
    "rejected": "",
    "margin": "python score/cali_score_vllm.py",
    "chosen_score": "python score/score_orig_vllm.py",
    "rejected_score": "python score/score_orig_vllm.py",
    "teacher_response": "python refine/refine_response_vllm.py",
}
REPEATED = ("the row came before", "this content came before")  # how distiller.records says that a row is repeated


@dataclass(frozen=True)
class TrainFile:
    """What a source brings to the training.

    read: its rows, repetitions within it left out; distinct: those that are trained on (neither held out nor in an
    earlier source); rows: how many rows an epoch takes of them, by their weight.
    """

    source: str
    weight: float
    read: int
    distinct: int
    rows: int


@dataclass(frozen=True)
class Mixture:
    """train: the rows of an epoch, source by source; a row that is seen twice is twice the same object."""

    train: list[dict]
    held_out: list[dict]
    files: list[TrainFile]


def load_pairs(sources: str | Path | Sequence[str | Path], *arguments, **options) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows) of `load_mixture`."""
    mixture = load_mixture(sources, *arguments, **options)
    return mixture.train, mixture.held_out


def load_mixture(
    sources: str | Path | Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    required: Iterable[str] = (),
    eval_file: str | Path | None = None,
    eval_ratio: float = 0.0,
    seed: int = 0,
    limit: int | None = None,
    weights: Sequence[float] | None = None,
    skip_bad_rows: bool = False,
) -> Mixture:
    """Training and held-out rows of one or several files or hub datasets; no prompt is in both.

    required: fields besides prompt, chosen, rejected: `LOSSES[...].needs`, and `teacher_response`. A missing margin
        is the difference of the scores where both are there.
    eval_file: held-out rows, in the same columns. Training rows with the prompt of one of them are dropped.
    eval_ratio: share in [0, 1) of the rows to hold out instead. Prompts are drawn by a hash of seed and prompt: the
        same ones whatever the order of the file, and all rows of a prompt together.
    limit: only the first rows of the sources, before anything is held out.
    weights: how often the rows of each source are seen in an epoch (`repeat_rows`), once by default. What is held out
        does not depend on them.
    skip_bad_rows: leave rows out that cannot be used, in place of an error at the first.

    What is dropped is logged with its number. Raises InputError for a row that cannot be used and if no row is left.
    """
    if eval_file is not None and eval_ratio:
        raise InputError("--eval_file and --eval_ratio both say what to hold out: give one of them")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: must be at least 1")
    if not 0 <= eval_ratio < 1:
        raise InputError(f"--eval_ratio {eval_ratio:g}: must be at least 0 and less than 1")
    if isinstance(sources, str | Path):
        sources = [sources]
    weights = [1.0] * len(sources) if weights is None else weights
    parts = [_read(source, columns, tuple(required), limit, skip_bad_rows) for source in sources]
    source_of = {id(row): number for number, rows in enumerate(parts) for row in rows}
    rows = _once([row for part in parts for row in part])[:limit]
    if eval_file is not None:
        held_out = _read(eval_file, columns, tuple(required), None, skip_bad_rows)
        kept = without(rows, held_out)
        if len(kept) < len(rows):
            logger.warning("%d training rows dropped: held out in %s", len(rows) - len(kept), eval_file)
        if not kept:
            raise InputError(f"0 rows to train on: the prompts of all {len(rows)} are held out in {eval_file}")
    else:
        kept, held_out = split_by_prompt(rows, eval_ratio, seed) if eval_ratio else (rows, [])
    train, files = [], []
    for number, (source, weight, part) in enumerate(zip(sources, weights, parts, strict=True)):
        own = [row for row in kept if source_of[id(row)] == number]
        seen = repeat_rows(own, weight, seed)
        if own and not seen:
            raise InputError(f"--train_file_weights: {weight:g} of the {len(own)} rows of {source} is none: raise it")
        train += seen
        files.append(TrainFile(str(source), float(weight), len(part), len(own), len(seen)))
    return Mixture(train, held_out, files)


def parse_weights(text: str | None, sources: Sequence[str]) -> list[float]:
    """`--train_file_weights 2,0.5`: a finite number above 0 for each source; 1 for each where there is no text."""
    if text is None:
        return [1.0] * len(sources)
    parts = [part.strip() for part in str(text).split(",")]
    if len(parts) != len(sources):
        raise InputError(
            f"--train_file_weights {text}: {len(parts)} weight(s) for {len(sources)} file(s) of --train_file; give "
            "each file one, in their order"
        )
    weights = []
    for part, source in zip(parts, sources, strict=True):
        try:
            weight = float(part)
        except ValueError:
            raise InputError(f"--train_file_weights {text}: {part!r} (for {source}) is not a number") from None
        if not math.isfinite(weight) or weight <= 0:
            raise InputError(
                f"--train_file_weights {text}: {part} (for {source}) must be a finite number above 0; leave a file "
                "that is not wanted out of --train_file"
            )
        weights.append(weight)
    return weights


def repeat_rows(rows: list[dict], weight: float, seed: int) -> list[dict]:
    """The rows `weight` times: all of them floor(weight) times, and those of a share of the prompts once more.

    The share is the fraction of weight, of the prompts and not of the rows; which ones is a hash of seed and prompt,
    so that those of a smaller fraction are among those of a greater one.
    """
    whole, fraction = divmod(weight, 1)
    keys = [_prompt_key(row) for row in rows]
    prompts = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:weight:{key}".encode()).digest())
    more = set(prompts[: round(fraction * len(prompts))])
    return rows * int(whole) + [row for row, key in zip(rows, keys, strict=True) if key in more]


def _once(rows: list[dict]) -> list[dict]:
    """The rows without those of a later source that are in an earlier one, whole and alike."""
    unique: dict[str, dict] = {}
    for row in rows:
        unique.setdefault(json.dumps(row, sort_keys=True), row)
    if len(unique) < len(rows):
        logger.warning("%d rows dropped that are in more than one of the files", len(rows) - len(unique))
    return list(unique.values())


def without(rows: list[dict], held_out: list[dict]) -> list[dict]:
    """The rows that share no prompt with a held-out row. Ids say nothing: files number their rows from 0 each."""
    prompts = {_prompt_key(row) for row in held_out}
    return [row for row in rows if _prompt_key(row) not in prompts]


def split_by_prompt(rows: list[dict], ratio: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(kept, held out): at least one prompt on either side, about ratio * rows rows held out."""
    keys = [_prompt_key(row) for row in rows]
    rows_of = Counter(keys)
    if len(rows_of) < 2:
        raise InputError(
            f"--eval_ratio {ratio:g}: all {len(rows)} rows have the same prompt, none can be held out; "
            "use --eval_ratio 0 or --eval_file"
        )
    held_out, wanted = set(), max(1, round(ratio * len(rows)))
    for key in sorted(rows_of, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())[:-1]:
        if wanted <= 0:
            break
        held_out.add(key)
        wanted -= rows_of[key]
    kept = [row for row, key in zip(rows, keys, strict=True) if key not in held_out]
    return kept, [row for row, key in zip(rows, keys, strict=True) if key in held_out]


def _prompt_key(row: dict) -> str:
    """Equal for prompts that differ in outer white space, or in being a string or one user message, only."""
    return json.dumps([[m["role"], m["content"].strip()] for m in prompt_messages(row["prompt"])])


def check_file(source: str | Path) -> None:
    """Raises InputError for a source that is plainly a file, by its ending, and is not there."""
    path = Path(source)
    if path.suffix not in FILE_SUFFIXES or path.exists():
        return
    near = Path("..") / path
    if near.is_file():
        remedy = f"did you mean {near}?"
    else:
        remedy = (
            f"scored pairs are written by {REMEDIES['teacher_response']} and then {REMEDIES['margin']}, from the "
            "repository root"
        )
    raise InputError(f"{source} does not exist (current directory: {Path.cwd()}); {remedy}")


def _read(
    source: str | Path,
    columns: Mapping[str, str] | None,
    required: tuple[str, ...],
    limit: int | None,
    skip_bad_rows: bool,
) -> list[dict]:
    check_file(source)
    if Path(source).is_file() and survey(source)[0] == 0:
        raise InputError(
            f"{source}: 0 rows: every row was filtered or failed, or the stage that writes it has not run; "
            f"see {source}.failed.jsonl and {source}.filtered.jsonl"
        )
    wanted = {name: REMEDIES.get(name, "") for name in ("prompt", "chosen", "rejected", *required) if name != "margin"}
    rows, repeated, skipped = [], 0, Counter()

    def refuse(row: str, reason: str) -> None:
        if not skip_bad_rows:
            raise InputError(f"{row}, or leave out all rows that cannot be used with --skip_bad_rows true")
        if not skipped[reason]:
            logger.warning("skipped: %s", row)
        skipped[reason] += 1

    for row in read_rows(source, columns, limit, required=wanted, optional=NUMBERS):
        if isinstance(row, BadRow):
            if row.reason.startswith(REPEATED):
                repeated += 1
            else:
                refuse(str(row), row.reason)
            continue
        if row.get("margin") is None and row.get("chosen_score") is not None and row.get("rejected_score") is not None:
            row = {**row, "margin": row["chosen_score"] - row["rejected_score"]}
        if "margin" in required and row.get("margin") is None:
            place = f"{source}, row {len(rows) + repeated + skipped.total() + 1} (id {row['id']})"
            said = "field `margin` is missing, and there are no `chosen_score` and `rejected_score` to take it from"
            refuse(f"{place}: {said}; to get it, run: {REMEDIES['margin']}", said)
            continue
        rows.append(row)
    if repeated:
        logger.warning("%s: %d repeated rows dropped", source, repeated)
    for reason, count in skipped.most_common():
        logger.warning("%s: %d rows skipped: %s", source, count, reason)
    if not rows:
        raise InputError(f"{source}: 0 rows are left of {repeated + skipped.total()}")
    return rows
