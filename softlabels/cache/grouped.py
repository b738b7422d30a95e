"""Whole shards that are written together: bytes come in, files with receipts go out.

For shards whose bytes are known: a dump, which doesn't know them before its teacher has spoken, has
`softlabels.cache.writer.FieldShard`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import pyarrow as pa
import xxhash

from softlabels.cache.files import FileGroup
from softlabels.cache.format import Receipt, receipt_file, shard_file, to_json


class ShardGroup:
    """Shards of a cache at `folder` that are committed at the end of a `with` block, first the files, then receipts.

    Where the block fails none of them has a receipt: they are made anew, as any shard without one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = FileGroup()
        self._receipts: dict[Path, Receipt] = {}

    def put(
        self,
        field: str,
        shard: int,
        data: pa.Buffer,
        *,
        rows: int,
        tokens: int,
        join: str,
        truncated: int = 0,
        checksum: str | None = None,
    ) -> Receipt:
        """Write the bytes of a shard, of `rows` rows with so many `tokens`; `join` ties it to its examples.

        `checksum` is their xxh3-128, where it is known.
        """
        path = receipt_file(self.folder, field, shard)
        path.unlink(missing_ok=True)  # says nothing about the file that comes
        view = memoryview(data)
        self._files.write(shard_file(self.folder, field, shard), view)
        self._receipts[path] = Receipt(
            rows=rows,
            tokens=tokens,
            bytes=len(view),
            xxh3_128=checksum or xxhash.xxh3_128(view).hexdigest(),
            join=join,
            truncated=truncated,
        )
        return self._receipts[path]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._files.__exit__(kind, *rest)
        if kind is None:
            with FileGroup() as group:
                for path, receipt in self._receipts.items():
                    group.write(path, to_json(receipt))
