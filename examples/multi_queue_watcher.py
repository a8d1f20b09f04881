#!/usr/bin/env python3
"""Watch many queues of one database with one thread and one connection, in turn. See MULTI_QUEUE_README.md.

    watcher = MultiQueueWatcher(["orders", "mails"], handler, {"mails": send_mail}, db="broker.db")
    watcher.watch()

    python multi_queue_watcher.py

A round takes one message from each queue that has any, so a queue with a long backlog delays another one by one message
a round, never by its backlog. At least once: lease, call the handler, acknowledge.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Optional

# Find simplebroker.py beside this file or one directory above it. Not needed when it is installed.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(d) for d in (HERE, HERE.parent) if (d / "simplebroker.py").exists()]

from simplebroker import (  # noqa: E402
    Broker,
    LeaseLost,
    LeasesInFlight,
    Message,
    OperationalError,
    Queue,
    StopSignals,
    backoff_s,
    check_reason,
    default_error_handler,
    describe,
)

LEASE_S = 30.0  # extended in the background while a handler runs
MAX_ATTEMPTS = 5
BACKOFF_S = 0.5  # before the second attempt; doubles with each further one, up to 300
BUSY_PAUSE_S = 0.5  # how long the watcher pauses when the database is busy or full, before it goes on

log = logging.getLogger("multi_queue_watcher")
Handler = Callable[[Message, int], object]
ErrorHandler = Callable[[BaseException, Message, int], Optional[bool]]


class MultiQueueWatcher:
    """Calls a handler for every message of several queues, round-robin, until it is stopped.

    queues                the names to begin with; add_queue() and remove_queue() change them at any time
    default_handler       ``handler(message, timestamp)`` for the queues that have none of their own;
                          ``message.queue`` tells which one it is from
    queue_handlers        name -> handler
    queue_error_handlers  name -> ``error_handler(error, message, timestamp)``, which decides about a handler that
                          raised. True: dealt with, acknowledge. None: give it back with a growing delay. False: give
                          it back and stop the watcher
    db                    a path, a Broker (which stays the caller's), or None for the default
    error_handler         for the queues that have none of their own; the default logs and returns None
    lease                 seconds; extended in the background while a handler runs
    max_attempts          after so many failed attempts a message moves to ``dead_letter`` (QUEUE.dead)
    backoff               seconds before the second attempt; doubles with each further one, up to 300; 0: at once
    """

    def __init__(
        self,
        queues: Iterable[str],
        default_handler: Handler,
        queue_handlers: Mapping[str, Handler] | None = None,
        queue_error_handlers: Mapping[str, ErrorHandler] | None = None,
        *,
        db: str | os.PathLike[str] | Broker | None = None,
        error_handler: ErrorHandler = default_error_handler,
        lease: float = LEASE_S,
        max_attempts: int = MAX_ATTEMPTS,
        dead_letter: str | None = None,
        backoff: float = BACKOFF_S,
    ) -> None:
        if isinstance(queues, str):
            raise TypeError("queues is an iterable of names: a single queue is [name]")
        if not (max_attempts >= 1 and 0 <= backoff < math.inf):
            raise ValueError("max_attempts must be at least 1 and backoff not negative")
        self.broker = db if isinstance(db, Broker) else Broker(db)
        self.rounds = 0  # begun so far
        self._owns_broker = not isinstance(db, Broker)
        self._default_handler = default_handler
        self._default_error_handler = error_handler
        self._lease = lease
        self._max_attempts = max_attempts
        self._dead_letter = dead_letter
        self._backoff = backoff
        # Guards the next three; held only to look at them or change them, never while a handler runs.
        self._guard = threading.Condition()
        self._entries: dict[str, _Entry] = {}
        self._removed: list[_Entry] = []  # their leases are still to be closed
        self._busy: str | None = None  # the queue whose turn it is
        self._stopping = False
        self._waiter: Any = None  # what an idle watcher sleeps on
        self._thread: threading.Thread | None = None  # started by run_in_thread()
        self._worker: threading.Thread | None = None  # the one that is in watch()
        handlers, error_handlers = dict(queue_handlers or {}), dict(queue_error_handlers or {})
        for name in queues:
            self.add_queue(name, handlers.pop(name, None), error_handlers.pop(name, None))
        if handlers or error_handlers:
            raise ValueError(f"handlers for queues that are not watched: {sorted({*handlers, *error_handlers})}")

    # -- the queues

    @property
    def queues(self) -> list[str]:
        """The names that are watched now, in the order of their turns."""
        with self._guard:
            return list(self._entries)

    def add_queue(self, name: str, handler: Handler | None = None, error_handler: ErrorHandler | None = None) -> None:
        """Watch one more queue, from the next round on. From any thread, and in handlers."""
        handler = handler or self._default_handler
        error_handler = error_handler or self._default_error_handler
        if not (callable(handler) and callable(error_handler)):
            raise TypeError(f"the handlers of {name!r} must be callable")
        entry = _Entry(self.broker.queue(name), handler, error_handler, self._lease)
        if self._dead_letter is not None:
            entry.queue.check_dead_letter(self._dead_letter)  # not the queue itself
        with self._guard:
            if name in self._entries:
                raise ValueError(f"queue {name!r} is watched already")
            self._entries[name] = entry
        self._wake()

    def remove_queue(self, name: str) -> None:
        """Watch it no longer; its messages stay. From any thread, and in handlers.

        When this returns, no handler runs for that queue: it waits for one that does, unless called from it.
        """
        with self._guard:
            if name not in self._entries:
                raise ValueError(f"queue {name!r} is not watched")
            self._removed.append(self._entries.pop(name))
            if self._worker is not threading.current_thread():
                self._guard.wait_for(lambda: self._busy != name)

    def plan(self) -> Iterable[str]:
        """The queues of the next round, in order. Override it for another policy than "all, in turn"."""
        return self.queues

    # -- start and stop

    def watch(self, *, drain: bool = False) -> None:
        """Handle messages until stopped; with ``drain``, until nothing is ready in any queue. Blocks.

        In the main thread SIGINT, SIGTERM and SIGHUP stop it: the current handler ends, then this returns. A watcher
        that has stopped is not started again: make a new one.
        """
        with self._guard:
            if self._worker is not None:
                raise RuntimeError("this watcher is running already, or has run: make a new one")
            self._worker = threading.current_thread()
        try:
            with StopSignals(lambda number: self.request_stop()), self.broker.waiter() as self._waiter:
                try:
                    self._run(drain)
                finally:
                    self._close_leases(of_all=True)
        finally:
            if self._owns_broker:
                self.broker.close()

    def run_in_thread(self) -> threading.Thread:
        """Start watch() in a daemon thread and return the thread; the running one if there is one."""
        if self._thread is None:
            self._thread = threading.Thread(target=self.watch, name="multi-queue-watcher", daemon=True)
            self._thread.start()
        return self._thread

    def request_stop(self) -> None:
        """Stop after the current message. Returns at once; safe in handlers and signal handlers."""
        self._stopping = True
        self._wake()

    def stop(self, timeout: float | None = None) -> None:
        """Stop after the current message, and wait up to ``timeout`` seconds (None: no limit) for the end of the
        thread that run_in_thread() started, unless called from it."""
        self.request_stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def __enter__(self) -> MultiQueueWatcher:
        self.run_in_thread()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- the loop

    def _run(self, drain: bool) -> None:
        quiet: dict[str, float] = {}  # queues that had nothing -> when to look again: they do not slow busy ones down
        while not self._stopping:
            skipping = bool(quiet)
            try:
                handled = self._round(quiet)
            except OperationalError as error:  # busy, or a full disk: nothing is lost, go on later
                log.warning("%s", error)
                self._pause(BUSY_PAUSE_S)
                quiet.clear()
                continue
            if handled:
                if self._waiter.wait(0):  # something changed
                    quiet.clear()
                continue
            pause = min(quiet.values(), default=math.inf) - time.monotonic()
            quiet.clear()
            if not skipping:  # a whole round found nothing, and if something came since then, wait() returns at once
                if drain:
                    return
                self._waiter.wait(max(0.0, pause))

    def _round(self, quiet: dict[str, float]) -> bool:
        """Take one message of each queue. False if there was none; queues without one join the quiet ones."""
        self.rounds += 1
        self._close_leases()
        handled = False
        for name in self.plan():
            if self._stopping:
                break
            if quiet.get(name, 0.0) <= time.monotonic():
                pause = self._turn(name)
                handled = handled or pause is None
                quiet[name] = 0.0 if pause is None else time.monotonic() + pause
        return handled

    def _turn(self, name: str) -> float | None:
        """Handle one message of a queue. If there is none, return in how many seconds it is time to look again."""
        with self._guard:
            entry = self._entries.get(name)
            if entry is None:  # removed since the round began
                return 0.0
            self._busy = name
        try:
            pending, pause = entry.queue.look()
            batch = entry.take() if pending else []
            for message in batch:
                self._handle(entry, message)
            return None if batch else pause
        finally:
            with self._guard:
                self._busy = None
                self._guard.notify_all()

    def _close_leases(self, *, of_all: bool = False) -> None:
        """Of the queues that were removed. Here and not by who removed them: a handler may have its message in hand."""
        with self._guard:
            closing, self._removed = self._removed, []
            if of_all:
                closing += self._entries.values()
        for entry in closing:
            entry.open.close()

    def _wake(self) -> None:
        if self._waiter is not None:
            self._waiter.wake()

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < deadline:
            self._waiter.wait(max(0.0, deadline - time.monotonic()))

    # -- one message

    def _handle(self, entry: _Entry, message: Message) -> None:
        verdict, why, attempt = None, "lease ended", message.attempt - 1  # it killed its consumers
        if message.attempt <= self._max_attempts:
            try:
                (verdict, why), attempt = self._call(entry, message), message.attempt
            except BaseException as error:  # it ends this thread; the attempt counts all the same
                entry.leases.release(message, reason=describe(error))
                raise
        if verdict is True:
            entry.leases.ack(message)  # a lost lease is logged
        elif verdict is None and attempt >= self._max_attempts:
            log.warning("message %d of %s moves to its dead-letter queue: %s", message.id, message.queue, why)
            entry.leases.done(message)
            try:
                entry.queue.dead_letter(message, self._dead_letter, reason=f"{why} (attempt {attempt})")
            except LeaseLost as error:  # the process was suspended for longer than the lease
                log.warning("queue %s: %s", message.queue, error)
        else:
            delay = backoff_s(self._backoff, attempt) if verdict is None else None
            entry.leases.release(message, delay=delay, reason=why)

    def _call(self, entry: _Entry, message: Message) -> tuple[bool | None, str]:
        """Call the handler. True: done. None: try again. False: the watcher stops. And why it failed."""
        try:
            entry.handler(message, message.id)
            return True, ""
        except Exception as error:  # noqa: BLE001 (whatever a handler raises is for the error handler)
            why = check_reason(describe(error)) or ""
            try:
                verdict = entry.error_handler(error, message, message.id)
            except Exception as second:  # noqa: BLE001 (logged, and the message is tried again)
                verdict = default_error_handler(second, message, message.id)
        if verdict is False:
            self.request_stop()
        return verdict if isinstance(verdict, bool) else None, why


class _Entry:
    """A queue that is watched, what is called for it, and its leases, which only the thread of the watcher uses."""

    def __init__(self, queue: Queue, handler: Handler, error_handler: ErrorHandler, lease_s: float) -> None:
        self.queue = queue
        self.handler = handler
        self.error_handler = error_handler
        self.leases = LeasesInFlight(queue, lease_s)
        self.open = ExitStack()
        self._is_open = False

    def take(self) -> list[Message]:
        """Lease the first ready message, if there is one."""
        if not self._is_open:
            self._is_open = True
            self.open.enter_context(self.leases)  # from now on it extends what it holds
        return self.leases.take(1)


def main() -> None:
    """One long queue and two short ones: the short ones do not wait for the long one. One message fails for good."""
    order: list[str] = []

    def handler(message: Message, timestamp: int) -> None:
        order.append(f"{message.queue}:{message}")

    def send_mail(message: Message, timestamp: int) -> None:
        handler(message, timestamp)
        if message == "bad":
            raise ValueError("no such address")

    def mail_failed(error: BaseException, message: Message, timestamp: int) -> bool | None:
        print(f"mail {str(message)!r}, attempt {message.attempt}: {error}")
        return None  # try again, then dead-letter

    with tempfile.TemporaryDirectory() as directory, Broker(Path(directory, "broker.db")) as broker:
        broker.queue("logs").write_many(str(number) for number in range(100))
        broker.queue("orders").write_many(["0", "1"])
        broker.queue("mails").write_many(["bad", "good"])
        watcher = MultiQueueWatcher(
            ["logs", "orders", "mails"],
            handler,
            {"mails": send_mail},
            {"mails": mail_failed},
            db=broker,
            max_attempts=2,
            backoff=0,
        )
        watcher.watch(drain=True)  # without drain it goes on until it is stopped
        print("first rounds:", *order[:6])
        print("handled:", len(order), "rounds:", watcher.rounds, "dead:", broker.queue("mails.dead").read())


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    main()
