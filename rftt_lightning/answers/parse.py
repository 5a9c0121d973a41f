r"""A small, safe parser of answers: LaTeX or plain text to one tree of :class:`Node`; it builds, and never evaluates.

Everything a final answer may be is one grammar: lists and alternatives of relations of expressions, with tuples, sets,
intervals, matrices, ratios, units and words. Length and nesting are bounded before and while reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from rftt_lightning.answers.digits import join_numbers
from rftt_lightning.answers.node import Node, Unreadable, num, sym
from rftt_lightning.answers.units import AMBIGUOUS, NAMES, measure, read_unit
from rftt_lightning.answers.words import CHANGES_MEANING

MAX_LENGTH = 4000
"""Characters of one answer; longer ones are refused unread."""
MAX_DEPTH = 32
"""Nested groups; the reader recurses some ten frames for each."""

MAX_HEIGHT = 100
"""Height of the tree that is read; everything after walks it recursively."""


FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh coth arcsinh arccosh arctanh ln log lg exp max min gcd lcm "
    "cis sgn abs floor ceil sqrt cbrt".split()
)
_ALIASES = {
    "tg": "tan", "ctg": "cot", "cotan": "cot", "cosec": "csc", "arctg": "arctan", "arcctg": "arccot", "asin": "arcsin", "acos": "arccos", "atan": "arctan",
    "sh": "sinh", "ch": "cosh", "th": "tanh", "sign": "sgn", "Max": "max", "Min": "min", "GCD": "gcd", "LCM": "lcm", "lb": "log2",
}  # fmt: skip
_GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega "
    "Gamma Delta Theta Lambda Sigma Phi Psi Omega ell hbar".split()
)
RELATIONS = {
    "=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "==": "=", "<>": "!=", r"\le": "<=", r"\leq": "<=", r"\leqslant": "<=",
    r"\leqq": "<=", r"\ge": ">=", r"\geq": ">=", r"\geqslant": ">=", r"\geqq": ">=", r"\lt": "<", r"\gt": ">", r"\ne": "!=", r"\neq": "!=",
    r"\in": "in", r"\approx": "~", r"\simeq": "~", r"\sim": "~", r"\equiv": "=", r"\to": "=", r"\mapsto": "=", r"\cong": "=", r"\Rightarrow": "=",
    r"\rightarrow": "=", r"\implies": "=", r"\iff": "=",
}  # fmt: skip
_MONTHS = frozenset("january february march april may june july august september october november december".split())
_PERCENT = frozenset("% percent percents percentage pct".split())
_BASES = {
    name: base for base, name in enumerate("two three four five six seven eight nine ten eleven twelve".split(), 2)
} | {"sixteen": 16}
_UNIONS = {r"\cup": "cup", r"\cap": "cap", r"\setminus": "minus", r"\backslash": "minus"}
_CONNECTIVES = ("and", "or")
_SHORT = 3
"""Letters of an unknown run that are read as a product; longer runs are words."""

_STRUCTURE = re.compile(r"(?P<open>\\\{|\\begin|[({\[])|(?P<close>\\\}|\\end|[)}\]])|(?P<bar>\\mid|\\vert|[|:])|\\.")
_LABEL = re.compile(r"\b(?:answer|result|solutions?|value|total|area|volume|length|sum|probability)\W*$", re.IGNORECASE)
_LEX = re.compile(
    r"\s*(?:(?P<num>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,6}(?![\d.a-zA-Z]))?)|(?P<cmd>\\[a-zA-Z]+|\\[^a-zA-Z])"
    r"|(?P<word>[a-zA-Z]+)|(?P<op><=|>=|!=|==|<>|\*\*|\S))"
)


def parse(text: str, comma: str = "group") -> Node:
    """Read one cleaned answer. ``comma`` reads 1,234 as one number ("group"), as two ("list"), or 1,22 as 1.22 ("decimal").

    Raises :class:`Unreadable`; time and memory are linear in the length of the text, which is bounded.
    """
    if len(text) > MAX_LENGTH:
        raise Unreadable(f"longer than {MAX_LENGTH} characters")
    node = _Parser(join_numbers(text, comma)).answer()
    if _depth(node) > MAX_HEIGHT:
        raise Unreadable(f"a chain of more than {MAX_HEIGHT} operations")
    return node


def _depth(node: Node) -> int:
    """Height of the tree, found without recursion."""
    level, depth = [node], 0
    while level:
        level, depth = [arg for parent in level for arg in parent.args], depth + 1
    return depth


class _Parser:
    """Recursive descent over the text; ``kind, token`` is the lexeme at ``start``, ``end`` where the next begins."""

    def __init__(self, text: str) -> None:
        self.text, self.end, self.depth = text, 0, 0
        self.bars, self.in_head = 0, False  # inside |…| a bar closes; in the head of {x : …} a colon ends it
        self.notes: list[str] = []
        self.advance()

    # -- lexing

    def advance(self) -> str:
        last = getattr(self, "token", "")
        match = _LEX.match(self.text, self.end)
        self.start = self.end
        self.kind, self.token = ("end", "") if not match else (str(match.lastgroup), str(match[match.lastgroup or 0]))
        self.end = match.end() if match else len(self.text)
        if self.kind == "word":
            self._split_word()
        elif self.token == r"\text":
            self.kind, self.token = "text", self._raw_group()
            name = _ALIASES.get(self.token, self.token)
            if name in FUNCTIONS and not (name in NAMES and self._after_value()):
                self.kind, self.token = "cmd", "\\" + name
        return last

    def _split_word(self) -> None:
        """A run of letters is a known name, a word, or a product of single letters (then only the first is read)."""
        word, lower = self.token, self.token.lower()
        known = _ALIASES.get(word, word)
        if known in FUNCTIONS or word in _GREEK or word in ("pi", "oo"):
            self.kind, self.token = "cmd", "\\" + known
        elif lower in _MONTHS:
            self.token = lower
        elif lower in ("infinity", "inf"):
            self.kind, self.token = "cmd", r"\infty"
        elif (
            lower in _PERCENT
            or lower in ("and", "or", "mod")
            or len(word) > _SHORT
            or (_is_unit(word) and self._after_value())
        ):
            self.kind = "text"
        else:
            self.token, self.end = word[0], self.end - len(word) + 1

    def _after_value(self) -> bool:
        return self.text[: self.start].rstrip()[-1:] in tuple("0123456789)}")

    def _raw_group(self) -> str:
        opening = re.compile(r"\s*\{").match(self.text, self.end)
        if not opening:
            return ""
        depth, at = 1, opening.end()
        while at < len(self.text) and depth:
            depth += {"{": 1, "}": -1}.get(self.text[at], 0)
            at += 1
        self.end = at
        return self.text[opening.end() : at - (depth == 0)].strip()

    def accept(self, *tokens: str) -> bool:
        if self.kind not in ("text", "end") and self.token in tokens:
            self.advance()
            return True
        return False

    def expect(self, *tokens: str) -> None:
        if not self.accept(*tokens):
            raise Unreadable(f"expected {' or '.join(tokens)} at {self.start}, got {self.token!r}")

    def nested(self, read: Callable[[], Node]) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"nested deeper than {MAX_DEPTH}")
        node = read()
        self.depth -= 1
        return node

    # -- lists and relations

    def answer(self) -> Node:
        node = self.alternatives()
        if self.accept(r"\over"):
            node = Node("/", (node, self.sum()))
        if self.kind != "end":
            raise Unreadable(f"unexpected {self.token!r} at {self.start}")
        notes = " ".join(self.notes)
        if node.op == "list" and not node.args:
            if not notes:
                raise Unreadable("empty")
            return Node("text", value=notes)
        if node.op != "text" and CHANGES_MEANING.search(notes):
            raise Unreadable(f"words that bear on the value: {notes!r}")
        return node

    def alternatives(self) -> Node:
        """Groups joined by "and", "or" or ";", of items joined by commas. The list's value is the connective."""
        groups, joints = [self.items()], []
        while joint := self._separator():
            joints.append(joint)
            groups.append(self.items())
        groups = [group for group in groups if group]
        if len(groups) > 1 and all(len(g) > 1 and all(n.op == "=" for n in g) for g in groups):
            return Node("list", tuple(Node("tuple", tuple(n.args[-1] for n in g), "()") for g in groups))
        flat = [node for group in groups for node in group]
        if len(flat) == 1:
            return flat[0]
        if joints == ["and"] and _mixed_units(flat):  # 5 dollars and 20 cents
            return Node("+", tuple(flat))
        return Node("list", tuple(flat), joints[0] if joints and len(set(joints)) == 1 else "")

    def _separator(self) -> str:
        if self.kind == "text" and self.token.lower().strip(" ,") in _CONNECTIVES:
            return self.advance().lower().strip(" ,")
        for token, joint in {";": ";", r"\lor": "or", r"\vee": "or", r"\land": "and", r"\wedge": "and"}.items():
            if self.accept(token):
                return joint
        return ""

    def items(self) -> list[Node]:
        found: list[Node] = []
        while True:
            label = self.token if self.kind == "text" else ""
            self.skip_notes()
            if label or not found:
                self.accept("=", r"\approx")  # Area = 5; = 5
            if _LABEL.search(label):
                self.accept(":")
            if not self._at_end_of_item():
                found.append(self.relation())
            if not self.accept(","):
                return found

    def _at_end_of_item(self) -> bool:
        connective = self.kind == "text" and self.token.lower().strip(" ,") in _CONNECTIVES
        return self.kind == "end" or connective or self.token in (",", ";", ")", "]", r"\}", "}", "&", "\\\\", r"\end")

    def skip_notes(self) -> None:
        while self.kind == "text" and self.token.lower().strip(" ,") not in _CONNECTIVES:
            self.notes.append(self.advance())

    def relation(self) -> Node:
        left = self.union()
        self.skip_notes()
        while self.kind != "text" and self.token in RELATIONS:
            op = RELATIONS[self.advance()]
            self.skip_notes()
            right = self.union() if op in ("=", "in") else self.ratio()
            left = Node(op, (left, right))
            self.skip_notes()
            if op not in ("=", "in") and self.token in _UNIONS:  # x < 1 \cup x > 3
                left = Node(_UNIONS[self.advance()], (left, self.relation()))
        if self.accept(r"\pmod") or (
            self.token == "(" and re.match(r"\(\s*(?:\\text\{)?\\?mod\b", self.text[self.start :].lstrip())
        ):
            return Node("residue", (left.args[-1] if left.op == "=" else left, self._modulus()))
        return left

    def _modulus(self) -> Node:
        if self.accept("("):
            while self.kind == "text" or self.token == r"\mod":
                self.advance()
            node = self.nested(self.sum)
            self.expect(")")
            return node
        return self.argument()

    def union(self) -> Node:
        left = self.ratio()
        while self.kind == "cmd" and self.token in _UNIONS:
            op = _UNIONS[self.advance()]
            bare = self.token == "{"
            right = self.ratio()
            left = Node(op, (left, Node("set", (right,)) if bare and right.op not in ("set", "tuple") else right))
        return left

    def ratio(self) -> Node:
        parts = [self.sum()]
        while not self.in_head and self.accept(":"):
            parts.append(self.sum())
        if len(parts) == 1:
            return parts[0]
        half = self.advance()[1:].lower() if self.token in (r"\AM", r"\PM") else ""
        return Node("ratio", tuple(parts), half)

    # -- expressions

    def sum(self) -> Node:
        terms = [self.signed()]
        while self.kind in ("op", "cmd") and self.token in ("+", "-", r"\pm", r"\mp"):
            terms.append(self.signed())
        return terms[0] if len(terms) == 1 else Node("+", tuple(terms))

    def signed(self) -> Node:
        signs = []
        while self.kind in ("op", "cmd") and self.token in ("+", "-", r"\pm", r"\mp"):
            signs.append(self.advance())
            if len(signs) > MAX_DEPTH:
                raise Unreadable("too many signs")
        node = self.term()
        if signs and signs[-1] == "-" and node.op == "mod":  # -7 mod 3 is (-7) mod 3
            signs.pop()
            node = Node("mod", (Node("neg", node.args[:1]), node.args[1]))
        for sign in reversed(signs):
            node = node if sign == "+" else Node({"-": "neg", r"\pm": "pm", r"\mp": "mp"}[sign], (node,))
        return node

    def term(self) -> Node:
        node = self.factor(first=True)
        while True:
            if self.accept("*", r"\cdot", r"\times", r"\ast"):
                node = Node("*", (node, self.signed_factor()))
            elif self.accept("/", r"\div"):
                node = Node("/", (node, self.signed_factor()))
            elif self.accept(r"\bmod", r"\mod") or (self.kind == "text" and self.token == "mod" and self.advance()):
                node = Node("mod", (node, self.signed_factor()))
            elif self._starts_factor():
                node = self.juxtapose(node)
            else:
                return node

    def juxtapose(self, node: Node) -> Node:
        if self.kind == "text":
            return self.unit(node)
        here, factor = self.text[self.start :].lstrip(), self.factor()
        if node.op == "unit" and factor.op == "num" and self.kind == "text":  # 2 hours 30 minutes
            return Node("+", (node, self.unit(factor)))
        if node.op == "num" and re.fullmatch(r"\d+", node.value):  # mixed numbers: 2 1/3
            if factor.op == "percent" and here.startswith(r"\frac") and _proper(factor.args[0]):
                return Node("percent", (Node("+", (node, *factor.args)),))
            if factor.op == "/" and here.startswith(r"\frac") and _proper(factor):
                return Node("+", (node, factor))
            if factor.op == "num" and re.fullmatch(r"\d+", factor.value) and self.accept("/"):
                return Node("+", (node, Node("/", (factor, self.factor()))))
        return Node("*", (node, factor))

    def unit(self, node: Node) -> Node:
        """Upright words after a value: percent, a unit, or a note."""
        words = self.advance()
        while self.kind == "text" and self.token.lower() not in (*_CONNECTIVES, "mod"):
            words += " " + self.advance()
        if self.token == "/" and (
            rest := re.compile(r"\s*(?:\\text\s*\{([^{}]*)\}|([a-z]+))").match(self.text, self.end)
        ):
            words += "/" + (rest[1] or rest[2])
            self.end = rest.end()
            self.advance()
        if self.kind == "op" and self.token == "^" and read_unit(words):
            self.advance()
            words += f"^{self._exponent()}"
        if CHANGES_MEANING.search(words):
            raise Unreadable(f"words that bear on the value: {words!r}")
        if any(word in _PERCENT for word in words.lower().split()):
            return Node("percent", (node,))
        unit = read_unit(words)
        if not unit:
            self.notes.append(words)
            if self._starts_factor():
                raise Unreadable(f"words between values: {words!r}")
            return node
        return Node("unit", (node,), unit)

    def _exponent(self) -> str:
        exponent = self.argument()
        return ("-" if exponent.op == "neg" else "") + (exponent.args[0] if exponent.op == "neg" else exponent).value

    def signed_factor(self) -> Node:
        negative = self.accept("-")
        node = self.factor(first=True)
        return Node("neg", (node,)) if negative else node

    def _starts_factor(self) -> bool:
        if self.kind in ("num", "word"):
            return True
        if self.kind == "text":
            return self.token.lower().strip(" ,") not in ("and", "or", "mod")
        if self.kind == "op":
            if self.token == "(" and re.match(r"\(\s*(?:\\text\{)?\\?mod\b", self.text[self.start :].lstrip()):
                return False
            return self.token in "([{%" or (self.token == "|" and not self.bars)
        return self.kind == "cmd" and self.token not in RELATIONS and self.token not in _CLOSERS

    def factor(self, first: bool = False) -> Node:
        if first:
            self.skip_notes()
        return self.postfix(self.atom())

    def postfix(self, node: Node) -> Node:
        while True:
            if self.accept("^", "**"):
                node = self._power(node)
            elif self.accept("!"):
                node = Node("!!" if self.accept("!") else "!", (node,))
            elif self.accept("%", r"\%"):
                node = Node("percent", (node,))
            elif self.kind == "op" and self.token == "_":
                node = self._subscript(node)
            elif self.accept("'", r"\prime"):
                if node.op != "sym":
                    raise Unreadable("a dash after no name")
                node = sym(node.value + "'")
            else:
                return node

    def _power(self, base: Node) -> Node:
        if base.op == "matrix" and self.accept("T", r"\top", r"\intercal"):
            return Node(
                "matrix",
                tuple(Node("tuple", column, "()") for column in zip(*(row.args for row in base.args), strict=True)),
            )
        exponent = self.nested(self.argument)
        while self.accept("^", "**"):  # right associative: 2^3^2
            exponent = Node("^", (exponent, self.nested(self.argument)))
        return Node("^", (base, exponent))

    def _subscript(self, node: Node) -> Node:
        self.end = self.start + self.text[self.start :].index("_") + 1
        raw = self._raw_argument()
        label = re.sub(r"\\text|[{}()\s\\]", "", raw)
        if node.op == "num":
            base = _BASES.get(label.lower(), int(label) if label.isdigit() and len(label) < 3 else 0)
            if not 2 <= base <= 36:
                raise Unreadable(f"no number base: {label!r}")
            return Node("base", (node,), str(base))
        return sym(f"{node.value or node}_{label}")

    def _raw_argument(self) -> str:
        if re.compile(r"\s*\{").match(self.text, self.end):
            raw = self._raw_group()
        else:
            match = re.compile(r"\s*(\\[a-zA-Z]+|\d+|.)").match(self.text, self.end)
            raw = match[1] if match else ""
            self.end = match.end() if match else self.end
        self.advance()
        return raw

    def argument(self) -> Node:
        """What follows ^ or a command: a group in braces, a signed number, or one factor."""
        negative, signs = False, 0
        while self.kind == "op" and self.token in ("-", "+"):
            negative, signs = negative ^ (self.advance() == "-"), signs + 1
            if signs > MAX_DEPTH:
                raise Unreadable("too many signs")
        node = self.nested(self.atom)
        return Node("neg", (node,)) if negative else node

    def digit(self) -> Node:
        r"""An argument of ``\frac``: a group, or ONE digit or letter (``\frac12`` is a half)."""
        if self.kind == "num" and len(self.token) > 1:
            one = self.token[0]
            if not one.isdigit():
                raise Unreadable(f"no digit at {self.start}")
            self.end = self.start + self.text[self.start :].index(one) + 1
            self.advance()
            return num(one)
        return self.argument()

    def atom(self) -> Node:
        if self.kind == "num":
            return self._number(self.advance())
        if self.kind == "word":
            return self._symbol()
        if self.kind == "text":
            return self._text_atom()
        if self.token in _OPENERS:
            return self.nested(self.group)
        if self.accept("|", r"\vert", r"\lvert", r"\mid"):
            return self.nested(self._bars)
        if self.kind == "cmd":
            return self.nested(self.command)
        raise Unreadable(f"unexpected {self.token or 'end'!r} at {self.start}")

    def _number(self, token: str) -> Node:
        mantissa, e, exponent = token.lower().partition("e")
        mantissa = mantissa.rstrip(".") if mantissa != "." else "0"
        power = Node("^", (num(10), num(int(exponent)))) if e else None
        return num(mantissa) if power is None else Node("*", (num(mantissa), power))

    def _symbol(self) -> Node:
        name = self.advance()
        if self.token == "(" and self.kind == "op":
            closed = re.match(
                r"\(\s*[a-zA-Z0-9]\s*\)\s*=|\(\s*[a-zA-Z0-9, +-]{1,12}\)", self.text[self.start :].lstrip()
            )
            if closed and (name in "fghFGHPW" or closed[0].endswith("=")):
                inner = self.nested(self.group)
                return Node("call", inner.args if inner.op == "tuple" else (inner,), name)
        return sym(name)

    def _text_atom(self) -> Node:
        word = self.advance()
        if re.fullmatch(r"[-+\d.,/\s]*\d", word) or re.fullmatch(r"[A-Za-z]", word):
            return _Parser(word.replace(",", "")).sum()
        self.notes.append(word)
        return Node("text", value=word)

    def _bars(self) -> Node:
        self.bars += 1
        node = self.sum()
        self.bars -= 1
        self.expect("|", r"\vert", r"\rvert", r"\mid")
        return Node("abs", (node,))

    def group(self) -> Node:
        opening = self.advance()
        bars, self.bars = self.bars, 0
        built = self._builder() if opening == r"\{" else None
        if built:
            self.bars = bars
            return built
        node = self.alternatives()
        if opening == "{" and self.accept(r"\choose"):
            node = Node("binom", (node, self.sum()))
        if opening == "{" and self.accept(r"\over"):
            node = Node("/", (node, self.sum()))
        closing = self.token
        self.expect(*_OPENERS[opening])
        self.bars = bars
        many = node.args if node.op == "list" else (node,)
        if opening == r"\{" or (opening == "{" and closing == "}" and node.op == "list"):
            return Node("set", many)
        if opening == "{" or (len(many) == 1 and opening + closing in ("()", "[]") and node.op != "list"):
            return node
        if not many:
            raise Unreadable("an empty group")
        return Node("tuple", many, opening + closing)

    def _builder(self) -> Node | None:
        """{x | x > 2} is its condition, {2k | k in Z} a family; None if this is another set."""
        if not self._has_condition():
            return None
        before = (self.start, self.end, self.kind, self.token)
        self.bars, self.in_head = 1, True
        head = self.relation()
        self.bars, self.in_head = 0, False
        if head.op == "num" or not self.accept(r"\mid", "|", ":", r"\vert"):  # a set of ratios, say
            self.start, self.end, self.kind, self.token = before
            return None
        condition = self.alternatives()
        self.expect(r"\}")
        if head.op == "in" and head.args[0].op == "sym" and head.args[1] != sym("\\mathbb R"):
            return Node("list", (head, condition), "and")
        name = head.args[0] if head.op == "in" else head
        return condition if name.op == "sym" and condition.op != "=" else Node("where", (name, condition))

    def _has_condition(self) -> bool:
        r"""Is there a bar or colon in this set that is in no inner bracket?"""
        depth = 0
        for match in _STRUCTURE.finditer(self.text, self.start):
            depth += (match["open"] is not None) - (match["close"] is not None)
            if depth < 0:
                return False
            if match["bar"] and not depth:
                return True
        return False

    def command(self) -> Node:
        name = self.advance()[1:]
        name = _ALIASES.get(name, name)
        if name in _COMMANDS:
            return _COMMANDS[name](self)
        if name in FUNCTIONS:
            return self._call(name)
        if name in _GREEK:
            return sym(name)
        if self.token == "{" or name in _STRUCTURAL:
            raise Unreadable(f"unknown command \\{name}")
        return sym("\\" + name)

    def _call(self, name: str) -> Node:
        base = power = None
        while self.kind == "op" and self.token in ("_", "^"):
            if self.accept("_"):
                base = self.digit() if self.kind == "num" else self.argument()
            elif self.accept("^"):
                power = self.argument()
        if self.token == "(" and self.kind == "op":
            inner = self.nested(self.group)
            args = inner.args if inner.op in ("tuple", "list") else (inner,)
        else:
            args = (self._open_argument(),)
        if name in ("log", "lg") and base is not None:
            args = (*args, base)
        if power is not None and power == Node("neg", (num(1),)) and name in ("sin", "cos", "tan"):
            return Node("call", args, "arc" + name)
        node = _function(name, args)
        return node if power is None else Node("^", (node, power))

    def _open_argument(self) -> Node:
        r"""``\sin 2x \cos x``: the argument runs on while factors follow, up to the next function."""
        node = self.factor()
        while self._starts_factor() and self.token[1:] not in FUNCTIONS and self.kind != "text" and self.token != "(":
            node = Node("*", (node, self.factor()))
        while self.kind == "text" and self.token == "degrees":
            node = self.unit(node)
        return node

    def frac(self) -> Node:
        top = self.digit()
        return Node("/", (top, self.digit()))

    def sqrt(self) -> Node:
        index = num(2)
        if self.accept("["):
            index = self.sum()
            self.expect("]")
        return Node("root", (self.argument(), index))

    def binom(self) -> Node:
        top = self.digit()
        return Node("binom", (top, self.digit()))

    def rounded(self, op: str, closing: str) -> Node:
        node = self.sum()
        self.expect(closing)
        return Node(op, (node,))

    def environment(self) -> Node:
        self.end = self.start
        name = self._raw_argument().rstrip("*")
        if name == "array":
            self._raw_skip()
        rows = self._rows(name, r"\end")
        self.end = self.start
        self._raw_argument()
        if name == "cases":
            return Node("set", tuple(row.args[0] for row in rows))
        return _matrix(rows, name)

    def _rows(self, name: str, closing: str) -> list[Node]:
        rows: list[Node] = []
        while True:
            while self.accept(r"\hline"):
                pass
            cells = [self.sum()]
            while self.accept("&"):
                cells.append(self.sum() if name != "cases" else self.relation())
            if name == "cases" and self.token in RELATIONS:
                cells = [Node(RELATIONS[self.advance()], (cells[0], self.sum()))]
            rows.append(Node("tuple", tuple(cells), "()"))
            self.accept(",")
            if not self.accept("\\\\", r"\cr") or self.token == closing:
                break
        self.expect(closing)
        return rows

    def plain_matrix(self) -> Node:
        r"""Plain TeX: ``\pmatrix{1 & 2 \cr 3 & 4}``."""
        self.expect("{")
        return _matrix(self._rows("matrix", "}"), "matrix")

    def series(self, op: str) -> Node:
        r"""``\sum_{k=1}^{n} k^2``: the body, its variable, and the limits."""
        self.expect("_")
        self.expect("{")
        name = self.advance()
        self.expect("=")
        low = self.sum()
        self.expect("}")
        self.expect("^")
        high = self.argument()
        return Node(op, (self.term(), sym(name), low, high))

    def _raw_skip(self) -> None:
        self.end = self.start
        self._raw_argument()

    def permutations(self) -> Node:
        top, bottom = self.argument(), self.argument()
        return Node("*", (Node("binom", (top, bottom)), Node("!", (bottom,))))

    def based(self) -> Node:
        r"""``\based{1A}{16}``: digits that may be letters."""
        self.end = self.start
        digits = self._raw_argument()
        self.end = self.start
        return Node("base", (num(digits),), self._raw_argument())

    def blackboard(self) -> Node:
        self.end = self.start
        return sym("\\mathbb " + self._raw_argument().strip())

    def conjugate(self) -> Node:
        r"""``\overline{3+4i}``; over letters it names a segment."""
        node = self.argument()
        if node.symbols() and not all(name.isupper() for name in node.symbols()):
            return Node("call", (node,), "conjugate")
        return _conjugated(node)

    def boxed(self) -> Node:
        return self.argument()


def _proper(fraction: Node) -> bool:
    if fraction.op != "/":
        return False
    top, bottom = fraction.args
    return all(n.op == "num" and n.value.isdigit() for n in (top, bottom)) and int(top.value) < int(bottom.value)


def _matrix(rows: list[Node], name: str) -> Node:
    if len({len(row.args) for row in rows}) > 1:
        raise Unreadable("a matrix with uneven rows")
    return Node("det" if name == "vmatrix" else "matrix", tuple(rows))


def _determinant(node: Node) -> Node:
    if node.op != "matrix":
        raise Unreadable("a determinant of no matrix")
    return Node("det", node.args)


def _function(name: str, args: tuple[Node, ...]) -> Node:
    """Functions that are another node in disguise: ``sqrt(x)``, ``cis x``, ``lg x``."""
    if name in ("abs", "floor", "ceil") and len(args) == 1:
        return Node(name, args)
    if name in ("sqrt", "cbrt") and len(args) == 1:
        return Node("root", (args[0], num(2 if name == "sqrt" else 3)))
    if name == "exp":
        return Node("^", (sym("e"), *args))
    if name == "cis":
        return Node("+", (Node("call", args, "cos"), Node("*", (sym("i"), Node("call", args, "sin")))))
    if name == "log2":
        return Node("call", (*args, num(2)), "log")
    return Node("call", args, {"lg": "log"}.get(name, name))


def _conjugated(node: Node) -> Node:
    if node == sym("i"):
        return Node("neg", (node,))
    return Node(node.op, tuple(map(_conjugated, node.args)), node.value)


def _is_unit(word: str) -> bool:
    return (
        word not in AMBIGUOUS
        and len(word) > 1
        and (word in NAMES or word.lower() in NAMES and word.lower() not in AMBIGUOUS)
    )


def _mixed_units(nodes: list[Node]) -> bool:
    """5 dollars and 20 cents, 1 hour and 5 minutes: one dimension, falling units."""
    if any(node.op != "unit" for node in nodes):
        return False
    measures = [measure(node.value) for node in nodes]
    factors = [m.factor for m in measures]
    return (
        len({m.dimensions for m in measures}) == 1
        and len(set(factors)) == len(factors)
        and factors == sorted(factors, reverse=True)
    )


_OPENERS = {
    "(": (")", "]"),
    "[": (")", "]"),
    "{": ("}",),
    r"\{": (r"\}",),
    r"\lbrace": (r"\rbrace",),
    r"\langle": (r"\rangle",),
}
_CLOSERS = frozenset(
    [
        r"\over",
        r"\cr",
        r"\}",
        r"\rfloor",
        r"\rceil",
        r"\end",
        "\\\\",
        r"\cup",
        r"\cap",
        r"\setminus",
        r"\backslash",
        r"\pm",
        r"\mp",
        r"\cdot",
        r"\times",
    ]
    + [
        r"\div",
        r"\bmod",
        r"\mod",
        r"\pmod",
        r"\rbrace",
        r"\rangle",
        r"\rvert",
        r"\mid",
        r"\vert",
        r"\lor",
        r"\land",
        r"\vee",
        r"\wedge",
    ]
    + [r"\ast", r"\%", r"\choose", r"\prime", r"\AM", r"\PM"]
)
_STRUCTURAL = frozenset(["circ", "end", "over", "right", "left", "choose", "hline", "cline", "multicolumn"])
_COMMANDS: dict[str, Callable[[_Parser], Node]] = {
    "frac": _Parser.frac,
    "sqrt": _Parser.sqrt,
    "binom": _Parser.binom,
    "dbinom": _Parser.binom,
    "tbinom": _Parser.binom,
    "begin": _Parser.environment,
    "mathbb": _Parser.blackboard,
    "boxed": _Parser.boxed,
    "fbox": _Parser.boxed,
    "pmatrix": _Parser.plain_matrix,
    "bmatrix": _Parser.plain_matrix,
    "matrix": _Parser.plain_matrix,
    "det": lambda p: _determinant(p.atom()),
    "perm": _Parser.permutations,
    "based": _Parser.based,
    "sum": lambda p: p.series("sum"),
    "prod": lambda p: p.series("prod"),
    "bar": _Parser.conjugate,
    "overline": _Parser.conjugate,
    "vec": _Parser.boxed,
    "lfloor": lambda p: p.rounded("floor", r"\rfloor"),
    "lceil": lambda p: p.rounded("ceil", r"\rceil"),
    "pi": lambda p: sym("pi"),
    "infty": lambda p: sym("oo"),
    "oo": lambda p: sym("oo"),
    "emptyset": lambda p: Node("set"),
    "varnothing": lambda p: Node("set"),
    "angle": lambda p: p.argument(),
}
