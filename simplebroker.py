#!/usr/bin/env python3
"""SimpleBroker: a durable message queue in one file, on SQLite. No server.

Vocabulary
    message       a text body with an id, in one queue
    id            positive 63-bit integer that only grows: nanoseconds since 1970, low 12 bits a counter
    ready         deliverable now
    held          not deliverable before a time: *leased* (attempt > 0) or *delayed* (attempt = 0)
    attempt       how many times the message has been leased; with the id it is the fencing token
    dead-letter   the queue for messages whose attempts are used up, QUEUE.dead unless told otherwise

    write ------------> READY -- read -------------> gone
      | delay           |   ^
      +--> DELAYED -due-+   | release, or the lease ended
                      lease |
                        v   |
                       LEASED -- ack --------------> gone
                            +--- attempts used up -> READY in QUEUE.dead

Promises
    Durable      when write() returns, the message survives a crash of the process, and of the machine
                 with BROKER_SYNC_MODE=FULL (the default)
    Ordered      a queue delivers in the order of ids; ids are given out in commit order, across
                 processes, even when the clock steps back
    Never lost   read() removes and returns in one transaction (at most once); what hands a message to
                 code or to a pipe leases it first and removes it afterwards (at least once)
    Never stuck  a lease ends by itself; a stale consumer cannot acknowledge what was given to another
    Portable     Python 3.9+, SQLite 3.8.3+; Linux, macOS, Windows; CPython and PyPy

Exit statuses of the command: 0 done; 1 error, one line on standard error; 2 nothing there.

The rooms of this file, each using only the rooms above it: constants, errors and Message, settings,
SQL, timestamps, paths, writer lock, waiting, runners, Broker, Queue, watchers, command line, main.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import sys
import threading
import time
import weakref
from collections import namedtuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TYPE_CHECKING = False  # what only annotations need is not imported at run time: start-up is a feature
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import datetime
    from types import FrameType, TracebackType
    from typing import Any, Callable, NoReturn, TypeVar, Union

    T = TypeVar("T")
    StrPath = Union[str, os.PathLike[str]]
    Id = Union[int, str, None]
    Run = Callable[..., list[Any]]
    Handler = Callable[["Message", int], object]
    ErrorHandler = Callable[[BaseException, "Message", int], Union[bool, None]]

__version__ = "1.0.0"
# Queues and consumers; handlers for watchers; errors; extensions.
__all__ = ["Broker", "LeaseKeeper", "Message", "Queue", "QueueMoveWatcher", "QueueWatcher", "Settings", "Stats"]
__all__ += ["default_error_handler", "json_print_handler", "logger_handler", "simple_print_handler"]
__all__ += ["BrokerError", "DatabaseError", "IntegrityError", "LeaseLost", "MessageError", "OperationalError"]
__all__ += ["QueueNameError", "UsageError", "SQLRunner", "SQLiteRunner", "TimestampGenerator", "WriterLock", "main"]

# ---------------------------------------------------------------------------------------------------
# Constants: every number has its unit in its name.
# ---------------------------------------------------------------------------------------------------

APPLICATION_ID = 0x53424B52  # "SBKR" in the header of the database file
SCHEMA_VERSION = 1
ID_COUNTER_MASK = 0xFFF  # the low 12 bits of an id
ID_DIGITS = 19
MAX_ID = 2**63 - 2**32  # ids stay below this, so far from the end of the integers that sums cannot overflow
MAX_QUEUE_NAME = 512  # characters
DEFAULT_LEASE_S = 30.0
DEFAULT_MAX_ATTEMPTS = 5
GIVEN_BACK = -1  # attempt of a message whose keeper gave it back
BACKOFF_S = 0.5  # delay after the first failed attempt; doubles with each further one ...
MAX_BACKOFF_S = 300.0  # ... up to this
MAX_BATCH = 1000  # messages in one transaction of a long operation
PAGE_BYTES = 2048  # of new databases: a small write is logged page by page, and 4096 make it 1.25 times slower
BATCH_BYTES = 1 << 20  # a batch that is heavier than this makes the next one smaller ...
FAST_BATCH_S = 0.1  # ... and so does one that its consumer worked on for longer than this
NS = 1_000_000_000  # nanoseconds in a second

# ---------------------------------------------------------------------------------------------------
# Errors and Message: one base for all errors; a message is its body, and knows where it came from.
# ---------------------------------------------------------------------------------------------------


class BrokerError(Exception):
    """Base of everything that this module raises on its own account."""


class OperationalError(BrokerError, sqlite3.OperationalError):
    """The database is busy, full, read-only or cannot be opened. Trying again later may work."""


class IntegrityError(BrokerError, sqlite3.IntegrityError):
    """A constraint of the database would be violated, such as an id that exists already."""


class DatabaseError(BrokerError, sqlite3.DatabaseError):
    """The file is not a SimpleBroker database, is damaged, or is of a newer version."""


class QueueNameError(BrokerError, ValueError):
    """A queue name that is not allowed."""


class MessageError(BrokerError, ValueError):
    """A body that is too large or is not text."""


class UsageError(BrokerError, ValueError):
    """A path, setting, dump or command line that makes no sense, or a queue that was closed."""


class LeaseLost(BrokerError):
    """The lease ended and the message was given to another consumer, moved or removed."""


class Message(str):
    """A message body that also carries its id, queue and attempt. Everywhere else it is a str.

    >>> m = Message("hello", 1837025672140161024, "tasks")
    >>> m, m.id, m.time.isoformat()
    ('hello', 1837025672140161024, '2028-03-18T20:54:32.140161+00:00')
    """

    __slots__ = ("attempt", "id", "queue")
    id: int
    queue: str
    attempt: int

    def __new__(cls, body: str, id: int, queue: str, attempt: int = 0) -> Message:
        self = str.__new__(cls, body)
        self.id, self.queue, self.attempt = id, queue, attempt
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:  # copies and pickles keep everything
        return str(self), self.id, self.queue, self.attempt

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
    if not (0 < len(name) <= MAX_QUEUE_NAME and name[0] not in "-." and _QUEUE_CHARACTERS.issuperset(name)):
        raise QueueNameError(
            f"queue name {name[:60]!r}{'...' * (len(name) > 60)} is not allowed: use 1 to {MAX_QUEUE_NAME} letters,"
            " digits, '_', '.' or '-', and begin with none of '.' and '-'"
        )
    return str(name)


def check_body(body: str, max_bytes: int) -> str:
    """Return the body as an exact str if it is text that fits."""
    if not isinstance(body, str):
        raise TypeError(f"a message body is a str, not {type(body).__name__}: encode data, for example as JSON")
    try:
        size = len(body) if body.isascii() else len(body.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise MessageError(f"the body is not valid text: {error.reason} at character {error.start}") from None
    if size > max_bytes:
        raise MessageError(f"the body has {size} bytes, more than the {max_bytes} that BROKER_MAX_MESSAGE_SIZE allows")
    return str(body)


def check_limit(limit: int, name: str = "limit") -> int:
    """A number of messages or attempts: a positive int."""
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"{name} is an int, not {type(limit).__name__}")
    if limit < 1:
        raise ValueError(f"{name} must be at least 1, not {limit}")
    return min(limit, 2**31)


def log_warning(text: str, *values: object) -> None:
    """Log to the logger "simplebroker"; logging is imported when there is something to say."""
    import logging

    logging.getLogger("simplebroker").warning(text, *values)


# ---------------------------------------------------------------------------------------------------
# Settings: what can be configured. Read once, frozen, and passed on.
# ---------------------------------------------------------------------------------------------------


def _whole(low: int, high: int) -> Callable[[str], int]:
    """A rule that takes plain decimal integers from low to high."""

    def rule(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ValueError(text)
        return int(text)

    return rule


def _seconds(text: str) -> float:
    if not (set(text) <= set("0123456789.") and 0.001 <= float(text) <= 60):
        raise ValueError(text)
    return float(text)


def _one_of(**words: object) -> Callable[[str], Any]:
    """A rule that takes certain words, in either case, and gives what they stand for."""

    def rule(text: str) -> object:
        if text.upper() not in words:
            raise ValueError(text)
        return words[text.upper()]

    return rule


def _relative_file(text: str) -> str:
    if not text or os.path.isabs(text) or ".." in text.replace("\\", "/").split("/") or has_controls(text):
        raise ValueError(text)
    return text


def _directory(text: str) -> str | None:
    if text and (not os.path.isabs(text) or has_controls(text)):
        raise ValueError(text)
    return text or None


def has_controls(text: str) -> bool:
    """Are there control characters in it?"""
    return any(ord(character) < 32 or ord(character) == 127 for character in text)


_flag = _one_of(**{"1": True, "TRUE": True, "YES": True, "0": False, "FALSE": False, "NO": False, "": False})
_RULES: tuple[tuple[str, str, object, Callable[[str], Any], str], ...] = (
    # attribute, environment variable, default, rule, what is allowed
    ("busy_timeout_ms", "BROKER_BUSY_TIMEOUT", 5000, _whole(0, 2**31 - 1), "whole milliseconds, such as 5000"),
    ("sync_mode", "BROKER_SYNC_MODE", "FULL", _one_of(FULL="FULL", NORMAL="NORMAL", OFF="OFF"), "FULL, NORMAL or OFF"),
    ("cache_mb", "BROKER_CACHE_MB", 10, _whole(1, 65536), "whole megabytes from 1"),
    ("wal_autocheckpoint", "BROKER_WAL_AUTOCHECKPOINT", 2000, _whole(1, 10**9), "a whole number of pages from 1"),
    ("max_message_size", "BROKER_MAX_MESSAGE_SIZE", 10 << 20, _whole(1, 10**9), "whole bytes from 1 to 1000000000"),
    ("max_interval_s", "BROKER_MAX_INTERVAL", 0.1, _seconds, "seconds from 0.001 to 60"),
    ("db_name", "BROKER_DEFAULT_DB_NAME", ".broker.db", _relative_file, "a relative file name without '..'"),
    ("db_location", "BROKER_DEFAULT_DB_LOCATION", None, _directory, "an absolute directory"),
    ("project_scope", "BROKER_PROJECT_SCOPE", False, _flag, "1 or 0"),
)


class Settings:
    """What can be configured; frozen. UsageError for a bad value names what is allowed.

    busy_timeout_ms     how long an operation waits for other writers before OperationalError
    sync_mode           FULL: a write survives a power cut; NORMAL: the last ones may be lost, the file
                        stays sound; OFF: no syncing at all
    cache_mb            SQLite's page cache
    wal_autocheckpoint  pages in the write-ahead log before it is copied back
    max_message_size    bytes of a body in UTF-8
    max_interval_s      how often a waiting consumer looks by itself; ten times as rarely where inotify works
    db_name             file name of the database, where none is given
    db_location         directory of the database, where none is given; None: the current directory
    project_scope       look for the database in the parent directories too

    >>> Settings({"BROKER_SYNC_MODE": "normal"}, cache_mb=5).sync_mode
    'NORMAL'
    """

    __slots__ = tuple(rule[0] for rule in _RULES)
    if TYPE_CHECKING:
        busy_timeout_ms: int
        sync_mode: str
        cache_mb: int
        wal_autocheckpoint: int
        max_message_size: int
        max_interval_s: float
        db_name: str
        db_location: str | None
        project_scope: bool

    def __init__(self, environ: Mapping[str, str] | None = None, **values: object) -> None:
        """Values by keyword; else from the BROKER_* variables in ``environ``; else the defaults."""
        for attribute, variable, default, rule, allowed in _RULES:
            name, given = attribute, default
            if attribute in values:
                given = values.pop(attribute)
            elif environ is not None and variable in environ:
                name, given = variable, environ[variable]
            try:
                object.__setattr__(self, attribute, rule("" if given is None else str(given)))
            except ValueError:
                raise UsageError(f"{name}={given!r}: must be {allowed}") from None
        if values:
            raise TypeError(f"there is no setting {', '.join(values)}: give {', '.join(self.__slots__)}")

    @classmethod
    def from_environment(cls) -> Settings:
        """The settings that the BROKER_* variables of this process ask for."""
        return cls(os.environ)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("Settings are frozen: make new ones")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("Settings are frozen: make new ones")

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles
        return _settings_from_key, self.key()

    def key(self) -> tuple[Any, ...]:
        """All values, for comparing."""
        return tuple(getattr(self, name) for name in self.__slots__)


def _settings_from_key(*values: Any) -> Settings:
    return Settings(**dict(zip(Settings.__slots__, values)))


# ---------------------------------------------------------------------------------------------------
# SQL: every statement that the broker runs, once, by name. A runner for another database translates these.
# The parameters are numbered. Bounds of ids are always given and strict: 0 and MAX_ID stand for "none".
# ---------------------------------------------------------------------------------------------------

CREATE_META = """\
CREATE TABLE IF NOT EXISTS meta (
    singleton INTEGER PRIMARY KEY CHECK (singleton = 1),
    version INTEGER NOT NULL,
    last_id INTEGER NOT NULL
)"""
CREATE_MESSAGES = """\
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY,
    queue TEXT NOT NULL,
    body TEXT NOT NULL,
    held_until INTEGER,
    attempt INTEGER NOT NULL DEFAULT 0
)"""
CREATE_READY_INDEX = "CREATE INDEX IF NOT EXISTS ready ON messages (queue, id) WHERE held_until IS NULL"
CREATE_HELD_INDEX = "CREATE INDEX IF NOT EXISTS held ON messages (held_until) WHERE held_until IS NOT NULL"
INSERT_META = f"""\
INSERT INTO meta (singleton, version, last_id)
SELECT 1, {SCHEMA_VERSION}, 0 WHERE NOT EXISTS (SELECT 1 FROM meta)"""
SCHEMA = (CREATE_META, CREATE_MESSAGES, CREATE_READY_INDEX, CREATE_HELD_INDEX, INSERT_META)
SELECT_VERSION = "SELECT version FROM meta"
SELECT_OBJECTS = "SELECT type, name, tbl_name, sql FROM sqlite_master"

# The last id ever given out is the greater of meta.last_id and the highest id in the table, so that a
# write touches no page of meta. Whoever removes the highest message notes it first (RECORD_NEWEST).
_LAST_ID = "max(last_id, ifnull((SELECT max(id) FROM messages), 0))"
SELECT_LAST_ID = f"SELECT {_LAST_ID} FROM meta"
RECORD_NEWEST = f"UPDATE meta SET last_id = {_LAST_ID}"
RECORD_LAST_ID = "UPDATE meta SET last_id = max(last_id, ?1)"
# Gives out ?2 if ?1 is still the last id; else NULL violates the constraint (IntegrityError).
ADVANCE_LAST_ID = f"UPDATE meta SET last_id = CASE WHEN {_LAST_ID} = ?1 THEN ?2 END"

# Writes one message if ?1 is above the last id; else NULL violates the constraint (IntegrityError).
# One statement that checks its own id costs half of BEGIN, SELECT, INSERT, COMMIT. (INSERT ... SELECT would
# gather its rows in a temporary table first.) SQLiteRunner also refuses it while others write: its id would be too
# old after the wait. Whoever is refused inserts in a transaction, which threads share.
INSERT_MESSAGE = f"""\
INSERT INTO messages (id, queue, body, held_until)
VALUES (?1, (SELECT CASE WHEN ?1 > {_LAST_ID} THEN ?2 END FROM meta), ?3, ?4)"""
INSERT_ONE = "INSERT INTO messages (id, queue, body, held_until) VALUES (?1, ?2, ?4, ?3)"
BATCH_ROWS = 64
INSERT_BATCH = "INSERT INTO messages (id, queue, body, held_until) VALUES " + ", ".join(
    f"(?1 + {row}, ?2, ?{row + 4}, ?3)" for row in range(BATCH_ROWS)
)
INSERT_LOADED = "INSERT INTO messages (id, queue, body, held_until, attempt) VALUES (?1, ?2, ?3, ?4, ?5)"

PROMOTE_DUE = "UPDATE messages SET held_until = NULL WHERE held_until <= ?1"
# The last two columns: the highest id of all, and whether something held has become due (by ?5).
SELECT_READY = """\
SELECT id, body, attempt, (SELECT max(id) FROM messages), EXISTS (SELECT 1 FROM messages WHERE held_until <= ?5)
FROM messages WHERE queue = ?1 AND held_until IS NULL AND id > ?2 AND id < ?3 ORDER BY id LIMIT ?4"""
DELETE_READY = "DELETE FROM messages WHERE queue = ?1 AND held_until IS NULL AND id > ?2 AND id < ?3"
MOVE_READY = """\
UPDATE messages SET queue = ?4, attempt = 0 WHERE queue = ?1 AND held_until IS NULL AND id > ?2 AND id < ?3"""
LEASE_READY = """\
UPDATE messages SET held_until = ?4, attempt = attempt + 1
WHERE queue = ?1 AND held_until IS NULL AND id > ?2 AND id < ?3"""

SELECT_MESSAGE = "SELECT attempt, (SELECT max(id) FROM messages) FROM messages WHERE id = ?1 AND queue = ?2"
DELETE_MESSAGE = "DELETE FROM messages WHERE id = ?1"
DELETE_HELD = "DELETE FROM messages WHERE held_until IS NOT NULL AND queue = ?1"
RELEASE_MESSAGE = "UPDATE messages SET held_until = ?2 WHERE id = ?1"
MOVE_MESSAGE = "UPDATE messages SET queue = ?2, held_until = NULL, attempt = 0 WHERE id = ?1"
RENEW_LEASE = "UPDATE messages SET held_until = ?4 WHERE id = ?1 AND queue = ?2 AND attempt = ?3"
# Gives back a message that no handler has seen: the lease does not count as an attempt.
UNLEASE_MESSAGE = """\
UPDATE messages SET held_until = NULL, attempt = attempt - 1 WHERE id = ?1 AND queue = ?2 AND attempt = ?3"""

# Readers write nothing, so what is due but not promoted yet is read beside what is ready. The "+" keeps
# SQLite from finding the few that are due by walking through all ids.
SELECT_PEEK = """\
SELECT * FROM (SELECT id, body, attempt FROM messages
    WHERE queue = ?1 AND held_until IS NULL AND id > ?2 AND id < ?3 ORDER BY id LIMIT ?4)
UNION ALL
SELECT * FROM (SELECT id, body, attempt FROM messages
    WHERE held_until <= ?5 AND queue = ?1 AND +id > ?2 AND +id < ?3 ORDER BY +id LIMIT ?4)
ORDER BY 1 LIMIT ?4"""
SELECT_PENDING = """\
SELECT EXISTS (SELECT 1 FROM messages WHERE queue = ?1 AND held_until IS NULL AND id > ?2 AND id < ?3)
OR EXISTS (SELECT 1 FROM messages WHERE held_until <= ?4 AND queue = ?1 AND +id > ?2 AND +id < ?3)"""
# All messages of a queue, held or not, in the order of the table.
SELECT_ANY = """\
SELECT id, body, attempt, held_until FROM messages WHERE queue = ?1 AND id > ?2 AND id < ?3 ORDER BY id LIMIT ?4"""
SELECT_COUNT = """\
SELECT (SELECT count(*) FROM messages WHERE queue = ?1 AND held_until IS NULL)
     + (SELECT count(*) FROM messages WHERE held_until <= ?2 AND queue = ?1)"""
SELECT_STATS = """\
SELECT (SELECT count(*) FROM messages WHERE queue = ?1 AND held_until IS NULL) + ifnull(sum(held_until <= ?2), 0),
       ifnull(sum(held_until > ?2 AND attempt > 0), 0), ifnull(sum(held_until > ?2 AND attempt = 0), 0)
FROM messages WHERE held_until IS NOT NULL AND queue = ?1"""
SELECT_QUEUES = """\
SELECT queue, sum(ready), sum(leased), sum(delayed) FROM (
    SELECT queue, count(*) AS ready, 0 AS leased, 0 AS delayed
    FROM messages WHERE held_until IS NULL GROUP BY queue
    UNION ALL
    SELECT queue, sum(held_until <= ?1), sum(held_until > ?1 AND attempt > 0), sum(held_until > ?1 AND attempt = 0)
    FROM messages WHERE held_until IS NOT NULL GROUP BY queue
) GROUP BY queue ORDER BY queue"""
SELECT_NEXT_DUE = "SELECT min(held_until) FROM messages WHERE held_until > ?1"
SELECT_DATA_VERSION = "PRAGMA data_version"
SELECT_PAGES = "PRAGMA page_count"
SELECT_PAGE_SIZE = "PRAGMA page_size"
VACUUM = "VACUUM"
TRUNCATE_WAL = "PRAGMA wal_checkpoint(TRUNCATE)"

# What may make a message deliverable, now or at a time: a commit with one of these rings the doorbell.
RINGING = frozenset([INSERT_MESSAGE, INSERT_ONE, INSERT_BATCH, INSERT_LOADED, MOVE_READY, MOVE_MESSAGE])
RINGING |= {RELEASE_MESSAGE, UNLEASE_MESSAGE}

# ---------------------------------------------------------------------------------------------------
# Timestamps: ids, and the times and durations that people write.
# ---------------------------------------------------------------------------------------------------


class TimestampGenerator:
    """Gives out message ids: the only source of them.

    The next id is ``max(now & ~0xFFF, last + 1)``: it follows the clock, never goes back when the clock
    does, and never waits for it. ``clock`` returns nanoseconds since 1970.
    """

    def __init__(self, runner: SQLRunner, clock: Callable[[], int] = time.time_ns) -> None:
        self._runner, self._clock = runner, clock

    def generate(self) -> int:
        """Return the next id and record it, in the caller's transaction if one is open.

        One conditional statement does both, so it is atomic outside a transaction too.
        """
        while True:
            last = self._runner.run(SELECT_LAST_ID, fetch=True)[0][0]
            new = self.after(last, 1)
            try:
                self._runner.run(ADVANCE_LAST_ID, (last, new))
                return new
            except sqlite3.IntegrityError:  # someone else was between the two; the next look sees theirs
                continue

    def now(self) -> int:
        """What the next id is unless the last one is higher. INSERT_MESSAGE checks that it is not."""
        return self._clock() & ~ID_COUNTER_MASK

    def after(self, last: int, count: int) -> int:
        """The first of ``count`` consecutive ids above ``last``."""
        first = max(self.now(), last + 1)
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
            raise ValueError(f"{name} {value[:40]!r} is not an id: give an int or {ID_DIGITS} digits")
        value = int(value)
    elif not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is an int or a string of {ID_DIGITS} digits, not {type(value).__name__}")
    if not 0 <= value < 2**63:
        raise ValueError(f"{name} {value} is not a positive 63-bit integer")
    return value


def id_range(message_id: Id = None, after: Id = None, before: Id = None) -> tuple[int, int]:
    """The strict bounds that three filters mean together; None does not limit."""
    low = 0 if after is None else check_id(after, "after")
    high = MAX_ID if before is None else min(MAX_ID, check_id(before, "before"))
    if message_id is not None:
        wanted = check_id(message_id)
        low, high = max(low, wanted - 1), min(high, wanted + 1)
    return low, high


def to_ns(seconds: float, name: str = "delay") -> int:
    """Seconds as nanoseconds; refuses negative ones, and more than a century."""
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        raise TypeError(f"{name} is a number of seconds, not {type(seconds).__name__}")
    if not 0 <= seconds <= 100 * 366 * 86400:  # refuses nan and infinity too
        raise ValueError(f"{name} {seconds!r} must be from 0 seconds to 100 years")
    return int(seconds * NS)


def datetime_to_ns(moment: datetime) -> int:
    """An aware datetime as nanoseconds since 1970, exactly (floats would lose the last digits)."""
    from datetime import datetime, timedelta, timezone

    if not isinstance(moment, datetime):
        raise TypeError(f"a time is an aware datetime or nanoseconds since 1970, not {type(moment).__name__}")
    if moment.tzinfo is None:
        raise ValueError(f"{moment.isoformat()} has no time zone: add tzinfo=timezone.utc or another one")
    return (moment - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1) * 1000


_DURATION_UNITS_S = {"": "1", "ms": "0.001", "s": "1", "m": "60", "h": "3600", "d": "86400"}
_TIME_UNITS_NS = {"s": NS, "ms": 1_000_000, "us": 1_000, "ns": 1}


def parse_duration(text: str) -> float:
    """Seconds from '90', '90s', '5m', '2h', '1d', '250ms'; fractions are allowed.

    >>> [parse_duration(t) for t in ("90", "1.5m", "250ms")]
    [90.0, 90.0, 0.25]
    """
    import re
    from decimal import Decimal

    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)(ms|s|m|h|d|)", text, re.ASCII)
    if not match:
        raise ValueError(f"{text[:60]!r} is not a duration: write 90, 90s, 5m, 2h, 1d or 250ms")
    seconds = float(Decimal(match[1]) * Decimal(_DURATION_UNITS_S[match[2]]))
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
        raise ValueError(f"{text[:60]!r} is outside the times that ids can have (1970 to 2262)")
    return ns


def _parse_iso(text: str) -> datetime:
    import re
    from datetime import datetime

    # Python 3.9 takes fewer forms than later ones; take the same everywhere.
    form = r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(:\d\d)?(\.\d{1,6})?(Z|[+-]\d\d:?\d\d)?)?"
    match = re.fullmatch(form, text, re.ASCII | re.IGNORECASE)
    try:
        day, minute, second, fraction, zone = (part or "" for part in match.groups() if match)  # type: ignore[union-attr]
        offset = "+00:00" if zone in "Zz" else zone[:3] + ":" + zone[-2:]
        fraction = (fraction or ".").ljust(7, "0")
        return datetime.fromisoformat(f"{day}T{minute or '00:00'}{second or ':00'}{fraction}{offset}")
    except (AttributeError, ValueError):
        raise ValueError(
            f"{text[:60]!r} is not a time: give a {ID_DIGITS}-digit id, 2024-01-15, 2024-01-15T10:30:00Z, or Unix"
            " time such as 1705314600, 1705314600s or 1705314600000ms"
        ) from None


# ---------------------------------------------------------------------------------------------------
# Paths: where the database is, and that it stays where it was put.
# ---------------------------------------------------------------------------------------------------


def database_path(settings: Settings, directory: StrPath | None = None, file: StrPath | None = None) -> str:
    """The absolute path of the database that these options mean. Opens and makes nothing.

    An absolute file stands for itself. A relative one stays inside the directory, symbolic links
    resolved. Neither given: the nearest one upwards in project scope, else BROKER_DEFAULT_DB_LOCATION,
    else the current directory.
    """
    name = settings.db_name if file is None else _clean_path(file)
    if os.path.isabs(name):
        if directory is not None:
            raise UsageError(f"{name!r} is absolute: give a directory or an absolute file, not both")
        return os.path.realpath(name)
    if directory is not None:
        base = _clean_path(directory)
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
        raise UsageError(f"the file {name!r} leads out of {root!r}, to {full!r}: use an absolute path")
    return full


def api_path(settings: Settings, path: StrPath | None) -> str:
    """The absolute path that ``db_path`` of the Python API means: any file, or None for the default."""
    return database_path(settings) if path is None else os.path.realpath(_clean_path(path))


def _clean_path(path: StrPath) -> str:
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError("a database path is a str or a path of str")
    if not text or has_controls(text):
        raise UsageError(f"the path {text!r} is empty or has control characters")
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

# ---------------------------------------------------------------------------------------------------
# Writer lock: writers of all processes queue here instead of sleeping in SQLite's busy handler.
# The file beside the database is never deleted but by --cleanup, and is the doorbell of the watchers too.
# ---------------------------------------------------------------------------------------------------

LOCK_SUFFIX = ".lock"
LOCK_THREAD_NAME = "simplebroker-lock"  # of one that blocks in flock()
LOCK_PAUSE_S = 0.001  # between looks for the lock, before blocking
LOCK_LOOKS = 2  # that the next in the queue takes before it blocks and so, usually, ends the holder's turn
LOCK_TURN_S = 0.003  # after which the holder lets go by itself: longer than those looks take ...
LOCK_YIELD_S = 0.002  # ... and stays away for so long ...
LOCK_TRUST_S = 0.02  # ... or, if that was in vain because the next is stopped, does so again after this
LOCK_CHECK_S = 0.1  # how often a waiter looks past its place in the queue, and the file is compared with its path


def _lock(fd: int, block: bool) -> None:
    """Lock the file; OSError if it is locked (BlockingIOError, PermissionError) or cannot be."""
    if fcntl is not None:
        fcntl.flock(fd, fcntl.LOCK_EX if block else fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        _windows_lock(fd, "LK_NBLCK")


def _unlock(fd: int) -> None:
    if fcntl is not None:
        fcntl.flock(fd, fcntl.LOCK_UN)
    else:
        _windows_lock(fd, "LK_UNLCK")


def _lock_turn(fd: int) -> bool:
    """Wait to be the next for the lock. Only a courtesy: it is lost when the process closes the file elsewhere."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, 1 << 30)
    except OSError:
        return False
    return True


def _unlock_turn(fd: int) -> None:
    fcntl.lockf(fd, fcntl.LOCK_UN, 1, 1 << 30)


def _someone_is_next(fd: int) -> bool:
    """Does a waiter of another process have its turn? Where the two kinds of locks are one, nobody knows."""
    if sys.platform != "linux":
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1 << 30)
    except OSError as error:
        return isinstance(error, (BlockingIOError, PermissionError))
    _unlock_turn(fd)
    return False


def _write_byte(fd: int) -> None:
    if hasattr(os, "pwrite"):
        os.pwrite(fd, b"\n", 0)
    else:
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"\n")


def _windows_lock(fd: int, mode: str) -> None:
    try:
        import msvcrt
    except ImportError:
        raise NotImplementedError("this platform has no file locks") from None
    os.lseek(fd, 1 << 30, os.SEEK_SET)  # these locks are mandatory: keep clear of the byte that rings
    msvcrt.locking(fd, getattr(msvcrt, mode), 1)  # type: ignore[attr-defined]


def file_identity(path: str) -> tuple[int, int] | None:
    """Device and inode of the file that a path names; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def remove_file(path: str) -> None:
    """Remove a file, unless there is none: someone else may just have removed it."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


class WriterLock:
    """The advisory lock on DATABASE.lock: one holder among all processes. Not for two threads at once.

    The kernel releases the lock of a killed holder. A stopped holder makes acquire() raise
    OperationalError at its deadline. Where files cannot be locked, or the lock file cannot be made (a
    read-only directory), SQLite's own locking has to be enough: correct, only slower.
    """

    def __init__(self, database: StrPath) -> None:
        self.path = os.fspath(database) + LOCK_SUFFIX
        self._fd: int | None = None
        self._usable = True
        self._checked = 0.0  # monotonic time of the last comparison with the path
        self._turn_ends = 0.0  # monotonic time at which to look whether someone is next, or to let him ...
        self._seen_next = False  # ... who was there at the last look
        self._identity: tuple[int, int] | None = None  # of the file, as it was found then
        self._waiter: _BlockedWaiter | None = None

    def acquire(
        self, deadline: float, *, check: bool = False, patient: bool = True, make: bool = True
    ) -> bool | None:
        """Take the lock, blocking until the monotonic deadline; then OperationalError. True: it may have taken a while.

        ``check``: compare the file with its path in any case. Allowed while the lock is held.
        ``patient=False``: None, at once, if another process is seen to have it.
        ``make=False``: where there is no lock file, none is made, and nothing is locked.
        """
        if self._fd is not None and self._usable and not check:
            try:  # the common case, short
                now = time.monotonic()
                if now >= self._turn_ends and self._has_to_yield(self._fd, now, patient):
                    return None
                _lock(self._fd, block=False)
                if now - self._checked < LOCK_CHECK_S:
                    return False
            except OSError as error:
                if not patient and isinstance(error, (BlockingIOError, PermissionError)):
                    return None
        while self._usable:
            fd = self._fd if self._fd is not None else self._open(make)
            if fd is None:
                return True
            self._take(fd, deadline)
            if self._is_current():
                return True
            self.close()  # someone replaced the file: two holders could each own a lock of that name
        if self._fd is None:  # no locks here, but a doorbell
            self._open(make)
        return True

    @property
    def excludes(self) -> bool:
        """Whether acquire() keeps others out: files can be locked here."""
        return self._fd is not None and self._usable

    def release(self) -> None:
        """Let the next writer in."""
        if self._fd is not None and self._usable:
            _unlock(self._fd)

    def ring(self) -> tuple[int, int] | None:
        """Wake the watchers of all processes: one byte, after the commit and before release(). Which file rang?

        None if that is impossible: the watchers find the commit by looking, a little later.
        """
        if self._fd is None:
            return None
        try:
            _write_byte(self._fd)
        except OSError:  # a full disk
            return None
        return self._identity

    def close(self) -> None:
        """Close the file, which releases the lock if it was held."""
        fd, self._fd = self._fd, None
        waiter, self._waiter = self._waiter, None
        if fd is not None:
            os.close(fd)
        if waiter is not None:
            waiter.close()

    def delete(self) -> None:
        """Remove the file, while holding it. Who waits for it notices, and takes the lock on a new one."""
        remove_file(self.path)
        self.close()

    def forget_parent(self) -> None:
        """In a forked child: close the copy of the descriptor, which would keep the parent's lock alive."""
        if self._fd is not None:
            os.close(self._fd)
        if self._waiter is not None:
            os.close(self._waiter.fd)
        self._fd = self._waiter = None

    def _open(self, make: bool) -> int | None:
        flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | (os.O_CREAT if make else 0)
        directory = os.path.dirname(self.path)
        try:
            if make and not os.path.isdir(directory):  # of a compound name such as .queue/broker.db
                os.makedirs(directory, 0o700, exist_ok=True)
            self._fd = os.open(self.path, flags, 0o600)
            if os.name == "posix" and os.fstat(self._fd).st_mode & 0o700 != 0o600:
                os.fchmod(self._fd, 0o600)  # the umask took bits away from the owner
        except OSError as error:
            if os.path.islink(self.path):
                raise OperationalError(f"the lock file {self.path!r} is a symbolic link: remove it") from error
            if make and not os.path.isdir(directory):
                raise OperationalError(f"the directory {directory!r} cannot be made: {error.strerror}") from error
        return self._fd

    def _take(self, fd: int, deadline: float) -> None:
        try:
            _lock(fd, block=False)
        except (BlockingIOError, PermissionError):
            if not self._wait(fd, deadline):
                raise OperationalError(
                    f"the database is busy: another process holds {self.path!r} for longer than BROKER_BUSY_TIMEOUT"
                ) from None
            self._seen_next, self._turn_ends = False, 0.0  # a new turn: look at its first write
        except (OSError, NotImplementedError):  # ENOSYS, ENOLCK, EOPNOTSUPP: no locks on this file system
            self._usable = False

    def _has_to_yield(self, fd: int, now: float, patient: bool) -> bool:
        """Look whether someone is next; if our turn is over, stay away for a moment, or, not patient, return True."""
        if not _someone_is_next(fd):
            self._seen_next, self._turn_ends = False, now + LOCK_PAUSE_S
        elif not self._seen_next:
            self._seen_next, self._turn_ends = True, now + LOCK_TURN_S
        elif not patient:
            return True
        else:
            self._seen_next, self._turn_ends = False, now + LOCK_TRUST_S
            time.sleep(LOCK_YIELD_S)
        return False

    def _wait(self, fd: int, deadline: float) -> bool:
        """Look again after a moment; then queue up, and still look: the next in the queue may be stopped."""
        while time.monotonic() < deadline:
            if self._waiter is None:
                time.sleep(LOCK_PAUSE_S)
            elif self._waiter.wait(min(deadline, time.monotonic() + LOCK_CHECK_S)):
                self._fd, self._waiter.fd = self._waiter.fd, fd  # the lock belongs to the descriptor
                return True
            try:
                _lock(fd, block=False)
                return True
            except OSError:
                pass
            if self._waiter is None and fcntl is not None:
                try:
                    self._waiter = _BlockedWaiter(os.open(self.path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)))
                except OSError:  # it was deleted, or there is no descriptor left: go on looking
                    pass
        return False

    def _is_current(self) -> bool:
        self._checked = time.monotonic()
        if self._fd is not None:
            mine = os.fstat(self._fd)
            self._identity = mine.st_dev, mine.st_ino
        return self._identity == file_identity(self.path)


class _BlockedWaiter:
    """A thread that blocks in flock() for its owner, who can then wait with a deadline.

    The kernel serves blocked waiters in turn; polling processes starve each other (measured with 16
    writers: worst wait 0.1 s blocking, 0.3 to 0.9 s polling). flock() itself knows no timeout.

    Handing over after each commit costs as much as the commit: another process wakes, and reads anew what
    it had cached. So, on Linux, the waiters queue for a second lock, a range of the same file. Who has it is
    the next: it looks LOCK_LOOKS times whether the writer lock is free, which leaves a busy holder a turn
    of some milliseconds, and only then blocks in flock(). That ends the turn at the next commit, unless it
    takes longer to wake up on another processor than the holder is away between two writes (20 us; waits of
    50 to 160 ms with 2 writers, measured). So the holder also looks whether someone is next, and lets go.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd  # of its own: the owner uses his meanwhile
        self._guard = threading.Lock()  # guards the flags; held only to read or change them
        self._wanted = self._closed = False  # the owner waits; the owner has gone
        self._idle = True  # the thread is not in flock()
        self._asked, self._granted = threading.Lock(), threading.Lock()  # binary semaphores, locked: not yet
        self._asked.acquire()
        self._granted.acquire()
        threading.Thread(target=self._serve, name=LOCK_THREAD_NAME, daemon=True).start()

    def wait(self, deadline: float) -> bool:
        """Wait for the lock until the deadline. After that the thread keeps its place for the next wait."""
        with self._guard:
            self._wanted = True
            if self._idle:
                self._idle = False
                self._asked.release()
        if self._granted.acquire(timeout=max(0.0, min(deadline - time.monotonic(), threading.TIMEOUT_MAX))):
            return True
        with self._guard:
            self._wanted = False
            return self._granted.acquire(blocking=False)

    def close(self) -> None:
        """End the thread, now or when it comes out of flock(), and close the descriptor."""
        with self._guard:
            self._closed = True
            if self._idle:
                self._asked.release()

    def _serve(self) -> None:
        while True:
            self._asked.acquire()
            if not self._closed:
                self._take_turn(self.fd)
            with self._guard:
                if self._closed:
                    _unlock(self.fd)  # a forked child may have a copy of the descriptor
                    os.close(self.fd)
                    return
                self._idle = True
                if self._wanted:
                    self._granted.release()
                else:
                    _unlock(self.fd)

    def _take_turn(self, fd: int) -> None:
        if sys.platform != "linux" or not _lock_turn(fd):  # elsewhere the two kinds of locks are one
            _lock(fd, block=True)
            return
        try:
            for _ in range(LOCK_LOOKS):
                try:
                    _lock(fd, block=False)
                    return
                except BlockingIOError:
                    time.sleep(LOCK_PAUSE_S)
            _lock(fd, block=True)
        finally:
            _unlock_turn(fd)


# ---------------------------------------------------------------------------------------------------
# Waiting: one background thread per database and process wakes those who wait and renews their leases.
# It sleeps on the doorbell (inotify, kqueue), and looks by itself every max_interval_s, for commits that do
# not ring; ten times as rarely while inotify would report that somebody writes to the log or makes the file.
# ---------------------------------------------------------------------------------------------------

ATTENDANT_NAME = "simplebroker-wait"  # of its thread
YIELD_S = 0.0002  # after waking others, so that they and not we have the interpreter and the connection first
SIGNAL_CHECK_S = 0.05  # the kernel may give a signal to any thread, but its handler waits for the main thread to move
ALONE_SIGNAL_CHECK_S = 1.0  # ... except on Linux, which wakes the main thread if no other is faster
FIRST_POLL_S = 0.001  # without a doorbell: the first look after a change, doubling up to max_interval_s
QUIET = 10  # times max_interval_s between looks, while a write to the log would be reported ...
MISSES = 3  # ... unless so many were not


def signal_check_s() -> float:
    """How long the main thread may sleep until it looks for signals.

    On Linux a thread that unblocks signals just then, as one that starts a process does, may get one before the
    main thread, which then sleeps on. Those that are named here do not.
    """
    harmless = ("MainThread", ATTENDANT_NAME, LOCK_THREAD_NAME)
    alone = sys.platform == "linux" and all(thread.name in harmless for thread in threading.enumerate())
    return ALONE_SIGNAL_CHECK_S if alone else SIGNAL_CHECK_S


class Alarm:
    """What one waiter sleeps on. ``with broker.alarm() as alarm:`` has it served by the attendant."""

    def __init__(self, attendant: Attendant) -> None:
        self._attendant = attendant
        # A lock used as a binary semaphore: unlocked means "woken". Anyone may unlock it, a signal handler
        # too (events and conditions are not safe there); only the waiter locks it.
        self._lock = threading.Lock()
        self._lock.acquire()

    def __enter__(self) -> Alarm:
        self._attendant.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._attendant.remove(self)

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until woken, at once if that happened since the last wait; False after timeout seconds."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        main = threading.current_thread() is threading.main_thread()
        longest = signal_check_s() if main else threading.TIMEOUT_MAX
        while True:
            left = max(0.0, deadline - time.monotonic())
            if self._lock.acquire(timeout=min(left, longest)):
                return True
            if left <= longest:
                return False

    def wake(self) -> None:
        """Wake the waiter, now or when it next waits. Safe in signal handlers."""
        try:
            self._lock.release()
        except RuntimeError:  # it was awake already
            pass


class Chore:
    """Something that the attendant does for its owner from time to time."""

    period_s: float
    next_at: float  # monotonic; when it failed, this is soon
    warn_at: float = 0.0  # monotonic; it has failed for a whole period then

    def run(self) -> None:
        """Do it once, in the attendant's thread."""
        raise NotImplementedError


class _Inotify:
    """Linux: a descriptor that becomes readable when the followed file is written, or a directory gets a new one."""

    def __init__(self) -> None:
        import ctypes

        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        self._watch, self._directory, self._armed = -1, False, -1
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1 failed")

    def follow(self, path: str) -> None:
        if self._watch >= 0:
            self._libc.inotify_rm_watch(self.fd, self._watch)
        self._directory = os.path.isdir(path)
        events = 0x180 if self._directory else 2  # IN_CREATE | IN_MOVED_TO; IN_MODIFY
        self._watch = self._libc.inotify_add_watch(self.fd, os.fsencode(path), events)
        if self._watch < 0:
            raise OSError("inotify_add_watch failed")

    def arm(self, path: str) -> bool:
        """Report the next change of another file, once. False if there is none."""
        events = 0x80000C06  # IN_ONESHOT | IN_MOVE_SELF | IN_DELETE_SELF | IN_ATTRIB (which is unlinking) | IN_MODIFY
        self._armed = self._libc.inotify_add_watch(self.fd, os.fsencode(path), events)
        return bool(self._armed >= 0)

    def drain(self) -> tuple[bool, bool, bool]:
        """Forget the events. Was the followed file written? Is it there? Did its directory or the armed file change?"""
        import struct

        events, at, written, there, changed = os.read(self.fd, 65536), 0, False, True, False
        while at < len(events):
            watch, mask, _, name_bytes = struct.unpack_from("iIII", events, at)
            current = watch == self._watch  # else of the file that it followed before
            there = there and not (current and mask & 0x8000)  # IN_IGNORED
            if watch == self._armed >= 0 or (current and self._directory):  # -1: events were dropped
                changed = True
            else:
                written = True
            at += 16 + name_bytes
        return written, there, changed

    def close(self) -> None:
        os.close(self.fd)


class _Kqueue:
    """macOS and BSD: the same."""

    def __init__(self) -> None:
        import select

        self._select: Any = select
        self._queue = self._select.kqueue()
        self.fd, self._file = self._queue.fileno(), -1

    def follow(self, path: str) -> None:
        s, old = self._select, self._file
        self._file = os.open(path, os.O_RDONLY)  # flock is per open file: closing this one drops no lock
        changes, flags = s.KQ_NOTE_WRITE | s.KQ_NOTE_EXTEND, s.KQ_EV_ADD | s.KQ_EV_CLEAR
        self._queue.control([s.kevent(self._file, s.KQ_FILTER_VNODE, flags, changes)], 0, 0)
        if old >= 0:
            os.close(old)

    def arm(self, path: str) -> bool:
        return False

    def drain(self) -> tuple[bool, bool, bool]:
        self._queue.control(None, 16, 0)
        return True, True, False

    def close(self) -> None:
        self._queue.close()
        if self._file >= 0:
            os.close(self._file)


class _Doorbell:
    """How the attendant sleeps: on a notification of the lock file, or, where there is none, by the clock."""

    def __init__(self, database: str | None) -> None:
        self._database, self._path = str(database), f"{database}{LOCK_SUFFIX}"
        self.identity: tuple[int, int] | None = None  # of the file that it follows: wait() returns at every ring
        self._awaits = False  # it follows the directory in which that will be made
        self.armed = False  # wait() ends, with False, when the log changes, or the database is made
        self.missed = 0  # of these, since one was reported
        self._source: Any = None
        self._pipe: tuple[int, int]
        self._interrupted = threading.Semaphore(0)
        try:
            import select

            self._source = None if database is None else _Inotify() if sys.platform == "linux" else _Kqueue()
            if self._source is not None:
                self._poll = select.poll()
                self._pipe = os.pipe()  # interrupt() writes here
        except (ImportError, AttributeError, OSError):  # no such call here, or no descriptors are left
            if self._source is not None:
                self._source.close()
                self._source = None
        if self._source is not None:
            for fd in self._pipe:
                os.set_blocking(fd, False)
            self._poll.register(self._source.fd, select.POLLIN)
            self._poll.register(self._pipe[0], select.POLLIN)

    def attach(self) -> bool:
        """Follow the path to the file that it names now. True if it is another one: rings may have been missed."""
        if self._source is None:
            return False
        before, found = self.identity, file_identity(self._path)
        if found == before and (found is not None or self._awaits):
            return False
        self.identity = None
        try:
            if found is None:
                self._awaits = False
                self._source.follow(os.path.dirname(self._path))
                self._awaits = True
                found = file_identity(self._path)  # made meanwhile?
            if found is not None:
                self._source.follow(self._path)
                self.identity, self._awaits = found, False
        except OSError:  # gone again, no such directory, or out of watches
            pass
        return (before, self.identity) != (None, None)

    def arm(self) -> None:
        """Let wait() end also when the log changes, or the database is made, if that can be reported."""
        if self._source is not None:
            log = self._source.arm(f"{self._database}-wal")
            self.armed = log or (self._awaits and file_identity(self._database) is None)

    def wait(self, timeout: float) -> bool:
        """Sleep until someone rings (True), until interrupt(), or for timeout seconds."""
        if self._source is None:
            self._interrupted.acquire(timeout=timeout)
            return False
        ready = [fd for fd, _ in self._poll.poll(timeout * 1000)]
        if self._pipe[0] in ready:
            os.read(self._pipe[0], 4096)
        if self._source.fd not in ready:
            return False
        written, there, changed = self._source.drain()
        if changed:
            self.armed, self.missed = False, 0
        if not there:
            self.identity, self._awaits = None, False
        return written or not there or (self._awaits and file_identity(self._path) is not None)

    def doubt(self) -> None:
        """Something has changed, though wait() did not say so: was it not reported, or just now?"""
        if not self.wait(0) and self.armed:
            self.missed += 1

    def interrupt(self) -> None:
        """End the current or the next wait()."""
        if self._source is None:
            self._interrupted.release()
            return
        try:
            os.write(self._pipe[1], b"\n")
        except BlockingIOError:  # full: it is interrupted already
            pass

    def close(self) -> None:
        """Close the descriptors."""
        if self._source is not None:
            self._source.close()
            for fd in self._pipe:
                os.close(fd)


class Attendant:
    """The one thread that waits for a whole process. It runs while it has alarms or chores; its doorbell
    stays until close(), because the kernel takes 10 ms to close an inotify instance.

    ``look()`` returns a value that changes with commits of others. ``next_due(now_ns)`` returns when the first
    message held after now becomes due, or None. Without them it wakes everyone from time to time.
    """

    def __init__(
        self, interval_s: float, database: str | None = None, look: Callable[[], object] | None = None,
        next_due: Callable[[int], int | None] | None = None, clock: Callable[[], int] = time.time_ns,
    ) -> None:  # fmt: skip
        self._interval_s, self._database, self._clock = interval_s, database, clock
        self._ask_look, self._ask_due = look, next_due
        self._bell: _Doorbell | None = None
        self._start()

    def _start(self) -> None:
        self._guard = threading.Lock()  # guards the clients, the bell and the thread; held only to change them
        self._joining = threading.Lock()  # for Thread.join(), which Python 3.9 does badly in two threads at once
        self._clients: set[Alarm | Chore] = set()
        self._thread: threading.Thread | None = None
        self._rung = False  # a commit of this process that no doorbell reported
        self.stale = False  # this process committed something: when the next message is due may have changed

    def forget_parent(self) -> None:
        """In a forked child: the thread and the waiters are the parent's."""
        self._start()
        self.close()

    def close(self) -> None:
        """Close the doorbell, unless there are clients."""
        with self._guard:
            if self._thread is None and self._bell is not None:
                self._bell.close()
                self._bell = None

    def add(self, client: Alarm | Chore) -> None:
        """Serve an alarm or a chore until remove()."""
        with self._guard:
            self._clients.add(client)
            if self._bell is None:
                self._bell = _Doorbell(self._database)
            if self._thread is None:
                self._bell.attach()
                # What is true now is taken before the client looks, so that it misses no change.
                args = (self._bell, self._look(), self._next_due(self._clock()))
                self._thread = threading.Thread(target=self._serve, args=args, name=ATTENDANT_NAME, daemon=True)
                self._thread.start()
            elif isinstance(client, Chore):
                self._bell.interrupt()

    def remove(self, client: Alarm | Chore) -> None:
        """Serve it no longer. With the last client the thread ends, before this returns."""
        with self._guard:
            self._clients.discard(client)
            thread = self._thread
            if self._clients or self._bell is None or thread is None:
                return
            self._bell.interrupt()
        ended = thread is threading.current_thread()
        while not ended and not self._clients:  # it ends, or a new client keeps it
            with self._joining:
                thread.join(FIRST_POLL_S)
                ended = not thread.is_alive()

    def is_current_thread(self) -> bool:
        """Is this an attendant's own thread?"""
        return threading.current_thread().name == ATTENDANT_NAME

    def ring(self, rang: tuple[int, int] | None) -> None:
        """A commit of this process may have made a message deliverable; this file rang for it, or none. It may be
        one that was deleted, and which nobody follows."""
        bell = self._bell
        if self._thread is not None and bell is not None and (rang is None or rang != bell.identity):
            self._rung = True
            bell.interrupt()

    def _serve(self, bell: _Doorbell, seen: object, due: int | None) -> None:
        try:
            self._attend(bell, seen, due)
        except BaseException:  # from a runner: the next client starts another thread
            with self._guard:
                self._thread = None
            raise

    def _attend(self, bell: _Doorbell, seen: object, due: int | None) -> None:
        pause, news = self._interval_s if bell.identity else FIRST_POLL_S, False
        while self._has_clients():
            now = self._clock()
            news = news or (due is not None and now >= due)
            if news or bell.identity is None:  # without news nobody has rung another file either
                news = bell.attach() or news
            if news or self._ask_look is None:
                seen = self._look()  # before waking: what is committed after it is news again
                self._wake_all()
                time.sleep(YIELD_S)
            if news or self.stale:
                self.stale = False
                due = self._next_due(now)
            timeout = min(pause, max(0.0, self._run_chores() - time.monotonic()))
            if due is not None:
                timeout = min(timeout, max(0, due - self._clock()) / NS)
            news, pause = self._listen(bell, timeout, pause, seen)

    def _listen(self, bell: _Doorbell, timeout: float, pause: float, seen: object) -> tuple[bool, float]:
        """Sleep. Return whether there is news then, and how long to sleep next."""
        armed, rung = bell.armed, bell.wait(timeout)
        if self._rung:
            self._rung, rung = False, True
        changed = armed and not bell.armed
        if pause == self._interval_s and not (rung or changed):
            bell.arm()  # before looking: what is written after it is reported
        news = rung or self._look() != seen
        if news and armed and not rung:
            bell.doubt()
        if armed and bell.armed and bell.missed < MISSES:  # for a whole pause, and a commit does not take so long
            return news, QUIET * self._interval_s
        if (changed and not rung) or (news and bell.identity is None):  # the log is written before the commit
            return news, FIRST_POLL_S
        return news, self._interval_s if news else min(2 * pause, self._interval_s)

    def _has_clients(self) -> bool:
        """Whether to go on. The decision to end is final: the next client starts another thread."""
        with self._guard:
            if not self._clients:
                self._thread = None
            return bool(self._clients)

    def _wake_all(self) -> None:
        with self._guard:
            alarms = [client for client in self._clients if isinstance(client, Alarm)]
        for alarm in alarms:
            alarm.wake()

    def _run_chores(self) -> float:
        """Do the chores that are due; return the monotonic time of the next."""
        with self._guard:
            chores = [client for client in self._clients if isinstance(client, Chore)]
        for chore in chores:
            if chore.next_at <= time.monotonic():
                chore.warn_at = chore.warn_at or time.monotonic() + chore.period_s
                try:
                    chore.run()
                    chore.next_at, chore.warn_at = time.monotonic() + chore.period_s, 0.0
                except (BrokerError, sqlite3.Error) as error:  # its owner meets the same error itself
                    chore.next_at = time.monotonic() + min(chore.period_s, self._interval_s)
                    if time.monotonic() >= chore.warn_at:
                        chore.warn_at = 0.0
                        log_warning("renewing leases fails, trying again: %s", error)
        return min([chore.next_at for chore in chores], default=float("inf"))

    def _look(self) -> object:
        try:
            return self._ask_look and self._ask_look()
        except BrokerError as error:  # the waiters meet the same error when they look themselves
            return str(error)

    def _next_due(self, now_ns: int) -> int | None:
        try:
            return self._ask_due(now_ns) if self._ask_due is not None else None
        except BrokerError:
            self.stale = True  # ask again at the next look
            return None


# ---------------------------------------------------------------------------------------------------
# Runners: the only code that talks to a database. Five methods; everything above goes through them.
# ---------------------------------------------------------------------------------------------------


class SQLRunner:
    """What the broker needs of a database: subclass it to log, to inject faults, to share a connection.

    Raise OperationalError for what may work later (busy, full), IntegrityError for violated constraints.
    Be safe for threads if you are used from several, and for fork if you fork.
    """

    def run(self, sql: str, params: Sequence[Any] = (), *, fetch: bool = False) -> Any:
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


# What SQLite's messages mean here; the first that matches.
_MEANINGS = (
    ("locked", "the database is busy: waited for BROKER_BUSY_TIMEOUT"),
    ("is full", "the disk is full: nothing was changed; free some space and try again"),
    ("readonly", "the database cannot be written: make the file and its directory writable"),
    ("disk I/O", "the file cannot be read or written, perhaps at a limit of its size: nothing was changed"),
    ("open database", "the database cannot be opened: check that the directory exists and is accessible"),
)
_OTHERS_WRITE = "others write at this moment: INSERT_MESSAGE is for when they do not"
# Connections that must never be closed, not even when the interpreter ends.
_abandoned: list[sqlite3.Connection] = []
_unusable: set[str] = set()  # databases that this process cannot open: it was forked during a transaction on them


def _abandon(connection: sqlite3.Connection) -> None:
    _abandoned.append(connection)
    try:
        import ctypes  # no delay: before_fork() imported it

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # a reference that nobody gives back
    except (ImportError, AttributeError):  # PyPy closes nothing when it ends
        pass


def _roll_back(runner: SQLRunner) -> None:
    """After an error, which is the one to report."""
    if isinstance(runner, SQLiteRunner) and not runner.depth():
        return  # commit() was interrupted when it was done
    try:
        runner.rollback()
    except Exception as error:  # noqa: BLE001 - whatever a runner raises
        log_warning("rollback failed too: %s", error)


class _Transaction:
    """``with broker.transaction() as run:`` commits at the end; rolls back and re-raises on an error."""

    __slots__ = ("_durable", "_runner")

    def __init__(self, runner: SQLRunner, *, durable: bool = True) -> None:
        self._runner, self._durable = runner, durable

    def __enter__(self) -> Run:
        runner = self._runner
        if not isinstance(runner, SQLiteRunner):
            runner.begin_immediate()
            return runner.run
        depth = runner.depth()
        try:
            if self._durable:
                runner.begin_immediate()
            else:
                runner.begin_immediate(durable=False)
            return runner.run
        except BaseException as error:
            runner.recover(error, depth)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._runner.commit()
        except BaseException as second:
            error = second
            raise
        finally:
            if error is not None:
                _roll_back(self._runner)
                if isinstance(self._runner, SQLiteRunner):
                    self._runner.recover(error, self._runner.depth())


class _Work:
    """What a thread wants done in a transaction, and what came of it."""

    __slots__ = ("deadline", "done", "durable", "function", "result", "taken", "wake")

    def __init__(self, function: Callable[[Run], Any], durable: bool, timeout_s: float) -> None:
        self.function, self.durable, self.deadline = function, durable, time.monotonic() + timeout_s
        self.taken = self.done = False
        self.result: Any = None
        self.wake = threading.Lock()  # its thread sleeps on it until the work is done, or first in line
        self.wake.acquire()


class _Line:
    """Threads that want a transaction at the same time. The first in line does the work of all in one transaction,
    so that they share its sync to the disk (group commit)."""

    def __init__(self) -> None:
        self._guard = threading.Lock()  # guards the list, and who is taken and done; held only to change them
        self.works: list[_Work] = []  # may be looked at without the guard

    def join(self, work: _Work) -> bool:
        """Wait in line. True: it is first now. False: the first has done it. OperationalError at its deadline."""
        with self._guard:
            self.works.append(work)
            if len(self.works) == 1:
                return True
        if not work.wake.acquire(timeout=max(0.0, work.deadline - time.monotonic())):
            if self.leave(work, unless_taken=True):
                raise OperationalError("the database is busy: other threads write for longer than BROKER_BUSY_TIMEOUT")
            work.wake.acquire()  # it is being done
        return not work.done

    def take(self) -> list[_Work]:
        """The first takes on the work of all who are there."""
        with self._guard:
            for work in self.works:
                work.taken = True
            return self.works[:]

    def put_back(self) -> None:
        """The first leaves undone what is not done."""
        with self._guard:
            for work in self.works:
                work.taken = work.done

    def leave(self, work: _Work, *, unless_taken: bool = False) -> bool:
        """Wait no longer. When the first leaves, so do those whose work it did, and the next is first."""
        with self._guard:
            if work not in self.works or (unless_taken and work.taken):
                return False
            was_first = self.works[0] is work
            self.works.remove(work)
            if was_first:
                ended = [other for other in self.works if other.done]
                self.works = [other for other in self.works if not other.done]
                for other in ended + self.works[:1]:
                    other.wake.release()
            return True


class SQLiteRunner(SQLRunner):
    """The runner for SQLite files: one connection, for all threads of the process.

    ``path`` is made by the first write; until then, reading finds nothing. The file is the one that the
    path names at that moment: when it is deleted or replaced, the next call opens the new one.
    Transactions of one thread nest (savepoints). After fork, parent and child have connections of their own.
    """

    def __init__(
        self, path: StrPath, settings: Settings | None = None, *, clock: Callable[[], int] = time.time_ns
    ) -> None:
        self.settings = settings = settings or Settings.from_environment()
        self.path = api_path(settings, path)
        self.attendant = Attendant(settings.max_interval_s, self.path, self._look, self._next_due, clock)
        self._timeout_s = settings.busy_timeout_ms / 1000
        self._lock = WriterLock(self.path)
        self._connection: sqlite3.Connection | None = None
        self._cursor: sqlite3.Cursor
        self._start()
        _runners[weakref.ref(self, _runners.pop)] = None

    def _start(self) -> None:
        # Guards the connection, the writer lock and the fields below. The thread that is in a
        # transaction holds it from begin_immediate() to commit() or rollback().
        self._mutex = threading.RLock()
        self._identity: tuple[int, ...] | None = None  # of the file that the connection has open
        self._inode = self._device = -1  # the same, where comparing these two is enough
        self._limited = self._immutable = False  # opened for reading only; past SQLite's locking
        self._log: tuple[int, int] | None = None  # the inode of the write-ahead log
        self._opened = 0  # counts the connections, so that a look tells them apart
        self._depth = 0
        self._owner = 0  # the thread that is in a transaction; 0: none. May be read without the mutex.
        self._ring = False  # the transaction has made something deliverable
        self._relaxed = False  # the transaction is not synced
        self._waited = False  # busy_timeout is shortened
        self._paused_by = 0  # the thread that holds the mutex because it forks; 0: none
        self._deadline = 0.0  # until when the transaction of the first in line may wait; 0: as usual
        self._line = _Line()

    # -- the five methods

    def run(self, sql: str, params: Sequence[Any] = (), *, fetch: bool = False) -> list[Any]:
        """Execute one statement and return its rows. See SQLRunner."""
        if self._owner == threading.get_ident():
            if sql in RINGING:
                self._ring = True
            return self._execute(sql, params)
        try:
            if sql != INSERT_MESSAGE:
                deadline = self._enter()
            elif self._line.works or not self._mutex.acquire(blocking=False):
                raise IntegrityError(_OTHERS_WRITE)
            else:
                deadline = time.monotonic() + self._timeout_s
            try:
                if sql[:6] in ("SELECT", "PRAGMA"):
                    self._use_current_file()
                    return self._execute(sql, params)
                self._lock_file(deadline, patient=sql != INSERT_MESSAGE)
                try:
                    rows = self._execute(sql, params)
                    self.attendant.stale = True
                    if sql in RINGING:
                        self.attendant.ring(self._lock.ring())
                    return rows
                finally:
                    self._lock.release()
            finally:
                self._mutex.release()
        except BaseException as error:
            self.recover(error)
            raise

    def begin_immediate(self, *, durable: bool = True) -> None:
        """Start a transaction, or a nested one. Blocks up to BROKER_BUSY_TIMEOUT, then OperationalError.

        ``durable=False``: not synced to the disk by itself, for what a crash of the machine may undo.
        """
        deadline = self._enter()
        try:
            if self._depth:
                self._execute("SAVEPOINT nested")
            else:
                self._lock_file(deadline)
                try:
                    self._relaxed = not durable and self.settings.sync_mode == "FULL"
                    if self._relaxed:
                        self._execute("PRAGMA synchronous = NORMAL")
                    self._execute("BEGIN IMMEDIATE")
                except BaseException:
                    if self._connection is not None and self._connection.in_transaction:  # interrupted just then
                        self._execute("ROLLBACK")
                    self._restore_sync()
                    self._lock.release()
                    raise
                self._ring, self._owner = False, threading.get_ident()
            self._depth += 1
        except BaseException:
            self._mutex.release()
            raise

    def commit(self) -> None:
        """Commit, ring the doorbell if something may have become deliverable, let the next writer in."""
        self._check_owner()
        if self._depth > 1:
            self._execute("RELEASE nested")
        else:
            self._execute("COMMIT")
            self.attendant.stale = True
            if self._ring:
                self.attendant.ring(self._lock.ring())
        self._leave()

    def rollback(self) -> None:
        """Undo the innermost transaction."""
        self._check_owner()
        try:
            if self._connection is not None and self._connection.in_transaction:
                if self._depth > 1:
                    self._execute("ROLLBACK TO nested")
                    self._execute("RELEASE nested")
                else:
                    self._execute("ROLLBACK")
        finally:
            self._leave()

    def together(self, function: Callable[[Run], T], *, durable: bool = True) -> T:
        """Run ``function(run)`` in a transaction and return its result. An error undoes what it did.

        Threads that call this at the same time share a transaction. If it fails, each has one of its own,
        so the function may be called twice. Blocks as begin_immediate() does.
        """
        depth = self.depth()
        try:
            if depth:
                return self._alone(function, durable)
            if not self._line.works and self._mutex.acquire(blocking=False):
                try:
                    return self._alone(function, durable)
                finally:
                    self._mutex.release()
            return self._in_line(function, durable)
        except BaseException as error:
            self.recover(error, depth)
            raise

    def _alone(self, function: Callable[[Run], T], durable: bool) -> T:
        self.begin_immediate(durable=durable)
        try:
            result = function(self.run)
            self.commit()
            return result
        except BaseException:
            _roll_back(self)
            raise

    def _in_line(self, function: Callable[[Run], T], durable: bool) -> T:
        work = _Work(function, durable, self._timeout_s)
        try:
            if self._line.join(work):
                self._lead(work)
            result: T = work.result
            return result
        finally:
            self._line.leave(work)

    def _lead(self, mine: _Work) -> None:
        """Do the work of all in line together; if that fails, only the own."""
        self._enter(max(0.0, mine.deadline - time.monotonic()))
        self._deadline = mine.deadline
        try:
            # An interrupt of the main thread must not leave open whether it has done the work of others.
            alone = threading.current_thread() is threading.main_thread()
            works = [mine] if alone else self._line.take()
            if len(works) == 1 or not self._do_all(works):
                mine.result = self._alone(mine.function, mine.durable)
        finally:
            self._deadline = 0.0
            self._mutex.release()

    def _do_all(self, works: list[_Work]) -> bool:
        try:
            self.begin_immediate(durable=any(work.durable for work in works))
            try:
                results = [work.function(self.run) for work in works]
                self.commit()
            except BaseException as error:
                _roll_back(self)
                if isinstance(error, Exception):  # it is one thread's, and the others need not suffer
                    return False
                raise
            for work, result in zip(works, results):
                work.result, work.done = result, True
            return True
        finally:
            self._line.put_back()

    def close(self) -> None:
        """Close the connection and the lock file. Waits for a transaction of another thread."""
        if self._owner == threading.get_ident():
            raise UsageError("this thread is in a transaction: close after it")
        with self._mutex:
            self._disconnect()
            self._lock.close()
        self.attendant.close()

    # -- transactions

    def depth(self) -> int:
        """In how many nested transactions this thread is."""
        return self._depth if self._owner == threading.get_ident() else 0

    def recover(self, error: BaseException, depth: int = 0) -> None:
        """After an interrupt, which may come between any two steps: give up what this thread holds, but for that many
        nested transactions. The state of the connection is unknown: it is opened anew."""
        if isinstance(error, Exception):
            return
        if depth and depth <= self.depth():
            while self.depth() > depth:
                _roll_back(self)
        elif self._mutex.acquire(blocking=False):  # else another thread has it, and this one holds nothing
            try:
                self._depth = self._owner = 0
                self._deadline, self._relaxed, self._waited, self._ring = 0.0, False, False, False
                self._disconnect()
            except sqlite3.Error as second:  # PyPy's sqlite3 can be interrupted itself
                log_warning("%s: the connection could not be closed: %s", self.path, second)
            finally:
                self._lock.release()
                self._lock.close()
                try:
                    while True:
                        self._mutex.release()
                except RuntimeError:  # it is free
                    pass

    def _enter(self, timeout_s: float | None = None) -> float:
        """Take the mutex; return the deadline of the whole operation."""
        if not self._mutex.acquire(blocking=False):
            timeout_s = self._patience_s() if timeout_s is None else timeout_s
            if not self._mutex.acquire(timeout=timeout_s):
                raise OperationalError(
                    f"the database is busy: another thread is in a transaction on {self.path!r} for longer than"
                    f" {timeout_s:g} s (see BROKER_BUSY_TIMEOUT)"
                )
        return self._deadline or time.monotonic() + self._timeout_s

    def _patience_s(self) -> float:
        """How long to wait for another thread. The attendant tries again anyway, and whoever is in a transaction
        may be waiting for it to end."""
        return FAST_BATCH_S if self.attendant.is_current_thread() else self._timeout_s

    def _leave(self) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = 0
            self._restore_sync()
            self._lock.release()
        self._mutex.release()

    def _restore_sync(self) -> None:
        if self._relaxed:
            self._relaxed = False
            self._execute("PRAGMA synchronous = FULL")

    def _check_owner(self) -> None:
        if self._owner != threading.get_ident():
            raise OperationalError("this thread has no open transaction (a forked child does not inherit one)")

    def _lock_file(self, deadline: float, *, patient: bool = True) -> None:
        """Take the writer lock, and see that the connection is to the current file. See WriterLock.acquire()."""
        if self._connection is None:
            self._use_current_file()  # refuses a foreign file before a lock file is put beside it
        waited = self._lock.acquire(deadline, patient=patient)
        if waited is None:
            raise IntegrityError(_OTHERS_WRITE)
        try:
            self._use_current_file(deadline)
            if waited or self._waited:
                self._share_timeout(deadline)
        except BaseException:
            self._lock.release()
            raise

    def _share_timeout(self, deadline: float) -> None:
        """SQLite's own waiting gets what is left."""
        left_ms = max(0, int((deadline - time.monotonic()) * 1000))
        waited = left_ms < self.settings.busy_timeout_ms - 50
        if waited or self._waited:
            self._execute(f"PRAGMA busy_timeout = {left_ms if waited else self.settings.busy_timeout_ms}")
            self._waited = waited

    def _execute(self, sql: str, params: Sequence[Any] = ()) -> list[Any]:
        try:
            # fetchall() also where there are no rows: it ends the statement, and with it its snapshot.
            return self._cursor.execute(sql, params).fetchall()
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

    # -- the file

    def _use_current_file(self, deadline: float | None = None) -> None:
        """Connect to the file that the path names now, unless that is the one in use.

        With a deadline for writing: the writer lock is held, and the file is made if it is not there.
        """
        try:
            found = os.stat(self.path)
            if found.st_ino == self._inode and found.st_dev == self._device:
                return
        except OSError:  # which _identify() looks at again
            pass
        identity = self._identify()
        usable = deadline is None or (identity is not None and not self._limited)
        if self._connection is not None and identity == self._identity and usable:
            return
        if deadline is not None:
            self._lock.acquire(deadline, check=True)  # who replaced the file may have replaced the lock too
            identity = self._identify()
        if self._identity is None or self._identity == identity:
            self._disconnect()
        else:
            self._leave_moved_file(locked=deadline is not None)
            identity = self._identify()
        self._opened += 1
        try:
            if identity is None and deadline is None:
                self._connect_to_nothing()
            else:
                self._connect(deadline)
        except BaseException as error:
            self._disconnect()
            if deadline is not None or not isinstance(error, BrokerError) or self._identify() == identity:
                raise
            self._use_current_file()  # it was deleted or replaced at this moment

    def _identify(self) -> tuple[int, ...] | None:
        """What tells the file that the path names from others; None if there is none."""
        try:
            found = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if self._immutable:  # read past SQLite's locking: nothing may have changed at all
            log = os.path.exists(self.path + "-wal")
            return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size, int(log)
        return found.st_dev, found.st_ino

    def _connect_to_nothing(self) -> None:
        """Stand in for a file that is not there yet: reading finds nothing, and makes nothing."""
        self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._cursor = self._connection.cursor()
        for statement in SCHEMA:
            self._execute(statement)

    def _connect(self, deadline: float | None) -> None:
        if self.path in _unusable:
            raise OperationalError(
                f"this process was forked during a transaction on {self.path!r}, and SQLite does not survive that:"
                " fork between transactions, or start processes with spawn or exec"
            )
        if os.path.isdir(self.path):
            raise OperationalError(f"{self.path!r} is a directory: give a file")
        if deadline is not None:
            self._make_file()
        try:
            self._open("mode=rw")
            ours = self._check()
        except OperationalError as error:
            if os.access(os.path.dirname(self.path), os.W_OK):
                raise
            if deadline is not None:
                raise self._translated(sqlite3.OperationalError("readonly directory")) from error
            # A read-only directory: SQLite can read there if the log's files exist, or if nobody writes.
            self._disconnect()
            self._limited, self._immutable = True, not os.path.exists(self.path + "-wal")
            self._open("immutable=1" if self._immutable else "mode=ro")
            ours = self._check()
        if not ours and deadline is None:  # someone is just making it
            self._disconnect()
            self._connect_to_nothing()
            return
        if not ours and deadline is not None:
            self._make_schema(deadline)
        self._identity = self._identify()
        self._log = file_identity(self.path + "-wal")
        if self._identity is not None and not self._limited:
            self._device, self._inode = self._identity

    def _open(self, mode: str) -> None:
        path = self.path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        uri = f"file:{path}?{mode}" if os.sep == "/" else f"file:/{path}?{mode}".replace("\\", "/")
        settings = self.settings
        try:
            self._connection = sqlite3.connect(
                uri, uri=True, timeout=self._timeout_s, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise self._translated(error) from error
        self._cursor = self._connection.cursor()
        self._execute("PRAGMA trusted_schema = OFF")
        self._execute(f"PRAGMA synchronous = {settings.sync_mode}")
        self._execute(f"PRAGMA cache_size = {-1024 * settings.cache_mb}")
        self._execute(f"PRAGMA wal_autocheckpoint = {settings.wal_autocheckpoint}")

    def _check(self) -> bool:
        """True: a SimpleBroker database. False: an empty file. DatabaseError: anything else. Only reads."""
        self._execute("BEGIN")  # one state of the file, though others may just be making it
        try:
            magic = self._execute("PRAGMA application_id")[0][0]
            objects = self._execute(SELECT_OBJECTS)
            version = self._execute(SELECT_VERSION) if any(row[:2] == ("table", "meta") for row in objects) else []
        finally:
            if self._connection is not None and self._connection.in_transaction:
                self._execute("COMMIT")
        try:
            if magic == 0 and not objects and os.path.getsize(self.path) != 1:  # SQLite takes one byte for none
                return False
        except FileNotFoundError:
            raise OperationalError(f"{self.path!r} was deleted at this moment: try again") from None
        if magic != APPLICATION_ID:
            raise DatabaseError(f"{self.path!r} is a database of another program: choose another file")
        if version and version[0][0] != SCHEMA_VERSION:
            raise DatabaseError(
                f"{self.path!r} has schema version {version[0][0]}, this program knows {SCHEMA_VERSION}: use the"
                " version of SimpleBroker that made it"
            )
        # Tables of others may be in the file (a transactional outbox), but nothing of theirs on ours.
        expected = {sql.split()[5]: sql.replace("IF NOT EXISTS ", "") for sql in SCHEMA[:-1]}
        found = {name: sql for _, name, table, sql in objects if name in expected or table in expected}
        if found != expected or not version:
            names = ", ".join(sorted(dict(found.items() ^ expected.items()))) or "meta is empty"
            raise DatabaseError(f"{self.path!r} was altered ({names}): restore a backup or choose another file")
        return True

    def _make_file(self) -> None:
        """Create the file, unless it is there. The caller has the writer lock."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return
        except OSError as error:
            raise OperationalError(f"cannot create {self.path!r}: {error.strerror}") from error
        if hasattr(os, "fchmod"):
            os.fchmod(fd, 0o600)  # also under a umask that takes bits away from the owner
        os.close(fd)
        if self._lock.excludes:  # else someone may already use the new file; then SQLite removes the log alone
            self._remove_log()  # of a deleted database that had this name: its readers would write to the new index

    def _remove_log(self) -> None:
        remove_file(self.path + "-wal")
        remove_file(self.path + "-shm")

    def _make_schema(self, deadline: float) -> None:
        self._execute(f"PRAGMA page_size = {PAGE_BYTES}")
        while True:
            try:
                self._execute("PRAGMA journal_mode = WAL")
                break
            except OperationalError:  # where there are no file locks, and for this SQLite does not wait
                if time.monotonic() >= deadline:
                    raise
                time.sleep(LOCK_PAUSE_S)
        self._execute("BEGIN IMMEDIATE")
        try:
            for statement in SCHEMA:
                self._execute(statement)
            self._execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._execute("COMMIT")
        except BaseException:
            if self._connection is not None and self._connection.in_transaction:
                self._execute("ROLLBACK")
            raise

    def _leave_moved_file(self, *, locked: bool) -> None:
        """Close the connection to a file that was deleted or replaced, and remove the log that it left behind: SQLite
        would apply it to the new file. Who makes or deletes the file has the writer lock, so readers take it too: else
        they could remove the log of a file that was made meanwhile."""
        log = self._log
        if log is not None and not locked:
            self._lock.acquire(time.monotonic() + self._patience_s(), check=True, make=False)
        try:
            # Before closing, because after that a new log may have the inode of the old one.
            left_behind = log is not None and log == file_identity(self.path + "-wal")
            self._disconnect(moved=True)
            if left_behind:
                self._remove_log()
        finally:
            if not locked:
                self._lock.release()

    def _disconnect(self, *, moved: bool = False) -> None:
        """Close the connection. ``moved``: its file was deleted or replaced."""
        connection, self._connection = self._connection, None
        self._log = self._identity = None
        self._limited = self._immutable = False
        self._inode = self._device = -1
        if connection is not None and moved and sqlite3.sqlite_version_info < (3, 31):
            _abandon(connection)  # closing it would delete the log of the new file, which has its name
        elif connection is not None:
            connection.close()

    def delete_file(self) -> bool:
        """Delete the database, if it is one of ours, with all that belongs to it. False if there is none."""
        if self._owner == threading.get_ident():
            raise UsageError("this thread is in a transaction: delete after it")
        deadline = self._enter()
        try:
            self._use_current_file()  # refuses what is not ours
            if self._identity is None:
                return False
            self._lock.acquire(deadline, check=True)
            self._disconnect()
            for suffix in ("", "-wal", "-shm", "-journal"):
                remove_file(self.path + suffix)
            self._lock.delete()
            return True
        except OSError as error:
            raise OperationalError(f"cannot delete {self.path!r}: {error.strerror}") from error
        finally:
            self._lock.release()
            self._mutex.release()

    def snapshot(self) -> _Snapshot:
        """``with runner.snapshot() as run:`` reads one state of the database, without stopping writers."""
        return _Snapshot(self.path, self.settings)

    # -- what the attendant asks, and fork

    def _look(self) -> object:
        version = self.run(SELECT_DATA_VERSION)[0][0]
        return self._opened, version

    def _next_due(self, now_ns: int) -> int | None:
        due: int | None = self.run(SELECT_NEXT_DUE, (now_ns,))[0][0]
        return due

    def before_fork(self) -> None:
        """Close the connection and keep out other threads: SQLite's bookkeeping of locks is per process, and a
        child that inherits it would read and write without locks. Impossible during a transaction."""
        me = threading.get_ident()
        if self._owner != me and self._mutex.acquire(timeout=self._timeout_s):
            self._paused_by = me
        if self._paused_by == me and not self._owner:
            self._disconnect()
        elif self._connection is not None:
            try:
                import ctypes  # noqa: F401 - for the child, which could hang on a lock of the import system
            except ImportError:
                pass

    def after_fork(self) -> None:
        """In the parent: go on."""
        if self._paused_by == threading.get_ident():
            self._paused_by = 0
            self._mutex.release()

    def forget_parent(self) -> None:
        """In the child: leave everything to the parent and begin anew."""
        if self._connection is not None:
            _abandon(self._connection)  # closing would roll back, in memory that both share, the parent's transaction
            _unusable.add(self.path)
            self._connection = None
        self._lock.forget_parent()
        self.attendant.forget_parent()
        self._start()


class _Snapshot(SQLiteRunner):
    """A second connection inside one read transaction."""

    def __enter__(self) -> Run:
        self._use_current_file()
        self._execute("BEGIN")
        self._owner = threading.get_ident()  # so that run() stays with this connection
        return self.run

    def __exit__(self, *_: object) -> None:
        self._owner = 0
        self.close()


# All of this process, for fork. A WeakSet fails when a thread adds to it, or PyPy collects, while it is listed;
# listing, adding to and taking from a dict are one step each.
_runners: dict[weakref.ref[SQLiteRunner], None] = {}
_shared: dict[tuple[Any, ...], tuple[SQLiteRunner, int]] = {}  # those that queues share, and how many do
_shared_guard = threading.Lock()  # guards _shared; held only to change it


def borrow_runner(path: str, settings: Settings) -> SQLiteRunner:
    """The runner that all queues of this process on the same file share. Give it back when done."""
    key = (path, *settings.key())
    with _shared_guard:
        runner, users = _shared.get(key) or (SQLiteRunner(path, settings), 0)
        _shared[key] = runner, users + 1
        return runner


def give_back_runner(runner: SQLiteRunner) -> None:
    """End one use of a shared runner; the last one closes it."""
    key = (runner.path, *runner.settings.key())
    with _shared_guard:
        users = _shared[key][1] - 1
        if users:
            _shared[key] = runner, users
            return
        del _shared[key]
    runner.close()


def _each_runner(act: Callable[[SQLiteRunner], None]) -> Callable[[], None]:
    def hook() -> None:
        for reference in list(_runners):
            runner = reference()
            if runner is not None:
                act(runner)

    return hook


def _forget_parent() -> None:
    global _shared_guard
    _shared_guard = threading.Lock()  # the parent's may have been held by a thread that the child lacks
    _each_runner(SQLiteRunner.forget_parent)()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_each_runner(SQLiteRunner.before_fork),
        after_in_parent=_each_runner(SQLiteRunner.after_fork),
        after_in_child=_forget_parent,
    )


# ---------------------------------------------------------------------------------------------------
# Broker: everything about all queues of a database, and the one place that says begin, commit, rollback.
# ---------------------------------------------------------------------------------------------------

DUMP_FORMAT, DUMP_VERSION = "simplebroker-dump", 1


class Stats(namedtuple("Stats", "ready leased delayed")):
    """How many messages a queue has: ready, leased, delayed; total."""

    __slots__ = ()
    ready: int
    leased: int
    delayed: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.ready + self.leased + self.delayed


class Broker:
    """All queues of one database.

    ``db_path`` is a file; None means the default (see BROKER_DEFAULT_DB_LOCATION, BROKER_PROJECT_SCOPE).
    ``runner`` replaces it and stays the caller's. ``clock`` returns nanoseconds since 1970. Nothing is
    opened before it is needed.
    """

    def __init__(
        self, db_path: StrPath | None = None, *, runner: SQLRunner | None = None, settings: Settings | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:  # fmt: skip
        if runner is not None and db_path is not None:
            raise ValueError("give a db_path or a runner, not both")
        self.settings = settings or Settings.from_environment()
        self.clock = clock
        self._owned: SQLiteRunner | None = None
        if runner is None:
            runner = self._owned = borrow_runner(api_path(self.settings, db_path), self.settings)
        self.runner: SQLRunner = runner
        self.ids = TimestampGenerator(self.runner, clock)
        self._transaction = _Transaction(self.runner)
        self._relaxed_transaction = _Transaction(self.runner, durable=False)
        self._closed = False
        self._prepared = isinstance(self.runner, SQLiteRunner)  # which makes its schema itself
        if isinstance(self.runner, SQLiteRunner):
            self.attendant = self.runner.attendant
        else:
            self.attendant = Attendant(self.settings.max_interval_s)

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; the connection is closed with its last user. Closing twice is allowed."""
        if not self._closed and self._owned is not None:
            give_back_runner(self._owned)
        self._closed = True

    @property
    def path(self) -> str:
        """The absolute path of the database file; empty with a custom runner."""
        return self.runner.path if isinstance(self.runner, SQLiteRunner) else ""

    def queue(self, name: str) -> Queue:
        """The queue of that name on this broker. Closing it does not close the broker."""
        return Queue(name, broker=self)

    def transaction(self) -> _Transaction:
        """``with broker.transaction() as run:`` one write transaction; ``run(sql, params, fetch=)``.

        What the thread does inside with queues of the same database belongs to it: all or nothing. (With
        a custom runner only run() does, unless the runner lets transactions nest.)
        Blocks up to BROKER_BUSY_TIMEOUT, then OperationalError. Keep it short: all other writers wait.
        """
        if self._closed or not self._prepared:
            self._prepare()
        return self._transaction

    def relaxed_transaction(self) -> _Transaction:
        """A transaction() that a crash of the machine may undo, which is what becomes of leases anyway."""
        self.transaction()
        return self._relaxed_transaction

    def together(self, function: Callable[[Run], T], *, durable: bool = True) -> T:
        """Run ``function(run)`` in a transaction() and return its result; threads that do so at once share one.

        The function may be called twice: the transaction is tried again without the others if it fails.
        ``durable=False``: a crash of the machine may undo it.
        """
        transaction = self.transaction()
        if isinstance(self.runner, SQLiteRunner):
            return self.runner.together(function, durable=durable)
        with transaction as run:
            return function(run)

    def run(self, sql: str, params: Sequence[Any] = ()) -> list[Any]:
        """Run one statement of the SQL room by itself and return its rows."""
        if self._closed or not self._prepared:
            self._prepare()
        rows: list[Any] = self.runner.run(sql, params, fetch=True)
        return rows

    def _prepare(self) -> None:
        """Before the first use of a custom runner: make the schema if it is not there."""
        if self._closed:
            raise UsageError("the queue or its broker was closed: make a new one")
        try:
            version = self.runner.run(SELECT_VERSION, fetch=True)
        except sqlite3.OperationalError:  # no such table
            version = []
        if version and version[0][0] != SCHEMA_VERSION:
            raise DatabaseError(f"schema version {version[0][0]} is not {SCHEMA_VERSION}, which this program knows")
        if not version:
            with self._transaction as run:
                for statement in SCHEMA:
                    run(statement)
        self._prepared = True

    def insert(self, run: Run, queue: str, bodies: Sequence[str], held_until: int | None) -> list[int]:
        """Write checked bodies to one queue, in the caller's transaction; return their ids."""
        first = self.ids.after(run(SELECT_LAST_ID, fetch=True)[0][0], len(bodies))
        full = len(bodies) - len(bodies) % BATCH_ROWS
        for start in range(0, full, BATCH_ROWS):
            run(INSERT_BATCH, (first + start, queue, held_until, *bodies[start : start + BATCH_ROWS]))
        for start in range(full, len(bodies)):
            run(INSERT_ONE, (first + start, queue, held_until, bodies[start]))
        return list(range(first, first + len(bodies)))

    def queues(self, pattern: str | None = None) -> dict[str, Stats]:
        """The queues that have messages, sorted, with their stats; only those that match the pattern."""
        rows = self.run(SELECT_QUEUES, (self.clock(),))
        return {row[0]: Stats(*row[1:]) for row in rows if matches(row[0], pattern)}

    def broadcast(self, body: str, pattern: str | None = None) -> list[str]:
        """Write the body to every queue that has messages (and matches); return their names.

        One transaction: all of them or none. Each copy has an id of its own.
        """
        text = check_body(body, self.settings.max_message_size)
        with self.transaction():
            names = list(self.queues(pattern))
            for name in names:
                self.insert(self.runner.run, name, [text], None)
        return names

    def alarm(self) -> Alarm:
        """``with broker.alarm() as alarm:`` look and ``alarm.wait(seconds)`` in turn. No change between a
        look and the wait after it is missed; wait() returns False at its timeout."""
        if self._closed or not self._prepared:
            self._prepare()
        return Alarm(self.attendant)

    def wait_for_change(self, timeout: float | None = None) -> bool:
        """Block until messages may have become deliverable: look again. It may be a false alarm.

        False after timeout seconds (None: no limit). A change before the call is not seen: see alarm().
        """
        with self.alarm() as alarm:
            return alarm.wait(timeout)

    def status(self) -> dict[str, int]:
        """Numbers of the whole database: queues, messages (ready, leased, delayed), last id, bytes."""
        stats = list(self.queues().values())
        numbers = {"queues": len(stats), "messages": sum(each.total for each in stats)}
        numbers.update((name, sum(getattr(each, name) for each in stats)) for name in Stats._fields)
        numbers["last_ts"] = self.run(SELECT_LAST_ID)[0][0]
        numbers["bytes"] = self.run(SELECT_PAGES)[0][0] * self.run(SELECT_PAGE_SIZE)[0][0]
        return numbers

    def vacuum(self) -> None:
        """Give unused pages back to the file system. Writers wait meanwhile."""
        self.run(VACUUM)
        self.run(TRUNCATE_WAL)

    def delete_database(self) -> bool:
        """Delete the database file and what belongs to it. False if there is none; DatabaseError if it is
        not one of ours. Other processes that use it notice, and begin a new one with their next write."""
        self.transaction()  # says so if it is closed
        if not isinstance(self.runner, SQLiteRunner):
            raise ValueError("a custom runner's database is not ours to delete")
        return self.runner.delete_file()

    def dump(self, pattern: str | None = None) -> Iterator[str]:
        """Yield the messages as lines of JSON, a header first, all from one state of the database.

        Queues sorted, ids ascending, what is held included. Writers go on meanwhile (with a custom
        runner they wait).
        """
        import json

        self.transaction()  # says so if it is closed
        with self.runner.snapshot() if isinstance(self.runner, SQLiteRunner) else self.transaction() as run:
            last = run(SELECT_LAST_ID, fetch=True)[0][0]
            header = {"type": "header", "format": DUMP_FORMAT, "version": DUMP_VERSION, "last_ts": str(last)}
            yield json.dumps(header)
            for queue, _, leased, delayed in run(SELECT_QUEUES, (-1,), fetch=True):
                for row in _dump_rows(run, queue, bool(leased or delayed)) if matches(queue, pattern) else ():
                    record = {"type": "message", "queue": queue, "body": row[1], "id": str(row[0])}
                    more = zip(("attempt", "held_until"), (row[2] or None, *row[3:]))
                    record.update((key, value) for key, value in more if value is not None)
                    yield json.dumps(record, ensure_ascii=False)

    def load(self, lines: Iterable[str | bytes]) -> int:
        """Read what dump() yields; return the number of messages. One transaction: all or nothing.

        Ids are kept; ids given out later are higher. A bad line is a UsageError, an id that exists already
        an IntegrityError; both name the line. Aliases (of the package on PyPI) are skipped with a warning.
        Other writers wait meanwhile.
        """
        count, last = 0, None
        with self.transaction() as run:
            for number, line in enumerate(lines, 1):
                try:
                    record = _parse_dump_line(line, self.settings.max_message_size, header=last is None)
                    if isinstance(record, int):
                        last = max(last or 0, record)
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


def matches(name: str, pattern: str | None) -> bool:
    """Does a queue name match a shell pattern? None matches everything."""
    if pattern is None:
        return True
    import fnmatch

    return fnmatch.fnmatchcase(name, pattern)


def pages(fetch: Callable[[int, int], list[Any]], low: int = 0) -> Iterator[Any]:
    """Yield rows (id, body, ...) page by page: fetch(low, limit) returns those with ids above low.

    By id, not by offset: nothing is skipped while others remove rows. Pages begin small and grow while
    they are light, so large bodies do not fill the memory.
    """
    limit = 4
    while True:
        rows = fetch(low, limit)
        yield from rows
        if len(rows) < limit:
            return
        low, limit = rows[-1][0], next_batch_size(limit, [row[1] for row in rows])


def next_batch_size(size: int, bodies: Sequence[str]) -> int:
    """Double the batch, or halve it when it was heavy."""
    return max(1, size // 2) if sum(map(len, bodies)) > BATCH_BYTES else min(MAX_BATCH, size * 2)


def _dump_rows(run: Run, queue: str, held: bool) -> Iterator[Any]:
    """(id, body, attempt[, held_until]) of all messages of a queue."""

    def fetch(low: int, limit: int) -> list[Any]:
        if held:  # held messages have to be found between the ready ones: go through the table
            return run(SELECT_ANY, (queue, low, MAX_ID, limit), fetch=True)
        return [row[:3] for row in run(SELECT_READY, (queue, low, MAX_ID, limit, 0), fetch=True)]

    return pages(fetch)


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
        return _dumped_number(record.get("last_ts", 0), "last_ts")
    if kind == "alias":
        log_warning("alias %r: aliases are not supported, skipped", record.get("alias"))
        return None
    if kind != "message":
        raise ValueError(f"unknown type {kind!r}")
    held = record.get("held_until")
    return (
        _dumped_number(record.get("id"), "id", low=1),
        check_queue_name(record.get("queue")),
        check_body(record.get("body"), max_bytes),
        None if held is None else _dumped_number(held, "held_until"),
        _dumped_number(record.get("attempt", 0), "attempt"),
    )


def _dumped_number(value: object, name: str, low: int = 0) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= ID_DIGITS:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < MAX_ID:
        raise ValueError(f"{name} {value!r} is not a whole number in the range of ids")
    return value


# ---------------------------------------------------------------------------------------------------
# Queue: everything about one queue. A method is: check, one transaction, return.
# ---------------------------------------------------------------------------------------------------


class Queue:
    """One queue of messages.

    ``db_path`` is a file; None means the default place. ``runner`` or ``broker`` replace it and stay the
    caller's. Queues of one process on the same file share a connection; all methods may be called from
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
        return f"Queue({self.name!r})"

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- write

    def write(self, body: str, *, delay: float | None = None, until: datetime | int | None = None) -> int:
        """Append a message and return its id. It is committed, and durable, when this returns.

        ``delay`` in seconds, or ``until`` an aware datetime or nanoseconds since 1970: held back until
        then, and then in its old place in the order. MessageError if the body is too large or not text.
        """
        broker = self.broker
        text = check_body(body, broker.settings.max_message_size)
        held_until = None if delay is None and until is None else self._held_until(delay, until)
        id = broker.ids.now()
        try:
            broker.run(INSERT_MESSAGE, (id, self.name, text, held_until))
        except sqlite3.IntegrityError:  # others write, or the clock is behind the last id
            id = broker.together(lambda run: broker.insert(run, self.name, [text], held_until))[0]
        return id

    def write_many(
        self, bodies: Iterable[str], *, delay: float | None = None, until: datetime | int | None = None
    ) -> list[int]:
        """Append several messages in one transaction, all or none; return their ids, in order."""
        if isinstance(bodies, (str, bytes)):
            raise TypeError("bodies is an iterable of str: a single body goes to write()")
        texts = [check_body(body, self.broker.settings.max_message_size) for body in bodies]
        held_until = self._held_until(delay, until)
        if not texts:
            return []
        return self.broker.together(lambda run: self.broker.insert(run, self.name, texts, held_until))

    # -- read: at most once

    def read(
        self, *, message_id: Id = None, after: Id = None, before: Id = None, wait: float | None = None
    ) -> Message | None:
        """Remove the first ready message and return it; None if there is none.

        It is removed before the caller has it (at most once): use lease() or read_all() to lose nothing
        when the caller crashes. ``wait``: block up to that many seconds for one (math.inf: forever).
        """
        low, high = id_range(message_id, after, before)
        return self._first(lambda: self._take(low, high, 1), low, high, wait)

    def read_many(self, limit: int, *, after: Id = None, before: Id = None) -> list[Message]:
        """Remove up to ``limit`` ready messages in one transaction and return them (at most once)."""
        return self._take(*id_range(None, after, before), check_limit(limit))

    def read_all(
        self, *, after: Id = None, before: Id = None, lease: float = DEFAULT_LEASE_S
    ) -> Iterator[Message]:
        """Iterate over the ready messages; each is removed when the loop asks for the next (at least once).

        A message whose turn does not end, because the loop was left or the process died, is given back.
        Leases last ``lease`` seconds and are renewed in the background while the loop runs.
        """
        low, high = id_range(None, after, before)
        with LeaseKeeper(self, lease) as keeper:
            batch = keeper.take(None, low, high)
            while batch:
                for message in batch:
                    try:
                        yield message
                    except BaseException:  # the loop was left: this message was seen, the rest of the batch not
                        keeper.release(message)
                        raise
                    keeper.acknowledge(message)
                batch = keeper.take(None, low, high)

    # -- peek: removes nothing

    def peek(self, *, message_id: Id = None, after: Id = None, before: Id = None) -> Message | None:
        """Return the first ready message, or None; nothing is removed. By id, held ones are seen too."""
        low, high = id_range(message_id, after, before)
        if message_id is None:
            found = self._peek(low, high, 1)
        else:
            found = self.broker.run(SELECT_ANY, (self.name, low, high, 1))
        return self._message(found[0]) if found else None

    def peek_many(self, limit: int, *, after: Id = None, before: Id = None) -> list[Message]:
        """Return up to ``limit`` ready messages, the oldest first; nothing is removed."""
        return [self._message(row) for row in self._peek(*id_range(None, after, before), check_limit(limit))]

    def peek_all(self, *, after: Id = None, before: Id = None) -> Iterator[Message]:
        """Iterate over the ready messages. It goes on by id: none is skipped while others are removed."""
        low, high = id_range(None, after, before)
        for row in pages(lambda above, limit: self._peek(above, high, limit), low):
            yield self._message(row)

    def has_pending(self, *, message_id: Id = None, after: Id = None, before: Id = None) -> bool:
        """Is a message ready? (With a lower bound: a newer one than that?)"""
        low, high = id_range(message_id, after, before)
        return bool(self.broker.run(SELECT_PENDING, (self.name, low, high, self.broker.clock()))[0][0])

    def wait_until_pending(self, seconds: float, low: int = 0, high: int = MAX_ID) -> bool:
        """Block until a message between two ids is ready; False after that many seconds (math.inf: never)."""
        deadline = time.monotonic() + seconds
        if self.has_pending(after=low, before=high):
            return True
        with self.broker.alarm() as alarm:
            while not self.has_pending(after=low, before=high):
                if time.monotonic() >= deadline:
                    return False
                alarm.wait(deadline - time.monotonic())
        return True

    def count(self) -> int:
        """How many messages are ready (approximate while others write)."""
        count: int = self.broker.run(SELECT_COUNT, (self.name, self.broker.clock()))[0][0]
        return count

    def stats(self) -> Stats:
        """How many messages are ready, leased and delayed (approximate while others write)."""
        return Stats(*self.broker.run(SELECT_STATS, (self.name, self.broker.clock()))[0])

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
        return self._first(lambda: self.lease_many(lease_ns, low, high, 1), low, high, wait)

    def ack(self, message: Message) -> None:
        """Acknowledge: remove a message that you leased. LeaseLost if someone else has it now.

        A lease that ended is still yours while nobody took the message.
        """
        self.broker.together(lambda run: self.ack_in(run, message))

    def ack_in(self, run: Run, message: Message) -> None:
        """ack() in the caller's transaction."""
        if self._check_lease(run, message):
            run(RECORD_NEWEST)
        run(DELETE_MESSAGE, (message.id,))

    def extend(self, message: Message, seconds: float = DEFAULT_LEASE_S) -> None:
        """Let the lease end that many seconds from now. LeaseLost if someone else has the message."""
        until = self.broker.clock() + to_ns(seconds, "lease")

        def renew(run: Run) -> None:
            self._check_lease(run, message)
            run(RENEW_LEASE, (message.id, self.name, message.attempt, until))

        self.broker.together(renew, durable=False)

    def release(self, message: Message, *, delay: float | None = None) -> None:
        """Give a leased message back: ready at once, or after ``delay`` seconds. LeaseLost as in ack()."""
        until = self._held_until(delay, None)

        def give_back(run: Run) -> None:
            self._check_lease(run, message)
            run(RELEASE_MESSAGE, (message.id, until))

        self.broker.together(give_back, durable=False)

    def dead_letter(self, message: Message, dest: str | None = None) -> None:
        """Move a leased message to another queue, by default QUEUE.dead. LeaseLost as in ack().

        It keeps its id, is ready there, and its attempts count from 0.
        """
        target = check_queue_name(dest if dest is not None else self.name + ".dead")

        def move(run: Run) -> None:
            self._check_lease(run, message)
            run(MOVE_MESSAGE, (message.id, target))

        self.broker.together(move)

    # -- move and delete

    def move(self, dest: str, *, message_id: Id = None, after: Id = None, before: Id = None) -> Message | None:
        """Move the first ready message to another queue and return it; None if there is none.

        It keeps its id, so it takes the place among the others there that its age gives it. Its attempts
        count from 0 again.
        """
        moved = self._move(dest, *id_range(message_id, after, before), 1)
        return moved[0] if moved else None

    def move_many(self, dest: str, limit: int, *, after: Id = None, before: Id = None) -> list[Message]:
        """Move up to ``limit`` ready messages in one transaction and return them."""
        return self._move(dest, *id_range(None, after, before), check_limit(limit))

    def move_all(self, dest: str, *, after: Id = None, before: Id = None) -> int:
        """Move all ready messages, in transactions of limited size; return how many."""
        return sum(len(batch) for batch in self.move_batches(dest, *id_range(None, after, before)))

    def move_batches(self, dest: str, low: int = 0, high: int = MAX_ID) -> Iterator[list[Message]]:
        """Move what is ready between two ids, one transaction for each batch, and yield the batches."""
        size = 4
        while True:
            batch = self._move(dest, low, high, size)
            if batch:
                yield batch
            if len(batch) < size:
                return
            size = next_batch_size(size, batch)

    def delete(self, *, message_id: Id = None) -> int:
        """Remove one message, or all of the queue, held ones too; return how many were removed."""
        wanted = None if message_id is None else check_id(message_id)
        with self.broker.transaction() as run:
            run(RECORD_NEWEST)
            if wanted is not None:
                found = run(SELECT_MESSAGE, (wanted, self.name), fetch=True)
                if found:
                    run(DELETE_MESSAGE, (wanted,))
                return len(found)
            count = self.stats().total
            run(DELETE_READY, (self.name, 0, MAX_ID))
            run(DELETE_HELD, (self.name,))
            return count

    def close(self) -> None:
        """Close the queue; the connection is closed with its last user. Closing twice is allowed."""
        if self._owns_broker:
            self.broker.close()

    # -- the transactions that several methods share

    def _first(self, take: Callable[[], list[Message]], low: int, high: int, wait: float | None) -> Message | None:
        """The first message that take() finds, before the wait is over."""
        if wait is not None and (isinstance(wait, bool) or not wait >= 0):
            raise ValueError(f"wait is a number of seconds from 0, not {wait!r}")
        deadline = None if wait is None else time.monotonic() + wait
        while deadline is None or self.wait_until_pending(max(0.0, deadline - time.monotonic()), low, high):
            found = take()
            if found or deadline is None:
                return found[0] if found else None
        return None

    def _take(self, low: int, high: int, limit: int) -> list[Message]:
        """Remove and return the first ready messages between two ids."""
        return self.broker.together(lambda run: self._take_in(run, low, high, limit))

    def _take_in(self, run: Run, low: int, high: int, limit: int) -> list[Message]:
        rows = self._select_ready(run, low, high, limit)
        if rows:
            last = rows[-1][0]
            if last == rows[-1][3]:
                run(RECORD_NEWEST)
            if len(rows) == 1:
                run(DELETE_MESSAGE, (last,))
            else:
                run(DELETE_READY, (self.name, low, last + 1))
        return [Message(row[1], row[0], self.name, row[2]) for row in rows]

    def lease_many(self, lease_ns: int, low: int, high: int, limit: int) -> list[Message]:
        """Lease the first ready messages between two ids; LeaseKeeper.take() also keeps the leases alive.

        One that was leased before is leased alone: if it kills its consumers, the others of the batch
        must not use up their attempts with it.
        """
        until = self.broker.clock() + lease_ns

        def take(run: Run) -> list[Message]:
            rows = self._select_ready(run, low, high, limit)
            fresh = next((n for n, row in enumerate(rows) if row[2]), len(rows))
            rows = rows[: max(1, fresh)]
            if rows:
                run(LEASE_READY, (self.name, low, rows[-1][0] + 1, until))
            return [Message(row[1], row[0], self.name, row[2] + 1) for row in rows]

        return self.broker.together(take, durable=False)

    def _move(self, dest: str, low: int, high: int, limit: int) -> list[Message]:
        if check_queue_name(dest) == self.name:
            raise ValueError(f"source and destination are the same queue, {dest!r}")

        def move(run: Run) -> list[Message]:
            rows = self._select_ready(run, low, high, limit)
            if rows:
                run(MOVE_READY, (self.name, low, rows[-1][0] + 1, dest))
            return [Message(row[1], row[0], dest) for row in rows]

        return self.broker.together(move)

    def _select_ready(self, run: Run, low: int, high: int, limit: int) -> list[Any]:
        """The first ready rows between two ids, after what is due became ready."""
        now = self.broker.clock()
        rows: list[Any] = run(SELECT_READY, (self.name, low, high, limit, now), fetch=True)
        if not rows or rows[0][4]:
            run(PROMOTE_DUE, (now,))
            rows = run(SELECT_READY, (self.name, low, high, limit, now), fetch=True)
        return rows

    def _peek(self, low: int, high: int, limit: int) -> list[Any]:
        return self.broker.run(SELECT_PEEK, (self.name, low, high, limit, self.broker.clock()))

    def _message(self, row: Sequence[Any]) -> Message:
        return Message(row[1], row[0], self.name, row[2])

    def _check_lease(self, run: Run, message: Message) -> bool:
        """LeaseLost unless the message is where its holder left it. True if its id is the highest of all."""
        if not isinstance(message, Message):
            raise TypeError(f"give the Message that lease() returned, not {type(message).__name__}")
        if message.attempt == GIVEN_BACK:
            raise LeaseLost(f"message {message.id} was given back")
        if message.attempt < 1:
            raise ValueError(f"message {message.id} was not leased: use lease(), not read() or peek()")
        found = run(SELECT_MESSAGE, (message.id, self.name), fetch=True)
        if not found:
            raise LeaseLost(f"message {message.id} is not in {self.name!r} now: it was acknowledged, moved or deleted")
        attempt, newest = found[0]
        if attempt != message.attempt:
            raise LeaseLost(f"the lease {message.id}.{message.attempt} ended: attempt {attempt} has the message now")
        return bool(newest == message.id)

    def _held_until(self, delay: float | None, until: datetime | int | None) -> int | None:
        """When a message becomes ready, from a delay or a time; None: at once."""
        if delay is not None and until is not None:
            raise ValueError("give delay or until, not both")
        now = self.broker.clock()
        if delay is not None:
            return now + to_ns(delay) if delay else None
        due = 0 if until is None else check_id(until, "until") if isinstance(until, int) else datetime_to_ns(until)
        return due if due > now else None


class LeaseKeeper(Chore):
    """The leases of one consumer: taken in batches, renewed in the background, given back at the end.

    ``with LeaseKeeper(queue, lease_s) as keeper:`` take() messages, and acknowledge() each.
    ``lazy``: renew only after keep_alive(), for those who are mostly done before a thread could start.
    """

    def __init__(self, queue: Queue, lease_s: float = DEFAULT_LEASE_S, *, lazy: bool = False) -> None:
        self._lease_ns = to_ns(lease_s, "lease")
        if not self._lease_ns:
            raise ValueError("a lease must be longer than 0 seconds")
        self.period_s, self.next_at = lease_s / 3, 0.0
        self._queue, self._lazy, self._pid = queue, lazy, os.getpid()
        # Guards _open: what is leased and not settled yet. Taken inside the runner's mutex, never around it.
        self._guard = threading.Lock()
        self._open: dict[int, Message] = {}
        self._size, self._taken_at = 1, 0.0
        self._last: list[Message] = []

    def __enter__(self) -> LeaseKeeper:
        if not self._lazy:
            self.keep_alive()
        return self

    def keep_alive(self) -> None:
        """Renew the leases in the background from now on."""
        if not self.next_at:
            self.next_at = time.monotonic() + self.period_s
            self._queue.broker.attendant.add(self)

    def __exit__(self, *_: object) -> None:
        self._queue.broker.attendant.remove(self)
        self.give_back()

    def take(self, limit: int | None = None, low: int = 0, high: int = MAX_ID) -> list[Message]:
        """Lease up to ``limit`` messages between two ids; None: few while they are worked on slowly, more
        while fast. Looks without the writer lock first."""
        if not self._queue.has_pending(after=low, before=high):
            return []
        self._last = self._queue.lease_many(self._lease_ns, low, high, limit or self._adapted_size())
        with self._guard:
            self._open.update((message.id, message) for message in self._last)
        return self._last

    def _adapted_size(self) -> int:
        now = time.monotonic()
        if now - self._taken_at > FAST_BATCH_S:
            self._size = max(1, self._size // 2)
        else:
            self._size = next_batch_size(self._size, self._last)
        self._taken_at = now
        return self._size

    def settle(self, message: Message) -> None:
        """Renew it no longer: the owner acknowledges, releases or moves it now."""
        with self._guard:
            self._open.pop(message.id, None)

    def acknowledge(self, *messages: Message) -> None:
        """Acknowledge, in one transaction. Lost leases are logged: someone else has those messages."""
        for message in messages:
            self.settle(message)
        for error in self._queue.broker.together(lambda run: self._acknowledge_in(run, messages)):
            log_warning("queue %s: handled, but %s", self._queue.name, error)

    def _acknowledge_in(self, run: Run, messages: Sequence[Message]) -> list[LeaseLost]:
        lost = []
        for message in messages:
            try:
                self._queue.ack_in(run, message)
            except LeaseLost as error:
                lost.append(error)
        return lost

    def release(self, message: Message, *, delay: float | None = None) -> None:
        """Give one back, as Queue.release(); a lost lease is logged."""
        self.settle(message)
        try:
            if os.getpid() == self._pid:  # a forked child leaves the leases to its parent
                self._queue.release(message, delay=delay)
        except LeaseLost as error:
            log_warning("queue %s: %s", self._queue.name, error)

    def give_back(self) -> None:
        """Give back what was taken and not settled, at once, as if it had not been leased."""
        with self._guard:
            left, self._open = self._open, {}
        if left and os.getpid() == self._pid:
            with self._queue.broker.relaxed_transaction() as run:
                for message in left.values():
                    run(UNLEASE_MESSAGE, (message.id, message.queue, message.attempt))
                    message.attempt = GIVEN_BACK  # the number is given out again: nobody may come with it twice

    def forget(self) -> None:
        """Let the leases end by themselves."""
        with self._guard:
            self._open.clear()

    def run(self) -> None:
        """Renew what is open, in one transaction. The attendant calls this."""
        if self._open:
            # The guard inside the transaction: its owner may settle messages in a transaction of its own, and what
            # is settled before must not be renewed after it.
            with self._queue.broker.relaxed_transaction() as run, self._guard:
                until = self._queue.broker.clock() + self._lease_ns
                for message in self._open.values():
                    run(RENEW_LEASE, (message.id, message.queue, message.attempt, until))


# ---------------------------------------------------------------------------------------------------
# Watchers: call a handler for every message, now and as they come, and do not lose it if this fails.
# ---------------------------------------------------------------------------------------------------

STOP_EVENT_CHECK_S = 0.08  # how often a caller's own stop event is looked at
BUSY_PAUSE_S = 0.5  # how long a watcher pauses when the database is busy or full, before it goes on


def json_line(message: Message, **more: object) -> str:
    """A message as one line of JSON. The id is a string: jq 1.6 and JavaScript round integers of its size."""
    import json

    return json.dumps({"message": str(message), "timestamp": str(message.id), **more}, ensure_ascii=False)


def simple_print_handler(message: Message, timestamp: int) -> None:
    """Print ``[id] body``."""
    print(f"[{timestamp}] {message}", flush=True)


def json_print_handler(message: Message, timestamp: int) -> None:
    """Print the message as one line of JSON, as the command line does."""
    print(json_line(message), flush=True)


def logger_handler(message: Message, timestamp: int) -> None:
    """Log the message to the logger "simplebroker", level INFO."""
    import logging

    logging.getLogger("simplebroker").info("message %d: %s", timestamp, message)


def default_error_handler(error: BaseException, message: Message, timestamp: int) -> bool | None:
    """Log the error; the message is given back, and dead-lettered when its attempts are used up."""
    import logging

    logging.getLogger("simplebroker").error("message %d: handler failed: %r", timestamp, error, exc_info=error)
    return None


class QueueWatcher:
    """Calls ``handler(message, timestamp)`` for every message of a queue, until it is stopped.

    queue          a name, or a Queue (which stays the caller's); ``db`` is the database for a name:
                   a path, a Broker, or None for the default
    peek           only look: every message once, in the order of ids, nothing removed. What comes to
                   the queue with a lower id than the last one seen (moved in, given back, delayed) is
                   not seen
    after          handle only messages with a higher id
    lease          seconds; renewed in the background while the handler runs. None: remove each message
                   before its handler is called (at most once)
    max_attempts   after so many failed attempts the message moves to ``dead_letter`` (QUEUE.dead)
    error_handler  ``error_handler(error, message, timestamp)`` decides about a handler that raised. True:
                   dealt with, acknowledge. None: give it back with a growing delay. False: give it back
                   and stop the watcher
    stop_event     a threading.Event that stops the watcher within 0.1 s
    batch_size     messages leased at once; None: few while handlers are slow, more when they are fast
    backoff        seconds before the second attempt; doubles with each further one, up to 300

    By default at least once: lease, call, acknowledge. With peek a failing message is tried again
    max_attempts times and then passed, as it stays in the queue.
    """

    def __init__(
        self, queue: str | Queue, handler: Handler, *, db: StrPath | Broker | None = None, peek: bool = False,
        after: Id = None, lease: float | None = DEFAULT_LEASE_S, max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        dead_letter: str | None = None, error_handler: ErrorHandler | None = None,
        stop_event: threading.Event | None = None, batch_size: int | None = None, backoff: float = BACKOFF_S,
    ) -> None:  # fmt: skip
        if not callable(handler):
            raise TypeError(f"handler must be callable, not {type(handler).__name__}")
        if isinstance(queue, Queue) and db is not None:
            raise ValueError("give a Queue or a db, not both")
        self._owns_queue = not isinstance(queue, Queue)
        if isinstance(queue, Queue):
            self.queue = queue
        else:
            self.queue = Queue(queue, broker=db) if isinstance(db, Broker) else Queue(queue, db)
        self.position = id_range(after=after)[0]  # with peek: the id of the last message seen
        self._handler, self._error_handler = handler, error_handler or default_error_handler
        self._step = self._peek_batch if peek else self._read_one if lease is None else self._lease_batch
        self._keeper = LeaseKeeper(self.queue, DEFAULT_LEASE_S if lease is None else lease)
        self._max_attempts = check_limit(max_attempts, "max_attempts")
        self._dead_letter = check_queue_name(dead_letter if dead_letter is not None else self.queue.name + ".dead")
        self._batch_size = None if batch_size is None else check_limit(batch_size, "batch_size")
        self._backoff = to_ns(backoff, "backoff") / NS
        self._alarm = Alarm(self.queue.broker.attendant)
        self._stop_event, self.stopping = stop_event, False
        self._thread: threading.Thread | None = None
        self._running = threading.Lock()  # held by the thread that is in watch()

    # -- start and stop

    def watch(self) -> None:
        """Handle messages until stopped. Blocks.

        In the main thread SIGINT and SIGTERM stop it: the current handler ends, then this returns.
        """
        if not self._running.acquire(blocking=False):
            raise RuntimeError("this watcher is running already")
        try:
            with StopSignals(self.request_stop), self._alarm, self._keeper:
                while not self._stopped():
                    try:
                        if not self._step():
                            self._idle()
                    except sqlite3.OperationalError as error:  # busy, or a full disk: nothing is lost, go on later
                        log_warning("watcher of %s: %s", self.queue.name, error)
                        self._keeper.forget()
                        self._sleep(BUSY_PAUSE_S)
        finally:
            self._running.release()
            if self._owns_queue:
                self.queue.close()

    def run_in_thread(self) -> threading.Thread:
        """Start watch() in a daemon thread and return the thread; the same one if it was started before."""
        if self._thread is None:
            name = f"simplebroker-watch-{self.queue.name}"
            self._thread = threading.Thread(target=self.watch, name=name, daemon=True)
            self._thread.start()
        return self._thread

    def request_stop(self) -> None:
        """Stop after the current message. Returns at once; safe in handlers and signal handlers."""
        self.stopping = True
        self._alarm.wake()

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

    def _idle(self) -> None:
        """Nothing is there: sleep until something may be."""
        check_s = None if self._stop_event is None else STOP_EVENT_CHECK_S
        while not self._stopped() and not self._alarm.wait(check_s):
            pass

    def _sleep(self, seconds: float) -> None:
        """Sleep that long, or until stopped."""
        deadline = time.monotonic() + seconds
        while not self._stopped() and time.monotonic() < deadline:
            left = deadline - time.monotonic()
            self._alarm.wait(left if self._stop_event is None else min(left, STOP_EVENT_CHECK_S))

    # -- the three ways to take messages; each tells whether there were any

    def _lease_batch(self) -> bool:
        batch = self._keeper.take(self._batch_size, low=self.position)
        for message in batch:
            if self._stopped():
                self._keeper.give_back()
                break
            self._attempt(message)
        return bool(batch)

    def _read_one(self) -> bool:
        message = self.queue.read(after=self.position) if self.queue.has_pending(after=self.position) else None
        if message is not None:
            self._call(message)
        return message is not None

    def _peek_batch(self) -> bool:
        batch = self.queue.peek_many(self._batch_size or 16, after=self.position)
        for message in batch:
            if self._stopped() or not self._see(message):
                break
            self.position = message.id
        return bool(batch)

    # -- one message

    def _see(self, message: Message) -> bool:
        """Call until it works or the attempts are used up; False if it is to be seen again."""
        for attempt in range(1, self._max_attempts + 1):
            verdict = self._call(message)
            if verdict is not None:
                return verdict
            if attempt < self._max_attempts:
                self._sleep(backoff_s(self._backoff, attempt))
                if self._stopped():
                    return False
        return True

    def _attempt(self, message: Message) -> None:
        """Handle a leased message and settle it."""
        if message.attempt > self._max_attempts:  # it killed its consumers before they could say so
            self._move(message, self._dead_letter)
            return
        verdict = self._call(message)
        if verdict:
            self._finish(message)
        elif verdict is None and message.attempt >= self._max_attempts:
            self._move(message, self._dead_letter)
        else:
            self._keeper.release(message, delay=backoff_s(self._backoff, message.attempt) if verdict is None else None)

    def _call(self, message: Message) -> bool | None:
        """Call the handler. True: done. None: it failed, try again. False: it failed, and the watcher stops."""
        try:
            self._handler(message, message.id)
            return True
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is for the error handler
            try:
                verdict = self._error_handler(error, message, message.id)
            except Exception as second:  # noqa: BLE001 - an error handler that fails decides nothing
                verdict = default_error_handler(second, message, message.id)
        if verdict is False:
            self.request_stop()
        return verdict if isinstance(verdict, bool) else None

    def _finish(self, message: Message) -> None:
        """The handler is done with a leased message."""
        self._keeper.acknowledge(message)

    def _move(self, message: Message, dest: str) -> None:
        if dest == self._dead_letter:
            log_warning("queue %s: message %d moves to %s", message.queue, message.id, dest)
        self._keeper.settle(message)
        try:
            self.queue.dead_letter(message, dest)
        except LeaseLost as error:
            log_warning("queue %s: %s", message.queue, error)


class QueueMoveWatcher(QueueWatcher):
    """Moves every message of ``source`` to ``dest``, now and as they come.

    With a handler, it is called first, and the message moves when it returned: a stage of a pipeline, at
    least once. The other parameters are those of QueueWatcher.
    """

    def __init__(
        self, source: str | Queue, dest: str, handler: Handler | None = None, *, db: StrPath | Broker | None = None,
        after: Id = None, lease: float = DEFAULT_LEASE_S, max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        dead_letter: str | None = None, error_handler: ErrorHandler | None = None,
        stop_event: threading.Event | None = None, batch_size: int | None = None, backoff: float = BACKOFF_S,
    ) -> None:  # fmt: skip
        super().__init__(
            source, handler or logger_handler, db=db, after=after, lease=lease, max_attempts=max_attempts,
            dead_letter=dead_letter, error_handler=error_handler, stop_event=stop_event, batch_size=batch_size,
            backoff=backoff,
        )  # fmt: skip
        self._dest = check_queue_name(dest)
        if self._dest == self.queue.name:
            raise ValueError(f"source and destination are the same queue, {dest!r}")
        if handler is None:
            self._step = self._move_batch

    def _move_batch(self) -> bool:
        if not self.queue.has_pending(after=self.position):
            return False
        return bool(self.queue.move_many(self._dest, self._batch_size or MAX_BATCH, after=self.position))

    def _finish(self, message: Message) -> None:
        self._move(message, self._dest)


def backoff_s(base_s: float, attempt: int) -> float:
    """How long to wait after the attempt-th failure."""
    return float(min(MAX_BACKOFF_S, base_s * 2 ** min(attempt - 1, 60)))


class StopSignals:
    """SIGINT and SIGTERM call a function while the block runs, if this is the main thread.

    ``pipe``: a byte is written there at once, also if the kernel gives the signal to another thread. The main
    thread, where the function is called, should be reading it. None: it is called when the main thread wakes.
    """

    def __init__(self, action: Callable[[], None], pipe: int | None = None) -> None:
        self._action, self._pipe = action, pipe
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            import signal

            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
            if self._pipe is not None:
                self._previous_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)

    def __exit__(self, *_: object) -> None:
        if self._previous:
            import signal

            for number, previous in self._previous.items():
                signal.signal(number, previous)
            if self._pipe is not None:
                signal.set_wakeup_fd(self._previous_pipe)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._action()


# ---------------------------------------------------------------------------------------------------
# Command line: a command takes parsed options, prints, and returns an exit status (None: done).
# ---------------------------------------------------------------------------------------------------

DONE, ERROR, NOTHING = 0, 1, 2
FLUSH_BYTES = 1 << 16


class Outlet:
    """Standard output, as bytes. It knows when the reader of a pipe has taken what was written.

    On Linux a pipe is made one page small: poll() then reports room only when the reader has taken all
    of it. So a message counts as handed over when it was read, and ``read --all | head -20`` removes 20.
    Elsewhere, and for files and terminals, it counts as handed over when it was flushed.
    """

    _F_SETPIPE_SZ = 1031
    LAST_WAIT_S = 1.0  # for the last message: a caller may first wait for our end and read then

    def __init__(self) -> None:
        if sys.stdout is None:
            raise OperationalError("standard output is closed")
        self._fd = sys.stdout.fileno()
        self._unsent: list[bytes] = []
        self._size = 0
        self.exact = stat.S_ISFIFO(os.fstat(self._fd).st_mode) and sys.platform == "linux" and self._shrink()

    def _shrink(self) -> bool:
        import errno

        while True:
            try:
                fcntl.fcntl(self._fd, self._F_SETPIPE_SZ, 4096)
                return True
            except OSError as error:
                if error.errno != errno.EBUSY:
                    return False
            self.wait_until_read(0.01)  # bytes of someone else are in it: wait until they are read

    def write(self, data: bytes) -> None:
        """Write now or later; flush() makes sure."""
        self._unsent.append(data)
        self._size += len(data)
        if self._size > FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write everything; BrokenPipeError if nobody reads any more."""
        data = memoryview(b"".join(self._unsent))
        self._unsent.clear()
        self._size = 0
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # someone made our end of the pipe non-blocking
                self.wait_until_read()

    def wait_until_read(self, patience_s: float | None = None) -> bool:
        """With exact: block until the reader has taken everything; False if patience_s were over first.

        BrokenPipeError if it has gone and left something unread.
        """
        import select
        import termios

        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        events = poll.poll(1000 * (SIGNAL_CHECK_S if patience_s is None else patience_s))
        while patience_s is None and not events:
            events = poll.poll(1000 * SIGNAL_CHECK_S)
        if events and events[0][1] & select.POLLERR:
            unread = fcntl.ioctl(self._fd, termios.FIONREAD, b"\0\0\0\0")
            if any(unread):
                raise BrokenPipeError("nobody reads the output")
        return bool(events)


class Progress:
    """A running count on standard error, if that is a terminal and not --quiet. main() ends its line."""

    shown = False

    def __init__(self, what: str, options: Options, *, after_s: float = 0.5) -> None:
        self._what, self._count, self._next_at = what, 0, time.monotonic() + after_s
        self._on = not options.quiet and sys.stderr is not None and sys.stderr.isatty()

    def add(self, number: int) -> None:
        self._count += number
        if self._on and time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + 0.2
            print(f"\r{self._what}: {self._count:,}", end="", file=sys.stderr, flush=True)
            Progress.shown = True


class Options:
    """What the command line said. What it did not say is None, unless it is named here."""

    run: Callable[[Options], int | None]
    operands: list[str]
    command = ""
    lease_s = DEFAULT_LEASE_S
    max_attempts = DEFAULT_MAX_ATTEMPTS
    backoff = BACKOFF_S
    jobs = 1

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # argparse asks for private names of its own
            raise AttributeError(name)
        return None

    def broker(self) -> Broker:
        """The broker on the database that the options mean."""
        settings = Settings.from_environment()
        return Broker(database_path(settings, self.dir, self.file), settings=settings)

    def queue(self) -> Queue:
        """The queue of the first operand."""
        return Queue(self.operands[0], broker=self.broker())

    def range(self) -> tuple[int, int]:
        """The bounds that -m, --after and --before mean together."""
        return id_range(self.id, self.after, self.before)

    def limit(self) -> int | None:
        """How many messages the command takes; None: all."""
        if self.all and self.number:
            raise UsageError("--all and -n exclude each other")
        return None if self.all else self.number or 1

    def format(self, message: Message) -> bytes:
        """A message in the shape that --json or -t asks for, or plain."""
        if self.json:
            return json_line(message).encode() + b"\n"
        text = f"{message.id}\t{message}" if self.stamps else message
        return text.encode() + (b"" if message.endswith("\n") else b"\n")

    def lease(self) -> Message:
        """The leased message that the second operand, ID.ATTEMPT, means."""
        id, _, attempt = self.operands[1].partition(".")
        if not (attempt.isascii() and attempt.isdigit() and len(attempt) < 10 and int(attempt)):
            raise UsageError(f"{self.operands[1]!r} is not a lease: give ID.ATTEMPT, as 'lease' printed it")
        return Message("", check_id(id, "the id of the lease"), self.operands[0], int(attempt))


def read_stdin() -> Any:
    """Standard input, for bytes."""
    if sys.stdin is None:
        raise OperationalError("standard input is closed")
    return sys.stdin.buffer


def decode(data: bytes, what: str, settings: Settings) -> str:
    """Bytes as text, or a MessageError. Too many are not decoded: they may end inside a character."""
    if len(data) > settings.max_message_size:
        limit = f"the {settings.max_message_size} bytes that BROKER_MAX_MESSAGE_SIZE allows"
        raise MessageError(f"{what} has more than {limit}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {data[error.start]:#04x} at {error.start}"
        raise MessageError(f"{what} is not UTF-8 ({byte}): encode it, for example with base64") from None


def message_text(operand: str, settings: Settings) -> str:
    """The body that an operand means: itself, or standard input for '-'."""
    data = read_stdin().read(settings.max_message_size + 1) if operand == "-" else os.fsencode(operand)
    return decode(data, "the message", settings)


def run_write(options: Options) -> int | None:
    queue = options.queue()
    if options.lines and len(options.operands) > 1:
        raise UsageError("--lines reads standard input: give no message")
    if options.lines:
        return write_lines(queue, options)
    outlet = Outlet() if options.json or options.stamps else None
    text = message_text((*options.operands, "-")[1], queue.broker.settings)
    print_ids(options, [queue.write(text, delay=options.delay)], outlet)
    return DONE


def print_ids(options: Options, ids: list[int], outlet: Outlet | None) -> None:
    """The ids of written messages, if they were asked for."""
    if outlet is not None:
        shape = '{{"timestamp": "{}"}}\n' if options.json else "{}\n"
        outlet.write("".join(map(shape.format, ids)).encode())
        outlet.flush()


def write_lines(queue: Queue, options: Options) -> int | None:
    """Each line of standard input is a message. What has arrived is written in one transaction."""
    settings = queue.broker.settings
    outlet = Outlet() if options.json or options.stamps else None
    progress = Progress("messages written", options)
    count, rest, ended = 0, b"", False
    while not ended:
        chunk = os.read(read_stdin().fileno(), BATCH_BYTES)
        ended = not chunk
        *lines, rest = (rest + chunk).split(b"\n")
        lines += [rest] if rest and (ended or len(rest) > settings.max_message_size) else []
        bodies: list[str] = []
        try:
            for line in lines:
                bodies.append(decode(line, "it", settings))
        except MessageError as error:
            raise MessageError(f"line {count + len(bodies) + 1}: {error}; the lines before it are written") from None
        finally:
            ids = queue.write_many(bodies, delay=options.delay)
            print_ids(options, ids, outlet)
        count += len(ids)
        progress.add(len(ids))
    return DONE


def run_read(options: Options) -> int | None:
    queue, limit, outlet = options.queue(), options.limit(), Outlet()
    low, high = options.range()
    count = 0
    if options.wait is not None and not queue.wait_until_pending(options.wait, low, high):
        return NOTHING
    with LeaseKeeper(queue, lazy=True) as keeper:
        while limit is None or count < limit:
            batch = keeper.take(limit and min(limit - count, MAX_BATCH), low, high)
            if not batch:
                break
            count += len(batch)
            last = outlet.exact and (count == limit or not queue.has_pending(after=low, before=high))
            hand_over(keeper, batch, outlet, options, batch[-1] if last else None)
    return DONE if count else NOTHING


def hand_over(
    keeper: LeaseKeeper, batch: list[Message], outlet: Outlet, options: Options, last: Message | None
) -> None:
    """Print leased messages, then acknowledge those that arrived. If the pipe closes, the others go back."""
    arrived = 0
    try:
        for message in batch:
            outlet.write(options.format(message))
            if outlet.exact:
                outlet.flush()
                if not outlet.wait_until_read(FAST_BATCH_S):
                    keeper.keep_alive()
                    outlet.wait_until_read(outlet.LAST_WAIT_S if message is last else None)
                arrived += 1
        outlet.flush()
        arrived = len(batch)
    finally:
        keeper.acknowledge(*batch[:arrived])


def run_peek(options: Options) -> int | None:
    queue, limit, outlet = options.queue(), options.limit(), Outlet()
    low, high = options.range()
    if options.wait is not None and not queue.wait_until_pending(options.wait, low, high):
        return NOTHING
    found: Iterable[Message | None] = queue.peek_all(after=low, before=high)
    if options.id is not None:  # finds held messages too
        found = [queue.peek(message_id=options.id, after=low, before=high)]
    elif limit is not None:
        found = queue.peek_many(limit, after=low, before=high)
    return print_all(found, outlet, options)


def print_all(messages: Iterable[Message | None], outlet: Outlet, options: Options) -> int:
    """Print messages that are not removed for it."""
    status = NOTHING
    for message in messages:
        if message is not None:
            outlet.write(options.format(message))
            status = DONE
    outlet.flush()
    return status


def run_move(options: Options) -> int | None:
    queue, limit, outlet = options.queue(), options.limit(), Outlet()
    dest, progress = options.operands[1], Progress("messages moved", options)
    low, high = options.range()
    status = NOTHING
    one = [] if limit is None else [queue.move_many(dest, limit, after=low, before=high)]
    for batch in queue.move_batches(dest, low, high) if limit is None else one:
        status = min(status, print_all(batch, outlet, options))
        progress.add(len(batch))
    return status


def run_lease(options: Options) -> int | None:
    queue, outlet = options.queue(), Outlet()
    low, high = options.range()
    message = queue.lease(options.lease_s, after=low, before=high)
    if message is None:
        return NOTHING
    line = json_line(message, attempt=message.attempt, lease=f"{message.id}.{message.attempt}")
    try:
        outlet.write(line.encode() + b"\n")
        outlet.flush()
    except OSError:
        queue.release(message)
        raise
    return DONE


def run_list(options: Options) -> int | None:
    import json

    queues, outlet = options.broker().queues(options.pattern), Outlet()
    for name, stats in queues.items():
        line = f"{name}: {stats.ready}"
        if options.json:
            line = json.dumps({"queue": name, **stats._asdict(), "total": stats.total})
        elif options.stats:
            line += f" ({stats.total} total, {stats.leased} leased, {stats.delayed} delayed)"
        outlet.write(line.encode() + b"\n")
    outlet.flush()
    return NOTHING if options.pattern is not None and not queues else DONE


def run_delete(options: Options) -> int | None:
    if bool(options.all) == bool(options.operands) or (options.all and options.id):
        raise UsageError("delete takes a queue, with or without -m, or --all")
    if not options.all:
        return DONE if options.queue().delete(message_id=options.id) else NOTHING
    broker = options.broker()
    with broker.transaction():
        count = sum(broker.queue(name).delete() for name in broker.queues())
    return DONE if count else NOTHING


def run_broadcast(options: Options) -> int | None:
    broker = options.broker()
    names = broker.broadcast(message_text(options.operands[0], broker.settings), options.pattern)
    return DONE if names else NOTHING


def run_dump(options: Options) -> int | None:
    outlet, progress = Outlet(), Progress("lines dumped", options)
    for line in options.broker().dump(options.pattern):
        outlet.write(line.encode() + b"\n")
        progress.add(1)
    outlet.flush()
    return DONE


def run_load(options: Options) -> int | None:
    import shutil
    import tempfile

    broker, source, progress = options.broker(), read_stdin(), Progress("lines loaded", options)

    def lines() -> Iterator[bytes]:
        for line in source:
            progress.add(1)
            yield line

    with tempfile.TemporaryFile() as spool:
        if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
            # Other writers wait during the load: let them not wait for whoever fills the pipe.
            shutil.copyfileobj(source, spool)
            spool.seek(0)
            source = spool
        broker.load(lines())
    return DONE


def run_init(options: Options) -> int | None:
    settings = Settings.from_environment()
    here = options.dir if options.dir or options.file else settings.db_location or os.getcwd()
    with Broker(database_path(settings, here, options.file), settings=settings).transaction():
        return DONE


def run_watch(options: Options) -> int | None:
    outlet = Outlet()
    if options.peek and options.move:
        raise UsageError("--peek and --move exclude each other")

    def handler(message: Message, timestamp: int) -> None:
        outlet.write(options.format(message))
        outlet.flush()
        while outlet.exact and not outlet.wait_until_read(FAST_BATCH_S):
            if watcher.stopping:
                raise InterruptedError("stopped before the message was read")

    failures: list[BaseException] = []

    def on_error(error: BaseException, message: Message, timestamp: int) -> bool:
        failures.append(error)
        return False

    queue, after = options.queue(), options.after
    watcher: QueueWatcher
    if options.move:
        watcher = QueueMoveWatcher(queue, options.move, handler, after=after, error_handler=on_error)
    else:
        watcher = QueueWatcher(queue, handler, peek=bool(options.peek), after=after, error_handler=on_error)
    watcher.watch()
    if failures and not isinstance(failures[0], InterruptedError):
        raise failures[0]
    return DONE


class CommandFailed(BrokerError):
    """A command of ``broker work`` ended with a status that is not 0."""


class Job:
    """What ``broker work`` does with a message: run the command, body on standard input."""

    KILL_AFTER_S = 5.0
    OUTPUT_WAIT_S = 1.0  # after its end, as it may have left a process behind that keeps its output open

    def __init__(self, command: list[str], options: Options) -> None:
        self._command, self._options = command, options
        self._pass_through = options.jobs == 1
        # Guards the three below; held while a process is started, so that end() misses none.
        self._guard = threading.Lock()
        self._running: set[Any] = set()
        self._ending = False
        self.failure: BrokerError | None = None
        self._print_guard = threading.Lock()  # guards what is printed: one whole line at a time

    def __call__(self, message: Message, timestamp: int) -> None:
        process = self._start(message)
        try:
            errors: list[OSError] = []
            pumps = [] if self._pass_through else self._pump(process, errors)
            status = process.wait()
            deadline = time.monotonic() + self.OUTPUT_WAIT_S
            for pump in pumps:
                while pump.is_alive() and self._expects_output(deadline):
                    pump.join(SIGNAL_CHECK_S)
            if errors:
                raise CommandFailed(f"its output cannot be passed on: {errors[0]}")
        finally:
            with self._guard:
                self._running.discard(process)
        if status:
            raise CommandFailed(f"exit status {status}" if status > 0 else f"killed by signal {-status}")

    def failed(self, error: BaseException, message: Message, timestamp: int) -> bool | None:
        """The error handler: give back at once when we stop, else with a delay."""
        if self._ending or self.failure is not None:
            return False
        complain(f"message {timestamp}, attempt {message.attempt}: {error}")
        return None

    def _start(self, message: Message) -> Any:
        import subprocess
        import tempfile

        names = {"BROKER_QUEUE": message.queue, "BROKER_MESSAGE_ID": message.id, "BROKER_ATTEMPT": message.attempt}
        environ = {**os.environ, **{name: str(value) for name, value in names.items()}}
        output = None if self._pass_through else subprocess.PIPE
        # The body is in a file before the command starts: if we are killed, it does not see half of it.
        with tempfile.TemporaryFile() as body, self._guard:
            if self._ending:
                raise CommandFailed("stopped")
            try:
                body.write(message.encode())
                body.seek(0)
                # A session of its own, so that Ctrl-C in a terminal stops the worker and not the command.
                process = subprocess.Popen(
                    self._command, stdin=body, stdout=output, stderr=output, env=environ,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self.failure = OperationalError(f"cannot start {self._command[0]!r}: {error.strerror}")
                raise self.failure from error
            self._running.add(process)
        return process

    def _expects_output(self, deadline: float) -> bool:
        slow = self._print_guard.locked()  # whoever reads ours takes long
        return not self._ending and (slow or time.monotonic() < deadline)

    def _pump(self, process: Any, errors: list[OSError]) -> list[threading.Thread]:
        """Pass on what the command prints, in whole lines."""

        def pump(source: Any, target: Any) -> None:
            with source:
                for line in source:
                    if target is not None:  # else it is closed, and the command must not block
                        with self._print_guard:
                            try:
                                target.buffer.write(line if line.endswith(b"\n") else line + b"\n")
                                target.flush()
                            except OSError as error:
                                errors.append(error)
                                return

        pairs = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        pumps = [threading.Thread(target=pump, args=pair, daemon=True) for pair in pairs]
        for thread in pumps:
            thread.start()
        return pumps

    def end(self) -> None:
        """End the commands that run: ask them, and after a while kill them."""
        import signal

        with self._guard:
            self._ending = True
            processes = list(self._running)
        deadline = time.monotonic() + self.KILL_AFTER_S
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                try:
                    os.killpg(process.pid, number)
                except (ProcessLookupError, PermissionError):  # all of them have ended
                    pass
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                time.sleep(0.01)


class DrainableWatcher(QueueWatcher):
    """A watcher that can stop when drained, keeps the error that ended it, and wakes who waits for its end."""

    drain = ended = False
    failure: BrokerError | OSError | None = None
    when_ended: Callable[[], object]

    def watch(self) -> None:
        try:
            super().watch()
        except (BrokerError, OSError) as error:  # run_work() raises it in the main thread
            self.failure = error
        finally:
            self.ended = True
            self.when_ended()

    def _idle(self) -> None:
        stats = self.queue.stats() if self.drain else None
        if stats is None:
            super()._idle()
        elif stats.ready or stats.leased:
            self._alarm.wait(self.queue.broker.settings.max_interval_s)  # acknowledging rings no bell
        else:
            self.request_stop()


def first_failure(job: Job, workers: list[DrainableWatcher]) -> BrokerError | OSError | None:
    """Why the work cannot go on; None if it can."""
    return job.failure or next((worker.failure for worker in workers if worker.failure is not None), None)


def make_workers(options: Options, job: Job, when_ended: Callable[[], object]) -> list[DrainableWatcher]:
    """As many as are to run commands at once."""
    broker, workers = options.broker(), []
    for _ in range(options.jobs):
        worker = DrainableWatcher(
            broker.queue(options.operands[0]), job, lease=options.lease_s, dead_letter=options.dead_letter,
            max_attempts=options.max_attempts, error_handler=job.failed, batch_size=1,
            backoff=options.backoff,
        )  # fmt: skip
        worker.drain, worker.when_ended = bool(options.drain), when_ended
        workers.append(worker)
    return workers


def run_work(options: Options) -> int | None:
    import shutil

    name, *command = options.operands
    if shutil.which(command[0]) is None:
        raise OperationalError(f"cannot start {command[0]!r}: no such command; nothing was taken from {name!r}")
    happens, tell = os.pipe()  # a worker has ended, or a signal has come
    if hasattr(os, "set_blocking"):
        os.set_blocking(tell, False)  # as signals demand, where it exists
    job, signals = Job(command, options), []
    workers = make_workers(options, job, lambda: os.write(tell, b"\0"))

    def stop() -> None:
        signals.append(True)
        for worker in workers:
            worker.request_stop()
        if len(signals) == 2:
            threading.Thread(target=job.end, daemon=True).start()

    with StopSignals(stop, tell):
        threads = [worker.run_in_thread() for worker in workers]
        while not all(worker.ended for worker in workers):
            os.read(happens, 64)
            if first_failure(job, workers) is not None and not signals:
                stop()
        for thread in threads:
            thread.join()
    os.close(happens)
    os.close(tell)
    error = first_failure(job, workers)
    if error is not None:
        raise error
    return DONE


def run_status(options: Options) -> int | None:
    broker = options.broker()
    status = {"database": broker.path, **broker.status()}
    if not os.path.exists(broker.path):
        return missing(broker.path)
    text = "\n".join(f"{name}: {value}" for name, value in status.items())
    if options.json:
        import json

        text = json.dumps({**status, "last_ts": str(status["last_ts"])}, ensure_ascii=False)
    outlet = Outlet()
    outlet.write(text.encode(errors="surrogateescape") + b"\n")
    outlet.flush()
    return DONE


def run_vacuum(options: Options) -> int | None:
    broker = options.broker()
    if not os.path.exists(broker.path):
        return missing(broker.path)
    Progress("bytes to vacuum", options, after_s=0).add(os.path.getsize(broker.path))
    broker.vacuum()
    return DONE


def run_cleanup(options: Options) -> int | None:
    broker = options.broker()
    return DONE if broker.delete_database() else missing(broker.path)


def missing(path: str) -> int:
    complain(f"no database at {path!r}")
    return NOTHING


def complain(text: str) -> None:
    """One line on standard error, if that is open."""
    if sys.stderr is not None:
        try:
            print("broker:", " ".join(text.split()), file=sys.stderr, flush=True)
        except OSError:  # nobody can be told, nor that; but the exit status can
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _flag_option(*flags: str, **more: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return flags, {"action": "store_true", **more}


def _option(*flags: str, **more: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return flags, more


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**31):
        raise ValueError(f"{text!r} is not a whole number from 1")
    return int(text)


# The options by name: their flags, and what argparse is told about them. A command names those it has.
OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "all": _flag_option("--all", help="all of them"),
    "json": _flag_option("--json", help="one line of JSON each"),
    "stamps": _flag_option("-t", "--timestamps", dest="stamps", help="the id and a tab first"),
    "number": _option("-n", "--number", type=_count, metavar="N", help="up to N of them"),
    "id": _option("-m", "--message-id", type=check_id, dest="id", metavar="ID", help="this message only"),
    "after": _option("--after", "--since", type=parse_timestamp, metavar="TS", help="newer than this id or time"),
    "before": _option("--before", type=parse_timestamp, metavar="TS", help="older than this id or time"),
    "wait": _option(
        "--wait", type=parse_duration, nargs="?", const=float("inf"), metavar="SECONDS", help="block until one comes"
    ),
    "delay": _option("--delay", type=parse_duration, metavar="DURATION", help="not deliverable before that"),
    "for": _option("--for", type=parse_duration, dest="lease_s", metavar="DURATION", help="length of the lease"),
    "lease": _option("--lease", type=parse_duration, dest="lease_s", metavar="DURATION", help="of each message (30s)"),
    "lines": _flag_option("--lines", help="each line of standard input is a message"),
    "stats": _flag_option("--stats", help="also the total, leased and delayed"),
    "pattern": _option("--pattern", metavar="GLOB", help="only queues that match"),
    "jobs": _option("-j", "--jobs", type=_count, metavar="N", help="commands at once (1)"),
    "max_attempts": _option("--max-attempts", type=_count, metavar="N", help="then dead-letter (5)"),
    "dead_letter": _option("--dead-letter", metavar="QUEUE", help="where those go (QUEUE.dead)"),
    "backoff": _option("--backoff", type=parse_duration, metavar="DURATION", help="first delay (0.5s); doubles"),
    "drain": _flag_option("--drain", help="end when nothing is ready or leased"),
    "peek": _flag_option("--peek", help="remove nothing"),
    "move": _option("--move", metavar="DEST", help="move instead of removing"),
    "dir": _option("-d", "--dir", metavar="DIR", help="directory of the database"),
    "file": _option("-f", "--file", metavar="FILE", help="database file: absolute, or a name inside DIR"),
    "quiet": _flag_option("-q", "--quiet", help="no progress; errors are shown"),
}
GLOBAL_OPTIONS = ("dir", "file", "quiet")  # before or after the command
_TAKE = "all number id after before json stamps"

# The commands: what runs them, operands, options, help.
COMMANDS: dict[str, tuple[Callable[[Options], int | None], str, str, str]] = {
    "write": (run_write, "QUEUE [MESSAGE|-]", "delay lines stamps json", "append a message (none or -: from stdin)"),
    "read": (run_read, "QUEUE", _TAKE + " wait", "print and remove messages"),
    "peek": (run_peek, "QUEUE", _TAKE + " wait", "print messages"),
    "move": (run_move, "SOURCE DEST", _TAKE, "move messages to another queue and print them"),
    "lease": (run_lease, "QUEUE", "for id after before", "hide a message from others and print it with its lease"),
    "ack": (lambda o: o.queue().ack(o.lease()), "QUEUE LEASE", "", "acknowledge: remove a leased message"),
    "release": (lambda o: o.queue().release(o.lease(), delay=o.delay), "QUEUE LEASE", "delay", "give a message back"),
    "extend": (
        lambda o: o.queue().extend(o.lease(), o.lease_s), "QUEUE LEASE", "for", "let a lease last"
    ),
    "work": (
        run_work, "QUEUE -- CMD [ARG...]", "jobs lease max_attempts dead_letter backoff drain",
        "run a command for each message, body on its standard input",
    ),
    "watch": (run_watch, "QUEUE", "peek move after json stamps", "print messages as they come, and remove them"),
    "list": (run_list, "", "stats json pattern", "print the queues and how many messages are ready"),
    "delete": (run_delete, "[QUEUE]", "id all", "remove the messages of a queue, or of --all"),
    "broadcast": (run_broadcast, "MESSAGE|-", "pattern", "write a message to every queue that has some"),
    "dump": (run_dump, "", "pattern", "print everything as lines of JSON"),
    "load": (run_load, "", "", "read what dump printed; all or nothing"),
    "init": (run_init, "", "", "create the database here"),
}  # fmt: skip
ACTIONS: dict[str, tuple[Callable[[Options], int | None], str]] = {
    "status": (run_status, "print numbers of the whole database (--json)"),
    "vacuum": (run_vacuum, "give unused space back to the file system"),
    "cleanup": (run_cleanup, "delete the database and the files that belong to it"),
    "version": (lambda options: print(f"simplebroker {__version__}"), "print the version"),
}


def parse_arguments(argv: Sequence[str]) -> Options:
    """Options and operands in any order; what follows "--" are operands. UsageError if it makes no sense."""
    # argparse gives "--" and late operands different meanings in different versions of Python, so it
    # sees neither: the split is made here, and operands that come after options are what it leaves over.
    split = argv.index("--") if "--" in argv else len(argv)
    head, literal = argv[:split], argv[split + 1 :]
    options, rest = Options(), []
    if head and head[0] in COMMANDS and not any(word[:1] == "-" != word for word in head):
        options.command, *rest = head  # no options: starting without argparse takes half the time
    else:
        options, rest = _make_parser(head).parse_known_args(head, options)
    for word in rest:
        if word.startswith("-") and len(word) > 1 and not word[1].isdigit():
            raise UsageError(f"unknown option {word!r}: if it is text, write it after '--'; see broker --help")
    actions = [name for name in ACTIONS if getattr(options, name)]
    if actions and (options.command or len(actions) > 1):
        raise UsageError(f"--{actions[0]} stands alone: no command or other action goes with it")
    if not actions and not options.command:
        raise UsageError(f"no command: give one of {', '.join(COMMANDS)}; see broker --help")
    options.run, spec = (*ACTIONS[actions[0]][:1], "") if actions else COMMANDS[options.command][:2]
    options.operands = [*(options.operands_first or []), *rest, *literal]
    names = spec.replace("-- ", "").split()
    needed = [name for name in names if not name.startswith("[")]
    command = options.command or f"--{actions[0]}"
    if len(options.operands) < len(needed):
        raise UsageError(f"{command} needs {' '.join(names)}; see broker {command} --help")
    if len(options.operands) > len(names) and not spec.endswith("...]"):
        extra = options.operands[len(names)]
        raise UsageError(f"{command} takes {spec or 'no operands'}, not {extra[:60]!r} too: quote text with spaces")
    return options


def _add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    import argparse

    def checked(parse: Callable[[str], object]) -> Callable[[str], object]:
        def convert(text: str) -> object:
            try:
                return parse(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        return convert

    for name in names:
        flags, details = OPTIONS[name]
        if "type" in details:
            details = {**details, "type": checked(details["type"])}
        parser.add_argument(*flags, **details)


def _make_parser(head: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the subparsers that these words can need: making all of them takes 6 ms."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message}; see broker --help")

    everything = "-h" in head or "--help" in head
    names = [name for name in COMMANDS if everything or name in head] or list(COMMANDS)
    common: dict[str, Any] = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    if not everything:  # a formatter is made for each argument; one that need not ask for the width is quick
        common["formatter_class"] = lambda prog: argparse.HelpFormatter(prog, width=100)
    parser = Parser("broker", description="A durable message queue in one file.", epilog=HELP_END, **common)
    if everything:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
    _add_options(parser, (*GLOBAL_OPTIONS, "json"))
    for action, (_, text) in ACTIONS.items():
        parser.add_argument(f"--{action}", action="store_true", help=text)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog="broker")
    for name in names:
        _, spec, bundle, text = COMMANDS[name]
        usage = f"broker {name} [options] {spec}"
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".", usage=usage, **common)
        _add_options(command, (*bundle.split(), *GLOBAL_OPTIONS))
        command.add_argument("operands_first", nargs="*", help=argparse.SUPPRESS)
    return parser


HELP_END = """\
Exit status: 0 done; 1 error; 2 nothing there (queue empty, no match).
TS is a 19-digit id, an ISO 8601 time, or Unix time. DURATION is 90, 90s, 5m, 2h, 1d or 250ms.
BROKER_BUSY_TIMEOUT, BROKER_SYNC_MODE and other settings: see README.md."""


# ---------------------------------------------------------------------------------------------------
# main, and the name simplebroker.ext
# ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 error, 2 nothing there."""
    try:
        status = run_command(sys.argv[1:] if argv is None else list(argv))
    except BrokenPipeError:
        status = DONE
    except (BrokerError, ValueError, OSError) as error:
        complain(f"error: {error}")
        status = ERROR
    except KeyboardInterrupt:
        status = 128 + 2  # as shells report SIGINT
    except SystemExit:  # argparse, after --help
        status = DONE
    return flushed(status)


def run_and_exit() -> NoReturn:
    """The command: main(), and the end of the process, without the 6 to 8 ms in which Python would take itself
    apart. All is closed and flushed, and what others have registered with atexit is called."""
    status = main()
    import atexit

    atexit._run_exitfuncs()
    os._exit(flushed(status))


def flushed(status: int) -> int:
    """Flush standard output; return the status, or ERROR if that was impossible."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:  # what is left cannot be written: keep the interpreter from complaining about it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError) and status == DONE:
            complain(f"error: {error}")
            status = ERROR
    return status


def run_command(argv: Sequence[str]) -> int:
    """Parse, run, close."""
    if sys.version_info[:2] == (3, 12):  # whose first releases warn about numbered parameters, in __main__ visibly
        import warnings

        warnings.filterwarnings("ignore", "Binding .* is a named parameter", DeprecationWarning)
    try:
        options = parse_arguments(argv)
        return options.run(options) or DONE
    finally:
        if Progress.shown:
            print(file=sys.stderr)
        for runner, _ in list(_shared.values()):
            runner.close()


# One file, and still ``from simplebroker.ext import SQLRunner`` works, also where the file is vendored
# under another name: a module may register others, as os does with os.path.
ext = type(sys)(f"{__name__}.ext", "What extensions of SimpleBroker need: runners, ids, errors, SQL.")
ext.__dict__.update({name: globals()[name] for name in __all__})
ext.__dict__.update({name: value for name, value in list(globals().items()) if name.isupper() and name[0] != "_"})
sys.modules[ext.__name__] = ext

if __name__ == "__main__":
    run_and_exit()
