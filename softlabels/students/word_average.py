"""The BiLSTM over mean word vectors: the variant of the Distilled BiLSTM that sees no order of words.

The sentence is the mean of its word vectors (300) → a BiLSTM of 256 a direction → a layer of 128 with ReLU → logits.
The BiLSTM reads a sequence of one vector, the mean: each direction takes a single step from a zero state, so that it is
in effect a gated layer, and its weights between states never act. The mean is over the text's words, without special
tokens and padding; a pair of texts is one bag of words; a text without words is a vector of zeros. Its recipe's loss is
a·CE + (1−a)·MSE of the logits.
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
from softlabels.students.texts import special_ids


class WordAverageOptions(RecurrentOptions):
    """What a user may choose; the defaults are the recipe's."""

    hidden_size: int = Field(default=256, ge=1)  # of each direction
    fc_size: int = Field(default=128, ge=1)


class WordAverageConfig(RecurrentConfig):
    """What it takes to rebuild the model: config.json of the run."""

    model_type = "softlabels-word-average"

    hidden_size: int = 256
    fc_size: int = 128


class WordAverageStudent(PreTrainedModel):
    """See the module. Dropout falls on the mean and before the logits."""

    config_class = WordAverageConfig
    config: WordAverageConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: WordAverageConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None  # transformers derives it from the class names
        self.embedding = make_embedding(config)
        self.lstm = PaddedLSTM(self.embedding.width, config.hidden_size, layers=1, bidirectional=True, dropout=0.0)
        self.fc = nn.Linear(self.lstm.width, config.fc_size)
        self.classifier = nn.Linear(config.fc_size, config.num_labels)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        init_as_torch(module)

    def forward(
        self,
        input_ids: Tensor,  # (B, L)
        attention_mask: Tensor | None = None,  # (B, L)
        token_type_ids: Tensor | None = None,  # not looked at: two texts are one bag of words
        **kwargs: object,  # transformers passes settings of its own (return_dict, use_cache …)
    ) -> SequenceClassifierOutput:
        """Logits (B, C)."""
        rows = self.embedding.find_rows(input_ids)  # (B, L)
        words = self.embedding.find_words(rows, attention_mask)
        total = (self.embedding.look_up(rows) * words[:, :, None]).sum(1)  # (B, width)
        mean = self.dropout(total / words.sum(1, keepdim=True).clamp(min=1))
        one = torch.ones(mean.shape[0], dtype=torch.int64, device=mean.device)
        states = last_state(self.lstm(mean[:, None], one), one)  # (B, 2 · hidden_size)
        features = self.dropout(self.fc(states).relu())  # (B, fc_size)
        return SequenceClassifierOutput(logits=self.classifier(features))


def read(spec: StudentSpec) -> WordAverageOptions:
    """The options of `spec`, checked."""
    return read_options(WordAverageOptions, spec, student="word_average")


def build(spec: StudentSpec) -> WordAverageStudent:
    """A new BiLSTM over mean word vectors for `spec`."""
    options = read(spec)
    token_map = map_tokens(spec, special=special_ids(spec))
    return build_recurrent(WordAverageStudent, WordAverageConfig, spec, options, token_map=token_map)


def load(folder: Path) -> WordAverageStudent:
    """The BiLSTM over mean word vectors saved in `folder`."""
    return load_recurrent(WordAverageStudent, WordAverageConfig, folder)
