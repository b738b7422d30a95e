"""`softlabels card`: the README of a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softlabels.errors import ConfigError

EXAMPLES = (
    "Examples:  softlabels card cache --license cc-by-4.0 --teacher-license apache-2.0 --corpus-license odc-by "
    "--language en   |   softlabels card cache --url hf://datasets/me/said --out cache/README.md"
)
_License = "an identifier of the Hugging Face Hub (cc-by-4.0, apache-2.0, …), or any other name"


def card(
    cache: Annotated[Path, typer.Argument(metavar="CACHE")],
    license: Annotated[str | None, typer.Option(help=f"of the cache: {_License}")] = None,
    teacher_license: Annotated[str | None, typer.Option(help="of the teacher, likewise")] = None,
    corpus_license: Annotated[str | None, typer.Option(help="of the corpus, likewise")] = None,
    language: Annotated[
        str | None, typer.Option(metavar="CODE[,CODE]", help="of the texts: en, zh, …, code, multilingual")
    ] = None,
    name: Annotated[str | None, typer.Option(help="what the cache is called; by default by its teacher")] = None,
    url: Annotated[
        str | None, typer.Option(help="where it lies for others, so that the card can say how to pull it")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="write it there instead of printing it")] = None,
) -> None:
    """The README of a cache, made from its manifest: a dataset card as the Hugging Face Hub reads it.

    It says which teacher spoke of which corpus, under which licences, what each field holds, how to use it, and what
    personal data it may carry. Licences, language and name are kept in CACHE/card.json: they need telling only once,
    and go where the cache goes. A file of --out that was not made by this command is not written over.
    """
    from softlabels.cache.card import MARK, write_card
    from softlabels.cache.files import write_file
    from softlabels.cache.format import read_manifest
    from softlabels.cache.licence import build_facts, keep_facts, read_facts
    from softlabels.cache.signing import SUMS

    told = build_facts(
        name=name,
        license=license,
        teacher_license=teacher_license,
        corpus_license=corpus_license,
        language=language,
    )
    manifest = read_manifest(cache)
    text = write_card(manifest, told, url=url)  # what can't be told is found before anything is written
    before = read_facts(cache)
    text = write_card(manifest, facts := keep_facts(cache, told), url=url)
    if facts != before and (cache / SUMS).exists():
        typer.echo(
            f"note: card.json has changed, and the signature is of the old one: softlabels sign {cache}", err=True
        )
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists() and MARK not in out.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"{out} is there and was not made by `softlabels card`: move it, or choose another --out")
    write_file(out, text.encode())
    typer.echo(str(out))
