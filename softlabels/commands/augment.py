"""`softlabels augment`: new texts made of a corpus, for a teacher to label."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from softlabels.commands.options import CorpusArgument, Cpu, Json, Label, Rows, Text, Trust
from softlabels.commands.show import print_report

EXAMPLES = (
    "Examples:  softlabels augment train.csv --out more.jsonl --teacher ./teacher   |   "
    "softlabels augment train.csv --out more.jsonl --method tinybert --mlm bert-base-uncased --word-vectors glove.txt"
)


def augment_command(
    corpus: CorpusArgument,
    out: Annotated[Path, typer.Option(help="the file that is written: .jsonl, .csv or .tsv; there must be none yet")],
    method: Annotated[
        str | None, typer.Option(help="distilled-bilstm (the default), tinybert, deletion or short-long; see above")
    ] = None,
    times: Annotated[
        int | None, typer.Option(min=1, help="samples a row; by default 20, of pairs 10 (tinybert: 20 of either)")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="another one makes other texts")] = None,
    no_originals: Annotated[bool, typer.Option("--no-originals", help="write the new rows only")] = False,
    language: Annotated[
        str | None, typer.Option(help="en, zh, or auto (the default): a text with a Chinese character is Chinese")
    ] = None,
    no_pos: Annotated[
        bool,
        typer.Option(
            "--no-pos",
            help="of distilled-bilstm: a word is replaced by any word, by its frequency, whatever its part of speech; "
            "needs no tagger, so English needs no extra package, and other languages with spaces are taken too",
        ),
    ] = False,
    teacher: Annotated[
        str | None,
        typer.Option(help="a masked word becomes the mask token of its tokenizer: a folder or a Hugging Face name"),
    ] = None,
    mask_token: Annotated[str | None, typer.Option(help="or name the mask token; by default [MASK]")] = None,
    mask_rate: Annotated[float | None, typer.Option(help="of distilled-bilstm: words masked; by default 0.1")] = None,
    pos_rate: Annotated[float | None, typer.Option(help="of distilled-bilstm: words replaced; by default 0.1")] = None,
    ngram_rate: Annotated[
        float | None, typer.Option(help="of distilled-bilstm: texts cut to an n-gram; by default 0.25")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="of tinybert: words replaced, by default 0.4; of deletion and short-long, by default 0.1"),
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="of tinybert: words that one may be replaced by; by default 15")
    ] = None,
    mlm: Annotated[
        str | None, typer.Option(help="of tinybert: the masked language model, a folder or a Hugging Face name")
    ] = None,
    word_vectors: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="of tinybert: word2vec, fastText or GloVe, as text, also compressed"),
    ] = None,
    vector_words: Annotated[
        int | None, typer.Option(min=2, help="of tinybert: only so many words of that file; by default 100,000")
    ] = None,
    span: Annotated[
        float | None,
        typer.Option(help="of short-long: words of a long disorder, or a share of the text; by default 20"),
    ] = None,
    task: Annotated[str | None, typer.Option(help="what the labels are, as for dump; by default a class a row")] = None,
    split: Annotated[str | None, typer.Option(help="which split(s) of the corpus, joined by +")] = None,
    text: Text = None,
    label: Label = None,
    rows: Rows = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    cpu: Cpu = False,
) -> None:
    """A larger transfer set: new texts made of a corpus's rows, for a teacher to label.

    distilled-bilstm masks words, replaces some by others of the same part of speech, and keeps an n-gram of some
    texts; tinybert replaces words by what a masked language model says (--mlm), or by the nearest word vectors
    (--word-vectors); deletion leaves words out; short-long swaps neighbours, and the halves of long spans.
    Chinese words, and parts of speech, need pip install 'softlabels[augment]'. The rows themselves come first, with
    their labels; new ones have none, and are called by the id of their row, ~ and a number. The same command writes
    the same bytes.
    """
    from softlabels.config import AugmentOptions, build_options

    given = {
        "method": method,
        "times": times,
        "seed": seed,
        "originals": False if no_originals else None,
        "language": language,
        "pos": False if no_pos else None,
        "mask_token": mask_token,
        "mask_rate": mask_rate,
        "pos_rate": pos_rate,
        "ngram_rate": ngram_rate,
        "rate": rate,
        "candidates": candidates,
        "mlm": mlm,
        "word_vectors": word_vectors,
        "vector_words": vector_words,
        "span": span,
    }
    options = build_options(
        AugmentOptions, {key: value for key, value in given.items() if value is not None}, where="augment"
    )
    from softlabels.augment import augment, check_task
    from softlabels.corpus import read_corpus

    data = read_corpus(corpus, split=split, text=text, label=label, rows=rows, task=check_task(task))
    report = augment(
        data,
        out=out,
        options=options,
        teacher=teacher,
        device="cpu" if cpu else None,
        trust_remote_code=trust_remote_code,
    )
    print_report(asdict(report), as_json=as_json)
