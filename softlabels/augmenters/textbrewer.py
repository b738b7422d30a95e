"""TextBrewer's word noise: random deletion, and disorder over short and long distances.

From TextBrewer (Yang et al. 2020, ACL demonstrations), `textbrewer.data_utils`: `deleting`, `short_disorder` and
`long_disorder` with their defaults, as its documentation and code define them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random

from softlabels.augmenters import Augmenter, Sampler, Source
from softlabels.augmenters.words import Word
from softlabels.config import AugmentOptions


def build(options: AugmentOptions, source: Source) -> Augmenter:
    """`delete` for the method deletion; for short-long, `short_disorder` and then `long_disorder`."""
    rate = 0.1 if options.rate is None else options.rate
    sample: Callable[[Sequence[Word], Random], list[Word]]
    if options.method == "deletion":
        sample = partial(delete, rate=rate)
    else:

        def sample(words: Sequence[Word], rng: Random) -> list[Word]:
            return long_disorder(short_disorder(words, rng, rate=rate), rng, rate=rate, span=options.span)

    def samplers(texts: Sequence[list[Word]]) -> list[Sampler]:
        return [partial(sample, words) for words in texts]

    return samplers


def delete(words: Sequence[Word], rng: Random, *, rate: float) -> list[Word]:
    """Each word is left out with probability `rate`; where none is left, one at random stays (TextBrewer: none)."""
    kept = [word for word in words if rng.random() >= rate]
    return kept if kept or not words else [words[rng.randrange(len(words))]]


def short_disorder(words: Sequence[Word], rng: Random, *, rate: float) -> list[Word]:
    """At each place, with probability `rate`, a word and the next change places, and the walk goes on behind them.

    TextBrewer's default of its five cases for three words abc: [0.9, 0.1, 0, 0, 0], as they are, or bac.
    """
    made = list(words)
    place = 0
    while place < len(made) - 1:
        if rng.random() < rate:
            made[place], made[place + 1] = made[place + 1], made[place]
            place += 2
        else:
            place += 1
    return made


def long_disorder(words: Sequence[Word], rng: Random, *, rate: float, span: float) -> list[Word]:
    """At each place, with probability `rate`, the halves of the next `span` words change places; on behind them.

    A `span` of at most 1 is a share of the text. It is rounded to an even number: TextBrewer cuts it to an integer, and
    adds one to an odd one. Texts shorter than it stay as they are.
    """
    made = list(words)
    size = (int(len(made) * span if span <= 1 else span) + 1) // 2 * 2
    place = 0
    while 0 < size <= len(made) - place:
        if rng.random() < rate:
            middle, end = place + size // 2, place + size
            made[place:end] = made[middle:end] + made[place:middle]
            place += size
        else:
            place += 1
    return made
