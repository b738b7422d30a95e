"""What a cache says of a whole vocabulary: the form it was kept in, and its fields of a batch as logits again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softlabels.cache.factors import load_factors
from softlabels.cache.head import OutputHead, load_head
from softlabels.cache.vocab_packed import Packing, unpack
from softlabels.cache.vocab_plain import from_plain
from softlabels.cache.vocab_tail import NODES
from softlabels.errors import CacheError, ConfigError
from softlabels.factors import LogitFactors
from softlabels.truncated import TruncatedLogits
from softlabels.types import Signals

if TYPE_CHECKING:
    from softlabels.cache.reader import Cache

MOST_FACTORS = 256  # of a thousand positions or so; and a position costs as many squared
STATES, PACKED = "vocab_states", "vocab_packed"
PLAIN = ("ids", "values", "level", "tail")  # each a field `vocab_…`
SAMPLED = ("sampled_ids", "sampled_values")  # where there are samples


@dataclass(frozen=True, slots=True)
class Form:
    """What stands behind `vocab:`. k 0: exact."""

    k: int = 0
    samples: int = 0
    packed: bool = False
    factors: int = 0  # the most that the tail is expected by

    def __str__(self) -> str:
        if not self.k:
            return "exact"
        samples = f",samples={self.samples}" if self.samples else ""
        factors = f",factors={self.factors}" if self.factors else ""
        return f"topk={self.k}{samples}{factors}{',packed' if self.packed else ''}"


def parse_form(text: str) -> Form:
    """'exact', 'topk=64', 'topk=64,samples=2,factors=32,packed'; ConfigError says what is wrong."""
    form = "say vocab:exact, vocab:topk=64 or vocab:topk=64,samples=2,factors=32,packed"
    if text == "exact":
        return Form()
    numbers: dict[str, int] = {}
    packed = False
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if key == "packed" and not equals:
            packed = True
        elif key in ("topk", "samples", "factors") and value.isdecimal() and key not in numbers:
            numbers[key] = int(value)
        else:
            raise ConfigError(f"--capture vocab:{text}: '{part}' is nothing that vocab takes; {form}")
    if numbers.get("topk", 0) < 1:
        raise ConfigError(f"--capture vocab:{text}: the top how many? {form}")
    factors = numbers.get("factors", 0)
    if factors > MOST_FACTORS:
        raise ConfigError(f"--capture vocab:{text}: {factors} factors of the tail: give {MOST_FACTORS} at the most")
    return Form(numbers["topk"], numbers.get("samples", 0), packed, factors)


@dataclass(frozen=True, slots=True)
class VocabTeacher:
    """Turns the fields of a batch into the teacher's logits over its vocabulary."""

    form: Form
    fields: list[str]
    vocab_size: int
    head: OutputHead | None  # of exact ones
    packing: Packing | None  # of packed ones
    factors: LogitFactors | None = None  # of truncated ones, where the tail has any

    def __call__(self, teacher: Signals, *, device: torch.device | str = "cpu") -> Tensor | TruncatedLogits:
        """Logits (T, V) on `device`, where they are exact; else what is known of them. CacheError where damaged."""
        if self.head is not None:
            return self.head(teacher.get(STATES).to(device))
        if self.packing is not None:
            kept = unpack(teacher.get(PACKED).cpu().numpy(), self.packing).to(device)
            return replace(kept, factors=self.factors)
        arrays = {name: teacher.get(f"vocab_{name}").cpu().numpy() for name in PLAIN}
        for name in SAMPLED:
            empty = torch.empty(len(arrays["ids"]), 0)
            arrays[name] = (teacher.get(f"vocab_{name}") if self.form.samples else empty).cpu().numpy()
        return replace(from_plain(arrays, self.vocab_size).to(device), factors=self.factors)

    def to(self, device: torch.device | str) -> VocabTeacher:
        """The same with its head, or its factors, on another device."""
        head = None if self.head is None else self.head.to(device)
        return replace(self, head=head, factors=None if self.factors is None else self.factors.to(device))


def open_vocab(cache: Cache) -> VocabTeacher:
    """What `cache` holds of a vocabulary; the exact logits where it has both. CacheError where it has none."""
    forms = open_vocabs(cache)
    if not forms:
        cache.require(["vocab_ids"], why="a language model's student")
        raise AssertionError("require raises where a field is missing")
    return forms[0]


def open_vocabs(cache: Cache) -> list[VocabTeacher]:
    """Every form in which `cache` holds logits over a vocabulary, exact ones first."""
    return [_open(cache, names) for names in ([STATES], _plain(), [PACKED]) if names[0] in cache.fields]


def _open(cache: Cache, names: list[str]) -> VocabTeacher:
    vocab_size = cache.manifest.teacher.vocab_size
    spec = cache.fields[names[0]]
    try:
        form = parse_form(spec.form or "")
        packing = Packing(vocab_size, max(form.k, 1), form.samples)
    except ConfigError:
        raise CacheError(f"cache {cache.path}: field {names[0]} has the form '{spec.form}', which cannot be") from None
    if form.samples and not form.packed:
        names = [*names, *(f"vocab_{name}" for name in SAMPLED)]
    cache.require(names, why=f"vocab:{form}")
    _check_widths(cache, form, names, packing)
    head = load_head(cache.path, vocab_size=vocab_size, width=spec.width) if not form.k else None
    factors = load_factors(cache.path, vocab_size=vocab_size, rank=form.factors) if form.factors else None
    return VocabTeacher(form, names, vocab_size, head, packing if form.packed else None, factors)


def _plain() -> list[str]:
    return [f"vocab_{name}" for name in PLAIN]


def _check_widths(cache: Cache, form: Form, names: Sequence[str], packing: Packing) -> None:
    """CacheError where a field's shape is not that of its form."""
    wanted = {"vocab_ids": form.k, "vocab_values": form.k, "vocab_level": 1, "vocab_tail": 2 * NODES}
    wanted |= {f"vocab_{name}": form.samples for name in SAMPLED}
    wanted[PACKED] = packing.bytes
    for name in names:
        spec = cache.fields[name]
        if spec.kind != "target" or (name in wanted and spec.width != wanted[name]):
            raise CacheError(f"cache {cache.path}: field {name} is not what vocab:{form} has: the manifest is damaged")
