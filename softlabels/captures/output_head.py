"""The output head of a language model: applied only where there is something to predict, and kept for `vocab:exact`.

A batch's logits over a vocabulary are by far the largest thing that a language model makes. `only_targets` has the head
see the targets alone, (T, D) → (T, V); teachers and students are run in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from softlabels.cache.head import OutputHead
from softlabels.errors import TeacherError

# Heads that read their output embedding's weights without calling it: there states are narrowed before the whole head.
_WHOLE_HEADS = {"mobilebert": "cls.predictions"}
_CLOSE = 1e-4  # of logits rebuilt from states, relative to the largest


@contextmanager
def only_targets(model: PreTrainedModel, targets: Tensor | None) -> Iterator[list[Tensor]]:
    """While entered, the output head of `model` sees only the positions `targets`, and its logits are (T, V).

    `targets` are (B, L), or (B, M) of the decoder of an encoder-decoder model.

    None: nothing is changed. Gives a list into which what the head saw is put, (T, D). TeacherError where the model has
    no such head, or hands it something else than a state a token.
    """
    seen: list[Tensor] = []
    if targets is None:
        yield seen
        return

    def narrow(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = given[0]
        if states.shape[:2] != targets.shape:
            raise TeacherError(
                f"{type(model).__name__} hands its output head states of shape {tuple(states.shape)}, not one a token: "
                f"capture hidden:LAYERS instead"
            )
        seen.append(states[targets])
        return (seen[-1], *given[1:])

    handle = _head_of(model).register_forward_pre_hook(narrow)
    try:
        yield seen
    finally:
        handle.remove()


def _head_of(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    if head is not None and (whole := _WHOLE_HEADS.get(model.config.model_type)):
        return model.get_submodule(whole)
    if not isinstance(head, nn.Module):
        raise TeacherError(f"{type(model).__name__} has no output head over a vocabulary: it is no language model")
    return head


def keep_head(model: PreTrainedModel, states: Tensor, logits: Tensor, *, vocab_size: int) -> OutputHead:
    """The head's weights for the first `vocab_size` tokens, float32 on the CPU, checked to turn `states` into `logits`.

    TeacherError where the model does more to its logits than a linear map and a soft cap.
    """
    head = _head_of(model)
    weight, bias = getattr(head, "weight", None), _bias_of(model, head)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise TeacherError(f"{type(model).__name__}'s output head is no linear map: capture vocab:topk=64 instead")
    for softcap in dict.fromkeys([getattr(model.config, "final_logit_softcapping", None), None]):
        kept = OutputHead(_own(weight, vocab_size), None if bias is None else _own(bias, vocab_size), softcap)
        wanted = logits[:, :vocab_size].float().cpu()
        if (
            not wanted.numel()
            or (kept(states.float().cpu()) - wanted).abs().max() <= _CLOSE * wanted.abs().max() + 1e-6
        ):
            return kept
    raise TeacherError(
        f"{type(model).__name__} does more to its logits than its output head, so they cannot be rebuilt from the last "
        f"hidden state: capture vocab:topk=64 instead"
    )


def _bias_of(model: PreTrainedModel, head: nn.Module) -> Tensor | None:
    """What is added behind the head's weights: by the head, or by BART and its kin, which keep it beside theirs."""
    bias, beside = getattr(head, "bias", None), getattr(model, "final_logits_bias", None)
    if not isinstance(beside, Tensor) or not bool(beside.any()):
        return bias
    beside = beside.detach().flatten()
    return beside if bias is None else bias.detach() + beside


def _own(tensor: Tensor, rows: int) -> Tensor:
    return tensor.detach()[:rows].float().cpu().clone()
