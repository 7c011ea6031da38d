"""The command line, end to end on small problems: every column of the table comes from a real run."""

from __future__ import annotations

import json

import pytest

from pyattn import cli


def test_info_names_every_backend(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "backend cpu" in printed
    assert "backend reference" in printed


@pytest.mark.parametrize("options", [(), ("--causal", "--dtype", "bfloat16"), ("--backward",)], ids=" ".join)
def test_compare(capsys, tmp_path, options):
    file = tmp_path / "compare.json"
    sizes = ("--lengths", "32,64", "--heads", "2", "--head-dim", "16")
    assert cli.main(["compare", *sizes, *options, "--out", str(tmp_path), "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("pyattn", "torch SDPA", "naive"))
    assert json.loads(file.read_text())
    assert list(tmp_path.glob("*.png"))
