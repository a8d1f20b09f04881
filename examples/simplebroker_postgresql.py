"""SimpleBroker on PostgreSQL: for queues that more than one machine uses. Put this file beside your program.

    pip install "psycopg[binary]"
    broker -f postgresql://host/jobs ...    Queue("tasks", "postgresql://host/jobs")    BROKER_DEFAULT_DB_NAME=...

Move when a second machine has to reach the queues; not for speed. On two cores, FULL, bodies of 100 bytes, the server
on the same machine (a Unix socket), operations a second, median of 3, in one run with SQLite:

               round trips   PostgreSQL   SQLite                              PostgreSQL   SQLite
    write                1          898    2,664     100 written at once             263      823
    read                 2          665    2,751     100 read at once                378      798
    lease + ack      2 + 2          383    1,982     8 processes write             1,339    2,984

A network adds its time to each round trip, and for all clients together: writers take turns.

- All is in the schema "simplebroker" of the database, which the first use makes. Passwords belong in ~/.pgpass or a
  service file; one in the URL works and is not shown. The database's encoding is UTF8. A pooler has to pool sessions.
- One writer is inside at a time, by an advisory lock, so ids are given out in commit order, as in a file. It lets the
  next one in when it has committed, and then waits for the disk (if BROKER_SYNC_MODE is FULL): clients share the syncs.
- A client that is silent inside a transaction, because it stopped or vanished, is thrown out after 10 s (IDLE_MS).
- Times are the server's: a machine whose clock is wrong steals no lease.
- An OperationalError that says "unknown": the connection was lost before COMMIT was answered. Who writes again then
  may write twice.
- PostgreSQL's text has no U+0000: such a body is a MessageError.
"""

from __future__ import annotations

import os
import re
import select
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Callable

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg.types.numeric import IntLoader
from simplebroker.ext import (
    APPLICATION_ID,
    CREATE_META,
    ID_COUNTER_MASK,
    NOTIFYING,
    NS,
    SCHEMA,
    SELECT_PAGE_SIZE,
    SELECT_PAGES,
    VACUUM,
)

import simplebroker
from simplebroker import DatabaseError, IntegrityError, MessageError, OperationalError, Settings, SQLRunner, UsageError

NAME = "simplebroker"  # of the schema, and of the channel
IDLE_MS = 10_000  # how long a client may be silent inside a transaction
# The last of them find out that the other side has vanished.
DEFAULTS = {"fallback_application_name": NAME, "connect_timeout": 10, "keepalives_idle": 10}
DEFAULTS.update(keepalives_interval=5, keepalives_count=3, tcp_user_timeout=25_000)
NOW = f"(extract(epoch FROM clock_timestamp()) * {NS})::bigint"
# The transaction itself is not synced. SYNC comes after it, and is, with all that the server's log has before it.
LOCK = f"""\
SELECT {NOW}, set_config('synchronous_commit', 'off', true)
FROM pg_advisory_xact_lock({APPLICATION_ID}, {zlib.crc32(NAME.encode()) >> 1})"""
SYNC = f"SELECT pg_logical_emit_message(true, '{NAME}', '')"
INSERT = """\
INSERT INTO messages (id, queue, body, held_until)
SELECT greatest(:now, last_id + 1, (SELECT max(id) + 1 FROM messages)) + number - 1, :queue, body, :held_until
FROM meta, unnest(:bodies::text[]) WITH ORDINALITY AS new (body, number) RETURNING id"""
OTHERS = {SELECT_PAGES: "SELECT pg_total_relation_size('meta') + pg_total_relation_size('messages')"}
OTHERS.update({SELECT_PAGE_SIZE: "SELECT 1", VACUUM: "VACUUM (ANALYZE) messages"})
WORDS = (  # from SQLite's to PostgreSQL's
    (r" CHECK \((?:\w+ IS NULL OR )?typeof\(\w+\) = '\w+'\)", ""),
    (r"\bINTEGER\b", "BIGINT"),
    (r"\bqueue TEXT\b", 'queue TEXT COLLATE "C"'),
    (r"\bmax\((?=\w+,|\?)", "greatest("),  # of two values, not of a column
    (r"\bsum\(([^()]*held_until[^()]*)\)", r"count(*) FILTER (WHERE \1)"),
    (r"\+(?=[a-z])", ""),
    (r"(?<!:):(?=[a-z])(\w+)", r"%(\1)s"),
    (r"\?", "%s"),
)


@cache
def translated(sql: str) -> str:
    """A statement of the SQL section in PostgreSQL's words."""
    text = OTHERS.get(sql, sql)
    for pattern, replacement in WORDS:
        text = re.sub(pattern, replacement, text)
    return f"CREATE SCHEMA IF NOT EXISTS {NAME}; {text}" if sql == CREATE_META else text


class PostgreSQLRunner(SQLRunner):
    """One connection for all threads of the process. Transactions of one thread nest (savepoints).

    Statements that answer nothing wait and go to the server with the next one that does, or with COMMIT: a write is
    one round trip, a read, a lease or an acknowledgement two. The lock is taken with the first of them.
    """

    def __init__(self, url: str, settings: Settings | None = None) -> None:
        self.settings = settings or Settings.from_environment()
        self._url = url
        self.path = re.sub(r"(?<=[^/]):[^:/@?]*(?=@)|(?<=[?&])password=[^&]*&?", "", url)
        self._notifier = Listener(self.open_connection)  # which "notifier" of SQLRunner returns
        self._clock_ahead = 0  # of the server's clock, before our monotonic one; 0: not measured yet
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        # Guards the connection and the fields below. A thread that is in a transaction holds it.
        self._mutex = threading.RLock()
        self._connection: psycopg.Connection[Any] | None = None
        self._depth = self._owner = 0
        self._waiting: list[str] = []  # statements that the server has not got yet
        self._durable, self._notify, self._changed = True, False, False  # what the transaction wants, and has done

    # -- transactions

    def transact(self, function: Callable[..., Any], durable: bool = True) -> Any:
        """See SQLRunner."""
        with simplebroker.Transaction(self) as run:
            self._durable = durable or self._depth > 1
            return function(run)

    def write(self, queue: str, bodies: Sequence[str], held_until: Any, clock: Callable[[], int]) -> list[int]:
        """See SQLRunner. A transaction in one round trip."""
        self.begin_immediate()
        try:
            now = clock()
            return self._insert(queue, bodies, held_until(now), now, self.commit)
        except BaseException:
            self.rollback()
            raise

    def insert(self, queue: str, bodies: Sequence[str], held_until: int | None, now: int) -> list[int]:
        """See SQLRunner."""
        return self._insert(queue, bodies, held_until, now, self._send)

    def _insert(
        self, queue: str, bodies: Sequence[str], held_until: int | None, now: int, send: Callable[[], list[Any]]
    ) -> list[int]:
        self._notify = True
        values = {"queue": queue, "bodies": list(bodies), "held_until": held_until, "now": now & ~ID_COUNTER_MASK}
        self._waiting.append(self._bound(INSERT, values))
        place = len(self._waiting) - 1
        return sorted(row[0] for row in send()[place])

    def begin_immediate(self) -> None:
        """Start a transaction, or a nested one. Its first statement waits for other writers, up to BROKER_BUSY_TIMEOUT,
        then OperationalError."""
        if self.depth():
            self._send("SAVEPOINT nested")
            self._depth += 1
            return
        self._take_mutex()
        try:
            self._connect()
            self._waiting, self._durable, self._notify, self._changed = ["BEGIN", LOCK], True, False, False
            self._owner, self._depth = threading.get_ident(), 1
        except BaseException:
            self._leave()
            raise

    def commit(self) -> list[Any]:  # type: ignore[override]
        """Commit the innermost transaction; return the rows of each statement that was sent with it."""
        if self.depth() > 1:
            results = self._send("RELEASE SAVEPOINT nested")
            self._depth -= 1
            return results
        changed = self._changed or self._waiting not in ([], ["BEGIN", LOCK])
        syncs = changed and self._durable and self.settings.sync_mode == "FULL"
        results = self._send(*[f"NOTIFY {NAME}"] * self._notify, "COMMIT", *[SYNC] * syncs)
        self._leave()
        return results

    def rollback(self) -> None:
        """Undo the innermost transaction; nothing without one."""
        if self.depth() > 1:
            self._waiting, self._depth = [], self._depth - 1
            self._send("ROLLBACK TO SAVEPOINT nested", "RELEASE SAVEPOINT nested")
        elif self.depth():
            try:
                if self._connection is not None and self._connection.info.transaction_status != TransactionStatus.IDLE:
                    self._connection.execute("ROLLBACK")
            except psycopg.Error:
                self._disconnect(self._connection)  # which rolls back too
            finally:
                self._leave()

    def depth(self) -> int:
        """In how many nested transactions this thread is."""
        self._check_process()
        return self._depth if self._owner == threading.get_ident() else 0

    def _take_mutex(self) -> None:
        self._check_process()
        if not self._mutex.acquire(timeout=self.settings.busy_timeout_ms / 1000):
            raise OperationalError("the database is busy: another thread is in a transaction on this connection")

    def _leave(self) -> None:
        self._depth = self._owner = 0
        self._mutex.release()

    # -- statements

    def run(self, sql: str, params: Any = (), *, fetch: bool = False) -> Any:
        """See SQLRunner. Inserts are sent at once, so that an error is that of the right row."""
        if self.depth():
            self._notify |= sql in NOTIFYING
            self._waiting.append(self._bound(sql, params))
            return self._send()[-1] if fetch or sql.startswith("INSERT") else []
        if not sql.startswith("SELECT") and sql not in OTHERS:
            return self.transact(lambda run: run(sql, params, fetch=fetch))
        self._take_mutex()
        try:
            return self._execute(self._connect(), [self._bound(sql, params)])[0]
        finally:
            self._mutex.release()

    def _bound(self, sql: str, params: Any, connection: psycopg.Connection[Any] | None = None) -> str:
        """A statement with its values in it."""
        try:
            return psycopg.ClientCursor(connection or self._connected()).mogrify(translated(sql), params or None)
        except psycopg.DataError as error:
            raise MessageError(f"PostgreSQL stores no U+0000: encode it, for example as JSON ({error})") from None

    def _connected(self) -> psycopg.Connection[Any]:
        if self._connection is None:
            raise OperationalError("the transaction is gone: the connection was lost, and nothing was changed")
        return self._connection

    def _send(self, *more: str) -> list[Any]:
        """Send what waits, and more, in one round trip; return the rows of each statement."""
        if not self.depth():
            raise OperationalError("this thread has no open transaction (a forked child does not inherit one)")
        connection, statements, self._waiting = self._connected(), [*self._waiting, *more], []
        if "COMMIT" in more and connection.info.transaction_status == TransactionStatus.INERROR:
            raise OperationalError("nothing was changed: a statement of this transaction failed before")
        results = self._execute(connection, statements)
        if statements[0] == "BEGIN":
            self._clock_ahead = results[1][0][0] - time.monotonic_ns()
        return results

    def _execute(self, connection: psycopg.Connection[Any], statements: list[str]) -> list[Any]:
        try:
            cursor: Any = connection.execute("; ".join(statements))
            results = []
            while True:
                results.append([] if cursor.description is None else cursor.fetchall())
                if cursor.rowcount > 0 and cursor.statusmessage[:6] != "SELECT":
                    self._changed = True
                if not cursor.nextset():
                    return results
        except psycopg.Error as error:
            raise self._translated(error, connection, "COMMIT" in statements) from error
        except BaseException:  # an interrupt: nobody knows what the server has done
            self._disconnect(connection)
            raise

    def _translated(self, error: psycopg.Error, connection: Any, commits: bool) -> simplebroker.BrokerError:
        text = " ".join(str(error).split())
        if connection.closed:
            self._disconnect(connection)
            unknown = commits and error.sqlstate != "25P03"  # of idle_in_transaction_session_timeout
            outcome = "before COMMIT was answered: the outcome is unknown" if unknown else "nothing was changed"
            return OperationalError(f"the connection to {self.path!r} was lost, {outcome} ({text})")
        if isinstance(error, psycopg.errors.LockNotAvailable):
            return OperationalError(f"the database is busy: waited for BROKER_BUSY_TIMEOUT ({text})")
        if isinstance(error, psycopg.IntegrityError):
            return IntegrityError(text)
        known = isinstance(error, (psycopg.OperationalError, psycopg.InternalError, psycopg.InterfaceError))
        return (OperationalError if known else DatabaseError)(f"{self.path!r}: {text}")

    # -- the server

    def prepare(self) -> None:
        """See SQLRunner."""
        if self.run(f"SELECT to_regclass('{NAME}.meta') IS NULL", fetch=True)[0][0]:
            self.transact(lambda run: [run(statement) for statement in SCHEMA])
        super().prepare()

    def clock(self) -> int:  # type: ignore[override]
        """The server's time, in nanoseconds since 1970: our monotonic clock and what the server said last."""
        if not self._clock_ahead:
            self.run("SELECT 1", fetch=True)  # connects
        return time.monotonic_ns() + self._clock_ahead

    def _connect(self) -> psycopg.Connection[Any]:
        """The connection, outside of transactions; a new one if the server has ended it. The caller has the mutex."""
        if self._connection is not None:
            poll = select.poll()
            poll.register(self._connection.fileno(), select.POLLIN)
            if poll.poll(0):  # what a server says unasked is that it ends the connection
                self._disconnect(self._connection)
        if self._connection is None:
            self._connection = self.open_connection(IDLE_MS)
            self._clock_ahead = self._execute(self._connection, [f"SELECT {NOW}"])[0][0][0] - time.monotonic_ns()
        return self._connection

    def open_connection(self, idle_ms: int) -> psycopg.Connection[Any]:
        """Connect to the server. The caller closes it."""
        try:
            options = {**DEFAULTS, **conninfo_to_dict(self._url), "client_encoding": "UTF8"}
            connection: Any = psycopg.connect(**options, autocommit=True, cursor_factory=psycopg.ClientCursor)
            connection.adapters.register_loader("numeric", IntLoader)  # sums
            connection.execute(  # plans do not depend on statistics, which are stale in a queue
                f"SET search_path = {NAME}; SET lock_timeout = {max(1, self.settings.busy_timeout_ms)};"
                f" SET idle_in_transaction_session_timeout = {idle_ms}; SET client_min_messages = error;"
                " SET enable_seqscan = off; SET jit = off"
            )
            return connection  # type: ignore[no-any-return]
        except psycopg.Error as error:
            raise OperationalError(f"cannot connect to {self.path!r}: {' '.join(str(error).split())}") from error

    def _disconnect(self, connection: psycopg.Connection[Any] | None) -> None:
        if connection is self._connection:
            self._connection = None
        if connection is not None:
            connection.close()

    @contextmanager
    def snapshot(self) -> Iterator[Callable[..., list[Any]]]:
        """See SQLRunner. A connection of its own, whose reader may be slow and stops nobody."""
        connection = self.open_connection(0)
        try:
            self._execute(connection, ["BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"])
            bound = partial(self._bound, connection=connection)
            yield lambda sql, params=(), fetch=True: self._execute(connection, [bound(sql, params)])[0]
        finally:
            connection.close()

    def vacuum(self) -> None:
        """Let PostgreSQL use the space of removed messages again."""
        self.run(VACUUM)
        text = "PostgreSQL can use the space again; to give it to the file system, run VACUUM FULL %s.messages"
        simplebroker.log_warning(text, NAME)

    def delete(self) -> bool:
        """Refuse: a server's schema is dropped by hand."""
        raise UsageError(f'nothing on a server is dropped by this: run "DROP SCHEMA {NAME} CASCADE" in psql')

    def close(self) -> None:
        """Close the connection. Waits for a transaction of another thread."""
        self._take_mutex()
        self._disconnect(self._connection)
        self._notifier.closed = True
        self._mutex.release()

    def _check_process(self) -> None:
        """In a forked child: leave the connection to the parent, and begin anew."""
        if self._pid != os.getpid():
            _inherited.append(self._connection)
            self._begin_anew()


_inherited: list[Any] = []  # connections that are the parent's: not freed here


class Listener(simplebroker.Notifier):
    """Wakes the waiters of this process by NOTIFY: a thread with a connection of its own, once somebody has waited."""

    def __init__(self, open_connection: Callable[[int], psycopg.Connection[Any]]) -> None:
        super().__init__(data_version=lambda: 1)  # nothing to look at in between: waiters look once a second
        self._open_connection = open_connection
        self._process = 0  # that has the thread
        self._starting = threading.Lock()  # guards _process; held only to start the thread
        self.closed = False

    def add(self, client: Any) -> None:
        """See Notifier."""
        super().add(client)
        with self._starting:
            if isinstance(client, simplebroker.Waiter) and self._process != os.getpid():
                threading.Thread(target=self._listen, name="simplebroker-listener", daemon=True).start()
                self._process = os.getpid()

    def _listen(self) -> None:
        while not self.closed:
            try:
                with self._open_connection(0) as connection:
                    connection.execute(f"LISTEN {NAME}")
                    self.notify()  # of what was committed before
                    while not self.closed:
                        for _ in connection.notifies(timeout=1.0, stop_after=1):
                            self.notify()
            except (simplebroker.BrokerError, psycopg.Error) as error:
                simplebroker.log_warning("no notifications from the server, trying again: %s", error)
                time.sleep(1.0)


open_runner = PostgreSQLRunner  # what simplebroker looks for
