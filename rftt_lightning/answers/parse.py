r"""A small, safe parser of answers: LaTeX or plain text to one tree of :class:`Node`; it builds, and never evaluates.

Everything a final answer may be is one grammar: lists and alternatives of relations of expressions, with tuples, sets,
intervals, matrices, ratios, units and words. Length and nesting are bounded before and while reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 4000
"""Characters of one answer; longer ones are refused unread."""
MAX_DEPTH = 32
"""Nested groups; the reader recurses some ten frames for each."""

MAX_HEIGHT = 100
"""Height of the tree that is read; everything after walks it recursively."""


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


CONSTANTS = frozenset({"pi", "e", "i", "oo"})
FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "arcsinh",
        "arccosh",
        "arctanh",
        "ln",
        "log",
        "lg",
        "exp",
        "max",
        "min",
        "gcd",
        "lcm",
    ]
)
_GREEK = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "vartheta",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "phi",
        "varphi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Sigma",
        "Phi",
        "Psi",
        "Omega",
        "ell",
        "hbar",
    ]
)
RELATIONS = {
    "=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "==": "=", r"\le": "<=", r"\leq": "<=", r"\leqslant": "<=",
    r"\ge": ">=", r"\geq": ">=", r"\geqslant": ">=", r"\lt": "<", r"\gt": ">", r"\ne": "!=", r"\neq": "!=", r"\in": "in",
    r"\approx": "~", r"\sim": "~", r"\equiv": "=", r"\to": "=", r"\mapsto": "=",
}  # fmt: skip
UNITS = {
    # name: (dimension, factor); only within one dimension can units differ
    **dict.fromkeys(["s", "sec", "secs", "second", "seconds"], ("time", "1")),
    **dict.fromkeys(["min", "mins", "minute", "minutes"], ("time", "60")),
    **dict.fromkeys(["h", "hr", "hrs", "hour", "hours"], ("time", "3600")),
    **dict.fromkeys(["day", "days"], ("time", "86400")), **dict.fromkeys(["week", "weeks"], ("time", "604800")),
    **dict.fromkeys(["year", "years", "yr", "yrs"], ("years", "1")), **dict.fromkeys(["month", "months"], ("months", "1")),
    **dict.fromkeys(["mm", "millimeter", "millimeters"], ("length", "1/1000")),
    **dict.fromkeys(["cm", "centimeter", "centimeters", "centimetre", "centimetres"], ("length", "1/100")),
    **dict.fromkeys(["m", "meter", "meters", "metre", "metres"], ("length", "1")),
    **dict.fromkeys(["km", "kilometer", "kilometers", "kilometre", "kilometres"], ("length", "1000")),
    **dict.fromkeys(["in", "inch", "inches"], ("length", "127/5000")), **dict.fromkeys(["ft", "foot", "feet"], ("length", "381/1250")),
    **dict.fromkeys(["yd", "yard", "yards"], ("length", "1143/1250")), **dict.fromkeys(["mi", "mile", "miles"], ("length", "201168/125")),
    **dict.fromkeys(["g", "gram", "grams"], ("mass", "1")), **dict.fromkeys(["kg", "kilogram", "kilograms"], ("mass", "1000")),
    **dict.fromkeys(["lb", "lbs", "pound", "pounds"], ("pounds", "1")), **dict.fromkeys(["oz", "ounce", "ounces"], ("ounces", "1")),
    **dict.fromkeys(["ml", "milliliter", "milliliters"], ("volume", "1/1000")),
    **dict.fromkeys(["l", "liter", "liters", "litre", "litres"], ("volume", "1")),
    **dict.fromkeys(["dollar", "dollars", "usd", "bucks"], ("dollars", "1")), **dict.fromkeys(["cent", "cents"], ("dollars", "1/100")),
    **dict.fromkeys(["degree", "degrees", "deg"], ("angle", "1")), **dict.fromkeys(["rad", "radian", "radians"], ("radians", "1")),
    "mph": ("mph", "1"), "j": ("energy", "1"), "n": ("force", "1"), "hz": ("hz", "1"),
}  # fmt: skip
_ONLY_AS_TEXT = frozenset(
    ["s", "h", "m", "in", "g", "l", "j", "n", "min", "sec", "deg", "rad", "mi"]
)  # as bare letters these are names of quantities
_MONTHS = frozenset(
    [
        "january",
        "february",
        "march",
        "april",
        "may",
        "june",
        "july",
        "august",
        "september",
        "october",
        "november",
        "december",
    ]
)
_PERCENT = frozenset(["%", "percent", "percents", "percentage", "pct"])
_BASES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "sixteen": 16,
}

_BUILDER = re.compile(r"\s*[a-zA-Z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid|\\vert|:|\|)")
_LEX = re.compile(
    r"\s*(?:(?P<num>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,6}(?![\d.a-zA-Z]))?)|(?P<cmd>\\[a-zA-Z]+|\\[^a-zA-Z])"
    r"|(?P<word>[a-zA-Z]+)|(?P<op><=|>=|!=|==|\*\*|\S))"
)


def parse(text: str, comma: str = "group") -> Node:
    """Read one cleaned answer. ``comma`` reads 1,234 as one number ("group"), as two ("list"), or 1,22 as 1.22 ("decimal").

    Raises :class:`Unreadable`; time and memory are linear in the length of the text, which is bounded.
    """
    if len(text) > MAX_LENGTH:
        raise Unreadable(f"longer than {MAX_LENGTH} characters")
    node = _Parser(_join_numbers(text, comma)).answer()
    if _depth(node) > MAX_HEIGHT:
        raise Unreadable(f"a chain of more than {MAX_HEIGHT} operations")
    return node


def _depth(node: Node) -> int:
    """Height of the tree, found without recursion."""
    level, depth = [node], 0
    while level:
        level, depth = [arg for parent in level for arg in parent.args], depth + 1
    return depth


def _join_numbers(text: str, comma: str) -> str:
    bracketed = re.match(r"^\s*(?:\\\{|[\[({])", text) is not None
    if comma == "decimal":
        text = re.sub(r"^([-\s]*\d+),(\d{2,})(?![\d,.])(?!\s*[,;\d])", r"\1.\2", text)
    elif comma == "group" and not bracketed:
        text = re.sub(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"(?<![\d,.])\d{1,3}(?: \d{3})+(?![\d,/])", lambda m: m[0].replace(" ", ""), text)
    text = re.sub(r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))", _repeating, text)
    text = re.sub(r"(?<!\d)(\d*)\.(\d*)\((\d+)\)(?!\d)()", _repeating, text)
    return re.sub(
        r"(?<!\d)(\d{0,40})\.(\d{0,12}?)((\d{1,8}?)\4{1,40})\s*(?:\\[ld]?dots|\.\.\.)",
        lambda m: _repeating(m, dots=True),
        text,
    )


def _repeating(match: re.Match[str], dots: bool = False) -> str:
    whole, head = match[1] or "0", match[2]
    cycle = match[4] if dots else match[3] or match[4]
    if dots and len(match[3]) < 3:
        return match[0]
    value = Fraction(int(whole + head), 10 ** len(head)) + Fraction(
        int(cycle), (10 ** len(cycle) - 1) * 10 ** len(head)
    )
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


class _Parser:
    """Recursive descent over the text; ``kind, token`` is the lexeme at ``start``, ``end`` where the next begins."""

    def __init__(self, text: str) -> None:
        self.text, self.end, self.depth, self.bars = text, 0, 0, 0
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
        return last

    def _split_word(self) -> None:
        """A run of letters is a known name, a word, or a product of single letters (then only the first is read)."""
        word, lower = self.token, self.token.lower()
        if word in FUNCTIONS or word in _GREEK or word in ("pi", "sqrt", "oo"):
            self.kind, self.token = "cmd", "\\" + word
        elif lower in _MONTHS:
            self.token = lower
        elif lower in ("infinity", "inf"):
            self.kind, self.token = "cmd", r"\infty"
        elif (
            lower in _PERCENT
            or lower in ("and", "or", "mod")
            or (lower in UNITS and lower not in _ONLY_AS_TEXT)
            or len(word) > 3
        ):
            self.kind = "text"
        else:
            self.token, self.end = word[0], self.end - len(word) + 1

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
        if self.kind != "end":
            raise Unreadable(f"unexpected {self.token!r} at {self.start}")
        if node.op == "list" and not node.args:
            if not self.notes:
                raise Unreadable("empty")
            return Node("text", value=" ".join(self.notes))
        return node

    def alternatives(self) -> Node:
        """Groups joined by "and", "or" or ";", of items joined by commas."""
        groups = [self.items()]
        while self._separator():
            groups.append(self.items())
        groups = [group for group in groups if group]
        if len(groups) > 1 and all(len(g) > 1 and all(n.op == "=" for n in g) for g in groups):
            return Node("list", tuple(Node("tuple", tuple(n.args[-1] for n in g), "()") for g in groups))
        flat = [node for group in groups for node in group]
        return flat[0] if len(flat) == 1 else Node("list", tuple(flat))

    def _separator(self) -> bool:
        if self.kind == "text" and self.token.lower().strip(" ,") in ("and", "or"):
            self.advance()
            return True
        return self.accept(";", r"\lor", r"\land", r"\vee", r"\wedge")

    def items(self) -> list[Node]:
        found: list[Node] = []
        while True:
            self.skip_notes()
            if not self._at_end_of_item():
                found.append(self.relation())
            if not self.accept(","):
                return found

    def _at_end_of_item(self) -> bool:
        connective = self.kind == "text" and self.token.lower().strip(" ,") in ("and", "or")
        return self.kind == "end" or connective or self.token in (",", ";", ")", "]", r"\}", "}", "&", "\\\\", r"\end")

    def skip_notes(self) -> None:
        while self.kind == "text" and self.token.lower().strip(" ,") not in ("and", "or"):
            self.notes.append(self.advance())

    def relation(self) -> Node:
        left = self.union()
        self.skip_notes()
        while self.kind != "text" and self.token in RELATIONS:
            op = RELATIONS[self.advance()]
            self.skip_notes()
            right = self.union()
            left = Node(op, (left, right))
            self.skip_notes()
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
        names = {r"\cup": "cup", r"\cap": "cap", r"\setminus": "minus", r"\backslash": "minus"}
        while self.kind == "cmd" and self.token in names:
            op = names[self.advance()]
            left = Node(op, (left, self.ratio()))
        return left

    def ratio(self) -> Node:
        parts = [self.sum()]
        while self.accept(":"):
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
        words = self.advance().lower().replace(".", " ").replace("/", " per ").replace("^", " ^").split()
        if self.kind == "text" and words and words[-1] in ("square", "cubic", "sq", "cu"):
            words += self.advance().lower().split()
        power = 1
        for word in words:
            if word in ("square", "sq") or word in ("^2", "^{2}", "squared"):
                power = 2
            elif word in ("cubic", "cu") or word in ("^3", "^{3}"):
                power = 3
        if self.token == "^" and any(w in UNITS for w in words):
            self.advance()
            exponent = self.argument()
            power = int(exponent.value) if exponent.op == "num" and exponent.value in ("2", "3") else power
        if any(word in _PERCENT for word in words):
            return Node("percent", (node,))
        known = [word for word in words if word in UNITS]
        if not known:
            self.notes.extend(words)
            return node
        return Node("unit", (node,), "per".join(known) if len(known) > 1 else f"{known[0]}^{power}")

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
                node = Node("!", (node,))
            elif self.accept("%", r"\%"):
                node = Node("percent", (node,))
            elif self.kind == "op" and self.token == "_":
                node = self._subscript(node)
            elif self.accept("'", r"\prime") and node.op == "sym":
                node = sym(node.value + "'")
            else:
                return node

    def _power(self, base: Node) -> Node:
        exponent = self.nested(self.argument)
        while self.accept("^", "**"):  # right associative: 2^3^2
            exponent = Node("^", (exponent, self.nested(self.argument)))
        return Node("^", (base, exponent))

    def _subscript(self, node: Node) -> Node:
        self.end = self.start + self.text[self.start :].index("_") + 1
        raw = self._raw_argument()
        label = re.sub(r"\\text|[{}\s\\]", "", raw)
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
        if self.accept("-"):
            return Node("neg", (self.argument(),))
        if self.accept("+"):
            return self.argument()
        return self.nested(self.atom)

    def digit(self) -> Node:
        r"""An argument of ``\frac``: a group, or ONE digit or letter (``\frac12`` is a half)."""
        if self.kind == "num" and len(self.token) > 1:
            one = self.token[0]
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
        builder = _BUILDER.match(self.text, self.start) if opening == r"\{" else None
        if builder:  # {x | x > 2} is its condition
            self.end = builder.end()
            self.advance()
            node = self.alternatives()
            self.expect(r"\}")
            return node
        node = self.alternatives()
        if opening == "{" and self.accept(r"\choose"):
            node = Node("binom", (node, self.sum()))
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

    def command(self) -> Node:
        name = self.advance()[1:]
        if name in FUNCTIONS:
            return self._call(name)
        if name in _COMMANDS:
            return _COMMANDS[name](self)
        if name in _GREEK:
            return sym(name)
        if name.isalpha() and name not in _STRUCTURAL:
            return sym("\\" + name)
        raise Unreadable(f"unknown command \\{name}")

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
        node = Node("call", args, {"lg": "log"}.get(name, name))
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
        rows: list[Node] = []
        while True:
            cells = [self.sum()]
            while self.accept("&"):
                cells.append(self.sum() if name != "cases" else self.relation())
            if name == "cases" and self.token in RELATIONS:
                cells = [Node(RELATIONS[self.advance()], (cells[0], self.sum()))]
            rows.append(Node("tuple", tuple(cells), "()"))
            self.accept(",")
            if not self.accept("\\\\") or self.token == r"\end":
                break
        self.expect(r"\end")
        self.end = self.start
        self._raw_argument()
        if name == "cases":
            return Node("set", tuple(row.args[0] for row in rows))
        if len({len(row.args) for row in rows}) > 1:
            raise Unreadable("a matrix with uneven rows")
        return Node("det" if name == "vmatrix" else "matrix", tuple(rows))

    def _raw_skip(self) -> None:
        self.end = self.start
        self._raw_argument()

    def blackboard(self) -> Node:
        self.end = self.start
        return sym("\\mathbb " + self._raw_argument().strip())

    def boxed(self) -> Node:
        return self.argument()


def _proper(fraction: Node) -> bool:
    if fraction.op != "/":
        return False
    top, bottom = fraction.args
    return all(n.op == "num" and n.value.isdigit() for n in (top, bottom)) and int(top.value) < int(bottom.value)


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
_STRUCTURAL = frozenset(["end", "over", "right", "left", "choose", "hline", "cline", "multicolumn"])
_COMMANDS: dict[str, Callable[[_Parser], Node]] = {
    "frac": _Parser.frac,
    "sqrt": _Parser.sqrt,
    "binom": _Parser.binom,
    "dbinom": _Parser.binom,
    "tbinom": _Parser.binom,
    "begin": _Parser.environment,
    "mathbb": _Parser.blackboard,
    "boxed": _Parser.boxed,
    "overline": _Parser.boxed,
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
