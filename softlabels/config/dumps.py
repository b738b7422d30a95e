"""Options of what makes caches: dumps, imports and combinations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from softlabels.config.strict import Strict
from softlabels.errors import ConfigError


class Masking(Strict):
    """How tokens are hidden from a masked language model."""

    rate: float = Field(default=0.15, gt=0, lt=1)  # share of the tokens
    times: int = Field(default=1, ge=1, le=1000)  # maskings of each text
    seed: int = Field(default=0, ge=0, lt=2**32)
    smoothing: float = Field(default=0.0, ge=0, le=1)  # a token is masked ∝ its count in the corpus^-smoothing
    targets: Literal["masked", "all"] = "masked"  # all: the teacher speaks of every token, as in DistilBERT


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
