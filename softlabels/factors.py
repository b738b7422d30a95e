"""What a teacher's logits usually look like: a factor model, which from the top k of a position expects its tail.

In: a sample of a teacher's logits (N, V). Out: `LogitFactors`, a few numbers a token of the vocabulary, kept once for a
whole cache. A language model's logits are, but for a shift a position, nearly of low rank (its last state is far
narrower than its vocabulary), so the k known logits of a position say much about the others.

The model is z = s + mean + loadings · c + e: a shift s of any size, c ~ N(0, 1) for each of R factors, and noise e of a
variance of each token's own. Given k logits, s and c have their posterior mean, by least squares (Rubin & Thayer 1982,
"EM algorithms for ML factor analysis"; loadings here are principal components). What it expects is only a guess: who
uses it for a loss corrects it by sampled tokens, see `softlabels.losses.vocab`. Legend: T positions, V vocabulary,
K known logits, R factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softlabels.errors import ConfigError

_COUNTED_AT = 2.0  # the temperature at which a token's probability says how much it counts for the components
_FLOOR = 1e-3  # of the mean variance: less noise is not believed of any token
_SMALL = 1e-6  # of the largest component: a smaller one is rounding


@dataclass(frozen=True, slots=True)
class LogitFactors:
    """z = shift + `mean` + `loadings` · c + noise, c ~ N(0, 1)."""

    mean: Tensor  # (V,)
    loadings: Tensor  # (V, R)
    noise: Tensor  # (V,) variance of what the factors don't explain, above 0

    @property
    def vocab_size(self) -> int:
        return len(self.mean)

    def to(self, device: torch.device | str) -> LogitFactors:
        """The same on another device."""
        return LogitFactors(self.mean.to(device), self.loadings.to(device), self.noise.to(device))

    def expect(self, ids: Tensor, values: Tensor, *, temperature: float) -> Tensor:
        """(T, V) the log of what exp(z/τ) of a token outside the top is expected to be; −inf inside.

        `ids` (T, K) and `values` (T, K), highest first, are the logits that are known. No other is expected above the
        lowest of these. Where z has the variance v, exp(z/τ) has the mean exp(E z/τ + v/2τ²). No gradient.
        """
        with torch.no_grad():
            known = self.loadings.double()[ids]  # (T, K, R)
            known = torch.nn.functional.pad(known, (1, 0), value=1.0)  # (T, K, R + 1), the shift's column first
            weighted = known / self.noise.double()[ids].unsqueeze(2)
            prior = torch.ones(known.shape[2], dtype=torch.float64, device=ids.device)
            prior[0] = 0  # any shift is as likely
            precision = weighted.transpose(1, 2) @ known + torch.diag(prior)  # (T, R + 1, R + 1)
            above = values.double() - self.mean.double()[ids]
            found = torch.linalg.solve(precision, (weighted * above.unsqueeze(2)).sum(dim=1)).to(values.dtype)
            expected = found[:, 1:] @ self.loadings.to(values.dtype).T + found[:, :1] + self.mean.to(values.dtype)
            expected = torch.minimum(expected, values[:, -1:]) / temperature
            expected += self.noise.to(values.dtype) / (2 * temperature**2)
            return expected.scatter(1, ids, float("-inf"))


def fit_factors(logits: Tensor, *, rank: int) -> LogitFactors:
    """The factors of a sample of `logits` (N, V): at most `rank`, fewer where the sample shows fewer.

    Principal components, tokens weighted by their mean probability at T = 2. Works in float32, on the device of the
    logits. ConfigError where there is no row, or a logit is not finite.
    """
    if not len(logits) or not bool(torch.isfinite(logits).all()):
        raise ConfigError(f"factors of {len(logits)} rows of logits: there must be rows, and every logit finite")
    logits = logits.float()
    weights = (logits / _COUNTED_AT).softmax(dim=1).mean(dim=0)  # (V,)
    centred = logits - (logits @ weights)[:, None]
    mean = centred.mean(dim=0)
    rest = centred - mean
    scaled = rest * weights.sqrt()
    variances, directions = torch.linalg.eigh((scaled @ scaled.T).double())  # (N,), (N, N), smallest first
    shown = int((variances > _SMALL * variances[-1]).sum()) if variances[-1] > 0 else 0
    rank = min(rank, shown)
    directions = directions[:, len(logits) - rank :].to(rest.dtype)  # (N, R), orthonormal
    loadings = rest.T @ directions  # (V, R)
    rest -= directions @ loadings.T
    noise = rest.square().mean(dim=0)
    spread = ((centred - mean).square().mean(dim=0) * weights).sum()
    return LogitFactors(mean, loadings / len(logits) ** 0.5, noise.clamp(min=max(_FLOOR * float(spread), 1e-6)))
