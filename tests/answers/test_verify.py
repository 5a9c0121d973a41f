r"""Equivalence, extraction and verdicts. The table is ours; one row a convention or a near miss of it."""

import pytest

from rftt_lightning.answers import extract, verify, verify_many
from rftt_lightning.core.contracts import Status, UserError

EQUAL = [
    # numbers: separators, currency, units, ordinals, percent
    ("4096", "4,096"), ("3500000", r"3{,}500{,}000"), ("3500000", r"3,\!500,\!000"), ("-23", "−23"), ("0.75", ".75"),
    (r"\$45", "45"), ("62", r"62 \text{ km}"), (r"3 \text{ hours}", r"180 \text{ minutes}"), (r"90 \text{ minutes}", "1 hour 30 minutes"),
    (r"2\text{ m}", r"200\text{ cm}"), ("31", r"31^{\text{st}}"), (r"40\%", "40"), (r"40\%", "0.4"), (r"\frac{2}{5}", r"40\%"),
    ("7", "٧"), ("12", "１２"),
    # fractions, mixed numbers, decimals
    (r"\frac{5}{8}", "5/8"), (r"\frac58", r"\dfrac{5}{8}"), (r"3\frac{1}{4}", r"\frac{13}{4}"), ("13/4", "3 1/4"), (r"\frac{6}{8}", r"\frac34"),
    ("0.625", r"\frac58"), ("½", "0.5"), (r"0.\overline{6}", r"\frac23"), (r"\frac{5}{11}", "0.4545..."), (r"\frac17", "0.142857142857143"),
    ("2.718", "e"), (r"5 \times 10^{4}", "50000"), ("1.5e3", "1500"),
    # radicals, pi, logarithms, trigonometry
    (r"2\sqrt{5}", r"\sqrt{20}"), (r"\frac{\sqrt7}{7}", r"\frac{1}{\sqrt7}"), (r"1+\sqrt3", r"\sqrt{4+2\sqrt3}"), (r"6\pi", "6π"),
    (r"\ln 9", r"2\ln 3"), (r"\log_2 8", "3"), (r"\cos 60^\circ", r"\frac12"), (r"\frac{\sqrt2}{2}", r"\sin\frac{\pi}{4}"),
    # powers, factorials, binomials, floors
    ("6561", "3^8"), ("720", "6!"), (r"\binom{7}{3}", "35"), ("35", r"{7 \choose 3}"), ("5", r"\lceil 4.2 \rceil"), ("3", r"23 \bmod 5"),
    # expressions and equations
    (r"a^2-b^2", "(a-b)(a+b)"), (r"\frac{1}{a}-\frac{1}{b}", r"\frac{b-a}{ab}"), (r"\sin^2 t", r"1-\cos^2 t"), ("2^{n+2}", r"4\cdot 2^n"),
    ("|a-3|", "|3-a|"), ("y=3x-1", "3x-y=1"), ("y=3x-1", "3x-1"), ("f(x)=x^3", "x^3"), ("x=9", "9"), ("9", "t=9"), ("x = 4+5 = 9", "9"),
    # inequalities, intervals, unions
    ("x<7", r"(-\infty,7)"), (r"[2,\infty)", r"x\ge 2"), ("2<x<=5", "(2,5]"), ("[-4,4]", r"|x|\le 4"), (r"x\ne 1", r"(-\infty,1)\cup(1,\infty)"),
    ("[0,9]", r"[0,5]\cup[4,9]"), ("x<-1 or x>1", r"(1,\infty)\cup(-\infty,-1)"), ("x<2", "2x<4"), ("x<2", "-x>-2"),
    # sets, lists, tuples, plus-minus, matrices
    ("2, 5, 11", "11, 2, 5"), (r"\{2,5\}", "5,2"), (r"\pm 6", "6, -6"), (r"1\pm\sqrt2", r"1-\sqrt2, 1+\sqrt2"), ("(1,0.5)", r"(1,\frac12)"),
    ("x=2, y=7", "(2,7)"), (r"\begin{pmatrix}4\\5\end{pmatrix}", "(4,5)"), (r"\emptyset", r"\{\}"), ("3 and 8", "8, 3"),
    (r"\begin{pmatrix}1&2\\0&1\end{pmatrix}", r"\begin{bmatrix} 1 & \frac42 \\ 0 & 1 \end{bmatrix}"),
    # complex numbers, bases, times, ratios, text, choice
    ("2-5i", "-5i+2"), ("3i", r"\sqrt{-9}"), ("2i", "(1+i)^2"), ("231_4", "231_{4}"), ("231_4", "231"), ("9:45", r"9:45 \text{ a.m.}"),
    ("21:15", "9:15 p.m."), ("6:9", "2:3"), ("3:8", r"\frac38"), (r"\text{Saturday}", "saturday"), (r"\text{a circle}", r"\text{circle}"),
    ("C", r"\textbf{(C)}"), (r"\text{(D)}", "D"), (r"\infty", r"+\infty"), (r"\text{odd}", "odd"), (r"\frac{4}{9}", r"{}\left.\tfrac49\right."),
]  # fmt: skip

DIFFERENT = [
    ("4096", "4069"), ("23", "-23"), ("1500", "15"), ("7", "7!"), (r"\$4.50", r"\$450"), (r"3 \text{ hours}", r"3 \text{ minutes}"),
    (r"2\text{ m}", r"2\text{ cm}"), (r"40\%", "4"), ("40", "0.4"), (r"\frac{5}{8}", r"\frac85"), (r"\frac{1}{3}", "0.33"), (r"\pi", "3.14159"),
    (r"\sqrt2", "1.4142"), ("5.0", "5.04"), ("0.5", "0.46"), ("1.5", "1.46"), (r"0.\overline{6}", "0.6"), (r"2\frac13", r"\frac23"),
    (r"2\sqrt5", r"5\sqrt2"), (r"\sqrt2+\sqrt7", "3"), (r"6\pi", r"6\pi^2"), (r"\ln 9", r"\ln 3"), ("2^{100}", "2^{100}+1"),
    (r"\sqrt{10^{40}+1}", "10^{20}"), ("a^2-b^2", "(a-b)^2"), ("|a|", "a"), (r"\sqrt{x^2}", "x"), ("2^{n+2}", "2^n+2"), (r"\frac{5}{3x}", r"\frac53x"),
    ("y=3x-1", "y=3x+1"), ("x=9", "x=-9"), ("x=9", "y=9"), ("7=2a+b", "2a+b"), ("x<7", r"(-\infty,7]"), ("(2,5]", "[2,5)"), ("x<2", "x>2"),
    ("2, 5, 11", "2, 5"), ("2, 5", "2, 5, 11"), ("9", "8, 9"), ("(1,2)", "(2,1)"), ("(1,2)", r"\{1,2\}"), (r"\pm6", "6"), ("(-3,2)", "[-3,2]"),
    ("2-5i", "2+5i"), ("231_4", "231_5"), ("9:45", "9:54"), (r"9:45\text{ p.m.}", r"9:45\text{ a.m.}"), ("3:4", "6:9"), ("12:00", "1:00"),
    (r"\text{even}", r"\text{odd}"), ("C", "D"), ("C", "(D) C"), (r"\infty", r"-\infty"), (r"\text{undefined}", r"\infty"), ("(a,b)", "(b,a)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"), ("x+1", "y+1"), ("12", "1,2"), ("1,234", "1, 234"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(gold, answer):
    verdict = verify(gold, rf"So it is \boxed{{{answer}}}.")
    assert verdict.status is Status.RIGHT, verdict
    assert verdict.rule


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold, answer):
    verdict = verify(gold, rf"So it is \boxed{{{answer}}}.")
    assert verdict.status is Status.WRONG, verdict


@pytest.mark.parametrize("gold", sorted({gold for pair in EQUAL + DIFFERENT for gold in pair}))
def test_reflexive(gold):
    assert verify(gold, gold, kind="answer").right
    assert verify(gold, rf"\boxed{{ {gold} \,}}").right


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"first \boxed{1}, no, \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"<next_step>\boxed{3}</next_step><output>The answer is \boxed{4}.</output>", "4"),
        ("<output>12</output>", "12"),
        (r"x = \boxed{1}, y = \boxed{2}", "x = 1 ; y = 2"),
        (r"x = \boxed{1} or x = \boxed{2}", "1 ; 2"),
        ("It is 7, but it could also be 8.", None),
        ("The total is 7 (3 cats and 4 dogs).", "7"),
        (r"\boxed{1} and $\boxed{2}$", "1 ; 2"),
        (r"\boxed{5}. Then we check again and see that this really is \boxed{6}", "6"),
        (r"good \boxed{7} then cut \boxed{\frac{1}{", "7"),
        (r"The answer is \boxed{\frac{1}{", None),
        (r"\boxed{}", None),
        ("blah\n#### 1,234", "1,234"),
        ("So the answer is 42.", "42"),
        ("The answer is 24, not 42.", "24"),
        ("**Final Answer:** 17", "17"),
        (r"The final answer is $\frac{5}{9}$. I hope it is correct.", r"\frac{5}{9}"),
        ("We add 3 and 4 and then get 7", "7"),
        (r"Hence the solution is $x = 3$.", "x = 3"),
        ("<direct_answer>The answer is 9.</direct_answer>", "9"),
        ("I cannot solve this problem.", None),
        ("18<|im_end|>", "18"),
        ("I get 0.5", "0.5"),
        ("The sum is 7.", "7"),
        ("a blue circle", "a blue circle"),
        ("", None),
        (None, None),
    ],
)
def test_extraction(response, answer):
    assert extract(response) == answer


@pytest.mark.parametrize(
    ("gold", "response", "status"),
    [
        ("5", None, Status.NO_ANSWER),
        ("5", "", Status.NO_ANSWER),
        ("5", "   \n", Status.NO_ANSWER),
        ("", "5", Status.UNPARSABLE_GOLD),
        ("", None, Status.UNPARSABLE_GOLD),
        (r"\frac{", "5", Status.UNPARSABLE_GOLD),
        ("8", r"It is \boxed{7} or \boxed{8}", Status.WRONG),
        ("8", "8", Status.RIGHT),
        ("8", r"\boxed{@@}", Status.WRONG),
        ("1, 2", r"x=\boxed{2}, y=\boxed{1}", Status.RIGHT),
        (r"\boxed{8}", "8", Status.RIGHT),
        ("3+5=8 eggs\n#### 8", "8", Status.RIGHT),
    ],
)
def test_status(gold, response, status):
    assert verify(gold, response).status is status


def test_kind():
    assert verify("x and y", "x and y", kind="answer").right
    with pytest.raises(UserError, match="kind"):
        verify("1", "1", kind="essay")


def test_verdict_says_why():
    verdict = verify("0.5", r"\boxed{\frac{2}{4}}")
    assert (verdict.answer, verdict.gold, verdict.rule) == (r"\frac{2}{4}", "0.5", "rational")
    assert verdict.forms == ("0.5", "/(2, 4)")


def test_many_keeps_the_order():
    pairs = [(str(i), rf"\boxed{{{i + i % 2}}}") for i in range(40)] + [(r"\sqrt{12}", r"2\sqrt3"), ("1", None)]
    for workers in (1, 3):
        verdicts = verify_many(pairs, workers=workers)
        assert [v.right for v in verdicts] == [i % 2 == 0 for i in range(40)] + [True, False]
    assert verify_many([]) == []
