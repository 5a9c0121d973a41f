import dataclasses
from itertools import pairwise

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rftt_lightning.core.contracts import QUESTION, Provenance, Sampling, UserError
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.search.driver import grow
from rftt_lightning.search.expand import ChainOfThought, PromptExpander, TokenExpander, dialogue, read_prompts, seed_of
from scripted import ScriptedBackend, ScriptedReward, ScriptedSource, table_of

TABLE = TokenTable.from_yaml()
CUSTOM = {
    "question": ["think", "act"],
    "think": ["act", "think"],
    "act": ["think", "act", "check", "done"],
    "check": ["act", "done"],
    "done": [],
}


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for name in (*TABLE.names, "cot", "think", "act", "check", "done"):
        (folder / f"{name}.txt").write_text(f"please {name}\n")
    return str(folder)


def yaml_table(folder, grammar, prompted=None):
    path = folder / "table.yaml"
    names = dict.fromkeys(n for part in (grammar, prompted or grammar) for n in part if n != QUESTION)
    data = {
        "tokens": [{"name": n, "description": n} for n in names],
        "grammar": grammar,
        "prompted": prompted or grammar,
    }
    path.write_text(yaml.safe_dump(data))
    return str(path)


def trees(expander, backend=None, count=4, seed=0, **settings):
    source = ScriptedSource(count)
    backend = backend or ScriptedBackend(expander.table)
    grown = sorted(
        grow(source.problems(), expander, backend, ScriptedReward(expander.table), source, seed=seed, **settings),
        key=lambda pair: pair[0],
    )
    for _, tree in grown:
        tree.check()
    return [tree for _, tree in grown]


TOKEN_SETTINGS = st.fixed_dictionaries(
    {
        "children": st.sampled_from(["legal", "drawn"]),
        "mode": st.sampled_from(["tree", "sample"]),
        "width": st.integers(1, 8),
        "max_depth": st.integers(1, 8),
        "max_tokens": st.integers(1, 40),
        "sampling": st.builds(
            Sampling,
            temperature=st.sampled_from([0.0, 0.7, 1.0]),
            boundary=st.sampled_from(["sample", "argmax"]),
            min_prior=st.sampled_from([0.0, 0.05, 0.6]),
            max_segment_tokens=st.sampled_from([1, 5, 512]),
        ),
    }
)


# -- functional tokens -------------------------------------------------------------------------------------------------


@given(TOKEN_SETTINGS, st.integers(0, 1000), st.integers(1, 3))
def test_token_trees_obey_grammar_and_budgets(settings, seed, parallel):
    expander = TokenExpander(rollouts=8, **settings)
    backend = ScriptedBackend(TABLE)
    for tree in trees(expander, backend, 2, seed, parallel=parallel):
        for rollout in tree.rollouts():
            assert TABLE.is_legal(step.tag for step in rollout.steps)
            assert len(rollout.steps) <= expander.max_depth and 1 <= rollout.length <= expander.max_tokens
            last = rollout.segments[-1]
            assert rollout.complete == (last.closed and TABLE.terminal(last.tag))
            assert all(segment.closed for segment in rollout.segments[:-1])
            if not rollout.complete:
                assert rollout.score.value == 0 and (
                    len(rollout.steps) == expander.max_depth
                    or rollout.length == expander.max_tokens
                    or len(last.tokens) == expander.sampling.max_segment_tokens
                )
    assert all(r.max_tokens >= 1 and r.segments >= 1 for batch in backend.batches for r in batch)


@given(TOKEN_SETTINGS, st.integers(0, 1000))
def test_stored_tokens_are_what_the_backend_saw(settings, seed):
    """Every prompt is the concatenation of stored ids, and every leaf is a prompt with its completion."""
    expander, backend = TokenExpander(rollouts=6, **settings), ScriptedBackend(TABLE)
    seen = set()
    for tree in trees(expander, backend, 2, seed):
        nodes = {tree.tokens(k) for k in range(len(tree))}
        assert {
            r.prompt for batch in backend.batches for r in batch if r.prompt[: len(tree.prompt)] == tree.prompt
        } <= nodes
        seen |= {tree.tokens(leaf) for leaf, _ in tree.leaves}
    again = ScriptedBackend(TABLE)
    written = {
        request.prompt + tuple(t for s in completion.segments for t in s.tokens)
        for batch in backend.batches
        for request, completion in zip(batch, again_generate(again, backend, batch), strict=True)
    }
    assert seen == written


def again_generate(again, backend, batch):
    again.names.update(backend.names)
    return again.generate(batch)


@given(TOKEN_SETTINGS, st.integers(0, 1000))
def test_provenance_says_who_chose(settings, seed):
    """Inside segments all is sampled. An opening token was chosen by the policy where a rollout ran on, and by search where it
    began; a drawn child is a sample of the policy either way."""
    expander, backend = TokenExpander(rollouts=6, **settings), ScriptedBackend(TABLE)
    own = Provenance.SAMPLED if expander.sampling.boundary == "sample" else Provenance.ARGMAX
    for tree in trees(expander, backend, 2, seed):
        begun = {r.prompt + (backend.tag_ids[f"<{r.force}>"],) for batch in backend.batches for r in batch if r.force}
        for node in range(1, len(tree)):
            segment = tree.segments[node]
            if segment is None:
                continue
            assert set(segment.provenance[1:]) <= {Provenance.SAMPLED}
            assert segment.provenance[0] == tree.plans[node].chosen
            if expander.mode == "sample":
                assert segment.provenance[0] == own
            elif expander.children == "legal":
                assert segment.provenance[0] in (own, Provenance.UCT)
                if segment.provenance[0] == Provenance.UCT:
                    assert tree.tokens(tree.parent[node]) + segment.tokens[:1] in begun
            else:
                assert segment.provenance[0] in (own, Provenance.SAMPLED)


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.1]))
def test_legal_children_are_the_policys_choice_then_all_others_by_probability(seed, min_prior):
    expander = TokenExpander(rollouts=10, sampling=Sampling(min_prior=min_prior))
    for tree in trees(expander, count=2, seed=seed):
        for node in range(len(tree)):
            plans = [tree.plans[k] for k in tree.children[node]]
            if not plans:
                continue
            priors = tree.segments[node].priors if node else None
            tags = [p.tag for p in plans]
            assert len(set(tags)) == len(tags) and set(tags) <= set(TABLE.legal(tree.tag(node)))
            assert plans[0].chosen == Provenance.SAMPLED and all(p.chosen == Provenance.UCT for p in plans[1:])
            assert all(a.prior >= b.prior for a, b in pairwise(plans[1:]))
            if priors:
                kept = {tag for tag, p in priors.items() if p >= min_prior} | {tags[0]}
                assert set(tags) == kept and all(p.prior == priors[p.tag] for p in plans)


@given(st.integers(0, 1000))
def test_first_visits_go_in_order_of_preference_before_any_uct(seed):
    for tree in trees(TokenExpander(rollouts=12), count=2, seed=seed):
        first = {}
        for number, (leaf, _) in enumerate(tree.leaves):
            for node in tree.path(leaf):
                first.setdefault(node, number)
        for node in range(len(tree)):
            kids = tree.children[node]
            visited = [k for k in kids if k in first]
            assert visited == kids[: len(visited)]
            assert [first[k] for k in visited] == sorted(first[k] for k in visited)
            if len(visited) < len(kids):  # so nobody was visited twice while a sibling waited
                assert all(tree.visits[k] == 1 for k in visited)


def test_drawn_children_come_from_the_priors():
    """Frequencies of 3,000 planned children against the priors, within 5 standard deviations; rare ones are never drawn."""
    table = table_of(CUSTOM)
    priors = {"question": {"think": 0.3, "act": 0.7}, "act": {"think": 0.02, "act": 0.38, "check": 0.2, "done": 0.4}}
    expander = TokenExpander(rollouts=1, children="drawn", width=31, sampling=Sampling(min_prior=0.05))
    expander.table = table
    counts = {"question": [], "act": []}
    for tree in trees(expander, ScriptedBackend(table, priors), count=100):
        for node in range(len(tree)):
            if tree.children[node] and tree.tag(node) in counts:
                counts[tree.tag(node)] += [tree.tag(k) for k in tree.children[node][1:]]
    for after, drawn in counts.items():
        kept = {tag: p for tag, p in priors[after].items() if p >= 0.05}
        assert set(drawn) == set(kept) and len(drawn) > 300
        for tag, p in kept.items():
            p /= sum(kept.values())
            assert drawn.count(tag) / len(drawn) == pytest.approx(p, abs=5 * (p * (1 - p) / len(drawn)) ** 0.5)


def test_where_all_tags_are_rare_the_favourite_is_kept():
    priors = {"question": {"clarify": 0.2, "analyze": 0.3, "subquestion": 0.25, "next_step": 0.25}}
    for children, expected in (("legal", ["analyze"]), ("drawn", ["analyze"] * 4)):
        expander = TokenExpander(children=children, width=4, rollouts=1, sampling=Sampling(min_prior=0.5))
        for tree in trees(expander, ScriptedBackend(TABLE, priors)):
            assert [tree.tag(k) for k in tree.children[0]] == expected
            assert all(tree.plans[k].prior == 0.3 for k in tree.children[0])


def test_width_one_is_one_path():
    for children in ("legal", "drawn"):
        for tree in trees(TokenExpander(children=children, width=1)):
            assert len(tree.leaves) == 1 and all(tree.spent)


def test_sample_mode_is_independent_rollouts_from_the_root():
    expander, backend = TokenExpander(mode="sample", rollouts=5), ScriptedBackend(TABLE)
    for tree in trees(expander, backend, parallel=5):
        assert len(tree.children[0]) == len(tree.leaves) == 5
        assert all(len(kids) <= 1 for kids in tree.children[1:])
    requests = [r for batch in backend.batches for r in batch]
    assert len(backend.batches) == 1 and all(r.force is None and r.after == QUESTION for r in requests)
    assert len({r.seed for r in requests}) == len(requests)


@given(st.integers(0, 1000))
def test_first_rollout_of_a_tree_is_the_first_sample(seed):
    """Without search there is nothing to guide: rollout 0 is the same in both modes."""
    tree, sample = (trees(TokenExpander(mode=mode, rollouts=2), seed=seed)[0] for mode in ("tree", "sample"))
    assert tree.rollouts()[0].segments == sample.rollouts()[0].segments


def test_siblings_with_one_tag_have_contents_of_their_own():
    expander = TokenExpander(children="drawn", width=4, rollouts=30)
    twins = equal = 0
    for tree in trees(expander, ScriptedBackend(TABLE, stop=0.1), count=8):
        for kids in tree.children:
            texts = [(tree.tag(k), tree.segments[k].text) for k in kids if tree.segments[k]]
            if len({tag for tag, _ in texts}) < len(texts):
                twins += 1
                equal += len(set(texts)) == 1
    assert twins > 10 and equal < twins / 4  # short contents may be equal by chance


# -- functional prompts ------------------------------------------------------------------------------------------------


@given(
    max_depth=st.integers(1, 6),
    max_tokens=st.integers(1, 30),
    samples=st.integers(1, 3),
    segment=st.sampled_from([1, 3, 512]),
    seed=st.integers(0, 1000),
)
def test_prompted_trees_obey_their_part_of_the_table_and_budgets(
    prompts, max_depth, max_tokens, samples, segment, seed
):
    expander = PromptExpander(
        prompts=prompts,
        rollouts=6,
        samples=samples,
        max_depth=max_depth,
        max_tokens=max_tokens,
        sampling=Sampling(max_segment_tokens=segment),
    )
    backend = ScriptedBackend(TABLE)
    for tree in trees(expander, backend, 2, seed, parallel=2):
        for node in range(len(tree)):
            tags = [tree.tag(k) for k in tree.children[node]]
            if tags:
                rows = TABLE.prompted[tree.tag(node)]
                assert sorted(tags) == sorted(t for t in rows for _ in range(1 if t == "direct_answer" else samples))
        for rollout in tree.rollouts():
            tags = [QUESTION, *(step.tag for step in rollout.steps)]
            assert all(b in TABLE.prompted[a] for a, b in pairwise(tags))
            assert len(rollout.steps) <= max_depth and rollout.length <= max_tokens
            assert rollout.complete == (tags[-1] == "direct_answer" and rollout.segments[-1].closed)
            assert rollout.complete or rollout.score.value == 0
            assert {p for s in rollout.segments for p in s.provenance} <= {Provenance.SAMPLED}
    assert all(r.max_tokens >= 1 and r.after is None for batch in backend.batches for r in batch)


def test_prompted_requests_are_the_dialogue_so_far(prompts):
    expander, backend = PromptExpander(prompts=prompts, rollouts=5), ScriptedBackend(TABLE)
    [tree] = trees(expander, backend, count=1)
    asked = {backend.decode(r.prompt): r.force for batch in backend.batches for r in batch}
    path = tree.path(tree.leaves[0][0])
    for depth, node in enumerate(path):
        before = [f"[assistant] {tree.segments[k].text} [end]" for k in path[:depth]]
        question = tree.problem.question
        users = [
            f"[user] {question if i == 0 else ''} please {tree.tag(k)} [end]" for i, k in enumerate(path[: depth + 1])
        ]
        words = " ".join(" ".join(pair) for pair in zip(users, [*before, "[assistant]"], strict=True)).split()
        assert asked[" ".join(words)] == tree.tag(node)


def test_dialogue():
    chat = dialogue(
        "What?", [("clarify", "It is so."), ("next_step", "1+1=2")], {"clarify": "C", "next_step": "N"}, "next_step"
    )
    assert [tuple(message) for message in chat] == [
        ("user", "What?\n\nC"),
        ("assistant", "It is so."),
        ("user", "N"),
        ("assistant", "1+1=2"),
        ("user", "N"),
    ]


@pytest.mark.parametrize("final", ["one", None, ""])
def test_a_step_that_reaches_the_answer_ends_its_path(prompts, final):
    """But none that no output may follow: a subquestion may spell an answer."""
    tags, spelled = set(), 0
    answers = {tag for tag in TABLE.names if "output" in TABLE.legal(tag)}
    for tree in trees(PromptExpander(prompts=prompts, rollouts=10, final=final), count=5):
        for rollout in tree.rollouts():
            found = [bool(final) and step.tag in answers and final in step.text for step in rollout.steps]
            spelled += sum(bool(final) and final in step.text for step in rollout.steps[:-1])
            assert not any(found[:-1])
            last = rollout.segments[-1]
            assert rollout.complete == (last.closed and (found[-1] or last.tag == "direct_answer"))
            tags |= {last.tag for _ in range(rollout.complete)}
    assert ("next_step" in tags) == bool(final) == (spelled > 0)


def test_only_actions_that_are_asked_for_need_a_prompt(tmp_path):
    for name in ("clarify", "analyze", "subquestion", "next_step", "direct_answer"):
        (tmp_path / f"{name}.txt").write_text(name)
    PromptExpander(prompts=str(tmp_path))
    (tmp_path / "analyze.txt").unlink()
    with pytest.raises(UserError, match=r"no prompt for 'analyze'.*analyze.txt"):
        PromptExpander(prompts=str(tmp_path))


# -- every table -------------------------------------------------------------------------------------------------------


def tables(folder):
    """The phase-1 rows as a grammar, and a user's own table; both from YAML, as a config names them."""
    phase_one = {k: list(v) for k, v in TABLE.prompted.items()}
    return {"phase one": yaml_table(folder / "a", phase_one), "custom": yaml_table(folder / "b", CUSTOM)}


@pytest.mark.parametrize("which", ["phase one", "custom"])
@pytest.mark.parametrize("children", ["legal", "drawn"])
def test_every_path_of_every_tree_is_legal_under_its_own_table(which, children, tmp_path, prompts):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expander = TokenExpander(tokens=tables(tmp_path)[which], children=children, rollouts=20)
    prompted = PromptExpander(prompts=prompts, tokens=tables(tmp_path)[which], once=())
    for tree in (*trees(expander, count=20), *trees(prompted, count=10)):
        for node in range(len(tree)):
            assert expander.table.is_legal(tree.tag(k) for k in tree.path(node))
    assert expander.table.names == tuple(TokenTable.from_yaml(tables(tmp_path)[which]).names)


def test_masked_tags_never_come():
    backend = ScriptedBackend(TABLE.without("verify", "refine"))
    found = {s.tag for t in trees(TokenExpander(rollouts=30), backend, 10) for s in t.segments if s}
    assert not found & {"verify", "refine"} and len(found) == 6


# -- chain of thought, settings ----------------------------------------------------------------------------------------


def test_chain_of_thought_is_one_plain_segment(prompts):
    expander = ChainOfThought(prompts=prompts, rollouts=3, sampling=Sampling(temperature=1.0), max_tokens=7)
    backend = ScriptedBackend(TABLE)
    expander.table = TABLE
    for tree in trees(expander, backend, parallel=3):
        assert "please cot" in backend.decode(tree.prompt)
        for rollout in tree.rollouts():
            [segment] = rollout.segments
            assert segment.tag == "cot" and rollout.complete == segment.closed and len(segment.tokens) <= 7
            assert TABLE.render(rollout.steps) == segment.text
            assert tree.tokens(rollout.nodes[-1]) == tree.prompt + segment.tokens


@pytest.mark.parametrize("cap", [3, 512])
def test_only_max_tokens_cuts_a_chain_of_thought(prompts, cap):
    expander = ChainOfThought(prompts=prompts, sampling=Sampling(max_segment_tokens=cap), max_tokens=7)
    expander.table = TABLE
    for tree in trees(expander, ScriptedBackend(TABLE, stop=0.0)):
        [rollout] = tree.rollouts()
        assert rollout.length == 7 and not rollout.complete


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda prompts: TokenExpander(children="all"), "expander.children is 'all'; use one of legal, drawn"),
        (lambda prompts: TokenExpander(mode="beam"), "expander.mode is 'beam'; use one of tree, sample"),
        (lambda prompts: TokenExpander(rollouts=0), "expander.rollouts is 0; it must be at least 1"),
        (lambda prompts: TokenExpander(width=0), "expander.width"),
        (lambda prompts: TokenExpander(max_depth=0), "expander.max_depth"),
        (lambda prompts: TokenExpander(max_tokens=-1), "expander.max_tokens"),
        (lambda prompts: TokenExpander(c=-1.0), "expander.c is -1.0"),
        (lambda prompts: TokenExpander(tokens="no/such.yaml"), "cannot read the functional-token table"),
        (lambda prompts: PromptExpander(prompts="no/such"), "no prompt for 'analyze'"),
        (lambda prompts: PromptExpander(prompts=prompts, samples=0), "expander.samples"),
        (lambda prompts: PromptExpander(prompts=prompts, once=["answer"]), "expander.once names 'answer'"),
        (lambda prompts: PromptExpander(prompts=prompts, final="("), "expander.final is no regular expression"),
        (lambda prompts: ChainOfThought(prompts="no/such"), "no prompt for 'cot'"),
        (lambda prompts: Sampling(temperature=-1), "sampling out of range"),
        (lambda prompts: Sampling(boundary="best"), "sampling.boundary"),
    ],
)
def test_mistakes_in_settings_are_one_line(make, says, prompts):
    with pytest.raises(UserError) as error:
        make(prompts)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_read_prompts_strips(tmp_path):
    (tmp_path / "verify.txt").write_text("  check it\n\n")
    assert read_prompts(str(tmp_path), ["verify"]) == {"verify": "check it"}


def test_seeds_are_stable_and_distinct():
    assert seed_of(0, "p", 1, 2) == 1935208283146936749
    seeds = {seed_of(s, p, n, d) for s in range(3) for p in ("a", "b", "a0") for n in range(5) for d in range(5)}
    assert len(seeds) == 3 * 3 * 5 * 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 12) != seed_of(11, 2)


def test_expanders_hold_no_state():
    expander = TokenExpander(rollouts=4)
    before = dict(vars(expander))
    trees(expander)
    assert vars(expander) == before and dataclasses.is_dataclass(expander.sampling)
