"""What NVRTC makes of the CUDA kernels for GPUs that are not there: figures, and what follows from their tiles."""

from __future__ import annotations

import pytest
from recorded import Record, growth

from pyattn import jit

pytest.importorskip("triton")  # brings the disassembler
if jit.unavailable():
    pytest.skip(jit.unavailable()[0], allow_module_level=True)

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
SHARED = {"sm_80": 166912, "sm_89": 101376, "sm_90a": 232448, "sm_100a": 232448, "sm_120a": 101376}
REGISTERS = 65536  # of a multiprocessor
# Loads and stores in the inner loop of a plain kernel for want of registers: none but these. By kernel, GPU, D.
SPILLS = {
    ("forward", "sm_89", 64): 2,
    ("forward", "sm_120a", 64): 1,
    ("dkdv", "sm_90a", 64): 23,
    ("dkdv", "sm_90a", 128): 24,
    ("dk", "sm_90a", 192): 13,
    ("dk", "sm_90a", 256): 5,
    ("dq", "sm_90a", 96): 24,
    ("dq", "sm_90a", 192): 16,
    ("dq", "sm_90a", 256): 24,
}

# By kernel: products of a tile of rows and one of keys over the D columns and over the Dv columns, and how often its
# code copies rows of D and of Dv, keys of D and of Dv. What is worked on while the next one is copied is copied twice.
WORK = {
    **dict.fromkeys(("forward", "few queries", "decode", "tall decode"), ((1, 1), (1, 0, 2, 1))),
    "dkdv": ((2, 2), (2, 2, 1, 1)),
    "dv": ((1, 1), (2, 2, 1, 1)),
    "dk": ((2, 1), (2, 2, 1, 1)),
    "dq": ((2, 1), (1, 1, 2, 2)),
    "dmask": ((1, 1), (1, 1, 1, 1)),
    **dict.fromkeys(("preprocess", "combine"), ((0, 0), (0, 0, 0, 0))),
}


def matrix_instructions(cell):
    """Each multiplies 16 x 8 x 16. Neither a loop nor a branch has a second copy of a product."""
    (over_d, over_dv), _ = WORK[cell["kernel"]]
    over_d += cell["kind"] == "unordered" and cell["kernel"] in ("dkdv", "dk")  # the query's gradient as well
    scores = cell["BLOCK_M"] // cell["WARPS_M"] * (cell["BLOCK_N"] // cell["WARPS_N"])
    return scores * (over_d * cell["BLOCK_D"] + over_dv * cell["BLOCK_DV"]) // (16 * 8 * 16)


def is_for_hopper(cell):
    return cell["file"].endswith("_hopper.cuh")


def warpgroup_products(cell):
    """Each multiplies 64 rows by 16 columns. The first tile's, or the last one's, have code of their own."""
    M, N, D, Dv = (cell[name] // 16 for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_DV"))
    if cell["kernel"] in ("forward", "few queries"):
        return 2 * (D + N)
    if cell["kernel"] == "dq":
        return 2 * (D + Dv + N)
    of_keys, of_values = cell["kernel"] != "dv", cell["kernel"] != "dk"
    if cell["kind"] == "unordered" and of_keys:  # a consumer has every second 64 columns of the query's gradient
        return D + Dv + of_values * M + M + -(-cell["BLOCK_D"] // 128) * N
    stage = sum(cell["BLOCK_M"] * 128 * -(-16 * x // 64) for x in (D, Dv)) + 8 * cell["BLOCK_M"]
    keys = sum(cell["BLOCK_N"] * 128 * -(-16 * x // 64) for x in (D, Dv))
    early = keys + 3 * stage + 256 <= SHARED["sm_90a"] and 16 * (of_keys * D + of_values * Dv + 3 * M) <= 416
    return (1 + early) * (D + of_keys * Dv + of_values * M + of_keys * M)


def panels(cell):
    """Boxes of 64 columns that are copied: each kind of tile by code of its own."""
    of_keys, of_values = (-(-cell[name] // 64) for name in ("BLOCK_D", "BLOCK_DV"))
    return 2 * of_keys + of_values * (1 if cell["kernel"] in ("forward", "few queries") else 2)


def complaints_about_hopper(cell):
    """What the compiler says and has made where a kernel is to have a machine alone."""
    if cell["losses"]:
        yield f"the compiler objects: {cell['losses']}"
    for name, expected in (
        ("HGMMA", warpgroup_products(cell)),
        ("UTMALDG", panels(cell)),
        ("USETMAXREG", 2),
        ("HMMA", 0),
        ("LDGSTS", 0),
    ):
        if cell[name] != expected:
            yield f"{cell[name]} {name}, not {expected}"


def wide_copies(cell):
    """By 16 bytes: all of the tiles, in panels of 64 or 32 columns."""
    if cell["kind"] == "odd":
        return 0

    def copies(rows, columns):
        panel = 32 if columns % 64 else 64
        return -(-rows * panel // 8 // cell["threads"]) * (columns // panel)

    _, counts = WORK[cell["kernel"]]
    tiles = [(rows, columns) for rows in ("BLOCK_M", "BLOCK_N") for columns in ("BLOCK_D", "BLOCK_DV")]
    return sum(n * copies(cell[rows], cell[columns]) for n, (rows, columns) in zip(counts, tiles, strict=True))


def complaints(cell, recorded=None):
    """What is wrong with a compiled kernel, also compared with what was recorded of it."""
    if cell["shared"] > SHARED[cell["arch"]]:
        yield f"{cell['shared']} bytes of shared memory, the GPU has {SHARED[cell['arch']]}"
    if cell["registers"] > 255 or cell["registers"] * cell["threads"] > REGISTERS:
        yield f"{cell['registers']} registers for each of {cell['threads']} threads"
    if cell["kind"] == "plain" and cell["loop_spills"] > SPILLS.get((cell["kernel"], cell["arch"], cell["D"]), 0):
        yield f"{cell['loop_spills']} spills in the inner loop"
    yield from growth(cell, recorded, "loop", "loop_spills")
    if is_for_hopper(cell):
        yield from complaints_about_hopper(cell)
        return
    if cell["HMMA"] != matrix_instructions(cell):
        yield f"{cell['HMMA']} matrix instructions, not {matrix_instructions(cell)}"
    if cell["wide_copies"] != wide_copies(cell):
        yield f"{cell['wide_copies']} copies are 128 bits wide, not {wide_copies(cell)}"
    has_terms = cell["kernel"] in ("dkdv", "dv", "dk", "dq", "dmask")  # lse and delta, of 4 bytes
    if cell["LDGSTS"] != cell["wide_copies"] and not has_terms:
        yield f"{cell['LDGSTS'] - cell['wide_copies']} copies are less than 128 bits wide"
    if bool(cell["loop"]) != bool(cell["HMMA"]):
        yield f"an inner loop of {cell['loop']} instructions"


RECORD = Record("compiled_cuda.py", "cuda.json", ("kernel", "arch", "kind", "D", "Dv", "dtype"), complaints)


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


@pytest.mark.parametrize(
    "name", ["registers", "spills", "loop", "loop_spills", "shared", "HMMA", "wide_copies", "LDGSTS"]
)
def test_a_worse_kernel_is_found(name):
    good = RECORD.find("forward", "sm_80", "plain", 128, 128, "bfloat16")
    assert list(complaints(good, good)) == []
    assert list(complaints(good | {name: good[name] * 2 + 1000}, good))


@pytest.mark.parametrize("name", ["HGMMA", "UTMALDG", "USETMAXREG", "HMMA", "LDGSTS", "losses", "shared"])
@pytest.mark.parametrize(
    ("kernel", "kind"), [*((x, "plain") for x in ("forward", "few queries", "dkdv", "dq")), ("dkdv", "unordered")]
)
def test_a_worse_kernel_for_hopper_is_found(kernel, kind, name):
    good = RECORD.find(kernel, "sm_90a", kind, 128, 128, "bfloat16")
    assert list(complaints(good, good)) == [] and is_for_hopper(good)
    worse = ["(C7510) Potential Performance Loss"] if name == "losses" else good[name] * 2 + 300000
    assert list(complaints(good | {name: worse}, good))


@pytest.mark.parametrize("name", ["HMMA", "loop", "wide_copies"])
def test_a_kernel_that_does_without_is_found(name):
    good = RECORD.find("dq", "sm_80", "plain", 64, 64, "bfloat16")
    assert list(complaints(good, good)) == []
    assert list(complaints(good | {name: 0}, good))
