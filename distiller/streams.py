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


def _open_descriptors() -> None:
    """Give a closed standard stream its number back: the next file that is opened would have it, and what native code
    says would be written into that."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


@contextmanager
def patient_streams() -> Iterator[None]:
    """Inside, stdout and stderr are such streams."""
    _open_descriptors()
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):  # a terminal's encoding may lack what a row has: shown as \\u... then
            stream.reconfigure(errors="backslashreplace")
    # None where it was closed; what is printed to that goes to stdout.
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    sys.stdout, sys.stderr = (_Patient(nowhere if stream is None else stream) for stream in before)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before
