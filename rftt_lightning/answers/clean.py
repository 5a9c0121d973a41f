"""Raw answer text to plain LaTeX: unicode folded, decoration dropped, spelled-out notation rewritten. Nothing is evaluated here."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "‒": "-", "‐": "-", "‑": "-", "×": r"\times ", "✕": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "•": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/", "∕": "/", "∶": ":", "，": ",", "、": ",", "。": ".", "；": ";", "：": ":",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≦": r"\le ", "≧": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "≅": r"\approx ", "∪": r"\cup ", "⋃": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "Ø": r"\emptyset ",
    "±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∜": r"\sqrt[4] ", "°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ",
    "…": "...", "⋯": "...", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\phi ", "ϕ": r"\phi ",
    "ω": r"\omega ", "σ": r"\sigma ", "ρ": r"\rho ", "τ": r"\tau ", "ε": r"\epsilon ", "Δ": r"\Delta ", "Σ": r"\Sigma ", "Ω": r"\Omega ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ", "⟩": r"\rangle ", "〈": r"\langle ", "〉": r"\rangle ",
    "′": "'", "’": "'", "‘": "'", "″": "''", "“": '"', "”": '"', "≡": r"\equiv ", "∖": r"\setminus ", "∧": r"\land ", "∨": r"\lor ", "∣": "|",
    "∑": r"\sum ", "∏": r"\prod ", "→": r"\to ", "⇒": r"\to ", "∠": r"\angle ", "△": r"\triangle ", "‰": r"/1000 ", "¢": " cents ", "₤": "£",
    "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "", "\u00ad": "", "\u2061": "", "\u2062": "*", "\u200e": "", "\u200f": "",
}  # fmt: skip
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣʸᵏⁱ", "0123456789+-()nxyki")
_SUBSCRIPT = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙₖₓᵢ", "0123456789+-nkxi")

_CURRENCY = {"€": "euros", "£": "pounds sterling", "¥": "yen", "₹": "rupees"}

Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def _rules(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> list[Rule]:
    return [(re.compile(pattern), new) for pattern, new in rules]


def _letters(match: re.Match[str]) -> str:
    r"""``\text{A, C, and E}`` are letters of a choice, not a word."""
    parts = re.findall(r"\(?[A-J]\)?(?![a-zA-Z])|,|and|\S", match[1])
    if not all(part in (",", "and") or part.strip("()") in [*"ABCDEFGHIJ"] for part in parts):
        return match[0]
    return re.sub(r"[()]", "", match[1]) if match[1].count("(") > 1 else match[1]


def _upright(match: re.Match[str]) -> str:
    """Upright letters are a word or a unit; a single one is a symbol (e, d, i), unless it is a unit after a number."""
    single = len(match[1].strip()) == 1
    after_number = re.search(r"\d[\s\\,;:~]*$", match.string[max(0, match.start() - 12) : match.start()])
    unit = after_number and match[1].strip() in "mgsLhJNVWKA"
    return match[1] if single and not unit else rf"\text{{{match[1]}}}"


def _chosen(letter: str, command: str) -> tuple[str, Callable[[re.Match[str]], str]]:
    """The rule for ``_7C_3``, ``{}^7C_3`` and ``7C3`` (or P)."""
    spread = rf"(?<![\w)}}])(?:\{{\}})?[_^]\{{?(\w{{1,3}})\}}?{letter}_\{{?(\w{{1,3}})\}}?"
    flat = rf"(?<![\w\\^])(\d{{1,3}}){letter}(\d{{1,3}})(?!\w)"
    return f"{spread}|{flat}", lambda m: rf"\{command}{{{m[1] or m[3]}}}{{{m[2] or m[4]}}}"


_SCALES = {"hundred": "100", "dozen": "12", "million": "10^6", "billion": "10^9", "thousand": "10^3"}
_GROUP = r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"

_COMMAS = _rules(
    (r"\{\s*(\\times|\\cdot|[:=<>+/-])\s*\}", r"\1 "), (r"\{\s*,\s*\}|,\s*\\!\s*|\\!\s*,", ","), (r"\\!", "")
)

_LATEX = _rules(  # for texts with a backslash; in this order
    (r"\\(?:mathbf|boldsymbol)\s*\{([-+\s\d.,]*\d[\s\d.,]*)\}", lambda m: "{" + m[1].replace(" ", "").rstrip(".") + "}"),
    (r"\\\$\s*((?:\d|[.,](?=\d))+)(?!\s*(?:\\text\s*\{)?\s*(?:\\[a-z]?frac|dollar|cent|million|billion|thousand|[.\d]))", r"\1 dollars "),
    (r"\\\$", " "),
    (r"\\#", " "),
    (r"\\(?:[dtc]|nice|x|s)frac(?![a-zA-Z])", r"\\frac"),
    (r"\\root\s*\{?(\w+)\}?\s*\\of(?![a-zA-Z])", r"\\sqrt[\1]"),
    (r"\\(?:mbox|hbox|textnormal|textrm|textbf|textit|textsf|texttt|mathit|mathsf|emph|textup)(?=\s*\{)", r"\\text"),
    (r"\{\\(?:rm|bf|it|sf)(?![a-zA-Z])\s*([^{}]*)\}", r"\\text{\1}"),
    (r"\\math(?:rm|op)" + _GROUP, _upright),
    (r"\\operatorname\*?" + _GROUP, r"\\\1 "),
    (r"\\(?:underline|overrightarrow|overleftrightarrow|widehat|hat|tilde|widetilde|ensuremath|smash|mathop|math(?:bf|cal|frak|scr))" + _GROUP, r"{\1}"),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|(?<=[\d)}])\s*\\(?:degree|circ)(?![a-zA-Z])|\\degree(?![a-zA-Z])|\^\s*\{?\s*\\text\s*\{\s*o\s*\}\s*\}?", " degrees "),
    (r"[,.]?\s*\\text\{\s*(?:\(?(?:since|as|because|which|so that)|\((?:the|not|other|reject|where|so|we)\w*)\b.*$", ""),
    (r"\\frac\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}", r"\\text{\1/\2}"),
    (
        r"\\(?:left\.|right\.|left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|boldsymbol|bm|mathbf|mathstrut"
        r"|textcolor\{\w+\}|color\{\w+\}|unit|nonumber|ldotp|hfill|rm|bf|it)(?![a-zA-Z])",
        " ",
    ),
    (r"\\begin\{(?:align|equation|gather|split|aligned|gathered)(?:ed)?\*?\}|\\end\{(?:align|equation|gather|split|aligned|gathered)(?:ed)?\*?\}", " "),
    (r"(\\mathbb\s*\{?R\}?)\s*\\\s*\\?\{([^{}]*)\}", r"\1 \\setminus \\{\2\\}"),
    (r"\\(?:tag|label|h?phantom|vphantom|hspace|vspace|hskip|kern)\*?\{[^{}]*\}|(?<!\\)\\[\[\]()]", " "),
    (r"(?<!\\)\\(?:[,;:> ]|qquad|quad|par\b|enspace|thinspace)|(?<!\\)\\(?=$|\s)", " "),
    (r"\\l?dots[bcim]?(?![a-zA-Z])|\\cdots(?![a-zA-Z])", "..."),
    (r"\\text\s*\{\s*(?:plus |positive )?infinity\s*\}", r"\\infty "),
    (r"\\text\s*\{\s*(?:negative |minus )infinity\s*\}", r"-\\infty "),
    (r"\\text\s*\{\s*(?:all |the )*real(?: number)?s\s*\}", r"\\mathbb{R}"),
    (r"\\text\s*\{([\s(A-J),and]{1,80})\}", lambda m: _letters(m)),
    (r"\\text\s*\{\s*([-+]?\d[\d.,/]*\s*\\?%?)\s*\}", r"\1"),
    (r"^\\text\s*\{\s*([a-zA-Z])\s*\}$", r"\1"),
    (r"\\text\s*\{\s*\(\s*mod\s*\}", r"(\\mod "),
    (r"^\\text\s*\{([^{}]*\d[^{}]*)\}$", r"\1"),
    (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
    (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
)  # fmt: skip

_SIGNS = _rules(  # for every text
    (r"[€£¥₹]\s*(\d[\d,.]*)", lambda m: f"{m[1]} {_CURRENCY[m[0][0]]} "),
    (r"[€£¥₹]", lambda m: f" {_CURRENCY[m[0]]} "),
    (r"(?<!\\)\$|~", " "),
    (r"\+\s*/\s*-|\+-(?=\s*[\d\\a-z(])", r"\\pm "),
    (r"=<", "<="),
    (r"(?<=\d)\s*(?:\^\s*\{?)?(?:\\text\s*\{\s*)?(?:st|nd|rd|th)(?![a-zA-Z])\s*\}{0,2}", ""),
    (r"(?<=\d)\s*\^\s*\{?o\}?(?![a-zA-Z\d])", " degrees "),
    (r"degrees\s*(?:\\text\s*\{\s*)?([CF])\b\s*\}?", lambda m: r" \text{{{}}} ".format({"C": "celsius", "F": "fahrenheit"}[m[1]])),
    (r"(?<=:\d\d)\s*(?:\\text\s*\{)?\s*([aApP])\.?\s?[mM]\b\.?\s*\}?", lambda m: rf"\{m[1].upper()}M "),
    (r"^(\d{1,2})\s*(?:\\text\s*\{)?\s*([aApP])\.?\s?[mM]\b\.?\s*\}?$", lambda m: rf"{m[1]}:00\{m[2].upper()}M "),
)  # fmt: skip

_WORDS = _rules(  # for texts with a letter outside commands
    (r"(?:\\text\s*\{\s*)?\b(?:negative|minus)\b\s*\}?\s*(?=\d|\\frac|\\sqrt)", "-"),
    (r"(?i)^(?:\\text\s*\{\s*)?(?:the |my |so,? |thus,? )*(?:final |correct )*answer(?: is|\s*[:=])\s*:?\s*\}?\s*", ""),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))", r"\\times "),
    (r"(?<=[\d)])\s+[xX]\s+(?=\d)", r" \\times "),
    (r"(?<=[\])}])\s*U\s*(?=[\[(\\{])", r"\\cup "),
    (r"(?<=[\d)])(and|or)(?=[A-Z(])", r" \1 "),
    (r"(?<![a-zA-Z\\])(sqrt|cbrt|floor|ceil|abs|arc\s?(?:sin|cos|tan))(?=\s*[({\d])", lambda m: "\\" + m[1].replace(" ", "")),
    (r"(?<![a-zA-Z\\{_])log_?(\d+)\s*(?=\()", r"\\log_{\1}"),
    (r"(?<![a-zA-Z\\])(?:C|nCr|binom)\s*\(\s*(\w+)\s*,\s*(\w+)\s*\)", r"\\binom{\1}{\2}"),
    *(_chosen(letter, command) for letter, command in (("C", "binom"), ("P", "perm"))),
    (r"^([\s(]*)([0-9A-Za-z]+)([\s)]*)(?:\\text\s*\{)?\s*\(?\s*(?:in )?base[\s-]+(\w+)\s*\)?\s*\}?$", r"\1\2\3_{\4}"),
    (r"_\s*\{?\s*\(?\s*(?:\\text\s*\{)?\s*base\s*\}?\s*(\w+)\s*\)?\s*\}{1,2}", r"_{\1}"),
    (r"\\text\s*\{\s*([0-9A-F]+)\s*\}\s*(?=_\s*\{?(?:\d|\\text))", r"\1"),
    (r"(?<=hours)(\}?)\s*,?\s*and\s+(?=\d)|(?<=hour)(\}?)\s*,?\s*and\s+(?=\d)", lambda m: (m[1] or m[2] or "") + " "),
    (r"(?<=\d)\s*(?:h|hrs?)\s*(\d+)\s*(?:m|mins?)(?![a-zA-Z])", r" \\text{hours} \1 \\text{minutes}"),
    *((rf"(?<=\d)\s*(\\text\s*\{{\s*)?{word}(?![a-zA-Z])", rf" \\cdot {value} \1") for word, value in _SCALES.items()),
    (r"(?<=\d)\s*(?:\\text\s*\{)?\s*\bto\b\s*\}?\s*(?=\d+$)", ":"),
    (r"^(?:\\text\s*\{\s*|\\mathbb\{R\},?\s*)?(?:all )?(?:real (?:numbers?|values?)|reals)?(?: of)?\s*x?\s*(?:except|other than|but not)(?: for| when)?\s*\}?\s*(?:x\s*=)?([^=<>]+)$", r"\\mathbb{R} \\setminus \\{\1\\}"),
    (r"(?<=\d) repeating$", "..."),
    (
        r"(?<![\w\\{])([0-9A-Fa-f]*[A-Fa-f][0-9A-Fa-f]*)_\s*\{?\s*(?:\\text\s*\{)?\s*(1[1-6]|eleven|twelve|sixteen)\s*\}{0,2}$",
        lambda m: rf"\based{{{m[1]}}}{{{ {'eleven': 11, 'twelve': 12, 'sixteen': 16}.get(m[2], m[2]) }}}",
    ),
)  # fmt: skip

_ANGLE = re.compile(
    r"(\d{1,9})\s*degrees\s*(\d{1,9})\s*(?:'(?!')|\\prime|\\text\{\s*minutes\s*\}|\^\{?\\prime\}?)\s*(?:(\d{1,9})\s*(?:''|\"))?"
)
_FEET = re.compile(r"^(\d+)\s*'\s*(\d+)\s*(?:''|\")$")
_OUTWARD = re.compile(r"([\[\]])(\s*[^\[\](),;\s][^\[\](),;]*[,;]\s*[^\[\](),;\s][^\[\](),;]*)([\[\]])")
_ESCAPED_TWICE = re.compile(r"\\\\(?:begin|d?frac|sqrt|text|pi|left|boxed|pm|cdot|times|le)")


def fold_unicode(text: str) -> str:
    """Signs, digits, fractions, sub- and superscripts of unicode as ASCII and LaTeX."""
    if text.isascii():
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣʸᵏⁱ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPT) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉₊₋ₙₖₓᵢ]+", lambda m: "_{" + m[0].translate(_SUBSCRIPT) + "}", text)
    text = re.sub("((?:[0-9]\u0305)+)", lambda m: rf"\overline{{{m[1].replace(chr(0x305), '')}}}", text)
    text = re.sub("([0-9])\u0307", r"\\dot{\1}", text)
    text = re.sub(r"\^\{3\}√", r"\\sqrt[3] ", re.sub(r"\^\{4\}√", r"\\sqrt[4] ", text))
    return "".join(_fold(c) for c in text)


def _fold(char: str) -> str:
    if char.isascii():
        return char
    if char in _UNICODE:
        return _UNICODE[char]
    plain = unicodedata.normalize("NFKC", char)
    if "⁄" in plain:  # vulgar fractions: ½ is 1⁄2
        top, bottom = plain.split("⁄")
        return rf"\frac{{{top}}}{{{bottom}}}"
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    return _UNICODE.get(plain, plain)


def clean(text: str) -> str:
    r"""Decoration off: ``$\left( \tfrac12,\!000 \right)$.`` becomes ``( \frac12,000 )``."""
    text = " ".join(fold_unicode(text).split())
    if text.startswith("$") and text.endswith("$") and not text.endswith(r"\$"):
        text = text.strip("$ ")
    if "\\\\" in text and _ESCAPED_TWICE.search(text) and not re.search(r"(?<!\\)\\begin", text):
        text = text.replace("\\\\", "\\")  # escaped twice on its way here
    text = _apply(_COMMAS, text)
    if "\\" in text:
        text = " ".join(_apply(_LATEX, text).split())
    text = " ".join(_apply(_SIGNS, text).split())
    text = text if text.endswith("..") else text.rstrip(".,;")
    if re.search(r"(?<!\\)(?<![a-zA-Z])[a-zA-Z]", text):
        text = _apply(_WORDS, text)
    if "degrees" in text:
        text = _ANGLE.sub(
            lambda m: rf"\frac{{{int(m[1]) * 3600 + int(m[2]) * 60 + int(m[3] or 0)}}}{{3600}} degrees ", text
        )
    if text.startswith("<") and text.endswith(">") and "," in text:
        text = rf"\langle {text[1:-1]} \rangle"
    text = _FEET.sub(r"\1 \\text{feet} \2 \\text{inches}", text)
    if text.count("[") != text.count("]") or text.lstrip().startswith("]"):
        text = _OUTWARD.sub(lambda m: "[("[m[1] == "]"] + m[2] + "])"[m[3] == "["], text)
    text = text.replace("**", "") if text.count("**") == 2 and text.strip().startswith("**") else text
    text = re.sub(r"(?<![\w}^_])\{\s*\}(?=.)", " ", text).strip()  # an empty group is nothing
    if text.endswith("..."):
        return text
    return text.rstrip(".,;:!" if re.search(r"(?<!\\)\b[a-zA-Z]{3,}!$", text) else ".,;:").strip()


def _apply(rules: list[Rule], text: str) -> str:
    for pattern, new in rules:
        text = pattern.sub(new, text)
    return text
