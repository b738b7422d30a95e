"""The cache on disk: its format, how it is written and how it is read.

The reader is imported when it is first used: a manifest can be read (`softlabels info`) without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softlabels.cache.reader import Cache as Cache
    from softlabels.cache.reader import open_cache as open_cache

__all__ = ["Cache", "open_cache"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'softlabels.cache' has no attribute '{name}'")
    from softlabels.cache import reader

    return getattr(reader, name)
