"""What travels beside a cache: its card, licences and signature."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from softlabels.cache.format import read_manifest
from softlabels.cache.licence import FACTS, build_facts, keep_facts
from softlabels.cache.pull import pull
from softlabels.cache.push import push
from softlabels.cache.signing import SIGNATURE, SUMS, sign_cache
from softlabels.cache.verify import verify_cache
from tests.cache.test_share import make_cache
from tests.cache.test_signing import KEY, OTHER, public


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A signed cache with a licence."""
    make_cache(tmp_path / "cache")
    keep_facts(tmp_path / "cache", build_facts(license="mit"))
    sign_cache(tmp_path / "cache", read_manifest(tmp_path / "cache"), KEY)
    return tmp_path / "cache"


def test_the_card_at_a_url_names_the_folders_that_are_there(cache: Path, tmp_path: Path) -> None:
    place, url = tmp_path / "there", f"file://{tmp_path}/there"
    push(cache, url, fields=["logits"])
    card = (place / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "mit"
    for config in head["configs"]:
        (files,) = config["data_files"]
        assert list(place.glob(files["path"])), files
    assert {config["config_name"] for config in head["configs"]} == {"examples", "logits"}
    push(cache, url)  # more fields
    head = yaml.safe_load((place / "README.md").read_text().split("---")[1])
    assert len(head["configs"]) > 2
    (place / "README.md").write_text("# Ours\n")
    push(cache, url)
    assert (place / "README.md").read_text() == "# Ours\n"


def test_a_signature_comes_with_a_whole_cache_only(cache: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/there"
    push(cache, url)
    pull(url, tmp_path / "back")
    signer = public(KEY).fingerprint
    assert verify_cache(tmp_path / "back", signers=[signer]).whole
    assert not verify_cache(tmp_path / "back", signers=[public(OTHER).fingerprint]).whole
    assert (tmp_path / "back" / FACTS).read_bytes() == (cache / FACTS).read_bytes()
    pull(url, tmp_path / "some", fields=["logits"])
    assert not (tmp_path / "some" / SUMS).exists() and not (tmp_path / "some" / SIGNATURE).exists()
    assert (tmp_path / "some" / FACTS).exists() and verify_cache(tmp_path / "some").whole
    push(tmp_path / "some", f"file://{tmp_path}/other")
    assert not (tmp_path / "other" / SUMS).exists()
