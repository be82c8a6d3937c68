"""What a run needs of a GPU's memory is what it allocates; rows stream where they have no room."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import memory, train, unfused
from gpudbn.arrays import is_gpu
from gpudbn.cuda.persistent import work_words
from gpudbn.dbn import DBN
from gpudbn.errors import UserError
from gpudbn.loop import Training
from gpudbn.memory import RESERVE, data_bytes, model_bytes, settle
from gpudbn.mpi.alone import Alone
from tests.cuda_on_cpu import runtime
from tests.helpers import planted
from tests.pretend_cupy import installed
from tests.test_graphs import Asynchronous
from tests.test_loop import small_data, small_settings

NO_KERNELS = pytest.mark.skipif(runtime.why_not() is not None, reason=f"no kernel runs here: {runtime.why_not()}")
DATA = small_data(n=499)
# so wide that what is not counted, numbers and flags, is little beside the rest
OPTIONS = [{"layers": (301,), "finetune_epochs": 0}, {"layers": (301, 211), "method": "pcd", "finetune_epochs": 0},
           {"layers": (101, 97), "finetune_epochs": 1}, {"layers": (101,), "optimiser": "sgd", "finetune_epochs": 1},
           {"layers": (7,), "batch": 51, "finetune_epochs": 0},
           {"layers": (301,), "order": "fixed", "finetune_epochs": 0},
           {"layers": (301,), "kernels": "unfused", "finetune_epochs": 0},
           {"layers": (301,), "kernels": "unfused", "precision": "exact", "finetune_epochs": 0},
           {"layers": (301,), "kernels": "auto", "finetune_epochs": 0}]


def wide(**options):
    base = {"batch": 17, "finetune_batch": 17, "epochs": 1, "finetune_epochs": 2, "kernels": "predicted"}
    return small_settings(**{**base, **options})


def check_sizes(options, exchange=None):
    settings = wide(**options)
    with installed(10**9) as device, pytest.MonkeyPatch.context() as patch:
        import cupy

        patch.setattr(unfused, "AT_ONCE", 1000)  # what a draw needs is in the reserve
        dbn, data = DBN([DATA.n, *settings.layers], cupy), DATA.to(cupy)
        before = device.held - sum(rbm.parameters.flat.nbytes for rbm in dbn.layers)
        list(Training(dbn, data, settings, exchange or Alone()).run())
        found = device.most_held - before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "MEASURED", 51)  # there are no more rows
        own = exchange is not None
        counted = sum(model_bytes(settings, [DATA.n, *settings.layers], 3, shards_rows=own).values())
    assert 0.9 * found <= counted <= 1.8 * found, f"{found} bytes at most; {counted} were counted"


@NO_KERNELS
@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_counted_is_what_is_allocated(options):
    check_sizes(options)


@NO_KERNELS
@pytest.mark.parametrize(("line", "fault", "case"), [
    ("vectors = 3 +", "vectors = 1 +", 0),
    ("else pieces + 2", "else 3", 5),
    ("[w + n + m for w", "[n + m for w", 1),
])
def test_a_size_that_is_forgotten_is_noticed(line, fault, case):
    with planted(memory, line, fault), pytest.raises(AssertionError, match="were counted"):
        check_sizes(OPTIONS[case])


@pytest.mark.parametrize(("options", "there"), [
    ({"kernels": "persistent"}, True), ({"kernels": "auto", "precision": "bf16x2"}, True),
    ({"kernels": "auto", "precision": "bf16x2", "batch": 129}, False),
    ({"kernels": "auto", "precision": "fp32"}, False),
    ({"kernels": "graph", "precision": "bf16x2"}, False)])
def test_where_the_persistent_path_may_be_taken_the_rows_of_a_turn_have_room(options, there):
    """Those of greys, and the kernel's own copy of them."""
    settings = wide(layers=(301,), finetune_epochs=0, **{"batch": 100, **options})
    counted = model_bytes(settings, [499, 301], 3)["rows of a launch"]
    states = 4 * (work_words(499, 301, memory.TURN, levels=255, last_mean=False)
                  - work_words(499, 301, 0, levels=255, last_mean=False))
    assert counted == (memory.TURN * 100 * 499 * 4 + states if there else 0)


def test_replicas_with_rows_of_their_own_have_more_vectors():
    """The parameters before a turn and the change; a velocity; a centre and the replica's own."""
    layer = 4 * (499 * 301 + 499 + 301)
    for options, vectors in (({}, 2), ({"mode": "local"}, 2), ({"mode": "local", "outer": "nesterov"}, 3),
                             ({"mode": "local", "outer": "elastic"}, 4)):
        settings = wide(layers=(301,), finetune_epochs=0, **options)
        assert model_bytes(settings, [499, 301], 3, shards_rows=True)["changes"] == vectors * layer
        assert model_bytes(settings, [499, 301], 3)["changes"] == 0


@NO_KERNELS
def test_what_a_replica_of_its_own_rows_allocates_is_counted():
    class Exchanging(Asynchronous):
        def exchange(self, parameters, before, fetch=True):  # noqa: ARG002
            before += parameters - before

    exchange = Exchanging()
    exchange.replica = 0
    check_sizes({"layers": (301,), "finetune_epochs": 0}, exchange)
    with planted(memory, "FLOAT * shards_rows * (2", "-FLOAT * shards_rows * (2"), pytest.raises(AssertionError):
        check_sizes({"layers": (301,), "finetune_epochs": 0}, exchange)


def settled(free, **options):
    with installed():
        import cupy

        data, labelled, place = settle(wide(**options), DATA, None, cupy, free)
        assert labelled is None
        return is_gpu(data.train.array), place


def test_rows_are_resident_where_there_is_room_and_stream_where_there_is_none():
    settings = wide()
    model = sum(model_bytes(settings, [DATA.n, *settings.layers], 3).values()) + RESERVE
    rows = data_bytes(DATA)
    assert rows == 71 * (499 * 4 + 4) + 51 * 8
    assert settled(model + rows) == (True, "rows (142.4 kB) resident")
    with pytest.raises(UserError, match=r"--device: must have memory for the model; got 13\d.\d MB free for 13\d.\d MB "
                                        r"\(parameters .*, velocity and gradients .*, activations .*, measuring .*, "
                                        r"reserve 134.2 MB, rows 142.4 kB\). Take smaller --layers or --batch"):
        settled(model + rows - 1)
    assert settled(model + rows, resident="no") == (False, "rows (142.4 kB) stream from the host")
    assert settled(model + rows, resident="yes") == (True, "rows (142.4 kB) resident")


def test_rows_that_are_more_than_their_buffers_stream(monkeypatch):
    monkeypatch.setattr(memory, "AT_ONCE", 1000)  # 17 rows of 499 floats are more
    settings = wide()
    model = sum(model_bytes(settings, [DATA.n, *settings.layers], 3).values()) + RESERVE
    buffers = 2 * 17 * 499 * 4
    assert settled(model + data_bytes(DATA) - 1) == (False, "rows (142.4 kB) stream from the host")
    assert settled(model + buffers) == (False, "rows (142.4 kB) stream from the host")
    with pytest.raises(UserError, match="--device: must have memory for the model"):
        settled(model + buffers - 1)
    with pytest.raises(UserError, match="--resident: must be auto or no where the rows do not fit; got yes, and"):
        settled(model + buffers, resident="yes")


def test_on_a_cpu_nothing_is_asked():
    assert settle(wide(), DATA, None, np) == (DATA, None, "")


@NO_KERNELS
def test_the_command_streams_and_says_so(tmp_path, capsys):
    small = ["--layers", "24", "--epochs", "1", "--finetune-epochs", "1", "--batch", "200", "--plots", "off",
             "--kernels", "predicted"]
    with installed(10**9) as device:
        assert train.main([*small, "--device", "gpu", "--resident", "no", "--out", str(tmp_path / "one")]) == 0
        assert "GPU 0 of 1 (pretended, kernels on the CPU); rows (" in (out := capsys.readouterr().out)
        assert ") stream from the host" in out
        assert "layer 1    updates by path graph (the first choice)" in out
        assert "finetune  updates by path fused (no graph: its products are cuBLAS's" in out
        assert train.main([*small, "--device", "gpu", "--resident", "yes", "--out", str(tmp_path / "two")]) == 0
        assert "resident; one process" in capsys.readouterr().out
        device.memory = 10**8
        assert train.main([*small, "--device", "gpu", "--out", str(tmp_path / "three")]) == 2
        assert "--device: must have memory for the model; got 100.0 MB" in capsys.readouterr().err
    one, two = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("one", "two"))
    assert one == two
