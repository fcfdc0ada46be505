from __future__ import annotations

import os
from pathlib import Path

import pytest

from pynar.data.atomic import written


def test_a_file_is_old_or_new_but_never_half(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written(path) as stream:
        stream.write("half")
        stream.flush()
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with written(path) as stream:
        stream.write("new\n")
        assert path.read_text() == "old"
    assert path.read_bytes() == b"new\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_and_a_device_written_into(tmp_path: Path) -> None:
    path, link = tmp_path / "here.txt", tmp_path / "link.txt"
    link.symlink_to(path)
    with written(link) as stream:
        stream.write("text")
    assert link.is_symlink() and path.read_text() == "text"
    with written(Path(os.devnull)) as stream:
        stream.write("text")
    assert not Path(os.devnull).is_file()


def test_a_place_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"), written(tmp_path / "none" / "x"):
        pass
