"""Maps from one side's width to the other's, so that hidden states of different widths can be compared.

They are trained with the student and kept in its checkpoints, and are no part of what it leaves behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

_ACTIVATIONS: Mapping[str, type[nn.Module]] = {"linear": nn.Identity, "relu": nn.ReLU, "tanh": nn.Tanh}


@dataclass(frozen=True, slots=True)
class ProjectionSpec:
    """The projections of one loss term."""

    term: str  # its name in the objective
    kind: Literal["linear", "relu", "tanh"]  # what stands behind the linear map
    widths: tuple[tuple[int, int], ...]  # of what comes into each map, and of what goes out
    shared: bool  # the first map serves for all
    lr_scale: float  # its learning rate, as a multiple of the student's


class Projections(nn.Module):
    """The projections of a phase: act(W·h + b), W as torch initialises a linear layer."""

    def __init__(self, specs: list[ProjectionSpec]) -> None:
        super().__init__()
        self.specs = {spec.term: spec for spec in specs}
        self.maps = nn.ModuleDict(
            {
                _key(spec, index): nn.Sequential(nn.Linear(*widths), _ACTIVATIONS[spec.kind]())
                for spec in specs
                for index, widths in enumerate(spec.widths[:1] if spec.shared else spec.widths)
            }
        )

    def forward(self, term: str, index: int, states: Tensor) -> Tensor:
        """(B, L, one width) to (B, L, the other), by map `index` of the term."""
        return self.maps[_key(self.specs[term], index)](states)

    def of(self, term: str) -> list[nn.Parameter]:
        """The parameters of a term's projections."""
        spec = self.specs[term]
        keys = {_key(spec, index) for index in range(len(spec.widths))}
        return [parameter for key in sorted(keys) for parameter in self.maps[key].parameters()]


def _key(spec: ProjectionSpec, index: int) -> str:
    return spec.term if spec.shared else f"{spec.term}:{index}"
