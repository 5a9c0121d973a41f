"""``rftt tokens``: the first experiment of a reader of the paper."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rftt_lightning.app import cli
from rftt_lightning.app.tokens import probabilities
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.vocab import add_functional_tokens, load
from rftt_lightning.tiny.model import build_tokenizer

BASE = "pkg:tiny/checkpoints/countdown"
TABLE = TokenTable.from_yaml()


def test_every_token_is_one_id_and_may_be_sampled_before_and_after(tmp_path, capsys):
    assert cli.main(["tokens", "--model", BASE, "--save", str(tmp_path)]) == 0
    assert "16 of 16 functional tags were added" in capsys.readouterr().out
    assert cli.main(["tokens", "--model", str(tmp_path), "--trained", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "0 of 16 functional tags were added" in said
    _, tokenizer = load(str(tmp_path), "float32")
    for token in TABLE.tokens:
        cells = cells_of(said, token.open)
        ids = [tokenizer.convert_tokens_to_ids(tag) for tag in (token.open, token.close)]
        assert cells[:3] == [token.open, *map(str, ids)]
        norm, before, norm_again, after = map(float, cells[3:])
        assert norm == norm_again > 0 and 1 > before == after > 0


def cells_of(said: str, name: str) -> list[str]:
    """Cells of the one table row that ``name`` begins."""
    rows = [[cell.strip() for cell in re.split("[│┃|]", line) if cell.strip()] for line in said.splitlines()]
    (found,) = [row for row in rows if row[:1] == [name]]
    return found


def untied(folder, shift: float = 0.0, words: str = "3 7 12 target 9") -> None:
    """A random model whose head is a matrix of its own, with functional tokens; ``shift`` is added to both matrices."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(words.split(), 20)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **shape))
    add_functional_tokens(model, tokenizer, TABLE)
    with torch.no_grad():
        for head in (model.get_input_embeddings(), model.get_output_embeddings()):
            head.weight += shift
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_head_of_its_own_is_shown_too(tmp_path, capsys):
    untied(tmp_path / "before")
    untied(tmp_path / "after", shift=0.1)
    assert cli.main(["tokens", "--model", str(tmp_path / "before"), "--trained", str(tmp_path / "after")]) == 0
    said = capsys.readouterr().out
    norms = []
    for name in ("before", "after"):
        model, tokenizer = load(str(tmp_path / name), "float32")
        opening = tokenizer.convert_tokens_to_ids("<verify>")
        norms += [head.weight[opening].norm() for head in (model.get_input_embeddings(), model.get_output_embeddings())]
    cells = cells_of(said, "<verify>")
    assert [*cells[3:5], *cells[6:8]] == [f"{norm:.3f}" for norm in norms]
    for title in ("input rows, before", "output rows, before", "input rows, after", "output rows, after"):
        assert f"cosine similarity of {title}" in said


def test_only_a_model_of_the_same_vocabulary_is_compared(tmp_path, capsys):
    untied(tmp_path / "before")
    untied(tmp_path / "other", words="3 7 12 target 9 and more words")
    assert cli.main(["tokens", "--model", str(tmp_path / "before"), "--trained", str(tmp_path / "other")]) == 2
    assert "under other ids" in capsys.readouterr().err
    assert cli.main(["tokens", "--model", str(tmp_path / "before"), "--trained", BASE]) == 2
    assert "no functional token <clarify>" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, said",
    [
        (["--save", "/proc/x"], "cannot write to /proc/x"),
        (["--save", __file__], "File exists; choose another --save"),
        (["--save="], "--save is empty"),
        (["--questions=[]"], "questions is empty"),
    ],
)
def test_mistakes_are_one_line(args, said, capsys):
    assert cli.main(["tokens", "--model", BASE, *args]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err


def test_probabilities_are_means_over_the_states_in_which_a_token_is_legal():
    """A model that finds all tokens equally likely gives each the mean of 1 / (number of legal ones)."""
    model, tokenizer = load(BASE, "float32")
    add_functional_tokens(model, tokenizer, TABLE)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits 0
    found = probabilities(model, tokenizer, TABLE, ["3 7 12 target 9"])
    rows = [TABLE.legal(after) for after in ("question", *TABLE.names)]
    for name, chance in zip(TABLE.names, found.tolist(), strict=True):
        chances = [1 / len(row) for row in rows if name in row]
        assert abs(chance - sum(chances) / len(chances)) < 1e-6
