#!/usr/bin/env python3
"""SQLite connections for programs with several threads and processes. One file, standard library only.

    database = Database("app.db")                       # the file is made on first use: WAL, permissions 0600
    with database.transaction() as connection:          # BEGIN IMMEDIATE; COMMIT, or ROLLBACK if the block raises
        connection.execute("CREATE TABLE IF NOT EXISTS notes (body TEXT)")
        connection.execute("INSERT INTO notes VALUES (?)", ("hello",))
    rows = database.connection().execute("SELECT body FROM notes").fetchall()
    database.close()

The parts can be used alone: validate_path, retry_busy, connect, FileLock, Database.

Promises
    Threads   each has a connection of its own; that of an ended thread is closed when another one is opened
    Fork      a child gets connections of its own, and neither uses nor closes those of its parent
    Writers   queue for the file lock PATH.lock instead of sleeping in SQLite's busy handler
    Waiting   has one monotonic deadline per call (opening a connection has its own), then an sqlite3.OperationalError
    Files     that are not SQLite databases are refused and left untouched; opening one that uses WAL only reads

Limits
    Autocommit mode: a statement outside transaction() commits by itself and does not queue for the file lock.
    Finish with your cursors before you fork: a child must not touch those that it inherits.
    Fetch the rows of a statement to the end before its connection is closed (PyPy may crash otherwise).
    Paths are checked once: keep databases where nobody else may replace directories or links.
    Do not delete or replace a database file that is in use. WAL does not work on network file systems.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar, Union
from weakref import ref

TIMEOUT_S = 5.0  # how long a call waits for locks before it fails
PRAGMAS = ("synchronous = FULL", "trusted_schema = OFF", "foreign_keys = ON")  # of every connection
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.0005, 0.002  # between two looks at a lock: doubles from the first to the longest
LONGEST_S = 1e6  # stands for longer timeouts, such as math.inf
BUSY_CODES = (5, 6, 15)  # SQLITE_BUSY, SQLITE_LOCKED, SQLITE_PROTOCOL
BUSY_MESSAGES = ("database is locked", "database table is locked", "database schema is locked", "locking protocol")
FILE_MODE = 0o600  # of the files made here: the owner alone; SQLite gives its -wal and -shm files the same

StrPath = Union[str, "os.PathLike[str]"]
T = TypeVar("T")


class PathError(ValueError):
    """A database path that is not allowed."""


class NotADatabaseError(sqlite3.DatabaseError):
    """The file is something else than an SQLite database, or is damaged."""


class LockTimeout(sqlite3.OperationalError, TimeoutError):
    """The file lock was not free before the deadline."""


class ForkedError(RuntimeError):
    """A forked child tried to use a connection of its parent."""


# --- Paths ---


def validate_path(path: StrPath, base: StrPath | None = None) -> str:
    """Return the absolute path, symbolic links resolved; PathError if it is not allowed. Opens nothing.

    With ``base``, a relative path starts there, and every path has to stay inside that directory.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"a database path is a str or a path of str, not {type(text).__name__}")
    if not text or any(ord(char) < 32 or 127 <= ord(char) < 160 for char in text):
        raise PathError(f"the path {text!r} is empty or has control characters")
    if text == ":memory:":
        raise PathError("':memory:' is not a file: every thread would have a database of its own")
    if ".." in text.replace("\\", "/").split("/"):
        raise PathError(f"the path {text!r} must not contain '..'")
    root = os.path.realpath("." if base is None else base)
    full = os.path.realpath(os.path.join(root, text))
    if base is not None and Path(root) not in Path(full).parents:
        raise PathError(f"the path {text!r} leads out of {root!r}, to {full!r}")
    if text.endswith(("/", os.sep)) or (os.path.lexists(full) and not os.path.isfile(full)):
        raise PathError(f"{text!r} is a directory, or something else that is not a regular file")
    if not os.path.isdir(os.path.dirname(full)):
        raise PathError(f"the directory of {full!r} does not exist: create it first")
    return full


# --- Waiting: a deadline is computed once per call, and what is left of it is passed on ---


def _left_s(deadline: float) -> float:
    return min(max(0.0, deadline - time.monotonic()), LONGEST_S)


def _pauses(deadline: float) -> Iterator[None]:
    """Yield at once, then after growing pauses, the last time at the deadline."""
    pause = FIRST_PAUSE_S
    yield
    while time.monotonic() < deadline:
        time.sleep(min(pause, _left_s(deadline)))
        pause = min(2 * pause, LONGEST_PAUSE_S)
        yield


def is_busy(error: sqlite3.Error) -> bool:
    """Was it a lock that another connection holds? Then the same call may succeed later."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # since Python 3.11; the low byte is the kind of error
    return code in BUSY_CODES or str(error).partition(":")[0] in BUSY_MESSAGES  # ": name of a table" may follow


def retry_busy(connection: sqlite3.Connection, operation: Callable[[], T], timeout_s: float = TIMEOUT_S) -> T:
    """Call operation() until it meets no lock, and return its result; after timeout_s its error is raised.

    SQLite's busy handler waits for what is left of that time. This loop waits for what the handler does not
    cover: the change to WAL, recovery and possible deadlocks can fail at once. Retry a whole transaction, or
    its BEGIN, but no statement inside it: the snapshot stays outdated.
    """
    deadline = time.monotonic() + timeout_s
    usual_ms = _pragma(connection, "busy_timeout")
    try:
        for _ in _pauses(deadline):
            _pragma(connection, f"busy_timeout = {int(_left_s(deadline) * 1000)}")
            try:
                return operation()
            except sqlite3.OperationalError as error:
                if not is_busy(error):
                    raise
                last = error
        raise last
    finally:
        _pragma(connection, f"busy_timeout = {usual_ms}")


def _pragma(connection: sqlite3.Connection, text: str) -> Any:
    """Run a pragma and return its value, or None. Like every statement here it is fetched to the end."""
    rows = connection.execute(f"PRAGMA {text}").fetchall()
    return rows[0][0] if rows else None


# --- Fork ---

# All that a fork concerns. Not in a WeakSet, which cannot be listed while a thread adds to it or PyPy collects.
_registered: dict[ref[Connection | FileLock | Database], None] = {}
_inherited: list[Connection] = []  # in a child: those of the parent


def _after_fork_in_child() -> None:
    things = [reference() for reference in list(_registered)]  # all of them, before one lets go of a connection
    for thing in things:
        if thing is not None:
            thing.after_fork()


if hasattr(os, "register_at_fork"):
    import ctypes

    os.register_at_fork(after_in_child=_after_fork_in_child)


# --- Files ---


def _open_private(path: str, more_flags: int) -> int:
    """Open a file, made for the owner alone whatever the umask."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | more_flags, FILE_MODE)
    if os.fstat(fd).st_mode & FILE_MODE != FILE_MODE and hasattr(os, "fchmod"):
        os.fchmod(fd, FILE_MODE)
    return fd


if sys.platform == "win32":
    import msvcrt

    def _set_lock(fd: int, *, take: bool) -> None:
        msvcrt.locking(fd, msvcrt.LK_NBLCK if take else msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _set_lock(fd: int, *, take: bool) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB if take else fcntl.LOCK_UN)


class FileLock:
    """A lock that one thread of one process holds at a time. Not re-entrant.

    The kernel frees the lock of a process that dies. The file is never deleted: whoever still waits for it
    would get a lock that others, who make the file again, do not see. If someone else deletes it, that is
    noticed. A forked child does not hold the lock of its parent.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = os.path.abspath(path)
        self._mutex = threading.Lock()  # held together with the lock: keeps the threads of this process apart
        self._fd: int | None = None  # open while the lock is held
        _registered[ref(self, _registered.pop)] = None

    def acquire(self, timeout_s: float = TIMEOUT_S) -> None:
        """Take the lock; LockTimeout if it is not free within timeout_s (0: try once)."""
        deadline = time.monotonic() + timeout_s
        if not self._mutex.acquire(timeout=_left_s(deadline)):
            raise LockTimeout(f"another thread holds {self.path!r} for longer than {timeout_s:.3g} s")
        try:
            for _ in _pauses(deadline):
                self._fd = self._try_once()
                if self._fd is not None:
                    return
            raise LockTimeout(f"another process holds {self.path!r} for longer than {timeout_s:.3g} s")
        finally:
            if self._fd is None:
                self._mutex.release()

    def release(self) -> None:
        """Give the lock back. RuntimeError if this process does not hold it."""
        fd, self._fd = self._fd, None
        if fd is None:
            raise RuntimeError(f"this process does not hold {self.path!r}")
        try:
            _set_lock(fd, take=False)  # closing is not enough: a child that was just forked may have a copy
        finally:
            os.close(fd)
            self._mutex.release()

    @contextmanager
    def hold(self, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
        """``with lock.hold(2.0):`` the lock is held in the block."""
        self.acquire(timeout_s)
        try:
            yield
        finally:
            if self._fd is not None:  # a child that was forked in the block has nothing to release
                self.release()

    def _try_once(self) -> int | None:
        """The descriptor of the locked file, or None if the lock is not free."""
        fd = _open_private(self.path, getattr(os, "O_NOFOLLOW", 0))
        locked = False
        try:
            _set_lock(fd, take=True)
            locked = os.path.samestat(os.stat(self.path), os.fstat(fd))  # or it is no longer the file of that name
        except (BlockingIOError, PermissionError, FileNotFoundError):
            pass  # others hold it (PermissionError: on Windows), or it was deleted
        finally:
            if not locked:
                os.close(fd)
        return fd if locked else None

    def after_fork(self) -> None:
        """In a forked child: close the copy. That does not unlock; keeping it would lock for a parent that dies."""
        fd, self._fd = self._fd, None
        self._mutex = threading.Lock()
        if fd is not None:
            os.close(fd)


# --- Connections ---


class Connection(sqlite3.Connection):
    """A connection that refuses to work in another process than its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.pid = os.getpid()
        super().__init__(*args, **kwargs)
        _registered[ref(self, _registered.pop)] = None

    def after_fork(self) -> None:
        """In a forked child: never be freed, not even at exit.

        sqlite3_close() would roll back in memory that parent and child share, which destroys what the parent
        is about to commit. PyPy counts no references, and frees nothing at exit.
        """
        _inherited.append(self)
        if sys.implementation.name == "cpython":
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))


def _refused_in_child(method: Callable[..., Any]) -> Callable[..., Any]:
    def checked(self: Connection, *args: Any, **kwargs: Any) -> Any:
        if self.pid != os.getpid():
            raise ForkedError(f"a connection of process {self.pid} cannot be used in its child: open another")
        return method(self, *args, **kwargs)

    return checked


for _name in ("cursor", "execute", "executemany", "executescript", "commit", "rollback", "close", "__exit__"):
    setattr(Connection, _name, _refused_in_child(getattr(sqlite3.Connection, _name)))


def connect(
    path: str, *, lock: FileLock | None = None, timeout_s: float = TIMEOUT_S, pragmas: Sequence[str] = PRAGMAS
) -> Connection:
    """Open an existing file, in autocommit mode. NotADatabaseError if SQLite says that it is no database.

    With ``lock``, a file that does not use WAL yet is changed to it under that lock. Any thread may use the
    connection, one at a time. SQLite is asked, because reading the file here would drop the locks that this
    process has on it: POSIX locks go when any descriptor of the file is closed.
    """
    deadline = time.monotonic() + timeout_s
    if os.path.isfile(path) and os.path.getsize(path) == 1:  # which SQLite takes for empty, and overwrites
        raise NotADatabaseError(f"{path!r} is not an SQLite database")
    uri, wait_s = Path(path).absolute().as_uri() + "?mode=rw", min(timeout_s, LONGEST_S)
    connection = sqlite3.connect(
        uri, uri=True, timeout=wait_s, isolation_level=None, check_same_thread=False, factory=Connection
    )

    def set_up(pragma: str) -> Any:
        return retry_busy(connection, lambda: _pragma(connection, pragma), _left_s(deadline))

    try:
        if set_up("journal_mode") != "wal" and lock is not None:
            with lock.hold(_left_s(deadline)):
                if set_up("journal_mode = WAL") != "wal":
                    raise sqlite3.NotSupportedError(f"{path!r} cannot use WAL on this file system")
        for pragma in pragmas:
            set_up(pragma)
    except BaseException as error:
        connection.close()
        if type(error) is sqlite3.DatabaseError:  # and none of its subclasses
            raise NotADatabaseError(f"{path!r} is not an SQLite database, or is damaged: {error}") from error
        raise
    return connection


# --- Database ---


class Database:
    """One database file: a connection for every thread, and one writer at a time. Opened on first use.

    ``path`` as in validate_path(), which also keeps it in a directory. ``pragmas`` are run on every new connection.
    """

    def __init__(self, path: StrPath, *, timeout_s: float = TIMEOUT_S, pragmas: Sequence[str] = PRAGMAS) -> None:
        self.path = validate_path(path)
        self._timeout_s = timeout_s
        self._pragmas = pragmas
        self._writer_lock = FileLock(self.path + ".lock")
        self._closed = False
        self.after_fork()
        _registered[ref(self, _registered.pop)] = None

    def after_fork(self) -> None:
        """In a forked child, and at first: have no connections."""
        self._mutex = threading.Lock()  # held to change _connections
        self._connections: dict[threading.Thread, Connection] = {}

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def connection(self) -> Connection:
        """The connection of this thread."""
        if self._closed:
            raise sqlite3.ProgrammingError(f"the database {self.path!r} was closed")
        found = self._connections.get(threading.current_thread())
        if found is None:
            self._close_unused()
            try:
                os.close(_open_private(self.path, os.O_EXCL))
            except FileExistsError:  # not even opened
                pass
            found = connect(self.path, lock=self._writer_lock, timeout_s=self._timeout_s, pragmas=self._pragmas)
            with self._mutex:
                self._connections[threading.current_thread()] = found
        return found

    @contextmanager
    def transaction(self, timeout_s: float | None = None) -> Iterator[Connection]:
        """``with database.transaction() as connection:`` commits at the end, rolls back if the block raises.

        Blocks while others write, at most timeout_s. Keep it short. Transactions of a thread do not nest.
        """
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        connection = self.connection()
        if connection.in_transaction:
            raise RuntimeError("this thread is in a transaction already")
        with self._writer_lock.hold(_left_s(deadline)):
            retry_busy(connection, lambda: connection.execute("BEGIN IMMEDIATE"), _left_s(deadline))
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.pid == os.getpid() and connection.in_transaction:
                    connection.rollback()
                raise

    def close(self) -> int:
        """Close the connections of this thread and of ended threads; return how many others are left.

        Closing a connection while its thread is in a statement can crash the interpreter. So end the other
        threads first, or call this again when they have ended.
        """
        self._closed = True
        return self._close_unused(threading.current_thread())

    def _close_unused(self, also: threading.Thread | None = None) -> int:
        with self._mutex:
            ended = [thread for thread in self._connections if thread is also or not thread.is_alive()]
            unused = [self._connections.pop(thread) for thread in ended]
        for connection in unused:
            connection.close()
        return len(self._connections)


# --- Demonstration: processes count up in one row, and no addition gets lost ---

PROCESSES, ADDITIONS = 4, 50


def _count_up(path: str) -> None:
    with Database(path) as database:
        for _ in range(ADDITIONS):
            with database.transaction() as connection:
                connection.execute("UPDATE counter SET n = n + 1")


def main() -> int:
    """Run the processes, print the count, and return an exit status."""
    with tempfile.TemporaryDirectory() as directory, Database(os.path.join(directory, "counter.db")) as database:
        with database.transaction() as connection:
            connection.execute("CREATE TABLE counter AS SELECT 0 AS n")
        processes = [get_context("spawn").Process(target=_count_up, args=[database.path]) for _ in range(PROCESSES)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        [(count,)] = database.connection().execute("SELECT n FROM counter").fetchall()
        print(f"{PROCESSES} processes counted to {count} of {PROCESSES * ADDITIONS}")
        return 0 if count == PROCESSES * ADDITIONS else 1


if __name__ == "__main__":
    sys.exit(main())
