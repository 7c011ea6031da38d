"""Measured tile sizes: ``<arch>.json`` beside this file, written only by ``benchmarks/tune.py``.

A table maps keys as ``key`` makes them to the fields of ``pyattn.kernels.launch.Tiles``. What a table lacks is
the backend's heuristic to answer; nothing is ever tuned when attention is called.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

FOLDER = Path(__file__).parent


def key(op: str, dtype: str, head_dim: int, causal: bool, version: str) -> str:
    """The key of an entry; ``version`` is the compiler's, without its patch level.

    >>> key("forward", "bfloat16", 128, True, "3.6")
    'forward bfloat16 d128 causal triton-3.6'
    """
    return f"{op} {dtype} d{head_dim} {'causal' if causal else 'full'} triton-{version}"


@functools.cache
def table(arch: str) -> dict[str, dict[str, int]]:
    """All entries for a GPU architecture, such as "sm_90" or "gfx942"; empty if nobody has measured it."""
    path = FOLDER / f"{arch}.json"
    return json.loads(path.read_text()) if path.exists() else {}
