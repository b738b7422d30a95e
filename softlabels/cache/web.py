"""A piece of a file on a web server comes in, and no more of it: servers send what they like, for as long as they like.

fsspec reads an answer whole, however long it is and whatever it unpacks to; here it is read as far as it is wanted.
"""

from __future__ import annotations

from typing import Any

_UNASKED = 1 << 28  # bytes taken at a time from a server that knows no ranges, and would give all there is
_PIECE = 1 << 18


def read_web(fs: Any, url: str, start: int, stop: int, *, most: int) -> bytes:
    """Bytes of a file from `start` up to `stop`; of a server that knows no ranges up to `most`, since they come anyway.

    `fs` is fsspec's HTTPFileSystem. Fewer bytes are all that there are. FileNotFoundError, and aiohttp's errors.
    """
    from fsspec.asyn import sync

    found: bytes = sync(fs.loop, _read, fs, url, start, stop, most)
    return found


async def _read(fs: Any, url: str, start: int, stop: int, most: int) -> bytes:
    options = dict(fs.kwargs)
    headers = dict(options.pop("headers", {})) | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), headers=headers, **options) as answer:
        fs._raise_not_found_for_status(answer, url)
        skip, wanted = 0, stop - start
        if answer.status != 206:
            skip, wanted = start, max(wanted, min(most, _UNASKED))
        found = bytearray()
        async for piece in answer.content.iter_chunked(_PIECE):
            found += piece[skip:]
            skip = max(skip - len(piece), 0)
            if len(found) >= wanted:
                break
    return bytes(found[:wanted])
