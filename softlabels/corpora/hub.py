"""Data sets of the Hugging Face Hub: a name comes in, its splits go out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from softlabels.corpora.tables import first_line
from softlabels.errors import CorpusError

_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*(?::[\w.-]+)?", re.ASCII)


def is_hub_name(name: str) -> bool:
    """Whether `name` can be a data set's."""
    return _HUB_NAME.fullmatch(name) is not None


def hub_candidates(name: str) -> list[tuple[str, str | None]]:
    """(dataset, config) pairs a name may mean, likelier first: `glue/sst2` is config sst2 of glue.

    The collections of _COLLECTIONS have no owner: what stands before the slash is the dataset itself.
    """
    repo, _, config = name.removeprefix("hf:").partition(":")
    if config:
        return [(repo, config)]
    owner, _, rest = repo.partition("/")
    if not rest:
        return [(repo, None)]
    both: list[tuple[str, str | None]] = [(repo, None), (owner, rest)]
    return both[::-1] if owner in _COLLECTIONS else both


_COLLECTIONS = {"glue", "super_glue", "clue", "tweet_eval", "xtreme", "xglue", "paws-x", "xnli"}


def load_hub(source: str, *, hint: str) -> dict[str, Any]:
    """split -> datasets.Dataset, from the Hub, or where it can't be reached from earlier downloads.

    CorpusError, which ends with the `hint`, where there is none.
    """
    name = source.removeprefix("hf:")
    if _HUB_NAME.fullmatch(name) is None:
        raise CorpusError(f"corpus {source}: '{name}' is no Hub dataset's name (glue/sst2, owner/name, name:config)")
    import datasets

    reached = True
    faults = []
    for repo, config in hub_candidates(name):
        known = _hub_has(repo)
        reached = reached and known is not None
        if known is False:
            continue
        try:
            with _hub_offline(known is None):
                # with its address, as a folder of that name in the working directory would go first
                return dict(datasets.load_dataset(f"hf://datasets/{repo}", config))
        except Exception as error:  # whatever HTTP, the disk, a parser or a configuration gives
            if known:
                raise CorpusError(f"the Hub's dataset {repo} cannot be loaded: {first_line(error)}") from error
            if isinstance(error, ValueError):  # it was downloaded before, under other configurations
                faults.append(" ".join(str(error).split()))
    what = f"corpus {source}: there is no file or folder of that name"
    if not reached:
        fault = f": {faults[0]}" if faults else ""
        raise CorpusError(f"{what}, the Hub cannot be reached, and it was not downloaded before{fault}{hint}")
    raise CorpusError(f"{what}, nor a dataset on the Hub that you can read (private ones need `hf auth login`){hint}")


def _hub_has(repo: str) -> bool | None:
    """Whether the Hub has a dataset; None where it cannot be reached.

    One request: load_dataset, left to itself offline, tries for half a minute.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(repo, timeout=10)
    except (RepositoryNotFoundError, HFValidationError):
        return False
    except Exception:  # the HTTP library's own errors, which change with its versions
        return None
    return True


@contextlib.contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    """While open, datasets looks only at what was downloaded before."""
    import datasets.config

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
