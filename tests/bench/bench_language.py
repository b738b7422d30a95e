"""Students of a language model, from full logits and from the top 32: what their perplexity loses.

Run it:  make bench      or  python -m tests.bench.bench_language [--seconds 600] [--model DIR] [--rows N] [--ce W]

The teacher is bench_vocab's: GPT-2-shaped, trained here on three novels (with `--model DIR` it is kept and used again).
It is dumped over passages of these in each form; a student of one layer learns from each cache alone, by KL at T = 2
(`--ce` adds the tokens themselves), from the same first weights in the same order; a fourth novel is held out and gives
the perplexity. With factors the tail is spread as the cache's factor model of the teacher expects it; `topk=32` has it
as one bucket; `renormalised` is what is usually done with a top k: the same cache, the teacher made to sum to 1 inside.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from softlabels.cache import open_cache
from softlabels.config import DumpOptions, StudentOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.losses import LANGUAGE_LOSSES, LanguageLoss
from softlabels.perplexity import evaluate_language_model
from softlabels.progress import quiet
from softlabels.train import train_student
from softlabels.truncated import TruncatedLogits
from softlabels.types import Example, Signals
from tests.bench.bench_vocab import CORPORA, HELD_OUT, TRAINING, make_teacher

WORDS = 80  # of a passage
UNSEEN = "Ā"  # the byte 0, as a byte-level vocabulary writes it: in no text
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # nothing is seen often enough to overfit
FORMS = {
    "full logits": "vocab:exact",
    "topk=32, factors": "vocab:topk=32,factors=64",
    "topk=32": "vocab:topk=32",
    "renormalised top 32": "vocab:topk=32",
}
MORE_FORMS = {
    "topk=32, factors, packed": "vocab:topk=32,factors=64,packed",
    "topk=32, 2 samples": "vocab:topk=32,samples=2",
    "topk=32, factors, 2 samples": "vocab:topk=32,samples=2,factors=64",
}


def passages(corpora: Path, names: tuple[str, ...], rows: int) -> Corpus:
    """Passages of WORDS words, spread evenly over the books; with their line ends, which the teacher learned too."""
    found = []
    for name in names:
        text = (corpora / "lm_english_novels" / f"{name}.txt").read_text(encoding="utf-8")
        words = [word.start() for word in re.finditer(r"\S+", text)]
        starts = range(0, len(words) - WORDS, WORDS)
        step = max(1, len(starts) * len(names) // rows)
        found += [Example(f"{name}/{at}", text[words[at] : words[at + WORDS]]) for at in list(starts)[::step]]
    return Corpus(source="novels", split=None, examples=found[:rows], label_names=None)


def renormalised(student: Signals, teacher: Signals, *, temperature: float) -> Tensor:
    """T² · KL inside the top k, the teacher made to sum to 1 there."""
    kept = cast(TruncatedLogits, teacher.vocabulary)
    p = (kept.values / temperature).log_softmax(1)
    q = (student.logits / temperature).log_softmax(1).gather(1, kept.ids)
    return (p.exp() * (p - q)).sum(1).mean() * temperature**2


@contextmanager
def loss_called_kl(loss: LanguageLoss | None) -> Iterator[None]:
    table = cast(dict[str, LanguageLoss], LANGUAGE_LOSSES)
    before = table["kl"]
    if loss is not None:
        table["kl"] = loss
    try:
        yield
    finally:
        table["kl"] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="of the teacher's training")
    parser.add_argument("--model", type=Path, default=None, help="keep the teacher there")
    parser.add_argument("--corpora", type=Path, default=CORPORA)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ce", type=float, default=0.0, help="weight of the tokens themselves; KL has the rest")
    parser.add_argument(
        "--lr", type=float, default=1e-3, help="the students'; at 3e-3 a seed moves perplexity by 5 %% (%(default)s)"
    )
    parser.add_argument(
        "--only", default=None, help="some of the forms, by their names, with semicolons between; full logits first"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--more", action="store_true", help="sampled and packed forms too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not (given.corpora / "lm_english_novels").is_dir():
        print(f"skipped: no folder {given.corpora / 'lm_english_novels'}")
        return
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folder = given.model or place / "teacher"
        made = make_teacher(given.corpora, given.seconds, folder)
        print(f"teacher: perplexity {made.perplexity:.1f} on held-out windows")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), eos_token=UNSEEN, model_max_length=128
        )
        tokenizer.save_pretrained(folder)
        corpus = passages(given.corpora, TRAINING, given.rows)
        held_out = passages(given.corpora, (HELD_OUT,), 200)
        found: dict[str, list[float]] = {}
        print(f"\n{'':<29}{'B/token':>9}{'perplexity':>12}{'beside full':>13}{'s':>7}", flush=True)
        forms = FORMS | MORE_FORMS if given.more or given.only else FORMS
        for title, form in forms.items():
            if given.only and title not in given.only.split(";"):
                continue
            cache_folder = place / form.replace(":", "-")
            with quiet():
                dump(corpus, teacher=str(folder), out=cache_folder, options=DumpOptions(capture=[form], shard_rows=500))
            cache = open_cache(cache_folder)
            assert cache.targets is not None
            size = sum(cache.manifest.shards[field].total for field in cache.fields) / cache.targets.sum()
            started = time.perf_counter()
            for seed in range(given.seeds):
                options = StudentOptions(
                    student="transformer",
                    options={"layers": 1, "hidden_size": 64, "heads": 4} | NO_DROPOUT,
                    losses={"kl": 1 - given.ce, "ce": given.ce} if given.ce else {"kl": 1.0},
                    temperature="2",
                    epochs=given.epochs,
                    batch_size=2,
                    lr=given.lr,
                    validation=0.0,
                    seed=seed,
                )
                out = place / f"run {title} {seed}"
                with quiet(), loss_called_kl(renormalised if title.startswith("renorm") else None):
                    train_student(cache, out=out, options=options, cpu=True)
                found.setdefault(title, []).append(evaluate_language_model(out, held_out).perplexity)
                print(f"  {title}, seed {seed}: {found[title][-1]:.2f}", flush=True)
            mean, full = statistics.mean(found[title]), statistics.mean(found["full logits"])
            seconds = (time.perf_counter() - started) / given.seeds
            print(f"{title:<29}{size:>9.0f}{mean:>12.2f}{mean / full - 1:>12.2%} {seconds:>6.0f}", flush=True)
        print(f"\n{time.perf_counter() - began:.0f} s in all, {given.threads} threads")
        print("perplexity: mean over seeds " + ", ".join(f"{t}: {[round(x, 1) for x in v]}" for t, v in found.items()))


if __name__ == "__main__":
    main()
