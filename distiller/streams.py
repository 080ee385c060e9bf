"""Standard streams that end no run where their reader is gone (`| head -1`, a closed terminal), the disk of the log is
full, or their encoding has no such character."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class _Patient:
    """A standard stream of which a line that cannot be written ends nothing. From then on all goes to /dev/null, that
    of libraries too."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._to_nowhere():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._to_nowhere():
            self._stream.flush()

    @contextmanager
    def _to_nowhere(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except ValueError:  # closed in this process
            pass

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextmanager
def patient_streams() -> Iterator[None]:
    """Inside, stdout and stderr are such streams."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):  # a terminal's encoding may lack what a row has: shown as \\u... then
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (stream and _Patient(stream) for stream in before)  # None where there is no terminal
    try:
        yield
        sys.stdout and sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before
