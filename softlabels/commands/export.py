"""`softlabels export`: a student in ONNX."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from softlabels.commands.options import Json, RunFolder
from softlabels.commands.show import print_report
from softlabels.errors import ConfigError

EXAMPLES = "Example:  softlabels export runs/bilstm --int8 --out runs/int8   |   softlabels predict runs/int8 'A film'"


def export_command(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="the run folder for the exported student")],
    format: Annotated[str, typer.Option(help="onnx")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="8-bit weights (dynamic quantisation)")] = False,
    as_json: Json = False,
) -> None:
    """A student in ONNX, checked against PyTorch; predict and evaluate run it with ONNX Runtime (extra 'export')."""
    if format != "onnx":
        raise ConfigError(f"--format {format} can't be written: there is onnx")
    from softlabels.export import export

    print_report(asdict(export(run, out=out, int8=int8)), as_json=as_json)
