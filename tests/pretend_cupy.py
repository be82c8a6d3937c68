"""A CuPy that is not there: NumPy memory behind CuPy's names and CuPy's strictness, with the kernels run on the CPU.

    with installed() as device:    ``import cupy`` gives this module, and ``gpudbn`` takes its GPU path
        ...
        device.copied              what crossed between host and device, in order

It has only what ``gpudbn`` and the benchmarks use, with CuPy's signatures (held to the real one by
``test_gpu_path.py``, where CuPy is installed), and is never laxer than CuPy 14:

- NumPy cannot touch an array: no conversion, no function, no operator between the two kinds, and
  neither kind indexes or is assigned to the other. CuPy forwards some of these or copies in silence;
  here all of them raise.
- Reductions and single entries are arrays of no dimensions. ``float``, ``int`` and ``bool`` of one
  are counted as what they are: the host waits for the device.
- ``set`` copies late, when the stream gets there: memory of the host that is written again too early
  is seen.
- Streams do nothing for one another but what events ask for. Which of them is ahead can be chosen:
  kernels of the current stream, and copies of others, come at once or as late as events and the
  host allow (``device.late_kernels``, ``device.late_copies``). What is right whichever comes late
  waits for all that it needs.
- In a graph that is being captured may stand what makes no new array.
- MPI may have an array's memory, and is counted if it takes it while the stream still works (``device.unsettled``).
  ``device.driver`` puts arrays where the CPU must not touch them: see ``mpi/pretend_driver``.

``RawModule`` compiles with ``tests/cuda_on_cpu``. Events tell the time of the host, or of another clock.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import inspect
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import numpy as np

from gpudbn import cuda as door


@dataclass
class Device:
    """What the pretended device was asked for."""

    processors: int = 1  # multiprocessors: 1 makes the launcher choose large tiles, 10**9 small ones
    memory: int = 1 << 34  # bytes
    capability: str = "80"
    held: int = 0  # bytes of the arrays that there are
    most_held: int = 0
    copied: list[tuple[str, np.dtype, int]] = field(default_factory=list)  # direction, dtype, entries
    waited: int = 0  # times that the host waited for a number
    synchronised: int = 0  # times that it waited for the stream
    launched: list[str] = field(default_factory=list)  # kernels of ours
    captured: list | None = None  # what is in a graph that is being captured
    graphs: int = 0  # launches of graphs
    busy: bool = False  # whether work was given to the stream since the host last waited for it
    late_kernels: bool = False  # kernels wait until the host or an event needs them
    late_copies: bool = True  # and so do copies of streams that are not the current one
    clock: Callable[[], float] = time.perf_counter  # seconds, of events
    taken: int = 0  # times that MPI took an array's memory
    unsettled: int = 0  # times that it did so while the stream still had work
    driver: object = None  # where new arrays are, if not in the host's memory

    def __post_init__(self) -> None:
        self.main = Stream()
        self.streams = [self.main]  # the last is the current one

    def place(self, memory: np.ndarray) -> np.ndarray:
        """The same, in the memory of the device."""
        if self.driver is None:
            return memory
        found = self.driver.allocate(memory.nbytes).view(memory.dtype).reshape(memory.shape)
        found[...] = memory
        return found

    def holds(self, memory: np.ndarray) -> None:
        """Count these bytes as long as they are there."""
        self.held += memory.nbytes
        self.most_held = max(self.most_held, self.held)
        weakref.finalize(memory, self.gone, memory.nbytes)

    def gone(self, size: int) -> None:
        self.held -= size

    @property
    def stream(self) -> Stream:
        return self.streams[-1]

    def work(self) -> None:
        """The stream gets something to do, and comes to all that was before."""
        assert self.captured is None, "only what makes no new array may go into a graph"
        self.busy = True
        self.stream._run()

    def do(self, work) -> None:
        """The stream does this, or the graph that is being captured will."""
        if self.captured is not None:
            self.captured.append(work)
        else:
            self.work()
            work()

    def launch(self, kernel) -> None:
        """As ``do``, for what may wait until it is needed."""
        if self.captured is not None:
            self.captured.append(kernel)
            return
        self.busy = True
        self.stream._enqueue(kernel)
        if not self.late_kernels:
            self.stream._run()

    def wait(self) -> None:
        self.stream._run()
        self.busy = False

    def copies(self, direction: str) -> list[tuple[np.dtype, int]]:
        """What went ``to device`` or ``to host``."""
        return [(dtype, size) for way, dtype, size in self.copied if way == direction]


class Stream:
    """Work in its order. It is done when somebody waits for it, or at once where the device says so."""

    def __init__(self, null=False, non_blocking=False):
        assert not null
        self.non_blocking, self.ptr = non_blocking, id(self)
        self.queue, self.given, self.done = deque(), 0, 0

    def _enqueue(self, work):
        self.queue.append(work)
        self.given += 1

    def _run(self, until=None):
        """Do what was given, or its first ``until`` pieces."""
        while self.done < (self.given if until is None else until):
            self.done += 1
            self.queue.popleft()()

    def __enter__(self):
        device.streams.append(self)
        return self

    def __exit__(self, *_):
        device.streams.pop()

    def synchronize(self):
        device.synchronised += 1
        self._run()
        device.busy = device.busy and self is not device.stream

    def wait_event(self, event):
        stream, place = event.stream, event.place  # as it is recorded now; it may be recorded again
        if stream is not None:
            self._enqueue(lambda: stream._run(place))

    def begin_capture(self):
        assert self.non_blocking
        assert device.stream is self
        device.captured = []

    def end_capture(self):
        found, device.captured = device.captured, None

        def launch(stream):
            device.graphs += 1
            with stream:
                for work in found:
                    device.launch(work)

        return SimpleNamespace(launch=launch)


class Event:
    """A moment of the device's clock; in truth the host's."""

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        assert (block, interprocess) == (False, False)
        self.timed = not disable_timing
        self.moment, self.stream, self.place = 0.0, None, 0

    def record(self, stream=None):
        self.stream = stream or device.stream
        self.place = self.stream.given
        self.moment = device.clock()

    def synchronize(self):
        if self.stream is not None:
            self.stream._run(self.place)
            device.busy = device.busy and self.stream is not device.stream


device = Device()


class ndarray:  # noqa: N801 - CuPy's name
    """``cupy.ndarray``, as far as ``gpudbn`` uses it."""

    __slots__ = ("_memory",)
    __array_ufunc__ = None  # NumPy's operators give way to those below, and its functions refuse
    __hash__ = None

    __module__ = "cupy"

    def __init__(self, memory: np.ndarray) -> None:
        if memory.base is None:
            memory = device.place(memory)
            device.holds(memory)
        self._memory = memory

    # -- what CuPy refuses ------------------------------------------------------------------------

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a "
                        "NumPy array explicitly.")

    def __array_function__(self, function, *_):
        raise TypeError(f"numpy.{function.__name__} must not be called with an array of the device")

    def __iter__(self):
        raise TypeError("an array of the device must not be walked through by the host")

    # -- what it tells of itself ------------------------------------------------------------------

    dtype = property(lambda self: self._memory.dtype)
    shape = property(lambda self: self._memory.shape)
    strides = property(lambda self: self._memory.strides)
    size = property(lambda self: self._memory.size)
    nbytes = property(lambda self: self._memory.nbytes)
    itemsize = property(lambda self: self._memory.itemsize)
    ndim = property(lambda self: self._memory.ndim)
    T = property(lambda self: ndarray(self._memory.T))

    @property
    def flags(self):
        flags = self._memory.flags
        return SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous, owndata=flags.owndata)

    @property
    def data(self):
        return SimpleNamespace(ptr=self._memory.ctypes.data, device_id=0)

    @property
    def __cuda_array_interface__(self):
        device.taken += 1
        device.unsettled += device.busy or any(stream.queue for stream in device.streams)
        address = device.driver.address(self._memory) if device.driver else self._memory.ctypes.data
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (address, False), "strides": None, "version": 3}

    def __len__(self):
        if not self.ndim:
            raise TypeError("len() of unsized object")
        return len(self._memory)

    # -- between host and device ------------------------------------------------------------------

    def get(self, stream=None, order="C", out=None, blocking=True):
        assert stream is None
        assert order == "C"
        assert blocking
        device.work()
        device.wait()
        device.copied.append(("to host", self.dtype, self.size))
        if out is None:
            return self._memory.copy(order="C")
        if type(out) is not np.ndarray or out.dtype != self.dtype or out.shape != self.shape:
            raise TypeError("get: out must be a NumPy array of the same shape and type")
        if not out.flags.c_contiguous:
            raise RuntimeError("get: out must be C-contiguous")
        out[...] = self._memory
        return out

    def set(self, arr, stream=None):
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if self.shape != arr.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        if not self._memory.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        assert device.captured is None, "a graph would copy from the same place each time"
        device.copied.append(("to device", self.dtype, self.size))
        memory, stream = self._memory, stream or device.stream
        stream._enqueue(lambda: memory.__setitem__(..., arr))
        if not device.late_copies and stream is not device.stream:
            stream._run()

    def item(self):
        device.work()
        device.wait()
        device.waited += 1
        return self._memory.item()

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __bool__(self):
        return bool(self.item())

    def __neg__(self):
        return globals()["negative"](self)

    def __abs__(self):
        return globals()["absolute"](self)

    # -- views and copies -------------------------------------------------------------------------

    def __getitem__(self, slices):
        picks = any(isinstance(part, ndarray) for part in (slices if isinstance(slices, tuple) else (slices,)))
        if picks:
            device.work()
        index = _index(slices)
        if not picks:  # a view, also of a single entry
            index = (*index, ...) if isinstance(index, tuple) and ... not in index else index
            index = index if isinstance(index, tuple) or index is ... else (index, ...)
        return ndarray(self._memory[index])

    def __setitem__(self, slices, value):
        if isinstance(slices, ndarray) and slices.dtype.kind == "b" and not isinstance(value, ndarray):
            index, value = slices._memory, _memory(value)  # one number wherever the mask is: nobody has to count
        else:
            index, value = _index(slices), _memory(value)
        if self._memory.dtype.kind != "c" and np.iscomplexobj(value):
            raise TypeError("complex numbers must not be assigned to real ones")
        device.do(lambda: self._memory.__setitem__(index, value))

    def reshape(self, *shape, order="C", copy=None):
        assert order == "C"
        assert copy is None
        return ndarray(self._memory.reshape(*shape))

    def view(self, dtype=None):
        return ndarray(self._memory.view(dtype))

    def ravel(self, order="C"):
        assert order == "C"
        assert self._memory.flags.c_contiguous, "ravel would copy"
        return ndarray(self._memory.ravel())

    def copy(self, order="C"):
        device.work()
        return ndarray(self._memory.copy(order))

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        assert casting is None
        assert subok is None
        device.work()
        if not copy and self.dtype == dtype:
            return self
        return ndarray(self._memory.astype(dtype, order))

    def fill(self, value):
        value = _memory(value)
        device.do(lambda: self._memory.fill(value))

    # -- reductions -------------------------------------------------------------------------------

    def sum(self, axis=None, dtype=None, out=None, keepdims=False):
        return _reduce(np.sum, self, out, axis=axis, dtype=dtype, keepdims=keepdims)

    def max(self, axis=None, out=None, keepdims=False):
        return _reduce(np.max, self, out, axis=axis, keepdims=keepdims)

    def min(self, axis=None, out=None, keepdims=False):
        return _reduce(np.min, self, out, axis=axis, keepdims=keepdims)

    def all(self, axis=None, out=None, keepdims=False):
        return _reduce(np.all, self, out, axis=axis, keepdims=keepdims)

    def any(self, axis=None, out=None, keepdims=False):
        return _reduce(np.any, self, out, axis=axis, keepdims=keepdims)

    def cumsum(self, axis=None, dtype=None, out=None):
        device.work()
        return _result(np.cumsum(self._memory, axis, dtype, _out(out)), out)

    def argmax(self, axis=None, out=None, dtype=None, keepdims=False):
        assert dtype is None
        return _reduce(np.argmax, self, out, axis=axis, keepdims=keepdims)


def _memory(value):
    """What NumPy computes with: the memory of an array of the device, or a number."""
    if isinstance(value, ndarray):
        return value._memory
    if isinstance(value, (bool, int, float, np.generic)):
        return value
    raise TypeError(f"Unsupported type {type(value)}")


def _index(slices):
    """An index, of which no part is an array of the host."""
    def part(one):
        if isinstance(one, ndarray):
            if one.dtype.kind == "b":
                raise NotImplementedError("a mask would make the host wait for the number of its entries")
            return one._memory
        if one is None or one is Ellipsis or isinstance(one, (int, np.integer, slice)):
            return one
        raise TypeError(f"an array of the device must not be indexed by {type(one)}")

    return tuple(map(part, slices)) if isinstance(slices, tuple) else part(slices)


def _out(out):
    """The memory of an output."""
    if out is not None and not isinstance(out, ndarray):
        raise TypeError("return arrays must be of ArrayType")
    return None if out is None else out._memory


def _result(value, out=None):
    return out if out is not None else ndarray(np.asarray(value))


def _reduce(function, array, out, **how):
    if not isinstance(array, ndarray):
        raise TypeError(f"Argument 'array' has incorrect type (expected cupy.ndarray, got {type(array)})")
    device.work()
    with np.errstate(all="ignore"):
        return _result(function(array._memory, **how, out=_out(out)), out)


# ------------------------------------------------------------------------------------------ functions


class ufunc:  # noqa: N801 - CuPy's name
    """An elementwise function, made of NumPy's."""

    def __init__(self, function: np.ufunc) -> None:
        self.function, self.nin = function, function.nin

    def __call__(self, *args, **kwargs):
        if len(args) != self.nin:
            raise TypeError(f"{self.function.__name__}: must get {self.nin} arrays, and the output by name")
        out, dtype = kwargs.pop("out", None), kwargs.pop("dtype", None)
        casting = kwargs.pop("casting", "same_kind")
        if kwargs:
            raise TypeError(f"Wrong arguments {kwargs}")
        given = [_memory(arg) for arg in args]
        if not any(isinstance(arg, ndarray) for arg in args):
            raise TypeError(f"{self.function.__name__}: one of its arguments must be an array of the device")
        into = _out(out)

        def compute():
            with np.errstate(all="ignore"):
                return self.function(*given, out=into, dtype=dtype, casting=casting)

        if out is None:
            device.work()
            return ndarray(np.asarray(compute()))
        device.do(compute)
        return out


UFUNCS = ("absolute", "add", "bitwise_and", "bitwise_or", "bitwise_xor", "cos", "divide", "equal", "exp", "greater",
          "greater_equal", "isfinite", "left_shift", "less", "less_equal", "log", "log1p", "logaddexp", "maximum",
          "minimum", "multiply", "negative", "not_equal", "power", "right_shift", "rint", "sin", "sqrt", "square",
          "subtract", "tanh")
for _name in UFUNCS:
    globals()[_name] = ufunc(getattr(np, _name))

OPERATORS = {"add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "pow": "power",
             "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "lshift": "left_shift",
             "rshift": "right_shift", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
             "eq": "equal", "ne": "not_equal"}


def _operators():
    """The operators of arrays: both orders, and in place."""
    for short, name in OPERATORS.items():
        function = globals()[name]
        setattr(ndarray, f"__{short}__", lambda self, other, f=function: f(self, other))
        if short not in ("lt", "le", "gt", "ge", "eq", "ne"):
            setattr(ndarray, f"__r{short}__", lambda self, other, f=function: f(other, self))
            setattr(ndarray, f"__i{short}__", lambda self, other, f=function: f(self, other, out=self))
    ndarray.__matmul__ = matmul
    ndarray.__rmatmul__ = lambda self, other: matmul(other, self)


def matmul(*args, axes=None, axis=None, keepdims=False, casting="same_kind", dtype=None, signature=None, order="K",
           out=None):
    assert (axes, axis, keepdims, casting, dtype, signature, order) == (None, None, False, "same_kind", None, None, "K")
    a, b = args
    if not isinstance(a, ndarray) or not isinstance(b, ndarray):
        raise TypeError(f"Unsupported type {type(b) if isinstance(a, ndarray) else type(a)}")
    if out is not None:
        if np.result_type(a.dtype, b.dtype) != out.dtype:
            raise ValueError("Not supported dtype combination.")
        if not _out(out).flags.c_contiguous:
            raise ValueError("Output array must be C-contiguous")
    device.work()
    with np.errstate(all="ignore"):
        return _result(np.matmul(a._memory, b._memory, out=_out(out)), out)


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    assert order is None
    assert copy is None
    assert not blocking
    if isinstance(a, ndarray):
        return a if dtype is None or a.dtype == dtype else a.astype(dtype)
    if not isinstance(a, np.ndarray):
        raise TypeError(f"asarray: must get an array; got {type(a)}")
    if a.dtype.kind not in "biuf" or not a.dtype.isnative:
        raise ValueError(f"Unsupported dtype {a.dtype}")
    device.work()
    device.copied.append(("to device", a.dtype, a.size))
    return ndarray(np.array(a, dtype, order="C"))  # goes through memory of CuPy's own: not late


def ascontiguousarray(a, dtype=None):
    device.work()
    return ndarray(np.array(_array(a)._memory, dtype, order="C"))


def _array(a):
    if not isinstance(a, ndarray):
        raise TypeError(f"must get an array of the device; got {type(a)}")
    return a


def empty(shape, dtype=float, order="C"):
    """What was there before: ones in every bit, which are NaNs."""
    memory = np.empty(shape, dtype, order)
    if memory.size:
        memory.reshape(-1).view(np.uint8)[...] = 255
    return ndarray(memory)


def zeros(shape, dtype=float, order="C"):
    device.work()
    return ndarray(np.zeros(shape, dtype, order))


def ones(shape, dtype=float, order="C"):
    device.work()
    return ndarray(np.ones(shape, dtype, order))


def full(shape, fill_value, dtype=None, order="C"):
    device.work()
    return ndarray(np.full(shape, _memory(fill_value), dtype, order))


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    assert (order, subok, shape) == ("K", None, None)
    return empty(_array(prototype).shape, dtype or prototype.dtype)


def zeros_like(a, dtype=None, order="K", subok=None, shape=None):
    assert (order, subok, shape) == ("K", None, None)
    return zeros(_array(a).shape, dtype or a.dtype)


def eye(N, M=None, k=0, dtype=float, order="C"):
    assert (k, order) == (0, "C")
    device.work()
    return ndarray(np.eye(N, M, dtype=dtype))


def arange(start, stop=None, step=1, dtype=None):
    device.work()
    return ndarray(np.arange(0, start, step, dtype) if stop is None else np.arange(start, stop, step, dtype))


def concatenate(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    assert (axis, out, dtype, casting) == (0, None, None, "same_kind")
    device.work()
    return ndarray(np.concatenate([_array(a)._memory for a in tup]))


def stack(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    assert (out, dtype, casting) == (None, None, "same_kind")
    device.work()
    return ndarray(np.stack([_array(a)._memory for a in tup], axis))


def where(condition, x=None, y=None):
    device.work()
    return ndarray(np.where(_array(condition)._memory, _memory(x), _memory(y)))


def packbits(a, axis=None, bitorder="big"):
    assert (axis, bitorder) == (None, "big")
    device.work()
    return ndarray(np.packbits(_array(a)._memory))


def unpackbits(a, axis=None, bitorder="big"):
    assert (axis, bitorder) == (None, "big")
    device.work()
    return ndarray(np.unpackbits(_array(a)._memory))


def copyto(dst, src, casting="same_kind", where=None):
    assert where is None
    to, source = _array(dst)._memory, _array(src)._memory
    device.do(lambda: np.copyto(to, source, casting=casting))


def clip(a, a_min, a_max, out=None):
    device.work()
    return _result(np.clip(_array(a)._memory, _memory(a_min), _memory(a_max), out=_out(out)), out)


def tile(A, reps):
    device.work()
    return ndarray(np.tile(_array(A)._memory, reps))


def get_default_memory_pool():
    return SimpleNamespace(free_bytes=lambda: 0)


def sum(a, axis=None, dtype=None, out=None, keepdims=False):  # noqa: A001 - CuPy's name
    return _array(a).sum(axis, dtype, out, keepdims)


# ------------------------------------------------------------------------------- kernels and the device


class RawModule:
    """CUDA source, run on the CPU."""

    def __init__(self, *, code, options=(), enable_cooperative_groups=False):
        from tests.cuda_on_cpu import runtime

        self.module = runtime.Module(code, options, enable_cooperative_groups)

    def get_function(self, name):
        function = self.module.get_function(name)

        def launch(grid, block, args, *, shared_mem=0):
            given = tuple(a._memory if isinstance(a, ndarray) else a for a in args)

            def kernel():
                device.launched.append(name)
                function.max_dynamic_shared_size_bytes = launch.max_dynamic_shared_size_bytes
                function(grid, block, given, shared_mem=shared_mem)

            device.launch(kernel)

        launch.max_dynamic_shared_size_bytes = function.max_dynamic_shared_size_bytes
        return launch


class _Device:
    def __init__(self, device=None):
        self.id = device or 0

    @property
    def attributes(self):
        return {"MultiProcessorCount": device.processors, "MaxSharedMemoryPerBlockOptin": 227 << 10}

    compute_capability = property(lambda _: device.capability)

    @property
    def mem_info(self):
        return device.memory - device.held, device.memory

    def use(self):
        """There is no other."""

    def synchronize(self):
        Stream().synchronize()


def get_elapsed_time(start_event, end_event):
    assert start_event.timed
    assert end_event.timed
    return 1000 * (end_event.moment - start_event.moment)


runtime = SimpleNamespace(
    getDeviceCount=lambda: 1, getDevice=lambda: 0,
    getDeviceProperties=lambda number: {"name": b"pretended, kernels on the CPU", "number": number},
    runtimeGetVersion=lambda: 0, driverGetVersion=lambda: 0)
cuda = SimpleNamespace(runtime=runtime, Device=_Device, Stream=Stream, Event=Event, get_elapsed_time=get_elapsed_time,
                       get_current_stream=lambda: device.stream, alloc_pinned_memory=bytearray)

random = SimpleNamespace(random=lambda size, dtype: ndarray(np.random.default_rng().random(size, dtype)))

FUNCTIONS = ("arange", "asarray", "ascontiguousarray", "clip", "concatenate", "copyto", "empty", "empty_like", "eye",
             "full", "get_default_memory_pool", "matmul", "ones", "packbits", "stack", "sum", "tile", "unpackbits",
             "where", "zeros", "zeros_like")
_operators()


def module() -> ModuleType:
    """What ``import cupy`` is to give."""
    cupy = ModuleType("cupy", __doc__)
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    cupy.__version__ = "0"
    for name in (*FUNCTIONS, *UFUNCS, "ndarray", "RawModule", "cuda", "random"):
        setattr(cupy, name, globals()[name])
    return cupy


@contextlib.contextmanager
def installed(processors: int = 1):
    """While it lasts, ``import cupy`` gives the pretended one; yields what it is asked for."""
    global device
    before, device = sys.modules.get("cupy"), Device(processors)
    door.gpu.cache_clear()
    sys.modules["cupy"] = module()
    try:
        yield device
    finally:
        door.gpu.cache_clear()
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before


def signature(function) -> list[tuple[str, object]] | None:
    """Names and defaults of a function's parameters: also of CuPy's compiled ones, from their documentation."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        first = (function.__doc__ or "").partition("\n")[0].partition(" -> ")[0]
        if "(" not in first:
            return None
        found: dict = {}
        exec(f"def f{first[first.index('('):]}: pass", found)  # noqa: S102
        parameters = inspect.signature(found["f"]).parameters.values()
    return [(p.name, p.default) for p in parameters]
