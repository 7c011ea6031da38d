"""What Hopper adds to the machine, in a kernel made of nothing else: emulated, compiled, and with planted bugs."""

from __future__ import annotations

import ctypes
from pathlib import Path

import emulator
import pytest
import torch
from torch import Tensor

from pyattn import jit

ROWS, KEYS, COLS = 128, 64, 128
PROBE = Path(__file__).parent / "hopper_probe.cuh"
on_emulator = pytest.mark.skipif(not emulator.supported(), reason="the emulator runs on x86-64 only")

# Kernels have a namespace each, so that one library holds a kernel and all that may be wrong with it.
ENTRY = """
#include "emulator/prim.h"
#include "cuda/prim_hopper.cuh"
#define BF16 {bf16}
#define EXPORT extern "C" __attribute__((visibility("default")))

template <class Params>
const char* launch(void (*kernel)(const void*), int threads, uint32_t shared, int cols, void* const (&at)[4],
                   const int (&rows)[4], const int (&boxes)[4], int tiles, bool racing, uint32_t seed) {{
  static Params p;
  emulator::TensorMap* maps[] = {{&p.query, &p.key, &p.value, &p.out}};
  for (int i = 0; i < 4; ++i) {{
    emulator::TensorMap& map = *maps[i] = {{}};
    map.address = reinterpret_cast<uint64_t>(at[i]), map.rank = 4, map.swizzle = 3;
    map.size[0] = cols, map.size[1] = rows[i], map.size[2] = map.size[3] = 1;
    for (uint64_t& stride : map.stride) stride = 2 * cols;
    map.box[0] = 64, map.box[1] = boxes[i], map.box[2] = map.box[3] = 1;
  }}
  p.tiles = tiles;
  return emulator::run(kernel, &p, 1, threads, shared, racing, seed);
}}
{kernels}
using Probe = const char* (*)(void* const (&)[4], int, bool, uint32_t);
constexpr Probe probes[] = {{{names}}};

EXPORT const char* probe(int i, void* query, void* key, void* value, void* out, int keys, bool racing, uint32_t seed) {{
  return probes[i]({{query, key, value, out}}, keys, racing, seed);
}}
"""
KERNEL = """
namespace kernel_{i} {{
{text}
const char* probe(void* const (&at)[4], int keys, bool racing, uint32_t seed) {{
  return launch<Params>(emulated_kernel, THREADS, Shared().barriers + 8 * (1 + 2 * STAGES), COLS, at,
                        {{ROWS, keys, keys, ROWS}}, {{ROWS, KEYS, KEYS, 64}}, (keys + KEYS - 1) / KEYS, racing, seed);
}}
}}  // namespace kernel_{i}
"""


def build(texts, dtype=torch.bfloat16):
    """A library whose probe i is the kernel of text i."""
    texts = [text.replace('#include "prim_hopper.cuh"', "") for text in texts]
    kernels = "".join(KERNEL.format(i=i, text=text) for i, text in enumerate(texts))
    names = ", ".join(f"kernel_{i}::probe" for i in range(len(texts)))
    source = ENTRY.format(bf16=int(dtype == torch.bfloat16), kernels=kernels, names=names)
    sources = [emulator._texts(folder) for folder in (emulator.EMULATOR, emulator.ROOT / "csrc" / "cuda")]
    path = emulator.BUILD / f"hopper-{emulator._hash(source, emulator.COMPILE, sources)}.so"
    library = ctypes.CDLL(str(emulator._build(path, source, emulator.COMPILE)))
    library.probe.restype = ctypes.c_char_p
    library.probe.argtypes = (ctypes.c_int, *[ctypes.c_void_p] * 4, ctypes.c_int, ctypes.c_bool, ctypes.c_uint32)
    return library


def run(library, i, keys, racing, dtype=torch.bfloat16, seed=1) -> tuple[str | None, Tensor, Tensor]:
    """What the emulator has to say, what came out, and what should have."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, COLS, generator=generator).div(4).to(dtype) for n in (ROWS, keys, keys))
    out = torch.full((ROWS, COLS), torch.nan, dtype=dtype)
    error = library.probe(i, *(x.data_ptr() for x in (q, k, v, out)), keys, racing, seed)
    weights = (q.double() @ k.double().T).to(dtype)
    return error and error.decode(), out.double(), weights.double() @ v.double()


def is_right(out, expected):
    return bool(((out - expected).abs() <= 0.02 * expected.abs().max()).all())


@on_emulator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [1, 64, 320, 307])
def test_products_of_what_is_copied(dtype, keys):
    """Both modes; the last tile goes beyond the tensor, where there are zeros."""
    library = build([PROBE.read_text()], dtype)
    for racing, seed in ((False, 0), (True, 1), (True, 2)):
        error, out, expected = run(library, 0, keys, racing, dtype, seed)
        assert error is None and is_right(out, expected)


# What is changed, and what is said: by the emulator, or nothing but a wrong number.
FULL, EMPTY = "prim::barrier_wait(s.full(stage), tile / STAGES % 2);", "tile / STAGES % 2 ^ 1);"
SCORES = "prim::products_commit();\n    prim::products_wait<0>();\n    uint32_t"
FENCE = "prim::products_fence();\n#pragma unroll\n    for (int k = 0; k < COLS"
OUT = "prim::products_commit();\n    prim::products_wait<0>();\n    if (lane == 0)"
MUTANTS = {
    "missing wait": (FULL, "", "under way|without a barrier"),
    "wrong phase": (FULL, FULL.replace("% 2)", "% 2 ^ 1)"), "under way|without a barrier|deadlock"),
    "wrong phase of the producer": (EMPTY, EMPTY.replace(" ^ 1", ""), "deadlock"),
    "missing wait for an empty stage": (
        "prim::barrier_wait(s.empty(stage), tile / STAGES % 2 ^ 1);",
        "",
        "under way|another warp read|still reads|more arrivals",
    ),
    "missing release": ("if (lane == 0) prim::barrier_arrive(s.empty(stage));", "", "deadlock"),
    "one warp's release": ("if (lane == 0) prim", "if (prim::thread() % 128 == 0) prim", "deadlock"),
    "release before the products": (
        OUT,
        OUT.replace("prim::products_wait<0>();\n    if (lane == 0)", "if (lane == 0)"),
        "still reads|under way|fence of its registers|products were|number",
    ),
    "early read of scores": (SCORES, SCORES.replace("prim::products_wait<0>();\n", ""), "number|fence"),
    "missing fence of registers": (FENCE, FENCE.partition("\n")[2], "fence of its registers"),
    "missing fence of stores": ("prim::fence_stores();", "", "without a fence"),
    "missing barrier before the store": ("prim::named_sync(1 + group, 128);", "", "without a barrier|without a fence"),
    "missing wait for the store": ("prim::store_wait<0>();", "", "stores were under way"),
    "missing fence of barriers": ("prim::barrier_init_fence();", "", "not been fenced"),
    "missing barrier after barriers": (
        "  prim::sync();\n  const int group",
        "  const int group",
        "no barrier at|used without",
    ),
    "too few bytes": (
        "s.full(stage), 2 * KEY_BYTES",
        "s.full(stage), KEY_BYTES",
        "under way|number|without a barrier|copies were",
    ),
    "too many bytes": ("s.full(stage), 2 * KEY_BYTES", "s.full(stage), 3 * KEY_BYTES", "deadlock"),
    "wrong stride of a K-major operand": (
        "prim::operand(b, 16, 1024), k > 0",
        "prim::operand(b, 16, 512), k > 0",
        "number",
    ),
    "wrong stride of an MN-major operand": (
        "prim::operand(b, KEY_PANEL, 1024)",
        "prim::operand(b, 1024, 1024)",
        "number",
    ),
    "K-major for MN-major": (
        "multiply_async<true>",
        "multiply_async<false>",
        "number|beyond|under way|without a barrier",
    ),
    "wrong swizzle": ("(col % 64 / 8 ^ r % 8)", "(col % 64 / 8 ^ r % 4)", "number"),
    "sums not kept": ("prim::operand(b, KEY_PANEL, 1024), true", "prim::operand(b, KEY_PANEL, 1024), k > 0", "number"),
    "registers taken that nobody gave": ("prim::give_registers<24>();", "", "deadlock"),
}


@pytest.fixture(scope="module")
def mutants():
    text, changed = PROBE.read_text(), []
    for old, new, _ in MUTANTS.values():
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
        changed.append(text.replace(old, new))
    return build(changed)


@on_emulator
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutants, mutant):
    complaints = []
    for racing, seed in ((False, 0), (True, 1)):
        error, out, expected = run(mutants, list(MUTANTS).index(mutant), 320, racing, seed=seed)
        if error or not is_right(out, expected):
            complaints.append(error or "number")
    assert complaints, "nobody has seen it"
    expected = MUTANTS[mutant][2].split("|")
    assert any(part in found for part in expected for found in complaints), complaints


@pytest.mark.skipif(bool(jit.unavailable()), reason="NVRTC is not installed")
@pytest.mark.parametrize("bf16", [0, 1])
def test_the_machine_has_these_instructions(monkeypatch, bf16):
    """Compiled for Hopper: what is written is what is there, nothing is spilled, and the compiler has not objected."""
    pytest.importorskip("triton")  # brings the disassembler
    monkeypatch.syspath_prepend(str(emulator.ROOT / "benchmarks"))
    import sass

    sources = jit._sources(jit.SOURCES) | {PROBE.name: PROBE.read_bytes()}
    monkeypatch.setattr(jit, "_sources", lambda folder: sources)
    code, log = jit.compile_with_log(PROBE.name, {"BF16": bf16}, "sm_90a")
    assert "serialized" not in log and "ignored" not in log
    made = sass.disassemble(code)
    names = made.instructions
    assert sass.spills(names) == 0 and made.stack == 0
    assert sass.count(names, "HGMMA") == COLS // 16 + KEYS // 16 == sass.count(names, "HGMMA", part="F32")
    assert sass.count(names, "HGMMA", part="BF16") == (12 if bf16 else 0)
    assert sass.count(names, "UTMALDG") == 6 and sass.count(names, "UTMASTG") == 2
    assert sass.count(names, "USETMAXREG") == 2 and sass.count(names, "SYNCS") >= 10
