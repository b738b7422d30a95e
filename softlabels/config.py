"""Options, read and checked before anything runs: of dumps, students, teachers, and the small words in them.

Unknown keys are refused with the key that was probably meant.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from softlabels import __version__
from softlabels.errors import ConfigError
from softlabels.types import OptimizerName

# ------------------------------------------------------------------------------------------ words and small values


def suggest(word: str, choices: Iterable[str]) -> str:
    """ " Did you mean 'x'?" where one of `choices` is close to `word`, else the empty string."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A number, constant or moving from `start` to `end` over the training.

    Written '3', '5:1', '5:1:cosine', '0:1:linear:0.3'. `until` is the share of the training after which `end` is
    reached.
    """

    start: float
    end: float
    shape: Literal["linear", "cosine", "step", "integer"] = "linear"
    until: float = 1.0

    def at(self, progress: float) -> float:
        """The number after `progress` (0 to 1) of the training.

        'step' holds `start` for the first half; 'integer' gives every whole number on the way as long a time.
        """
        progress = min(max(progress, 0.0) / self.until, 1.0)
        if self.shape == "integer":
            count = abs(self.end - self.start) + 1
            passed = min(math.floor(progress * count), count - 1)
            return self.start + math.copysign(passed, self.end - self.start)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        elif self.shape == "step":
            progress = float(progress >= 0.5)
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True, slots=True)
class AdaptiveTemperature:
    """A temperature for every row, from the logits of both sides ('flsw:4', 'cwsm:4:1', 'flsw:4:1:2').

    `rule` names a function of `softlabels.losses.temperatures`, `base` is what it turns about.
    """

    rule: Literal["flsw", "cwsm"]
    base: float
    beta: float = 1.0
    gamma: float = 2.0  # of flsw


Temperature = Schedule | AdaptiveTemperature

_SHAPES = ("linear", "cosine", "step", "integer")
_RULES = ("flsw", "cwsm")


def parse_schedule(text: str | float, *, what: str) -> Schedule:
    """'3', '5:1', '5:1:cosine' or '0:1:linear:0.3' as a Schedule; ConfigError says what is wrong with the `what`."""
    parts = str(text).split(":")
    form = "write a number ('3'), a range ('5:1'), or a range with a shape ('5:1:cosine', '0:1:linear:0.3')"
    if len(parts) > 4:
        raise ConfigError(f"{what} '{text}' has too many parts: {form}")
    try:
        numbers = [float(part) for part in parts[:2]]
        until = float(parts[3]) if len(parts) == 4 else 1.0
    except ValueError:
        raise ConfigError(f"{what} '{text}' is not a number: {form}") from None
    if not all(math.isfinite(number) for number in numbers):
        raise ConfigError(f"{what} '{text}' is not finite: {form}")
    if not 0 < until <= 1:
        raise ConfigError(f"{what} '{text}': {until} is no share of the training above 0 and up to 1")
    shape = parts[2] if len(parts) > 2 else "linear"
    if shape not in _SHAPES:
        raise ConfigError(f"{what} '{text}': no shape '{shape}', only {', '.join(_SHAPES)}.{suggest(shape, _SHAPES)}")
    if shape == "integer" and not all(number.is_integer() for number in numbers):
        raise ConfigError(f"{what} '{text}': the shape 'integer' goes from a whole number to a whole number")
    return Schedule(numbers[0], numbers[-1], shape, until)  # type: ignore[arg-type]


def parse_temperature(text: str | float) -> Temperature:
    """'3', '5:1', '5:1:cosine', or 'flsw:4' as a Temperature; ConfigError says what is wrong."""
    rule, *numbers = str(text).split(":")
    if rule in _RULES:
        return _parse_adaptive(str(text), rule, numbers)
    schedule = parse_schedule(text, what="temperature")
    if min(schedule.start, schedule.end) <= 0:
        raise ConfigError(f"temperature '{text}' must be above 0: the logits are divided by it")
    return schedule


def _parse_adaptive(text: str, rule: str, numbers: list[str]) -> AdaptiveTemperature:
    most = 3 if rule == "flsw" else 2
    form = f"write {rule}:BASE, or {rule}:" + ("BASE:BETA:GAMMA" if most == 3 else "BASE:BETA")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        raise ConfigError(f"temperature '{text}': {form}") from None
    if not 1 <= len(values) <= most or not all(math.isfinite(value) for value in values) or values[0] <= 0:
        raise ConfigError(f"temperature '{text}': {form}; the base must be above 0")
    return AdaptiveTemperature(rule, *values)  # type: ignore[arg-type]


# Losses on logits, and losses on what lies below them; held equal to the tables of softlabels.losses by a test.
LOSSES = (
    "kl",
    "reverse_kl",
    "mse_logits",
    "mae_logits",
    "soft_cross_entropy",
    "ce",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "tvd",
    "dkd",
    "dist",
    "annealing_mse",
    "teacher_annealing",
)
LAYER_LOSSES = (
    "hidden_mse",
    "hidden_cosine",
    "pkd",
    "layer_output",
    "feature_map_mse",
    "feature_statistics",
    "gram",
    "nst",
    "attention_scores_mse",
    "attention_scores_ce",
    "attention_mse",
    "attention_kl",
    "attention_ce",
    "query_relation",
    "key_relation",
    "value_relation",
    # on several layers of a side at once
    "alp",
    "alp_tokens",
    "ckd",
    "ckd_cls",
    "ckd_unit",
    "emd",
    "emd_attention",
)
PENALTIES = ("parameter_norm",)  # of the student's parameters; they look at neither


MAPS = ("uniform", "skip", "last", "same", "final", "embeddings")  # held equal to softlabels.layer_maps.MAPS by a test
GROUP_MAPS = ("all", "buckets")  # for losses on several layers at once; likewise


def parse_losses(items: Sequence[str]) -> dict[str, float]:
    """`['kl=0.7', 'ce=0.3']` as `{'kl': 0.7, 'ce': 0.3}`; a bare name weighs 1."""
    losses: dict[str, float] = {}
    for item in items:
        name, _, weight = item.partition("=")
        if name in losses:
            raise ConfigError(f"--loss {name} is given twice")
        try:
            losses[name] = float(weight) if weight else 1.0
        except ValueError:
            raise ConfigError(f"--loss {item}: '{weight}' is not a number; write --loss {name}=0.5") from None
    return check_losses(losses)


def check_losses(losses: dict[str, float]) -> dict[str, float]:
    """`losses` unchanged; ConfigError for an unknown name, a weight that isn't above 0, or none at all."""
    if not losses:
        raise ConfigError(f"no loss is given: choose from {', '.join(LOSSES)}, for example --loss kl=0.7 --loss ce=0.3")
    for name, weight in losses.items():
        check_loss(name)
        if name in LAYER_LOSSES:
            raise ConfigError(
                f"loss '{name}' compares layers, so it needs a map of them: write it in a recipe as "
                f"{{loss: {name}, map: uniform}}, and give that with --recipe"
            )
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"loss '{name}' has weight {weight}: a weight must be above 0")
    return losses


def check_loss(name: str) -> str:
    """`name` unchanged; ConfigError for one that no loss has."""
    known = (*LOSSES, *LAYER_LOSSES, *PENALTIES)
    if name not in known:
        raise ConfigError(f"no loss '{name}': there are {', '.join(known)}.{suggest(name, known)}")
    return name


def parse_options(items: Sequence[str]) -> dict[str, Any]:
    """`['layers=2', 'dropout=0.1']` as a dict, values read as YAML."""
    options: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{item}' is not KEY=VALUE, for example layers=2")
        if key in options:
            raise ConfigError(f"'{key}' is given twice")
        options[key] = parse_value(value)
    return options


def parse_value(text: str) -> Any:
    """A command-line value as YAML reads it; see `_Loader`."""
    try:
        return read_yaml(text)
    except (yaml.YAMLError, RecursionError):
        return text


class _Loader(yaml.SafeLoader):
    """YAML, but for what YAML 1.1 makes of numbers: 1e-4 is one, and 5:1 is a schedule, not 301 in base 60.

    A date is a word.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (as the base class has it)
        first: [(tag, form) for tag, form in resolvers if tag.rsplit(":", 1)[1] not in ("int", "float", "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]{0,17})$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
    list("-+.0123456789"),
)


def read_yaml(text: str) -> Any:
    """`text` as YAML, with numbers as one means them: see `_Loader`."""
    return yaml.load(text, Loader=_Loader)


# --------------------------------------------------------------------------------------------------------- options


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and says which key was probably meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(
                        f"unknown key '{key}'; it takes {', '.join(cls.model_fields)}."
                        f"{suggest(str(key), cls.model_fields)}"
                    )
        return data


class Masking(Strict):
    """How tokens are hidden from a masked language model."""

    rate: float = Field(default=0.15, gt=0, lt=1)  # share of the tokens
    times: int = Field(default=1, ge=1, le=1000)  # maskings of each text
    seed: int = Field(default=0, ge=0, lt=2**32)


class DumpOptions(Strict):
    """What decides a cache's bytes, beside the corpus and the teacher."""

    capture: list[str] = []  # none: logits, or what comes nearest to them for the teacher's task
    task: str | None = None  # None: what the teacher's config.json says
    masking: Masking = Masking()  # of a masked language model
    max_length: int | None = Field(default=None, ge=1)
    shard_rows: int = Field(default=4096, ge=1)
    batch_tokens: int = Field(default=8192, ge=1)
    # of hidden, qkv and attention (which cannot be int8); logits stay float32
    codec: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    overflow: Literal["refuse", "clip"] = "refuse"  # of values beyond the codec's largest, ±65,504 for float16
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # the teacher computes in it
    text: bool = True  # keep the raw texts in the cache
    compile: bool = False  # the teacher through torch.compile: a minute or more before the first batch


class RayOptions(Strict):
    """Where Ray's workers are, and what each of them takes; none of it shows in a cache's bytes."""

    # local: a cluster of its own on this machine, on the loopback alone; auto: one that runs on this machine
    address: str = Field(
        default="local", pattern=r"^(local|auto|(ray://)?[A-Za-z0-9_.-]+:[0-9]{1,5}|ray://\[.+\]:[0-9]+)$"
    )
    workers: int | None = Field(default=None, ge=1)  # None: as many as there is room for
    gpus_per_worker: float | None = Field(default=None, ge=0)  # 0.5: two share one; None: one, where there are GPUs
    cpus_per_worker: float = Field(default=1.0, gt=0)

    @field_validator("gpus_per_worker", "cpus_per_worker")
    @classmethod
    def _share(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and not value.is_integer():
            raise ValueError(f"a worker takes a part of one, or whole ones: not {value:g}")
        return value

    @field_validator("address", mode="wrap")
    @classmethod
    def _place(cls, value: Any, check: Any) -> str:
        try:
            return str(check(value))
        except ValueError:
            raise ValueError(
                f"'{value}' is no address of a Ray cluster; write local, auto, ray://HOST:10001 or HOST:6379"
            ) from None


class ImportOptions(Strict):
    """What decides the bytes of a cache of logits that a teacher gave elsewhere, beside these and the corpus."""

    label_names: list[str] | None = None  # in the order of the logits
    teacher_name: str | None = None
    max_length: int | None = Field(default=None, ge=1)
    shard_rows: int = Field(default=4096, ge=1)
    text: bool = True  # keep the raw texts in the cache

    @field_validator("label_names")
    @classmethod
    def _classes(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (len(value) < 2 or len(set(value)) < len(value) or not all(value)):
            raise ValueError("name two classes or more, all different, in the order of the logits: no,yes")
        return value


class CombineOptions(Strict):
    """How the logits of several teachers become one's; see `softlabels.cache.mixing`."""

    mean: Literal["logits", "probabilities", "median"] = "logits"
    weights: list[Annotated[float, Field(gt=0)]] | None = None  # one a cache, in their order; None: all the same
    choose: Literal["label", "entropy"] | None = None  # one teacher's logits for each row instead of a mean
    keep: bool = False  # each teacher's logits too, as fields logits.01, logits.02, …

    @model_validator(mode="after")
    def _fits(self) -> CombineOptions:
        if self.weights is not None and self.mean == "median":
            raise ValueError("a median has no weights: leave them out, or take the mean of logits or of probabilities")
        if self.weights is not None and self.choose == "entropy":
            raise ValueError("the teacher of least entropy is taken as it is: weights have no say in it")
        return self

    def shares(self, count: int) -> list[float]:
        """The weights of `count` caches, of sum 1; ConfigError where another number was given."""
        weights = self.weights or [1.0] * count
        if len(weights) != count:
            raise ConfigError(
                f"{len(weights)} weights ({', '.join(f'{weight:g}' for weight in weights)}) for {count} caches: give "
                f"one for each cache, in their order"
            )
        return [weight / sum(weights) for weight in weights]


class LossTerm(Strict):
    """One loss of a phase: how much it weighs and, of a loss on layers, which layers teach which."""

    loss: str
    weight: float | str = 1.0  # or a schedule over the phase: '1:0', '0:1:linear:0.2'
    # of a loss on layers, student's to teacher's: a rule of softlabels.layer_maps, or pairs [[1, 2], [2, 4]]; for one
    # that compares two layers with each other, [[[1, 2], [2, 4]]] (student's two, teacher's two); for one on several
    # of the teacher's, [[1, [1, 2]], [2, [3, 4]]]; for a transport, [[[1, 2], [1, 2, 3, 4]]]
    map: str | list[Any] | None = None
    cover: bool = True  # of ckd's map, written out: that each of the teacher's layers is in one bucket
    depth: str | list[float] = "sum"  # or 'mean', over the pairs of the map, or a weight for each
    project: Literal["linear", "relu", "tanh"] | None = None  # of the student's hidden states to the teacher's width
    share_projection: bool = False  # one for all pairs of the map
    project_lr: float = Field(default=1.0, gt=0)  # the projection's learning rate, as a multiple of the student's
    options: dict[str, Any] = {}  # the loss's own: {beta: 8}; a string may be a schedule ('0:1')
    temperature: str | None = None  # by default the phase's

    @field_validator("temperature", mode="before")
    @classmethod
    def _temperature(cls, value: Any) -> str | None:
        return value if value is None else _temperature_text(value)

    @field_validator("map", mode="before")
    @classmethod
    def _map(cls, value: Any) -> Any:
        rules = (*MAPS, *GROUP_MAPS)
        if isinstance(value, str) and value not in rules:
            raise ValueError(f"no map '{value}': there are {', '.join(rules)}.{suggest(value, rules)}")
        if not isinstance(value, str | list | None):
            raise ValueError(f"a map is one of {', '.join(rules)}, or pairs such as [[1, 2], [2, 4]]; not {value!r}")
        return value

    @field_validator("depth", mode="before")
    @classmethod
    def _depth(cls, value: Any) -> Any:
        weights = value if isinstance(value, list) else []
        numbers = [weight for weight in weights if isinstance(weight, int | float) and weight >= 0]
        if value not in ("sum", "mean") and (len(numbers) < len(weights) or not any(numbers)):
            raise ValueError("depth is sum, mean, or a weight for each pair of the map such as [1, 2], none below 0")
        return value

    @model_validator(mode="after")
    def _fits(self) -> LossTerm:
        check_loss(self.loss)
        weight = parse_schedule(self.weight, what="weight")
        if min(weight.start, weight.end) < 0 or max(weight.start, weight.end) <= 0:
            raise ValueError(f"loss '{self.loss}' has weight {self.weight}: a weight must be above 0")
        if self.loss in LAYER_LOSSES and self.map is None:
            raise ValueError(f"loss '{self.loss}' compares layers: say which with 'map', for example map: uniform")
        for key in ("map", "cover", "depth", "project", "share_projection", "project_lr"):
            if self.loss not in LAYER_LOSSES and key in self.model_fields_set:
                place = "the parameters" if self.loss in PENALTIES else "logits"
                raise ValueError(f"loss '{self.loss}' is on {place}: it has no '{key}'")
        for key in ("share_projection", "project_lr"):
            if self.project is None and getattr(self, key) != LossTerm.model_fields[key].default:
                raise ValueError(f"'{key}' is about a projection: give 'project' (linear, relu or tanh) too")
        return self


# told apart by what is written, so that a fault is told of what was meant
Losses = Annotated[
    Annotated[dict[str, float], Tag("<names>")] | Annotated[list[LossTerm], Tag("<terms>")],
    Discriminator(lambda value: "<terms>" if isinstance(value, list) else "<names>"),
]


def loss_terms(losses: Losses) -> list[LossTerm]:
    """`losses` as terms: {'kl': 0.7} is short for [{loss: kl, weight: 0.7}]."""
    if isinstance(losses, dict):
        return [LossTerm(loss=name, weight=weight) for name, weight in losses.items()]
    return losses


def _check_losses(losses: Losses) -> Losses:
    if isinstance(losses, dict):
        return check_losses(losses)
    if not losses:
        raise ValueError(f"no loss is given: choose from {', '.join((*LOSSES, *LAYER_LOSSES, *PENALTIES))}")
    if not any(parse_schedule(term.weight, what="weight").end for term in losses):
        raise ValueError("every weight ends at 0, and the losses at the end choose the best epoch: let one end above 0")
    return losses


def _temperature_text(value: Any) -> str:
    parse_temperature(value)
    return str(value)


class Phase(Strict):
    """A part of a training with losses, an optimiser and a learning-rate schedule of its own.

    What is None here is as in the student's options. The next phase starts from the best epoch of this one.
    """

    name: str = Field(default="train", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    losses: Losses
    temperature: str = "1"
    epochs: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    warmup: float | None = Field(default=None, ge=0, le=1)
    # parts of the student: 'embeddings', 'layers:1-3', 'head', or the start of parameters' names
    freeze: list[str] = []  # these do not learn
    slow: dict[str, Annotated[float, Field(gt=0)]] = {}  # these learn at a multiple of the rate
    # this phase once for each pair of its losses' maps, from the lowest up, layers below frozen (or at this multiple
    # of the learning rate)
    progressive: bool | float = False

    @field_validator("progressive")
    @classmethod
    def _progressive(cls, value: bool | float) -> bool | float:
        if not isinstance(value, bool) and not 0 < value < 1:
            raise ValueError(f"progressive is true, false, or a multiple of the learning rate under 1; not {value:g}")
        return value

    @field_validator("temperature", mode="before")
    @classmethod
    def _temperature(cls, value: Any) -> str:
        return _temperature_text(value)

    @field_validator("losses")
    @classmethod
    def _losses(cls, value: Losses) -> Losses:
        return _check_losses(value)

    @property
    def terms(self) -> list[LossTerm]:
        return loss_terms(self.losses)


AUGMENTATIONS = (  # held equal to softlabels.augmenters.METHODS by a test
    "distilled-bilstm",
    "tinybert",
    "deletion",
    "short-long",
)
_ONLY_OF: dict[str, tuple[str, ...]] = {  # an option that only these methods look at
    "mask_rate": ("distilled-bilstm",),
    "pos_rate": ("distilled-bilstm",),
    "ngram_rate": ("distilled-bilstm",),
    "pos": ("distilled-bilstm",),
    "rate": ("tinybert", "deletion", "short-long"),
    "span": ("short-long",),
    "mlm": ("tinybert",),
    "word_vectors": ("tinybert",),
    "vector_words": ("tinybert",),
    "candidates": ("tinybert",),
}


class AugmentOptions(Strict):
    """How new texts are made of given ones. Defaults are the papers'; see `softlabels.augmenters`."""

    method: str = "distilled-bilstm"
    times: int | None = Field(default=None, ge=1, le=100_000)  # None: 20, of pairs 10 (tinybert: 20)
    seed: int = Field(default=0, ge=0, lt=2**32)
    originals: bool = True  # the rows themselves first, with their labels
    language: Literal["auto", "en", "zh"] = "auto"  # auto: a text with a Chinese character is Chinese
    mask_rate: float = Field(default=0.1, ge=0, le=1)  # of words, that become the mask token
    pos_rate: float = Field(default=0.1, ge=0, le=1)  # of words, that become one of the same part of speech
    ngram_rate: float = Field(default=0.25, ge=0, le=1)  # of texts, of which one n-gram is kept
    pos: bool = True  # False: a word is replaced by any other, by frequency alone
    mask_token: str | None = Field(default=None, pattern=r"^\S+$")  # None: [MASK]
    rate: float | None = Field(default=None, gt=0, le=1)  # of words; None: tinybert 0.4, deletion and short-long 0.1
    span: float = Field(default=20, gt=0)  # words of a long disorder; up to 1 a share of the text
    mlm: str | None = None  # a masked language model: a folder or a Hugging Face name
    word_vectors: str | None = None  # a file: see softlabels.word_vectors
    vector_words: int = Field(default=100_000, ge=2)  # of that file the first so many, the most frequent
    candidates: int = Field(default=15, ge=1)  # words that one may be replaced by

    @model_validator(mode="after")
    def _fits(self) -> AugmentOptions:
        if self.method not in AUGMENTATIONS:
            names = ", ".join(AUGMENTATIONS)
            raise ValueError(f"no method '{self.method}': there are {names}.{suggest(self.method, AUGMENTATIONS)}")
        for name in sorted(self.model_fields_set & _ONLY_OF.keys()):
            if self.method not in _ONLY_OF[name]:
                raise ValueError(f"{name} is for {' or '.join(_ONLY_OF[name])}; {self.method} has no use for it")
        if self.mask_rate + self.pos_rate > 1:
            raise ValueError(f"mask_rate {self.mask_rate} and pos_rate {self.pos_rate} are more than 1 together")
        if self.method == "tinybert" and self.mlm is None and self.word_vectors is None:
            raise ValueError("tinybert takes its words from a masked language model (mlm), from word_vectors, or both")
        return self


class PruneOptions(Strict):
    """What of a student is set to zero: the smallest weights, attention heads that matter least, or both."""

    magnitude: float | None = None  # a share of the weights, above 0 and below 1
    scope: Literal["matrix", "all"] = "matrix"  # the smallest of each matrix, or of all of them together
    heads: float | None = None  # a share of the heads, above 0 and below 1

    @model_validator(mode="after")
    def _something_of_it(self) -> PruneOptions:
        for name in ("magnitude", "heads"):
            share = getattr(self, name)
            if share is not None and share >= 1:
                raise ValueError(
                    f"{name} {share:g} would prune the student to nothing: give a share below 1, such as 0.5"
                )
            if share is not None and not share > 0:
                raise ValueError(f"{name} {share:g} prunes nothing: give a share above 0 and below 1, such as 0.5")
        if self.magnitude is None and self.heads is None:
            raise ValueError("say what to prune: a share of the weights (magnitude), of the heads (heads), or both")
        return self

    def say(self) -> str:
        """In a few words: 'magnitude 0.5, heads 0.25'."""
        parts = [f"{name} {share:g}" for name in ("magnitude", "heads") if (share := getattr(self, name)) is not None]
        return ", ".join(parts)


class EvaluateOptions(Strict):
    """What an evaluation tells beside a student's quality, and whether it stays in the run's folder."""

    bins: Annotated[int, Field(ge=1, le=1000)] = 15  # of the calibration error, as in Guo et al. 2017
    resamples: Annotated[int, Field(ge=0, le=1_000_000)] = 1000  # of the bootstrap intervals; 0: none
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: int = 0
    keep: bool = True
    texts: bool = True  # the rows' texts are kept with the answers


class StudentOptions(Strict):
    """How one student is built and trained."""

    student: str
    options: dict[str, Any] = {}
    losses: Losses = {"kl": 0.7, "ce": 0.3}
    temperature: str = "1"
    phases: list[Phase] = []  # instead of `losses` and `temperature`: several trainings, one after the other
    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=32, ge=1)
    optimizer: OptimizerName = "adamw"  # adadelta wants --lr 1.0
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.1, ge=0, le=1)  # share of the steps
    clip: float = Field(default=1.0, gt=0)  # largest norm of the gradient
    validation: float = Field(default=0.1, ge=0, lt=1)  # share of the rows held out where no --eval is given
    patience: int | None = Field(default=None, ge=1)  # epochs without a better score before stopping
    rows: int | None = Field(default=None, ge=2)  # learn from the first so many of the cache, for a trial
    window: int | None = Field(default=None, ge=1)  # shards whose rows are shuffled together; None: all
    seed: int = Field(default=0, ge=0, lt=2**32)  # numpy takes no larger one
    from_run: str | None = None  # a finished run, whose student is trained further; what was pruned of it stays zero
    prune: PruneOptions | None = None  # before the first step; what is pruned stays zero

    @field_validator("temperature", mode="before")
    @classmethod
    def _temperature(cls, value: Any) -> str:
        return _temperature_text(value)

    @field_validator("losses")
    @classmethod
    def _losses(cls, value: Losses) -> Losses:
        return _check_losses(value)

    @model_validator(mode="after")
    def _one_way_of_saying(self) -> StudentOptions:
        names = [phase.name for phase in self.phases]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"two phases are called '{doubled[0]}': give each a name of its own")
        said = {"losses", "temperature"} & self.model_fields_set
        if self.phases and any(getattr(self, key) != StudentOptions.model_fields[key].default for key in said):
            raise ValueError(f"'{sorted(said)[0]}' is said by the phases: leave it out beside 'phases'")
        return self

    def all_phases(self) -> list[Phase]:
        """The phases with nothing left open; one of the name 'train' where none are given."""
        phases = self.phases or [Phase(losses=self.losses, temperature=self.temperature)]
        common = ("epochs", "batch_size", "lr", "weight_decay", "warmup")
        return [
            phase.model_copy(update={key: getattr(self, key) for key in common if getattr(phase, key) is None})
            for phase in phases
        ]

    def loss_names(self) -> set[str]:
        """Of all phases."""
        return {term.loss for phase in self.all_phases() for term in phase.terms}


JOINT_NAMES = ("global", "local")  # of two students that train together


class Couple(Strict):
    """What draws two students together: each learns from the other as it is now (see `softlabels.joint`)."""

    kl: float | str = 1.0  # weight of the mutual KL, or a schedule: '0:1'
    l2: float | str = 0.0  # weight of the squared distance of their logits, or a schedule
    temperature: str = "1"  # of the mutual KL

    @field_validator("temperature", mode="before")
    @classmethod
    def _temperature(cls, value: Any) -> str:
        if isinstance(parse_temperature(value), AdaptiveTemperature):
            raise ValueError(f"two students have one temperature for all rows, such as 2 or '5:1'; not '{value}'")
        return str(value)

    @field_validator("kl", "l2")
    @classmethod
    def _weight(cls, value: float | str) -> float | str:
        weight = parse_schedule(value, what="weight")
        if min(weight.start, weight.end) < 0:
            raise ValueError(f"a weight is 0 or more; not {value}")
        return value

    @property
    def teaches(self) -> bool:
        """Whether a student that nothing else teaches to answer would learn it from the other, to the end."""
        return any(parse_schedule(weight, what="weight").end > 0 for weight in (self.kl, self.l2))


class JointOptions(Strict):
    """How two students are built, trained together and coupled."""

    students: dict[str, StudentOptions]
    couple: Couple = Couple()

    @model_validator(mode="after")
    def _fits(self) -> JointOptions:
        if sorted(self.students) != sorted(JOINT_NAMES):
            raise ValueError(
                f"two students train together, called {' and '.join(JOINT_NAMES)}; there are "
                f"{', '.join(self.students) or 'none'}"
            )
        one, other = (self.students[name] for name in JOINT_NAMES)
        phases = {name: self.students[name].all_phases() for name in JOINT_NAMES}
        for name, found in phases.items():
            if len(found) > 1 or found[0].progressive:
                raise ValueError(
                    f"student '{name}' has several phases, and students train together in one: give it 'losses', or "
                    f"one phase that is not progressive"
                )
        shared = {key: (getattr(one, key), getattr(other, key)) for key in ("seed", "rows", "validation", "patience")}
        first, second = (found[0] for found in phases.values())
        shared |= {key: (getattr(first, key), getattr(second, key)) for key in ("epochs", "batch_size")}
        for key, (mine, theirs) in shared.items():
            if mine != theirs:
                raise ValueError(
                    f"the two students see the same batches, so '{key}' must be one for both: it is {mine} for "
                    f"{JOINT_NAMES[0]} and {theirs} for {JOINT_NAMES[1]}"
                )
        return self


class TaskChoice(Strict):
    """What one task of several has for itself."""

    losses: Losses | None = None  # None: as for all tasks
    temperature: str | None = None

    @field_validator("temperature", mode="before")
    @classmethod
    def _temperature(cls, value: Any) -> str | None:
        return value if value is None else _temperature_text(value)

    @field_validator("losses")
    @classmethod
    def _losses(cls, value: Losses | None) -> Losses | None:
        return None if value is None else _check_losses(value)


ANNEALED = [LossTerm(loss="teacher_annealing", options={"share": "0:1"})]  # BAM, Clark et al. 2019


class MultiTaskOptions(StudentOptions):
    """How one encoder with a head a task is built and trained; `losses` are those of every task.

    By default teacher annealing: from the teacher's distribution to the labels, linearly over the training.
    """

    losses: Losses = ANNEALED
    power: float = Field(default=0.75, ge=0, le=1)  # a task is drawn ∝ rows^power; 1: as its rows, 0: all alike
    tasks: dict[str, TaskChoice] = {}  # what differs for some

    @model_validator(mode="after")
    def _one_phase(self) -> MultiTaskOptions:
        if self.phases:
            raise ValueError("several tasks train in one phase: give 'losses' and no 'phases'")
        if self.rows is not None:
            raise ValueError("'rows' would cut every task to as many rows: dump smaller caches instead")
        return self

    def phase_of(self, task: str) -> Phase:
        """The one phase of `task`."""
        own = self.tasks.get(task, TaskChoice())
        phase = self.all_phases()[0]
        return phase.model_copy(
            update={"losses": own.losses or phase.losses, "temperature": own.temperature or phase.temperature}
        )


TeachableTask = Literal["sequence-classification", "masked-lm", "causal-lm"]  # what a teacher can be trained for here


class TeacherTraining(Strict):
    """How the teacher is trained."""

    task: TeachableTask = "sequence-classification"
    epochs: int = Field(default=5, ge=1)
    lr: float = Field(default=5e-5, gt=0)
    batch_size: int = Field(default=32, ge=1)
    max_length: int | None = Field(default=None, ge=1)
    rows: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    from_scratch: bool = False  # random weights; the model is a preset's name or a folder with a config.json
    tokenizer: str | None = None  # with from_scratch: whose tokenizer; None: the model folder's
    options: dict[str, Any] = {}  # with from_scratch: sizes, as of the transformer student


# what a recipe's `init_from` may say beside a folder
BASE, TEACHER, PRETRAINED, ASSISTANT = "base", "teacher", "pretrained", "assistant"


# -------------------------------------------------------------------------------------------------- reading options


def build_options(model: type[Strict], values: dict[str, Any], *, where: str):
    """`model(**values)`, or one ConfigError that lists every fault; `where` names the file or command."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, where=where)) from None
    except ConfigError as error:  # of a loss, a weight or a temperature
        raise ConfigError(f"{where}: {error}") from None
    except RecursionError:  # a YAML alias that holds itself
        raise ConfigError(f"{where}: it is nested too deeply") from None


def explain(error: ValidationError, *, where: str) -> str:
    """pydantic's faults as one readable message."""
    faults = []
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("<"))  # the tags of Losses
        text = fault["msg"].removeprefix("Value error, ")
        faults.append(f"{place}: {text}" if place else text)
    return f"{where}: " + "; ".join(faults)


def fingerprint(value: Any) -> str:
    """A short stable hash of plain data: two stages with the same inputs have the same fingerprint."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


def package_versions(*packages: str) -> dict[str, str]:
    """The installed versions of softlabels and of `packages`, for what a cache or a run says of its making."""
    return {"softlabels": __version__, **{package: version(package) for package in packages}}
