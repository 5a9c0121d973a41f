"""Every config is parsed by its command: an unknown key, a wrong type or a class that is not there is an error."""

import importlib
from pathlib import Path

import pytest
import yaml

from rftt_lightning.app.cli import COMMANDS, main
from rftt_lightning.core.contracts import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for top in ("configs", "experiments")
    for path in (ROOT / top).rglob("*.yaml")
    if not path.stem.startswith("tokens_")  # tables
)
WHOLE = [name for name in CONFIGS if Path(name).parent.name in ("tiny", "arithmetic", "countdown4")]
"""Configs of the embedded worlds: no parts, no overlays."""
FIT = {"sft", "prm", "rl"}  # commands with the subcommand fit


def command_of(name: str) -> list[str]:
    """``tiny/evaluate_cot.yaml`` is read by evaluate, ``tiny/sft.yaml`` by sft fit, ``demo/sweep.yaml`` by sweep."""
    command = Path(name).stem.partition("_")[0]
    return [command, "fit"] if command in FIT else [command]


def before(name: str) -> list[str]:
    """The arguments that a config follows: its command, and what a part of a config, or an overlay, is laid over."""
    folder = Path(name).parent.name
    if folder == "data":
        return ["evaluate", "--config", str(ROOT / "configs/tiny/evaluate.yaml"), "--source"]
    if folder == "strategy":
        return ["sft", "fit", "--config", str(ROOT / "configs/tiny/sft.yaml"), "--config"]
    if folder == "engine":
        return ["search", "--config", str(ROOT / "configs/qwen2.5-7b/search.yaml"), "--config"]
    if folder == "claims" and "_" in Path(name).stem:
        base = {
            "rl": "configs/tiny/rl.yaml",
            "evaluate": "configs/tiny/evaluate.yaml",
            "sweep": "experiments/claims/sweep.yaml",
        }[command_of(name)[0]]
        return [*command_of(name), "--config", str(ROOT / base), "--config"]
    if folder == "gsm8k-smoke":
        return [*command_of(name), "--config", str(ROOT / "configs/qwen2.5-7b" / Path(name).name), "--config"]
    return [*command_of(name), "--config"]


def parse(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Print the config that a file amounts to; raises what the command raises."""
    args = [*before(name), str(ROOT / name), "--print_config"]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(COMMANDS[args[0]][0]).main(args[1:])
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


def test_there_are_configs_for_every_phase_of_every_model():
    for folder in ("tiny", "qwen2.5-7b", "llama-3.1-8b"):
        for command in ("search", "curate", "sft", "rl", "evaluate"):
            assert f"configs/{folder}/{command}.yaml" in CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_parsed_by_its_command(name, capsys):
    printed = parse(name, capsys)
    assert yaml.safe_load(printed)


@pytest.mark.parametrize("name", WHOLE)
def test_printed_config_parses_to_itself(name, tmp_path, capsys):
    printed = parse(name, capsys)
    copy = tmp_path / "printed.yaml"
    copy.write_text(printed)
    again = [*command_of(name), "--config", str(copy), "--print_config"]
    with pytest.raises(SystemExit):
        main(again)
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)


@pytest.mark.parametrize("name", WHOLE)
def test_unknown_key_is_an_error(name, tmp_path):
    config = yaml.safe_load((ROOT / name).read_text())
    copy = tmp_path / "broken.yaml"
    copy.write_text(yaml.safe_dump({**config, "no_such_key": 1}))
    command, *rest = command_of(name)
    with pytest.raises(UserError, match="no_such_key") as error:
        importlib.import_module(COMMANDS[command][0]).main([*rest, "--config", str(copy)])
    assert "\n" not in str(error.value)
