"""``pyattn.integrations.xformers`` against biases written out entry by entry."""

from __future__ import annotations

import pytest
import torch

from pyattn.integrations import xformers
from pyattn.integrations.xformers import BlockDiagonalMask, memory_efficient_attention


def dense(q, k, v, bias, scale=None):
    """``[B, L, H, D]``, with a bias ``[.., Lq, Lk]``; rows without keys give 0."""
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias.double()
    return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2).float()


def seen(Lq, Lk, left=None, right=None, bottom_right=False):
    distance = torch.arange(Lk) - torch.arange(Lq)[:, None] - (Lk - Lq if bottom_right else 0)
    keep = torch.ones(Lq, Lk, dtype=torch.bool)
    keep &= True if left is None else distance >= -left
    keep &= True if right is None else distance <= right
    return torch.zeros(Lq, Lk).masked_fill(~keep, -torch.inf)


BIASES = [
    (xformers.LowerTriangularMask(), {"right": 0}),
    (xformers.LowerTriangularFromBottomRightMask(), {"right": 0, "bottom_right": True}),
    (
        xformers.LowerTriangularFromBottomRightMask().make_local_attention(3),
        {"left": 2, "right": 0, "bottom_right": True},
    ),
    (xformers.LocalAttentionFromBottomRightMask(2, 1), {"left": 2, "right": 1, "bottom_right": True}),
]


@pytest.mark.parametrize("lengths", [(6, 6), (4, 9), (9, 4)], ids=str)
@pytest.mark.parametrize(("bias", "kwargs"), BIASES, ids=lambda x: type(x).__name__)
def test_biases(bias, kwargs, lengths):
    q, k, v = (torch.randn(2, n, h, 16) for n, h in ((lengths[0], 4), (lengths[1], 2), (lengths[1], 2)))
    out = memory_efficient_attention(q, k, v, bias, scale=0.3)
    torch.testing.assert_close(out, dense(q, k, v, seen(*lengths, **kwargs), 0.3))


def test_tensors():
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 4, 16)
    bias = torch.randn(2, 4, 5, 7, requires_grad=True)
    out = memory_efficient_attention(q, k, k, bias)
    expected = dense(q, k, k, bias)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(x.square().sum(), bias)[0] for x in (out, expected))
    torch.testing.assert_close(ours, theirs)
    causal = xformers.LowerTriangularMask().add_bias(bias)
    torch.testing.assert_close(memory_efficient_attention(q, k, k, causal), dense(q, k, k, bias + seen(5, 7, right=0)))


def test_ranks():
    q, k = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    bias = torch.randn(2, 5, 7)
    expected = dense(q[:, :, None], k[:, :, None], k[:, :, None], bias[:, None])[:, :, 0]
    torch.testing.assert_close(memory_efficient_attention(q, k, k, bias), expected)
    q, k = torch.randn(2, 5, 2, 3, 16), torch.randn(2, 7, 2, 1, 16).expand(-1, -1, -1, 3, -1)
    out = memory_efficient_attention(q, k, k)
    assert out.shape == q.shape
    for keys in (k, k.contiguous()):
        expected = dense(q.flatten(2, 3), keys.flatten(2, 3), keys.flatten(2, 3), torch.zeros(5, 7)).view(q.shape)
        torch.testing.assert_close(memory_efficient_attention(q, keys, keys), expected)


KINDS = [
    (lambda bias: bias, {}),
    (BlockDiagonalMask.make_causal, {"right": 0}),
    (BlockDiagonalMask.make_causal_from_bottomright, {"right": 0, "bottom_right": True}),
    (lambda bias: bias.make_local_attention(2), {"left": 1, "right": 0}),
    (lambda bias: bias.make_local_attention_from_bottomright(2), {"left": 1, "right": 0, "bottom_right": True}),
]


@pytest.mark.parametrize(
    ("become", "kwargs"), KINDS, ids=["all", "causal", "bottom right", "local", "local bottom right"]
)
def test_blocks(become, kwargs):
    lengths = [(3, 5), (6, 2), (1, 4)]
    q, k = torch.randn(1, 10, 4, 16), torch.randn(1, 11, 2, 16)
    bias = become(BlockDiagonalMask.from_seqlens(*zip(*lengths, strict=True)))
    blocks = torch.block_diag(*[torch.ones(shape) for shape in lengths])
    entries = torch.full((10, 11), -torch.inf)
    entries[blocks.bool()] = torch.cat([seen(*shape, **kwargs).flatten() for shape in lengths])
    torch.testing.assert_close(memory_efficient_attention(q, k, k, bias), dense(q, k, k, entries))


@pytest.mark.parametrize("causal", [False, True])
def test_padded_keys(causal):
    kind = xformers.BlockDiagonalCausalWithOffsetPaddedKeysMask if causal else xformers.BlockDiagonalPaddedKeysMask
    bias = kind.from_seqlens([2, 3], 6, [5, 4])
    q, k = torch.randn(1, 5, 4, 16), torch.randn(1, 12, 2, 16)
    out = memory_efficient_attention(q, k, k, bias)
    for rows, keys, n in ((slice(0, 2), slice(0, 5), 5), (slice(2, 5), slice(6, 10), 4)):
        entries = seen(rows.stop - rows.start, n, right=0 if causal else None, bottom_right=True)
        torch.testing.assert_close(out[:, rows], dense(q[:, rows], k[:, keys], k[:, keys], entries))


def test_lists_of_tensors():
    tensors = [torch.randn(b, n, 4, 16) for b, n in ((1, 3), (2, 6), (1, 2))]
    bias, x = BlockDiagonalMask.from_tensor_list(tensors)
    assert x.shape == (1, 17, 4, 16)
    for part, tensor in zip(bias.split(x), tensors, strict=True):
        assert torch.equal(part, tensor)
    out = bias.split(memory_efficient_attention(x, x, x, bias.make_causal()))
    for part, tensor in zip(out, tensors, strict=True):
        expected = dense(tensor, tensor, tensor, seen(tensor.shape[1], tensor.shape[1], right=0))
        torch.testing.assert_close(part, expected)
    bias, q, k, v = BlockDiagonalMask.from_tensor_lists_qkv(tensors, [x[:, :2] for x in tensors])
    assert (q.shape[1], k.shape[1], v) == (17, 8, None)
    assert [tuple(x.shape[:2]) for x in bias.split_kv(k)] == [(1, 2), (2, 2), (1, 2)]
    with pytest.raises(ValueError, match="kv_seqlen must be q_seqlen"):
        bias.split(q)


def test_dropout():
    q, v = torch.randn(1, 64, 2, 16), torch.ones(1, 64, 2, 16)
    out = memory_efficient_attention(q, q, v, p=0.25)
    assert out.std() > 0 and abs(out.mean() - 1) < 0.1


def test_refusals():
    q = torch.randn(2, 5, 4, 16)
    with pytest.raises(TypeError, match="attn_bias must be a tensor or an AttentionBias"):
        memory_efficient_attention(q, q, q, "causal")
    with pytest.raises(ValueError, match="batch size of 1 with a BlockDiagonalMask"):
        memory_efficient_attention(q, q, q, BlockDiagonalMask.from_seqlens([5, 5]))
    with pytest.raises(ValueError, match="key must have shape"):
        memory_efficient_attention(q, q[0], q)
    with pytest.raises(ValueError, match="kv_seqlen must hold a length"):
        BlockDiagonalMask.from_seqlens([1, 2], [3])
