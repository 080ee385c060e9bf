"""The three files of `store`, and the manifest, for a command that has no teacher to wait for: the rows go to
`<file>.part`, and everything is put in place at the end, or nothing.

The same command may run again and writes the same. An output never stands beside the manifest of another one: where
the two differ, the old files go first, then the manifest comes, then the new files. Killed in between, the same
command puts it right.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from distiller.manifest import Manifest
from distiller.records import InputError
from distiller.store import LineFile, check_same_command


class WholeFiles:
    """Opens the files for one run, and for no other at the same time."""

    def __init__(self, output: str | Path, manifest: Manifest, *, overwrite: bool = False):
        """Raises InputError when the files belong to a command whose result would differ, or are in use."""
        self.manifest = manifest
        self.manifest_path = Path(f"{output}.manifest.json")
        suffixes = {"done": "", "filtered": ".filtered.jsonl", "failed": ".failed.jsonl"}
        self.paths = {kind: Path(f"{output}{suffix}") for kind, suffix in suffixes.items()}
        self.counts: Counter[str] = Counter()
        self.published = False
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        done = LineFile(self._part("done"))
        try:
            done.lock()
        except InputError:
            done.close()
            raise
        self.parts = {kind: done if kind == "done" else LineFile(self._part(kind)) for kind in self.paths}
        try:
            self._take_over(overwrite)
        except InputError:
            self.close()
            raise

    def _part(self, kind: str) -> Path:
        return self.paths[kind].with_name(self.paths[kind].name + ".part")

    def _take_over(self, overwrite: bool) -> None:
        there = any(path.exists() and path.stat().st_size for path in self.paths.values())
        if there and not overwrite:
            check_same_command(self.paths["done"], Manifest.load(self.manifest_path), self.manifest)
        for part in self.parts.values():
            os.ftruncate(part.descriptor, 0)

    def write(self, kind: str, row: Mapping) -> None:
        """Add a row to the file of its kind ("done", "filtered", "failed")."""
        self.parts[kind].append(row)
        self.counts[kind] += 1

    def publish(self) -> None:
        """Put everything in place. The output comes last."""
        if not self._made_by_this_command():
            for path in self.paths.values():
                path.unlink(missing_ok=True)
        self.manifest.save(self.manifest_path)
        self.published = True
        for kind in reversed(self.paths):
            os.replace(self._part(kind), self.paths[kind])

    def _made_by_this_command(self) -> bool:
        try:
            old = Manifest.load(self.manifest_path)
        except InputError:
            return False
        return old is not None and old.identity == self.manifest.identity

    def close(self) -> None:
        """Without `publish`, nothing is left of the rows."""
        for part in self.parts.values():
            if not self.published:
                part.path.unlink(missing_ok=True)
            part.close()
