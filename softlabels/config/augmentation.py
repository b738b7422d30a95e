"""Options of `augment`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from softlabels.config.strict import Strict, suggest

AUGMENTATIONS = (  # held equal to softlabels.augmenters.METHODS by a test
    "distilled-bilstm",
    "tinybert",
    "deletion",
    "short-long",
)
_ONLY_OF: dict[str, tuple[str, ...]] = {  # an option that only these methods look at
    "mask_rate": ("distilled-bilstm",),
    "pos_rate": ("distilled-bilstm",),
    "ngram_rate": ("distilled-bilstm",),
    "pos": ("distilled-bilstm",),
    "rate": ("tinybert", "deletion", "short-long"),
    "span": ("short-long",),
    "mlm": ("tinybert",),
    "word_vectors": ("tinybert",),
    "vector_words": ("tinybert",),
    "candidates": ("tinybert",),
}


class AugmentOptions(Strict):
    """How new texts are made of given ones. Defaults are the papers'; see `softlabels.augmenters`."""

    method: str = "distilled-bilstm"
    times: int | None = Field(default=None, ge=1, le=100_000)  # None: 20, of pairs 10 (tinybert: 20)
    seed: int = Field(default=0, ge=0, lt=2**32)
    originals: bool = True  # the rows themselves first, with their labels
    language: Literal["auto", "en", "zh"] = "auto"  # auto: a text with a Chinese character is Chinese
    mask_rate: float = Field(default=0.1, ge=0, le=1)  # of words, that become the mask token
    pos_rate: float = Field(default=0.1, ge=0, le=1)  # of words, that become one of the same part of speech
    ngram_rate: float = Field(default=0.25, ge=0, le=1)  # of texts, of which one n-gram is kept
    pos: bool = True  # False: a word is replaced by any other, by frequency alone
    mask_token: str | None = Field(default=None, pattern=r"^\S+$")  # None: [MASK]
    rate: float | None = Field(default=None, gt=0, le=1)  # of words; None: tinybert 0.4, deletion and short-long 0.1
    span: float = Field(default=20, gt=0)  # words of a long disorder; up to 1 a share of the text
    mlm: str | None = None  # a masked language model: a folder or a Hugging Face name
    word_vectors: str | None = None  # a file: see softlabels.word_vectors
    vector_words: int = Field(default=100_000, ge=2)  # of that file the first so many, the most frequent
    candidates: int = Field(default=15, ge=1)  # words that one may be replaced by

    @model_validator(mode="after")
    def _fits(self) -> AugmentOptions:
        if self.method not in AUGMENTATIONS:
            names = ", ".join(AUGMENTATIONS)
            raise ValueError(f"no method '{self.method}': there are {names}.{suggest(self.method, AUGMENTATIONS)}")
        for name in sorted(self.model_fields_set & _ONLY_OF.keys()):
            if self.method not in _ONLY_OF[name]:
                raise ValueError(f"{name} is for {' or '.join(_ONLY_OF[name])}; {self.method} has no use for it")
        if self.mask_rate + self.pos_rate > 1:
            raise ValueError(f"mask_rate {self.mask_rate} and pos_rate {self.pos_rate} are more than 1 together")
        if self.method == "tinybert" and self.mlm is None and self.word_vectors is None:
            raise ValueError("tinybert takes its words from a masked language model (mlm), from word_vectors, or both")
        return self
