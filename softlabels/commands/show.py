"""How the commands of this folder print what they did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer

from softlabels.tables import show_facts


def print_report(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """A report's facts as a table for people, or as one JSON object."""
    if as_json:
        typer.echo(json.dumps(dict(facts), default=str, ensure_ascii=False))
    else:
        typer.echo(show_facts(dict(facts)))
