"""The small folders of a cache, tokenizer/ (or processor/) and teacher/: loaded without running any code, and hashed.

They are what transformers wrote: JSON and word lists. Code (`auto_map`, .py) and pickles are never loaded from a cache.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softlabels.cache.files import hash_handle
from softlabels.cache.format import MANIFEST, FolderReceipt, read_settings
from softlabels.cache.inside import open_inside
from softlabels.errors import CacheError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDERS = ("processor", "teacher", "tokenizer")
# JSON, word lists and sentencepiece models; nothing that Python would run or unpickle
_TOKENIZER_FILES = {".json", ".txt", ".model", ".jinja", ".spm", ".bpe", ".vocab", ".codes", ".tiktoken"}
_MOST_FILES = 1000


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the cache at `folder`. CacheError where it is damaged, or would have code loaded."""
    from transformers import AutoTokenizer

    from softlabels.pretrained import quiet_transformers

    path = folder / "tokenizer"
    for name in settings_files(folder, "tokenizer"):
        if Path(name).suffix not in _TOKENIZER_FILES:
            raise CacheError(f"{folder / name} is nothing that a tokenizer needs, and may be code: refused. Remove it")
    for name in ("tokenizer_config.json", "config.json"):
        try:
            settings = read_settings(folder, "tokenizer", name)
        except FileNotFoundError:
            continue
        if settings.get("auto_map"):
            raise CacheError(f"{path / name} asks for code to be loaded (auto_map), which no cache may: refused")
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a tokenizer file can be wrong in as many ways as there are tokenizers
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CacheError(f"the tokenizer in {path} does not load: {words}") from None


def hash_processor(settings: Mapping[str, Any]) -> str:
    """xxh3-128 over an image processor's settings: equal processors give equal pixels."""
    import xxhash

    return xxhash.xxh3_128(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_processor_hash(folder: Path) -> str:
    """`hash_processor` of the cache at `folder`; CacheError where its settings are missing or damaged."""
    try:
        return hash_processor(read_settings(folder, "processor", "preprocessor_config.json"))
    except FileNotFoundError:
        raise CacheError(f"{folder / 'processor' / 'preprocessor_config.json'} is missing") from None


def settings_files(folder: Path, part: str) -> list[str]:
    """The files of a small folder by their paths inside the cache, sorted; none where the folder isn't there.

    CacheError for a link or anything else that is no regular file.
    """
    found: list[str] = []
    waiting = [part]
    while waiting:
        place = waiting.pop()
        try:
            if not stat.S_ISDIR(os.lstat(folder / place).st_mode):
                raise CacheError(f"{folder / place} is no folder: refused. Copy the cache again")
            names = os.listdir(folder / place)
        except FileNotFoundError:
            continue
        for name in names:
            path = f"{place}/{name}"
            mode = os.lstat(folder / path).st_mode
            if stat.S_ISDIR(mode):
                waiting.append(path)
            elif stat.S_ISREG(mode):
                found.append(path)
            else:
                raise CacheError(f"{folder / path} is no regular file: refused. Copy the cache again, without links")
        if len(found) + len(waiting) > _MOST_FILES:
            raise CacheError(f"{folder / part} has more than {_MOST_FILES} files: refused")
    return sorted(found)


def settings_hashes(folder: Path) -> dict[str, str]:
    """Path inside the cache → xxh3-128, of every file in the small folders."""
    hashes = {}
    for part in FOLDERS:
        for name in settings_files(folder, part):
            handle = open_inside(folder, *name.split("/"))
            try:
                hashes[name] = hash_handle(handle)
            finally:
                os.close(handle)
    return hashes


def folder_receipt(folder: Path, manifest: bytes) -> FolderReceipt:
    """receipt.json of the cache at `folder` with the bytes `manifest` as its manifest."""
    import xxhash

    return FolderReceipt(files=settings_hashes(folder) | {MANIFEST: xxhash.xxh3_128(manifest).hexdigest()})
