#!/usr/bin/env python3
"""Ready-made handlers for watchers: print, JSON, logger; one built on another; an error handler.

    python simple_watcher_example.py

A handler is any ``function(message, timestamp)``. The message is a str that also has id, queue, attempt and time.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path
from typing import Callable

# Find simplebroker.py beside this file or one directory above it. Not needed when it is installed.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(d) for d in (HERE, HERE.parent) if (d / "simplebroker.py").exists()]

from simplebroker import (  # noqa: E402
    Message,
    Queue,
    QueueWatcher,
    json_print_handler,
    logger_handler,
    simple_print_handler,
)

MAX_ATTEMPTS = 2
BACKOFF_S = 0.05  # before the second attempt; 0.5 unless told otherwise


def important_only(message: Message, timestamp: int) -> None:
    """A handler built on another: pass on what matters, in capitals."""
    if message.startswith("!"):
        changed = Message(message.upper(), message.id, message.queue, message.attempt)
        simple_print_handler(changed, timestamp)


def show(queue: Queue, handler: Callable[[Message, int], object]) -> None:
    """Watch a queue with a handler until everything in it is done."""
    watcher = QueueWatcher(queue, handler, drain=True)  # without drain it goes on until watcher.request_stop()
    watcher.watch()  # blocks; SIGINT, SIGTERM and SIGHUP stop it cleanly


def fragile(message: Message, timestamp: int) -> None:
    """A handler that fails: the first time on one message, always on another."""
    if message == "bad" or (message == "shy" and message.attempt == 1):
        raise ValueError(f"cannot handle {str(message)!r}")
    print("handled:", message)


def on_error(error: BaseException, message: Message, timestamp: int) -> bool | None:
    """What to do about a handler that raised.

    True: it is dealt with, acknowledge the message. None: try again later, and move it to the dead-letter queue when
    its attempts are used up. False: give the message back and stop the watcher.
    """
    print(f"attempt {message.attempt} failed: {error}")
    return False if isinstance(error, MemoryError) else None


def show_errors(work: Queue, dead: Queue) -> None:
    """Watch in the background, with an error handler, until a message is in the dead-letter queue."""
    work.write_many(["good", "shy", "bad"])
    with QueueWatcher(work, fragile, error_handler=on_error, max_attempts=MAX_ATTEMPTS, backoff=BACKOFF_S):
        message = dead.read(wait=30.0)
    print("dead:", message, "because:", message.reason if message else None)


def main() -> None:
    """Show each handler in turn."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    with tempfile.TemporaryDirectory() as directory:
        db = Path(directory, "broker.db")
        for handler in (simple_print_handler, json_print_handler, logger_handler, important_only):
            print(f"-- {handler.__name__}")
            with Queue("news", db) as news:
                news.write_many(["hello", "! read this"])
                show(news, handler)

        print("-- error handler")
        with Queue("work", db) as work, Queue("work.dead", db) as dead:
            show_errors(work, dead)


if __name__ == "__main__":
    main()
