"""``pyattn.nn.RotaryEmbedding`` against the formulas, written once more, and against transformers if it is there."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

import pyattn
from pyattn.nn import RMSNorm, RotaryEmbedding

DIM, BASE, ORIGINAL = 32, 10000.0, 64
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": ORIGINAL}
SCALINGS = [
    None,
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 2},
    {"rope_type": "ntk", "factor": 4.0},
    DYNAMIC,
    YARN,
    YARN | {"beta_fast": 16, "beta_slow": 2},
    YARN | {"truncate": False},
    YARN | {"attention_factor": 1.25},
    YARN | {"mscale": 0.707, "mscale_all_dim": 1.5},
]


def angle(position, pair, scaling, length, base=BASE, dim=DIM):
    """In plain numbers."""
    kind = scaling.get("rope_type", scaling.get("type"))
    factor = scaling.get("factor")
    if kind in ("ntk", "dynamic"):
        alpha = factor if kind == "ntk" else factor * max(length, ORIGINAL) / ORIGINAL - factor + 1
        base *= alpha ** (dim / (dim - 2))
    theta = position / base ** (2 * pair / dim)
    if kind == "linear":
        return theta / factor
    if kind != "yarn":
        return theta

    def bound(turns):
        return dim / 2 * math.log(ORIGINAL / (2 * math.pi * turns)) / math.log(base)

    fast, slow = bound(scaling.get("beta_fast", 32)), bound(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, dim - 1)
    ramp = min(max((pair - fast) / (slow - fast), 0), 1)
    return theta * (1 - ramp) + theta / factor * ramp


def magnitude(scaling):
    if scaling.get("rope_type") != "yarn":
        return 1.0
    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    if "mscale" in scaling:
        weights = scaling["mscale"], scaling["mscale_all_dim"]
        return (0.1 * weights[0] * math.log(8) + 1) / (0.1 * weights[1] * math.log(8) + 1)
    return 0.1 * math.log(8) + 1


@pytest.mark.parametrize("length", [None, 10, 200, 500])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_angles(scaling, length):
    rotary = RotaryEmbedding(DIM, 500, base=BASE, scaling=scaling)(length)
    assert isinstance(rotary, pyattn.Rotary) and not rotary.interleaved
    assert rotary.cos.shape == rotary.sin.shape == (500, DIM // 2)
    assert rotary.cos.dtype == rotary.sin.dtype == torch.float32
    scale = magnitude(scaling or {})
    angles = [[angle(m, i, scaling or {}, length or 500) for i in range(DIM // 2)] for m in (0, 1, 63, 499)]
    angles = torch.tensor(angles, dtype=torch.float64)
    for table, expected in ((rotary.cos, angles.cos()), (rotary.sin, angles.sin())):
        torch.testing.assert_close(table[[0, 1, 63, 499]].double(), expected * scale, rtol=0, atol=1e-7 * scale)


def test_far_positions_are_exact():
    """In float32 the angle itself is off by more than this."""
    rotary = RotaryEmbedding(DIM, 200_000)()
    expected = torch.tensor([math.cos(199_999 / BASE ** (2 * i / DIM)) for i in range(DIM // 2)])
    torch.testing.assert_close(rotary.cos[-1], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_against_transformers(scaling):
    # Not a missing module but an ImportError where Python runs in the clone, whose folder `kernels` it then finds.
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", exc_type=ImportError)
    if scaling and scaling.get("rope_type") == "ntk":
        pytest.skip("not among transformers' own")
    parameters = {"rope_theta": BASE} | ({"rope_type": "default"} if scaling is None else scaling)
    parameters["rope_type"] = parameters.pop("type", parameters.get("rope_type"))
    longest = ORIGINAL if parameters["rope_type"] == "dynamic" else 500
    config = transformers.LlamaConfig(
        hidden_size=4 * DIM, num_attention_heads=4, max_position_embeddings=longest, rope_parameters=parameters
    )
    theirs = llama.LlamaRotaryEmbedding(config)
    cos, sin = theirs(torch.zeros(1), torch.arange(200)[None])
    ours = RotaryEmbedding(DIM, 500, base=BASE, scaling=scaling)(200)
    torch.testing.assert_close(ours.cos[:200], cos[0, :, : DIM // 2], rtol=0, atol=5e-5)
    torch.testing.assert_close(ours.sin[:200], sin[0, :, : DIM // 2], rtol=0, atol=5e-5)


def test_turned_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, DIM).expand(2, 1, 1, 50, DIM)
    for interleaved in (False, True):
        rotary = RotaryEmbedding(DIM, 50, interleaved=interleaved)()
        assert rotary.interleaved == interleaved
        q_turned, k_turned = pyattn.apply_rotary(q, k, rotary)
        scores = (q_turned @ k_turned.mT)[0, 0]
        for distance in (0, 7):
            diagonal = scores.diagonal(-distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(scores.diagonal(7)[:1], scores.diagonal(0)[:1])


def test_tables_are_no_state_and_keep_their_dtype():
    module = RotaryEmbedding(DIM, 20, scaling=YARN)
    expected = module().cos.clone()
    assert module.state_dict() == {} and not list(module.parameters()) and len(list(module.buffers())) == 2
    others = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        copy.deepcopy(module).to(torch.bfloat16).float(),
    ]
    others += [RotaryEmbedding(DIM, 20, scaling=YARN, device="meta").to_empty(device="cpu")]
    with torch.device("meta"):
        others.append(RotaryEmbedding(DIM, 20, scaling=YARN))
    assert others[-1]().cos.is_meta
    others[-1] = others[-1].to_empty(device="cpu")
    for other in others:
        assert torch.equal(other().cos, expected)
    assert module.half()().cos.dtype == torch.float32
    assert "scaling={'rope_type': 'yarn'" in repr(module)


BAD = [
    (TypeError, "dim must be an int", {"dim": 4.0}),
    (ValueError, "dim must be even and at least 2, got 5", {"dim": 5}),
    (ValueError, "dim must be even and at least 2, got 0", {"dim": 0}),
    (ValueError, "max_positions must be at least 1, got 0", {"max_positions": 0}),
    (ValueError, "base must be greater than 1, got 1.0", {"base": 1.0}),
    (TypeError, "base must be a number", {"base": "10000"}),
    (TypeError, "interleaved must be a bool", {"interleaved": 1}),
    (TypeError, "scaling must be a dict, got str", {"scaling": "linear"}),
    (ValueError, "scaling must have a rope_type, one of default, linear, .* got None", {"scaling": {"factor": 2.0}}),
    (ValueError, "scaling must have a rope_type, .* got 'llama3'", {"scaling": {"rope_type": "llama3"}}),
    (ValueError, "scaling must have factor for rope_type 'linear'", {"scaling": {"rope_type": "linear"}}),
    (ValueError, "scaling must have original_max_position_embeddings for rope_type 'yarn'",
     {"scaling": {"rope_type": "yarn", "factor": 2.0}}),
    (ValueError, "scaling must not have beta_fast for rope_type 'linear'",
     {"scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}),
    (ValueError, "scaling's factor must be at least 1, got 0.5", {"scaling": {"rope_type": "linear", "factor": 0.5}}),
    (ValueError, "scaling's factor must be positive, got -2", {"scaling": {"rope_type": "ntk", "factor": -2}}),
    (TypeError, "scaling's factor must be a number", {"scaling": {"rope_type": "ntk", "factor": "2"}}),
    (TypeError, "scaling's truncate must be a bool", {"scaling": YARN | {"truncate": 1}}),
    (ValueError, "dim must be greater than 2 for rope_type 'ntk'",
     {"dim": 2, "scaling": {"rope_type": "ntk", "factor": 2}}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "overrides"), BAD, ids=[case[1] for case in BAD])
def test_bad_input(error, match, overrides):
    with pytest.raises(error, match=match):
        RotaryEmbedding(**{"dim": DIM, "max_positions": 20} | overrides)


def test_bad_length():
    with pytest.raises(ValueError, match="length must be at most max_positions = 20, got 21"):
        RotaryEmbedding(DIM, 20)(21)
    with pytest.raises(TypeError, match="length must be an int"):
        RotaryEmbedding(DIM, 20)(2.0)


def test_rms_norm_is_torchs():
    norm = RMSNorm(8)
    x = 1e-3 * torch.randn(3, 8)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    norm.load_state_dict(torch.nn.RMSNorm(8).state_dict())
    assert RMSNorm(8, 1e-3).eps == 1e-3 and RMSNorm(8, elementwise_affine=False).weight is None
