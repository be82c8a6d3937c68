"""Named ranges for ``nsys``: what the program was doing, beside what the GPU did.

    with span("exchange"): ...

``benchmarks/tracing.py`` measures what a range costs when nobody listens: about 0.25 us.
"""

from __future__ import annotations

from functools import cache

import nvtx

DOMAIN = "gpudbn"


@cache  # to make a range costs three times as much as to open and close one, and it keeps no state
def span(name: str) -> nvtx.annotate:
    """A context manager that names a stretch of time in the profile. Names are few: they are kept."""
    return nvtx.annotate(name, domain=DOMAIN)
