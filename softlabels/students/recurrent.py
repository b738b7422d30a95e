"""What the recurrent students share: a compact vocabulary, and an LSTM that padding cannot reach.

Both read the teacher's token ids, so that one tokenisation serves the teacher and every student.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from softlabels.config import Strict
from softlabels.errors import StudentError
from softlabels.students import StudentSpec, refuse_incomplete

PAD_ROW, UNKNOWN_ROW, FIRST_ROW = 0, 1, 2


class CompactEmbedding(nn.Module):
    """Word vectors for the tokens of the training rows only.

    A teacher's vocabulary has 30,000 rows or more, of which a corpus uses a part; the rest would only be
    carried through every step of the optimiser. `token_map` (V,) is saved with the model and leads every
    token id to its row: 0 for padding, 1 for any token that the training rows don't have, then one row each.
    It is not trained.
    """

    token_map: Tensor

    def __init__(self, vocab_size: int, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("token_map", torch.full((vocab_size,), UNKNOWN_ROW, dtype=torch.int32))
        self.vectors = nn.Embedding(rows, width, padding_idx=PAD_ROW)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) ids of the teacher's tokenizer to (B, L, width)."""
        return self.vectors(self.token_map[input_ids])

    def use_tokens(self, token_map: np.ndarray) -> None:
        """Take over a map made by `map_tokens`. The unknown row starts at zero: an unseen token then says
        nothing.
        """
        self.token_map.copy_(torch.from_numpy(token_map))
        with torch.no_grad():
            self.vectors.weight[UNKNOWN_ROW].zero_()


def map_tokens(spec: StudentSpec) -> np.ndarray:
    """The row of every token id (V,) int32: see `CompactEmbedding`.

    The tokenizer's own unknown token shares the unknown row, which is so trained where the training rows
    have it; and so does its mask token, of augmented texts: to these students a masked word is one they don't know
    (Tang et al. 2019).
    """
    unknown = [token for token in (spec.unk_token_id, spec.mask_token_id) if token is not None]
    known = spec.used_ids[~np.isin(spec.used_ids, unknown)]
    token_map = np.full(spec.vocab_size, UNKNOWN_ROW, dtype=np.int32)
    token_map[spec.pad_token_id] = PAD_ROW
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
    rows = torch.arange(len(lengths), device=lengths.device)
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


def recurrent_settings(spec: StudentSpec, options: Strict, *, token_map: np.ndarray) -> dict[str, Any]:
    """What a recurrent student's config holds: its options, the classes, and the size of its vocabulary."""
    return {
        **options.model_dump(),
        "vocab_size": spec.vocab_size,
        "embedding_rows": max(int(token_map.max()), UNKNOWN_ROW) + 1,
        "pad_token_id": spec.pad_token_id,
        "id2label": dict(enumerate(spec.label_names)),
        "label2id": {name: index for index, name in enumerate(spec.label_names)},
    }


Model = TypeVar("Model", bound=PreTrainedModel)


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
    if rows.dtype != torch.int32 or int(rows.min()) < 0 or int(rows.max()) >= embedding.vectors.num_embeddings:
        raise StudentError(f"the student in {folder} is damaged: its token map points outside its word vectors")
