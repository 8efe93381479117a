"""Files that are there as a whole or as they were before, whenever the process is killed.

The text is written beside its place and renamed. Symbolic links stay, and what they lead to is written; permissions
stay; a hard link is parted from the file's other names.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


def check_place(path: Path) -> None:
    """Raise ``OSError`` where :func:`write_whole` could not write to ``path``; nothing is left behind."""
    target = _target(path)
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if path.exists() and not os.access(target, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    # Whether a folder can be written to is known once it has been: permissions alone do not say.
    part = _part(target)
    part.touch()
    part.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, in UTF-8.

    Raises ``OSError`` where it cannot be written, and where there is something that is no regular file.
    """
    check_place(path)
    target = _target(path)
    part = _part(target)
    try:
        part.write_text(text, encoding="utf-8")
        if target.exists():
            shutil.copymode(target, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _part(target: Path) -> Path:
    """What becomes the file once it is whole."""
    return target.with_name(f".{target.name[:40]}.{os.getpid()}.part")
