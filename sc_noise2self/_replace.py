"""Write a file whole or not at all: beside its target, in a folder that no other user can look into, then renamed.

The folder has a random name and is made by this process, so nobody can have put anything there. Its name says which
process of which machine made it, so that a later run can remove what a killed one left, and only that.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MARK = ".sc_noise2self"
_NAME = re.compile(re.escape(_MARK) + r"-(?P<host>.+)-(?P<process>\d+)-(?P<started>\d+)-\w{8}")
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL)
_CLOCKS_DIFFER = 3600  # seconds by which the start of one and the same process may seem to change


@contextmanager
def replaced(target: Path, *, overwrite: bool = False, like: Path | None = None) -> Iterator[Path]:
    """Yield a path to write to; it becomes the target when the block ends, and is removed when the block fails.

    A file that is overwritten, also by a link, gives the new one its permissions; else `like` does, as far as reading
    and writing go, and None takes the user's own for new files. A target that appears meanwhile stays.
    """
    check_target(target, overwrite)
    place = Path(os.path.realpath(target))
    prefix = f"{_MARK}-{socket.gethostname()}-{os.getpid()}-{_started(os.getpid())}-"
    own = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
    try:
        _remove_leftovers(own)
        written = own / place.name
        yield written
        check_target(target, overwrite)
        pattern = place if place.exists() else like
        if pattern is not None:
            _permit_like(written, pattern.stat())
        _flush(written)
        _move(written, place, overwrite)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise OSError(
            f"{target} could not be written ({os.strerror(error.errno)}): make room, or choose another folder; nothing "
            "is left of it."
        ) from error
    finally:
        shutil.rmtree(own, ignore_errors=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a path that cannot be written to."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is not a folder: make it first.")
    if target.is_symlink() and not target.exists():
        raise FileNotFoundError(f"{target} is a link to {os.readlink(target)}, which does not exist: remove the link.")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists: nothing is overwritten, so choose another name.")
    if target.is_dir():
        raise FileExistsError(f"{target} is a folder, which cannot be replaced in one step: choose another name.")


def _move(written: Path, place: Path, overwrite: bool) -> None:
    """Put what was written in its place in one step, which fails where something appeared there meanwhile."""
    if written.is_dir() or overwrite:
        try:
            os.replace(written, place)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                check_target(place, overwrite)
            raise
        return
    try:
        os.link(written, place)
    except OSError as error:
        if error.errno not in (errno.EEXIST, *_NO_LINKS):
            raise
        check_target(place, overwrite)  # a file system without links: the moment between the two stays
        os.replace(written, place)


def _remove_leftovers(own: Path) -> None:
    """Remove the folders of this user's runs on this machine that have ended, whatever their target was."""
    for left in own.parent.glob(f"{_MARK}-*"):
        name = _NAME.fullmatch(left.name)
        if name is None or name["host"] != socket.gethostname():
            continue
        started, found = _started(int(name["process"])), left.lstat()
        if started is not None and started <= int(name["started"]) + _CLOCKS_DIFFER:
            continue  # it may still run; a process that started much later only has its number
        if stat.S_ISDIR(found.st_mode) and found.st_uid == own.stat().st_uid:  # not a link, not somebody else's
            shutil.rmtree(left, ignore_errors=True)


def _started(process: int) -> int | None:
    """Return when a process started, in seconds; None if there is none."""
    import psutil

    try:
        return int(psutil.Process(process).create_time())
    except (psutil.NoSuchProcess, OverflowError):
        return None


def _permit_like(path: Path, pattern: os.stat_result) -> None:
    """Let those read and write it who may read and write the other, and nobody else."""
    mode = stat.S_IMODE(pattern.st_mode) & 0o666
    if pattern.st_gid != path.stat().st_gid:
        try:
            os.chown(path, -1, pattern.st_gid)
        except OSError:  # not a group of ours: another one may do what everybody may
            mode = mode & ~0o070 | (mode & 0o007) << 3
    if path.is_dir():
        mode |= (mode & 0o444) >> 2  # who may list it may enter it
    path.chmod(mode)


def _flush(path: Path) -> None:
    """Have it on the disk, so that a power failure after the renaming finds it whole."""
    for each in [path] if path.is_file() else path.rglob("*"):
        if each.is_file():
            with each.open("rb") as file:
                os.fsync(file.fileno())
