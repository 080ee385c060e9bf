"""The three files of a stage, `<output>`, `<output>.filtered.jsonl` and `<output>.failed.jsonl`, and the manifest
beside them.

The promise kept here: whatever moment the process is killed at, the same command goes on and every id ends in exactly
one of the three files, once and whole. Three facts carry it. A row is one line, appended by one write, so that only
the last line of a file can be torn; on opening, a torn line is cut off, and its row is simply not done. What is done
is read from the files themselves, there is no second book that could disagree. And one process at a time: a lock on
the output refuses the second.

What `overwrite` replaces stays until there is a finished row to put in its place: a teacher of which nothing can be
used must not cost the rows of an earlier one. Rows that fail or are filtered until then wait in
`<output>.new.failed.jsonl` and `<output>.new.filtered.jsonl`.

A kill loses nothing; a power cut may lose the last rows the operating system had not yet put on disk (there is no
fsync), and those run again. The tokens used are written into the manifest five times a second: a kill loses the count
of the last moment and of the asks then in flight, nothing else does.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from distiller.engine import AskError, Completion
from distiller.manifest import Manifest, differences
from distiller.records import InputError, dump_line, id_key

BLOCK = 1 << 16
KINDS = ("done", "filtered", "failed")
MOST_REASONS = 200
"""Reasons counted apart; a message that differs in every row must not fill the memory."""
CONTENT = re.compile(r"^(?:(?:inputs|prompts)\.(\w+)|(input)|(model|adapter)_files?): .*")
"""A difference that is one of content hashes, which say nothing to a reader."""
INPUT_LINE = {"file", "line", "reason", "remedy", "raw"}
"""What a failed row says that is an input line of no use (`BadRow.as_failed`)."""
USAGE_SECONDS = 0.2
"""Time between two writings of the tokens used."""


def count_reason(reasons: Counter[str], reason: object) -> None:
    """Add a row's reason, its numbers written N: "prompt of N tokens" is one reason."""
    reason = re.sub(r"\d+", "N", str(reason))[:160]
    reasons[reason if reason in reasons or len(reasons) < MOST_REASONS else "other reasons"] += 1


class LineFile:
    """An append-only JSONL file, held open by one descriptor (a POSIX lock is lost when any other one to the file is
    closed)."""

    def __init__(self, path: Path):
        self.path = path
        self.place = Path(os.path.realpath(path))  # of a link, which stays one
        self.created = not self.place.exists()
        self.descriptor = os.open(self.place, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.locked = False

    def lock(self) -> None:
        """Held until this process ends or closes the file; a forked child does not inherit it. Raises InputError."""
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.place.exists() or not os.path.samestat(os.fstat(self.descriptor), self.place.stat()):
                raise BlockingIOError("the one who held it took the file away meanwhile")
            self.locked = True
        except (BlockingIOError, PermissionError) as fault:
            raise InputError(
                f"another command is writing {self.path} at this moment; let it end, or stop it"
            ) from fault
        except OSError as fault:
            if self.created:
                self.unlink()
            raise InputError(
                f"{self.path} cannot be locked ({fault.strerror}), as on some network file systems, and two commands "
                "might write it at once: give an --output on another disk"
            ) from fault

    def cut_torn_line(self) -> None:
        """Drop what follows the last newline: the beginning of a row whose write was interrupted."""
        end = os.fstat(self.descriptor).st_size
        while end:
            start = max(0, end - BLOCK)
            newline = os.pread(self.descriptor, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        os.ftruncate(self.descriptor, end)

    def __iter__(self) -> Iterator[dict]:
        os.lseek(self.descriptor, 0, os.SEEK_SET)  # appending does not care where the offset is
        with open(self.descriptor, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    row["id"].encode("utf-8", "surrogatepass")
                except (ValueError, KeyError, TypeError, AttributeError) as fault:
                    raise InputError(
                        f"{self.path}, line {number}: not a row a stage wrote; take the line out (its row runs "
                        "again), or use --overwrite to start anew"
                    ) from fault
                yield row

    def append(self, row: Mapping) -> None:
        data = dump_line(row)
        while data:  # once, unless the disk fills up or a signal comes
            data = data[os.write(self.descriptor, data) :]

    def replace(self, rows: Iterable[dict]) -> None:
        """Put a file of other rows in its place, all or none. The old one is not touched: it may have another name, a
        hard link, too."""
        part = self.place.with_name(self.place.name + ".new")  # not .part: that of `whole_files` may be open elsewhere
        fresh = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if self.locked:  # before anybody can open it
            fcntl.lockf(fresh, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with open(fresh, "wb", closefd=False) as file:
            file.writelines(dump_line(row) for row in rows)
        os.replace(part, self.place)
        self.close()
        self.descriptor = fresh

    @property
    def empty(self) -> bool:
        return os.fstat(self.descriptor).st_size == 0

    def clear(self) -> None:
        self.replace(())

    def unlink(self) -> None:
        self.place.unlink()

    def close(self) -> None:
        os.close(self.descriptor)


def check_same_command(output: Path, old: Manifest | None, new: Manifest) -> None:
    """Raises InputError unless the files of `output` come from a command whose result would be the same."""
    if old is None:
        raise InputError(
            f"{output} is there, but not its manifest {output}.manifest.json; use --overwrite to start anew"
        )
    changed = differences(old.identity, new.identity)
    if changed:
        of_content = [CONTENT.sub(r"the content of --\1\2\3 changed", line) for line in changed]
        remedy = "Go on with those settings, name another output, or use --overwrite to start anew."
        if any(line.startswith("input") for line in changed):
            remedy += (
                "\nRows that are new or mended: put them alone into another file, with an output of its own; training "
                "takes several files (--train_file a.jsonl,b.jsonl)."
            )
        raise InputError(
            f"{output} was begun with other settings, and rows of both would mix in it:\n  "
            + "\n  ".join(of_content)
            + f"\n{remedy}"
        )


class Store:
    """Opens the three files for one run (and for no other at the same time) and knows what is done. Holds 8 bytes of
    hash an id."""

    def __init__(
        self,
        output: str | Path,
        manifest: Manifest,
        *,
        overwrite: bool = False,
        open_done: Callable[[Path], LineFile] = LineFile,
    ):
        """`open_done` opens what the finished rows go to: a LineFile, or what else has its methods. Raises InputError
        when the files belong to a run whose result would differ, or are in use."""
        self.manifest = manifest
        self.waiting: dict[str, LineFile] = {}
        """Where the failed and filtered rows of this run are, while those of an earlier one are in `files`."""
        self.manifest_path = Path(f"{output}.manifest.json")
        self.usage_saved = time.monotonic()
        paths = (Path(output), Path(f"{output}.filtered.jsonl"), Path(f"{output}.failed.jsonl"))
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        self.files: dict[str, LineFile] = {}
        self.locked = False
        try:
            for kind, path in zip(KINDS, paths, strict=True):
                self.files[kind] = open_done(path) if kind == "done" else LineFile(path)
                if kind == "done":
                    self.files[kind].lock()
                    self.locked = True
            self._take_over(overwrite)
        except BaseException:  # a signal included
            self._close_files()
            raise

    def _take_over(self, overwrite: bool) -> None:
        old = None if overwrite else Manifest.load(self.manifest_path)
        # Before anything is cut off: a file of the user's own may end without a newline.
        # And with no row left too: a retry may have been cut off after it forgot all rows.
        if not overwrite and (self.begun or (old is not None and old.retries)):
            self._check(old)
        if overwrite and not self.files["done"].empty:
            for kind in ("filtered", "failed"):
                self.waiting[kind] = LineFile(Path(f"{self.files['done'].path}.new.{kind}.jsonl"))
                self.waiting[kind].clear()
        else:
            for file in self.files.values():
                file.clear() if overwrite else file.cut_torn_line()
        if old is not None:  # tokens may have been used before any row was finished
            self.manifest.usage.go_on_from(old.usage.as_dict())
        self._save_manifest()
        self.finished: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.unusable = 0  # of the failed rows, those that are input lines of no use: no retry can help them
        self.reasons: dict[str, Counter[str]] = {"filtered": Counter(), "failed": Counter()}
        for kind, file in () if self.waiting else self.files.items():
            for row in file:
                self._count(kind, row)

    def _save_manifest(self) -> None:
        if not self.waiting:  # else the files are still those of the earlier one
            self.manifest.save(self.manifest_path)

    def _replace_earlier(self) -> None:
        """Put this run's files in the place of an earlier one's. Killed in between, its other rows are not done."""
        for file in self.files.values():
            file.clear()
        waiting, self.waiting = self.waiting, {}
        self._save_manifest()
        for kind, file in waiting.items():
            self.files[kind].replace(file)
            file.unlink()
            file.close()

    def _check(self, old: Manifest | None) -> None:
        check_same_command(self.files["done"].path, old, self.manifest)
        self.manifest.retries = old.retries
        self._say_changes(old.made_with, {**old.made_with, **self.manifest.made_with})
        self.manifest.made_with = {**old.made_with, **self.manifest.made_with}

    def record_engine(self, facts: dict) -> None:
        """Add the engine's versions and settings to the manifest, once it is loaded. Raises InputError for rows of a
        model that worked with other rotary factors (see `vllm_setup.long_rope`)."""
        old = self.manifest.made_with.get("engine", facts)
        if self.begun and {"long", "short"} == {old.get("rope"), facts.get("rope")}:
            raise InputError(
                f"{self.files['done'].path} was begun with other rotary factors of this model, which follow "
                f"--max_model_len ({old.get('max_model_len')} before, {facts.get('max_model_len')} now): give the one "
                "before, name another output, or use --overwrite to start anew"
            )
        self._say_changes(old, facts)
        self.manifest.made_with["engine"] = facts
        self._save_manifest()

    def _say_changes(self, old: dict, new: dict) -> None:
        for line in differences(old, new) if self.begun else ():
            print(f"warning: {self.files['done'].path} was begun with {line}", file=sys.stderr)

    @property
    def begun(self) -> bool:
        return not self.waiting and not all(file.empty for file in self.files.values())

    def forget_failed(self, ids: Iterable[str]) -> int:
        """Take those of the ids that failed out of the failed file, to run again with other seeds; returns how
        many."""
        file = self.files["failed"]
        failed = {id_key(row["id"]) for row in file}
        again = failed & {id_key(identifier) for identifier in ids} if failed else set()
        if again:
            self.manifest.retries += 1
            self.manifest.save(self.manifest_path)
            file.replace(row for row in file if id_key(row["id"]) not in again)
            self.finished -= again
            self.counts["failed"] = self.unusable = 0
            self.reasons["failed"].clear()
            for row in file:
                self._count("failed", row)
        return len(again)

    def __contains__(self, identifier: str) -> bool:
        return id_key(identifier) in self.finished

    def write(self, kind: str, row: Mapping) -> None:
        """Append a finished row to the file of its kind ("done", "filtered", "failed")."""
        if self.waiting and kind == "done":
            self._replace_earlier()
        (self.waiting or self.files)[kind].append(row)
        self._count(kind, row)

    def _count(self, kind: str, row: Mapping) -> None:
        self.finished.add(id_key(row["id"]))
        self.counts[kind] += 1
        self.unusable += kind == "failed" and row.keys() >= INPUT_LINE
        if kind in self.reasons:
            count_reason(self.reasons[kind], row.get("reason"))

    def spend(self, reply: Completion | AskError) -> int:
        """Count the tokens of one answer; returns them."""
        tokens = self.manifest.usage.add(reply)
        if time.monotonic() - self.usage_saved >= USAGE_SECONDS:
            self.save_usage()
        return tokens

    def save_usage(self) -> None:
        self._save_manifest()
        self.usage_saved = time.monotonic()

    def close(self) -> None:
        """Write down the tokens used. Where there is not one row, leave no file either, but a manifest with its
        tokens."""
        try:
            self.save_usage()
            if not self.waiting and not self.begun and not self.manifest.usage.asks:
                self.manifest_path.unlink()
        finally:
            self._close_files()

    def _close_files(self) -> None:
        for file in self.waiting.values():
            if file.empty:
                file.unlink()
            file.close()
        for file in self.files.values():
            # Of two runs that start at once, both may have found no file; only one may take it away.
            if self.locked and file.created and file.empty and not self.begun:
                file.unlink()
        for file in self.files.values():
            file.close()
