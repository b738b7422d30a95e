"""One student in several processes, as `accelerate launch` starts them: each takes its rows of every batch.

Every process holds the whole student. Of a batch it reads, runs and compares its own rows; losses are shares of the
whole batch's (`softlabels.losses.means`), gradients are added up before the step, and so each process takes the step
that one process with the whole batch would take, to rounding. The first one writes and talks. The communication is
Accelerate's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, gather, pad_across_processes, reduce
from torch import Tensor, nn

from softlabels.cache.loader import CacheLoader
from softlabels.checkpoint import run_folder
from softlabels.errors import StudentError
from softlabels.losses.means import in_parts
from softlabels.progress import quiet

Item = TypeVar("Item")


@dataclass(slots=True)
class Processes:
    """The processes that train one student together; a single one where no launcher started more."""

    rank: int
    count: int
    device: torch.device
    has_rows: bool = True  # of the batch that is being worked on; see `Parts`

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        PartialState().wait_for_everyone()

    def part(self, loader: CacheLoader) -> CacheLoader:
        """`loader` with this process's rows of each batch: every `count`-th, and the first row where it has none."""
        if self.count == 1:
            return loader
        parts = [rows[self.rank :: self.count] if len(rows) > self.rank else rows[:1] for rows in loader.batches]
        return CacheLoader(loader.cache, parts, loader.fields, loader.options)

    def some_of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `count`-th, this process's own."""
        return items[self.rank :: self.count]

    @contextmanager
    def batch(self, rows: int) -> Iterator[None]:
        """Inside, losses are shares of those of a batch of so many rows in all."""
        if self.count == 1:
            yield
            return
        self.has_rows = rows > self.rank
        with in_parts(self):
            yield

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' `values`, without gradient."""
        return values if self.count == 1 else reduce(values.detach().to(self.device), "sum").to(values.device)

    def totals(self, figures: dict[str, float]) -> dict[str, float]:
        """The sums of all processes' figures; every process must give the same names."""
        if self.count == 1:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float32, device=self.device)
        return dict(zip(figures, reduce(values, "sum").tolist(), strict=True))

    def rows(self, values: Tensor) -> Tensor:
        """All processes' rows of `values` (N, …), this one's with their gradient."""
        parts = self._gathered(values.detach() if self.has_rows else values.detach()[:0])
        if not self.has_rows:
            return torch.cat(parts) + values.sum() * 0  # no row of its own, and yet a gradient: of 0
        parts[self.rank] = values
        return torch.cat(parts)

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Each gradient becomes the sum of all processes'; one that is sparse stays so."""
        if self.count == 1:
            return
        self._fill_gradients(parameters)
        gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        dense = [gradient for _, gradient in gradients if not gradient.is_sparse]
        if dense:
            summed = reduce(torch.cat([gradient.reshape(-1) for gradient in dense]), "sum")
            for gradient, values in zip(dense, summed.split([gradient.numel() for gradient in dense]), strict=True):
                gradient.copy_(values.view_as(gradient))
        for table, gradient in gradients:
            if gradient.is_sparse:
                own = gradient.coalesce()
                rows = torch.cat(self._gathered(own.indices()[0]))
                values = torch.cat(self._gathered(own.values()))
                table.grad = torch.sparse_coo_tensor(
                    rows[None], values, gradient.shape, check_invariants=False
                ).coalesce()

    def _fill_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Zeros where only others have a gradient: a layer may be dropped here and not there, and sums go by place."""
        there = [float(parameter.grad is not None) for parameter in parameters]
        counts = reduce(torch.tensor(there, device=self.device), "sum").tolist()
        for parameter, count in zip(parameters, counts, strict=True):
            if parameter.grad is None and count:
                parameter.grad = torch.zeros_like(parameter)

    def start_alike(self, modules: Sequence[nn.Module]) -> None:
        """Every process gets the first one's weights and buffers."""
        if self.count == 1:
            return
        with torch.no_grad():
            for module in modules:
                for values in (*module.parameters(), *module.buffers()):
                    values.copy_(broadcast(values.detach().to(self.device)))

    def draw_apart(self, seed: int) -> None:
        """From here on, dropout drops other units of other rows; the first process draws as one alone would."""
        if not self.is_first:
            torch.manual_seed(seed + 1_000_003 * self.rank)

    def _gathered(self, values: Tensor) -> list[Tensor]:
        """Each process's `values`, which may differ in their first dimension."""
        sizes = gather(torch.tensor([len(values)], device=self.device)).tolist()
        if not max(sizes):
            return [values for _ in sizes]
        padded = pad_across_processes(values.to(self.device).contiguous(), dim=0)
        parts = gather(padded).view(self.count, max(sizes), *values.shape[1:])
        return [part[:size].to(values.device) for part, size in zip(parts, sizes, strict=True)]


def find_processes(*, cpu: bool) -> Processes:
    """Those that a launcher such as `accelerate launch` started, connected; else this one alone.

    Accelerate settles once a process where it computes; one alone may train here first and then there.
    """
    state = PartialState(cpu=cpu)
    if state.num_processes == 1 and cpu != (state.device.type == "cpu") and torch.accelerator.is_available():
        AcceleratorState._reset_state(reset_partial_state=True)
        state = PartialState(cpu=cpu)
    return Processes(state.process_index, state.num_processes, state.device)


def is_first_process() -> bool:
    """Whether this one is the one that talks; true of one alone."""
    return PartialState().is_main_process


@contextmanager
def first_talks(processes: Processes) -> Iterator[None]:
    """Inside, only the first process shows its progress."""
    if processes.is_first:
        yield
        return
    with quiet():
        yield


@contextmanager
def others_are_told(processes: Processes) -> Iterator[None]:
    """StudentError where another process has ended: torch says that in words of its own, as if it were a fault here."""
    try:
        yield
    except RuntimeError as error:
        if processes.count == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise StudentError(
            f"process {processes.rank + 1} of {processes.count} cannot go on: another one has ended, or does not "
            f"answer. What that one said is the reason"
        ) from error


@contextmanager
def shared_run_folder(
    out: Path, configuration: dict[str, Any], processes: Processes, *, resume: bool
) -> Iterator[None]:
    """`run_folder`, which the first process opens, checks and locks for all."""
    if processes.is_first:
        with run_folder(out, configuration, resume=resume):
            processes.wait()
            yield
        return
    processes.wait()
    yield
