"""The cache format, version 1. This docstring is the specification; the rest of the file is its data model.

A cache is a folder:

    manifest.json            what the cache holds (`Manifest` below), UTF-8 JSON; its existence makes a folder a cache
    tokenizer/               the teacher's tokenizer, as transformers saves it
    teacher/config.json      the teacher's configuration, where it is known; never its weights
    examples/00000.arrow     one folder a field, one file a shard, numbered from 0 with at least five digits
    examples/00000.json      the shard's receipt (`Receipt` below), renamed into place after the shard
    logits/00000.arrow …     the other fields, shard by shard the same rows in the same order

**Shards.** Shard s holds rows s·shard_rows to (s+1)·shard_rows of the corpus, the last one fewer, in the corpus's
order. A receipt says that a shard is whole; a reader of a finished cache needs only the manifest, which repeats it.

**Arrow files** are Arrow IPC *files*, uncompressed, so that a reader maps them and touches only what it reads. No
column and no list element has nulls, and is declared so; list elements are called `item`. The file's schema metadata
has the key `softlabels`: JSON with `field`, `shard` and `version`, keys sorted. A list column holds fewer than 2³¹
values a record batch; a shard with more has several record batches. All numbers are little-endian.

**`examples`** columns: `id` string, unique in the cache; `token_hash` uint64, xxh3-64 over the int32 little-endian
token ids and then the uint8 token types; `input_ids` list<uint16>, or list<int32> where the vocabulary is larger than
65,536; `token_type_ids` list<uint8>, only where the tokenizer gives them; `label` int32, -100 for none; `text` and
`text_b` string, only where the cache keeps texts (`text_b` is empty for single texts).

**Other fields** have a column named like the field, of one of three kinds (`kind` in the manifest):
    row    fixed_size_list<T>[width]      `logits`: width = number of classes; `hidden.06@cls`: the first token's state
    token  list<T>, L·width values        a value vector a token: `hidden.06`; `query.06`, `key.06`, `value.06` with
                                          width = heads·head width, heads outermost
    pair   list<T>, width·L·L values      `attention.06`: a map a head, query rows, key columns; width = heads
L is the length of the row's `input_ids`: nothing is padded. Layer 0 is the embedding output, layer i the output of
layer i. `type` in the manifest says what T is and what a stored value means:
    float32   T = float32
    float16   T = float16; never in one file with other columns, since some readers refuse such files whole
    bfloat16  T = uint16, the upper half of the bits of a float32
    int8      T = int8, q from -127 to 127, of kind row or token. A second column, `scale`, has one number a vector:
              float32 for kind row, list<float32> with L values for kind token. The JSON under `softlabels` has one
              more key, `channels`: base64 of `width` float32 numbers, all finite and above 0, the same for the
              whole shard. Value c of a vector is (q · scale) · channels[c], in float32.
`logits` are never int8. Where a type was too narrow for values and the user had these clipped, `clipped` in the
receipt counts them, and the manifest's shard table has their sum.

**Joining.** A row of any field stands for its (id, token_hash). `join` of a shard is the xxh3-128 over, for each row,
the id in UTF-8, a zero byte, and the token hash as 8 little-endian bytes; a field's shard belongs to an examples shard
only if their receipts have the same `join`.

**Integrity.** Every receipt has the file's size and xxh3-128. Hashes are lower-case hex. The manifest's shard tables
join all shards' values in one string, so that a table of 100,000 shards is read at once: `sizes` 12 hex characters a
shard (big end first), `xxh3_128` and `join` 32.

**Writing.** A file is written under a name that begins with `.tmp-`, synced, renamed; then its receipt likewise. The
manifest is written once at the start with `complete` false, and last with the shard tables and `complete` true. JSON
files have a line for each key of the outermost object, keys sorted at every depth. Nothing in a cache depends on the
time or the machine's clock: the same dump twice gives the same bytes.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from softlabels.errors import CacheError

FORMAT: Literal["softlabels-cache"] = "softlabels-cache"
VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
EXAMPLES = "examples"
TEMPORARY = ".tmp-"  # prefix of every file that is not whole yet
LIST_LIMIT = 2**31 - 1  # values in a list column of one record batch: its offsets are int32

FIELD_NAME = re.compile(r"[a-z][a-z_]{0,30}(\.[0-9]{2,4})?(@[a-z]{1,10})?")
_SIZE = 12  # hex characters of a file's size in a shard table
Hex128 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


def is_hex(text: str) -> bool:
    """Whether `text` is an even number of lower-case hex digits; at 1 GB/s, for the tables are long."""
    try:
        return binascii.unhexlify(text).hex() == text
    except ValueError:
        return False


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Receipt(_Part):
    """Says that one shard of one field is whole."""

    rows: int = Field(ge=1)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=1, lt=2**48)
    xxh3_128: Hex128
    join: Hex128
    truncated: int = Field(default=0, ge=0)  # of `examples`: rows that were cut to max_length
    clipped: int = Field(default=0, ge=0)  # of other fields: values beyond the type, stored as its largest


class FieldSpec(_Part):
    """What one field holds; see the format for the kinds."""

    kind: Literal["row", "token", "pair"]
    type: Literal["float32", "float16", "bfloat16", "int8"]
    width: int = Field(ge=1, le=2**31 - 1)
    heads: int | None = Field(default=None, ge=1)  # of query, key, value and attention

    @model_validator(mode="after")
    def _vectors(self) -> FieldSpec:
        if self.type == "int8" and self.kind == "pair":
            raise ValueError("int8 has a scale a vector, and a pair field has no vectors: store it as float16")
        return self

    def values(self, tokens: int) -> int:
        """How many values a row of `tokens` tokens has."""
        return self.width * {"row": 1, "token": tokens, "pair": tokens * tokens}[self.kind]


class ShardTable(_Part):
    """Size and checksum of every shard of a field, each joined in one string: 12 and 32 hex characters a shard."""

    sizes: str
    xxh3_128: str
    clipped: int = Field(default=0, ge=0)  # values of the whole field

    @model_validator(mode="after")
    def _fits(self) -> ShardTable:
        count, rest = divmod(len(self.sizes), _SIZE)
        if rest or len(self.xxh3_128) != 32 * count or not (is_hex(self.sizes) and is_hex(self.xxh3_128)):
            raise ValueError("a shard table needs 12 hex characters of size and 32 hex characters of hash a shard")
        return self

    @classmethod
    def of(cls, receipts: Sequence[Receipt]) -> ShardTable:
        """The table of a field from its shards' receipts, in order."""
        return cls(
            sizes="".join(f"{receipt.bytes:0{_SIZE}x}" for receipt in receipts),
            xxh3_128="".join(receipt.xxh3_128 for receipt in receipts),
            clipped=sum(receipt.clipped for receipt in receipts),
        )

    def __len__(self) -> int:
        return len(self.sizes) // _SIZE

    def size(self, shard: int) -> int:
        """Bytes of a shard's file."""
        return int(self.sizes[_SIZE * shard : _SIZE * (shard + 1)], 16)

    @property
    def total(self) -> int:
        """Bytes of all shards' files."""
        return sum(self.size(shard) for shard in range(len(self)))

    def hash(self, shard: int) -> str:
        return self.xxh3_128[32 * shard : 32 * shard + 32]


class TeacherCard(_Part):
    """Which teacher spoke."""

    name: str
    weights_hash: str
    task: Literal["sequence-classification"]
    label_names: list[str] = Field(min_length=2)
    vocab_size: int = Field(ge=1)  # of the tokenizer
    pad_token_id: int = Field(ge=0)
    unk_token_id: int | None
    token_types: bool


class CorpusCard(_Part):
    """What the teacher read. `hash` covers ids, texts and labels."""

    source: str
    split: str | None
    hash: str
    rows: int = Field(ge=1)
    labelled: int = Field(ge=0)
    truncated: int = Field(default=0, ge=0)  # rows cut to max_length; counted when the dump is complete


class DumpCard(_Part):
    """The options that decide the bytes."""

    max_length: int = Field(ge=1)
    shard_rows: int = Field(ge=1)
    batch_tokens: int = Field(ge=1)
    dtype: str
    text: bool


class Manifest(_Part):
    """manifest.json."""

    format: Literal["softlabels-cache"]
    version: Literal[1]
    complete: bool
    teacher: TeacherCard
    tokenizer_hash: str
    corpus: CorpusCard
    dump: DumpCard
    fields: dict[str, FieldSpec]
    shard_rows: list[Annotated[int, Field(ge=1)]]  # rows of each shard; empty while unfinished
    shard_tokens: list[Annotated[int, Field(ge=0)]]
    join: str  # 32 hex characters a shard
    shards: dict[str, ShardTable]  # a table a field, `examples` included
    versions: dict[str, str]  # of the packages that wrote it

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        for name in self.fields:
            if not FIELD_NAME.fullmatch(name) or name == EXAMPLES:
                raise ValueError(f"'{name}' is no field name")
        if "logits" in self.fields and self.fields["logits"].type == "int8":
            raise ValueError("logits are never int8")
        if not self.complete:
            return self
        count = len(self.shard_rows)
        if sum(self.shard_rows) != self.corpus.rows or len(self.shard_tokens) != count:
            raise ValueError("the shards' rows do not add up to the corpus's")
        if len(self.join) != 32 * count or not is_hex(self.join):
            raise ValueError("`join` needs 32 hex characters a shard")
        if any(rows != self.dump.shard_rows for rows in self.shard_rows[:-1]):
            raise ValueError("every shard but the last must hold dump.shard_rows rows")
        if set(self.shards) != {EXAMPLES, *self.fields}:
            raise ValueError("`shards` must have a table for `examples` and for each field, and no other")
        if any(len(table) != count for table in self.shards.values()):
            raise ValueError("a shard table is not as long as the list of shards")
        return self


def identity(manifest: Manifest) -> dict[str, Any]:
    """What must be equal for two dumps to share a folder, as flat `key: value`."""
    return {
        "teacher.weights_hash": manifest.teacher.weights_hash,
        "teacher.label_names": manifest.teacher.label_names,
        "tokenizer_hash": manifest.tokenizer_hash,
        "corpus.hash": manifest.corpus.hash,
        "corpus.rows": manifest.corpus.rows,
        **{f"dump.{key}": value for key, value in manifest.dump.model_dump().items()},
    }


def shard_file(folder: Path, field: str, shard: int) -> Path:
    return folder / field / f"{shard:05d}.arrow"


def receipt_file(folder: Path, field: str, shard: int) -> Path:
    return folder / field / f"{shard:05d}.json"


def to_json(model: BaseModel) -> bytes:
    """The bytes of a manifest or receipt: sorted keys, so that the same content is the same file."""
    lines = [
        f" {json.dumps(key)}: {json.dumps(value, sort_keys=True, ensure_ascii=False)}"
        for key, value in sorted(model.model_dump().items())
    ]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of `folder`; CacheError where there is none or it is damaged."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CacheError(f"no cache at {folder}: no such folder. Make one with `softlabels dump … --out {folder}`")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CacheError(f"{folder} is not a cache: it has no {MANIFEST}") from None
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CacheError(f"{path} is damaged or of another version: {place}: {first['msg']}") from None


def read_receipt(folder: Path, field: str, shard: int) -> Receipt | None:
    """The receipt of a shard, or None where there is none that can be read: then the shard counts as missing."""
    try:
        return Receipt.model_validate_json(receipt_file(folder, field, shard).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
