"""Locks on files, so that two processes do not write the same outputs."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.base.errors import BusyError

logger = logging.getLogger(__name__)

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def hold_lock(path: Path, what: str) -> Iterator[None]:
    """Context manager that locks a file. Raises: BusyError, as `acquire_lock` does."""
    lock = acquire_lock(path, what)
    try:
        yield
    finally:
        os.close(lock)


def acquire_lock(path: Path, what: str) -> int:
    """Locks a file, which is created if needed. Returns its descriptor: the lock ends when it is closed.

    The system ends the lock with the process, however it ends, so the file may stay.

    Args:
        what: what the lock protects, for the error.
    Raises: BusyError, naming the process that holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 1 << 12).decode(errors="replace").strip() or "another process"
        os.close(lock)
        raise BusyError(f"{what} is already in use by {holder}: wait until it has ended, or stop it") from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("%s: this file system has no locks; do not start the same command twice", path)
        return lock
    command = " ".join([Path(sys.argv[0]).name if sys.argv[0] else "python", *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()} ({command}, since {since})\n".encode())
    return lock
