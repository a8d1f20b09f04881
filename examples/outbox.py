#!/usr/bin/env python3
"""A message and a row of the application in one commit (transactional outbox).

    connection = sqlite3.connect("shop.db")
    make_outbox(connection)                               # once: makes the file a SimpleBroker database too
    outbox = Queue("orders", runner=OutboxRunner(connection))

    with connection:                                      # the application's transaction
        connection.execute("INSERT INTO orders ...")
        outbox.write("...")                               # belongs to it: both are committed, or none is

    python outbox.py

Without this there is always a moment between the two commits, and whoever crashes in it has an order that nobody hears
of, or a message about an order that does not exist.

The queue lives in the application's own database file, where any process reads it with the ordinary broker:
``broker -f shop.db watch orders``. What that costs: the tables "meta" and "messages" and the application_id of the file
belong to the broker, the file is in WAL mode, and an idle consumer finds a message up to half a second later. Use the
runner in the thread of its connection, and to write; consume through a connection of the broker's own.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

# Find simplebroker.py beside this file or one directory above it. Not needed when it is installed.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(d) for d in (HERE, HERE.parent) if (d / "simplebroker.py").exists()]

import simplebroker  # noqa: E402
from simplebroker import (  # noqa: E402
    APPLICATION_ID,
    SCHEMA,
    IntegrityError,
    OperationalError,
    Queue,
    SQLRunner,
    WriterLock,
)

QUEUE = "orders"
LOCK_TIMEOUT_S = 10.0  # how long make_outbox() waits for other processes that do the same


def make_outbox(connection: sqlite3.Connection) -> None:
    """Make the application's database a SimpleBroker database too. Does nothing if it is one already.

    ValueError if the file belongs to another program, or has tables of those names. Call it when the program starts: if
    others use the file for the first time, sqlite3.OperationalError says that it is locked.
    """
    if connection.in_transaction:
        raise ValueError("the connection is in a transaction: commit it first")
    path = next(row[2] for row in _all(connection, "PRAGMA database_list") if row[1] == "main")
    if not path:
        raise ValueError("the database is not a file")
    with closing(WriterLock(os.path.realpath(path))) as lock:  # processes that do this at once come one after the other
        lock.acquire(time.monotonic() + LOCK_TIMEOUT_S)
        magic = _all(connection, "PRAGMA application_id")[0][0]
        if magic == APPLICATION_ID:
            return
        if magic:
            raise ValueError(f"the file has the application_id {magic:#x} of another program")
        taken = "SELECT name FROM sqlite_master WHERE name IN ('meta', 'messages', 'ready', 'held')"
        for (name,) in _all(connection, taken):
            raise ValueError(f"the application has a table or index {name!r}, which is a name of the broker's")
        _all(connection, "PRAGMA journal_mode = WAL")
        _all(connection, "BEGIN IMMEDIATE")
        try:
            for statement in (*SCHEMA, f"PRAGMA application_id = {APPLICATION_ID}", "COMMIT"):
                _all(connection, statement)
        except sqlite3.Error:
            if connection.in_transaction:
                _all(connection, "ROLLBACK")
            raise


def _all(connection: sqlite3.Connection, sql: str, params: Sequence[Any] = ()) -> list[Any]:
    """Execute a statement to its end: one that is left open keeps its locks, on PyPy until some later time."""
    return connection.execute(sql, params).fetchall()


class OutboxRunner(SQLRunner):
    """A runner over the application's connection. Transactions of the broker join the one that is open.

    So nothing that the broker does is committed before the application commits. With none open, every call commits by
    itself, as usual. An error that the broker reports undoes only the broker's part; roll back as for any other error.
    A transaction that reads before it writes must begin with BEGIN IMMEDIATE, or it fails when others write meanwhile.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._joined: list[bool] = []  # for each transaction of the broker that is open: did it join one?

    def run(self, sql: str, params: Sequence[Any] = (), *, fetch: bool = False) -> Any:
        """Execute one statement; it commits by itself unless a transaction is open."""
        alone = not self._connection.in_transaction
        try:
            rows = self._execute(sql, params)
            if alone and self._connection.in_transaction:  # sqlite3 began one before the statement
                self._execute("COMMIT")
        except Exception:
            if alone and self._connection.in_transaction:
                self._execute("ROLLBACK")
            raise
        return rows

    def begin_immediate(self) -> None:
        """Begin a transaction, or a savepoint in the one that is open."""
        join = self._connection.in_transaction
        self._execute("SAVEPOINT outbox" if join else "BEGIN IMMEDIATE")
        self._joined.append(join)

    def commit(self) -> None:
        """Commit; in the application's transaction that is left to the application."""
        self._execute("RELEASE outbox" if self._joined[-1] else "COMMIT")
        self._joined.pop()

    def rollback(self) -> None:
        """Undo what the broker did since begin_immediate()."""
        if self._joined.pop():
            self._execute("ROLLBACK TO outbox")
            self._execute("RELEASE outbox")
        else:
            self._execute("ROLLBACK")

    def close(self) -> None:
        """Nothing: the connection is the application's."""

    def _execute(self, sql: str, params: Sequence[Any] = ()) -> list[Any]:
        try:
            return _all(self._connection, sql, params)
        except sqlite3.IntegrityError as error:
            raise IntegrityError(str(error)) from error
        except sqlite3.OperationalError as error:  # locked, full, read-only
            raise OperationalError(str(error)) from error


# -- the demonstration: an application that takes orders


@contextmanager
def shop(path: Path) -> Iterator[tuple[sqlite3.Connection, Queue]]:
    """The application's connection, and the outbox on it."""
    with closing(sqlite3.connect(path)) as connection:
        make_outbox(connection)
        connection.execute("CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, item TEXT NOT NULL)")
        with Queue(QUEUE, runner=OutboxRunner(connection)) as outbox:
            yield connection, outbox


def take_order(path: Path, item: str, stop_after: str = "") -> None:
    """Insert the order and write the message, in one transaction. ``stop_after`` waits there, to be killed."""
    with shop(path) as (connection, outbox), connection:
        order = connection.execute("INSERT INTO orders (item) VALUES (?)", (item,)).lastrowid
        wait_if(stop_after == "row")
        outbox.write(json.dumps({"order": order, "item": item}))
        wait_if(stop_after == "message")
        if item == "sold out":
            raise LookupError(item)


def wait_if(here: bool) -> None:
    """Tell the parent that this point is reached, and wait for the end."""
    if here:
        print("here", flush=True)
        sys.stdin.read()


def crash(path: Path, point: str) -> None:
    """Take an order in another process, and kill that when it has come to a point."""
    command = [sys.executable, __file__, str(path), point]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        if child.stdout is None or child.stdout.readline().strip() != b"here":
            raise RuntimeError("the child did not come that far")
        child.kill()


def state(path: Path) -> str:
    """What is committed: rows by the application's connection, messages by the ordinary broker."""
    with shop(path) as (connection, _), Queue(QUEUE, path) as queue:
        orders = _all(connection, "SELECT count(*) FROM orders")[0][0]
        return f"{orders} orders, {queue.count()} messages"


def main() -> None:
    """Crash between the two, crash after both, fail, and then succeed; another process reads the message."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "shop.db")
        with shop(path):
            pass
        crash(path, "row")
        print("killed after the row:", state(path))
        crash(path, "message")
        print("killed after the message, before the commit:", state(path))
        try:
            take_order(path, "sold out")
        except LookupError:
            print("failed:", state(path))
        take_order(path, "lamp")
        print("taken:", state(path))
        reader = [sys.executable, simplebroker.__file__, "-f", str(path), "read", QUEUE]
        print("another process reads:", subprocess.check_output(reader, text=True).strip())
        print("then:", state(path))


if __name__ == "__main__":
    if len(sys.argv) == 3:  # the child that is killed
        take_order(Path(sys.argv[1]), "kettle", stop_after=sys.argv[2])
    else:
        main()
