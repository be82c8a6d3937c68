"""Asynchronous replicas in parts around servers, in one process: what they learn, hold, keep and refuse."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from gpudbn import checkpoint, finetune, loop, pretrain
from gpudbn.dbn import DBN
from gpudbn.errors import NonFiniteError, UserError
from gpudbn.loop import Training, largest
from gpudbn.mpi import Plan, chosen, join, replica, roles
from gpudbn.mpi import simulate as simulate_module
from gpudbn.mpi.costs import Costs
from gpudbn.mpi.machine import Machine
from gpudbn.mpi.replica import Asynchronous
from gpudbn.mpi.server import Server
from gpudbn.mpi.virtual import run
from tests.helpers import assert_close, assert_notices
from tests.test_loop import small_data, small_settings, timeless


def settings(**changes):
    """A run so short that no sample that flips by rounding has been met."""
    return small_settings(mode="async", layers=(50, 37), epochs=1, finetune_epochs=2, initial_weights=0.3, up="mean",
                          learning_rate=0.02, n_push=2, n_fetch=4, **changes)


def simulated(program, s, replicas=1, **costs):
    """What ``program(exchange)`` returns on each part of each replica, in order, and the reports of the servers."""
    plan = replace(chosen(s, s.servers + replicas * s.shards), transport="staged")
    size = largest(s, small_data())

    def rank(wire):
        exchange = join(wire, plan, size)
        if isinstance(exchange, Server):
            return exchange.serve() | {"bytes": [store.end.layout.nbytes for store in exchange.stores]}
        found = program(exchange)
        exchange.close()
        return found

    found = run(Machine(plan.servers + replicas * s.shards, Costs(**costs)), rank)
    return found[plan.servers:], found[: plan.servers]


def trained(s, exchange, start=None, epochs=None, end=None):
    """Records and arrays of a run, that goes on from a checkpoint, or ends after some epochs with one."""
    one = Training(DBN([13, *s.layers], shards=exchange.shards, local=s.local), small_data(), s, exchange)
    if start:
        file = checkpoint.Reader(start, "checkpoint")
        one.restore(file.read(one.part), file.meta)
    records = list(itertools.islice(one.run(), epochs))
    state = one.state()
    if state and end:
        checkpoint.write(end, state[0], {**state[1], "kind": "checkpoint"})
    return records, one.dbn.arrays(), state is not None


# ---------------------------------------------------------------------------------------------- one and the same


def check_equality(shards, servers, **options):
    """One replica in parts, its servers fewer or more than these, comes to what a whole one with a server comes to."""
    s = settings(servers=servers, shards=shards, **options)
    (whole,), _ = simulated(partial(trained, replace(s, servers=1, shards=1)), replace(s, servers=1, shards=1))
    found, reports = simulated(partial(trained, s), s)
    for records, arrays, _ in found:
        for record, other in zip(records, whole[0], strict=True):
            for key in set(other) - {"seconds", "phase", "path", "push"}:
                assert_close(record[key], other[key], rtol=1e-4, atol=1e-6)
        for name, array in whole[1].items():
            assert_close(arrays[name], array, atol=2e-4)
    stores = [len(report["bytes"]) for report in reports]
    assert sum(stores) == servers + shards - np.gcd(servers, shards)
    turns = -(-7 // 2) + 2 * -(-6 // 2) + -(-7 // 2)  # of both layers and two epochs of fine-tuning
    for count, report in zip(stores, reports, strict=True):
        assert report["applied"] == [count * turns]
        assert report["version"] == count * turns


@pytest.mark.parametrize(("shards", "servers"), [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2)])
def test_a_replica_in_parts_learns_what_a_whole_one_does(shards, servers):
    check_equality(shards, servers)


@pytest.mark.parametrize("options", [
    # compensation asks servers for what has all changes in it; else it is a matter of time what a pull has
    {"server_rule": "adagrad", "server_rate": 0.02, "staleness": "compensate"},
    {"server_rule": "momentum", "staleness": "compensate"},
    {"push": "factored", "finetune_momentum": 0.0}, {"max_staleness": 0, "warm_start": 4},
    {"method": "pcd", "k": 2}, {"centring": "data"}, {"local": (0, 30)}, {"finetune": "autoencoder"}])
def test_whatever_servers_do_and_changes_are_like(options):
    check_equality(2, 3, **options)


# ------------------------------------------------------------------------------------- what all parts must have alike


def check_alike(shards=2, servers=3, replicas=3):
    """Where replicas come at odd times, servers have the visible biases in several versions: parts have one."""
    def program(exchange):
        part, seen = exchange.shards.index, []
        parameters = np.zeros(40, np.float32)
        shared = slice(7, 24)
        exchange.align = lambda: exchange.shards.first_(parameters[shared])
        exchange.begin(parameters)
        before = parameters.copy()
        for owner, number in exchange.turns(12):
            exchange.refresh(parameters, before)
            exchange.wire.compute(1e-3 * (1 + exchange.replica))
            parameters += np.float32(1 / (3 + owner + 5 * number))
            parameters[~np.isin(np.arange(40), range(7, 24))] += part  # what is a part's own
            exchange.exchange(parameters, before, fetch=number % 2 == 0)
            seen.append((owner, number, parameters[shared].tobytes()))
        exchange.meet(parameters)
        return seen, parameters

    s = settings(servers=servers, shards=shards)
    found, reports = simulated(program, s, replicas, node=1, jitter=0.5)
    for number, other in enumerate(found):
        assert other[0] == found[number // shards * shards][0], "other turns, or other values of what is shared"
    for part in range(shards):
        ends = [parameters for _, parameters in found[part::shards]]
        assert all(np.array_equal(end, ends[0]) for end in ends)
        assert_close(ends[0][30], part * 12 * replicas + ends[0][10], atol=1e-3)
    assert sum(sum(report["staleness"][1:]) for report in reports) > 0


def test_parts_have_alike_what_each_of_them_has():
    check_alike()


@pytest.mark.parametrize(("line", "fault"), [
    ("        if fetch:\n            self.align()\n", ""),
    ("        for link, part in self._places():\n            link.pull(parameters[part])",
     "        for link, part in self._places()[self.shards.index:]:\n            link.pull(parameters[part])"),
])
def test_parts_that_go_apart_are_noticed(line, fault):
    assert_notices(check_alike, replica, line, fault)


def check_phases(**options):
    """Three replicas, whose changes come in another order at each server; all kinds of phases."""
    s = replace(settings(servers=2, shards=2, **options), n_push=1, n_fetch=1, epochs=(3, 3))

    def program(exchange):
        one, give = Training(DBN([13, *s.layers], shards=exchange.shards, local=s.local), small_data(), s, exchange), []

        def look(parameters, before, fetch=True):
            Asynchronous.exchange(exchange, parameters, before, fetch)
            phase = one.phase
            if phase.layer is None:
                found = phase.net[f"c{phase.depth}"]
            else:
                rbm = one.dbn.layers[phase.layer]
                found = np.zeros(50, np.float32)  # where it is not here
                found[rbm.local.seen if rbm.local else slice(0, rbm.n)] = rbm.b
            give.append(found.copy())

        exchange.exchange = look
        list(one.run())
        return give

    found, _ = simulated(program, s, 3, node=1, jitter=0.5)
    for first, second in zip(found[::2], found[1::2], strict=True):
        for one, other in zip(first, second, strict=True):
            here = (one != 0) & (other != 0)
            assert here.any()
            assert np.array_equal(one[here], other[here])


@pytest.mark.parametrize(("module", "line", "fault", "options"), [
    (pretrain, "self.dbn.shards.first_(b)", "pass", {}),
    (pretrain, "local.gather(b[None, local.owned].copy(), b[None])", "pass", {"local": (0, 30)}),
    (finetune, 'self.shards.first_(self.parameters[self.net.offsets[f"c{len(self.dbn.layers)}"] :])', "pass", {}),
    (loop, "phase.factors, phase.align", "phase.factors, lambda: None", {}),
])
def test_a_phase_that_does_not_align_its_parts_is_noticed(module, line, fault, options):
    assert_notices(partial(check_phases, **options), module, line, fault)


# -------------------------------------------------------------------------------------------------- room and ends


def test_what_each_holds_falls_with_the_number_of_parts_and_of_servers():
    """float32 of windows and vectors: a server's shard published twice, and in a mailbox of each replica."""
    sizes = {}
    for shards, servers in ((1, 1), (2, 1), (3, 1), (3, 3), (2, 4)):
        s = settings(servers=servers, shards=shards)
        found, reports = simulated(lambda exchange: len(exchange.links), s, 2)
        assert sum(found) == 2 * (servers + shards - np.gcd(servers, shards))
        sizes[shards, servers] = largest(s, small_data()), max(sum(report["bytes"]) for report in reports)
    (most, window), slack = sizes[1, 1], 4096  # bytes of headers and labels
    for shards, (m, k) in {1: (50, 37), 2: (32, 32), 3: (32, 16)}.items():  # most units here: of 4 and 3 pieces
        assert sizes[shards, 1][0] == 13 * m + 50 * k + k * 3 + m + k + 3, "the network, with its classes"
    assert abs(window - 4 * 4 * most) < slack
    for (shards, servers), (part, room) in sizes.items():
        assert abs(room - 4 * 4 * part * shards / servers) < slack * shards, "one vector for each part, no more"


def test_a_run_in_parts_resumed_ends_with_the_bits_of_one_that_never_stopped(tmp_path):
    s = settings(servers=3, shards=2, server_rule="adagrad", server_rate=0.02, staleness="compensate", method="pcd")
    whole, _ = simulated(partial(trained, s), s)
    for epochs in (1, 3):
        path = tmp_path / f"{epochs}.safetensors"
        simulated(partial(trained, s, epochs=epochs, end=path), s)
        arrays, meta = checkpoint.read(path, "checkpoint")
        assert {"phase.server.squares#0", "phase.server.squares#1", "phase.server.squares"} & arrays.keys() == {
            "phase.server.squares#0", "phase.server.squares#1"}
        resumed, _ = simulated(partial(trained, s, start=path), s)
        for (_, found, _), (_, others, _) in zip(whole, resumed, strict=True):
            assert all(np.array_equal(found[name], others[name]) for name in found)
    arrays["phase.server.squares#1"][:] = 1
    checkpoint.write(path, arrays, meta)
    forgotten, _ = simulated(partial(trained, s, start=path), s)
    assert timeless(resumed[0][0]) == timeless(whole[0][0][3:]) != timeless(forgotten[0][0])


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_part_that_sends_nan_is_refused_with_its_replica(servers, bad, capsys):
    """Of two replicas; no part of it waits for another for ever, and the other one does all its turns."""
    def program(exchange):
        parameters = np.zeros(64, np.float32)
        exchange.begin(parameters)
        before = parameters.copy()
        try:
            for owner, number in exchange.turns(9):
                exchange.refresh(parameters, before)
                parameters += 1
                if (owner, number, exchange.shards.index) == (0, 4, bad) and exchange.replica == 0:
                    parameters[11] = np.nan
                exchange.exchange(parameters, before)
            exchange.meet(parameters)
        except NonFiniteError as error:
            return "left" if exchange.leave(str(error)) else "last"
        return parameters.tolist()

    found, reports = simulated(program, settings(servers=servers, shards=2), 2)
    assert found[:2] == ["left", "left"]
    # what one server has refused another may have applied: as a turn that is done, it is not done again
    assert found[2:] == [[18.0] * 64, [18.0 - bad] * 64]
    assert all(report["lost"] == [0] for report in reports)
    assert "1 of 2 replicas go on, with its rows" in capsys.readouterr().err


def test_nan_in_one_part_stops_all_of_them():
    s = settings(shards=2)

    def program(exchange):
        one = Training(DBN([13, *s.layers], shards=exchange.shards, local=s.local), small_data(), s, exchange)
        if exchange.shards.index == 1:
            one.flag[0] = 5
        with pytest.raises(NonFiniteError, match=r"^layer 1: parameters must .*got NaN or infinity by update 5"):
            list(one.run())
        assert not exchange.leave("alone")

    simulated(program, s)


def test_an_error_of_one_part_is_everyones_and_says_whose():
    said = []
    for whose in ((1, 1), (0, 0), None):
        def program(exchange, whose=whose):
            with pytest.raises(UserError) as error:
                exchange.agree("bad" if whose in (None, (exchange.replica, exchange.shards.index)) else None)
            said.append(str(error.value))
            raise error.value

        def rank(wire, program=program):
            exchange = join(wire, Plan("async", 2, servers=2), 100)
            with pytest.raises(UserError):
                exchange.serve() if isinstance(exchange, Server) else program(exchange)

        run(Machine(6, Costs()), rank)
    names = roles(6, 2, 2)
    assert said == [f"{names[5]} on : bad"] * 4 + [f"{names[2]} on : bad"] * 4 + ["bad"] * 4


def test_records_of_replicas_in_parts_are_the_same_on_all_parts():
    s = settings(servers=2, shards=2)
    found, _ = simulated(partial(trained, s), s, 2, jitter=0.3)
    for records, arrays, _ in found[1:]:
        assert timeless(records) == timeless(found[0][0])
        assert all(np.array_equal(arrays[name], array) for name, array in found[0][1].items())
    assert [saves for _, _, saves in found] == [True, False, False, False]


def test_a_simulation_in_parts_is_refused():
    with pytest.raises(UserError, match=r"--shards: must be 1 in a simulation, .*; got 2"):
        simulate_module.simulate(settings(shards=2), small_data(), replicas=2, costs=Costs())


