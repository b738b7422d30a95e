"""The errors a user can cause or meet. Each message says what, where, and what to do instead.

The command line prints the message and exits with code 2; it never shows a traceback without `--debug`.
"""


class SoftlabelsError(Exception):
    """Base of every error whose message is meant for the user."""


class ConfigError(SoftlabelsError):
    """A recipe, an option or a combination of options that cannot work."""


class CorpusError(SoftlabelsError):
    """A corpus that is missing, unreadable, or whose rows do not fit."""


class TeacherError(SoftlabelsError):
    """A teacher that cannot be loaded, trusted or run."""


class CacheError(SoftlabelsError):
    """A cache that is missing, unfinished, damaged, in use, or lacks a field."""


class StudentError(SoftlabelsError):
    """A student or a run folder that cannot be built, loaded, or does not fit the cache."""
