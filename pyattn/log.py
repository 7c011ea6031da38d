"""One line a call on stderr: which backend computed what, why not the others, and how long it took."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from pyattn import dispatch
from pyattn.dispatch import AnyProblem

T = TypeVar("T")

depth = int(os.environ.get("PYATTN_LOG") == "1")  # calls are logged while this is above 0


@contextlib.contextmanager
def logging() -> Iterator[None]:
    """Logs every call of the process within a ``with`` block, one line each on stderr.

    A line names the op, forward or backward, the shapes, the dtype and the device, the backend that ran, why the
    others did not, and the milliseconds that it took; on a device the call is waited for. ``PYATTN_LOG=1`` in the
    environment logs the whole process. A compiled function logs when it runs.

    Example:
        >>> import torch, pyattn
        >>> q = torch.randn(1, 2, 5, 8)
        >>> with pyattn.logging():
        ...     out = pyattn.attention(q, q, q)
    """
    global depth
    depth += 1
    try:
        yield
    finally:
        depth -= 1


def _synchronize(problem: AnyProblem) -> None:
    if problem.device.type != "cpu":
        torch.accelerator.synchronize(problem.device)


def timed(problem: AnyProblem, requested: str, call: Callable[[], T]) -> T:
    """What ``call`` returns, which computes ``problem``, after a line about it."""
    _synchronize(problem)
    start = time.perf_counter()
    result = call()
    _synchronize(problem)
    milliseconds = 1e3 * (time.perf_counter() - start)
    chosen = dispatch.choose(problem) if requested == "auto" else requested
    others = [
        f"{name}: {', '.join(reasons) or ('not needed' if requested == 'auto' else 'not asked for')}"
        for name, reasons in dispatch.table(problem)
        if name != chosen
    ]
    print(
        f"pyattn: {problem.family} {problem.op} {problem.operands}: "
        f"{chosen}, {milliseconds:.3f} ms ({'; '.join(others)})",
        file=sys.stderr,
        flush=True,
    )
    return result
