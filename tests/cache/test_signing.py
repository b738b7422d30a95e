"""Signatures: every byte of a cache is bound, nothing else counts as a signature, and OpenSSH agrees in both ways."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from transformers import BertConfig, BertForMaskedLM

from softlabels.cache import sshsig
from softlabels.cache.beside import _here, _there
from softlabels.cache.build import requeue
from softlabels.cache.format import read_manifest
from softlabels.cache.pull import pull
from softlabels.cache.push import push
from softlabels.cache.signing import SIGNATURE, SUMS, sign_cache, signature_faults
from softlabels.cache.sshsig import PublicKey, SignatureFault, check, load_private_key, load_signers, sign
from softlabels.cache.urls import Place
from softlabels.cache.verify import verify_cache
from softlabels.cli import _guarded
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, ConfigError
from softlabels.types import Example
from tests.models import TEXTS, save_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("quick")
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
ssh_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")


def public(key: Ed25519PrivateKey) -> PublicKey:
    return PublicKey(key.public_key().public_bytes_raw())


def key_file(folder: Path, key: Ed25519PrivateKey = KEY) -> Path:
    path = folder / "key"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    (folder / "key.pub").write_text(public(key).line + " who@where\n")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed cache with every kind of file that there is, card.json too."""
    place = tmp_path_factory.mktemp("signed")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    save_model(place / "teacher", BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **shape)), tokenizer)
    dumped(place, ["vocab:exact", "vocab:topk=8,factors=4"])
    assert (
        _guarded(["card", str(place / "cache"), "--license", "mit", "--out", str(place / "README.md")], debug=True) == 0
    )
    assert _guarded(["sign", str(place / "cache"), "--key", str(key_file(place))], debug=True) == 0
    return place


def dumped(place: Path, capture: list[str]) -> None:
    corpus = Corpus("texts.csv", None, [Example(f"r{i}", text) for i, (text, _) in enumerate(TEXTS[:12])], None)
    options = DumpOptions(capture=capture, shard_rows=6)
    dump(corpus, teacher=str(place / "teacher"), out=place / "cache", options=options, device="cpu")


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "cache", tmp_path / "cache"))


def faults(cache: Path, fields: list[str] | None = None, key: Ed25519PrivateKey = KEY) -> list[str]:
    verdict = verify_cache(cache, fields=fields, signers=[public(key).fingerprint])
    return [fault.message for fault in verdict.faults if fault.kind == "signature"]


KINDS = [
    "manifest.json",
    "receipt.json",
    "card.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "teacher/config.json",
    "teacher/head.safetensors",
    "teacher/factors.safetensors",
    "examples/00000.arrow",
    "examples/00001.json",
    "vocab_states/00001.arrow",
    "vocab_states/00000.json",
    "vocab_ids/00000.arrow",
]


@pytest.mark.parametrize("name", KINDS)
def test_a_byte_of_any_file_is_bound(cache: Path, name: str) -> None:
    assert faults(cache) == []
    path = cache / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    verdict = verify_cache(cache, signers=[public(KEY).fingerprint])
    if name == "manifest.json" and verdict.faults[0].kind == "manifest":  # no JSON any more: nothing else is looked at
        return
    told = [fault.message for fault in verdict.faults if fault.kind == "signature"]
    assert len(told) == 1 and told[0].startswith(f"{name} is not the file that was signed"), verdict.faults


def test_all_kinds_are_there(made: Path) -> None:
    listed = [line.split("  ")[1] for line in (made / "cache" / SUMS).read_text().splitlines()]
    assert set(KINDS) <= set(listed) and listed == sorted(listed)
    files = {path.relative_to(made / "cache").as_posix() for path in (made / "cache").rglob("*") if path.is_file()}
    assert files - set(listed) == {SUMS, SIGNATURE}


def test_a_list_that_was_changed_is_no_longer_signed(cache: Path) -> None:
    lines = (cache / SUMS).read_text()
    for text in (lines + "\n", lines[:-70], lines.replace("a", "b", 1)):
        (cache / SUMS).write_text(text)
        assert faults(cache) == [
            "SHA256SUMS.sig is no signature of SHA256SUMS: it does not fit: what was signed has changed since, or the "
            "signature has"
        ]


def test_other_values_under_hashes_that_fit_deceive_no_signature(made: Path, tmp_path: Path) -> None:
    """What someone does who wants it: values of another teacher, in a cache that is whole."""
    place = Path(shutil.copytree(made, tmp_path / "place"))
    signed = {name: (place / "cache" / name).read_bytes() for name in (SUMS, SIGNATURE, "card.json")}
    teacher = BertForMaskedLM.from_pretrained(place / "teacher")
    with torch.no_grad():
        dict(teacher.named_parameters())["bert.embeddings.word_embeddings.weight"].mul_(1.5)
    teacher.save_pretrained(place / "teacher")
    shutil.rmtree(place / "cache")
    dumped(place, ["vocab:exact", "vocab:topk=8,factors=4"])
    for name, data in signed.items():
        (place / "cache" / name).write_bytes(data)
    assert verify_cache(place / "cache").whole
    told = faults(place / "cache")
    assert any(line.startswith("vocab_states/00000.arrow is not the file that was signed") for line in told)
    assert any(line.startswith("manifest.json is not the file that was signed") for line in told)


def test_unsigned_foreign_and_unfinished_ones_are_told(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = faults(cache, key=OTHER)
    assert told == [f"SHA256SUMS.sig is of another key than was asked for: of {public(KEY).fingerprint}"]
    for name in (SIGNATURE, SUMS):
        (cache / name).unlink()
        assert faults(cache)[0].startswith(f"the cache is not signed: {name} is missing")
    assert verify_cache(cache).whole  # who doesn't ask isn't told
    assert _guarded(["verify", str(cache), "--signer", public(KEY).line, "--json"], debug=True) == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["whole"] and found["faults"][0]["kind"] == "signature"
    requeue(cache, read_manifest(cache))
    with pytest.raises(CacheError, match=r"is unfinished.*sign what it made"):
        sign_cache(cache, read_manifest(cache), KEY)


def test_a_field_that_is_added_needs_a_new_signature(made: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(made, tmp_path / "place"))
    dumped(place, ["vocab:topk=8,factors=4", "hidden:1"])
    told = faults(place / "cache")
    later = "where fields were added, or left out of this copy, since it was signed, it needs a new signature"
    assert f"manifest.json is not the file that was signed: {later}" in told
    assert f"hidden.01/00000.arrow is not in the signed list: {later}" in told
    assert _guarded(["sign", str(place / "cache"), "--key", str(place / "key")], debug=True) == 0
    assert faults(place / "cache") == []


def test_a_copy_of_some_fields_is_checked_as_far_as_it_goes(cache: Path) -> None:
    shutil.rmtree(cache / "vocab_states")
    for receipt in (cache / "vocab_ids").glob("*.json"):
        receipt.unlink()  # nobody needs them
    assert faults(cache, ["vocab_ids"]) == []
    assert any("vocab_states/00000.arrow" in line for line in faults(cache))
    (cache / "card.json").unlink()
    assert faults(cache, ["vocab_ids"]) == ["card.json was signed, and is not there"]


def test_what_stands_beside_it_is_not_bound(cache: Path) -> None:
    (cache / "README.md").write_text("anything")
    assert faults(cache) == []
    (cache / "tokenizer" / "more.json").write_text("{}")
    assert any(line.startswith("tokenizer/more.json is not in the signed list") for line in faults(cache))


def test_licences_that_change_after_signing_are_told(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, told in ((["--license", "odbl"], True), (["--license", "odbl"], False), ([], False)):
        assert _guarded(["card", str(cache), *command], debug=True) == 0
        assert ("the signature is of the old one" in capsys.readouterr().err) is told
    assert any(line.startswith("card.json") for line in faults(cache))


def test_a_signed_list_leads_nowhere_else(cache: Path) -> None:
    lines = (cache / SUMS).read_text()
    for line in (f"{'0' * 64}  ../key\n", f"{'0' * 64}  /etc/passwd\n", f"{'0' * 64} *x\n", "\n", lines[:100]):
        message = (line + lines).encode()
        (cache / SUMS).write_bytes(message)
        (cache / SIGNATURE).write_bytes(sign(message, KEY))
        assert faults(cache)[0].startswith("SHA256SUMS is signed, and yet no list of files: the line"), line
    (cache / SUMS).unlink()
    (cache / SUMS).symlink_to("/etc/passwd")
    with pytest.raises(CacheError, match="is a link"):
        faults(cache)


def test_what_is_not_whole_is_not_signed(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "vocab_ids" / "00000.arrow").write_bytes(b"0")
    before = (cache / SUMS).read_bytes()
    assert _guarded(["sign", str(cache), "--key", str(key_file(tmp_path))], debug=False) == 2
    assert "is not whole, and not signed:\ncut: vocab_ids/00000.arrow" in capsys.readouterr().err
    assert (cache / SUMS).read_bytes() == before


def test_options_that_exclude_each_other(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--repair"], ["--live", "teacher"]):
        assert _guarded(["verify", str(cache), "--signer", public(KEY).line, *more], debug=False) == 2
        assert "give --signer to a verify without" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- SSHSIG


def test_a_strangers_spaces_take_no_time() -> None:
    """A pattern tried them in every way: 800 took half a second, and eight times as long when doubled."""
    began = time.process_time()
    for end in (b"!", b"-----END SSH SIGNATURE-----", b""):
        with pytest.raises(SignatureFault, match="no SSH signature"):
            check(b"", b"-----BEGIN SSH SIGNATURE-----" + b" " * 60_000 + end)
    assert time.process_time() - began < 5


def test_a_name_with_a_space_is_signed_and_one_that_no_list_holds_is_not(cache: Path) -> None:
    (cache / "tokenizer" / "a b.json").write_bytes(b"{}")
    manifest = read_manifest(cache)
    sign_cache(cache, manifest, KEY)
    assert list(signature_faults(cache, manifest, [public(KEY).fingerprint], list(manifest.fields))) == []
    (cache / "tokenizer" / "é.json").write_bytes(b"{}")
    with pytest.raises(CacheError, match=r"a file whose name no list can hold.*é\.json"):
        sign_cache(cache, manifest, KEY)


def test_a_new_signature_replaces_the_one_of_before_a_field_was_added(cache: Path, tmp_path: Path) -> None:
    url, back = f"file://{tmp_path}/there", tmp_path / "back"
    fields, signers = sorted(read_manifest(cache).fields), [public(KEY).fingerprint]
    push(cache, url, fields=fields[:1])
    pull(url, tmp_path / "part")
    sign_cache(tmp_path / "part", read_manifest(tmp_path / "part"), KEY)
    push(tmp_path / "part", url)
    pull(url, back)
    assert list(signature_faults(back, read_manifest(back), signers, fields[:1])) == []
    push(cache, url)
    pull(url, back)
    assert list(signature_faults(back, read_manifest(back), signers, fields)) == []
    pull(url, tmp_path / "part")  # one that was signed here gives way likewise
    assert list(signature_faults(tmp_path / "part", read_manifest(tmp_path / "part"), signers, fields)) == []


def test_lists_as_long_as_a_manifest_travel(tmp_path: Path) -> None:
    """A manifest of 100,000 shards has more than the 16 MB that a card may have."""
    here = tmp_path / "here"
    here.mkdir()
    place = Place(f"file://{tmp_path}")
    (here / SUMS).write_bytes(b"x" * 17_000_000)
    place.put_bytes(SUMS, b"x" * 17_000_000)
    assert len(_here(here, SUMS) or b"") == len(_there(place, SUMS) or b"") == 17_000_000
    place.put_bytes("README.md", b"x" * 17_000_000)
    with pytest.raises(CacheError, match="more than"):
        _there(place, "README.md")


def test_a_signature_is_the_same_twice_and_of_its_message_alone() -> None:
    armoured = sign(b"message", KEY)
    assert sign(b"message", KEY) == armoured and check(b"message", armoured) == public(KEY)
    assert check(b"message", b"\n" + armoured.replace(b"\n", b"\r\n")) == public(KEY)
    with pytest.raises(SignatureFault, match="does not fit"):
        check(b"massage", armoured)


def test_no_byte_of_a_signature_is_spare() -> None:
    armoured = sign(b"message", KEY)
    data = base64.b64decode(b"".join(armoured.splitlines()[1:-1]))
    for at in range(len(data)):
        for bit in (1, 128):
            changed = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
            text = b"-----BEGIN SSH SIGNATURE-----\n" + base64.b64encode(changed) + b"\n-----END SSH SIGNATURE-----\n"
            with pytest.raises(SignatureFault):
                check(b"message", text)
    for size in range(len(data)):
        text = b"-----BEGIN SSH SIGNATURE-----\n" + base64.b64encode(data[:size]) + b"\n-----END SSH SIGNATURE-----\n"
        with pytest.raises(SignatureFault):
            check(b"message", text)
    for text in (b"", b"x", b"-----BEGIN SSH SIGNATURE-----\n=\n-----END SSH SIGNATURE-----", b"\xff" * 100):
        with pytest.raises(SignatureFault, match="no SSH signature"):
            check(b"message", text)


def test_a_signature_for_something_else_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sshsig, "NAMESPACE", b"git")
        armoured = sign(b"message", KEY)
    with pytest.raises(SignatureFault, match="was made for b'git'"):
        check(b"message", armoured)


@pytest.fixture
def agent_free(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    yield


@ssh_keygen
def test_openssh_checks_what_is_signed_here(cache: Path, tmp_path: Path, agent_free: None) -> None:
    (tmp_path / "allowed").write_text(f"me {public(KEY).line}\n")
    words = ["-f", tmp_path / "allowed", "-I", "me", "-n", "softlabels-cache", "-s", cache / SIGNATURE]
    command = ["ssh-keygen", "-Y", "verify", *map(str, words)]
    done = subprocess.run(command, input=(cache / SUMS).read_bytes(), capture_output=True)
    assert done.returncode == 0 and b"Good" in done.stdout, done
    assert subprocess.run(command, input=b"other", capture_output=True).returncode != 0
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "--quiet", "--check", SUMS], cwd=cache).returncode == 0


@ssh_keygen
def test_what_openssh_signed_is_checked_here(cache: Path, tmp_path: Path, agent_free: None) -> None:
    (cache / SIGNATURE).unlink()
    for kind, told in (("ed25519", None), ("ecdsa", "not of an ed25519 key")):
        key = tmp_path / kind
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(key)], check=True)
        words = ["-f", key, "-n", "softlabels-cache", cache / SUMS]
        subprocess.run(["ssh-keygen", "-q", "-Y", "sign", *map(str, words)], check=True, capture_output=True)
        if told is None:
            assert verify_cache(cache, signers=load_signers(str(key.with_suffix(".pub")))).faults == []
            listing = subprocess.run(["ssh-keygen", "-l", "-f", str(key)], check=True, capture_output=True, text=True)
            assert load_signers(listing.stdout.split()[1]) == load_signers(str(key.with_suffix(".pub")))
        else:
            assert told in faults(cache)[0]
            with pytest.raises(ConfigError, match="no ed25519 key"):
                load_private_key(key, lambda: "")
        (cache / SIGNATURE).unlink()


@ssh_keygen
def test_keys_with_a_passphrase(tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "open sesame", "-f", str(key)], check=True)
    opened = load_private_key(key, lambda: "open sesame")
    assert load_signers(str(key) + ".pub") == [public(opened).fingerprint]
    with pytest.raises(ConfigError, match="the passphrase does not open it"):
        load_private_key(key, lambda: "wrong")


def test_keys_that_are_none(tmp_path: Path) -> None:
    key_file(tmp_path)
    assert public(load_private_key(tmp_path / "key", lambda: "")) == public(KEY)
    (tmp_path / "rubbish").write_bytes(b"\xff\x00")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(
        ConfigError, match=r"nokey: there is no such file. `ssh-keygen -t ed25519 -f .*nokey` makes a key"
    ):
        load_private_key(tmp_path / "nokey", lambda: "")
    for name, told in (("key.pub", "give the file without .pub"), ("rubbish", "no private key"), ("empty", "no priv")):
        with pytest.raises(ConfigError, match=told):
            load_private_key(tmp_path / name, lambda: "")
    for text, told in (
        (str(tmp_path / "rubbish"), "no ed25519 public key"),
        (str(tmp_path / "empty"), "has no public key"),
        (str(tmp_path / "key"), "no ed25519 public key"),
        ("ssh-ed25519 AAAA", "no ed25519 public key"),
        ("SHA256:short", "there is no such file"),
        ("", "there is no such file"),
    ):
        with pytest.raises(ConfigError, match=told):
            load_signers(text)
    (tmp_path / "both").write_text(f"{public(KEY).line}\n\n# two\n{public(OTHER).line} b\n")
    assert load_signers(str(tmp_path / "both")) == [public(key).fingerprint for key in (KEY, OTHER)]


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    for call in (lambda: load_private_key(key_file(tmp_path), lambda: ""), lambda: check(b"", b"")):
        with pytest.raises(ConfigError, match=r"pip install 'softlabels\[sign\]'"):
            call()
