"""A small GPT learns the same with naive attention, torch's and pyattn's."""

from __future__ import annotations

import functools
import pydoc_data.topics
from unittest import mock

import torch

from pyattn import functional
from pyattn.models.gpt import GPT

CONTEXT, BATCH = 96, 4


def losses(attention, steps):
    """Of every step, in nats; the seed decides everything else."""
    text = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
    torch.manual_seed(0)
    model = GPT(dim=48, depth=2, heads=3, max_length=CONTEXT, attention=attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    values = []
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,))
        tokens = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        values.append(loss.item())
    return torch.tensor(values)


@functools.cache
def peer_losses(steps):
    return {name: losses(name, steps) for name in ("naive", "torch")}


def test_losses_are_those_of_naive_and_of_torch(engine):
    """A backend that is named never falls back, so it is its own backward that runs."""
    steps = 200

    native = mock.patch.object(functional, "attention", functools.partial(functional.attention, backend=engine.backend))
    with engine.at_work(), native:
        actual = losses("pyattn", steps)
    assert actual[-20:].mean() < actual[0] - 2, "it learns"
    for name, expected in peer_losses(steps).items():
        difference = float((actual - expected).abs().max())
        assert difference <= 1e-4, f"{name}: {difference:.2g}"
