"""The command line, end to end on small problems: every column of the table comes from a real run."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from pyattn import cli, compare, functional, measure

SMALL = ("--lengths", "64,100", "--heads", "2", "--head-dim", "16")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The times need not be good ones here; ``--threads`` sets torch's number for the process."""
    monkeypatch.setattr(measure, "alternate", functools.partial(measure.alternate, min_time=0))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(tmp_path, *options):
    """The numbers that ``compare`` saves."""
    file = tmp_path / "numbers" / "compare.json"
    assert cli.main(["compare", *SMALL, *options, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_info_names_every_backend(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "backend cpu" in printed
    assert "backend reference" in printed


@pytest.mark.parametrize("options", [(), ("--causal", "--dtype", "bfloat16"), ("--backward",)], ids=" ".join)
def test_compare_prints_and_plots(capsys, tmp_path, options):
    run(tmp_path, *options, "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*compare.IMPLEMENTATIONS, "64", "100"))
    assert "…" not in printed, "the table must fit a terminal of 80 columns"
    assert ("gradients" in printed) == ("--backward" in options)
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("causal", [(), ("--causal",)], ids=["full", "causal"])
@pytest.mark.parametrize("dtype, allowed", [("float32", 1e-5), ("bfloat16", 0.1)])
def test_backward_is_measured_against_float64(tmp_path, dtype, allowed, causal):
    result = run(tmp_path, "--backward", "--dtype", dtype, "--threads", "1", *causal)
    assert result["environment"]["threads"] == 1
    assert result["workload"]["backward"]
    names = [(cell["length"], cell["implementation"]) for cell in result["cells"]]
    assert names == [(length, name) for length in (64, 100) for name in compare.IMPLEMENTATIONS]
    for cell in result["cells"]:
        assert cell["skipped"] is None
        assert cell["seconds"] > 0 and cell["gflops"] > 0 and cell["speedup"] > 0
        assert 0 < cell["max_error"] < allowed
        assert 0 < cell["max_gradient_error"] < allowed


def test_forward_has_no_gradient_error(tmp_path):
    assert all(cell["max_gradient_error"] is None for cell in run(tmp_path)["cells"])


def test_a_wrong_gradient_shows(tmp_path, monkeypatch):
    def wrong(query, key, value, causal):
        return functional.naive_attention(query, key.detach() + 0 * key, value, causal=causal)  # none reaches the key

    monkeypatch.setitem(compare.IMPLEMENTATIONS, "naive", wrong)
    for cell in run(tmp_path, "--backward")["cells"]:
        assert cell["max_error"] < 1e-5
        assert (cell["max_gradient_error"] > 0.1) == (cell["implementation"] == "naive")


def test_what_does_not_fit_is_skipped_with_a_reason(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "available_memory", lambda cuda=False: 10_000)
    result = run(tmp_path, "--out", str(tmp_path))
    skipped = {cell["implementation"]: cell["skipped"] for cell in result["cells"]}
    assert "are free" in skipped["naive"]
    assert skipped["torch SDPA"] is None
    assert "skipped" in capsys.readouterr().out


@pytest.mark.parametrize("options", [("--lengths", "0"), ("--lengths", "a"), ("--heads", "-1"), ("--dtype", "int8")])
def test_bad_options_are_refused(capsys, options):
    with pytest.raises(SystemExit) as error:
        cli.main(["compare", *options])
    assert error.value.code == 2
    assert options[0] in capsys.readouterr().err
