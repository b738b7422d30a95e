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
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from softlabels.students import StudentSpec, read_options
from softlabels.students.recurrent import (
    PaddedLSTM,
    RecurrentConfig,
    RecurrentOptions,
    build_recurrent,
    every_state,
    init_as_torch,
    load_recurrent,
    make_embedding,
    map_tokens,
    token_lengths,
)


class LSTMAttentionOptions(RecurrentOptions):
    """What a user may choose."""

    hidden_size: int = Field(default=128, ge=1)  # of each direction; a step costs 2.3 times as much at 200
    layers: int = Field(default=3, ge=1)
    bidirectional: bool = False


class LSTMAttentionConfig(RecurrentConfig):
    """What it takes to rebuild the model: config.json of the run."""

    model_type = "softlabels-lstm-attention"

    hidden_size: int = 128
    layers: int = 3
    bidirectional: bool = False


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
        self.embedding = make_embedding(config)
        self.lstm = PaddedLSTM(
            self.embedding.width,
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


def read(spec: StudentSpec) -> LSTMAttentionOptions:
    """The options of `spec`, checked."""
    return read_options(LSTMAttentionOptions, spec, student="lstm_attention")


def build(spec: StudentSpec) -> LSTMAttentionStudent:
    """A new LSTM with attention for `spec`."""
    options = read(spec)
    return build_recurrent(LSTMAttentionStudent, LSTMAttentionConfig, spec, options, token_map=map_tokens(spec))


def load(folder: Path) -> LSTMAttentionStudent:
    """The LSTM with attention saved in `folder`."""
    return load_recurrent(LSTMAttentionStudent, LSTMAttentionConfig, folder)
