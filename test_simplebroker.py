"""Tests of SimpleBroker: ``python -m unittest`` from the repository root, nothing installed.

One TestCase per room of simplebroker.py, in the order of the rooms, then the command line, crashes and
the examples. What needs an optional tool is skipped without it. FULL_TESTS=1 repeats the random ones
more often, TEST_JOBS=1 runs the classes one after the other, TEST_SOAK_S=1200 makes the soak test last so long.
"""

from __future__ import annotations

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
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import unittest
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
    @NEEDS_LOCKS
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

    @NEEDS_LOCKS
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

    @NEEDS_LOCKS
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

    @NEEDS_LOCKS
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
        empty = json.dumps({**json.loads(HEADER), "last_ts": "0" * 19})
        return [[], [empty], *states]

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


# ---------------------------------------------------------------------------------------------------
# The contract of every way in; Broker, transactions, dump and load, Queue, leases.
# ---------------------------------------------------------------------------------------------------


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

    def held(self, queue: str) -> list[tuple[str, str, int, str | None]]:
        """All messages: body, state, attempt, reason."""
        return [(str(m), m.state, m.attempt, m.reason) for m in self.q(queue).peek_all(held=True)]

    def requeue(self, queue: str, source: str | None = None, limit: int | None = None) -> int:
        return self.q(queue).requeue(source, limit)

    def rename(self, old: str, new: str) -> bool:
        return bool(self.b().rename(old, new))

    def dead_letter(self, queue: str, lease: Lease, dest: str | None = None, reason: str | None = None) -> bool:
        try:
            self.q(queue).dead_letter(lease.handle, dest, reason=reason)
        except LeaseLost:
            return False
        return True

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
        return {name: tuple(stats)[:3] for name, stats in self.b().queues().items()}  # type: ignore[misc]

    def broadcast(self, body: str, pattern: str | None = None, queues: Sequence[str] | None = None) -> bool:
        return bool(self.b().broadcast(body, pattern, queues))

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
        bodies = ["", " ", "a\n", "\n\n", "-x", "--all", "'\"\\", "\u00e9\u65e5\U0001f600", "a\tb\r\n", "{}"]
        bodies.append("x" * 70_000)
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

    def test_delete_obeys_bounds_held_ones_too(self: Any) -> None:
        ids = [self.write("q", str(number), delay=60 if number == 1 else 0) for number in range(5)]
        self.lease("q")
        self.assertFalse(self.delete("q", before=ids[0]))
        self.assertTrue(self.delete("q", before=ids[2]))
        self.assertTrue(self.delete("q", after=ids[2], before=ids[4]))
        self.assertEqual([body for body, *_ in self.held("q")], ["2", "4"])
        self.assertTrue(self.delete("q", after=ids[2]))
        self.assertEqual(self.read_many("q", None), ["2"])

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
        self.assertEqual((self.queues(), self.read("q"), self.read("q")), ({"q": (1, 0, 1)}, "b", None))

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

    def test_a_dead_letter_tells_why_and_a_requeue_begins_anew(self: Any) -> None:
        for body in "abc":
            self.write("q", body)
        for reason in ("exit status 3", "timed out after 30s"):
            self.assertTrue(self.dead_letter("q", self.lease("q"), reason=reason))
        self.assertTrue(self.dead_letter("q", self.lease("q"), "morgue"))
        expected = [("a", "ready", 0, "exit status 3"), ("b", "ready", 0, "timed out after 30s")]
        self.assertEqual(self.held("q.dead"), expected)
        self.assertEqual((self.requeue("q", limit=1), self.held("q")), (1, [("a", "ready", 0, None)]))
        self.assertEqual((self.requeue("q"), self.requeue("q"), self.requeue("q", "morgue")), (1, 0, 1))
        self.assertEqual(self.queues(), {"q": (3, 0, 0)})
        self.assertEqual(self.read_many("q", None), ["a", "b", "c"])

    def test_peek_shows_what_is_held_when_it_is_asked_to(self: Any) -> None:
        for body, delay in (("leased", 0), ("delayed", 60), ("given back", 0), ("ready", 0)):
            self.write("q", body, delay=delay)
        self.lease("q")
        self.settle("release", "q", self.lease("q"), 60)
        expected = [("leased", "leased", 1, None), ("delayed", "delayed", 0, None)]
        expected += [("given back", "delayed", 1, None), ("ready", "ready", 0, None)]
        self.assertEqual(self.held("q"), expected)
        self.assertEqual(self.peek_many("q", None), ["ready"])

    def test_a_rename_takes_all_messages_and_keeps_their_leases(self: Any) -> None:
        for queue, body in (("old", "a"), ("new", "b"), ("old", "c"), ("old.dead", "d")):
            self.write(queue, body)
        self.write("old", "later", delay=60)
        lease = self.lease("old")
        self.assertEqual((self.rename("old", "new"), self.rename("old", "new")), (True, False))
        self.assertEqual(self.queues(), {"new": (2, 1, 1), "old.dead": (1, 0, 0)})
        self.assertEqual(self.read_many("new", None), ["b", "c"])
        self.assertTrue(self.settle("extend", "new", lease, 60))
        self.assertTrue(self.settle("ack", "old", lease))  # whatever the queue is called by now
        self.assertEqual(self.queues(), {"new": (0, 0, 1), "old.dead": (1, 0, 0)})

    def test_a_stale_lease_removes_nothing_after_dead_letter_and_requeue(self: Any) -> None:
        """Case 2: the attempt is 1 again, and the lease is another."""
        self.write("q", "a")
        stale = self.lease("q", 0.1)
        self.wait_for(lambda: self.peek("q"), "the lease to end")
        self.assertTrue(self.dead_letter("q", self.lease("q")))
        self.assertEqual(self.requeue("q"), 1)
        new = self.lease("q")
        self.assertEqual((stale.attempt, new.attempt), (1, 1))
        for action, args in (("ack", ()), ("release", ()), ("extend", (60,))):
            self.assertFalse(self.settle(action, "q", stale, *args), action)
        self.assertFalse(self.dead_letter("q", stale))
        self.assertEqual(self.queues(), {"q": (0, 1, 0)})
        self.assertTrue(self.settle("ack", "q", new))

    def test_broadcast_makes_the_queues_that_are_named(self: Any) -> None:
        self.write("a", "x")
        self.write("b", "x")
        self.assertTrue(self.broadcast("y", queues=["b", "new", "b"]))
        self.assertEqual(self.queues(), {"a": (1, 0, 0), "b": (2, 0, 0), "new": (1, 0, 0)})

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

    def held(self, queue: str) -> list[tuple[str, str, int, str | None]]:
        records = map(json.loads, self.command("peek", queue, "--all", "--held", "--json")[1])
        return [(r["message"], r["state"], r["attempt"], r.get("reason")) for r in records]

    def requeue(self, queue: str, source: str | None = None, limit: int | None = None) -> int:
        options = [*(["--from", source] if source else []), *(["-n", str(limit)] if limit else [])]
        status, lines = self.command("requeue", queue, *options)
        return 0 if status else int(lines[0])

    def rename(self, old: str, new: str) -> bool:
        return self.command("rename", old, new)[0] == 0

    def dead_letter(self, queue: str, lease: Lease, dest: str | None = None, reason: str | None = None) -> bool:
        options = [*(["--to", dest] if dest else []), *(["--reason", reason] if reason else [])]
        return self.command("dead-letter", queue, lease.handle, *options, statuses=(0, 1))[0] == 0

    def settle(self, action: str, queue: str, lease: Lease, *args: float) -> bool:
        flag = {"release": "--delay", "extend": "--for"}.get(action, "")
        options = [part for value in args for part in (flag, f"{value}s")]
        return self.command(action, queue, lease.handle, *options, statuses=(0, 1))[0] == 0

    def queues(self) -> dict[str, tuple[int, int, int]]:
        records = map(json.loads, self.command("list", "--json")[1])
        return {record["queue"]: (record["ready"], record["leased"], record["delayed"]) for record in records}

    def broadcast(self, body: str, pattern: str | None = None, queues: Sequence[str] | None = None) -> bool:
        options = ["--pattern", pattern] if pattern else [part for name in queues or () for part in ("--queue", name)]
        return self.command("broadcast", body, *options)[0] == 0

    def dump(self) -> list[str]:
        return self.command("dump", statuses=(0,))[1]

    def load(self, lines: Iterable[str]) -> bool:
        return self.command("load", stdin="".join(f"{line}\n" for line in lines), statuses=(0, 1))[0] == 0


class BrokerRoom(CoreTest):
    def test_stats_tell_the_oldest_that_is_ready_what_is_due_included(self) -> None:
        clock = Clock()
        broker = self.broker(clock=clock)
        queue = broker.queue("q")
        self.assertEqual(queue.stats(), Stats(0, 0, 0, None))
        late, first = queue.write("late", delay=5), queue.write("first")
        self.assertEqual((queue.stats(), broker.queues()), (Stats(1, 0, 1, first), {"q": Stats(1, 0, 1, first)}))
        clock.ns += 6 * NS
        self.assertEqual((queue.stats(), broker.queues()), (Stats(2, 0, 0, late), {"q": Stats(2, 0, 0, late)}))
        queue.delete(message_id=late)
        queue.lease(60)
        self.assertEqual((queue.stats(), queue.stats().total), (Stats(0, 1, 0, None), 1))

    def test_a_closed_broker_says_so(self) -> None:
        broker = self.broker()
        queue = broker.queue("q")
        queue.write("x")
        queue.close()  # which does not close the broker
        self.assertEqual(broker.queue("q").count(), 1)
        broker.close()
        broker.close()
        acts = (broker.queues, broker.vacuum, broker.status, broker.transaction, broker.delete_all, broker.waiter)
        last = (broker.delete_database, queue.read, queue.peek, lambda: list(broker.dump()), lambda: queue.write("x"))
        for act in (*acts, *last):
            with self.assertRaisesRegex(UsageError, "closed: make a new one"):
                act()
        self.assertBodies(self.queue(), ["x"])


class TransactionTest(ForkTest):
    def setUp(self) -> None:
        super().setUp()
        self.results: dict[str, Any] = {}
        self.calls: Counter[str] = Counter()

    def start(self, **works: Callable[[], object]) -> list[threading.Thread]:
        """Run each in a thread, and note what it returns or raises."""
        barrier = threading.Barrier(len(works) + 1)

        def note(name: str, work: Callable[[], object]) -> None:
            barrier.wait(DEADLINE_S)
            try:
                self.results[name] = work()
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                self.results[name] = error

        threads = [threading.Thread(target=note, args=item) for item in works.items()]
        for thread in threads:
            thread.start()
            self.addCleanup(thread.join, DEADLINE_S)
        barrier.wait(DEADLINE_S)
        return threads

    def join(self, threads: list[threading.Thread]) -> None:
        for thread in threads:
            thread.join(DEADLINE_S)
            self.assertFalse(thread.is_alive())

    def test_a_transaction_is_kept_whole_or_not_at_all(self) -> None:
        broker = self.broker()
        a, b = broker.queue("a"), broker.queue("b")
        a.write("before")
        with self.assertRaises(ZeroDivisionError), broker.transaction():
            b.write(str(a.read()))
            a.write_many(["x"] * 100)
            self.assertEqual(b.peek(), "before")
            raise ZeroDivisionError
        self.assertEqual((a.read_many(9), b.count()), (["before"], 0))
        with broker.transaction():
            a.write("x")
            b.write("y")
            with Broker(self.path, settings=Settings(cache_mb=3)) as other:
                self.assertEqual(other.queues(), {})
        self.assertEqual((a.read(), b.read()), ("x", "y"))

    def test_an_inner_transaction_is_undone_alone_and_kept_with_the_outer(self) -> None:
        broker = self.broker()
        queue = broker.queue("q")
        with broker.transaction():
            queue.write("outer")
            with self.assertRaises(KeyError), broker.transaction():
                queue.write("inner")
                raise KeyError
            with self.assertRaises(LeaseLost):
                queue.ack(Message("x", 5, "q", lease=5))
            with broker.transaction():
                queue.write("kept")
        self.assertEqual(queue.read_many(9), ["outer", "kept"])
        with self.assertRaises(KeyError), broker.transaction():
            with broker.transaction():
                queue.write("inner")
            raise KeyError
        self.assertEqual(queue.count(), 0)

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
                        with self.assertRaises(OperationalError):
                            queue.write("B" * 8_000_000)
                        for act in (lambda: queue.write("c"), queue.read, lambda: queue.write_many(["d", "e"])):
                            with self.assertRaisesRegex(OperationalError, "rolled"):
                                act()
                        finish()
                    self.assertEqual(queue.count(), 0)
            with Broker(self.path) as broker:
                broker.queue("q").write("afterwards")

        self.assertEqual(self.child(work).wait(), 0)
        self.assertBodies(self.queue(), ["afterwards"])

    @unittest.skipUnless(hasattr(os, "fdatasync"), "needs fdatasync")
    def test_threads_that_wait_at_the_same_time_share_a_commit(self) -> None:
        """Counted in syncs: fewer than threads, in one of the rounds."""
        broker = self.broker(settings=Settings(sync_mode="FULL"))
        queue = broker.queue("q")
        queue.write("first")
        written: list[int] = []

        def syncs_of_a_round() -> int:
            with mock.patch.object(os, "fdatasync", side_effect=os.fdatasync) as sync:
                with broker.transaction():
                    queue.write("holds the lock")
                    threads = self.start(**{str(number): lambda: queue.write("x") for number in range(8)})
                    threads[0].join(0.05)
                self.join(threads)
            written.extend(self.results.values())
            return sync.call_count

        if hasattr(os, "fdatasync"):
            self.wait_for(lambda: syncs_of_a_round() < 9, "a commit that is shared")
        else:
            syncs_of_a_round()
        self.assertEqual(len(set(written)), len(written))
        self.assertLessEqual(set(written), {message.id for message in queue.peek_all()})

    def test_an_error_or_an_exit_of_one_thread_is_its_own_and_nobody_is_called_twice(self) -> None:
        broker, main = self.broker(), threading.main_thread().ident
        queue = broker.queue("q")
        callers: dict[str, int] = {}

        def act(name: str, error: BaseException | None = None) -> Callable[[], object]:
            def function(run: Any) -> str:
                self.calls[name] += 1
                callers[name] = threading.get_ident()
                queue.write(name)
                if error is not None:
                    raise error
                return name

            return lambda: broker.transact(function)

        for number in range(12):
            self.calls.clear()
            queue.write("gone")
            gone = queue.lease(60)
            assert gone is not None
            queue.delete()
            with broker.transaction():
                threads = self.start(
                    a=act("a"), key=act("key", KeyError("half")), b=act("b"), exit=act("exit", SystemExit(3)),
                    lost=lambda gone=gone: queue.ack(gone), c=act("c"), interrupt=act("interrupt", KeyboardInterrupt()),
                )  # fmt: skip
                threads[0].join(0.02)
            if number % 2:
                act("main")()
                callers.pop("main")  # another thread may have done it
            self.join(threads)
            kinds = {name: type(result).__name__ for name, result in self.results.items()}
            expected = {"a": "str", "b": "str", "c": "str", "key": "KeyError", "exit": "SystemExit"}
            self.assertEqual(kinds, {**expected, "lost": "LeaseLost", "interrupt": "KeyboardInterrupt"})
            self.assertEqual((self.results["a"], self.results["b"], self.results["c"]), ("a", "b", "c"))
            self.assertEqual(set(self.calls.values()), {1})
            self.assertNotIn(main, callers.values())  # an interrupt comes there: it does only its own work
            self.assertEqual(sorted(queue.read_many(9)), ["a", "b", "c", *(["main"] if number % 2 else [])])


class DumpAndLoad(ForkTest):
    MESSAGE: ClassVar[dict[str, Any]] = {"type": "message", "queue": "q", "body": "x", "id": "1837025672140161024"}

    def line(self, **changes: Any) -> str:
        return json.dumps({**self.MESSAGE, **changes})

    def fill(self, broker: Broker) -> None:
        """Messages of every state."""
        a, b, c = (broker.queue(name) for name in "abc")
        b.write_many(["1", "2\n", "\u00e9\u65e5\U0001f600", "\0", '"\\'])
        a.write_many([str(number) for number in range(100)])
        a.write("later", delay=3600)
        a.lease(3600)
        for _ in range(2):
            released = b.lease(3600)
            assert released is not None
            b.release(released, reason="exit status 3")
        c.write("later", delay=3600)
        broker.queue("gone").write("x")
        broker.queue("gone").read()

    def test_a_loaded_dump_dumps_the_same(self) -> None:
        broker = self.broker()
        self.fill(broker)
        lines = list(broker.dump())
        with Broker(self.dir / "copy.db") as copied:
            self.assertEqual(copied.load(lines), 107)
            self.assertEqual(list(copied.dump()), lines)
            first = copied.queue("b").peek()
            assert first is not None
            self.assertEqual((str(first), first.attempt, first.reason), ("1", 2, "exit status 3"))
            self.assertGreater(copied.queue("q").write("x"), int(json.loads(lines[0])["last_ts"]))
        with Broker(self.dir / "bytes.db") as copied:
            self.assertEqual(copied.load(line.encode() + b"\n" for line in lines), 107)
            self.assertEqual(list(copied.dump()), lines)

    def test_the_shape_of_a_dump(self) -> None:
        """Numbers of 19 digits are strings (case 43)."""
        broker = self.broker()
        broker.queue("q").count()
        self.assertEqual(json.loads(next(iter(broker.dump())))["last_ts"], "0" * 19)
        self.fill(broker)
        header, *records = map(json.loads, broker.dump())
        self.assertEqual(header, {**json.loads(HEADER), "last_ts": str(broker.status()["last_ts"])})
        self.assertTrue(all(record["type"] == "message" for record in records))
        for record in records:
            for name in {"id", "held_until"} & set(record):
                self.assertRegex(record[name], r"\A[0-9]{19}\Z")
        keys = [(record["queue"], record["id"]) for record in records]
        self.assertEqual(keys, sorted(keys))
        extras = Counter(tuple(sorted(set(record) - set(self.MESSAGE))) for record in records)
        states = {("attempt", "held_until"): 1, ("held_until",): 2, ("attempt", "reason"): 1, (): 103}
        self.assertEqual(extras, states)
        self.assertNotIn("\\u00e9", "".join(broker.dump()))
        with Broker(self.dir / "small.db") as small:
            small.load([HEADER, self.line(id=7)])
            self.assertEqual(json.loads(list(small.dump())[1])["id"], "7".zfill(19))

    def test_a_leased_message_comes_back_as_delayed_until_its_time(self) -> None:
        clock = Clock()
        broker = self.broker(clock=clock)
        queue = broker.queue("q")
        for body in ("leased", "ready"):
            queue.write(body)
        queue.lease(100)
        queue.write("delayed", delay=100)
        lines = list(broker.dump())
        self.assertNotIn("lease", "".join(json.loads(lines[1])))
        with Broker(self.dir / "copy.db", clock=clock) as copied:
            copied.load(lines)
            self.assertEqual(copied.queue("q").stats()[:3], (1, 0, 2))
            clock.ns += 101 * NS
            found = copied.queue("q").read_many(9)
            self.assertEqual([(str(m), m.attempt) for m in found], [("leased", 1), ("ready", 0), ("delayed", 0)])

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

    def test_a_bad_line_is_named_shortly_and_nothing_is_loaded(self) -> None:
        """Case 19: errors are short, whatever the line; ids lie before the year 2200."""
        year_2200 = int(datetime(2200, 1, 2, tzinfo=timezone.utc).timestamp()) * NS
        without_id = {key: value for key, value in self.MESSAGE.items() if key != "id"}
        long = "9" * 300_000
        bad: list[str | bytes] = [
            "", "\n", "{", "[]", "null", "5", '"text"', "{}", "nonsense", long, f'"{long}"', f'{{"{long}',
            '{"type": "message"}', '{"type": "other"}', HEADER, json.dumps(without_id),
            b"\xff\xfe\xfd", b'{"type": "message", "queue": "q", "id": 7, "body": "\xff"}',
            "[" * 100_000, '{"a":' * 100_000, '{"type": "message", "queue": "q", "body": "\\ud800", "id": 7}',
        ]  # fmt: skip
        changes: dict[str, tuple[Any, ...]] = {
            "id": (0, -1, 1.5, True, None, "x", 2**63, "9" * 20, "", "\uff11", [1], long, [long], year_2200, 2**63 - 1),
            "queue": ("", None, "a b", ["q"], "q\n", long, [long]),
            "body": (None, 5, ["x"], {}, {"x": long}),
            "held_until": ("soon", -1, 1e30, long, True),
            "attempt": (-1, "x", None, long, 2**63),
            "reason": (5, ["x"]),
            "type": (None, ["message"], long, {"x": long}),
        }
        bad += [self.line(**{name: value}) for name, values in changes.items() for value in values]
        broker = self.broker()
        broker.queue("q").write("before")
        before = list(broker.dump())
        for line in bad:
            with self.subTest(line[:60]):
                fine = [self.line(id=id) for id in range(1, 4)]
                with self.assertRaisesRegex(UsageError, r"\Aline 5: ") as caught:
                    broker.load([HEADER, *fine, line, fine[0]])
                self.assertLess(len(str(caught.exception)), 250)
                self.assertNotIn("\n", str(caught.exception))
                self.assertEqual(list(broker.dump()), before)

    def test_a_dump_begins_with_its_header(self) -> None:
        message = self.line()
        wrong = (
            HEADER.replace("simplebroker-dump", "other"),
            HEADER.replace('"version": 1', '"version": 2'),
            HEADER.replace('"version": 1', '"version": "1"'),
            *(HEADER.replace('"0"', last) for last in ('"-5"', '"x"', f'"{2**63 - 4096}"', "9" * 300_000)),
        )
        for lines in ([message], *[[line, message] for line in wrong]):
            with self.assertRaisesRegex(UsageError, r"\Aline 1: ") as caught:
                self.broker().load(lines)
            self.assertLess(len(str(caught.exception)), 250)
        with self.assertRaisesRegex(UsageError, "nothing to load"):
            self.broker().load([])
        self.assertEqual(self.broker().load([HEADER]), 0)
        self.queue().write("still writable")

    def test_an_id_that_exists_already_is_an_error_that_names_the_line(self) -> None:
        broker = self.broker()
        broker.queue("q").write("x")
        lines = list(broker.dump())
        with self.assertRaisesRegex(IntegrityError, r"\Aline 2: .*id exists already"):
            broker.load(lines)
        with self.assertRaisesRegex(IntegrityError, r"\Aline 3: .*id exists already"):
            broker.load([HEADER, self.line(queue="z"), self.line(queue="z")])
        self.assertEqual(list(broker.dump()), lines)

    def test_writers_are_not_held_up_by_a_dump(self) -> None:
        broker = self.broker(settings=Settings(sync_mode="NORMAL", busy_timeout_ms=1000))
        queue = broker.queue("q")
        queue.write_many([str(number) for number in range(5000)])
        lines = broker.dump()
        next(lines)
        queue.write("meanwhile")
        self.assertEqual(len(queue.read_many(1000)), 1000)
        self.assertEqual(len(list(lines)), 5000)


class QueueTest(ForkTest):
    """What only Python sees."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.b = self.broker(clock=self.clock)
        self.q = self.b.queue("q")

    def test_a_loop_over_read_does_not_end_at_an_empty_body(self) -> None:
        """Trap 39."""
        self.q.write_many(["a", "", "b"])
        found = []
        while message := self.q.read():
            found.append(str(message))
        self.assertEqual(found, ["a", "", "b"])

    def test_a_message_tells_its_state_and_when_it_is_due(self) -> None:
        q, now = self.q, self.clock.ns
        ids = [q.write("leased"), q.write("delayed", delay=7), q.write("due", delay=1), q.write("ready")]
        leased = q.lease(5)
        assert leased is not None
        self.assertEqual((leased.state, leased.due), ("leased", now + 5 * NS))
        self.clock.ns += 2 * NS
        expected = [("leased", now + 5 * NS), ("delayed", now + 7 * NS), ("ready", None), ("ready", None)]
        for found in (q.peek_many(9, held=True), list(q.peek_all(held=True)), [q.peek(message_id=id) for id in ids]):
            self.assertEqual([(m.state, m.due) for m in found if m], expected)
            self.assertEqual([m.lease for m in found if m], [None] * 4)  # no token is shown
        self.assertEqual(q.peek_many(2, after=ids[0], held=True), ["delayed", "due"])
        self.assertEqual(list(q.peek_all(before=ids[2], held=True)), ["leased", "delayed"])

    def test_delay_and_until_mean_the_same_moment(self) -> None:
        due = self.clock.ns + 60 * NS
        self.q.write("a", delay=60)
        self.q.write("b", until=datetime.fromtimestamp(due / NS, timezone.utc))
        self.q.write_many(["c", "d"], delay=60.0)
        self.q.write_many(["e"], until=due)
        for now, ready in ((due - 1, ""), (due, "abcde")):
            self.clock.ns = now
            self.assertEqual((self.q.count(), self.q.has_pending()), (len(ready), bool(ready)))
        self.assertEqual(self.q.read_many(9), list("abcde"))

    def test_write_many_is_all_or_nothing_and_in_order(self) -> None:
        def bodies() -> Iterator[str]:
            yield from ("a", "b")
            raise ZeroDivisionError

        with self.assertRaises(ZeroDivisionError):
            self.q.write_many(bodies())
        for bad in (["a", "\ud800"], ["a"] * 100 + [5]):
            with self.assertRaises((MessageError, TypeError)):
                self.q.write_many(bad)  # type: ignore[arg-type]
        self.assertEqual((self.q.count(), self.q.write_many([])), (0, []))
        self.assertEqual(self.q.write_many(iter("ab")), [m.id for m in self.q.peek_all()])
        for count in (1, 63, 64, 65, 1000, 4097):
            self.q.delete()
            ids = self.q.write_many(map(str, range(count)))
            self.assertEqual([(m.id, str(m)) for m in self.q.peek_all()], list(zip(ids, map(str, range(count)))))
            self.assertEqual(ids, sorted(set(ids)))
        for bad in ("abc", b"abc"):
            with self.assertRaisesRegex(TypeError, "goes to write"):
                self.q.write_many(bad)  # type: ignore[arg-type]

    def test_large_bodies_and_large_batches_come_back_whole(self) -> None:
        large = "\u00e9" * (5 * 2**20)  # ten megabytes, the most that is allowed
        self.q.write(large)
        self.assertEqual(self.q.peek_many(2**70), [large])  # a huge limit is allowed
        with self.assertRaisesRegex(MessageError, "BROKER_MAX_MESSAGE_SIZE"):
            self.q.write(large + "x")
        bodies = [str(number) * 20_000 for number in range(100)]
        self.q.write_many(bodies)
        self.assertEqual(self.q.read(), large)
        self.assertEqual(self.q.peek_many(100), bodies)
        self.assertEqual(list(self.q.read_all()), bodies)

    def test_misused_delays_leases_and_reasons_are_refused(self) -> None:
        q: Any = self.q
        q.write("a")
        message = q.lease(60)
        acts = (
            lambda value: q.write("x", delay=value), lambda value: q.write_many(["x"], delay=value), q.lease,
            lambda value: q.extend(message, value), lambda value: q.release(message, delay=value),
            lambda value: LeasesInFlight(q, value), lambda value: list(q.read_all(lease=value)),
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
            # Case 19: a year beyond the numbers is no OverflowError.
            for bad in (-1, 2**63, datetime(2024, 1, 15), datetime(2300, 1, 1, tzinfo=timezone.utc)):
                with self.subTest(bad), self.assertRaises(ValueError):
                    act(bad)
        for act in (
            lambda: q.write("x", delay=5, until=5), lambda: q.write_many(["x"], delay=5, until=5),
            lambda: LeasesInFlight(q, 0), lambda: q.read(wait=-1), lambda: q.lease(wait=float("nan")),
            lambda: q.dead_letter(message, "q"), lambda: q.requeue("q"), lambda: q.dead_letter(message, "no good"),
        ):  # fmt: skip
            with self.assertRaises(ValueError):
                act()
        for act in (lambda: q.release(message, reason=5), lambda: q.dead_letter(message, reason=b"x")):
            with self.assertRaises(TypeError):
                act()
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
        runner = PlainRunner(self.dir / "other.db")
        self.addCleanup(runner.close)
        with self.assertRaisesRegex(TypeError, "custom runner"):
            pickle.dumps(Queue("q", runner=runner))

    def test_a_wait_ends_when_a_message_comes_by_another_process_or_becomes_due(self) -> None:
        queue = self.queue()
        queue.write("first")
        ids: list[int] = []
        for take in (queue.read, queue.lease):
            self.assertIsNotNone(take(wait=DEADLINE_S))  # what is there already
            child = self.child(lambda child: (child.hear(), self.queue().write("by another")))
            child.say("go")
            found = take(wait=math.inf)
            assert found is not None
            ids.append(found.id)
            self.assertEqual((str(found), child.wait()), ("by another", 0))
            queue.write("due", delay=0.05)
            self.assertEqual(take(wait=DEADLINE_S), "due")
            self.assertIsNone(take(after=found.id, wait=0))
            self.assertIsNone(take(wait=0.01))
            queue.write("first")
        self.assertLess(*ids)

    def test_a_wait_follows_the_clock_of_the_broker(self) -> None:
        """Case 19: what is due by that clock is found although the time of the machine is another."""
        self.q.write("x", delay=3600)
        self.assertIsNone(self.q.read(wait=0.02))
        self.clock.ns += HOUR_NS
        self.assertEqual(self.q.read(wait=DEADLINE_S), "x")

    def test_peek_all_misses_nothing_while_rows_are_deleted(self) -> None:
        """Trap 6."""
        bodies = [str(number) for number in range(5000)]
        ids = self.q.write_many(bodies)
        seen = []
        for message in self.q.peek_all():
            seen.append(message)
            if message.id == ids[500]:
                self.q.read_many(400)  # behind it
            if message.id == ids[1000]:
                self.q.move_many("d", 1500, after=ids[2000])  # before it
            if message.id % 7 == 0:
                self.q.delete(message_id=message.id)
        moved = {message.id for message in self.b.queue("d").peek_all()}
        self.assertEqual([m for m in seen if m.id not in moved], [b for b, id in zip(bodies, ids) if id not in moved])
        self.assertEqual([m.id for m in seen], sorted({m.id for m in seen}))

    def test_leaving_read_all_gives_back_the_message_and_its_batch(self) -> None:
        bodies = [str(number) for number in range(100)]
        self.q.write_many(bodies)
        for error in (ZeroDivisionError, KeyboardInterrupt, SystemExit):
            with self.assertRaises(error), contextlib.closing(self.q.read_all()) as messages:  # type: ignore[type-var]
                for message in messages:
                    if message.endswith("9"):
                        raise error
            self.assertEqual(self.q.stats().leased, 0)
        self.assertBodies(self.q, bodies[9:])

    @unittest.skipIf(sys.implementation.name == "pypy", "needs CPython: PyPy closes no generator at its end")
    def test_read_all_that_is_broken_off_by_the_end_of_a_script_ends_at_once(self) -> None:
        """Case 5, trap 30: and the message is given back."""
        self.queue().write_many(["a", "b", "c"])
        code = """
            from simplebroker import Queue
            messages = Queue("q", "test.db").read_all()
            print(next(messages), flush=True)
        """
        for number in range(3):
            child = self.python(code, stderr=subprocess.PIPE)
            out, err = child.communicate(timeout=DEADLINE_S)
            self.assertEqual((child.returncode, out.decode().split(), err), (0, ["a"], b""))
            queue = self.queue()
            self.assertEqual(queue.stats()[:3], (3, 0, 0))
            self.assertEqual([message.attempt for message in queue.peek_all()], [number + 1, 0, 0])

    def test_a_fork_inside_read_all_leaves_the_leases_to_the_parent(self) -> None:
        queue = self.queue()
        queue.write_many(["a", "b", "c", "d"])
        messages = queue.read_all()
        self.assertEqual([next(messages), next(messages)], ["a", "b"])

        def work(child: Child) -> None:
            messages.close()  # type: ignore[attr-defined]
            self.assertEqual(queue.stats().leased, 2)
            queue.write("of the child")

        self.assertEqual(self.child(work).wait(), 0)
        self.assertEqual(queue.stats().leased, 2)
        self.assertEqual(list(messages), ["c", "d", "of the child"])
        self.assertEqual(queue.stats().total, 0)


class WorkTest(CoreTest):
    """Counted in steps of SQLite's machine, and in syncs, so that nothing depends on the machine of the test."""

    def opened(self, name: str) -> tuple[Broker, PlainRunner, Clock]:
        runner, clock = PlainRunner(self.dir / name), Clock()
        runner.connection.execute("PRAGMA synchronous = OFF")
        self.addCleanup(runner.close)
        return Broker(runner=runner, clock=clock), runner, clock

    @staticmethod
    def steps(runner: PlainRunner, act: Callable[[], object]) -> int:
        """How many times ten steps of SQLite's machine an operation takes."""
        count = [0]

        def tick() -> int:
            count[0] += 1
            return 0

        runner.connection.set_progress_handler(tick, 10)
        act()
        runner.connection.set_progress_handler(None, 0)
        return count[0]

    def assertNoGrowth(self, measure: Callable[[int], dict[str, int]], few: int, many: int) -> None:
        small, large = measure(few), measure(many)
        grown = {name: (small[name], large[name]) for name in large if large[name] > 2 * small[name] + 20}
        self.assertEqual(grown, {})

    def operations(self, queue: Queue, empty: Queue, ids: list[int], leased: Message) -> dict[str, Callable[[], Any]]:
        middle, last = ids[len(ids) // 2], ids[-1]
        return {
            "write": lambda: queue.write("x"), "read": queue.read, "peek": queue.peek, "pending": queue.has_pending,
            "lease": lambda: queue.lease(60), "move": lambda: queue.move("d"), "extend": lambda: queue.extend(leased),
            "ack": lambda: queue.ack(leased), "read by id": lambda: queue.read(message_id=middle),
            "peek after": lambda: queue.peek(after=middle), "read after": lambda: queue.read_many(2, after=middle),
            "peek by id": lambda: queue.peek(message_id=last), "delete by id": lambda: queue.delete(message_id=last),
            "peek_all": lambda: next(queue.peek_all()), "pending after": lambda: queue.has_pending(after=middle),
            "empty read": empty.read, "empty pending": empty.has_pending, "empty lease": empty.lease,
            "empty delete": empty.delete, "empty stats": empty.stats, "empty requeue": empty.requeue,
        }  # fmt: skip

    def test_the_work_of_an_operation_does_not_grow_with_the_depth_or_with_other_queues(self) -> None:
        def measure(depth: int) -> dict[str, int]:
            broker, runner, _ = self.opened(f"{depth}.db")
            queue = broker.queue("q")
            ids = queue.write_many(["ready"] * depth)
            for name in ("q", "other"):
                broker.queue(name).write_many(["held"] * depth, delay=3600)
                broker.queue(name + ".2").write_many(["ready"] * depth)
            leased = queue.lease(60)
            assert leased is not None
            acts = self.operations(queue, broker.queue("empty"), ids, leased)
            return {name: self.steps(runner, act) for name, act in acts.items()}

        self.assertNoGrowth(measure, 100, 3000)

    def test_what_becomes_due_elsewhere_at_once_stalls_nobody(self) -> None:
        """Case 9, trap 32."""

        def measure(depth: int) -> dict[str, int]:
            broker, runner, clock = self.opened(f"{depth}.db")
            broker.queue("other").write_many(["due"] * depth, delay=5)
            queue = broker.queue("q")
            ids = queue.write_many(["ready"] * 20)
            leased = queue.lease(60)
            assert leased is not None
            clock.ns += 6 * NS
            acts = self.operations(queue, broker.queue("empty"), ids, leased)
            return {name: self.steps(runner, act) for name, act in acts.items()}

        self.assertNoGrowth(measure, 200, 5000)

    def test_many_queues_with_a_held_message_each_are_dumped_and_deleted_in_one_walk(self) -> None:
        """Case 8: ten times the queues are ten times the work."""

        def measure(number: int) -> list[int]:
            broker, runner, _ = self.opened(f"{number}.db")
            for name in range(number):
                broker.queue(f"q{name}").write("held", delay=60)
            acts: list[Callable[[], object]] = [lambda: list(broker.dump()), broker.queues, broker.delete_all]
            acts.insert(2, lambda: [broker.queue(f"q{name}").delete() for name in range(0, number, 2)])
            return [self.steps(runner, act) for act in acts]

        for few, many in zip(measure(100), measure(1000)):
            self.assertLess(many, 15 * few + 100)

    @unittest.skipUnless(hasattr(os, "fdatasync"), "needs fdatasync")
    def test_one_sync_for_each_operation_that_must_be_durable_and_none_for_the_others(self) -> None:
        """Lease, extend and release may be undone by a power cut; nothing changed, nothing synced."""
        queue = self.queue(settings=Settings(sync_mode="FULL"))
        queue.write_many(["x"] * 50)
        leased = [queue.lease(60) for _ in range(5)]
        acts: tuple[tuple[int, Callable[[], object]], ...] = (
            (1, lambda: queue.write("x")), (1, lambda: queue.write_many(["x"] * 100)), (1, queue.read),
            (1, lambda: queue.read_many(5)), (1, lambda: queue.move("d")), (1, lambda: queue.move_many("d", 5)),
            (1, lambda: queue.ack(leased[0])), (1, lambda: queue.dead_letter(leased[1])), (1, queue.requeue),
            (1, lambda: queue.broker.rename("d", "e")), (1, lambda: queue.broker.broadcast("x")),
            (1, lambda: queue.delete(message_id=leased[2].id)),
            (0, lambda: queue.extend(leased[3])), (0, lambda: queue.release(leased[3])), (0, lambda: queue.lease(60)),
            (0, queue.peek), (0, queue.stats), (0, lambda: queue.read(after=simplebroker.MAX_ID)),
            (0, lambda: queue.move("d", after=simplebroker.MAX_ID)), (0, queue.broker.queues),
        )  # fmt: skip
        counts = []
        for _, act in acts:
            with mock.patch.object(os, "fdatasync", side_effect=os.fdatasync) as sync:
                act()
            counts.append(sync.call_count)
        self.assertEqual(counts, [expected for expected, _ in acts])


class LeasesTest(ForkTest):
    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.b = self.broker(clock=self.clock)
        self.q = self.b.queue("q")

    def leased(self, seconds: float = 60, queue: Queue | None = None) -> Message:
        message = (queue or self.q).lease(seconds)
        assert message is not None
        return message

    def settle(self, message: Message, queue: Queue | None = None) -> tuple[Callable[[], object], ...]:
        """All that may be done with a lease."""
        q = queue or self.q
        acts = (q.ack, q.extend, q.release, q.dead_letter)
        return (*[functools.partial(act, message) for act in acts], lambda: q.release(message, delay=5, reason="x"))

    def assertLost(self, message: Message, why: str, queue: Queue | None = None) -> None:
        for act in self.settle(message, queue):
            self.assertRaisesRegex(LeaseLost, why, act)

    def test_an_ended_lease_is_still_good_while_nobody_took_the_message(self) -> None:
        self.q.write_many(["a", "b", "c"])
        first, second, third = self.leased(10), self.leased(10), self.leased(10)
        self.clock.ns += 11 * NS
        self.assertEqual(self.q.count(), 3)
        self.q.extend(first, 30)
        self.assertEqual(self.q.stats()[:3], (2, 1, 0))
        self.assertEqual(self.q.peek_many(9), ["b", "c"])
        self.q.ack(second)
        self.q.release(third, delay=60)
        self.clock.ns += 29 * NS
        self.assertEqual(self.q.stats()[:3], (0, 1, 1))
        self.q.ack(first)
        self.assertEqual(self.q.stats()[:3], (0, 0, 1))

    def test_a_stale_holder_cannot_touch_what_was_given_to_another(self) -> None:
        """Case 2, trap 26: whatever happened in between, and although the attempt is 1 again."""

        def expire_and_lease() -> Message:
            self.clock.ns += 11 * NS
            return self.leased()

        def dead_letter_and_requeue() -> None:
            self.q.dead_letter(expire_and_lease())
            self.assertEqual(self.q.requeue(), 1)

        def move_there_and_back() -> None:
            self.clock.ns += 11 * NS
            self.q.move("d")
            self.b.queue("d").move("q")

        def dump_delete_load() -> None:
            lines = list(self.b.dump())
            self.q.delete()
            self.b.load(lines)
            self.clock.ns += 11 * NS

        def give_back() -> None:
            with LeasesInFlight(self.q) as leases:
                self.clock.ns += 11 * NS
                self.assertEqual(len(leases.take()), 1)

        def release_and_rename() -> None:
            self.q.release(expire_and_lease())
            self.b.rename("q", "d")
            self.b.rename("d", "q")

        ways = (expire_and_lease, dead_letter_and_requeue, move_there_and_back, dump_delete_load, give_back)
        for way in (*ways, release_and_rename):
            with self.subTest(way.__name__):
                self.q.delete()
                self.q.write("a")
                stale = self.leased(10)
                way()
                if way is not expire_and_lease:
                    self.assertLost(stale, "lost|gone")  # nobody has it now, and still it is not his
                    self.assertEqual(self.q.stats()[:3], (1, 0, 0))
                    new = self.leased()
                    self.assertLost(stale, "lost: it was given back, moved, or leased by another")
                    self.q.ack(new)
                    self.assertEqual(self.b.queues(), {})
                    self.assertLost(stale, "gone: it was acknowledged, read or deleted")

    def test_a_lease_lasts_from_when_it_is_given(self) -> None:
        """Case 10, trap 31: not from when it began to wait for the lock."""
        queue = self.queue()
        queue.write_many(["a", "b"])
        kept = self.leased(60, queue)
        waits = (lambda: self.leased(60, queue).due, lambda: queue.extend(kept, 60), lambda: queue.write("c", delay=60))
        due: dict[int, int] = {}
        for number, act in enumerate(waits):
            holder = self.holder()
            thread = threading.Thread(target=act)
            thread.start()
            thread.join(0.2)  # it waits, at the latest when the holder ends
            released = time.time_ns()
            holder.say("end")
            thread.join(DEADLINE_S)
            self.assertEqual(holder.wait(), 0)
            self.queue("held").delete()
            held = queue.peek_many(9, held=True)
            message = held[(1, 0, 2)[number]]
            due[number] = (message.due or 0) - released
        for number, left in due.items():
            self.assertGreater(left, 60 * NS - 20_000_000, number)

    def test_every_lease_counts_as_an_attempt_also_after_a_release(self) -> None:
        self.q.write("a")
        for attempt, delay in enumerate((None, 5, 0, 5), 1):
            message = self.leased()
            self.assertEqual(message.attempt, attempt)
            self.q.release(message, delay=delay)
            self.clock.ns += 5 * NS
        with LeasesInFlight(self.q) as leases:
            self.assertEqual([m.attempt for m in leases.take()], [5])
        self.assertEqual(self.leased().attempt, 5)  # what was never handed over is counted down
        self.clock.ns += 61 * NS
        self.q.move("d")
        self.assertEqual(self.leased(60, self.b.queue("d")).attempt, 1)

    def test_a_reason_is_one_line_of_at_most_200_characters(self) -> None:
        self.q.write("a")
        for given, kept in (
            ("exit status 3", "exit status 3"), ("two\nlines\r\n\tof text ", "two lines of text"),
            ("x" * 9999, "x" * 200), ("", "x" * 200), (None, "x" * 200), ("\u00e9\u65e5", "\u00e9\u65e5"),
            ("red\x1b[31m", "red?[31m"),
        ):  # fmt: skip
            self.q.release(self.leased(), reason=given)
            found = [self.q.peek(), *self.q.peek_many(1), *self.q.peek_all(held=True)]
            self.assertEqual([message.reason for message in found if message], [kept] * 3)
        message = self.leased()
        self.assertEqual(message.reason, "red?[31m")  # of the attempt before
        self.q.dead_letter(message)
        self.assertEqual([m.reason for m in self.b.queue("q.dead").peek_all()], ["red?[31m"])

    def test_a_reason_is_cleared_by_move_and_requeue_and_given_with_what_is_read(self) -> None:
        q, dead, d = self.q, self.b.queue("q.dead"), self.b.queue("d")
        q.write("a")
        q.dead_letter(self.leased(), reason="exit status 3")
        self.assertEqual([message.reason for message in dead.peek_all()], ["exit status 3"])
        self.assertEqual(q.requeue(), 1)
        q.release(self.leased(), reason="again")
        q.move("d")
        self.assertEqual([(m.reason, m.attempt) for m in d.peek_all()], [(None, 0)])
        d.release(self.leased(60, d), reason="last")
        self.b.rename("d", "q")
        message = q.read()
        assert message is not None
        self.assertEqual((message.reason, message.attempt), ("last", 1))

    def test_only_what_was_leased_can_be_settled(self) -> None:
        """A peeked message of someone else's lease is no lease."""
        id = self.q.write("a")
        for peeked in (self.q.peek(), self.leased() and self.q.peek(message_id=id)):
            assert peeked is not None
            for act in self.settle(peeked):
                self.assertRaisesRegex(ValueError, "not leased by you: use lease", act)
        for act in (self.q.ack, self.q.extend, self.q.release, self.q.dead_letter):
            for bad in ("a", 5, None):
                with self.assertRaisesRegex(TypeError, "give the Message"):
                    act(bad)  # type: ignore[arg-type]
        self.assertEqual(self.q.stats()[:3], (0, 1, 0))
# ---------------------------------------------------------------------------------------------------
# Waiting, watchers and crashes.
# ---------------------------------------------------------------------------------------------------


SOON_S = 2.0  # what takes a moment takes less than this, on a loaded machine too


# A consumer that looks by itself once a minute only: what wakes it in time is the doorbell, or a mistake.
NOTIFIED_ONLY = Settings(sync_mode="OFF", max_interval_s=60)
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
        options.setdefault("db", self.broker(settings=NOTIFIED_ONLY))
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
        self.wait_for(lambda: any(t.name == "simplebroker-notifier" for t in threading.enumerate()), "the notifier")

    def test_a_message_that_is_there_is_returned_at_once(self) -> None:
        queue = self.queue(settings=NOTIFIED_ONLY)
        queue.write_many(["a", "b"])
        started = time.monotonic()
        self.assertEqual([queue.read(wait=50), queue.lease(wait=50)], ["a", "b"])
        self.assertSoon(started)

    def test_wait_zero_looks_once(self) -> None:
        queue = self.queue(settings=NOTIFIED_ONLY)
        started = time.monotonic()
        self.assertIsNone(queue.read(wait=0))
        self.assertIsNone(queue.lease(wait=0.0))
        self.assertSoon(started)

    def test_a_wait_ends_after_its_time_and_not_before(self) -> None:
        queue = self.queue(settings=NOTIFIED_ONLY)
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

    def test_only_one_of_those_who_wait_gets_the_message(self) -> None:
        queue = self.queue()
        recorders = [self.waiting(0.3, queue) for _ in range(4)]
        self.asleep()
        queue.write("one")
        self.wait_for(lambda: sum(len(recorder.calls) for recorder in recorders), "a reader")
        self.assertIsNone(queue.read(wait=0.4))  # the others have given up by then
        self.assertEqual(sum(len(recorder.calls) for recorder in recorders), 1)

    @NEEDS_INOTIFY
    def test_a_delayed_message_comes_when_it_is_due(self) -> None:
        queue = self.queue(settings=NOTIFIED_ONLY)
        recorder = self.waiting(50, queue)
        self.asleep()
        written = time.monotonic()
        self.other().write("later", delay=0.15)
        self.assertHandled(recorder, ["later"])
        self.assertGreaterEqual(recorder.calls[0][1] - written, 0.15)
        self.assertLess(recorder.calls[0][1] - written, SOON_S)

    def test_a_delay_that_was_there_before_the_wait_counts_too(self) -> None:
        queue = self.queue(settings=NOTIFIED_ONLY)
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
            with broker.waiter() as alarm:
                now[0] = due
                self.assertTrue(alarm.wait(SOON_S))
                now[0] = due + 1_000_000
                self.assertTrue(alarm.wait(SOON_S), f"round {round_number}: not woken for the second message")

    def test_a_change_before_the_wait_is_seen_by_it(self) -> None:
        queue = self.queue()
        with queue.broker.waiter() as alarm:
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
                    with broker.waiter():
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
        self.assertLessEqual(threading.active_count(), threads)
        gc.collect()
        self.assertLessEqual(len(descriptors()) if before else 0, len(before))


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

    @NEEDS_INOTIFY
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
    @NEEDS_INOTIFY
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

    @NEEDS_INOTIFY
    def test_it_rings_when_the_commit_can_be_seen_and_not_before(self) -> None:
        recorder = Recorder()
        queue = self.queue(settings=Settings(sync_mode="FULL"))  # commits take milliseconds
        self.start(recorder, peek=True)
        for _ in range(10):
            self.assertWakes(recorder, queue.write)
            self.assertWakes(recorder, lambda text: queue.write_many([text]))

    @unittest.skipUnless(sys.platform == "linux" and os.getuid() == 0, "makes a device file")
    @NEEDS_LOCKS
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
        own, late = Recorder(), self.broker(settings=NOTIFIED_ONLY)
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

    @NEEDS_INOTIFY
    @unittest.skipUnless(sys.platform == "linux", "inotify is of Linux")
    def test_without_an_inotify_watch_consumers_look_by_themselves(self) -> None:
        library = mock.Mock(wraps=ctypes.CDLL(None, use_errno=True))
        library.inotify_add_watch = mock.Mock(return_value=-1)
        with without_bell(library):
            self.check_polling()
        self.assertTrue(library.inotify_add_watch.called)

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

    @NEEDS_INOTIFY
    @unittest.skipUnless(sys.platform == "linux", "counts inotify instances")
    def test_a_hundred_watchers_share_one_notification_source(self) -> None:
        broker, names = self.broker(settings=NOTIFIED_ONLY), [f"q{number}" for number in range(100)]
        recorder = Recorder()
        self.wait_for(lambda: not any("inotify" in name for name in descriptors()), "earlier notifiers to end")
        for name in names:
            broker.queue(name).write("start")
        for name in names:
            self.start(recorder, name, db=broker)
        self.assertTrue(recorder.reached(100))
        self.wait_for(lambda: not broker.queues(), "everything to be acknowledged")
        self.assertEqual(sum("inotify" in name for name in descriptors()), 1)
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

    @NEEDS_INOTIFY
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


class LeasesInFlightTest(ConsumerTest):
    def keeper(self, lease_s: float = 30, *, name: str = "q") -> LeasesInFlight:
        keeper = LeasesInFlight(self.queue(name), lease_s)
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
        with LeasesInFlight(queue) as keeper:
            batch = keeper.take(3)
            keeper.ack(batch[0])
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
        keeper.done(released)
        queue.release(released)
        keeper.run()
        self.assertBodies(queue, ["a"])
        keeper.done(kept)
        queue.extend(kept, 0.01)
        keeper.run()
        self.assertEqual(queue.read(after=released.id, wait=5), "b")

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
            keeper.ack(*batch)
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
            seen.append((message, timestamp == message.id, message.attempt, queue.stats()[:3]))
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
        self.assertEqual(queue.stats()[:3], (0, 3, 0))
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
        self.wait_for(lambda: threading.active_count() <= threads, "the notifiers to end")
        gc.collect()  # PyPy closes the descriptor of a log when it collects
        self.wait_for(lambda: not before or len(descriptors()) <= len(before), "their descriptors to be closed")
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
        watcher = QueueMoveWatcher("q", "done", handler, db=self.broker(settings=NOTIFIED_ONLY), **options)
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
        for _ in range(10 if FULL else 1):
            seed = random.randrange(10**6)
            with self.subTest(seed=seed), mock.patch.object(simplebroker, "MAX_PROMOTED", Model.PROMOTED):
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
        rows = sorted(self.model.rows.values(), key=lambda row: (row.queue, row.id))
        self.assertEqual(int(head["last_ts"]), self.model.last)
        names = ("queue", "body", "attempt", "reason")
        self.assertEqual(
            [(int(line["id"]), int(line.get("held_until", 0)), *map(line.get, names)) for line in lines],
            [(row.id, row.held or 0, row.queue, row.body, row.attempt or None, row.reason) for row in rows],
        )
        shown = [(m.id, m.state, m.due) for name in self.NAMES for m in self.real.queue(name).peek_all(held=True)]
        states = ((row, self.model.state(row)) for name in self.NAMES for row in self.model.stored(name))
        self.assertEqual(shown, [(row.id, state, None if state == "ready" else row.held) for row, state in states])

    def do_write(self) -> None:
        body, until = f"body {self.id}" * self.rng.choice([0, 1, 1, 200]), self.until + self.rng.choice([-5, 0, 5]) * NS
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
        self.assertEqual(self.real.load(lines), len(self.model.rows))
        for row in self.model.rows.values():
            row.lease = None


class StormTest(ForkTest):
    """Processes that are stopped, continued and killed at random moments: nothing lost, nothing acknowledged twice."""

    def work(self, life: int) -> None:
        """Write, lease and acknowledge until killed; report what was written, what is tried, and what became of it."""
        fd = os.open(self.dir / f"report.{life}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        queue, rng = Queue("q", self.path, settings=Settings(sync_mode="FULL")), random.Random()

        def report(what: str, id: int | None) -> None:
            if id is not None:  # 64 bytes, which divides 4096: Linux ends the write of a killed process between pages
                os.write(fd, f"{what} {id}".ljust(63).encode() + b"\n")

        while True:
            chance = rng.random()
            if chance < 0.4:
                for id in queue.write_many(["body" * rng.choice([1, 1000])] * rng.choice([1, 1, 1, 4])):
                    report("written", id)
            elif chance < 0.5:
                last = None
                for message in queue.read_all(lease=10):
                    report("acknowledged", last)
                    last = message.id
                    report("trying", last)
                report("acknowledged", last)
            else:
                message = queue.lease(rng.choice([0.01, 0.1, 10]))
                if message is not None:
                    report("trying", message.id)
                    try:
                        queue.ack(message)
                        report("acknowledged", message.id)
                    except LeaseLost:
                        report("lost", message.id)

    def test_stopped_and_killed_processes_lose_and_double_nothing(self) -> None:
        rng, lives = random.Random(), 0
        processes: list[Child] = []
        deadline = time.monotonic() + (25 if FULL else 4)
        while time.monotonic() < deadline:
            while len(processes) < 5:
                processes.append(self.child(lambda child, life=lives: self.work(life)))
                lives += 1
            process = rng.choice(processes)
            if rng.random() < 0.7:
                process.signal(signal.SIGSTOP)
                time.sleep(rng.choice([0.001, 0.02, 0.15]))
                process.signal(signal.SIGCONT)
            else:
                process.signal(signal.SIGKILL)
                self.assertEqual(process.wait(), -signal.SIGKILL)
                processes.remove(process)
            time.sleep(rng.random() / 20)
        for process in processes:
            process.signal(signal.SIGKILL)
            self.assertEqual(process.wait(), -signal.SIGKILL)
        reports = [file.read_text().splitlines() for file in self.dir.glob("report.*")]
        words = [line.split() for lines in reports for line in lines]
        written = {id for what, id in words if what == "written"}
        acknowledged = [id for what, id in words if what == "acknowledged"]
        doubtful = {lines[-1].split()[1] for lines in reports if lines and lines[-1].startswith("trying")}
        left = {json.loads(line)["id"] for line in [*self.broker().dump()][1:]}
        self.assertEqual(written - left - doubtful - set(acknowledged), set(), "lost")
        self.assertEqual([each for each in Counter(acknowledged).items() if each[1] > 1], [], "acknowledged twice")
        self.assertEqual(left.intersection(acknowledged), set(), "acknowledged, and there again")
        self.assertGreater(len(acknowledged), 100)


class InterruptTest(ForkTest):
    """Ctrl-C after any line of any operation, in the main thread, while other threads and processes write."""

    SOURCE = inspect.getsource(simplebroker).splitlines()
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
        """Call act(), with a KeyboardInterrupt before that line of the module. False if it ended earlier.

        Not at the first line of a function, nor at those of "try" and "with": what a trace raises there no handler
        of CPython catches, but signals are not looked at there.
        """
        left = number

        def on_line(frame: Any, event: str, argument: object) -> Any:
            nonlocal left
            left -= event == "line" and not self.SOURCE[frame.f_lineno - 1].lstrip().startswith(("try:", "with "))
            if event == "line" and left == 0:
                left -= 1
                raise KeyboardInterrupt
            return on_line

        ours = simplebroker.__file__
        sys.settrace(lambda frame, *_: (lambda *_: on_line) if frame.f_code.co_filename == ours else None)
        try:
            act()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
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
        for act in (fork, lambda: queue.close(), reopen):
            synced: list[int] = []
            with Queue("q", self.path, settings=Settings(sync_mode="FULL")) as queue:
                queue.delete()
                number = os.stat(f"{self.path}-wal").st_ino
                with mock.patch("os.fdatasync", sync):
                    queue.write("of this thread")
            self.assertEqual(synced, [number, number])

    def test_an_interrupt_in_the_sync_leaves_other_threads_alone(self) -> None:
        """(case 73)"""

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

    def test_a_full_disk_is_an_error_for_all_who_share_the_transaction_and_nobody_runs_twice(self) -> None:
        """(case 74)"""
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
    """The command: as a process of its own, in a forked child, in the background, in shells and on terminals.

    All of them use test.db in the test's directory, because the environment says so.
    """

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

    def cli(self, *args: str, input: bytes | None = b"", **options: Any) -> Done:
        """Run the command as a process of its own."""
        options = {"cwd": self.dir, "env": self.environ, "capture_output": True, "timeout": DEADLINE_S, **options}
        return subprocess.run([*PYTHON, "-m", "simplebroker", *args], input=input, check=False, **options)

    def main_in_child(self, args: Sequence[str], streams: Sequence[Any], prepare: Callable[[], object]) -> None:
        """What a forked child does: main() in the test's directory and environment. It never returns."""
        status = 70
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
            prepare()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
            status = simplebroker.main(list(args))
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
            if simplebroker.__file__ in traceback.format_exc():  # main() had begun
                traceback.print_exc()
        except BaseException:  # noqa: BLE001 - whatever it is, the test must see it and the child must end
            traceback.print_exc()
        finally:
            os._exit(status)

    def fork(
        self, *args: str, input: bytes = b"", prepare: Callable[[], object] = int,
        stop: Callable[[int, int], object] = lambda pid, end: None,
    ) -> Done:  # fmt: skip
        """Run main() in a forked child, in a tenth of the time that a new interpreter takes.

        stop(pid, end) is called while it runs; the descriptor ``end`` is at its end when the child is.
        """
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            streams[0].write(input)
            streams[0].seek(0)
            end, alive = os.pipe()
            stack.callback(os.close, end)
            sys.stdout.flush()
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)  # until main() begins
            pid = os.fork()
            if not pid:
                self.main_in_child(args, streams, prepare)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(alive)
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
        """Start the command; killed at the end."""
        pipe = subprocess.PIPE
        defaults = {"cwd": self.dir, "env": self.environ, "stdin": pipe, "stdout": pipe, "stderr": pipe}
        child = subprocess.Popen([*PYTHON, "-m", "simplebroker", *args], **{**defaults, **options})
        self.addCleanup(self.reap, child)
        return child

    def finish(self, child: subprocess.Popen[bytes], stdin: bytes | None = None) -> Done:
        """Wait for a started command and return what it printed since."""
        out, err = child.communicate(stdin, timeout=DEADLINE_S)
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
        data, deadline = b"", time.monotonic() + DEADLINE_S
        while not enough(data):
            if not select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.fail(f"waited {DEADLINE_S} s; there is {data[-200:]!r}")
            with contextlib.suppress(OSError):  # a terminal whose other end was closed
                chunk = os.read(file.fileno(), size)
                data += chunk
                if chunk:
                    continue
            break
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
        records = [json.loads(line) for line in self.broker().dump()]
        return [record["body"] for record in records if record["type"] == "message"]

    def sh(self, script: str, *options: str, queue: str = "q") -> list[str]:
        """The words of a ``work`` that runs a shell script."""
        return ["work", queue, *options, "--", "sh", "-c", script]

    def on_terminal(self, theirs: io.FileIO, *args: str) -> subprocess.Popen[bytes]:
        """Start the command with a terminal of its own, as a login does."""
        import fcntl
        import termios

        child = self.start(
            *args, stdin=theirs, stdout=theirs, stderr=theirs,
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)),
        )  # fmt: skip
        theirs.close()
        return child


class CommandLineCasesTest(CommandTest):
    """CASES.md 30 to 47, each as a process of its own."""

    def test_a_message_that_looks_like_options_is_refused_with_the_remedy(self) -> None:
        """(case 30, trap 38)"""
        self.assertRefused(self.cli("write", "q", "-fast mode", stdin=subprocess.DEVNULL, input=None), "'--'")
        self.assertLines(*((f"write q {text}", "'--'") for text in ("-hello", "-test.db", "-q5", "--fast")))
        self.assertEqual(os.listdir(self.dir), [])
        self.assertLines("write q -- '-fast mode'", ("read q", b"-fast mode\n"))

    def test_no_message_and_an_empty_input_is_an_error_and_a_dash_means_it(self) -> None:
        """(case 31, trap 38)"""
        self.assertRefused(self.shell("broker write q $UNSET </dev/null"), "empty", "'-'")
        self.assertEqual(os.listdir(self.dir), [])
        self.assertLines("write q -", "write q ''", "write q --lines")
        self.assertBodies(self.queue(), ["", ""])

    def test_an_interrupted_reader_into_a_file_leaves_nothing_leased_and_prints_nothing_twice(self) -> None:
        """(case 32, trap 37)"""
        bodies, out = [str(number) for number in range(10_000)], self.dir / "out"
        for number in self.SIGNALS:
            self.queue().delete()
            self.queue("q", bodies)
            with open(out, "wb") as file:
                child = self.start("read", "q", "--all", stdout=file)
            self.wait_for(lambda: out.stat().st_size, "the first message")
            child.send_signal(number)
            self.assertEqual(self.finish(child).stderr, b"")
            left = [str(message) for message in self.queue().peek_all()]
            self.assertEqual([*out.read_text().split(), *left], bodies)
            self.assertEqual((child.returncode, self.queue().stats().leased), (128 + number if left else 0, 0))

    def test_a_foreign_database_is_refused_at_once(self) -> None:
        """(case 33, trap 41)"""
        pypi = "CREATE TABLE meta (key TEXT PRIMARY KEY, value); INSERT INTO meta VALUES ('magic', 'simplebroker-v1')"
        others = ("CREATE TABLE meta (a)", ["test.db"]), ("CREATE TABLE messages (body)", ["test.db"])
        for schema, words in (*others, (pypi, ["PyPI", "dump", "load"])):
            self.path.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(self.path)) as database:
                database.executescript(schema)
            before = self.path.read_bytes()
            self.assertRefused(self.cli("work", "q", "--drain", "--", "cat", timeout=10), *words)
            self.assertRefused(self.fork("--cleanup"), *words)
            self.assertEqual(self.path.read_bytes(), before)

    def test_the_options_of_the_command_of_work_are_its_own(self) -> None:
        """(case 34)"""
        (self.dir / "w").mkdir()
        self.queue("a", "123")
        self.assertRan(self.cli("work", "a", "-n", "1", "ls", "-d", "w"), b"w\n")
        self.assertLines(("work a -n 1 echo -q --drain -- -f", b"-q --drain -- -f\n"))
        self.assertLines(("work a --drain -- echo -- -h", b"-- -h\n"))
        self.assertEqual((os.listdir(self.dir / "w"), self.everything()), ([], []))

    def test_a_command_that_cannot_be_started_is_an_error_that_tells_why(self) -> None:
        """(case 35)"""
        self.queue("q", "a")
        for name, mode, text in ("job.sh", 0o644, "#!/bin/sh\n"), ("broken", 0o755, "#!/no/such/interpreter\n"):
            (self.dir / name).write_text(text)
            (self.dir / name).chmod(mode)
        self.assertRefused(self.cli("work", "q", "--drain", "--", "./job.sh"), "permission denied", "job.sh")
        for name in ("./none.sh", "no-such-command", "./broken"):
            self.assertLines((f"work q -j 2 {name}", f"'{name}'"))
        (message,) = self.queue().peek_many(9, held=True)
        self.assertEqual((message.attempt, message.state, message.reason), (0, "ready", None))

    def test_the_command_of_work_gets_a_line_that_a_shell_loop_sees(self) -> None:
        """(case 36)"""
        loop = 'while read -r l; do echo "$l"; done'
        script = f"printf 'x\\n' | broker write e --lines; broker work e --drain -- sh -c '{loop}'"
        self.assertRan(self.shell(script), b"x\n")

    def test_the_command_of_work_finds_the_same_database(self) -> None:
        """(case 37)"""
        (self.dir / "x").mkdir()
        del self.environ["BROKER_DEFAULT_DB_NAME"]
        self.environ["BROKER_PROJECT_SCOPE"] = "1"
        names = "$BROKER_DEFAULT_DB_LOCATION $BROKER_DEFAULT_DB_NAME $BROKER_PROJECT_SCOPE"
        for script in ("broker write out hi", f'cd /; broker write out "{names}"'):
            self.assertLines("-d x write p 1")
            self.assertRan(self.cli("-d", "x", "work", "p", "--drain", "--", "sh", "-c", script), b"")
        self.assertLines(("-d x read out --all", f"hi\n{self.dir}/x .broker.db 0\n".encode()))
        self.assertEqual(os.listdir(self.dir), ["x"])

    @NEEDS_LOCKS
    def test_a_terminal_that_closes_ends_work_as_term_does(self) -> None:
        """(case 38)"""
        self.queue("q", ["1", "2", "3"])
        ours, theirs = self.ends(*os.openpty())
        script = "echo started >>log; until [ -e go ]; do sleep 0.01; done; cat >>log"
        child = self.on_terminal(theirs, *self.sh(script))
        self.wait_for((self.dir / "log").exists)
        ours.close()
        self.assertGoesOn(child, 0.1)
        (self.dir / "go").touch()
        self.assertEqual(child.wait(DEADLINE_S), 0)
        self.assertEqual((self.dir / "log").read_text(), "started\n1\n")
        self.assertBodies(self.queue(), ["2", "3"])
        self.assertEqual(self.queue().stats().total, 2)

    def test_drain_with_dead_letters_ends_with_status_1(self) -> None:
        """(case 39)"""
        self.queue("e", "ab")
        done = self.cli("work", "e", "--drain", "--max-attempts", "2", "--backoff", "1ms", "--", "false")
        self.assertRan(done, b"", status=1)
        self.assertBodies(self.queue("e.dead"), ["a", "b"])
        self.queue("e", "ab")
        self.assertEqual(self.fork("work", "e", "-n", "1", "--max-attempts", "1", "false").returncode, 1)
        self.assertLines("work e --drain -- true")

    def test_the_last_number_of_a_progress_is_what_was_written(self) -> None:
        """(case 40, trap 40)"""
        for name, interrupted in ("ended", False), ("interrupted", True):
            ours, theirs = self.ends(*os.openpty())
            lines = subprocess.Popen(["yes", "line"], stdout=subprocess.PIPE)
            self.addCleanup(self.reap, lines)
            child = self.start("write", name, "--lines", stdin=lines.stdout, stderr=theirs)
            theirs.close()
            shown = self.read_until(ours, lambda data: re.search(rb"\d,\d\d\d", data))
            child.send_signal(signal.SIGINT) if interrupted else lines.kill()
            shown += self.read_until(ours)
            self.assertIn(child.wait(DEADLINE_S), (-signal.SIGINT, 128 + signal.SIGINT) if interrupted else (0,))
            self.assertNotIn(b"Traceback", shown)
            number = int(re.findall(rb"\d[\d,]*", shown)[-1].replace(b",", b""))
            self.assertEqual((number, shown[-1:]), (self.queue(name).count(), b"\n"))

    def test_a_command_that_needs_messages_makes_no_database(self) -> None:
        """(case 41)"""
        self.assertRan(self.cli("lease", "q"), b"", status=2)
        lines = "read q,peek q,delete q,requeue q,move q r,rename q r,broadcast x"
        self.assertLines(*((line, 2) for line in lines.split(",")), "work q --drain -- true")
        for name in ("ack", "release", "extend", "dead-letter"):
            self.assertLines((f"{name} q 1700000000000000000.1", "no database"))
        self.assertEqual(os.listdir(self.dir), [])
        self.assertLines("write q x -f 1.db", "init -f 2.db", "broadcast x --queue q -f 3.db")
        self.assertEqual([(self.dir / f"{number}.db").exists() for number in (1, 2, 3)], [True] * 3)

    def test_main_works_where_the_standard_streams_are_not_files(self) -> None:
        """(case 42)"""
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

    def test_a_dump_has_19_digits_in_strings_everywhere(self) -> None:
        """(case 43, trap 13)"""
        self.assertRan(self.cli("init"), b"")
        self.assertRan(self.cli("dump"), HEADER.replace('"0"', f'"{0:019}"').encode() + b"\n")
        line = '{"type": "message", "queue": "q", "body": "a", "id": 5, "held_until": 9000000000000000001}'
        self.assertRan(self.cli("load", input=f"{HEADER}\n{line}\n".encode()), b"")
        held = json.loads(self.cli("dump").stdout.splitlines()[1])
        self.assertEqual((held["id"], held["held_until"]), (f"{5:019}", "9000000000000000001"))
        self.assertLines((f"peek q -m {5:019} -t", f"{5:019}\ta\n".encode()))

    def test_errors_suggest_what_was_meant(self) -> None:
        """(case 44)"""
        self.assertRefused(self.cli("wirte", "read", "x"), "'wirte'", "did you mean", "write")
        self.assertLines(("stats list", "'stats'"), ("write q -hello", "'-hello' --"), ("read q -n 0", "-n 0"))
        alone = self.cli()
        self.assertIn(b"usage: broker", alone.stdout)
        self.assertLines(("help", alone.stdout))
        self.assertEqual(os.listdir(self.dir), [])
        self.queue("tasks", "x")
        self.assertRan(self.cli("read", "--wait", "tasks"), b"x\n")

    def test_exclusive_options_and_the_spellings_of_others(self) -> None:
        """(case 45)"""
        first, second = self.ids("q", "ab")
        self.assertRefused(self.cli("read", "q", "-m", first, "--all"), "-m", "--all")
        for line in ("read q", "peek q", "move q r"):
            for options in (f"-m {first} --all", "-n 1 --all", f"-m {first} -n 1"):
                self.assertLines((f"{line} {options}", options[:2]))
        self.assertLines((f"-d {self.dir} -f {self.path} read q --message {second}", b"b\n"))
        self.assertLines(("list -p q*", b"q: 1\n"), "--cleanup", "--cleanup", "--vacuum")
        self.assertEqual(os.listdir(self.dir), [])

    def test_a_release_with_a_delay_is_delayed_and_not_leased(self) -> None:
        """(case 46)"""
        self.queue("q", "a")
        lease = json.loads(self.cli("lease", "q").stdout)["lease"]
        self.assertRan(self.cli("release", "q", lease, "--delay", "1h"), b"")
        self.assertLines(("list --stats", b"q: 0 (1 total, 0 leased, 1 delayed)\n"))

    def test_the_help_of_dump_speaks_of_json(self) -> None:
        """(case 47)"""
        shown = self.cli("dump", "--help").stdout
        self.assertIn(b"JSON", shown)
        self.assertNotIn(b"json", shown.replace(b"ndjson", b"").replace(b"--json", b"").replace(b".json", b""))


class WritingCommandsTest(CommandTest):
    """write and broadcast."""

    def test_write_takes_the_body_from_its_operand_or_from_standard_input_byte_for_byte(self) -> None:
        """Also the plain and the JSON shape of what is read back; an empty body is a message (trap 39)."""
        bodies = [b"no newline", b"one\n", b"two\n\n", b"", b"\n", b"cr\r\nlf\r", b"\xe2\x82\xac\xe2\x80\xa8", b"--"]
        for number, body in enumerate([*bodies, b"nul\0nul"]):
            self.assertRan(self.fork("write", "stdin", *["-"][: number % 2 or not body], input=body), b"")
        for body in bodies:
            self.assertRan(self.fork("write", "operand", "--", body.decode(), input=b"not this"), b"")
        self.assertBodies(self.queue("operand"), [body.decode() for body in bodies])
        bodies.append(b"nul\0nul")
        printed = self.fork("peek", "stdin", "--all", "--json").stdout
        self.assertEqual([json.loads(line)["message"].encode() for line in printed.split(b"\n") if line], bodies)
        # Printed plain, each ends in exactly the newline that it has, or in one that is added.
        printed = b"".join(body if body.endswith(b"\n") else body + b"\n" for body in bodies)
        self.assertRan(self.cli("read", "stdin", "--all"), printed)
        lines = [b"-", b"--", b"--cleanup", b" -f x ", b"\t", b'{"type": "header"}', b"\x0b\x0c", b"\0", b"\xc2\x85"]
        self.assertRan(self.fork("write", "lines", "--lines", input=b"\n".join(lines)), b"")
        self.assertBodies(self.queue("lines"), [line.decode() for line in lines])

    def test_write_prints_the_id_only_when_asked_to(self) -> None:
        self.assertLines("write q 1", "write q later --delay 1h", ("read q", b"1\n"), ("read q", 2))
        shape = '{{"timestamp": "{}"}}\n'
        for options, expected in ("-t", "{}\n"), ("--json", shape), ("-t --json", shape):
            done = self.fork("write", "q", "text", *options.split())
            newest = list(self.queue().peek_all())[-1].id
            self.assertRan(done, expected.format(newest).encode())
            self.assertEqual(len(str(newest)), 19)

    def test_write_lines_makes_a_message_of_each_line_as_it_comes(self) -> None:
        queue = self.queue()
        child = self.start("write", "q", "--lines", "-t")
        child.stdin.write(b"first\nsec")
        child.stdin.flush()
        first = self.read_line(child.stdout)  # a slow producer: the first is committed, the second unfinished
        self.assertBodies(queue, ["first"])
        done = self.finish(child, b"ond\n\ncr\r\nlast")
        self.assertBodies(queue, ["first", "second", "", "cr\r", "last"])
        ids = [message.id for message in queue.peek_all()]
        self.assertRan(done, "".join(f"{id}\n" for id in ids[1:]).encode())
        self.assertEqual(first, b"%d\n" % ids[0])
        self.assertRan(self.fork("write", "soon", "--lines", "--delay", "250ms", input=b"a\nb\n"), b"")
        self.assertLines(("read soon", 2), ("read soon -n 2 --wait 20", b"a\nb\n"))

    def test_write_lines_stops_at_a_bad_line_and_keeps_those_before_it(self) -> None:
        self.environ["BROKER_MAX_MESSAGE_SIZE"] = "10"
        for name, line in ("utf8", b"b\xffd"), ("long", b"12345678901"):
            self.assertRefused(self.fork("write", name, "--lines", input=b"one\ntwo\n%b\nfour\n" % line), "line 3")
            self.assertBodies(self.queue(name), ["one", "two"])
        endless = self.start("write", "endless", "--lines")  # one that never ends is noticed before its end
        endless.stdin.write("€".encode() * 40 + b"\xe2")
        endless.stdin.flush()
        self.wait_for(lambda: endless.poll() is not None, "the refusal of a line without an end")
        self.assertRefused(self.finish(endless), "line 1", "BROKER_MAX_MESSAGE_SIZE")

    def test_bodies_that_are_too_long_or_not_utf8_are_refused_and_nothing_is_written(self) -> None:
        self.environ["BROKER_MAX_MESSAGE_SIZE"] = "10"
        lines = [["write", "q", "-"], ["write", "q", "--lines"], ["broadcast", "-", "--queue", "q"]]
        for body in ("€€€€€".encode(), b"x" * 11, b"caf\xe9", b"\xed\xa0\x80"):  # 15 bytes; 11; Latin; a surrogate
            for line in [*lines, ["write", "q", os.fsdecode(body)]]:
                words = ["BROKER_MAX_MESSAGE_SIZE"] if len(body) > 10 else ["UTF-8"]
                self.assertRefused(self.fork(*line, input=body), *words)
        for line in [*lines, ["write", "q", "é€€é"]]:  # 10 bytes
            self.assertRan(self.fork(*line, input="é€€é".encode()), b"")
        self.assertBodies(self.queue(), ["é€€é"] * 4)

    def test_broadcast_writes_to_every_queue_that_has_messages_and_matches_or_to_those_named(self) -> None:
        self.assertLines(("broadcast hello", 2))
        for name in ("jobs.a", "jobs.b", "mail"):
            self.queue(name, ["old"])
        self.queue("jobs.b").lease(60)
        self.assertRan(self.fork("broadcast", "--pattern", "jobs.*", "-", input=b"some\n"), b"")
        self.assertLines("broadcast all", ("broadcast none -p JOBS*", 2), "broadcast named --queue mail --queue new")
        self.assertBodies(self.queue("jobs.a"), ["old", "some\n", "all"])
        self.assertBodies(self.queue("jobs.b"), ["some\n", "all"])
        self.assertBodies(self.queue("mail"), ["old", "all", "named"])
        self.assertBodies(self.queue("new"), ["named"])


class TakingCommandsTest(CommandTest):
    """read, peek, move, delete, requeue, rename, and what needs a lease."""

    # Options, in which #1 to #5 stand for the ids of five messages, and which of "12345" the command then takes.
    FILTERS = {
        "": "1", "--all": "12345", "-n 2": "12", "-n 9": "12345", "-m #3": "3", "-m 1700000000000000000": "",
        "--after #2": "3", "--since #2 --all": "345", "--all --before #3": "12", "--before #5 --all --after #1": "234",
        "-n 3 --after #1": "234", "--after #5": "", "--before #1 --all": "", "-m #3 --after #3": "",
        "-m #3 --before #4": "3",
    }  # fmt: skip

    def test_read_peek_and_move_heed_every_filter(self) -> None:
        """(trap 12)"""
        for verb in ("read", "peek", "move"):
            for number, (options, expected) in enumerate(self.FILTERS.items()):
                source, dest = f"{verb}{number}", f"{verb}-dest{number}"
                ids = self.ids(source, "12345")
                line = f"{verb} {source} {dest if verb == 'move' else ''} " + options
                printed = "".join(f"{body}\n" for body in expected).encode()
                line = re.sub("#([1-5])", lambda match, ids=ids: ids[int(match[1]) - 1], line)
                self.assertLines((line, printed, 0 if expected else 2))
                left = [body for body in "12345" if verb == "peek" or body not in expected]
                self.assertBodies(self.queue(source), left)
                self.assertBodies(self.queue(dest), list(expected) if verb == "move" else [])

    def test_read_peek_and_move_print_the_three_shapes(self) -> None:
        text = 'tab\t"quote" \\ é\n'
        for line in ("peek {}", "move {} moved", "read {}"):
            for number, options in enumerate(("", "-t", "--json", "-t --json")):
                (id,) = self.ids(f"q{number}", [text])
                lined = f'{{"message": {json.dumps(text, ensure_ascii=False)}, "timestamp": "{id}"}}\n'
                expected = {"": text, "-t": f"{id}\t{text}"}.get(options, lined)
                self.assertLines((f"{line.format(f'q{number}')} {options}", expected.encode()))
                self.queue(f"q{number}").delete()

    def test_after_and_before_take_ids_and_the_usual_ways_to_write_a_time(self) -> None:
        """(trap 13)"""
        self.queue("q", ["now"])
        times = "2020-01-15,2020-01-15T10:30:00Z,2020-01-15 10:30:00.5+02:00,1579084200,1579084200.25,1579084200s"
        for text in f"{times},1579084200000,1579084200000ms,1579084200000000us,1579084200000000000".split(","):
            self.assertLines((f"peek q --after '{text}'", b"now\n"), (f"peek q --before '{text}'", 2))
        for text in ("1_579_084_200", "+1579084200", "\u0661\u0665\u0667\u0669", "1e9", "-5", "0x10", "1.5.5", ""):
            self.assertRefused(self.fork("read", "q", f"--after={text}"))

    def test_by_id_peek_and_delete_see_held_messages_and_read_and_move_do_not(self) -> None:
        (leased,) = self.ids("q", ["leased"])
        self.queue().lease(3600)
        delayed = self.queue().write("delayed", delay=3600)
        for id, body in (leased, b"leased\n"), (delayed, b"delayed\n"):
            self.assertLines((f"read q -m {id}", 2), (f"move q r -m {id}", 2), (f"peek q -m {id}", body))
            self.assertLines((f"delete other -m {id}", 2), f"delete q -m {id}", (f"delete q -m {id}", 2))

    def test_peek_held_shows_every_message_and_its_state(self) -> None:
        queue, late = self.queue(), 2_000_000_000_000_000_000
        ids = self.ids("q", ["ready", "leased"])
        queue.lease(3600, message_id=ids[1])
        ids += [str(queue.write("delayed", until=late)), str(queue.write("failed"))]
        queue.release(queue.lease(60, message_id=ids[3]), delay=3600, reason="exit status 3")
        self.assertLines(("peek q --all --held", b"ready\nleased\ndelayed\nfailed\n"))
        done = self.fork("peek", "q", "--all", "--held", "--json")
        shown = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertEqual([each["state"] for each in shown], ["ready", "leased", "delayed", "delayed"])
        self.assertEqual([each["attempt"] for each in shown], [0, 1, 0, 1])
        self.assertEqual([each["timestamp"] for each in shown], ids)
        self.assertEqual((shown[0]["due"], shown[2]["due"]), (None, str(late)))
        self.assertRegex(shown[1]["due"], r"\A\d{19}\Z")
        self.assertEqual([each.get("reason") for each in shown], [None, None, None, "exit status 3"])
        self.assertNotIn(b'lease"', done.stdout)  # the token is its holder's

    def test_move_rename_and_requeue_keep_the_ids(self) -> None:
        ids = self.ids("q", "abc")
        self.assertLines(
            ("move q r -n 2 -t", f"{ids[0]}\ta\n{ids[1]}\tb\n".encode()),
            "move q r --all -q",
            ("move q r", 2),
            f"delete r --after {ids[1]}",
        )
        lease = self.lease("r")["lease"]
        self.queue("r").write("late", delay=3600)
        self.queue("r.dead", ["dead"])
        self.assertLines(
            "rename r s",
            ("rename r s", 2),
            ("list --stats", b"r.dead: 1 (1 total, 0 leased, 0 delayed)\ns: 1 (3 total, 1 leased, 1 delayed)\n"),
            f"ack s {lease}",
            ("read s --all -t", f"{ids[1]}\tb\n".encode()),
        )
        ids = self.ids("q.dead", "123")
        self.queue("failed", "45")
        self.assertLines(
            ("requeue q -n 1", b"1\n"),
            (f"requeue q -m {ids[2]}", b"1\n"),
            (f"requeue q --after {ids[0]} --before {ids[2]}", b"1\n"),
            ("requeue q --from failed", b"2\n"),
            (f"read q --before {ids[2]} --all -t", f"{ids[0]}\t1\n{ids[1]}\t2\n".encode()),
            ("read q --all", b"3\n4\n5\n"),
        )
        self.assertEqual(self.fork("requeue", "q").returncode, 2)

    def test_read_peek_and_lease_wait_for_a_message_that_matches(self) -> None:
        queue, (old,) = self.queue(), self.ids("q", ["old"])
        self.assertLines(("peek q --wait", b"old\n"))  # does not wait for another one
        child = self.start("peek", "q", "--wait", "25", "--after", old, "-t")
        self.assertGoesOn(child, 0.3)
        new = queue.write("new")
        self.assertRan(self.finish(child), b"%d\tnew\n" % new)
        self.assertLines((f"read q --all --wait 25s --after {old}", b"new\n"), ("read q -n 9", b"old\n"))
        self.assertLines(*((f"{verb} q --wait 50ms", 2) for verb in ("read", "peek", "lease")))
        for line in ("read q --wait -n 5 --json", "lease q --wait"):
            child = self.start(*line.split())
            self.assertGoesOn(child, 0.1)
            self.assertLines("write q hello")
            self.assertRegex(self.finish(child).stdout, rb'\A{"message": "hello", "timestamp": "\d{19}".*}\n\Z')

    def lease(self, name: str = "q", *options: str) -> dict[str, Any]:
        """What ``lease`` prints."""
        return json.loads(self.fork("lease", name, *(options or ("--for", "5m"))).stdout)

    def test_lease_then_acknowledge_release_extend_and_dead_letter(self) -> None:
        (id,) = self.ids("q", ["é"])
        printed = self.fork("lease", "q", "--for", "5m").stdout.decode()
        shape = f'{{"message": "é", "timestamp": "{id}", "attempt": 1, "lease": "{id}\\.\\d+"}}\n'
        self.assertRegex(printed, rf"\A{shape}\Z")
        first = json.loads(printed)["lease"]
        self.assertLines(*((line, 2) for line in ("read q", "peek q", "lease q", "move q r")))
        self.assertLines(f"release q {first} --reason 'not\nnow'")
        second = self.lease()
        self.assertEqual((second["attempt"], second["reason"]), (2, "not now"))
        for command in ("ack", "extend", "release", "dead-letter"):  # the first holder has lost it
            self.assertRefused(self.fork(command, "q", first), id)
        self.assertLines(f"extend q {second['lease']} --for 50ms")
        third = self.lease("q", "--wait", "9")
        self.assertRefused(self.fork("ack", "q", second["lease"]), id)
        self.assertLines(f"dead-letter q {third['lease']} --reason 'no good' --to bad")
        self.assertRefused(self.fork("ack", "q", third["lease"]))
        self.assertEqual(json.loads(self.fork("peek", "bad", "--json").stdout)["reason"], "no good")
        self.assertLines(f"dead-letter bad {self.lease('bad')['lease']}")
        for bad in ("", "x", "1.1", id, *(f"{id}.{token}" for token in ("", "-1", "1.1", "\u0661"))):
            self.assertRefused(self.fork("ack", "bad.dead", bad))
        self.assertLines(f"ack bad.dead {self.lease('bad.dead')['lease']}")
        self.assertEqual(self.everything(), [])

    def test_delete_removes_one_message_a_range_a_queue_or_all(self) -> None:
        ids = self.ids("q", "abcde")
        self.queue().lease(3600)
        self.queue("other", "x")
        misuse = ("", "q --all", f"--all -m {ids[2]}", f"-m {ids[2]}", "q -m 1", f"q -m {ids[2]} --all")
        self.assertLines(*((f"delete {line}", "error") for line in misuse))
        self.assertLines(f"delete q -m {ids[1]}", f"delete q --after {ids[3]}")
        self.assertEqual(self.everything(), ["x", "a", "c", "d"])
        self.assertLines(f"delete q --before {ids[2]}", (f"delete q --before {ids[2]}", 2))
        self.assertEqual(self.everything(), ["x", "c", "d"])
        self.assertLines("delete q", ("delete q", 2), ("peek other", b"x\n"), "delete --all", ("delete --all", 2))


class WholeDatabaseCommandsTest(CommandTest):
    """list, dump, load, init, and the actions."""

    def test_list_shows_every_queue_in_three_shapes(self) -> None:
        self.assertLines("list")
        for name in ("b", "a.1", "a-2"):
            self.queue(name, "123")
        self.queue("b").lease(3600)
        self.queue("b").write("4", delay=3600)
        self.queue("held").write("later", delay=3600)
        detail = "a-2: 3 (3 total, 0 leased, 0 delayed)\na.1: 3 (3 total, 0 leased, 0 delayed)\n"
        detail += "b: 2 (4 total, 1 leased, 1 delayed)\nheld: 0 (1 total, 0 leased, 1 delayed)\n"
        self.assertLines(("list", b"a-2: 3\na.1: 3\nb: 2\nheld: 0\n"), ("list --stats", detail.encode()))
        self.assertLines(("list --pattern a*", b"a-2: 3\na.1: 3\n"), ("list -p [!ah]", b"b: 2\n"), ("list -p A*", 2))
        counts = '{{"queue": "b", "ready": 2, "leased": 1, "delayed": 1, "total": 4, "oldest": "{}"}}\n'
        for line in ("list --json -p b", "list --stats --json -p b"):
            self.assertLines((line, counts.format(self.queue("b").peek().id).encode()))
        self.assertIn(b'"oldest": null}', self.fork("list", "--json", "-p", "held").stdout)

    def test_dump_prints_a_header_and_then_every_message(self) -> None:
        self.assertRan(self.fork("dump"))
        self.assertFalse(self.path.exists())
        (first,), (second, held) = self.ids("b", ["é\n"]), self.ids("a", "xy")
        self.queue("a").lease(3600, message_id=held)
        delayed = self.queue("a").write("z", until=2_000_000_000_000_000_000)
        failed = self.queue("b").write("f")
        self.queue("b").release(self.queue("b").lease(60, message_id=failed), reason="exit status 3")
        lines = self.cli("dump").stdout.decode().splitlines()
        self.assertEqual(lines[0], HEADER.replace('"0"', f'"{failed}"'))
        self.assertEqual(lines[1], f'{{"type": "message", "queue": "a", "body": "x", "id": "{second}"}}')
        leased, later, given_back = (json.loads(lines[number]) for number in (2, 3, 5))
        self.assertEqual((leased["attempt"], leased["held_until"] > held, "lease" in leased), (1, True, False))
        self.assertEqual((later["held_until"], later["id"]), ("2000000000000000000", str(delayed)))
        self.assertEqual(lines[4], f'{{"type": "message", "queue": "b", "body": "é\\n", "id": "{first}"}}')
        self.assertEqual(given_back["reason"], "exit status 3")
        filtered = self.fork("dump", "--pattern", "b*").stdout.decode().splitlines()
        self.assertEqual(filtered, [lines[0], *lines[4:]])

    def test_load_keeps_the_ids_and_is_all_or_nothing(self) -> None:
        header = HEADER.replace('"0"', '"2100000000000000000"')
        line = '{{"type": "message", "queue": "{}", "body": "{}", "id": "{}"}}'
        alias = '{"type": "alias", "alias": "old", "target": "q"}'
        good = [header, line.format("q", "b", 1700000000000000002), alias, line.format("q", "a", 1700000000000000001)]
        done = self.fork("load", input="\n".join(good).encode())
        self.assertRan(done, b"")
        self.assertIn(b"alias", done.stderr)
        self.assertLines(("peek q --all -t", b"1700000000000000001\ta\n1700000000000000002\tb\n"))
        self.assertGreater(int(self.fork("write", "q", "c", "-t").stdout), 2100000000000000000)
        before, new = self.fork("dump").stdout, line.format("q", "new", 1700000000000000003)
        for words, lines in (
            ("line 3", [header, new, line.format("q", "again", 1700000000000000001)]),
            ("line 2", [header, "not json", new]),
            ("line 2", [header, line.format("-q", "x", 1), new]),
            ("line 2", [header, line.format("q", "x", 7_258_118_400 * NS + 1), new]),  # after the year 2200
            ("line 3", [header, new, '{"type": "message"}']),
            ("line 1", [new, header]),
            ("line 1", [header.replace('"version": 1', '"version": 2'), new]),
            ("line 2", [header, "[" * 200_000]),
            ("line 2", [header, '"' + "x" * 300_000]),
            ("line 2", [header, new.replace("new", "\udcff")]),
            ("header", []),
        ):
            with self.subTest(words=words, lines=str(lines)[:300]):
                done = self.fork("load", input="\n".join(lines).encode("utf-8", "surrogateescape"))
                self.assertRan(done, b"", status=1)
                self.assertIn(words, done.stderr.decode())
                self.assertLess(len(done.stderr), 1000)  # an error line is a short one (case 19)
        self.assertEqual(self.fork("dump").stdout, before)

    def test_a_dump_loaded_into_a_fresh_database_dumps_the_same(self) -> None:
        bodies = ["", "\n", "\0", "\r\n", "é\u2028", "\\", '"', "x" * 100_000, *map(str, range(3000))]
        self.queue("a", bodies).lease(3600)
        self.queue("b.c", bodies).write("later", delay=3600)
        done = self.shell("broker dump | tee dump1 | broker load -f copy.db && broker -f copy.db dump | cmp - dump1")
        self.assertRan(done, b"")
        self.assertRefused(self.fork("load", input=(self.dir / "dump1").read_bytes()), "line 2", "exists")

    def test_status_tells_the_numbers_of_the_database(self) -> None:
        self.assertEqual(self.fork("--status").returncode, 2)
        self.queue("q", "123").lease(3600)
        newest = self.queue("r").write("4", delay=3600)
        expected = {"database": str(self.path), "queues": 2, "messages": 4, "ready": 2, "leased": 1, "delayed": 1}
        status = json.loads(self.fork("--status", "--json").stdout)
        self.assertEqual({**status, **expected, "last_ts": str(newest)}, status)
        self.assertIn(b"messages: 4\nready: 2\nleased: 1\ndelayed: 1\n", self.fork("--status").stdout)

    def test_cleanup_deletes_the_database_and_what_belongs_to_it_and_nothing_else(self) -> None:
        """(trap 8)"""
        (self.dir / "test.db.txt").write_text("mine")
        self.assertLines("write q x", ("--cleanup",))
        self.assertEqual(os.listdir(self.dir), ["test.db.txt"])
        actions = ("--cleanup", "--vacuum", "--status")
        self.assertLines(*((f"{action} -f test.db.txt", "test.db.txt") for action in actions))
        self.assertEqual(os.listdir(self.dir), ["test.db.txt"])
        self.assertEqual((self.dir / "test.db.txt").read_text(), "mine")


class GrammarTest(CommandTest):
    """Options, operands, "--", help and usage errors."""

    def test_global_options_go_on_either_side_of_the_command(self) -> None:
        (self.dir / "sub").mkdir()
        self.assertLines(
            "-f x.db -d sub -q write q 0", "write q 1 -f x.db -d sub -q", "-d sub write -f x.db q 2",
            "-q -f x.db write q -d sub 3", "-f x.db write -d sub -q q -- 4", f"write q 5 -f {self.dir}/sub/x.db",
            ("peek q --all -d sub -f x.db", b"0\n1\n2\n3\n4\n5\n"),
        )  # fmt: skip
        self.assertEqual(os.listdir(self.dir), ["sub"])

    def test_what_follows_two_dashes_is_text(self) -> None:
        """(trap 9)"""
        texts = ["--", "-h", "--help", "-f", "--version", "-x", "--delay=5", "--cleanup", "-5", "-1.5"]
        self.assertLines(*(f"write q -- {text}" for text in texts), "write -q --delay 0 -- q --status")
        self.assertLines("write -- q --vacuum", "broadcast -- --all")
        self.assertBodies(self.queue(), [*texts, "--status", "--vacuum", "--all"])
        self.assertLines(("read -- q", b"--\n"), ("read -- -q", "queue name"))
        self.assertLines(*((f"write q {text}", "--") for text in ("-5", "-1.5", "-0")))

    def test_an_option_in_place_of_text_is_an_error_and_deletes_nothing(self) -> None:
        """(trap 9)"""
        self.queue("q", ["precious"])
        lines = [f"{first} {second}" for first in ACTIONS for second in ACTIONS if first != second]
        for action in ACTIONS:
            lines += [f"write q {action}", f"write {action} q", f"{action} write q", f"{action} list"]
            lines += [f"list {action}", f"read q {action}", f"{action} delete --all", f"{action} q"]
        lines += ["write q --clean", "--clean", "--vers", "write q -x", "write q --js"]
        self.assertLines(*((line, "error") for line in lines))
        self.assertEqual(self.everything(), ["precious"])

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

    def test_an_error_names_the_value_and_the_remedy_and_quiet_hides_none(self) -> None:
        """(trap 23)"""
        self.assertLines(
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


class GeneratedCommandLinesTest(CommandTest):
    """Whatever the words are: no traceback, and a status that is documented."""

    def test_generated_command_lines_end_with_status_0_1_or_2_and_no_traceback(self) -> None:
        seed = int(os.environ.get("TEST_SEED", random.randrange(10**6)))
        rng, seen = random.Random(seed), Counter()
        (self.dir / "sub" / "deep").mkdir(parents=True)
        (self.dir / "foreign.db").write_bytes(b"not a database at all, but long enough to look at" * 20)
        words = self.words(self.ids("q", "123"))

        def stop(pid: int, end: int) -> None:
            if not select.select([end], [], [], 0.05 if waits else DEADLINE_S)[0]:  # many of these go on for ever
                os.kill(pid, signal.SIGTERM)

        for _ in range(5000 if FULL else 150):
            line = self.line(rng, words)
            waits = any(word in ("watch", "work") or word.startswith("--wait") for word in line)
            done = self.fork(*line, input=b"line one\nline two\n\xc3\xa9\n", stop=stop)
            about = f"TEST_SEED={seed} {line!r}: {done}"
            self.assertIn(done.returncode, (0, 1, 2, *((128 + 15, -15) if waits else ())), about)
            self.assertNotIn(b"Traceback", done.stderr, about)
            if done.returncode == 1:
                self.assertRegex(done.stderr, rb"\A(.*\n)*broker: error: .+\n\Z", about)
            seen[done.returncode] += 1
        self.assertEqual({0, 1, 2} - set(seen), set(), seed)

    @staticmethod
    def words(ids: list[str]) -> dict[str, list[str]]:
        """What the values of options and operands are taken from: sensible ones first."""
        leases = [ids[0] + end for end in (".1", ".12345", ".0", ".x", ".", "")]
        queues = ["q", "q", "q", "r", "q.dead", "a-b_c.9", "-q", ".q", "", "a/b", "q\n", "x" * 513, "\u00e9", "\udcff"]
        durations = ["0", "10ms", "0.5s", "5m", "1d", "-1", "1e9", "nan", "inf", "99999999d", "1w", "", "x", ".5"]
        numbers = ["1", "2", "10", "0", "-1", "1.5", "x", "", "99999999999", "9" * 5000, "\u0663"]
        some = [*ids, *leases, "1", "0" * 19, "9" * 19, "9223372036854775807", "-1", "1e3", "x", "", "\u0661" * 19]
        times = [*some, "2024-01-15", "2024-13-45", "1705314600", "1705314600.5s", "1705314600000ms", "now", "1_000"]
        times += ["+5", " 5", "0x10", "9" * 30, "2024-01-15T10:30:00+99:99", "1.5.5", "0001-01-01"]
        texts = ["hello", "", "-", "--", "-5", "-x", "--cleanup", "--help", "\u00e9\u20ac", "\udcff", "x" * 2000]
        files = ["test.db", "y.db", "foreign.db", "sub", "../z.db", "", "\n", "sub/deep/w.db", "no/w.db", "x" * 300]
        words = {"-d": [".", "sub", "missing", ""], "-f": files, "LEASE": leases, "-p": ["*", "q*", "[", "[!a", ""]}
        words.update({"--backoff": ["1ms", "0", "x"], "--wait": ["0", "1ms", "x", "-1"], "-n": numbers})
        words.update(dict.fromkeys(("-j", "--max-attempts", "--timeout"), ["1", "2", "0", "x"]))
        words.update(dict.fromkeys(("QUEUE", "DEST", "--dead-letter", "--move", "--from", "--to", "--queue"), queues))
        words.update(dict.fromkeys(("TEXT", "--reason", "--pattern"), texts))
        words.update(dict.fromkeys(("-m", "--message"), some))
        words.update(dict.fromkeys(("--after", "--since", "--before"), times))
        words.update(dict.fromkeys(("--delay", "--for", "--lease"), durations))
        return words

    def line(self, rng: random.Random, words: dict[str, list[str]]) -> list[str]:
        """A command line: mostly a command with its operands and options, sometimes any words in any order."""
        flags = ["--all", "--json", "-t", "--lines", "--stats", "--drain", "--peek", "--held", "--exact", "-q"]
        odd = [*ACTIONS, "--help", "-h", "--nonsense", "--al", "-x", "-qt", "--all=1", "--json="]
        if rng.random() < 0.15:
            some = [*COMMANDS, *flags, *odd, *words, *(word for values in words.values() for word in values)]
            return [rng.choice(some) for _ in range(rng.randrange(6))]
        command = rng.choices(list(COMMANDS), [1 if name in ("work", "watch") else 6 for name in COMMANDS])[0]
        spec, own = (text.split() for text in COMMANDS[command])
        groups = [[rng.choice(words[name] if rng.random() < 0.4 else words[name][:4])] for name in spec]
        for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
            names = own if own and rng.random() < 0.8 else [*flags, *words] if rng.random() < 0.9 else odd
            name = rng.choice([name for name in names if not name.isupper()])
            group = [name]
            if name in words:
                value = rng.choice(words[name])
                group = rng.choice([[name, value], [name, value], [name, value], [f"{name}={value}"], [name]])
            groups.insert(rng.randrange(len(groups) + 1), group)
        line = [command, *(word for group in groups for word in group)]
        if command == "work":
            commands = [["true"], ["false"], ["cat"], ["sh", "-c", "exit 3"], ["no-such-command"], [""], []]
            return [*line, *rng.choice([["--drain"], []]), "--", *rng.choice(commands)]
        if rng.random() < 0.1:
            line.insert(rng.randrange(len(line) + 1), "--")
        return line


class PlacementTest(CommandTest):
    """Variables, locales, where the database is, and one file that is copied anywhere."""

    def test_a_file_that_is_not_ours_is_refused_by_every_command_and_left_as_it_is(self) -> None:
        """(traps 17 and 41)"""
        self.path.write_bytes(b"notes, not a database\n" * 300)
        values = {"QUEUE": "q", "DEST": "r", "TEXT": "x", "LEASE": "1700000000000000000.1"}
        lines = [[name, *(values[operand] for operand in spec.split())] for name, (spec, _) in COMMANDS.items()]
        lines += map(str.split, ("read q --wait", "watch q --peek", "write q --lines", *ACTIONS[:3]))
        for line in lines:
            with self.subTest(command=line):
                line = [*line, "--drain", "-j", "2", "true"] if line[0] == "work" else line
                self.assertRefused(self.fork(*line, input=HEADER.encode()), "test.db")
        self.assertEqual(self.path.read_bytes(), b"notes, not a database\n" * 300)
        self.assertEqual(os.listdir(self.dir), ["test.db"])

    def test_options_and_variables_say_where_the_database_is(self) -> None:
        for name in ("place", "sub"):
            (self.dir / name).mkdir()
        (self.dir / "sub" / "link").symlink_to(self.dir)
        self.environ.update(BROKER_DEFAULT_DB_NAME=".queue/b.db", BROKER_DEFAULT_DB_LOCATION=f"{self.dir}/place")
        self.assertLines("write q x", ("read q", b"x\n"))
        del self.environ["BROKER_DEFAULT_DB_NAME"]
        self.assertLines("write q x", f"-d {self.dir}/sub write q x", f"-f {self.dir}/x.db write q x")
        found = [str(path.relative_to(self.dir)) for path in self.dir.rglob("*.db")]
        self.assertEqual(sorted(found), ["place/.broker.db", "place/.queue/b.db", "sub/.broker.db", "x.db"])
        self.assertLines(*((f"-f '{name}' list", "error") for name in ("../y.db", "sub/../y.db", "a\nb")))
        self.assertLines(("-d sub -f link/x.db list", "link/x.db"))  # it leads out of sub

    def test_init_creates_the_database_and_project_scope_finds_it_from_below(self) -> None:
        del self.environ["BROKER_DEFAULT_DB_NAME"]
        self.environ["BROKER_PROJECT_SCOPE"] = "1"
        top, self.dir = self.dir, self.dir / "one" / "two"
        self.dir.mkdir(parents=True)
        self.assertRefused(self.fork("write", "q", "x"), "broker init")
        below, self.dir = self.dir, top
        self.assertLines("init", "init")
        self.dir = below
        self.assertLines("write q x", ("read q", b"x\n"))
        self.assertEqual(os.listdir(below), [])
        self.assertLines("init")  # here, although there is one above
        self.assertTrue((below / ".broker.db").exists())

    def test_text_passes_unchanged_through_an_ascii_locale(self) -> None:
        """(trap 3)"""
        self.environ.update(LC_ALL="C", LANG="C", PYTHONIOENCODING="ascii", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
        text = "é € \U0001f600"
        data = text.encode()
        (self.dir / text).mkdir()
        self.assertRan(self.cli("-d", text, "write", "q", text), b"")
        self.assertRan(self.cli("-d", text, "write", "q", "--lines", input=data), b"")
        self.assertEqual(self.cli("-d", text, "dump").stdout.count(data), 2)
        self.assertRan(self.cli("-d", text, "read", "q"), data + b"\n")
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
            (["-m", "simplebroker", "write", "tasks", "ship it"], b"", 0),
            (["simplebroker.py", "read", "tasks"], b"ship it\n", 0),
            (["-c", installed, "write", "tasks", "installed"], b"", 0),
            (vendored, b"installed\n", 0),
            (vendored, b"", 2),
            (["-c", code], b"None SQLRunner\n", 0),
        ):
            child = subprocess.Popen([sys.executable, *words], cwd=self.dir, env=self.environ, stdout=subprocess.PIPE)
            self.assertRan(self.finish(child), printed, status)
        scripts = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[2].splitlines()[1:3]
        self.assertEqual(scripts, [f'{name} = "simplebroker:run_and_exit"' for name in ("broker", "simplebroker")])


class PipeTest(CommandTest):
    """What reads the output may be slow, may stop early, and may be several."""

    def test_head_takes_twenty_of_many_and_exactly_the_others_remain(self) -> None:
        """(traps 1 and 2)"""
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

    def test_every_command_that_prints_ends_cleanly_when_nobody_reads(self) -> None:
        """(trap 2)"""
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


class StandardStreamsTest(CommandTest):
    """Standard streams that are closed, full or terminals, and the programs around the command."""

    def test_output_that_cannot_be_written_is_an_error_and_the_message_stays(self) -> None:
        self.queue("q", "ab")
        takers = "read q,read q --all,peek q,lease q,watch q,list,watch q --peek,watch q --move r,dump,--status"
        for target in ("/dev/full", "&-"):
            lines = takers.split(",") + (["--version", "--help"] if target == "/dev/full" else [])
            stderr = self.shell("\n".join(f"broker {line} >{target}; echo $? >&2" for line in lines)).stderr.decode()
            for line, (error, status) in zip(lines, re.findall(r"((?:.*\n)*?)(\d+)\n", stderr)):
                with self.subTest(command=line, target=target):
                    self.assertEqual(status, "1")
                    self.assertRegex(error, r"\Abroker: error: .+\n\Z")
            self.assertEqual(self.queue().stats()[:3], (2, 0, 0))

    def test_a_write_that_prints_nothing_needs_no_standard_output(self) -> None:
        done = self.shell("broker write q a >&-; echo b | broker write q - >&-; echo c | broker write q --lines >&-")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, b"", b""))
        done = self.shell("broker write q d -t >&-")  # one that must print does not write what it cannot tell of
        self.assertRefused(done, "standard output")
        self.assertBodies(self.queue(), ["a", "b\n", "c"])

    def test_closed_standard_input_is_an_error_where_it_is_needed_and_closed_error_changes_nothing(self) -> None:
        done = self.shell("broker write q given <&-; broker work q --drain cat <&-; broker list <&-")
        self.assertRan(done, b"given\n")
        lines = ["write q", "write q -", "write q --lines", "broadcast -", "load"]
        done = self.shell("".join(f"broker {line} <&-; echo $?\n" for line in lines))
        self.assertEqual(done.stdout, b"1\n" * 5)
        self.assertRegex(done.stderr, rb"\A(broker: error: [^\n]*standard input[^\n]*\n){5}\Z")
        self.assertEqual(self.everything(), [])
        lines = ["-f x.db --status 2>&-", "read a/b 2>&-", "read q 2>/dev/full"]
        self.assertRan(self.shell("".join(f"broker {line}; echo $?\n" for line in lines)), b"2\n1\n2\n")

    def test_shell_habits_work(self) -> None:
        """Issue 11: $(...), a while loop, xargs; an empty message does not end a loop (trap 39)."""
        self.queue("q", ["one two", "  three", "-n", "a", "", "b"])
        self.assertRan(self.shell('x=$(broker read q); echo "[$x]"'), b"[one two]\n")
        loop = 'while IFS= read -r line; do echo "[$line]"; done'
        self.assertRan(self.shell(f"broker read q -n 1 | {loop}; broker read q"), b"[  three]\n-n\n")
        script = 'while m=$(broker read q); do echo "[$m]"; done; broker read q; echo $?'
        self.assertRan(self.shell(script), b"[a]\n[]\n[b]\n2\n")
        self.assertRan(self.shell("seq 3 | xargs -n1 broker write q; broker read q --all | xargs echo"), b"1 2 3\n")
        if shutil.which("jq"):  # (trap 13)
            id = self.queue().write('é "x"\n1')
            script = "broker list --json | jq .ready; broker dump | jq -r .type;"
            done = self.shell(f"{script} broker read q --json | jq -r .message,.timestamp")
            self.assertRan(done, f'1\nheader\nmessage\né "x"\n1\n{id}\n'.encode())

    def test_a_parent_that_waits_before_it_reads_gets_all(self) -> None:
        self.queue("q", "x")
        child = self.start("read", "q")
        self.assertEqual(child.wait(DEADLINE_S), 0)
        self.assertRan(self.finish(child), b"x\n")

    def test_the_empty_environment_of_cron_is_enough(self) -> None:
        self.environ = {"HOME": "/", "PATH": "/usr/bin:/bin"}
        broker, place = shlex.quote(str(self.bin / "broker")), shlex.quote(str(self.path))
        script = f"cd /; {broker} -f {place} write q é; {broker} -f {place} work q --drain -- cat"
        self.assertRan(self.shell(script), "é\n".encode())


class WatchCommandTest(CommandTest):
    """broker watch."""

    def test_watch_peek_follows_by_id_while_others_delete_and_move(self) -> None:
        queue, ids = self.queue(), self.ids("q", "123")
        child = self.start("watch", "q", "--peek", "--json", "--after", ids[0])
        self.assertEqual(json.loads(self.read_line(child.stdout)), {"message": "2", "timestamp": ids[1]})
        queue.delete(message_id=ids[1])
        self.assertEqual(json.loads(self.read_line(child.stdout))["message"], "3")
        queue.move("r", message_id=ids[2])
        queue.write("4")
        self.assertEqual(json.loads(self.read_line(child.stdout))["message"], "4")
        self.assertBodies(queue, ["1", "4"])
        child.send_signal(signal.SIGINT)
        self.assertRan(self.finish(child), b"")

    def test_a_closed_pipe_ends_watch_at_the_next_message_which_stays(self) -> None:
        """(trap 2)"""
        for number, options in enumerate(([], ["--peek"], ["--move", "done"])):
            queue, (reader, writer) = self.queue(f"q{number}", ["read"]), self.ends()
            child = self.start("watch", f"q{number}", *options, stdout=writer)
            writer.close()
            self.assertEqual(reader.read(5), b"read\n")
            expected = ["read", "stays"] if options == ["--peek"] else ["stays"]
            self.wait_for(lambda queue=queue, total=len(expected) - 1: queue.stats().total == total, "the removal")
            reader.close()
            queue.write("stays")
            done = self.finish(child)
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            self.assertBodies(queue, expected)
        self.assertBodies(self.queue("done"), ["read"])


class WorkCommandTest(CommandTest):
    """broker work."""

    def test_the_command_gets_what_read_prints_and_the_environment_and_its_success_acknowledges(self) -> None:
        bodies = ["no newline", "newline\n", "", "nul\0 é \r\n", "--help"]
        script = 'printf "%s %s %s:" "$BROKER_QUEUE" "$BROKER_MESSAGE_ID" "$BROKER_ATTEMPT"; cat'
        for options, ending in (["--drain"], "\n"), (["--drain", "--exact"], ""):
            ids = self.ids("q", bodies)
            printed = [body + ("" if body.endswith("\n") else ending) for body in bodies]
            done = self.fork(*self.sh(script, *options))
            self.assertRan(done, "".join(f"q {id} 1:{text}" for id, text in zip(ids, printed)).encode())
            self.assertEqual((done.stderr, self.everything()), (b"", []))
        self.assertLines("work q --drain cat")  # nothing there is a drained queue

    def test_failures_are_retried_with_growing_delays_and_end_in_the_dead_letter_queue(self) -> None:
        self.queue("q", ["bytes\0\r\n"])
        done = self.fork(*self.sh("broker write log x; exit 3", *"--drain --max-attempts 3 --backoff 200ms".split()))
        self.assertRan(done, b"", status=1)
        (message,) = self.queue("q.dead").peek_all()
        self.assertEqual((message, message.reason), ("bytes\0\r\n", "exit status 3 (attempt 3)"))
        first, second, third = (message.id for message in self.queue("log").peek_all())
        self.assertGreater(second - first, 0.2 * NS)
        self.assertGreater(third - second, 0.4 * NS)
        self.assertLines(("requeue q", b"1\n"), "work q --drain -- true")
        self.assertEqual(self.queue().stats().total, 0)

    def test_a_failed_command_may_succeed_later_and_others_go_to_the_queue_that_was_named(self) -> None:
        self.queue("q", ["works at last", "never"])
        script = 'read -r body; test "$body$BROKER_ATTEMPT" = "works at last2" && exit; kill -9 $$'
        options = ("--drain", "-j", "2", "--backoff", "10ms", "--max-attempts", "2", "--dead-letter", "failed")
        self.assertRan(self.fork(*self.sh(script, *options)), b"", status=1)
        (message,) = self.queue("failed").peek_all()
        self.assertEqual((message, self.everything()), ("never", ["never"]))
        self.assertRegex(message.reason, r"signal 9 \(attempt 2\)\Z")

    def test_so_many_commands_run_at_once_and_not_more(self) -> None:
        self.queue("q", "1234")
        meet = 'touch $BROKER_MESSAGE_ID.run; until [ "$(ls *.run | wc -l)" -eq 4 ]; do sleep 0.01; done'
        self.assertRan(self.fork(*self.sh(meet, "-j", "4", "--drain")), b"")  # ends only if four meet
        self.queue("q", "123456")
        count = "touch $BROKER_MESSAGE_ID.two; sleep 0.05; ls *.two | wc -l; rm $BROKER_MESSAGE_ID.two"
        counts = self.fork(*self.sh(count, "-j", "2", "--drain")).stdout.split()
        self.assertEqual((len(counts), max(counts)), (6, b"2"))

    def test_n_commands_are_started_and_no_more(self) -> None:
        queue = self.queue("q", "abcdef")
        self.assertLines(("work q -n 2 cat", b"a\nb\n"), ("work q -n 1 -- cat", b"c\n"))
        done = self.fork(*self.sh("read -r body; echo $body", "-j", "4", "-n", "2"))
        self.assertEqual((done.returncode, sorted(done.stdout.split())), (0, [b"d", b"e"]))
        queue.write("failing")
        self.assertLines(("work q -n 1 cat", b"f\n"), "work q -n 1 false")  # it failed, and is not dead
        (message,) = queue.peek_many(1, held=True)
        self.assertEqual((message.state, message.reason), ("delayed", "exit status 1"))

    def test_a_command_that_takes_too_long_is_ended_with_its_children(self) -> None:
        self.queue("q", "x")
        script = "sleep 1000 & echo $! >pid; wait"
        done = self.fork(*self.sh(script, "--timeout", "200ms", "--max-attempts", "1", "--drain"))
        self.assertRan(done, b"", status=1)
        self.assertRegex(self.queue("q.dead").peek().reason, r"\Atimed out after .* \(attempt 1\)\Z")
        pid = int((self.dir / "pid").read_text())
        self.wait_for(lambda: not self.is_running(pid), "the end of the child of the command")
        if FULL:  # it takes 5 s
            self.queue("q", "x")
            script = "trap '' TERM; while :; do sleep 0.1; done"
            done = self.fork(*self.sh(script, "--timeout", "100ms", "--max-attempts", "1", "--drain"))
            self.assertRan(done, b"", status=1)

    @staticmethod
    def is_running(pid: int) -> bool:
        """Is there such a process, and does it still run?"""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    def test_the_trouble_of_the_worker_uses_up_no_attempts(self) -> None:
        """(case 7, trap 35)"""
        for name, error in (
            ("subprocess.Popen", BlockingIOError(11, "Resource temporarily unavailable")),
            ("tempfile.TemporaryFile", FileNotFoundError(2, "No usable temporary directory")),
        ):
            self.queue().delete()
            self.queue("q", "ab")
            prepare = mock.patch(name, side_effect=error).start
            done = self.fork("work", "q", "--drain", "--max-attempts", "1", "--", "cat", prepare=prepare)
            if done.returncode:
                self.assertRefused(done, error.strerror)
                self.assertEqual([message.attempt for message in self.queue().peek_all(held=True)], [0, 0])
            else:  # it works without that
                self.assertRan(done, b"a\nb\n")

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
    def test_the_first_interrupt_at_the_terminal_waits_for_the_commands_and_says_so(self) -> None:
        self.queue("q", ["x"] * 50)
        ours, theirs = self.ends(*os.openpty())
        script = "echo started; until [ -e go ]; do sleep 0.01; done; echo ended"
        child = self.on_terminal(theirs, *self.sh(script, "-j", "2"))
        shown = self.read_until(ours, lambda data: data.count(b"started") == 2)
        ours.write(b"\x03")
        shown += self.read_until(ours, lambda data: re.search(rb"finishing 2 commands; .*again", data))
        self.assertGoesOn(child, 0.1)
        (self.dir / "go").touch()
        shown += self.read_until(ours)
        self.assertEqual((child.wait(DEADLINE_S), shown.count(b"started"), shown.count(b"ended")), (0, 2, 2), shown)
        self.assertEqual(self.queue().stats()[:3], (48, 0, 0))

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
        self.queue("q", "1")
        child = self.start("watch", "q", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        waits = self.start("read", "r", "--wait")
        self.assertEqual(self.read_line(child.stdout), b"1\n")
        child.send_signal(signal.SIGHUP)
        self.queue("q", "2")
        self.assertEqual(self.read_line(child.stdout), b"2\n")
        child.terminate()
        self.assertRan(self.finish(child), b"")
        self.assertGoesOn(waits, 0.2)
        waits.send_signal(signal.SIGINT)
        self.assertRan(self.finish(waits), b"", status=128 + signal.SIGINT)

    def at_random_moments(self, line: str, status: int | None, check: Callable[[Done], Any], data: bytes = b"") -> None:
        """Run a command on 2,000 messages, or with input on none, and send it each signal at random moments.

        check() returns how much it did, of how much. If it did some, its status is this one (None: the signal's).
        """
        seed = int(os.environ.get("TEST_SEED", random.randrange(10**6)))
        rng = random.Random(seed)
        whole_s = 0.06  # of those that do not end by themselves soon; the others are measured first, with no signal
        for number in [0] * (status is None) + [*self.SIGNALS] * (50 if FULL else 5):
            self.broker().delete_database()
            self.queue("q", map(str, range(0 if data else 2000)))
            (self.dir / "log").write_bytes(b"")
            after, started = rng.uniform(0, whole_s) if number else DEADLINE_S, time.monotonic()

            def stop(pid: int, end: int, number: int = number, after: float = after) -> None:
                if not select.select([end], [], [], after)[0]:
                    os.kill(pid, number)

            done = self.fork(*shlex.split(line), input=data, stop=stop)
            whole_s = whole_s if number else time.monotonic() - started
            shown = 128 - done.returncode if done.returncode < 0 else done.returncode  # by a shell
            with self.subTest(command=line, signal=number, after=after, seed=seed, status=done.returncode):
                self.assertEqual((done.stderr, self.queue().stats().leased), (b"", 0))
                did, of = check(done)
                expected = {128 + number if status is None else status, *([0] if did == of else [])}
                self.assertIn(shown, expected | ({128 + number} if not did else set()))

    def left(self, name: str = "q") -> list[str]:
        """What is ready in a queue."""
        return [str(message) for message in self.queue(name).peek_all()]

    def shared(self, taken: list[str]) -> tuple[int, int]:
        """Each of the 2,000 messages was either taken, once, or is left."""
        self.assertEqual([*taken, *self.left()], [str(number) for number in range(2000)])
        return len(taken), 2000

    def test_read_all_into_a_file_at_random_moments(self) -> None:
        """(case 32, trap 37)"""
        self.at_random_moments("read q --all", None, lambda done: self.shared(done.stdout.decode().split()))

    def test_watch_at_random_moments(self) -> None:
        self.at_random_moments("watch q", 0, lambda done: self.shared(done.stdout.decode().split()))

    def test_work_at_random_moments(self) -> None:
        def check(done: Done) -> tuple[int, int]:
            worked = (self.dir / "log").read_text().split()
            self.assertEqual(sorted([*worked, *self.left()], key=int), [str(number) for number in range(2000)])
            return len(worked), 2000

        self.at_random_moments("work q -j 4 sh -c 'read -r body; echo $body >>log'", 0, check)

    def test_move_all_at_random_moments(self) -> None:
        self.at_random_moments("move q r --all", None, lambda done: self.shared(self.left("r")))

    def test_write_lines_at_random_moments(self) -> None:
        lines = [f"{number:0500}" for number in range(5000)]  # three batches

        def check(done: Done) -> tuple[int, int]:
            written = self.left()
            self.assertEqual(written, lines[: len(written)])
            return len(written), len(lines)

        self.at_random_moments("write q --lines", None, check, "\n".join(lines).encode())

    def test_load_at_random_moments(self) -> None:
        line = '{{"type": "message", "queue": "q", "body": "x", "id": "{}"}}'
        dump = "\n".join([HEADER, *(line.format(1_700_000_000_000_000_000 + n) for n in range(8000))])

        def check(done: Done) -> tuple[int, int]:
            self.assertIn(self.queue().count(), (0, 8000))
            return self.queue().count(), 8000

        self.at_random_moments("load", None, check, dump.encode())


# ---------------------------------------------------------------------------------------------------
# README.md.
# ---------------------------------------------------------------------------------------------------


class ReadmeTest(CommandTest):
    """README.md is true: what it shows was run, by this."""

    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def setUp(self) -> None:
        super().setUp()
        del self.environ["BROKER_DEFAULT_DB_NAME"]

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```", self.text, re.MULTILINE | re.DOTALL)

    def test_the_first_command_does_the_main_job_and_the_second_is_how_these_tests_run(self) -> None:
        shutil.copy(ROOT / "simplebroker.py", self.dir)
        script = f'python3() {{ {shlex.join(PYTHON)} "$@"; }}\n' + self.blocks("bash")[0]
        self.assertRan(self.shell(script), b"ship it\n")
        self.assertEqual(self.blocks("bash")[1], "python3 -m unittest\n")

    def test_the_shell_lines_print_what_their_comments_say(self) -> None:
        self.assertRan(self.shell(self.blocks("bash")[2]), b"tasks: 2\nship it\n1\n2\n")
        shown = self.shell("broker list --stats").stdout
        self.assertEqual(shown, b"tasks: 1 (2 total, 0 leased, 1 delayed)\n")

    def test_the_transcript_shows_what_happens(self) -> None:
        """Lines that start with "$ " are run, one after the other; 19 digits stand for any id."""
        (transcript,) = self.blocks("console")
        parts = re.split(r"^\$ (.*)\n", transcript, flags=re.MULTILINE)[1:]
        self.assertGreater(len(parts), 8)
        script = "exec 2>&1\n" + "".join(f"{line}\necho ----\n" for line in parts[::2])
        child = subprocess.Popen(["bash", "-c", script], cwd=self.dir, env=self.environ, stdout=subprocess.PIPE)
        printed = self.finish(child).stdout.decode().split("----\n")[:-1]
        for command, shown, expected in zip(parts[::2], printed, parts[1::2]):
            with self.subTest(command=command):
                self.assertEqual(*(re.sub(r"\d{19}", "ID", text) for text in (shown, expected)))
        self.assertEqual(len(printed), len(parts) // 2)

    def test_the_python_lines_run(self) -> None:
        (code,) = self.blocks("python")
        done = self.finish(self.python(code))
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout, rb"\Aship it\ncareful work \d{19} 1\n\Z")

    def test_every_setting_and_its_default_is_listed(self) -> None:
        listed = dict(re.findall(r"^\| `(BROKER_\w+)` \| ([^|]+?) \|", self.text, re.MULTILINE))
        with mock.patch.dict(os.environ, clear=True):
            defaults = Settings.from_environment()._asdict()
        for name, default in defaults.items():
            variable = re.sub("_M?S$", "", f"BROKER_{name.upper()}").replace("_DB", "_DEFAULT_DB")
            expected = {None: "the current directory", False: "0"}.get(default, str(default))
            self.assertEqual(listed.pop(variable), expected)
        self.assertEqual(listed, {})

    def test_every_link_leads_somewhere(self) -> None:
        for link in re.findall(r"\]\(([^)#:]+)\)", self.text):
            self.assertTrue((ROOT / link).exists(), link)


# ---------------------------------------------------------------------------------------------------
# Examples: each runs and prints what its page says (EXAMPLES.md).
# ---------------------------------------------------------------------------------------------------


def code_blocks(text: str, language: str = "python") -> list[str]:
    """The code blocks of a page, without the indentation of lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in found]


class ExampleTest(CoreTest):
    """Examples run in the test's directory, with their own directory and the repository's to import from."""

    def setUp(self) -> None:
        super().setUp()
        self.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(EXAMPLES)])

    def example(self, *command: object, status: int = 0) -> str:
        """Run a Python example to its end; return what it printed."""
        words = [sys.executable, *map(str, command)]
        done = subprocess.run(words, cwd=self.dir, env=self.environ, capture_output=True, timeout=120, check=False)
        self.assertEqual(done.returncode, status, done.stderr.decode())
        self.assertNotIn(b"Traceback", done.stderr)
        return done.stdout.decode()

    def run_blocks(self, blocks: list[str]) -> None:
        """Run code blocks, one after the other in one program."""
        lines = "\n".join(blocks).splitlines()
        future_lines = [line for line in lines if line.startswith("from __future__")][:1]
        rest = [line for line in lines if not line.startswith("from __future__")]
        (self.dir / "blocks.py").write_text("\n".join(future_lines + rest), encoding="utf-8")
        self.example("blocks.py")


class AllExamplesTest(ExampleTest):
    def test_python_examples_print_what_their_pages_say(self) -> None:
        for name, expected in EXPECTED.items():
            with self.subTest(name):
                printed = re.sub(r"\d{19}", "ID", self.example(EXAMPLES / f"{name}.py"))
                for line in textwrap.dedent(expected).strip().splitlines():
                    self.assertIn(line + "\n", printed)

    def test_examples_use_no_private_name_of_the_module(self) -> None:
        def private(tree: ast.AST, *, stored: bool) -> set[str]:
            names: set[str] = set()
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and stored:
                    names.add(node.name)
                elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store) == stored:
                    names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
                elif isinstance(node, ast.ImportFrom) and not stored:
                    names.update(alias.name for alias in node.names)
            return {name for name in names if re.match("_[^_]", name)}

        ours = private(ast.parse((ROOT / "simplebroker.py").read_text(encoding="utf-8")), stored=True)
        self.assertGreater(len(ours), 20)
        for page in sorted(EXAMPLES.glob("*.*")):
            text = page.read_text(encoding="utf-8")
            if page.suffix == ".md":
                blocks = [re.sub("from __future__.*", "", block) for block in code_blocks(text)]
                text = "".join("async def block():\n" + textwrap.indent(block, "    ") for block in blocks)
            if page.suffix in (".py", ".md"):
                tree = ast.parse(text)
                reached = (private(tree, stored=False) - private(tree, stored=True)) & ours
                self.assertEqual(reached, set(), page.name)

    def test_the_suite_of_sqlite_connect_passes(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "unittest", str(EXAMPLES / "test_sqlite_connect.py")],
            cwd=ROOT, env=self.environ, capture_output=True, timeout=120, check=False,
        )  # fmt: skip
        self.assertEqual(done.returncode, 0, done.stderr.decode())

    def test_sqlite_connect_does_not_retry_what_is_not_busy(self) -> None:  # case 65: "clock" contains "lock"
        printed = self.example("-c", RETRY_OF_CLOCK)
        self.assertEqual(printed, "1 no such table: clock\n")

    def test_the_benchmark_measures(self) -> None:
        for line in ("--quick", "--json"):
            self.assertIn(line, self.example(EXAMPLES / "benchmark.py", "--help"))
        options = ("--quick", "--json", "--sync", "NORMAL", "--dir", self.dir, "--only", "batch")
        self.assertIsInstance(json.loads(self.example(EXAMPLES / "benchmark.py", *options)), dict)


RETRY_OF_CLOCK = """
import sqlite3
import sqlite_connect

connection, calls = sqlite3.connect(":memory:"), []

def ask():
    calls.append(1)
    return connection.execute("SELECT * FROM clock")

try:
    sqlite_connect.retry_busy(connection, ask)
except sqlite3.OperationalError as error:
    print(len(calls), error)
"""

EXPECTED = {
    "python_api": """
        peek: first
        read: first
        moved: second
        deleted: 2 from tasks
        by id: b True just written: True
        after the first: ['b', 'c']
        paid: 42
        dead: not a number because: invalid literal for int() with base 10: 'not a number'
        another try: 1
        busy, so nothing was written: 0
        ordered: 12 rejected: ['{broken']
        checkpoint: ['1', '2'] ['3', '4', '5', '6'] still there: 6
        jobs: 30 different: 30 left: 0
        """,
    "simple_watcher_example": """
        [ID] hello
        {"message": "hello", "timestamp": "ID"}
        INFO simplebroker: message ID: hello
        [ID] ! READ THIS
        attempt 1 failed: cannot handle 'shy'
        handled: shy
        attempt 2 failed: cannot handle 'bad'
        dead: bad because: ValueError: cannot handle 'bad' (attempt 2)
        """,
    "async_wrapper": """
        jobs: 30 different: 30 left: 0
        no such job bad ID
        watch ended: True dead: bad because: ValueError: no such job (attempt 2)
        """,
    "multi_queue_watcher": """
        mail 'bad', attempt 2: no such address
        first rounds: logs:0 orders:0 mails:bad logs:1 orders:1 mails:bad
        handled: 105 rounds: 102 dead: bad
        """,
    "multi_queue_patterns": """
        strict: urgent 1, normal 1, urgent 2, normal 2, low 1
        weighted: h0, h1, h2, l0, h3, l1, l2, l3
        balanced: {'worker.1': 4, 'worker.2': 4, 'worker.3': 4}
        left: {'metrics': 0, 'mails': 0, 'ledger': 1, 'failed': 1}
        a: 2 handled, 2 failed, 0 waiting
        seen: ['1a', '2a', '2b'] watched: ['control', 'tenant.2'] left: 1
        """,
    "logging_runner": """
        read: first
        left: 1
        BEGIN: 3
        COMMIT: 3
        INSERT_MESSAGE: 2
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


class ExamplesReadmeTest(ExampleTest):
    """The snippets of the page run as they stand."""

    def setUp(self) -> None:
        super().setUp()
        self.text = (EXAMPLES / "README.md").read_text(encoding="utf-8")

    def block(self, words: str) -> str:
        """The one Python block with these words."""
        found = [code for code in code_blocks(self.text) if words in code]
        self.assertEqual(len(found), 1, words)
        return found[0]

    def test_the_synchronous_snippet(self) -> None:
        end = 'q = Queue("myqueue")\nq.write("later")\nwhile q.stats().total:\n    pass\nwatcher.stop()\n'
        printed = self.example("-c", self.block("Standard synchronous usage") + end)
        self.assertEqual(printed, "Hello, World!\nGot: later\n")

    def test_the_asynchronous_snippet(self) -> None:
        body = textwrap.indent(self.block("AsyncBroker("), "    ")
        code = f"import asyncio\nasync def main():\n{body}\n    print(msg)\nasyncio.run(main())"
        self.assertEqual(self.example("-c", code), "Hello async!\n")

    def test_a_runner_that_gives_nothing_is_told_which_method_does(self) -> None:  # case 66
        namespace: dict[str, Any] = {}
        exec(self.block("import SQLRunner, OperationalError") + self.block("class MyRunner(SQLRunner)"), namespace)
        step = self.block("runner = MyRunner(config)").replace("MyRunner(config)", "MyRunner()")
        with self.assertRaisesRegex(UsageError, r"MyRunner\.run\(\) returned None"):
            exec(step, namespace)

    def test_the_runner_snippet_works_once_its_methods_do_something(self) -> None:
        skeleton = self.block("class MyRunner(SQLRunner)")
        for method in ("begin_immediate()", "commit()", "rollback()", "close()"):
            name = method.partition("(")[0]
            skeleton = re.sub(rf"(def {name}\(self\):\n.*\n +)pass", rf"\1self.inner.{method}", skeleton)
        skeleton = skeleton.replace("pass", "return self.inner.run(sql, params, fetch=fetch)")
        code = (
            self.block("import SQLRunner, OperationalError")
            + skeleton
            + "    def __init__(self, config):\n        self.inner = config\n"
            + 'from simplebroker import SQLiteRunner\nconfig = SQLiteRunner("test.db")\n'
            + self.block("runner = MyRunner(config)")
            + "    print(q.read())\nrunner.close()\n"
        )
        self.assertEqual(self.example("-c", code), "Hello from custom runner!\n")

    def test_links_commands_and_the_list_of_files_are_right(self) -> None:
        anchors = {
            re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", self.text, re.MULTILINE)
        }
        targets = set(re.findall(r"\]\(([^)]+)\)", self.text))
        for target in targets:
            self.assertTrue(target[1:] in anchors if target[0] == "#" else (EXAMPLES / target).is_file(), target)
        files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".md")}
        self.assertEqual(files - targets - {"README.md"}, set())
        bash = "\n".join(code_blocks(self.text, "bash"))
        commands = re.findall(r"^(?:python|bash)(?: -m unittest)? (\S+)", bash, re.MULTILINE)
        for command in commands:
            self.assertTrue((ROOT / command).is_file(), command)


# ---------------------------------------------------------------------------------------------------
# Examples: asyncio.
# ---------------------------------------------------------------------------------------------------


def module(name: str) -> Any:
    """An example as a module."""
    return importlib.import_module(name)


class AsyncTest(ExampleTest):
    """Coroutines of a test get a deadline, and a task that ends with an error that nobody looked at fails it."""

    def run_async(self, main: Any) -> None:
        problems: list[str] = []

        async def watched() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(str(context)))
            await asyncio.wait_for(main, 2 * DEADLINE_S)

        asyncio.run(watched())
        gc.collect()
        self.assertEqual(problems, [])

    async def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            await asyncio.sleep(0.002)

    def left(self, name: str = "q") -> list[str]:
        """What is ready; nothing else may be in the queue."""
        with Queue(name, self.path) as queue:
            bodies = [str(message) for message in queue.peek_all()]
            self.assertEqual(queue.stats().total, len(bodies))
            return bodies


class AsyncWrapperTest(AsyncTest):
    def wrapper(self) -> Any:
        return module("async_wrapper").AsyncBroker(self.path)

    def test_leaving_the_block_stops_and_awaits_workers_and_does_no_work_again(self) -> None:  # case 62
        done: list[str] = []

        async def main() -> None:
            async def work(message: Message, *_: object) -> None:
                await asyncio.sleep(0.01)
                done.append(str(message))

            async def loop_over() -> None:
                async for message in broker.stream_messages("q"):
                    await work(message)

            async with self.wrapper() as broker:
                for number in range(30):
                    await broker.push("q", str(number))
                works = [loop_over(), loop_over(), broker.watch_queue("q", work), broker.pop("other", wait=math.inf)]
                tasks = [asyncio.ensure_future(each) for each in works]
                await self.until(lambda: len(done) > 6)
            for task in tasks:
                self.assertTrue(task.done() and task.result() is None)

        self.run_async(main())
        self.assertEqual(sorted(done + self.left(), key=int), [str(number) for number in range(30)])

    def test_a_cancelled_task_neither_loses_a_message_nor_gives_one_out_again(self) -> None:  # case 63
        random_s = random.Random(1).random

        async def main() -> None:
            async def ask(asked: list[str]) -> None:
                async for message in broker.stream_messages("q"):
                    asked.append(str(message))

            async with self.wrapper() as broker:
                for _ in range(25):
                    asked: list[str] = []
                    for number in range(4):
                        await broker.push("q", str(number))
                    stream, pop = asyncio.ensure_future(ask(asked)), asyncio.ensure_future(broker.pop("q"))
                    await asyncio.sleep(random_s() / 50)
                    stream.cancel()
                    pop.cancel()
                    await asyncio.wait([stream, pop])
                    taken = [] if pop.cancelled() or pop.result() is None else [str(pop.result())]
                    left = []
                    while message := await broker.pop("q"):
                        left.append(str(message))
                    self.assertEqual({*asked, *taken, *left}, set("0123"))
                    self.assertEqual({*asked[:-1], *taken} & {*left}, set(), "the last one asked for may come again")

        self.run_async(main())

    def test_many_waiting_tasks_do_not_slow_others_down(self) -> None:  # case 64
        async def main() -> None:
            async with self.wrapper() as broker:
                waiting = [asyncio.ensure_future(broker.pop(f"other{n % 250}", wait=math.inf)) for n in range(500)]
                await asyncio.sleep(0)
                times = []
                for _ in range(40):
                    begin = time.perf_counter()
                    await broker.push("q", "x")
                    times.append(time.perf_counter() - begin)
                self.assertLess(statistics.median(times), 0.03)
                for number in range(250):
                    await broker.push(f"other{number}", "one for the first, and")
                    await broker.push(f"other{number}", "one for the second")
                popped = await asyncio.gather(*waiting)
                self.assertEqual(len({message.id for message in popped}), 500)

        self.run_async(main())

    def test_a_loop_that_is_left_gives_back_what_it_has_and_what_it_fetched_ahead(self) -> None:
        async def main() -> None:
            async with self.wrapper() as broker:
                for body in "abcdef":
                    await broker.push("q", body)
                stream = broker.stream_messages("q")
                async for message in stream:
                    if message == "d":
                        break
                await stream.aclose()
                self.assertEqual(await broker.size("q"), 3)
                with self.assertRaises(ZeroDivisionError):
                    async for _ in broker.stream_messages("q"):
                        raise ZeroDivisionError
            with self.assertRaises(UsageError):
                await broker.size("q")

        self.run_async(main())
        with Queue("q", self.path) as queue:
            self.assertEqual([(str(each), each.attempt) for each in queue.peek_all()], [("d", 2), ("e", 0), ("f", 0)])

    def test_a_delayed_message_and_one_of_another_process_end_a_wait(self) -> None:
        async def main() -> None:
            async with self.wrapper() as broker:
                await broker.push("q", "later", delay=0.1)
                self.assertEqual(await broker.pop("q", wait=DEADLINE_S), "later")
                waiting = asyncio.ensure_future(broker.pop("q", wait=DEADLINE_S))
                await asyncio.sleep(0.05)
                with Queue("q", self.path, settings=Settings(cache_mb=1)) as other:  # its own runner
                    other.write("from outside")
                self.assertEqual(await waiting, "from outside")
                self.assertIsNone(await broker.pop("q", wait=0.01))

        self.run_async(main())


NEEDS_AIOSQLITE = unittest.skipUnless(
    all(importlib.util.find_spec(name) for name in ("aiosqlite", "aiosqlitepool")), "needs aiosqlite and aiosqlitepool"
)


@NEEDS_AIOSQLITE
class AsyncPooledBrokerTest(AsyncTest):
    def pooled(self) -> Any:
        return module("async_pooled_broker").AsyncBrokerCore(self.path)

    def test_the_programs_print_what_their_page_says(self) -> None:
        self.assertIn("handled at least 50: True in all: 100\n", self.example(EXAMPLES / "async_pooled_broker.py"))
        worker = self.example(EXAMPLES / "async_simple_example.py")
        self.assertIn("receipts: 99, paid: 49500\ndead letter: not an order, because: JSONDecodeError", worker)
        batch = self.example(EXAMPLES / "async_simple_example.py", "batch")
        self.assertEqual(batch, "batches: 5, sum: 499500, left: 0\n")

    def test_every_block_of_its_page_runs(self) -> None:
        for block in code_blocks((EXAMPLES / "ASYNC_README.md").read_text(encoding="utf-8")):
            self.run_blocks([block])

    def test_synchronous_and_asynchronous_code_share_a_queue_and_its_ids(self) -> None:
        async def main() -> None:
            async with self.pooled() as broker:
                queue, plain = broker.queue("q"), self.queue()
                ids = [await queue.write("a"), plain.write("b"), *await queue.write_many(["c", "d"]), plain.write("e")]
                self.assertEqual(ids, sorted(set(ids)))
                self.assertEqual([m.id for m in await queue.peek_many(9)], ids)
                message = await queue.lease(60)
                with self.assertRaises(LeaseLost):
                    await queue.ack(Message("a", ids[0], "q", 1, 12345))
                await queue.release(message, delay=60, reason="not\nnow")
                self.assertEqual((plain.peek(message_id=ids[0]).reason, await queue.count()), ("not now", 4))
                self.assertEqual((await queue.read(), plain.read()), ("b", "c"))
                self.assertEqual(await queue.move("r"), "d")
                leased = plain.lease(60)
                await queue.extend(leased, 90)
                await queue.dead_letter(leased, reason="why")
                dead = await broker.queue("q.dead").peek()
                self.assertEqual((dead, dead.reason, dead.attempt), ("e", "why", 0))
                self.assertEqual((await queue.delete(), plain.stats().total), (1, 0))
                await broker.queue("q.dead").delete()
                self.assertGreater(plain.write("new"), ids[-1])
                misuses = queue.write(1), queue.write_many("ab"), queue.write("x", delay=-1), queue.ack(dead)
                for misuse in misuses:
                    with self.assertRaises((TypeError, ValueError)):
                        await misuse

        self.run_async(main())

    def test_a_lease_that_ends_and_a_write_elsewhere_wake_who_waits(self) -> None:
        async def main() -> None:
            async with self.pooled() as broker:
                queue = broker.queue("q")
                await queue.write("x")
                stale = await queue.lease(0.1)
                again = await queue.lease(60, wait=DEADLINE_S)
                self.assertEqual((again.id, again.attempt), (stale.id, 2))
                with self.assertRaises(LeaseLost):
                    await queue.ack(stale)
                waiting = asyncio.ensure_future(queue.read(wait=DEADLINE_S))
                await asyncio.sleep(0.05)
                self.queue().write("y")
                self.assertEqual(await waiting, "y")

        self.run_async(main())

    def test_a_consumer_that_is_cancelled_twice_gives_its_leases_back(self) -> None:  # case 61
        chance = random.Random(2)

        async def handler(message: Message) -> None:
            await asyncio.sleep(chance.random() / 500)

        async def loop_over(queue: Any) -> None:
            async for message in queue.read_all(wait=math.inf):
                await handler(message)

        async def main() -> None:
            for turn in range(24):
                async with self.pooled() as broker:
                    queue = broker.queue("q")
                    await queue.write_many(map(str, range(40)))
                    ways = loop_over, lambda queue: queue.watch(handler), lambda queue: queue.lease(60)
                    task = asyncio.ensure_future(ways[turn % 3](queue))
                    for turns in (chance.randrange(60), chance.randrange(4)):
                        for _ in range(turns):
                            await asyncio.sleep(0.0005)
                        task.cancel()
                    if turn % 2:
                        await asyncio.wait([task])
                await asyncio.wait([task])
                if task.cancelled():
                    self.left()
                self.queue().delete()

        self.run_async(main())

    def test_leaving_the_block_stops_and_awaits_workers_and_does_no_work_again(self) -> None:  # case 62
        done: list[str] = []

        async def main() -> None:
            async def work(message: Message) -> None:
                await asyncio.sleep(0.01)
                done.append(str(message))

            async def loop_over() -> None:
                async for message in queue.read_all(wait=math.inf):
                    await work(message)

            async with self.pooled() as broker:
                queue = broker.queue("q")
                await queue.write_many(map(str, range(30)))
                tasks = [asyncio.ensure_future(each) for each in (loop_over(), queue.watch(work, concurrency=3))]
                await self.until(lambda: len(done) > 6)
            for task in tasks:
                self.assertTrue(task.done() and task.result() is None)

        self.run_async(main())
        self.assertEqual(sorted(done + self.left(), key=int), [str(number) for number in range(30)])

    def test_a_file_that_is_no_database_or_was_replaced_is_refused(self) -> None:
        async def main() -> None:
            async with self.pooled() as broker:
                await broker.queue("q").write("x")
                self.path.rename(self.dir / "away.db")
                with self.assertRaisesRegex(OperationalError, "deleted or replaced"):
                    await broker.queue("q").write("y")
            self.path = self.dir / "text.db"
            self.path.write_bytes(b"not a database, but long enough to be taken for one" * 100)
            with self.assertRaises(DatabaseError):
                async with self.pooled():
                    pass

        self.run_async(main())


@NEEDS_AIOSQLITE
class ContractOfPooledBroker(QueueContract, ExampleTest):
    """The async broker keeps the contract of Queue. What it lacks, such as peek_all, synchronous code does."""

    class Synchronous:
        """An AsyncQueue whose methods are called from outside the event loop."""

        def __init__(self, loop: Any, queue: Any, plain: Queue) -> None:
            self._loop, self._queue, self._plain = loop, queue, plain

        def __getattr__(self, name: str) -> Any:
            method = getattr(self._queue, name, None)
            if method is None:
                return getattr(self._plain, name)
            if name == "read_all":
                return lambda **options: self._loop.run_until_complete(self._collect(method(**options)))
            return lambda *args, **options: self._loop.run_until_complete(method(*args, **options))

        @staticmethod
        async def _collect(messages: Any) -> list[Message]:
            return [message async for message in messages]

    def setUp(self) -> None:
        super().setUp()
        self._broker, self._loop = self.broker(), asyncio.new_event_loop()
        self._core = module("async_pooled_broker").AsyncBrokerCore(self.path)
        self._loop.run_until_complete(self._core.__aenter__())
        self.addCleanup(self._loop.close)
        self.addCleanup(lambda: self._loop.run_until_complete(self._core.close()))

    def b(self) -> Broker:
        return self._broker

    def q(self, name: str) -> Any:
        return self.Synchronous(self._loop, self._core.queue(name), self._broker.queue(name))


class GuideTest(ExampleTest):
    def test_every_block_of_the_guide_runs(self) -> None:
        text = (EXAMPLES / "example_extension_implementation.md").read_text(encoding="utf-8")
        sections = {part.partition("\n")[0]: part for part in re.split("^## ", text, flags=re.MULTILINE)}
        ran = 0
        for title, part in sections.items():
            before = re.search("<!-- continues: (.*) -->", part)
            blocks = (code_blocks(sections[before[1]]) if before else []) + code_blocks(part)
            needs = re.search("<!-- needs: (.*) -->", part)
            if blocks and (not needs or importlib.util.find_spec(needs[1])):
                with self.subTest(title):
                    self.run_blocks(blocks)
                ran += 1
        self.assertGreaterEqual(ran, 3)


# ---------------------------------------------------------------------------------------------------
# Examples: many queues, runners.
# ---------------------------------------------------------------------------------------------------


class MultiQueueTest(ExampleTest):
    def watcher(self, *args: Any, **options: Any) -> Any:
        return module("multi_queue_watcher").MultiQueueWatcher(*args, db=self.broker(), **options)

    def test_no_queue_waits_for_the_backlog_of_another(self) -> None:
        broker, order = self.broker(), []
        broker.queue("long").write_many(map(str, range(500)))
        for name in ("b", "c"):
            broker.queue(name).write_many(["1", "2"])
        self.watcher(["long", "b", "c"], lambda message, _: order.append(message.queue)).watch(drain=True)
        self.assertEqual(order[:6], ["long", "b", "c"] * 2)
        self.assertEqual((len(order), broker.queues()), (504, {}))

    def test_the_error_handler_of_the_queue_decides(self) -> None:
        broker = self.broker()
        for name in ("drop", "retry", "stop"):
            broker.queue(name).write_many(["1", "2"])

        def fail(message: Message, timestamp: int) -> None:
            raise ValueError("never\nworks")

        verdicts = {"drop": lambda *_: True, "retry": lambda *_: None}
        self.watcher(verdicts, fail, None, verdicts, max_attempts=2, backoff=0.02).watch(drain=True)
        self.wait_for(broker.queue("retry").has_pending)
        with self.assertLogs("multi_queue_watcher", "WARNING"):
            self.watcher(["retry"], fail, max_attempts=2, error_handler=verdicts["retry"]).watch(drain=True)
        self.wait_for(lambda: broker.queue("retry").count() != 1)
        self.watcher(["stop"], fail, error_handler=lambda *_: False).watch()  # ends at the first error
        stop = broker.queue("stop").peek()
        self.assertEqual((stop, stop.attempt, stop.reason), ("1", 1, "ValueError: never works"))
        self.assertNotIn("drop", broker.queues())
        self.assertEqual(broker.queue("retry.dead").peek().reason, "ValueError: never works (attempt 2)")

    def test_a_retry_that_becomes_due_is_found_while_another_queue_is_busy(self) -> None:
        broker, tries = self.broker(), []
        broker.queue("flaky").write("x")
        broker.queue("busy").write("x")

        def handler(message: Message, timestamp: int) -> None:
            if message.queue == "busy":
                broker.queue("busy").write("x")  # there is always one more
            else:
                tries.append(message.attempt)
                if message.attempt == 1:
                    raise ValueError
                watcher.request_stop()

        watcher = self.watcher(["flaky", "busy"], handler, backoff=0.05, error_handler=lambda *_: None)
        thread = watcher.run_in_thread()
        thread.join(DEADLINE_S)
        self.assertEqual(tries, [1, 2])

    def test_a_handler_that_ends_its_thread_is_counted(self) -> None:  # trap 34
        self.queue().write("x")

        def leave(message: Message, timestamp: int) -> None:
            sys.exit("enough")

        for attempt in (1, 2):
            with self.assertRaises(SystemExit):
                self.watcher(["q"], leave, max_attempts=2).watch()
            message = self.queue().peek()
            self.assertEqual((message.attempt, message.reason), (attempt, "SystemExit: enough"))
        with self.assertLogs("multi_queue_watcher", "WARNING"):
            self.watcher(["q"], leave, max_attempts=2).watch(drain=True)
        self.assertBodies(self.queue("q.dead"), ["x"])

    def test_queues_come_and_go_and_a_signal_ends_it(self) -> None:
        broker, seen = self.broker(), []

        def handler(message: Message, timestamp: int) -> None:
            seen.append(message.queue)
            if message.queue == "a":
                watcher.add_queue("b")
                watcher.remove_queue("a")
            else:
                os.kill(os.getpid(), signal.SIGTERM)

        watcher = self.watcher(["a"], handler)
        for name in ("a", "b"):
            broker.queue(name).write_many(["1", "2"])
        watcher.watch()
        self.assertEqual((seen, watcher.queues), (["a", "b"], ["b"]))
        self.assertEqual({name: each.total for name, each in broker.queues().items()}, {"a": 1, "b": 1})

    def test_the_code_of_its_page_compiles(self) -> None:
        for block in code_blocks((EXAMPLES / "MULTI_QUEUE_README.md").read_text(encoding="utf-8")):
            compile(block, "MULTI_QUEUE_README.md", "exec")


class RunnerExamplesTest(ExampleTest):
    def test_the_logging_runner_names_statements_and_passes_errors_and_changes_on(self) -> None:
        runner = module("logging_runner").LoggingRunner(SQLiteRunner(self.path))
        self.addCleanup(runner.close)
        with self.assertLogs("logging_runner", "DEBUG") as logs, Queue("q", runner=runner) as queue:
            id = queue.write("secret")
            with self.assertRaises(IntegrityError):
                runner.run(ext.INSERT_MESSAGE, (id, "q", "again", None))
            with queue.broker.waiter() as waiter:
                waiter.wait(0.01)
                self.queue().write("by another connection")
                self.wait_for(lambda: waiter.wait(0))
        text = "\n".join(logs.output)
        self.assertRegex(text, r"INSERT_MESSAGE +\d+\.\d\d ms  IntegrityError")
        self.assertNotIn("secret", text)

    def test_what_the_broker_does_in_the_applications_transaction_is_the_applications(self) -> None:
        outbox = module("outbox")
        connection = sqlite3.connect(str(self.path))
        self.addCleanup(connection.close)
        outbox.make_outbox(connection)
        outbox.make_outbox(connection)  # does nothing
        connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY)")
        queue = Queue("q", runner=outbox.OutboxRunner(connection))

        def fail_after(*bodies: str) -> None:
            with connection:
                connection.execute("INSERT INTO rows DEFAULT VALUES")
                queue.write_many(bodies)
                raise LookupError

        with self.assertRaises(LookupError):
            fail_after("a", "b")
        with connection:
            connection.execute("INSERT INTO rows DEFAULT VALUES")
            queue.write("kept")
            with contextlib.suppress(LookupError), queue.broker.transaction():
                queue.write("only this part is undone")
                raise LookupError
            self.assertEqual(self.queue().count(), 0)  # not committed
        self.assertBodies(self.queue(), ["kept"])
        self.assertEqual(connection.execute("SELECT count(*) FROM rows").fetchall(), [(1,)])
        queue.write("without a transaction")
        message = queue.lease(60)
        queue.dead_letter(message, reason="why")
        self.assertEqual(self.queue("q.dead").read().reason, "why")
        self.assertRan(self.cli("read", "q"), b"without a transaction\n")

    def test_an_outbox_refuses_the_files_of_other_programs(self) -> None:
        for statement in ("PRAGMA application_id = 7", "CREATE TABLE messages (id)"):
            connection = sqlite3.connect(str(self.dir / f"{len(statement)}.db"))
            self.addCleanup(connection.close)
            connection.execute(statement)
            connection.commit()
            with self.assertRaises(ValueError):
                module("outbox").make_outbox(connection)


# ---------------------------------------------------------------------------------------------------
# Examples: shell scripts. One test for the idea of each, and bodies that try to get out.
# ---------------------------------------------------------------------------------------------------

SCRIPTS = ("resilient_worker.sh", "dead_letter_queue.sh", "queue_migration.sh", "work_stealing.sh")
HOSTILE_BODIES = ("$(touch x)", "`touch x`", "'; touch x; '", "-n", "a\nb\n\n", "\\n\\t%s", "", 'umlaut äöü "quoted"')
SHELL_TOOLS = all(map(shutil.which, ("bash", "jq")))


@unittest.skipUnless(SHELL_TOOLS, "needs bash and jq")
class ShellTest(ExampleTest):
    def setUp(self) -> None:
        super().setUp()
        command = self.dir / "the broker"
        command.write_text(f'#!/bin/sh\nexec "{PYTHON[0]}" {" ".join(PYTHON[1:])} -m simplebroker "$@"\n')
        command.chmod(0o755)
        (self.dir / "tmp").mkdir()
        self.environ.update(
            BROKER=str(command), BROKER_SYNC_MODE="OFF", TMPDIR=str(self.dir / "tmp"),
            BROKER_DEFAULT_DB_LOCATION=str(self.dir), BROKER_DEFAULT_DB_NAME="test.db",
        )  # fmt: skip

    def start(self, script: str, *arguments: object, **settings: object) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            ["bash", str(EXAMPLES / script), *map(str, arguments)], cwd=self.dir, start_new_session=True,
            env={**self.environ, **{name: str(value) for name, value in settings.items()}},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.addCleanup(self.reap, process)
        return process

    def script(self, script: str, *arguments: object, status: int = 0, **settings: object) -> str:
        """Run a script to its end; return what it printed."""
        process = self.start(script, *arguments, **settings)
        output, errors = process.communicate(timeout=2 * DEADLINE_S)
        self.assertEqual(process.returncode, status, (output + errors).decode())
        self.assertFalse((self.dir / "x").exists(), "a body was executed")
        return output.decode()

    def write(self, *bodies: str, queue: str = "jobs") -> list[int]:
        return self.queue(queue).write_many(bodies)

    def ready(self, queue: str = "jobs") -> list[str]:
        return [str(message) for message in self.queue(queue).peek_all()]

    def totals(self) -> dict[str, int]:
        return {name: stats.total for name, stats in self.broker().queues().items()}

    def shell(self, code: str) -> list[str]:
        """A command that runs a line of bash, with $1 the test's directory."""
        return ["bash", "-c", code, "command", str(self.dir)]

    def saving(self) -> list[str]:
        """A command that saves the body of each message in a file that is named after its id."""
        (self.dir / "saved").mkdir()
        return self.shell('cat >"$1/saved/$BROKER_MESSAGE_ID"')

    def saved(self) -> list[str]:
        return [path.read_bytes().decode() for path in sorted((self.dir / "saved").iterdir())]


class AllScriptsTest(ShellTest):
    @unittest.skipUnless(shutil.which("shellcheck"), "needs shellcheck")
    def test_shellcheck_finds_nothing(self) -> None:
        found = subprocess.run(["shellcheck", *(EXAMPLES / name for name in SCRIPTS)], capture_output=True, check=False)
        self.assertEqual((found.returncode, found.stdout.decode()), (0, ""))

    def test_the_helpers_are_the_same_text_in_each_file(self) -> None:
        texts = [(EXAMPLES / name).read_text(encoding="utf-8") for name in SCRIPTS]
        functions = [dict(re.findall(r"^(\w+)\(\) \{(.*?)^\}", text, re.MULTILINE | re.DOTALL)) for text in texts]
        names = [name for name, count in Counter(name for each in functions for name in each).items() if count > 1]
        own = {"main", "usage", "demo", "demonstrate"}
        self.assertGreater(len(names), 2)
        for name in set(names) - own:
            self.assertEqual(len({each[name] for each in functions if name in each}), 1, name)

    def test_no_menu_without_arguments_and_no_empty_queue_where_there_is_an_error(self) -> None:
        for script in SCRIPTS:
            self.script(script, status=1)
        self.path.write_text("this is not a database, and long enough to tell: " * 20)
        for script, *arguments in (
            ("resilient_worker.sh", "lease", "jobs", "cat"),
            ("dead_letter_queue.sh", "simple", "jobs", "cat"),
            ("queue_migration.sh", "rename", "jobs", "other"),
            ("work_stealing.sh", "round-robin", "jobs", "other"),
        ):
            self.script(script, *arguments, status=1)

    def test_demos_end_by_themselves_and_leave_nothing(self) -> None:
        self.write("not for the demo")
        for script in SCRIPTS:
            self.script(script, "demo")
        self.assertEqual((self.totals(), list((self.dir / "tmp").iterdir())), ({"jobs": 1}, []))

    def test_a_term_to_the_group_finishes_the_message_or_gives_it_back(self) -> None:  # case 60
        work = self.shell('touch "$1/begun"; exec sleep 1')
        for script, *arguments in (
            ("resilient_worker.sh", "lease", "jobs"),
            ("dead_letter_queue.sh", "simple", "jobs"),
            ("dead_letter_queue.sh", "counted", "jobs"),
            ("work_stealing.sh", "priority", "jobs", "--"),
        ):
            with self.subTest(script):
                self.write("good")
                process = self.start(script, *arguments, *work, MAX_ATTEMPTS=1)
                self.wait_for((self.dir / "begun").exists)
                os.killpg(process.pid, signal.SIGTERM)
                process.communicate(timeout=DEADLINE_S)
                self.assertNotIn("jobs.dead", self.totals())
                self.assertEqual(self.queue("jobs").stats().leased, 0)
                self.queue("jobs").delete()
                (self.dir / "begun").unlink()


class ResilientWorkerTest(ShellTest):
    def test_bodies_arrive_byte_for_byte_by_lease_and_by_checkpoint(self) -> None:
        save, checkpoint = self.saving(), self.dir / "check point"
        for way in (["lease", "jobs"], ["peek", "jobs", checkpoint]):
            self.write(*HOSTILE_BODIES)
            self.script("resilient_worker.sh", *way, *save, DRAIN=1)
            self.assertEqual(self.saved()[-len(HOSTILE_BODIES) :], list(HOSTILE_BODIES))
        self.assertEqual(self.totals(), {})

    def test_a_failure_is_tried_again_and_then_dead_lettered(self) -> None:
        self.write("bad", "good")
        tries = self.shell('read -r body; echo "$body" >>"$1/tries"; [[ $body == good ]]')
        worker = self.start("resilient_worker.sh", "lease", "jobs", *tries, MAX_ATTEMPTS=2, BACKOFF_MS=1)
        self.wait_for(lambda: self.totals() == {"jobs.dead": 1})
        worker.terminate()
        self.assertEqual(worker.wait(DEADLINE_S), 0)
        self.assertEqual(sorted((self.dir / "tries").read_text().split()), ["bad", "bad", "good"])
        self.assertEqual(self.ready("jobs.dead"), ["bad"])


class DeadLetterScriptTest(ShellTest):
    def test_failures_are_counted_delayed_shown_and_tried_again(self) -> None:
        self.write(*HOSTILE_BODIES)
        self.script("dead_letter_queue.sh", "simple", "jobs", "false")
        self.assertEqual(self.ready("jobs.dead"), list(HOSTILE_BODIES))
        self.script("dead_letter_queue.sh", "check", "jobs", MAX_DEAD=3, status=3)
        self.script("dead_letter_queue.sh", "retry", "jobs")
        self.assertEqual(self.totals(), {"jobs": len(HOSTILE_BODIES)})
        counting = self.shell('echo >>"$1/tries"; exit 1')
        self.script("dead_letter_queue.sh", "backoff", "jobs", *counting, MAX_ATTEMPTS=2, BACKOFF_MS=1)
        self.assertEqual(len((self.dir / "tries").read_text()), 2 * len(HOSTILE_BODIES))
        self.assertEqual(self.ready("jobs.dead"), list(HOSTILE_BODIES))


class QueueMigrationTest(ShellTest):
    def test_rename_select_transform_and_backup(self) -> None:
        self.write(*HOSTILE_BODIES)
        self.script("queue_migration.sh", "rename", "jobs", "tasks")
        self.assertEqual((self.ready("tasks"), self.totals()), (list(HOSTILE_BODIES), {"tasks": len(HOSTILE_BODIES)}))
        self.script("queue_migration.sh", "content", "tasks", "picked", "touch x")
        self.assertEqual(self.ready("picked"), list(HOSTILE_BODIES[:3]))
        self.script("queue_migration.sh", "transform", "picked", "upper", "tr", "a-z", "A-Z")
        self.assertEqual(self.ready("upper"), [body.upper() for body in HOSTILE_BODIES[:3]])
        self.script("queue_migration.sh", "merge", "all", "tasks", "upper")
        self.assertEqual(self.totals(), {"all": len(HOSTILE_BODIES)})
        self.script("queue_migration.sh", "backup", self.dir / "backup")
        self.script("queue_migration.sh", "verify", self.dir / "backup")


class WorkStealingTest(ShellTest):
    def test_spread_steal_and_work_by_priority(self) -> None:
        self.write(*HOSTILE_BODIES)
        self.script("work_stealing.sh", "round-robin", "jobs", "one", "two")
        self.assertEqual([self.ready("one"), self.ready("two")], [list(HOSTILE_BODIES[n::2]) for n in (0, 1)])
        self.script("work_stealing.sh", "steal", "mine", "one", "none")
        self.assertEqual(self.ready("mine"), list(HOSTILE_BODIES[:3:2]))
        self.write("next", "and next")
        self.script("work_stealing.sh", "least-loaded", "jobs", "two", "empty")
        self.assertEqual(self.ready("empty"), ["next", "and next"])
        self.script("work_stealing.sh", "priority", "mine", "one", "two", "empty", "--", *self.saving())
        self.assertEqual(self.saved(), [*HOSTILE_BODIES, "next", "and next"])


# ---------------------------------------------------------------------------------------------------
# PostgreSQL: the same contract on a real server, and what only a server can do wrong. Never in CI: it needs
# Debian's package "postgresql" and psycopg.
# ---------------------------------------------------------------------------------------------------

PG_IDLE_S = 10.0  # how long a client may be silent in a transaction, as the runner documents it


class Server:
    """A cluster of its own in a temporary directory, on a Unix socket. Root starts it as the user nobody."""

    def __init__(self, bin: Path) -> None:
        self.bin, self.dir = bin, Path(tempfile.mkdtemp(prefix="broker-postgresql-"))
        if os.geteuid() == 0:
            os.chown(self.dir, NOBODY, NOBODY)
        self.url = f"postgresql:///postgres?host={self.dir}&user=broker"
        try:
            self.call("initdb", "-D", "db", "-A", "trust", "-U", "broker", "-E", "UTF8", "--locale=C", "--no-sync")
            self.start()
        except BaseException:
            self.remove()
            raise

    def call(self, program: str, *args: str) -> None:
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        command = [str(self.bin / program), *args]
        with open(self.dir.parent / f"{self.dir.name}.out", "wb") as out:  # pg_ctl's children keep it open
            done = subprocess.run(command, cwd=self.dir, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **user)
        if done.returncode:
            raise RuntimeError(f"{program} failed: {Path(out.name).read_text()}")

    def start(self) -> None:
        options = f"-k {self.dir} -c listen_addresses= -c max_connections=50"
        self.call("pg_ctl", "-D", "db", "-w", "-l", "log", "-o", options, "start")

    def stop(self, mode: str) -> None:
        self.call("pg_ctl", "-D", "db", "-w", "-m", mode, "stop")

    def remove(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.stop("immediate")
        shutil.rmtree(self.dir, ignore_errors=True)
        (self.dir.parent / f"{self.dir.name}.out").unlink()


@functools.cache
def postgresql() -> Server:
    """The server of this test run, started by the first test that needs it."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) + [Path(shutil.which("initdb") or "/nowhere")]
    if not found[0].exists():
        raise unittest.SkipTest("needs PostgreSQL: there is no initdb (Debian: apt install postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        raise unittest.SkipTest('needs PostgreSQL\'s client: pip install "psycopg[binary]"')
    server, owner = Server(found[0].parent), os.getpid()
    atexit.register(lambda: server.remove() if os.getpid() == owner else None)
    return server


class PostgreSQLTest(ForkTest):
    """The URL of an empty database on a running server; the path is still that of a file."""

    def setUp(self) -> None:
        self.server = postgresql()
        super().setUp()
        self.url = self.server.url
        os.environ["BROKER_SYNC_MODE"] = self.environ["BROKER_SYNC_MODE"] = "FULL"
        self.environ["PYTHONPATH"] = os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(EXAMPLES)])
        self.sql("DROP SCHEMA IF EXISTS simplebroker CASCADE")

    def sql(self, statement: str) -> list[Any]:
        """Run a statement as the server's owner."""
        import psycopg

        with psycopg.connect(self.server.url, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def broker(self, **options: Any) -> Broker:
        broker = Broker(self.url, **options)
        self.addCleanup(broker.close)
        return broker

    def command(self, *args: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """Run the command as a process of its own."""
        command = [sys.executable, "-m", "simplebroker", "-f", options.pop("url", self.url), *args]
        options = {"cwd": self.dir, "env": self.environ, "capture_output": True, "timeout": DEADLINE_S, **options}
        return subprocess.run(command, check=False, **options)


class ContractOfPostgreSQL(QueueContract, PostgreSQLTest):
    """Through the URL."""

    def setUp(self) -> None:
        super().setUp()
        self._broker = self.broker()

    def b(self) -> Broker:
        return self._broker


class ContractOfPostgreSQLRunner(QueueContract, PostgreSQLTest):
    """Through a runner that is given."""

    def setUp(self) -> None:
        super().setUp()
        runner = importlib.import_module("simplebroker_postgresql").PostgreSQLRunner(self.url)
        self.addCleanup(runner.close)
        self._broker = Broker(runner=runner)

    def b(self) -> Broker:
        return self._broker


class ContractOfPostgreSQLCommand(PostgreSQLTest, ContractOfCommandLine):
    """Through main(), each operation in a process."""

    def command(self, *args: str, **options: Any) -> Any:
        main = simplebroker.main
        with mock.patch.object(simplebroker, "main", lambda argv: main(["-f", self.url, *argv[2:]])):
            return ContractOfCommandLine.command(self, *args, **options)


class PostgreSQLRoom(PostgreSQLTest):
    """What is not in the contract."""

    def statements(self, act: Callable[[], object]) -> int:
        """How many messages the clients that log have sent while act() ran: each is a round trip."""
        log = self.server.dir / "log"
        before = log.read_text().count("LOG:  statement:")
        act()
        return log.read_text().count("LOG:  statement:") - before

    @property
    def logging_url(self) -> str:
        return f"{self.url}&options=-c%20log_statement%3Dall"

    def test_a_dump_goes_to_postgresql_and_back_and_is_the_same(self) -> None:
        source, server = Broker(self.path), self.broker()
        self.addCleanup(source.close)
        bodies = ["", "a\n", "\\", "it's", "%s :x ?", "\u00e9\U0001f600\x01\x7f", "x" * 70_000]
        for name in ("b", "a.B", "a-b", "a_b", "A"):
            source.queue(name).write_many(bodies)
        source.queue("b").write("later", delay=3600)
        source.queue("b").release(source.queue("b").lease(), delay=60, reason="it's \\ % ?")
        source.queue("A").lease(3600)
        lines = list(source.dump())
        self.assertEqual(server.load(lines), 36)
        self.assertEqual(list(server.dump()), lines)
        source.delete_all()
        source.load(server.dump())
        self.assertEqual(list(source.dump()), lines)

    def test_a_body_with_u0000_is_refused_by_name(self) -> None:
        queue = self.broker().queue("q")
        for write in (lambda: queue.write("a\0b"), lambda: queue.write_many(["a", "\0"])):
            with self.assertRaisesRegex(MessageError, r"U\+0000"):
                write()
        line = '{"type": "message", "queue": "q", "body": "a\\u0000", "id": 5}'
        with self.assertRaisesRegex(UsageError, r"line 2: .*U\+0000"):
            queue.broker.load([HEADER, line])
        queue.write("fine")
        self.assertEqual((queue.count(), queue.read()), (1, "fine"))

    def test_transactions_nest_and_are_all_or_nothing(self) -> None:
        broker, other = self.broker(), self.broker(settings=Settings(busy_timeout_ms=200))
        queue = broker.queue("q")
        with broker.transaction():
            queue.write("a")
            with self.assertRaises(ZeroDivisionError), broker.transaction():
                queue.write("b")
                self.assertEqual(queue.count(), 2)
                raise ZeroDivisionError
            queue.write("c")
            with self.assertRaisesRegex(OperationalError, "busy"):
                other.queue("q").write("no")
            self.assertEqual(other.queue("q").count(), 0)
        self.assertBodies(queue, ["a", "c"])
        with self.assertRaises(OperationalError), broker.transaction() as run:
            queue.write("d")
            with self.assertRaises(DatabaseError):
                run("SELECT nonsense", fetch=True)
        self.assertBodies(queue, ["a", "c"])

    def test_a_reader_that_checkpoints_by_id_misses_nothing_of_eight_writers(self) -> None:
        each, broker = 100, self.broker()
        broker.queue("q").count()

        def write(child: Child) -> None:
            queue = Queue("q", self.url)
            child.hear()
            for number in range(each):
                queue.write(str(number))

        children = [self.child(write) for _ in range(8)]
        for child in children:
            child.say("go")
        seen, last = 0, 0
        deadline = time.monotonic() + DEADLINE_S
        while seen < 8 * each and time.monotonic() < deadline:
            for message in broker.queue("q").peek_many(50, after=last):
                seen, last = seen + 1, message.id
        self.assertEqual(([child.wait() for child in children], seen), ([0] * 8, 8 * each))

    def test_kills_and_restarts_lose_nothing_and_acknowledge_nothing_twice(self) -> None:
        each, consumers = 1000 if FULL else 250, 4
        Broker(self.url).queue("q").count()
        acks = self.dir / "acks"
        acks.touch()

        def again(act: Callable[[], object], unknown: list[int]) -> object:
            """Until the server is there again; what is unknown is noted."""
            while True:
                try:
                    return act()
                except OperationalError as error:
                    unknown.append("unknown" in str(error))
                    time.sleep(0.05)

        def write(child: Child, name: int) -> None:
            queue = Queue("q", self.url)
            for number in range(each):
                unknown: list[int] = []
                again(lambda body=f"{name}.{number}": queue.write(body), unknown)
                if any(unknown):  # written once or twice
                    child.say(f"{name}.{number}")
            child.say("")

        def consume(child: Child) -> None:
            queue, unknown = Queue("q", self.url), []
            with open(acks, "a", buffering=1) as log:
                while True:
                    message = again(lambda: queue.lease(2, wait=1.0), unknown)
                    if message is not None:
                        unknown = []
                        try:
                            again(lambda held=message: queue.ack(held), unknown)
                            log.write(f"{message.id} {message} {int(any(unknown))}\n")
                        except LeaseLost:  # acknowledged before the restart, or given to another
                            log.write(f"{message.id} {message} 2\n" if any(unknown) else "")

        writers = [self.child(lambda child, name=name: write(child, name)) for name in range(2)]
        workers = [self.child(consume) for _ in range(consumers)]
        chance = random.Random(12)
        for kill in range(8):
            self.wait_for(lambda kill=kill: len(acks.read_bytes().splitlines()) > kill * each // 8, "acknowledgements")
            if kill in (3, 6):
                self.server.stop("fast" if kill == 3 else "immediate")
                self.server.start()
            victim = chance.randrange(consumers)
            workers[victim].signal(signal.SIGKILL)
            self.assertEqual(workers[victim].wait(), -signal.SIGKILL)
            workers[victim] = self.child(consume)
        doubtful: set[str] = set()
        for writer in writers:
            while body := writer.hear():
                doubtful.add(body)
            self.assertEqual(writer.wait(), 0)
        with Broker(self.url) as broker:
            self.wait_for(lambda: not broker.queues(), "the end of the queue")
        for worker in workers:
            worker.end()
        records = [line.split() for line in acks.read_text().splitlines()]
        sure = [id for id, _, unknown in records if unknown == "0"]
        self.assertEqual(len(sure), len(set(sure)))
        bodies = Counter({body: 0 for _, body, _ in records})
        bodies.update(body for _, body in {(id, body) for id, body, _ in records})
        self.assertEqual({body for body, count in bodies.items() if count > 1} - doubtful, set())
        # A consumer that was killed between its acknowledgement and its note has eaten one: at most one for each kill.
        lost = {f"{name}.{number}" for name in range(2) for number in range(each)} - set(bodies)
        self.assertLessEqual(len(lost), 8, lost)

    def test_a_stopped_client_blocks_the_others_for_the_documented_time_only(self) -> None:
        queue = self.broker(settings=Settings(busy_timeout_ms=30_000)).queue("q")
        queue.write("a")

        def hold(child: Child) -> None:
            with contextlib.suppress(OperationalError), Broker(self.url).transaction() as run:
                run(ext.SELECT_VERSION, fetch=True)
                child.say("inside")
                child.hear()
                run(ext.RECORD_NEWEST)
                return
            child.say("refused")

        child = self.child(hold)
        self.assertEqual(child.hear(), "inside")
        child.signal(signal.SIGSTOP)
        began = time.monotonic()
        queue.write("b")
        self.assertLess(time.monotonic() - began, PG_IDLE_S + 5)
        child.say()
        child.signal(signal.SIGCONT)
        self.assertEqual(child.hear(), "refused")

    def test_a_machine_whose_clock_is_ahead_steals_no_lease(self) -> None:
        queue = self.broker().queue("q")
        queue.write("a")
        self.assertEqual(queue.lease(30), "a")
        now = time.time_ns
        with mock.patch("time.time_ns", lambda: now() + HOUR_NS), mock.patch("time.time", lambda: now() / NS + 3600):
            with Queue("q", f"{self.url}&application_name=ahead") as ahead:
                self.assertIsNone(ahead.lease(30))
                self.assertLess(ahead.write("b"), now() + HOUR_NS // 2)

    def test_a_lost_connection_is_an_error_once_and_then_a_new_one(self) -> None:
        queue = self.broker().queue("q")
        queue.write("a")
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'simplebroker'"
        self.sql(end)
        queue.write("b")  # it was idle: nothing was in doubt
        with self.assertRaisesRegex(OperationalError, "lost"), queue.broker.transaction():
            queue.write("c")
            self.sql(end)
            queue.write("d")
        self.assertBodies(queue, ["a", "b"])

    def test_threads_and_forks_share_a_runner(self) -> None:
        broker = self.broker()
        queue = broker.queue("q")
        queue.write("parent")
        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(lambda number: queue.write(str(number)), range(80)))
            with broker.transaction():
                child = self.child(lambda child: queue.write("child"))
            self.assertEqual(child.wait(), 0)
        self.assertEqual((len(set(ids)), queue.count()), (80, 82))

    def test_an_idle_watcher_is_woken_and_asks_once_a_second(self) -> None:
        queue, woken = self.broker().queue("q"), []

        def watch(child: Child) -> None:
            def handle(message: Message, timestamp: int) -> None:
                child.say(str(time.monotonic_ns()))

            QueueWatcher("q", handle, db=self.logging_url).watch()

        child = self.child(watch)
        queue.write("first")
        child.hear()
        for _ in range(20):
            time.sleep(0.05)  # it is idle then
            began = time.monotonic_ns()
            queue.write("x")
            woken.append((int(child.hear()) - began) / 1e6)
        self.assertLess(statistics.median(woken), 10 if FULL else 50)
        time.sleep(1.0)
        self.assertLessEqual(self.statements(lambda: time.sleep(3.0)), 4)

    def test_a_write_is_one_round_trip_and_the_others_are_two(self) -> None:
        queue = Queue("q", self.logging_url)
        self.addCleanup(queue.close)
        queue.write_many(["a", "b", "c"])
        held: list[Any] = []
        acts = {
            "write": lambda: queue.write("x"), "write_many": lambda: queue.write_many(["y", "z"]), "read": queue.read,
            "read_many": lambda: queue.read_many(2), "lease": lambda: held.append(queue.lease()),
            "ack": lambda: queue.ack(held[0]), "peek": queue.peek, "count": queue.count,
        }  # fmt: skip
        trips = {name: self.statements(act) for name, act in acts.items()}
        self.assertEqual(list(trips.values()), [1, 1, 2, 2, 2, 2, 1, 1], trips)

    def test_the_commands_work_on_a_url(self) -> None:
        secret = self.url.replace("///", "//broker:hush@/") + "&password=hush"
        self.assertRan(self.command("write", "q", "a", url=secret), b"")
        status = self.command("--status", "--json", url=secret)
        self.assertRan(status)
        self.assertNotIn(b"hush", status.stdout)
        self.assertEqual(json.loads(status.stdout)["messages"], 1)
        work = [sys.executable, "-m", "simplebroker", "read", "other"]
        self.command("write", "other", "b")
        self.assertRan(self.command("work", "q", "--drain", "--", *work, url=secret), b"b\n")
        vacuum = self.command("--vacuum")
        self.assertRan(vacuum, b"")
        self.assertIn(b"VACUUM FULL simplebroker.messages", vacuum.stderr)
        cleanup = self.command("--cleanup")
        self.assertRan(cleanup, b"", 1)
        self.assertIn(b"DROP SCHEMA simplebroker CASCADE", cleanup.stderr)
        self.command("write", "q", "c")
        child = subprocess.Popen(
            [sys.executable, "-m", "simplebroker", "-f", self.url, "watch", "q"],
            stdout=subprocess.PIPE, env=self.environ, cwd=self.dir,
        )  # fmt: skip
        self.addCleanup(self.reap, child)
        assert child.stdout is not None
        self.assertEqual(child.stdout.readline(), b"c\n")
        child.send_signal(signal.SIGTERM)
        self.assertEqual(child.wait(DEADLINE_S), 0)

    def test_an_unreachable_server_is_a_plain_error(self) -> None:
        done = self.command("write", "q", "a", url=f"postgresql://broker:hush@/x?host={self.dir}")
        self.assertRan(done, b"", 1)
        self.assertNotIn(b"hush", done.stderr)


# ---------------------------------------------------------------------------------------------------
# Cases: small inputs on which the first edition failed, and what the first trials of this one got wrong.
# ---------------------------------------------------------------------------------------------------


class CasesTest(ForkTest):
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
            before = len(os.listdir("/proc/self/fd")) if ON_LINUX else 0
            for _ in range(20):
                with self.assertLogs("simplebroker", "WARNING"):
                    queue.read(wait=0.001)
            self.assertLessEqual(len(os.listdir("/proc/self/fd")) if ON_LINUX else 0, before)
        timer = threading.Timer(0.1, queue.write, ["b"])
        timer.start()
        self.assertEqual(queue.read(wait=DEADLINE_S), "b")
        timer.join()

    def test_a_watcher_outlives_a_directory_that_cannot_be_read_for_a_while(self) -> None:
        """Case 4, trap 29."""
        self.queue().write("a")
        root = os.geteuid() == 0
        for path in (self.dir, *self.dir.iterdir()) if root else ():
            os.chown(path, NOBODY, NOBODY)

        def work(child: Child) -> None:
            logging.disable(logging.CRITICAL)
            os.chdir("/")
            watcher = QueueWatcher("q", lambda message, timestamp: child.say(message), db=self.path)
            watcher.run_in_thread()
            child.hear()
            os.chmod(self.dir, 0)
            try:
                with self.assertRaises(OperationalError):
                    Queue("q", self.path).write("x")
                time.sleep(1.2)  # longer than any look
            finally:
                os.chmod(self.dir, 0o700)
            Queue("q", self.path).write("b")
            child.hear()

        child = self.child(work, NOBODY if root else None)
        self.assertEqual(child.hear(), "a")
        child.say()
        self.assertEqual(child.hear(), "b")
        child.say()
        self.assertEqual(child.wait(), 0)

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
        child = self.python(code, str(self.path))
        self.assertEqual(child.communicate(timeout=DEADLINE_S)[0], b"0\n")
        self.assertBodies(self.queue(), ["a", "b"])

    def test_a_handler_that_ends_its_thread_counts_as_an_attempt(self) -> None:
        """Case 11, trap 34."""
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

    def test_a_watcher_made_before_a_fork_gives_back_what_fails_in_the_child(self) -> None:
        """Case 12."""
        queue = self.queue()
        queue.write("a")
        handler = mock.Mock(side_effect=ValueError("no"))
        watcher = QueueWatcher(queue, handler, error_handler=lambda *_: False)

        def work(child: Child) -> None:
            watcher.watch()
            self.assertEqual(queue.stats()[:3], (1, 0, 0))

        self.assertEqual(self.child(work).wait(), 0)
        self.assertEqual([(m.attempt, m.reason) for m in queue.peek_all()], [(1, "ValueError: no")])

    def test_a_vacuum_waits_for_no_reader(self) -> None:
        """Case 13."""
        queue = self.queue(settings=Settings(sync_mode="OFF"))
        queue.write_many(["x" * 1000] * 500)
        lines = queue.broker.dump()
        next(lines)
        queue.delete()
        started = time.monotonic()
        queue.broker.vacuum()
        self.assertLess(time.monotonic() - started, 4)  # the busy timeout is 5 s
        self.assertEqual(len(list(lines)), 500)

    def test_a_queue_is_never_its_own_dead_letter_queue(self) -> None:
        """Case 15, trap 36."""
        queue = self.queue()
        queue.write("a")
        message = queue.lease()
        assert message is not None
        for act in (
            lambda: QueueWatcher(queue, print, dead_letter="q"), lambda: queue.dead_letter(message, "q"),
            lambda: queue.requeue("q"),
        ):  # fmt: skip
            with self.assertRaises(ValueError):
                act()

    @unittest.skipUnless(sys.implementation.name == "cpython", "needs CPython: C code that handles signals")
    def test_signals_that_c_code_handles_are_left_alone_and_ignored_ones_stay_ignored(self) -> None:
        """Case 16."""
        code = """
            import ctypes, signal, sys
            from simplebroker import QueueWatcher
            libc = ctypes.CDLL(None)
            libc.signal(signal.SIGTERM, libc.abs)  # any function of C
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.getsignal(signal.SIGTERM)
            watcher = QueueWatcher("q", lambda m, ts: watcher.request_stop(), db=sys.argv[1])
            watcher.queue.write("a")
            watcher.watch()
            print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
        """
        child = self.python(code, str(self.path))
        self.assertEqual(child.communicate(timeout=DEADLINE_S)[0], b"True\n")

    def test_a_second_hard_link_is_refused(self) -> None:
        """Case 17."""
        self.queue().write("a")
        link = self.dir / "link.db"
        os.link(self.path, link)
        for path in (self.path, link):
            with self.assertRaisesRegex(DatabaseError, "hard links"), Broker(path, settings=Settings(cache_mb=7)) as b:
                b.queue("q").write("b")
        link.unlink()
        self.assertBodies(self.queue(), ["a"])

    def test_a_waiter_of_a_custom_runner_is_woken_in_a_forked_child(self) -> None:
        """Case 18."""
        runner = PlainRunner(self.path)
        broker = Broker(runner=runner)
        broker.queue("q").count()
        waiting = threading.Event()

        def wait() -> None:
            with broker.waiter() as waiter:
                waiting.set()
                waiter.wait(1)

        thread = threading.Thread(target=wait)
        thread.start()
        waiting.wait(DEADLINE_S)

        def work(child: Child) -> None:
            with broker.waiter() as waiter:
                self.assertTrue(waiter.wait(DEADLINE_S))

        self.assertEqual(self.child(work).wait(), 0)
        thread.join()
        runner.close()

    def test_rows_of_other_programs_are_refused_or_read(self) -> None:
        """Case 20."""
        queue = self.queue()
        queue.write("a")
        connection = sqlite3.connect(str(self.path), isolation_level=None)
        self.addCleanup(connection.close)
        insert = "INSERT INTO messages (id, queue, body, held_until) VALUES (?, ?, ?, ?)"
        for row in ((5, "q", b"blob", None), (5, "q", "x", "soon"), (0, "q", "x", None), (2**63 - 1, "q", "x", None)):
            with self.assertRaises(sqlite3.IntegrityError, msg=str(row)):
                connection.execute(insert, row)
        connection.execute("INSERT INTO messages (id, queue, body) VALUES (5, 'q', CAST(x'61ff62' AS TEXT))")
        self.assertBodies(queue, ["a\ufffdb", "a"])
        self.assertEqual(queue.read(), "a\ufffdb")

    def test_the_log_shrinks_again_after_a_reader_held_it_up(self) -> None:
        """Case 21, trap 22."""
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

    def test_nothing_warns(self) -> None:
        """Case 22."""
        code = 'from simplebroker import Queue; q = Queue("q", "w.db"); q.write("x"); q.write_many(["a"]); print(q.read())'
        with mock.patch.object(sys.modules[__name__], "PYTHON", [*PYTHON, "-W", "error"]):
            done = self.python(code, stderr=subprocess.PIPE).communicate(timeout=DEADLINE_S)
        self.assertEqual(done, (b"x\n", b""))

    def test_another_journal_mode_is_set_back_to_the_log(self) -> None:
        """Case 75."""
        with Broker(self.path) as broker:
            broker.queue("q").write("a")
        connection = sqlite3.connect(str(self.path), isolation_level=None)
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()
        connection.close()
        queue = self.queue(settings=Settings(sync_mode="FULL"))
        self.assertEqual(queue.peek(), "a")
        queue.write("b")
        self.assertBodies(queue, ["a", "b"])
        self.assertTrue(Path(f"{self.path}-wal").exists())

    def test_a_database_of_another_version_or_program_is_refused_with_the_remedy_and_left_as_it_was(self) -> None:
        """Case 33, trap 41."""
        magic = simplebroker.APPLICATION_ID
        kinds = {
            "version 1": ("dump it", ["CREATE TABLE meta (singleton, version, last_id)", "INSERT INTO meta VALUES (1, 1, 0)"], magic),
            "broker load": ("PyPI", ["CREATE TABLE meta (key, value)", "INSERT INTO meta VALUES ('magic', 'simplebroker-v1')"], 0),
            "another program": ("choose another", ["CREATE TABLE meta (a)"], 0),
        }  # fmt: skip
        for number, (words, (more, statements, application)) in enumerate(kinds.items()):
            path = self.dir / f"{number}.db"
            connection = sqlite3.connect(str(path), isolation_level=None)
            for statement in (*statements, f"PRAGMA application_id = {application}"):
                connection.execute(statement)
            connection.close()
            before = path.read_bytes()
            with Broker(path) as broker:
                for act in (broker.queues, lambda broker=broker: broker.queue("q").write("x")):
                    with self.subTest(words), self.assertRaisesRegex(DatabaseError, more) as caught:
                        act()
                    self.assertIn(words, str(caught.exception))
            self.assertEqual((path.read_bytes(), len(list(self.dir.glob(f"{number}.db*")))), (before, 1))

    def test_a_child_forked_in_a_transaction_leaves_it_to_the_parent_also_at_its_exit(self) -> None:
        """The first fault of the trials."""
        code = """
            import os, sys
            from simplebroker import Broker
            broker = Broker(sys.argv[1])
            with broker.transaction():
                broker.queue("q").write("a")
                pid = os.fork()
                if not pid:
                    sys.exit(0)  # not os._exit: everything is torn down
                os.waitpid(pid, 0)
                broker.queue("q").write("b")
        """
        child = self.python(code, str(self.path), stderr=subprocess.DEVNULL)
        child.communicate(timeout=DEADLINE_S)
        self.assertBodies(self.queue(), ["a", "b"])

    def test_a_fork_during_a_dump_does_not_cut_it_short(self) -> None:
        """The second fault of the trials."""
        queue = self.queue()
        queue.write_many([str(number) for number in range(100)])
        lines = queue.broker.dump()
        next(lines)

        def work(child: Child) -> None:
            with self.assertRaisesRegex(OperationalError, "after the fork"):
                list(lines)

        self.assertEqual(self.child(work).wait(), 0)
        self.assertEqual(len(list(lines)), 100)

    def test_forks_beside_threads_that_open_and_close_brokers_never_hang(self) -> None:
        """The third fault of the trials, trap 18."""
        self.queue().write("a")
        stop = threading.Event()

        def open_and_close() -> None:
            while not stop.is_set():
                Broker(self.path, settings=Settings(cache_mb=5)).close()

        threads = [threading.Thread(target=open_and_close) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(30):
                child = self.child(lambda child: self.assertEqual(Queue("q", self.path).peek(), "a"))
                self.assertEqual(child.wait(), 0)
        finally:
            stop.set()
            for thread in threads:
                thread.join()

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
