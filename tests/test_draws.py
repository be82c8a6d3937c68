"""Draws: published vectors, the address formula word for word, cuts that change nothing, and their distribution."""

from __future__ import annotations

import math
import sys
import threading
from itertools import pairwise
from types import MethodType, SimpleNamespace

import numpy as np
import pytest

from gpudbn import draws
from gpudbn.draws import Purpose, site

from .helpers import assert_close, assert_notices

# Random123, kat_vectors, philox 4x32 10: counter, key, output
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEED = 0xA5A5_0123_89AB_CDEF  # both halves of the key in use
ADDRESS = {"seed": SEED, "update": 0xFEDC_BA98, "site": site(Purpose.DROPOUT, 200, 40_000)}


def numbers(text):
    return [int(word, 16) for word in text.split()]


def from_the_formula(rows, m, *, seed, update, site, row=0, column=0, columns=None):
    """u word by word, as the head of draws.py has it, in Python's own integers; array (rows, m), float32."""
    columns = column + m if columns is None else columns
    out = np.empty((rows, m), np.float32)
    for i in range(rows):
        for j in range(column, column + m):
            index = (row + i) * math.ceil(columns / 4) + j // 4
            counter = (index & 0xFFFFFFFF, index >> 32, update, site)
            word = philox_in_python(counter, (seed & 0xFFFFFFFF, seed >> 32))[j % 4]
            out[i, j - column] = (word >> 8) * 2.0**-24
    return out


def philox_in_python(counter, key):
    """Salmon et al. (2011), section 4.3, one block."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 1 << 32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return x0, x1, x2, x3


# The generator


def check_specification():
    for counter, key, output in PUBLISHED:
        assert [int(x) for x in draws.philox4x32(numbers(counter), numbers(key))] == numbers(output)


def check_fast_path():
    for counter, key, output in PUBLISHED:
        (c0, c1, update, place), (k0, k1) = numbers(counter), numbers(key)
        # of 4 columns the index is the row
        address = {"seed": k0 | k1 << 32, "update": update, "site": place, "row": c0 | c1 << 32}
        assert draws.words(4, **address).tolist() == numbers(output)
        u = draws.uniforms(np.empty((1, 4), np.float32), **address)
        assert u[0].tolist() == [(word >> 8) * 2.0**-24 for word in numbers(output)]


def test_the_specification_gives_the_published_vectors():
    check_specification()


def test_the_fast_path_gives_the_published_vectors():
    check_fast_path()


def test_the_python_integers_of_these_tests_give_the_published_vectors():
    for counter, key, output in PUBLISHED:
        assert list(philox_in_python(numbers(counter), numbers(key))) == numbers(output)


@pytest.mark.parametrize(("line", "fault"), [
    ("range(10)", "range(9)"),
    ("0xD2511F53", "0xD2511F51"),
    ("(p1 >> half) ^ c1 ^ np.uint64(k0)", "(p1 >> half) ^ c1 ^ np.uint64(k1)"),
    ("(k1 + 0xBB67AE85) & _LOW", "(k1 + 0xBB67AE86) & _LOW"),
    ("c0, c1 = (p1 >> half)", "c0, c1 = (p0 >> half)"),
])
def test_a_wrong_round_is_noticed(line, fault):
    assert_notices(check_specification, draws, line, fault)


@pytest.mark.parametrize(("line", "fault"), [
    ("| index) - 1)", "| index))"),
    ("(seed & _LOW, seed >> 32)", "(seed & _LOW, 0)"),
    ("before >> 64 & _LOW, before >> 96", "before >> 96, before >> 64 & _LOW"),
])
def test_a_wrong_counter_or_key_is_noticed(line, fault):
    assert_notices(check_fast_path, draws, line, fault)


def test_the_specification_takes_arrays_of_counters():
    index = np.arange(7, dtype=np.uint64)
    block = np.array(draws.philox4x32((index, 3, 5, 0xFFFFFFFF), (11, 13)))
    expected = [philox_in_python((i, 3, 5, 0xFFFFFFFF), (11, 13)) for i in range(7)]
    assert block.dtype == np.uint64
    assert block.T.tolist() == [list(words) for words in expected]


# The address


PARTS = [  # rows, m, row, column, columns: each branch of uniforms, prime sizes, the first and last columns of a layer
    (3, 8, 0, 0, None), (3, 8, 2**32 - 1, 0, None), (5, 7, 0, 0, None), (5, 7, 2**33 + 11, 0, 7), (2, 1, 5, 0, None),
    (3, 5, 1, 0, 13), (3, 5, 1, 8, 13), (3, 3, 2**32, 5, 13), (1, 1, 0, 12, 13), (2, 4, 3, 4, None), (2, 16, 3, 16, 64),
]


def check_uniforms(rows, m, row, column, columns):
    address = ADDRESS | {"row": row, "column": column, "columns": columns}
    out = np.full((rows, m), 9, np.float32)
    assert draws.uniforms(out, **address) is out
    assert np.array_equal(out, from_the_formula(rows, m, **address))


@pytest.mark.parametrize("part", PARTS)
def test_uniforms_are_what_the_formula_says(part):
    check_uniforms(*part)


@pytest.mark.parametrize(("part", "line", "fault"), [
    (PARTS[2], "blocks = -(-columns // 4)", "blocks = columns // 4"),
    (PARTS[5], "columns = column + m if columns is None else columns\n    update", "columns = column + m\n    update"),
    (PARTS[6], "(row + i) * blocks + first", "row * blocks + first"),
    (PARTS[7], "[column - 4 * first :][:m]", "[:m]"),
    (PARTS[1], "at(seed, update, site, row * blocks, rows * blocks).random(out=out",
     "at(seed, update, site, row, rows * blocks).random(out=out"),
    (PARTS[3], "numbers = _stream.at(seed, update, site, row * blocks, rows * blocks)",
     "numbers = _stream.at(seed, update, site, row * 8, rows * blocks)"),
])
def test_a_wrong_address_is_noticed(part, line, fault):
    assert_notices(lambda: check_uniforms(*part), draws, line, fault)


def test_uniforms_fill_a_view_whose_rows_are_apart():
    base = np.full((5, 16), 9, np.float32)
    draws.uniforms(base[:, 4:12], **ADDRESS)
    assert np.array_equal(base[:, 4:12], from_the_formula(5, 8, **ADDRESS))
    assert (base[:, :4] == 9).all()
    assert (base[:, 12:] == 9).all()


@pytest.mark.parametrize("m", [8, 13])
def test_cutting_rows_or_columns_changes_no_draw(m):
    whole = draws.uniforms(np.empty((11, m), np.float32), **ADDRESS, row=2**32 - 5)
    for rows in ([0, 3, 11], [0, 1, 4, 11]):
        parts = [draws.uniforms(np.empty((hi - lo, m), np.float32), **ADDRESS, row=2**32 - 5 + lo)
                 for lo, hi in pairwise(rows)]
        assert np.array_equal(np.vstack(parts), whole)
    for columns in ([0, 4, m], [0, 1, 3, 6, m]):
        parts = [draws.uniforms(np.empty((11, hi - lo), np.float32), **ADDRESS, row=2**32 - 5, column=lo, columns=m)
                 for lo, hi in pairwise(columns)]
        assert np.array_equal(np.hstack(parts), whole)


def test_every_part_of_the_address_changes_the_draws():
    def u(**change):
        return draws.uniforms(np.empty((2, 8), np.float32), **(ADDRESS | change)).tobytes()

    changes = [{}, {"seed": SEED + 1}, {"seed": SEED + 2**32}, {"update": 0}, {"row": 2}, {"row": 2**32}, {"column": 8},
               {"site": site(Purpose.UP, 200, 40_000)}, {"site": site(Purpose.DROPOUT, 201, 40_000)},
               {"site": site(Purpose.DROPOUT, 200, 40_001)}]
    assert len({u(**change) for change in changes}) == len(changes)


def test_drawing_leaves_no_trace():
    first = draws.uniforms(np.empty((3, 7), np.float32), **ADDRESS)
    draws.words(5, **ADDRESS)
    draws.normals(np.empty((1, 3), np.float32), **ADDRESS)
    assert np.array_equal(draws.uniforms(np.empty((3, 7), np.float32), **ADDRESS), first)


def test_sites_are_purpose_layer_and_half_step():
    assert site(Purpose.SAMPLING, 3, 7) == 0x09_03_0007
    assert site(Purpose.INITIALISATION) == 0
    assert draws.replica_row(3) == 3 * 2**32


@pytest.mark.parametrize("wrong", [(Purpose.CD, 256), (Purpose.CD, -1), (Purpose.CD, 0, 65_536), (Purpose.CD, 0, -1)])
def test_a_site_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="site: layer must be below 256 and half_step below 65536"):
        site(*wrong)


@pytest.mark.parametrize("wrong", [{"seed": 2**64}, {"seed": -1}, {"update": 2**32}, {"update": -1}, {"site": 2**32},
                                   {"row": -1}, {"row": 2**64}])
def test_an_address_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="draws: seed and index must lie in"):
        draws.uniforms(np.empty((1, 4), np.float32), **(ADDRESS | wrong))
    with pytest.raises(ValueError, match="draws: seed and index must lie in"):
        draws.words(4, **(ADDRESS | wrong))


@pytest.mark.parametrize("m", [8, 7])
def test_draws_that_would_run_into_the_next_update_are_refused(m):
    """Behind the last block of an update there is no other: its counter would be that of the next update."""
    address = ADDRESS | {"row": 2**63 - 2}  # two blocks a row
    last = draws.uniforms(np.empty((2, m), np.float32), **address)
    assert np.array_equal(last, from_the_formula(2, m, **address))
    assert draws.words(m, **(address | {"row": 2**63 - 1})).size == m
    with pytest.raises(ValueError, match="draws: seed and index must lie in"):
        draws.uniforms(np.empty((3, m), np.float32), **address)
    with pytest.raises(ValueError, match="draws: seed and index must lie in"):
        draws.words(m, **(address | {"row": 2**63}))


@pytest.mark.parametrize(("m", "column", "columns"), [(4, 10, 13), (8, 0, 7), (4, -1, 13), (1, 13, 13)])
def test_columns_that_are_not_in_the_layer_are_refused(m, column, columns):
    with pytest.raises(ValueError, match="uniforms: column"):
        draws.uniforms(np.empty((2, m), np.float32), **ADDRESS, column=column, columns=columns)


# Threads


def check_threads():
    """Two threads, each stopped between setting its generator and drawing from it, until both are there."""
    barrier, at, found = threading.Barrier(2, timeout=20), draws._stream.at, {}
    stopping = SimpleNamespace(at=lambda *address: (at(*address), barrier.wait())[0])
    addresses = [ADDRESS, ADDRESS | {"seed": 5, "row": 7}]

    def draw(number):
        found[number] = draws.uniforms(np.empty((3, 7), np.float32), **addresses[number])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "_stream", stopping)
        threads = [threading.Thread(target=draw, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, address in enumerate(addresses):
        assert np.array_equal(found[number], from_the_formula(3, 7, **address))


def test_threads_that_draw_at_once_get_their_own_draws():
    check_threads()


def test_a_generator_shared_by_threads_is_noticed(monkeypatch):
    shared = SimpleNamespace(bits=draws._stream.bits, numbers=draws._stream.numbers, state=draws._stream.state)
    shared.at = MethodType(draws._Stream.at, shared)
    monkeypatch.setattr(draws, "_stream", shared)
    with pytest.raises(AssertionError):
        check_threads()


# Orders


def check_permutation():
    count = 300_000  # about ten pairs of equal words
    address = {"seed": 7, "update": 3, "site": site(Purpose.ORDER), "row": 2**32}
    words = draws.words(count, **address)
    assert np.array_equal(words[:8], np.array([philox_in_python((count // 4 * 2**32 + i & 0xFFFFFFFF,
                          count // 4 * 2**32 + i >> 32, 3, site(Purpose.ORDER)), (7, 0)) for i in range(2)]).ravel())
    assert len(np.unique(words)) < count, "the test needs equal words"
    listed = words.tolist()
    assert draws.permutation(count, **address).tolist() == sorted(range(count), key=listed.__getitem__)


def test_an_order_is_the_stable_argsort_of_its_words():
    check_permutation()


@pytest.mark.parametrize(("line", "fault"), [
    ("np.argsort(words(count, seed=seed, update=update, site=site, row=row), kind=\"stable\")",
     "np.lexsort((np.arange(count)[::-1], words(count, seed=seed, update=update, site=site, row=row)))"),
    ("site=site, row=row), kind=", "site=site), kind="),
    ("site, row * blocks, blocks)", "site, row, blocks)"),
])
def test_a_wrong_order_is_noticed(line, fault):
    assert_notices(check_permutation, draws, line, fault)


# Normals


def check_normals():
    count = 200_003
    z = draws.normals(np.empty((1, count), np.float32), seed=SEED, update=0, site=3)[0].astype(np.float64)
    for power, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96), (0, 945), (15, 10_170)], 1):
        assert abs((z**power).mean() - mean) < 4 * math.sqrt(variance / count), f"moment {power}"
    pairs = z[: count // 2 * 2].reshape(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 4 / math.sqrt(len(pairs)), "the two of a pair are correlated"
    assert abs((pairs[:, 0] ** 2 * pairs[:, 1] ** 2).mean() - 1) < 4 * math.sqrt(8 / len(pairs)), "their squares are"
    z.sort()
    below = np.arange(0, count, 97)
    phi = np.array([(1 + math.erf(x / math.sqrt(2))) / 2 for x in z[below]])
    distance = np.abs(phi - (below + 0.5) / count).max()
    assert distance < 1.63 / math.sqrt(count), f"Kolmogorov-Smirnov distance {distance}"  # the 1 % point


def test_normals_are_standard_normal():
    check_normals()


@pytest.mark.parametrize(("line", "fault"), [
    ("xp.sqrt(-2 * xp.log1p", "xp.sqrt(-1.97 * xp.log1p"),
    ("2 * np.pi * u[:, 1::2]", "np.pi * u[:, 1::2]"),
    ("2 * np.pi * u[:, 1::2]", "2 * np.pi * u[:, 0::2]"),
    ("(radius * xp.sin(angle))", "(radius * xp.cos(angle))"),
])
def test_normals_of_another_shape_are_noticed(line, fault):
    assert_notices(check_normals, draws, line, fault)


def box_muller(u):
    """Pairs of neighbouring uniforms (rows, m), m even, to normals, in float64."""
    u = u.astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log(1 - u[:, 0::2])), 2 * np.pi * u[:, 1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2).reshape(u.shape)


def check_cut_normals():
    for m in (12, 14):
        z = draws.normals(np.empty((3, m), np.float32), **ADDRESS, row=5)
        assert_close(z, box_muller(from_the_formula(3, m, **ADDRESS, row=5)), atol=1e-6)
    whole = draws.normals(np.empty((3, 13), np.float32), **ADDRESS, row=5)
    assert_close(whole, box_muller(from_the_formula(3, 14, **ADDRESS, row=5))[:, :13], atol=1e-6)
    for lo, hi in ((0, 5), (2, 9), (4, 13), (12, 13)):
        part = draws.normals(np.empty((2, hi - lo), np.float32), **ADDRESS, row=6, column=lo, columns=13)
        assert np.array_equal(part, whole[1:, lo:hi])


def test_normals_are_box_muller_on_neighbours_however_they_are_cut():
    check_cut_normals()


def test_a_size_of_layer_that_is_lost_on_the_way_to_the_normals_is_noticed():
    assert_notices(check_cut_normals, draws, "columns = column + m if columns is None else columns\n    uniforms",
                   "columns = column + m\n    uniforms")


# As machine code, where numba is. Without it the same source runs as Python.


def check_compiled(monkeypatch, fill):
    """Many draws, and those of others that the next lines do not compile, are what the formula says."""
    made = []

    def quick(function):
        made.append(function)
        return fill

    monkeypatch.setattr(draws.compiled, "quick", quick)
    monkeypatch.setattr(draws.compiled, "MANY", 24)
    for rows, m, row in ((3, 8, 2**31), (6, 4, 0), (1, 28, 2**61)):
        check_uniforms(rows, m, row, 0, m)
    assert made == [draws.compiled.fill] * 3
    check_uniforms(5, 3, 0, 0, 3)  # rows end within a block
    check_uniforms(2, 8, 0, 0, 8)  # too few
    assert len(made) == 3


def test_draws_as_machine_code_are_what_the_formula_says(monkeypatch):
    check_compiled(monkeypatch, draws.compiled.fill)


@pytest.mark.parametrize(("line", "fault"), [
    ("at >> half, update, site", "at >> half, site, update"),
    ("index + np.uint64(block)", "index"),
    ("range(10)", "range(9)"),
    ("(p1 >> half) ^ c1 ^ a", "(p1 >> half) ^ c1 ^ b"),
    ("word >> np.uint64(8)", "word >> np.uint64(7)"),
])
def test_wrong_machine_code_is_noticed(monkeypatch, line, fault):
    assert_notices(lambda: check_compiled(monkeypatch, draws.compiled.fill), draws.compiled, line, fault)


@pytest.mark.parametrize(("line", "fault"), [
    ("np.uint64(seed & _LOW)", "np.uint64(1)"),
    ("fill(out.reshape(-1), np.uint64(row * blocks)", "fill(out.reshape(-1), np.uint64(row)"),
])
def test_a_wrong_address_of_machine_code_is_noticed(monkeypatch, line, fault):
    assert_notices(lambda: check_compiled(monkeypatch, draws.compiled.fill), draws, line, fault)


def test_machine_code_refuses_addresses_as_all_draws_do(monkeypatch):
    monkeypatch.setattr(draws.compiled, "quick", lambda function: function)
    out = np.empty((draws.compiled.MANY // 4, 4), np.float32)
    with pytest.raises(ValueError, match=r"got seed 1, index 18446744073709551615"):
        draws.uniforms(out, seed=1, update=0, site=0, row=2**64 - 1)


def fake_numba(*, jit=True, keeps=True):
    """A numba that leaves functions as they are."""
    def njit(signature, *, cache=False, nogil, error_model):
        assert signature == "void(float32[::1], uint64, uint64, uint64, uint64, uint64)"
        assert (nogil, error_model) == (True, "numpy")

        def compile_(function):
            if cache and not keeps:
                raise RuntimeError("cannot cache function: no locator available")
            return function
        return compile_

    return SimpleNamespace(njit=njit, config=SimpleNamespace(DISABLE_JIT=not jit))


@pytest.mark.parametrize(("numba", "found"), [
    (fake_numba(), True), (fake_numba(keeps=False), True), (fake_numba(jit=False), False), (None, False)])
def test_machine_code_is_made_where_numba_can(monkeypatch, numba, found):
    monkeypatch.setitem(sys.modules, "numba", numba)  # None: cannot be imported
    assert draws.compiled.quick.__wrapped__(draws.compiled.fill) is (draws.compiled.fill if found else None)


def test_numba_makes_the_same_draws(monkeypatch):
    pytest.importorskip("numba")
    check_compiled(monkeypatch, draws.compiled.quick.__wrapped__(draws.compiled.fill))
