"""The names of losses and maps, a loss of a training, and a phase of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from softlabels.config.schedules import parse_schedule, parse_temperature
from softlabels.config.strict import Strict, suggest
from softlabels.errors import ConfigError
from softlabels.types import Decay

# Losses on logits, and losses on what lies below them; held equal to the tables of softlabels.losses by a test.
LOSSES = (
    "kl",
    "reverse_kl",
    "mse_logits",
    "mae_logits",
    "soft_cross_entropy",
    "ce",
    "pseudo_ce",
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


def _temperature_text(value: Any) -> str:
    parse_temperature(value)
    return str(value)


TemperatureText = Annotated[str, BeforeValidator(_temperature_text)]  # as written, checked


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
    temperature: TemperatureText | None = None  # by default the phase's

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


def _check_all(losses: dict[str, float] | list[LossTerm]) -> dict[str, float] | list[LossTerm]:
    """`losses` unchanged; ConfigError or ValueError for none at all, unknown names, and weights that all end at 0."""
    if isinstance(losses, dict):
        return check_losses(losses)
    if not losses:
        raise ValueError(f"no loss is given: choose from {', '.join((*LOSSES, *LAYER_LOSSES, *PENALTIES))}")
    if not any(parse_schedule(term.weight, what="weight").end for term in losses):
        raise ValueError("every weight ends at 0, and the losses at the end choose the best epoch: let one end above 0")
    return losses


# told apart by what is written, so that a fault is told of what was meant
Losses = Annotated[
    Annotated[dict[str, float], Tag("<names>")] | Annotated[list[LossTerm], Tag("<terms>")],
    Discriminator(lambda value: "<terms>" if isinstance(value, list) else "<names>"),
    AfterValidator(_check_all),
]


def loss_terms(losses: Losses) -> list[LossTerm]:
    """`losses` as terms: {'kl': 0.7} is short for [{loss: kl, weight: 0.7}]."""
    if isinstance(losses, dict):
        return [LossTerm(loss=name, weight=weight) for name, weight in losses.items()]
    return losses


class Phase(Strict):
    """A part of a training with losses, an optimiser and a learning-rate schedule of its own.

    What is None here is as in the student's options. The next phase starts from the best epoch of this one.
    """

    name: str = Field(default="train", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    losses: Losses
    temperature: TemperatureText = "1"
    epochs: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    warmup: float | None = Field(default=None, ge=0, le=1)
    decay: Decay | None = None
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

    @property
    def terms(self) -> list[LossTerm]:
        return loss_terms(self.losses)
