"""Tests of SimpleBroker: ``python -m unittest`` from the repository root, nothing installed.

One TestCase per room of simplebroker.py, in the order of the rooms, then the command line, crashes and
the examples. What needs an optional tool is skipped without it. FULL_TESTS=1 repeats the random ones
more often.
"""

from __future__ import annotations

import contextlib
import os
import re
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


class ReadmeTest(BrokerTest):
    """README.md is true: what it shows was run, by this."""

    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```", self.text, re.MULTILINE | re.DOTALL)

    def shell(self, script: str) -> subprocess.CompletedProcess[bytes]:
        """Run a block in an empty directory that has simplebroker.py, with a command broker."""
        (self.dir / "simplebroker.py").write_bytes((ROOT / "simplebroker.py").read_bytes())
        bin_dir = self.dir / "bin"
        bin_dir.mkdir(exist_ok=True)
        for name, words in (("broker", "-m simplebroker "), ("python3", "")):
            (bin_dir / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
            (bin_dir / name).chmod(0o755)
        environ = {**self.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHONPATH": str(self.dir)}
        command = ["sh", "-ec", script]
        return subprocess.run(command, cwd=self.dir, env=environ, capture_output=True, timeout=DEADLINE_S)

    def test_the_first_command_does_the_main_job(self) -> None:
        self.assertRan(self.shell(self.blocks("bash")[0]), b"ship it\n")

    def test_the_second_command_is_how_these_tests_run(self) -> None:
        self.assertEqual(self.blocks("bash")[1], "python3 -m unittest\n")

    def test_the_shell_lines_print_what_their_comments_say(self) -> None:
        done = self.shell(self.blocks("bash")[2])
        self.assertRan(done, b"tasks: 2\nship it\n1\n2\n")
        self.assertRan(self.cli("list", "--stats", "-f", ".broker.db"))
        shown = self.cli("list", "--stats", "-f", ".broker.db").stdout
        self.assertEqual(shown, b"tasks: 1 (2 total, 0 leased, 1 delayed)\n")

    def test_the_python_lines_run(self) -> None:
        (code,) = self.blocks("python")
        child = self.python(code)
        out, _ = child.communicate(timeout=DEADLINE_S)
        self.assertEqual(child.returncode, 0)
        self.assertRegex(out, rb"\Aship it\ncareful work \d{19} 1\n\Z")

    def test_every_setting_and_its_default_is_listed(self) -> None:
        listed = dict(re.findall(r"^\| `(BROKER_\w+)` \| ([^|]+?) \|", self.text, re.MULTILINE))
        for attribute, variable, default, *_ in simplebroker._RULES:
            self.assertIn(variable, listed)
            shown = {None: "the current directory", False: "0"}.get(default, str(default))  # type: ignore[call-overload]
            self.assertEqual(listed[variable], shown, attribute)
        self.assertEqual(len(listed), len(simplebroker._RULES))

    def test_every_link_leads_somewhere(self) -> None:
        links = re.findall(r"\]\(([^)#:]+)\)", self.text)
        self.assertGreater(len(links), 10)
        for link in links:
            self.assertTrue((ROOT / link).exists(), link)

    def test_the_top_level_holds_what_it_may(self) -> None:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            self.assertTrue((ROOT / "LICENSE").exists())  # not a checkout, but a copy of one
            return
        allowed = {"simplebroker.py", "test_simplebroker.py", "examples", "pyproject.toml", "README.md", "LICENSE"}
        found = {name.split("/")[0] for name in done.stdout.split()}
        self.assertEqual({name for name in found - allowed if not name.startswith(".")}, set())
