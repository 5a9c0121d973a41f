"""Functional tokens and their grammar, read from one YAML that a user can replace (arXiv 2502.13389, section 3.1)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from rftt_lightning.core.contracts import QUESTION, Step, UserError

DEFAULT_TABLE = Path(__file__).with_name("tokens.yaml")


@dataclass(frozen=True)
class FunctionalToken:
    """``FunctionalToken("verify", "verify and check the steps so far", "#e15759")``, whose tags are rows of the vocabulary."""

    name: str
    description: str
    color: str = "#777777"

    @property
    def open(self) -> str:
        return f"<{self.name}>"

    @property
    def close(self) -> str:
        return f"</{self.name}>"


@dataclass(frozen=True)
class TextToken(FunctionalToken):
    """A functional token whose opening and closing tag are ordinary text, written as ``text`` says."""

    text: Sequence[str] = ()


@dataclass(frozen=True)
class TokenTable:
    """The tokens in order, and who may follow whom; :data:`QUESTION` is the state before the first segment.

    ``grammar`` binds a policy that chooses its own functional tokens, ``prompted`` prompt-guided search. Tags are rows of the
    vocabulary; if all tokens have a ``text``, they are written as ordinary text instead (the control arm: sampled freely, read
    afterwards).
    """

    tokens: tuple[FunctionalToken, ...]
    grammar: Mapping[str, tuple[str, ...]]
    prompted: Mapping[str, tuple[str, ...]]

    @classmethod
    def from_yaml(cls, path: str | Path | None = None) -> TokenTable:
        """Read a table; None is the paper's. Raises :class:`UserError` naming the file and the entry that is wrong."""
        path = Path(path or DEFAULT_TABLE)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            tokens = tuple((TextToken if "text" in entry else FunctionalToken)(**entry) for entry in data["tokens"])
            tables = [{k: tuple(v or ()) for k, v in data[part].items()} for part in ("grammar", "prompted")]
            table = cls(tokens, *tables)
            table._check(path)  # within: what is no word or no list at all shows here as a TypeError
        except OSError as error:
            raise UserError(f"cannot read the functional-token table {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path} is no functional-token table (needs tokens, grammar, prompted): {reason}"
            ) from error
        return table

    def _check(self, path: Path) -> None:
        names = [token.name for token in self.tokens]
        if (
            len(set(names)) != len(names)
            or not all(re.fullmatch(r"[a-z][a-z0-9_]*", n) for n in names)
            or QUESTION in names
        ):
            raise UserError(
                f"{path}: token names must be distinct lower-case words, none of them {QUESTION!r}; got {names}"
            )
        pairs = [
            isinstance(t, list) and len(t) == 2 and all(isinstance(s, str) and s for s in t)
            for t in self.texts.values()
        ]
        if self.as_text and not (all(pairs) and len(pairs) == len(names)):
            raise UserError(
                f'{path}: text must be how the opening and the closing tag are written, ["<verify>", "</verify>"] say, of each '
                "token or of none"
            )
        for part, table in (("grammar", self.grammar), ("prompted", self.prompted)):
            if not table.get(QUESTION):
                raise UserError(
                    f"{path}: {part} has no row {QUESTION!r} with followers, so no path could begin; add one"
                )
            followers = {follower for row in table.values() for follower in row}
            for name in ({*table} - {QUESTION} | followers) - {*names}:
                raise UserError(f"{path}: {part} names {name!r}, which is not among the tokens {names}")
            for name in followers - {*table}:
                raise UserError(f"{path}: {part} has no row {name!r}; add one, empty ([]) if {name!r} is terminal")
            for name, row in table.items():
                if len(set(row)) != len(row):
                    raise UserError(f"{path}: {part} names a follower of {name!r} twice; name each once")
            if lost := _endless(table):
                raise UserError(
                    f"{path}: {part} has no way from {lost!r} to a terminal token (a row without followers); add one"
                )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(token.name for token in self.tokens)

    @property
    def texts(self) -> dict[str, Sequence[str]]:
        """How the two tags of each token are written, if they are ordinary text."""
        return {token.name: token.text for token in self.tokens if isinstance(token, TextToken)}

    @property
    def as_text(self) -> bool:
        """Are tags ordinary text, not rows of the vocabulary?"""
        return any(isinstance(token, TextToken) for token in self.tokens)

    @property
    def tags(self) -> tuple[str, ...]:
        """All opening tags and then all closing tags, in the order of the tokens."""
        return tuple(t.open for t in self.tokens) + tuple(t.close for t in self.tokens)

    def __getitem__(self, name: str) -> FunctionalToken:
        for token in self.tokens:
            if token.name == name:
                return token
        raise KeyError(name)

    def legal(self, after: str) -> tuple[str, ...]:
        """Tags that may follow ``after`` when the policy chooses; empty after a terminal one."""
        return self.grammar.get(after, ())

    def terminal(self, name: str) -> bool:
        return not self.legal(name)

    def is_legal(self, tags: Iterable[str]) -> bool:
        """Does this sequence of tags, begun at the question, obey the grammar?"""
        after = QUESTION
        for tag in tags:
            if tag not in self.legal(after):
                return False
            after = tag
        return True

    def without(self, *names: str) -> TokenTable:
        """The same vocabulary with these tags never legal (masking verify and refine at inference, say)."""
        for name in set(names) - set(self.names):
            raise UserError(f"cannot mask {name!r}, which is not among the tokens {', '.join(self.names)}")
        grammar = {k: tuple(v for v in row if v not in names) for k, row in self.grammar.items()}
        for after, row in grammar.items():
            if self.grammar[after] and not row:
                raise UserError(
                    f"masking {', '.join(names)} leaves nothing that may follow {after!r}; mask fewer tokens"
                )
        if lost := _endless(grammar):
            raise UserError(
                f"masking {', '.join(names)} leaves no way from {lost!r} to a terminal token; mask fewer tokens"
            )
        return replace(self, grammar=grammar)

    def render(self, steps: Sequence[Step]) -> str:
        """Steps as text with tags: ``<clarify>…</clarify><output>…</output>``; :meth:`parse` reads it back. A step that is
        no functional token's (a chain of thought) is rendered as its plain text."""
        return "".join(f"<{tag}>{text}</{tag}>" if tag in self.names else text for tag, text in steps)

    def parse(self, text: str) -> list[Step]:
        """Read rendered text back, ignoring space between segments. Raises ValueError on anything else between, unclosed
        or nested tags; does not ask whether the order is legal."""
        steps, position = [], 0
        names = "|".join(self.names)
        tag = re.compile(rf"</?({names})>")
        while text[position:].strip():
            opening = re.compile(rf"\s*<({names})>").match(text, position)
            if not opening:
                raise ValueError(f"expected an opening tag at {position}: {text[position : position + 30]!r}")
            closing = tag.search(text, opening.end())
            if not closing or closing.group() != f"</{opening[1]}>":
                raise ValueError(f"<{opening[1]}> at {position} is not closed by </{opening[1]}>")
            steps.append(Step(opening[1], text[opening.end() : closing.start()]))
            position = closing.end()
        return steps


def _endless(table: Mapping[str, Sequence[str]]) -> str | None:
    """A state that a path from the question can reach and from which it could never end; None if there is none."""
    reached = {QUESTION}
    for _ in table:
        reached |= {follower for name in reached for follower in table.get(name, ())}
    ending = {name for name in reached if not table.get(name)}
    for _ in reached:
        ending |= {name for name in reached if ending & set(table.get(name, ()))}
    return min(reached - ending, default=None)
