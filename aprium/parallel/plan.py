"""Which part of each parameter a process holds: a table from names to placements.

A parameter is cut along one dimension an axis, section by section where it holds several matrices
or kinds of channels side by side; what the table does not name is whole on every process. The cuts
over the data axis are not here: FSDP makes them of what this leaves. Cuts and checkpoints speak of
the same `Piece`s. Source: arXiv 1909.08053 for columns and rows.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor

from aprium.parallel.mesh import Axis, Mesh


class Cut(NamedTuple):
    """A cut of dimension `dim` over `axis`, in each of the sections `sections` of it by itself.

    `sections` names an entry of `Plan.sections`; "" is one section.
    """

    axis: str
    dim: int
    sections: str = ""


class Piece(NamedTuple):
    """A block of a whole tensor, and where it lies in a process's part of it."""

    whole: tuple[slice, ...]
    part: tuple[slice, ...]


# The first pattern that fits a name decides.
TABLE: tuple[tuple[str, tuple[Cut, ...]], ...] = (
    ("*.mixer.in_proj.*", (Cut("tp", 0, "in_proj"),)),
    ("*.mixer.conv1d.*", (Cut("tp", 0, "conv1d"),)),
    ("*.mixer.A_log", (Cut("tp", 0),)),
    ("*.mixer.D", (Cut("tp", 0),)),
    ("*.mixer.dt_bias", (Cut("tp", 0),)),
    ("*.mixer.norm.weight", (Cut("tp", 0),)),
    ("*.mixer.out_proj.weight", (Cut("tp", 1),)),
    ("*.mixer.q_proj.weight", (Cut("tp", 0),)),
    ("*.mixer.k_proj.weight", (Cut("tp", 0),)),
    ("*.mixer.v_proj.weight", (Cut("tp", 0),)),
    ("*.mixer.o_proj.weight", (Cut("tp", 1),)),
    ("*.mixer.experts.up_proj.weight", (Cut("ep", 0), Cut("tp", 1))),
    ("*.mixer.experts.down_proj.weight", (Cut("ep", 0), Cut("tp", 2))),
    ("*.up_proj.weight", (Cut("tp", 0),)),
    ("*.up_proj.bias", (Cut("tp", 0),)),
    ("*.down_proj.weight", (Cut("tp", 1),)),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The table for one model on one mesh.

    `sections` are sizes of the sections that the table names; `whole` are patterns of parameters
    that stay whole although the table cuts them.
    """

    mesh: Mesh
    sections: Mapping[str, Sequence[int]]
    whole: tuple[str, ...] = ()

    def cuts(self, name: str) -> tuple[Cut, ...]:
        """Return the cuts of parameter `name` over axes with more than one process."""
        if any(fnmatchcase(name, pattern) for pattern in self.whole):
            return ()
        found = next((cuts for pattern, cuts in TABLE if fnmatchcase(name, pattern)), ())
        return tuple(cut for cut in found if self._axis(cut).size > 1)

    def whole_shape(self, name: str, part: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the whole parameter of which this process holds `part`."""
        shape = list(part)
        for cut in self.cuts(name):
            shape[cut.dim] *= self._axis(cut).size
        return tuple(shape)

    def pieces(self, name: str, shape: Sequence[int], tp: int | None = None) -> list[Piece]:
        """Return the pieces of parameter `name`, whole `shape`, that this process holds.

        `tp` asks for another process of the tp axis.
        """
        ranges = [[(slice(0, size), slice(0, size))] for size in shape]
        for cut in self.cuts(name):
            axis = self._axis(cut)
            index = tp if tp is not None and cut.axis == "tp" else axis.index
            sections = self.sections[cut.sections] if cut.sections else (shape[cut.dim],)
            assert sum(sections) == shape[cut.dim]
            ranges[cut.dim] = _cut(sections, axis.size, index)
        return [
            Piece(tuple(whole for whole, _ in block), tuple(part for _, part in block))
            for block in itertools.product(*ranges)
        ]

    def take(self, name: str, whole: Tensor) -> Tensor:
        """Return this process's part of the whole parameter `name`."""
        if not self.cuts(name):
            return whole
        pieces = self.pieces(name, whole.shape)
        part = whole.new_empty(part_shape(pieces))
        for piece in pieces:
            part[piece.part] = whole[piece.whole]
        return part

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Return parameter `name` whole along the tp axis from the parts of its processes."""
        plan = self._along_tp()
        shape = plan.whole_shape(name, parts[0].shape)
        out = parts[0].new_empty(shape)
        for index, part in enumerate(parts):
            for piece in plan.pieces(name, shape, tp=index):
                out[piece.whole] = part[piece.part]
        return out

    def part_along_tp(self, name: str, joined: Tensor) -> Tensor:
        """Return this process's part of what `join` gave."""
        return self._along_tp().take(name, joined)

    def _along_tp(self) -> "Plan":
        return Plan(mesh=Mesh(tp=self.mesh.tp), sections=self.sections, whole=self.whole)

    def _axis(self, cut: Cut) -> Axis:
        return self.mesh.tp if cut.axis == "tp" else self.mesh.ep


def part_shape(pieces: Sequence[Piece]) -> list[int]:
    """Return the shape of the part that `pieces` make up."""
    return [
        max(bounds.stop for bounds in dim) for dim in zip(*(p.part for p in pieces), strict=True)
    ]


def _cut(sections: Sequence[int], size: int, index: int) -> list[tuple[slice, slice]]:
    """Return the ranges of share `index` of `size` in the whole, and where they lie in the part."""
    ranges, begin, done = [], 0, 0
    for section in sections:
        assert section % size == 0
        width = section // size
        first = begin + width * index
        ranges.append((slice(first, first + width), slice(done, done + width)))
        begin, done = begin + section, done + width
    return ranges
