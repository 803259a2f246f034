"""Which pages of the cache are free, and how many sequences hold each of the others. Host only."""

import collections
from collections.abc import Sequence


class PagePool:
    """Pages by id; a page may have several holders and is free again when the last has let it go.

    Args:
        num_pages: ids are ``0..num_pages - 1``.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        # Last in, first out: a small working set of pages stays in the processor's caches.
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders: collections.Counter[int] = collections.Counter()

    @property
    def num_free(self) -> int:
        """Pages that ``take`` can give."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Pages with one holder each; raises ValueError where fewer are free."""
        if count > len(self._free):
            raise ValueError(f"{count} pages asked for, {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(count)]
        self._holders.update(pages)
        return pages

    def share(self, pages: Sequence[int]) -> list[int]:
        """One more holder for each of these pages."""
        unheld = [page for page in pages if not self._holders[page]]
        if unheld:
            raise ValueError(f"pages {unheld} have no holder to share with")
        self._holders.update(pages)
        return list(pages)

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each of these pages."""
        for page in pages:
            if not self._holders[page]:
                raise ValueError(f"page {page} is released more often than it was taken")
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
