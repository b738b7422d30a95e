"""Tiny models of many architectures, and a ragged batch for each: real ones, made from configs in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    T5EncoderModel,
)

from softlabels.captures.forward import Batch
from softlabels.types import TokenBatch

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 3,
    "pad_token_id": 0,
}
_GROUPED = {"num_key_value_heads": 2}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
_BART = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
TAPPED: dict[str, dict[str, Any]] = {  # architectures whose attention goes through the interface
    "bert": {},
    "roberta": {"max_position_embeddings": 66},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "camembert": {},
    "xlm-roberta": {},
    "ernie": {},
    "mobilebert": {  # its own kind of normalisation lets random weights run away
        "embedding_size": 16,
        "intra_bottleneck_size": 16,
        "true_hidden_size": 16,
        "normalization_type": "layer_norm",
    },
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 6},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 4, "head_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "gemma2": _GROUPED | {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0},
    "t5": _T5,
    "t5-encoder": _T5,
    "bart": _BART,
    "vit": {"image_size": 8, "patch_size": 4},
}
BYPASSING: dict[str, dict[str, Any]] = {  # their own maps are taken
    "mpnet": {},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "bloom": {"n_layer": 3, "n_head": 4},
    "roformer": {},
    "gpt_oss": _GROUPED | {"head_dim": 8, "num_local_experts": 4},
}
# Models whose last hidden state is normalised once more, behind the last layer.
NORMALISED = {"gpt2", "llama", "qwen2", "mistral", "opt", "gpt_neox", "gemma2", "bloom", "gpt_oss"}
NORMALISED |= {"modernbert", "t5", "t5-encoder"}
_EOS = {"t5": 1, "bart": 2}  # at the end of every row, where their classifiers look
_MASK = torch.arange(9) < torch.tensor([9, 4, 7])[:, None]  # (3, 9)


@dataclass(frozen=True)
class ImageBatch:
    """Pixels instead of tokens."""

    pixels: Tensor  # (B, 3, 8, 8)
    attention_mask: None = None

    def model_inputs(self) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels}


def model_of(kind: str, *, body: bool = False, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A classifier of the architecture `kind`, or its `body` alone, in eval mode."""
    torch.manual_seed(seed)
    settings = (TAPPED | BYPASSING)[kind]
    config = AutoConfig.for_model(kind.removesuffix("-encoder"), **(SMALL | settings | changes))
    if kind == "t5-encoder":
        model: PreTrainedModel = T5EncoderModel._from_config(config).eval()
    elif body:
        model = AutoModel.from_config(config).eval()
    else:
        heads = AutoModelForImageClassification if kind == "vit" else AutoModelForSequenceClassification
        model = heads.from_config(config).eval()
    with torch.no_grad():  # wide weights and biases, so that attention is far from uniform
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.2 / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def batch_of(kind: str = "bert", *, ragged: bool = True, seed: int = 0) -> Batch:
    """Three rows of 9, 4 and 7 tokens, right-padded; or all of 9."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return ImageBatch(torch.rand((3, 3, 8, 8), generator=generator))
    ids = torch.randint(5, 50, (3, 9), generator=generator)
    mask = (_MASK if ragged else torch.ones_like(_MASK)).long()
    if kind in _EOS:
        ids[torch.arange(3), mask.sum(1) - 1] = _EOS[kind]
    return TokenBatch(ids * mask, mask, None, torch.full((3,), -100))


def eager(model: PreTrainedModel, batch: Batch) -> Any:
    """The output of `model` under transformers' eager attention, with all that it can give."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**batch.model_inputs(), output_attentions=True, output_hidden_states=True)


def real_tokens(batch: Batch, tokens: int) -> Tensor:
    """(B, L) bool."""
    if batch.attention_mask is None:
        return torch.ones((3, tokens), dtype=torch.bool)
    return batch.attention_mask.bool()
