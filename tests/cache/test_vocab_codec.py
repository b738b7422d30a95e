"""Truncated logits to bytes and back: within the promised errors, and never more bytes than promised."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softlabels.cache.vocab_codec import (
    PLAIN_TAIL_BYTES,
    Packing,
    from_plain,
    pack,
    packed_samples,
    plain_samples,
    to_plain,
    unpack,
    value_errors,
)
from softlabels.errors import CacheError, ConfigError
from softlabels.truncated import TEMPERATURES, TruncatedLogits, tail_mass_at, truncate, use_fewer


def logits(positions: int, vocab_size: int, seed: int = 0, scale: float = 2.2, offset: float = -35.0) -> Tensor:
    """Shaped like a language model's: a bulk, and a few candidates high above it."""
    generator = torch.Generator().manual_seed(seed)
    heights = torch.rand(positions, 1, generator=generator) * 4 * scale
    bulk = torch.randn(positions, vocab_size, generator=generator) * scale + offset
    return bulk + heights * torch.rand(positions, vocab_size, generator=generator) ** 40


def truncated(values: Tensor, k: int, samples: int = 0) -> TruncatedLogits:
    return truncate(values, k=k, samples=samples, generator=torch.Generator().manual_seed(1))


def through_plain(target: TruncatedLogits) -> TruncatedLogits:
    return from_plain(to_plain(target), target.vocab_size, masked=target.masked)


def through_packed(target: TruncatedLogits, value_bits: int = 10) -> TruncatedLogits:
    packing = Packing(target.vocab_size, target.k, target.samples, value_bits)
    packed = pack(target, value_bits=value_bits)
    assert packed.shape == (len(target.ids), packing.bytes) and packed.dtype == np.uint8
    return unpack(packed, packing, masked=target.masked)


CODECS = {"plain": through_plain, "packed": through_packed}


def as_sets(ids: Tensor) -> Tensor:
    return ids.sort(dim=1).values


# -------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("vocab_size", [16_384, 32_000, 50_257, 65_536, 65_537, 128_256, 151_936, 256_000])
def test_bytes_a_token(vocab_size: int) -> None:
    plain = to_plain(truncated(logits(2, vocab_size), 32, plain_samples(vocab_size)))
    widths = {name: array.dtype.itemsize * array.shape[1] for name, array in plain.items()}
    assert widths.pop("ids") == 32 * (2 if vocab_size <= 65_536 else 4) and widths.pop("values") == 64
    assert sum(widths.values()) <= PLAIN_TAIL_BYTES
    value_bits = 10 if vocab_size <= 131_072 else 9
    for k, room in [(32, 113), (96, 299)]:
        samples = packed_samples(vocab_size, k, room=room, value_bits=value_bits)
        assert Packing(vocab_size, k, samples, value_bits).bytes <= room
        assert Packing(vocab_size, k, samples + 1, value_bits).bytes > room
        assert samples >= (1 if k == 96 or vocab_size < 65_537 else 0)


def test_the_layout_is_pinned() -> None:
    """Bytes that caches hold already: a change here needs a new version of the codec."""
    target = TruncatedLogits(
        ids=torch.tensor([[9, 3, 14]]),
        values=torch.tensor([[2.5, 1.0, -0.5]]),
        tail_logsumexp=torch.tensor([[-1.0, 0.5, 1.5, 2.1, 2.4]]),
        tail_mean=torch.tensor([[-0.9, -1.2, -1.5, -1.8, -2.0]]),
        sampled_ids=torch.zeros(1, 0, dtype=torch.int64),
        sampled_values=torch.zeros(1, 0),
        sampled_weights=torch.zeros(1, 0),
        vocab_size=17,
    )
    packing = Packing(17, 3)
    assert (packing.low_bits, packing.high_bits, packing.bits) == (2, 7, 24 + 8 + 65 + 35 + 7 + 6 + 30)
    assert pack(target).tobytes().hex() == PINNED
    plain = to_plain(target)
    assert {name: (array.dtype.str, array.shape) for name, array in plain.items()} == {
        "ids": ("<u2", (1, 3)),
        "values": ("<f2", (1, 3)),
        "level": ("<f4", (1, 1)),
        "tail": ("<f2", (1, 10)),
        "sampled_ids": ("<u2", (1, 0)),
        "sampled_values": ("<f2", (1, 0)),
    }
    assert plain["values"].tolist() == [[0.0, -1.5, -3.0]] and plain["level"].tolist() == [[2.5]]


PINNED = "4020005d2eda30a09758fbd0ccffffff095b3e4007c8"


# -------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("k", [1, 2, 16, 32, 96, 128])
@pytest.mark.parametrize("vocab_size", [300, 50_257, 70_001])
def test_plain_comes_back(k: int, vocab_size: int) -> None:
    target = truncated(logits(30, vocab_size), k, 1)
    got = through_plain(target)
    assert torch.equal(got.ids, target.ids) and torch.equal(got.sampled_ids, target.sampled_ids)
    gaps = target.values[:, :1] - target.values
    assert torch.all((got.values - target.values).abs() <= gaps * 2**-11 + 1e-5)
    assert torch.allclose(got.sampled_values, target.sampled_values, atol=0.02)
    assert torch.allclose(got.sampled_weights, target.sampled_weights, rtol=0.02)
    assert torch.allclose(got.tail_mean, target.tail_mean, atol=0.01)
    for temperature in TEMPERATURES:
        mass, truth = tail_mass_at(got, temperature), tail_mass_at(target, temperature)
        assert torch.allclose(mass, truth, atol=1.2e-4)


@pytest.mark.parametrize("value_bits", [9, 10, 12])
@pytest.mark.parametrize("k", [1, 2, 16, 32, 96, 128])
@pytest.mark.parametrize("vocab_size", [300, 50_257, 70_001])
def test_packed_comes_back(k: int, vocab_size: int, value_bits: int) -> None:
    target = truncated(logits(30, vocab_size), k, 3)
    got = through_packed(target, value_bits)
    assert torch.equal(as_sets(got.ids), as_sets(target.ids)) and torch.equal(got.sampled_ids, target.sampled_ids)
    by_id = [part.values.gather(1, part.ids.argsort(dim=1)) for part in (got, target)]
    assert (by_id[0] - by_id[1]).abs().max().item() < 0.02
    assert torch.equal(got.values, got.values.sort(dim=1, descending=True).values)
    assert (got.sampled_values - target.sampled_values).abs().max().item() < 0.03
    assert torch.allclose(got.sampled_weights, target.sampled_weights, rtol=0.05)
    for temperature in TEMPERATURES:
        mass, truth = tail_mass_at(got, temperature), tail_mass_at(target, temperature)
        assert torch.allclose(mass, truth, atol=1e-4)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.3, 2.0, 3.0, 4.0, 8.0, 15.0])
def test_mass_between_the_nodes(codec: str, temperature: float) -> None:
    values = logits(100, 20_000)
    got = CODECS[codec](truncated(values, 32))
    top = (values.double() / temperature).softmax(1).gather(1, got.ids).sum(1)
    error = (tail_mass_at(got, temperature) - (1 - top)).abs().max().item()
    assert error < 1e-3


@pytest.mark.parametrize("codec", CODECS)
def test_fewer_of_what_was_read(codec: str) -> None:
    values = logits(20, 2000)
    got, direct = use_fewer(CODECS[codec](truncated(values, 64, 1)), 16), truncate(values, k=16)
    assert got.samples == 49
    for temperature in TEMPERATURES:
        assert torch.allclose(tail_mass_at(got, temperature), tail_mass_at(direct, temperature), atol=5e-3)


@pytest.mark.parametrize("codec", CODECS)
def test_no_tokens(codec: str) -> None:
    got = CODECS[codec](truncated(torch.empty(0, 100), 7, 1))
    assert got.ids.shape == (0, 7) and got.sampled_weights.shape == (0, 1) and got.tail_mean.shape == (0, 5)


@pytest.mark.parametrize("codec", CODECS)
def test_padded_columns(codec: str) -> None:
    values = torch.cat([logits(5, 400), torch.full((5, 100), -math.inf)], dim=1)
    got = CODECS[codec](truncated(values, 20, 1))
    assert (got.masked, got.tail_count) == (100, 380)
    assert torch.allclose(tail_mass_at(got, 1e6), torch.full((5,), 0.95), atol=1e-4)


@settings(max_examples=150, deadline=None)
@given(
    codec=st.sampled_from(sorted(CODECS)),
    vocab_size=st.integers(3, 70_000),
    k=st.integers(1, 130),
    scale=st.floats(0, 5),
    offset=st.floats(-300, 300),
    seed=st.integers(0, 1 << 20),
)
def test_any_logits_come_back(codec: str, vocab_size: int, k: int, scale: float, offset: float, seed: int) -> None:
    target = truncated(logits(3, vocab_size, seed, scale, offset), min(k, vocab_size - 1), 1)
    got = CODECS[codec](target)
    assert torch.equal(as_sets(got.ids), as_sets(target.ids)) and torch.equal(got.sampled_ids, target.sampled_ids)
    by_id = [part.values.gather(1, part.ids.argsort(dim=1)) for part in (got, target)]
    assert (by_id[0] - by_id[1]).abs().max().item() < 0.025
    assert bool(torch.isfinite(got.tail_mean).all()) and bool((got.sampled_weights > 0).all())
    for temperature in TEMPERATURES:
        mass, truth = tail_mass_at(got, temperature), tail_mass_at(target, temperature)
        assert torch.allclose(mass, truth, atol=2e-4)


# ----------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("codec", CODECS)
def test_all_equal(codec: str) -> None:
    got = CODECS[codec](truncated(torch.full((3, 1000), -7.25), 10, 1))
    assert torch.equal(got.values, torch.full((3, 10), -7.25))
    for temperature in (0.5, 0.8, 3.0, 100.0):
        assert torch.allclose(tail_mass_at(got, temperature), torch.full((3,), 0.99), atol=1e-4)


def test_equal_values_come_back_by_id() -> None:
    values = torch.zeros(1, 50)
    values[0, [40, 7, 23]] = 5.0
    assert through_packed(truncated(values, 3)).ids.tolist() == [[7, 23, 40]]


def test_a_wide_range_widens_the_step_and_says_so() -> None:
    values = logits(4, 500)
    values[2, 100] += 3000
    target = truncated(values, 8)
    packed, packing = pack(target), Packing(500, 8)
    errors = value_errors(packed, packing)
    off = (unpack(packed, packing).values - target.values).abs().amax(dim=1).numpy()
    assert (errors[[0, 1, 3]] <= 0.02).all() and 0.02 < errors[2] < 3
    assert (off <= errors + 0.02).all()


def test_what_no_step_or_float16_spans_is_refused() -> None:
    values = logits(4, 500)
    values[2, 100] += 1e9
    with pytest.raises(CacheError, match="no step"):
        pack(truncated(values, 8))
    with pytest.raises(CacheError, match="float16"):
        to_plain(truncated(values, 8))


def test_a_sure_teacher() -> None:
    """All the mass on one token: the tail's comes back as next to nothing, and no weight is infinite."""
    values = logits(4, 500)
    values[:, 9] = 60.0
    for codec in CODECS.values():
        got = codec(truncated(values, 8, 1))
        assert bool((tail_mass_at(got, 0.5) < 1e-12).all()) and bool(torch.isfinite(got.sampled_weights).all())


# ---------------------------------------------------------------------------------------------------- bad input


def test_samples_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="room for 2"):
        to_plain(truncated(logits(2, 500), 8, 3))
    with pytest.raises(ConfigError, match="more than 50"):
        packed_samples(50_257, 32, room=50)
    fewer = use_fewer(truncated(logits(2, 500), 8, 1), 7)
    for encode in (to_plain, pack):
        with pytest.raises(ConfigError, match="use_fewer"):
            encode(fewer)


def test_damaged_plain_arrays() -> None:
    target = truncated(logits(3, 500), 8, 1)
    whole = to_plain(target)

    def damaged(name: str, place: tuple[int, int], value: float) -> dict[str, np.ndarray]:
        array = whole[name].copy()
        array[place] = value
        return {**whole, name: array}

    bad = [
        damaged("ids", (1, 3), 500),
        damaged("ids", (1, 3), int(whole["ids"][1, 2])),
        damaged("values", (1, 3), 1.0),
        damaged("values", (1, 0), math.nan),
        damaged("values", (1, 7), -math.inf),
        damaged("level", (1, 0), math.inf),
        damaged("tail", (1, 4), math.nan),
        damaged("sampled_ids", (1, 0), 600),
        damaged("sampled_ids", (1, 0), int(whole["ids"][1, 2])),
        damaged("sampled_values", (1, 0), 2.0),
    ]
    for arrays in bad:
        with pytest.raises(CacheError, match=r"token 1 .*damaged"):
            from_plain(arrays, 500)
    for arrays in ({**whole, "tail": whole["tail"][:, :9]}, {**whole, "ids": whole["ids"][:2]}):
        with pytest.raises(CacheError, match="fit together"):
            from_plain(arrays, 500)
    with pytest.raises(CacheError, match="no tail"):
        from_plain(whole, 500, masked=492)


@pytest.mark.parametrize("vocab_size", [500, 50_257])
def test_damaged_packed_bytes(vocab_size: int) -> None:
    """2,000 tokens with a few random bits flipped, each read alone: refused, or ids in range and finite numbers."""
    packing = Packing(vocab_size, 16, 2)
    packed = np.repeat(pack(truncated(logits(1, vocab_size), 16, 2)), 2000, axis=0)
    generator = np.random.default_rng(5)
    for _ in range(3):
        packed[np.arange(2000), generator.integers(0, packing.bytes, 2000)] ^= generator.integers(1, 256, 2000).astype(
            np.uint8
        )
    refused = 0
    for row in packed:
        try:
            got = unpack(row[None], packing)
        except CacheError:
            refused += 1
            continue
        ids = torch.cat([got.ids, got.sampled_ids], dim=1)
        assert int(ids.min()) >= 0 and int(ids.max()) < vocab_size and len(set(got.ids[0].tolist())) == 16
        assert bool(torch.isfinite(got.values).all()) and bool(torch.isfinite(got.tail_logsumexp).all())
        assert bool(torch.isfinite(got.tail_mean).all())
    assert 500 < refused < 2000


def test_bytes_of_another_layout() -> None:
    packed = pack(truncated(logits(3, 500), 8))
    for packing in (Packing(500, 9), Packing(500, 8, 1), Packing(500, 8, 0, 12)):
        with pytest.raises(CacheError, match="bytes a token"):
            unpack(packed, packing)
    with pytest.raises(CacheError, match="bytes a token"):
        unpack(packed.astype(np.int16), Packing(500, 8))
    with pytest.raises(ConfigError, match="can't be"):
        Packing(500, 500)
    for fill in (0, 255):
        with pytest.raises(CacheError, match="damaged"):
            unpack(np.full_like(packed, fill), Packing(500, 8))


def test_weights_that_are_not_as_drawn() -> None:
    target = truncated(logits(3, 500), 8, 2)
    with pytest.raises(ConfigError, match="as drawn"):
        pack(replace(target, sampled_weights=target.sampled_weights * 2))
