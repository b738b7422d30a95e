"""Numbers that move over a training, and temperatures: read from their short forms such as '5:1:cosine'."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from softlabels.config.strict import suggest
from softlabels.errors import ConfigError


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
