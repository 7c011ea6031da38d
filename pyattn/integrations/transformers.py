"""``attn_implementation="pyattn"`` for Hugging Face's transformers.

transformers keeps two tables of functions: what computes attention, and what makes the mask that it gets. A mask of
``sdpa`` has B * Lq * Lk entries, although nearly all of them are an interval of keys for each query. The mask made
here holds the intervals; whoever looks at its entries, finds them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyattn import functional

_NAME = "pyattn"


def register() -> None:
    """Makes ``attn_implementation="pyattn"`` known to transformers (4.56 and later), with the masks that go with it.

    ``PYATTN_TRANSFORMERS=1`` in the environment does the same when transformers is imported.

    Example:
        >>> import torch
        >>> from pyattn.integrations import transformers as integration
        >>> integration.register()
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=10, n_positions=32, n_embd=16, n_layer=1, n_head=2)
        >>> model = GPT2LMHeadModel._from_config(config, attn_implementation="pyattn")
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 10])
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, mask)


class Intervals(NamedTuple):
    """Which keys each query sees, in the terms of ``pyattn.attention``."""

    window: tuple[int | None, int | None]
    q_offset: int | Tensor
    kv_starts: Tensor | None = None
    kv_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None  # of the batch's rows, one after the other, where each holds several sequences

    def to(self, device: torch.device) -> Intervals:
        return Intervals._make(x.to(device) if isinstance(x, Tensor) else x for x in self)


class IntervalMask(Tensor):
    """A bool mask ``[B, 1, Lq, Lk]`` in O(B) memory, which becomes dense as soon as an operator needs its entries."""

    intervals: Intervals
    dense: Callable[[], Tensor]

    @staticmethod
    def make(shape: tuple[int, ...], device: Any, intervals: Intervals, dense: Callable[[], Tensor]) -> IntervalMask:
        result = torch.ones((), dtype=torch.bool, device=device).expand(shape).as_subclass(IntervalMask)
        result.intervals, result.dense = intervals, dense
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            raise TypeError(f"a mask of pyattn must not be written to, as {name} does: clone its .dense() first")
        this = args[0] if args and isinstance(args[0], IntervalMask) else None
        if this is not None and (name in _ABOUT or name == "__get__"):
            with torch._C.DisableTorchFunctionSubclass():
                about = func(*args, **kwargs)
            if not isinstance(about, Tensor):
                return about
        elif this is not None and name in _UNCHANGED:
            with torch._C.DisableTorchFunctionSubclass():
                same = func(this.as_subclass(Tensor), *args[1:], **kwargs)
            if same.shape == this.shape and same.dtype == torch.bool:
                dense = this.dense
                moved = this.intervals.to(same.device)
                return cls.make(tuple(this.shape), same.device, moved, lambda: dense().to(same.device))
        args, kwargs = _with_dense(args), _with_dense(kwargs)
        return func(*args, **kwargs)


_ABOUT = {"size", "dim", "stride", "numel", "__len__", "is_floating_point", "get_device", "untyped_storage"}
_UNCHANGED = {"to", "contiguous", "clone", "detach", "__getitem__", "cuda", "cpu"}  # if the shape is


def _with_dense(x: Any) -> Any:
    if isinstance(x, IntervalMask):
        return x.dense()
    if isinstance(x, (tuple, list)):
        return type(x)(_with_dense(y) for y in x)
    if isinstance(x, dict):
        return {name: _with_dense(y) for name, y in x.items()}
    return x


# ---- masks --------------------------------------------------------------------------------------------------------


def mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    device: Any = None,
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What transformers calls for the mask of ``attn_implementation="pyattn"``, with its ``sdpa_mask``'s arguments.

    Causal masks, windows, padding on either side and packed sequences become intervals. Everything else, and all that
    is traced (where nobody can look at the padding), becomes transformers' own dense mask.

    Raises:
        ValueError: the model would add the mask to scores of its own, as if its entries were numbers.
    """
    from transformers import masking_utils

    config: Any = type(kwargs.get("config"))
    if config is not type(None) and not _asks_for_attention(config):
        raise ValueError(
            f"attn_implementation must be 'eager' for the model of {config.__name__}, which computes attention "
            f"on its own, got {_NAME!r}"
        )
    arguments: dict[str, Any] = dict(kwargs, batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset)
    arguments |= {"mask_function": mask_function, "attention_mask": attention_mask}
    if cache_position is not None:  # transformers 4
        arguments["cache_position"] = cache_position
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    else:
        arguments |= {"q_length": q_length, "q_offset": q_offset, "device": device}
    intervals = None
    if not _traced(attention_mask):
        found = _parse(mask_function, masking_utils)
        padding = _padding_of(attention_mask, kv_length, kv_offset)
        intervals = found and _intervals(found, padding, batch_size, kv_length, q_offset, kv_offset)
    if intervals is None:
        return masking_utils.sdpa_mask(**arguments)
    arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    shape = (batch_size, 1, q_length or 0, kv_length)
    return IntervalMask.make(shape, device, intervals, functools.partial(masking_utils.sdpa_mask, **arguments))


@functools.cache
def _asks_for_attention(config: Any) -> bool:
    """Whether the models of a configuration, as far as they are known, leave attention to what they are told."""
    from transformers import PreTrainedModel

    found, left = [], [PreTrainedModel]
    while left:
        model = left.pop()
        left += model.__subclasses__()
        if getattr(model, "config_class", None) is config:
            found.append(model._supports_attention_backend or model._supports_sdpa)
    return any(found) or not found


def _traced(padding: Tensor | None) -> bool:
    """Whether a graph is being made, so that nobody can look at the padding."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    fake = padding is not None and type(padding) is not Tensor
    return fake or capturing or torch.compiler.is_compiling() or torch.jit.is_tracing()


def _padding_of(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """Of the keys alone; those beyond what the mask speaks of are not seen. transformers 4 and 5 cut it differently."""
    if attention_mask is None:
        return None
    missing = max(0, kv_offset + kv_length - attention_mask.shape[-1])
    return F.pad(attention_mask, (0, missing))[:, kv_offset : kv_offset + kv_length]


class _Pattern(NamedTuple):
    """What a mask function says of the distance between query and key, and the sequences that it keeps apart."""

    left: int | None = None
    right: int | None = None
    sequences: Tensor | None = None
    by_position: bool = False  # positions are those within the sequences

    def __and__(self, other: _Pattern) -> _Pattern:
        return _Pattern(
            _least(self.left, other.left),
            _least(self.right, other.right),
            self.sequences if other.sequences is None else other.sequences,
            self.by_position or other.by_position,
        )


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


@functools.cache
def _factories() -> dict[Any, str]:
    """Of the functions that transformers composes masks of: the name of what has returned one, by its code."""
    from transformers import masking_utils

    dummies: dict[str, tuple[Any, ...]] = {
        "and_masks": (),
        "sliding_window_overlay": (1,),
        "sliding_window_bidirectional_overlay": (1,),
        "packed_sequence_mask_function": (None,),
        "remap_positions_for_packed_sequence": (None, None),
    }
    known = {name: getattr(masking_utils, name, None) for name in dummies}  # some are missing in transformers 4
    return {factory(*dummies[name]).__code__: name for name, factory in known.items() if factory is not None}


def _parse(function: Any, masking: Any) -> _Pattern | None:
    """The pattern of a mask function that transformers has composed; None if it may be another one."""
    if function is masking.causal_mask_function:
        return _Pattern(right=0)
    if function is getattr(masking, "bidirectional_mask_function", None):
        return _Pattern()
    code = getattr(function, "__code__", None)
    factory = _factories().get(code)
    if code is None or factory is None:
        return None
    inner = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
    if factory == "and_masks":
        pattern: _Pattern | None = _Pattern()
        for part in inner["mask_functions"]:
            found = _parse(part, masking)
            pattern = None if pattern is None or found is None else pattern & found
        return pattern
    if factory == "sliding_window_overlay":
        return _Pattern(left=inner["sliding_window"] - 1)
    if factory == "sliding_window_bidirectional_overlay":
        return _Pattern(left=inner["sliding_window"], right=inner["sliding_window"])
    if factory == "packed_sequence_mask_function":
        return _Pattern(sequences=inner["packed_sequence_mask"])
    found = _parse(inner["mask_function"], masking)
    return found and found & _Pattern(by_position=True)


def _intervals(
    pattern: _Pattern, padding: Tensor | None, batch: int, kv_length: int, q_offset: int | Tensor, kv_offset: int
) -> Intervals | None:
    cu_seqlens = starts = lengths = None
    if pattern.sequences is not None:
        if padding is not None or pattern.sequences.shape != (batch, kv_length):
            return None
        cu_seqlens = _cumulative(pattern.sequences)
    elif pattern.by_position:
        return None
    elif padding is not None:
        bounds = _bounds(padding)
        if bounds is None:
            return None
        starts, lengths = bounds
    offset = q_offset - kv_offset
    if isinstance(offset, Tensor):  # of a static cache, which counts on in the same tensor
        offset = offset.clone().expand(batch)
    return Intervals((pattern.left, pattern.right), offset, starts, lengths, cu_seqlens)


def _cumulative(sequences: Tensor) -> Tensor:
    """int32, where each run of equal numbers begins in the rows of ``sequences``, one after the other."""
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences.diff(dim=1) != 0
    end = torch.tensor([sequences.numel()], device=sequences.device)
    return torch.cat((begins.flatten().nonzero().flatten(), end)).to(torch.int32)


def _bounds(padding: Tensor) -> tuple[Tensor | None, Tensor | None] | None:
    """The first key and one past the last of each row, int64 ``[B]``; None if there are gaps between."""
    if padding.all():  # as most often
        return None, None
    valid = padding.to(torch.int32)
    counts, size = valid.sum(1), valid.shape[1]
    starts = valid.argmax(1) * (counts > 0)
    lengths = starts + counts
    last = size - valid.flip(1).argmax(1)
    gaps, at_start, at_end = torch.stack(
        [((last != lengths) & (counts > 0)).any(), (starts == 0).all(), (lengths == size).all()]
    ).tolist()
    return None if gaps else (None if at_start else starts, None if at_end else lengths)


# ---- attention ----------------------------------------------------------------------------------------------------


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for the attention of ``attn_implementation="pyattn"``.

    Args:
        module: the layer; ``is_causal`` is read from it where the call does not say.
        query: ``[B, Hq, Lq, D]``.
        key: ``[B, Hkv, Lk, D]``.
        value: ``[B, Hkv, Lk, Dv]``.
        attention_mask: from ``mask``, or any bool or float mask; None is causal from the top left if ``is_causal`` and
            there is more than one query, else nothing is masked.
        s_aux: ``[Hq]``, sinks.
        position_bias: ``[1 or B, Hq, Lq, Lk]``, added to the scores; differentiable.
        cu_seq_lens_q: int32, where packed sequences begin, in a batch of one without a mask.

    Returns:
        ``([B, Lq, Hq, Dv], None)``: there are no weights.
    """
    if kwargs.get("output_attentions"):
        warnings.warn("attn_implementation='pyattn' returns no attention weights: 'eager' does", stacklevel=2)
    if kwargs.get("head_mask") is not None:
        raise NotImplementedError("head_mask is not supported by attn_implementation='pyattn': use 'eager'")
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "softcap": softcap, "sinks": s_aux}
    batch, Lk = max(query.shape[0], key.shape[0]), key.shape[2]
    query, key, value = (x if x.shape[0] == batch else x.expand(batch, -1, -1, -1) for x in (query, key, value))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    bias = None if position_bias is None else position_bias[..., :Lk]
    packed = None
    if isinstance(attention_mask, IntervalMask):
        intervals = attention_mask.intervals
        if intervals.cu_seqlens is None:
            options |= {"window": intervals.window, "q_offset": intervals.q_offset, "attn_mask": bias}
            options |= {"kv_starts": intervals.kv_starts, "kv_lengths": intervals.kv_lengths}
        elif bias is None:
            options["window"] = intervals.window
            packed = (intervals.cu_seqlens, intervals.cu_seqlens)
        else:
            options |= {"attn_mask": _biased(attention_mask.dense(), bias), "q_offset": 0}
    elif attention_mask is not None:
        options |= {"attn_mask": _biased(attention_mask[..., :Lk], bias), "q_offset": 0}
    elif cu_seq_lens_q is not None and bias is None and batch == 1:
        options["causal"] = is_causal
        packed = (cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k)
    else:
        options |= {"causal": bool(is_causal) and query.shape[2] > 1, "q_offset": 0, "attn_mask": bias}
    if packed is None:
        mask = options.get("attn_mask")
        if mask is not None and mask.dtype not in (torch.bool, torch.float32, query.dtype):
            options["attn_mask"] = mask.to(query.dtype)
        return functional.attention(query, key, value, **options).transpose(1, 2), None
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = functional.attention_varlen(q, k, v, *packed, **options)
    return out.unflatten(0, (batch, query.shape[2])), None


def _biased(mask: Tensor, bias: Tensor | None) -> Tensor:
    """The bias of positions where the mask, bool or float, lets it through."""
    if bias is None:
        return mask
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return mask + bias
