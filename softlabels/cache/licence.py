"""card.json: what is said of a cache that no manifest holds, its licences above all; and it lies beside the manifest.

It has no part in the cache's identity, so saying more later changes no byte that was dumped. `softlabels card` writes
it, the README is made from it, and it goes where the cache goes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from softlabels.cache.format import to_json
from softlabels.cache.inside import read_inside
from softlabels.errors import CacheError, ConfigError

FACTS = "card.json"
_LIMIT = 1 << 16  # bytes
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
Line = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]*$")
]

# What the Hugging Face Hub calls licences; any other is `other` there, with its name beside.
_HUB = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
    lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 gemma unknown other
"""
HUB_LICENCES = frozenset(_HUB.split())


class CardFacts(BaseModel):
    """What `softlabels card` was told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Line | None = None  # what the cache is to be called
    license: Line | None = None  # of the cache itself
    teacher_license: Line | None = None
    corpus_license: Line | None = None
    language: Annotated[list[str], Field(max_length=50)] = []  # of the texts: en, zh; code; multilingual


def build_facts(
    *,
    name: str | None = None,
    license: str | None = None,
    teacher_license: str | None = None,
    corpus_license: str | None = None,
    language: str | None = None,
) -> CardFacts:
    """The facts of these options, `language` with commas between several; ConfigError where one can't be."""
    given = {"name": name, "license": license, "teacher_license": teacher_license, "corpus_license": corpus_license}
    languages = [part.strip() for part in language.split(",")] if language is not None else []
    for part in languages:
        if not _LANGUAGE.fullmatch(part):
            raise ConfigError(f"--language {part}: give two or three small letters (en, zh), code or multilingual")
    try:
        return CardFacts.model_validate({**given, "language": languages})
    except ValidationError as error:
        place = str(error.errors()[0]["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{place}: give one line of at most 200 characters") from None


def read_facts(folder: Path) -> CardFacts:
    """card.json of the cache at `folder`, empty where there is none; CacheError where it is damaged."""
    try:
        return CardFacts.model_validate_json(read_inside(folder, FACTS, limit=_LIMIT))
    except FileNotFoundError:
        return CardFacts()
    except ValidationError:
        raise CacheError(
            f"{folder / FACTS} is damaged: remove it, and tell `softlabels card` the licences again"
        ) from None


def keep_facts(folder: Path, told: CardFacts) -> CardFacts:
    """Write what was told into card.json, over what it said; all that it says now."""
    from softlabels.cache.files import write_file

    before = read_facts(folder)
    now = before.model_copy(update={key: value for key, value in told.model_dump().items() if value})
    if now != before:
        write_file(folder / FACTS, to_json(now))
    return now
