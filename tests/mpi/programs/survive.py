"""Asynchronous replicas of which some die, stop, send NaN or are slow: survive.py '{"kill": {"1": ["push", 9]}}'.

Every turn has a change of its own, of small whole numbers with their sum behind them, so that float32 adds exactly:
the server looks at the sum of every change it takes, replicas at that of whatever they read, and in the end
parameters are what each turn of each epoch comes to, applied once.

Options, as JSON; replicas by number, and in which of their turns:

    kill       {replica: [where, turn]}, in: compute, push (half of it is there), number (all but the number that says
               so), pull, meet (turn: which meeting), between (two servers), any (of the next 3 ms)
    stop       {replica: turn}: stops itself, to be woken 3 s later; and ``stopped_seconds``
    nan        {replica: turn}
    slow       {replica: seconds a turn}; the others take ``pace``
    server     kills itself: [which, after how many changes]
    epochs, each, size, servers
    parts, part  of a replica; and which of them is meant by all this, and has as many entries
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np

from gpudbn.errors import NonFiniteError, PartLostError
from gpudbn.mpi import Plan, connect, server
from gpudbn.mpi.replica import Link
from gpudbn.mpi.rules import Rule
from gpudbn.mpi.wire import Window, guarded

options = {"kill": {}, "stop": {}, "nan": {}, "slow": {}, "pace": 0.0, "server": None, "epochs": 3, "each": 12,
           "size": 1_600, "servers": 1, "parts": 1, "part": 0, "stopped_seconds": 0, **json.loads(sys.argv[1])}


def kill(signal_=signal.SIGKILL):
    os.kill(os.getpid(), signal_)
    time.sleep(10)


def change_of(epoch, turn, size, part, pieces):
    """Whole numbers 0 to 3, of a part of a replica; the last of each server's piece is the sum of the others."""
    change = np.random.default_rng([epoch, turn, part]).integers(0, 4, size).astype(np.float32)
    for piece in pieces:
        change[piece][-1] = change[piece][:-1].sum()
    return change


def whole(values, pieces):
    """Whether each piece, of a change or of what changes add up to, has its sum at its end."""
    return all(values[piece][:-1].sum(dtype=np.float64) == values[piece][-1] for piece in pieces)


class Counting(Rule):
    """Adds, and counts changes that are not whole."""

    def __init__(self):
        self.changes = self.torn = 0
        self.which, self.after = options["server"] or (None, 0)

    def __call__(self, parameters, change, staleness, replica=0):  # noqa: ARG002
        self.torn += not whole(change, [slice(None)])
        self.changes += 1
        if self.which == self.number and self.changes == self.after:
            kill()
        parameters += change


def arm(where, links):
    """The next time that this replica comes there, it dies."""
    put, get, push = Window.put, Window.get, Link.push

    def put_part(self, array, offset):
        layout = links[0].end.layout
        if where == "push" and array.nbytes > 1000:
            put(self, array[: array.size // 2], offset)
            kill()
        if where == "number" and offset == layout.sequence + 8 * links[0].replica:
            kill()
        put(self, array, offset)

    def get_part(self, array, offset):
        if where == "pull" and array.nbytes > 1000:
            get(self, array[: array.size // 2], offset)
            kill()
        get(self, array, offset)

    def push_one(self, *change):
        push(self, *change)
        if where == "between":
            self.end.drain()
            kill()

    Window.put, Window.get, Link.push = put_part, get_part, push_one
    if where == "any":
        threading.Timer(3e-3 * np.random.default_rng().random(), kill).start()


def train(exchange):
    """The epochs; what they took, and how many reads were torn."""
    part, size, each = exchange.shards.index, options["size"], options["each"]
    pieces = server.cuts(size, options["servers"], options["parts"], part)
    me = str(exchange.replica) if part == options["part"] else ""
    death, turn_of_death = options["kill"].get(me, (None, 0))
    parameters, done, torn, times = np.zeros(size, np.float32), 0, 0, []
    meetings, meet = iter(range(1000)), exchange._gather

    def gather(content=b"", tag=server.MEET):
        if death == "meet" and next(meetings) == turn_of_death:
            kill()
        return meet(content, tag)

    exchange._gather = gather
    exchange.begin(parameters)
    before = parameters.copy()
    for epoch in range(options["epochs"]):
        start = time.perf_counter()
        for owner, number in exchange.turns(each):
            if owner != exchange.replica:
                exchange.refresh(parameters, before)
            done += 1
            if done == turn_of_death and death not in (None, "meet"):
                if death == "compute":
                    kill()
                arm(death, exchange.links)
            if done == options["stop"].get(me):
                wake = f"sleep 3; kill -CONT {os.getpid()}"  # too late
                subprocess.Popen(["sh", "-c", wake], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                kill(signal.SIGSTOP)
            time.sleep(options["slow"].get(me, options["pace"]))
            parameters += change_of(epoch, owner * each + number, size, part, pieces)
            if done == options["nan"].get(me):
                parameters[5] = np.nan
            exchange.exchange(parameters, before, fetch=done % 2 == 0)
            torn += not whole(parameters, pieces)
        exchange.meet(parameters)
        before[:] = parameters
        times.append(time.perf_counter() - start)
        expected = sum(change_of(e, t, size, part, pieces) for e in range(epoch + 1)
                       for t in range(each * exchange.replicas))
        assert (parameters == expected).all(), f"epoch {epoch}: {np.flatnonzero(parameters != expected)[:9]}"
    return {"replica": exchange.replica, "part": part, "done": done, "torn": torn, "living": exchange.living,
            "chief": exchange.chief, "times": times, "pushes": exchange.report()["pushes"]}


def say(kind, values):
    sys.stdout.write(f"{kind} {json.dumps(values)}\n")  # in one piece
    sys.stdout.flush()


def main():
    plan = Plan("async", options["parts"], servers=options["servers"], rule=Counting,
                stopped_seconds=options["stopped_seconds"])
    exchange = connect(plan, options["size"])
    if isinstance(exchange, server.Server):
        rules = [store.rule for store in exchange.stores]
        for rule in rules:
            rule.number = exchange.world.rank
        say("server", exchange.serve() | {"torn": sum(rule.torn for rule in rules), "stores": len(rules)})
        return
    try:
        report = train(exchange)
    except (NonFiniteError, PartLostError) as error:
        if not exchange.leave(str(error)):
            raise
        report = {"replica": exchange.replica, "part": exchange.shards.index, "left": True}
    exchange.agree(None) if "left" not in report else None
    exchange.close()
    say("replica", report)


if __name__ == "__main__":
    sys.exit(guarded(main))
