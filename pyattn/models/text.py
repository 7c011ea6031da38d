"""From text to tensors: what is held out, a tokenizer, batches of pairs, windows of a long text."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyattn import checks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("<pad>", "<s>", "</s>")
PAD, START, END = range(len(SPECIAL))
POOL = 4096  # pairs that are sorted by length together: their batches have little padding, and yet vary


# ---- what is held out --------------------------------------------------------------------------------------


T = TypeVar("T")


def place(key: str | bytes) -> float:
    """A number in [0, 1) that follows from a key, and from nothing else, as evenly as if it were drawn."""
    digest = hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # exactly


def split(
    items: Iterable[T],
    held_out: float = 0.1,
    validation: float = 0.05,
    key: Callable[[Any], str | bytes] = operator.itemgetter(0),
) -> tuple[list[T], list[T], list[T]]:
    """What to train on, to validate with, and held out for the test, about as many as these parts of the whole.

    A hash of the key, by default of a pair's source, decides: equal ones stay together, and an item stays where it is
    when others join.

    Raises:
        ValueError: the parts are negative, or more than the whole.

    >>> [len(part) for part in split((f"source {i}", "target") for i in range(1000))]
    [855, 51, 94]
    """
    if min(held_out, validation) < 0 or held_out + validation > 1:
        raise ValueError(f"held_out and validation must be parts of 1, got {held_out} and {validation}")
    train: list[T] = []
    validate: list[T] = []
    test: list[T] = []
    for item in items:
        at = place(key(item))
        (test if at < held_out else validate if at < held_out + validation else train).append(item)
    return train, validate, test


def spread(items: Sequence[T], count: int) -> list[T]:
    """As many of the items, or all if there are not so many: from the first on, at even distances.

    >>> spread("abcdef", 3)
    ['a', 'c', 'e']
    """
    return [items[i * len(items) // count] for i in range(count)] if count < len(items) else list(items)


def split_text(text: str, fraction: float = 0.1) -> tuple[str, str]:
    """The text up to a line's end, and the rest: at least this fraction of its characters, by less than a line.

    Raises:
        ValueError: the fraction is not between 0 and 1, or no line ends in the first part.

    >>> split_text("one\\ntwo\\nthree\\n", 0.4)
    ('one\\ntwo\\n', 'three\\n')
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    cut = text.rfind("\n", 0, len(text) - max(1, round(len(text) * fraction))) + 1
    if cut == 0:
        raise ValueError(f"text must have a line that ends before its last {fraction:.0%}")
    return text[:cut], text[cut:]


# ---- tokens ------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of at most so many tokens, learned from the texts; ``decode(encode(text).ids)`` is the text.

    Ids 0, 1 and 2 are ``PAD``, ``START`` and ``END``. No text becomes them, not even "</s>", and ``decode`` leaves them
    out. Saving does not save that: set ``encode_special_tokens = True`` on a tokenizer that has been loaded.

    Raises:
        ValueError: the vocabulary has no place for the bytes and these three.
        ModuleNotFoundError: ``tokenizers`` is not installed.

    >>> tokenizer = train_tokenizer(["low", "lower"], 270)
    >>> tokenizer.encode("lower </s>").tokens
    ['lower', 'Ġ', '<', '/', 's', '>']
    """
    checks.require_extra("models", "tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(SPECIAL) + len(alphabet)
    if vocabulary < smallest:
        raise ValueError(f"vocabulary must be at least {smallest}, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    # It parts letters from other characters, so no merge spells a special token.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.encode_special_tokens = True  # as text, that is
    return tokenizer


# ---- tensors -----------------------------------------------------------------------------------------------

Ids = Sequence[int]


class Batch(NamedTuple):
    """B pairs of token ids, int64, padded with ``PAD``.

    A decoder reads ``target[:, :-1]`` and is to predict ``target[:, 1:]``, both [B, T].
    """

    source: Tensor  # [B, S]
    source_lengths: list[int]  # S is the largest
    target: Tensor  # [B, T + 1], from START to END
    target_lengths: list[int]  # without START, as what is read and what is predicted; T is the largest


def batches(
    pairs: Sequence[tuple[Ids, Ids]], tokens_per_batch: int, generator: torch.Generator | None = None
) -> Iterator[Batch]:
    """One epoch: each pair of source and target ids once, in random batches of pairs of similar length.

    Neither side, [B, S] nor [B, T], has more than ``tokens_per_batch`` tokens with its padding, unless one pair alone
    does. The same state of ``generator`` (of the CPU) gives the same batches; None is torch's own.

    >>> pairs = [([5, 6, 7], [8, 9]), ([5, 6], [8, 9])]
    >>> batch, = batches(pairs, tokens_per_batch=6)
    >>> sorted(batch.source_lengths), batch.target.tolist(), batch.target_lengths
    ([2, 3], [[1, 8, 9, 2], [1, 8, 9, 2]], [3, 3])
    """
    sizes = [max(len(source), len(target) + 1) for source, target in pairs]
    order = _permutation(len(pairs), generator)
    groups: list[list[int]] = []
    for first in range(0, len(order), POOL):
        groups.append([])
        for i in sorted(order[first : first + POOL], key=lambda i: (sizes[i], len(pairs[i][0]))):
            if groups[-1] and (len(groups[-1]) + 1) * sizes[i] > tokens_per_batch:
                groups.append([])
            groups[-1].append(i)
    for g in _permutation(len(groups), generator):
        yield _batch([pairs[i] for i in groups[g]])


def _permutation(n: int, generator: torch.Generator | None) -> list[int]:
    return torch.randperm(n, generator=generator).tolist()


def _batch(pairs: Sequence[tuple[Ids, Ids]]) -> Batch:
    sources = [list(source) for source, _ in pairs]
    targets = [[START, *target, END] for _, target in pairs]
    return Batch(padded(sources), [*map(len, sources)], padded(targets), [len(target) - 1 for target in targets])


def padded(rows: Sequence[list[int]]) -> Tensor:
    """int64 ``[B, L]`` of token ids, with ``PAD`` after each."""
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows], dtype=torch.int64)


def windows(ids: Tensor, length: int, batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Random windows [batch, length + 1] of a text's ids [N]: a model reads ``[:, :-1]`` and predicts ``[:, 1:]``.

    Raises:
        ValueError: N is not more than ``length``.

    >>> windows(torch.arange(4), length=3, batch=2)
    tensor([[0, 1, 2, 3],
            [0, 1, 2, 3]])
    """
    if len(ids) <= length:
        raise ValueError(f"ids must be more than length={length} tokens, got {len(ids)}")
    starts = torch.randint(len(ids) - length, (batch,), generator=generator)
    return ids.unfold(0, length + 1, 1)[starts.to(ids.device)]
