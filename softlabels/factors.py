"""What a teacher's logits usually look like: a factor model, which from the top k of a position expects its tail.

In: a sample of a teacher's logits (N, V). Out: `LogitFactors`, a few numbers a token of the vocabulary, kept once for a
whole cache. A language model's logits are, but for a shift a position, nearly of low rank (its last state is far
narrower than its vocabulary), so the k known logits of a position say much about the others.

The model is z = s + mean + loadings · c + e: a shift s of any size, c ~ N(0, 1) for each of R factors, and noise e of a
variance of each token's own. Given K logits and the mean of the others, s and c have their posterior mean, by least
squares (Rubin & Thayer 1982, "EM algorithms for ML factor analysis"; loadings here are principal components). It is
only an expectation; `softlabels.losses.vocab` says what a loss does with it. Legend: T positions, V vocabulary, K known
logits, R factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabels.errors import ConfigError

_COUNTED_AT = 2.0  # the temperature at which a token's probability says how much it counts for the components
_FLOOR = 1e-3  # of the mean variance: less noise is not believed of any token
_MEAN_OFF = 0.01  # variance of a tail's mean beside what is expected of it: it is no linear map of c
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

    def expect(self, ids: Tensor, values: Tensor, *, tail_mean: Tensor, temperature: float) -> Tensor:
        """(T, V) the log of what exp(z/τ) of a token outside the top is expected to be; −inf inside.

        Known are the logits `values` (T, K), highest first, of the tokens `ids` (T, K), and `tail_mean` (T,), the mean
        of z under softmax(z/τ) over all others. No other is expected above the lowest known one. Where z has the
        variance v, exp(z/τ) has the mean exp(E z/τ + v/2τ²). No gradient.
        """
        with torch.no_grad():
            found, precision = self._given_the_top(ids, values)
            found = self._given_the_mean(found, precision, ids, values, tail_mean, temperature)
            expected = self._logits(found, values.dtype)
            return self._scores(torch.minimum(expected, values[:, -1:], out=expected), ids, temperature)

    def _columns(self, dtype: torch.dtype) -> Tensor:
        """(V, R + 2) what a token's logit is a sum of: the shift, the factors, the mean."""
        mean = self.mean.to(dtype).unsqueeze(1)
        return torch.cat([torch.ones_like(mean), self.loadings.to(dtype), mean], dim=1)

    def _logits(self, found: Tensor, dtype: torch.dtype) -> Tensor:
        """(T, V) of `found` (T, R + 1): the shift, and c."""
        return F.pad(found, (0, 1), value=1.0).to(dtype) @ self._columns(dtype).T

    def _scores(self, expected: Tensor, ids: Tensor, temperature: float) -> Tensor:
        scores = expected / temperature
        return scores.add_(self.noise.to(expected.dtype) / (2 * temperature**2)).scatter_(1, ids, float("-inf"))

    def _given_the_top(self, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(T, R + 1) posterior mean of the shift and c, and its precision (T, R + 1, R + 1), float64."""
        known = F.pad(self.loadings[ids].double(), (1, 0), value=1.0)  # (T, K, R + 1), the shift's column first
        weighted = known / self.noise[ids].double().unsqueeze(2)
        prior = torch.ones(known.shape[2], dtype=torch.float64, device=ids.device)
        prior[0] = 0  # any shift is as likely
        precision = weighted.transpose(1, 2) @ known + torch.diag(prior)
        above = (values.double() - self.mean[ids].double()).unsqueeze(2)
        return torch.linalg.solve(precision, (weighted * above).sum(dim=1)), precision

    def _given_the_mean(
        self, found: Tensor, precision: Tensor, ids: Tensor, values: Tensor, tail_mean: Tensor, temperature: float
    ) -> Tensor:
        """`found` again, now that the tail's mean is known too: one Kalman step, the mean linearised where we are."""
        dtype = tail_mean.dtype
        expected = self._logits(found, dtype)
        bound = expected >= values[:, -1:]  # (T, V) tokens whose z stays where it is
        torch.minimum(expected, values[:, -1:], out=expected)
        r = self._scores(expected, ids, temperature).softmax(dim=1)
        expected.add_(self.noise.to(dtype) / temperature)  # the mean of z where exp(z/τ) weighs
        mean = torch.linalg.vecdot(r, expected).unsqueeze(1)  # (T, 1)
        slope = expected.sub_(mean).div_(temperature).add_(1).mul_(r).masked_fill_(bound, 0)  # of the mean in each z
        slope = (slope @ self._columns(dtype)[:, :-1]).double()  # (T, R + 1), in the shift and c
        towards = torch.linalg.solve(precision, slope)  # (T, R + 1)
        gain = towards / ((slope * towards).sum(dim=1, keepdim=True) + _MEAN_OFF)
        return found + gain * (tail_mean[:, None] - mean).double()


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
