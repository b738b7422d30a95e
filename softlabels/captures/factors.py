"""The factors of a teacher's logits, from a sample of its targets: what `vocab:topk=K,factors=R` keeps of them once."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from softlabels.captures import TeacherRun
from softlabels.errors import TeacherError
from softlabels.factors import LogitFactors, fit_factors
from softlabels.types import NO_LABEL, TokenBatch

TARGETS = 1024  # sampled; of very large vocabularies fewer, so that their logits take no more than
_ROOM = 1 << 26  # numbers


def sample_factors(run: TeacherRun, batches: Iterable[TokenBatch], *, targets: int, rank: int) -> LogitFactors:
    """At most `rank` factors of the logits at some of the `targets` that the `batches` have, evenly spread."""
    wanted = min(TARGETS, max(1, _ROOM // run.vocab_size))
    step, seen, sample = max(1, -(-targets // wanted)), 0, []
    for batch in batches:
        forward = run.forward(batch)
        if forward.logits is None:
            raise TeacherError("--capture vocab: only masked-lm and causal-lm teachers have a vocabulary to speak of")
        count = int((batch.labels != NO_LABEL).sum())
        sample.append(forward.logits[-seen % step : count : step, : run.vocab_size].float())
        seen += count
    return fit_factors(torch.cat(sample), rank=rank).to("cpu")
