"""What the ranks of a run tell each other. All of them make the same calls in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from lightning import Fabric
from torch import Tensor

from rftt_lightning.core.contracts import Unavailable

T = TypeVar("T")


def gather(value: T, world_size: int) -> list[T]:
    """The value of each of so many ranks, in their order; any that can be pickled."""
    found = [value] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(found, value)
    return found


class Ranks:
    """The processes of a run that ``fabric`` has launched, or is to launch; alone, each of these is what it has itself."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, element by element."""
        if self.fabric.world_size == 1:
            return value
        return self.fabric.all_reduce(value.to(self.fabric.device), reduce_op="sum")  # type: ignore[return-value]

    def total(self, value: float) -> float:
        """The sum of a number over ranks."""
        return float(self.sum(torch.tensor(float(value), dtype=torch.float64)))

    def gather(self, value: T) -> list[T]:
        """The value of each rank, in their order; any that can be pickled."""
        return gather(value, self.fabric.world_size)

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on this rank. Where it raises :class:`Unavailable` on one, all do: the others would wait for it in
        vain, and what is learned so far would not be saved."""
        trouble = ""
        try:
            result = work()
        except Unavailable as error:
            trouble = str(error)
        if heard := next(filter(None, self.gather(trouble)), None):
            raise Unavailable(heard)
        return result
