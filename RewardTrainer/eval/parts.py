"""Scores on their way: what is rewarded is on disk at once, so that an evaluation that was killed goes on.

While an evaluation runs, `<output_dir>/parts/` holds `run.json`, which says what decides the scores, and a JSONL file
for each process, one line a response (or a row left out). The same command goes on with what is there, whatever the
number of processes; another one (model, rows, template, length, precision) is refused with the difference, and so is
a second command while the first one runs. When the results are written the directory is removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distiller.manifest import Manifest, differences
from distiller.records import InputError
from distiller.store import LineFile
from RewardTrainer.eval.base import Benchmark


@dataclass(frozen=True)
class Scored:
    """A rewarded response."""

    score: float
    truncated: bool | None
    response_cut: bool | None


@dataclass
class Finished:
    """What is known of one benchmark."""

    scores: dict[tuple[tuple[str, str], int], Scored]
    """(row's key, response) -> its reward."""
    refused: dict[tuple[str, str], str]
    """Row's key -> why the model's chat template refuses it."""


class Parts:
    """The directory of an unfinished evaluation."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file: LineFile | None = None
        self._locks: list[LineFile] = []

    def begin(self, identity: dict, overwrite: bool) -> None:
        """Take up what is there, or begin anew.

        Args:
            identity: all that decides the scores, JSON
            overwrite: forget what is there

        Raises:
            InputError: what is there belongs to an evaluation whose scores would differ, or another command is at it
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock("lock")
        if overwrite:
            for path in [self.directory / "run.json", *self._files()]:
                path.unlink(missing_ok=True)
        manifest = Manifest.load(self.directory / "run.json")
        if manifest is None and any(self._lines()):
            raise InputError(
                f"{self.directory} holds scores without the run.json that says what they belong to: "
                "name another --output_dir, or use --overwrite to start anew"
            )
        changed = differences(manifest.identity, identity) if manifest else []
        if changed and any(self._lines()):
            raise InputError(
                f"{self.directory} holds an unfinished evaluation with other settings:\n  "
                + "\n  ".join(changed)
                + "\nGo on with those settings, name another --output_dir, or use --overwrite to start anew."
            )
        Manifest(identity).save(self.directory / "run.json")

    def open(self, shard: int) -> None:
        """Write to this process's file from now on. Raises InputError where another process does."""
        self._lock(f"lock-{shard}")
        self._file = LineFile(self.directory / f"scores-{shard}.jsonl")
        self._file.cut_torn_line()

    def _lock(self, name: str) -> None:
        """Hold a file that is never read: reading the scores and closing them would let go of a lock on them."""
        self._locks.append(LineFile(self.directory / name))
        self._locks[-1].lock()

    def close(self) -> None:
        for file in [*self._locks, *([self._file] if self._file else [])]:
            file.close()
        self._file, self._locks = None, []

    def add(self, benchmark: str, key: tuple[str, str], response: int, scored: Scored) -> None:
        line = {"benchmark": benchmark, "subset": key[0], "id": key[1], "response": response, "score": scored.score}
        self._file.append({**line, "truncated": scored.truncated, "response_cut": scored.response_cut})

    def refuse(self, benchmark: str, key: tuple[str, str], reason: str) -> None:
        self._file.append({"benchmark": benchmark, "subset": key[0], "id": key[1], "refused": reason})

    def finished(self, benchmark: str) -> Finished:
        """Everything that any process has written about a benchmark."""
        done = Finished({}, {})
        for line in self._lines():
            if line["benchmark"] != benchmark:
                continue
            key = line["subset"], line["id"]
            if "refused" in line:
                done.refused[key] = line["refused"]
            else:
                scored = Scored(line["score"], line["truncated"], line["response_cut"])
                done.scores[key, line["response"]] = scored
        return done

    def _lines(self) -> Iterator[dict]:
        for path in self._files():
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):  # torn: a response that is not done
                        continue
                    try:
                        yield json.loads(line)
                    except ValueError as fault:
                        raise InputError(
                            f"{path}, line {number}: damaged ({fault}); use --overwrite to start anew"
                        ) from fault

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("scores-*.jsonl"))

    def remove(self) -> None:
        for path in self._files():  # before what says whose they are: a kill in between leaves nothing to explain
            path.unlink()
        shutil.rmtree(self.directory, ignore_errors=True)


def rows_of_shard(benchmark: Benchmark, shard: int, shards: int) -> list[int]:
    """Numbers of the items that are this process's; each process gets long ones and short ones alike."""
    size = [sum(map(len, item.responses)) for item in benchmark.items]
    order: Sequence[int] = sorted(range(len(size)), key=lambda index: -size[index])
    return sorted(order[shard::shards])
