"""What is written on a command line or in YAML, as values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from softlabels.errors import ConfigError


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

    yaml_implicit_resolvers = {  # a class attribute, as the base class has it
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
