"""Batch optimisers around servers: whose portions, what is counted, and what comes out, in virtual time."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from gpudbn.arrays import to_cpu
from gpudbn.dbn import DBN
from gpudbn.errors import LostError, NonFiniteError, UserError
from gpudbn.loop import Training
from gpudbn.mpi import Plan, join, replica, sandblaster
from gpudbn.mpi.alone import Alone
from gpudbn.mpi.costs import Compute, Costs
from gpudbn.mpi.machine import Machine
from gpudbn.mpi.sandblaster import OVER, Batch, Coordinator, Portions, Shard, Sum, Ticket
from gpudbn.mpi.server import Server
from gpudbn.mpi.simulate import simulate
from gpudbn.mpi.tally import Tally
from gpudbn.mpi.virtual import run
from tests.conftest import mpi_wheels
from tests.helpers import assert_close, assert_notices
from tests.mpi.job import good_job
from tests.pretend_cupy import installed
from tests.test_batch import logistic
from tests.test_loop import small_data, small_settings, timeless, training

ROWS, COLUMNS, DECAY = 211, 37, 1e-2
PORTION = 1e-2  # seconds


class Logistic:
    """Logistic regression, row by row: the gradient of some rows with their decay, in float32 sums of float64."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.X = rng.standard_normal((ROWS, COLUMNS)) * np.geomspace(0.2, 3, COLUMNS)
        self.y = np.where(self.X @ rng.standard_normal(COLUMNS) + rng.standard_normal(ROWS) > 0, 1.0, -1.0)

    def sums(self, w, first, end):
        """Sum over the rows of minus the gradient, and of the loss."""
        X, y, w = self.X[first:end], self.y[first:end], w.astype(np.float64)
        margin, count = y * (X @ w), end - first
        return (X.T @ (y / (1 + np.exp(margin))) - count * DECAY * w,
                float(np.logaddexp(0, -margin).sum() + count * DECAY / 2 * w @ w))


class Barrier(Logistic):
    """Not finite beyond |w| = 1/5."""

    def sums(self, w, first, end):
        gradient, loss = super().sums(w, first, end)
        return (gradient, loss) if w @ w < 0.04 else (gradient * np.nan, math.inf)


class Job:
    """Replicas and servers in virtual time that search on a problem: a batch of all rows, then one of the first 97."""

    def __init__(self, replicas=3, servers=1, *, problem=None, slow=(), gives_up=None, start=0.0, **options):
        self.problem, self.options, self.start = problem or Logistic(), options, start
        self.gives_up = gives_up or {}  # replica: in which of its portions
        self.servers, self.computed = servers, [0] * replicas
        machine = Machine(servers + replicas, Costs(node=2, slow=slow))
        found = run(machine, self.rank)
        self.reports, self.found = found[:servers], [x for x in found[servers:] if x is not None]
        self.x, self.seconds = self.found[0], machine.now
        for other in self.found:
            assert np.array_equal(self.x, other), "all replicas have the same in the end"

    def rank(self, wire):
        exchange = join(wire, Plan("async", servers=self.servers), COLUMNS)
        if isinstance(exchange, Server):
            return exchange.serve()
        x, gradient = np.full(COLUMNS, self.start, np.float32), np.empty(COLUMNS, np.float32)
        me = exchange.replica

        def compute(first, end):
            wire.compute(PORTION * (end - first) / 16)
            self.computed[me] += 1
            if self.computed[me] == self.gives_up.get(me):
                raise NonFiniteError("memory that forgets")
            gradient[...], loss = self.problem.sums(x, first, end)
            return loss

        exchange.begin(x)
        try:
            for rows in (ROWS, 97):
                exchange.search(x, gradient, compute, rows,
                                **{"method": "lbfgs", "history": 5, "searches": 6, "portions": 13, **self.options})
            exchange.meet(x)
        except NonFiniteError as error:
            if not exchange.leave(str(error)):
                raise
            return None
        exchange.close()
        return x


def alone(problem, *, method="lbfgs", searches=6, start=0.0, rows=(ROWS, 97)):
    """The same in one process, without portions."""
    from gpudbn.batch import Arrays, Minimiser

    x, g = np.full(COLUMNS, start, np.float32), np.empty(COLUMNS, np.float32)
    count = [0]

    def objective():
        gradient, loss = problem.sums(x, 0, count[0])
        g[...] = gradient / -count[0]
        return loss / count[0]

    minimiser = Minimiser(Arrays(x, g, objective), method, history=5)
    for count[0] in rows:
        minimiser.forget()
        list(minimiser.run(searches))
    return x


# -- sums and portions ----------------------------------------------------------------------------


def summed(order, vectors):
    """What ``Sum`` makes of vectors that come in an order."""
    found = Sum()
    found.begin(len(vectors))
    for portion in order:
        assert not found.whole()
        assert found.add(portion, vectors[portion], 0.1 * portion)
    assert found.whole()
    return found


def check_sums():
    rng = np.random.default_rng(2)
    for count in (1, 2, 3, 5, 8, 13):
        vectors = rng.standard_normal((count, 7)).astype(np.float32)
        first = summed(range(count), vectors)
        assert_close(first.total, vectors.sum(axis=0, dtype=np.float64), atol=1e-6 * count)
        assert_close(first.loss, 0.1 * count * (count - 1) / 2, atol=1e-12)
        for _ in range(20):
            other = summed(rng.permutation(count), vectors)
            assert np.array_equal(first.total, other.total)
            assert first.loss == other.loss


@pytest.mark.parametrize(("line", "fault"), [
    ("if place ^ 1 < width:", "if True:"),
    ("level, place, width = level + 1, place // 2, (width + 1) // 2",
     "level, place, width = level + 1, place // 2, width // 2"),
    ("other += node", "other -= node"),
])
def test_a_sum_has_the_same_bits_in_whatever_order_portions_come(line, fault):
    assert_notices(check_sums, sandblaster, line, fault)


def test_a_portion_is_counted_once():
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    found = Sum()
    for _ in range(2):  # evaluations
        found.begin(4)
        for portion, good in ((2, True), (2, False), (0, True), (3, True), (0, False), (1, True), (1, False)):
            assert found.add(portion, vectors[portion], 1.0) == good
        assert (found.total == vectors.sum(axis=0)).all()
        assert found.loss == 4


def test_what_waits_for_a_missing_portion_merges():
    """All but two of 64 are there: what is left are sums of 1, 2, 4, ... neighbours."""
    found = Sum()
    found.begin(64)
    for portion in range(64):
        if portion not in (0, 32):
            found.add(portion, np.ones(1, np.float32), 0.0)
    assert len(found._nodes) == 2 * 5
    found.add(0, np.ones(1, np.float32), 0.0)
    found.add(32, np.ones(1, np.float32), 0.0)
    assert found.total == 64


def test_a_loss_that_is_not_finite():
    for bad in (math.inf, -math.inf, math.nan):
        found = Sum()
        found.begin(3)
        for portion, loss in enumerate((1.0, bad, math.inf)):
            found.add(portion, np.ones(1, np.float32), loss)
        assert math.isnan(found.loss)


def test_portions_are_given_in_order_and_then_those_that_would_be_late():
    done, seconds = [False] * 4, {0: 1.0, 1: 1.0, 2: 10.0}
    portions = Portions(done, seconds)
    assert [portions.claim(worker, 0.0) for worker in (2, 0, 1)] == [0, 1, 2]
    done[1] = True
    assert portions.claim(0, 1.0) == 3
    done[2] = True
    assert portions.claim(1, 1.1) == 0  # expected at 10, by me at 2.1
    done[3] = True
    assert portions.claim(0, 2.0) is None  # what the other has begun comes at 2.1
    assert portions.claim(0, 2.2) == 0  # overdue
    done[0] = True
    assert portions.claim(1, 2.3) is None


def test_portions_of_one_that_is_lost_or_new_are_given_again():
    portions = Portions([False, False], {0: 1.0, 1: 1.0})
    assert [portions.claim(worker, 0.0) for worker in (0, 1)] == [0, 1]
    portions.lose(1)
    assert portions.claim(0, 0.5) == 1
    assert portions.claim(0, 0.5) is None  # has all that is left
    portions = Portions([False])
    assert portions.claim(5, 0.0) == 0
    assert portions.claim(6, 0.0) == 0  # nothing is known of the first


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (7, 7), (211, 13), (97, 32)])
def test_portions_cover_every_row_once_and_none_is_empty(rows, count):
    batch = Batch(0, rows, count, "cg", 1, 1)
    spans = [batch.span(portion) for portion in range(count)]
    assert [row for span in spans for row in range(*span)] == list(range(rows))
    assert min(end - first for first, end in spans) >= rows // count
    assert Batch.unpack(batch.pack()) == batch


@pytest.mark.parametrize("loss", [0.0, -1.75, 1e300, math.inf])
def test_a_label_says_of_what_it_is(loss):
    ticket = Ticket(123_456, 7_890)
    assert Ticket.of(ticket.label(loss, 40)) == (ticket, loss)
    assert Ticket.unpack(ticket.pack()) == ticket


# -- whole searches -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lbfgs", "cg"])
def test_any_replicas_and_servers_come_to_what_one_process_comes_to(method):
    expected = alone(Logistic(), method=method)
    first = Job(1, 1, method=method, portions=5)
    assert_close(first.x, expected, atol=2e-5)
    for replicas, servers in itertools.product((1, 2, 3), (1, 2, 3)):
        found = Job(replicas, servers, method=method, portions=5)
        assert_close(found.x, expected, atol=2e-5)
        if servers == 1:
            assert np.array_equal(found.x, first.x)
        assert all(report["lost"] == [] for report in found.reports)


def test_the_minimum_is_scipys():
    optimize = pytest.importorskip("scipy.optimize")
    problem = Logistic()
    found = Job(3, 2, searches=300)

    def loss(w):
        gradient, value = problem.sums(w, 0, 97)
        return value / 97, -gradient / 97

    theirs = optimize.minimize(loss, np.zeros(COLUMNS), jac=True, method="L-BFGS-B",
                               options={"ftol": 1e-15, "gtol": 1e-9})
    assert abs(loss(found.x)[0] - theirs.fun) < 1e-6


def check_slow_replica():
    """One of three is ten times slower, and its portions come late: the bits of one replica, in hardly more time."""
    for servers in (1, 2):
        without = Job(2, servers)
        found = Job(3, servers, slow=(1.0,) * (servers + 2) + (10.0,))
        assert np.array_equal(found.x, Job(1, servers).x)
        assert_close(found.x, alone(Logistic()), atol=2e-5)
        assert found.seconds < 1.3 * without.seconds
        assert 0 < found.computed[2] < found.computed[0] / 4
        for report in found.reports:
            assert sum(report["applied"]) == sum(found.computed)
            counted = sum(report["applied"]) - sum(report["refused"])
            assert counted == found.reports[0]["evaluations"] * 13
        assert found.reports[0]["refused"][2] > 0


@pytest.mark.parametrize(("module", "line", "fault"), [
    (sandblaster, "if self.done[portion]:", "if False:"),  # counts twice
    (sandblaster, "if ticket.evaluation != self.evaluation or", "if"),  # takes what is of another evaluation
    (sandblaster, "self.sum.begin(portions)\n                    self._publish()", "self.sum.begin(portions)"),
    (sandblaster, "if latest is None or ends[latest] <=", "if latest is None or 0 <="),  # no backup
    (replica, "if ticket.evaluation != evaluation:", "if evaluation < 0:"),  # pulls once
])
def test_a_slow_replica_costs_no_time_and_changes_no_bit(module, line, fault):
    assert_notices(check_slow_replica, module, line, fault)


@pytest.mark.parametrize("when", [1, 5, 40])
@pytest.mark.parametrize("servers", [1, 2])
def test_a_replica_that_is_lost_in_a_batch_changes_no_bit(servers, when, capsys):
    found = Job(3, servers, gives_up={1: when})
    assert len(found.found) == 2
    assert np.array_equal(found.x, Job(1, servers).x)
    assert found.computed[1] == when
    assert all(report["lost"] == [1] for report in found.reports)
    assert "2 of 3 replicas go on" in capsys.readouterr().err


def test_the_chief_and_another_are_lost(capsys):
    found = Job(3, 2, gives_up={0: 3, 2: 4})
    assert np.array_equal(found.x, Job(1, 2).x)
    assert "1 of 3 replicas go on" in capsys.readouterr().err


def test_the_last_one_cannot_give_up():
    with pytest.raises((NonFiniteError, LostError), match="forgets"):
        Job(1, gives_up={0: 2})


def test_a_step_into_the_infinite_is_too_far():
    problem = Barrier()
    found = Job(2, 2, problem=problem, searches=30)
    assert 0.03 < found.x @ found.x < 0.04
    assert_close(found.x, alone(problem, searches=30), atol=2e-3)


@pytest.mark.parametrize("servers", [1, 2])
def test_what_it_begins_with_must_be_finite(servers):
    with pytest.raises(NonFiniteError, match="lbfgs: objective and gradient must be finite; got nan"):
        Job(2, servers, problem=Barrier(), start=1.0)


def test_more_portions_than_rows():
    assert_close(Job(2, portions=1000).x, alone(Logistic()), atol=2e-5)


def test_portions_follow_the_number_of_replicas():
    found = Job(3, portions=None, slow=(1.0, 1.0, 1.0, 1.0))
    assert sum(found.computed) - sum(found.reports[0]["refused"]) == found.reports[0]["evaluations"] * 24


def by_hand(xp):
    """What a batch comes to at a server whose vectors are of this module, its portions in any order, some again.

    And how many came.
    """
    x, answers, rng, came = xp.zeros(COLUMNS, np.float32), [], np.random.default_rng(4), itertools.count()
    batch, problem = Batch(0, ROWS, 13, "lbfgs", 5, 6), Logistic()

    def until(done):
        while not done():
            portion = int(rng.integers(batch.portions))
            gradient, loss = problem.sums(to_cpu(x), *batch.span(portion))
            payload = xp.asarray(gradient.astype(np.float32)).view(np.uint8)
            label, new = Ticket(shard.evaluation, portion).label(loss, payload.nbytes), not shard.sum.done[portion]
            assert shard.take(label, payload) == new
            next(came)

    wire = SimpleNamespace(tally=Tally(), worked=lambda what, nbytes: None)  # noqa: ARG005
    shard = Shard(x, wire, lambda: None, until)
    coordinator = Coordinator(shard, None, until, lambda: 0.0, lambda *answer: answers.append(answer))
    coordinator.come(2, batch.pack())
    assert coordinator.settle()
    assert answers == [(2, OVER)]
    return x, next(came)


def test_vectors_stay_on_a_gpu():
    expected, _ = by_hand(np)
    assert_close(expected, alone(Logistic(), rows=(ROWS,)), atol=2e-5)
    with installed() as device:
        import cupy

        found, came = by_hand(cupy)
        crossed = [way for way, _, size in device.copied if size >= COLUMNS]
        assert crossed.count("to host") == crossed.count("to device") == came, "x to each portion, its gradient back"
        assert_close(to_cpu(found), expected, atol=1e-6)


def test_no_portion_is_asked_for_to_time_paths():
    class Portioned(Alone):
        gives_portions = shards_rows = True

    with installed():
        import cupy

        for optimiser, timed in (("adam", True), ("cg", False)):
            settings = small_settings(layers=(5,), optimiser=optimiser)
            paths = Training(DBN([13, 5], cupy), small_data(), settings, Portioned()).paths
            assert bool(paths[-1].rivals) == timed


# -- whole runs -----------------------------------------------------------------------------------

LAYER = Compute(update=(2e-3, 1e-4), sums=(1e-3, 1e-4), step=(5e-4, 0.0), measure=(0.0, 1e-5))
OPTIONS = {"optimiser": "lbfgs", "finetune_batch": 20, "finetune_decay": 0.03, "finetune_epochs": 2,
           "finetune_patience": 0, "dropout": 0.2, "portions": 5}


def simulated(replicas, *, slow=(), rows=71, **changes):
    settings = small_settings(**{**OPTIONS, **changes})
    costs = Costs(phases=(LAYER,) * (len(settings.layers) + 1), node=2, slow=slow)
    return simulate(settings, small_data(rows), replicas=replicas, costs=costs)


def parameters(dbn):
    return np.concatenate([array.ravel() for name, array in sorted(dbn.arrays().items())])


@pytest.mark.parametrize("options", [
    {}, {"finetune": "autoencoder"}, {"finetune": "autoencoder", "code": "linear", "optimiser": "cg"}])
def test_fine_tuning_comes_to_what_one_process_comes_to(options):
    """Dropout and decay, several batches an epoch of which the last is short; untrained layers, alike everywhere."""
    settings = {**OPTIONS, "epochs": 0, **options}
    one = training(small_settings(**settings))
    records = list(one.run())
    bits = set()
    for replicas, servers in itertools.product((1, 2, 3), (1, 2, 3)):
        found = simulated(replicas, servers=servers, **settings)
        assert_close(parameters(found.dbn), parameters(one.dbn), atol=3e-5)
        bits.add((servers, parameters(found.dbn).tobytes()))
        assert [r["epoch"] for r in found.records[:-1]] == [1, 2]
        for ours, theirs in zip(found.records, records, strict=True):
            assert ours["update"] == theirs["update"]
            assert_close(ours.get("loss_train", 0), theirs.get("loss_train", 0), rtol=1e-5)
    assert len({servers for servers, _ in bits}) == len(bits) == 3, "as many as servers"


@pytest.mark.parametrize("options", [{}, {"overlap": "on"}, {"push": "float16"}, {"max_staleness": 1}])
def test_pretraining_stays_asynchronous(options):
    first, second = (simulated(2, servers=2, **options) for _ in range(2))
    assert first.records == second.records
    assert [r["phase"] for r in first.records] == ["pretrain"] * 6 + ["finetune"] * 2 + ["test"]
    assert sum(first.servers[0]["staleness"]) == first.servers[0]["version"] > 0
    assert [r.get("push") for r in first.records] == [options.get("push", "dense")] * 6 + [None] * 3
    assert first.servers[1]["evaluations"] == first.servers[0]["evaluations"] >= 2 * 3 * 4


def resumed(stop, servers=2, replicas=2):
    """Records and model of a run that is stopped after some records and taken up by other ranks."""
    settings = small_settings(**{**OPTIONS, "epochs": 1, "servers": servers, "finetune_patience": 5})
    data, costs, kept = small_data(), Costs(node=2), {}

    def rank(stop, wire):
        exchange = join(wire, Plan("async", servers=servers), 400)
        if isinstance(exchange, Server):
            return exchange.serve()
        run_ = Training(DBN([data.n, *settings.layers]), data, settings, exchange)
        if kept.get("state"):
            run_.restore(*kept["state"])
        records = list(itertools.islice(run_.run(), stop))
        state = run_.state()
        exchange.close()
        return (records, state, run_.dbn) if exchange.chief else None

    before, kept["state"], _ = run(Machine(servers + replicas, costs), lambda wire: rank(stop, wire))[servers]
    after, _, dbn = run(Machine(servers + replicas, costs), lambda wire: rank(None, wire))[servers]
    return timeless(before + after), parameters(dbn)


def test_a_run_that_is_stopped_and_resumed_ends_as_one_that_is_not():
    whole = resumed(stop=2)
    for stop in (3, 4):
        records, found = resumed(stop)
        assert records == whole[0]
        assert np.array_equal(found, whole[1])


def test_a_slow_replica_in_a_whole_run():
    options = {"layers": (11,), "epochs": 0, "finetune_batch": 900, "line_searches": 6, "portions": None, "rows": 920}
    without = simulated(2, **options)
    assert simulated(3, slow=(1, 1, 1, 10), **options).seconds < 1.3 * without.seconds


@pytest.mark.parametrize("mode", ["sync", "local"])
def test_replicas_without_servers_are_refused(mode):
    with pytest.raises(UserError, match=f"--optimiser: must be adam, adagrad or sgd with several replicas in --mode "
                                        f"{mode}; got lbfgs and 2. Use --mode async"):
        simulated(2, mode=mode, portions=None)


def test_the_time_of_one_process_is_that_of_its_evaluations():
    one = simulated(1, mode="sync", epochs=0, finetune_batch=51, line_searches=4, finetune_epochs=1, portions=None)
    evaluations = (one.records[0]["seconds"] - 61 * 1e-5) / (1e-3 + 51e-4)
    assert_close(evaluations, round(evaluations), atol=0.2)
    assert 5 <= round(evaluations) <= 20


def test_logistic_is_the_problem_of_the_batch_optimisers():
    """So that SciPy's minimum there and here are of the same kind."""
    objective, start = logistic(ROWS, COLUMNS, DECAY)
    gradient, loss = Logistic().sums(start + 0.1, 0, ROWS)
    value, g = objective(start + 0.1)
    assert_close(loss / ROWS, value, atol=1e-12)
    assert_close(gradient / -ROWS, g, atol=1e-12)


# -- real jobs ------------------------------------------------------------------------------------


def real(replicas, *, servers=1, survive=False, **options):
    """A job of ``programs/sandblaster.py``: the reports of its servers, and of its replicas by their numbers."""
    said = good_job(servers + replicas, "sandblaster", json.dumps({"servers": servers, **options}), survive=survive)
    found = {"server": [], "replica": {}}
    for line in said.splitlines():
        kind, _, report = line.strip().partition(" ")
        if kind == "server":
            found[kind].append(json.loads(report))
        elif kind == "replica":
            found[kind][json.loads(report)["replica"]] = json.loads(report)
    assert len(found["server"]) == servers
    return sorted(found["server"], key=lambda report: report["number"]), found["replica"]


@pytest.mark.mpi
def test_real_ranks_have_the_bits_of_those_in_virtual_time():
    servers, replicas = real(2, servers=2, method="cg")
    for report in replicas.values():
        assert np.array_equal(report["x"], Job(1, 2, method="cg").x)
    assert [sum(r["applied"]) - sum(r["refused"]) for r in servers] == [13 * servers[0]["evaluations"]] * 2


@pytest.mark.mpi
@pytest.mark.skipif(any("mpich" in wheel for wheel in mpi_wheels()), reason="MPICH ends a job of which a rank dies")
@pytest.mark.parametrize(("where", "turn"), [("compute", 5), ("between", 9)])
def test_a_replica_that_is_killed_in_a_batch_changes_no_bit(where, turn):
    """What it has given to one of two servers only counts there, and is not counted again."""
    servers, replicas = real(3, servers=2, survive=True, kill={1: [where, turn]}, pace=1e-3)
    assert sorted(replicas) == [0, 2]
    for report in replicas.values():
        assert np.array_equal(report["x"], Job(1, 2).x)
    for report in servers:
        assert report["lost"] == [1]
        assert sum(report["applied"]) - sum(report["refused"]) == 13 * report["evaluations"]
    assert servers[1]["applied"][1] - servers[0]["applied"][1] == (where == "between")


@pytest.mark.mpi
@pytest.mark.slow
def test_a_replica_ten_times_slower_costs_no_time():
    without, found = real(2, pace=0.02), real(3, pace=0.02, slow={2: 0.2})
    assert found[1][0]["seconds"] < 1.3 * without[1][0]["seconds"]
    assert found[1][2]["computed"] < found[1][0]["computed"] / 4
    assert found[1][0]["x"] == without[1][0]["x"]
    print({replica: report["seconds"] for replica, report in found[1].items()}, without[1][0]["seconds"])
