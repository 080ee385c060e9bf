"""A file is written whole or not at all."""

import os

import pytest

from distiller import atomic


def test_what_is_there_stays_until_the_new_file_is_whole(tmp_path, monkeypatch):
    path, link = tmp_path / "f", tmp_path / "link"
    link.symlink_to(path)
    atomic.write_whole(link, "old ä")
    assert link.is_symlink() and path.read_text(encoding="utf-8") == "old ä"

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        atomic.write_whole(path, b"new", sync=True)
    assert path.read_text(encoding="utf-8") == "old ä"
    atomic.write_whole(path, b"new")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["f", "link"] and path.read_bytes() == b"new"
