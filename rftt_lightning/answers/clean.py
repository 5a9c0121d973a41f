"""Raw answer text to plain LaTeX: unicode folded, decoration dropped. Nothing is evaluated here."""

from __future__ import annotations

import re
import unicodedata

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/", "∕": "/",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt ", "∛": r"\sqrt[3] ",
    "°": r"^\circ ", "º": r"^\circ ", "…": "...", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "θ": r"\theta ",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega ", "⌊": r"\lfloor ",
    "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "′": "'", "≡": r"\equiv ", "\u200b": "", "\ufeff": "", "∖": r"\setminus ",
}  # fmt: skip
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPT = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

_DROPPED = re.compile(
    r"\\(?:left\.|right\.|left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|boldsymbol|bm|mathbf|textcolor\{\w+\}|color\{\w+\}|unit)(?![a-zA-Z])"
)
_SPACING = re.compile(
    r"(?<!\\)\\(?:[,;:> ]|quad(?=[^a-zA-Z]|$|[a-zA-Z])|qquad|hspace\{[^{}]*\}|phantom\{[^{}]*\}|par\b)|~|(?<!\\)\\(?=$|\s)"
)
_ASIDE = re.compile(r"[,.]?\s*\\text\{\s*\(?(?:since|as|because|which|so that|by)\b.*$", re.DOTALL)
_ENVELOPE = re.compile(
    r"\\begin\{(?:align|equation|gather)\*?\}|\\end\{(?:align|equation|gather)\*?\}|\\tag\{[^{}]*\}|\\[\[\]()]|\$"
)
_ORDINAL = re.compile(r"(?<=\d)\s*(?:\^\{?)?(?:\\(?:text|mathrm|textrm)\{)?(?:st|nd|rd|th)(?![a-zA-Z])\}{0,2}")

_HALF_DAY = re.compile(r"(?<=:\d\d)\s*(?:\\text\s*\{)?\s*([ap])\.?\s?m\b\.?\s*\}?", re.IGNORECASE)
_LETTERS = re.compile(r"\\text\s*\{((?:\s*[A-J]\s*(?:,\s*and\b|,|\band\b)?)+)\}")


def fold_unicode(text: str) -> str:
    """Signs, digits, fractions, sub- and superscripts of unicode as ASCII and LaTeX."""
    if text.isascii():
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPT) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SUBSCRIPT) + "}", text)
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
    if re.search(r"\\\\(?:begin|d?frac|sqrt|text|pi|left|boxed|pm|cdot|times|le)", text) and not re.search(
        r"(?<!\\)\\begin", text
    ):
        text = text.replace("\\\\", "\\")  # escaped twice on its way here
    text = re.sub(r"\{\s*,\s*\}|,\s*\\!\s*|\\!,", ",", text).replace(r"\!", "")
    text = re.sub(
        r"\\\$\s*((?:\d|[.,](?=\d))+)(?!\s*(?:\\text\s*\{)?\s*(?:\\[a-z]?frac|dollar|cent|[.\d]))", r"\1 dollars ", text
    )
    text = text.replace(r"\$", " ").replace("€", " ").replace("£", " ").replace(r"\#", " ")
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(
        r"\\(?:mbox|textnormal|textrm|textbf|textit|textsf|operatorname\*?|mathit|mathsf)(?=\s*\{)", r"\\text", text
    )
    text = re.sub(r"\\mathrm\s*\{([^{}]*)\}", _upright, text)
    text = re.sub(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\(?:degree|circ)(?![a-zA-Z])", " degrees ", text)
    text = re.sub(r"\\math(?:bf|cal|frak)\s*\{([^{}]*)\}", r"{\1}", text)
    text = _ENVELOPE.sub(" ", _ASIDE.sub("", _DROPPED.sub(" ", text)) if "\\" in text else text)
    text = _ORDINAL.sub("", _SPACING.sub(" ", text))
    text = _HALF_DAY.sub(lambda m: rf"\{m[1].upper()}M ", text)
    text = _LETTERS.sub(r"\1", re.sub(r"\\text\s*\{\s*(?:plus )?infinity\s*\}", r"\\infty ", text))
    text = re.sub(r"\\text\s*\{\s*(?:all )?real(?: number)?s\s*\}", r"\\mathbb{R}", text)
    text = re.sub(r"(?<=[\d)])(and|or)(?=[A-Z(])", r" \1 ", text)
    text = text.replace("**", "") if text.count("**") == 2 and text.strip().startswith("**") else text
    text = re.sub(r"(?<![\w}^_])\{\s*\}(?=.)", " ", text).strip()  # an empty group is nothing
    if text.endswith("..."):
        return text
    return text.rstrip(".,;:!" if re.search(r"[a-zA-Z]!$", text) and " " in text else ".,;:").strip()


def _upright(match: re.Match[str]) -> str:
    """Upright letters are a symbol if single (e, d, i), else a word or a unit."""
    return match[1] if len(match[1].strip()) == 1 else rf"\text{{{match[1]}}}"
