#!/usr/bin/env python3
"""A native asyncio broker on aiosqlite and aiosqlitepool: SimpleBroker's Queue, with await.

    pip install aiosqlite aiosqlitepool

    async with AsyncBrokerCore("tasks.db") as broker:
        tasks = broker.queue("tasks")
        await tasks.write("hello")
        message = await tasks.lease(30, wait=5)
        await tasks.ack(message)

async_wrapper.py does the same with threads and without dependencies, and is the first choice. The file, the ids and the
statements are SimpleBroker's own, so tasks, threads, other processes and the command line share queues. One connection
writes, at synchronous=FULL; a pool of others serves peek, count and the like. One thread listens for changes.

A call that has begun is finished, also when its task is cancelled. What a cancelled read() or lease() has taken is put
back, and what read_all() and watch() have leased is given back when they are left, however often they are cancelled.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Callable, Union

import aiosqlite
from aiosqlitepool import SQLiteConnectionPool

# Find simplebroker.py beside this file or one directory above it. Not needed when it is installed.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(d) for d in (HERE, HERE.parent) if (d / "simplebroker.py").exists()]

import simplebroker as core  # noqa: E402
from simplebroker import Broker, LeaseLost, Message, OperationalError, Settings, Stats, ext  # noqa: E402

READERS, GROUP = 4, 32  # connections in the pool; calls in one transaction (other processes wait meanwhile)
CONCURRENCY = 8  # handlers of a watch that run at the same time
LEASE_S, MAX_ATTEMPTS = 30.0, 5
BACKOFF_S = 0.5  # before the second attempt; doubles with each further one, up to 300
PAUSE_S = 0.05  # between two looks of close() at what still runs, and of a watch at a busy database

Id = Union[int, str, None]
Run = Callable[..., Awaitable[list[Any]]]  # of statements in a transaction
Work = Callable[..., Awaitable[Any]]


async def finish(job: asyncio.Future[Any]) -> Any:
    """Wait for a job to its end, also when the task is cancelled meanwhile, however often."""
    cancelled = None
    while not job.done():
        try:
            await asyncio.wait([job])  # which does not cancel the job
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return job.result()
    raise cancelled from job.exception()


class AsyncBrokerCore:
    """All queues of one database, for one event loop. Use it with ``async with``, and not in a forked child."""

    def __init__(self, db_path: str | os.PathLike[str] | None = None, *, settings: Settings | None = None) -> None:
        self.broker = Broker(db_path, settings=settings)  # makes the file, and listens
        self.settings, self.path, self.clock = self.broker.settings, self.broker.path, self.broker.clock
        self.consumers: set[Consumer] = set()  # that may hold leases
        self.stopping = False
        self._lock = core.WriterLock(self.path)  # for the task that writes
        self._line: list[tuple[Work, asyncio.Future[Any]]] = []  # what is to be done in the next transactions
        self._notify = self._is_open = False

    async def __aenter__(self) -> AsyncBrokerCore:
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()  # held by the task that writes
        self.changed = self._loop.create_future()  # done at the next change; then there is another one
        await self._loop.run_in_executor(None, self.broker.transact, lambda run: None)  # refuses a file that is none
        self._identity = core.file_identity(self.path)
        self.writer = await self._connect(read_only=False)
        self._pool = SQLiteConnectionPool(self._connect, pool_size=READERS)
        self._is_open = True
        self._waiter = self.broker.waiter()
        self._listener = self._loop.run_in_executor(None, self._listen)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def stop(self) -> None:
        """End loops over read_all(), watches and waiting after the message in hand. Returns at once."""
        self.stopping = True
        self.announce()

    async def close(self) -> None:
        """stop(), wait for loops and watches, and disconnect. What a loop that was left still holds is given back."""
        if self._is_open:
            await finish(asyncio.ensure_future(self._close(asyncio.current_task())))

    async def _close(self, caller: asyncio.Task[Any] | None) -> None:
        self.stop()
        while busy := [each.task for each in self.consumers if each.task is not caller and not each.task.done()]:
            await asyncio.wait(busy, timeout=PAUSE_S)
        for consumer in list(self.consumers):
            await consumer.close()
        if not self._is_open:  # another task closes it too, and has come here first
            return
        self._is_open = False
        while self._line or self._turn.locked():  # what has begun is finished
            await asyncio.sleep(PAUSE_S)
        await self.writer.close()
        await self._pool.close()
        self._waiter.wake()
        await self._listener
        self._lock.close()
        self.broker.close()

    def queue(self, name: str) -> AsyncQueue:
        return AsyncQueue(self, name)

    async def fetch(self, statement: str, params: Any = ()) -> list[Any]:
        """Run one reading statement on a connection of the pool and return its rows."""
        return await finish(asyncio.ensure_future(self._fetch(statement, params)))

    async def transact(self, work: Work) -> Any:
        """Do ``await work(run)`` in a write transaction, and return its result after the commit.

        It awaits ``run(statement, params)``, and nothing else: other processes wait meanwhile.
        """
        if not self._is_open:
            raise core.UsageError("the broker is not open: use 'async with AsyncBrokerCore(...) as broker'")
        done = self._loop.create_future()
        self._line.append((work, done))
        await finish(asyncio.ensure_future(self._commit(done)))
        return done.result()

    def announce(self) -> None:
        """Let all waiting tasks look again. Each has taken the future before it looked, so that none misses it."""
        changed, self.changed = self.changed, self._loop.create_future()
        changed.set_result(None)

    async def _commit(self, done: asyncio.Future[Any]) -> None:
        """Do what is in line, if nobody else has done it before it was this task's turn."""
        async with self._turn:
            if not done.done():
                group, self._line = self._line[:GROUP], self._line[GROUP:]
                try:
                    outcomes = await self._perform([work for work, _ in group])
                except BaseException as error:  # noqa: BLE001 - it belongs to the tasks that wait
                    outcomes = [error if isinstance(error, Exception) else OperationalError(repr(error))] * len(group)
                for (_, waiting), outcome in zip(group, outcomes):
                    (waiting.set_exception if isinstance(outcome, Exception) else waiting.set_result)(outcome)
        done.exception()  # it counts as looked at, also if the caller is cancelled

    async def _perform(self, works: list[Work]) -> list[Any]:
        """Do a group in one transaction, each in a savepoint. Return their results, or errors."""
        try:
            self._lock.acquire(0.0)
        except OperationalError:  # another process has it: wait in a thread
            deadline = time.monotonic() + self.settings.busy_timeout_ms / 1000
            await self._loop.run_in_executor(None, self._lock.acquire, deadline)
        try:
            if core.file_identity(self.path) != self._identity:  # what is written to a deleted file is lost
                raise OperationalError(f"{self.path!r} was deleted or replaced: close this broker, open a new one")
            self._notify = False
            await self._run("BEGIN IMMEDIATE")
            outcomes = [await self._perform_one(work) for work in works] if works[1:] else [await works[0](self._run)]
            await self._run("COMMIT")
            if self._notify:
                self._lock.notify()
            return outcomes
        except BaseException:
            await self.writer.rollback()
            raise
        finally:
            self._lock.release()

    async def _perform_one(self, work: Work) -> Any:
        await self._run("SAVEPOINT one")
        try:
            outcome = await work(self._run)
        except Exception as error:  # noqa: BLE001 - it belongs to the task that asked
            await self._run("ROLLBACK TO one")  # fails if SQLite has rolled everything back: a full disk
            outcome = error
        await self._run("RELEASE one")
        return outcome

    async def _run(self, statement: str, params: Any = ()) -> list[Any]:
        self._notify = self._notify or statement in ext.NOTIFYING
        return list(await self.writer.execute_fetchall(statement, params))

    async def _fetch(self, statement: str, params: Any) -> list[Any]:
        async with self._pool.connection() as connection:
            return list(await connection.execute_fetchall(statement, params))

    async def _connect(self, *, read_only: bool = True) -> aiosqlite.Connection:
        uri, timeout_s = Path(self.path).as_uri() + "?mode=rw", self.settings.busy_timeout_ms / 1000
        connection = await aiosqlite.connect(uri, uri=True, timeout=timeout_s, isolation_level=None)
        connection.text_factory = lambda text: str(text, "utf-8", "replace")
        for pragma in ("trusted_schema = OFF", "synchronous = FULL", f"query_only = {int(read_only)}"):
            await connection.execute(f"PRAGMA {pragma}")
        return connection

    def _listen(self) -> None:
        with self._waiter:
            while self._is_open:
                self._waiter.wait()
                self._loop.call_soon_threadsafe(self.announce)


class AsyncQueue:
    """One queue. The methods are those of simplebroker.Queue, with the same arguments, results and errors."""

    def __init__(self, broker: AsyncBrokerCore, name: str) -> None:
        self.broker, self.name = broker, core.check_queue_name(name)

    async def write(self, body: str, **when: float | datetime | None) -> int:
        return (await self.write_many((body,), **when))[0]

    async def write_many(self, bodies: Iterable[str], **when: float | datetime | None) -> list[int]:
        """Append several messages in one transaction. ``delay`` or ``until`` says when they are ready."""
        if isinstance(bodies, (str, bytes)):
            raise TypeError("bodies is an iterable of str: a single body goes to write()")
        texts = [core.check_body(body, self.broker.settings.max_message_size) for body in bodies]
        due = core.due_time(**{"delay": None, "until": None, **when})

        async def insert(run: Run) -> list[int]:
            now = self.broker.clock()
            first = core.next_id(now, (await run(ext.SELECT_LAST_ID))[0][0], len(texts))
            rows = [(id, self.name, text, due(now)) for id, text in enumerate(texts, first)]
            await run(ext.INSERT_MESSAGE, rows[0])
            if rows[1:]:
                await self.broker.writer.executemany(ext.INSERT_MESSAGE, rows[1:])
            return [row[0] for row in rows]

        return await self.broker.transact(insert) if texts else []

    async def read(self, *, wait: float = 0, **filters: Id) -> Message | None:
        """Remove and return the first ready message; None if none came in ``wait`` seconds. With filters of Queue."""
        low, high = core.id_range(**filters)
        return next(iter(await self._find(lambda: self._take(low, high, 1), low, high, wait)), None)

    async def read_many(self, limit: int, *, after: Id = None, before: Id = None) -> list[Message]:
        return await self._take(*core.id_range(None, after, before), core.check_limit(limit))

    async def _take(self, low: int, high: int, limit: int) -> list[Message]:
        async def take(run: Run, rows: list[Any], bounds: tuple[Any, ...]) -> list[Message]:
            if rows[-1][0] == rows[-1][4]:  # the highest id of all goes: it must not come again
                await run(ext.RECORD_NEWEST)
            await run(ext.DELETE_READY, bounds)
            return [Message(body, id, self.name, attempt, None, why) for id, body, attempt, why, *_ in rows]

        def undo(message: Message) -> tuple[str, Any]:
            return ext.INSERT_LOADED, (message.id, self.name, str(message), None, message.attempt, message.reason)

        return await self._claim(low, high, limit, take, undo)

    async def lease(self, seconds: float = LEASE_S, *, wait: float = 0, **filters: Id) -> Message | None:
        low, high = core.id_range(**filters)
        return next(iter(await self._find(partial(self.lease_many, 1, seconds, **filters), low, high, wait)), None)

    async def lease_many(self, limit: int, seconds: float = LEASE_S, **filters: Id) -> list[Message]:
        """Lease up to ``limit`` messages in one transaction. One that was leased before comes alone."""
        lease_ns, (low, high) = core.to_ns(seconds, "lease"), core.id_range(**filters)

        async def take(run: Run, rows: list[Any], bounds: tuple[Any, ...]) -> list[Message]:
            fresh = next((n for n, row in enumerate(rows) if row[2]), len(rows))
            rows = rows[: max(1, fresh)]
            until, token = self.broker.clock() + lease_ns, int.from_bytes(os.urandom(8), "big") >> 1
            await run(ext.LEASE_READY, (until, token, self.name, low, rows[-1][0] + 1))
            return [Message(row[1], row[0], self.name, row[2] + 1, token, row[3], until, "leased") for row in rows]

        return await self._claim(low, high, limit, take, lambda message: (ext.UNDO_LEASE, (message.id, message.lease)))

    async def read_all(self, *, lease: float = LEASE_S, wait: float = 0, **filters: Id) -> AsyncIterator[Message]:
        """Iterate over the ready messages; each is removed when the loop asks for the next.

        ``wait``: for so many seconds for more; math.inf: until broker.stop(). When the loop is left, the message in
        hand is given back: CPython does that at once, PyPy later, contextlib.aclosing() at its end.
        """
        (low, high), size = core.id_range(**filters), 1
        async with Consumer(self, lease) as consumer:
            while batch := await self._find(lambda: consumer.take(size, **filters), low, high, wait):  # noqa: B023
                size = core.next_batch_size(size, batch)
                for message in batch:
                    if self.broker.stopping:
                        return
                    consumer.seen.add(message.id)
                    yield message
                    await consumer.settle(self.ack, message)

    async def watch(self, handler: Work, *, concurrency: int = CONCURRENCY, **options: Any) -> None:
        """Call ``await handler(message)`` for every message, several at a time, until broker.stop() or cancelled.

        A handler that raises gives its message back after ``backoff`` seconds, doubled for each further attempt, with
        the reason; after ``max_attempts`` the message moves to ``dead_letter``. The last option is ``lease``.
        """
        workers = [asyncio.ensure_future(self._work(handler, **options)) for _ in range(core.check_limit(concurrency))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await finish(asyncio.ensure_future(asyncio.wait(workers)))

    async def _work(
        self, handler: Work, *, lease: float = LEASE_S, max_attempts: int = MAX_ATTEMPTS, backoff: float = BACKOFF_S,
        dead_letter: str | None = None,
    ) -> None:  # fmt: skip
        dead_letter = self.broker.broker.queue(self.name).check_dead_letter(dead_letter)

        async def attempt(message: Message) -> None:
            consumer.seen.add(message.id)
            why, count = "lease ended", message.attempt - 1  # it killed its consumers before they could say so
            if message.attempt <= max_attempts:
                try:
                    await handler(message)
                    return await consumer.settle(self.ack, message)
                except Exception as error:  # noqa: BLE001 - whatever it is, the message comes again
                    why, count = core.describe(error), message.attempt
            if count >= max_attempts:
                core.logger().warning("queue %s: message %d is dead-lettered: %s", self.name, message.id, why)
                return await consumer.settle(self.dead_letter, message, dead_letter, reason=f"{why} (attempt {count})")
            return await consumer.settle(self.release, message, delay=core.backoff_s(backoff, count), reason=why)

        async with Consumer(self, lease) as consumer:
            while not self.broker.stopping:
                try:
                    for message in await self._find(lambda: consumer.take(1), 0, ext.MAX_ID + 1, 60):
                        await attempt(message)
                except sqlite3.OperationalError as error:  # busy, or a full disk: nothing is lost, go on later
                    core.logger().warning("watch of %s: %s", self.name, error)
                    await asyncio.sleep(PAUSE_S)

    async def ack(self, message: Message) -> None:
        await self._with_lease(message, ext.DELETE_MESSAGE, lambda: (message.id,))

    async def extend(self, message: Message, seconds: float = LEASE_S) -> None:
        ns, of = core.to_ns(seconds, "lease"), (message.id, message.lease)
        await self._with_lease(message, ext.EXTEND_LEASE, lambda: (self.broker.clock() + ns, *of))

    async def release(self, message: Message, *, delay: float | None = None, reason: str | None = None) -> None:
        due, why = core.due_time(delay, None), core.check_reason(reason)
        await self._with_lease(message, ext.RELEASE_MESSAGE, lambda: (due(self.broker.clock()), why, message.id))

    async def dead_letter(self, message: Message, dest: str | None = None, *, reason: str | None = None) -> None:
        dest, why = self.broker.broker.queue(self.name).check_dead_letter(dest), core.check_reason(reason)
        await self._with_lease(message, ext.MOVE_LEASED, lambda: (dest, why, message.id))

    async def _with_lease(self, message: Message, statement: str, params: Callable[[], tuple[Any, ...]]) -> None:
        """Run a statement on a message, if its lease is the last that was given."""
        if not isinstance(message, Message) or message.lease is None:
            raise ValueError(f"give the Message that lease() returned, not {core.shown(message)}")

        async def act(run: Run) -> None:
            rows = await run(ext.SELECT_LEASE, (message.id,))
            core.check_lease(lambda *_, **__: rows, message, removes=False)
            if statement == ext.DELETE_MESSAGE and rows[0][1] == message.id:  # the highest id of all goes
                await run(ext.RECORD_NEWEST)
            await run(statement, params())

        await self.broker.transact(act)

    async def peek(self, *, message_id: Id = None, after: Id = None, before: Id = None) -> Message | None:
        low, high = core.id_range(message_id, after, before)
        if message_id is None:
            return next(iter(await self.peek_many(1, after=after, before=before)), None)
        return next(map(self._message, await self.broker.fetch(ext.SELECT_ANY, (self.name, low, high))), None)

    async def peek_many(self, limit: int, *, after: Id = None, before: Id = None) -> list[Message]:
        limit, bounds, now = core.check_limit(limit), core.id_range(None, after, before), self.broker.clock()
        values = (self.name, *bounds, limit, self.name, now, *bounds, max(limit, ext.MAX_PROMOTED), limit)
        return list(map(self._message, await self.broker.fetch(ext.SELECT_PEEK, values)))

    def _message(self, row: Sequence[Any]) -> Message:
        id, body, attempt, reason, held_until, leased = row
        ready = held_until is None or held_until <= self.broker.clock()
        state = "ready" if ready else "leased" if leased else "delayed"
        return Message(body, id, self.name, attempt, None, reason, None if ready else held_until, state)

    async def has_pending(self, **filters: Id) -> bool:
        return (await self._look(*core.id_range(**filters)))[0]

    async def count(self) -> int:
        return (await self.broker.fetch(ext.SELECT_COUNT, (self.name, self.name, self.broker.clock())))[0][0]

    async def stats(self) -> Stats:
        return Stats(*(await self.broker.fetch(ext.SELECT_STATS, {"queue": self.name, "now": self.broker.clock()}))[0])

    async def move(self, dest: str, **filters: Id) -> Message | None:
        return next(iter(await self._move(dest, *core.id_range(**filters), 1)), None)

    async def move_many(self, dest: str, limit: int, *, after: Id = None, before: Id = None) -> list[Message]:
        return await self._move(dest, *core.id_range(None, after, before), core.check_limit(limit))

    async def _move(self, dest: str, low: int, high: int, limit: int) -> list[Message]:
        if core.check_queue_name(dest) == self.name:
            raise ValueError(f"source and destination are the same queue, {dest!r}")

        async def move(run: Run, rows: list[Any], bounds: tuple[Any, ...]) -> list[Message]:
            await run(ext.MOVE_READY, (dest, *bounds))
            return [Message(row[1], row[0], dest) for row in rows]

        return await self._claim(low, high, limit, move)

    async def delete(self, **filters: Id) -> int:
        bounds = (self.name, *core.id_range(**filters))

        async def delete(run: Run) -> int:
            await run(ext.RECORD_NEWEST)
            count: int = (await run(ext.SELECT_STORED, bounds * 2))[0][0]
            await run(ext.DELETE_READY, bounds)
            await run(ext.DELETE_HELD, bounds)
            return count

        return await self.broker.transact(delete)

    async def _claim(self, low: int, high: int, limit: int, take: Work, undo: Any = None) -> list[Message]:
        """Take the first ready messages between two ids. ``undo`` gives for each the statement that puts it back."""
        claimed: list[Message] = []

        async def claim(run: Run) -> None:
            now = self.broker.clock()
            select = (self.name, now, self.name, low, high, limit)
            rows = await run(ext.SELECT_READY, select)
            if not rows or rows[0][5]:  # something has become due
                await run(ext.PROMOTE_DUE, (self.name, now, low, high, max(limit, ext.MAX_PROMOTED)))
                rows = await run(ext.SELECT_READY, select)
            if rows:
                claimed.extend(await take(run, rows, (self.name, low, rows[-1][0] + 1)))

        def put_back() -> None:  # in a broker of its own: ours may be closed by then
            with Broker(self.broker.path, settings=self.broker.settings) as broker:
                broker.transact(lambda run: [run(*undo(message)) for message in claimed])

        try:
            await self.broker.transact(claim)
        except asyncio.CancelledError:
            if undo is not None:
                await finish(asyncio.get_running_loop().run_in_executor(None, put_back))
            raise
        return claimed

    async def _look(self, low: int, high: int) -> tuple[bool, float]:
        """Is a message ready? And in how many seconds, at most, is it time to look again?"""
        now = self.broker.clock()
        values = (self.name, low, high, self.name, now, low, high, self.name, now)
        pending, due = (await self.broker.fetch(ext.SELECT_PENDING, values))[0]
        return bool(pending), 1.0 if due is None else max(0.001, min(1.0, (due - now) / ext.NS))

    async def _find(self, take: Work, low: int, high: int, wait: float) -> list[Message]:
        """What take() finds; if that is nothing, try again when there may be something, for so many seconds."""
        deadline, found = time.monotonic() + wait, await take()
        while not found and (left := deadline - time.monotonic()) > 0 and not self.broker.stopping:
            changed = self.broker.changed
            pending, pause = await self._look(low, high)
            if pending:
                found = await take()
            else:
                await asyncio.wait([changed], timeout=min(pause, left))
        return found


class Consumer:
    """``async with Consumer(queue, seconds) as consumer:`` leases that are extended in the background."""

    def __init__(self, queue: AsyncQueue, lease_s: float) -> None:
        self.task: Any = asyncio.current_task()
        self.seen: set[int] = set()  # ids of the messages that were handed over
        self._queue, self._lease_s = queue, lease_s
        self._messages: dict[int, Message] = {}

    async def __aenter__(self) -> Consumer:
        self._queue.broker.consumers.add(self)
        self._extending = asyncio.ensure_future(self._extend())
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.close()
        finally:  # now broker.close() need not wait for it
            self._queue.broker.consumers.discard(self)

    async def take(self, limit: int, **filters: Id) -> list[Message]:
        batch = await self._queue.lease_many(limit, self._lease_s, **filters)
        self._messages.update((message.id, message) for message in batch)
        return batch

    async def settle(self, verdict: Callable[..., Awaitable[None]], message: Message, *args: Any, **more: Any) -> None:
        del self._messages[message.id]
        try:
            await verdict(message, *args, **more)
        except LeaseLost as error:  # someone else has it
            core.logger().warning("queue %s: %s", message.queue, error)

    async def close(self) -> None:
        """Give back what is left. The attempt counts of what was handed over."""
        self._extending.cancel()
        left, self._messages = self._messages, {}

        async def give_back(run: Run) -> None:
            for message in left.values():
                if message.id not in self.seen:
                    await run(ext.UNDO_LEASE, (message.id, message.lease))
                elif [row[0] for row in await run(ext.SELECT_LEASE, (message.id,))] == [message.lease]:
                    await run(ext.RELEASE_MESSAGE, (None, None, message.id))

        if left:
            await self._queue.broker.transact(give_back)

    async def _extend(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            for message in list(self._messages.values()):
                try:
                    await self._queue.extend(message, self._lease_s)
                except (LeaseLost, sqlite3.OperationalError) as error:  # its owner meets the same error
                    core.logger().warning("queue %s: a lease cannot be extended: %s", message.queue, error)


async def demonstrate(path: str) -> None:
    """Tasks that write; synchronous code on the same file; a watch that is stopped in the middle of its work."""
    handled: list[str] = []
    async with AsyncBrokerCore(path) as broker:
        orders = broker.queue("orders")
        await asyncio.gather(*(orders.write(str(number)) for number in range(100)))  # few commits
        with core.Queue("orders", path) as plain:  # as another process would
            print("written:", plain.count())

        async def handler(message: Message) -> None:
            handled.append(message)
            if len(handled) == 50:
                broker.stop()  # a signal handler would call this
            if message == "0":
                raise ValueError("no such order")

        await orders.watch(handler, max_attempts=1)
        print("handled at least 50:", len(handled) >= 50, "in all:", len(handled) + (await orders.stats()).total)
        print("dead because:", (await broker.queue("orders.dead").peek()).reason)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(demonstrate(os.path.join(directory, "broker.db")))
