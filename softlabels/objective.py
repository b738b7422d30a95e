"""A phase's weighted, scheduled sum of losses: what it needs of a cache and a student, and its value for a batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from softlabels.cache import Cache
from softlabels.cache.vocab import VocabTeacher, open_vocab
from softlabels.config import (
    AdaptiveTemperature,
    LossTerm,
    Phase,
    Schedule,
    Temperature,
    parse_schedule,
    parse_temperature,
    suggest,
)
from softlabels.errors import CacheError, ConfigError
from softlabels.lacking import capture_options, what_is_lacking
from softlabels.layer_maps import map_groups, map_layers
from softlabels.losses import (
    CONCATENATED,
    GROUP_LOSSES,
    HARD,
    LANGUAGE_LOSSES,
    LAYER_LOSSES,
    LOSSES,
    NEEDS,
    PENALTIES,
    TRANSPORT,
    TWO_LAYERS,
)
from softlabels.losses.means import share
from softlabels.losses.temperatures import cwsm, flsw
from softlabels.losses.transport import LayerWeights
from softlabels.projections import Projections
from softlabels.types import LANGUAGE_MODELS, LayerGroup, LayerPair, Signals, Task, layer_field

# What a loss looks at, and the fields that give it, the first choice first. Attention follows from Q and K only where
# it is softmax(QKᵀ / √K) over the row; see PLAIN_ATTENTION.
_SOURCES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "logits": (("logits",),),
    "hidden": (("hidden",),),
    "hidden_cls": (("hidden@cls",), ("hidden",)),
    "attention_scores": (("attention@scores",), ("query", "key")),
    "attention_probs": (("attention",), ("attention@scores",), ("query", "key")),
    "query": (("query",),),
    "key": (("key",),),
    "value": (("value",),),
}
_GIVEN = ("temperature", "layers", "combine", "weights")  # what a loss is given beside the options of a recipe
PLAIN_ATTENTION = frozenset(
    {
        "albert",
        "bert",
        "camembert",
        "deit",
        "distilbert",
        "electra",
        "ernie",
        "mobilebert",
        "roberta",
        "vit",
        "xlm-roberta",
    }
)


@dataclass(frozen=True, slots=True)
class Term:
    """One loss of an objective, with everything that a recipe left open filled in."""

    name: str  # the loss's, with a number where a phase has it twice
    loss: str
    weight: Schedule
    temperature: Temperature
    options: dict[str, Any]  # the loss's own; a Schedule where it moves
    pairs: tuple[LayerPair | LayerGroup, ...] = ()  # of a loss on layers
    depth: tuple[float, ...] = ()  # a weight for each of `pairs`
    project: str | None = None

    def layers(self, side: str) -> list[int]:
        """The layers of 'student' or 'teacher' that this term looks at."""
        return sorted({layer for pair in self.pairs for layer in _layers(pair, side)})

    def first_projection(self, index: int) -> int:
        """The number of the first projection of `pairs[index]`: a pair has one, a group one a layer of the student."""
        return sum(len(pair.student) if isinstance(pair, LayerGroup) else 1 for pair in self.pairs[:index])


def _layers(pair: LayerPair | LayerGroup, side: str) -> tuple[int, ...]:
    if isinstance(pair, LayerGroup):
        return getattr(pair, side)
    return tuple(getattr(end, side) for end in (pair, pair.then) if end is not None)


@dataclass(frozen=True, slots=True)
class Objective:
    """Σ weight · loss(student, teacher), each weight and temperature as the phase's progress has it."""

    terms: tuple[Term, ...]
    fields: list[str]  # of the cache, that the losses look at
    language: bool = False  # the student is a language model
    vocab: VocabTeacher | None = None  # then: what turns a cache's fields into logits; None where only tokens teach
    projections: Projections | None = None
    balances: nn.ModuleDict | None = None  # the LayerWeights of the terms that are a transport
    parameters: tuple[Tensor, ...] = ()  # of the student, for penalties

    @property
    def needs_teacher(self) -> bool:
        """Whether any soft term is there; without one, only labelled rows teach anything."""
        return any(term.loss not in HARD and term.loss not in PENALTIES for term in self.terms)

    @property
    def needs_labels(self) -> bool:
        return any(term.loss in HARD for term in self.terms)

    @property
    def on_logits(self) -> bool:
        """Whether any term teaches the student's logits, so that its accuracy means something."""
        return any(term.loss not in LAYER_LOSSES and term.loss not in PENALTIES for term in self.terms)

    def looks_at(self) -> dict[str, list[int]]:
        """The signals below the logits that the student must give: 'hidden', 'attention', 'qkv', with its layers."""
        found: dict[str, set[int]] = {}
        for term in self.terms:
            for need in NEEDS[term.loss]:
                kind = need.partition("_")[0]
                if kind != "logits":
                    kind = "qkv" if kind in ("query", "key", "value") else kind
                    found.setdefault(kind, set()).update(term.layers("student"))
        return {kind: sorted(layers) for kind, layers in found.items()}

    def modules(self) -> list[nn.Module]:
        """What is trained and kept in checkpoints, and is no part of the student."""
        return [module for module in (self.projections, self.balances) if module is not None]

    def hear(self, teacher: Signals) -> Signals:
        """`teacher` with its logits over the vocabulary, where it is a language model, on the device of its labels."""
        if self.vocab is None:
            return teacher
        return replace(teacher, vocab=self.vocab(teacher, device=teacher.labels.device))

    def to(self, device: torch.device | str) -> Objective:
        """The same where the student is: an output head is moved there once."""
        return self if self.vocab is None else replace(self, vocab=self.vocab.to(device))

    def __call__(self, student: Signals, teacher: Signals, *, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every loss by itself (unweighted), after `progress` (0 to 1) of the phase.

        A loss that weighs nothing at the moment is not computed.
        """
        total: Tensor | float = 0.0
        parts: dict[str, Tensor] = {}
        for term in self.terms:
            weight = term.weight.at(progress)
            if weight:
                part = self._value(term, student, teacher, progress)
                parts[term.name] = part.detach()
                total = total + weight * part
        if not isinstance(total, Tensor):
            total = sum(value.sum() for value in student.fields.values()) * 0.0  # all weights are 0 just now
        assert isinstance(total, Tensor)
        return total, parts

    def _value(self, term: Term, student: Signals, teacher: Signals, progress: float) -> Tensor:
        options: dict[str, Any] = {
            name: value.at(progress) if isinstance(value, Schedule) else value for name, value in term.options.items()
        }
        if term.loss in PENALTIES:
            penalty: Callable[..., Tensor] = PENALTIES[term.loss]
            return share(penalty(self.parameters, **options).to(student.mask.device))
        if term.loss in LAYER_LOSSES:
            on_layers: Callable[..., Tensor] = LAYER_LOSSES[term.loss]
            values = [
                weight
                * on_layers(
                    self._projected(term, index, student), teacher, layers=pair, **options, **self._given(term, index)
                )
                for index, (pair, weight) in enumerate(zip(term.pairs, term.depth, strict=True))
            ]
            return torch.stack(values).sum()
        # hard losses have none, and an adaptive one asks for the teacher's logits
        temperature = 1.0 if term.loss in HARD else _temperature(term.temperature, student, teacher, progress)
        loss: Callable[..., Tensor] = (LANGUAGE_LOSSES if self.language else LOSSES)[term.loss]
        return loss(student, teacher, temperature=temperature, **options)

    def _projected(self, term: Term, index: int, student: Signals) -> Signals:
        """`student` with the hidden states of pair `index` as wide as the teacher's, where the term projects them."""
        if self.projections is None or term.project is None or term.loss in CONCATENATED:
            return student
        pair, fields, number = term.pairs[index], dict(student.fields), term.first_projection(index)
        for offset, layer in enumerate(_layers(pair, "student")):
            name = layer_field("hidden", layer)
            own = number + offset if isinstance(pair, LayerGroup) else number
            fields[name] = self.projections(term.name, own, student.get(name))
        return replace(student, fields=fields)

    def _given(self, term: Term, index: int) -> dict[str, Any]:
        """What pair `index` of the term has beside its signals: the map of its bucket, or the weights of its layers."""
        if term.loss in CONCATENATED and term.project is not None and self.projections is not None:
            return {"combine": partial(self.projections, term.name, index)}
        if term.loss in TRANSPORT and self.balances is not None:
            return {"weights": self.balances[term.name]}
        return {}


def _temperature(temperature: Temperature, student: Signals, teacher: Signals, progress: float) -> float | Tensor:
    """A number, or (B,) a row where it adapts itself."""
    if isinstance(temperature, Schedule):
        return temperature.at(progress)
    base, beta = temperature.base, temperature.beta
    if temperature.rule == "cwsm":
        return cwsm(student.logits, base=base, beta=beta)
    return flsw(student.logits, teacher.logits, base=base, beta=beta, gamma=temperature.gamma)


# ------------------------------------------------------------------------------------------------------- building


def build_objective(phase: Phase, cache: Cache, *, student_layers: int | None) -> Objective:
    """The objective of `phase` for this cache and a student of so many layers (None: it has none to look at).

    Nothing of the cache but its manifest is read. ConfigError for losses, options or maps that don't fit; CacheError,
    with the dump command that would add it, for what the cache lacks.
    """
    task = cache.manifest.teacher.task
    terms = fill_in(phase, task, student_layers=student_layers, teacher_layers=lambda: _known_layers(cache))
    language = task in LANGUAGE_MODELS
    vocab = None
    if language and any(term.loss not in HARD and term.loss in LOSSES for term in terms):
        vocab = open_vocab(cache)
    fields, lacking = _find_fields(terms, cache.fields.keys(), cache.teacher_config(), language=language)
    if lacking:
        raise CacheError(what_is_lacking(lacking, cache))
    return Objective(terms, sorted({*fields, *(vocab.fields if vocab else ())}), language, vocab)


def layer_weights(terms: Sequence[Term]) -> nn.ModuleDict | None:
    """The weights of all layers that transports start from; None where no term is one."""
    found = nn.ModuleDict()
    for term in terms:
        if term.loss in TRANSPORT:
            (layers,) = term.pairs
            assert isinstance(layers, LayerGroup)
            given = (term.options.get(f"{side}_weights") for side in ("student", "teacher"))
            found[term.name] = LayerWeights(layers, *given, update=term.options.get("update", False))
    return found if len(found) else None


def fill_in(
    phase: Phase, task: Task, *, student_layers: int | None, teacher_layers: Callable[[], int]
) -> tuple[Term, ...]:
    """The terms of `phase`, everything that it leaves open filled in; ConfigError for what doesn't fit."""
    return tuple(_terms(phase, task, student_layers, teacher_layers))


def _terms(phase: Phase, task: Task, student_layers: int | None, teacher_layers: Callable[[], int]) -> Iterator[Term]:
    seen: dict[str, int] = {}
    if all(term.loss in PENALTIES for term in phase.terms):
        raise ConfigError(f"phase '{phase.name}' has a penalty and no loss: a student learns nothing from that alone")
    for term in phase.terms:
        seen[term.loss] = seen.get(term.loss, 0) + 1
        name = term.loss if seen[term.loss] == 1 else f"{term.loss}-{seen[term.loss]}"
        what = f"phase '{phase.name}', loss '{term.loss}'"
        pairs: tuple[LayerPair | LayerGroup, ...] = ()
        options = _own_options(term, task, what=what)
        if term.loss in PENALTIES:
            pass  # on any student, whatever it learns
        elif term.loss in LAYER_LOSSES:
            if student_layers is None:
                raise ConfigError(f"{what} compares layers, and this student has none to look at: take a transformer")
            if term.project is not None and not NEEDS[term.loss][0].startswith("hidden"):
                raise ConfigError(f"{what} looks at no hidden states: it has nothing to 'project'")
            pairs = map_term(term, student=student_layers, teacher=teacher_layers(), what=what)
            _check_weights(options, pairs[0], what=what)
        elif task == "sentence-embedding":
            raise ConfigError(
                f"{what} is on logits, and the teacher of this cache has none: learn from its layers (hidden_mse, "
                f"value_relation, …), or fine-tune it first with softlabels train-teacher"
            )
        elif task in LANGUAGE_MODELS and term.loss not in LANGUAGE_LOSSES:
            raise ConfigError(f"{what} is not for a vocabulary: there are {', '.join(LANGUAGE_LOSSES)}")
        yield Term(
            name,
            term.loss,
            parse_schedule(term.weight, what="weight"),
            _own_temperature(term, phase, task, what=what),
            options,
            pairs,
            _depth(term, pairs, what=what),
            term.project,
        )


def map_term(term: LossTerm, *, student: int, teacher: int, what: str) -> tuple[LayerPair | LayerGroup, ...]:
    """Which of so many layers a term on layers looks at; ConfigError where its map doesn't fit."""
    assert term.map is not None  # LossTerm asks for it
    if term.loss in GROUP_LOSSES:
        together, cover = term.loss in TRANSPORT, term.cover and term.loss in CONCATENATED
        return tuple(map_groups(term.map, student=student, teacher=teacher, what=what, together=together, cover=cover))
    pairs = map_layers(term.map, student=student, teacher=teacher, what=what)
    if term.loss not in TWO_LAYERS and any(pair.then for pair in pairs):
        two = ", ".join(sorted(TWO_LAYERS))
        raise ConfigError(f"{what} compares one layer a side; two a side are for {two}")
    return tuple(pairs)


def _check_weights(options: dict[str, Any], layers: LayerPair | LayerGroup, *, what: str) -> None:
    """ConfigError where a transport's weights are not one for each layer that it looks at."""
    for side in ("student", "teacher"):
        weights, there = options.get(f"{side}_weights"), _layers(layers, side)
        if weights is not None and len(weights) != len(there):
            raise ConfigError(
                f"{what}: '{side}_weights' has {len(weights)} weights for the {len(there)} layers of the {side} in its "
                f"map"
            )


def _own_temperature(term: LossTerm, phase: Phase, task: Task, *, what: str) -> Temperature:
    temperature = parse_temperature(term.temperature or phase.temperature)
    if isinstance(temperature, AdaptiveTemperature) and task in LANGUAGE_MODELS:
        raise ConfigError(f"{what}: '{temperature.rule}' adapts to a classifier's logits, and these are a vocabulary's")
    if isinstance(temperature, AdaptiveTemperature) and term.loss == "annealing_mse":
        raise ConfigError(f"{what} has one temperature for all rows, such as '7:1:integer', not '{temperature.rule}'")
    return temperature


def _own_options(term: LossTerm, task: Task, *, what: str) -> dict[str, Any]:
    """The loss's options, checked against its signature."""
    tables: tuple[Mapping[str, Callable[..., Tensor]], ...] = (
        LAYER_LOSSES,
        PENALTIES,
        LANGUAGE_LOSSES if task in LANGUAGE_MODELS else {},
        LOSSES,
    )
    function = next(table[term.loss] for table in tables if term.loss in table)
    known = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in _GIVEN
    }
    for name in term.options:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"{what} has no option '{name}': {has}.{suggest(name, known)}")
    lacking = [name for name, parameter in known.items() if parameter.default is parameter.empty]
    lacking = [name for name in lacking if name not in term.options]
    if lacking:
        raise ConfigError(f"{what} needs option '{lacking[0]}': write options: {{{lacking[0]}: …}}")
    kinds = get_type_hints(function)
    return {name: _option(value, kinds[name], what=f"{what}, option '{name}'") for name, value in term.options.items()}


def _option(value: Any, kind: Any, *, what: str) -> Any:
    """`value` for a parameter of type `kind`: a word, a whole number, true or false, or a number or its schedule."""
    kinds = get_args(kind)
    if get_origin(kind) is Literal:
        if value not in kinds:
            raise ConfigError(f"{what} is one of {', '.join(kinds)}; not {value!r}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{what} is true or false; not {value!r}")
        return value
    if list[float] in (kind, *kinds):
        return _weights(value, what=what)
    if int in (kind, *kinds):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{what} is a whole number; not {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(f"{what} is a number, or a schedule such as '0:1'; not {value!r}")
    return parse_schedule(value, what=what)


def _weights(value: Any, *, what: str) -> list[float]:
    listed = value if isinstance(value, list) else []
    numbers = [weight for weight in listed if isinstance(weight, int | float) and not isinstance(weight, bool)]
    if len(numbers) < len(listed) or not any(numbers) or not all(0 <= weight < math.inf for weight in numbers):
        raise ConfigError(f"{what} is a list of weights such as [1, 2, 2], none below 0 and one above; not {value!r}")
    return [float(weight) for weight in numbers]


def _depth(term: LossTerm, pairs: Sequence[LayerPair | LayerGroup], *, what: str) -> tuple[float, ...]:
    if isinstance(term.depth, str):
        return (1.0 if term.depth == "sum" else 1.0 / max(len(pairs), 1),) * len(pairs)
    if len(term.depth) != len(pairs):
        raise ConfigError(f"{what}: 'depth' has {len(term.depth)} weights for the {len(pairs)} pairs of its map")
    return tuple(term.depth)


# ------------------------------------------------------------------------------------------- what a cache must hold


def refuse_lacking(
    terms: Sequence[Term], fields: Set[str], teacher_config: Mapping[str, Any], *, language: bool
) -> None:
    """ConfigError where a cache of these `fields`, yet to be dumped, would lack what the terms look at."""
    _, lacking = _find_fields(terms, fields, teacher_config, language=language)
    if lacking:
        first = min(lacking)
        raise ConfigError(
            f"loss '{lacking[first]}' needs {first}, which the recipe's dump does not take: add to its "
            f"capture:{capture_options(lacking).replace(' --capture', '')}"
        )


def _find_fields(
    terms: Sequence[Term], held: Set[str], teacher_config: Mapping[str, Any], *, language: bool
) -> tuple[set[str], dict[str, str]]:
    """Of the fields `held` those that the terms look at, and those that are lacking, each with its loss."""
    plain = teacher_config.get("model_type") in PLAIN_ATTENTION and not teacher_config.get("is_decoder")
    found: set[str] = set()
    lacking: dict[str, str] = {}  # field: the loss that needs it
    for term in terms:
        for need in NEEDS[term.loss]:
            if need == "logits" and language:
                continue  # of a vocabulary: see open_vocab
            for layer in term.layers("teacher") if need != "logits" else [0]:
                choices = [[_name(source, layer) for source in sources] for sources in _SOURCES[need]]
                if not plain:  # Q and K do not say it all
                    choices = [names for names in choices if not names[0].startswith("query") or need == "query"]
                there = next((names for names in choices if set(names) <= held), None)
                if there is None:
                    lacking |= dict.fromkeys(_wanted(choices, need), term.loss)
                found.update(there or ())
    return found, lacking


def _wanted(choices: list[list[str]], need: str) -> list[str]:
    """What is best dumped for `need`: of attention the scores, from which probabilities follow."""
    return choices[min(1, len(choices) - 1)] if need == "attention_probs" else choices[0]


def _name(source: str, layer: int) -> str:
    if source == "logits":
        return source
    kind, at, form = source.partition("@")
    return layer_field(kind, layer) + at + form


def teacher_layers(cache: Cache) -> int | None:
    """How many layers the teacher has, as its config in the cache says; None where it doesn't."""
    return layers_of(cache.teacher_config())


def layers_of(config: Mapping[str, Any]) -> int | None:
    """How many layers the model of this config.json has; None where it doesn't say."""
    names = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers")
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _known_layers(cache: Cache) -> int:
    layers = teacher_layers(cache)
    if layers is None:
        raise CacheError(
            f"cache {cache.shown} does not say how many layers its teacher has: a loss on layers needs a "
            f"teacher/config.json, which softlabels dump writes"
        )
    return layers


def teacher_width(cache: Cache, layer: int) -> int:
    """The width of a layer's hidden states in the cache, which holds them."""
    names = (layer_field("hidden", layer), layer_field("hidden", layer) + "@cls")
    return next(cache.fields[name].width for name in names if name in cache.fields)
