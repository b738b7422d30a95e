"""MiniLM's relations: how the queries, the keys or the values of one layer attend to each other.

A relation is softmax(XXᵀ/√K) of a head's vectors X (L, K): an (L, L) map, whatever K is, so that student and teacher
may differ in width. Each loss is 1/(R·|x|) Σ over the R heads and the tokens of KL(teacher's ‖ student's), mean over
texts, as in Wang et al. 2020, "MiniLM" (values), and Wang et al. 2021, "MiniLMv2" (all three).

`relation_heads=None` takes each model's own heads, which must be as many on both sides (v1). A number, as in v2 (48 for
BERT-base, 64 for BERT-large), joins a token's vectors over the heads and cuts them into that many anew; √K is then of
these. Padding counts neither as key nor as query.
"""

from __future__ import annotations

from torch import Tensor

from softlabels.errors import ConfigError
from softlabels.losses.padding import check_heads, check_tokens, mean_over_texts, product, token_pairs, wide
from softlabels.losses.soft_targets import divergence
from softlabels.types import MASKED, LayerPair, Signals, layer_field


def query_relation(
    student: Signals, teacher: Signals, *, layers: LayerPair, relation_heads: int | None = None
) -> Tensor:
    """KL of the relations among queries (MiniLMv2, Q-Q)."""
    return _relation_kl(student, teacher, layers, "query", relation_heads)


def key_relation(student: Signals, teacher: Signals, *, layers: LayerPair, relation_heads: int | None = None) -> Tensor:
    """KL of the relations among keys (MiniLMv2, K-K)."""
    return _relation_kl(student, teacher, layers, "key", relation_heads)


def value_relation(
    student: Signals, teacher: Signals, *, layers: LayerPair, relation_heads: int | None = None
) -> Tensor:
    """KL of the relations among values (MiniLM; MiniLMv2, V-V)."""
    return _relation_kl(student, teacher, layers, "value", relation_heads)


def _relation_kl(student: Signals, teacher: Signals, layers: LayerPair, kind: str, heads: int | None) -> Tensor:
    loss = f"{kind}_relation"
    ours, theirs = student.get(layer_field(kind, layers.student)), teacher.get(layer_field(kind, layers.teacher))
    check_tokens(ours, theirs, loss, layers, tokens=(0, 2))
    if heads is None:
        instead = "give the term relation_heads, a number that divides the width of both"
        check_heads(ours, theirs, loss, layers, instead=instead)
    else:
        ours, theirs = _recut(ours, heads, "student", loss), _recut(theirs, heads, "teacher", loss)
    pairs = token_pairs(student.mask)
    log_q, log_p = _log_relation(ours, pairs), _log_relation(theirs, pairs)
    return mean_over_texts(divergence(log_p, log_q), (student.mask != 0).to(log_q.dtype))


def _recut(vectors: Tensor, heads: int, side: str, loss: str) -> Tensor:
    """(B, R, L, H·K/R) from (B, H, L, K)."""
    width = vectors.shape[1] * vectors.shape[3]
    if heads < 1 or width % heads:
        raise ConfigError(
            f"loss '{loss}': relation_heads is {heads}, which doesn't divide the {side}'s width {width} "
            f"({vectors.shape[1]} heads of {vectors.shape[3]})"
        )
    return vectors.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)


def _log_relation(vectors: Tensor, pairs: Tensor) -> Tensor:
    """log softmax(XXᵀ/√K), (B, R, L, L), of vectors (B, R, L, K)."""
    tokens = pairs.any(dim=-1).unsqueeze(-1)  # (B, 1, L, 1)
    vectors = wide(vectors).masked_fill(~tokens, 0)
    scores = product(vectors, vectors.transpose(-1, -2)) / vectors.shape[-1] ** 0.5
    return scores.masked_fill(~pairs, MASKED).log_softmax(dim=-1)
