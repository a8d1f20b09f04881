#!/usr/bin/env python3
"""A native asyncio broker on aiosqlite and aiosqlitepool: SimpleBroker's Queue, with await.

    pip install aiosqlite aiosqlitepool
    python async_pooled_broker.py [COUNT]    # the demonstration, and a benchmark with COUNT messages

    async with AsyncBrokerCore("tasks.db") as broker:
        tasks = broker.queue("tasks")
        await tasks.write("hello")
        message = await tasks.lease(30, wait=5)
        await tasks.ack(message)

async_wrapper.py does the same with threads and without dependencies, and is the first choice. This one
is for processes in which many tasks write, lease and acknowledge at the same time.

The file, the schema, the statements, the ids, the writer lock and the doorbell are SimpleBroker's own, so
tasks, threads, other processes and the command line share queues.

    reading   peek, count, stats, ...: a pool of connections that cannot write
    writing   one writer task owns the one connection that writes, and the writer lock. What is asked for
              while it commits is done together in its next transaction, with one commit for all
    waiting   one thread listens to the doorbell while tasks wait

Cancelled calls: what is not committed yet is undone. A message that was committed as read or leased, but
that the cancelled caller did not get any more, is given back.
"""

from __future__ import annotations

import asyncio
import fnmatch
import logging
import math
import os
import sqlite3
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Callable, TypeVar, Union

import aiosqlite
from aiosqlitepool import PoolConnectionAcquireTimeoutError, SQLiteConnectionPool

# simplebroker.py is beside this file or one directory above it; not needed where it is installed.
sys.path[:0] = [str(d) for d in (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent)
                if (d / "simplebroker.py").exists()]  # fmt: skip

import simplebroker  # noqa: E402
from simplebroker import (  # noqa: E402
    Broker,
    BrokerError,
    DatabaseError,
    IntegrityError,
    LeaseLost,
    Message,
    MessageError,
    OperationalError,
    Settings,
    Stats,
    UsageError,
    WriterLock,
)
from simplebroker import ext as sql  # noqa: E402

__all__ = ["AsyncBrokerCore", "AsyncQueue", "AsyncWorker", "Message"]

READERS = 4  # connections in the pool: so many tasks read at the same time
GROUP = 32  # units of work in one transaction; other processes wait meanwhile
LEASE_S = 30.0
MAX_ATTEMPTS = 5  # failed attempts before a worker dead-letters a message
BACKOFF_S = 0.5  # a worker's delay after the first failed attempt; doubles with each further one ...
MAX_BACKOFF_S = 300.0  # ... up to this
BUSY_PAUSE_S = 0.5  # how long a worker pauses when the database is busy or full
LOOK_S = 1.0  # a waiting task looks by itself so often, whatever it hears

LOG = logging.getLogger("simplebroker.async")
T = TypeVar("T")
Id = Union[int, str, None]


# ---------------------------------------------------------------------------------------------------
# Checks: the same rules and errors as in Queue.
# ---------------------------------------------------------------------------------------------------


def checked_id(value: int | str, name: str) -> int:
    """An id from an int or a string of 19 digits."""
    if isinstance(value, str):
        if not (len(value) == sql.ID_DIGITS and value.isascii() and value.isdigit()):
            raise ValueError(f"{name} {value[:40]!r} is not an id: give an int or {sql.ID_DIGITS} digits")
        value = int(value)
    elif not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is an int or a string of {sql.ID_DIGITS} digits, not {type(value).__name__}")
    if not 0 <= value < 2**63:
        raise ValueError(f"{name} {value} is not a positive 63-bit integer")
    return value


def id_bounds(message_id: Id, after: Id, before: Id) -> tuple[int, int]:
    """The strict bounds that three filters mean together; None does not limit."""
    low = 0 if after is None else checked_id(after, "after")
    high = sql.MAX_ID if before is None else min(sql.MAX_ID, checked_id(before, "before"))
    if message_id is not None:
        wanted = checked_id(message_id, "message_id")
        low, high = max(low, wanted - 1), min(high, wanted + 1)
    return low, high


def checked_limit(limit: int) -> int:
    """A number of messages: a positive int."""
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"limit is an int, not {type(limit).__name__}")
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    return min(limit, 2**31)


def checked_ns(seconds: float, name: str) -> int:
    """Seconds as nanoseconds; refuses negative ones, and more than a century."""
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        raise TypeError(f"{name} is a number of seconds, not {type(seconds).__name__}")
    if not 0 <= seconds <= 100 * 366 * 86400:  # also refuses nan and infinity
        raise ValueError(f"{name} {seconds!r} must be from 0 seconds to 100 years")
    return int(seconds * sql.NS)


def check_leased(message: Message) -> None:
    """Refuse what is not a leased message."""
    if not isinstance(message, Message):
        raise TypeError(f"give the Message that lease() returned, not {type(message).__name__}")
    if message.attempt < 1:
        raise ValueError(f"message {message.id} was not leased: use lease(), not read() or peek()")


def next_size(size: int, messages: Sequence[str]) -> int:
    """Double a batch, or halve it when its bodies were large."""
    return max(1, size // 2) if sum(map(len, messages)) > sql.BATCH_BYTES else min(sql.MAX_BATCH, size * 2)


def translated(error: sqlite3.Error, path: str) -> BrokerError:
    """The error that Queue would raise in place of SQLite's."""
    kinds = (IntegrityError, sqlite3.IntegrityError), (OperationalError, sqlite3.OperationalError)
    kind: type[BrokerError] = next((ours for ours, theirs in kinds if isinstance(error, theirs)), DatabaseError)
    return kind(f"{path!r}: {error}")


# ---------------------------------------------------------------------------------------------------
# Writing: one task, one connection, one lock. Nothing else in this process writes through this broker.
# ---------------------------------------------------------------------------------------------------


class Unit:
    """One thing to do in a write transaction, and the future of the task that waits for it."""

    __slots__ = ("done", "durable", "undo", "work")

    def __init__(
        self, work: Callable[[], Awaitable[Any]], undo: Callable[[Any], None] | None, *, durable: bool
    ) -> None:
        self.work = work
        self.undo = undo
        self.durable = durable
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


def fail(units: Iterable[Unit], error: Exception) -> None:
    """Raise the error in the tasks that wait for these units."""
    for unit in units:
        if not unit.done.done():
            unit.done.set_exception(error)


class Writer:
    """Runs units of work in transactions, as many in one as are waiting.

    A caller only waits for a future, so cancelling it never cuts a statement in two: it cancels the
    future, which is looked at before the commit.
    """

    def __init__(
        self, connection: aiosqlite.Connection, path: str, settings: Settings, on_ring: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._path = path
        self._timeout_s = settings.busy_timeout_ms / 1000
        self._sync_mode = self._sync_mode_now = settings.sync_mode
        self._on_ring = on_ring
        self._identity = os.stat(path)
        self._units: deque[Unit] = deque()
        self._rings = False
        self._task: asyncio.Task[None] | None = None  # runs while there are units
        self._lock = WriterLock(path)  # used by that task only, which waits for it in this thread:
        self._lock_thread = ThreadPoolExecutor(1, "simplebroker-async-lock")

    def add(
        self, work: Callable[[], Awaitable[Any]], undo: Callable[[Any], None] | None = None, *, durable: bool = True
    ) -> Unit:
        """Queue a unit for the next transaction."""
        unit = Unit(work, undo, durable=durable)
        self._units.append(unit)
        if self._task is None:
            self._task = asyncio.ensure_future(self._serve())
        return unit

    async def run(self, statement: str, params: Sequence[Any] = ()) -> list[Any]:
        """Execute one statement and return its rows. For units only."""
        self._rings = self._rings or statement in sql.RINGING
        try:
            return list(await self._connection.execute_fetchall(statement, params))
        except sqlite3.Error as error:
            raise translated(error, self._path) from error

    async def run_many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Execute one statement for each row of parameters. For units only."""
        self._rings = self._rings or statement in sql.RINGING
        try:
            await self._connection.executemany(statement, rows)
        except sqlite3.Error as error:
            raise translated(error, self._path) from error

    async def close(self) -> None:
        """Finish what is queued, then close the connection and the lock."""
        while self._task is not None:
            await asyncio.wait([self._task])
        await self._connection.close()
        await asyncio.get_running_loop().run_in_executor(None, self._lock_thread.shutdown)
        self._lock.close()

    def check_file(self) -> None:
        """OperationalError if the path names another file now: what is written to a deleted one is lost."""
        try:
            same = os.path.samestat(os.stat(self._path), self._identity)
        except FileNotFoundError:
            same = False
        if not same:
            raise OperationalError(f"{self._path!r} was deleted or replaced: close this broker and open a new one")

    async def _serve(self) -> None:
        try:
            while self._units:
                await self._write([self._units.popleft() for _ in range(min(GROUP, len(self._units)))])
                await asyncio.sleep(0)  # between two groups, the tasks go on and other processes may take the lock
        finally:
            self._task = None
            if any(not unit.done.done() for unit in self._units):  # someone cancelled this task
                self._task = asyncio.ensure_future(self._serve())

    async def _write(self, group: list[Unit]) -> None:
        """Do a group under the writer lock. Every unit's future is done afterwards."""
        try:
            await self._acquire()
            try:
                self.check_file()
                await self._attempt(group)
            finally:
                self._lock.release()
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the tasks that wait
            fail(group, error)
        finally:
            for unit in group:
                unit.done.cancel()  # does nothing, unless someone cancelled this task

    async def _acquire(self) -> None:
        """Take the writer lock, or raise OperationalError after BROKER_BUSY_TIMEOUT."""
        try:
            self._lock.acquire(0.0)  # if it is free, there is no need to change threads
            return
        except OperationalError:
            pass
        acquire, deadline = self._lock.acquire, time.monotonic() + self._timeout_s
        waiting = self._lock_thread.submit(acquire, deadline)
        try:
            await asyncio.wrap_future(waiting)
        except asyncio.CancelledError:  # the thread may get it all the same
            self._lock_thread.submit(self._release_after, waiting)
            raise

    def _release_after(self, waiting: Future[None]) -> None:
        if not waiting.cancelled() and waiting.exception() is None:
            self._lock.release()

    async def _attempt(self, group: list[Unit]) -> None:
        """Do a group in one transaction. If one fails, undo it and do each by itself."""
        results = None
        while results is None:  # a caller was cancelled meanwhile: do it without that one
            group = [unit for unit in group if not unit.done.done()]
            if not group:
                return
            try:
                results = await self._transact(group)
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the task that waits
                if len(group) == 1:
                    fail(group, error)
                    return
                for unit in group:
                    await self._attempt([unit])
                return
        for unit, result in zip(group, results):
            if not unit.done.done():
                unit.done.set_result(result)
            elif unit.undo is not None:
                unit.undo(result)

    async def _transact(self, group: list[Unit]) -> list[Any] | None:
        """The results after the commit. None: a caller was cancelled before it, and everything was undone."""
        self._rings = False
        try:
            await self._set_sync_mode(durable=any(unit.durable for unit in group))
            await self.run("BEGIN IMMEDIATE")
            results = [await unit.work() for unit in group]
            if any(unit.done.cancelled() for unit in group):
                await self._roll_back()
                return None
            await self.run("COMMIT")
        except BaseException:
            await self._roll_back()
            raise
        if self._rings:
            self._lock.ring()
            self._on_ring()
        return results

    async def _set_sync_mode(self, *, durable: bool) -> None:
        """Leases are not synced by themselves: a crash of the machine may undo them, as it ends them anyway."""
        mode = "NORMAL" if self._sync_mode == "FULL" and not durable else self._sync_mode
        if mode != self._sync_mode_now:
            self._sync_mode_now = "unknown"
            await self.run(f"PRAGMA synchronous = {mode}")
            self._sync_mode_now = mode

    async def _roll_back(self) -> None:
        try:
            await self._connection.rollback()  # does nothing if nothing was begun
        except sqlite3.Error as error:  # the first error is the one to report
            LOG.warning("rollback failed too: %s", error)


# ---------------------------------------------------------------------------------------------------
# Waiting: one thread of this broker sleeps on the doorbell while tasks wait, and wakes them.
# ---------------------------------------------------------------------------------------------------


class Listener:
    """Sets the events of the tasks that wait, at every ring of any process."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._loop = asyncio.get_running_loop()
        self._events: set[asyncio.Event] = set()  # changed by the event loop's thread only
        self._alarm: Any = None
        self._thread: threading.Thread | None = None  # runs while there are events

    @asynccontextmanager
    async def changes(self) -> AsyncIterator[asyncio.Event]:
        """An event that is set when messages may have become deliverable. Clear it, look, then wait."""
        changed = asyncio.Event()
        self._events.add(changed)
        try:
            self._start()
            yield changed
        finally:
            self._events.discard(changed)
            if not self._events and self._alarm is not None:
                self._alarm.wake()  # the thread sees that nobody waits

    def wake(self) -> None:
        """Set all events. Called in the event loop's thread."""
        for event in self._events:
            event.set()

    async def close(self) -> None:
        """End the thread."""
        self._events.clear()
        thread = self._thread
        if thread is not None:
            if self._alarm is not None:
                self._alarm.wake()
            await self._loop.run_in_executor(None, thread.join)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._listen, name="simplebroker-async-listener", daemon=True)
            self._thread.start()

    def _ended(self) -> None:
        self._thread = None
        if self._events:  # they came while it was ending
            self._start()

    def _listen(self) -> None:
        """In the thread. Wakes everybody once at the start: what they saw before may be old."""
        with self._broker.alarm() as alarm:
            self._alarm = alarm
            while self._events:
                self._loop.call_soon_threadsafe(self.wake)
                alarm.wait(math.inf)
        self._loop.call_soon_threadsafe(self._ended)


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """Sleep until the event is set, which happens at the latest after that many seconds, or LOOK_S.

    Not asyncio.wait_for(): before Python 3.12 it forgets that the task was cancelled, if the event is set then.
    """
    timer = asyncio.get_running_loop().call_later(min(seconds, LOOK_S), event.set)
    try:
        await event.wait()
    finally:
        timer.cancel()


# ---------------------------------------------------------------------------------------------------
# The broker: opens and closes everything.
# ---------------------------------------------------------------------------------------------------


class AsyncBrokerCore:
    """All queues of one database, for the tasks of one event loop.

    ``db_path``, ``settings`` and ``clock`` are those of simplebroker.Broker. Use it with ``async with``. Do
    not use it in a forked child.
    """

    def __init__(
        self,
        db_path: str | os.PathLike[str] | None = None,
        *,
        settings: Settings | None = None,
        readers: int = READERS,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._sync = Broker(db_path, settings=settings, clock=clock)  # makes the file, gives ids, and listens
        self.settings = self._sync.settings
        self.path = self._sync.path
        self.clock = clock
        self.ids = self._sync.ids
        self._readers = checked_limit(readers)
        self._reads: set[asyncio.Task[list[Any]]] = set()
        self._keepers: set[LeaseKeeper] = set()
        self._open = False

    async def __aenter__(self) -> AsyncBrokerCore:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Make the database if it is missing, refuse a file that is none, and connect."""
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._make_database)
            self._listener = Listener(self._sync)
            self._writer = Writer(await self._connect(), self.path, self.settings, self._listener.wake)
        except BaseException:
            self._sync.close()
            raise
        patience_s = max(1, math.ceil(self.settings.busy_timeout_ms / 1000))
        self._pool = SQLiteConnectionPool(self._connect_reader, pool_size=self._readers, acquisition_timeout=patience_s)
        self._open = True

    async def close(self) -> None:
        """Give back what read_all() and workers have leased, finish what was begun, and disconnect."""
        if self._open:
            for keeper in list(self._keepers):
                await keeper.close()
            self._open = False
            await self._writer.close()
            await asyncio.gather(*self._reads, return_exceptions=True)
            await self._pool.close()
            await self._listener.close()
        self._sync.close()

    def queue(self, name: str) -> AsyncQueue:
        """The queue of that name."""
        return AsyncQueue(self, name)

    async def queues(self, pattern: str | None = None) -> dict[str, Stats]:
        """The queues that have messages, sorted, with their stats; only those that match the pattern."""
        rows = await self.fetch(sql.SELECT_QUEUES, (self.clock(),))
        return {row[0]: Stats(*row[1:]) for row in rows if pattern is None or fnmatch.fnmatchcase(row[0], pattern)}

    async def broadcast(self, body: str, pattern: str | None = None) -> list[str]:
        """Write the body to every queue that has messages (and matches); return their names. All or none."""
        text = self.checked_body(body)

        async def work() -> list[str]:
            found = [row[0] for row in await self.run(sql.SELECT_QUEUES, (self.clock(),))]
            names = [name for name in found if pattern is None or fnmatch.fnmatchcase(name, pattern)]
            first = await self.next_ids(len(names))
            await self.run_many(sql.INSERT_ONE, [(first + n, name, None, text) for n, name in enumerate(names)])
            return names

        return await self.transact(work)

    @asynccontextmanager
    async def changes(self) -> AsyncIterator[asyncio.Event]:
        """``async with broker.changes() as changed``: an event that is set when messages may have become
        deliverable, by whatever process. In turn: clear it, look, and wait for it."""
        self._check_open()
        async with self._listener.changes() as changed:
            yield changed

    # -- for queues and for statements of your own

    async def fetch(self, statement: str, params: Sequence[Any] = ()) -> list[Any]:
        """Run one reading statement on a connection of the pool and return its rows."""
        self._check_open()
        # The task is not cancelled with its caller: a connection whose use was cut short leaves the pool.
        task = asyncio.ensure_future(self._fetch(statement, params))
        self._reads.add(task)
        task.add_done_callback(self._reads.discard)
        return await asyncio.shield(task)

    async def transact(
        self, work: Callable[[], Awaitable[T]], undo: Callable[[T], None] | None = None, *, durable: bool = True
    ) -> T:
        """Do ``work()`` in a write transaction and return its result after the commit.

        It awaits run() and run_many(), and nothing else: other processes wait meanwhile, and it is called
        again if the transaction had to be undone because of its neighbours. ``undo(result)`` is called if
        the caller was cancelled after the commit. ``durable=False``: a crash of the machine may undo it.
        """
        self._check_open()
        unit = self._writer.add(work, undo, durable=durable)
        try:
            result: T = await unit.done
        except asyncio.CancelledError:
            if undo is not None and unit.done.done() and not unit.done.cancelled() and not unit.done.exception():
                undo(unit.done.result())
            raise
        return result

    async def run(self, statement: str, params: Sequence[Any] = ()) -> list[Any]:
        """One statement of the transaction; only within the work of transact()."""
        return await self._writer.run(statement, params)

    async def run_many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """One statement for each row of parameters; only within the work of transact()."""
        await self._writer.run_many(statement, rows)

    async def next_ids(self, count: int) -> int:
        """The first of so many consecutive new ids; only within the work of transact() that uses them."""
        last: int = (await self.run(sql.SELECT_LAST_ID))[0][0]
        return self.ids.after(last, count)

    def later(self, work: Callable[[], Awaitable[Any]], what: str, *, durable: bool) -> None:
        """Do ``work()`` in a write transaction that nobody waits for; an error is logged."""

        def report(done: asyncio.Future[Any]) -> None:
            if not done.cancelled() and done.exception() is not None:
                LOG.warning("%s failed: %s", what, done.exception())

        self._writer.add(work, durable=durable).done.add_done_callback(report)

    def checked_name(self, name: str) -> str:
        """The name if it is allowed for a queue; QueueNameError or TypeError if not."""
        return self._sync.queue(name).name

    def checked_body(self, body: str) -> str:
        """The body as an exact str if it is text that fits; MessageError or TypeError if not."""
        if not isinstance(body, str):
            raise TypeError(f"a message body is a str, not {type(body).__name__}: encode data, for example as JSON")
        try:
            size = len(body.encode())
        except UnicodeEncodeError as error:
            raise MessageError(f"the body is not valid text: {error.reason} at character {error.start}") from None
        if size > self.settings.max_message_size:
            allowed = f"the {self.settings.max_message_size} that BROKER_MAX_MESSAGE_SIZE allows"
            raise MessageError(f"the body has {size} bytes, more than {allowed}")
        return str(body)

    def held_until(self, delay: float | None, until: datetime | int | None) -> int | None:
        """When a message becomes ready, from a delay or a time; None: at once."""
        if delay is not None and until is not None:
            raise ValueError("give delay or until, not both")
        if delay is not None:
            return self.clock() + checked_ns(delay, "delay") if delay else None
        if until is None:
            return None
        if isinstance(until, datetime):
            if until.tzinfo is None:
                raise ValueError(f"{until.isoformat()} has no time zone: add tzinfo=timezone.utc or another one")
            due = (until - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1) * 1000
        else:
            due = checked_id(until, "until")
        return due if due > self.clock() else None

    def keep(self, keeper: LeaseKeeper) -> None:
        """Give back the keeper's leases in close(), if it has not done so itself."""
        self._keepers.add(keeper)

    def unkeep(self, keeper: LeaseKeeper) -> None:
        """The keeper has ended."""
        self._keepers.discard(keeper)

    def _check_open(self) -> None:
        if not self._open:
            raise UsageError("the broker is not open: use 'async with AsyncBrokerCore(...) as broker'")

    def _make_database(self) -> None:
        with self._sync.transaction():
            pass

    async def _connect(self, *more_pragmas: str) -> aiosqlite.Connection:
        settings = self.settings
        uri = Path(self.path).as_uri() + "?mode=rw"
        pragmas = (
            "trusted_schema = OFF",
            f"synchronous = {settings.sync_mode}",
            f"cache_size = {-1024 * settings.cache_mb}",
            f"wal_autocheckpoint = {settings.wal_autocheckpoint}",
            *more_pragmas,
        )
        try:
            connection = await aiosqlite.connect(
                uri, uri=True, timeout=settings.busy_timeout_ms / 1000, isolation_level=None
            )
            try:
                for pragma in pragmas:
                    await connection.execute_fetchall(f"PRAGMA {pragma}")
            except BaseException:
                await connection.close()
                raise
        except sqlite3.Error as error:
            raise translated(error, self.path) from error
        return connection

    async def _connect_reader(self) -> aiosqlite.Connection:
        connection = await self._connect("query_only = ON")
        # The pool looks with "SELECT 1" whether a connection lives, and drops the cursor. Finish such statements: on
        # PyPy they hold a snapshot until the next garbage collection, which crashes if the connection was closed.
        connection.execute = connection.execute_fetchall  # type: ignore[method-assign, assignment]
        return connection

    async def _fetch(self, statement: str, params: Sequence[Any]) -> list[Any]:
        self._writer.check_file()
        try:
            async with self._pool.connection() as connection:
                return list(await connection.execute_fetchall(statement, params))
        except PoolConnectionAcquireTimeoutError as error:
            raise OperationalError("all connections for reading are in use for too long: raise readers") from error
        except sqlite3.Error as error:
            raise error if isinstance(error, BrokerError) else translated(error, self.path) from error


# ---------------------------------------------------------------------------------------------------
# The queue: the methods of simplebroker.Queue, with the same arguments, results and errors.
# ---------------------------------------------------------------------------------------------------


class AsyncQueue:
    """One queue of messages. See simplebroker.Queue; every method that reaches the database is awaited.

    Filters, wherever they are offered: ``message_id`` takes that message only; ``after`` and ``before``
    are strict bounds of ids.
    """

    def __init__(self, broker: AsyncBrokerCore, name: str) -> None:
        self.broker = broker
        self.name = broker.checked_name(name)

    def __repr__(self) -> str:
        return f"AsyncQueue({self.name!r})"

    # -- write

    async def write(self, body: str, *, delay: float | None = None, until: datetime | int | None = None) -> int:
        """Append a message and return its id. It is committed when this returns."""
        broker = self.broker
        text, held_until = broker.checked_body(body), broker.held_until(delay, until)

        async def work() -> int:
            new = broker.ids.now()
            try:
                await broker.run(sql.INSERT_MESSAGE, (new, self.name, text, held_until))
            except IntegrityError:  # the clock is not ahead of the last id: count on from that
                new = await broker.next_ids(1)
                await broker.run(sql.INSERT_ONE, (new, self.name, held_until, text))
            return new

        return await broker.transact(work)

    async def write_many(
        self, bodies: Iterable[str], *, delay: float | None = None, until: datetime | int | None = None
    ) -> list[int]:
        """Append several messages in one transaction, all or none; return their ids, in order."""
        broker = self.broker
        if isinstance(bodies, (str, bytes)):
            raise TypeError("bodies is an iterable of str: a single body goes to write()")
        texts = [broker.checked_body(body) for body in bodies]
        held_until = broker.held_until(delay, until)

        async def work() -> list[int]:
            first = await broker.next_ids(len(texts))
            rows = [(first + n, self.name, held_until, text) for n, text in enumerate(texts)]
            await broker.run_many(sql.INSERT_ONE, rows)
            return [row[0] for row in rows]

        return await broker.transact(work) if texts else []

    # -- read: at most once

    async def read(
        self, *, message_id: Id = None, after: Id = None, before: Id = None, wait: float | None = None
    ) -> Message | None:
        """Remove the first ready message and return it; None if there is none.

        ``wait``: sleep up to that many seconds for one (math.inf: forever).
        """
        low, high = id_bounds(message_id, after, before)
        return await self._first(lambda: self._take(low, high, 1), low, high, wait)

    async def read_many(self, limit: int, *, after: Id = None, before: Id = None) -> list[Message]:
        """Remove up to ``limit`` ready messages in one transaction and return them."""
        return await self._take(*id_bounds(None, after, before), checked_limit(limit))

    async def read_all(
        self, *, after: Id = None, before: Id = None, lease: float = LEASE_S
    ) -> AsyncGenerator[Message, None]:
        """Iterate over the ready messages; each is removed when the loop asks for the next (at least once).

        What was leased and not removed is given back when the iterator is closed. A loop that may be left
        early closes it at once with ``async with contextlib.aclosing(...)`` (Python 3.10), or by aclose().
        """
        low, high = id_bounds(None, after, before)
        size = 4
        async with LeaseKeeper(self, lease) as keeper:
            while True:
                batch = await keeper.take(size, low, high)
                for message in batch:
                    yield message
                    await keeper.settle(message, self.ack(message))
                if not batch:
                    return
                size = next_size(size, batch)

    # -- peek: removes nothing

    async def peek(self, *, message_id: Id = None, after: Id = None, before: Id = None) -> Message | None:
        """Return the first ready message, or None; nothing is removed. By id, held ones are seen too."""
        low, high = id_bounds(message_id, after, before)
        if message_id is None:
            found = await self._look(low, high, 1)
        else:
            rows = await self.broker.fetch(sql.SELECT_ANY, (self.name, low, high, 1))
            found = [Message(row[1], row[0], self.name, row[2]) for row in rows]
        return found[0] if found else None

    async def peek_many(self, limit: int, *, after: Id = None, before: Id = None) -> list[Message]:
        """Return up to ``limit`` ready messages, the oldest first; nothing is removed."""
        return await self._look(*id_bounds(None, after, before), checked_limit(limit))

    async def peek_all(self, *, after: Id = None, before: Id = None) -> AsyncGenerator[Message, None]:
        """Iterate over the ready messages, page by page. It goes on by id: none is skipped."""
        low, high = id_bounds(None, after, before)
        size = 4
        while True:
            page = await self._look(low, high, size)
            for message in page:
                yield message
            if len(page) < size:
                return
            low, size = page[-1].id, next_size(size, page)

    async def has_pending(self, *, message_id: Id = None, after: Id = None, before: Id = None) -> bool:
        """Is a message ready? (With a lower bound: a newer one than that?)"""
        return await self._pending(*id_bounds(message_id, after, before))

    async def count(self) -> int:
        """How many messages are ready (approximate while others write)."""
        count: int = (await self.broker.fetch(sql.SELECT_COUNT, (self.name, self.broker.clock())))[0][0]
        return count

    async def stats(self) -> Stats:
        """How many messages are ready, leased and delayed (approximate while others write)."""
        return Stats(*(await self.broker.fetch(sql.SELECT_STATS, (self.name, self.broker.clock())))[0])

    # -- lease, then acknowledge, extend, release or dead-letter: at least once

    async def lease(
        self,
        seconds: float = LEASE_S,
        *,
        message_id: Id = None,
        after: Id = None,
        before: Id = None,
        wait: float | None = None,
    ) -> Message | None:
        """Hide the first ready message from others for that many seconds and return it; None if none.

        ack() it when it is done with; otherwise it is ready again when the lease ends. ``wait`` as in read().
        """
        low, high = id_bounds(message_id, after, before)
        checked_ns(seconds, "lease")
        return await self._first(lambda: self._lease(seconds, low, high, 1), low, high, wait)

    async def lease_many(self, limit: int, seconds: float = LEASE_S) -> list[Message]:
        """Lease up to ``limit`` ready messages in one transaction. One that was leased before comes alone."""
        return await self._lease(seconds, 0, sql.MAX_ID, checked_limit(limit))

    async def ack(self, message: Message) -> None:
        """Acknowledge: remove a message that you leased. LeaseLost if someone else has it now."""
        check_leased(message)

        async def work() -> None:
            if await self._check_lease(message):  # the highest id of all goes: it must not be given out again
                await self.broker.run(sql.RECORD_NEWEST)
            await self.broker.run(sql.DELETE_MESSAGE, (message.id,))

        await self.broker.transact(work)

    async def extend(self, message: Message, seconds: float = LEASE_S) -> None:
        """Let the lease end that many seconds from now. LeaseLost if someone else has the message."""
        check_leased(message)
        until = self.broker.clock() + checked_ns(seconds, "lease")
        await self._settle(message, sql.RENEW_LEASE, (message.id, self.name, message.attempt, until), durable=False)

    async def release(self, message: Message, *, delay: float | None = None) -> None:
        """Give a leased message back: ready at once, or after ``delay`` seconds. LeaseLost as in ack()."""
        check_leased(message)
        until = self.broker.held_until(delay, None)
        await self._settle(message, sql.RELEASE_MESSAGE, (message.id, until), durable=False)

    async def dead_letter(self, message: Message, dest: str | None = None) -> None:
        """Move a leased message to another queue, by default QUEUE.dead. LeaseLost as in ack()."""
        check_leased(message)
        target = self.broker.checked_name(dest if dest is not None else self.name + ".dead")
        await self._settle(message, sql.MOVE_MESSAGE, (message.id, target), durable=True)

    # -- move and delete

    async def move(
        self,
        dest: str,
        *,
        message_id: Id = None,
        after: Id = None,
        before: Id = None,
    ) -> Message | None:
        """Move the first ready message to another queue and return it; None if there is none."""
        moved = await self._move(dest, *id_bounds(message_id, after, before), 1)
        return moved[0] if moved else None

    async def move_many(self, dest: str, limit: int, *, after: Id = None, before: Id = None) -> list[Message]:
        """Move up to ``limit`` ready messages in one transaction and return them."""
        return await self._move(dest, *id_bounds(None, after, before), checked_limit(limit))

    async def move_all(self, dest: str, *, after: Id = None, before: Id = None) -> int:
        """Move all ready messages, in transactions of limited size; return how many."""
        low, high = id_bounds(None, after, before)
        count, size = 0, 4
        while True:
            batch = await self._move(dest, low, high, size)
            count += len(batch)
            if len(batch) < size:
                return count
            size = next_size(size, batch)

    async def delete(self, *, message_id: Id = None) -> int:
        """Remove one message, or all of the queue, held ones too; return how many were removed."""
        broker = self.broker
        wanted = None if message_id is None else checked_id(message_id, "message_id")

        async def work() -> int:
            await broker.run(sql.RECORD_NEWEST)
            if wanted is not None:
                found = len(await broker.run(sql.SELECT_MESSAGE, (wanted, self.name)))
                if found:
                    await broker.run(sql.DELETE_MESSAGE, (wanted,))
                return found
            count: int = sum((await broker.run(sql.SELECT_STATS, (self.name, broker.clock())))[0])
            await broker.run(sql.DELETE_READY, (self.name, 0, sql.MAX_ID))
            await broker.run(sql.DELETE_HELD, (self.name,))
            return count

        return await broker.transact(work)

    # -- the steps that several methods share

    async def _take(self, low: int, high: int, limit: int) -> list[Message]:
        broker = self.broker

        async def work() -> list[Message]:
            rows = await self._select_ready(low, high, limit)
            if rows:
                last = rows[-1][0]
                if last == rows[-1][3]:  # the highest id of all goes: it must not be given out again
                    await broker.run(sql.RECORD_NEWEST)
                await broker.run(sql.DELETE_READY, (self.name, low, last + 1))
            return [Message(row[1], row[0], self.name, row[2]) for row in rows]

        def undo(messages: list[Message]) -> None:
            async def put_back() -> None:
                await broker.run_many(sql.INSERT_LOADED, [(m.id, m.queue, str(m), None, m.attempt) for m in messages])

            if messages:
                broker.later(put_back, f"putting back what a cancelled read() of {self.name} took", durable=True)

        return await broker.transact(work, undo)

    async def _lease(self, seconds: float, low: int, high: int, limit: int) -> list[Message]:
        broker = self.broker
        lease_ns = checked_ns(seconds, "lease")

        async def work() -> list[Message]:
            rows = await self._select_ready(low, high, limit)
            # One that was leased before is leased alone: if it kills its consumers, the others of the batch
            # must not use up their attempts with it.
            fresh = next((n for n, row in enumerate(rows) if row[2]), len(rows))
            rows = rows[: max(1, fresh)]
            if rows:
                await broker.run(sql.LEASE_READY, (self.name, low, rows[-1][0] + 1, broker.clock() + lease_ns))
            return [Message(row[1], row[0], self.name, row[2] + 1) for row in rows]

        return await broker.transact(work, self.unlease_later, durable=False)

    def unlease_later(self, messages: Sequence[Message]) -> None:
        """Give back messages that nobody has seen, as if they had not been leased. Returns at once."""
        if messages:
            what = f"giving back what a cancelled lease() of {self.name} took"
            self.broker.later(lambda: self.unlease(messages), what, durable=False)

    async def unlease(self, messages: Iterable[Message]) -> None:
        """The same, within the work of transact()."""
        await self.broker.run_many(sql.UNLEASE_MESSAGE, [(m.id, m.queue, m.attempt) for m in messages])

    async def _move(self, dest: str, low: int, high: int, limit: int) -> list[Message]:
        target = self.broker.checked_name(dest)
        if target == self.name:
            raise ValueError(f"source and destination are the same queue, {dest!r}")

        async def work() -> list[Message]:
            rows = await self._select_ready(low, high, limit)
            if rows:
                await self.broker.run(sql.MOVE_READY, (self.name, low, rows[-1][0] + 1, target))
            return [Message(row[1], row[0], target) for row in rows]

        return await self.broker.transact(work)

    async def _select_ready(self, low: int, high: int, limit: int) -> list[Any]:
        """The first ready rows in a range, after what is due became ready."""
        now = self.broker.clock()
        rows = await self.broker.run(sql.SELECT_READY, (self.name, low, high, limit, now))
        if not rows or rows[0][4]:
            await self.broker.run(sql.PROMOTE_DUE, (now,))
            rows = await self.broker.run(sql.SELECT_READY, (self.name, low, high, limit, now))
        return rows

    async def _look(self, low: int, high: int, limit: int) -> list[Message]:
        rows = await self.broker.fetch(sql.SELECT_PEEK, (self.name, low, high, limit, self.broker.clock()))
        return [Message(row[1], row[0], self.name, row[2]) for row in rows]

    async def _pending(self, low: int, high: int) -> bool:
        rows = await self.broker.fetch(sql.SELECT_PENDING, (self.name, low, high, self.broker.clock()))
        return bool(rows[0][0])

    async def _settle(self, message: Message, statement: str, params: Sequence[Any], *, durable: bool) -> None:
        async def work() -> None:
            await self._check_lease(message)
            await self.broker.run(statement, params)

        await self.broker.transact(work, durable=durable)

    async def _check_lease(self, message: Message) -> bool:
        """LeaseLost unless the message is where its holder left it. True if its id is the highest of all."""
        found = await self.broker.run(sql.SELECT_MESSAGE, (message.id, self.name))
        if not found:
            gone = "it was acknowledged, moved or deleted"
            raise LeaseLost(f"message {message.id} is no longer in {self.name!r}: {gone}")
        attempt, newest = found[0]
        if attempt != message.attempt:
            now = f"attempt {attempt} has the message now"
            raise LeaseLost(f"the lease {message.id}.{message.attempt} ended, and {now}")
        return bool(newest == message.id)

    async def _first(
        self, attempt: Callable[[], Awaitable[list[Message]]], low: int, high: int, wait: float | None
    ) -> Message | None:
        """Try once, or until there is a message or the time is over. Looks without the writer lock first."""
        if wait is None:
            found = await attempt()
            return found[0] if found else None
        if isinstance(wait, bool) or not wait >= 0:
            raise ValueError(f"wait is a number of seconds from 0, not {wait!r}")
        deadline = time.monotonic() + wait
        found = await attempt() if await self._pending(low, high) else []
        if found or not wait:
            return found[0] if found else None
        async with self.broker.changes() as changed:
            while True:
                changed.clear()
                found = await attempt() if await self._pending(low, high) else []
                if found:
                    return found[0]
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                await wait_for_event(changed, left)


# ---------------------------------------------------------------------------------------------------
# Consumers: leases that are renewed, and workers.
# ---------------------------------------------------------------------------------------------------


class LeaseKeeper:
    """The leases of one consumer: renewed in the background until they are settled, given back at the end."""

    def __init__(self, queue: AsyncQueue, lease_s: float) -> None:
        if not checked_ns(lease_s, "lease"):
            raise ValueError("lease must be more than 0 seconds")
        self._queue = queue
        self._lease_s = lease_s
        self._open: dict[int, Message] = {}

    async def __aenter__(self) -> LeaseKeeper:
        self._queue.broker.keep(self)
        self._renewing = asyncio.ensure_future(self._renew())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End renewing, and give back what was taken and not settled, as if it had not been leased."""
        self._renewing.cancel()
        self._queue.broker.unkeep(self)
        left, self._open = list(self._open.values()), {}
        if left:
            try:
                await self._queue.broker.transact(lambda: self._queue.unlease(left), durable=False)
            except OperationalError as error:
                LOG.warning("queue %s: %d leases end by themselves: %s", self._queue.name, len(left), error)

    async def take(self, limit: int, low: int = 0, high: int = sql.MAX_ID) -> list[Message]:
        """Lease up to ``limit`` messages."""
        batch = await self._queue._lease(self._lease_s, low, high, limit)
        self._open.update((message.id, message) for message in batch)
        return batch

    async def settle(self, message: Message, verdict: Awaitable[None]) -> bool:
        """Renew it no longer, and acknowledge, release or dead-letter it, also if the caller is cancelled
        meanwhile. False, and logged, if that failed: then someone else has it, or gets it when its lease ends."""
        self._open.pop(message.id, None)
        try:
            await asyncio.shield(verdict)
        except (LeaseLost, OperationalError) as error:
            LOG.warning("queue %s: %s", self._queue.name, error)
            return False
        return True

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                if self._open:
                    await self._queue.broker.transact(self._renew_open, durable=False)
            except OperationalError as error:  # the consumer meets the same error itself
                LOG.warning("renewing leases failed, trying again: %s", error)

    async def _renew_open(self) -> None:
        until = self._queue.broker.clock() + checked_ns(self._lease_s, "lease")
        rows = [(message.id, message.queue, message.attempt, until) for message in self._open.values()]
        await self._queue.broker.run_many(sql.RENEW_LEASE, rows)


class AsyncWorker:
    """Calls ``await handler(message)`` for every message of a queue, ``concurrency`` at a time (at least once).

    A message is leased, handled and then acknowledged; its lease is renewed meanwhile. A handler that raises
    gives it back with a growing delay; after ``max_attempts`` it moves to ``dead_letter`` (QUEUE.dead).
    ``drain``: end when nothing is ready and all handlers have ended.
    """

    def __init__(
        self,
        queue: AsyncQueue,
        handler: Callable[[Message], Awaitable[object]],
        *,
        concurrency: int = 8,
        lease: float = LEASE_S,
        max_attempts: int = MAX_ATTEMPTS,
        dead_letter: str | None = None,
        backoff: float = BACKOFF_S,
        drain: bool = False,
    ) -> None:
        self._queue = queue
        self._handler = handler
        self._concurrency = checked_limit(concurrency)
        self._keeper = LeaseKeeper(queue, lease)
        self._max_attempts = checked_limit(max_attempts)
        self._dead_letter = queue.broker.checked_name(queue.name + ".dead" if dead_letter is None else dead_letter)
        self._backoff = backoff
        self._drain = drain
        self._stopping = self._cancelled = False
        self._changed: asyncio.Event | None = None
        self._running: set[asyncio.Future[None]] = set()
        self.handled = self.failed = self.dead_lettered = 0  # messages, attempts, messages

    def stop(self) -> None:
        """Take nothing more; run() returns when the running handlers have ended. For signal handlers of the
        loop: ``loop.add_signal_handler(signal.SIGTERM, worker.stop)``."""
        self._stopping = True
        if self._changed is not None:
            self._changed.set()

    async def run(self) -> None:
        """Work until stop(). If this task is cancelled, so are the handlers, and their messages are given back."""
        async with self._keeper, self._queue.broker.changes() as changed:
            self._changed = changed
            try:
                await self._lease_and_start(changed)
                if self._running:
                    await asyncio.wait(self._running)
            finally:
                self._cancelled = True
                for task in self._running:  # none, unless this task was cancelled or failed
                    task.cancel()
                await asyncio.gather(*self._running, return_exceptions=True)

    async def _lease_and_start(self, changed: asyncio.Event) -> None:
        batch: list[Message] = []
        while not self._stopping:
            changed.clear()
            batch = await self._take(self._concurrency - len(self._running), look_first=not batch)
            for message in batch if not self._stopping else ():  # the keeper gives them back
                task = asyncio.ensure_future(self._attempt(message))
                self._running.add(task)
                task.add_done_callback(self._ended)
            if not batch:
                # What gave its message back after the look has set the event, and it is there again.
                if self._drain and not self._running and not changed.is_set():
                    return
                await wait_for_event(changed, math.inf)

    async def _take(self, free: int, *, look_first: bool) -> list[Message]:
        """Lease up to so many messages. Looking first, when the queue may be empty, spares the writer lock."""
        try:
            if not free or (look_first and not await self._queue.has_pending()):
                return []
            return await self._keeper.take(free)
        except OperationalError as error:  # busy, or a full disk: nothing is lost, go on later
            LOG.warning("worker of %s: %s", self._queue.name, error)
            await asyncio.sleep(BUSY_PAUSE_S)
            return []

    def _ended(self, task: asyncio.Future[None]) -> None:
        self._running.discard(task)
        if self._changed is not None:
            self._changed.set()
        if not task.cancelled() and task.exception() is not None:
            LOG.error("worker of %s: a message could not be settled", self._queue.name, exc_info=task.exception())

    async def _attempt(self, message: Message) -> None:
        """Handle a leased message and settle it."""
        if message.attempt > self._max_attempts:  # it killed its consumers before they could say so
            await self._bury(message)
            return
        try:
            await self._handler(message)
        except (Exception, asyncio.CancelledError) as error:
            if self._cancelled:  # run() was: the keeper gives the message back
                raise
            LOG.error("message %d: handler failed, attempt %d", message.id, message.attempt, exc_info=error)
            self.failed += 1
            if message.attempt >= self._max_attempts:
                await self._bury(message)
            else:
                delay = min(MAX_BACKOFF_S, self._backoff * 2.0 ** min(message.attempt - 1, 60))
                await self._keeper.settle(message, self._queue.release(message, delay=delay))
            return
        if await self._keeper.settle(message, self._queue.ack(message)):
            self.handled += 1

    async def _bury(self, message: Message) -> None:
        if await self._keeper.settle(message, self._queue.dead_letter(message, self._dead_letter)):
            self.dead_lettered += 1


# ---------------------------------------------------------------------------------------------------
# The demonstration and the benchmark.
# ---------------------------------------------------------------------------------------------------


def check(what: str, is_true: bool) -> None:
    """Print what was found out; end with an error if it is not so."""
    print(f"{'ok  ' if is_true else 'FAIL'}  {what}")
    if not is_true:
        raise SystemExit(1)


async def demonstrate_queue(broker: AsyncBrokerCore) -> None:
    """The life of a message."""
    tasks = broker.queue("tasks")
    ids = [await tasks.write("a"), *await tasks.write_many(["b", "c"]), await tasks.write("later", delay=0.2)]
    check("ids grow, whoever gives them out", ids == sorted(set(ids)))
    check("read removes the first message", await tasks.read() == "a" and await tasks.count() == 2)
    message = await tasks.lease(30)
    check("a leased message is hidden", message == "b" and await tasks.peek() == "c")
    assert message is not None
    await tasks.ack(message)
    check("move keeps the id", await tasks.move("done") == "c" and (await tasks.stats()).total == 1)
    check("a delayed message comes when it is due", await tasks.read(wait=5) == "later")
    check("broadcast writes to every queue", await broker.broadcast("stop") == ["done"])
    check("read_all empties a queue", [m async for m in broker.queue("done").read_all()] == ["c", "stop"])


async def demonstrate_sharing(broker: AsyncBrokerCore, count: int) -> None:
    """Tasks here and a process with the synchronous API write to one queue and empty it together."""
    shared = broker.queue("shared")
    command = [sys.executable, simplebroker.__file__, "-f", broker.path]
    writer = await asyncio.create_subprocess_exec(*command, "write", "shared", "--lines", stdin=asyncio.subprocess.PIPE)
    lines = "".join(f"process {n}\n" for n in range(count)).encode()
    await asyncio.gather(writer.communicate(lines), *(shared.write(f"task {n}") for n in range(count)))

    messages = await shared.peek_many(3 * count)
    ids = [message.id for message in messages]
    check(f"{2 * count} messages of both, ids ascending", len(ids) == 2 * count and ids == sorted(set(ids)))

    here: list[str] = []

    async def handler(message: Message) -> None:
        here.append(message)

    reader = await asyncio.create_subprocess_exec(*command, "read", "shared", "--all", stdout=asyncio.subprocess.PIPE)
    (output, _), _ = await asyncio.gather(
        reader.communicate(), AsyncWorker(shared, handler, concurrency=8, drain=True).run()
    )
    everything = sorted(here + output.decode().splitlines())
    check("each was handled once, by one of both", everything == sorted(messages) and not await shared.has_pending())


async def demonstrate_shutdown(broker: AsyncBrokerCore, count: int) -> None:
    """A worker is stopped in the middle of its work: what it has begun it finishes, the rest stays."""
    orders = broker.queue("orders")
    await orders.write_many([str(n) for n in range(count)] + ["poison"])
    begun: list[str] = []
    ended: list[str] = []

    async def handler(message: Message) -> None:
        if message == "poison":
            raise ValueError("this message always fails")
        begun.append(message)
        if len(begun) == count // 2:
            worker.stop()
        await asyncio.sleep(0.01)
        ended.append(message)

    worker = AsyncWorker(orders, handler, concurrency=8)
    await worker.run()
    check("stop() lets the running handlers end", sorted(begun) == sorted(ended) and worker.handled == len(ended))
    check("nothing is lost", len(ended) + (await orders.stats()).ready == count + 1)

    LOG.setLevel(logging.CRITICAL)  # the failures are meant
    worker = AsyncWorker(orders, handler, max_attempts=3, backoff=0.0, drain=True)
    await worker.run()
    LOG.setLevel(logging.NOTSET)
    dead = await broker.queue("orders.dead").read()
    check("a message that always fails is dead-lettered", dead == "poison" and worker.dead_lettered == 1)
    check("the rest is handled", sorted(map(int, ended)) == list(range(count)) and not await orders.has_pending())


async def benchmark(broker: AsyncBrokerCore, count: int) -> None:
    """Operations per second, beside those of the synchronous Queue on the same file."""
    queue = broker.queue("benchmark")
    body = "x" * 100
    threads = ThreadPoolExecutor(8)
    print(f"\n{count} messages of {len(body)} bytes, BROKER_SYNC_MODE={broker.settings.sync_mode}")

    async def measured(what: str, messages: int, tasks: int, calls: int, step: Callable[[], Awaitable[object]]) -> None:
        async def task() -> None:
            for _ in range(calls // tasks):
                await step()

        begin = time.perf_counter()
        await asyncio.gather(*(task() for _ in range(tasks)))
        rate = messages / (time.perf_counter() - begin)
        print(f"{what:<28} {tasks:>2} {'task ' if tasks == 1 else 'tasks'} {rate:>9,.0f}/s")

    async def lease_and_ack() -> None:
        message = await queue.lease()
        assert message is not None
        await queue.ack(message)

    async def handler(message: Message) -> None:
        pass

    def in_thread(call: Callable[[], object]) -> Callable[[], Awaitable[object]]:
        return lambda: asyncio.get_running_loop().run_in_executor(threads, call)

    with simplebroker.Queue("benchmark", broker.path, settings=broker.settings) as plain:
        for tasks in (1, 8, 64):
            await measured("Queue.write in threads", count, tasks, count, in_thread(lambda: plain.write(body)))
            await measured("Queue.read in threads", count, tasks, count, in_thread(plain.read))
    for tasks in (1, 8, 64):
        await measured("write", count, tasks, count, lambda: queue.write(body))
        await measured("read", count, tasks, count, queue.read)
    await measured("write_many", 10 * count, 1, 1, lambda: queue.write_many([body] * (10 * count)))
    await measured("peek", count, 8, count, queue.peek)
    await measured("lease and ack", count, 8, count, lease_and_ack)
    await measured("read_many(100)", 4 * count, 1, 4 * count // 100, lambda: queue.read_many(100))
    await queue.delete()
    await queue.write_many([body] * count)
    await measured("AsyncWorker, 8 at a time", count, 1, 1, AsyncWorker(queue, handler, drain=True).run)
    threads.shutdown()


async def main(path: str, count: int) -> None:
    """Everything, on the database at the path; the benchmark with so many messages."""
    async with AsyncBrokerCore(path) as broker:
        await demonstrate_queue(broker)
        await demonstrate_sharing(broker, 500)
        await demonstrate_shutdown(broker, 40)
        await benchmark(broker, count)
    print("\nAll checks passed.")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(os.path.join(directory, "broker.db"), int(sys.argv[1]) if len(sys.argv) > 1 else 1024))
