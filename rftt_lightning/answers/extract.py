r"""The final answer of a response: ``<output>``, then ``\boxed``, ``#### 18``, "the answer is …", the last formula or number."""

from __future__ import annotations

import re

from rftt_lightning.answers.words import CHANGES_MEANING

TAIL = 200_000
"""Characters at the end of a response that are searched."""

_SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|<eos>|<pad>")
_END = re.compile(r"<\|im_start\|>\s*user|<\|(?:im_end|endoftext|eot_id|end_of_text|end)\|>|</s>|<eos>|<pad>")
_ASSISTANT = re.compile(
    r"<\|im_start\|>\s*assistant|<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>|<\|assistant\|>"
)
_OUTPUT = re.compile(r"<output>(.*?)(?:</output>|$)", re.DOTALL)
_BOX = re.compile(r"\\{1,2}(?:boxed|fbox)(?![a-zA-Z])")
_HASH = re.compile(r"####[ \t]*([^\n]*)")
_MARK = re.compile(
    r"(?:final\s+)?answer(?:\s*(?:is|are|equals|=)\b\s*:?|\s*:|\*\*\s*:?|\s*:\*\*)|(?:final answer|answer)\s*(?:\*\*)?\s*\n",
    re.IGNORECASE,
)
_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$([^$]+?)(?<!\\)\$", re.DOTALL)
_NUMBER = re.compile(r"[-−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:[.,]\d+)?(?:\s*/\s*\d+)?\s*%?|[-−]?\.\d+")
_LISTED = re.compile(r"-?[\d./]+(?:\s*(?:,\s*(?:and|or)\b|,|and\b|or\b)\s*-?\d[\d./]*)+")
_ABOUT = re.compile(
    r"(?:,\s*(?:\(|which is |that is,? |or )*|\s+(?:\(|which is |that is |or )+)(?:about|approximately|approx\.?|roughly|\\approx|≈)"
    r"\s*\$?-?\d[\d.,]*\$?(?: \w+)?\)?\.?$"
)
_WORD = re.compile(r"[a-zA-Z]+")
_PROSE = re.compile(r"\s*(?:so|thus|hence|therefore|then|we|it|this|that|the|i(?=\s+[a-z]{2}))\b", re.IGNORECASE)
_LABEL = re.compile(r"(?<![a-zA-Z\\])([a-zA-Z](?:_\{?\w\}?)?)\s*=\s*$")
_ASIDE = re.compile(r"\s*\([^()]*[a-zA-Z]{3,}[^()]*\)(?=\W*$)")
_HEDGE = re.compile(r"\b(?:(?:could|might|may)(?: also| well)? be|maybe|perhaps|possibly|either)\b", re.IGNORECASE)
_BETWEEN = re.compile(
    r"\b[a-zA-Z](?:_\{?\w+\}?)?(?:\([a-zA-Z]\))?\s*=|\\(?:quad|qquad|text|[\[\]();,! ])|[$\s{}~+.:*\\\[\]]"
)


def states_answer(text: str) -> bool:
    r"""Is something said to be the answer: in a box, after ``####`` or "the answer is"? Else the last formula is a guess at one."""
    return any(mark.search(text) for mark in (_BOX, _HASH, _MARK))


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""The last complete ``\boxed`` groups, as (start, end, content), at most eight. An unclosed one is none."""
    found = []
    for match in [*_BOX.finditer(text)][-8:]:
        span = _group(text, match.end())
        if span:
            found.append((match.start(), span[1], text[span[0] : span[1] - (text[span[1] - 1] == "}")].strip()))
    outer = [box for box in found if not any(o[0] < box[0] and box[1] <= o[1] for o in found)]
    return outer


def _group(text: str, at: int) -> tuple[int, int] | None:
    r"""Where the group after position ``at`` begins and ends (its brace included); ``\boxed 14`` has no braces."""
    while at < len(text) and text[at] in " \t\n":
        at += 1
    if at < len(text) and text[at] != "{":
        match = re.compile(r"[-\w.]+").match(text, at)
        return (at, match.end()) if match else None
    depth = 0
    for brace in re.compile(r"\\[{}\\]|[{}]").finditer(text, at):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return at + 1, brace.end()
    return None


def _boxed(text: str) -> str | None:
    r"""The last box, joined with those before it that the text links by "and", "or" or a comma."""
    found = boxes(text)
    if not found:
        return None
    joint = [found[-1]]
    for box in reversed(found[:-1]):
        if not _linked(text[box[1] : joint[0][0]]):
            break
        joint.insert(0, box)
    labels = [_LABEL.search(text, max(0, start - 40), start) for start, _, _ in joint]
    names = [label[1] if label else "" for label in labels]
    if all(names) and len({*names}) == len(names) > 1:  # x = 1 and y = 2 say which is which
        return " ; ".join(f"{name} = {content}" for name, (_, _, content) in zip(names, joint, strict=True))
    return " ; ".join(dict.fromkeys(content for _, _, content in joint))


def _linked(between: str) -> bool:
    if len(between) > 200:
        return False
    plain = _BETWEEN.sub(" ", between)
    links = re.findall(r"[,;]\s*(?:and|or)\b|[,;]|\b(?:and|or)\b", plain)
    labels = re.sub(r"[,;]|\b(?:and|or)\b", " ", plain).split()
    return len(links) <= 1 and len(labels) <= (4 if links else 0) and not re.search(r"[a-z]{2}\.\s", between)


def extract(response: str | None) -> str | None:
    """The final answer stated in a whole response, as written; None if there is none.

    The content of the last ``<output>`` is read when there is one. Time is linear in the length of the response.
    """
    if not response:
        return None
    if len(response) > TAIL:  # from a word's beginning
        response = response[-TAIL:].partition(" ")[2]
    text = _SPECIAL.sub(" ", _turn(response)).strip()
    if "<output>" in text:
        text = _OUTPUT.findall(text[text.rindex("<output>") :])[-1]
    text = re.sub(r"</?(?:[a-z_]{3,20})>", "\n", text) if "<" in text else text
    last = re.compile(r".*final answer(?: is|:)", re.IGNORECASE | re.DOTALL).match(
        text, len(text) - min(len(text), 300)
    )
    boxed = boxes(text)
    if last and not _BOX.search(text, last.end()) and boxed and last.end() >= boxed[-1][1]:
        return _after_mark(text)  # a final answer stated after every box
    for read in (_boxed, _after_hashes, _after_mark):
        answer = read(text)
        if answer is not None:
            return answer.strip() or None
        if read is _boxed and _BOX.search(text):
            return None  # a box was opened and never closed: truncated
    return _last_statement(text)


def _turn(text: str) -> str:
    """The last turn of the assistant, up to the token that ends it."""
    begin = max((m.end() for m in _ASSISTANT.finditer(text)), default=0)
    parts = [part for part in _END.split(text[begin:]) if part.strip()]
    return parts[0] if parts else ""


def _after_hashes(text: str) -> str | None:
    found = _HASH.findall(text)
    return found[-1] if found else None


def _after_mark(text: str) -> str | None:
    marks = list(_MARK.finditer(text[-4000:]))
    if not marks:
        return None
    rest = re.sub(r'^(?:\\"|["*\s])+', "", text[-4000:][marks[-1].end() :]).strip()
    return _stated(rest) if rest else None


def _stated(rest: str) -> str:
    """What a statement says: a formula at its head, the words up to its end, else the last formula or number in it."""
    formula = _MATH.match(rest)
    if formula:
        follow = re.match(r"\s*(?:,|and|or)*\s*", rest[formula.end() :])
        more = _MATH.match(rest, formula.end() + (follow.end() if follow else 0))
        return rest[: more.end()] if more else next(filter(None, formula.groups()))
    sentence = re.split(r"\n|(?<=[^\s.])[.!](?:\s|$)|,? (?:not|since|because|as|which)\b", rest, maxsplit=1)[0].strip(
        " *"
    )
    listed = _LISTED.match(sentence)
    if listed:
        return listed[0]
    if len(sentence.split()) <= 4 and not _MATH.search(sentence):
        return sentence
    return _last_statement(sentence) or sentence


def _last_statement(text: str) -> str | None:
    """Bare answers come back whole; of prose the last formula, else the last number, of its last line that has one."""
    text = _ABOUT.sub("", text[-4000:].strip())
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        return None
    if not _is_prose(text):
        return text
    if _MATH.search(text) and not re.search(r"\d", _MATH.sub("", lines[-1])):
        return _last_formulas(text)
    if not re.search(r"[.!?:;)\]}$*\d]\W*$", lines[-1]):  # it broke off: only its last sentence may state something
        lines = [re.split(r"(?<=[^\d\W]|\d)\.\s", lines[-1])[-1]]
    for line in reversed(lines):
        line = _ASIDE.sub("", line)  # 7 (3 cats and 4 dogs)
        formulas = [*_MATH.finditer(line)]
        numbers = [m for m in _NUMBER.finditer(line) if not (m.start() and (line[m.start() - 1].isalnum()))]
        if _HEDGE.search(line) and len({m[0] for m in (*numbers, *formulas)}) > 1:
            return None
        if formulas and (not numbers or formulas[-1].end() >= numbers[-1].end()):
            return _last_formulas(line)
        if numbers:
            return _trailing_formula(line) or last_number(line)
    return lines[-1] if len(lines[-1].split()) <= 4 else None


def _last_formulas(text: str) -> str:
    """The last formula, with those before it that "and", "or" or a comma links to it."""
    found = [*_MATH.finditer(text)]
    joint = [found[-1]]
    for before in reversed(found[:-1]):
        if not re.fullmatch(r"\s*(?:,|,?\s*and|,?\s*or)\s*", text[before.end() : joint[0].start()]):
            break
        joint.insert(0, before)
    return " , ".join(next(filter(None, match.groups())).strip() for match in joint)


def _trailing_formula(line: str) -> str | None:
    """What stands behind the last word of a line, if it is more than a number: (3, 5), x < 5, 6 * 7 = 42; None else."""
    tokens = line.rstrip(" .!?*").split()
    count = next((k for k, token in enumerate(reversed(tokens)) if _word_in(token)), len(tokens))
    run = tokens[len(tokens) - count :]
    while run and re.fullmatch(r"[a-zA-Z]|\W", run[0]) and not (len(run) > 1 and re.match(r"[=<>≤≥(^]", run[1])):
        run = run[1:]  # the article a, a dash
    formula = " ".join(run)
    before = " ".join(_WORD.findall(line[: line.rindex(run[0])])[-2:]) if run else ""
    if not re.search(r"\d", formula) or CHANGES_MEANING.search(before):
        return None
    return formula if len(run) > 1 or re.search(r"[=<>≤≥√^*×(+]", formula) else None


def _word_in(token: str) -> bool:
    return any(len(word) > 1 and word not in _FUNCTIONS for word in re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]+", token))


_FUNCTIONS = frozenset("sqrt pi sin cos tan log ln mod cis inf".split())


def last_number(text: str) -> str | None:
    """The last number of a text, as written (minus 3 as -3); None if words or signs beside it bear on its value (at least, not)."""
    text = text[-4000:]
    found = [*_NUMBER.finditer(text)]
    if not found:
        return None
    number, before, after = found[-1][0].strip(), text[: found[-1].start()], text[found[-1].end() :]
    words = _WORD.findall(before)[-2:]
    if words and words[-1].lower() in ("minus", "negative") and number[0].isdigit():
        number, words = "-" + number, []
    beside = CHANGES_MEANING.search(" ".join([*words, "|", *_WORD.findall(after)[:3]]))
    return None if beside or re.search(r"[√×^<>≤≥*/_]\s*$", before) or re.match(r"\s*[√×^*/_']", after) else number


def _is_prose(text: str) -> bool:
    """Three or more ordinary words outside formulas and text groups."""
    if len(text) > 3000 or _PROSE.match(text):
        return True
    plain = re.sub(r"\\(?:text|mbox|textbf|mathrm|textrm)\s*\{[^{}]*\}|\\[a-zA-Z]+", " ", text)
    if re.search(r"\b(?:is|are|equals|be|was|were|get|gives?)\b", plain):
        return True
    words = re.findall(r"[^\W\d_]{2,}", plain)
    outside = re.findall(r"[^\W\d_]{2,}", _MATH.sub(" ", plain))
    return len(words) >= 4 and len(outside) >= 3 or bool(len(outside) >= 1 and _MATH.search(text))
