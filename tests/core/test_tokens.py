import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rftt_lightning.core.contracts import QUESTION, Step, UserError
from rftt_lightning.core.tokens import DEFAULT_TABLE, TokenTable

TABLE = TokenTable.from_yaml()
TEXTS = st.text(st.characters(codec="utf-8")).filter(lambda text: not any(tag in text for tag in TABLE.tags))
STEPS = st.lists(st.builds(Step, st.sampled_from(TABLE.names), TEXTS))


def default() -> dict:
    return yaml.safe_load(DEFAULT_TABLE.read_text())


@given(STEPS)
def test_parse_undoes_render(steps):
    assert TABLE.parse(TABLE.render(steps)) == steps


@given(STEPS, st.sampled_from(["\n", " ", "\n\n  "]))
def test_parse_ignores_space_between_segments(steps, space):
    assert TABLE.parse(space.join(TABLE.render([step]) for step in steps) + space) == steps


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "<verify>a",
        "<verify>a</refine>",
        "<verify>a<refine>b</refine></verify>",
        "<verify>a</verify>b",
        "</verify>",
        "<verify>a</verify><unknown>b</unknown>",
    ],
)
def test_parse_refuses_what_render_never_writes(text):
    with pytest.raises(ValueError):
        TABLE.parse(text)


def test_a_chain_of_thought_renders_as_plain_text():
    assert TABLE.render([Step("cot", "so 7")]) == "so 7"


def test_default_table_is_the_papers():
    assert TABLE.names == tuple("clarify analyze subquestion next_step direct_answer verify refine output".split())
    assert len(set(TABLE.tags)) == 16
    assert [name for name in TABLE.names if TABLE.terminal(name)] == ["output"]
    assert TABLE.legal(QUESTION) == ("clarify", "analyze", "subquestion", "next_step")
    assert TABLE["verify"].open == "<verify>" and TABLE["verify"].close == "</verify>"


@given(st.lists(st.sampled_from(TABLE.names), max_size=6))
def test_is_legal_is_a_walk_through_the_rows(tags):
    assert TABLE.is_legal(tags) == all(b in TABLE.legal(a) for a, b in zip([QUESTION, *tags], tags, strict=False))


def test_clarify_comes_at_depth_one_only():
    assert not any("clarify" in row for name, row in TABLE.grammar.items() if name != QUESTION)


def test_without_masks_tags_and_keeps_the_vocabulary():
    masked = TABLE.without("verify", "refine")
    assert masked.tags == TABLE.tags
    assert not any({"verify", "refine"} & set(row) for row in masked.grammar.values())
    assert masked.legal("next_step") == ("next_step", "direct_answer", "subquestion", "output")


@pytest.mark.parametrize(
    "names, says",
    [
        (["verfy"], "not among the tokens"),
        (["output"], "no way from"),
        (["next_step", "direct_answer"], "leaves nothing that may follow"),
    ],
)
def test_masks_that_cannot_be(names, says):
    with pytest.raises(UserError, match=says) as error:
        TABLE.without(*names)
    assert_one_line(error)


def set_row(part, name, row):
    def change(data):
        data[part][name] = row

    return change


def drop(part, *keys):
    def change(data):
        for key in keys:
            data[part].pop(key)

    return change


def token(**entry):
    return lambda data: data["tokens"].append(entry)


MISTAKES = {
    "no grammar": (lambda d: d.pop("grammar"), "(needs tokens, grammar, prompted): 'grammar'"),
    "no tokens": (lambda d: d.update(tokens=[]), "not among the tokens"),
    "tokens is a word": (lambda d: d.update(tokens="verify"), "no functional-token table"),
    "grammar is a list": (lambda d: d.update(grammar=["verify"]), "no functional-token table"),
    "token twice": (token(name="verify", description="again"), "distinct lower-case words"),
    "token called question": (token(name="question", description="q"), "distinct lower-case words"),
    "upper case": (token(name="Plan", description="p"), "distinct lower-case words"),
    "name is a number": (token(name=1, description="p"), "no functional-token table"),
    "unknown key": (token(name="plan", description="p", colour="red"), "colour"),
    "no description": (token(name="plan"), "description"),
    "no root": (drop("grammar", "question"), "no path could begin"),
    "empty root": (set_row("prompted", "question", []), "no path could begin"),
    "unknown follower": (set_row("grammar", "verify", ["guess"]), "'guess'"),
    "unknown row": (set_row("grammar", "guess", ["verify"]), "'guess'"),
    "back to the question": (set_row("grammar", "verify", ["question"]), "'question'"),
    "follower twice": (set_row("grammar", "verify", ["refine", "refine"]), "twice"),
    "missing row": (drop("grammar", "refine"), "no row 'refine'"),
    "row is a word": (set_row("grammar", "verify", "refine"), "not among the tokens"),
    "row is a number": (set_row("grammar", "verify", 3), "no functional-token table"),
    "row of lists": (set_row("grammar", "verify", [["refine"]]), "no functional-token table"),
    "no terminal": (set_row("grammar", "output", ["verify"]), "no way from"),
    "a trap": (set_row("prompted", "next_step", ["next_step"]), "no way from 'next_step'"),
}


@pytest.mark.parametrize("change, says", MISTAKES.values(), ids=MISTAKES.keys())
def test_every_mistake_in_a_table_is_one_line(change, says, tmp_path):
    data = default()
    change(data)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError) as error:
        TokenTable.from_yaml(path)
    assert says in str(error.value) and str(path) in str(error.value)
    assert_one_line(error)


@pytest.mark.parametrize("content", [b"", b"tokens: [", b"\xff\xfe\x00", b"just words", b"- a\n- b"])
def test_files_that_are_no_table(content, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no functional-token table") as error:
        TokenTable.from_yaml(path)
    assert_one_line(error)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot read") as error:
            TokenTable.from_yaml(path)
        assert_one_line(error)


def test_a_bare_row_is_an_empty_one(tmp_path):
    data = default()
    data["grammar"]["output"] = None
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    assert TokenTable.from_yaml(path) == TABLE


def assert_one_line(error):
    assert "\n" not in str(error.value)
