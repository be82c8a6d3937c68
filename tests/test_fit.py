"""Training from Python on arrays: the same as the schedule on the same rows, and refusals in one line."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import DBN
from gpudbn.errors import UserError
from gpudbn.fit import finetune, pretrain
from gpudbn.loop import Training
from gpudbn.mpi.alone import Alone
from tests.test_loop import small_data, small_settings

OPTIONS = {"epochs": 3, "batch": 8, "finetune_batch": 10, "momentum_epochs": 1, "input_dropout": 0.1,
           "learning_rate": 0.1, "finetune_epochs": 4, "finetune_patience": 2}


def rows_of(part):
    x = np.empty((len(part), part.n), np.float32)
    part.take(np.arange(len(part)), x)
    return x, part.take_labels(np.arange(len(part)))


def test_pretraining_and_fine_tuning_on_arrays_are_those_of_a_run():
    data = small_data()
    (x, y), held = rows_of(data.train), rows_of(data.validation)
    dbn, seen = DBN([13, 11, 7]), []
    records = pretrain(dbn, x, validation=held[0], report=seen.append, **{**OPTIONS, "finetune_epochs": 0})
    assert records == seen
    assert [r["layer"] for r in records] == [1, 1, 1, 2, 2, 2]
    assert dbn.classifier is None
    whole = Training(DBN([13, 11, 7]), data, small_settings(), Alone())
    list(whole.run())
    for ours, theirs in zip(dbn.layers, whole.dbn.layers, strict=True):
        assert np.array_equal(ours.parameters.flat, theirs.parameters.flat)
    before = [rbm.parameters.flat.copy() for rbm in dbn.layers]
    tuned = finetune(dbn, x, y, validation=held, **OPTIONS)
    assert {r["phase"] for r in tuned} == {"finetune"}
    assert all(np.array_equal(a, rbm.parameters.flat) for a, rbm in zip(before, dbn.layers, strict=True))
    assert (dbn.predict(x) == y).mean() > 1 / 3
    assert dbn.classifier["c2"].size == 3


def test_fine_tuning_again_starts_from_the_layers_and_takes_other_classes():
    x, y = rows_of(small_data().train)
    dbn = DBN([13, 11])
    pretrain(dbn, x, epochs=1)
    finetune(dbn, x, y, finetune_epochs=1)
    finetune(dbn, x, y % 2, finetune_epochs=1)
    assert dbn.predict_probabilities(x).shape == (51, 2)


@pytest.mark.parametrize(("call", "message"), [
    (lambda d, x, _: pretrain(d, x[:, :5]), "x: rows must have 13 columns to fit the network; got 5"),
    (lambda d, x, _: pretrain(d, x * 3), r"x: values must lie in \[0, 1\]"),
    (lambda d, x, _: pretrain(d, x, epoch=3), "settings: must be names that gpudbn.train has as options; got .*epoch"),
    (lambda d, x, _: pretrain(d, x, validation=x[:, 1:]), "validation: rows must have 13 columns"),
    (lambda d, x, y: finetune(d, x, y[:-1]), "labels"),
    (lambda d, x, y: finetune(d, x, y, finetune_epochs=0), "finetune: finetune_epochs must be at least 1; got 0"),
])
def test_what_is_wrong_is_one_line(call, message):
    x, y = rows_of(small_data().train)
    with pytest.raises(UserError, match=message) as error:
        call(DBN([13, 11]), x, y)
    assert "\n" not in str(error.value)
