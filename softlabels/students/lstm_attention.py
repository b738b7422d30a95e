"""LSTM with attention: three LSTM layers whose states are pooled by additive attention (Bahdanau et al.
2015).

Word vectors of 300 → three LSTM layers → weights softmax(w · tanh(W h)) over the tokens → their weighted
mean → logits. A pair of texts is read as one sequence with the tokenizer's separator.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from softlabels.config import Strict
from softlabels.students import StudentSpec, read_options
from softlabels.students.recurrent import (
    CompactEmbedding,
    PaddedLSTM,
    every_state,
    init_as_torch,
    load_recurrent,
    map_tokens,
    recurrent_settings,
    token_lengths,
)


class LSTMAttentionOptions(Strict):
    """What a user may choose."""

    embedding_dim: int = Field(default=300, ge=1)
    hidden_size: int = Field(default=128, ge=1)  # of each direction; a step costs 2.3 times as much at 200
    layers: int = Field(default=3, ge=1)
    bidirectional: bool = False
    dropout: float = Field(default=0.1, ge=0, lt=1)


class LSTMAttentionConfig(PreTrainedConfig):
    """What it takes to rebuild the model: config.json of the run."""

    model_type = "softlabels-lstm-attention"

    pad_token_id: int | None = None
    vocab_size: int = 0  # V, of the teacher's tokenizer
    embedding_rows: int = 2  # tokens with a vector of their own, padding and unknown included
    embedding_dim: int = 300
    hidden_size: int = 128
    layers: int = 3
    bidirectional: bool = False
    dropout: float = 0.1


class AdditiveAttention(nn.Module):
    """The mean of the states, each weighed by softmax(w · tanh(W h)); padding weighs nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        """(B, L, D) and lengths (B,) to (B, D)."""
        scores = self.score(self.project(states).tanh()).squeeze(-1)  # (B, L)
        padding = torch.arange(states.shape[1], device=states.device) >= lengths[:, None]
        weights = scores.masked_fill(padding, float("-inf")).softmax(dim=-1)  # every row has a token
        return (weights[:, None] @ states).squeeze(1)


class LSTMAttentionStudent(PreTrainedModel):
    """See the module. Dropout falls on the word vectors, between LSTM layers, and before the logits."""

    config_class = LSTMAttentionConfig
    config: LSTMAttentionConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: LSTMAttentionConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None  # transformers derives it from the class names
        self.embedding = CompactEmbedding(config.vocab_size, config.embedding_rows, config.embedding_dim)
        self.lstm = PaddedLSTM(
            config.embedding_dim,
            config.hidden_size,
            layers=config.layers,
            bidirectional=config.bidirectional,
            dropout=config.dropout,
        )
        self.attention = AdditiveAttention(self.lstm.width)
        self.classifier = nn.Linear(self.lstm.width, config.num_labels)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        init_as_torch(module)

    def forward(
        self,
        input_ids: Tensor,  # (B, L)
        attention_mask: Tensor | None = None,  # (B, L), padding on the right
        token_type_ids: Tensor | None = None,  # not looked at: the separator between two texts is a token
        **kwargs: object,  # transformers passes settings of its own (return_dict, use_cache …)
    ) -> SequenceClassifierOutput:
        """Logits (B, C)."""
        lengths = token_lengths(input_ids, attention_mask)
        vectors = self.dropout(self.embedding(input_ids))  # (B, L, embedding_dim)
        states = every_state(self.lstm(vectors, lengths), lengths)  # (B, L, D)
        pooled = self.attention(states, lengths)  # (B, D)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)))


def build(spec: StudentSpec) -> LSTMAttentionStudent:
    """A new LSTM with attention for `spec`."""
    options = read_options(LSTMAttentionOptions, spec, student="lstm_attention")
    token_map = map_tokens(spec)
    config = LSTMAttentionConfig(**recurrent_settings(spec, options, token_map=token_map))
    student = LSTMAttentionStudent(config)
    student.embedding.use_tokens(token_map)
    return student


def load(folder: Path) -> LSTMAttentionStudent:
    """The LSTM with attention saved in `folder`."""
    return load_recurrent(LSTMAttentionStudent, LSTMAttentionConfig, folder)
