"""Every kind of field a capture gives goes through a dump and comes back as the teacher said it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from softlabels.cache import open_cache
from softlabels.cache.reader import capture_of
from softlabels.captures import parse_captures, prepare
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.teacher import load_teacher
from softlabels.types import MASKED, Example
from tests.models import TEXTS, save_model, save_teacher, tiny_gpt2, tiny_tokenizer

ROWS = [Example(f"row-{i}", text) for i, (text, _) in enumerate(TEXTS[:11])]
BOUNDS = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}
ASKED = ["hidden:1", "hidden:1@cls", "hidden:1@mean", "qkv:2", "attention:2", "attention:2@scores"]


@pytest.mark.parametrize("codec", BOUNDS)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_what_is_captured_is_what_is_read(kind: str, codec: str, tmp_path: Path) -> None:
    if kind == "bert":
        folder, asked = save_teacher(tmp_path / "bert"), [*ASKED, "pooled"]
    else:
        tokenizer = tiny_tokenizer(kind="bpe")
        folder, asked = save_model(tmp_path / "gpt2", tiny_gpt2(tokenizer), tokenizer), ASKED
    options = DumpOptions.model_validate({"capture": asked, "codec": codec, "shard_rows": 4})
    corpus = Corpus(source="made", split=None, examples=ROWS, label_names=None)
    dump(corpus, teacher=str(folder), out=tmp_path / "cache", options=options, device="cpu")
    cache = open_cache(tmp_path / "cache")
    assert {capture_of(field) for field in cache.fields} == set(asked)

    batch = cache.batch(np.arange(len(ROWS)), list(cache.fields))
    wanted = prepare(load_teacher(str(folder)).model, parse_captures(asked), batch.tokens).take(batch.tokens)
    real = batch.teacher.mask.bool()
    for field, spec in cache.fields.items():
        got, live = batch.teacher.get(field), wanted[field]
        if spec.heads and spec.kind == "token":  # a head a dimension, as losses see it
            got = got.transpose(1, 2).flatten(2)
        if spec.kind == "token":
            got, live = got[real], live[real]
        if spec.kind == "pair":
            pairs = (real[:, None, :, None] & real[:, None, None, :]).expand_as(live)
            got, live = got[pairs], live[pairs]
        if field.endswith("@scores"):
            assert torch.equal(got < MASKED / 2, live == MASKED)
            assert bool((live == MASKED).any()) == (kind == "gpt2")
            got, live = got[live > MASKED], live[live > MASKED]
        assert (got - live).abs().max() <= BOUNDS[codec] * live.abs().max(), field
    probabilities = batch.teacher.attention_scores(2).softmax(-1).transpose(1, 2)[real]
    assert torch.allclose(probabilities, wanted["attention.02"].transpose(1, 2)[real], atol=2 * BOUNDS[codec])
