"""Runs a stage: many rows in flight, each finished one on disk at once, resumable after a kill at any moment.

A stage is a plain generator for one row. It yields an `Ask`, is given the `Completion` (or the `AskError` that befell
this ask), and returns what became of the row:

    def work(row):
        reply = yield from ask_until(messages, parse, seed=seed, row_id=row["id"], max_tries=3)
        if isinstance(reply, Failed):
            return reply
        return Done({**row, "refined_response": reply})

It knows neither files nor batches nor other rows. The runner keeps `engine.capacity` such generators going, so that a
row that needs another try does not hold up the rest, and is the only one to write files (see `store`).

The seed of an ask depends on the run's seed, the row's id, which ask of the row it is and which try: never on what
else is in flight. So a resumed run draws what an undisturbed one would have drawn.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from distiller.engine import Ask, AskError, Completion, EngineDead, TeacherEngine
from distiller.manifest import Manifest
from distiller.records import BadRow, InputError
from distiller.store import LineFile, Store
from distiller.usage import Budget, Usage
from distiller.whole_files import WholeFiles

Parsed = TypeVar("Parsed")
BAD_ROWS_SHOWN = 3
CAPPED = 3
"""Exit code of a run that ended at its cap on tokens with rows left."""


@dataclass(frozen=True)
class Done:
    """The row is finished; goes to the output."""

    row: dict


@dataclass(frozen=True)
class Filtered:
    """The row is sound but useless; goes to the filtered file with `reason` added. No failure."""

    row: dict
    reason: str


@dataclass(frozen=True)
class Failed:
    """Nothing usable came of the row; goes to the failed file with `reason` and `raw` added."""

    reason: str
    raw: str | None = None
    """The teacher's last reply, or its thinking where it came to no answer; None where there was none."""


class ParseError(ValueError):
    """A reply cannot be parsed; the message says why. Raised by a stage's parser, asked again by `ask_until`."""


def text_of(reply: Completion) -> str:
    """The reply's text. Raises ParseError for one that max_tokens cut before there was an answer."""
    if reply.finish_reason == "length" and not reply.text:
        raise ParseError("max_tokens cut the reply, maybe inside its thinking: raise --max_tokens")
    return reply.text


Outcome = Done | Filtered | Failed
RowWork = Generator[Ask, Completion | AskError, Outcome]
Work = Callable[[dict], RowWork]


def ask_seed(seed: int, row_id: str, number: int = 0, attempt: int = 0) -> int:
    """The seed, in [0, 2**31), of the row's ask `number`, try `attempt` (both from 0), in a run with `seed`."""
    digest = hashlib.blake2b(digest_size=4)
    digest.update(f"{seed} {number} {attempt} {row_id}".encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "big") >> 1


def ask_until(
    messages: list[dict],
    parse: Callable[[Completion], Parsed],
    *,
    seed: int,
    row_id: str,
    number: int = 0,
    max_tries: int = 3,
    follow_up: Callable[[Completion], Generator[Ask, Completion | AskError, Parsed | Failed]] | None = None,
) -> Generator[Ask, Completion | AskError, Parsed | Failed]:
    """Ask, and ask again with another seed while `parse` raises ParseError; use with `yield from`.

    `number` tells the asks of one row apart (0, 1, ...). Returns what `parse` returned, or Failed: after `max_tries`
    replies that could not be parsed, or at once when the engine refuses the ask. A reply cut by max_tokens reaches
    `parse` like any other (`finish_reason == "length"`); what that means is the stage's to say. `follow_up` asks more
    about a reply that could be parsed and returns in place of `parse`; its ParseError counts like that of `parse`.
    """
    for attempt in range(max_tries):
        reply = yield Ask(messages, ask_seed(seed, row_id, number, attempt))
        if isinstance(reply, AskError):
            return Failed(str(reply), reply.raw)
        try:
            _check_reply(reply)
            parsed = parse(reply)
            return (yield from follow_up(reply)) if follow_up else parsed
        except ParseError as fault:
            failed = Failed(str(fault), reply.text or reply.reasoning)
    return failed


def _check_reply(reply: Completion) -> None:
    """A reply must have an answer, and be what a row may hold. Raises ParseError."""
    if reply.reasoning and reply.finish_reason == "stop" and not reply.text.strip():
        raise ParseError(
            "the reply is all thinking: switch that off (--enable_thinking false, or the server's own way)"
        )
    if "\0" in reply.text:
        raise ParseError("the reply has a NUL character")
    try:
        reply.text.encode("utf-8")
    except UnicodeEncodeError as fault:
        raise ParseError("the reply has a lone surrogate, which is no character") from fault


@dataclass(frozen=True)
class Summary:
    """What became of the rows, those of earlier runs of the same command included."""

    counts: Counter
    """Of "done", "filtered", "failed"."""
    reasons: dict[str, Counter]
    """{"filtered": Counter of reasons, "failed": ...}; numbers in a reason are written N."""
    output: str
    seconds: float
    max_failure_rate: float
    usage: Usage
    left: int = 0
    """Rows not begun because the cap on tokens was reached."""
    max_tokens_total: int | None = None
    unusable: int = 0
    """Of the failed rows, those that are input lines of no use."""
    waiting: bool = False
    """The output is still that of an earlier run (see `Store`)."""

    @property
    def failure_rate(self) -> float:
        return self.counts["failed"] / max(1, self.counts.total() + self.left)

    @property
    def exit_code(self) -> int:
        if self.failure_rate > self.max_failure_rate or (self.waiting and not self.left):
            return 1
        return CAPPED if self.left else 0

    def __str__(self) -> str:
        new = ".new" if self.waiting else ""
        names = {
            "done": self.output,
            "filtered": f"{self.output}{new}.filtered.jsonl",
            "failed": f"{self.output}{new}.failed.jsonl",
        }
        lines = [f"{self.counts[kind]} rows {kind}: {path}" for kind, path in names.items() if self.counts[kind]]
        for kind, reasons in self.reasons.items():
            lines += [f"  {kind}: {count} x {reason}" for reason, count in reasons.most_common(10)]
        if self.waiting:
            lines.append(f"warning: not one new row can be used: {self.output} is the earlier one, as it was")
        elif not self.counts["done"] and self.counts.total():
            lines.append(f"warning: no row is left: {self.output} is empty, the next command has nothing to read")
        if self.failure_rate > self.max_failure_rate:
            said = f"{self.failure_rate:.1%} of the rows failed, over --max_failure_rate: "
            if self.unusable < self.counts["failed"]:
                again = "same command" if self.waiting else "command with --retry_failed, and without --overwrite,"
                said += (
                    f"`reason` and `raw` in {names['failed']} say why (replies of another form than asked for want "
                    f"another prompt, or a stronger teacher); the {again} runs them again. "
                )
            if self.unusable:
                said += (
                    f"{self.unusable} are lines that cannot be used: mend them by `remedy`, and put them alone into "
                    "another file, with an --output of its own"
                )
            lines.append(said.strip())
        lines.append(str(self.usage))
        if self.left:
            lines.append(
                f"stopped at --max_tokens_total {self.max_tokens_total} with {self.left} rows left; the same command "
                f"with a higher one{' begins anew' if self.waiting else ', and without --overwrite, goes on'}"
            )
        return "\n".join([*lines, f"finished in {_duration(self.seconds)}"])


def run_stage(
    rows: Iterable[dict | BadRow],
    work: Work,
    make_engine: Callable[[], TeacherEngine],
    output: str | Path,
    manifest: Manifest,
    *,
    total: int,
    max_failure_rate: float = 0.1,
    overwrite: bool = False,
    retry_failed: bool = False,
    max_tokens_total: int | None = None,
    progress_seconds: float = 5.0,
    open_done: Callable[[Path], LineFile] = LineFile,
    on_begun: Callable[[], object] = lambda: None,
) -> Summary:
    """Run `work` on every row that has no line yet in the output, the filtered or the failed file.

    `rows` is iterated lazily (twice with `retry_failed`), each with a unique "id"; `total` is their number, for the
    progress line. `make_engine` is called once a row needs it: nothing is loaded when the run is refused or all is
    done; what `retry_failed` runs again stays on disk until the engine is up, and what `overwrite` replaces until
    there is a row to put in its place. `on_begun` is called where either was done, before this returns or raises.
    `max_tokens_total` caps the tokens of this output, those of earlier runs included (see `Budget`). `open_done` is
    `Store`'s. An InputError or ParseError that leaves `work` fails its row; any other exception is a fault of the
    program and ends the run, as EngineDead does; what is finished stays on disk. Raises InputError for a run that is
    refused.
    """
    started = time.monotonic()
    engine: TeacherEngine | None = None
    store: Store | None = None

    def start() -> None:
        nonlocal engine
        engine = engine or make_engine()

    try:
        store = Store(output, manifest, overwrite=overwrite, open_done=open_done)
        budget = Budget(manifest.usage, max_tokens_total)
        if retry_failed and store.counts["failed"] > store.unusable and budget.allows(0):
            start()
            store.record_engine(engine.facts())
            store.forget_failed(row.id if isinstance(row, BadRow) else row["id"] for row in rows)
            on_begun()
        pending = _pending(rows, store)
        if finished := store.counts.total():
            # More than all, where --limit is a smaller one now.
            print(f"{min(finished, total)} of {total} rows are finished already; going on", file=sys.stderr)
        row = next(pending, None)
        if row is not None and budget.allows(0):
            start()
            store.record_engine(engine.facts())
            with Progress(total, store, progress_seconds, engine) as progress:
                row = _drive(row, pending, work, engine, store, budget, progress)
        left = 0 if row is None else 1 + sum(1 for _ in pending)
        if retry_failed and engine is None:  # the cap is reached: they are left too
            left += store.counts["failed"]
        seconds = time.monotonic() - started
        facts = (store.counts, store.reasons, str(output), seconds, max_failure_rate, manifest.usage)
        return Summary(*facts, left, max_tokens_total, store.unusable, bool(store.waiting))
    finally:
        if engine is not None:
            engine.close()
        if store is not None:
            if overwrite and store.begun:
                on_begun()
            store.close()


def _pending(rows: Iterable[dict | BadRow], store: Store) -> Iterator[dict]:
    """The good rows still to do; bad ones are put in the failed file on the way."""
    shown = 0
    for row in rows:
        if (row.id if isinstance(row, BadRow) else row["id"]) in store:
            continue
        if not isinstance(row, BadRow):
            yield row
            continue
        if shown < BAD_ROWS_SHOWN:
            print(f"bad row: {row}", file=sys.stderr)
            shown += 1
        store.write("failed", row.as_failed())


@dataclass
class _Flight:
    """A row in flight."""

    row: dict
    work: RowWork
    tokens: int = 0
    """Used by it in this run."""


def _drive(
    row: dict | None,
    pending: Iterator[dict],
    work: Work,
    engine: TeacherEngine,
    store: Store,
    budget: Budget,
    progress: Progress,
) -> dict | None:
    """Keep `engine.capacity` rows in flight, `row` and those pending, until none is left or the budget is used up;
    returns the first row that was not begun. Each row has one ask at the engine at a time."""
    flying: dict[int, _Flight] = {}
    key = 0
    while True:
        while row is not None and len(flying) < engine.capacity and budget.allows(len(flying)):
            flying[key] = _Flight(row, work(row))
            _advance(key, None, flying, engine, store, budget)
            key, row = key + 1, next(pending, None)
        if not flying:
            return row
        progress.under_way = len(flying)
        replies = engine.collect()
        if not replies:
            raise EngineDead(f"the engine lost {len(flying)} asks that were in flight")
        dead = None
        for finished, reply in replies:
            flying[finished].tokens += store.spend(reply)
            try:
                _advance(finished, reply, flying, engine, store, budget)
            except EngineDead as fault:  # the other answers are paid for: they are written first
                dead = dead or fault
        if (
            budget.limit is not None
            and not store.manifest.usage.total
            and any(isinstance(reply, Completion) for _, reply in replies)
        ):
            dead = EngineDead(
                "it does not say how many tokens it used, so that no cap on them can be kept: leave out "
                "--max_tokens_total"
            )
        if dead:
            raise dead


def _advance(
    key: int,
    reply: Completion | AskError | None,
    flying: dict[int, _Flight],
    engine: TeacherEngine,
    store: Store,
    budget: Budget,
) -> None:
    """Give a row its reply (None to start it) and submit what it asks next, or write down what became of it."""
    row = flying[key].row
    try:
        ask = flying[key].work.send(reply)
        if store.manifest.retries:
            ask = replace(ask, seed=ask_seed(ask.seed, row["id"], attempt=store.manifest.retries))
        engine.submit(key, ask)
        return
    except StopIteration as stop:
        outcome = stop.value
    except (InputError, ParseError) as fault:
        outcome = Failed(str(fault))
    budget.finished(flying.pop(key).tokens)
    match outcome:
        case Done(done):
            if done["id"] != row["id"]:
                raise ValueError(f"a stage must keep the row's id: {row['id']!r} became {done['id']!r}")
            store.write("done", done)
        case Filtered(useless, reason):
            store.write("filtered", {**useless, "id": row["id"], "reason": reason})
        case Failed(reason, raw):
            store.write("failed", {**row, "reason": reason, "raw": raw})
        case _:
            raise TypeError(f"a stage returns Done, Filtered or Failed, not {outcome!r}")


class Progress:
    """A line on stderr every `seconds`, from a thread of its own, since an engine can be at one step for long:

        12/300 rows, 0 failed, 1 filtered, 64 under way, 5,120 tokens written, 21,004 read, 117 written/s, 12m08s left

    Tokens count from here on, those of replies under way included where the engine can tell (`TeacherEngine.tokens`).
    The time left is that of the rows' tokens: as many a row as the finished ones took, less what has been written, of
    a row under way at most half (the long ones are those that are left).
    """

    def __init__(self, total: int, store: Store | WholeFiles, seconds: float, engine: TeacherEngine | None = None):
        self.total, self.store, self.seconds, self.engine = total, store, seconds, engine
        self.under_way = 0
        self.before = store.counts.total()
        self.started = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self.started = time.monotonic()
        if self.engine is not None:
            usage = self.store.manifest.usage
            self._earlier = usage.completion_tokens, usage.prompt_tokens
            self._earlier_of_engine = self._of_engine()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _tell(self) -> None:
        while not self._ended.wait(self.seconds):
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        seconds = time.monotonic() - self.started
        counts = self.store.counts
        rows, finished = counts.total(), counts.total() - self.before
        said = [f"{rows}/{self.total} rows", f"{counts['failed']} failed", f"{counts['filtered']} filtered"]
        left = (self.total - rows) / finished * seconds if finished else None
        if self.engine is not None:
            usage = self.store.manifest.usage
            answered = usage.completion_tokens - self._earlier[0], usage.prompt_tokens - self._earlier[1]
            now = self._of_engine()
            written, read = answered
            if now is not None and self._earlier_of_engine is not None:
                written, read = (count - before for count, before in zip(now, self._earlier_of_engine, strict=True))
            said += [f"{self.under_way} under way", f"{written:,} tokens written", f"{read:,} read"]
            said.append(f"{_rate(written / seconds)} written/s")
            if finished and answered[0]:
                a_row = answered[0] / finished
                ahead = (self.total - rows) * a_row - min(written - answered[0], self.under_way * a_row / 2)
                left = ahead * seconds / written
        else:
            said.append(f"{_rate(finished / seconds)} rows/s")
        said.append("time left unknown until a row is finished" if left is None else f"{_duration(left)} left")
        return ", ".join(said)

    def _of_engine(self) -> tuple[int, int] | None:
        tokens = getattr(self.engine, "tokens", None)
        return None if tokens is None else tokens()


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m{rest:02d}s" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
