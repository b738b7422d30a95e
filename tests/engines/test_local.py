"""The pipeline: whatever fails in one of its parts ends it, whole shards stay, and the bytes are always the same."""

from __future__ import annotations

import hashlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from softlabels.cache import open_cache
from softlabels.cache.build import build_cache, plan_manifest, teacher_card
from softlabels.cache.format import DumpCard, FieldSpec
from softlabels.cache.writer import FieldShard
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import DumpReport, dump
from softlabels.engines.carry import Carrier
from softlabels.engines.local import ShardTask, Steps, Whole, ran_out_of_memory, run_shards
from softlabels.errors import CacheError, TeacherError
from softlabels.progress import Update, quiet
from softlabels.tasks import TaskLabels
from softlabels.tokens import pad_batch, tokenize
from softlabels.types import Example, TokenBatch
from tests.models import LABEL_NAMES, TEXTS, save_teacher, tiny_tokenizer

ROWS = [Example(f"row-{i}", text, None, name) for i, (text, name) in enumerate(TEXTS)]
SHARD = 8
FIELDS = {
    "logits": FieldSpec(kind="row", type="float32", width=2),
    "hidden.01": FieldSpec(kind="token", type="float16", width=4),
    "hidden.02": FieldSpec(kind="token", type="int8", width=4),
    "attention.01": FieldSpec(kind="pair", type="bfloat16", width=2, heads=2),
}


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert {thread.name for thread in set(threading.enumerate()) - before} == set()


def answers(batch: TokenBatch) -> dict[str, Tensor]:
    """A teacher that is a formula: every value follows from its token, so no batching shows in it."""
    ids, mask = batch.input_ids.float(), batch.attention_mask
    tokens = torch.stack([ids, ids.sqrt(), -ids / 7, ids + 0.25], dim=-1)  # (B, L, 4)
    tokens = tokens.masked_fill(mask[:, :, None] == 0, torch.nan)  # what padding may hold
    pairs = (ids[:, :, None] - ids[:, None, :])[:, None].repeat(1, 2, 1, 1) / 100
    return {
        "logits": (ids * mask).sum(1)[:, None].repeat(1, 2),
        "hidden.01": tokens,
        "hidden.02": tokens * 3,
        "attention.01": pairs,
    }


def steps_of(tokenizer: PreTrainedTokenizerFast, take: Callable[[TokenBatch], dict[str, Tensor]] = answers) -> Steps:
    return Steps(
        tokenize=lambda task: tokenize(tokenizer, task.examples, max_length=64, labels=task.labels.classes),
        pad=lambda examples: pad_batch(examples, pad_token_id=0),
        take=take,
        device=torch.device("cpu"),
    )


def run(
    out: Path,
    steps: Steps,
    tokenizer: PreTrainedTokenizerFast,
    *,
    update: Update = lambda rows, /, **figures: None,
    committed: Callable[[Whole], object] = lambda whole: None,
) -> int:
    manifest = plan_manifest(
        Corpus(source="made", split=None, examples=ROWS, label_names=None),
        labelled=len(ROWS),
        teacher=teacher_card(tokenizer, name="t", weights_hash="0", label_names=["a", "b"]),
        tokenizer=tokenizer,
        dump=DumpCard(max_length=64, shard_rows=SHARD, batch_tokens=64, dtype="float32", text=True),
        fields=FIELDS,
    )
    with build_cache(out, manifest, tokenizer=tokenizer, config=None) as build, quiet():
        tasks = (
            ShardTask(
                shard, ROWS[shard * SHARD :][:SHARD], TaskLabels([0] * len(ROWS[shard * SHARD :][:SHARD])), missing
            )
            for shard in build.shards()
            if (missing := build.missing(shard))
        )
        budget = run_shards(steps, build, tasks, overflow="refuse", update=update, committed=committed)
        build.finish()
    return budget


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def whole(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "cache"
    run(out, steps_of(tokenizer), tokenizer)
    return out


def failing_after(calls: int, error: BaseException, work: Callable[..., Any]) -> Callable[..., Any]:
    count = 0

    def call(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return work(*args)

    return call


@pytest.mark.parametrize("part", ["tokenize", "pad", "take"])
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("calls", [0, 3])
def test_what_fails_in_one_part_ends_all_and_whole_shards_stay(
    tokenizer: PreTrainedTokenizerFast, whole: Path, tmp_path: Path, part: str, error: BaseException, calls: int
) -> None:
    good = steps_of(tokenizer)
    calls *= {"tokenize": 1, "pad": 3, "take": 3}[part]
    changed: Any = {part: failing_after(calls, error, getattr(good, part))}
    broken = replace(good, **changed)
    with pytest.raises(type(error)) as told:
        run(tmp_path / "cache", broken, tokenizer)
    assert told.value is error
    assert list((tmp_path / "cache").rglob(".tmp-*")) == []
    kept = {name: mark for name, mark in contents(tmp_path / "cache").items() if "/0" in name}
    assert (kept == {}) == (calls == 0) or part == "tokenize"
    assert kept.items() <= contents(whole).items()
    run(tmp_path / "cache", good, tokenizer)
    assert contents(tmp_path / "cache") == contents(whole)


def test_what_fails_in_writing_ends_the_dump_too(
    tokenizer: PreTrainedTokenizerFast, whole: Path, tmp_path: Path
) -> None:
    def broken(batch: TokenBatch) -> dict[str, Tensor]:
        values = answers(batch)
        seen.append(len(values))
        if len(seen) > 8:
            values["hidden.01"][0, 0, 0] = torch.inf
        return values

    seen: list[int] = []
    with pytest.raises(CacheError, match=r"NaN or infinite values in field 'hidden\.01' for example\(s\) row-"):
        run(tmp_path / "cache", steps_of(tokenizer, broken), tokenizer)
    assert list((tmp_path / "cache").rglob(".tmp-*")) == []
    run(tmp_path / "cache", steps_of(tokenizer), tokenizer)
    assert contents(tmp_path / "cache") == contents(whole)


def test_a_shard_is_made_whole_while_the_next_is_written(
    tokenizer: PreTrainedTokenizerFast, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No field of the first shard is made whole before values of the second have been written."""
    second_is_written = threading.Event()
    write, commit, waited = FieldShard.write, FieldShard.commit, []

    def told(writer: FieldShard, *args: Any, **named: Any) -> None:
        write(writer, *args, **named)
        if writer.shard == 1:
            second_is_written.set()

    def late(writer: FieldShard, join: str) -> Any:
        if writer.shard == 0:
            waited.append(second_is_written.wait(30))
        return commit(writer, join)

    monkeypatch.setattr(FieldShard, "write", told)
    monkeypatch.setattr(FieldShard, "commit", late)
    run(tmp_path / "cache", steps_of(tokenizer), tokenizer)
    assert waited == [True] * len(FIELDS)
    assert contents(tmp_path / "cache") == contents(whole)


def test_a_shard_is_told_to_be_whole_soon_and_after_its_rows(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """While the next one is with the teacher, and with as many rows and tokens as had been told of it."""
    told: list[Any] = []

    def take(batch: TokenBatch) -> dict[str, Tensor]:
        time.sleep(0.05)
        return answers(batch)

    def update(rows: int, /, **figures: float) -> None:
        told.append((rows, int(figures["tokens"])))

    run(tmp_path / "cache", steps_of(tokenizer, take), tokenizer, update=update, committed=told.append)
    wholes = [one for one in told if isinstance(one, Whole)]
    assert [one.shard for one in wholes] == list(range(-(-len(ROWS) // SHARD)))
    rows = tokens = rows_told = tokens_told = 0
    for one in told:
        if isinstance(one, Whole):
            rows, tokens = rows + one.rows, tokens + one.tokens
            assert rows_told >= rows and tokens_told >= tokens
            if one is not wholes[-1]:
                assert rows_told < rows + SHARD  # the next one's last batch is yet to come
        else:
            rows_told, tokens_told = rows_told + one[0], tokens_told + one[1]
    assert (rows, tokens) == (rows_told, tokens_told) and rows == len(ROWS)


@pytest.mark.parametrize("shard", [0, 2, len(ROWS) // SHARD])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
def test_what_fails_while_a_shard_is_made_whole_ends_the_dump(
    tokenizer: PreTrainedTokenizerFast,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shard: int,
    error: BaseException,
) -> None:
    commit = FieldShard.commit

    def broken(writer: FieldShard, join: str) -> Any:
        if writer.shard == shard and writer.field == "hidden.02":
            raise error
        return commit(writer, join)

    with monkeypatch.context() as patched:
        patched.setattr(FieldShard, "commit", broken)
        with pytest.raises(type(error)) as told:
            run(tmp_path / "cache", steps_of(tokenizer), tokenizer)
    assert told.value is error
    assert list((tmp_path / "cache").rglob(".tmp-*")) == []
    there = {path.stem for path in (tmp_path / "cache" / "hidden.02").glob("*.json") if path.stem != "field"}
    assert there == {f"{number:05d}" for number in range(shard)}
    run(tmp_path / "cache", steps_of(tokenizer), tokenizer)
    assert contents(tmp_path / "cache") == contents(whole)


def test_no_more_batches_are_held_than_there_is_room_for(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk makes the teacher wait: the values of two batches are alive, and of a third while it is made."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def take(batch: TokenBatch) -> dict[str, Tensor]:
        nonlocal most
        values = answers(batch)
        alive.append(weakref.ref(values["attention.01"]))
        most = max(most, sum(one() is not None for one in alive))
        return values

    real = FieldShard._write_at

    def slow(*args: Any) -> None:
        time.sleep(0.0002)
        real(*args)

    monkeypatch.setattr(FieldShard, "_write_at", slow)
    run(tmp_path / "cache", steps_of(tokenizer, take), tokenizer)
    assert len(alive) > 10 and most <= 2


# ------------------------------------------------------------------------------------------------------- off the device


@pytest.mark.parametrize("type_", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["row", "token", "pair"])
def test_the_way_off_a_gpu_gives_the_same_bytes(tmp_path: Path, kind: str, type_: str) -> None:
    if kind == "pair" and type_ == "int8":
        pytest.skip("int8 has no pair fields")
    spec = FieldSpec.model_validate({"kind": kind, "type": type_, "width": 3})
    lengths = np.array([5, 2, 7, 1, 4, 3])
    shapes = {"row": lambda n: (3,), "token": lambda n: (n, 3), "pair": lambda n: (3, n, n)}
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(shapes[kind](n), generator=generator) for n in lengths.tolist()]
    carriers = {
        "as it is": Carrier(torch.device("cpu"), {"f": spec}, slots=2),
        "staged": Carrier(torch.device("cpu"), {"f": spec}, slots=2, staged=True),
    }
    for name, carrier in carriers.items():
        writer = FieldShard(tmp_path / name, "f", spec, shard=0, tokens=lengths)
        carried = []
        for numbers, padding in ((np.array([2, 0]), 0.0), (np.array([4, 5]), torch.nan), (np.array([1, 3]), 1e30)):
            longest = int(lengths[numbers].max())
            values = torch.full((2, *shapes[kind](longest)), padding)
            for i, row in enumerate(numbers):
                values[i][tuple(slice(size) for size in rows[row].shape)] = rows[row]
            carried.append((carrier.leave({"f": values}), numbers))
            if len(carried) == 2:  # one waits while the other is on its way
                first, its = carried.pop(0)
                first.write({"f": writer}, its, ids=["a", "b"])
        carried[0][0].write({"f": writer}, carried[0][1], ids=["a", "b"])
        writer.commit("0" * 32)
    one, other = (tmp_path / name / "f" / "00000.arrow" for name in carriers)
    assert one.read_bytes() == other.read_bytes()
    if type_ == "float32":  # and the same as row by row
        writer = FieldShard(tmp_path / "rows", "f", spec, shard=0, tokens=lengths)
        for row, values in enumerate(rows):
            writer.put(row, values.numpy())
        writer.commit("0" * 32)
        assert writer.path.read_bytes() == one.read_bytes()


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 65_505.0, -1e6])
def test_the_way_off_a_gpu_refuses_what_does_not_fit(tmp_path: Path, value: float) -> None:
    spec = FieldSpec(kind="token", type="float16", width=2)
    told = []
    for staged in (False, True):
        writer = FieldShard(tmp_path, "f", spec, shard=0, tokens=np.array([2, 1]))
        values = torch.ones(2, 2, 2)
        values[1, 0, 1] = value
        carried = Carrier(torch.device("cpu"), {"f": spec}, slots=1, staged=staged).leave({"f": values})
        with pytest.raises(CacheError, match=r"example\(s\) second") as error:
            carried.write({"f": writer}, np.array([0, 1]), ids=["first", "second"])
        told.append(str(error.value))
        writer.discard()
    assert told[0] == told[1]


def test_values_that_do_not_lie_as_the_field_says_are_our_own_fault(tmp_path: Path) -> None:
    spec = FieldSpec(kind="token", type="float16", width=2)
    writer = FieldShard(tmp_path, "f", spec, shard=0, tokens=np.array([2, 1]))
    for shape in ((2, 1, 2), (2, 2, 3), (1, 2, 2), (2, 2)):
        with pytest.raises(ValueError, match="do not lie in values of shape"):
            writer.write(np.array([0, 1]), torch.ones(shape), ids=["a", "b"])
    writer.discard()


# -------------------------------------------------------------------------------------------------------- out of memory


def test_how_memory_runs_out() -> None:
    with pytest.raises(RuntimeError) as told:
        torch.empty(1 << 58)
    assert ran_out_of_memory(told.value)
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert not ran_out_of_memory(RuntimeError("shapes do not match")) and not ran_out_of_memory(ValueError())


class Memory:
    """Lets BERT's forward pass run out of memory, as torch says it, for batches of more than `tokens` tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
        self.tokens, self.failed, self.passed = tokens, 0, 0
        real = BertForSequenceClassification.forward

        def forward(model: Any, input_ids: Tensor, **named: Any) -> Any:
            if input_ids.numel() > self.tokens:
                self.failed += 1
                torch.empty(1 << 58)
            self.passed += 1
            return real(model, input_ids, **named)

        monkeypatch.setattr(BertForSequenceClassification, "forward", forward)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


def dump_of(teacher: Path, out: Path, **changes: Any) -> DumpReport:
    options = {"capture": ["logits", "hidden:1,2", "qkv:2"], "shard_rows": 16, "batch_tokens": 512, "codec": "float32"}
    corpus = Corpus(source="made", split=None, examples=ROWS, label_names=LABEL_NAMES)
    given = DumpOptions.model_validate(options | changes)
    return dump(corpus, teacher=str(teacher), out=out, options=given, device="cpu")


def test_out_of_memory_halves_the_budget_and_goes_on(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dump_of(teacher, tmp_path / "easy").batch_tokens == 512
    with monkeypatch.context() as patched:
        memory = Memory(patched, tokens=100)
        report = dump_of(teacher, tmp_path / "tight")
    assert 32 < report.batch_tokens <= 100 and memory.failed <= 4 < memory.passed
    rows = np.arange(len(ROWS))
    easy, tight = open_cache(tmp_path / "easy"), open_cache(tmp_path / "tight")
    names = list(easy.fields)
    one, other = easy.signals(rows, names), tight.signals(rows, names)
    for name in names:
        assert torch.allclose(one.get(name), other.get(name), atol=1e-5), name
    assert easy.manifest.dump == tight.manifest.dump
    same = {name for name in contents(tmp_path / "easy") if name.startswith("examples/")}
    assert all(contents(tmp_path / "easy")[name] == contents(tmp_path / "tight")[name] for name in same)


def test_a_row_that_does_not_fit_alone_is_named(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Memory(monkeypatch, tokens=14)
    with pytest.raises(TeacherError, match=r"memory ran out on cpu for example row-\d+ alone, of \d+ tokens"):
        dump_of(teacher, tmp_path / "cache")
    assert list((tmp_path / "cache").rglob(".tmp-*")) == []


def test_another_fault_of_the_teacher_is_no_matter_of_memory(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    real = BertForSequenceClassification.forward

    def forward(model: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count > 5:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return real(model, **named)

    monkeypatch.setattr(BertForSequenceClassification, "forward", forward)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        dump_of(teacher, tmp_path / "cache")
