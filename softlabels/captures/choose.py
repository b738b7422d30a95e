"""Which captures a teacher's task is asked for: the usual ones where none is named, and not what it cannot give."""

from __future__ import annotations

from collections.abc import Sequence

from softlabels.captures import parse_captures
from softlabels.captures.forward import Request
from softlabels.errors import ConfigError
from softlabels.types import LANGUAGE_MODELS, Task

_DEFAULT: dict[Task, str] = {
    "sentence-embedding": "pooled",
    "masked-lm": "vocab:topk=64",
    "causal-lm": "vocab:topk=64",
    "seq2seq-lm": "vocab:topk=64",
}


def choose_captures(requests: Sequence[Request], task: Task) -> list[Request]:
    """`requests`, or the default of `task`; ConfigError where logits are asked of a teacher without, or with too many.

    Without a request: logits; of language models vocab:topk=64, of embedding models pooled.
    """
    chosen = list(requests) or parse_captures([_DEFAULT.get(task, "logits")])
    if all(request.capture != "logits" for request in chosen):
        return chosen
    if task == "sentence-embedding":
        raise ConfigError(
            "--capture logits: this teacher has no trained classification head: fine-tune it with softlabels "
            "train-teacher, and dump the folder that it writes; or capture pooled, or hidden:LAYERS@mean"
        )
    if task in LANGUAGE_MODELS:
        raise ConfigError(
            f"--capture logits: a {task} gives as many as its vocabulary has tokens: capture vocab:topk=64 or "
            f"vocab:exact; or fine-tune it into a classifier with softlabels train-teacher"
        )
    return chosen
