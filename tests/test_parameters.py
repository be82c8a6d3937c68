"""Named views of one flat buffer."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn.parameters import Parameters, rbm_shapes


def test_views_lie_end_to_end_in_their_order_and_share_memory_with_the_buffer():
    p = Parameters({"W": (7, 5), "b": (7,), "c": (5,), "scalar": (), "none": (0, 3)})
    assert p.size == 48
    assert p.flat.dtype == np.float32
    assert not p.flat.any()
    assert list(p) == ["W", "b", "c", "scalar", "none"]
    assert p.offsets == {"W": 0, "b": 35, "c": 42, "scalar": 47, "none": 48}
    p.flat[...] = np.arange(48)
    assert p["W"][1, 2] == 7
    assert p["b"].tolist() == list(range(35, 42))
    p["c"][...] = -1
    assert (p.flat[42:47] == -1).all()
    assert p.flat[47] == 47
    assert p["scalar"] == 47


def test_an_rbm_is_w_then_b_then_c():
    assert list(rbm_shapes(7, 5).items()) == [("W", (7, 5)), ("b", (7,)), ("c", (5,))]


def test_a_given_buffer_is_used_not_copied():
    flat = np.arange(47, dtype=np.float32)
    p = Parameters(rbm_shapes(7, 5), flat=flat)
    p["W"][0, 0] = 99
    assert flat[0] == 99
    assert p.flat is flat


def test_copies_and_zeros_share_nothing():
    p = Parameters(rbm_shapes(7, 5))
    p.flat[...] = 3
    copy, zeros = p.copy(), p.zeros_like()
    p.flat[...] = 4
    assert (copy.flat == 3).all()
    assert (copy["c"] == 3).all()
    assert copy.shapes == zeros.shapes == p.shapes
    assert not zeros.flat.any()


@pytest.mark.parametrize("flat", [np.zeros(46, np.float32), np.zeros(47, np.float64), np.zeros((47, 1), np.float32)])
def test_a_buffer_of_another_size_or_type_is_refused(flat):
    with pytest.raises(ValueError, match=r"Parameters: flat must be float32 of shape \(47,\)"):
        Parameters(rbm_shapes(7, 5), flat=flat)
