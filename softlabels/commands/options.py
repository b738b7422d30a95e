"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softlabels.errors import ConfigError

if TYPE_CHECKING:
    from softlabels.config import CombineOptions, RayOptions

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
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="run the Python code that the model brings; only for models you trust"),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="the run folder of a student")]

# of dump, plan and import
Teacher = Annotated[str, typer.Option("--teacher", help="the fine-tuned teacher: a folder or a Hugging Face name")]
Splits = Annotated[
    str | None, typer.Option("--split", help="which split(s) of the corpus, joined by +, e.g. train+unlabeled")
]
Maskings = Annotated[int | None, typer.Option("--maskings", min=1, help="of masked-lm: how often each text is masked")]
MaskRate = Annotated[
    float | None, typer.Option("--mask-rate", help="of masked-lm: the share of tokens; by default 0.15")
]
MaskSmoothing = Annotated[
    float | None,
    typer.Option(
        "--mask-smoothing",
        help="of masked-lm: rare tokens are masked more often, a token ∝ its count^-SMOOTHING; DistilBERT has 0.7",
    ),
]
MaskTargets = Annotated[
    str | None,
    typer.Option(
        "--mask-targets",
        metavar="masked|all",
        help="of masked-lm: the tokens that vocab is kept of, those that are masked (default) or all",
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=1, help="tokens a text; by default what the teacher takes, at most 512"),
]
BatchTokens = Annotated[int | None, typer.Option("--batch-tokens", min=1, help="tokens in a batch, padding counted")]
ShardRows = Annotated[int | None, typer.Option("--shard-rows", min=1, help="rows a file")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="the teacher computes in float32, bfloat16 or float16")]
NoText = Annotated[bool, typer.Option("--no-text", help="leave the raw texts out of the cache")]

# of what trains
EvalSplit = Annotated[str | None, typer.Option("--eval-split", help="the split of the --eval corpus")]
StudentOption = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="an option of the student, e.g. layers=2; may be repeated"),
]
LearningRate = Annotated[float | None, typer.Option("--lr", help="the highest learning rate")]
Patience = Annotated[
    int | None, typer.Option("--patience", min=1, help="stop after so many epochs without a better score")
]
Resume = Annotated[bool, typer.Option("--resume", help="go on with an interrupted run, to the same result")]

# of several teachers
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean",
        help="of several teachers: the mean of their logits (by default) or of their probabilities, or the median of "
        "their logits",
    ),
]
Weights = Annotated[
    str | None, typer.Option("--weights", metavar="W,W,...", help="of the means: a number for each cache, e.g. 2,1,1")
]
Choose = Annotated[
    str | None,
    typer.Option(
        "--choose",
        help="instead of a mean, for each row one teacher's logits: of the surest of the row's label (label; rows "
        "without one take the mean), or of the surest of all (entropy)",
    ),
]

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


def combine_options(
    mean: str | None, weights: str | None, choose: str | None, *, keep: bool = False, where: str
) -> CombineOptions:
    """What the options of several teachers say for `where`; only those given are set. ConfigError if they are wrong."""
    from softlabels.config import CombineOptions, build_options

    given: dict[str, Any] = {"mean": mean, "choose": choose, "keep": keep or None}
    if weights is not None:
        try:
            given["weights"] = [float(part) for part in weights.split(",")]
        except ValueError:
            raise ConfigError(
                f"--weights {weights}: give numbers separated by commas, one a cache, e.g. 2,1,1"
            ) from None
    return build_options(CombineOptions, {key: value for key, value in given.items() if value is not None}, where=where)
