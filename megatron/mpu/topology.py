"""Which rank sits where: pure arithmetic, no process groups, no torch.

Ranks are numbered in Megatron's order: tensor parallel (tp) fastest, then context parallel (cp), data parallel (dp)
and pipeline parallel (pp). Neighbouring ranks, which share the fastest links, so form the groups that talk most.
Expert parallel (ep) ranks are not an axis of their own: they are consecutive ranks of the dp x cp plane. Neither are
those that share a sequence by heads ("ulysses"): they are consecutive ranks of cp, and "ring" goes from one such block
to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

AXES = ("tp", "cp", "dp", "pp")
_FLAGS = {
    "tp": "--tensor-model-parallel-size",
    "cp": "--context-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "ep": "--expert-model-parallel-size",
    "ulysses": "--ds-sequence-parallel-size",
}


@dataclass(frozen=True)
class Place:
    """Coordinates of one rank along each axis, each counted from 0."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Topology:
    """The shape of a job: `world_size` ranks as a grid pp x dp x cp x tp; dp follows from the other sizes.

    Args:
        world_size: number of ranks, one per device.
        tp: ranks that share each layer's weights (tensor parallel).
        cp: ranks that share each sequence (context parallel).
        pp: groups of layers, each on its own ranks (pipeline parallel).
        ep: ranks that share each layer's experts; they are taken from dp x cp.
        ulysses: ranks of cp that share each sequence by heads within attention; the others do so by keys and values.

    Raises:
        ValueError: if a size is below 1, or the sizes do not divide the number of ranks.
    """

    world_size: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"world size is {self.world_size}; it must be at least 1")
        for axis, flag in _FLAGS.items():
            if getattr(self, axis) < 1:
                raise ValueError(f"{flag} is {getattr(self, axis)}; it must be at least 1")
        model = self.tp * self.cp * self.pp
        if self.world_size % model:
            raise ValueError(
                f"{self.world_size} ranks cannot be divided into groups of tp {self.tp} x cp {self.cp} x pp {self.pp} "
                f"= {model}; change {_FLAGS['tp']}, {_FLAGS['cp']} or {_FLAGS['pp']}, or the number of ranks"
            )
        if (self.dp * self.cp) % self.ep:
            raise ValueError(
                f"{_FLAGS['ep']} is {self.ep}; it must divide data parallel {self.dp} x context parallel {self.cp} "
                f"= {self.dp * self.cp}"
            )
        if self.cp % self.ulysses:
            raise ValueError(f"{_FLAGS['ulysses']} is {self.ulysses}; it must divide cp {self.cp}")

    @property
    def dp(self) -> int:
        """Number of data-parallel replicas."""
        return self.world_size // (self.tp * self.cp * self.pp)

    def size(self, *axes: str) -> int:
        """Number of ranks in a group that spans the given axes."""
        return prod(getattr(self, axis) for axis in axes)

    def place(self, rank: int) -> Place:
        """Coordinates of a rank.

        Raises:
            ValueError: if there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a world of {self.world_size} ranks")
        coordinates = {}
        for axis in AXES:
            rank, coordinates[axis] = divmod(rank, self.size(axis))
        return Place(**coordinates)

    def rank(self, place: Place) -> int:
        """The rank at the given coordinates; the inverse of `place`."""
        rank = 0
        for axis in reversed(AXES):
            rank = rank * self.size(axis) + getattr(place, axis)
        return rank

    def groups(self, *axes: str) -> list[list[int]]:
        """All groups that span the given axes: ranks in one group differ only along these axes.

        Args:
            axes: one or more of "tp", "cp", "dp", "pp"; or "ep", "ulysses" or "ring" alone.

        Returns:
            Lists of ranks, each ascending, ordered by their first rank; together every rank exactly once.

        Raises:
            ValueError: for a name that is no axis.
        """
        if axes == ("ep",):
            planes = self.groups("cp", "dp")
            blocks = [plane[at : at + self.ep] for plane in planes for at in range(0, len(plane), self.ep)]
            return sorted(blocks)
        if axes == ("ulysses",):
            lines = self.groups("cp")
            return sorted(line[at : at + self.ulysses] for line in lines for at in range(0, self.cp, self.ulysses))
        if axes == ("ring",):
            return sorted(line[at :: self.ulysses] for line in self.groups("cp") for at in range(self.ulysses))
        unknown = set(axes) - set(AXES)
        if unknown or not axes:
            raise ValueError(f"axes {axes} are not among {AXES}, nor ('ep',), ('ulysses',) or ('ring',)")
        fixed = [axis for axis in AXES if axis not in axes]
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.place(rank)
            found.setdefault(tuple(getattr(place, axis) for axis in fixed), []).append(rank)
        return sorted(found.values())
