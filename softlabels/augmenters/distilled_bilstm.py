"""The augmentation of the Distilled BiLSTM: masking, words of the same part of speech, one n-gram.

Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks", section 3.3.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from random import Random

from softlabels.augmenters import Augmenter, Sampler, Source
from softlabels.augmenters.words import Word
from softlabels.config import AugmentOptions

LONGEST = 5  # words of an n-gram


@dataclass(frozen=True, slots=True)
class Unigrams:
    """The words of each part of speech, sorted, and how often these and those before them occur."""

    words: dict[str, list[str]]
    running: dict[str, list[int]]

    def draw(self, word: Word, rng: Random) -> Word:
        """A word of the same tag, by its frequency in the corpus: it may be the same one again."""
        running = self.running.get(word.tag)
        if running is None:  # a tag that only mask tokens have
            return word
        return replace(word, text=self.words[word.tag][bisect_right(running, rng.random() * running[-1])])


def count_unigrams(texts: Iterable[list[Word]], *, mask_token: str) -> Unigrams:
    """The table over `texts`; mask tokens in them are no words."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for words in texts:
        for word in words:
            if word.text != mask_token:
                counts[word.tag][word.text] += 1
    sorted_words = {tag: sorted(each) for tag, each in counts.items()}
    running = {tag: list(accumulate(counts[tag][word] for word in words)) for tag, words in sorted_words.items()}
    return Unigrams(sorted_words, running)


def build(options: AugmentOptions, source: Source) -> Augmenter:
    """See `sample`."""
    unigrams = count_unigrams(source.texts, mask_token=source.mask_token)

    def samplers(texts: Sequence[list[Word]]) -> list[Sampler]:
        return [
            partial(sample, words, options=options, unigrams=unigrams, mask_token=source.mask_token) for words in texts
        ]

    return samplers


def sample(
    words: Sequence[Word], rng: Random, *, options: AugmentOptions, unigrams: Unigrams, mask_token: str
) -> list[Word]:
    """One new text: for each word X ~ U[0, 1].

    X < p_mask (0.1): the mask token instead. p_mask ≤ X < p_mask + p_pos (0.1): a word of the same part of speech,
    drawn by unigram frequency. Then with p_ng (0.25) one n-gram of the result is all that is kept, n uniform over 1 to
    5 (at most the text's length, on which the paper says nothing) and every place as likely.
    """
    made = []
    for word in words:
        x = rng.random()
        if x < options.mask_rate:
            word = replace(word, text=mask_token)
        elif x < options.mask_rate + options.pos_rate:
            word = unigrams.draw(word, rng)
        made.append(word)
    if made and rng.random() < options.ngram_rate:
        size = min(rng.randint(1, LONGEST), len(made))
        start = rng.randrange(len(made) - size + 1)
        made = made[start : start + size]
    return made
