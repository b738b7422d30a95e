"""What can be taken from a running teacher.

A capture is a module with two functions: `fields(request, forward, codec=…)` says which cache fields it gives and what
they look like, from one forward pass; `take(request, forward)` gives their values for a batch, (B, …) tensors laid out
as the cache stores them. `FIRST_LAYER` is the first layer it knows (None: it takes no layers), `FORMS` what may stand
behind an @. A new capture is one file here and one line in `CAPTURES`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softlabels.cache.format import FieldSpec
from softlabels.cache.vocab import parse_form
from softlabels.captures import attention, hidden, logits, pooled, qkv, vocab
from softlabels.captures.attention_tap import NAME, Tap, own_configs
from softlabels.captures.forward import Batch, Forward, Request
from softlabels.captures.output_head import only_targets
from softlabels.captures.pooled import Pooling
from softlabels.captures.tappable import eager_maps, exactly, own_maps, why_not_tapped
from softlabels.config import suggest
from softlabels.errors import ConfigError, TeacherError
from softlabels.types import NO_LABEL

Codec = Literal["float32", "float16", "bfloat16", "int8"]


class Capture(Protocol):
    """The contract of a capture module."""

    @property
    def FIRST_LAYER(self) -> int | None: ...

    @property
    def FORMS(self) -> tuple[str, ...]: ...

    def fields(self, request: Request, forward: Forward, *, codec: Codec) -> dict[str, FieldSpec]: ...

    def take(self, request: Request, forward: Forward) -> dict[str, Tensor]: ...


CAPTURES: Mapping[str, Capture] = {
    "logits": logits,
    "hidden": hidden,
    "pooled": pooled,
    "qkv": qkv,
    "attention": attention,
    "vocab": vocab,
}


def parse_captures(items: Sequence[str]) -> list[Request]:
    """`['logits', 'hidden:3,6', 'hidden:all@cls', 'qkv:5-6', 'attention:6@scores']` as requests.

    ConfigError says what is wrong and what there is instead.
    """
    requests = []
    for item in items:
        name, colon, rest = item.partition(":")
        if name not in CAPTURES:
            raise ConfigError(f"no capture '{name}': there are {', '.join(CAPTURES)}.{suggest(name, CAPTURES)}")
        capture = CAPTURES[name]
        if name == "vocab":
            requests.append(Request(name, form=str(parse_form(rest))))
            continue
        if capture.FIRST_LAYER is None:
            if colon:
                raise ConfigError(f"--capture {item}: {name} takes no layers")
            requests.append(Request(name))
            continue
        layers, at, form = rest.partition("@")
        if not layers:
            raise ConfigError(f"--capture {item}: say which layers, for example {name}:6 or {name}:1-6 or {name}:all")
        if at and (not form or form not in capture.FORMS):
            known = [f"{other}:LAYERS@{form}" for other, part in CAPTURES.items() for form in part.FORMS if form]
            raise ConfigError(f"--capture {item}: behind an @ there are {', '.join(known)}")
        requests.append(Request(name, _parse_layers(layers, item), form))
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


def resolve_layers(requests: Sequence[Request], *, layers: int | None) -> list[Request]:
    """Requests with 'all' written out, for a model of `layers` layers; ConfigError for layers it does not have."""
    resolved = []
    for request in requests:
        first = CAPTURES[request.capture].FIRST_LAYER
        if first is None:
            resolved.append(request)
            continue
        if layers is None:
            raise ConfigError(f"--capture {request.capture}: the teacher's config does not say how many layers it has")
        wanted = request.layers if request.layers is not None else tuple(range(first, layers + 1))
        missing = [layer for layer in wanted if not first <= layer <= layers]
        if missing:
            raise ConfigError(
                f"--capture {request.capture}: the teacher has no layer {', '.join(map(str, missing))}; "
                f"it has {first} to {layers}"
            )
        resolved.append(replace(request, layers=wanted))
    return resolved


@dataclass(frozen=True, slots=True)
class TeacherRun:
    """A teacher set up for some captures: how its forward pass must be called to give them."""

    model: PreTrainedModel
    requests: list[Request]
    tapped: bool
    eager_maps: bool  # the model's attention cannot be tapped: its own maps are taken instead
    pooling: Pooling | None = None  # how `pooled` is pooled; None: see `captures.pooled`
    vocab_size: int = 0  # of the tokenizer

    def wants(self, *captures: str) -> bool:
        """Whether any of `captures` is asked for."""
        return any(request.capture in captures for request in self.requests)

    def layers_of(self, *captures: str) -> list[int]:
        """The layers that any of `captures` asks for."""
        return sorted({layer for r in self.requests if r.capture in captures for layer in r.layers or ()})

    def forward(self, batch: Batch, *, gradients: bool = False) -> Forward:
        """Run the teacher once and keep what the captures look at; with `gradients` for a model that learns."""
        inputs: dict[str, Any] = dict(batch.model_inputs())
        sink = Tap(layers=frozenset(self.layers_of("qkv", "attention")))
        if self.tapped:
            inputs[NAME] = sink  # an opaque object that reaches every layer
        if _may_cache(self.model):
            inputs["use_cache"] = False  # keys and values for a next token, copied and held for every layer
        body: list[Any] = []  # what the model hands to its head
        targets = getattr(batch, "labels", torch.empty(0)) != NO_LABEL if self.wants("vocab") else None
        with (
            torch.set_grad_enabled(gradients),
            _collect(self.model.base_model, body, wanted=self.wants("pooled")),
            only_targets(self.model, targets) as seen,
        ):
            output = self.model(
                **inputs,
                # the numbers of the layers to keep; models that know no such list keep all
                output_hidden_states=self.layers_of("hidden") or False,
                output_attentions=self.eager_maps,
                return_dict=True,
            )
        return Forward(
            logits=_first([output], "logits"),
            hidden_states=_first([output], "encoder_hidden_states", "hidden_states") or (),
            last_hidden_state=_first(body, "encoder_last_hidden_state", "last_hidden_state"),
            pooler_output=_first(body, "pooler_output"),
            attention_calls=sink.self_attention,
            attention_maps=own_maps(output) if self.eager_maps else (),
            pooling=self.pooling or "",
            mask=batch.attention_mask,
            input_ids=inputs.get("input_ids"),
            targets=targets,
            head_states=seen[0] if seen else None,
            vocab_size=self.vocab_size,
        )

    def fields(self, batch: Batch, *, codec: Codec) -> dict[str, FieldSpec]:
        """Every field these captures give and its shape, seen on one small batch rather than guessed from a config."""
        forward = self.forward(batch)
        specs: dict[str, FieldSpec] = {}
        for request in self.requests:
            specs.update(CAPTURES[request.capture].fields(request, forward, codec=codec))
        return specs

    def take(self, batch: Batch, *, gradients: bool = False) -> dict[str, Tensor]:
        """Every field's values for `batch`."""
        return self.values(self.forward(batch, gradients=gradients))

    def values(self, forward: Forward) -> dict[str, Tensor]:
        """Every field's values in a forward pass that was run."""
        values: dict[str, Tensor] = {}
        for request in self.requests:
            values.update(CAPTURES[request.capture].take(request, forward))
        return values


@contextmanager
def _collect(module: nn.Module, outputs: list[Any], *, wanted: bool) -> Iterator[None]:
    """Put what `module` returns into `outputs` while this is entered, if `wanted`."""
    if not wanted:
        yield
        return
    handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield
    finally:
        handle.remove()


def _may_cache(model: PreTrainedModel) -> bool:
    """Whether `model` would keep keys and values to generate from, and can be told not to."""
    takes = inspect.signature(model.forward).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    return bool(getattr(model.config, "use_cache", False)) and (passes_on or "use_cache" in takes)


def _first(outputs: Sequence[Any], *names: str) -> Any:
    """The first of the attributes `names` that one of `outputs` has, and that is not None."""
    found = (getattr(output, name, None) for output in outputs for name in names)
    return next((value for value in found if value is not None), None)


def prepare(
    model: PreTrainedModel,
    requests: Sequence[Request],
    probe: Batch,
    *,
    pooling: Pooling | None = None,
    vocab_size: int = 0,
) -> TeacherRun:
    """Set `model` up for `requests`. `probe`, any small batch, shows whether its attention can be tapped.

    A student may be in training mode: it is probed in evaluation mode, for dropout changes attention maps.
    ConfigError for layers that the model does not have, TeacherError for signals that it cannot give.
    """
    resolved = resolve_layers(requests, layers=getattr(model.config, "num_hidden_layers", None))
    run = TeacherRun(model, resolved, tapped=False, eager_maps=False, pooling=pooling, vocab_size=vocab_size)
    if not run.wants("qkv", "attention"):
        return run
    own_configs(model)
    before, was_training = model.config._attn_implementation, model.training
    model.eval()
    with exactly(model.device):
        maps = eager_maps(model, probe)
        fault = why_not_tapped(model, probe, maps=maps)
    model.train(was_training)
    if not fault:
        return replace(run, tapped=True)
    model.set_attn_implementation(before)
    for wanted, what in (("qkv", "Q, K and V"), ("scores", "attention scores")):
        if any(wanted in (request.capture, request.form) for request in resolved):
            raise TeacherError(
                f"{type(model).__name__}: {fault}, so {what} cannot be taken from it: "
                + ("capture attention:LAYERS (the probabilities) instead" if maps else "capture hidden:LAYERS instead")
            )
    if not maps:
        raise TeacherError(
            f"{type(model).__name__}: {fault}, and it gives no map of every token to every token in each of its layers "
            f"either: capture hidden:LAYERS instead"
        )
    model.set_attn_implementation("eager")
    return replace(run, eager_maps=True)
