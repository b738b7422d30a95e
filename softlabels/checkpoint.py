"""What makes a training resumable: the run folder's lock and configuration, and a checkpoint after every epoch.

A checkpoint is replaced as a whole: a kill leaves the old one or the new one, never a mixture. It holds the weights,
the optimiser, the schedule and the random numbers (Accelerate's `save_state`), the best weights so far
(`best.safetensors`) and where the training stands (`progress.json`); of several students that train together, one of
each (`best-global.safetensors`). It is the user's own folder and never shared.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import SAFE_MODEL_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softlabels.cache.files import lock, sync_folder, write_file
from softlabels.cache.format import TEMPORARY
from softlabels.errors import ConfigError, StudentError

_CHECKPOINT = "checkpoint"
_OPTIONS = "options.json"
_AGAIN = "delete the run's folder, and train the student again"
_TRACES = {_OPTIONS, "tensorboard"}  # what a training that never finished an epoch leaves


@dataclass(slots=True)
class Progress:
    """Where a training stands."""

    epoch: int = 0  # finished epochs, of all phases
    step: int = 0
    phase: int = 0  # the number of the phase that it is in
    phase_epoch: int = 0  # epochs and steps that were finished before it
    phase_start: int = 0
    best_score: float = -float("inf")  # of this phase
    best_epoch: int | None = None
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    @staticmethod
    def of(out: Path, name: str = "") -> Progress:
        """As the last checkpoint in `out` has it; a fresh one where there is none.

        `name` tells students apart that train together.
        """
        place = _checkpoint_of(out)
        return Progress() if place is None else Progress(**json.loads((place / _progress(name)).read_bytes()))

    def next_phase(self) -> None:
        """The phase is over; the next one chooses its best epoch for itself."""
        self.phase += 1
        self.phase_epoch, self.phase_start = self.epoch, self.step
        self.best_score, self.best_epoch = -float("inf"), None


@dataclass(frozen=True, slots=True)
class Standing:
    """A student, or the shared body of several, and where its training stands."""

    student: nn.Module
    state: Progress


@contextmanager
def run_folder(out: Path, configuration: dict[str, Any], *, resume: bool, receipt: str = "run.json") -> Iterator[None]:
    """The locked folder `out` for a run of `configuration`; ConfigError where it holds something else.

    `receipt` is the file that says that it is finished.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: name a folder")
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        if (out / receipt).exists():
            drop_checkpoint(out)  # a kill came after the run was whole
            raise ConfigError(f"{out} holds a finished run: choose another --out, or delete it")
        strangers = (
            {path.name for path in out.iterdir() if not path.name.startswith(TEMPORARY)} - _TRACES - {_CHECKPOINT}
        )
        if strangers and not (out / _OPTIONS).exists():
            raise ConfigError(
                f"{out} is not empty and no run (it holds {', '.join(sorted(strangers)[:5])}): choose another --out"
            )
        if _checkpoint_of(out) is None:
            _start(out, configuration)
        else:
            _refuse_differences(out, configuration)
            if not resume:
                raise ConfigError(f"{out} holds an unfinished run: add --resume to go on with it, or delete it")
        yield


def _start(out: Path, configuration: dict[str, Any]) -> None:
    shutil.rmtree(out / "tensorboard", ignore_errors=True)
    write_file(out / _OPTIONS, json.dumps(configuration, sort_keys=True, indent=1).encode())


def _refuse_differences(out: Path, configuration: dict[str, Any]) -> None:
    try:
        before = json.loads((out / _OPTIONS).read_bytes())
    except (OSError, ValueError):
        raise ConfigError(f"{out / _OPTIONS} is damaged: delete {out}, or choose another --out") from None
    now = json.loads(json.dumps(configuration))
    differ = [f"{key} was {before.get(key)!r} and is now {now[key]!r}" for key in now if before.get(key) != now[key]]
    if differ:
        raise ConfigError(
            f"{out} holds an unfinished run of another configuration: {'; '.join(differ)}. Choose another --out, or "
            f"delete it"
        )


@contextmanager
def _quiet_accelerate() -> Iterator[None]:
    """Without its warning that tied weights are saved once, which is as it should be."""
    logger = logging.getLogger("accelerate.utils.other")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def save_checkpoint(out: Path, student: nn.Module, accelerator: Accelerator, state: Progress) -> None:
    """Replace the checkpoint of `out` by the state after `state.epoch`."""
    save_checkpoints(out, {"": Standing(student, state)}, accelerator)


def save_checkpoints(out: Path, standings: Mapping[str, Standing], accelerator: Accelerator) -> None:
    """The same of students that train together, by their names: one checkpoint, so that all go on from one epoch."""
    draft, place, old = _paths(out)
    first = accelerator.is_main_process
    if first:
        shutil.rmtree(draft, ignore_errors=True)
    accelerator.wait_for_everyone()  # each process adds its random numbers to the draft
    epoch = max(standing.state.epoch for standing in standings.values())
    with _writing(out, epoch, first=first), _quiet_accelerate():
        hook = accelerator.register_save_state_pre_hook(_set_apart)
        try:
            accelerator.save_state(str(draft))
        finally:
            hook.remove()
    accelerator.wait_for_everyone()
    if not first:
        return accelerator.wait_for_everyone()  # for the first one, which puts it into place
    with _writing(out, epoch, first=first):
        for name, standing in standings.items():
            _keep_best(name, standing, draft, place)
            write_file(draft / _progress(name), json.dumps(asdict(standing.state)).encode())
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    draft.rename(place)
    sync_folder(out)
    shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


@contextmanager
def _writing(out: Path, epoch: int, *, first: bool) -> Iterator[None]:
    """StudentError where the draft of a checkpoint can't be written; the first process removes it, as it is of all."""
    draft, place, _ = _paths(out)
    try:
        yield
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors tell a full disk in their own ways
        free = shutil.disk_usage(out).free / 1e6  # tells a full disk from any other fault
        if first:
            shutil.rmtree(draft, ignore_errors=True)
        kept = f" The one of epoch {epoch - 1} is kept: --resume goes on from there" if place.exists() else ""
        raise StudentError(
            f"the checkpoint of epoch {epoch} can't be written to {out} ({free:,.1f} MB free): {error}.{kept}"
        ) from error


def _keep_best(name: str, standing: Standing, draft: Path, place: Path) -> None:
    """The weights of the best epoch so far: those of now, or those of the last checkpoint."""
    if standing.state.best_epoch == standing.state.epoch:
        state = standing.student.state_dict()
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, draft / _best(name))
    else:
        shutil.copyfile(place / _best(name), draft / _best(name))


def restore(out: Path, accelerator: Accelerator, state: Progress) -> None:
    """Put what was prepared with `accelerator` back to the last checkpoint, where that is one of `state`'s phase."""
    place = _checkpoint_of(out)
    if place is not None and state.epoch > state.phase_epoch:
        hook = accelerator.register_load_state_pre_hook(_put_back)
        try:
            accelerator.load_state(str(place))
        finally:
            hook.remove()


def _set_apart(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
    """Copies of the weights that lie in one storage, as cuDNN lays an LSTM's; tied weights, which are one, once.

    Accelerate keeps one tensor of each storage and drops the others.
    """
    if not PartialState().is_main_process:
        return  # the first one writes
    for number, state in enumerate(weights):
        distinct = {_where(tensor): name for name, tensor in reversed(state.items())}  # the first name of each
        kept = {name: state[name] for name in state if distinct[_where(state[name])] == name}
        among = Counter(tensor.untyped_storage().data_ptr() for tensor in kept.values())
        weights[number] = {
            name: tensor.clone() if among[tensor.untyped_storage().data_ptr()] > 1 else tensor
            for name, tensor in kept.items()
        }


def _put_back(models: list[nn.Module], folder: str) -> None:
    """The weights of a checkpoint into the models; StudentError where it lacks some."""
    for number, model in enumerate(models):
        file = Path(folder) / (
            f"{SAFE_MODEL_NAME}_{number}.safetensors" if number else f"{SAFE_MODEL_NAME}.safetensors"
        )
        try:
            state = load_file(file)
        except (OSError, SafetensorError) as error:
            raise StudentError(f"checkpoint {file} is damaged ({error}): {_AGAIN}") from None
        try:
            found = model.load_state_dict(state, strict=False)
        except RuntimeError as error:  # of another shape
            told = " ".join(str(error).split())
            raise StudentError(f"checkpoint {file} does not fit the student ({told}): {_AGAIN}") from None
        own = model.state_dict()
        there = {_where(own[name]) for name in state if name in own}
        if lost := [name for name in found.missing_keys if _where(own[name]) not in there]:
            raise StudentError(
                f"checkpoint {file} lacks {', '.join(lost)}, as those that an earlier softlabels wrote of LSTMs on a "
                f"GPU do: {_AGAIN}"
            )
        if found.unexpected_keys:
            raise StudentError(
                f"checkpoint {file} has {', '.join(found.unexpected_keys)}, which the student has not: {_AGAIN}"
            )
    models.clear()  # Accelerate has none left to load


def _where(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same numbers in memory, and no part of each other's."""
    return tensor.device, tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype


def best_weights(out: Path, name: str = "") -> dict[str, Tensor]:
    """The weights of the best epoch."""
    return load_file(_paths(out)[1] / _best(name))


def _best(name: str) -> str:
    return f"best-{name}.safetensors" if name else "best.safetensors"


def _progress(name: str) -> str:
    return f"progress-{name}.json" if name else "progress.json"


def drop_checkpoint(out: Path) -> None:
    """The run is whole: its checkpoint is of no more use."""
    for path in _paths(out):
        shutil.rmtree(path, ignore_errors=True)


def _paths(out: Path) -> tuple[Path, Path, Path]:
    return out / f"{TEMPORARY}{_CHECKPOINT}", out / _CHECKPOINT, out / f"{TEMPORARY}old-{_CHECKPOINT}"


def _checkpoint_of(out: Path) -> Path | None:
    """The whole checkpoint of `out`, put back in place where a kill fell between the two renames."""
    _, place, old = _paths(out)
    if not place.exists() and old.exists():
        old.rename(place)
    return place if any(place.glob("progress*.json")) else None
