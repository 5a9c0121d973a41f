"""The one answer model: a small tree. It is built by :mod:`parse`, compared by :mod:`equal`, and never evaluates itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

CONSTANTS = frozenset({"pi", "e", "i", "oo"})


class Unreadable(ValueError):
    """This text is no answer of a form we know, or is beyond the limits."""


@dataclass(frozen=True)
class Node:
    r"""``Node("+", (Node("num", value="1"), Node("sym", value="x")))``.

    op: num (``value`` any string that Fraction reads), sym, text, call (``value`` the function's name), + * / ^ neg root !
    binom abs floor ceil mod pm mp, unit (``value`` its name), percent, base, ratio; tuple (``value`` its brackets), set,
    list, matrix (rows are tuples), cup cap minus; relations = < <= != in ~ (chains are nested to the left).
    """

    op: str
    args: tuple[Node, ...] = ()
    value: str = ""

    def __str__(self) -> str:
        if self.op in ("num", "sym", "text"):
            return self.value
        inner = ", ".join(map(str, self.args))
        return f"{self.op}{':' + self.value if self.value else ''}({inner})"

    def symbols(self) -> frozenset[str]:
        """Names of the free symbols (pi, e and i are none)."""
        if self.op == "sym":
            return frozenset() if self.value in CONSTANTS else frozenset([self.value])
        return frozenset().union(*(arg.symbols() for arg in self.args))


def num(value: int | Fraction | str) -> Node:
    return Node("num", value=str(value))


def sym(name: str) -> Node:
    return Node("sym", value=name)


def leaves(node: Node) -> list[str]:
    """Values of the leaves, from left to right."""
    return [leaf for arg in node.args for leaf in leaves(arg)] if node.args else [node.value]


def replaced(node: Node, values: Mapping[str, Node]) -> Node:
    """The tree with these values for its symbols."""
    if node.op == "sym":
        return values.get(node.value, node)
    return Node(node.op, tuple(replaced(arg, values) for arg in node.args), node.value)
