"""`softlabels predict`: the student's class for texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from softlabels.commands.options import Json, RunFolder
from softlabels.commands.show import print_json
from softlabels.errors import ConfigError

EXAMPLES = "Examples:  softlabels predict runs/bilstm 'What a film'   |   softlabels predict runs/bilstm - < texts.txt"


def predict_command(
    run: RunFolder,
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT ... | -",
            help="texts, or - to read a text a line from standard input; a tab parts a pair",
        ),
    ],
    as_json: Json = False,
) -> None:
    """The student's class for texts."""
    given = _read_texts(texts)
    from softlabels.predict import predict

    for prediction in predict(run, given):
        if as_json:
            print_json(asdict(prediction))
        else:
            typer.echo(f"{prediction.label}\t{prediction.probability:.3f}\t{prediction.text}")


def _read_texts(texts: Sequence[str]) -> list[str | tuple[str, str]]:
    lines = _read_lines() if list(texts) == ["-"] else list(texts)
    if not lines or any(not part.strip() for line in lines for part in line.split("\t", 1)):
        raise ConfigError(
            "predict needs texts, none of them empty: name them, or give - and one a line on standard input"
        )
    for line in lines:
        try:
            line.encode()
        except UnicodeEncodeError:  # how Python hands over bytes of the command line that are not UTF-8
            raise ConfigError(f"the text {line!r} is not UTF-8: convert it first") from None
    pairs = [line.split("\t", 1) for line in lines]
    return [(pair[0], pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]


def _read_lines() -> list[str]:
    """The lines of standard input; only a line feed ends one, since a text may hold any other separator."""
    if sys.stdin is None:  # closed by whoever started this process
        raise ConfigError("there is no standard input to read: name the texts instead of -")
    try:
        whole = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 (byte {error.start}): convert it first") from None
    return [line.removesuffix("\r") for line in whole.removesuffix("\n").split("\n")] if whole else []
