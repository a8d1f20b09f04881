#!/usr/bin/env python3
"""The Python API, one function for each thing that people do with a queue. Start here.

    python python_api.py

Everything happens in a temporary database that is removed at the end. Every function stands alone: copy the one that
you need.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

# Find simplebroker.py beside this file or one directory above it. Not needed when it is installed.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(d) for d in (HERE, HERE.parent) if (d / "simplebroker.py").exists()]

from simplebroker import Broker, Message, OperationalError, Queue, QueueWatcher, Settings  # noqa: E402

LEASE_S = 30.0  # how long a worker may be silent before its message is given to another
MAX_ATTEMPTS = 3  # after so many failures a message goes to the dead-letter queue
RETRY_DELAY_S = 0.05  # before the second attempt; doubles with each further one. Seconds to minutes in production
WORKERS = 3

log = logging.getLogger("python_api")


def basics(db: Path) -> None:
    """Write, peek, read, move, delete."""
    with Queue("tasks", db) as tasks:
        tasks.write("first")  # committed when it returns
        tasks.write_many(["second", "third", "fourth"])  # one transaction, all or none
        print("peek:", tasks.peek())  # removes nothing
        print("read:", tasks.read())  # removes and returns; None if there is nothing
        print("moved:", tasks.move("archive"))
        print("deleted:", tasks.delete(), "from tasks")
        print("empty:", tasks.read())
    with Broker(db) as broker:  # everything about all queues
        print("queues:", {name: stats.ready for name, stats in broker.queues().items()})


def ids_and_times(db: Path) -> None:
    """A message is a str that knows its id and when it was written. Ids only grow, so they are bounds too."""
    with Queue("events", db) as events:
        ids = events.write_many(["a", "b", "c"])
        message = events.peek(message_id=ids[1])
        if message is None:
            raise LookupError(f"message {ids[1]} is gone")
        age = datetime.now(timezone.utc) - message.time
        print("by id:", message, message.id == ids[1], "just written:", age < timedelta(minutes=1))
        print("after the first:", events.peek_many(10, after=ids[0]))
        events.write("tomorrow", delay=86400)  # not deliverable before its time
        print("stats:", events.stats())


def retry_with_dead_letter(db: Path) -> None:
    """At least once, by hand: lease, act, acknowledge. What fails is tried again later, and set aside in the end."""
    with Queue("payments", db) as payments:
        payments.write_many(["10", "not a number", "32"])
        total = 0
        while payments.stats().total:  # a worker that runs for ever: while not stopping
            message = payments.lease(LEASE_S, wait=1.0)
            if message is None:
                continue
            try:
                total += int(message)
            except ValueError as error:
                if message.attempt >= MAX_ATTEMPTS:
                    log.info("payment %r: giving up after %d attempts", str(message), message.attempt)
                    payments.dead_letter(message, reason=str(error))  # to payments.dead; says why
                else:
                    log.info("payment %r: attempt %d failed: %s", str(message), message.attempt, error)
                    payments.release(message, delay=RETRY_DELAY_S * 2 ** (message.attempt - 1), reason=str(error))
            else:
                payments.ack(message)  # LeaseLost if this took longer than the lease and someone else has it now
        print("paid:", total)
        for message in payments.broker.queue("payments.dead").peek_many(10):
            print("dead:", message, "because:", message.reason)
        print("another try:", payments.requeue())  # when the fault is mended: all of payments.dead, attempts anew


def errors(db: Path) -> None:
    """Empty is None. Busy is OperationalError, and then nothing was changed. Misuse is ValueError or TypeError."""
    impatient = Settings(busy_timeout_ms=50)  # 5 seconds unless told otherwise; BROKER_BUSY_TIMEOUT sets it too
    with Broker(db) as other, Queue("tasks", db, settings=impatient) as tasks:
        try:
            with other.transaction():  # somebody else writes for too long
                tasks.write("hello")
        except OperationalError:  # to wait longer, raise the timeout instead of looping
            print("busy, so nothing was written:", tasks.count())
        try:
            tasks.write("half of a character: \ud83d")
        except ValueError as error:  # trying again does not help
            print("refused:", error)


class OrderWatcher(QueueWatcher):
    """A watcher of one's own: the handler and the error handler are its methods, the state is its attributes."""

    def __init__(self, db: Path) -> None:
        super().__init__("orders", self.handle, db=db, error_handler=self.failed, max_attempts=MAX_ATTEMPTS)
        self.rejected = Queue("orders.rejected", db)
        self.amount = 0

    def handle(self, message: Message, timestamp: int) -> None:
        """Called for each message, at least once: a crash after the sum and before the acknowledgement repeats it."""
        order = json.loads(message)
        self.amount += order["amount"]
        if order.get("last"):
            self.request_stop()  # returns at once; the watcher ends after this message

    def failed(self, error: BaseException, message: Message, timestamp: int) -> bool | None:
        """True: dealt with, acknowledge. None: try again later, then dead-letter. False: give it back and stop."""
        if isinstance(error, (ValueError, KeyError)):  # it will never work
            self.rejected.write(message)
            return True
        log.error("order %d failed: %r", timestamp, error)
        return None


def custom_watcher(db: Path) -> None:
    """Handle orders until the last one. With run_in_thread() or ``with watcher:`` it would run in the background."""
    with Queue("orders", db) as orders:
        orders.write_many(['{"amount": 5}', "{broken", '{"amount": 7, "last": true}'])
    watcher = OrderWatcher(db)
    watcher.watch()  # SIGINT and SIGTERM stop it cleanly too
    with watcher.rejected as rejected:
        print("ordered:", watcher.amount, "rejected:", rejected.read_many(10))


def save_checkpoint(file: Path, last_id: int) -> None:
    """Replace the file in one step: after a crash it holds the old id or the new one, never half of one."""
    fresh = file.with_name(file.name + ".new")
    with open(fresh, "w", encoding="ascii") as stream:
        stream.write(str(last_id))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(fresh, file)


def checkpoint_processing(db: Path, file: Path, limit: int | None = None) -> list[str]:
    """Read a queue as a log: look at what is newer than the checkpoint, remove nothing.

    Several programs can follow one queue this way. Ids grow in commit order, so nothing that is written later is passed
    over. What gets ready with an old id is passed over: moved here, delayed, or given back. So follow a queue that is
    only written to.
    """
    done: list[str] = []
    last_id = int(file.read_text(encoding="ascii")) if file.exists() else 0
    with Queue("log", db) as queue:
        for message in queue.peek_all(after=last_id):
            if len(done) == limit:
                break  # stands for a crash
            done.append(str(message))  # the work; a crash between it and the next line repeats it
            save_checkpoint(file, message.id)
    return done


def checkpoints(db: Path) -> None:
    """Two runs with a stop between them see everything once."""
    file = db.with_name("log.checkpoint")
    with Queue("log", db) as queue:
        queue.write_many(["1", "2", "3", "4", "5"])
        first = checkpoint_processing(db, file, limit=2)
        queue.write("6")
        print("checkpoint:", first, checkpoint_processing(db, file), "still there:", queue.count())


def shutdown_of_threads(db: Path) -> None:
    """Several workers in one process: each ends after the message that it has in hand. Threads may share queues."""
    done: list[str] = []  # list.append is safe in threads
    finished = threading.Event()

    def handle(message: Message, timestamp: int) -> None:
        done.append(str(message))
        if len(done) >= 30:
            finished.set()

    with Queue("jobs", db) as jobs:
        watchers = [QueueWatcher(jobs, handle) for _ in range(WORKERS)]
        for watcher in watchers:
            watcher.run_in_thread()
        try:
            jobs.write_many(str(number) for number in range(30))
            if not finished.wait(30):
                raise TimeoutError(f"only {len(done)} of 30 jobs were done")
        finally:
            for watcher in watchers:
                watcher.request_stop()  # ask all of them ...
            for watcher in watchers:
                watcher.stop()  # ... then wait for each: what was not handled is given back
        print("jobs:", len(done), "different:", len(set(done)), "left:", jobs.stats().total)


EXAMPLES = (
    basics,
    ids_and_times,
    retry_with_dead_letter,
    errors,
    custom_watcher,
    checkpoints,
    shutdown_of_threads,
)


def main() -> None:
    """Run everything, one after the other."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")  # to standard error
    with tempfile.TemporaryDirectory() as directory:
        for example in EXAMPLES:
            print(f"-- {example.__name__}")
            example(Path(directory, "broker.db"))


if __name__ == "__main__":
    main()
