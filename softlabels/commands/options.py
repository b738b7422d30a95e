"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softlabels.errors import ConfigError

if TYPE_CHECKING:
    from softlabels.config import RayOptions

CorpusArgument = Annotated[
    str,
    typer.Argument(
        metavar="CORPUS",
        help="a .jsonl, .csv, .tsv, .parquet, .arrow or .txt file, a folder with train/dev/test files, a Hugging Face "
        "dataset (glue/sst2), or builtin:docstrings",
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text", metavar="COLUMN[,COLUMN]", help="the column with the text, or two for pairs; or with the image"
    ),
]
Label = Annotated[
    str | None, typer.Option("--label", metavar="COLUMN", help="the column with the label; or with the target text")
]
Rows = Annotated[int | None, typer.Option("--rows", min=1, help="take only the first N rows")]
Json = Annotated[bool, typer.Option("--json", help="print the figures as one JSON object")]
Cpu = Annotated[bool, typer.Option("--cpu", help="do not use a GPU")]

# of push and pull
Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--field",
        metavar="FIELD",
        help="only this field (logits), kind (hidden) or pattern (query.*); may be repeated",
    ),
]
Layers = Annotated[
    list[int] | None,
    typer.Option("--layer", metavar="N", help="of fields with layers only this one; may be repeated"),
]
Threads = Annotated[int, typer.Option("--threads", min=1, max=64, help="files at a time")]


def ray_options(engine: str | None, given: Mapping[str, Any], *, command: str, cpu: bool) -> RayOptions | None:
    """What `--engine` and the options of a Ray cluster say for `command`; None for this machine alone."""
    from softlabels.config import RayOptions, build_options, suggest

    named = {key: value for key, value in given.items() if value is not None}
    if engine not in (None, "local", "ray"):
        raise ConfigError(f"--engine {engine}: there are local and ray.{suggest(engine, ['local', 'ray'])}")
    if engine != "ray":
        if named:
            raise ConfigError(f"--{next(iter(named)).replace('_', '-')} is of a Ray cluster: add --engine ray")
        return None
    if cpu:
        if named.get("gpus_per_worker"):
            raise ConfigError(f"{command} takes --cpu or --gpus-per-worker, not both")
        named["gpus_per_worker"] = 0.0
    return build_options(RayOptions, named, where=f"{command} --engine ray")
