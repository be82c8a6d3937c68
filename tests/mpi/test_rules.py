"""What a server does with a change, against the papers' formulas."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from gpudbn import optimiser
from gpudbn.errors import UserError
from gpudbn.mpi import Plan, join, replica, rules, server
from gpudbn.mpi.rules import Compensated, Rule, Steps, from_settings
from gpudbn.mpi.server import Server
from gpudbn.settings import Settings
from tests.helpers import assert_close, assert_notices
from tests.mpi.test_collective import together
from tests.mpi.test_protocol import Job


@pytest.mark.parametrize("by_staleness", [False, True])
@pytest.mark.parametrize(("make", "expected"), [
    (partial(optimiser.SGD, decay=0), [0.5, 0.5]),
    (partial(optimiser.Momentum, momentum=0.5, decay=0), [0.5, 0.75]),  # the second step goes half as far again
    (partial(optimiser.Adagrad, decay=0), [0.5, 0.5 / np.sqrt(2)]),
])
def test_step_rules_at_the_server(monkeypatch, make, expected, by_staleness):
    """Two replicas send a change of 1 each; the second one is stale by one version."""
    steps = Steps(make, rate=0.5, by_staleness=by_staleness)
    job = Job(monkeypatch, 2, 4, rule=steps)
    for _ in range(2):  # a second vector of parameters begins anew
        (a, b), (p, before) = job.replicas, job.begin(4)
        seen = []
        for one in (a, b):
            p[one.replica] += 1
            one.exchange(p[one.replica], before[one.replica], fetch=False)
            job.server._take()
            seen.append(float(job.store.parameters[0]))
        assert_close([seen[0], seen[1] - seen[0]], expected, rtol=1e-6)
        assert (job.store.parameters == job.store.parameters[0]).all()


def test_a_stale_change_counts_less():
    steps, p = Steps(partial(optimiser.SGD, decay=0), rate=0.5, by_staleness=True), np.zeros(3, np.float32)
    steps.begin(p, 1)
    for staleness, expected in ((0, 0.5), (1, 1.0), (4, 1.125)):
        steps(p, np.ones(3, np.float32), staleness)
        assert_close(p, np.full(3, expected), atol=1e-7)


def check_compensation(monkeypatch):
    """A history of two replicas, some of whose changes are late, against the formula in float64."""
    rng = np.random.default_rng(2)
    job = Job(monkeypatch, 2, 5, rule=Compensated(Steps(partial(optimiser.SGD, decay=0), rate=0.5), strength=12.0))
    p, before = job.begin(5)
    for own, old in zip(p, before, strict=True):
        own += 1  # not zero, so that a base that was forgotten shows
        old += 1
    job.replicas[0].begin(p[0])
    job.replicas[1].begin(p[1])
    now, square, late, most = np.ones(5), np.zeros(5), 0.0, 0.0
    works_on = [now.copy(), now.copy()]
    for who, fetch in ((0, True), (0, False), (0, True), (1, False), (0, True), (1, True), (1, False), (0, True)):
        change = rng.standard_normal(5) * 10.0 ** rng.integers(-6, 0)
        assert_close(p[who], works_on[who], rtol=1e-5)
        p[who] += change.astype(np.float32)
        change = (p[who] - before[who]).astype(np.float64)  # as rounded
        job.replicas[who].exchange(p[who], before[who], fetch=fetch)
        job.server._take()
        square = 0.95 * square + 0.05 * change**2
        share = 12 * change / np.sqrt(square) * (now - works_on[who])
        late, most = max(late, np.abs(share).min()), max(most, np.abs(share).max())
        correction = np.clip(share, -1, 1) * change
        now = now + 0.5 * (change - correction)
        works_on[who] = now.copy() if fetch else works_on[who] + change
    assert 1e-2 < late < 1 < most
    assert_close(job.store.parameters, now, rtol=1e-5)


def test_a_late_change_is_compensated_for_where_the_parameters_have_gone(monkeypatch):
    check_compensation(monkeypatch)


@pytest.mark.parametrize(("module", "line", "fault"), [
    (rules, "self._bases[replica] += change", "pass"),
    (rules, "self._bases[replica][...] = parameters", "pass"),
    (rules, "xp.subtract(base, parameters, out=work)", "xp.subtract(parameters, base, out=work)"),
    (rules, "square *= self.KEEP", "pass"),
    (rules, "xp.clip(out, -1, 1, out=out)", "pass"),
    (rules, "out *= self.strength", "pass"),
    (server, "self.rule.pulled(replica, self.parameters)", "pass"),
    (server, "self._take()  # what this", "pass  # what this"),
])
def test_another_compensation_is_noticed(monkeypatch, module, line, fault):
    assert_notices(lambda: check_compensation(monkeypatch), module, line, fault)


def test_the_scale_of_changes_does_not_matter_to_compensation():
    rng = np.random.default_rng(4)
    start, change = (rng.standard_normal(7).astype(np.float32) for _ in range(2))
    found = []
    for scale in (1.0, 2.0**-20):
        rule = Compensated(Rule(), strength=2.0)
        rule.begin(start, 1)
        p = np.zeros(7, np.float32)
        rule(p, change * np.float32(scale), 1, replica=0)
        found.append(p / np.float32(scale))
    assert_close(found[1], found[0], rtol=1e-6)
    assert np.abs(found[0] - change).max() > 1


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adagrad"])
@pytest.mark.parametrize("staleness", ["count", "divide", "compensate"])
def test_settings_make_rules(rule, staleness):
    found = from_settings(Settings(server_rule=rule, server_rate=0.25, server_momentum=0.5, staleness=staleness))
    if staleness == "compensate":
        assert isinstance(found, Compensated)
        assert found.strength == 2
        found = found.rule
    p, change = np.zeros(3, np.float32), np.full(3, 4, np.float32)
    found.begin(p, 1)
    second = 0.5 if staleness == "divide" else 1  # comes late
    steps = {"sgd": (1, second), "momentum": (1, 0.5 + second), "adagrad": (0.25, 0.25 / np.sqrt(2) * second)}[rule]
    for step, late in zip(steps, (1, 2), strict=True):
        old = p.copy()
        found(p, change, late)
        assert_close(p - old, np.full(3, step), rtol=1e-6)


def test_plain_adding_stays_plain():
    assert type(from_settings(Settings())) is Rule
    assert type(from_settings(Settings(staleness="divide"))) is Steps


def test_where_servers_make_the_steps_those_of_replicas_are_plain():
    usual = Settings(staleness="divide")
    assert (usual.momentum, usual.optimiser, usual.finetune_momentum, usual.server_rate) == ((0.5, 0.9), "adam", 0.9, 1)
    for other in ({"server_rule": "adagrad"}, {"server_rule": "momentum"}, {"staleness": "compensate"}):
        s = Settings(**other)
        assert (s.momentum, s.optimiser, s.finetune_momentum) == ((0.0,), "sgd", 0)
        assert Settings(**other, momentum=(0, 0)).momentum == (0, 0)
    assert Settings(push="factored").momentum == (0,)
    assert Settings(push="factored").optimiser == "adam"
    with pytest.raises(UserError, match=r"--momentum: must be 0.0 with --push factored, .*; got 0.5 0.9"):
        Settings(push="factored", momentum=(0.5, 0.9))
    for other in ({"server_rule": "adagrad"}, {"server_rule": "momentum"}, {"staleness": "compensate"}):
        for contrary in ({"momentum": (0, 0.9)}, {"optimiser": "adam"}, {"finetune_momentum": 0.5}):
            with pytest.raises(UserError, match=r"must be .* with --.*; got") as error:
                Settings(**other, **contrary)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", [{"server_rule": "momentum"}, {"staleness": "divide"}, {"push": "float16"},
                                   {"portions": 16}])
def test_what_servers_do_is_refused_where_there_are_none(other):
    for mode in ("sync", "local"):
        with pytest.raises(UserError, match=f"^--mode: must be async with --.*; got {mode}$"):
            Settings(mode=mode, **other)


def check_resumed(settings, servers=2, size=37):
    """What servers keep goes to the chief and comes back: they go on as if never stopped."""
    rng = np.random.default_rng(3)
    changes = [rng.standard_normal(size).astype(np.float32) for _ in range(6)]

    def run(wire, state=None, start=None, first=0):
        exchange = join(wire, Plan("async", rule=partial(from_settings, settings), servers=servers), size)
        if isinstance(exchange, Server):
            return exchange.serve()
        p = np.zeros(size, np.float32) if start is None else start.copy()
        exchange.begin(p)
        if state is not None:
            exchange.restore(state)
        kept = None
        for number, change in list(enumerate(changes))[first:]:
            before = p.copy()
            p += change
            exchange.exchange(p, before)
            exchange.meet(p)
            if number == 2:
                kept = exchange.state()[0], p.copy()
        exchange.close()
        return p, kept

    *_, (whole, (state, half)) = together(servers + 1, run)
    *_, (resumed, _) = together(servers + 1, lambda wire: run(wire, state, half, 3))
    assert np.array_equal(resumed, whole)
    *_, (forgotten, _) = together(servers + 1, lambda wire: run(wire, {}, half, 3))
    assert not np.array_equal(forgotten, whole)
    return set(state)


@pytest.mark.parametrize(("options", "names"), [
    ({"server_rule": "momentum"}, {"velocity"}), ({"server_rule": "adagrad"}, {"squares"}),
    ({"server_rule": "adagrad", "staleness": "compensate"}, {"squares", "mean_square"})])
def test_what_servers_keep_is_kept_by_a_checkpoint(options, names):
    assert check_resumed(Settings(**options)) == {f"server.{name}" for name in names}


@pytest.mark.parametrize(("module", "line", "fault"), [
    (replica, "name: array[part] for", "name: array[: part.stop - part.start] for"),
    (server, "self.wire.recv(array, replica + 1, RESTORE)", "self.wire.recv(array.copy(), replica + 1, RESTORE)"),
])
def test_what_is_not_taken_up_again_is_noticed(module, line, fault):
    assert_notices(lambda: check_resumed(Settings(server_rule="adagrad")), module, line, fault)


def test_nothing_is_kept_of_a_rule_that_keeps_nothing():
    for rule in (Rule(), from_settings(Settings(server_rate=0.5))):
        rule.begin(np.zeros(3, np.float32), 1)
        assert rule.state() == {}
