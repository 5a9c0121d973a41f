"""A backend, a source and a reward without torch, for tests of search: every answer is a function of the request alone.

Words are tokens. An ordinary word's id is a hash of the word, so ids do not depend on who asks first.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rftt_lightning.core.contracts import (
    QUESTION,
    Backend,
    Completion,
    Message,
    Problem,
    ProblemSource,
    Provenance,
    Request,
    Reward,
    Rollout,
    Sampling,
    Score,
    Segment,
    Status,
    Step,
    Unavailable,
    Verdict,
)
from rftt_lightning.core.tokens import TokenTable

EOS = 0
WORDS = ("one", "two", "three", "four", "five", "six", "seven")
"""What contents are made of."""


def uniform(*parts: object) -> float:
    """A number in [0, 1) from any parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") / 2**64


@dataclass
class ScriptedBackend(Backend):
    """A pseudo-policy over words: the probability of a word hangs on the whole context by a hash.

    ``priors`` may fix the probabilities of functional tokens after a tag; ``stop`` is the mean share of positions at which a
    segment, or a turn, ends. ``batches`` keeps the requests that came, a list per call.
    """

    tokens: TokenTable = field(default_factory=TokenTable.from_yaml)
    priors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    stop: float = 0.3
    version: int = 0
    batches: list[list[Request]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tag_ids = {tag: 1 + i for i, tag in enumerate(self.tokens.tags)}
        self.names.update({i: tag for tag, i in self.tag_ids.items()})

    # -- tokenizer -----------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> tuple[int, ...]:
        ids = tuple(1000 + int(uniform(word) * 2**40) for word in text.split())
        self.names.update(zip(ids, text.split(), strict=True))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.names[i] for i in ids)

    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        text = " ".join(f"[{m.role}] {m.content} [end]" for m in messages)
        return self.encode(text + " [assistant]")

    # -- policy --------------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.batches.append(list(requests))
        return [self._free(r) if r.after is None else self._functional(r) for r in requests]

    def weights(self, context: Sequence[int], words: Sequence[str]) -> dict[str, float]:
        raw = {word: math.exp(3 * uniform(tuple(context), word)) for word in words}
        return {word: weight / sum(raw.values()) for word, weight in raw.items()}

    def boundary(self, context: Sequence[int], after: str) -> dict[str, float]:
        """Priors after a closed segment."""
        legal = self.tokens.legal(after)
        return dict(self.priors[after]) if after in self.priors else self.weights(context, legal)

    def _content(self, context: Sequence[int], end: str) -> dict[str, float]:
        """Probabilities of words, and of the word that ends the segment."""
        words = self.weights(context, WORDS)
        return {word: (1 - self.stop) * p for word, p in words.items()} | {end: self.stop}

    def _free(self, request: Request) -> Completion:
        assert request.force is not None and request.max_tokens >= 1
        room = min(request.max_tokens, request.sampling.max_segment_tokens)
        context, logprobs = list(request.prompt), []
        while True:
            spread = _top_p(_heat(self._content(context, ""), request.sampling), request.sampling)
            word = _draw(spread, uniform(request.seed, len(context)))
            closed = word == ""  # no token of the segment: a turn may end when its room is full, too
            if closed or len(logprobs) == room:
                break
            context += self.encode(word)
            logprobs.append(math.log(spread[word]))
        ids = tuple(context[len(request.prompt) :])
        provenance = (int(Provenance.SAMPLED),) * len(ids)
        segment = Segment(
            request.force, ids, tuple(logprobs), provenance, self.decode(ids), closed=closed, version=self.version
        )
        return Completion((segment,), computed=len(context))

    def _functional(self, request: Request) -> Completion:
        assert request.max_tokens >= 1 and request.segments >= 0, request
        if request.force and request.force not in self.tokens.legal(request.after):
            raise ValueError(f"{request.force} may not follow {request.after}")
        context, segments, after = list(request.prompt), [], request.after
        first = priors = self.boundary(context, after)
        while True:
            force = request.force if not segments else None
            room = min(request.max_tokens - (len(context) - len(request.prompt)), request.sampling.max_segment_tokens)
            segment = self._segment(context, request, priors, force, room)
            segments.append(segment)
            after, priors = segment.tag, dict(segment.priors)
            written = len(context) - len(request.prompt)
            enough = len(segments) == request.segments or written >= request.max_tokens
            if not segment.closed or self.tokens.terminal(after) or enough:
                return Completion(tuple(segments), first, computed=len(context))

    def _segment(
        self, context: list[int], request: Request, priors: dict[str, float], force: str | None, room: int
    ) -> Segment:
        """Writes one segment of at most ``room`` tokens at the end of ``context``."""
        sampling, start = request.sampling, len(context)
        favourite = max(priors, key=priors.__getitem__)
        likely = {tag: p for tag, p in priors.items() if p >= sampling.min_prior or tag == favourite}
        if force:
            tag, chosen, logprob = force, request.forced_as, math.log(priors[force])
        elif sampling.boundary == "argmax":
            tag, chosen, logprob = favourite, Provenance.ARGMAX, math.log(priors[favourite])
        else:
            tag, chosen = _draw(likely, uniform(request.seed, start)), Provenance.SAMPLED
            logprob = math.log(likely[tag] / sum(likely.values()))
        open_id, close_id = self.tag_ids[f"<{tag}>"], self.tag_ids[f"</{tag}>"]
        context.append(open_id)
        logprobs = [logprob]
        while len(logprobs) < room and context[-1] != close_id:
            spread = _top_p(_heat(self._content(context, f"</{tag}>"), sampling), sampling)
            word = _draw(spread, uniform(request.seed, len(context)))
            context.append(self.tag_ids[word] if word in self.tag_ids else self.encode(word)[0])
            logprobs.append(math.log(spread[word]))
        ids, closed = tuple(context[start:]), context[-1] == close_id
        text = self.decode(ids[1:-1] if closed else ids[1:])
        after = self.boundary(context, tag) if closed and not self.tokens.terminal(tag) else {}
        provenance = (int(chosen), *(int(Provenance.SAMPLED) for _ in ids[1:]))
        return Segment(tag, ids, tuple(logprobs), provenance, text, closed, after, self.version)


def _heat(spread: Mapping[str, float], sampling: Sampling) -> dict[str, float]:
    if sampling.temperature == 0:
        return {max(spread, key=spread.__getitem__): 1.0}
    raw = {word: p ** (1 / sampling.temperature) for word, p in spread.items()}
    return {word: p / sum(raw.values()) for word, p in raw.items()}


def _top_p(spread: Mapping[str, float], sampling: Sampling) -> dict[str, float]:
    kept: dict[str, float] = {}
    for word in sorted(spread, key=lambda w: -spread[w]):
        if sum(kept.values()) < sampling.top_p:
            kept[word] = spread[word]
    return {word: p / sum(kept.values()) for word, p in kept.items()}


def _draw(spread: Mapping[str, float], where: float) -> str:
    """Inverse of the cumulated distribution; ``spread`` need not sum to 1."""
    total = where * sum(spread.values())
    for word, p in spread.items():
        total -= p
        if total < 0:
            return word
    return word


class ScriptedSource(ProblemSource):
    """``count`` problems. Right is a path whose last step ends in the answer; an empty last step is no answer."""

    def __init__(self, count: int = 5, answer: str = "one") -> None:
        self.list = [Problem(f"scripted/{i}", f"what is number {i} ?", answer) for i in range(count)]

    def problems(self) -> list[Problem]:
        return self.list

    def attempted(self, problem: Problem, steps: Sequence[Step]) -> bool:
        return True

    def judge(self, problem: Problem, response: str) -> Verdict:
        words = response.rpartition("</")[0].rpartition(">")[2].split()
        if not words:
            return Verdict(Status.NO_ANSWER, gold=problem.answer)
        status = Status.RIGHT if words[-1] == problem.answer else Status.WRONG
        return Verdict(status, words[-1], problem.answer, "last word", (problem.answer, words[-1]))


@dataclass
class ScriptedReward(Reward):
    """1 for a complete right path, else 0; ``value`` replaces that by any function. ``batches`` keeps their sizes."""

    table: TokenTable = field(default_factory=TokenTable.from_yaml)
    value: Callable[[Rollout, Verdict], float] = lambda rollout, verdict: float(rollout.complete and verdict.right)
    batches: list[int] = field(default_factory=list)

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        assert rollouts, "an empty batch"
        self.batches.append(len(rollouts))
        verdicts = source.judge_many([(r.problem, self.table.render(r.steps)) for r in rollouts])
        return [self._score(rollout, verdict) for rollout, verdict in zip(rollouts, verdicts, strict=True)]

    def _score(self, rollout: Rollout, verdict: Verdict) -> Score:
        value = self.value(rollout, verdict)
        return Score(
            verdict, value, (*(0.0 for _ in rollout.segments[1:]), value), (*(None for _ in rollout.segments[1:]), 0.5)
        )


class LateReward(Reward):
    """Pays in [0, 1) by a hash of the path, at its end. The verdict of a ``share`` of the paths, and of all to ``problems`` (ids), has
    timed out, that of a share ``wrong`` of the others is wrong; neither pay nor search hangs on that."""

    def __init__(self, share: float = 0.0, problems: Sequence[str] = (), wrong: float = 0.0) -> None:
        self.share, self.problems, self.wrong = share, list(problems), wrong

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        return [self._score(rollout) for rollout in rollouts]

    def _score(self, rollout: Rollout) -> Score:
        path = rollout.problem.id, *(segment.tokens for segment in rollout.segments)
        late = rollout.problem.id in self.problems or uniform("late", path) < self.share
        pay = (*(0.0 for _ in rollout.segments[1:]), uniform("pay", path))
        status = Status.WRONG if uniform("wrong", path) < self.wrong else Status.RIGHT
        return Score(Verdict(Status.TIMED_OUT if late else status), 0.5, pay)


class ComparedReward(LateReward):
    """The pay of :class:`LateReward` less the mean of all that are scored together."""

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        scores = super().score(source, rollouts)
        mean = sum(sum(score.rewards) for score in scores) / len(scores)
        return [replace(score, rewards=(*score.rewards[:-1], score.rewards[-1] - mean)) for score in scores]


class LostReward(ComparedReward):
    """As long as there is a file ``down``, its service does not answer for the problem ``lost`` (an id)."""

    def __init__(self, lost: str, down: str, problems: Sequence[str] = ()) -> None:
        super().__init__(problems=problems)
        self.lost, self.down = lost, Path(down)

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        if self.down.exists() and self.lost in {rollout.problem.id for rollout in rollouts}:
            raise Unavailable("the service is down; start it, and run again")
        return super().score(source, rollouts)


def table_of(grammar: Mapping[str, Sequence[str]], prompted: Mapping[str, Sequence[str]] | None = None) -> TokenTable:
    """A table with these rows, read as a user's file would be; ``prompted`` is ``grammar`` unless given."""
    import tempfile

    import yaml

    rows = [{k: list(v) for k, v in part.items()} for part in (grammar, prompted or grammar)]
    names = dict.fromkeys(name for part in rows for name in part if name != QUESTION)
    data = {"tokens": [{"name": n, "description": n} for n in names], "grammar": rows[0], "prompted": rows[1]}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(data, file)
        file.flush()
        return TokenTable.from_yaml(file.name)


def shuffled(items: Sequence[Problem], seed: int) -> list[Problem]:
    return random.Random(seed).sample(list(items), len(items))
