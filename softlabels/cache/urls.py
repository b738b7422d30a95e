"""Any URL that fsspec knows as a place of named files: a URL goes in, bytes go in and out, no secret is ever shown.

Nothing here knows a protocol by more than its name. Credentials come by the ways of fsspec and of the providers
(environment, ~/.aws, keys of ssh, `huggingface-cli login` …) or inside the URL; from there they reach the server alone.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from softlabels.cache.format import TEMPORARY
from softlabels.cache.web import read_web
from softlabels.errors import CacheError, ConfigError

# Here an object is there as a whole or not at all. Elsewhere it gets a temporary name first.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "hf", "abfs", "az", "abfss", "oci", "oss", "r2", "tos", "memory"}
_READ_ONLY = {"http", "https", "github", "data"}
_SECONDS = 60.0  # without a single byte more, before a transfer gives up
_LEAST_FAILURES, _FIRST_FAILURES = 6, 3  # one after the other: later, and before anything was ever answered
_LONGEST_WAIT = 8.0  # seconds between two tries

T = TypeVar("T")


def is_url(place: str | Path) -> bool:
    """Whether `place` names something that fsspec opens, and not a folder by its path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(place)) is not None


def redact(url: str) -> str:
    """`url` as it may be printed and stored: without what stands before an @, and without the values of its query."""
    scheme, name, rest = split_credentials(url)
    shown = "" if name is None else (f"{name}@" if scheme in ("sftp", "ssh") and ":" not in name else "***@")
    whole = re.split(r"[?#]", rest, maxsplit=1)
    return f"{scheme}://{shown}{whole[0]}" + ("?***" if len(whole) > 1 else "")


def split_credentials(url: str) -> tuple[str, str | None, str]:
    """The scheme of a URL, what stands before its @ (None where nothing does), and the rest.

    A password may hold what it should not: the keys of AWS have slashes. hf://…@ names a revision.
    """
    scheme, _, rest = url.partition("://")
    if scheme.lower() == "hf":
        return scheme, None, rest
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in host:
        name, _, host_after = host.rpartition("@")
        return scheme, name, host_after + rest[len(host) :]
    if re.search(r":(?!\d*$)", host) and not host.startswith("[") and "@" in rest:
        name, _, after = rest.rpartition("@")
        return scheme, name, after
    return scheme, None, rest


def hide(text: str, url: str) -> str:
    """`text`, such as an error's, without anything secret of `url`, and without what looks like a signature."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = re.sub(r"://[^/@\s'\"]+@", "://***@", text)
    return re.sub(r"(https?://[^\s'\"?]*)\?[^\s'\")]*", r"\1?***", text)


def _secrets(url: str) -> set[str]:
    scheme, before, _ = split_credentials(url)
    before = before or ""
    name, _, word = before.partition(":")
    parts = {before, name, word, *re.split(r"[:/?#]", word)}
    if scheme in ("sftp", "ssh"):
        parts.discard(name)
    try:
        query = urlsplit(url).query
    except ValueError:
        query = ""
    parts |= {query, *query.split("&"), *(value for _, value in parse_qsl(query))}
    parts |= {unquote(part) for part in parts}
    return {part for part in parts if len(part) > 3}


class Place:
    """A folder at a URL; `name`s are paths inside it. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        if not is_url(url):
            raise ConfigError(
                f"{url} is no URL: give one that fsspec knows, such as s3://bucket/name, sftp://host/folder or, for a "
                f"folder of this machine, file://{Path(url).absolute()}"
            )
        self.url, self.shown = url.rstrip("/"), redact(url.rstrip("/"))
        self.protocol = url.partition("://")[0].lower()
        self.ask = 0  # bytes to ask for at a time, as it went so far; 0 before anything came
        self.answered = False  # whether anything at all was ever heard from there
        self._query = ""
        if self.protocol in ("http", "https") and "?" in url:
            start, _, query = url.partition("?")
            self.url, self._query = start.rstrip("/"), f"?{query}"
        if self.protocol in _KEYS and split_credentials(url)[1] is not None:
            raise ConfigError(
                f"{self.shown}: {self.protocol} takes no credentials in its URL. Give {_KEYS[self.protocol]}"
            )
        self.given = url  # with what is secret of it
        try:
            urlsplit(url)
        except ValueError as error:
            raise ConfigError(f"{self.shown} is no URL: {self.hide(error)}") from None
        self._local = threading.local()
        try:
            self._shared, self._root = self._connect()
        except ConfigError:
            raise
        except Exception as error:  # some connect at once
            if _is_hopeless(error):
                raise self._refused(error) from None
            raise CacheError(f"{self.shown} can't be reached: {self.hide(error)}") from None

    def _connect(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        if self.protocol in ("gs", "gcs"):  # it logs what it can't reach, traceback and all; the error says it too
            logging.getLogger("gcsfs").addHandler(logging.NullHandler())
        try:
            options = {} if self.protocol in ("http", "https") else {"skip_instance_cache": True}
            fs, root = url_to_fs(self.url, **options)
        except ImportError as error:
            raise ConfigError(
                f"{self.protocol}:// needs a package that is not installed ({error}): pip install 'softlabels[share]'"
            ) from None
        except ValueError as error:
            if "rotocol" in str(error):
                raise ConfigError(f"{self.shown}: fsspec knows no protocol '{self.protocol}'") from None
            raise ConfigError(f"{self.shown}: {self.hide(error)}") from None
        return fs, str(root).rstrip("/")

    @property
    def _fs(self) -> Any:
        """What is asked from this thread: filesystems that are not asynchronous are not for two threads at a time."""
        if self._shared is not None and getattr(self._shared, "async_impl", False):
            return self._shared
        if getattr(self._local, "fs", None) is None:
            shared, self._shared = self._shared, None  # the first thread to come has the first connection
            self._local.fs = shared if shared is not None else self._connect()[0]
        return self._local.fs

    def path(self, name: str) -> str:
        """The path of a name, as its filesystem has it."""
        return (f"{self._root}/{name}" if name else self._root or "/") + self._query

    def hide(self, error: BaseException | str) -> str:
        """The words of an error from there, in one line, without anything secret."""
        words = str(error).strip() or type(error).__name__
        return hide(" ".join(words.split()), self.given)[:500]

    # ------------------------------------------------------------------------------------------------- one call

    def try_once(self, act: Callable[[Any], T], patience: Patience) -> T | Failed:
        """What `act` gives on the filesystem; `Failed` once it failed and it is time to try again.

        FileNotFoundError comes as it is; CacheError where trying again is hopeless, or was done for long enough.
        """
        try:
            found = act(self._fs)
        except (FileNotFoundError, _Stopped):
            self.answered = True
            raise
        except Exception as error:
            self._local.fs = None  # a connection that broke once is not used again
            if isinstance(error, ConfigError | CacheError):
                raise
            if _is_hopeless(error):
                raise self._refused(error) from None
            patience.wait(self, error)
            return Failed()
        self.answered = True
        return found

    def call(self, act: Callable[[Any], T]) -> T:
        """What `act` gives on the filesystem, tried until it works or there is no hope."""
        patience = Patience()
        while isinstance(found := self.try_once(act, patience), Failed):
            pass
        return found

    def _refused(self, error: Exception) -> CacheError:
        words = f"{self.shown}: {self.hide(error)}"
        if isinstance(error, PermissionError) or _status(error) in (401, 403) or "redential" in type(error).__name__:
            remedy = "Credentials come from where fsspec and the provider look for them, such as the environment"
            return CacheError(f"{words}. No permission there, or no credentials. {remedy}")
        return CacheError(words)

    # --------------------------------------------------------------------------------------------------- reading

    @property
    def is_asynchronous(self) -> bool:
        """Whether all threads share one connection, so that many of them may ask at a time."""
        return bool(getattr(self._shared, "async_impl", False))

    def read(self, name: str, *, limit: int) -> bytes:
        """The bytes of a small file; FileNotFoundError where it isn't there, CacheError beyond `limit` bytes."""
        data = self.call(lambda fs: self.cat(fs, name, 0, limit + 1, most=limit + 1))
        if len(data) > limit:
            raise CacheError(f"{self.shown}/{name} has more than the {limit:,} bytes that it may have")
        return data

    def cat(self, fs: Any, name: str, start: int, stop: int, *, most: int) -> bytes:
        """One try, with what `call` gives: bytes of a file from `start` up to `stop`, or to its end.

        They may be more, up to `most`, of a server that gives all that there is whatever it is asked for.
        """
        if self.protocol in ("http", "https"):
            return read_web(fs, self.path(name), start, stop, most=most)
        data: bytes = fs.cat_file(self.path(name), start=start, end=stop)
        return data if len(data) <= stop - start else data[start : start + most]

    def get_file(self, name: str, file: Path, *, size: int) -> None:
        """Bring a file of `size` bytes here, whole, where nothing says its hash; FileNotFoundError: it isn't there."""

        def get(fs: Any) -> None:
            fs.get_file(self.path(name), str(file))
            if (found := file.stat().st_size) != size:  # a connection that ended early without a word
                raise ConnectionError(f"{found} bytes of {name} came instead of {size}")

        self.call(get)

    def size(self, name: str) -> int:
        """Bytes of a file; FileNotFoundError where it isn't there."""

        def ask(fs: Any) -> int | None:
            fs.invalidate_cache()
            return fs.info(self.path(name))["size"]

        size = self.call(ask)
        if size is None:
            raise CacheError(f"{self.shown}: the server does not say how large {name} is")
        return int(size)

    def list(self, name: str) -> dict[str, int | None]:
        """What lies in a folder: names, with bytes of files and None of folders; nothing where it isn't there."""

        def ask(fs: Any) -> list[dict[str, Any]]:
            fs.invalidate_cache()
            return fs.ls(self.path(name), detail=True)

        try:
            found = self.call(ask)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        names = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in found}
        return {part: entry["size"] if entry["type"] == "file" else None for part, entry in names.items()}

    # --------------------------------------------------------------------------------------------------- writing

    def refuse_read_only(self) -> None:
        """ConfigError where nothing can be put."""
        if self.protocol in _READ_ONLY:
            raise ConfigError(
                f"{self.shown} can only be read: {self.protocol} has no way to put files. Give s3://, gs://, "
                f"hf://, sftp:// or a folder that the web server serves, or serve the cache's folder as it is: pull "
                f"reads that too"
            )

    def make_folder(self, name: str) -> None:
        """Make a folder where there are such; object stores have none."""
        if self.protocol not in _ATOMIC:
            self.call(lambda fs: fs.makedirs(self.path(name), exist_ok=True))

    def put_bytes(self, name: str, data: bytes) -> None:
        """Put a small file, whole or not at all, over what is there."""
        self._put(name, lambda fs, path: fs.pipe_file(path, data))

    def put_file(self, file: Path, name: str, *, tell: Callable[[int], None]) -> None:
        """Put a file, whole or not at all; `tell` gets the bytes of each piece, negative ones where it starts again."""
        size = file.stat().st_size

        def put(fs: Any, path: str) -> None:
            with _Told(tell) as told:
                fs.put_file(str(file), path, callback=told)
                told.fill(size)

        self._put(name, put)

    def remove(self, name: str) -> None:
        """Remove a file, where there is one."""
        with suppress(FileNotFoundError):
            self.call(lambda fs: fs.rm_file(self.path(name)))

    def _put(self, name: str, put: Callable[[Any, str], None]) -> None:
        try:
            self._put_whole(name, put)
        except FileNotFoundError as error:
            raise CacheError(
                f"{self.shown}: {name} can't be put there, for something is missing: {self.hide(error)}"
            ) from None

    def _put_whole(self, name: str, put: Callable[[Any, str], None]) -> None:
        if self.protocol in _ATOMIC:
            try:
                self.call(lambda fs: put(fs, self.path(name)))
            except FileNotFoundError as error:  # there are no folders to lack: the bucket or repository is not there
                raise CacheError(f"{self.shown}: {self.hide(error)}. Make it first, or push to another URL") from None
            return
        folder, _, file = name.rpartition("/")
        mark = f"{threading.get_ident():x}{time.monotonic_ns():x}"
        draft = self.path(f"{folder}/{TEMPORARY}{mark}-{file}" if folder else f"{TEMPORARY}{mark}-{file}")

        def act(fs: Any) -> None:
            try:
                put(fs, draft)
                fs.mv(draft, self.path(name))
            except Exception:
                with suppress(Exception):  # on a full disk it would be in the way
                    fs.rm_file(draft)
                raise

        self.call(act)


_KEYS = {
    "s3": "them in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile in AWS_PROFILE",
    "gs": "them in GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "them in GOOGLE_APPLICATION_CREDENTIALS",
}


class Failed:
    """One try that failed; there may be another."""


class Patience:
    """How often something is tried again: for long, as long as there is a step forward now and then."""

    def __init__(self) -> None:
        self.failures, self.since = 0, 0.0

    def progressed(self) -> None:
        """There was a step forward."""
        self.failures = 0

    def wait(self, place: Place, error: Exception) -> None:
        """Wait a little before the next try; CacheError where there should be none."""
        if not self.failures:
            self.since = time.monotonic()
        self.failures += 1
        waited = time.monotonic() - self.since
        if self.failures >= _FIRST_FAILURES and not place.answered and _is_unreachable(error):
            raise CacheError(f"{place.shown} can't be reached: {place.hide(error)}") from None
        if self.failures >= _LEAST_FAILURES and waited >= _SECONDS:
            raise CacheError(
                f"{place.shown}: {place.hide(error)}. Tried {self.failures} times in {waited:.0f} s without a step "
                f"forward. What arrived is kept: give the same command again"
            ) from None
        time.sleep(min(_LONGEST_WAIT, 0.05 * 2 ** min(self.failures, 10)))


class _Stopped(Exception):
    """Raised by `tell` where a transfer is not wanted any more."""


class _Told:
    """A callback of fsspec for one file. A file that starts again takes back what was told of it."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell, self.done = tell, 0

    def __enter__(self) -> Any:
        from fsspec.callbacks import Callback

        outer = self

        class Told(Callback):
            def relative_update(self, inc: int = 1) -> None:
                outer._add(inc)

            def absolute_update(self, value: int) -> None:
                outer._add(value - outer.done)

            def fill(self, size: int) -> None:
                """The filesystem may have told nothing."""
                outer._add(size - outer.done)

        return Told()

    def _add(self, count: int) -> None:
        self.done += count
        self.tell(count)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and self.done:
            self.tell(-self.done)


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


_HOPELESS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ParamValidationError",
    "ProfileNotFound",
    "InvalidURL",
    "AuthenticationException",
    "BadHostKeyException",
    "GatedRepoError",
    "RepositoryNotFoundError",
}
_UNREACHABLE = {"ClientConnectorError", "ClientConnectorDNSError", "EndpointConnectionError", "NoValidConnectionsError"}


def _is_hopeless(error: BaseException) -> bool:
    """Whether the same call would fail again."""
    kinds = (PermissionError, NotADirectoryError, IsADirectoryError, TypeError, NotImplementedError, ImportError)
    status = _status(error)
    refused = status is not None and 400 <= status < 500 and status not in (408, 425, 429)
    named = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, kinds) or refused or bool(named & _HOPELESS)


def _is_unreachable(error: BaseException) -> bool:
    from socket import gaierror

    named = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionRefusedError | gaierror) or bool(named & _UNREACHABLE)
