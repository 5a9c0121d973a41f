"""Keys and values of token sequences that the model has read: a radix tree of prefixes over a pool of positions.

A prefix is computed once and shared by all that begin with it: a tree's nodes by their children, a system prompt by all
problems. The radix tree keeps, for every token, the number of the pool's slot that holds its keys and values; what was not
used for longest is given up where room is needed, and then computed again when it is asked for.

Shape suffixes: N slots of the pool, Y layers, H heads, D head width, F functional tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from torch import Tensor


class _Edge:
    """A run of tokens, their slots, and what may follow. ``tags`` maps (tokens of the run that are read, temperature) to the
    log-probabilities [F] of the opening tags there."""

    __slots__ = ("children", "parent", "slots", "tags", "tokens")

    def __init__(self, tokens: tuple[int, ...], slots: np.ndarray, parent: _Edge | None) -> None:
        self.tokens, self.slots, self.parent = tokens, slots, parent
        self.children: dict[int, _Edge] = {}
        self.tags: dict[tuple[int, float], np.ndarray] = {}


class PrefixCache:
    """At most ``budget`` bytes of keys and values; 0 keeps nothing.

    All that is known belongs to one ``stamp`` (the policy's version): :meth:`renew` with another one forgets it. The pool
    is made when the shape of keys and values is first seen.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.slot_bytes = budget, 0
        self.stamp: Hashable = None
        self.keys_YHND: Tensor | None = None
        self.values_YHND: Tensor | None = None
        self._clear()

    def _clear(self) -> None:
        self.root = _Edge((), np.empty(0, np.int64), None)
        self.recent: OrderedDict[_Edge, None] = OrderedDict()  # parents after their children, so the first is a leaf
        self.freed: list[np.ndarray] = []  # slots that were given up
        self.touched = self.used = 0  # slots that were ever taken, the first ones of the pool; those that are taken now

    def renew(self, stamp: Hashable) -> None:
        """Forget everything unless it was read under the same ``stamp``."""
        if stamp != self.stamp:
            self.stamp = stamp
            self._clear()

    def release(self) -> None:
        """Forget everything and give the memory back."""
        self.keys_YHND = self.values_YHND = None
        self._clear()

    @property
    def capacity(self) -> int:
        """Positions that fit the budget; 0 before their size is known."""
        return 0 if self.keys_YHND is None else self.keys_YHND.shape[2]

    @property
    def bytes(self) -> int:
        """What is in use."""
        return self.used * self.slot_bytes

    @property
    def fresh(self) -> bool:
        """Nothing is known yet, and something could be."""
        unknown = self.keys_YHND is None and self.budget > 0
        return (unknown or self.capacity > 0) and not self.root.children

    def match(self, tokens: Sequence[int]) -> np.ndarray:
        """Slots of the longest known beginning of ``tokens``."""
        edge, shared, _ = self._walk(tokens)
        found = [edge.slots[:shared]]
        while edge.parent is not None:
            edge = edge.parent
            found.append(edge.slots)
        return np.concatenate(found[::-1])

    def tags(self, tokens: Sequence[int], temperature: float) -> np.ndarray | None:
        """Log-probabilities [F] of the opening tags after all of ``tokens``, if they are known."""
        edge, shared, known = self._walk(tokens)
        return edge.tags.get((shared, temperature)) if known == len(tokens) else None

    def insert(
        self, tokens: tuple[int, ...], tags: Mapping[int, np.ndarray] = {}, temperature: float = 1.0
    ) -> np.ndarray:
        """Make ``tokens`` known, and ``tags``, what :meth:`tags` is to give after so many of them.

        Returns the slots that must now take the keys and values of the last ones, as many as were not known; none if they
        do not fit the budget."""
        edge, shared, known = self._walk(tokens)
        if known in tags:
            edge.tags[shared, temperature] = tags[known]
        if len(tokens) > self.capacity:
            return np.empty(0, np.int64)
        new = len(tokens) - known
        if new and shared < len(edge.tokens):
            edge = self._split(edge, shared)
        if not new or not self._make_room(new, edge):
            return np.empty(0, np.int64)
        slots = self._take(new)
        child = edge.children[tokens[known]] = _Edge(tokens[known:], slots, edge)
        child.tags = {(read - known, temperature): logp_F for read, logp_F in tags.items() if read > known}
        self._touch(child)
        return slots

    def _walk(self, tokens: Sequence[int]) -> tuple[_Edge, int, int]:
        """The edge on which the known beginning of ``tokens`` ends, how many of its tokens belong to it, and its length."""
        edge, known = self.root, 0
        while known < len(tokens):
            child = edge.children.get(tokens[known])
            if child is None:
                break
            run = child.tokens
            shared = len(run)
            if tuple(tokens[known : known + shared]) != run:
                rest = tokens[known : known + shared]
                shared = next((i for i, (a, b) in enumerate(zip(run, rest, strict=False)) if a != b), len(rest))
            edge, known = child, known + shared
            if shared < len(run):
                self._touch(edge)
                return edge, shared, known
        self._touch(edge)
        return edge, len(edge.tokens), known

    def _touch(self, edge: _Edge | None) -> None:
        while edge is not None and edge.parent is not None:
            self.recent[edge] = None
            self.recent.move_to_end(edge)
            edge = edge.parent

    def _split(self, edge: _Edge, at: int) -> _Edge:
        """Cut an edge in two; returns the upper one."""
        assert edge.parent is not None
        upper = _Edge(edge.tokens[:at], edge.slots[:at], edge.parent)
        edge.parent.children[edge.tokens[0]] = upper
        edge.tokens, edge.slots, edge.parent = edge.tokens[at:], edge.slots[at:], upper
        upper.children[edge.tokens[0]] = edge
        tags, edge.tags = edge.tags, {}
        for (read, temperature), logp_F in tags.items():
            if read <= at:
                upper.tags[read, temperature] = logp_F
            else:
                edge.tags[read - at, temperature] = logp_F
        self._touch(upper)
        return upper

    # -- the pool --------------------------------------------------------------------------------------------------------

    def shape(self, keys_YBHLD: Tensor, values_YBHLD: Tensor) -> None:
        """Make the pool, if it is not there, for keys and values like these (under autocast these two may differ)."""
        likes, pools = (keys_YBHLD, values_YBHLD), (self.keys_YHND, self.values_YHND)
        if all(p is not None and (p.dtype, p.device) == (x.dtype, x.device) for p, x in zip(pools, likes, strict=True)):
            return
        self.slot_bytes = sum(x.shape[0] * x.shape[2] * x.shape[4] * x.element_size() for x in likes)
        size = self.budget // self.slot_bytes
        # A GPU gives this memory at once; a CPU when a slot is first written, so that what is not used costs nothing.
        self.keys_YHND, self.values_YHND = (x.new_empty(x.shape[0], x.shape[2], size, x.shape[4]) for x in likes)
        self._clear()

    def _make_room(self, count: int, keep: _Edge) -> bool:
        """Free slots for ``count`` tokens by giving up what was not used for longest, but not ``keep`` nor what it hangs on."""
        while self.capacity - self.used < count:
            oldest = next(iter(self.recent), None)
            if oldest is None or oldest is keep:
                return False
            del self.recent[oldest]
            assert oldest.parent is not None and not oldest.children
            del oldest.parent.children[oldest.tokens[0]]
            self.freed.append(oldest.slots)
            self.used -= len(oldest.slots)
        return True

    def _take(self, count: int) -> np.ndarray:
        """Free slots: those that were given up first, since they are in memory."""
        self.used += count
        taken = []
        while count and self.freed:
            slots = self.freed.pop()
            if len(slots) > count:
                self.freed.append(slots[count:])
                slots = slots[:count]
            taken.append(slots)
            count -= len(slots)
        taken.append(np.arange(self.touched, self.touched + count))
        self.touched += count
        return np.concatenate(taken)
