"""``pyattn.models.Seq2Seq``: three decoders, against each other's formulas written as loops."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from pyattn.models import Seq2Seq
from pyattn.nn import implementations

VOCABULARY, TARGET_VOCABULARY, DIM = 11, 13, 16
LENGTHS = [4, 7, 1, 6]  # unsorted, and shorter than the batch is wide
by_alignment = pytest.mark.parametrize("alignment", ["none", "additive", "multiplicative"])
by_looking_back = pytest.mark.parametrize("alignment", ["additive", "multiplicative"])
by_layers = pytest.mark.parametrize("layers", [1, 2])


def make(alignment, **options):
    """Of random weights larger than the usual ones: alignments that differ, tokens that change."""
    torch.manual_seed(0)
    model = Seq2Seq(VOCABULARY, TARGET_VOCABULARY, dim=DIM, alignment=alignment, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.double().eval()


def batch(target_length=6):
    """Real tokens at the padding, too: what stands there must not matter."""
    torch.manual_seed(1)
    source = torch.randint(VOCABULARY, (len(LENGTHS), max(LENGTHS) + 2))
    target = torch.randint(3, TARGET_VOCABULARY, (len(LENGTHS), target_length))
    target[:, 0] = 1
    return source, target


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@by_alignment
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_shapes_and_dtypes(alignment, dtype):
    model = Seq2Seq(VOCABULARY, TARGET_VOCABULARY, dim=DIM, alignment=alignment)
    source, target = (x.to(dtype) for x in batch())
    for lengths in (LENGTHS, tuple(LENGTHS), torch.tensor(LENGTHS, dtype=dtype)):
        logits = model(source, lengths, target)
        assert logits.shape == (4, 6, TARGET_VOCABULARY) and logits.dtype == torch.float32
        assert model.loss(source, lengths, target).shape == ()
    assert Seq2Seq(VOCABULARY, dim=DIM)(source, LENGTHS, target % VOCABULARY).shape == (4, 6, VOCABULARY)


@by_alignment
@by_layers
def test_a_sample_in_a_padded_batch_is_what_it_is_alone(alignment, layers):
    model = make(alignment, layers=layers)
    source, target = batch()
    logits, texts = model(source, LENGTHS, target), model.translate(source, LENGTHS, 9)
    for i, length in enumerate(LENGTHS):
        alone = source[i : i + 1, :length], [length]
        close(logits[i : i + 1], model(*alone, target[i : i + 1]))
        assert model.translate(*alone, 9) == [texts[i]]
        if alignment != "none":
            weights = model.alignments(source, LENGTHS, target)[i : i + 1, :, :length]
            close(weights, model.alignments(*alone, target[i : i + 1]))


@by_alignment
def test_the_source_is_read_to_its_ends(alignment):
    """Both the first token and the last one that counts are heard at every step."""
    model = make(alignment)
    source, target = batch()
    logits = model(source, LENGTHS, target)
    for column in (torch.zeros(4, dtype=torch.int64), torch.tensor(LENGTHS) - 1):
        other = source.clone()
        other[torch.arange(4), column] = (other[torch.arange(4), column] + 1) % VOCABULARY
        assert ((model(other, LENGTHS, target) - logits).abs().amax(-1) > 1e-6).all()


@by_looking_back
def test_alignments_sum_to_one_and_are_zero_at_padding(alignment):
    model = make(alignment)
    source, target = batch()
    weights = model.alignments(source, LENGTHS, target)
    assert weights.shape == (4, 6, source.shape[1]) and not weights.requires_grad
    close(weights.sum(-1), torch.ones(4, 6, dtype=torch.float64))
    for row, length in zip(weights, LENGTHS, strict=True):
        assert (row[:, :length] > 0).all() and (row[:, length:] == 0).all()
    assert weights[1].std(0).max() > 1e-3, "steps look at different places"


def states_of(model, source, length):
    """A sample's states, and the decoder's first one, through the encoder's GRU alone."""
    states, last = model.encoder.gru(model.encoder.embedding(source[:, :length]))
    return states[0], torch.stack(
        [torch.cat(tuple(pair), -1) for pair in last.unflatten(0, (-1, 2))]
    )  # [layers, 1, dim]


@by_layers
def test_additive_is_bahdanaus_formula(layers):
    """alpha = softmax(v^T tanh(W s_{i-1} + U h)), c = sum of alpha h, s_i = GRU([y_{i-1}; c], s_{i-1})."""
    model = make("additive", layers=layers)
    source, target = batch()
    W, U, v = (model.decoder.get_parameter(f"{name}.weight") for name in ("query", "key", "score"))
    logits, weights = model(source, LENGTHS, target), model.alignments(source, LENGTHS, target)
    for b, length in enumerate(LENGTHS):
        h, state = states_of(model, source[b : b + 1], length)
        for i, token in enumerate(target[b]):
            s = state[-1, 0]
            alpha = torch.stack([v[0] @ torch.tanh(W @ s + U @ h_j) for h_j in h]).softmax(0)
            c = sum(a * h_j for a, h_j in zip(alpha, h, strict=True))
            x = torch.cat((model.embedding(token), c))
            output, state = model.decoder.gru(x[None, None], state)
            close(weights[b, i, :length], alpha)
            close(logits[b, i], model.output(output[0, 0]))


@by_layers
def test_multiplicative_is_luongs_formula(layers):
    """s_i = GRU(y_{i-1}, s_{i-1}), alpha = softmax(s_i^T W h), c = sum of alpha h, h~ = tanh(W_c [c; s_i])."""
    model = make("multiplicative", layers=layers)
    source, target = batch()
    W, W_c = (model.decoder.get_parameter(f"{name}.weight") for name in ("key", "combine"))
    logits, weights = model(source, LENGTHS, target), model.alignments(source, LENGTHS, target)
    for b, length in enumerate(LENGTHS):
        h, state = states_of(model, source[b : b + 1], length)
        for i, token in enumerate(target[b]):
            output, state = model.decoder.gru(model.embedding(token)[None, None], state)
            s = output[0, 0]
            alpha = torch.stack([s @ W @ h_j for h_j in h]).softmax(0)
            c = sum(a * h_j for a, h_j in zip(alpha, h, strict=True))
            close(weights[b, i, :length], alpha)
            close(logits[b, i], model.output(torch.tanh(W_c @ torch.cat((c, s)))))


def test_without_alignment_it_is_two_grus():
    model = make("none")
    source, target = batch()
    logits = model(source, LENGTHS, target)
    for b, length in enumerate(LENGTHS):
        _, state = states_of(model, source[b : b + 1], length)
        close(logits[b], model.output(model.decoder.gru(model.embedding(target[b : b + 1]), state)[0][0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_multiplicative_is_the_same_by_every_attention(dtype):
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5}[dtype]
    source, target = batch()
    results = {}
    for attention in ("naive", "torch", "pyattn"):
        model = make("multiplicative", attention=attention, layers=2).to(dtype)
        loss = model.loss(source, LENGTHS, target)
        loss.backward()
        results[attention] = {"logits": model(source, LENGTHS, target).detach(), "loss": loss.detach()}
        results[attention] |= {name: parameter.grad for name, parameter in model.named_parameters()}
    for attention in ("torch", "pyattn"):
        torch.testing.assert_close(results[attention], results["naive"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("attention", ["naive", "torch", "pyattn"])
def test_the_steps_of_a_batch_are_one_call_of_the_attention_that_was_named(attention, monkeypatch):
    calls = []
    attend = implementations.attend

    def recorded(name, query, *rest, **arguments):
        calls.append((name, query.shape[2]))
        return attend(name, query, *rest, **arguments)

    monkeypatch.setattr(implementations, "attend", recorded)
    source, target = batch()
    make("multiplicative", attention=attention)(source, LENGTHS, target)
    assert calls == [(attention, 6)]


@by_looking_back
def test_keys_are_projected_once(alignment):
    model, calls = make(alignment), []
    model.decoder.key.register_forward_hook(lambda *_: calls.append(1))
    source, target = batch()
    for compute in (lambda: model(source, LENGTHS, target), lambda: model.translate(source, LENGTHS, 9)):
        compute()
        assert calls == [1]
        calls.clear()


@by_alignment
def test_translate_is_forward_of_a_growing_prefix(alignment):
    model = make(alignment, layers=2)
    source, _ = batch()
    tokens = torch.full((4, 1), 1)
    for _ in range(12):
        tokens = torch.cat((tokens, model(source, LENGTHS, tokens)[:, -1:].argmax(-1)), 1)
    rows = tokens[:, 1:].tolist()
    assert len({tuple(row) for row in rows}) > 1, "samples differ"
    end = rows[0][2]  # a token that comes, so that something ends
    expected = [row[: row.index(end)] if end in row else row for row in rows]
    assert model.translate(source, LENGTHS, 12, end=end) == expected
    assert model.translate(source, LENGTHS, 2, end=-1) == [row[:2] for row in rows]


@by_alignment
def test_translate_stops_when_all_samples_have_ended(alignment):
    model, steps = make(alignment), []
    source, _ = batch()
    written = [[5, 2, 5], [2, 6, 7], [5, 6, 2], [5, 2, 6]]  # by a model that goes on after the end, too

    def scripted(module, inputs, logits):
        steps.append(1)
        return F.one_hot(torch.tensor(written)[:, len(steps) - 1], TARGET_VOCABULARY)[:, None].double()

    model.output.register_forward_hook(scripted)
    assert model.translate(source, LENGTHS, 50) == [[5], [], [5, 6], [5]]
    assert len(steps) == 3


@by_alignment
def test_training_would_change_what_is_written(alignment):
    model, (source, target) = make(alignment).train(), batch()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        model.translate(source, LENGTHS, 9)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        model.alignments(source, LENGTHS, target)


@by_alignment
def test_loss_is_cross_entropy_of_what_is_no_padding(alignment):
    model = make(alignment)
    source, target = batch()
    target[0, 4:] = target[2, 2:] = 0
    logits = model(source, LENGTHS, target)
    terms = [
        F.cross_entropy(logits[b, t - 1], target[b, t])
        for b in range(4)
        for t in range(1, target.shape[1])
        if target[b, t] != 0
    ]
    assert len(terms) == 14
    loss = model.loss(source, LENGTHS, target)
    close(loss, torch.stack(terms).mean())
    close(model.loss(source, LENGTHS, F.pad(target, (0, 3))), loss)
    close(model.loss(F.pad(source, (0, 3)), LENGTHS, target), loss)
    torch.testing.assert_close(model.loss(source, LENGTHS, target.int()), loss)
    other = make(alignment, padding=5)
    close(other.loss(source, LENGTHS, F.pad(target.where(target != 5, 6), (0, 3), value=5)),
          other.loss(source, LENGTHS, target.where(target != 5, 6)))  # fmt: skip


GRU = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
ENCODER = ["encoder.embedding.weight", *(f"encoder.gru.{name}{end}" for end in ("", "_reverse") for name in GRU)]
DECODER = ["embedding.weight", *(f"decoder.gru.{name}" for name in GRU)]
OWN = {"none": [], "additive": ["key", "query", "score"], "multiplicative": ["key", "combine"]}


@by_alignment
def test_names_of_the_state(alignment):
    own = [f"decoder.{name}.weight" for name in OWN[alignment]]
    assert list(make(alignment).state_dict()) == [*ENCODER, *DECODER, *own, "output.weight", "output.bias"]


@by_alignment
@by_layers
def test_gradients_reach_every_parameter(alignment, layers):
    model = make(alignment, layers=layers).train()
    source, target = batch()
    model.loss(source, LENGTHS, target).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@by_alignment
def test_dropout_is_for_training(alignment):
    model = make(alignment, dropout=0.5, layers=2)
    source, target = batch()
    expected = model(source, LENGTHS, target)
    close(model(source, LENGTHS, target), expected)
    for part in (model.encoder.dropout, model.encoder.gru, model.decoder.gru, model.dropout):
        part.train()
        assert not torch.equal(model(source, LENGTHS, target), expected)
        part.eval()
    with warnings.catch_warnings():  # torch's, of dropout between the layers of one
        warnings.simplefilter("error")
        model = make(alignment, dropout=1.0).train()
    embedded = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0]))
    close(model(source, LENGTHS, target), model.output.bias.expand(4, 6, -1))
    assert (embedded[0] == 0).all()


@by_looking_back
def test_it_learns_to_reverse(alignment):
    source = torch.tensor([[3, 4, 5, 6], [6, 5, 3, 0], [4, 4, 0, 0], [5, 3, 6, 4]])
    lengths = [4, 3, 2, 4]
    texts = [row[:length].flip(0).tolist() for row, length in zip(source, lengths, strict=True)]
    target = torch.tensor([[1, *text, 2] + [0] * (4 - len(text)) for text in texts])
    model = Seq2Seq(7, dim=32, dropout=0.0, alignment=alignment)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model.loss(source, lengths, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert model.eval().translate(source, lengths, 6) == texts


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alignment": "dot"}, "alignment must be one of none, additive, multiplicative, got 'dot'"),
        ({"alignment": None}, "alignment must be one of"),
        ({"attention": "flash"}, "attention must be one of pyattn, naive, torch, got 'flash'"),
        ({"dim": 15}, "dim must be even, got 15"),
    ],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        Seq2Seq(VOCABULARY, **options)


SOURCE, TARGET = batch()


@by_alignment
@pytest.mark.parametrize("method", ["forward", "loss", "alignments"])
@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (TypeError, "source must be a tensor, got list", {"source": [[1]]}),
        (TypeError, "source must be int32 or int64, got float32", {"source": SOURCE.float()}),
        (ValueError, r"source must have shape \[B, L\], B at least 1 and L at least 1, got", {"source": SOURCE[0]}),
        (ValueError, r"source must have shape \[B, L\], B at least 1 and L at least 1, got", {"source": SOURCE[:, :0]}),
        (ValueError, r"source must have shape \[B, L\], B at least 1", {"source": SOURCE[:0], "source_lengths": []}),
        (ValueError, r"source_lengths must lie in \[1, S\] = \[1, 9\], got", {"source_lengths": [4, 0, 1, 6]}),
        (ValueError, "source_lengths must lie in", {"source_lengths": torch.tensor([4, 10, 1, 6])}),
        (ValueError, "source_lengths must hold one number for each of the 4 samples", {"source_lengths": [4]}),
        (ValueError, "source_lengths must have shape", {"source_lengths": torch.tensor([[4, 4, 4, 4]])}),
        (TypeError, "source_lengths must be int32 or int64, got float32", {"source_lengths": torch.ones(4)}),
        (TypeError, "source_lengths must be a tensor, list or tuple of ints, got int", {"source_lengths": 4}),
        (TypeError, "target must be a tensor, got list", {"target": [[1, 2]]}),
        (TypeError, "target must be int32 or int64, got bool", {"target": TARGET.bool()}),
        (ValueError, "target must have shape .* L at least", {"target": TARGET[0]}),
        (ValueError, "target must have shape .* L at least", {"target": TARGET[:, :0]}),
        (ValueError, r"target must have shape \[B, T\] = ", {"target": TARGET[:3]}),
    ],
)
def test_a_wrong_input_is_named(alignment, method, error, words, change):
    model = make(alignment)
    arguments = {"source": SOURCE, "source_lengths": LENGTHS, "target": TARGET} | change
    with pytest.raises(error, match=words):
        getattr(model, method)(**arguments)


def test_what_else_is_refused():
    model = make("none")
    with pytest.raises(ValueError, match=r"target must have shape .* L at least 2, got"):
        model.loss(SOURCE, LENGTHS, TARGET[:, :1])
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        model.translate(SOURCE, LENGTHS, 0)
    with pytest.raises(TypeError, match="max_length must be an int, got float"):
        model.translate(SOURCE, LENGTHS, 3.0)
    with pytest.raises(ValueError, match='alignment must be "additive" or "multiplicative" to have weights'):
        model.alignments(SOURCE, LENGTHS, TARGET)
