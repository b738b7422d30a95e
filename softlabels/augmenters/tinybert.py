"""TinyBERT's augmentation: words from a masked language model, or the nearest ones among word vectors.

Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", algorithm 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from softlabels.augmenters import Augmenter, Sampler, Source
from softlabels.augmenters.words import Word, is_han, place_words
from softlabels.config import AugmentOptions
from softlabels.errors import ConfigError
from softlabels.word_vectors import read_word_vectors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from softlabels.teacher import Teacher

_BATCH_TOKENS = 4096  # of the masked copies that go through the language model at a time
_BLOCK = 128  # words whose neighbours are looked for at a time

Candidates = list[list[str]]  # for each word of a text what may replace it; empty: nothing


def build(options: AugmentOptions, source: Source) -> Augmenter:
    """An augmenter that replaces each word with probability `rate` (0.4) by one of its K candidates, all as likely.

    The candidates of a word that is one piece of the language model's tokenizer are the K (15) whole words that the
    model finds most probable in its place; of a word of several pieces, the K nearest by cosine among the word
    vectors. Without a language model every word goes by its vector; without vectors a word of several pieces stays, as
    one does that the vectors lack, and what the model has no room for.

    Deviations: the context is the text itself with one word masked, and not, as the paper's loop has it, with what was
    replaced before (one pass a word serves all N samples; the authors' code does the same, and appends the
    unmasked text, which hands the model its answer: not done here). Nor are stop words spared, as they are in that
    code. As there, a capital letter is kept.
    """
    rate = 0.4 if options.rate is None else options.rate
    model = None
    if options.mlm is not None:
        model = _load(options.mlm, source.device, source.trust_remote_code)
    vectors = None
    if options.word_vectors is not None:
        vectors = Neighbours.read(options.word_vectors, limit=options.vector_words)

    def samplers(texts: Sequence[list[Word]]) -> list[Sampler]:
        if model is None:
            found: list[Candidates] = [[[] for _ in words] for words in texts]
            open_words = [[True] * len(words) for words in texts]
        else:
            found, open_words = model.predict(texts, count=options.candidates)
        if vectors is not None:
            vectors.fill(found, texts, open_words, count=options.candidates)
        return [partial(sample, words, candidates=each, rate=rate) for words, each in zip(texts, found, strict=True)]

    return samplers


def sample(words: Sequence[Word], rng: Random, *, candidates: Candidates, rate: float) -> list[Word]:
    """One new text: each word that has candidates is replaced by one of them with probability `rate`."""
    made = []
    for word, choices in zip(words, candidates, strict=True):
        if choices and rng.random() < rate:
            text = choices[rng.randrange(len(choices))]
            word = replace(word, text=text.capitalize() if word.text.istitle() and text.islower() else text)
        made.append(word)
    return made


# ------------------------------------------------------------------------------------------------- language model


def _load(name: str, device: str | None, trust_remote_code: bool) -> MaskedModel:
    import torch

    from softlabels.teacher import load_teacher
    from softlabels.tokens import longest_input

    teacher = load_teacher(name, task="masked-lm", device=device, trust_remote_code=trust_remote_code)
    if not teacher.tokenizer.is_fast:
        raise ConfigError(f"--mlm {name}: its tokenizer is a slow one, which does not say what word a piece is of")
    words = whole_words(teacher.tokenizer)
    whole = torch.tensor([bool(word) for word in words], device=teacher.model.device)
    return MaskedModel(teacher, words, whole, longest_input(teacher.tokenizer, teacher.model.config))


def whole_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token of the vocabulary says as a word of its own; '' for one that is no whole word."""
    # an id may have no token: ids need not be without holes
    tokens = [token or "##" for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    special = set(tokenizer.all_special_tokens)
    # byte-level and SentencePiece tokenizers mark the start of a word, WordPiece what goes on with one
    marks = [mark for mark in "Ġ▁" if sum(token.startswith(mark) for token in tokens) > len(tokens) / 100]
    words = []
    for token in tokens:
        starts = token.startswith(marks[0]) or is_han(token) if marks else not token.startswith("##")
        text = tokenizer.convert_tokens_to_string([token]).strip() if starts and token not in special else ""
        odd = text.startswith("[unused") or "\ufffd" in text or any(character.isspace() for character in text)
        words.append("" if odd else text)
    return words


@dataclass(frozen=True)
class MaskedModel:
    """A masked language model that fills in words."""

    teacher: Teacher
    words: list[str]  # (V,) of `whole_words`
    whole: Tensor  # (V,) bool, which of these there are
    longest: int  # tokens that it takes

    def predict(self, texts: Sequence[list[Word]], *, count: int) -> tuple[list[Candidates], list[list[bool]]]:
        """For each text its words' candidates, sorted, and which words are several pieces and so have none."""
        found: list[Candidates] = [[[] for _ in words] for words in texts]
        several = [[False] * len(words) for words in texts]
        # by length, so that nothing is padded: what a text gets does not depend on those beside it
        waiting: defaultdict[int, list[tuple[list[int], int, list[str]]]] = defaultdict(list)
        for number, words in enumerate(texts):
            ids, pieces = self._pieces(words)
            for place, its in enumerate(pieces):
                if len(its) == 1 and ids[its[0]] != self.teacher.tokenizer.unk_token_id:
                    waiting[len(ids)].append((ids, its[0], found[number][place]))
                else:
                    several[number][place] = bool(its)  # or one that the model doesn't know
        for length, rows in waiting.items():
            size = max(_BATCH_TOKENS // length, 1)
            for start in range(0, len(rows), size):
                self._fill(rows[start : start + size], count)
        return found, several

    def _pieces(self, words: Sequence[Word]) -> tuple[list[int], list[list[int]]]:
        """A text's token ids, and for each word which of them are its pieces; none where it is cut off."""
        text, places = place_words(words)
        encoded = self.teacher.tokenizer(
            text, truncation=True, max_length=self.longest, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        pieces: list[list[int]] = [[] for _ in words]
        word = 0
        for token, (start, end) in enumerate(encoded["offset_mapping"]):
            if encoded["special_tokens_mask"][token] or start == end:
                continue
            while word < len(places) and places[word][1] <= start:
                word += 1
            touched = [w for w in range(word, len(places)) if places[w][0] < end][:2]
            for each in touched:  # a piece of two words stands for neither
                pieces[each] += [token] if len(touched) == 1 else [token, token]
        return encoded["input_ids"], pieces

    def _fill(self, rows: Sequence[tuple[list[int], int, list[str]]], count: int) -> None:
        """Put the `count` most probable whole words of each masked place into its list."""
        import torch

        from softlabels.captures.output_head import only_targets

        model, tokenizer = self.teacher.model, self.teacher.tokenizer
        ids = torch.tensor([ids for ids, _, _ in rows])  # (B, L)
        masked = torch.zeros_like(ids, dtype=torch.bool)
        masked[torch.arange(len(rows)), torch.tensor([place for _, place, _ in rows])] = True
        ids, masked = ids.masked_fill(masked, tokenizer.mask_token_id).to(model.device), masked.to(model.device)
        with torch.inference_mode(), only_targets(model, masked):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # (B, V)
        logits = logits[:, : len(self.words)].float().masked_fill(~self.whole, float("-inf"))
        best = logits.topk(min(count, int(self.whole.sum()))).indices.tolist()
        for (_, _, into), tokens in zip(rows, best, strict=True):
            # sorted: the last bits of two probabilities, which threads change, decide about no sample
            into += sorted({self.words[token] for token in tokens})


# ---------------------------------------------------------------------------------------------------- word vectors


@dataclass(frozen=True)
class Neighbours:
    """Words by the direction of their vectors."""

    words: list[str]
    directions: np.ndarray  # (N, D) float32, of length 1
    rows: dict[str, int]
    known: dict[str, list[str]]  # what was looked for before

    @classmethod
    def read(cls, path: str, *, limit: int) -> Neighbours:
        """From a file of word vectors, its first `limit` words."""
        words, matrix = read_word_vectors(path, limit=limit)
        matrix = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
        return cls(words, matrix, {word: row for row, word in enumerate(words)}, {})

    def fill(
        self, found: list[Candidates], texts: Sequence[list[Word]], wanted: Sequence[list[bool]], *, count: int
    ) -> None:
        """Put the `count` nearest words of every word that is `wanted` into its list in `found`."""
        asked = {
            word.text
            for words, which in zip(texts, wanted, strict=True)
            for word, is_wanted in zip(words, which, strict=True)
            if is_wanted
        }
        new = sorted(asked - self.known.keys())
        rows = {word: self.rows.get(word, self.rows.get(word.lower())) for word in new}
        there = [(word, row) for word, row in rows.items() if row is not None]
        self.known.update({word: [] for word, row in rows.items() if row is None})
        for start in range(0, len(there), _BLOCK):
            block = there[start : start + _BLOCK]
            near = self._nearest(np.array([row for _, row in block]), count)
            self.known.update(zip((word for word, _ in block), near, strict=True))
        for candidates, words, which in zip(found, texts, wanted, strict=True):
            for into, word, asked_for in zip(candidates, words, which, strict=True):
                if asked_for:
                    into += self.known[word.text]

    def _nearest(self, rows: np.ndarray, count: int) -> list[list[str]]:
        """For each of `rows` its `count` nearest other words, sorted."""
        likeness = self.directions[rows] @ self.directions.T  # (B, N)
        likeness[np.arange(len(rows)), rows] = -np.inf
        count = min(count, len(self.words) - 1)
        near = np.argpartition(-likeness, count - 1, axis=1)[:, :count] if count else np.empty((len(rows), 0), int)
        return [sorted(self.words[other] for other in each) for each in near]
