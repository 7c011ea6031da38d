"""What the examples, and the tables about them, compute beside the models."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from pyattn.models.data import Image, Series

ROOT = Path(__file__).parents[1]


def example(name):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


def test_a_seasonal_forecast_repeats_the_last_season():
    seasonal = example("forecast")["seasonal"]
    values = torch.arange(70.0)
    made = seasonal(values, first=60, horizon=7, season=3)
    assert made.shape == (4, 7) and made[0].tolist() == [57, 58, 59, 57, 58, 59, 57]
    assert made[3].tolist() == [60, 61, 62, 60, 61, 62, 60]
    assert seasonal(values, first=60, horizon=2, season=12)[0].tolist() == [48, 49]


def test_series_are_checked_before_any_is_trained_on():
    functions = example("forecast")
    check, Task = functions["check"], functions["Task"]
    check(Task(Series("a", torch.randn(200), 12), 48, 12, 6))
    with pytest.raises(ValueError, match="a must have more than 104 values, of which 12 make a season"):
        check(Task(Series("a", torch.randn(104), 12), 48, 12, 6))
    with pytest.raises(ValueError, match="day must not repeat itself exactly every 7 values"):
        check(Task(Series("day", torch.arange(300.0) % 7, 7), 28, 7, 2))


def test_held_out_are_tones_of_what_is_known():
    """Every emoji without a tone is trained on; of those with one some of each part, none twice."""
    names = [f"{what} {tone}" for what in map(str, range(60)) for tone in ("", "dark skin tone", "light skin tone")]
    images = [Image(torch.zeros(3, 2, 2), name.strip()) for name in names]
    parts = [{image.text for image in part} for part in example("caption")["combinations"](images)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 180
    assert {str(i) for i in range(60)} <= parts[0] and len(parts[1]) > 1 and len(parts[2]) > 4
    assert all("skin tone" in name for name in parts[1] | parts[2])


# ---- the table of systems ----------------------------------------------------------------------------------


def result(name, value, digits=1):
    return {"name": name, "metric": "score", "baselines": {"guess": 1.0}, "value": value, "digits": digits}


def run(system, attention, seed, **found):
    command = f"python examples/{system}.py --attention {attention} --seed {seed}"
    common = {"part": "systems", "system": system, "attention": attention, "seed": seed, "seconds": 60.0 * (seed + 1)}
    return common | {"command": command} | found


def test_a_row_for_each_model(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    cells = [
        *(run("vit", "pyattn", seed, results=[result("A", 90 + seed), result("B", 0.5, 3)]) for seed in (0, 1)),
        run("vit", "naive", 0, results=[result("A", 80.25), result("B", 0.25, 3)]),
        run("gpt", "pyattn", 0, **{"bits per byte": {"GPT": 1.25, "gzip": 2.5}}),
        run("gpt", "naive", 0, **{"bits per byte": {"GPT": 1.5, "gzip": 2.5}}),
        {"part": "steps", "system": "vit", "model": "B", "speedup": {"torch": 1.234, "naive": 2.0}},
        {"part": "steps", "system": "gpt", "model": "", "speedup": {"torch": 1.1, "naive": 3.0}},
        {"part": "steps", "system": "speech", "model": "C", "speedup": {"torch": 1.0, "naive": 1.0}},
    ]
    a, b, gpt = tables.systems_rows(cells)
    assert (a[""], a["pyattn, by seed"], a["naive"], a["step over torch"]) == ("A", "90.0, 91.0", "80.2", "")
    assert (b[""], b["pyattn, by seed"], b["step over torch"], b["step over naive"]) == (
        "B",
        "0.500, 0.500",
        "1.23x",
        "2.00x",
    )
    assert a["minutes, all of it"] == "1.0 to 2.0" and a["command"] == "`python examples/vit.py`"
    assert (gpt["baselines"], gpt["pyattn, by seed"], gpt["step over naive"]) == ("gzip 2.500", "1.250", "3.00x")


def test_rows_of_earlier_runs_are_kept(tmp_path, monkeypatch):
    """But for one of the same command and model, whose place a new one takes."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import systems

    def rows():
        return [(cell["system"], cell["seed"], cell["seconds"]) for cell in json.loads(path.read_text())["cells"]]

    path = tmp_path / "device" / "systems.json"
    for row in (run("vit", "pyattn", 0), run("vit", "pyattn", 1), run("gpt", "pyattn", 0)):
        systems.keep(path, {"isa": "avx2"}, row)
    assert rows() == [("vit", 0, 60.0), ("vit", 1, 120.0), ("gpt", 0, 60.0)]
    systems.keep(path, {"isa": "avx2"}, run("vit", "pyattn", 0) | {"seconds": 5.0})
    assert rows() == [("vit", 0, 5.0), ("vit", 1, 120.0), ("gpt", 0, 60.0)]
    for model in "ab":
        systems.keep(path, {"isa": "avx2"}, {"part": "steps", "system": "vit", "seed": 0, "seconds": 1, "model": model})
    assert len(rows()) == 5


def test_parts_of_a_table_come_from_where_they_were_measured_last(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import report
    import store

    def save(device, day, *cells):
        environment = {"cpu": device, "isa": "avx2", "torch": "2", "pyattn": "1", "date": f"2026-01-0{day}"}
        made = [{"system": system, "part": "systems", "seconds": seconds, "threads": 1} for system, seconds in cells]
        store.save(tmp_path / device / "systems.json", environment, made)

    save("new", 2, ("vit", 3.0), ("vit", 4.0), ("gpt", 5.0))
    save("old", 1, ("translate", 1.0), ("vit", 2.0))
    ((name, (environment, cells)),) = report.load(tmp_path, None).items()
    assert name == "systems" and environment["cpu"] == "new"
    assert [(c["system"], c["seconds"]) for c in cells] == [("translate", 1), ("vit", 3), ("vit", 4), ("gpt", 5)]
    where = report.conditions(environment, cells, report.SUITES["systems"])
    old, new = where.split("; ")
    assert old.startswith("old, avx2, 1 thread, ") and old.endswith("(translate)")
    assert new.startswith("new, avx2, 1 thread, ") and new.endswith("(vit, gpt)")
    assert "(" not in report.conditions(environment, cells[1:], report.SUITES["systems"])
