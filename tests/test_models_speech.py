"""The Speech Transformer: frames, subsampling, padding, implementations, CTC, writing."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from scipy.signal import stft
from torch import nn

from pyattn.models.speech import SpeechTransformer, Subsample, log_mel, masked, mel_filters, padded

by_attention = pytest.mark.parametrize("attention", ["naive", "torch", "pyattn"])
LENGTHS = [37, 12, 5]


def model_of(attention="pyattn", **arguments):
    torch.manual_seed(2)  # one that writes something else of each recording
    sizes = {"mels": 16, "dim": 32, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "hidden": 48, "channels": 4}
    model = SpeechTransformer(20, **(sizes | arguments), attention=attention).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, std=0.3)
            if name.endswith(("out_proj.weight", "mlp.2.weight")):  # or it writes one token again and again
                parameter.mul_(4)
        model.decoder.norm.bias.zero_()  # which would prefer one token to the others, wherever
    return model


def frames_of(lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return padded([torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in lengths])


def texts_of(*shape, seed=2):
    return torch.randint(3, 20, shape, generator=torch.Generator().manual_seed(seed))


# ---- frames ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16000])
def test_frames_are_those_of_a_fourier_transform(rate):
    wave = torch.randn(rate, generator=torch.Generator().manual_seed(0))
    window, hop, size = rate // 40, rate // 100, {8000: 256, 16000: 512}[rate]
    _, _, spectrum = stft(
        wave.double(), rate, torch.hann_window(window).numpy(), window, window - hop, size, boundary=None, padded=False
    )
    power = torch.from_numpy(abs(spectrum.T) ** 2) * torch.hann_window(window).sum().double() ** 2
    energies = (power @ mel_filters(64, size // 2 + 1, rate).double() + 1e-6).log()
    expected = (energies - energies.mean()) / (energies.std() + 1e-2)
    torch.testing.assert_close(log_mel(wave, rate).double(), expected, rtol=1e-3, atol=1e-3)


def test_filters_are_even_in_mel():
    """Triangles, each from the peak of the one before to that of the one after; a tone lies in its own."""
    filters = mel_filters(40, 4001, 16000)
    peaks = filters.argmax(0) * 2.0
    mel = 2595 * torch.log10(1 + peaks / 700)
    assert (mel.diff() / mel.diff().mean() - 1).abs().max() < 0.05
    assert filters.min() == 0 and filters.max() <= 1
    between = filters[filters[:, 0].argmax() + 1 : filters[:, -1].argmax()]
    torch.testing.assert_close(between.sum(1), torch.ones(len(between)))
    wave = torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000)
    band = log_mel(wave, 16000, 40).mean(0).argmax().item()
    assert abs(peaks[band].item() - 1000) < 60


def test_loudness_does_not_matter():
    wave = torch.randn(4000)
    torch.testing.assert_close(log_mel(wave, 8000), log_mel(0.1 * wave, 8000), rtol=1e-2, atol=1e-2)
    features = log_mel(wave, 8000)
    assert features.shape == (48, 64) and abs(features.mean().item()) < 1e-5
    assert features.std().item() == pytest.approx(1, abs=2e-2)
    assert log_mel(torch.zeros(4000), 8000).abs().max() < 1e-3, "silence"
    with pytest.raises(ValueError, match=r"wave must be \[N\] with at least 25 ms, N = 200, got \[199\]"):
        log_mel(torch.zeros(199), 8000)


def test_masks_hide_bands_and_spans():
    features, lengths = torch.ones(2, 100, 64), [100, 50]
    before = features.clone()
    made = masked(features, lengths, torch.Generator().manual_seed(0))
    assert torch.equal(features, before) and set(made.unique().tolist()) == {0, 1}
    assert (made[1, 50:] == 1).float().mean() > 0.5
    shares = []
    for x, n in zip(made, lengths, strict=True):
        bands, spans = (x[:n] == 0).all(0), (x[:n] == 0).all(1)
        assert bands.sum() <= 32 and spans.sum() <= n // 5
        shares += [bands.any().item(), spans.any().item()]
    assert sum(shares) >= 3
    for seed in range(20):  # of a recording that ends in the middle no span is beyond
        beyond = masked(features, lengths, torch.Generator().manual_seed(seed))[1, 50:]
        assert not (beyond == 0).all(1).any()


# ---- padding -----------------------------------------------------------------------------------------------


def test_frames_become_a_quarter():
    torch.manual_seed(0)
    part = Subsample(16, 4, 32).double()
    frames, lengths = frames_of([37, 12, 5, 1])
    made, left = part(frames, lengths)
    assert left == [10, 3, 2, 1] and made.shape == (4, 10, 32)
    for b, n in enumerate(lengths):
        alone, (count,) = part(frames[b : b + 1, :n], [n])
        assert alone.shape == (1, count, 32)
        torch.testing.assert_close(made[b, :count], alone[0])


@by_attention
def test_padding_changes_nothing(attention):
    model, (frames, lengths), texts = model_of(attention), frames_of(), texts_of(3, 7)
    frames = frames.clone()
    for b, n in enumerate(lengths):
        frames[b, n:] = 1e3  # whatever stands there
    logits, looks = model(frames, lengths, texts), model.alignments(frames, lengths, texts)
    written, spelled = model.transcribe(frames, lengths, 9, beams=2), model.spell(frames, lengths)
    for b, n in enumerate(lengths):
        alone = (frames[b : b + 1, :n], [n])
        torch.testing.assert_close(logits[b], model(*alone, texts[b : b + 1])[0])
        torch.testing.assert_close(looks[b, :, : (n + 3) // 4], model.alignments(*alone, texts[b : b + 1])[0])
        assert not looks[b, :, (n + 3) // 4 :].any()
        assert written[b] == model.transcribe(*alone, 9, beams=2)[0] and spelled[b] == model.spell(*alone)[0]


def test_implementations_agree():
    (frames, lengths), texts, results = frames_of([37, 30, 25]), texts_of(3, 6), {}
    texts[1, 4:] = 0
    for attention in ("naive", "torch", "pyattn"):
        model = model_of(attention)
        loss = model.loss(frames, lengths, texts, [5, 3, 5])
        loss.backward()
        results[attention] = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
        assert all(x.abs().sum() > 0 for x in results[attention].values())
    for attention in ("torch", "pyattn"):
        torch.testing.assert_close(results[attention], results["naive"], rtol=1e-6, atol=1e-8)  # CTC is in float32


# ---- losses and writing ------------------------------------------------------------------------------------


def collapsed(path):
    return [token for token, _ in itertools.groupby(path) if token != 0]


def test_ctc_is_the_sum_over_all_alignments():
    """Of a text of two tokens over four frames: all paths that collapse to it, written out."""
    model = model_of()
    frames, lengths = frames_of([13])
    text = [4, 7]
    memory, left = model.hear(frames, lengths)
    assert left == [4]
    probabilities = model.ctc(memory)[0].softmax(-1)
    tokens = [0, 4, 7]
    paths = [path for path in itertools.product(tokens, repeat=4) if collapsed(path) == text]
    total = sum(torch.stack([probabilities[t, token] for t, token in enumerate(path)]).prod() for path in paths)
    loss = model.loss(frames, lengths, torch.tensor([[1, *text, 2]]), [3], ctc=1.0)
    torch.testing.assert_close(loss, -total.log() / 2, rtol=1e-5, atol=1e-5)


def test_the_loss_is_both_parts():
    model, (frames, lengths), texts = model_of(), frames_of([37, 30]), texts_of(2, 6)
    texts[1, 4:] = 0
    parts = [model.loss(frames, lengths, texts, [5, 3], ctc=ctc) for ctc in (0.0, 1.0)]
    torch.testing.assert_close(model.loss(frames, lengths, texts, [5, 3], ctc=0.3), 0.7 * parts[0] + 0.3 * parts[1])
    logits = model(frames, lengths, texts[:, :-1])
    torch.testing.assert_close(parts[0], F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten(), ignore_index=0))
    heard = model.ctc(model.hear(frames, lengths)[0]).log_softmax(-1)
    alone = [
        F.ctc_loss(heard[b, :n].float(), texts[b, 1 : 1 + m], [n], [m], reduction="sum")
        for b, n, m in ((0, 10, 4), (1, 8, 2))
    ]
    torch.testing.assert_close(parts[1].float(), sum(alone) / 6)


def test_a_text_too_long_for_its_frames_teaches_ctc_nothing():
    model, (frames, lengths), texts = model_of(), frames_of([5]), texts_of(1, 9)
    loss = model.loss(frames, lengths, texts, [8], ctc=1.0)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_spelling_leaves_out_blanks_and_repetitions():
    model, (frames, lengths) = model_of(), frames_of()
    memory, left = model.hear(frames, lengths)
    best = model.ctc(memory).argmax(-1)
    assert model.spell(frames, lengths) == [collapsed(row[:n].tolist()) for row, n in zip(best, left, strict=True)]


@by_attention
def test_it_writes_the_same_with_a_cache(attention):
    model, (frames, lengths) = model_of(attention), frames_of()
    written = model.transcribe(frames, lengths, 8, end=-1)
    assert len({tuple(text) for text in written}) == 3
    for b, n in enumerate(lengths):
        text = [1]
        for _ in range(8):
            text.append(model(frames[b : b + 1, :n], [n], torch.tensor([text]))[0, -1].argmax().item())
        assert written[b] == text[1:]


def test_it_learns_to_hear():
    """Tones of three heights, in random order and of random length; both ways of writing."""
    torch.manual_seed(0)
    model = SpeechTransformer(
        6, mels=8, dim=32, heads=2, encoder_layers=1, decoder_layers=1, hidden=64, channels=4, dropout=0.0
    )

    def sample():
        text = torch.randint(3, 6, (3,)).tolist()
        frames = [torch.zeros(int(torch.randint(8, 14, ())), 8) for _ in text]
        for token, tone in zip(text, frames, strict=True):
            tone[2:-2, 2 * (token - 3)] = 3
        return torch.cat(frames), text

    def batch(n):
        frames, texts = zip(*(sample() for _ in range(n)), strict=True)
        return *padded(frames), torch.tensor([[1, *text, 2] for text in texts]), [4] * n

    optimizer = torch.optim.AdamW(model.parameters(), 0.005)
    for _ in range(200):
        optimizer.zero_grad()
        model.loss(*batch(32)).backward()
        optimizer.step()
    frames, lengths, texts, _ = batch(50)
    expected = texts[:, 1:-1].tolist()
    model.eval()
    for written in (model.transcribe(frames, lengths, 8), model.spell(frames, lengths)):
        assert sum(a == b for a, b in zip(written, expected, strict=True)) >= 45


def test_names_of_parameters():
    names = {name.partition(".")[0] for name in model_of().state_dict()}
    assert names == {"subsample", "encoder", "ctc", "decoder"}


def test_errors():
    model, (frames, lengths) = model_of(), frames_of()
    with pytest.raises(ValueError, match=r"features must have shape \[B, T, 16\], got \[3, 37, 15\]"):
        model.spell(frames[..., :15], lengths)
    for wrong, message in (
        ([37, 12, 38], r"lengths must lie in \[1, 37\]"),
        ([37, 12], "lengths must hold one number"),
    ):
        with pytest.raises(ValueError, match=message):
            model.spell(frames, wrong)


def test_training_would_change_what_is_written():
    model, (frames, lengths) = model_of().train(), frames_of()
    for call in (lambda: model.transcribe(frames, lengths, 3), lambda: model.spell(frames, lengths)):
        with pytest.raises(RuntimeError, match="evaluation mode"):
            call()
