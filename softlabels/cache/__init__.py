"""The cache on disk: its format, how it is written and how it is read."""

from softlabels.cache.reader import Cache, open_cache

__all__ = ["Cache", "open_cache"]
