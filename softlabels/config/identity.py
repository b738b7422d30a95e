"""What tells two configurations apart, and what a cache or a run says of its making."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

from softlabels import __version__


def fingerprint(value: Any) -> str:
    """A short stable hash of plain data: two stages with the same inputs have the same fingerprint."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


def package_versions(*packages: str) -> dict[str, str]:
    """The installed versions of softlabels and of `packages`, for what a cache or a run says of its making."""
    return {"softlabels": __version__, **{package: version(package) for package in packages}}
