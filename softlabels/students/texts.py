"""The words of a batch's texts, without special tokens and padding; and the two texts of a pair apart.

A teacher reads a pair as one sequence: [CLS] a [SEP] b [SEP] with token types, <s> a </s></s> b </s> without. A student
that encodes each text by itself takes it apart again, by what `find_pairs` says of the training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from softlabels.students import StudentSpec

Pairs = Literal["token_types", "separators"]  # what tells the second text of a row from the first
_AT_ONCE = 512  # rows


@dataclass(frozen=True, slots=True)
class Words:
    """Texts as rows of a student's table, words only."""

    rows: Tensor  # (B, L), after the words zeros, which are the padding's row
    lengths: Tensor  # (B,), 0 for a text without words


def special_ids(spec: StudentSpec) -> list[int]:
    """The ids that stand for no word: [CLS], [SEP] and the like, and padding. [UNK] and [MASK] stand for one."""
    if spec.tokenizer is None:
        return []
    tokenizer = spec.tokenizer()
    special = {tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, *separator_ids(spec)}
    return sorted(special - {None, tokenizer.unk_token_id, tokenizer.mask_token_id})


def separator_ids(spec: StudentSpec) -> list[int]:
    """The ids that end a text."""
    if spec.tokenizer is None:
        return []
    tokenizer = spec.tokenizer()
    return sorted({tokenizer.sep_token_id, tokenizer.eos_token_id} - {None})


def find_pairs(spec: StudentSpec) -> Pairs | None:
    """What tells the two texts of the training rows apart; None where rows are single texts, or nothing tells.

    Token types where any row has a second one; else separators where words follow one in half of the rows or more (a
    separator that is spelt out in a few single texts makes no pairs). A tokenizer that puts nothing between two texts
    (GPT-2's) leaves them one.
    """
    if spec.sequences is None:
        return None
    separators, special = separator_ids(spec), torch.tensor(special_ids(spec))
    rows = pairs = 0
    sequences = iter(spec.sequences())
    while some := list(islice(sequences, _AT_ONCE)):
        if any(row.token_type_ids is not None and (row.token_type_ids == 1).any() for row in some):
            return "token_types"
        ids = pad_sequence([torch.tensor(row.input_ids) for row in some], batch_first=True, padding_value=-1)
        second = after_separator(ids, separators) & (ids >= 0) & ~torch.isin(ids, special)
        rows, pairs = rows + len(some), pairs + int(second.any(1).sum())
    return "separators" if pairs and 2 * pairs >= rows else None


def second_text(input_ids: Tensor, token_type_ids: Tensor | None, *, pairs: Pairs, separators: Sequence[int]) -> Tensor:
    """(B, L) bool: where the second text of each pair is; special tokens and padding may be there too."""
    if pairs == "separators":
        return after_separator(input_ids, separators)
    if token_type_ids is None:  # as in a BERT: all of it is the first text
        return torch.zeros_like(input_ids, dtype=torch.bool)
    return token_type_ids == 1


def after_separator(input_ids: Tensor, separators: Sequence[int]) -> Tensor:
    """(B, L) bool: what comes after the first separator, those at the very beginning not counted (OPT's </s>)."""
    ends = torch.zeros_like(input_ids, dtype=torch.bool)
    for separator in separators:
        ends = ends | (input_ids == separator)
    begun = (~ends).long().cumsum(1) > 0
    return (ends & begun).long().cumsum(1) > 0


def gather_words(rows: Tensor, words: Tensor) -> Words:
    """The entries of `rows` (B, L) where `words` (B, L) is true, moved to the left, each text in its order."""
    longest = rows.shape[1]
    lengths = words.sum(1)
    places = torch.where(words, words.long().cumsum(1) - 1, longest)  # what is no word falls into a last column
    gathered = rows.new_zeros(rows.shape[0], longest + 1).scatter(1, places, rows)[:, :longest]
    # an exported graph's shapes can't follow from its values
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        gathered = gathered[:, : max(int(lengths.max()), 1)]
    return Words(gathered, lengths)
