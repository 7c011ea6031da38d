"""Sampling, and beam search against all texts there are."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyattn.models.generation import beam_search, penalty, sample

VOCABULARY, END = 4, 2


class Chain:
    """A model of which the next token depends on the last two; its state is what a cache would be."""

    def __init__(self, batch, beams, seed):
        generator = torch.Generator().manual_seed(seed)
        self.tables = 2 * torch.randn(batch, VOCABULARY + 1, VOCABULARY + 1, VOCABULARY, generator=generator)
        self.batch, self.beams = batch, beams
        self.before = [VOCABULARY] * (batch * beams)  # the token before the last, of each hypothesis

    def step(self, tokens):
        logits = [self.tables[n // self.beams, self.before[n], t] for n, t in enumerate(tokens.tolist())]
        self.before = tokens.tolist()
        return torch.stack(logits)

    def reorder(self, indices):
        self.before = [self.before[i] for i in indices]

    def score(self, b, text):
        """The log-probability of a text with its end."""
        total, before, last = 0.0, VOCABULARY, VOCABULARY
        for token in text:
            total += self.tables[b, before, last].log_softmax(-1)[token].item()
            before, last = last, token
        return total

    def search(self, max_length, alpha):
        first = torch.full((self.batch,), VOCABULARY)
        return beam_search(
            self.step, self.reorder, first, beams=self.beams, max_length=max_length, end=END, length_penalty=alpha
        )


def all_texts(max_length):
    """With their ends; those of the greatest length also without."""
    others = [t for t in range(VOCABULARY) if t != END]
    for length in range(max_length):
        for text in itertools.product(others, repeat=length):
            yield [*text, END]
    yield from (list(text) for text in itertools.product(others, repeat=max_length))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0, 6.0])
@pytest.mark.parametrize("seed", range(6))
def test_all_hypotheses_find_the_best_of_all_texts(alpha, seed):
    chain = Chain(batch=3, beams=VOCABULARY**3, seed=seed)
    for b, found in enumerate(chain.search(4, alpha)):
        texts = {tuple(text): chain.score(b, text) / penalty(len(text), alpha) for text in all_texts(4)}
        best = max(texts, key=texts.__getitem__)
        assert found.tokens == [t for t in best if t != END]
        assert found.score == pytest.approx(texts[best], abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_one_hypothesis_is_greedy(seed):
    chain = Chain(batch=3, beams=1, seed=seed)
    for b, found in enumerate(chain.search(6, 0.6)):
        text = []
        while len(text) < 6 and END not in text:
            context = ([VOCABULARY, VOCABULARY, *text])[-2:]
            text.append(chain.tables[b, context[0], context[1]].argmax().item())
        assert found.tokens == [t for t in text if t != END]


def test_few_hypotheses_find_what_their_score_says():
    for seed in range(10):
        chain = Chain(batch=2, beams=2, seed=seed)
        for b, found in enumerate(chain.search(5, 0.6)):
            text = [*found.tokens, END] if len(found.tokens) < 5 else found.tokens
            scores = {chain.score(b, t) / penalty(len(t), 0.6) for t in (text, [*found.tokens, END])}
            assert any(found.score == pytest.approx(score, abs=1e-4) for score in scores)


def test_more_hypotheses_are_not_worse_on_the_whole():
    def total(beams):
        return sum(found.score for seed in range(10) for found in Chain(2, beams, seed).search(5, 0.6))

    assert total(1) < total(3) <= total(64) + 1e-4


@pytest.mark.parametrize("name", ["beams", "max_length"])
def test_search_errors(name):
    arguments = {"beams": 1, "max_length": 1, "end": 0} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        beam_search(lambda tokens: tokens, lambda indices: None, torch.tensor([0]), **arguments)


# ---- sampling ----------------------------------------------------------------------------------------------

LOGITS = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()


def frequencies(**arguments):
    generator = torch.Generator().manual_seed(0)
    tokens = sample(LOGITS.expand(20000, 4), generator=generator, **arguments)
    return (torch.bincount(tokens, minlength=4) / 20000).tolist()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.1, 0.4, 0.3, 0.2]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 9 / 30, 4 / 30]),
        ({"top_k": 2}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_k": 9}, [0.1, 0.4, 0.3, 0.2]),
        ({"top_p": 0.65}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_p": 0.75}, [0, 4 / 9, 3 / 9, 2 / 9]),
        ({"top_p": 1e-6}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.65}, [0, 4 / 7, 3 / 7, 0]),
    ],
)
def test_sampling_draws_what_it_says(arguments, expected):
    assert frequencies(**arguments) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0}, r"top_p must lie in \(0, 1\], got 0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
    ],
)
def test_sampling_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(LOGITS[None], **arguments)
