"""Which part of the model each pipeline rank holds: pure arithmetic, no process groups, no torch.

The layers are cut into stages, in order. With one stage per rank, stage i is on rank i. With several stages per rank
("virtual stages", arXiv:2104.04473 section 2.2) they are dealt out in rounds: either every round from the first rank
to the last ("loop"), or there and back ("vee", arXiv:2401.10241 section 6), which puts the last stage on the first
rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

Placement = Literal["loop", "vee"]


@dataclass(frozen=True)
class StageLayout:
    """Stages, their layers and their ranks.

    Args:
        ranks: pipeline ranks.
        layers: number of layers of each stage, in order; as many stages for every rank.
        placement: how stages are dealt out.

    Raises:
        ValueError: if the ranks cannot have equally many stages.
    """

    ranks: int
    layers: tuple[int, ...]
    placement: Placement = "loop"

    def __post_init__(self) -> None:
        if self.ranks < 1 or not self.layers or len(self.layers) % self.ranks:
            raise ValueError(f"{len(self.layers)} stages cannot be dealt out to {self.ranks} pipeline ranks")

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.layers)

    @property
    def chunks(self) -> int:
        """Stages of each rank."""
        return len(self.layers) // self.ranks

    @property
    def last(self) -> int:
        """The stage that ends in the loss."""
        return len(self.layers) - 1

    def rank_of(self, stage: int) -> int:
        """The rank that holds a stage."""
        turn, place = divmod(stage, self.ranks)
        return self.ranks - 1 - place if self.placement == "vee" and turn % 2 else place

    def stage_of(self, rank: int, chunk: int) -> int:
        """A rank's stage of round `chunk`; the inverse of `rank_of`."""
        place = self.ranks - 1 - rank if self.placement == "vee" and chunk % 2 else rank
        return chunk * self.ranks + place

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, in order."""
        return tuple(self.stage_of(rank, chunk) for chunk in range(self.chunks))

    def layers_of(self, stage: int) -> range:
        """Global numbers of the layers of a stage."""
        ends = list(accumulate(self.layers))
        return range(ends[stage] - self.layers[stage], ends[stage])
