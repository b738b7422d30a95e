"""Options and recipes, read and checked before anything runs.

A recipe is a YAML file that describes one experiment from corpus to student; `read_recipe` returns it as a `Recipe`.
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
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from softlabels import __version__
from softlabels.errors import ConfigError

# ------------------------------------------------------------------------------------------ words and small values


def suggest(word: str, choices: Iterable[str]) -> str:
    """ " Did you mean 'x'?" where one of `choices` is close to `word`, else the empty string."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


@dataclass(frozen=True, slots=True)
class Temperature:
    """A temperature, constant or moving from `start` to `end` over the training ('3', '5:1', '5:1:cosine')."""

    start: float
    end: float
    shape: Literal["linear", "cosine", "step"] = "linear"

    def at(self, progress: float) -> float:
        """The temperature after `progress` (0 to 1) of the training. 'step' holds `start` for the first half."""
        progress = min(max(progress, 0.0), 1.0)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        elif self.shape == "step":
            progress = float(progress >= 0.5)
        return self.start + (self.end - self.start) * progress


_SHAPES = ("linear", "cosine", "step")


def parse_temperature(text: str | float) -> Temperature:
    """'3', '5:1' or '5:1:cosine' as a Temperature; ConfigError says what is wrong."""
    parts = str(text).split(":")
    form = "a temperature is a number ('3'), a range ('5:1'), or a range with a shape ('5:1:cosine')"
    if len(parts) > 3:
        raise ConfigError(f"temperature '{text}' has too many parts: {form}")
    try:
        numbers = [float(part) for part in parts[:2]]
    except ValueError:
        raise ConfigError(f"temperature '{text}' is not a number: {form}") from None
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise ConfigError(f"temperature '{text}' must be above 0: the logits are divided by it")
    shape = parts[2] if len(parts) == 3 else "linear"
    if shape not in _SHAPES:
        raise ConfigError(
            f"temperature '{text}': no shape '{shape}', only {', '.join(_SHAPES)}.{suggest(shape, _SHAPES)}"
        )
    return Temperature(numbers[0], numbers[-1], shape)  # type: ignore[arg-type]


LOSSES = (
    "kl",
    "reverse_kl",
    "mse_logits",
    "soft_cross_entropy",
    "ce",
)  # held equal to softlabels.losses.LOSSES by a test


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
        if name not in LOSSES:
            raise ConfigError(f"no loss '{name}': there are {', '.join(LOSSES)}.{suggest(name, LOSSES)}")
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"loss '{name}' has weight {weight}: a weight must be above 0")
    return losses


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
    """A command-line value as YAML reads it, and 1e-4 as the number that it is (YAML 1.1 takes it for a word)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return _numbers(value)


_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _numbers(value: Any) -> Any:
    if isinstance(value, str) and _FLOAT.fullmatch(value):
        return float(value)
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return value


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


class StudentOptions(Strict):
    """How one student is built and trained."""

    student: str
    options: dict[str, Any] = {}
    losses: dict[str, float] = {"kl": 0.7, "ce": 0.3}
    temperature: str = "1"
    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.1, ge=0, le=1)  # share of the steps
    clip: float = Field(default=1.0, gt=0)  # largest norm of the gradient
    validation: float = Field(default=0.1, ge=0, lt=1)  # share of the rows held out where no --eval is given
    patience: int | None = Field(default=None, ge=1)  # epochs without a better score before stopping
    seed: int = Field(default=0, ge=0, lt=2**32)  # numpy takes no larger one

    @field_validator("temperature", mode="before")
    @classmethod
    def _temperature(cls, value: Any) -> str:
        parse_temperature(value)
        return str(value)

    @field_validator("losses")
    @classmethod
    def _losses(cls, value: dict[str, float]) -> dict[str, float]:
        return check_losses(value)


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


# --------------------------------------------------------------------------------------------------------- recipes


class CorpusChoice(Strict):
    """Which rows each stage of a recipe sees. A stage without a split of its own takes the whole source."""

    source: str
    train: str | None = None  # the split with labels that the teacher learns from
    transfer: str | None = None  # the split(s) the teacher labels for the students; by default `train`
    test: str | None = None
    test_source: str | None = None  # another file to test on
    text: str | None = None
    label: str | None = None
    rows: int | None = Field(default=None, ge=1)


class TeacherChoice(Strict):
    """The teacher: a pretrained model that is fine-tuned (`train`), or one that is ready."""

    model: str
    train: TeacherTraining | None = None


class StudentEntry(StudentOptions):
    """One student of a recipe; with `hard_twin`, the same student on hard labels alone is trained beside it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    hard_twin: bool = True
    hard_epochs: int | None = Field(default=None, ge=1)  # the twin sees fewer rows, and may need more epochs
    seeds: list[int] = Field(default=[0], min_length=1)


class Recipe(Strict):
    """One experiment, from corpus to students."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    corpus: CorpusChoice
    teacher: TeacherChoice
    dump: DumpOptions = DumpOptions()
    students: list[StudentEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        names = [student.name for student in self.students]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"two students are called '{doubled[0]}': give each a name of its own")
        return self


def build_options(model: type[Strict], values: dict[str, Any], *, where: str):
    """`model(**values)`, or one ConfigError that lists every fault; `where` names the file or command."""
    try:
        return model(**values)
    except ValidationError as error:
        raise ConfigError(explain(error, where=where)) from None


def explain(error: ValidationError, *, where: str) -> str:
    """pydantic's faults as one readable message."""
    faults = []
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"])
        text = fault["msg"].removeprefix("Value error, ")
        faults.append(f"{place}: {text}" if place else text)
    return f"{where}: " + "; ".join(faults)


def recipes_folder() -> Path:
    """Where the recipes lie: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "pipeline"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "pipeline"


def find_recipe(name: str) -> Path:
    """A recipe's file: a path, or the name of a recipe that ships with softlabels."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = recipes_folder() / f"{name}.yaml"
    if re.fullmatch(r"[\w.-]+", name) and shipped.is_file():
        return shipped
    names = sorted(recipe.stem for recipe in recipes_folder().glob("*.yaml"))
    raise ConfigError(f"no recipe '{name}': neither a file nor one of {', '.join(names)}.{suggest(name, names)}")


def read_recipe(name: str, *, changes: Sequence[str] = ()) -> Recipe:
    """The recipe `name` (a YAML file or a shipped name), after `KEY=VALUE` changes (`students.0.lr=1e-3`)."""
    path = find_recipe(name)
    try:
        data = _numbers(yaml.safe_load(path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not UTF-8 (byte {error.start})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {path} must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    for key, value in parse_options(changes).items():
        _set(data, key, value)
    return build_options(Recipe, data, where=f"recipe {path}")


def _set(data: Any, key: str, value: Any) -> None:
    """Set `a.b.0.c` inside nested dicts and lists; students may be addressed by name."""
    *parents, last = key.split(".")
    for part in parents:
        data = _child(data, part, key)
    if isinstance(data, list):
        data[_position(data, last, key)] = value
    elif isinstance(data, dict):
        data[last] = value
    else:
        raise ConfigError(f"--set {key}: there is nothing below '{parents[-1]}' to set")


def _child(data: Any, part: str, key: str) -> Any:
    if isinstance(data, list):
        return data[_position(data, part, key)]
    if not isinstance(data, dict):
        raise ConfigError(f"--set {key}: '{part}' lies below a single value")
    return data.setdefault(part, {})


def _position(items: list, part: str, key: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise ConfigError(
        f"--set {key}: no entry '{part}'; there are {', '.join(str(n) for n in names)} or 0 to {len(items) - 1}"
    )


def fingerprint(value: Any) -> str:
    """A short stable hash of plain data: two stages with the same inputs have the same fingerprint."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


def package_versions(*packages: str) -> dict[str, str]:
    """The installed versions of softlabels and of `packages`, for what a cache or a run says of its making."""
    return {"softlabels": __version__, **{package: version(package) for package in packages}}
