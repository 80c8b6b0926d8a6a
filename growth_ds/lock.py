"""One writer per folder: a lock that the kernel gives back when its owner dies, however it dies.

The lock is `flock` on `<folder>/.lock`. The file stays for ever: were it removed, one process could hold the lock of
the removed file and another that of the next one. What it says (host, pid, since when) is for people only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from growth_ds.errors import UserError

POLL_S = 0.2
_TAKEN = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
_UNKNOWN = "another process"
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


class WaitStopped(UserError):
    """`stop` became true before the lock was free."""


class FolderLock:
    """Exclusive use of a folder among processes, and among the FolderLocks of one process. Also a context manager.

    Child processes do not prolong it: an exec closes the file, and so does a fork.
    """

    def __init__(
        self,
        folder: Path,
        wait_s: float = 60.0,
        say: Callable[[str], None] = print,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder, self.path = folder, folder / ".lock"
        self._wait_s, self._say, self._stop = wait_s, say, stop
        self._descriptor: int | None = None
        self._holder = _UNKNOWN

    @property
    def held(self) -> bool:
        """False also after an `acquire` on a file system without locks."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock; says once whom it waits for. The folder has to exist.

        Raises UserError when somebody still holds it after `wait_s` or the folder cannot be written, WaitStopped when
        `stop` ends the wait. On a file system without locks it says so and goes on.
        """
        if self.held:
            return
        end, said = time.monotonic() + self._wait_s, False
        while not self._try():
            if self._stop():
                raise WaitStopped(
                    f"{self.folder}: in use by {self._holder}; the wait was stopped; start again when it has ended"
                )
            left = end - time.monotonic()
            if left <= 0:
                raise UserError(
                    f"{self.folder}: in use by {self._holder}; wait for its end, stop it, or give another folder"
                )
            if not said:
                self._say(f"{self.folder}: in use by {self._holder}; waiting up to {self._wait_s:g} s for its end")
                said = True
            time.sleep(min(POLL_S, left))

    def release(self) -> None:
        """Give the lock back; safe twice, and without an `acquire`."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _held.discard(self)
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)  # nobody shall be told to wait for us
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # whoever else has the file open through us
            os.close(descriptor)

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _try(self) -> bool:
        """One attempt. False when it is taken; True when it is ours, or nobody can lock here."""
        descriptor = self._open()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._holder = _holder(descriptor)
            os.close(descriptor)
            return self._without(error)
        if not self._is_current(descriptor):
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        _held.add(self)
        self._sign(descriptor)
        return True

    def _without(self, error: OSError) -> bool:
        """What an attempt that failed comes to."""
        if error.errno in _TAKEN:
            return False
        if error.errno in _NO_LOCKS:
            self._say(f"{self.path}: no locks here ({error.strerror}); start no second run in this folder")
            return True
        raise UserError(f"{self.path}: cannot be locked ({error.strerror}); give another folder") from None

    def _open(self) -> int:
        """The lock file, opened so that no exec keeps it open; anew for each attempt, the folder may be another now."""
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            raise UserError(f"{self.folder}: is not there; give a folder that exists") from None
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); give another folder", "GDS-O01"
            ) from None

    def _is_current(self, descriptor: int) -> bool:
        """False when the file that we locked was removed meanwhile: the next one has a lock of its own."""
        try:
            there, here = os.stat(self.path), os.fstat(descriptor)
        except OSError:
            return False
        return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)

    def _sign(self, descriptor: int) -> None:
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name too
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(facts) + "\n").encode(), 0)


_held: set[FolderLock] = set()


def _holder(descriptor: int) -> str:
    """Who holds the lock, in words; it may not have signed yet."""
    try:
        facts = json.loads(os.pread(descriptor, 4096, 0))
        return f"pid {facts['pid']} on {facts['host']} since {facts['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return _UNKNOWN


def _let_go_in_child() -> None:
    """A forked child shares the lock: were it to keep the file open, the lock would outlive the owner."""
    for lock in list(_held):
        descriptor, lock._descriptor = lock._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)  # without LOCK_UN, which would take it from the parent
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
