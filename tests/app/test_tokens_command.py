"""``rftt tokens``: the first experiment of a reader of the paper."""

import re

import torch

from rftt_lightning.app import cli
from rftt_lightning.app.tokens import probabilities
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.vocab import add_functional_tokens, load

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
        (row,) = [line for line in said.splitlines() if re.search(f"{re.escape(token.open)} .*1, 1", line)]
        cells = [cell.strip() for cell in re.split("[│┃|]", row) if cell.strip()]
        ids = [tokenizer.convert_tokens_to_ids(tag) for tag in (token.open, token.close)]
        assert cells[:3] == [token.open, *map(str, ids)]
        norm, before, norm_again, after = map(float, cells[4:])
        assert norm == norm_again > 0 and 1 > before == after > 0


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
