"""Texts as words: segmentation and parts of speech of English and Chinese, and back to text.

English words are cut as the Penn Treebank does ("do|n't", "it|'s", punctuation apart) and have its tags, from
TextBlob's lexicon and rules; Chinese ones are jieba's, with its own tags. Both packages bring their data with them
(extra `augment`): nothing is downloaded.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from softlabels.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a text."""

    text: str
    gap: str = " "  # the white space before it, wherever it goes
    tag: str = ""  # its part of speech, where it was asked for


Segmenter = Callable[[str], list[Word]]

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_ENGLISH = r"""
    \w+? (?=n['\u2019]t\b)            # do|n't
  | n['\u2019]t\b
  | ['\u2019] (?:s|re|ve|ll|d|m)\b    # it|'s
  | \w+ (?:-\w+)*                     # well-known
  | (?P<mark>[^\w\s]) (?P=mark)*      # --, ..., !!
"""
_CONTRACTIONS = ("n't", "n\u2019t")


def make_segmenter(*, language: str, tagged: bool, mask_token: str) -> Segmenter:
    """A function from a text to its words. `language` is en, zh, or auto: a text with a Han character is Chinese.

    The mask token is one word in either. ConfigError where a package is missing that is needed: at the first text, as
    a corpus may need but one of them.
    """
    mask = re.escape(mask_token)
    english = re.compile(rf"(?P<gap>\s*)(?P<word>{mask}|{_ENGLISH})", re.VERBOSE | re.IGNORECASE)
    masks = re.compile(f"({mask})")

    def segment(text: str) -> list[Word]:
        if language == "zh" or (language == "auto" and _HAN.search(text)):
            return _chinese_words(masks.split(text), mask_token, tagged)
        found = [(match["gap"], match["word"]) for match in english.finditer(text)]
        words = [word for _, word in found]
        tags = _english_tagger()(words) if tagged else [""] * len(words)
        # what stood first may come to stand elsewhere: a space before it, which a text's start loses again
        gaps = [" ", *(gap for gap, _ in found[1:])]
        return [Word(*parts) for parts in zip(words, gaps, tags, strict=False)]

    return segment


def join_words(words: Iterable[Word]) -> str:
    """The text of `words`, without white space around it."""
    return "".join(gap + word for gap, word in _pieces(words)).strip()


def place_words(words: Sequence[Word]) -> tuple[str, list[tuple[int, int]]]:
    """`join_words`, and where in it each word starts and ends."""
    text, places = "", []
    for gap, word in _pieces(words):
        start = len(text) + len(gap) if text else 0
        text = text + gap + word if text else word
        places.append((start, len(text)))
    return text, places


def _pieces(words: Iterable[Word]) -> Iterable[tuple[str, str]]:
    """(what stands before it, word). Two words that new neighbours would merge into one get a space between."""
    before = ""
    for word in words:
        apart = not word.gap and _merge(before, word.text) and word.text.lower() not in _CONTRACTIONS
        yield " " if apart else word.gap, word.text
        before = word.text


def is_han(text: str) -> bool:
    """Whether `text` starts with a Han character, of words that need no space between them."""
    return _HAN.match(text) is not None


def _merge(first: str, second: str) -> bool:
    """Whether two words with nothing between them look like one."""
    return all(each.isalnum() and not is_han(each) for each in (first[-1:], second[:1]))


def _chinese_words(parts: list[str], mask_token: str, tagged: bool) -> list[Word]:
    words: list[Word] = []
    gap = ""
    for part in parts:
        for text, tag in [(part, "")] if part == mask_token else _chinese_cutter(tagged)(part):
            if not text or text.isspace():
                gap += text
                continue
            if words and not gap and mask_token not in (text, words[-1].text) and _merge(words[-1].text, text):
                words[-1] = Word(words[-1].text + text, words[-1].gap, tag)  # 5G, which jieba cuts
            else:
                words.append(Word(text, gap if words else "", tag))
            gap = ""
    return words


# ------------------------------------------------------------------------------------------------------- packages


@cache
def _english_tagger() -> Callable[[list[str]], list[str]]:
    parser = _need("textblob.en", "parts of speech of English need TextBlob").parser
    return lambda words: [tag for _, tag in parser.find_tags(words)]


@cache
def _chinese_cutter(tagged: bool) -> Callable[[str], list[tuple[str, str]]]:
    tokenizer = _chinese_dictionary()
    if not tagged:
        return lambda text: [(word, "") for word in tokenizer.lcut(text)]
    tagger = _need("jieba.posseg", "parts of speech of Chinese need jieba").POSTokenizer(tokenizer)
    return lambda text: [(pair.word, pair.flag) for pair in tagger.lcut(text)]


@cache
def _chinese_dictionary() -> Any:
    jieba = _need("jieba", "Chinese words are cut by jieba")
    tokenizer = jieba.Tokenizer()
    # as its own initialize() does, but for the cache that it would read from, and leave in, the folder of temporary
    # files: anybody may have put one there
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer


def _need(module: str, why: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # jieba's, of regular expressions written for Python 2
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(module)
    except ImportError as error:
        remedy = "" if module != "textblob.en" else ", or draw words whatever their part of speech, with --no-pos"
        raise ConfigError(
            f"{why}, which is not installed ({error}): pip install 'softlabels[augment]'{remedy}"
        ) from None
