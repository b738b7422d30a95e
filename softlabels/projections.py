"""Maps from the student's width to the teacher's, so that hidden states of different widths can be compared.

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
    student_width: int
    teacher_width: int
    pairs: int  # of layers
    shared: bool  # one map for all pairs
    lr_scale: float  # its learning rate, as a multiple of the student's


class Projections(nn.Module):
    """The projections of a phase: act(W·h + b), W as torch initialises a linear layer."""

    def __init__(self, specs: list[ProjectionSpec]) -> None:
        super().__init__()
        self.specs = {spec.term: spec for spec in specs}
        self.maps = nn.ModuleDict(
            {
                _key(spec, index): nn.Sequential(
                    nn.Linear(spec.student_width, spec.teacher_width), _ACTIVATIONS[spec.kind]()
                )
                for spec in specs
                for index in range(1 if spec.shared else spec.pairs)
            }
        )

    def forward(self, term: str, index: int, states: Tensor) -> Tensor:
        """(B, L, student's width) to (B, L, teacher's width), for pair `index` of the term."""
        return self.maps[_key(self.specs[term], index)](states)

    def of(self, term: str) -> list[nn.Parameter]:
        """The parameters of a term's projections."""
        spec = self.specs[term]
        keys = {_key(spec, index) for index in range(spec.pairs)}
        return [parameter for key in sorted(keys) for parameter in self.maps[key].parameters()]


def _key(spec: ProjectionSpec, index: int) -> str:
    return spec.term if spec.shared else f"{spec.term}:{index}"
