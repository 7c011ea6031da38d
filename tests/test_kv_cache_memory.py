"""A long cache costs itself and little more, however long it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "length", [100_000, pytest.param(1_000_000, marks=pytest.mark.exhaustive)], ids=["short", "long"]
)
@pytest.mark.parametrize("page_size", [None, 16], ids=["dense", "paged"])
def test_memory_beyond_the_cache(length, page_size):
    command = [sys.executable, str(Path(__file__).with_name("kv_cache_memory.py")), str(length)]
    command += [] if page_size is None else [str(page_size)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    print(process.stdout)
    found = json.loads(process.stdout)
    if found["beyond_the_cache_mb"] is None:
        pytest.skip("the system does not tell the peak of a process")
    assert found["cache_mb"] > length * 64 * 2 * 2 / 1e6
    assert found["beyond_the_cache_mb"] <= 64
