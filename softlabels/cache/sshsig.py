"""Signatures as OpenSSH makes them: bytes and an ed25519 key come in, an armoured SSHSIG goes out, and back.

What is signed here `ssh-keygen -Y verify` checks, and what `ssh-keygen -Y sign` signed is checked here; the format is
OpenSSH's PROTOCOL.sshsig. Keys are those that `ssh-keygen -t ed25519` makes. No other kind of key is taken.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from softlabels.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

NAMESPACE = b"softlabels-cache"  # a signature made for anything else is none of a cache
_KIND, _MAGIC, _VERSION = b"ssh-ed25519", b"SSHSIG", struct.pack(">I", 1)
_HASHES = {b"sha512": hashlib.sha512, b"sha256": hashlib.sha256}
_ARMOUR = re.compile(  # no two parts that can match the same: a stranger's spaces would be tried for days
    rb"\s*-----BEGIN SSH SIGNATURE-----\s([A-Za-z0-9+/=\s]+)-----END SSH SIGNATURE-----\s*", re.ASCII
)


class SignatureFault(ValueError):
    """Why a signature is none."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An ed25519 key by which signatures are checked."""

    raw: bytes  # (32,)

    @property
    def blob(self) -> bytes:
        """As SSH writes it."""
        return _string(_KIND) + _string(self.raw)

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` prints it: SHA256:…"""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")

    @property
    def line(self) -> str:
        """As a .pub file has it."""
        return f"{_KIND.decode()} {base64.b64encode(self.blob).decode()}"


def sign(message: bytes, key: Ed25519PrivateKey) -> bytes:
    """The armoured signature of `message`; the same message and key give the same bytes."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = PublicKey(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))
    signature = _string(_KIND) + _string(key.sign(_signed(message, b"sha512")))
    parts = [public.blob, NAMESPACE, b"", b"sha512", signature]
    text = base64.b64encode(_MAGIC + _VERSION + b"".join(map(_string, parts)))
    lines = [text[at : at + 70] for at in range(0, len(text), 70)]
    return b"\n".join([b"-----BEGIN SSH SIGNATURE-----", *lines, b"-----END SSH SIGNATURE-----", b""])


def check(message: bytes, armoured: bytes) -> PublicKey:
    """The key that signed `message`; SignatureFault where none did. Whether that key is to be trusted is not said."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        raise need_cryptography() from None
    found = _ARMOUR.fullmatch(armoured)
    try:
        data = base64.b64decode(b"".join(found[1].split()), validate=True) if found else b""
    except binascii.Error:
        data = b""
    if data[:10] != _MAGIC + _VERSION:
        raise SignatureFault("it is no SSH signature")
    public, namespace, _, digest, signature = _split(data[10:], 5)
    if not (public.startswith(_string(_KIND)) and signature.startswith(_string(_KIND))):
        raise SignatureFault("it is not of an ed25519 key: sign with one (ssh-keygen -t ed25519)")
    (_, raw), (_, proof) = _split(public, 2), _split(signature, 2)
    if len(raw) != 32 or digest not in _HASHES:
        raise SignatureFault("it is damaged")
    if namespace != NAMESPACE:
        raise SignatureFault(f"it was made for {namespace[:40]!r}, and not for {NAMESPACE!r}")
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(proof, _signed(message, digest))
    except (InvalidSignature, ValueError):
        raise SignatureFault("it does not fit: what was signed has changed since, or the signature has") from None
    return PublicKey(raw)


def _signed(message: bytes, digest: bytes) -> bytes:
    """What the key signs in the place of the message."""
    parts = [NAMESPACE, b"", digest, _HASHES[digest](message).digest()]
    return _MAGIC + b"".join(map(_string, parts))


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _split(data: bytes, count: int) -> list[bytes]:
    """The `count` strings that `data` consists of; SignatureFault where it does not."""
    parts = []
    for _ in range(count):
        size = struct.unpack(">I", data[:4])[0] if len(data) >= 4 else -1
        if not 0 <= size <= len(data) - 4:
            raise SignatureFault("it is damaged")
        parts.append(data[4 : 4 + size])
        data = data[4 + size :]
    if data:
        raise SignatureFault("it is damaged")
    return parts


# --------------------------------------------------------------------------------------------------------------- keys


def load_private_key(path: Path, passphrase: Callable[[], str]) -> Ed25519PrivateKey:
    """The key in an OpenSSH file; `passphrase` is asked where it has one. ConfigError where it is none, or it fails."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    except ImportError:
        raise need_cryptography() from None
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"--key {path}: there is no such file. `ssh-keygen -t ed25519 -f {path}` makes a key"
        ) from None
    try:
        key = load_ssh_private_key(data, None)
    except TypeError:  # it has a passphrase
        try:
            key = load_ssh_private_key(data, passphrase().encode())
        except (ValueError, UnsupportedAlgorithm):
            raise ConfigError(f"--key {path}: the passphrase does not open it, or the file is damaged") from None
    except (ValueError, UnsupportedAlgorithm):
        hint = ": that is the public half, give the file without .pub" if path.suffix == ".pub" else ""
        raise ConfigError(
            f"--key {path} is no private key of OpenSSH{hint}. `ssh-keygen -t ed25519 -f FILE` makes one"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"--key {path} is no ed25519 key. `ssh-keygen -t ed25519 -f FILE` makes one")
    return key


def load_signers(text: str) -> list[str]:
    """The fingerprints of those trusted: of a .pub file (one key or several), of such a line, or of a fingerprint."""
    if re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}=?", text):
        return [text.rstrip("=")]
    if text.split()[:1] == [_KIND.decode()]:
        return [_public(text, "--signer").fingerprint]
    path = Path(text).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"--signer {text}: give the .pub file of who signed, its line ('ssh-ed25519 AAAA…'), or its fingerprint "
            f"(SHA256:…, as `ssh-keygen -l -f FILE` prints it); there is no such file"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        lines = ["-"]
    keys = [line for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--signer {path} has no public key")
    return [_public(line, f"--signer {path}").fingerprint for line in keys]


def _public(line: str, where: str) -> PublicKey:
    words = line.split()
    try:
        kind, raw = _split(base64.b64decode(words[1], validate=True), 2) if len(words) > 1 else (b"", b"")
    except (binascii.Error, SignatureFault):
        kind, raw = b"", b""
    if words[:1] != [_KIND.decode()] or kind != _KIND or len(raw) != 32:
        raise ConfigError(f"{where}: a line is no ed25519 public key as a .pub file has it, 'ssh-ed25519 AAAA…'")
    return PublicKey(raw)


def need_cryptography() -> ConfigError:
    return ConfigError("signatures need a package that is not there: pip install 'softlabels[sign]'")
