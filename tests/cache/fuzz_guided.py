"""The same, guided by coverage: `python -m tests.cache.fuzz_guided [-runs=N] [-max_total_time=SECONDS]`.

Needs atheris (`pip install -e '.[soak]'`). What atheris sees are the Python branches of the cache's own checks; pyarrow
is native code that it doesn't see into, but which each file that passes them runs through.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["softlabels.cache.arrow", "softlabels.cache.shards", "softlabels.cache.format"]
):
    from softlabels.cache.format import MANIFEST
    from softlabels.cache.reader import open_cache
    from softlabels.errors import CacheError

from tests.cache.fuzz import base, limit_memory, read_all, resize


def main() -> None:
    place = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    folder, corpus = Path(place.name) / "cache", Path(place.name) / "corpus"
    files = base(folder)
    names = sorted(name for name in files if name.endswith(".arrow") or name == MANIFEST)
    corpus.mkdir()
    for i, name in enumerate(names):  # the first byte says which file the rest is
        (corpus / str(i)).write_bytes(bytes([i]) + files[name])
    read_all(folder)
    limit_memory()

    def trial(data: bytes) -> None:
        if not data:
            return
        name, content = names[data[0] % len(names)], data[1:]
        try:
            (folder / name).write_bytes(content)
            if name == MANIFEST:
                open_cache(folder)
            else:
                (folder / MANIFEST).write_bytes(resize(files[MANIFEST], name, len(content)))
            read_all(folder)
        except CacheError:
            pass
        finally:
            for changed in (name, MANIFEST):
                (folder / changed).write_bytes(files[changed])

    atheris.Setup([sys.argv[0], *sys.argv[1:], "-max_len=8192", "-rss_limit_mb=0", str(corpus)], trial)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
