"""One line a call: ``pyattn.logging()`` and ``PYATTN_LOG``."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

import pyattn

Q = torch.randn(1, 2, 5, 8)
MILLISECONDS = re.compile(r"\d+\.\d{3} ms")


def line(op, backend, others, shapes="[1, 2, 5, 8] [1, 2, 5, 8] [1, 2, 5, 8]", dtype="float32"):
    return f"pyattn: attention {op} {dtype} on cpu: query, key, value {shapes}: {backend}, # ms ({others})"


def lines(captured):
    assert captured.out == ""
    return MILLISECONDS.sub("# ms", captured.err).splitlines()


def test_one_line_a_call(capfd):
    q = Q.clone().requires_grad_()
    with pyattn.logging():
        pyattn.attention(q, q, q, backend="reference").sum().backward()
        pyattn.attention(Q.double(), Q.double(), Q[..., :3].double())
    why, shapes = "cpu: computes in float32, the input is float64", "[1, 2, 5, 8] [1, 2, 5, 8] [1, 2, 5, 3]"
    assert lines(capfd.readouterr()) == [
        line("forward", "reference", "cpu: not asked for"),
        line("backward", "reference", "cpu: not asked for"),
        line("forward", "reference", why, shapes, "float64"),
    ]


def test_the_best_backend_needs_no_other(capfd, engine):
    with pyattn.logging():
        pyattn.attention(Q, Q, Q)
    assert lines(capfd.readouterr()) == [line("forward", engine.backend, "reference: not needed")]


def test_nothing_outside_the_block(capfd):
    with pyattn.logging():
        with pyattn.logging():
            pass
        pyattn.attention(Q, Q, Q)
    with pytest.raises(ValueError, match="sum"), pyattn.logging():
        raise ValueError("sum")
    pyattn.attention(Q, Q, Q)
    assert len(lines(capfd.readouterr())) == 1


def test_a_compiled_function_logs_when_it_runs(capfd):
    torch._dynamo.reset()
    compiled = torch.compile(pyattn.attention, backend="aot_eager", fullgraph=True)
    compiled(Q, Q, Q)
    assert lines(capfd.readouterr()) == []
    with pyattn.logging():
        compiled(Q, Q, Q)
    assert len(lines(capfd.readouterr())) == 1


@pytest.mark.parametrize(("value", "count"), [("1", 1), ("0", 0), ("", 0)])
def test_environment(value, count):
    code = "import torch, pyattn; q = torch.randn(1, 2, 5, 8); pyattn.attention(q, q, q)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYATTN_LOG": value}, check=True
    )
    assert process.stderr.count("pyattn: attention forward") == count
