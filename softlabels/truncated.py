"""Vocabulary-sized logits in a few numbers a token: the top k, and of the rest what any temperature asks of it.

In: a teacher's logits (T, V) at T positions. Out: `TruncatedLogits`, from which softmax(z/τ) follows for every token of
the top k and for the rest as a whole, at any temperature τ ≥ 0.5. Nothing is renormalised inside the top k.

Why it works: f(β) = logsumexp(β·z) over the rest, β = 1/τ, is smooth, and f'(β) is the rest's mean of z under
softmax(β·z). Both are kept at five temperatures; in between, Hermite interpolation gives the rest's mass to a few 1e-4
for the logits of language models. Legend: T positions, V vocabulary, N nodes, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabels.errors import ConfigError, TeacherError
from softlabels.factors import LogitFactors

TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0)  # the nodes; each is half the next, which `_truncate` relies on
SAMPLE_TEMPERATURES = (2.0, 4.0, 1.0, 8.0)  # sample s is drawn from softmax(z/τ) with the s-th of these, in turns
OUTSIDE = 1e4  # a logit of −inf, or this far below the rest's largest, is no entry of the vocabulary but padding
_CHUNK = {"cpu": 1 << 20, "other": 1 << 26}  # logits worked on at once: what a cache holds, what fills a GPU
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class TruncatedLogits:
    """Teacher logits z at T positions: the K largest, and the tail (all the others) at the nodes `TEMPERATURES`.

    Node τ's `tail_logsumexp` is log Σ exp(z/τ) over the tail, its `tail_mean` the tail's mean of z (not of z/τ) under
    softmax(z/τ). τ = ∞ needs no storage: the tail's count is V − K − `masked`, the same at every position.

    Samples are tail tokens v with weights w such that, for any function g, Σ_s w_s·g(v_s) has the expectation
    Σ g(v) over the tail. Sample s is drawn, with replacement, from softmax(z/τ_s) over the tail, τ_s from
    `SAMPLE_TEMPERATURES` in turns, and w = 1/Σ_s softmax(z/τ_s)(v): the balance heuristic of multiple importance
    sampling (Veach & Guibas 1995, section 3), so that no token likely at any of these temperatures has a large weight.

    Tensors are float32; float64 where `truncate` was given float64.
    """

    ids: Tensor  # (T, K) int64
    values: Tensor  # (T, K), highest first
    tail_logsumexp: Tensor  # (T, N)
    tail_mean: Tensor  # (T, N)
    sampled_ids: Tensor  # (T, S) int64
    sampled_values: Tensor  # (T, S)
    sampled_weights: Tensor  # (T, S)
    vocab_size: int  # V, the columns of the logits; ids are below it
    masked: int = 0  # columns that are padding at every position (see OUTSIDE)
    factors: LogitFactors | None = None  # what the tail is expected to look like, where the teacher left that

    @property
    def k(self) -> int:
        return self.ids.shape[1]

    @property
    def samples(self) -> int:
        return self.sampled_ids.shape[1]

    @property
    def tail_count(self) -> int:
        return self.vocab_size - self.k - self.masked

    def to(self, device) -> TruncatedLogits:
        """The same on another device."""
        return replace(
            self,
            ids=self.ids.to(device),
            values=self.values.to(device),
            tail_logsumexp=self.tail_logsumexp.to(device),
            tail_mean=self.tail_mean.to(device),
            sampled_ids=self.sampled_ids.to(device),
            sampled_values=self.sampled_values.to(device),
            sampled_weights=self.sampled_weights.to(device),
            factors=None if self.factors is None else self.factors.to(device),
        )


# ------------------------------------------------------------------------------------------------- from logits


def truncate(
    logits: Tensor,
    *,
    k: int,
    samples: int = 0,
    generator: torch.Generator | None = None,
    draws: Tensor | None = None,
) -> TruncatedLogits:
    """The top `k` of `logits` (T, V), the tail at the nodes, and `samples` sampled tail tokens a position.

    What is random comes from `generator`, one uniform number a sample, position by position; or from `draws`
    (T, samples) in [0, 1), where a position's samples must not depend on the batch it came in. Works in float32
    (float64 for float64), on the device of the logits, in chunks of positions. Equal logits come in no set order.

    ConfigError: `k` or `samples` that cannot be had, and columns that are padding at some positions only.
    TeacherError: NaN or +∞.
    """
    positions, vocab_size = logits.shape
    if not 1 <= k < vocab_size:
        raise ConfigError(f"top k of {k} from a vocabulary of {vocab_size}: give 1 to {vocab_size - 1}")
    if draws is None:
        if samples and generator is None:
            raise ConfigError("sampled tail tokens need a generator (or draws), so that a dump can be repeated")
        device = generator.device if generator is not None else "cpu"
        draws = torch.rand(positions, samples, generator=generator, device=device, dtype=torch.float64)
    if draws.shape != (positions, samples):
        raise ConfigError(f"draws are {tuple(draws.shape)}; {positions} positions of {samples} samples need as many")
    rows = max(1, _CHUNK["cpu" if logits.device.type == "cpu" else "other"] // vocab_size)
    chunks = zip(logits.split(rows), draws.to(logits.device, torch.float64).split(rows), strict=True)
    return concatenate([_truncate(part, k, draw) for part, draw in chunks])


def concatenate(parts: Sequence[TruncatedLogits]) -> TruncatedLogits:
    """The positions of all `parts`, one after the other; ConfigError where k, vocabulary or padding differ."""
    shapes = {(part.k, part.samples, part.vocab_size, part.masked) for part in parts}
    if len(shapes) > 1:
        raise ConfigError(
            f"truncated logits of different (k, samples, vocabulary, padded columns): {sorted(shapes)}. Padding must "
            f"be the same at every position; trim padded columns before truncating"
        )
    first = parts[0]
    if len(parts) == 1:
        return first
    return TruncatedLogits(
        ids=torch.cat([part.ids for part in parts]),
        values=torch.cat([part.values for part in parts]),
        tail_logsumexp=torch.cat([part.tail_logsumexp for part in parts]),
        tail_mean=torch.cat([part.tail_mean for part in parts]),
        sampled_ids=torch.cat([part.sampled_ids for part in parts]),
        sampled_values=torch.cat([part.sampled_values for part in parts]),
        sampled_weights=torch.cat([part.sampled_weights for part in parts]),
        vocab_size=first.vocab_size,
        masked=first.masked,
        factors=first.factors,
    )


def _truncate(logits: Tensor, k: int, draws: Tensor) -> TruncatedLogits:
    vocab_size = logits.shape[1]
    z = logits if logits.dtype == torch.float64 else logits.float()  # (T, V)
    values, ids = z.topk(k, dim=1)
    tail = F.pad(z, (0, -vocab_size % _BLOCK), value=-math.inf).scatter_(1, ids, -math.inf)
    largest = tail.amax(dim=1, keepdim=True)  # (T, 1)
    masked = _check(z, values, largest)
    below = tail.sub_(largest).clamp_(min=-OUTSIDE)  # (T, V), 0 for the largest; finite, so that 0·below is 0
    weights = (below / TEMPERATURES[-1]).exp_()
    logsumexps, means, sampled = [], [], torch.zeros(draws.shape, dtype=torch.int64, device=z.device)
    turns = [SAMPLE_TEMPERATURES[s % len(SAMPLE_TEMPERATURES)] for s in range(draws.shape[1])]
    for temperature in reversed(TEMPERATURES):
        if temperature != TEMPERATURES[-1]:
            # exp(z/τ) from exp(z/2τ): one exponential serves all nodes. Denormal squares would be 30 times slower
            F.threshold(weights, 1e-18, 0.0, inplace=True).square_()
        total = weights.sum(dim=1)
        logsumexps.append(total.log() + largest[:, 0] / temperature)
        means.append((weights * below).sum(dim=1) / total + largest[:, 0])
        columns = [s for s, turn in enumerate(turns) if turn == temperature]
        if columns:
            sampled[:, columns] = _draw(weights, draws[:, columns])
    logsumexp = torch.stack(logsumexps[::-1], dim=1)  # (T, N)
    sampled_values = z.gather(1, sampled)  # (T, S)
    return TruncatedLogits(
        ids=ids,
        values=values,
        tail_logsumexp=logsumexp,
        tail_mean=torch.stack(means[::-1], dim=1),
        sampled_ids=sampled,
        sampled_values=sampled_values,
        sampled_weights=sample_weights(sampled_values, logsumexp),
        vocab_size=vocab_size,
        masked=masked,
    )


def _check(z: Tensor, values: Tensor, largest: Tensor) -> int:
    """How many columns of `z` (T, V) are padding; an error where that differs, or where values are no logits."""
    if not len(z):
        return 0
    if not bool(torch.isfinite(values[:, 0]).all()):  # NaN counts as largest in topk
        raise TeacherError(
            "the teacher gave NaN or infinite logits: its weights or its precision are broken. Mend it, or try "
            "--dtype float32"
        )
    if bool(torch.isinf(largest).any()):
        raise ConfigError(
            f"the top {values.shape[1]} of {z.shape[1]} logits leave no finite one for the tail: give a smaller k"
        )
    threshold = largest - OUTSIDE
    if bool((z.amin(dim=1, keepdim=True) > threshold).all()):
        return 0
    counts = (z <= threshold).sum(dim=1)  # (T,)
    if bool((counts != counts[0]).any()):
        raise ConfigError(
            f"{int(counts.min())} to {int(counts.max())} logits a position are −inf (or {OUTSIDE:.0f} below others): "
            f"padding must be the same columns at every position. Give logits before any such mask"
        )
    return int(counts[0])


def _draw(weights: Tensor, draws: Tensor) -> Tensor:
    """(T, S) columns drawn in proportion to `weights` (T, V) by inverting their cumulated sum at `draws` (T, S).

    In two steps, block and column within the block, both cumulated in float64: one float32 sum over V would round
    tokens of less than 1e-7 together, and their weights are the largest.
    """
    draws = draws.clamp(0, 1 - 1e-12)
    blocks = weights.unflatten(1, (-1, _BLOCK))  # (T, V/256, 256)
    sums = blocks.sum(dim=2).double()
    upto = sums.cumsum(dim=1)
    wanted = draws * upto[:, -1:]
    block = torch.searchsorted(upto, wanted, right=True).clamp_(max=sums.shape[1] - 1)  # (T, S)
    inside = (wanted - upto.gather(1, block)) / sums.gather(1, block) + 1
    chosen = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))  # (T, S, 256)
    upto = chosen.cumsum(dim=2, dtype=torch.float64)
    wanted = inside.clamp(0, 1 - 1e-12)[:, :, None] * upto[:, :, -1:]
    column = torch.searchsorted(upto, wanted, right=True)[:, :, 0].clamp_(max=_BLOCK - 1)
    return block * _BLOCK + column


def sample_weights(values: Tensor, tail_logsumexp: Tensor) -> Tensor:
    """(T, S) weights of sampled tail tokens with logits `values` (T, S): 1 / Σ_s softmax(z/τ_s)(v).

    They follow from what is stored anyway, so no codec need store them.
    """
    samples = values.shape[1]
    if not samples:
        return values.clone()
    turns = [SAMPLE_TEMPERATURES[s % len(SAMPLE_TEMPERATURES)] for s in range(samples)]
    logs = [values / turn - tail_logsumexp[:, TEMPERATURES.index(turn), None] for turn in turns]
    return torch.stack(logs).logsumexp(dim=0).neg().exp()


# ------------------------------------------------------------------------------------------- at any temperature


def check_temperature(temperature: float) -> None:
    """ConfigError below the lowest node, where the tail would be a guess."""
    if not temperature >= TEMPERATURES[0] or math.isinf(temperature):
        raise ConfigError(
            f"temperature {temperature} of truncated logits: give one from {TEMPERATURES[0]} up; below it, what the "
            f"tail holds isn't known. Full logits ('vocab:exact') have no such bound"
        )


def tail_logsumexp_at(truncated: TruncatedLogits, temperature: float) -> Tensor:
    """(T,) f(β) = log Σ exp(β·z) over the tail at β = 1/τ; exact at the nodes, by Hermite interpolation between them.

    Not of f in β but of f − β·(the top's smallest logit) in x = τ/(1 + τ): there the interval from τ = 0.5 to 1 is not
    far wider than the others. The polynomial goes through values and slopes of the two nodes on either side. Largest
    error of the tail's mass over τ from 0.5 to 8 at k = 32, and in brackets that of the cubic in β through the nearest
    two nodes: a small GPT-2-shaped model 6.4e-4 (2.9e-3), normal logits 1.5e-4 (2.7e-3), t-distributed ones 8.0e-4
    (2.0e-3); each between the nodes 0.5, 1 and 2. τ = ∞ is a node too, without its slope: f is the log of the tail's
    count. ConfigError below τ = 0.5.
    """
    check_temperature(temperature)
    if temperature in TEMPERATURES:
        return truncated.tail_logsumexp[:, TEMPERATURES.index(temperature)]
    edge = truncated.values[:, -1].double()  # (T,) no tail token is above it
    nodes = (*TEMPERATURES, math.inf)
    right = next(node for node, above in enumerate(nodes) if above > temperature)
    points, values, slopes = [], [], []
    for node in range(max(right - 2, 0), min(right + 2, len(nodes))):
        beta = 1 / nodes[node]
        finite = node < len(TEMPERATURES)
        f = (
            truncated.tail_logsumexp[:, node].double()
            if finite
            else torch.full_like(edge, math.log(truncated.tail_count))
        )
        slope = truncated.tail_mean[:, node].double() - edge if finite else edge  # of f − β·edge in β
        for _ in range(2 if finite else 1):
            points.append(1 / (1 + beta))
            values.append(f - beta * edge)
            slopes.append(-slope * (1 + beta) ** 2)
    beta = 1 / temperature
    result = _newton(points, values, slopes, 1 / (1 + beta)) + beta * edge
    return result.to(truncated.values.dtype)


def _newton(points: list[float], values: list[Tensor], slopes: list[Tensor], at: float) -> Tensor:
    """Newton's form of the polynomial through `values` at `points`, and through `slopes` where a point comes twice."""
    column, result, product = values, values[0], 1.0
    for order in range(1, len(points)):
        pairs = zip(points, points[order:], column, column[1:], slopes, strict=False)
        column = [slope if b == a else (right - left) / (b - a) for a, b, left, right, slope in pairs]
        product *= at - points[order - 1]
        result = result + product * column[0]
    return result


def tail_mean_at(truncated: TruncatedLogits, temperature: float) -> Tensor:
    """(T,) the tail's mean of z under softmax(z/τ), which is f'(β): exact at the nodes, else a slope of `f` there."""
    if temperature in TEMPERATURES:
        return truncated.tail_mean[:, TEMPERATURES.index(temperature)]
    check_temperature(temperature)
    low, high = 0.98 / temperature, min(1.02 / temperature, 1 / TEMPERATURES[0])
    change = tail_logsumexp_at(truncated, 1 / high) - tail_logsumexp_at(truncated, 1 / low)
    return change / (high - low)


def tail_mass_at(truncated: TruncatedLogits, temperature: float) -> Tensor:
    """(T,) the probability of the whole tail under softmax(z/τ)."""
    top = (truncated.values / temperature).logsumexp(dim=1)
    return torch.sigmoid(tail_logsumexp_at(truncated, temperature) - top)


def use_fewer(truncated: TruncatedLogits, k: int) -> TruncatedLogits:
    """The same with the top `k` of the K kept: the K − k others go into the tail, exactly so at the nodes.

    Where there are samples, the others join them with weight 1 (they are in the tail for certain), so that the
    samples stay unbiased. ConfigError: more than there are.
    """
    if not 1 <= k <= truncated.k:
        raise ConfigError(f"top {k} of logits of which the top {truncated.k} are kept: give 1 to {truncated.k}")
    if k == truncated.k:
        return truncated
    moved, moved_ids = truncated.values[:, k:], truncated.ids[:, k:]  # (T, K − k)
    scaled = moved[:, None, :] / moved.new_tensor(TEMPERATURES)[:, None]  # (T, N, K − k)
    logsumexp = scaled.logsumexp(dim=2)
    mean = (scaled.softmax(dim=2) * moved[:, None, :]).sum(dim=2)
    share = torch.sigmoid(logsumexp - truncated.tail_logsumexp)  # (T, N), of the new tail
    fewer = replace(
        truncated,
        ids=truncated.ids[:, :k],
        values=truncated.values[:, :k],
        tail_logsumexp=torch.logaddexp(logsumexp, truncated.tail_logsumexp),
        tail_mean=truncated.tail_mean + share * (mean - truncated.tail_mean),
    )
    if not truncated.samples:
        return fewer
    return replace(
        fewer,
        sampled_ids=torch.cat([truncated.sampled_ids, moved_ids], dim=1),
        sampled_values=torch.cat([truncated.sampled_values, moved], dim=1),
        sampled_weights=torch.cat([truncated.sampled_weights, torch.ones_like(moved)], dim=1),
    )
