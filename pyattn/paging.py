"""Which sample holds which page: tables, reference counts and the pages that are free. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Growth(NamedTuple):
    """How the tables change when samples get more tokens."""

    copies: list[tuple[int, int]]  # pages (from, to): shared ones that would be written to
    firsts: list[int]  # of each sample, the first entry of its table that is written to
    entries: list[list[int]]  # of each sample, its table from there on


class PageTables:
    """The pages of each sample in order, of a pool that they share; one page may be in several tables.

    A table holds None in the place of pages that have been freed from its front.
    """

    def __init__(self, batch: int, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.tables: list[list[int | None]] = [[] for _ in range(batch)]
        self.references = [0] * num_pages
        self.free = list(range(num_pages))[::-1]  # the last one is next

    def slots(self, b: int, indices: Sequence[int]) -> tuple[list[int], list[int]]:
        """The pages of these buffer indices of sample b, which hold tokens, and the places in them."""
        return [self.tables[b][i // self.page_size] or 0 for i in indices], [i % self.page_size for i in indices]

    def growth(self, starts: Sequence[int], lengths: Sequence[int], drops: Sequence[int]) -> Growth:
        """What it takes to write at indices ``[starts, lengths)`` of each sample, past its last; nothing changes yet.

        By then its table will have lost ``drops`` entries, and the indices count from there.

        Raises:
            ValueError: there are not enough free pages.
        """
        copies: list[tuple[int, int]] = []
        firsts, entries = [], []
        released: dict[int, int] = {}  # references that copies take from a page
        taken = 0
        for table, start, length, drop in zip(self.tables, starts, lengths, drops, strict=True):
            first = start // self.page_size
            kept = table[drop + first :]  # empty, or the one page that is written to but not from its beginning
            pages: list[int] = []
            if length > start and kept:
                page = kept[0]
                assert page is not None and len(kept) == 1
                if self.references[page] - released.get(page, 0) > 1:
                    released[page] = released.get(page, 0) + 1
                    taken += 1
                    copies.append((page, self._next(taken)))
                    page = copies[-1][1]
                pages.append(page)
            if length > start:
                for _ in range(-(-length // self.page_size) - first - len(pages)):
                    taken += 1
                    pages.append(self._next(taken))
            firsts.append(first)
            entries.append(pages)
        if taken > len(self.free):
            raise ValueError(f"key must fit into the {len(self.free)} pages that are free, but needs {taken}")
        return Growth(copies, firsts, entries)

    def _next(self, count: int) -> int:
        """The page that is taken as the ``count``-th from now on; a number that is no page if there are not as many."""
        return self.free[-count] if count <= len(self.free) else -1

    def grow(self, growth: Growth) -> list[int]:
        """Takes the pages of a ``growth`` of these tables, its drops done; returns the samples whose tables change."""
        taken = 0
        changed = []
        for b, (table, first, entries) in enumerate(zip(self.tables, growth.firsts, growth.entries, strict=True)):
            if entries in ([], table[first:]):
                continue
            changed.append(b)
            for page in entries:
                taken += self.references[page] == 0
                self.references[page] = max(self.references[page], 1)
            if table[first:] not in ([], entries[:1]):
                self._release(table[first])  # another sample holds it, too
            table[first:] = entries
        del self.free[len(self.free) - taken :]
        return changed

    def drop(self, b: int, count: int) -> None:
        """The first entries of sample b, all freed, leave its table."""
        assert all(page is None for page in self.tables[b][:count])
        del self.tables[b][:count]

    def _release(self, page: int | None) -> None:
        if page is None:
            return
        self.references[page] -= 1
        if self.references[page] == 0:
            self.free.append(page)

    def reorder(self, indices: Sequence[int]) -> None:
        """Sample b holds the pages of what was sample ``indices[b]``."""
        before, self.tables = self.tables, [list(self.tables[i]) for i in indices]
        for table in self.tables:
            for page in table:
                if page is not None:
                    self.references[page] += 1
        for table in before:
            for page in table:
                self._release(page)

    def free_before(self, b: int, start: int) -> None:
        """Frees the pages of sample b that end before index ``start``, or there."""
        table = self.tables[b]
        for i in range(min(start // self.page_size, len(table)) - 1, -1, -1):
            if table[i] is None:
                break  # and so are all before it
            self._release(table[i])
            table[i] = None

    def free_from(self, b: int, length: int) -> None:
        """Frees the pages of sample b that begin at index ``length``, or after it."""
        table = self.tables[b]
        end = -(-length // self.page_size)
        for page in table[end:]:
            self._release(page)
        del table[end:]

    def restore(self, tables: Sequence[Sequence[int | None]]) -> None:
        """These tables and no others."""
        self.tables = [list(table) for table in tables]
        self.references = [0] * len(self.references)
        for table in tables:
            for page in table:
                if page is not None:
                    self.references[page] += 1
        self.free = [page for page, count in enumerate(self.references) if count == 0][::-1]
