r"""Where problems come from: JSONL files and hub data sets with their own gold-answer parsers; slices; the overlap check."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from rftt_lightning.answers import verify, verify_many
from rftt_lightning.answers.extract import boxes, states_answer
from rftt_lightning.core.contracts import Problem, ProblemSource, Step, UserError, Verdict

Row = Mapping[str, Any]


class MathProblems(ProblemSource):
    """Problems whose answers :mod:`rftt_lightning.answers` judges. A subclass gives :meth:`rows` and :meth:`read`.

    Repeated questions are dropped (the first stays), then the rest is shuffled if ``shuffle_seed`` is given, then
    ``start`` and ``limit`` cut a slice: with one seed, slices that do not overlap hold different questions.
    """

    name = "problems"

    def __init__(self, start: int = 0, limit: int | None = None, shuffle_seed: int | None = None) -> None:
        if start < 0 or (limit is not None and limit < 1):
            raise UserError(f"start is {start} and limit {limit}; use start >= 0 and limit >= 1 (or null for all)")
        self.start, self.limit, self.shuffle_seed = start, limit, shuffle_seed

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Raw records, each with the place that an error message names."""
        raise NotImplementedError

    def read(self, row: Row, number: int) -> Problem:
        """One record as a problem; a missing field raises KeyError, a value without a gold answer ValueError."""
        raise NotImplementedError

    def problems(self) -> Sequence[Problem]:
        return self._problems

    @cached_property
    def _problems(self) -> list[Problem]:
        read = [self._read(place, row, number) for number, (place, row) in enumerate(self.rows())]
        found = deduplicate(read)
        if repeated := len(read) - len(found):
            warnings.warn(
                f"{self.name}: {repeated} of {len(read)} problems repeat a question and are left out", stacklevel=2
            )
        if self.shuffle_seed is not None:
            random.Random(self.shuffle_seed).shuffle(found)
        chosen = found[self.start :][: self.limit]
        if not chosen:
            raise UserError(
                f"{self.name}: no problem left of {len(found)} from start {self.start}; check the file and start"
            )
        return chosen

    def _read(self, place: str, row: Row, number: int) -> Problem:
        try:
            problem = self.read(row, number)
        except KeyError as error:
            raise UserError(
                f"{place}: no field {error}, only {', '.join(map(str, row))}; name the right field"
            ) from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{place}: {error}") from error
        if not problem.question.strip():
            raise UserError(f"{place}: the question is empty; remove or mend this record")
        return problem

    def judge(self, problem: Problem, response: str) -> Verdict:
        return verify(problem.answer, response)

    def judge_many(self, items: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        return verify_many([(problem.answer, response) for problem, response in items])

    def attempted(self, problem: Problem, steps: Sequence[Step]) -> bool:
        return super().attempted(problem, steps) or (bool(steps) and states_answer(steps[-1].text))

    def same(self, answers: Sequence[str]) -> dict[str, str]:
        """Each later answer is judged as if an earlier one were the gold one."""
        texts = list(dict.fromkeys(answers))
        pairs = list(combinations(texts, 2))
        verdicts = verify_many(pairs, kind="answer")
        found = {text: text for text in texts}
        for (earlier, later), verdict in zip(pairs, verdicts, strict=True):
            if verdict.right and found[later] == later:
                found[later] = found[earlier]
        return found


class JsonlProblems(MathProblems):
    """One JSON object a line. Fields are named by the knobs; ``id`` may be absent (then the line's number serves).

    ``gold`` says how the gold answer is written: "plain", "hash" (``… #### 18``) or "boxed" (the last box of a solution).
    ``path`` may be a hub name (``openai/gsm8k``) if no such file exists and it looks like one; then ``split`` and
    ``subset`` choose the part.
    """

    def __init__(
        self,
        path: str,
        question: str = "question",
        answer: str = "answer",
        id: str = "id",
        level: str = "level",
        subject: str = "subject",
        gold: str = "plain",
        start: int = 0,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        split: str = "test",
        subset: str | None = None,
    ) -> None:
        super().__init__(start, limit, shuffle_seed)
        if gold not in _GOLDS:
            raise UserError(f"gold is {gold!r}; use one of {', '.join(_GOLDS)}")
        self.path, self.split, self.subset, self.gold = str(path), split, subset, gold
        self.fields = {"question": question, "answer": answer, "id": id, "level": level, "subject": subject}
        self.name = Path(self.path).stem if self._is_file() else self.path

    def _is_file(self) -> bool:
        return (
            Path(self.path).exists()
            or not re.fullmatch(r"[\w.-]+/[\w.-]+", self.path)
            or self.path.endswith((".jsonl", ".json"))
        )

    def rows(self) -> Iterator[tuple[str, Row]]:
        return read_jsonl(self.path) if self._is_file() else read_hub(self.path, self.subset, self.split)

    def read(self, row: Row, number: int) -> Problem:
        given = {field: value for field, value in row.items() if value is not None}
        return Problem(
            id=f"{self.name}/{given.get(self.fields['id'], number)}",
            question=text_of(row, self.fields["question"]),
            answer=_GOLDS[self.gold](text_of(row, self.fields["answer"], or_number=True)),
            level=str(given.get(self.fields["level"], "")),
            subject=str(given.get(self.fields["subject"], "")),
        )


class GSM8K(JsonlProblems):
    """GSM8K (arXiv 2110.14168): ``question``, ``answer`` = solution ``#### 18``. File path or hub name."""

    def __init__(
        self,
        path: str = "openai/gsm8k",
        split: str = "test",
        start: int = 0,
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        super().__init__(
            path, id="idx", gold="hash", start=start, limit=limit, shuffle_seed=shuffle_seed, split=split, subset="main"
        )


class MATH(JsonlProblems):
    """MATH (arXiv 2103.03874) and MATH-500: ``problem``, ``solution`` and, in MATH-500, ``answer``; without it the last box
    of the solution is the gold answer. File path or hub name."""

    def __init__(
        self,
        path: str = "HuggingFaceH4/MATH-500",
        split: str = "test",
        start: int = 0,
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        super().__init__(
            path, question="problem", id="unique_id", start=start, limit=limit, shuffle_seed=shuffle_seed, split=split
        )

    def read(self, row: Row, number: int) -> Problem:
        if "answer" not in row:
            row = {**row, "answer": gold_boxed(text_of(row, "solution"))}
        if "subject" not in row and "type" in row:
            row = {**row, "subject": row["type"]}
        return super().read(row, number)


class OlympiadBench(JsonlProblems):
    """OlympiadBench (arXiv 2402.14008), text-only maths: ``final_answer`` is a list, whose entries may hold several answers
    (``is_multiple_answer``); ``unit`` is appended; ``context`` is put before the question. ``error``, the tolerance that the
    benchmark gives, is kept in ``Problem.data``. File path or hub name."""

    def __init__(
        self,
        path: str = "Hothan/OlympiadBench",
        split: str = "train",
        subset: str | None = "OE_TO_maths_en_COMP",
        start: int = 0,
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        super().__init__(path, start=start, limit=limit, shuffle_seed=shuffle_seed, split=split, subset=subset)

    def read(self, row: Row, number: int) -> Problem:
        answers = row["final_answer"]
        if not isinstance(answers, list) or not answers:
            raise ValueError(f"final_answer is {answers!r}, not a list of answers; mend this record")
        answers = [text_of({"final_answer": answer}, "final_answer", or_number=True) for answer in answers]
        context = str(row["context"]).strip() + "\n\n" if row.get("context") else ""
        return Problem(
            id=f"{self.name}/{number if row.get('id') is None else row['id']}",
            question=context + text_of(row, "question").strip(),
            answer=gold_olympiad(answers, bool(row.get("is_multiple_answer")), str(row.get("unit") or "")),
            subject=str(row.get("subfield") or ""),
            data={"error": row["error"]} if row.get("error") else {},
        )


class Subset(ProblemSource):
    """Some problems of another source, judged by it: ``Subset(source, start=100, limit=50)``."""

    def __init__(self, source: ProblemSource, start: int = 0, limit: int | None = None) -> None:
        self.source, self.start, self.limit = source, start, limit

    def problems(self) -> Sequence[Problem]:
        chosen = self.source.problems()[self.start :][: self.limit]
        if not chosen:
            raise UserError(f"no problem from start {self.start} among {len(self.source.problems())}; lower start")
        return chosen

    def judge(self, problem: Problem, response: str) -> Verdict:
        return self.source.judge(problem, response)

    def judge_many(self, items: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        return self.source.judge_many(items)

    def same(self, answers: Sequence[str]) -> dict[str, str]:
        return self.source.same(answers)

    def output(self, answer: str) -> str:
        return self.source.output(answer)

    def attempted(self, problem: Problem, steps: Sequence[Step]) -> bool:
        return self.source.attempted(problem, steps)

    def check_steps(self, problem: Problem, steps: Sequence[Step]) -> list[float | None]:
        return self.source.check_steps(problem, steps)


# -- fields


def text_of(row: Row, field: str, or_number: bool = False) -> str:
    """The text of a field, or the spelling of a number if that may be one; ValueError for anything else, KeyError for none."""
    value = row[field]
    if isinstance(value, str) or (or_number and isinstance(value, int | float) and not isinstance(value, bool)):
        return str(value)
    asked = "text or a number" if or_number else "text"
    raise ValueError(f"{field} is {json.dumps(value, default=str)[:40]}, not {asked}; mend or remove this record")


def gold_plain(text: str) -> str:
    if not text.strip():
        raise ValueError("the gold answer is empty; remove or mend this record")
    return text.strip()


def gold_hash(text: str) -> str:
    """``… #### 1,200`` is 1200; the separators of GSM8K are no part of the answer."""
    _, mark, answer = text.rpartition("####")
    if not mark or not answer.strip():
        raise ValueError("the answer has no '#### n' at its end; check that this is GSM8K, or set gold: plain")
    return re.sub(r"(?<=\d),(?=\d{3})", "", answer.strip())


def gold_boxed(text: str) -> str:
    r"""The last ``\boxed`` of a solution."""
    found = boxes(text)
    if not found or not found[-1][2]:
        raise ValueError(r"the solution has no complete \boxed answer; name the field that holds the answer")
    return found[-1][2]


def gold_olympiad(answers: Sequence[str], several: bool, unit: str) -> str:
    """Entries joined; commas between several answers get a space, so that 11,190 stays two numbers."""
    plain = [re.sub(r"\$\s*,\s*\$", ", ", str(answer)).replace("$", "").strip().rstrip(".") for answer in answers]
    text = ", ".join(plain)
    if several:
        text = re.sub(r",(?=\S)", ", ", text)
    unit = unit.replace("$", "").strip()
    if not unit or several:
        return text
    return (
        f"{text}\\%"
        if unit in ("%", r"\%")
        else f"{text} {unit}"
        if unit.startswith(("^", "\\"))
        else f"{text} \\text{{{unit}}}"
    )


_GOLDS = {"plain": gold_plain, "hash": gold_hash, "boxed": gold_boxed}


# -- reading


def read_jsonl(path: str | Path) -> Iterator[tuple[str, Row]]:
    """Objects of a JSONL file with "file, line n", or of a JSON array with "file, record n". Blank lines are skipped. Raises
    :class:`UserError` on anything else."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            start = next((c for c in iter(lambda: file.read(1), "") if not c.isspace()), "")
            file.seek(0)
            if start == "[":
                for number, row in enumerate(_parse(file.read(), str(path)), 1):
                    yield _object(row, f"{path}, record {number}")
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield _object(_parse(line, place), place)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot read {path}: {why}; give the path of a JSONL file (no pipe)") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}; give a JSONL file") from error


def _object(row: Any, place: str) -> tuple[str, Row]:
    if not isinstance(row, dict):
        raise UserError(f"{place}: a JSON {type(row).__name__}, not an object {{…}}; mend or remove it")
    return place, row


def _parse(content: str, place: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of over 4,300 digits
        raise UserError(
            f"{place}: not JSON ({error}); mend or remove it (a file holds one object a line, or one array of objects)"
        ) from error


def read_hub(name: str, subset: str | None, split: str) -> Iterator[tuple[str, Row]]:
    """Records of a hub data set, through ``datasets`` (imported here: it is heavy, and only needed for hub names)."""
    from datasets import load_dataset

    try:
        data = load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load {name!r} ({subset}, {split}) from the hub: {reason}; give a local JSONL path"
        ) from error
    for number, row in enumerate(data):
        yield f"{name} ({split}), record {number}", row


# -- duplicates and overlap


def normalise(question: str) -> tuple[str, ...]:
    """Words, numbers and signs in lower case: what is compared. LaTeX commands count as words; the punctuation of sentences,
    dollars, braces and thousands separators as nothing."""
    return tuple(_WORD.findall(_THOUSANDS.sub("", question.lower())))


_WORD = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+|(?<=[\w)])!|[^\w\s!.,;:?\"'`$\\{}~&]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def deduplicate(problems: Iterable[Problem]) -> list[Problem]:
    """The first of each question (normalised); ids made unique by a suffix where a source repeats them."""
    kept: dict[tuple[str, ...] | str, Problem] = {}
    ids: set[str] = set()
    for problem in problems:
        key = normalise(problem.question) or problem.question
        if key in kept:
            continue
        if problem.id in ids:
            problem = Problem(**{**vars(problem), "id": f"{problem.id}#{len(kept)}"})
        ids.add(problem.id)
        kept[key] = problem
    return list(kept.values())


@dataclass(frozen=True)
class Overlap:
    """What training and held-out problems share: ``Overlap(("train/7",), (("train/9", "test/3", 0.8),), 1000, 500)``.

    ``exact``: pairs (train id, held-out id) of the same normalised question. ``near``: triples with the share, in (0, 1], of
    the held-out question's n-grams that the training question has.
    """

    exact: tuple[tuple[str, str], ...]
    near: tuple[tuple[str, str, float], ...]
    train: int
    held_out: int

    def __bool__(self) -> bool:
        return bool(self.exact or self.near)

    def __str__(self) -> str:
        if not self:
            return f"no overlap: {self.train} training and {self.held_out} held-out problems"
        first = self.exact[0] if self.exact else self.near[0]
        return (
            f"{len(self.exact)} identical and {len(self.near)} similar questions among {self.train} training and "
            f"{self.held_out} held-out problems, the first {first[0]} = {first[1]}"
        )


def check_overlap(
    train: Sequence[Problem], held_out: Sequence[Problem], ngram: int = 13, share: float = 0.5
) -> Overlap:
    """Find training questions that are, or largely quote, a held-out one (n-grams as in arXiv 2005.14165, appendix C).

    Near: at least ``share`` of the held-out question's word n-grams occur in ONE training question. Questions shorter than
    ``ngram`` words (countdown, say) can only match exactly. One pass over each side: 12,000 x 2,000 in seconds.
    """
    if ngram < 2 or not 0 < share <= 1:
        raise UserError(f"ngram is {ngram} and share {share}; use ngram >= 2 and 0 < share <= 1")
    questions: dict[tuple[str, ...], str] = {}
    owners: dict[int, list[int]] = {}
    sizes: list[int] = []
    for number, problem in enumerate(held_out):
        tokens = normalise(problem.question)
        questions.setdefault(tokens, problem.id)
        grams = _grams(tokens, ngram)
        sizes.append(len(grams))
        for gram in grams:
            owners.setdefault(gram, []).append(number)
    exact, near = [], []
    for problem in train:
        tokens = normalise(problem.question)
        if tokens in questions:
            exact.append((problem.id, questions[tokens]))
            continue
        shared: dict[int, int] = {}
        for gram in _grams(tokens, ngram):
            for number in owners.get(gram, ()):
                shared[number] = shared.get(number, 0) + 1
        near += [(problem.id, held_out[n].id, c / sizes[n]) for n, c in shared.items() if c >= share * sizes[n]]
    return Overlap(tuple(exact), tuple(near), len(train), len(held_out))


def _grams(tokens: tuple[str, ...], ngram: int) -> set[int]:
    return {hash(tokens[i : i + ngram]) for i in range(len(tokens) - ngram + 1)}


def refuse_overlap(
    train: Sequence[Problem],
    held_out: Sequence[Problem],
    *,
    allow_overlap: bool = False,
    ngram: int = 13,
    share: float = 0.5,
) -> Overlap:
    """:func:`check_overlap`, and a :class:`UserError` if anything is found that was not explicitly allowed."""
    overlap = check_overlap(train, held_out, ngram, share)
    if overlap and not allow_overlap:
        raise UserError(
            f"training and evaluation overlap: {overlap}; take other problems, or set allow_overlap: true if this is meant"
        )
    return overlap
