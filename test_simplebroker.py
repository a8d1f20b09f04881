"""Tests of SimpleBroker: ``python -m unittest`` from the repository root, nothing installed.

One TestCase per room of simplebroker.py, in the order of the rooms, then the command line, crashes and
the examples. What needs an optional tool is skipped without it. FULL_TESTS=1 repeats the random ones
more often.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parent
EXAMPLES = ROOT / "examples"
FULL = os.environ.get("FULL_TESTS") == "1"
DEADLINE_S = 30.0  # how long a test waits for what must happen; generous, for loaded machines
sys.path.insert(0, str(ROOT))

import simplebroker  # noqa: E402
from simplebroker import Broker, Queue  # noqa: E402


class BrokerTest(unittest.TestCase):
    """A temporary directory with a database path, and the assertions of the domain."""

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="broker-test-")
        self.addCleanup(directory.cleanup)
        self.dir = Path(directory.name).resolve()
        self.path = self.dir / "test.db"
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
        self.environ.update(PYTHONPATH=str(ROOT), BROKER_SYNC_MODE="NORMAL")

    def queue(self, name: str = "q", **options: Any) -> Queue:
        """A queue on the test's database, closed at the end."""
        options.setdefault("settings", simplebroker.Settings(sync_mode="NORMAL"))
        queue = Queue(name, self.path, **options)
        self.addCleanup(queue.close)
        return queue

    def broker(self, **options: Any) -> Broker:
        """A broker on the test's database, closed at the end."""
        options.setdefault("settings", simplebroker.Settings(sync_mode="NORMAL"))
        broker = Broker(self.path, **options)
        self.addCleanup(broker.close)
        return broker

    def cli(self, *args: str, input: bytes | None = b"", **options: Any) -> subprocess.CompletedProcess[bytes]:
        """Run the command in the test's directory, as a process of its own, on test.db unless told otherwise."""
        command = [sys.executable, "-m", "simplebroker", "-f", "test.db", *args]
        options = {"cwd": self.dir, "env": self.environ, "capture_output": True, "timeout": DEADLINE_S, **options}
        return subprocess.run(command, input=input, **options)

    def python(self, code: str, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start Python code as a process of its own, with simplebroker importable; killed at the end."""
        options = {"cwd": self.dir, "env": self.environ, "stdout": subprocess.PIPE, **options}
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *args], **options)
        self.addCleanup(self.reap, child)
        return child

    @staticmethod
    def reap(child: subprocess.Popen[Any]) -> None:
        """End a process and close its pipes."""
        if child.poll() is None:
            child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def wait_for(self, condition: Callable[[], object], what: str = "the condition") -> None:
        """Look until the condition holds; fail after the deadline."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > deadline:
                self.fail(f"waited {DEADLINE_S} s for {what}")
            time.sleep(0.005)

    def assertBodies(self, queue: Queue, expected: list[str]) -> None:
        """The ready messages of the queue, in order."""
        self.assertEqual([str(message) for message in queue.peek_all()], expected)

    def assertRan(
        self, done: subprocess.CompletedProcess[bytes], stdout: bytes | None = None, status: int = 0
    ) -> None:
        """The exit status of a command, and what it printed; errors are one line, never a traceback."""
        self.assertEqual(done.returncode, status, done.stderr.decode(errors="replace"))
        if stdout is not None:
            self.assertEqual(done.stdout, stdout)
        self.assertNotIn(b"Traceback", done.stderr)
        if status == 1:
            self.assertRegex(done.stderr, rb"\A(.*\n)*broker: error: [^\n]+\n\Z")
