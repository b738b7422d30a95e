"""What the recurrent students share: word vectors for the tokens in use, and an LSTM that padding cannot reach.

All read the teacher's token ids, so that one tokenisation serves the teacher and every student.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from softlabels.config import Strict
from softlabels.errors import StudentError
from softlabels.once import once
from softlabels.students import StudentSpec, refuse_incomplete
from softlabels.students.word_vectors import WordVectors, look_up_vectors, spell_tokens

PAD_ROW, UNKNOWN_ROW, FIRST_ROW = 0, 1, 2
EMBEDDING_DIM = 300  # where neither the user nor a file of word vectors says another
FIT = "fit"

Vectors = Literal["tuned", "static", "multichannel"]


class RecurrentOptions(Strict):
    """What a user may choose of every recurrent student."""

    embedding_dim: int | None = Field(default=None, ge=1)  # None: as wide as the word vectors given, else 300
    vectors: Vectors = "tuned"  # trained; kept as they were given; or both, side by side
    word_vectors: str | None = None  # a file of them; 'fit': fitted on the training rows; None: random
    dropout: float = Field(default=0.1, ge=0, lt=1)


class RecurrentConfig(PreTrainedConfig):
    """What it takes to rebuild the word vectors of a recurrent student."""

    pad_token_id: int | None = None
    vocab_size: int = 0  # V, of the teacher's tokenizer
    embedding_rows: int = 2  # tokens with a vector of their own, padding and unknown included
    embedding_dim: int = EMBEDDING_DIM
    vectors: str = "tuned"
    word_vectors: str | None = None  # where they came from: 'fit' or a file's name
    word_vectors_found: float | None = None  # the share of the rows that had one
    dropout: float = 0.1


class CompactEmbedding(nn.Module):
    """Word vectors for the tokens of the training rows only.

    A teacher's vocabulary has 30,000 rows or more, of which a corpus uses a part. `token_map` (V,) is saved with the
    model and leads every token id to its row: 0 for padding and for what is no word, 1 for any token that the training
    rows don't have, then one row each. It is not trained.

    The vectors are `tuned`, `static` (never trained, but saved with the model), or both side by side
    ('multichannel', Kim 2014), which is twice as wide. In training the tuned ones get sparse gradients, so that a step
    costs what the batch's rows cost: see `softlabels.optimizer`, whose optimisers take them (torch's AdamW doesn't).
    """

    token_map: Tensor
    static: Tensor | None
    sparse_gradients = True  # False where processes sum their gradients by NCCL, which can't sum sparse ones

    def __init__(self, vocab_size: int, rows: int, width: int, *, vectors: Vectors = "tuned") -> None:
        super().__init__()
        self.register_buffer("token_map", torch.full((vocab_size,), UNKNOWN_ROW, dtype=torch.int32))
        self.vectors = None if vectors == "static" else nn.Embedding(rows, width, padding_idx=PAD_ROW)
        self.register_buffer("static", None if vectors == "tuned" else torch.zeros(rows, width))
        self.rows = rows
        self.width = 2 * width if vectors == "multichannel" else width

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) ids of the teacher's tokenizer to (B, L, width)."""
        return self.look_up(self.find_rows(input_ids))

    def find_rows(self, input_ids: Tensor) -> Tensor:
        """(B, L) ids to the rows of the table (B, L) int32."""
        return self.token_map[input_ids]

    def find_words(self, rows: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, L) bool: which of the `rows` (B, L) stand for a word: not padding, nor what is no word to the student."""
        words = rows != PAD_ROW
        return words if attention_mask is None else words & attention_mask.bool()

    def look_up(self, rows: Tensor) -> Tensor:
        """(B, L) rows to their vectors (B, L, width); static ones come first."""
        channels = []
        if self.static is not None:
            channels.append(F.embedding(rows, self.static))
        if self.vectors is not None:
            sparse = self.training and self.sparse_gradients
            channels.append(F.embedding(rows, self.vectors.weight, padding_idx=PAD_ROW, sparse=sparse))
        return channels[0] if len(channels) == 1 else torch.cat(channels, dim=-1)

    def use_tokens(self, token_map: np.ndarray) -> None:
        """Take over a map made by `map_tokens`. The unknown row starts at zero: an unseen token then says
        nothing.
        """
        self.token_map.copy_(torch.from_numpy(token_map))
        if self.vectors is not None:
            with torch.no_grad():
                self.vectors.weight[UNKNOWN_ROW].zero_()

    def use_vectors(self, start: WordVectors) -> None:
        """Start from these, in every channel. A row that has none gets a random one of the same spread (Kim 2014), but
        for padding and unknown words: zero.
        """
        found = torch.from_numpy(start.found)
        table = torch.from_numpy(start.vectors).clone()
        table[~found] = torch.randn(int((~found).sum()), start.width) * table[found].std(correction=0)
        table[[PAD_ROW, UNKNOWN_ROW]] = 0.0
        with torch.no_grad():
            for channel in (self.static, None if self.vectors is None else self.vectors.weight):
                if channel is not None:
                    channel.copy_(table)


def map_tokens(spec: StudentSpec, *, special: Sequence[int] = ()) -> np.ndarray:
    """The row of every token id (V,) int32: see `CompactEmbedding`. `special` ids are no words to the student.

    The tokenizer's own unknown token shares the unknown row, which is so trained where the training rows
    have it; and so does its mask token, of augmented texts: to these students a masked word is one they don't know
    (Tang et al. 2019).
    """
    unknown = [token for token in (spec.unk_token_id, spec.mask_token_id) if token is not None]
    known = spec.used_ids[~np.isin(spec.used_ids, [*unknown, *special])]
    token_map = np.full(spec.vocab_size, UNKNOWN_ROW, dtype=np.int32)
    token_map[[spec.pad_token_id, *special]] = PAD_ROW
    # after the padding: a tokenizer that pads with its end-of-text token may have that token in a text too
    token_map[known] = np.arange(FIRST_ROW, FIRST_ROW + len(known), dtype=np.int32)
    return token_map


def token_lengths(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Tokens of each row (B,), at least 1. Batches are padded on the right."""
    if attention_mask is None:
        return torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
    return attention_mask.sum(dim=1).clamp(min=1)


class PaddedLSTM(nn.Module):
    """A stack of LSTM layers over right-padded batches, whose padding never reaches a token's state.

    Forwards, padding comes after the last token and so cannot matter. Backwards, each row is reversed within
    its own length, read forwards, and put back. This gives what `pack_padded_sequence` gives, 1.6 to 1.8
    times faster on a CPU (a training step of 64 rows of 15 to 35 tokens: 41 ms against 70), because packed
    batches miss oneDNN's fast path.
    """

    def __init__(self, width: int, hidden: int, *, layers: int, bidirectional: bool, dropout: float) -> None:
        super().__init__()
        out = hidden * (2 if bidirectional else 1)
        widths = [width] + [out] * (layers - 1)
        self.forwards = nn.ModuleList([nn.LSTM(size, hidden, batch_first=True) for size in widths])
        self.backwards = nn.ModuleList(
            [nn.LSTM(size, hidden, batch_first=True) for size in widths] if bidirectional else []
        )
        self.dropout = nn.Dropout(dropout)
        self.width = out

    def forward(self, states: Tensor, lengths: Tensor) -> list[Tensor]:
        """(B, L, width) and lengths (B,) to what the last layer's readers say, each (B, L, hidden) in its
        own order.

        One reader, or two, of which the second reads each row from its end: see `every_state` and
        `last_state`.
        """
        readings = [states]
        for layer, forward in enumerate(self.forwards):
            if layer:
                states = self.dropout(every_state(readings, lengths))
            readings = [forward(states)[0]]
            if self.backwards:
                readings.append(self.backwards[layer](reverse(states, lengths))[0])
        return readings


def every_state(readings: list[Tensor], lengths: Tensor) -> Tensor:
    """Every token's state in the text's order, directions side by side (B, L, D); padded positions mean
    nothing.
    """
    ahead, *back = readings
    return torch.cat([ahead, *(reverse(states, lengths) for states in back)], dim=-1)


def last_state(readings: list[Tensor], lengths: Tensor) -> Tensor:
    """What each direction says after its last token, side by side (B, D)."""
    rows = torch.arange(lengths.shape[0], device=lengths.device)  # len() would be a constant of an exported graph
    return torch.cat([states[rows, lengths - 1] for states in readings], dim=-1)


def reverse(states: Tensor, lengths: Tensor) -> Tensor:
    """Each row of (B, L, D) reversed within its own length; what comes after it repeats its first token."""
    size, longest, width = states.shape
    steps = torch.arange(longest, device=states.device)
    back = (lengths[:, None] - 1 - steps).clamp(min=0)  # (B, L)
    back = back + torch.arange(size, device=states.device)[:, None] * longest
    # an embedding lookup is a gather whose backward pass is fast on a CPU
    return F.embedding(back, states.reshape(size * longest, width))


def init_as_torch(module: nn.Module) -> None:
    """torch's own initialisation, where transformers would use the small normal of a transformer."""
    if isinstance(module, (nn.Embedding, nn.Linear, nn.LSTM)):
        module.reset_parameters()


Model = TypeVar("Model", bound=PreTrainedModel)


def build_recurrent(
    model: type[Model],
    config: type[RecurrentConfig],
    spec: StudentSpec,
    options: RecurrentOptions,
    *,
    token_map: np.ndarray,
    settings: dict[str, Any] | None = None,
) -> Model:
    """A new student with the word vectors that `options` ask for; `settings` are its config's beside the options."""
    rows = max(int(token_map.max()), UNKNOWN_ROW) + 1
    start = _start_vectors(spec, options, token_map, rows)
    source = options.word_vectors
    made = config(
        **options.model_dump()
        | {
            "vocab_size": spec.vocab_size,
            "embedding_rows": rows,
            "embedding_dim": start.width if start else options.embedding_dim or EMBEDDING_DIM,
            "word_vectors": None if source is None else Path(source).name,
            "word_vectors_found": start.share if start else None,
            "pad_token_id": spec.pad_token_id,
            "id2label": dict(enumerate(spec.label_names)),
            "label2id": {name: index for index, name in enumerate(spec.label_names)},
        }
        | (settings or {})
    )
    student = model(made)
    embedding = student.get_submodule("embedding")
    assert isinstance(embedding, CompactEmbedding)
    embedding.use_tokens(token_map)
    if start:
        embedding.use_vectors(start)
    return student


def make_embedding(config: RecurrentConfig) -> CompactEmbedding:
    """The word vectors that `config` describes, their values to be filled in."""
    if config.vectors not in ("tuned", "static", "multichannel"):
        raise StudentError(f"word vectors are tuned, static or multichannel, and not '{config.vectors}'")
    vectors: Any = config.vectors
    return CompactEmbedding(config.vocab_size, config.embedding_rows, config.embedding_dim, vectors=vectors)


def _start_vectors(
    spec: StudentSpec, options: RecurrentOptions, token_map: np.ndarray, rows: int
) -> WordVectors | None:
    """What the word vectors start from; None for random ones."""
    if options.word_vectors is None:
        if options.vectors != "tuned":
            raise StudentError(
                f"option 'vectors: {options.vectors}' keeps word vectors as they are given: give some by option "
                f"'word_vectors', a file or '{FIT}'"
            )
        return None
    if options.word_vectors == FIT:
        from softlabels.students.fitted_vectors import fit_word_vectors  # scikit-learn takes a second to import

        assert spec.sequences is not None
        width = options.embedding_dim or EMBEDDING_DIM
        texts = [token_map[sequence.input_ids] for sequence in spec.sequences()]
        words = [text[text != PAD_ROW] for text in texts]
        key = (FIT, rows, width, _hash_texts(words))
        return once(key, lambda: fit_word_vectors(words, rows=rows, width=width))
    assert spec.tokenizer is not None
    ids = np.flatnonzero(token_map >= FIRST_ROW)
    spellings: list[list[str]] = [[] for _ in range(rows)]
    for row, spelling in zip(token_map[ids], spell_tokens(spec.tokenizer(), ids.tolist()), strict=True):
        spellings[row] = spelling
    path = Path(options.word_vectors)
    start = once((str(path), repr(spellings)), lambda: look_up_vectors(path, spellings))
    if options.embedding_dim not in (None, start.width):
        raise StudentError(
            f"option 'embedding_dim' is {options.embedding_dim}, the word vectors in {options.word_vectors} have "
            f"{start.width} values: leave it out"
        )
    return start


def _hash_texts(texts: Sequence[np.ndarray]) -> str:
    """Of which words, in which order, and where each text ends."""
    hasher = xxhash.xxh3_128(np.array([len(text) for text in texts], np.int64).tobytes())
    for text in texts:
        hasher.update(np.ascontiguousarray(text).tobytes())
    return hasher.hexdigest()


def load_recurrent(model: type[Model], config: type[PreTrainedConfig], folder: Path) -> Model:
    """A recurrent student from `folder`, in evaluation mode. StudentError for a folder that is damaged."""
    try:
        settings = config.from_pretrained(folder, local_files_only=True)
        loaded: Any = model.from_pretrained(
            folder, config=settings, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise StudentError(f"the student in {folder} is damaged: {error}") from None
    student, info = loaded
    refuse_incomplete(info, folder)
    _check_token_map(student, folder)
    return student.eval()


def _check_token_map(student: PreTrainedModel, folder: Path) -> None:
    embedding = student.get_submodule("embedding")
    assert isinstance(embedding, CompactEmbedding)
    rows = embedding.token_map
    if rows.dtype != torch.int32 or int(rows.min()) < 0 or int(rows.max()) >= embedding.rows:
        raise StudentError(f"the student in {folder} is damaged: its token map points outside its word vectors")
