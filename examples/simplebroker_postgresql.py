"""SimpleBroker on PostgreSQL: for queues that more than one machine uses. Put this file beside your program.

    pip install "psycopg[binary]"
    broker -f postgresql://host/jobs ...    Queue("tasks", "postgresql://host/jobs")    BROKER_DEFAULT_DB_NAME=...

Move when a second machine has to reach the queues; not for speed: on one machine a file is faster. Two cores that had
other work too, FULL, bodies of 100 bytes, server on the same machine, a second, best of 12 rounds in one run:

               round trips   PostgreSQL   SQLite                              PostgreSQL   SQLite
    write                1          583    1,111     100 written at once             209      445
    read                 2          528    1,992     100 read at once                397      413
    lease + ack      2 + 2          384    1,499     8 processes write               646    1,610

A network adds its time to each round trip, and for all clients together: writers take turns. An idle watcher asks the
server once a second, takes 0.3 % of a core, and has a message 6 ms after its write began, by NOTIFY (median).

- All is in the schema "simplebroker" of the database, which the first use makes. Passwords belong in ~/.pgpass or a
  service file; one in the URL works and is not shown. The database's encoding is UTF8. A pooler has to pool sessions.
- Writers take turns, by an advisory lock: ids are in commit order. With FULL they sync after it, and share the syncs.
- Who is silent in a transaction for 10 s (IDLE_MS) is thrown out. Times are the server's. Text with U+0000 is refused.
- An OperationalError that says "unknown": the connection was lost at COMMIT. Who writes again then may write twice.
"""

from __future__ import annotations

import os
import re
import select
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Callable

import psycopg

import simplebroker
from simplebroker import DatabaseError, IntegrityError, MessageError, OperationalError, Settings, SQLRunner, UsageError

NAME = "simplebroker"  # of the schema, of the lock and of the channel
IDLE_MS = 10_000  # how long a client may be silent inside a transaction
DEFAULTS: dict[str, Any] = {"fallback_application_name": NAME, "connect_timeout": 10, "keepalives_idle": 10}
DEFAULTS.update(keepalives_interval=5, keepalives_count=3, tcp_user_timeout=25_000)  # has the other side vanished?
NOW = f"(extract(epoch FROM clock_timestamp()) * {simplebroker.NS})::bigint"
# Plans do not depend on statistics, which are stale in a queue.
SESSION = f"""\
SELECT {NOW}, set_config(name, value, false) FROM (VALUES ('search_path', '{NAME}'), ('enable_seqscan', 'off'),
    ('jit', 'off'), ('client_min_messages', 'error'), ('lock_timeout', greatest(1, ?)::text),
    ('idle_in_transaction_session_timeout', '{IDLE_MS}')) AS setting (name, value)"""
# The transaction itself is not synced. SYNC comes after it, and is, with all that the server's log has before it.
LOCK = f"""\
SELECT {NOW}, set_config('synchronous_commit', 'off', true)
FROM pg_advisory_xact_lock({simplebroker.APPLICATION_ID}, hashtext('{NAME}'))"""
SNAPSHOT = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL idle_in_transaction_session_timeout = 0"
SYNC = f"SELECT pg_logical_emit_message(true, '{NAME}', '')"
INSERT = f"""\
INSERT INTO messages (id, queue, body, held_until)
SELECT greatest(? & ~{simplebroker.ID_COUNTER_MASK}, last_id + 1, (SELECT max(id) + 1 FROM messages)) + number - 1,
    ?, body, ? FROM meta, unnest(?::text[]) WITH ORDINALITY AS new (body, number) RETURNING id"""
WORDS = (  # from SQLite's to PostgreSQL's
    (f"^({re.escape(simplebroker.CREATE_META)})$", rf"DO $$BEGIN CREATE SCHEMA IF NOT EXISTS {NAME}; \1; END$$"),
    (r" CHECK \((?:\w+ IS NULL OR )?typeof\(\w+\) = '\w+'\)|\+(?=[a-z])", ""),
    (r"\bINTEGER\b", "BIGINT"),
    (r"\bqueue TEXT\b", 'queue TEXT COLLATE "C"'),
    (r"\bmax\((?=\w+,|\?)", "greatest("),  # of two values, not of a column
    (r"\bsum\(([^()]*held_until[^()]*)\)", r"count(*) FILTER (WHERE \1)"),
    (r"\bsum\((\w+)\)", r"sum(\1)::bigint"),
    (r"(?<!:):(?=[a-z])(\w+)", r"%(\1)s"),
    (r"\?", "%s"),
    (f"^{simplebroker.SELECT_PAGES}$", "SELECT pg_total_relation_size('meta') + pg_total_relation_size('messages')"),
    (f"^{simplebroker.SELECT_PAGE_SIZE}$", "SELECT 1"),
    (f"^{simplebroker.VACUUM}$", "VACUUM (ANALYZE) messages"),
)
_inherited: list[Any] = []  # connections of a process that forked: not ours to free


@cache
def translated(sql: str) -> str:
    """A statement of the SQL section in PostgreSQL's words."""
    for pattern, replacement in WORDS:
        sql = re.sub(pattern, replacement, sql)
    return sql


class PostgreSQLRunner(SQLRunner):
    """One connection for all threads of the process. Transactions of one thread nest (savepoints).

    Statements whose rows nobody has asked for wait for the next one that is fetched, or for COMMIT: fewer round trips.
    """

    def __init__(self, url: str, settings: Settings | None = None) -> None:
        self.settings = settings or Settings.from_environment()
        self._url = url
        self.path = re.sub(r"(?<=://)(?P<user>[^:/?@]*):.*(?=@)|(?<=[?&])(ssl)?password=[^&]*", r"\g<user>", url)
        self._notifier = Listener(self.open_connection)  # which "notifier" of SQLRunner returns
        self._clock_ahead = 0  # of the server's clock, before our monotonic one; 0: not measured yet
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._connection: Any = None
        self._mutex: Any = threading.RLock()  # a thread holds it once for each transaction that it is in
        self._owner = self._depth = 0  # the thread that took the mutex last; in how many transactions it is

    def transact(self, function: Callable[..., Any], durable: bool = True) -> Any:
        """See SQLRunner."""
        with simplebroker.Transaction(self) as run:
            self._durable = durable or self._depth > 1
            return function(run)

    def write(self, queue: str, bodies: Sequence[str], held_until: Any, clock: Callable[[], int]) -> list[int]:
        """See SQLRunner. The ids come with the answer to COMMIT."""
        with simplebroker.Transaction(self) as run:
            self._notify, now = True, clock()
            rows = run(INSERT, (now, queue, held_until(now), list(bodies)))
        return sorted(id for id, in rows)

    def begin_immediate(self) -> None:
        """Start a transaction, or a nested one. Its first statement waits for other writers."""
        if self.depth():
            self._send("SAVEPOINT nested")
        self._enter("BEGIN ISOLATION LEVEL READ COMMITTED", LOCK)  # later statements see what the lock waited for

    def _enter(self, *first: str) -> None:
        """Take the mutex. Outside of transactions, connect, and let these statements wait to be sent."""
        if self._pid != os.getpid():  # a forked child: all is the parent's
            _inherited.append(self._connection)
            self._begin_anew()
        if self.is_busy() or not self._mutex.acquire(timeout=self.settings.busy_timeout_ms / 1000):
            raise OperationalError("the database is busy: another thread, or this one, uses the connection already")
        try:
            if not self._depth:
                self._connect()
                self._waiting: list[tuple[str, Any, list[Any]]] = [(sql, (), []) for sql in first]
                self._durable, self._notify, self._changed, self._sending = True, False, False, False
            self._owner, self._depth = threading.get_ident(), self._depth + 1
        except BaseException:
            self._mutex.release()
            raise

    def _leave(self) -> None:
        self._depth -= 1
        self._mutex.release()

    def commit(self) -> None:
        """Commit the innermost transaction."""
        if self.depth() > 1:
            self._send("RELEASE SAVEPOINT nested")
        else:
            syncs = self._changed and self._durable and self.settings.sync_mode == "FULL"
            self._send(*[f"NOTIFY {NAME}"] * self._notify, "COMMIT", *[SYNC] * syncs)
        self._leave()

    def rollback(self) -> None:
        """Undo the innermost transaction; nothing without one."""
        if self.depth():
            self._waiting, self._sending = [], False
            try:
                if not self._connection.closed:  # which rolls back too
                    self._send("ROLLBACK TO SAVEPOINT nested; RELEASE nested" if self._depth > 1 else "ROLLBACK")
            finally:
                self._leave()

    def depth(self) -> int:
        """In how many nested transactions this thread is."""
        return self._depth if (self._pid, self._owner) == (os.getpid(), threading.get_ident()) else 0

    def is_busy(self) -> bool:
        """See SQLRunner. (In its own transaction, between two statements, it is not.)"""
        return self._mutex._is_owned() and (not self._depth or self._sending)

    def run(self, sql: str, params: Any = (), *, fetch: bool = False) -> Any:
        """See SQLRunner. In a transaction, without fetch, the rows come when something is sent; a load sends each."""
        if self.depth():
            rows: list[Any] = []
            self._waiting.append((sql, params, rows))
            self._notify |= sql in simplebroker.NOTIFYING
            self._changed |= not sql.startswith("SELECT")
            if fetch or sql == simplebroker.INSERT_LOADED:  # whose error is to be that of the right line
                self._send()
            return rows
        if not translated(sql).startswith(("SELECT", "VACUUM")):
            return self.transact(lambda run: run(sql, params, fetch=fetch))
        self._enter()
        try:
            return self.run(sql, params, fetch=True)
        finally:
            self._leave()

    def _send(self, *more: str) -> None:
        """Send what waits, and more, in one round trip."""
        if "COMMIT" in more and self._connection.info.transaction_status.name not in ("IDLE", "INTRANS"):
            raise OperationalError("nothing was changed: the transaction failed before, or its connection was lost")
        if not self.depth() or self._sending:  # in a forked child, after an error, or in a signal handler
            raise OperationalError("this thread's transaction has ended or failed, or is in the middle of a statement")
        statements, self._sending = [*self._waiting, *[(text, (), []) for text in more]], True
        self._execute(self._connection, statements)
        self._waiting, self._sending = [], "COMMIT" in more  # after an error it stays true until the rollback
        if statements[0][0].startswith("BEGIN"):
            self._clock_ahead = statements[1][2][0][0] - time.monotonic_ns()

    def _ask(self, connection: Any, sql: str, params: Any = (), fetch: bool = True) -> list[Any]:
        """Run one statement by itself and return its rows."""
        rows: list[Any] = []
        self._execute(connection, [(sql, params, rows)])
        return rows

    def _execute(self, connection: Any, statements: list[tuple[str, Any, list[Any]]]) -> None:
        """Send statements, with their values in them, in one round trip; add what they answer to their rows."""
        try:
            cursor = connection.cursor()
            cursor.execute("; ".join(cursor.mogrify(translated(sql), params or None) for sql, params, _ in statements))
            for _, _, rows in statements:
                rows += cursor.fetchall() if cursor.description else []
                cursor.nextset()
        except psycopg.Error as error:
            raise self._translated(error, connection, any(sql == "COMMIT" for sql, *_ in statements)) from error
        except BaseException:  # an interrupt: nobody knows what the server has done
            connection.close()
            raise

    def _translated(self, error: psycopg.Error, connection: Any, commits: bool) -> simplebroker.BrokerError:
        """What an error means here."""
        text = " ".join(str(error).split())
        if isinstance(error, psycopg.DataError) and not error.sqlstate:  # not from the server
            return MessageError(f"PostgreSQL stores no U+0000: encode it, for example as JSON ({text})")
        if connection.closed:
            unknown = commits and error.sqlstate != "25P03"  # of idle_in_transaction_session_timeout
            outcome = "before COMMIT was answered: the outcome is unknown" if unknown else "nothing was changed"
            return OperationalError(f"the connection to {self.path!r} was lost, {outcome} ({text})")
        busy = "the database is busy, " if isinstance(error, psycopg.errors.LockNotAvailable) else ""
        lasting = isinstance(error, psycopg.ProgrammingError) and error.sqlstate != "42P01"  # of a missing table
        kind = IntegrityError if isinstance(error, psycopg.IntegrityError) else OperationalError
        return (DatabaseError if lasting else kind)(f"{busy}{self.path!r}: {text}")

    def clock(self) -> int:
        """The server's time, in nanoseconds since 1970: our monotonic clock and what the server said last."""
        if not self._clock_ahead:
            self.run("SELECT 1", fetch=True)  # connects
        return time.monotonic_ns() + self._clock_ahead

    def _connect(self) -> None:
        """Connect, also if the server has ended the connection. Outside of transactions; the caller has the mutex."""
        if self._connection is not None and not self._connection.closed:
            poll = select.poll()
            poll.register(self._connection.fileno(), select.POLLIN)
            if not poll.poll(0):
                return
            self._connection.close()  # what a server says unasked is that it ends the connection
        self._connection = self.open_connection()

    def open_connection(self) -> Any:
        """Connect to the server. The caller closes it."""
        try:
            if re.search("//[^?]*[/@][^?]*@", self._url):  # what a password with a / or @ would lead to
                raise psycopg.ProgrammingError
            options = {**DEFAULTS, **psycopg.conninfo.conninfo_to_dict(self._url), "client_encoding": "UTF8"}
            connection = psycopg.connect(**options, autocommit=True, cursor_factory=psycopg.ClientCursor)
        except psycopg.ProgrammingError:  # whose text may have a part of the password
            raise UsageError(f"{self.path!r} is no URL: look at its options; in a password, @ is %40, / %2F") from None
        except psycopg.Error as error:
            raise OperationalError(f"cannot connect to {self.path!r}: {' '.join(str(error).split())}") from error
        self._clock_ahead = self._ask(connection, SESSION, [self.settings.busy_timeout_ms])[0][0] - time.monotonic_ns()
        return connection

    @contextmanager
    def snapshot(self) -> Iterator[Callable[..., list[Any]]]:
        """See SQLRunner. A connection of its own, whose reader may be slow and stops nobody."""
        with self.open_connection() as connection:
            self._ask(connection, SNAPSHOT)
            yield partial(self._ask, connection)

    def vacuum(self) -> None:
        """Let PostgreSQL use the space of removed messages again."""
        super().vacuum()
        simplebroker.logger().warning("the space can be used again; VACUUM FULL %s.messages would give it back", NAME)

    def delete(self) -> bool:
        """Refuse: a server's schema is dropped by hand."""
        raise UsageError(f'nothing on a server is dropped by this: run "DROP SCHEMA {NAME} CASCADE" in psql')

    def close(self) -> None:
        """Close the connection. Waits for a transaction of another thread."""
        self._notifier.closed = True
        if self._connection is not None and self._pid == os.getpid():
            with self._mutex:
                self._connection.close()


class Listener(simplebroker.Notifier):
    """Wakes the waiters of this process by NOTIFY: a thread with a connection of its own, once somebody has waited."""

    def __init__(self, open_connection: Callable[[], Any]) -> None:
        super().__init__(data_version=lambda: 1)  # nothing to look at in between: waiters look once a second
        self._open_connection, self.closed = open_connection, False
        self._process = 0  # that has the thread

    def add(self, client: Any) -> None:
        """See Notifier."""
        super().add(client)
        if isinstance(client, simplebroker.Waiter) and self.is_running() and self._process != os.getpid():
            self._process = os.getpid()
            threading.Thread(target=self._listen, name="simplebroker-listener", daemon=True).start()

    def _listen(self) -> None:
        while not self.closed:
            try:
                with self._open_connection() as connection:
                    connection.execute(f"LISTEN {NAME}")
                    self.notify()  # of what was committed before
                    while not self.closed:
                        for _ in connection.notifies(timeout=1.0, stop_after=1):
                            self.notify()
            except (simplebroker.BrokerError, psycopg.Error) as error:
                simplebroker.logger().warning("no notifications from the server, trying again: %s", error)
                time.sleep(1.0)


open_runner = PostgreSQLRunner  # what simplebroker looks for
