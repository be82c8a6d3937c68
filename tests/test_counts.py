"""The launches that predictions count are those that training makes, on a pretended device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import counts
from tests import pretend_cupy
from tests.cuda_on_cpu import runtime
from tests.pretend_cupy import installed
from tests.test_gpu_path import on_device
from tests.test_loop import small_settings


def launched(monkeypatch, kernels, epochs, k):
    """What a device is given to do in an epoch of one layer: kernels of ours and operations of CuPy."""
    with installed() as device, monkeypatch.context() as patch:
        count = 0
        work = pretend_cupy.Device.work

        def counted(this):
            nonlocal count
            count += 1
            work(this)

        patch.setattr(pretend_cupy.Device, "work", counted)
        settings = small_settings(layers=(11,), epochs=epochs, finetune_epochs=0, kernels=kernels, k=k, decay=0.01)
        run = on_device(replace(settings, batch=51))  # one update an epoch
        patch.setattr(run, "_measure", lambda phase: {f"{name}_validation": 0.0 for name in phase.measures})
        records = run.run()
        next(records)
        first = count + len(device.launched)
        for _ in range(epochs - 1):
            next(records)
        return (count + len(device.launched) - first) / (epochs - 1)


@pytest.mark.skipif(runtime.why_not() is not None, reason=f"no kernel runs here: {runtime.why_not()}")
@pytest.mark.parametrize("k", [1, 2])
def test_launches_of_an_update_are_those_that_are_counted(monkeypatch, k):
    """The same epoch with another k, so that what is once an epoch drops out; and the two paths beside each other."""
    fused, plain = (launched(monkeypatch, kernels, 3, k) for kernels in ("fused", "unfused"))
    more_fused, more_plain = (launched(monkeypatch, kernels, 3, k + 1) for kernels in ("fused", "unfused"))
    assert more_fused - fused == counts.launches("fused", k + 1) - counts.launches("fused", k)
    assert more_plain - plain == counts.launches("unfused", k + 1) - counts.launches("unfused", k)
    noted = 2 * 3  # is everything finite? Twice an epoch, in four launches instead of one
    assert plain - fused - noted == counts.launches("unfused", k) - counts.launches("fused", k)


def test_the_floors_are_those_of_the_design():
    """10 B n m flops at 790 TFLOP/s."""
    for sizes, floor in zip(counts.CASES, (0.5, 2.5, 217, 13_900), strict=True):
        found = counts.prediction("graph", "bf16", *sizes)
        assert abs(found["floor"] / floor - 1) < 0.02
        assert found["us of products"] == found["floor"]


def test_every_row_is_printed_and_in_the_readme():
    assert counts.table().count("\n") == len(counts.rows()) + 1
    page = (Path(counts.__file__).parent / "README.md").read_text("utf-8")
    assert counts.table() in page, "python -m benchmarks.counts gives another table"
