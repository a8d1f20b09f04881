#!/usr/bin/env python3
"""Patterns with MultiQueueWatcher: priorities, weights, load balancing, errors by queue, metrics, dynamic queues.

    python multi_queue_patterns.py

Needs multi_queue_watcher.py beside it. Each function stands alone: copy the one that you need.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Callable

# Find simplebroker.py beside this file or one directory above it. Not needed when it is installed.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(d) for d in (HERE, HERE.parent) if (d / "simplebroker.py").exists()]

from multi_queue_watcher import MultiQueueWatcher  # noqa: E402

# isort: split
from simplebroker import Broker, Message  # noqa: E402

Handler = Callable[[Message, int], object]


class PriorityWatcher(MultiQueueWatcher):
    """Strict priority: a queue has its turn when all queues before it are empty. The last ones can starve."""

    def plan(self) -> Iterable[str]:
        """The first queue that has something, looked for again after each message."""
        for name in self.queues:
            if self.broker.queue(name).has_pending():
                return [name]
        return []


class WeightedWatcher(MultiQueueWatcher):
    """Shares: in each round a queue has as many turns as its weight. Nothing starves."""

    def __init__(self, weights: dict[str, int], default_handler: Handler, **options: Any) -> None:
        self._weights = weights
        super().__init__(weights, default_handler, **options)

    def plan(self) -> Iterable[str]:
        """Every queue, weight times; once, if it was added later."""
        return [name for name in self.queues for _ in range(self._weights.get(name, 1))]


def priorities(broker: Broker) -> None:
    """Urgent messages overtake the others, also those that come while the others are worked on."""
    order: list[str] = []

    def handler(message: Message, timestamp: int) -> None:
        order.append(message)
        if message == "normal 1":
            broker.queue("high").write("urgent 2")

    broker.queue("low").write_many(["low 1"])
    broker.queue("normal").write_many(["normal 1", "normal 2"])
    broker.queue("high").write_many(["urgent 1"])
    PriorityWatcher(["high", "normal", "low"], handler, db=broker).watch(drain=True)
    print("strict:", ", ".join(order))

    order.clear()
    broker.queue("high").write_many(f"h{n}" for n in range(4))
    broker.queue("low").write_many(f"l{n}" for n in range(4))
    WeightedWatcher({"high": 3, "low": 1}, handler, db=broker).watch(drain=True)
    print("weighted:", ", ".join(order))


def least_loaded(broker: Broker, names: Iterable[str]) -> str:
    """The queue with the fewest messages, those in work included. Approximate while others write."""
    return min(names, key=lambda name: broker.queue(name).stats().total)


def load_balancing(broker: Broker) -> None:
    """Spread a queue over queues of workers: each message goes to the one that has the least to do.

    When all workers can do all work, let them read one queue instead: that balances by itself.
    """
    workers = ["worker.1", "worker.2", "worker.3"]
    broker.queue("worker.1").write_many(["old work"] * 4)
    incoming = broker.queue("incoming")
    incoming.write_many(f"job {n}" for n in range(8))
    while incoming.move(least_loaded(broker, workers)) is not None:  # a crash loses nothing and copies nothing
        pass
    print("balanced:", {name: broker.queue(name).count() for name in workers})
    handled: Counter[str] = Counter()
    watcher = MultiQueueWatcher(workers, lambda message, timestamp: handled.update([message.queue]), db=broker)
    watcher.watch(drain=True)
    print("handled:", dict(handled))


def errors_by_queue(broker: Broker) -> None:
    """A strategy for each queue: give up at once, try again, or stop everything."""

    def handler(message: Message, timestamp: int) -> None:
        raise ValueError(f"{message.queue} does not work")

    def drop(error: BaseException, message: Message, timestamp: int) -> bool | None:
        return True  # not worth a second attempt: acknowledge

    def halt(error: BaseException, message: Message, timestamp: int) -> bool | None:
        return False  # no other message may be handled before a human has looked: give it back and stop

    def retry(error: BaseException, message: Message, timestamp: int) -> bool | None:
        return None  # again after backoff seconds, then to the dead-letter queue

    strategies = {"metrics": drop, "mails": retry}
    for name in ("metrics", "mails", "ledger"):
        broker.queue(name).write("message")
    watcher = MultiQueueWatcher(
        strategies, handler, None, strategies, db=broker, max_attempts=2, backoff=0, dead_letter="failed"
    )
    watcher.watch(drain=True)
    MultiQueueWatcher(["ledger"], handler, None, {"ledger": halt}, db=broker).watch()  # ends at the first error
    print("left:", {name: broker.queue(name).count() for name in ("metrics", "mails", "ledger", "failed")})


class Metrics:
    """Counts and times what handlers do, by queue. For one watcher: it calls one handler at a time."""

    def __init__(self) -> None:
        self.handled: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def measured(self, handler: Handler) -> Handler:
        """The same handler, measured."""

        def wrapper(message: Message, timestamp: int) -> None:
            begin = time.perf_counter()
            try:
                handler(message, timestamp)
            except Exception:
                self.failed[message.queue] += 1
                raise
            finally:
                self.seconds[message.queue] += time.perf_counter() - begin
            self.handled[message.queue] += 1

        return wrapper

    def report(self, broker: Broker) -> list[str]:
        """One line for each queue; what is waiting is asked for when it is needed, not counted along."""
        lines = []
        waiting = broker.queues()
        for name in sorted({*self.handled, *self.failed}):
            backlog = waiting[name].ready if name in waiting else 0
            lines.append(f"{name}: {self.handled[name]} handled, {self.failed[name]} failed, {backlog} waiting")
        return lines


def metrics(broker: Broker) -> None:
    """Measure every handler, without changing any."""
    measure = Metrics()

    @measure.measured
    def handler(message: Message, timestamp: int) -> None:
        if message == "bad":
            raise ValueError("bad")

    broker.queue("a").write_many(["good", "good", "bad"])
    broker.queue("b").write_many(["good"])
    MultiQueueWatcher(["a", "b"], handler, db=broker, max_attempts=2, backoff=0).watch(drain=True)
    print("\n".join(measure.report(broker)))
    print("timed:", all(seconds > 0 for seconds in measure.seconds.values()))


def dynamic_queues(broker: Broker) -> None:
    """Queues that come and go while the watcher runs, told by messages in a queue of their own."""
    seen: list[str] = []

    def handler(message: Message, timestamp: int) -> None:
        seen.append(message)

    def control(message: Message, timestamp: int) -> None:
        order = json.loads(message)
        if "add" in order and order["add"] not in watcher.queues:  # at least once: an order may come twice
            watcher.add_queue(order["add"])
        if "remove" in order and order["remove"] in watcher.queues:
            watcher.remove_queue(order["remove"])

    broker.queue("tenant.1").write_many(["1a", "1b"])
    broker.queue("tenant.2").write_many(["2a", "2b"])
    orders = ['{"add": "tenant.1"}', '{"add": "tenant.2"}', '{"remove": "tenant.1"}']
    broker.queue("control").write_many(orders)
    watcher = MultiQueueWatcher(["control"], handler, {"control": control}, db=broker)
    watcher.watch(drain=True)
    print("seen:", seen, "watched:", watcher.queues, "left:", broker.queue("tenant.1").count())


PATTERNS = (
    priorities,
    load_balancing,
    errors_by_queue,
    metrics,
    dynamic_queues,
)


def main() -> None:
    """Run all of them, each on a database of its own."""
    for pattern in PATTERNS:
        print(f"-- {pattern.__name__}")
        with tempfile.TemporaryDirectory() as directory, Broker(Path(directory, "broker.db")) as broker:
            pattern(broker)


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL)  # handlers fail on purpose here: do not show the tracebacks
    main()
