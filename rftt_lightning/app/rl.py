"""``rftt rl fit --config configs/tiny/rl.yaml``: a LightningCLI whose trainer is the Fabric loop. Also validate and export."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from rftt_lightning.app.fit import FitCLI
from rftt_lightning.training.loop import RLTrainer
from rftt_lightning.training.problems import ProblemDataModule
from rftt_lightning.training.rl import RLModule


class RLCLI(FitCLI):
    NAMED = ("last", "best", "none")
    MARK = "settings"

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:
        super().parse_arguments(parser, args)
        asked = self.asked[self.asked.subcommand]
        for part in (asked.trainer, asked.model, asked.data):
            if part.seed is None:
                part.seed = asked.seed_everything

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(self.trainer_class, "trainer", instantiate=False, sub_configs=True)
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=self.subclass_mode_model)
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=self.subclass_mode_data)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: {"model", "datamodule"} for name in ("fit", "validate", "export")}


def main(args: list[str]) -> int | None:
    RLCLI(
        RLModule,
        ProblemDataModule,
        trainer_class=RLTrainer,
        args=args,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
    return 0
