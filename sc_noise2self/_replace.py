"""Write a file whole or not at all: beside its target, in a folder that no other user can look into, then renamed.

The folder has a random name and is made by this process, so nobody can have put anything there. A lock in it is held
for as long as the run lives, so that a later run can remove what a killed one left, and only that. The name says on
which machine, because a network file system may keep the locks of each to itself.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

_PREFIX = f".sc_noise2self-{socket.gethostname()}-"
_RANDOM = "?" * 8  # that `tempfile` puts after it
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL)


@contextmanager
def replaced(target: Path, *, overwrite: bool = False, like: Path | None = None) -> Iterator[Path]:
    """Yield a path to write to; it becomes the target when the block ends, and is removed when the block fails.

    A file that is overwritten, also by a link, gives the new one its permissions; else `like` does, as far as reading
    and writing go, and None takes the user's own for new files. A target that appears meanwhile stays.
    """
    check_target(target, overwrite)
    place = Path(os.path.realpath(target))
    try:
        with private_folder(place.parent) as own:
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


@contextmanager
def private_folder(parent: Path) -> Iterator[Path]:
    """Make a folder that is locked for as long as the block runs, and removed then; remove what killed runs left."""
    own, lock = _made(parent)
    try:
        with lock:
            for left in parent.glob(f"{_PREFIX}{_RANDOM}"):
                _remove_if_ended(left, own.stat().st_uid)
            yield own / "files"
    finally:  # closed: a network file system keeps what is open
        _remove(own)


def _made(parent: Path) -> tuple[Path, IO[bytes]]:
    """Return a new folder, and a file in it that locks it for as long as it is open."""
    own = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        with ExitStack() as opened:
            lock = opened.enter_context((own / "new").open("xb"))
            if _locked(lock):
                (own / "new").rename(own / "lock")  # so that no other run finds it before it is locked
            (own / "files").mkdir(0o700)
            opened.pop_all()
            return own, lock
    except FileNotFoundError:  # another run found nothing in it yet, and removed it
        return _made(parent)
    except BaseException:
        shutil.rmtree(own, ignore_errors=True)
        raise


def _remove_if_ended(folder: Path, user: int) -> None:
    """Remove a folder of a run of this user that has ended: its lock can be taken, or nothing is in it yet."""
    with suppress(OSError):
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != user:  # a link, or somebody else's
            return
        if not (folder / "lock").exists():
            (folder / "new").unlink(missing_ok=True)
            folder.rmdir()
            return
        with (folder / "lock").open("r+b") as lock:
            ended = _locked(lock)
        if ended:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder, its lock at last, so that whoever finds it half removed can tell that its run has ended."""
    shutil.rmtree(folder / "files", ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _locked(file: IO[bytes]) -> bool:
    """Lock a file for as long as it is open; return whether it is: another may hold it, or there may be no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # Windows; some network file systems
        return False
    return True


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
