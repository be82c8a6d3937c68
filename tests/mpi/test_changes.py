"""Changes packed and unpacked: what is sent and what is kept make the change, and no more bytes than promised."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from gpudbn import factors, loop, optimiser, pretrain
from gpudbn.arrays import to_cpu, to_gpu
from gpudbn.factors import Factors
from gpudbn.mpi import changes, rules
from gpudbn.mpi.changes import BYTES, Packing, decode
from gpudbn.mpi.costs import Compute, Costs
from gpudbn.mpi.rules import Compensated, Rule, Steps
from gpudbn.mpi.simulate import simulate
from tests import pretend_cupy
from tests.cuda_on_cpu import runtime
from tests.helpers import assert_close, assert_notices, planted
from tests.mpi.test_protocol import Job
from tests.test_loop import small_data, small_settings

SIXTEEN = ("float16", "bfloat16")
ZEROS = np.zeros(3, np.float32)
STEP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a unit in the last place, of what is rounded


def drawn(rng, size):
    """A change whose entries are of all sizes, most far below the largest."""
    return (rng.standard_normal(size) * 10.0 ** rng.uniform(-9, -2, size)).astype(np.float32)


def check_feedback(push):
    """Over many changes of varied scale: sent + kept = given, to the rounding of float32; each error is small."""
    rng, size = np.random.default_rng(5), 103
    packing, given, sent = Packing(push), np.zeros(size), np.zeros(size)
    largest = np.zeros(size)
    for number in range(50):
        change = drawn(rng, size) * np.float32(2.0 ** (number % 7 * 5 - 20))
        given += change
        largest = np.maximum(largest, np.abs(change))
        local = change.copy()
        label, payload = packing.encode(local, base=3, turn=number)
        assert payload.nbytes == label[BYTES] == 2 * size
        assert label[changes.BASE] == 3
        assert label[changes.TURN] == number
        found = decode(label, payload, local, out=np.empty(size, np.float32))
        assert np.array_equal(found, local)  # the replica goes on with what the server has
        sent += found
        assert (np.abs(given - sent) <= STEP[push] * 1.1 * np.maximum(largest, 2.0**-38 * np.abs(found).max())).all()
    assert_close(sent + packing._residual, given, atol=1e-6 * largest.max(), rtol=1e-6)
    assert np.abs(packing._residual).max() > 0


@pytest.mark.parametrize("push", SIXTEEN)
def test_what_sixteen_bits_round_away_is_sent_later(push):
    check_feedback(push)


@pytest.mark.parametrize(("push", "line", "fault"), [
    ("float16", "change += self._residual", "pass"),
    ("bfloat16", "self._residual -= change", "pass"),
    ("float16", "LARGEST - int(np.frexp(largest)[1])", "-5"),
    ("float16", "out *= np.float32(2.0 ** -int(label[EXPONENT]))", "pass"),
    ("float16", "decode(label, payload, change, out=change)", "pass"),
    ("bfloat16", "label[ENCODING] = BFLOAT16", "label[ENCODING] = FLOAT16"),
])
def test_another_packing_is_noticed(push, line, fault):
    assert_notices(lambda: check_feedback(push), changes, line, fault)


@pytest.mark.parametrize("push", SIXTEEN)
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-30, -3e-5, 1.0, 65_536.0, 3e38, -3e38])
def test_the_largest_change_stays_finite_and_the_only_one_is_not_lost(push, value):
    change = np.array([0, value, 0], np.float32)
    label, payload = Packing(push).encode(change, base=0)
    found = decode(label, payload, ZEROS, out=np.empty(3, np.float32))
    assert_close(found, np.array([0, value, 0]), rtol=STEP[push], atol=1e-40)


@pytest.mark.parametrize("push", SIXTEEN)
def test_what_is_not_finite_arrives_so(push):
    for value in (np.nan, np.inf, -np.inf):
        change = np.array([0, value, 1], np.float32)
        with np.errstate(invalid="ignore"):
            label, payload = Packing(push).encode(change, base=0)
        assert not np.isfinite(decode(label, payload, ZEROS, out=np.empty(3, np.float32))).all()


@pytest.mark.parametrize("push", ["dense", *SIXTEEN])
def test_a_server_gets_all_but_what_replicas_still_keep(monkeypatch, push):
    """Two replicas push now and then without a pull; all changes are in the server's parameters or kept."""
    rng = np.random.default_rng(7)
    job = Job(monkeypatch, 2, 37, push=push)
    p, before = job.begin(37)
    given = np.zeros(37)
    for who, fetch in ((0, True), (1, False), (1, True), (0, False), (0, True), (1, True)) * 5:
        change = drawn(rng, 37)
        old = p[who].copy()
        p[who] += change
        given += p[who].astype(np.float64) - old
        job.replicas[who].exchange(p[who], before[who], fetch=fetch)
        assert np.array_equal(p[who], before[who])
        job.server._take()
    kept = sum(one.links[0].packing._residual for one in job.replicas) if push != "dense" else 0
    assert_close(job.store.parameters + kept, given, atol=1e-7)
    for one, own in zip(job.replicas, p, strict=True):
        one.meet(own)
        assert np.array_equal(own, job.store.parameters)
    job.begin(5)  # parameters of another size: what is kept was of the old ones
    assert all(one.links[0].packing._residual is None for one in job.replicas)


def test_an_encoding_that_is_not_known_is_refused():
    label, payload = Packing().encode(np.zeros(3, np.float32), base=0)
    label[changes.ENCODING] = 99
    with pytest.raises(ValueError, match="decode: encoding must be"):
        decode(label, payload, ZEROS, out=np.empty(3, np.float32))


@pytest.mark.parametrize("push", ["dense", *SIXTEEN, "factored"])
def test_on_a_gpu_changes_are_packed_and_applied_to_the_same_bits(push):
    """By a compensating rule; what is pushed does not come to the host, but for the scale of float16 and the kinds."""
    rng, n, m, rows = np.random.default_rng(6), 40, 30, 3
    start = rng.standard_normal((2, n * m + n + m)).astype(np.float32)
    v, h = (rng.integers(0, 2, (2, 2 * rows, k)).astype(np.float32) for k in (n, m))

    def run(put):
        packing, rule = Packing(push), Compensated(Rule(), 2.0)
        p = put(start[0])
        rule.begin(put(start[0] / 2), 1)
        for number in range(2):
            change, updates = put(start[1] * np.float32(0.01)), Factors(n, m)
            updates.add(put(v[number]), put(h[number]), rows, model_weight=1, rate=0.01, decay=0.1)
            label, payload = packing.encode(change, base=0, factors=updates)
            assert packing.last == push
            assert type(payload) is type(p)
            changes.apply(rule, p, label, payload.view(np.uint8), 0)
        return to_cpu(p)

    expected = run(np.copy)
    assert np.abs(expected - start[0]).max() > 1e-3
    with pretend_cupy.installed():
        assert np.array_equal(run(to_gpu), expected)


# -- factored: the product itself is tested in tests/test_factors.py

SGD, MOMENTUM = partial(optimiser.SGD, decay=0.0), partial(optimiser.Momentum, momentum=0.6, decay=0.0)
ADAGRAD = partial(optimiser.Adagrad, decay=0.0)
N, M = 13, 7
KERNELS = [  # a rule, the decay at the replica, the kernel by which it applies a change that is not written
    (Rule, 0.3, "cd_sgd"), (partial(Steps, SGD, rate=0.7, by_staleness=True), 0.3, "cd_sgd"),
    (partial(Steps, MOMENTUM, rate=0.7), 0.3, "cd_update"), (partial(Steps, ADAGRAD, rate=0.05), 0.0, "cd_adagrad"),
    (partial(Steps, ADAGRAD, rate=0.05), 0.3, "cd_adagrad"),
    (lambda: Compensated(Rule(), 2.0), 0.3, None)]


def applied(rule, put, decay, *, dense, first=0, size=N * M + N + M):
    """A server's parameters after two turns of three updates, which came as activations or as what those change."""
    rng, p = np.random.default_rng(3), put(np.linspace(-2, 2, size, dtype=np.float32))
    rule.begin(p, 1)
    for staleness in (0, 3):
        updates = Factors(N, M)
        for rows in (4, 4, 3):
            v, h = (rng.integers(0, 2, (2 * rows, k)).astype(np.float32) for k in (N, M))
            h[rows:] = rng.random((rows, M))
            updates.add(put(v), put(h), rows, model_weight=1.0, rate=0.1 * rows, decay=decay)
        label = np.zeros(changes.WORDS, np.int64)
        label[changes.ENCODING], payload = changes.FACTORED, updates.pack(first, size)
        if dense:
            payload = decode(label, payload, p, out=put(np.empty(size, np.float32))).view(np.uint8)
            label[changes.ENCODING] = changes.DENSE
        assert changes.apply(rule, p, label, payload, staleness)
    return to_cpu(p)


def check_factored(make, decay, kernel):
    expected = applied(make(), np.copy, decay, dense=True)
    assert np.abs(expected - np.linspace(-2, 2, len(expected))).max() > 0.05
    assert_close(applied(make(), np.copy, decay, dense=False), expected, atol=1e-5)
    with pretend_cupy.installed() as device:
        assert_close(applied(make(), to_gpu, decay, dense=False), expected, atol=1e-5)
        assert device.launched == [kernel] * 2 if kernel else device.launched == []


@pytest.mark.skipif(runtime.why_not() is not None, reason=f"no kernel runs here: {runtime.why_not()}")
@pytest.mark.parametrize(("make", "decay", "kernel"), KERNELS)
def test_a_server_applies_activations_as_their_change_in_one_kernel(make, decay, kernel):
    check_factored(make, decay, kernel)


@pytest.mark.skipif(runtime.why_not() is not None, reason=f"no kernel runs here: {runtime.why_not()}")
@pytest.mark.parametrize(("module", "line", "fault", "case"), [
    (changes, "1 - made.kept, staleness", "made.kept, staleness", 0),
    (rules, "decay, self._rate(staleness))", "decay, self._rate(0))", 1),
    (rules, "v, h, 1, model_weight=-1.0, ones=ones", "v, h, 1, model_weight=-1.0", 0),
    (rules, "v, h, 1, model_weight=-1.0", "v, h, 2, model_weight=-1.0", 2),
    (optimiser, "fade=decay or 0.0", "fade=0.0", 4),
    (factors, "[self.s, np.float32(1) / self.later]", "[self.s, self.later]", 0),
    (factors, "return self.v, self.h * (self.s * self.later)[:, None]", "return self.v, self.h * self.s[:, None]", 2),
])
def test_activations_that_are_applied_otherwise_are_noticed(module, line, fault, case):
    with pytest.raises(AssertionError), planted(module, line, fault):
        check_factored(*KERNELS[case])


@pytest.mark.parametrize(("first", "size"), [(0, 50), (37, N * M + N + M - 37)])
def test_a_shard_gets_its_part_as_a_change(first, size):
    parts = [applied(Rule(), np.copy, 0.3, dense=dense, first=first, size=size) for dense in (False, True)]
    assert np.array_equal(*parts)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_activations_that_are_not_finite_are_refused(value):
    p, updates = np.zeros(N * M + N + M, np.float32), Factors(N, M)
    v, h = np.ones((4, N), np.float32), np.ones((4, M), np.float32)
    v[1, 2] = value
    with np.errstate(over="ignore", invalid="ignore"):
        updates.add(v, h * 10, 2, model_weight=1.0, rate=2.0, decay=0.0)
        label = np.zeros(changes.WORDS, np.int64)
        label[changes.ENCODING] = changes.FACTORED
        assert not changes.apply(Rule(), p, label, updates.pack(0, p.size), 0)
    assert not p.any()


COSTS = Compute(update=(2e-3, 1e-4), sums=(1e-3, 1e-4), step=(5e-4, 0.0), measure=(0.0, 1e-5))


def trained(push, *, replicas=1, **options):
    """A run in virtual time: its parameters, records, and bytes that the replicas sent."""
    settings = small_settings(push=push, momentum=0, layers=(300,), epochs=2, decay=0.01, finetune_epochs=1,
                              **options)
    found = simulate(settings, small_data(n=70), replicas=replicas, costs=Costs(phases=(COSTS,) * 2))
    return found.dbn.arrays(), found.records, sum(report["bytes"]["sent"] for report in found.replicas)


def check_whole_run(**options):
    """One replica, for which all that differs is the rounding of sums."""
    (dense, seen, many), (factored, records, few) = (trained(push, **options) for push in ("dense", "factored"))
    assert [r["push"] for r in records[:-1]] == ["factored"] * 2 + ["dense"]  # fine-tuning makes no such products
    assert [r["push"] for r in seen[:-1]] == ["dense"] * 3
    assert few < 0.75 * many  # fine-tuning included
    for name in ("layers.0.W", "layers.0.b", "layers.0.c"):
        assert_close(factored[name], dense[name], atol=1e-4)


@pytest.mark.parametrize("options", [
    {}, {"servers": 2, "n_push": 3, "n_fetch": 6}, {"method": "pcd", "n_push": 2},
    {"server_rule": "momentum", "staleness": "compensate"}])  # where a pull always has the last push
def test_factored_pushes_make_the_same_run(options):
    check_whole_run(**options)


@pytest.mark.parametrize(("module", "line", "fault"), [
    (pretrain, "            self.factors.clear()", "            pass"),
    (pretrain, "decay=self.settings.decay,\n                             levels", "decay=0,\n levels"),
    (loop, "self.exchange.factors, self.exchange.align = phase.factors,", "_, self.exchange.align = phase.factors,"),
    (changes, "if packed.nbytes < change.nbytes:", "if packed.nbytes > change.nbytes:"),
])
def test_a_run_with_other_factors_is_noticed(module, line, fault):
    assert_notices(lambda: check_whole_run(n_push=2), module, line, fault)


def test_what_is_smaller_dense_goes_so():
    _, records, _ = trained("factored", batch=40, n_push=8, n_fetch=8, method="pcd")
    assert {r["push"] for r in records[:-1]} == {"dense"}


def test_a_centred_layer_goes_dense():
    _, records, _ = trained("factored", centring="data")
    assert {r["push"] for r in records[:-1]} == {"dense"}


@pytest.mark.parametrize("push", [*SIXTEEN, "factored"])
def test_several_replicas_learn_as_much_from_fewer_bytes(push):
    (_, dense, many), (_, found, few) = trained("dense", replicas=3), trained(push, replicas=3)
    for i in range(2):
        for measure in ("reconstruction_train", "reconstruction_validation"):
            assert abs(found[i][measure] - dense[i][measure]) < 0.05 * dense[i][measure]
    assert few < {"factored": 0.75}.get(push, 0.62) * many  # labels, sequence numbers and measures included
