"""What a tree says: its name and its value, its members, the family that it describes."""

from __future__ import annotations

from collections.abc import Sequence

from rftt_lightning.answers.node import Node, leaves, num, replaced, sym

EQUATION = "="
INTEGERS, NATURALS = sym("\\mathbb Z"), sym("\\mathbb N")
PARAMETERS = frozenset("kmnlt")


def named(node: Node) -> bool:
    """Is the left side a name for the value on the right: x, x_1, f(x), AB, |AB|, P(A), A:B, or a tuple of names?"""
    return node.op == EQUATION and is_name(node.args[0])


def is_name(node: Node) -> bool:
    if node.op == "sym":
        return True
    if node.op == "call":
        return len(node.value) == 1
    if node.op == "tuple":
        return all(is_name(arg) for arg in node.args)
    if node.op == "/" and all(n.op == "*" and n.args[0] == sym("d") for n in node.args):  # dy/dx
        return True
    if node.op == "*" and node.args[0].op == "^" and node.args[0].args[1] == Node("neg", (num(1),)):  # f^{-1}(x)
        return node.args[0].args[0].value in ("f", "g", "h", "F", "G", "H") and node.args[1].op == "sym"
    if node.op == "*" and leaves(node)[0] == "m":  # m \angle ABC
        return len(leaves(node)) > 1 and all(name[:1].isupper() for name in leaves(node)[1:])
    if node.op in ("/", "ratio") and all(n.op == "sym" for n in node.args):  # a/b, a:b
        return True
    if node.op in ("*", "abs", "ratio", "/"):
        return all(_is_geometric(arg) for arg in node.args)
    return False


def _is_geometric(node: Node) -> bool:
    if node.op == "sym":
        return node.value[:1].isupper() or node.value.startswith("\\")
    return node.op in ("*", "abs") and all(_is_geometric(arg) for arg in node.args)


def is_functional(node: Node) -> bool:
    return node.op == EQUATION and node.args[0].op in ("sym", "call")


def value_of(node: Node) -> Node:
    """What a named equation says: the last link of its chain that is not an approximation."""
    node = last_meaning(node)
    return node.args[1] if named(node) else node


def last_meaning(node: Node) -> Node:
    r"""``x = 8 + 9 = 17`` is x = 17; ``2\sqrt3 \approx 3.46`` is its left side, ``x \approx 11`` is x = 11."""
    if node.op == "~":
        left = last_meaning(node.args[0])
        return Node(EQUATION, (left, node.args[1])) if left.op == "sym" else left
    if node.op == EQUATION and node.args[0].op == EQUATION:
        first = node.args[0]
        while first.op == EQUATION:
            first = first.args[0]
        return Node(EQUATION, (first, node.args[1])) if is_name(first) else node.args[1]
    if node.op == EQUATION and not node.symbols() and not is_name(node.args[0]):
        return node.args[1]
    return node


def members(node: Node) -> Sequence[Node]:
    """The values of a set, list or ± expression, lists inside lists opened."""
    if node.op in ("list", "set"):
        return [member for arg in node.args for member in ([arg] if arg.op == "set" else members(arg))]
    if node.op == "in":
        return members(node.args[1])
    if node.op in (EQUATION, "~"):
        node = last_meaning(node)
        values = members(node.args[1]) if named(node) and node.args[1].op in ("list", "set") or has_sign(node) else ()
        if has_sign(node):
            return [_resolve(node, sign) for sign in (1, -1)]
        return [Node(EQUATION, (node.args[0], value)) for value in values] or [node]
    return [_resolve(node, sign) for sign in (1, -1)] if has_sign(node) else [node]


def has_sign(node: Node) -> bool:
    return node.op in ("pm", "mp") or any(has_sign(arg) for arg in node.args)


def _resolve(node: Node, sign: int) -> Node:
    if node.op in ("pm", "mp"):
        inner = _resolve(node.args[0], sign)
        return inner if (node.op == "pm") == (sign == 1) else Node("neg", (inner,))
    return Node(node.op, tuple(_resolve(arg, sign) for arg in node.args), node.value)


def items(node: Node) -> Sequence[Node]:
    return node.args if node.op in ("list", "set") else (node,)


def family(node: Node) -> Node:
    """A list that ends in k in Z: its other items with that condition, as far as they have the letter."""
    conditions = [
        n for n in items(node) if n.op == "in" and n.args[1] in (INTEGERS, NATURALS) and n.args[0].op == "sym"
    ]
    if node.op != "list" or len(conditions) != 1:
        return node
    (condition,) = conditions
    others = tuple(n for n in node.args if n is not condition)
    if not others or not all(condition.args[0].symbols() <= n.symbols() for n in others):
        return node
    where = tuple(_where(member, condition) for n in others for member in members(n))
    return where[0] if len(where) == 1 else Node("list", where)


def _where(node: Node, condition: Node) -> Node:
    """A member of a family, with the name that it may have as the value of the tree."""
    name = str(node.args[0]) if named(node) and node.args[0].op == "sym" else ""
    return Node("where", (value_of(node), condition), name)


def with_parameter(node: Node, name: Node, domain: Node) -> Node:
    where = tuple(_where(n, Node("in", (name, domain))) for item in items(node) for n in members(item))
    return where[0] if len(where) == 1 else Node("list", where)


def progression(node: Node, name: str) -> tuple[Node, Node]:
    """Start and step of b + a k."""
    start = replaced(node, {name: num(0)})
    return start, Node("+", (replaced(node, {name: num(1)}), Node("neg", (start,))))


def basis_vector(node: Node, size: int) -> Node | None:
    """2i - j + 5k as (2, -1, 5)."""
    basis = ("i", "j", "k")[:size]
    if not 2 <= size <= 3 or node.op == "tuple" or not node.symbols() & {"j", "k"}:
        return None
    terms = node.args if node.op == "+" else (node,)
    if any(sum(map(leaves(term).count, basis)) != 1 for term in terms):
        return None
    units = [{name: num(int(name == unit)) for name in ("i", "j", "k")} for unit in basis]
    return Node("tuple", tuple(replaced(node, unit) for unit in units), "()")
