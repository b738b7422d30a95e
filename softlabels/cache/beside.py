"""What is said of a cache travels with it: its card (README.md), licences (card.json), and its signature.

None of it is part of the cache, so none of it decides what a cache is. The card at a URL is made anew of the manifest
that is there. A signature is of every byte of a whole cache: it goes, and comes, only with all fields.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from softlabels.cache.card import MARK, write_card
from softlabels.cache.files import write_file
from softlabels.cache.format import MANIFEST, MANIFEST_LIMIT, Manifest, to_json
from softlabels.cache.inside import read_inside
from softlabels.cache.licence import FACTS, CardFacts, read_facts
from softlabels.cache.remote import Remote, folder_of
from softlabels.cache.signing import SIGNATURE, SUMS, is_of
from softlabels.cache.urls import Place
from softlabels.errors import CacheError

CARD = "README.md"
_LIMIT = 1 << 24  # bytes of any of these files but a list of all others, which is as long as a manifest


def put_beside(folder: Path, place: Place, manifest: Manifest) -> None:
    """Put the card of the cache that is at `place` now, with the licences and the signature of the one in `folder`.

    A README.md that softlabels did not write is left as it is.
    """
    before = _there(place, CARD)
    if before is None or MARK.encode() in before:
        text = write_card(
            manifest, read_facts(folder), url=place.shown, folder_of=lambda field: folder_of(manifest, field)
        )
        place.put_bytes(CARD, text.encode())
    names = [FACTS]
    data, sums = to_json(manifest), _here(folder, SUMS)
    if sums is not None and _here(folder, MANIFEST) == data and is_of(sums, data):
        names += [SUMS, SIGNATURE]
    for name in names:
        if (said := _here(folder, name)) is not None:
            place.put_bytes(name, said)


def fetch_beside(remote: Remote, folder: Path, manifest: Manifest) -> None:
    """Fetch the licences, where there are any and none are here; and the signature, where all fields are here.

    A signature that is here already stays if it is of this manifest: not one of before fields were added.
    """
    facts = None if _here(folder, FACTS) is not None else _there(remote.place, FACTS)
    if facts is not None:
        try:
            write_file(folder / FACTS, to_json(CardFacts.model_validate_json(facts)))
        except ValidationError:
            raise CacheError(f"{remote.place.shown}/{FACTS} is damaged: have the cache pushed again") from None
    data = to_json(manifest)
    if data != to_json(remote.manifest):
        return
    sums, signature = _here(folder, SUMS), _here(folder, SIGNATURE)
    if sums is not None and signature is not None and is_of(sums, data):
        return
    sums, signature = _there(remote.place, SUMS), _there(remote.place, SIGNATURE)
    if sums is not None and signature is not None:
        (folder / SIGNATURE).unlink(missing_ok=True)  # at no moment it speaks of another list
        write_file(folder / SUMS, sums)
        write_file(folder / SIGNATURE, signature)


def _here(folder: Path, name: str) -> bytes | None:
    try:
        return read_inside(folder, name, limit=_limit(name))
    except FileNotFoundError:
        return None


def _there(place: Place, name: str) -> bytes | None:
    try:
        return place.read(name, limit=_limit(name))
    except FileNotFoundError:
        return None


def _limit(name: str) -> int:
    return MANIFEST_LIMIT if name in (MANIFEST, SUMS) else _LIMIT
