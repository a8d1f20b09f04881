"""Tests of SimpleBroker: ``python -m unittest`` from the repository root, nothing installed.

The classes follow the sections of simplebroker.py, then come the command line, crashes and
the examples. What needs an optional tool is skipped without it. FULL_TESTS=1 repeats the random ones
more often, TEST_JOBS=1 runs the classes one after the other.
"""

from __future__ import annotations

import ast
import asyncio
import atexit
import contextlib
import copy
import ctypes
import doctest
import enum
import functools
import gc
import importlib.util
import inspect
import io
import json
import logging
import math
import multiprocessing.util
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
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FutureTimeout
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
    LeaseLost,
    LeasesInFlight,
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


def has_inotify() -> bool:
    """Does this platform tell of changes of files, and is that allowed here?"""
    with contextlib.suppress(Exception):
        fd = ctypes.CDLL(None).inotify_init1(os.O_CLOEXEC)
        if fd >= 0:
            os.close(fd)
            return True
    return False


NEEDS_INOTIFY = unittest.skipUnless(has_inotify(), "needs inotify")


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
        for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
            number = getattr(signal, name)  # ignored in a shell's background and under nohup; children inherit that
            if signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, handler)
                self.addCleanup(signal.signal, number, signal.SIG_IGN)

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

    def spawn(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process in the test's directory and environment, its output in a pipe; killed at the end."""
        options = {"cwd": self.dir, "env": self.environ, "stdout": subprocess.PIPE, **options}
        child = subprocess.Popen(command, **options)
        self.addCleanup(self.reap, child)
        return child

    def python(self, code: str, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start Python code as a process of its own, with simplebroker importable."""
        return self.spawn(*PYTHON, "-c", textwrap.dedent(code), *args, **options)

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

    def plain_runner(self, path: Path | None = None) -> PlainRunner:
        """A custom runner on the test's database or another, closed at the end."""
        runner = PlainRunner(path or self.path)
        self.addCleanup(runner.close)
        return runner


def in_each_statement(act: Callable[[str], object]) -> Any:
    """Call act(sql) in the middle of each statement of the connections that are opened meanwhile."""

    class Cursor(sqlite3.Cursor):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            self.sql = sql
            return super().execute(sql, *values)

        def fetchall(self) -> list[Any]:
            act(self.sql)
            return super().fetchall()

    class Connection(sqlite3.Connection):
        def cursor(self) -> sqlite3.Cursor:  # type: ignore[override]
            return super().cursor(Cursor)

        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            return self.cursor().execute(sql, *values)

    return mock.patch("sqlite3.connect", functools.partial(sqlite3.connect, factory=Connection))


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


class StoppedClockTest(ForkTest):
    """A broker whose clock stands still, and its queue q."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.b = self.broker(clock=self.clock)
        self.q: Any = self.b.queue("q")


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


# ---------------------------------------------------------------------------------------------------
# The sections from constants to Queue.
# ---------------------------------------------------------------------------------------------------


class PublicNames(CoreTest):
    def test_every_public_name_documents_itself_and_is_in_ext_beside_all_constants_and_statements(self) -> None:
        for name in simplebroker.__all__:
            self.assertTrue(getattr(simplebroker, name).__doc__, name)
        for name, value in vars(simplebroker).items():
            if name in simplebroker.__all__ or (name.isupper() and not name.startswith("_")):
                self.assertIs(getattr(ext, name), value)

    def test_importing_reads_no_environment_starts_nothing_and_imports_little(self) -> None:  # trap 24
        code = """if True:
            import sys, threading, simplebroker, simplebroker.ext
            from simplebroker.ext import SQLRunner, INSERT_MESSAGE
            loaded = {"argparse", "json", "logging", "ctypes", "subprocess", "decimal"} & set(sys.modules)
            assert not loaded and threading.active_count() == 1 and SQLRunner is simplebroker.SQLRunner, loaded
        """
        self.environ["BROKER_BUSY_TIMEOUT"] = "nonsense"
        subprocess.run([sys.executable, "-S", "-c", code], cwd=self.dir, env=self.environ, check=True)

    def test_the_examples_in_docstrings_are_true(self) -> None:
        finder, runner, report = doctest.DocTestFinder(), doctest.DocTestRunner(), io.StringIO()
        for number, example in enumerate(finder.find(simplebroker, "simplebroker")):
            example.globs["path"] = str(self.dir / f"{number}.db")
            runner.run(example, out=report.write)
        self.assertEqual(runner.summarize(verbose=False).failed, 0, report.getvalue())
        self.assertGreater(runner.tries, 8)


class MessageTest(unittest.TestCase):
    FIELDS = ("id", "queue", "attempt", "lease", "reason", "due", "state")
    VALUES = (1837025672140161024, "tasks", 3, 77, "exit status 3", 1900000000 * NS, "leased")

    def test_a_message_is_its_body_and_knows_where_it_came_from(self) -> None:
        message, plain = Message("h\u00e9llo", *self.VALUES), Message("", 1, "q")
        self.assertEqual({message: 1}["h\u00e9llo"], 1)
        self.assertEqual(f"{message}|{json.dumps(message)}", 'h\u00e9llo|"h\\u00e9llo"')
        self.assertEqual([type(text) for text in (str(message), message.upper())], [str, str])
        self.assertEqual((message.timestamp, *(getattr(message, name) for name in self.FIELDS[1:])), self.VALUES)
        self.assertEqual([getattr(plain, name) for name in self.FIELDS], [1, "q", 0, None, None, None, "ready"])
        self.assertTrue(plain, "so a loop over read() does not end at an empty body (trap 39)")

    def test_copies_and_pickles_keep_everything(self) -> None:
        ways: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy]
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            ways.append(lambda value, protocol=protocol: pickle.loads(pickle.dumps(value, protocol)))
        settings = Settings(cache_mb=3, max_interval_s=0.5, db_location="/x", project_scope=True, sync_mode="off")
        for way in ways:
            again = way(Message("h\u00e9llo", *self.VALUES))
            self.assertEqual((type(again), again), (Message, "h\u00e9llo"))
            self.assertEqual(tuple(getattr(again, name) for name in self.FIELDS), self.VALUES)
            self.assertEqual((type(way(settings)), way(settings)), (Settings, settings))
            for error in (OperationalError("why"), LeaseLost("why"), QueueNameError("why")):
                self.assertEqual((type(way(error)), str(way(error))), (type(error), "why"))

    def test_errors_have_one_base_and_existing_except_clauses_catch_them(self) -> None:
        ours = (OperationalError, IntegrityError, DatabaseError, QueueNameError, MessageError, UsageError, LeaseLost)
        theirs = (sqlite3.OperationalError, sqlite3.IntegrityError, sqlite3.DatabaseError, *[ValueError] * 3, Exception)
        for error, base in zip(ours, theirs):
            self.assertTrue(issubclass(error, BrokerError) and issubclass(error, base), error)


class ArgumentsTest(CoreTest):
    """Names, bodies, ids and limits. What is not allowed is a ValueError or TypeError, and does nothing."""

    def setUp(self) -> None:
        super().setUp()
        self.b: Any = self.broker(settings=Settings(max_message_size=100_000, sync_mode="OFF"))
        self.q: Any = self.b.queue("q")

    def test_queue_names(self) -> None:  # trap 14
        for name in ("a", "A.b-c_9", "9", "_", "x" * 512, "q.dead", "a..b", "a--"):
            self.b.queue(name).write("x")
            self.assertEqual((list(self.b.queues()), self.b.delete_all()), ([name], 1))
        for code in range(0x3000):
            if not re.fullmatch("[A-Za-z0-9_.-]", chr(code), re.ASCII):
                self.assertRaises(QueueNameError, self.b.queue, "a" + chr(code))
        leased = Message("x", 1, "q", lease=5)
        takers = (self.b.queue, self.q.move, self.q.requeue, lambda name: self.b.broadcast("x", queues=["a", name]),
                  functools.partial(self.b.rename, "a"), functools.partial(self.q.dead_letter, leased))  # fmt: skip
        for name in ("", "-a", ".a", "x" * 513, "x" * 10**6, "a b", "a\n", "\na", "a/b", "a\u0660", "a\ud800"):
            for take in takers:
                with self.subTest(name[:20]), self.assertRaisesRegex(ValueError, "letters, digits") as caught:
                    take(name)
                self.assertIn(repr(name[:50])[:-1], str(caught.exception))
                self.assertLess(len(str(caught.exception)), 250)
        self.assertEqual(self.b.queues(), {})

    def test_bodies_come_back_as_they_were_or_are_refused(self) -> None:
        bodies = ["", "\n", "a\0b", "\x1b[31m", "\ufeff\u2028\uffff", "e\u0301", "\\u0000", "\u65e5" * 33_333 + "x"]

        class Color(str, enum.Enum):  # whose str() was "Color.RED" before Python 3.12
            RED = "red"

        self.q.write_many([*bodies, Message("again", 1, "other"), Color.RED])
        self.assertEqual(self.q.peek_many(10), [*bodies, "again", "red"])
        self.q.delete()
        refused = {"\ud800": "not valid text: .* at character 0", "ab\udcffcd": "not valid text: .* at character 2"}
        refused[bodies[-1] + "x"] = "100001 bytes, more than the 100000 that BROKER_MAX_MESSAGE_SIZE"
        writers = (self.q.write, self.b.broadcast, lambda body: self.q.write_many(["good", body]))
        for act in writers:
            for body, reason in refused.items():
                self.assertRaisesRegex(MessageError, reason, act, body)
        self.assertRaises(TypeError, self.b.broadcast, "x", queues="tasks")  # not to t, a, s and k
        for act in (*writers, self.b.queue, self.q.move):
            for bad in (None, 5, b"a", ["a"], 1.5, True, Path("a")):
                self.assertRaises(TypeError, act, bad)
        self.assertEqual(self.q.count(), 0)

    def test_an_id_is_an_int_or_19_digits_wherever_it_is_taken_and_a_limit_is_a_positive_int(self) -> None:  # trap 12
        q, id, partial = self.q, 1837025672140161024, functools.partial
        q.write("x")
        one = (q.read, q.peek, q.lease, q.delete, q.has_pending, partial(q.move, "d"), partial(q.requeue, "d", 1))
        several = (lambda **bounds: list(q.read_all(**bounds)), lambda **bounds: list(q.peek_all(**bounds)),
                   partial(q.read_many, 1), partial(q.move_many, "d", 1), partial(q.move_all, "d"))  # fmt: skip
        texts = ("", "5", f"{id}\n", f" {id}", f"+{id}"[:19], "9" * 19, "\uff11837025672140161024")
        bad = [(ValueError, value) for value in (-1, 2**63, *texts)]
        bad += [(TypeError, value) for value in (True, 1.0, f"{id}".encode(), [id], datetime.now(timezone.utc))]
        for act in (*one, *several):
            for name in ("after", "before", "message_id") if act in one else ("after", "before"):
                for error, value in bad:
                    with self.subTest(act, name=name, value=value):
                        self.assertRaises(error, act, **{name: value})
            self.assertFalse(act(after=str(id), before=2**63 - 1))
        for act in (q.read_many, q.peek_many, partial(q.move_many, "d"), partial(q.requeue, "d")):
            for value in (0, -1, -(2**70)):
                self.assertRaisesRegex(ValueError, "at least 1", act, value)
            for value in (True, "5", 1.5, [1]):
                self.assertRaises(TypeError, act, value)
        self.assertEqual(q.peek_many(2**70), ["x"])


class SettingsTest(CoreTest):
    BAD = (  # in the order of the fields: the variable, what is allowed, and what is not
        ("BROKER_BUSY_TIMEOUT", "whole milliseconds", ["", " 5", *"-1 1.5 5s +5 1_0 \uff15 2147483648".split()]),
        ("BROKER_SYNC_MODE", "FULL, NORMAL or OFF", ["", "EXTRA", "1", "FULL ", "full;"]),
        ("BROKER_CACHE_MB", "whole megabytes from 1", ["0", "-1", "x", "65537"]),
        ("BROKER_WAL_AUTOCHECKPOINT", "pages from 1", ["0", "-5", "1e3"]),
        ("BROKER_MAX_MESSAGE_SIZE", "bytes from 1 to 1000000000", ["0", "10MB", "1000000001"]),
        ("BROKER_MAX_INTERVAL", "seconds from 0.001 to 60", ["", " 1", *"0 -1 61 nan inf x 1_0 \uff11 1..2".split()]),
        ("BROKER_DEFAULT_DB_NAME", "relative file name", ["", "a\nb", *"/abs.db ../x a/../b a\\..\\b a\x7f".split()]),
        ("BROKER_DEFAULT_DB_LOCATION", "an absolute directory", ["relative", "./x", "/a\nb"]),
        ("BROKER_PROJECT_SCOPE", "1 or 0", ["2", "maybe", "on "]),
    )

    def test_a_bad_value_is_an_error_that_names_it_and_what_is_allowed(self) -> None:  # trap 23
        for field, (variable, allowed, values) in zip(Settings._fields, self.BAD):
            for value in values:
                for name, environ, keywords in ((variable, {variable: value}, {}), (field, {}, {field: value})):
                    with self.subTest(name, value=value), self.assertRaisesRegex(UsageError, allowed) as caught:
                        Settings(environ, **keywords)
                    self.assertIn(f"{name}={value!r}", str(caught.exception))
        self.assertRaisesRegex(UsageError, r"\A.{9,150}\Z", Settings, {"BROKER_CACHE_MB": "9" * 5000})

    def test_every_setting_comes_from_its_keyword_or_its_variable_or_is_the_default(self) -> None:
        texts = ("0", "Off", "65536", "1", "1000000000", "60", "a/x..y", "/x", "yes")
        values = (0, "OFF", 65536, 1, 10**9, 60.0, "a/x..y", "/x", True)
        self.assertEqual(Settings({variable: text for (variable, *_), text in zip(self.BAD, texts)}), values)
        self.assertEqual(Settings(**dict(zip(Settings._fields, values))), values)
        for text, meaning in {"1": True, "true": True, "0": False, "FALSE": False, "no": False, "": False}.items():
            self.assertIs(Settings({"BROKER_PROJECT_SCOPE": text}).project_scope, meaning)
        self.assertEqual(Settings({"BROKER_DEFAULT_DB_LOCATION": ""}, db_name="pg://h/../x").db_name, "pg://h/../x")
        given = Settings({"BROKER_SYNC_MODE": "OFF", "BROKER_CACHE_MB": "99"}, sync_mode="FULL", cache_mb=10)
        self.assertEqual(given, Settings())  # although the keywords are the defaults
        self.assertRaises(AttributeError, setattr, given, "cache_mb", 5)
        self.assertIn("cache_mb=10", repr(given))

    def test_the_environment_is_read_when_a_queue_is_made_and_only_if_nothing_was_passed(self) -> None:
        with Queue("q", self.path) as queue:
            os.environ["BROKER_MAX_MESSAGE_SIZE"] = "nonsense"
            queue.write("123456")
            self.queue(settings=Settings(max_message_size=5)).write("12345")
            self.assertRaisesRegex(UsageError, "BROKER_MAX_MESSAGE_SIZE='nonsense'", Queue, "q", self.path)

    def test_the_settings_reach_sqlite_and_another_journal_mode_is_set_back_to_the_log(self) -> None:  # case 75
        expected = {"synchronous": 0, "cache_size": -3072, "wal_autocheckpoint": 77, "busy_timeout": 321,
                    "trusted_schema": 0, "journal_mode": "wal"}  # fmt: skip
        settings = Settings(sync_mode="OFF", cache_mb=3, wal_autocheckpoint=77, busy_timeout_ms=321)
        for _ in range(2):
            with Broker(self.path, settings=settings) as broker:
                self.wait_for(lambda: broker.queue("q").write("x") and all(  # noqa: B023 - a slow open shortens a timeout
                    broker.run(f"PRAGMA {name}") == [(value,)] for name, value in expected.items()), str(expected))  # noqa: B023
            with contextlib.closing(sqlite3.connect(self.path)) as other:
                self.assertEqual(other.execute("PRAGMA journal_mode = DELETE").fetchall(), [("delete",)])
        self.assertGreaterEqual(self.queue().count(), 2)


class IdsAndTimesTest(StoppedClockTest):
    """Ids: max(now & ~0xFFF, last + 1), whatever happens to the clock or to the messages."""

    TIMES = {
        1705314600 * NS: """2024-01-15T10:30:00Z 2024-01-15T10:30:00z 2024-01-15T10:30 2024-01-15T10:30:00
            2024-01-15T16:00:00+0530 2024-01-15T02:30-08:00 1705314600 1705314600s 1705314600000 1705314600000ms
            1705314600000000 1705314600000000us 1705314600000000000 1705314600000000000ns 00001705314600""",
        1705314600123456000: "2024-01-15T10:30:00.123456Z 1705314600.123456 1705314600123.456ms",
        1705276800 * NS: "2024-01-15 2024-01-15T02:00+02:00", 9223286400 * NS: "2262-04-11 9223286400", 1500: "1.5us",
        2**63 - 1: "9223372036854775807", 0: "0 0s"}  # fmt: skip
    NO_TIMES = ["", " ", " 5", "5 ", "5\n", "5 s", "2024-01-15T10:30:00Z\n", "2024-01-15\0", "\ud800", "9" * 100_000]
    NO_TIMES += """now -5 +5 1e5 1_000 0x10 1. .5 1.s 5S 5m \uff11\uff12 1705314600,5 1705314600.1234567890 nan 12:30
        99999999999999999999 999999999999999999999 9223372036854775808 99999999999 10000000000000 2024-02-30 2024-13-01
        2024-1-5 2024-W03-1 2024-01-15Z 2024-01-15T10 2024-01-15T25:00 2024-01-15T10:30:60Z 2024-01-15T10:30:00.1234567Z
        2024-01-15T10:30:00,5Z 2024-01-15T10:30+24:00 2024-01-15T10:30:00+01:00:00 \u0662024-01-15 0000-01-01
        1969-12-31T23:59:59Z 1970-01-01T00:00+00:01 0001-01-01T00:00+14:00 9999-12-31T23:59-12:00 2262-04-12""".split()
    DURATIONS = {90: "90 90s 1.5m 90000ms", 300: "5m", 7200: "2h", 86400: "1d", 0.25: "250ms 0.25s", 0: "0 0s 0.000ms",
                 0.0005: "0.5ms", 7: "007s", 3162240000: "36600d"}  # fmt: skip
    NO_DURATIONS = ["", " ", "5 m", " 90", "90\n", "9" * 100_000]
    NO_DURATIONS += "-1 +1 1e3 1_0 5M m .5 5. 1h30m nan inf 9999999999999999 36601d 5us 5w 0x5 \uff15 \u0665s".split()

    def test_every_documented_form_of_a_time_or_duration_and_no_other(self) -> None:  # trap 13
        times = (simplebroker.parse_timestamp, self.TIMES, self.NO_TIMES)
        for parse, good, bad in (times, (simplebroker.parse_duration, self.DURATIONS, self.NO_DURATIONS)):
            for expected, texts in good.items():
                self.assertEqual({parse(text) for text in texts.split()}, {expected})
            for text in bad:
                with self.subTest(parse.__name__, text=text[:30]):
                    self.assertRaisesRegex(ValueError, r"\A.{9,250}\Z", parse, text)
        self.assertEqual(simplebroker.parse_timestamp("2024-01-15 10:30"), 1705314600 * NS)

    def test_an_id_is_the_time_with_a_counter_that_carries_into_it(self) -> None:
        start = self.clock.ns & ~0xFFF
        self.assertEqual(self.q.write_many(["x"] * 5000), list(range(start, start + 5000)))
        self.clock.ns += 4096  # still behind what has been given out
        self.assertEqual(self.q.write("x", delay=5), start + 5000)
        self.clock.ns += NS
        later = (start + NS + 4096) & ~0xFFF
        self.assertEqual((self.q.write("x"), len(str(later))), (later, 19))
        self.clock.ns = -5 * HOUR_NS  # before 1970
        self.assertEqual(self.q.write_many(["x", "x"]), [later + 1, later + 2])
        self.clock.ns = simplebroker.MAX_ID - 4096
        self.assertRaises(BrokerError, self.q.write_many, ["x"] * 5000)

    def test_no_id_comes_twice_whoever_removes_the_last_message_and_however_the_clock_goes(self) -> None:  # trap 15
        q, b = self.q, self.b
        for remove in (
            q.read, lambda: q.read_many(9), lambda: list(q.read_all()), lambda: q.delete(message_id=last), q.delete,
            lambda: q.delete(after=last - 1), b.delete_all, lambda: q.ack(q.lease()), lambda: [q.delete(), b.vacuum()],
            lambda: [q.delete(), b.load([HEADER])], lambda: [q.delete(), b.close()],
        ):  # fmt: skip
            last = q.write("x")
            self.clock.ns -= HOUR_NS
            remove()
            with Broker(self.path, clock=self.clock, settings=Settings(sync_mode="OFF", cache_mb=3)) as broker:
                self.assertEqual((broker.queue("q").write("y"), broker.delete_all()), (last + 1, 1), remove)
        b, future = self.broker(clock=self.clock), self.clock.ns + 99 * HOUR_NS
        b.load([HEADER.replace('"0"', f'"{future}"')])
        self.assertEqual((b.status()["last_ts"], b.queue("q").write("x")), (future, future + 1))

    def test_the_generator_gives_each_id_once_and_in_the_callers_transaction(self) -> None:
        first, generator = self.q.write("x"), TimestampGenerator(self.b.runner, self.clock)
        with contextlib.suppress(ZeroDivisionError), self.b.transaction():
            self.assertEqual(generator.generate(), first + 1)
            raise ZeroDivisionError
        with ThreadPoolExecutor(4) as pool:
            ids = list(pool.map(lambda _: [generator.generate() for _ in range(50)], range(4)))
        self.assertEqual(sorted(id for each in ids for id in each), list(range(first + 1, first + 201)))
        self.assertEqual((ids, self.q.write("y")), ([sorted(each) for each in ids], first + 201))


class PathsTest(ForkTest):
    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        self.project, self.inside = self.dir / "project", self.dir / "project" / "a" / "b"
        for directory in (self.inside, self.dir / "project-evil", self.project / ".queue"):
            directory.mkdir(parents=True)
        for link, target in {"out": "..", "link": "../x.db", "in": "a", "evil": "../project-evil", "me": "."}.items():
            (self.project / link).symlink_to(self.project / target)
        os.chdir(self.inside)

    def where(self, directory: Any = None, file: Any = None, **settings: Any) -> str:
        """The path below the test's directory."""
        return os.path.relpath(simplebroker.database_path(Settings(**settings), directory, file), self.dir)

    def test_where_the_database_is(self) -> None:
        project, top, nearest = self.project, {"db_location": str(self.dir)}, {"project_scope": True}
        for directory, file, settings, expected in (
            (None, None, {}, "project/a/b/.broker.db"), (None, None, {"db_name": "x.db"}, "project/a/b/x.db"),
            (None, None, top, ".broker.db"), (None, "x", top, "project/a/b/x"), (None, self.dir / "x", {}, "x"),
            (project, None, top, "project/.broker.db"), (project, None, nearest, "project/.broker.db"),
            (project, ".queue/x", {}, "project/.queue/x"), (project, "in/x", {}, "project/a/x"),
            (project / "me", "x", {}, "project/x"), ("..", "x", {}, "project/a/x"), (project, "a..", {}, "project/a.."),
        ):  # fmt: skip
            self.assertEqual(self.where(directory, file, **settings), expected)
        self.assertEqual((Broker().path, os.listdir(self.inside)), (str(self.inside / ".broker.db"), []))
        with Queue("q", project / "me" / "x.db") as first, Queue("q", project / "x.db") as second:
            self.assertIs(first.broker.runner, second.broker.runner)

    def test_what_leads_out_of_the_directory_or_makes_no_sense_is_refused(self) -> None:
        for file in ("../x.db", "a/../../x.db", "a\\..\\x.db", "..", "out/x.db", "link", ".", "evil/x.db"):
            words = r"'\.\.': use an absolute path" if ".." in file else "leads out of .*: use an absolute path"
            self.assertRaisesRegex(UsageError, words, self.where, self.project, file)
        for bad in ("", "a\nb", "a\0b", "\x7f", "a\x1bb", ":memory:"):
            for act in (Queue, self.where, lambda _, bad: self.where(bad), lambda _, bad: self.where(self.dir, bad)):
                self.assertRaises(UsageError, act, "q", bad)
        for missing in ({"directory": self.dir / "none"}, {"db_location": str(self.dir / "none")}):
            self.assertRaisesRegex(UsageError, "none' does not exist: create it", self.where, **missing)
        for bad in (5, b"x.db", str, ["x"]):
            self.assertRaises(TypeError, Queue, "q", bad)
        for more in ({"broker": self.broker()}, {"runner": self.plain_runner()}):
            self.assertRaisesRegex(ValueError, "not both", Queue, "q", self.path, **more)

    def test_project_scope_finds_the_nearest_database_upwards_up_to_a_mount_point(self) -> None:
        scope = functools.partial(self.where, project_scope=True)
        none = f"no 'none.db' in '{re.escape(str(self.inside))}' or above it: run 'broker init'"
        self.assertRaisesRegex(UsageError, none, scope, db_name="none.db")
        for name in (".broker.db", "project/.broker.db", "project/.queue/x.db"):
            (self.dir / name).touch()
            self.assertEqual(scope(db_name=name.replace("project/", ""), db_location=str(self.dir)), name)
        (self.inside / ".broker.db").mkdir()  # a directory of that name is no database
        with mock.patch.object(os.path, "ismount", lambda path: os.fspath(path) == str(self.project / "a")):
            self.assertRaisesRegex(UsageError, "broker init", scope)
            (self.project / "a" / ".broker.db").touch()  # the mounted directory itself still counts
            self.assertEqual(scope(), "project/a/.broker.db")
        (self.project / "y.db").symlink_to(self.dir / ".broker.db")
        self.assertRaisesRegex(UsageError, "leads out of", scope, db_name="y.db")

    @NEEDS_LOCKS
    def test_files_and_directories_are_private_whatever_the_umask(self) -> None:
        def work() -> None:
            for umask, path in ((0, self.dir / "new" / "x.db"), (0o777, self.dir / "y.db"), (0o022, self.dir / "z.db")):
                os.umask(umask)
                with Queue("q", path) as queue:
                    queue.write("x")
                    files = [f"{path}{suffix}" for suffix in ("", "-wal", "-shm", ".lock")]
                    self.assertEqual([stat.S_IMODE(os.stat(file).st_mode) for file in files], [0o600] * 4)
            self.assertEqual(stat.S_IMODE((self.dir / "new").stat().st_mode), 0o700)
            os.chmod(files[-1], 0o777)
            Queue("q", path).write("x")
            self.assertEqual(stat.S_IMODE(os.stat(files[-1]).st_mode), 0o777)  # who shares it goes on sharing it

        self.unprivileged(work)

    @unittest.skipUnless(HAS_FORK, "needs POSIX permissions")
    def test_what_is_forbidden_is_an_error_that_names_the_file(self) -> None:
        def work() -> None:
            path = self.dir / "home" / "x.db"
            with Queue("q", path) as queue, Broker(path, settings=Settings(busy_timeout_ms=200)) as other:
                queue.write("a")
                path.parent.chmod(0o555)
                self.assertRaisesRegex(OperationalError, "x.db", queue.broker.delete_database)
                path.parent.chmod(0o755)
                self.assertEqual(other.queue("q").read(), "a")  # the lock was let go
            path.chmod(0)
            for act in (Queue.peek, lambda queue: queue.write("b")):
                self.assertRaisesRegex(OperationalError, "cannot be opened: check.*x.db", act, Queue("q", path))

        self.unprivileged(work)


@unittest.skipUnless(HAS_FORK, "needs fork")
class WriterLockTest(ForkTest):
    """Writers of all processes take turns; who does not get the lock in time says so (traps 10, 18-21)."""

    def setUp(self) -> None:
        super().setUp()
        self.q = self.queue(settings=Settings(busy_timeout_ms=200, sync_mode="NORMAL"))
        self.q.write("a")

    def assertBusy(self, act: Callable[[], object], at_least: float = 0.19, at_most: float = 1.2) -> None:
        begun = time.monotonic()
        self.assertRaisesRegex(OperationalError, "busy.*BROKER_BUSY_TIMEOUT", act)
        spent = time.monotonic() - begun
        self.assertTrue(at_least <= spent < at_most, spent)

    def test_a_stopped_holder_is_an_error_in_time_and_a_killed_one_lets_others_in_at_once(self) -> None:
        holder = self.holder()
        holder.signal(signal.SIGSTOP)
        for act in (lambda: self.q.write("b"), self.q.read, self.q.broker.vacuum):
            self.assertBusy(act)
        self.assertBusy(self.queue(settings=Settings(busy_timeout_ms=0)).lease, 0)
        self.assertEqual((self.q.peek(), self.q.count(), list(self.q.broker.queues())), ("a", 1, ["q"]))  # as ever
        with ThreadPoolExecutor() as pool:
            patient = pool.submit(self.queue().write, "b")
            holder.signal(signal.SIGKILL)
            patient.result(2)
        self.assertEqual((self.q.read_many(9), self.queue("held").stats().total), (["a", "b"], 0))

    @NEEDS_LOCKS
    def test_a_thread_that_is_refused_is_not_served_afterwards(self) -> None:
        class Refused(OperationalError):
            def __init__(self, text: str) -> None:
                lock.release()  # before the other looks again
                next(as_completed(writing))

        lock, writing = WriterLock(self.path), []
        lock.acquire(time.monotonic() + 1)
        slowly = mock.patch.multiple(simplebroker, LOCK_PAUSE_US=(400_000, 400_001), OperationalError=Refused)
        with slowly, ThreadPoolExecutor(2) as pool:
            writing += [pool.submit(self.q.write, body) for body in "bc"]
            stored = [body for body, done in zip("bc", writing) if done.exception() is None]
        self.assertEqual((len(stored), self.q.read_many(9)), (1, ["a", *stored]))

    @NEEDS_LOCKS
    def test_the_time_for_which_a_process_is_stopped_does_not_count(self) -> None:
        holder, queue, pause = self.holder(), self.queue(settings=Settings(busy_timeout_ms=800)), threading.Event().wait
        writer = self.child(lambda child: (child.say(), queue.write("b")))
        writer.hear()
        for number, seconds in ((signal.SIGSTOP, 1.0), (signal.SIGCONT, 0.1)):
            pause(0.1)
            writer.signal(number)
            pause(seconds)
        holder.say()
        self.assertEqual(writer.wait(), 0)

    def test_the_wait_for_the_lock_and_for_sqlite_share_one_deadline(self) -> None:
        lock = WriterLock(self.path)
        lock.acquire(time.monotonic() + 1)
        with contextlib.closing(sqlite3.connect(str(self.path), isolation_level=None)) as stranger:
            stranger.execute("BEGIN IMMEDIATE")  # without the lock file
            threading.Timer(0.18, lock.close).start()
            self.assertBusy(self.q.read, at_most=0.36)
            self.assertBusy(self.q.read)  # and the next one has all of its time again
        self.assertEqual(self.q.read(), "a")

    def test_a_transaction_of_another_thread_is_waited_for_as_long_and_a_fork_meanwhile_disturbs_nobody(self) -> None:
        broker = self.q.broker
        with ThreadPoolExecutor() as pool, broker.transaction():
            self.q.write("b")
            acts = (self.q.read, self.q.lease, broker.vacuum, broker.transaction().__enter__)
            for waiting in [pool.submit(self.assertBusy, act) for act in acts]:
                waiting.result(DEADLINE_S)
            child = pool.submit(self.child, lambda child: self.assertRaises(OperationalError, self.q.write, "inside"))
            self.assertEqual(child.result(DEADLINE_S).wait(), 0)
            for act in (broker.delete_database, broker.runner.close, broker.vacuum):
                self.assertRaisesRegex(UsageError, "this thread is in a transaction", act)
        self.assertEqual(self.child(lambda child: self.q.write("c")).wait(), 0)
        self.assertBodies(self.q, ["a", "b", "c"])

    @NEEDS_LOCKS
    def test_who_waits_for_a_deleted_file_gets_the_new_one_and_nobody_follows_a_symbolic_link(self) -> None:
        first, second = WriterLock(self.path), WriterLock(self.path)

        def delete(lock: WriterLock) -> None:
            os.unlink(lock.path)
            lock.close()

        first.acquire(time.monotonic() + 1)
        threading.Timer(0.05, delete, [first]).start()
        second.acquire(time.monotonic() + DEADLINE_S)
        self.assertRaises(OperationalError, first.acquire, time.monotonic() + 0.05)
        delete(second)
        os.symlink(self.dir / "precious", second.path)
        with Queue("q", self.path) as queue:
            self.assertRaisesRegex(OperationalError, "lock file .* is a symbolic link: remove it", queue.write, "x")

    def test_nothing_is_lost_where_the_file_is_deleted_again_and_again_or_cannot_be_locked(self) -> None:
        def work(number: int) -> None:
            if kind == "unlockable" and simplebroker.fcntl:
                simplebroker.fcntl.flock = mock.Mock(side_effect=OSError(37, "No locks available"))
            queue = self.queue("start")
            for step in range(40):
                if kind == "deleted":
                    Path(f"{self.path}.lock").unlink(missing_ok=True)
                queue.write(f"{number} {step}")
                queue.move("end")

        for kind in ("deleted", "unlockable"):
            self.path = self.dir / f"{kind}.db"
            self.together(4, work)
            self.assertEqual(len(set(self.queue("end").peek_all())), 160, kind)


@unittest.skipUnless(HAS_FORK, "needs fork")
class RunnerTest(ForkTest):
    def test_a_failing_rollback_does_not_hide_the_first_error(self) -> None:
        runner = self.plain_runner()
        queue = Queue("q", runner=runner)
        queue.write("x")
        commit = mock.Mock(side_effect=OperationalError("the commit failed"))
        for failure in (OperationalError, RuntimeError):  # another database has errors of its own
            rollback = mock.Mock(side_effect=failure("the rollback failed"))
            for act, error in ((lambda run: 1 // 0, ZeroDivisionError), (lambda run: None, OperationalError)):
                with mock.patch.multiple(runner, rollback=rollback, commit=commit), self.assertLogs() as log:
                    self.assertRaises(error, queue.broker.transact, act)
                self.assertRegex(log.output[0], ":simplebroker:.*the rollback failed")
                runner.connection.rollback()
        self.assertBodies(queue, ["x"])

    def test_sixteen_processes_that_open_a_fresh_path_at_once_all_succeed(self) -> None:
        def work(number: int) -> None:
            with self.queue() as queue:
                self.assertIn(queue.peek() if number % 2 else None, (None, "x"))
                queue.write("x")

        for turn in range(40 if FULL else 3):
            self.path = self.dir / f"new{turn}" / "x.db" if turn % 2 else self.dir / f"{turn}.db"
            self.together(16, work)
            self.assertEqual(self.queue().count(), 16)

    def files(self) -> list[tuple[str, int, int]]:
        found = [path for path in sorted(self.dir.rglob("*")) if "-shm" not in path.name]  # which readers change
        return [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in found]

    def test_asking_about_a_file_that_is_missing_or_empty_makes_nothing_and_the_first_write_makes_it(self) -> None:
        (self.dir / "empty.db").touch()
        for name in ("new/x.db", "empty.db", "a%20b", "a?mode=memory", "a#b&c=d", "'a' \"b\"", "file:\u00e9", "\udcff"):
            path, before = self.dir / name, self.files()
            with Queue("q", path, settings=Settings(sync_mode="FULL")) as queue:
                self.assertEqual((queue.peek(), list(queue.peek_all()), queue.has_pending()), (None, [], False))
                self.assertEqual((queue.broker.queues(), len(list(queue.broker.dump()))), ({}, 1))
                self.assertEqual((queue.broker.delete_database(), self.files()), (False, before))
                queue.write("x")
                self.assertEqual((queue.peek(), path.exists()), ("x", True))
                found = [queue.broker.run(sql)[0][0] for sql in ("PRAGMA application_id", ext.SELECT_VERSION)]
                self.assertEqual(found, [ext.APPLICATION_ID, ext.SCHEMA_VERSION])  # the database says what it is
            gc.collect()  # PyPy closes the log no sooner
            self.assertEqual([file for file in descriptors() if str(self.dir) in file], [])

    def test_opening_an_existing_database_only_reads_also_while_a_writer_is_inside(self) -> None:  # trap 16
        def work(child: Child) -> None:
            with Queue("q", self.path, settings=Settings(busy_timeout_ms=0)) as queue:
                self.assertEqual((queue.peek(), queue.count(), len(list(queue.broker.dump()))), ("a", 1, 2))

        self.queue().write("a")
        holder = self.holder()
        before = self.files()
        self.assertEqual((self.child(work).wait(), self.files()), (0, before))
        holder.say("end")


@unittest.skipUnless(HAS_FORK, "needs fork")
class FilesTest(ForkTest):
    """What is not a SimpleBroker database is refused; what is deleted or replaced is noticed by all who use it."""

    OTHERS = ("CREATE TABLE messages (id INTEGER PRIMARY KEY, queue TEXT, body TEXT)", "PRAGMA application_id = 7")
    ALTERED = (
        "CREATE TRIGGER evil AFTER INSERT ON messages BEGIN DELETE FROM messages; END",
        "ALTER TABLE messages RENAME TO other; CREATE VIEW messages AS SELECT * FROM other",
        "ALTER TABLE messages ADD COLUMN colour TEXT", "CREATE UNIQUE INDEX odd ON messages (body)",
        "DROP INDEX ready; CREATE INDEX ready ON messages (queue)", "DROP INDEX held",
        "DROP TABLE meta", "DELETE FROM meta", "PRAGMA application_id = 0",
    )  # fmt: skip

    def bad_files(self) -> Iterator[bytes]:
        yield from (b"This is a diary, dear.\n" * 500, b"x", b"xy", b"SQLite format 3\0", os.urandom(9000))
        with self.queue() as queue:
            queue.write("x")
        whole, page = self.path.read_bytes(), simplebroker.PAGE_BYTES
        yield from (whole[:size] for size in (page, 3 * page, len(whole) - page, 5000, 100, 20))
        for script in (*self.OTHERS, *self.ALTERED):
            self.path.write_bytes(whole if script in self.ALTERED else b"")
            with contextlib.closing(sqlite3.connect(str(self.path), isolation_level=None)) as connection:
                connection.executescript(script)
            yield self.path.read_bytes()

    def test_what_is_not_ours_is_refused_at_once_and_left_as_it_was(self) -> None:  # trap 17
        files = list(self.bad_files())
        Path(f"{self.path}.lock").unlink(missing_ok=True)
        reason = f"{self.path}.*(not a SimpleBroker database, or is damaged|altered|another program: choose another)"
        for content in files:
            self.path.write_bytes(content)
            with self.subTest(content[:20]), self.queue() as queue:
                begun = time.monotonic()
                for act in (queue.peek, lambda: queue.write("x"), queue.broker.vacuum, queue.broker.delete_database):
                    self.assertRaisesRegex(DatabaseError, reason, act)
                self.assertLess(time.monotonic() - begun, 2)
            self.assertEqual((self.path.read_bytes(), os.listdir(self.dir)), (content, ["test.db"]))
        for path, words in (
            (self.dir, "is a directory"), (Path(os.devnull), "a device"),
            (self.path / "x.db", "directory .*test.db.* cannot be made"),
        ):  # fmt: skip
            self.assertRaisesRegex(OperationalError, words, Queue("q", path).write, "x")
        self.assertFalse(os.path.exists(os.devnull + ".lock"))

    def remove(self, *suffixes: str) -> None:
        for suffix in suffixes:
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def assertEverywhere(self, queue: Queue, *bodies: str) -> None:
        """What this process finds, and another, and who opens it when all have closed it."""
        self.assertBodies(queue, list(bodies))
        self.assertEqual(self.child(lambda child: self.assertBodies(self.queue(), list(bodies))).wait(), 0)
        queue.close()
        self.assertBodies(self.queue(), list(bodies))

    def test_a_deleted_database_is_begun_anew_whatever_is_left_of_it(self) -> None:  # trap 8
        def read(child: Child) -> None:
            child.say(f"{self.queue().count()}")
            self.assertEqual((child.hear(), self.queue().peek()), ("deleted", "new"))

        def write_and_die(child: Child) -> None:
            self.queue().write_many(["old"] * 9)
            os.kill(os.getpid(), signal.SIGKILL)

        for suffixes in ((), ("-wal", "-shm"), ("-wal", "-shm", ".lock"), ("-shm",), ("-wal",)):
            for when in ("between transactions", "after a process was killed", "in a transaction"):
                queue = self.queue()
                queue.write_many(["old"] * 9)
                if when == "after a process was killed":
                    self.assertEqual(self.child(write_and_die).wait(), -signal.SIGKILL)
                reader = self.child(read)
                self.assertEqual(reader.hear(), f"{queue.count()}")
                index = os.open(f"{self.path}-shm", os.O_RDONLY)  # which keeps its inode from being used again
                self.addCleanup(os.close, index)
                inside = queue.broker.transaction() if when == "in a transaction" else contextlib.nullcontext()
                with self.subTest(suffixes, when=when):
                    with contextlib.suppress(BrokerError), inside:
                        queue.write("old too")
                        self.remove("", *suffixes)
                    self.assertIsNone(queue.peek())
                    queue.write("new")
                    if simplebroker.fcntl:  # readers of the old file write into its index
                        self.assertNotEqual(os.stat(f"{self.path}-shm").st_ino, os.fstat(index).st_ino)
                    reader.say("deleted")
                    self.assertEqual(reader.wait(), 0)
                    self.assertEverywhere(queue, "new")

    def test_a_database_replaced_by_another_is_the_other_from_then_on(self) -> None:
        queue = self.queue()
        queue.write("old")
        with Queue("q", self.dir / "other.db") as other:
            other.write("new 1")
        self.remove("-wal", "-shm")
        os.replace(self.dir / "other.db", self.path)
        self.assertEqual(queue.peek(), "new 1")
        queue.write("new 2")
        self.assertEverywhere(queue, "new 1", "new 2")


@unittest.skipUnless(HAS_FORK and ON_LINUX, "needs RLIMIT_FSIZE")
class FullDisk(ForkTest):
    """No room in the middle of each kind of write: an error, nothing half done, and then it works."""

    LOADED = [json.dumps({"type": "message", "queue": "z", "body": "B" * 9000, "id": id}) for id in range(1, 200)]
    WAYS: ClassVar[dict[str, Callable[[Queue], object]]] = {
        "write": lambda queue: queue.write("B" * 1_800_000),
        "write_many": lambda queue: queue.write_many(["B" * 9000] * 200),
        "move_many": lambda queue: queue.move_many("other", 10**6),
        "read_many": lambda queue: queue.read_many(10**6),
        "delete": lambda queue: queue.delete(),
        "broadcast": lambda queue: queue.broker.broadcast("B" * 1_800_000),
        "load": lambda queue: queue.broker.load([HEADER, *FullDisk.LOADED]),
    }

    def check(self, way: str, fill: Callable[[], object], free: Callable[[], object]) -> None:
        """After ``fill()`` only the log can take something, and not enough."""
        with Queue("q", self.dir / f"{way}.db", settings=Settings(sync_mode="OFF")) as queue:
            queue.write_many([f"{number:04} " * 40 for number in range(2500)])
            queue.broker.vacuum()
            before = list(queue.broker.dump())
            fill()
            no_room = f"(a limit of its size|disk is full).*{way}.db"
            self.assertRaisesRegex(OperationalError, no_room, self.WAYS[way], queue)
            free()
            self.assertEqual(list(queue.broker.dump()), before)
            self.WAYS[way](queue)
            self.assertNotEqual(list(queue.broker.dump()), before)
            self.assertEqual(queue.broker.run("PRAGMA integrity_check"), [("ok",)])

    def test_a_limit_of_the_size_of_a_file(self) -> None:
        from resource import RLIM_INFINITY, RLIMIT_FSIZE, setrlimit

        fill = functools.partial(setrlimit, RLIMIT_FSIZE, (150_000, RLIM_INFINITY))
        free = functools.partial(setrlimit, RLIMIT_FSIZE, (RLIM_INFINITY, RLIM_INFINITY))
        children = {way: self.child(lambda child, way=way: self.check(way, fill, free)) for way in self.WAYS}
        self.assertEqual({way: child.wait() for way, child in children.items()}, dict.fromkeys(self.WAYS, 0))

    @unittest.skipUnless(ON_LINUX and os.geteuid() == 0, "needs to mount")
    def test_a_full_disk(self) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(self.dir)], check=True)
        self.addCleanup(subprocess.run, ["umount", str(self.dir)], check=True)
        filler = self.dir / "filler"

        def fill() -> None:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass
            os.truncate(filler, filler.stat().st_size - 100_000)

        for way in self.WAYS:
            with self.subTest(way):
                self.check(way, fill, filler.unlink)
                for path in self.dir.iterdir():
                    path.unlink()


@unittest.skipUnless(HAS_FORK, "needs fork")
class CutLog(ForkTest):
    """A crash of the machine may leave any part of the write-ahead log. What is recovered is a state that was."""

    def leave_a_log(self, child: Child) -> None:
        """Work in a process that is killed; write down all states of the database, in order."""
        broker = Broker(self.path, settings=Settings(sync_mode="OFF", wal_autocheckpoint=10**6))
        q, other, z = broker.queue("q"), broker.queue("other"), broker.queue("z")
        loaded = [json.dumps({"type": "message", "queue": "z", "body": "l" * 900, "id": id}) for id in range(1, 9)]
        leased: list[Any] = []
        acts: list[Callable[[], object]] = [
            lambda: q.write("first"), lambda: q.write_many([f"{number} " * 150 for number in range(12)]),
            lambda: broker.broadcast("to all of them"), lambda: other.write("x" * 20_000),
            lambda: broker.broadcast("to both " * 200), lambda: q.move("other"), lambda: q.move_many("moved", 5),
        ]  # fmt: skip
        for settle in (q.ack, q.dead_letter, q.extend, q.release):
            acts += [lambda: leased.append(q.lease(30)), lambda settle=settle: settle(leased[-1])]  # type: ignore[misc]
        acts += [
            lambda: broker.load([HEADER, *loaded]), q.read, lambda: other.read_many(2), lambda: broker.rename("q", "r"),
            broker.queue("r").delete, lambda: z.move_many("q", 5), z.delete, broker.queue("moved").delete,
        ]  # fmt: skip
        states = [list(broker.dump()) for act in acts if act() or True]
        (self.dir / "states").write_text(json.dumps(states))
        os.kill(os.getpid(), signal.SIGKILL)

    def recovered(self, log: bytes) -> list[str]:
        """What is found in a copy of the file with such a log."""
        path = self.dir / "copy.db"
        shutil.copy(self.path, path)
        Path(f"{path}-wal").write_bytes(log)
        with Broker(path, settings=Settings(sync_mode="OFF")) as broker:
            found = list(broker.dump())
            self.assertEqual(broker.run("PRAGMA integrity_check"), [("ok",)])
            last = max([0, *(int(json.loads(line).get("id", 0)) for line in found)])
            self.assertGreater(broker.queue("q").write("it goes on"), last)
            broker.delete_database()
        return found

    def test_cut_anywhere_and_with_random_bytes_that_were_never_written(self) -> None:
        """More of the log shows no older state, and all of it the last."""
        self.assertEqual(self.child(self.leave_a_log).wait(), -signal.SIGKILL)
        empty = json.dumps({**json.loads(HEADER), "last_ts": "0" * 19})
        states: list[list[str]] = [[], [empty], *json.loads((self.dir / "states").read_text())]
        log, at, rng = Path(f"{self.path}-wal").read_bytes(), 0, random.Random(11)
        ends = [*range(32, len(log) + 1, 24 + simplebroker.PAGE_BYTES)]  # of its header and of each frame
        self.assertTrue(len(set(map(tuple, states))) > 20 and len(ends) > 60 and ends[-1] == len(log))
        for end in sorted([*ends, *(rng.randrange(len(log)) for _ in range(500 if FULL else 60))]):
            found = self.recovered(log[:end])
            self.assertTrue(found in states[at:], f"it never was like this, or later than this, at {end} bytes")
            at = states.index(found, at)
        self.assertEqual(found, states[-1])
        for _ in range(500 if FULL else 60):
            start, length = rng.randrange(32, len(log)), rng.choice([1, 512, 4096])
            hole = bytes(byte ^ 0xFF for byte in log[start : start + length])
            found = self.recovered(log[:start] + hole + log[start + length :])
            self.assertTrue(found in states, f"it never was like this: {length} bytes at {start}")


class QueueContract:
    """What every way in promises. A subclass is one way: its b() is, or acts as, a Broker."""

    _broker: Any
    thorough = True  # with all combinations
    DELAY_S = 0.4  # in which three operations are done

    def b(self) -> Any:
        return self._broker

    def q(self, name: str) -> Any:
        return self.b().queue(name)

    def fill(self, name: str, bodies: Iterable[str]) -> list[int]:
        """Write each body by itself."""
        return [self.q(name).write(body) for body in bodies]

    def states(self, name: str) -> list[tuple[str, str, int, str | None]]:
        """All messages of a queue: body, state, attempt, reason."""
        return [(str(m), m.state, m.attempt, m.reason) for m in self.q(name).peek_all(held=True)]

    def counts(self) -> dict[str, tuple[int, ...]]:
        """Of each queue how many are ready, leased and delayed."""
        return {name: tuple(stats)[:3] for name, stats in self.b().queues().items()}

    # -- the cases

    def test_messages_come_out_in_the_order_they_went_in_and_peek_removes_nothing(self: Any) -> None:
        q, ids = self.q("q"), self.fill("q", "0123")
        self.assertEqual(ids, sorted(set(ids)))
        self.assertEqual((q.peek(), q.peek(message_id=ids[1]), q.peek_many(2)), ("0", "1", ["0", "1"]))
        self.assertEqual((q.peek_many(9), self.counts()), (list("0123"), {"q": (4, 0, 0)}))
        self.assertEqual([q.read(), *q.read_many(2), q.read(), q.read()], ["0", "1", "2", "3", None])

    def test_empty_is_nothing_and_no_error(self: Any) -> None:
        q = self.q("q")
        self.assertEqual((q.read(), q.peek(), q.lease(60), q.move("d")), (None,) * 4)
        self.assertEqual((list(q.read_all()), list(q.peek_all()), q.read_many(9), q.peek_many(9)), ([], [], [], []))
        self.assertEqual((q.move_all("d"), q.move_many("d", 9), q.requeue()), (0, [], 0))
        self.assertFalse(q.delete() or self.b().broadcast("x") or self.b().rename("q", "d"))
        self.assertEqual(self.counts(), {})

    def test_bodies_come_back_byte_for_byte(self: Any) -> None:
        bodies = ["", " ", "a\n", "\n\n", "-x", "--all", "'\"\\", "\u00e9\u65e5\U0001f600", "a\tb\r\n", "{}"]
        bodies.append("x" * 70_000)
        self.fill("q", bodies)
        self.assertEqual(list(self.q("q").peek_all()), bodies)
        self.assertEqual(list(self.q("q").read_all()), bodies)

    def test_every_filter_counts_on_every_path(self: Any) -> None:  # trap 12
        q, d, ids = self.q("q"), self.q("d"), self.fill("q", "012345")
        cases: tuple[tuple[dict[str, Any], str], ...] = (
            ({"after": ids[2]}, "345"), ({"before": ids[2]}, "01"), ({"after": ids[1], "before": ids[4]}, "23"),
            ({"after": str(ids[4])}, "5"), ({"after": ids[5]}, ""), ({"before": ids[0]}, ""),
            ({"after": ids[3], "before": ids[2]}, ""),
            ({"message_id": ids[3]}, "3"), ({"message_id": ids[3] + 10**6}, ""),
        )  # fmt: skip
        for filters, bodies in cases if self.thorough else cases[2:8:3]:
            with self.subTest(filters):
                expected = list(bodies)
                first = expected[0] if expected else None
                self.assertEqual((q.peek(**filters), q.move("d", **filters)), (first, first))
                self.assertEqual(d.move_all("q"), len(expected[:1]))
                if "message_id" not in filters:
                    self.assertEqual(list(q.peek_all(**filters)), expected)
                    self.assertEqual(q.peek_many(2, **filters), expected[:2])
                    self.assertEqual(q.move_many("d", 2, **filters), expected[:2])
                    self.assertEqual(q.move_all("d", **filters), len(expected[2:]))
                    self.assertEqual(list(d.peek_all()), expected)
                    d.move_all("q")
                self.assertEqual(list(q.peek_all()), list("012345"))

    def test_reading_obeys_the_filters_too(self: Any) -> None:
        q, ids = self.q("q"), self.fill("q", "012345678")
        self.assertEqual(q.read(after=ids[3]), "4")
        self.assertEqual((q.read(message_id=ids[6]), q.read(message_id=ids[6])), ("6", None))
        self.assertEqual(q.read_many(1, after=ids[4]), ["5"])
        self.assertEqual(list(q.read_all(after=ids[1], before=ids[8])), ["2", "3", "7"])
        self.assertEqual(list(q.read_all(before=ids[1])), ["0"])
        self.assertEqual(q.read_many(9), ["1", "8"])

    def test_a_move_keeps_id_and_order(self: Any) -> None:
        ids = [self.q(name).write(name) for name in "aba"]
        self.assertEqual(self.q("b").move("a"), "b")
        self.assertEqual([(m.id, str(m)) for m in self.q("a").peek_all()], list(zip(ids, "aba")))

    def test_delete_takes_one_a_range_or_all_held_ones_too(self: Any) -> None:
        q, ids = self.q("q"), self.fill("q", "0123456")
        q.write("later", delay=60)
        self.fill("other", "x")
        q.lease(60)
        self.assertEqual([bool(q.delete(message_id=ids[2])) for _ in range(2)], [True, False])
        self.assertFalse(self.q("other").delete(message_id=ids[1]))
        self.assertTrue(q.delete(message_id=ids[0]))  # which is leased
        q.lease(60)
        self.assertEqual(self.counts(), {"other": (1, 0, 0), "q": (4, 1, 1)})
        self.assertFalse(q.delete(before=ids[1]))
        self.assertTrue(q.delete(before=ids[3]))  # one, leased
        self.assertTrue(q.delete(after=ids[3], before=ids[6]))
        expected = [("3", "ready", 0, None), ("6", "ready", 0, None), ("later", "delayed", 0, None)]
        self.assertEqual(self.states("q"), expected)
        self.assertTrue(q.delete(after=ids[6]))  # one, delayed
        self.assertEqual(self.counts(), {"other": (1, 0, 0), "q": (2, 0, 0)})
        self.assertTrue(q.delete())
        self.assertEqual(self.counts(), {"other": (1, 0, 0)})

    def test_a_delayed_message_is_held_and_then_in_its_old_place(self: Any) -> None:
        q = self.q("q")
        id = q.write("delayed", delay=self.DELAY_S)
        q.write("ready")
        self.assertEqual(self.counts(), {"q": (1, 0, 1)})
        self.assertEqual((q.peek(), q.peek(message_id=id), q.read(message_id=id)), ("ready", "delayed", None))
        self.wait_for(lambda: self.counts() == {"q": (2, 0, 0)}, "the message to be due")
        self.assertEqual(list(q.peek_all()), ["delayed", "ready"])
        self.assertEqual(list(q.read_all()), ["delayed", "ready"])

    def test_a_leased_message_is_hidden_and_released_in_its_old_place_and_gone_when_acknowledged(self: Any) -> None:
        q, _ = self.q("q"), self.fill("q", "ab")
        lease = q.lease(60)
        self.assertEqual((str(lease), lease.attempt, q.peek(), self.counts()), ("a", 1, "b", {"q": (1, 1, 0)}))
        self.assertEqual(self.states("q"), [("a", "leased", 1, None), ("b", "ready", 0, None)])
        q.release(lease)
        lease = q.lease(60)
        self.assertEqual((str(lease), lease.attempt), ("a", 2))
        q.ack(lease)
        self.assertRaises(LeaseLost, q.ack, lease)
        q.release(q.lease(60), delay=60)
        self.assertEqual((q.read(), self.states("q")), (None, [("b", "delayed", 1, None)]))

    def test_a_stale_lease_can_do_nothing_whatever_happened_in_between(self: Any) -> None:
        """Case 2, trap 26: also where the attempt is 1 again."""
        q = self.q("q")

        def reload(stale: Any) -> None:
            lines = list(self.b().dump())
            q.delete()
            self.b().load(lines)

        ways: tuple[tuple[str, int, Callable[[Any], object]], ...] = (
            ("leased again", 2, lambda stale: None), ("released", 2, q.release), ("dumped and loaded", 2, reload),
            ("moved there and back", 1, lambda stale: (q.move("d"), self.q("d").move("q"))),
            ("dead-lettered and requeued", 1, lambda stale: (q.dead_letter(q.lease(60)), q.requeue())),
        )  # fmt: skip
        for name, attempt, act in ways if self.thorough else ways[2:]:
            with self.subTest(name):
                q.write("a")
                stale = q.lease(0.1)
                self.wait_for(q.peek, "the lease to end")
                act(stale)
                if name != "leased again":
                    self.assertRaises(LeaseLost, q.ack, stale)  # nobody has it now, and still it is not his
                new = q.lease(60)
                self.assertEqual((str(new), new.attempt), ("a", attempt))
                for settle in (q.ack, q.release, q.dead_letter, functools.partial(q.extend, seconds=60)):
                    self.assertRaises(LeaseLost, settle, stale)
                self.assertEqual(self.counts(), {"q": (0, 1, 0)})
                q.ack(new)

    def test_a_dead_letter_tells_why_and_a_requeue_begins_anew(self: Any) -> None:
        q, _ = self.q("q"), self.fill("q", "abc")
        q.release(q.lease(60), reason="exit status 3")
        self.assertEqual(self.states("q")[0], ("a", "ready", 1, "exit status 3"))
        q.dead_letter(q.lease(60))  # the reason stays until there is another
        q.dead_letter(q.lease(60), reason="timed out after 30s")
        q.dead_letter(q.lease(60), dest="morgue", reason="KeyError: 5")
        expected = [("a", "ready", 0, "exit status 3"), ("b", "ready", 0, "timed out after 30s")]
        self.assertEqual((self.states("q.dead"), self.states("morgue")), (expected, [("c", "ready", 0, "KeyError: 5")]))
        self.assertEqual((q.requeue(None, 1), self.states("q")), (1, [("a", "ready", 0, None)]))
        self.assertEqual((q.requeue(), q.requeue(), q.requeue("morgue"), q.peek_many(9)), (1, 0, 1, list("abc")))
        q.release(q.lease(60), reason="again")
        q.move("d")
        self.assertEqual((self.states("d"), self.counts()["q"]), ([("a", "ready", 0, None)], (2, 0, 0)))

    def test_a_rename_takes_all_messages_and_keeps_their_leases(self: Any) -> None:
        for queue, body in (("old", "a"), ("new", "b"), ("old", "c"), ("old.dead", "d")):
            self.fill(queue, body)
        old, new = self.q("old"), self.q("new")
        old.write("later", delay=60)
        lease = old.lease(60)
        self.assertEqual([bool(self.b().rename("old", "new")) for _ in range(2)], [True, False])
        self.assertEqual(self.counts(), {"new": (2, 1, 1), "old.dead": (1, 0, 0)})
        self.assertEqual(list(new.read_all()), ["b", "c"])
        new.extend(lease, seconds=60)
        old.ack(lease)  # whatever the queue is called by now
        self.assertEqual(self.counts(), {"new": (0, 0, 1), "old.dead": (1, 0, 0)})

    def test_broadcast_reaches_queues_that_match_and_makes_those_that_are_named(self: Any) -> None:
        for name in ("a1", "a2", "b"):
            self.fill(name, "x")
        self.assertTrue(self.b().broadcast("y", pattern="a*"))
        self.assertFalse(self.b().broadcast("y", pattern="z*"))
        self.assertTrue(self.b().broadcast("y", queues=["b", "new", "b"]))
        self.assertEqual(self.counts(), {"a1": (2, 0, 0), "a2": (2, 0, 0), "b": (2, 0, 0), "new": (1, 0, 0)})

    def test_dump_and_load_keep_everything_or_change_nothing(self: Any) -> None:
        self.fill("q", ["a", "b\n"])
        self.q("r").write("c", delay=60)
        self.q("q").lease(60)
        lines = list(self.b().dump())
        for bad in (lines, [lines[0], '{"type": "message", "queue": "z", "body": "x", "id": 5}', "nonsense"]):
            self.assertRaises(BrokerError, self.b().load, bad)
        self.assertEqual(list(self.b().dump()), lines)
        for name in "qr":
            self.q(name).delete()
        self.b().load(lines)
        self.assertEqual(list(self.b().dump()), lines)
        self.assertGreater(self.q("q").write("d"), int(json.loads(lines[-1])["id"]))


class ContractOfQueue(QueueContract, CoreTest):
    def setUp(self) -> None:
        super().setUp()
        self._broker = self.broker()


class ContractOfCustomRunner(QueueContract, CoreTest):
    def setUp(self) -> None:
        super().setUp()
        self._broker = Broker(runner=self.plain_runner())


class TransactionTest(ForkTest):
    """ModelTest nests transactions at random; each is kept whole or not at all."""

    def test_a_transaction_that_sqlite_rolled_back_takes_nothing_more(self) -> None:
        """Case 1, trap 27: the file may not grow beyond 6 MB."""

        def work(child: Child) -> None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, 6_000_000))
            for finish in (lambda: None, lambda: 1 // 0):
                with Broker(self.path, settings=Settings(cache_mb=1)) as broker:
                    queue = broker.queue("q")
                    with self.assertRaises((OperationalError, ZeroDivisionError)), broker.transaction():
                        queue.write("a")
                        self.assertRaises(OperationalError, queue.write, "B" * 8_000_000)
                        for act in (lambda: queue.write("c"), queue.read, lambda: queue.write_many(["d", "e"])):
                            self.assertRaisesRegex(OperationalError, "rolled", act)
                        finish()
                    self.assertEqual(queue.count(), 0)
            with Broker(self.path) as broker:
                broker.queue("q").write("afterwards")

        self.assertEqual(self.child(work).wait(), 0)
        self.assertBodies(self.queue(), ["afterwards"])

    @unittest.skipUnless(hasattr(os, "fdatasync"), "needs fdatasync")
    def test_threads_that_wait_at_the_same_time_share_a_commit(self) -> None:
        """Counted in syncs: fewer than threads, in one of the rounds."""
        queue = self.queue(settings=Settings(sync_mode="FULL"))
        written: list[int] = []

        def syncs_of_a_round() -> int:
            with mock.patch.object(os, "fdatasync", side_effect=os.fdatasync) as sync, ThreadPoolExecutor(8) as pool:
                with queue.broker.transaction():
                    queue.write("holds the lock")
                    writes = [pool.submit(queue.write, "x") for _ in range(8)]
                written.extend(write.result(DEADLINE_S) for write in writes)
                return sync.call_count

        self.wait_for(lambda: syncs_of_a_round() < 9, "a commit that is shared")
        self.assertEqual(len(set(written)), len(written))
        self.assertLessEqual(set(written), {message.id for message in queue.peek_all()})

    def test_what_one_thread_raises_is_its_own_and_nobody_is_called_twice(self) -> None:
        """And the main thread, where interrupts come, does only its own work."""
        queue = self.queue()
        errors = {"a": None, "lost": LeaseLost("one"), "b": None, "exit": SystemExit(3), "c": None, "main": None}
        errors["interrupt"] = KeyboardInterrupt()
        callers: list[tuple[str, bool]] = []

        def act(name: str) -> str:
            def function(run: Any) -> str:
                callers.append((name, threading.current_thread() is threading.main_thread()))
                queue.write(name)
                error = errors[name]
                if error is not None:
                    raise error
                return name

            return queue.broker.transact(function)

        def hold() -> dict[str, Any]:
            with queue.broker.transaction():
                inside.set()
                time.sleep(0.01)  # most likely the main thread is the first in line then, and the others come after it
                futures = {name: pool.submit(act, name) for name in errors if name != "main"}
                time.sleep(0.01)
            return futures

        for _ in range(6):
            callers.clear()
            inside = threading.Event()
            with ThreadPoolExecutor(8) as pool:
                holder = pool.submit(hold)
                inside.wait(DEADLINE_S)
                self.assertEqual(act("main"), "main")
            futures = holder.result()
            self.assertEqual({"main": None, **{name: each.exception() for name, each in futures.items()}}, errors)
            self.assertEqual([futures[name].result() for name in "abc"], ["a", "b", "c"])
            self.assertEqual(sorted(callers), sorted((name, name == "main") for name in errors))
            self.assertEqual(sorted(queue.read_many(9)), ["a", "b", "c", "main"])


class DumpAndLoad(StoppedClockTest):
    MESSAGE: ClassVar[dict[str, Any]] = {"type": "message", "queue": "q", "body": "x", "id": "1837025672140161024"}

    def line(self, **changes: Any) -> str:
        return json.dumps({**self.MESSAGE, **changes})

    def test_dumps_of_the_package_on_pypi_are_read(self) -> None:
        lines = [
            '{"type": "header", "format": "simplebroker-dump", "version": 1, "created": "2025-01-01"}',
            '{"type": "alias", "alias": "short", "target": "long"}',
            self.line(id=1837025672140161024, claimed=False),
            self.line(id="1837025672140161025"),
        ]
        with self.assertLogs("simplebroker", "WARNING") as log:
            self.assertEqual(self.b.load(lines), 2)
        self.assertRegex("".join(log.output), r"\A[^\n]*alias 'short'[^\n]*\Z")
        self.assertEqual([m.id for m in self.q.peek_all()], [1837025672140161024, 1837025672140161025])

    def test_lines_are_read_by_the_thread_that_loads_them_also_beside_writers(self) -> None:
        """They may belong to a thread, or take its locks."""

        def lines() -> Iterator[str]:
            threads.append(threading.get_ident())
            yield HEADER

        broker, threads = self.broker(), []
        with ThreadPoolExecutor(9) as pool, broker.transaction():
            for number in range(8):
                pool.submit(broker.queue("q").write, str(number))
            time.sleep(0.05)  # they wait for the transaction, and share the next
            loading = pool.submit(lambda: (broker.load(lines()), threads.append(threading.get_ident())))
            time.sleep(0.05)
        self.assertEqual((loading.result()[0], len(threads), len(set(threads))), (0, 2, 1))

    def test_a_bad_line_is_named_shortly_and_nothing_is_loaded(self) -> None:
        """Case 19: errors are short, whatever the line; ids lie before the year 2200."""
        year_2200 = int(datetime(2200, 1, 2, tzinfo=timezone.utc).timestamp()) * NS
        long = "9" * 300_000
        bad: list[str | bytes] = [
            "", "\n", "{", "[]", "null", "5", '"text"', "{}", "nonsense", long, f'"{long}"', f'{{"{long}',
            '{"type": "message"}', '{"type": "other"}', HEADER, '{"type": "message", "queue": "q", "body": "x"}',
            b"\xff\xfe\xfd", b'{"type": "message", "queue": "q", "id": 7, "body": "\xff"}',
            "[" * 100_000, '{"a":' * 100_000, '{"type": "message", "queue": "q", "body": "\\ud800", "id": 7}',
        ]  # fmt: skip
        changes: dict[str, tuple[Any, ...]] = {
            "id": (0, -1, 1.5, True, None, "x", 2**63, "9" * 20, "", "\uff11", [1], long, [long], year_2200, 2**63 - 1),
            "queue": ("", None, "a b", ["q"], "q\n", long, [long]),
            "body": (None, 5, ["x"], {}, {"x": long}),
            "held_until": ("soon", -1, 1e30, long, True),
            "attempt": (-1, "x", None, long, 2**63 - 1, 2**63),
            "reason": (5, ["x"]),
            "type": (None, ["message"], long, {"x": long}),
        }
        bad += [self.line(**{name: value}) for name, values in changes.items() for value in values]
        wrong = ['"version": 2', '"version": "1"', '"format": "other"']
        wrong += [f'"last_ts": "{value}"' for value in ("-5", "x", 2**63 - 4096, long)]
        headers = [HEADER.replace("}", f", {words}}}") for words in wrong]
        self.q.write("before")
        before, good = list(self.b.dump()), self.line()
        cases = [("line 4: ", [HEADER, self.line(id=1), self.line(id=2), line, good]) for line in bad]
        cases += [("line 1: ", [line, good]) for line in (good, *headers)]
        cases += [("there is nothing to load", [])]
        cases += [("line 2: .* exists already", before), ("line 3: .* exists already", [HEADER, good, good])]
        for words, lines in cases:
            error = IntegrityError if "exists" in words else UsageError
            with self.subTest(words, lines=str(lines)[:400]):
                with self.assertRaisesRegex(error, rf"\A{words}") as caught:
                    self.b.load(lines)
                self.assertLess(len(str(caught.exception)), 250)
                self.assertNotIn("\n", str(caught.exception))
                self.assertEqual(list(self.b.dump()), before)
        self.assertEqual(self.b.load([HEADER]), 0)
        self.q.write("still writable")


class QueueTest(StoppedClockTest):
    """What only Python sees."""

    def test_delay_and_until_mean_the_same_moment_by_the_clock_of_the_broker(self) -> None:
        """A wait follows that clock too (case 19)."""
        due = self.clock.ns + 60 * NS
        self.q.write("a", delay=60)
        self.q.write("b", until=datetime.fromtimestamp(due / NS, timezone.utc))
        self.q.write_many(["c", "d"], delay=60.0)
        self.q.write_many(["e"], until=due)
        self.clock.ns = due - 1
        self.assertEqual((self.q.count(), self.q.has_pending(), self.q.read(wait=0.02)), (0, False, None))
        self.clock.ns = due
        self.assertEqual((self.q.count(), self.q.has_pending(), self.q.read(wait=DEADLINE_S)), (5, True, "a"))
        self.assertEqual(self.q.read_many(9), list("bcde"))

    def test_write_many_is_all_or_nothing_and_in_order(self) -> None:
        for bad in ((1 // (2 - number) for number in range(9)), ["a", "\ud800"], ["a"] * 100 + [5], "abc", b"abc"):
            with self.assertRaises((ZeroDivisionError, MessageError, TypeError)):
                self.q.write_many(bad)
        self.assertEqual((self.q.count(), self.q.write_many([])), (0, []))
        for count, length in ((1, 1), (64, 1), (65, 1), (4097, 1), (100, 20_000)):
            bodies = [str(number) * length for number in range(count)]
            ids = self.q.write_many(iter(bodies))
            self.assertEqual([(m.id, str(m)) for m in self.q.peek_all()], list(zip(ids, bodies)))
            self.assertEqual((ids, self.q.read_many(count)), (sorted(set(ids)), bodies))

    def test_misused_delays_leases_and_reasons_are_refused(self) -> None:
        q = self.q
        q.write("a")
        message = q.lease(60)
        durations = (
            lambda value: q.write("x", delay=value), lambda value: q.write_many(["x"], delay=value), q.lease,
            lambda value: q.extend(message, value), lambda value: q.release(message, delay=value),
            lambda value: LeasesInFlight(q, value), lambda value: list(q.read_all(lease=value)),
        )  # fmt: skip
        moments = (lambda value: q.write("x", until=value), lambda value: q.write_many(["x"], until=value))
        waits = (lambda value: q.read(wait=value), lambda value: q.lease(wait=value))
        reasons = (lambda value: q.release(message, reason=value), lambda value: q.dead_letter(message, reason=value))
        for act in (
            lambda: q.write("x", delay=5, until=5), lambda: q.write_many(["x"], delay=5, until=5),
            lambda: q.dead_letter(message, "q"), lambda: q.dead_letter(message, "no good"), lambda: q.requeue("q"),
            lambda: LeasesInFlight(q, 0),
        ):  # fmt: skip
            self.assertRaises(ValueError, act)
        year_2300 = datetime(2300, 1, 1, tzinfo=timezone.utc)  # beyond the numbers: no OverflowError (case 19)
        for error, acts, values in (
            (TypeError, durations, (True, "5", b"5", [5], timedelta(seconds=5))),
            (ValueError, durations, (-1, -0.001, math.nan, math.inf, 1e300, 10**30)),
            (TypeError, moments, (True, "2024-01-15", 1.5, date(2024, 1, 15), b"5")),
            (ValueError, moments, (-1, 2**63, datetime(2024, 1, 15), year_2300)),
            (ValueError, waits, (True, -1, -0.001, -math.inf, math.nan)),
            (TypeError, reasons, (5, b"x")),
        ):
            for number, act in enumerate(acts):
                for value in values:
                    with self.subTest(error.__name__, act=number, value=value), self.assertRaises(error):
                        act(value)
        self.assertEqual(q.stats()[:3], (0, 1, 0))

    def test_a_queue_on_a_path_is_pickled_and_repr_names_its_file(self) -> None:
        queue = self.queue()
        queue.write("x")
        copied = pickle.loads(pickle.dumps(queue))
        self.addCleanup(copied.close)
        self.assertEqual((copied.name, copied.broker.settings, copied.read()), ("q", queue.broker.settings, "x"))
        for owner in (queue, copied, self.b):
            self.assertIn(repr(str(self.path)), repr(owner))
        self.assertIn("'q'", repr(queue))
        queue = Queue("q", runner=self.plain_runner(self.dir / "other.db"))
        self.assertRaisesRegex(TypeError, "custom runner", pickle.dumps, queue)

    def test_a_closed_broker_says_so(self) -> None:
        broker, queue = self.b, self.q
        queue.write("x")
        queue.close()  # which does not close the broker
        self.assertEqual(broker.queue("q").count(), 1)
        broker.close()
        broker.close()
        for act in (
            broker.queues, broker.vacuum, broker.status, broker.transaction, broker.delete_all, broker.waiter,
            broker.delete_database, queue.read, queue.peek, lambda: list(broker.dump()), lambda: queue.write("x"),
        ):  # fmt: skip
            self.assertRaisesRegex(UsageError, "closed: make a new one", act)
        self.assertBodies(self.queue(), ["x"])

    def test_peek_all_misses_nothing_while_rows_are_deleted(self) -> None:  # trap 6
        ids = self.q.write_many(map(str, range(5000)))
        seen = []
        for message in self.q.peek_all():
            seen.append(message.id)
            if message.id == ids[500]:
                self.q.read_many(400)  # behind it
            if message.id == ids[1000]:
                self.q.move_many("d", 1500, after=ids[2000])  # before it
            if message.id % 7 == 0:
                self.q.delete(message_id=message.id)
        moved = {message.id for message in self.b.queue("d").peek_all()}
        self.assertEqual([id for id in seen if id not in moved], [id for id in ids if id not in moved])
        self.assertEqual(seen, sorted(set(seen)))

    @unittest.skipIf(sys.implementation.name == "pypy", "needs CPython: PyPy closes no generator at its end")
    def test_read_all_that_is_broken_off_by_the_end_of_a_script_ends_at_once(self) -> None:
        """Case 5, trap 30: and the message is given back."""
        queue = self.queue()
        queue.write_many(["a", "b", "c"])
        code = """
            from simplebroker import Queue
            messages = Queue("q", "test.db").read_all()
            print(next(messages), flush=True)
        """
        for number in range(3):
            child = self.python(code, stderr=subprocess.PIPE)
            self.assertEqual((child.communicate(timeout=DEADLINE_S), child.returncode), ((b"a\n", b""), 0))
            expected = [("ready", number + 1), ("ready", 0), ("ready", 0)]
            self.assertEqual([(message.state, message.attempt) for message in queue.peek_all(held=True)], expected)

    def test_a_fork_inside_read_all_leaves_the_leases_to_the_parent(self) -> None:
        queue = self.queue()
        queue.write_many(["a", "b", "c", "d"])
        messages: Any = queue.read_all()
        self.assertEqual([next(messages), next(messages)], ["a", "b"])
        child = self.child(lambda child: (messages.close(), queue.write("of the child")))
        self.assertEqual((child.wait(), queue.stats().leased), (0, 2))
        self.assertEqual(list(messages), ["c", "d", "of the child"])
        self.assertEqual(queue.stats().total, 0)


class WorkTest(CoreTest):
    """Counted in steps of SQLite's machine, and in syncs, so that nothing depends on the machine of the test."""

    def opened(self, name: str) -> tuple[Broker, PlainRunner, Clock]:
        runner, clock = self.plain_runner(self.dir / name), Clock()
        runner.connection.execute("PRAGMA synchronous = OFF")
        return Broker(runner=runner, clock=clock), runner, clock

    @staticmethod
    def steps(runner: PlainRunner, act: Callable[[], object]) -> int:
        """How many times ten steps of SQLite's machine an operation takes."""
        ticks: list[None] = []
        runner.connection.set_progress_handler(lambda: ticks.append(None), 10)
        act()
        runner.connection.set_progress_handler(None, 0)
        return len(ticks)

    def test_the_work_of_an_operation_does_not_grow_with_the_depth_or_with_other_queues(self) -> None:
        """And what becomes due elsewhere at once stalls nobody (case 9, trap 32)."""

        def measure(depth: int) -> dict[str, int]:
            broker, runner, clock = self.opened(f"{depth}.db")
            queue, empty = broker.queue("q"), broker.queue("empty")
            ids = queue.write_many(["ready"] * depth)
            for name in ("q", "other"):
                broker.queue(name).write_many(["held"] * depth, delay=3600)
                broker.queue(name + ".2").write_many(["ready"] * depth)
            broker.queue("due").write_many(["due"] * depth, delay=5)
            leased: Any = queue.lease(60)
            clock.ns += 6 * NS
            middle, last = ids[depth // 2], ids[-1]
            acts: dict[str, Callable[[], object]] = {
                "write": lambda: queue.write("x"), "read": queue.read, "peek": queue.peek, "pending": queue.has_pending,
                "lease": lambda: queue.lease(60), "move": lambda: queue.move("d"),
                "extend": lambda: queue.extend(leased), "ack": lambda: queue.ack(leased),
                "read by id": lambda: queue.read(message_id=middle), "peek by id": lambda: queue.peek(message_id=last),
                "read after": lambda: queue.read_many(2, after=middle), "peek after": lambda: queue.peek(after=middle),
                "delete by id": lambda: queue.delete(message_id=last), "peek_all": lambda: next(queue.peek_all()),
                "pending after": lambda: queue.has_pending(after=middle),
                "empty read": empty.read, "empty pending": empty.has_pending, "empty lease": empty.lease,
                "empty delete": empty.delete, "empty stats": empty.stats, "empty requeue": empty.requeue,
            }  # fmt: skip
            return {name: self.steps(runner, act) for name, act in acts.items()}

        small, large = measure(100), measure(3000)
        grown = {name: (small[name], large[name]) for name in large if large[name] > 2 * small[name] + 20}
        self.assertEqual(grown, {})

    def test_many_queues_with_a_held_message_each_are_dumped_and_deleted_in_one_walk(self) -> None:
        """Case 8: ten times the queues are ten times the work."""

        def measure(number: int) -> list[int]:
            broker, runner, _ = self.opened(f"{number}.db")
            for name in range(number):
                broker.queue(f"q{name}").write("held", delay=60)
            half = [broker.queue(f"q{name}") for name in range(0, number, 2)]
            acts = (lambda: list(broker.dump()), broker.queues, lambda: [q.delete() for q in half], broker.delete_all)
            return [self.steps(runner, act) for act in acts]

        for few, many in zip(measure(100), measure(1000)):
            self.assertLess(many, 15 * few + 100)

    @unittest.skipUnless(hasattr(os, "fdatasync"), "needs fdatasync")
    def test_one_sync_for_each_operation_that_must_be_durable_and_none_for_the_others(self) -> None:
        """Lease, extend and release may be undone by a power cut; nothing changed, nothing synced."""
        queue: Any = self.queue(settings=Settings(sync_mode="FULL"))
        queue.write_many(["x"] * 50)
        leased = [queue.lease(60) for _ in range(5)]
        durable: tuple[Callable[[], object], ...] = (
            lambda: queue.write("x"), lambda: queue.write_many(["x"] * 100), queue.read, lambda: queue.read_many(5),
            lambda: queue.move("d"), lambda: queue.move_many("d", 5), lambda: queue.ack(leased[0]),
            lambda: queue.dead_letter(leased[1]), queue.requeue, lambda: queue.broker.rename("d", "e"),
            lambda: queue.broker.broadcast("x"), lambda: queue.delete(message_id=leased[2].id),
        )  # fmt: skip
        others: tuple[Callable[[], object], ...] = (
            lambda: queue.extend(leased[3]), lambda: queue.release(leased[3]), lambda: queue.lease(60),
            queue.peek, queue.stats, queue.broker.queues, lambda: queue.read(after=simplebroker.MAX_ID),
            lambda: queue.move("d", after=simplebroker.MAX_ID), queue.broker.queue("none").delete,
            lambda: queue.delete(message_id=1),
        )  # fmt: skip
        counts = []
        for act in (*durable, *others):
            with mock.patch.object(os, "fdatasync", side_effect=os.fdatasync) as sync:
                act()
            counts.append(sync.call_count)
        self.assertEqual(counts, [1] * len(durable) + [0] * len(others))


class LeasesTest(StoppedClockTest):
    def test_a_lease_and_a_delay_last_from_when_they_are_given(self) -> None:
        """Case 10, trap 31: not from when they began to wait for the lock."""
        queue: Any = self.queue()
        queue.write_many(["kept", "next"])
        kept = queue.lease(60)
        acts = (lambda: queue.extend(kept, 60), lambda: queue.lease(60), lambda: queue.write("delayed", delay=60))
        holder = self.holder()
        threads = [threading.Thread(target=act) for act in acts]
        for thread in threads:
            thread.start()
        threads[0].join(0.3)
        self.assertTrue(all(thread.is_alive() for thread in threads))  # they wait until the holder ends
        released = time.time_ns()
        holder.say("end")
        for thread in threads:
            thread.join(DEADLINE_S)
        held = queue.peek_many(9, held=True)
        self.assertEqual((len(held), holder.wait()), (3, 0))
        for message in held:
            self.assertGreater(message.due - released, 60 * NS - 20_000_000, message)

    def test_a_reason_is_one_line_of_at_most_200_characters(self) -> None:
        q = self.q
        q.write("a")
        for attempt, (given, kept) in enumerate((
            ("exit status 3", "exit status 3"), ("two\nlines\r\n\tof text ", "two lines of text"),
            ("x" * 9999, "x" * 200), ("", "x" * 200), (None, "x" * 200), ("\u00e9\u65e5", "\u00e9\u65e5"),
            ("red\x1b[31m", "red?[31m"),
        ), 1):  # fmt: skip
            q.release(q.lease(60), reason=given)
            found = [q.peek(), *q.peek_many(1), *q.peek_all(held=True)]
            self.assertEqual([(message.reason, message.attempt) for message in found], [(kept, attempt)] * 3)
        self.assertEqual(q.lease(60).reason, "red?[31m")  # of the attempt before

    def test_only_what_was_leased_can_be_settled(self) -> None:
        """A peeked message of someone else's lease is no lease."""
        q, id = self.q, self.q.write("a")
        for peeked in (q.peek(), q.lease(60) and q.peek(message_id=id)):
            for act in (q.ack, q.extend, q.release, q.dead_letter):
                self.assertRaisesRegex(ValueError, f"{id} was not leased by you: use lease", act, peeked)
                for bad in ("a", 5, None):
                    self.assertRaisesRegex(TypeError, "give the Message", act, bad)
        self.assertEqual(q.stats()[:3], (0, 1, 0))


# ---------------------------------------------------------------------------------------------------
# Waiting, watchers and crashes.
# ---------------------------------------------------------------------------------------------------


SOON_S = 2.0  # what takes a moment takes less than this, on a loaded machine too
# A consumer that looks by itself once a minute only: what wakes it in time is the notifier, or a mistake.
NOTIFIED_ONLY = Settings(sync_mode="OFF", max_interval_s=60)


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

    @property
    def attempts(self) -> list[tuple[str, int]]:
        return [(str(message), message.attempt) for message, _ in self.calls]

    def reached(self, count: int) -> bool:
        """Wait until it was called that many times."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.calls) >= count, DEADLINE_S)


def descriptors() -> list[str]:
    """What the open file descriptors of this process are; none where the system does not tell."""
    found = []
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return found


@unittest.skipUnless(HAS_FORK, "needs fork and signals")
class ConsumerTest(ForkTest):
    """What tests of consumers share: other connections, other processes, watchers that end with the test."""

    def other(self, name: str = "q") -> Queue:
        """The queue through a connection of its own, as if from another process."""
        return self.queue(name, settings=Settings(sync_mode="OFF", cache_mb=11))

    def writer(self, name: str = "q") -> Child:
        """A process that writes what it is told."""

        def work(child: Child) -> None:
            queue = self.queue(name)
            child.say("ready")
            while text := child.hear():
                queue.write(text)

        child = self.child(work)
        self.assertEqual(child.hear(), "ready")
        return child

    def start(self, handler: Any, name: str = "q", *, db: Any = None, **options: Any) -> QueueWatcher:
        """A watcher in a thread, which is stopped at the end."""
        watcher = QueueWatcher(name, handler, db=db or self.path, **options)
        self.addCleanup(watcher.stop, DEADLINE_S)
        watcher.run_in_thread()
        return watcher

    def assertEnds(self, watcher: QueueWatcher, limit: float = DEADLINE_S) -> None:
        started = time.monotonic()
        watcher.run_in_thread().join(DEADLINE_S)
        self.assertFalse(watcher.run_in_thread().is_alive(), "the watcher goes on")
        self.assertSoon(started, limit)

    def drain(self, handler: Any, name: str = "q", **options: Any) -> QueueWatcher:
        """Let a watcher work until there is nothing to do, or until it stops for another reason."""
        watcher = self.start(handler, name, drain=True, **options)
        self.assertEnds(watcher)
        return watcher

    def pause(self, seconds: float) -> None:
        """Let the others work for a moment."""
        self.assertIsNone(self.queue("nobody-writes-here").read(wait=seconds))

    def assertHandled(self, recorder: Recorder, bodies: list[str]) -> None:
        """The handler gets called with these, in this order, and with nothing else."""
        recorder.reached(len(bodies))
        self.assertEqual(recorder.bodies, bodies)

    def assertSoon(self, since: float, limit: float = SOON_S) -> None:
        self.assertLess(time.monotonic() - since, limit)

    def assertWakes(
        self, recorder: Recorder, write: Callable[[str], object], limit: float, tries: int = 3, idle_s: float = 0.01
    ) -> None:
        """What this function writes gets to the handler, which is idle for so long, within a time (the median)."""
        broker, times = self.broker(), []
        for _ in range(tries):
            self.wait_for(lambda: not broker.queues(), "the watcher to be idle")
            self.pause(idle_s)
            count, written = len(recorder.calls), time.monotonic()
            write("x")
            self.assertTrue(recorder.reached(count + 1), "not woken")
            times.append(recorder.calls[count][1] - written)
        self.assertLess(statistics.median(times), limit)

    def assertLeavesNothing(self, act: Callable[[], object]) -> None:
        """Once it has been done, doing it again leaves no more threads and descriptors than before."""
        act()
        ours = lambda: any(thread.name.startswith("simplebroker") for thread in threading.enumerate())  # noqa: E731
        self.wait_for(lambda: not ours(), "the threads to end")
        before = threading.active_count(), len(descriptors())
        act()
        self.wait_for(lambda: threading.active_count() <= before[0], "the threads to end")
        gc.collect()  # PyPy closes the descriptor of a log when it collects
        self.wait_for(lambda: len(descriptors()) <= before[1], "their descriptors to be closed")

    def sqlite(self, statement: str, *values: object) -> list[Any]:
        """Run a statement as another program does; return the rows."""
        connection = sqlite3.connect(self.path, isolation_level=None)
        with contextlib.closing(connection):
            return connection.execute(statement, values).fetchall()

    def assertSound(self) -> None:
        self.assertEqual(self.sqlite("PRAGMA integrity_check"), [("ok",)])


class WaitingTest(ConsumerTest):
    """read(wait=), lease(wait=) and wait_for_change()."""

    def test_of_many_who_wait_each_gets_one_message_within_its_bounds_and_none_is_missed(self) -> None:
        queue, writer = self.queue(settings=NOTIFIED_ONLY), self.writer()
        bound = queue.write("too old")
        bodies = [str(number) for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            waiting = [pool.submit(take, wait=math.inf, after=bound) for take in (queue.read, queue.lease) * 4]
            for body in bodies:
                writer.say(body)
            self.assertEqual(sorted(str(each.result()) for each in waiting), bodies)
        self.assertBodies(queue, ["too old"])

    def test_what_is_held_wakes_when_its_time_comes_and_not_before(self) -> None:
        """A delay, given before or during the wait; a lease of a dead process; a lease that was shortened."""
        queue, other = self.queue(settings=NOTIFIED_ONLY), self.other()
        self.assertEqual(self.child(lambda child: (queue.write("left behind"), queue.lease(0.3))).wait(), 0)
        started = time.monotonic()
        message = queue.lease(30, wait=DEADLINE_S)
        assert message is not None
        self.assertEqual((message, message.attempt), ("left behind", 2))
        self.assertSoon(started, 0.9)  # who does not know the time looks once a second
        for when in ("before", "during", "lease"):
            with self.subTest(when), ThreadPoolExecutor(1) as pool:
                started = time.monotonic()
                if when == "before":
                    queue.write("later", delay=0.15)
                waiting = pool.submit(queue.read, wait=DEADLINE_S)
                if when == "during":
                    other.write("later", delay=0.15)
                elif when == "lease":
                    queue.extend(message, 0.15)  # makes nothing ready now, so it wakes nobody
                self.assertIsNotNone(waiting.result())
                self.assertGreaterEqual(time.monotonic() - started, 0.15)
                told = when == "before" or (when == "during" and has_inotify() and simplebroker.fcntl is not None)
                self.assertSoon(started, 0.9 if told else SOON_S)

    def test_a_wait_ends_after_its_time_and_not_before_and_does_not_wait_for_a_writer(self) -> None:
        """The queue is empty, and another process is in a long transaction: nothing there is no error."""
        settings = Settings(sync_mode="OFF", max_interval_s=60, busy_timeout_ms=50)
        queue, holder = self.queue(settings=settings), self.holder()
        for take in (queue.read, queue.lease):
            started = time.monotonic()
            self.assertEqual((take(wait=0), take(wait=0.12)), (None, None))
            self.assertGreaterEqual(time.monotonic() - started, 0.12)
            self.assertSoon(started)
        self.assertRaises(OperationalError, queue.read)
        holder.say()
        self.assertEqual(holder.wait(), 0)

    def test_a_change_since_the_last_look_is_seen_and_without_one_the_wait_ends(self) -> None:
        queue = self.queue(settings=NOTIFIED_ONLY)
        queue.count()
        self.assertFalse(queue.broker.wait_for_change(0.05))
        for write in (queue.write, self.other().write):
            with queue.broker.waiter() as waiter:
                write("x")
                self.assertTrue(waiter.wait(0.4))

    def test_loops_and_waits_inside_a_transaction_do_not_stall(self) -> None:
        """The thread that renews leases and looks for changes cannot get in, and must not be waited for."""
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

    def test_waits_that_begin_and_end_at_the_same_time_disturb_nobody_and_leave_nothing(self) -> None:
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        broker = self.broker()

        def come_and_go(_: int) -> None:
            for _ in range(200 * (50 if FULL else 1)):
                with broker.waiter():
                    pass

        def all_at_once() -> None:
            with ThreadPoolExecutor(6) as pool:
                list(pool.map(come_and_go, range(6)))

        self.assertLeavesNothing(all_at_once)


class NotifierTest(ConsumerTest):
    """The promise "Awake": what wakes those who wait, what it has to survive, and that they go on without it."""

    @NEEDS_LOCKS
    @NEEDS_INOTIFY
    def test_whoever_writes_wakes_an_idle_watcher_at_once_whatever_happens_to_the_files(self) -> None:
        recorder, writer = Recorder(), self.writer()
        own, other = self.queue(settings=NOTIFIED_ONLY), self.other()
        events: dict[str, Callable[[], object]] = {
            "there was no database": lambda: self.start(recorder, db=own.broker),
            "a checkpoint": lambda: self.sqlite("PRAGMA wal_checkpoint(TRUNCATE)"),
            "VACUUM": lambda: self.sqlite("VACUUM"),
            "--vacuum": lambda: self.assertRan(self.cli("--vacuum")),
            "the lock file is deleted": Path(f"{self.path}.lock").unlink,
            "--cleanup": lambda: self.assertRan(self.cli("--cleanup")),
            "made again at once": own.broker.delete_database,
        }
        for what, happen in events.items():
            happen()
            for name, write in (("own", own.write), ("other", other.write), ("process", writer.say)):
                with self.subTest(what, by=name):  # half a second or more: found by looking, or never
                    self.assertWakes(recorder, write, 0.3)
        self.assertWakes(recorder, writer.say, 0.02, tries=15, idle_s=0.04)  # as polling every 40 ms would take

    def test_who_cannot_be_notified_or_notifies_nobody_is_found_by_looking(self) -> None:
        """Twice a second where inotify works; elsewhere every BROKER_MAX_INTERVAL. Waiters would look once a second."""
        no_instance = mock.Mock()
        no_instance.inotify_init1.return_value = -1
        no_watch = mock.Mock(wraps=ctypes.CDLL(None, use_errno=True))
        no_watch.inotify_add_watch = mock.Mock(return_value=-1)
        situations = {"no C library": {"side_effect": OSError("none")}, "no instance": {"return_value": no_instance}}
        if has_inotify():
            situations.update({"no watch": {"return_value": no_watch}, "": {"wraps": ctypes.CDLL}})
        writer, other = self.writer(), self.other()
        other.write("0")
        insert = "INSERT INTO messages (id, queue, body) SELECT max(last_id, ?) + 1, 'q', ? FROM meta"
        writers: dict[str, Callable[[str], object]] = {
            "other connection": other.write, "process": writer.say,
            "runner": Queue("q", runner=self.plain_runner()).write,
            "sqlite3": lambda text: self.sqlite(insert, time.time_ns(), text),
        }  # fmt: skip
        for number, (situation, load) in enumerate(situations.items()):
            own, recorder = self.queue(settings=Settings(sync_mode="OFF", cache_mb=20 + number)), Recorder()
            limit = 0.35 if situation else 0.8
            with mock.patch("ctypes.CDLL", **load) as library:
                watcher = self.start(recorder, db=own.broker)
                for name, write in (*writers.items(), ("own", own.write)):
                    with self.subTest(situation, by=name):
                        self.assertWakes(recorder, write, limit, 2)
                watcher.stop(DEADLINE_S)
            self.assertTrue(library.called)

    @NEEDS_INOTIFY
    def test_a_hundred_watchers_share_one_descriptor_and_cost_nothing_when_idle(self) -> None:
        broker, names, recorder = self.broker(settings=NOTIFIED_ONLY), [f"q{n}" for n in range(100)], Recorder()
        self.wait_for(lambda: not any("inotify" in name for name in descriptors()), "earlier notifiers to end")
        for name in names:
            self.start(recorder, name, db=broker)
        for number in (1, 2):
            started = time.monotonic()
            broker.broadcast("burst", queues=names)
            self.assertTrue(recorder.reached(100 * number))
            self.assertSoon(started)
            self.wait_for(lambda: not broker.queues(), "everything to be acknowledged")
        self.assertLessEqual(sum("inotify" in name for name in descriptors()), 1)
        used = time.process_time()
        self.pause(0.5)
        compiles = sys.implementation.name == "pypy"  # meanwhile
        self.assertLess(time.process_time() - used, 0.4 if compiles else 0.1)

    def test_a_fork_while_a_thread_begins_to_wait_leaves_no_lock_held_and_both_sides_awake(self) -> None:
        """Trap 18: the child hung in its first write, with the writer lock held."""
        queue, entered, go = self.queue(), threading.Event(), threading.Event()
        queue.count()

        def load(*_: Any, **__: Any) -> None:
            if not entered.is_set():
                entered.set()
                go.wait(DEADLINE_S)
            raise OSError("no library")

        def work(child: Child) -> None:
            signal.alarm(5)
            queue.write("of the child")
            self.assertEqual(self.queue("back").read(wait=DEADLINE_S), "of the parent")

        with mock.patch("ctypes.CDLL", load), ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(queue.read, wait=DEADLINE_S)
            self.assertTrue(entered.wait(DEADLINE_S))
            child = self.child(work)
            go.set()
            self.assertEqual(waiting.result(), "of the child")
            self.queue("back").write("of the parent")
            self.assertEqual(child.wait(), 0)

    def test_nothing_that_waits_keeps_the_interpreter_from_ending(self) -> None:
        """Trap 30: a watcher, a waiting thread, and waits while it ends, before and after the notifiers have."""
        code = """
            import atexit, math, sys, threading
            atexit.register(lambda: print(queue.read(wait=0.2)))
            from simplebroker import Queue, QueueWatcher
            atexit.register(lambda: print(queue.read(wait=0.2)))
            queue = Queue("q", sys.argv[1])
            threading.Thread(target=Queue("w", sys.argv[1]).read, kwargs={"wait": math.inf}, daemon=True).start()
            QueueWatcher("q", lambda message, timestamp: done.set(), db=sys.argv[1]).run_in_thread()
            done = threading.Event()
            queue.write("a")
            done.wait()
        """
        started = time.monotonic()
        child = self.python(code, str(self.path), stderr=subprocess.PIPE)
        out, err = child.communicate(timeout=DEADLINE_S)
        self.assertEqual((child.returncode, out.split(), err.count(b"Traceback")), (0, [b"None"] * 2, 0))
        self.assertSoon(started, 10)


class LeasesInFlightTest(ConsumerTest):
    """Leases are extended while they are needed, and taken in batches that suit the consumer."""

    def test_leases_are_renewed_while_a_loop_is_slow_and_those_of_closed_queues_fail(self) -> None:
        queue, other, closed = self.queue(), self.other(), []
        for name in ("c1", "c2", "c3", "c4", "c5"):
            with self.queue(name) as left:
                left.write("left")
                closed.append(left.read_all(lease=0.4))
                next(closed[-1])
        queue.write("slow")
        with self.assertLogs("simplebroker"):
            for message in queue.read_all(lease=0.4):
                self.assertIsNone(other.lease(wait=1.0))  # more than two leases long
                self.assertEqual((message, queue.stats().leased), ("slow", 1))
        self.assertEqual(queue.stats().total, 0)
        for iterator in closed:
            self.assertRaises(UsageError, iterator.close)

    def test_a_slow_handler_is_called_once_and_its_watcher_keeps_its_batch_until_it_is_stopped(self) -> None:
        """Then the current message is handled to its end, and the others are given back with no attempt used up."""
        queue, recorder, go = self.queue(), Recorder(), threading.Event()
        queue.write_many(["slow", "b", "c"])
        watcher = self.start(lambda *args: (recorder(*args), go.wait(DEADLINE_S)), lease=0.4, batch_size=3)
        self.assertTrue(recorder.reached(1))
        rival = self.start(recorder, db=self.other().broker)
        self.assertIsNone(self.other().lease(wait=1.0))  # more than two leases long
        rival.stop(DEADLINE_S)
        stopped = time.monotonic()
        watcher.stop(0.05)  # does not wait longer than it is told
        self.assertSoon(stopped)
        self.assertTrue(watcher.run_in_thread().is_alive())
        go.set()
        self.assertEnds(watcher, SOON_S)
        self.assertEqual(recorder.attempts, [("slow", 1)])
        self.assertEqual([(str(m), m.attempt) for m in queue.peek_many(9, held=True)], [("b", 0), ("c", 0)])

    def test_a_watcher_that_watches_again_extends_its_leases_again(self) -> None:
        queue, other, taken = self.queue(), self.other(), []
        watcher = QueueWatcher(queue, lambda *_: taken.append(other.lease(wait=1.0)), lease=0.4, drain=True)
        for body in ("first", "second"):
            queue.write(body)
            watcher.watch()
        self.assertEqual(taken, [None, None])

    def test_batches_grow_while_work_is_fast_and_stay_small_while_it_is_slow_or_heavy(self) -> None:
        sizes: dict[str, list[int]] = {"fast": [], "slow": [], "heavy": []}

        def handler(message: Message, timestamp: int) -> None:
            sizes[message.queue].append(self.queue(message.queue).stats().leased)
            if message.queue == "slow":
                time.sleep(0.11)  # it works

        for name in sizes:
            self.queue(name).write_many(["x" * (600_000 if name == "heavy" else 1)] * (8 if name != "fast" else 100))
            self.drain(handler, name)
        self.assertEqual(sizes["fast"][0], 1)
        self.assertGreaterEqual(max(sizes["fast"]), 4)
        self.assertLessEqual(max(sizes["slow"][2:]), 2)
        self.assertLessEqual(max(sizes["heavy"]), 2)

    def test_a_message_leased_before_is_leased_alone(self) -> None:
        """It may be what killed its consumers; the others must not use up their attempts with it."""
        queue, batches = self.queue(), []
        queue.write_many(["a", "suspect", "b", "c"])
        suspect = queue.lease(message_id=queue.peek_many(2)[1].id)
        assert suspect is not None
        queue.release(suspect)
        self.drain(lambda message, _: batches.append((str(message), queue.stats().leased)), batch_size=10)
        self.assertEqual(batches, [("a", 1), ("suspect", 1), ("b", 2), ("c", 1)])


class QueueWatcherTest(ConsumerTest):
    MODES: ClassVar[dict[str, dict[str, Any]]] = {"lease": {}, "read": {"lease": None}, "peek": {"peek": True}}

    def test_each_mode_sees_all_messages_in_order_within_its_bound_and_removes_them_at_its_time(self) -> None:
        """Trap 11. Leased: after the handler returned. Read: before. Peek: never. A backlog, and what comes."""
        recorders = {mode: Recorder() for mode in self.MODES}
        stored: dict[str, list[int]] = {mode: [] for mode in self.MODES}  # the messages when the handler is called

        def handler(message: Message, timestamp: int) -> None:
            self.assertEqual(timestamp, message.id)
            stored[message.queue].append(self.queue(message.queue).stats().total)
            recorders[message.queue](message, timestamp)

        for mode, expected in (("lease", [5, 4, 3]), ("read", [4, 3, 2]), ("peek", [5, 5, 5])):
            with self.subTest(mode):
                queue, recorder = self.queue(mode), recorders[mode]
                bound = queue.write_many(["old", "bound"])[1]
                queue.write_many(["a", "b", "c"])
                watcher = self.start(handler, mode, after=bound, **self.MODES[mode])
                self.assertHandled(recorder, ["a", "b", "c"])
                self.assertEqual(stored[mode], expected)
                queue.write("d")
                self.assertHandled(recorder, ["a", "b", "c", "d"])
                watcher.stop(DEADLINE_S)
                left = ["old", "bound", "a", "b", "c", "d"] if mode == "peek" else ["old", "bound"]
                self.assertEqual([str(message) for message in queue.peek_many(9, held=True)], left)

    def test_a_message_that_fails_in_peek_is_tried_again_and_passed_only_when_its_attempts_are_used_up(self) -> None:
        """Trap 5. A watcher that stops at a failure has not passed it."""
        queue = self.queue()
        ids = queue.write_many(["bad", "good"])
        for failures, verdict, bodies, position in (
            (2, None, ["bad", "bad", "bad", "good"], ids[1]), (3, None, ["bad", "bad", "bad", "good"], ids[1]),
            (1, False, ["bad"], ids[0] - 1), (1, True, ["bad", "good"], ids[1]),
        ):  # fmt: skip
            with self.subTest(failures=failures, verdict=verdict):
                recorder, decide = Recorder(*[ValueError()] * failures), mock.Mock(return_value=verdict)
                options: dict[str, Any] = {"max_attempts": 3, "backoff": 0.01, "error_handler": decide}
                watcher = self.drain(recorder, peek=True, after=ids[0] - 1, **options)
                self.assertEqual((recorder.bodies, watcher.position), (bodies, position))
                self.assertBodies(queue, ["bad", "good"])

    def test_what_makes_no_sense_is_refused(self) -> None:
        queue = self.queue()
        wrong: list[tuple[type[Exception], dict[str, Any]]] = [
            (TypeError, {"handler": "print"}), (ValueError, {"max_attempts": 0}), (ValueError, {"batch_size": 0}),
            (ValueError, {"backoff": -1}), (ValueError, {"lease": 0}), (ValueError, {"lease": math.nan}),
            (ValueError, {"after": "yesterday"}), (ValueError, {"dead_letter": "no spaces"}),
            (ValueError, {"queue": queue}), (TypeError, {"handler": lambda message: None}),
            (TypeError, {"handler": asyncio.sleep}), (TypeError, {"handler": lambda *_: (yield)}),  # nothing would run
        ]  # fmt: skip
        for error, options in wrong:
            with self.subTest(options), self.assertRaises(error):
                QueueWatcher(**{"queue": "q", "handler": print, "db": self.path, **options})
        with self.assertRaises(ValueError):
            QueueMoveWatcher("q", "q", db=self.path)

    # -- failures

    def test_the_error_handler_decides_and_one_that_fails_decides_nothing(self) -> None:
        """Trap 25, too: a TypeError of the handler is an error like any other."""
        attempts: dict[Any, list[tuple[str, int]]] = {
            True: [("a", 1), ("b", 1)], None: [("a", 1), ("b", 1), ("a", 2)], False: [("a", 1)],
        }  # fmt: skip
        for verdict, expected in attempts.items():
            with self.subTest(verdict=verdict):
                queue, recorder, decide = self.queue(f"q{verdict}"), Recorder(TypeError("why")), mock.Mock()
                decide.return_value = verdict
                queue.write_many(["a", "b"])
                self.drain(recorder, queue.name, error_handler=decide, batch_size=2, backoff=0.01)
                self.assertEqual(recorder.attempts, expected)
                ((error, message, timestamp),) = [call.args for call in decide.mock_calls]
                self.assertEqual((str(error), message, timestamp), ("why", "a", message.id))
                left = [("a", 1), ("b", 0)] if verdict is False else []
                self.assertEqual([(str(message), message.attempt) for message in queue.peek_all()], left)
        handlers: dict[str, Any] = {"default": None, "raises": mock.Mock(side_effect=RuntimeError("second"))}
        silent = type("Silent", (Exception,), {"__str__": lambda self: self.missing})  # says nothing, and is no end
        self.queue("silent").write("a")
        self.drain(Recorder(silent()), "silent", backoff=0, error_handler=lambda *_: None)
        for what, error_handler in handlers.items():
            with self.subTest(what), self.assertLogs("simplebroker", "ERROR") as logs:
                self.queue().write("a")
                recorder = Recorder(ValueError("first"))
                self.drain(recorder, error_handler=error_handler, backoff=0)
                self.assertEqual(recorder.attempts, [("a", 1), ("a", 2)])
                self.assertIn("first", logs.output[0])
                self.assertIn("second" if what == "raises" else "", logs.output[0])

    def test_a_message_whose_attempts_are_used_up_is_dead_lettered_with_the_reason(self) -> None:
        body = "the bytes \u00e4 \n\0 of it"
        for name, attempts, options in (
            ("q.dead", 3, {"backoff": 0}),
            ("bin", 1, {"backoff": 50, "dead_letter": "bin"}),  # without a delay after the last
        ):
            self.queue().write(body)
            recorder = Recorder(*[ValueError("no")] * attempts)
            with self.assertLogs("simplebroker", "WARNING"):
                watcher = self.drain(recorder, max_attempts=attempts, error_handler=lambda *_: None, **options)
            self.assertEqual(recorder.attempts, [(body, number + 1) for number in range(attempts)])
            dead = self.queue(name).peek_many(9)
            self.assertEqual([(str(m), m.attempt) for m in dead], [(body, 0)])
            self.assertEqual((dead[0].reason, watcher.dead_lettered), (f"ValueError: no (attempt {attempts})", 1))

    def test_where_the_name_of_the_dead_letter_queue_is_too_long_the_watcher_ends_and_keeps_nothing(self) -> None:
        """Case 19. At the last attempt, and for a message that killed its consumers. The Queue stays the caller's."""
        for length in (508, 512):
            queue = self.queue("q" * length)
            queue.write_many(["bad", "next"])
            for _ in range(2):
                watcher = QueueWatcher(queue, Recorder(ValueError()), max_attempts=1, batch_size=2)
                with self.subTest(length), self.assertLogs("simplebroker"), self.assertRaises(QueueNameError):
                    watcher.watch()
                self.assertEqual(queue.stats()[:3], (2, 0, 0))

    def test_a_message_that_kills_its_consumers_ends_in_the_dead_letter_queue(self) -> None:
        def work(child: Child) -> None:
            def handler(message: Message, timestamp: int) -> None:
                if message == "poison":
                    os._exit(9)

            logging.disable(logging.CRITICAL)  # of this process
            QueueWatcher("q", handler, db=self.path, lease=0.1, max_attempts=3, drain=True).watch()

        queue = self.queue()
        queue.write_many(["innocent", "poison", "innocent", "innocent"])
        self.assertEqual([self.child(work).wait() for _ in range(4)], [9, 9, 9, 0])
        dead = [(str(message), message.reason) for message in self.queue("q.dead").peek_all()]
        self.assertEqual(dead, [("poison", "lease ended (attempt 3)")])
        self.assertEqual(queue.stats().total, 0)

    def test_a_lease_that_was_lost_is_logged_and_the_rest_of_the_batch_is_handled(self) -> None:
        queue, recorder = self.queue(), Recorder()
        queue.write_many(["taken", "b"])

        def handler(message: Message, timestamp: int) -> None:
            if message == "taken":
                queue.delete(message_id=timestamp)
            recorder(message, timestamp)

        with self.assertLogs("simplebroker", "WARNING"):
            self.drain(handler, batch_size=2)
        self.assertEqual((recorder.bodies, queue.stats().total), (["taken", "b"], 0))

    # -- stop

    def test_a_watcher_that_is_idle_or_pauses_between_attempts_stops_at_once(self) -> None:
        for mode, options in self.MODES.items():
            for way in ("stop", "event", "leave"):
                queue, recorder = self.queue(f"{mode}-{way}"), Recorder(ValueError())
                queue.write("first")
                event = threading.Event()
                options = {**options, "backoff": 50, "stop_event": event if way == "event" else None}
                with self.subTest(mode, way=way), contextlib.ExitStack() as stack:
                    watcher = QueueWatcher(queue, recorder, error_handler=lambda *_: None, **options)
                    stack.enter_context(watcher)
                    self.assertTrue(recorder.reached(1))
                    self.wait_for(lambda queue=queue: not queue.stats().leased)  # type: ignore[misc]
                    self.assertRaises(RuntimeError, watcher.watch)  # one thread at a time
                    {"stop": watcher.stop, "event": event.set, "leave": stack.close}[way]()
                    self.assertEnds(watcher, 1.0)

    def test_a_signal_ends_a_watcher_of_the_main_thread_after_the_current_message(self) -> None:
        """(CommandTest sends them to one that is idle.)"""
        queue = self.queue()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):

            def work(child: Child, number: int = number) -> None:
                previous = signal.getsignal(number)
                handler = lambda message, timestamp: (child.say(message), child.hear())  # noqa: E731
                QueueWatcher("q", handler, db=self.path, batch_size=3).watch()
                self.assertEqual(signal.getsignal(number), previous)

            with self.subTest(number.name):
                queue.write_many(["a", "b", "c"])
                child = self.child(work)
                self.assertEqual(child.hear(), "a")
                child.signal(number)
                child.say()
                started = time.monotonic()
                self.assertEqual(child.wait(), 0)
                self.assertSoon(started)
                self.assertEqual([(str(m), m.attempt) for m in queue.read_many(9)], [("b", 0), ("c", 0)])

    def test_nothing_is_left_after_a_stop(self) -> None:
        def run_ten() -> None:
            for _ in range(10):
                recorder = Recorder()
                with QueueWatcher("q", recorder, db=self.path), Queue("q", self.path) as queue:
                    queue.write("x")
                    self.assertHandled(recorder, ["x"])

        self.assertLeavesNothing(run_ten)
        self.assertFalse(Path(f"{self.path}-wal").exists())  # the last connection was closed

    def test_a_database_that_is_busy_for_too_long_does_not_end_the_watcher(self) -> None:
        """What it could not acknowledge comes again when its lease ends, and the rest of the batch is given back."""
        recorder, queue, go = Recorder(), self.queue(), threading.Event()
        queue.write_many(["x", "y"])
        db = self.broker(settings=Settings(sync_mode="OFF", busy_timeout_ms=50))
        self.start(lambda *args: (recorder(*args), go.wait(DEADLINE_S)), db=db, lease=0.5, batch_size=2)
        self.assertTrue(recorder.reached(1))
        holder = self.holder()
        with self.assertLogs("simplebroker", "WARNING") as logs:
            go.set()
            self.wait_for(lambda: any("watcher of" in line for line in logs.output), "the watcher to meet the lock")
        holder.say()
        self.wait_for(lambda: queue.stats().total == 0, "everything to be acknowledged")
        self.assertEqual(sorted(recorder.attempts), [("x", 1), ("x", 2), ("y", 1)])

    def test_the_handlers_print_and_log(self) -> None:
        message = Message('h\u00e9 "x"', 1837025672140161024, "q")
        printed = {
            simple_print_handler: '[1837025672140161024] h\u00e9 "x"\n',
            json_print_handler: '{"message": "h\u00e9 \\"x\\"", "timestamp": "1837025672140161024"}\n',
        }
        for handler, expected in printed.items():
            with contextlib.redirect_stdout(io.StringIO()) as output:
                handler(message, message.id)
            self.assertEqual(output.getvalue(), expected)
        with self.assertLogs("simplebroker", "INFO") as logs:
            logger_handler(message, message.id)
            self.assertIsNone(default_error_handler(ValueError("why"), message, message.id))
        self.assertRegex(str(logs.output), r"INFO:simplebroker.*x.*ERROR:simplebroker.*why")


class QueueMoveWatcherTest(ConsumerTest):
    def test_it_moves_what_is_there_and_what_comes_when_its_handler_returned(self) -> None:
        """Within its bound, with the same ids, and without a handler at once. What it fails on is dead-lettered."""
        queue, done, counts, recorder = self.queue(), self.queue("done"), [], Recorder()

        def handler(message: Message, timestamp: int) -> None:
            counts.append((done.count(), queue.stats().leased))
            recorder(message, timestamp)

        for handle in (None, handler):
            bound = queue.write("old")
            ids = queue.write_many(["a", "b"])
            with QueueMoveWatcher("q", "done", handle, db=self.path, after=bound, batch_size=1):
                self.wait_for(lambda: done.count() == 2)
                ids.append(queue.write("c"))
                self.wait_for(lambda: done.count() == 3)
            self.assertEqual([(m.id, m.attempt) for m in done.read_many(9)], [(id, 0) for id in ids])
            self.assertEqual(queue.read_many(9), ["old"])
        self.assertEqual((recorder.bodies, counts), (["a", "b", "c"], [(0, 1), (1, 1), (2, 1)]))
        queue.write_many(["bad", "good"])
        fails = Recorder(*[ValueError()] * 2)
        with self.assertLogs("simplebroker"):
            QueueMoveWatcher("q", "done", fails, db=self.path, max_attempts=2, backoff=0, drain=True).watch()
        self.assertEqual((self.queue("q.dead").peek_many(9), done.peek_many(9)), (["bad"], ["good"]))

    def test_heavy_messages_are_moved_few_at_a_time(self) -> None:
        """So that other writers do not wait for long, and the memory is not full of bodies."""
        self.queue().write_many(["x" * 600_000] * 8)
        sizes, move_many = [], Queue.move_many

        def move(*args: Any, **options: Any) -> list[Message]:
            batch = move_many(*args, **options)
            sizes.append(len(batch))
            return batch

        with mock.patch.object(Queue, "move_many", move):
            QueueMoveWatcher("q", "done", db=self.path, drain=True).watch()
        self.assertEqual((max(sizes), sum(sizes), self.queue("done").count()), (2, 8, 8))


class KillTest(ConsumerTest):
    """Processes that note what they do, and are killed while they do it."""

    def note(self, name: str = "report", width: int = 64) -> Callable[[str], object]:
        """Append lines to a file, whole or not at all: Linux cuts the write of a killed process at the end of a page of
        the file, and the width divides a page."""
        fd = os.open(self.dir / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        return lambda line: os.write(fd, line.encode().ljust(width - 1) + b"\n")

    def notes(self, pattern: str = "report") -> list[list[str]]:
        return [line.split() for file in self.dir.glob(pattern) for line in file.read_text().splitlines()]

    def kill(self, child: Child) -> None:
        child.signal(signal.SIGKILL)
        self.assertEqual(child.wait(), -signal.SIGKILL)


class CrashTest(KillTest):
    """Real processes that are killed, stopped and forked."""

    def work(self, name: str) -> None:
        """Do everything, again and again, and note it before or after, until killed."""
        note, broker = self.note(width=128), Broker(self.path)
        queue, dest = broker.queue(f"in-{name}"), broker.queue(f"out-{name}")
        bodies = iter(lambda: f"{name}-{time.monotonic_ns()}-" + "x" * random.randrange(2000), None)
        line = '{"type": "message", "queue": "loaded", "body": "%s", "id": %d}'
        while True:
            body = next(bodies)
            note(f"wrote {name} {queue.write(body)} {body[:40]}")
            group = [next(bodies) for _ in range(3)]
            for id, body in zip(queue.write_many(group), group):
                note(f"wrote {name} {id} {body[:40]}")
            for message in queue.move_many(dest.name, 2):
                note(f"moved {name} {message.id}")
            first: Any = queue.peek()
            note(f"taking {name} {first.id}")
            if queue.read(message_id=first.id):
                note(f"took {name} {first.id}")
            leased: Any = dest.lease(30)
            note(f"taking {name} {leased.id}")
            dest.extend(leased, 60)
            dest.ack(leased)
            note(f"took {name} {leased.id}")
            leased = queue.lease(30)
            queue.release(leased, delay=random.choice([None, 30]))
            base, title = random.randrange(1, 2**50), next(bodies)[:40]
            broker.load([HEADER, *(line % (title, base + number) for number in range(5))])
            note(f"loaded {name} {title}")

    def test_kill_at_random_moments_loses_and_doubles_nothing(self) -> None:
        rounds = 100 if FULL else 10  # two processes are killed in each
        for number in range(rounds):
            before = len(self.notes())
            children = [self.child(lambda child, name=name: self.work(name)) for name in "ab"]
            if number % 2:  # else they may be killed while they open the database
                self.wait_for(lambda: len(self.notes()) > before)
            self.pause(random.uniform(0.01, 0.1))
            for child in children:
                self.kill(child)
        self.assertSound()
        rows = self.sqlite("SELECT id, queue, substr(body, 1, 40) FROM messages")
        place = {str(id): (queue, body) for id, queue, body in rows}
        report = self.notes()
        self.assertGreaterEqual(len(report), rounds // 2)
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

    def test_killed_workers_of_the_command_line_lose_nothing_and_leave_nothing_stuck(self) -> None:
        """Whatever happens, each message is handled, and none waits longer than its lease."""
        queue, count = self.queue(), 0
        words = ["work", "q", "--lease", "0.5s", "--max-attempts", "1000", "-j", "2"]
        command = ["--", "sh", "-c", 'echo "$(cat)" >> report']
        for _ in range(50 if FULL else 6):
            while queue.stats().total < 40:  # the kill must not come after the last of them
                queue.write(str(count))
                count += 1
            before = len(self.notes())
            worker = self.python("import simplebroker; simplebroker.run_and_exit()", "-f", "test.db", *words, *command)
            self.wait_for(lambda before=before: len(self.notes()) > before)  # type: ignore[misc]
            self.pause(random.uniform(0, 0.03))
            self.reap(worker)
        self.assertGreater(queue.stats().total, 0, "the kills came too late to prove anything")
        started = time.monotonic()
        self.assertRan(self.cli(*words, "--drain", *command))
        self.assertSoon(started, 0.5 + 0.05 * count + SOON_S)  # the lease, and the work
        self.assertEqual({" ".join(words) for words in self.notes()}, {str(number) for number in range(count)})
        self.assertEqual(queue.broker.queues(), {})
        self.assertSound()

    def test_what_a_forked_child_writes_survives_that_its_parent_closes_the_last_connection(self) -> None:
        def work(child: Child) -> None:
            queue.write("2 by the child")
            child.say("written")
            child.hear()  # the parent has closed its connection
            queue.write("3 by the child")

        queue = self.queue()
        queue.write("1 by the parent")
        child = self.child(work)
        self.assertEqual(child.hear(), "written")
        queue.close()
        child.say()
        self.assertEqual(child.wait(), 0)
        self.assertBodies(self.queue(), ["1 by the parent", "2 by the child", "3 by the child"])


class SoakTest(KillTest):
    """Writers, readers, watchers and a vacuum on a deep queue, while one after the other is stopped or killed.

    Nothing is lost; only a kill or the end of a lease delivers a message again; and none is acknowledged twice.
    """

    SECONDS, DEPTH, LEASE_S = 30.0 if FULL else 3.5, 2_000, 3.0
    SETTINGS = Settings(sync_mode="FULL")
    ROLES = ("write",) * 4 + ("read",) * 3 + ("watch",) * 3

    def begin(self, role: str, name: str) -> Child:
        return self.child(lambda child: getattr(self, role)(self.note(f"{name}.soak"), name))

    @staticmethod
    def title(message: str) -> str:
        """What distinguishes a message: who wrote it, and its number."""
        return " ".join(message.split()[:2])

    def write(self, note: Callable[[str], object], name: str) -> None:
        queue = self.queue("load", settings=self.SETTINGS)
        for number in range(10**9):
            if number % 200 == 0:
                self.wait_for(lambda: queue.count() <= self.DEPTH * 1.02)
            queue.write(f"{name} {number} " + "x" * random.randrange(200))
            note(f"wrote {name} {number}")

    def read(self, note: Callable[[str], object], name: str) -> None:
        """Some leases are so short that they end before the acknowledgement."""
        queue = self.queue("load", settings=self.SETTINGS)
        while True:
            message = queue.lease(random.choice([0.001, 0.1, self.LEASE_S]), wait=1)
            if message is not None:
                note(f"got {self.title(message)}")
                try:
                    queue.ack(message)
                    note(f"acknowledged {self.title(message)}")
                except LeaseLost:
                    note(f"lost {self.title(message)}")
            for message in queue.read_all(lease=self.LEASE_S) if random.random() < 0.01 else ():
                if random.random() < 0.01:
                    break  # which gives it back
                note(f"got {self.title(message)}")

    def watch(self, note: Callable[[str], object], name: str) -> None:
        def handler(message: Message, timestamp: int) -> None:
            time.sleep(0.002)  # it works
            note(f"got {self.title(message)}")

        queue = self.queue("load", settings=self.SETTINGS)
        QueueWatcher(queue, handler, lease=self.LEASE_S, max_attempts=10**6).watch()

    def test_nothing_is_lost_and_nothing_doubled_but_by_a_kill_or_the_end_of_a_lease(self) -> None:
        queue = self.queue("load", settings=self.SETTINGS)
        for start in range(0, self.DEPTH, 1000):
            queue.write_many([f"first {number} " + "x" * 100 for number in range(start, start + 1000)])
        running = [(role, self.begin(role, f"{role}{number}")) for number, role in enumerate(self.ROLES)]
        sizes, kills, killed_consumers, stopped = [0, 0], 0, 0, threading.Event()
        ends, vacuum_at = time.monotonic() + self.SECONDS, time.monotonic() + self.SECONDS / 2
        while time.monotonic() < ends:
            self.pause(random.uniform(0, 0.05))
            sizes = [max(size, os.path.getsize(f"{self.path}{end}")) for size, end in zip(sizes, ("", "-wal"))]
            if time.monotonic() >= vacuum_at:
                vacuum_at = math.inf
                queue.broker.vacuum()
            role, child = running.pop(random.randrange(len(running)))
            if random.random() < 0.7:
                child.signal(signal.SIGSTOP)
                stopped.wait(random.choice([0.001, 0.02, 0.15]))  # a reader might wait for who is stopped in a commit
                child.signal(signal.SIGCONT)
            else:
                self.kill(child)
                kills, killed_consumers = kills + 1, killed_consumers + (role != "write")
                child = self.begin(role, f"{role}k{kills}")
            running.append((role, child))
        for role, child in running:
            self.kill(child)
            killed_consumers += role != "write"
        started = time.monotonic()
        self.wait_for(lambda: not queue.stats().leased, "the leases to end")
        self.assertSoon(started, self.LEASE_S + SOON_S)
        rest = [self.title(message) for message in queue.read_many(10**6)]
        noted: dict[str, Counter[str]] = {what: Counter() for what in ("wrote", "got", "acknowledged", "lost")}
        for what, *title in self.notes("*.soak"):
            noted[what][" ".join(title)] += 1
        got, acknowledged = noted["got"] + Counter(rest), noted["acknowledged"]
        first = {f"first {number}" for number in range(self.DEPTH)}
        self.assertEqual((noted["wrote"].keys() | first) - got.keys(), set())
        self.assertEqual([title for title, count in acknowledged.items() if count > 1], [], "acknowledged twice")
        self.assertEqual(acknowledged.keys() & rest, set(), "acknowledged, and there again")
        # Each that was killed was handling one message.
        self.assertLessEqual(sum(got.values()) - len(got), killed_consumers + sum(noted["lost"].values()))
        self.assertGreater(min(len(noted["wrote"]), len(acknowledged)), 100)
        self.assertLess(sizes[0], 1000 * self.DEPTH + (1 << 20))
        if simplebroker.fcntl is not None:  # else no checkpoint finds a moment in which nobody reads and writes
            self.assertLess(sizes[1], 2 * sizes[0] + (16 << 20))
        self.assertSound()


# ---------------------------------------------------------------------------------------------------
# Durability: power cuts, a model, killed and stopped processes, interrupts, faults of the disk.
# ---------------------------------------------------------------------------------------------------


POWER_WORKER = """
    import json, os, random, sys
    from simplebroker import Queue

    def report(added=(), removed=()):
        os.write(1, json.dumps([{id: body[:9] for id, body in added}, [message.id for message in removed]]).encode())

    def work(number, rng):
        queue = Queue("q", sys.argv[1])
        for turn in range(int(sys.argv[2])):
            bodies = [f"{number}.{turn:03}." + rng.choice(["", "body" * 20, "large" * 1000])] * rng.choice([1, 1, 1, 2])
            chance = rng.random()
            if chance < 0.6:
                report(added=zip(queue.write_many(bodies), bodies))
            elif chance < 0.8:
                report(removed=queue.read_many(rng.choice([1, 1, 1, 5])))
            elif chance < 0.85:
                queue.move("other")
                report()
            elif message := queue.lease(600):
                if chance < 0.88:
                    queue.release(message)
                else:
                    queue.ack(message)
                    report(removed=[message])

    for number in range(3):
        if not os.fork():
            work(number, random.Random())
            os._exit(0)
    sys.exit(any([os.wait()[1] for number in range(3)]))
"""


@functools.lru_cache(None)
def strace() -> list[str]:
    """The command that traces what a power cut is about; empty if there is none that may be used."""
    calls = "pwrite64,write,ftruncate,fdatasync,fsync,unlink,unlinkat"
    for fast in (["--seccomp-bpf"], []):
        command = ["strace", *fast, "-f", "-y", "-s", "100000", "-e", f"trace={calls}"]
        with contextlib.suppress(OSError):
            if not subprocess.run([*command, "-o", os.devnull, "true"], check=False, capture_output=True).returncode:
                return command
    return []


class DiskFile:
    """What a disk has of one file: what was synced, and the writes since then, of which a power cut leaves any."""

    def __init__(self) -> None:
        self.synced = bytearray()
        self.unsynced: dict[int, tuple[bytes | None, int]] = {}  # data and place, or None and the file's new size
        self.ended: set[int] = set()

    @staticmethod
    def apply(content: bytearray, data: bytes | None, place: int) -> None:
        content.extend(bytes(max(0, place - len(content))))
        content[place : len(content) if data is None else place + len(data)] = data or b""

    def after_cut(self, rng: random.Random | None) -> bytes:
        """The content after a power cut: what was synced; with ``rng`` some of the other writes too, whole or torn."""
        content = bytearray(self.synced)
        for data, place in self.unsynced.values() if rng else ():
            kept = rng.choice([0, 512, 10**6])
            if kept:
                self.apply(content, data and data[:kept], place)
        return bytes(content)


class Disk:
    """The files of a database, as the calls of a trace leave them on the disk."""

    CALL = re.compile(
        r'(?P<name>\w+)\((?:\d+<(?P<file>[^>]*)>|[^"]*"(?P<path>[^"]*)")'
        r'(?:, "(?P<data>.*)", \d+)?(?:, (?P<number>\d+))?'
    )

    def __init__(self, database: Path) -> None:
        self.files = {f"{database}{suffix}": DiskFile() for suffix in ("", "-wal", "-journal")}
        self.running: dict[str, tuple[int, re.Match[str]]] = {}
        self.syncing: dict[int, tuple[DiskFile, list[int]]] = {}

    def reports(self, trace: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Follow the trace; yield the process and the content of each report, at the time it is made.

        A write may be on the disk when it begins. A sync covers the writes that ended before it began.
        """
        for number, line in enumerate(trace):
            process, text = line.split(maxsplit=1)
            call = self.CALL.match(text)
            if call:
                self.running[process] = (number, call)
                if text.startswith("write(1<"):
                    yield process, json.loads(ast.literal_eval('"' + call["data"] + '"'))
                elif (call["file"] or call["path"]) in self.files:
                    self.begin(number, call)
            if process in self.running and not text.rstrip().endswith("<unfinished ...>"):
                self.end(*self.running.pop(process))

    def begin(self, number: int, call: re.Match[str]) -> None:
        file = self.files[call["file"] or call["path"]]
        if call["name"] == "write":
            raise unittest.SkipTest("needs an SQLite that was built with -DUSE_PREAD (case 76)")
        if call["name"] in ("pwrite64", "ftruncate"):
            data = call["data"] and ast.literal_eval('b"' + call["data"] + '"')
            file.unsynced[number] = data, int(call["number"])
        elif call["name"] in ("fsync", "fdatasync"):
            self.syncing[number] = file, [each for each in file.unsynced if each in file.ended]

    def end(self, number: int, call: re.Match[str]) -> None:
        if number in self.syncing:
            file, covered = self.syncing.pop(number)
            for each in covered:
                if each in file.unsynced:  # else another sync was quicker
                    file.apply(file.synced, *file.unsynced.pop(each))
        elif call["name"].startswith("unlink") and call["path"] in self.files:
            self.files[call["path"]] = DiskFile()
        elif call["file"] in self.files:
            self.files[call["file"]].ended.add(number)


class PowerCutTest(CoreTest):
    """What a power cut leaves, at each moment at which a process was told that its work is done."""

    def trace(self, mode: str, turns: int) -> list[str]:
        """Three processes work on the database; return the lines of the trace of their calls."""
        if not strace():
            self.skipTest("needs strace, and the right to use it")
        environ = {**self.environ, "BROKER_SYNC_MODE": mode, "BROKER_WAL_AUTOCHECKPOINT": "40"}
        worker = [*PYTHON, "-c", textwrap.dedent(POWER_WORKER), str(self.path), str(turns)]
        command = [*strace(), "-o", "trace", *worker]
        subprocess.run(command, cwd=self.dir, env=environ, check=True, stdout=subprocess.PIPE, timeout=4 * DEADLINE_S)
        return (self.dir / "trace").read_text("ascii").splitlines()

    def left(self, disk: Disk, rng: random.Random | None) -> dict[int, str]:
        """Cut the power, open what is left, and return the beginning of each message."""
        directory = Path(tempfile.mkdtemp(dir=self.dir))
        for name, file in disk.files.items():
            (directory / Path(name).name).write_bytes(file.after_cut(rng))
        path = directory / self.path.name
        with Broker(path, settings=Settings(sync_mode="OFF")) as broker:
            rows = [json.loads(line) for line in broker.dump()]
        with contextlib.closing(sqlite3.connect(path)) as connection:
            self.assertEqual(connection.execute("PRAGMA integrity_check").fetchall(), [("ok",)])
        shutil.rmtree(directory)
        return {int(row["id"]): row["body"][:9] for row in rows[1:]}

    def cuts(self, mode: str, turns: int) -> tuple[int, list[str]]:
        """Cut the power at each report, twice; return the number of reports and what was wrong."""
        rng, disk, wrong = random.Random(), Disk(self.path), []
        trace = self.trace(mode, turns)
        reports = list(Disk(self.path).reports(trace))
        added: dict[int, str] = {}
        removed: set[int] = set()
        for number, (process, (more, less)) in enumerate(disk.reports(trace), 1):
            added.update((int(id), body) for id, body in more.items())
            removed.update(less)
            coming = {other: ids for other, (_, ids) in reversed(reports[number:])}  # may be done, and not reported yet
            doubtful = set().union(*(ids for other, ids in coming.items() if other != process))
            for choice in (None, rng):
                found = self.left(disk, choice)
                lost = {id for id in added.keys() - removed - doubtful if found.get(id) != added[id]}
                if lost or removed & found.keys():
                    wrong.append(f"report {number}: lost {lost}, removed and here again {removed & found.keys()}")
        return len(reports), wrong

    def test_a_power_cut_takes_nothing_back_that_was_reported(self) -> None:
        cuts, wrong = self.cuts("FULL", 450 if FULL else 45)
        self.assertGreaterEqual(cuts, 1000 if FULL else 100)
        self.assertEqual(wrong, [])

    def test_without_the_sync_a_power_cut_loses_messages(self) -> None:
        """NORMAL promises less, so the check must find losses: else it finds nothing anywhere."""
        self.assertNotEqual(self.cuts("NORMAL", 20)[1], [])


class Model:
    """What the queues of a database do, in plain Python: DESIGN.md sections 2 and 3."""

    PROMOTED = 6  # how many messages that are due a claim makes ready at least; the test changes it from 100

    def __init__(self, clock: Clock) -> None:
        self.clock, self.last = clock, 0
        self.rows: dict[int, SimpleNamespace] = {}  # by id

    def write(self, queue: str, bodies: Sequence[str], until: int | None = None) -> list[int]:
        first = max(self.clock.ns & ~0xFFF, self.last + 1)
        held = until if until is not None and until > self.clock.ns else None
        for self.last, body in enumerate(bodies, first):
            row = {"id": self.last, "queue": queue, "body": body, "held": held}
            self.rows[self.last] = SimpleNamespace(**row, attempt=0, lease=None, reason=None)
        return list(range(first, first + len(bodies)))

    def state(self, row: SimpleNamespace) -> str:
        if row.held is None or row.held <= self.clock.ns:
            return "ready"
        return "delayed" if row.lease is None else "leased"

    def stored(self, queue: str, low: int = 0, high: int = simplebroker.MAX_ID) -> list[SimpleNamespace]:
        return [row for id, row in sorted(self.rows.items()) if row.queue == queue and low < id < high]

    def peek(self, queue: str, low: int, high: int, limit: int, *, claim: bool = False) -> list[SimpleNamespace]:
        """What is ready; of what becomes ready only now no more than is promoted, in the order of their times."""
        rows = [row for row in self.stored(queue, low, high) if self.state(row) == "ready"]
        due = sorted((row for row in rows if row.held is not None), key=lambda row: row.held)
        first, late = due[: max(self.PROMOTED, limit)], [row.id for row in due[max(self.PROMOTED, limit) :]]
        for row in first if claim else ():
            row.held = None
        return [row for row in rows if row.id not in late][:limit]

    def read(self, queue: str, low: int, high: int, limit: int) -> list[SimpleNamespace]:
        return [self.rows.pop(row.id) for row in self.peek(queue, low, high, limit, claim=True)]

    def move(self, queue: str, dest: str, low: int, high: int, limit: int) -> list[SimpleNamespace]:
        rows = self.peek(queue, low, high, limit, claim=True)
        for row in rows:
            vars(row).update(queue=dest, attempt=0, lease=None, reason=None)
        return rows

    def stats(self, queue: str) -> Stats:
        states = {row.id: self.state(row) for row in self.stored(queue)}
        ready = [id for id, state in states.items() if state == "ready"]
        counts = Counter(states.values())
        return Stats(len(ready), counts["leased"], counts["delayed"], min(ready, default=None))


class Undone(Exception):
    """Ends a transaction, which must then leave nothing."""


class ModelTest(CoreTest):
    """Thousands of random operations on a database, with a clock that jumps: it does what the model does."""

    NAMES = ("a", "b", "a.dead", "b.dead")
    # What may be done inside a transaction, and what else; as often as it is named.
    INSIDE = """write write write write_many broadcast read peek stats lease lease lease lease end_lease
        end_lease end_lease end_lease move requeue rename error clock clock transaction""".split()
    ANYTHING = [*INSIDE * 3, "delete", "transaction", "transaction", "read_all", "read_all", "reload"]

    def open(self) -> None:
        self.real = Broker(Path(tempfile.mkdtemp(dir=self.dir)) / "model.db", clock=self.clock)
        self.addCleanup(self.real.close)

    def step(self, operations: list[str]) -> None:
        """One operation, with random arguments; it asserts its result."""
        choice = self.rng.choice
        self.name, self.dest = self.rng.sample(self.NAMES, 2)
        self.queue = self.real.queue(self.name)
        self.count, self.limit, self.seconds = choice([0, 1, 4, 15]), choice([1, 3, 250]), choice([0, 0.5, 3, 9])
        self.until, self.reason = self.clock.ns + int(self.seconds * NS), choice([None, "it failed"])
        self.id = choice([*self.model.rows, self.model.last, 1])
        # Filters as arguments, and as strict bounds; then the same or those of one message.
        all_ids, above = ({}, (0, simplebroker.MAX_ID)), ({"after": self.id}, (self.id, simplebroker.MAX_ID))
        self.range, self.bounds = choice([all_ids, above, ({"before": self.id}, (0, self.id))])
        self.one = choice([(self.range, self.bounds), ({"message_id": self.id}, (self.id - 1, self.id + 1))])
        getattr(self, "do_" + choice(operations))()

    def test_random_operations_do_what_the_model_does(self) -> None:
        small = {"MAX_PROMOTED": Model.PROMOTED, "HELD_IDS_AT_ONCE": 3}
        for _ in range(10 if FULL else 1):
            seed = random.randrange(10**6)
            with self.subTest(seed=seed), mock.patch.multiple(simplebroker, **small):
                self.rng, self.clock = random.Random(seed), Clock()
                self.model = Model(self.clock)
                self.leases: list[Message] = []  # what was leased at some time; most of them acknowledged, or lost
                self.open()
                for number in range(4000):
                    self.step(self.ANYTHING)
                    if number % 10 == 0:
                        self.assertContent()

    def assertMessages(self, found: Iterable[Message | None], rows: Iterable[SimpleNamespace]) -> None:
        self.assertEqual(
            [(m.id, str(m), m.queue, m.attempt, m.reason) for m in found if m is not None],
            [(row.id, row.body, row.queue, row.attempt, row.reason) for row in rows],
        )

    def assertContent(self) -> None:
        """Everything: what dump() says, and what peek() shows of what is held."""
        head, *lines = [json.loads(line) for line in self.real.dump()]
        expected = []
        for row in sorted(self.model.rows.values(), key=lambda row: (row.queue, row.id)):
            held_until = row.held and f"{row.held:019}"
            extras = {"held_until": held_until, "attempt": row.attempt, "reason": row.reason}
            line = {"type": "message", "queue": row.queue, "body": row.body, "id": f"{row.id:019}"}
            expected.append({**line, **{name: value for name, value in extras.items() if value}})
        self.assertEqual((int(head["last_ts"]), lines), (self.model.last, expected))
        shown = [(m.id, m.state, m.due) for name in self.NAMES for m in self.real.queue(name).peek_all(held=True)]
        states = ((row, self.model.state(row)) for name in self.NAMES for row in self.model.stored(name))
        self.assertEqual(shown, [(row.id, state, None if state == "ready" else row.held) for row, state in states])

    def do_write(self) -> None:
        body = f'\0\n"\\ \u00e9\U0001f600 {self.id}' * self.rng.choice([0, 1, 1, 200])
        until = self.until + self.rng.choice([-5, 0, 5]) * NS
        until = self.rng.choice([None, until])
        self.assertEqual([self.queue.write(body, until=until)], self.model.write(self.name, [body], until))

    def do_write_many(self) -> None:
        bodies = [f"{number} of {self.count}" for number in range(self.count)]
        ids = self.queue.write_many(bodies, delay=self.seconds or None)
        self.assertEqual(ids, self.model.write(self.name, bodies, self.until))

    def do_broadcast(self) -> None:
        names = sorted({row.queue for row in self.model.rows.values()})
        self.assertEqual(self.real.broadcast("to all"), names)
        for name in names:
            self.model.write(name, ["to all"])

    def do_read(self) -> None:
        filters, bounds = self.one
        self.assertMessages([self.queue.read(**filters)], self.model.read(self.name, *bounds, 1))
        found = self.queue.read_many(self.limit, **self.range)
        self.assertMessages(found, self.model.read(self.name, *self.bounds, self.limit))

    def do_peek(self) -> None:
        found, held = (self.queue.peek_many(self.limit, held=held, **self.range) for held in (False, True))
        self.assertMessages(found, self.model.peek(self.name, *self.bounds, self.limit))
        self.assertMessages(held, self.model.stored(self.name, *self.bounds)[: self.limit])
        one = self.queue.peek(message_id=self.id)
        self.assertMessages([one], self.model.stored(self.name, self.id - 1, self.id + 1))

    def do_stats(self) -> None:
        stats = {name: self.model.stats(name) for name in self.NAMES}
        self.assertEqual(self.queue.stats(), stats[self.name])
        self.assertEqual(self.queue.count(), stats[self.name].ready)
        self.assertEqual(self.queue.has_pending(**self.range), bool(self.model.peek(self.name, *self.bounds, 1)))
        self.assertEqual(self.real.queues(), {name: each for name, each in stats.items() if each.total})

    def do_lease(self) -> None:
        filters, bounds = self.one
        message = self.queue.lease(self.seconds, **filters)
        rows = self.model.peek(self.name, *bounds, 1, claim=True)
        for row in rows:
            vars(row).update(attempt=row.attempt + 1, lease=message and message.lease, held=self.until)
            self.leases.append(message)
        self.assertMessages([message], rows)

    def do_end_lease(self) -> None:
        """By its holder, or by one whose lease was lost, whatever the queue is called by now."""
        message = self.rng.choice(self.leases[-8:] or [None])
        if message is None or message.queue == self.dest:
            return
        row = self.model.rows.get(message.id) or SimpleNamespace(lease=None, reason=None)
        queue, reason = self.real.queue(message.queue), self.reason
        ended = {"lease": None, "reason": reason or row.reason, "held": None}
        act, change = self.rng.choice([
            (lambda: queue.ack(message), {}),
            (lambda: queue.extend(message, 9), {"held": self.clock.ns + 9 * NS}),
            (lambda: queue.release(message, reason=reason), ended),
            (lambda: queue.release(message, delay=4, reason=reason), {**ended, "held": self.clock.ns + 4 * NS}),
            (lambda: queue.dead_letter(message, self.dest, reason=reason), {**ended, "queue": self.dest, "attempt": 0}),
        ])  # fmt: skip
        if row.lease != message.lease:
            self.assertRaises(LeaseLost, act)
        else:
            act()
            vars(row).update(change)
            if not change:
                del self.model.rows[row.id]

    def do_move(self) -> None:
        filters, bounds = self.one
        self.assertMessages([self.queue.move(self.dest, **filters)], self.model.move(self.name, self.dest, *bounds, 1))
        moved = self.queue.move_many(self.dest, self.limit, **self.range)
        self.assertMessages(moved, self.model.move(self.name, self.dest, *self.bounds, self.limit))

    def do_requeue(self) -> None:
        number = self.queue.requeue(self.dest, self.limit, **self.range)
        self.assertEqual(number, len(self.model.move(self.dest, self.name, *self.bounds, self.limit)))

    def do_rename(self) -> None:
        rows = self.model.stored(self.name)
        self.assertEqual(self.real.rename(self.name, self.dest), len(rows))
        for row in rows:
            row.queue = self.dest

    def do_delete(self) -> None:
        rows = self.model.stored(self.name, *self.one[1])
        self.assertEqual(self.queue.delete(**self.one[0]), len(rows))
        for row in rows:
            del self.model.rows[row.id]

    def do_error(self) -> None:
        """What fails changes nothing, also in the middle of a transaction."""
        self.assertRaises(MessageError, self.queue.write_many, ["one", "\ud800"])
        if self.id in self.model.rows:
            lines = [{"type": "message", "queue": "a", "body": "twice", "id": id} for id in (2, self.id)]
            self.assertRaises(IntegrityError, self.real.load, [HEADER, *map(json.dumps, lines)])

    def do_clock(self) -> None:
        self.clock.ns += self.rng.choice([0, 1, 4096, NS, 5 * NS, 20 * NS, -3 * NS, -20 * NS])

    def do_transaction(self) -> None:
        """Transactions nest; what is undone leaves nothing, and what surrounds it goes on."""
        before = self.model.last, {id: SimpleNamespace(**vars(row)) for id, row in self.model.rows.items()}
        try:
            with self.real.transaction():
                for _ in range(self.rng.randrange(4)):
                    self.step(self.INSIDE)
                if self.rng.random() < 0.5:
                    raise Undone
        except Undone:
            self.model.last, self.model.rows = before

    def do_read_all(self) -> None:
        """To its end, or broken off: what was in the hands of the loop counts as an attempt, the rest does not."""
        due = sum(row.held is not None for row in self.model.peek(self.name, *self.bounds, 10**6))
        count = self.count if self.count and due <= Model.PROMOTED else 10**6  # many come in the order of their times
        rows = self.model.peek(self.name, *self.bounds, 10**6, claim=True)
        iterator = self.queue.read_all(**self.range)
        found = [(m.id, str(m), m.attempt) for _, m in zip(range(count), iterator)]
        iterator.close()
        self.assertEqual(sorted(found), [(row.id, row.body, row.attempt + 1) for row in rows[:count]])
        for row in rows[:count]:
            del self.model.rows[row.id]
        if count <= len(rows):  # the last of them is given back
            row = rows[count - 1]
            vars(row).update(attempt=row.attempt + 1, lease=None)
            self.model.rows[row.id] = row

    def do_reload(self) -> None:
        """Into another database: what was leased is delayed there, and nobody can acknowledge it."""
        lines = list(self.real.dump())
        self.real.close()
        self.open()
        given = self.rng.choice([lines, [line.encode() + b"\n" for line in lines]])
        self.assertEqual(self.real.load(given), len(self.model.rows))
        for row in self.model.rows.values():
            row.lease = None


class InterruptTest(ForkTest):
    """Ctrl-C or an alarm at any line of any operation, in the main thread, while other threads and processes write."""

    SOURCE = inspect.getsource(simplebroker).splitlines()
    NOT_AT = re.compile(r"\s*(try:|with (?!self\._queue))")
    LOADED = json.dumps({"type": "message", "queue": "work", "body": "loaded", "id": "5"})
    OPERATIONS: ClassVar[dict[str, Callable[[Broker, Queue, Message], object]]] = {
        "write": lambda broker, queue, leased: queue.write("new"),
        "write_many": lambda broker, queue, leased: queue.write_many(["new", "newer"], delay=60),
        "read_many": lambda broker, queue, leased: queue.read_many(2),
        "read and wait": lambda broker, queue, leased: broker.queue("work.none").read(wait=0.001),
        "look": lambda broker, queue, leased: (broker.status(), queue.peek(), *queue.peek_all(held=True)),
        "lease": lambda broker, queue, leased: queue.lease(60),
        "ack": lambda broker, queue, leased: queue.ack(leased),
        "extend": lambda broker, queue, leased: queue.extend(leased, 90),
        "release": lambda broker, queue, leased: queue.release(leased, delay=60, reason="later"),
        "dead_letter": lambda broker, queue, leased: queue.dead_letter(leased, reason="bad"),
        "move": lambda broker, queue, leased: queue.move("work.moved"),
        "move_all": lambda broker, queue, leased: queue.move_all("work.moved"),
        "requeue": lambda broker, queue, leased: queue.requeue(),
        "delete": lambda broker, queue, leased: queue.delete(),
        "broadcast": lambda broker, queue, leased: broker.broadcast("all", pattern="work*"),
        "rename": lambda broker, queue, leased: broker.rename("work", "work.renamed"),
        "load": lambda broker, queue, leased: broker.load([HEADER, InterruptTest.LOADED]),
        "vacuum": lambda broker, queue, leased: broker.vacuum(),
        "transaction": lambda broker, queue, leased: InterruptTest.transaction(broker, queue),
        "close": lambda broker, queue, leased: Queue("work", broker.path).close(),
    }

    @staticmethod
    def transaction(broker: Broker, queue: Queue) -> None:
        with broker.transaction():
            queue.write("first of two")
            with contextlib.suppress(Undone), broker.transaction():
                queue.delete()
                raise Undone
            queue.write("second of two")

    def interrupted(self, act: Callable[[], object], number: int) -> bool:
        """Call act(), with an exception of a signal handler before that line of the module. False if it ended earlier.

        Not where CPython looks for no signals (3.9 does so at the end of a "with"). What it logs is not shown.
        """
        left = number

        def on_line(frame: Any, event: str, argument: object) -> Any:
            nonlocal left
            left -= event == "line" and not self.NOT_AT.match(self.SOURCE[frame.f_lineno - 1])
            if event == "line" and left == 0:
                left -= 1
                raise (KeyboardInterrupt, EOFError)[number % 2]
            return on_line

        ours, before = simplebroker.__file__, sys.gettrace()
        sys.settrace(lambda frame, *_: (lambda *_: on_line) if frame.f_code.co_filename == ours else None)
        logging.disable()
        try:
            with contextlib.suppress(KeyboardInterrupt, EOFError, OperationalError):  # the last: it came in a rollback
                act()
        finally:
            sys.settrace(before)  # that of coverage
            logging.disable(logging.NOTSET)
        return left < 0

    @staticmethod
    def content(broker: Broker) -> list[Any]:
        """What is in the queues that the operation works on, without ids and times."""
        rows = [json.loads(line) for line in broker.dump("work*")][1:]
        return sorted((row["queue"], row["body"], row.get("attempt", 0), "held_until" in row) for row in rows)

    def work(self, child: Child) -> None:
        """Interrupt each operation at each line, or at some; what is left is as before or as after it."""
        sys.unraisablehook = lambda error: None  # where an interrupt in a __del__ ends
        broker, turns = Broker(self.path), Counter()
        queue = broker.queue("work")

        def write_and_read(name: str) -> None:
            while True:
                broker.queue(name).write(name)
                broker.queue(name).read()
                turns[name] += 1
                time.sleep(0.0005)

        def prepare() -> Message:
            for name in broker.queues("work*"):
                broker.queue(name).delete()
            queue.write_many(["leased", "ready", "ready too"])
            broker.queue("work.dead").write("dead")
            return queue.lease(60)

        for name in ("one", "two"):
            threading.Thread(target=write_and_read, args=(name,), daemon=True).start()
        for name, operation in self.OPERATIONS.items():
            leased, whole = prepare(), [self.content(broker)]
            operation(broker, queue, leased)
            whole.append(self.content(broker))
            step = 1 if FULL else 19
            number = random.randrange(1, step + 1)
            while self.interrupted(functools.partial(operation, broker, queue, prepare()), number):
                goal = Counter({each: turn + 2 for each, turn in turns.items()})
                self.wait_for(lambda: not goal - turns, f"threads, after {name}:{number}")
                child.say("write")
                child.hear()
                self.assertIn(self.content(broker), whole, f"{name}, interrupted at line {number}")
                number += step

    def test_an_interrupt_leaves_nothing_locked_and_nothing_half_done(self) -> None:
        """The child is the process with the interrupts; this one writes beside it."""
        child, queue = self.child(self.work), self.queue()
        while child.hear() == "write":
            queue.write("from another process")
            child.say("written")
        self.assertEqual(child.wait(), 0)

    def test_an_interrupt_that_is_caught_inside_a_transaction_leaves_all_of_it_or_nothing(self) -> None:
        queue = self.queue()
        for number in range(1, 60):
            with contextlib.suppress(OperationalError), queue.broker.transaction():
                queue.write("before")
                self.interrupted(lambda: queue.write("interrupted"), number)
                queue.write("after")
            self.assertIn(queue.read_many(3), ([], ["before", "after"], ["before", "interrupted", "after"]))


@unittest.skipUnless(HAS_FORK and hasattr(os, "fdatasync"), "needs fdatasync")
class SyncFaultTest(ForkTest):
    """After the commit the lock is released, and then the log is synced: what may happen there."""

    def setUp(self) -> None:
        super().setUp()
        self.q = self.queue(settings=Settings(sync_mode="FULL"))
        self.q.write_many(["first", "second"])
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.pool = ThreadPoolExecutor()
        self.addCleanup(self.pool.shutdown)
        self.failing = mock.patch("os.fdatasync", side_effect=OSError(5, "Input/output error"))

    def test_a_sync_that_fails_undoes_nothing(self) -> None:
        """read() returns what it removed, and logs; write() raises, and the message is stored (case 70)."""
        with self.failing, self.assertLogs("simplebroker", "WARNING"):
            self.assertEqual(self.q.read(), "first")
        with self.failing, self.assertRaisesRegex(OperationalError, "may not survive"):
            self.q.write("third")
        self.assertBodies(self.q, ["second", "third"])

    def test_after_a_failed_sync_the_log_is_checkpointed_before_anything_is_durable(self) -> None:
        """The kernel forgets what it could not write: a later sync succeeds over the hole (case 71)."""
        later = [lambda: self.q.write("later"), self.q.read, lambda: self.q.write_many(["more"]), self.q.delete]
        for number, act in enumerate(later, 1):
            with self.failing, self.assertRaises(OperationalError):
                self.q.broker.queue("other").write("in the hole")
            act()
            shutil.copy(self.path, self.dir / f"{number}.db")  # without the log
            with Broker(self.dir / f"{number}.db") as broker:
                self.assertEqual(broker.queue("other").count(), number)

    def test_no_sync_is_believed_while_another_fails(self) -> None:
        """The kernel tells of an error once: the sync of another thread succeeds over the same hole (case 71)."""

        def sync(fd: int) -> None:
            if threading.current_thread() is threading.main_thread():
                raise OSError(5, "Input/output error")
            self.inside.set()
            self.go_on.wait(DEADLINE_S)

        with mock.patch("os.fdatasync", sync):
            other = self.pool.submit(self.q.write, "of another thread")
            self.inside.wait(DEADLINE_S)
            self.assertRaises(OperationalError, self.q.write, "of this one")
            self.go_on.set()
            self.assertRaises(OperationalError, other.result, DEADLINE_S)

    def test_what_is_synced_is_the_log_whatever_other_threads_do_meanwhile(self) -> None:
        """They close, reopen or fork between the release and the sync (case 72)."""

        def fork() -> None:
            self.assertEqual(self.child(lambda child: Queue("q", self.path).write("of the child")).wait(), 0)

        def reopen() -> None:
            queue.close()
            with Queue("q", self.path) as other:
                other.write("of another thread")

        def sync(fd: int) -> None:
            if not synced:
                synced.append(os.fstat(fd).st_ino)
                self.pool.submit(act).result(DEADLINE_S)
                synced.append(os.fstat(fd).st_ino)

        self.q.close()
        for act in (fork, lambda: queue.close(), reopen):  # noqa: B007, PLW0108 - both names change in the loop
            synced: list[int] = []
            with Queue("q", self.path, settings=Settings(sync_mode="FULL")) as queue:
                queue.delete()
                number = os.stat(f"{self.path}-wal").st_ino
                with mock.patch("os.fdatasync", sync):
                    queue.write("of this thread")
            self.assertEqual(synced, [number, number])

    def test_an_interrupt_in_the_sync_leaves_other_threads_alone(self) -> None:  # case 73
        def write() -> None:
            with self.q.broker.transaction():
                self.q.write("of another thread")
                self.inside.set()
                self.go_on.wait(DEADLINE_S)

        def interrupt(fd: int) -> None:
            writing.append(self.pool.submit(write))
            self.inside.wait(DEADLINE_S)
            raise KeyboardInterrupt

        writing: list[Any] = []
        with mock.patch("os.fdatasync", interrupt):
            self.assertRaises(KeyboardInterrupt, self.q.write, "interrupted")
        self.go_on.set()
        writing[0].result(DEADLINE_S)
        self.assertBodies(self.q, ["first", "second", "interrupted", "of another thread"])

    def test_a_full_disk_is_an_error_for_all_who_share_the_transaction_and_nobody_runs_twice(self) -> None:  # case 74
        import resource

        def attempt(broker: Broker) -> bool:
            """Threads write, and one of them finds the disk full. Did all fail?"""
            calls, stored, queue = Counter(), [], broker.queue("q")

            def write(number: int) -> None:
                def insert(run: Any) -> None:
                    calls[number] += 1
                    queue.write_many([f"{number}", "B" * (8_000_000 if number == 3 else 10)])

                with contextlib.suppress(OperationalError):
                    broker.transact(insert)
                    stored.append(f"{number}")

            queue.delete()
            resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, resource.RLIM_INFINITY))
            with ThreadPoolExecutor(6) as pool, broker.transaction():  # they wait for it together
                pool.map(write, range(6))
                time.sleep(0.05)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            self.assertEqual(max(calls.values()), 1)
            self.assertEqual(sorted(stored), sorted(message for message in queue.peek_all() if "B" not in message))
            return not stored

        def work(child: Child) -> None:
            with Broker(self.path, settings=Settings(cache_mb=1, sync_mode="OFF")) as broker:
                self.wait_for(lambda: attempt(broker), "all in one transaction")

        self.assertEqual(self.child(work).wait(), 0)


# ---------------------------------------------------------------------------------------------------
# The command line.
# ---------------------------------------------------------------------------------------------------


Done = subprocess.CompletedProcess[bytes]

# DESIGN.md section 8 as data: the operands and the options of each command. Global options go with all.
COMMANDS = {
    "write": ("QUEUE TEXT", "-t --json --delay --lines"),
    "read": ("QUEUE", "--all -n -m --message --after --since --before --json -t --wait"),
    "peek": ("QUEUE", "--all -n -m --message --after --since --before --json -t --wait --held"),
    "move": ("QUEUE DEST", "--all -n -m --message --after --since --before --json -t"),
    "rename": ("QUEUE DEST", ""),
    "requeue": ("QUEUE", "--from -n -m --after --before"),
    "lease": ("QUEUE", "--for --wait"),
    "ack": ("QUEUE LEASE", ""),
    "release": ("QUEUE LEASE", "--delay --reason"),
    "extend": ("QUEUE LEASE", "--for"),
    "dead-letter": ("QUEUE LEASE", "--reason --to"),
    "work": ("QUEUE", "--exact -j -n --timeout --lease --max-attempts --backoff --dead-letter --drain"),
    "watch": ("QUEUE", "--peek --move --json -t --after"),
    "top": ("", "--pattern -p"),
    "list": ("", "--stats --json --pattern -p"),
    "delete": ("QUEUE", "-m --after --before --all"),
    "broadcast": ("TEXT", "--pattern -p --queue"),
    "dump": ("", "--pattern -p"),
    "load": ("", ""),
    "init": ("", ""),
}
ACTIONS = ("--status", "--vacuum", "--cleanup", "--version")


@unittest.skipUnless(HAS_FORK, "needs POSIX processes")
class CommandTest(BrokerTest):
    """The command, on test.db: as a process of its own, in a forked child, in the background, in shells."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
    bin: ClassVar[Path]

    @classmethod
    def setUpClass(cls) -> None:
        place = tempfile.TemporaryDirectory(prefix="broker-bin-")
        cls.addClassCleanup(place.cleanup)
        cls.bin = Path(place.name)
        command = shlex.join([*PYTHON, "-m", "simplebroker"])
        (cls.bin / "broker").write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {command} "$@"\n')
        (cls.bin / "broker").chmod(0o755)

    def setUp(self) -> None:
        super().setUp()
        self.environ.update(BROKER_DEFAULT_DB_NAME="test.db", PATH=f"{self.bin}:{os.environ['PATH']}")

    def queue(self, name: str = "q", bodies: Iterable[str] = (), **options: Any) -> Queue:
        """A queue on the test's database, with these messages added to it."""
        queue = super().queue(name, **options)
        if bodies:
            queue.write_many(list(bodies))
        return queue

    def ids(self, name: str, bodies: Iterable[str]) -> list[str]:
        """Write messages; their ids."""
        return [str(id) for id in self.queue(name).write_many(list(bodies))]

    def run_in_child(self, args: Sequence[str], streams: Sequence[Any], prepare: Callable[[], Any], begun: int) -> None:
        """What a forked child does: the command, in the test's directory and environment. It never returns.

        It writes a byte to ``begun`` when only the command itself runs, and closes it as soon as that has ended:
        signals before or after (while coverage starts or writes its data) say nothing about the command.
        """
        status, leave = 70, os._exit
        try:
            os.chdir(self.dir)
            os.environ.clear()
            os.environ.update(self.environ)
            for number, file in enumerate(streams):
                os.dup2(file.fileno(), number)
            for number in self.SIGNALS:
                signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
            sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False))
            sys.stdout, sys.stderr = (open(fd, "w", 1, encoding="utf-8", closefd=False) for fd in (1, 2))
            sys.argv = ["broker", *args]
            atexit._clear()  # what is registered is the parent's, and what it left to be collected
            getattr(gc, "freeze", int)()  # (PyPy has none)
            warnings.simplefilter("ignore")  # as in the command: unittest shows what an interrupt leaves unclosed
            sys.unraisablehook = lambda it: it.exc_type is KeyboardInterrupt or sys.__unraisablehook__(it)  # in __del__
            prepare()
            os._exit = sys.exit
            os.write(begun, b"!")
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
                simplebroker.run_and_exit()
            except SystemExit as end:
                status = end.code
            signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        except KeyboardInterrupt:  # just before it, or just after
            status = 128 + signal.SIGINT if status == 70 else status
            if simplebroker.__file__ in (text := traceback.format_exc()) and "def run_and_exit" not in text:  # no: in
                traceback.print_exc()
        except BaseException:  # noqa: BLE001 - whatever it is, the test must see it and the child must end
            traceback.print_exc()
        finally:
            os.close(begun)
            leave(status)

    def fork(
        self, *args: str, input: bytes = b"", prepare: Callable[[], object] = int,
        stop: Callable[[int, int], object] = lambda pid, end: None,
    ) -> Done:  # fmt: skip
        """Run the command in a forked child, in a tenth of the time that a new interpreter takes.

        stop(pid, end) is called when it has begun; the descriptor ``end`` is at its end when the command is.
        """
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            streams[0].write(input)
            streams[0].seek(0)
            end, begun = os.pipe()
            stack.callback(os.close, end)
            sys.stdout.flush()
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)  # until the command begins
            pid = os.fork()
            if not pid:
                self.run_in_child(args, streams, prepare, begun)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(begun)
            if os.read(end, 1):
                stop(pid, end)
            if not select.select([end], [], [], 2 * DEADLINE_S)[0]:
                os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            for file in streams:
                file.seek(0)
            return subprocess.CompletedProcess(args, status, streams[1].read(), streams[2].read())

    def assertLines(self, *cases: str | tuple[str, Any] | tuple[str, bytes, int]) -> None:
        """Command lines, run one after the other: each prints nothing with status 0, unless the case says else.

        It says so by what is printed (bytes), the status (int), or that it is refused with these words (str).
        """
        for case in cases:
            line, *expected = [case] if isinstance(case, str) else case
            with self.subTest(command=line):
                done = self.fork(*shlex.split(line))
                if expected and isinstance(expected[0], str):
                    self.assertRefused(done, *expected[0].split())
                else:
                    printed = expected[0] if expected and isinstance(expected[0], bytes) else b""
                    self.assertRan(done, printed, expected[-1] if expected and isinstance(expected[-1], int) else 0)

    def assertRefused(self, done: Done, *words: str) -> None:
        """An error: status 1, one line that has these words, and nothing on standard output."""
        self.assertRan(done, b"", status=1)
        self.assertRegex(done.stderr, rb"\Abroker: error: [^\n]+\n\Z", done.args)
        for word in words:
            self.assertIn(word.lower(), done.stderr.decode().lower(), done.args)

    def start(self, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start the command, with pipes."""
        options = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return self.spawn(*PYTHON, "-m", "simplebroker", *args, **options)

    def finish(self, child: subprocess.Popen[bytes]) -> Done:
        """Wait for a started command and return what it printed since."""
        out, err = child.communicate(timeout=DEADLINE_S)
        return subprocess.CompletedProcess(child.args, child.returncode, out or b"", err or b"")

    def shell(self, script: str) -> Done:
        """Run a shell script in which ``broker`` is the command."""
        options: Any = {"cwd": self.dir, "env": self.environ, "timeout": DEADLINE_S, "stdin": subprocess.DEVNULL}
        return subprocess.run(["sh", "-c", script], check=False, capture_output=True, **options)

    def ends(self, *fds: int) -> tuple[io.FileIO, io.FileIO]:
        """Both ends of a pipe or of something like it, closed at the end unless that was done before."""
        first, second = (io.FileIO(fd, "r+") for fd in fds or os.pipe())
        self.addCleanup(first.close)
        self.addCleanup(second.close)
        return first, second

    def read_until(self, file: Any, enough: Callable[[bytes], object] = lambda data: False, size: int = 65536) -> bytes:
        """Read until what was read is enough, or the end."""
        data, deadline, chunk = b"", time.monotonic() + DEADLINE_S, b"?"
        with contextlib.suppress(OSError):  # a terminal whose other end was closed
            while chunk and not enough(data):
                if not select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    self.fail(f"waited {DEADLINE_S} s; there is {data[-200:]!r}")
                chunk = os.read(file.fileno(), size)
                data += chunk
        return data

    def read_line(self, file: Any) -> bytes:
        """One line; an empty one at the end."""
        return self.read_until(file, lambda data: data.endswith(b"\n"), size=1)

    def assertGoesOn(self, child: subprocess.Popen[bytes], seconds: float) -> None:
        """The process does not end for so long."""
        with self.assertRaises(subprocess.TimeoutExpired):
            child.wait(seconds)

    def everything(self) -> list[str]:
        """The bodies of all messages of the database, held ones too."""
        return [json.loads(line)["body"] for line in list(self.broker().dump())[1:]]

    def sh(self, script: str, *options: str) -> list[str]:
        """The words of a ``work`` that runs a shell script."""
        return ["work", "q", *options, "--", "sh", "-c", script]


class CommandQueue:
    """A Queue whose methods are commands; ``command`` returns the exit status and the lines that one prints."""

    FLAGS: ClassVar[dict[str, str]] = {
        "message_id": "-m", "after": "--after", "before": "--before", "limit": "-n", "delay": "--delay",
        "seconds": "--for", "reason": "--reason", "dest": "--to", "source": "--from",
    }  # fmt: skip

    def __init__(self, command: Callable[..., tuple[int, list[str]]], name: str) -> None:
        self._command, self._name = command, name

    def _run(self, command: str, *args: str, stdin: str = "", statuses: Any = (0, 2), **options: Any) -> Any:
        given = [(self.FLAGS[name], str(value)) for name, value in options.items() if value is not None]
        flags = [word for pair in given for word in pair]
        return self._command(command, self._name, *args, *flags, stdin=stdin, statuses=statuses)

    def _messages(self, *args: str, **options: Any) -> list[Message]:
        """What a command prints; the lease of a message is a text here."""
        status, lines = self._run(*args, **options)
        if status != (0 if lines else 2):
            raise AssertionError(f"{args}: status {status} with {len(lines)} lines")
        return [Message(r.pop("message"), int(r.pop("timestamp")), self._name, **r) for r in map(json.loads, lines)]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """read, read_many and read_all, peek and move likewise; ack, extend, release and dead_letter."""
        command, _, many = name.partition("_")
        if command in ("read", "peek", "move"):
            return functools.partial(getattr(self, f"_{many or 'one'}"), command)
        return functools.partial(self._settle, name.replace("_", "-"))

    def _one(self, command: str, *args: str, **filters: Any) -> Message | None:
        return next(iter(self._messages(command, *args, "--json", **filters)), None)

    def _many(self, command: str, *args: Any, **filters: Any) -> list[Message]:
        return self._messages(command, *args[:-1], "--json", limit=args[-1], **filters)

    def _all(self, command: str, *args: str, held: bool = False, **filters: Any) -> list[Message] | int:
        found = self._messages(command, *args, "--all", "--json", *["--held"] * held, **filters)
        return len(found) if command == "move" else found

    def _settle(self, command: str, message: Any, **options: Any) -> None:
        if self._run(command, message.lease, statuses=(0, 1), **options)[0]:
            raise LeaseLost

    def write(self, body: str, delay: float | None = None) -> int:
        return int(self._run("write", "-", "-t", stdin=body, delay=delay)[1][0])

    def lease(self, seconds: float) -> Message | None:
        return next(iter(self._messages("lease", seconds=seconds)), None)

    def delete(self, **filters: Any) -> bool:
        return self._run("delete", **filters)[0] == 0

    def requeue(self, source: str | None = None, limit: int | None = None) -> int:
        return int("".join(self._run("requeue", source=source, limit=limit)[1]) or 0)


class ContractOfCommandLine(QueueContract, CommandTest):
    """Each operation is a process that runs the command."""

    thorough = False
    DELAY_S = 5.0

    def command(self, *args: str, stdin: str = "", statuses: tuple[int, ...] = (0, 2)) -> tuple[int, list[str]]:
        """The exit status and the lines of the output."""
        done = self.fork(*args, input=stdin.encode())
        self.assertIn(done.returncode, statuses, done)
        self.assertNotIn(b"Traceback", done.stderr)
        return done.returncode, done.stdout.decode().splitlines()

    def b(self) -> Any:
        return self

    def q(self, name: str) -> Any:
        return CommandQueue(self.command, name)

    def queues(self) -> dict[str, tuple[int, ...]]:
        records = map(json.loads, self.command("list", "--json")[1])
        return {record["queue"]: (record["ready"], record["leased"], record["delayed"]) for record in records}

    def rename(self, old: str, new: str) -> bool:
        return self.command("rename", old, new)[0] == 0

    def broadcast(self, body: str, pattern: str | None = None, queues: Sequence[str] = ()) -> bool:
        options = [f"--queue={name}" for name in queues] + [f"--pattern={pattern}"] * (pattern is not None)
        return self.command("broadcast", body, *options)[0] == 0

    def dump(self) -> list[str]:
        return self.command("dump", statuses=(0,))[1]

    def load(self, lines: Iterable[str]) -> None:
        if self.command("load", stdin="".join(f"{line}\n" for line in lines), statuses=(0, 1))[0]:
            raise BrokerError


class CommandLineCasesTest(CommandTest):
    """CASES.md 30 to 47. (32, 36, 38, 39, 44 and 46 are with the commands, their grammar and signals.)"""

    def test_a_message_that_looks_like_options_and_one_that_is_missing_are_refused_with_the_remedy(self) -> None:
        """(cases 30 and 31, trap 38)"""
        self.assertRefused(self.cli("write", "q", "-fast mode", stdin=subprocess.DEVNULL, input=None), "'--'")
        self.assertLines(*((f"write q {text}", f"'{text}' '--'") for text in ("-hello", "-test.db", "-q5", "--fast")))
        self.assertRefused(self.shell("broker write q $UNSET </dev/null"), "empty", "'-'")
        self.assertEqual(os.listdir(self.dir), [])
        self.assertLines("write q -- '-fast mode'", "write q -", "write q ''", "write q --lines")
        self.assertBodies(self.queue(), ["-fast mode", "", ""])

    def test_a_file_that_is_not_ours_is_refused_at_once_by_every_command_and_left_as_it_is(self) -> None:
        """(case 33, traps 17 and 41)"""
        values = {"QUEUE": "q", "DEST": "r", "TEXT": "x", "LEASE": "1700000000000000000.1"}
        lines = [[name, *(values[operand] for operand in spec.split())] for name, (spec, _) in COMMANDS.items()]
        lines += map(str.split, ("read q --wait", "watch q --peek", "write q --lines", *ACTIONS[:3]))
        pypi = "CREATE TABLE meta (key TEXT PRIMARY KEY, value); INSERT INTO meta VALUES ('magic', 'simplebroker-v1')"
        older = "CREATE TABLE meta (singleton, version, last_id); INSERT INTO meta VALUES (1, 1, 0);"
        older += f"PRAGMA application_id = {simplebroker.APPLICATION_ID}"  # our first edition's
        others = ("CREATE TABLE meta (a)", ["test.db"]), ("CREATE TABLE messages (body)", ["test.db"])
        others += (pypi, ["PyPI", "dump", "load"]), (older, ["version 1", "dump"])
        for schema, words in (*others, ("", ["test.db"])):
            self.path.write_bytes(b"" if schema else b"notes, not a database\n" * 300)
            if schema:
                with contextlib.closing(sqlite3.connect(self.path)) as database:
                    database.executescript(schema)
            before = self.path.read_bytes()
            self.assertRefused(self.cli("work", "q", "--drain", "--", "cat", timeout=10), *words)
            for line in lines if schema in ("", pypi) else []:
                line = [*line, "--drain", "-j", "2", "true"] if line[0] == "work" else line
                with self.subTest(command=line, schema=schema):
                    self.assertRefused(self.fork(*line, input=HEADER.encode()), *words)
            self.assertEqual(self.path.read_bytes(), before)

    def test_the_options_of_the_command_of_work_are_its_own(self) -> None:  # case 34
        (self.dir / "w").mkdir()
        self.queue("a", "123")
        self.assertRan(self.cli("work", "a", "-n", "1", "ls", "-d", "w"), b"w\n")
        self.assertLines(("work a -n 1 echo -q --drain -- -f", b"-q --drain -- -f\n"))
        self.assertLines(("work a --drain -- echo -- -h", b"-- -h\n"))
        self.assertEqual((os.listdir(self.dir / "w"), self.everything()), ([], []))

    def test_a_command_that_cannot_be_started_is_an_error_that_tells_why(self) -> None:  # case 35
        self.queue("q", "a")
        for name, mode, text in ("job.sh", 0o644, "#!/bin/sh\n"), ("broken", 0o755, "#!/no/such/interpreter\n"):
            (self.dir / name).write_text(text)
            (self.dir / name).chmod(mode)
        self.assertRefused(self.cli("work", "q", "--drain", "--", "./job.sh"), "permission denied", "job.sh")
        for name in ("./none.sh", "no-such-command", "./broken"):
            self.assertLines((f"work q -j 2 {name}", f"'{name}'"))
        (message,) = self.queue().peek_many(9, held=True)
        self.assertEqual((message.attempt, message.state, message.reason), (0, "ready", None))

    def test_the_command_of_work_finds_the_same_database(self) -> None:  # case 37
        (self.dir / "x" / "below").mkdir(parents=True)
        self.environ.update(BROKER_DEFAULT_DB_NAME="case37.db", BROKER_PROJECT_SCOPE="1")
        names = "$BROKER_DEFAULT_DB_LOCATION $BROKER_DEFAULT_DB_NAME $BROKER_PROJECT_SCOPE"
        self.assertLines("-d x -f p.db write p 1", ("read p", "broker init"))  # there is no case37.db here or above
        script = f'cd /; broker write o "{names}"'
        self.assertRan(self.fork("-d", "x", "-f", "p.db", "work", "p", "--drain", "--", "sh", "-c", script), b"")
        self.assertEqual(os.listdir(self.dir), ["x"])
        self.environ["BROKER_DEFAULT_DB_NAME"] = "p.db"
        self.dir = self.dir / "x" / "below"
        self.assertLines(("read o --all", f"{self.dir.parent} p.db 0\n".encode()))

    def test_the_last_number_of_a_progress_is_what_was_written(self) -> None:  # case 40, trap 40
        for name, interrupted in ("ended", False), ("interrupted", True):
            ours, theirs = self.ends(*os.openpty())
            lines = self.spawn("yes", "line")
            child = self.start("write", name, "--lines", stdin=lines.stdout, stderr=theirs)
            theirs.close()
            shown = self.read_until(ours, lambda data: re.search(rb"\d,\d\d\d", data))
            child.send_signal(signal.SIGINT) if interrupted else lines.kill()
            shown += self.read_until(ours)
            self.assertIn(child.wait(DEADLINE_S), (-signal.SIGINT, 128 + signal.SIGINT) if interrupted else (0,))
            self.assertNotIn(b"Traceback", shown)
            number = int(re.findall(rb"\d[\d,]*", shown)[-1].replace(b",", b""))
            self.assertEqual((number, shown[-1:]), (self.queue(name).count(), b"\n"))

    def test_a_command_that_needs_messages_makes_no_database(self) -> None:  # case 41
        self.assertRan(self.cli("lease", "q"), b"", status=2)
        lines = "read q,peek q,delete q,requeue q,move q r,rename q r,broadcast x"
        self.assertLines(*((line, 2) for line in lines.split(",")), "work q --drain -- true")
        lines = [f"{name} q 1700000000000000000.1" for name in ("ack", "release", "extend", "dead-letter")]
        self.assertLines(*((line, "no database") for line in lines))
        self.assertEqual(os.listdir(self.dir), [])
        self.assertLines("write q x -f 1.db", "init -f 2.db", "broadcast x --queue q -f 3.db")
        self.assertEqual([(self.dir / f"{number}.db").exists() for number in (1, 2, 3)], [True] * 3)

    def test_main_works_where_the_standard_streams_are_not_files_and_nothing_warns(self) -> None:  # cases 22 and 42
        self.environ["PYTHONWARNINGS"] = "error"
        code = """
            import io, sys, simplebroker
            from contextlib import redirect_stdout, redirect_stderr
            given = {"write q -": "é", "write q --lines": "a\\nb\\n"}
            for line in "write q -", "write q --lines", "list", "read q --all", "nonsense", "read q", "write q":
                out, err, sys.stdin = io.StringIO(), io.StringIO(), io.StringIO(given.get(line, ""))
                with redirect_stdout(out), redirect_stderr(err):
                    status = simplebroker.main(line.split())
                print(ascii((status, out.getvalue(), err.getvalue().count("error"))), end=" ", flush=True)
        """
        done = self.finish(self.python(code, stderr=subprocess.PIPE))
        results = (0, "", 0), (0, "", 0), (0, "q: 3\n", 0), (0, "é\na\nb\n", 0), (1, "", 1), (2, "", 0), (1, "", 1)
        self.assertEqual((done.stdout.decode(), done.stderr), ("".join(ascii(each) + " " for each in results), b""))

    def test_a_dump_has_19_digits_in_strings_everywhere_and_its_help_speaks_of_json(self) -> None:
        """(cases 43 and 47, trap 13)"""
        self.assertLines("init", ("dump", HEADER.replace('"0"', f'"{0:019}"').encode() + b"\n"))
        line = '{"type": "message", "queue": "q", "body": "a", "id": 5, "held_until": 9000000000000000001}'
        self.assertRan(self.cli("load", input=f"{HEADER}\n{line}\n".encode()), b"")
        held = json.loads(self.cli("dump").stdout.splitlines()[1])
        self.assertEqual((held["id"], held["held_until"]), (f"{5:019}", "9000000000000000001"))
        self.assertLines((f"peek q -m {5:019} -t", f"{5:019}\ta\n".encode()))
        shown = self.cli("dump", "--help").stdout
        self.assertIn(b"JSON", shown)
        self.assertNotIn(b"json", shown.replace(b"ndjson", b"").replace(b"--json", b"").replace(b".json", b""))

    def test_exclusive_options_and_the_spellings_of_others(self) -> None:  # case 45
        first, second = self.ids("q", "ab")
        for options in (f"-m {first} --all", "-n 1 --all", f"-m {first} -n 1"):
            self.assertLines(*((f"{line} {options}", options[:2]) for line in ("read q", "peek q", "move q r")))
        self.assertLines((f"-d {self.dir} -f {self.path} read q --message {second}", b"b\n"), ("list -p q*", b"q: 1\n"))
        self.assertLines((f"peek q --since {first}", 2), ("peek q --since 1s", b"a\n"))
        self.assertLines("--cleanup", "--cleanup", "--vacuum")
        self.assertEqual(os.listdir(self.dir), [])


class EachCommandTest(CommandTest):
    """The commands, as far as QueueContract does not ask."""

    MESSAGE = '{{"type": "message", "queue": "{}", "body": "{}", "id": "{}"}}'

    def test_write_takes_the_body_from_its_operand_or_from_standard_input_byte_for_byte(self) -> None:
        """An empty body is a message too (trap 39)."""
        bodies = [b"no newline", b"one\n", b"two\n\n", b"", b"\n", b"cr\r\nlf\r", b"\xe2\x82\xac\xe2\x80\xa8", b"--"]
        for number, body in enumerate(bodies):
            self.assertRan(self.fork("write", "stdin", *["-"][: number % 2 or not body], input=body), b"")
            self.assertRan(self.fork("write", "operand", "--", body.decode(), input=b"not this"), b"")
        self.assertBodies(self.queue("operand"), [body.decode() for body in bodies])
        printed = self.fork("peek", "stdin", "--all", "--json").stdout
        self.assertEqual([json.loads(line)["message"].encode() for line in printed.split(b"\n") if line], bodies)
        # Printed plain, each ends in exactly the newline that it has, or in one that is added.
        printed = b"".join(body if body.endswith(b"\n") else body + b"\n" for body in bodies)
        self.assertRan(self.cli("read", "stdin", "--all"), printed)
        lines = [b"-", b"--", b"--cleanup", b" -f x ", b"\t", b'{"type": "header"}', b"\x0b\x0c", b"\0", b"\xc2\x85"]
        self.assertRan(self.fork("write", "lines", "--lines", input=b"\n".join(lines)), b"")
        self.assertBodies(self.queue("lines"), [line.decode() for line in lines])

    def test_write_waits_for_a_slow_producer_and_makes_a_message_of_each_line_as_it_comes(self) -> None:
        """On an input that does not block, "nothing yet" is not its end."""
        for option, blocks in ("--lines", True), ("--lines", False), ("-", False):
            queue, (theirs, ours) = self.queue(f"q{option}{blocks}"), self.ends()
            os.set_blocking(theirs.fileno(), blocks)
            child = self.start("write", queue.name, option, "-t", stdin=theirs)
            ours.write(b"first\nsec")
            printed = self.read_line(child.stdout) if option == "--lines" else b""
            self.assertGoesOn(child, 0.1 if blocks else 0.5)
            self.assertBodies(queue, ["first"] if printed else [])
            ours.write(b"ond\n\ncr\r\nlast")
            ours.close()
            printed += self.finish(child).stdout
            lines = ["first", "second", "", "cr\r", "last"]
            self.assertBodies(queue, lines if option == "--lines" else ["\n".join(lines)])
            self.assertEqual(printed, b"".join(b"%d\n" % message.id for message in queue.peek_all()))

    def test_bodies_that_are_too_long_or_not_utf8_are_refused_and_nothing_is_written(self) -> None:
        """Of several lines, those before the bad one are kept."""
        self.environ["BROKER_MAX_MESSAGE_SIZE"] = "10"
        lines = [["write", "q", "-"], ["write", "q", "--lines"], ["broadcast", "-", "--queue", "q"]]
        for body in ("€€€€€".encode(), b"x" * 11, b"caf\xe9", b"\xed\xa0\x80"):  # 15 bytes; 11; Latin; a surrogate
            word = "BROKER_MAX_MESSAGE_SIZE" if len(body) > 10 else "UTF-8"
            for line in [*lines, ["write", "q", os.fsdecode(body)]]:
                self.assertRefused(self.fork(*line, input=body), word)
            self.assertRefused(self.fork("write", "r", "--lines", input=b"1\n2\n%b\n4\n" % body), "line 3", word)
        for line in [*lines, ["write", "q", "é€€é"]]:  # 10 bytes
            self.assertRan(self.fork(*line, input="é€€é".encode()), b"")
        self.assertBodies(self.queue(), ["é€€é"] * 4)
        self.assertBodies(self.queue("r"), ["1", "2"] * 4)

    def test_write_read_peek_and_move_print_the_three_shapes(self) -> None:
        """Except that a write prints no body, and nothing at all unless it is asked to."""
        text = 'tab\t"quote" \\ é\n'
        for options in ("", "-t", "--json", "-t --json"):
            printed = self.cli("write", "q", text, *options.split()).stdout.decode()
            id = self.queue().peek().id
            written, body = '{{"timestamp": "{}"}}\n', json.dumps(text, ensure_ascii=False)
            self.assertEqual(printed, {"": "", "-t": "{}\n"}.get(options, written).format(id))
            lined = f'{{"message": {body}, "timestamp": "{id}"}}\n'
            expected = {"": text, "-t": f"{id}\t{text}"}.get(options, lined).encode()
            self.assertLines(*((f"{line} {options}", expected) for line in ("peek q", "move q moved", "read moved")))

    def test_peek_held_shows_every_message_and_its_state(self) -> None:
        """Never its lease. What is held is neither read nor moved, also by its id."""
        queue, late = self.queue(), 2_000_000_000_000_000_000
        ids = self.ids("q", ["ready", "leased"])
        queue.lease(3600, message_id=ids[1])
        queue.write("delayed", until=late)
        queue.release(queue.lease(60, message_id=queue.write("failed")), delay=3600, reason="exit status 3")
        self.assertLines(("peek q --all --held", b"ready\nleased\ndelayed\nfailed\n"))
        shown = [json.loads(line) for line in self.cli("peek", "q", "--all", "--held", "--json").stdout.splitlines()]
        self.assertEqual(
            [(each["state"], each["attempt"], each.get("reason"), "lease" in each) for each in shown],
            [("ready", 0, None, False), ("leased", 1, None, False), ("delayed", 0, None, False),
             ("delayed", 1, "exit status 3", False)],
        )  # fmt: skip
        self.assertEqual((shown[0]["due"], len(shown[1]["due"]), shown[2]["due"]), (None, 19, str(late)))
        self.assertLines((f"read q -m {ids[1]}", 2), (f"move q r -m {ids[1]}", 2), (f"peek q -m {ids[1]}", b"leased\n"))

    def test_read_peek_and_lease_wait_for_a_message_that_matches(self) -> None:
        (old,) = self.ids("q", ["old"])
        self.queue("r").write("held", delay=3600)
        # None of these waits, as there is a message. What follows --wait is no time, but the queue (case 44).
        self.assertLines(("peek q --wait", b"old\n"), ("peek --wait q", b"old\n"), ("peek r --held --wait", b"held\n"))
        self.assertLines(*((f"{verb} q --wait 50ms --after {old}", 2) for verb in ("read", "peek")))
        for line in (f"peek q --wait 25 --json --after {old}", "read q --wait -n 5 --json", "lease q --wait"):
            child = self.start(*line.split())
            self.assertGoesOn(child, 0.2)
            self.assertLines("write q hello")
            self.assertRegex(self.finish(child).stdout, rb'\A{"message": "hello", "timestamp": "\d{19}".*}\n\Z')
            self.queue().delete()

    def test_a_lease_is_printed_and_a_lost_or_a_malformed_one_is_refused(self) -> None:
        """(case 46: one that is given back with a delay is delayed, not leased)"""
        (id,) = self.ids("q", ["é"])
        printed = self.cli("lease", "q", "--for", "5m").stdout.decode()
        shape = f'{{"message": "é", "timestamp": "{id}", "attempt": 1, "lease": "{id}\\.\\d+"}}\n'
        self.assertRegex(printed, rf"\A{shape}\Z")
        lease = json.loads(printed)["lease"]
        for bad in ("", "x", "1.1", id, *(f"{id}.{token}" for token in ("", "-1", "1.1", "\u0661"))):
            self.assertRefused(self.fork("ack", "q", bad), "lease")
        self.assertLines(f"extend q {lease} --for 1h", f"release q {lease} --reason 'not\nnow' --delay 1h")
        self.assertEqual(self.queue().peek_many(1, held=True)[0].reason, "not now")
        self.assertLines(("list --stats", b"q: 0 (1 total, 0 leased, 1 delayed)\n"))
        self.assertLines(*((f"{command} q {lease}", id) for command in ("ack", "extend", "release", "dead-letter")))

    def test_list_shows_every_queue_in_three_shapes(self) -> None:
        self.assertLines("list")
        self.queue("b", "123").lease(3600)
        self.queue("a.1", "12")
        for name in ("b", "held"):
            self.queue(name).write("later", delay=3600)
        self.assertRan(self.cli("list"), b"a.1: 2\nb: 2\nheld: 0\n")
        self.assertRan(self.cli("list", "--stats", "-p", "b"), b"b: 2 (4 total, 1 leased, 1 delayed)\n")
        self.assertLines(("list --pattern [!ah]", b"b: 2\n"), ("list -p A*", 2))
        shape = '{{"queue": "b", "ready": 2, "leased": 1, "delayed": 1, "total": 4, "oldest": "{}"}}\n'
        for line in ("list --json -p b", "list --stats --json -p b"):
            self.assertRan(self.cli(*line.split()), shape.format(self.queue("b").peek().id).encode())
        self.assertIn(b'"oldest": null}', self.fork("list", "--json", "-p", "held").stdout)

    def test_dump_prints_a_header_and_then_every_message_and_load_warns_of_aliases(self) -> None:
        (first,), (second, held) = self.ids("b", ["é\n"]), self.ids("a", "xy")
        failed = self.queue("b").write("f", until=2_000_000_000_000_000_000)
        self.queue("a").release(self.queue("a").lease(60, message_id=held), reason="exit status 3")
        lines = self.cli("dump").stdout.decode().splitlines()
        self.assertEqual(lines[:2], [HEADER.replace('"0"', f'"{failed}"'), self.MESSAGE.format("a", "x", second)])
        self.assertEqual(lines[3], self.MESSAGE.format("b", "é\\n", first))
        given_back, delayed = (json.loads(lines[number]) for number in (2, 4))
        self.assertEqual((given_back["attempt"], given_back["reason"]), (1, "exit status 3"))
        self.assertEqual((delayed["held_until"], delayed["id"]), ("2000000000000000000", str(failed)))
        self.assertEqual(self.fork("dump", "-p", "b*").stdout.decode().splitlines(), [lines[0], *lines[3:]])
        done = self.shell("broker dump | tee dump1 | broker load -f copy.db && broker -f copy.db dump | cmp - dump1")
        self.assertRan(done, b"")
        done = self.cli("load", input=f'{HEADER}\n{{"type": "alias", "alias": "old"}}\n'.encode())
        self.assertRan(done, b"")
        self.assertIn(b"alias 'old'", done.stderr)
        self.assertRefused(self.fork("load", input=f"{HEADER}\nnot json".encode()), "line 2")

    def test_status_tells_the_numbers_and_cleanup_deletes_what_belongs_to_the_database_and_nothing_else(self) -> None:
        """(trap 8)"""
        (self.dir / "test.db.txt").write_text("mine")
        self.assertLines(("--status", 2))
        self.queue("q", "123").lease(3600)
        newest = self.queue("r").write("4", delay=3600)
        expected = {"database": str(self.path), "queues": 2, "messages": 4, "ready": 2, "leased": 1, "delayed": 1}
        status = json.loads(self.fork("--status", "--json").stdout)
        self.assertEqual({**status, **expected, "last_ts": str(newest)}, status)
        self.assertIn(b"messages: 4\nready: 2\nleased: 1\ndelayed: 1\n", self.fork("--status").stdout)
        self.assertLines("--cleanup", *((f"{action} -f test.db.txt", "test.db.txt") for action in ACTIONS[:3]))
        self.assertEqual((os.listdir(self.dir), (self.dir / "test.db.txt").read_text()), (["test.db.txt"], "mine"))


class GrammarTest(CommandTest):
    """Options, operands, "--", help and usage errors. Whatever the words are: a documented status, no traceback."""

    # What operands and the values of options are taken from. ID is the id of a message.
    SENSIBLE = {"QUEUE": "q", "DEST": "r", "TEXT": "hello", "LEASE": "ID.1", "-m": "ID", "-p": "*", "--to": "q.dead"}
    WORDS = (
        "q", "r", "q.dead", "-q", "a/b", "x" * 513, "hello", "*", "[", "-", "--", "-5", "\u00e9", "x" * 2000, "", "x",
        "ID", "ID.1", "ID.12345", "ID.", "0" * 19, "9" * 19, "\u0661" * 19, "2024-01-15", "1705314600.5s", "+5",
        "0001-01-01", "1ms", "0.5s", "inf", "99999999d", "1w", ".5", "1e9", "1", "2", "10", "0", "9" * 5000, "\u0663",
        "test.db", "foreign.db", "sub", "../z.db", "\n", "sub/deep/w.db", "no/w.db", "missing", "\udcff", "q\n", "true",
        "--al", "-qt", "--json=", "--all=1", "--help", "--all", "-t", "--drain", "-f", "-d", "-n", "--wait", *ACTIONS,
    )  # fmt: skip

    def test_global_options_go_on_either_side_of_the_command(self) -> None:
        (self.dir / "sub").mkdir()
        self.assertLines(
            "-f x.db -d sub -q write q 0", "write q 1 -f x.db -d sub -q", "-d sub write -f x.db q 2",
            "-f x.db write -d sub -q q -- 3", f"write q 4 -f {self.dir}/sub/x.db",
            ("peek q --all -d sub -f x.db", b"0\n1\n2\n3\n4\n"),
        )  # fmt: skip
        self.assertEqual(os.listdir(self.dir), ["sub"])

    def test_what_follows_two_dashes_is_text(self) -> None:  # trap 9
        texts = ["--", "-h", "--help", "-f", "--version", "-x", "--delay=5", "--cleanup", "-5", "-1.5"]
        self.assertLines(*(f"write q -- {text}" for text in texts), "write -q --delay 0 -- q --status")
        self.assertLines("write -- q --vacuum", "broadcast -- --all")
        self.assertBodies(self.queue(), [*texts, "--status", "--vacuum", "--all"])
        self.assertLines(("read -- q", b"--\n"), ("read -- -q", "queue name"))

    def test_an_option_in_place_of_text_is_an_error_and_deletes_nothing(self) -> None:  # trap 9
        self.queue("q", ["precious"])
        lines = ["write q --clean", "--clean", "--vers", "write q -x", "write q --js", "write q -1.5", "write q -0"]
        lines += [f"{first} {second}" for first in ACTIONS for second in ACTIONS if first != second]
        one = f"-m {1:019}"
        lines += [f"delete {words}" for words in ("", "q --all", "q -m 1", one, f"--all {one}", "--all --before 0")]
        for action in ACTIONS:
            lines += [f"write q {action}", f"write {action} q", f"{action} write q", f"{action} list", f"{action} q"]
            lines += [f"list {action}", f"{action} delete --all"]
        self.assertLines(*((line, "error") for line in lines))
        self.assertEqual(self.everything(), ["precious"])
        self.assertLines("delete --all", ("delete --all", 2))

    def test_misuse_is_one_line_and_status_1_and_makes_no_file(self) -> None:
        id = "1700000000000000000"
        lines = f"""\
            nonsense | help nonsense | write | write q a b | write q --lines text | write q --lines - | write bad/name x
            write '' x | write .q x | write {"q" * 513} x | write q x --delay | write q x --delay soon | write q x --all
            write q x --delay -5 | write q x --delay 1e3 | read | read q r | read q -n 0 | read q -n -1 | read q -n 1.5
            read q -n 2 --all | read q -m 123 | read q -m {id}x | read q --after yesterday | read q --before 2024-13-01
            read q --since | read q --wait soon | read q --lines | read q --held | peek q --for 5 | peek q -n x | move q
            move q r s | move q q | move q r --wait 1 | move q r -n 2 --all | rename q | rename q q | rename q a/b
            requeue | requeue q -n 0 | requeue q --from q | requeue q --from a/b | lease | lease q --for | lease q --all
            lease q --for never | ack q | ack q {id} | ack q {id}. | release q {id}.x | extend q {id}.1 --for x
            dead-letter q | dead-letter q {id}.1 --to q | dead-letter q {id}.1 --to a/b | work | work q | work q --
            work q -j 0 -- true | work q -n 0 -- true | work q --timeout x -- true | work q --max-attempts 0 -- true
            work q --lease x -- true | work q --dead-letter a/b -- true | work q --dead-letter q -- true | work q -- ''
            work q --backoff x -- true | watch | watch q --peek --move r | watch q --move q | watch q --move a/b
            watch q -n 3 | list q | list --pattern | delete | delete q r | delete q --all | broadcast | broadcast a b
            broadcast a --queue a/b | broadcast a --queue q --pattern x | dump q | load q | init q | --status q | -f
            -f '' list | -f ../up.db list | -f a/../b.db list | -d missing write q x | -f :memory: write q x
            -d {self.bin} -f {self.dir}/abs.db list"""
        self.assertLines(*((line, "error") for line in ["''", "write 'q\n' x", *re.split(r"\n| \| ", lines)]))
        self.assertEqual(os.listdir(self.dir), [])

    def test_an_error_names_the_value_and_the_remedy_and_quiet_hides_none(self) -> None:  # case 44, trap 23
        self.assertLines(
            ("wirte read x", "'wirte' mean 'write'"), ("stats list", "'stats'"), ("read q -n 0", "-n '0'"),
            "-f some.db init", ("-q -f some.db ack q x", "'x' ID.TOKEN"), ("-q nonsense", "'nonsense' help"),
            ("-q write q a b", "'b' quote"), ("-q write q --clean", "'--clean' '--'"), ("-q read a/b", "'a/b' letters"),
            ("-q read q --after yesterday", "'yesterday' 2024-01-15"), ("-q work q", "QUEUE CMD"),
            ("-q write q x --delay soon", "'soon' 90s"), ("-q read q -m 12", "'12' 19"),
            ("-q read q -n 1 --all", "-n --all"), ("-q -d missing -f x.db list", "missing create"),
        )  # fmt: skip
        self.environ["BROKER_CACHE_MB"] = "0"
        self.assertLines(("-q list", "BROKER_CACHE_MB '0' megabytes"))

    def test_help_is_complete_and_needs_no_database_and_no_sound_environment(self) -> None:
        self.environ["BROKER_BUSY_TIMEOUT"] = "soon"
        main = self.fork("--help").stdout
        version = f"simplebroker {simplebroker.__version__}\n".encode()
        self.assertLines(("-h", main), ("help", main), ("", main), ("--version", version))
        for word in [*COMMANDS, "-d", "-f", "-q", *ACTIONS, "--json", "Exit status"]:
            self.assertRegex(main.decode(), rf"(?im)(?<![\w-]){re.escape(word)}\b")
        for name, (_, options) in COMMANDS.items():
            shown = self.fork(name, "--help").stdout
            self.assertLines((f"help {name}", shown))
            self.assertRegex(shown.decode(), rf"\Ausage: broker {name} ")
            for option in [*options.split(), "-d", "-f", "-q"]:
                self.assertRegex(shown.decode(), rf"(?m)(?<![\w-]){re.escape(option)}\b", f"{name} --help")
        self.assertEqual(os.listdir(self.dir), [])

    def test_generated_command_lines_end_with_status_0_1_or_2_and_no_traceback(self) -> None:
        seed = int(os.environ.get("TEST_SEED", random.randrange(10**6)))
        rng, seen = random.Random(seed), Counter()
        (self.dir / "sub" / "deep").mkdir(parents=True)
        (self.dir / "foreign.db").write_bytes(b"not a database at all, but long enough to look at" * 20)
        id = self.ids("q", "123")[0]

        def stop(pid: int, end: int) -> None:
            if not select.select([end], [], [], 0.05 if waits else DEADLINE_S)[0]:  # many of these go on for ever
                os.kill(pid, signal.SIGTERM)

        for _ in range(5000 if FULL else 150):
            line = [word.replace("ID", id) for word in self.line(rng)]
            waits = any(word in ("watch", "work") or word.startswith("--wait") for word in line)
            done = self.fork(*line, input=b"line one\nline two\n\xc3\xa9\n", stop=stop)
            about = f"TEST_SEED={seed} {line!r}: {done}"
            self.assertIn(done.returncode, (0, 1, 2, *((128 + 15, -15) if waits else ())), about)
            self.assertNotIn(b"Traceback", done.stderr, about)
            if done.returncode == 1:
                self.assertRegex(done.stderr, rb"\A(.*\n)*broker: error: .+\n\Z", about)
            seen[done.returncode] += 1
        self.assertEqual({0, 1, 2} - set(seen), set(), seed)

    def line(self, rng: random.Random) -> list[str]:
        """A command line: mostly a command with its operands and options, sometimes any words in any order."""
        if rng.random() < 0.15:
            return [rng.choice([*COMMANDS, *self.WORDS]) for _ in range(rng.randrange(6))]
        command = rng.choices(list(COMMANDS), [1 if name in ("work", "watch") else 6 for name in COMMANDS])[0]
        operands, options = (text.split() for text in COMMANDS[command])
        line = [command]
        for name in (*operands, *rng.choices(options or self.WORDS, k=rng.choice([0, 0, 1, 1, 2, 3]))):
            line += [name] * (name not in operands)
            if name in operands or rng.random() < 0.5:
                line.append(self.SENSIBLE.get(name, "1") if rng.random() < 0.7 else rng.choice(self.WORDS))
        if command == "work":
            jobs = ["cat"], ["sh", "-c", "exit 3"], ["no-such-command"], [""], []
            line += [*rng.choice([["--drain"], []]), "--", *rng.choice(jobs)]
        return line if rng.random() < 0.9 else [*line, "--", rng.choice(self.WORDS)]


class SurroundingsTest(CommandTest):
    """Locales, where the file is, standard streams, and other programs."""

    def test_text_passes_unchanged_through_an_ascii_locale(self) -> None:  # trap 3
        self.environ.update(LC_ALL="C", LANG="C", PYTHONIOENCODING="ascii", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
        data = (text := "é € \U0001f600").encode()
        (self.dir / text).mkdir()
        self.assertRan(self.cli("-d", text, "write", "q", text), b"")
        self.assertRan(self.cli("-d", text, "read", "q"), data + b"\n")
        self.assertRan(self.cli("-d", text, "write", "q", "--lines", input=data), b"")
        self.assertIn(data, self.cli("-d", text, "move", "q", "r", "--json").stdout)
        self.assertRan(self.cli("-d", text, "work", "r", "--drain", "--exact", "--", "cat"), data)
        self.assertIn(data, self.cli("-d", text, "--status").stdout)

    def test_the_file_alone_is_enough_as_a_module_as_a_script_and_vendored(self) -> None:
        del self.environ["PYTHONPATH"], self.environ["BROKER_DEFAULT_DB_NAME"]
        (self.dir / "pkg" / "vendor").mkdir(parents=True)
        for place in (self.dir, self.dir / "pkg" / "vendor"):
            shutil.copy(ROOT / "simplebroker.py", place)
        installed = "import sys; from simplebroker import run_and_exit; sys.exit(run_and_exit())"  # a console script
        code = "from pkg.vendor.simplebroker import Queue\nfrom pkg.vendor.simplebroker.ext import SQLRunner\n"
        code += "print(Queue('tasks').read(), SQLRunner.__name__)"
        vendored = ["-m", "pkg.vendor.simplebroker", "read", "tasks"]
        for words, printed, status in (
            (["-m", "simplebroker", "write", "tasks", "1"], b"", 0), (["simplebroker.py", "read", "tasks"], b"1\n", 0),
            (["-c", installed, "write", "tasks", "2"], b"", 0), (vendored, b"2\n", 0), (vendored, b"", 2),
            (["-c", code], b"None SQLRunner\n", 0),
        ):  # fmt: skip
            self.assertRan(self.finish(self.spawn(sys.executable, *words)), printed, status)
        scripts = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[2].splitlines()[1:3]
        self.assertEqual(scripts, [f'{name} = "simplebroker:run_and_exit"' for name in ("broker", "simplebroker")])

    def test_head_takes_twenty_of_many_and_exactly_the_others_remain(self) -> None:  # traps 1 and 2
        self.assertRan(self.shell("seq 1 10000 | broker write n --lines"), b"")
        first = 1
        for load in (0, 2):
            for _ in range(load):
                self.python("while True: pass", stdout=None)
            for command in ["watch n", "read n --all"] * (20 if FULL else 1):
                done = self.shell(f"{{ broker {command}; echo $? >status; }} | head -20")
                self.assertEqual((done.stdout.split(), done.stderr), ([b"%d" % (first + n) for n in range(20)], b""))
                self.assertEqual((self.dir / "status").read_text(), "0\n")
                first += 20
                self.assertEqual(self.queue("n").stats()[:3], (10_001 - first, 0, 0))
        self.assertBodies(self.queue("n"), [str(n) for n in range(first, 10_001)])

    def test_every_command_that_prints_ends_cleanly_when_nobody_reads(self) -> None:  # trap 2
        for name in "qrst":
            self.queue(name, ["x" * 1000] * 100)
        lines = "read q --all,read q,peek r --all,watch q,watch r --peek,watch s --move u,lease t,list,dump,--status"
        reader, writer = self.ends()
        reader.close()
        for line in f"{lines},--version,write --help".split(","):
            with self.subTest(command=line):
                done = self.cli(*line.split(), stdout=writer, stderr=subprocess.PIPE, capture_output=False)
                self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertEqual([self.queue(name).count() for name in "qrstu"], [100, 100, 100, 100, 0])
        streams = {"stdout": writer, "stderr": subprocess.DEVNULL, "capture_output": False}
        for line in ("write v --lines -t", "move r v --all"):  # they do not go on to the end, so they must say so
            done = self.cli(*line.split(), input=b"x\n" * 2000, **streams)
            self.assertEqual((done.returncode, self.queue("v").delete() > 0), (1, True), line)

    def test_output_that_cannot_be_written_is_an_error_and_the_message_stays(self) -> None:
        self.queue("q", "ab")
        takers = "read q,read q --all,peek q,lease q,watch q,list,watch q --peek,watch q --move r,dump,--status"
        for target in ("/dev/full", "&-"):
            lines = [*takers.split(","), "write q d -t", *["--version", "--help"][: 2 * (target == "/dev/full")]]
            stderr = self.shell("\n".join(f"broker {line} >{target}; echo $? >&2" for line in lines)).stderr.decode()
            for line, (error, status) in zip(lines, re.findall(r"((?:.*\n)*?)(\d+)\n", stderr)):
                with self.subTest(command=line, target=target):
                    self.assertEqual(status, "1")
                    self.assertRegex(error, r"\Abroker: error: .+\n\Z")
            self.queue().delete(after=self.queue().peek_many(2)[1].id)  # written, and the disk is full for its id
            self.assertEqual(self.queue().stats()[:3], (2, 0, 0))

    def test_a_stream_that_is_not_needed_may_be_closed_and_one_that_is_needed_is_an_error(self) -> None:
        done = self.shell("broker write q a >&-; echo b | broker write q - >&-; echo c | broker write q --lines >&-")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, b"", b""))
        self.assertRefused(self.shell("broker write q d -t >&-"), "standard output")  # what it could not tell
        done = self.shell("broker write q d <&-; broker work q --drain cat <&-; broker list <&-")
        self.assertRan(done, b"a\nb\nc\nd\n")
        lines = ["write q", "write q -", "write q --lines", "broadcast -", "load"]
        done = self.shell("".join(f"broker {line} <&-; echo $?\n" for line in lines))
        self.assertEqual(done.stdout, b"1\n" * 5)
        self.assertRegex(done.stderr, rb"\A(broker: error: [^\n]*standard input[^\n]*\n){5}\Z")
        self.assertEqual(self.everything(), [])
        lines = ["-f x.db --status 2>&-", "read a/b 2>&-", "read q 2>/dev/full"]
        self.assertRan(self.shell("".join(f"broker {line}; echo $?\n" for line in lines)), b"2\n1\n2\n")

    def test_shell_habits_work(self) -> None:
        """Issue 11: $(...), a while loop, xargs, jq (trap 13); an empty message does not end a loop (trap 39)."""
        self.queue("q", ["one two", "  three", "-n", "a", "", "b"])
        self.assertRan(self.shell('x=$(broker read q); echo "[$x]"'), b"[one two]\n")
        loop = 'while IFS= read -r line; do echo "[$line]"; done'
        self.assertRan(self.shell(f"broker read q -n 1 | {loop}; broker read q"), b"[  three]\n-n\n")
        script = 'while m=$(broker read q); do echo "[$m]"; done; broker read q; echo $?'
        self.assertRan(self.shell(script), b"[a]\n[]\n[b]\n2\n")
        self.assertRan(self.shell("seq 3 | xargs -n1 broker write q; broker read q --all | xargs echo"), b"1 2 3\n")
        if shutil.which("jq"):
            id = self.queue().write('é "x"\n1')
            script = "broker list --json | jq .ready; broker dump | jq -r .type;"
            done = self.shell(f"{script} broker read q --json | jq -r .message,.timestamp")
            self.assertRan(done, f'1\nheader\nmessage\né "x"\n1\n{id}\n'.encode())

    def test_a_parent_may_wait_before_it_reads_and_the_empty_environment_of_cron_is_enough(self) -> None:
        self.environ, line = {"HOME": "/", "PATH": "/usr/bin:/bin"}, f"{self.bin}/broker -f {self.path}"
        script = f"cd /; {line} write q é; {line} work q --drain -- cat; {line} write q x"
        self.assertRan(self.shell(script), "é\n".encode())
        self.environ["PYTHONPATH"] = str(ROOT)
        child = self.start("-f", "test.db", "read", "q")
        self.assertEqual(child.wait(DEADLINE_S), 0)
        self.assertRan(self.finish(child), b"x\n")


class ConsumerCommandsTest(CommandTest):
    """broker watch and broker work."""

    def test_watch_follows_by_id_with_peek_and_moves_what_was_read_with_move(self) -> None:
        ids = self.ids("q", "123")
        watch = self.start("watch", "q", "--peek", "--json", "--after", ids[0])
        self.assertEqual(json.loads(self.read_line(watch.stdout)), {"message": "2", "timestamp": ids[1]})
        self.queue().delete(message_id=ids[1])
        self.assertEqual(json.loads(self.read_line(watch.stdout))["message"], "3")
        move = self.start("watch", "q", "--move", "done")
        self.assertEqual([self.read_line(move.stdout) for _ in range(2)], [b"1\n", b"3\n"])
        for child in (watch, move):
            child.send_signal(signal.SIGINT)
            self.assertRan(self.finish(child), b"")
        self.assertBodies(self.queue("done"), ["1", "3"])

    def test_the_command_gets_what_read_prints_and_the_environment_and_its_success_acknowledges(self) -> None:
        """(case 36: a line has its newline, so that a loop of ``read`` sees it)"""
        bodies = ["no newline", "newline\n", "", "nul\0 é \r\n", "--help"]
        script = 'printf "%s %s %s:" "$BROKER_QUEUE" "$BROKER_MESSAGE_ID" "$BROKER_ATTEMPT"; cat'
        for options, ending in (["--drain"], "\n"), (["--drain", "--exact"], ""):
            ids = self.ids("q", bodies)
            printed = [body + ("" if body.endswith("\n") else ending) for body in bodies]
            done = self.fork(*self.sh(script, *options))
            self.assertRan(done, "".join(f"q {id} 1:{text}" for id, text in zip(ids, printed)).encode())
            self.assertEqual((done.stderr, self.everything()), (b"", []))

    def test_failures_are_retried_with_growing_delays_and_end_in_the_dead_letter_queue(self) -> None:
        """(case 39: the status is 1 then)"""
        self.queue("q", ["bytes\0\r\n"])
        done = self.cli(*self.sh("broker write log x; exit 3", *"--drain --max-attempts 3 --backoff 200ms".split()))
        self.assertRan(done, b"", status=1)
        (message,) = self.queue("q.dead").peek_all()
        self.assertEqual((message, message.reason), ("bytes\0\r\n", "exit status 3 (attempt 3)"))
        first, second, third = (message.id for message in self.queue("log").peek_all())
        self.assertGreater(second - first, 0.2 * NS)
        self.assertGreater(third - second, 0.4 * NS)
        self.assertLess(third - first, (0.6 + SOON_S) * NS)
        self.assertLines(("requeue q", b"1\n"), "work q --drain -- true", "work q --drain -- true", "write q x")
        self.assertRan(self.fork("work", "q", "-n", "1", "--max-attempts", "1", "false"), b"", status=1)
        self.queue("q", ["works at last", "never"])
        script = 'read -r body; test "$body$BROKER_ATTEMPT" = "works at last2" && exit; kill -9 $$'
        options = ("--drain", "-j", "2", "--backoff", "10ms", "--max-attempts", "2", "--dead-letter", "failed")
        self.assertRan(self.fork(*self.sh(script, *options)), b"", status=1)
        (message,) = self.queue("failed").peek_all()
        self.assertRegex(message.reason, r"signal 9 \(attempt 2\)\Z")
        self.assertEqual((message, self.queue().stats().total), ("never", 0))

    def test_so_many_commands_run_at_once_and_are_started_and_not_more(self) -> None:
        queue = self.queue("q", "1234")
        meet = 'touch $BROKER_MESSAGE_ID.run; until [ "$(ls *.run | wc -l)" -eq 4 ]; do sleep 0.01; done'
        self.assertRan(self.fork(*self.sh(meet, "-j", "4", "--drain")), b"")  # ends only if four meet
        self.queue("q", "123456")
        count = "touch $BROKER_MESSAGE_ID.two; sleep 0.05; ls *.two | wc -l; rm $BROKER_MESSAGE_ID.two"
        counts = self.fork(*self.sh(count, "-j", "2", "--drain")).stdout.split()
        self.assertEqual((len(counts), max(counts)), (6, b"2"))
        self.queue("q", "abcdef")
        self.assertLines(("work q -n 2 cat", b"a\nb\n"), ("work q -n 1 -- cat", b"c\n"))
        done = self.fork(*self.sh("read -r body; echo $body", "-j", "4", "-n", "2"))
        self.assertEqual((done.returncode, sorted(done.stdout.split())), (0, [b"d", b"e"]))
        self.assertLines("work q -n 1 false")  # it failed, and is not dead
        (message,) = queue.peek_many(9, held=True)
        self.assertEqual((message.state, message.reason), ("delayed", "exit status 1"))
        spent = self.queue("p", ["spent", "works"])  # what is dead-lettered without a command is none of the -n
        spent.release(spent.lease(60))
        self.assertRan(self.fork("work", "p", "-n", "1", "--max-attempts", "1", "cat"), b"works\n", status=1)

    def test_a_command_fails_also_where_the_end_of_children_is_ignored(self) -> None:
        self.queue("q", "x")
        ignore = functools.partial(signal.signal, signal.SIGCHLD, signal.SIG_IGN)
        self.assertRan(self.finish(self.start("work", "q", "-n", "1", "false", preexec_fn=ignore)), b"")
        self.assertEqual(self.everything(), ["x"])

    def test_a_command_that_takes_too_long_is_ended_with_its_children(self) -> None:
        self.queue("q", "x")
        options = ("--timeout", "200ms", "--max-attempts", "1", "--drain")
        self.assertRan(self.fork(*self.sh("sleep 1000 & echo $! >pid; wait", *options)), b"", status=1)
        self.assertRegex(self.queue("q.dead").peek().reason, r"\Atimed out after .* \(attempt 1\)\Z")
        pid = int((self.dir / "pid").read_text())
        self.wait_for(lambda: not self.is_running(pid), "the end of the child of the command")
        if FULL:  # it takes 5 s
            self.queue("q", "x")
            self.assertRan(self.fork(*self.sh("trap '' TERM; while :; do sleep 0.1; done", *options)), b"", status=1)

    @staticmethod
    def is_running(pid: int) -> bool:
        """Is there such a process, and does it still run?"""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    def test_the_trouble_of_the_worker_uses_up_no_attempts(self) -> None:
        """(case 7, trap 35) A file for the message is no more certain than a process."""
        for name in ("subprocess.Popen", "tempfile.TemporaryFile"):
            self.queue().delete()
            self.queue("q", "ab")
            prepare = mock.patch(name, side_effect=OSError(11, "Resource temporarily unavailable")).start
            done = self.fork("work", "q", "--drain", "--max-attempts", "1", "--", "cat", prepare=prepare)
            self.assertRefused(done, "Resource temporarily unavailable")
            self.assertEqual([message.attempt for message in self.queue().peek_all(held=True)], [0, 0])

    def test_the_lease_lasts_as_long_as_the_command_runs_and_drain_waits_for_what_others_hold(self) -> None:
        queue = self.queue("q", ["held", "a"])
        held = queue.lease(3600)
        child = self.start(*self.sh("cat; until [ -e go ]; do sleep 0.01; done", "--lease", "300ms", "--drain"))
        self.assertEqual(self.read_line(child.stdout), b"a\n")
        self.assertIsNone(queue.read(wait=0.7))
        (self.dir / "go").touch()
        self.wait_for(lambda: queue.stats().total == 1, "the acknowledgement")
        self.assertGoesOn(child, 0.1)
        queue.release(held)
        self.assertRan(self.finish(child), b"held\n")

    @NEEDS_LOCKS
    def test_ctrl_c_at_the_terminal_and_its_end_wait_for_the_commands(self) -> None:  # case 38
        import fcntl
        import termios

        for name in ("ctrl-c", "closed"):
            go, log, queue = self.dir / f"{name}.go", self.dir / f"{name}.log", self.queue(name, "123")
            ours, theirs = self.ends(*os.openpty())
            script = f"echo started >>{log}; until [ -e {go} ]; do sleep 0.01; done; echo ended >>{log}"
            child = self.start(
                "work", name, "-j", "2", "sh", "-c", script, stdin=theirs, stdout=theirs, stderr=theirs,
                preexec_fn=lambda theirs=theirs: (os.setsid(), fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)),
            )  # fmt: skip
            theirs.close()
            self.wait_for(lambda log=log: log.exists() and log.read_text() == "started\n" * 2, "both commands")
            if name == "closed":
                ours.close()
            else:
                ours.write(b"\x03")
                self.read_until(ours, lambda data: re.search(rb"finishing [12] commands?; .*again", data))
            self.assertGoesOn(child, 0.1)
            go.touch()
            self.assertEqual((child.wait(DEADLINE_S), log.read_text()), (0, "started\n" * 2 + "ended\n" * 2))
            self.assertEqual(queue.stats()[:3], (1, 0, 0))

    def test_the_second_signal_ends_the_commands_and_gives_their_messages_back(self) -> None:
        queue = self.queue("q", "123")
        child = self.start(*self.sh("echo $$; exec sleep 1000", "-j", "2", "--backoff", "1h"))
        pids = self.read_until(child.stdout, lambda data: data.count(b"\n") == 2).split()
        child.send_signal(signal.SIGTERM)
        self.assertGoesOn(child, 0.2)
        child.send_signal(signal.SIGHUP)
        self.assertRan(self.finish(child), b"")
        self.assertBodies(queue, ["1", "2", "3"])
        self.assertEqual([self.is_running(int(pid)) for pid in pids], [False, False])

    def test_a_process_that_a_command_leaves_behind_does_not_hold_up_the_work(self) -> None:
        self.queue("q", "1234")
        try:  # it keeps the output of the command open
            self.assertRan(self.fork(*self.sh("sleep 60 & echo $! >>pids", "-j", "2", "--drain")), b"")
        finally:
            for pid in (self.dir / "pids").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        self.assertEqual(self.everything(), [])


class SignalTest(CommandTest):
    """Ctrl-C, TERM and HUP at any moment: no traceback, nothing lost, the documented status."""

    @unittest.skipIf(sys.implementation.name == "pypy", "needs CPython: PyPy does not tell that a signal is ignored")
    def test_a_signal_that_is_ignored_at_the_start_stays_ignored_and_one_ends_a_wait(self) -> None:
        child = self.start("watch", "q", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        for body in ("1", "2"):
            self.queue("q", body)
            self.assertEqual(self.read_line(child.stdout), body.encode() + b"\n")
            child.send_signal(signal.SIGHUP if body == "1" else signal.SIGTERM)
        self.assertRan(self.finish(child), b"")

        def interrupt(pid: int, end: int) -> None:
            self.assertEqual(select.select([end], [], [], 0.3)[0], [])
            os.kill(pid, signal.SIGINT)

        self.assertRan(self.fork("read", "r", "--wait", stop=interrupt), b"", status=128 + signal.SIGINT)

    NUMBERS = tuple(map(str, range(2000)))
    LINES = tuple(f"{number:0500}" for number in range(5000))  # three batches

    def at_random_moments(
        self, line: str, status: int | None, done_by: Callable[[Done], Sequence[str]], given: Sequence[str] = ()
    ) -> None:
        """Run a command on NUMBERS, or with given lines on nothing, and send it each signal at random moments.

        They are counted from the moment in which the command begins, however long Python takes until then.
        done_by() returns what it did. If it did some, its status is this one (None: the signal's).
        """
        if sys.implementation.name == "pypy":
            self.skipTest("needs CPython: PyPy loses an interrupt that comes in a finalizer")
        seed = int(os.environ.get("TEST_SEED", random.randrange(10**6)))
        rng = random.Random(seed)
        whole_s = 0.06  # of those that do not end by themselves soon; the others are measured first, with no signal
        for number in [0] * (status is None) + [*self.SIGNALS] * (50 if FULL else 5):
            self.broker().delete_database()
            self.queue("q", () if given else self.NUMBERS)
            (self.dir / "log").write_bytes(b"")
            after, took = rng.uniform(0, whole_s) if number else DEADLINE_S, []

            def stop(pid: int, end: int, number: int = number, after: float = after, took: list[float] = took) -> None:
                begun = time.monotonic()
                if not select.select([end], [], [], after)[0]:
                    os.kill(pid, number)
                took.append(time.monotonic() - begun)

            done = self.fork(*shlex.split(line), input="\n".join(given).encode(), stop=stop)
            whole_s = whole_s if number else took[0]
            shown = 128 - done.returncode if done.returncode < 0 else done.returncode  # by a shell
            with self.subTest(command=line, signal=number, after=after, seed=seed, status=done.returncode):
                self.assertEqual((done.stderr, self.queue().stats().leased), (b"", 0))
                did, whole = list(done_by(done)), list(given or self.NUMBERS)
                rest = whole[len(did) :] if given else self.left()  # of what is taken, each is taken once or left
                self.assertEqual(sorted([*did, *rest]), sorted(whole))
                expected = {128 + number if status is None else status, *([0] if did == whole else [])}
                self.assertIn(shown, expected | (set() if did else {128 + number}))

    def left(self, name: str = "q") -> list[str]:
        """What is ready in a queue."""
        return [str(message) for message in self.queue(name).peek_all()]

    def test_what_takes_messages_at_random_moments(self) -> None:
        """(case 32, trap 37: ``read --all`` into a file)"""
        printed = lambda done: done.stdout.decode().split()  # noqa: E731
        work = "work q -j 4 sh -c 'read -r body; echo $body >>log'"
        self.at_random_moments("read q --all", None, printed)
        self.at_random_moments("watch q", 0, printed)
        self.at_random_moments(work, 0, lambda done: (self.dir / "log").read_text().split())
        self.at_random_moments("move q r --all", None, lambda done: self.left("r"))

    def test_what_writes_messages_at_random_moments(self) -> None:
        self.at_random_moments("write q --lines", None, lambda done: self.left(), self.LINES)
        line = '{{"type": "message", "queue": "q", "body": "x", "id": "{}"}}'
        dump = [HEADER, *(line.format(1_700_000_000_000_000_000 + number) for number in range(8000))]
        self.at_random_moments("load", None, lambda done: {0: [], 8000: dump}[self.queue().count()], dump)


# ---------------------------------------------------------------------------------------------------
# README.md.
# ---------------------------------------------------------------------------------------------------


class ReadmeTest(CommandTest):
    """README.md is true: what it shows was run, by this."""

    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def setUp(self) -> None:
        super().setUp()
        del self.environ["BROKER_DEFAULT_DB_NAME"]

    def test_the_shell_and_python_lines_print_what_their_comments_say(self) -> None:
        """The first block does the main job with the file alone, the second is how these tests run."""
        first, second, third, *_ = code_blocks(self.text, "bash")
        shutil.copy(ROOT / "simplebroker.py", self.dir)
        self.assertRan(self.shell(f'python3() {{ {shlex.join(PYTHON)} "$@"; }}\n{first}'), b"ship it\n")
        self.assertEqual(second, "python3 -m unittest\n")
        self.assertLines("--cleanup")
        self.assertRan(self.shell(third), b"tasks: 2\nship it\n1\n2\n")
        self.assertLines(("list --stats", b"tasks: 1 (2 total, 0 leased, 1 delayed)\n"), "--cleanup")
        done = self.finish(self.python(*code_blocks(self.text)))
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout, rb"\Aship it\ncareful work \d{19} 1\n\Z")

    def test_the_transcript_shows_what_happens(self) -> None:
        """Lines that start with "$ " are run, one after the other; 19 digits stand for any id."""
        (transcript,) = code_blocks(self.text, "console")
        parts = re.split(r"^\$ (.*)\n", transcript, flags=re.MULTILINE)[1:]
        self.assertGreater(len(parts), 8)
        script = "exec 2>&1\n" + "".join(f"{line}\necho ----\n" for line in parts[::2])
        printed = self.shell(script).stdout.decode().split("----\n")[:-1]
        for command, shown, expected in zip(parts[::2], printed, parts[1::2]):
            with self.subTest(command=command):
                self.assertEqual(*(re.sub(r"\d{19}", "ID", text) for text in (shown, expected)))
        self.assertEqual(len(printed), len(parts) // 2)

    def test_every_setting_and_its_default_is_listed_and_every_link_leads_somewhere(self) -> None:
        listed = dict(re.findall(r"^\| `(BROKER_\w+)` \| ([^|]+?) \|", self.text, re.MULTILINE))
        with mock.patch.dict(os.environ, clear=True):
            defaults = Settings.from_environment()._asdict()
        for name, default in defaults.items():
            variable = re.sub("_M?S$", "", f"BROKER_{name.upper()}").replace("_DB", "_DEFAULT_DB")
            expected = {None: "the current directory", False: "0"}.get(default, str(default))
            self.assertEqual(listed.pop(variable), expected)
        self.assertEqual(listed, {})
        for link in re.findall(r"\]\(([^)#:]+)\)", self.text):
            self.assertTrue((ROOT / link).exists(), link)


class TopTest(CommandTest):
    """``broker top``: what is on the screen, and what it costs."""

    def resize(self, terminal: io.FileIO, rows: int, columns: int) -> None:
        import fcntl
        import termios

        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def top(self, rows: int, columns: int) -> tuple[subprocess.Popen[bytes], io.FileIO]:
        """Start it on a terminal; the process, and our end of the terminal."""
        ours, theirs = self.ends(*os.openpty())
        self.resize(ours, rows, columns)
        child = self.start("top", stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        theirs.close()
        return child, ours

    def screens(self, terminal: io.FileIO, count: int) -> list[list[str]]:
        """The lines of the next screens that are drawn whole."""
        drawn = self.read_until(terminal, lambda data: data.count(b"\x1b[J") >= count).decode()
        screens = [screen.partition("\x1b[J")[0] for screen in drawn.split("\x1b[H")[1:] if "\x1b[J" in screen]
        return [screen.replace("\x1b[K", "").split("\r\n") for screen in screens]

    def test_the_screen_fits_the_terminal_while_others_write_and_read(self) -> None:
        """(issue 13) Sorted by what is ready; a change of size takes effect at once; the end restores the terminal."""
        for name, count in [("most", 7), ("dead", 3), *((f"queue-with-a-long-name-{n}", 1) for n in range(12))]:
            self.queue(name).write_many(["x"] * count)
        self.queue("most").lease(60)
        for step in ("q.write('x')", "q.read()"):
            self.python(f"from simplebroker import Queue\nq = Queue('busy', 'test.db')\nwhile True: {step}")
        child, mine = self.top(24, 80)
        for screen in self.screens(mine, 3):
            self.assertTrue(len(screen) <= 24 and max(map(len, screen)) <= 80, screen)
            self.assertEqual(screen[0].split(), ["queue", "ready", "leased", "delayed", "change/s", "oldest"])
            rows = [line.split() for line in screen[1:]]
            self.assertEqual([row[0] for row in rows if row[0] in ("most", "dead")], ["most", "dead"])
            self.assertEqual([row[1:3] for row in rows if row[0] == "most"], [["6", "1"]])
            self.assertEqual([int(row[1]) for row in rows], sorted((int(row[1]) for row in rows), reverse=True))
        self.resize(mine, 10, 40)
        screen = self.screens(mine, 3)[-1]
        self.assertTrue(len(screen) == 10 and max(map(len, screen)) <= 40, screen)
        self.assertRegex(screen[-1], r"^and \d+ more queues$")
        self.resize(mine, 0, 0)  # as of a serial line, which does not tell
        self.assertGreater(len(self.screens(mine, 3)[-1]), 10)
        child.send_signal(signal.SIGINT)
        self.assertTrue(self.read_until(mine).endswith(b"\x1b[?25h\x1b[?1049l"))
        self.assertEqual(child.wait(DEADLINE_S), 0)

    def test_it_is_one_plain_table_without_a_terminal(self) -> None:
        self.queue("jobs").write_many(["a", "b"])
        self.queue("other").write("c", delay=60)
        done = self.cli("top", "--pattern", "jo*")
        self.assertRan(done)
        self.assertRegex(done.stdout, rb"\Aqueue .*oldest\njobs +2 +0 +0 +\d+s  #{10}\n\Z")

    def test_it_costs_half_a_percent_of_a_core_when_nothing_changes(self) -> None:
        self.queue("jobs").write("a")
        child, mine = self.top(24, 80)
        seconds, drawn = 10 if FULL else 2, b""
        self.screens(mine, 1)

        def used() -> float:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before, began = used(), time.monotonic()
        while (left := began + seconds - time.monotonic()) > 0:
            if select.select([mine], [], [], left)[0]:
                drawn += os.read(mine.fileno(), 65536)
        self.assertLessEqual(drawn.count(b"\x1b[H"), 2 * seconds)
        self.assertLessEqual(used() - before, max(0.05, 0.005 * (time.monotonic() - began)))


# ---------------------------------------------------------------------------------------------------
# Examples: each runs and prints what its page says (EXAMPLES.md).
# ---------------------------------------------------------------------------------------------------


def code_blocks(text: str, language: str = "python") -> list[str]:
    """The code blocks of a page, without the indentation of lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in found]


module: Any = importlib.import_module  # module("outbox") is the example


class ExampleTest(CoreTest):
    """Examples run in the test's directory, with their own directory and the repository's to import from."""

    def setUp(self) -> None:
        super().setUp()
        self.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(EXAMPLES)])

    def example(self, *command: object, status: int = 0) -> str:
        """Run a Python example to its end; return what it printed."""
        words = [sys.executable, *map(str, command)]
        done = subprocess.run(words, cwd=self.dir, env=self.environ, capture_output=True, timeout=400, check=False)
        self.assertEqual(done.returncode, status, done.stderr.decode())
        self.assertNotIn(b"Traceback", done.stderr)
        return done.stdout.decode()

    def assertPrints(self, expected: dict[str, str]) -> None:
        """Run examples; each prints these lines, with others between them."""
        for command, lines in expected.items():
            with self.subTest(command):
                name, *options = command.split()
                printed = re.sub(r"\d{19}", "ID", self.example(EXAMPLES / f"{name}.py", *options))
                for line in textwrap.dedent(lines).strip().splitlines():
                    self.assertIn(line + "\n", printed)

    def run_blocks(self, page: str) -> None:
        """Run the code of each section of a page as one program, if what it needs is there."""
        text = (EXAMPLES / page).read_text(encoding="utf-8")
        sections = {part.partition("\n")[0]: part for part in re.split("^## ", text, flags=re.MULTILINE)}
        for title, part in sections.items():
            before = re.search("<!-- continues: (.*) -->", part)
            needs = re.search("<!-- needs: (.*) -->", part)
            blocks = (code_blocks(sections[before[1]]) if before else []) + code_blocks(part)
            if blocks and (not needs or importlib.util.find_spec(needs[1])):
                with self.subTest(title):
                    future = "from __future__ import annotations\n"
                    code = future + "\n".join(blocks).replace(future, "")
                    (self.dir / "blocks.py").write_text(code, encoding="utf-8")
                    self.example("blocks.py")


class AllExamplesTest(ExampleTest):
    def test_python_examples_print_what_their_pages_say(self) -> None:
        self.assertPrints(PRINTED)

    def test_examples_use_no_private_name_of_the_module(self) -> None:
        defined = re.compile(r"(?:\b(?:def|class) |\bself\.|^ *)(_[A-Za-z]\w*)(?=[(:]| = |, self\.)", re.MULTILINE)
        ours = set(defined.findall((ROOT / "simplebroker.py").read_text(encoding="utf-8")))
        self.assertGreater(len(ours), 20)
        for page in EXAMPLES.glob("*.[mp][dy]"):
            text = page.read_text(encoding="utf-8")
            used = set(re.findall(r"\b_[A-Za-z]\w*", text)) - set(defined.findall(text))
            self.assertEqual(used & ours, set(), page.name)

    def test_every_block_of_the_extension_guide_runs(self) -> None:
        self.run_blocks("example_extension_implementation.md")

    def test_the_suite_of_sqlite_connect_passes(self) -> None:  # which has case 65
        self.example("-m", "unittest", "test_sqlite_connect")


PRINTED = {
    "python_api": """
        peek: first
        moved: second
        deleted: 2 from tasks
        paid: 42
        dead: not a number because: invalid literal for int() with base 10: 'not a number'
        busy, so nothing was written: 0
        ordered: 12 rejected: ['{broken']
        checkpoint: ['1', '2'] ['3', '4', '5', '6'] still there: 6
        jobs: 30 different: 30 left: 0""",
    "simple_watcher_example": """
        {"message": "hello", "timestamp": "ID"}
        INFO simplebroker: message ID: hello
        [ID] ! READ THIS
        handled: shy
        dead: bad because: ValueError: cannot handle 'bad' (attempt 2)""",
    "async_wrapper": """
        jobs: 30 different: 30 left: 0
        watch ended: True dead: bad because: ValueError: no such job (attempt 2)""",
    "multi_queue_watcher": """
        first rounds: logs:0 orders:0 mails:bad logs:1 orders:1 mails:bad
        handled: 105 rounds: 102 dead: bad""",
    "multi_queue_patterns": """
        strict: urgent 1, normal 1, urgent 2, normal 2, low 1
        weighted: h0, h1, h2, l0, h3, l1, l2, l3
        balanced: {'worker.1': 4, 'worker.2': 4, 'worker.3': 4}
        left: {'metrics': 0, 'mails': 0, 'ledger': 1, 'failed': 1}
        a: 2 handled, 2 failed, 0 waiting
        seen: ['1a', '2a', '2b'] watched: ['control', 'tenant.2'] left: 1""",
    "logging_runner": "read: first\nleft: 1\nBEGIN: 3\nCOMMIT: 3\nINSERT_MESSAGE: 2",
    "outbox": """
        killed after the message, before the commit: 0 orders, 0 messages
        failed: 0 orders, 0 messages
        taken: 1 orders, 1 messages
        another process reads: {"order": 1, "item": "lamp"}""",
    "sqlite_connect": "4 processes counted to 200 of 200",
}
PRINTED_WITH_AIOSQLITE = {
    "async_pooled_broker": "handled at least 50: True in all: 100\ndead because: ValueError: no such order (attempt 1)",
    "async_simple_example": "receipts: 99, paid: 49500",
    "async_simple_example batch": "batches: 5, sum: 499500, left: 0",
}


class BenchmarkTest(ExampleTest):
    """examples/benchmark.py, quickly."""

    def test_the_benchmark_measures_every_row_of_its_bounds(self) -> None:
        bounds = json.loads(self.example("-c", "import benchmark, json; print(json.dumps(benchmark.BOUNDS))"))
        found = json.loads(self.example(EXAMPLES / "benchmark.py", "--quick", "--json"))
        if "litequeue" in found["not measured"]:
            del bounds["lease + ack in a loop, FULL"]
        self.assertEqual([row["row"] for row in found["rows"]], list(bounds))
        for row in found["rows"]:
            sign, limit, unit = bounds[row["row"]]
            with self.subTest(**row):
                self.assertGreaterEqual(row["here"], 0)
                self.assertEqual(row["met"], row["value"] >= limit if sign == ">=" else row["value"] <= limit)
                if unit == "x":
                    self.assertGreater(row["value"], 0)
                    self.assertGreater(row["there"], 0)
        self.assertEqual(found["missed"], [row["row"] for row in found["rows"] if not row["met"]])
        self.assertEqual([row["queue"] for row in found["queues"]][:2], ["simplebroker", "bare sqlite3"])
        self.assertEqual(found["queues"][0]["errors"], 0)

    def test_the_benchmark_shows_its_rows_as_a_table_and_refuses_unknown_ones(self) -> None:
        printed = self.example(EXAMPLES / "benchmark.py", "--quick", "--only", "batch")
        self.assertRegex(printed, r"(?m)^write_many .*/s .* executemany .*x  >= 0\.8 x +(met|MISSED)$")
        self.assertRegex(printed, r"(?m)^[01] of 1 bounds missed, in [\d.]+ s$")
        self.assertEqual(self.example(EXAMPLES / "benchmark.py", "--only", "none", status=2), "")


class DashboardTest(ExampleTest):
    """The page of dashboard.py, asked for over a socket and looked at in Chromium."""

    def setUp(self) -> None:
        super().setUp()
        self.ids = self.queue("tasks").write_many(["a", "b"])
        command = [*PYTHON, str(EXAMPLES / "dashboard.py"), "-f", str(self.path)]
        self.server: Any = self.spawn(*command, stderr=subprocess.PIPE)
        self.url = self.server.stdout.readline().decode().strip()
        self.port, self.token = re.findall(r"\Ahttp://127\.0\.0\.1:(\d+)/\?token=([\w-]{40,})\Z", self.url)[0]

    def connect(self, verb: str, path: str, **values: Any) -> Any:
        """Send a request with the token and the host, or others; return what can be read."""
        host = values.pop("host", f"127.0.0.1:{self.port}")
        query = "&".join(f"{name}={value}" for name, value in {"token": self.token, **values}.items())
        with socket.create_connection(("127.0.0.1", int(self.port)), DEADLINE_S) as peer:
            peer.sendall(f"{verb} {path}?{query} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            file = peer.makefile("rb")
        self.addCleanup(file.close)
        return file

    def ask(self, *request: str, **values: Any) -> tuple[int, str]:
        head, _, text = self.connect(*request, **values).read().decode().partition("\r\n\r\n")
        return int(head.split()[1]), text

    def browse(self) -> Callable[[str], Any]:
        """Open the page in Chromium. Return what runs a script in it, through the pipe of the DevTools protocol."""
        ours, theirs = socket.socketpair()  # Chromium expects the pipe at its file descriptors 3 and 4
        ours.settimeout(DEADLINE_S)
        fd = theirs.fileno()
        command = ["bash", "-c", f'TMPDIR=$0 exec chromium "$@" 3<&{fd} 4>&{fd}', str(self.dir), "--headless=new"]
        command += ["--no-sandbox", f"--user-data-dir={self.dir / 'chromium'}", "--remote-debugging-pipe"]
        session: dict[str, str] = {}
        chromium = subprocess.Popen(command, pass_fds=[fd], stderr=subprocess.DEVNULL, start_new_session=True)
        theirs.close()

        def receive() -> Iterator[dict[str, Any]]:
            rest = b""
            while data := ours.recv(65536):
                *lines, rest = (rest + data).split(b"\0")
                yield from map(json.loads, lines)

        def call(method: str, **params: Any) -> dict[str, Any]:
            ours.sendall(json.dumps({"id": 1, "method": method, "params": params, **session}).encode() + b"\0")
            return next(answer["result"] for answer in answers if "id" in answer)

        def run(script: str) -> Any:
            answer = call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
            self.assertNotIn("exceptionDetails", answer, script)
            return answer["result"].get("value")
        answers = receive()
        self.addCleanup(ours.close)
        self.addCleanup(self.reap, chromium)
        self.addCleanup(os.killpg, chromium.pid, signal.SIGKILL)
        target = call("Target.createTarget", url=self.url)["targetId"]
        session["sessionId"] = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return run

    def test_what_has_not_the_token_or_names_another_host_is_refused(self) -> None:
        paths = {"/": "GET", "/events": "GET", "/messages": "GET", "/requeue": "POST", "/delete": "POST", "/no": "PUT"}
        others = [{"token": token} for token in ("", "x" * len(self.token), "%FF", self.token[:-1])]
        others += [{"host": host} for host in ("", "127.0.0.1", f"evil.example:{self.port}", f"{self.port}.example")]
        for path, verb in paths.items():
            for other in others:
                self.assertEqual(self.ask(verb, path, **other, queue="tasks", id=self.ids[0])[0], 403, (path, other))
        self.assertBodies(self.queue("tasks"), ["a", "b"])
        self.assertEqual(self.ask("GET", "/", host=f"localhost:{self.port}")[0], 200)
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", int(self.port))).close()

    def test_without_a_database_it_says_so_and_makes_none(self) -> None:
        self.assertEqual(self.example(EXAMPLES / "dashboard.py", "-f", "no.db", status=2), "")
        self.assertFalse((self.dir / "no.db").exists())

    def test_only_post_changes_something(self) -> None:
        tasks = self.queue("tasks")
        tasks.dead_letter(tasks.lease(), reason="why")
        for verb, path in [("GET", "/delete"), ("GET", "/requeue"), ("POST", "/messages")]:
            self.assertEqual(self.ask(verb, path, queue="tasks", id=self.ids[1])[0], 404)
        for values in [{}, {"id": ""}, {"id": "x"}, {"id": self.ids[1], "queue": "-"}]:
            self.assertEqual(self.ask("POST", "/delete", **{"queue": "tasks", **values})[0], 400, values)
        self.assertBodies(tasks, ["b"])
        (letter,) = json.loads(self.ask("GET", "/messages", queue="tasks.dead")[1])
        self.assertEqual((letter["id"], letter["body"], letter["reason"]), (str(self.ids[0]), "a", "why"))
        self.assertEqual(self.ask("POST", "/requeue", queue="tasks", id=self.ids[0]), (200, "1"))
        self.assertEqual(self.ask("POST", "/delete", queue="tasks", id=self.ids[1]), (200, "1"))
        self.assertBodies(tasks, ["a"])

    def test_events_tell_at_once_what_changed_and_at_most_twice_a_second(self) -> None:
        events = (json.loads(line[6:]) for line in self.connect("GET", "/events") if line.startswith(b"data: "))
        next(event for _, event in zip(range(3), events) if "tasks" in dict(event["queues"]))
        delays = []
        for name in ("x1", "x2", "x3"):  # the best counts: the machine may be busy
            self.assertRan(self.cli("write", name, "x"))
            began = time.monotonic()
            self.assertEqual([*dict(next(events)["queues"])], [name])
            delays.append(time.monotonic() - began)
        self.assertLess(min(delays), 1.0)
        self.python("import simplebroker\nq = simplebroker.Queue('burst', 'test.db')\nwhile True: q.write('x')")
        times = [next(events)["time"] for _ in range(6)]
        self.assertGreater(times[5] - times[1], 4 * 0.5 - 0.1)
        self.server.send_signal(signal.SIGINT)
        self.assertEqual((self.server.wait(DEADLINE_S), self.server.stderr.read()), (0, b""))

    @unittest.skipIf(shutil.which("chromium") is None, "needs Chromium")
    def test_a_browser_shows_new_queues_and_hostile_bodies_and_requeues(self) -> None:
        hostile = ["<script>document.title = 1</script>", '"><img src=x onerror="alert(1)">']
        dead = self.queue("odd.dead")
        dead.write_many(hostile)
        dead.release(dead.lease(), reason="<b>why</b>")
        run = self.browse()
        names = '[...document.querySelectorAll(".name")].map((name) => name.textContent)'
        self.wait_for(lambda: run(names) == ["odd.dead", "tasks"], "the page")
        self.queue("then").write("x")
        self.wait_for(lambda: "then" in run(names), "the new queue")
        run('document.querySelector(".name").click()')
        shown = '[...document.querySelectorAll("#view[open] pre")].map((body) => body.textContent)'
        self.wait_for(lambda: run(shown) == hostile, "the bodies as text")
        self.assertEqual(run('document.querySelectorAll("li script, li img, li b, tbody b").length'), 0)
        script = 'document.body.append(Object.assign(document.createElement("script"), {text: "document.title = 1"}))'
        self.assertEqual(run(f"{script}; document.title"), f"{self.path} - SimpleBroker")
        for button in ("#ask button", "#yes"):  # Cancel, then Requeue
            run('document.querySelector("li .requeue").click()')
            self.wait_for(lambda: run("document.querySelector('#ask').open"), "the question")
            self.assertBodies(dead, hostile)
            run(f'document.querySelector("{button}").click()')
        self.wait_for(lambda: run(shown) == hostile[1:], "the end of the letter")
        self.assertBodies(self.queue("odd"), hostile[:1])


class ExamplesReadmeTest(ExampleTest):
    """The snippets of the page run as they stand."""

    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")

    def block(self, words: str) -> str:
        """The one Python block with these words."""
        found = [code for code in code_blocks(self.text) if words in code]
        self.assertEqual(len(found), 1, words)
        return found[0]

    def test_the_synchronous_and_the_asynchronous_snippet(self) -> None:
        end = 'q = Queue("myqueue")\nq.write("later")\nwhile q.stats().total:\n    pass\nwatcher.stop()\n'
        printed = self.example("-c", self.block("Standard synchronous usage") + end)
        self.assertEqual(printed, "Hello, World!\nGot: later\n")
        body = textwrap.indent(self.block("AsyncBroker("), "    ")
        code = f"import asyncio\nasync def main():\n{body}\n    print(msg)\nasyncio.run(main())"
        self.assertEqual(self.example("-c", code), "Hello async!\n")

    def test_the_steps_to_a_runner_work_once_its_methods_do_something(self) -> None:
        """Case 66: as they stand, the methods give nothing, and the error says which one."""
        names: dict[str, Any] = {}
        exec(self.block("import SQLRunner, OperationalError") + self.block("class MyRunner(SQLRunner)"), names)
        last_step = self.block("runner = MyRunner(config)").replace("MyRunner(config)", "MyRunner()")
        with self.assertRaisesRegex(UsageError, r"MyRunner\.run\(\) returned None"):
            exec(last_step, names)
        inner = SQLiteRunner(self.path)
        self.addCleanup(inner.close)
        for method in ("run", "begin_immediate", "commit", "rollback", "close"):
            setattr(names["MyRunner"], method, staticmethod(getattr(inner, method)))
        exec(last_step, names)
        self.assertBodies(self.queue("myqueue"), ["Hello from custom runner!"])

    def test_links_commands_and_the_list_of_files_are_right(self) -> None:
        headings = re.findall(r"^#+ (.*)$", self.text, re.MULTILINE)
        anchors = {"#" + re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".md")}
        targets = set(re.findall(r"\]\(([^)]+)\)", self.text))
        self.assertEqual(targets - anchors, files - {"README.md"})
        for command in re.findall(r"^ *(?:python|bash)(?: -m unittest)? (\S+)", self.text, re.MULTILINE):
            self.assertTrue((ROOT / command).is_file(), command)


def in_event_loop(test: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A test that is a coroutine gets a deadline; a task that ends with an error that nobody looked at fails it."""

    @functools.wraps(test)
    def run(self: Any) -> None:
        async def watched() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(str(context)))
            await asyncio.wait_for(test(self), 2 * DEADLINE_S)

        problems: list[str] = []
        asyncio.run(watched())
        gc.collect()
        self.assertEqual(problems, [])

    return run


class AsyncContract:
    """What both async brokers promise. A subclass opens one, and says what its calls are named."""

    BODIES = [str(number) for number in range(10, 40)]

    async def loop_over(self: Any, broker: Any, work: Any) -> None:
        async for message in self.messages(broker):
            await work(message)

    async def take_one(self: Any, broker: Any, work: Any) -> None:
        if message := await self.take(broker):
            self.done.append(str(message))

    def ways(self: Any) -> list[Any]:  # to consume q
        return [self.loop_over, self.loop_over, self.watch, self.take_one]

    @in_event_loop
    async def test_consumers_that_are_stopped_or_cancelled_neither_lose_keep_nor_repeat_a_message(self: Any) -> None:
        """Stopped by the end of the block, which waits for them (case 62), or cancelled twice (cases 61, 63)."""
        chance = random.Random(2)

        async def work(message: Message) -> None:
            await asyncio.sleep(chance.random() / 500)
            self.done.append(str(message))

        for turn in range(24):
            self.done = []
            async with self.open() as broker:
                await asyncio.gather(*(self.write(broker, body) for body in self.BODIES))
                works = (self.take(broker, "empty"), *(way(broker, work) for way in self.ways()))
                tasks = [*map(asyncio.ensure_future, works)]
                for most_s in (0.02, 0.002):
                    await asyncio.sleep(chance.random() * most_s)
                    if turn % 3:
                        all(task.cancel() for task in tasks)
                if turn % 3 == 1:
                    await asyncio.wait(tasks)
            if turn % 3:
                await asyncio.wait(tasks)
            else:
                self.assertEqual([task.done() and task.result() for task in tasks], [None] * len(tasks))
            left = [str(each) for each in self.queue().peek_all(held=True) if each.state == "ready"]
            self.assertEqual(sorted(self.done + left), self.BODIES)
            self.queue().delete()

    @in_event_loop
    async def test_a_loop_that_is_left_gives_back_what_it_has_and_what_it_fetched_ahead(self: Any) -> None:
        async with self.open() as broker:
            for body in "abcdef":
                await self.write(broker, body)
            stream = self.messages(broker)
            async for message in stream:
                if message == "d":
                    break
            await stream.aclose()
            attempts = [(message, message.attempt) for message in self.queue().peek_all()]
            self.assertEqual(attempts, [("d", 1), ("e", 0), ("f", 0)])
        with self.assertRaises(UsageError):
            await self.write(broker, "too late")

    @in_event_loop
    async def test_a_delayed_message_and_a_write_elsewhere_end_a_wait(self: Any) -> None:
        async with self.open() as broker:
            await self.write(broker, "later", delay=0.1)
            self.assertEqual(await self.take(broker), "later")
            waiting = asyncio.ensure_future(self.take(broker))
            await asyncio.sleep(0.05)  # in which it begins to wait
            self.queue().write("from outside")
            self.assertEqual(await waiting, "from outside")
            self.assertIsNone(await self.take(broker, wait=0.01))


class AsyncWrapperTest(AsyncContract, ExampleTest):
    write = staticmethod(lambda broker, body, **when: broker.push("q", body, **when))
    take = staticmethod(lambda broker, name="q", wait=math.inf: broker.pop(name, wait=wait))
    messages = staticmethod(lambda broker: broker.stream_messages("q"))
    watch = staticmethod(lambda broker, work: broker.watch_queue("q", lambda message, timestamp: work(message)))

    def open(self) -> Any:
        return module("async_wrapper").AsyncBroker(self.path)

    @in_event_loop
    async def test_many_waiting_tasks_do_not_slow_others_down(self) -> None:  # case 64
        async with self.open() as broker:
            waiting = [asyncio.ensure_future(self.take(broker, f"other{n % 250}")) for n in range(500)]
            await asyncio.sleep(0)
            times = []
            for _ in range(40):
                begin = time.perf_counter()
                await self.write(broker, "x")
                times.append(time.perf_counter() - begin)
            self.assertLess(statistics.median(times), 0.03)
            for number in range(500):
                await broker.push(f"other{number // 2}", "one for each")
            self.assertEqual(len({message.id for message in await asyncio.gather(*waiting)}), 500)


NEEDS_AIOSQLITE = unittest.skipUnless(
    all(importlib.util.find_spec(name) for name in ("aiosqlite", "aiosqlitepool")), "needs aiosqlite and aiosqlitepool"
)


@NEEDS_AIOSQLITE
class AsyncPooledBrokerTest(AsyncContract, ExampleTest):
    write = staticmethod(lambda broker, body, **when: broker.queue("q").write(body, **when))
    take = staticmethod(lambda broker, name="q", wait=math.inf: broker.queue(name).read(wait=wait))
    messages = staticmethod(lambda broker: broker.queue("q").read_all(wait=math.inf))
    watch = staticmethod(lambda broker, work: broker.queue("q").watch(work, concurrency=3))

    def open(self) -> Any:
        return module("async_pooled_broker").AsyncBrokerCore(self.path)

    def ways(self) -> list[Any]:
        return [*super().ways(), self.lease_one]

    async def lease_one(self, broker: Any, work: Any) -> None:
        if message := await broker.queue("q").lease(60):
            self.done.append(str(message))
            await broker.queue("q").ack(message)

    def test_the_programs_print_what_their_page_says_and_its_blocks_run(self) -> None:
        self.assertPrints(PRINTED_WITH_AIOSQLITE)
        self.run_blocks("ASYNC_README.md")

    @in_event_loop
    async def test_synchronous_and_asynchronous_code_share_a_queue_its_ids_and_its_leases(self) -> None:
        async with self.open() as broker:
            queue, plain = broker.queue("q"), self.queue()
            ids = [await queue.write("a"), plain.write("b"), *await queue.write_many(["c", "d"]), plain.write("e")]
            self.assertEqual(ids, sorted(set(ids)))
            plain.ack(await queue.lease(60))
            await queue.ack(plain.lease(60))
            self.assertEqual([message.id for message in plain.peek_all()], ids[2:])
            for misuse in (queue.write(1), queue.write_many("ab"), queue.write("x", delay=-1), queue.ack("c")):
                with self.assertRaises((TypeError, ValueError)):
                    await misuse
            broker.clock = Clock()  # which has stepped back
            for remove in (queue.delete, queue.read, queue.lease, queue.count):
                removed = await remove()
                if remove == queue.lease:
                    await queue.ack(removed)
                ids.append(await queue.write("never with an id that was given out"))
                self.assertGreater(ids[-1], ids[-2])

    @in_event_loop
    async def test_a_file_that_is_no_database_or_was_replaced_is_refused(self) -> None:
        async with self.open() as broker:
            self.path.rename(self.dir / "away.db")
            with self.assertRaisesRegex(OperationalError, "deleted or replaced"):
                await self.write(broker, "y")
        self.path = self.dir / "text.db"
        self.path.write_bytes(b"not a database, but long enough to be taken for one" * 100)
        with self.assertRaises(DatabaseError):
            async with self.open():
                pass


@NEEDS_AIOSQLITE
class ContractOfPooledBroker(QueueContract, ExampleTest):
    """The async broker keeps the contract of Queue. What it lacks, such as peek_all, synchronous code does."""

    class Synchronous:
        """An AsyncQueue whose methods are called from outside the event loop."""

        def __init__(self, run: Callable[[Any], Any], queue: Any, plain: Queue) -> None:
            self._run, self._queue, self._plain = run, queue, plain

        def __getattr__(self, name: str) -> Any:
            if not hasattr(self._queue, name):
                return getattr(self._plain, name)
            method = self._read_all if name == "read_all" else getattr(self._queue, name)
            return lambda *args, **options: self._run(method(*args, **options))

        async def _read_all(self, **filters: Any) -> list[Message]:
            return [message async for message in self._queue.read_all(**filters)]

    def setUp(self) -> None:
        super().setUp()
        self._broker, loop = self.broker(), asyncio.new_event_loop()
        self._run, self._core = loop.run_until_complete, module("async_pooled_broker").AsyncBrokerCore(self.path)
        self._run(self._core.__aenter__())
        self.addCleanup(loop.close)
        self.addCleanup(lambda: self._run(asyncio.wait([loop.create_task(self._core.close()) for _ in "ab"])))

    def q(self, name: str) -> Any:
        return self.Synchronous(self._run, self._core.queue(name), self._broker.queue(name))


class MultiQueueTest(ExampleTest):
    def test_a_handler_that_ends_its_thread_is_counted(self) -> None:  # trap 34
        leave, watcher = mock.Mock(side_effect=SystemExit("enough")), module("multi_queue_watcher").MultiQueueWatcher
        self.queue().write_many(["1", "2"])
        self.assertRaises(SystemExit, watcher(["q"], leave, db=self.broker()).watch)
        first = self.queue().peek()
        self.assertEqual((first, first.attempt, first.reason), ("1", 1, "SystemExit: enough"))
        with self.assertLogs("multi_queue_watcher", "WARNING"), self.assertRaises(SystemExit):
            watcher(["q"], leave, db=self.broker(), max_attempts=1).watch()
        self.assertBodies(self.queue("q.dead"), ["1"])
        self.assertEqual([call.args[0] for call in leave.call_args_list], ["1", "2"])  # not called for the first again

    def test_the_program_of_its_page_watches_until_a_signal(self) -> None:
        (block,) = code_blocks((EXAMPLES / "MULTI_QUEUE_README.md").read_text(encoding="utf-8"))
        self.path = self.dir / "broker.db"
        self.queue("orders").write("hello")
        program = self.python(block)
        self.wait_for(lambda: not self.queue("orders").has_pending())
        program.terminate()
        self.assertEqual((program.communicate(timeout=DEADLINE_S)[0], program.returncode), (b"orders hello\n", 0))


class RunnerExamplesTest(ExampleTest):
    def test_the_logging_runner_names_errors_hides_bodies_and_passes_changes_on(self) -> None:
        inner = SQLiteRunner(self.path)
        runner = module("logging_runner").LoggingRunner(inner)
        self.addCleanup(runner.close)
        self.assertIs(runner.notifier, inner.notifier)
        with self.assertLogs("logging_runner", "DEBUG") as logs, Queue("q", runner=runner) as queue:
            id = queue.write("secret")
            with self.assertRaises(IntegrityError):
                runner.run(ext.INSERT_LOADED, (id, "q", "again", None, 0, None))
        self.assertRegex("\n".join(logs.output), r"INSERT_LOADED +\d+\.\d\d ms  IntegrityError")
        self.assertNotIn("secret", "\n".join(logs.output))

    def test_what_the_broker_does_in_the_applications_transaction_is_the_applications(self) -> None:
        connection = sqlite3.connect(str(self.path))
        self.addCleanup(connection.close)
        module("outbox").make_outbox(connection)
        queue = Queue("q", runner=module("outbox").OutboxRunner(connection))
        connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY)")
        for end in (connection.rollback, connection.commit):
            connection.execute("INSERT INTO rows DEFAULT VALUES")
            queue.write_many(["a", "b"])
            with contextlib.suppress(LookupError), queue.broker.transaction():
                queue.write("only this part is undone")
                raise LookupError
            self.assertEqual(self.queue().count(), 0, "not committed yet")
            end()
        self.assertBodies(self.queue(), ["a", "b"])
        self.assertEqual(connection.execute("SELECT count(*) FROM rows").fetchall(), [(1,)])
        queue.dead_letter(queue.lease(60), reason="without a transaction")
        self.assertEqual(self.queue("q.dead").read().reason, "without a transaction")

    def test_an_outbox_refuses_the_files_of_other_programs(self) -> None:
        for statement in ("PRAGMA application_id = 7", "CREATE TABLE messages (id)"):
            path = self.dir / f"{len(statement)}.db"
            with contextlib.closing(sqlite3.connect(str(path))) as connection, self.assertRaises(ValueError):
                connection.execute(statement)
                module("outbox").make_outbox(connection)


# ---------------------------------------------------------------------------------------------------
# Examples: shell scripts. One test for the idea of each, and bodies that try to get out.
# ---------------------------------------------------------------------------------------------------

SCRIPTS = ("resilient_worker.sh", "dead_letter_queue.sh", "queue_migration.sh", "work_stealing.sh")
HOSTILE_BODIES = ["$(touch x)", "`touch x`", "'; touch x; '", "-n", "a\nb\n\n", "\\n\\t%s", "", 'umlaut äöü "quoted"']


@unittest.skipUnless(all(map(shutil.which, ("bash", "jq"))), "needs bash and jq")
class ShellTest(ExampleTest):
    def setUp(self) -> None:
        super().setUp()
        command = self.dir / "with blank" / "broker"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec "{PYTHON[0]}" {" ".join(PYTHON[1:])} -m simplebroker "$@"\n')
        command.chmod(0o755)
        for name in ("tmp", "saved"):
            (self.dir / name).mkdir()
        self.environ.update(
            BROKER=str(command), BROKER_SYNC_MODE="OFF", TMPDIR=str(self.dir / "tmp"),
            BROKER_DEFAULT_DB_LOCATION=str(self.dir), BROKER_DEFAULT_DB_NAME="test.db",
        )  # fmt: skip

    def start(self, script: str, *arguments: object, **settings: object) -> subprocess.Popen[bytes]:
        return self.spawn(
            "bash", str(EXAMPLES / script), *map(str, arguments), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**self.environ, **{name: str(value) for name, value in settings.items()}}, start_new_session=True,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[bytes], status: int = 0) -> None:
        """Wait for the end of a script."""
        output, errors = process.communicate(timeout=2 * DEADLINE_S)
        self.assertEqual(process.returncode, status, (output + errors).decode())
        self.assertFalse((self.dir / "x").exists(), "a body was executed")

    def script(self, script: str, *arguments: object, status: int = 0, **settings: object) -> None:
        self.finish(self.start(script, *arguments, **settings), status)

    def totals(self) -> dict[str, int]:
        return {name: stats.total for name, stats in self.broker().queues().items()}

    def shell(self, code: str) -> list[str]:
        """A command that runs a line of bash, with $1 the test's directory."""
        return ["bash", "-c", code, "command", str(self.dir)]

    def saving(self) -> list[str]:
        """A command that saves the body of each message in a file that is named after its id."""
        return self.shell('cat >"$1/saved/$BROKER_MESSAGE_ID"')

    def saved(self) -> list[str]:
        return [path.read_bytes().decode() for path in sorted((self.dir / "saved").iterdir())]


class AllScriptsTest(ShellTest):
    @unittest.skipUnless(shutil.which("shellcheck"), "needs shellcheck")
    def test_shellcheck_finds_nothing(self) -> None:
        found = subprocess.run(["shellcheck", *(EXAMPLES / name for name in SCRIPTS)], capture_output=True, check=False)
        self.assertEqual((found.returncode, found.stdout.decode()), (0, ""))

    def test_the_helpers_are_the_same_text_in_each_file(self) -> None:
        texts: dict[str, list[str]] = {}
        for script in SCRIPTS:
            text = (EXAMPLES / script).read_text(encoding="utf-8")
            for name, body in re.findall(r"^(\w+)\(\) (\{.*?\})$", text, re.MULTILINE | re.DOTALL):
                texts.setdefault(name, []).append(body)
        different = {name for name, bodies in texts.items() if len(set(bodies)) > 1}
        self.assertEqual(different, {"main", "usage", "demo"})

    def test_no_arguments_and_no_database_are_errors_and_never_an_empty_queue(self) -> None:
        self.path.write_text("this is not a database, and long enough to tell: " * 20)
        for script, subcommand in zip(SCRIPTS, ("lease", "simple", "steps", "round-robin")):
            self.script(script, status=1)
            self.script(script, subcommand, "jobs", "cat", status=1)

    def test_demos_end_by_themselves_and_leave_nothing(self) -> None:
        self.queue("jobs").write("not for the demo")
        installed = {"BROKER": "", "PATH": f"{self.dir / 'with blank'}:{os.environ['PATH']}"}
        for process in [self.start(script, "demo", **installed) for script in SCRIPTS]:
            self.finish(process)
        self.assertEqual((self.totals(), list((self.dir / "tmp").iterdir())), ({"jobs": 1}, []))

    def test_a_term_to_the_group_finishes_the_message(self) -> None:  # case 60
        work = self.shell('touch "$1/begun.$BROKER_QUEUE"; while [[ ! -e $1/go ]]; do sleep 0.05; done')
        processes = {}
        for script, *arguments in (
            ("resilient_worker.sh", "lease", "a"),
            ("resilient_worker.sh", "peek", "b", "checkpoint"),
            ("dead_letter_queue.sh", "simple", "c"),
            ("work_stealing.sh", "priority", "d", "--"),
        ):
            self.queue(arguments[1]).write("good")
            processes[arguments[1]] = self.start(script, *arguments, *work, MAX_ATTEMPTS=1)
        for name, process in processes.items():
            self.wait_for((self.dir / f"begun.{name}").exists)
            os.killpg(process.pid, signal.SIGTERM)
        (self.dir / "go").touch()
        for process in processes.values():
            self.finish(process)
        self.assertEqual(self.totals(), {})


class ScriptsTest(ShellTest):
    def test_resilient_worker_keeps_bodies_and_dead_letters_what_fails(self) -> None:
        for way in (["lease", "jobs"], ["peek", "jobs", self.dir / "check point"]):
            self.queue("jobs").write_many(HOSTILE_BODIES)
            self.script("resilient_worker.sh", *way, *self.saving(), DRAIN=1)
            self.assertEqual(self.saved()[-len(HOSTILE_BODIES) :], HOSTILE_BODIES)
            self.queue("jobs").write_many(["bad", "good"])
            tries = self.shell('read -r body; echo "$body" >>"$1/tries"; [[ $body == good ]]')
            self.start("resilient_worker.sh", *way, *tries, MAX_ATTEMPTS=2, BACKOFF_MS=1, DRAIN=1).wait(DEADLINE_S)
            self.assertEqual(self.totals(), {"jobs.dead": 1})
            self.assertEqual(self.queue("jobs.dead").read(), "bad")
        self.assertEqual(Counter((self.dir / "tries").read_text().split()), {"bad": 4, "good": 2})

    def test_dead_letter_queue_counts_delays_alerts_and_tries_again(self) -> None:
        self.queue("jobs").write_many(HOSTILE_BODIES)
        self.script("dead_letter_queue.sh", "simple", "jobs", "false")
        self.assertBodies(self.queue("jobs.dead"), HOSTILE_BODIES)
        self.script("dead_letter_queue.sh", "check", "jobs", MAX_DEAD=3, status=3)
        self.script("dead_letter_queue.sh", "retry", "jobs")
        counting = self.shell('echo >>"$1/tries"; exit 1')
        self.script("dead_letter_queue.sh", "backoff", "jobs", *counting, MAX_ATTEMPTS=2, BACKOFF_MS=1)
        self.assertEqual(len((self.dir / "tries").read_text()), 2 * len(HOSTILE_BODIES))
        self.assertBodies(self.queue("jobs.dead"), HOSTILE_BODIES)

    def test_queue_migration_renames_selects_transforms_merges_and_verifies(self) -> None:
        self.queue("jobs").write_many(HOSTILE_BODIES)
        self.script("queue_migration.sh", "rename", "jobs", "tasks")
        self.assertBodies(self.queue("tasks"), HOSTILE_BODIES)
        self.script("queue_migration.sh", "content", "tasks", "picked", "touch x")
        self.assertBodies(self.queue("picked"), HOSTILE_BODIES[:3])
        self.script("queue_migration.sh", "transform", "picked", "upper", "tr", "a-z", "A-Z")
        self.assertBodies(self.queue("upper"), [body.upper() for body in HOSTILE_BODIES[:3]])
        self.script("queue_migration.sh", "merge", "all", "tasks", "upper")
        self.assertEqual(self.totals(), {"all": len(HOSTILE_BODIES)})
        self.script("queue_migration.sh", "backup", self.dir / "backup")
        self.script("queue_migration.sh", "verify", self.dir / "backup")

    def test_work_stealing_deals_steals_and_works_by_priority(self) -> None:
        self.queue("jobs").write_many(HOSTILE_BODIES)
        self.script("work_stealing.sh", "round-robin", "jobs", "one", "two")
        for n, name in enumerate(("one", "two")):
            self.assertBodies(self.queue(name), HOSTILE_BODIES[n::2])
        self.script("work_stealing.sh", "steal", "mine", "one", "none")
        self.assertBodies(self.queue("mine"), HOSTILE_BODIES[:3:2])
        self.queue("jobs").write_many(["next", "and next"])
        self.script("work_stealing.sh", "least-loaded", "jobs", "two", "empty")
        self.assertBodies(self.queue("empty"), ["next", "and next"])
        self.script("work_stealing.sh", "priority", "mine", "one", "two", "empty", "--", *self.saving())
        self.assertEqual(self.saved(), [*HOSTILE_BODIES, "next", "and next"])


# ---------------------------------------------------------------------------------------------------
# PostgreSQL: the same contract on a real server, and what only a server can do wrong.
# ---------------------------------------------------------------------------------------------------


PG_IDLE_S = 10.0  # how long a client may be silent in a transaction, as the runner documents it


class Server:
    """A cluster of its own in a temporary directory, on a Unix socket. Root starts it as the user nobody."""

    def __init__(self, bin: Path) -> None:
        self.bin, self.dir, self.owner = bin, Path(tempfile.mkdtemp(prefix="broker-postgresql-")), os.getpid()
        self.user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        if self.user:
            os.chown(self.dir, NOBODY, NOBODY)
        multiprocessing.util.Finalize(None, self.remove, exitpriority=1)  # atexit is not for a pool's processes
        order = ("--locale=C", "--locale-provider=icu", "--icu-locale=en")  # another than ours
        self.call("initdb", "-A", "trust", "-U", "broker", "-E", "UTF8", "--no-sync", *order)
        options = f"-k {self.dir} -c listen_addresses= -c max_connections=50"
        self.call("pg_ctl", "-w", "-l", "log", "-o", options, "start")
        self.url = f"postgresql:///postgres?host={self.dir}&user=broker"

    def call(self, program: str, *args: str) -> None:
        command, null = [str(self.bin / program), "-D", "db", *args], subprocess.DEVNULL
        subprocess.run(command, cwd=self.dir, stdin=null, stdout=null, check=True, **self.user)

    def remove(self) -> None:
        if os.getpid() == self.owner:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.call("pg_ctl", "-w", "-m", "immediate", "stop")
            shutil.rmtree(self.dir, ignore_errors=True)


@functools.cache
def postgresql() -> Server:
    """The server of this test run, started by the first test that needs it."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *filter(None, [shutil.which("initdb")])]
    if not found:
        raise unittest.SkipTest("needs PostgreSQL: there is no initdb (Debian: apt install postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        raise unittest.SkipTest('needs PostgreSQL\'s client: pip install "psycopg[binary]"')
    return Server(Path(found[0]).parent)


class PostgreSQLTest(ForkTest):
    """A broker on the URL of a running server without our schema; the path is still that of a file."""

    def setUp(self) -> None:
        self.server = postgresql()
        super().setUp()
        self.environ.update(PYTHONPATH=os.pathsep.join(filter(None, sys.path)), BROKER_SYNC_MODE="FULL")
        os.environ.update(self.environ)
        self.sql("DROP SCHEMA IF EXISTS simplebroker CASCADE")
        self.url = self.server.url
        self.logging_url = f"{self.url}&options=-c%20log_statement%3Dall"
        self.tasks = self.broker().queue("q")

    def sql(self, statement: str) -> int:
        """Run a statement as the server's owner; return its number of rows."""
        with importlib.import_module("psycopg").connect(self.server.url, autocommit=True) as connection:
            return connection.execute(statement).rowcount

    def broker(self, **options: Any) -> Broker:
        broker = Broker(options.pop("url", self.url), **options)
        self.addCleanup(broker.close)
        return broker

    def b(self) -> Broker:
        return self.tasks.broker


class ContractOfPostgreSQL(PostgreSQLTest, QueueContract):
    """Through a runner that is given. (The other tests go through the URL.)"""

    def broker(self, **options: Any) -> Broker:
        runner = importlib.import_module("simplebroker_postgresql").PostgreSQLRunner(self.url)
        self.addCleanup(runner.close)
        return Broker(runner=runner)


class ContractOfPostgreSQLCommand(PostgreSQLTest, ContractOfCommandLine):
    """Through the URL, each operation in a process."""

    def setUp(self) -> None:
        super().setUp()
        self.environ["BROKER_DEFAULT_DB_NAME"] = self.url


class PostgreSQLRoom(PostgreSQLTest):
    """What is not in the contract."""

    def statements(self, act: Callable[[], object]) -> int:
        """How many messages the clients that log have sent while act() ran: each is a round trip."""
        log = self.server.dir / "log"
        before = log.read_text().count("LOG:  statement:")
        act()
        return log.read_text().count("LOG:  statement:") - before

    def test_a_dump_goes_to_postgresql_and_back_and_is_the_same_while_others_write(self) -> None:
        source, server = Broker(self.path), self.b()
        self.addCleanup(source.close)
        bodies = ["", "a\n", "\\", "it's", "%s :x ?", "\u00e9\U0001f600\x01\x7f", "x" * 70_000]
        for name in ("b", "a.B", "a-b", "a_b", "A"):
            source.queue(name).write_many(bodies)
        source.queue("b").write("later", delay=3600)
        source.queue("b").release(source.queue("b").lease(), delay=60, reason="it's \\ % ?")
        source.queue("A").lease(3600)
        lines = list(source.dump())
        self.assertEqual(server.load(lines), 36)
        dump = server.dump()
        self.assertEqual([next(dump), next(dump)], lines[:2])
        server.delete_all()
        self.tasks.write("new")
        self.assertEqual(list(dump), lines[2:])

    def test_a_body_with_u0000_is_refused_by_name(self) -> None:
        lines = [HEADER, *['{"type": "message", "queue": "q", "body": "a\\u0000", "id": 5}'] * 2]
        for start, act in (("", lambda: self.tasks.write("\0")), ("line 2: ", lambda: self.b().load(lines))):
            with self.assertRaisesRegex((MessageError, UsageError), rf"\A{start}PostgreSQL.*U\+0000"):
                act()
        self.tasks.write("fine")
        self.assertEqual((self.tasks.count(), self.tasks.read()), (1, "fine"))

    def test_transactions_nest_and_are_all_or_nothing(self) -> None:
        other = self.broker(settings=Settings(busy_timeout_ms=200)).queue("q")
        with self.b().transaction():
            self.tasks.write("a")
            with self.assertRaises(ZeroDivisionError), self.b().transaction():
                self.tasks.write("b")
                with self.assertRaises(ZeroDivisionError), self.b().transaction():
                    self.tasks.write("c")
                    raise ZeroDivisionError
                self.assertBodies(self.tasks, ["a", "b"])
                raise ZeroDivisionError
            self.tasks.write("d")
            with self.assertRaisesRegex(OperationalError, "busy"):
                other.write("no")
            self.assertEqual(other.count(), 0)
        with self.assertRaisesRegex(OperationalError, "nothing was changed"), self.b().transaction() as run:
            self.tasks.write("e")
            with self.assertRaises(DatabaseError):
                run("SELECT nonsense", fetch=True)
        translated = mock.patch("simplebroker_postgresql.translated", lambda sql: self.b().runner.is_busy() and other())
        other = functools.partial(self.tasks.write, "in a signal handler")
        with translated, self.assertRaisesRegex(OperationalError, "in the middle"):
            self.tasks.write("f")
        self.assertBodies(self.tasks, ["a", "d"])

    def test_a_reader_that_checkpoints_by_id_misses_nothing_of_eight_writers(self) -> None:
        def work(number: int) -> None:
            queue, seen, last = Queue("q", self.url + "&options=-cdefault_transaction_isolation%3Dserializable"), 0, 0
            for _ in range(100 if number else 0):
                queue.write("x")
            while not number and seen < 800:  # what it misses makes it miss the deadline
                for message in queue.peek_many(50, after=last):
                    seen, last = seen + 1, message.id

        self.together(9, work)

    def test_kills_and_restarts_lose_nothing_and_acknowledge_nothing_twice(self) -> None:  # noqa: C901
        each = 1000 if FULL else 250
        log = open(self.dir / "log", "a", buffering=1)  # of all processes, line by line
        self.addCleanup(log.close)

        def logged(kind: str) -> Counter[str]:
            lines = (self.dir / "log").read_text().splitlines()
            return Counter(line.partition(" ")[2] for line in lines if line.startswith(kind))

        def until_done(act: Callable[[], object]) -> tuple[Any, bool]:
            """What act() returns when the server is there, and whether the outcome of a call before was unknown."""
            unknown = False
            while True:
                try:
                    return act(), unknown
                except OperationalError as error:
                    unknown |= "unknown" in str(error)
                    time.sleep(0.05)

        def write(name: int) -> None:
            queue = Queue("q", self.url)
            for number in range(each):
                if until_done(lambda: queue.write(f"{name}.{number}"))[1]:
                    print(f"doubtful {name}.{number}", file=log)

        def consume(child: Child) -> None:
            queue = Queue("q", self.url)
            while True:
                message, _ = until_done(lambda: queue.lease(2, wait=1.0))
                if message is not None:
                    print(f"leased {message} {message.id}", file=log)
                    with contextlib.suppress(LeaseLost):  # it was acknowledged before a restart, or is another's
                        if not until_done(lambda: queue.ack(message))[1]:
                            print(f"acknowledged {message.id}", file=log)

        writers = [self.child(lambda child, name=name: write(name)) for name in range(2)]
        workers = [self.child(consume) for _ in range(4)]
        for kill, mode in enumerate(("", "", "", "fast", "", "", "immediate", "")):
            self.wait_for(lambda: len(logged("acknowledged")) > kill * each // 8, "acknowledgements")
            if mode:
                self.server.call("pg_ctl", "-w", "-l", "log", "-m", mode, "restart")
            victim = workers.pop(0)
            victim.end()
            self.assertEqual(victim.wait(), -signal.SIGKILL)
            workers.append(self.child(consume))
        self.assertEqual([writer.wait() for writer in writers], [0, 0])
        self.wait_for(lambda: not until_done(self.b().queues)[0], "the end of the queue")
        for worker in workers:
            worker.end()
        self.assertEqual(max(logged("acknowledged").values()), 1)
        written = Counter(line.split()[0] for line in logged("leased"))
        self.assertEqual(set(written), {f"{name}.{number}" for name in range(2) for number in range(each)})
        self.assertLessEqual({body for body, count in written.items() if count > 1}, set(logged("doubtful")))

    def test_a_stopped_client_blocks_the_others_for_the_documented_time_only(self) -> None:
        self.tasks.write("a")
        patient = self.broker(settings=Settings(busy_timeout_ms=30_000)).queue("q")

        def hold(child: Child) -> None:
            with self.assertRaisesRegex(OperationalError, "nothing was changed"), Broker(self.url).transaction() as run:
                run(ext.SELECT_VERSION, fetch=True)
                child.say("inside")
                child.hear()
                run(ext.RECORD_NEWEST)

        child = self.child(hold)
        self.assertEqual(child.hear(), "inside")
        child.signal(signal.SIGSTOP)
        began = time.monotonic()
        patient.write("b")
        self.assertLess(time.monotonic() - began, PG_IDLE_S + 5)
        child.say()
        child.signal(signal.SIGCONT)
        self.assertEqual(child.wait(), 0)

    def test_a_machine_whose_clock_is_ahead_steals_no_lease(self) -> None:
        self.tasks.write("a")
        self.assertEqual(self.tasks.lease(30), "a")
        now = time.time_ns
        with mock.patch("time.time_ns", lambda: now() + HOUR_NS), mock.patch("time.time", lambda: now() / NS + 3600):
            ahead = self.broker(url=f"{self.url}&application_name=ahead").queue("q")
            self.assertIsNone(ahead.lease(30))
            self.assertLess(ahead.write("b"), now() + HOUR_NS // 2)

    def test_a_lost_connection_is_an_error_once_and_says_what_is_unknown(self) -> None:
        end = "SELECT pg_terminate_backend(pid, 9000) FROM pg_stat_activity WHERE application_name = 'simplebroker'"
        self.tasks.write("a")
        self.sql(end)
        self.tasks.write("b")  # it was idle: nothing was in doubt
        with self.assertRaisesRegex(OperationalError, "lost, nothing was changed"), self.b().transaction():
            self.tasks.write("c")
            self.sql(end)
            self.tasks.write("d")
        other = self.broker(url=f"{self.url}&application_name=other")
        with ThreadPoolExecutor(1) as pool, other.transaction() as run:
            run(ext.SELECT_VERSION, fetch=True)
            write = pool.submit(self.tasks.write, "e")
            self.wait_for(lambda: self.sql(f"{end} AND wait_event = 'advisory'"), "the write to wait for the lock")
            self.assertIn("unknown", str(write.exception()))
        self.assertBodies(self.tasks, ["a", "b"])

    def test_threads_and_forks_share_a_runner(self) -> None:
        self.tasks.write("parent")
        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(lambda number: self.tasks.write(str(number)), range(80)))
            with self.b().transaction():
                self.tasks.write("both")
                child = self.child(lambda child: self.tasks.write("child"))
            self.assertEqual(child.wait(), 0)
        self.assertEqual((len(set(ids)), self.tasks.count()), (80, 83))

    def test_an_idle_watcher_is_woken_and_asks_once_a_second(self) -> None:
        def watch(child: Child) -> None:
            QueueWatcher("q", lambda *_: child.say(str(time.monotonic_ns())), db=self.logging_url).watch()

        child, woken = self.child(watch), []
        for _ in range(20):
            self.tasks.write("x")
            written = time.monotonic_ns()
            woken.append((int(child.hear()) - written) / 1e6)
            time.sleep(0.05)  # it is idle then
        self.assertLess(min(statistics.median(woken[n : n + 5]) for n in range(16)), 10 if FULL else 50)  # when quiet
        time.sleep(1.0)
        self.assertLessEqual(self.statements(lambda: time.sleep(3.0)), 4)

    def test_a_write_is_one_round_trip_and_the_others_are_two(self) -> None:
        queue, held = self.broker(url=self.logging_url).queue("q"), []
        queue.write_many(["a", "b", "c"])
        for trips, act, *args in (
            (1, queue.write, "x"), (1, queue.write_many, ["y", "z"]), (2, queue.read), (2, queue.read_many, 2),
            (2, lambda: held.append(queue.lease())), (2, lambda: queue.ack(held[0])), (1, queue.peek), (1, queue.count),
        ):  # fmt: skip
            with self.subTest(act):
                self.assertEqual(self.statements(lambda: act(*args)), trips)

    def test_the_commands_work_on_a_url(self) -> None:
        for queue in ("q", "other"):
            self.assertRan(self.cli("write", queue, queue, "-f", self.url), b"")
        self.assertIn(b'"messages": 2', self.cli("--status", "--json", "-f", self.url).stdout)
        self.assertRegex(self.cli("top", "-f", self.url).stdout, rb"(?m)^\w+ +\d+ +0 +0 +\d+s  #+$")
        work = [*PYTHON, "-m", "simplebroker", "read", "other"]
        self.assertRan(self.cli("-f", self.url, "work", "q", "--drain", "--", *work), b"other\n")
        for option, status, named in (("--vacuum", 0, b"VACUUM FULL simplebroker."), ("--cleanup", 1, b"DROP SCHEMA")):
            done = self.cli("-f", self.url, option)
            self.assertRan(done, b"", status)
            self.assertIn(named, done.stderr)
        self.tasks.write("c")
        child = self.python("import simplebroker; simplebroker.run_and_exit()", "-f", self.url, "watch", "q")
        self.assertEqual(child.stdout.readline(), b"c\n")  # type: ignore[union-attr]
        child.send_signal(signal.SIGTERM)
        self.assertEqual(child.wait(DEADLINE_S), 0)

    def test_no_password_is_shown(self) -> None:
        place = f"{self.url.partition('///')[2]}&connect_timeout=2&password=XQ"
        for rest, status in (
            ("XQ?:QX@", 0), ("XQ@:1", 1), ("XQ@QX@", 1), ("XQ/QX@", 1), ("1/QX@", 1), ("XQ QX@", 1), ("XQ%zz@", 1),
        ):  # fmt: skip
            with self.subTest(rest):
                done = self.cli("--status", "-f", f"postgresql://broker:{rest}/{place}")
                self.assertRan(done, None, status)
                self.assertNotRegex(done.stdout + done.stderr, b"XQ|QX")


# ---------------------------------------------------------------------------------------------------
# Faults of the first edition (CASES.md 1 to 22, 70 to 76) that no test above is about.
# ---------------------------------------------------------------------------------------------------


class CasesTest(ConsumerTest):
    """Each names its case, trap or trial."""

    def test_where_no_thread_can_be_started_waiters_look_by_themselves_and_the_next_one_tries_again(self) -> None:
        """Case 3, trap 28."""
        queue = self.queue()
        queue.write("a")
        with mock.patch("threading.Thread.start", side_effect=RuntimeError("can't start new thread")):
            with self.assertLogs("simplebroker", "WARNING"):
                self.assertEqual(queue.read(wait=5), "a")
                started = time.monotonic()
                self.assertIsNone(queue.read(wait=0.3))
            self.assertGreaterEqual(time.monotonic() - started, 0.3)
            before = len(descriptors())
            for _ in range(20):
                with self.assertLogs("simplebroker", "WARNING"):
                    queue.read(wait=0.05)
            self.assertLessEqual(len(descriptors()), before)
        timer = threading.Timer(0.1, queue.write, ["b"])
        timer.start()
        self.assertEqual(queue.read(wait=DEADLINE_S), "b")
        timer.join()

    def test_a_watcher_outlives_a_directory_that_cannot_be_read_for_a_while(self) -> None:  # case 4, trap 29
        def work() -> None:
            logging.disable(logging.CRITICAL)  # of this process
            self.path, recorder = self.dir / "own" / "test.db", Recorder()
            queue = Queue("q", self.path)
            queue.write("a")
            self.start(recorder)
            self.assertHandled(recorder, ["a"])
            self.wait_for(lambda: queue.stats().total == 0, "the acknowledgement, whose transaction writers share")
            self.path.parent.chmod(0)
            try:
                self.assertRaises(OperationalError, queue.write, "x")
                time.sleep(1.2)  # longer than any look
            finally:
                self.path.parent.chmod(0o700)
            queue.write("b")
            self.assertHandled(recorder, ["a", "b"])

        self.unprivileged(work)

    @unittest.skipUnless(sys.implementation.name == "cpython", "needs CPython: a fork that runs no hooks")
    def test_a_fork_that_runs_no_hooks_is_refused_in_the_child_and_harmless_to_the_parent(self) -> None:
        """Case 6, trap 33."""
        code = """
            import ctypes, os, sys
            from simplebroker import OperationalError, Queue
            queue = Queue("q", sys.argv[1])
            queue.write("a")
            pid = ctypes.PyDLL(None).fork()
            if not pid:
                answers = []
                for act in (queue.read, lambda: queue.write("lost"), queue.count, Queue("other", sys.argv[1]).count):
                    try:
                        act()
                    except OperationalError as error:
                        answers.append("after the fork" in str(error))
                os._exit(0 if answers == [True] * 4 else 1)
            print(os.waitpid(pid, 0)[1], flush=True)
            queue.write("b")
        """
        self.assertEqual(self.python(code, str(self.path)).communicate(timeout=DEADLINE_S)[0], b"0\n")
        self.assertBodies(self.queue(), ["a", "b"])

    def test_a_handler_that_ends_its_thread_counts_as_an_attempt(self) -> None:  # case 11, trap 34
        logging.disable(logging.CRITICAL)
        self.addCleanup(logging.disable, logging.NOTSET)
        queue = self.queue()
        ends: list[type[BaseException]] = [SystemExit, KeyboardInterrupt, asyncio.CancelledError]
        for number, end in enumerate(ends):
            queue.write_many(["poison", "next"])
            for attempt in (1, 2):
                watcher = QueueWatcher(queue, mock.Mock(side_effect=end("stop")), max_attempts=2, batch_size=2)
                with self.subTest(end.__name__, attempt=attempt), self.assertRaises(end):
                    watcher.watch()
                states = [(str(m), m.attempt, m.state) for m in queue.peek_all(held=True)]
                self.assertEqual(states, [("poison", 1, "ready"), ("next", 0, "ready")][attempt - 1 :])
            buried = queue.broker.queue("q.dead").read()
            assert buried is not None
            self.assertEqual(buried.reason, f"{end.__name__}: stop (attempt 2)", number)
            queue.delete()

    def test_a_watcher_made_before_a_fork_gives_back_what_fails_in_the_child(self) -> None:  # case 12
        queue = self.queue()
        queue.write("a")
        handler = mock.Mock(side_effect=ValueError("no"))
        watcher = QueueWatcher(queue, handler, error_handler=lambda *_: False)

        def work(child: Child) -> None:
            watcher.watch()
            self.assertEqual(queue.stats()[:3], (1, 0, 0))

        self.assertEqual(self.child(work).wait(), 0)
        self.assertEqual([(m.attempt, m.reason) for m in queue.peek_all()], [(1, "ValueError: no")])

    @unittest.skipUnless(sys.implementation.name == "cpython", "needs CPython: C code that handles signals")
    def test_a_signal_that_c_code_handles_is_left_alone(self) -> None:  # case 16
        code = """
            import ctypes, signal, sys
            from simplebroker import QueueWatcher
            libc = ctypes.CDLL(None)
            libc.signal(signal.SIGTERM, libc.abs)  # any function of C
            del sys.modules["signal"], sys.modules["_signal"]  # Python looks only when it imports them (not in 3.9)
            watcher = QueueWatcher("q", lambda m, ts: watcher.request_stop(), db=sys.argv[1])
            watcher.queue.write("a")
            watcher.watch()
            print("watched")
        """
        self.assertEqual(self.python(code, str(self.path)).communicate(timeout=DEADLINE_S)[0], b"watched\n")

    @unittest.skipUnless(sys.implementation.name == "cpython", "needs CPython: subinterpreters")
    def test_a_subinterpreter_that_may_start_no_thread_waits_by_looking(self) -> None:
        """Case 16; from CPython 3.12 on, not even the object of a daemon thread can be made there."""
        inside = f"""
            import os, sys
            sys.path[:] = {sys.path!r}
            from simplebroker import Queue
            queue = Queue("q", {str(self.path)!r})
            queue.write("a")
            os.write(1, repr([queue.read(wait=5), queue.read(wait=0.2)]).encode())
        """
        code = """
            import sys
            try:
                import _interpreters as interpreters  # from 3.13 on
            except ImportError:
                import _xxsubinterpreters as interpreters
            interpreters.run_string(interpreters.create(), sys.argv[1])
        """
        child = self.python(code, textwrap.dedent(inside), stderr=subprocess.DEVNULL)
        self.assertEqual(child.communicate(timeout=DEADLINE_S)[0], b"['a', None]")

    def test_a_second_hard_link_is_refused(self) -> None:  # case 17
        self.queue().write("a")
        link = self.dir / "link.db"
        os.link(self.path, link)
        for queue in (self.other(), Queue("q", link)):
            self.assertRaisesRegex(DatabaseError, "hard links", queue.write, "b")
        link.unlink()
        self.assertBodies(self.queue(), ["a"])

    def test_a_waiter_of_a_custom_runner_is_woken_in_a_forked_child(self) -> None:  # case 18
        broker = Broker(runner=self.plain_runner())

        def work(child: Child) -> None:
            with broker.waiter() as waiter:
                self.assertTrue(waiter.wait(0.9))  # it would look by itself after a second

        with broker.waiter():  # the parent's thread runs at the fork
            self.assertEqual(self.child(work).wait(), 0)

    def test_rows_of_other_programs_are_refused_or_read(self) -> None:  # case 20
        queue = self.queue()
        queue.write("a")
        insert = "INSERT INTO messages (id, queue, body, held_until) VALUES (?, ?, ?, ?)"
        for row in ((5, "q", b"blob", None), (5, "q", "x", "soon"), (0, "q", "x", None), (2**63 - 1, "q", "x", None)):
            with self.assertRaises(sqlite3.IntegrityError, msg=str(row)):
                self.sqlite(insert, *row)
        self.sqlite("INSERT INTO messages (id, queue, body) VALUES (5, 'q', CAST(x'61ff62' AS TEXT))")
        self.assertBodies(queue, ["a\ufffdb", "a"])
        self.assertEqual(queue.read(), "a\ufffdb")

    def test_the_log_shrinks_again_after_a_reader_held_it_up(self) -> None:  # case 21, trap 22
        settings = Settings(sync_mode="OFF", wal_autocheckpoint=10)
        queue = self.queue(settings=settings)
        queue.write_many(["x" * 1000] * 20)
        lines = queue.broker.dump()
        next(lines)
        for _ in range(30):
            queue.write_many(["x" * 1000] * 50)
        log = Path(f"{self.path}-wal")
        self.assertGreater(log.stat().st_size, 1_000_000)
        list(lines)
        for _ in range(30):
            queue.write("x")
        self.assertLessEqual(log.stat().st_size, 4 * 10 * simplebroker.PAGE_BYTES + 65536)

    def test_a_child_forked_in_a_transaction_leaves_it_to_the_parent_also_at_its_exit(self) -> None:
        """The first fault of the trials. (The transaction is larger than the cache, so part of it is in the log.)"""
        code = """
            import os, sys
            from simplebroker import Broker, Settings
            broker = Broker(sys.argv[1], settings=Settings(cache_mb=1))
            queue = broker.queue("q")
            with broker.transaction():
                queue.write_many([f"{number} " + "x" * 300_000 for number in range(20)])
                pid = os.fork()
                if not pid:
                    sys.exit(0)  # not os._exit: everything is torn down
                os.waitpid(pid, 0)
                queue.write("20 ")
        """
        self.python(code, str(self.path), stderr=subprocess.DEVNULL).communicate(timeout=DEADLINE_S)
        self.assertEqual([message.split()[0] for message in self.queue().peek_all()], [str(n) for n in range(21)])

    def test_a_fork_during_a_dump_does_not_cut_it_short_and_a_vacuum_does_not_wait_for_it(self) -> None:
        """The second fault of the trials, and case 13."""
        queue = self.queue(settings=Settings(sync_mode="OFF"))
        queue.write_many(["x" * 1000] * 500)
        lines = queue.broker.dump()
        next(lines)

        def work(child: Child) -> None:
            with self.assertRaisesRegex(OperationalError, "after the fork"):
                list(lines)

        self.assertEqual(self.child(work).wait(), 0)
        queue.delete()
        started = time.monotonic()
        queue.broker.vacuum()
        self.assertLess(time.monotonic() - started, 4)  # the busy timeout is 5 s
        self.assertEqual(len(list(lines)), 500)

    def test_a_fork_waits_for_the_statement_of_a_dump_in_another_thread(self) -> None:
        """Its connection was closed inside SQLite: the process crashed, or the child hung."""
        inside, go = threading.Event(), threading.Event()

        def wait(sql: str) -> None:
            if sql.startswith(slow):
                inside.set()
                go.wait(DEADLINE_S)

        self.queue().write("a")
        pool = ThreadPoolExecutor(2)
        self.addCleanup(pool.shutdown)
        for slow in ("BEGIN", "SELECT queue"):  # noqa: B007 - wait() looks at it
            with in_each_statement(wait):
                dump = pool.submit(list, self.broker().dump())
                self.assertTrue(inside.wait(DEADLINE_S))
            fork = pool.submit(self.child, lambda child: None)
            with self.assertRaises(FutureTimeout):
                fork.result(0.3)
            go.set()
            self.assertEqual((len(dump.result()), fork.result().wait()), (2, 0))
            inside.clear()
            go.clear()

    def test_an_iterator_that_is_collected_in_the_middle_of_an_operation_gives_back_soon(self) -> None:
        """PyPy collects anywhere, and so does CPython in a cycle. Threads hung, or met a cursor that was in use."""

        def collect(sql: str) -> None:
            if cycles and sql.startswith(during):
                cycles.clear()
                gc.collect()
                _ = during == "SELECT" and left.count()  # as a signal handler may do

        problems, cycles = [], []
        for during in ("BEGIN", "INSERT", "COMMIT", "SELECT"):  # noqa: B007 - collect() looks at it
            patches = mock.patch("sys.unraisablehook", problems.append), in_each_statement(collect)
            with self.subTest(during), patches[0], patches[1], self.broker() as broker:
                left, queue = broker.queue(f"left.{during}"), broker.queue("q")
                left.write_many(["a", "b", "c"])
                iterator = left.read_all()
                next(iterator)
                cycles.append([iterator])
                cycles[0].append(cycles[0])
                del iterator
                with broker.transaction() if during == "INSERT" else contextlib.nullcontext():
                    queue.write("x")
                    self.assertEqual(queue.read(), "x")
                self.assertEqual(cycles, [])
                self.wait_for(lambda: left.count() == 3, "what was left to be given back")
        self.assertEqual(problems, [])

    def test_threads_that_fork_at_once_leave_the_database_free(self) -> None:
        """Where the busy timeout is shorter than a fork, the mutex was never released."""
        queue = self.queue(settings=Settings(busy_timeout_ms=0, sync_mode="OFF"))
        queue.write("a")
        barrier = threading.Barrier(3)

        def fork(number: int) -> None:
            barrier.wait(DEADLINE_S)
            for _ in range(20):
                self.assertEqual(self.child(lambda child: None).wait(), 0)

        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-5)
        with ThreadPoolExecutor(3) as pool:
            self.assertEqual(list(pool.map(fork, range(3))), [None] * 3)
        queue.write("b")
        self.assertBodies(queue, ["a", "b"])

    def test_forks_beside_threads_that_open_and_close_brokers_never_hang(self) -> None:
        """The third fault of the trials, trap 18."""
        self.queue().write("a")
        stop = threading.Event()

        def open_and_close() -> None:
            while not stop.is_set():
                Broker(self.path, settings=Settings(cache_mb=5)).close()

        with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as at_the_end:
            at_the_end.callback(stop.set)
            for _ in range(2):
                pool.submit(open_and_close)
            for _ in range(30):
                child = self.child(lambda child: self.assertEqual(Queue("q", self.path).peek(), "a"))
                self.assertEqual(child.wait(), 0)

    def test_a_reader_that_opens_just_as_the_file_is_deleted_finds_nothing(self) -> None:
        """The fourth fault of the trials."""

        def work(child: Child) -> None:
            child.say("ready")
            while True:
                with Broker(self.path) as broker:
                    broker.queue("q").write("a")
                    broker.delete_database()

        self.assertEqual(self.child(work).hear(), "ready")
        for _ in range(300):
            with Broker(self.path) as broker:
                self.assertIn(broker.queue("q").peek(), (None, "a"))

    def test_all_that_is_due_is_moved_however_much_and_in_which_order_it_became_due(self) -> None:
        """A reader of the second edition found it."""
        clock = Clock()
        broker = self.broker(clock=clock)
        for source, act in (("a", lambda q: q.move_all("b")), ("c.dead", lambda q: broker.queue("c").requeue())):
            queue = broker.queue(source)
            for number in range(2 * simplebroker.MAX_PROMOTED + 5):
                queue.write(f"{number}", until=clock.ns + (1000 - number) * NS)
            clock.ns += 2000 * NS
            self.assertEqual((act(queue), queue.stats().total), (2 * simplebroker.MAX_PROMOTED + 5, 0))


# ---------------------------------------------------------------------------------------------------
# Running: the tests mostly wait for processes and times, so the classes run in as many processes as there are cores.
# ---------------------------------------------------------------------------------------------------


# PyPy 3.9 crashes in processes that were forked to run many tests.
CAN_SHARE = HAS_FORK and sys.implementation.name == "cpython"
# One more than cores, as many tests wait for something.
JOBS = int(os.environ.get("TEST_JOBS", min(4, (os.cpu_count() or 1) + 1))) if CAN_SHARE else 1
SUITES: list[unittest.TestSuite] = []  # one for each class


class Elsewhere(str):
    """The name of a test that ran in another process: it stands for the test in a result."""

    def shortDescription(self) -> None:
        """It has none."""


def run_suite(number: int) -> tuple[int, list[tuple[str, str, str]]]:
    """In another process: run the tests of a class. How many were there, and which did not succeed, and why?"""
    result = unittest.TestResult()
    SUITES[number].run(result)
    kinds = {"errors": result.errors, "failures": result.failures, "skipped": result.skipped}
    return result.testsRun, [(kind, str(test), text) for kind, found in kinds.items() for test, text in found]


class ManyProcesses(unittest.TestSuite):
    """Runs the suites in it, one for each class, in JOBS forked processes."""

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        SUITES[:] = [suite for suite in self if isinstance(suite, unittest.TestSuite) and suite.countTestCases()]
        if JOBS < 2 or len(SUITES) < 2:
            return super().run(result, debug)
        with ProcessPoolExecutor(JOBS, multiprocessing.get_context("fork")) as pool:
            running = [pool.submit(run_suite, number) for number in range(len(SUITES))]
            for done in as_completed(running):
                count, unsuccessful = done.result()
                result.testsRun += count
                for kind, name, text in unsuccessful:
                    test: Any = Elsewhere(name)
                    if kind == "skipped":
                        result.addSkip(test, text)
                    else:
                        getattr(result, kind).append((test, text))
        return result


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    """The protocol of unittest."""
    return ManyProcesses(tests)
