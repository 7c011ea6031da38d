"""The GPT: what it computes by each implementation, and that it writes the same with a cache as without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyattn.models.gpt import GPT, GPTClassifier

VOCABULARY = 50
by_attention = pytest.mark.parametrize("attention", ["naive", "torch", "pyattn"])


def model_of(attention="pyattn", **arguments):
    torch.manual_seed(0)
    sizes = {"vocabulary": VOCABULARY, "dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "max_length": 40}
    model = GPT(**(sizes | arguments), attention=attention).double()
    with torch.no_grad():
        for parameter in model.blocks.parameters():  # or it writes one token again and again
            if parameter.dim() == 2:
                parameter.mul_(20)
    return model


def tokens_of(*shape):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def test_implementations_agree():
    tokens, results = tokens_of(2, 21), {}
    for attention in ("naive", "torch", "pyattn"):
        model = model_of(attention, window=7)
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        loss.backward()
        results[attention] = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}
        assert all(x.abs().sum() > 0 for x in results[attention].values())
    for attention in ("torch", "pyattn"):
        torch.testing.assert_close(results[attention], results["naive"], rtol=1e-9, atol=1e-11)


@by_attention
def test_shapes_and_loss(attention):
    model, tokens = model_of(attention), tokens_of(3, 12)
    logits = model(tokens)
    assert logits.shape == (3, 12, VOCABULARY)
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:])
    torch.testing.assert_close(model(tokens[:, :-1], targets=tokens[:, 1:]), expected)


@by_attention
@pytest.mark.parametrize("window", [None, 3])
def test_a_token_sees_those_before_it(attention, window):
    model, tokens = model_of(attention, window=window, depth=1), tokens_of(1, 12)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % VOCABULARY
    differs = (model(tokens) != model(changed)).any(-1)[0]
    last = 12 if window is None else 5 + window + 1
    assert differs.tolist() == [5 <= i < last for i in range(12)]


def uncached(model, prompt, new_tokens):
    text = prompt
    for _ in range(new_tokens):
        text = torch.cat((text, model(text[None])[0, -1].argmax()[None]))
    return text[len(prompt) :]


@by_attention
@pytest.mark.parametrize("window", [None, 5])
def test_it_writes_the_same_with_a_cache(attention, window):
    model, prompts, lengths = model_of(attention, window=window), tokens_of(3, 9), [9, 1, 4]
    written = model.generate(prompts, 12, lengths=lengths, temperature=0)
    for b, n in enumerate(lengths):
        assert torch.equal(written[b], uncached(model, prompts[b, :n], 12))
    assert written.unique().numel() > 5, "not one token again and again"
    assert torch.equal(model.generate(prompts, 12, temperature=0)[0], written[0])


def test_paged_caches_and_texts_that_go_on():
    model, prompts = model_of(), tokens_of(2, 9)
    whole = model.generate(prompts, 12, temperature=0)
    caches = model.caches(2, page_size=4)
    first = model.generate(prompts, 5, temperature=0, caches=caches)
    # the last token that was written is not in the caches yet
    second = model.generate(first[:, -1:], 7, temperature=0, caches=caches)
    assert torch.equal(torch.cat((first, second), 1), whole)


def test_sampling_follows_its_generator():
    model, prompts = model_of(), tokens_of(2, 9)
    draws = [
        model.generate(prompts, 20, temperature=30.0, top_k=10, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_names_of_parameters():
    block = ("attention_norm", "attention.qkv_proj", "attention.out_proj", "mlp_norm", "mlp.gate_and_up", "mlp.down")
    names = ["tokens.weight"] + [f"blocks.{i}.{part}.weight" for i in range(2) for part in block] + ["norm.weight"]
    assert list(model_of().state_dict()) == names


def test_errors():
    with pytest.raises(ValueError, match="dim must be an even multiple of heads, got dim 30 and heads 4"):
        GPT(dim=30, heads=4)
    with pytest.raises(ValueError, match="attention must be one of"):
        GPT(attention="sdpa")
    with pytest.raises(ValueError, match="tokens must have at most max_length=40 positions, got 41"):
        model_of()(tokens_of(1, 41))
    with pytest.raises(ValueError, match=r"prompts must have shape \[B, L\] with at least one token, got \[2, 0\]"):
        model_of().generate(tokens_of(2, 0), 1)
    with pytest.raises(ValueError, match=r"lengths must lie in \[1, 5\], got \[5, 0\]"):
        model_of().generate(tokens_of(2, 5), 1, lengths=[5, 0])
    with pytest.raises(ValueError, match="length must be at most max_positions = 40"):
        model_of().generate(tokens_of(1, 39), 9)


# ---- the classifier ----------------------------------------------------------------------------------------


def classifier_of(attention="pyattn"):
    model = GPTClassifier(model_of(attention), 3).double().eval()
    torch.nn.init.normal_(model.head.weight)
    return model


@by_attention
def test_a_text_is_classified_by_the_mean_of_its_tokens(attention):
    """Whatever stands behind it."""
    model, tokens, lengths = classifier_of(attention), tokens_of(3, 12), [12, 7, 1]
    logits = model(tokens, lengths)
    for b, n in enumerate(lengths):
        stream = model.gpt.norm(model.gpt._stream(tokens[b : b + 1, :n]))
        torch.testing.assert_close(logits[b], model.head(stream[0].mean(0)))


def test_lengths_are_checked():
    for wrong, message in (
        ([0, 4], r"lengths must lie in \[1, 9\], got \[0, 4\]"),
        ([4], "lengths must hold one number"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier_of()(tokens_of(2, 9), wrong)


@by_attention
def test_its_loss_has_the_texts_own_tokens_in_it(attention):
    model, tokens, lengths, labels = classifier_of(attention), tokens_of(2, 9), [9, 4], torch.tensor([2, 0])
    by_label = F.cross_entropy(model(tokens, lengths), labels)
    torch.testing.assert_close(model.loss(tokens, lengths, labels, language=0), by_label)
    logits = model.gpt(tokens)
    each = [F.cross_entropy(logits[b, : n - 1], tokens[b, 1:n], reduction="sum") for b, n in enumerate(lengths)]
    torch.testing.assert_close(model.loss(tokens, lengths, labels, language=0.3), by_label + 0.3 * sum(each) / 11)


def test_it_learns_from_what_the_gpt_has_learned():
    """A text's kind is its first token: all parameters change, those of the GPT, too."""
    torch.manual_seed(0)
    model = GPTClassifier(GPT(vocabulary=9, dim=32, depth=1, heads=2, max_length=8), 3, dropout=0.0)
    tokens, lengths = torch.randint(3, 9, (64, 8)), torch.randint(2, 9, (64,)).tolist()
    tokens[:, 0] = torch.arange(64) % 3
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert model.loss(tokens, lengths, tokens[:, 0], language=0).item() == pytest.approx(1.0986, abs=1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(tokens, lengths, tokens[:, 0]).backward()
        optimizer.step()
    assert (model(tokens, lengths).argmax(-1) == tokens[:, 0]).float().mean() > 0.95
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
