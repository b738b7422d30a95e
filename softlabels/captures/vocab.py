"""`vocab:exact` and `vocab:topk=K`: a language model's logits over its vocabulary, at each target, for any temperature.

    vocab:exact            the state that the output head sees, D values a target, and the head once for all
    vocab:topk=64          the 64 largest logits and what the tail weighs (see `softlabels.truncated`), read as they lie
    vocab:topk=64,packed   the same in fewer bytes, decoded when it is read
    …,samples=2            with so many sampled tail tokens, for losses that are unbiased

Ids are those of the tokenizer: columns that a model has beyond them, to make its vocabulary round, are left out.
"""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from torch import Tensor

from softlabels.cache.codec import id_type
from softlabels.cache.format import FieldSpec
from softlabels.cache.vocab import PACKED, STATES, parse_form
from softlabels.cache.vocab_packed import pack
from softlabels.cache.vocab_plain import to_plain
from softlabels.captures.forward import Forward, Request
from softlabels.errors import ConfigError, TeacherError
from softlabels.truncated import truncate
from softlabels.types import LANGUAGE_MODELS

FIRST_LAYER = None
FORMS = ("",)


def fields(request: Request, forward: Forward, *, codec: str) -> dict[str, FieldSpec]:
    """`vocab_states`; or `vocab_ids`, `vocab_values` and what else `to_plain` has; or `vocab_packed`."""
    if codec == "int8" and request.form == "exact":
        raise ConfigError("--codec int8 is not for vocab:exact: give --codec float16, or capture vocab:topk=64")
    specs = {}
    for name, values in take(request, forward).items():
        kind = codec if name == STATES else str(values.dtype).removeprefix("torch.")
        if name.endswith("ids"):
            kind = id_type(forward.vocab_size).name  # not as they travel: torch has little use for its own uint16
        specs[name] = FieldSpec.model_validate(
            {"kind": "target", "type": kind, "width": values.shape[1], "form": request.form}
        )
    return specs


def take(request: Request, forward: Forward) -> dict[str, Tensor]:
    """(T, …) a field, for the T targets of the batch."""
    if forward.head_states is None or forward.logits is None:
        raise TeacherError(
            f"--capture vocab: only teachers for {', '.join(LANGUAGE_MODELS)} have a vocabulary to speak of"
        )
    form = parse_form(request.form)
    if not form.k:
        return {STATES: forward.head_states}
    kept = truncate(
        forward.logits[:, : forward.vocab_size].float(),
        k=form.k,
        samples=form.samples,
        draws=_draws(forward, form.samples),
    )
    if kept.masked:
        raise TeacherError(
            f"--capture vocab:{request.form}: the teacher gives {kept.masked} tokens of its vocabulary no logit at all"
        )
    kept = kept.to("cpu")
    if form.packed:
        return {PACKED: torch.from_numpy(pack(kept))}
    return {f"vocab_{name}": _tensor(array) for name, array in to_plain(kept).items() if array.shape[1]}


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int32) if array.dtype == np.uint16 else array)


def _draws(forward: Forward, samples: int) -> Tensor:
    """(T, samples) in [0, 1): what is drawn follows from a row's tokens, not from the batch that it came in."""
    assert forward.input_ids is not None and forward.targets is not None
    counts = forward.targets.sum(dim=1).tolist()
    lengths = (
        forward.mask.sum(dim=1).tolist() if forward.mask is not None else [forward.input_ids.shape[1]] * len(counts)
    )
    rows = forward.input_ids.cpu().numpy().astype("<i4")
    draws = [
        np.random.default_rng(xxhash.xxh3_64_intdigest(row[:length].tobytes())).random((count, samples))
        for row, length, count in zip(rows, lengths, counts, strict=True)
    ]
    return torch.from_numpy(np.concatenate(draws))
