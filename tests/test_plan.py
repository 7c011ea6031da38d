"""What the Triton backend keeps of a call for the next of its kind. Compiled kernels are stand-ins that take notes."""

import pytest
import torch

launch = pytest.importorskip("pyattn.kernels.launch", exc_type=ImportError)


class Kernel:
    """As ``triton.jit`` makes them; ``compiled``: what a launch returns."""

    def __init__(self, names, compiled):
        self.arg_names = names
        self.compiled = compiled
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda **keywords: self.compiled


class Compiled:
    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((grid, arguments))


TILES = launch.Tiles(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2)
CPU = torch.device("cpu")


def plan_of(x, compiled, programs=7):
    names = ["X", "MASK", "n", "PART", "BLOCK_M"]
    part = torch.empty(3, 5, dtype=torch.float64)
    first, second = Kernel(names, compiled), Kernel(["PART", "X"], compiled)
    arguments = {"X": x, "MASK": None, "n": 11, "PART": part}
    launches = [launch.Launch(first, programs, arguments, TILES), launch.Launch(second, 1, arguments, TILES)]
    return launch.Plan(launches, ["X", "MASK", "OTHER"]), (first, second), part


def test_addresses_are_those_of_the_call():
    compiled = Compiled()
    plan, kernels, part = plan_of(torch.zeros(4), compiled)
    assert plan.complete and [kernel.grids for kernel in kernels] == [[(7,)], [(1,)]] and not compiled.calls
    for _ in range(2):
        y = torch.zeros(4)
        compiled.calls.clear()
        plan.run({"X": y, "MASK": None, "OTHER": torch.zeros(1)}, CPU)
        (grid, arguments), (second_grid, (second_part, second_x)) = compiled.calls
        assert (grid, second_grid) == ((7, 1, 1), (1, 1, 1))
        assert arguments[:3] == (y.data_ptr(), None, 11) and arguments[4] == 64
        # Both launches share what was made for them, and it is made anew.
        assert second_x == y.data_ptr() and second_part == arguments[3] != part.data_ptr()
    assert plan.temporaries["PART"].shape == (3, 5) and plan.temporaries["PART"].dtype == torch.float64


def test_what_has_nothing_to_do_is_not_started():
    compiled = Compiled()
    plan, (first, _), _ = plan_of(torch.zeros(4), compiled, programs=0)
    plan.run({"X": torch.zeros(4), "MASK": None}, CPU)
    assert not first.grids and [grid for grid, _ in compiled.calls] == [(1, 1, 1)]


def test_the_interpreter_has_no_plans():
    assert not plan_of(torch.zeros(4), None)[0].complete
