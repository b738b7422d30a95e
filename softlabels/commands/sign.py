"""`softlabels sign`: who vouches for a cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from softlabels.commands.options import Json
from softlabels.commands.show import print_report
from softlabels.errors import CacheError, ConfigError
from softlabels.tables import verdict_line

EXAMPLES = (
    "Examples:  softlabels sign cache --key ~/.ssh/id_ed25519   |   ssh-keygen -t ed25519 -f maker && "
    "softlabels sign cache --key maker && softlabels verify cache --signer maker.pub"
)


def sign(
    cache: Annotated[Path, typer.Argument(metavar="CACHE")],
    key: Annotated[Path, typer.Option(metavar="FILE", help="an OpenSSH private key, ed25519")],
    as_json: Json = False,
) -> None:
    """Vouch for every byte of a cache, so that others can tell that it is yours: `verify --signer`.

    Writes SHA256SUMS, the SHA-256 of every file but README.md, and SHA256SUMS.sig, an OpenSSH signature of that.
    Without softlabels, sha256sum --check SHA256SUMS and ssh-keygen -Y verify -n softlabels-cache check them. What is
    not whole is not signed. A field that is added later, or left out of a copy, needs a new signature. Needs
    pip install 'softlabels[sign]'.
    """
    from softlabels.cache.format import read_manifest
    from softlabels.cache.signing import sign_cache
    from softlabels.cache.sshsig import load_private_key
    from softlabels.cache.verify import verify_cache

    opened = load_private_key(key.expanduser(), _ask)
    verdict = verify_cache(cache)
    if not verdict.whole:
        raise CacheError(f"{cache} is not whole, and not signed:\n{verdict_line(verdict)}")
    report = sign_cache(cache, read_manifest(cache), opened)
    facts = {"cache": str(report.cache), "signer": report.signer, "files": report.files, "bytes": report.bytes}
    print_report(facts, as_json=as_json)


def _ask() -> str:
    if not sys.stdin.isatty():
        raise ConfigError(
            "the key has a passphrase, and there is no terminal to ask for it: sign from one, or with another key"
        )
    return typer.prompt("passphrase of the key", hide_input=True, err=True)
