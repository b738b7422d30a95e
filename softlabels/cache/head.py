"""teacher/head.safetensors: a language model's output head, by which `vocab_states` become logits on any device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from softlabels.cache.files import write_file
from softlabels.cache.inside import read_tensors
from softlabels.errors import CacheError

HEAD = "head.safetensors"


@dataclass(frozen=True, slots=True)
class OutputHead:
    """The last linear map of a language model: logits = states · weightᵀ + bias, then capped where the model caps."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None = None  # c: logits become c · tanh(logits / c)

    def __call__(self, states: Tensor) -> Tensor:
        """(T, D) → (T, V)."""
        logits = nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def to(self, device: torch.device | str) -> OutputHead:
        """The same on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return OutputHead(self.weight.to(device), bias, self.softcap)


def save_head(folder: Path, head: OutputHead) -> None:
    """Write the head into the cache at `folder`, whole or not at all; one that is there is left."""
    path = folder / "teacher" / HEAD
    if path.is_file():
        return
    tensors = {"weight": head.weight.contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.contiguous()
    if head.softcap is not None:
        tensors["softcap"] = torch.tensor([head.softcap])
    write_file(path, save(tensors))


def load_head(folder: Path, *, vocab_size: int, width: int) -> OutputHead:
    """The head of the cache at `folder`, for states of `width`; CacheError where it is missing or not right."""
    path = folder / "teacher" / HEAD
    most = 4 * (vocab_size * (width + 1) + 1) + (1 << 20)
    tensors = read_tensors(folder, HEAD, most=most, what=f"a head of {vocab_size} x {width}")
    weight, bias, softcap = tensors.get("weight"), tensors.get("bias"), tensors.get("softcap")
    right = weight is not None and weight.dtype == torch.float32 and tuple(weight.shape) == (vocab_size, width)
    if bias is not None:
        right = right and bias.dtype == torch.float32 and tuple(bias.shape) == (vocab_size,)
    if softcap is not None:
        right = right and tuple(softcap.shape) == (1,) and float(softcap[0]) > 0
    if not right or weight is None:
        raise CacheError(f"{path} is no head of {vocab_size} tokens for states of {width}: it is of another teacher")
    return OutputHead(weight, bias, None if softcap is None else float(softcap[0]))
