"""Ragged batches of every signal that losses look at, in float64, with junk wherever there is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from softlabels.types import MASKED, NO_LABEL, LayerPair, Signals, layer_field

LAYERS = LayerPair(1, 2, then=LayerPair(2, 1))
LENGTHS = (4, 2, 0, 3)  # the third text is padding alone


def side(
    seed: int,
    *,
    lengths: Sequence[int] = LENGTHS,
    heads: int = 2,
    head_width: int = 3,
    width: int = 6,
    junk: float = 9.0,
) -> Signals:
    """Layers 0 to 2: hidden states, attention scores, and queries, keys and values of the same heads."""
    generator = torch.Generator().manual_seed(seed)
    rows, longest = len(lengths), max(lengths)
    fields: dict[str, tuple[int, ...]] = {}
    for layer in range(3):
        fields[layer_field("hidden", layer)] = (rows, longest, width)
        fields[layer_field("attention", layer) + "@scores"] = (rows, heads, longest, longest)
        for kind in ("query", "key", "value"):
            fields[layer_field(kind, layer)] = (rows, heads, longest, head_width)
    values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in fields.items()}
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    signals = Signals(values, mask, torch.full((rows,), NO_LABEL))
    return replace(signals, fields={name: with_junk(name, value, mask, junk) for name, value in values.items()})


def with_junk(name: str, values: Tensor, mask: Tensor, junk: float) -> Tensor:
    """`values` with `junk` (or NaN) at padding: of hidden states, of heads' vectors, or of keys and queries of maps."""
    tokens = mask != 0
    if name.startswith("attention"):
        return values.masked_fill(~(tokens[:, None, :, None] & tokens[:, None, None, :]), junk)
    shape = (len(mask), -1, 1) if values.dim() == 3 else (len(mask), 1, -1, 1)
    return values.masked_fill(~tokens.view(shape), junk)


def padded(signals: Signals, *, extra: int = 3, junk: float = -7.0) -> Signals:
    """The same batch with `extra` more positions of padding."""
    mask = F.pad(signals.mask, (0, extra))
    fields = {}
    for name, values in signals.fields.items():
        more = (0, extra, 0, extra) if name.startswith("attention") else (0, 0, 0, extra)
        fields[name] = with_junk(name, F.pad(values, more), mask, junk)
    return replace(signals, fields=fields, mask=mask)


def only(signals: Signals, *names: str) -> Signals:
    return replace(signals, fields={name: signals.fields[name] for name in names})


def with_field(signals: Signals, name: str, values: Tensor) -> Signals:
    return replace(signals, fields={**signals.fields, name: values})


def with_maps(signals: Signals, layer: int) -> Signals:
    """`signals` with the attention map of `layer` in place of its scores, as a cache keeps it: 0 at padding."""
    tokens = signals.mask != 0
    scores = signals.get(layer_field("attention", layer) + "@scores")
    maps = scores.masked_fill(~tokens[:, None, None, :], MASKED).softmax(dim=-1)
    maps = maps.masked_fill(~(tokens[:, None, :, None] & tokens[:, None, None, :]), 0)
    return replace(signals, fields={layer_field("attention", layer): maps})


def causal(signals: Signals) -> Signals:
    """`signals` with later keys masked in all scores."""
    fields = {}
    for name, values in signals.fields.items():
        later = torch.ones(values.shape[-2:], dtype=torch.bool).triu(1)
        fields[name] = values.masked_fill(later, MASKED) if name.endswith("@scores") else values
    return replace(signals, fields=fields)
