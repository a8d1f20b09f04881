#!/usr/bin/env python3
"""Measures SimpleBroker against the bounds it sets itself, and against other queues.

    python benchmark.py                         everything, in less than three minutes; more with other queues
    python benchmark.py --quick --json          small and fast, for continuous integration
    python benchmark.py --only single cli       some scenarios; --list names them
    python benchmark.py --dir /var/lib/app      on the disk that counts

Each row compares two things that were measured in turn in this run. The ratio comes first; it is the median of
the ratios of the rounds. Then come medians, but for the worst wait the worst of all rounds, which may be a single
sync that the disk took long for. Speeds are per second (above 1: SimpleBroker is faster); waits, start-up, memory
and processor time are costs (below 1: it needs less). Absolute numbers depend on the machine and its other work.

The reference is what a program would write by hand: sqlite3 in WAL mode with the same synchronous setting, one
table with an index on (queue, id), BEGIN IMMEDIATE, INSERT (or SELECT the first and DELETE it), COMMIT. Other
queues are measured where they are installed (litequeue, persist-queue, huey, diskcache, localqueue) or reachable
(Redis on localhost), at the same durability; the rest is listed with the reason. The exit status is 0 whether
or not the bounds are met: the result tells.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from types import SimpleNamespace
from typing import Any, Callable, TypeVar

# simplebroker.py is beside this file or one directory above, or installed.
sys.path[:0] = [str(d) for d in (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent)
                if (d / "simplebroker.py").exists()]  # fmt: skip
import simplebroker  # noqa: E402
from simplebroker import Queue, QueueWatcher, Settings  # noqa: E402

# ---------------------------------------------------------------------------------------------------
# Settings: how much is measured.
# ---------------------------------------------------------------------------------------------------

QUEUE = "bench"
BODY = "x" * 100
FILL_BATCH = 10_000  # messages in a transaction when a queue is filled
POLL_S = 0.010  # of the plain poller that a watcher is compared with
REDIS = ("127.0.0.1", 6379)
ENOUGH_S = 10.0  # rounds beyond the fifth end after so long
FAST_FSYNC_MS = 0.4  # on slower disks fewer operations are timed
ANSWER_S = 60.0  # a child process that says nothing for so long is an error
# Of one writing or reading process. With FULL the fsync hides most of the difference, the more the slower the disk:
# the lock, the look at the file and the doorbell cost 8 us when it takes 0.1 ms, the statement that checks its id
# 10 us, Python's part 15 us: 0.79 to 0.86 in all.
BOUNDS_OF_ONE = {"FULL": 0.75, "NORMAL": 0.6}
# With 8 writing processes. At FULL on a slow disk the bare loop collapses, where fsync is fast it lets one process go
# on at the speed of a single writer and starves the others: so the bound is to keep up with that, and to be fair.
BOUNDS_OF_8: tuple[Any, Any] = ((">=", 0.5), ("<=", 0.1))
BOUND_OF_16_MS = ("<=", 200.0)  # of the worst wait of all


# Each setting for a normal run and for --quick. A round measures once, in turn, everything that is compared.
PLAN: dict[str, tuple[Any, Any]] = {
    "rounds": (5, 5),
    "rounds_of_8": (9, 5),  # of the loads that are bounded by their throughput
    "loops": ({"FULL": (36, 100), "NORMAL": (15, 1000)}, {"FULL": (18, 30), "NORMAL": (5, 500)}),  # rounds, operations
    "writers": ((1, 2, 4, 8, 16), (1, 8)),  # numbers of processes
    "mixed": ((1, 4), (2,)),  # writers, and as many readers
    "window_s": (0.4, 0.15),  # of a load of many processes; one that starves shows as its worst wait
    "depths": ((1_000, 10_000, 100_000, 1_000_000), (1_000, 50_000)),
    "sizes": ((100, 1 << 10, 10 << 10, 100 << 10, 1 << 20), (100, 100 << 10)),  # bytes
    "size_volume": (4 << 20, 1 << 20),  # bytes written in a round, at most
    "batch": (20_000, 5_000),
    "cli_rounds": (21, 5),
    "wakes": (200, 60),
    "idle_s": (10.0, 1.5),
    "backlog": (20_000, 5_000),
    "backlog_taken": (3_000, 500),  # of these, timed
    "threads": ((1, 8, 32), (1, 8)),
    "written_by_threads": (2_000, 500),
    "watchers": (100, 100),
}

# ---------------------------------------------------------------------------------------------------
# Rows: what a scenario yields.
# ---------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One comparison. ``ours`` and ``reference`` are in the same unit."""

    scenario: str
    what: str
    against: str
    ratio: float
    ours: float
    reference: float
    unit: str
    bound: tuple[str, float] | None = None  # such as (">=", 0.85) ...
    bound_of: str = "ratio"  # ... of this field, "ratio" or "ours"
    notes: Sequence[str] = ()
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the bound is met; None where there is none."""
        if self.bound is None:
            return None
        value: float = getattr(self, self.bound_of)
        return value >= self.bound[1] if self.bound[0] == ">=" else value <= self.bound[1]

    @property
    def bound_text(self) -> str:
        unit = "x" if self.bound_of == "ratio" else self.unit
        return "{} {:g} {}".format(*self.bound, unit) if self.bound else ""

    def as_json(self) -> dict[str, Any]:
        names = ("scenario", "what", "against", "ratio", "ours", "reference", "unit")
        own = {name: getattr(self, name) for name in names}
        return {**own, "bound": self.bound_text or None, "met": self.met, **self.more}


def compare(
    scenario: str, what: str, against: str, unit: str, ours: Sequence[float], reference: Sequence[float], **more: Any
) -> Row:
    """A row from what interleaved rounds measured."""
    ratio = median(a / b for a, b in zip(ours, reference))
    return Row(scenario, what, against, ratio, median(ours), median(reference), unit, **more)


T = TypeVar("T")


def interleave(rounds: int, runs: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Run each once a round. The order turns, so that a drift of the machine favours none of them.

    On a slow machine there are fewer rounds, but five.
    """
    names = list(runs)
    results: dict[str, list[T]] = {name: [] for name in names}
    deadline = time.monotonic() + ENOUGH_S
    for number in range(rounds):
        if number >= 5 and time.monotonic() > deadline:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(runs[name]())
    return results


# ---------------------------------------------------------------------------------------------------
# Stores: SimpleBroker, the reference and the other queues, each opened by a function.
# ---------------------------------------------------------------------------------------------------


@dataclass
class Store:
    """An open queue."""

    put: Callable[[str], object]  # returns when the message is as durable as was asked for
    take: Callable[[], object]  # removes the first message and returns it; None: there is none
    close: Callable[[], object]
    put_many: Any = None  # the same for a list of bodies, in one transaction; SimpleBroker and the reference only


@dataclass(frozen=True)
class Kind:
    """A way to open a queue in a directory, with FULL or NORMAL synchronisation."""

    name: str
    open: Callable[[Path, str], Store]
    leases: bool = False  # taking is two steps: lease, acknowledge
    syncs: tuple[str, ...] = ("FULL", "NORMAL")  # what it can be set to


def open_queue(directory: Path, sync: str) -> Queue:
    """SimpleBroker with its default settings, but for the durability."""
    queue = Queue(QUEUE, directory / "broker.db", settings=Settings(sync_mode=sync))
    queue.count()  # connects
    return queue


def ours(directory: Path, sync: str) -> Store:
    queue = open_queue(directory, sync)
    return Store(queue.write, queue.read, queue.close, queue.write_many)


def ours_leased(directory: Path, sync: str) -> Store:
    queue = open_queue(directory, sync)

    def take() -> object:
        message = queue.lease()
        if message is not None:
            queue.ack(message)
        return message

    return Store(queue.write, take, queue.close)


INSERT = "INSERT INTO m (queue, body) VALUES (?, ?)"
SELECT_FIRST = "SELECT id, body FROM m WHERE queue = ? ORDER BY id LIMIT 1"


def connect(directory: Path, sync: str) -> sqlite3.Connection:
    """The database of the reference, with the default busy handler."""
    connection = sqlite3.connect(str(directory / "bare.db"), isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL").fetchall()  # a statement that is not finished blocks COMMIT
    connection.execute(f"PRAGMA synchronous={sync}")
    columns = "id INTEGER PRIMARY KEY, queue TEXT NOT NULL, body TEXT NOT NULL"
    connection.execute(f"CREATE TABLE IF NOT EXISTS m ({columns})")
    connection.execute("CREATE INDEX IF NOT EXISTS m_queue ON m (queue, id)")
    return connection


def bare(directory: Path, sync: str) -> Store:
    connection = connect(directory, sync)
    execute = connection.execute

    def put(body: str) -> None:
        execute("BEGIN IMMEDIATE")
        execute(INSERT, (QUEUE, body))
        execute("COMMIT")

    def take() -> object:
        execute("BEGIN IMMEDIATE")
        rows = execute(SELECT_FIRST, (QUEUE,)).fetchall()
        if rows:
            execute("DELETE FROM m WHERE id = ?", (rows[0][0],))
        execute("COMMIT")
        return rows[0] if rows else None

    def put_many(bodies: list[str]) -> None:
        execute("BEGIN IMMEDIATE")
        connection.executemany(INSERT, [(QUEUE, body) for body in bodies])
        execute("COMMIT")

    return Store(put, take, connection.close, put_many)


def litequeue(directory: Path, sync: str) -> Store:
    connection = sqlite3.connect(str(directory / "litequeue.db"), isolation_level=None)
    queue = import_module("litequeue").LiteQueue(connection)
    connection.execute(f"PRAGMA synchronous={sync}")

    def take() -> object:
        message = queue.pop()
        queue.done(message.message_id)
        return message

    return Store(queue.put, take, connection.close)


def persist_queue(directory: Path, sync: str) -> Store:
    queue = import_module("persistqueue").SQLiteQueue(str(directory / "persist"), auto_commit=True)
    return Store(queue.put, queue.get, queue.close)


def huey(directory: Path, sync: str) -> Store:
    storage = import_module("huey.storage").SqliteStorage(QUEUE, str(directory / "huey.db"), fsync=True)
    return Store(lambda body: storage.enqueue(body.encode()), storage.dequeue, storage.close)


def diskcache(directory: Path, sync: str) -> Store:
    level = {"FULL": 2, "NORMAL": 1}[sync]
    cache = import_module("diskcache").Cache(str(directory / "diskcache"), sqlite_synchronous=level)
    return Store(cache.push, lambda: cache.pull()[1], cache.close)


def localqueue(directory: Path, sync: str) -> Store:
    module = import_module("localqueue")
    mode = {"FULL": module.DurabilityMode.DURABLE, "NORMAL": module.DurabilityMode.RELAXED}[sync]
    queue = module.SimpleQueue(str(directory / "localqueue"), durability=mode)

    def take() -> object:
        job = queue.get()
        queue.ack(job)
        return job

    return Store(queue.put, take, queue.close)


class RedisConnection:
    """A Redis server on this machine, over a plain socket. Its settings are read, not changed."""

    def __init__(self) -> None:
        self.socket = socket.create_connection(REDIS, timeout=5)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.replies = self.socket.makefile("rb")

    def __call__(self, *words: str) -> Any:
        encoded = [word.encode() for word in words]
        self.socket.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in encoded))
        return self.reply()

    def reply(self) -> Any:
        line = self.replies.readline()
        kind, rest = line[:1], line[1:-2].decode()
        if kind == b"*":
            return [self.reply() for _ in range(int(rest))]
        if kind == b"$":
            return None if rest == "-1" else self.replies.read(int(rest) + 2)[:-2].decode()
        if kind not in (b":", b"+"):
            raise ConnectionError(f"Redis: {rest or 'connection closed'}")
        return rest

    def close(self) -> None:
        self.replies.close()
        self.socket.close()


def redis(directory: Path, sync: str) -> Store:
    command, key = RedisConnection(), f"simplebroker-benchmark:{directory}"
    try:
        found = [command("CONFIG", "GET", name)[1] for name in ("appendonly", "appendfsync")]
        wanted = ["yes", {"FULL": "always", "NORMAL": "everysec"}[sync]]
        if found != wanted:
            raise ConnectionError(f"its appendonly and appendfsync are {found}, {sync} needs {wanted}")
    except BaseException:
        command.close()
        raise

    def close() -> None:
        command("EXPIRE", key, "600")  # what a run leaves behind goes away
        command.close()

    return Store(lambda body: command("RPUSH", key, body), lambda: command("LPOP", key), close)


OURS = Kind("simplebroker", ours)
LEASED = Kind("simplebroker, leased", ours_leased, leases=True)
BARE = Kind("bare sqlite3", bare)
OTHERS = (
    Kind("litequeue", litequeue, leases=True),
    Kind("persist-queue", persist_queue, syncs=("FULL",)),  # as it comes: one fsync per operation, no setting
    Kind("huey", huey, syncs=("FULL",)),  # fsync is on or off
    Kind("diskcache", diskcache),
    Kind("localqueue", localqueue, leases=True),
    Kind("Redis", redis),
)


def fill(store: Store, count: int) -> None:
    """Write that many messages, in large transactions."""
    for start in range(0, count, FILL_BATCH):
        store.put_many([BODY] * min(FILL_BATCH, count - start))


# ---------------------------------------------------------------------------------------------------
# Bench: what the scenarios share.
# ---------------------------------------------------------------------------------------------------


def per_second(count: int, operation: Callable[[], object]) -> float:
    """How many a second, of that many in a loop."""
    start = time.perf_counter()
    for _ in range(count):
        operation()
    return count / (time.perf_counter() - start)


def fsync_ms(directory: Path) -> float:
    """What making 4 KB durable costs: the floor of every write with FULL."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:

        def append() -> None:
            file.write(bytes(4096))
            os.fsync(file.fileno())

        return 1000 / median(per_second(1, append) for _ in range(25))


class Bench:
    """The plan, the directory, the durabilities, and what could not be measured."""

    def __init__(self, quick: bool, directory: Path, syncs: tuple[str, ...]) -> None:
        self.plan = SimpleNamespace(**{name: pair[quick] for name, pair in PLAN.items()})
        self.directory = directory
        self.syncs = syncs
        self.sync = syncs[0]
        self.fsync_ms = fsync_ms(directory)
        self.missing: dict[str, str] = {}
        self._deep: dict[int, Path] = {}

    def operations(self, count: int, sync: str) -> int:
        """That many, or fewer with FULL on a disk that takes long: each operation waits for it."""
        return max(15, int(count * min(1.0, FAST_FSYNC_MS / self.fsync_ms))) if sync == "FULL" else count

    def fresh(self) -> Path:
        """A new directory for a database."""
        return Path(tempfile.mkdtemp(dir=self.directory))

    def others(self, sync: str) -> list[Kind]:
        """The other queues that can be measured at this durability."""
        return [kind for kind in OTHERS if self._can_measure(kind, sync)]

    def _can_measure(self, kind: Kind, sync: str) -> bool:
        if sync not in kind.syncs:
            self.missing[f"{kind.name}, {sync}"] = "cannot be set to it"
            return False
        try:
            kind.open(self.fresh(), sync).close()
            return True
        except ModuleNotFoundError:
            self.missing[kind.name] = "not installed"
        except Exception as error:  # noqa: BLE001 - whatever another queue raises is shown as the reason
            self.missing[f"{kind.name}, {sync}"] = f"{type(error).__name__}: {error}"
        return False

    def deep(self, depth: int) -> Path:
        """The directory of a SimpleBroker queue with that many messages; filled once."""
        if depth not in self._deep:
            self._deep[depth] = self.fresh()
            with closing(ours(self._deep[depth], self.sync)) as store:
                fill(store, depth)
        return self._deep[depth]

    def environment(self) -> dict[str, str]:
        """For child processes: bytecode is cached, as it is where nobody turned that off."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("BROKER_")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        path = [str(Path(simplebroker.__file__).resolve().parent), environment.get("PYTHONPATH", "")]
        return {**environment, "BROKER_SYNC_MODE": self.sync, "PYTHONPATH": os.pathsep.join(filter(None, path))}

    def broker(self, directory: Path, *arguments: str) -> list[str]:
        """The command line of SimpleBroker on the database in a directory."""
        return [sys.executable, "-m", "simplebroker", "-f", str(directory / "broker.db"), *arguments]


# ---------------------------------------------------------------------------------------------------
# Scenarios in one process.
# ---------------------------------------------------------------------------------------------------


def write_then_read(store: Store, count: int, body: str) -> tuple[float, float]:
    rates = per_second(count, partial(store.put, body)), per_second(count - 1, store.take)
    if store.take() is None:
        raise AssertionError(f"{count} messages went in, fewer came out")
    return rates


Rates = dict[Kind, tuple[list[float], list[float]]]


def loop_rates(bench: Bench, kinds: Iterable[Kind], sync: str, rounds: int, count: int, body: str = BODY) -> Rates:
    """For each kind the writes and the reads a second in each round."""
    count = bench.operations(count, sync)
    with ExitStack() as stack:
        stores = {kind: stack.enter_context(closing(kind.open(bench.fresh(), sync))) for kind in kinds}
        runs = {kind.name: partial(write_then_read, store, count, body) for kind, store in stores.items()}
        results = interleave(rounds, runs)
    return {kind: ([w for w, _ in results[kind.name]], [r for _, r in results[kind.name]]) for kind in stores}


def single(bench: Bench) -> Iterator[Row]:
    for sync in bench.syncs:
        others = bench.others(sync)
        rates = loop_rates(bench, [OURS, LEASED, BARE, *others], sync, *bench.plan.loops[sync])
        for kind in [BARE, *others]:
            bound = (">=", BOUNDS_OF_ONE[sync]) if kind is BARE else None
            words = ("write", "lease + ack" if kind.leases else "read")
            for word, mine, theirs in zip(words, rates[LEASED if kind.leases else OURS], rates[kind]):
                yield compare("single", f"{word}, {sync}", kind.name, "/s", mine, theirs, bound=bound)


def sizes(bench: Bench) -> Iterator[Row]:
    for size in bench.plan.sizes:
        count = max(5, min(200, bench.plan.size_volume // size))
        rates = loop_rates(bench, [OURS, BARE], bench.sync, bench.plan.rounds, count, "x" * size)
        for word, mine, theirs in zip(("write", "read"), rates[OURS], rates[BARE]):
            yield compare("sizes", f"{word} {size:,} bytes, {bench.sync}", BARE.name, "/s", mine, theirs)


def batch(bench: Bench) -> Iterator[Row]:
    count = bench.plan.batch
    with closing(ours(bench.fresh(), bench.sync)) as mine, closing(bare(bench.fresh(), bench.sync)) as theirs:
        runs = {name: partial(per_second, 1, partial(put, [BODY] * count))
                for name, put in (("ours", mine.put_many), ("bare", theirs.put_many))}  # fmt: skip
        results = interleave(bench.plan.rounds, runs)
    rates = {name: [count * rate for rate in of] for name, of in results.items()}
    what = f"write_many of {count:,}, {bench.sync}"
    yield compare("batch", what, "executemany", "/s", rates["ours"], rates["bare"], bound=(">=", 0.6))


def write_and_read(queue: Queue) -> None:
    queue.write(BODY)
    queue.read()


def at_depths(
    bench: Bench, what: str, act: Callable[[Queue], object], sync: str, rounds: int, count: int, *, limit: float | None
) -> Iterator[Row]:
    """Do the same to queues of all depths, in turn; compare with the shortest."""
    with ExitStack() as stack:
        runs = {}
        for deep in bench.plan.depths:
            queue = stack.enter_context(closing(open_queue(bench.deep(deep), sync)))
            runs[f"{deep:,}"] = partial(per_second, bench.operations(count, sync), partial(act, queue))
        rates = interleave(rounds, runs)
    first, *deeper = rates
    for name in deeper:
        bound = (">=", limit) if limit and name == deeper[-1] else None
        label = f"{what} at a depth of {name}, {sync}"
        yield compare("depth", label, f"a depth of {first}", "/s", rates[name], rates[first], bound=bound)


def depth(bench: Bench) -> Iterator[Row]:
    for sync in bench.syncs:
        yield from at_depths(bench, "write + read", write_and_read, sync, *bench.plan.loops[sync], limit=0.8)
    yield from at_depths(bench, "peek", Queue.peek, bench.sync, bench.plan.rounds, 20, limit=None)


def watch_some(queue: Queue, count: int) -> float:
    """Let a QueueWatcher handle that many messages; how many a second."""
    left = count

    def handler(message: str, timestamp: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            watcher.request_stop()

    watcher = QueueWatcher(queue, handler)
    return count * per_second(1, watcher.watch)


def backlog(bench: Bench) -> Iterator[Row]:
    count = bench.operations(bench.plan.backlog_taken, bench.sync)
    with closing(open_queue(bench.fresh(), bench.sync)) as queue:

        def refilled(consume: Callable[[], float]) -> float:
            queue.write_many([BODY] * (bench.plan.backlog - queue.count()))
            rate = consume()
            if queue.stats().total != bench.plan.backlog - count or queue.stats().leased:
                raise AssertionError(f"{count} of {bench.plan.backlog} were consumed, {queue.stats()} are left")
            return rate

        watch, read = partial(watch_some, queue, count), partial(per_second, count, queue.read)
        rates = interleave(bench.plan.rounds, {"watch": partial(refilled, watch), "read": partial(refilled, read)})
    what = f"QueueWatcher, backlog of {bench.plan.backlog:,}, {bench.sync}"
    yield compare("backlog", what, "a loop of read()", "/s", rates["watch"], rates["read"], bound=(">=", 0.8))


def write_in_threads(queue: Queue, threads: int, count: int) -> float:
    """Write about that many messages from so many threads; how many a second."""
    start, each = threading.Barrier(threads + 1), count // threads

    def work() -> None:
        start.wait(ANSWER_S)
        for _ in range(each):
            queue.write(BODY)

    pool = [threading.Thread(target=work) for _ in range(threads)]
    for thread in pool:
        thread.start()
    start.wait(ANSWER_S)

    def join() -> None:
        for thread in pool:
            thread.join()

    return each * threads * per_second(1, join)


def burst_ms(writer: Queue, queues: Sequence[Queue], handled: SimpleQueue[float]) -> float:
    """Write a message to each queue in one transaction; how long it takes until the last handler is called."""
    with writer.broker.transaction():
        for queue in queues:
            writer.broker.queue(queue.name).write(BODY)
    committed = time.perf_counter()
    last = max(handled.get(timeout=ANSWER_S) for _ in queues)
    while any(queue.stats().total for queue in queues):  # until all are acknowledged
        time.sleep(0.01)
    return 1000 * (last - committed)


def handle_in_turn_ms(queues: Sequence[Queue]) -> float:
    """Lease and acknowledge a message of each queue, one after the other."""
    for queue in queues:
        queue.write(BODY)
    started = time.perf_counter()
    for queue in queues:
        message = queue.lease()
        if message is not None:
            queue.ack(message)
    return 1000 * (time.perf_counter() - started)


def threads(bench: Bench) -> Iterator[Row]:
    count = bench.operations(bench.plan.written_by_threads, bench.sync)
    with closing(open_queue(bench.fresh(), bench.sync)) as queue:
        runs = {str(number): partial(write_in_threads, queue, number, count) for number in bench.plan.threads}
        rates = interleave(bench.plan.rounds, runs)
    for number in bench.plan.threads[1:]:
        bound = (">=", 1.5) if number == 8 and bench.sync == "FULL" else None
        what = f"write, {number} threads of one process, {bench.sync}"
        yield compare("threads", what, "one thread", "/s", rates[str(number)], rates["1"], bound=bound)
    handled: SimpleQueue[float] = SimpleQueue()
    with ExitStack() as stack:
        places = [stack.enter_context(closing(open_queue(bench.fresh(), bench.sync))) for _ in range(2)]
        first, second = ([place.broker.queue(f"q{n}") for n in range(bench.plan.watchers)] for place in places)
        for queue in first:
            watcher = QueueWatcher(queue, lambda *_: handled.put(time.perf_counter()))
            stack.enter_context(watcher)
        burst = {"ours": partial(burst_ms, places[0], first, handled), "turn": partial(handle_in_turn_ms, second)}
        times = interleave(bench.plan.rounds, burst)
    what = f"a message for each of {len(first)} watchers, {bench.sync}"
    pair = times["ours"], times["turn"]
    yield compare("threads", what, "lease + ack in turn", "ms", *pair, bound=("<=", 50.0), bound_of="ours")


# ---------------------------------------------------------------------------------------------------
# Scenarios with many processes at once.
# ---------------------------------------------------------------------------------------------------

PROCESSES: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@dataclass
class Load:
    """What the processes of one window saw. What the end of the window cut counts as a wait, not as done."""

    rate: float = 0.0  # operations a second
    waits: array[float] = field(default_factory=lambda: array("d"))  # seconds, of every operation
    errors: Counter[str] = field(default_factory=Counter)
    starved: int = 0  # processes that got nothing done

    def waits_ms(self) -> dict[str, float]:
        ordered = sorted(self.waits) or [0.0]
        marks = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
        return {name: 1000 * ordered[min(int(part * len(ordered)), len(ordered) - 1)] for name, part in marks.items()}


def repeat(operation: Callable[[], object], reading: bool, window_s: float, load: Load) -> int:
    """Do the operation until the window ends; return how often it succeeded within it."""
    done = 0
    now = time.perf_counter()
    end = now + window_s
    while now < end:
        before = now
        try:
            success = operation() is not None or not reading
        except Exception as error:  # noqa: BLE001 - whatever a queue raises is counted and shown
            success = False
            load.errors[f"{type(error).__name__}: {error}"] += 1
        now = time.perf_counter()
        load.waits.append(now - before)
        done += success and now < end
    return done


def work(pipe: Any, kind: Kind, directory: Path, sync: str, reading: bool, start: Any, window_s: float) -> None:
    """A process of a load: open the queue, wait for the others, work, tell what was seen."""
    load, done, store = Load(), 0, None
    try:
        store = kind.open(directory, sync)
    except Exception as error:  # noqa: BLE001 - as above
        load.errors[f"opening: {type(error).__name__}: {error}"] += 1
    start.wait(ANSWER_S)
    if store is not None:
        operation = store.take if reading else partial(store.put, BODY)
        done = repeat(operation, reading, window_s, load)
        store.close()
    pipe.send((done, load))


def start_child(target: Callable[..., None], *arguments: Any) -> Any:
    """Call the target in a new process, with a pipe as its first argument; return the other end."""
    pipe, theirs = PROCESSES.Pipe()
    PROCESSES.Process(target=target, args=(theirs, *arguments), daemon=True).start()
    theirs.close()
    return pipe


def receive(pipe: Any) -> Any:
    if not pipe.poll(ANSWER_S):
        raise TimeoutError("a child process does not answer")
    return pipe.recv()  # EOFError if it died


def stay_open(pipe: Any, kind: Kind, directory: Path, sync: str) -> None:
    """In a child: write, and have the queue open until told to end."""
    with closing(kind.open(directory, sync)) as store:
        store.put(BODY)
        store.take()
        pipe.send(None)
        pipe.recv()


@contextmanager
def in_use(bench: Bench, kind: Kind) -> Iterator[Path]:
    """A new directory, whose queue a process of its own keeps open.

    Else the last one to close a SQLite database deletes its log, and while that grows anew a synced write takes 1.4
    times as long: in short loads, most of the time of a queue in which all writers get on.
    """
    directory = bench.fresh()
    keeper = start_child(stay_open, kind, directory, bench.sync)
    receive(keeper)
    try:
        yield directory
    finally:
        keeper.send(None)
        with suppress(EOFError):  # this is its end
            receive(keeper)


def run_load(bench: Bench, kind: Kind, directory: Path, writers: int, readers: int) -> Load:
    """Start the processes, let them work for one window, and add up what they saw."""
    with closing(kind.open(directory, bench.sync)) as store:  # the tables are there before the race begins
        fill(store, FILL_BATCH if readers else 0)
    start, window_s, total = PROCESSES.Barrier(writers + readers), bench.plan.window_s, Load()
    roles = [False] * writers + [True] * readers
    children = [start_child(work, kind, directory, bench.sync, reading, start, window_s) for reading in roles]
    for child in children:
        try:
            done, load = receive(child)
        except (TimeoutError, EOFError) as error:
            done, load = 0, Load(errors=Counter([repr(error)]))
            start.abort()  # those that still wait for it
        total.rate += done / window_s
        total.waits.extend(load.waits)
        total.errors.update(load.errors)
        total.starved += not done
    return total


def load_rows(scenario: str, what: str, writers: int, other: str, loads: dict[str, list[Load]]) -> Iterator[Row]:
    """Throughput and worst wait of one number of processes, against one other queue."""
    names = (OURS.name, other)
    waits = [[load.waits_ms() for load in loads[name]] for name in names]
    middle = {name: {mark: median(w[mark] for w in of) for mark in of[0]} for name, of in zip(names, waits)}
    errors = {name: dict(sum((load.errors for load in loads[name]), Counter())) for name in names}
    starved = {name: median(load.starved for load in loads[name]) for name in names}
    more = {"writers": writers, "waits_ms": middle, "errors": errors, "starved": starved}
    notes = []
    for name in names:
        notes.append(f"{name}: waits " + ", ".join(f"{mark} {ms:.2f}" for mark, ms in middle[name].items()) + " ms")
        notes += [f"{name}: {starved[name]:g} processes got nothing done"] if starved[name] else []
        notes += [f"{name}: {count} times {error}" for error, count in errors[name].items()]
    judged = (scenario, other) == ("contention", BARE.name)
    bounds = BOUNDS_OF_8 if judged and writers == 8 else (None, BOUND_OF_16_MS if judged and writers == 16 else None)
    rates = [[load.rate or 1e-9 for load in loads[name]] for name in names]
    worst = [[w["max"] for w in of] for of in waits]
    yield compare(scenario, f"{what}, throughput", other, "/s", *rates, bound=bounds[0], more=more)
    of = "ours" if bounds[1] is BOUND_OF_16_MS else "ratio"
    worst_wait = f"{what}, worst wait"
    row = compare(scenario, worst_wait, other, "ms", *worst, bound=bounds[1], bound_of=of, notes=notes, more=more)
    row.ours, row.reference = map(max, worst)
    yield row


def run_loads(bench: Bench, kinds: Sequence[Kind], writers: int, readers: int, rounds: int) -> dict[str, list[Load]]:
    """Loads of so many processes, in turn for each kind."""
    with ExitStack() as stack:
        places = [(kind, stack.enter_context(in_use(bench, kind))) for kind in kinds]
        runs = {kind.name: partial(run_load, bench, kind, place, writers, readers) for kind, place in places}
        return interleave(rounds, runs)


def contention(bench: Bench) -> Iterator[Row]:
    for writers in bench.plan.writers:
        kinds = [OURS, BARE, *(bench.others(bench.sync) if writers == bench.plan.writers[-1] else ())]
        rounds = bench.plan.rounds_of_8 if writers == 8 else bench.plan.rounds
        loads = run_loads(bench, kinds, writers, 0, rounds)
        for kind in kinds[1:]:
            yield from load_rows("contention", f"{writers} writers, {bench.sync}", writers, kind.name, loads)


def mixed(bench: Bench) -> Iterator[Row]:
    for count in bench.plan.mixed:
        loads = run_loads(bench, (OURS, BARE), count, count, bench.plan.rounds)
        yield from load_rows("mixed", f"{count} writers, {count} readers, {bench.sync}", count, BARE.name, loads)


# ---------------------------------------------------------------------------------------------------
# Scenarios with a child process: waking up, starting up, memory.
# ---------------------------------------------------------------------------------------------------


def report(pipe: Any, seen: SimpleQueue[tuple[str, int]], plan: SimpleNamespace) -> None:
    """In a consuming child: tell the processor time of some idle seconds, then what came and when."""
    time.sleep(0.5)  # the start of the process is not counted
    before = time.process_time()
    time.sleep(plan.idle_s)
    pipe.send(100 * (time.process_time() - before) / plan.idle_s)
    pipe.send([seen.get(timeout=ANSWER_S) for _ in range(plan.wakes)])


def watching_child(pipe: Any, directory: Path, sync: str, plan: SimpleNamespace) -> None:
    seen: SimpleQueue[tuple[str, int]] = SimpleQueue()
    queue = open_queue(directory, sync)
    with closing(queue), QueueWatcher(queue, lambda message, _: seen.put((message, time.time_ns()))):
        report(pipe, seen, plan)


def polling_child(pipe: Any, directory: Path, sync: str, plan: SimpleNamespace) -> None:
    seen: SimpleQueue[tuple[str, int]] = SimpleQueue()

    def poll() -> None:
        connection = connect(directory, sync)
        while True:
            rows = connection.execute(SELECT_FIRST, (QUEUE,)).fetchall()
            if rows:
                connection.execute("DELETE FROM m WHERE id = ?", (rows[0][0],))
                seen.put((rows[0][1], time.time_ns()))
            else:
                time.sleep(POLL_S)

    threading.Thread(target=poll, daemon=True).start()
    report(pipe, seen, plan)


def wake_children(bench: Bench, places: Sequence[Path]) -> tuple[list[float], list[list[float]]]:
    """Of a watching and a polling child: the processor time when idle, and how late each message came, sorted, in ms.

    The databases must be there: SQLite does not wait where two processes make one.
    """
    plan, pauses = bench.plan, random.Random(1)
    children = [
        start_child(target, place, bench.sync, plan) for target, place in zip((watching_child, polling_child), places)
    ]
    sent: tuple[list[int], list[int]] = ([], [])  # when put() returned
    with closing(ours(places[0], bench.sync)) as mine, closing(bare(places[1], bench.sync)) as theirs:
        cpu = [receive(child) for child in children]
        for number in range(plan.wakes):
            for store, times in zip((mine, theirs), sent):
                time.sleep(pauses.uniform(0.002, 0.022))
                store.put(str(number))
                times.append(time.time_ns())
        seen = [receive(child) for child in children]
    # From the return of put() to the handler; 0 where the handler was first.
    return cpu, [sorted(max(0, when - times[int(n)]) / 1e6 for n, when in of) for of, times in zip(seen, sent)]


def wake(bench: Bench) -> Iterator[Row]:
    plan = bench.plan
    with in_use(bench, OURS) as mine, in_use(bench, BARE) as theirs:
        cpu, delays = wake_children(bench, (mine, theirs))
    against = f"polling every {1000 * POLL_S:g} ms"
    for name, part, bound in (("median", 0.5, ("<=", 1.0)), ("99th percentile", 0.99, None)):
        pair = [[of[int(part * len(of))]] for of in delays]
        what = f"wake-up, {name} of {plan.wakes}, {bench.sync}"
        yield compare("wake", what, against, "ms", *pair, bound=bound, bound_of="ours")
    what = f"processor time in {plan.idle_s:g} idle seconds"
    yield compare("wake", what, against, "%", cpu[:1], [cpu[1] or 1e-9], bound=("<=", 0.3), bound_of="ours")


BARE_SCRIPT = """\
import sqlite3
connection = sqlite3.connect({path!r}, isolation_level=None)
connection.execute("PRAGMA journal_mode=WAL").fetchall()
connection.execute("PRAGMA synchronous={sync}")
connection.execute("BEGIN IMMEDIATE")
connection.execute({insert!r}, ({queue!r}, {body!r}))
connection.execute("COMMIT")
connection.close()
"""


def cli(bench: Bench) -> Iterator[Row]:
    directory, environment = bench.fresh(), bench.environment()
    for kind in (OURS, BARE):
        with closing(kind.open(directory, bench.sync)) as store:
            fill(store, 10 + 2 * bench.plan.cli_rounds)
    values = {"path": str(directory / "bare.db"), "sync": bench.sync, "insert": INSERT, "queue": QUEUE, "body": BODY}
    script = directory / "bare.py"
    script.write_text(BARE_SCRIPT.format(**values), encoding="utf-8")

    def run_ms(command: list[str]) -> float:
        start = time.perf_counter()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return 1000 * (time.perf_counter() - start)

    environment |= {"BROKER_DEFAULT_DB_LOCATION": str(directory), "BROKER_DEFAULT_DB_NAME": "broker.db"}
    broker = [sys.executable, "-m", "simplebroker"]
    runs = {
        "script": partial(run_ms, [sys.executable, str(script)]),
        "broker write": partial(run_ms, [*broker, "write", QUEUE, BODY]),
        "broker read": partial(run_ms, [*broker, "read", QUEUE]),
        # Options need argparse.
        "with an option, broker read --json": partial(run_ms, [*broker, "read", "--json", QUEUE]),
    }
    interleave(1, runs)  # fills the caches of bytecode and files
    times = interleave(bench.plan.cli_rounds, runs)
    script_ms = times.pop("script")
    for what, our_ms in times.items():
        bound = None if "--" in what else ("<=", 1.5)
        yield compare("cli", f"{what}, {bench.sync}", "a bare Python script", "ms", our_ms, script_ms, bound=bound)


# The peak that the system reports is at least that of the process that started it, so a small one starts it.
LAUNCHER = """\
import os, sys
child = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(child, 0)
print(status, usage.ru_maxrss, file=sys.stderr)
"""


def peak_mb(bench: Bench, directory: Path, *arguments: str) -> float:
    """Run a broker command with its output thrown away; its peak resident memory."""
    command = [sys.executable, "-I", "-S", "-c", LAUNCHER, *bench.broker(directory, *arguments)]
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    done = subprocess.run(command, env=bench.environment(), check=True, stdout=null, stderr=pipe)
    status, peak = map(int, done.stderr.split()[-2:])
    if not os.WIFEXITED(status) or os.WEXITSTATUS(status) not in (0, 2):
        raise RuntimeError(f"broker {' '.join(arguments)}: {done.stderr.decode(errors='replace')}")
    return peak / (1 << (20 if sys.platform == "darwin" else 10))


def memory(bench: Bench) -> Iterator[Row]:
    if not hasattr(os, "wait4"):
        bench.missing["memory"] = "this platform has no wait4()"
        return
    empty, count = bench.fresh(), bench.plan.depths[-1]
    ours(empty, bench.sync).close()
    for command in (("dump",), ("read", QUEUE, "--all")):  # in this order: reading empties the queue
        base = median(peak_mb(bench, empty, *command) for _ in range(bench.plan.rounds))
        added = peak_mb(bench, bench.deep(count), *command) - base
        what = f"broker {command[0]} of {count:,}, peak above an empty run"
        yield Row("memory", what, "an empty run", added / base, added, base, "MB", ("<=", 40.0), "ours")


SCENARIOS: tuple[tuple[str, Callable[[Bench], Iterable[Row]], str], ...] = (
    ("single", single, "writing and reading in a loop, against the bare loop and other queues"),
    ("threads", threads, "many threads of one process, which share commits"),
    ("contention", contention, "many writing processes: throughput, and waits up to the maximum"),
    ("mixed", mixed, "as many reading processes beside them"),
    ("depth", depth, "a deep queue against a short one"),
    ("sizes", sizes, "messages from 100 bytes to a megabyte"),
    ("batch", batch, "many messages in one transaction"),
    ("cli", cli, "the broker command against a bare Python script"),
    ("wake", wake, "an idle watcher: how fast it wakes, and what it costs"),
    ("backlog", backlog, "a full queue through QueueWatcher against a loop of read()"),
    ("memory", memory, "peak memory of streaming a deep queue"),
)

# ---------------------------------------------------------------------------------------------------
# Environment and report.
# ---------------------------------------------------------------------------------------------------


def read_lines(path: str) -> list[str]:
    """The lines of a file under /proc; none where there is no such thing."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def file_system(directory: Path) -> str:
    mounts = [line.split()[1:3] for line in read_lines("/proc/mounts")]
    above = {str(directory), *map(str, directory.parents)}
    return max(((len(place), kind) for place, kind in mounts if place in above), default=(0, "unknown"))[1]


def processor() -> str:
    names = [line.split(":", 1)[1].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(bench: Bench) -> dict[str, Any]:
    return {
        "simplebroker": simplebroker.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "sqlite": sqlite3.sqlite_version,
        "system": f"{platform.system()} {platform.release()}",
        "file system": file_system(bench.directory.resolve()),
        "fsync ms": round(bench.fsync_ms, 3),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "synchronous": ", ".join(bench.syncs),
    }


def amount(value: float, unit: str) -> str:
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}{'' if unit == '/s' else ' '}{unit}"


HEADING = f"{'ratio':>8}  {'':<52}{'simplebroker':>13}{'reference':>13}  {'against':<22}bound"


def row_text(row: Row) -> str:
    verdict = {None: "", True: "met", False: "MISSED"}[row.met]
    figures = f"{amount(row.ours, row.unit):>13}{amount(row.reference, row.unit):>13}"
    line = f"{row.ratio:7.2f}x  {row.what:<52}{figures}  {row.against:<22}{row.bound_text:<10} {verdict}".rstrip()
    return "\n".join([line, *(f"{'':10}{note}" for note in row.notes)])


def chart(rows: Iterable[Row], width: int = 28) -> Iterator[str]:
    """Bars of throughput and worst wait by the number of writers, for SimpleBroker and the bare loop."""
    wanted = [row for row in rows if row.scenario == "contention" and row.against == BARE.name]
    top = {row.unit: max(max(r.ours, r.reference) for r in wanted if r.unit == row.unit) for row in wanted}
    yield f"\n  writers  {'':<14}{'throughput':<{width + 13}}worst wait"
    for pair in zip(wanted[::2], wanted[1::2]):
        for label, name, source in ((pair[0].more["writers"], OURS.name, "ours"), ("", BARE.name, "reference")):
            line = f"{label:>9}  {name:<14}"
            for row in pair:
                value = getattr(row, source)
                line += f"{'#' * max(1, round(width * value / top[row.unit])):<{width}} {amount(value, row.unit):<12}"
            yield line.rstrip()


def run(bench: Bench, names: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Run the scenarios of these names, say what is found as it is found, and return it."""
    started = time.monotonic()
    head = environment(bench)
    say("\n".join(f"{key:<14}{value}" for key, value in head.items()) + f"\n\n{HEADING}")
    rows: list[Row] = []
    for name, scenario, about in SCENARIOS:
        if name not in names:
            continue
        since = time.monotonic()
        say(f"\n{name}: {about}")
        for row in scenario(bench):
            rows.append(row)
            say(row_text(row))
        if name == "contention":
            say("\n".join(chart(rows)))
        say(f"{'':10}({time.monotonic() - since:.1f} s)")
    judged = [row for row in rows if row.bound]
    met = sum(bool(row.met) for row in judged)
    seconds = round(time.monotonic() - started, 1)
    say("".join(f"\nnot measured: {name}: {reason}" for name, reason in sorted(bench.missing.items())))
    say(f"{met} of {len(judged)} bounds met, in {seconds} s")
    results = [row.as_json() for row in rows]
    counts = {"bounds": len(judged), "met": met, "seconds": seconds}
    return {"environment": head, "results": results, "missing": bench.missing, **counts}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    known = [name for name, _, _ in SCENARIOS]
    parser = argparse.ArgumentParser(description="Measure SimpleBroker against its bounds and other queues.")
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="NAME", help="only these scenarios")
    parser.add_argument("--list", action="store_true", help="list the scenarios and stop")
    parser.add_argument("--sync", choices=("FULL", "NORMAL"), help="durability; default: FULL, and some rows with both")
    parser.add_argument("--quick", action="store_true", help="measure less, for continuous integration")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    parser.add_argument("--dir", type=Path, help="where to make the databases, in a temporary directory of their own")
    options = parser.parse_args(argv)
    if options.dir is not None and not options.dir.is_dir():
        parser.error(f"--dir {options.dir}: no such directory")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    if options.list:
        print("\n".join(f"{name:<12}{about}" for name, _, about in SCENARIOS))
        return 0
    directory = Path(tempfile.mkdtemp(prefix="simplebroker-benchmark-", dir=options.dir))
    try:
        bench = Bench(options.quick, directory, (options.sync,) if options.sync else ("FULL", "NORMAL"))
        result = run(bench, options.only, (lambda _: None) if options.json else partial(print, flush=True))
    finally:
        shutil.rmtree(directory)
    if options.json:
        print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
