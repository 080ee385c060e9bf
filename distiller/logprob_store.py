"""The finished rows of the caching stage: shards of a `logprob_cache` where other stages have an output file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from distiller.logprob_cache import PATTERN, CacheInfo, Shard, TokenLogprobs, write_shard
from distiller.records import InputError
from distiller.store import LineFile

LOCK = ".lock"


def check_directory(path: Path) -> None:
    """Raises InputError for a place that holds something else than a cache."""
    if path.exists() and not path.is_dir():
        raise InputError(f"--output {path} is a file; the cache is a directory, name another one")
    if path.is_dir() and any(path.iterdir()) and not ((path / LOCK).exists() or any(path.glob(PATTERN))):
        raise InputError(f"--output {path} is a directory with other things in it; name one of the cache's own")


class ShardFiles:
    """Does for a directory of shards what `store.LineFile` does for a file, with the same methods.

    Rows are gathered until `shard_tokens` response tokens are together, then written as one shard. A kill loses the
    rows gathered so far, no others: which rows are done is read from the shards themselves, so that lost ones are
    simply not done. Any gentler end (an error, Ctrl-C) writes them.
    """

    def __init__(self, path: Path, info: CacheInfo, shard_tokens: int):
        check_directory(path)
        self.created = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._info, self._shard_tokens = info, shard_tokens
        self._gathered: list[tuple[str, TokenLogprobs]] = []
        self._tokens = 0  # in what is gathered
        self._lock = LineFile(path / LOCK)

    def lock(self) -> None:
        """Raises InputError where another process has it."""
        self._lock.lock()

    def cut_torn_line(self) -> None:
        """Drop the beginning of a shard whose writing was interrupted."""
        for part in self.path.glob(f"{PATTERN}.part"):
            part.unlink()

    def __iter__(self) -> Iterator[dict]:
        """`{"id": ...}` of every row on disk. Raises InputError for a shard that is damaged or of another cache."""
        for path in self._shards():
            shard = Shard(path)
            if shard.info != self._info:
                raise InputError(f"{path} is of another cache ({shard.info}, not {self._info}); take it away")
            yield from ({"id": identifier} for identifier in shard.ids)

    def append(self, row: Mapping) -> None:
        """Take a row, {"id": str, "logprobs": TokenLogprobs}."""
        self._gathered.append((row["id"], row["logprobs"]))
        self._tokens += len(row["logprobs"].token_ids)
        if self._tokens >= self._shard_tokens:
            self._flush()

    def _flush(self) -> None:
        if self._gathered:
            last = max((int(path.stem.rpartition("-")[2]) for path in self._shards()), default=-1)
            write_shard(self.path / PATTERN.replace("*", f"{last + 1:05}"), self._info, self._gathered)
            self._gathered, self._tokens = [], 0

    def _shards(self) -> list[Path]:
        return sorted(self.path.glob(PATTERN))

    @property
    def empty(self) -> bool:
        return not self._gathered and not self._shards()

    def clear(self) -> None:
        self.cut_torn_line()
        for path in self._shards():
            path.unlink()

    def unlink(self) -> None:
        """Take the empty directory away."""
        self._lock.path.unlink()
        self.path.rmdir()

    def close(self) -> None:
        self._flush()
        self._lock.close()
