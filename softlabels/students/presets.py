"""Shapes by name: `preset: tinybert-4` gives a transformer the sizes of its paper.

A preset is a set of options of the transformer student; those that the user gives go before it, so that the same recipe
runs small (`preset: tinybert-4, hidden_size: 48`). Nothing is scaled: what isn't given stays the paper's.

Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softlabels.config import suggest
from softlabels.errors import StudentError


@dataclass(frozen=True, slots=True)
class Preset:
    """The options that a name stands for."""

    source: str  # where the sizes stand
    options: Mapping[str, Any]
    as_wide_as_its_start: bool = False  # with `init_from`, all widths are those of what it starts from


def _bert(layers: int, width: int, heads: int | str, feed_forward: int) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "layers": layers,
        "hidden_size": width,
        "heads": heads,
        "intermediate_size": feed_forward,
    }


# Both MobileBERTs: what the teacher and the student have in common, and what tells them apart, named in full, so that a
# student whose `init_from` is its teacher has none of the teacher's.
_MOBILE = {
    "model_type": "mobilebert",
    "layers": 24,
    "hidden_size": 512,  # between the blocks: the same on both sides, so feature maps compare without a projection
    "heads": 4,
    "embedding_size": 128,
    "trigram_input": True,
    "use_bottleneck": True,
    "classifier_activation": False,  # the classifier reads [CLS] itself, so the teacher's can be copied
}

PRESETS: Mapping[str, Preset] = {
    "bert-tiny": Preset("Turc et al. 2019", _bert(2, 128, 2, 512)),
    "bert-mini": Preset("Turc et al. 2019", _bert(4, 256, 4, 1024)),
    "bert-small": Preset("Turc et al. 2019", _bert(4, 512, 8, 2048)),
    "bert-base": Preset("Devlin et al. 2019", _bert(12, 768, 12, 3072)),
    # half the teacher's layers, spread over it: 1, 3, 5, 8, 10, 12 of 12; no token types, no pooler
    "distilbert": Preset(
        "Sanh et al. 2019",
        _bert(6, 768, 12, 3072) | {"model_type": "distilbert", "init_layers": "spread"},
        as_wide_as_its_start=True,
    ),
    # attention is compared head by head, so there are as many heads as the teacher has (12 in the papers)
    "tinybert-4": Preset("Jiao et al. 2020", _bert(4, 312, "teacher", 1200)),
    "tinybert-6": Preset("Jiao et al. 2020", _bert(6, 768, "teacher", 3072)),
    "minilm-6": Preset("Wang et al. 2020", _bert(6, 384, "teacher", 1536)),
    "minilm-12": Preset("Wang et al. 2020", _bert(12, 384, "teacher", 1536)),
    # bottlenecks, four feed-forward networks a block; Q and K of one bottleneck, V of the block's input
    "mobilebert": Preset(
        "Sun et al. 2020, table 1",
        _MOBILE
        | {
            "intra_bottleneck_size": 128,
            "intermediate_size": 512,
            "num_feedforward_networks": 4,
            "use_bottleneck_attention": False,
            "key_query_shared_bottleneck": True,
            "normalization_type": "no_norm",
            "hidden_act": "relu",
            "hidden_dropout_prob": 0.0,
        },
    ),
    "mobilebert-tiny": Preset(
        "Sun et al. 2020, table 1",
        _MOBILE
        | {
            "intra_bottleneck_size": 128,
            "intermediate_size": 512,
            "num_feedforward_networks": 2,
            "use_bottleneck_attention": True,
            "key_query_shared_bottleneck": False,
            "normalization_type": "no_norm",
            "hidden_act": "relu",
            "hidden_dropout_prob": 0.0,
        },
    ),
    # IB-BERT-large, the teacher with inverted bottlenecks. In the paper Q and K are made of the block's input, 512
    # wide, as V is; transformers' MobileBERT can make Q and K only of what a bottleneck gives, here 1,024 wide:
    # 332 million parameters instead of 293.
    "mobilebert-teacher": Preset(
        "Sun et al. 2020, table 1",
        _MOBILE
        | {
            "intra_bottleneck_size": 1024,
            "intermediate_size": 4096,
            "num_feedforward_networks": 1,
            "use_bottleneck_attention": False,
            "key_query_shared_bottleneck": True,
            "normalization_type": "layer_norm",
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
        },
    ),
}


def find_preset(name: Any) -> Preset:
    """The preset `name`; StudentError names those there are."""
    if not isinstance(name, str) or name not in PRESETS:
        raise StudentError(f"no preset '{name}': there are {', '.join(PRESETS)}.{suggest(str(name), PRESETS)}")
    return PRESETS[name]
