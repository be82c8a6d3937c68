"""Whole runs in virtual time: the same each time, the bits of the real thing, and seconds that add up."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from gpudbn import load, loop
from gpudbn import simulate as command
from gpudbn.errors import NonFiniteError, UserError
from gpudbn.mpi import calibrate, virtual
from gpudbn.mpi import simulate as simulate_module
from gpudbn.mpi.costs import Compute, Costs, Hop
from gpudbn.mpi.simulate import simulate
from gpudbn.runs import Run
from gpudbn.settings import Settings, from_toml
from tests.helpers import assert_close, assert_notices
from tests.mpi import job
from tests.test_loop import small_data, small_settings, timeless, training

LAYER = Compute(update=(2e-3, 1e-4), sums=(1e-3, 1e-4), step=(5e-4, 0.0), measure=(0.0, 1e-5))
TUNING = Compute(update=(4e-3, 2e-4), sums=(3e-3, 2e-4), step=(1e-3, 0.0), measure=(0.0, 1e-5))
COSTS = {"phases": (LAYER, LAYER, TUNING)}


def simulated(replicas, costs=None, **changes):
    settings = small_settings(**changes)
    phases = [LAYER] * len(settings.layers) + [TUNING] * (settings.finetune_epochs > 0)
    return simulate(settings, small_data(), replicas=replicas, costs=Costs(phases=tuple(phases), **(costs or {})))


def assert_same(a, b):
    """The same bits in two models."""
    for name, array in a.arrays().items():
        assert np.array_equal(array, b.arrays()[name]), name


@pytest.mark.parametrize("settings", [
    {}, {"servers": 2, "n_fetch": 8, "server_rule": "adagrad"}, {"push": "factored"}, {"staleness": "compensate"},
    {"overlap": "on", "n_fetch": 8}, {"max_staleness": 2, "warm_start": 8, "n_push": 1, "n_fetch": 1},
    {"mode": "local"}, {"mode": "sync"}])
def test_a_run_is_the_same_each_time(settings):
    costs = {"jitter": 0.3, "node": 2}
    first, second = simulated(3, costs, **settings), simulated(3, costs, **settings)
    assert first.records == second.records
    assert first.replicas == second.replicas
    assert first.servers == second.servers
    assert_same(first.dbn, second.dbn)
    assert simulated(3, costs, **settings, seed=2).seconds != first.seconds
    assert simulated(3, {"node": 2}, **settings).seconds != first.seconds


def test_a_fixed_order_gives_the_bits_of_a_single_process():
    settings = {"order": "fixed", "method": "pcd"}
    alone = training(small_settings(**settings))
    records = list(alone.run())
    found = simulated(3, mode="sync", **settings)
    assert timeless(found.records) == timeless(records)
    assert_same(found.dbn, alone.dbn)


@pytest.mark.mpi
def test_one_asynchronous_replica_has_the_bits_of_the_real_one(tmp_path):
    from gpudbn.data import load as load_data

    options = {"layers": (20, 12), "epochs": 2, "batch": 40, "finetune_epochs": 3, "n_fetch": 8, "precision": "fp32"}
    words = [word for name, value in options.items()
             for word in ("--" + name.replace("_", "-"), *(value if isinstance(value, tuple) else [value]))]
    done = job.finish(job.start(2, "-m", "gpudbn.train", *words, "--plots", "off", "--out", tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    found = simulate(Settings(**options), load_data("digits", quiet=True, seed=1), replicas=1, costs=Costs(**COSTS))
    assert_same(found.dbn, load(tmp_path / "run"))


def test_replicas_with_the_same_rows_share_their_order(monkeypatch):
    made = []

    def permutation(count, **address):
        made.append((count, address["update"], address["row"]))
        return loop_permutation(count, **address)

    loop_permutation = loop.permutation
    monkeypatch.setattr(loop, "permutation", permutation)
    simulated(3, mode="sync", finetune_patience=0)
    assert len(made) == 3 + 3 + 4, "one an epoch"
    made.clear()
    simulated(3, mode="local", finetune_patience=0)
    assert len(made) == 3 * (3 + 3 + 4), "each its own"


def check_seconds():
    """A single process: 51 rows in 7 updates of 8 rows at most, then 51 and 10 rows measured; twice 3 epochs. Then
    at most 4 epochs of 6 updates of 10 rows."""
    alone = simulated(1, mode="sync", epochs=(3, 3), finetune_patience=0)
    layer = 7 * 2e-3 + 51e-4 + 61e-5
    tuning = 6 * 4e-3 + 51 * 2e-4 + 61e-5
    seconds = [r["seconds"] for r in alone.records]
    assert_close(seconds[:6], np.arange(1, 7) * layer, atol=6e-4)  # rounded to milliseconds
    assert_close(seconds[6:10], 6 * layer + np.arange(1, 5) * tuning, atol=6e-4)
    measured = (6 + 4) * 61e-5
    assert_close(alone.replicas[0]["seconds"]["measuring"], measured, atol=1e-6)
    assert_close(alone.replicas[0]["seconds"]["computing"], 6 * layer + 4 * tuning - measured, atol=1e-6)


def check_synchronous_seconds():
    """Of each batch of 8 rows three replicas take 2, 3 and 3, of the last 3 rows one each, and wait for the longest."""
    free = dict.fromkeys(("copy", "message", "apply", "exchange"), Hop(0.0, np.inf)) | {"oversleep": 0.0}
    found = simulated(3, free, mode="sync", epochs=1, finetune_epochs=0)
    layer = 7 * (1e-3 + 5e-4) + 6 * 3e-4 + 1e-4 + 61e-5
    assert_close(found.records[0]["seconds"], layer, atol=9 * 1e-3)  # each wait ends with a pause of 1 ms at most
    assert found.records[0]["seconds"] >= round(layer, 3)


def check_crowded_seconds():
    """Two replicas on two cores, 26 rows each, in 4 updates of 8 at most or 3 of 10; then one measures 52 rows, the
    other 10. Each phase is slowed by its own crowding, or else by that of the costs."""
    free = dict.fromkeys(("copy", "message", "apply", "exchange"), Hop(0.0, np.inf)) | {"oversleep": 0.0}
    long = Compute(update=(0.2, 0.01), sums=(0.1, 0.01), step=(0.05, 0.0), measure=(0.0, 1e-3))
    phases = (replace(long, crowding=0.25), long, replace(long, crowding=0.0))
    found = simulate(small_settings(mode="local", epochs=1, finetune_epochs=1), small_data(72), replicas=2,
                     costs=Costs(phases=phases, crowding=0.5, cores=2, **free))
    ends = [r["seconds"] for r in found.records[:3]]
    layers = [(4 * 0.2 + 0.26) * (1 + slower) + 0.052 + 0.01 * slower for slower in (0.25, 0.5)]
    assert_close(np.diff(ends, prepend=0.0), [*layers, 3 * 0.2 + 0.26 + 0.052], atol=9e-3)  # pauses of 1 ms at most


@pytest.mark.parametrize(("check", "line", "fault"), [
    (check_seconds, "self._inside = True", "pass"),
    (check_seconds, "len(rows if name", "len(rows[:1] if name"),
    (check_synchronous_seconds, 'rows if name == "step"', '99 if name == "sums"'),
    (check_crowded_seconds, "costs.crowding)", "None)"),
])
def test_seconds_are_those_of_the_costs(check, line, fault):
    assert_notices(check, simulate_module, line, fault)


def test_everything_is_counted():
    found = simulated(5, {"node": 3, "cores": 2}, servers=2, n_push=2, n_fetch=4, finetune_patience=0)
    pushes = found.replicas[0]["pushes"]
    assert pushes == 6 + 4  # an epoch of 11 rows is two updates
    for server in found.servers:
        assert server["applied"] == [pushes] * 5
        assert sum(server["staleness"]) == server["version"] == 5 * pushes
        assert server["asked"] == 0
    for replica in found.replicas:
        assert sum(replica["seconds"].values()) <= found.seconds + 1e-5  # rounded to microseconds
        assert replica["bytes"]["sent"] > pushes * 4 * 13 * 11  # weights of the first layer
        assert replica["seconds"]["computing"] > 0.5 * found.seconds
    assert [r["phase"] for r in found.records].count("finetune") == 4


def test_the_turns_of_a_straggler_are_done_by_others():
    """Two replicas and a fifth of one do what three did: at best in 3 / 2.2 of the time."""
    even, found = simulated(3, n_push=1, n_fetch=1), simulated(3, {"slow": (1, 1, 1, 5)}, n_push=1, n_fetch=1)
    assert even.seconds * 3 / 2.2 < found.seconds < 2.5 * even.seconds
    assert [r["pushes"] for r in even.replicas] == [24] * 3
    assert found.replicas[2]["pushes"] < 12
    assert sum(found.servers[0]["applied"]) == 72


def check_servers_on_another_node():
    """Over a network as quick as a node's memory a run takes about as long: waits end when something has changed."""
    quick = {"copy": Hop(1e-6, 1e10), "message": Hop(1e-6, 1e10), "network": Hop(1e-6, 1e10)}
    together, apart = (simulated(6, quick | {"node": node}, servers=2, n_push=1, n_fetch=1) for node in (0, 4))
    assert_close(apart.seconds, together.seconds, rtol=0.05)


def test_a_wait_for_another_node_ends_as_soon_as_one_within():
    assert_notices(check_servers_on_another_node, virtual, "fiber.looks", "self.machine.running.looks")


def test_who_watches_takes_no_time_and_may_end_it():
    costs, seen = Costs(phases=(LAYER, LAYER, TUNING)), []

    def watch(training):
        training.phase.measure(training.data.test, np.arange(9))
        seen.append((training.exchange.clock(), training.index, float(training.phase.parameters.sum())))
        return ends_at is not None and len(seen) == ends_at

    ends_at = None
    whole = simulate(small_settings(), small_data(), replicas=3, costs=costs, watch=watch)
    assert whole.records == simulated(3).records
    assert len(seen) == whole.replicas[0]["pushes"]
    assert [index for _, index, _ in seen] == sorted(index for _, index, _ in seen)
    every, seen, ends_at = seen, [], 7
    part = simulate(small_settings(), small_data(), replicas=3, costs=costs, watch=watch)
    assert seen == every[:7]
    assert part.seconds == seen[-1][0]
    assert part.replicas[0]["pushes"] == 7
    assert 15 < part.servers[0]["version"] <= 21 < whole.servers[0]["version"]
    assert part.dbn is not None


def test_a_slow_network_to_one_server_is_shared_out():
    """Twice the servers on nodes of their own, half the time in the queue for their links."""
    slow = {"node": 1, "network": Hop(1e-4, 2e6)}
    one, two = (simulated(4, slow, servers=servers, layers=(600,), finetune_epochs=0) for servers in (1, 2))
    assert 0.4 * one.seconds < two.seconds < 0.7 * one.seconds


def test_an_exchange_beside_the_computation_is_not_waited_for():
    """A push and a pull take some 4 ms, two updates of 8 rows 5.6 ms."""
    costs = Costs(phases=(LAYER,), node=1, network=Hop(1e-4, 2e7), cores=2)
    after, beside = (simulate(small_settings(layers=(500,), epochs=2, finetune_epochs=0, n_push=2, n_fetch=2,
                                             overlap=overlap), small_data(400), replicas=2, costs=costs)
                     for overlap in ("off", "on"))
    moving = [[r["seconds"]["transferring"] + r["seconds"]["waiting"] for r in found.replicas]
              for found in (after, beside)]
    assert max(moving[1]) < 0.5 * min(moving[0])
    assert beside.seconds < 0.8 * after.seconds
    assert all(r["beside"]["transferring"] > 0.01 for r in beside.replicas)


def test_errors_of_ranks_come_out():
    with pytest.raises(NonFiniteError, match="layer 1"):
        simulated(2, learning_rate=1e30, decay=1e-3)
    with pytest.raises(UserError, match="costs: must have 2 phases, as the run has; got 3"):
        simulate(small_settings(layers=(11,)), small_data(), replicas=2, costs=Costs(**COSTS))
    with pytest.raises(UserError, match="--order: must be fast with --mode async"):
        simulated(2, order="fixed")


def test_costs_are_written_and_read(tmp_path):
    crowded = Compute(update=(2e-3, 1e-4), sums=(1e-3, 1e-4), step=(5e-4, 0.0), measure=(0.0, 1e-5), crowding=0.75)
    costs = Costs(phases=(LAYER, crowded), network=Hop(1e-6, 2.5e9), node=8, cores=16, crowding=0.125, slow=(1.0, 2.5))
    file = tmp_path / "costs.toml"
    file.write_text(costs.to_toml())
    assert Costs.read(file)[0] == costs
    file.write_text("node = 4\nnetwork = {latency = 1e-4, bandwidth = 1e8}\n")
    assert Costs.read(file) == (Costs(node=4, network=Hop(1e-4, 1e8)), ("node", "network"))


@pytest.mark.parametrize(("text", "message"), [
    ("nodes = 4", "nodes"),
    ("node = -1", "number from 0 on"),
    ("node = '1'", "number from 0 on"),
    ("network = {latency = 1}", "bandwidth"),
    ("phases = [{update = [1, 2]}]", "missing"),
    ("phases = [{update = 1}]", "must hold costs"),
    ("phases = [{update = [1, 2], sums = [1, 2], step = [1, 2], measure = [1]}]", "must hold costs"),
    ("phases = [{update = [1, 2], crowding = [1]}]", "number from 0 on"),
    ("node = ", "must be TOML"),
])
def test_costs_that_are_none_are_refused(text, message, tmp_path):
    file = tmp_path / "costs.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        Costs.read(file)
    with pytest.raises(UserError, match="can be read"):
        Costs.read(tmp_path / "none.toml")


@pytest.fixture
def costs_file(tmp_path):
    file = tmp_path / "costs.toml"
    file.write_text(Costs(**COSTS, node=2).to_toml())
    return file


def test_the_command_leaves_a_run_folder(costs_file, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--layers", "20", "12", "--epochs", "1", "--finetune-epochs", "2", "--servers", "2"]
    assert command.main([*options, "--replicas", "3", "--costs", str(costs_file), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    records = Run(out).records()
    assert [r["phase"] for r in records] == ["pretrain", "pretrain", "finetune", "finetune", "test", "report"]
    assert f"error {records[4]['error']:.4g}" in said
    assert "server 1 is busy" in said
    ranks = records[5]["ranks"]
    assert [r["role"] for r in ranks] == ["server"] * 2 + ["replica"] * 3
    assert [r["host"] for r in ranks] == ["node 0", "node 0", "node 1", "node 1", "node 2"]
    assert sum(ranks[1]["staleness"]) == 3 * ranks[2]["pushes"]
    assert {file.stem for file in (out / "plots").iterdir()} == {"timeline", "staleness"}
    assert Costs.read(out / "costs.toml")[0] == Costs(**COSTS, node=2)
    assert load(out).predict(np.zeros((2, 64))).shape == (2,)


@pytest.mark.parametrize(("options", "message"), [
    (["--replicas", "0"], "--replicas: must be at least 1; got 0"),
    (["--replicas", "many"], "--replicas: must be at least 1; got many"),
    (["--device", "gpu"], "--device: must be cpu"),
    (["--resume", "x"], "--resume: must not be given"),
    (["--replica", "2"], "Did you mean --replicas?"),
    (["--mode", "async", "--order", "fixed"], "--order: must be fast"),
    (["--layers", "5"], "costs: must have 2 phases"),
])
def test_what_is_wrong_is_said_in_one_line(options, message, costs_file, tmp_path, capsys):
    rest = [] if "--resume" in options else ["--costs", str(costs_file), "--out", str(tmp_path / "run")]
    assert command.main([*options, *rest]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_line_through_two_measurements():
    assert calibrate.line((10, 3.0), (30, 7.0)) == (1.0, 0.2)
    assert calibrate.line((10, 7.0), (30, 3.0)) == (3.0, 0.0)  # noise: no row takes less than nothing
    assert calibrate.line((0, 0.0), (10, 4.0)) == (0.0, 0.4)
    assert calibrate.line((8, 2.0), (8, 2.0)) == (2.0, 0.0)


def test_how_far_cores_are_apart_is_not_what_slows_them_all():
    random = np.random.default_rng(1)
    slots = np.exp(0.3 * random.standard_normal((2000, 3)) + random.standard_normal((2000, 1)))
    assert calibrate.apart(slots.tolist()) == pytest.approx(0.3, rel=0.05)


def test_a_bench_times_the_phases_of_the_run(monkeypatch):
    monkeypatch.setattr(calibrate, "SLOT", 0)
    bench = calibrate.Bench(small_settings(data="digits", batch=200))
    assert bench.training.phases == 3
    for index, batch in ((0, 200), (1, 200), (2, 10), (0, 200)):
        for what, part in calibrate.ASKED:
            found = bench.times(index, what, part)
            assert found.rows == (250 if what == "measure" else batch) // part
            assert 0 < found.seconds < 1
            assert 0 < found.share < 1.1


def test_a_bench_for_a_batch_optimiser(monkeypatch):
    monkeypatch.setattr(calibrate, "SLOT", 0)
    bench = calibrate.Bench(small_settings(data="digits", layers=(5,), optimiser="cg", finetune_batch=5000))
    assert 0 < bench.times(1, "sums", 1).seconds < 1


class Invented(calibrate.Crew):
    """Two processes whose costs are known. Fine-tuning at the same time, the second takes twice as long, and in every
    second slot twice again, both."""

    def __init__(self):
        super().__init__(0, "")
        self.size, self.phases, self.asked = 2, 2, []

    def ask(self, count, phase, what, part):
        self.asked.append((count, phase, what, part))
        rows = (250 if what == "measure" else 100 + 20 * phase) // part
        seconds = (LAYER, TUNING)[phase].seconds(what, rows)
        burst = 2 if count > 1 and phase and self.asked.count(self.asked[-1]) % 2 else 1
        return [calibrate.Measured(rows, seconds * (1 + number * phase) * burst, 1.0) for number in range(count)]


def check_found():
    """Of work of 1, 2, 2 and 4 s each gets a second in turn done: 1 + 1/2 + 1/2 + 1/4 in 4, that is 16/9 s for one."""
    crew = Invented()
    for _ in range(2):
        crew.measure(0.0)
    found = crew.found()
    for phase, costs, slower in zip(found["phases"], (LAYER, TUNING), (0.0, 16 / 9 - 1), strict=True):
        for what in ("update", "sums", "step", "measure"):
            assert_close(getattr(phase, what), getattr(costs, what), atol=1e-9)
        assert phase.crowding == pytest.approx(slower)
    assert found["crowding"] == pytest.approx(3.5 / 9)
    assert found["jitter"] == pytest.approx(np.log(2) / 2)  # half of the pairs are apart by log 2
    assert {count for count, _, what, _ in crew.asked if what != "update"} == {1}


@pytest.mark.parametrize(("line", "fault"), [
    ("statistics.harmonic_mean(one.seconds for one in slots)", "statistics.fmean(one.seconds for one in slots)"),
    ("itertools.chain(*self._together[index])", "(slot[0] for slot in self._together[index])"),
    ('update=line(points["update", 4]', 'update=line(points["sums", 4]'),
    ("statistics.variance(map(math.log, slot))", "statistics.pvariance(map(math.log, slot))"),
])
def test_what_a_crew_finds(line, fault):
    assert_notices(check_found, calibrate, line, fault)


def test_one_core_has_no_crowd():
    crew = Invented()
    crew.size = 1
    crew.measure(0.0)
    found = crew.found()
    assert found["jitter"] == found["crowding"] == 0.0


def test_a_crew_answers_alone_and_together(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text(small_settings(data="digits", threads=1).to_toml())
    with calibrate.Crew(2, file) as crew:
        assert crew.phases == 3
        (alone,) = crew.ask(1, 0, "update", 4)
        assert alone.rows == 2
        assert len(crew.ask(2, 2, "step", 1)) == 2


def test_a_crew_asks_again_where_others_are_at_work(monkeypatch):
    """Shares of a core that the second of two has, one time after another."""
    shares = [0.5, 0.9, 0.97, 0.99]
    crew = calibrate.Crew.__new__(calibrate.Crew)
    crew._running = [SimpleNamespace(stdin=SimpleNamespace(write=len, flush=list))] * 2
    monkeypatch.setattr(crew, "_answers", lambda _: [[100, 1.0, 1.0], [100, 2.0, shares.pop(0)]])
    assert [one.share for one in crew.ask(2, 0, "update", 1)] == [1.0, 0.97]
    shares[:] = [0.5] * calibrate.TRIES
    assert crew.ask(2, 0, "update", 1)[1].share == 0.5
    assert shares == []


def test_a_crew_that_fails_says_so(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text(small_settings(data=str(tmp_path / "none")).to_toml())
    with pytest.raises(UserError, match=r"calibration: must be able to run; got .*none"), calibrate.Crew(2, file):
        pass


def test_calibration_leaves_what_is_known(monkeypatch):
    asked = []

    class Empty:
        def __init__(self, size, settings):
            asked.append((size, Settings(**from_toml(settings)).layers))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def measure(self, seconds):
            asked.append(seconds)

        def found(self):
            return {"phases": phases, "crowding": 0.5, "jitter": 0.1, "steady": 0.25}

    phases = (replace(LAYER, crowding=0.5),) * 3
    monkeypatch.setattr(calibrate, "Crew", Empty)
    monkeypatch.setattr(calibrate, "PARTS", 2)
    monkeypatch.setattr(calibrate, "_job", lambda mpirun, _: asked.append(mpirun) or {
        "copy": [len(asked) * 1e-6, len(asked) * 1e9]})
    monkeypatch.setattr(calibrate, "_mpirun", lambda: "mpirun")
    monkeypatch.setattr(calibrate.os, "sched_getaffinity", lambda _: {0, 1, 2})
    found = calibrate.calibrate(small_settings(), Costs(node=7, cores=5), known=("cores",))
    assert asked == [(3, (11, 7)), *[calibrate.SECONDS / 2, "mpirun"] * 2]  # jobs are the third and the fifth
    assert (found.cores, found.node, found.phases) == (5, 7, phases)
    assert found.copy.seconds(0) == pytest.approx(4e-6)
    assert found.copy.seconds(15e9) == pytest.approx((3e-6 + 5 + 5e-6 + 3) / 2)
    assert (found.crowding, found.jitter, found.steady) == (0.5, 0.1, 0.25)
    found = calibrate.calibrate(small_settings(), Costs(crowding=0.25), known=("crowding",))
    assert (found.crowding, found.phases) == (0.25, (LAYER,) * 3)
    asked.clear()
    names = ("phases", "crowding", "copy", "message", "apply", "publish", "exchange", "look", "jitter", "steady")
    assert calibrate.calibrate(small_settings(), found, known=(*names, "cores", "oversleep")) == found
    assert asked == []


@pytest.mark.mpi
def test_calibration_runs_a_server_and_a_replica(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text(small_settings(data="digits", layers=(200,)).to_toml())
    done = job.finish(job.start(2, "-m", "gpudbn.mpi.calibrate", "job", file))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"copy", "message", "apply", "publish", "exchange", "look"}
    assert 1e-6 < found["look"][0] < 0.01
    for latency, bandwidth in found.values():
        assert 0 <= latency < 0.1
        assert bandwidth > 1e6
