"""The cache format, version 1. This docstring is the specification; the rest of the file is its data model.

A cache is a folder:

    manifest.json            what the cache holds (`Manifest` below), UTF-8 JSON; its existence makes a folder a cache
    receipt.json             the hashes of manifest.json and of every file of the three folders below (`FolderReceipt`)
    tokenizer/               the teacher's tokenizer, as transformers saves it; or of a teacher of images instead
    processor/               its image processor, saved likewise: preprocessor_config.json
    teacher/config.json      the teacher's configuration, where it is known; never its weights, but for
    teacher/head.safetensors the output head, where `vocab_states` are kept: `weight` (V, D), `bias` (V), `softcap` (1)
    teacher/factors.safetensors  where the form of `vocab_…` has `factors=N`: `mean` (V) float32, `loadings` (V, R)
                             float16, R ≤ N, `noise` (V) float32: a teacher's logits, see softlabels/factors.py
    examples/00000.arrow     one folder a field, one file a shard, numbered from 0 with at least five digits
    examples/00000.json      the shard's receipt (`Receipt` below), renamed into place after the shard
    logits/00000.arrow …     the other fields, shard by shard the same rows in the same order

**Shards.** Shard s holds rows s·shard_rows to (s+1)·shard_rows of the corpus, the last one fewer, in the corpus's
order. A receipt says that a shard is whole; a reader of a finished cache needs only the manifest, which repeats it.

**Arrow files** are Arrow IPC *files*, uncompressed, so that a reader maps them and touches only what it reads. No
column and no list element has nulls, and is declared so; list elements are called `item`. The file's schema metadata
has the key `softlabels`: JSON with `field`, `shard` and `version`, keys sorted; fields have no metadata of their own. A
list column holds fewer than 2³¹ values a record batch; a shard with more has several record batches, none of them
empty, one after the other. All numbers are little-endian.

**`examples`** columns: `id` string, unique in the cache; `token_hash` uint64, xxh3-64 over the int32 little-endian
token ids and then the uint8 token types, and then of seq2seq-lm an int32 -1 and the int32 `labels`; `input_ids`
list<uint16>, or list<int32> where the vocabulary is larger than 65,536; `token_type_ids` list<uint8>, only where the
tokenizer gives them; `label` int32, -100 for none; `labels`, only where the teacher's task has more than one class a
row (below); `decoder_start` int32, only of seq2seq-lm; `text` and `text_b` string, only where the cache keeps texts
(`text_b` is empty for single texts), and of seq2seq-lm `target` too.

**Labels.** `teacher.task` in the manifest says what the teacher was made for, and what `labels` holds:
    sequence-classification, sentence-embedding,
    image-classification                             no `labels`; `label` is the class
    multi-label-classification, regression           fixed_size_list<float32>[number of label_names]: 0 or 1 for each
                                                     class, or the targets; all NaN in a row without
    token-classification                             list<int32>, a class a token; -100 where there is none, such as
                                                     special tokens and all but the first piece of a word
    masked-lm                                        list<int32>, the id that was there where a token was masked, else
                                                     -100, or where the manifest's `dump.masking.targets` is "all" -101,
                                                     of special tokens too; `input_ids` are the masked ones
    causal-lm                                        list<int32>, the id of the next token; -100 at the last one. What a
                                                     field says of a token is the prediction of its label: the shift is
                                                     done, once, here
    seq2seq-lm                                       list<int32>, the ids of the target text, none of them -100, at
                                                     least one; as many as that has, not as `input_ids`. The decoder
                                                     read `decoder_start` and then the labels but the last, so what a
                                                     field says of a target is again the prediction of its label
In all but the first lines `label` is -100. A token whose label isn't -100 is a **target**.

**Images.** A row of image-classification stands for an image file, of which the cache holds neither pixels nor path.
`input_ids` are zeros, as many as the teacher's sequence is long: of a ViT the patches and what stands before them; 1 of
a model that has no one sequence, such as a convolutional one. `token_hash` is the xxh3-64 over the pixels as the image
processor gives them, float32, channels, rows, columns. In the manifest `teacher.vocab_size` is 1, `pad_token_id` 0,
`unk_token_id` null, `token_types` false, `dump.text` false, and `tokenizer_hash` the xxh3-128 over the processor's
settings as JSON with sorted keys, without spaces.

**Other fields** have a column named like the field, of one of four kinds (`kind` in the manifest):
    row    fixed_size_list<T>[width]      `logits`: width = number of classes; `hidden.06@cls` and `@mean`: the first
                                          token's state, and the mean over all; `pooled`
    token  list<T>, L·width values        a value vector a token: `hidden.06`; `query.06`, `key.06`, `value.06` with
                                          width = heads·head width, heads outermost
    pair   list<T>, width·L·L values      `attention.06`: a map a head, query rows, key columns; width = heads.
                                          `attention.06@scores`: before the softmax, -65504 where a key is masked
    target list<T>, width values a target a vector for each target of the row, in their order (below)
L is the length of the row's `input_ids`: nothing is padded. Layer 0 is the embedding output, layer i the output of
layer i; of an encoder-decoder model they are the encoder's. `type` in the manifest says what T is and what a stored
value means:
    float32   T = float32
    float16   T = float16; never in one file with other columns, since some readers refuse such files whole
    bfloat16  T = uint16, the upper half of the bits of a float32
    int8      T = int8, q from -127 to 127, of kind row or token. A second column, `scale`, has one number a vector:
              float32 for kind row, list<float32> with L values for kind token. The JSON under `softlabels` has one
              more key, `channels`: base64 of `width` float32 numbers, all finite and above 0, the same for the
              whole shard. Value c of a vector is (q · scale) · channels[c], in float32.
    uint8, uint16, int32   T is the same: whole numbers as they are, of kind target

**Vocabulary-sized logits** are target fields, with `form` in the manifest as the capture was asked for. `exact`:
`vocab_states`, by which logits = states · weightᵀ + bias, or c · tanh of that / c where there is a softcap c. `topk=…`:
`vocab_ids`, `vocab_values`, `vocab_level`, `vocab_tail`, `vocab_sampled_ids`, `vocab_sampled_values`, the last two only
with samples; `packed`: `vocab_packed`, with 10 bits a value. They are laid out as the docstrings of vocab_tail.py,
vocab_plain.py and vocab_packed.py, beside this file, say.

`logits` are never int8. Where a type was too narrow for values and the user had these clipped, `clipped` in the
receipt counts them, and the manifest's shard table has their sum.

**Made of others.** A cache that `softlabels combine` made says in the manifest's `combined` of which caches, in their
order, and how; an entry that other caches lack, so that their bytes stay as they were. Examples, tokenizer/ and
teacher/config.json are the first one's. Of several teachers `teacher.weights_hash` begins with `combined-`, for no one
has these weights; `logits` are the mean, median or choice of theirs, their classes in the order of `label_names`;
`logits.01`, `logits.02` … are, where they were kept, what each said, likewise ordered. Of one teacher's rows put
together (`how` is `rows`) everything else is as one dump would have it, but for `corpus.hash`, the xxh3-128 over the
hashes of the parts.

**Joining.** A row of any field stands for its (id, token_hash). `join` of a shard is the xxh3-128 over, for each row,
the id in UTF-8, a zero byte, and the token hash as 8 little-endian bytes; a field's shard belongs to an examples shard
only if their receipts have the same `join`.

**Integrity.** Every receipt has the file's size and xxh3-128. Hashes are lower-case hex. The manifest's shard tables
join all shards' values in one string, so that a table of 100,000 shards is read at once: `sizes` 12 hex characters a
shard (big end first), `xxh3_128` and `join` 32. A reader needs no receipt, and a copy of some fields may lack them;
where one is there, it is right. All files are regular ones: readers follow no link inside the folder.

**Beside it.** `card.json` (licences, see licence.py), `README.md` (made from it and the manifest), `SHA256SUMS` and
`SHA256SUMS.sig` (see signing.py) may lie in the folder; no reader needs them. `.tmp-parts` does while `dump --part` is
at work (see parts.py).

**Writing.** A file is written under a name that begins with `.tmp-`, synced, renamed; then its receipt likewise. The
manifest is written once at the start with `complete` false, and at the end with the shard tables and `complete` true;
receipt.json, removed before that, comes last. JSON files have a line for each key of the outermost object, keys sorted
at every depth. Nothing in a cache depends on the time or the machine's clock: the same dump twice gives the same bytes.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from softlabels.cache.inside import read_at, read_inside
from softlabels.errors import CacheError
from softlabels.types import IMAGES, LANGUAGE_MODELS, TOKEN_LABELS, Task

FORMAT: Literal["softlabels-cache"] = "softlabels-cache"
VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
EXAMPLES = "examples"
TEMPORARY = ".tmp-"  # prefix of every file that is not whole yet
WHOLE = ("uint8", "uint16", "int32")  # types whose values are whole numbers, stored as they are
LIST_LIMIT = 2**31 - 1  # values in a list column of one record batch: its offsets are int32

FIELD_NAME = re.compile(r"[a-z][a-z_]{0,30}(\.[0-9]{2,4})?(@[a-z]{1,10})?")
RECEIPT = "receipt.json"
# what a manifest says while shards are still to come
UNFINISHED = {"complete": False, "shard_rows": [], "shard_tokens": [], "join": "", "shards": {}}
# What a reader takes from strangers: a manifest of 100,000 shards and 20 fields has 100 MB and 200,000 values.
MANIFEST_LIMIT, RECEIPT_LIMIT, SETTINGS_LIMIT = 1 << 28, 1 << 16, 1 << 24  # bytes
_MOST_VALUES = 2_000_000  # in one JSON file
_SIZE = 12  # hex characters of a file's size in a shard table
Hex128 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=2**48)]
Positive = Annotated[int, Field(ge=1, lt=2**48)]
TokenId = Annotated[int, Field(ge=0, lt=2**24)]


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

    rows: Positive
    tokens: Count
    bytes: Positive
    xxh3_128: Hex128
    join: Hex128
    truncated: Count = 0  # of `examples`: rows that were cut to max_length
    clipped: Count = 0  # of other fields: values beyond the type, stored as its largest


class FolderReceipt(_Part):
    """receipt.json: path inside the cache → xxh3-128, of all files that have no receipt of their own, but this one."""

    files: dict[str, Hex128]


class FieldSpec(_Part):
    """What one field holds; see the format for the kinds."""

    kind: Literal["row", "token", "pair", "target"]
    type: Literal["float32", "float16", "bfloat16", "int8", "uint8", "uint16", "int32"]
    width: int = Field(ge=1, le=2**31 - 1)
    heads: int | None = Field(default=None, ge=1)  # of query, key, value and attention
    form: str | None = Field(default=None, max_length=100)  # of vocabulary fields, and in the file only there

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if key != "form" or value is not None}

    @model_validator(mode="after")
    def _vectors(self) -> FieldSpec:
        if self.type == "int8" and self.kind not in ("row", "token"):
            raise ValueError(f"int8 is for row and token fields, not for a {self.kind} field: store it as float16")
        if self.type in WHOLE and self.kind != "target":
            raise ValueError(f"{self.type} is for target fields")
        if self.heads is not None and self.width % self.heads:
            raise ValueError(f"a width of {self.width} can't be split into {self.heads} heads")
        return self

    def values(self, tokens: np.ndarray, targets: np.ndarray | None = None) -> np.ndarray:
        """(rows,) int64: how many values rows of so many `tokens` and `targets` have."""
        tokens = tokens.astype(np.int64)
        if self.kind == "row":
            return np.full(len(tokens), self.width, np.int64)
        if self.kind == "target":
            if targets is None:
                raise ValueError("a target field needs the number of targets of every row")
            return self.width * targets.astype(np.int64)
        return self.width * (tokens if self.kind == "token" else tokens * tokens)


class ShardTable(_Part):
    """Size and checksum of every shard of a field, each joined in one string: 12 and 32 hex characters a shard."""

    sizes: str
    xxh3_128: str
    clipped: Count = 0  # values of the whole field

    @model_validator(mode="after")
    def _fits(self) -> ShardTable:
        count, rest = divmod(len(self.sizes), _SIZE)
        if rest or len(self.xxh3_128) != 32 * count or not (is_hex(self.sizes) and is_hex(self.xxh3_128)):
            raise ValueError("a shard table needs 12 hex characters of size and 32 hex characters of hash a shard")
        if not self.all_sizes().all():
            raise ValueError("a shard has no bytes")
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
        return sum(self.all_sizes().tolist())  # of a stranger's manifest more than 64 bits

    def all_sizes(self) -> np.ndarray:
        """(shards,) int64: bytes of every shard's file."""
        digits = np.frombuffer(bytes.fromhex(self.sizes), np.uint8).reshape(-1, _SIZE // 2)  # big end first
        return digits.astype(np.int64) @ (256 ** np.arange(_SIZE // 2 - 1, -1, -1, dtype=np.int64))

    def hash(self, shard: int) -> str:
        return self.xxh3_128[32 * shard : 32 * shard + 32]


class TeacherCard(_Part):
    """Which teacher spoke."""

    name: str
    weights_hash: str
    task: Task
    label_names: list[str]  # of classes or targets, in the order of the logits; none of language and embedding models
    vocab_size: int = Field(ge=1, le=2**24)  # of the tokenizer
    pad_token_id: TokenId
    unk_token_id: TokenId | None
    token_types: bool

    @model_validator(mode="after")
    def _named(self) -> TeacherCard:
        least = 2 if self.task in ("sequence-classification", "token-classification", IMAGES) else 1
        if self.task in (*LANGUAGE_MODELS, "sentence-embedding"):
            if self.label_names:
                raise ValueError(f"a teacher for {self.task} has no label_names")
        elif len(self.label_names) < least:
            raise ValueError(f"a teacher for {self.task} has at least {least} label_names")
        return self


class CorpusCard(_Part):
    """What the teacher read. `hash` covers ids, texts and labels."""

    source: str
    split: str | None
    hash: str
    rows: Positive
    labelled: Count
    truncated: Count = 0  # rows cut to max_length; counted when the dump is complete


class MaskingCard(_Part):
    """How tokens were hidden from a masked language model."""

    rate: float = Field(gt=0, lt=1)
    times: Positive
    seed: Count
    smoothing: float = Field(default=0.0, ge=0, le=1)  # this and what follows in the file only where it is another
    targets: Literal["masked", "all"] = "masked"

    @model_serializer(mode="wrap")
    def _without_usual(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value != MaskingCard.model_fields[key].default}


class DumpCard(_Part):
    """The options that decide the bytes."""

    max_length: Positive
    shard_rows: Positive
    batch_tokens: Positive
    dtype: str
    text: bool
    masking: MaskingCard | None = None  # of a masked language model, and in the file only there

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if key != "masking" or value is not None}


class CombinedPart(_Part):
    """One of the caches that another was made of."""

    teacher: str
    weights_hash: str
    tokenizer_hash: str
    label_names: list[str]  # in its own order
    identity: str  # see `Cache.identity`
    rows: Positive  # that it has
    weight: float | None = Field(ge=0, le=1)  # all together 1; None where nothing is averaged


class CombinedCard(_Part):
    """What a cache was made of, and by which rule; see `softlabels.cache.mixing`."""

    how: Literal["logits", "probabilities", "median", "rows"]
    choose: Literal["label", "entropy"] | None
    caches: Annotated[list[CombinedPart], Field(min_length=2, max_length=9999)]


class Manifest(_Part):
    """manifest.json."""

    format: Literal["softlabels-cache"]
    version: Literal[1]
    complete: bool
    teacher: TeacherCard
    tokenizer_hash: str  # of a teacher of images: of its image processor
    corpus: CorpusCard
    dump: DumpCard
    fields: dict[str, FieldSpec]
    shard_rows: Annotated[list[Positive], FailFast()]  # rows of each shard; empty while unfinished
    shard_tokens: Annotated[list[Count], FailFast()]
    join: str  # 32 hex characters a shard
    shards: dict[str, ShardTable]  # a table a field, `examples` included
    versions: dict[str, str]  # of the packages that wrote it
    combined: CombinedCard | None = None  # of a cache made of others, and in the file only there

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if key != "combined" or value is not None}

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        for name in self.fields:
            if not FIELD_NAME.fullmatch(name) or name == EXAMPLES:
                raise ValueError(f"'{name}' is no field name")
        targets = [name for name, spec in self.fields.items() if spec.kind == "target"]
        if targets and self.teacher.task not in TOKEN_LABELS:
            raise ValueError(f"'{targets[0]}' is of kind target, and {self.teacher.task} has no targets")
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
    made_of = manifest.combined.model_dump() if manifest.combined is not None else {}
    return {
        "teacher.weights_hash": manifest.teacher.weights_hash,
        "teacher.task": manifest.teacher.task,
        "teacher.label_names": manifest.teacher.label_names,
        "tokenizer_hash": manifest.tokenizer_hash,
        "corpus.hash": manifest.corpus.hash,
        "corpus.rows": manifest.corpus.rows,
        **{f"dump.{key}": value for key, value in manifest.dump.model_dump().items()},
        **{f"combined.{key}": value for key, value in made_of.items()},
    }


def shard_name(shard: int) -> str:
    return f"{shard:05d}.arrow"


def shard_file(folder: Path, field: str, shard: int) -> Path:
    return folder / field / shard_name(shard)


def receipt_name(shard: int) -> str:
    return f"{shard:05d}.json"


def receipt_file(folder: Path, field: str, shard: int) -> Path:
    return folder / field / receipt_name(shard)


def to_json(model: BaseModel) -> bytes:
    """The bytes of a manifest or receipt: sorted keys, so that the same content is the same file."""
    lines = [
        f" {json.dumps(key)}: {json.dumps(value, sort_keys=True, ensure_ascii=False)}"
        for key, value in sorted(model.model_dump().items())
    ]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of `folder`; CacheError where there is none or it is damaged."""
    if not folder.is_dir():
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):  # of its slashes a path keeps one
            from softlabels.cache.urls import redact

            local = re.match(r"(file|local):/", str(folder), re.IGNORECASE)  # of these the path begins with the third
            shown = redact(str(folder).replace(":/", ":///" if local else "://", 1))
            raise CacheError(f"{shown} is a URL, and a folder is needed here: `softlabels pull` makes one of it")
        raise CacheError(f"no cache at {folder}: no such folder. Make one with `softlabels dump … --out {folder}`")
    try:
        raw = read_inside(folder, MANIFEST, limit=MANIFEST_LIMIT)
    except FileNotFoundError:
        raise CacheError(f"{folder} is not a cache: it has no {MANIFEST}") from None
    return parse_manifest(raw, folder / MANIFEST)


def parse_manifest(raw: bytes, where: Path | str) -> Manifest:
    """The checked manifest in the bytes of a manifest.json; CacheError, with `where`, if it is damaged."""
    return _parse(Manifest, raw, where)


def parse_folder_receipt(raw: bytes, where: Path | str) -> FolderReceipt:
    """The same of a receipt.json."""
    return _parse(FolderReceipt, raw, where)


def read_receipt(folder: Path, field: str, shard: int) -> Receipt | None:
    """The receipt of a shard, or None where there is none that can be read: then the shard counts as missing."""
    try:
        return load_receipt(folder, field, shard)
    except (FileNotFoundError, CacheError):
        return None


def load_receipt(folder: Path, field: str, shard: int) -> Receipt:
    """The receipt of a shard; FileNotFoundError where there is none, CacheError where it is damaged."""
    path = receipt_file(folder, field, shard)
    return _parse(Receipt, read_inside(folder, field, path.name, limit=RECEIPT_LIMIT), path)


def load_receipt_at(place: int, name: str) -> Receipt:
    """The same of the file `name` in an open folder of a field."""
    return _parse(Receipt, read_at(place, name, limit=RECEIPT_LIMIT), name)


def load_folder_receipt(folder: Path) -> FolderReceipt:
    """receipt.json; FileNotFoundError where there is none, CacheError where it is damaged."""
    return _parse(FolderReceipt, read_inside(folder, RECEIPT, limit=SETTINGS_LIMIT), folder / RECEIPT)


def read_settings(folder: Path, *names: str) -> dict[str, Any]:
    """A JSON object that transformers wrote; FileNotFoundError where there is none, CacheError where it is damaged."""
    path, raw = folder.joinpath(*names), read_inside(folder, *names, limit=SETTINGS_LIMIT)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise CacheError(f"{path} is damaged: it is no JSON object")
    return value


_Model = TypeVar("_Model", bound=_Part)


def _parse(kind: type[_Model], raw: bytes, path: Path | str) -> _Model:
    marks = (b",", b"[", b"{")  # one for each value, which takes many times its bytes in memory
    if len(raw) > _MOST_VALUES and sum(raw.count(mark) for mark in marks) > _MOST_VALUES:
        raise CacheError(f"{path} has more than {_MOST_VALUES:,} values: refused")
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CacheError(f"{path} is damaged or of another version: {place}: {first['msg']}"[:1000]) from None
