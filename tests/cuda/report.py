"""At the end of a test run: what was done with each kernel, and what was not."""

from __future__ import annotations

from collections import defaultdict

import pytest

from gpudbn import arrays, cuda

_done: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))


def record(kernel: str, rung: str, detail: str = "") -> None:
    """Note that a kernel has passed: rung is ``compiled`` (detail: for what), ``on CPU`` (schedule) or ``on GPU``."""
    if detail not in _done[kernel][rung]:
        _done[kernel][rung].append(detail)


def pytest_sessionfinish(session):
    """A worker of pytest-xdist hands over what it knows."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["kernels"] = {kernel: dict(done) for kernel, done in _done.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for kernel, rungs in getattr(node, "workeroutput", {}).get("kernels", {}).items():
        for rung, details in rungs.items():
            for detail in details:
                record(kernel, rung, detail)


def pytest_terminal_summary(terminalreporter):
    if not _done:
        return
    no_gpu = arrays.why_no_gpu()
    terminalreporter.section("kernels")
    rows = [("", "compiled for", "run on CPU", "run on GPU")]
    for kernel in cuda.KERNELS:
        done = _done[kernel]
        rows.append((kernel, " ".join(done["compiled"]) or "no", " ".join(done["on CPU"]) or "no",
                     "yes" if done["on GPU"] else "no"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        terminalreporter.write_line("  ".join(cells).rstrip())
    if no_gpu:
        terminalreporter.write_line(f"no kernel was run on a GPU: {no_gpu}")
