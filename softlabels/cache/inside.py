"""Files of someone else's folder, opened with care: a folder and names come in, a descriptor or bytes go out.

A link, a pipe or a device in the place of a file is refused, since it would lead out of the folder, or never end.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from softlabels.errors import CacheError

if TYPE_CHECKING:
    from torch import Tensor


def open_inside(folder: Path, *names: str) -> int:
    """A descriptor of the regular file `folder`/names…, followed through no link below `folder`.

    FileNotFoundError where it isn't there; CacheError where something else is in its place: a link may point at
    any file of this machine, and a pipe or a device would be waited for or read without an end.
    """
    path = "/".join((str(folder), *names))  # a Path would take as long as to open the file
    parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in names[:-1]:
            above, parent = parent, _open_at(parent, name, os.O_DIRECTORY, path)
            os.close(above)
        return _open_file(parent, names[-1], path)
    finally:
        os.close(parent)


def _open_file(parent: int, name: str, path: Path | str) -> int:
    handle = _open_at(parent, name, os.O_NONBLOCK, path)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CacheError(f"{path} is no regular file: refused. Copy the cache again, with its files and no links")
    return handle


def _open_at(parent: int, name: str, flags: int, path: Path | str) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV):
            raise CacheError(
                f"{path} or the folder around it is a link, or no file: refused. Copy the cache again, with its files "
                f"and no links"
            ) from None
        error.filename = str(path)
        raise


def read_inside(folder: Path, *names: str, limit: int) -> bytes:
    """The bytes of a file as `open_inside` opens it; CacheError where it has more than `limit`."""
    return _read_all(open_inside(folder, *names), folder.joinpath(*names), limit)


def open_folder(folder: Path, name: str) -> int:
    """A descriptor of `folder`/name, a real folder, for `read_at`; FileNotFoundError and CacheError as above."""
    parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return _open_at(parent, name, os.O_DIRECTORY, folder / name)
    finally:
        os.close(parent)


def read_at(place: int, name: str, *, limit: int) -> bytes:
    """As `read_inside`, in a folder that is open: for files by the million."""
    return _read_all(_open_file(place, name, name), name, limit)


def _read_all(handle: int, path: Path | str, limit: int) -> bytes:
    with open(handle, "rb", buffering=0) as file:
        size = os.fstat(handle).st_size
        data = b"" if size > limit else file.read(limit + 1)
        if size > limit or len(data) > limit:
            raise CacheError(f"{path} has {size:,} bytes, more than the {limit:,} that it may have")
        return data


def read_tensors(folder: Path, name: str, *, most: int, what: str) -> dict[str, Tensor]:
    """The tensors of `teacher/NAME` of the cache at `folder`, a safetensors file of at most `most` bytes.

    CacheError where it is missing, damaged, or larger than `what` can be.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / "teacher" / name
    try:
        handle = open_inside(folder, "teacher", name)
    except FileNotFoundError:
        raise CacheError(f"{path} is missing: copy it from where the cache came from") from None
    with open(handle, "rb") as file:
        size = os.fstat(handle).st_size
        if size > most:
            raise CacheError(f"{path} has {size:,} bytes, more than {what}: refused")
        data = file.read()
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CacheError(f"{path} is damaged: {error}") from None
