"""One replica without MPI: the answers that a training loop expects."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn.errors import UserError
from gpudbn.mpi.alone import Alone


def test_alone():
    exchange = Alone()
    assert (exchange.replica, exchange.replicas, exchange.local_replica) == (0, 1, 0)
    assert exchange.chief
    assert not exchange.cuts_batches
    parameters, before = np.arange(5, dtype=np.float32), np.zeros(5, np.float32)
    exchange.begin(parameters)
    exchange.exchange(parameters, before)
    exchange.meet(parameters)
    exchange.add_(parameters)
    assert (parameters == np.arange(5)).all()
    assert (before == 0).all()
    table = np.arange(6.0).reshape(3, 2)
    assert (exchange.total(table) == table).all()
    assert exchange.any(True)
    assert not exchange.any(False)
    assert exchange.collect(table)[0] is table
    exchange.agree(None)
    with pytest.raises(UserError, match="data: must be there"):
        exchange.agree("data: must be there")
    assert exchange.report()["seconds"]["waiting"] == 0
    exchange.close()


def test_add_in_order_is_a_left_fold():
    partials = [np.float32([[1e8, 1]]), np.float32([[1, 2]]), np.float32([[-1e8, 3]])]
    sums = np.full((1, 2), np.nan, np.float32)
    Alone().add_in_order_(sums, partials)
    assert (sums == ((partials[0] + partials[1]) + partials[2])).all()
    assert sums[0, 0] == 0  # not 1, as in another order
    Alone().add_in_order_(sums, [])
    assert (sums == 0).all()
