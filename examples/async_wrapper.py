#!/usr/bin/env python3
"""SimpleBroker for asyncio, with the standard library only.

    async with AsyncBroker("broker.db") as broker:
        await broker.push("tasks", "hello")
        print(await broker.pop("tasks"))                         # at most once; None if there is nothing
        async for message in broker.stream_messages("tasks"):    # at least once; waits for more
            await work(message)                                  # acknowledged when the loop asks for the next

    python async_wrapper.py

One thread makes all calls of an AsyncBroker, in the order in which they were made: on one SQLite connection, more
threads would only wait for each other. A second thread waits for changes, for everybody: any number of tasks can wait
for messages, and none of them keeps a thread. Use an AsyncBroker in one event loop.

Cancelling is safe. A cancelled pop() removes nothing. A stream or watch that is left gives back what it holds. Only of
a cancelled push() it is not known whether it has written.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import os
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Callable, Optional

# Find simplebroker.py beside this file or one directory above it. Not needed when it is installed.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(d) for d in (HERE, HERE.parent) if (d / "simplebroker.py").exists()]

from simplebroker import (  # noqa: E402
    INSERT_LOADED,
    Broker,
    LeaseKeeper,
    LeaseLost,
    Message,
    OperationalError,
    Queue,
    Settings,
    UsageError,
    default_error_handler,
)

LEASE_S = 30.0  # renewed in the background while a message is worked on
MAX_ATTEMPTS = 5
BACKOFF_S = 0.5  # before the second attempt; doubles with each further one, up to MAX_BACKOFF_S
MAX_BACKOFF_S = 300.0
BUSY_PAUSE_S = 0.5  # how long a watch pauses when the database is busy or full, before it goes on

log = logging.getLogger("async_wrapper")
Handler = Callable[[Message, int], object]
ErrorHandler = Callable[[BaseException, Message, int], Optional[bool]]
Look = Callable[[], Awaitable[list[Message]]]


class AsyncBroker:
    """All queues of one database, for one event loop. ``path`` is as in ``Queue(name, path)``."""

    def __init__(self, path: str | os.PathLike[str] | None = None, *, settings: Settings | None = None) -> None:
        self._broker = Broker(path, settings=settings)
        self._thread = ThreadPoolExecutor(1, "async-broker")
        self._cleanup = ExitStack()  # run in the thread by close(), last in first out
        self._cleanup.callback(self._broker.close)
        self._listening = False
        self._waiters: set[asyncio.Event] = set()  # set at every change of the database
        self._consumers: set[_Consumer] = set()  # of open streams and watches
        self._running: dict[asyncio.Future[None], asyncio.Task[Any] | None] = {}  # what close() waits for
        self._stopping = False
        self._end: Future[None] | None = None  # of the thread, once close() has come that far

    async def __aenter__(self) -> AsyncBroker:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- one message

    async def push(self, queue: str, body: str, *, delay: float | None = None) -> int:
        """Append a message and return its id. It is durable when this returns."""
        id: int = await self._call(lambda: self._broker.queue(queue).write(body, delay=delay))
        return id

    async def pop(self, queue: str, *, wait: float | None = None) -> Message | None:
        """Remove the first message and return it (at most once); None if there is none.

        ``wait``: wait up to that many seconds for one (math.inf: until stop()). A cancelled pop removes nothing.
        """
        source = self._broker.queue(queue)
        with self._in_use():
            found = await self._wait_for(lambda: self._call(lambda: _take_one(source), undo=self._put_back), wait)
        return found[0] if found else None

    async def peek(self, queue: str) -> Message | None:
        """Return the first message, or None; nothing is removed."""
        found: Message | None = await self._call(lambda: self._broker.queue(queue).peek())
        return found

    async def size(self, queue: str) -> int:
        """How many messages are ready (approximate while others write)."""
        count: int = await self._call(lambda: self._broker.queue(queue).count())
        return count

    # -- many messages

    async def stream_messages(
        self, queue: str, *, lease: float = LEASE_S, wait: float | None = math.inf
    ) -> AsyncGenerator[Message, None]:
        """``async for message in broker.stream_messages(queue)``: at least once.

        A message is acknowledged when the loop asks for the next one. When the loop is left (break, error,
        cancellation), the message in hand is given back, and its ``attempt`` counts; those that were fetched ahead are
        given back as if nobody had had them. This happens when the generator is closed: CPython does that at once,
        PyPy at some time, contextlib.aclosing() at the end of its block.

        ``wait``: end after so many seconds without a message; None: end when the queue is empty. stop() ends it too.
        """
        async with self._consumer(queue, lease) as consumer:
            while True:
                batch = await self._wait_for(lambda: self._call(consumer.take), wait)
                for message in batch:
                    if self._stopping:
                        return
                    consumer.in_hand = message
                    yield message
                    await self._call(lambda: consumer.acknowledge(message))  # noqa: B023 (called before the next)
                if not batch:
                    return

    async def watch_queue(
        self,
        queue: str,
        handler: Handler,
        *,
        lease: float = LEASE_S,
        max_attempts: int = MAX_ATTEMPTS,
        dead_letter: str | None = None,
        backoff: float = BACKOFF_S,
        error_handler: ErrorHandler = default_error_handler,
    ) -> None:
        """Call ``await handler(message, timestamp)`` for every message, at least once, until stop() or cancelled.

        One at a time; run several watches for more. A plain function will do if it does not block. When the handler
        raised, ``error_handler(error, message, timestamp)`` decides. True: dealt with, acknowledge. None: give it back
        with a growing delay, and after ``max_attempts`` move it to ``dead_letter`` (QUEUE.dead). False: give it back
        and end this watch.
        """
        if dead_letter is not None:
            self._broker.queue(dead_letter)  # checks the name
        rules = _Rules(handler, error_handler, max_attempts, dead_letter, backoff)
        with self._in_use():
            async with self._consumer(queue, lease) as consumer:
                while not self._stopping:
                    try:
                        batch = await self._wait_for(lambda: self._call(consumer.take), math.inf)
                        if not await self._handle_batch(consumer, batch, rules):
                            return
                    except OperationalError as error:  # busy, or a full disk: nothing is lost, go on later
                        log.warning("watch of %s: %s", queue, error)
                        await asyncio.sleep(BUSY_PAUSE_S)

    async def _handle_batch(self, consumer: _Consumer, batch: list[Message], rules: _Rules) -> bool:
        """False: the watch has to end."""
        for message in batch:
            settle = None if self._stopping else await rules.apply(consumer, message)
            if settle is None:
                return False
            await self._call(settle)
        return True

    # -- the end

    def stop(self) -> None:
        """End all waiting, streams and watches after the messages that they have in hand. Returns at once."""
        self._stopping = True
        self._wake()

    async def close(self) -> None:
        """stop(), wait for the handlers of watches, give back what is leased, and close the database.

        In a handler call stop() instead. Closing twice is allowed.
        """
        if asyncio.current_task() in self._running.values():
            raise RuntimeError("close() inside a handler would wait for itself: call stop()")
        self.stop()
        try:
            while self._running:
                await asyncio.wait(self._running)
        finally:
            if self._end is None:
                for consumer in self._consumers:
                    self._cleanup.callback(consumer.close)
                self._end = self._thread.submit(self._cleanup.close)
                self._thread.shutdown(wait=False)
            await asyncio.shield(asyncio.wrap_future(self._end))

    # -- how it works

    async def _call(self, function: Callable[[], Any], *, undo: Callable[[Any], None] | None = None) -> Any:
        """Run a function in the thread. ``undo(result)`` is run there if the caller was cancelled meanwhile."""
        if self._end is not None:
            raise UsageError("the AsyncBroker was closed: make a new one")
        job = self._thread.submit(function)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            if undo is not None and not job.cancel():  # too late to stop it: it is running, or done
                self._thread.submit(_undo, job, undo)  # comes after it, and before what is asked for later
            raise

    async def _wait_for(self, look: Look, seconds: float | None) -> list[Message]:
        """What look() finds; if that is nothing, look again at every change, for so many seconds."""
        if seconds is None:
            return await look()
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        over = False

        def end() -> None:
            nonlocal over
            over = True
            changed.set()

        if not self._listening:
            await self._call(lambda: self._listen(loop))
        timer = loop.call_later(seconds, end) if seconds < math.inf else None
        self._waiters.add(changed)
        try:
            while True:
                changed.clear()
                last_look = over or self._stopping
                found = await look()
                if found or last_look:
                    return found
                await changed.wait()
        finally:
            self._waiters.discard(changed)
            if timer is not None:
                timer.cancel()

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread that passes changes on. Called in the one thread, so never twice at once."""
        if self._listening:
            return
        self._listening = True
        alarm = self._cleanup.enter_context(self._broker.alarm())  # before anybody looks: no change is missed

        def pass_on() -> None:
            while alarm.wait() and self._listening:
                try:
                    loop.call_soon_threadsafe(self._wake)
                except RuntimeError:  # the event loop was closed without close(): nobody waits any more
                    return

        def end() -> None:
            self._listening = False
            alarm.wake()
            listener.join()

        listener = threading.Thread(target=pass_on, name="async-broker-changes", daemon=True)
        listener.start()
        self._cleanup.callback(end)

    def _wake(self) -> None:
        for changed in self._waiters:
            changed.set()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """close() waits for the end of the block."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running[done] = asyncio.current_task()
        try:
            yield
        finally:
            del self._running[done]
            done.set_result(None)

    @asynccontextmanager
    async def _consumer(self, queue: str, lease_s: float) -> AsyncIterator[_Consumer]:
        consumer = _Consumer(self._broker.queue(queue), lease_s)
        self._consumers.add(consumer)
        try:
            await self._call(consumer.open)
            yield consumer
        finally:
            self._consumers.discard(consumer)
            if self._end is None:  # otherwise close() has done it
                await asyncio.shield(asyncio.wrap_future(self._thread.submit(consumer.close)))

    def _put_back(self, messages: list[Message]) -> None:
        """Put messages that were taken in vain back to their places."""
        with self._broker.transaction() as run:
            for message in messages:
                run(INSERT_LOADED, (message.id, message.queue, str(message), None, message.attempt))


class _Consumer:
    """The leases of one stream or watch. The methods are for the thread."""

    def __init__(self, queue: Queue, lease_s: float) -> None:
        self.queue = queue
        self.in_hand: Message | None = None
        self._keeper = LeaseKeeper(queue, lease_s)
        self._open = ExitStack()

    def open(self) -> None:
        self._open.enter_context(self._keeper)

    def take(self) -> list[Message]:
        """Lease some: few while they are worked on slowly, more while fast."""
        self._keeper.give_back()  # what an error has left over; usually nothing
        return self._keeper.take()

    def acknowledge(self, message: Message) -> None:
        self.in_hand = None
        self._keeper.acknowledge(message)  # a lost lease is logged

    def release(self, message: Message, delay: float | None = None) -> None:
        self._settle(message, lambda: self.queue.release(message, delay=delay))

    def bury(self, message: Message, dead_letter: str | None) -> None:
        log.warning("message %d of %s is moved to its dead-letter queue", message.id, message.queue)
        self._settle(message, lambda: self.queue.dead_letter(message, dead_letter))

    def close(self) -> None:
        """Give back what is left."""
        with self._open:
            if self.in_hand is not None:
                self.release(self.in_hand)

    def _settle(self, message: Message, action: Callable[[], None]) -> None:
        self.in_hand = None
        self._keeper.settle(message)
        try:
            action()
        except LeaseLost as error:
            log.warning("queue %s: %s", message.queue, error)


class _Rules:
    """What a watch does with a message."""

    def __init__(
        self,
        handler: Handler,
        error_handler: ErrorHandler,
        max_attempts: int,
        dead_letter: str | None,
        backoff_s: float,
    ) -> None:
        self._handler = handler
        self._error_handler = error_handler
        self._max_attempts = max_attempts
        self._dead_letter = dead_letter
        self._backoff_s = backoff_s

    async def apply(self, consumer: _Consumer, message: Message) -> Callable[[], None] | None:
        """Call the handler; return what settles the message, or None to end the watch."""
        if message.attempt > self._max_attempts:  # it killed its consumers before they could say so
            return lambda: consumer.bury(message, self._dead_letter)
        try:
            result = self._handler(message, message.id)
            if inspect.isawaitable(result):
                await result
        except Exception as error:  # noqa: BLE001 (whatever a handler raises is for the error handler)
            verdict = self._judge(error, message)
            if verdict is False:
                consumer.in_hand = message
                return None
            if verdict is None and message.attempt >= self._max_attempts:
                return lambda: consumer.bury(message, self._dead_letter)
            if verdict is None:
                delay = min(MAX_BACKOFF_S, self._backoff_s * 2.0 ** min(message.attempt - 1, 60))
                return lambda: consumer.release(message, delay)
        return lambda: consumer.acknowledge(message)

    def _judge(self, error: Exception, message: Message) -> bool | None:
        try:
            verdict = self._error_handler(error, message, message.id)
        except Exception as second:  # noqa: BLE001 (logged, and the message is tried again)
            verdict = default_error_handler(second, message, message.id)
        return verdict if isinstance(verdict, bool) else None


def _take_one(queue: Queue) -> list[Message]:
    return queue.read_many(1) if queue.has_pending() else []  # looking first does not wait for writers


def _undo(job: Future[Any], undo: Callable[[Any], None]) -> None:
    if job.exception() is None:
        try:
            undo(job.result())
        except Exception:
            log.exception("a call was cancelled, and what it had done could not be undone: %r", job.result())


async def demonstrate(db: Path) -> None:
    """One after the other: single messages, workers that share a stream, a watch with failures, cancelling."""
    async with AsyncBroker(db) as broker:
        await broker.push("greetings", "hello")
        await broker.push("greetings", "goodbye")
        print("size:", await broker.size("greetings"), "peek:", await broker.peek("greetings"))
        print("pop:", await broker.pop("greetings"), await broker.pop("greetings"), await broker.pop("greetings"))

        done: list[str] = []

        async def worker() -> None:
            async for message in broker.stream_messages("jobs", wait=None):  # None: end when the queue is empty
                await asyncio.sleep(0)  # the work
                done.append(message)

        for number in range(30):
            await broker.push("jobs", str(number))
        await asyncio.gather(*(worker() for _ in range(3)))
        print("jobs:", len(done), "different:", len(set(done)), "left:", await broker.size("jobs"))

        async def handler(message: Message, timestamp: int) -> None:
            if message == "bad":
                raise ValueError(f"cannot handle {str(message)!r}, attempt {message.attempt}")
            print("watch:", message)

        for body in ("good", "bad", "fine"):
            await broker.push("work", body)
        watch = asyncio.create_task(broker.watch_queue("work", handler, max_attempts=2, backoff=0.05))
        print("dead:", await broker.pop("work.dead", wait=30.0))

        waiting = asyncio.create_task(broker.pop("later", wait=math.inf))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        await broker.push("later", "not lost")
        print("cancelled:", waiting.cancelled(), "later:", await broker.pop("later"))
    print("watch ended:", watch.done() and watch.exception() is None)  # leaving the block stopped it


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL)  # the demonstration fails on purpose: do not show the tracebacks
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(demonstrate(Path(directory, "broker.db")))
