"""Models that refuse unknown keys with the one that was probably meant, and tell every fault in one message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from softlabels.errors import ConfigError


def suggest(word: str, choices: Iterable[str]) -> str:
    """ " Did you mean 'x'?" where one of `choices` is close to `word`, else the empty string."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def refuse_doubled(names: Sequence[str], what: str, *, each: str = "each") -> None:
    """ValueError where two of `what` have one name."""
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"two {what} are called '{doubled[0]}': give {each} a name of its own")


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
