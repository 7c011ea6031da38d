"""Keys and values of a text that grows: dense buffers, or pages that samples may share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyattn import checks, kv_cache_ops, kv_cache_state
from pyattn.kv_cache_ops import Run
from pyattn.kv_cache_state import Span
from pyattn.paging import Growth, PageTables

Ints = Sequence[int] | Tensor
_FEW_ENTRIES = 4  # of a block table, up to which an index tensor does not pay
_MOST_MOVED = 4096  # keys of a sample that are copied at once when they move within their buffer


class Append(NamedTuple):
    """What it takes to write tokens that fit."""

    counts: list[int]  # tokens of each sample
    shifts: list[int]  # by how much the indices of each sample go down before
    firsts: list[int]  # of each sample, the buffer index of its first token
    growth: Growth | None
    span: Span  # afterwards


class KVCache:
    """Keys and values of ``B`` texts, to which tokens are added, for ``pyattn.attention_with_kv_cache``.

    Dense: buffers ``[B, Hkv, max_length, D]``. Paged (Kwon et al. 2023, arXiv:2309.06180): pages
    ``[num_pages, Hkv, page_size, D]`` that samples take when they need them and may share, which a ``block_table``
    puts in order. Of a sample, buffer indices ``[starts, lengths)`` are live; ``seen`` counts the tokens before the
    next one, evicted ones included, and so is the position of that one in its text. Each method that refuses leaves
    the cache as it was.

    The numbers of the samples are known on the host, so no method waits for a device, except where it is given a
    tensor of one.

    Args:
        batch: B.
        num_kv_heads: Hkv.
        head_dim: D.
        max_length: of live tokens of a sample. A dense cache that evicts moves what is live when its buffer ends: at
            twice the window that costs one copied token for each new one.
        v_head_dim: Dv, of the values; None for D.
        dtype: of keys and values; None for torch's default.
        device: of keys and values; None for torch's default.
        page_size: tokens of a page; None for a dense cache.
        num_pages: of all samples together; None for as many as they can ever need.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import torch, pyattn
        >>> cache = pyattn.KVCache(2, 4, 64, max_length=1000, page_size=16)
        >>> cache.append(torch.randn(2, 4, 30, 64), torch.randn(2, 4, 30, 64), lengths=[30, 20])
        >>> cache.evict(16)
        >>> cache
        KVCache(batch=2, num_kv_heads=4, head_dim=64, max_length=1000, page_size=16, live=[16, 16], seen=[30, 20])
        >>> cache.starts, cache.lengths
        (tensor([14,  4], dtype=torch.int32), tensor([30, 20], dtype=torch.int32))
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        page_size: int | None = None,
        num_pages: int | None = None,
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "max_length": max_length, "v_head_dim": v_head_dim}
        sizes |= {} if page_size is None else {"page_size": page_size}
        for name, size in sizes.items():
            if checks.check_int(name, size) < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if checks.check_int("batch", batch) < 0:
            raise ValueError(f"batch must be at least 0, got {batch}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in checks.FLOAT_DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        if num_pages is not None:
            if page_size is None:
                raise ValueError("num_pages must come with page_size, got no page_size")
            if checks.check_int("num_pages", num_pages) < 0:
                raise ValueError(f"num_pages must be at least 0, got {num_pages}")
        self.batch, self.num_kv_heads, self.head_dim, self.v_head_dim = batch, num_kv_heads, head_dim, v_head_dim
        self.max_length, self.page_size = max_length, page_size
        self._pages: PageTables | None = None
        self._block_table: Tensor | None = None
        self._room = max_length  # one past the last index
        outer, inner = batch, max_length
        with torch.inference_mode(False):  # or the cache could not be written to outside of that mode
            if page_size is not None:
                # max_length tokens fit wherever in a page the first of them lies.
                columns = -(-(max_length + page_size - 1) // page_size)
                outer, inner = batch * columns if num_pages is None else num_pages, page_size
                self._room = columns * page_size
                self._pages = PageTables(batch, outer, page_size)
                self._block_table = torch.zeros((batch, columns), dtype=torch.int32, device=device)
            self.key = torch.zeros((outer, num_kv_heads, inner, head_dim), dtype=dtype, device=device)
            self.value = torch.zeros((outer, num_kv_heads, inner, v_head_dim), dtype=dtype, device=device)
        self.span = self._spanning([0] * batch, [0] * batch, [0] * batch)

    # ---- what it holds --------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.key.dtype

    @property
    def device(self) -> torch.device:
        return self.key.device

    @property
    def starts(self) -> Tensor:
        """int32 ``[B]``, the first live buffer index of each sample."""
        return self.span.tensor("starts").to(torch.int32)

    @property
    def lengths(self) -> Tensor:
        """int32 ``[B]``, one past the last live buffer index of each sample."""
        return self.span.tensor("lengths").to(torch.int32)

    @property
    def seen(self) -> Tensor:
        """int32 ``[B]``, the position in its text of the next token of each sample."""
        return self.span.tensor("seen").to(torch.int32)

    @property
    def block_table(self) -> Tensor | None:
        """int32 ``[B, max_pages]``, the pages of each sample in order; None for a dense cache."""
        return self._block_table

    @property
    def num_free_pages(self) -> int:
        """Pages that no sample holds; 0 for a dense cache."""
        return 0 if self._pages is None else len(self._pages.free)

    def __repr__(self) -> str:
        live = [end - start for start, end in zip(self.span.starts, self.span.lengths, strict=True)]
        return (
            f"KVCache(batch={self.batch}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"max_length={self.max_length}, page_size={self.page_size}, live={live}, seen={self.span.seen})"
        )

    def positions(self, length: int, lengths: Ints | None = None) -> Tensor:
        """int64 ``[B, length]``: of each sample the positions of the next tokens, for rotary.

        Of the tokens that do not count, past ``lengths`` as in ``append``, it is 0.
        """
        if checks.check_int("length", length) < 0:
            raise ValueError(f"length must be at least 0, got {length}")
        steps = torch.arange(length, device=self.device)
        positions = self.span.tensor("seen").to(torch.int64)[:, None] + steps
        if lengths is None:
            return positions
        counts = self._index(torch.tensor(self._counts(length, lengths), dtype=torch.int64, device="cpu"))
        return torch.where(steps < counts[:, None], positions, 0)

    def text_length(self, length: int, lengths: Ints | None = None) -> int:
        """Tokens of the longest text, once ``length`` more have come, or of each sample ``lengths``."""
        counts = self._counts(length, lengths)
        return max((n + count for n, count in zip(self.span.seen, counts, strict=True)), default=0)

    def _counts(self, length: int, lengths: Ints | None) -> list[int]:
        """How many of the next ``length`` tokens each sample gets."""
        counts = [length] * self.batch if lengths is None else checks.check_numbers("lengths", lengths, self.batch)
        if any(not 0 <= count <= length for count in counts):
            raise ValueError(f"lengths must lie in [0, {length}] (the new tokens), got {counts}")
        return counts

    def _spanning(self, starts: list[int], lengths: list[int], seen: list[int]) -> Span:
        return Span(starts, lengths, seen, self.device)

    # ---- append ---------------------------------------------------------------------------------------------

    def append(self, key: Tensor, value: Tensor, lengths: Ints | None = None) -> None:
        """Adds tokens, in place; nothing that is there already is copied, unless it must move or is shared.

        Args:
            key: ``[B, Hkv, L, D]`` of the cache's dtype, on its device.
            value: ``[B, Hkv, L, Dv]``.
            lengths: how many of the L tokens each sample gets, the first ones; None for all.

        Raises:
            TypeError, ValueError: naming the argument; a sample would exceed ``max_length``, or the pages are not
                enough.
            NotImplementedError: key or value requires a gradient.
        """
        self.commit(self.prepare(key, value, lengths), key, value)

    def prepare(self, key: Tensor, value: Tensor, lengths: Ints | None = None) -> Append:
        """Does all that ``append`` refuses for, and writes nothing: ``commit`` must follow before anything else."""
        for name, x, size in (("key", key, self.head_dim), ("value", value, self.v_head_dim)):
            checks.check_tensor(name, x, (self.dtype,), self.key, "the cache")
            shape = (self.batch, self.num_kv_heads, x.shape[2] if x.dim() == 4 else 0, size)
            checks.check_shape(name, x, shape, f"[B, Hkv, L, {'D' if name == 'key' else 'Dv'}]")
            if x.requires_grad and torch.is_grad_enabled():
                raise NotImplementedError(
                    f"{name} must not require a gradient, which a cache does not pass on: append under torch.no_grad()"
                )
        checks.check_shape("value", value, (*key.shape[:3], self.v_head_dim), "[B, Hkv, L, Dv] with key's L")
        counts = self._counts(key.shape[2], lengths)
        shifts = self._shifts(counts)
        starts, firsts, seen = self.span.numbers
        if any(shifts):
            starts, firsts = ([x - shift for x, shift in zip(n, shifts, strict=True)] for n in (starts, firsts))
        after = [first + count for first, count in zip(firsts, counts, strict=True)]
        growth = None
        if self._pages is not None:
            growth = self._pages.growth(firsts, after, [shift // self._pages.page_size for shift in shifts])
        seen = [n + count for n, count in zip(seen, counts, strict=True)]
        return Append(counts, shifts, firsts, growth, self._spanning(starts, after, seen))

    def commit(self, append: Append, key: Tensor, value: Tensor) -> None:
        """Writes what has been prepared: these keys, and values, or turned ones."""
        self._shift(append.shifts)
        if append.growth is not None and append.growth.copies:
            source, target = self._index(torch.tensor(append.growth.copies, device="cpu").T).unbind()
            for buffer in (self.key, self.value):
                buffer[target] = buffer[source]
        kv_cache_ops.append(self.key, self.value, key, value, self._runs(append))
        if self._pages is not None and append.growth is not None:
            self._write_tables({b: append.growth.firsts[b] for b in self._pages.grow(append.growth)})
        self.span = append.span

    def make_room(self, length: int) -> None:
        """Moves what is live, where that is needed, so that the next ``length`` tokens of every sample move nothing.

        Buffer indices, which the columns of an ``attn_mask`` are, then stay what they are until after those tokens.

        Raises:
            TypeError, ValueError: naming the argument; a sample would exceed ``max_length``.
        """
        if checks.check_int("length", length) < 0:
            raise ValueError(f"length must be at least 0, got {length}")
        self._shift(self._shifts([length] * self.batch))

    def _shifts(self, counts: list[int]) -> list[int]:
        """By how much the indices of each sample must go down for so many tokens to fit."""
        unit = self.page_size or 1
        shifts = []
        for b, (start, end, count) in enumerate(zip(self.span.starts, self.span.lengths, counts, strict=True)):
            if end - start + count > self.max_length:
                raise ValueError(
                    f"key must fit into max_length = {self.max_length}: sample {b} has {end - start} tokens and would "
                    f"get {count} more"
                )
            shifts.append(0 if end + count <= self._room else start // unit * unit)
        return shifts

    def _shift(self, shifts: list[int]) -> None:
        if not any(shifts):
            return
        starts, lengths, seen = self.span.numbers
        for b, shift in enumerate(shifts):
            if shift and self._pages is not None:
                self._pages.drop(b, shift // self._pages.page_size)
                self._write_tables({b: 0})
            elif shift:  # to the front, piece by piece: what is overwritten has moved already, or is in the clone
                for i in range(starts[b], lengths[b], _MOST_MOVED):
                    piece = slice(i, min(i + _MOST_MOVED, lengths[b]))
                    for buffer in (self.key, self.value):
                        buffer[b, :, piece.start - shift : piece.stop - shift] = buffer[b, :, piece].clone()
        starts, lengths = ([x - shift for x, shift in zip(n, shifts, strict=True)] for n in (starts, lengths))
        self.span = self._spanning(starts, lengths, seen)

    def _runs(self, append: Append) -> list[Run]:
        """Where the tokens of an append go."""
        if append.growth is None or self.page_size is None:
            places = zip(append.firsts, append.counts, strict=True)
            return [Run(b, 0, b, first, count) for b, (first, count) in enumerate(places) if count]
        runs = []
        for b, (first, count) in enumerate(zip(append.firsts, append.counts, strict=True)):
            token, inner = 0, first % self.page_size
            for page in append.growth.entries[b]:
                length = min(self.page_size - inner, count - token)
                runs.append(Run(b, token, page, inner, length))
                token, inner = token + length, 0
        return runs

    def _index(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)

    def _write_tables(self, firsts: Mapping[int, int]) -> None:
        """The entries of samples, each from its first on; those of freed pages are not read, but must be pages."""
        assert self._pages is not None and self._block_table is not None
        places: list[int] = []
        pages: list[int] = []
        for b, first in firsts.items():
            pages += [page or 0 for page in self._pages.tables[b][first:]]
            begin = b * self._block_table.shape[1] + first
            places += range(begin, begin + len(pages) - len(places))
        entries = self._block_table.view(-1)
        if len(places) <= _FEW_ENTRIES:
            for place, page in zip(places, pages, strict=True):
                entries[place] = page
        else:
            index = self._index(torch.tensor(places, device="cpu"))
            entries[index] = self._index(torch.tensor(pages, dtype=torch.int32, device="cpu"))

    # ---- samples --------------------------------------------------------------------------------------------

    def reorder(self, indices: Ints) -> None:
        """Sample b goes on as what sample ``indices[b]`` was, as beam search wants it.

        Pages are shared, and copied when one of their samples writes to them. A dense cache copies the samples that
        change.

        Args:
            indices: int32 or int64 ``[B]``, or a list.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        order = checks.check_numbers("indices", indices, self.batch)
        if any(not 0 <= i < self.batch for i in order):
            raise ValueError(f"indices must lie in [0, {self.batch - 1}] (the samples), got {order}")
        changed = [b for b, i in enumerate(order) if b != i]
        if not changed:
            return
        starts, lengths, seen = ([numbers[i] for i in order] for numbers in self.span.numbers)
        if self._pages is not None:
            self._pages.reorder(order)
            self._write_tables(dict.fromkeys(changed, 0))
        else:
            live = slice(min(starts[b] for b in changed), max(lengths[b] for b in changed))
            target, source = self._index(torch.tensor([changed, [order[b] for b in changed]], device="cpu")).unbind()
            for buffer in (self.key, self.value):
                buffer[target, :, live] = buffer[source, :, live]
        self.span = self._spanning(starts, lengths, seen)

    def fork(self, source: int, targets: Sequence[int] | None = None) -> None:
        """Samples go on as sample ``source``: a prefix that they share, of which a paged cache keeps one copy.

        Args:
            source: the sample.
            targets: the samples that become like it; None for all.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        if not 0 <= checks.check_int("source", source) < self.batch:
            raise ValueError(f"source must lie in [0, {self.batch - 1}] (the samples), got {source}")
        chosen = self._samples("targets", targets)
        self.reorder([source if b in chosen else b for b in range(self.batch)])

    def _samples(self, name: str, samples: Sequence[int] | None) -> set[int]:
        if samples is None:
            return set(range(self.batch))
        if not isinstance(samples, (list, tuple, range)):
            raise TypeError(f"{name} must be a list or tuple of ints, got {type(samples).__name__}")
        if any(not 0 <= checks.check_int(name, b) < self.batch for b in samples):
            raise ValueError(f"{name} must lie in [0, {self.batch - 1}] (the samples), got {list(samples)}")
        return set(samples)

    # ---- what leaves ----------------------------------------------------------------------------------------

    def evict(self, window: int) -> None:
        """Keeps the last ``window`` tokens of each sample; a paged cache frees the pages that hold none of them.

        ``evict(left)`` before a token is appended leaves it all that attention with ``window=(left, 0)`` reads.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        if checks.check_int("window", window) < 0:
            raise ValueError(f"window must be at least 0, got {window}")
        starts, lengths, seen = self.span.numbers
        starts = [max(start, end - window) for start, end in zip(starts, lengths, strict=True)]
        if self._pages is not None:
            for b, start in enumerate(starts):
                self._pages.free_before(b, start)
        self.span = self._spanning(starts, lengths, seen)

    def truncate(self, lengths: Ints) -> None:
        """Takes back the last tokens of each sample, such as rejected drafts: ``truncate(cache.lengths - rejected)``.

        Args:
            lengths: int32 or int64 ``[B]``, or a list: one past the last buffer index that stays. ``seen`` goes down
                by as much as ``lengths`` does.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        ends = checks.check_numbers("lengths", lengths, self.batch)
        starts, before, seen = self.span.numbers
        if any(not start <= end <= was for start, end, was in zip(starts, ends, before, strict=True)):
            raise ValueError(f"lengths must lie between the cache's starts {starts} and lengths {before}, got {ends}")
        if self._pages is not None:
            for b, end in enumerate(ends):
                self._pages.free_from(b, end)
        seen = [n - (was - end) for n, was, end in zip(seen, before, ends, strict=True)]
        self.span = self._spanning(starts, ends, seen)

    def accept(self, draft: int, paths: Sequence[Ints]) -> None:
        """Of a draft that is a tree a path stays: its tokens move together, the draft's others leave.

        Args:
            draft: the last tokens of each sample, of which there are so many.
            paths: of each sample, which of them stay: rising numbers in ``[0, draft)``.

        Raises:
            TypeError, ValueError: naming the argument; there is no page to move shared tokens to.
        """
        before = self.span
        live = (end - start for start, end in zip(before.starts, before.lengths, strict=True))
        if not 0 <= checks.check_int("draft", draft) <= min(live, default=0):
            raise ValueError(f"draft must lie between 0 and the live tokens of each sample, got {draft}")
        if not isinstance(paths, (list, tuple)) or len(paths) != self.batch:
            raise ValueError(f"paths must be a list of {self.batch} paths, one for each sample, got {paths!r}")
        sizes = [x.numel() if isinstance(x, Tensor) else len(x) if isinstance(x, (list, tuple)) else 0 for x in paths]
        chosen = [checks.check_numbers(f"paths[{b}]", path, sizes[b]) for b, path in enumerate(paths)]
        for b, path in enumerate(chosen):
            if path != sorted(set(path)) or any(not 0 <= i < draft for i in path):
                raise ValueError(f"paths[{b}] must rise and lie in [0, {draft - 1}], got {path}")
        ends = [length - draft for length in before.lengths]
        if all(path == list(range(len(path))) for path in chosen):
            return self.truncate([end + len(path) for end, path in zip(ends, chosen, strict=True)])
        most = max(map(len, chosen))
        index = [[end + i for i in path + [0] * (most - len(path))] for end, path in zip(ends, chosen, strict=True)]
        slots = [([b] * most, i) if self._pages is None else self._pages.slots(b, i) for b, i in enumerate(index)]
        outer, inner = self._index(torch.tensor(slots, device="cpu")).unbind(1)  # [B, most]
        key, value = (buffer[outer, :, inner].transpose(1, 2) for buffer in (self.key, self.value))
        tables = None if self._pages is None else [list(table) for table in self._pages.tables]
        self.truncate(ends)
        try:
            self.append(key, value, lengths=[len(path) for path in chosen])
        except ValueError:
            if self._pages is not None and tables is not None:
                self._pages.restore(tables)
                self._write_tables(dict.fromkeys(range(self.batch), 0))
            self.span = before
            raise

    def reset(self, samples: Sequence[int] | None = None) -> None:
        """Empties samples, for new texts.

        Args:
            samples: which; None for all.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        chosen = self._samples("samples", samples)
        if self._pages is not None:
            for b in chosen:
                self._pages.free_from(b, 0)
        starts, lengths, seen = ([0 if b in chosen else n for b, n in enumerate(x)] for x in self.span.numbers)
        self.span = self._spanning(starts, lengths, seen)

    # ---- save and load --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A copy of what is in use, of tensors and numbers, for ``torch.save``; shared pages stay shared."""
        state: dict[str, Any] = {n: getattr(self, n).clone() for n in ("starts", "lengths", "seen")}
        state |= {"page_size": self.page_size, "block_table": None}
        if self._pages is None:
            end = max(self.span.lengths, default=0)
            return state | {"key": self.key[:, :, :end].clone(), "value": self.value[:, :, :end].clone()}
        used = [page for page, count in enumerate(self._pages.references) if count]
        number = {page: i for i, page in enumerate(used)}
        columns = max(map(len, self._pages.tables), default=0)
        table = [[-1 if p is None else number[p] for p in row] for row in self._pages.tables]
        rows = [row + [-1] * (columns - len(row)) for row in table]
        state["block_table"] = torch.tensor(rows, dtype=torch.int32, device="cpu").view(self.batch, columns)
        index = self._index(torch.tensor(used, dtype=torch.int64, device="cpu"))
        return state | {"key": self.key[index], "value": self.value[index]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Becomes what a cache of the same sizes was; its ``max_length``, pages and device may be others.

        Args:
            state: of ``state_dict``.

        Raises:
            TypeError, ValueError: naming what does not fit; the cache stays as it was.
        """
        starts, lengths, seen, tables = kv_cache_state.read(
            state, self.key, self.value, self.batch, self.max_length, self.page_size, self._room
        )
        for buffer, saved in ((self.key, state["key"]), (self.value, state["value"])):
            used = buffer[:, :, : saved.shape[2]] if self._pages is None else buffer[: saved.shape[0]]
            used.copy_(saved)
        if self._pages is not None:
            self._pages.restore(tables)
            self._write_tables(dict.fromkeys(range(self.batch), 0))
        self.span = self._spanning(starts, lengths, seen)
