#!/usr/bin/env python3
"""SimpleBroker: a durable message queue in one file, on SQLite. No server.

Vocabulary
    message       a text body with an id, in one queue
    id            positive 63-bit integer that only grows: nanoseconds since 1970, low 12 bits a counter
    ready         deliverable now
    leased        hidden until a time, because a consumer has it; the lease has a random token
    delayed       hidden until a time, and nobody has it
    attempt       how many times the message has been leased
    reason        why its last attempt failed
    dead-letter   the queue for messages whose attempts are used up, QUEUE.dead unless told otherwise

    write ------------> READY -- read -------------> gone
      | delay           |   ^
      +--> DELAYED -due-+   | release, or the lease ended
             ^    lease |   |
             |          v   |
             +--------- LEASED -- ack -------------> gone
          release with      +---- attempts used up -> READY in QUEUE.dead, with the reason
          a delay

Promises
    Durable      when write() returns, the message survives a crash of the process, and of the machine
                 with BROKER_SYNC_MODE=FULL (the default)
    Ordered      a queue delivers in the order of ids; ids are given out in commit order, across
                 processes, even when the clock steps back
    Never lost   read() removes and returns in one transaction (at most once); what hands a message to
                 code or to a pipe leases it first and removes it afterwards (at least once)
    Never stuck  a lease ends by itself; a stale consumer cannot acknowledge what was given to another
    Portable     Python 3.9+, SQLite 3.31+; Linux, elsewhere through plainer ways; CPython and PyPy

Exit statuses of the command: 0 done; 1 error, one line on standard error; 2 nothing there.

The sections of this file, each using only those above it (but Broker.queue()): constants, errors and
Message, settings, SQL, ids and times, paths, writer lock, notifier, runners, Broker, Queue, watchers,
command line, main.
"""

from __future__ import annotations

import atexit
import os
import sqlite3
import stat
import sys
import threading
import time
import weakref
from collections import namedtuple
from functools import partial

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TYPE_CHECKING = False  # what only annotations need is not imported at run time: start-up is a feature
if TYPE_CHECKING:
    import argparse
    import logging
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import datetime
    from typing import Any, Callable, NoReturn, TypeVar, Union

    T = TypeVar("T")
    StrPath = Union[str, os.PathLike[str]]
    Id = Union[int, str, None]
    Run = Callable[..., list[Any]]
    Handler = Callable[["Message", int], object]
    ErrorHandler = Callable[[BaseException, "Message", int], Union[bool, None]]

__version__ = "2.0.0"
# Queues and consumers; handlers for watchers; errors; extensions.
__all__ = ["Broker", "LeasesInFlight", "Message", "Queue", "QueueMoveWatcher", "QueueWatcher", "Settings", "Stats"]
__all__ += ["default_error_handler", "json_print_handler", "logger_handler", "simple_print_handler"]
__all__ += ["BrokerError", "DatabaseError", "IntegrityError", "LeaseLost", "MessageError", "OperationalError"]
__all__ += ["QueueNameError", "UsageError", "SQLRunner", "SQLiteRunner", "TimestampGenerator", "WriterLock", "main"]

# ---------------------------------------------------------------------------------------------------
# Constants: what has a unit has it in its name or beside it.
# ---------------------------------------------------------------------------------------------------

APPLICATION_ID = 0x53424B52  # "SBKR" in the header of the database file
SCHEMA_VERSION = 2
ID_COUNTER_MASK = 0xFFF  # the low 12 bits of an id
ID_DIGITS = 19
MAX_ID = 2**63 - 2**32  # ids stay below this, so far from the end of the integers that sums cannot overflow
MAX_QUEUE_NAME = 512  # characters
MAX_REASON = 200  # characters
DEFAULT_LEASE_S = 30.0
DEFAULT_MAX_ATTEMPTS = 5
BACKOFF_S = 0.5  # delay after the first failed attempt; doubles with each further one ...
MAX_BACKOFF_S = 300.0  # ... up to this
MAX_BATCH = 1000  # messages in one transaction of a long operation
MAX_PROMOTED = 100  # messages that became due and are made ready at once, unless more are wanted
PAGE_BYTES = 2048  # of new databases: a small write is logged page by page, and 4096 make it 1.25 times slower
BATCH_BYTES = 1 << 20  # a batch that is heavier than this makes the next one smaller ...
FAST_BATCH_S = 0.1  # ... and so does one that its consumer worked on for longer than this
NS = 1_000_000_000  # nanoseconds in a second
LAST_LOADED_ID = 7_258_118_400 * NS  # the year 2200: an id beyond it would leave few for those after it

# ---------------------------------------------------------------------------------------------------
# Errors and Message: one base for all errors; a message is its body, and knows where it came from.
# ---------------------------------------------------------------------------------------------------


class BrokerError(Exception):
    """Base of everything that this module raises on its own account."""


class OperationalError(BrokerError, sqlite3.OperationalError):
    """The database is busy, full, read-only or cannot be opened. Trying again later may work."""


class NotSynced(OperationalError):
    """The transaction is committed, but the disk refused to sync it: a crash of the machine may undo it."""

    def __init__(self, text: str, result: Any = None) -> None:
        super().__init__(text)
        self.result = result  # of the transaction's function


class IntegrityError(BrokerError, sqlite3.IntegrityError):
    """A constraint of the database would be violated, such as an id that exists already."""


class DatabaseError(BrokerError, sqlite3.DatabaseError):
    """The file is not a SimpleBroker database, is damaged, or is of another version."""


class QueueNameError(BrokerError, ValueError):
    """A queue name that is not allowed."""


class MessageError(BrokerError, ValueError):
    """A body that is too large or is not text."""


class UsageError(BrokerError, ValueError):
    """A path, setting, dump or command line that makes no sense, or a queue that was closed."""


class LeaseLost(BrokerError):
    """The lease ended and the message was given to another consumer, moved or removed."""


class Message(str):
    """A message body that also carries where it came from. It is a str, except that an empty one is true too.

    id, queue   which message it is
    attempt     how many times it has been leased
    lease       the token of the lease that lease() gave the caller; None without one
    reason      why its last attempt failed; None if none did
    due         when a held message becomes ready, in nanoseconds since 1970; None if it is ready
    state       "ready", "leased" or "delayed", when it was looked at

    >>> m = Message("hello", 1837025672140161024, "tasks")
    >>> m, m.id, m.time.isoformat()
    ('hello', 1837025672140161024, '2028-03-18T20:54:32.140161+00:00')
    """

    __slots__ = ("attempt", "due", "id", "lease", "queue", "reason", "state")
    id: int
    queue: str
    attempt: int
    lease: int | None
    reason: str | None
    due: int | None
    state: str

    def __new__(
        cls, body: str, id: int, queue: str, attempt: int = 0, lease: int | None = None, reason: str | None = None,
        due: int | None = None, state: str = "ready",
    ) -> Message:  # fmt: skip
        self = str.__new__(cls, body)
        self.id, self.queue, self.attempt, self.lease = id, queue, attempt, lease
        self.reason, self.due, self.state = reason, due, state
        return self

    def __bool__(self) -> bool:  # so that ``while message := queue.read():`` does not end at an empty body
        return True

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles keep everything
        fields = self.id, self.queue, self.attempt, self.lease, self.reason, self.due, self.state
        return type(self), (str.__str__(self), *fields)

    @property
    def timestamp(self) -> int:
        """The id, under the name that the command line and JSON use."""
        return self.id

    @property
    def time(self) -> datetime:
        """When the message was written: an aware datetime in UTC (microseconds)."""
        from datetime import datetime, timedelta, timezone

        return datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=(self.id & ~ID_COUNTER_MASK) // 1000)


_QUEUE_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")


def check_queue_name(name: str) -> str:
    """Return the name if it is allowed: 1-512 of [A-Za-z0-9_.-], not starting with '-' or '.'."""
    if not isinstance(name, str):
        raise TypeError(f"a queue name is a str, not {type(name).__name__}")
    name = str.__str__(name)  # of a subclass, such as an enumeration: its value
    if not (0 < len(name) <= MAX_QUEUE_NAME and name[0] not in "-." and _QUEUE_CHARACTERS.issuperset(name)):
        raise QueueNameError(
            f"queue name {shown(name)} is not allowed: use 1 to {MAX_QUEUE_NAME} letters, digits, '_', '.' or '-',"
            " and begin with none of '.' and '-'"
        )
    return name


def check_body(body: str, max_bytes: int) -> str:
    """Return the body as an exact str if it is text that fits."""
    if not isinstance(body, str):
        raise TypeError(f"a message body is a str, not {type(body).__name__}: encode data, for example as JSON")
    body = str.__str__(body)
    try:
        size = len(body) if body.isascii() else len(body.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise MessageError(f"the body is not valid text: {error.reason} at character {error.start}") from None
    if size > max_bytes:
        raise MessageError(f"the body has {size} bytes, more than the {max_bytes} that BROKER_MAX_MESSAGE_SIZE allows")
    return body


def check_limit(limit: int, name: str = "limit") -> int:
    """A number of messages or attempts: a positive int."""
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"{name} is an int, not {type(limit).__name__}")
    if limit < 1:
        raise ValueError(f"{name} must be at least 1, not {limit}")
    return min(limit, 2**31)


def check_reason(reason: str | None) -> str | None:
    """A reason as one line that a terminal can show, of at most 200 characters; None for an empty one."""
    if reason is None:
        return None
    if not isinstance(reason, str):
        raise TypeError(f"a reason is a str, not {type(reason).__name__}")
    line = " ".join(reason[: 10 * MAX_REASON].split())[:MAX_REASON]
    return "".join(character if character.isprintable() else "?" for character in line) or None


def shown(value: object) -> str:
    """A value as an error message quotes it: not longer than a line."""
    text = repr(value[:61] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= 64 else text[:60] + "..."


def logger() -> logging.Logger:
    """The logger "simplebroker"; logging is imported when there is something to say."""
    import logging

    return logging.getLogger("simplebroker")


# ---------------------------------------------------------------------------------------------------
# Settings: what can be configured. Read once, frozen, and passed on.
# ---------------------------------------------------------------------------------------------------


def _whole(low: int, high: int) -> Callable[[str], int]:
    """A rule that takes plain decimal integers from low to high."""

    def rule(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 20 and low <= int(text) <= high):
            raise ValueError(f"{shown(text)} is not a whole number from {low} to {high}")
        return int(text)

    return rule


def _seconds(text: str) -> float:
    if not (set(text) <= set("0123456789.") and 0.001 <= float(text) <= 60):
        raise ValueError(text)
    return float(text)


def _file_or_url(text: str) -> str:
    outside = os.path.isabs(text) or ".." in text.replace("\\", "/").split("/")
    if not text or has_controls(text) or (outside and not url_scheme(text)):
        raise ValueError(text)
    return text


def _directory(text: str) -> str | None:
    if text and (not os.path.isabs(text) or has_controls(text)):
        raise ValueError(text)
    return text or None


def has_controls(text: str) -> bool:
    """Are there control characters in it?"""
    return any(ord(character) < 32 or ord(character) == 127 for character in text)


def url_scheme(text: str) -> str:
    """The scheme of a URL such as postgresql://host/name, which names a database elsewhere; "" for a path."""
    scheme, separator, _ = text.partition("://")
    return scheme if separator and scheme.isascii() and scheme.isalnum() else ""


_SYNC_MODES = {"FULL": "FULL", "NORMAL": "NORMAL", "OFF": "OFF"}
_FLAGS = {"1": True, "TRUE": True, "YES": True, "0": False, "FALSE": False, "NO": False, "": False}
_RULES: tuple[tuple[str, str, object, Callable[[str], Any], str], ...] = (
    # attribute, environment variable, default, rule, what is allowed
    ("busy_timeout_ms", "BROKER_BUSY_TIMEOUT", 5000, _whole(0, 2**31 - 1), "whole milliseconds up to 2147483647"),
    ("sync_mode", "BROKER_SYNC_MODE", "FULL", lambda text: _SYNC_MODES[text.upper()], "FULL, NORMAL or OFF"),
    ("cache_mb", "BROKER_CACHE_MB", 10, _whole(1, 65536), "whole megabytes from 1 to 65536"),
    ("wal_autocheckpoint", "BROKER_WAL_AUTOCHECKPOINT", 2000, _whole(1, 10**9), "whole pages from 1 to 1000000000"),
    ("max_message_size", "BROKER_MAX_MESSAGE_SIZE", 10 << 20, _whole(1, 10**9), "whole bytes from 1 to 1000000000"),
    ("max_interval_s", "BROKER_MAX_INTERVAL", 0.1, _seconds, "seconds from 0.001 to 60"),
    ("db_name", "BROKER_DEFAULT_DB_NAME", ".broker.db", _file_or_url, "a relative file name without '..', or a URL"),
    ("db_location", "BROKER_DEFAULT_DB_LOCATION", None, _directory, "an absolute directory"),
    ("project_scope", "BROKER_PROJECT_SCOPE", False, lambda text: _FLAGS[text.upper()], "1 or 0"),
)


class Settings(namedtuple("Settings", "busy_timeout_ms sync_mode cache_mb wal_autocheckpoint max_message_size"
                          " max_interval_s db_name db_location project_scope")):  # fmt: skip
    """What can be configured; frozen. UsageError for a bad value names what is allowed.

    Values are given by keyword; else they come from the BROKER_* variables in ``environ``, else the
    defaults hold.

    busy_timeout_ms     how long an operation waits for other writers before OperationalError
    sync_mode           FULL: a write survives a power cut; NORMAL: the last ones may be lost, the file
                        stays sound; OFF: no syncing at all
    cache_mb            SQLite's page cache
    wal_autocheckpoint  pages in the write-ahead log before it is copied back
    max_message_size    bytes of a body in UTF-8
    max_interval_s      how often the notifier looks by itself where the system reports no changes of files
    db_name             file name of the database, where none is given; or its URL
    db_location         directory of the database, where none is given; None: the current directory
    project_scope       look for the database in the parent directories too

    >>> Settings({"BROKER_SYNC_MODE": "normal"}, cache_mb=5).sync_mode
    'NORMAL'
    """

    __slots__ = ()
    busy_timeout_ms: int
    sync_mode: str
    cache_mb: int
    wal_autocheckpoint: int
    max_message_size: int
    max_interval_s: float
    db_name: str
    db_location: str | None
    project_scope: bool

    def __new__(
        cls, environ: Mapping[str, str] | None = None, *, busy_timeout_ms: int | None = None,
        sync_mode: str | None = None, cache_mb: int | None = None, wal_autocheckpoint: int | None = None,
        max_message_size: int | None = None, max_interval_s: float | None = None, db_name: str | None = None,
        db_location: str | None = None, project_scope: bool | None = None,
    ) -> Settings:  # fmt: skip
        given, values = locals(), []  # the arguments by name
        for attribute, variable, default, rule, allowed in _RULES:
            name, value = attribute, given[attribute]
            if value is None:
                name, value = variable, (environ or {}).get(variable, default)
            try:
                values.append(rule("" if value is None else str(value)))
            except (ValueError, KeyError):
                raise UsageError(f"{name}={shown(value)}: must be {allowed}") from None
        return cls._make(values)

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, object]]:  # copies and pickles
        return (), self._asdict()

    @classmethod
    def from_environment(cls) -> Settings:
        """The settings that the BROKER_* variables of this process ask for."""
        return cls(os.environ)


# ---------------------------------------------------------------------------------------------------
# SQL: every statement that the broker runs, once, by name. A runner for another database translates these.
# Bounds of ids are always given and strict: 0 and MAX_ID + 1 stand for "none". A "+" hides a column from the
# planner, which else would look for the few held messages of a queue by walking through all ids.
# ---------------------------------------------------------------------------------------------------

CREATE_META = """\
CREATE TABLE IF NOT EXISTS meta (
    singleton INTEGER PRIMARY KEY CHECK (singleton = 1),
    version INTEGER NOT NULL,
    last_id INTEGER NOT NULL CHECK (typeof(last_id) = 'integer')
)"""
CREATE_MESSAGES = f"""\
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY CHECK (id BETWEEN 1 AND {MAX_ID}),
    queue TEXT NOT NULL CHECK (typeof(queue) = 'text'),
    body TEXT NOT NULL CHECK (typeof(body) = 'text'),
    held_until INTEGER CHECK (held_until IS NULL OR typeof(held_until) = 'integer'),
    attempt INTEGER NOT NULL DEFAULT 0 CHECK (typeof(attempt) = 'integer'),
    lease INTEGER CHECK (lease IS NULL OR typeof(lease) = 'integer'),
    reason TEXT CHECK (reason IS NULL OR typeof(reason) = 'text')
)"""
CREATE_READY_INDEX = "CREATE INDEX IF NOT EXISTS ready ON messages (queue, id) WHERE held_until IS NULL"
CREATE_HELD_INDEX = "CREATE INDEX IF NOT EXISTS held ON messages (queue, held_until) WHERE held_until IS NOT NULL"
INSERT_META = f"""\
INSERT INTO meta (singleton, version, last_id)
SELECT 1, {SCHEMA_VERSION}, 0 WHERE NOT EXISTS (SELECT 1 FROM meta)"""
SCHEMA = (CREATE_META, CREATE_MESSAGES, CREATE_READY_INDEX, CREATE_HELD_INDEX, INSERT_META)
SELECT_VERSION = "SELECT version FROM meta"
SELECT_OBJECTS = "SELECT type, name, tbl_name, sql FROM sqlite_master"
SELECT_MAGIC = "SELECT value FROM meta WHERE key = 'magic'"  # of databases of the SimpleBroker package on PyPI

# The last id ever given out is the greater of meta.last_id and the highest id in the table, so that a
# write touches no page of meta. Whoever removes the highest message notes it first (RECORD_NEWEST).
_LAST_ID = "max(last_id, coalesce((SELECT max(id) FROM messages), 0))"
SELECT_LAST_ID = f"SELECT {_LAST_ID} FROM meta"
RECORD_NEWEST = f"UPDATE meta SET last_id = {_LAST_ID}"
RECORD_LAST_ID = "UPDATE meta SET last_id = max(last_id, ?)"
# Gives out the second id if the first is still the last one; else NULL violates the constraint (IntegrityError).
ADVANCE_LAST_ID = f"UPDATE meta SET last_id = CASE WHEN {_LAST_ID} = ? THEN ? END"

# Takes the next id by itself, from the time now or the last id; cursor.lastrowid tells it. INSERT_READY is for those
# that follow, HOLD_WRITTEN for a delay: held_until as a parameter would cost each row a fifth more, for both indexes.
# INSERT_MESSAGE is for runners that have nothing like lastrowid, INSERT_LOADED for a dump.
INSERT_NEXT = f"INSERT INTO messages (id, queue, body) VALUES ((SELECT max(?, 1 + {_LAST_ID}) FROM meta), ?, ?)"
INSERT_READY = "INSERT INTO messages (id, queue, body) VALUES (?, ?, ?)"
HOLD_WRITTEN = "UPDATE messages SET held_until = ? WHERE id >= ? AND id < ?"
INSERT_MESSAGE = "INSERT INTO messages (id, queue, body, held_until) VALUES (?, ?, ?, ?)"
INSERT_LOADED = "INSERT INTO messages (id, queue, body, held_until, attempt, reason) VALUES (?, ?, ?, ?, ?, ?)"

PROMOTE_DUE = """\
UPDATE messages SET held_until = NULL WHERE id IN (SELECT id FROM messages
    WHERE queue = ? AND held_until <= ? AND +id > ? AND +id < ? ORDER BY held_until, id LIMIT ?)"""
SELECT_DUE = "SELECT EXISTS (SELECT 1 FROM messages WHERE queue = ? AND held_until <= ? AND +id > ? AND +id < ?)"
# The last two columns: the highest id of all, and whether something held in the queue has become due.
SELECT_READY = """\
SELECT id, body, attempt, reason, (SELECT max(id) FROM messages),
    EXISTS (SELECT 1 FROM messages WHERE queue = ? AND held_until <= ?)
FROM messages WHERE queue = ? AND held_until IS NULL AND id > ? AND id < ? ORDER BY id LIMIT ?"""
DELETE_READY = "DELETE FROM messages WHERE queue = ? AND held_until IS NULL AND id > ? AND id < ?"
DELETE_HELD = "DELETE FROM messages WHERE queue = ? AND held_until IS NOT NULL AND +id > ? AND +id < ?"
DELETE_ALL = "DELETE FROM messages"
MOVE_READY = """\
UPDATE messages SET queue = ?, attempt = 0, lease = NULL, reason = NULL
WHERE queue = ? AND held_until IS NULL AND id > ? AND id < ?"""
LEASE_READY = """\
UPDATE messages SET held_until = ?, lease = ?, attempt = attempt + 1
WHERE queue = ? AND held_until IS NULL AND id > ? AND id < ?"""
# Two, as each state has an index of its own.
RENAME_READY = "UPDATE messages SET queue = ? WHERE queue = ? AND held_until IS NULL"
RENAME_HELD = "UPDATE messages SET queue = ? WHERE queue = ? AND held_until IS NOT NULL"

# Of one message. Whoever changes or removes a leased one has looked at its token before (SELECT_LEASE).
SELECT_LEASE = "SELECT lease, (SELECT max(id) FROM messages) FROM messages WHERE id = ?"
DELETE_MESSAGE = "DELETE FROM messages WHERE id = ?"
EXTEND_LEASE = "UPDATE messages SET held_until = ? WHERE id = ? AND lease = ?"
RELEASE_MESSAGE = "UPDATE messages SET held_until = ?, lease = NULL, reason = coalesce(?, reason) WHERE id = ?"
# To the dead-letter queue or the next of a pipeline. NULL keeps the reason, '' forgets it.
MOVE_LEASED = """\
UPDATE messages SET queue = ?, held_until = NULL, attempt = 0, lease = NULL, reason = nullif(coalesce(?, reason), '')
WHERE id = ?"""
# Gives back what was not handed over: the lease does not count as an attempt.
UNDO_LEASE = "UPDATE messages SET held_until = NULL, lease = NULL, attempt = attempt - 1 WHERE id = ? AND lease = ?"

# Readers write nothing, so what is due but not promoted yet is read beside what is ready, as much of it as would be
# promoted. A row: id, body, attempt, reason, held_until, is it leased.
_ROW = "id, body, attempt, reason, held_until, lease IS NOT NULL"
SELECT_PAGE = f"""\
SELECT {_ROW} FROM messages WHERE queue = ? AND held_until IS NULL AND id > ? AND id < ? ORDER BY id LIMIT ?"""
SELECT_PEEK = f"""\
SELECT * FROM ({SELECT_PAGE}) AS ready
UNION ALL
SELECT * FROM (SELECT {_ROW} FROM messages
    WHERE queue = ? AND held_until <= ? AND +id > ? AND +id < ? ORDER BY held_until, id LIMIT ?) AS due
ORDER BY 1 LIMIT ?"""
SELECT_ANY = f"SELECT {_ROW} FROM messages WHERE queue = ? AND id > ? AND id < ? ORDER BY id LIMIT 1"
SELECT_HELD_IDS = """\
SELECT id FROM messages WHERE queue = ? AND held_until <= ? AND +id > ? AND +id < ? ORDER BY +id LIMIT ?"""
HELD_IDS_AT_ONCE, ROWS_AT_ONCE = 100_000, 8
SELECT_BY_IDS = f"SELECT {_ROW} FROM messages WHERE id IN ({', '.join('?' * ROWS_AT_ONCE)}) AND +queue = ? ORDER BY id"
# Is something ready, and when does the next held message become so?
SELECT_PENDING = """\
SELECT EXISTS (SELECT 1 FROM messages WHERE queue = ? AND held_until IS NULL AND id > ? AND id < ?)
    OR EXISTS (SELECT 1 FROM messages WHERE queue = ? AND held_until <= ? AND +id > ? AND +id < ?),
    (SELECT min(held_until) FROM messages WHERE queue = ? AND held_until > ?)"""
# Is nothing ready, leased or waiting for its next attempt?
SELECT_DRAINED = """\
SELECT NOT EXISTS (SELECT 1 FROM messages WHERE queue = ? AND held_until IS NULL AND id > ?)
    AND NOT EXISTS (SELECT 1 FROM messages WHERE queue = ? AND held_until IS NOT NULL AND +id > ?
        AND (held_until <= ? OR lease IS NOT NULL OR attempt > 0))"""
SELECT_COUNT = """\
SELECT (SELECT count(*) FROM messages WHERE queue = ? AND held_until IS NULL)
     + (SELECT count(*) FROM messages WHERE queue = ? AND held_until <= ?)"""
# Of every state, between two ids.
SELECT_STORED = """\
SELECT (SELECT count(*) FROM messages WHERE queue = ? AND held_until IS NULL AND id > ? AND id < ?)
     + (SELECT count(*) FROM messages WHERE queue = ? AND held_until IS NOT NULL AND +id > ? AND +id < ?)"""
SELECT_ALL_COUNT = "SELECT count(*) FROM messages"
_EACH_STATE = """\
SELECT queue, count(*) AS ready, 0 AS leased, 0 AS delayed, min(id) AS oldest
    FROM messages WHERE held_until IS NULL {which} GROUP BY queue
    UNION ALL
    SELECT queue, sum(held_until <= :now), sum(held_until > :now AND lease IS NOT NULL),
        sum(held_until > :now AND lease IS NULL), min(CASE WHEN held_until <= :now THEN id END)
    FROM messages WHERE held_until IS NOT NULL {which} GROUP BY queue"""
SELECT_QUEUES = f"""\
SELECT queue, sum(ready), sum(leased), sum(delayed), min(oldest)
FROM ({_EACH_STATE.format(which="")}) AS each_state GROUP BY queue ORDER BY queue"""
SELECT_STATS = f"""\
SELECT coalesce(sum(ready), 0), coalesce(sum(leased), 0), coalesce(sum(delayed), 0), min(oldest)
FROM ({_EACH_STATE.format(which="AND queue = :queue")}) AS each_state"""
SELECT_DATA_VERSION = "PRAGMA data_version"
SELECT_PAGES = "PRAGMA page_count"
SELECT_PAGE_SIZE = "PRAGMA page_size"
VACUUM = "VACUUM"
TRUNCATE_WAL = "PRAGMA wal_checkpoint(TRUNCATE)"

# What may make a message deliverable, now or at a time: a commit with one of these notifies the watchers. (Not the end
# of a lease, for which they look every second.)
NOTIFYING = frozenset([INSERT_NEXT, INSERT_MESSAGE, INSERT_LOADED, MOVE_READY, RENAME_READY, RENAME_HELD])
NOTIFYING |= {MOVE_LEASED, RELEASE_MESSAGE, UNDO_LEASE}

# ---------------------------------------------------------------------------------------------------
# Ids and times: ids, and the times and durations that people write.
# ---------------------------------------------------------------------------------------------------


class TimestampGenerator:
    """Gives out ids beside those of messages.

    The next id is ``max(now & ~0xFFF, last + 1)``: it follows the clock, never goes back when the clock
    does, and never waits for it. ``clock`` returns nanoseconds since 1970; None: that of the runner.
    """

    def __init__(self, runner: SQLRunner, clock: Callable[[], int] | None = None) -> None:
        self._runner, self._clock = runner, clock or runner.clock

    def generate(self) -> int:
        """Return the next id and record it, in the caller's transaction if one is open.

        One conditional statement does both, so it is atomic outside a transaction too.
        """
        while True:
            last = self._runner.run(SELECT_LAST_ID, fetch=True)[0][0]
            id = next_id(self._clock(), last)
            try:
                self._runner.run(ADVANCE_LAST_ID, (last, id))
                return id
            except sqlite3.IntegrityError:  # someone else was between the two: look again
                continue


def next_id(now: int, last: int, count: int = 1) -> int:
    """The first of ``count`` consecutive ids above ``last``, at a time."""
    first = max(now & ~ID_COUNTER_MASK, last + 1)
    if first + count > MAX_ID:
        raise OperationalError(f"no ids are left after {last}: dump the messages and load them with new ids")
    return first


def check_id(value: int | str, name: str = "message_id") -> int:
    """An id from an int or a string of 19 digits.

    >>> check_id("1837025672140161024")
    1837025672140161024
    """
    if isinstance(value, str):
        if not (len(value) == ID_DIGITS and value.isascii() and value.isdigit()):
            raise ValueError(f"{name} {shown(value)} is not an id: give an int or {ID_DIGITS} digits")
        value = int(value)
    elif not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is an int or a string of {ID_DIGITS} digits, not {type(value).__name__}")
    if not 0 <= value < 2**63:
        raise ValueError(f"{name} {shown(value)} is not an integer from 0 that fits in 63 bits")
    return value


def id_range(message_id: Id = None, after: Id = None, before: Id = None) -> tuple[int, int]:
    """The strict bounds that three filters mean together; None does not limit."""
    low = 0 if after is None else check_id(after, "after")
    high = MAX_ID + 1 if before is None else min(MAX_ID + 1, check_id(before, "before"))
    if message_id is not None:
        wanted = check_id(message_id)
        low, high = max(low, wanted - 1), min(high, wanted + 1)
    return low, high


def to_ns(seconds: float, name: str = "delay") -> int:
    """Seconds as nanoseconds; refuses negative ones, and more than a century."""
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        raise TypeError(f"{name} is a number of seconds, not {type(seconds).__name__}")
    if not 0 <= seconds <= 100 * 366 * 86400:  # refuses nan and infinity too
        raise ValueError(f"{name} {shown(seconds)} must be from 0 seconds to 100 years")
    return int(seconds * NS)


def datetime_to_ns(moment: datetime) -> int:
    """An aware datetime as nanoseconds since 1970, exactly (floats would lose the last digits)."""
    from datetime import datetime, timedelta, timezone

    if not isinstance(moment, datetime):
        raise TypeError(f"a time is an aware datetime or nanoseconds since 1970, not {type(moment).__name__}")
    if moment.tzinfo is None:
        raise ValueError(f"{moment.isoformat()} has no time zone: add tzinfo=timezone.utc or another one")
    ns = (moment - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1) * 1000
    if ns >= 2**63:
        raise ValueError(f"{moment.isoformat()} is later than 63 bits of nanoseconds since 1970 can tell (2262)")
    return ns


def due_time(delay: float | None, until: datetime | int | None) -> Callable[[int], int | None]:
    """Check a delay or a time; return what gives, at a time now, when a message becomes ready (None: at once)."""
    if delay is not None and until is not None:
        raise ValueError("give delay or until, not both")
    if until is not None:
        due = check_id(until, "until") if isinstance(until, int) else datetime_to_ns(until)
        return lambda now: due if due > now else None
    wait = 0 if delay is None else to_ns(delay)
    return lambda now: now + wait if wait else None


_DURATION_UNITS_S = {"": 1, "ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_TIME_UNITS_NS = {"s": NS, "ms": 1_000_000, "us": 1_000, "ns": 1}


def parse_duration(text: str) -> float:
    """Seconds from '90', '90s', '5m', '2h', '1d', '250ms'; fractions are allowed.

    >>> [parse_duration(t) for t in ("90", "1.5m", "250ms")]
    [90.0, 90.0, 0.25]
    """
    import re

    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)(ms|s|m|h|d|)", text, re.ASCII)
    if not match:
        raise ValueError(f"{shown(text)} is not a duration: write 90, 90s, 5m, 2h, 1d or 250ms")
    seconds = float(match[1]) * _DURATION_UNITS_S[match[2]]
    to_ns(seconds, "duration")
    return seconds


def parse_timestamp(text: str) -> int:
    """Nanoseconds since 1970 from an id, an ISO 8601 date or datetime, or Unix time.

    Unix time has a suffix (s, ms, us, ns) or its unit is told by its size. No zone means UTC.

    >>> parse_timestamp("2024-01-15") == parse_timestamp("1705276800s") == parse_timestamp("1705276800000")
    True
    """
    import re
    from decimal import Decimal

    number = re.fullmatch(r"0*(\d{1,20})(\.\d{1,9})?(ns|us|ms|s|)", text, re.ASCII)
    if number:
        digits = len(number[1])
        unit = number[3] or ("s" if digits <= 11 else "ms" if digits <= 14 else "us" if digits <= 17 else "ns")
        ns = int(Decimal(number[1] + (number[2] or "")) * _TIME_UNITS_NS[unit])
    else:
        ns = datetime_to_ns(_parse_iso(text))
    if not 0 <= ns < 2**63:
        raise ValueError(f"{shown(text)} is outside the times that ids can have (1970 to 2262)")
    return ns


def _parse_iso(text: str) -> datetime:
    import re
    from datetime import datetime

    # Python 3.9 takes fewer forms than later ones; take the same everywhere.
    form = r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(:\d\d)?(\.\d{1,6})?(Z|[+-]\d\d:?\d\d)?)?"
    match = re.fullmatch(form, text, re.ASCII | re.IGNORECASE)
    try:
        day, minute, second, fraction, zone = match.groups("")  # type: ignore[union-attr]
        offset = "+00:00" if zone in "Zz" else zone[:3] + ":" + zone[-2:]
        fraction = (fraction or ".").ljust(7, "0")
        return datetime.fromisoformat(f"{day}T{minute or '00:00'}{second or ':00'}{fraction}{offset}")
    except (AttributeError, ValueError):  # another form, or no such day
        raise ValueError(
            f"{shown(text)} is not a time: give a {ID_DIGITS}-digit id, 2024-01-15, 2024-01-15T10:30:00Z, or Unix"
            " time such as 1705314600, 1705314600s or 1705314600000ms"
        ) from None


# ---------------------------------------------------------------------------------------------------
# Paths: where the database is, that it stays where it was put, and which file a path names now.
# ---------------------------------------------------------------------------------------------------


def database_path(settings: Settings, directory: StrPath | None = None, file: StrPath | None = None) -> str:
    """The absolute path of the database that these options mean, or its URL. Opens and makes nothing.

    An absolute file stands for itself. A relative one stays inside the directory, symbolic links
    resolved. Neither given: the nearest one upwards in project scope, else BROKER_DEFAULT_DB_LOCATION,
    else the current directory.
    """
    name = settings.db_name if file is None else _clean_path(file)
    if url_scheme(name):
        return name
    if directory is not None:
        base = _clean_path(directory)
    elif os.path.isabs(name):
        return os.path.realpath(name)
    elif file is None and settings.project_scope:
        base = _nearest(name)
    else:
        base = settings.db_location if file is None and settings.db_location else os.getcwd()
    if not os.path.isdir(base):
        raise UsageError(f"the directory {base!r} does not exist: create it first")
    if ".." in name.replace("\\", "/").split("/"):
        raise UsageError(f"the file {name!r} must not contain '..': use an absolute path")
    root = os.path.realpath(base)
    full = os.path.realpath(os.path.join(root, name))
    if not full.startswith(root.rstrip(os.sep) + os.sep):
        raise UsageError(f"the file {name!r} leads out of {root!r}, to {full!r}: use an absolute path alone")
    return full


def api_path(settings: Settings, path: StrPath | None) -> str:
    """The absolute path that ``db_path`` of the Python API means: any file, a URL, or None for the default."""
    if path is None:
        return database_path(settings)
    text = _clean_path(path)
    return text if url_scheme(text) else os.path.realpath(text)


def _clean_path(path: StrPath) -> str:
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError("a database path is a str or a path of str")
    if not text or has_controls(text):
        raise UsageError(f"the path {shown(text)} is empty or has control characters")
    if text == ":memory:":
        raise UsageError("':memory:' is not a file: a queue is shared through one (or pass your own runner)")
    return text


def _nearest(name: str) -> str:
    """Project scope: this directory, or the nearest one above it, that has a database of that name."""
    start = here = os.getcwd()
    while not os.path.isfile(os.path.join(here, name)):
        parent = os.path.dirname(here)
        if parent == here or os.path.ismount(here):
            raise UsageError(f"no {name!r} in {start!r} or above it: run 'broker init' where it shall be")
        here = parent
    return here


def file_identity(path: str) -> tuple[int, int] | None:
    """Device and inode of the file that a path names; None if there is none. OperationalError if that is unknown.

    Of a link they are its own: whoever moved the file and left a link there moved it away from its log.
    """
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OperationalError(f"cannot look at {path!r}: {error.strerror}") from error
    return found.st_dev, found.st_ino


def remove_file(path: str) -> None:
    """Remove a file, unless there is none: someone else may just have removed it."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def make_directory_of(path: str) -> None:
    """Make the directory of a compound name such as .queue/broker.db, unless it is there."""
    directory = os.path.dirname(path)
    try:
        os.makedirs(directory, 0o700, exist_ok=True)
    except OSError as error:
        raise OperationalError(f"the directory {directory!r} cannot be made: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------
# Writer lock: writers of all processes take turns here instead of sleeping in SQLite's busy handler. A holder has it
# for some tens of microseconds and then leaves to sync, so it is enough to try again and again. The file beside the
# database is never deleted but by --cleanup. It also is what watchers are notified by.
# ---------------------------------------------------------------------------------------------------

LOCK_SUFFIX = ".lock"
LOCK_PAUSE_US = (50, 800)  # between two tries, at random; a pause that grows makes the longest waits longer
LOCK_LONG_S = 0.003  # who had the lock for longer than this ...
LOCK_AWAY_S = 0.001  # ... stays away for so long, so that others find it free
LOCK_CHECK_S = 0.1  # how often the file is compared with its path
STOPPED_S = 0.5  # who did not run for so long has been stopped


class WriterLock:
    """The advisory lock on DATABASE.lock: one holder among all processes. Not for two threads at once.

    The kernel releases the lock of a killed holder. A stopped holder makes acquire() raise OperationalError at
    its deadline. Where files cannot be locked SQLite's own locking has to be enough: correct, only slower.
    """

    _fd: int | None = None  # here, as __del__ can meet one that an interrupt has left half made

    def __init__(self, database: StrPath) -> None:
        self.path = os.fspath(database) + LOCK_SUFFIX
        self.usable = fcntl is not None  # files can be locked here
        # Monotonic times: it was taken, it is left to others until, its file was compared with the path.
        self._taken_at = self._away_until = self._checked_at = 0.0

    def acquire(self, deadline: float, *, check: bool = False) -> None:
        """Take the lock; OperationalError at the monotonic deadline, which is put off while this process is stopped.

        ``check``: compare the file with its path in any case. Allowed while the lock is held.
        """
        looked_at = time.monotonic()
        pause_s = self._away_until - looked_at
        if pause_s > 0:
            time.sleep(min(pause_s, LOCK_AWAY_S))  # tests that freeze the clock set it back
        while self.usable:
            fd = self._open() if self._fd is None else self._fd
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                last_look_at, looked_at = looked_at, time.monotonic()
                if looked_at - last_look_at > STOPPED_S:  # by Ctrl-Z or `docker pause`: then the holder was, too
                    deadline += looked_at - last_look_at
                if looked_at >= deadline:
                    raise OperationalError(
                        f"the database is busy: another process holds {self.path!r} for longer than BROKER_BUSY_TIMEOUT"
                    ) from None
                low, high = LOCK_PAUSE_US
                time.sleep((low + time.monotonic_ns() % (high - low)) / 1e6)  # importing random costs 2 ms
                check = True  # whoever had it may have replaced the file
                continue
            except OSError:  # ENOSYS, ENOLCK, EOPNOTSUPP: no locks on this file system
                self.usable = False
                return
            self._taken_at = time.monotonic()
            if not (check or self._taken_at - self._checked_at > LOCK_CHECK_S) or self._is_current(fd):
                return
            self.close()  # someone replaced the file: two holders could each own a lock of that name

    def release(self) -> None:
        """Let the next writer in."""
        if self._fd is not None and self.usable:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            except OSError:  # what is committed stays committed
                self.close()
            now = time.monotonic()
            if now - self._taken_at > LOCK_LONG_S:
                self._away_until = now + LOCK_AWAY_S

    def notify(self) -> None:
        """Wake the watchers of all processes: one byte, after the commit and before release()."""
        if self._fd is not None:
            try:
                os.pwrite(self._fd, b"\n", 0)
            except OSError:  # a full disk: they find the commit by looking, a little later
                pass

    def close(self) -> None:
        """Close the file, which releases the lock if it was held. (In a forked child the parent still has it.)"""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:  # an operation that close() came beside has opened it again
        self.close()

    def _open(self) -> int:
        make_directory_of(self.path)
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            if os.fstat(self._fd).st_mode & 0o600 != 0o600:
                os.fchmod(self._fd, 0o600)  # the umask took bits away from the owner
        except OSError as error:
            why = f"{error.strerror}; make the directory writable"
            if os.path.islink(self.path):
                why = "it is a symbolic link: remove it"
            raise OperationalError(f"cannot open the lock file {self.path!r}: {why}") from error
        return self._fd

    def _is_current(self, fd: int) -> bool:
        self._checked_at = time.monotonic()
        mine = os.fstat(fd)
        return (mine.st_dev, mine.st_ino) == file_identity(self.path)


# ---------------------------------------------------------------------------------------------------
# Notifier: one background thread per database and process, while somebody waits. It sleeps in inotify on the lock
# file, which every commit of ours writes to, and wakes the waiters. Every half second it also compares PRAGMA
# data_version, to find commits of programs that do not. Where there is no inotify it does only that, more often.
# ---------------------------------------------------------------------------------------------------

NOTIFIER_NAME = "simplebroker-notifier"  # of its thread
NOTIFIED_LOOK_S = 0.5  # how often it looks by itself where inotify works
MAX_SLEEP_S = 1.0  # of a waiter: the clock may step past the time at which a message becomes due
MIN_SLEEP_S = 0.001  # of a waiter: its message may be due in a moment
SLICE_S = 0.1  # the longest sleep of the notifier: who joins it meanwhile does not wake it
YIELD_S = 0.0005  # after waking others, so that they and not it have the interpreter and the connection first
_ending = False  # the interpreter ends; see _end_notifiers()


class Waiter:
    """What one consumer sleeps on. ``with broker.waiter() as waiter:`` look and wait() in turn."""

    next_at = float("inf")  # it wants nothing done

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        # A lock used as a binary semaphore: unlocked means "woken". Anyone may unlock it, a signal handler
        # too (events and conditions are not safe there); only the waiter locks it.
        self._lock = threading.Lock()
        self._lock.acquire()

    def __enter__(self) -> Waiter:
        self._notifier.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._notifier.remove(self)

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until woken, a second at most; not at all if it was woken since the last wait.

        False after timeout seconds; else True: look again.
        """
        longest = MAX_SLEEP_S if self._notifier.is_running() else self._notifier.interval_s
        if timeout is None or timeout > longest:
            self._lock.acquire(timeout=longest)
            return True
        return self._lock.acquire(timeout=max(0.0, timeout))

    def wake(self) -> None:
        """Wake the waiter, now or when it next waits. Safe in signal handlers."""
        try:
            self._lock.release()
        except RuntimeError:  # it was awake already
            pass


class _Inotify:
    """Linux: sleeps until the file of a path is written. OSError or AttributeError where that is impossible."""

    EVENTS = 0x2 | 0x4 | 0x400 | 0x800  # IN_MODIFY, IN_ATTRIB (also: it was unlinked), IN_DELETE_SELF, IN_MOVE_SELF

    def __init__(self, path: str) -> None:
        import ctypes
        import select

        self._path, self._watch = path, -1
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1 failed")
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)

    def attach(self) -> bool:
        """Watch the file that the path names now, which may be another one. Is there one that can be watched?"""
        before, self._watch = self._watch, self._libc.inotify_add_watch(self.fd, os.fsencode(self._path), self.EVENTS)
        if before not in (-1, self._watch):
            self._libc.inotify_rm_watch(self.fd, before)
        return bool(self._watch >= 0)

    def sleep(self, seconds: float) -> bool:
        """Sleep until the file is written (True), or for so long."""
        return bool(self._poll.poll(seconds * 1000) and os.read(self.fd, 65536))


class Notifier:
    """Wakes the waiters of one database, and does what its clients want done from time to time.

    A client is a Waiter, or has ``next_at``, the monotonic time at which it wants its ``run()`` called.
    ``data_version()`` returns a value that changes with commits of others, None if it cannot be asked
    now. Without it, each look is a change. Only the end of the interpreter waits for the thread: it ends by
    itself, soon after the last client has gone.
    """

    def __init__(
        self, interval_s: float = 0.1, database: str = "", data_version: Callable[[], object] = object
    ) -> None:
        self.interval_s, self._database, self._data_version = interval_s, database, data_version
        self._inotify: _Inotify | None = None
        self._told = False  # inotify tells of commits
        self._seen: object = None  # the last data version
        self._look_at = 0.0  # the monotonic time of the next look at it
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        # Guards the thread and its inotify; held only to change them, by anyone.
        self._guard = threading.Lock()
        # Adding, taking and listing are one step each: a finalizer may take a client in the middle of anything.
        self._clients: dict[Any, None] = {}
        self._thread: threading.Thread | None = None

    def add(self, client: Any) -> None:
        """Serve a client until remove(). What is committed from now on wakes it.

        Where no thread can be started, a Waiter looks by itself at every interval; the next client tries again.
        """
        self.check_process()
        self._clients[client] = None
        with self._guard:
            if self._thread is None:
                self._start()

    def check_process(self) -> None:
        """In a forked child, before it has threads: begin anew, as thread and clients are the parent's."""
        if self._pid != os.getpid():
            self._close_inotify()
            self._begin_anew()

    def _start(self) -> None:
        try:
            if self._inotify is None and self._database:
                self._inotify = _Inotify(self._database + LOCK_SUFFIX)
                self._told = self._inotify.attach()
        except (ImportError, AttributeError, OSError):  # no such call, no descriptors
            pass
        try:
            self._thread = threading.Thread(target=self._serve, name=NOTIFIER_NAME, daemon=True)
            self._thread.start()
        except BaseException as error:  # an interrupt, a limit of processes, an interpreter that ends
            self._thread = None
            if not isinstance(error, RuntimeError):
                raise
            logger().warning("waiting without a notifier: %s", error)

    def remove(self, client: Any) -> None:
        """Serve it no longer."""
        if self._pid == os.getpid():
            self._clients.pop(client, None)

    def is_running(self) -> bool:
        """Does the thread run? Else waiters have to look by themselves."""
        return self._thread is not None and self._pid == os.getpid()

    def notify(self) -> None:
        """This process has committed something that may be deliverable: for where inotify does not tell."""
        if not self._told and self._clients and self._pid == os.getpid():  # else they are the parent's
            self._wake_waiters()

    def _close_inotify(self) -> None:
        inotify, self._inotify, self._told = self._inotify, None, False
        if inotify is not None:
            os.close(inotify.fd)

    def _serve(self) -> None:
        failing: set[Any] = set()
        while self._is_needed():
            if not self._attempt(self, failing):
                self._wake_waiters()  # they look by themselves
                time.sleep(SLICE_S)
            clients = list(self._clients)
            failing.intersection_update((self, *clients))
            for client in clients:
                if client.next_at <= time.monotonic():
                    self._attempt(client, failing)

    def _attempt(self, client: Any, failing: set[Any]) -> bool:
        """Call run() of a client, or of this notifier; False if it failed, which is logged once, and tried again."""
        try:
            client.run()
            failing.discard(client)
            return True
        except Exception as error:  # noqa: BLE001 - of a system call, of the database, or of a closed queue
            if client not in failing:
                logger().warning("the notifier failed, trying again: %s", error)
            failing.add(client)
            return False

    def run(self) -> None:
        """Sleep, and wake the waiters if something was committed meanwhile. The thread calls this."""
        self._told = self._inotify is not None and self._inotify.attach()
        notified = self._sleep()
        if notified or time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + (NOTIFIED_LOOK_S if self._told else self.interval_s)
            version = self._data_version()  # before waking: what is committed after it is new again
            if notified or version not in (None, self._seen):
                self._seen = version or self._seen
                self._wake_waiters()
                time.sleep(YIELD_S)

    def _is_needed(self) -> bool:
        with self._guard:
            if self._thread is not threading.current_thread():  # add() was interrupted when this had started
                return False
            if self._clients and not _ending:
                return True
            self._close_inotify()
            self._thread = None
            return False

    def _sleep(self) -> bool:
        """Sleep until something is written (True) or wants to be done, but not for long: clients come and go."""
        next_at = min((client.next_at for client in list(self._clients)), default=0.0)
        pause = max(0.0, min(SLICE_S, self.interval_s, next_at - time.monotonic()))
        if self._told and self._inotify is not None:
            return self._inotify.sleep(pause)
        time.sleep(pause)
        return False

    def _wake_waiters(self) -> None:
        for client in list(self._clients):
            if isinstance(client, Waiter):
                client.wake()


def _end_notifiers() -> None:
    """Before the interpreter ends: it freezes daemon threads wherever they are, also with a lock held."""
    global _ending
    _ending = True
    for thread in threading.enumerate():
        if thread.name == NOTIFIER_NAME:
            thread.join(1.0)


atexit.register(_end_notifiers)


# ---------------------------------------------------------------------------------------------------
# Runners: the only code that talks to a database. The way of one message:
#
#   Queue.write -> SQLRunner.write -> SQLiteRunner.transact(function)      (all others: Broker.transact -> ...)
#       the mutex (threads of this process), or a place in the commit queue behind who has it
#       the lock file (processes)
#       BEGIN IMMEDIATE, function(run), COMMIT with synchronous=NORMAL
#       one byte into the lock file: the notifiers of all processes wake their waiters
#       the lock file is unlocked, the mutex released: the next writer is let in
#       fdatasync of the -wal file: what was committed before it, by anyone, survives a crash of the machine
#
# The log is one sequence, so a sync that starts after a commit covers all that was committed before, and the kernel
# merges the syncs of those who wait at the same time. Whoever returns has synced after its own commit.
# ---------------------------------------------------------------------------------------------------


class SQLRunner:
    """What the broker needs of a database: subclass it to log, to inject faults, to share a connection.

    A subclass must give the five methods; the others have defaults on top of them. Raise OperationalError
    for what may work later (busy, full), IntegrityError for violated constraints. Be safe for threads if you
    are used from several, and for fork if you fork.
    """

    path = ""  # of the database file, or its URL; "": unknown
    clock: Callable[[], int] = staticmethod(time.time_ns)  # nanoseconds since 1970; a server gives its own

    def run(self, sql: str, params: Any = (), *, fetch: bool = False) -> Any:
        """Execute one statement; return its rows (a list of sequences) if fetch.

        Outside begin_immediate() the statement commits by itself.
        """
        raise NotImplementedError

    def begin_immediate(self) -> None:
        """Start a transaction that may write. Blocks until no other writer is inside."""
        raise NotImplementedError

    def commit(self) -> None:
        """End the transaction and keep its changes. If this raises, rollback() is called next."""
        raise NotImplementedError

    def rollback(self) -> None:
        """End the transaction and undo its changes."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what the runner holds. It is not used afterwards."""
        raise NotImplementedError

    # -- defaults

    def transact(self, function: Callable[[Run], T], durable: bool = True) -> T:
        """Call ``function(run)`` in a transaction, commit, and return its result. An error undoes what it did.

        ``durable=False``: a crash of the machine may undo it.
        """
        with Transaction(self) as run:
            return function(run)

    def prepare(self) -> None:
        """Before the first use: make the schema if it is not there; DatabaseError if it is of another version."""
        try:
            version = self.run(SELECT_VERSION, fetch=True)
        except sqlite3.OperationalError:  # no such table
            version = []
        if version is None:
            raise UsageError(f"{type(self).__name__}.run() returned None for fetch=True: it must return the rows")
        if version and version[0][0] != SCHEMA_VERSION:
            raise DatabaseError(f"schema version {version[0][0]} is not {SCHEMA_VERSION}, which this program knows")
        if not version:
            self.transact(lambda run: [run(statement) for statement in SCHEMA])

    def insert(self, queue: str, bodies: Sequence[str], held_until: int | None, now: int) -> list[int]:
        """Write checked bodies to a queue, inside a transaction; return their ids, which follow each other."""
        first = next_id(now, self.run(SELECT_LAST_ID, fetch=True)[0][0], len(bodies))
        for id, body in enumerate(bodies, first):
            self.run(INSERT_MESSAGE, (id, queue, body, held_until))
        return list(range(first, first + len(bodies)))

    def write(
        self, queue: str, bodies: Sequence[str], held_until: Callable[[int], int | None], clock: Callable[[], int]
    ) -> list[int]:
        """insert() in a transaction, or in that of this thread; for itself, so that a server needs one round trip."""

        def insert(run: Run) -> list[int]:
            now = clock()
            return self.insert(queue, bodies, held_until(now), now)

        return self.transact(insert)

    def snapshot(self) -> Any:
        """``with runner.snapshot() as run:`` reads one state of the database. By default a transaction."""
        return Transaction(self)

    def depth(self) -> int:
        """In how many nested transactions this thread is; -1: unknown."""
        return -1

    def is_busy(self) -> bool:
        """Is this thread in the middle of an operation here? Then a finalizer, which can run anywhere, must wait."""
        return False

    @property
    def notifier(self) -> Notifier:
        """What wakes the waiters of this process. By default they look by themselves, ten times a second."""
        notifier: Notifier = self.__dict__.get("_notifier") or self.__dict__.setdefault("_notifier", Notifier())
        return notifier  # made here, as subclasses need not call an __init__ of ours

    def vacuum(self) -> None:
        """Give unused space back."""
        self.run(VACUUM)

    def delete(self) -> bool:
        """Delete the database; False if there is none."""
        raise UsageError("the database of a custom runner is not ours to delete")


class Transaction:
    """``with Transaction(runner) as run:`` commits at the end; rolls back and re-raises on an error."""

    def __init__(self, runner: SQLRunner) -> None:
        self._runner, self._depth = runner, 0

    def __enter__(self) -> Run:
        self._depth = self._runner.depth()
        try:
            self._runner.begin_immediate()
            return self._runner.run
        except BaseException as error:
            if not isinstance(error, Exception) or self._depth >= 0:  # an interrupt, perhaps when it had begun
                self._undo()
            raise

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if error is None:
                self._runner.commit()
            else:
                self._undo()
        except BaseException:
            self._undo()
            raise

    def _undo(self) -> None:
        """Roll back after an error, which is the one to report, what has not ended of the transaction.

        (An interrupt can come after its end. To roll back then would end the one around it, and what follows there
        would be committed alone. It can also leave nested ones open.)
        """
        depth = self._runner.depth()
        try:
            for _ in range(depth - self._depth if depth >= 0 else 1):
                self._runner.rollback()
        except Exception as error:  # noqa: BLE001 - whatever a runner raises
            logger().warning("rollback failed too: %s", error)
            if self._runner.depth() > self._depth:  # a signal handler raised it before anything was rolled back
                self._undo()


def acquire_by(lock: Any, deadline: float) -> bool:
    """Acquire a lock; False at the monotonic deadline, which is put off while this process is stopped."""
    looked_at = time.monotonic()
    while not lock.acquire(timeout=max(0.0, min(STOPPED_S, deadline - looked_at))):
        last_look_at, looked_at = looked_at, time.monotonic()
        if looked_at - last_look_at > 2 * STOPPED_S:
            deadline += looked_at - last_look_at
        if looked_at >= deadline:
            return False
    return True


# What SQLite's messages mean here; the first that matches.
_MEANINGS = (
    ("locked", "the database is busy: waited for BROKER_BUSY_TIMEOUT"),
    ("is full", "the disk is full: nothing was changed; free some space and try again"),
    ("readonly", "the database cannot be written: make the file and its directory writable"),
    ("disk I/O", "the file cannot be read or written, perhaps at a limit of its size: nothing was changed"),
    ("open database", "the database cannot be opened: check that you may read and write it and its directory"),
)
TIMEOUT_SLACK_S = 0.05  # a wait that is shorter than this leaves SQLite's busy timeout as it is
REOPEN_S = 0.1  # for so long a file is tried to open again, as someone may just make or delete it
_as_text = partial(str, encoding="utf-8", errors="replace")  # rows of other programs need not be UTF-8


class _Log(int):
    """A descriptor of the -wal file. Who syncs keeps a reference, so that it stays open while the runner closes.

    (Closing it drops none of SQLite's locks: those are on the database and the -shm file.)
    """

    def __del__(self) -> None:
        os.close(self)


class _Request:
    """What one thread wants done in a transaction, and what came of it."""

    __slots__ = ("done", "durable", "error", "function", "result", "thread", "wake")

    def __init__(self, function: Callable[[Run], Any], durable: bool) -> None:
        self.function, self.durable, self.thread = function, durable, threading.get_ident()
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.wake = threading.Lock()  # its thread sleeps on it until it is done, or first in the commit queue
        self.wake.acquire()

    def rouse(self) -> None:
        """Wake its thread, unless it is awake."""
        try:
            self.wake.release()
        except RuntimeError:
            pass


class SQLiteRunner(SQLRunner):
    """The runner for SQLite files: one connection, for all threads of the process.

    ``path`` is made by the first write; until then, reading finds nothing. The file is the one that the
    path names at that moment: when it is deleted or replaced, the next call opens the new one. (Links are
    resolved once, when the runner is made.)
    Transactions of one thread nest (savepoints). After fork, parent and child have connections of their own.
    """

    def __init__(
        self, path: StrPath, settings: Settings | None = None, *, clock: Callable[[], int] = time.time_ns
    ) -> None:
        self.settings = settings = settings or Settings.from_environment()
        self.path = api_path(settings, path)
        self.clock = clock
        self._timeout_s = settings.busy_timeout_ms / 1000
        self._syncs = settings.sync_mode == "FULL" and hasattr(os, "fdatasync")
        self._lock = WriterLock(self.path)
        self._notifier = Notifier(settings.max_interval_s, self.path, self._data_version)
        self._connection: sqlite3.Connection | None = None
        self._log: _Log | None = None
        self._begin_anew()
        _runners[weakref.ref(self, _runners.pop)] = None

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        # Guards the connection, the writer lock and the fields below. A thread that is in a transaction holds it from
        # begin_immediate() to commit() or rollback(). Re-entrant only so that _reset() can tell whose it is.
        self._mutex: Any = threading.RLock()  # (type checkers do not know of its _is_owned())
        self._identity: tuple[int, int] | None = None  # of the file that the connection has open; None: no file
        self._opened = 0  # counts the connections: a data version means something within one only
        self._writable = False  # the connection has been prepared for writing
        self._depth = self._owner = 0  # nested transactions, and the thread that is in them. May be read by anyone.
        self._notify = False  # the transaction has made something deliverable
        self._changes = 0  # total_changes of the connection when the transaction began
        self._forking = 0  # the thread that holds the mutex because it forks
        self._short_timeout = False  # SQLite's own busy timeout is shortened, by _share_timeout() or vacuum()
        self._hole = False  # a sync failed: the log may have a hole on the disk
        self._busy: set[int] = set()  # threads that stand in the queue, or lead; each adds and discards itself
        # The commit queue: threads that found the mutex taken. The first is the leader, and waits for the mutex.
        # Guards the list; held only to change it, by anyone. Re-entrant only so that _reset() can tell whose it is.
        self._queue_guard: Any = threading.RLock()
        self._queue: list[_Request] = []  # may be looked at without the guard

    # -- transactions

    def transact(self, function: Callable[[Run], T], durable: bool = True) -> T:
        """See SQLRunner. Threads that call this at the same time share a transaction, and so its sync.

        An error undoes what this function did, and nothing of the others. Blocks up to BROKER_BUSY_TIMEOUT,
        then OperationalError. NotSynced if it is committed but the disk failed to sync.
        """
        if self._enters_nested():
            return super().transact(function)
        request = _Request(function, durable)
        self._or_reset(self._stand_in_line, request)
        if request.error is not None:
            raise request.error
        result: T = request.result
        return result

    # The commit queue: who comes first leads. It begins a transaction, takes all who stand in the queue by then, calls
    # their functions one after the other (each in a savepoint), commits and syncs once, and wakes them. Who is first in
    # the queue after that leads the next. Who waits for longer than the timeout leaves the queue, unless it is served.

    def _stand_in_line(self, request: _Request) -> None:
        """Return when a request is done, by this thread or by another."""
        deadline = time.monotonic() + self._timeout_s
        try:
            self._busy.add(request.thread)
            with self._queue_guard:
                self._queue.append(request)
                leads = len(self._queue) == 1
            if leads or not self._wait_in_line(request, deadline):
                self._lead(request, deadline)
        finally:
            if self._queue:  # it may have given up
                self._leave_line(request)
            self._busy.discard(request.thread)

    def _wait_in_line(self, request: _Request, deadline: float) -> bool:
        """Sleep until the request is done (True) or is the first. OperationalError at the deadline."""
        if not acquire_by(request.wake, deadline):
            if self._leave_line(request):
                raise OperationalError("the database is busy: other threads write for longer than BROKER_BUSY_TIMEOUT")
            request.wake.acquire()  # it is being done
        return request.done

    def _lead(self, request: _Request, deadline: float) -> None:
        """Begin a transaction, and do the work of all who have come meanwhile."""
        batch: list[_Request] = []
        try:
            self._begin(deadline)
            # The main thread does only its own: interrupts come there, and would leave open what became of the others.
            shares = len(self._queue) > 1 and threading.current_thread() is not threading.main_thread()
            batch = self._leave_line(None if shares else request)
            self._perform(batch)
        finally:
            for each in batch:
                if not each.done:
                    each.error = OperationalError("the thread that did the work of several was ended from outside")
                each.done = True
                each.rouse()

    def _leave_line(self, request: _Request | None = None) -> list[_Request]:
        """Take this request (if it is still there), or all, out of the commit queue; the first afterwards leads."""
        taken: list[_Request] = []
        with self._queue_guard:
            if request is None:
                taken, self._queue = self._queue, []
            elif request in self._queue:
                self._queue.remove(request)  # (in a comprehension CPython 3.12.1 keeps a lock after an interrupt)
                taken = [request]
            if self._queue:
                self._queue[0].rouse()
        return taken

    def _perform(self, requests: list[_Request]) -> None:
        """Do what is asked, commit, let the next writer in, and sync. Errors are kept in the requests."""
        failure, durable = None, False
        try:
            for request in requests:
                if len(requests) == 1:
                    request.result = request.function(self.run)
                else:
                    self._call_one_of_several(request)
                durable = durable or request.durable
            failure = self._commit(durable)
        except Exception as error:
            if not self._is_inside():  # a signal handler raised it after the commit
                raise
            self._roll_back()
            for request in requests:
                request.error = request.error or (error if len(requests) == 1 else OperationalError(str(error)))
        for request in requests:
            if failure is not None and request.durable and request.error is None:
                request.error = NotSynced(failure, request.result)
            request.done = True

    def _call_one_of_several(self, request: _Request) -> None:
        """Its error is its own: it undoes nothing of the others, unless SQLite rolled back everything."""
        try:
            request.result = super().transact(request.function)  # in a savepoint
        except BaseException as error:  # noqa: BLE001 - an exit, too, is for the thread that asked
            request.error = error

    def begin_immediate(self) -> None:
        """Start a transaction, or a nested one. Blocks up to BROKER_BUSY_TIMEOUT, then OperationalError."""
        if self._enters_nested():
            self._run_inside("SAVEPOINT nested")
            self._depth += 1
        else:
            self._or_reset(self._begin, time.monotonic() + self._timeout_s)

    def _enters_nested(self) -> bool:
        """Is the transaction that this thread begins inside another one of its own?"""
        self._check_process()
        if self._is_inside():
            return True
        if self.is_busy():
            raise OperationalError("a signal handler cannot write in the middle of another operation of its thread")
        return False

    def commit(self) -> None:
        """Commit the innermost transaction; the outermost lets the next writer in and syncs."""
        self._check_process()
        if self.depth() > 1:
            self._run_inside("RELEASE nested")
            self._depth -= 1
            return
        failure = self._or_reset(self._commit, True)
        if failure is not None:
            raise NotSynced(failure)

    def rollback(self) -> None:
        """Undo the innermost transaction; nothing without one."""
        self._check_process()
        depth = self.depth() - 1
        if depth == 0:
            self._or_reset(self._roll_back)
        elif depth > 0:
            try:
                if self._connection is not None and self._connection.in_transaction:
                    self._execute("ROLLBACK TO nested")
                    self._execute("RELEASE nested")
            except BaseException as error:  # nobody knows what is left of it: the whole transaction is gone
                self._disconnect()
                if not isinstance(error, Exception):
                    raise
            finally:
                self._depth = depth

    def depth(self) -> int:
        """In how many nested transactions this thread is."""
        return self._depth if self._is_inside() else 0

    def is_busy(self) -> bool:
        """See SQLRunner. (In its own transaction it is not.) Who reads holds the mutex, for which a leader may wait."""
        return threading.get_ident() in self._busy or (self._mutex._is_owned() and not self._is_inside())

    def _is_inside(self) -> bool:
        return self._owner == threading.get_ident()

    def _take_mutex(self, deadline: float) -> None:
        """OperationalError at the deadline."""
        if not self._mutex.acquire(blocking=False) and not acquire_by(self._mutex, deadline):
            raise OperationalError(
                f"the database is busy: another thread is in a transaction on {self.path!r} for longer than"
                " BROKER_BUSY_TIMEOUT"
            )

    def _begin(self, deadline: float) -> None:
        """Take the mutex and the writer lock, and begin. OperationalError at the deadline, with nothing held."""
        self._take_mutex(deadline)
        try:
            if self._connection is None:
                self._use_current_file()  # refuses a foreign file before a lock file is put beside it
            self._lock.acquire(deadline)
            self._use_current_file(deadline)
            self._share_timeout(deadline)
            if self._hole:
                self._close_hole()
            self._execute("BEGIN IMMEDIATE")
            self._changes = self._connection.total_changes  # type: ignore[union-attr]
        except Exception:  # perhaps of a signal handler, when it had begun
            self._roll_back()
            raise
        self._notify, self._depth, self._owner = False, 1, threading.get_ident()

    def _commit(self, durable: bool) -> str | None:
        """Commit, notify, let the next writer in, and sync with nothing held. Return what is wrong with the sync."""
        self._run_inside("COMMIT")
        changed = self._connection.total_changes != self._changes  # type: ignore[union-attr]
        log = self._log if durable and changed else None
        if self._notify:
            self._lock.notify()
            self._notifier.notify()
        self._give_up_locks()
        return None if log is None else self._sync(log)

    def _roll_back(self) -> None:
        """Roll back, and let the next writer in. A connection that cannot roll back is closed, which does it."""
        try:
            if self._connection is not None and self._connection.in_transaction:
                self._execute("ROLLBACK")
        except BrokerError as error:  # the connection is of no use then; closing it rolls back
            logger().warning("rollback failed too: %s", error)
            self._disconnect()
        self._give_up_locks()

    def _give_up_locks(self) -> None:
        self._depth = self._owner = 0
        try:
            self._lock.release()
        finally:
            self._mutex.release()

    def _sync(self, log: _Log) -> str | None:
        """Sync the log, with no lock held; return what is wrong. It undoes nothing: others have built on the commit."""
        problem: object = "a sync of another thread failed"  # the kernel reports an error of a file only once
        try:
            os.fdatasync(log)
        except OSError as error:
            if error.errno is None:  # the TimeoutError of a signal handler
                raise
            self._hole, problem = True, error.strerror
        if not self._hole:
            return None
        return f"stored, but it may not survive a crash of the machine: {self.path!r}: {problem}"

    def _close_hole(self) -> None:
        """After a sync that failed the next ones succeed, though the pages of the first are not on the disk: write what
        the log has into the database, and begin a new log, before anything is called durable again."""
        if self._execute(TRUNCATE_WAL)[0][0]:
            raise OperationalError(f"{self.path!r} could not be synced, and a reader is in the way of doing it again")
        self._hole = False

    def _or_reset(self, act: Callable[..., T], *args: object) -> T:
        """Call act(), after which an interrupt, or another exception of a signal handler, leaves nothing locked."""
        in_handler = self.is_busy()  # what it is in the middle of goes on
        try:
            return act(*args)
        except BaseException as error:
            has_locks = self.is_busy() or self._mutex._is_owned() or self._queue_guard._is_owned()
            if not isinstance(error, Exception) or (has_locks and not in_handler):
                self._reset()
            raise

    def _reset(self) -> None:
        """KeyboardInterrupt and its kind can arrive between any two bytecodes, so nothing is known about the
        connection: close it (SQLite rolls back), and drop every lock that this thread has, whatever the depth."""
        self._busy.discard(threading.get_ident())
        while self._queue_guard._is_owned():  # CPython 3.9 can be interrupted between the end of "with" and __exit__()
            self._queue_guard.release()
        for request in list(self._queue):
            if request.thread == threading.get_ident():  # a second interrupt kept it in the queue
                self._leave_line(request)
        if not self._mutex.acquire(blocking=False):
            return  # another thread has the mutex, so this one holds nothing
        try:
            self._depth = self._owner = 0
            self._disconnect()
        except sqlite3.Error as second:  # PyPy's sqlite3 can be interrupted itself
            logger().warning("%s: the connection could not be closed: %s", self.path, second)
        finally:
            self._lock.release()
            self._lock.close()
            try:
                while True:
                    self._mutex.release()
            except RuntimeError:  # it is free
                pass

    def _exclusively(self, function: Callable[[float], T]) -> T:
        """Call ``function(deadline)`` with the mutex held, outside of transactions."""
        self._check_process()
        if self._is_inside():
            raise UsageError("this thread is in a transaction: do this after it")
        result: T = self._or_reset(self._with_mutex, function, time.monotonic() + self._timeout_s)
        return result

    def _with_mutex(self, function: Callable[[float], T], deadline: float) -> T:
        self._take_mutex(deadline)
        try:
            result = function(deadline)
        except Exception:  # not "finally": after an interrupt the mutex is for _reset()
            self._mutex.release()
            raise
        self._mutex.release()
        return result

    # -- statements

    def run(self, sql: str, params: Any = (), *, fetch: bool = False) -> list[Any]:
        """Execute one statement and return its rows. See SQLRunner."""
        self._check_process()
        if self._is_inside():
            if sql in NOTIFYING:
                self._notify = True
            return self._run_inside(sql, params)
        if sql[:6] not in ("SELECT", "PRAGMA"):
            return self.transact(lambda run: run(sql, params))

        def read(deadline: float) -> list[Any]:
            self._use_current_file()
            return self._execute(sql, params)

        return self._exclusively(read)

    def insert(self, queue: str, bodies: Sequence[str], held_until: int | None, now: int) -> list[int]:
        """See SQLRunner. The first row takes its id by itself, the others follow."""
        self._notify = True
        cursor = self._inside().cursor()
        self._execute(INSERT_NEXT, (now & ~ID_COUNTER_MASK, queue, bodies[0]), cursor.execute)
        first = cursor.lastrowid or 0
        if len(bodies) > 1:
            rows = ((first + number, queue, body) for number, body in enumerate(bodies) if number)
            self._execute(INSERT_READY, rows, cursor.executemany)
        if held_until is not None:
            self._run_inside(HOLD_WRITTEN, (held_until, first, first + len(bodies)))
        return list(range(first, first + len(bodies)))

    def _run_inside(self, sql: str, params: Any = ()) -> list[Any]:
        """Execute a statement of this thread's transaction."""
        return self._execute(sql, params, self._inside().execute)

    def _inside(self) -> sqlite3.Connection:
        """The connection, which is in a transaction of this thread; else OperationalError."""
        if self._owner != threading.get_ident():
            raise OperationalError("this thread has no open transaction (a forked child does not inherit one)")
        if self._connection is None or not self._connection.in_transaction:
            raise OperationalError(
                f"{self.path!r}: the transaction is gone: SQLite rolled it back after an error, such as a full disk;"
                " nothing was changed"
            )
        return self._connection

    def _execute(self, sql: str, params: Any = (), execute: Callable[..., sqlite3.Cursor] | None = None) -> list[Any]:
        """Execute a statement with a cursor of its own: a signal handler may execute another in the middle of it."""
        try:
            # fetchall() also where there are no rows: it ends the statement, and with it its snapshot.
            return (execute or self._connection.execute)(sql, params).fetchall()  # type: ignore[union-attr]
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.Error) -> BrokerError:
        text = str(error)
        if isinstance(error, sqlite3.IntegrityError):
            return IntegrityError(text)
        for words, meaning in _MEANINGS:
            if words in text:
                return OperationalError(f"{meaning} ({self.path!r}: {text})")
        if isinstance(error, sqlite3.OperationalError):
            return OperationalError(f"{self.path!r}: {text}")
        return DatabaseError(f"{self.path!r} is not a SimpleBroker database, or is damaged: {text}")

    def _share_timeout(self, deadline: float) -> None:
        """SQLite's own waiting gets what is left of the time, if that is noticeably less: there is one deadline."""
        left_s = deadline - time.monotonic()
        short = left_s < self._timeout_s - TIMEOUT_SLACK_S
        if short or self._short_timeout:
            self._execute(f"PRAGMA busy_timeout = {max(0, int((left_s if short else self._timeout_s) * 1000))}")
            self._short_timeout = short

    def _data_version(self) -> object:
        """For the notifier: changes with commits of other connections. None while another thread is inside."""
        if not self._mutex.acquire(blocking=False):
            return None
        try:
            if self._connection is None:  # closed, or not opened yet, which the waiters do
                return None
            self._use_current_file()
            return self._opened, self._execute(SELECT_DATA_VERSION)[0][0]
        finally:
            self._mutex.release()

    # -- the file

    def _use_current_file(self, deadline: float | None = None) -> None:
        """Be connected to the file that the path names now. The caller has the mutex.

        With a deadline for writing: the writer lock is held, and the file is made if it is not there.
        """
        write, identity = deadline is not None, file_identity(self.path)
        if self._connection is not None and identity == self._identity and (self._writable or not write):
            return
        if deadline is not None:
            self._lock.acquire(deadline, check=True)  # who replaced the file may have replaced the lock file too
            identity = file_identity(self.path)
        began = time.monotonic()
        while True:
            try:
                self._connect(identity, write)
                return
            except BrokerError as error:
                self._disconnect()
                before, identity = identity, file_identity(self.path)
                patience_s = REOPEN_S if isinstance(error, OperationalError) else 0.0
                if identity != before:  # it was deleted or replaced at this moment
                    patience_s = self._timeout_s
                if time.monotonic() - began >= patience_s:
                    raise
                time.sleep(MIN_SLEEP_S)

    def _connect(self, identity: tuple[int, int] | None, write: bool) -> None:
        if self._connection is None or identity is None or identity != self._identity:
            self._disconnect()
            if identity is None and write:
                self._make_file()
                identity = file_identity(self.path)
            self._opened += 1
            if identity is None or not self._open_file(write):
                # Stand in for a file that is not there, or just being made: reading finds nothing, and makes nothing.
                self._disconnect()
                self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
                for statement in SCHEMA:
                    self._execute(statement)
                return
            if identity != file_identity(self.path):
                raise OperationalError(f"{self.path!r} was replaced at this moment: try again")
            self._identity = identity
        if write:
            self._use_wal()
            self._execute(SELECT_VERSION)  # makes the log, if it was not there
            try:
                self._log = _Log(os.open(self.path + "-wal", os.O_RDONLY)) if self._syncs else None
            except OSError as error:
                raise OperationalError(f"cannot open the log of {self.path!r}: {error.strerror}") from error
            self._writable = True

    def _open_file(self, write: bool) -> bool:
        """Connect to the file; make the schema in an empty one. False: it is empty, and nobody wants to write."""
        if self.path in _refused:
            raise OperationalError(
                f"this process was forked while {self.path!r} was open, and SQLite does not survive that: open it after"
                " the fork, fork between transactions, or start processes with spawn or exec"
            )
        try:
            found = os.lstat(self.path)
        except OSError as error:
            raise OperationalError(f"cannot look at {self.path!r}, try again: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise OperationalError(f"{self.path!r} is a directory, a device, or was made a link: give a file")
        if found.st_nlink > 1:
            raise DatabaseError(f"{self.path!r} has {found.st_nlink} hard links, each with a log of its own: keep one")
        path = self.path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        uri = f"file:{path}?mode=rw" if os.sep == "/" else f"file:/{path}?mode=rw".replace("\\", "/")
        settings = self.settings
        try:
            self._connection = sqlite3.connect(
                uri, uri=True, timeout=self._timeout_s, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise self._translated(error) from error
        self._connection.text_factory = _as_text
        self._execute("PRAGMA trusted_schema = OFF")
        self._execute(f"PRAGMA synchronous = {'NORMAL' if self._syncs else settings.sync_mode}")
        self._execute(f"PRAGMA cache_size = {-1024 * settings.cache_mb}")
        self._execute(f"PRAGMA wal_autocheckpoint = {settings.wal_autocheckpoint}")
        self._execute(f"PRAGMA journal_size_limit = {4 * settings.wal_autocheckpoint * PAGE_BYTES}")
        ours = self._check(found.st_size)
        if write and not ours:
            self._make_schema()
        return ours or write

    def _check(self, size: int) -> bool:
        """True: a SimpleBroker database. False: an empty file. DatabaseError: anything else. Only reads."""
        self._execute("BEGIN")  # one state of the file, though others may just be making it
        magic = self._execute("PRAGMA application_id")[0][0]
        objects = self._execute(SELECT_OBJECTS)
        if magic != APPLICATION_ID and (magic or objects or size == 1):  # SQLite takes one byte for none
            raise self._foreign(objects)
        has_meta = ("table", "meta") in [row[:2] for row in objects]
        version = self._execute(SELECT_VERSION) if has_meta else []
        self._execute("COMMIT")  # (after an error _use_current_file() disconnects)
        if magic == 0:
            return False
        if version and version[0][0] != SCHEMA_VERSION:
            raise DatabaseError(
                f"{self.path!r} has schema version {version[0][0]}, this program knows {SCHEMA_VERSION}: dump it with"
                " the version of SimpleBroker that made it, and load that into a new file"
            )
        # Tables of others may be in the file (a transactional outbox), but nothing of theirs on ours.
        expected = {sql.split()[5]: sql.replace("IF NOT EXISTS ", "") for sql in SCHEMA[:-1]}
        present = {name: sql for _, name, table, sql in objects if name in expected or table in expected}
        if present != expected or not version:
            names = ", ".join(sorted(dict(present.items() ^ expected.items()))) or "meta is empty"
            raise DatabaseError(f"{self.path!r} was altered ({names}): restore a backup or choose another file")
        return True

    def _foreign(self, objects: list[Any]) -> DatabaseError:
        """The error for a database of another program."""
        try:
            pypi = ("table", "meta") in [row[:2] for row in objects] and self._execute(SELECT_MAGIC)
        except BrokerError:  # a table meta of someone else
            pypi = []
        if pypi and pypi[0][0] == "simplebroker-v1":
            return DatabaseError(
                f"{self.path!r} is a database of the SimpleBroker package on PyPI: pipe its 'broker dump' into our"
                " 'broker load' (see README, Coming from the SimpleBroker package on PyPI)"
            )
        return DatabaseError(f"{self.path!r} is a database of another program: choose another file")

    def _make_file(self) -> None:
        """Create the file. The caller has the writer lock."""
        make_directory_of(self.path)
        try:
            if self._lock.usable:  # else someone may already use the new file
                # SQLite would apply a -wal left by a deleted database of this name to the new file, and readers of the
                # old one would write to the new one's -shm: remove both before the new file is made.
                remove_file(self.path + "-wal")
                remove_file(self.path + "-shm")
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            os.chmod(self.path, 0o600)  # also under a umask that takes bits away from the owner
        except FileExistsError:
            pass
        except OSError as error:
            raise OperationalError(f"cannot create {self.path!r}: {error.strerror}") from error

    def _make_schema(self) -> None:
        self._execute(f"PRAGMA page_size = {PAGE_BYTES}")
        self._use_wal()
        self._execute("BEGIN IMMEDIATE")  # after an error _use_current_file() disconnects, which rolls back
        for statement in SCHEMA:
            self._execute(statement)
        self._execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._execute("COMMIT")

    def _use_wal(self) -> None:
        """See that the file has a write-ahead log; another program may have changed that."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                mode = self._execute("PRAGMA journal_mode = WAL")[0][0]
                break
            except OperationalError:  # where there are no file locks someone may just do the same: SQLite does not wait
                if time.monotonic() >= deadline:
                    raise
                time.sleep(LOCK_PAUSE_US[1] / 1e6)
        if mode != "wal":
            raise OperationalError(f"{self.path!r} stays in journal mode {mode}: close what uses it, and try again")

    def _disconnect(self) -> None:
        connection, self._connection, self._log, self._identity = self._connection, None, None, None
        self._writable = self._short_timeout = False
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Close the connection and the lock file. Waits for a transaction of another thread."""

        def close(deadline: float) -> None:
            self._disconnect()
            self._lock.close()

        self._exclusively(close)

    def delete(self) -> bool:
        """Delete the database, if it is one of ours, with all that belongs to it. False if there is none."""

        def delete(deadline: float) -> bool:
            self._use_current_file()  # refuses what is not ours
            if self._identity is None:
                return False
            try:
                self._lock.acquire(deadline, check=True)
                if not self._lock.usable:  # as on Windows, where no open file can be removed
                    self._disconnect()
                # Else the connection stays open: a reader that closed the last one just now would take the log of the
                # next file for its own, and remove it. Who waits for the lock notices that its file is gone.
                for suffix in ("", "-wal", "-shm", "-journal", LOCK_SUFFIX):
                    remove_file(self.path + suffix)
                self._disconnect()
                self._lock.close()
                return True
            except OSError as error:
                raise OperationalError(f"cannot delete {self.path!r}: {error.strerror}") from error
            finally:
                self._lock.release()

        return self._exclusively(delete)

    def vacuum(self) -> None:
        """Give unused space back to the file system. Writers wait meanwhile; it waits for no reader."""

        def vacuum(deadline: float) -> None:
            self._use_current_file()
            if self._identity is None:
                return
            try:
                self._lock.acquire(deadline)
                self._use_current_file(deadline)
                self._execute(VACUUM)
                self._short_timeout = True  # the next transaction sets it back
                self._execute("PRAGMA busy_timeout = 0")
                self._execute(TRUNCATE_WAL)
            finally:
                self._lock.release()

        self._exclusively(vacuum)

    def snapshot(self) -> _Snapshot:
        """``with runner.snapshot() as run:`` reads one state of the database, without stopping writers."""
        return _Snapshot(self.path, self.settings)

    # -- fork

    def before_fork(self) -> None:
        """Close the connection and keep other threads out: SQLite's table of locks is per process, and a child that
        inherits it would read and write without locks. Impossible during a transaction or a dump."""
        self._check_process()
        if self._owner != threading.get_ident() and self._mutex.acquire(timeout=self._timeout_s):
            self._forking = threading.get_ident()
            if not self._depth:
                self._disconnect()

    def after_fork(self) -> None:
        """In the parent: go on."""
        if self._forking == threading.get_ident():
            self._forking = 0
            self._mutex.release()

    def _check_process(self) -> None:
        """In a forked child, also of a fork that ran no hooks: leave everything to the parent, and begin anew."""
        if self._pid == os.getpid():
            return
        if self._connection is not None:
            # Freeing it, even at the end of the interpreter, would roll back the parent's transaction, in memory that
            # both share: keep a reference that nobody gives back.
            _inherited.append(self._connection)
            try:
                import ctypes

                ctypes.pythonapi.Py_IncRef(ctypes.py_object(_inherited[-1]))
            except (ImportError, AttributeError):  # PyPy frees nothing when it ends
                pass
            _refused.add(self.path)
        self._connection = self._log = None
        self._lock.close()
        self._begin_anew()
        self._notifier.check_process()


class _Snapshot(SQLiteRunner):
    """A second connection inside one read transaction."""

    def __enter__(self) -> Run:
        def begin(deadline: float) -> None:
            self._use_current_file()
            self._execute("BEGIN")
            self._depth = 1  # so that a fork does not close it

        self._exclusively(begin)  # no fork comes in the middle of a statement
        return self.run

    def _use_current_file(self, deadline: float | None = None) -> None:
        if not self._depth:  # else it stays with its file. (In a forked child it is refused, as it is the parent's.)
            super()._use_current_file(deadline)

    def __exit__(self, *_: object) -> None:
        self._depth = 0
        self.close()


_inherited: list[sqlite3.Connection] = []  # those that are the parent's
_refused: set[str] = set()  # the databases that those have open
# All of this process, for fork. A WeakSet fails when a thread adds to it, or PyPy collects, while it is listed;
# listing, adding to and taking from a dict are one step each.
_runners: dict[weakref.ref[SQLiteRunner], None] = {}
_shared: dict[tuple[Any, ...], tuple[SQLRunner, int]] = {}  # those that brokers share, and how many do
# Guards _shared; also held while a runner is made, so that there is one. Re-entrant, as a finalizer may close a queue.
_shared_guard = threading.RLock()


def share_runner(path: str, settings: Settings) -> SQLRunner:
    """The runner that all brokers of this process on the same file share, or on the same URL.

    ``scheme://...`` is opened by ``open_runner(url, settings)`` of the module simplebroker_SCHEME.
    """
    with _shared_guard:
        runner, users = _shared.get((path, settings)) or (_open_runner(path, settings), 0)
        _shared[path, settings] = runner, users + 1
        return runner


def _open_runner(path: str, settings: Settings) -> SQLRunner:
    scheme = url_scheme(path)
    if not scheme:
        return SQLiteRunner(path, settings)
    import importlib

    try:
        module = importlib.import_module(f"simplebroker_{scheme}")
    except ImportError as error:
        raise UsageError(
            f"{scheme}:// needs simplebroker_{scheme}.py, from examples/, beside your program, and what that imports"
            f' (for postgresql: pip install "psycopg[binary]"): {error}'
        ) from error
    runner: SQLRunner = module.open_runner(path, settings)
    return runner


def return_runner(path: str, settings: Settings) -> None:
    """End one use of a shared runner; the last one closes it."""
    with _shared_guard:
        runner, users = _shared[path, settings]
        if users > 1:
            _shared[path, settings] = runner, users - 1
            return
        del _shared[path, settings]
    runner.close()


def _each_runner(act: Callable[[SQLiteRunner], None]) -> None:
    done: set[weakref.ref[SQLiteRunner]] = set()
    while new := set(_runners) - done:  # others make some while before_fork() waits
        for reference in new:
            runner = reference()
            if runner is not None:
                act(runner)
        done |= new


# What is imported late. A child that is forked in the middle of an import would wait for ever for the end of it. (Not
# logging, which has hooks of its own for forks.)
_LATE_IMPORTS = ("ctypes", "datetime", "fnmatch", "heapq", "inspect", "json", "select", "signal")


def _before_fork() -> None:
    for name in _LATE_IMPORTS if _runners else ():
        try:
            __import__(name)  # waits for the thread that is just importing it
        except ImportError:  # ctypes is not everywhere
            pass
    _each_runner(SQLiteRunner.before_fork)


def _after_fork_in_child() -> None:
    global _shared_guard
    _shared_guard = threading.RLock()  # the parent's may have been held by a thread that the child lacks
    _each_runner(SQLiteRunner._check_process)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=partial(_each_runner, SQLiteRunner.after_fork),
        after_in_child=_after_fork_in_child,
    )


# ---------------------------------------------------------------------------------------------------
# Broker: everything about all queues of a database.
# ---------------------------------------------------------------------------------------------------

DUMP_FORMAT, DUMP_VERSION = "simplebroker-dump", 1


class Stats(namedtuple("Stats", "ready leased delayed oldest")):
    """How many messages a queue has: ready, leased, delayed; total; and the lowest id that is ready, or None."""

    __slots__ = ()
    ready: int
    leased: int
    delayed: int
    oldest: int | None

    @property
    def total(self) -> int:
        """All of them."""
        return self.ready + self.leased + self.delayed


class Broker:
    """All queues of one database.

    ``db_path`` is a file or a URL; None means the default (see BROKER_DEFAULT_DB_LOCATION,
    BROKER_PROJECT_SCOPE). ``runner`` replaces it and stays the caller's. ``clock`` returns nanoseconds since
    1970; None: that of the runner. No file is opened before it is needed.

    path     the absolute path of the database file, or its URL; empty if a custom runner does not tell
    address  the same, but a URL is whole: it may have a password
    """

    def __init__(
        self, db_path: StrPath | None = None, *, runner: SQLRunner | None = None, settings: Settings | None = None,
        clock: Callable[[], int] | None = None,
    ) -> None:  # fmt: skip
        if runner is not None and db_path is not None:
            raise ValueError("give a db_path or a runner, not both")
        self.settings = settings or Settings.from_environment()
        self._shares_runner = runner is None
        self.address = api_path(self.settings, db_path) if runner is None else runner.path
        self.runner = share_runner(self.address, self.settings) if runner is None else runner
        self.path = self.runner.path
        self.clock: Callable[[], int] = clock or self.runner.clock
        self._closed = self._prepared = False

    def __repr__(self) -> str:
        return f"Broker({self.path!r})" if self._shares_runner else f"Broker(runner={self.runner!r})"

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; the connection is closed with its last user. Closing twice is allowed."""
        closed, self._closed = self._closed, True
        if not closed and self._shares_runner:
            return_runner(self.address, self.settings)

    def exists(self) -> bool:
        """Is there a database? Nothing is opened; where there is no file to look at, it is taken for granted."""
        return not self.path or bool(url_scheme(self.path)) or os.path.exists(self.path)

    def queue(self, name: str) -> Queue:
        """The queue of that name on this broker. Closing it does not close the broker."""
        return Queue(name, broker=self)

    def prepared(self) -> SQLRunner:
        """The runner, when the schema is there. UsageError if the broker was closed."""
        if self._closed:
            raise UsageError("the queue or its broker was closed: make a new one")
        if not self._prepared:
            self.runner.prepare()
            self._prepared = True
        return self.runner

    def transact(self, function: Callable[[Run], T], durable: bool = True) -> T:
        """Call ``function(run)`` in a transaction and return its result; see SQLRunner.transact()."""
        return self.prepared().transact(function, durable)

    def transaction(self) -> Transaction:
        """``with broker.transaction() as run:`` one write transaction; ``run(sql, params, fetch=)``.

        What the thread does inside with queues of the same database belongs to it: all or nothing. (With
        a custom runner only if that lets transactions nest.) Enter and leave it in the same thread.
        Blocks up to BROKER_BUSY_TIMEOUT, then OperationalError. Keep it short: all other writers wait.
        """
        return Transaction(self.prepared())

    def run(self, sql: str, params: Any = (), *, fetch: bool = True) -> Any:
        """Run one statement of the SQL section by itself and return its rows."""
        return self.prepared().run(sql, params, fetch=fetch)

    def queues(self, pattern: str | None = None) -> dict[str, Stats]:
        """The queues that have messages, sorted, with their stats; only those that match the pattern."""
        rows = self.run(SELECT_QUEUES, {"now": self.clock()})
        return {row[0]: Stats(*row[1:]) for row in rows if matches(row[0], pattern)}

    def broadcast(self, body: str, pattern: str | None = None, queues: Iterable[str] | None = None) -> list[str]:
        """Write the body to every queue that has messages (and matches), or to these; return their names.

        One transaction: all of them or none. Each copy has an id of its own.
        """
        text = check_body(body, self.settings.max_message_size)
        if pattern is not None and queues is not None:
            raise ValueError("give a pattern or queues, not both")
        if isinstance(queues, str):
            raise TypeError("queues is an iterable of names, not a str")
        given = None if queues is None else sorted({check_queue_name(name) for name in queues})

        def write(run: Run) -> list[str]:
            names = list(self.queues(pattern)) if given is None else given
            for name in names:
                self.runner.insert(name, [text], None, self.clock())
            return names

        return self.transact(write)

    def rename(self, old: str, new: str) -> int:
        """Give all messages of a queue, held ones too, to another name; return how many. One transaction.

        Leases go on, and attempts and reasons stay. The messages of a queue that has that name already are
        merged with them by id. OLD.dead keeps its name.
        """
        if check_queue_name(old) == check_queue_name(new):
            raise ValueError(f"old and new name are the same, {old!r}")

        def rename(run: Run) -> int:
            count: int = run(SELECT_STORED, (old, 0, MAX_ID + 1) * 2, fetch=True)[0][0]
            run(RENAME_READY, (new, old))
            run(RENAME_HELD, (new, old))
            return count

        return self.transact(rename)

    def delete_all(self) -> int:
        """Remove all messages of all queues; return how many."""

        def delete(run: Run) -> int:
            count: int = run(SELECT_ALL_COUNT, fetch=True)[0][0]
            if count:
                run(RECORD_NEWEST)
                run(DELETE_ALL)
            return count

        return self.transact(delete)

    def waiter(self) -> Waiter:
        """``with broker.waiter() as waiter:`` look and ``waiter.wait(seconds)`` in turn. No change between a
        look and the wait after it is missed; wait() returns False at its timeout."""
        return Waiter(self.prepared().notifier)

    def wait_for_change(self, timeout: float | None = None) -> bool:
        """Block until messages may have become deliverable, a second at most: look again.

        False after timeout seconds. A change before the call is not seen: see waiter().
        """
        with self.waiter() as waiter:
            return waiter.wait(timeout)

    def status(self) -> dict[str, int]:
        """Numbers of the whole database: queues, messages (ready, leased, delayed), last id, bytes."""
        stats = list(self.queues().values())
        numbers = {"queues": len(stats), "messages": sum(each.total for each in stats)}
        numbers.update((name, sum(getattr(each, name) for each in stats)) for name in ("ready", "leased", "delayed"))
        numbers["last_ts"] = self.run(SELECT_LAST_ID)[0][0]
        numbers["bytes"] = self.run(SELECT_PAGES)[0][0] * self.run(SELECT_PAGE_SIZE)[0][0]
        return numbers

    def vacuum(self) -> None:
        """Give unused pages back to the file system. Writers wait meanwhile."""
        self.prepared().vacuum()

    def delete_database(self) -> bool:
        """Delete the database file and what belongs to it. False if there is none; DatabaseError if it is
        not one of ours. Other processes that use it notice, and begin a new one with their next write."""
        return self.prepared().delete()

    def dump(self, pattern: str | None = None) -> Iterator[str]:
        """Yield the messages as lines of JSON, a header first, all from one state of the database.

        Queues sorted, ids ascending, what is held included. A leased message has no token there: loaded, it
        is delayed. Writers go on meanwhile (with a custom runner they may wait).
        """
        import json

        with self.prepared().snapshot() as run:
            header = {"type": "header", "format": DUMP_FORMAT, "version": DUMP_VERSION}
            yield json.dumps({**header, "last_ts": shown_id(run(SELECT_LAST_ID, fetch=True)[0][0])})
            rows = run(SELECT_QUEUES, {"now": 0}, fetch=True)
            for queue in [row[0] for row in rows if matches(row[0], pattern)]:
                for id, body, attempt, reason, held_until, _ in walk(run, queue):
                    record = {"type": "message", "queue": queue, "body": body, "id": shown_id(id)}
                    if held_until is not None:
                        record["held_until"] = shown_id(held_until)
                    record.update({key: value for key, value in (("attempt", attempt), ("reason", reason)) if value})
                    yield json.dumps(record, ensure_ascii=False)

    def load(self, lines: Iterable[str | bytes]) -> int:
        """Read what dump() yields; return the number of messages. One transaction: all or nothing.

        Ids are kept; ids given out later are higher. A bad line is a UsageError, an id that exists already
        an IntegrityError; both name the line. Aliases (of the package on PyPI) are skipped with a warning.
        Other writers wait meanwhile.
        """
        count, last = 0, None
        with self.transaction() as run:  # in this thread, to which the lines may belong
            for number, line in enumerate(lines, 1):
                try:
                    record = _parse_dump_line(line, self.settings.max_message_size, header=last is None)
                    if isinstance(record, int):
                        last = record
                    elif record:
                        run(INSERT_LOADED, record)
                        count += 1
                except sqlite3.IntegrityError:
                    raise IntegrityError(f"line {number}: a message with this id exists already") from None
                except (ValueError, TypeError, RecursionError) as error:
                    raise UsageError(f"line {number}: {error}") from error
            if last is None:
                raise UsageError("there is nothing to load, not even the header of a dump")
            run(RECORD_LAST_ID, (last,))
        return count


def shown_id(id: int) -> str:
    """An id as it is printed everywhere: 19 digits."""
    return f"{id:0{ID_DIGITS}d}"


def matches(name: str, pattern: str | None) -> bool:
    """Does a queue name match a shell pattern? None matches everything."""
    if pattern is None:
        return True
    import fnmatch

    return fnmatch.fnmatchcase(name, pattern)


def next_batch_size(size: int, bodies: Sequence[str]) -> int:
    """Double the batch, or halve it when it was heavy."""
    return max(1, size // 2) if sum(map(len, bodies)) > BATCH_BYTES else min(MAX_BATCH, size * 2)


def walk(run: Run, queue: str, low: int = 0, high: int = MAX_ID + 1, due_by: int = 2**63 - 1) -> Iterator[Any]:
    """Yield the rows of a queue with ids between two, ascending: what is ready, and what is held until a time.

    By id, not by offset: nothing is skipped while others remove rows.
    """
    from heapq import merge

    ready, held = _walk_ready(run, queue, low, high), _walk_held(run, queue, low, high, due_by)
    for row in merge(ready, held, key=lambda row: row[0]):
        if row[0] > low:  # one that became ready meanwhile comes twice
            low = row[0]
            yield row


def _walk_ready(run: Run, queue: str, low: int, high: int) -> Iterator[Any]:
    """Page by page; pages begin small and grow while they are light, so large bodies do not fill the memory."""
    limit = 4
    while True:
        rows = run(SELECT_PAGE, (queue, low, high, limit), fetch=True)
        yield from rows
        if len(rows) < limit:
            return
        low, limit = rows[-1][0], next_batch_size(limit, [row[1] for row in rows])


def _walk_held(run: Run, queue: str, low: int, high: int, due_by: int) -> Iterator[Any]:
    """Many ids at a time, as each time all that is held is sorted; few rows at a time, as bodies may be large."""
    while True:
        ids = [id for (id,) in run(SELECT_HELD_IDS, (queue, due_by, low, high, HELD_IDS_AT_ONCE), fetch=True)]
        for place in range(0, len(ids), ROWS_AT_ONCE):
            page = ids[place : place + ROWS_AT_ONCE]
            filled = (page * ROWS_AT_ONCE)[:ROWS_AT_ONCE]  # so that one statement serves
            yield from run(SELECT_BY_IDS, (*filled, queue), fetch=True)
        if len(ids) < HELD_IDS_AT_ONCE:
            return
        low = ids[-1]


def _parse_dump_line(line: str | bytes, max_bytes: int, *, header: bool) -> tuple[Any, ...] | int | None:
    """A message as the parameters of INSERT_LOADED, a header as its last id, or None for nothing."""
    import json

    record = json.loads(line)
    kind = record.get("type") if isinstance(record, dict) else None
    if header != (kind == "header"):
        raise ValueError("the first line of a dump, and no other, is its header")
    if kind == "header":
        if (record.get("format"), record.get("version")) != (DUMP_FORMAT, DUMP_VERSION):
            raise ValueError(f"not a {DUMP_FORMAT} of version {DUMP_VERSION}")
        return _dumped_number(record.get("last_ts", 0), "last_ts", high=LAST_LOADED_ID)
    if kind == "alias":
        logger().warning("alias %s: aliases are not supported, skipped", shown(record.get("alias")))
        return None
    if kind != "message":
        raise ValueError(f"unknown type {shown(kind)}")
    held = record.get("held_until")
    return (
        _dumped_number(record.get("id"), "id", 1, LAST_LOADED_ID),
        check_queue_name(record.get("queue")),
        check_body(record.get("body"), max_bytes),
        None if held is None else _dumped_number(held, "held_until"),
        _dumped_number(record.get("attempt", 0), "attempt", high=2**31),
        check_reason(record.get("reason")),
    )


def _dumped_number(value: object, name: str, low: int = 0, high: int = 2**63 - 1) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= ID_DIGITS:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} {shown(value)} is not a whole number from {low} to {high}")
    return value


# ---------------------------------------------------------------------------------------------------
# Queue: everything about one queue. A method is: check, one transaction, return.
# ---------------------------------------------------------------------------------------------------


class Queue:
    """One queue of messages.

    ``db_path`` is a file or a URL; None means the default place. ``runner`` or ``broker`` replace it and stay
    the caller's. Queues of one process on the same file share a connection; all methods may be called from
    any thread. Everything that writes blocks up to BROKER_BUSY_TIMEOUT, then raises OperationalError.

    Filters, wherever they are offered: ``message_id`` takes that message only; ``after`` and ``before``
    are strict bounds of ids. Ids are ints or strings of 19 digits.

    >>> q = Queue("tasks", db_path=path)
    >>> id = q.write("hello")
    >>> q.peek(), q.count(), q.read(), q.read()
    ('hello', 1, 'hello', None)
    >>> q.close()
    """

    def __init__(
        self, name: str, db_path: StrPath | None = None, *, runner: SQLRunner | None = None,
        broker: Broker | None = None, settings: Settings | None = None,
    ) -> None:  # fmt: skip
        if broker is not None and not (db_path is None and runner is None and settings is None):
            raise ValueError("give a broker, or a db_path or runner with settings, not both")
        self.name = check_queue_name(name)
        self.broker = broker if broker is not None else Broker(db_path, runner=runner, settings=settings)
        self._owns_broker = broker is None

    def __repr__(self) -> str:
        return f"Queue({self.name!r}, {self.broker!r})"

    def __reduce__(self) -> tuple[Any, ...]:  # for processes that are spawned
        if not self.broker.path:
            raise TypeError("only a queue on a path can be pickled, not one with a custom runner")
        return partial(type(self), settings=self.broker.settings), (self.name, self.broker.address)

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- write

    def write(self, body: str, *, delay: float | None = None, until: datetime | int | None = None) -> int:
        """Append a message and return its id. It is committed, and durable, when this returns.

        ``delay`` in seconds, or ``until`` an aware datetime or nanoseconds since 1970: held back until
        then, and then in its old place in the order (of more than 100 that become due at once, the first due
        come first). MessageError if the body is too large or not text.
        """
        text = check_body(body, self.broker.settings.max_message_size)
        return self.broker.prepared().write(self.name, [text], due_time(delay, until), self.broker.clock)[0]

    def write_many(
        self, bodies: Iterable[str], *, delay: float | None = None, until: datetime | int | None = None
    ) -> list[int]:
        """Append several messages in one transaction, all or none; return their ids, in order."""
        if isinstance(bodies, (str, bytes)):
            raise TypeError("bodies is an iterable of str: a single body goes to write()")
        texts = [check_body(body, self.broker.settings.max_message_size) for body in bodies]
        held_until = due_time(delay, until)
        return self.broker.prepared().write(self.name, texts, held_until, self.broker.clock) if texts else []

    # -- read: at most once

    def read(
        self, *, message_id: Id = None, after: Id = None, before: Id = None, wait: float | None = None
    ) -> Message | None:
        """Remove the first ready message and return it; None if there is none.

        It is removed before the caller has it (at most once): use lease() or read_all() to lose nothing
        when the caller crashes. ``wait``: block up to that many seconds for one (math.inf: forever).
        """
        low, high = id_range(message_id, after, before)
        return self._first(lambda: self._remove(low, high, 1), wait, low, high)

    def read_many(self, limit: int, *, after: Id = None, before: Id = None) -> list[Message]:
        """Remove up to ``limit`` ready messages in one transaction and return them (at most once)."""
        return self._remove(*id_range(None, after, before), check_limit(limit))

    def read_all(
        self, *, after: Id = None, before: Id = None, lease: float = DEFAULT_LEASE_S
    ) -> Iterator[Message]:
        """Iterate over the ready messages; each is removed when the loop asks for the next (at least once).

        A message whose turn does not end, because the loop was left or the process died, is given back.
        Leases last ``lease`` seconds and are extended in the background while the loop runs.
        """
        low, high = id_range(None, after, before)
        with LeasesInFlight(self, lease) as leases:
            while batch := leases.take(None, low, high):
                for message in batch:
                    try:
                        yield message
                    except BaseException:  # the loop was left: this message was seen, the rest of the batch not
                        leases.release(message)
                        raise
                    leases.ack(message)

    def _remove(self, low: int, high: int, limit: int) -> list[Message]:
        """Remove and return the first ready messages between two ids."""

        def remove(run: Run, rows: list[Any]) -> list[Message]:
            first, last = rows[0][0], rows[-1][0]
            if last == rows[-1][4]:
                run(RECORD_NEWEST)
            if first == last:  # quicker for one
                run(DELETE_MESSAGE, (last,))
            else:
                run(DELETE_READY, (self.name, first - 1, last + 1))
            return [Message(body, id, self.name, attempt, None, reason) for id, body, attempt, reason, *_ in rows]

        try:
            return self._claim(low, high, limit, remove)
        except NotSynced as error:  # they are removed, and nobody else has them
            logger().warning("read, but %s", error)
            return list(error.result)

    def _claim(
        self, low: int, high: int, limit: int, act: Callable[[Run, list[Any]], list[Message]], durable: bool = True
    ) -> list[Message]:
        """Call act(run, rows) in a transaction with the first ready rows between two ids, if there are any."""

        def claim(run: Run) -> list[Message]:
            now = self.broker.clock()
            select = (self.name, now, self.name, low, high, limit)
            rows = run(SELECT_READY, select, fetch=True)
            if not rows or rows[0][5]:  # something may have become due
                run(PROMOTE_DUE, (self.name, now, low, high, max(limit, MAX_PROMOTED)))
                rows = run(SELECT_READY, select, fetch=True)
            return act(run, rows) if rows else []

        return self.broker.transact(claim, durable)

    # -- peek: removes nothing

    def peek(self, *, message_id: Id = None, after: Id = None, before: Id = None) -> Message | None:
        """Return the first ready message, or None; nothing is removed. By id, held ones are seen too."""
        if message_id is None:
            return next(iter(self.peek_many(1, after=after, before=before)), None)
        rows = self.broker.run(SELECT_ANY, (self.name, *id_range(message_id, after, before)))
        return next(map(self._message, rows), None)

    def peek_many(self, limit: int, *, after: Id = None, before: Id = None, held: bool = False) -> list[Message]:
        """Return up to ``limit`` ready messages, the oldest first; nothing is removed.

        ``held``: leased and delayed ones too, by id; see Message.state, due, attempt and reason.
        """
        limit = check_limit(limit)
        if held:
            return [message for _, message in zip(range(limit), self.peek_all(after=after, before=before, held=True))]
        low, high = id_range(None, after, before)
        ready, due = (self.name, low, high, limit), (self.name, self.broker.clock(), low, high)
        rows = self.broker.run(SELECT_PEEK, (*ready, *due, max(limit, MAX_PROMOTED), limit))
        return list(map(self._message, rows))

    def peek_all(self, *, after: Id = None, before: Id = None, held: bool = False) -> Iterator[Message]:
        """Iterate over the ready messages, by id: none is skipped while others are removed. ``held`` as above."""
        low, high = id_range(None, after, before)
        due_by = 2**63 - 1 if held else self.broker.clock()
        return map(self._message, walk(self.broker.run, self.name, low, high, due_by))

    def _message(self, row: Sequence[Any]) -> Message:
        id, body, attempt, reason, held_until, leased = row
        state = "ready"
        if held_until is not None and held_until > self.broker.clock():
            state = "leased" if leased else "delayed"
        return Message(body, id, self.name, attempt, None, reason, None if state == "ready" else held_until, state)

    def has_pending(self, *, message_id: Id = None, after: Id = None, before: Id = None) -> bool:
        """Is a message ready? (With a lower bound: a newer one than that?)"""
        return self.look(*id_range(message_id, after, before))[0]

    def look(self, low: int = 0, high: int = MAX_ID + 1) -> tuple[bool, float]:
        """Is a message between two ids ready? And in how many seconds, at most, is it time to look again?"""
        name, now = self.name, self.broker.clock()
        pending, due = self.broker.run(SELECT_PENDING, (name, low, high, name, now, low, high, name, now))[0]
        pause = MAX_SLEEP_S if due is None else max(MIN_SLEEP_S, min(MAX_SLEEP_S, (due - now) / NS))
        return bool(pending), pause

    def wait_for(self, act: Callable[[], T], wait: float | None, low: int = 0, high: int = MAX_ID + 1) -> T:
        """Call act() and return its result. ``wait`` seconds: again when a message between two ids is ready, until the
        result is true or the time is over. (The first call comes before anything is made to wait with, such as the
        notifier's thread. As it may be for nothing, act() itself should look before it takes the writer lock.)"""
        if wait is not None and (isinstance(wait, bool) or not wait >= 0):
            raise ValueError(f"wait is a number of seconds from 0, not {wait!r}")
        result = act()
        if result or not wait:
            return result
        deadline = time.monotonic() + wait
        with self.broker.waiter() as waiter:
            while True:
                pending, pause = self.look(low, high)
                left = deadline - time.monotonic()
                if pending:
                    result = act()
                if result or left <= 0:
                    return result
                waiter.wait(min(pause, left))

    def _first(self, take: Callable[[], list[Message]], wait: float | None, low: int, high: int) -> Message | None:
        """What take() finds, before the wait is over. Who waits takes the writer lock only when there is something."""
        found = self.wait_for(lambda: take() if wait is None or self.look(low, high)[0] else [], wait, low, high)
        return found[0] if found else None

    def is_drained(self, low: int = 0) -> bool:
        """Is no message above an id ready, leased or waiting for its next attempt?"""
        values = (self.name, low, self.name, low, self.broker.clock())
        return bool(self.broker.run(SELECT_DRAINED, values)[0][0])

    def count(self) -> int:
        """How many messages are ready (approximate while others write)."""
        return int(self.broker.run(SELECT_COUNT, (self.name, self.name, self.broker.clock()))[0][0])

    def stats(self) -> Stats:
        """How many messages are ready, leased and delayed, and the oldest ready (approximate while others write)."""
        return Stats(*self.broker.run(SELECT_STATS, {"queue": self.name, "now": self.broker.clock()})[0])

    # -- lease, then acknowledge, extend, release or dead-letter: at least once

    def lease(
        self, seconds: float = DEFAULT_LEASE_S, *, message_id: Id = None, after: Id = None, before: Id = None,
        wait: float | None = None,
    ) -> Message | None:  # fmt: skip
        """Hide the first ready message from others for that many seconds and return it; None if none.

        Its ``attempt`` tells how many times it has been leased. ack() it when it is done with; otherwise
        it is ready again when the lease ends. ``wait`` as in read().
        """
        low, high = id_range(message_id, after, before)
        lease_ns = to_ns(seconds, "lease")
        return self._first(lambda: self.lease_many(lease_ns, low, high, 1), wait, low, high)

    def lease_many(self, lease_ns: int, low: int, high: int, limit: int) -> list[Message]:
        """Lease the first ready messages between two ids; LeasesInFlight.take() also keeps the leases alive.

        One that was leased before is leased alone: if it kills its consumers, the others of the batch
        must not use up their attempts with it.
        """

        def lease(run: Run, rows: list[Any]) -> list[Message]:
            fresh = next((number for number, row in enumerate(rows) if row[2]), len(rows))
            rows = rows[: max(1, fresh)]
            until, token = self.broker.clock() + lease_ns, int.from_bytes(os.urandom(8), "big") >> 1
            run(LEASE_READY, (until, token, self.name, rows[0][0] - 1, rows[-1][0] + 1))
            return [
                Message(body, id, self.name, attempt + 1, token, reason, until, "leased")
                for id, body, attempt, reason, *_ in rows
            ]

        return self._claim(low, high, limit, lease, durable=False)

    def ack(self, message: Message) -> None:
        """Acknowledge: remove a message that you leased. LeaseLost if someone else has it now.

        A lease that ended is still yours while nobody took the message.
        """
        self._change_leased(message, DELETE_MESSAGE, lambda now: (message.id,))

    def extend(self, message: Message, seconds: float = DEFAULT_LEASE_S) -> None:
        """Let the lease end that many seconds from now. LeaseLost if someone else has the message."""
        lease_ns = to_ns(seconds, "lease")
        self._change_leased(message, EXTEND_LEASE, lambda now: (now + lease_ns, message.id, message.lease))

    def release(self, message: Message, *, delay: float | None = None, reason: str | None = None) -> None:
        """Give a leased message back: ready at once, or after ``delay`` seconds. LeaseLost as in ack().

        The attempt counts. ``reason`` says why it failed; None keeps that of the attempt before.
        """
        held_until, why = due_time(delay, None), check_reason(reason)
        self._change_leased(message, RELEASE_MESSAGE, lambda now: (held_until(now), why, message.id))

    def dead_letter(self, message: Message, dest: str | None = None, *, reason: str | None = None) -> None:
        """Move a leased message to another queue, by default QUEUE.dead. LeaseLost as in ack().

        It keeps its id, is ready there, and its attempts count from 0. ``reason`` as in release().
        """
        self.move_leased(message, self.check_dead_letter(dest), check_reason(reason))

    def move_leased(self, message: Message, dest: str, reason: str | None = "") -> None:
        """Move a leased message to another queue, as a stage of a pipeline does. It forgets its reason, or gets one."""
        self._change_leased(message, MOVE_LEASED, lambda now: (dest, reason, message.id))

    def check_dead_letter(self, name: str | None) -> str:
        """The name of the dead-letter queue that is meant, which must not be this queue."""
        return self.check_dest(name if name is not None else self.name + ".dead")

    def check_dest(self, name: str) -> str:
        """The name of a queue to move to, which must not be this one."""
        dest = check_queue_name(name)
        if dest == self.name:
            raise ValueError(f"messages of {name!r} move to another queue, not to itself")
        return dest

    def _change_leased(self, message: Message, sql: str, values: Callable[[int], tuple[Any, ...]]) -> None:
        """Run a statement on a message whose lease the caller has; its values are made from the time now."""
        if not isinstance(message, Message):
            raise TypeError(f"give the Message that lease() returned, not {type(message).__name__}")
        if message.lease is None:
            raise ValueError(f"message {message.id} was not leased by you: use lease(), not read() or peek()")

        def change(run: Run) -> None:
            check_lease(run, message, removes=sql == DELETE_MESSAGE)
            run(sql, values(self.broker.clock()))

        self.broker.transact(change, durable=sql in (DELETE_MESSAGE, MOVE_LEASED))

    # -- move and delete

    def move(self, dest: str, *, message_id: Id = None, after: Id = None, before: Id = None) -> Message | None:
        """Move the first ready message to another queue and return it; None if there is none.

        It keeps its id, so it takes the place among the others there that its age gives it. Its attempts
        count from 0 again, and its reason is forgotten.
        """
        low, high = id_range(message_id, after, before)
        return next(iter(self.move_many(dest, 1, after=low, before=high)), None)

    def move_many(self, dest: str, limit: int, *, after: Id = None, before: Id = None) -> list[Message]:
        """Move up to ``limit`` ready messages in one transaction and return them."""
        self.check_dest(dest)

        def move(run: Run, rows: list[Any]) -> list[Message]:
            run(MOVE_READY, (dest, self.name, rows[0][0] - 1, rows[-1][0] + 1))
            return [Message(body, id, dest) for id, body, *_ in rows]

        return self._claim(*id_range(None, after, before), check_limit(limit), move)

    def move_all(self, dest: str, *, after: Id = None, before: Id = None) -> int:
        """Move all ready messages, in transactions of limited size; return how many."""
        return sum(map(len, self.move_batches(dest, *id_range(None, after, before))))

    def move_batches(self, dest: str, low: int = 0, high: int = MAX_ID + 1) -> Iterator[list[Message]]:
        """Move what is ready between two ids, one transaction for each batch, and yield the batches.

        Each message moves once, also if someone moves it back meanwhile: the batches go on by id. So what is due
        becomes ready first, all of it.
        """

        def promote(run: Run) -> bool:
            due = (self.name, self.broker.clock(), low, high)
            run(PROMOTE_DUE, (*due, MAX_PROMOTED))
            return bool(run(SELECT_DUE, due, fetch=True)[0][0])

        while self.broker.transact(promote, durable=False):
            pass
        size = 4
        while batch := self.move_many(dest, size, after=low, before=high):
            yield batch
            low, size = batch[-1].id, next_batch_size(size, batch)

    def requeue(
        self, from_: str | None = None, limit: int | None = None, *, message_id: Id = None, after: Id = None,
        before: Id = None,
    ) -> int:  # fmt: skip
        """Move ready messages from the dead-letter queue back to this one; return how many.

        ``from_`` is its name, None for QUEUE.dead; all of it is taken, also what other queues left there. Ids
        stay, attempts count from 0. ``limit`` None: all, in transactions of limited size.
        """
        source = self.broker.queue(self.check_dead_letter(from_))
        low, high = id_range(message_id, after, before)
        if limit is None:
            return source.move_all(self.name, after=low, before=high)
        return len(source.move_many(self.name, limit, after=low, before=high))

    def delete(self, *, message_id: Id = None, after: Id = None, before: Id = None) -> int:
        """Remove one message, those between two ids, or all of the queue; return how many were removed.

        Held ones too: who has leased one of them gets LeaseLost.
        """
        bounds = (self.name, *id_range(message_id, after, before))

        def delete(run: Run) -> int:
            if message_id is not None:  # without a walk through what is held
                found = run(SELECT_ANY, bounds, fetch=True)
                for row in found:
                    run(RECORD_NEWEST)
                    run(DELETE_MESSAGE, (row[0],))
                return len(found)
            count: int = run(SELECT_STORED, bounds * 2, fetch=True)[0][0]
            if count:  # else nothing is changed, and nothing synced
                run(RECORD_NEWEST)
                run(DELETE_READY, bounds)
                run(DELETE_HELD, bounds)
            return count

        return self.broker.transact(delete)

    def close(self) -> None:
        """Close the queue; the connection is closed with its last user. Closing twice is allowed."""
        if self._owns_broker:
            self.broker.close()


def check_lease(run: Run, message: Message, *, removes: bool) -> None:
    """LeaseLost unless the lease is the last that was given. ``removes``: the message is removed next."""
    found = run(SELECT_LEASE, (message.id,), fetch=True)
    if not found:
        raise LeaseLost(f"message {message.id} is gone: it was acknowledged, read or deleted")
    token, newest = found[0]
    if token is None or token != message.lease:
        raise LeaseLost(f"the lease of message {message.id} is lost: it was given back, moved, or leased by another")
    if removes and newest == message.id:
        run(RECORD_NEWEST)


class LeasesInFlight:
    """The leases of one consumer: taken in batches, extended in the background, given back at the end.

    ``with LeasesInFlight(queue, seconds) as leases:`` take() messages, and ack() each. ``lazy``: extend only after
    keep_alive(), for those who are mostly done before a thread could start.
    """

    def __init__(self, queue: Queue, seconds: float = DEFAULT_LEASE_S, *, lazy: bool = False) -> None:
        self._lease_ns = to_ns(seconds, "lease")
        if not self._lease_ns:
            raise ValueError("a lease must be longer than 0 seconds")
        self._period_s, self._lazy = seconds / 3, lazy
        self.next_at = float("inf")  # monotonic time of the next extension; see Notifier
        self._queue, self._pid = queue, os.getpid()
        # What is leased and not done. The notifier lists it while its owner changes it: both are one step.
        self._messages: dict[int, Message] = {}
        self._size, self._taken_at = 1, 0.0
        self._last: list[Message] = []
        self._left = False  # by its consumer, in the middle of something else

    def __enter__(self) -> LeasesInFlight:
        self.next_at = float("inf")  # a watcher may run again, and the notifier have set it after the first end
        if not self._lazy:
            self.keep_alive()
        return self

    def __exit__(self, *_: object) -> None:
        if self._queue.broker.runner.is_busy():  # this is the finalizer of an iterator: the notifier gives back
            self._left, self.next_at = True, 0.0
            return
        self._queue.broker.runner.notifier.remove(self)
        self.nack()

    def keep_alive(self) -> None:
        """Extend the leases in the background from now on."""
        if self.next_at == float("inf"):
            self.next_at = time.monotonic() + self._period_s
            self._queue.broker.runner.notifier.add(self)

    def take(self, limit: int | None = None, low: int = 0, high: int = MAX_ID + 1) -> list[Message]:
        """Lease up to ``limit`` messages between two ids; None: few while they are worked on slowly, more while fast.
        Where there is nothing, no writer lock is taken."""
        if not self._queue.look(low, high)[0]:
            return []
        now = time.monotonic()
        fast = now - self._taken_at <= FAST_BATCH_S
        self._size = next_batch_size(self._size, self._last) if fast else max(1, self._size // 2)
        self._taken_at = now
        self._pid = os.getpid()  # whose leases they are: a forked child leaves them to its parent
        self._last = self._queue.lease_many(self._lease_ns, low, high, limit or self._size)
        self._messages.update({message.id: message for message in self._last})
        return self._last

    def done(self, message: Message) -> bool:
        """Extend it no longer: the owner acknowledges, releases or moves it now. False if that was done before."""
        return self._messages.pop(message.id, None) is not None

    def ack(self, *messages: Message) -> None:
        """Acknowledge, in one transaction. Lost leases are logged: someone else has those messages."""
        for message in messages:
            self.done(message)

        def ack(run: Run) -> list[LeaseLost]:
            lost = []
            for message in messages:
                try:
                    check_lease(run, message, removes=True)
                    run(DELETE_MESSAGE, (message.id,))
                except LeaseLost as error:
                    lost.append(error)
            return lost

        for error in self._queue.broker.transact(ack) if messages else ():
            logger().warning("queue %s: handled, but %s", self._queue.name, error)

    def release(self, message: Message, *, delay: float | None = None, reason: str | None = None) -> None:
        """Give one back, as Queue.release(); a lost lease is logged. In a finalizer __exit__() sees to it."""
        if self._pid == os.getpid() and not self._queue.broker.runner.is_busy():
            self.settle(self._queue.release, message, delay=delay, reason=reason)

    def settle(self, act: Callable[..., object], message: Message, *args: object, **more: object) -> bool:
        """Call what ends the lease of a message, unless it has ended already; False if it was lost, which is logged."""
        try:
            if not self.done(message):
                return False
            act(message, *args, **more)
            return True
        except LeaseLost as error:
            logger().warning("queue %s: %s", self._queue.name, error)
            return False

    def nack(self) -> None:
        """Give back what was taken and is not done, at once, as if it had not been leased."""
        left = list(self._messages.values()) if self._pid == os.getpid() else []

        def undo(run: Run) -> None:
            for message in left:
                run(UNDO_LEASE, (message.id, message.lease))

        if left:
            self._queue.broker.transact(undo, durable=False)
        for message in left:
            self.done(message)

    def run(self) -> None:
        """Extend what is in flight, in one transaction. The notifier calls this."""
        self.next_at = time.monotonic() + min(self._period_s, SLICE_S)  # tried again soon if it fails
        if self._left:
            try:
                self.nack()
            except UsageError:  # the queue is closed: the leases end by themselves
                pass
            self._queue.broker.runner.notifier.remove(self)
            return
        messages = list(self._messages.values())

        def extend(run: Run) -> None:
            until = self._queue.broker.clock() + self._lease_ns
            for message in messages:
                run(EXTEND_LEASE, (until, message.id, message.lease))

        if messages:
            self._queue.broker.transact(extend, durable=False)
        self.next_at = time.monotonic() + self._period_s


# ---------------------------------------------------------------------------------------------------
# Watchers: call a handler for every message, now and as they come, and do not lose it if this fails.
# ---------------------------------------------------------------------------------------------------

STOP_EVENT_CHECK_S = 0.08  # how often a caller's own stop event is looked at
BUSY_PAUSE_S = 0.5  # how long a watcher pauses when the database is busy or full, before it goes on


def json_line(message: Message, **more: object) -> str:
    """A message as one line of JSON. The id is a string: jq 1.6 and JavaScript round integers of its size."""
    import json

    record = {"message": str(message), "timestamp": shown_id(message.id), **more}
    if message.reason:
        record["reason"] = message.reason
    return json.dumps(record, ensure_ascii=False)


def simple_print_handler(message: Message, timestamp: int) -> None:
    """Print ``[id] body``."""
    print(f"[{timestamp}] {message}", flush=True)


def json_print_handler(message: Message, timestamp: int) -> None:
    """Print the message as one line of JSON, as the command line does."""
    print(json_line(message), flush=True)


def logger_handler(message: Message, timestamp: int) -> None:
    """Log the message to the logger "simplebroker", level INFO."""
    logger().info("message %d: %s", timestamp, message)


def default_error_handler(error: BaseException, message: Message, timestamp: int) -> bool | None:
    """Log the error; the message is given back, and dead-lettered when its attempts are used up."""
    logger().error("message %d: handler failed: %r", timestamp, error, exc_info=error)
    return None


class QueueWatcher:
    """Calls ``handler(message, timestamp)`` for every message of a queue, until it is stopped.

    queue          a name, or a Queue (which stays the caller's); ``db`` is the database for a name:
                   a path, a Broker, or None for the default
    peek           only look: every message once, in the order of ids, nothing removed. What comes to
                   the queue with a lower id than the last one seen (moved in, given back, delayed) is
                   not seen
    after          handle only messages with a higher id
    lease          seconds; extended in the background while the handler runs. None: remove each message
                   before its handler is called (at most once)
    max_attempts   after so many failed attempts the message moves to ``dead_letter`` (QUEUE.dead)
    error_handler  ``error_handler(error, message, timestamp)`` decides about a handler that raised. True:
                   dealt with, acknowledge. None: give it back with a growing delay. False: give it back
                   and stop the watcher
    stop_event     a threading.Event that stops the watcher within 0.1 s
    batch_size     messages leased at once; None: few while handlers are slow, more when they are fast
    backoff        seconds before the second attempt; doubles with each further one, up to 300
    drain          end when nothing is ready, leased or waiting for its next attempt

    By default at least once: lease, call, acknowledge. With peek a failing message is tried again
    max_attempts times and then passed, as it stays in the queue. A handler that ends its thread
    (SystemExit, KeyboardInterrupt, CancelledError) ends the watcher: the attempt counts as a failed one.
    """

    # The errors of a handler that can be the message's fault. Any other ends the watcher, and the message is given back
    # as if it had not been leased.
    faults: type[Exception] | tuple[type[Exception], ...] = Exception

    def __init__(
        self, queue: str | Queue, handler: Handler, *, db: StrPath | Broker | None = None, peek: bool = False,
        after: Id = None, lease: float | None = DEFAULT_LEASE_S, max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        dead_letter: str | None = None, error_handler: ErrorHandler | None = None,
        stop_event: threading.Event | None = None, batch_size: int | None = None, backoff: float = BACKOFF_S,
        drain: bool = False,
    ) -> None:  # fmt: skip
        check_handler(handler)
        if isinstance(queue, Queue) and db is not None:
            raise ValueError("give a Queue or a db, not both")
        self._max_attempts = check_limit(max_attempts, "max_attempts")
        self._batch_size = None if batch_size is None else check_limit(batch_size, "batch_size")
        self._backoff = to_ns(backoff, "backoff") / NS
        self._owns_queue = not isinstance(queue, Queue)
        if isinstance(queue, Queue):
            self.queue = queue
        else:
            self.queue = Queue(queue, broker=db) if isinstance(db, Broker) else Queue(queue, db)
        self.position = id_range(after=after)[0]  # with peek: the id of the last message seen
        self._handler, self._error_handler = handler, error_handler or default_error_handler
        self._step = self._peek_all if peek else self._read_one if lease is None else self._lease_batch
        self._leases = LeasesInFlight(self.queue, DEFAULT_LEASE_S if lease is None else lease)
        self._dead_letter = dead_letter
        if dead_letter is not None:
            self.queue.check_dead_letter(dead_letter)
        self._waiter = Waiter(self.queue.broker.runner.notifier)
        self._stop_event, self._drain, self.stopping = stop_event, drain, False
        # An acknowledgement, after which the queue may be drained, notifies nobody.
        self._longest_s = self.queue.broker.settings.max_interval_s if drain else MAX_SLEEP_S
        self.dead_lettered = 0  # messages that it has moved to the dead-letter queue
        self._thread: threading.Thread | None = None
        self._running = threading.Lock()  # held by the thread that is in watch()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.queue!r})"

    # -- start and stop

    def watch(self) -> None:
        """Handle messages until stopped. Blocks.

        In the main thread SIGINT, SIGTERM and SIGHUP stop it: the current handler ends, then this returns.
        """
        if not self._running.acquire(blocking=False):
            raise RuntimeError("this watcher is running already")
        try:
            with StopSignals(lambda number: self.request_stop()), self._waiter, self._leases:
                while not self._stopped():
                    try:
                        self._leases.nack()  # what an error left of the last batch
                        pending, pause = self.queue.look(self.position)
                        if pending:
                            self._step()
                        elif self._drain and self.queue.is_drained(self.position):
                            break
                        else:
                            self._sleep(min(pause, self._longest_s), wakes=True)
                    except sqlite3.OperationalError as error:  # busy, or a full disk: nothing is lost, go on later
                        logger().warning("watcher of %s: %s", self.queue.name, error)
                        self._sleep(BUSY_PAUSE_S)
        finally:
            self._running.release()
            if self._owns_queue:
                self.queue.close()

    def run_in_thread(self) -> threading.Thread:
        """Start watch() in a daemon thread and return the thread; the same one if it was started before."""
        if self._thread is None:
            name = f"simplebroker-watch-{self.queue.name}"
            thread = threading.Thread(target=self.watch, name=name, daemon=True)
            thread.start()
            self._thread = thread
        return self._thread

    def request_stop(self) -> None:
        """Stop after the current message. Returns at once; safe in handlers and signal handlers."""
        self.stopping = True
        self._waiter.wake()

    def stop(self, timeout: float | None = None) -> None:
        """Stop after the current message, and wait up to timeout seconds (None: no limit) for the end of
        the thread that run_in_thread() started, unless called from it."""
        self.request_stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def __enter__(self) -> QueueWatcher:
        self.run_in_thread()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _stopped(self) -> bool:
        return self.stopping or (self._stop_event is not None and self._stop_event.is_set())

    def _sleep(self, seconds: float, *, wakes: bool = False) -> None:
        """Sleep that long, or until stopped; ``wakes``: or until something may be there."""
        deadline = time.monotonic() + seconds
        while not self._stopped() and (left := deadline - time.monotonic()) > 0:
            if self._waiter.wait(left if self._stop_event is None else min(left, STOP_EVENT_CHECK_S)) and wakes:
                return

    # -- the three ways to take messages, when there are some

    def _lease_batch(self) -> None:
        batch = self._leases.take(self._batch_size, self.position)
        for message in batch:
            if self._stopped():
                break
            self._attempt(message)

    def _read_one(self) -> None:
        if message := self.queue.read(after=self.position):
            self._call(message)

    def _peek_all(self) -> None:
        for message in self.queue.peek_all(after=self.position):
            if self._stopped() or not self._see(message):
                break
            self.position = message.id

    # -- one message

    def _see(self, message: Message) -> bool:
        """Call until it works or the attempts are used up; False if it is to be seen again."""
        attempt = 1
        while (verdict := self._call(message)[0]) is None and attempt < self._max_attempts:
            self._sleep(backoff_s(self._backoff, attempt))
            if self._stopped():
                return False
            attempt += 1
        return verdict is not False

    def _attempt(self, message: Message) -> None:
        """Handle a leased message, and acknowledge it or give it back."""
        if message.attempt > self._max_attempts:  # it killed its consumers before they could say so
            self._bury(message, "lease ended", message.attempt - 1)
            return
        try:
            verdict, reason = self._call(message)
        except BaseException as error:  # it ends this thread; the attempt counts all the same
            try:
                self._give_back(message, describe(error), None)
            except sqlite3.OperationalError as second:  # busy, after which watch() would go on
                logger().warning("watcher of %s: %s", self.queue.name, second)
            raise
        if verdict:
            self._finish(message)
        elif verdict is None:
            self._give_back(message, reason, backoff_s(self._backoff, message.attempt))
        else:
            self._leases.release(message, reason=reason)

    def _call(self, message: Message) -> tuple[bool | None, str]:
        """Call the handler. True: done. None: try again. False: the watcher stops. And why it failed."""
        try:
            self._handler(message, message.id)
            return True, ""
        except self.faults as error:
            return self._failed(message, error), describe(error)
        except Exception:
            self._leases.nack()
            raise

    def _failed(self, message: Message, error: Exception) -> bool | None:
        """Ask the error handler."""
        try:
            verdict = self._error_handler(error, message, message.id)
        except Exception as second:  # noqa: BLE001 - an error handler that fails decides nothing
            verdict = default_error_handler(second, message, message.id)
        if verdict is False:
            self.request_stop()
        return verdict if isinstance(verdict, bool) else None

    def _finish(self, message: Message) -> None:
        """The handler is done with a leased message."""
        self._leases.ack(message)

    def _give_back(self, message: Message, reason: str, delay: float | None) -> None:
        """The handler failed: give the message back, or dead-letter it when its attempts are used up."""
        if message.attempt >= self._max_attempts:
            self._bury(message, reason, message.attempt)
        else:
            self._leases.release(message, delay=delay, reason=reason)

    def _bury(self, message: Message, reason: str, attempt: int) -> None:
        suffix = f" (attempt {attempt})"
        why = (check_reason(reason) or "")[: MAX_REASON - len(suffix)] + suffix
        dest = self.queue.check_dead_letter(self._dead_letter)
        if self._leases.settle(self.queue.move_leased, message, dest, why):
            self.dead_lettered += 1
            logger().warning("queue %s: message %d is dead-lettered: %s", message.queue, message.id, why)


class QueueMoveWatcher(QueueWatcher):
    """Moves every message of ``source`` to ``dest``, now and as they come.

    With a handler, it is called first, and the message moves when it returned: a stage of a pipeline, at
    least once. The options are those of QueueWatcher, but peek.
    """

    def __init__(self, source: str | Queue, dest: str, handler: Handler | None = None, **options: Any) -> None:
        super().__init__(source, handler or logger_handler, peek=False, **options)
        self._step = self._move_batch if handler is None else self._lease_batch
        self._size = 1  # of the next batch that is moved without a handler
        self._dest = self.queue.check_dest(dest)

    def _move_batch(self) -> None:
        batch = self.queue.move_many(self._dest, self._batch_size or self._size, after=self.position)
        self._size = next_batch_size(self._size, batch)

    def _finish(self, message: Message) -> None:
        self._leases.settle(self.queue.move_leased, message, self._dest)


def check_handler(handler: Handler) -> None:
    """TypeError unless it can be called with a message and a timestamp, and has done its work when it returns."""
    import inspect

    try:
        inspect.signature(handler).bind("message", 0)
    except TypeError as error:
        raise TypeError(f"handler is called as handler(message, timestamp): {error}") from None
    except ValueError:  # a builtin that does not tell
        pass
    for kind in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
        if kind(handler) or kind(type(handler).__call__):
            raise TypeError("a call of the handler would not run it: give a function that is no coroutine or generator")


def describe(error: BaseException) -> str:
    """An error as a reason: its class and its text, which is enough for ours."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - its own __str__ fails
        text = ""
    if text and isinstance(error, BrokerError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def backoff_s(base_s: float, attempt: int) -> float:
    """How long to wait after the attempt-th failure."""
    return float(min(MAX_BACKOFF_S, base_s * 2 ** min(attempt - 1, 60)))


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP call ``action(number)`` while the block runs, if this is the main thread.

    One that is ignored stays ignored, and one whose handler was installed by C code is left alone: it could not be
    restored. In a subinterpreter, which has no signals, nothing is done.
    """

    def __init__(self, action: Callable[[int], object]) -> None:
        self._action = action
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        import signal

        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                try:
                    self._previous[number] = signal.signal(number, lambda number, frame: self._action(number))
                except ValueError:  # not the main thread of the main interpreter
                    return

    def __exit__(self, *_: object) -> None:
        import signal

        for number, previous in self._previous.items():
            signal.signal(number, previous)


# ---------------------------------------------------------------------------------------------------
# Command line: a command takes parsed options, prints, and returns whether it found something (None: done).
# ---------------------------------------------------------------------------------------------------

DONE, ERROR, NOTHING = 0, 1, 2
FLUSH_BYTES = 1 << 16
PIPE_BYTES = 4096  # can be written without blocking when poll() reports room
PATIENCE_S = 1.0  # that a message may stay unread in a pipe, if there is one only, or after a signal
JOIN_S = 0.1  # how often `work` looks whether it is time to end its commands
KILL_AFTER_S = 5.0  # between asking a command of `work` to end, and killing it


def file_mode(stream: Any) -> int:
    """The kind of file behind a stream, as ``st_mode``; 0 if there is none."""
    try:
        return os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return 0


class Output:
    """Standard output, as bytes. It knows when the reader of a pipe has taken what was written.

    A message counts as delivered when it was flushed; in a pipe on Linux, when it was read from the pipe. So
    ``read --all | head -20`` removes 20.
    """

    def __init__(self) -> None:
        if sys.stdout is None:
            raise OperationalError("standard output is closed")
        sys.stdout.flush()
        mode = file_mode(sys.stdout)
        self._fd = sys.stdout.fileno() if mode else -1
        self.is_file = stat.S_ISREG(mode) or not mode or fcntl is None  # never full for a while
        self._is_pipe = stat.S_ISFIFO(mode) and sys.platform == "linux"
        self._unsent = bytearray()
        self._written, self._flushed_at = 0, 0.0
        # After so long a pipe that nobody has read from at all is written like a file: its reader may await our end.
        self.patience_s = float("inf")
        self.stopped: Callable[[], object] = bool  # is it time to end?
        self.when_slow: Callable[[], object] = bool  # called when the reader takes its time

    def print(self, lines: Iterable[bytes]) -> int:
        """Write lines, some at once, and flush them; return how many."""
        count = 0
        try:
            for line in lines:
                self._unsent += line
                count += 1
                if len(self._unsent) > FLUSH_BYTES:
                    self._flush()
        finally:  # so that a progress that was shown is true at Ctrl-C too
            self._flush()
        return count

    def _flush(self) -> None:
        """Write everything; BrokenPipeError if nobody reads any more, InterruptedError when stopped meanwhile."""
        data, self._unsent = memoryview(self._unsent), bytearray()
        self._written += len(data)
        self._flushed_at = time.monotonic()
        if self._fd < 0:
            sys.stdout.write(str(data, errors="replace"))
            return
        while data:
            try:
                if self.is_file or self._poll(FAST_BATCH_S, for_room=True):
                    data = data[os.write(self._fd, data[:PIPE_BYTES]) :]
            except BlockingIOError:  # non-blocking, and another writer was faster
                pass

    def deliver(self, data: bytes) -> None:
        """Write, and block until the reader of a pipe has all of it. BrokenPipeError or InterruptedError if not."""
        if self.stopped():
            raise InterruptedError("stopped before the output was written")
        self.print([data])
        while unread := self._unread():
            waited_s = time.monotonic() - self._flushed_at
            if unread >= self._written and waited_s > self.patience_s:
                self._is_pipe = False
            elif waited_s < 0.001:  # most readers are quick
                os.sched_yield()
            elif self._poll(min(0.01, waited_s), for_room=False) and self._unread():
                raise BrokenPipeError("nobody reads the output")

    def _unread(self) -> int:
        """How many bytes are in the pipe."""
        if not self._is_pipe:
            return 0
        import termios

        return int.from_bytes(fcntl.ioctl(self._fd, termios.FIONREAD, b"\0\0\0\0"), sys.byteorder)

    def _poll(self, seconds: float, *, for_room: bool) -> bool:
        """Wait until there is room, or nobody reads any more; False after so long. InterruptedError when it is time to
        end and the reader has had its time."""
        import select

        poll = select.poll()
        poll.register(self._fd, select.POLLOUT if for_room else 0)
        if poll.poll(1000 * seconds):
            return True
        self.when_slow()
        if self.stopped() and time.monotonic() - self._flushed_at > PATIENCE_S:
            raise InterruptedError("stopped before the output was read")
        return False


class Progress:
    """``with Progress(...) as progress:`` a running count on standard error, if that is a terminal and not --quiet. Its
    last number is the true one."""

    def __init__(self, what: str, options: Options, *, wanted: object = True, after_s: float = 0.5) -> None:
        self._what, self._count, self._next_at = what, 0, time.monotonic() + after_s
        self._on = bool(wanted and not options.quiet and sys.stderr is not None and sys.stderr.isatty())
        self._shown = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._show("\n")

    def add(self, number: int) -> None:
        """Count, and show the count now and then."""
        self._count += number
        if self._on and time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + 0.2
            self._shown = True
            self._show("")

    def counted(self, lines: Iterable[T]) -> Iterator[T]:
        """The lines, each of which is counted when the next one is asked for."""
        for line in lines:
            yield line
            self.add(1)

    def count(self, act: Callable[[], list[T]]) -> list[T]:
        """Call what commits a batch, and count it. When that is shown, signals wait until both are done."""
        if not self._on:
            return act()
        signals: list[int] = []
        with StopSignals(signals.append):
            done = act()
            self._count += len(done)
        self.add(0)
        if signals:
            self._show("\n")
            self._shown = False
            os.kill(os.getpid(), signals[0])
        return done

    def _show(self, end: str) -> None:
        try:
            print(f"\r{self._what}: {self._count:,}", end=end, file=sys.stderr, flush=True)
        except OSError:  # the terminal is gone
            self._on = self._shown = False


class Options:
    """What the command line said. What it did not say is None, unless it is named here."""

    run: Callable[[Options], object]
    operands: list[str]
    name = ""  # of the command
    opened: Broker | None = None
    lease_s = DEFAULT_LEASE_S
    max_attempts = DEFAULT_MAX_ATTEMPTS
    backoff = BACKOFF_S
    timeout = float("inf")
    jobs = 1

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # argparse asks for private names of its own
            raise AttributeError(name)
        return None

    def broker(self) -> Broker:
        """The broker on the database that the options mean."""
        if self.opened is None:
            settings = Settings.from_environment()
            self.opened = Broker(database_path(settings, self.dir, self.file), settings=settings)
        return self.opened

    def queue(self) -> Queue:
        """The queue of the first operand."""
        return Queue(self.operands[0], broker=self.broker())

    def range(self) -> tuple[int, int]:
        """The bounds that -m, --after and --before mean together."""
        return id_range(self.id, self.after, self.before)

    def wait_for(self, act: Callable[[], T]) -> T:
        """What act() returns; with --wait it is called when there may be something, until it finds some."""
        return self.queue().wait_for(act, self.wait, *self.range())

    def limit(self) -> int | None:
        """How many messages the command takes; None: all."""
        return None if self.all else self.number or 1

    def format(self, message: Message) -> bytes:
        """A message in the shape that --json or -t asks for, or plain."""
        if self.json:
            more: dict[str, object] = {}
            if self.held:
                due = None if message.due is None else shown_id(message.due)
                more = {"state": message.state, "attempt": message.attempt, "due": due}
            return json_line(message, **more).encode() + b"\n"
        text = f"{shown_id(message.id)}\t{message}" if self.stamps else message
        return text.encode() + (b"" if message.endswith("\n") else b"\n")

    def lease(self) -> Message:
        """The leased message that the second operand, ID.TOKEN, means."""
        id, _, token = self.operands[1].partition(".")
        if not (token.isascii() and token.isdigit() and len(token) <= ID_DIGITS):
            raise UsageError(f"{shown(self.operands[1])} is not a lease: give ID.TOKEN, as 'lease' printed it")
        return Message("", check_id(id, "the id of the lease"), self.operands[0], lease=int(token))


def standard_input() -> Any:
    """Standard input, for bytes."""
    if sys.stdin is None:
        raise OperationalError("standard input is closed")
    if not hasattr(sys.stdin, "buffer"):
        import io

        return io.BytesIO(sys.stdin.read().encode())
    if fcntl is not None and file_mode(sys.stdin):
        os.set_blocking(sys.stdin.fileno(), True)  # else "nothing yet" would be taken for the end
    return sys.stdin.buffer


def decode(data: bytes, what: str, settings: Settings) -> str:
    """Bytes as text, or a MessageError. Too many are not decoded: they may end inside a character."""
    if len(data) > settings.max_message_size:
        raise MessageError(f"{what} is longer than BROKER_MAX_MESSAGE_SIZE, {settings.max_message_size} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {data[error.start]:#04x} at {error.start}"
        raise MessageError(f"{what} is not UTF-8 ({byte}): encode it, for example with base64") from None


def message_text(operand: str | None, settings: Settings) -> str:
    """The body that an operand means: itself, or standard input for '-', or for none if it is not empty."""
    if operand in (None, "-"):
        data = standard_input().read(settings.max_message_size + 1)
        if operand is None and not data:
            raise UsageError("no MESSAGE, and standard input is empty: give '-' if an empty message is meant")
    else:
        try:
            data = os.fsencode(operand)
        except UnicodeEncodeError:  # PyPy takes arguments as UTF-8 even where the locale knows ASCII only
            data = operand.encode()
    return decode(data, "the message", settings)


def arriving_lines(settings: Settings) -> Iterator[list[str]]:
    """Yield the lines of standard input, all that have arrived at once. A bad one is an error after those before it."""
    source = standard_input()
    read = getattr(source, "raw", source).read  # raw: what is there, without waiting for more
    count, rest, ended = 0, b"", False
    while not ended:
        chunk = read(BATCH_BYTES) or b""
        ended = not chunk
        *lines, rest = (rest + chunk).split(b"\n")
        lines += [rest] if rest and (ended or len(rest) > settings.max_message_size) else []
        bodies: list[str] = []
        try:
            for line in lines:
                count += 1
                bodies.append(decode(line, f"line {count}: it", settings))
        except MessageError:
            yield bodies
            raise
        yield bodies


def run_write(options: Options) -> None:
    queue, (_, *given) = options.queue(), options.operands
    if options.lines and given:
        raise UsageError("--lines reads standard input: give no message")
    settings = queue.broker.settings
    batches = arriving_lines(settings) if options.lines else [[message_text(given[0] if given else None, settings)]]
    with Progress("messages written", options, wanted=options.lines) as progress:
        write_batches(options, queue, batches, progress)


def write_batches(options: Options, queue: Queue, batches: Iterable[list[str]], progress: Progress) -> None:
    """Write each in one transaction, and print its ids if they are wanted."""
    output = Output() if options.json or options.stamps else None
    shape = b'{"timestamp": "%019d"}\n' if options.json else b"%019d\n"
    try:
        for bodies in batches:
            ids = progress.count(partial(queue.write_many, bodies, delay=options.delay))
            if output is not None:
                output.print(shape % id for id in ids)
    except BrokenPipeError as error:
        raise OperationalError(f"nobody reads the ids: the last message written is {shown_id(ids[-1])}") from error


def run_read(options: Options) -> int:
    return options.wait_for(partial(read_messages, options, Output()))


def read_messages(options: Options, output: Output) -> int:
    """Print and remove what is there; return how many. A signal ends it, and what was not delivered is given back."""
    queue, (low, high), limit, count = options.queue(), options.range(), options.limit(), 0
    signals: list[int] = []  # those that told us to stop
    output.stopped = lambda: signals
    output.patience_s = PATIENCE_S if limit == 1 else 5 * PATIENCE_S
    progress = Progress("messages read", options, wanted=options.all and output.is_file)
    try:
        with progress, StopSignals(signals.append), LeasesInFlight(queue, lazy=True) as leases:
            output.when_slow = leases.keep_alive
            while count != limit and (batch := leases.take(limit and min(limit - count, MAX_BATCH), low, high)):
                delivered = 0
                try:
                    for message in batch:
                        output.deliver(options.format(message))
                        delivered += 1
                finally:
                    leases.ack(*batch[:delivered])
                    progress.add(delivered)
                count += delivered
    except (InterruptedError, BrokenPipeError):
        if not signals:
            raise
    if signals:
        raise SystemExit(128 + signals[0])
    return count


def run_peek(options: Options) -> int:
    queue, (low, high), limit, output = options.queue(), options.range(), options.limit(), Output()

    def peek() -> int:
        found: Iterable[Message | None] = queue.peek_all(after=low, before=high, held=bool(options.held))
        if options.id is not None:  # finds held messages too
            found = [queue.peek(message_id=options.id, after=low, before=high)]
        elif limit is not None:
            found = queue.peek_many(limit, after=low, before=high, held=bool(options.held))
        return output.print(options.format(message) for message in found if message is not None)

    return options.wait_for(peek)


def run_move(options: Options) -> int:
    queue, dest, limit, output = options.queue(), options.operands[1], options.limit(), Output()
    (low, high), count = options.range(), 0
    with Progress("messages moved", options, wanted=options.all) as progress:
        if limit is None:
            batches = queue.move_batches(dest, low, high)
        else:
            batches = iter([queue.move_many(dest, limit, after=low, before=high)])
        while batch := progress.count(partial(next, batches, [])):
            count += len(batch)
            try:
                output.print(map(options.format, () if options.quiet else batch))
            except BrokenPipeError as error:
                raise OperationalError(f"nobody reads the output: {count} messages were moved") from error
    return count


def run_requeue(options: Options) -> int:
    queue, output = options.queue(), Output()
    bounds = {"message_id": options.id, "after": options.after, "before": options.before}
    count = queue.requeue(options.source, options.number, **bounds)
    output.print([b"%d\n" % count] * (count > 0))
    return count


def run_release(options: Options) -> None:
    options.queue().release(options.lease(), delay=options.delay, reason=options.reason)


def run_dead_letter(options: Options) -> None:
    options.queue().dead_letter(options.lease(), options.dest, reason=options.reason)


def run_lease(options: Options) -> list[Message]:
    queue, output = options.queue(), Output()

    def lease() -> list[Message]:
        with LeasesInFlight(queue, options.lease_s, lazy=True) as leases:
            found = leases.take(1, *options.range())
            for message in found:
                line = json_line(message, attempt=message.attempt, lease=f"{shown_id(message.id)}.{message.lease}")
                output.print([line.encode() + b"\n"])
                leases.done(message)  # it is the reader's now
            return found

    return options.wait_for(lease)


def run_list(options: Options) -> bool:
    import json

    queues, output, lines = options.broker().queues(options.pattern), Output(), []
    for name, stats in queues.items():
        line = f"{name}: {stats.ready}"
        if options.json:
            oldest = None if stats.oldest is None else shown_id(stats.oldest)
            counts = {"ready": stats.ready, "leased": stats.leased, "delayed": stats.delayed, "total": stats.total}
            line = json.dumps({"queue": name, **counts, "oldest": oldest})
        elif options.stats:
            line += f" ({stats.total} total, {stats.leased} leased, {stats.delayed} delayed)"
        lines.append(line.encode() + b"\n")
    return bool(output.print(lines)) or options.pattern is None


TOP_ROW = "{0:{room}.{room}} {1:>8} {2:>7} {3:>7} {4:>9} {5:>6}  {6}"
TOP_TITLES = ("queue", "ready", "leased", "delayed", "change/s", "oldest", "")
TOP_PAUSE_S = 0.5  # between two looks, if something changes all the time


def run_top(options: Options) -> None:
    """Redraw at each change, at most twice a second and at least every other second; without a terminal once."""
    import shutil

    broker, output = options.broker(), Output()
    queues, seen_at = broker.queues(options.pattern), time.monotonic()
    if not sys.stdout.isatty():
        output.print(line.encode() + b"\n" for line in top_lines(queues, None, 1.0, broker.clock()))
        return
    with broker.waiter() as changed, StopSignals(lambda number: sys.exit(DONE)):
        try:
            output.print([b"\x1b[?1049h\x1b[?25l"])  # a screen of its own, without the cursor
            while True:
                before, queues, last, seen_at = queues, broker.queues(options.pattern), seen_at, time.monotonic()
                width, height = shutil.get_terminal_size()  # (0x0, as of a serial line, counts as 80x24)
                lines = top_lines(queues, before, seen_at - last, broker.clock(), width)
                if len(lines) > height:
                    lines[height - 1 :] = [f"and {len(lines) - height + 1} more queues"[:width]]
                output.print([b"\x1b[H", "\x1b[K\n".join(lines).encode(), b"\x1b[K\x1b[J"])
                time.sleep(TOP_PAUSE_S)
                changed.wait()
        finally:
            output.print([b"\x1b[?25h\x1b[?1049l"])


def top_lines(
    queues: dict[str, Stats], before: dict[str, Stats] | None, seconds: float, now: int, width: int = 1000
) -> list[str]:
    """The lines of ``top``, the fullest queue first. A change is what came less what went since the look before."""
    room = max(5, min(max(map(len, queues), default=0), max(16, width - 54)))
    rows: list[tuple[object, ...]] = [TOP_TITLES]
    most = max([1, *(stats.ready for stats in queues.values())])
    for name, stats in sorted(queues.items(), key=lambda item: (-item[1].ready, item[0])):
        came = stats.total - (before[name].total if before and name in before else 0)
        change = "" if before is None else f"{came / max(seconds, 0.1):+.1f}"
        age = "" if stats.oldest is None else shown_age((now - stats.oldest) / NS)
        bar = "#" * -(-10 * stats.ready // most)
        rows.append((name, stats.ready, stats.leased, stats.delayed, change, age, bar))
    return [TOP_ROW.format(*row, room=room)[:width].rstrip() for row in rows]


def shown_age(seconds: float) -> str:
    """An age in its largest unit, such as 3m."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


def run_delete(options: Options) -> int:
    if options.all:
        return options.broker().delete_all()
    return options.queue().delete(message_id=options.id, after=options.after, before=options.before)


def run_broadcast(options: Options) -> object:
    broker = options.broker()
    text = message_text(options.operands[0], broker.settings)
    return (options.queues or broker.exists()) and broker.broadcast(text, options.pattern, options.queues)


def run_dump(options: Options) -> None:
    output = Output()
    with Progress("lines dumped", options, wanted=output.is_file) as progress:
        lines = progress.counted(options.broker().dump(options.pattern))
        output.print(line.encode() + b"\n" for line in lines)


def run_load(options: Options) -> None:
    import tempfile

    broker, source = options.broker(), standard_input()
    with tempfile.TemporaryFile() as spool, Progress("lines read", options) as progress:
        if not stat.S_ISREG(file_mode(source)):  # other writers wait during the load, but for nobody who fills a pipe
            spool.writelines(iter(partial(source.read1, 1 << 20), b""))  # the end of file of a terminal counts once
            spool.seek(0)
            source = spool
        broker.load(progress.counted(source))


def run_init(options: Options) -> None:
    settings = Settings.from_environment()
    here = options.dir if options.dir is not None or options.file else settings.db_location or os.getcwd()
    options.opened = Broker(database_path(settings, here, options.file), settings=settings)
    with options.opened.transaction():
        pass


class CommandFailed(BrokerError):
    """A command of ``broker work`` ended with a status that is not 0."""


def run_watch(options: Options) -> None:
    queue, after, output = options.queue(), options.after, Output()
    if options.peek and options.move:
        raise UsageError("--peek and --move exclude each other")

    def handler(message: Message, timestamp: int) -> None:
        output.deliver(options.format(message))

    watcher = QueueWatcher(queue, handler, peek=bool(options.peek), after=after)
    if options.move:
        watcher = QueueMoveWatcher(queue, options.move, handler, after=after)
    watcher.faults = ()
    output.stopped = lambda: watcher.stopping
    try:
        watcher.watch()
    except InterruptedError:  # stopped before the output was read
        pass


class Worker(QueueWatcher):
    """A thread of ``broker work``."""

    faults = CommandFailed

    def __init__(self, job: Job, options: Options) -> None:
        super().__init__(
            options.queue(), job.handle, lease=options.lease_s, max_attempts=options.max_attempts,
            dead_letter=options.dest, error_handler=job.failed, backoff=options.backoff, drain=bool(options.drain),
        )  # fmt: skip
        self._job = job

    def _lease_batch(self) -> None:
        with self._job.guard:  # one after the other, so that -n commands get the oldest messages
            batch = self._leases.take(1) if self._job.left and not self._stopped() else []
            self._job.left -= sum(message.attempt <= self._max_attempts for message in batch)
        for message in batch:
            self._attempt(message)
        if not self._job.left:
            self.request_stop()


class Job:
    """``broker work``: runs a command for each message, in some threads, which the main thread looks after."""

    def __init__(self, options: Options) -> None:
        broker, self._options = options.broker(), options
        place, file = ("", broker.address) if url_scheme(broker.path) else os.path.split(broker.path)
        self._environ = dict(os.environ, BROKER_DEFAULT_DB_LOCATION=place, BROKER_DEFAULT_DB_NAME=file)
        self._environ["BROKER_PROJECT_SCOPE"] = "0"
        self._running: dict[Any, list[Any]] = {}  # each process: the time of its next signal, and that signal
        self._signals = 0  # how often we were told to stop
        self._failures: list[Exception] = []  # of the threads
        self.guard = threading.Lock()  # held by the worker that takes a message
        self.left: float = options.number or float("inf")  # the commands that may still be started
        self._workers = [Worker(self, options) for _ in range(options.jobs)]

    def run(self) -> None:
        """Work until told to stop, or until nothing is left to do."""
        threads = [threading.Thread(target=self._work, args=(worker,), daemon=True) for worker in self._workers]
        with StopSignals(self._stop):
            try:
                for thread in threads:
                    thread.start()
            except RuntimeError as error:  # a limit of processes
                self._failures.append(OperationalError(f"cannot start a thread: {error}"))
                self._stop_workers()
            for thread in threads:
                while thread.is_alive():
                    thread.join(JOIN_S)
                    self._end_commands()
        if self._failures:
            raise self._failures[0]
        buried = sum(worker.dead_lettered for worker in self._workers)
        if buried and not self._signals and (self._options.drain or self._options.number):
            raise BrokerError(f"messages that were dead-lettered: {buried}")

    def _work(self, worker: Worker) -> None:
        """A thread. Where one ends, because its time has come or of trouble, all do."""
        try:
            worker.watch()
        except Exception as error:  # noqa: BLE001 - the main thread raises it
            self._failures.append(error)
        finally:
            self._stop_workers()

    def _stop_workers(self) -> None:
        for worker in self._workers:
            worker.request_stop()

    def _stop(self, number: int) -> None:
        """A signal came: the commands that run are finished. At the second one they are ended."""
        self._signals += 1
        self._stop_workers()
        count = len(self._running)
        if self._signals == 1 and count and sys.stderr is not None and sys.stderr.isatty():
            complain(f"finishing {count} command{'s' * (count > 1)}; again to end them")

    def _end_commands(self) -> None:
        """End the commands whose time is over, or all after a second signal; kill those that go on."""
        import signal

        now = time.monotonic()
        for process, state in list(self._running.items()):
            end_at, number = state
            if now >= end_at or (self._signals > 1 and number == signal.SIGTERM):
                state[:] = now + KILL_AFTER_S, signal.SIGKILL
                try:
                    os.killpg(process.pid, number)
                except (ProcessLookupError, PermissionError):  # it has ended
                    pass

    def handle(self, message: Message, timestamp: int) -> None:
        """Run the command for a message; CommandFailed unless it ends with status 0."""
        import signal
        import subprocess
        import tempfile

        options, (_, *command) = self._options, self._options.operands
        environ = dict(self._environ, BROKER_QUEUE=message.queue, BROKER_MESSAGE_ID=shown_id(message.id))
        environ["BROKER_ATTEMPT"] = str(message.attempt)
        # The body is in a file before the command starts: if we are killed, it does not see half of it.
        with tempfile.TemporaryFile() as body:
            body.write(message.encode() if options.exact else options.format(message))
            body.seek(0)
            try:  # a session of its own, so that Ctrl-C in a terminal stops the worker and not the command
                process = subprocess.Popen(command, stdin=body, env=environ, start_new_session=True)
            except OSError as error:
                what = f"{shown(command[0])} or its interpreter"
                raise BrokerError(f"cannot start {what}: {error.strerror}") from error
        state = self._running[process] = [time.monotonic() + options.timeout, signal.SIGTERM]
        status = process.wait()
        del self._running[process]
        if state[1] == signal.SIGKILL and self._signals < 2:
            raise CommandFailed(f"timed out after {options.timeout:g}s")
        if status:
            raise CommandFailed(f"exit status {status}" if status > 0 else f"killed by signal {-status}")

    def failed(self, error: BaseException, message: Message, timestamp: int) -> bool | None:
        """The error handler: give back at once when the commands were ended, else with a delay."""
        if self._signals > 1:
            return False
        complain(f"message {shown_id(timestamp)}, attempt {message.attempt}: {error}")
        return None


def run_work(options: Options) -> None:
    import shutil
    import signal

    command = options.operands[1]
    if shutil.which(command) is None:
        why = "command not found" if shutil.which(command, os.F_OK) is None else "permission denied"
        raise OperationalError(f"cannot start {shown(command)}: {why}; nothing was taken")
    handled = signal.getsignal(signal.SIGCHLD) not in (signal.SIG_IGN, signal.SIG_DFL)  # PyPy does not tell which
    if not handled and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, every command would seem to succeed
    Job(options).run()


def run_status(options: Options) -> None:
    import json

    broker, output = options.broker(), Output()
    numbers = broker.status()
    status = {"database": broker.path, **numbers, "last_ts": shown_id(numbers["last_ts"])}
    lines = [f"{name}: {value}" for name, value in status.items()]
    if options.json:
        lines = [json.dumps(status, ensure_ascii=False)]
    output.print(line.encode(errors="surrogateescape") + b"\n" for line in lines)


def run_vacuum(options: Options) -> None:
    broker = options.broker()
    with Progress("bytes to vacuum", options, after_s=0) as progress:
        progress.add(0 if url_scheme(broker.path) else os.path.getsize(broker.path))
        broker.vacuum()


def run_cleanup(options: Options) -> None:
    options.broker().delete_database()


def complain(text: str) -> None:
    """One short line on standard error, if that is open."""
    if sys.stderr is not None:
        line = " ".join(text[:1000].split())
        try:
            print("broker:", line if len(text) <= 1000 else line + "...", file=sys.stderr, flush=True)
        except OSError:  # nobody can be told, nor that; but the exit status can
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


_count = _whole(1, 2**31 - 1)
# The options by name: their flags, metavar and rule (none: a flag), help. A command names those it has.
OPTIONS: dict[str, tuple[str, str, Callable[[str], object], str]] = {
    "all": ("--all", "", bool, "all of them"),
    "json": ("--json", "", bool, "one line of JSON each"),
    "stamps": ("-t --timestamps", "", bool, "the id and a tab first"),
    "number": ("-n --number", "N", _count, "up to N of them; of work: commands started"),
    "id": ("-m --message-id --message", "ID", check_id, "this message only"),
    "after": ("--after --since", "TS", parse_timestamp, "newer than this id or time"),
    "before": ("--before", "TS", parse_timestamp, "older than this id or time"),
    "wait": ("--wait", "[DURATION]", parse_duration, "until one comes"),
    "held": ("--held", "", bool, "also what is leased or delayed"),
    "delay": ("--delay", "DURATION", parse_duration, "not deliverable before that"),
    "lease_s": ("--lease --for", "DURATION", parse_duration, "length of the lease (30s)"),
    "reason": ("--reason", "TEXT", str, "why it failed, in a line"),
    "dest": ("--to --dead-letter", "QUEUE", check_queue_name, "the dead-letter queue (QUEUE.dead)"),
    "source": ("--from", "QUEUE", check_queue_name, "the dead-letter queue (QUEUE.dead)"),
    "lines": ("--lines", "", bool, "each line of standard input is a message"),
    "stats": ("--stats", "", bool, "also the total, leased and delayed"),
    "pattern": ("-p --pattern", "GLOB", str, "only queues that match"),
    "queues": ("--queue", "NAME...", str, "to this queue, made if need be; again for more"),
    "jobs": ("-j --jobs", "N", _whole(1, 1000), "commands at once (1)"),
    "timeout": ("--timeout", "DURATION", parse_duration, "end a command after that"),
    "exact": ("--exact", "", bool, "give it the body byte for byte, without a newline"),
    "max_attempts": ("--max-attempts", "N", _count, "then dead-letter (5)"),
    "backoff": ("--backoff", "DURATION", parse_duration, "first delay (0.5s); doubles"),
    "drain": ("--drain", "", bool, "end when nothing is ready, leased or waiting for its next attempt"),
    "peek": ("--peek", "", bool, "remove nothing"),
    "move": ("--move", "DEST", check_queue_name, "move instead of removing"),
    "dir": ("-d --dir", "DIR", str, "directory of the database"),
    "file": ("-f --file", "FILE", str, "database file: absolute, or a name inside DIR"),
    "quiet": ("-q --quiet", "", bool, "no progress; errors are shown"),
}
QUEUE_OPERANDS = ("QUEUE", "[QUEUE]", "SOURCE", "DEST", "OLD", "NEW")  # which are names of queues
GLOBAL_OPTIONS = ("dir", "file", "quiet")  # before or after the command
_TAKE = "all number id after before json stamps"
_WORK = "jobs number timeout exact lease_s max_attempts dest backoff drain"

# The commands: what runs them, operands, options, help.
COMMANDS: dict[str, tuple[Callable[[Options], object], str, str, str]] = {
    "write": (run_write, "QUEUE [MESSAGE|-]", "delay lines stamps json", "append a message (none or -: from stdin)"),
    "read": (run_read, "QUEUE", _TAKE + " wait", "print and remove messages"),
    "peek": (run_peek, "QUEUE", _TAKE + " wait held", "print messages"),
    "move": (run_move, "SOURCE DEST", _TAKE, "move messages to another queue and print them (not with -q)"),
    "rename": (lambda o: o.broker().rename(*o.operands), "OLD NEW", "", "give all messages of a queue to another name"),
    "requeue": (run_requeue, "QUEUE", "source number id after before", "move dead letters back; print how many"),
    "lease": (run_lease, "QUEUE", "lease_s wait id after before", "hide a message from others; print it and its lease"),
    "ack": (lambda o: o.queue().ack(o.lease()), "QUEUE LEASE", "", "acknowledge: remove a leased message"),
    "release": (run_release, "QUEUE LEASE", "delay reason", "give a leased message back"),
    "extend": (lambda o: o.queue().extend(o.lease(), o.lease_s), "QUEUE LEASE", "lease_s", "let a lease last longer"),
    "dead-letter": (run_dead_letter, "QUEUE LEASE", "reason dest", "move a leased message to the dead-letter queue"),
    "work": (run_work, "QUEUE CMD [ARG...]", _WORK, "run a command for each message, which is on its standard input"),
    "watch": (run_watch, "QUEUE", "peek move after json stamps", "print messages as they come, and remove them"),
    "top": (run_top, "", "pattern", "show the queues as they change"),
    "list": (run_list, "", "stats json pattern", "print the queues and how many messages are ready"),
    "delete": (run_delete, "[QUEUE]", "id after before all", "remove the messages of a queue, or of --all"),
    "broadcast": (run_broadcast, "MESSAGE|-", "pattern queues", "write a message to every queue that has some"),
    "dump": (run_dump, "", "pattern", "print everything as lines of JSON"),
    "load": (run_load, "", "", "read what dump printed; all or nothing"),
    "init": (run_init, "", "", "create the database here"),
    "help": (lambda o: parse_arguments([*o.operands, "--help"]), "[COMMAND]", "", "print this, or help for a command"),
    "--status": (run_status, "", "json", "print numbers of the whole database (--json)"),
    "--vacuum": (run_vacuum, "", "", "give unused space back to the file system"),
    "--cleanup": (run_cleanup, "", "", "delete the database and the files that belong to it"),
    "--version": (lambda o: print(f"simplebroker {__version__}", flush=True), "", "", "print the version"),
}
# What those answer that would make a database, or need one, where there is none. Others look only, or wait.
WITHOUT_DATABASE = {
    **dict.fromkeys(("move", "rename", "requeue", "delete", "--status"), NOTHING), "--vacuum": DONE,
    **dict.fromkeys(("ack", "release", "extend", "dead-letter"), ERROR),
}  # fmt: skip
HELP_END = """\
Exit status: 0 done; 1 error; 2 nothing there (queue empty, no match).
TS is a 19-digit id, an ISO 8601 time, or Unix time. DURATION is 90, 90s, 5m, 2h, 1d or 250ms.
BROKER_BUSY_TIMEOUT, BROKER_SYNC_MODE and other settings: see README.md."""


def parse_arguments(argv: Sequence[str]) -> Options:
    """Options and operands in any order; what follows "--" are operands. UsageError if it makes no sense."""
    options = Options()
    options.name, words, literal = _split(argv)
    if options.name and options.name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(options.name[:40], COMMANDS, 1)
        hint = f": did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"unknown command {shown(options.name)}{hint}; see broker --help")
    if not options.name or any(map(_is_option, words)):  # argparse takes half the time of a start
        words = _parse_options(options, words)
    if not options.name:
        raise UsageError("no command; see broker --help")
    options.run, spec, *_ = COMMANDS[options.name]
    options.operands = [*words, *literal]
    _check_operands(options, spec)
    return options


def _split(argv: Sequence[str]) -> tuple[str, list[str], Sequence[str]]:
    """The command, "" if there is none; the other words before the first "--", or before CMD of ``work``; the rest."""
    # argparse gives "--" and late operands different meanings in different versions of Python: it sees neither.
    valued = {flag for row in OPTIONS.values() if row[1][:1] not in ("", "[") for flag in row[0].split()}
    end = argv.index("--") if "--" in argv else len(argv)
    words, rest = list(argv[:end]), argv[end + 1 :]
    places: list[int] = []
    indexed = enumerate(words)
    for index, word in indexed:
        if word in valued:
            next(indexed, None)
        elif not _is_option(word) or (word in COMMANDS and not places):
            places.append(index)
    if len(places) > 2 and words[places[0]] == "work":
        words, rest = words[: places[2]], argv[places[2] :]
    return words.pop(places[0]) if places else "", words, rest


def _is_option(word: str) -> bool:
    return word[:1] == "-" and word != "-"


def _parse_options(options: Options, words: list[str]) -> list[str]:
    """Set what the options say; return the operands."""
    names = [*(COMMANDS[options.name][2].split() if options.name else ()), *GLOBAL_OPTIONS]
    parser = _make_parser(options.name, names)
    known = {flag for name in names for flag in OPTIONS[name][0].split()} | {"-h", "--help"}
    has_text = options.name in ("write", "broadcast")  # which may begin with "-": argparse would read -hello as -h ...
    for word in filter(_is_option, words):
        flag = word.partition("=")[0] if word[:2] == "--" else word if has_text else word[:2]
        if flag not in known:
            what = f"unknown option {shown(word)}: if it is text, write '--' before it"
            raise UsageError(f"{what}; see {parser.prog} --help")
    if "--wait" in words:  # at the end, if the word that follows it is no duration
        place = words.index("--wait")
        try:
            parse_duration("".join(words[place + 1 : place + 2]))
        except ValueError:
            words.append(words.pop(place))
    _, operands = parser.parse_known_args(words, options)
    for value in vars(options).values():
        if isinstance(value, list) and (not value or [] in value):  # from argparse before Python 3.13
            raise UsageError(f"'--' cannot be the value of an option; see {parser.prog} --help")
    return operands


def _check_operands(options: Options, spec: str) -> None:
    """UsageError for too few, too many, or names that are none."""
    names, operands, help = spec.split(), options.operands, f"see broker {options.name} --help"
    if len(operands) < sum(not name.startswith("[") for name in names):
        raise UsageError(f"{options.name} needs {spec}; {help}")
    if len(operands) > len(names) and not spec.endswith("...]"):
        extra = shown(operands[len(names)])
        raise UsageError(f"{options.name} takes {spec or 'no operands'}, not {extra}: quote text; {help}")
    if sum(value is not None for value in (options.id, options.number, options.all)) > 1:
        raise UsageError("-m, -n and --all exclude each other")
    queues = [check_queue_name(word) for word, name in zip(operands, names) if name in QUEUE_OPERANDS]
    queues += filter(None, (options.source, options.dest, options.move))
    if len(set(queues)) < len(queues):
        raise UsageError(f"{options.name}: both names are {queues[0]!r}")
    narrowed = any(value is not None for value in (options.id, options.after, options.before))
    if options.name == "delete" and (bool(options.all) == bool(queues) or (options.all and narrowed)):
        raise UsageError(f"delete takes a queue, with or without -m, --after and --before, or --all; {help}")


def _make_parser(name: str, names: Iterable[str]) -> argparse.ArgumentParser:
    """The parser of the options of a command; without a name, the one that tells of all commands."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message}; see {self.prog} --help")

        def print_help(self, file: Any = None) -> None:
            print(self.format_help(), end="", flush=True)  # the one of argparse hides that it cannot be written

    def value_of(rule: Callable[[str], object], text: str) -> object:
        try:
            return rule(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    usage, text = "broker [-d DIR] [-f FILE] [-q] COMMAND ...", "A durable message queue in one file.\n\ncommands:\n"
    text += "".join(f"  {command:12} {row[3]}\n" for command, row in COMMANDS.items())
    if name:
        usage, text = f"broker {name} [options] {COMMANDS[name][1]}".strip(), COMMANDS[name][3]
    parser = Parser(
        f"broker {name}".strip(), usage, text[0].upper() + text[1:], HELP_END, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # with a width, or it would import shutil to ask for that of the terminal
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
    )  # fmt: skip
    for option in names:
        flags, metavar, rule, about = OPTIONS[option]
        value = {"metavar": metavar.strip("[]"), "type": partial(value_of, rule)}
        more: dict[str, Any] = value if metavar else {"action": "store_true"}
        if metavar[:1] == "[":
            more.update(nargs="?", const=float("inf"))
        if metavar[-3:] == "...":
            more["action"] = "append"
        parser.add_argument(*flags.split(), dest=option, help=about, **more)
    return parser


# ---------------------------------------------------------------------------------------------------
# main, and the name simplebroker.ext
# ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 error, 2 nothing there."""
    try:
        return run_command(sys.argv[1:] if argv is None else list(argv))
    except BrokenPipeError:
        return DONE
    except (BrokerError, ValueError, OSError, MemoryError, ImportError) as error:
        complain(f"error: {str(error) or type(error).__name__}")
        return ERROR
    except KeyboardInterrupt:
        return 128 + 2  # as shells report SIGINT
    except SystemExit as end:  # after --help, or a signal
        return int(end.code or DONE)


def run_and_exit() -> NoReturn:
    """The command: main(), and the end of the process, without the milliseconds in which Python would take itself
    apart. All is closed and flushed, and what others have registered with atexit is called."""
    try:
        atexit.unregister(_end_notifiers)  # nothing that they could hold is needed any more
        status = main()
        atexit._run_exitfuncs()
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # what main() could not print, which it has told, is still there
        pass
    except KeyboardInterrupt:  # in the last moment
        status = 128 + 2
    os._exit(status)


def run_command(argv: Sequence[str]) -> int:
    """Parse, run, close."""
    options = parse_arguments(argv or ["--help"])
    try:
        status = WITHOUT_DATABASE.get(options.name)
        if status is None or options.broker().exists():
            found = options.run(options)
            return DONE if found is None or found else NOTHING
        if status == ERROR or options.name == "--status":
            complain(f"{'error: ' * (status == ERROR)}there is no database {options.broker().path!r}")
        return status
    finally:
        if options.opened is not None:
            options.opened.close()


# One file, and still ``from simplebroker.ext import SQLRunner`` works, also where the file is vendored
# under another name: a module may register others, as os does with os.path. Run as __main__ it is also
# "simplebroker", so that a runner's module that imports that finds this one.
ext = type(sys)(f"{__name__}.ext", "What extensions of SimpleBroker need: runners, ids, errors, SQL.")
ext.__dict__.update({name: globals()[name] for name in __all__})
ext.__dict__.update({name: value for name, value in list(globals().items()) if name.isupper() and name[0] != "_"})
for _name in (__name__, "simplebroker") if __name__ == "__main__" else (__name__,):
    sys.modules.setdefault(_name, sys.modules[__name__])
    sys.modules.setdefault(f"{_name}.ext", ext)

if __name__ == "__main__":
    run_and_exit()
