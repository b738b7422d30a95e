"""Random numbers of one's own, for students that train in turns in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class RandomStream:
    """torch's random numbers as one student would draw them if it were alone.

    Inside `with stream.flowing():` torch goes on where this stream stopped, and afterwards where it was before. A
    checkpoint may hold it (`state_dict`).
    """

    def __init__(self) -> None:
        self._states = _draw_states()

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """Everything drawn inside is this stream's."""
        outside = _draw_states()
        _set_states(self._states)
        try:
            yield
        finally:
            self._states = _draw_states()
            _set_states(outside)

    def state_dict(self) -> dict[str, Any]:
        """The generators' states: the CPU's, then each GPU's."""
        return {"states": list(self._states)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._states = [value.cpu() for value in state["states"]]


def _draw_states() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _set_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
