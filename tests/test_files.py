"""Files that are whole or as they were."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lbr_kernels.files import check_place, write_whole


def test_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_whole(path, "before")

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_whole(path, "after")
    assert path.read_text(encoding="utf-8") == "before"
    write_whole(path, "süß")
    assert path.read_bytes() == "süß".encode()
    with pytest.raises(OSError, match="nowhere"):
        write_whole(tmp_path / "nowhere" / "a.txt", "")
    assert list(tmp_path.iterdir()) == [path]


def test_links_stay(tmp_path):
    path, link, dangling = (tmp_path / name for name in ("a.txt", "link.txt", "dangling.txt"))
    path.touch()
    link.symlink_to(path)
    dangling.symlink_to("new.txt")
    for number, name in enumerate((link, dangling)):
        write_whole(name, str(number))
        assert name.is_symlink()
    assert path.read_text() == "0"
    assert (tmp_path / "new.txt").read_text() == "1"
    assert len(list(tmp_path.iterdir())) == 4


def test_what_is_no_file_is_left_as_it_is(tmp_path):
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for place in (pipe, folder):
        with pytest.raises(OSError, match="not a regular file"):
            check_place(place)
        with pytest.raises(OSError, match="not a regular file"):
            write_whole(place, "")
    assert pipe.is_fifo()
    assert len(list(tmp_path.iterdir())) == 2


def test_permissions_stay(tmp_path):
    path = tmp_path / "a.txt"
    path.touch(mode=0o600)
    write_whole(path, "private")
    assert path.stat().st_mode & 0o777 == 0o600


def test_names_that_are_hard(tmp_path):
    longest, loop = tmp_path / ("a" * 255), tmp_path / "loop"
    write_whole(longest, "here")
    assert longest.read_text() == "here"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="symbolic links"):
        write_whole(loop, "")
    assert loop.is_symlink()
