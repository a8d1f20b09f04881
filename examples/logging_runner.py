#!/usr/bin/env python3
"""A first runner: it wraps another one and logs what passes.

    python logging_runner.py

A runner is what the broker knows of a database: five methods. All statements that it can be asked for are constants of
simplebroker.ext, so a log can name them. The parameters are not logged: they hold the bodies of messages.

Everything else has a default. Two of them are passed on here: the path, and the notifier, which wakes who waits for a
message. (By default a waiter looks by itself, ten times a second.)
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

# Find simplebroker.py beside this file or one directory above it. Not needed when it is installed.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(d) for d in (HERE, HERE.parent) if (d / "simplebroker.py").exists()]

from simplebroker import Queue, SQLiteRunner, SQLRunner, ext  # noqa: E402

SLOW_S = 1.0  # what takes longer is logged as a warning

# Statement -> the name of its constant, such as INSERT_MESSAGE.
NAMES = {sql: name for name, sql in vars(ext).items() if name.isupper() and isinstance(sql, str)}

log = logging.getLogger("logging_runner")


class LoggingRunner(SQLRunner):
    """Passes everything on to another runner, and logs the name, the rows and the milliseconds.

    As safe for threads and for fork as the runner that it wraps: it has no state of its own but the counts.
    """

    def __init__(self, runner: SQLRunner) -> None:
        self._runner = runner
        self.path, self.clock, self.depth, self.is_busy = runner.path, runner.clock, runner.depth, runner.is_busy
        self.counts: Counter[str] = Counter()  # (approximate while several threads use the runner)

    @property
    def notifier(self) -> Any:
        """The notifier of the wrapped runner."""
        return self._runner.notifier

    def run(self, sql: str, params: Sequence[Any] = (), *, fetch: bool = False) -> Any:
        """Execute one statement; return its rows if fetch."""
        return self._pass(NAMES.get(sql, "OTHER"), lambda: self._runner.run(sql, params, fetch=fetch))

    def begin_immediate(self) -> None:
        """Start a transaction. Its time is that of waiting for other writers."""
        self._pass("BEGIN", self._runner.begin_immediate)

    def commit(self) -> None:
        """Commit. Its time is that of syncing the disk."""
        self._pass("COMMIT", self._runner.commit)

    def rollback(self) -> None:
        """Roll back."""
        self._pass("ROLLBACK", self._runner.rollback)

    def close(self) -> None:
        """Close the wrapped runner."""
        self._runner.close()

    def _pass(self, name: str, call: Callable[[], Any]) -> Any:
        """Make the call and log how it went. Errors pass through."""
        outcome = "interrupted"
        begin = time.perf_counter()
        try:
            result = call()
            outcome = "done" if result is None else f"{len(result)} rows"
            return result
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.counts[name] += 1
            seconds = time.perf_counter() - begin
            level = logging.WARNING if seconds > SLOW_S else logging.DEBUG
            log.log(level, "%-16s %8.2f ms  %s", name, seconds * 1000, outcome)


def main() -> None:
    """Write two messages and read one; the log goes to standard error, the counts to standard output."""
    with tempfile.TemporaryDirectory() as directory:
        runner = LoggingRunner(SQLiteRunner(Path(directory, "broker.db")))
        try:
            with Queue("tasks", runner=runner) as tasks:
                tasks.write("first")
                tasks.write("second")
                print("read:", tasks.read())
                print("left:", tasks.count())
        finally:
            runner.close()  # who made it closes it
    for name, count in sorted(runner.counts.items()):
        print(f"{name}: {count}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG, format="%(message)s")
    main()
