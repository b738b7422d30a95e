"""The BiLSTM of 'Distilling Task-Specific Knowledge from BERT into Simple Neural Networks' (Tang et al.
2019).

Word vectors of 300 → one BiLSTM of 150 a direction → its final forward and backward states side by side → a
layer of 200 with ReLU → logits. It learns its word vectors from scratch (the paper starts from pretrained
ones) and reads a pair of texts as one sequence with the tokenizer's separator (the paper encodes each text
and compares the two).
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from softlabels.config import Strict
from softlabels.students import StudentSpec, read_options
from softlabels.students.recurrent import (
    CompactEmbedding,
    PaddedLSTM,
    init_as_torch,
    last_state,
    load_recurrent,
    map_tokens,
    recurrent_settings,
    token_lengths,
)


class BiLSTMOptions(Strict):
    """What a user may choose; the defaults are the paper's."""

    embedding_dim: int = Field(default=300, ge=1)
    hidden_size: int = Field(default=150, ge=1)  # of each direction
    fc_size: int = Field(default=200, ge=1)
    layers: int = Field(default=1, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)


class BiLSTMConfig(PreTrainedConfig):
    """What it takes to rebuild the model: config.json of the run."""

    model_type = "softlabels-bilstm"

    pad_token_id: int | None = None
    vocab_size: int = 0  # V, of the teacher's tokenizer
    embedding_rows: int = 2  # tokens with a vector of their own, padding and unknown included
    embedding_dim: int = 300
    hidden_size: int = 150
    fc_size: int = 200
    layers: int = 1
    dropout: float = 0.1


class BiLSTMStudent(PreTrainedModel):
    """See the module. Dropout falls on the word vectors, between LSTM layers, and before the logits."""

    config_class = BiLSTMConfig
    config: BiLSTMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: BiLSTMConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None  # transformers derives it from the class names
        self.embedding = CompactEmbedding(config.vocab_size, config.embedding_rows, config.embedding_dim)
        self.lstm = PaddedLSTM(
            config.embedding_dim,
            config.hidden_size,
            layers=config.layers,
            bidirectional=True,
            dropout=config.dropout,
        )
        self.fc = nn.Linear(self.lstm.width, config.fc_size)
        self.classifier = nn.Linear(config.fc_size, config.num_labels)
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
        vectors = self.dropout(self.embedding(input_ids))  # (B, L, embedding_dim)
        lengths = token_lengths(input_ids, attention_mask)
        last = last_state(self.lstm(vectors, lengths), lengths)  # (B, 2 · hidden_size)
        features = self.dropout(self.fc(last).relu())  # (B, fc_size)
        return SequenceClassifierOutput(logits=self.classifier(features))


def build(spec: StudentSpec) -> BiLSTMStudent:
    """A new BiLSTM for `spec`."""
    options = read_options(BiLSTMOptions, spec, student="bilstm")
    token_map = map_tokens(spec)
    config = BiLSTMConfig(**recurrent_settings(spec, options, token_map=token_map))
    student = BiLSTMStudent(config)
    student.embedding.use_tokens(token_map)
    return student


def load(folder: Path) -> BiLSTMStudent:
    """The BiLSTM saved in `folder`."""
    return load_recurrent(BiLSTMStudent, BiLSTMConfig, folder)
