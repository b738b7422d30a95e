"""What can be taken from a running teacher.

A capture is a module with two functions: `fields(request, forward, codec=…)` says which cache fields it gives and what
they look like, from one forward pass; `take(request, forward)` gives their values for a batch, (B, …) tensors laid out
as the cache stores them. A new capture is one file here and one line in `CAPTURES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softlabels.cache.format import FieldSpec
from softlabels.captures import attention, hidden, logits, qkv
from softlabels.captures.attention_tap import NAME, Tap, tap
from softlabels.captures.forward import Forward, Request
from softlabels.config import suggest
from softlabels.errors import ConfigError, TeacherError
from softlabels.types import TokenBatch

Codec = Literal["float32", "float16", "bfloat16", "int8"]


class Capture(Protocol):
    """The contract of a capture module."""

    def fields(self, request: Request, forward: Forward, *, codec: Codec) -> dict[str, FieldSpec]: ...

    def take(self, request: Request, forward: Forward) -> dict[str, Tensor]: ...


CAPTURES: Mapping[str, Capture] = {"logits": logits, "hidden": hidden, "qkv": qkv, "attention": attention}

_FIRST_LAYER = {"hidden": 0, "qkv": 1, "attention": 1}  # hidden state 0 is the embedding output


def parse_captures(items: Sequence[str]) -> list[Request]:
    """`['logits', 'hidden:3,6', 'qkv:5-6', 'hidden:all@cls']` as requests; ConfigError says what is wrong."""
    requests = []
    for item in items:
        name, colon, rest = item.partition(":")
        if name not in CAPTURES:
            raise ConfigError(f"no capture '{name}': there are {', '.join(CAPTURES)}.{suggest(name, CAPTURES)}")
        if name == "logits":
            if colon:
                raise ConfigError(f"--capture {item}: logits take no layers")
            requests.append(Request(name))
            continue
        layers, at, pooled = rest.partition("@")
        if not layers:
            raise ConfigError(f"--capture {item}: say which layers, for example {name}:6 or {name}:1-6 or {name}:all")
        if at and (name != "hidden" or pooled != "cls"):
            raise ConfigError(f"--capture {item}: only hidden:LAYERS@cls is known behind an @")
        requests.append(Request(name, _parse_layers(layers, item), pooled))
    if len(set(requests)) != len(requests):
        raise ConfigError("the same --capture is given twice")
    return requests


def _parse_layers(text: str, item: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(
                f"--capture {item}: '{part}' is no layer; write numbers and ranges such as 3,6 or 1-6, or all"
            )
        layers.update(range(int(first), int(last or first) + 1))
    if not layers:
        raise ConfigError(f"--capture {item}: an empty range of layers; write it upwards, such as 1-6")
    return tuple(sorted(layers))


def resolve_layers(requests: Sequence[Request], *, layers: int) -> list[Request]:
    """Requests with 'all' written out, for a model of `layers` layers; ConfigError for layers it does not have."""
    resolved = []
    for request in requests:
        if request.capture not in _FIRST_LAYER:
            resolved.append(request)
            continue
        first = _FIRST_LAYER[request.capture]
        wanted = request.layers if request.layers is not None else tuple(range(first, layers + 1))
        missing = [layer for layer in wanted if not first <= layer <= layers]
        if missing:
            raise ConfigError(
                f"--capture {request.capture}: the teacher has no layer {', '.join(map(str, missing))}; "
                f"it has {first} to {layers}"
            )
        resolved.append(Request(request.capture, wanted, request.pooled))
    return resolved


@dataclass(frozen=True, slots=True)
class TeacherRun:
    """A teacher set up for some captures: how its forward pass must be called to give them."""

    model: PreTrainedModel
    requests: list[Request]
    hidden_states: bool
    tapped: bool
    eager_maps: bool  # the model bypasses the attention interface: its own maps are taken instead

    @torch.no_grad()
    def forward(self, batch: TokenBatch) -> Forward:
        """Run the teacher once and keep what the captures look at."""
        inputs = batch.model_inputs()
        sink = Tap()
        if self.tapped:
            inputs[NAME] = sink  # type: ignore[assignment]  # an opaque object that reaches every layer
        output = self.model(
            **inputs, output_hidden_states=self.hidden_states, output_attentions=self.eager_maps, return_dict=True
        )
        return Forward(
            logits=output.logits,
            hidden_states=output.hidden_states if self.hidden_states else None,
            attention_calls=sink.calls,
            attention_maps=output.attentions if self.eager_maps else None,
            mask=batch.attention_mask,
        )

    def fields(self, batch: TokenBatch, *, codec: Codec) -> dict[str, FieldSpec]:
        """Every field these captures give and its shape, seen on one small batch rather than guessed from a config."""
        forward = self.forward(batch)
        specs: dict[str, FieldSpec] = {}
        for request in self.requests:
            specs.update(CAPTURES[request.capture].fields(request, forward, codec=codec))
        return specs

    def take(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Every field's values for `batch`."""
        forward = self.forward(batch)
        values: dict[str, Tensor] = {}
        for request in self.requests:
            values.update(CAPTURES[request.capture].take(request, forward))
        return values


def prepare(model: PreTrainedModel, requests: Sequence[Request], probe: TokenBatch) -> TeacherRun:
    """Set `model` up for `requests`. `probe`, any small batch, shows whether its attention can be tapped."""
    resolved = resolve_layers(requests, layers=model.config.num_hidden_layers)
    names = {request.capture for request in resolved}
    wants_attention = bool(names & {"qkv", "attention"})
    run = TeacherRun(model, resolved, "hidden" in names, tapped=False, eager_maps=False)
    if not wants_attention:
        return run
    if _can_tap(model, probe):
        return TeacherRun(model, resolved, run.hidden_states, tapped=True, eager_maps=False)
    if "qkv" in names:
        raise TeacherError(
            f"{type(model).__name__} computes its attention outside of transformers' attention interface, so Q, K and "
            f"V cannot be taken from it: capture attention:LAYERS (the maps) instead"
        )
    model.set_attn_implementation("eager")
    return TeacherRun(model, resolved, run.hidden_states, tapped=False, eager_maps=True)


def _can_tap(model: PreTrainedModel, probe: TokenBatch) -> bool:
    before = model.config._attn_implementation
    try:
        tap(model)
        calls = TeacherRun(model, [], hidden_states=False, tapped=True, eager_maps=False).forward(probe).attention_calls
    except (ValueError, TypeError, KeyError):  # the architecture refuses the interface or the keyword
        calls = []
    if len(calls) == model.config.num_hidden_layers:
        return True
    model.set_attn_implementation(before)
    return False
