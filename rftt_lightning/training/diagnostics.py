"""Sicknesses of an RL run by name: since when, on what evidence, what to try. Rules over the history of metrics; no torch.

:class:`Diagnosis` folds the steps of ``metrics.jsonl`` in their order, so a run that was resumed, or a finished one that is read
again, has the same alarms as one that went straight through. :class:`Diagnostics` does so while the run goes on.

How a rule reads a metric: the median of the last ``window`` steps (*now*) against the median of the first ``window`` (*start*).
The noise of a metric is taken from the differences of neighbouring steps, by their median, so that neither a trend nor single jumps
count; a change that must be real has to exceed ``sigmas`` standard errors of the difference of two such medians. A sickness
begins when its rule has held for ``patience`` steps together, and ends when it has not held for as many.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rftt_lightning.core.contracts import UserError
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Tree

SHARES = ("accuracy", "repair/net")
"""Shares of rollouts whose changes rules ask about."""
RECENT = 200
"""Steps whose differences tell a metric's noise."""


@dataclass(frozen=True)
class Thresholds:
    """When a sickness counts as one.

    Args:
        window: steps whose median is compared, at least 2; nothing that compares with the start is said before twice as many.
        patience: steps together for which a rule must hold before its alarm begins, and must not before it ends.
        sigmas: standard errors by which a change must exceed the noise.
        gain: accuracy in [0, 1]; a run that gained this much and more than the noise since its start (or kept what it had, if less
            was missing), and lost none of it, gets better, and what else changes (shorter, longer, fewer kinds of tokens) is how
            it does so.
        token_share: share of all segments above which one functional token takes all.
        token_gone: share of its start below which a token that made at least 5 % of the segments is no more used.
        certain: share of its start below which the entropy at boundaries is gone; uniform: of the greatest possible one, above
            which the functional tokens mean nothing to the policy (arXiv 2502.13389 starts from an SFT warm-up against that).
        kl: nats a token from the reference model. The paper's runs reach 0.02 to 0.08, healthy ones of the embedded worlds 0.25.
        shorter, longer: factors of the length at the start, without a gain in accuracy.
        more_checks: factor of the verify segments at the start, paid for and without more repairs (wrong → right minus right →
            wrong).
        gap: nats a token between sampler and trainer (arXiv 2510.26788 on what such gaps do).
        dead: share of problems whose rollouts are all right or all wrong (arXiv 2503.14476, section 3.2).
        late: share of verdicts that timed out.
    """

    window: int = 5
    patience: int = 5
    sigmas: float = 4.0
    gain: float = 0.02
    token_share: float = 0.9
    token_gone: float = 0.05
    certain: float = 0.1
    uniform: float = 0.95
    kl: float = 0.5
    shorter: float = 0.5
    longer: float = 2.0
    more_checks: float = 1.5
    gap: float = 0.05
    dead: float = 0.9
    late: float = 0.05

    def __post_init__(self) -> None:
        if self.window < 2 or self.patience < 1:
            raise UserError(
                f"thresholds need window >= 2 and patience >= 1; got window={self.window}, patience={self.patience}"
            )
        for name in ("token_share", "token_gone", "certain", "uniform", "shorter", "dead", "late"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"thresholds.{name} is {getattr(self, name)}; it must be between 0 and 1")
        for name in ("longer", "more_checks"):
            if not getattr(self, name) > 1:
                raise UserError(f"thresholds.{name} is {getattr(self, name)}; it must be above 1")
        for name in ("sigmas", "gain", "kl", "gap"):
            if not getattr(self, name) > 0:
                raise UserError(f"thresholds.{name} is {getattr(self, name)}; it must be above 0")


@dataclass(frozen=True)
class Alarm:
    """``Alarm("kl_explosion", since=40, evidence="kl 0.71 > 0.5", advice="raise model.kl_beta, …")``. ``until`` is the
    step at which it was over, None while it lasts; ``symptoms`` name what else holds and follows from it."""

    name: str
    since: int
    evidence: str
    advice: str
    until: int | None = None
    symptoms: tuple[str, ...] = ()

    @property
    def finding(self) -> str:
        """The evidence, and what follows from the sickness."""
        return self.evidence + (f" (with {', '.join(self.symptoms)})" if self.symptoms else "")

    def __str__(self) -> str:
        return f"{self.name} since step {self.since}: {self.finding}. Try: {self.advice}"


class Trend:
    """One metric so far; ``values`` are those of the steps that have it."""

    def __init__(self, window: int) -> None:
        self.window, self.noise = window, 0.0
        self.values: list[float] = []
        self.peak = -math.inf
        """The greatest of all medians of ``window`` steps."""

    def add(self, value: float) -> None:
        self.values.append(value)
        if len(self.values) >= self.window:
            self.peak = max(self.peak, self.now)

    @property
    def ready(self) -> bool:
        """Are start and now medians of different steps?"""
        return len(self.values) >= 2 * self.window

    @property
    def start(self) -> float:
        return median(self.values[: self.window])

    @property
    def now(self) -> float:
        return median(self.values[-self.window :])

    @property
    def error(self) -> float:
        """Standard error of ``now - start``: 1.25 s √(2 / window) for medians, s = 1.48 median |difference| / √2 of one step, or
        its ``noise`` if that is more."""
        differences = [abs(b - a) for a, b in itertools.pairwise(self.values[-RECENT:])]
        return max(1.4826 * median(differences) / math.sqrt(2), self.noise) * 1.2533 * math.sqrt(2 / self.window)

    def __str__(self) -> str:
        return f"{self.start:.3g} → {self.now:.3g}" if self.ready else f"{self.now:.3g}"


class Trends:
    """All metrics so far, and what several rules ask of them."""

    def __init__(self, limits: Thresholds) -> None:
        self.limits = limits
        self._trends: dict[str, Trend] = defaultdict(lambda: Trend(limits.window))

    def add(self, metrics: Mapping[str, float]) -> None:
        verdicts = {"timed_out": metrics.get("verdicts/timed_out", 0.0) / max(metrics.get("rollouts", 0.0), 1.0)}
        for name, value in {**metrics, **verdicts}.items():
            self._trends[name].add(value)
        for name in (
            SHARES
        ):  # a few steps can agree by chance, but a share of n rollouts has a standard deviation of up to 1 / 2 √n
            self._trends[name].noise = 0.5 / math.sqrt(max(metrics.get("rollouts", 1.0), 1.0))

    def __getitem__(self, name: str) -> Trend | None:
        """The metric, if there is a window of it."""
        trend = self._trends.get(name)
        return trend if trend and len(trend.values) >= self.limits.window else None

    def changed(self, name: str) -> Trend | None:
        """The metric, if there are two windows of it, to be compared."""
        trend = self._trends.get(name)
        return trend if trend and trend.ready else None

    def values(self, name: str) -> list[float]:
        """The metric of all steps that have it."""
        return self._trends[name].values if name in self._trends else []

    def tokens(self) -> dict[str, Trend]:
        """Segments a rollout of each functional token."""
        mark = "functional_tokens/"
        return {name.removeprefix(mark): t for name, t in self._trends.items() if name.startswith(mark) and self[name]}

    def rises(self, name: str, least: float = 0.0) -> bool:
        """Is it above its start by more than ``least`` and than the noise?"""
        trend = self.changed(name)
        return trend is not None and trend.now - trend.start > max(least, self.limits.sigmas * trend.error)

    def better(self) -> bool:
        """Did the accuracy gain since the start, and keep what it gained? Too early to say counts as yes, and half the ``sigmas``
        are enough. Where it began too near to 1 to gain so much, it is enough that it does not lose so much."""
        trend = self.changed("accuracy")
        if trend is None:
            return True
        real = max(self.limits.gain, self.limits.sigmas / 2 * trend.error)
        gained = trend.now - trend.start > (real if trend.start + real < 1 else -real)
        lost = trend.peak - trend.now > max((trend.peak - trend.start) / 2, self.limits.sigmas * trend.error)
        return gained and not lost


# -- the sicknesses: each is given the metrics so far, and says on what evidence it holds, or None -------------------------------


def token_collapse(trends: Trends) -> str | None:
    """One functional token takes all, one that was used is no more, or the policy's choice is certain or uniform everywhere;
    without a gain in accuracy."""
    limits, tokens = trends.limits, trends.tokens()
    if trends.better():
        return None
    now, start = (sum(getattr(t, time) for t in tokens.values()) for time in ("now", "start"))
    for name, trend in tokens.items():
        if trend.now > limits.token_share * now > 0 and trend.ready:
            before = trend.start / start if start else 0.0  # tags as text may begin with none
            return f"{name} makes {100 * trend.now / now:.0f} % of the segments ({100 * before:.0f} % at the start)"
        used = trend.ready and trend.start > 0.05 * start
        if used and trend.now < limits.token_gone * trend.start:
            return f"{name} is no more used ({trend} an answer)"
    spread = trends.changed("boundary/entropy")
    if spread and spread.now < limits.certain * spread.start:
        return f"entropy at the boundaries is gone ({spread} of the greatest possible)"
    if spread and spread.now > limits.uniform:
        return f"functional tokens are chosen uniformly (entropy at the boundaries {spread} of the greatest possible)"
    return None


def kl_explosion(trends: Trends) -> str | None:
    """The policy has left the reference model."""
    return _above(trends, "kl", trends.limits.kl, "nats a token")


def length_collapse(trends: Trends) -> str | None:
    """Answers shrink without a gain in accuracy."""
    length = trends.changed("length")
    if length and length.now < trends.limits.shorter * length.start and not trends.better():
        return f"length {length} tokens, accuracy {trends['accuracy']}"
    return None


def length_growth(trends: Trends) -> str | None:
    """Answers grow without a gain in accuracy."""
    length = trends.changed("length")
    if length and length.now > trends.limits.longer * length.start and not trends.better():
        return f"length {length} tokens, accuracy {trends['accuracy']}, complete {trends['complete']}"
    return None


def prm_gaming(trends: Trends) -> str | None:
    """More checks, more reward on them and no more repairs (wrong → right minus right → wrong); or checks that score higher, which
    a centred reward does not show, and fewer repairs. No gain in accuracy."""
    checks, repairs = trends.changed("functional_tokens/verify"), trends.changed("repair/net")
    if not checks or not repairs or trends.better():
        return None
    limits, gained = trends.limits, repairs.now - repairs.start
    real = max(limits.gain, limits.sigmas / 2 * repairs.error)
    more = trends.rises("functional_tokens/verify", (limits.more_checks - 1) * checks.start)
    found = f"verify {checks} an answer, {{}}, repairs {repairs}, accuracy {trends['accuracy']}"
    if more and trends.rises("rewards/verify", limits.gain) and gained <= real:
        return found.format(f"reward on it {trends['rewards/verify']}")
    if trends.rises("step_scores/verify", limits.gain) and gained < -real:
        return found.format(f"score of it {trends['step_scores/verify']}")
    return None


def reward_without_accuracy(trends: Trends) -> str | None:
    """The reward rises, the accuracy does not."""
    if trends.rises("reward", trends.limits.gain) and not trends.better():
        return f"reward {trends['reward']}, accuracy {trends['accuracy']}"
    return None


def sampler_mismatch(trends: Trends) -> str | None:
    """The sampler's log-probs are not those that the trainer recomputes."""
    return _above(trends, "sampler_gap", trends.limits.gap, "nats a token")


def dead_groups(trends: Trends) -> str | None:
    """Nearly all problems have rollouts that are all right, or all wrong: nothing to tell them apart."""
    mixed = trends["groups/mixed"]
    if mixed and 1 - mixed.now > trends.limits.dead:
        return f"all right {trends['groups/all_right']}, all wrong {trends['groups/all_wrong']}, mixed {mixed} of the problems"
    return None


def checker_timeouts(trends: Trends) -> str | None:
    """Verdicts come too late."""
    return _above(trends, "timed_out", trends.limits.late, "of the verdicts")


def _above(trends: Trends, name: str, limit: float, unit: str) -> str | None:
    trend = trends[name]
    return f"{name} {trend} {unit} (limit {limit:g})" if trend and trend.now > limit else None


@dataclass(frozen=True)
class Sickness:
    """A ``rule``, whose name is the sickness's; the metrics that it ``needs``; what ``follows`` from it, and does not begin to ring
    once it has begun; and what to try."""

    rule: Callable[[Trends], str | None]
    needs: tuple[str, ...]
    advice: str
    follows: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.rule.__name__


SICKNESSES = (
    Sickness(
        token_collapse,
        ("boundary/entropy", "accuracy"),
        "a lower model.lr, a higher model.kl_beta, or an SFT warm-up that is longer and shows every functional token",
        follows=("length_collapse", "length_growth"),
    ),
    Sickness(
        kl_explosion,
        ("kl",),
        "a lower model.lr, a higher model.kl_beta, a lower trainer.gradient_clip, fewer trainer.mini_batches",
    ),
    Sickness(
        length_collapse,
        ("length", "accuracy"),
        "ProcessReward's center: null, so that steps cost nothing; OutcomeReward's wrong nearer to none, if quick wrong answers "
        "pay; a lower model.lr",
    ),
    Sickness(
        length_growth,
        ("length", "accuracy"),
        "ProcessReward's center: null or credit: segment, so that one more step pays nothing; model.gamma below 1; a lower "
        "max_tokens of trainer.expander",
    ),
    Sickness(
        prm_gaming,
        ("functional_tokens/verify", "rewards/verify", "repair/net", "accuracy"),
        "a lower process_weight of Blend; ProcessReward's center: null and credit: segment; a PRM trained on this policy's trees",
        follows=("reward_without_accuracy", "token_collapse", "length_growth"),
    ),
    Sickness(
        reward_without_accuracy,
        ("reward", "accuracy"),
        "a look at what is paid (rewards/<token>); a higher outcome_weight of Blend; OutcomeReward's wrong nearer to none",
        follows=("token_collapse", "length_collapse", "length_growth"),
    ),
    Sickness(
        sampler_mismatch,
        ("sampler_gap",),
        "top_p: 1 and min_prior: 0 in the expander's sampling; model.importance: truncated; trainer.precision: 32-true; a served "
        "sampler may have stale weights",
    ),
    Sickness(
        dead_groups,
        ("groups/mixed",),
        "harder problems in data.train if all are right, easier ones if all are wrong; more rollouts in trainer.expander; a "
        "process reward",
    ),
    Sickness(
        checker_timeouts,
        ("verdicts/timed_out", "rollouts"),
        "a longer time limit of the answer checker or fewer processes beside it; if the answers cannot be judged, "
        "trainer.drop_timed_out: false teaches to leave them",
        follows=("dead_groups",),
    ),
)

NAMES = tuple(sickness.name for sickness in SICKNESSES)


class Diagnosis:
    """Steps in their order -> alarms. ``begun`` are the sicknesses that have begun and are not over; one of them rings, that is,
    comes to be in ``alarms``, as soon as no other one explains it, and stays there. Pure but for what it is told."""

    def __init__(self, limits: Thresholds = Thresholds()) -> None:
        self.limits, self.trends = limits, Trends(limits)
        self.alarms: list[Alarm] = []
        self.begun: dict[str, Alarm] = {}
        self._open: dict[str, int] = {}  # place in alarms
        self._turning: dict[str, list[int]] = {}  # steps together that speak for a beginning, or an end

    def tell(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take in a step's metrics, ``step`` among them; returns the alarms that begin or end with it."""
        step = int(metrics["step"])
        self.trends.add({k: v for k, v in metrics.items() if k != "step"})
        held = {s.name: evidence for s in SICKNESSES if (evidence := s.rule(self.trends))}
        over = [alarm for s in SICKNESSES if (alarm := self._turn(s, step, held))]
        explained = {name for s in SICKNESSES if s.name in self.begun for name in s.follows}
        ringing = len(self.alarms)
        for name, alarm in self.begun.items():
            if name in self._open:
                self.alarms[self._open[name]] = alarm
            elif name not in explained:
                self._open[name] = len(self.alarms)
                self.alarms.append(alarm)
        return over + self.alarms[ringing:]

    def _turn(self, sickness: Sickness, step: int, held: Mapping[str, str]) -> Alarm | None:
        """Count towards a beginning or an end, whether it rings or not; the alarm that ends."""
        name, turning = sickness.name, self._turning.setdefault(sickness.name, [])
        if (name in held) == (name in self.begun):
            turning.clear()
        else:
            turning.append(step)
        if len(turning) == self.limits.patience:
            since = turning[0]
            turning.clear()
            if name in self.begun:
                over = replace(self.begun.pop(name), until=since)
                if name not in self._open:
                    return None
                self.alarms[self._open.pop(name)] = over
                return over
            self.begun[name] = Alarm(name, since, held[name], sickness.advice)
        if name in held and name in self.begun:  # its evidence is that of the last step at which it held
            symptoms = tuple(other for other in sickness.follows if other in held)
            self.begun[name] = replace(self.begun[name], evidence=held[name], symptoms=symptoms)
        return None

    @property
    def lasting(self) -> list[Alarm]:
        return [alarm for alarm in self.alarms if alarm.until is None]

    def unseen(self) -> list[str]:
        """Sicknesses that cannot be seen, because a metric was never measured."""
        return [s.name for s in SICKNESSES if not all(map(self.trends.values, s.needs))]


def diagnose(history: Iterable[Mapping[str, float]], limits: Thresholds = Thresholds()) -> Diagnosis:
    """The diagnosis of a run whose steps' metrics are given in their order."""
    diagnosis = Diagnosis(limits)
    for metrics in history:
        diagnosis.tell(metrics)
    return diagnosis


def read_history(path: str | Path) -> list[dict[str, float]]:
    """A run's metrics.jsonl; its last line may be half written. Raises :class:`UserError` if it cannot be read."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        if not all(isinstance(row["step"], int) for row in rows):
            raise ValueError("step is no whole number")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the folder of an RL run") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no metrics.jsonl of an RL run: {type(error).__name__} {error}") from error
    return rows


class Callback:
    """What is told of a run of ``rftt rl``, by keyword and on every rank; swap by ``class_path``."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Before the first step; what an interrupted run did is in ``trainer.folder``."""

    def on_step_end(self, trainer: Any, module: Any, metrics: Mapping[str, float], trees: Sequence[Tree]) -> None:
        """After each step: ``metrics`` as in metrics.jsonl, ``trees`` are those that the rank grew."""


class Diagnostics(Callback):
    """Callback of ``rftt rl``: a warning when a sickness begins and when it is over, and TensorBoard's ``alarms/<name>`` (0 or 1 a
    step), ``alarms`` as text and, every so many steps, pictures of the trees of rank zero.

    Args:
        thresholds: when a sickness counts as one.
        every: steps from one set of pictures to the next; 0 draws none.
        stop_on: names of sicknesses whose beginning, also as the symptom of another one, ends the run, which saves its step and
            says why. A run that is started again goes on: only what begins in the steps to come ends it.

    Raises :class:`UserError` for a name that is no sickness.
    """

    def __init__(
        self,
        thresholds: Thresholds = Thresholds(),
        every: int = 10,
        stop_on: list[str] = [],  # noqa: B006  jsonargparse shows the default
    ) -> None:
        for name in set(stop_on) - {*NAMES}:
            raise UserError(f"Diagnostics: stop_on names {name!r}; use some of {', '.join(NAMES)}")
        if every < 0:
            raise UserError(f"Diagnostics: every is {every}; it must be at least 0")
        self.thresholds, self.every, self.stop_on = thresholds, every, tuple(stop_on)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Read what the run did before it was interrupted; what begins there has rung already."""
        history = trainer.folder.metrics
        written = trainer.is_global_zero and history.exists()
        self.diagnosis = diagnose(read_history(history) if written else [], self.thresholds)

    def on_step_end(self, trainer: Any, module: Any, metrics: Mapping[str, float], trees: Sequence[Tree]) -> None:
        if not trainer.is_global_zero:
            return
        step, writer = int(metrics["step"]), trainer.logger.experiment
        before = set(self.diagnosis.begun)
        for alarm in self.diagnosis.tell(metrics):
            text = f"{alarm}." if alarm.until is None else f"{alarm.name} is over since step {alarm.until}."
            warnings.warn(text, stacklevel=2)
            writer.add_text("alarms", text, step)
        for name, alarm in self.diagnosis.begun.items():
            if name in self.stop_on and name not in before:
                trainer.stop(f"stopped by stop_on of Diagnostics: {alarm}.")
        lasting = {alarm.name for alarm in self.diagnosis.lasting}
        for name in NAMES:
            writer.add_scalar(f"alarms/{name}", float(name in lasting), step)
        if self.every and step % self.every == 0:
            self._draw(writer, step, trees, trainer.expander.table)

    def _draw(self, writer: Any, step: int, trees: Sequence[Tree], table: TokenTable) -> None:
        from rftt_lightning.training import pictures  # matplotlib, which reading alarms does without

        writer.add_figure("trees/transitions", pictures.transitions(trees, table), step)
        writer.add_figure("trees/shapes", pictures.shapes(trees), step)
        names = ("repair/net", "repair/wrong_to_right", "repair/right_to_wrong", "functional_tokens/verify")
        writer.add_figure(
            "trees/repairs", pictures.repairs(*(self.diagnosis.trends.values(name) for name in names)), step
        )
        for i, rollout in enumerate(trees[0].rollouts()[:3]):
            writer.add_figure(f"paths/{i}", pictures.path(rollout, table), step)
