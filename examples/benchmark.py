#!/usr/bin/env python3
"""Measures SimpleBroker against the bounds that it sets itself, and against other queues.

    python benchmark.py                        all rows: about four minutes; exit status 1 if a bound is missed
    python benchmark.py --quick --json         a minute at most, for continuous integration; only errors fail
    python benchmark.py --only process cli     some rows; --help names them
    TMPDIR=/var/lib/app python benchmark.py    on the disk that counts

The reference is what a program would write by hand, the bare loop: sqlite3 in WAL mode with the same synchronous
setting, a table with an index on (queue, id), BEGIN IMMEDIATE, INSERT (or SELECT the first and DELETE it), COMMIT.
Other queues are measured where they are installed, as durable as FULL: litequeue, persist-queue, huey, diskcache,
localqueue, and Redis (redis-py and a redis-server in PATH, which is started with appendfsync=always).

What is compared is measured in turn: a round that does not count (it fills caches, and grows the log of the database),
then those that do. A figure is the median of the rounds, a ratio the median of the rounds' ratios; a wait that is
judged in milliseconds is the longest of all rounds. Absolute figures depend on the machine and what else it does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any, Callable, NamedTuple

# simplebroker.py is beside this file or one directory above, or installed.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(d) for d in (HERE, HERE.parent) if (d / "simplebroker.py").exists()]
import simplebroker  # noqa: E402
from simplebroker import Queue, QueueWatcher, Settings  # noqa: E402

# ---------------------------------------------------------------------------------------------------
# Settings: what is required, and how much is measured.
# ---------------------------------------------------------------------------------------------------

# The value of each row must be at least or at most so much; "x": it is a ratio to what the row is compared with.
BOUNDS = {
    "write in a loop, FULL": (">=", 0.8, "x"),
    "read in a loop, FULL": (">=", 0.8, "x"),
    "write in a loop, NORMAL": (">=", 0.5, "x"),
    "read in a loop, NORMAL": (">=", 0.5, "x"),
    "lease + ack in a loop, FULL": (">=", 1.4, "x"),
    "8 processes, FULL, writes": (">=", 0.9, "x"),
    "8 processes, FULL, worst wait": ("<=", 1 / 15, "x"),
    "8 processes, FULL, most by least of one": ("<=", 2.0, ""),
    "16 processes, FULL, worst wait": ("<=", 120.0, "ms"),
    "8 processes, NORMAL, worst wait": ("<=", 250.0, "ms"),
    "8 threads, FULL, writes": (">=", 1.8, "x"),
    "8 threads, FULL, worst wait": ("<=", 50.0, "ms"),
    "32 threads, FULL, writes": (">=", 2.5, "x"),
    "32 threads, FULL, worst wait": ("<=", 50.0, "ms"),
    "broker write": ("<=", 1.3, "x"),
    "broker read": ("<=", 1.3, "x"),
    "deep queue, write + read, FULL": (">=", 0.8, "x"),
    "many held elsewhere, write + read, FULL": (">=", 0.8, "x"),
    "deep queue, write + read, NORMAL": (">=", 0.8, "x"),
    "many held elsewhere, write + read, NORMAL": (">=", 0.8, "x"),
    "write_many": (">=", 0.8, "x"),
    "backlog through QueueWatcher": (">=", 0.9, "x"),
    "wake of an idle watcher, median": ("<=", 1.0, "ms"),
    "processor time of an idle watcher": ("<=", 0.5, "%"),
    "dump of a deep queue, added memory": ("<=", 40.0, "MB"),
    "read --all of a deep queue, added memory": ("<=", 40.0, "MB"),
}

QUEUE = "bench"
BODY = "x" * 100
SHORT = 1_000  # messages in the queue that a deep one is compared with
FILL_BATCH = 10_000  # messages in a transaction when a queue is filled
BACKLOG = 50_000  # messages before a watcher, or read(), begins to consume: more than it can
PAUSES_MS = range(2, 23)  # in turn, before a message wakes the idle watcher
ANSWER_S = 60.0  # a child process that says nothing for so long is an error
FOREVER = float("inf")


class Sizes(NamedTuple):
    """How much is measured, in the full run unless said otherwise."""

    rounds: int = 5
    rounds_of_8: int = 9  # of the 8 processes that are compared with the bare loop
    rounds_of_1: int = 15  # of one process: many short ones, so that both see the same disk
    rounds_of_cli: int = 21
    loop_s: float = 0.15  # of one process in each round
    load_s: float = 0.8  # of many threads or processes; one that starves shows as its worst wait
    deep: int = 1_000_000  # messages
    batch: int = 20_000  # messages of one write_many()
    wakes: int = 200
    idle_s: float = 10.0


QUICK = Sizes(2, 2, 3, 4, loop_s=0.1, load_s=0.2, deep=30_000, batch=5_000, wakes=50, idle_s=1.0)

# ---------------------------------------------------------------------------------------------------
# Stores: SimpleBroker, the bare loop and the other queues, each opened by a function.
# ---------------------------------------------------------------------------------------------------


class Store(NamedTuple):
    """An open queue."""

    put: Callable[[str], object]  # returns when the message is as durable as was asked for
    take: Callable[[], object]  # removes the first message; if there is none, returns None or raises an error
    close: Callable[[], object]


def open_queue(directory: Path, sync: str) -> Queue:
    """SimpleBroker with its default settings, but for the durability."""
    queue = Queue(QUEUE, directory / ".broker.db", settings=Settings(sync_mode=sync))
    queue.count()  # connects
    return queue


def open_simplebroker(directory: Path, sync: str) -> Store:
    queue = open_queue(directory, sync)
    return Store(queue.write, queue.read, queue.close)


def open_leased(directory: Path, sync: str) -> Store:
    queue = open_queue(directory, sync)
    return Store(queue.write, lambda: queue.ack(queue.lease()) is None, queue.close)


INSERT = "INSERT INTO m (queue, body) VALUES (?, ?)"


def connect(directory: Path, sync: str) -> sqlite3.Connection:
    """The database of the bare loop, with sqlite3's default busy handler."""
    connection = sqlite3.connect(str(directory / "bare.db"), isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL").fetchall()  # a statement that is not finished blocks COMMIT
    connection.execute(f"PRAGMA synchronous={sync}")
    connection.execute("CREATE TABLE IF NOT EXISTS m (id INTEGER PRIMARY KEY, queue TEXT NOT NULL, body TEXT NOT NULL)")
    connection.execute("CREATE INDEX IF NOT EXISTS m_queue ON m (queue, id)")
    return connection


def open_bare_sqlite3(directory: Path, sync: str) -> Store:
    connection = connect(directory, sync)
    execute = connection.execute

    def put(body: str) -> None:
        execute("BEGIN IMMEDIATE")
        execute(INSERT, (QUEUE, body))
        execute("COMMIT")

    def take() -> object:
        execute("BEGIN IMMEDIATE")
        rows = execute("SELECT id, body FROM m WHERE queue = ? ORDER BY id LIMIT 1", (QUEUE,)).fetchall()
        if rows:
            execute("DELETE FROM m WHERE id = ?", (rows[0][0],))
        execute("COMMIT")
        return rows[0] if rows else None

    return Store(put, take, connection.close)


def open_litequeue(directory: Path, _: str) -> Store:
    connection = sqlite3.connect(str(directory / "litequeue.db"), isolation_level=None)
    queue = import_module("litequeue").LiteQueue(connection)
    connection.execute("PRAGMA synchronous=FULL")
    return Store(queue.put, lambda: queue.done(queue.pop().message_id) or True, connection.close)


def open_persist_queue(directory: Path, _: str) -> Store:
    """As it comes: it has no setting for the durability."""
    queue = import_module("persistqueue").SQLiteQueue(str(directory / "persist"), auto_commit=True)
    return Store(queue.put, queue.get, queue.close)


def open_huey(directory: Path, _: str) -> Store:
    storage = import_module("huey.storage").SqliteStorage(QUEUE, str(directory / "huey.db"), fsync=True)
    return Store(lambda body: storage.enqueue(body.encode()), storage.dequeue, storage.close)


def open_diskcache(directory: Path, _: str) -> Store:
    cache = import_module("diskcache").Cache(str(directory / "diskcache"), sqlite_synchronous=2)
    return Store(cache.push, lambda: cache.pull()[1], cache.close)


def open_localqueue(directory: Path, _: str) -> Store:
    module = import_module("localqueue")
    queue = module.SimpleQueue(str(directory / "localqueue"), durability=module.DurabilityMode.DURABLE)
    return Store(queue.put, lambda: queue.ack(queue.get()) or True, queue.close)


def open_redis(directory: Path, _: str) -> Store:
    """A list of the server of this run, see start_redis()."""
    client = import_module("redis").Redis(unix_socket_path=str(directory.parent / "redis.sock"))
    return Store(partial(client.rpush, str(directory)), partial(client.lpop, str(directory)), client.close)


OPEN = {open_it.__name__[len("open_") :].replace("_", " "): open_it for open_it in (
    open_simplebroker, open_leased, open_bare_sqlite3, open_litequeue, open_persist_queue, open_huey, open_diskcache,
    open_localqueue, open_redis)}  # fmt: skip
OURS, LEASED, BARE, *OTHERS = OPEN

# ---------------------------------------------------------------------------------------------------
# Measuring, and the rows that come of it.
# ---------------------------------------------------------------------------------------------------


def measure(operation: Callable[[], object], *, seconds: float = FOREVER, count: float = FOREVER) -> array[float]:
    """Do it again and again, for so long or so often; return how long each took, in seconds."""
    took = array("d")
    now = time.perf_counter()
    end = now + seconds
    while now < end and len(took) < count:
        before = now
        operation()
        now = time.perf_counter()
        took.append(now - before)
    return took


class Load(NamedTuple):
    """What one or several who worked at the same time saw in a round."""

    rate: float  # operations a second, of all
    p99_ms: float
    worst_ms: float
    most_by_least: float  # operations of one of them
    errors: int


def load_of(*took: array[float], errors: int = 0) -> Load:
    """Add up what each of them measured. An operation that failed is a wait, but not done."""
    waits, done = sorted(wait for own in took for wait in own), [len(own) for own in took]
    rate = sum(len(own) / sum(own) for own in took) * (1 - errors / len(waits))
    return Load(rate, 1000 * waits[int(0.99 * len(waits))], 1000 * waits[-1], max(done) / min(done), errors)


def interleave(rounds: int, runs: dict[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """Run each once a round, in an order that turns, after a round that does not count; return what each found."""
    names = list(runs)
    results: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(runs[name]())
    return {name: found[1:] for name, found in results.items()}


Rows = Iterator[dict[str, Any]]


def judged(name: str, here: float, there: float | None, unit: str, against: str, value: float) -> dict[str, Any]:
    """A row of the table: two figures, and the value that its bound is about."""
    sign, limit, unit_of_value = BOUNDS[name]
    bound = {"value": value, "bound": f"{sign} {limit:.3g} {unit_of_value}".strip()}
    met = value >= limit if sign == ">=" else value <= limit
    return {"row": name, "here": here, "there": there, "unit": unit, "compared with": against, **bound, "met": met}


def compared(name: str, ours: Iterable[Load], against: str, theirs: Iterable[Load], field: str = "rate") -> Any:
    """A row about a ratio, a longest wait or another figure, as its bound has it."""
    unit = BOUNDS[name][2]
    columns = [[getattr(load, field) for load in loads] for loads in (ours, theirs)]
    here, there = (max(column) if unit == "ms" else median(column) for column in columns)
    value = median(a / b for a, b in zip(*columns)) if unit == "x" else here
    return judged(name, here, there, {"rate": "/s", "worst_ms": "ms"}.get(field, ""), against, value)


PROCESSES: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


class Bench:
    """What the measurements share. What they open is closed after the rows that are measured together."""

    def __init__(self, sizes: Sizes, directory: Path) -> None:
        self.sizes = sizes
        self.directory = directory
        self.stack = ExitStack()
        self.missing: dict[str, str] = {}  # what could not be measured, and why

    def fresh(self) -> Path:
        """A new directory for a database."""
        return Path(tempfile.mkdtemp(dir=self.directory))

    def queue(self, sync: str = "FULL", directory: Path | None = None) -> Queue:
        return self.stack.enter_context(closing(open_queue(directory or self.fresh(), sync)))

    def filled(self, ready: int, held: int = 0) -> Path:
        """The directory of SimpleBroker with so many messages ready in our queue, and held in another."""
        directory = self.fresh()
        with closing(open_queue(directory, "NORMAL")) as queue:
            for where, count, delay in ((queue, ready, 0), (queue.broker.queue("elsewhere"), held, 86_400)):
                for start in range(0, count, FILL_BATCH):
                    where.write_many([BODY] * min(FILL_BATCH, count - start), delay=delay)
        return directory

    @cached_property
    def deep(self) -> Path:
        return self.filled(self.sizes.deep)

    def works(self, name: str) -> bool:
        """Whether another queue can be measured; the reason why not is kept."""
        try:
            with closing(OPEN[name](self.fresh(), "FULL")) as store:
                store.put(BODY)
                store.take()
        except Exception as error:  # noqa: BLE001 - whatever another queue raises is the reason
            self.missing[name] = f"{type(error).__name__}: {error}"
        return name not in self.missing

    def start(self, target: Callable[..., None], *arguments: Any) -> Any:
        """Start a process; return our end of its pipe. At the end it is sent None."""
        pipe, theirs = PROCESSES.Pipe()
        process = PROCESSES.Process(target=target, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        self.stack.callback(process.join, ANSWER_S)
        self.stack.callback(pipe.send, None)
        return pipe

    def run(self, directory: Path, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        """Run a command with default settings and cached bytecode, as it is where nobody turned that off."""
        unwanted = ("BROKER_", "PYTHONDONTWRITEBYTECODE")
        environ = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
        environ["PYTHONPATH"] = os.path.dirname(simplebroker.__file__)
        null = subprocess.DEVNULL
        return subprocess.run(command, cwd=directory, env=environ, check=True, stdin=null, stdout=null, **options)


def receive(pipe: Any) -> Any:
    """The next answer of a child process; EOFError if it died."""
    if not pipe.poll(ANSWER_S):
        raise TimeoutError("a child process does not answer")
    return pipe.recv()


# ---------------------------------------------------------------------------------------------------
# The rows.
# ---------------------------------------------------------------------------------------------------


def work(pipe: Any, name: str, directory: Path, sync: str, start: Any, takes: bool) -> None:
    """In a child: open the queue; when told for how long, write together with the others, then take all of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    errors = 0
    with closing(OPEN[name](directory, sync)) as store:

        def attempt(operation: Callable[..., object], *body: str) -> None:
            nonlocal errors
            try:
                if operation(*body) is None and not body:
                    raise LookupError("a message is missing")
            except Exception:  # noqa: BLE001 - whatever another queue raises is counted
                if name in (OURS, LEASED):
                    raise
                errors += 1

        pipe.send("open")
        while seconds := pipe.recv():
            errors = 0
            start.wait(ANSWER_S)
            puts = measure(partial(attempt, store.put, BODY), seconds=seconds)
            pipe.send((puts, measure(partial(attempt, store.take), count=len(puts) if takes else 0), errors))


def crew(bench: Bench, name: str, sync: str, size: int) -> Callable[[], list[Load]]:
    """Start processes that use one queue; return a function that lets all of them write for one round.

    One process alone takes too. They have the queue open between the rounds: the last one to close a SQLite database
    deletes its log, and while that grows anew a synced write takes 1.4 times as long.
    """
    directory, seconds = bench.fresh(), bench.sizes.load_s if size > 1 else bench.sizes.loop_s
    with closing(OPEN[name](directory, sync)) as store:  # the database is there before the race begins
        store.put(BODY)
    start = PROCESSES.Barrier(size)
    pipes = [bench.start(work, name, directory, sync, start, size == 1) for _ in range(size)]
    for pipe in pipes:
        receive(pipe)

    def work_together() -> list[Load]:
        for pipe in pipes:
            pipe.send(seconds)
        puts, takes, errors = zip(*map(receive, pipes))
        return [load_of(*took, errors=sum(errors)) for took in (puts, takes) if took[0]]

    return work_together


def loads(bench: Bench, names: Iterable[str], sync: str, size: int, rounds: int | None = None) -> dict[str, list[Any]]:
    """Let so many processes work with each of these queues in turn; for each the rounds of writes, and of takes."""
    rounds = rounds or (bench.sizes.rounds_of_1 if size == 1 else bench.sizes.rounds)
    found = interleave(rounds, {name: crew(bench, name, sync, size) for name in names})
    return {name: list(zip(*of_rounds)) for name, of_rounds in found.items()}


def loop_rows(bench: Bench) -> Rows:
    for sync in ("FULL", "NORMAL"):
        found = loads(bench, (OURS, BARE), sync, 1)
        for word, ours, bare in zip(("write", "read"), found[OURS], found[BARE]):
            yield compared(f"{word} in a loop, {sync}", ours, BARE, bare)


def lease_rows(bench: Bench) -> Rows:
    if bench.works("litequeue"):
        found = loads(bench, (LEASED, "litequeue"), "FULL", 1)
        name, against = "lease + ack in a loop, FULL", "litequeue: pop + done"
        yield compared(name, found[LEASED][1], against, found["litequeue"][1])


def process_rows(bench: Bench) -> Rows:
    found = loads(bench, (OURS, BARE), "FULL", 8, bench.sizes.rounds_of_8)
    (ours,), (bare,) = found[OURS], found[BARE]
    for what, field in (("writes", "rate"), ("worst wait", "worst_ms"), ("most by least of one", "most_by_least")):
        yield compared(f"8 processes, FULL, {what}", ours, BARE, bare, field)
    for size, sync in ((16, "FULL"), (8, "NORMAL")):
        found = loads(bench, (OURS, BARE), sync, size)
        yield compared(f"{size} processes, {sync}, worst wait", found[OURS][0], BARE, found[BARE][0], "worst_ms")


def write_in_threads(queue: Queue, threads: int, seconds: float) -> Load:
    """Write from so many threads for so long."""
    start = threading.Barrier(threads)

    def write(_: int) -> array[float]:
        start.wait(ANSWER_S)
        return measure(partial(queue.write, BODY), seconds=seconds)

    with ThreadPoolExecutor(threads) as pool:
        return load_of(*pool.map(write, range(threads)))


def thread_rows(bench: Bench) -> Rows:
    write = partial(write_in_threads, bench.queue(), seconds=bench.sizes.load_s)
    found = interleave(bench.sizes.rounds, {f"{number} threads": partial(write, number) for number in (1, 8, 32)})
    alone = found.pop("1 threads")
    for name, together in found.items():
        yield compared(f"{name}, FULL, writes", together, "one thread", alone)
        yield compared(f"{name}, FULL, worst wait", together, "one thread", alone, "worst_ms")


def depth_rows(bench: Bench) -> Rows:
    places = {"short": bench.filled(SHORT), "deep": bench.deep, "held": bench.filled(SHORT, bench.sizes.deep)}

    def write_and_read(queue: Queue) -> Load:
        return load_of(measure(lambda: queue.write(BODY) and queue.read(), seconds=bench.sizes.loop_s))

    for sync in ("FULL", "NORMAL"):
        queues = {name: bench.queue(sync, directory) for name, directory in places.items()}
        found = interleave(bench.sizes.rounds_of_1, {name: partial(write_and_read, of) for name, of in queues.items()})
        yield compared(f"deep queue, write + read, {sync}", found["deep"], "a short queue", found["short"])
        yield compared(f"many held elsewhere, write + read, {sync}", found["held"], "none held", found["short"])


def batch_rows(bench: Bench) -> Rows:
    queue, bodies = bench.queue(), [BODY] * bench.sizes.batch
    connection = bench.stack.enter_context(closing(connect(bench.fresh(), "FULL")))

    def executemany() -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(INSERT, ((QUEUE, body) for body in bodies))
        connection.execute("COMMIT")

    def of_each(put_many: Callable[[], object]) -> Load:
        return load_of(array("d", [measure(put_many, count=1)[0] / len(bodies)]))

    runs = {"ours": partial(of_each, partial(queue.write_many, bodies)), "bare": partial(of_each, executemany)}
    found = interleave(bench.sizes.rounds, runs)
    yield compared("write_many", found["ours"], "executemany", found["bare"])


def watch_for(queue: Queue, seconds: float) -> array[float]:
    """Let a QueueWatcher handle messages for so long; how long each took, in the mean."""
    handled = []

    def handler(message: str, timestamp: int) -> None:
        handled.append(message)
        if time.perf_counter() > end:
            watcher.request_stop()

    watcher = QueueWatcher(queue, handler)
    end = time.perf_counter() + seconds
    return array("d", [measure(watcher.watch, count=1)[0] / len(handled)])


def backlog_rows(bench: Bench) -> Rows:
    queue, seconds = bench.queue(), bench.sizes.load_s

    def consumed(consume: Callable[[], array[float]]) -> Load:
        queue.write_many([BODY] * (BACKLOG - queue.count()))
        return load_of(consume())

    runs = {"watch": partial(watch_for, queue, seconds), "read": partial(measure, queue.read, seconds=seconds)}
    found = interleave(bench.sizes.rounds, {name: partial(consumed, run) for name, run in runs.items()})
    yield compared("backlog through QueueWatcher", found["watch"], "a loop of read()", found["read"])


def watch_in_child(pipe: Any, directory: Path, sizes: Sizes) -> None:
    """In a child: watch; tell the processor time of some idle seconds, then how late each message came, in ms."""
    late: SimpleQueue[float] = SimpleQueue()

    def handler(message: str, timestamp: int) -> None:
        late.put((time.perf_counter_ns() - int(message)) / 1e6)

    with closing(open_queue(directory, "FULL")) as queue, QueueWatcher(queue, handler):
        time.sleep(0.5)  # the start is not counted
        before = time.process_time()
        time.sleep(sizes.idle_s)
        pipe.send(100 * (time.process_time() - before) / sizes.idle_s)
        pipe.send([late.get(timeout=ANSWER_S) for _ in range(sizes.wakes)])
        pipe.recv()


def wake_rows(bench: Bench) -> Rows:
    """From the call of write() to that of the handler: the clock is the same in all processes."""
    directory = bench.filled(0)
    child, queue = bench.start(watch_in_child, directory, bench.sizes), bench.queue(directory=directory)
    cpu = receive(child)
    for number in range(bench.sizes.wakes):
        time.sleep(PAUSES_MS[number % len(PAUSES_MS)] / 1000)
        queue.write(str(time.perf_counter_ns()))
    late = median(receive(child))
    yield judged("wake of an idle watcher, median", late, None, "ms", "", late)
    yield judged("processor time of an idle watcher", cpu, None, "%", "", cpu)


BARE_SCRIPT = f"""\
import sqlite3
connection = sqlite3.connect("bare.db", isolation_level=None)
connection.execute("PRAGMA journal_mode=WAL").fetchall()
connection.execute("PRAGMA synchronous=FULL")
connection.execute("BEGIN IMMEDIATE")
connection.execute({INSERT!r}, ({QUEUE!r}, {BODY!r}))
connection.execute("COMMIT")
connection.close()
"""
BROKER = (sys.executable, "-m", "simplebroker")


def cli_rows(bench: Bench) -> Rows:
    directory = bench.filled(SHORT)
    connect(directory, "FULL").close()
    (directory / "bare.py").write_text(BARE_SCRIPT, encoding="utf-8")

    def run(*command: str) -> Load:
        return load_of(measure(lambda: bench.run(directory, command), count=1))

    commands = {"broker write": (*BROKER, "write", QUEUE, BODY), "broker read": (*BROKER, "read", QUEUE)}
    runs = {name: partial(run, *command) for name, command in commands.items()}
    found = interleave(bench.sizes.rounds_of_cli, {"script": partial(run, sys.executable, "bare.py"), **runs})
    for name in commands:
        yield compared(name, found[name], "a bare Python script", found["script"], "worst_ms")


# The peak that the system reports is at least that of the process that started it, so a small one starts it.
LAUNCHER = """\
import os, sys
_, status, usage = os.wait4(os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:]), 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(status not in (0, 2 << 8))  # 2: the queue is empty
"""


def peak_mb(bench: Bench, directory: Path, *arguments: str) -> float:
    """Run a broker command with its output thrown away; its peak resident memory."""
    command = [sys.executable, "-I", "-S", "-c", LAUNCHER, *BROKER, *arguments]
    peak = int(bench.run(directory, command, stderr=subprocess.PIPE).stderr.split()[-1])
    return peak / (1 << (20 if sys.platform == "darwin" else 10))


def memory_rows(bench: Bench) -> Rows:
    """The last of the deep queue, for reading empties it."""
    if not hasattr(os, "wait4"):
        bench.missing["memory"] = "this platform has no wait4()"
        return
    empty = bench.filled(0)
    for name, words in (("dump", ["dump"]), ("read --all", ["read", QUEUE, "--all"])):
        base = median(peak_mb(bench, empty, *words) for _ in range(bench.sizes.rounds))
        peak = peak_mb(bench, bench.deep, *words)
        yield judged(f"{name} of a deep queue, added memory", peak, base, "MB", "an empty run", peak - base)


# ---------------------------------------------------------------------------------------------------
# The other queues, and the tables.
# ---------------------------------------------------------------------------------------------------


def start_redis(bench: Bench) -> None:
    """Start a server of our own, where there is that program."""
    program, directory = shutil.which("redis-server"), bench.directory
    if program:
        options = f"--port 0 --appendonly yes --appendfsync always --loglevel warning --dir {directory}".split()
        command = [program, *options, "--save", "", "--unixsocket", directory / "redis.sock"]
        server = bench.stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        bench.stack.callback(server.terminate)
        while server.poll() is None and not (directory / "redis.sock").exists():
            time.sleep(0.02)


def other_rows(bench: Bench) -> Rows:
    """Of the second table: SimpleBroker, the bare loop, and each other queue that is there, at FULL."""

    def figures(rounds: Sequence[Load], what: str) -> dict[str, float]:
        rate, p99 = (median(getattr(load, field) for load in rounds) for field in ("rate", "p99_ms"))
        return {f"{what}/s": rate, f"{what} p99 ms": p99, f"{what} worst ms": max(load.worst_ms for load in rounds)}

    start_redis(bench)
    names = [OURS, BARE, *filter(bench.works, OTHERS)]
    alone, together = (loads(bench, names, "FULL", size, bench.sizes.rounds) for size in (1, 8))
    for name in names:
        (writes, takes), (of_8,) = alone[name], together[name]
        found = {**figures(writes, "write"), "take/s": figures(takes, "take")["take/s"], **figures(of_8, "write by 8")}
        yield {"queue": name, **found, "errors": sum(load.errors for load in (*writes, *takes, *of_8))}


ROWS = {rows.__name__.split("_")[0]: rows for rows in (
    loop_rows, lease_rows, process_rows, thread_rows, cli_rows, depth_rows, batch_rows, backlog_rows, wake_rows,
    memory_rows, other_rows)}  # fmt: skip
LINE = "{:<42}{:>12}{:>12}  {:<22}{:>10}  {:<12}{}"


def amount(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    digits = 0 if value >= 1000 or value == 0 else 1 if value >= 100 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}{'' if unit in ('/s', 'x', '') else ' '}{unit}"


def line(row: dict[str, Any]) -> str:
    """A row of either table as text."""
    if "queue" in row:
        return f"{row['queue']:<14}" + "".join(f"{amount(row[key]):>{len(key) + 2}}" for key in [*row][1:])
    here, there = (amount(row[key], row["unit"]) for key in ("here", "there"))
    value, verdict = amount(row["value"], BOUNDS[row["row"]][2]), "met" if row["met"] else "MISSED"
    return LINE.format(row["row"], here, there, row["compared with"], value, row["bound"], verdict)


def environment(bench: Bench) -> dict[str, Any]:
    with tempfile.TemporaryFile(dir=bench.directory, buffering=0) as file:
        syncs = measure(lambda: file.write(bytes(4096)) and os.fsync(file.fileno()), count=50)
    return {
        "simplebroker": simplebroker.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}, SQLite {sqlite3.sqlite_version}",
        "system": f"{platform.platform()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "sync ms": round(1000 * median(syncs), 3),  # of 4 KB: the floor of every write at FULL
        "queues": f"deep: {bench.sizes.deep:,} messages, short: {SHORT:,}",
    }


def run(bench: Bench, names: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the rows of these names; say each as it is found, and return all."""
    started, tables = time.monotonic(), {"rows": [], "queues": []}
    about = environment(bench)
    say("\n".join(f"{key:<14}{value}" for key, value in about.items()))
    say("\n" + LINE.format("row", "here", "there", "compared with", "value", "bound", ""))
    for name in (name for name in ROWS if name in names):
        with bench.stack:
            for row in ROWS[name](bench):
                if "queue" in row and not tables["queues"]:
                    say(f"\n{'queue, FULL':<14}" + "".join(f"  {key}" for key in [*row][1:]))
                tables["queues" if "queue" in row else "rows"].append(row)
                say(line(row))
    missed = [row["row"] for row in tables["rows"] if not row["met"]]
    seconds = round(time.monotonic() - started, 1)
    say("".join(f"\nnot measured: {name}: {reason}" for name, reason in bench.missing.items()))
    say(f"{len(missed)} of {len(tables['rows'])} bounds missed, in {seconds} s")
    return {"environment": about, **tables, "not measured": bench.missing, "missed": missed, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure SimpleBroker against its bounds and other queues.")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="measure less; bounds that are missed do not fail")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="simplebroker-") as directory:
        bench = Bench(QUICK if options.quick else Sizes(), Path(directory))
        found = run(bench, options.only, (lambda _: None) if options.json else partial(print, flush=True))
    if options.json:
        print(json.dumps(found, indent=2))
    return 1 if found["missed"] and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
