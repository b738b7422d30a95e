"""A student's own signals while it learns, under the names that its teacher's have in a cache.

Teachers and students are run by the same code, so that a loss sees the same things on both sides; a student's carry
gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softlabels.captures import TeacherRun, prepare
from softlabels.captures.forward import Request
from softlabels.types import Signals, TokenBatch, layer_field


def prepare_student(
    student: PreTrainedModel, looks_at: Mapping[str, Sequence[int]], probe: TokenBatch, *, language: bool = False
) -> TeacherRun:
    """`student` set up to give what losses look at below its logits: {'hidden': layers, 'attention': …, 'qkv': …}.

    `probe` is any small batch. A language model's logits come at its targets alone. TeacherError or ConfigError where
    the student cannot give what is asked.
    """
    forms = {"attention": "scores"}
    requests = [Request(kind, tuple(layers), forms.get(kind, "")) for kind, layers in looks_at.items()]
    if language:
        requests.append(Request("vocab", form="exact"))
    was_training = student.training
    run = prepare(student.eval(), requests, probe)
    student.train(was_training)
    return run


def live_signals(run: TeacherRun, batch: TokenBatch) -> Signals:
    """What the student says of `batch`: `logits` where it has a head, and what it was prepared for."""
    forward = run.forward(batch, gradients=torch.is_grad_enabled())
    fields: dict[str, Tensor] = {}
    if forward.logits is not None:
        fields["logits"] = forward.logits.float()  # (B, C) or (T, V)
    for layer in run.layers_of("hidden"):
        fields[layer_field("hidden", layer)] = forward.hidden(layer).float()  # (B, L, D)
    for layer in run.layers_of("attention"):
        fields[layer_field("attention", layer) + "@scores"] = forward.attention_calls[layer].scores()  # (B, H, L, L)
    for layer in run.layers_of("qkv"):
        call = forward.attention_calls[layer]
        for kind in ("query", "key", "value"):
            fields[layer_field(kind, layer)] = getattr(call, kind).float()  # (B, H, L, K)
    return Signals(fields, batch.attention_mask, batch.labels)
