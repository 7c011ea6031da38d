"""What the compiler makes of the Triton kernels for GPUs that are not there: figures, bounds, how often it compiles.

Kernels are compiled by ``benchmarks/compiled.py`` in processes of their own: here they are interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "compiled.py"
RECORDED = json.loads((SCRIPT.parent / "results" / "compiled" / "triton.json").read_text())
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536, "gfx950": 163840}
TENSOR_MEMORY = 512  # columns, of sm_100
INSTRUCTION = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
GROWTH = 1.05


def key(cell):
    return tuple(cell[name] for name in ("kernel", "arch", "dtype", "head_dim", "mask"))


def matrix_instruction(cell):
    if cell["arch"].startswith("gfx"):
        return "v_mfma"
    return "HMMA" if cell["BLOCK_M"] < 64 else INSTRUCTION[cell["arch"]]  # Hopper's own take 64 rows


def is_main(cell):
    return cell["dtype"] != "float32" and cell["head_dim"] <= 128 and cell["mask"] != "masked"


def complaints(cell, recorded=None):
    """What is wrong with a compiled kernel, also compared with what was recorded of it."""
    if cell["shared"] > SHARED[cell["arch"]]:
        yield f"{cell['shared']} bytes of shared memory, the GPU has {SHARED[cell['arch']]}"
    if cell["tensor_memory"] > TENSOR_MEMORY:
        yield f"{cell['tensor_memory']} columns of tensor memory, the GPU has {TENSOR_MEMORY}"
    if is_main(cell) and cell["spills"]:
        yield f"{cell['spills']} spills"
    multiplies = cell["kernel"] not in ("preprocess", "combine")
    counts = {name: cell[name] for name in ("HMMA", "HGMMA", "UTCHMMA", "v_mfma") if name in cell}
    if multiplies and cell["dtype"] != "float32" and not (cell["kernel"] == "dkdv" or counts[matrix_instruction(cell)]):
        yield f"no {matrix_instruction(cell)}: {counts}"
    if cell["kernel"] == "dkdv" and cell["dtype"] != "float32" and not counts[INSTRUCTION.get(cell["arch"], "v_mfma")]:
        yield f"no {INSTRUCTION.get(cell['arch'], 'v_mfma')}: {counts}"
    if not multiplies and any(counts.values()):
        yield f"matrix instructions: {counts}"
    if cell["kernel"] in ("forward", "decode") and cell["mask"] != "masked" and cell.get("narrow_loads"):
        yield f"{cell['narrow_loads']} loads of keys and values are not 128 bits wide"
    for name in ("registers", "spills", "shared"):
        if recorded is not None and cell[name] > GROWTH * recorded[name]:
            yield f"{name} grew from {recorded[name]} to {cell[name]}"


def run_script(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, *map(str, arguments)], check=True, env=environment)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("compiled") / "quick.json"
    run_script(SCRIPT, "--quick", "--out", path)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    path = tmp_path_factory.mktemp("compiled") / "all.json"
    run_script(SCRIPT, "--out", path)
    return json.loads(path.read_text())


def check(results, select):
    """Against the record, if it was made by the same release of Triton: another's compiler differs."""
    minor = [x["environment"]["triton"].rsplit(".", 1)[0] for x in (results, RECORDED)]
    recorded = {key(cell): cell for cell in RECORDED["cells"]} if minor[0] == minor[1] else {}
    cells = [cell for cell in results["cells"] if select(cell)]
    assert cells
    assert not recorded or all(key(cell) in recorded for cell in cells)
    found = {" ".join(map(str, key(cell))): list(complaints(cell, recorded.get(key(cell)))) for cell in cells}
    assert not {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_of_each_kernel(arch, quick):
    check(quick, lambda cell: cell["arch"] == arch)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel(arch, everything):
    check(everything, lambda cell: cell["arch"] == arch)


# Every feature is in one of them, and so is every way to leave one out.
SOME_CASES = ["everything", "packed, family", "paged, family", "bool mask", "scale negative"]
MORE_CASES = [*SOME_CASES, "window, both sides", "float mask, rows only", "padding both, window", "tiles, float32 mask",
              "packed, per sequence", "dropout", "paged, odd pages", "packed, dropout"]  # fmt: skip


def test_every_feature_compiles():
    run_script(SCRIPT, "--cases", ";".join(SOME_CASES), "--archs", "sm_90")


@pytest.mark.exhaustive
def test_every_feature_compiles_for_every_gpu():
    run_script(SCRIPT, "--cases", ";".join(MORE_CASES))


@pytest.mark.parametrize("name", ["registers", "spills", "shared", "tensor_memory", "narrow_loads", "HGMMA"])
def test_a_worse_kernel_is_found(name):
    good = next(cell for cell in RECORDED["cells"] if key(cell) == ("forward", "sm_90", "bfloat16", 128, "causal"))
    worse = good | {name: 0 if name == "HGMMA" else good[name] * 2 + 1000}
    assert list(complaints(good, good)) == []
    assert list(complaints(worse, good))


LENGTHS = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import compiled
for layout in ("BHLD", "BLHD"):
    for mask in ("full", "causal", "masked"):
        for kernel in compiled.KERNELS:
            for head_dim in (48, 64):
                entry = compiled.Entry(kernel, "sm_90", "bfloat16", head_dim, mask)
                if not compiled.is_distinct(entry):
                    continue
                lengths = [*range(640, 680), 1000, 1024, 2000, 4096, 5001, 8192, 10007, 65536, 2**20, 2**24 + 1]
                found = {{compiled.specialization(compiled.launches(entry, length, layout)[kernel], "sm_90")
                         for length in lengths}}
                assert len(lengths) == 50 and len(found) == 1, (str(entry), layout, found)
"""


def test_nothing_is_compiled_again_because_a_length_changed():
    """Fifty lengths, from 640 to beyond 2^31 elements a tensor, give one key; a GPU counts in ``test_triton``."""
    run_script("-c", LENGTHS)
