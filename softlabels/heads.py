"""The attention heads of a transformer student: which matter, which are zeroed, and how zeroed ones leave the model.

A head's importance is the mean over examples of |∂loss/∂ξ|, ξ being a factor on its output that is 1 (Michel et al.
2019, equation 2), here |Σ x · ∂loss/∂x| over the head's output x (L, K); scores of a layer are divided by their 2-norm,
as there. Without examples it is ‖W_v‖ · ‖W_o‖ of the head's own weights (Frobenius).

transformers has no configuration for layers with fewer heads, so a pruned student keeps its shapes and its head's
weights are zero: queries, keys, values, and what the output projection takes from it. The head then says nothing, and,
since the output projection's zeros are kept, gets no gradient. `remove_zero_heads` takes such heads out of a model that
is about to be exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softlabels.errors import StudentError

_PROJECTIONS = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj"))
_OUTPUTS = ("out_lin", "out_proj", "o_proj", "dense")  # beside them
_OUTPUT_OF_PARENT = "output.dense"  # BERT and its kin: attention.self.query, attention.output.dense


@dataclass(frozen=True, slots=True)
class Attention:
    """The projections of a layer's attention, and what its heads are."""

    name: str
    projections: tuple[nn.Linear, nn.Linear, nn.Linear]  # of queries, keys and values, (H · K, D)
    output: nn.Linear  # (D, H · K)
    heads: int  # H

    @property
    def width(self) -> int:
        """K, of one head."""
        return self.output.in_features // self.heads

    def span(self, head: int) -> slice:
        """The rows of the projections, and the columns of the output, that are of `head` (from 0)."""
        return slice(head * self.width, (head + 1) * self.width)

    def is_zero(self, head: int) -> bool:
        """Whether nothing of `head` reaches the layer's output."""
        return not bool(self.output.weight[:, self.span(head)].any())


def find_attention(student: nn.Module) -> list[Attention]:
    """The attention of each layer, the lowest first; StudentError for a student whose heads can't be told apart."""
    config = getattr(student, "config", None)
    kind = getattr(config, "model_type", type(student).__name__)
    heads = getattr(config, "num_attention_heads", None)
    modules = dict(student.named_modules())
    found = []
    for name in modules:
        for names in _PROJECTIONS:
            linears = [modules.get(f"{name}.{part}") for part in names]
            parent = name.rpartition(".")[0]
            outputs = [modules.get(f"{parent}.{_OUTPUT_OF_PARENT}"), *(modules.get(f"{name}.{o}") for o in _OUTPUTS)]
            output = next((module for module in outputs if isinstance(module, nn.Linear)), None)
            one, two, three = linears
            if not (isinstance(one, nn.Linear) and isinstance(two, nn.Linear) and isinstance(three, nn.Linear)):
                continue
            widths = {one.out_features, two.out_features, three.out_features, output.in_features if output else 0}
            if output is not None and len(widths) == 1 and isinstance(heads, int) and not widths.pop() % heads:
                found.append(Attention(name, (one, two, three), output, heads))
    if not found:
        raise StudentError(
            f"this student (a '{kind}') has no attention heads that can be pruned: give a magnitude instead"
        )
    return found


def prune_heads(student: nn.Module, share: float, *, importance: Tensor | None = None) -> list[str]:
    """Zero the `share` of `student`'s heads that matter least; LAYER.HEAD of each, numbered from 1.

    `importance` (layers, heads); by default `weigh_heads`. Every layer keeps its best head. StudentError where the
    share is more than that allows, or less than a head.
    """
    layers = find_attention(student)
    scores = (weigh_heads(student) if importance is None else importance).clone()
    total = scores.numel()
    count = math.floor(share * total + 0.5)
    if not 1 <= count <= total - len(layers):
        raise StudentError(
            f"a share of {share:g} of the student's {total} heads is {count}: it can lose 1 to {total - len(layers)} "
            f"({1 / total:g} to {(total - len(layers)) / total:g}), since each of its {len(layers)} layers keeps one"
        )
    for number, attention in enumerate(layers):
        gone = torch.tensor([attention.is_zero(head) for head in range(attention.heads)])
        scores[number, gone] = -1.0  # they go first
    scores.scatter_(1, scores.argmax(1, keepdim=True), torch.inf)
    chosen = sorted(scores.flatten().argsort(stable=True)[:count].tolist())
    heads = [[index // scores.shape[1], index % scores.shape[1]] for index in chosen]
    with torch.no_grad():
        for layer, head in heads:
            _zero(layers[layer], head)
    return [f"{layer + 1}.{head + 1}" for layer, head in heads]


def _zero(attention: Attention, head: int) -> None:
    span = attention.span(head)
    for projection in attention.projections:
        projection.weight[span] = 0.0
        if projection.bias is not None:
            projection.bias[span] = 0.0
    attention.output.weight[:, span] = 0.0


@torch.no_grad()
def weigh_heads(student: nn.Module) -> Tensor:
    """(layers, heads): ‖W_v‖ · ‖W_o‖ of each head, divided by the layer's 2-norm."""
    rows = []
    for attention in find_attention(student):
        values = attention.projections[2].weight.unflatten(0, (attention.heads, -1)).flatten(1).norm(dim=1)
        outputs = attention.output.weight.unflatten(1, (attention.heads, -1)).norm(dim=(0, 2))
        rows.append(values * outputs)
    return _even(torch.stack(rows))


class HeadScores:
    """Sums of |Σ x · ∂loss/∂x| over the examples that went through `student` inside `watch`."""

    def __init__(self, student: nn.Module) -> None:
        self.layers = find_attention(student)
        self.sums = torch.zeros(len(self.layers), self.layers[0].heads)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Inside, a backward pass of a sum over examples adds its examples' scores."""
        outputs = [attention.output for attention in self.layers]
        handles = [output.register_forward_pre_hook(self._tap(number)) for number, output in enumerate(outputs)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _tap(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states = inputs[0]  # (B, L, H · K)

            def add(gradient: Tensor) -> None:
                heads = (states.detach() * gradient).unflatten(-1, (self.sums.shape[1], -1))  # (B, L, H, K)
                self.sums[layer] += heads.sum((1, 3)).abs().sum(0).cpu()

            states.register_hook(add)

        return before

    def importance(self) -> Tensor:
        """(layers, heads), each layer divided by its 2-norm."""
        return _even(self.sums)


def _even(scores: Tensor) -> Tensor:
    return scores / scores.norm(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


@torch.no_grad()
def remove_zero_heads(student: nn.Module) -> int:
    """Take heads that say nothing out of `student`, in place; how many. Layers shared by others stay as they are.

    Afterwards its shapes are no longer its config's: it can be run and exported, but not saved.
    """
    try:
        layers = find_attention(student)
    except StudentError:
        return 0
    removed = 0
    for attention in layers:
        kept = [head for head in range(attention.heads) if not attention.is_zero(head)] or [0]
        if len(kept) == attention.heads:
            continue
        columns = torch.cat([torch.arange(attention.output.in_features)[attention.span(head)] for head in kept])
        for projection in attention.projections:
            projection.weight = nn.Parameter(projection.weight[columns].clone())
            if projection.bias is not None:
                projection.bias = nn.Parameter(projection.bias[columns].clone())
            projection.out_features = len(columns)
        attention.output.weight = nn.Parameter(attention.output.weight[:, columns].clone())
        attention.output.in_features = len(columns)
        removed += attention.heads - len(kept)
    return removed
