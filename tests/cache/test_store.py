"""A cache that is dumped to a URL: what is said of the URL holds nothing secret of it."""

from __future__ import annotations

import pytest

from softlabels.cache.delivery import StorePlace, open_store
from softlabels.cache.store import mirror
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import SoftlabelsError
from softlabels.types import Example

URLS = ["sftp://anna:geheim@127.0.0.1:1/cache", "nothing://anna:geheim@host/cache", "http://anna:geheim@127.0.0.1:1/c"]


@pytest.mark.parametrize("url", URLS)
def test_a_store_that_cannot_be_opened_is_named_without_its_password(url: str) -> None:
    with pytest.raises(SoftlabelsError) as told, mirror(url):
        pass
    assert "geheim" not in str(told.value) and url.split("@")[1].split("/")[0] in str(told.value)


def test_neither_says_a_dump_that_cannot_write_there() -> None:
    corpus = Corpus("made", None, [Example("0", "text")], None)
    with pytest.raises(SoftlabelsError, match=r"--out s3://\*\*\*@bucket/cache: only the workers of a Ray cluster"):
        dump(corpus, teacher="nobody", out="s3://key:geheim@bucket/cache", options=DumpOptions())


def test_a_lease_that_is_gone_is_told_without_the_urls_query() -> None:
    place = StorePlace("memory://store/cache?token=geheim", ".tmp-lease-x")
    with pytest.raises(SoftlabelsError) as told:
        place.check()
    assert "geheim" not in str(told.value) and "memory://store/cache" in str(told.value)
    assert open_store("memory://store")[1]
