"""A larger transfer set from a small one: rows come in, a file of these and of new texts made of them goes out.

New rows have no label: the teacher is to label them, in `dump`, which takes the file as it is. The id of one is that of
the row that it is made of, ~, and a number. The file is whole or not there.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TextIO

from softlabels.augmenters import Augmenter, Sampler, Source, build_augmenter
from softlabels.augmenters.words import Segmenter, Word, join_words, make_segmenter
from softlabels.cache.files import text_file
from softlabels.config import AugmentOptions, suggest
from softlabels.corpus import Corpus
from softlabels.errors import ConfigError, CorpusError
from softlabels.progress import progress
from softlabels.types import IMAGES, TASKS, Example, Label, Task

MASK_TOKEN = "[MASK]"
_TASKS = tuple(task for task in TASKS if task not in ("token-classification", IMAGES))  # the first is the default
_CHUNK = 64  # rows whose samplers are made together

Text = tuple[str, str | None]  # a row's text, and its second one


@dataclass(frozen=True)
class AugmentReport:
    """What `augment` wrote."""

    out: Path
    method: str
    rows: int
    originals: int
    augmented: int
    duplicates: int  # samples left out, as they were the row itself or an earlier sample of it
    seconds: float


def augment(
    corpus: Corpus,
    *,
    out: str | Path,
    options: AugmentOptions | None = None,
    teacher: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> AugmentReport:
    """Write the rows of `corpus` and up to `options.times` new ones of each to `out`, a .jsonl, .csv or .tsv file.

    Of a pair, sample by sample, the first text alone is new, then the second, then both. What a row gets follows from
    the seed and its id alone, but for `distilled-bilstm`, whose words are drawn by their frequency in `corpus`.
    `teacher` (a folder or hub name): masked words get the mask token of its tokenizer. Memory holds the corpus and the
    table of its words; the rest is written as it is made. ConfigError, CorpusError and TeacherError say what is wrong.
    """
    began = time.monotonic()
    options, out = options or AugmentOptions(), Path(out)
    columns = _check(corpus, out, options)
    mask_token = _mask_token(options, teacher, trust_remote_code)
    segment = make_segmenter(
        language=options.language,
        tagged=options.pos and options.method == "distilled-bilstm",
        mask_token=mask_token,
    )
    source = Source(_count_texts(corpus, segment), mask_token, device, trust_remote_code)
    augmenter = build_augmenter(options, source)
    written = duplicates = 0
    with text_file(out) as file:
        write = _WRITERS[out.suffix.lower()](file, columns)
        for example in corpus.examples if options.originals else []:
            write(_row(example.id, (example.text, example.text_b), example.label))
        taken = {example.id for example in corpus.examples}
        total = sum(_times(options, example) for example in corpus.examples)
        with progress(total, description=f"augmenting ({options.method})", unit="samples") as update:
            for example, texts in _new_texts(corpus, options, segment, augmenter):
                for row_id, text in zip(_new_ids(example.id, taken), texts, strict=False):
                    write(_row(row_id, text, None))
                written += len(texts)
                duplicates += _times(options, example) - len(texts)
                update(_times(options, example))
    originals = len(corpus.examples) if options.originals else 0
    return AugmentReport(
        out, options.method, originals + written, originals, written, duplicates, time.monotonic() - began
    )


def check_task(name: str | None) -> Task:
    """The task called `name`, of those whose labels outlast new words; ConfigError for any other."""
    for task in _TASKS:
        if task == (name or _TASKS[0]):
            return task
    raise ConfigError(f"--task {name}: new texts can be made for {', '.join(_TASKS)}.{suggest(str(name), _TASKS)}")


def _check(corpus: Corpus, out: Path, options: AugmentOptions) -> list[str]:
    """The columns of the file; an error where it cannot be written."""
    if out.suffix.lower() not in _WRITERS:
        raise ConfigError(f"--out {out}: name a file that ends in {', '.join(_WRITERS)}")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} is already there: choose another --out, or delete it")
    if not corpus.examples:
        raise CorpusError(f"corpus {corpus.source} has no rows: there is nothing to make new texts of")
    if any(example.words is not None or example.image is not None for example in corpus.examples):
        raise CorpusError(
            f"corpus {corpus.source} has tags for its words, or images: only labels of whole texts outlast new words"
        )
    pairs = corpus.examples[0].text_b is not None
    if odd := [example.id for example in corpus.examples if (example.text_b is not None) != pairs]:
        raise CorpusError(f"corpus {corpus.source} has pairs and single texts (row '{odd[0]}'): a file holds one kind")
    labelled = options.originals and any(example.label is not None for example in corpus.examples)
    return ["id", *(["text_a", "text_b"] if pairs else ["text"]), *(["label"] if labelled else [])]


def _mask_token(options: AugmentOptions, teacher: str | None, trust_remote_code: bool) -> str:
    """What stands for a masked word."""
    if teacher is None:
        return options.mask_token or MASK_TOKEN
    if options.mask_token is not None:
        raise ConfigError("--mask-token and --teacher both say what stands for a masked word: give one of them")
    from softlabels.pretrained import load_tokenizer, resolve_pretrained

    folder = resolve_pretrained(teacher, trust_remote_code=trust_remote_code)
    token = load_tokenizer(folder, trust_remote_code=trust_remote_code).mask_token
    if token is None:
        raise ConfigError(
            f"the tokenizer of {teacher} has no mask token: say with --mask-token what stands for a masked word, "
            f"or mask none (--mask-rate 0)"
        )
    return token


# ------------------------------------------------------------------------------------------------------- new rows


@dataclass(frozen=True, slots=True)
class _Half:
    """A text, as its words join again, and what makes new ones of it."""

    same: str
    sample: Sampler


def _new_texts(
    corpus: Corpus, options: AugmentOptions, segment: Segmenter, augmenter: Augmenter
) -> Iterator[tuple[Example, list[Text]]]:
    """Each example and what was made of it, some examples at a time."""

    def halves(texts: list[str]) -> list[_Half]:
        words = [segment(text) for text in texts]
        return [_Half(join_words(each), sample) for each, sample in zip(words, augmenter(words), strict=True)]

    for start in range(0, len(corpus.examples), _CHUNK):
        chunk = corpus.examples[start : start + _CHUNK]
        firsts = halves([example.text for example in chunk])
        seconds = halves([example.text_b for example in chunk if example.text_b is not None])
        for number, example in enumerate(chunk):
            second = seconds[number] if seconds else None
            yield example, _samples_of(example, firsts[number], second, options=options)


def _samples_of(example: Example, first: _Half, second: _Half | None, *, options: AugmentOptions) -> list[Text]:
    """The distinct new texts of one example, in the order in which they were drawn."""
    rng = Random(f"{options.seed}:{example.id}")  # a string is hashed by SHA-512: the same on every machine
    same: Text = (first.same, None if second is None else second.same)
    found: dict[Text, None] = {}
    for number in range(_times(options, example)):
        if second is None:
            text: Text = (join_words(first.sample(rng)), None)
        else:
            one = first.same if number % 3 == 1 else join_words(first.sample(rng))
            text = (one, second.same if number % 3 == 0 else join_words(second.sample(rng)))
        if text != same:
            found[text] = None
    return [_as_given(text, same, example) for text in found]


def _as_given(text: Text, same: Text, example: Example) -> Text:
    """`text`, with the white space of the half of a pair that isn't new."""
    return example.text if text[0] == same[0] else text[0], example.text_b if text[1] == same[1] else text[1]


def _times(options: AugmentOptions, example: Example) -> int:
    """How many samples are drawn of an example."""
    if options.times is not None:
        return options.times
    return 10 if example.text_b is not None and options.method != "tinybert" else 20


def _new_ids(origin: str, taken: set[str]) -> Iterator[str]:
    """'17~1', '17~2', …, but for those that the corpus has already."""
    number = 0
    while True:
        number += 1
        if (made := f"{origin}~{number}") not in taken:
            yield made


def _count_texts(corpus: Corpus, segment: Segmenter) -> Iterator[list[Word]]:
    """The words of each text."""
    with progress(len(corpus.examples), description="counting words") as update:
        for example in corpus.examples:
            yield segment(example.text)
            if example.text_b is not None:
                yield segment(example.text_b)
            update(1)


# ----------------------------------------------------------------------------------------------------------- files

Row = dict[str, Any]


def _row(row_id: str, text: Text, label: Label) -> Row:
    texts: Row = {"text": text[0]} if text[1] is None else {"text_a": text[0], "text_b": text[1]}
    return {"id": row_id, **texts, **({} if label is None else {"label": label})}


def _jsonl(file: TextIO, columns: list[str]) -> Callable[[Row], object]:
    return lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _csv(file: TextIO, columns: list[str], *, delimiter: str = ",") -> Callable[[Row], object]:
    writer = csv.DictWriter(file, columns, delimiter=delimiter, lineterminator="\n")
    writer.writeheader()

    def write(row: Row) -> None:
        label = row.get("label")
        if isinstance(label, tuple):
            if len(label) > 1 and not all(isinstance(each, str) and "," not in each for each in label):
                raise ConfigError(f"row '{row['id']}' has a list of labels, which only a .jsonl file can hold")
            row = {**row, "label": ",".join(map(str, label))}
        writer.writerow(row)

    return write


def _tsv(file: TextIO, columns: list[str]) -> Callable[[Row], object]:
    return _csv(file, columns, delimiter="\t")


_WRITERS: Mapping[str, Callable[[TextIO, list[str]], Callable[[Row], object]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
}
