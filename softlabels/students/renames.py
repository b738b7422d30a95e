"""What a teacher's architecture calls the parameters and settings of a student of another one.

`RENAMES` has a row for each pair (teacher's model_type, student's model_type); a new pair is a new row. A pair of one
architecture needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Renames:
    """From the student's names to the teacher's."""

    prefix: str  # of the teacher's bare model, in the file of a model with a head
    stack: str  # the teacher's list of layers
    layer: Mapping[str, str]  # inside a layer: the beginning of a name
    head: Mapping[str, str]  # of a masked language model's head: the beginning of a name
    settings: Mapping[str, str]  # of the config


_DISTILBERT_LAYER = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
_DISTILBERT_SETTINGS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}
_BERT_HEAD = {
    "vocab_transform": "cls.predictions.transform.dense",
    "vocab_layer_norm": "cls.predictions.transform.LayerNorm",
    "vocab_projector.bias": "cls.predictions.bias",
    "vocab_projector": "cls.predictions.decoder",
}
_ROBERTA_HEAD = {
    "vocab_transform": "lm_head.dense",
    "vocab_layer_norm": "lm_head.layer_norm",
    "vocab_projector.bias": "lm_head.bias",
    "vocab_projector": "lm_head.decoder",
}
_BERT = Renames("bert", "encoder.layer", _DISTILBERT_LAYER, _BERT_HEAD, _DISTILBERT_SETTINGS)
_ROBERTA = Renames("roberta", "encoder.layer", _DISTILBERT_LAYER, _ROBERTA_HEAD, _DISTILBERT_SETTINGS)

RENAMES: Mapping[tuple[str, str], Renames] = {
    ("bert", "distilbert"): _BERT,
    ("roberta", "distilbert"): _ROBERTA,
    ("xlm-roberta", "distilbert"): _ROBERTA,
    ("camembert", "distilbert"): _ROBERTA,
}


def rename(name: str, names: Mapping[str, str]) -> str:
    """`name` with its beginning renamed; as it is where no row of `names` fits."""
    for own, theirs in names.items():
        if name == own or name.startswith(f"{own}."):
            return theirs + name.removeprefix(own)
    return name
