"""`softlabels verify`: whether a cache is whole, or says what its teacher says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softlabels.commands.options import Cpu, Json, Trust
from softlabels.commands.show import print_json
from softlabels.errors import ConfigError
from softlabels.tables import fidelity_table, verdict_line

if TYPE_CHECKING:
    from softlabels.corpus import Corpus

EXAMPLES = (
    "Examples:  softlabels verify cache   |   softlabels verify cache --field logits   |   "
    "softlabels verify cache --repair   |   softlabels verify cache --quick   |   "
    "softlabels verify cache --live ./teacher --rows 200   |   "
    "softlabels verify cache --live ./vit --corpus images.csv   |   softlabels verify cache --signer maker.pub"
)


def verify(
    cache: Annotated[Path, typer.Argument(metavar="CACHE")],
    field: Annotated[
        list[str] | None,
        typer.Option("--field", metavar="FIELD", help="check only this field and the examples; may be repeated"),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="remove the files that are proven bad, so that the dump command writes just these again"
        ),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="only whether all files are there and as long as they must be: seconds")
    ] = False,
    signer: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="hold it to a signature too: the public key of who made it, as its .pub file, its line ('ssh-ed25519 "
            "AAAA…') or its fingerprint (SHA256:…); a cache that is not signed by it is at fault",
        ),
    ] = None,
    live: Annotated[
        str | None,
        typer.Option(
            metavar="TEACHER",
            help="instead: run the cache's teacher (a folder or a Hugging Face name) again on some rows, in other "
            "batches than the dump's, and hold every field against it",
        ),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="CORPUS", help="of --live: the images that were dumped, for a cache of images holds none"),
    ] = None,
    split: Annotated[str | None, typer.Option(help="of --corpus: which split(s), joined by +, as for dump")] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="COLUMN", help="of --corpus: the column with the image")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="of --live: so many random rows; by default 200")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of --live: another one draws other rows")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    cpu: Cpu = False,
) -> None:
    """Whether a cache is whole: checksums, structure, and that all belongs together. Exit code 0 only if it is.

    With --live: whether it says what its teacher says. The teacher runs twice over the rows, in two batchings, and what
    lies between the two is the noise. A field is within its bounds where no value is farther from the live one than
    what the field's codec rounds it by, 4 times the largest noise, and 2^-17 of the largest value. Exit code 1 where a
    field is not. Files are only checked as far as these rows need them: verify without --live reads them all.
    """
    if live is not None:
        if repair:
            raise ConfigError("--live changes nothing: give --repair to a verify without it")
        if quick:
            raise ConfigError("--live runs the teacher: give --quick to a verify without it")
        if signer is not None:
            raise ConfigError("--live looks at some rows only: give --signer to a verify without it")
        _verify_live(
            cache,
            live,
            rows=200 if rows is None else rows,
            seed=seed or 0,
            corpus=None if corpus is None else _read_images(cache, corpus, split=split, text=text),
            fields=field or None,
            trust_remote_code=trust_remote_code,
            cpu=cpu,
            as_json=as_json,
        )
        return
    for option, given in (("--rows", rows), ("--seed", seed), ("--corpus", corpus)):
        if given is not None:
            raise ConfigError(f"{option} is for verify --live TEACHER: without it, every row is looked at")
    from softlabels.cache.sshsig import load_signers
    from softlabels.cache.verify import verify_cache

    signers = None if signer is None else load_signers(signer)
    verdict = verify_cache(cache, fields=field or None, repair=repair, signers=signers, quick=quick)
    if as_json:
        print_json({**asdict(verdict), "whole": verdict.whole})
    else:
        typer.echo(verdict_line(verdict))
    if not verdict.whole:
        raise typer.Exit(2)


def _read_images(cache: Path, corpus: str, *, split: str | None, text: str | None) -> Corpus:
    """What `cache` was dumped from; ConfigError where that was no images."""
    from softlabels.cache.format import read_manifest
    from softlabels.corpus import read_corpus
    from softlabels.types import IMAGES

    if read_manifest(cache).teacher.task != IMAGES:
        raise ConfigError(f"--corpus is for caches of images: cache {cache} holds the tokens that its teacher read")
    return read_corpus(corpus, split=split, text=text, task=IMAGES)


def _verify_live(
    cache: Path,
    teacher: str,
    *,
    rows: int,
    seed: int,
    corpus: Corpus | None,
    fields: list[str] | None,
    trust_remote_code: bool,
    cpu: bool,
    as_json: bool,
) -> None:
    from softlabels.fidelity import verify_live

    found = verify_live(
        cache,
        teacher=teacher,
        rows=rows,
        seed=seed,
        fields=fields,
        device="cpu" if cpu else None,
        trust_remote_code=trust_remote_code,
        corpus=corpus,
    )
    if as_json:
        print_json({**asdict(found), "within": found.within})
    else:
        typer.echo(fidelity_table(found))
    if not found.within:
        raise typer.Exit(1)
