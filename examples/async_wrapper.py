#!/usr/bin/env python3
"""SimpleBroker for asyncio, with the standard library only.

    async with AsyncBroker("broker.db") as broker:
        await broker.push("tasks", "hello")
        print(await broker.pop("tasks"))                         # at most once; None if there is nothing
        async for message in broker.stream_messages("tasks"):    # at least once; waits for more
            await work(message)                                  # acknowledged when the loop asks for the next

Calls run in a few threads, which share the syncs of the disk. One more thread waits for changes, for all tasks: however
many tasks wait for a queue, it looks once for each queue and change. A call that has begun is finished, also when its
task is cancelled: what was acknowledged does not come again. A cancelled pop() puts its message back, and a stream that
is left gives back what it holds. Use an AsyncBroker in one event loop.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

# Find simplebroker.py beside this file or one directory above it. Not needed when it is installed.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(d) for d in (HERE, HERE.parent) if (d / "simplebroker.py").exists()]

from simplebroker import Broker, BrokerError, LeasesInFlight, Message, QueueWatcher, UsageError, ext  # noqa: E402

THREADS = 8
PAUSE_S = 0.1  # between two looks of close() at what still runs, and of the listener at a busy database


class AsyncBroker:
    """All queues of one database, for one event loop. ``path`` is as in ``Queue(name, path)``."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.broker = Broker(path)
        self._pool = ThreadPoolExecutor(THREADS, "async-broker")
        self._waiting: dict[asyncio.Future[None], str] = {}  # of each task that waits, the oldest first -> its queue
        self._users: dict[_Stream | QueueWatcher, Any] = {}  # open streams and watches -> the task that is in it
        self._stopping = self._closed = False

    async def __aenter__(self) -> AsyncBroker:
        self._loop = asyncio.get_running_loop()
        self._waiter = await self.call(self.broker.waiter)  # what the listener sleeps on
        self._listener = threading.Thread(target=self._listen, name="async-broker-listener", daemon=True)
        self._listener.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def push(self, queue: str, body: str, *, delay: float | None = None) -> int:
        """Append a message and return its id. It is durable when this returns."""
        return await self.call(lambda: self.broker.queue(queue).write(body, delay=delay))

    async def pop(self, queue: str, *, wait: float = 0) -> Message | None:
        """Remove and return the first message (at most once). None if none came in so many seconds, or stop()."""
        source, found = self.broker.queue(queue), []

        def take() -> list[Message]:
            found.extend(source.read_many(1) if source.has_pending() else [])
            return found

        def put_back() -> None:  # in a broker of its own: ours may be closed by now
            with Broker(self.broker.address) as broker:
                rows = [(each.id, queue, str(each), None, each.attempt, each.reason) for each in found]
                broker.transact(lambda run: [run(ext.INSERT_LOADED, row) for row in rows])

        try:
            await self._find(queue, take, wait)
        except asyncio.CancelledError:
            await _finish(self._loop.run_in_executor(None, put_back))
            raise
        return found[0] if found else None

    async def peek(self, queue: str) -> Message | None:
        """Return the first message, or None; nothing is removed."""
        return await self.call(self.broker.queue(queue).peek)

    async def size(self, queue: str) -> int:
        """How many messages are ready (approximate while others write)."""
        return await self.call(self.broker.queue(queue).count)

    async def stream_messages(
        self, queue: str, *, lease: float = ext.DEFAULT_LEASE_S, wait: float = math.inf
    ) -> AsyncIterator[Message]:
        """``async for message in broker.stream_messages(queue)``: at least once.

        A message is acknowledged when the loop asks for the next one. When the loop is left, the one in hand is given
        back: CPython does that at once, PyPy later, contextlib.aclosing() at its end. Ends after ``wait`` idle seconds.
        """
        stream = _Stream(self.broker.queue(queue), lease)
        stream.keep_alive()
        self._users[stream] = asyncio.current_task()
        try:
            while batch := await self._find(queue, stream.take, wait):
                for message in batch:
                    if self._stopping:
                        return
                    stream.in_hand = message
                    yield message
                    stream.in_hand = None
                    await self.call(lambda: stream.ack(message))  # noqa: B023 (it is called before the next)
        finally:
            if not self._closed:  # otherwise close() does it
                await self.call(stream.close)
            del self._users[stream]

    async def watch_queue(self, queue: str, handler: Callable[[Message, int], Any], **options: Any) -> None:
        """Call ``await handler(message, timestamp)`` for every message, at least once, until stop() or cancelled.

        It is a QueueWatcher in a thread of its own, with its options: max_attempts, error_handler, backoff and so on.
        The handler runs in the event loop, one message at a time, and is finished before the watch ends.
        """

        def call(message: Message, timestamp: int) -> None:
            asyncio.run_coroutine_threadsafe(handler(message, timestamp), self._loop).result()

        watcher = QueueWatcher(queue, call, db=self.broker, **options)
        self._users[watcher] = asyncio.current_task()
        thread = ThreadPoolExecutor(1, f"async-broker-watch-{queue}")
        try:
            if not self._stopping:
                await _finish(self._loop.run_in_executor(thread, watcher.watch), watcher.request_stop)
        finally:
            thread.shutdown(wait=False)
            del self._users[watcher]

    def stop(self) -> None:
        """End all waiting, and streams and watches after the message that they have in hand. Returns at once."""
        self._stopping = True
        self._wake(set())
        for watcher in [user for user in self._users if isinstance(user, QueueWatcher)]:
            watcher.request_stop()

    async def close(self) -> None:
        """stop(), wait until streams and watches have ended, and close the database. A handler calls stop() instead.

        A stream that its task has left, or that this task is in, is not waited for: it gives back what it holds.
        """
        self.stop()
        try:
            mine = asyncio.current_task()
            while busy := {task for task in self._users.values() if task is not mine and not task.done()}:
                await asyncio.wait(busy, timeout=PAUSE_S)
        finally:
            self._closed = True
            await _finish(self._loop.run_in_executor(None, self._close))

    def _close(self) -> None:
        for stream in [user for user in self._users if isinstance(user, _Stream)]:
            stream.close()
        self._waiter.wake()
        self._listener.join()
        self._pool.shutdown()
        self.broker.close()

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in a thread, such as ``broker.broker.queue("tasks").requeue``."""
        if self._closed:
            raise UsageError("the AsyncBroker was closed: make a new one")
        return await _finish(self._loop.run_in_executor(self._pool, function))

    async def _find(self, queue: str, take: Callable[[], list[Message]], wait: float) -> list[Message]:
        """What take() finds; if that is nothing, try again when there may be something, for so many seconds."""
        deadline, ready = self._loop.time() + wait, None
        try:
            while not (found := await self.call(take)) and self._loop.time() < deadline and not self._stopping:
                ready = self._loop.create_future()
                self._waiting[ready] = queue
                self._waiter.wake()  # this queue is to be looked at too
                await asyncio.wait([ready], timeout=None if wait == math.inf else deadline - self._loop.time())
                if self._waiting.pop(ready, None) or self._stopping:  # the time is over
                    break
            return found
        finally:
            self._waiting.pop(ready, None)
            if queue in self._waiting.values():  # there may be a message for the next task too
                self._waiter.wake()

    def _listen(self) -> None:
        """The listener: at every change, look at each queue for which tasks wait, and wake the first of its tasks."""
        with self._waiter:
            while not self._closed and not self._loop.is_closed():
                try:
                    looks = {name: self.broker.queue(name).look() for name in {*list(self._waiting.values())}}
                except BrokerError:  # busy, or out of reach for a while: the tasks meet the same error
                    looks = dict.fromkeys(list(self._waiting.values()), (True, PAUSE_S))
                if pending := {name for name, (is_pending, _) in looks.items() if is_pending}:
                    self._loop.call_soon_threadsafe(self._wake, pending)
                self._waiter.wait(min([pause for _, pause in looks.values()], default=None))

    def _wake(self, pending: set[str]) -> None:
        """Let the first task that waits for each of these queues try; all tasks after stop()."""
        for ready, queue in list(self._waiting.items()):
            if self._stopping or queue in pending:
                pending.discard(queue)
                del self._waiting[ready]
                ready.set_result(None)


class _Stream(LeasesInFlight):
    """The leases of a stream, and the message that its loop has in hand."""

    in_hand = None

    def close(self) -> None:
        """Give back what is left: the message in hand, whose attempt counts, and those that nobody has seen."""
        with self:
            message, self.in_hand = self.in_hand, None
            if message is not None:
                self.release(message)


async def _finish(job: asyncio.Future[Any], on_cancel: Callable[[], None] = lambda: None) -> Any:
    """Wait for a job to its end, also when the task is cancelled meanwhile."""
    cancelled = None
    while not job.done():
        try:
            await asyncio.wait([job])  # which does not cancel the job
        except asyncio.CancelledError as error:
            cancelled = error
            on_cancel()
    if cancelled is None:
        return job.result()
    raise cancelled from job.exception()


async def demonstrate(db: Path) -> None:
    """Workers that share a queue, a watch whose handler fails, and a wait."""
    done: list[str] = []
    async with AsyncBroker(db) as broker:
        await asyncio.gather(*(broker.push("jobs", str(number)) for number in range(30)))  # they share syncs

        async def worker() -> None:
            async for message in broker.stream_messages("jobs", wait=0):  # 0: end when the queue is empty
                done.append(message)

        await asyncio.gather(worker(), worker(), worker())
        print("jobs:", len(done), "different:", len(set(done)), "left:", await broker.size("jobs"))

        async def handler(message: Message, timestamp: int) -> None:
            raise ValueError("no such job")

        watch = asyncio.create_task(broker.watch_queue("work", handler, max_attempts=2, error_handler=print))
        await broker.push("work", "bad")
        dead = await broker.pop("work.dead", wait=30.0)
    print("watch ended:", watch.done(), "dead:", dead, "because:", dead.reason)  # leaving the block stopped it


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(demonstrate(Path(directory, "broker.db")))
