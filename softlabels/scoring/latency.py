"""How long a text takes, one at a time on one CPU thread; student and teacher take turns.

The teacher's side is a model of its configuration with random weights, since the time of a forward pass does not depend
on them: the teacher itself is not needed.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from softlabels.averages import Average
from softlabels.cache import Cache
from softlabels.runs import Run
from softlabels.scoring.figures import Latency
from softlabels.students.exported import OnnxStudent
from softlabels.tokens import pad_batch, tokenize
from softlabels.types import Example

_TEXTS = 50
_LARGEST_TIMED = 2_000_000_000  # parameters; building a larger teacher only to time it would fill the memory


def measure_latency(student: Run | Average, examples: Sequence[Example], cache: Cache | None) -> Latency:
    """Student and teacher take turns on the same texts, so that a busy machine slows both."""
    step = max(1, len(examples) // _TEXTS)
    chosen = list(examples[::step][:_TEXTS])
    teacher = None if cache is None else _teacher_clock(cache)
    mine: list[float] = []
    theirs: list[float] = []
    threads = torch.get_num_threads()
    warm = len(chosen[:3])  # texts that are only there to warm up
    if isinstance(student, Average):
        student = replace(student, members=[_on_one_thread(run) for run in student.members])
    else:
        student = _on_one_thread(student)
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would be measured instead
    try:
        for example in (*chosen[:warm], *chosen):
            mine.append(_milliseconds(partial(student.logits, [example])))
            if teacher is not None:
                theirs.append(_milliseconds(partial(teacher.answer, example)))
    finally:
        torch.set_num_threads(threads)
    return Latency(
        ms=statistics.median(mine[warm:]),
        teacher_ms=statistics.median(theirs[warm:]) if theirs else None,
        teacher_parameters=None if teacher is None else teacher.parameters,
        texts=len(chosen),
        machine=_processor(),
    )


def _processor() -> str:
    """The name of this machine's processor, and nothing else of the machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _on_one_thread(run: Run) -> Run:
    """ONNX Runtime has threads of its own, which torch's setting does not reach."""
    if not isinstance(run.student, OnnxStudent):
        return run
    return replace(run, student=run.student.with_threads(1))


def _milliseconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


@dataclass(frozen=True, slots=True)
class _TeacherClock:
    answer: Callable[[Example], Any]
    parameters: int


def _teacher_clock(cache: Cache) -> _TeacherClock | None:
    """A model of the teacher's shape with random weights; None where it is unknown, too large, or needs code."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if not cache.teacher_config():
        return None
    try:
        config = AutoConfig.from_pretrained(cache.path / "teacher", local_files_only=True, trust_remote_code=False)
    except ValueError:  # of an architecture that transformers doesn't have, or only with code from elsewhere
        return None
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForSequenceClassification.from_config(config).parameters())
    if size > _LARGEST_TIMED:
        return None
    model = AutoModelForSequenceClassification.from_config(config).eval()
    tokenizer, limit = cache.tokenizer(), cache.manifest.dump.max_length

    @torch.no_grad()
    def answer(example: Example) -> torch.Tensor:
        tokens = tokenize(tokenizer, [example], max_length=limit).examples
        return model(**pad_batch(tokens, pad_token_id=cache.manifest.teacher.pad_token_id).model_inputs()).logits

    return _TeacherClock(answer, size)
