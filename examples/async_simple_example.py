#!/usr/bin/env python3
"""Two small programs on async_pooled_broker.py: a worker, and work in batches.

    pip install aiosqlite aiosqlitepool
    python async_simple_example.py           # a worker: several orders at a time, one that fails
    python async_simple_example.py batch     # batches: many measurements in one step

Both make a queue in a temporary directory, end by themselves and print their result.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import tempfile

from async_pooled_broker import AsyncBrokerCore, AsyncQueue, Message

ORDERS = 100
CONCURRENCY = 8  # orders that are worked on at the same time
MAX_ATTEMPTS = 3
BACKOFF_S = 0.05  # before the second attempt; doubles with each further one
MEASUREMENTS = 1000
BATCH = 200  # measurements in one step
BATCH_LEASE_S = 60  # longer than one step ever takes


def stop_on_signals(broker: AsyncBrokerCore) -> None:
    """SIGINT and SIGTERM: the running handlers end, then the program does. The other orders stay."""
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            asyncio.get_running_loop().add_signal_handler(number, broker.stop)
        except NotImplementedError:  # Windows: KeyboardInterrupt cancels the watch, which gives back its orders
            return


async def stop_when_empty(orders: AsyncQueue) -> None:
    """Only for this demonstration: a service runs until it gets a signal."""
    while (await orders.stats()).total:
        await asyncio.sleep(0.05)
    orders.broker.stop()


async def run_worker(path: str) -> None:
    """Handle every order, several at a time. What fails is tried again, and dead-lettered in the end."""
    async with AsyncBrokerCore(path) as broker:
        orders, receipts = broker.queue("orders"), broker.queue("receipts")

        async def handler(message: Message) -> None:
            order = json.loads(message)
            await asyncio.sleep(0.01)  # the work: a request, a query
            await receipts.write(json.dumps({"order": order["order"], "paid": order["price"]}))

        stop_on_signals(broker)
        bodies = [json.dumps({"order": n, "price": 10 * n}) for n in range(1, ORDERS)]
        await orders.write_many([*bodies, "not an order"])
        watch = orders.watch(handler, concurrency=CONCURRENCY, max_attempts=MAX_ATTEMPTS, backoff=BACKOFF_S)
        await asyncio.gather(watch, stop_when_empty(orders))
        paid = [json.loads(receipt)["paid"] for receipt in await receipts.read_many(2 * ORDERS)]
        dead = await broker.queue("orders.dead").read()
    print(f"receipts: {len(paid)}, paid: {sum(paid)}")
    print(f"dead letter: {dead}, because: {dead.reason if dead else None}")


async def run_batches(path: str) -> None:
    """Take measurements in batches, do one step for each batch, and acknowledge it; the tasks share commits."""
    total = batches = 0
    async with AsyncBrokerCore(path) as broker:
        measurements = broker.queue("measurements")
        await measurements.write_many(str(n) for n in range(MEASUREMENTS))  # one transaction

        while batch := await measurements.lease_many(BATCH, BATCH_LEASE_S):
            total += sum(int(message) for message in batch)  # the step: one insert into another database, ...
            await asyncio.gather(*(measurements.ack(message) for message in batch))
            batches += 1
        left = (await measurements.stats()).total
    print(f"batches: {batches}, sum: {total}, left: {left}")


def main() -> int:
    """Run one of the two."""
    logging.basicConfig(level=logging.CRITICAL)  # the failing order is meant; a service logs it
    examples = {"worker": run_worker, "batch": run_batches}
    choice = sys.argv[1] if len(sys.argv) > 1 else "worker"
    if choice not in examples:
        print(f"usage: {sys.argv[0]} [{'|'.join(examples)}]", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(examples[choice](os.path.join(directory, "broker.db")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
