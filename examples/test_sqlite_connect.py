#!/usr/bin/env python3
"""Tests of sqlite_connect.py, with real threads, processes and forks. Standard library only.

Run them with: python -m unittest test_sqlite_connect.py
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from sqlite_connect import (  # noqa: E402  (found beside this file)
    Connection,
    Database,
    FileLock,
    ForkedError,
    LockTimeout,
    NotADatabaseError,
    PathError,
    connect,
    retry_busy,
    validate_path,
)

LONG_S = 60.0  # nothing should take so long; a deadline that ends a test that hangs
HEAD = """
import faulthandler, gc, os, sqlite3, sys, threading
faulthandler.enable()  # for SIGABRT, which finish() sends to what hangs
sys.path.insert(0, sys.argv[1])
from sqlite_connect import *
PATH = sys.argv[2]

def tell(word):
    print(word, flush=True)

def hear():
    return sys.stdin.readline()

"""
can_fork = unittest.skipUnless(hasattr(os, "fork"), "needs fork")
posix_only = unittest.skipUnless(os.name == "posix", "needs POSIX permissions")


class Case(unittest.TestCase):
    maxDiff = None  # what a process said is needed whole

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = os.path.realpath(directory.name)
        self.path = os.path.join(self.directory, "test.db")

    def database(self, **options: Any) -> Database:
        database = Database(self.path, **options)
        self.addCleanup(database.close)
        return database

    def numbers(self) -> Database:
        """A database with an empty table of numbers."""
        database = self.database()
        with database.transaction() as connection:
            connection.execute("CREATE TABLE numbers (n INTEGER)")
        return database

    def start(self, code: str) -> subprocess.Popen[str]:
        """Start a Python process; ``PATH`` is the database, ``tell`` and ``hear`` talk with the test."""
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", HEAD + dedent(code), str(HERE), self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            start_new_session=True,  # so that its forked children can be ended with it
        )
        self.addCleanup(process.communicate)
        self.addCleanup(self.end, process, getattr(signal, "SIGKILL", signal.SIGTERM))
        return process

    def end(self, process: subprocess.Popen[str], number: int) -> None:
        """Send a signal to the process and its children."""
        try:
            os.killpg(process.pid, number) if os.name == "posix" else process.kill()
        except ProcessLookupError:
            pass

    @contextmanager
    def limited(self, process: subprocess.Popen[str]) -> Iterator[None]:
        """Reading from the process in this block takes LONG_S at most: then it says where it hangs, and ends."""
        watchdog = threading.Timer(LONG_S, self.end, (process, signal.SIGABRT))
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()
            watchdog.join()

    def hear(self, process: subprocess.Popen[str], word: str) -> None:
        assert process.stdout is not None
        with self.limited(process):
            heard = process.stdout.readline().strip()
        if heard != word:
            self.fail(f"heard {heard!r} instead of {word!r}: {process.communicate(timeout=LONG_S)[1]}")

    def tell(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()

    def finish(self, process: subprocess.Popen[str]) -> str:
        """Wait until the process and its children are gone; return what it still said."""
        with self.limited(process):
            out, err = process.communicate()
        self.assertEqual((process.returncode, err), (0, ""), out)
        return out.strip()

    def run_python(self, code: str) -> str:
        return self.finish(self.start(code))

    def assertSound(self) -> None:
        with Database(self.path) as database:
            self.assertEqual(database.connection().execute("PRAGMA integrity_check").fetchone()[0], "ok")


class PathTest(Case):
    def refused(self, path: Any, base: str | None = None, reason: str = "") -> None:
        with self.assertRaisesRegex(PathError, reason):
            validate_path(path, base)

    def test_a_good_path_becomes_absolute_and_nothing_is_made(self) -> None:
        self.assertEqual(validate_path("test.db", self.directory), self.path)
        self.assertEqual(validate_path(Path(self.path), self.directory), self.path)
        self.assertEqual(validate_path(self.path), self.path)
        self.assertEqual(os.listdir(self.directory), [])

    def test_odd_but_allowed_names_work(self) -> None:
        for name in ("a?b#c%41 d.db", "ünï ☃.db", "..hidden", "x..y", "file:memory", "'q\"u`o$te"):
            if os.name == "nt" and set(name) & set('?:"'):
                continue
            with Database(name, base=self.directory) as database:
                database.connection()
                self.assertGreater(os.path.getsize(os.path.join(self.directory, name)), 0)

    def test_control_characters_and_empty_paths_are_refused(self) -> None:
        for path in ("", "a\0b", "a\nb.db", "test.db\n", "\x1b[31m.db", "a\x7f", "a\x85b"):
            self.refused(path, reason="control characters")

    def test_dot_dot_is_refused_even_where_it_would_stay_inside(self) -> None:
        for path in ("../x.db", "a/../x.db", "..", "a\\..\\x.db", self.directory + "/../x.db"):
            self.refused(path, self.directory, "'..'")
            self.refused(path, reason="'..'")

    def test_paths_outside_the_base_are_refused(self) -> None:
        inside = os.path.join(self.directory, "in")
        os.mkdir(inside)
        self.refused(self.path, inside, "leads out")
        self.refused(inside, inside, "leads out")  # the base itself
        self.refused(inside + "side.db", inside, "leads out")  # a common prefix is not containment
        self.assertEqual(validate_path(inside + "/x.db", inside), os.path.join(inside, "x.db"))

    @posix_only
    def test_symbolic_links_are_resolved_before_containment_is_checked(self) -> None:
        inside = os.path.join(self.directory, "in")
        os.mkdir(inside)
        os.symlink(self.path, inside + "/file.db")
        os.symlink(self.directory, inside + "/directory")
        os.symlink(inside + "/real.db", inside + "/good.db")
        self.refused("file.db", inside, "leads out")
        self.refused("directory/x.db", inside, "leads out")
        self.assertEqual(validate_path("good.db", inside), inside + "/real.db")

    def test_directories_and_missing_directories_are_refused(self) -> None:
        self.refused(self.directory, reason="not a regular file")
        self.refused("new/", self.directory, "not a regular file")
        self.refused("new/x.db", self.directory, "create it first")
        self.refused("x.db", self.directory + "/missing", "create it first")

    @posix_only
    def test_other_kinds_of_files_are_refused_without_opening_them(self) -> None:
        os.mkfifo(self.path)  # opening it would block
        os.symlink("loop", self.directory + "/loop")
        for name in ("test.db", "loop", "/dev/null"):
            self.refused(os.path.join(self.directory, name), reason="not a regular file")

    def test_memory_and_bytes_are_refused(self) -> None:
        self.refused(":memory:")
        with self.assertRaises(TypeError):
            validate_path(b"x.db")  # type: ignore[arg-type]


class FileLockTest(Case):
    def test_only_one_thread_holds_it(self) -> None:
        lock, inside, most = FileLock(self.path), [], []

        def work() -> None:
            for _ in range(20):
                with lock.hold(LONG_S):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S)
        self.assertEqual((len(most), max(most)), (80, 1))

    def test_a_second_lock_on_the_same_file_waits_until_its_deadline(self) -> None:
        with FileLock(self.path).hold():
            for timeout_s in (0, 0.1, -1):
                start = time.monotonic()
                with self.assertRaises(LockTimeout):
                    FileLock(self.path).acquire(timeout_s)
                self.assertGreaterEqual(time.monotonic() - start, timeout_s)
        FileLock(self.path).acquire(0)

    def test_timeout_is_also_the_errors_of_sqlite_and_of_python(self) -> None:
        lock = FileLock(self.path)
        with lock.hold():
            for kind in (sqlite3.OperationalError, TimeoutError):
                with self.assertRaisesRegex(kind, "another thread"):  # not re-entrant
                    lock.acquire(0.01)

    def test_an_unlimited_wait_ends_when_the_lock_is_free(self) -> None:
        lock = FileLock(self.path)
        lock.acquire()
        timer = threading.Timer(0.05, lock.release)
        timer.start()
        with FileLock(self.path).hold(float("inf")):
            timer.join(LONG_S)

    def test_releasing_what_is_not_held_is_an_error(self) -> None:
        with self.assertRaises(RuntimeError):
            FileLock(self.path).release()

    def test_the_file_stays_and_is_private(self) -> None:
        with FileLock(self.path).hold():
            pass
        self.assertTrue(os.path.exists(self.path))
        if os.name == "posix":
            self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)

    @posix_only
    def test_a_symbolic_link_is_not_followed(self) -> None:
        os.symlink(self.directory + "/victim", self.path)
        with self.assertRaises(OSError):
            FileLock(self.path).acquire(0)
        self.assertFalse(os.path.exists(self.directory + "/victim"))

    def test_the_lock_of_a_killed_process_is_free(self) -> None:
        process = self.start("FileLock(PATH).acquire(); tell('held'); hear()")
        self.hear(process, "held")
        with self.assertRaisesRegex(LockTimeout, "another process"):
            FileLock(self.path).acquire(0)
        process.kill()
        process.wait(LONG_S)
        FileLock(self.path).acquire(LONG_S)

    @posix_only
    def test_who_waited_for_a_replaced_file_takes_the_new_one(self) -> None:
        old, new = FileLock(self.path), FileLock(self.path)
        old.acquire()
        os.rename(self.path, self.path + ".old")
        new.acquire(0)  # the name is free again
        with self.assertRaises(LockTimeout):
            FileLock(self.path).acquire(0)
        old.release()
        with self.assertRaises(LockTimeout):  # the old lock is of no use
            FileLock(self.path).acquire(0)
        new.release()

    @posix_only
    def test_a_file_that_is_deleted_between_opening_and_locking_is_not_taken(self) -> None:
        real_open, files = os.open, []

        def open_and_lose(path: str, *args: int) -> int:
            files.append(real_open(path, *args))
            if len(files) == 1:
                os.unlink(path)
            return files[-1]

        lock = FileLock(self.path)
        with mock.patch("os.open", open_and_lose):
            lock.acquire(LONG_S)
        self.assertEqual(len(files), 2)
        with self.assertRaises(LockTimeout):
            FileLock(self.path).acquire(0)
        lock.release()

    @posix_only
    def test_the_windows_branch_locks_one_byte_and_gives_it_back(self) -> None:
        taken: set[int] = set()

        def locking(fd: int, mode: int, count: int) -> None:
            inode = os.fstat(fd).st_ino
            if mode == 2 and inode in taken:
                raise PermissionError(13, "Permission denied")
            (taken.add if mode == 2 else taken.remove)(inode)
            self.assertEqual((count, os.lseek(fd, 0, os.SEEK_CUR)), (1, 0))

        fake = types.ModuleType("msvcrt")
        fake.LK_NBLCK, fake.LK_UNLCK, fake.locking = 2, 0, locking  # type: ignore[attr-defined]
        spec = importlib.util.spec_from_file_location("sqlite_connect_win32", HERE / "sqlite_connect.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, {"msvcrt": fake}), mock.patch("sys.platform", "win32"):
            spec.loader.exec_module(module)
        lock = module.FileLock(self.path)
        with lock.hold(0), self.assertRaises(module.LockTimeout):
            module.FileLock(self.path).acquire(0.01)
        self.assertEqual(taken, set())


class ConnectTest(Case):
    def test_foreign_files_are_refused_at_once_and_left_untouched(self) -> None:
        for content in (b"x", b"hello", b"text\n" * 1000, b"\0" * 4096, b"SQLite format 3\0" + b"x" * 4096):
            Path(self.path).write_bytes(content)
            start = time.monotonic()
            with self.assertRaises(NotADatabaseError):
                Database(self.path, timeout_s=LONG_S).connection()
            self.assertLess(time.monotonic() - start, LONG_S / 2)
            self.assertEqual(Path(self.path).read_bytes(), content)
            self.assertEqual(os.listdir(self.directory), ["test.db"])

    def test_opening_keeps_the_locks_of_the_connections_that_are_open(self) -> None:
        database = self.numbers()
        connect(self.path).close()
        opener = threading.Thread(target=database.connection)
        opener.start()
        opener.join(LONG_S)
        self.run_python("Database(PATH).connection().close()")
        # Without our lock that process would have found itself alone, and removed the log under our connection.
        self.assertTrue(os.path.exists(self.path + "-wal"))

    def test_no_statement_is_left_unfinished(self) -> None:
        """PyPy crashes, or hangs, when it collects such a one after another thread has closed the connection."""
        real, cursors = Connection.execute, []

        def execute(self: Connection, *args: Any) -> sqlite3.Cursor:
            cursors.append(real(self, *args))
            return cursors[-1]

        with mock.patch.object(Connection, "execute", execute):
            database = self.database(pragmas=("busy_timeout = 10", "synchronous = NORMAL"))
            with database.transaction():
                pass
        self.assertGreater(len(cursors), 8)
        self.assertEqual([cursor.fetchone() for cursor in cursors], [None] * len(cursors))

    def test_connect_makes_no_file(self) -> None:
        with self.assertRaises(sqlite3.OperationalError):
            connect(self.path)
        self.assertEqual(os.listdir(self.directory), [])

    def test_pragmas_are_those_of_the_caller(self) -> None:
        found = self.database(pragmas=("synchronous = NORMAL", "cache_size = 77")).connection()
        self.assertEqual([found.execute(f"PRAGMA {p}").fetchone()[0] for p in ("synchronous", "cache_size")], [1, 77])

    def test_statements_commit_by_themselves(self) -> None:
        self.numbers().connection().execute("INSERT INTO numbers VALUES (1)")
        self.assertEqual(self.run_python("tell(connect(PATH).execute('SELECT n FROM numbers').fetchone()[0])"), "1")


class RetryTest(Case):
    def test_a_lock_that_goes_away_is_waited_for(self) -> None:
        database, attempts = self.numbers(), []
        connection = database.connection()

        def operation() -> str:
            attempts.append(1)
            if len(attempts) < 4:
                raise sqlite3.OperationalError("database is locked")
            return "done"

        self.assertEqual(retry_busy(connection, operation, LONG_S), "done")
        self.assertEqual(len(attempts), 4)

    def test_other_errors_are_not_retried(self) -> None:
        for error in (sqlite3.OperationalError("no such table: x"), sqlite3.IntegrityError("UNIQUE"), KeyError("x")):
            operation = mock.Mock(side_effect=error)
            with self.assertRaises(type(error)):
                retry_busy(self.database().connection(), operation, LONG_S)
            operation.assert_called_once_with()

    def test_there_is_one_deadline_for_the_loop_and_the_busy_handler(self) -> None:
        self.numbers().connection().execute("BEGIN IMMEDIATE")
        other = connect(self.path, timeout_s=LONG_S)
        self.addCleanup(other.close)
        start = time.monotonic()
        with self.assertRaisesRegex(sqlite3.OperationalError, "locked"):
            retry_busy(other, lambda: other.execute("BEGIN IMMEDIATE"), 0.2)
        self.assertLess(time.monotonic() - start, LONG_S / 2)
        self.assertGreaterEqual(time.monotonic() - start, 0.2)
        self.assertEqual(other.execute("PRAGMA busy_timeout").fetchone()[0], LONG_S * 1000)


class SetUpTest(Case):
    def test_sixteen_processes_that_open_fresh_paths_at_once_all_succeed(self) -> None:
        code = """
            tell("ready")
            hear()
            for n in range(5):
                with Database(f"{PATH}{n}") as database, database.transaction() as connection:
                    connection.execute("CREATE TABLE IF NOT EXISTS numbers (n INTEGER)")
                    connection.execute("INSERT INTO numbers VALUES (?)", (os.getpid(),))
        """
        processes = [self.start(code) for _ in range(16)]
        for process in processes:
            self.hear(process, "ready")
        for process in processes:
            self.tell(process)
        for process in processes:
            self.finish(process)
        for n in range(5):
            with Database(f"{self.path}{n}") as database:
                connection = database.connection()
                found = connection.execute("SELECT count(*), count(DISTINCT n) FROM numbers").fetchone()
                self.assertEqual(found, (16, 16))
                self.assertEqual(connection.execute("PRAGMA journal_mode").fetchone()[0], "wal")

    @posix_only
    def test_all_files_are_private_whatever_the_umask(self) -> None:
        for umask in (0, 0o077, 0o777):
            said = self.run_python(f"""
                os.umask({umask})
                with Database(PATH + "{umask}") as database:
                    database.connection().execute("CREATE TABLE numbers (n INTEGER)")
                    for name in ("", "-wal", "-shm", ".lock"):
                        tell(oct(os.stat(database.path + name).st_mode & 0o777))
            """)
            self.assertEqual(said.split(), ["0o600"] * 4, oct(umask))

    def test_a_database_in_another_journal_mode_is_changed_to_wal(self) -> None:
        old = sqlite3.connect(self.path)
        old.execute("CREATE TABLE numbers (n INTEGER)")
        old.close()
        self.assertEqual(self.database().connection().execute("PRAGMA journal_mode").fetchone()[0], "wal")

    def test_the_change_to_wal_waits_for_readers(self) -> None:
        reader = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        self.addCleanup(reader.close)
        reader.execute("CREATE TABLE numbers (n INTEGER)")
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM numbers").fetchall()
        with self.assertRaisesRegex(sqlite3.OperationalError, "locked"):
            Database(self.path, timeout_s=0.05).connection()
        timer = threading.Timer(0.05, reader.rollback)
        timer.start()
        connection = self.database(timeout_s=LONG_S).connection()
        self.assertEqual(connection.execute("PRAGMA journal_mode").fetchone()[0], "wal")
        timer.join(LONG_S)

    def test_a_change_to_wal_that_meets_a_lock_is_tried_again(self) -> None:
        answers = [False, sqlite3.OperationalError("database is locked"), True]  # no, not now, done
        with mock.patch("sqlite_connect._uses_wal", side_effect=answers) as asked:
            self.database().connection()
        self.assertEqual(asked.call_count, 3)

    def test_a_file_system_without_wal_is_an_error(self) -> None:
        refused = self.assertRaisesRegex(sqlite3.NotSupportedError, "cannot use WAL")
        with mock.patch("sqlite_connect._uses_wal", return_value=False), refused:
            self.database().connection()

    def test_opening_an_existing_database_waits_for_no_writer(self) -> None:
        with self.numbers().transaction():
            said = self.run_python("""
                with Database(PATH, timeout_s=0) as database:
                    tell(database.connection().execute("SELECT * FROM numbers").fetchall())
            """)
        self.assertEqual(said, "[]")

    def test_the_log_of_a_deleted_database_does_not_come_back(self) -> None:
        self.run_python("""
            connection = Database(PATH).connection()
            connection.execute("CREATE TABLE ghost (a)")
            os.unlink(PATH)
            os._exit(0)
        """)
        self.assertTrue(os.path.exists(self.path + "-wal"))
        tables = self.database().connection().execute("SELECT name FROM sqlite_master").fetchall()
        self.assertEqual(tables, [])


class TransactionTest(Case):
    def test_the_block_is_all_or_nothing(self) -> None:
        database = self.numbers()
        with self.assertRaisesRegex(KeyError, "boom"), database.transaction() as connection:
            connection.execute("INSERT INTO numbers VALUES (1)")
            raise KeyError("boom")
        self.assertEqual(database.connection().execute("SELECT * FROM numbers").fetchall(), [])
        with database.transaction() as connection:
            connection.execute("INSERT INTO numbers VALUES (2)")
        self.assertEqual(database.connection().execute("SELECT * FROM numbers").fetchall(), [(2,)])

    def test_a_failing_commit_rolls_back_and_frees_the_lock(self) -> None:
        database = self.database()
        with database.transaction() as connection:
            connection.execute("CREATE TABLE a (id INTEGER PRIMARY KEY)")
            connection.execute("CREATE TABLE b (a REFERENCES a DEFERRABLE INITIALLY DEFERRED)")
        with self.assertRaises(sqlite3.IntegrityError), database.transaction() as connection:
            connection.execute("INSERT INTO b VALUES (1)")
        self.assertFalse(database.connection().in_transaction)
        with database.transaction(timeout_s=0):
            pass

    def test_transactions_do_not_nest(self) -> None:
        database = self.numbers()
        with database.transaction(), self.assertRaises(RuntimeError), database.transaction():
            self.fail("nested")

    def test_a_transaction_waits_for_another_until_its_deadline(self) -> None:
        database = self.numbers()
        other = self.database(timeout_s=0.1)
        with database.transaction(), self.assertRaises(LockTimeout), other.transaction():
            self.fail("two writers")
        outsider = sqlite3.connect(self.path)  # takes no file lock
        self.addCleanup(outsider.close)
        outsider.execute("BEGIN IMMEDIATE")
        start = time.monotonic()
        with self.assertRaisesRegex(sqlite3.OperationalError, "locked"), other.transaction():
            self.fail("two writers")
        self.assertLess(time.monotonic() - start, LONG_S)

    def test_a_writer_that_is_killed_leaves_nothing_behind(self) -> None:
        database = self.numbers()
        process = self.start("""
            with Database(PATH).transaction() as connection:
                connection.execute("INSERT INTO numbers VALUES (1)")
                tell("inside")
                hear()
        """)
        self.hear(process, "inside")
        process.kill()
        with database.transaction(timeout_s=LONG_S) as connection:
            self.assertEqual(connection.execute("SELECT * FROM numbers").fetchall(), [])


class ThreadTest(Case):
    def in_thread(self, function: Any) -> Any:
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(function()))
        thread.start()
        thread.join(LONG_S)
        return results[0]

    def test_every_thread_has_its_own_connection_and_keeps_it(self) -> None:
        database = self.numbers()
        mine = database.connection()
        self.assertIs(database.connection(), mine)
        self.assertIsNot(self.in_thread(database.connection), mine)

    def test_threads_that_write_at_once_lose_nothing(self) -> None:
        database, barrier = self.numbers(), threading.Barrier(8)

        def work() -> None:
            barrier.wait(LONG_S)
            for n in range(10):
                with database.transaction(timeout_s=LONG_S) as connection:
                    connection.execute("INSERT INTO numbers VALUES (?)", (n,))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S)
        self.assertEqual(database.connection().execute("SELECT count(*) FROM numbers").fetchone()[0], 80)

    def test_connections_of_ended_threads_are_closed(self) -> None:
        database = self.numbers()
        ended = [self.in_thread(database.connection) for _ in range(5)]
        self.in_thread(database.connection)
        for connection in ended:
            with self.assertRaisesRegex(sqlite3.ProgrammingError, "closed"):
                connection.execute("SELECT 1")
        database.connection().execute("SELECT 1")

    def test_close_leaves_a_thread_in_a_statement_alone(self) -> None:
        database, started, stop = self.numbers(), threading.Event(), threading.Event()
        rows: list[Any] = []

        def work() -> None:
            connection = database.connection()
            while not stop.is_set():
                rows.append(connection.execute("SELECT 1").fetchone())
                started.set()

        thread = threading.Thread(target=work)
        thread.start()
        self.assertTrue(started.wait(LONG_S))
        self.assertEqual(database.close(), 1)
        stop.set()
        thread.join(LONG_S)
        self.assertEqual(database.close(), 0)
        with self.assertRaisesRegex(sqlite3.ProgrammingError, "closed"):
            database.connection()

    def test_closing_the_last_connection_removes_the_log(self) -> None:
        with self.numbers():
            self.assertTrue(os.path.exists(self.path + "-wal"))
        self.assertFalse(os.path.exists(self.path + "-wal"))
        self.assertTrue(os.path.exists(self.path + ".lock"))


@can_fork
class ForkTest(Case):
    def test_a_child_gets_a_connection_of_its_own(self) -> None:
        said = self.run_python("""
            database = Database(PATH)
            mine = database.connection()
            mine.execute("CREATE TABLE numbers (n INTEGER)")
            if os.fork():
                os.wait()
                tell(mine.execute("SELECT count(*) FROM numbers").fetchone()[0])
            else:
                with database.transaction() as connection:
                    connection.execute("INSERT INTO numbers VALUES (1)")
                tell(connection is not mine)
                tell(database.close())
        """)
        self.assertEqual(said.split(), ["True", "0", "1"])

    def test_a_connection_of_the_parent_refuses_everything(self) -> None:
        said = self.run_python("""
            c = Database(PATH).connection()
            if os.fork():
                os.wait()
            else:
                for use in (
                    c.close,
                    c.commit,
                    c.rollback,
                    c.cursor,
                    lambda: c.execute("SELECT 1"),
                    lambda: c.executemany("DELETE FROM sqlite_master WHERE 0 = ?", [(1,)]),
                    lambda: c.executescript("SELECT 1"),
                    lambda: c.__exit__(None, None, None),
                ):
                    try:
                        use()
                    except ForkedError:
                        tell("refused")
        """)
        self.assertEqual(said.split(), ["refused"] * 8)

    # In the next two tests the small cache makes SQLite write pages of the open transaction to the log. Parent and
    # child share the memory that is the index of the log: a rollback in the child would destroy the transaction.

    def test_a_child_that_exits_does_not_roll_back_what_another_thread_of_its_parent_does(self) -> None:
        said = self.run_python("""
            database = Database(PATH, pragmas=["cache_size = 5"])
            database.connection().execute("CREATE TABLE numbers (n)")
            inside, forked = threading.Event(), threading.Event()

            def work():
                with database.transaction() as connection:
                    connection.executemany("INSERT INTO numbers VALUES (?)", [("x" * 1000,)] * 2000)
                    inside.set()
                    forked.wait()
                    connection.executemany("INSERT INTO numbers VALUES (?)", [("y" * 1000,)] * 2000)

            worker = threading.Thread(target=work)
            worker.start()
            inside.wait()
            if not os.fork():
                sys.exit()
            os.wait()
            forked.set()
            worker.join()
            tell(database.connection().execute("SELECT count(*) FROM numbers").fetchone()[0])
        """)
        self.assertEqual(said, "4000")
        self.assertSound()

    def test_a_child_that_leaves_the_block_of_a_transaction_does_not_end_it(self) -> None:
        for leave, heard in (("sys.exit()", []), ("pass", ["refused"])):
            with self.subTest(leave):
                said = self.run_python(f"""
                    database = Database(PATH + "{leave}", pragmas=["cache_size = 5"])
                    database.connection().execute("CREATE TABLE numbers (n)")
                    try:
                        with database.transaction() as connection:
                            connection.executemany("INSERT INTO numbers VALUES (?)", [("x" * 1000,)] * 2000)
                            if not os.fork():
                                {leave}
                            else:
                                os.wait()
                                try:
                                    FileLock(database.path + ".lock").acquire(0)
                                except LockTimeout:
                                    tell("held")
                                connection.execute("INSERT INTO numbers VALUES (1)")
                    except ForkedError:
                        sys.exit(tell("refused"))
                    for sql in ("SELECT count(*) FROM numbers", "PRAGMA integrity_check"):
                        tell(database.connection().execute(sql).fetchone()[0])
                """)
                self.assertEqual(said.split(), [*heard, "held", "2001", "ok"])

    def test_a_child_that_outlives_its_parent_does_not_remove_the_log(self) -> None:
        self.run_python("""
            database = Database(PATH)
            connection = database.connection()
            connection.execute("CREATE TABLE numbers (n)")
            read, write = os.pipe()
            if os.fork():
                os._exit(0)
            os.close(write)
            os.read(read, 1)  # returns when the parent is gone
            del connection, database
            gc.collect()
        """)
        self.assertTrue(os.path.exists(self.path + "-wal"))
        self.assertSound()

    def test_a_child_does_not_keep_the_lock_of_a_dead_parent(self) -> None:
        process = self.start("""
            lock = FileLock(PATH)
            lock.acquire()
            if os.fork():
                os._exit(0)
            tell("child")
            hear()
        """)
        self.hear(process, "child")
        process.wait(LONG_S)
        FileLock(self.path).acquire(0)
        self.tell(process)
        self.finish(process)

    def test_a_child_can_take_a_lock_that_another_thread_of_its_parent_held(self) -> None:
        said = self.run_python(f"""
            lock, inside, forked = FileLock(PATH), threading.Event(), threading.Event()

            def work():
                with lock.hold():
                    inside.set()
                    forked.wait()

            worker = threading.Thread(target=work)
            worker.start()
            inside.wait()
            if os.fork():
                forked.set()
                worker.join()
                os.wait()
            else:
                with lock.hold({LONG_S}):
                    tell("mine")
        """)
        self.assertEqual(said, "mine")

    def test_a_fork_while_threads_make_and_drop_locks_overlooks_none(self) -> None:
        said = self.run_python("""
            lock, done, kept = FileLock(PATH), threading.Event(), []

            def work():
                while not done.is_set():
                    kept[:] = [FileLock(PATH + ".more") for _ in range(50)]

            sys.setswitchinterval(1e-6)
            worker = threading.Thread(target=work)
            worker.start()
            for _ in range(50):
                with lock.hold():
                    child = os.fork()
                    if not child:
                        os._exit(lock._fd is not None)  # its copy is closed
                if os.waitpid(child, 0)[1]:
                    tell("overlooked")
            done.set()
            worker.join()
        """)
        self.assertEqual(said, "")

    def test_the_class_says_which_process_a_connection_belongs_to(self) -> None:
        connection = self.numbers().connection()
        self.assertIsInstance(connection, Connection)
        self.assertEqual(connection.pid, os.getpid())
        with mock.patch("os.getpid", lambda: -1), self.assertRaises(ForkedError):
            connection.execute("SELECT 1")


if __name__ == "__main__":
    unittest.main()
