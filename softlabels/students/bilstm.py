"""The BiLSTM of 'Distilling Task-Specific Knowledge from BERT into Simple Neural Networks' (Tang et al.
2019).

Word vectors of 300 → one BiLSTM of 150 a direction → its final forward and backward states side by side → a
layer of 200 with ReLU → logits. Of a pair of texts each is encoded by itself by the same BiLSTM, and the layer reads
[h1, h2, h1⊙h2, |h1−h2|]. Texts are read without the tokenizer's special tokens; one without any word says zeros.

The paper's word vectors are word2vec's, kept and tuned side by side (600 in all): that is `vectors: multichannel` with
`word_vectors: FILE`. By default they are random and tuned. The paper's words are not word pieces; here the student's
word is the teacher's token. Its optimiser is Adadelta (lr 1.0, rho 0.95).
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
    init_as_torch,
    last_state,
    load_recurrent,
    make_embedding,
    map_tokens,
)
from softlabels.students.texts import (
    Pairs,
    Words,
    find_pairs,
    gather_words,
    second_text,
    separator_ids,
    special_ids,
)


class BiLSTMOptions(RecurrentOptions):
    """What a user may choose; the defaults are the paper's."""

    hidden_size: int = Field(default=150, ge=1)  # of each direction
    fc_size: int = Field(default=200, ge=1)
    layers: int = Field(default=1, ge=1)


class BiLSTMConfig(RecurrentConfig):
    """What it takes to rebuild the model: config.json of the run."""

    model_type = "softlabels-bilstm"

    hidden_size: int = 150
    fc_size: int = 200
    layers: int = 1
    pairs: Pairs | None = None  # what tells the two texts of a row apart; None: rows are single texts
    separator_ids: list[int] | None = None


class BiLSTMStudent(PreTrainedModel):
    """See the module. Dropout falls on the word vectors, between LSTM layers, and before the logits."""

    config_class = BiLSTMConfig
    config: BiLSTMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: BiLSTMConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None  # transformers derives it from the class names
        self.embedding = make_embedding(config)
        self.lstm = PaddedLSTM(
            self.embedding.width,
            config.hidden_size,
            layers=config.layers,
            bidirectional=True,
            dropout=config.dropout,
        )
        self.fc = nn.Linear(self.lstm.width * (4 if config.pairs else 1), config.fc_size)
        self.classifier = nn.Linear(config.fc_size, config.num_labels)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        init_as_torch(module)

    def forward(
        self,
        input_ids: Tensor,  # (B, L)
        attention_mask: Tensor | None = None,  # (B, L), padding on the right
        token_type_ids: Tensor | None = None,  # (B, L), looked at where these tell two texts apart
        **kwargs: object,  # transformers passes settings of its own (return_dict, use_cache …)
    ) -> SequenceClassifierOutput:
        """Logits (B, C)."""
        rows = self.embedding.find_rows(input_ids)  # (B, L)
        words = self.embedding.find_words(rows, attention_mask)
        if self.config.pairs is None:
            encoded = self._encode(gather_words(rows, words))
        else:
            second = second_text(
                input_ids, token_type_ids, pairs=self.config.pairs, separators=self.config.separator_ids or []
            )
            both = gather_words(rows.repeat(2, 1), torch.cat([words & ~second, words & second]))  # (2B, L)
            one, two = self._encode(both).chunk(2)
            encoded = torch.cat([one, two, one * two, (one - two).abs()], dim=-1)  # (B, 8 · hidden_size)
        features = self.dropout(self.fc(encoded).relu())  # (B, fc_size)
        return SequenceClassifierOutput(logits=self.classifier(features))

    def _encode(self, texts: Words) -> Tensor:
        """The final states of both directions (B, 2 · hidden_size)."""
        vectors = self.dropout(self.embedding.look_up(texts.rows))  # (B, L, width)
        lengths = texts.lengths.clamp(min=1)
        return last_state(self.lstm(vectors, lengths), lengths) * (texts.lengths > 0)[:, None]


def read(spec: StudentSpec) -> BiLSTMOptions:
    """The options of `spec`, checked."""
    return read_options(BiLSTMOptions, spec, student="bilstm")


def build(spec: StudentSpec) -> BiLSTMStudent:
    """A new BiLSTM for `spec`."""
    options = read(spec)
    return build_recurrent(
        BiLSTMStudent,
        BiLSTMConfig,
        spec,
        options,
        token_map=map_tokens(spec, special=special_ids(spec)),
        settings={"pairs": find_pairs(spec), "separator_ids": separator_ids(spec)},
    )


def load(folder: Path) -> BiLSTMStudent:
    """The BiLSTM saved in `folder`."""
    return load_recurrent(BiLSTMStudent, BiLSTMConfig, folder)
