"""``attn_implementation="pyattn"`` against each model's own eager attention, on small models with random weights."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyattn.integrations import transformers as integration

integration.register()

SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 128,
         "initializer_range": 0.2}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}
SEQ2SEQ = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": None, "forced_eos_token_id": None, "decoder_start_token_id": 2,
           "dropout": 0.0, "init_std": 0.2}  # fmt: skip
WINDOW = {"sliding_window": 5}
HALF_FULL = {"layer_types": ["sliding_attention", "full_attention"]} | WINDOW

DECODERS = {
    "Llama": GROUPED,
    "Mistral": GROUPED | WINDOW | {"head_dim": 8},
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 16},
    "Gemma2": GROUPED | HALF_FULL | {"head_dim": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "Gemma3Text": GROUPED | HALF_FULL | {"head_dim": 16, "query_pre_attn_scalar": 4},
    "GptOss": GROUPED | HALF_FULL | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "GPT2": {"vocab_size": 99, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0,
             "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
             "initializer_range": 0.2},
    "DeepseekV3": SMALL | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                           "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
                           "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
                           "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    "Phi3": GROUPED,
    "OPT": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0},
    "Olmo2": GROUPED,
}  # fmt: skip
ENCODERS = {
    "Bert": SMALL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "Roberta": SMALL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "ModernBert": SMALL | {"local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
}  # fmt: skip
ENCODER_DECODERS = {
    "Bart": SEQ2SEQ,
    "Marian": SEQ2SEQ | {"max_position_embeddings": 128},
    "T5": {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
           "pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 2},
}  # fmt: skip
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def pair(name, settings, kind, dtype=torch.float32):
    """The same model, with its own attention and with pyattn's."""
    config = getattr(transformers, f"{name}Config")(**settings)
    name = {"Gemma3Text": "Gemma3"}.get(name, name)
    name = {"GPT2": "GPT2LMHeadModel"}.get(name, name + kind) if kind == "ForCausalLM" else name + kind
    torch.manual_seed(0)
    eager = (
        getattr(transformers, name)._from_config(copy.deepcopy(config), attn_implementation="eager").to(dtype).eval()
    )
    ours = (
        getattr(transformers, name)._from_config(copy.deepcopy(config), attn_implementation="pyattn").to(dtype).eval()
    )
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def decoders(name, dtype=torch.float32):
    return pair(name, DECODERS[name], "ForCausalLM", dtype)


def tokens(batch=3, length=11):
    return torch.randint(3, 99, (batch, length))


def padding(length, side):
    valid = torch.arange(length) < torch.tensor([[length], [length - 3], [length - 7]])
    return valid.long() if side == "right" else valid.flip(1).long()


def assert_close(ours, eager, dtype=torch.float32, where=None):
    where = torch.ones(ours.shape[:2], dtype=torch.bool) if where is None else where.bool()
    tolerance = TOLERANCES[dtype]
    scale = eager[where].float().abs().max().clamp(min=1)
    torch.testing.assert_close(ours[where] / scale, eager[where] / scale, rtol=0, atol=tolerance)


@pytest.fixture
def no_dense_masks(monkeypatch):
    """Fails if a mask of all positions is made."""

    def refuse(*args, **kwargs):
        raise AssertionError("a dense mask")

    monkeypatch.setattr(masking_utils, "sdpa_mask", refuse)


# ---- decoders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_prefill(name, side, dtype):
    eager, ours = decoders(name, dtype)
    x, mask = tokens(), None if side is None else padding(11, side)
    with torch.no_grad():
        assert_close(ours(x, attention_mask=mask).logits, eager(x, attention_mask=mask).logits, dtype, mask)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_no_dense_mask(name, side, no_dense_masks):
    _, ours = decoders(name)
    mask = None if side is None else padding(11, side)
    ours(tokens(), attention_mask=mask)


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_gradients(name, side):
    eager, ours = decoders(name)
    x, mask = tokens(), None if side is None else padding(11, side)
    weights = torch.randn(3, 11, 99) * (1 if mask is None else mask[..., None])
    for model in (eager, ours):
        (model(x, attention_mask=mask).logits * weights).sum().backward()
    for (parameter, x), y in zip(ours.named_parameters(), eager.parameters(), strict=True):
        if y.grad is not None:
            scale = y.grad.abs().max().clamp(min=1)
            torch.testing.assert_close(x.grad / scale, y.grad / scale, rtol=0, atol=1e-4, msg=parameter)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_generation(name, beams, cache):
    eager, ours = decoders(name)
    x, mask = tokens(), padding(11, "left")
    arguments = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "disable_compile": True}
    if cache == "static":
        arguments["cache_implementation"] = "static"
    expected = eager.generate(x, attention_mask=mask, **arguments)
    assert torch.equal(ours.generate(x, attention_mask=mask, **arguments), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_chunked_prefill(name):
    eager, ours = decoders(name)
    x, mask = tokens(), padding(11, "left")
    with torch.no_grad():
        expected = eager(x, attention_mask=mask).logits
        first = ours(x[:, :6], attention_mask=mask[:, :6], use_cache=True)
        second = ours(x[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    assert_close(torch.cat((first.logits, second.logits), 1), expected, where=mask)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3Text", "Qwen3"])
def test_packed_positions(name, no_dense_masks):
    """Sequences one after the other in a row, told by their positions: as if each were alone."""
    _, ours = decoders(name)
    x, lengths = tokens(2, 15), [(4, 11), (15,)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        out = ours(x, position_ids=positions, use_cache=False).logits
        for row, parts in enumerate(lengths):
            for alone, together in zip(x[row].split(parts), out[row].split(parts), strict=True):
                assert_close(together[None], ours(alone[None]).logits)


def test_masks_of_ones_own():
    eager, ours = decoders("Llama")
    x = tokens()
    allowed = (torch.rand(3, 1, 11, 11) < 0.5) | torch.eye(11, dtype=torch.bool)
    floats = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = eager(x, attention_mask=floats).logits
        assert_close(ours(x, attention_mask=floats).logits, expected)
        assert_close(ours(x, attention_mask=allowed).logits, expected)


def test_padding_with_gaps():
    eager, ours = decoders("Llama")
    x, mask = tokens(), torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1]]).expand(3, -1)
    with torch.no_grad():
        assert_close(ours(x, attention_mask=mask).logits, eager(x, attention_mask=mask).logits, where=mask)


def test_compile():
    eager, ours = decoders("Mistral")
    x, mask = tokens(), padding(11, "left")
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(x, attention_mask=mask).logits, eager(x, attention_mask=mask).logits, where=mask)


# ---- encoders, and both --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name, side, dtype):
    eager, ours = pair(name, ENCODERS[name], "Model", dtype)
    x, mask = tokens(), None if side is None else padding(11, side)
    with torch.no_grad():
        expected = eager(x, attention_mask=mask).last_hidden_state
        assert_close(ours(x, attention_mask=mask).last_hidden_state, expected, dtype, mask)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_makes_no_dense_mask(name, no_dense_masks):
    pair(name, ENCODERS[name], "Model")[1](tokens(), attention_mask=padding(11, "right"))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_vit(dtype):
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
                "image_size": 16, "patch_size": 4}  # fmt: skip
    eager, ours = pair("ViT", settings, "Model", dtype)
    images = torch.randn(2, 3, 16, 16, dtype=dtype)
    with torch.no_grad():
        assert_close(ours(images).last_hidden_state, eager(images).last_hidden_state, dtype)


def kind(name):
    return "MTModel" if name == "Marian" else "ForConditionalGeneration"


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder(name):
    eager, ours = pair(name, ENCODER_DECODERS[name], kind(name))
    x, y, mask = tokens(), tokens(3, 7), padding(11, "right")
    decoder_mask = padding(11, "right")[:, :7].clamp(min=0)
    decoder_mask[:, 0] = 1
    results = []
    for model in (eager, ours):
        out = model(input_ids=x, attention_mask=mask, decoder_input_ids=y, decoder_attention_mask=decoder_mask).logits
        (out * decoder_mask[..., None]).square().sum().backward()
        results.append(out.detach())
    assert_close(results[1], results[0], where=decoder_mask)
    for (parameter, p), q in zip(ours.named_parameters(), eager.parameters(), strict=True):
        if q.grad is not None:
            scale = q.grad.abs().max().clamp(min=1)
            torch.testing.assert_close(p.grad / scale, q.grad / scale, rtol=0, atol=1e-4, msg=parameter)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder_generation(name, beams):
    eager, ours = pair(name, ENCODER_DECODERS[name], kind(name))
    x, mask = tokens(), padding(11, "right")
    arguments = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    expected = eager.generate(x, attention_mask=mask, **arguments)
    assert torch.equal(ours.generate(x, attention_mask=mask, **arguments), expected)


def test_whisper():
    settings = SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}
    eager, ours = pair("Whisper", settings, "ForConditionalGeneration")
    features, y = torch.randn(2, 8, 40), tokens(2, 7)
    with torch.no_grad():
        expected = eager(input_features=features, decoder_input_ids=y).logits
        assert_close(ours(input_features=features, decoder_input_ids=y).logits, expected)


# ---- the mask ------------------------------------------------------------------------------------------------


def make_mask(**kwargs):
    arguments = {"batch_size": 3, "q_length": 11, "kv_length": 11, "device": "cpu"}
    arguments |= {"mask_function": masking_utils.causal_mask_function} | kwargs
    if "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters:  # before transformers 5.1 or so
        arguments["cache_position"] = arguments.pop("q_offset", 0) + torch.arange(arguments.pop("q_length"))
    return integration.mask(**arguments)


def patterns():
    m = masking_utils
    sequences = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]])
    window = m.sliding_window_causal_mask_function(3)
    yield "causal", m.causal_mask_function, {}
    if hasattr(m, "bidirectional_mask_function"):  # since transformers 5.0
        yield "bidirectional", m.bidirectional_mask_function, {}
    if hasattr(m, "sliding_window_bidirectional_mask_function"):  # since 5.1 or so
        yield "both sides", m.sliding_window_bidirectional_mask_function(2), {}
    yield "window", window, {}
    yield "offset", window, {"q_offset": 4, "kv_length": 10}
    yield "sliding cache", window, {"q_offset": 9, "kv_offset": 7, "kv_length": 8}
    for name, side in (("left", torch.flip), ("right", lambda x, dims: x)):
        padding = side(torch.arange(6) < torch.tensor([[6], [3]]), dims=(1,))
        yield f"padding {name}", window, {"attention_mask": padding}
    short = torch.arange(6) < torch.tensor([[6], [3]])
    yield "static cache", m.causal_mask_function, {"attention_mask": short, "kv_length": 9}
    late = torch.arange(15) >= torch.tensor([[9], [3]])
    yield "padding, sliding cache", window, {"attention_mask": late, "q_offset": 9, "kv_offset": 4, "kv_length": 11}
    yield "none valid", window, {"attention_mask": torch.tensor([[True] * 6, [False] * 6])}
    packed = m.and_masks(m.packed_sequence_mask_function(sequences), m.causal_mask_function)
    yield "packed", packed, {}
    if hasattr(m, "remap_positions_for_packed_sequence"):
        remapped = m.remap_positions_for_packed_sequence(window, positions)
        yield "remapped", m.and_masks(remapped, m.packed_sequence_mask_function(sequences)), {}


@pytest.mark.parametrize(("name", "function", "kwargs"), [pytest.param(*p, id=p[0]) for p in patterns()])
def test_intervals_are_the_mask(name, function, kwargs):
    """Attention by intervals is attention by the entries of the same mask."""
    arguments = {"batch_size": 2, "q_length": 6, "kv_length": 6, "mask_function": function} | kwargs
    mask = make_mask(**arguments)
    assert isinstance(mask, integration.IntervalMask) and mask.shape == (2, 1, 6, arguments["kv_length"])
    assert mask.untyped_storage().nbytes() == 1
    q, k, v = (torch.randn(2, h, n, 8) for h, n in ((4, 6), (2, mask.shape[3]), (2, mask.shape[3])))
    module = torch.nn.Module()
    out, _ = integration.attention(module, q, k, v, mask)
    torch.testing.assert_close(out, integration.attention(module, q, k, v, mask.dense())[0])
    bias = torch.randn(1, 4, 6, mask.shape[3])
    out, _ = integration.attention(module, q, k, v, mask, position_bias=bias)
    torch.testing.assert_close(out, integration.attention(module, q, k, v, mask.dense(), position_bias=bias)[0])


def test_masks_that_are_no_intervals():
    m = masking_utils
    odd = m.and_masks(m.causal_mask_function, lambda b, h, q, k: k % 2 == 0)
    gaps = torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]]).bool().expand(3, -1)
    for kwargs in ({"mask_function": odd}, {"attention_mask": gaps}, {"mask_function": m.or_masks(odd, odd)}):
        mask = make_mask(**kwargs, allow_is_causal_skip=False)
        assert not isinstance(mask, integration.IntervalMask) and mask.shape == (3, 1, 11, 11)


OWN = {
    "Bloom": {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "XGLM": {"vocab_size": 99, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
}


@pytest.mark.parametrize("name", OWN)
def test_a_model_with_attention_of_its_own_is_refused(name):
    """It would add our mask, which is bool, to its scores: nothing would be hidden, and nobody told."""
    _, ours = pair(name, OWN[name], "ForCausalLM")
    with pytest.raises(ValueError, match=f"must be 'eager' for the model of {name}Config, which computes attention"):
        ours(tokens(), attention_mask=padding(11, "left"))


def test_padding_that_has_no_values():
    with FakeTensorMode() as mode:
        mask = make_mask(attention_mask=mode.from_tensor(padding(11, "left").bool()))
    assert not isinstance(mask, integration.IntervalMask) and mask.shape == (3, 1, 11, 11)


def test_a_mask_behaves_like_a_tensor():
    mask = make_mask()
    dense = mask.dense()
    assert mask.shape == dense.shape and mask.dtype == torch.bool and mask.dim() == 4 and len(mask) == 3
    for same in (
        mask.to("cpu"),
        mask.contiguous(),
        mask.clone(),
        mask[:, :, :, :11],
        mask[:, :, :, :99],
        mask.detach(),
    ):
        assert isinstance(same, integration.IntervalMask) and torch.equal(same.dense(), dense)
    for ours, theirs in (
        (mask[:, :, :4], dense[:, :, :4]),
        (~mask, ~dense),
        (mask.float(), dense.float()),
        (mask.to(torch.float32), dense.to(torch.float32)),
        (torch.where(mask, 0.0, -1.0), torch.where(dense, 0.0, -1.0)),
        (torch.cat((mask, mask)), torch.cat((dense, dense))),
        (mask & dense, dense),
    ):
        assert type(ours) is torch.Tensor and torch.equal(ours, theirs)
    with pytest.raises(TypeError, match="must not be written to"):
        mask[0] = False
    with pytest.raises(TypeError, match="must not be written to"):
        mask.logical_not_()


def test_the_offset_of_a_static_cache_counts_on():
    offset = torch.tensor(4)
    mask = make_mask(q_length=2, q_offset=offset)
    offset += 2
    assert mask.intervals.q_offset.tolist() == [4, 4, 4]


@pytest.mark.parametrize("first", ["torch", "transformers", "pyattn", "transformers.modeling_utils"])
def test_the_environment_registers(first, tmp_path):
    code = f"""
import {first}
import transformers
config = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1)
model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="pyattn")
assert transformers.modeling_utils.__spec__.loader.__class__.__name__ == "SourceFileLoader"
"""
    environment = os.environ | {"PYATTN_TRANSFORMERS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- attention without a mask ------------------------------------------------------------------------------------


def attend(Lq, Lk, **kwargs):
    module = torch.nn.Module()
    q, k = torch.randn(2, 4, Lq, 8), torch.randn(2, 2, Lk, 8)
    mask = kwargs.pop("seen")
    out, weights = integration.attention(module, q, k, k, None, **kwargs)
    expected, _ = integration.attention(module, q, k, k, mask.expand(2, 1, Lq, Lk))
    torch.testing.assert_close(out, expected)
    assert weights is None and out.shape == (2, Lq, 4, 8)


def test_no_mask():
    ones = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    attend(5, 5, seen=torch.ones(5, 5, dtype=torch.bool).tril())
    attend(3, 7, seen=torch.ones(3, 7, dtype=torch.bool).tril())  # a static cache that is empty: from the top left
    attend(1, 7, seen=ones)
    attend(5, 7, seen=ones, is_causal=False)


def test_the_module_says_whether_it_is_causal():
    module = torch.nn.Module()
    module.is_causal = False
    q = torch.randn(2, 4, 5, 8)
    whole = integration.attention(module, q, q, q, None)[0]
    torch.testing.assert_close(whole, integration.attention(module, q, q, q, None, is_causal=False)[0])
    assert not torch.allclose(whole, integration.attention(module, q, q, q, None, is_causal=True)[0])


def test_packed_arguments():
    q, cu = torch.randn(1, 4, 9, 8), torch.tensor([0, 3, 9], dtype=torch.int32)
    module = torch.nn.Module()
    out, _ = integration.attention(module, q, q, q, None, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    parts = [integration.attention(module, *[q[:, :, a:b]] * 3, None)[0] for a, b in ((0, 3), (3, 9))]
    torch.testing.assert_close(out, torch.cat(parts, 1))


def test_refusals():
    module, q = torch.nn.Module(), torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="head_mask"):
        integration.attention(module, q, q, q, None, head_mask=torch.ones(2))
    with pytest.warns(UserWarning, match="no attention weights"):
        integration.attention(module, q, q, q, None, output_attentions=True)


# ---- planted bugs, which the comparisons above would see -----------------------------------------------------


def differs(name="Llama", side="left", length=11):
    eager, ours = decoders(name)
    x, mask = tokens(3, length), padding(length, side)
    with torch.no_grad():
        ours, eager = (model(x, attention_mask=mask).logits[mask.bool()] for model in (ours, eager))
    return not torch.allclose(ours, eager, atol=1e-3)


def test_without_a_mask_function_padding_would_be_lost(monkeypatch):
    assert not differs()
    monkeypatch.delitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "pyattn")
    assert differs()


@pytest.mark.parametrize(
    "mutate",
    [
        lambda x: x._replace(kv_starts=None),
        lambda x: x._replace(window=(x.window[0] and x.window[0] + 1, x.window[1])),
        lambda x: x._replace(window=(None, x.window[1])),
        lambda x: x._replace(q_offset=x.q_offset - 1),
    ],
    ids=["padding", "window off by one", "no window", "offset"],
)
def test_planted_bugs_are_seen(mutate, monkeypatch):
    assert not differs("Mistral")
    make = integration._intervals
    monkeypatch.setattr(integration, "_intervals", lambda *args: mutate(make(*args)))
    assert differs("Mistral")


@pytest.mark.parametrize(
    ("name", "argument"), [("Gemma2", "softcap"), ("GptOss", "s_aux"), ("Gemma3Text", "scaling"), ("Llama", "dropout")]
)
def test_arguments_that_matter(name, argument, monkeypatch):
    def without(*args, **kwargs):
        kwargs[argument] = 0.5 if argument == "dropout" else None
        return integration.attention(*args, **kwargs)

    assert not differs(name)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "pyattn", without)
    assert differs(name)
