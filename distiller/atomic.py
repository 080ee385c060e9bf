"""A file is written whole or not at all, whatever moment the process is killed at."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes, *, sync: bool = False) -> None:
    """Put a file of this content in the place of what is there; a link stays one. Text is written as UTF-8.

    sync: wait for the disk, so that a power cut, too, leaves the one or the other.
    """
    place = Path(os.path.realpath(path))
    part = place.with_name(f"{place.name}.part")
    with part.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(part, place)
