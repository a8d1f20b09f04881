"""Tests of SimpleBroker: ``python -m unittest`` from the repository root, nothing installed.

One TestCase per room of simplebroker.py, in the order of the rooms, then the command line, crashes and
the examples. What needs an optional tool is skipped without it. FULL_TESTS=1 repeats the random ones
more often, TEST_JOBS=1 runs the classes one after the other, TEST_SOAK_S=1200 makes the soak test last so long.
"""

from __future__ import annotations
import __future__ as future

import ast
import asyncio
import atexit
import contextlib
import copy
import ctypes
import doctest
import functools
import gc
import importlib
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import pickle
import random
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import unittest
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, ClassVar
from unittest import mock

ROOT = Path(__file__).resolve().parent
EXAMPLES = ROOT / "examples"
FULL = os.environ.get("FULL_TESTS") == "1"
# The command needs no site-packages, and starts in half the time without. (Coverage of processes needs them.)
PYTHON = [sys.executable] if "COVERAGE_FILE" in os.environ else [sys.executable, "-S"]
DEADLINE_S = 30.0  # how long a test waits for what must happen; generous, for loaded machines
sys.path[:0] = [str(ROOT), str(EXAMPLES)]

import simplebroker  # noqa: E402
from simplebroker import (  # noqa: E402
    Broker,
    BrokerError,
    DatabaseError,
    IntegrityError,
    LeaseKeeper,
    LeaseLost,
    Message,
    MessageError,
    OperationalError,
    Queue,
    QueueMoveWatcher,
    QueueNameError,
    QueueWatcher,
    Settings,
    SQLiteRunner,
    SQLRunner,
    Stats,
    TimestampGenerator,
    UsageError,
    WriterLock,
    default_error_handler,
    ext,
    json_print_handler,
    logger_handler,
    simple_print_handler,
)

NEEDS_LOCKS = unittest.skipUnless(simplebroker.fcntl is not None, "needs file locks")


def has_notifications() -> bool:
    """Does this platform tell of changes of files, and is that allowed here?"""
    with contextlib.suppress(Exception):
        kind = simplebroker._Inotify if sys.platform == "linux" else simplebroker._Kqueue
        kind().close()
        return True
    return False


NEEDS_BELL = unittest.skipUnless(has_notifications(), "needs notifications of files")
NEEDS_INOTIFY = unittest.skipUnless(has_notifications() and sys.platform == "linux", "needs inotify")


class BrokerTest(unittest.TestCase):
    """A temporary directory with a database path, and the assertions of the domain."""

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="broker-test-")
        self.addCleanup(directory.cleanup)
        self.dir = Path(directory.name).resolve()
        self.path = self.dir / "test.db"
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
        self.environ.update(PYTHONPATH=str(ROOT), BROKER_SYNC_MODE="NORMAL")
        self.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each start compiles simplebroker.py anew

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
        command = [*PYTHON, "-m", "simplebroker", "-f", "test.db", *args]
        options = {"cwd": self.dir, "env": self.environ, "capture_output": True, "timeout": DEADLINE_S, **options}
        return subprocess.run(command, check=False, input=input, **options)

    def python(self, code: str, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start Python code as a process of its own, with simplebroker importable; killed at the end."""
        options = {"cwd": self.dir, "env": self.environ, "stdout": subprocess.PIPE, **options}
        child = subprocess.Popen([*PYTHON, "-c", textwrap.dedent(code), *args], **options)
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

    def assertRan(self, done: subprocess.CompletedProcess[bytes], stdout: bytes | None = None, status: int = 0) -> None:
        """The exit status of a command, and what it printed; errors are one line, never a traceback."""
        self.assertEqual(done.returncode, status, done.stderr.decode(errors="replace"))
        if stdout is not None:
            self.assertEqual(done.stdout, stdout)
        self.assertNotIn(b"Traceback", done.stderr)
        if status == 1:
            self.assertRegex(done.stderr, rb"\A(.*\n)*broker: error: [^\n]+\n\Z")


# ---------------------------------------------------------------------------------------------------
# The rooms from constants to Queue.
# ---------------------------------------------------------------------------------------------------


NS = 1_000_000_000


HOUR_NS = 3600 * NS


HEADER = '{"type": "header", "format": "simplebroker-dump", "version": 1, "last_ts": "0"}'


NOBODY = 65534


HAS_FORK = hasattr(os, "fork")


ON_LINUX = sys.platform == "linux"


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, ns: int = 1_700_000_000 * NS) -> None:
        self.ns = ns

    def __call__(self) -> int:
        return self.ns


class Child:
    """A forked process that runs ``work(child)``. Both sides say() and hear() single lines."""

    def __init__(self, work: Callable[[Child], object], user: int | None = None) -> None:
        mine, theirs = socket.socketpair()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                mine.close()
                self._attach(theirs)
                if user is not None:
                    os.setgroups([])
                    os.setgid(user)
                    os.setuid(user)
                work(self)
                status = 0
            except BaseException:  # noqa: BLE001 - whatever it is, the parent must see it and the child must end
                traceback.print_exc()
            finally:
                os._exit(status)
        theirs.close()
        self._attach(mine)
        self._status: int | None = None

    def _attach(self, end: socket.socket) -> None:
        end.settimeout(DEADLINE_S)
        self._end, self._file = end, end.makefile("rb")

    def say(self, text: str = "") -> None:
        self._end.sendall(text.encode() + b"\n")

    def hear(self) -> str:
        return self._file.readline().decode().rstrip("\n")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)
        if number == signal.SIGSTOP:
            os.waitpid(self.pid, os.WUNTRACED)

    def wait(self) -> int:
        """The exit status, 0 if the work was done; negative for a signal. A child that hangs is killed."""
        deadline = time.monotonic() + DEADLINE_S
        while self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if not pid:
                if time.monotonic() > deadline:
                    os.kill(self.pid, signal.SIGKILL)
                time.sleep(0.002)
                continue
            self._status = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return self._status

    def end(self) -> None:
        """Kill it if it runs, and close the line to it."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        self._file.close()
        self._end.close()


class CoreTest(BrokerTest):
    """What this process opens follows the test's environment too, and nothing of the developer's."""

    def setUp(self) -> None:
        super().setUp()
        environment = mock.patch.dict(os.environ, {**self.environ, "BROKER_SYNC_MODE": "OFF"}, clear=True)
        environment.start()
        self.addCleanup(environment.stop)


class ForkTest(CoreTest):
    """Tests with forked processes, which start in a millisecond."""

    def child(self, work: Callable[[Child], object], user: int | None = None) -> Child:
        child = Child(work, user)
        self.addCleanup(child.end)
        return child

    def together(self, count: int, work: Callable[[int], object]) -> None:
        """Run work(0) ... work(count - 1) in processes that begin at the same moment."""

        def wait_and_work(number: int, child: Child) -> None:
            child.say("ready")
            child.hear()
            work(number)

        children = [self.child(lambda child, number=number: wait_and_work(number, child)) for number in range(count)]
        for child in children:
            self.assertEqual(child.hear(), "ready")
        for child in children:
            child.say("go")
        self.assertEqual([child.wait() for child in children], [0] * count)

    def unprivileged(self, work: Callable[[], object]) -> None:
        """Run work() in a process to which file permissions apply, in the test's directory."""
        root = os.geteuid() == 0
        if root:
            os.chmod(self.dir, 0o777)
        self.assertEqual(self.child(lambda child: work(), NOBODY if root else None).wait(), 0)

    def holder(self) -> Child:
        """A process that is inside a write transaction until it is told something."""

        def hold(child: Child) -> None:
            with Broker(self.path).transaction() as run:
                run(ext.INSERT_MESSAGE, (simplebroker.MAX_ID - 10**6, "held", "uncommitted", None))
                child.say("inside")
                child.hear()

        child = self.child(hold)
        self.assertEqual(child.hear(), "inside")
        return child


class PlainRunner(SQLRunner):
    """A runner as SEED.md describes it: five methods over plain sqlite3. It takes only what the SQL room has."""

    ROOM = frozenset(value for name, value in vars(ext).items() if name.isupper() and isinstance(value, str))

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(str(path), isolation_level=None, check_same_thread=False)

    def run(self, sql: str, params: Any = (), *, fetch: bool = False) -> Any:
        if sql not in self.ROOM:
            raise AssertionError(f"not in the SQL room: {sql}")
        cursor = self._execute(sql, params)
        return cursor.fetchall() if fetch else None

    def begin_immediate(self) -> None:
        self._execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._execute("COMMIT")

    def rollback(self) -> None:
        self._execute("ROLLBACK")

    def close(self) -> None:
        self.connection.close()

    def _execute(self, sql: str, params: Any = ()) -> sqlite3.Cursor:
        try:
            return self.connection.execute(sql, params)
        except sqlite3.IntegrityError as error:
            raise IntegrityError(str(error)) from error
        except sqlite3.OperationalError as error:
            raise OperationalError(str(error)) from error


class PublicNames(CoreTest):
    def test_every_public_name_exists_and_documents_itself(self) -> None:
        for name in simplebroker.__all__:
            self.assertTrue(getattr(simplebroker, name).__doc__, name)
        self.assertEqual(len(simplebroker.__all__), len(set(simplebroker.__all__)))

    def test_all_lists_what_the_design_names(self) -> None:
        promised = """Broker Message Queue QueueMoveWatcher QueueWatcher default_error_handler json_print_handler
            logger_handler simple_print_handler BrokerError IntegrityError LeaseLost MessageError OperationalError
            QueueNameError SQLRunner SQLiteRunner TimestampGenerator main"""
        self.assertLessEqual(set(promised.split()), set(simplebroker.__all__))

    def test_every_error_is_public(self) -> None:
        errors = {
            name
            for name, value in vars(simplebroker).items()
            if isinstance(value, type) and issubclass(value, BrokerError)
        }
        self.assertEqual(errors - set(simplebroker.__all__), {"CommandFailed"})  # of "broker work" alone

    def test_ext_has_the_public_names_and_all_statements(self) -> None:
        for name in simplebroker.__all__:
            self.assertIs(getattr(ext, name), getattr(simplebroker, name))
        verbs = ("SELECT", "INSERT", "UPDATE", "DELETE", "CREATE", "PRAGMA", "VACUUM")
        for name, value in vars(simplebroker).items():
            if name.isupper() and not name.startswith("_") and isinstance(value, str) and value.startswith(verbs):
                self.assertEqual(getattr(ext, name), value)

    def test_ext_is_importable_whatever_the_module_is_called(self) -> None:
        code = "from {0}.ext import SQLRunner, IntegrityError, INSERT_MESSAGE; import {0}.ext; from {0} import Queue"
        vendor = self.dir / "pkg" / "vendor"
        vendor.mkdir(parents=True)
        (vendor / "simplebroker.py").write_bytes((ROOT / "simplebroker.py").read_bytes())
        for name in ("simplebroker", "pkg.vendor.simplebroker"):
            with self.subTest(name):
                check = (
                    f"; import sys; assert SQLRunner is sys.modules['{name}'].SQLRunner; assert {name}.ext.SQLRunner"
                )
                self.assertEqual(self.python(code.format(name) + check).wait(), 0)

    def test_importing_reads_no_environment_and_starts_nothing(self) -> None:
        code = """
            import threading, simplebroker, sys
            assert threading.active_count() == 1
            loaded = {"argparse", "json", "logging", "ctypes", "subprocess", "decimal"} & set(sys.modules)
            assert not loaded, loaded
        """
        self.environ["BROKER_BUSY_TIMEOUT"] = "nonsense"
        command = [sys.executable, "-S", "-c", textwrap.dedent(code)]
        self.assertEqual(subprocess.run(command, cwd=self.dir, env=self.environ, check=False).returncode, 0)

    def test_the_environment_at_import_does_not_matter(self) -> None:
        code = """
            import os, simplebroker
            os.environ["BROKER_CACHE_MB"] = "7"
            assert simplebroker.Settings.from_environment().cache_mb == 7
            assert simplebroker.Settings().cache_mb == 10
            assert simplebroker.Queue("q").broker.settings.cache_mb == 7
        """
        self.environ["BROKER_CACHE_MB"] = "3"
        self.assertEqual(self.python(code).wait(), 0)

    def test_the_examples_in_docstrings_are_true(self) -> None:
        finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
        report = io.StringIO()
        for number, example in enumerate(finder.find(simplebroker, "simplebroker")):
            example.globs["path"] = str(self.dir / f"{number}.db")
            runner.run(example, out=report.write)
        self.assertEqual(runner.summarize(verbose=False).failed, 0, report.getvalue())
        self.assertGreater(runner.tries, 8)


class MessageTest(unittest.TestCase):
    def setUp(self) -> None:
        self.message = Message("h\u00e9llo", 1837025672140161024, "tasks", 3)

    def test_a_message_is_its_body(self) -> None:
        self.assertIsInstance(self.message, str)
        self.assertEqual(self.message, "h\u00e9llo")
        self.assertEqual({self.message: 1}["h\u00e9llo"], 1)
        self.assertEqual(f"{self.message}|{json.dumps(self.message)}", 'h\u00e9llo|"h\\u00e9llo"')
        self.assertIs(type(str(self.message)), str)
        self.assertIs(type(self.message.upper()), str)

    def test_it_knows_where_it_came_from(self) -> None:
        message = self.message
        self.assertEqual(
            (message.id, message.timestamp, message.queue, message.attempt), (message.id,) * 2 + ("tasks", 3)
        )
        self.assertEqual(Message("x", 1, "q").attempt, 0)

    def test_copies_and_pickles_keep_everything(self) -> None:
        ways: list[Callable[[Message], Message]] = [copy.copy, copy.deepcopy]
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            ways.append(lambda message, protocol=protocol: pickle.loads(pickle.dumps(message, protocol)))
        for way in ways:
            again = way(self.message)
            self.assertIs(type(again), Message)
            self.assertEqual(
                (str(again), again.id, again.queue, again.attempt), ("h\u00e9llo", self.message.id, "tasks", 3)
            )

    def test_time_is_the_time_of_the_id_in_utc(self) -> None:
        moment = datetime(2024, 1, 15, 10, 30, 0, 123456, tzinfo=timezone.utc)
        ns = simplebroker.datetime_to_ns(moment)
        for id in (-(-ns // 4096) * 4096, -(-ns // 4096) * 4096 + 4095):
            found = Message("x", id, "q").time
            self.assertEqual(found.utcoffset(), timedelta(0))
            self.assertLess(abs(found - moment), timedelta(microseconds=6))
        self.assertEqual(Message("x", simplebroker.MAX_ID - 1, "q").time.year, 2262)


class ErrorsTest(unittest.TestCase):
    def test_all_have_one_base(self) -> None:
        for error in (
            OperationalError,
            IntegrityError,
            DatabaseError,
            QueueNameError,
            MessageError,
            UsageError,
            LeaseLost,
        ):
            self.assertTrue(issubclass(error, BrokerError), error)
            self.assertTrue(error.__doc__)

    def test_existing_except_clauses_catch_them(self) -> None:
        for error, base in (
            (OperationalError, sqlite3.OperationalError),
            (IntegrityError, sqlite3.IntegrityError),
            (DatabaseError, sqlite3.DatabaseError),
            (QueueNameError, ValueError),
            (MessageError, ValueError),
            (UsageError, ValueError),
        ):
            with self.assertRaisesRegex(base, "why"):
                raise error("why")

    def test_errors_survive_pickling(self) -> None:
        for name in ("OperationalError", "LeaseLost", "QueueNameError"):
            again = pickle.loads(pickle.dumps(getattr(simplebroker, name)("why")))
            self.assertEqual((type(again).__name__, str(again)), (name, "why"))


class NamesAndBodies(CoreTest):
    GOOD_NAMES = ("a", "A.b-c_9", "9", "_", "x" * 512, "q.dead", "a..b", "a--")
    BAD_NAMES = (
        "", "-a", ".a", "x" * 513, "a b", "a\n", "\na", "a\0", "a/b", "a\u0660", "\u00e9", "\uff11", "a\ud800",
        "a:b", "a\r",
        "a\u200b", "\u212a", "a;drop", "a%",
    )  # fmt: skip
    GOOD_BODIES = (
        "", " ", "\n", "a\n", "\r\n", "\0", "a\0b", "\x7f\x1b[31m", "\u00e9\u65e5\U0001f600", "\ufeffx",
        "\u2028", "'; DROP TABLE x;--",
        "\uffff", "e\u0301", "\\u0000", "x" * 70_000,
    )  # fmt: skip

    def test_good_names_work_everywhere(self) -> None:
        for name in self.GOOD_NAMES:
            self.queue(name).write("x")
        self.assertEqual(set(self.broker().queues()), set(self.GOOD_NAMES))

    def test_bad_names_are_refused_wherever_a_queue_is_named(self) -> None:
        queue, broker = self.queue(), self.broker()
        queue.write("x")
        leased = queue.lease(60)
        assert leased is not None
        line = {"type": "message", "body": "x", "id": 5}
        for name in self.BAD_NAMES:
            with self.subTest(name):
                for act in (broker.queue, queue.move, queue.move_all, lambda name: queue.dead_letter(leased, name)):
                    with self.assertRaises(QueueNameError) as caught:
                        act(name)
                    self.assertIn("512 letters", str(caught.exception))
                    self.assertLess(len(str(caught.exception)), 400)
                with self.assertRaisesRegex(UsageError, "line 2"):
                    broker.load([HEADER, json.dumps({**line, "queue": name})])
        self.assertEqual(queue.stats(), Stats(0, 1, 0))

    def test_names_and_bodies_that_are_no_str_are_type_errors(self) -> None:
        queue = self.queue()
        for value in (None, 5, b"a", ["a"], 1.5, True, Path("a")):
            with self.subTest(value):
                for act in (self.broker().queue, queue.move, queue.write, self.broker().broadcast):
                    with self.assertRaises(TypeError):
                        act(value)  # type: ignore[arg-type]
                with self.assertRaises(TypeError):
                    queue.write_many(["good", value])  # type: ignore[list-item]
        self.assertEqual(queue.count(), 0)

    def test_any_text_comes_back_as_it_was(self) -> None:
        queue = self.queue()
        queue.write_many(self.GOOD_BODIES)
        for body in self.GOOD_BODIES:
            queue.write(body)
        self.assertBodies(queue, list(self.GOOD_BODIES) * 2)
        self.assertEqual(queue.read_many(99), list(self.GOOD_BODIES) * 2)

    def test_a_str_subclass_is_stored_as_plain_text(self) -> None:
        class Shouting(str):
            def encode(self, *_: Any) -> bytes:
                raise AssertionError("asked for bytes")

        queue = self.queue(Shouting("q"))
        queue.write(Message("again", 1, "other"))
        self.assertIs(type(queue.name), str)
        self.assertBodies(queue, ["again"])

    def test_lone_surrogates_are_refused_and_nothing_is_written(self) -> None:
        queue = self.queue()
        for body in ("\ud800", "ab\udcffcd", "\udfff\ud800"):
            for act in (queue.write, self.broker().broadcast, lambda body: queue.write_many(["good", body])):
                with self.assertRaisesRegex(MessageError, "not valid text: .* at character"):
                    act(body)
        self.assertEqual(queue.count(), 0)

    def test_the_limit_counts_bytes(self) -> None:
        queue = self.queue(settings=Settings(max_message_size=10, sync_mode="NORMAL"))
        for body in ("x" * 10, "\u00e9" * 5, "\u65e5" * 3 + "x", "\U0001f600" * 2 + "xx"):
            queue.write(body)
            for act in (queue.write, queue.broker.broadcast, lambda body: queue.write_many(["good", body])):
                with self.assertRaisesRegex(MessageError, "11 bytes, more than the 10 that BROKER_MAX_MESSAGE_SIZE"):
                    act(body + "x")
            with self.assertRaisesRegex(UsageError, "line 2: .*11 bytes"):
                line = {"type": "message", "queue": "q", "id": 7, "body": body + "x"}
                queue.broker.load([HEADER, json.dumps(line)])
        self.assertEqual(queue.count(), 4)

    def test_a_body_of_exactly_ten_mebibytes_is_allowed_by_default(self) -> None:
        queue = self.queue()
        queue.write("x" * (10 << 20))
        with self.assertRaisesRegex(MessageError, "10485761 bytes, more than the 10485760"):
            queue.write("x" * ((10 << 20) + 1))
        message = queue.read()
        assert message is not None
        self.assertEqual(len(message), 10 << 20)

    def test_generated_names_and_bodies_are_stored_or_refused(self) -> None:
        seed = random.randrange(2**32)
        dice = random.Random(seed)
        allowed = re.compile(r"(?![-.])[A-Za-z0-9_.-]{1,512}", re.ASCII)
        letters = "aZ09_.-" + "-. \n\0/\u00e9\u0660\ud800"
        points = [(0, 127), (128, 0x7FF), (0x800, 0xD7FF), (0xD7FE, 0xE001), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
        broker = self.broker()
        written: list[str] = []
        with broker.transaction():
            for number in range(100_000 if FULL else 10_000):
                name = "".join(dice.choices(letters, weights=[30] * 7 + [1] * (len(letters) - 7), k=dice.randrange(9)))
                body = "".join(chr(dice.randint(*dice.choice(points))) for _ in range(dice.randrange(6)))
                text = not any("\ud800" <= character <= "\udfff" for character in body)
                where = f"seed {seed}, number {number}: {name!r}, {body!r}"
                try:
                    queue = broker.queue(name)
                    self.assertTrue(allowed.fullmatch(name), where)
                except QueueNameError:
                    self.assertFalse(allowed.fullmatch(name), where)
                    queue = broker.queue("q")
                try:
                    queue.write(body)
                    self.assertTrue(text, where)
                    written.append(f"{queue.name}\n{body}")
                except MessageError:
                    self.assertFalse(text, where)
        found = [f"{m.queue}\n{m}" for name in broker.queues() for m in broker.queue(name).peek_all()]
        self.assertGreater(len(set(found)), 1000)
        self.assertEqual(sorted(found), sorted(written), f"seed {seed}")


class SettingsTest(CoreTest):
    BAD = (
        ("BROKER_BUSY_TIMEOUT", "whole milliseconds",
         ("", "-1", "1.5", "5s", "+5", " 5", "1_0", "\uff15", "2147483648", "9" * 5000)),
        ("BROKER_SYNC_MODE", "FULL, NORMAL or OFF", ("", "EXTRA", "1", "FULL ", "full;")),
        ("BROKER_CACHE_MB", "whole megabytes from 1", ("0", "-1", "x", "65537")),
        ("BROKER_WAL_AUTOCHECKPOINT", "pages from 1", ("0", "-5", "1e3")),
        ("BROKER_MAX_MESSAGE_SIZE", "bytes from 1 to 1000000000", ("0", "10MB", "1000000001")),
        ("BROKER_MAX_INTERVAL", "seconds from 0.001 to 60",
         ("", "0", "-1", "61", "nan", "inf", "x", "0x1", "1_0", "\uff11", " 1")),
        ("BROKER_DEFAULT_DB_NAME", "relative file name",
         ("", "/abs.db", "../x.db", "a/../b", "a\\..\\b", "a\nb", "a\x7f")),
        ("BROKER_DEFAULT_DB_LOCATION", "an absolute directory", ("relative", "./x", "/a\nb")),
        ("BROKER_PROJECT_SCOPE", "1 or 0", ("2", "maybe", "on ")),
    )  # fmt: skip

    def test_a_bad_variable_is_named_with_its_value_and_what_is_allowed(self) -> None:
        for variable, allowed, values in self.BAD:
            for value in values:
                with self.subTest(variable=variable, value=value[:20]):
                    with self.assertRaises(UsageError) as caught:
                        Settings({variable: value})
                    for part in (variable, repr(value), allowed):
                        self.assertIn(part, str(caught.exception))

    def test_a_bad_keyword_is_named_too(self) -> None:
        for values in ({"busy_timeout_ms": -1}, {"busy_timeout_ms": True}, {"sync_mode": None}, {"cache_mb": 1.5}):
            ((name, value),) = values.items()
            with self.assertRaisesRegex(UsageError, f"{name}={value!r}: must be "):
                Settings(**values)
        with self.assertRaisesRegex(TypeError, "no setting cache_size: give busy_timeout_ms, "):
            Settings(cache_size=3)

    def test_every_variable_is_read(self) -> None:
        values = ("7", "off", "3", "5", "11", "0.5", "other.db", str(self.dir), "1")
        settings = Settings({variable: value for (variable, *_), value in zip(self.BAD, values)})
        self.assertEqual(settings.key(), (7, "OFF", 3, 5, 11, 0.5, "other.db", str(self.dir), True))

    def test_the_defaults_are_the_documented_ones(self) -> None:
        self.assertEqual(Settings().key(), (5000, "FULL", 10, 2000, 10 << 20, 0.1, ".broker.db", None, False))
        self.assertEqual(Settings({}).key(), Settings().key())

    def test_yes_and_no_have_several_spellings(self) -> None:
        spellings = (
            ("1", True),
            ("true", True),
            ("YES", True),
            ("0", False),
            ("False", False),
            ("no", False),
            ("", False),
        )
        for text, meaning in spellings:
            self.assertIs(Settings({"BROKER_PROJECT_SCOPE": text}).project_scope, meaning)

    def test_a_keyword_wins_over_the_environment_also_if_it_is_the_default_value(self) -> None:
        environ = {"BROKER_SYNC_MODE": "OFF", "BROKER_CACHE_MB": "99"}
        self.assertEqual(Settings(environ, sync_mode="NORMAL").sync_mode, "NORMAL")
        self.assertEqual(Settings(environ, sync_mode="FULL").sync_mode, "FULL")
        self.assertEqual(Settings(environ, cache_mb=10).cache_mb, 10)

    def test_they_are_frozen(self) -> None:
        settings = Settings()
        with self.assertRaisesRegex(AttributeError, "frozen"):
            settings.cache_mb = 5
        with self.assertRaises(AttributeError):
            settings.colour = "blue"  # type: ignore[attr-defined]
        with self.assertRaises(AttributeError):
            del settings.cache_mb
        self.assertEqual(settings.cache_mb, 10)

    def test_they_can_be_handed_to_another_process(self) -> None:
        settings = Settings(cache_mb=5)
        self.assertEqual(pickle.loads(pickle.dumps(settings)).key(), settings.key())
        self.assertEqual(copy.deepcopy(settings).key(), settings.key())

    def test_the_environment_is_read_when_a_queue_is_made_and_not_after(self) -> None:
        with mock.patch.dict(os.environ, {"BROKER_BUSY_TIMEOUT": "123", "BROKER_SYNC_MODE": "NORMAL"}):
            queue = Queue("q", self.path)
            self.addCleanup(queue.close)
            os.environ["BROKER_BUSY_TIMEOUT"] = "nonsense"
            queue.write("x")
            self.assertEqual(queue.broker.settings.busy_timeout_ms, 123)
            with self.assertRaisesRegex(UsageError, "BROKER_BUSY_TIMEOUT='nonsense'"):
                Queue("q", self.path)

    def test_what_was_passed_is_used_and_not_the_environment(self) -> None:
        with mock.patch.dict(os.environ, {"BROKER_MAX_MESSAGE_SIZE": "nonsense"}):
            self.queue(settings=Settings(max_message_size=5)).write("12345")

    def test_the_settings_reach_sqlite(self) -> None:
        runner = SQLiteRunner(
            self.path, Settings(sync_mode="OFF", cache_mb=3, wal_autocheckpoint=77, busy_timeout_ms=321)
        )
        self.addCleanup(runner.close)
        TimestampGenerator(runner).generate()
        pragmas = ("synchronous", "cache_size", "wal_autocheckpoint", "busy_timeout", "trusted_schema", "journal_mode")
        found = [runner.run(f"PRAGMA {name}", fetch=True)[0][0] for name in pragmas]
        self.assertEqual(found[:4] + found[-1:], [0, -3072, 77, 321, "wal"])
        if sqlite3.sqlite_version_info >= (3, 31):
            self.assertEqual(found[4], 0)


class TimestampsTest(ForkTest):
    """Ids: max(now & ~0xFFF, last + 1), whatever happens to the clock or to the messages."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()

    def fresh(self) -> Broker:
        """A broker on a new connection, with the test's clock."""
        return self.broker(clock=self.clock)

    def test_an_id_is_the_time_with_a_counter_in_its_low_bits(self) -> None:
        queue = self.fresh().queue("q")
        start = self.clock.ns & ~0xFFF
        self.assertEqual([queue.write("x") for _ in range(3)], [start, start + 1, start + 2])
        self.clock.ns += NS
        self.assertEqual(queue.write("x"), (start + NS) & ~0xFFF)
        self.assertEqual(len(str(start)), 19)

    def test_the_counter_carries_into_the_time(self) -> None:
        queue = self.fresh().queue("q")
        start = self.clock.ns & ~0xFFF
        self.assertEqual(queue.write_many(["x"] * 5000), list(range(start, start + 5000)))
        self.assertEqual(queue.write("x"), start + 5000)
        self.clock.ns += 4096  # still behind what has been given out
        self.assertEqual(queue.write("x"), start + 5001)

    def test_a_clock_set_back_an_hour_neither_stops_nor_delays_writing(self) -> None:
        queue = self.fresh().queue("q")
        last = queue.write("x")
        self.clock.ns -= HOUR_NS
        begun = time.monotonic()
        ids = [queue.write("x"), *queue.write_many(["x", "x"]), queue.write("x", delay=5)]
        self.assertEqual(ids, [last + 1, last + 2, last + 3, last + 4])
        self.assertLess(time.monotonic() - begun, 5)
        self.assertEqual([m.id for m in queue.peek_all()], [last, *ids[:3]])
        self.clock.ns += 2 * HOUR_NS
        self.assertEqual(queue.write("x"), self.clock.ns & ~0xFFF)

    def test_a_clock_from_before_1970_does_no_harm(self) -> None:
        self.clock.ns = -5 * HOUR_NS
        self.assertEqual(self.fresh().queue("q").write_many(["x", "x"]), [1, 2])

    def test_ids_go_on_ascending_after_each_way_to_empty_the_queue(self) -> None:
        def lease_keeper(queue: Queue) -> None:
            with LeaseKeeper(queue) as keeper:
                keeper.acknowledge(*keeper.take(5))

        def lease(queue: Queue) -> Message:
            message = queue.lease(60)
            assert message is not None
            return message

        def lease_and_dead_letter(queue: Queue) -> None:
            queue.dead_letter(lease(queue), "other")
            queue.broker.queue("other").read()

        def move_and_read(queue: Queue) -> None:
            queue.move("other")
            queue.broker.queue("other").read()

        ways: dict[str, Callable[[Queue], object]] = {
            "read": lambda queue: queue.read(),
            "read by id": lambda queue: queue.read(message_id=queue.peek_many(1)[0].id),
            "read_many": lambda queue: queue.read_many(9),
            "read_all": lambda queue: list(queue.read_all()),
            "lease and ack": lambda queue: queue.ack(lease(queue)),
            "LeaseKeeper": lease_keeper,
            "dead_letter and read": lease_and_dead_letter,
            "delete": lambda queue: queue.delete(),
            "delete by id": lambda queue: queue.delete(message_id=queue.peek_many(1)[0].id),
            "delete while held": lambda queue: (queue.lease(60), queue.delete()),
            "move and read": move_and_read,
            "move_all and delete": lambda queue: (queue.move_all("other"), queue.broker.queue("other").delete()),
        }
        for runner in (None, PlainRunner(self.dir / "plain.db")):
            broker = self.fresh() if runner is None else Broker(runner=runner, clock=self.clock)
            last = 0
            for way, empty in ways.items():
                with self.subTest(way, runner=type(runner).__name__):
                    id = broker.queue("q").write("x")
                    self.assertGreater(id, last)
                    empty(broker.queue("q"))
                    self.assertEqual(broker.queues(), {}, way)
                    self.clock.ns -= HOUR_NS
                    last = id
                    if runner is None:  # also after a restart
                        broker.close()
                        broker = self.fresh()
            if runner is not None:
                runner.close()

    def test_ids_go_on_ascending_after_a_vacuum(self) -> None:
        broker = self.fresh()
        last = broker.queue("q").write_many(["x" * 1000] * 500)[-1]
        broker.queue("q").delete()
        broker.vacuum()
        broker.close()
        self.clock.ns -= HOUR_NS
        self.assertEqual(self.fresh().queue("q").write("x"), last + 1)

    def test_ids_go_on_ascending_after_a_load(self) -> None:
        broker = self.fresh()
        future = self.clock.ns + 9 * HOUR_NS
        lines = [HEADER, json.dumps({"type": "message", "queue": "q", "body": "x", "id": str(future)})]
        broker.load(lines)
        broker.queue("q").read()
        self.assertEqual(broker.queue("q").write("x"), future + 1)
        broker.load([HEADER.replace('"0"', f'"{future + 100}"')])
        self.assertEqual(broker.queue("q").write("x"), future + 101)

    def test_a_rolled_back_removal_does_not_forget_the_last_id(self) -> None:
        broker = self.fresh()
        queue = broker.queue("q")
        last = queue.write("x")
        with self.assertRaises(ZeroDivisionError), broker.transaction():
            queue.read()
            self.assertEqual(queue.write("y"), last + 1)
            raise ZeroDivisionError
        self.assertBodies(queue, ["x"])
        self.assertEqual(broker.status()["last_ts"], last)
        self.assertEqual(queue.write("z"), last + 1)

    def test_the_last_ids_are_refused_instead_of_overflowing(self) -> None:
        broker = self.fresh()
        last = simplebroker.MAX_ID - 2
        broker.load([HEADER, json.dumps({"type": "message", "queue": "q", "body": "x", "id": last})])
        self.assertEqual(broker.queue("q").write("y"), last + 1)
        for act in (
            lambda: broker.queue("q").write("z"),
            lambda: broker.queue("q").write_many(["z"] * 9),
            broker.ids.generate,
        ):
            with self.assertRaisesRegex(OperationalError, "no ids are left"):
                act()
        self.assertEqual(broker.queue("q").read_many(9), ["x", "y"])

    def test_the_generator_gives_out_each_id_once_to_threads(self) -> None:
        ids: list[list[int]] = [[] for _ in range(4)]
        generator = TimestampGenerator(self.broker().runner)
        barrier = threading.Barrier(4)

        def work(mine: list[int]) -> None:
            barrier.wait(DEADLINE_S)
            mine.extend(generator.generate() for _ in range(50))

        threads = [threading.Thread(target=work, args=(mine,)) for mine in ids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        self.assertEqual([len(mine) for mine in ids], [50] * 4)
        self.assertEqual(len({id for mine in ids for id in mine}), 200)
        for mine in ids:
            self.assertEqual(mine, sorted(mine))

    def test_the_generator_looks_again_when_someone_was_faster(self) -> None:
        other = self.fresh().ids

        class Slow(PlainRunner):
            faster = 0

            def run(self, sql: str, params: Any = (), *, fetch: bool = False) -> Any:
                if sql == ext.ADVANCE_LAST_ID and not self.faster:
                    self.faster = other.generate()
                return super().run(sql, params, fetch=fetch)

        other.generate()
        runner = Slow(self.path)
        self.addCleanup(runner.close)
        self.assertEqual(TimestampGenerator(runner, self.clock).generate(), runner.faster + 1)

    @unittest.skipUnless(HAS_FORK, "needs fork")
    def test_the_generator_and_writers_give_out_each_id_once_to_processes(self) -> None:
        def work(number: int) -> None:
            broker = self.broker(clock=self.clock)
            queue = broker.queue("q")
            for step in range(30):
                queue.write(str(broker.ids.generate()) if step % 2 else str(queue.write("")))
            broker.close()

        self.together(4, work)
        found = list(self.queue().peek_all())
        ids = [message.id for message in found]
        said = [int(message) for message in found if message]
        self.assertEqual((len(found), len(said), len(set(said))), (180, 120, 120))
        self.assertEqual(len(set(ids) | set(said)), 240)
        # Nothing is outside the range that a clock which stands still and a counter give.
        self.assertEqual(max([*ids, *said]), (self.clock.ns & ~0xFFF) + 239)

    def test_generate_takes_part_in_the_callers_transaction(self) -> None:
        for runner in (None, PlainRunner(self.dir / "plain.db")):
            broker = self.fresh() if runner is None else Broker(runner=runner, clock=self.clock)
            first = broker.queue("q").write("x")
            with contextlib.suppress(ZeroDivisionError), broker.transaction():
                self.assertEqual(TimestampGenerator(broker.runner, self.clock).generate(), first + 1)
                raise ZeroDivisionError
            self.assertEqual(broker.status()["last_ts"], first)
            self.assertEqual(broker.ids.generate(), first + 1)
            self.assertEqual(broker.queue("q").write("x"), first + 2)
            if runner is not None:
                runner.close()


class TimesAndDurations(unittest.TestCase):
    TIMES = (
        ("1837025672140161024", 1837025672140161024), ("1837025672140161024ns", 1837025672140161024),
        ("9223372036854775807", 2**63 - 1), ("0", 0), ("0s", 0),
        ("2024-01-15", 1705276800 * NS), ("2024-01-15T10:30:00Z", 1705314600 * NS),
        ("2024-01-15T10:30:00z", 1705314600 * NS),
        ("2024-01-15 10:30", 1705314600 * NS), ("2024-01-15T10:30:00", 1705314600 * NS),
        ("2024-01-15T10:30:00.123456Z", 1705314600123456000), ("2024-01-15T10:30:00.5+02:00", 1705307400500000000),
        ("2024-01-15T10:30:00+0530", 1705294800 * NS), ("2024-01-15T10:30:00-08:00", 1705343400 * NS),
        ("1705314600", 1705314600 * NS), ("1705314600s", 1705314600 * NS), ("1705314600.5", 1705314600500000000),
        ("1705314600.123456789", 1705314600123456789), ("1705314600000", 1705314600 * NS),
        ("1705314600000ms", 1705314600 * NS),
        ("1705314600123.25ms", 1705314600123250000), ("1705314600000000", 1705314600 * NS),
        ("1705314600000000us", 1705314600 * NS),
        ("1.5us", 1500), ("5ns", 5), ("99999999999", 99999999999 * NS if 99999999999 * NS < 2**63 else None),
        ("9000000000", 9000000000 * NS), ("10000000000000", 10**13 * 10**6 if 10**19 < 2**63 else None),
        ("00001705314600", 1705314600 * NS),
        ("2262-04-11", 9223286400 * NS),
    )  # fmt: skip
    NO_TIMES = (
        "", " ", "now", "-5", "+5", " 5", "5 ", "5\n", "1e5", "1_000", "0x10", "1.", ".5", "1.s", "5S", "5 s", "5m",
        "\uff11\uff12",
        "\u0661\u0662", "1705314600,5", "1705314600.1234567890", "9" * 20, "9" * 21, "9" * 100_000, "nan", "inf",
        "9223372036854775808",
        "2024-02-30", "2024-13-01", "2024-1-5", "2024-W03-1", "2024-01-15T25:00", "2024-01-15T10:30:60Z",
        "2024-01-15T10",
        "2024-01-15T10:30:00.1234567Z", "2024-01-15T10:30:00,5Z", "2024-01-15T10:30+24:00",
        "2024-01-15T10:30:00+01:00:00", "2024-01-15Z",
        "2024-01-15T10:30:00Z\n", "\u0662\u0660\u0662\u0664-01-15", "1969-12-31", "1969-12-31T23:59:59Z",
        "1970-01-01T00:00+00:01",
        "0000-01-01", "0001-01-01T00:00+14:00", "9999-12-31T23:59-12:00", "2262-04-12", "12:30", "2024-01-15\0",
        "\ud800",
    )  # fmt: skip

    def test_every_documented_form_of_a_time(self) -> None:
        for text, expected in self.TIMES:
            with self.subTest(text):
                if expected is None:
                    with self.assertRaisesRegex(ValueError, "outside the times"):
                        simplebroker.parse_timestamp(text)
                else:
                    self.assertEqual(simplebroker.parse_timestamp(text), expected)

    def test_anything_else_is_no_time_and_the_error_says_what_is(self) -> None:
        for text in self.NO_TIMES:
            with self.subTest(text[:30]):
                with self.assertRaisesRegex(ValueError, "give a 19-digit id, 2024-01-15|1970 to 2262") as caught:
                    simplebroker.parse_timestamp(text)
                self.assertLess(len(str(caught.exception)), 500)

    def test_every_documented_form_of_a_duration(self) -> None:
        table = (
            ("90", 90),
            ("90s", 90),
            ("5m", 300),
            ("2h", 7200),
            ("1d", 86400),
            ("250ms", 0.25),
            ("1.5h", 5400),
            ("0", 0),
        )
        for text, seconds in (*table, ("0.1s", 0.1), ("0.5ms", 0.0005), ("007s", 7), ("36600d", 3162240000)):
            self.assertEqual(simplebroker.parse_duration(text), seconds, text)

    def test_anything_else_is_no_duration(self) -> None:
        bad = (
            "-1",
            "+1",
            "1e3",
            "1_0",
            "5M",
            "m",
            ".5",
            "5.",
            "1h30m",
            "nan",
            "inf",
            "9" * 16,
            "36601d",
            "5us",
            "5w",
            "0x5",
        )
        for text in (*bad, "", " ", "5 m", " 90", "90\n", "\uff15", "\u0665s", "9" * 100_000):
            with self.subTest(text[:30]), self.assertRaisesRegex(ValueError, "is not a duration|to 100 years"):
                simplebroker.parse_duration(text)

    def test_an_id_is_an_int_or_nineteen_digits(self) -> None:
        id = 1837025672140161024
        self.assertEqual(
            [simplebroker.check_id(value) for value in (id, str(id), 5, 2**63 - 1)], [id, id, 5, 2**63 - 1]
        )
        for bad in (
            "5",
            f"{id}\n",
            f" {id}",
            f"+{id}"[:19],
            "\uff11837025672140161024",
            "1_837025672140161024",
            "",
            -1,
            2**63,
        ):
            with self.assertRaises(ValueError):
                simplebroker.check_id(bad)
        for bad in (True, 1.0, None, b"1837025672140161024", [id]):
            with self.assertRaises(TypeError):
                simplebroker.check_id(bad)  # type: ignore[arg-type]

    def test_an_aware_datetime_is_exact_to_the_microsecond(self) -> None:
        moment = datetime(2024, 1, 15, 12, 30, 0, 999999, tzinfo=timezone(timedelta(hours=2)))
        self.assertEqual(simplebroker.datetime_to_ns(moment), 1705314600999999000)
        with self.assertRaisesRegex(ValueError, "no time zone: add"):
            simplebroker.datetime_to_ns(datetime(2024, 1, 15))


class PathsTest(CoreTest):
    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        self.project = self.dir / "project"
        self.inside = self.project / "a" / "b"
        self.inside.mkdir(parents=True)
        os.chdir(self.inside)

    def where(self, directory: Any = None, file: Any = None, **settings: object) -> Path:
        return Path(simplebroker.database_path(Settings(**settings), directory, file))

    def test_by_default_it_is_in_the_current_directory(self) -> None:
        self.assertEqual(self.where(), self.inside / ".broker.db")
        self.assertEqual(self.where(db_name="x.db"), self.inside / "x.db")
        self.assertEqual(Path(Broker(settings=Settings()).path), self.inside / ".broker.db")
        self.assertEqual(os.listdir(self.inside), [], "asking for the path makes nothing")

    def test_the_default_location_is_used_where_nothing_is_given(self) -> None:
        location = str(self.dir)
        self.assertEqual(self.where(db_location=location), self.dir / ".broker.db")
        self.assertEqual(self.where(self.project, db_location=location), self.project / ".broker.db")
        self.assertEqual(self.where(None, "x.db", db_location=location), self.inside / "x.db")
        with self.assertRaisesRegex(UsageError, "does not exist: create it"):
            self.where(db_location=str(self.dir / "missing"))

    def test_directory_and_file_may_be_given(self) -> None:
        self.assertEqual(self.where(self.project), self.project / ".broker.db")
        self.assertEqual(self.where(str(self.project), "x.db"), self.project / "x.db")
        self.assertEqual(self.where("..", "x.db"), self.project / "a" / "x.db")
        self.assertEqual(self.where(None, self.dir / "x.db"), self.dir / "x.db")
        self.assertEqual(self.where(self.project, ".queue/x.db"), self.project / ".queue" / "x.db")

    def test_an_absolute_file_excludes_a_directory(self) -> None:
        with self.assertRaisesRegex(UsageError, "give a directory or an absolute file, not both"):
            self.where(self.project, self.dir / "x.db")

    def test_a_directory_that_is_missing_is_an_error(self) -> None:
        with self.assertRaisesRegex(UsageError, "does not exist: create it first"):
            self.where(self.dir / "missing")

    def test_a_relative_file_stays_in_its_directory(self) -> None:
        os.symlink(self.dir, self.project / "out")
        os.symlink(self.dir / "other.db", self.project / "link.db")
        os.symlink(self.project / "a", self.project / "in")
        for file in ("../x.db", "a/../../x.db", "a\\..\\x.db", ".."):
            with self.assertRaisesRegex(UsageError, r"must not contain '\.\.': use an absolute path"):
                self.where(self.project, file)
        for file in ("out/x.db", "link.db", "."):
            with self.assertRaisesRegex(UsageError, "leads out of .*: use an absolute path"):
                self.where(self.project, file)
        self.assertEqual(self.where(self.project, "in/x.db"), self.project / "a" / "x.db")
        sibling = self.dir / "project-evil"
        sibling.mkdir()
        os.symlink(sibling, self.project / "evil")
        with self.assertRaisesRegex(UsageError, "leads out of"):  # a prefix of the name is not a prefix of the path
            self.where(self.project, "evil/x.db")

    def test_dots_in_a_name_are_no_parent(self) -> None:
        self.assertEqual(self.where(self.project, "a..b"), self.project / "a..b")

    def test_a_directory_that_is_a_link_is_resolved(self) -> None:
        os.symlink(self.project, self.dir / "link")
        self.assertEqual(self.where(self.dir / "link", "x.db"), self.project / "x.db")
        first, second = Queue("q", self.dir / "link" / "x.db"), Queue("q", self.project / "x.db")
        self.assertIs(first.broker.runner, second.broker.runner)
        first.close()
        second.close()

    def test_control_characters_and_nothing_are_refused(self) -> None:
        for bad in ("", "a\nb", "a\0b", "\x7f", "a\x1bb", ":memory:"):
            with self.subTest(bad):
                with self.assertRaises(UsageError):
                    self.where(self.project, bad)
                with self.assertRaises(UsageError):
                    Queue("q", bad)
                if bad != ":memory:":
                    with self.assertRaises(UsageError):
                        self.where(bad)
                    with self.assertRaises(UsageError):
                        self.where(db_name=bad)
        for bad_type in (5, b"x.db", None.__class__, ["x"]):
            with self.assertRaises(TypeError):
                Queue("q", bad_type)  # type: ignore[arg-type]

    def test_project_scope_finds_the_nearest_database_upwards(self) -> None:
        self.broker_at(self.dir)
        self.broker_at(self.project)
        self.assertEqual(self.where(project_scope=True), self.project / ".broker.db")
        self.broker_at(self.inside)
        self.assertEqual(self.where(project_scope=True), self.inside / ".broker.db")
        self.assertEqual(self.where(project_scope=True, db_location=str(self.dir)), self.inside / ".broker.db")
        self.assertEqual(self.where(self.dir, project_scope=True), self.dir / ".broker.db")
        self.assertEqual(self.where(None, "x.db", project_scope=True), self.inside / "x.db")

    def broker_at(self, directory: Path) -> None:
        (directory / ".broker.db").write_bytes(b"")

    def test_project_scope_says_what_to_do_if_there_is_none(self) -> None:
        with self.assertRaisesRegex(
            UsageError, f"no '[^']*' in '{re.escape(str(self.inside))}' or above it: run 'broker init'"
        ):
            self.where(project_scope=True, db_name="no-such-file-anywhere.db")
        self.broker_at(self.project)
        (self.inside / ".broker.db").mkdir()  # a directory of that name is no database
        self.assertEqual(self.where(project_scope=True), self.project / ".broker.db")

    def test_project_scope_stops_at_a_mount_point(self) -> None:
        self.broker_at(self.project)
        mounted = str(self.project / "a")
        with mock.patch.object(os.path, "ismount", lambda path: os.fspath(path) == mounted):
            with self.assertRaisesRegex(UsageError, "broker init"):
                self.where(project_scope=True)
            self.broker_at(self.project / "a")  # the mounted directory itself still counts
            self.assertEqual(self.where(project_scope=True), self.project / "a" / ".broker.db")

    def test_project_scope_follows_no_link_out_of_the_project(self) -> None:
        (self.dir / "real.db").write_bytes(b"")
        os.symlink(self.dir / "real.db", self.project / ".broker.db")
        with self.assertRaisesRegex(UsageError, "leads out of"):
            self.where(project_scope=True)

    def test_project_scope_takes_a_compound_name(self) -> None:
        (self.project / ".queue").mkdir()
        (self.project / ".queue" / "x.db").write_bytes(b"")
        self.assertEqual(self.where(project_scope=True, db_name=".queue/x.db"), self.project / ".queue" / "x.db")

    def test_a_compound_name_makes_its_directory_when_it_is_written(self) -> None:
        queue = Queue("q", self.dir / "new" / "deep" / "x.db")
        self.addCleanup(queue.close)
        self.assertIsNone(queue.peek())
        self.assertFalse((self.dir / "new").exists())
        queue.write("x")
        self.assertEqual(stat.S_IMODE((self.dir / "new" / "deep").stat().st_mode), 0o700)

    def test_odd_names_are_names_of_files(self) -> None:
        for name in ("a%20b", "a?mode=memory", "a#b", 'it\'s "x"', "\u00e9", "a&b=c", "file:x", "?", "a\udcff"):
            with self.subTest(name):
                path = self.dir / f"{name}.db"
                with Queue("q", path, settings=Settings(sync_mode="OFF")) as queue:
                    queue.write(name if name.isprintable() else "x")
                    self.assertTrue(path.exists())
                    self.assertEqual(queue.count(), 1)


@unittest.skipUnless(HAS_FORK and os.name == "posix", "needs POSIX permissions")
class PermissionsTest(ForkTest):
    def test_files_are_private_whatever_the_umask(self) -> None:
        for umask in (0o000, 0o777, 0o022):
            with self.subTest(oct(umask)):
                path = self.dir / f"{umask}.db"

                def work(path: Path = path, umask: int = umask) -> None:
                    os.umask(umask)
                    queue = Queue("q", path)
                    queue.write("x")
                    queue.peek()
                    modes = {path.name + suffix: 0 for suffix in ("", "-wal", "-shm", ".lock")}
                    for name in modes:
                        modes[name] = stat.S_IMODE(os.stat(self.dir / name).st_mode)
                    self.assertEqual(set(modes.values()), {0o600}, modes)
                    queue.close()
                    self.assertEqual(queue.name, Queue("q", path).name)

                self.unprivileged(work)

    def test_a_directory_that_is_made_is_private(self) -> None:
        def work() -> None:
            os.umask(0)
            Queue("q", self.dir / "sub" / "x.db").write("x")
            self.assertEqual(stat.S_IMODE((self.dir / "sub").stat().st_mode), 0o700)

        self.unprivileged(work)

    def test_a_read_only_directory_can_be_read(self) -> None:
        home = self.dir / "home"

        def work() -> None:
            home.mkdir()
            broker = Broker(home / "x.db")
            queue = broker.queue("q")
            queue.write_many(["a", "b"])
            broker.close()
            (home / "x.db.lock").unlink()
            files = sorted(os.listdir(home))
            home.chmod(0o555)
            try:
                again = Broker(home / "x.db")
                queue = again.queue("q")
                self.assertEqual((queue.peek(), queue.count(), list(queue.peek_all())), ("a", 2, ["a", "b"]))
                self.assertEqual(len(list(again.dump())), 3)
                for act in (lambda: queue.write("c"), queue.read, queue.lease, lambda: queue.move("d"), queue.delete):
                    with self.assertRaisesRegex(OperationalError, "make the file and its directory writable"):
                        act()
                self.assertEqual(sorted(os.listdir(home)), files)
            finally:
                home.chmod(0o755)
            self.assertTrue(queue.write("c"))
            self.assertEqual(queue.read_many(9), ["a", "b", "c"])

        self.unprivileged(work)

    def test_a_read_only_directory_shows_what_changes_in_it(self) -> None:
        """The file is read past SQLite's locking then, so a change must be noticed by other means."""
        if os.geteuid():
            self.skipTest("needs a second user")
        self.dir.chmod(0o711)
        home = self.dir / "home"
        home.mkdir()
        self.path = home / "x.db"

        def put(body: str) -> None:
            with self.queue() as queue:
                queue.write(body)
            self.path.chmod(0o644)

        put("a")
        home.chmod(0o755)

        def look(child: Child) -> None:
            queue = Queue("q", self.path)
            while child.hear() == "look":
                child.say(",".join(queue.peek_all()))

        child = self.child(look, NOBODY)
        child.say("look")
        self.assertEqual(child.hear(), "a")
        put("b")
        child.say("look")
        self.assertEqual(child.hear(), "a,b")
        child.say("end")
        self.assertEqual(child.wait(), 0)

    def test_a_read_only_file_can_be_read(self) -> None:
        def work() -> None:
            path = self.dir / "x.db"
            with Queue("q", path) as queue:
                queue.write("a")
            path.chmod(0o444)
            queue = Queue("q", path)
            self.assertEqual((queue.peek(), queue.stats(), queue.has_pending()), ("a", Stats(1, 0, 0), True))
            for act in (lambda: queue.write("c"), queue.read, queue.lease, queue.broker.vacuum):
                with self.assertRaisesRegex(OperationalError, "make the file and its directory writable"):
                    act()
            self.assertEqual(queue.peek(), "a")

        self.unprivileged(work)

    def test_a_file_of_someone_else_is_an_error_that_says_so(self) -> None:
        def work() -> None:
            path = self.dir / "x.db"
            with Queue("q", path) as queue:
                queue.write("a")
            path.chmod(0)
            for act in (Queue.peek, lambda queue: queue.write("b")):
                with (
                    self.assertRaisesRegex(OperationalError, "cannot be opened: check.*x.db"),
                    Queue("q", path) as queue,
                ):
                    act(queue)

        self.unprivileged(work)

    def test_a_directory_that_cannot_be_written_is_named(self) -> None:
        home = self.dir / "home"

        def work() -> None:
            home.mkdir(0o555)
            with self.assertRaisesRegex(OperationalError, "cannot create .*x.db"):
                Queue("q", home / "x.db").write("x")
            with self.assertRaisesRegex(OperationalError, "directory .*sub.* cannot be made"):
                Queue("q", home / "sub" / "x.db").write("x")
            self.assertIsNone(Queue("q", home / "x.db").peek())

        self.unprivileged(work)

    def test_deleting_the_database_fails_cleanly_in_a_read_only_directory(self) -> None:
        home = self.dir / "home"

        def work() -> None:
            home.mkdir()
            broker = Broker(home / "x.db", settings=Settings(busy_timeout_ms=200))
            broker.queue("q").write("a")
            home.chmod(0o555)
            try:
                with self.assertRaisesRegex(OperationalError, "x.db"):
                    broker.delete_database()
            finally:
                home.chmod(0o755)
            other = WriterLock(home / "x.db")
            other.acquire(time.monotonic() + 1)  # it was let go
            other.close()
            self.assertEqual(broker.queue("q").read(), "a")

        self.unprivileged(work)


@unittest.skipUnless(HAS_FORK, "needs fork")
class WriterLockTest(ForkTest):
    BUSY_MS = 200

    def busy_queue(self) -> Queue:
        return self.queue(settings=Settings(busy_timeout_ms=self.BUSY_MS, sync_mode="NORMAL"))

    def assertBusy(self, act: Callable[[], object]) -> None:
        """OperationalError within the busy timeout plus a second, and not long before it."""
        begun = time.monotonic()
        with self.assertRaisesRegex(OperationalError, "busy"):
            act()
        spent = time.monotonic() - begun
        self.assertLess(spent, self.BUSY_MS / 1000 + 1)
        self.assertGreater(spent, self.BUSY_MS / 1000 * 0.9)

    def test_it_is_a_file_beside_the_database_named_after_all_of_it(self) -> None:
        self.queue().write("x")
        with Queue("q", self.dir / "test.sqlite") as other:
            other.write("x")
        self.assertTrue((self.dir / "test.db.lock").exists())
        self.assertTrue((self.dir / "test.sqlite.lock").exists(), "kept when the last queue is closed")

    def test_when_its_holder_is_killed_others_go_on_at_once(self) -> None:
        queue = self.queue()
        queue.write("before")
        holder = self.holder()
        done = threading.Event()
        begun = threading.Event()

        def work() -> None:
            begun.set()
            queue.write("after")
            done.set()

        threading.Thread(target=work, daemon=True).start()
        self.assertTrue(begun.wait(DEADLINE_S))
        self.assertFalse(done.wait(0.2), "it waits for the holder")
        holder.signal(signal.SIGKILL)
        self.assertTrue(done.wait(1.5))
        self.assertBodies(queue, ["before", "after"])
        self.assertEqual(self.queue("held").stats().total, 0)

    @NEEDS_LOCKS
    def test_a_write_that_waits_for_another_process_takes_its_id_afterwards(self) -> None:
        """The id of before would be older than what others wrote meanwhile, and all the work be done twice."""
        queue = self.queue()
        first = queue.write("first")
        runner = queue.broker.runner
        assert isinstance(runner, SQLiteRunner)
        execute, statements, meanwhile = runner._execute, [], []

        def note(sql: str, params: Any = ()) -> list[Any]:
            statements.append(sql)
            return execute(sql, params)

        def write() -> None:
            ids.append(queue.write("waits"))

        ids: list[int] = []
        holder, thread = WriterLock(self.path), threading.Thread(target=write)
        holder.acquire(time.monotonic() + DEADLINE_S)
        with mock.patch.object(runner, "_execute", note):
            thread.start()
            self.wait_for(self.lock_threads, "the writer to queue up")
            with contextlib.closing(sqlite3.connect(str(self.path), isolation_level=None)) as stranger:
                meanwhile.append(time.time_ns())
                stranger.execute(ext.INSERT_ONE, (meanwhile[0], "q", None, "meanwhile"))
            holder.close()
            thread.join(DEADLINE_S)
        self.assertEqual(len(statements), len(set(statements)), statements)
        self.assertNotIn(ext.INSERT_MESSAGE, statements)
        self.assertLess(first, meanwhile[0])
        self.assertLess(meanwhile[0], ids[0])

    def test_a_stopped_holder_is_an_error_in_time_and_no_longer_when_it_goes_on(self) -> None:
        queue = self.busy_queue()
        queue.write("a")
        holder = self.holder()
        holder.signal(signal.SIGSTOP)
        for act in (lambda: queue.write("b"), queue.read, queue.lease, queue.broker.vacuum):
            self.assertBusy(act)
        self.assertEqual((queue.peek(), queue.count(), len(list(queue.broker.dump()))), ("a", 1, 2))
        holder.signal(signal.SIGCONT)
        holder.say("end")
        self.assertEqual(holder.wait(), 0)
        queue.write("b")
        self.assertEqual(queue.read_many(9), ["a", "b"])

    @NEEDS_LOCKS
    @unittest.skipUnless(ON_LINUX, "needs the queue for the lock")
    def test_the_next_in_the_queue_who_is_stopped_does_not_keep_others_out(self) -> None:
        queue = self.queue()
        queue.write("a")

        def be_next(child: Child) -> None:
            self.assertTrue(simplebroker._lock_turn(os.open(f"{self.path}.lock", os.O_RDWR)))
            child.say("next")
            child.hear()

        stopped = self.child(be_next)
        self.assertEqual(stopped.hear(), "next")
        stopped.signal(signal.SIGSTOP)
        for body in "bc":
            holder, begun, ended = WriterLock(self.path), threading.Event(), []
            holder.acquire(time.monotonic() + DEADLINE_S)

            def write(body: str = body, begun: threading.Event = begun, ended: list[float] = ended) -> None:
                begun.set()
                queue.write(body)
                ended.append(time.monotonic())

            writer = threading.Thread(target=write)
            writer.start()
            self.assertTrue(begun.wait(DEADLINE_S))
            self.wait_for(self.lock_threads, "the writer to queue up")
            released = time.monotonic()
            holder.close()
            writer.join(DEADLINE_S)
            self.assertLess(ended[0] - released, 1)
        self.assertBodies(queue, ["a", "b", "c"])

    @NEEDS_LOCKS
    @unittest.skipUnless(ON_LINUX, "needs the queue for the lock")
    def test_a_busy_holder_lets_the_next_go_first_when_its_turn_is_over(self) -> None:
        """Who wakes up in flock() may find it locked again, and again."""
        naps: list[float] = []
        clock = SimpleNamespace(now=100.0)

        def sleep(seconds: float) -> None:
            naps.append(clock.now)
            clock.now += seconds

        lock = WriterLock(self.path)
        self.addCleanup(lock.close)

        def hold_again_and_again(seconds: float, patient: bool = True) -> list[bool | None]:
            end, taken = clock.now + seconds, []
            while clock.now < end:
                clock.now += 0.0002
                taken.append(lock.acquire(clock.now + 1, patient=patient))
                lock.release()
            return taken

        def be_next(child: Child) -> None:
            self.assertTrue(simplebroker._lock_turn(os.open(f"{self.path}.lock", os.O_RDWR)))
            child.say("next")
            child.hear()

        with mock.patch.object(simplebroker, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep)):
            hold_again_and_again(0.5)
            self.assertEqual(naps, [], "nobody is there")
            child, came = self.child(be_next), clock.now
            self.assertEqual(child.hear(), "next")
            hold_again_and_again(0.1)
            turn = simplebroker.LOCK_TURN_S
            self.assertTrue(turn <= naps[0] - came <= turn + 2 * simplebroker.LOCK_PAUSE_S, naps)
            pauses = [after - before for before, after in zip(naps, naps[1:])]
            self.assertGreaterEqual(len(pauses), 2, "it does so again ...")
            self.assertGreaterEqual(min(pauses), simplebroker.LOCK_TRUST_S, "... but not often, if it is in vain")
            count = len(naps)
            taken = hold_again_and_again(0.1, patient=False)
            self.assertEqual((taken.index(None) > 3, taken[-1], len(naps)), (True, None, count), "or leaves at its end")
            child.say("end")
            self.assertEqual(child.wait(), 0)
            self.assertNotIn(None, hold_again_and_again(0.05, patient=False)[1:])
            self.assertEqual(len(naps), count)

    @NEEDS_LOCKS
    @unittest.skipUnless(ON_LINUX, "needs the queue for the lock")
    def test_a_waiter_is_next_until_it_has_the_lock(self) -> None:
        """Also while it blocks: so the holder knows."""
        self.queue().write("a")

        def write(child: Child) -> None:
            self.queue().write("b")
            child.say("wrote")
            child.hear()

        def blocks() -> bool:
            locks = Path("/proc/locks").read_text().splitlines()
            return any("->" in line and "FLOCK" in line and f":{os.fstat(fd).st_ino} " in line for line in locks)

        fd = os.open(f"{self.path}.lock", os.O_RDWR)
        self.addCleanup(os.close, fd)
        holder = WriterLock(self.path)
        holder.acquire(time.monotonic() + DEADLINE_S)
        writer = self.child(write)
        self.wait_for(blocks, "the writer to block")
        self.assertTrue(simplebroker._someone_is_next(fd))
        holder.release()
        self.assertEqual(writer.hear(), "wrote")
        self.assertFalse(simplebroker._someone_is_next(fd))
        holder.close()
        writer.say("end")

    def test_a_timeout_of_zero_does_not_wait(self) -> None:
        queue = self.queue(settings=Settings(busy_timeout_ms=0))
        queue.write("a")
        holder = self.holder()
        begun = time.monotonic()
        with self.assertRaisesRegex(OperationalError, "busy"):
            queue.write("b")
        self.assertLess(time.monotonic() - begun, 1)
        holder.say("end")
        holder.wait()
        queue.write("b")

    def test_the_wait_for_the_lock_and_for_sqlite_share_one_deadline(self) -> None:
        queue = self.busy_queue()
        queue.write("a")
        stranger = sqlite3.connect(str(self.path), isolation_level=None)
        self.addCleanup(stranger.close)
        stranger.execute("BEGIN IMMEDIATE")  # one that does not know of the lock file
        for act in (lambda: queue.write("b"), queue.read):
            lock = WriterLock(self.path)
            lock.acquire(time.monotonic() + 1)
            release = threading.Timer(self.BUSY_MS / 1000 * 0.8, lock.release)
            release.start()
            begun = time.monotonic()
            with self.assertRaisesRegex(OperationalError, "busy"):
                act()
            self.assertLess(time.monotonic() - begun, self.BUSY_MS / 1000 * 1.5)
            release.join()
            lock.close()
            self.assertBusy(act)  # and the next one has all of its time again
        stranger.execute("ROLLBACK")
        self.assertBodies(queue, ["a"])

    def test_readers_never_take_it(self) -> None:
        queue = self.busy_queue()
        queue.write("a")
        holder = self.holder()
        fresh = Queue("q", self.path, settings=Settings(busy_timeout_ms=50))  # a connection of its own
        begun = time.monotonic()
        self.assertEqual((fresh.peek(), fresh.count(), fresh.stats().total, fresh.has_pending()), ("a", 1, 1, True))
        self.assertEqual((list(fresh.broker.queues()), fresh.broker.status()["messages"]), (["q"], 1))
        self.assertLess(time.monotonic() - begun, 1)
        fresh.close()
        holder.say("end")

    @NEEDS_LOCKS
    def test_a_replaced_file_is_not_a_second_lock(self) -> None:
        for replace in (os.unlink, lambda path: os.replace(self.make("new"), path)):
            first, second = WriterLock(self.path), WriterLock(self.path)
            first.acquire(time.monotonic() + 1)
            first.release()
            replace(first.path)
            second.acquire(time.monotonic() + 1)
            with self.assertRaises(OperationalError):
                first.acquire(time.monotonic() + 0.1, check=True)
            second.release()
            first.acquire(time.monotonic() + 1, check=True)
            with self.assertRaises(OperationalError):
                second.acquire(time.monotonic() + 0.1, check=True)
            first.close()
            second.acquire(time.monotonic() + 1)
            second.close()

    def make(self, name: str) -> Path:
        path = self.dir / name
        path.write_bytes(b"")
        return path

    @NEEDS_LOCKS
    def test_who_waits_for_a_deleted_file_gets_the_new_one(self) -> None:
        first, second = WriterLock(self.path), WriterLock(self.path)
        first.acquire(time.monotonic() + 1)
        waiter = threading.Thread(target=second.acquire, args=(time.monotonic() + DEADLINE_S,))
        waiter.start()
        first.delete()
        waiter.join(DEADLINE_S)
        self.assertTrue(os.path.exists(second.path))
        with self.assertRaises(OperationalError):
            first.acquire(time.monotonic() + 0.05)
        second.close()
        first.close()

    @NEEDS_LOCKS
    def test_who_gave_up_waiting_does_not_get_it_later(self) -> None:
        first, second, third = (WriterLock(self.path) for _ in range(3))
        first.acquire(time.monotonic() + 1)
        with self.assertRaises(OperationalError):
            second.acquire(time.monotonic() + 0.05)
        first.release()
        for _ in range(20):
            third.acquire(time.monotonic() + 2)
            third.release()
            threading.Event().wait(0.002)  # room for a thread that wrongly takes it
        for lock in (second, first, second):
            lock.acquire(time.monotonic() + 2)
            lock.release()
        for lock in (first, second, third):
            lock.close()

    def test_nothing_is_lost_while_the_file_is_deleted_again_and_again(self) -> None:
        self.queue().write("first")
        end = self.dir / "end"

        def work(number: int) -> None:
            if not number:
                while not end.exists():
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(f"{self.path}.lock")
            else:
                queue = self.queue()
                for step in range(60):
                    queue.write(f"{number} {step}")
                    queue.move("moved")
                end.touch()

        self.together(4, work)
        found = [m.id for name in self.broker().queues() for m in self.queue(name).peek_all()]
        self.assertEqual((len(found), len(set(found))), (181, 181))

    def test_a_symbolic_link_in_its_place_is_refused_and_not_followed(self) -> None:
        target = self.make("precious")
        os.symlink(target, f"{self.path}.lock")
        queue = self.queue()
        with self.assertRaisesRegex(OperationalError, "lock file .* is a symbolic link: remove it"):
            queue.write("x")
        self.assertIsNone(queue.peek())
        self.assertEqual(target.read_bytes(), b"")
        os.unlink(f"{self.path}.lock")
        queue.write("x")

    def test_a_thread_waits_for_another_threads_transaction_and_not_longer_than_allowed(self) -> None:
        queue = self.busy_queue()
        queue.write("a")
        inside, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with queue.broker.transaction():
                queue.write("b")
                inside.set()
                leave.wait(DEADLINE_S)

        thread = threading.Thread(target=hold)
        thread.start()
        self.assertTrue(inside.wait(DEADLINE_S))
        self.assertBusy(queue.read)
        leave.set()
        thread.join(DEADLINE_S)
        self.assertEqual(queue.read_many(9), ["a", "b"])

    def test_threads_take_turns(self) -> None:
        queue = self.queue()
        barrier = threading.Barrier(6)
        taken: list[str] = []

        def work(number: int) -> None:
            barrier.wait(DEADLINE_S)
            for step in range(25):
                queue.write(f"{number} {step}")
                with queue.broker.transaction():
                    message = queue.read()
                    assert message is not None
                    queue.broker.queue("copy").write(message)
                taken.append(message)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        self.assertEqual((len(taken), len(set(taken)), queue.count()), (150, 150, 0))
        self.assertEqual(sorted(self.queue("copy").peek_all()), sorted(taken))

    def test_processes_take_turns(self) -> None:
        def work(number: int) -> None:
            queue = self.queue()
            for step in range(40):
                queue.write(f"{number} {step}")

        self.together(6, work)
        found = list(self.queue().peek_all())
        self.assertEqual(len(set(found)), 240)
        for number in range(6):  # each writer's messages in its order
            mine = [int(body.split()[1]) for body in found if body.startswith(f"{number} ")]
            self.assertEqual(mine, list(range(40)))

    def test_a_child_forked_while_a_thread_holds_it_neither_hangs_nor_disturbs(self) -> None:
        queue = self.busy_queue()
        queue.write("a")
        inside, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with queue.broker.transaction():
                queue.write("b")
                inside.set()
                leave.wait(DEADLINE_S)

        def work(child: Child) -> None:
            begun = time.monotonic()
            with self.assertRaises(OperationalError):
                queue.write("while it is held")
            self.assertLess(time.monotonic() - begun, self.BUSY_MS / 1000 + 1)

        thread = threading.Thread(target=hold)
        thread.start()
        self.assertTrue(inside.wait(DEADLINE_S))
        self.assertEqual(self.child(work).wait(), 0)
        leave.set()
        thread.join(DEADLINE_S)
        self.assertEqual(self.child(lambda child: queue.write("c")).wait(), 0)
        self.assertBodies(queue, ["a", "b", "c"])

    def test_a_child_does_not_keep_its_killed_parents_lock(self) -> None:
        def work(child: Child) -> None:
            with Broker(self.path).transaction():
                if os.fork():
                    child.say("forked")
                child.hear()  # the grandchild too, and it lives on
                os._exit(0)

        child = self.child(work)
        self.assertEqual(child.hear(), "forked")
        child.signal(signal.SIGKILL)
        child.wait()
        other = WriterLock(self.path)
        other.acquire(time.monotonic() + 1)
        other.close()

    @NEEDS_LOCKS
    def test_a_queue_closed_while_it_waited_leaves_no_lock_to_a_child(self) -> None:
        other = WriterLock(self.path)
        other.acquire(time.monotonic() + 1)
        queue = self.busy_queue()
        self.assertBusy(lambda: queue.write("x"))  # its thread still waits for its turn
        queue.close()
        child = self.child(lambda child: child.hear())
        other.release()
        other.close()
        self.wait_for(lambda: not self.lock_threads(), "the thread to end")
        self.queue().write("x")
        child.say("end")

    @staticmethod
    def lock_threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == simplebroker.LOCK_THREAD_NAME]

    @NEEDS_LOCKS
    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "needs /proc")
    def test_closing_leaves_no_descriptor_and_no_thread(self) -> None:
        def work(child: Child) -> None:
            before = sorted(os.listdir("/proc/self/fd"))
            other = WriterLock(self.path)
            other.acquire(time.monotonic() + 1)
            for _ in range(3):
                queue = Queue("q", self.path, settings=Settings(busy_timeout_ms=30))
                with self.assertRaises(OperationalError):
                    queue.write("x")
                queue.close()
            waited = WriterLock(self.path)
            threading.Timer(0.05, other.release).start()
            waited.acquire(time.monotonic() + DEADLINE_S)
            waited.release()
            waited.close()
            other.close()
            for _ in range(3):
                with Queue("q", self.path) as queue:
                    queue.write("x")
                    list(queue.read_all())
                    list(queue.broker.dump())
            self.wait_for(lambda: threading.active_count() == 1, "the threads to end")
            self.wait_for(lambda: sorted(os.listdir("/proc/self/fd")) == before, "the descriptors to be closed")

        self.assertEqual(self.child(work).wait(), 0)  # where nothing else is opened or closed meanwhile

    @contextmanager
    def without_file_locks(self) -> Iterator[None]:
        """As on a platform that has none."""
        self.wait_for(lambda: not self.lock_threads(), "the threads that use them to end")
        with mock.patch.object(simplebroker, "fcntl", None):
            yield

    def test_without_file_locks_everything_works(self) -> None:
        with self.without_file_locks():
            queue = self.queue()
            queue.write("a")
            child = self.child(lambda child: self.queue().write("b"))
            self.assertEqual(child.wait(), 0)
            with queue.broker.transaction():
                self.assertEqual(queue.read(), "a")
                queue.move("c")
            self.assertEqual(self.queue("c").read(), "b")

    def test_without_file_locks_a_busy_database_is_still_an_error_in_time(self) -> None:
        with self.without_file_locks():
            queue = self.busy_queue()
            queue.write("a")
            holder = self.holder()
            self.assertBusy(lambda: queue.write("b"))
            holder.say("end")
            holder.wait()

    def test_without_file_locks_processes_that_open_a_fresh_path_all_succeed(self) -> None:
        with self.without_file_locks():
            for turn in range(30 if FULL else 2):
                self.path = self.dir / f"{turn}.db"
                self.together(12, lambda number: self.queue().write("x"))
                self.assertEqual(self.queue().count(), 12)

    def test_without_file_locks_an_empty_file_that_someone_writes_is_waited_for(self) -> None:
        stranger = sqlite3.connect(str(self.path), isolation_level=None, check_same_thread=False)
        self.addCleanup(stranger.close)
        stranger.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.2, lambda: stranger.execute("COMMIT"))
        timer.start()
        with self.without_file_locks():
            self.queue().write("x")
        timer.join()
        self.assertEqual(self.queue().count(), 1)

    def test_without_file_locks_making_the_file_does_not_remove_a_faster_ones_log(self) -> None:
        """Between our making the file and our clearing up, another process opens it and writes."""
        real, other = os.path.exists, []

        def exists(path: Any) -> bool:
            if not other and str(path) == f"{self.path}-wal":
                other.append(self.queue(settings=Settings(cache_mb=7)))  # a connection of its own
                other[0].write("theirs")
            return real(path)

        with self.without_file_locks(), mock.patch.object(os.path, "exists", exists):
            self.queue().write("ours")
        for queue in (*other, self.queue()):
            self.assertEqual(sorted(queue.peek_all()), ["ours", "theirs"] if other else ["ours"])


@unittest.skipUnless(HAS_FORK, "needs fork")
class RunnerTest(ForkTest):
    """The built-in runner and transactions."""

    def state(self) -> list[str]:
        return list(self.broker().dump())

    def test_an_error_in_a_transaction_leaves_everything_as_it_was(self) -> None:
        broker = self.broker()
        queue = broker.queue("q")
        queue.write_many(["a", "b", "c", "d"])
        leased = queue.lease(60)
        assert leased is not None
        before = self.state()
        for error in (ZeroDivisionError, KeyboardInterrupt, SystemExit):
            with self.assertRaises(error), broker.transaction():
                queue.write("e")
                queue.write_many(["f", "g"], delay=5)
                queue.read()
                queue.move("other")
                queue.ack(leased)
                broker.broadcast("all")
                queue.delete()
                raise error
            self.assertEqual(self.state(), before)

    def test_transactions_nest(self) -> None:
        broker = self.broker()
        queue = broker.queue("q")
        with broker.transaction():
            queue.write("outer")
            with self.assertRaises(ZeroDivisionError), broker.transaction():
                queue.write("lost")
                with broker.transaction():
                    queue.write("lost too")
                raise ZeroDivisionError
            with broker.transaction():
                queue.write("inner")
            self.assertBodies(queue, ["outer", "inner"])
        self.assertBodies(queue, ["outer", "inner"])
        with self.assertRaises(ZeroDivisionError), broker.transaction():
            with broker.transaction():
                queue.write("lost with the outer one")
            raise ZeroDivisionError
        self.assertBodies(queue, ["outer", "inner"])

    def test_nothing_of_a_transaction_is_seen_before_it_ends(self) -> None:
        broker = self.broker()
        other = self.queue(settings=Settings(cache_mb=9))  # a connection of its own
        with broker.transaction():
            broker.queue("q").write_many(["a", "b"])
            self.assertEqual((other.count(), broker.queue("q").count()), (0, 2))
        self.assertEqual(other.count(), 2)

    def test_a_failing_rollback_does_not_hide_the_first_error(self) -> None:
        class Failing(PlainRunner):
            failure: type[Exception] = OperationalError

            def commit(self) -> None:
                raise OperationalError("the commit failed")

            def rollback(self) -> None:
                super().rollback()
                raise self.failure("the rollback failed")

        runner = Failing(self.path)
        self.addCleanup(runner.close)
        for statement in ext.SCHEMA:
            runner.run(statement)
        broker = Broker(runner=runner)
        for runner.failure in (OperationalError, RuntimeError):  # another database has errors of its own
            with self.subTest(runner.failure.__name__), self.assertLogs("simplebroker", "WARNING") as log:
                with self.assertRaises(ZeroDivisionError), broker.transaction():
                    raise ZeroDivisionError
                with self.assertRaisesRegex(OperationalError, "the commit failed"):
                    broker.queue("q").write_many(["x"])
                self.assertEqual(["the rollback failed" in line for line in log.output], [True, True])
        self.assertEqual(broker.queues(), {})

    def test_what_queues_do_in_a_transaction_belongs_to_it(self) -> None:
        broker = self.broker(clock=Clock())
        queue = broker.queue("q")
        queue.write("a")

        def act() -> None:
            queue.write("b")  # the clock stands still: the id is counted on
            queue.write_many(["c", "d"])
            self.assertEqual(queue.read(), "a")
            queue.move("other")

        with self.assertRaises(ZeroDivisionError), broker.transaction():
            act()
            raise ZeroDivisionError
        self.assertBodies(queue, ["a"])
        with broker.transaction():
            act()
        self.assertBodies(queue, ["c", "d"])

    def test_closing_inside_a_transaction_of_its_own_is_refused(self) -> None:
        broker = self.broker()
        with broker.transaction():
            for act in (broker.delete_database, broker.runner.close):
                with self.assertRaisesRegex(UsageError, "is in a transaction"):
                    act()
            broker.queue("q").write("a")
        self.assertBodies(broker.queue("q"), ["a"])

    def test_a_statement_that_fails_lets_the_transaction_go_on(self) -> None:
        broker = self.broker()
        queue = broker.queue("q")
        id = queue.write("a")
        with broker.transaction() as run:
            queue.write("b")
            with self.assertRaises(IntegrityError):
                run(ext.INSERT_LOADED, (id, "q", "twice", None, 0))
            queue.write("c")
        self.assertBodies(queue, ["a", "b", "c"])

    def test_commit_and_rollback_without_a_transaction_are_errors(self) -> None:
        runner = self.broker().runner
        for act in (runner.commit, runner.rollback):
            with self.assertRaisesRegex(OperationalError, "no open transaction"):
                act()

    def test_queues_of_one_process_share_a_connection(self) -> None:
        first, second = self.queue("a"), self.queue("b")
        self.assertIs(first.broker.runner, second.broker.runner)
        first.close()
        second.write("x")  # the connection closes with its last user
        self.assertIsNot(self.queue(settings=Settings(cache_mb=3)).broker.runner, second.broker.runner)

    def test_a_forked_child_has_a_connection_of_its_own_and_leaves_its_parents_alone(self) -> None:
        queue = self.queue()
        queue.write("a")

        def work(child: Child) -> None:
            queue.write("b")
            self.assertEqual(queue.read(), "a")
            queue.close()

        self.assertEqual(self.child(work).wait(), 0)
        self.assertBodies(queue, ["b"])
        queue.write("c")
        self.assertEqual(self.child(lambda child: queue.close()).wait(), 0)
        self.assertEqual(queue.read_many(9), ["b", "c"])
        check = sqlite3.connect(str(self.path))
        self.addCleanup(check.close)
        self.assertEqual(check.execute("PRAGMA integrity_check").fetchone(), ("ok",))

    def test_what_a_forked_child_writes_outlives_its_parents_connections(self) -> None:
        """SQLite notes its locks per process: a child that inherits the notes believes to hold the parent's."""

        def write_twice(child: Child) -> None:
            for body in "bc":
                try:
                    self.queue().write(body)
                    child.say("wrote")
                except OperationalError:
                    child.say("refused")
                child.hear()

        code = "import simplebroker, sys; print(*simplebroker.Queue('q', sys.argv[1]).peek_all())"
        for dumping in (False, True):
            with self.subTest(dumping=dumping):
                self.path = self.dir / f"{dumping}.db"
                broker = self.broker()
                broker.queue("q").write("a")
                lines = broker.dump() if dumping else iter(())
                next(lines, None)
                child = self.child(write_twice)
                answers = [child.hear()]
                list(lines)
                broker.close()
                child.say("closed")
                answers.append(child.hear())
                stranger = self.python(code, str(self.path))
                written = [body for body, answer in zip("bc", answers) if answer == "wrote"]
                self.assertEqual(stranger.communicate(timeout=DEADLINE_S)[0].decode().split(), ["a", *written])
                self.assertTrue(dumping or answers == ["wrote", "wrote"], answers)
                child.say("end")
                self.assertEqual(child.wait(), 0)

    def test_a_child_forked_in_a_transaction_has_none(self) -> None:
        queue = self.queue(settings=Settings(busy_timeout_ms=100))
        runner = queue.broker.runner

        def work(child: Child) -> None:
            for act in (runner.commit, runner.rollback):
                with self.assertRaisesRegex(OperationalError, "forked child does not inherit one"):
                    act()
            with self.assertRaises(OperationalError):
                queue.write("of the child")

        with queue.broker.transaction():
            queue.write("a")
            self.assertEqual(self.child(work).wait(), 0)
            queue.write("b")
        self.assertBodies(queue, ["a", "b"])

    def test_a_child_that_ends_leaves_its_parents_transaction_alone(self) -> None:
        code = """
            import os, sys
            from simplebroker import Broker
            broker = Broker(sys.argv[1])
            with broker.transaction():
                broker.queue("q").write_many(["a" * 1000] * 20_000)  # more than the cache holds: some is in the log
                if not os.fork():
                    sys.exit(0)  # the interpreter frees what it has
                os.wait()
                broker.queue("q").write("b")
            print(len(list(broker.queue("q").peek_all())))
        """
        self.environ["BROKER_CACHE_MB"] = "1"
        parent = self.python(code, str(self.path), stderr=subprocess.DEVNULL)  # the child's rollback fails, and says so
        self.assertEqual(parent.communicate(timeout=DEADLINE_S)[0].split(), [b"20001"])
        self.assertEqual(self.queue().count(), 20_001)

    def test_a_child_forked_while_a_queue_is_opened_can_open_one(self) -> None:
        with simplebroker._shared_guard:
            child = self.child(lambda child: self.queue().write("x"))
            self.assertEqual(child.wait(), 0)
        self.assertBodies(self.queue(), ["x"])

    def test_forks_at_any_moment_with_threads_running_neither_hang_nor_lose(self) -> None:
        queue = self.queue()
        stop = threading.Event()
        counts: list[Any] = [0, 0]

        def work(number: int) -> None:
            try:
                while not stop.is_set():
                    queue.write("parent")
                    counts[number] += 1
            except OperationalError as error:
                counts[number] = error

        def forked(child: Child) -> None:
            for _ in range(3):
                self.queue("children").write("child")
                queue.peek()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(60 if FULL else 12):
                self.assertEqual(self.child(forked).wait(), 0)
            seen = list(counts)
            self.wait_for(lambda: all(now != before for now, before in zip(counts, seen)), "the threads to go on")
        finally:
            stop.set()
            for thread in threads:
                thread.join(DEADLINE_S)
        self.assertEqual(queue.count(), sum(counts))
        self.assertEqual(self.queue("children").count(), 180 if FULL else 36)

    def test_a_fork_overlooks_no_runner_while_threads_make_and_drop_others(self) -> None:
        kept = {SQLiteRunner(self.path) for _ in range(200)}
        seen: set[SQLiteRunner] = set()
        visit = simplebroker._each_runner(seen.add)  # what a fork calls, but for what it does to each
        stop = threading.Event()
        made: list[int] = []

        def work() -> None:
            while not stop.is_set():
                made.append(id(SQLiteRunner(self.path)))

        interval = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, interval)
        sys.setswitchinterval(1e-6)
        thread = threading.Thread(target=work)
        thread.start()
        try:
            while len(made) < 500 and thread.is_alive():
                seen.clear()
                visit()
                self.assertEqual(kept - seen, set())
        finally:
            stop.set()
            thread.join(DEADLINE_S)

    if sys.implementation.name == "cpython" and hasattr(
        signal, "setitimer"
    ):  # PyPy's sqlite3 itself is not safe from them

        def test_interrupts_at_any_moment_leave_nothing_locked_or_open(self) -> None:
            code = """
                import random, signal, sys
                from simplebroker import Queue, Settings

                def interrupt(*_):
                    raise KeyboardInterrupt

                queue = Queue("q", sys.argv[1])
                other = Queue("other", sys.argv[1], settings=Settings(cache_mb=3))  # a connection and a lock of its own
                rng, written, taken, rounds = random.Random(1), 0, 0, int(sys.argv[2])
                signal.signal(signal.SIGALRM, interrupt)
                for number in range(1, rounds + 1):
                    try:
                        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0001, 0.002))
                        while True:
                            queue.write("x")
                            written += 1
                            message = queue.lease(3600)
                            if message is not None:
                                queue.ack(message)
                                taken += 1
                            queue.peek()
                    except KeyboardInterrupt:
                        pass
                    other.write("y")
                    assert other.count() == number
                assert abs(queue.stats().total - (written - taken)) <= rounds  # of each interrupted one, either
                assert taken > rounds // 30, (taken, rounds)  # about two in each, where nothing else runs
                queue.write("last")
                assert list(queue.peek_all())[-1] == "last"
                print("done")
            """
            # Without coverage, which an interrupt makes wait for itself.
            with mock.patch.object(sys.modules[__name__], "PYTHON", [sys.executable, "-S"]):
                child = self.python(code, str(self.path), "2000" if FULL else "300")
            self.assertEqual(child.communicate(timeout=DEADLINE_S)[0], b"done\n")

    def test_an_interrupt_at_each_step_of_a_transaction_ends_it_and_only_it(self) -> None:
        other = self.queue("other", settings=Settings(cache_mb=3, busy_timeout_ms=5_000))
        broker = Broker(self.path, settings=Settings(sync_mode="FULL", busy_timeout_ms=5_000))
        self.addCleanup(broker.close)
        queue, runner, steps = broker.queue("q"), broker.runner, []
        assert isinstance(runner, SQLiteRunner)
        real = runner._execute

        def execute(sql: str, params: Any = ()) -> Any:
            rows = real(sql, params)
            if sql in steps:
                steps.clear()
                raise KeyboardInterrupt
            return rows

        def nested() -> None:
            with broker.relaxed_transaction():
                queue.write("outer")
                try:
                    with broker.transaction():
                        queue.write("inner")
                except KeyboardInterrupt:  # it ended only the inner one
                    self.assertEqual(runner.depth(), 1)

        with mock.patch.object(runner, "_execute", execute), mock.patch("simplebroker.log_warning"):
            for step, kept in (
                ("PRAGMA synchronous = NORMAL", False),
                ("BEGIN IMMEDIATE", False),
                ("SAVEPOINT nested", True),
                (ext.INSERT_MESSAGE, False),
                ("RELEASE nested", True),
                ("COMMIT", True),
                ("PRAGMA synchronous = FULL", True),
            ):
                with self.subTest(step):
                    queue.delete()
                    steps[:] = [step]
                    try:
                        nested()
                    except KeyboardInterrupt:
                        pass
                    self.assertEqual(steps, [])
                    self.assertEqual(runner.depth(), 0)
                    other.write("y")  # through a connection and a lock of its own
                    thread = threading.Thread(target=queue.write, args=("z",))
                    thread.start()
                    thread.join(DEADLINE_S)
                    found = queue.peek_many(9)
                    self.assertEqual(
                        found, [*(["outer"] if kept else []), *(["inner"] if "inner" in found else []), "z"]
                    )
                    queue.write("synced")
                    self.assertEqual(real("PRAGMA synchronous"), [(2,)])

    def test_a_custom_runner_stays_the_callers(self) -> None:
        runner = PlainRunner(self.path)
        with Queue("q", runner=runner) as queue, Broker(runner=runner) as broker:
            queue.write("x")
        self.assertEqual(broker.path, "")
        self.assertEqual(runner.run(ext.SELECT_VERSION, fetch=True), [(1,)])  # it was not closed
        with self.assertRaises(ValueError):
            Broker(runner=runner).delete_database()
        runner.close()

    def test_a_path_and_a_runner_or_broker_exclude_each_other(self) -> None:
        broker = self.broker()
        for options in (
            {"db_path": self.path, "runner": broker.runner},
            {"db_path": self.path, "broker": broker},
            {"runner": broker.runner, "broker": broker},
            {"settings": Settings(), "broker": broker},
        ):
            with self.assertRaisesRegex(ValueError, "not both"):
                Queue("q", **options)  # type: ignore[arg-type]
        with self.assertRaisesRegex(ValueError, "not both"):
            Broker(self.path, runner=broker.runner)

    def test_a_custom_runner_and_the_built_in_one_share_a_file(self) -> None:
        self.queue().write("a")
        runner = PlainRunner(self.path)
        self.addCleanup(runner.close)
        queue = Queue("q", runner=runner)
        queue.write("b")
        self.assertEqual(self.queue().read(), "a")
        self.assertEqual(queue.read(), "b")

    def test_a_custom_runner_refuses_a_newer_schema(self) -> None:
        runner = PlainRunner(self.path)
        self.addCleanup(runner.close)
        Queue("q", runner=runner).write("x")
        runner.connection.execute("UPDATE meta SET version = 2")
        with self.assertRaisesRegex(DatabaseError, "schema version 2"):
            Queue("q", runner=runner).write("y")


@unittest.skipUnless(HAS_FORK, "needs fork")
class SharedTransactionTest(ForkTest):
    """Threads that write at the same time share a transaction: the first in line does the work of all."""

    def setUp(self) -> None:
        super().setUp()
        self.commits = commits = []
        self.durable = synced = []

        class Counting(SQLiteRunner):
            def begin_immediate(self, *, durable: bool = True) -> None:
                super().begin_immediate(durable=durable)
                synced.append(durable)

            def commit(self) -> None:
                super().commit()
                commits.append(threading.get_ident())

        self.runner = Counting(self.path, Settings(sync_mode="FULL", busy_timeout_ms=60_000))
        self.addCleanup(self.runner.close)
        self.broker_ = Broker(runner=self.runner)
        self.queue_ = self.broker_.queue("q")
        self.queue_.write_many(list("abcdef"))
        self.results: dict[str, Any] = {}
        self.threads: list[threading.Thread] = []
        self.addCleanup(self.join)

    def join(self) -> None:
        for thread in self.threads:
            thread.join(DEADLINE_S)
            self.assertFalse(thread.is_alive())

    def start(self, **works: Callable[[], object]) -> None:
        """Run each in a thread, and note what it returns or raises."""

        def note(name: str, work: Callable[[], object]) -> None:
            try:
                self.results[name] = work()
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                self.results[name] = error

        for name, work in works.items():
            thread = threading.Thread(target=note, args=(name, work))
            thread.start()
            self.threads.append(thread)

    def wait_for_line(self, length: int) -> None:
        self.wait_for(lambda: len(self.runner._line.works) == length, f"{length} threads in line")

    def start_in_order(self, **works: Callable[[], object]) -> None:
        """The same, each when the one before stands in line."""
        length = len(self.runner._line.works)
        for number, (name, work) in enumerate(works.items(), 1):
            self.start(**{name: work})
            self.wait_for_line(length + number)

    def test_all_that_wait_are_served_by_one_commit_each_with_its_own_result(self) -> None:
        queue, stranger = self.queue_, self.queue()
        leased, doomed, kept, back = (queue.lease(60) for _ in range(4))
        assert leased and doomed and kept and back
        with self.broker_.transaction():
            self.commits.clear()
            self.start_in_order(
                lease_first=lambda: queue.lease(60, message_id=leased.id),  # which needs no sync, unlike others
                write=lambda: queue.write("g"),
                write_many=lambda: queue.write_many(["h", "i"]),
                read=queue.read,
                lease=lambda: queue.lease(60),
                ack=lambda: queue.ack(leased),
                dead_letter=lambda: queue.dead_letter(doomed),
                extend=lambda: queue.extend(kept, 600),
                release=lambda: queue.release(back),
                move=lambda: queue.move("other"),
            )
            queue.write("of the transaction")  # does not stand in line behind those who wait for it
            queue.write_many(["and its end"])
            self.commits.clear()
        self.join()
        self.assertEqual(len(self.commits), 2)
        self.assertTrue(self.durable[-1])
        self.assertEqual(self.results["read"], "e")
        self.assertEqual(self.results["lease"], "f")
        self.assertEqual(self.results["move"], "d")
        written = [self.results["write"], *self.results["write_many"]]
        self.assertEqual([int(message.id) for message in stranger.peek_all()][2:], written)
        self.assertEqual([str(m) for m in stranger.peek_all()], ["of the transaction", "and its end", "g", "h", "i"])
        self.assertEqual(self.queue("q.dead").read(), "b")
        self.assertEqual(stranger.stats(), (5, 2, 0))
        self.assertEqual(
            set(self.results) - {"write", "write_many", "read", "lease", "move"},
            {name for name, result in self.results.items() if result is None},
        )

    def test_what_needs_no_sync_is_not_synced_for_company(self) -> None:
        with self.broker_.transaction():
            self.start_in_order(**{name: lambda: self.queue_.lease(60) for name in ("a", "b", "c")})
        self.join()
        self.assertEqual(self.durable[-1:], [False])
        self.assertEqual(sorted(self.results.values()), ["a", "b", "c"])

    def test_an_error_of_one_is_its_own_and_the_others_are_done_once(self) -> None:
        queue = self.queue_
        lost = queue.lease(60)
        assert lost is not None
        queue.release(lost)
        taken = queue.lease(60)  # by someone else
        assert taken is not None
        calls: list[str] = []

        def half(run: Any) -> None:
            calls.append("half")
            run(ext.DELETE_MESSAGE, (lost.id,))
            raise KeyError("half done")

        with self.broker_.transaction():
            self.start_in_order(
                first=lambda: queue.write("g"),
                lost=lambda: queue.ack(lost),
                half=lambda: self.broker_.together(half),
                last=lambda: queue.write("h"),
            )
        self.join()
        self.assertIsInstance(self.results["lost"], LeaseLost)
        self.assertIsInstance(self.results["half"], KeyError)
        self.assertEqual(calls, ["half"] * 2)
        queue.release(taken)
        self.assertBodies(self.queue(), list("abcdefgh"))
        self.assertEqual(self.runner._line.works, [])

    def test_each_waits_for_the_busy_timeout_and_no_longer(self) -> None:
        self.runner._timeout_s = 0.3
        started = time.monotonic()
        with self.broker_.transaction():  # of this process
            self.start_in_order(**{name: lambda: self.queue_.write("x") for name in ("a", "b", "c")})
            self.join()
        self.assertLess(time.monotonic() - started, 0.3 + 1)
        self.runner._timeout_s = 1.0
        holder = self.holder()  # another process
        started = time.monotonic()
        self.start(**{name: lambda: self.queue_.write("x") for name in ("d", "e", "f", "g")})
        self.join()
        self.assertLess(time.monotonic() - started, 1.0 + 0.9)  # also of those that wait for one that waits in vain
        self.assertEqual([type(self.results[name]) for name in "abcdefg"], [OperationalError] * 7)
        self.assertEqual(self.runner._line.works, [])
        holder.signal(signal.SIGKILL)
        self.queue_.write("g")
        self.assertBodies(self.queue(), list("abcdefg"))

    def test_work_that_is_under_way_at_its_deadline_is_not_reported_as_failed(self) -> None:
        inside, go_on = threading.Event(), threading.Event()

        def slow(run: Any) -> str:
            inside.set()
            go_on.wait(DEADLINE_S)
            return "slow"

        with self.broker_.transaction():
            self.start_in_order(slow=lambda: self.broker_.together(slow))
            self.runner._timeout_s = 0.2
            self.start_in_order(quick=lambda: self.queue_.write("g"))
            late = self.runner._line.works[1]
        self.assertTrue(inside.wait(DEADLINE_S))
        self.wait_for(lambda: time.monotonic() > late.deadline + 0.05, "its deadline")
        self.assertEqual(self.results, {})
        go_on.set()
        self.join()
        self.assertEqual(self.results, {"slow": "slow", "quick": list(self.queue().peek_all())[-1].id})
        self.assertBodies(self.queue(), list("abcdefg"))

    def test_one_that_is_put_back_by_an_error_of_another_may_still_give_up(self) -> None:
        go_on = threading.Event()
        calls: list[int] = []

        def fail_together_then_wait(run: Any) -> None:
            calls.append(1)
            if len(calls) == 1:
                raise KeyError("together")
            go_on.wait(DEADLINE_S)

        with self.broker_.transaction():
            self.start_in_order(first=lambda: self.broker_.together(fail_together_then_wait))
            self.runner._timeout_s = 0.3
            self.start_in_order(second=lambda: self.queue_.write("g"))
            self.runner._timeout_s = 60
        try:
            self.wait_for(lambda: "second" in self.results, "the second to give up")
        finally:
            go_on.set()
        self.join()
        self.assertIsInstance(self.results["second"], OperationalError)
        self.assertIsNone(self.results["first"])
        self.assertBodies(self.queue(), list("abcdef"))

    def test_the_main_thread_does_the_work_of_no_other(self) -> None:
        """An interrupt comes to the main thread, mostly at the end of a commit, and would leave open what was done."""
        inside = threading.Event()

        def hold() -> None:
            with self.broker_.transaction():
                inside.set()
                self.wait_for_line(1)
                self.start_in_order(b=lambda: self.queue_.write("h"), c=lambda: self.queue_.write("i"))

        self.start(hold=hold)
        self.assertTrue(inside.wait(DEADLINE_S))
        self.commits.clear()
        self.queue_.write("g")
        self.join()
        self.assertEqual(len(self.commits), 3)  # of hold(), the main thread, and the two others
        self.assertEqual(self.commits.count(threading.get_ident()), 1)
        self.assertBodies(self.queue(), list("abcdefghi"))

    def test_an_interrupt_ends_the_waiting_of_the_main_thread_and_of_no_other(self) -> None:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, as in the background
        self.addCleanup(signal.signal, signal.SIGINT, before)
        for place in (0, 1):
            with self.subTest(place=place):
                inside = threading.Event()

                def hold(inside: threading.Event = inside, place: int = place) -> None:
                    with self.broker_.transaction():
                        before = {f"before{place}": lambda: self.queue_.write("x")} if place else {}
                        self.start_in_order(**before)
                        inside.set()
                        self.wait_for_line(place + 1)
                        self.start_in_order(**{f"after{place}": lambda: self.queue_.write("y")})
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                        self.wait_for_line(place + 1)

                self.start(**{f"hold{place}": hold})
                self.assertTrue(inside.wait(DEADLINE_S))
                with self.assertRaises(KeyboardInterrupt):
                    self.queue_.write("never")
                self.join()
        self.assertEqual([error for error in self.results.values() if isinstance(error, BaseException)], [])
        self.assertEqual(sorted(self.queue_.read_many(99)), sorted([*"abcdef", "y", "x", "y"]))

    def test_a_forked_child_does_not_wait_for_threads_that_it_lacks(self) -> None:
        self.runner._line.works.append(simplebroker._Work(lambda run: None, True, 60))
        child = self.child(lambda child: self.queue_.write("g"))
        self.assertEqual(child.wait(), 0)
        self.runner._line.works.clear()
        self.assertBodies(self.queue_, list("abcdefg"))

    def test_threads_and_processes_together_lose_and_double_nothing(self) -> None:
        rounds = 100 if FULL else 25

        def work(number: int) -> None:
            with Broker(self.path) as broker:
                barrier = threading.Barrier(6)

                def write_and_take(thread: int) -> None:
                    barrier.wait(DEADLINE_S)
                    mine, done = broker.queue("in"), broker.queue("out")
                    for turn in range(rounds):
                        mine.write(f"{number}.{thread}.{turn}")
                        message = mine.lease(60)
                        if message is not None:
                            done.write(message)
                            mine.ack(message)

                threads = [threading.Thread(target=write_and_take, args=(thread,)) for thread in range(6)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(DEADLINE_S)

        self.together(3, work)
        queue = self.queue("in")
        for message in queue.read_all():
            self.queue("out").write(message)
        written = [f"{number}.{thread}.{turn}" for number in range(3) for thread in range(6) for turn in range(rounds)]
        self.assertEqual(sorted(self.queue("out").read_many(len(written) + 1)), sorted(written))


class OpeningTest(ForkTest):
    def test_sixteen_processes_that_open_a_fresh_path_at_once_all_succeed(self) -> None:
        for turn in range(40 if FULL else 3):
            self.path = self.dir / f"new{turn}" / "x.db" if turn % 2 else self.dir / f"{turn}.db"

            def work(number: int) -> None:
                queue = self.queue()
                if number % 2:
                    self.assertIn(queue.peek(), (None, "x"))
                queue.write("x")
                queue.close()

            self.together(16, work)
            self.assertEqual(self.queue().count(), 16)

    def test_a_file_that_is_just_being_made_is_not_taken_for_a_foreign_one(self) -> None:
        """Another process commits the schema between two statements of our check."""
        self.path.write_bytes(b"")
        makers: list[Queue] = []

        class Cursor(sqlite3.Cursor):
            def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
                if sql == ext.SELECT_OBJECTS and not makers:
                    makers.append(test.queue(settings=Settings(cache_mb=3, busy_timeout_ms=50, sync_mode="OFF")))
                    with contextlib.suppress(OperationalError):  # or it is kept out meanwhile
                        makers[0].write("x")
                return super().execute(sql, *args)

        class Connection(sqlite3.Connection):
            def cursor(self, factory: Any = Cursor) -> Any:
                return super().cursor(factory)

        test, real = self, sqlite3.connect
        with mock.patch.object(sqlite3, "connect", lambda *args, **options: real(*args, factory=Connection, **options)):
            self.assertIn(self.queue().peek(), (None, "x"))
        self.assertTrue(makers)
        makers[0].write("x")
        self.assertEqual(self.queue().peek(), "x")

    def test_asking_about_a_file_that_is_not_there_makes_nothing(self) -> None:
        broker = self.broker()
        queue = broker.queue("q")
        self.assertEqual(
            (queue.peek(), list(queue.peek_all()), queue.count(), queue.has_pending()), (None, [], 0, False)
        )
        self.assertEqual((broker.queues(), len(list(broker.dump())), broker.status()["messages"]), ({}, 1, 0))
        self.assertFalse(broker.delete_database())
        self.assertEqual(os.listdir(self.dir), [])
        queue.write("x")
        self.assertEqual(queue.peek(), "x")

    def test_opening_an_existing_database_only_reads(self) -> None:
        keep = self.queue()  # the last to close a database copies its log back: not the one that is watched here
        keep.write("a")
        holder = self.holder()
        log = Path(f"{self.path}-wal")
        before = [(path.stat().st_mtime_ns, path.stat().st_size) for path in (self.path, log)]
        lock = os.stat(f"{self.path}.lock").st_mtime_ns

        def work(child: Child) -> None:
            begun = time.monotonic()
            broker = Broker(self.path, settings=Settings(busy_timeout_ms=0))
            queue = broker.queue("q")
            self.assertEqual((queue.peek(), list(queue.peek_all()), queue.count()), ("a", ["a"], 1))
            self.assertEqual((list(broker.queues()), broker.status()["ready"], len(list(broker.dump()))), (["q"], 1, 2))
            broker.close()
            self.assertLess(time.monotonic() - begun, 2)

        self.assertEqual(self.child(work).wait(), 0)
        self.assertEqual([(path.stat().st_mtime_ns, path.stat().st_size) for path in (self.path, log)], before)
        self.assertEqual(os.stat(f"{self.path}.lock").st_mtime_ns, lock)
        holder.say("end")

    def test_an_empty_file_becomes_a_database_with_the_first_write(self) -> None:
        self.path.write_bytes(b"")
        queue = self.queue()
        self.assertIsNone(queue.peek())
        self.assertEqual(self.path.stat().st_size, 0)
        queue.write("x")
        self.assertEqual(queue.peek(), "x")

    def test_the_database_says_what_it_is(self) -> None:
        self.queue().write("x")
        connection = sqlite3.connect(str(self.path))
        self.addCleanup(connection.close)
        found = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "journal_mode")]
        self.assertEqual(found, [ext.APPLICATION_ID, "wal"])
        self.assertEqual(connection.execute(ext.SELECT_VERSION).fetchone(), (ext.SCHEMA_VERSION,))


class RefusedFiles(CoreTest):
    """What is not a SimpleBroker database is refused at once, whatever is asked, and left byte for byte."""

    def assertRefused(self, reason: str) -> None:
        before = self.path.read_bytes()
        others = sorted(os.listdir(self.dir))
        begun = time.monotonic()
        for act in (
            lambda broker: broker.queue("q").peek(),
            lambda broker: broker.queue("q").write("x"),
            lambda broker: broker.queue("q").read(),
            lambda broker: list(broker.dump()),
            lambda broker: broker.load([HEADER]),
            lambda broker: broker.vacuum(),
            lambda broker: broker.delete_database(),
        ):
            with self.assertRaisesRegex(DatabaseError, reason) as caught, self.broker() as broker:
                act(broker)
            self.assertIn(str(self.path), str(caught.exception))
        self.assertEqual(self.path.read_bytes(), before)
        self.assertEqual(sorted(os.listdir(self.dir)), others)
        self.assertLess(time.monotonic() - begun, 4)

    def sql(self, script: str, *, ours: bool = True) -> None:
        """Run a script on the test's database, ours or a new one."""
        if ours:
            with self.queue() as queue:
                queue.write("x")
        connection = sqlite3.connect(str(self.path), isolation_level=None)
        connection.executescript(script)
        connection.close()
        for suffix in ("-wal", "-shm", ".lock"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def test_a_text_file(self) -> None:
        self.path.write_text("This is a diary, dear.\n" * 500)
        self.assertRefused("not a SimpleBroker database, or is damaged")

    def test_a_short_file(self) -> None:
        for content in (b"x", b"xy", b"SQLite format 3\0"):
            self.path.write_bytes(content)
            self.assertRefused("not a SimpleBroker database, or is damaged|database of another program")

    def test_random_bytes(self) -> None:
        self.path.write_bytes(
            random.Random(5).randbytes(9000) if hasattr(random.Random, "randbytes") else os.urandom(9000)
        )
        self.assertRefused("not a SimpleBroker database, or is damaged")

    def test_a_truncated_database(self) -> None:
        self.sql("")
        whole = self.path.read_bytes()
        page = simplebroker.PAGE_BYTES
        for size in (page, 3 * page, len(whole) - page, 5000, 100, 20):
            with self.subTest(size):
                self.path.write_bytes(whole[:size])
                self.assertRefused("not a SimpleBroker database, or is damaged|altered")

    def test_a_database_of_another_program(self) -> None:
        self.sql("CREATE TABLE messages (id INTEGER PRIMARY KEY, queue TEXT, body TEXT)", ours=False)
        self.assertRefused("database of another program: choose another file")

    def test_another_application_id(self) -> None:
        self.sql("PRAGMA application_id = 7")
        self.assertRefused("database of another program")
        self.sql("PRAGMA application_id = 0", ours=False)
        self.assertRefused("database of another program")

    def test_an_empty_database_of_another_program(self) -> None:
        self.sql("PRAGMA application_id = 7; PRAGMA user_version = 3", ours=False)
        self.assertRefused("database of another program")

    def test_a_newer_schema(self) -> None:
        self.sql("UPDATE meta SET version = 2")
        self.assertRefused("schema version 2, this program knows 1: use the version of SimpleBroker that made it")

    def test_altered_schemas(self) -> None:
        scripts = (
            "CREATE TRIGGER evil AFTER INSERT ON messages BEGIN DELETE FROM messages; END",
            "CREATE TRIGGER evil BEFORE UPDATE ON meta BEGIN SELECT RAISE(IGNORE); END",
            "ALTER TABLE messages ADD COLUMN colour TEXT",
            "DROP INDEX held",
            "DROP INDEX ready; CREATE INDEX ready ON messages (queue)",
            "CREATE UNIQUE INDEX odd ON messages (body)",
            "DROP TABLE messages; CREATE VIEW messages AS SELECT 1 AS id, 'q' AS queue, 'x' AS body",
            "ALTER TABLE messages RENAME TO other; CREATE VIEW messages AS SELECT * FROM other",
            "DROP TABLE meta",
            "DELETE FROM meta",
            "DROP TABLE messages; CREATE TABLE messages (id INTEGER PRIMARY KEY, queue TEXT, body BLOB)",
        )  # fmt: skip
        for number, script in enumerate(scripts):
            with self.subTest(script):
                self.path = self.dir / f"{number}.db"
                self.sql(script)
                self.assertRefused("altered .*restore a backup or choose another file")

    def test_a_directory_in_its_place(self) -> None:
        self.path.mkdir()
        for act in (Queue.peek, lambda queue: queue.write("x")):
            with self.assertRaisesRegex((OperationalError, DatabaseError), "is a directory"):
                act(self.queue())
        self.assertEqual(os.listdir(self.dir), ["test.db"])

    def test_a_path_below_a_file(self) -> None:
        self.path.write_bytes(b"text")
        queue = Queue("q", self.path / "x.db")
        with self.assertRaisesRegex(OperationalError, "directory .*test.db.* cannot be made"):
            queue.write("x")

    def test_what_was_refused_can_be_replaced_and_then_works(self) -> None:
        self.path.write_text("diary")
        queue = self.queue()
        with self.assertRaises(DatabaseError):
            queue.write("x")
        self.path.unlink()
        queue.write("x")
        self.assertEqual(queue.read(), "x")


@unittest.skipUnless(HAS_FORK, "needs fork")
class FileChanges(ForkTest):
    """The database is deleted or replaced under processes that use it."""

    def remove(self, *suffixes: str) -> None:
        for suffix in suffixes:
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def other(self, *bodies: str) -> Path:
        """Another SimpleBroker database, closed: one file."""
        path = self.dir / "other.db"
        with Queue("q", path) as queue:
            queue.write_many(bodies)
        return path

    def test_a_deleted_database_is_begun_anew(self) -> None:
        for suffixes in (("",), ("", "-wal", "-shm"), ("", "-wal", "-shm", ".lock"), ("", "-shm"), ("", "-wal")):
            with self.subTest(suffixes):
                queue = self.queue()
                queue.write_many(["old"] * 9)
                self.remove(*suffixes)
                self.assertIsNone(queue.peek())
                queue.write("new")
                self.assertEqual(self.child(lambda child: self.assertBodies(self.queue(), ["new"])).wait(), 0)
                self.assertEqual(queue.read_many(9), ["new"])
                queue.close()
                self.assertEqual(self.queue().count(), 0)

    def test_a_log_left_by_a_deleted_database_does_not_poison_the_next(self) -> None:
        def crash(child: Child) -> None:
            self.queue().write_many(["old"] * 9)
            os.kill(os.getpid(), signal.SIGKILL)

        self.assertEqual(self.child(crash).wait(), -signal.SIGKILL)
        self.assertTrue(Path(f"{self.path}-wal").exists())
        self.remove("")
        queue = self.queue()
        queue.write("new")
        self.assertBodies(queue, ["new"])
        queue.close()
        self.assertBodies(self.queue(), ["new"])

    def test_closing_the_old_connection_leaves_the_new_databases_log_alone(self) -> None:
        for way in (Queue.peek, Queue.close):
            with self.subTest(way.__name__):
                old = self.queue(settings=Settings(cache_mb=3))
                old.write_many(["old"] * 50)
                self.remove("", "-wal", "-shm")
                new = self.queue()
                new.write_many(["new"] * 50)
                log = os.stat(f"{self.path}-wal")
                way(old)  # notices, or not, and closes the connection to the deleted file
                self.assertEqual(os.stat(f"{self.path}-wal").st_ino, log.st_ino)
                self.assertEqual(os.stat(f"{self.path}-wal").st_size, log.st_size)
                count: list[int] = []
                self.assertEqual(self.child(lambda child: self.assertEqual(self.queue().count(), 50)).wait(), 0)
                self.assertEqual(new.count(), 50, count)
                new.close()
                old.close()
                self.assertEqual(self.queue().count(), 50)
                self.queue().delete()

    def test_a_database_replaced_by_another_is_the_other_from_then_on(self) -> None:
        queue = self.queue()
        queue.write("old")
        self.other("new 1", "new 2")
        self.remove("-wal", "-shm")
        os.replace(self.dir / "other.db", self.path)
        self.assertBodies(queue, ["new 1", "new 2"])
        queue.write("new 3")
        self.assertEqual(
            self.child(lambda child: self.assertBodies(self.queue(), ["new 1", "new 2", "new 3"])).wait(), 0
        )
        queue.close()
        self.assertBodies(self.queue(), ["new 1", "new 2", "new 3"])

    def test_the_log_of_a_replaced_database_is_not_applied_to_the_new_one(self) -> None:
        for first in (Queue.peek, lambda queue: queue.write("new 2")):
            queue = self.queue()
            queue.write_many(["old"] * 50)  # still in the log
            os.replace(self.other("new 1"), self.path)
            first(queue)
            found = [message for message in queue.peek_all() if message != "new 2"]
            self.assertEqual(found, ["new 1"])
            queue.close()
            self.assertEqual(self.queue().read(), "new 1")
            self.remove("", ".lock")

    @NEEDS_LOCKS
    def test_a_reader_removes_the_log_of_a_deleted_file_before_the_next_is_made(self) -> None:
        """Nobody can make it between the reader's look at the log and its removal, which would be of the new log."""
        wrote = threading.Event()

        def write(child: Child) -> None:
            child.hear()
            with Queue("q", self.path) as new:
                new.write_many(["new"] * 50)
                child.say("wrote")
                child.hear()
                self.assertBodies(new, ["new"] * 50)

        writer = self.child(write)

        def listen() -> None:
            if writer.hear() == "wrote":
                wrote.set()

        thread = threading.Thread(target=listen)

        def look_and_let_it_write(path: str) -> tuple[int, int] | None:
            identity = file_identity(path)
            if path.endswith("-wal") and not thread.ident:
                thread.start()
                writer.say("go")
                self.assertFalse(wrote.wait(0.3), "the reader has the lock")
            return identity

        file_identity = simplebroker.file_identity
        queue = self.queue()
        queue.write_many(["old"] * 50)
        self.remove("")
        with mock.patch.object(simplebroker, "file_identity", look_and_let_it_write):
            queue.peek()
        self.assertTrue(wrote.wait(DEADLINE_S))
        thread.join(DEADLINE_S)
        self.assertTrue(Path(f"{self.path}-wal").exists())
        self.assertBodies(queue, ["new"] * 50)
        self.assertBodies(self.queue(settings=Settings(cache_mb=3)), ["new"] * 50)
        writer.say("end")
        self.assertEqual(writer.wait(), 0)
        queue.close()
        self.assertBodies(self.queue(), ["new"] * 50)

    def test_the_log_of_a_deleted_file_is_compared_while_it_is_open(self) -> None:
        """Once it is closed and removed, another file can have its inode."""
        file_identity = simplebroker.file_identity
        for act in (Queue.peek, lambda queue: queue.write("new")):
            queue = self.queue()
            queue.write("old")
            runner = queue.broker.runner
            assert isinstance(runner, SQLiteRunner)
            looked: list[bool] = []

            def look(path: str, runner: SQLiteRunner = runner, looked: list[bool] = looked) -> tuple[int, int] | None:
                if path.endswith("-wal"):
                    looked.append(runner._log is not None and runner._connection is not None)
                return file_identity(path)

            self.remove("")
            with mock.patch.object(simplebroker, "file_identity", look):
                act(queue)
            self.assertTrue(looked and looked[0])
            queue.delete()
            queue.close()

    @NEEDS_LOCKS
    def test_readers_of_a_deleted_file_do_not_share_the_index_of_the_next(self) -> None:
        """SQLite removes the old log when it makes a file, but not the index, into which the readers write."""

        def write(child: Child) -> None:
            child.hear()
            self.queue().write("new")
            child.say("wrote")
            child.hear()

        writer = self.child(write)
        old = self.queue()
        old.write("old")
        old_index = os.open(f"{self.path}-shm", os.O_RDONLY)  # which keeps its inode from being used again
        self.addCleanup(os.close, old_index)
        self.remove("")
        writer.say("go")
        self.assertEqual(writer.hear(), "wrote")
        self.assertNotEqual(os.stat(f"{self.path}-shm").st_ino, os.fstat(old_index).st_ino)
        self.assertBodies(old, ["new"])
        writer.say("end")

    def test_a_database_deleted_while_it_is_opened_is_empty_for_readers(self) -> None:
        opening = SQLiteRunner._open

        def delete_first(runner: SQLiteRunner, mode: str) -> None:
            self.remove("", "-wal", "-shm")
            opening(runner, mode)

        def delete_then(runner: SQLiteRunner, mode: str) -> None:
            opening(runner, mode)
            self.remove("", "-wal", "-shm")

        for open_, make in ((delete_first, lambda: self.queue().write("old")), (delete_then, self.path.touch)):
            with self.subTest(open_.__name__):
                make()
                queue = self.queue(settings=Settings(cache_mb=3))
                with mock.patch.object(SQLiteRunner, "_open", open_):
                    self.assertIsNone(queue.peek())
                queue.write("new")
                self.assertBodies(queue, ["new"])
                queue.broker.delete_database()
        self.path.touch()
        too_late = mock.patch.object(SQLiteRunner, "_open", delete_then)
        with too_late, self.assertRaisesRegex(OperationalError, "deleted at this moment: try again"):
            self.queue().write("x")
        self.queue().write("new")
        self.assertBodies(self.queue(), ["new"])

    def test_a_reader_of_a_deleted_database_leaves_nothing_behind(self) -> None:
        for suffixes in (("", "-wal", "-shm", ".lock"), ("", ".lock"), ("",)):
            with self.subTest(suffixes):
                queue = self.queue()
                queue.write("old")
                self.remove(*suffixes)
                self.assertIsNone(queue.peek())
                queue.close()
                left = [path.name for path in self.dir.iterdir()]
                self.assertEqual(left, [] if ".lock" in suffixes else ["test.db.lock"])

    def test_a_file_that_someone_else_deleted_first_is_deleted(self) -> None:
        queue = self.queue()
        queue.write("old")
        unlink = os.unlink

        def be_late(path: str) -> None:
            unlink(path)
            unlink(path)

        with mock.patch("simplebroker.os.unlink", be_late):
            self.assertTrue(queue.broker.delete_database())
        self.assertEqual(list(self.dir.iterdir()), [])

    def test_garbage_in_its_place_is_refused_and_left_alone(self) -> None:
        garbage = random.Random(7).getrandbits(8 * 20_000).to_bytes(20_000, "big")
        for with_log in (False, True):
            with self.subTest(with_log=with_log):
                queue = self.queue()
                queue.write("old")
                (self.dir / "garbage").write_bytes(garbage)
                if not with_log:
                    self.remove("-wal", "-shm")
                os.replace(self.dir / "garbage", self.path)
                for act in (Queue.peek, lambda q: q.write("x"), Queue.read, lambda q: list(q.broker.dump())):
                    with self.assertRaisesRegex(DatabaseError, "not a SimpleBroker database, or is damaged"):
                        act(queue)
                queue.close()
                self.assertEqual(self.path.read_bytes(), garbage)
                self.remove("", "-wal", "-shm")
                queue = self.queue()
                queue.write("new")
                self.assertEqual(queue.read(), "new")

    def test_a_database_deleted_within_a_transaction_is_an_error_or_gone_but_not_mixed(self) -> None:
        queue = self.queue()
        queue.write("old")
        with contextlib.suppress(BrokerError), queue.broker.transaction():
            queue.write("old too")
            self.remove("", "-wal", "-shm")
        queue.write("new")
        self.assertBodies(queue, ["new"])

    def test_a_snapshot_in_progress_is_not_disturbed(self) -> None:
        broker = self.broker()
        broker.queue("q").write_many([str(number) for number in range(3000)])
        lines = broker.dump()
        next(lines)
        next(lines)
        self.remove("", "-wal", "-shm")
        broker.queue("q").write("new")
        self.assertEqual(len(list(lines)), 2999)


@unittest.skipUnless(HAS_FORK and ON_LINUX, "needs RLIMIT_FSIZE")
class FullDisk(ForkTest):
    """No room in the middle of each kind of write: an error, nothing half done, and then it works."""

    BIG = "B" * 9000
    WAYS: ClassVar[dict[str, Callable[[Broker], object]]] = {
        "write": lambda broker: broker.queue("q").write(FullDisk.BIG * 200),
        "write_many": lambda broker: broker.queue("q").write_many([FullDisk.BIG] * 200),
        "move_many": lambda broker: broker.queue("q").move_many("other", 10**6),
        "read_many": lambda broker: broker.queue("q").read_many(10**6),
        "delete": lambda broker: broker.queue("q").delete(),
        "broadcast": lambda broker: broker.broadcast(FullDisk.BIG * 200),
        "load": lambda broker: broker.load([HEADER, *FullDisk.lines()]),
    }

    @staticmethod
    def lines() -> list[str]:
        message = {"type": "message", "queue": "z", "body": FullDisk.BIG}
        return [json.dumps({**message, "id": id}) for id in range(1, 200)]

    def check(self, path: Path, act: Callable[[Broker], object], no_room: Any, reason: str) -> None:
        """``with no_room():`` only the log can take something, and not enough."""
        with Broker(path, settings=Settings(sync_mode="OFF")) as broker:
            broker.queue("q").write_many([f"{number:04} " * 40 for number in range(2500)])
            broker.vacuum()
            before = list(broker.dump())
            with no_room(), self.assertRaisesRegex(OperationalError, reason) as caught:
                act(broker)
            self.assertIn(path.name, str(caught.exception))
            self.assertEqual(list(broker.dump()), before)
            act(broker)
            self.assertNotEqual(list(broker.dump()), before)
        connection = sqlite3.connect(str(path))
        self.assertEqual(connection.execute("PRAGMA integrity_check").fetchone(), ("ok",))
        connection.close()

    def test_a_limit_of_the_size_of_a_file(self) -> None:
        import resource

        @contextmanager
        def no_room() -> Iterator[None]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
            yield
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        def work(name: str, act: Callable[[Broker], object]) -> None:
            self.check(self.dir / f"{name}.db", act, no_room, "at a limit of its size|disk is full")

        children = [self.child(lambda child, way=way: work(*way)) for way in self.WAYS.items()]
        self.assertEqual(dict(zip(self.WAYS, [child.wait() for child in children])), dict.fromkeys(self.WAYS, 0))

    @unittest.skipUnless(ON_LINUX and os.geteuid() == 0, "needs to mount")
    def test_a_full_disk(self) -> None:
        small = self.dir / "small"
        small.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(small)]
        subprocess.run(mount, check=True, capture_output=True)
        self.addCleanup(subprocess.run, ["umount", str(small)], check=True)

        @contextmanager
        def no_room() -> Iterator[None]:
            filler = small / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass
            os.truncate(filler, filler.stat().st_size - 100_000)
            yield
            filler.unlink()

        for name, act in self.WAYS.items():
            with self.subTest(name):
                self.check(small / f"{name}.db", act, no_room, "disk is full")
                for path in small.iterdir():
                    path.unlink()


@unittest.skipUnless(HAS_FORK, "needs fork")
class CutLog(ForkTest):
    """A crash of the machine may leave any part of the write-ahead log. What is recovered is a state that was."""

    FRAME = 24 + simplebroker.PAGE_BYTES
    FIRST = 32  # the header of the log

    def leave_a_log(self) -> list[list[str]]:
        """Work in a process that is killed; all states of the database, in order."""

        def work(child: Child) -> None:
            states: list[list[str]] = []
            broker = Broker(self.path, settings=Settings(sync_mode="OFF", wal_autocheckpoint=10**6))
            q, other = broker.queue("q"), broker.queue("other")
            loaded = [json.dumps({"type": "message", "queue": "z", "body": "l" * 900, "id": id}) for id in range(1, 9)]

            def lease_and_settle() -> None:
                settled: list[Callable[[Message], object]] = [q.ack, q.dead_letter, q.extend, q.release]
                for settle in settled:
                    message = q.lease(30)
                    assert message is not None
                    states.append(list(broker.dump()))
                    settle(message)
                    states.append(list(broker.dump()))

            acts: list[Callable[[], object]] = [
                lambda: q.write("first"),
                lambda: q.write_many([f"{number} " * 150 for number in range(12)]),
                lambda: broker.broadcast("to all of them"),
                lambda: other.write("x" * 20_000),
                lambda: broker.broadcast("to both " * 200),
                lambda: q.move("other"),
                lambda: q.move_many("moved", 5),
                lease_and_settle,
                lambda: broker.load([HEADER, *loaded]),
                q.read,
                lambda: other.read_many(2),
                q.delete,
                lambda: [states.append(list(broker.dump())) for _ in broker.queue("z").move_batches("q")],
                lambda: broker.queue("moved").delete(),
            ]
            for act in acts:
                act()
                states.append(list(broker.dump()))
            (self.dir / "states").write_text(json.dumps(states))
            os.kill(os.getpid(), signal.SIGKILL)

        self.assertEqual(self.child(work).wait(), -signal.SIGKILL)
        states = json.loads((self.dir / "states").read_text())
        self.assertGreater(len({json.dumps(state) for state in states}), 20)
        return [[], [json.dumps({**json.loads(HEADER)})], *states]

    def recovered(self, number: int, database: bytes, log: bytes) -> list[str]:
        """What is found in a copy of the file with such a log."""
        path = self.dir / f"{number}.db"
        path.write_bytes(database)
        Path(f"{path}-wal").write_bytes(log)
        with Broker(path, settings=Settings(sync_mode="OFF")) as broker:
            found = list(broker.dump())
            connection = sqlite3.connect(str(path))
            self.assertEqual(connection.execute("PRAGMA integrity_check").fetchone(), ("ok",))
            connection.close()
            last = max([0, *(int(json.loads(line).get("id", 0)) for line in found)])
            self.assertGreater(broker.queue("q").write("it goes on"), last)
        for suffix in ("", "-wal", "-shm", ".lock"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        return found

    def check(self, cuts: Iterable[tuple[str, bytes]]) -> None:
        database, at = self.path.read_bytes(), 0
        for number, (what, log) in enumerate(cuts):
            with self.subTest(what):
                found = self.recovered(number, database, log)
                self.assertTrue(found in self.states, "it never was like this")
                now = self.states.index(found)
                self.assertGreaterEqual(now, at, "more of the log shows no older state")
                at = now if self.ascending else 0

    def setUp(self) -> None:
        super().setUp()
        self.states = self.leave_a_log()
        self.log = Path(f"{self.path}-wal").read_bytes()
        self.ascending = True
        self.assertEqual((len(self.log) - self.FIRST) % self.FRAME, 0)

    def test_at_every_frame(self) -> None:
        ends = range(self.FIRST, len(self.log) + 1, self.FRAME)
        self.assertGreater(len(ends), 60)
        self.check((f"{end} bytes", self.log[:end]) for end in ends)
        self.assertEqual(self.recovered(0, self.path.read_bytes(), self.log), self.states[-1])

    def test_at_random_bytes(self) -> None:
        rng = random.Random(11)
        ends = sorted(rng.randrange(len(self.log)) for _ in range(500 if FULL else 60))
        self.check((f"{end} bytes", self.log[:end]) for end in ends)

    def test_with_random_bytes_that_were_never_written(self) -> None:
        rng, self.ascending = random.Random(12), False

        def torn() -> Iterator[tuple[str, bytes]]:
            for _ in range(500 if FULL else 60):
                start = rng.randrange(self.FIRST, len(self.log))
                length = rng.choice([1, 512, 4096])
                hole = bytes(byte ^ 0xFF for byte in self.log[start : start + length])
                yield f"{length} bytes at {start}", self.log[:start] + hole + self.log[start + length :]

        self.check(torn())


class BrokerRoom(CoreTest):
    def test_queues_are_sorted_and_counted_by_state(self) -> None:
        broker = self.broker()
        for name in ("b", "a.x", "a.y", "B"):
            broker.queue(name).write_many(["1", "2"])
        broker.queue("c").write("later", delay=60)
        broker.queue("b").lease(60)
        expected = {"B": (2, 0, 0), "a.x": (2, 0, 0), "a.y": (2, 0, 0), "b": (1, 1, 0), "c": (0, 0, 1)}
        self.assertEqual(list(broker.queues().items()), list(expected.items()))
        self.assertEqual(broker.queues()["b"].total, 2)
        self.assertEqual(list(broker.queues("a.*")), ["a.x", "a.y"])
        self.assertEqual(list(broker.queues("[ab]")), ["b"])
        self.assertEqual((list(broker.queues("")), list(broker.queues("*"))), ([], list(expected)))

    def test_broadcast_writes_to_every_queue_that_has_messages(self) -> None:
        broker = self.broker()
        self.assertEqual(broker.broadcast("nobody"), [])
        for name in ("a", "b", "c"):
            broker.queue(name).write("x")
        broker.queue("d").write("x", delay=60)
        broker.queue("a").read()
        self.assertEqual(broker.broadcast("all"), ["b", "c", "d"])
        self.assertEqual(broker.broadcast("some", "[bc]"), ["b", "c"])
        self.assertEqual(broker.broadcast("none", "z*"), [])
        self.assertBodies(broker.queue("b"), ["x", "all", "some"])
        self.assertBodies(broker.queue("d"), ["all"])
        ids = [message.id for name in broker.queues() for message in broker.queue(name).peek_all()]
        self.assertEqual(len(ids), len(set(ids)))

    def test_broadcast_is_all_or_nothing(self) -> None:
        class Faulty(PlainRunner):
            inserts = 10

            def run(self, sql: str, params: Any = (), *, fetch: bool = False) -> Any:
                if sql in (ext.INSERT_ONE, ext.INSERT_BATCH, ext.INSERT_MESSAGE):
                    self.inserts -= 1
                    if not self.inserts:
                        raise OperationalError("the disk is full")
                return super().run(sql, params, fetch=fetch)

        runner = Faulty(self.path)
        self.addCleanup(runner.close)
        broker = Broker(runner=runner)
        for name in "abcd":
            broker.queue(name).write("x")
        runner.inserts = 3
        with self.assertRaisesRegex(OperationalError, "full"):
            broker.broadcast("y")
        self.assertEqual([stats.total for stats in broker.queues().values()], [1, 1, 1, 1])
        self.assertEqual(broker.broadcast("y"), ["a", "b", "c", "d"])

    def test_status_tells_the_numbers_of_the_whole_database(self) -> None:
        broker = self.broker()
        ids = broker.queue("a").write_many(["x"] * 3)
        broker.queue("b").write("x", delay=60)
        broker.queue("a").lease(60)
        status = broker.status()
        size = status.pop("bytes")
        expected = {"queues": 2, "messages": 4, "ready": 2, "leased": 1, "delayed": 1}
        self.assertEqual({**status, "last_ts": 0}, {**expected, "last_ts": 0})
        self.assertGreater(status["last_ts"], ids[-1])
        broker.vacuum()
        self.assertEqual(broker.status()["bytes"], self.path.stat().st_size)
        self.assertGreater(size, 4096)

    def test_vacuum_shrinks_the_file_and_empties_the_log(self) -> None:
        broker = self.broker()
        queue = broker.queue("q")
        queue.write_many(["x" * 5000] * 400)
        queue.write("keep")
        queue.read_many(400)
        broker.vacuum()
        self.assertLess(self.path.stat().st_size, 100_000)
        self.assertEqual(Path(f"{self.path}-wal").stat().st_size, 0)
        self.assertBodies(queue, ["keep"])

    def test_delete_database_removes_all_that_belongs_to_it_and_nothing_else(self) -> None:
        broker = self.broker()
        broker.queue("q").write("x")
        names = ("test.db2", "test.db.bak", "test", "test.db-notes", "xtest.db")
        for name in names:
            (self.dir / name).write_text("mine")
        self.assertTrue(broker.delete_database())
        self.assertEqual(sorted(os.listdir(self.dir)), sorted(names))
        self.assertFalse(broker.delete_database())
        self.assertEqual(broker.queues(), {})
        broker.queue("q").write("new")
        self.assertBodies(self.queue(), ["new"])

    def test_delete_database_is_noticed_by_others(self) -> None:
        other = self.queue(settings=Settings(cache_mb=3))
        other.write("x")
        self.assertTrue(self.broker().delete_database())
        self.assertEqual(os.listdir(self.dir), [])
        self.assertIsNone(other.peek())
        other.write("new")
        self.assertEqual(self.queue().read(), "new")

    def test_a_closed_broker_says_so(self) -> None:
        broker = self.broker()
        queue = broker.queue("q")
        queue.write("x")
        queue.close()  # which does not close the broker
        self.assertEqual(broker.queue("q").count(), 1)
        broker.close()
        broker.close()
        for act in (
            broker.queues, broker.vacuum, broker.status, broker.transaction, lambda: broker.broadcast("x"),
            lambda: broker.load([HEADER]),
            lambda: list(broker.dump()), broker.delete_database, lambda: queue.write("x"), queue.read, queue.peek,
        ):  # fmt: skip
            with self.assertRaisesRegex(UsageError, "closed: make a new one"):
                act()
        self.assertBodies(self.queue(), ["x"])


class DumpAndLoad(ForkTest):
    def fill(self, broker: Broker) -> None:
        """Messages of every state."""
        broker.queue("b").write_many(["1", "2\n", "\u00e9\u65e5\U0001f600", "\0", '"\\'])
        broker.queue("a").write_many([str(number) for number in range(100)])
        broker.queue("a").write("later", delay=3600)
        broker.queue("a").lease(3600)
        released = broker.queue("b").lease(3600)
        assert released is not None
        broker.queue("b").release(released)
        broker.queue("c").write("later", delay=3600)
        broker.queue("gone").write("x")
        broker.queue("gone").read()

    def test_a_loaded_dump_dumps_the_same(self) -> None:
        broker = self.broker()
        self.fill(broker)
        lines = list(broker.dump())
        with Broker(self.dir / "copy.db") as copied:
            self.assertEqual(copied.load(lines), 107)
            self.assertEqual(list(copied.dump()), lines)
            self.assertEqual(copied.queues(), broker.queues())
            self.assertEqual(copied.queue("b").peek(), "1")
            self.assertEqual(copied.queue("b").peek_many(1)[0].attempt, 1)
        with Broker(self.dir / "bytes.db") as copied:
            self.assertEqual(copied.load(line.encode() + b"\n" for line in lines), 107)
            self.assertEqual(list(copied.dump()), lines)

    def test_the_shape_of_a_dump(self) -> None:
        broker = self.broker()
        self.fill(broker)
        header, *records = map(json.loads, broker.dump())
        self.assertEqual({**header, "last_ts": ""}, {**json.loads(HEADER), "last_ts": ""})
        self.assertEqual(header["last_ts"], str(broker.status()["last_ts"]))
        self.assertTrue(all(record["type"] == "message" and isinstance(record["id"], str) for record in records))
        keys = [(record["queue"], record["id"]) for record in records]
        self.assertEqual(keys, sorted(keys))
        extras = [tuple(sorted(set(record) - {"type", "queue", "body", "id"})) for record in records]
        states = {("attempt", "held_until"): 1, ("held_until",): 2, ("attempt",): 1, (): 103}
        self.assertEqual({kind: extras.count(kind) for kind in extras}, states)
        self.assertNotIn("\\u00e9", "".join(broker.dump()))

    def test_a_dump_of_some_queues(self) -> None:
        broker = self.broker()
        self.fill(broker)
        self.assertEqual({json.loads(line).get("queue") for line in broker.dump("[bc]")}, {None, "b", "c"})
        self.assertEqual(len(list(broker.dump("z"))), 1)

    def test_held_messages_are_held_again_until_their_time(self) -> None:
        clock = Clock()
        broker = self.broker(clock=clock)
        queue = broker.queue("q")
        queue.write("leased")
        queue.write("ready")
        queue.lease(100)
        queue.write("delayed", delay=100)
        lines = list(broker.dump())
        with Broker(self.dir / "copy.db", clock=clock) as copied:
            copied.load(lines)
            self.assertEqual(copied.queue("q").stats(), Stats(1, 1, 1))
            clock.ns += 101 * NS
            found = copied.queue("q").read_many(9)
            self.assertEqual([(str(m), m.attempt) for m in found], [("leased", 1), ("ready", 0), ("delayed", 0)])

    def test_a_lease_survives_dump_and_load(self) -> None:
        broker = self.broker()
        broker.queue("q").write("x")
        message = broker.queue("q").lease(60)
        assert message is not None
        lines = list(broker.dump())
        with Broker(self.dir / "copy.db") as copied:
            copied.load(lines)
            copied.queue("q").ack(message)
            self.assertEqual(copied.queues(), {})

    def test_a_message_held_until_the_beginning_of_time_is_not_left_out(self) -> None:
        broker = self.broker()
        for held in (0, "0", 1):
            broker.load(
                [HEADER, json.dumps({"type": "message", "queue": "q", "body": "x", "id": 5, "held_until": held})]
            )
            self.assertEqual(len(list(broker.dump())), 2, held)
            self.assertEqual(broker.queue("q").read(), "x")

    def test_dumps_of_the_package_on_pypi_are_read(self) -> None:
        broker = self.broker()
        lines = [
            '{"type": "header", "format": "simplebroker-dump", "version": 1, "created": "2025-01-01"}',
            '{"type": "alias", "alias": "short", "target": "long"}',
            '{"type": "message", "queue": "q", "body": "a", "id": 1837025672140161024, "claimed": false}',
            '{"type": "message", "queue": "q", "body": "b", "id": "1837025672140161025"}',
        ]
        with self.assertLogs("simplebroker", "WARNING") as log:
            self.assertEqual(broker.load(lines), 2)
        self.assertEqual(len(log.output), 1)
        self.assertIn("alias 'short'", log.output[0])
        self.assertEqual([m.id for m in broker.queue("q").peek_all()], [1837025672140161024, 1837025672140161025])

    def test_a_bad_line_is_named_and_nothing_is_loaded(self) -> None:
        good = {"type": "message", "queue": "q", "body": "x", "id": "1837025672140161024"}
        without_id = {key: value for key, value in good.items() if key != "id"}
        bad: list[str | bytes] = [
            "", "\n", "{", "[]", "null", "5",
            '"text"', "{}", "nonsense", '{"type": "message"}', '{"type": "other"}', HEADER,
            b"\xff\xfe\xfd", b'{"type": "message", "queue": "q", "id": 7, "body": "\xff"}',
            "[" * 100_000, '{"a":' * 100_000,
            json.dumps(without_id), '{"type": "message", "queue": "q", "body": "\\ud800", "id": 7}',
        ]  # fmt: skip
        for change in (
            {"id": 0}, {"id": -1}, {"id": 1.5}, {"id": True}, {"id": None}, {"id": "x"}, {"id": 2**63},
            {"id": "9" * 20}, {"id": ""},
            {"id": "\uff11"}, {"id": [1]}, {"id": simplebroker.MAX_ID}, {"queue": ""}, {"queue": None},
            {"queue": "a b"}, {"queue": ["q"]},
            {"body": None}, {"body": 5}, {"body": ["x"]}, {"body": {}}, {"held_until": "soon"}, {"held_until": -1},
            {"held_until": 1e30},
            {"attempt": -1}, {"attempt": "x"}, {"attempt": None}, {"type": None}, {"type": ["message"]},
        ):  # fmt: skip
            bad.append(json.dumps({**good, **change}))
        broker = self.broker()
        broker.queue("q").write("before")
        before = list(broker.dump())
        for line in bad:
            with self.subTest(line[:60]):
                fine = [json.dumps({**good, "id": id}) for id in range(1, 4)]
                with self.assertRaisesRegex(UsageError, r"\Aline 5: ") as caught:
                    broker.load([HEADER, *fine, line, fine[0]])
                self.assertLess(len(str(caught.exception)), 500)
                self.assertEqual(list(broker.dump()), before)

    def test_a_dump_begins_with_its_header(self) -> None:
        message = '{"type": "message", "queue": "q", "body": "x", "id": 5}'
        wrong = (
            HEADER.replace("simplebroker-dump", "other"),
            HEADER.replace('"version": 1', '"version": 2'),
            HEADER.replace('"version": 1', '"version": "1"'),
            HEADER.replace('"0"', '"-5"'),
            HEADER.replace('"0"', '"x"'),
        )
        for lines in ([message], *[[line, message] for line in wrong]):
            with self.assertRaisesRegex(UsageError, r"\Aline 1: "):
                self.broker().load(lines)
        with self.assertRaisesRegex(UsageError, "nothing to load"):
            self.broker().load([])
        self.assertEqual(self.broker().load([HEADER]), 0)

    def test_an_id_that_exists_already_is_an_error_that_names_the_line(self) -> None:
        broker = self.broker()
        broker.queue("q").write("x")
        lines = list(broker.dump())
        with self.assertRaisesRegex(IntegrityError, r"\Aline 2: .*id exists already"):
            broker.load(lines)
        record = json.dumps({"type": "message", "queue": "z", "body": "x", "id": 5})
        with self.assertRaisesRegex(IntegrityError, r"\Aline 3: .*id exists already"):
            broker.load([HEADER, record, record])
        self.assertEqual(list(broker.dump()), lines)

    def test_an_error_of_the_source_undoes_the_load(self) -> None:
        broker = self.broker()

        def lines() -> Iterator[str]:
            yield HEADER
            yield json.dumps({"type": "message", "queue": "z", "body": "x", "id": 5})
            raise OSError("the disk was pulled out")

        with self.assertRaisesRegex(OSError, "pulled out"):
            broker.load(lines())
        self.assertEqual(broker.queues(), {})
        broker.queue("q").write("x")

    def test_a_dump_shows_one_state_while_others_move_messages(self) -> None:
        broker = self.broker()
        ids = broker.queue("a").write_many([str(number) for number in range(300)])
        broker.close()

        def work(child: Child) -> None:
            mine = self.broker()
            a, b = mine.queue("a"), mine.queue("b")
            child.say("ready")
            for _ in range(100_000):
                for source, dest in ((a, "b"), (b, "a")):
                    source.move_many(dest, 37)

        mover = self.child(work)
        self.assertEqual(mover.hear(), "ready")
        broker = self.broker()
        seen = set()
        for _ in range(25):
            records = [json.loads(line) for line in broker.dump()][1:]
            self.assertEqual(sorted(int(record["id"]) for record in records), ids)
            seen.add(sum(record["queue"] == "a" for record in records))
        self.assertGreater(len(seen), 1, "nothing moved")

    def test_writers_are_not_held_up_by_a_dump(self) -> None:
        broker = self.broker()
        broker.queue("q").write_many([str(number) for number in range(5000)])
        lines = broker.dump()
        next(lines)
        broker.queue("q").write("meanwhile")
        broker.queue("q").read_many(1000)
        self.assertEqual(len(list(lines)), 5000)


class Lease:
    """A lease as every way in shows it."""

    def __init__(self, body: str, attempt: int, handle: Any) -> None:
        self.body, self.attempt, self.handle = body, attempt, handle


class QueueContract:
    """What every way in promises. A subclass is one way; it gives the operations."""

    path: Path
    thorough = True  # with all combinations
    DELAY_S = 0.4  # in which three operations are done

    def write(self, queue: str, body: str, delay: float = 0) -> int:
        return self.q(queue).write(body, delay=delay)

    def read(self, queue: str, **filters: Any) -> str | None:
        return self.q(queue).read(**filters)

    def read_many(self, queue: str, limit: int | None, **filters: Any) -> list[str]:
        if limit is None:
            return list(self.q(queue).read_all(**filters))
        return list(self.q(queue).read_many(limit, **filters))

    def peek(self, queue: str, **filters: Any) -> str | None:
        return self.q(queue).peek(**filters)

    def peek_many(self, queue: str, limit: int | None, **filters: Any) -> list[str]:
        return list(self.q(queue).peek_all(**filters) if limit is None else self.q(queue).peek_many(limit, **filters))

    def move(self, queue: str, dest: str, limit: int | None = 1, **filters: Any) -> int:
        if limit == 1:
            return 0 if self.q(queue).move(dest, **filters) is None else 1
        if limit is None:
            return self.q(queue).move_all(dest, **filters)
        return len(self.q(queue).move_many(dest, limit, **filters))

    def delete(self, queue: str, **filters: Any) -> bool:
        return bool(self.q(queue).delete(**filters))

    def lease(self, queue: str, seconds: float = 60) -> Lease | None:
        message = self.q(queue).lease(seconds)
        return None if message is None else Lease(str(message), message.attempt, message)

    def settle(self, action: str, queue: str, lease: Lease, *args: float) -> bool:
        """ack, release or extend; False if the lease was lost."""
        try:
            if action == "release":
                self.q(queue).release(lease.handle, delay=args[0] if args else None)
            else:
                getattr(self.q(queue), action)(lease.handle, *args)
        except LeaseLost:
            return False
        return True

    def queues(self) -> dict[str, tuple[int, int, int]]:
        return {name: tuple(stats) for name, stats in self.b().queues().items()}  # type: ignore[misc]

    def broadcast(self, body: str, pattern: str | None = None) -> bool:
        return bool(self.b().broadcast(body, pattern))

    def dump(self) -> list[str]:
        return list(self.b().dump())

    def load(self, lines: Iterable[str]) -> bool:
        try:
            self.b().load(lines)
        except (UsageError, IntegrityError):
            return False
        return True

    def q(self, name: str) -> Queue:
        return self.b().queue(name)

    def b(self) -> Broker:
        raise NotImplementedError

    # -- the cases; T is what unittest gives a subclass

    def test_messages_come_out_in_the_order_they_went_in(self: Any) -> None:
        ids = [self.write("q", str(number)) for number in range(4)]
        self.assertEqual(ids, sorted(set(ids)))
        self.assertEqual(
            (self.read("q"), self.read_many("q", 2), self.read("q"), self.read("q")), ("0", ["1", "2"], "3", None)
        )

    def test_empty_is_nothing_and_no_error(self: Any) -> None:
        self.assertEqual((self.read("q"), self.peek("q"), self.lease("q"), self.move("q", "d")), (None, None, None, 0))
        self.assertEqual((self.read_many("q", None), self.peek_many("q", None), self.move("q", "d", None)), ([], [], 0))
        self.assertFalse(self.delete("q"))
        self.assertFalse(self.broadcast("x"))
        self.assertEqual(self.queues(), {})

    def test_bodies_come_back_byte_for_byte(self: Any) -> None:
        bodies = [
            "",
            " ",
            "a\n",
            "\n\n",
            "-x",
            "--all",
            "'\"\\",
            "\u00e9\u65e5\U0001f600",
            "a\tb\r\n",
            "{}",
            "x" * 70_000,
        ]
        for body in bodies:
            self.write("q", body)
        self.assertEqual(self.peek_many("q", None), bodies)
        self.assertEqual(self.read_many("q", None), bodies)

    def test_peek_removes_nothing(self: Any) -> None:
        self.write("q", "a")
        self.write("q", "b")
        self.assertEqual(
            (self.peek("q"), self.peek("q"), self.peek_many("q", 1), self.peek_many("q", 9)),
            ("a", "a", ["a"], ["a", "b"]),
        )
        self.assertEqual(self.queues(), {"q": (2, 0, 0)})

    def test_every_filter_counts_on_every_path(self: Any) -> None:
        ids = [self.write("q", str(number)) for number in range(6)]
        cases: tuple[tuple[dict[str, Any], list[str]], ...] = (
            ({"after": ids[2]}, ["3", "4", "5"]),
            ({"before": ids[2]}, ["0", "1"]),
            ({"after": ids[1], "before": ids[4]}, ["2", "3"]),
            ({"after": str(ids[4])}, ["5"]),
            ({"after": ids[5]}, []),
            ({"before": ids[0]}, []),
            ({"after": ids[3], "before": ids[2]}, []),
            ({"message_id": ids[3]}, ["3"]),
            ({"message_id": ids[3] + 10**6}, []),
        )
        for filters, expected in cases if self.thorough else cases[2:8:3]:
            with self.subTest(filters):
                first = expected[0] if expected else None
                self.assertEqual(self.peek("q", **filters), first)
                if "message_id" not in filters:
                    self.assertEqual(self.peek_many("q", None, **filters), expected)
                    self.assertEqual(self.peek_many("q", 2, **filters), expected[:2])
                self.assertEqual(self.move("q", "d", **filters), 1 if expected else 0)
                self.assertEqual(self.peek_many("d", None), expected[:1])
                self.move("d", "q", None)
                if "message_id" not in filters:
                    self.assertEqual(self.move("q", "d", 2, **filters), len(expected[:2]))
                    self.assertEqual(self.move("q", "d", None, **filters), len(expected[2:]))
                    self.assertEqual(self.peek_many("d", None), expected)
                    self.move("d", "q", None)
                self.assertEqual(self.peek_many("q", None), list("012345"))

    def test_reading_obeys_the_filters_too(self: Any) -> None:
        ids = [self.write("q", str(number)) for number in range(9)]
        self.assertEqual(self.read("q", after=ids[3]), "4")
        self.assertEqual(self.read("q", message_id=ids[6]), "6")
        self.assertIsNone(self.read("q", message_id=ids[6]))
        self.assertEqual(self.read_many("q", 1, after=ids[4]), ["5"])
        self.assertEqual(self.read_many("q", None, after=ids[1], before=ids[8]), ["2", "3", "7"])
        self.assertEqual(self.read_many("q", None, before=ids[1]), ["0"])
        self.assertEqual(self.read_many("q", 9), ["1", "8"])

    def test_a_move_keeps_id_and_order(self: Any) -> None:
        first, second, third = (self.write(queue, queue) for queue in "aba")
        self.assertEqual(self.move("b", "a"), 1)
        self.assertEqual(self.peek("a", message_id=second), "b")
        self.assertEqual(self.read_many("a", None), ["a", "b", "a"])
        self.assertLess(first, third)

    def test_delete_takes_one_or_all_held_ones_too(self: Any) -> None:
        ids = [self.write("q", str(number)) for number in range(4)]
        self.write("q", "later", delay=60)
        self.write("other", "x")
        self.lease("q")
        self.assertTrue(self.delete("q", message_id=ids[2]))
        self.assertFalse(self.delete("q", message_id=ids[2]))
        self.assertFalse(self.delete("other", message_id=ids[1]))
        self.assertTrue(self.delete("q", message_id=ids[0]))  # which is leased
        self.assertEqual(self.queues(), {"other": (1, 0, 0), "q": (2, 0, 1)})
        self.assertTrue(self.delete("q"))
        self.assertEqual(self.queues(), {"other": (1, 0, 0)})

    def test_a_delayed_message_is_held_and_then_in_its_old_place(self: Any) -> None:
        id = self.write("q", "delayed", delay=self.DELAY_S)
        self.write("q", "ready")
        self.assertEqual(self.queues(), {"q": (1, 0, 1)})
        self.assertEqual(
            (self.peek("q"), self.peek("q", message_id=id), self.read("q", message_id=id)), ("ready", "delayed", None)
        )
        self.wait_for(lambda: self.queues() == {"q": (2, 0, 0)}, "the message to be due")
        self.assertEqual(self.peek_many("q", None), ["delayed", "ready"])
        self.assertEqual(self.read_many("q", None), ["delayed", "ready"])

    def test_a_lease_hides_a_message_until_it_is_acknowledged(self: Any) -> None:
        self.write("q", "a")
        self.write("q", "b")
        lease = self.lease("q")
        self.assertEqual((lease.body, lease.attempt), ("a", 1))
        self.assertEqual((self.queues(), self.peek("q")), ({"q": (1, 1, 0)}, "b"))
        self.assertTrue(self.settle("ack", "q", lease))
        self.assertEqual(self.read_many("q", None), ["b"])
        self.assertFalse(self.settle("ack", "q", lease))

    def test_a_released_message_comes_again_in_its_old_place(self: Any) -> None:
        self.write("q", "a")
        self.write("q", "b")
        self.assertTrue(self.settle("release", "q", self.lease("q")))
        again = self.lease("q")
        self.assertEqual((again.body, again.attempt), ("a", 2))
        self.assertTrue(self.settle("release", "q", again, 60))
        self.assertEqual((self.queues(), self.read("q"), self.read("q")), ({"q": (1, 1, 0)}, "b", None))

    def test_a_lost_lease_can_do_nothing(self: Any) -> None:
        self.write("q", "a")
        old = self.lease("q")
        self.settle("release", "q", old)
        new = self.lease("q")
        self.assertEqual(new.attempt, 2)
        for action, args in (("ack", ()), ("release", ()), ("release", (5,)), ("extend", (60,))):
            self.assertFalse(self.settle(action, "q", old, *args), action)
        self.assertEqual(self.queues(), {"q": (0, 1, 0)})
        self.assertTrue(self.settle("ack", "q", new))
        self.assertEqual(self.queues(), {})

    def test_a_lease_that_ended_gives_the_message_to_the_next(self: Any) -> None:
        self.write("q", "a")
        old = self.lease("q", 0.1)
        self.wait_for(lambda: self.peek("q"), "the lease to end")
        new = self.lease("q")
        self.assertEqual((new.body, new.attempt), ("a", 2))
        self.assertFalse(self.settle("ack", "q", old))
        self.assertTrue(self.settle("extend", "q", new, 60))
        self.assertTrue(self.settle("ack", "q", new))

    def test_broadcast_reaches_matching_queues(self: Any) -> None:
        for name in ("a1", "a2", "b"):
            self.write(name, "x")
        self.assertTrue(self.broadcast("y", "a*"))
        self.assertFalse(self.broadcast("y", "z*"))
        self.assertEqual(self.queues(), {"a1": (2, 0, 0), "a2": (2, 0, 0), "b": (1, 0, 0)})

    def test_dump_and_load_keep_everything_or_change_nothing(self: Any) -> None:
        self.write("q", "a")
        self.write("q", "b\n")
        self.write("r", "c", delay=60)
        self.lease("q")
        lines = self.dump()
        self.assertFalse(self.load(lines))
        self.assertFalse(self.load([*lines[:1], '{"type": "message", "queue": "z", "body": "x", "id": 5}', "nonsense"]))
        self.assertEqual(self.dump(), lines)
        for name in "qr":
            self.delete(name)
        self.assertTrue(self.load(lines))
        self.assertEqual(self.dump(), lines)
        self.assertGreater(self.write("q", "d"), int(json.loads(lines[-1])["id"]))


class ContractOfQueue(QueueContract, CoreTest):
    def setUp(self) -> None:
        super().setUp()
        self._broker = self.broker()

    def b(self) -> Broker:
        return self._broker


class ContractOfCustomRunner(QueueContract, CoreTest):
    def setUp(self) -> None:
        super().setUp()
        runner = PlainRunner(self.path)
        self.addCleanup(runner.close)
        self._broker = Broker(runner=runner)

    def b(self) -> Broker:
        return self._broker


@unittest.skipUnless(HAS_FORK, "needs fork")
class ContractOfCommandLine(QueueContract, CoreTest):
    """Each operation is a process that runs main()."""

    thorough = False
    DELAY_S = 2.0

    def command(self, *args: str, stdin: str = "", statuses: tuple[int, ...] = (0, 2)) -> tuple[int, list[str]]:
        """The exit status and the lines of the output."""
        self.path.parent.joinpath("stdin").write_bytes(stdin.encode("utf-8"))
        out, err = self.dir / "stdout", self.dir / "stderr"
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            status = 70
            try:
                os.chdir(self.dir)
                for number, (name, flags) in enumerate(
                    (("stdin", os.O_RDONLY), *[(n, 0o1101) for n in ("stdout", "stderr")])
                ):
                    os.dup2(os.open(self.dir / name, flags, 0o600), number)
                sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
                os.environ.update(self.environ)
                status = simplebroker.main(["-f", "test.db", *args])
                sys.stderr.flush()
            finally:
                os._exit(status)
        status = os.WEXITSTATUS(os.waitpid(pid, 0)[1])
        self.assertIn(status, statuses, (args, err.read_text()))
        return status, out.read_bytes().decode("utf-8").splitlines()

    @staticmethod
    def filters(filters: dict[str, Any]) -> list[str]:
        flags = {"message_id": "-m", "after": "--after", "before": "--before"}
        return [part for name, value in filters.items() for part in (flags[name], str(value))]

    @staticmethod
    def count(limit: int | None) -> list[str]:
        return ["--all"] if limit is None else ["-n", str(limit)]

    def bodies(self, *args: str) -> list[str]:
        status, lines = self.command(*args, "--json")
        self.assertEqual(status, 0 if lines else 2)
        return [json.loads(line)["message"] for line in lines]

    def write(self, queue: str, body: str, delay: float = 0) -> int:
        _, lines = self.command("write", queue, "-", "-t", "--delay", str(delay), stdin=body, statuses=(0,))
        return int(lines[0])

    def read(self, queue: str, **filters: Any) -> str | None:
        return (self.bodies("read", queue, *self.filters(filters)) or [None])[0]  # type: ignore[list-item]

    def read_many(self, queue: str, limit: int | None, **filters: Any) -> list[str]:
        return self.bodies("read", queue, *self.count(limit), *self.filters(filters))

    def peek(self, queue: str, **filters: Any) -> str | None:
        return (self.bodies("peek", queue, *self.filters(filters)) or [None])[0]  # type: ignore[list-item]

    def peek_many(self, queue: str, limit: int | None, **filters: Any) -> list[str]:
        return self.bodies("peek", queue, *self.count(limit), *self.filters(filters))

    def move(self, queue: str, dest: str, limit: int | None = 1, **filters: Any) -> int:
        return len(self.bodies("move", queue, dest, *self.count(limit), *self.filters(filters)))

    def delete(self, queue: str, **filters: Any) -> bool:
        return self.command("delete", queue, *self.filters(filters))[0] == 0

    def lease(self, queue: str, seconds: float = 60) -> Lease | None:
        status, lines = self.command("lease", queue, "--for", f"{seconds}s")
        if status:
            return None
        record = json.loads(lines[0])
        return Lease(record["message"], record["attempt"], record["lease"])

    def settle(self, action: str, queue: str, lease: Lease, *args: float) -> bool:
        flag = {"release": "--delay", "extend": "--for"}.get(action, "")
        options = [part for value in args for part in (flag, f"{value}s")]
        return self.command(action, queue, lease.handle, *options, statuses=(0, 1))[0] == 0

    def queues(self) -> dict[str, tuple[int, int, int]]:
        records = map(json.loads, self.command("list", "--json")[1])
        return {record["queue"]: (record["ready"], record["leased"], record["delayed"]) for record in records}

    def broadcast(self, body: str, pattern: str | None = None) -> bool:
        return self.command("broadcast", body, *(["--pattern", pattern] if pattern else []))[0] == 0

    def dump(self) -> list[str]:
        return self.command("dump", statuses=(0,))[1]

    def load(self, lines: Iterable[str]) -> bool:
        return self.command("load", stdin="".join(f"{line}\n" for line in lines), statuses=(0, 1))[0] == 0


class QueueTest(CoreTest):
    """What only Python sees."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.q = self.broker(clock=self.clock).queue("q")

    def test_seeds_example_works(self) -> None:
        with Queue("myqueue", self.path) as q:
            q.write("Hello, World!")
            self.assertEqual(q.read(), "Hello, World!")
        with Queue("myqueue", str(self.path)) as q:
            self.assertIsNone(q.read())

    def test_messages_know_their_queue_and_attempt_on_every_path(self) -> None:
        q = self.q
        ids = q.write_many(list("abcdefgh"))
        found = [
            q.peek(),
            q.peek(message_id=ids[0]),
            q.read(),
            *q.read_many(1),
            *q.peek_many(1),
            *q.read_all(before=ids[3]),
        ]
        found += [q.move("d"), *q.move_many("d", 1), q.lease(60)]
        expected = [
            ("a", 0, 0),
            ("a", 0, 0),
            ("a", 0, 0),
            ("b", 1, 0),
            ("c", 2, 0),
            ("c", 2, 1),
            ("d", 3, 0),
            ("e", 4, 0),
            ("f", 5, 1),
        ]
        for message, (body, number, attempt) in zip(found, expected):
            assert message is not None
            self.assertEqual((str(message), message.id, message.attempt), (body, ids[number], attempt))
            self.assertEqual(message.queue, "d" if body in "de" else "q")

    def test_delay_and_until_mean_the_same_moment(self) -> None:
        due = self.clock.ns + 60 * NS
        self.q.write("a", delay=60)
        self.q.write("b", until=due)
        self.q.write("c", until=datetime.fromtimestamp(due / NS, timezone.utc))
        self.q.write_many(["d", "e"], delay=60.0)
        self.q.write_many(["f"], until=due)
        self.clock.ns = due - 1
        self.assertEqual((self.q.stats(), self.q.peek(), self.q.has_pending()), (Stats(0, 0, 6), None, False))
        self.clock.ns = due
        self.assertEqual((self.q.stats(), self.q.count(), self.q.has_pending()), (Stats(6, 0, 0), 6, True))
        self.assertEqual(self.q.read_many(9), list("abcdef"))

    def test_what_is_due_is_counted_and_found_before_anybody_promotes_it(self) -> None:
        ids = [self.q.write("held", delay=5), self.q.write("ready")]
        self.q.write("other", delay=500)
        self.clock.ns += 6 * NS
        self.assertEqual(
            (self.q.count(), self.q.stats(), self.q.broker.queues()), (2, Stats(2, 0, 1), {"q": (2, 0, 1)})
        )
        self.assertEqual(
            (list(self.q.peek_all()), self.q.peek(), self.q.peek_many(1)), (["held", "ready"], "held", ["held"])
        )
        self.assertTrue(self.q.has_pending(before=ids[1]))
        self.assertEqual((self.q.peek(after=ids[0]), self.q.peek(before=ids[0])), ("ready", None))
        self.assertEqual(self.q.read(), "held")

    def test_a_time_that_has_passed_and_no_delay_are_now(self) -> None:
        self.q.write("a", delay=0)
        self.q.write("b", until=self.clock.ns)
        self.q.write("c", until=0)
        self.q.write("d", until=datetime(1980, 1, 1, tzinfo=timezone.utc))
        self.assertEqual(self.q.stats(), Stats(4, 0, 0))

    def test_write_many_is_all_or_nothing(self) -> None:
        def bodies() -> Iterator[str]:
            yield from ("a", "b")
            raise ZeroDivisionError

        with self.assertRaises(ZeroDivisionError):
            self.q.write_many(bodies())
        for bad in (["a", "\ud800"], ["a"] * 100 + [5]):
            with self.assertRaises((MessageError, TypeError)):
                self.q.write_many(bad)  # type: ignore[arg-type]
        self.assertEqual(self.q.count(), 0)
        self.assertEqual(self.q.write_many([]), [])
        self.assertEqual(self.q.write_many(iter("ab")), [m.id for m in self.q.peek_all()])
        for count in (1, 63, 64, 65, 128, 200):
            self.q.delete()
            texts = [str(number) for number in range(count)]
            self.q.write_many(texts)
            self.assertBodies(self.q, texts)

    def test_a_single_text_is_not_many(self) -> None:
        for bad in ("abc", b"abc"):
            with self.assertRaisesRegex(TypeError, "goes to write"):
                self.q.write_many(bad)  # type: ignore[arg-type]
        with self.assertRaises(TypeError):
            self.q.write_many(5)  # type: ignore[arg-type]

    def test_misused_types_are_type_errors_on_every_path(self) -> None:
        q: Any = self.q
        q.write_many(["a", "b"])
        ids = (q.read, q.peek, q.lease, q.delete, q.has_pending, lambda **filters: q.move("d", **filters))
        ranges = (q.read, q.peek, q.lease, q.has_pending, lambda **filters: q.move("d", **filters))
        ranges += tuple(
            lambda act=act, **filters: list(act(**filters) or ())
            for act in (lambda **f: q.read_many(1, **f), q.read_all, lambda **f: q.peek_many(1, **f), q.peek_all)
        )
        for bad in (True, 1.5, b"1837025672140161024", [1], datetime.now(timezone.utc)):
            for name, acts in (("message_id", ids), ("after", ranges), ("before", ranges)):
                for act in acts:
                    with self.subTest(name=name, bad=bad), self.assertRaises(TypeError):
                        act(**{name: bad})
        for bad in ("5", "", "\uff11837025672140161024", -1, 2**63):
            for name, acts in (("message_id", ids), ("after", ranges), ("before", ranges)):
                for act in acts:
                    with self.subTest(name=name, bad=bad), self.assertRaises(ValueError):
                        act(**{name: bad})
        for act in (q.read_many, q.peek_many, lambda limit: q.move_many("d", limit)):
            for bad in (True, 1.0, "1", None):
                with self.assertRaises(TypeError):
                    act(bad)
            for bad in (0, -1):
                with self.assertRaises(ValueError):
                    act(bad)
        self.assertBodies(q, ["a", "b"])

    def test_misused_delays_and_leases_are_refused(self) -> None:
        q: Any = self.q
        q.write("a")
        message = q.lease(60)
        acts = (
            lambda value: q.write("x", delay=value), lambda value: q.write_many(["x"], delay=value), q.lease,
            lambda value: q.extend(message, value), lambda value: q.release(message, delay=value),
            lambda value: LeaseKeeper(q, value),
            lambda value: list(q.read_all(lease=value)),
        )  # fmt: skip
        for act in acts:
            for bad in (True, "5", b"5", [5], timedelta(seconds=5)):
                with self.subTest(bad), self.assertRaises(TypeError):
                    act(bad)
            for bad in (-1, -0.001, float("nan"), float("inf"), 1e300, 10**30):
                with self.subTest(bad), self.assertRaises(ValueError):
                    act(bad)
        for act in (lambda value: q.write("x", until=value), lambda value: q.write_many(["x"], until=value)):
            for bad in (True, "2024-01-15", 1.5, date(2024, 1, 15), b"5"):
                with self.subTest(bad), self.assertRaises(TypeError):
                    act(bad)
            for bad in (-1, 2**63, datetime(2024, 1, 15)):
                with self.subTest(bad), self.assertRaises(ValueError):
                    act(bad)
        for act in (
            lambda: q.write("x", delay=5, until=5),
            lambda: q.write_many(["x"], delay=5, until=5),
            lambda: LeaseKeeper(q, 0),
        ):
            with self.assertRaises(ValueError):
                act()
        self.assertEqual(q.stats(), Stats(0, 1, 0))

    def test_a_closed_queue_says_so(self) -> None:
        queue = self.queue()
        queue.write("x")
        message = queue.lease(60)
        assert message is not None
        queue.close()
        queue.close()
        acts: list[Callable[[], object]] = [
            lambda: queue.write("x"), lambda: queue.write_many(["x"]), queue.read, lambda: queue.read_many(1),
            lambda: list(queue.read_all()),
            queue.peek, lambda: queue.peek(message_id=5), lambda: queue.peek_many(1),
            lambda: list(queue.peek_all()), queue.has_pending,
            queue.count, queue.stats, queue.lease, lambda: queue.ack(message), lambda: queue.extend(message, 5),
            lambda: queue.release(message),
            lambda: queue.dead_letter(message), lambda: queue.move("d"), lambda: queue.move_many("d", 1),
            lambda: queue.move_all("d"),
            queue.delete, lambda: queue.delete(message_id=5), lambda: queue.read(wait=0.1),
            lambda: LeaseKeeper(queue).take(),
        ]  # fmt: skip
        for act in acts:
            with self.assertRaisesRegex(UsageError, "closed: make a new one"):
                act()

    def test_has_pending_with_bounds(self) -> None:
        first, second = self.q.write_many(["a", "b"])
        self.assertTrue(self.q.has_pending() and self.q.has_pending(after=first) and self.q.has_pending(before=second))
        self.assertFalse(self.q.has_pending(after=second) or self.q.has_pending(before=first))
        self.assertTrue(self.q.has_pending(message_id=second))
        self.q.lease(60)
        self.assertFalse(self.q.has_pending(message_id=first))

    def test_peek_all_misses_nothing_while_rows_are_deleted(self) -> None:
        bodies = [str(number) for number in range(5000)]
        ids = self.q.write_many(bodies)
        seen = []
        for message in self.q.peek_all():
            seen.append(message)
            if message.id == ids[500]:
                self.q.read_many(400)  # behind it
            if message.id == ids[1000]:
                self.q.move_many("d", 1500, after=ids[2000])  # before it
            self.q.delete(message_id=message.id) if message.id % 7 == 0 else None
        moved = {message.id for message in self.q.broker.queue("d").peek_all()}
        late = [message.id for message in seen if message.id in moved and message.id > ids[2047]]
        self.assertEqual([m for m in seen if m.id not in moved], [b for b, id in zip(bodies, ids) if id not in moved])
        self.assertLess(len(late), 1001, "at most the page that was read already")

    def test_peek_all_reads_page_by_page(self) -> None:
        """Ten megabytes are not in memory at once: the statement is asked for more as the loop goes on."""
        self.q.write_many(["x" * 100_000] * 100)
        with mock.patch.object(SQLiteRunner, "run", autospec=True, side_effect=SQLiteRunner.run) as run:
            iterator = self.q.peek_all()
            next(iterator)
            first = run.call_count
            self.assertEqual(len(list(iterator)), 99)
            self.assertGreater(run.call_count, first + 3)

    def test_read_all_removes_each_message_when_the_loop_asks_for_the_next(self) -> None:
        self.q.write_many(["a", "b", "c"])
        iterator = self.q.read_all()
        self.assertEqual(next(iterator), "a")
        self.assertEqual(self.q.stats().total, 3)
        self.assertEqual(next(iterator), "b")
        self.assertEqual(self.q.stats().total, 2)
        iterator.close()  # type: ignore[attr-defined]
        self.assertEqual(self.q.stats(), Stats(2, 0, 0))
        self.assertEqual([(str(m), m.attempt) for m in self.q.peek_all()], [("b", 1), ("c", 0)])  # b was seen

    def test_leaving_read_all_gives_back_the_message_and_its_batch(self) -> None:
        bodies = [str(number) for number in range(100)]
        self.q.write_many(bodies)
        for error in (ZeroDivisionError, KeyboardInterrupt):
            with self.assertRaises(error), contextlib.closing(self.q.read_all()) as messages:  # type: ignore[type-var]
                for message in messages:
                    if message.endswith("9"):
                        raise error
            self.assertEqual(self.q.stats().leased, 0)
        self.assertBodies(self.q, bodies[9:])

    def test_read_all_of_many_takes_all_in_order(self) -> None:
        bodies = [str(number) for number in range(2500)]
        self.q.write_many(bodies)
        self.assertEqual(list(self.q.read_all()), bodies)
        self.assertEqual(self.q.broker.queues(), {})

    def test_read_all_keeps_its_leases_alive(self) -> None:
        queue = self.queue()
        queue.write_many(["a", "b"])
        with contextlib.closing(queue.read_all(lease=0.6)) as messages:  # type: ignore[type-var]
            self.assertEqual(next(messages), "a")
            end = time.monotonic() + 0.9
            while time.monotonic() < end:
                self.assertEqual(queue.stats(), Stats(1, 1, 0))
                threading.Event().wait(0.05)
            self.assertEqual(next(messages), "b")
        self.assertEqual(queue.stats().total, 1)

    def test_read_all_goes_on_when_someone_removed_the_message(self) -> None:
        self.q.write_many(["a", "b", "c"])
        with self.assertLogs("simplebroker", "WARNING") as log:
            for message in self.q.read_all():
                self.q.delete(message_id=message.id)
        self.assertEqual(len(log.output), 3)
        self.assertIn("acknowledged, moved or deleted", log.output[0])

    def test_move_all_moves_everything_in_order(self) -> None:
        bodies = [str(number) for number in range(2500)]
        ids = self.q.write_many(bodies)
        self.q.write("later", delay=60)
        self.assertEqual(self.q.move_all("d", after=ids[9]), 2490)
        self.assertBodies(self.q, bodies[:10])
        self.assertBodies(self.q.broker.queue("d"), bodies[10:])
        self.assertEqual(self.q.stats(), Stats(10, 0, 1))

    def test_a_move_to_itself_is_refused(self) -> None:
        self.q.write("a")
        for act in (lambda: self.q.move("q"), lambda: self.q.move_many("q", 1), lambda: self.q.move_all("q")):
            with self.assertRaisesRegex(ValueError, "same queue"):
                act()

    def test_a_move_starts_the_attempts_again(self) -> None:
        self.q.write("a")
        message = self.q.lease(60)
        assert message is not None
        self.q.release(message)
        self.q.move("d")
        found = self.q.broker.queue("d").lease(60)
        assert found is not None
        self.assertEqual((found.attempt, found.id), (1, message.id))
        for act in (self.q.ack, self.q.extend, self.q.release):
            with self.assertRaisesRegex(LeaseLost, "is not in 'q' now"):
                act(message)

    def test_delete_tells_how_many(self) -> None:
        self.q.write_many(["a"] * 70)
        self.q.write("b", delay=5)
        self.q.lease(60)
        self.assertEqual((self.q.delete(), self.q.delete()), (71, 0))

    def test_a_huge_limit_is_allowed(self) -> None:
        self.q.write_many(["a", "b"])
        self.assertEqual(self.q.peek_many(2**70), ["a", "b"])
        self.assertEqual(self.q.read_many(2**70), ["a", "b"])

    def test_the_work_of_an_operation_does_not_grow_with_the_depth(self) -> None:
        """Counted in steps of SQLite's machine, so that it does not depend on the machine of the test."""

        def steps(depth: int) -> dict[str, int]:
            runner = PlainRunner(self.dir / f"{depth}.db")
            self.addCleanup(runner.close)
            broker = Broker(runner=runner, clock=self.clock)
            queue, empty = broker.queue("q"), broker.queue("empty")
            ids = queue.write_many(["ready"] * depth)
            for name in ("q", "other"):
                broker.queue(name).write_many(["held"] * depth, delay=3600)
                broker.queue(name + ".2").write_many(["ready"] * depth)
            leased = queue.lease(60)
            assert leased is not None
            middle = ids[depth // 2]
            acts: tuple[Callable[[], object], ...] = (
                lambda: queue.write("x"), queue.read, queue.peek, queue.has_pending, lambda: queue.lease(60),
                lambda: queue.move("d"), lambda: queue.extend(leased), lambda: queue.ack(leased),
                lambda: queue.read(message_id=middle),
                lambda: queue.peek(after=middle), lambda: queue.read_many(2, after=middle),
                lambda: queue.peek(message_id=ids[-1]),
                lambda: queue.delete(message_id=ids[-1]), lambda: next(queue.peek_all()),
                lambda: queue.has_pending(after=middle),
                empty.peek, empty.read, empty.has_pending, empty.lease, lambda: empty.move("d"), empty.count,
            )  # fmt: skip
            counts = {}
            for number, act in enumerate(acts):
                count = [0]

                def tick(count: list[int] = count) -> int:
                    count[0] += 1
                    return 0

                runner.connection.set_progress_handler(tick, 20)
                act()
                runner.connection.set_progress_handler(None, 0)
                counts[f"number {number}"] = count[0]
            return counts

        few, many = steps(100), steps(3000)
        self.assertEqual({name: many[name] for name in many if many[name] > 2 * few[name] + 10}, {}, few)


class LeasesTest(CoreTest):
    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.broker_ = self.broker(clock=self.clock)
        self.q = self.broker_.queue("q")

    def leased(self, seconds: float = 60) -> Message:
        message = self.q.lease(seconds)
        assert message is not None
        return message

    def test_leases_are_given_in_order_and_one_by_one(self) -> None:
        self.q.write_many(["a", "b", "c"])
        self.assertEqual([self.q.lease(60) for _ in range(4)], ["a", "b", "c", None])

    def test_an_expired_lease_goes_before_what_came_later(self) -> None:
        self.q.write_many(["a", "b"])
        self.leased(10)
        self.clock.ns += 11 * NS
        again = self.leased()
        self.assertEqual((str(again), again.attempt), ("a", 2))

    def test_an_ended_lease_is_still_good_while_nobody_took_the_message(self) -> None:
        self.q.write_many(["a", "b"])
        first, second = self.leased(10), self.leased(10)
        self.clock.ns += 11 * NS
        self.assertEqual(self.q.count(), 2)
        self.q.extend(first, 30)
        self.assertEqual(self.q.stats(), Stats(1, 1, 0))
        self.q.ack(second)
        self.clock.ns += 29 * NS
        self.assertEqual(self.q.stats(), Stats(0, 1, 0))
        self.q.ack(first)
        self.assertEqual(self.broker_.queues(), {})

    def test_a_lost_lease_says_who_has_the_message(self) -> None:
        self.q.write("a")
        old = self.leased(10)
        self.clock.ns += 11 * NS
        new = self.leased()
        for act in (self.q.ack, self.q.extend, self.q.release, self.q.dead_letter):
            with self.assertRaisesRegex(LeaseLost, rf"{old.id}\.1 ended: attempt 2 has the message now"):
                act(old)
        self.q.ack(new)
        for act in (self.q.ack, self.q.extend, self.q.release, self.q.dead_letter):
            with self.assertRaisesRegex(LeaseLost, "acknowledged, moved or deleted"):
                act(new)

    def test_what_was_given_back_unhandled_cannot_be_acknowledged_under_its_next_holder(self) -> None:
        """Giving back does not count as an attempt, and still the old holder has nothing left."""
        self.q.write("a")
        with LeaseKeeper(self.q) as keeper:
            (old,) = keeper.take()
        new = self.leased()
        with self.assertRaises(LeaseLost):
            self.q.ack(old)
        self.q.ack(new)

    def test_release_waits_as_told(self) -> None:
        self.q.write_many(["a", "b"])
        self.q.release(self.leased(), delay=5)
        self.assertEqual((self.q.peek(), self.q.stats()), ("b", Stats(1, 1, 0)))
        self.clock.ns += 5 * NS
        self.assertEqual((self.q.peek(), self.q.stats()), ("a", Stats(2, 0, 0)))

    def test_dead_letter_moves_it_with_its_id(self) -> None:
        id = self.q.write("a")
        self.q.write("b")
        self.q.dead_letter(self.leased())
        self.q.dead_letter(self.leased(), "morgue")
        dead = self.broker_.queue("q.dead").peek()
        assert dead is not None
        self.assertEqual((str(dead), dead.id, dead.attempt), ("a", id, 0))
        self.assertEqual(self.broker_.queues(), {"morgue": (1, 0, 0), "q.dead": (1, 0, 0)})

    def test_only_what_was_leased_can_be_settled(self) -> None:
        self.q.write("a")
        peeked = self.q.peek()
        assert peeked is not None
        for act in (self.q.ack, self.q.extend, self.q.release, self.q.dead_letter):
            with self.assertRaisesRegex(ValueError, "not leased: use lease"):
                act(peeked)
            for bad in ("a", 5, None):
                with self.assertRaisesRegex(TypeError, "give the Message"):
                    act(bad)  # type: ignore[arg-type]
        with self.assertRaises(LeaseLost):
            self.broker_.queue("other").ack(self.leased())
        self.assertEqual(self.q.stats(), Stats(0, 1, 0))

    def test_filters_choose_what_is_leased(self) -> None:
        ids = self.q.write_many(list("abcd"))
        self.assertEqual((self.q.lease(60, after=ids[1]), self.q.lease(60, message_id=ids[1])), ("c", "b"))
        self.assertEqual((self.q.lease(60, message_id=ids[1]), self.q.lease(60, before=ids[0])), (None, None))
        self.assertEqual(self.q.peek_many(9), ["a", "d"])

    def test_an_acknowledgement_takes_part_in_the_callers_transaction(self) -> None:
        self.q.write("a")
        message = self.leased()
        with self.assertRaises(ZeroDivisionError), self.broker_.transaction():
            self.q.ack(message)
            self.broker_.queue("results").write("done")
            raise ZeroDivisionError
        self.assertEqual(self.broker_.queues(), {"q": (0, 1, 0)})
        with self.broker_.transaction():
            self.q.ack(message)
            self.broker_.queue("results").write("done")
        self.assertEqual(self.broker_.queues(), {"results": (1, 0, 0)})

    def test_a_message_that_was_leased_before_is_taken_alone(self) -> None:
        """If it kills its consumer, the others of a batch must not lose an attempt with it."""
        self.q.write_many(list("abcd"))
        self.q.release(self.leased())
        with LeaseKeeper(self.q) as keeper:
            self.assertEqual([keeper.take(9), keeper.take(9)], [["a"], ["b", "c", "d"]])

    def test_a_keeper_gives_back_what_was_not_settled(self) -> None:
        self.q.write_many(list("abcd"))
        with LeaseKeeper(self.q) as keeper:
            a, b, c, _ = keeper.take(4)
            keeper.acknowledge(a, b)
            keeper.settle(c)
            self.q.release(c, delay=60)
        self.assertEqual(self.q.stats(), Stats(1, 1, 0))
        again = self.leased()
        self.assertEqual((str(again), again.attempt), ("d", 1))


# ---------------------------------------------------------------------------------------------------
# Waiting, watchers and crashes.
# ---------------------------------------------------------------------------------------------------


SOON_S = 2.0  # what takes a moment takes less than this, on a loaded machine too


# A consumer that looks by itself once a minute only: what wakes it in time is the doorbell, or a mistake.
BELL_ONLY = Settings(sync_mode="OFF", max_interval_s=60)
ARMING = -1.0  # among the waits of a doorbell


HAS_BELL = sys.platform == "linux" or hasattr(select, "kqueue")


IMPORTS = "import os, random, signal, sys, threading, time\nfrom simplebroker import *\n"


class Recorder:
    """A handler that remembers its calls, raises what it was told to, and lets a test wait for them."""

    def __init__(self, *failures: BaseException) -> None:
        self._changed = threading.Condition()
        self._failures = list(failures)
        self.calls: list[tuple[Message, float]] = []  # each with its monotonic time

    def __call__(self, message: Message, timestamp: int) -> None:
        with self._changed:
            self.calls.append((message, time.monotonic()))
            self._changed.notify_all()
            failure = self._failures.pop(0) if self._failures else None
        if failure is not None:
            raise failure

    @property
    def bodies(self) -> list[str]:
        return [str(message) for message, _ in self.calls]

    def reached(self, count: int, seconds: float = DEADLINE_S) -> bool:
        """Wait until it was called that many times."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.calls) >= count, seconds)


class WatchPlainRunner(SQLRunner):
    """The five methods over plain sqlite3: it rings no doorbell. It counts, and fails when told to."""

    def __init__(self, path: Path, **options: Any) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, **{"check_same_thread": False, **options})
        self._mutex = threading.RLock()
        self.failures: list[Exception] = []
        self.statements = 0

    def run(self, sql: str, params: Any = (), *, fetch: bool = False) -> Any:
        with self._mutex:
            self.statements += 1
            if self.failures:
                raise self.failures.pop(0)
            return self._connection.execute(sql, params).fetchall()

    def begin_immediate(self) -> None:
        self._mutex.acquire()
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except BaseException:
            self._mutex.release()
            raise

    def commit(self) -> None:
        self._connection.execute("COMMIT")
        self._mutex.release()

    def rollback(self) -> None:
        self._connection.execute("ROLLBACK")
        self._mutex.release()

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def without_bell(library: Any = None) -> Iterator[None]:
    """Consumers that begin to wait in here find no kqueue, and this C library: by default none."""
    no_kqueue = mock.patch("select.kqueue", side_effect=OSError("none is left"), create=True)
    load = {"return_value": library} if library is not None else {"side_effect": OSError("no such library")}
    with no_kqueue, mock.patch("ctypes.CDLL", **load):
        yield


def descriptors() -> list[str]:
    """What the open file descriptors of this process are, sorted."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(found)


class ConsumerTest(BrokerTest):
    """What tests of consumers share: other connections, other processes, watchers that end with the test.

    Nothing is synced to the disk: what counts here is what survives processes.
    """

    def setUp(self) -> None:
        super().setUp()
        self.environ.update(BROKER_SYNC_MODE="OFF", PYTHONWARNINGS="ignore::DeprecationWarning")  # fork and threads

    def queue(self, name: str = "q", **options: Any) -> Queue:
        options.setdefault("settings", Settings(sync_mode="OFF"))
        return super().queue(name, **options)

    def broker(self, **options: Any) -> Broker:
        options.setdefault("settings", Settings(sync_mode="OFF"))
        return super().broker(**options)

    def other(self, name: str = "q") -> Queue:
        """The queue through a connection of its own, as if from another process."""
        return self.queue(name, settings=Settings(sync_mode="OFF", cache_mb=11))

    def child(self, code: str, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        """A process with simplebroker imported, whose standard input is a pipe; see line() and tell()."""
        options = {"stdin": subprocess.PIPE, "bufsize": 0, **options}
        return self.python(IMPORTS + textwrap.dedent(code), str(self.path), *args, **options)

    def line(self, child: subprocess.Popen[bytes]) -> str:
        """The next line that a child prints; it is killed if none comes."""
        timer = threading.Timer(DEADLINE_S, child.kill)
        timer.start()
        assert child.stdout is not None
        text = child.stdout.readline()
        timer.cancel()
        self.assertTrue(text.endswith(b"\n"), f"the child printed no line, but {text!r}")
        return text.decode().rstrip("\n")

    def tell(self, child: subprocess.Popen[bytes], text: str = "") -> None:
        assert child.stdin is not None
        child.stdin.write(f"{text}\n".encode())

    def writer(self) -> subprocess.Popen[bytes]:
        """A process that writes what it is told."""
        child = self.child(
            """
            queue = Queue("q", sys.argv[1])
            queue.count()
            print("ready", flush=True)
            for line in sys.stdin:
                queue.write(line.rstrip())
            """
        )
        self.line(child)
        return child

    def watcher(self, handler: Any, name: str = "q", **options: Any) -> QueueWatcher:
        """A watcher that is stopped at the end. Its database is the test's, unless told otherwise."""
        options.setdefault("db", self.broker(settings=BELL_ONLY))
        watcher = QueueWatcher(name, handler, **options)
        self.addCleanup(watcher.stop, DEADLINE_S)
        return watcher

    def start(self, handler: Any, name: str = "q", **options: Any) -> QueueWatcher:
        watcher = self.watcher(handler, name, **options)
        watcher.run_in_thread()
        return watcher

    def assertHandled(self, recorder: Recorder, bodies: list[str], seconds: float = DEADLINE_S) -> None:
        """The handler gets called with these, in this order, and with nothing else."""
        recorder.reached(len(bodies), seconds)
        self.assertEqual(recorder.bodies, bodies)

    def assertEmpties(self, *queues: Queue) -> None:
        """The queues get empty: nothing ready, leased or delayed is left."""
        for queue in queues:
            self.wait_for(lambda queue=queue: queue.stats().total == 0, f"{queue} to be empty")  # type: ignore[misc]

    def assertSoon(self, since: float, limit: float = SOON_S) -> None:
        self.assertLess(time.monotonic() - since, limit)


class WaitingTest(ConsumerTest):
    """read(wait=), lease(wait=), wait_for_change() and alarm()."""

    def waiting(self, wait: float, queue: Queue, **options: Any) -> Recorder:
        """A thread that waits for a message; the recorder gets it."""
        recorder = Recorder()

        def consume() -> None:
            message = queue.read(wait=wait, **options)
            if message is not None:
                recorder(message, message.id)

        thread = threading.Thread(target=consume, daemon=True)
        thread.start()
        self.addCleanup(thread.join, DEADLINE_S)
        return recorder

    def asleep(self) -> None:
        """Wait until the thread that serves those who wait runs, which is before they look."""
        self.wait_for(lambda: any(t.name == "simplebroker-wait" for t in threading.enumerate()), "the attendant")

    def test_a_message_that_is_there_is_returned_at_once(self) -> None:
        queue = self.queue(settings=BELL_ONLY)
        queue.write_many(["a", "b"])
        started = time.monotonic()
        self.assertEqual([queue.read(wait=50), queue.lease(wait=50)], ["a", "b"])
        self.assertSoon(started)

    def test_wait_zero_looks_once(self) -> None:
        queue = self.queue(settings=BELL_ONLY)
        started = time.monotonic()
        self.assertIsNone(queue.read(wait=0))
        self.assertIsNone(queue.lease(wait=0.0))
        self.assertSoon(started)

    def test_a_wait_ends_after_its_time_and_not_before(self) -> None:
        queue = self.queue(settings=BELL_ONLY)
        for take in (queue.read, queue.lease):
            started = time.monotonic()
            self.assertIsNone(take(wait=0.12))
            self.assertGreaterEqual(time.monotonic() - started, 0.12)
            self.assertSoon(started)

    def test_a_wait_that_is_negative_or_no_number_is_refused(self) -> None:
        queue = self.queue()
        queue.write("stays")
        for wait in (-1, -0.001, -math.inf, math.nan):
            for take in (queue.read, queue.lease):
                with self.subTest(take=take.__name__, wait=wait), self.assertRaises(ValueError):
                    take(wait=wait)
        self.assertEqual(queue.count(), 1)

    def test_a_wait_can_be_for_ever(self) -> None:
        queue = self.queue()
        recorder = self.waiting(math.inf, queue)
        self.asleep()
        queue.write("at last")
        self.assertHandled(recorder, ["at last"], SOON_S)

    def test_a_waiting_reader_keeps_to_its_bounds(self) -> None:
        queue = self.queue()
        first = queue.write("too old")
        recorder = self.waiting(50, queue, after=first)
        self.asleep()
        queue.write("new")
        self.assertHandled(recorder, ["new"], SOON_S)
        self.assertBodies(queue, ["too old"])

    @NEEDS_BELL
    def test_a_commit_of_another_process_or_thread_wakes_by_the_doorbell(self) -> None:
        writer, queue = self.writer(), self.queue(settings=BELL_ONLY)
        queue.write("the database exists")
        queue.read()
        for write in (lambda: self.tell(writer, "x"), lambda: self.other().write("x"), lambda: queue.write("x")):
            recorder = self.waiting(50, queue)
            self.asleep()
            write()
            self.assertHandled(recorder, ["x"], SOON_S)

    def test_only_one_of_those_who_wait_gets_the_message(self) -> None:
        queue = self.queue()
        recorders = [self.waiting(0.3, queue) for _ in range(4)]
        self.asleep()
        queue.write("one")
        self.wait_for(lambda: sum(len(recorder.calls) for recorder in recorders), "a reader")
        self.assertIsNone(queue.read(wait=0.4))  # the others have given up by then
        self.assertEqual(sum(len(recorder.calls) for recorder in recorders), 1)

    @NEEDS_BELL
    def test_a_delayed_message_comes_when_it_is_due(self) -> None:
        queue = self.queue(settings=BELL_ONLY)
        recorder = self.waiting(50, queue)
        self.asleep()
        written = time.monotonic()
        self.other().write("later", delay=0.15)
        self.assertHandled(recorder, ["later"])
        self.assertGreaterEqual(recorder.calls[0][1] - written, 0.15)
        self.assertLess(recorder.calls[0][1] - written, SOON_S)

    def test_a_delay_that_was_there_before_the_wait_counts_too(self) -> None:
        queue = self.queue(settings=BELL_ONLY)
        queue.write("later", delay=0.15)
        started = time.monotonic()
        self.assertEqual(queue.read(wait=50), "later")
        self.assertSoon(started)

    def test_a_lease_of_a_dead_process_ends_and_wakes(self) -> None:
        queue = self.queue()
        queue.write("left behind")
        child = self.child('print(Queue("q", sys.argv[1]).lease(0.4), flush=True); os._exit(1)')
        self.assertEqual(self.line(child), "left behind")
        started = time.monotonic()
        message = queue.lease(30, wait=50)
        self.assertEqual((message, message and message.attempt), ("left behind", 2))
        self.assertSoon(started)

    def test_a_lease_that_another_thread_took_meanwhile_wakes_when_it_ends(self) -> None:
        queue = self.queue()
        bound = queue.write("not for the waiter")
        recorder = self.waiting(50, queue, after=bound)
        self.asleep()
        with queue.broker.transaction():  # no moment in which the waiter could have it
            id = queue.write("b")
            message = queue.lease(50, after=bound)
        assert message is not None
        self.assertIsNone(queue.lease(wait=0.05, after=id))  # the waiter was woken, and is asleep again
        queue.extend(message, 0.2)  # makes nothing deliverable now, and rings no bell
        self.assertHandled(recorder, ["b"], SOON_S)

    def test_messages_that_become_due_one_soon_after_the_other_all_wake(self) -> None:
        # The clock jumps to the second time as soon as the first has woken the waiter.
        now = [1_000_000_000_000]
        runner = SQLiteRunner(self.path, Settings(sync_mode="OFF"), clock=lambda: now[0])
        broker = Broker(runner=runner, clock=lambda: now[0])
        self.addCleanup(runner.close)
        for round_number in range(20):
            due = now[0] + 1_000_000
            broker.queue("one").write("1", until=due)
            broker.queue("two").write("2", until=due + 1_000_000)
            with broker.alarm() as alarm:
                now[0] = due
                self.assertTrue(alarm.wait(SOON_S))
                now[0] = due + 1_000_000
                self.assertTrue(alarm.wait(SOON_S), f"round {round_number}: not woken for the second message")

    def test_no_change_between_a_look_and_the_wait_is_missed(self) -> None:
        broker, other = self.broker(), self.other()
        for round_number in range(20 * (10 if FULL else 1)):
            with broker.alarm() as alarm:
                other.write("1")
                self.assertTrue(alarm.wait(SOON_S))
                other.write("2")  # while the attendant is still busy with the first
                self.assertTrue(alarm.wait(SOON_S), f"round {round_number}")

    def test_no_change_is_missed_without_a_doorbell_either(self) -> None:
        with without_bell():
            self.test_no_change_between_a_look_and_the_wait_is_missed()

    def test_a_change_before_the_wait_is_seen_by_it(self) -> None:
        queue = self.queue()
        with queue.broker.alarm() as alarm:
            queue.write("x")
            self.assertTrue(alarm.wait(SOON_S))

    def test_wait_for_change_tells_whether_there_was_one(self) -> None:
        queue = self.queue()
        self.assertFalse(queue.broker.wait_for_change(0.05))
        results: list[bool] = []
        thread = threading.Thread(target=lambda: results.append(queue.broker.wait_for_change(DEADLINE_S)))
        thread.start()
        self.asleep()
        while thread.is_alive():  # the first may have come before the wait
            queue.write("x")
            thread.join(0.02)
        self.assertEqual(results, [True])

    def test_readers_that_come_and_go_miss_nothing(self) -> None:
        # Each end of the last wait and begin of the next is a hand-over between two attendants.
        interval = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, interval)
        sys.setswitchinterval(1e-5)
        queue, got, stop = self.queue(settings=Settings(sync_mode="OFF")), threading.Event(), threading.Event()

        def read() -> None:
            while not stop.is_set():
                if queue.read(wait=random.choice([0.001, 0.002, 5])):
                    got.set()

        readers = [threading.Thread(target=read, daemon=True) for _ in range(3)]
        for reader in readers:
            reader.start()
        for number in range(400 * (10 if FULL else 1)):
            got.clear()
            queue.write(str(number))
            self.assertTrue(got.wait(SOON_S), f"message {number} woke nobody")
        stop.set()
        queue.write_many(["for those who wait for 5 seconds"] * len(readers))
        for reader in readers:
            reader.join(DEADLINE_S)
            self.assertFalse(reader.is_alive())

    def test_loops_and_waits_inside_a_transaction_do_not_stall(self) -> None:
        # The thread that renews leases and looks for changes cannot get in, and must not be waited for.
        queue, dest = self.queue(), self.queue("dest")
        for lease in (0.3, 30):
            queue.write_many(["a", "b"])
            started = time.monotonic()
            with queue.broker.transaction():
                for message in queue.read_all(lease=lease):
                    self.assertIsNone(dest.read(wait=0.12, message_id=1))
                    dest.write(message)
            self.assertSoon(started)
            self.assertEqual((queue.stats().total, dest.read(), dest.read()), (0, "a", "b"))

    def test_waits_that_end_at_the_same_time_do_not_disturb_each_other(self) -> None:
        interval = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, interval)
        sys.setswitchinterval(1e-6)
        broker, errors = self.broker(), []

        def come_and_go() -> None:
            try:
                for _ in range(200 * (50 if FULL else 1)):
                    with broker.alarm():
                        pass
            except Exception as error:  # noqa: BLE001 - the test is that there is none
                errors.append(error)

        threads = [threading.Thread(target=come_and_go) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        self.assertEqual(errors, [])

    def test_waiting_costs_no_thread_and_no_descriptor_afterwards(self) -> None:
        queue = self.queue()
        queue.write("x")
        queue.read()
        queue.read(wait=0.01)  # what is kept open for the next time is open now
        threads, before = threading.active_count(), descriptors() if os.path.isdir("/proc/self/fd") else []
        for _ in range(50):
            self.assertIsNone(queue.lease(wait=0.001))
        self.assertEqual(threading.active_count(), threads)
        self.assertEqual(descriptors() if before else [], before)


class DoorbellTest(ConsumerTest):
    """What the notification has to survive, and that it is not needed."""

    def assertWakes(self, recorder: Recorder, write: Any, limit: float = SOON_S) -> None:
        """Writing with this function makes one more call of the handler, soon."""
        count = len(recorder.calls)
        write("x")
        self.assertTrue(recorder.reached(count + 1, limit), "not woken")

    def test_the_database_need_not_exist_yet(self) -> None:
        recorder = Recorder()
        self.start(recorder, db=self.broker())
        self.assertFalse(self.path.exists())
        self.tell(self.writer(), "first")
        self.assertHandled(recorder, ["first"], SOON_S)

    @NEEDS_BELL
    def test_the_making_of_the_file_is_heard(self) -> None:
        bell = simplebroker._Doorbell(str(self.path))
        self.addCleanup(bell.close)
        self.assertFalse(bell.attach())
        (self.dir / "another").touch()
        self.assertFalse(bell.wait(SOON_S))  # at once, and it means nothing
        for _ in range(2):
            self.queue().write("x")
            begun = time.monotonic()
            self.assertTrue(bell.wait(DEADLINE_S))
            self.assertTrue(bell.attach())
            self.assertIsNotNone(bell.identity)
            self.queue().write("y")
            self.assertTrue(bell.wait(DEADLINE_S))
            self.assertSoon(begun)
            self.queue().broker.delete_database()
            while bell.wait(0.1):
                pass
            bell.attach()  # it is gone
            self.assertIsNone(bell.identity)

    @NEEDS_BELL
    def test_a_ring_of_a_file_that_was_just_deleted_is_heard(self) -> None:
        lock = Path(f"{self.path}.lock")
        bell = simplebroker._Doorbell(str(self.path))
        self.addCleanup(bell.close)
        with lock.open("wb", buffering=0) as file:
            bell.attach()
            lock.unlink()
            file.write(b"x")
            bell.attach()  # it awaits the next file now, with the ring of this one unread
            self.assertTrue(bell.wait(SOON_S))

    @NEEDS_BELL
    def test_a_file_that_is_made_between_a_look_and_the_watch_is_followed(self) -> None:
        lock = Path(f"{self.path}.lock")
        bell = simplebroker._Doorbell(str(self.path))
        self.addCleanup(bell.close)
        looks: list[bool] = []

        def made_after_the_first_look(path: str) -> tuple[int, int] | None:
            looks.append(True)
            if len(looks) == 1:
                lock.touch()
                return None
            found = os.stat(path)
            return found.st_dev, found.st_ino

        with mock.patch.object(simplebroker, "file_identity", made_after_the_first_look):
            self.assertTrue(bell.attach())
        lock.write_bytes(b"x")
        self.assertTrue(bell.wait(SOON_S))

    def test_an_attendant_that_an_error_ended_is_replaced(self) -> None:
        fail = threading.Event()

        def look() -> int:
            if fail.is_set():
                raise ZeroDivisionError
            return 0

        attendant = simplebroker.Attendant(0.01, None, look)
        first, second = simplebroker.Alarm(attendant), simplebroker.Alarm(attendant)
        with mock.patch.object(threading, "excepthook", lambda args: None):
            attendant.add(first)
            thread = attendant._thread
            assert thread is not None
            fail.set()
            thread.join(DEADLINE_S)
        fail.clear()
        attendant.remove(first)
        attendant.add(second)
        self.addCleanup(attendant.remove, second)
        self.assertIsNot(attendant._thread, thread)
        attendant.ring(None)
        self.assertTrue(second.wait(SOON_S))

    @NEEDS_BELL
    def test_checkpoints_and_vacuum_do_not_disturb_it(self) -> None:
        recorder, other = Recorder(), self.other()
        other.write("x")
        self.start(recorder)
        self.assertTrue(recorder.reached(1))
        connection = sqlite3.connect(self.path)
        self.addCleanup(connection.close)
        for statement in ("PRAGMA wal_checkpoint(RESTART)", "PRAGMA wal_checkpoint(TRUNCATE)", "VACUUM"):
            with self.subTest(statement):
                connection.execute(statement).fetchall()
                self.assertWakes(recorder, other.write)
        self.assertRan(self.cli("--vacuum"))
        self.assertWakes(recorder, other.write)

    def test_the_database_can_be_cleaned_up_and_made_again(self) -> None:
        recorder = Recorder()
        self.start(recorder, db=self.broker())
        for _ in range(2):
            self.assertRan(self.cli("write", "q", "x"))
            self.assertTrue(recorder.reached(1, SOON_S))
            self.assertRan(self.cli("--cleanup"))
        self.assertWakes(recorder, self.queue().write)  # by this process
        self.assertWakes(recorder, self.other().write)

    @NEEDS_LOCKS
    @NEEDS_BELL
    def test_a_file_made_again_is_heard_as_before(self) -> None:
        # Made again at once, it can have the inode number of the deleted one. This watcher looks by itself once
        # in a second, which finds ten messages in about five seconds.
        recorder = Recorder()
        writer = self.broker(settings=Settings(sync_mode="OFF", cache_mb=11))
        writer.queue("q").write("0")
        self.start(recorder, peek=True, db=self.broker(settings=Settings(max_interval_s=1)))
        self.assertTrue(recorder.reached(1))
        for remove in (writer.delete_database, Path(f"{self.path}.lock").unlink) * 2:
            remove()
            while not Path(f"{self.path}.lock").exists():  # a deleted one may be in use for a moment
                with writer.transaction():
                    pass
            self.assertWakes(recorder, writer.queue("q").write)
            started = time.monotonic()
            for _ in range(10):
                self.assertWakes(recorder, writer.queue("q").write)
            self.assertSoon(started)

    def test_the_lock_file_can_be_deleted(self) -> None:
        recorder, queue, other = Recorder(), self.queue(), self.other()
        queue.write("0")
        self.start(recorder, db=queue.broker)
        self.assertTrue(recorder.reached(1))
        for write in (queue.write, other.write, queue.write):
            Path(f"{self.path}.lock").unlink(missing_ok=True)  # a deleted one may be in use for a moment
            self.assertWakes(recorder, write)
            self.assertWakes(recorder, other.write)
            self.assertWakes(recorder, queue.write)

    @NEEDS_LOCKS
    @NEEDS_BELL
    def test_a_writer_that_rings_a_deleted_file_still_wakes_its_own_process(self) -> None:
        recorder, queue = Recorder(), self.queue()
        queue.write("0")
        self.start(recorder, db=queue.broker)
        self.assertTrue(recorder.reached(1))
        with mock.patch.object(simplebroker, "LOCK_CHECK_S", 60.0):
            os.unlink(f"{self.path}.lock")
            self.assertWakes(recorder, self.other().write)  # makes it anew
            new, attendant = simplebroker.file_identity(f"{self.path}.lock"), queue.broker.attendant
            self.wait_for(lambda: attendant._bell.identity == new, "the watcher to follow the new file")  # type: ignore[union-attr]
            for _ in range(3):
                self.assertWakes(recorder, queue.write)

    @NEEDS_BELL
    def test_it_rings_when_the_commit_can_be_seen_and_not_before(self) -> None:
        recorder = Recorder()
        queue = self.queue(settings=Settings(sync_mode="FULL"))  # commits take milliseconds
        self.start(recorder, peek=True)
        for _ in range(10):
            self.assertWakes(recorder, queue.write)
            self.assertWakes(recorder, lambda text: queue.write_many([text]))

    @unittest.skipUnless(sys.platform == "linux" and os.getuid() == 0, "makes a device file")
    def test_a_bell_that_cannot_be_written_does_not_hide_the_commit(self) -> None:
        recorder, queue, other = Recorder(), self.queue(), self.other()
        queue.write("0")
        os.unlink(f"{self.path}.lock")
        os.mknod(f"{self.path}.lock", stat.S_IFCHR | 0o600, os.makedev(1, 7))  # /dev/full: writing is ENOSPC
        watched = self.broker(settings=Settings(sync_mode="OFF", cache_mb=12))
        self.start(recorder, db=watched)
        self.assertTrue(recorder.reached(1))
        for write in (watched.queue("q").write, other.write, watched.queue("q").write):
            self.assertWakes(recorder, write)

    def check_polling(self) -> None:
        """Commits of every origin are found although nothing rings; those of this process at once."""
        recorder, broker = Recorder(), self.broker()
        self.start(recorder, db=broker)
        self.assertWakes(recorder, broker.queue("q").write)
        self.assertWakes(recorder, self.other().write)
        writer = self.writer()
        self.assertWakes(recorder, lambda text: self.tell(writer, text))
        broker.queue("q").write("later", delay=0.1)
        self.assertTrue(recorder.reached(4, SOON_S))
        own, late = Recorder(), self.broker(settings=BELL_ONLY)
        self.start(own, "own", db=late)
        for _ in range(5):
            self.assertWakes(own, late.queue("own").write)

    def test_without_notification_consumers_look_by_themselves(self) -> None:
        with without_bell():
            self.check_polling()

    def test_without_an_inotify_instance_consumers_look_by_themselves(self) -> None:
        library = mock.Mock()
        library.inotify_init1.return_value = -1
        with without_bell(library):
            self.check_polling()
        self.assertTrue(library.inotify_init1.called or sys.platform != "linux")

    @NEEDS_BELL
    @unittest.skipUnless(sys.platform == "linux", "inotify is of Linux")
    def test_without_an_inotify_watch_consumers_look_by_themselves(self) -> None:
        library = mock.Mock(wraps=ctypes.CDLL(None, use_errno=True))
        library.inotify_add_watch = mock.Mock(return_value=-1)
        with without_bell(library):
            self.check_polling()
        self.assertTrue(library.inotify_add_watch.called)

    def test_without_file_descriptors_for_it_nothing_leaks(self) -> None:
        queue = self.queue()
        queue.write("x")
        with mock.patch("os.pipe", side_effect=OSError(24, "Too many open files")):
            before = descriptors() if os.path.isdir("/proc/self/fd") else []
            self.assertEqual(queue.read(wait=5), "x")
            self.assertIsNone(queue.read(wait=0.05))
        self.assertEqual(descriptors() if before else [], before)

    def test_a_commit_that_rings_no_bell_is_found_within_the_interval(self) -> None:
        recorder, queue = Recorder(), self.queue()
        queue.write("0")
        self.start(recorder, db=queue.broker)
        self.assertTrue(recorder.reached(1))
        runner = WatchPlainRunner(self.path)
        self.addCleanup(runner.close)
        custom = Queue("q", runner=runner)
        insert = self.silent_writer()
        for _ in range(3):
            self.assertWakes(recorder, insert)
            self.assertWakes(recorder, custom.write)

    def silent_writer(self) -> Callable[[str], None]:
        """A function that writes a message as the sqlite3 shell does, without ringing."""
        connection = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(connection.close)

        def insert(text: str) -> None:
            sql = "INSERT INTO messages (id, queue, body) SELECT max(last_id, ?) + 1, 'q', ? FROM meta"
            connection.execute(sql, (time.time_ns(), text))

        return insert

    def quiet_consumer(self, recorder: Recorder, interval_s: float) -> tuple[simplebroker._Doorbell, list[float]]:
        """Start a consumer and wait until it sleeps for ten intervals. Returns its bell, which notes its waits."""
        queue = self.queue(settings=Settings(sync_mode="OFF", max_interval_s=interval_s))
        queue.write("0")
        self.start(recorder, db=queue.broker)
        self.assertTrue(recorder.reached(1))
        bell, waits = self.noting(queue.broker)
        self.wait_for(lambda: waits[-1] > 9 * interval_s, "a long sleep")
        return bell, waits

    def noting(self, broker: Broker) -> tuple[simplebroker._Doorbell, list[float]]:
        """The bell of a waiting broker, and a list that grows: how long it waits, and ARMING."""
        self.wait_for(lambda: broker.attendant._bell is not None, "the bell")
        bell: Any = broker.attendant._bell
        wait, arm, notes = bell.wait, bell.arm, [0.0]

        def noting_wait(timeout: float) -> bool:
            notes.append(timeout)
            return bool(wait(timeout))

        def noting_arm() -> None:
            notes.append(ARMING)
            arm()

        bell.wait, bell.arm = noting_wait, noting_arm
        return bell, notes

    @NEEDS_INOTIFY
    def test_a_quiet_consumer_sleeps_longer_and_hears_every_write_to_the_log(self) -> None:
        recorder = Recorder()
        bell, waits = self.quiet_consumer(recorder, 0.3)
        insert, other = self.silent_writer(), self.other()
        for write in (insert, other.write, insert):
            self.assertTrue(bell.armed)
            begun = len(waits)
            self.assertWakes(recorder, write)
            self.wait_for(lambda: bell.armed and waits[-1] > 2.7, "the next long sleep")
        self.assertEqual(bell.missed, 0)
        self.assertLess(len(waits), 60)  # about 20 after each write
        at = waits.index(3.0, begun)  # after a pause, for what was being committed when it was armed
        self.assertEqual(waits[at - 3 : at - 1], [ARMING, 0.3])

    @NEEDS_INOTIFY
    def test_a_write_to_the_log_that_is_committed_later_is_found_then(self) -> None:
        recorder = Recorder()
        _, waits = self.quiet_consumer(recorder, 0.3)
        connection = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(connection.close)
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN IMMEDIATE")
        for number in range(200):  # more than fits in its cache: it is written to the log before the commit
            sql = "INSERT INTO messages (id, queue, body) VALUES (?, 'other', ?)"
            connection.execute(sql, (number + 1, "x" * 1000))
        self.wait_for(lambda: simplebroker.FIRST_POLL_S in waits, "the watcher to see that something is written")
        sql = "INSERT INTO messages (id, queue, body) VALUES (?, 'q', 'x')"
        connection.execute(sql, (time.time_ns(),))
        self.assertWakes(recorder, lambda _: connection.execute("COMMIT"))

    @NEEDS_INOTIFY
    def test_events_that_the_kernel_dropped_may_have_been_rings(self) -> None:
        source = simplebroker._Inotify()
        self.addCleanup(source.close)
        overflow = struct.pack("iIII", -1, 0x4000, 0, 0)
        self.assertFalse(source.arm(str(self.dir / "not there")))
        with mock.patch("os.read", return_value=overflow):
            self.assertEqual(source.drain(), (True, True, False))

    @NEEDS_INOTIFY
    def test_a_quiet_consumer_notices_that_the_files_are_deleted(self) -> None:
        recorder = Recorder()
        bell, waits = self.quiet_consumer(recorder, 0.3)
        self.broker(settings=Settings(sync_mode="OFF", cache_mb=13)).delete_database()
        self.assertWakes(recorder, self.queue(settings=Settings(sync_mode="OFF", cache_mb=14)).write)
        self.wait_for(lambda: bell.armed and waits[-1] > 2.7, "the next long sleep")
        for suffix in ("", "-wal", "-shm"):
            os.unlink(f"{self.path}{suffix}")
        os.unlink(f"{self.path}.lock")
        self.assertWakes(recorder, self.queue(settings=Settings(sync_mode="OFF", cache_mb=15)).write)

    @NEEDS_INOTIFY
    def test_a_consumer_of_a_database_that_is_not_there_sleeps_longer_too(self) -> None:
        for directory in ("", "a/b/c"):  # which there is not either: it looks as often as before
            path = self.dir / directory / "new.db"
            with self.subTest(path):
                recorder = Recorder()
                broker = Broker(path, settings=Settings(sync_mode="OFF", max_interval_s=0.3))
                self.addCleanup(broker.close)
                watcher = self.start(recorder, db=broker)
                bell, waits = self.noting(broker)
                if directory:
                    self.wait_for(lambda waits=waits: waits.count(0.3) > 3, "some looks")  # type: ignore[misc]
                    path.parent.mkdir(parents=True, exist_ok=True)
                self.wait_for(lambda waits=waits: waits[-1] > 2.7, "a long sleep")  # type: ignore[misc]
                with Queue("q", path, settings=Settings(sync_mode="OFF", cache_mb=16)) as queue:
                    self.assertWakes(recorder, queue.write)
                self.assertEqual(bell.missed, 0)
                watcher.stop(DEADLINE_S)

    @NEEDS_INOTIFY
    def test_where_writes_to_the_log_are_not_reported_it_looks_in_every_interval(self) -> None:
        recorder = Recorder()
        bell, waits = self.quiet_consumer(recorder, 0.05)
        insert = self.silent_writer()
        with mock.patch.object(simplebroker._Inotify, "arm", lambda self, path: True):
            self.assertWakes(recorder, insert)  # reported: it was armed before
            for misses in range(1, simplebroker.MISSES + 1):
                self.wait_for(lambda: waits[-1] > 0.4, "a long sleep")
                self.assertWakes(recorder, insert)  # after up to half a second
                self.wait_for(lambda misses=misses: bell.missed == misses, "the miss to be counted")  # type: ignore[misc]
            begun = len(waits)
            self.wait_for(lambda: len(waits) > begun + 5, "some looks")
            self.assertWakes(recorder, insert)
            self.assertLess(max(waits[begun:]), 0.1)

        def reported() -> bool:
            self.assertWakes(recorder, insert)
            return not bell.missed

        self.wait_for(reported, "a commit that is reported")
        self.wait_for(lambda: waits[-1] > 0.4, "a long sleep")

    @NEEDS_INOTIFY
    def test_a_commit_that_is_seen_before_it_is_reported_is_no_miss(self) -> None:
        bell = simplebroker._Doorbell(str(self.path))
        self.addCleanup(bell.close)
        self.queue().write("0")
        bell.attach()
        bell.arm()
        self.silent_writer()("x")
        bell.doubt()
        self.assertEqual((bell.armed, bell.missed), (False, 0))
        bell.arm()
        bell.doubt()
        self.assertEqual((bell.armed, bell.missed), (True, 1))

    def test_a_custom_runner_is_asked_once_in_an_interval_when_idle(self) -> None:
        recorder, runner = Recorder(), WatchPlainRunner(self.path)
        self.addCleanup(runner.close)
        queue = Queue("q", runner=runner)
        watcher = self.start(recorder, db=Broker(runner=runner))
        queue.write("x")
        self.assertTrue(recorder.reached(1))
        self.assertEmpties(queue)
        before = runner.statements
        self.assertIsNone(queue.read(wait=0.5, message_id=1))
        self.assertLess(runner.statements - before, 100)  # 5 intervals
        self.assertWakes(recorder, queue.write)
        self.assertWakes(recorder, Queue("q", runner=WatchPlainRunner(self.path)).write)
        watcher.stop(DEADLINE_S)

    def test_an_error_of_a_custom_runner_does_not_end_the_waiting(self) -> None:
        recorder, runner = Recorder(), WatchPlainRunner(self.path)
        self.addCleanup(runner.close)
        queue = Queue("q", runner=runner)
        self.start(recorder, db=queue.broker)
        self.assertWakes(recorder, queue.write)
        with self.assertLogs("simplebroker", "WARNING"):
            for error in (OperationalError("busy"), sqlite3.OperationalError("database is locked")):
                runner.failures.append(error)
                self.wait_for(lambda: not runner.failures, "the failures to happen")
                self.assertWakes(recorder, queue.write)

    def test_a_custom_runner_for_one_thread_only_still_ends_its_waits(self) -> None:
        runner = WatchPlainRunner(self.path, check_same_thread=True)
        self.addCleanup(runner.close)
        queue, errors = Queue("q", runner=runner), []
        with mock.patch("threading.excepthook", lambda info: errors.append(info.exc_value)):
            self.assertIsNone(queue.read(wait=0.1))
        self.assertEqual(errors, [])
        queue.write("x")
        self.assertEqual(queue.read(wait=50), "x")

    @NEEDS_BELL
    @unittest.skipUnless(sys.platform == "linux", "counts inotify instances")
    def test_a_hundred_watchers_share_one_notification_source(self) -> None:
        broker, names = self.broker(settings=BELL_ONLY), [f"q{number}" for number in range(100)]
        recorder = Recorder()
        before = descriptors()
        for name in names:
            broker.queue(name).write("start")
        for name in names:
            self.start(recorder, name, db=broker)
        self.assertTrue(recorder.reached(100))
        self.wait_for(lambda: not broker.queues(), "everything to be acknowledged")
        added = [sum("inotify" in name for name in names) for names in (before, descriptors())]
        self.assertEqual(added[1] - added[0], 1)
        started = time.monotonic()
        with broker.transaction():  # as a broadcast does
            for name in names:
                broker.queue(name).write("burst")
        self.assertTrue(recorder.reached(200))
        self.assertSoon(started)
        self.wait_for(lambda: not broker.queues(), "everything to be acknowledged")
        used = time.process_time()
        broker.wait_for_change(0.5)
        self.assertLess(time.process_time() - used, 0.1)

    @unittest.skipUnless(HAS_FORK, "needs fork")
    def test_a_forked_child_can_watch_and_its_parent_goes_on(self) -> None:
        child = self.child(
            """
            def watch(name):
                watcher = QueueWatcher(name, lambda m, ts: print(f"{m} in {name}", flush=True), db=sys.argv[1])
                watcher.run_in_thread()
                return watcher
            of_parent = watch("parent")
            Queue("parent", sys.argv[1]).write("1")
            sys.stdin.readline()
            pid = os.fork()
            if not pid:
                watcher = watch("child")
                Queue("child", sys.argv[1]).write("2")
                sys.stdin.readline()
                Queue("parent", sys.argv[1]).write("3")
                sys.stdin.readline()
                watcher.stop()
                os._exit(len(threading.enumerate()) - 1)
            print("status", os.waitpid(pid, 0)[1], flush=True)
            of_parent.stop()
            """,
        )
        self.assertEqual(self.line(child), "1 in parent")
        self.tell(child)
        self.assertEqual(self.line(child), "2 in child")
        self.tell(child)
        self.assertEqual(self.line(child), "3 in parent")
        self.tell(child)
        self.assertEqual(self.line(child), "status 0")
        self.assertEqual(child.wait(DEADLINE_S), 0)

    def test_an_idle_watcher_of_another_process_wakes_fast_and_costs_nothing(self) -> None:
        child = self.child(
            """
            def handler(message, timestamp):
                now = time.monotonic_ns()
                print(time.process_time_ns() if message == "cpu" else now - int(message), flush=True)
            QueueWatcher("q", handler, db=sys.argv[1]).watch()
            """
        )
        queue, waits = self.queue(), []
        queue.write("cpu")
        used = int(self.line(child))
        self.assertIsNone(queue.read(wait=0.6, message_id=1))
        queue.write("cpu")
        self.assertLess(int(self.line(child)) - used, 0.1e9)  # in more than half a second
        for _ in range(50):
            queue.read(wait=random.uniform(0.001, 0.008), message_id=1)
            queue.write(str(time.monotonic_ns()))
            waits.append(int(self.line(child)))
        self.assertLess(statistics.median(waits), 20e6)  # as polling every 40 ms would be


class LeaseKeeperTest(ConsumerTest):
    def keeper(self, lease_s: float = 30, *, name: str = "q") -> LeaseKeeper:
        keeper = LeaseKeeper(self.queue(name), lease_s)
        keeper.__enter__()
        self.addCleanup(keeper.__exit__)
        return keeper

    def test_leases_are_renewed_while_a_loop_is_slow(self) -> None:
        queue, other = self.queue(), self.other()
        queue.write("slow")
        for message in queue.read_all(lease=0.15):
            self.assertIsNone(other.lease(wait=0.5))  # more than three leases long
            self.assertEqual((message, queue.stats().leased), ("slow", 1))
        self.assertEqual(queue.stats().total, 0)

    def test_what_was_not_settled_is_given_back_at_once_without_counting_an_attempt(self) -> None:
        queue, other = self.queue(), self.other()
        queue.write_many(["a", "b", "c"])
        with LeaseKeeper(queue) as keeper:
            batch = keeper.take(3)
            keeper.acknowledge(batch[0])
            self.assertIsNone(other.lease())
        again = [other.lease(), other.lease()]
        self.assertEqual([(m, m.attempt) for m in again if m is not None], [("b", 1), ("c", 1)])

    def test_leaving_a_loop_gives_the_rest_back(self) -> None:
        queue = self.queue()
        queue.write_many([str(number) for number in range(20)])
        for message in queue.read_all():
            if message == "9":
                break
        del message
        gc.collect()  # PyPy does not notice at once that the iterator is not wanted any more
        self.wait_for(lambda: queue.stats().leased == 0, "the rest to be given back")
        self.assertBodies(queue, [str(number) for number in range(9, 20)])

    def test_nothing_is_renewed_after_it_was_settled(self) -> None:
        keeper, queue = self.keeper(), self.queue()
        queue.write_many(["a", "b"])
        released, kept = keeper.take(2)
        keeper.settle(released)
        queue.release(released)
        keeper.run()
        self.assertBodies(queue, ["a"])
        keeper.settle(kept)
        queue.extend(kept, 0.01)
        keeper.run()
        self.assertEqual(queue.read(after=released.id, wait=5), "b")

    def test_a_renewal_that_fails_is_tried_again_soon_and_logged_when_it_goes_on_failing(self) -> None:
        again = threading.Event()

        class Failing(simplebroker.Chore):
            runs = 0

            def run(self) -> None:
                self.runs += 1
                if self.runs == 3:
                    again.set()
                raise OperationalError(f"failure {self.runs}")

        attendant = simplebroker.Attendant(0.05)
        for period_s, fails in ((1000.0, False), (0.06, True)):
            again.clear()
            chore = Failing()
            chore.period_s, chore.next_at = period_s, time.monotonic()
            log = self.assertLogs("simplebroker", "WARNING") if fails else contextlib.nullcontext()
            with log as caught:
                attendant.add(chore)
                self.assertTrue(again.wait(SOON_S))
                attendant.remove(chore)
            if caught is not None:
                self.assertRegex(caught.output[0], "renewing leases fails, trying again: failure [2-9]")
        attendant.close()

    def test_forgotten_leases_end_by_themselves(self) -> None:
        keeper, queue = self.keeper(0.1), self.queue()
        queue.write("a")
        keeper.take()
        keeper.forget()
        message = queue.lease(wait=10)
        self.assertEqual(message and message.attempt, 2)

    def test_a_lost_lease_is_logged_and_the_others_are_acknowledged(self) -> None:
        keeper, queue = self.keeper(), self.queue()
        queue.write_many(["a", "b"])
        batch = keeper.take(2)
        queue.extend(batch[0], 0)
        self.assertEqual(self.other().read(), "a")
        with self.assertLogs("simplebroker", "WARNING"):
            keeper.acknowledge(*batch)
        self.assertEqual(queue.stats().total, 0)

    def test_batches_grow_while_they_are_worked_on_fast(self) -> None:
        keeper = self.keeper()
        self.queue().write_many(["x"] * 200)
        sizes = []
        for _ in range(5):
            sizes.append(len(keeper.take()))
        self.assertEqual(sizes[0], 1)
        self.assertGreaterEqual(max(sizes), 4)

    def test_batches_stay_small_while_they_are_worked_on_slowly_or_are_heavy(self) -> None:
        keeper, queue = self.keeper(), self.queue()
        queue.write_many(["x"] * 50)
        for _ in range(4):
            keeper.take()
        sizes = []
        for _ in range(4):
            queue.read(wait=0.11, message_id=1)
            sizes.append(len(keeper.take()))
        self.assertEqual(sizes[-1], 1)
        heavy = self.keeper(name="heavy")
        self.queue("heavy").write_many(["x" * 600_000] * 8)
        self.assertLessEqual(max(len(heavy.take()) for _ in range(5)), 2)

    def test_a_message_leased_before_is_leased_alone(self) -> None:
        queue, keeper = self.queue(), self.keeper()
        queue.write_many(["a", "suspect", "b", "c"])
        first = queue.lease(message_id=queue.peek_many(2)[1].id)
        assert first is not None
        queue.release(first)
        self.assertEqual([keeper.take(10), keeper.take(10), keeper.take(10)], [["a"], ["suspect"], ["b", "c"]])

    def test_a_keeper_needs_a_lease_that_lasts(self) -> None:
        for lease in (0, -1, math.nan, math.inf):
            with self.subTest(lease=lease), self.assertRaises(ValueError):
                LeaseKeeper(self.queue(), lease)

    @unittest.skipUnless(HAS_FORK, "needs fork")
    def test_a_forked_child_that_ends_leaves_the_leases_to_its_parent(self) -> None:
        child = self.child(
            """
            queue = Queue("q", sys.argv[1])
            queue.write_many(["a", "b"])
            for message in queue.read_all():
                if not os.fork():
                    sys.exit()  # the child unwinds out of the loop
                os.wait()
                stats = queue.stats()
                print(message, message.attempt, stats.ready, stats.leased, flush=True)
            """
        )
        self.assertEqual([self.line(child), self.line(child)], ["a 1 1 1", "b 1 0 1"])
        self.assertEqual(child.wait(DEADLINE_S), 0)


class QueueWatcherTest(ConsumerTest):
    def failed(self, *verdicts: Any) -> mock.Mock:
        """An error handler that decides these, one after the other."""
        return mock.Mock(side_effect=verdicts)

    # -- the ways to take messages

    def test_a_message_is_acknowledged_after_its_handler_returned(self) -> None:
        queue, seen, handled = self.queue(), [], threading.Event()
        queue.write("x")

        def handler(message: Message, timestamp: int) -> None:
            seen.append((message, timestamp == message.id, message.attempt, queue.stats()))
            handled.set()

        self.start(handler)
        self.assertTrue(handled.wait(DEADLINE_S))
        self.assertEqual(seen, [("x", True, 1, (0, 1, 0))])
        self.assertEmpties(queue)

    def test_a_backlog_and_what_comes_is_handled_in_order(self) -> None:
        queue, recorder = self.queue(), Recorder()
        queue.write_many(["1", "2", "3"])
        self.start(recorder)
        self.assertTrue(recorder.reached(3))
        queue.write("4")
        self.assertHandled(recorder, ["1", "2", "3", "4"])

    def test_without_a_lease_a_message_is_removed_before_its_handler_is_called(self) -> None:
        queue, totals = self.queue(), []
        queue.write_many(["a", "b"])
        error_handler = self.failed(None, None)

        def handler(message: Message, timestamp: int) -> None:
            totals.append((str(message), queue.stats().total))
            raise ValueError(message)

        self.start(handler, lease=None, error_handler=error_handler)
        self.wait_for(lambda: error_handler.call_count == 2)
        self.assertEqual(totals, [("a", 1), ("b", 0)])
        self.assertIsNone(queue.read(wait=0.05))  # a failed one is gone

    def test_a_queue_object_stays_the_callers(self) -> None:
        queue, recorder = self.queue(), Recorder()
        queue.write("x")
        watcher = QueueWatcher(queue, recorder)
        watcher.run_in_thread()
        self.assertHandled(recorder, ["x"])
        watcher.stop(DEADLINE_S)
        queue.write("still open")
        with self.assertRaises(ValueError):
            QueueWatcher(queue, recorder, db=self.path)

    def test_what_makes_no_sense_is_refused(self) -> None:
        wrong: list[tuple[type[Exception], dict[str, Any]]] = [
            (TypeError, {"handler": "print"}), (ValueError, {"max_attempts": 0}), (ValueError, {"batch_size": 0}),
            (ValueError, {"backoff": -1}), (ValueError, {"lease": 0}), (ValueError, {"lease": math.nan}),
            (ValueError, {"after": "yesterday"}), (ValueError, {"dead_letter": "no spaces"}),
        ]  # fmt: skip
        for error, options in wrong:
            with self.subTest(options), self.assertRaises(error):
                QueueWatcher(**{"queue": "q", "handler": print, "db": self.path, **options})

    def test_a_lower_bound_is_kept_in_every_mode(self) -> None:
        for mode in ({}, {"lease": None}, {"peek": True}):
            with self.subTest(mode):
                queue, recorder = self.queue(f"q{len(mode)}{mode.get('peek', '')}"), Recorder()
                bound = queue.write_many(["old", "bound"])[1]
                queue.write("new")
                watcher = self.start(recorder, queue.name, after=bound, **mode)
                self.assertHandled(recorder, ["new"])
                queue.write("newer")
                self.assertHandled(recorder, ["new", "newer"])
                watcher.stop(DEADLINE_S)
                self.assertBodies(queue, ["old", "bound", "new", "newer"] if mode.get("peek") else ["old", "bound"])

    # -- peek

    def test_peek_sees_every_message_once_in_order_while_others_move_and_delete(self) -> None:
        queue, other, count = self.queue(), self.other(), 300
        seen, done = [], threading.Event()

        def handler(message: Message, timestamp: int) -> None:
            seen.append(int(message))
            if int(message) % 3 == 0:
                queue.delete(message_id=timestamp)  # a handler may
            elif int(message) % 3 == 1:
                queue.move("elsewhere", message_id=timestamp)
            if int(message) == count - 1:
                done.set()

        self.start(handler, peek=True)

        def disturb() -> None:
            while not done.is_set():
                for message in queue.peek_many(2):
                    if int(message) in seen:  # seen ones only: what is removed unseen cannot be seen
                        other.delete(message_id=message.id)

        thread = threading.Thread(target=disturb)
        thread.start()
        self.addCleanup(thread.join, DEADLINE_S)
        self.addCleanup(done.set)
        for number in range(count):
            queue.write(str(number))
        self.assertTrue(done.wait(DEADLINE_S))
        self.assertEqual(seen, list(range(count)))

    def test_peek_removes_nothing_and_repeats_nothing(self) -> None:
        queue, recorder = self.queue(), Recorder()
        queue.write_many(["a", "b"])
        self.start(recorder, peek=True)
        self.assertTrue(recorder.reached(2))
        queue.write("c")
        self.assertHandled(recorder, ["a", "b", "c"])
        self.assertEqual(queue.count(), 3)

    def test_a_message_whose_handler_fails_in_peek_is_tried_again_and_not_skipped(self) -> None:
        queue, recorder = self.queue(), Recorder(ValueError("1"), ValueError("2"))
        queue.write_many(["a", "b"])
        error_handler = self.failed(None, None)
        watcher = self.start(recorder, peek=True, backoff=0.01, error_handler=error_handler)
        self.assertHandled(recorder, ["a", "a", "a", "b"])
        watcher.stop(DEADLINE_S)
        self.assertEqual(watcher.position, queue.peek_many(2)[1].id)

    def test_a_message_that_always_fails_in_peek_is_passed_in_the_end(self) -> None:
        queue, recorder = self.queue(), Recorder(*[ValueError()] * 3)
        queue.write_many(["bad", "good"])
        self.start(recorder, peek=True, max_attempts=3, backoff=0.01, error_handler=self.failed(None, None, None))
        self.assertHandled(recorder, ["bad", "bad", "bad", "good"])
        self.assertBodies(queue, ["bad", "good"])

    def test_a_watcher_that_stops_at_a_failure_in_peek_has_not_passed_it(self) -> None:
        queue, recorder = self.queue(), Recorder(ValueError())
        bound = queue.write_many(["bad", "good"])[0] - 1
        watcher = self.watcher(recorder, peek=True, after=bound, error_handler=self.failed(False))
        watcher.run_in_thread().join(DEADLINE_S)
        self.assertEqual((recorder.bodies, watcher.position), (["bad"], bound))

    # -- failures

    def test_an_error_handler_that_returns_true_settles_the_message(self) -> None:
        queue, recorder, error = self.queue(), Recorder(ValueError("x")), []
        queue.write("a")
        self.start(recorder, error_handler=lambda *args: error.append(args) or True)
        self.assertEmpties(queue)
        self.assertEqual(recorder.bodies, ["a"])
        self.assertEqual([(type(e), m, t == m.id) for e, m, t in error], [(ValueError, "a", True)])

    def test_an_error_handler_that_returns_none_has_the_message_tried_again(self) -> None:
        queue, recorder = self.queue(), Recorder(ValueError())
        queue.write_many(["a", "b"])
        self.start(recorder, backoff=0.05, error_handler=self.failed(None), batch_size=2)
        self.assertHandled(recorder, ["a", "b", "a"])
        self.assertEqual([message.attempt for message, _ in recorder.calls], [1, 1, 2])
        self.assertEmpties(queue)

    def test_an_error_handler_that_returns_false_stops_the_watcher(self) -> None:
        queue, recorder = self.queue(), Recorder(ValueError())
        queue.write_many(["a", "b"])
        watcher = self.watcher(recorder, error_handler=self.failed(False), batch_size=2)
        watcher.run_in_thread().join(DEADLINE_S)
        self.assertEqual(recorder.bodies, ["a"])
        self.assertBodies(queue, ["a", "b"])

    def test_an_error_handler_that_raises_decides_nothing_and_is_logged(self) -> None:
        queue, recorder = self.queue(), Recorder(ValueError("first"))
        queue.write("a")
        with self.assertLogs("simplebroker", "ERROR") as logs:
            self.start(recorder, backoff=0, error_handler=self.failed(RuntimeError("second")))
            self.assertHandled(recorder, ["a", "a"])
        self.assertIn("second", logs.output[0])
        self.assertIn("first", logs.output[0])  # in the traceback
        self.assertEmpties(queue)

    def test_the_default_error_handler_logs_and_gives_back(self) -> None:
        queue, recorder = self.queue(), Recorder(ValueError("why it failed"))
        queue.write("a")
        with self.assertLogs("simplebroker", "ERROR") as logs:
            self.start(recorder, backoff=0)
            self.assertHandled(recorder, ["a", "a"])
        self.assertIn("why it failed", logs.output[0])

    def test_a_type_error_of_the_handler_is_an_error_like_any_other(self) -> None:
        queue, recorder = self.queue(), Recorder(TypeError("handler() takes 1 argument"))
        queue.write("a")
        error_handler = self.failed(True)
        self.start(recorder, error_handler=error_handler)
        self.assertEmpties(queue)
        self.assertEqual((recorder.bodies, error_handler.call_count), (["a"], 1))

    def test_the_delay_between_attempts_doubles(self) -> None:
        queue, recorder = self.queue(), Recorder(*[ValueError()] * 3)
        queue.write("a")
        self.start(recorder, backoff=0.05, error_handler=self.failed(None, None, None))
        self.assertHandled(recorder, ["a"] * 4)
        times = [moment for _, moment in recorder.calls]
        for pause, (earlier, later) in zip((0.05, 0.1, 0.2), zip(times, times[1:])):
            self.assertGreaterEqual(later - earlier, pause - 0.001)
            self.assertLess(later - earlier, pause + SOON_S)

    def test_others_are_handled_while_a_failed_one_waits(self) -> None:
        queue, recorder = self.queue(), Recorder(ValueError())
        queue.write_many(["a", "b", "c"])
        self.start(recorder, backoff=50, error_handler=self.failed(None))
        self.assertHandled(recorder, ["a", "b", "c"])
        self.wait_for(lambda: queue.stats() == (0, 1, 0), "a to be held")

    def test_a_message_whose_attempts_are_used_up_is_dead_lettered(self) -> None:
        body = "the bytes \u00e4 \n\0 of it"
        for name, attempts, options in (
            ("q.dead", 3, {"backoff": 0}),
            ("bin", 1, {"backoff": 50, "dead_letter": "bin"}),  # without a delay after the last
        ):
            queue, recorder = self.queue(), Recorder(*[ValueError()] * attempts)
            queue.write(body)
            with self.assertLogs("simplebroker", "WARNING"):
                error_handler = self.failed(*[None] * attempts)
                watcher = self.start(recorder, max_attempts=attempts, error_handler=error_handler, **options)
                self.assertEmpties(queue)
            watcher.stop(DEADLINE_S)
            self.assertEqual([message.attempt for message, _ in recorder.calls], list(range(1, attempts + 1)))
            dead = self.queue(name).lease()
            self.assertEqual((dead, dead and dead.attempt), (body, 1))

    @unittest.skipUnless(HAS_FORK, "needs fork")
    def test_a_message_that_kills_its_consumers_ends_in_the_dead_letter_queue(self) -> None:
        nursery = Nursery(
            self,
            """
            def watch(path):
                def handler(message, timestamp):
                    if message == "poison":
                        os._exit(9)
                    if message == "last":
                        watcher.request_stop()
                watcher = QueueWatcher("q", handler, db=path, lease=0.1, max_attempts=5)
                watcher.watch()
            """,
        )
        queue, dead = self.queue(), self.queue("q.dead")
        queue.write_many(["innocent", "poison", "innocent", "innocent"])
        for _ in range(5):
            self.assertEqual(nursery.wait(nursery.fork(f"watch({str(self.path)!r})")), 9)
        survivor = nursery.fork(f"watch({str(self.path)!r})")
        self.assertEqual(dead.lease(wait=DEADLINE_S), "poison")
        self.assertEmpties(queue)
        queue.write("last")
        self.assertEqual(nursery.wait(survivor), 0)
        self.assertEqual(dead.stats().total, 1)

    def test_leaving_by_an_exit_in_the_handler_gives_the_message_back(self) -> None:
        queue = self.queue()
        queue.write_many(["a", "b"])
        with self.assertRaises(SystemExit):
            self.watcher(Recorder(SystemExit()), batch_size=2).watch()
        message = queue.lease()
        self.assertEqual((message, message and message.attempt, queue.count()), ("a", 1, 1))

    # -- leases

    def test_a_handler_slower_than_its_lease_is_called_once_in_one_place(self) -> None:
        queue, calls, done = self.queue(), [], threading.Event()

        def handler(message: Message, timestamp: int) -> None:
            calls.append((str(message), message.attempt))
            if message == "slow":
                done.wait(0.75)  # three times the lease
                done.set()

        watchers = [self.start(handler, lease=0.25), self.start(handler, db=self.other().broker, lease=0.25)]
        queue.write("slow")
        self.assertTrue(done.wait(DEADLINE_S))
        self.assertEmpties(queue)
        for watcher in watchers:
            watcher.stop(DEADLINE_S)
        self.assertEqual(calls, [("slow", 1)])

    def test_the_rest_of_a_batch_is_kept_alive_too(self) -> None:
        queue, calls, done = self.queue(), Recorder(), threading.Event()
        queue.write_many(["slow", "b", "c"])

        def handler(message: Message, timestamp: int) -> None:
            calls(message, timestamp)
            if message == "slow":
                done.wait(0.6)

        self.start(handler, lease=0.2, batch_size=3)
        self.assertTrue(calls.reached(1))
        self.assertIsNone(self.other().lease(wait=0.45))
        self.assertHandled(calls, ["slow", "b", "c"])
        self.assertEqual([message.attempt for message, _ in calls.calls], [1, 1, 1])

    def test_a_lease_that_was_lost_is_logged_and_the_watcher_goes_on(self) -> None:
        queue, recorder = self.queue(), Recorder()

        def handler(message: Message, timestamp: int) -> None:
            if message == "taken":
                queue.move("elsewhere", message_id=timestamp) or queue.delete(message_id=timestamp)
            recorder(message, timestamp)

        with self.assertLogs("simplebroker", "WARNING"):
            self.start(handler)
            queue.write_many(["taken", "b"])
            self.assertHandled(recorder, ["taken", "b"])
            self.assertEmpties(queue)

    # -- stop

    def idle(self, **options: Any) -> QueueWatcher:
        """A watcher that has handled its first message, and sleeps."""
        queue, recorder = self.queue(), Recorder()
        queue.write("first")
        watcher = self.start(recorder, **options)
        self.assertTrue(recorder.reached(1))
        if not options.get("peek"):
            self.assertEmpties(queue)
        return watcher

    def assertStops(self, watcher: QueueWatcher, limit: float = 1.0) -> None:
        started = time.monotonic()
        watcher.run_in_thread().join(DEADLINE_S)
        self.assertFalse(watcher.run_in_thread().is_alive())
        self.assertSoon(started, limit)

    def test_an_idle_watcher_is_stopped_at_once_by_another_thread(self) -> None:
        for options in ({}, {"lease": None}, {"peek": True}):
            with self.subTest(options):
                watcher = self.idle(**options)
                started = time.monotonic()
                watcher.stop()
                self.assertSoon(started, 1.0)
                self.assertStops(watcher)

    def test_an_idle_watcher_is_stopped_by_its_event(self) -> None:
        event = threading.Event()
        watcher = self.idle(stop_event=event)
        event.set()
        self.assertStops(watcher)

    def test_looking_at_the_event_is_not_looking_at_the_database(self) -> None:
        looks: list[bool] = []

        class Event(threading.Event):
            def is_set(self) -> bool:
                looks.append(True)
                return super().is_set()

        watcher = self.idle(stop_event=Event())
        with mock.patch.object(watcher, "_step", return_value=False) as step:
            enough = len(looks) + 8
            self.wait_for(lambda: len(looks) > enough, "looks at the event")
        self.assertLess(step.call_count, 3)  # one may have been under way
        watcher.stop()
        self.assertStops(watcher)

    def test_a_watcher_in_its_pause_between_attempts_is_stopped_at_once(self) -> None:
        event = threading.Event()
        for options in ({}, {"stop_event": event}):
            recorder, queue = Recorder(ValueError()), self.queue("peeked")
            queue.write("x")
            watcher = self.start(recorder, "peeked", peek=True, backoff=50, error_handler=self.failed(None), **options)
            self.assertTrue(recorder.reached(1))
            event.set() if options else watcher.request_stop()
            self.assertStops(watcher)

    def test_leaving_the_with_block_stops_it(self) -> None:
        queue, recorder = self.queue(), Recorder()
        queue.write("x")
        with self.watcher(recorder) as watcher:
            self.assertTrue(recorder.reached(1))
            thread = watcher.run_in_thread()
        self.assertFalse(thread.is_alive())

    def test_a_handler_may_stop_its_watcher(self) -> None:
        queue = self.queue()
        queue.write_many(["a", "b", "c"])
        for stop in ("stop", "request_stop"):
            watcher = self.watcher(lambda message, timestamp: getattr(watcher, stop)(), batch_size=3)  # noqa: B023
            watcher.run_in_thread().join(DEADLINE_S)
            self.assertStops(watcher)
        self.assertBodies(queue, ["c"])

    def test_a_busy_watcher_ends_after_the_current_message_and_gives_the_rest_back(self) -> None:
        queue, recorder, go = self.queue(), Recorder(), threading.Event()
        queue.write_many(["a", "b", "c"])

        def handler(message: Message, timestamp: int) -> None:
            recorder(message, timestamp)
            go.wait(DEADLINE_S)

        watcher = self.start(handler, batch_size=3)
        self.assertTrue(recorder.reached(1))
        self.assertEqual(queue.stats(), (0, 3, 0))
        watcher.request_stop()
        watcher.stop(0.05)  # does not wait longer than it is told
        self.assertTrue(watcher.run_in_thread().is_alive())
        go.set()
        self.assertStops(watcher)
        self.assertEqual(recorder.bodies, ["a"])
        rest = [self.other().lease(), self.other().lease()]
        self.assertEqual([(m, m.attempt) for m in rest if m is not None], [("b", 1), ("c", 1)])
        self.assertEqual(queue.stats().total, 2)

    @unittest.skipUnless(os.name == "posix", "needs signals")
    def test_a_signal_stops_a_watcher_of_the_main_thread(self) -> None:
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in previous:
            with self.subTest(number.name, state="idle"):
                queue, sent = self.queue(), []
                queue.write("first")

                def handler(message: Message, timestamp: int, number: int = number, sent: list[float] = sent) -> None:
                    def send() -> None:
                        self.wait_for(lambda: self.other().stats().total == 0)
                        sent.append(time.monotonic())
                        os.kill(os.getpid(), number)

                    threading.Thread(target=send).start()

                self.watcher(handler).watch()
                self.assertSoon(sent[0], 1.0)
            with self.subTest(number.name, state="busy"):
                queue.write_many(["a", "b"])
                recorder = Recorder()

                def busy(message: Message, timestamp: int, number: int = number, done: Recorder = recorder) -> None:
                    os.kill(os.getpid(), number)
                    done(message, timestamp)

                self.watcher(busy, batch_size=2).watch()
                self.assertEqual(recorder.bodies, ["a"])
                message = queue.read()
                self.assertEqual((message, message and message.attempt), ("b", 0))
        self.assertEqual({number: signal.getsignal(number) for number in previous}, previous)

    def test_nothing_is_left_after_a_stop(self) -> None:
        def run_one(number: int) -> None:
            recorder = Recorder()
            watcher = QueueWatcher("q", recorder, db=self.path)
            watcher.run_in_thread()
            with Queue("q", self.path) as queue:
                queue.write(str(number))
            self.assertHandled(recorder, [str(number)])
            watcher.stop()

        run_one(0)
        threads, before = threading.active_count(), descriptors() if os.path.isdir("/proc/self/fd") else []
        for number in range(50):
            run_one(number)
        self.assertEqual(threading.active_count(), threads)
        self.assertEqual(descriptors() if before else [], before)
        self.assertFalse(Path(f"{self.path}-wal").exists())  # the last connection was closed

    def test_watching_twice_at_once_is_an_error(self) -> None:
        watcher = self.idle()
        with self.assertRaises(RuntimeError):
            watcher.watch()
        self.assertIs(watcher.run_in_thread(), watcher.run_in_thread())
        watcher.stop(DEADLINE_S)

    # -- trouble with the database

    @NEEDS_LOCKS
    def test_a_database_that_is_busy_for_too_long_does_not_end_the_watcher(self) -> None:
        settings, recorder, queue = Settings(sync_mode="OFF", busy_timeout_ms=50), Recorder(), self.queue()
        queue.write("first")
        self.start(recorder, db=self.broker(settings=settings))
        self.assertTrue(recorder.reached(1))
        self.assertEmpties(queue)
        lock = WriterLock(self.path)
        lock.acquire(time.monotonic() + DEADLINE_S)
        with self.assertLogs("simplebroker", "WARNING") as logs:
            connection = sqlite3.connect(self.path, isolation_level=None)
            self.addCleanup(connection.close)
            connection.execute("INSERT INTO messages (id, queue, body) VALUES (?, 'q', 'second')", (time.time_ns(),))
            self.wait_for(lambda: logs.output, "the watcher to meet the lock")
        lock.close()
        self.assertHandled(recorder, ["first", "second"])

    def test_errors_of_the_disk_are_logged_and_the_watcher_goes_on(self) -> None:
        recorder, runner = Recorder(), WatchPlainRunner(self.path)
        self.addCleanup(runner.close)
        queue = Queue("q", runner=runner)
        self.start(recorder, db=queue.broker, lease=0.2)
        queue.write("first")
        self.assertTrue(recorder.reached(1))
        self.assertEmpties(queue)
        with self.assertLogs("simplebroker", "WARNING") as logs:
            runner.failures.append(OperationalError("disk I/O error"))
            self.wait_for(lambda: not runner.failures)
            queue.write("second")
            self.assertTrue(recorder.reached(2))
        self.assertIn("disk I/O error", "".join(logs.output))

    # -- the handlers that come with it, and speed

    def test_the_readme_way_works_as_it_is_written(self) -> None:
        child = self.child(
            """
            watcher = QueueWatcher(
                db=".broker.db",
                queue="myqueue",
                handler=lambda msg, ts: print(f"Got: {msg}")
            )
            watcher.run_in_thread()
            with Queue("myqueue") as q:
                q.write("Hello, World!")
            sys.stdin.readline()
            """,
            env={**self.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.assertEqual(self.line(child), "Got: Hello, World!")

    def test_the_handlers_print_and_log(self) -> None:
        message = Message('h\u00e9 "x"', 1837025672140161024, "q")
        for handler, expected in (
            (simple_print_handler, '[1837025672140161024] h\u00e9 "x"\n'),
            (json_print_handler, '{"message": "h\u00e9 \\"x\\"", "timestamp": "1837025672140161024"}\n'),
        ):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                handler(message, message.id)
            self.assertEqual(output.getvalue(), expected)
        with self.assertLogs("simplebroker", "INFO") as logs:
            logger_handler(message, message.id)
        self.assertEqual((logs.records[0].levelno, str(message) in logs.output[0]), (logging.INFO, True))
        with self.assertLogs("simplebroker", "ERROR") as logs:
            self.assertIsNone(default_error_handler(ValueError("why"), message, message.id))
        self.assertIn("why", logs.output[0])

    def test_a_backlog_is_consumed_nearly_as_fast_as_by_reading(self) -> None:
        queue, count, done = self.queue(), 5000, threading.Event()
        queue.write_many(["x"] * count)
        started = time.perf_counter()
        while queue.read() is not None:
            pass
        reading = time.perf_counter() - started
        queue.write_many(["x"] * count + ["last"])
        started = time.perf_counter()
        self.start(lambda message, timestamp: done.set() if message == "last" else None)
        self.assertTrue(done.wait(DEADLINE_S))
        self.assertGreater(reading / (time.perf_counter() - started), 0.4)


class QueueMoveWatcherTest(ConsumerTest):
    def start_moving(self, handler: Any = None, **options: Any) -> QueueMoveWatcher:
        watcher = QueueMoveWatcher("q", "done", handler, db=self.broker(settings=BELL_ONLY), **options)
        self.addCleanup(watcher.stop, DEADLINE_S)
        watcher.run_in_thread()
        return watcher

    def test_without_a_handler_it_moves_what_is_there_and_what_comes(self) -> None:
        queue, done = self.queue(), self.queue("done")
        ids = queue.write_many(["a", "b"])
        self.start_moving()
        self.wait_for(lambda: done.count() == 2)
        ids.append(queue.write("c"))
        self.wait_for(lambda: done.count() == 3)
        self.assertEqual([message.id for message in done.peek_all()], ids)

    def test_it_keeps_to_its_lower_bound(self) -> None:
        for handler in (None, Recorder()):
            queue, done = self.queue(), self.queue("done")
            queue.delete()
            bound = queue.write("old")
            queue.write("new")
            watcher = self.start_moving(handler, after=bound)
            self.assertEqual(done.read(wait=DEADLINE_S), "new")
            watcher.stop(DEADLINE_S)
            self.assertBodies(queue, ["old"])

    def test_a_message_moves_when_its_handler_returned(self) -> None:
        queue, done, recorder = self.queue(), self.queue("done"), Recorder()
        counts = []

        def handler(message: Message, timestamp: int) -> None:
            counts.append((done.count(), queue.stats().leased))
            recorder(message, timestamp)

        ids = queue.write_many(["a", "b"])
        self.start_moving(handler, batch_size=1)
        self.assertHandled(recorder, ["a", "b"])
        self.assertEqual(counts, [(0, 1), (1, 1)])
        self.wait_for(lambda: done.count() == 2)
        self.assertEqual([(message.id, message.attempt) for message in done.peek_all()], [(id, 0) for id in ids])

    def test_what_its_handler_fails_on_is_tried_again_and_then_dead_lettered(self) -> None:
        queue, done = self.queue(), self.queue("done")
        recorder = Recorder(*[ValueError()] * 3)
        queue.write_many(["bad", "good"])
        with self.assertLogs("simplebroker"):
            self.start_moving(recorder, max_attempts=3, backoff=0)
            self.wait_for(lambda: done.count() == 1)
            self.wait_for(lambda: self.queue("q.dead").count() == 1)
        self.assertBodies(done, ["good"])
        self.assertBodies(self.queue("q.dead"), ["bad"])

    def test_moving_to_the_same_queue_is_refused(self) -> None:
        with self.assertRaises(ValueError):
            QueueMoveWatcher("q", "q", db=self.path)


class Nursery:
    """A process that forks others quickly, each to evaluate an expression. All end with the test."""

    def __init__(self, test: ConsumerTest, definitions: str) -> None:
        code = textwrap.dedent(definitions) + textwrap.dedent(
            """
            import traceback
            print(os.getpid(), flush=True)
            for line in sys.stdin:
                command, argument = line.split(" ", 1)
                if command == "wait":
                    status = os.waitpid(int(argument), 0)[1]
                    print(os.WTERMSIG(status) and -os.WTERMSIG(status) or os.WEXITSTATUS(status), flush=True)
                    continue
                pid = os.fork()
                if not pid:
                    try:
                        eval(argument)
                        os._exit(0)
                    except BaseException:
                        traceback.print_exc()
                        os._exit(1)
                print(pid, flush=True)
            """
        )
        self._test, self._child = test, test.child(code, start_new_session=True)
        test.addCleanup(self._end, int(test.line(self._child)))

    def fork(self, expression: str) -> int:
        """Start a process; return its id."""
        self._test.tell(self._child, f"fork {expression}")
        return int(self._test.line(self._child))

    def wait(self, pid: int) -> int:
        """Wait for its end; return its exit status, or minus the signal."""
        self._test.tell(self._child, f"wait {pid}")
        return int(self._test.line(self._child))

    @staticmethod
    def _end(group: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


@unittest.skipUnless(HAS_FORK, "needs fork and signals")
class CrashTest(ConsumerTest):
    """Real processes that are killed, stopped and forked."""

    def report(self, name: str = "report") -> list[list[str]]:
        """What processes reported, line by line: a line for each thing that was done.

        Linux cuts the write of a killed process at the end of a page of the file. So who may be killed writes
        lines of a length of which a page is a multiple.
        """
        file = self.dir / name
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def assertSound(self) -> None:
        connection = sqlite3.connect(self.path)
        self.addCleanup(connection.close)
        self.assertEqual(connection.execute("PRAGMA integrity_check").fetchall(), [("ok",)])

    def pause(self, seconds: float) -> None:
        """Let the other processes work for a moment."""
        self.assertFalse(self.broker().queue("nobody-writes-here").read(wait=seconds))

    def test_kill_at_random_moments_loses_and_doubles_nothing(self) -> None:
        nursery = Nursery(
            self,
            """
            def work(path, name, report):
                fd = os.open(report, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                def say(*words):
                    os.write(fd, (" ".join(map(str, words)).ljust(127) + "\\n").encode())
                broker, count = Broker(path), 0
                queue, dest = broker.queue(f"in-{name}"), broker.queue(f"out-{name}")
                bodies = iter(lambda: f"{name}-{time.monotonic_ns()}-" + "x" * random.randrange(2000), None)
                while True:
                    body = next(bodies)
                    say("wrote", name, queue.write(body), body[:40])
                    group = [next(bodies) for _ in range(3)]
                    for id, body in zip(queue.write_many(group), group):
                        say("wrote", name, id, body[:40])
                    for message in queue.move_many(dest.name, 2):
                        say("moved", name, message.id)
                    message = queue.peek()
                    say("taking", name, message.id)
                    if queue.read(message_id=message.id):
                        say("took", name, message.id)
                    message = dest.lease(30)
                    say("taking", name, message.id)
                    dest.extend(message, 60)
                    dest.ack(message)
                    say("took", name, message.id)
                    message = queue.lease(30)
                    queue.release(message, delay=random.choice([None, 30]))
                    base, title = random.randrange(1, 2**50), next(bodies)[:40]
                    lines = ['{"type": "header", "format": "simplebroker-dump", "version": 1}']
                    line = '{"type": "message", "queue": "loaded", "body": "%s", "id": %d}'
                    broker.load(lines + [line % (title, base + number) for number in range(5)])
                    say("loaded", name, title)
            """,
        )
        rounds = 100 if FULL else 10  # two processes are killed in each
        for _ in range(rounds):
            pids = [nursery.fork(f"work({str(self.path)!r}, {name!r}, {str(self.dir / 'report')!r})") for name in "ab"]
            self.pause(random.uniform(0.01, 0.1))
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            self.assertEqual([nursery.wait(pid) for pid in pids], [-signal.SIGKILL] * 2)
        self.assertSound()
        rows = sqlite3.connect(self.path).execute("SELECT id, queue, substr(body, 1, 40) FROM messages").fetchall()
        place = {str(id): (queue, body) for id, queue, body in rows}
        report = self.report()
        self.assertGreater(len(report), rounds)
        written = {name: [words[2] for words in report if words[:2] == ["wrote", name]] for name in "ab"}
        for name, ids in written.items():
            self.assertEqual(ids, sorted(set(ids), key=int), name)  # ascending, none twice
        self.assertFalse(set(written["a"]) & set(written["b"]))
        taking = {words[2] for words in report if words[0] == "taking"}
        for words in report:
            if words[0] == "wrote":
                self.assertTrue(words[2] in taking or place[words[2]][1] == words[3], words)
            elif words[0] == "moved":
                self.assertTrue(words[2] in taking or place[words[2]][0].startswith("out-"), words)
            elif words[0] == "took":
                self.assertNotIn(words[2], place)
        bodies = [body for _, queue, body in rows if queue != "loaded"]
        self.assertEqual(len(bodies), len(set(bodies)))  # none is in two queues
        loaded = [body for _, queue, body in rows if queue == "loaded"]
        self.assertEqual({loaded.count(title) for title in loaded}, {5})  # whole or absent
        self.assertLessEqual({words[2] for words in report if words[0] == "loaded"}, set(loaded))

    def check_kills(self, start: Any, drain: Any) -> None:
        """Kill consumers while they work; whatever happens, each message is handled, none waits longer."""
        queue, count, kills = self.queue(), 0, (50 if FULL else 6)
        for _ in range(kills):
            while queue.stats().total < 40:  # the kill must not come after the last of them
                queue.write(str(count))
                count += 1
            before = len(self.report())
            kill, wait = start()
            self.wait_for(lambda before=before: len(self.report()) > before or not queue.stats().total)  # type: ignore[misc]
            self.pause(random.uniform(0, 0.03))
            kill()
            wait()
        self.assertGreater(queue.stats().total, 0, "the kills came too late to prove anything")
        started = time.monotonic()
        drain()
        self.assertSoon(started, 0.5 + 0.05 * count + SOON_S)  # the lease, and the work
        handled = [" ".join(words) for words in self.report()]
        self.assertEqual(set(handled), {str(number) for number in range(count)})  # and none only in part
        self.assertEqual(queue.broker.queues(), {})
        self.assertSound()

    def test_killed_watchers_lose_nothing_and_leave_nothing_stuck(self) -> None:
        nursery = Nursery(
            self,
            """
            def watch(path, report, drain):
                fd = os.open(report, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                def handler(message, timestamp):
                    time.sleep(0.004)
                    os.write(fd, f"{message:15}\\n".encode())
                watcher = QueueWatcher("q", handler, db=path, lease=0.5, max_attempts=1000)
                watcher.run_in_thread()
                while not drain or watcher.queue.stats().total:
                    time.sleep(0.01)
                watcher.stop()
            """,
        )

        def start(drain: bool = False) -> tuple[Any, Any]:
            pid = nursery.fork(f"watch({str(self.path)!r}, {str(self.dir / 'report')!r}, {drain})")
            return lambda: os.kill(pid, signal.SIGKILL), lambda: nursery.wait(pid)

        self.check_kills(start, lambda: self.assertEqual(start(drain=True)[1](), 0))

    def test_killed_workers_of_the_command_line_lose_nothing_and_leave_nothing_stuck(self) -> None:
        words = ["work", "q", "--lease", "0.5s", "--max-attempts", "1000", "-j", "2"]
        command = ["--", "sh", "-c", 'echo "$(cat)" >> report']

        def start() -> tuple[Any, Any]:
            full = [*PYTHON, "-m", "simplebroker", "-f", "test.db", *words, *command]
            worker = subprocess.Popen(full, cwd=self.dir, env=self.environ, stdin=subprocess.DEVNULL)
            self.addCleanup(self.reap, worker)
            return worker.kill, worker.wait

        self.check_kills(start, lambda: self.assertRan(self.cli(*words, "--drain", *command)))

    def test_a_stopped_consumer_loses_its_lease_and_cannot_acknowledge(self) -> None:
        child = self.child(
            """
            def handler(message, timestamp):
                print("handling", message, flush=True)
                sys.stdin.readline()
            watcher = QueueWatcher("q", handler, db=sys.argv[1], lease=0.3)
            watcher.watch()
            """,
            stderr=subprocess.PIPE,
        )
        queue = self.queue()
        queue.write("x")
        self.assertEqual(self.line(child), "handling x")
        os.kill(child.pid, signal.SIGSTOP)
        started = time.monotonic()
        message = queue.lease(60, wait=DEADLINE_S)
        self.assertSoon(started, 0.3 + SOON_S)
        self.assertEqual((message, message and message.attempt), ("x", 2))
        os.kill(child.pid, signal.SIGCONT)
        self.tell(child)
        assert child.stderr is not None and message is not None
        self.assertIn(b"attempt 2 has the message now", child.stderr.readline())
        queue.write("y")  # the watcher goes on
        self.assertEqual(self.line(child), "handling y")
        queue.ack(message)

    def test_a_stopped_writer_does_not_hang_others_and_a_killed_one_lets_them_in(self) -> None:
        child = self.child(
            """
            with Broker(sys.argv[1]).transaction():
                Queue("q", sys.argv[1]).write("never committed")
                print("inside", flush=True)
                sys.stdin.readline()
            """
        )
        self.assertEqual(self.line(child), "inside")
        os.kill(child.pid, signal.SIGSTOP)
        queue = self.queue(settings=Settings(sync_mode="OFF", busy_timeout_ms=200))
        for action in (lambda: queue.write("x"), queue.read, queue.lease, lambda: queue.move("dest")):
            started = time.monotonic()
            with self.assertRaises(OperationalError):
                action()
            self.assertSoon(started, 0.2 + 1.0)
        self.assertEqual((queue.peek(), queue.count(), queue.read(wait=0.1)), (None, 0, None))  # reading goes on
        patient = self.queue()
        results: list[int] = []
        thread = threading.Thread(target=lambda: results.append(patient.write("x")))
        thread.start()
        child.kill()
        started = time.monotonic()
        thread.join(DEADLINE_S)
        self.assertSoon(started)
        self.assertEqual([message.id for message in queue.peek_all()], results)

    def test_a_stopped_watcher_does_not_hinder_others(self) -> None:
        child = self.child(
            """
            QueueWatcher("q", lambda m, ts: print(m, flush=True), db=sys.argv[1]).watch()
            """
        )
        queue = self.queue()
        queue.write("first")
        self.assertEqual(self.line(child), "first")
        self.assertEmpties(queue)
        os.kill(child.pid, signal.SIGSTOP)
        for number in range(200):
            queue.write(str(number))
        self.assertEqual(len(queue.read_many(150)), 150)
        self.assertRan(self.cli("--vacuum"))
        os.kill(child.pid, signal.SIGCONT)
        self.assertEqual([self.line(child) for _ in range(50)], [str(number) for number in range(150, 200)])

    def test_eight_writers_and_then_eight_readers_see_each_message_once(self) -> None:
        nursery = Nursery(
            self,
            """
            def write(path, name, count):
                with Queue("q", path) as queue:
                    for number in range(count):
                        queue.write(f"{name}.{number}")
            def read(path, report):
                with Queue("q", path) as queue, open(report, "a") as file:
                    while (message := queue.read()) is not None:
                        print(message.id, message, file=file)
            """,
        )
        queue, count, report = self.queue(), (2000 if FULL else 60), self.dir / "report"

        def run(expression: str) -> None:
            lock = WriterLock(self.path)
            lock.acquire(time.monotonic() + DEADLINE_S)  # they all start, and wait behind it
            pids = [nursery.fork(expression.format(number)) for number in range(8)]
            lock.close()
            self.assertEqual([nursery.wait(pid) for pid in pids], [0] * 8)

        queue.write("the database exists")
        queue.read()
        run(f"write({str(self.path)!r}, {{}}, {count})")
        messages = {str(message): message.id for message in queue.peek_all()}
        for writer in range(8):
            ids = [messages[f"{writer}.{number}"] for number in range(count)]
            self.assertEqual(ids, sorted(ids))
        run(f"read({str(self.path)!r}, {str(report)!r} + '{{}}')")
        read = [words for reader in range(8) for words in self.report(f"report{reader}")]
        self.assertEqual(sorted(read), sorted([str(id), body] for body, id in messages.items()))

    def test_what_a_forked_child_writes_survives_the_end_of_its_parent(self) -> None:
        child = self.child(
            """
            queue = Queue("q", sys.argv[1])
            queue.write("1 by the parent")
            to_child, from_child = os.pipe(), os.pipe()
            if not os.fork():
                queue.write("2 by the child")
                os.write(from_child[1], b"x")
                os.read(to_child[0], 1)  # until the parent has closed its connection
                queue.write("3 by the child")
                print("written", flush=True)
                sys.stdin.readline()
                os._exit(0)
            os.read(from_child[0], 1)
            queue.close()
            os.write(to_child[1], b"x")
            os.wait()
            """
        )
        self.assertEqual(self.line(child), "written")
        expected = ["1 by the parent", "2 by the child", "3 by the child"]
        self.assertBodies(self.queue(), expected)
        self.tell(child)
        self.assertEqual(child.wait(DEADLINE_S), 0)
        self.assertBodies(self.queue(), expected)

    def test_a_fork_at_any_moment_with_threads_running_loses_nothing(self) -> None:
        forks = 500 if FULL else 40
        child = self.child(
            f"""
            path, stop = sys.argv[1], threading.Event()
            def hammer(name):
                queue = Queue(name, path)
                while not stop.is_set():
                    queue.write(name * 200)
                    queue.read(wait=1)
                    with queue.broker.transaction():
                        queue.write(name)
                        queue.read()
            threads = [threading.Thread(target=hammer, args=(name,)) for name in "abc"]
            watcher = QueueWatcher("w", lambda m, ts: None, db=path)
            threads.append(watcher.run_in_thread())
            for thread in threads[:3]:
                thread.start()
            statuses = []
            for number in range({forks}):
                pid = os.fork()
                if not pid:
                    try:
                        signal.alarm(20)
                        queue = Queue("children", path)
                        queue.write(f"{{number}}")
                        assert queue.peek() is not None
                        os._exit(0)
                    except BaseException as error:
                        print(repr(error), file=sys.stderr)
                        os._exit(1)
                statuses.append(os.waitpid(pid, 0)[1])
            stop.set()
            watcher.stop()
            for thread in threads:
                thread.join(20)
            print(sum(map(bool, statuses)), sum(thread.is_alive() for thread in threads), flush=True)
            """,
        )
        self.assertEqual(self.line(child), "0 0")
        self.assertBodies(self.queue("children"), [str(number) for number in range(forks)])
        self.assertEqual(list(self.broker().queues()), ["children"])
        self.assertSound()


@unittest.skipUnless(HAS_FORK, "needs fork")
class SoakTest(ForkTest):
    """Writers, readers, watchers and a vacuum on a deep queue, while one after the other is killed.

    TEST_SOAK_S=1200 is the long run: at a depth of 100,000, synced, with figures at the end.
    """

    SECONDS = float(os.environ.get("TEST_SOAK_S", "20" if FULL else "2"))
    DEPTH = 100_000 if SECONDS >= 60 else 2_000
    VACUUM_S = min(60.0, SECONDS / 4)
    KILL_S = 2.0 if SECONDS >= 60 else 0.2
    LEASE_S = 10.0 if SECONDS >= 60 else 3.0
    SETTINGS = Settings(sync_mode="FULL" if SECONDS >= 60 else "NORMAL")
    ROLES = ("writer",) * 4 + ("reader",) * 4 + ("watcher",) * 2

    def note(self, name: str) -> Callable[[str], None]:
        """Append lines to a file of its own, whole or not at all (see CrashTest.report)."""
        fd = os.open(self.dir / f"{name}.report", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        return lambda line: self.assertEqual(os.write(fd, f"{line:63}\n".encode()), 64) or None

    def write(self, name: str) -> None:
        note, queue = self.note(name), self.queue("load", settings=self.SETTINGS)
        for number in range(10**9):
            if number % 200 == 0:
                while queue.count() > self.DEPTH * 1.02:
                    time.sleep(0.05)
            body, begun = f"{name} {number} " + "x" * random.randrange(200), time.monotonic()
            queue.write(body)
            note(f"wrote {int(1000 * (time.monotonic() - begun))} {name} {number}")

    def read(self, name: str) -> None:
        note, queue = self.note(name), self.queue("load", settings=self.SETTINGS)
        while True:
            message = queue.lease(self.LEASE_S, wait=1)
            if message is not None:
                note("got 0 " + " ".join(message.split()[:2]))
                queue.ack(message)
            if random.random() < 0.01:
                for message in queue.read_all(lease=self.LEASE_S):
                    if random.random() < 0.01:
                        break  # which gives it back
                    note("got 0 " + " ".join(message.split()[:2]))

    def watch(self, name: str) -> None:
        note = self.note(name)
        broker = self.broker(settings=self.SETTINGS)
        handler = lambda message, timestamp: note("got 0 " + " ".join(message.split()[:2]))  # noqa: E731
        QueueWatcher("load", handler, db=broker, lease=self.LEASE_S, max_attempts=10**6).watch()

    def start(self, role: str, name: str) -> Child:
        work = {"writer": self.write, "reader": self.read, "watcher": self.watch}[role]
        return self.child(lambda child: work(name))

    def test_nothing_is_lost_and_nothing_doubled_but_by_a_kill(self) -> None:
        queue = self.queue("load", settings=self.SETTINGS)
        for start in range(0, self.DEPTH, 1000):
            queue.write_many([f"first {number} " + "x" * 100 for number in range(start, start + 1000)])
        running = {
            f"{role}{number}": (role, self.start(role, f"{role}{number}")) for number, role in enumerate(self.ROLES)
        }
        sizes, kills, killed_consumers, vacuums = [0, 0], 0, 0, 0
        ends = time.monotonic() + self.SECONDS
        kill_at, vacuum_at = time.monotonic() + self.KILL_S, time.monotonic() + self.VACUUM_S
        while time.monotonic() < ends:
            time.sleep(0.02)
            sizes = [max(size, os.path.getsize(f"{self.path}{end}")) for size, end in zip(sizes, ("", "-wal"))]
            if time.monotonic() >= vacuum_at:
                vacuum_at += self.VACUUM_S
                queue.broker.vacuum()
                vacuums += 1
            if time.monotonic() >= kill_at:
                kill_at += random.uniform(0, 2 * self.KILL_S)
                name = random.choice(list(running))
                role, child = running.pop(name)
                self.assertIsNone(child._status)
                child.signal(signal.SIGKILL)
                self.assertEqual(child.wait(), -signal.SIGKILL, name)
                kills, killed_consumers = kills + 1, killed_consumers + (role != "writer")
                running[f"{role}k{kills}"] = role, self.start(role, f"{role}k{kills}")
        for name, (role, child) in running.items():
            child.signal(signal.SIGKILL)
            self.assertEqual(child.wait(), -signal.SIGKILL, name)
            killed_consumers += role != "writer"
        self.wait_for(lambda: not queue.stats().leased, "the leases to end")
        rest = [" ".join(message.split()[:2]) for message in queue.read_all()]
        reports = [path.read_text().splitlines() for path in self.dir.glob("*.report")]
        lines = [line.rstrip().split(" ", 2) for report in reports for line in report]
        wrote = {line[2]: int(line[1]) for line in lines if line[0] == "wrote"}
        got = Counter([line[2] for line in lines if line[0] == "got"] + rest)
        doubled = sum(got.values()) - len(got)
        figures = (
            f"{self.SECONDS:g} s: {len(wrote):,} written, {len(got):,} consumed, {kills} kills, {doubled} doubled,"
            f" {vacuums} vacuums, worst write {max(wrote.values())} ms, file at most {sizes[0] >> 10:,} KiB,"
            f" log at most {sizes[1] >> 10:,} KiB"
        )
        if self.SECONDS >= 60:
            print(figures, file=sys.stderr)
        first = {f"first {number}" for number in range(self.DEPTH)}
        self.assertEqual(len((wrote.keys() | first) - got.keys()), 0, figures)
        self.assertLessEqual(doubled, killed_consumers, figures)  # each was handling one message
        self.assertGreater(len(wrote), 100, figures)
        self.assertLess(sizes[0], 1000 * self.DEPTH + (1 << 20), figures)
        if simplebroker.fcntl is not None:  # else no checkpoint finds a moment in which nobody reads and writes
            self.assertLess(sizes[1], 2 * sizes[0] + (16 << 20), figures)
        self.assertEqual(sqlite3.connect(self.path).execute("PRAGMA integrity_check").fetchone(), ("ok",))


# ---------------------------------------------------------------------------------------------------
# The command line.
# ---------------------------------------------------------------------------------------------------


POSIX = os.name == "posix"


Done = subprocess.CompletedProcess[bytes]


# DESIGN.md section 8 as data: the operands and the options of each command. Global options go with all.
COMMANDS = {
    "write": ("QUEUE TEXT", "-t --json --delay --lines"),
    "read": ("QUEUE", "--all --json -t -m --after --since --before --wait -n"),
    "peek": ("QUEUE", "--all --json -t -m --after --since --before --wait -n"),
    "move": ("QUEUE DEST", "--all -m --after --since --before -n --json -t"),
    "lease": ("QUEUE", "--for"),
    "ack": ("QUEUE LEASE", ""),
    "release": ("QUEUE LEASE", "--delay"),
    "extend": ("QUEUE LEASE", "--for"),
    "work": ("QUEUE", "-j --lease --max-attempts --dead-letter --backoff --drain"),
    "watch": ("QUEUE", "--peek --move --json -t --after --since"),
    "list": ("", "--stats --json --pattern"),
    "delete": ("QUEUE", "-m --all"),
    "broadcast": ("TEXT", "--pattern"),
    "dump": ("", "--pattern"),
    "load": ("", ""),
    "init": ("", ""),
}


GLOBAL_OPTIONS = "-d -f -q"


ACTIONS = ("--status", "--vacuum", "--cleanup", "--version")


RUN_LINES = '''
import io, json, os, signal, sys, time
import simplebroker

patience_s = 10.0
given = sys.stdin.buffer.read()
report = os.dup(1)
outputs = [os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600) for name in (".stdout", ".stderr")]
stdin = os.open(".stdin", os.O_RDWR | os.O_CREAT, 0o600)
os.dup2(stdin, 0)
for fd, output in enumerate(outputs, 1):
    os.dup2(output, fd)
for name in (".stdin", ".stdout", ".stderr"):
    os.unlink(name)


def run(argv):
    try:
        status = simplebroker.main(argv)
    except BaseException as error:
        status = repr(error)
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def run_apart(argv):
    """In a child of its own, which is told to end if it goes on for long."""
    pid = os.fork()
    if not pid:
        status = run(argv)
        os._exit(status if isinstance(status, int) else 70)
    tell_at = time.monotonic() + patience_s
    give_up_at = tell_at + 20
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > give_up_at:
            os.kill(pid, signal.SIGKILL)
        elif time.monotonic() > tell_at:
            os.kill(pid, signal.SIGTERM)
            tell_at += 0.1
        time.sleep(0.001)


def run_line(argv, input):
    """The status of main(), and what it printed on both streams."""
    os.ftruncate(0, 0)
    os.pwrite(0, input, 0)
    os.lseek(0, 0, os.SEEK_SET)
    sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False))
    may_block = {"watch", "work", "--wait"} & set(argv)
    status = run_apart(argv) if may_block else run(argv)
    printed = []
    for output in outputs:
        printed.append(os.pread(output, 1 << 24, 0))
        os.ftruncate(output, 0)
    return (status, *printed)
'''
RUN_GIVEN_LINES = """
for argv, input in json.loads(given):
    status, out, err = run_line(argv, input.encode("latin-1"))
    os.write(report, json.dumps([status, out.decode("latin-1"), err.decode("latin-1")]).encode() + b"\\n")
"""
# Tells on standard error that a method of simplebroker is called. It is for one that waits.
WAITING = """\
wait = {0}
def told(*args):
    print("waiting", file=sys.stderr, flush=True)
    return wait(*args)
{0} = told
"""


class CommandTest(BrokerTest):
    """The command in the background, several at once, in shells and on terminals."""

    def setUp(self) -> None:
        super().setUp()
        for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "PYTHONIOENCODING", "PYTHONUTF8"):
            self.environ.pop(name, None)
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background; children would inherit it
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.addCleanup(signal.signal, signal.SIGINT, signal.SIG_IGN)

    def cli(self, *args: str, input: bytes | None = b"", **options: Any) -> Done:
        """Run the command on test.db."""
        return self.bare("-f", "test.db", *args, input=input, **options)

    def cli_each(self, commands: Sequence[Sequence[str]], **options: Any) -> list[Done]:
        """Run independent commands, a few at a time; their results in order."""
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda args: self.cli(*args, **options), commands))

    def cli_lines(
        self, lines: Sequence[Sequence[str]], inputs: Sequence[bytes] = (), *, bare: bool = False
    ) -> list[Done]:
        """Run command lines one after the other in one process, which saves starting Python for each."""
        place = [] if bare else ["-f", "test.db"]
        texts = [input.decode("latin-1") for input in inputs] or [""] * len(lines)
        given = json.dumps([[[*place, *line], text] for line, text in zip(lines, texts)])
        args = [*PYTHON, "-c", RUN_LINES + RUN_GIVEN_LINES]
        options: Any = {"cwd": self.dir, "env": self.environ, "capture_output": True, "timeout": 2 * DEADLINE_S}
        done = subprocess.run(args, input=given.encode(), check=False, **options)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        ran = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertEqual(len(ran), len(lines))
        return [
            subprocess.CompletedProcess(list(line), status, out.encode("latin-1"), err.encode("latin-1"))
            for line, (status, out, err) in zip(lines, ran)
        ]

    def assertLines(self, *cases: tuple[Sequence[str], bytes, int]) -> None:
        """Command lines, run one after the other, with what each prints and its status."""
        for done, (_, printed, status) in zip(self.cli_lines([line for line, _, _ in cases]), cases):
            with self.subTest(command=done.args):
                self.assertRan(done, printed, status)

    def bare(self, *args: str, input: bytes | None = b"", **options: Any) -> Done:
        """Run the command without -f: the options, the environment and the directory say where."""
        command = [*PYTHON, "-m", "simplebroker", *args]
        options = {"cwd": self.dir, "env": self.environ, "capture_output": True, "timeout": DEADLINE_S, **options}
        return subprocess.run(command, input=input, check=False, **options)

    def start(self, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start the command on test.db; killed at the end."""
        pipe = subprocess.PIPE
        defaults = {"cwd": self.dir, "env": self.environ, "stdin": pipe, "stdout": pipe, "stderr": pipe}
        command = [*PYTHON, "-m", "simplebroker", "-f", "test.db", *args]
        child = subprocess.Popen(command, **{**defaults, **options})
        self.addCleanup(self.reap, child)
        return child

    def start_patched(self, patch: str, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start the command after some Python code that changes ``simplebroker``."""
        defaults = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        code = f"import sys, simplebroker\n{patch}\nsys.exit(simplebroker.main(sys.argv[1:]))"
        return self.python(code, "-f", "test.db", *args, **{**defaults, **options})

    def finish(self, child: subprocess.Popen[bytes], stdin: bytes | None = None) -> Done:
        """Wait for a started command and return what it printed since."""
        out, err = child.communicate(stdin, timeout=DEADLINE_S)
        return subprocess.CompletedProcess(child.args, child.returncode, out, err or b"")

    def shell(self, script: str) -> Done:
        """Run a shell script in which ``broker`` is the command on test.db."""
        broker = shlex.join([*PYTHON, "-m", "simplebroker", "-f", "test.db"])
        child = subprocess.Popen(
            ["sh", "-c", f'broker() {{ {broker} "$@"; }}\n{script}'], cwd=self.dir, env=self.environ,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            return self.finish(child)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            raise

    @contextmanager
    def pipe(self) -> Iterator[tuple[int, int]]:
        """Both ends of a pipe, closed at the end unless that was done before."""
        ends = os.pipe()
        try:
            yield ends
        finally:
            for end in ends:
                try:
                    os.close(end)
                except OSError:  # closed before
                    pass

    def read_until(self, fd: int, enough: Callable[[bytes], object], what: str, size: int = 65536) -> bytes:
        """Read a descriptor until what was read is enough, or the end."""
        import select

        data, deadline = b"", time.monotonic() + DEADLINE_S
        while not enough(data):
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.fail(f"waited {DEADLINE_S} s for {what}; there is {data[-200:]!r}")
            try:
                chunk = os.read(fd, size)
            except OSError:  # a terminal whose other end was closed
                chunk = b""
            if not chunk:
                break
            data += chunk
        return data

    def read_line(self, stream: Any) -> bytes:
        """One line from a started command's stdout or stderr; an empty one at the end."""
        return self.read_until(stream.fileno(), lambda data: data.endswith(b"\n"), "a line", size=1)

    def outlasts(self, child: subprocess.Popen[bytes], seconds: float) -> int | None:
        """The status of a process that is to go on for so long; None if it did."""
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def wait_for_total(self, queue: Queue, total: int) -> None:
        """Wait until the queue has so many messages, held ones included."""
        self.wait_for(lambda: queue.stats().total == total, f"{total} messages")

    def everything(self) -> list[str]:
        """The bodies of all messages of the database, held ones too."""
        records = [json.loads(line) for line in self.broker().dump()]
        return [record["body"] for record in records if record["type"] == "message"]

    def assertRefused(self, done: Done, *words: str) -> None:
        """An error: status 1, one line that has these words, and nothing on standard output."""
        self.assertRan(done, b"", status=1)
        self.assertRegex(done.stderr, rb"\Abroker: error: [^\n]+\n\Z", done.args)
        for word in words:
            self.assertIn(word, done.stderr.decode(), done.args)


class WritingCommandsTest(CommandTest):
    """write, broadcast."""

    def test_write_takes_the_body_from_its_operand_or_from_standard_input_byte_for_byte(self) -> None:
        bodies = [b"no newline", b"one\n", b"two\n\n", b"", b"\n", b"cr\r\nlf\r", b"\xe2\x82\xac\xe2\x80\xa8"]
        bodies.append(b"nul\0nul")
        lines = [["write", "stdin", *["-"][: number % 2]] for number in range(len(bodies))]
        lines += [["write", "operand", body.decode()] for body in bodies if b"\0" not in body]
        for done in self.cli_lines(lines, [*bodies, *[b"not this"] * 7]):
            self.assertRan(done, b"")
        self.assertBodies(self.queue("stdin"), [body.decode() for body in bodies])
        self.assertBodies(self.queue("operand"), [body.decode() for body in bodies[:-1]])
        self.assertRan(self.cli("write", "stdin", input=b"the last\n"), b"")
        self.assertRan(self.cli("write", "stdin", "the \u00fcast"), b"")
        # Printed plain, each ends in exactly the newline that it has, or in one that is added.
        bodies += [b"the last\n", "the \u00fcast".encode()]
        printed = b"".join(body if body.endswith(b"\n") else body + b"\n" for body in bodies)
        self.assertRan(self.cli("peek", "stdin", "--all"), printed)
        printed = self.cli("peek", "stdin", "--all", "--json").stdout
        self.assertEqual([json.loads(line)["message"].encode() for line in printed.split(b"\n") if line], bodies)

    def test_write_prints_the_id_only_when_asked_to(self) -> None:
        queue = self.queue()
        self.assertRan(self.cli("write", "q", "1"), b"")
        shape = '{{"timestamp": "{}"}}\n'
        for options, expected in (["-t"], "{}\n"), (["--json"], shape), (["-t", "--json"], shape):
            done = self.cli_lines([["write", "q", "text", *options]])[0]
            newest = list(queue.peek_all())[-1].id
            self.assertRan(done, expected.format(newest).encode())
            self.assertEqual(len(str(newest)), 19)

    def test_write_with_a_delay_is_not_deliverable_before(self) -> None:
        self.assertLines(
            (["write", "q", "later", "--delay", "1h"], b"", 0),
            (["read", "q"], b"", 2),
            (["list", "--stats"], b"q: 0 (1 total, 0 leased, 1 delayed)\n", 0),
        )
        self.assertRan(self.cli("write", "soon", "--lines", "--delay", "250ms", input=b"a\nb\n"), b"")
        self.assertRan(self.cli("read", "soon", "--all", "--wait", "20"), b"a\nb\n")

    def test_write_lines_makes_a_message_of_each_line_as_it_comes(self) -> None:
        queue = self.queue()
        child = self.start("write", "q", "--lines", "-t")
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(b"first\nsec")
        child.stdin.flush()
        first = self.read_line(child.stdout)  # a slow producer: the first is committed, the second unfinished
        self.assertBodies(queue, ["first"])
        self.assertEqual(first, b"%d\n" % queue.peek_many(1)[0].id)
        done = self.finish(child, b"ond\n\ncr\r\nlast")
        self.assertBodies(queue, ["first", "second", "", "cr\r", "last"])
        ids = [message.id for message in queue.peek_all()]
        self.assertRan(done, "".join(f"{id}\n" for id in ids[1:]).encode())
        self.assertEqual(ids, sorted(ids))

    def test_write_lines_reads_nothing_into_the_text(self) -> None:
        lines = [b"-", b"--", b"--cleanup", b" -f x ", b"\t", b'{"type": "header"}', b"\x0b\x0c", b"\0"]
        lines.append("\u2028\x85".encode())
        self.assertRan(self.cli("write", "q", "--lines", input=b"\n".join(lines)), b"")
        self.assertBodies(self.queue(), [line.decode() for line in lines])
        self.assertRan(self.cli("write", "q", "--lines", input=b""), b"")
        self.assertEqual(self.queue().count(), len(lines))

    def test_write_lines_stops_at_a_bad_line_and_keeps_those_before_it(self) -> None:
        self.environ["BROKER_MAX_MESSAGE_SIZE"] = "10"
        cases = {"utf8": b"one\ntwo\nb\xffd\nfour\n", "long": b"one\ntwo\n12345678901\nfour\n"}
        for name, lines in cases.items():
            done = self.cli("write", name, "--lines", input=lines)
            self.assertRefused(done, "line 3:")
            self.assertBodies(self.queue(name), ["one", "two"])
        endless = self.start("write", "endless", "--lines")  # one that never ends is noticed before its end
        assert endless.stdin is not None
        endless.stdin.write("€".encode() * 40 + b"\xe2")
        endless.stdin.flush()
        self.wait_for(lambda: endless.poll() is not None, "the refusal of a line without an end")
        self.assertRefused(self.finish(endless), "line 1:", "BROKER_MAX_MESSAGE_SIZE")

    def test_the_largest_body_passes_through_and_one_more_byte_is_refused(self) -> None:
        largest = "é".encode() * ((5 << 20) if FULL else (1 << 19))  # 10 MiB is the default limit
        self.environ["BROKER_MAX_MESSAGE_SIZE"] = str(len(largest))
        self.assertRan(self.cli("write", "q", "--lines", input=largest + b"\n"), b"")
        (self.dir / "largest").write_bytes(largest + b"\n")
        done = self.shell("broker dump | broker load -f copy.db && broker -f copy.db read q | cmp - largest")
        self.assertRan(done, b"")
        self.assertRefused(self.cli("write", "q", input=b"x" + largest), "BROKER_MAX_MESSAGE_SIZE")
        self.assertEqual(self.queue().count(), 1)

    def test_the_limit_of_a_body_counts_bytes_and_is_named_as_the_reason(self) -> None:
        self.environ["BROKER_MAX_MESSAGE_SIZE"] = "10"
        long, fits = "€€€€€", "é€€é"  # 15 and 10 bytes; the 11th byte is not the end of a character
        commands = [["write", "q", long], ["write", "q", "-"], ["write", "q", "--lines"], ["broadcast", long]]
        for done in self.cli_lines(commands, [long.encode()] * 4):
            self.assertRefused(done, "BROKER_MAX_MESSAGE_SIZE")
        commands = [["write", "q", fits], ["write", "q", "-"], ["write", "q", "--lines"]]
        for done in self.cli_lines(commands, [fits.encode()] * 3):
            self.assertRan(done, b"")
        self.assertBodies(self.queue(), [fits] * 3)

    def test_bodies_that_are_not_utf8_are_refused_and_nothing_is_written(self) -> None:
        self.queue("other").write("x")
        bad = b"caf\xe9"
        cases: dict[bytes, list[tuple[str, ...]]] = {
            b"": [("write", "q", os.fsdecode(bad)), ("broadcast", os.fsdecode(bad))],
            bad: [("write", "q"), ("write", "q", "-"), ("write", "q", "--lines"), ("broadcast", "-")],
            "\ud800".encode("utf-8", "surrogatepass"): [("write", "q")],
        }
        for input, commands in cases.items():
            for done in self.cli_each(commands, input=input):
                self.assertRefused(done, "UTF-8")
        self.assertEqual(self.everything(), ["x"])

    def test_broadcast_writes_to_every_queue_that_has_messages_and_matches(self) -> None:
        self.assertRan(self.cli("broadcast", "hello"), b"", status=2)
        for name in ("jobs.a", "jobs.b", "mail"):
            self.queue(name).write("old")
        self.queue("jobs.b").lease(60)
        self.assertRan(self.cli("broadcast", "all"), b"")
        self.assertRan(self.cli("broadcast", "--pattern", "jobs.*", "-", input=b"some\n"), b"")
        self.assertRan(self.cli("broadcast", "none", "--pattern", "JOBS*"), b"", status=2)
        self.assertBodies(self.queue("jobs.a"), ["old", "all", "some\n"])
        self.assertBodies(self.queue("jobs.b"), ["all", "some\n"])
        self.assertBodies(self.queue("mail"), ["old", "all"])


class TakingCommandsTest(CommandTest):
    """read, peek, move, lease, ack, release, extend, delete."""

    # Options made from the ids of five messages, and which of "12345" the command then takes.
    FILTERS: tuple[tuple[Callable[[list[str]], list[str]], str], ...] = (
        (lambda ids: [], "1"),
        (lambda ids: ["--all"], "12345"),
        (lambda ids: ["-n", "2"], "12"),
        (lambda ids: ["--number", "9"], "12345"),
        (lambda ids: ["-m", ids[2]], "3"),
        (lambda ids: ["--message-id", ids[4], "--all"], "5"),
        (lambda ids: ["-m", str(int(ids[4]) + 7)], ""),
        (lambda ids: ["--after", ids[1]], "3"),
        (lambda ids: ["--since", ids[1], "--all"], "345"),
        (lambda ids: ["--all", "--before", ids[2]], "12"),
        (lambda ids: ["--before", ids[4], "--all", "--after", ids[0]], "234"),
        (lambda ids: ["-n3", "--after", ids[0]], "234"),
        (lambda ids: ["--after", ids[4]], ""),
        (lambda ids: ["--before", ids[0], "--all"], ""),
        (lambda ids: ["-m", ids[2], "--after", ids[2]], ""),
        (lambda ids: ["-m", ids[2], "--before", ids[3]], "3"),
    )

    def test_read_peek_and_move_heed_every_filter(self) -> None:
        commands, cases = [], []
        for verb in ("read", "peek", "move"):
            for number, (make, expected) in enumerate(self.FILTERS):
                source, dest = f"{verb}{number}", f"{verb}-dest{number}"
                ids = list(map(str, self.queue(source).write_many(list("12345"))))
                operands = [source, dest] if verb == "move" else [source]
                commands.append([verb, *operands, *make(ids)])
                cases.append((verb, source, dest, expected))
        for done, (verb, source, dest, expected) in zip(self.cli_lines(commands), cases):
            with self.subTest(command=done.args):
                self.assertRan(done, "".join(f"{body}\n" for body in expected).encode(), status=0 if expected else 2)
                left = [body for body in "12345" if verb == "peek" or body not in expected]
                self.assertBodies(self.queue(source), left)
                self.assertBodies(self.queue(dest), list(expected) if verb == "move" else [])

    def test_read_peek_and_move_print_the_three_shapes(self) -> None:
        text = 'tab\t"quote" \\ é\n'
        quoted = json.dumps(text, ensure_ascii=False)
        for verb, operands in ("peek", ["q"]), ("move", ["q", "moved"]), ("read", ["q"]):
            queue = self.queue()
            queue.delete()
            ids = queue.write_many([text] * 4)
            if verb == "peek":  # which always shows the first
                ids = [ids[0]] * 4
            options: list[list[str]] = [[], ["-t"], ["--json"], ["--timestamps", "--json"]]
            done = self.cli_lines([[verb, *operands, *each] for each in options])
            lined = '{{"message": {}, "timestamp": "{}"}}\n'
            self.assertRan(done[0], text.encode())
            self.assertRan(done[1], f"{ids[1]}\t{text}".encode())
            self.assertRan(done[2], lined.format(quoted, ids[2]).encode())
            self.assertRan(done[3], lined.format(quoted, ids[3]).encode())

    def test_after_and_before_take_ids_and_the_usual_ways_to_write_a_time(self) -> None:
        self.queue().write("now")
        past = ["2020-01-15", "2020-01-15T10:30", "2020-01-15T10:30:00Z", "2020-01-15 10:30:00.5+02:00", "1579084200",
                "1579084200.25", "1579084200s", "1579084200000", "1579084200000ms", "1579084200000000us",
                "1579084200000000000ns", "1579084200000000000"]  # fmt: skip
        done = self.cli_lines([["peek", "q", option, time] for option in ("--after", "--before") for time in past])
        for each in done[: len(past)]:
            self.assertRan(each, b"now\n")
        for each in done[len(past) :]:
            self.assertRan(each, b"", status=2)

    def test_by_id_peek_and_delete_see_held_messages_and_read_and_move_do_not(self) -> None:
        queue = self.queue()
        leased, delayed = str(queue.write("leased")), str(queue.write("delayed", delay=3600))
        queue.lease(3600)
        for id, body in (leased, b"leased\n"), (delayed, b"delayed\n"):
            self.assertLines(
                (["read", "q", "-m", id], b"", 2),
                (["move", "q", "r", "-m", id], b"", 2),
                (["peek", "q", "-m", id], body, 0),
                (["peek", "other", "-m", id], b"", 2),
                (["delete", "other", "-m", id], b"", 2),
                (["delete", "q", "-m", id], b"", 0),
                (["delete", "q", "-m", id], b"", 2),
            )

    def test_move_keeps_the_ids(self) -> None:
        ids = self.queue().write_many(["a", "b"])
        self.assertRan(self.cli("move", "q", "r", "--all", "-t"), f"{ids[0]}\ta\n{ids[1]}\tb\n".encode())
        self.assertEqual([message.id for message in self.queue("r").peek_all()], ids)
        self.assertRan(self.cli("move", "q", "r"), b"", status=2)
        self.assertRefused(self.cli("move", "r", "r"), "same queue")

    def test_read_and_peek_wait_for_a_message_that_matches(self) -> None:
        queue = self.queue()
        old = queue.write("old")
        self.assertRan(self.cli("peek", "q", "--wait"), b"old\n")  # does not wait for another one
        waiting = WAITING.format("simplebroker.Alarm.wait")
        child = self.start_patched(waiting, "peek", "q", "--wait", "25", "--after", str(old), "-t")
        self.assertEqual(self.read_line(child.stderr), b"waiting\n")
        self.assertIsNone(child.poll())
        new = queue.write("new")
        self.assertRan(self.finish(child), b"%d\tnew\n" % new)
        self.assertRan(self.cli("read", "q", "--all", "--wait", "25s", "--after", str(old)), b"new\n")
        self.assertBodies(queue, ["old"])
        for done in self.cli_each([(verb, "q", "--after", str(new), "--wait", "50ms") for verb in ("read", "peek")]):
            self.assertRan(done, b"", status=2)

    def test_a_reader_that_waits_without_limit_gets_what_another_process_writes(self) -> None:
        child = self.start("read", "q", "--wait", "--json")
        self.assertRan(self.cli("write", "q", "hello"))
        self.assertRegex(self.finish(child).stdout, rb'\A{"message": "hello", "timestamp": "\d{19}"}\n\Z')

    def test_lease_then_acknowledge_release_and_extend(self) -> None:
        id = self.queue().write("é")
        self.assertRan(
            self.cli("lease", "q", "--for", "5m"),
            f'{{"message": "é", "timestamp": "{id}", "attempt": 1, "lease": "{id}.1"}}\n'.encode(),
        )
        for done in self.cli_lines([["read", "q"], ["peek", "q"], ["lease", "q"], ["move", "q", "r"]]):
            self.assertRan(done, b"", status=2)
        self.assertRan(self.cli("release", "q", f"{id}.1"), b"")
        self.assertEqual(json.loads(self.cli("lease", "q").stdout)["lease"], f"{id}.2")  # default: 30 s
        for done in self.cli_lines([[command, "q", f"{id}.1"] for command in ("ack", "extend", "release")]):
            self.assertRefused(done, f"{id}.1")
        self.assertRan(self.cli("extend", "q", f"{id}.2", "--for", "1ms"), b"")
        self.assertEqual(json.loads(self.cli("read", "q", "--wait", "9", "--json").stdout)["timestamp"], str(id))
        self.assertRefused(self.cli("ack", "q", f"{id}.2"), str(id))

    def test_an_acknowledged_message_is_gone_and_a_released_one_can_come_back_later(self) -> None:
        first, second = self.queue().write_many(["a", "b"])
        self.assertRan(self.cli("lease", "q", "--for", "1h", "--after", str(first)))
        self.assertRan(self.cli("ack", "q", f"{second}.1"), b"")
        self.assertEqual(self.everything(), ["a"])
        self.assertRan(self.cli("lease", "q", "-m", str(first)))
        self.assertRan(self.cli("release", "q", f"{first}.1", "--delay", "1h"), b"")
        self.assertRan(self.cli("read", "q"), b"", status=2)
        self.assertEqual(self.everything(), ["a"])
        bad = ["", "x", "1.1", f"{first}", *(f"{first}.{attempt}" for attempt in ("", "0", "-1", "1.1", "\u0661"))]
        for done in self.cli_lines([["ack", "q", lease] for lease in bad]):
            self.assertRefused(done)
        self.assertEqual(self.everything(), ["a"])

    def test_a_lease_of_no_time_is_not_taken_for_the_default(self) -> None:
        id = self.queue().write("a")
        self.cli("lease", "q", "--for", "0")  # whether it is an error or ends at once
        self.assertRan(self.cli("peek", "q"), b"a\n")
        self.queue().lease(3600)
        self.cli("extend", "q", f"{id}.2", "--for", "0")
        self.cli("extend", "q", f"{id}.1", "--for", "0")
        self.assertEqual(self.queue().stats().total, 1)

    def test_delete_removes_one_message_a_queue_or_all(self) -> None:
        queue, other = self.queue(), self.queue("other")
        ids = queue.write_many(["a", "b", "c"])
        queue.lease(3600)
        other.write("x")
        misuse = [[], ["q", "--all"], ["--all", "-m", str(ids[2])], ["-m", str(ids[2])], ["q", "-m", "1"]]
        for done in self.cli_lines([["delete", *args] for args in misuse]):
            self.assertRefused(done)
        self.assertRan(self.cli("delete", "q", "-m", str(ids[1])), b"")
        self.assertEqual(self.everything(), ["x", "a", "c"])
        self.assertLines((["delete", "q"], b"", 0), (["delete", "q"], b"", 2), (["peek", "other"], b"x\n", 0))
        self.assertLines((["delete", "--all"], b"", 0), (["delete", "--all"], b"", 2))
        self.assertEqual(self.everything(), [])


class WholeDatabaseCommandsTest(CommandTest):
    """list, dump, load, init, and the actions."""

    def test_list_shows_every_queue_in_three_shapes(self) -> None:
        self.assertRan(self.cli("list"), b"")
        for name in ("b", "a.1", "a-2"):
            self.queue(name).write_many(["1", "2", "3"])
        self.queue("b").lease(3600)
        self.queue("b").write("4", delay=3600)
        self.queue("held").write("later", delay=3600)
        done = self.cli_lines([["list"], ["list", "--stats"], ["list", "--json"], ["list", "--stats", "--json"]])
        self.assertRan(done[0], b"a-2: 3\na.1: 3\nb: 2\nheld: 0\n")
        detail = "a-2: 3 (3 total, 0 leased, 0 delayed)\na.1: 3 (3 total, 0 leased, 0 delayed)\n"
        detail += "b: 2 (4 total, 1 leased, 1 delayed)\nheld: 0 (1 total, 0 leased, 1 delayed)\n"
        self.assertRan(done[1], detail.encode())
        for each in done[2:]:
            lines = each.stdout.decode().splitlines()
            self.assertEqual(len(lines), 4)
            self.assertEqual(lines[2], '{"queue": "b", "ready": 2, "leased": 1, "delayed": 1, "total": 4}')
        self.assertRan(self.cli("list", "--pattern", "a*"), b"a-2: 3\na.1: 3\n")
        self.assertLines((["list", "--pattern", "[!a]"], b"b: 2\n", 0), (["list", "--pattern", "A*"], b"", 2))

    def test_dump_prints_a_header_and_then_every_message(self) -> None:
        for command in ("dump", "list"):  # of nothing; and looking makes no file
            self.assertRan(self.cli(command))
        self.assertFalse(self.path.exists())
        first = self.queue("b").write("é\n")
        second, held = self.queue("a").write_many(["x", "y"])
        self.queue("a").lease(3600, message_id=held)
        until = 2_000_000_000_000_000_000
        delayed = self.queue("a").write("z", until=until)
        done = self.cli("dump")
        self.assertRan(done)
        lines = done.stdout.decode().splitlines()
        self.assertEqual(
            lines[0], f'{{"type": "header", "format": "simplebroker-dump", "version": 1, "last_ts": "{delayed}"}}'
        )
        self.assertEqual(lines[1], f'{{"type": "message", "queue": "a", "body": "x", "id": "{second}"}}')
        self.assertEqual(json.loads(lines[2])["attempt"], 1)
        self.assertGreater(int(json.loads(lines[2])["held_until"]), held)
        self.assertEqual(int(json.loads(lines[3])["held_until"]), until)
        self.assertEqual(lines[4:], [f'{{"type": "message", "queue": "b", "body": "é\\n", "id": "{first}"}}'])
        filtered = self.cli("dump", "--pattern", "b*").stdout.decode().splitlines()
        self.assertEqual(filtered, [lines[0], lines[4]])

    def test_load_keeps_the_ids_and_is_all_or_nothing(self) -> None:
        header = '{"type": "header", "format": "simplebroker-dump", "version": 1, "last_ts": "2100000000000000000"}'
        line = '{{"type": "message", "queue": "{}", "body": "{}", "id": "{}"}}'
        alias = '{"type": "alias", "alias": "old", "target": "q"}'
        good = [header, line.format("q", "b", 1700000000000000002), alias, line.format("q", "a", 1700000000000000001)]
        done = self.cli("load", input="\n".join(good).encode())
        self.assertRan(done, b"")
        self.assertIn(b"alias", done.stderr)
        self.assertRan(self.cli("peek", "q", "--all", "-t"), b"1700000000000000001\ta\n1700000000000000002\tb\n")
        self.assertGreater(int(self.cli("write", "q", "c", "-t").stdout), 2100000000000000000)
        before = self.cli("dump").stdout
        new = line.format("q", "new", 1700000000000000003)
        bad = {
            "line 3": [header, new, line.format("q", "again", 1700000000000000001)],
            "line 4": [header, new, alias, new],
            "line 2": [header, "not json", new],
            "line 2: ": [header, line.format("-q", "x", 1), new],
            " line 3": [header, new, '{"type": "message"}'],
            "line 3:": [header, new, "", ""],
            "line 1": [new, header],
            "line 1:": [header.replace('"version": 1', '"version": 2'), new],
            " line 1": [header.replace("simplebroker-", "other-"), new],
            "line  2": [header, "[" * 200_000],
            "header": [],
        }
        inputs = ["\n".join(lines).encode() for lines in bad.values()]
        inputs.append(f"{header}\n".encode() + new.encode().replace(b"new", b"\xff"))
        for words, done in zip([*bad, "line 2"], self.cli_lines([["load"]] * len(inputs), inputs)):
            with self.subTest(words=words):
                self.assertRan(done, b"", status=1)
                self.assertIn(" ".join(words.split()), done.stderr.decode())
        self.assertEqual(self.cli("dump").stdout, before)

    def test_a_dump_loaded_into_a_fresh_database_dumps_the_same(self) -> None:
        bodies = ["", "\n", "\0", "\r\n", "é\u2028", "\\", '"', "x" * 100_000, *map(str, range(3000))]
        for name in ("a", "b.c"):
            self.queue(name).write_many(bodies)
        self.queue("a").lease(3600)
        self.queue("z").write("later", delay=3600)
        done = self.shell("broker dump | tee dump1 | broker load -f copy.db && broker -f copy.db dump | cmp - dump1")
        self.assertRan(done, b"")
        # And from a file, not a pipe.
        done = self.shell("broker load -f third.db < dump1 && broker -f third.db dump | cmp - dump1")
        self.assertRan(done, b"")
        self.assertRefused(self.cli("load", input=(self.dir / "dump1").read_bytes()), "line 2", "exists")

    def test_init_creates_the_database_and_project_scope_finds_it_from_below(self) -> None:
        self.environ["BROKER_PROJECT_SCOPE"] = "1"
        below = self.dir / "one" / "two"
        below.mkdir(parents=True)
        self.assertRefused(self.bare("write", "q", "x", cwd=below), "broker init")
        self.assertRan(self.bare("init"), b"")
        self.assertRan(self.bare("init"), b"")
        self.assertRan(self.bare("write", "q", "x", cwd=below), b"")
        self.assertRan(self.bare("read", "q"), b"x\n")
        self.assertRan(self.bare("init", cwd=below), b"")  # here, although there is one above
        self.assertTrue((below / ".broker.db").exists())
        self.assertRan(self.cli("init"), b"")
        self.assertTrue(self.path.exists())

    def test_status_tells_the_numbers_of_the_database(self) -> None:
        self.assertRan(self.cli("--status"), b"", status=2)
        newest = self.queue().write_many(["1", "2", "3"])[-1]
        self.queue().lease(3600)
        self.queue("r").write("4", delay=3600)
        newest = max(message["id"] for message in map(json.loads, self.broker().dump()) if "id" in message)
        expected = {"database": str(self.path), "queues": 2, "messages": 4, "ready": 2, "leased": 1, "delayed": 1}
        plain, lines, swapped = self.cli_each([["--status"], ["--status", "--json"], ["--json", "--status"]])
        status = json.loads(lines.stdout)
        self.assertGreater(status.pop("bytes"), 4096)
        self.assertEqual(status, {**expected, "last_ts": newest})
        self.assertRan(swapped, lines.stdout)
        self.assertEqual(
            plain.stdout.decode().splitlines()[:7], [f"{k}: {v}" for k, v in {**expected, "last_ts": newest}.items()]
        )

    def test_vacuum_gives_the_space_of_removed_messages_back(self) -> None:
        self.assertRan(self.cli("--vacuum"), b"", status=2)
        queue = self.queue()
        last = queue.write_many(["x" * 1000] * 2000)[-1]
        queue.delete()
        self.assertRan(self.cli("--vacuum"), b"")
        self.assertLess(self.path.stat().st_size, 100_000)
        self.assertGreater(queue.write("after"), last)

    def test_cleanup_deletes_the_database_and_what_belongs_to_it_and_nothing_else(self) -> None:
        self.assertRan(self.cli("--cleanup"), b"", status=2)
        self.assertRan(self.cli("write", "q", "x"))
        (self.dir / "test.db.txt").write_text("mine")
        self.assertRan(self.cli("--cleanup"), b"")
        self.assertEqual(os.listdir(self.dir), ["test.db.txt"])
        foreign = self.dir / "foreign.db"
        foreign.write_bytes(b"someone's notes\n")
        for action in ("--cleanup", "--vacuum", "--status"):
            self.assertRefused(self.bare(action, "-f", "foreign.db"), "foreign.db")
        self.assertEqual(foreign.read_bytes(), b"someone's notes\n")
        self.assertEqual(sorted(os.listdir(self.dir)), ["foreign.db", "test.db.txt"])


class GrammarTest(CommandTest):
    """Options, operands, "--", help and usage errors."""

    def test_global_options_go_on_either_side_of_the_command(self) -> None:
        (self.dir / "sub").mkdir()
        lines = [
            ["-f", "x.db", "-d", "sub", "-q", "write", "q", "0"],
            ["write", "q", "1", "-f", "x.db", "-d", "sub", "-q"],
            ["-d", "sub", "write", "-f", "x.db", "q", "2"],
            ["-q", "-fx.db", "write", "q", "--dir", "sub", "3"],
            ["--file=x.db", "write", "--dir=sub", "--quiet", "q", "--", "4"],
            ["write", "q", "5", "-f", str(self.dir / "sub" / "x.db")],
        ]
        for done in self.cli_lines(lines, bare=True):
            self.assertRan(done, b"")
        self.assertRan(self.bare("-d", "sub", "write", "q", "-f", "x.db", "6"), b"")
        self.assertRan(self.bare("peek", "q", "--all", "-d", "sub", "-f", "x.db"), b"0\n1\n2\n3\n4\n5\n6\n")
        self.assertEqual(os.listdir(self.dir), ["sub"])
        for line in ["--json", "list", "-d", "sub", "-f", "x.db"], ["-d", "sub", "-f", "x.db", "list", "--json"]:
            self.assertIn(b'"ready": 7', self.bare(*line).stdout)

    def test_options_go_between_the_operands_too(self) -> None:
        id = self.queue().write("a")
        self.assertRan(self.cli("write", "q", "--delay", "0", "b"), b"")
        self.assertRan(self.cli("move", "q", "--all", "r", "-q"), b"a\nb\n")
        leased = f'{{"message": "a", "timestamp": "{id}", "attempt": 1, "lease": "{id}.1"}}\n'.encode()
        self.assertLines(
            (["write", "--delay", "0s", "q", "-q", "c"], b"", 0),
            (["lease", "--for", "1m", "r"], leased, 0),
            (["extend", "r", "--for", "2m", f"{id}.1"], b"", 0),
            (["release", "r", "--delay", "0", f"{id}.1"], b"", 0),
            (["read", "-t", "r", "-n", "1"], f"{id}\ta\n".encode(), 0),
        )

    def test_what_follows_two_dashes_is_text(self) -> None:
        texts = ["--", "-h", "--help", "-f", "--version", "-x", "--delay=5"]
        lines = [["write", "q", "--", text] for text in texts]
        lines += [["write", "-q", "--delay", "0", "--", "q", "--status"], ["write", "q", "--delay", "0", "--", "-1"]]
        for done in self.cli_lines(lines):
            self.assertRan(done, b"")
        self.assertRan(self.cli("write", "q", "--", "--cleanup"), b"")
        self.assertRan(self.cli("write", "--", "q", "--vacuum"), b"")
        self.assertRan(self.cli("broadcast", "--", "--all"), b"")
        self.assertBodies(self.queue(), [*texts, "--status", "-1", "--cleanup", "--vacuum", "--all"])
        self.assertRan(self.cli("read", "--", "q"), b"--\n")
        self.assertRefused(self.cli("read", "--", "-q"), "queue name")

    def test_text_that_looks_like_a_negative_number_is_text(self) -> None:
        texts = ["-5", "-1.5", "-0"]
        self.assertLines(*((["write", "q", text], b"", 0) for text in texts))
        self.assertRan(self.cli("write", "q", "--delay", "0", "-7"), b"")
        self.assertBodies(self.queue(), [*texts, "-7"])

    def test_an_option_in_place_of_text_is_an_error_and_deletes_nothing(self) -> None:
        self.assertRan(self.cli("write", "q", "precious"))
        commands = []
        for action in ACTIONS:
            commands += [["write", "q", action], ["write", action, "q"], [action, "write", "q"], [action, "list"]]
            commands += [["list", action], ["read", "q", action], [action, "delete", "--all"], [action, "q"]]
        commands += [[first, second] for first in ACTIONS for second in ACTIONS if first != second]
        commands += [["write", "q", "--clean"], ["--clean"], ["--vers"], ["write", "q", "-x"], ["write", "q", "--js"]]
        for done in self.cli_lines(commands):
            with self.subTest(command=done.args):
                self.assertRefused(done)
        for command in ["write", "q", "--cleanup"], ["--cleanup", "write", "q"], ["write", "q", "--vacuum"]:
            self.assertRefused(self.cli(*command), command[2 if command[0] == "write" else 0])
        self.assertEqual(self.everything(), ["precious"])

    def test_misuse_is_one_line_and_status_1_and_makes_no_file(self) -> None:
        id = "1700000000000000000"
        commands = [[""], ["write", "q\n", "x"]]
        commands += map(
            shlex.split,
            f"""\
            nonsense
            write
            write q a b
            write q --lines text
            write q --lines -
            write bad/name x
            write '' x
            write .q x
            write {"q" * 513} x
            write q x --delay
            write q x --delay soon
            write q x --delay -5
            write q x --delay 1e3
            write q x --all
            read
            read q r
            read q -n 0
            read q -n -1
            read q -n 1.5
            read q -n 2 --all
            read q -m 123
            read q -m {id}x
            read q --after yesterday
            read q --before 2024-13-01
            read q --since
            read q --wait soon
            read q --lines
            peek q --for 5
            peek q -n x
            move q
            move q r s
            move q q
            move q r --wait 1
            move q r -n 2 --all
            lease
            lease q --for
            lease q --for never
            lease q --all
            ack q
            ack q {id}
            ack q {id}.0
            release q {id}.x
            extend q {id}.1 --for x
            work
            work q
            work q --
            work q -j 0 -- true
            work q --max-attempts 0 -- true
            work q --lease x -- true
            work q --dead-letter a/b -- true
            work q --backoff x -- true
            work q -- ''
            watch
            watch q --peek --move r
            watch q --move q
            watch q --move a/b
            watch q -n 3
            list q
            list --pattern
            delete
            delete q r
            delete q --all
            broadcast
            broadcast a b
            dump q
            load q
            init q
            --status q
            -f
            -f '' list
            -f ../up.db list
            -f a/../b.db list
            -d missing write q x
            -f :memory: write q x
            -d . -f {self.dir}/abs.db list""".splitlines(),
        )
        for done in self.cli_lines(commands, bare=True):
            with self.subTest(command=done.args):
                self.assertRefused(done)
        self.assertRefused(self.bare(), "no command")
        self.assertEqual(os.listdir(self.dir), [])

    def test_an_error_names_the_value_and_the_remedy(self) -> None:
        cases = {
            "'b' quote": ["write", "q", "a", "b"],
            "'--clean' '--'": ["write", "q", "--clean"],
            "'nonsense' write load": ["nonsense"],
            "'a/b' letters": ["read", "a/b"],
            "'soon' 90s": ["read", "q", "--wait", "soon"],
            "'yesterday' 2024-01-15": ["read", "q", "--after", "yesterday"],
            "'12' 19": ["read", "q", "-m", "12"],
            "'x' ID.ATTEMPT": ["ack", "q", "x"],
            "'0' 1": ["read", "q", "-n", "0"],
            "QUEUE CMD": ["work", "q"],
            "-n --all": ["read", "q", "-n", "1", "--all"],
            "'missing' create": ["-d", "missing", "-f", "x.db", "list"],
        }
        for words, done in zip(cases, self.cli_lines(list(cases.values()), bare=True)):
            with self.subTest(command=done.args):
                self.assertRefused(done, *words.split())

    def test_help_is_complete_and_needs_no_database_and_no_sound_environment(self) -> None:
        self.environ["BROKER_BUSY_TIMEOUT"] = "soon"
        lines = [["--help"], ["-h"], ["--version"], *[[name, "--help"] for name in COMMANDS]]
        done = self.cli_lines(lines, bare=True)
        for args, same in zip(lines[:4], self.cli_each(lines[:4])):
            self.assertRan(same, done[lines.index(args)].stdout)
        main, short, version, *each = [one.stdout.decode() for one in done]
        for one in done:
            self.assertRan(one)
            self.assertEqual(one.stderr, b"")
        self.assertEqual(main, short)
        for word in [*COMMANDS, *GLOBAL_OPTIONS.split(), *ACTIONS, "--json", "Exit status"]:
            self.assertRegex(main, rf"(?m)(?<![\w-]){re.escape(word)}\b")
        self.assertEqual(version, f"simplebroker {simplebroker.__version__}\n")
        for (name, (_, options)), text in zip(COMMANDS.items(), each):
            self.assertRegex(text, rf"\Ausage: broker {name} ")
            for option in [*options.split(), *GLOBAL_OPTIONS.split()]:
                self.assertRegex(text, rf"(?m)(?<![\w-]){re.escape(option)}\b", f"{name} --help")
        self.assertEqual(os.listdir(self.dir), [])


class EnvironmentTest(CommandTest):
    """Variables, locales, and where the database is."""

    def test_a_bad_variable_is_an_error_that_names_it_its_value_and_what_is_allowed(self) -> None:
        bad = {
            "BROKER_BUSY_TIMEOUT": ("5s", "milliseconds"),
            "BROKER_SYNC_MODE": ("fast", "FULL"),
            "BROKER_CACHE_MB": ("0", "megabytes"),
            "BROKER_WAL_AUTOCHECKPOINT": ("-1", "pages"),
            "BROKER_MAX_MESSAGE_SIZE": ("10MB", "bytes"),
            "BROKER_MAX_INTERVAL": ("nan", "seconds"),
            "BROKER_DEFAULT_DB_NAME": ("../x.db", "'..'"),
            "BROKER_DEFAULT_DB_LOCATION": ("here", "absolute"),
            "BROKER_PROJECT_SCOPE": ("maybe", "1 or 0"),
        }

        def run(case: tuple[str, tuple[str, str]]) -> Done:
            return self.cli("write", "q", "x", env={**self.environ, case[0]: case[1][0]})

        with ThreadPoolExecutor(4) as pool:
            for done, (name, words) in zip(pool.map(run, bad.items()), bad.items()):
                self.assertRefused(done, name, *words)
        self.assertEqual(os.listdir(self.dir), [])

    def test_a_file_that_is_not_ours_is_refused_by_every_command_and_left_as_it_is(self) -> None:
        self.path.write_bytes(b"notes, not a database\n" * 300)
        lease = "1700000000000000000.1"
        values = {"QUEUE": "q", "DEST": "r", "TEXT": "x", "LEASE": lease}
        lines = [[name, *(values[operand] for operand in spec.split())] for name, (spec, _) in COMMANDS.items()]
        lines = [[*line, "--", "true"] if line[0] == "work" else line for line in lines]
        lines += [["read", "q", "--wait"], ["work", "q", "-j", "2", "--drain", "--", "true"], ["watch", "q", "--peek"]]
        header = b'{"type": "header", "format": "simplebroker-dump", "version": 1, "last_ts": "1"}\n'
        lines += [[action] for action in ACTIONS[:3]]
        for done in self.cli_lines(lines, [header] * len(lines)):
            with self.subTest(command=done.args):
                self.assertRefused(done, "test.db")
        self.assertRefused(self.cli("work", "q", "--", "true"), "test.db")
        self.assertEqual(self.path.read_bytes(), b"notes, not a database\n" * 300)
        self.assertEqual(os.listdir(self.dir), ["test.db"])

    def test_the_variables_say_where_the_database_is(self) -> None:
        (self.dir / "place").mkdir()
        self.environ.update(BROKER_DEFAULT_DB_NAME=".queue/b.db", BROKER_DEFAULT_DB_LOCATION=str(self.dir / "place"))
        self.assertRan(self.bare("write", "q", "x"), b"")
        self.assertEqual(os.listdir(self.dir), ["place"])
        self.assertTrue((self.dir / "place" / ".queue" / "b.db").exists())
        self.assertRan(self.bare("read", "q"), b"x\n")

    def test_text_passes_unchanged_through_an_ascii_locale(self) -> None:
        self.environ.update(LC_ALL="C", LANG="C", PYTHONIOENCODING="ascii", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
        text = "é € \U0001f600"
        data = text.encode()
        self.assertRan(self.cli("write", "q", text), b"")
        self.assertRan(self.cli("write", "q", input=data), b"")
        self.assertRan(self.cli("write", "q", "--lines", input=data), b"")
        self.assertRan(self.cli("broadcast", "-", input=data), b"")
        lines = [["peek", "q"], ["peek", "q", "--json"], ["dump"], ["lease", "q", "--for", "1ms"], ["move", "q", "r"]]
        for done, times in zip(self.cli_lines(lines), (1, 1, 4, 1, 1)):
            self.assertRan(done)
            self.assertEqual(done.stdout.count(data), times)
        self.assertRan(self.cli("read", "q"), data + b"\n")
        self.assertRan(self.cli("work", "r", "--drain", "--", "cat"), data)
        self.assertRan(self.cli("work", "q", "--drain", "-j", "2", "--", "cat"), (data + b"\n") * 2)
        place = self.dir / "é"
        place.mkdir()
        self.assertRan(self.bare("-d", str(place), "write", "q", text), b"")
        for options in ([], ["--json"]):
            done = self.bare("-d", str(place), "--status", *options)
            self.assertRan(done)
            self.assertIn(str(place).encode(), done.stdout)


class PlacementTest(CommandTest):
    """One file, copied anywhere."""

    def test_the_file_alone_is_enough_as_a_module_as_a_script_and_vendored(self) -> None:
        del self.environ["PYTHONPATH"]
        vendor = self.dir / "pkg" / "vendor"
        vendor.mkdir(parents=True)
        for place in (self.dir, vendor):
            shutil.copy(ROOT / "simplebroker.py", place)
        (vendor.parent / "__init__.py").touch()
        (vendor / "__init__.py").touch()
        self.assertRan(self.bare("write", "tasks", "ship it"), b"")
        self.assertRan(self.bare("read", "tasks"), b"ship it\n")

        options: Any = {"cwd": self.dir, "env": self.environ, "capture_output": True, "timeout": DEADLINE_S}

        def run(*args: str) -> Done:
            command = [sys.executable, *args]
            return subprocess.run(command, check=False, **options)

        self.assertRan(run("simplebroker.py", "write", "tasks", "as a script"), b"")
        self.assertRan(run("simplebroker.py", "read", "tasks"), b"as a script\n")
        installed = "import sys; from simplebroker import run_and_exit; sys.exit(run_and_exit())"  # a console script
        self.assertRan(run("-c", installed, "write", "tasks", "installed"), b"")
        os.unlink(self.dir / "simplebroker.py")
        self.assertRan(run("-m", "pkg.vendor.simplebroker", "read", "tasks"), b"installed\n")
        self.assertRan(run("-m", "pkg.vendor.simplebroker", "read", "tasks"), b"", status=2)
        code = "from pkg.vendor.simplebroker import Queue\nfrom pkg.vendor.simplebroker.ext import SQLRunner\n"
        self.assertRan(run("-c", code + "print(Queue('t').read(), SQLRunner.__name__)"), b"None SQLRunner\n")
        scripts = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[2].splitlines()[1:3]
        self.assertEqual(scripts, [f'{name} = "simplebroker:run_and_exit"' for name in ("broker", "simplebroker")])

    def test_the_command_ends_without_taking_python_apart_but_nothing_is_lost(self) -> None:
        code = """
import atexit, sys, simplebroker
class Witness:
    def __del__(self):
        print("Python is taken apart", flush=True)
witness = Witness()
atexit.register(print, "registered")
simplebroker.run_and_exit()
"""
        environ = {name: value for name, value in self.environ.items() if name != "PYTHONUNBUFFERED"}
        for output, status in ((b"body\n", 0), (b"", 2)):
            self.queue().write("body") if output else self.queue().delete()
            child = self.python(code, "-f", "test.db", "read", "q", env=environ, stderr=subprocess.PIPE)
            self.assertRan(self.finish(child), output + b"registered\n", status=status)
        if os.path.exists("/dev/full"):
            with open("/dev/full", "wb") as full:
                child = self.python(code, "-f", "test.db", "list", env=environ, stdout=full, stderr=subprocess.PIPE)
                done = self.finish(child)
            self.assertEqual((done.returncode, done.stderr.count(b"\n")), (1, 1), done.stderr)
            self.assertIn(b"No space left", done.stderr)


@unittest.skipUnless(POSIX, "needs a POSIX shell")
class PipeTest(CommandTest):
    """What reads the output may be slow, may stop early, and may be several."""

    def take_twenty(self, command: str, first: int) -> None:
        done = self.shell(f"{{ broker {command}; echo $? >status; }} | head -20")
        self.assertRan(done, "".join(f"{n}\n" for n in range(first, first + 20)).encode())
        self.assertEqual((self.dir / "status").read_text(), "0\n")
        self.assertEqual(done.stderr, b"")

    def test_head_takes_twenty_of_ten_thousand_and_exactly_the_others_remain(self) -> None:
        self.assertRan(self.shell("seq 1 10000 | broker write n --lines"), b"")
        queue, first = self.queue("n"), 1
        for _ in range(20 if FULL else 2):
            for command in ("watch n", "read n --all"):
                self.take_twenty(command, first)
                first += 20
                self.assertEqual(queue.stats(), (10_001 - first, 0, 0))
        self.assertBodies(queue, [str(n) for n in range(first, 10_001)])

    def test_head_takes_exactly_twenty_under_load_too(self) -> None:
        self.queue("n").write_many([str(n) for n in range(1, 1001)])
        for _ in range(4):
            self.python("while True: pass", stdout=None)
        for round_number in range(10 if FULL else 2):
            self.take_twenty("watch n", 40 * round_number + 1)
            self.take_twenty("read n --all", 40 * round_number + 21)
            self.assertEqual(self.queue("n").stats(), (960 - 40 * round_number, 0, 0))

    def test_concurrent_readers_and_one_that_stops_early_share_the_input_exactly(self) -> None:
        paths = [str(path) for path in Path(os.__file__).parent.rglob("*") if str(path).isprintable()][:5000]
        self.assertRan(self.cli("write", "files", "--lines", input="\n".join(paths).encode()), b"")
        readers = "".join(f"broker read files --all >out{n} &\n" for n in range(4))
        done = self.shell(f"{readers} broker read files --all | head -100 >head; wait; cat out? head")
        self.assertRan(done)
        rest = self.everything()  # what the last gave back when the others had found nothing more
        self.assertEqual(Counter(done.stdout.decode().splitlines()), Counter(paths) - Counter(rest))
        self.assertRan(self.shell("broker read files --all"), status=0 if rest else 2)

    def test_a_consumer_that_reads_slowly_and_stops_loses_nothing(self) -> None:
        consumers = []
        for reads in (1, 2, 3, 4):  # where they stop: the sizes of the batches must not matter
            queue = self.queue(f"q{reads}")
            queue.write_many([str(n) for n in range(1, 9)])
            reader, writer = os.pipe()
            consumers.append((queue, reads, reader, self.start("read", f"q{reads}", "--all", stdout=writer)))
            os.close(writer)
        for _, reads, reader, _ in consumers:
            for n in range(reads):
                self.assertEqual(os.read(reader, 2), b"%d\n" % (n + 1))
        # The pause is what is tested: longer than anything that the command might be patient for.
        self.assertIsNone(self.outlasts(consumers[0][3], 1.3))
        for queue, reads, reader, child in consumers:
            os.close(reader)
            self.assertRan(self.finish(child))
            self.assertBodies(queue, [str(n) for n in range(reads + 1, 9)])

    def test_the_lease_of_what_is_in_the_pipe_is_renewed(self) -> None:
        queue = self.queue()
        queue.write_many(["1", "2", "3", "4"])
        short = "simplebroker.LeaseKeeper.__init__.__defaults__ = (0.3,)"
        with self.pipe() as (reader, writer):
            child = self.start_patched(short, "read", "q", "--all", stdout=writer)
            os.close(writer)
            self.assertEqual(os.read(reader, 2), b"1\n")
            self.wait_for(lambda: queue.stats()[:2] in ((2, 1), (1, 2)), "the second message in the pipe")
            before, deadline = queue.stats(), time.monotonic() + 0.9
            while time.monotonic() < deadline:  # three leases
                self.assertEqual(queue.stats(), before)
                time.sleep(0.01)
            taken = self.cli("read", "q").stdout  # another consumer goes past what is leased
            self.assertEqual(taken, b"3\n" if before.ready == 2 else b"4\n")
            rest = self.read_until(reader, lambda data: False, "the rest")
            self.assertEqual(sorted((rest + taken).split()), [b"2", b"3", b"4"])
            self.assertRan(self.finish(child))
        self.assertEqual(queue.stats().total, 0)

    def test_two_commands_share_a_pipe_line_by_line(self) -> None:
        expected = []
        for name in ("a", "b"):
            bodies = [f"{name}{n}:{'x' * (n % 300)}" for n in range(400)]
            self.queue(name).write_many(bodies)
            expected += bodies
        done = self.shell("{ broker read a --all & broker read b --all; wait; } | cat")
        self.assertRan(done)
        lines = done.stdout.decode().splitlines()
        self.assertEqual(sorted(lines), sorted(expected))
        for ordered in (lines, expected):
            ordered[:] = sorted(ordered, key=lambda line: line[0])  # a stable sort: the order within each queue
        self.assertEqual(lines, expected)
        self.assertEqual(self.everything(), [])

    def test_every_command_that_prints_ends_cleanly_when_nobody_reads(self) -> None:
        for name in ("q", "r", "s", "t"):
            self.queue(name).write_many(["x" * 1000] * 100)
        commands = [["read", "q", "--all"], ["read", "q"], ["peek", "r", "--all"], ["watch", "q"]]
        commands += [["watch", "r", "--peek"], ["watch", "s", "--move", "u"], ["lease", "t"], ["list"], ["dump"]]
        commands += [["--status"], ["--version"]]
        commands += [["--help"], ["write", "--help"]]
        with self.pipe() as (reader, writer):
            os.close(reader)
            for done in self.cli_each(commands, stdout=writer, stderr=subprocess.PIPE, capture_output=False):
                with self.subTest(command=done.args[5:]):
                    self.assertRan(done)
                    self.assertEqual(done.stderr, b"")
        self.assertEqual(len(self.everything()), 400)
        for name in ("q", "r", "s", "t"):
            self.assertEqual(self.queue(name).count(), 100)

    def test_a_killed_reader_loses_nothing(self) -> None:
        bodies = [f"{n} {'x' * 50}" for n in range(3000)]
        self.queue().write_many(bodies)
        delivered: list[str] = []
        for wanted in (1, 50, 500):
            with self.pipe() as (reader, writer):
                child = self.start("read", "q", "--all", stdout=writer)
                os.close(writer)
                data = self.read_until(reader, lambda data, n=wanted: data.count(b"\n") >= n, "messages")  # type: ignore[misc]
                child.kill()
                child.wait()
                data += self.read_until(reader, lambda data: False, "the end")
            delivered += data.decode().splitlines()
            self.assertEqual(set(bodies) - set(delivered) - set(self.everything()), set())
        self.assertLess(len(delivered), 3000)


@unittest.skipUnless(POSIX, "needs descriptors as POSIX has them")
class OutputTest(CommandTest):
    """Standard streams that are closed, full, slow, sockets or terminals."""

    def test_output_that_cannot_be_written_is_an_error_and_the_message_stays(self) -> None:
        if not os.path.exists("/dev/full"):
            self.skipTest("there is no /dev/full")
        self.queue().write_many(["a", "b"])
        takers = [["read", "q"], ["read", "q", "--all"], ["peek", "q"], ["lease", "q"], ["watch", "q"], ["list"]]
        takers += [["watch", "q", "--peek"], ["watch", "q", "--move", "r"]]
        more = [["dump"], ["--status"], ["--version"], ["--help"], ["read", "--help"]]
        for target, commands in ("/dev/full", takers + more), ("&-", takers):
            script = "\n".join(f"broker {shlex.join(command)} >{target}; echo $? >&2" for command in commands)
            stderr = self.shell(script).stderr.decode()
            self.assertNotIn("Traceback", stderr)
            self.assertNotIn("Exception ignored", stderr)
            for command, line in zip(commands, re.findall(r"((?:.*\n)*?)(\d+)\n", stderr)):
                with self.subTest(command=command, target=target):
                    self.assertEqual(line[1], "1")
                    self.assertRegex(line[0], r"\Abroker: error: .+\n\Z")
            self.assertBodies(self.queue(), ["a", "b"])
            self.assertEqual(self.queue().stats(), (2, 0, 0))

    def test_a_write_that_prints_nothing_needs_no_standard_output(self) -> None:
        done = self.shell("broker write q a >&-; echo b | broker write q - >&-; echo c | broker write q --lines >&-")
        self.assertRan(done, b"")
        self.assertEqual(done.stderr, b"")
        self.assertBodies(self.queue(), ["a", "b\n", "c"])
        done = self.shell("broker write q d -t >&-")  # one that must print does not write what it cannot tell of
        self.assertRefused(done, "standard output")
        self.assertBodies(self.queue(), ["a", "b\n", "c"])

    def test_closed_standard_input_is_an_error_where_it_is_needed(self) -> None:
        done = self.shell("broker write q given <&- && broker read q <&- && broker list <&-")
        self.assertRan(done, b"given\n")
        commands = ["write q", "write q -", "write q --lines", "broadcast -", "load"]
        done = self.shell("".join(f"broker {command} <&-; echo $?\n" for command in commands))
        self.assertEqual(done.stdout, b"1\n" * 5)
        self.assertRegex(done.stderr, rb"\A(broker: error: standard input is closed\n){5}\Z")
        self.assertEqual(self.everything(), [])

    def test_closed_standard_error_changes_no_status_and_no_output(self) -> None:
        script = "broker --cleanup 2>&-; echo $?; broker read a/b 2>&-; echo $?; broker read q 2>&-; echo $?"
        self.assertEqual(self.shell(script).stdout, b"2\n1\n2\n")
        if os.path.exists("/dev/full"):
            self.assertEqual(self.shell(script.replace("&-", "/dev/full")).stdout, b"2\n1\n2\n")

    def test_all_of_a_large_output_reaches_a_slow_non_blocking_pipe_and_a_socket(self) -> None:
        bodies = [f"{n:05}{'x' * 9994}" for n in range(40)]  # each is larger than the pipe and the socket
        expected = "".join(f"{body}\n" for body in bodies).encode()

        def slowly(fd: int) -> bytes:
            data = b""
            while True:
                chunk = os.read(fd, 20_000)
                if not chunk:
                    return data
                data += chunk
                time.sleep(0.0001)

        for kind, blocking in ("pipe", False), ("socket", True), ("socket", False):
            with self.subTest(kind=kind, blocking=blocking):
                self.queue().write_many(bodies)
                if kind == "pipe":
                    reader, writer = os.pipe()
                else:
                    ours, theirs = socket.socketpair()
                    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                    reader, writer = ours.detach(), theirs.detach()
                os.set_blocking(writer, blocking)
                child = self.start("read", "q", "--all", stdout=writer)
                os.close(writer)
                data = slowly(reader)
                os.close(reader)
                self.assertTrue(data == expected, f"{len(data)} bytes of {len(expected)}")
                self.assertRan(self.finish(child))
                self.assertEqual(self.queue().stats().total, 0)

    def test_a_socket_that_is_closed_in_between_loses_nothing(self) -> None:
        bodies = [f"{n:05}{'x' * 995}" for n in range(1000)]
        self.queue().write_many(bodies)
        for command in (["read", "q", "--all"], ["watch", "q"]):
            ours, theirs = socket.socketpair()
            child = self.start(*command, stdout=theirs.fileno())
            theirs.close()
            self.assertEqual(len(ours.recv(1000)), 1000)
            ours.close()
            done = self.finish(child)
            self.assertIn(done.returncode, (0, 1))
            self.assertNotIn(b"Traceback", done.stderr)
        self.assertGreater(self.queue().count(), 0)

    def terminal(self) -> tuple[int, int]:
        """Both ends of a pseudo-terminal: ours, and the one for the command."""
        import pty

        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        return ours, theirs

    def test_progress_is_shown_on_a_terminal_only_and_not_with_quiet(self) -> None:
        (loud, loud_end), (quiet, quiet_end) = self.terminal(), self.terminal()
        children = [
            self.start("write", "q", "--lines", stderr=loud_end),
            self.start("write", "q", "--lines", "-q", stderr=quiet_end),
            self.start("write", "q", "--lines"),
        ]
        os.close(loud_end)
        os.close(quiet_end)
        stop = threading.Event()

        def feed() -> None:
            while not stop.wait(0.02):
                for child in children:
                    assert child.stdin is not None
                    child.stdin.write(b"line\n" * 1500)
                    child.stdin.flush()

        feeder = threading.Thread(target=feed)
        feeder.start()
        try:
            shown = self.read_until(loud, lambda data: re.search(rb"\d,\d\d\d", data), "progress")
        finally:
            stop.set()
            feeder.join()
        done = [self.finish(child) for child in children]
        shown += self.read_until(loud, lambda data: False, "the end of the terminal")
        self.assertIn(b"messages written", shown)
        self.assertRegex(shown, rb"(\n|\x1b\[\d?K\r?|\r +\r)\Z", "the last count is left under the next prompt")
        self.assertEqual(self.read_until(quiet, lambda data: False, "the end of the terminal"), b"")
        for each in done:
            self.assertRan(each, b"")
        self.assertEqual(done[2].stderr, b"")

    def test_a_vacuum_tells_a_terminal_what_it_is_about(self) -> None:
        (loud, loud_end), (quiet, quiet_end) = self.terminal(), self.terminal()
        self.queue().write("x")
        for options, end in (([], loud_end), (["-q"], quiet_end)):
            self.assertRan(self.finish(self.start("--vacuum", *options, stderr=end)), b"")
            os.close(end)
        self.assertRegex(self.read_until(loud, lambda data: False, "the end"), rb"bytes to vacuum: \d+,\d{3}\r?\n\Z")
        self.assertEqual(self.read_until(quiet, lambda data: False, "the end"), b"")

    def test_bodies_and_errors_look_the_same_on_a_terminal(self) -> None:
        self.queue().write_many(["é", "b\n"])
        ours, theirs = self.terminal()
        child = self.start("read", "q", "--all", stdout=theirs, stderr=theirs)
        child.wait(DEADLINE_S)
        refused = self.start("read", "a/b", "-q", stdout=theirs, stderr=theirs)  # -q hides no errors
        os.close(theirs)
        shown = self.read_until(ours, lambda data: b"digits" in data, "the error")
        self.assertRegex(shown, "\\Aé\r\nb\r\nbroker: error: queue name".encode())
        self.assertEqual((child.returncode, refused.wait(DEADLINE_S)), (0, 1))


@unittest.skipUnless(POSIX, "needs POSIX signals and a shell")
class WatchCommandTest(CommandTest):
    """broker watch."""

    def test_watch_prints_messages_as_they_come_and_removes_them(self) -> None:
        queue = self.queue()
        queue.write("before")
        child = self.start("watch", "q", "-t")
        self.assertRegex(self.read_line(child.stdout), rb"\A\d{19}\tbefore\n\Z")
        for number in range(3):
            id = queue.write(f"é{number}")
            self.assertEqual(self.read_line(child.stdout), f"{id}\té{number}\n".encode())
        self.wait_for_total(queue, 0)
        child.send_signal(signal.SIGTERM)
        self.assertRan(self.finish(child), b"")

    def test_watch_peek_follows_by_id_while_others_delete_and_move(self) -> None:
        queue = self.queue()
        ids = queue.write_many(["1", "2", "3"])
        child = self.start("watch", "q", "--peek", "--json", "--after", str(ids[0]))
        self.assertEqual(json.loads(self.read_line(child.stdout)), {"message": "2", "timestamp": str(ids[1])})
        queue.delete(message_id=ids[1])
        queue.move("r", message_id=ids[0])
        self.assertEqual(json.loads(self.read_line(child.stdout))["message"], "3")
        queue.move("r", message_id=ids[2])
        queue.write("4")
        self.assertEqual(json.loads(self.read_line(child.stdout))["message"], "4")
        self.assertBodies(queue, ["4"])
        child.send_signal(signal.SIGINT)
        self.assertRan(self.finish(child), b"")

    def test_watch_move_prints_and_moves(self) -> None:
        ids = self.queue().write_many(["1", "2"])
        child = self.start("watch", "q", "--move", "done", "--since", str(ids[0]))
        self.assertEqual(self.read_line(child.stdout), b"2\n")
        self.queue().write("3")
        self.assertEqual(self.read_line(child.stdout), b"3\n")
        self.wait_for(lambda: self.queue("done").count() == 2, "the second move")
        child.send_signal(signal.SIGTERM)
        self.assertRan(self.finish(child), b"")
        self.assertBodies(self.queue("done"), ["2", "3"])
        self.assertBodies(self.queue(), ["1"])

    def test_a_closed_pipe_ends_watch_at_the_next_message_which_stays(self) -> None:
        for number, options in enumerate(([], ["--peek"], ["--move", "done"])):
            queue = self.queue(f"q{number}")
            queue.write("read")
            with self.pipe() as (reader, writer):
                child = self.start("watch", f"q{number}", *options, stdout=writer)
                os.close(writer)
                self.assertEqual(os.read(reader, 5), b"read\n")
                expected = ["read", "stays"] if options == ["--peek"] else ["stays"]
                self.wait_for_total(queue, len(expected) - 1)
                os.close(reader)
                queue.write("stays")
                done = self.finish(child)
                self.assertRan(done)
                self.assertEqual(done.stderr, b"")
            self.assertBodies(queue, expected)
        self.assertBodies(self.queue("done"), ["read"])


@unittest.skipUnless(POSIX, "needs POSIX signals and a shell")
class WorkCommandTest(CommandTest):
    """broker work."""

    def sh(self, script: str, *options: str, queue: str = "q") -> list[str]:
        return ["work", queue, *options, "--", "sh", "-c", script]

    def test_the_command_gets_the_body_and_the_environment_and_its_success_acknowledges(self) -> None:
        bodies = ["no newline", "newline\n", "", "nul\0 é \r\n", "--help"]
        ids = self.queue().write_many(bodies)
        script = 'printf "%s %s %s:" "$BROKER_QUEUE" "$BROKER_MESSAGE_ID" "$BROKER_ATTEMPT"; cat'
        done = self.cli(*self.sh(script, "--drain"))
        self.assertRan(done, "".join(f"q {id} 1:{body}" for id, body in zip(ids, bodies)).encode())
        self.assertEqual(done.stderr, b"")
        self.assertEqual(self.everything(), [])
        self.assertRan(self.cli("work", "q", "--drain", "--", "cat"), b"")  # nothing there is a drained queue

    def test_the_command_may_use_the_same_database(self) -> None:
        self.queue().write_many(["1\n", "2\n"])
        broker = shlex.join([*PYTHON, "-m", "simplebroker", "-f", "test.db"])
        script = f"{broker} write r - && {broker} peek r --all"
        self.assertRan(self.cli(*self.sh(script, "--drain")), b"1\n1\n2\n")
        self.assertBodies(self.queue("r"), ["1\n", "2\n"])

    def test_failures_are_retried_with_growing_delays_and_end_in_the_dead_letter_queue(self) -> None:
        bodies = ["bytes\0\r\n", "", "é"]
        self.queue().write_many(bodies)
        clock = f'{shlex.join(PYTHON)} -E -c "import time; print(time.time())"'
        script = f'cat >/dev/null; test "$(wc -c < /dev/null)" = x; echo "$BROKER_MESSAGE_ID `{clock}`" >>log; exit 3'
        done = self.cli(*self.sh(script, "--drain", "--max-attempts", "3", "--backoff", "200ms"))
        self.assertRan(done, b"")
        self.assertBodies(self.queue("q.dead"), bodies)
        self.assertEqual(self.queue().stats().total, 0)
        self.assertEqual(len(re.findall(rb"(?m)^broker: .*attempt \d: exit status 3$", done.stderr)), 9)
        times: dict[str, list[float]] = {}
        for line in (self.dir / "log").read_text().splitlines():
            times.setdefault(line.split()[0], []).append(float(line.split()[1]))
        for first, second, third in times.values():
            self.assertGreaterEqual(second - first, 0.2)
            self.assertGreaterEqual(third - second, 0.4)

    def test_a_failed_command_may_succeed_later_and_others_go_to_the_queue_that_was_named(self) -> None:
        self.queue().write_many(["works at last", "never"])
        script = 'read -r body; echo "$body $BROKER_ATTEMPT"; test "$body$BROKER_ATTEMPT" = "works at last2"'
        options = ("--drain", "-j", "2", "--backoff", "10ms", "--max-attempts", "2", "--dead-letter", "failed")
        self.queue("q").write("killed by a signal\n")
        done = self.cli(*self.sh(script, *options))
        self.assertRan(done)
        lines = Counter(done.stdout.decode().splitlines())
        self.assertEqual(lines["works at last 1"] + lines["works at last 2"], 2)
        self.assertEqual(self.everything(), ["never", "killed by a signal\n"])
        self.assertBodies(self.queue("failed"), ["never", "killed by a signal\n"])
        done = self.cli(*self.sh("kill -9 $$", "--drain", "--max-attempts", "1", queue="failed"))
        self.assertRan(done, b"")
        self.assertEqual(done.stderr.count(b"killed by signal 9"), 2)
        self.assertBodies(self.queue("failed.dead"), ["never", "killed by a signal\n"])

    def test_so_many_commands_run_at_once_and_not_more(self) -> None:
        (self.dir / "run").mkdir()
        self.queue().write_many(["x"] * 4)
        meet = 'touch run/$BROKER_MESSAGE_ID; until [ "$(ls run | wc -l)" -eq 4 ]; do sleep 0.01; done'
        self.assertRan(self.cli(*self.sh(meet, "-j", "4", "--drain")), b"")  # ends only if four meet
        for name in os.listdir(self.dir / "run"):
            (self.dir / "run" / name).unlink()
        self.queue().write_many(["x"] * 8)
        count = "touch run/$BROKER_MESSAGE_ID; sleep 0.05; ls run | wc -l; rm run/$BROKER_MESSAGE_ID"
        done = self.cli(*self.sh(count, "--jobs", "2", "--drain"))
        self.assertRan(done)
        counts = [int(line) for line in done.stdout.split()]
        self.assertEqual((len(counts), max(counts)), (8, 2))

    def test_lines_of_commands_that_run_at_once_are_not_mixed(self) -> None:
        self.queue().write_many(["x"] * 12)
        script = "i=0; while [ $i -lt 60 ]; do printf '<%s' $BROKER_MESSAGE_ID; printf '<%s' $i >&2; "
        script += "printf ' %s>\\n' $i; printf ' %s>\\n' $BROKER_MESSAGE_ID >&2; i=$((i + 1)); done; printf end"
        done = self.cli(*self.sh(script, "-j", "4", "--drain"))
        self.assertRan(done)
        lines = done.stdout.decode().splitlines()
        self.assertEqual(lines.count("end"), 12)
        by_id: dict[str, list[str]] = {}
        for line in lines:
            if line != "end":
                self.assertRegex(line, r"\A<\d{19} \d+>\Z")
                by_id.setdefault(line[1:20], []).append(line[21:-1])
        self.assertEqual(list(by_id.values()), [[str(n) for n in range(60)]] * 12)
        for line in done.stderr.decode().splitlines():
            self.assertRegex(line, r"\A<\d+ \d{19}>\Z")

    def test_a_command_that_does_not_read_its_input_succeeds_all_the_same(self) -> None:
        self.queue().write_many(["x" * (1 << 20), "small"] * 2)
        self.assertRan(self.cli("work", "q", "--drain", "--", "true"), b"")
        self.queue().write_many(["x" * (1 << 20)] * 4)
        self.assertRan(self.cli("work", "q", "--drain", "-j", "2", "--", "true"), b"")
        self.assertEqual(self.everything(), [])

    def test_a_command_that_cannot_be_started_is_an_error_before_a_message_is_taken(self) -> None:
        self.queue().write("a")
        (self.dir / "plain").write_text("echo")
        broken = self.dir / "broken"
        broken.write_text("#!/no/such/interpreter\n")
        broken.chmod(0o755)
        for command in ("no-such-command", "./no-such-file", "./plain", "."):
            self.assertRefused(self.cli("work", "q", "-j", "2", "--", command), "cannot start", repr(command))
        leased = self.queue().lease(60)
        assert leased is not None
        self.assertEqual(leased.attempt, 1)
        self.queue().release(leased)
        self.assertRefused(self.cli("work", "q", "-j", "2", "--", "./broken"), "cannot start", "'./broken'")
        self.assertEqual(self.queue().stats(), (1, 0, 0))  # known only after it was taken: given back at once

    def test_the_lease_lasts_as_long_as_the_command_runs(self) -> None:
        queue = self.queue()
        queue.write("a")
        child = self.start(*self.sh("echo started; read line; sleep 0.8", "--lease", "200ms", "--drain"))
        self.assertEqual(self.read_line(child.stdout), b"started\n")
        while child.poll() is None:
            self.assertIsNone(queue.read())
            time.sleep(0.01)
        self.assertRan(self.finish(child), b"")
        self.assertEqual(queue.stats().total, 0)

    def test_drain_waits_for_what_others_hold(self) -> None:
        queue = self.queue()
        queue.write_many(["first", "second"])
        held = queue.lease(3600)
        assert held is not None
        child = self.start("work", "q", "--drain", "--", "cat")
        self.assertEqual(self.read_until(child.stdout.fileno(), lambda d: d == b"second", "it"), b"second")  # type: ignore[union-attr]
        self.assertIsNone(child.poll())
        queue.release(held)
        self.assertRan(self.finish(child), b"first")

    def test_the_first_sigterm_waits_for_the_running_commands_and_takes_no_more(self) -> None:
        queue = self.queue()
        ids = queue.write_many(["x"] * 500)
        script = "echo started; until [ -e go ]; do sleep 0.01; done; echo ended"
        child = self.start(*self.sh(script, "-j", "2"))
        assert child.stdout is not None
        out = self.read_until(child.stdout.fileno(), lambda data: data.count(b"\n") == 2, "two commands")
        child.send_signal(signal.SIGTERM)
        self.assertIsNone(self.outlasts(child, 0.3))
        self.assertEqual(queue.stats(), (498, 2, 0))
        (self.dir / "go").touch()
        done = self.finish(child)
        self.assertRan(done)
        out += done.stdout
        self.assertEqual(out.count(b"started"), out.count(b"ended"))
        left = queue.stats()  # 498, unless the worker came late to see the signal
        self.assertEqual(left, (500 - out.count(b"started"), 0, 0))
        self.assertGreater(left.ready, 0)
        self.assertNotEqual(queue.peek_many(1)[0].id, ids[0])

    def test_the_second_signal_ends_the_commands_and_gives_their_messages_back(self) -> None:
        queue = self.queue()
        queue.write_many(["1", "2", "3"])
        child = self.start(*self.sh("echo $$; exec sleep 1000", "-j", "2", "--backoff", "1h"))
        assert child.stdout is not None
        pids = self.read_until(child.stdout.fileno(), lambda data: data.count(b"\n") == 2, "two commands").split()
        child.send_signal(signal.SIGTERM)
        self.assertIsNone(self.outlasts(child, 0.2))
        child.send_signal(signal.SIGINT)
        self.assertRan(self.finish(child), b"")
        self.assertBodies(queue, ["1", "2", "3"])
        for pid in pids:
            with self.assertRaises(ProcessLookupError):
                os.kill(int(pid), 0)

    def test_a_process_that_a_command_leaves_behind_does_not_hold_up_the_work(self) -> None:
        self.queue().write_many(["1\n", "2\n", "3\n", "4\n"])
        # It keeps the output of the command open.
        child = self.start("work", "q", "-j", "2", "--drain", "--", "sh", "-c", "sleep 60 & echo $! >>pids; cat")
        try:
            done = self.finish(child)
        finally:
            for pid in (self.dir / "pids").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        self.assertRan(done)
        self.assertEqual(sorted(done.stdout.splitlines()), [b"1", b"2", b"3", b"4"])
        self.assertEqual(self.everything(), [])

    def test_output_that_is_read_slowly_is_waited_for(self) -> None:
        self.queue().write("1")
        hasty = "simplebroker.Job.OUTPUT_WAIT_S = 0.05"
        script = "head -c 300000 /dev/zero | tr '\\0' x; echo"  # more than fits into the pipes
        child = self.start_patched(hasty, *self.sh(script, "-j", "2", "--drain"))
        self.assertIsNone(self.outlasts(child, 0.5))
        self.assertEqual(self.queue().stats().leased, 1)
        self.assertRan(self.finish(child), b"x" * 300_000 + b"\n")

    def test_a_command_that_ignores_the_end_is_killed_after_a_while(self) -> None:
        self.queue().write("1")
        impatient = "simplebroker.Job.KILL_AFTER_S = 0.3"
        child = self.start_patched(impatient, *self.sh("trap '' TERM; echo started; while :; do sleep 0.1; done"))
        self.assertEqual(self.read_line(child.stdout), b"started\n")
        child.send_signal(signal.SIGTERM)
        self.assertIsNone(self.outlasts(child, 0.2))
        child.send_signal(signal.SIGTERM)
        self.assertRan(self.finish(child), b"")
        self.assertBodies(self.queue(), ["1"])

    @NEEDS_LOCKS
    def test_an_interrupt_at_the_terminal_reaches_the_worker_and_not_the_command(self) -> None:
        import fcntl
        import pty
        import termios

        self.queue().write_many(["x"] * 500)
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

        script = "echo started; until [ -e go ]; do sleep 0.01; done; echo ended"
        child = self.start(*self.sh(script), stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=take_terminal)
        os.close(theirs)
        shown = self.read_until(ours, lambda data: b"started" in data, "the command")
        os.write(ours, b"\x03")
        shown += self.read_until(ours, lambda data: b"^C" in data, "the echo")
        (self.dir / "go").touch()
        shown += self.read_until(ours, lambda data: False, "the end")
        self.assertEqual(child.wait(DEADLINE_S), 0, shown)
        self.assertEqual(shown.count(b"started"), shown.count(b"ended"))
        self.assertEqual(self.queue().stats(), (500 - shown.count(b"ended"), 0, 0))
        self.assertGreater(self.queue().count(), 0)

    def test_signals_are_heeded_although_another_thread_receives_them(self) -> None:
        # The kernel gives a signal to any thread that does not block it, such as one that just starts a command,
        # and the main thread, where Python runs handlers, sleeps on. Here it blocks them: another receives all.
        elsewhere = "import signal, threading\n"
        elsewhere += "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        elsewhere += "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})\n"
        elsewhere += WAITING.format("simplebroker.Alarm.wait")
        commands = ["work q -- cat", "work q -j 2 -- cat", "watch q", "read empty --wait", "peek empty --wait 100"]
        for command in commands:
            if " q" in command:
                self.queue().write("a\n")
            child = self.start_patched(elsewhere, *command.split())
            if " q" in command:
                self.assertEqual(self.read_line(child.stdout), b"a\n")
            self.assertEqual(self.read_line(child.stderr), b"waiting\n")  # it is idle
            child.send_signal(signal.SIGTERM if " q" in command else signal.SIGINT)
            self.assertIsNotNone(self.outlasts(child, DEADLINE_S / 3), command)
            self.assertNotIn(b"Traceback", self.finish(child).stderr)
            self.assertEqual(child.returncode in (0, 130), True, command)

    def test_the_main_thread_sleeps_long_only_if_no_other_thread_can_take_its_signals(self) -> None:
        main, checks = threading.main_thread(), simplebroker.signal_check_s
        ours = [threading.Thread(name=name) for name in (simplebroker.ATTENDANT_NAME, simplebroker.LOCK_THREAD_NAME)]
        long = simplebroker.ALONE_SIGNAL_CHECK_S if sys.platform == "linux" else simplebroker.SIGNAL_CHECK_S
        with mock.patch.object(threading, "enumerate") as threads:
            threads.return_value = [main, *ours]
            self.assertEqual(checks(), long)
            threads.return_value = [main, *ours, threading.Thread()]
            self.assertEqual(checks(), simplebroker.SIGNAL_CHECK_S)

    def test_sigterm_always_stops_a_worker_in_the_middle_of_its_work(self) -> None:
        for _ in range(200 if FULL else 3):
            self.queue().write_many(["x"] * max(0, 1000 - self.queue().count()))  # it must not run out of them
            child = self.start("work", "q", "-j", "3", "--", "echo", "done")
            self.assertEqual(self.read_line(child.stdout), b"done\n")
            child.send_signal(signal.SIGTERM)
            self.assertRan(self.finish(child))

    def test_what_commands_print_into_a_closed_pipe_is_not_taken_for_done(self) -> None:
        for jobs in ("1", "2"):
            with self.subTest(jobs=jobs), self.pipe() as (reader, writer):
                self.queue(f"j{jobs}").write_many([str(n) for n in range(1, 6)])
                os.close(reader)
                command = ["work", f"j{jobs}", "-j", jobs, "--drain", "--backoff", "1ms", "--", "cat"]
                done = self.cli(*command, stdout=writer, stderr=subprocess.PIPE, capture_output=False)
                self.assertNotIn(b"Traceback", done.stderr)
                self.assertEqual(len(self.everything()), 5)  # wherever they are now
                self.broker().delete_database()

    def test_several_commands_run_with_closed_standard_output(self) -> None:
        self.queue().write_many(["1", "2"])
        done = self.shell("broker work q -j 2 --drain --max-attempts 1 -- sh -c 'cat >>got' >&-")
        self.assertRan(done, b"")
        self.assertEqual(sorted((self.dir / "got").read_text()), ["1", "2"])
        self.assertEqual(self.everything(), [])


@unittest.skipUnless(POSIX, "needs POSIX signals")
class InterruptTest(CommandTest):
    """Ctrl-C at any moment: no traceback, nothing lost."""

    def test_an_interrupted_wait_ends_without_a_traceback(self) -> None:
        for command in (["read", "q", "--wait"], ["peek", "q", "--wait", "60"]):
            child = self.start_patched(WAITING.format("simplebroker.Alarm.wait"), *command)
            self.assertEqual(self.read_line(child.stderr), b"waiting\n")
            child.send_signal(signal.SIGINT)
            done = self.finish(child)
            self.assertNotIn(b"Traceback", done.stderr)
            self.assertIn(done.returncode, (1, 130, -signal.SIGINT))
            self.assertEqual(done.stdout, b"")

    def test_an_interrupted_reader_gives_back_what_was_not_read(self) -> None:
        bodies = [str(n) for n in range(2000)]
        self.queue().write_many(bodies)
        for command in (["read", "q", "--all"], ["watch", "q"]):
            with self.pipe() as (reader, writer):
                child = self.start(*command, stdout=writer)
                os.close(writer)
                data = self.read_until(reader, lambda data: data.count(b"\n") >= 100, "messages")
                child.send_signal(signal.SIGINT)
                data += self.read_until(reader, lambda data: False, "the end")
                done = self.finish(child)
            self.assertNotIn(b"Traceback", done.stderr)
            delivered = data.decode().splitlines()
            self.assertEqual(self.queue().stats()[1:], (0, 0))  # no lease is left
            self.assertEqual(set(bodies) - set(self.everything()) - set(delivered), set())
            bodies = self.everything()

    def test_an_interrupted_writer_of_lines_has_written_whole_lines(self) -> None:
        child = self.start("write", "q", "--lines", "-t")
        assert child.stdin is not None
        child.stdin.write(b"one\ntwo\nthr")
        child.stdin.flush()
        self.read_line(child.stdout)
        child.send_signal(signal.SIGINT)
        done = self.finish(child)
        self.assertNotIn(b"Traceback", done.stderr)
        self.assertNotEqual(done.returncode, 0)
        self.assertBodies(self.queue(), ["one", "two"])


GENERATED = '''
import random, re

seed, count, commands = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
rng = random.Random(seed)
patience_s = 0.03  # many of them watch, work or wait for ever
os.makedirs("sub/deep", exist_ok=True)
with open("foreign.db", "wb") as file:
    file.write(b"not a database at all, but long enough to look at" * 20)
queue = simplebroker.Queue("q", "x.db")
ids = [str(id) for id in queue.write_many(["1", "2", "3"])]
queue.close()

queues = ["q", "q", "q", "r", "q.dead", "a-b_c.9", "-q", ".q", "", "a/b", "q\\n", "x" * 513, "\\u00e9", "\\udcff"]
texts = ["hello", "", "-", "--", "-5", "-x", "--cleanup", "--help", "\\u00e9\\u20ac", "\\udcff", "\\0", "x" * 2000]
leases = [ids[0] + end for end in (".1", ".1", ".2", ".0", ".x", ".", "")]
numbers = ["1", "2", "10", "0", "-1", "1.5", "x", "", "99999999999", "9" * 5000, "\\u0663"]
some_ids = [*ids, *leases, "1", "0" * 19, "9" * 19, "9223372036854775807", "-1", "1e3", "x", "", "\\u0661" * 19]
times = [*some_ids, "2024-01-15", "2024-13-45", "1705314600", "1705314600.5s", "1705314600000ms", "now", "1_000"]
times += ["+5", " 5", "0x10", "9" * 30, "2024-01-15T10:30:00+99:99", "1.5.5", "0001-01-01", "9999-12-31T23:59:59.9Z"]
durations = ["0", "1", "10ms", "0.5s", "5m", "2h", "1d", "-1", "1e9", "nan", "inf", "99999999d", "1w", "", "x", ".5"]
files = ["x.db", "y.db", "foreign.db", "sub", "../z.db", "", "\\n", "sub/deep/w.db", "no/such/w.db", "\\udcff.db"]
files.append("x" * 300)
values = {"-m": some_ids, "--message-id": some_ids, "--after": times, "--since": times, "--before": times}
values.update({"-n": numbers, "--number": numbers, "--delay": durations, "--for": durations})
values.update({"--lease": durations, "-f": files})
values.update({"--backoff": ["1ms", "0", "x"], "--wait": ["0", "1ms", "x", "-1"], "-j": ["1", "2", "0", "x"]})
values.update({"--max-attempts": ["1", "2", "0", "x"], "--dead-letter": queues, "--move": queues})
values["--pattern"] = ["*", "q*", "[", "[!a", "?", "", "\\udcff"]
values["-d"] = [".", "sub", "missing", "x.db", "", "\\0"]
plain = ["--all", "--json", "-t", "--lines", "--stats", "--drain", "--peek", "-q"]
actions = ["--status", "--vacuum", "--cleanup", "--version", "--help", "-h"]
strange = ["--nonsense", "--al", "-x", "-qt", "--all=1", "--json="]
operands = {"QUEUE": queues, "DEST": queues, "TEXT": texts, "LEASE": leases}
programs = [["true"], ["false"], ["cat"], ["sh", "-c", "exit 3"], ["no-such-command"], [""], []]


def option(own):
    """An option, mostly of the command's own, mostly with its value."""
    others = [*plain, *values] if rng.random() < 0.9 else actions + strange
    name = rng.choice(own if own and rng.random() < 0.7 else others)
    if name not in values:
        return [name]
    value = rng.choice(values[name])
    return rng.choice([[name, value], [name, value], [name, value], [name + "=" + value], [name + value], [name]])


def command_line():
    kind = rng.random()
    if kind < 0.15:  # any words in any order
        words = [*commands, *queues, *texts, *plain, *actions, *strange, *values, *some_ids]
        return [rng.choice(words) for _ in range(rng.randrange(6))]
    line = ["-f", "x.db"] if rng.random() < 0.8 else []
    if kind < 0.22:
        return line + [rng.choice(actions)] + (option([]) if rng.random() < 0.3 else [])
    command = rng.choices(list(commands), [1 if name in ("work", "watch") else 8 for name in commands])[0]
    spec, own = (words.split() for words in commands[command])
    groups = [[rng.choice(operands[name] if rng.random() < 0.4 else operands[name][:4])] for name in spec]
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        groups.insert(rng.randrange(len(groups) + 1), option(own))
    line += [command] + [word for group in groups for word in group]
    if command == "work":
        line += rng.choice([["--drain"], []]) + ["--"] + rng.choice(programs)
    elif rng.random() < 0.1:
        line.insert(rng.randrange(len(line) + 1), "--")
    return line


seen = {}
for number in range(count):
    argv = command_line()
    status, out, err = run_line(argv, b"line one\\nline two\\n\\xc3\\xa9\\n")
    right = status in (0, 1, 2, -signal.SIGTERM) and b"Traceback" not in err
    if not right or (status == 1 and not re.search(rb"\\A(.*\\n)*broker: error: .+\\n\\Z", err)):
        wrong = {"seed": seed, "number": number, "argv": argv, "status": status, "stderr": err}
        os.write(report, ascii(wrong).encode() + b"\\n")
    seen[status] = seen.get(status, 0) + 1
os.write(report, b"end " + ascii(seen).encode() + b"\\n")
'''


@unittest.skipUnless(POSIX, "needs POSIX signals")
class GeneratedCommandLinesTest(CommandTest):
    """Whatever the words are: no traceback, and status 0, 1 or 2."""

    def test_generated_command_lines_end_with_status_0_1_or_2_and_no_traceback(self) -> None:
        seed, count = random.randrange(10**6), 5000 if FULL else 400
        seed = int(os.environ.get("TEST_SEED", seed))
        children = []
        for number in range(2):  # two processes, so that two cores are used
            place = self.dir / str(number)
            place.mkdir()
            args = [*PYTHON, "-c", RUN_LINES + GENERATED, str(seed + number), str(count), json.dumps(COMMANDS)]
            child = subprocess.Popen(args, cwd=place, env=self.environ, stdout=subprocess.PIPE)
            self.addCleanup(self.reap, child)
            children.append(child)
        for child in children:
            *wrong, end = ["", *child.communicate(timeout=20 * DEADLINE_S)[0].decode().splitlines()]
            self.assertEqual(wrong, [""], f"TEST_SEED={seed}")
            self.assertRegex(end, r"\Aend \{", f"TEST_SEED={seed}")
            for status in (0, 1, 2):
                self.assertIn(f"{status}: ", end)


# ---------------------------------------------------------------------------------------------------
# README.md.
# ---------------------------------------------------------------------------------------------------


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
        return subprocess.run(command, cwd=self.dir, env=environ, capture_output=True, timeout=DEADLINE_S, check=False)

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


class ExamplesUsePublicNamesTest(unittest.TestCase):
    """No example reaches into a private name of the module."""

    @staticmethod
    def private_names(tree: ast.AST, defined: bool) -> set[str]:
        """The names with one leading underscore that code defines, or that it uses."""
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and defined:
                found.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store) == defined:
                found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
            elif isinstance(node, ast.ImportFrom) and not defined:
                found.update(alias.name for alias in node.names)
        return {name for name in found if name.startswith("_") and not name.startswith("__") and name != "_"}

    def reaches(self, code: str) -> set[str]:
        """The private names of simplebroker that this code uses and does not define itself."""
        ours = self.private_names(ast.parse((ROOT / "simplebroker.py").read_text(encoding="utf-8")), defined=True)
        tree = ast.parse(code)
        return (self.private_names(tree, defined=False) - self.private_names(tree, defined=True)) & ours

    def test_the_check_finds_what_it_looks_for(self) -> None:
        self.assertEqual(self.reaches("queue._take(0, 1, 1); self._mine = 1; self._mine"), {"_take"})
        self.assertEqual(self.reaches("from simplebroker import _abandon"), {"_abandon"})

    def test_no_example_uses_a_private_name(self) -> None:
        for path in sorted(EXAMPLES.glob("*.py")):
            with self.subTest(path.name):
                self.assertEqual(self.reaches(path.read_text(encoding="utf-8")), set())

    def test_no_code_in_the_guides_uses_a_private_name(self) -> None:
        for path in sorted(EXAMPLES.glob("*.md")):
            blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
            code = "\n".join("async def block():\n" + textwrap.indent(block, "    ") for block in blocks)
            code = re.sub(r"^ +from __future__ .*$", "", code, flags=re.MULTILINE)
            with self.subTest(path.name):
                self.assertEqual(self.reaches(code + "\npass"), set())


# ---------------------------------------------------------------------------------------------------
# Examples: Python, nothing but the standard library.
# ---------------------------------------------------------------------------------------------------


FAST = Settings(sync_mode="OFF")


IMPATIENT = Settings(sync_mode="OFF", busy_timeout_ms=50)


def example(name: str) -> Any:
    """An example as a module."""
    return importlib.import_module(name)


class ExampleTest(unittest.TestCase):
    """A temporary directory with a database path, processes that are killed at the end, and no log on the terminal."""

    quiet = True

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="examples-test-")
        self.addCleanup(directory.cleanup)
        self.dir = Path(directory.name).resolve()
        self.path = self.dir / "test.db"
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
        self.environ.update(PYTHONPATH=os.pathsep.join((str(ROOT), str(EXAMPLES))), BROKER_SYNC_MODE="OFF")
        self.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each start compiles simplebroker.py anew
        if self.quiet:
            logging.disable(logging.CRITICAL)
            self.addCleanup(logging.disable, logging.NOTSET)

    def broker(self, settings: Settings = FAST) -> Broker:
        """A broker on the test's database, closed at the end. Other settings: another connection."""
        broker = Broker(self.path, settings=settings)
        self.addCleanup(broker.close)
        return broker

    def start(self, code: str, *args: object) -> subprocess.Popen[str]:
        """Start Python code as a process of its own, in which the examples can be imported; killed at the end."""
        child = subprocess.Popen(
            [*PYTHON, "-c", textwrap.dedent(code), *map(str, args)],
            cwd=self.dir,
            env=self.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(self.reap, child)
        return child

    @staticmethod
    def reap(child: subprocess.Popen[str]) -> None:
        """End a process and close its pipes."""
        if child.poll() is None:
            child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def line(self, child: subprocess.Popen[str]) -> str:
        """The next line that a child prints; fails if it hangs."""
        assert child.stdout is not None
        watchdog = threading.Timer(DEADLINE_S, child.kill)
        watchdog.start()
        try:
            return child.stdout.readline().rstrip("\n")
        finally:
            watchdog.cancel()

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Wait until a condition is true; fails at the deadline."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > deadline:
                self.fail(f"did not happen within {DEADLINE_S} s: {what}")
            time.sleep(0.005)

    def hold_writer_lock(self) -> Callable[[], None]:
        """Keep all writers out, as a connection of another process would; returns what lets them in again."""
        held, end = threading.Event(), threading.Event()

        def hold() -> None:
            with Broker(self.path, settings=Settings(sync_mode="NORMAL")) as other, other.transaction():
                held.set()
                end.wait(DEADLINE_S)

        thread = threading.Thread(target=hold)
        thread.start()
        self.assertTrue(held.wait(DEADLINE_S))

        def release() -> None:
            end.set()
            thread.join()

        self.addCleanup(release)
        return release


# What the examples print. Ids are replaced by ID; "*" is any text.
EXPECTED = {
    "python_api": """
        -- basics
        peek: first
        read: first
        moved: second
        deleted: 2 from tasks
        empty: None
        queues: {'archive': 1}
        -- ids_and_times
        by id: b True just written: True
        after the first: ['b', 'c']
        stats: Stats(ready=3, leased=0, delayed=1)
        -- retry_with_dead_letter
        paid: 42 dead: ['not a number']
        -- errors
        busy, so nothing was written: 0
        refused: *
        -- custom_watcher
        ordered: 12 rejected: ['{broken']
        -- checkpoints
        checkpoint: ['1', '2'] ['3', '4', '5', '6'] still there: 6
        -- shutdown_of_threads
        jobs: 30 different: 30 left: 0
        """,
    "simple_watcher_example": """
        -- simple_print_handler
        [ID] hello
        [ID] ! read this
        -- json_print_handler
        {"message": "hello", "timestamp": "ID"}
        {"message": "! read this", "timestamp": "ID"}
        -- logger_handler
        INFO simplebroker: message ID: hello
        INFO simplebroker: message ID: ! read this
        -- important_only
        [ID] ! READ THIS
        -- error handler
        handled: good
        attempt 1 failed: cannot handle 'shy'
        attempt 1 failed: cannot handle 'bad'
        handled: shy
        attempt 2 failed: cannot handle 'bad'
        WARNING simplebroker: *
        dead: bad
        """,
    "async_wrapper": """
        size: 2 peek: hello
        pop: hello goodbye None
        jobs: 30 different: 30 left: 0
        watch: good
        watch: fine
        dead: bad
        cancelled: True later: not lost
        watch ended: True
        """,
    "multi_queue_watcher": """
        mail 'bad', attempt 1: no such address
        mail 'bad', attempt 2: no such address
        first rounds: logs:0 orders:0 mails:bad logs:1 orders:1 mails:bad
        handled: 105 rounds: 102 dead: bad
        """,
    "multi_queue_patterns": """
        -- priorities
        strict: urgent 1, normal 1, urgent 2, normal 2, low 1
        weighted: h0, h1, h2, l0, h3, l1, l2, l3
        -- load_balancing
        balanced: {'worker.1': 4, 'worker.2': 4, 'worker.3': 4}
        handled: {'worker.1': 4, 'worker.2': 4, 'worker.3': 4}
        -- errors_by_queue
        left: {'metrics': 0, 'mails': 0, 'ledger': 1, 'failed': 1}
        -- metrics
        a: 2 handled, 2 failed, 0 waiting
        b: 1 handled, 0 failed, 0 waiting
        timed: True
        -- dynamic_queues
        seen: ['1a', '2a', '2b'] watched: ['control', 'tenant.2'] left: 1
        """,
    "outbox": """
        killed after the row: 0 orders, 0 messages
        killed after the message, before the commit: 0 orders, 0 messages
        failed: 0 orders, 0 messages
        taken: 1 orders, 1 messages
        another process reads: {"order": 1, "item": "lamp"}
        then: 1 orders, 0 messages
        """,
}


NEEDS = {"multi_queue_patterns": ["multi_queue_watcher"]}  # examples that have to be copied too


ANY_ORDER = {"simple_watcher_example"}  # retries of two messages may overtake each other on a slow machine


class PythonExamplesPrintTheirResults(ExampleTest):
    def assertPrints(self, name: str, directory: Path, script: str) -> str:
        done = subprocess.run(
            [sys.executable, script],
            cwd=directory,
            env={key: value for key, value in self.environ.items() if key != "PYTHONPATH"},
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE_S,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        printed = re.sub(r"\b\d{19}\b", "ID", done.stdout).splitlines()
        if name in EXPECTED:
            expected = textwrap.dedent(EXPECTED[name]).strip().splitlines()
            if name in ANY_ORDER:
                printed, expected = sorted(printed), sorted(expected)
            self.assertEqual(len(printed), len(expected), done.stdout)
            for line, wanted in zip(printed, expected):
                self.assertRegex(line, "^" + re.escape(wanted).replace(r"\*", ".*") + "$")
        return done.stdout + done.stderr

    def run_both(self, name: str) -> list[str]:
        """From the repository root, and copied into a fresh directory beside simplebroker.py, both at once."""
        fresh = self.dir / "fresh"
        fresh.mkdir()
        shutil.copy(ROOT / "simplebroker.py", fresh)
        for each in (name, *NEEDS.get(name, [])):
            shutil.copy(EXAMPLES / f"{each}.py", fresh)
        before = sorted(path.name for path in fresh.iterdir())
        outputs: list[str] = []
        errors: list[BaseException] = []

        def run(directory: Path, script: str) -> None:
            try:
                outputs.append(self.assertPrints(name, directory, script))
            except BaseException as error:  # noqa: BLE001 (raised below)
                errors.append(error)

        threads = [
            threading.Thread(target=run, args=(ROOT, os.path.join("examples", f"{name}.py"))),
            threading.Thread(target=run, args=(fresh, f"{name}.py")),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        after = sorted(path.name for path in fresh.iterdir() if path.name != "__pycache__")
        self.assertEqual(after, before, "the example left something behind")
        return outputs

    def test_python_api(self) -> None:
        self.run_both("python_api")

    def test_simple_watcher_example(self) -> None:
        self.run_both("simple_watcher_example")

    def test_async_wrapper(self) -> None:
        self.run_both("async_wrapper")

    def test_multi_queue_watcher(self) -> None:
        self.run_both("multi_queue_watcher")

    def test_multi_queue_patterns(self) -> None:
        self.run_both("multi_queue_patterns")

    def test_logging_runner(self) -> None:
        for output in self.run_both("logging_runner"):
            self.assertIn("read: first\nleft: 1\n", output)
            self.assertIn("\nINSERT_MESSAGE: 2\n", output)
            self.assertRegex(output, r"COMMIT +\d+\.\d\d ms  done\n")

    def test_outbox(self) -> None:
        self.run_both("outbox")


class PythonApiExample(ExampleTest):
    def test_a_follower_that_is_killed_sees_every_message_and_repeats_one_per_kill_at_most(self) -> None:
        total, kills = 40, 2
        self.broker().queue("log").write_many(str(number) for number in range(total))
        code = """
            import sys
            from pathlib import Path
            import python_api
            save = python_api.save_checkpoint
            def tell(file, last_id):  # the work is done, the checkpoint is not written yet
                print("at", last_id, flush=True)
                if limit and int(sys.stdin.readline() or 0):
                    save(file, last_id)
                elif not limit:
                    save(file, last_id)
            limit = int(sys.argv[2])
            python_api.save_checkpoint = tell
            python_api.checkpoint_processing(Path(sys.argv[1]), Path("checkpoint"))
            print("end", flush=True)
        """
        seen: Counter[str] = Counter()
        for kill in range(kills):
            child = self.start(code, self.path, 1)
            assert child.stdin is not None
            for step in range(5 + kill):
                seen[self.line(child)] += 1
                if step < 4 + kill:
                    child.stdin.write("1\n")
                    child.stdin.flush()
            child.kill()  # after the work and before its checkpoint
            child.wait()
        child = self.start(code, self.path, 0)
        while (line := self.line(child)) != "end":
            self.assertTrue(line.startswith("at "), line)
            seen[line] += 1
        self.assertEqual(len(seen), total)
        self.assertEqual(sorted(seen.values(), reverse=True)[: kills + 1], [2] * kills + [1])

    def test_a_saved_checkpoint_replaces_the_old_one_and_leaves_no_other_file(self) -> None:
        file = self.dir / "checkpoint"
        for last_id in (1, 1837025672140161024):
            example("python_api").save_checkpoint(file, last_id)
            self.assertEqual(file.read_text(), str(last_id))
        self.assertEqual([path.name for path in self.dir.iterdir()], ["checkpoint"])


class AsyncBrokerTest(ExampleTest):
    """Runs each test's coroutine with a deadline."""

    def run_async(self, test: Callable[[Any], Any], settings: Settings = FAST) -> None:
        async def main() -> None:
            async with example("async_wrapper").AsyncBroker(self.path, settings=settings) as broker:
                await asyncio.wait_for(test(broker), DEADLINE_S)

        asyncio.run(main())

    async def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > deadline:
                self.fail(f"did not happen: {what}")
            await asyncio.sleep(0.005)
            if sys.implementation.name == "pypy":
                gc.collect()  # generators that were left are closed when they are found


class AsyncBrokerSingleMessages(AsyncBrokerTest):
    def test_the_snippet_of_the_documentation_works_verbatim(self) -> None:
        snippet = """\
from async_wrapper import AsyncBroker

async with AsyncBroker("broker.db") as broker:
    await broker.push("myqueue", "Hello async!")
    msg = await broker.pop("myqueue")
"""
        head, body = snippet.split("\n\n")
        code = "import asyncio\n" + head + "\nasync def main():\n" + textwrap.indent(body, "    ")
        child = self.start(code + "    print(msg)\nasyncio.run(main())\n")
        self.assertEqual(self.line(child), "Hello async!")
        self.assertTrue((self.dir / "broker.db").exists())

    def test_push_pop_peek_and_size_do_what_they_say(self) -> None:
        async def test(broker: Any) -> None:
            self.assertIsNone(await broker.pop("q"))
            self.assertIsNone(await broker.peek("q"))
            first = await broker.push("q", "one")
            await broker.push("q", "two")
            await broker.push("q", "held", delay=60)
            self.assertEqual(await broker.size("q"), 2)
            peeked = await broker.peek("q")
            self.assertEqual((peeked, peeked.id), ("one", first))
            self.assertEqual([await broker.pop("q") for _ in range(3)], ["one", "two", None])

        self.run_async(test)

    def test_an_empty_body_is_a_message(self) -> None:
        async def test(broker: Any) -> None:
            await broker.push("q", "")
            popped = await broker.pop("q", wait=0)
            self.assertIsInstance(popped, Message)
            await broker.push("q", "")
            self.assertEqual([message async for message in broker.stream_messages("q", wait=None)], [""])

        self.run_async(test)

    def test_calls_are_made_in_the_order_in_which_they_were_asked_for(self) -> None:
        async def test(broker: Any) -> None:
            await asyncio.gather(*(broker.push("q", str(number)) for number in range(100)))
            popped = await asyncio.gather(*(broker.pop("q") for _ in range(100)))
            self.assertEqual(popped, [str(number) for number in range(100)])

        self.run_async(test)

    def test_errors_of_the_broker_reach_the_caller(self) -> None:
        async def test(broker: Any) -> None:
            for call in (broker.push("-bad", "x"), broker.pop("bad/"), broker.push("q", "\ud800")):
                with self.assertRaises(ValueError):
                    await call
            with self.assertRaises(TypeError):
                await broker.push("q", b"bytes")

        self.run_async(test)

    def test_a_waiting_pop_gets_what_another_process_writes(self) -> None:
        async def test(broker: Any) -> None:
            waiting = asyncio.create_task(broker.pop("q", wait=DEADLINE_S))
            child = self.start(
                "import sys, simplebroker; sys.exit(simplebroker.main(['-f', 'test.db', 'write', 'q', 'from afar']))"
            )
            self.assertEqual(await waiting, "from afar")
            child.wait()

        self.run_async(test)

    def test_a_waiting_pop_gets_a_delayed_message_when_it_is_due(self) -> None:
        async def test(broker: Any) -> None:
            await broker.push("q", "late", delay=0.2)
            self.assertEqual(await broker.pop("q", wait=DEADLINE_S), "late")

        self.run_async(test)

    def test_a_waiting_pop_returns_none_after_its_time(self) -> None:
        async def test(broker: Any) -> None:
            begin = time.monotonic()
            self.assertIsNone(await broker.pop("q", wait=0.1))
            self.assertGreaterEqual(time.monotonic() - begin, 0.09)

        self.run_async(test)

    def test_any_number_of_tasks_can_wait_and_they_keep_no_threads(self) -> None:
        async def test(broker: Any) -> None:
            before = threading.active_count()
            tasks = [asyncio.create_task(broker.pop("q", wait=DEADLINE_S)) for _ in range(100)]
            await broker.size("q")  # all of them have come to look
            await asyncio.sleep(0)
            self.assertLessEqual(threading.active_count() - before, 3)
            for number in range(100):
                await broker.push("q", str(number))
            popped = await asyncio.gather(*tasks)
            self.assertEqual(sorted(popped, key=int), [str(number) for number in range(100)])

        self.run_async(test)

    def test_the_event_loop_runs_on_while_the_database_is_busy(self) -> None:
        async def test(broker: Any) -> None:
            await broker.push("q", "make the file")
            release = self.hold_writer_lock()
            push = asyncio.create_task(broker.push("q", "x"))
            for _ in range(20):
                await asyncio.sleep(0.001)
            self.assertFalse(push.done())
            await asyncio.get_running_loop().run_in_executor(None, release)
            await push

        self.run_async(test)

    def test_cancelled_pops_lose_nothing_and_reorder_nothing(self) -> None:
        total = 300
        written = self.broker().queue("q").write_many(str(number) for number in range(total))

        async def test(broker: Any) -> None:
            popped: list[int] = []
            cancelled = 0
            for turn in range(2 * total):
                task = asyncio.create_task(broker.pop("q", wait=None if turn % 2 else 5.0))
                if turn % 3:
                    for _ in range(turn % 7):  # let it come to different points
                        await asyncio.sleep(0 if turn % 5 else 0.0003)
                    task.cancel()
                try:
                    message = await task
                except asyncio.CancelledError:
                    cancelled += 1
                    continue
                self.assertIsNotNone(message)
                popped.append(message.id)
                if len(popped) == 150:
                    break
            self.assertGreater(cancelled, 50)
            left = [message.id async for message in broker.stream_messages("q", wait=None)]
            self.assertEqual(popped + left, written)

        self.run_async(test)


class AsyncBrokerStreams(AsyncBrokerTest):
    def test_a_message_is_acknowledged_after_the_body_of_the_loop(self) -> None:
        queue = self.broker().queue("q")
        queue.write_many(["a", "b", "c"])

        async def test(broker: Any) -> None:
            total = 3
            async for message in broker.stream_messages("q", wait=None):
                self.assertIsNotNone(queue.peek(message_id=message.id))  # still there
                self.assertEqual(queue.stats().total, total)  # and those before it are not
                total -= 1
            self.assertEqual(queue.stats().total, 0)

        self.run_async(test)

    def test_break_gives_the_message_back_and_counts_its_attempt_and_no_other(self) -> None:
        queue = self.broker().queue("q")
        queue.write_many(str(number) for number in range(20))

        async def test(broker: Any) -> None:
            async for message in broker.stream_messages("q"):
                if message == "9":
                    break
            await self.until(lambda: queue.stats().leased == 0, "the rest is given back")

        self.run_async(test)
        left = queue.peek_many(20)
        self.assertEqual(left, [str(number) for number in range(9, 20)])
        self.assertEqual([message.attempt for message in left], [1] + [0] * 10)

    def test_an_error_in_the_body_gives_the_message_back(self) -> None:
        queue = self.broker().queue("q")
        queue.write_many(["a", "b"])

        async def test(broker: Any) -> None:
            with self.assertRaisesRegex(RuntimeError, "broken"):
                async for _ in broker.stream_messages("q"):
                    raise RuntimeError("broken")

        self.run_async(test)  # close() gives back what the garbage collector has not
        self.assertEqual(queue.stats(), simplebroker.Stats(2, 0, 0))

    def test_cancelling_a_consumer_gives_back_what_it_has(self) -> None:
        queue = self.broker().queue("q")
        queue.write_many(["a", "b"])

        async def test(broker: Any) -> None:
            reached: asyncio.Event = asyncio.Event()

            async def consume() -> None:
                async for _ in broker.stream_messages("q"):
                    reached.set()
                    await asyncio.sleep(DEADLINE_S)

            task = asyncio.create_task(consume())
            await reached.wait()
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task
            await self.until(lambda: queue.stats().ready == 2, "both are ready again")

        self.run_async(test)

    def test_closing_the_generator_gives_back_at_a_known_moment(self) -> None:
        queue = self.broker().queue("q")
        queue.write("a")

        async def test(broker: Any) -> None:
            stream = broker.stream_messages("q")
            self.assertEqual(await stream.__anext__(), "a")
            self.assertEqual(queue.stats().leased, 1)
            await stream.aclose()
            self.assertEqual(queue.stats().ready, 1)

        self.run_async(test)

    def test_close_gives_back_what_an_abandoned_stream_holds_and_ends_all_threads(self) -> None:
        queue = self.broker().queue("q")
        queue.write("a")
        before = set(threading.enumerate())

        async def main() -> Any:
            async with example("async_wrapper").AsyncBroker(self.path, settings=IMPATIENT) as broker:
                stream = broker.stream_messages("q")
                self.assertEqual(await stream.__anext__(), "a")
            self.assertEqual(queue.stats().ready, 1)
            return stream  # nobody has closed it

        asyncio.run(main())
        self.wait_for(lambda: set(threading.enumerate()) <= before, "the threads of the broker end")

    def test_the_lease_is_renewed_while_the_body_runs(self) -> None:
        queue = self.broker().queue("q")
        queue.write("a")

        async def test(broker: Any) -> None:
            async for _ in broker.stream_messages("q", lease=0.3, wait=None):
                end = time.monotonic() + 0.65
                while time.monotonic() < end:
                    self.assertFalse(queue.has_pending(), "the lease has ended")
                    await asyncio.sleep(0.02)

        self.run_async(test)
        self.assertEqual(queue.stats().total, 0)

    def test_a_stream_waits_for_messages_and_ends_after_its_time(self) -> None:
        async def test(broker: Any) -> None:
            seen = []

            async def consume() -> None:
                async for message in broker.stream_messages("q", wait=0.3):
                    seen.append(message)

            task = asyncio.create_task(consume())
            for body in ("a", "b"):
                await broker.push("q", body)
                await self.until(lambda body=body: body in seen, "the stream gets it")
            await task
            self.assertEqual(seen, ["a", "b"])

        self.run_async(test)

    def test_a_killed_consumer_gives_its_message_back_when_the_lease_ends(self) -> None:
        self.broker().queue("q").write("precious")
        child = self.start("""
            import asyncio, sys
            from async_wrapper import AsyncBroker
            async def main():
                async with AsyncBroker("test.db") as broker:
                    async for message in broker.stream_messages("q", lease=0.5):
                        print(message, message.attempt, flush=True)
                        await asyncio.sleep(60)
            asyncio.run(main())
        """)
        self.assertEqual(self.line(child), "precious 1")
        child.kill()
        child.wait()

        async def test(broker: Any) -> None:
            async for message in broker.stream_messages("q"):
                self.assertEqual((message, message.attempt), ("precious", 2))
                broker.stop()

        self.run_async(test)
        self.assertEqual(self.broker().queue("q").stats().total, 0)

    def test_eight_tasks_and_two_processes_handle_each_of_many_messages_exactly_once(self) -> None:
        total = 10_000 if FULL else 2_000
        ids = self.broker().queue("q").write_many(str(number) for number in range(total))
        code = """
            import asyncio, sys
            from async_wrapper import AsyncBroker
            async def main():
                seen = []
                async with AsyncBroker("test.db") as broker:
                    await broker.size("q")
                    print("ready", flush=True)
                    sys.stdin.readline()
                    async for message in broker.stream_messages("q", wait=None):
                        seen.append(message.id)
                print(*seen, flush=True)
            asyncio.run(main())
        """
        children = [self.start(code) for _ in range(2)]
        for child in children:
            self.assertEqual(self.line(child), "ready")

        async def test(broker: Any) -> None:
            async def stream() -> list[int]:
                return [message.id async for message in broker.stream_messages("q", wait=None)]

            async def pop() -> list[int]:
                seen = []
                while (message := await broker.pop("q")) is not None:
                    seen.append(message.id)
                return seen

            for child in children:
                assert child.stdin is not None
                child.stdin.write("go\n")
                child.stdin.flush()
            groups = await asyncio.gather(*(stream() for _ in range(4)), *(pop() for _ in range(4)))
            loop = asyncio.get_running_loop()
            for child in children:
                line = await loop.run_in_executor(None, self.line, child)
                groups.append([int(word) for word in line.split()])
            self.assertTrue(all(groups), [len(group) for group in groups])
            self.assertEqual(sorted(id for group in groups for id in group), ids)

        self.run_async(test)
        self.assertEqual(self.broker().queue("q").stats().total, 0)


class AsyncBrokerWatches(AsyncBrokerTest):
    def test_a_failing_message_is_tried_again_and_then_dead_lettered(self) -> None:
        async def test(broker: Any) -> None:
            attempts = []

            async def handler(message: Message, timestamp: int) -> None:
                self.assertEqual(timestamp, message.id)
                attempts.append((str(message), message.attempt))
                if message == "bad":
                    raise ValueError("bad")

            await broker.push("q", "bad")
            await broker.push("q", "good")
            watch = asyncio.create_task(
                broker.watch_queue("q", handler, max_attempts=3, backoff=0.02, dead_letter="failed")
            )
            self.assertEqual(await broker.pop("failed", wait=DEADLINE_S), "bad")
            broker.stop()
            await watch
            self.assertEqual(Counter(attempts), Counter([("bad", 1), ("bad", 2), ("bad", 3), ("good", 1)]))
            self.assertEqual(await broker.size("q"), 0)

        self.run_async(test)

    def test_the_error_handler_decides(self) -> None:
        queue = self.broker().queue("q")

        async def test(broker: Any) -> None:
            def handler(message: Message, timestamp: int) -> None:  # plain functions are allowed
                raise ValueError(str(message))

            def judge(error: BaseException, message: Message, timestamp: int) -> bool | None:
                if message == "confuse" and message.attempt == 1:
                    raise KeyError("the error handler fails too")
                return message != "stop"

            await broker.push("q", "drop")
            await broker.push("q", "confuse")
            await broker.push("q", "stop", delay=0.3)
            await broker.watch_queue("q", handler, error_handler=judge, backoff=0.01)  # ends by itself

        self.run_async(test)
        left = queue.peek_many(9)
        self.assertEqual([(str(message), message.attempt) for message in left], [("stop", 1)])

    def test_a_message_that_killed_its_consumers_is_not_handled_again(self) -> None:
        queue = self.broker().queue("q")
        queue.write("deadly")
        for _ in range(2):
            queue.release(queue.lease())  # stands for a consumer that died

        async def test(broker: Any) -> None:
            handled: list[str] = []
            watch = asyncio.create_task(
                broker.watch_queue("q", lambda message, timestamp: handled.append(message), max_attempts=2)
            )
            self.assertEqual(await broker.pop("q.dead", wait=DEADLINE_S), "deadly")
            broker.stop()
            await watch
            self.assertEqual(handled, [])

        self.run_async(test)

    def test_the_last_attempt_that_fails_dead_letters_at_once(self) -> None:
        async def test(broker: Any) -> None:
            async def handler(message: Message, timestamp: int) -> None:
                raise ValueError("no")

            await broker.push("q", "bad")
            watch = asyncio.create_task(broker.watch_queue("q", handler, max_attempts=1, backoff=3600.0))
            self.assertEqual(await broker.pop("q.dead", wait=DEADLINE_S), "bad")
            broker.stop()
            await watch

        self.run_async(test)

    def test_any_other_answer_of_an_error_handler_means_try_again(self) -> None:
        async def test(broker: Any) -> None:
            async def handler(message: Message, timestamp: int) -> None:
                raise ValueError("no")

            await broker.push("q", "bad")
            options = {"max_attempts": 2, "backoff": 0.01, "error_handler": lambda *_: "what?"}
            watch = asyncio.create_task(broker.watch_queue("q", handler, **options))
            self.assertEqual(await broker.pop("q.dead", wait=DEADLINE_S), "bad")
            broker.stop()
            await watch

        self.run_async(test)

    def test_stop_ends_a_watch_in_the_middle_of_what_it_has_fetched(self) -> None:
        queue = self.broker().queue("q")
        queue.write_many(str(number) for number in range(40))
        handled: list[str] = []

        async def test(broker: Any) -> None:
            def handler(message: Message, timestamp: int) -> None:
                handled.append(message)
                if message == "20":
                    broker.stop()

            await broker.watch_queue("q", handler)

        self.run_async(test)
        self.assertEqual(len(handled), 21)
        self.assertEqual([message.attempt for message in queue.peek_many(40)], [0] * 19)

    def test_stop_ends_a_stream_in_the_middle_of_what_it_has_fetched(self) -> None:
        queue = self.broker().queue("q")
        queue.write_many(str(number) for number in range(40))
        seen: list[str] = []

        async def test(broker: Any) -> None:
            async for message in broker.stream_messages("q"):
                seen.append(message)
                if message == "20":
                    broker.stop()

        self.run_async(test)
        self.assertEqual(len(seen), 21)
        self.assertEqual([message.attempt for message in queue.peek_many(40)], [0] * 19)

    def test_what_was_fetched_ahead_is_handled_soon_after_the_database_was_busy(self) -> None:
        queue = self.broker().queue("q")
        queue.write_many(str(number) for number in range(40))

        async def test(broker: Any) -> None:
            seen: list[str] = []
            loop = asyncio.get_running_loop()

            def handler(message: Message, timestamp: int) -> None:
                seen.append(message)
                if message == "20":  # now it cannot be acknowledged
                    release = self.hold_writer_lock()
                    loop.call_later(0.2, lambda: loop.run_in_executor(None, release))

            watch = asyncio.create_task(broker.watch_queue("q", handler, lease=3600.0))
            await self.until(lambda: len(seen) == 40, "all have been handled once")
            broker.stop()
            await watch
            self.assertEqual(seen, [str(number) for number in range(40)])

        self.run_async(test, IMPATIENT)
        self.assertEqual(queue.stats(), simplebroker.Stats(0, 1, 0))  # it comes again when its lease has ended

    def test_close_waits_for_the_handler_and_then_ends_the_watch(self) -> None:
        queue = self.broker().queue("q")
        queue.write_many(["a", "b"])
        done = []

        async def main() -> None:
            started, go = asyncio.Event(), asyncio.Event()

            async def handler(message: Message, timestamp: int) -> None:
                started.set()
                await go.wait()
                done.append(message)

            async with example("async_wrapper").AsyncBroker(self.path, settings=FAST) as broker:
                watch = asyncio.create_task(broker.watch_queue("q", handler))
                waiting = asyncio.create_task(broker.pop("other", wait=DEADLINE_S))
                await started.wait()
                asyncio.get_running_loop().call_later(0.05, go.set)
            self.assertTrue(watch.done())
            self.assertIsNone(await waiting)

        asyncio.run(main())
        self.assertEqual(done, ["a"])
        self.assertEqual((queue.read(), queue.stats().total), ("b", 0))

    def test_cancelling_a_watch_gives_the_message_back_as_if_nobody_had_had_it(self) -> None:
        queue = self.broker().queue("q")
        queue.write("a")

        async def test(broker: Any) -> None:
            started = asyncio.Event()

            async def handler(message: Message, timestamp: int) -> None:
                started.set()
                await asyncio.sleep(DEADLINE_S)

            watch = asyncio.create_task(broker.watch_queue("q", handler))
            await started.wait()
            watch.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await watch
            message = queue.peek()
            self.assertEqual((message, message.attempt), ("a", 0))

        self.run_async(test)

    def test_in_a_handler_stop_ends_the_watch_and_close_is_refused(self) -> None:
        async def test(broker: Any) -> None:
            refused = []

            async def handler(message: Message, timestamp: int) -> None:
                try:
                    await broker.close()
                except RuntimeError as error:
                    refused.append(str(error))
                broker.stop()

            await broker.push("q", "a")
            await broker.watch_queue("q", handler)
            self.assertIn("call stop()", refused[0])
            self.assertEqual(await broker.size("q"), 0)

        self.run_async(test)

    def test_a_watch_goes_on_after_the_database_was_busy(self) -> None:
        async def test(broker: Any) -> None:
            seen = []
            loop = asyncio.get_running_loop()

            async def handler(message: Message, timestamp: int) -> None:
                seen.append((str(message), message.attempt))
                if len(seen) == 1:  # now it cannot be acknowledged
                    release = self.hold_writer_lock()
                    loop.call_later(0.3, lambda: loop.run_in_executor(None, release))

            await broker.push("q", "first")
            watch = asyncio.create_task(broker.watch_queue("q", handler, lease=0.6))
            await self.until(lambda: seen, "it is handled")
            while True:
                try:
                    await broker.push("q", "second")
                    break
                except OperationalError:  # still busy
                    continue
            await self.until(lambda: len(seen) == 3, "both, and the first again when its lease has ended")
            self.assertEqual(sorted(seen), [("first", 1), ("first", 2), ("second", 1)])
            broker.stop()
            await watch

        self.run_async(test, IMPATIENT)

    def test_a_closed_broker_refuses_calls_and_can_be_closed_again(self) -> None:
        async def main() -> None:
            broker = example("async_wrapper").AsyncBroker(self.path)
            await broker.close()
            await broker.close()
            for call in (broker.push("q", "x"), broker.pop("q"), broker.size("q"), broker.watch_queue("q", print)):
                with self.assertRaisesRegex(ValueError, "closed"):
                    await call

        asyncio.run(main())


class MultiQueueTest(ExampleTest):
    def watcher(self, queues: Any, handler: Any, *args: Any, **options: Any) -> Any:
        """A watcher on the test's database, stopped at the end."""
        options.setdefault("db", self.broker())
        watcher = example("multi_queue_watcher").MultiQueueWatcher(queues, handler, *args, **options)
        self.addCleanup(watcher.stop, DEADLINE_S)
        return watcher


class MultiQueueWatcherTurns(MultiQueueTest):
    def test_nine_short_queues_are_empty_after_ten_rounds_beside_one_of_10000(self) -> None:
        broker = self.broker()
        short = [f"short.{number}" for number in range(9)]
        broker.queue("long").write_many(str(number) for number in range(10_000))
        for name in short:
            broker.queue(name).write_many(str(number) for number in range(10))
        handled: Counter[str] = Counter()

        def handler(message: Message, timestamp: int) -> None:
            self.assertEqual(int(message), handled[message.queue])  # in order
            handled[message.queue] += 1
            if watcher.rounds == 11:  # the eleventh has begun: look what ten have done
                left.update((name, broker.queue(name).stats().total) for name in short)
                watcher.request_stop()

        left: dict[str, int] = {}
        watcher = self.watcher(["long", *short], handler)
        watcher.watch()
        self.assertEqual(left, dict.fromkeys(short, 0))
        self.assertEqual(handled, Counter({"long": 11, **dict.fromkeys(short, 10)}))

    def test_a_round_takes_one_message_of_each_queue_in_the_order_of_the_queues(self) -> None:
        broker = self.broker()
        for name in ("c", "a", "b"):
            broker.queue(name).write_many([f"{name}{number}" for number in range(2)])
        seen: list[str] = []
        self.watcher(["b", "a", "c"], lambda message, timestamp: seen.append(message)).watch(drain=True)
        self.assertEqual(seen, ["b0", "a0", "c0", "b1", "a1", "c1"])

    def test_fifty_queues_cost_one_connection_and_one_thread_of_its_own(self) -> None:
        names = [f"q{number}" for number in range(50)]
        handled: list[str] = []
        before = threading.active_count()
        broker = self.broker()
        with self.watcher(names, lambda message, timestamp: handled.append(message)):
            for name in names:
                broker.queue(name).write(name)
            self.wait_for(lambda: len(handled) == 50, "all are handled")
            self.assertLessEqual(threading.active_count() - before, 2)  # its own, and the one that waits for all
            if os.path.isdir("/proc/self/fd"):
                opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
                self.assertEqual(opened.count(str(self.path)), 1)

    def test_an_idle_watcher_sleeps(self) -> None:
        broker = self.broker()
        handled: list[str] = []
        names = [f"q{number}" for number in range(50)]
        with self.watcher(names, lambda message, timestamp: handled.append(message)) as watcher:
            broker.queue("q7").write("x")
            self.wait_for(lambda: handled, "it is handled")
            time.sleep(0.1)  # what has rung meanwhile is looked after
            rounds = watcher.rounds
            time.sleep(0.3)
            self.assertEqual(watcher.rounds, rounds)

    def test_idle_queues_are_not_asked_for_while_another_is_busy(self) -> None:
        broker = self.broker()
        broker.queue("busy").write_many(["x"] * 200)
        asked: Counter[str] = Counter()
        module = example("multi_queue_watcher")
        take = module._Entry.take

        def counted(entry: Any) -> Any:
            asked[entry.queue.name] += 1
            return take(entry)

        module._Entry.take = counted
        self.addCleanup(setattr, module._Entry, "take", take)
        self.watcher(["busy", "idle"], lambda *_: None).watch(drain=True)
        self.assertGreaterEqual(asked["busy"], 200)
        self.assertLess(asked["idle"], 20)

    def test_a_message_for_an_idle_queue_is_found_while_another_is_busy(self) -> None:
        broker = self.broker()
        broker.queue("busy").write_many(["x"] * 3000)
        found_at: list[int] = []

        def handler(message: Message, timestamp: int) -> None:
            if message.queue == "idle":
                found_at.append(watcher.rounds)
                watcher.request_stop()
            elif watcher.rounds == 20:  # "idle" was found empty by now
                broker.queue("idle").write("x")

        watcher = self.watcher(["busy", "idle"], handler)
        watcher.watch()
        self.assertLess(found_at[0], 3000)

    def test_a_commit_of_another_process_wakes_it_and_so_does_a_delayed_message(self) -> None:
        handled: list[str] = []
        self.broker().queue("a").write("late", delay=0.2)
        with self.watcher(["a", "b"], lambda message, timestamp: handled.append(message)):
            self.start("import simplebroker; simplebroker.main(['-f', 'test.db', 'write', 'b', 'from afar'])").wait()
            self.wait_for(lambda: len(handled) == 2, "both are handled")

    def test_two_processes_share_the_messages_of_three_queues(self) -> None:
        broker = self.broker()
        names = ["a", "b", "c"]
        ids = sorted(id for name in names for id in broker.queue(name).write_many(["x"] * 200))
        code = """
            import sys
            from multi_queue_watcher import MultiQueueWatcher
            print("ready", flush=True)
            sys.stdin.readline()
            seen = []
            MultiQueueWatcher("abc"[:3].__iter__(), lambda message, id: seen.append(id), db="test.db").watch(drain=True)
            print(*seen, flush=True)
        """
        children = [self.start(code) for _ in range(2)]
        for child in children:
            self.assertEqual(self.line(child), "ready")
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        seen = [int(word) for child in children for word in self.line(child).split()]
        self.assertEqual(sorted(seen), ids)


class MultiQueueWatcherErrors(MultiQueueTest):
    def test_each_queue_has_its_handlers_and_the_others_have_the_default(self) -> None:
        broker = self.broker()
        for name in ("a", "b", "c"):
            broker.queue(name).write(f"message of {name}")
        seen: list[tuple[str, str]] = []

        def fail(message: Message, timestamp: int) -> None:
            raise ValueError("no")

        def failed(who: str) -> Any:
            return lambda error, message, timestamp: seen.append((who, message.queue)) or True

        self.watcher(
            ["a", "b", "c"],
            lambda message, timestamp: seen.append(("default", message.queue)),
            {"b": fail, "c": fail},
            {"b": failed("of b")},
            error_handler=failed("default"),
        ).watch(drain=True)
        self.assertEqual(seen, [("default", "a"), ("of b", "b"), ("default", "c")])

    def test_none_gives_back_with_a_delay_and_dead_letters_when_the_attempts_are_used_up(self) -> None:
        broker = self.broker()
        broker.queue("q").write_many(["bad", "good"])
        times: list[float] = []
        order: list[str] = []

        def handler(message: Message, timestamp: int) -> None:
            order.append(message)
            if message == "bad":
                times.append(time.monotonic())
                raise ValueError("bad")

        with self.watcher(["q"], handler, max_attempts=3, backoff=0.1):
            self.assertEqual(broker.queue("q.dead").read(wait=DEADLINE_S), "bad")
        self.assertEqual(Counter(order), Counter({"bad": 3, "good": 1}))
        self.assertGreaterEqual(times[1] - times[0], 0.09)
        self.assertGreaterEqual(times[2] - times[1], 0.19)
        self.assertEqual(broker.queue("q").stats().total, 0)

    def test_false_gives_back_and_stops_and_an_error_handler_that_fails_means_again(self) -> None:
        broker = self.broker()
        broker.queue("q").write_many(["confuse", "halt", "after"])

        def handler(message: Message, timestamp: int) -> None:
            if message == "halt" or message.attempt == 1:
                raise ValueError("no")

        def failed(error: BaseException, message: Message, timestamp: int) -> bool | None:
            if message == "confuse":
                raise KeyError("the error handler fails too")
            return False

        self.watcher(["q"], handler, error_handler=failed, backoff=0).watch()
        left = broker.queue("q").peek_many(9)
        self.assertEqual([(str(message), message.attempt) for message in left], [("halt", 1), ("after", 0)])

    def test_a_message_that_killed_its_consumers_is_not_handled_again(self) -> None:
        broker = self.broker()
        queue = broker.queue("q")
        queue.write("deadly")
        for _ in range(2):
            queue.release(queue.lease())  # stands for a consumer that died
        handled: list[str] = []
        watcher = self.watcher(["q"], lambda message, _: handled.append(message), max_attempts=2, dead_letter="grave")
        watcher.watch(drain=True)
        self.assertEqual((broker.queue("grave").read(), handled), ("deadly", []))

    def test_the_last_attempt_that_fails_dead_letters_at_once_and_other_answers_mean_again(self) -> None:
        broker = self.broker()
        broker.queue("q").write("bad")
        attempts: list[int] = []

        def handler(message: Message, timestamp: int) -> None:
            attempts.append(message.attempt)
            raise ValueError("no")

        self.watcher(["q"], handler, max_attempts=1, backoff=3600).watch(drain=True)
        self.assertEqual(broker.queue("q.dead").move("q"), "bad")
        self.watcher(["q"], handler, max_attempts=2, backoff=0, error_handler=lambda *_: "what?").watch(drain=True)
        self.assertEqual((broker.queue("q.dead").read(), attempts), ("bad", [1, 1, 2]))

    def test_a_killed_watcher_gives_its_message_back_when_the_lease_ends(self) -> None:
        broker = self.broker()
        broker.queue("q").write("precious")
        child = self.start("""
            import time
            from multi_queue_watcher import MultiQueueWatcher
            def handler(message, timestamp):
                print(message, message.attempt, flush=True)
                time.sleep(60)
            MultiQueueWatcher(["q"], handler, db="test.db", lease=0.5).watch()
        """)
        self.assertEqual(self.line(child), "precious 1")
        child.kill()
        child.wait()
        seen: list[tuple[str, int]] = []
        with self.watcher(["q"], lambda message, timestamp: seen.append((str(message), message.attempt))):
            self.wait_for(lambda: seen, "it comes again")
        self.assertEqual(seen, [("precious", 2)])

    def test_the_lease_is_renewed_while_a_handler_runs(self) -> None:
        broker = self.broker()
        queue = broker.queue("q")
        queue.write("slow")

        def handler(message: Message, timestamp: int) -> None:
            end = time.monotonic() + 0.65
            while time.monotonic() < end:
                pending.append(queue.has_pending())
                time.sleep(0.02)

        pending: list[bool] = []
        self.watcher(["q"], handler, lease=0.3).watch(drain=True)
        self.assertGreater(len(pending), 10)
        self.assertFalse(any(pending))
        self.assertEqual(queue.stats().total, 0)

    def test_a_message_that_is_gone_when_it_shall_be_settled_does_no_harm(self) -> None:
        broker = self.broker()
        broker.queue("q").write_many(["gone", "gone and failed", "next"])
        seen: list[str] = []

        def handler(message: Message, timestamp: int) -> None:
            seen.append(message)
            if message != "next":
                broker.queue("q").delete(message_id=timestamp)
            if message == "gone and failed":
                raise ValueError("no")

        self.watcher(["q"], handler).watch(drain=True)
        self.assertEqual(seen, ["gone", "gone and failed", "next"])

    def test_it_goes_on_after_the_database_was_busy(self) -> None:
        broker = self.broker(IMPATIENT)
        seen: list[tuple[str, int]] = []

        def handler(message: Message, timestamp: int) -> None:
            seen.append((str(message), message.attempt))
            if len(seen) == 1:  # now it cannot be acknowledged
                threading.Timer(0.3, self.hold_writer_lock()).start()

        broker.queue("a").write("first")
        with self.watcher(["a", "b"], handler, db=broker, lease=0.6):
            self.wait_for(lambda: seen, "it is handled")
            with Queue("b", self.path, settings=FAST) as other:
                other.write("second")  # waits until the lock is free
            self.wait_for(lambda: len(seen) == 3, "both, and the first again when its lease has ended")
        self.assertEqual(sorted(seen), [("first", 1), ("first", 2), ("second", 1)])


class MultiQueueWatcherChanges(MultiQueueTest):
    def test_queues_can_be_added_while_it_is_idle(self) -> None:
        broker = self.broker()
        broker.queue("late").write("was there before")
        seen: list[str] = []
        with self.watcher([], lambda *_: self.fail("wrong handler")) as watcher:
            self.wait_for(lambda: watcher.rounds, "it has looked around")
            watcher.add_queue("late", lambda message, timestamp: seen.append(message))
            self.wait_for(lambda: seen, "it is handled")
            self.assertEqual(watcher.queues, ["late"])

    def test_after_remove_queue_no_handler_of_it_runs_and_its_messages_stay(self) -> None:
        broker = self.broker()
        broker.queue("q").write_many(["x"] * 50)
        entered, go, running = threading.Event(), threading.Event(), threading.Event()

        def handler(message: Message, timestamp: int) -> None:
            running.set()
            entered.set()
            go.wait(DEADLINE_S)
            running.clear()

        with self.watcher(["q", "other"], handler) as watcher:
            self.assertTrue(entered.wait(DEADLINE_S))
            remover = threading.Thread(target=watcher.remove_queue, args=("q",))
            remover.start()
            self.wait_for(lambda: watcher.queues == ["other"], "it is taken off")
            self.assertTrue(remover.is_alive(), "it did not wait for the handler")
            go.set()
            remover.join(DEADLINE_S)
            self.assertFalse(remover.is_alive() or running.is_set())
            self.assertEqual(broker.queue("q").stats(), simplebroker.Stats(49, 0, 0))
            rest: list[str] = []
            watcher.add_queue("q", lambda message, timestamp: rest.append(message))  # and once more
            self.wait_for(lambda: len(rest) == 49, "the rest is handled")

    def test_queues_can_be_added_and_removed_in_handlers_also_the_own_one(self) -> None:
        broker = self.broker()
        broker.queue("a").write_many(["1", "2"])
        broker.queue("b").write_many(["1", "2"])
        seen: list[tuple[str, str]] = []

        def handler(message: Message, timestamp: int) -> None:
            seen.append((message.queue, str(message)))
            if message.queue == "a":
                watcher.remove_queue("a")
                watcher.add_queue("b")

        watcher = self.watcher(["a"], handler)
        watcher.watch(drain=True)
        self.assertEqual(seen, [("a", "1"), ("b", "1"), ("b", "2")])  # the first one was acknowledged all the same
        self.assertEqual(broker.queue("a").stats(), simplebroker.Stats(1, 0, 0))

    def test_many_threads_may_add_and_remove_while_it_works(self) -> None:
        broker = self.broker()
        total = 8 * 25
        seen: Counter[int] = Counter()
        errors: list[BaseException] = []

        def churn(number: int) -> None:
            try:
                for turn in range(25):
                    name = f"q{number}.{turn}"
                    broker.queue(name).write(name)
                    watcher.add_queue(name)
                    self.wait_for(lambda name=name: broker.queue(name).stats().total == 0, "it is handled")
                    watcher.remove_queue(name)
            except BaseException as error:  # noqa: BLE001 (raised below)
                errors.append(error)

        with self.watcher(["always"], lambda message, timestamp: seen.update([timestamp])) as watcher:
            threads = [threading.Thread(target=churn, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(watcher.queues, ["always"])
        self.assertEqual(errors, [])
        self.assertEqual((len(seen), set(seen.values())), (total, {1}))

    def test_misuse_is_refused(self) -> None:
        watcher = self.watcher(["a"], print)
        for wrong in (
            lambda: watcher.add_queue("a"),
            lambda: watcher.remove_queue("unknown"),
            lambda: watcher.add_queue("-bad name"),
            lambda: self.watcher(["a", "a"], print),
            lambda: self.watcher(["a"], print, {"typo": print}),
            lambda: self.watcher(["a"], print, None, {"typo": print}),
            lambda: self.watcher(["a"], print, max_attempts=0),
            lambda: self.watcher(["a"], print, lease=0),
            lambda: self.watcher(["a"], print, dead_letter="/"),
        ):
            with self.assertRaises(ValueError):
                wrong()
        for wrong in (lambda: self.watcher("abc", print), lambda: self.watcher(["a"], "not callable")):
            with self.assertRaises(TypeError):
                wrong()


class MultiQueueWatcherEnd(MultiQueueTest):
    def test_stop_waits_for_the_handler_and_gives_nothing_away(self) -> None:
        broker = self.broker()
        broker.queue("q").write_many(["a", "b"])
        entered, go = threading.Event(), threading.Event()
        done: list[str] = []

        def handler(message: Message, timestamp: int) -> None:
            entered.set()
            go.wait(DEADLINE_S)
            done.append(message)

        watcher = self.watcher(["q"], handler)
        thread = watcher.run_in_thread()
        self.assertIs(watcher.run_in_thread(), thread)
        self.assertTrue(entered.wait(DEADLINE_S))
        watcher.stop(timeout=0.05)  # gives up waiting
        self.assertTrue(thread.is_alive())
        go.set()
        watcher.stop()
        self.assertFalse(thread.is_alive())
        self.assertEqual(done, ["a"])
        self.assertEqual(broker.queue("q").stats(), simplebroker.Stats(1, 0, 0))

    def test_stop_wakes_an_idle_watcher_and_may_come_before_the_start(self) -> None:
        watcher = self.watcher(["q"], print)
        thread = watcher.run_in_thread()
        self.wait_for(lambda: watcher.rounds, "it has looked around")
        watcher.stop(DEADLINE_S)
        self.assertFalse(thread.is_alive())
        early = self.watcher(["q"], print)
        early.request_stop()
        early.watch()  # returns
        with self.assertRaises(RuntimeError):
            early.watch()

    def test_it_closes_a_database_that_it_has_opened_and_no_other(self) -> None:
        own = self.watcher(["q"], print, db=self.path)
        own.watch(drain=True)
        with self.assertRaises(ValueError):
            own.broker.queue("q").count()
        broker = self.broker()
        self.watcher(["q"], print, db=broker).watch(drain=True)
        self.assertEqual(broker.queue("q").count(), 0)

    @unittest.skipIf(os.name == "nt", "no signals")
    def test_sigterm_ends_it_after_the_message_in_hand(self) -> None:
        broker = self.broker()
        broker.queue("q").write_many(["a", "b"])
        child = self.start("""
            import sys
            from multi_queue_watcher import MultiQueueWatcher
            def handler(message, timestamp):
                print("in", message, flush=True)
                sys.stdin.readline()
                print("done", message, flush=True)
            MultiQueueWatcher(["q"], handler, db="test.db").watch()
            print("end", flush=True)
        """)
        self.assertEqual(self.line(child), "in a")
        child.send_signal(signal.SIGTERM)
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
        self.assertEqual([self.line(child), self.line(child)], ["done a", "end"])
        self.assertEqual(child.wait(DEADLINE_S), 0)
        self.assertEqual(broker.queue("q").stats(), simplebroker.Stats(1, 0, 0))

    def test_an_exit_in_a_handler_passes_through_and_gives_the_message_back(self) -> None:
        broker = self.broker()
        broker.queue("q").write("a")

        def handler(message: Message, timestamp: int) -> None:
            raise SystemExit(3)

        with self.assertRaises(SystemExit):
            self.watcher(["q"], handler).watch()
        message = broker.queue("q").peek()
        self.assertEqual((message, message.attempt), ("a", 0))

    def test_the_code_in_the_readme_works(self) -> None:
        text = (EXAMPLES / "MULTI_QUEUE_README.md").read_text(encoding="utf-8")
        code = text.split("```python\n")[1].split("```")[0]
        self.assertIn("watcher.watch()", code)
        child = self.start(
            "from simplebroker import Queue\n"
            "for name in ('orders', 'logs', 'mails'):\n    Queue(name, 'broker.db').write('hi')\n"
            + code.replace("watcher.watch()", "watcher.watch(drain=True)")
        )
        self.assertEqual([self.line(child), self.line(child), self.line(child)], ["orders hi", "logs hi", ""])
        self.assertEqual(child.wait(DEADLINE_S), 0)


class MultiQueuePatterns(MultiQueueTest):
    def test_strict_priority_serves_a_queue_only_while_those_before_it_are_empty(self) -> None:
        broker = self.broker()
        for name in ("low", "high"):
            broker.queue(name).write_many([name] * 20)
        order: list[str] = []
        example("multi_queue_patterns").PriorityWatcher(
            ["high", "low"], lambda message, timestamp: order.append(message), db=broker
        ).watch(drain=True)
        self.assertEqual(order, ["high"] * 20 + ["low"] * 20)

    def test_weights_share_the_turns_and_later_queues_have_one(self) -> None:
        broker = self.broker()
        for name in ("a", "b", "c"):
            broker.queue(name).write_many([name] * 12)
        order: list[str] = []
        watcher = example("multi_queue_patterns").WeightedWatcher(
            {"a": 3, "b": 1}, lambda message, timestamp: order.append(message), db=broker
        )
        watcher.add_queue("c")
        watcher.watch(drain=True)
        self.assertEqual(order[:20], list("aaabc") * 4)

    def test_metrics_count_what_is_handled_and_what_fails_and_let_errors_pass(self) -> None:
        metrics = example("multi_queue_patterns").Metrics()

        def handler(message: Message, timestamp: int) -> None:
            if message == "bad":
                raise ValueError("bad")

        measured = metrics.measured(handler)
        broker = self.broker()
        broker.queue("q").write_many(["good", "bad", "waiting"])
        measured(broker.queue("q").read(), 1)
        with self.assertRaises(ValueError):
            measured(broker.queue("q").read(), 2)
        self.assertEqual(metrics.report(broker), ["q: 1 handled, 1 failed, 1 waiting"])
        self.assertGreater(metrics.seconds["q"], 0)


class LoggingRunnerExample(ExampleTest):
    quiet = False

    def runner(self) -> Any:
        runner = example("logging_runner").LoggingRunner(simplebroker.SQLiteRunner(self.path, FAST))
        self.addCleanup(runner.close)
        return runner

    def test_it_logs_names_rows_and_milliseconds_and_never_bodies(self) -> None:
        with self.assertLogs("logging_runner", "DEBUG") as logged, Queue("q", runner=self.runner()) as queue:
            queue.write("a secret body")
            self.assertEqual(queue.read(), "a secret body")
        text = "\n".join(logged.output)
        self.assertRegex(text, r"INSERT_MESSAGE +\d+\.\d\d ms  0 rows")
        self.assertRegex(text, r"SELECT_READY +\d+\.\d\d ms  1 rows")
        self.assertRegex(text, r"COMMIT +\d+\.\d\d ms  done")
        self.assertNotIn("secret", text)
        self.assertNotIn("OTHER", text)  # every statement has a name

    def test_errors_are_logged_and_pass_through(self) -> None:
        runner = self.runner()
        with self.assertLogs("logging_runner", "DEBUG") as logged:
            with self.assertRaises(OperationalError):
                runner.run("SELECT nonsense")
            with self.assertRaises(OperationalError):
                runner.commit()  # no transaction is open
        self.assertRegex(logged.output[0], r"OTHER +\d+\.\d\d ms  OperationalError: .*nonsense")
        self.assertRegex(logged.output[1], r"COMMIT +\d+\.\d\d ms  OperationalError")

    def test_every_call_is_passed_on_as_it_is(self) -> None:
        calls: list[tuple[Any, ...]] = []

        class Recorder(simplebroker.SQLRunner):
            def run(self, sql: str, params: Any = (), *, fetch: bool = False) -> Any:
                calls.append((sql, params, fetch))
                return [(1,)] if fetch else None

            def begin_immediate(self) -> None:
                calls.append(("begin",))

            def commit(self) -> None:
                calls.append(("commit",))

            def rollback(self) -> None:
                calls.append(("rollback",))

            def close(self) -> None:
                calls.append(("close",))

        runner = example("logging_runner").LoggingRunner(Recorder())
        with self.assertLogs("logging_runner", "DEBUG"):
            self.assertEqual(runner.run("A", (1, 2), fetch=True), [(1,)])
            self.assertIsNone(runner.run("B"))
            runner.begin_immediate()
            runner.commit()
            runner.rollback()
            runner.close()
        self.assertEqual(calls[:2], [("A", (1, 2), True), ("B", (), False)])
        self.assertEqual(calls[2:], [("begin",), ("commit",), ("rollback",), ("close",)])

    def test_a_queue_through_it_is_the_same_queue(self) -> None:
        plain = self.broker().queue("q")
        with self.assertLogs("logging_runner", "DEBUG"), Broker(runner=self.runner()) as broker:
            queue = broker.queue("q")
            ids = [queue.write("a"), plain.write("b"), *queue.write_many(["c", "d", "e"])]
            self.assertEqual(ids, sorted(ids))
            self.assertEqual((queue.count(), queue.peek_many(2)), (5, ["a", "b"]))
            leased = queue.lease(30)
            self.assertEqual(plain.stats().leased, 1)
            queue.ack(leased)
            queue.release(queue.lease(30))
            queue.dead_letter(queue.lease(30))
            self.assertEqual(plain.move("elsewhere"), "c")
            self.assertEqual(queue.delete(message_id=ids[3]), 1)
            with self.assertRaises(ZeroDivisionError), broker.transaction():
                queue.write("rolled back")
                raise ZeroDivisionError
            self.assertEqual(list(plain.read_all()), ["e"])
            self.assertEqual(sorted(broker.queues()), ["elsewhere", "q.dead"])
            self.assertIn("ROLLBACK", broker.runner.counts)

    def test_threads_may_share_it(self) -> None:
        with self.assertLogs("logging_runner", "DEBUG"), Queue("q", runner=self.runner()) as queue:

            def write() -> None:
                for _ in range(50):
                    queue.write("x")

            threads = [threading.Thread(target=write) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(queue.count(), 200)

    def test_slow_calls_are_warnings(self) -> None:
        module = example("logging_runner")
        self.addCleanup(setattr, module, "SLOW_S", module.SLOW_S)
        module.SLOW_S = -1.0
        with self.assertLogs("logging_runner", "WARNING") as logged:
            self.runner().run("SELECT 1", fetch=True)
        self.assertEqual(len(logged.output), 1)


class OutboxExample(ExampleTest):
    def connect(self, **options: Any) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, **options)
        self.addCleanup(connection.close)
        connection.execute("PRAGMA synchronous = OFF").fetchall()
        return connection

    def shop(self, **options: Any) -> tuple[sqlite3.Connection, Queue]:
        """The application's connection and the outbox on it."""
        connection = self.connect(**options)
        example("outbox").make_outbox(connection)
        connection.execute("CREATE TABLE IF NOT EXISTS orders (item TEXT)")
        return connection, Queue("orders", runner=example("outbox").OutboxRunner(connection))

    def assertState(self, orders: list[str], messages: list[str]) -> None:
        """What other connections see."""
        connection = self.connect()
        self.assertEqual([item for (item,) in connection.execute("SELECT item FROM orders").fetchall()], orders)
        connection.close()
        with Queue("orders", self.path, settings=FAST) as queue:
            self.assertEqual(queue.peek_many(100), messages)

    def test_row_and_message_commit_together(self) -> None:
        connection, outbox = self.shop()
        connection.execute("INSERT INTO orders VALUES ('lamp')")
        outbox.write("lamp ordered")
        outbox.write_many(["two", "three"])
        self.assertState([], [])  # not yet
        connection.commit()
        self.assertState(["lamp"], ["lamp ordered", "two", "three"])

    def test_row_and_message_roll_back_together_in_any_order(self) -> None:
        connection, outbox = self.shop()
        connection.execute("BEGIN IMMEDIATE")
        outbox.write("message first")
        connection.execute("INSERT INTO orders VALUES ('lamp')")
        outbox.write_many(["two", "three"])
        connection.rollback()
        self.assertState([], [])
        with self.assertRaises(ZeroDivisionError), connection:
            connection.execute("INSERT INTO orders VALUES ('lamp')")
            outbox.write("lamp ordered")
            raise ZeroDivisionError
        self.assertState([], [])

    def test_an_error_inside_the_brokers_part_undoes_that_part_only(self) -> None:
        connection, outbox = self.shop()
        with connection:
            connection.execute("INSERT INTO orders VALUES ('lamp')")
            outbox.write("kept")
            with self.assertRaises(ZeroDivisionError), outbox.broker.transaction():
                outbox.write("undone")
                raise ZeroDivisionError
            outbox.write("kept too")
        self.assertState(["lamp"], ["kept", "kept too"])

    def test_a_savepoint_of_the_application_takes_the_message_with_it(self) -> None:
        connection, outbox = self.shop(isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        outbox.write("kept")
        connection.execute("SAVEPOINT mine")
        connection.execute("INSERT INTO orders VALUES ('lamp')")
        outbox.write_many(["undone"])
        connection.execute("ROLLBACK TO mine")
        connection.execute("COMMIT")
        self.assertState([], ["kept"])

    def test_without_a_transaction_every_call_commits_by_itself(self) -> None:
        for level in ("", None, "IMMEDIATE", "EXCLUSIVE"):
            with self.subTest(isolation_level=level):
                connection, outbox = self.shop(isolation_level=level)
                outbox.write("one")
                self.assertFalse(connection.in_transaction)
                self.assertState([], ["one"])
                outbox.write_many(["two"])
                self.assertEqual(outbox.read(), "one")
                outbox.ack(outbox.lease(30))
                self.assertFalse(connection.in_transaction)
                self.assertState([], [])

    if hasattr(sqlite3, "LEGACY_TRANSACTION_CONTROL"):  # Python 3.12

        def test_it_joins_connections_that_are_always_in_a_transaction(self) -> None:
            self.shop()
            connection = self.connect(autocommit=True)
            connection.autocommit = False
            outbox = Queue("orders", runner=example("outbox").OutboxRunner(connection))
            outbox.write_many(["one"])
            connection.execute("INSERT INTO orders VALUES ('lamp')")
            self.assertState([], [])
            connection.commit()
            self.assertState(["lamp"], ["one"])

    def test_a_clock_that_is_behind_does_not_matter(self) -> None:
        connection, outbox = self.shop()
        newest = outbox.write("new")
        behind = Broker(runner=outbox.broker.runner, clock=lambda: 4096).queue("orders")
        with connection:
            connection.execute("INSERT INTO orders VALUES ('lamp')")
            self.assertEqual(behind.write("late"), newest + 1)
        self.assertState(["lamp"], ["new", "late"])

    def test_a_process_that_is_killed_before_the_commit_leaves_neither_and_after_it_both(self) -> None:
        self.shop()[0].close()
        code = """
            import sqlite3, sys, outbox
            connection = sqlite3.connect("test.db")
            queue = outbox.Queue("orders", runner=outbox.OutboxRunner(connection))
            steps = [
                lambda: connection.execute("INSERT INTO orders VALUES ('lamp')"),
                lambda: queue.write("lamp ordered"),
                connection.commit,
            ]
            for step in steps[: int(sys.argv[1])]:
                step()
            print("here", flush=True)
            sys.stdin.read()
        """
        for steps in (1, 2, 3):
            child = self.start(code, steps)
            self.assertEqual(self.line(child), "here")
            child.kill()
            child.wait()
            expected = (["lamp"], ["lamp ordered"]) if steps == 3 else ([], [])
            with self.subTest(steps=steps):
                self.assertState(*expected)

    def test_the_file_is_an_ordinary_database_of_the_broker(self) -> None:
        connection, outbox = self.shop()
        with connection:
            connection.execute("CREATE TRIGGER mine AFTER INSERT ON orders BEGIN SELECT 1; END")
            outbox.write("hello")
        command = [sys.executable, str(ROOT / "simplebroker.py"), "-f", str(self.path)]
        status = json.loads(subprocess.check_output([*command, "--status", "--json"], env=self.environ))
        self.assertEqual((status["messages"], status["queues"]), (1, 1))
        self.assertEqual(subprocess.check_output([*command, "read", "orders"], env=self.environ), b"hello\n")
        self.assertEqual(connection.execute("PRAGMA journal_mode").fetchall()[0][0], "wal")

    def test_a_watcher_elsewhere_gets_the_message_after_the_commit_and_not_before(self) -> None:
        connection, outbox = self.shop()
        seen: list[str] = []
        with simplebroker.QueueWatcher("orders", lambda message, _: seen.append(message), db=self.broker()):
            connection.execute("BEGIN IMMEDIATE")
            outbox.write("hello")
            time.sleep(0.3)  # three times as long as a watcher that hears no doorbell sleeps
            self.assertEqual(seen, [])
            connection.commit()
            self.wait_for(lambda: seen, "the watcher gets it")
        self.assertEqual(seen, ["hello"])

    def test_ordinary_writers_and_transactions_of_the_application_mix(self) -> None:
        connection, outbox = self.shop(timeout=DEADLINE_S)
        code = """
            from simplebroker import Queue
            with Queue("orders", "test.db") as queue:
                print("ready", flush=True)
                input()
                print(*[queue.write("plain") for _ in range(300)], flush=True)
        """
        child = self.start(code)
        self.assertEqual(self.line(child), "ready")
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
        mine = []
        for number in range(100):
            with connection:
                connection.execute("INSERT INTO orders VALUES (?)", (str(number),))
                mine.append(outbox.write("joined"))
        theirs = [int(word) for word in self.line(child).split()]
        self.assertEqual((mine, theirs), (sorted(mine), sorted(theirs)))
        with Queue("orders", self.path, settings=FAST) as queue:
            self.assertEqual([message.id for message in queue.peek_all()], sorted(mine + theirs))
        self.assertEqual(connection.execute("SELECT count(*) FROM orders").fetchall()[0][0], 100)

    def test_a_busy_database_is_an_operational_error(self) -> None:
        _, outbox = self.shop(timeout=0.05)
        other = self.connect()
        other.execute("BEGIN IMMEDIATE")
        for call in (lambda: outbox.write("x"), lambda: outbox.write_many(["x"])):
            with self.assertRaises(OperationalError):
                call()
        other.rollback()
        outbox.write("x")

    def test_make_outbox_refuses_what_it_would_damage_and_changes_nothing(self) -> None:
        make_outbox = example("outbox").make_outbox
        connection = self.connect()
        for setup, words in (
            ("PRAGMA application_id = 42", "another program"),
            ("CREATE TABLE messages (mine)", "messages"),
            ("CREATE TABLE mine (x); CREATE INDEX ready ON mine (x)", "ready"),
        ):
            with self.subTest(setup):
                connection.executescript(setup)
                before = connection.execute("SELECT sql FROM sqlite_master").fetchall()
                with self.assertRaisesRegex(ValueError, words):
                    make_outbox(connection)
                self.assertFalse(connection.in_transaction)
                self.assertEqual(connection.execute("SELECT sql FROM sqlite_master").fetchall(), before)
                self.assertEqual(connection.execute("PRAGMA journal_mode").fetchall()[0][0], "delete")
                for table in ("messages", "mine"):
                    connection.execute(f"DROP TABLE IF EXISTS {table}")
                connection.execute("PRAGMA application_id = 0")
        connection.execute("BEGIN")
        with self.assertRaisesRegex(ValueError, "commit it first"):
            make_outbox(connection)
        connection.rollback()
        memory = sqlite3.connect(":memory:")
        self.addCleanup(memory.close)
        with self.assertRaisesRegex(ValueError, "not a file"):
            make_outbox(memory)
        make_outbox(connection)
        make_outbox(connection)  # a second time does nothing
        with Queue("q", self.path, settings=FAST) as queue:
            self.assertEqual(queue.count(), 0)

    @NEEDS_LOCKS
    def test_processes_that_make_the_outbox_wait_for_each_other(self) -> None:
        outbox = example("outbox")
        self.addCleanup(setattr, outbox, "LOCK_TIMEOUT_S", outbox.LOCK_TIMEOUT_S)
        outbox.LOCK_TIMEOUT_S = 0.05
        lock = simplebroker.WriterLock(self.path)
        self.addCleanup(lock.close)
        lock.acquire(time.monotonic() + DEADLINE_S)
        connection = self.connect()
        with self.assertRaises(OperationalError):
            outbox.make_outbox(connection)
        lock.release()
        outbox.make_outbox(connection)

    def test_transactions_of_its_own_are_immediate_and_others_are_joined(self) -> None:
        connection, outbox = self.shop()
        outbox.count()  # the first call looks at the schema
        statements: list[str] = []
        connection.set_trace_callback(statements.append)
        outbox.write_many(["one"])
        self.assertEqual((statements[0], statements[-1]), ("BEGIN IMMEDIATE", "COMMIT"))
        connection.execute("INSERT INTO orders VALUES ('lamp')")
        del statements[:]
        outbox.write_many(["two"])
        self.assertEqual((statements[0], statements[-1]), ("SAVEPOINT outbox", "RELEASE outbox"))
        connection.rollback()
        self.assertState([], ["one"])

    def test_several_processes_may_make_the_outbox_at_once(self) -> None:
        self.connect().execute("CREATE TABLE orders (item)")
        code = """
            import sqlite3, sys, outbox
            print("ready", flush=True)
            sys.stdin.readline()
            connection = sqlite3.connect("test.db")
            outbox.make_outbox(connection)
            outbox.Queue("orders", runner=outbox.OutboxRunner(connection)).write("hello")
            print("written", flush=True)
        """
        children = [self.start(code) for _ in range(3)]
        for child in children:
            self.assertEqual(self.line(child), "ready")
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        self.assertEqual([self.line(child) for child in children], ["written"] * 3)
        self.assertState([], ["hello"] * 3)


# ---------------------------------------------------------------------------------------------------
# Examples: asyncio on aiosqlite, and the extension guide.
# ---------------------------------------------------------------------------------------------------


HAVE_AIOSQLITE = all(importlib.util.find_spec(name) for name in ("aiosqlite", "aiosqlitepool"))


NEEDS_AIOSQLITE = unittest.skipUnless(HAVE_AIOSQLITE, "needs aiosqlite and aiosqlitepool")


def in_loop(test: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Run an async test in an event loop of its own, with a deadline."""

    @functools.wraps(test)
    def run(self: Any) -> None:
        asyncio.run(asyncio.wait_for(test(self), DEADLINE_S))

    return run


def child_environment(**more: str) -> dict[str, str]:
    """What a child process needs to find the module and the examples under test."""
    found = os.pathsep.join((str(Path(simplebroker.__file__).parent), str(EXAMPLES)))
    return {**os.environ, "PYTHONPATH": found, "PYTHONDONTWRITEBYTECODE": "1", **more}


class AsyncCase(unittest.TestCase):
    """A temporary database, and the module under test."""

    @classmethod
    def setUpClass(cls) -> None:
        sys.path.insert(0, str(EXAMPLES))
        try:
            cls.example: Any = importlib.import_module("async_pooled_broker")
        finally:
            sys.path.remove(str(EXAMPLES))

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = directory.name
        self.path = os.path.join(directory.name, "a b#%.db")  # a name that an URI has to quote
        self.settings = Settings(sync_mode="NORMAL")
        self.now_ns = 1_700_000_000_000_000_000

    def open(self, **options: Any) -> Any:
        options.setdefault("settings", self.settings)
        return self.example.AsyncBrokerCore(self.path, **options)

    def plain(self, name: str) -> Queue:
        queue = Queue(name, self.path, settings=self.settings)
        self.addCleanup(queue.close)
        return queue

    @contextlib.contextmanager
    def statements(self) -> Iterator[list[str]]:
        """What is executed meanwhile."""
        import aiosqlite

        seen: list[str] = []
        original = aiosqlite.Connection.execute_fetchall

        def recording(connection: Any, statement: str, params: Any = ()) -> Any:
            seen.append(statement)
            return original(connection, statement, params)

        with mock.patch.object(aiosqlite.Connection, "execute_fetchall", recording):
            yield seen

    async def until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            self.assertLess(time.monotonic(), deadline, "this did not come true in time")
            await asyncio.sleep(0.005)


@NEEDS_AIOSQLITE
class AsyncQueueParityTests(AsyncCase):
    """AsyncQueue is Queue with await."""

    METHODS = ("write", "write_many", "read", "read_many", "read_all", "peek", "peek_many", "peek_all", "has_pending")
    METHODS += ("count", "stats", "lease", "ack", "extend", "release", "dead_letter")
    METHODS += ("move", "move_many", "move_all", "delete")

    # name of the method, arguments, keyword arguments, name under which the result is kept
    STEPS: tuple[tuple[str, tuple[Any, ...], dict[str, Any], str], ...] = (
        ("read", (), {}, ""),
        ("peek", (), {}, ""),
        ("lease", (), {}, ""),
        ("write", ("a",), {}, "a"),
        ("write", ("later",), {"delay": 10}, ""),
        ("write", ("at a time",), {"until": 1_700_000_000_000_000_000 + 20 * 10**9}, ""),
        ("write", ("long ago",), {"until": 1}, ""),
        ("write_many", (["c", "d\n", "é\x00", ""],), {}, "many"),
        ("write_many", ([],), {}, ""),
        ("count", (), {}, ""),
        ("stats", (), {}, ""),
        ("peek", (), {}, ""),
        ("peek_many", (3,), {}, ""),
        ("peek_all", (), {"after": "a"}, ""),
        ("has_pending", (), {"after": "many"}, ""),
        ("read", (), {"message_id": "a"}, ""),
        ("read", (), {"message_id": "a"}, ""),
        ("read", (), {"before": "a"}, ""),
        ("read", (), {"wait": 0}, ""),
        ("lease", (5,), {}, "leased"),
        ("stats", (), {}, ""),
        ("peek", (), {"message_id": "leased"}, ""),
        ("extend", ("leased", 100), {}, ""),
        ("release", ("leased",), {"delay": 1}, ""),
        ("stats", (), {}, ""),
        ("tick", (2,), {}, ""),
        ("lease", (5,), {}, "again"),
        ("ack", ("leased",), {}, ""),
        ("ack", ("again",), {}, ""),
        ("ack", ("again",), {}, ""),
        ("lease", (5,), {}, "third"),
        ("dead_letter", ("third",), {}, ""),
        ("dead_letter", ("third",), {"dest": "elsewhere"}, ""),
        ("lease", (1,), {}, "expired"),
        ("tick", (2,), {}, ""),
        ("ack", ("expired",), {}, ""),
        ("tick", (20,), {}, ""),
        ("read_many", (2,), {}, ""),
        ("write_many", (["m1", "m2", "m3", "m4"],), {}, ""),
        ("move", ("other",), {}, ""),
        ("move_many", ("other", 1), {}, ""),
        ("move_all", ("other",), {}, ""),
        ("move", ("q",), {}, ""),
        ("read_all", (), {}, ""),
        ("write_many", (["x", "y"],), {"delay": 5}, "held"),
        ("delete", (), {"message_id": "held"}, ""),
        ("delete", (), {"message_id": "held"}, ""),
        ("delete", (), {}, ""),
        ("write", ("after all",), {}, ""),
        ("read_all", (), {"after": "held"}, ""),
        ("write", (5,), {}, ""),
        ("write", ("\ud800",), {}, ""),
        ("write", ("x" * 2000,), {}, ""),
        ("write", ("x",), {"delay": -1}, ""),
        ("write", ("x",), {"delay": "1"}, ""),
        ("write", ("x",), {"delay": 1, "until": 5}, ""),
        ("write_many", ("a single body",), {}, ""),
        ("read", (), {"message_id": "12"}, ""),
        ("read", (), {"after": -1}, ""),
        ("read", (), {"after": 1.5}, ""),
        *(("read", (), {"wait": wrong}, "") for wrong in (math.nan, -1, True, "1")),
        ("read_many", (0,), {}, ""),
        ("peek_many", (True,), {}, ""),
        ("lease", (-1,), {}, ""),
        *((method, ("x",), {}, "") for method in ("ack", "extend", "release", "dead_letter")),
        *((method, (None,), {}, "") for method in ("ack", "extend", "release", "dead_letter")),
        ("write", ("unleased",), {}, ""),
        ("peek", (), {}, "unleased"),
        *((method, ("unleased",), {}, "") for method in ("ack", "extend", "release", "dead_letter")),
        ("move", ("no/name",), {}, ""),
        ("move", ("",), {}, ""),
        ("count", (), {}, ""),
    )

    def test_every_method_has_the_parameters_of_queue(self) -> None:
        for name in self.METHODS:
            with self.subTest(name):
                ours, theirs = (getattr(cls, name) for cls in (self.example.AsyncQueue, Queue))
                shapes = [
                    [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
                    for method in (ours, theirs)
                ]
                self.assertEqual(*shapes)

    def test_the_same_calls_give_the_same_results_ids_and_errors(self) -> None:
        settings = Settings(sync_mode="OFF", max_message_size=1000)
        plain_path = os.path.join(self.directory, "plain.db")
        with Broker(plain_path, settings=settings, clock=lambda: self.now_ns) as broker:
            expected = asyncio.run(self.results(broker.queue("q")))

        async def pooled() -> list[Any]:
            async with self.open(settings=settings, clock=lambda: self.now_ns) as core:
                return await self.results(core.queue("q"))

        self.now_ns = 1_700_000_000_000_000_000
        for step, want, got in zip(self.STEPS, expected, asyncio.run(pooled())):
            self.assertEqual(want, got, step)
        dumps = []
        for path in (plain_path, self.path):
            with Broker(path, settings=settings) as broker:
                dumps.append(list(broker.dump()))
        self.assertEqual(*dumps)

    async def results(self, queue: Any) -> list[Any]:
        kept: dict[str, Any] = {}
        results = []
        for method, args, options, name in self.STEPS:
            if method == "tick":
                self.now_ns += args[0] * 10**9
                results.append(None)
                continue
            filters = {"message_id", "after", "before"}
            options = {key: self.id_of(kept, value) if key in filters else value for key, value in options.items()}
            args = tuple(kept.get(arg, arg) if isinstance(arg, str) and method != "write" else arg for arg in args)
            try:
                result = getattr(queue, method)(*args, **options)
                if inspect.isawaitable(result):
                    result = await result
                elif inspect.isasyncgen(result):
                    result = [message async for message in result]
                elif inspect.isgenerator(result):
                    result = list(result)
            except Exception as error:  # noqa: BLE001 - errors are results
                result = type(error).__name__
            kept[name] = result
            results.append(self.plain_value(result))
        return results

    def id_of(self, kept: dict[str, Any], value: Any) -> Any:
        found = kept.get(value, value) if isinstance(value, str) else value
        found = found[-1] if isinstance(found, list) else found
        return found.id if isinstance(found, Message) else found

    def plain_value(self, value: Any) -> Any:
        if isinstance(value, Message):
            return str(value), value.id, value.queue, value.attempt
        return [self.plain_value(each) for each in value] if isinstance(value, list) else value

    @in_loop
    async def test_queues_and_broadcast_are_those_of_broker(self) -> None:
        async with self.open() as core:
            await core.queue("a.1").write("x")
            await core.queue("a.2").write("x", delay=60)
            await core.queue("b").write("x")
            self.assertEqual(await core.broadcast("y", "a.*"), ["a.1", "a.2"])
            with Broker(self.path, settings=self.settings) as plain:
                self.assertEqual(await core.queues(), plain.queues())
                self.assertEqual(await core.queues("a.*"), plain.queues("a.*"))
            self.assertEqual((await core.queues())["a.2"], (1, 0, 1))


@NEEDS_AIOSQLITE
class AsyncIdTests(AsyncCase):
    """Ids only grow, whoever gives them out."""

    @in_loop
    async def test_ids_grow_over_both_while_the_clock_steps_back(self) -> None:
        async with self.open(clock=lambda: self.now_ns) as core:
            queue, plain = core.queue("q"), Broker(self.path, settings=self.settings, clock=lambda: self.now_ns)
            self.addCleanup(plain.close)
            ids = []
            for _ in range(5):
                ids += [await queue.write("x"), plain.queue("q").write("x"), *await queue.write_many(["x", "y"])]
                self.now_ns -= 3600 * 10**9
            self.assertEqual(ids, sorted(set(ids)))

    @in_loop
    async def test_the_id_of_a_removed_message_is_never_given_out_again(self) -> None:
        async with self.open(clock=lambda: self.now_ns) as core:
            queue = core.queue("q")
            last = 0

            async def acknowledge() -> None:
                await queue.ack(await queue.lease())

            for remove in (queue.read, acknowledge, lambda: queue.read_many(5), queue.delete):
                new = await queue.write("x")
                self.assertGreater(new, last)
                await remove()
                last, self.now_ns = new, self.now_ns - 10**9
            new = await queue.write("x")
            self.assertGreater(new, last)
            await queue.delete(message_id=new)
            self.assertGreater(await queue.write("x"), new)

    @in_loop
    async def test_tasks_that_write_together_share_commits(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")
            with self.statements() as statements:
                ids = await asyncio.gather(*(queue.write(str(n)) for n in range(200)))
            self.assertEqual(ids, sorted(set(ids)))
            self.assertEqual([str(m) async for m in queue.peek_all()], [str(n) for n in range(200)])
        self.assertLess(statements.count("COMMIT"), 20)

    @in_loop
    async def test_tasks_that_write_one_after_the_other_share_commits_too(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")

            async def write() -> None:
                for n in range(25):
                    await queue.write(str(n))

            with self.statements() as statements:
                await asyncio.gather(*(write() for _ in range(8)))
            self.assertEqual(await queue.count(), 200)
        self.assertLess(statements.count("COMMIT"), 40)

    @in_loop
    async def test_leases_are_not_synced_but_everything_else_is(self) -> None:
        async with self.open(settings=Settings(sync_mode="FULL")) as core:
            queue = core.queue("q")
            await queue.write("x")
            modes = []
            for call in (lambda: queue.lease(30), lambda: queue.write("y"), lambda: queue.lease(30), queue.read):
                with self.statements() as statements:
                    await call()
                modes.append([text for text in statements if text.startswith("PRAGMA synchronous")])
        normal, full = ["PRAGMA synchronous = NORMAL"], ["PRAGMA synchronous = FULL"]
        self.assertEqual(modes, [normal, full, normal, full])


@NEEDS_AIOSQLITE
class AsyncWriterTests(AsyncCase):
    """One failing or cancelled call is nobody else's problem."""

    @in_loop
    async def test_a_lost_lease_does_not_fail_the_calls_of_the_same_commit(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")
            await queue.write_many(["a", "b"])
            a, b = await queue.lease(), await queue.lease()
            await queue.ack(a)
            calls = (queue.ack(a), queue.ack(b), queue.write("c"), queue.ack(a), queue.write("d"))
            results = await asyncio.gather(*calls, return_exceptions=True)
            lost = [isinstance(result, simplebroker.LeaseLost) for result in results]
            self.assertEqual(lost, [True, False, False, True, False])
            self.assertEqual([str(m) for m in await queue.read_many(9)], ["c", "d"])

    @in_loop
    async def test_a_failed_statement_changes_nothing(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")

            async def work() -> None:
                await core.run_many(simplebroker.INSERT_LOADED, [(5, "q", "x", None, 0), (5, "q", "y", None, 0)])

            with self.assertRaises(simplebroker.IntegrityError):
                await core.transact(work)
            self.assertEqual((await queue.stats()).total, 0)
            await queue.write("goes on")
            self.assertEqual(await queue.read(), "goes on")

    @in_loop
    async def test_a_write_that_is_cancelled_before_its_turn_is_not_written(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")
            lock = WriterLock(core.path)
            lock.acquire(time.monotonic() + 10)
            cancelled = asyncio.ensure_future(queue.write("cancelled"))
            kept = asyncio.ensure_future(queue.write("kept"))
            await asyncio.sleep(0)
            cancelled.cancel()
            lock.release()
            lock.close()
            await kept
            self.assertTrue(cancelled.cancelled())
            self.assertEqual([str(m) for m in await queue.read_many(9)], ["kept"])

    @in_loop
    async def test_a_write_that_is_cancelled_before_the_commit_is_undone_and_its_neighbours_are_not(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")

            async def cancel_the_first() -> None:
                writes[0].cancel()  # its row is inserted already

            writes = [asyncio.ensure_future(queue.write(body)) for body in ("cancelled", "kept")]
            await asyncio.sleep(0)
            await core.transact(cancel_the_first)
            await asyncio.wait(writes)
            self.assertTrue(writes[0].cancelled())
            self.assertEqual([str(m) for m in await queue.read_many(9)], ["kept"])

    @in_loop
    async def test_cancelled_reads_and_leases_lose_nothing(self) -> None:
        dice = random.Random(5)
        got: list[str] = []
        async with self.open() as core:
            queue = core.queue("q")
            bodies = [str(n) for n in range(300)]
            await queue.write_many(bodies)

            async def impatient(number: int) -> None:
                for _ in range(30):
                    call = asyncio.ensure_future(queue.read() if number % 2 else queue.lease(1000))
                    await asyncio.sleep(dice.choice((0, 0.0005, 0.001, 0.002, 0.005, 0.05)))
                    call.cancel()
                    try:
                        message = await call
                    except asyncio.CancelledError:
                        continue
                    if message is not None:
                        got.append(message)

            await asyncio.gather(*(impatient(number) for number in range(8)))
        leased = [message for message in got if message.attempt]
        queue = self.plain("q")
        self.assertEqual(queue.stats(), (300 - len(got), len(leased), 0))
        self.assertEqual(sorted([*got, *queue.read_many(1000)]), sorted(set(bodies)))
        self.assertTrue(0 < len(got) < 240)  # some were cancelled, some were not

    @in_loop
    async def test_a_cancelled_lease_does_not_count_as_an_attempt(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")
            await queue.write("x")
            completed = 0
            for delay in (0, 0.0003, 0.0006, 0.001, 0.0015, 0.002, 0.003) * 10:
                call = asyncio.ensure_future(queue.lease(1000, wait=20))
                await asyncio.sleep(delay)
                call.cancel()
                try:
                    message = await call
                except asyncio.CancelledError:
                    continue
                completed += 1
                await queue.release(message)
            message = await queue.lease(1000, wait=20)
            self.assertEqual((message.attempt, (await queue.stats()).total), (completed + 1, 1))

    @NEEDS_LOCKS
    @in_loop
    async def test_a_busy_database_is_an_error_in_time_and_does_not_stop_the_loop(self) -> None:
        async with self.open(settings=Settings(busy_timeout_ms=300)) as core:
            queue = core.queue("q")
            await queue.write("x")
            lock = WriterLock(core.path)  # another process that writes and does not end
            lock.acquire(time.monotonic() + 10)
            self.addCleanup(lock.close)
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await asyncio.sleep(0.01)
                    ticks += 1

            ticking = asyncio.ensure_future(tick())
            begin = time.monotonic()
            with self.assertRaises(simplebroker.OperationalError):
                await queue.read()
            self.assertLess(time.monotonic() - begin, 10)
            self.assertGreater(ticks, 3)
            self.assertEqual(await queue.count(), 1)  # readers do not wait
            ticking.cancel()
            lock.release()
            self.assertEqual(await queue.read(), "x")

    async def cancel_writer(self, calls: list[Any], *, after: float = 0) -> list[Any]:
        """Cancel the task of the broker that writes, as a shutdown that cancels all tasks does."""
        before = asyncio.all_tasks()
        tasks = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0)
        await asyncio.sleep(after)
        for task in asyncio.all_tasks() - before - set(tasks):
            task.cancel()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)

    @in_loop
    async def test_a_cancelled_writer_task_ends_the_calls_in_flight_and_does_the_others(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")
            results = await self.cancel_writer([queue.write(str(n)) for n in range(200)])
            cancelled = [result for result in results if isinstance(result, asyncio.CancelledError)]
            written = [result for result in results if isinstance(result, int)]
            self.assertEqual(len(cancelled) + len(written), 200)
            self.assertTrue(cancelled and written)
            self.assertGreater(await queue.write("after"), max(written))
            self.assertLessEqual(set(written), {message.id for message in await queue.read_many(1000)})

    @NEEDS_LOCKS
    @in_loop
    async def test_a_writer_task_that_is_cancelled_while_it_waits_does_not_keep_the_lock(self) -> None:
        lock = WriterLock(self.path)
        self.addCleanup(lock.close)
        async with self.open() as core:
            queue = core.queue("q")
            lock.acquire(time.monotonic() + 10)
            results = await self.cancel_writer([queue.write("x")], after=0.1)
            self.assertIsInstance(results[0], asyncio.CancelledError)
            lock.release()
            await asyncio.get_running_loop().run_in_executor(None, self.plain("q").write, "by another")
            self.assertEqual(await queue.read(), "by another")


@NEEDS_AIOSQLITE
class AsyncOpeningTests(AsyncCase):
    """The file is made, checked, and not mistaken for another one."""

    @in_loop
    async def test_a_file_that_is_no_database_is_refused_and_left_alone(self) -> None:
        Path(self.path).write_text("these are notes\n" * 100)
        with self.assertRaises(simplebroker.DatabaseError):
            async with self.open():
                pass
        self.assertEqual(Path(self.path).read_text(), "these are notes\n" * 100)

    @in_loop
    async def test_a_deleted_database_is_an_error_and_not_a_silent_loss(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")
            await queue.write("x")
            self.assertEqual(await queue.count(), 1)  # so that a connection for reading is open
            with Broker(self.path, settings=self.settings) as plain:
                self.assertTrue(plain.delete_database())
            with self.assertRaises(simplebroker.OperationalError):
                await queue.write("into nowhere")
            with self.assertRaises(simplebroker.OperationalError):
                await queue.count()
            self.plain("q").write("of the new file")
            with self.assertRaises(simplebroker.OperationalError):
                await queue.read()
        async with self.open() as core:
            self.assertEqual(await core.queue("q").read(), "of the new file")

    @in_loop
    async def test_a_closed_broker_says_so(self) -> None:
        core = self.open()
        for _ in range(2):
            with self.assertRaisesRegex(simplebroker.BrokerError, "not open"):
                await core.queue("q").write("x")
            with self.assertRaisesRegex(simplebroker.BrokerError, "not open"):
                await core.queue("q").peek()
            await core.close()

    def test_no_thread_is_left_after_closing(self) -> None:
        before = set(threading.enumerate())

        async def use() -> None:
            async with self.open() as core:
                queue = core.queue("q")
                self.assertIsNone(await queue.read(wait=0.05))
                await queue.write("x")
                await asyncio.gather(*(queue.peek() for _ in range(20)))

        asyncio.run(use())
        for thread in set(threading.enumerate()) - before:
            thread.join(20)
            self.assertFalse(thread.is_alive(), thread)


@NEEDS_AIOSQLITE
class AsyncWaitingTests(AsyncCase):
    """Waiting tasks wake at a commit of any process."""

    def setUp(self) -> None:
        super().setUp()
        patch = mock.patch.object(self.example, "LOOK_S", 1000.0)  # nothing is found by looking
        patch.start()
        self.addCleanup(patch.stop)

    @in_loop
    async def test_a_write_by_another_process_wakes_a_reader(self) -> None:
        async with self.open() as core:
            waiting = asyncio.ensure_future(core.queue("q").read(wait=math.inf))
            await asyncio.sleep(0.1)
            command = [sys.executable, simplebroker.__file__, "-f", self.path, "write", "q", "hello"]
            writer = await asyncio.create_subprocess_exec(*command, env=child_environment())
            self.assertEqual(await writer.wait(), 0)
            self.assertEqual(await asyncio.wait_for(waiting, 20), "hello")

    @in_loop
    async def test_a_write_by_a_task_wakes_all_who_wait_and_each_message_goes_to_one(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")
            waiting = [asyncio.ensure_future(queue.read(wait=20)) for _ in range(10)]
            await asyncio.sleep(0.05)
            for n in range(10):
                await queue.write(str(n))
            self.assertEqual(sorted(await asyncio.gather(*waiting)), [str(n) for n in range(10)])

    @in_loop
    async def test_a_delayed_message_wakes_when_it_is_due(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")
            begin = time.monotonic()
            await queue.write("later", delay=0.3)
            self.assertEqual(await queue.read(wait=20), "later")
            self.assertGreaterEqual(time.monotonic() - begin, 0.29)

    @in_loop
    async def test_an_ended_lease_wakes_the_next_consumer(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")
            await queue.write("x")
            await queue.lease(0.2)
            again = await queue.lease(30, wait=20)
            self.assertEqual((again, again.attempt), ("x", 2))

    @in_loop
    async def test_a_commit_of_a_task_wakes_a_synchronous_reader(self) -> None:
        settings = Settings(max_interval_s=60)  # it does not look by itself before that
        async with self.open() as core:
            with Queue("q", self.path, settings=settings) as plain:
                loop = asyncio.get_running_loop()
                waiting = loop.run_in_executor(None, lambda: plain.read(wait=50))
                await self.until(lambda: any(t.name == "simplebroker-wait" for t in threading.enumerate()))
                await asyncio.sleep(0.1)
                await core.queue("q").write("wake up")
                self.assertEqual(await asyncio.wait_for(waiting, 20), "wake up")

    @in_loop
    async def test_a_task_wakes_by_a_commit_of_its_broker_where_nothing_can_be_heard(self) -> None:
        async with self.open(settings=Settings(max_interval_s=60)) as core:
            queue = core.queue("q")
            with mock.patch.object(WriterLock, "ring"):
                waiting = asyncio.ensure_future(queue.read(wait=50))
                await self.until(lambda: any(t.name == "simplebroker-wait" for t in threading.enumerate()))
                await asyncio.sleep(0.1)
                await queue.write("wake up")
                self.assertEqual(await asyncio.wait_for(waiting, 20), "wake up")

    @in_loop
    async def test_a_commit_while_listening_begins_is_not_missed(self) -> None:
        begun, go_on = threading.Event(), threading.Event()
        original = Broker.alarm

        def slow_alarm(broker: Broker) -> Any:
            begun.set()
            go_on.wait(20)
            return original(broker)

        async with self.open() as core:
            with mock.patch.object(Broker, "alarm", slow_alarm):
                waiting = asyncio.ensure_future(core.queue("q").read(wait=50))
                await self.until(begun.is_set)
                await asyncio.sleep(0.1)  # it has looked, and found nothing
                self.plain("q").write("in between")
                go_on.set()
                self.assertEqual(await asyncio.wait_for(waiting, 20), "in between")

    @in_loop
    async def test_a_cancelled_reader_ends_although_it_is_woken_at_the_same_moment(self) -> None:
        for steps in range(6):
            event = asyncio.Event()
            waiting = asyncio.ensure_future(self.example.wait_for_event(event, math.inf))
            await asyncio.sleep(0.01)
            event.set()
            for _ in range(steps):
                await asyncio.sleep(0)
            if waiting.cancel():  # it had not ended before
                await asyncio.wait([waiting])
                self.assertTrue(waiting.cancelled(), f"after {steps} steps")

    @in_loop
    async def test_waiting_ends_at_its_time_and_its_thread_with_it(self) -> None:
        async with self.open() as core:
            begin = time.monotonic()
            with mock.patch.object(self.example, "LOOK_S", 1.0):
                self.assertIsNone(await core.queue("q").read(wait=0.2))
            self.assertTrue(0.19 < time.monotonic() - begin < 10)

            def listening() -> bool:
                return any(thread.name == "simplebroker-async-listener" for thread in threading.enumerate())

            await self.until(lambda: not listening())
            cancelled = asyncio.ensure_future(core.queue("q").read(wait=math.inf))
            await self.until(listening)
            cancelled.cancel()
            await self.until(lambda: not listening())


@NEEDS_AIOSQLITE
class AsyncConsumerTests(AsyncCase):
    """read_all() and AsyncWorker: at least once."""

    @in_loop
    async def test_read_all_gives_back_what_the_loop_left(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")
            await queue.write_many([str(n) for n in range(10)])
            stream = queue.read_all()
            async for message in stream:
                if message == "5":
                    break
            self.assertEqual((await queue.stats()).total, 5)
            await stream.aclose()
            self.assertEqual(await queue.stats(), (5, 0, 0))
            again = await queue.lease()
            self.assertEqual((again, again.attempt), ("5", 1))  # what nobody finished is no attempt

    @in_loop
    async def test_closing_the_broker_gives_back_what_a_stream_holds(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")
            await queue.write_many(["a", "b", "c"])
            stream = queue.read_all(lease=1000)
            self.assertEqual(await stream.__anext__(), "a")
        self.assertEqual(self.plain("q").stats(), (3, 0, 0))
        await stream.aclose()

    @in_loop
    async def test_a_worker_retries_dead_letters_and_handles_the_rest(self) -> None:
        calls: list[tuple[str, int]] = []

        async def handler(message: Message) -> None:
            calls.append((str(message), message.attempt))
            if message == "bad" or (message == "flaky" and message.attempt < 3):
                raise ValueError(message)

        async with self.open() as core:
            queue = core.queue("q")
            await queue.write_many(["good", "bad", "flaky", "good too"])
            worker = self.example.AsyncWorker(queue, handler, max_attempts=3, backoff=0.02)
            running = asyncio.ensure_future(worker.run())
            with self.assertLogs("simplebroker.async", "ERROR") as logs:
                await self.until(lambda: worker.handled == 3 and worker.dead_lettered == 1)
            worker.stop()
            await asyncio.wait_for(running, 20)
            self.assertEqual(len(logs.records), 5)
            self.assertEqual(worker.failed, 5)
            expected = [("good", 1), ("good too", 1)]
            expected += [(name, n) for name in ("bad", "flaky") for n in (1, 2, 3)]
            self.assertEqual(sorted(calls), sorted(expected))
            self.assertEqual((await queue.stats()).total, 0)
            self.assertEqual(await core.queue("q.dead").read(), "bad")

    @in_loop
    async def test_a_handler_that_cancels_itself_has_failed(self) -> None:
        async def handler(message: Message) -> None:
            if message.attempt == 1:
                raise asyncio.CancelledError

        async with self.open() as core:
            queue = core.queue("q")
            await queue.write("x")
            worker = self.example.AsyncWorker(queue, handler, backoff=0.0, drain=True)
            with self.assertLogs("simplebroker.async", "ERROR"):
                await worker.run()
            self.assertEqual((worker.failed, worker.handled, (await queue.stats()).total), (1, 1, 0))

    @in_loop
    async def test_a_message_given_back_just_after_the_last_look_is_not_left(self) -> None:
        async def handler(message: Message) -> None:
            if message.attempt == 1:
                raise ValueError

        async with self.open() as core:
            queue = core.queue("q")
            await queue.write("x")
            worker = self.example.AsyncWorker(queue, handler, backoff=0.0, drain=True)
            take = worker._take

            async def take_and_dawdle(free: int, *, look_first: bool) -> list[Message]:
                found = await take(free, look_first=look_first)
                while worker._running and not found:
                    await asyncio.sleep(0.001)
                return found

            with mock.patch.object(worker, "_take", take_and_dawdle), self.assertLogs("simplebroker.async", "WARNING"):
                await worker.run()
            self.assertEqual((worker.failed, worker.handled, (await queue.stats()).total), (1, 1, 0))

    @in_loop
    async def test_what_was_handled_is_acknowledged_although_the_worker_is_cancelled(self) -> None:
        handled = asyncio.Event()
        lock = WriterLock(self.path)

        async def handler(message: Message) -> None:
            deadline = time.monotonic() + 20  # the acknowledgement will have to wait
            await asyncio.get_running_loop().run_in_executor(None, lock.acquire, deadline)
            handled.set()

        async with self.open() as core:
            queue = core.queue("q")
            await queue.write("x")
            running = asyncio.ensure_future(self.example.AsyncWorker(queue, handler).run())
            await handled.wait()
            await asyncio.sleep(0.05)
            running.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await running
            lock.close()
        self.assertEqual(self.plain("q").stats(), (0, 0, 0))

    @NEEDS_LOCKS
    @in_loop
    async def test_closing_ends_although_the_database_is_busy(self) -> None:
        lock = WriterLock(self.path)
        self.addCleanup(lock.close)
        with self.assertLogs("simplebroker.async", "WARNING"):
            async with self.open(settings=Settings(busy_timeout_ms=100)) as core:
                queue = core.queue("q")
                await queue.write_many(["a", "b"])
                stream = queue.read_all()
                self.assertEqual(await stream.__anext__(), "a")
                lock.acquire(time.monotonic() + 10)
        await stream.aclose()
        lock.release()
        self.assertEqual(self.plain("q").stats().leased, 2)

    @in_loop
    async def test_a_message_that_was_leased_before_is_leased_alone(self) -> None:
        async with self.open() as core:
            queue = core.queue("q")
            await queue.write_many(["a", "b", "suspect", "c", "d"])
            suspect = (await queue.peek_many(3))[2]
            await queue.release(await queue.lease(30, message_id=suspect.id))
            batches = [[str(m) for m in await queue.lease_many(10)] for _ in range(3)]
            self.assertEqual(batches, [["a", "b"], ["suspect"], ["c", "d"]])

    @in_loop
    async def test_a_message_that_killed_its_consumers_is_dead_lettered_unseen(self) -> None:
        seen: list[str] = []

        async def handler(message: Message) -> None:
            seen.append(message)

        async with self.open(clock=lambda: self.now_ns) as core:
            queue = core.queue("q")
            await queue.write("killer")
            for _ in range(2):
                await queue.lease(1)
                self.now_ns += 2 * 10**9
            worker = self.example.AsyncWorker(queue, handler, max_attempts=2, dead_letter="cellar", drain=True)
            await worker.run()
            self.assertEqual((worker.dead_lettered, await core.queue("cellar").read()), (1, "killer"))
            self.assertEqual(seen, [])

    @in_loop
    async def test_leases_are_renewed_while_handlers_run(self) -> None:
        attempts: list[int] = []

        async def slow(message: Message) -> None:
            attempts.append(message.attempt)
            await asyncio.sleep(1.2)

        async with self.open() as core:
            queue = core.queue("q")
            await queue.write_many(["a", "b"])
            worker = self.example.AsyncWorker(queue, slow, lease=0.5, drain=True)
            await worker.run()
            self.assertEqual((attempts, worker.handled, (await queue.stats()).total), ([1, 1], 2, 0))

    @in_loop
    async def test_stop_ends_the_running_handlers_and_leaves_the_rest(self) -> None:
        gate = asyncio.Event()
        begun: list[str] = []
        ended: list[str] = []

        async def handler(message: Message) -> None:
            begun.append(message)
            await gate.wait()
            ended.append(message)

        async with self.open() as core:
            queue = core.queue("q")
            await queue.write_many([str(n) for n in range(20)])
            worker = self.example.AsyncWorker(queue, handler, concurrency=4)
            running = asyncio.ensure_future(worker.run())
            await self.until(lambda: len(begun) == 4)
            worker.stop()
            gate.set()
            await asyncio.wait_for(running, 20)
            self.assertEqual((sorted(begun), worker.handled), (sorted(ended), 4))
            self.assertEqual(await queue.stats(), (16, 0, 0))

    @NEEDS_LOCKS
    @in_loop
    async def test_stop_while_messages_are_being_leased_gives_them_back(self) -> None:
        begun: list[str] = []

        async def handler(message: Message) -> None:
            begun.append(message)

        lock = WriterLock(self.path)
        self.addCleanup(lock.close)
        async with self.open() as core:
            queue = core.queue("q")
            await queue.write_many(["a", "b", "c"])
            lock.acquire(time.monotonic() + 10)
            worker = self.example.AsyncWorker(queue, handler)
            running = asyncio.ensure_future(worker.run())
            await asyncio.sleep(0.1)
            worker.stop()
            lock.release()
            await asyncio.wait_for(running, 20)
            self.assertEqual((begun, await queue.stats()), ([], (3, 0, 0)))
            self.assertEqual((await queue.lease()).attempt, 1)

    @in_loop
    async def test_a_cancelled_worker_gives_its_messages_back_unattempted(self) -> None:
        begun: list[str] = []

        async def handler(message: Message) -> None:
            begun.append(message)
            await asyncio.sleep(1000)

        async with self.open() as core:
            queue = core.queue("q")
            await queue.write_many([str(n) for n in range(20)])
            running = asyncio.ensure_future(self.example.AsyncWorker(queue, handler, concurrency=4).run())
            await self.until(lambda: len(begun) == 4)
            running.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await running
            self.assertEqual(await queue.stats(), (20, 0, 0))
            self.assertEqual((await queue.lease()).attempt, 1)

    @unittest.skipUnless(hasattr(signal, "SIGKILL"), "needs SIGKILL")
    def test_a_killed_worker_loses_nothing(self) -> None:
        log = os.path.join(self.directory, "handled")
        program = f"""
import asyncio, os
from async_pooled_broker import AsyncBrokerCore, AsyncWorker
async def main():
    log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    async def handler(message):
        os.write(log, f"{{message}}\\n".encode())
    async with AsyncBrokerCore({self.path!r}) as core:
        await AsyncWorker(core.queue("q"), handler, concurrency=8, lease=0.5).run()
asyncio.run(main())
"""
        queue = self.plain("q")
        bodies = [f"{n:04}" for n in range(1000)]
        queue.write_many(bodies)
        with subprocess.Popen([sys.executable, "-c", program], env=child_environment()) as worker:
            deadline = time.monotonic() + DEADLINE_S
            while not os.path.exists(log) or os.path.getsize(log) < 500:
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.002)
            worker.kill()
        handled = Path(log).read_text().split()
        left = []
        while (message := queue.lease(1000, wait=2)) is not None:  # until the leases of the dead have ended
            left.append(str(message))
        self.assertGreater(len(left), 0)
        self.assertEqual(set(handled) | set(left), set(bodies))
        self.assertLess(len(set(handled) & set(left)), 64)  # handled, and killed before it could say so


@NEEDS_AIOSQLITE
class AsyncSharingTests(AsyncCase):
    """Tasks and other processes on one queue, all at the same time."""

    PROGRAM = """
import sys, threading
from simplebroker import Queue
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
taken = []
def read():
    while (message := queue.read(wait=60)) != "end":
        taken.append(message)
with Queue("q", path) as queue:
    reader = threading.Thread(target=read)
    print("ready", flush=True)
    sys.stdin.readline()
    reader.start()
    for n in range(count):
        queue.write(f"{name}-{n}")
    print("written", flush=True)
    reader.join()
for message in taken:
    print(message.id, message)
"""

    @in_loop
    async def test_every_message_is_handled_once_and_ids_follow_the_order_of_each_writer(self) -> None:
        tasks, processes, by_task, by_process = 8, 2, 100, 400
        here: list[tuple[int, str]] = []
        async with self.open() as core:
            queue = core.queue("q")
            children = [
                await asyncio.create_subprocess_exec(
                    *(sys.executable, "-c", self.PROGRAM, self.path, f"process{number}", str(by_process)),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=child_environment(BROKER_SYNC_MODE="NORMAL"),
                )
                for number in range(processes)
            ]
            for child in children:
                self.assertEqual(await child.stdout.readline(), b"ready\n")

            async def write(number: int) -> None:
                for n in range(by_task):
                    await queue.write(f"task{number}-{n}")

            async def read() -> None:
                while (message := await queue.read(wait=60)) != "end":
                    here.append((message.id, str(message)))

            for child in children:
                child.stdin.write(b"go\n")
            readers = [asyncio.ensure_future(read()) for _ in range(tasks)]
            await asyncio.gather(*(write(number) for number in range(tasks)))
            for child in children:
                self.assertEqual(await child.stdout.readline(), b"written\n")
            await queue.write_many(["end"] * (tasks + processes))  # everything else has lower ids
            await asyncio.gather(*readers)
            lines = [line for child in children for line in (await child.communicate())[0].decode().splitlines()]
        there = [(int(number), body) for number, _, body in (line.partition(" ") for line in lines)]
        everything = sorted(here + there)
        self.assertEqual(len({id for id, _ in everything}), len(everything))
        written: dict[str, list[int]] = {}
        for _, body in everything:
            writer, _, n = body.partition("-")
            written.setdefault(writer, []).append(int(n))
        expected = {f"task{number}": list(range(by_task)) for number in range(tasks)}
        expected.update({f"process{number}": list(range(by_process)) for number in range(processes)})
        self.assertEqual(written, expected)
        self.assertTrue(here and there)


@NEEDS_AIOSQLITE
class AsyncProgramTests(unittest.TestCase):
    """The programs end by themselves and say that their results are right."""

    def run_example(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as directory:
            return subprocess.run(
                [sys.executable, str(EXAMPLES / arguments[0]), *arguments[1:]],
                cwd=directory,
                env=child_environment(BROKER_SYNC_MODE="NORMAL"),
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
                check=False,
            )

    def test_the_demonstration_of_the_broker_passes_its_checks(self) -> None:
        done = self.run_example("async_pooled_broker.py", "100")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertTrue(done.stdout.endswith("All checks passed.\n"), done.stdout)
        self.assertGreaterEqual(done.stdout.count("ok  "), 12)

    def test_the_worker_example_gets_the_result_that_it_prints(self) -> None:
        done = self.run_example("async_simple_example.py")
        expected = "orders handled: 99, attempts failed: 3, dead-lettered: 1\n"
        expected += "paid: 49500, dead letter: not an order, left: 0\ncorrect\n"
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, expected, ""))

    def test_the_batch_example_gets_the_result_that_it_prints(self) -> None:
        done = self.run_example("async_simple_example.py", "batch")
        self.assertEqual((done.returncode, done.stdout), (0, "batches: 5, sum: 499500, left: 0\ncorrect\n"))

    def test_an_unknown_example_is_a_usage_error(self) -> None:
        done = self.run_example("async_simple_example.py", "nonsense")
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertIn("usage:", done.stderr)


class GuideTests(unittest.TestCase):
    """Every Python block of the guides runs: those of a section in order, in one namespace and directory."""

    def sections(self, name: str) -> dict[str, str]:
        parts = re.split(r"(?m)^## ", (EXAMPLES / name).read_text(encoding="utf-8"))[1:]
        return {part.split("\n", 1)[0]: part for part in parts}

    def blocks(self, section: str) -> list[str]:
        return re.findall(r"(?s)```python\n(.*?)```", section)

    def run_section(self, name: str, title: str) -> None:
        sections = self.sections(name)
        section = sections[title]
        if "<!-- needs: aiosqlite -->" in section and not HAVE_AIOSQLITE:
            self.skipTest("needs aiosqlite")
        continues = re.search(r"<!-- continues: (.*) -->", section)
        blocks = self.blocks(sections[continues[1]])[:1] if continues else []
        blocks += self.blocks(section)
        self.assertTrue(blocks)
        namespace: dict[str, Any] = {"__name__": "guide"}
        previous = os.getcwd()
        with tempfile.TemporaryDirectory() as directory, mock.patch.dict(os.environ, BROKER_SYNC_MODE="NORMAL"):
            os.chdir(directory)
            try:
                # One file would have the __future__ import of its first block for all.
                for number, block in enumerate(blocks):
                    flags = future.annotations.compiler_flag
                    code = compile(block, f"{name}: {title}, block {number}", "exec", flags)
                    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                        exec(code, namespace)
            finally:
                os.chdir(previous)

    def test_the_sections_are_those_of_this_suite(self) -> None:
        sections = self.sections("example_extension_implementation.md")
        expected = ["Daemon-thread runner", "Async SQLite runner", "Connection pool runner", "Mock runner"]
        expected.append("Complete async queue")
        self.assertEqual([title for title, text in sections.items() if self.blocks(text)], expected)

    def test_the_daemon_thread_runner_stops_by_itself_and_starts_again(self) -> None:
        self.run_section("example_extension_implementation.md", "Daemon-thread runner")

    def test_the_async_sqlite_runner_commits_and_rolls_back(self) -> None:
        self.run_section("example_extension_implementation.md", "Async SQLite runner")

    def test_the_pooled_runner_reads_while_another_thread_writes(self) -> None:
        self.run_section("example_extension_implementation.md", "Connection pool runner")

    def test_the_mock_runner_tests_an_application(self) -> None:
        self.run_section("example_extension_implementation.md", "Mock runner")

    def test_the_complete_async_queue_retries_streams_and_shares_its_file(self) -> None:
        self.run_section("example_extension_implementation.md", "Complete async queue")

    @NEEDS_AIOSQLITE
    def test_the_blocks_of_the_async_readme_run(self) -> None:
        sys.path.insert(0, str(EXAMPLES))
        self.addCleanup(sys.path.remove, str(EXAMPLES))
        titles = [title for title, text in self.sections("ASYNC_README.md").items() if self.blocks(text)]
        self.assertTrue(titles)
        for title in titles:
            with self.subTest(title):
                self.run_section("ASYNC_README.md", title)


# ---------------------------------------------------------------------------------------------------
# Examples: shell scripts.
# ---------------------------------------------------------------------------------------------------


@functools.cache
def broker_command() -> Path:
    """A command that runs simplebroker.py of ROOT. Its byte code is compiled once, and nothing else is imported."""
    scratch = tempfile.TemporaryDirectory(prefix="broker command ")
    atexit.register(scratch.cleanup)
    path = Path(scratch.name, "broker")
    path.write_text(
        "#!/bin/sh\n"
        "unset PYTHONDONTWRITEBYTECODE\n"
        f"PYTHONPYCACHEPREFIX={shlex.quote(scratch.name)} PYTHONPATH={shlex.quote(str(ROOT))} "
        f"exec {shlex.quote(sys.executable)} -S "
        "-c 'import simplebroker; simplebroker.run_and_exit()' \"$@\"\n"
    )
    path.chmod(0o755)
    return path


SCRIPTS = ("resilient_worker.sh", "dead_letter_queue.sh", "queue_migration.sh", "work_stealing.sh")


BASH = shutil.which("bash")


TIMEOUT_S = 120.0  # of a script: only a hang takes so long


WILD = (  # what shells, printf, echo, jq, the broker's own options and terminals might take for something else
    "--help\n1837025672140161024 1 1837025672140161024.1\n $(touch x) `touch x`; touch x & a'b\"c\\d\\n%s * ~ \t\r\n"
    "nul \0 escape \x1b[31m \x9b31m é 漢 \U0001f600 \u2028 two trailing newlines\n\n"
)


HOSTILE_BODIES = ("", "\n", "-", WILD, "long " * 100_000)


def has_tools() -> bool:
    """Are bash 4.4 and jq here?"""
    if os.name != "posix" or BASH is None or shutil.which("jq") is None:
        return False
    is_new = "((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404))"
    return subprocess.run([BASH, "-c", is_new], check=False).returncode == 0


def in_parallel(*actions: Callable[[], object]) -> None:
    """Do these at the same time; the first error is raised when all have ended."""
    with ThreadPoolExecutor(len(actions)) as pool:
        for future in [pool.submit(action) for action in actions]:
            future.result()


@unittest.skipUnless(has_tools(), "needs bash 4.4 and jq")
class ShellExample(unittest.TestCase):
    """What the tests of a script have in common. Each test has a directory with a database, and a space in its name."""

    script: ClassVar[str] = SCRIPTS[0]

    def setUp(self) -> None:
        scratch = tempfile.TemporaryDirectory(prefix="shell example ")
        self.addCleanup(scratch.cleanup)
        self.dir = Path(scratch.name).resolve()
        (self.dir / "tmp").mkdir()
        self.broker = broker_command()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
        self.environ = {
            **kept,
            "BROKER": str(self.broker),
            "BROKER_DEFAULT_DB_LOCATION": str(self.dir),
            "BROKER_DEFAULT_DB_NAME": "test.db",
            "BROKER_SYNC_MODE": "OFF",
            "TMPDIR": str(self.dir / "tmp"),
        }

    @contextmanager
    def queue(self, name: str = "jobs") -> Iterator[Queue]:
        with Queue(name, db_path=self.dir / "test.db") as queue:
            yield queue

    def write(self, *bodies: str, queue: str = "jobs") -> list[int]:
        with self.queue(queue) as q:
            return q.write_many(bodies)

    def ready(self, queue: str = "jobs") -> list[str]:
        with self.queue(queue) as q:
            return [str(message) for message in q.peek_all()]

    def counts(self) -> dict[str, int]:
        with Broker(self.dir / "test.db") as broker:
            return {name: stats.total for name, stats in broker.queues().items()}

    def start(self, *arguments: object, script: object = None, **settings: object) -> subprocess.Popen[str]:
        """Start the script, with settings in its environment."""
        assert BASH is not None
        process = subprocess.Popen(
            [BASH, str(EXAMPLES / str(script or self.script)), *map(str, arguments)],
            env={**self.environ, **{name: str(value) for name, value in settings.items()}},
            cwd=self.dir,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.addCleanup(self.end, process)
        return process

    @staticmethod
    def end(process: subprocess.Popen[str]) -> None:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # also what the script left behind when it was killed
        except ProcessLookupError:
            pass  # nothing
        process.communicate()

    def finish(self, process: subprocess.Popen[str], status: int = 0) -> str:
        """Wait for a script that must end with this status; return what it printed."""
        output, errors = process.communicate(timeout=TIMEOUT_S)
        self.assertEqual(process.returncode, status, f"{output}\n{errors}")
        return output

    def run_script(self, *arguments: object, status: int = 0, **settings: object) -> str:
        return self.finish(self.start(*arguments, **settings), status)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            self.assertLess(time.monotonic(), deadline, what)
            time.sleep(0.01)

    def shell(self, code: str, *arguments: object) -> list[str]:
        """A command: a line of bash, with $1 a directory to note things in."""
        return ["bash", "-c", code, "command", str(self.dir), *map(str, arguments)]

    def saving(self, directory: str) -> list[str]:
        """A command that saves the body of each message in a file named after its id."""
        (self.dir / directory).mkdir()
        return self.shell('cat >"$1/$2/$BROKER_MESSAGE_ID"', directory)

    def saved(self, directory: str) -> dict[int, str]:
        return {int(path.name): path.read_bytes().decode() for path in (self.dir / directory).iterdir()}

    def command(self, code: str) -> Path:
        """A command that stands in for the broker."""
        path = self.dir / "another broker"
        path.write_text(f"#!/bin/sh\n{code}\n")
        path.chmod(0o755)
        return path

    def gate(self) -> Callable[[], object]:
        """Commands that read a line from the file "go" wait until the result is called."""
        os.mkfifo(self.dir / "go")
        fd = os.open(self.dir / "go", os.O_RDWR)  # does not wait for a reader
        self.addCleanup(os.close, fd)
        return lambda: os.write(fd, b"\n" * 10)

    def note(self, name: str) -> str:
        """What commands noted in a file, or nothing."""
        path = self.dir / name
        return path.read_text() if path.exists() else ""

    def assertNothingExecuted(self) -> None:
        self.assertFalse((self.dir / "x").exists(), "a body was executed")


class AllShellExamples(ShellExample):
    def test_shellcheck_finds_nothing(self) -> None:
        shellcheck = shutil.which("shellcheck")
        if shellcheck is None:
            self.skipTest("needs shellcheck")

        def check(script: str) -> None:
            found = subprocess.run([shellcheck, EXAMPLES / script], capture_output=True, text=True, check=False)
            self.assertEqual((found.returncode, found.stdout), (0, ""))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(check, SCRIPTS))

    def test_demos_end_with_0_prove_something_and_leave_everything_else_alone(self) -> None:
        self.write("not for the demo")
        shutil.copy(self.dir / "test.db", self.dir / ".broker.db")

        def demo(script: str) -> None:
            # The settings of a user, which the demo must not follow.
            settings = {"BROKER_PROJECT_SCOPE": 1, "DRAIN": 0, "KEEP": 1, "DEAD_LETTER": "elsewhere"}
            output = self.finish(self.start("demo", script=script, **settings))
            self.assertGreaterEqual(output.count("ok: "), 5, output)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(demo, SCRIPTS if FULL else SCRIPTS[:2]))
        self.assertEqual(self.counts(), {"jobs": 1})
        left = {path.name for path in self.dir.iterdir()}
        self.assertEqual(left, {"tmp", "test.db", "test.db.lock", ".broker.db"})

    def test_without_broker_in_the_path_simplebroker_py_beside_or_above_is_used(self) -> None:
        if shutil.which("broker") is not None:
            self.skipTest("a broker command is installed")
        (self.dir / "examples").mkdir()
        (self.dir / "bin").mkdir()
        (self.dir / "bin" / "python3").symlink_to(sys.executable)
        # Says that every queue is empty, and where it stands.
        stub = "import os, sys; print(os.path.realpath(__file__), *sys.argv[1:3], file=sys.stderr); sys.exit(2)"
        above, beside = self.dir / "simplebroker.py", self.dir / "examples" / "simplebroker.py"
        calls = (
            ("resilient_worker.sh", "lease", "jobs", "true"),
            ("dead_letter_queue.sh", "simple", "jobs", "true"),
            ("queue_migration.sh", "rename", "jobs", "other"),
            ("work_stealing.sh", "round-robin", "jobs", "other"),
        )
        for place in (above, beside):
            place.write_text(stub)
            for script, *arguments in calls:
                with self.subTest(script, place=place.parent.name):
                    shutil.copy(EXAMPLES / script, self.dir / "examples")
                    process = subprocess.run(
                        [BASH or "bash", self.dir / "examples" / script, *arguments],
                        env={"PATH": f"{self.dir / 'bin'}:{os.environ['PATH']}", "DRAIN": "1"},
                        cwd=self.dir,
                        stdin=subprocess.DEVNULL,
                        capture_output=True,
                        text=True,
                        timeout=TIMEOUT_S,
                        check=False,
                    )
                    self.assertIn(process.returncode, (0, 2), process.stderr)
                    self.assertEqual(process.stderr.splitlines()[0].rsplit(" ", 2)[0], str(place))

    def test_usage_is_an_error_without_and_a_success_with_help(self) -> None:
        for script in SCRIPTS:
            with self.subTest(script):
                self.assertIn(f"usage: {script}", self.finish(self.start("help", script=script)))
                for arguments in ([], ["nonsense"], ["demo", "too", "many"]):
                    process = self.start(*arguments, script=script)
                    self.assertIn("usage: ", process.communicate()[1])
                    self.assertEqual(process.returncode, 1)
        self.assertEqual(list((self.dir / "tmp").iterdir()), [])

    def test_an_error_of_the_broker_is_an_error_and_not_an_empty_queue(self) -> None:
        (self.dir / "test.db").write_text("this is not a database, and long enough to tell: " * 20)
        self.check_failing(
            ("resilient_worker.sh", "lease", "jobs", "cat"),
            ("resilient_worker.sh", "peek", "jobs", self.dir / "checkpoint", "cat"),
            ("dead_letter_queue.sh", "simple", "jobs", "cat"),
            ("dead_letter_queue.sh", "retry", "jobs"),
            ("dead_letter_queue.sh", "check", "jobs"),
            ("queue_migration.sh", "rename", "jobs", "other"),
            ("queue_migration.sh", "content", "jobs", "other", "x"),
            ("queue_migration.sh", "steps", "jobs", "other"),
            ("queue_migration.sh", "backup", self.dir / "backup"),
            ("work_stealing.sh", "round-robin", "jobs", "other"),
            ("work_stealing.sh", "least-loaded", "jobs", "other"),
            ("work_stealing.sh", "priority", "jobs", "--", "cat"),
        )

    def test_what_cannot_work_is_refused_before_a_message_is_taken(self) -> None:
        self.write("stays")
        self.check_failing(
            ("resilient_worker.sh", "lease", "jobs", "no-such-command"),
            ("resilient_worker.sh", "peek", "jobs", self.dir / "checkpoint", "no-such-command"),
            ("dead_letter_queue.sh", "counted", "jobs", "no-such-command"),
            ("dead_letter_queue.sh", "retry", "jobs", "--delete"),
            ("dead_letter_queue.sh", "retry", "jobs", "--after"),
            ("queue_migration.sh", "transform", "jobs", "other", "no-such-command"),
            ("queue_migration.sh", "transform", "jobs", "jobs", "cat"),
            ("queue_migration.sh", "content", "jobs", "other", "(unbalanced"),
            ("queue_migration.sh", "older", "jobs", "other", "-1s"),
            ("work_stealing.sh", "priority", "jobs", "--", "no-such-command"),
            ("work_stealing.sh", "worker", "jobs", "cat"),
            ("work_stealing.sh", "run", "many", "jobs", "cat"),
        )
        for script in SCRIPTS:
            self.finish(self.start("demo", script=script, LEASE_S="x[$(touch x)]"), 1)
        self.assertNothingExecuted()
        self.assertEqual(self.counts(), {"jobs": 1})
        with self.queue() as q:
            self.assertEqual(q.stats().leased, 0)

    def check_failing(self, *calls: tuple[object, ...]) -> None:
        def fail(call: tuple[object, ...]) -> None:
            script, *arguments = call
            process = self.start(*arguments, script=script)
            output, errors = process.communicate(timeout=TIMEOUT_S)
            self.assertEqual((process.returncode, output), (1, ""), f"{call}: {errors}")
            self.assertRegex(errors, f"{script}: |broker: error: ")

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(fail, calls))


class ResilientWorkerShell(ShellExample):
    script = "resilient_worker.sh"

    def test_commands_get_bodies_byte_for_byte_either_way(self) -> None:
        leased = self.write(*HOSTILE_BODIES, queue="leased")
        peeked = self.write(*HOSTILE_BODIES, queue="peeked")
        lease = self.saving("from lease")
        peek = self.saving("from peek")
        in_parallel(
            lambda: self.run_script("lease", "leased", *lease, DRAIN=1),
            lambda: self.run_script("peek", "peeked", self.dir / "check point", *peek, DRAIN=1),
        )
        self.assertEqual(self.saved("from lease"), dict(zip(leased, HOSTILE_BODIES)))
        self.assertEqual(self.saved("from peek"), dict(zip(peeked, HOSTILE_BODIES)))
        self.assertEqual(self.counts(), {})
        self.assertNothingExecuted()
        self.assertEqual(list((self.dir / "tmp").iterdir()), [])

    def test_no_message_is_lost_when_workers_are_killed_at_random_moments(self) -> None:
        seed = random.randrange(10**6)
        chance = random.Random(seed)
        leased = [f"leased {n}\n" for n in range(60 if FULL else 16)]
        peeked = [f"peeked {n}\n" for n in range(40 if FULL else 9)]
        self.write(*leased, queue="leased")
        self.write(*peeked, queue="peeked")
        handler = self.shell('cat >>"$1/handled"')
        settings = {"LEASE_S": 1, "MAX_ATTEMPTS": 1000, "IDLE_S": 1}

        def worker(kills: int, *way: object) -> None:
            for _ in range(kills):
                process = self.start(*way, *handler, **settings)
                with self.assertRaises(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(0, 0.5))
                process.kill()  # not what it has started
                process.communicate()
            self.run_script(*way, *handler, DRAIN=1, **settings)

        in_parallel(
            lambda: worker(6 if FULL else 2, "lease", "leased"),
            lambda: worker(6 if FULL else 2, "lease", "leased"),
            lambda: worker(8 if FULL else 2, "peek", "peeked", self.dir / "checkpoint"),
        )
        handled = self.note("handled").splitlines(keepends=True)
        self.assertEqual(set(handled), {*leased, *peeked}, f"seed {seed}")
        self.assertEqual(self.counts(), {}, f"seed {seed}")

    def test_a_message_that_fails_is_tried_again_and_dead_lettered_with_its_id(self) -> None:
        (leased,) = self.write("bad", queue="leased")
        peeked, _ = self.write("bad", "good", queue="peeked")
        count = self.shell('printf %s "$BROKER_ATTEMPT" >>"$1/$BROKER_QUEUE"; ! grep -q bad')
        settings = {"DRAIN": 1, "MAX_ATTEMPTS": 3, "BACKOFF_MS": 1}
        in_parallel(
            lambda: self.run_script("lease", "leased", *count, DEAD_LETTER="sick", **settings),
            lambda: self.run_script("peek", "peeked", self.dir / "checkpoint", *count, **settings),
        )
        self.assertEqual((self.note("leased"), self.note("peeked")), ("123", "1231"))
        for name, id in (("sick", leased), ("peeked.dead", peeked)):
            with self.queue(name) as q:
                self.assertEqual([message.id for message in q.peek_all()], [id])
        self.assertEqual(self.counts(), {"sick": 1, "peeked.dead": 1})

    def test_a_message_that_kills_its_worker_is_dead_lettered_without_another_run(self) -> None:
        self.write("kills", queue="leased")
        self.write("kills", queue="peeked")
        fatal = self.shell('echo "$BROKER_QUEUE" >>"$1/runs"; kill -KILL "$PPID"')
        settings = {"DRAIN": 1, "MAX_ATTEMPTS": 1, "LEASE_S": 1}

        def work_twice(*way: object) -> None:
            self.run_script(*way, *fatal, status=-signal.SIGKILL, **settings)
            self.run_script(*way, *fatal, **settings)

        in_parallel(
            lambda: work_twice("lease", "leased"),
            lambda: work_twice("peek", "peeked", self.dir / "checkpoint"),
        )
        self.assertEqual(sorted(self.note("runs").split()), ["leased", "peeked"])
        self.assertEqual(self.counts(), {"leased.dead": 1, "peeked.dead": 1})

    def test_term_lets_the_command_finish_and_an_idle_worker_stop(self) -> None:
        self.write("first", "second", queue="leased")
        self.write("first", "second", queue="peeked")
        stopping = self.shell('kill "$PPID"; cat >>"$1/$BROKER_QUEUE"')
        noting = self.command(f'echo "$*" >>"{self.dir}/calls"; exec "{self.broker}" "$@"')
        idle = self.start("lease", "empty", "cat", IDLE_S=600, BROKER=noting)
        self.wait_until(lambda: "peek empty --wait 600s" in self.note("calls"), "the worker is idle")
        in_parallel(
            lambda: self.run_script("lease", "leased", *stopping),
            lambda: self.run_script("peek", "peeked", self.dir / "checkpoint", *stopping),
        )
        self.assertEqual((self.note("leased"), self.note("peeked")), ("first", "first"))
        self.assertEqual((self.ready("leased"), self.ready("peeked")), (["second"], ["second"]))
        idle.terminate()
        self.finish(idle)

    def test_ctrl_c_ends_the_worker_but_not_its_command(self) -> None:
        self.write(*"abc")
        go = self.gate()
        worker = self.start("lease", "jobs", *self.shell('touch "$1/begun"; read -r _ <"$1/go"; cat >>"$1/done"'))
        self.wait_until((self.dir / "begun").exists, "the command begins")
        os.killpg(worker.pid, signal.SIGINT)  # as a terminal does: everything in the group gets it
        go()
        self.finish(worker)
        self.assertEqual((self.note("done"), self.ready()), ("a", ["b", "c"]))

    def test_a_lease_is_renewed_while_the_command_runs_and_ends_when_the_worker_is_killed(self) -> None:
        self.write("long")
        go = self.gate()

        def held_until() -> int:
            with Broker(self.dir / "test.db") as broker:
                return int(json.loads(list(broker.dump())[1]).get("held_until", 0))

        worker = self.start("lease", "jobs", *self.shell('touch "$1/begun"; read -r _ <"$1/go"'), LEASE_S=1)
        self.wait_until((self.dir / "begun").exists, "the command begins")
        for renewal in ("first", "second"):
            last = held_until()
            self.wait_until(lambda last=last: held_until() > last, f"the {renewal} renewal")  # type: ignore[misc]
        worker.kill()
        with self.queue() as q:
            message = q.lease(wait=TIMEOUT_S)
        self.assertEqual((message, message and message.attempt), ("long", 2))
        go()

    def test_a_lease_whose_name_arrives_in_parts_is_renewed(self) -> None:
        """bash reads byte by byte, and its time may be over in the middle of a name."""
        noting = self.command(f'echo "$3" >>"{self.dir}/renewed"')
        text = (EXAMPLES / self.script).read_text().rpartition('main "$@"')[0] + "keep_lease jobs\n"
        assert BASH is not None
        keeper = subprocess.Popen(
            [BASH, "-c", text], env={**self.environ, "BROKER": str(noting), "LEASE_S": "1"}, stdin=subprocess.PIPE
        )
        self.addCleanup(keeper.wait, TIMEOUT_S)
        assert keeper.stdin is not None
        self.addCleanup(keeper.stdin.close)
        for part in ("1.1\n", "23", "45", "6.7\n"):
            renewals = len(self.note("renewed").split())
            keeper.stdin.write(part.encode())
            keeper.stdin.flush()
            self.wait_until(lambda n=renewals: len(self.note("renewed").split()) >= n + 2, part)  # type: ignore[misc]
        self.assertEqual(sorted(set(self.note("renewed").split())), ["1.1", "23456.7"])

    def test_a_message_that_the_checkpoint_names_is_removed_and_not_handled_again(self) -> None:
        done, tried = self.write("done", "tried")
        checkpoint = self.dir / "checkpoint"
        checkpoint.write_text(f"{done} {tried} 1\n")
        note = self.shell('printf "%s %s," "$(cat)" "$BROKER_ATTEMPT" >>"$1/handled"')
        self.run_script("peek", "jobs", checkpoint, *note, DRAIN=1)
        self.assertEqual((self.note("handled"), self.counts()), ("tried 2,", {}))
        self.assertEqual(checkpoint.read_text(), f"{tried} {tried} 2\n")

    def test_a_damaged_checkpoint_is_refused(self) -> None:
        self.write("stays")
        checkpoint = self.dir / "checkpoint"
        for text in ("", "12", "1 2 a[$(touch${IFS}x)]", f"{10**19} 0 0"):
            checkpoint.write_text(text)
            with self.subTest(text):
                self.run_script("peek", "jobs", checkpoint, "true", status=1)
        self.assertNothingExecuted()
        self.assertEqual(self.ready(), ["stays"])

    def test_with_keep_every_reader_sees_every_message(self) -> None:
        ids = self.write("a", "bad\n", "c")
        note = self.shell('cat >>"$1/$2"; ((BROKER_MESSAGE_ID != $3))')
        settings = {"KEEP": 1, "DRAIN": 1, "MAX_ATTEMPTS": 1}

        def read(reader: str) -> None:
            self.run_script("peek", "jobs", self.dir / f"at {reader}", *note, reader, ids[1], **settings)

        in_parallel(lambda: read("one"), lambda: read("two"))
        read("one")
        self.assertEqual((self.note("one"), self.note("two")), ("abad\nc", "abad\nc"))
        self.assertEqual(self.ready(), ["a", "bad\n", "c"])
        self.assertEqual(self.ready("jobs.dead"), ["bad\n", "bad\n"])


class DeadLetterQueueShell(ShellExample):
    script = "dead_letter_queue.sh"

    def test_simple_dead_letters_what_fails_once_and_commands_get_bodies_byte_for_byte(self) -> None:
        ids = self.write("", WILD, "\n")
        self.saving("saved")
        self.run_script(
            "simple", "jobs", *self.shell('cat >"$1/saved/$BROKER_MESSAGE_ID"; ((BROKER_MESSAGE_ID > $2))', ids[1])
        )
        self.assertEqual(self.saved("saved"), dict(zip(ids, ("", WILD, "\n"))))
        self.assertEqual((self.ready("jobs.dead"), self.counts()), (["", WILD], {"jobs.dead": 2}))
        self.assertNothingExecuted()

    def test_backoff_counts_attempts_and_doubles_the_pauses(self) -> None:
        (id,) = self.write("bad")
        noting = self.command(f'echo "$1 $4 $5" >>"{self.dir}/calls"; exec "{self.broker}" "$@"')
        settings = {"MAX_ATTEMPTS": 4, "BACKOFF_MS": 2, "MAX_BACKOFF_MS": 7}
        self.run_script(
            "backoff", "jobs", *self.shell('echo "$BROKER_ATTEMPT" >>"$1/runs"; exit 7'), BROKER=noting, **settings
        )
        self.assertEqual(self.note("runs").split(), ["1", "2", "3", "4"])
        released = [line for line in self.note("calls").splitlines() if line.startswith("release")]
        self.assertEqual(released, [*(f"release --delay {ms}ms" for ms in (2, 4, 7)), "release  "])
        with self.queue("jobs.dead") as q:
            self.assertEqual([message.id for message in q.peek_all()], [id])

    def test_a_permanent_failure_is_not_tried_again(self) -> None:
        self.write("bad")
        self.run_script("counted", "jobs", *self.shell('echo >>"$1/runs"; exit 42'), PERMANENT_STATUS=42)
        self.assertEqual((self.note("runs"), self.counts()), ("\n", {"jobs.dead": 1}))

    def test_retry_selects_by_time_and_number(self) -> None:
        ids = self.write(*"abcdef", queue="jobs.dead")
        self.run_script("retry", "jobs", "--after", ids[1], "--before", ids[4])
        self.assertEqual((self.ready(), self.ready("jobs.dead")), (["c", "d"], ["a", "b", "e", "f"]))
        self.run_script("retry", "jobs", "-n", 1)
        self.run_script("retry", "jobs", "--before", "2001-02-03T04:05:06Z", status=2)
        self.assertEqual(self.ready("jobs.dead"), ["b", "e", "f"])
        self.assertIn("3 moved", self.run_script("retry", "jobs"))
        self.assertEqual(self.ready(), list("abcdef"))

    def test_show_prints_json_that_a_terminal_cannot_obey(self) -> None:
        ids = self.write(*HOSTILE_BODIES, WILD[-60:], queue="jobs.dead")
        output = self.run_script("show", "jobs")
        self.assertTrue(output.isascii() and output.replace("\n", "").isprintable())
        lines = [json.loads(line) for line in output.splitlines()]
        self.assertEqual([line["id"] for line in lines], [str(id) for id in ids])
        self.assertEqual([line["start"] for line in lines], [body[:60] for body in [*HOSTILE_BODIES, WILD[-60:]]])
        self.assertEqual([line["bytes"] for line in lines[:-1]], [len(body.encode()) for body in HOSTILE_BODIES])
        self.run_script("show", "other", status=2)

    def test_check_alerts_by_number_and_by_age(self) -> None:
        self.assertEqual(json.loads(self.run_script("check", "jobs"))["alert"], False)
        self.write("dead", queue="jobs.dead")
        tell = self.shell('cat >"$1/report"')
        self.run_script("check", "jobs", *tell, MAX_DEAD=1)
        self.assertEqual(self.note("report"), "")
        self.run_script("check", "jobs", *tell, status=3)
        report = json.loads(self.note("report"))
        self.assertEqual((report["queue"], report["dead"], report["alert"]), ("jobs.dead", 1, True))
        self.assertLess(report["oldest_s"], TIMEOUT_S)
        header = {"type": "header", "format": "simplebroker-dump", "version": 1, "last_ts": "1"}
        old = {"type": "message", "queue": "jobs.dead", "body": "old", "id": f"{int(time.time()) - 7200}000000000"}
        with Broker(self.dir / "test.db") as broker:
            broker.load([json.dumps(header), json.dumps(old)])
        self.run_script("check", "jobs", MAX_DEAD=5, MAX_AGE_S=8000)
        self.run_script("check", "jobs", MAX_DEAD=5, MAX_AGE_S=7000, status=3)
        self.run_script("check", "jobs", "false", status=1)

    def test_monitor_repeats_an_alert_that_could_not_be_delivered(self) -> None:
        self.write("dead", queue="jobs.dead")
        tell = self.shell('mkdir "$1/tried" 2>/dev/null && exit 1; cat >>"$1/reports"; kill "$PPID"')
        output = self.run_script("monitor", "jobs", *tell, INTERVAL_S="0.01")
        self.assertEqual(len(output.splitlines()), 2)
        self.assertEqual(json.loads(self.note("reports"))["dead"], 1)


class QueueMigrationShell(ShellExample):
    script = "queue_migration.sh"

    def test_rename_moves_all_and_tells_when_something_is_held(self) -> None:
        self.write(*HOSTILE_BODIES)
        with self.queue() as q:
            leased = q.lease(600)
            assert leased is not None
        self.assertIn(f"{len(HOSTILE_BODIES) - 1} moved", self.run_script("rename", "jobs", "tasks", status=3))
        with self.queue() as q:
            q.release(leased)
        self.run_script("rename", "jobs", "tasks")
        self.assertEqual((self.ready("tasks"), self.counts()), (list(HOSTILE_BODIES), {"tasks": len(HOSTILE_BODIES)}))
        self.run_script("rename", "jobs", "tasks", status=2)

    def test_content_moves_what_matches_and_leaves_the_rest(self) -> None:
        self.write("red", "green", "not $(touch x) red\n", "-m", "RED")
        self.run_script("content", "jobs", "picked", "red\\b|^-m$")
        self.assertEqual(self.ready("picked"), ["red", "not $(touch x) red\n", "-m"])
        self.assertEqual(self.ready(), ["green", "RED"])
        self.run_script("content", "jobs", "picked", "$(touch x)", status=2)
        self.assertNothingExecuted()

    def test_time_separates_older_from_newer(self) -> None:
        now = int(time.time())
        lines = [{"type": "header", "format": "simplebroker-dump", "version": 1, "last_ts": "1"}]
        for hours in (50, 30, 3, 1):
            id = f"{now - hours * 3600}000000000"
            lines.append({"type": "message", "queue": "jobs", "body": str(hours), "id": id})
        with Broker(self.dir / "test.db") as broker:
            broker.load(map(json.dumps, lines))
        self.run_script("older", "jobs", "archive", "2d")
        self.assertEqual(self.ready("archive"), ["50"])
        self.run_script("newer", "jobs", "fresh", "90m")
        self.assertEqual(self.ready("fresh"), ["1"])
        self.run_script("newer", "jobs", "fresh", "4h")
        self.assertEqual((self.ready("fresh"), self.ready()), (["3", "1"], ["30"]))
        self.run_script("before", "jobs", "archive", "2001-02-03", status=2)
        self.run_script("before", "jobs", "archive", f"{now - 29 * 3600}s")
        self.run_script("after", "archive", "jobs", f"{now - 31 * 3600}s")
        self.assertEqual((self.ready("archive"), self.ready()), (["50"], ["30"]))

    def test_steps_end_with_the_newest_message_of_the_start(self) -> None:
        self.write(*"abcde")
        process = self.start("steps", "jobs", "other", STEP=2, PAUSE_S=600)
        self.wait_until(lambda: self.ready("other") == ["a", "b"], "the first step")
        os.killpg(process.pid, signal.SIGKILL)  # in the pause
        self.assertEqual(self.ready(), ["c", "d", "e"])
        # Somebody writes after each step.
        writing = self.command(
            f'"{self.broker}" "$@"; status=$?; [ $1 != move ] || "{self.broker}" write jobs late; exit $status'
        )
        output = self.run_script("steps", "jobs", "other", STEP=2, PAUSE_S=0, BROKER=writing)
        self.assertEqual([line.split()[0] for line in output.splitlines()], ["2", "3"])
        self.assertEqual((self.ready(), self.ready("other")), (["late", "late"], list("abcde")))
        self.run_script("steps", "jobs", "other")
        self.run_script("steps", "jobs", "other", status=2)

    def test_split_makes_queues_of_values_that_are_names_only(self) -> None:
        values = ["mail", "../x", "-rf", "mail\n", "", None, 7, True, 12345678901234567890]
        bodies = [json.dumps({"kind": value}) for value in values] + ["", "[1]", '{"kind": "mail"} 2']
        self.write(*bodies)
        self.run_script("split", "jobs", "kind")
        self.assertEqual(self.ready("jobs.mail"), [bodies[0]])
        self.assertEqual((self.ready("jobs.7"), self.ready("jobs.true")), ([bodies[6]], [bodies[7]]))
        self.assertEqual(self.ready("jobs.-rf"), [bodies[2]])
        self.assertEqual(self.counts()["jobs.other"], len(bodies) - 4)
        self.assertEqual(sum(self.counts().values()), len(bodies))

    def test_merge_keeps_the_order_of_age(self) -> None:
        for body in "abcdef":
            self.write(body, queue="even" if body in "bdf" else "odd")
        self.run_script("merge", "all", "even", "nothing", "odd")
        self.assertEqual((self.ready("all"), self.counts()), (list("abcdef"), {"all": 6}))
        self.run_script("merge", "all", "even", "odd", status=2)

    def test_transform_is_byte_for_byte_in_order_and_keeps_what_fails(self) -> None:
        bodies = ["", WILD, "\n", "fails", "not UTF-8"]
        self.write(*bodies)
        command = self.shell(
            'cat >"$1/body"; grep -aqx fails "$1/body" && exit 9; '
            "grep -aqx 'not UTF-8' \"$1/body\" && printf '\\377'; cat \"$1/body\""
        )
        self.run_script("transform", "jobs", "done", *command, status=3)
        self.assertEqual((self.ready("done"), self.ready("jobs.failed")), (bodies[:3], bodies[3:]))
        self.assertEqual(self.counts(), {"done": 3, "jobs.failed": 2})
        self.assertNothingExecuted()

    def test_transform_killed_in_the_middle_loses_nothing(self) -> None:
        a, _ = self.write("a", "b")
        kill_once = self.shell('cat; mkdir "$1/killed" 2>/dev/null && kill -KILL "$PPID"; true')
        self.run_script("transform", "jobs", "done", *kill_once, status=-signal.SIGKILL)
        self.run_script("transform", "jobs", "done", *kill_once, status=3)  # "a" is leased still
        with self.queue() as q:
            q.release(Message("a", a, "jobs", 1))  # as the end of the lease would
        self.run_script("transform", "jobs", "done", *kill_once)
        self.assertEqual((sorted(self.ready("done")), self.counts()), (["a", "b"], {"done": 2}))

    def test_backup_is_restored_with_ids_and_verified(self) -> None:
        ids = self.write(*HOSTILE_BODIES)
        self.write("other", queue="left.out")
        backup = self.dir / "the backup"
        self.run_script("backup", backup, "jobs*")
        self.assertEqual(backup.stat().st_mode & 0o777, 0o600)
        self.run_script("verify", backup, "jobs*")
        self.assertIn("0 missing, 1 not", self.run_script("verify", backup, status=3))
        before = self.counts()
        self.run_script("restore", backup, status=1)  # the ids exist
        self.assertEqual(self.counts(), before)
        with self.queue() as q:
            q.delete(message_id=ids[3])
        self.assertIn("1 missing, 0 not", self.run_script("verify", backup, "jobs", status=3))
        with self.queue() as q:
            q.delete()
        self.run_script("restore", backup)
        self.run_script("verify", backup, "jobs")
        with self.queue() as q:
            self.assertEqual([(m.id, str(m)) for m in q.peek_all()], list(zip(ids, HOSTILE_BODIES)))

    def test_a_backup_that_fails_leaves_the_old_one(self) -> None:
        backup = self.dir / "backup"
        backup.write_text("the old one")
        self.run_script("verify", backup, status=1)  # it is no backup
        self.run_script("backup", backup, status=1)  # there is no database
        self.write("a")
        failing = self.command(f'"{self.broker}" "$@"; [ "$1" != dump ]')
        self.run_script("backup", backup, status=1, BROKER=failing)
        self.assertEqual(backup.read_text(), "the old one")


class WorkStealingShell(ShellExample):
    script = "work_stealing.sh"

    def test_round_robin_deals_in_turn(self) -> None:
        self.write(*"abcde")
        self.run_script("round-robin", "jobs", "one", "two")
        self.assertEqual((self.ready("one"), self.ready("two")), (["a", "c", "e"], ["b", "d"]))
        self.run_script("round-robin", "jobs", "one", "two", status=2)

    def test_least_loaded_counts_what_is_ready_and_what_is_leased(self) -> None:
        self.write(*"123", queue="busy")
        self.write("1", queue="light")
        self.write(*"ab")
        with self.queue("busy") as q:
            for _ in range(3):
                q.lease(600)
        self.run_script("least-loaded", "jobs", "busy", "light", "empty")
        self.assertEqual(self.counts(), {"busy": 3, "light": 2, "empty": 1})
        self.assertEqual(self.ready("empty"), ["a"])

    def test_steal_moves_the_oldest_half_of_the_longest(self) -> None:
        self.write(*"abcde", queue="long")
        self.write(*"xy", queue="short")
        self.run_script("steal", "mine", "short", "long", "none")
        self.assertEqual((self.ready("mine"), self.ready("long")), (list("abc"), list("de")))
        self.run_script("steal", "mine", "none", status=2)

    def test_priority_takes_the_first_queue_first_and_bodies_byte_for_byte(self) -> None:
        low = self.write("low", queue="low")
        high = self.write("", WILD, queue="high")
        self.saving("saved")
        save = self.shell('cat >"$1/saved/$BROKER_MESSAGE_ID"; echo "$BROKER_QUEUE" >>"$1/order"')
        self.run_script("priority", "high", "low", "--", *save)
        self.assertEqual(self.note("order").split(), ["high", "high", "low"])
        self.assertEqual(self.saved("saved"), dict(zip([*high, *low], ["", WILD, "low"])))
        self.assertNothingExecuted()

    def test_a_worker_takes_its_own_queue_then_steals_and_counts_attempts_on(self) -> None:
        self.write("mine", queue="mine")
        self.write("theirs", queue="long")
        with self.queue("long") as q:
            message = q.lease()
            assert message is not None
            q.release(message)
        note = self.shell('printf "%s %s," "$(cat)" "$BROKER_ATTEMPT" >>"$1/order"; [[ $BROKER_QUEUE == mine ]]')
        output = self.run_script("worker", "mine", "none", "long", "--", *note, MAX_ATTEMPTS=3, RETRY_MS=1, IDLE_MS=20)
        self.assertEqual(self.note("order"), "mine 1,theirs 2,theirs 3,")
        self.assertEqual((self.counts(), output), ({"long.dead": 1}, "mine: 3 handled, 2 of them stolen\n"))

    def test_term_ends_all_workers_after_their_messages(self) -> None:
        self.write(*"abcdef")
        go = self.gate()
        waiting = self.shell('touch "$1/begun $BROKER_MESSAGE_ID"; read -r _ <"$1/go"; cat >>"$1/done"')
        process = self.start("run", 2, "jobs", *waiting)
        self.wait_until(lambda: len(list(self.dir.glob("begun *"))) == 2, "both workers begin")
        process.terminate()
        go()
        self.finish(process)
        self.assertEqual((sorted(self.note("done")), self.counts()), (["a", "b"], {"jobs.1": 2, "jobs.2": 2}))

    def test_run_killed_with_9_leaves_workers_that_finish_and_nothing_else(self) -> None:
        self.write(*"abc")
        go = self.gate()
        waiting = self.shell('touch "$1/begun"; read -r _ <"$1/go"; cat >>"$1/done"')
        process = self.start("run", 1, "jobs", *waiting, INTERVAL_S="0.1")
        self.wait_until((self.dir / "begun").exists, "the worker begins")
        process.kill()
        go()
        process.communicate(timeout=TIMEOUT_S)  # the end of its output: nobody is left who could write to it
        self.assertEqual((process.returncode, self.note("done"), self.counts()), (-signal.SIGKILL, "abc", {}))


# ---------------------------------------------------------------------------------------------------
# Examples: SQLite utilities, and the index of the examples.
# ---------------------------------------------------------------------------------------------------


HERE = Path(__file__).resolve().parent


LIMIT_S = 120.0  # ends what hangs; generous, for loaded machines


class ExampleCase(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="examples-test-")
        self.addCleanup(directory.cleanup)
        self.dir = Path(directory.name).resolve()

    def python(
        self, *arguments: str, cwd: Path | None = None, path: tuple[Path, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run Python in the test's directory, with nothing on its path but these directories."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "PYTHONPATH"))}
        environ.update(PYTHONPATH=os.pathsep.join(map(str, path)), PYTHONIOENCODING="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=cwd or self.dir,
                env=environ,
                capture_output=True,
                timeout=LIMIT_S,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"") + (error.stderr or b"")
            self.fail(f"{arguments} hangs, and said: {said.decode(errors='replace')}")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done


class SqliteConnectExampleTest(ExampleCase):
    def assertSuitePassed(self, done: subprocess.CompletedProcess[str], at_least: int) -> None:
        ran = re.search(r"^Ran (\d+) tests? in ", done.stderr, re.MULTILINE)
        self.assertIsNotNone(ran, done.stderr)
        self.assertGreaterEqual(int(ran.group(1)) if ran else 0, at_least)
        self.assertRegex(done.stderr, r"\nOK( \(skipped=\d+\))?\n\Z")

    def test_its_own_suite_passes(self) -> None:
        self.assertSuitePassed(self.python("-m", "unittest", "-v", "examples/test_sqlite_connect.py", cwd=ROOT), 50)

    def test_its_own_suite_can_be_run_in_its_directory(self) -> None:
        done = self.python("-m", "unittest", "-k", "PathTest", "test_sqlite_connect.py", cwd=EXAMPLES)
        self.assertSuitePassed(done, 5)

    def test_its_demonstration_counts_without_loss_even_when_it_is_alone_in_a_directory(self) -> None:
        shutil.copy(EXAMPLES / "sqlite_connect.py", self.dir)
        for command in (EXAMPLES / "sqlite_connect.py", self.dir / "sqlite_connect.py"):
            done = self.python(str(command))
            self.assertEqual((done.stdout, done.stderr), ("4 processes counted to 200 of 200\n", ""))
        self.assertEqual(sorted(os.listdir(self.dir)), ["sqlite_connect.py"])  # it left nothing

    def test_the_example_in_its_docstring_runs(self) -> None:
        text = (EXAMPLES / "sqlite_connect.py").read_text(encoding="utf-8")
        example = re.search(r"\n\n((?:    [^\n]*\n)+)\nThe parts", text)
        self.assertIsNotNone(example)
        code = textwrap.dedent(example.group(1)) if example else ""
        done = self.python("-c", f"from sqlite_connect import Database\n{code}print(rows)", path=(EXAMPLES,))
        self.assertEqual(done.stdout, "[('hello',)]\n")

    def test_it_does_not_need_simplebroker(self) -> None:
        shutil.copy(EXAMPLES / "sqlite_connect.py", self.dir)
        self.python("-c", "import sys, sqlite_connect; sys.exit('simplebroker' in sys.modules)")


class ExamplesReadmeTest(ExampleCase):
    def setUp(self) -> None:
        super().setUp()
        self.text = (EXAMPLES / "README.md").read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[str]:
        """The code in that language, in order, without the indentation of lists."""
        found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", self.text, re.MULTILINE | re.DOTALL)
        return [textwrap.dedent(code) for _, code in found]

    def block(self, words: str) -> str:
        """The one Python block with these words."""
        found = [code for code in self.blocks("python") if words in code]
        self.assertEqual(len(found), 1, words)
        return found[0]

    def test_every_python_block_is_tested_below(self) -> None:
        self.assertEqual(len(self.blocks("python")), 5)

    def test_the_synchronous_snippet_runs_as_it_stands(self) -> None:
        code = self.block("Standard synchronous usage") + textwrap.dedent(
            f"""
            import time
            deadline = time.monotonic() + {LIMIT_S / 2}
            with Queue("myqueue", db_path=".broker.db") as q:
                q.write("later")
                while q.stats().total and time.monotonic() < deadline:
                    time.sleep(0.005)
            watcher.stop()
            """
        )
        self.assertEqual(self.python("-c", code, path=(ROOT,)).stdout, "Hello, World!\nGot: later\n")

    def test_the_asynchronous_snippet_runs_in_a_coroutine(self) -> None:
        body = textwrap.indent(self.block("AsyncBroker("), "    ")
        code = f"import asyncio\nasync def main():\n{body}\n    print(msg)\nasyncio.run(main())"
        done = self.python("-c", code, path=(ROOT, EXAMPLES))
        self.assertEqual((done.stdout, done.stderr), ("Hello async!\n", ""))

    def test_the_extension_snippet_is_a_whole_runner_once_its_bodies_are_written(self) -> None:
        skeleton = self.block("class MyRunner(SQLRunner)")
        self.assertEqual(len(re.findall(r"^    def ", skeleton, re.MULTILINE)), 5)
        for comment, body in (
            ("Your implementation", "return self.inner.run(sql, params, fetch=fetch)"),
            ("Start transaction", "self.inner.begin_immediate()"),
            ("Commit transaction", "self.inner.commit()"),
            ("Rollback transaction", "self.inner.rollback()"),
            ("Cleanup", "self.inner.close()"),
        ):
            before = f"# {comment}\n        pass\n"
            self.assertEqual(skeleton.count(before), 1, comment)
            skeleton = skeleton.replace(before, f"{body}\n")
        code = (
            self.block("import SQLRunner, OperationalError")
            + skeleton
            + "    def __init__(self, config):\n        self.inner = config\n"
            + 'from simplebroker import SQLiteRunner\nconfig = SQLiteRunner("test.db")\n'
            + self.block("runner = MyRunner(config)")
            + '    print(q.read())\nrunner.close()\nprint(Queue("myqueue", db_path="test.db").count())\n'
        )
        self.assertEqual(self.python("-c", code, path=(ROOT,)).stdout, "Hello from custom runner!\n0\n")

    def test_the_extension_snippet_compiles_as_it_stands(self) -> None:
        for words in ("import SQLRunner, OperationalError", "class MyRunner(SQLRunner)", "runner = MyRunner(config)"):
            compile(self.block(words), "README.md", "exec")

    def test_every_link_leads_to_a_file_or_a_heading(self) -> None:
        headings = re.findall(r"^#+ (.*)$", self.text, re.MULTILINE)
        anchors = {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        targets = re.findall(r"\]\(([^)]+)\)", self.text)
        self.assertGreater(len(targets), 30)
        for target in targets:
            with self.subTest(target):
                if target.startswith("#"):
                    self.assertIn(target[1:], anchors)
                else:
                    self.assertTrue((EXAMPLES / target).is_file(), f"{target} does not exist")

    def test_every_file_is_listed(self) -> None:
        files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".md")}
        linked = set(re.findall(r"\]\(([^)#]+)\)", self.text))
        self.assertEqual(files - linked - {"README.md"}, set())

    def test_every_command_names_a_file_that_exists(self) -> None:
        commands = re.findall(r"^(?:python|bash)(?: -m unittest)? (\S+)", "\n".join(self.blocks("bash")), re.MULTILINE)
        self.assertGreater(len(commands), 15)
        for command in commands:
            with self.subTest(command):
                self.assertTrue((ROOT / command).is_file())

    def test_the_command_for_help_works(self) -> None:
        found = re.search(r'`python -c "(.*?)"`', self.text)
        self.assertIsNotNone(found)
        done = self.python("-c", found.group(1) if found else "", path=(ROOT,))
        for method in ("run", "begin_immediate", "commit", "rollback", "close"):
            self.assertIn(f"{method}(", done.stdout)


# ---------------------------------------------------------------------------------------------------
# Examples: the benchmark.
# ---------------------------------------------------------------------------------------------------


BENCHMARK = Path("examples") / "benchmark.py"


SCENARIOS = ["single", "threads", "contention", "mixed", "depth", "sizes", "batch", "cli", "wake", "backlog", "memory"]


FAST_BM = ["batch", "cli"]  # in the order of the report


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *arguments], capture_output=True, text=True, timeout=120, check=False
    )


class BenchmarkExample(unittest.TestCase):
    """The benchmark measures, says what it measured against, and judges by the stated bounds."""

    directory: ClassVar[tempfile.TemporaryDirectory[str]]
    run_: ClassVar[subprocess.CompletedProcess[str]]
    result: ClassVar[dict[str, Any]]

    @classmethod
    def setUpClass(cls) -> None:
        cls.directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.directory.cleanup)
        arguments = ("--quick", "--json", "--sync", "NORMAL", "--dir", cls.directory.name, "--only", *reversed(FAST_BM))
        cls.run_ = run_benchmark(*arguments)
        if cls.run_.returncode:
            raise AssertionError(cls.run_.stderr)
        cls.result = json.loads(cls.run_.stdout)

    def row(self, start: str) -> dict[str, Any]:
        found = [row for row in self.result["results"] if row["what"].startswith(start)]
        self.assertEqual(len(found), 1, f"{start!r} in {self.result['results']}")
        return found[0]

    def test_the_wanted_scenarios_run_and_no_others(self) -> None:
        self.assertEqual(list(dict.fromkeys(row["scenario"] for row in self.result["results"])), FAST_BM)

    def test_every_row_names_what_was_compared_and_the_ratio(self) -> None:
        for row in self.result["results"]:
            with self.subTest(row["what"]):
                self.assertTrue(row["what"] and row["against"] and row["unit"])
                for name in ("ratio", "ours", "reference"):
                    self.assertGreater(row[name], 0)

    def test_the_bounds_are_those_of_the_design(self) -> None:
        self.assertEqual(self.row("write_many")["bound"], ">= 0.6 x")
        self.assertEqual(self.row("broker write")["bound"], "<= 1.5 x")
        self.assertEqual(self.row("broker read")["bound"], "<= 1.5 x")

    def test_met_says_whether_the_ratio_is_within_the_bound(self) -> None:
        self.assertEqual(self.row("write_many")["met"], self.row("write_many")["ratio"] >= 0.6)
        for word in ("broker write", "broker read"):
            self.assertEqual(self.row(word)["met"], self.row(word)["ratio"] <= 1.5)

    def test_the_sums_agree_with_the_rows(self) -> None:
        judged = [row["met"] for row in self.result["results"] if row["bound"]]
        self.assertEqual((self.result["bounds"], self.result["met"]), (len(judged), judged.count(True)))

    def test_the_environment_is_told(self) -> None:
        environment = self.result["environment"]
        for name in ("simplebroker", "python", "sqlite", "system", "file system", "processor", "cores", "synchronous"):
            self.assertTrue(environment[name], name)
        self.assertEqual(environment["synchronous"], "NORMAL")
        self.assertGreater(environment["fsync ms"], 0)

    def test_nothing_is_left_in_the_directory(self) -> None:
        self.assertEqual(os.listdir(self.directory.name), [])

    def test_nothing_is_written_to_standard_error(self) -> None:
        self.assertEqual(self.run_.stderr, "")

    def test_list_names_every_scenario(self) -> None:
        done = run_benchmark("--list")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual([line.split()[0] for line in done.stdout.splitlines()], SCENARIOS)

    def test_the_table_shows_ratio_bound_and_verdict(self) -> None:
        done = run_benchmark("--quick", "--sync", "NORMAL", "--only", "batch")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"(?m)^ +\d+\.\d\dx  write_many of 5,000, NORMAL .*>= 0\.6 x +(met|MISSED)$")
        self.assertRegex(done.stdout, r"(?m)^[01] of 1 bounds met, in \d")

    def test_an_unknown_scenario_is_refused(self) -> None:
        done = run_benchmark("--only", "nonsense")
        self.assertEqual(done.returncode, 2)
        self.assertIn("nonsense", done.stderr)

    def test_a_missing_directory_is_refused(self) -> None:
        missing = str(Path(self.directory.name) / "missing")
        done = run_benchmark("--only", "batch", "--dir", missing)
        self.assertEqual(done.returncode, 2)
        self.assertIn(missing, done.stderr)


class BenchmarkModule(unittest.TestCase):
    """Its functions, called here."""

    benchmark: ClassVar[Any]

    @classmethod
    def setUpClass(cls) -> None:
        path = list(sys.path)
        spec = importlib.util.spec_from_file_location("example_benchmark", BENCHMARK)
        assert spec and spec.loader
        cls.benchmark = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        cls.addClassCleanup(sys.modules.pop, spec.name)
        spec.loader.exec_module(cls.benchmark)
        sys.path[:] = path


class BenchmarkArithmetic(BenchmarkModule):
    """What the rows are made of."""

    def test_the_ratio_is_the_median_of_the_ratios_of_the_rounds(self) -> None:
        row = self.benchmark.compare("s", "what", "other", "ms", [2.0, 9.0, 40.0], [1.0, 3.0, 10.0])
        self.assertEqual((row.ratio, row.ours, row.reference), (3.0, 9.0, 3.0))
        self.assertIsNone(row.met)

    def test_a_bound_is_met_at_its_limit_and_missed_beyond(self) -> None:
        for relation, limit, of, met in (
            (">=", 3.0, "ratio", True),
            (">=", 3.1, "ratio", False),
            ("<=", 3.0, "ratio", True),
            ("<=", 2.9, "ratio", False),
            ("<=", 9.0, "ours", True),
            ("<=", 8.9, "ours", False),
        ):
            row = self.benchmark.compare("s", "w", "o", "ms", [9.0], [3.0], bound=(relation, limit), bound_of=of)
            self.assertIs(row.met, met, (relation, limit, of))

    def test_rounds_are_interleaved_and_their_order_turns(self) -> None:
        calls: list[str] = []
        self.benchmark.interleave(3, {name: lambda name=name: calls.append(name) for name in "abc"})
        self.assertEqual("".join(calls), "abcbcacab")

    def test_errors_are_counted_and_are_not_throughput(self) -> None:
        load = self.benchmark.Load()

        def fail() -> None:
            raise OSError("busy")

        self.assertEqual(self.benchmark.repeat(fail, False, 0.01, load), 0)
        self.assertEqual(load.errors["OSError: busy"], len(load.waits))
        self.assertGreater(len(load.waits), 0)

    def test_of_the_worst_waits_the_worst_is_shown_and_the_median_ratio_judged(self) -> None:
        """Now and then a sync takes the disk long, whoever asks for it."""

        def loads(*worst_s: float) -> list[Any]:
            return [self.benchmark.Load(100.0, array("d", [0.001] * 9 + [worst])) for worst in worst_s]

        of = {"simplebroker": loads(0.02, 0.5, 0.02), "bare sqlite3": loads(0.4, 0.5, 0.6)}
        rows = list(self.benchmark.load_rows("contention", "8 writers, FULL", 8, "bare sqlite3", of))
        self.assertEqual([row.what.rpartition(", ")[2] for row in rows], ["throughput", "worst wait"])
        self.assertEqual((rows[1].ours, rows[1].reference), (500.0, 600.0))
        self.assertAlmostEqual(rows[1].ratio, 0.05)
        self.assertTrue(rows[1].met)
        (_, row) = self.benchmark.load_rows("contention", "16 writers, FULL", 16, "bare sqlite3", of)
        self.assertEqual((row.bound_text, row.met), ("<= 200 ms", False), "of 16 writers the worst of all counts")

    def test_the_worst_wait_is_the_greatest(self) -> None:
        load = self.benchmark.Load()
        load.waits.extend([0.001] * 999 + [2.0])
        self.assertEqual((load.waits_ms()["p50"], load.waits_ms()["max"]), (1.0, 2000.0))


@unittest.skipUnless(HAS_FORK and ON_LINUX, "needs fork")
class BenchmarkDatabases(BenchmarkModule):
    """While something is measured, its databases are in use by a process that does nothing."""

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.bench = self.benchmark.Bench(True, Path(directory.name), ("NORMAL",))

    def test_a_log_lasts_until_the_last_load_has_ended(self) -> None:
        for kind, name in ((self.benchmark.OURS, "broker.db"), (self.benchmark.BARE, "bare.db")):
            with self.subTest(kind.name):
                with self.benchmark.in_use(self.bench, kind) as place:
                    log = place / f"{name}-wal"
                    before = log.stat()
                    self.assertGreater(before.st_size, 0)
                    with contextlib.closing(kind.open(place, "NORMAL")) as store:
                        store.put("x")
                    self.assertEqual(log.stat().st_ino, before.st_ino)
                self.assertFalse(log.exists(), "the process that kept it has not ended")

    def test_loads_run_on_databases_in_use(self) -> None:
        logs = []

        def run_load(bench: Any, kind: Any, place: Path, *rest: Any) -> int:
            logs.append([path.name for path in place.glob("*-wal")])
            return 0

        with mock.patch.object(self.benchmark, "run_load", run_load):
            self.benchmark.run_loads(self.bench, (self.benchmark.OURS, self.benchmark.BARE), 2, 0, 2)
        self.assertCountEqual(logs, [["broker.db-wal"], ["bare.db-wal"]] * 2)

    def test_waiting_children_find_their_databases(self) -> None:
        found: dict[str, list[str]] = {}
        start_child = self.benchmark.start_child

        def start(target: Any, *arguments: Any) -> Any:
            places = [argument for argument in arguments if isinstance(argument, Path)]
            found[target.__name__] = [path.name for place in places for path in place.glob("*.db")]
            return start_child(target, *arguments)

        self.bench.plan.wakes, self.bench.plan.idle_s = 3, 0.1
        with mock.patch.object(self.benchmark, "start_child", start):
            rows = list(self.benchmark.wake(self.bench))
        self.assertEqual((found["watching_child"], found["polling_child"]), (["broker.db"], ["bare.db"]))
        self.assertEqual(len(rows), 3)


class BenchmarkProcesses(unittest.TestCase):
    """A load of several processes is summed up, and starving shows."""

    def test_mixed_load_tells_waits_errors_and_starving_of_both(self) -> None:
        done = run_benchmark("--quick", "--json", "--sync", "NORMAL", "--only", "mixed")
        self.assertEqual(done.returncode, 0, done.stderr)
        rows = json.loads(done.stdout)["results"]
        self.assertEqual([row["what"].rpartition(", ")[2] for row in rows], ["throughput", "worst wait"])
        for row in rows:
            self.assertIsNone(row["bound"])
            self.assertIsNone(row["met"])
            for name in ("simplebroker", "bare sqlite3"):
                waits = row["waits_ms"][name]
                self.assertEqual(list(waits), ["p50", "p99", "p99.9", "max"])
                self.assertEqual(sorted(waits.values()), list(waits.values()))
                self.assertIn(name, row["starved"])
            self.assertEqual(row["errors"]["simplebroker"], {})


# ---------------------------------------------------------------------------------------------------
# Running: the tests mostly wait for processes and times, so the classes run in as many processes as there are cores.
# ---------------------------------------------------------------------------------------------------


# PyPy 3.9 crashes in processes that were forked to run many tests.
CAN_SHARE = HAS_FORK and sys.implementation.name == "cpython"
# One more than cores, as many tests wait for something.
JOBS = int(os.environ.get("TEST_JOBS", min(4, (os.cpu_count() or 1) + 1))) if CAN_SHARE else 1


class FailedElsewhere(Exception):
    """The traceback of a test that ran in another process."""


class Elsewhere:
    """Stands for what is no test, such as setting up a class."""

    failureException = AssertionError

    def __init__(self, name: str) -> None:
        self._name = name

    def __str__(self) -> str:
        return self._name

    id = __str__

    def shortDescription(self) -> None:
        """It has none."""


class Events(unittest.TestResult):
    """What a result is told about the tests of one class, for sending it on."""

    def __init__(self, tests: list[unittest.TestCase]) -> None:
        super().__init__()
        self._numbers = {id(test): number for number, test in enumerate(tests)}
        self.events: list[tuple[str, int | str, str | None]] = []

    def _note(self, what: str, test: Any, text: str | None = None) -> None:
        self.events.append((what, self._numbers.get(id(test), str(test)), text))

    def addSuccess(self, test: Any) -> None:
        self._note("addSuccess", test)

    def addSkip(self, test: Any, reason: str) -> None:
        self._note("addSkip", test, reason)

    def addError(self, test: Any, err: Any) -> None:
        self._note("addError", test, "".join(traceback.format_exception(*err)))

    def addFailure(self, test: Any, err: Any) -> None:
        self._note("addFailure", test, "".join(traceback.format_exception(*err)))

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._note("addFailure", test, f"{subtest}\n" + "".join(traceback.format_exception(*err)))


class ManyProcesses(unittest.TestSuite):
    """Runs the suites in it, one for each class, in JOBS forked processes. Each takes the next that nobody has."""

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        classes = [suite for suite in self if isinstance(suite, unittest.TestSuite) and suite.countTestCases()]
        tests = [[test for test in suite if isinstance(test, unittest.TestCase)] for suite in classes]
        if JOBS < 2 or len(classes) < 2:
            return super().run(result, debug)
        take, give = os.pipe()
        os.write(give, bytes(range(len(classes))))
        os.close(give)
        children = [Child(lambda child: self._work(child, take, classes, tests)) for _ in range(JOBS)]
        os.close(take)
        lock = threading.Lock()  # guards the result

        def listen(child: Child) -> None:
            number = -1
            try:
                while True:
                    number, events = pickle.load(child._file)
                    with lock:
                        self._tell(result, events, tests[number])
            except EOFError:
                if child.wait():
                    with lock:
                        text = f"a process that ran tests ended with {child.wait()}"
                        stranger: Any = Elsewhere("process")
                        result.addError(stranger, (FailedElsewhere, FailedElsewhere(text), None))

        listeners = [threading.Thread(target=listen, args=(child,)) for child in children]
        try:
            for child, listener in zip(children, listeners):
                child._end.settimeout(None)
                listener.start()
            for listener in listeners:
                listener.join()
        finally:
            for child in children:
                child.end()
        return result

    @staticmethod
    def _work(child: Child, take: int, classes: list[Any], tests: list[list[unittest.TestCase]]) -> None:
        with child._end.makefile("wb") as reports:
            while True:
                number = os.read(take, 1)
                if not number:
                    break
                result = Events(tests[number[0]])
                classes[number[0]].run(result)
                pickle.dump((number[0], result.events), reports)
                reports.flush()
        atexit._run_exitfuncs()

    @staticmethod
    def _tell(result: unittest.TestResult, events: list[Any], tests: list[unittest.TestCase]) -> None:
        for what, number, text in events:
            test: Any = tests[number] if isinstance(number, int) else Elsewhere(number)
            result.startTest(test)
            if what in ("addError", "addFailure"):
                getattr(result, what)(test, (FailedElsewhere, FailedElsewhere(text), None))
            else:
                getattr(result, what)(test, *([] if text is None else [text]))
            result.stopTest(test)


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    """The protocol of unittest."""
    return ManyProcesses(tests)
