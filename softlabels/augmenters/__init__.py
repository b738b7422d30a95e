"""The ways to make new texts from the words of a given one. To add one: a module with `build`, and its line in METHODS.

An augmenter takes the words of some texts and gives a sampler for each; a sampler takes a random generator and gives
the words of a new text. What a text costs once (a language model's predictions) is so paid once, for many texts at a
time, and a text's samples depend on that text and its generator alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from softlabels.augmenters.words import Word
from softlabels.config import AugmentOptions

Sampler = Callable[[Random], list[Word]]
Augmenter = Callable[[Sequence[list[Word]]], list[Sampler]]

METHODS: dict[str, str] = {  # names held equal to config.AUGMENTATIONS by a test
    "distilled-bilstm": "softlabels.augmenters.distilled_bilstm",
    "tinybert": "softlabels.augmenters.tinybert",
    "deletion": "softlabels.augmenters.textbrewer",
    "short-long": "softlabels.augmenters.textbrewer",
}


@dataclass(frozen=True)
class Source:
    """What an augmenter may look at when it is built."""

    texts: Iterable[list[Word]]  # the words of every text of the corpus, read when they are asked for, once
    mask_token: str
    device: str | None = None  # of a language model; None: the GPU if there is one
    trust_remote_code: bool = False


def build_augmenter(options: AugmentOptions, source: Source) -> Augmenter:
    """The augmenter of `options.method`."""
    return importlib.import_module(METHODS[options.method]).build(options, source)
