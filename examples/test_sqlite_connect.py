#!/usr/bin/env python3
"""Tests of sqlite_connect.py, with real threads, processes and forks. Standard library only.

Run them with: python -m unittest test_sqlite_connect.py
"""

from __future__ import annotations

import os
import runpy
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from typing import Any, Callable
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import sqlite_connect  # noqa: E402  (found beside this file)
from sqlite_connect import Database, FileLock, LockTimeout, connect, retry_busy, validate_path  # noqa: E402

LONG_S = 30.0  # nothing should take so long: what hangs ends then
HEAD = f"""
import gc, os, signal, sqlite3, sys, threading, time
sys.path.insert(0, {str(HERE)!r})
from sqlite_connect import *
PATH = sys.argv[1]

def tell(word):
    print(word, flush=True)

def in_thread(function, daemon=False):
    thread = threading.Thread(target=function, daemon=daemon)
    thread.start()
    return thread

if hasattr(os, "fork"):  # what hangs ends, children too
    signal.alarm({LONG_S:.0f})
    os.register_at_fork(after_in_child=lambda: signal.alarm({LONG_S:.0f}))
"""
posix_only = unittest.skipUnless(os.name == "posix", "needs POSIX")


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
        database.connection().execute("CREATE TABLE numbers (n INTEGER)")
        return database

    def rows(self, sql: str, path: str = "") -> list[Any]:
        with Database(path or self.path) as database:
            return database.connection().execute(sql).fetchall()

    def in_threads(self, *functions: Callable[[], Any]) -> list[Any]:
        """Run each in a thread of its own, all at once; return what they returned."""
        barrier = threading.Barrier(len(functions))
        with ThreadPoolExecutor(len(functions)) as pool:
            return list(pool.map(lambda function: (barrier.wait(LONG_S), function())[1], functions))

    def start(self, code: str) -> subprocess.Popen[str]:
        """Start a Python process; ``PATH`` is the database, and input() waits for the test."""
        pipe = subprocess.PIPE
        command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", HEAD + dedent(code), self.path]
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def hear(self, process: subprocess.Popen[str], word: str) -> None:
        assert process.stdout is not None
        self.assertEqual(process.stdout.readline(), word + "\n")

    def finish(self, process: subprocess.Popen[str]) -> list[str]:
        """Let the process go on, wait until it and its children are gone, and return the words that it said."""
        out, err = process.communicate("go\n")
        self.assertEqual((process.returncode, err), (0, ""), out)
        return out.split()

    def run_python(self, code: str) -> list[str]:
        return self.finish(self.start(code))


class PathTest(Case):
    def refused(self, path: Any, base: str | None = None, reason: str = "") -> None:
        with self.assertRaisesRegex(sqlite_connect.PathError, reason):
            validate_path(path, base)

    def test_a_good_path_becomes_absolute_and_nothing_is_made(self) -> None:
        self.assertEqual(validate_path("test.db", self.directory), self.path)
        self.assertEqual(validate_path(Path(self.path)), self.path)
        self.assertEqual(os.listdir(self.directory), [])

    def test_odd_but_allowed_names_work(self) -> None:
        for name in ("a?b#c%41 d.db", "ünï ☃.db", "..hidden", "x..y", "file:memory", "'q\"u`o$te"):
            if os.name == "nt" and set(name) & set('?:"'):
                continue
            with Database(validate_path(name, self.directory)) as database:
                database.connection()
                self.assertGreater(os.path.getsize(os.path.join(self.directory, name)), 0)

    def test_what_is_no_path_of_a_file_is_refused(self) -> None:
        for path in ("", "a\0b", "a\nb.db", "test.db\n", "\x1b[31m.db", "a\x7f", "a\x85b"):
            self.refused(path, reason="control characters")
        for path in ("../x.db", "a/../x.db", "..", "a\\..\\x.db", self.directory + "/../x.db"):
            self.refused(path, self.directory, "'..'")
        self.refused(":memory:")
        self.refused(self.directory, reason="not a regular file")
        self.refused("new/", self.directory, "not a regular file")
        self.refused("new/x.db", self.directory, "create it first")
        self.assertRaises(TypeError, validate_path, b"x.db")

    @posix_only
    def test_paths_outside_the_base_are_refused_with_links_resolved(self) -> None:
        inside = os.path.join(self.directory, "in")
        os.mkdir(inside)
        os.symlink(self.path, inside + "/file.db")
        os.symlink(self.directory, inside + "/directory")
        os.symlink(inside + "/real.db", inside + "/good.db")
        self.refused(self.path, inside, "leads out")
        self.refused(inside, inside, "leads out")  # the base itself
        self.refused(inside + "side.db", inside, "leads out")  # a common prefix is not containment
        self.refused("file.db", inside, "leads out")
        self.refused("directory/x.db", inside, "leads out")
        self.assertEqual(validate_path("good.db", inside), inside + "/real.db")

    @posix_only
    def test_other_kinds_of_files_are_refused_without_opening_them(self) -> None:
        os.mkfifo(self.path)  # opening it would block
        os.symlink("loop", self.directory + "/loop")
        for name in ("test.db", "loop", "/dev/null"):
            self.refused(os.path.join(self.directory, name), reason="not a regular file")


class FileLockTest(Case):
    def test_it_is_waited_for_until_the_deadline(self) -> None:
        lock = FileLock(self.path)
        with lock.hold():
            for other, timeout_s in ((lock, 0.05), (FileLock(self.path), 0.1), (FileLock(self.path), -1)):
                start = time.monotonic()
                for error in (LockTimeout, sqlite3.OperationalError, TimeoutError):  # it is all of these
                    with self.assertRaises(error):
                        other.acquire(timeout_s)
                self.assertGreaterEqual(time.monotonic() - start, 3 * timeout_s)
        FileLock(self.path).acquire(0)

    def test_an_unlimited_wait_ends_when_the_lock_is_free(self) -> None:
        lock = FileLock(self.path)
        lock.acquire()
        threading.Timer(0.05, lock.release).start()
        with FileLock(self.path).hold(float("inf")):
            self.assertRaises(RuntimeError, lock.release)  # held no more

    @posix_only
    def test_a_symbolic_link_is_not_followed(self) -> None:
        os.symlink(self.directory + "/victim", self.path)
        self.assertRaises(OSError, FileLock(self.path).acquire, 0)
        self.assertFalse(os.path.exists(self.directory + "/victim"))

    def test_the_lock_of_a_killed_process_is_free(self) -> None:
        process = self.start("FileLock(PATH).acquire(); tell('held'); input()")
        self.hear(process, "held")
        with self.assertRaisesRegex(LockTimeout, "another process"):
            FileLock(self.path).acquire(0)
        process.kill()
        FileLock(self.path).acquire(LONG_S)

    @posix_only
    def test_a_file_that_is_deleted_between_opening_and_locking_is_not_taken(self) -> None:
        real_open, files = os.open, []

        def open_and_lose(path: str, *args: int) -> int:
            files.append(real_open(path, *args))
            if len(files) == 1:
                os.unlink(path)
            return files[-1]

        with mock.patch("os.open", open_and_lose), FileLock(self.path).hold(LONG_S):
            self.assertEqual(len(files), 2)

    @posix_only
    def test_the_windows_branch_locks_one_byte_and_gives_it_back(self) -> None:
        taken: set[int] = set()

        def locking(fd: int, mode: int, count: int) -> None:
            inode = os.fstat(fd).st_ino
            if mode == 2 and inode in taken:
                raise PermissionError(13, "Permission denied")
            (taken.add if mode == 2 else taken.remove)(inode)
            self.assertEqual(count, 1)

        fake = types.ModuleType("msvcrt")
        fake.LK_NBLCK, fake.LK_UNLCK, fake.locking = 2, 0, locking  # type: ignore[attr-defined]
        with mock.patch.dict(sys.modules, {"msvcrt": fake}), mock.patch("sys.platform", "win32"):
            names = runpy.run_path(str(HERE / "sqlite_connect.py"))
        with names["FileLock"](self.path).hold(0), self.assertRaises(names["LockTimeout"]):
            names["FileLock"](self.path).acquire(0.01)
        self.assertEqual(taken, set())


class RetryTest(Case):
    def tries(self, error: Exception) -> int:
        """How often is a call tried that fails with this error twice?"""
        operation = mock.Mock(side_effect=[error, error, "done"])
        try:
            retry_busy(self.database().connection(), operation, LONG_S)
        except type(error):
            pass
        return operation.call_count

    def test_only_a_lock_is_tried_again(self) -> None:
        for busy in ("database is locked", "database table is locked: t", "database schema is locked: main"):
            self.assertEqual(self.tries(sqlite3.OperationalError(busy)), 3, busy)
        clock = mock.Mock(side_effect=lambda: self.rows("SELECT * FROM clock"))  # no such table
        self.assertRaises(sqlite3.OperationalError, retry_busy, self.database().connection(), clock, LONG_S)
        clock.assert_called_once_with()
        for text in ("no such table: clock", "no such table: database is locked", "unable to open database file"):
            self.assertEqual(self.tries(sqlite3.OperationalError(text)), 1, text)
        self.assertEqual(self.tries(sqlite3.IntegrityError("UNIQUE")) + self.tries(KeyError("x")), 2)

    def test_there_is_one_deadline_for_the_loop_and_the_busy_handler(self) -> None:
        self.numbers().connection().execute("BEGIN IMMEDIATE")
        other, start = connect(self.path, timeout_s=LONG_S), time.monotonic()
        self.addCleanup(other.close)
        with self.assertRaisesRegex(sqlite3.OperationalError, "locked"):
            retry_busy(other, lambda: other.execute("BEGIN IMMEDIATE"), 0.2)
        self.assertTrue(0.2 <= time.monotonic() - start < LONG_S / 2)
        self.assertEqual(other.execute("PRAGMA busy_timeout").fetchall(), [(LONG_S * 1000,)])


class OpeningTest(Case):
    def test_foreign_files_are_refused_at_once_and_left_untouched(self) -> None:
        self.assertRaises(sqlite3.OperationalError, connect, self.path)  # which makes no file
        for content in (b"x", b"hello", b"text\n" * 1000, b"\0" * 4096, b"SQLite format 3\0" + b"x" * 4096):
            Path(self.path).write_bytes(content)
            start = time.monotonic()
            self.assertRaises(sqlite_connect.NotADatabaseError, Database(self.path, timeout_s=LONG_S).connection)
            self.assertLess(time.monotonic() - start, LONG_S / 2)
            self.assertEqual(Path(self.path).read_bytes(), content)
            self.assertEqual(os.listdir(self.directory), ["test.db"])

    def test_it_keeps_the_locks_of_the_connections_that_are_open(self) -> None:
        database = self.numbers()
        connect(self.path).close()
        self.in_threads(database.connection)
        self.run_python("Database(PATH).connection().close()")
        # Without our lock that process would have found itself alone, and removed the log under our connection.
        self.assertTrue(os.path.exists(self.path + "-wal"))

    def test_no_statement_is_left_unfinished(self) -> None:
        """PyPy crashes, or hangs, when it collects such a one after another thread has closed the connection."""
        real, cursors = sqlite_connect.Connection.execute, []

        def execute(self: sqlite_connect.Connection, *args: Any) -> sqlite3.Cursor:
            cursors.append(real(self, *args))
            return cursors[-1]

        with mock.patch.object(sqlite_connect.Connection, "execute", execute):
            database = self.database(pragmas=("busy_timeout = 10", "synchronous = NORMAL"))
            with database.transaction():
                pass
        self.assertGreater(len(cursors), 8)
        self.assertEqual([cursor.fetchone() for cursor in cursors], [None] * len(cursors))

    def test_commits_are_synced_unless_the_caller_says_otherwise(self) -> None:
        for options, value in (({}, 2), ({"pragmas": ["synchronous = NORMAL"]}, 1)):
            found = self.database(**options).connection().execute("PRAGMA synchronous").fetchall()
            self.assertEqual(found, [(value,)])

    def test_sixteen_processes_that_open_fresh_paths_at_once_all_succeed(self) -> None:
        code = """
            tell("ready")
            input()
            for n in range(5):
                with Database(f"{PATH}{n}") as database, database.transaction() as connection:
                    connection.execute("CREATE TABLE IF NOT EXISTS numbers (n INTEGER)")
                    connection.execute("INSERT INTO numbers VALUES (?)", (os.getpid(),))
        """
        processes = [self.start(code) for _ in range(16)]
        for process in processes:
            self.hear(process, "ready")
        self.in_threads(*[lambda process=process: self.finish(process) for process in processes])
        for n in range(5):
            found = self.rows("SELECT count(*), count(DISTINCT n) FROM numbers", f"{self.path}{n}")
            self.assertEqual(found, [(16, 16)])

    @posix_only
    def test_all_files_are_private_whatever_the_umask(self) -> None:
        said = self.run_python("""
            for umask in (0, 0o077, 0o777):
                os.umask(umask)
                with Database(f"{PATH}{umask}") as database:
                    database.connection().execute("CREATE TABLE numbers (n INTEGER)")
                    for name in ("", "-wal", "-shm", ".lock"):
                        tell(oct(os.stat(database.path + name).st_mode & 0o777))
        """)
        self.assertEqual(said, ["0o600"] * 12)

    def test_the_change_to_wal_waits_for_readers(self) -> None:
        reader = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        self.addCleanup(reader.close)
        reader.execute("CREATE TABLE numbers (n INTEGER)")
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM numbers").fetchall()
        self.assertRaises(sqlite3.OperationalError, Database(self.path, timeout_s=0.05).connection)
        timer = threading.Timer(0.05, reader.rollback)
        timer.start()
        self.database(timeout_s=LONG_S).connection()
        self.assertEqual(self.rows("PRAGMA journal_mode"), [("wal",)])
        timer.join(LONG_S)

    def test_a_file_system_without_wal_is_an_error(self) -> None:
        real = sqlite_connect.Connection.execute

        def execute(self: sqlite_connect.Connection, sql: str) -> sqlite3.Cursor:
            return real(self, "SELECT 'delete'" if "journal_mode" in sql else sql)

        refused = self.assertRaisesRegex(sqlite3.NotSupportedError, "cannot use WAL")
        with mock.patch.object(sqlite_connect.Connection, "execute", execute), refused:
            self.database().connection()

    def test_an_existing_database_waits_for_no_writer(self) -> None:
        with self.numbers().transaction():
            self.assertEqual(self.in_threads(lambda: self.rows("SELECT * FROM numbers")), [[]])


class TransactionTest(Case):
    def test_the_block_is_all_or_nothing(self) -> None:
        database = self.numbers()
        with self.assertRaisesRegex(KeyError, "boom"), database.transaction() as connection:
            connection.execute("INSERT INTO numbers VALUES (1)")
            raise KeyError("boom")
        with database.transaction() as connection:
            connection.execute("INSERT INTO numbers VALUES (2)")
        self.assertEqual(self.rows("SELECT * FROM numbers"), [(2,)])

    def test_a_failing_commit_rolls_back_and_frees_the_lock(self) -> None:
        database = self.database()
        with database.transaction() as connection:
            connection.execute("CREATE TABLE a (id INTEGER PRIMARY KEY)")
            connection.execute("CREATE TABLE b (a REFERENCES a DEFERRABLE INITIALLY DEFERRED)")
        with self.assertRaises(sqlite3.IntegrityError), database.transaction() as connection:
            connection.execute("INSERT INTO b VALUES (1)")
        with database.transaction(timeout_s=0), self.assertRaises(RuntimeError), database.transaction():
            self.fail("nested")

    def test_it_waits_for_another_until_its_deadline(self) -> None:
        database, other = self.numbers(), self.database(timeout_s=0.1)
        with database.transaction(), self.assertRaises(LockTimeout), other.transaction():
            self.fail("two writers")
        outsider = sqlite3.connect(self.path)  # takes no file lock
        self.addCleanup(outsider.close)
        outsider.execute("BEGIN IMMEDIATE")
        with self.assertRaisesRegex(sqlite3.OperationalError, "locked"), other.transaction():
            self.fail("two writers")


class ThreadTest(Case):
    def test_threads_that_write_at_once_lose_nothing(self) -> None:
        database = self.numbers()

        def work() -> sqlite_connect.Connection:
            for n in range(10):
                with database.transaction(timeout_s=LONG_S) as connection:
                    connection.execute("INSERT INTO numbers VALUES (?)", (n,))
            return connection

        connections = self.in_threads(*[work] * 8)
        self.assertEqual(len({id(connection) for connection in connections}), 8)  # each has its own
        self.assertEqual(self.rows("SELECT count(*) FROM numbers"), [(80,)])

    def test_connections_of_ended_threads_are_closed(self) -> None:
        database = self.numbers()
        mine, [ended] = database.connection(), self.in_threads(database.connection)
        self.in_threads(database.connection)
        self.assertRaises(sqlite3.ProgrammingError, ended.execute, "SELECT 1")
        self.assertIs(database.connection(), mine)

    def test_close_leaves_other_threads_alone_until_they_end(self) -> None:
        database, left = self.numbers(), []

        def work() -> list[Any]:
            connection = database.connection()
            closer = threading.Thread(target=lambda: left.append(database.close()))
            closer.start()
            closer.join(LONG_S)
            return connection.execute("SELECT * FROM numbers").fetchall()

        self.assertEqual(self.in_threads(work), [[]])
        self.assertEqual((left, database.close()), ([2], 0))
        self.assertFalse(os.path.exists(self.path + "-wal"))  # the last one was closed
        self.assertRaises(sqlite3.ProgrammingError, database.connection)


@unittest.skipUnless(hasattr(os, "fork"), "needs fork")
class ForkTest(Case):
    def test_a_child_gets_a_connection_of_its_own_and_that_of_its_parent_refuses_everything(self) -> None:
        said = self.run_python("""
            database = Database(PATH)
            c = database.connection()
            c.execute("CREATE TABLE numbers (n INTEGER)")
            if os.fork():
                os.wait()
                tell(c.execute("SELECT count(*) FROM numbers").fetchall()[0][0])
            else:
                with database.transaction() as connection:
                    connection.execute("INSERT INTO numbers VALUES (1)")
                tell(database.close())
                many = lambda sql: c.executemany(sql, [(1,)])
                for use, *arguments in (
                    [c.close], [c.commit], [c.rollback], [c.cursor], [c.execute, "SELECT 1"],
                    [many, "DELETE FROM numbers WHERE 0 = ?"], [c.executescript, ""], [c.__exit__, None, None, None],
                ):
                    try:
                        use(*arguments)
                    except ForkedError:
                        tell("refused")
        """)
        self.assertEqual(said, ["0", *["refused"] * 8, "1"])

    # The small cache makes SQLite write pages of the open transaction to the log. Parent and
    # child share the memory that is the index of the log: a rollback in the child would destroy the transaction.

    def test_a_child_that_leaves_the_block_of_a_transaction_does_not_end_it(self) -> None:
        for leave, heard in (("sys.exit()", []), ("pass", ["refused"])):
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
                    tell("refused")
            """)
            self.assertEqual(said, [*heard, "held"], leave)
            self.assertEqual(self.rows("SELECT count(*) FROM numbers", self.path + leave), [(2001,)])
            self.assertEqual(self.rows("PRAGMA integrity_check", self.path + leave), [("ok",)])

    def test_a_child_that_outlives_its_parent_does_not_remove_the_log(self) -> None:
        self.run_python("""
            database = Database(PATH)
            connection = database.connection()
            connection.execute("CREATE TABLE numbers (n)")
            parent = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == parent:
                time.sleep(0.001)
            del connection, database
            gc.collect()
        """)
        self.assertTrue(os.path.exists(self.path + "-wal"))
        self.assertEqual(self.rows("PRAGMA integrity_check"), [("ok",)])

    def test_a_child_can_take_a_lock_that_another_thread_of_its_dead_parent_held(self) -> None:
        said = self.run_python(f"""
            lock, inside = FileLock(PATH), threading.Event()
            in_thread(lambda: (lock.acquire(), inside.set(), time.sleep(60)), daemon=True)
            inside.wait()
            if os.fork():
                os._exit(0)
            lock.acquire({LONG_S})
            tell("mine")
        """)
        self.assertEqual(said, ["mine"])


if __name__ == "__main__":
    unittest.main()
