"""Figures of a base checkpoint on fresh test problems: ``python experiments/tiny-base/measure.py countdown``.

Greedy chain of thought, and walks in which random functional prompts ask for one step after another, each step judged exactly.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial

from rftt_lightning.core.contracts import QUESTION, Backend, Problem, ProblemSource, Request, Sampling, Status, Step
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.search.expand import COT, dialogue, read_prompts, seed_of
from rftt_lightning.search.vote import Accuracy
from rftt_lightning.tiny.arithmetic import Arithmetic
from rftt_lightning.tiny.countdown import Countdown
from rftt_lightning.tiny.world import AFTER, World

SOURCES = {"countdown": Countdown, "countdown4": partial(Countdown, numbers=4), "arithmetic": Arithmetic}
PROMPTS = read_prompts("pkg:tiny/prompts", [*TokenTable.from_yaml().names, COT])


def say(
    backend: Backend, paths: Sequence[tuple[Problem, list[Step]]], tags: Sequence[str], temperature: float
) -> list[str]:
    """The text that the model writes next on each path, asked by the tag's prompt."""
    sampling = Sampling(temperature=temperature)
    requests = [
        Request(
            backend.chat(dialogue(problem.question, steps, PROMPTS, ask=tag)),
            seed_of(problem.id, len(steps), temperature),
            max_tokens=200,
            sampling=sampling,
            force=tag,
        )
        for (problem, steps), tag in zip(paths, tags, strict=True)
    ]
    return [completion.segments[0].text for completion in backend.generate(requests)]


def chain_of_thought(source: ProblemSource, backend: Backend, temperature: float = 0.0) -> str:
    """Accuracy with its interval, and how often an answer could be read."""
    paths = [(problem, []) for problem in source.problems()]
    verdicts = [
        source.judge(problem, text)
        for (problem, _), text in zip(paths, say(backend, paths, [COT] * len(paths), temperature), strict=True)
    ]
    read = sum(verdict.status is not Status.NO_ANSWER for verdict in verdicts)
    return f"{Accuracy.of(sum(verdict.right for verdict in verdicts), len(verdicts))}, answers read {read}"


def walks(source: World, backend: Backend, temperature: float, longest: int = 14) -> list[tuple[Problem, list[Step]]]:
    """One path a problem: random legal prompts to a finished attempt, then verify, refine where it says wrong, output."""
    paths: list[tuple[Problem, list[Step]]] = [(problem, []) for problem in source.problems()]
    rng = random.Random(0)
    for _ in range(longest):
        going = [(problem, steps) for problem, steps in paths if not steps or steps[-1].tag != "output"]
        tags = [next_tag(source, problem, steps, rng) for problem, steps in going]
        if not going:
            break
        for (_, steps), tag, text in zip(going, tags, say(backend, going, tags, temperature), strict=True):
            steps.append(Step(tag, text))
    return paths


def next_tag(source: World, problem: Problem, steps: Sequence[Step], rng: random.Random) -> str:
    last = steps[-1] if steps else Step(QUESTION, "")
    if last.tag == "verify":
        return "refine" if last.text.endswith("wrong") and rng.random() < 0.7 else "output"
    if last.tag == "direct_answer" or source.replay(problem, steps)[0].finished:
        return "verify" if rng.random() < 0.8 else "output"
    return rng.choice(AFTER[last.tag])


def report(source: World, paths: Sequence[tuple[Problem, list[Step]]]) -> dict[str, str]:
    """Share of right steps for each tag that computes, among steps before which the path has no false one: what follows a
    false step is judged by what the path claims and says little."""
    slips = (
        ("next_step", "direct_answer") if isinstance(source, Arithmetic) else ()
    )  # there a slip is part of the world
    right: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for problem, steps in paths:
        for index, (step, score) in enumerate(zip(steps, source.check_steps(problem, steps), strict=True)):
            if score is None:
                continue
            names = [step.tag]
            if step.tag == "verify":
                names.append(f"verify after {steps[index - 1].tag}, said {step.text.split()[-1]}")
            seen.update(names)
            right.update(names if score == 1.0 else [])
            if score == 0.0 and step.tag not in slips:
                break
    return {name: f"{right[name]}/{seen[name]} = {100 * right[name] / seen[name]:.1f} %" for name in sorted(seen)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", choices=list(SOURCES))
    parser.add_argument("--model")
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--show", type=int, default=0, help="paths to print")
    options = parser.parse_args()
    source = SOURCES[options.world](options.split, options.count)
    backend = HFBackend(options.model or f"pkg:tiny/checkpoints/{options.world}", batch_size=250)
    print("greedy chain of thought:", chain_of_thought(source, backend))
    paths = walks(source, backend, options.temperature)
    print(json.dumps(report(source, paths), indent=1))
    for problem, steps in paths[: options.show]:
        print(problem.question, "|", TokenTable.from_yaml().render(steps))


if __name__ == "__main__":
    main()
