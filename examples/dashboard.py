#!/usr/bin/env python3
"""A web page that shows the queues of a database live: for you, on this machine.

    python dashboard.py [-f FILE] [--port N]

Open the URL that it prints; Ctrl-C ends it. Each queue has its numbers, the age of its oldest ready message and a chart
of how many messages it had in the last minutes; QUEUE.dead, with the dead letters of QUEUE, says why the first failed.
Click a queue to see its first messages, to delete one, or to give dead letters another try.

Who has the URL can do all of that: its token is new at each start, and nothing is answered without it. The server
listens on 127.0.0.1 only; from another machine: ``ssh -L 8000:127.0.0.1:8000 HOST``, with ``--port 8000`` there.
One thread looks for all pages, at most twice a second; what came and went between two looks leaves no trace.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import secrets
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

# Find simplebroker.py beside this file or one directory above it. Not needed when it is installed.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(d) for d in (HERE, HERE.parent) if (d / "simplebroker.py").exists()]

from simplebroker import Broker, BrokerError, Queue, Stats  # noqa: E402

LOOK_S = 0.5  # between two looks, at least
REST = 9  # times as long as a look took, if that is more
STEP_S, STEPS = 2, 150  # a chart has at most one point in 2 s, and shows 5 minutes
PING_S = 15.0  # how often a page hears something when nothing changes
MESSAGES, CHARACTERS, LINES = 20, 2000, 500  # that are shown of a queue, of a body, of the table
DEAD, NONE = ".dead", Stats(0, 0, 0, None)


class Board:
    """What all pages show. One thread looks at the database and replaces it; a thread for each page waits for that."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.shown: tuple[dict[str, Any], str] = {}, "not looked yet"  # the queues, and what went wrong
        self._replaced = threading.Condition()  # guards ``shown``, whose rows nobody changes

    def run(self) -> None:
        """Look after each change, and about once a second without: leases and delays end by themselves."""
        with self.broker.waiter() as waiter:  # as wait_for_change() in a loop, but a change between two waits counts
            while True:
                begin = time.monotonic()
                self.look(int(time.time() // STEP_S))
                time.sleep(max(LOOK_S, REST * (time.monotonic() - begin)))
                waiter.wait()

    def look(self, step: int) -> None:
        """Count the messages of all queues, and wake the pages if something is different."""
        rows, error = self.shown[0], ""
        try:
            queues = self.broker.queues()
            rows = {name: self._row(name, queues.get(name, NONE), step) for name in {**rows, **queues}}
        except BrokerError as problem:
            error = str(problem)
        # A queue whose last message has gone is shown until its chart is empty.
        rows = {name: row for name, row in rows.items() if row["stats"].total or row["points"][-1][0] > step - STEPS}
        if (rows, error) != self.shown:
            with self._replaced:
                self.shown = rows, error
                self._replaced.notify_all()

    def _row(self, name: str, stats: Stats, step: int) -> dict[str, Any]:
        """What the pages get of a queue. A point of its chart: (step, how many messages from then on)."""
        old: dict[str, Any] = self.shown[0].get(name, {"stats": None, "points": []})
        if old["stats"] == stats:
            return old
        first = self.broker.queue(name).peek() if name.endswith(DEAD) else None
        points = [*(point for point in old["points"] if point[0] < step), (step, stats.total)][-STEPS:]
        return {"stats": stats, "reason": first.reason if first else None, "points": points}

    def wait(self, seen: object) -> tuple[dict[str, Any], str]:
        """What is shown, as soon as it is not what was seen; after a while the same again."""
        with self._replaced:
            self._replaced.wait_for(lambda: self.shown is not seen, PING_S)
            return self.shown


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    board: Board  # main() sets these three
    token: str
    hosts: tuple[str, ...]
    timeout = 2 * PING_S  # of a page that does not take what is sent

    def parse_request(self) -> bool:
        """Refuse every request, whatever it wants, that has not the token or is meant for another host.

        (A name of theirs that leads to 127.0.0.1 is how foreign web pages get round the rules of browsers.)
        """
        if not super().parse_request():
            return False
        self.path, _, query = self.path.partition("?")
        self.values = dict(parse_qsl(query))
        right = secrets.compare_digest(self.values.get("token", "").encode(), self.token.encode())
        if right and self.headers["Host"] in self.hosts:
            return True
        self.send_error(403)
        return False

    def do_GET(self) -> None:
        """Call the method that the verb and the path mean. What it returns is sent as JSON."""
        try:
            result = METHODS.get(f"{self.command} {self.path}", lambda handler: handler.send_error(404))(self)
            if result is not None:
                self.reply("application/json", json.dumps(result))
        except (BrokerError, ValueError) as error:
            self.reply("text/plain", str(error), 400)
        except OSError:  # the page was closed
            pass

    do_POST = do_GET

    def events(self) -> None:
        """All queues, then those that have changed (null: not shown any more), until the page is closed."""
        self.reply("text/event-stream", "")
        seen: object = None
        before: dict[str, Any] = {}
        while True:
            seen = rows, error = self.board.wait(seen)
            changed = [(name, rows.get(name)) for name in {**before, **rows} if rows.get(name) is not before.get(name)]
            news = {"time": time.time(), "path": self.board.broker.path, "error": error, "queues": changed}
            self.wfile.write(f"data: {json.dumps(news)}\n\n".encode())
            before = rows

    def queue(self) -> Queue:
        """The queue that the request names."""
        return self.board.broker.queue(self.values.get("queue", ""))

    def messages(self) -> list[dict[str, Any]]:
        """The first messages of the queue, held ones too. Ids are text: JavaScript's numbers have 16 digits."""
        return [
            {"id": str(each.id), "due": each.due, "state": each.state, "attempt": each.attempt, "reason": each.reason,
             "body": each[:CHARACTERS], "cut": max(0, len(each) - CHARACTERS)}
            for each in islice(self.queue().peek_all(held=True), MESSAGES)
        ]  # fmt: skip

    def requeue(self) -> int:
        """Move one dead letter, or all that are ready, back to the queue."""
        return self.queue().requeue(message_id=self.values.get("id"))

    def delete(self) -> int:
        """Delete one message of the queue. (Without an id it would be all: "" is an error.)"""
        return self.queue().delete(message_id=self.values.get("id", ""))

    def reply(self, kind: str, text: str, status: int = 200) -> None:
        """Send headers and a text. No answer may be kept, framed or mistaken, and only the script of PAGE runs."""
        self.send_response(status)
        self.send_header("Content-Type", kind + "; charset=utf-8")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Log nothing: the lines would show the token."""


METHODS: dict[str, Any] = {
    "GET /": lambda handler: handler.reply("text/html", PAGE),
    "GET /events": Handler.events, "GET /messages": Handler.messages,
    "POST /requeue": Handler.requeue, "POST /delete": Handler.delete,
}  # fmt: skip

STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  --ink: light-dark(#1b1f24, #e6edf3); --dim: light-dark(#59636e, #9da7b1); --line: light-dark(#d1d9e0, #3a424c);
  --paper: light-dark(#fff, #0f1318); --blue: light-dark(#0b62c4, #6cb0ff); --red: light-dark(#b3261e, #ff8f87); }
body { margin: 0 auto; padding: 0 1rem; max-width: 72rem; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
h1, h2, p { margin: .3rem 0; font-size: 1rem; } p { flex: 1 1 16rem; }
button, input, select, dialog { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--dim);
  border-radius: 6px; min-height: 2.4rem; }
:focus-visible { outline: 3px solid var(--blue); outline-offset: 0; }
#bar { position: sticky; top: 0; padding: .4rem 0; background: var(--paper); border-bottom: 1px solid var(--line);
  display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; }
table, thead, tbody { display: block; }
tr { display: grid; grid-template-columns: 1fr 4.5rem 4.5rem 4.5rem 6.5rem 16rem; gap: .2rem .8rem; align-items: center;
  content-visibility: auto; contain-intrinsic-size: auto 3rem; padding: .25rem; }
tr, li { border-bottom: 1px solid var(--line); }
th, td { padding: 0; text-align: right; font-weight: normal; } th:first-child, th:last-child { text-align: left; }
thead, small, .about { color: var(--dim); } .reason { color: var(--red); }
.name { border: 0; padding: 0; text-align: left; font-weight: 600; text-decoration: underline; }
.chart { display: flex; align-items: center; gap: .5rem; text-align: left; }
svg { flex: 1; width: 1rem; height: 2rem; border-bottom: 1px solid var(--line); } .peak { width: 5.5rem; }
path { fill: var(--blue); fill-opacity: .25; stroke: var(--blue); vector-effect: non-scaling-stroke; }
dialog { width: min(48rem, 100% - 1rem); box-sizing: border-box; } ::backdrop { background: #0006; }
ul { padding: 0; } li { display: block; padding: .5rem 0; } pre { max-height: 18rem; overflow: auto; }
pre { white-space: pre-wrap; margin: .4rem 0; padding: .4rem; border: 1px solid var(--line); }
@media (min-width: 46rem) { td > small { display: none; } }
@media (max-width: 46rem) { thead { display: none; } td { text-align: left; } small { display: block; }
  tr { grid-template-columns: repeat(4, 1fr); } th, td:last-child { grid-column: 1 / -1; } }
"""

BODY = f"""
<div id="bar"><h1>SimpleBroker</h1><span id="state" role="status">connecting</span><p id="total"></p>
<label>Filter <input id="filter" type="search" size="10"></label> <label>Sort <select id="sort">
<option value="name">by name<option value="ready">most ready<option value="oldest">oldest</select></label></div>
<table><thead><tr><th scope="col">Queue<th scope="col">Ready<th scope="col">Leased<th scope="col">Delayed
<th scope="col">Oldest ready<th scope="col">Messages in {STEP_S * STEPS // 60} minutes</thead><tbody></tbody></table>
<template id="row"><tr><th scope="row"><button class="name"></button> <span class="reason"></span></th>
<td><span class="ready"></span><small>ready</small><td><span class="leased"></span><small>leased</small>
<td><span class="delayed"></span><small>delayed</small><td><span class="age"></span><small>oldest</small>
<td><div class="chart"><svg viewBox="0 0 {STEPS} 40" preserveAspectRatio="none" aria-hidden="true"><path/></svg>
<small class="peak"></small></div></template>
<dialog id="view" aria-labelledby="title"><h2 id="title"></h2><p id="numbers"></p><button id="close">Close</button>
<button id="again">Refresh</button> <button id="all"></button><p id="said" role="status"></p><ul></ul></dialog>
<template id="message"><li><span class="about"></span><div class="reason"></div><pre></pre><p class="cut"></p>
<button class="requeue">Requeue</button> <button class="delete">Delete</button></template>
<dialog id="ask" aria-labelledby="question"><form method="dialog"><p id="question"></p>
<button autofocus>Cancel</button> <button id="yes" value="yes"></button></form></dialog>
"""

SCRIPT = f'const STEP_S = {STEP_S}, STEPS = {STEPS}, MESSAGES = {MESSAGES}, LINES = {LINES}, DEAD = "{DEAD}";' + r"""
const token = new URLSearchParams(location.search).get("token");
const rows = new Map();  // name -> what the server says of a queue, and its line of the table
let source, fresh, ahead = 0, open = "";  // ahead: this clock against the server's, ms; open: the queue looked into
const $ = (selector, root = document) => root.querySelector(selector);
const copy = (template) => $(template).content.firstElementChild.cloneNode(true);
const now = () => Date.now() - ahead;
const isDead = (name) => name.endsWith(DEAD);
const owner = (name) => isDead(name) ? name.slice(0, -DEAD.length) : name;

function fill(root, texts) {  // how every text gets into the page
  for (const [selector, text] of Object.entries(texts))
    if ($(selector, root).textContent !== String(text)) $(selector, root).textContent = text;
}

function span(ms) {
  const seconds = Math.max(0, Math.round(ms / 1000));
  const [unit, size] = [["d", 86400], ["h", 3600], ["min", 60]].find(([, size]) => seconds >= 2 * size) || ["s", 1];
  return `${Math.floor(seconds / size)} ${unit}`;
}

function connect() {
  source = new EventSource("events?token=" + token);
  source.onopen = () => { fresh = true; };
  source.onerror = () => fill(document, {"#state": "no connection: does dashboard.py run, and is this its URL?"});
  source.onmessage = (event) => hear(JSON.parse(event.data));
}

function hear({time, path, error, queues}) {
  ahead = Date.now() - time * 1000;
  const told = new Map(queues);
  for (const name of rows.keys()) if (fresh && !told.has(name)) rows.delete(name);
  for (const [name, row] of told) row ? update(name, row) : rows.delete(name);
  fresh = false;
  document.title = path + " - SimpleBroker";
  fill(document, {"#state": error || "live"});
  show();
}

function update(name, {stats: [ready, leased, delayed, oldest], reason, points}) {
  const row = rows.get(name) || {name, key: owner(name) + "\0" + isDead(name), tr: copy("#row")};
  rows.set(name, Object.assign(row, {ready, leased, delayed, oldest, reason, points, total: ready + leased + delayed}));
  $(".name", row.tr).onclick = () => look(name).then(() => $("#view").showModal());
}

function show() {
  const all = [...rows.values()], words = $("#filter").value.toLowerCase(), focused = document.activeElement;
  const order = {name: () => 0, ready: (row) => -row.ready, oldest: (row) => row.oldest || Infinity}[$("#sort").value];
  const found = all.filter((row) => row.name.toLowerCase().includes(words))
    .sort((a, b) => order(a) - order(b) || (a.key < b.key ? -1 : 1)).slice(0, LINES);
  const lines = $("tbody").children;
  if (found.length !== lines.length || found.some((row, at) => row.tr !== lines[at])) {
    $("tbody").replaceChildren(...found.map((row) => row.tr));
    if (focused.isConnected) focused.focus({preventScroll: true});
  }
  found.forEach(paint);
  const sum = (some) => some.reduce((sum, row) => sum + row.total, 0), dead = all.filter((row) => isDead(row.name));
  const {ready = 0, leased = 0, delayed = 0} = rows.get(open) || {};
  fill(document, {"#numbers": `${ready} ready, ${leased} leased, ${delayed} delayed. The first ${MESSAGES}, at most:`,
    "#total": `${all.filter((row) => row.total).length} queues, ${sum(all)} messages, ${sum(dead)} of them dead letters`
      + (found.length < all.length ? `; ${found.length} queues shown` : "")});
}

function paint({tr, name, ready, leased, delayed, oldest, reason, points}) {
  const first = Math.floor(now() / 1000 / STEP_S) - STEPS, x = (step) => Math.max(0, step - first);
  const seen = points.filter((_, at) => at + 1 === points.length || points[at + 1][0] > first);
  const peak = Math.max(...seen.map(([, depth]) => depth)), y = (depth) => 40 - 38 * depth / (peak || 1);
  const line = seen.map(([step, depth]) => `H${x(step)}V${y(depth)}`).join("");
  $("path", tr).setAttribute("d", `M${x(seen[0][0])} 40${line}H${STEPS}V40Z`);
  fill(tr, {".name": name, ".ready": ready, ".leased": leased, ".delayed": delayed, ".peak": `max ${peak}`,
    ".age": oldest ? span(now() - oldest / 1e6) : "-",
    ".reason": isDead(name) ? "dead letters" + (reason ? ", the first: " + reason : "") : ""});
}

async function call(method, path, values) {
  const answer = await fetch(`${path}?${new URLSearchParams({token, ...values})}`, {method});
  return answer.ok ? answer.json() : Promise.reject(new Error(await answer.text()));
}

async function look(name, said = "") {
  open = name;
  const messages = await call("GET", "messages", {queue: name}).catch((error) => { said = error.message; return []; });
  fill(document, {"#title": name, "#said": said, "#all": `Requeue all to ${owner(name)}`});
  $("#all").hidden = !isDead(name);
  $("ul").replaceChildren(...messages.map(item));
  show();
}

function item({id, due, state, attempt, reason, body, cut}) {
  const li = copy("#message"), back = owner(open);
  fill(li, {pre: body, ".reason": reason ? "why it failed: " + reason : "", ".cut": cut ? `${cut} more characters` : "",
    ".about": `${id}, written ${span(now() - id / 1e6)} ago, ${state}`
      + (due ? ` for ${span(due / 1e6 - now())}` : "") + (attempt ? `, attempt ${attempt}` : "")});
  $(".requeue", li).hidden = !isDead(open) || state !== "ready";
  $(".requeue", li).onclick = () => change("requeue", {queue: back, id}, `Requeue message ${id} to ${back}?`);
  $(".delete", li).onclick = () => change("delete", {queue: open, id}, `Delete message ${id} (${state}) of ${open}?`);
  return li;
}

async function change(path, values, question) {
  fill(document, {"#question": question, "#yes": question.split(" ")[0]});
  $("#ask").returnValue = "";
  $("#ask").showModal();
  do await new Promise((closed) => { $("#ask").onclose = closed; }); while ($("#ask").open);  // else of a dialog before
  if ($("#ask").returnValue !== "yes") return;
  await look(open, await call("POST", path, values).then((count) => `${path}d: ${count}`, (error) => error.message));
  $("#again").focus();
}

$("#all").onclick = () => change("requeue", {queue: owner(open)}, `Requeue all that is ready in ${open}?`);
$("#again").onclick = () => look(open);
$("#close").onclick = () => $("#view").close();
$("#filter").oninput = $("#sort").onchange = show;
document.onvisibilitychange = () => { source.close(); if (!document.hidden) connect(); };
setInterval(show, 1000);
connect();
"""

PAGE: str = f"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>SimpleBroker</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>{STYLE}</style>{BODY}
<script type="module">{SCRIPT}</script></html>"""
ALLOWED = ["'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (SCRIPT, STYLE)]
POLICY = f"""default-src 'none'; script-src {ALLOWED[0]}'; style-src {ALLOWED[1]}'; connect-src 'self'; img-src data:; \
base-uri 'none'; form-action 'none'; frame-ancestors 'none'"""


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Show the queues of a database on a web page of this machine.")
    parser.add_argument("-f", "--file", help="the database, or a postgresql:// URL; default: as the broker command")
    parser.add_argument("--port", type=int, default=0, help="default: any that is free")
    options = parser.parse_args()
    try:
        broker = Broker(options.file)
        if not broker.exists():
            parser.error(f"no database at {broker.path}: write a message first")
        Handler.board, Handler.token = Board(broker), secrets.token_urlsafe()
        broker.queues()  # a file of something else is an error here
        server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
        Handler.hosts = (f"127.0.0.1:{server.server_port}", f"localhost:{server.server_port}")
        threading.Thread(target=Handler.board.run, daemon=True).start()
        print(f"http://127.0.0.1:{server.server_port}/?token={Handler.token}", flush=True)
        server.serve_forever()
    except (BrokerError, OSError, OverflowError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
