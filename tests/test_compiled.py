"""What the compiler makes of the Triton kernels for GPUs that are not there: figures, bounds, how often it compiles.

Kernels are compiled by ``benchmarks/compiled.py`` in processes of their own: here they are interpreted.
"""

from __future__ import annotations

import pytest
from recorded import BENCHMARKS, Record, growth, run_script

pytest.importorskip("triton")

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536, "gfx950": 163840}
TENSOR_MEMORY = 512  # columns, of sm_100
SPILLS_OF_AN_EPILOGUE = 16  # once a tile, after a loop that has none
INSTRUCTION = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}


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
    if is_main(cell) and cell["spills"] > (SPILLS_OF_AN_EPILOGUE if cell["kernel"] == "product" else 0):
        yield f"{cell['spills']} spills"
    multiplies = cell["kernel"] not in ("preprocess", "combine", "epilogue", "gradient")
    counts = {name: cell[name] for name in ("HMMA", "HGMMA", "UTCHMMA", "v_mfma") if name in cell}
    if multiplies and cell["dtype"] != "float32" and not (cell["kernel"] == "dkdv" or counts[matrix_instruction(cell)]):
        yield f"no {matrix_instruction(cell)}: {counts}"
    if cell["kernel"] == "dkdv" and cell["dtype"] != "float32" and not counts[INSTRUCTION.get(cell["arch"], "v_mfma")]:
        yield f"no {INSTRUCTION.get(cell['arch'], 'v_mfma')}: {counts}"
    if not multiplies and any(counts.values()):
        yield f"matrix instructions: {counts}"
    if cell["kernel"] in ("forward", "decode") and cell["mask"] != "masked" and cell.get("narrow_loads"):
        yield f"{cell['narrow_loads']} loads of keys and values are not 128 bits wide"
    yield from growth(cell, recorded)


RECORD = Record("compiled.py", "triton.json", ("kernel", "arch", "dtype", "head_dim", "mask"), complaints)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return RECORD.make(tmp_path_factory.mktemp("compiled"), "--quick")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return RECORD.make(tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_of_each_kernel(arch, quick):
    RECORD.check(quick, arch)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel(arch, everything):
    RECORD.check(everything, arch)


# Every feature is in one of them, and so is every way to leave one out.
SOME_CASES = ["everything", "packed, family", "paged, family", "bool mask", "scale negative"]
MORE_CASES = [*SOME_CASES, "window, both sides", "float mask, rows only", "padding both, window", "tiles, float32 mask",
              "packed, per sequence", "dropout", "paged, odd pages", "packed, dropout"]  # fmt: skip


def test_every_feature_compiles():
    run_script(RECORD.script, "--cases", ";".join(SOME_CASES), "--archs", "sm_90")


@pytest.mark.exhaustive
def test_every_feature_compiles_for_every_gpu():
    run_script(RECORD.script, "--cases", ";".join(MORE_CASES))


@pytest.mark.parametrize("name", ["registers", "spills", "shared", "tensor_memory", "narrow_loads", "HGMMA"])
def test_a_worse_kernel_is_found(name):
    good = RECORD.find("forward", "sm_90", "bfloat16", 128, "causal")
    worse = good | {name: 0 if name == "HGMMA" else good[name] * 2 + 1000}
    assert list(complaints(good, good)) == []
    assert list(complaints(worse, good))


LENGTHS = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import compiled
for layout in ("BHLD", "BLHD"):
    for mask in ("full", "causal", "masked", "heads", "rotary"):
        for kernel in compiled.KERNELS + compiled.PROJECTION_KERNELS:
            for head_dim in (48, 64):
                entry = compiled.Entry(kernel, "sm_90", "bfloat16", head_dim, mask)
                if mask not in (compiled.EPILOGUES if kernel in compiled.PROJECTION_KERNELS else compiled.MASKS):
                    continue
                if not compiled.is_distinct(entry):
                    continue
                lengths = [*range(640, 680), 1000, 1024, 2000, 4096, 5001, 8192, 10007, 65536, 2**20, 2**24 + 1]
                launches = [compiled.launches(entry, length, layout)[kernel] for length in lengths]
                found = {{compiled.specialization(launch, "sm_90") for launch in launches}}
                tiles = {{launch.tiles for launch in launches}}  # few tokens are multiplied in smaller ones
                assert len(lengths) == 50 and len(found) == len(tiles), (str(entry), layout, found)
                assert len(tiles) == 1 or kernel == "product", (str(entry), layout, tiles)
"""


def test_nothing_is_compiled_again_because_a_length_changed():
    """Fifty lengths, from 640 to beyond 2^31 elements a tensor, give one key; a GPU counts in ``test_triton``."""
    run_script("-c", LENGTHS)
