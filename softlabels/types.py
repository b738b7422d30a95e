"""What travels between the stages, and the legend of shapes.

Legend, used in comments and docstrings everywhere:
    B  examples in a batch        L  tokens of the longest example in the batch, M of its longest target text
    D  width of a hidden state    H  attention heads      K  width of one head
    C  classes                    V  size of the vocabulary

Nothing heavy is imported here, so that the light paths of the command line stay light.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from softlabels.errors import CacheError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from softlabels.truncated import TruncatedLogits

NO_LABEL = -100  # what torch's cross_entropy ignores; on disk and in batches the mark of a row without a label
UNMASKED = -101  # label of a token that a masked language model speaks of though nothing hides it: a target to no loss
# on labels
# A masked attention score, in caches and live: float16's lowest number, which every codec can hold (bfloat16 rounds it
# to -65536) and whose softmax is 0. A score below MASKED / 2 is masked.
MASKED = -65504.0


Label = int | str | float | tuple[int | str | float, ...] | None

# What a teacher was made for, as manifests and `--task` call it.
Task = Literal[
    "sequence-classification",
    "multi-label-classification",
    "regression",
    "token-classification",
    "masked-lm",
    "causal-lm",
    "seq2seq-lm",
    "sentence-embedding",
    "image-classification",
]
TASKS: tuple[Task, ...] = get_args(Task)
SEQ2SEQ: Task = "seq2seq-lm"  # the task whose rows have a target text, which an encoder-decoder model is to write
LANGUAGE_MODELS = ("masked-lm", "causal-lm", SEQ2SEQ)
TOKEN_LABELS = (
    "token-classification",
    *LANGUAGE_MODELS,
)  # tasks with a label a token: of the target, where there is one
VECTOR_LABELS = ("multi-label-classification", "regression")  # tasks with a number for each output
IMAGES: Task = "image-classification"  # the task whose rows are image files, and not texts

Decay = Literal["linear", "none"]  # of a learning rate after its warm-up
OptimizerName = Literal["adamw", "adadelta", "sgd"]  # that a student can be trained with


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a corpus. `label` is as the file has it: an integer, a name, or None (transfer set).

    Where the task asks for it, it is a number (regression), several labels (multi-label), or a tag for each of `words`.
    """

    id: str
    text: str
    text_b: str | None = None
    label: Label = None
    words: tuple[str, ...] | None = None  # the text as words that have tags; `text` joins them by spaces
    image: str | None = None  # the file with the image that the row is; `text` is what the corpus calls it
    target: str | None = None  # what an encoder-decoder model is to make of the text


class Content(Protocol):
    """What a row is beside its tokens: an image, opened when it is needed."""

    @property
    def tokens(self) -> int: ...  # that it counts for in a batch

    def hash(self) -> int: ...  # xxh3-64, the content that rows join by


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One example as the teacher's tokenizer sees it. No padding: arrays are as long as the example."""

    id: str
    input_ids: np.ndarray  # (L,) int32
    token_type_ids: np.ndarray | None  # (L,) uint8, None where the tokenizer gives none
    label: int  # class index, or NO_LABEL
    text: str
    text_b: str | None
    labels: np.ndarray | None = (
        None  # (L,) or (M,) int32, or (C,) float32, where the task has such; see the cache format
    )
    content: Content | None = None  # of an image; `input_ids` are zeros then, one for each place of its sequence
    target: str | None = None  # of an encoder-decoder model; its tokens are `labels` (M,)
    decoder_start: int | None = None  # what the decoder reads first; then come the labels but the last


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One row's tokens by themselves, without padding."""

    input_ids: np.ndarray  # (L,) int32
    token_type_ids: np.ndarray | None  # (L,) uint8, None where the tokenizer gives none


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """A padded batch of tokens, right-padded, ready for a model."""

    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) int64, 1 for a token, 0 for padding
    token_type_ids: Tensor | None  # (B, L) int64
    labels: Tensor  # (B,), (B, L) or (B, M) int64, NO_LABEL where there is none; or (B, C) float32, NaN where none
    # (B, M) int64, of an encoder-decoder model: `labels`, shifted right. It needs no mask: a decoder looks back only,
    # and what it says behind the end of a row is no target
    decoder_input_ids: Tensor | None = None

    def model_inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of a transformers model's forward."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.token_type_ids is not None:
            inputs["token_type_ids"] = self.token_type_ids
        if self.decoder_input_ids is not None:
            inputs["decoder_input_ids"] = self.decoder_input_ids
        return inputs

    def each(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        """The batch with every tensor of it changed so."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in tensors.items() if value is not None})

    def to(self, device) -> TokenBatch:
        """The same batch on another device."""
        return self.each(lambda tensor: tensor.to(device))


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """A batch of images as their teacher's image processor makes them, all of one size: there is no padding."""

    pixel_values: Tensor  # (B, 3, height, width) float32
    labels: Tensor  # (B,) int64, NO_LABEL where there is none
    attention_mask: None = None

    def model_inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of a transformers model's forward."""
        return {"pixel_values": self.pixel_values}

    def to(self, device) -> ImageBatch:
        """The same batch on another device."""
        return ImageBatch(self.pixel_values.to(device), self.labels.to(device))


@dataclass(frozen=True, slots=True)
class Signals:
    """What a loss sees of either side, teacher (from the cache) or student (live), by the same names.

    `fields` maps a field's name to its padded tensor: `logits` (B, C), `hidden.06` (B, L, D) (0 is the embedding
    output, i the output of layer i), `query.06`, `key.06`, `value.06` (B, H, L, K), `attention.06` and
    `attention.06@scores` (B, H, L, L); rows of the shape (B, D): `hidden.06@cls`, `hidden.06@mean`, `pooled`.
    Layers are numbered from 1, as in the papers. `mask` is (B, L), 1 for a token; `labels` as in `TokenBatch`.
    Fields of a language model's targets are flat, (T, …): positions whose label is not NO_LABEL, row after row.
    """

    fields: dict[str, Tensor]
    mask: Tensor
    labels: Tensor
    vocab: Tensor | TruncatedLogits | None = None  # of a language model: its logits at the T targets

    def to(self, device) -> Signals:
        """The same signals on another device."""
        fields = {name: value.to(device) for name, value in self.fields.items()}
        vocab = None if self.vocab is None else self.vocab.to(device)
        return Signals(fields, self.mask.to(device), self.labels.to(device), vocab)

    def get(self, name: str) -> Tensor:
        """The field called `name`; CacheError names what is there instead."""
        if name not in self.fields:
            raise self._lack(f"field '{name}'")
        return self.fields[name]

    @property
    def vocabulary(self) -> Tensor | TruncatedLogits:
        """Logits over a vocabulary, (T, V), complete or truncated."""
        if self.vocab is None:
            raise CacheError("a loss asks for logits over a vocabulary, and these signals hold none")
        return self.vocab

    @property
    def logits(self) -> Tensor:
        return self.get("logits")  # (B, C)

    def hidden(self, layer: int) -> Tensor:
        return self.get(layer_field("hidden", layer))  # (B, L, D)

    def query(self, layer: int) -> Tensor:
        return self.get(layer_field("query", layer))  # (B, H, L, K)

    def key(self, layer: int) -> Tensor:
        return self.get(layer_field("key", layer))  # (B, H, L, K)

    def value(self, layer: int) -> Tensor:
        return self.get(layer_field("value", layer))  # (B, H, L, K)

    def hidden_cls(self, layer: int) -> Tensor:
        """(B, D): the state of each row's first token, [CLS], kept by itself or with those of all tokens."""
        rows = layer_field("hidden", layer) + "@cls"
        return self.get(rows) if rows in self.fields else self.hidden(layer)[:, 0]

    def has_scores(self, layer: int) -> bool:
        """Whether `attention_scores(layer)` can be had."""
        parts = {layer_field("query", layer), layer_field("key", layer)}
        return layer_field("attention", layer) + "@scores" in self.fields or parts <= self.fields.keys()

    def attention_scores(self, layer: int) -> Tensor:
        """(B, H, L, L), before the softmax; MASKED where a query may not look, padded keys included.

        Where the scores were not kept they are QKᵀ/√K, which is what attention computes unless it is causal or has
        windows, position biases, caps or a scale of its own. Keys may have fewer heads than queries: each then serves
        several, in order.
        """
        name = layer_field("attention", layer) + "@scores"
        if not self.has_scores(layer):
            parts = f"'{layer_field('query', layer)}' and '{layer_field('key', layer)}'"
            raise self._lack(f"attention scores of layer {layer}: '{name}', or {parts}")
        found = self.fields[name] if name in self.fields else _scores(self.query(layer), self.key(layer))
        return found.masked_fill((found < MASKED / 2) | ~self._keys(), MASKED)

    def attention_probs(self, layer: int) -> Tensor:
        """(B, H, L, L), from the scores, or from queries and keys, where only these are there.

        Keys of padding have 0. Rows of padding mean nothing.
        """
        name = layer_field("attention", layer)
        if name in self.fields:
            return self.fields[name].masked_fill(~self._keys(), 0)
        if self.has_scores(layer):
            return self.attention_scores(layer).softmax(dim=-1)
        raise self._lack(f"attention of layer {layer}: '{name}', '{name}@scores', or its queries and keys")

    def _keys(self) -> Tensor:
        """(B, 1, 1, L), True where a key is not padding."""
        return self.mask[:, None, None, :] != 0

    def _lack(self, wanted: str) -> CacheError:
        have = ", ".join(sorted(self.fields)) or "nothing"
        return CacheError(f"a loss asks for {wanted}, but these signals hold {have}")


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """QKᵀ/√K, (B, H, L, L), of queries (B, H, L, K) and keys (B, Hk, L, K), Hk a divisor of H; float32 at least."""
    import torch

    if query.shape[1] % key.shape[1] or query.shape[-1] != key.shape[-1]:
        raise CacheError(f"queries {tuple(query.shape)} and keys {tuple(key.shape)} do not make one attention")
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # it would round the scores, as SDPA does not
        grouped = query.to(wide).unflatten(1, (key.shape[1], -1))  # (B, Hk, H / Hk, L, K)
        scores = grouped @ key.to(wide).transpose(-1, -2).unsqueeze(2)  # (B, Hk, H / Hk, L, L)
    return scores.flatten(1, 2) / query.shape[-1] ** 0.5


@dataclass(frozen=True, slots=True)
class LayerPair:
    """Layers that a loss compares: one of the student's, one of the teacher's; 0 is the embedding output.

    `then` holds the second layers of a loss on what goes on between two (gram, nst); None: the same ones twice.
    """

    student: int
    teacher: int
    then: LayerPair | None = None


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that a loss on several of a side looks at together; 0 is the embedding output."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]


def layer_field(kind: str, layer: int) -> str:
    """The name of a layer's field: `layer_field('hidden', 6)` is 'hidden.06'."""
    return f"{kind}.{layer:02d}"
