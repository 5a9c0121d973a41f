"""Nothing that a model writes may run, hang, or exhaust memory."""

import random
import threading
import time

import pytest

from rftt_lightning.answers import verify
from rftt_lightning.answers.node import Unreadable
from rftt_lightning.answers.parse import parse
from rftt_lightning.answers.pool import POOL
from rftt_lightning.core.contracts import Status

N = 100_000
HOSTILE = {
    "digits": "7" * N, "decimals": "0." + "3" * N, "braces": "{" * 10_000 + "1" + "}" * 10_000, "parens": "(" * 10_000 + ")" * 10_000,
    "fractions": r"\frac{1}{" * 3000 + "1" + "}" * 3000, "megabyte": "x+" * 500_000, "spaces": " " * 1_000_000 + "5x", "boxes": r"\boxed{" * N,
    "dollars": "$" * N, "tower": "9^9^9^9", "tower2": "9^{9^{9^{9}}}", "tower3": "2^{3^{4^{5^{6}}}}+1", "tower4": "((9^9)^9)^{99}",
    "factorial": "999999999!", "factorials": "9!!!!!!!!", "factorial2": "(10^9)!", "binomial": r"\binom{10^9}{5\cdot 10^8}", "exponent": "1e999999",
    "exponent2": r"10^{10^{10}}", "symbolic": "(a+b+c+d+f)^{9999}", "symbolic2": "(x+y)^{500}(x-y)^{500}(z+1)^{500}", "code": '__import__("os").system("touch PWNED")',
    "code2": 'eval(open("PWNED","w"))', "code3": r"\text{__import__('os').system('touch PWNED')}", "lambda": "(lambda: 1)()", "attribute": "x.__class__.__mro__",
    "products": "2*" * 1500 + "2", "signs": "-" * 3000 + "1", "bangs": "5" + "!" * 3000, "primes": "f" + "'" * 3000, "powers": "2" + "^2" * 1500,
    "relations": "1" + "<2" * 1500, "commas": "1" + ",2" * 1900, "roots": r"\sqrt" * 900 + "2", "matrix": r"\begin{pmatrix}" + "1&" * 1500 + r"1\end{pmatrix}",
    "bars": "|" * 3000, "nulls": "\x00" * 100, "surrogate": "\ud800", "dots": "0." + "12" * 1500 + "...", "sines": r"\sin" * 1000 + "x",
    "sums": "+".join(f"1/{k}^{{999}}" for k in range(2, 200)), "huge angle": r"\sin(10^{9999})", "list": ",".join(rf"\sqrt{{{k}}}" for k in range(2, 66)),
    "units": "5 kilometers per hour or about three miles per hour (rounded)", "letters": r"\text{" + "A B C D E F G H I J " * 3 + "is the order}",
    "tildes": "1" + "~" * 3900 + "x", "sets": r"\{" * 20 + "1" + r"\}" * 20, "sign tower": "2^" + "-" * 1500 + "1", "circled": "㊿" * 3000 + "° 30'",
    "binomials": ",".join(rf"\binom{{5000}}{{{k}}}" for k in range(2400, 2440)),
    "unclosed": r"\begin{pmatrix}1&2", "subscripts": "x" + "_x" * 1500, "zero": r"\frac{1}{0}", "zero power": "0^{-1}", "log zero": r"\ln 0", "base": "9_8",
}  # fmt: skip


SECONDS = 3.0
"""On an idle machine it is under one (experiments/answer-checker); tests share theirs, and the budget is CPU time."""


@pytest.fixture(autouse=True, scope="module")
def worker():
    list(POOL.judge(iter([("1", "1.0")]), None, 10))  # its start is no input's fault


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_end_in_time_and_are_not_right(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for gold in ("12", r"\sqrt{2}+x", ",".join(rf"\binom{{5000}}{{{k}}}" for k in range(2000, 2040))):
        for response in (HOSTILE[name], rf"\boxed{{{HOSTILE[name]}}}"):
            began = time.monotonic()
            verdict = verify(gold, response)
            assert time.monotonic() - began < SECONDS
            assert not verdict.right
    began = time.monotonic()
    assert verify(HOSTILE[name], r"\boxed{3}").status is not Status.RIGHT
    assert time.monotonic() - began < SECONDS
    assert not list(tmp_path.iterdir())


def test_hostile_answers_from_a_thread():
    verdicts = {}
    names = ("tower2", "symbolic2", "list", "megabyte", "code")
    work = lambda name: verdicts.__setitem__(name, verify(r"\sqrt{2}+x", HOSTILE[name]))  # noqa: E731
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert verdicts.keys() == set(names)
    assert not any(verdict.right for verdict in verdicts.values())


def test_limits_before_reading():
    for text in ("1" * 4001, "(" * 40 + "1" + ")" * 40, "2*" * 200 + "2"):
        with pytest.raises(Unreadable):
            parse(text)


PIECES = (
    r"\frac \sqrt { } ( ) [ ] \{ \} , ; : = < > \le \in \cup \pm + - * / ^ _ ! % | 1 2 0 0.5 1,000 12 x y f e i \pi \infty \text{a} "
    r"\begin{pmatrix} \end{pmatrix} & \\\\ \boxed{ $ \sin \log \lfloor \rfloor \binom \mathbb{R} and or cm ' ... \mod \overline #### answer is \sum_{k=1} "
    r"\mid k\in\mathbb{Z} degrees base million \over \circ < hours U ] \setminus"
).split()


def test_random_scraps_never_raise_and_equal_themselves_or_nothing():
    draw = random.Random(0)
    for _ in range(1500):
        text = draw.choice(("", " ")).join(draw.choices(PIECES, k=draw.randrange(1, 12)))
        other = draw.choice(("", " ")).join(draw.choices(PIECES, k=draw.randrange(1, 6)))
        assert verify(text, other).rule not in ("worker died", "memory", "wall clock")
        assert verify(text, text, kind="answer").status in (Status.RIGHT, Status.NO_ANSWER)
