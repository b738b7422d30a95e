"""Vocabulary-sized logits: the bytes, and how near to the teacher's distribution they come at any temperature.

Run it:  make bench      or  python -m tests.bench.bench_vocab [--seconds 150] [--model DIR] [--corpora DIR]

A GPT-2-shaped model with a byte-level BPE of 16,384 of its own learns three novels for `--seconds` on one thread; a
fourth, held out, gives 256 positions. With `--model DIR` it is kept there and used again.

p is the teacher's distribution at temperature T, r what can be rebuilt from the bytes: the top k as stored, the tail's
mass spread evenly over the tail's ids. Methods:
  exact        the last hidden state in float16, through the output head again
  topk=K       what the library keeps, by either codec, with 2 (packed: 1 or more) sampled tail tokens, unused here
  renormalised the top K alone, float16, made to sum to 1: what top-k distillation usually does
  sampled N    RS-KD (Anshumann et al. 2025): N draws from p at T = 1, their counts as r; for other T, r^(1/T) made to
               sum to 1. 3 bytes a distinct token (17 bits and 7)
Errors: KL(p ‖ r), mean over positions, infinite where r has none of p's mass; the total variation ½ Σ |p − r|, mean;
and the tail's mass, largest |p − r| over positions: outside a method's own top K (sampled: outside the top 32).
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from softlabels.cache.vocab_packed import Packing, pack, packed_samples, unpack
from softlabels.cache.vocab_plain import from_plain, plain_samples, to_plain
from softlabels.truncated import TruncatedLogits, tail_logsumexp_at, truncate

CORPORA = Path(os.environ.get("SOFTLABELS_CORPORA", Path(__file__).parents[2] / ".." / "shared" / "corpora"))
TRAINING, HELD_OUT = ("anna-karenina", "david-copperfield", "middlemarch"), "pride-and-prejudice"
VOCAB_SIZE, WIDTH, LENGTH = 16_384, 128, 128
BATCH, RATE, NEGATIVES = 8, 3e-3, 1536  # of the training
POSITIONS = 256
ASKED = (0.5, 1.0, 1.3, 2.0, 3.0, 4.0, 8.0)
SMALL, LARGE = 114, 300  # bytes a token at which methods are compared; packed stays below


# ---------------------------------------------------------------------------------------------------- the teacher


def train_tokenizer(texts: list[Path]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train(
        [str(text) for text in texts],
        trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def windows(tokenizer: Tokenizer, texts: list[Path]) -> Tensor:
    """(N, LENGTH + 1) ids, each window's last the next one's first."""
    ids = torch.tensor([i for text in texts for i in tokenizer.encode(text.read_text(encoding="utf-8")).ids])
    return ids.unfold(0, LENGTH + 1, LENGTH)


def train_model(data: Tensor, seconds: float):
    """GPT-2-shaped, 2 layers, for as long as it may take; the learning rate follows the clock.

    The head costs most. For the first 85 % of the time it sees NEGATIVES sampled tokens, whose importance weights give
    the softmax's denominator (Jean et al. 2015, "On using very large target vocabulary for neural machine translation",
    section 3), and takes many more steps; then the whole vocabulary.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2",
        vocab_size=VOCAB_SIZE,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    chances = torch.bincount(data.flatten(), minlength=VOCAB_SIZE).double() ** 0.75 + 1
    chances /= chances.sum()
    start, step, order = time.perf_counter(), 0, torch.empty(0)
    while (gone := (time.perf_counter() - start) / seconds) < 1:
        at = step % (len(data) // BATCH) * BATCH
        order = torch.randperm(len(data)) if at == 0 else order
        batch = data[order[at : at + BATCH]]  # (B, L + 1)
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 50) * (1 - gone)
        states = model.transformer(batch[:, :-1]).last_hidden_state.flatten(0, 1)  # (T, D)
        loss = (sampled_loss if gone < 0.85 else full_loss)(states, model.lm_head.weight, batch[:, 1:], chances)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"  {step} steps, {time.perf_counter() - start:.0f} s, loss {loss.item():.2f}", flush=True)
    return model.eval()


def full_loss(states: Tensor, weight: Tensor, targets: Tensor, _: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(states @ weight.T, targets.flatten())


def sampled_loss(states: Tensor, weight: Tensor, targets: Tensor, chances: Tensor) -> Tensor:
    """Cross entropy; its denominator is the target's term and the others', estimated from tokens drawn by `chances`."""
    drawn, wanted = torch.multinomial(chances, NEGATIVES, replacement=True), targets.flatten()
    others = states @ weight[drawn].T - (NEGATIVES * chances[drawn]).log().float()  # (T, NEGATIVES)
    others = others.masked_fill(drawn == wanted[:, None], -1e9)
    right = (states * weight[wanted]).sum(dim=1, keepdim=True)
    return (torch.cat([right, others], dim=1).logsumexp(dim=1, keepdim=True) - right).mean()


@dataclass(frozen=True)
class Teacher:
    logits: Tensor  # (T, V) float32, at held-out positions
    rebuilt: Tensor  # (T, V) float32, by the head from the hidden states in float16
    perplexity: float


def make_teacher(corpora: Path, seconds: float, folder: Path | None) -> Teacher:
    books = {name: corpora / "lm_english_novels" / f"{name}.txt" for name in (*TRAINING, HELD_OUT)}
    if folder is not None and (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    else:
        tokenizer = train_tokenizer([books[name] for name in TRAINING])
        data = windows(tokenizer, [books[name] for name in TRAINING])
        print(f"training on {data.numel():,} tokens for {seconds:.0f} s")
        model = train_model(data, seconds)
        if folder is not None:
            model.save_pretrained(folder)
            tokenizer.save(str(folder / "tokenizer.json"))
    held_out = windows(tokenizer, [books[HELD_OUT]])
    held_out = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(1))[:64]]
    with torch.no_grad():
        hidden = model.transformer(held_out[:, :-1]).last_hidden_state.flatten(0, 1)  # (T, D)
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), held_out[:, 1:].flatten())
        some = hidden[torch.randperm(len(hidden), generator=torch.Generator().manual_seed(2))[:POSITIONS]]
        return Teacher(model.lm_head(some), model.lm_head(some.half().float()), math.exp(loss.item()))


# ---------------------------------------------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Method:
    """`rebuild(T)` gives r (positions, V) float64; `top` (positions, V) bool says what isn't its tail."""

    name: str
    bytes: float
    rebuild: Callable[[float], Tensor]
    top: Tensor


def top_mask(ids: Tensor, vocab_size: int) -> Tensor:
    return torch.zeros(len(ids), vocab_size, dtype=torch.bool).scatter_(1, ids, True)


def stored(name: str, width: float, target: TruncatedLogits) -> Method:
    def rebuild(temperature: float) -> Tensor:
        rest = tail_logsumexp_at(target, temperature).double()[:, None]
        scores = torch.cat([target.values.double() / temperature, rest], dim=1).softmax(dim=1)
        even = (scores[:, -1:] / target.tail_count).expand(-1, target.vocab_size)
        return even.scatter(1, target.ids, scores[:, :-1])

    return Method(name, width, rebuild, top_mask(target.ids, target.vocab_size))


def plain(logits: Tensor, k: int) -> Method:
    generator = torch.Generator().manual_seed(3)
    arrays = to_plain(truncate(logits, k=k, samples=plain_samples(logits.shape[1]), generator=generator))
    width = sum(array.nbytes for array in arrays.values()) / len(logits)
    return stored(f"topk={k} plain", width, from_plain(arrays, logits.shape[1]))


def packed(logits: Tensor, k: int, room: int | None = None) -> Method:
    vocab_size = logits.shape[1]
    samples = 1 if room is None else packed_samples(vocab_size, k, room=room)
    generator = torch.Generator().manual_seed(3)
    content = pack(truncate(logits, k=k, samples=samples, generator=generator))
    return stored(f"topk={k} packed", content.shape[1], unpack(content, Packing(vocab_size, k, samples)))


def renormalised(logits: Tensor, k: int) -> Method:
    values, ids = logits.topk(k, dim=1)
    values = values.half().double()
    empty = torch.zeros(logits.shape, dtype=torch.float64)
    return Method(
        f"renormalised {k}",
        k * 4,
        lambda temperature: empty.scatter(1, ids, (values / temperature).softmax(dim=1)),
        top_mask(ids, logits.shape[1]),
    )


def sampled(logits: Tensor, draws: int) -> Method:
    drawn = torch.multinomial(logits.softmax(1), draws, replacement=True, generator=torch.Generator().manual_seed(4))
    counts = torch.zeros(logits.shape, dtype=torch.float64).scatter_add(1, drawn, torch.ones(drawn.shape).double())

    def rebuild(temperature: float) -> Tensor:
        powers = counts ** (1 / temperature)
        return powers / powers.sum(1, keepdim=True)

    width = 3 * (counts > 0).sum(1).double().mean().item()
    return Method(f"sampled {draws}", width, rebuild, top_mask(logits.topk(32, dim=1).indices, logits.shape[1]))


# ------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Errors:
    kl: float
    variation: float
    tail: float


def measure(logits: Tensor, method: Method, temperature: float) -> Errors:
    log_p = (logits.double() / temperature).log_softmax(dim=1)
    p, r = log_p.exp(), method.rebuild(temperature)
    kl = (p * (log_p - r.log())).sum(dim=1).mean().item()
    tail = (p - r).masked_fill(method.top, 0).sum(dim=1).abs().max().item()
    return Errors(kl, (p - r).abs().sum(dim=1).mean().item() / 2, tail)


def figure(number: float) -> str:
    return "∞" if math.isinf(number) else f"{number:.1e}" if number < 0.01 else f"{number:.3f}"


def print_table(title: str, methods: list[Method], errors: dict[str, list[Errors]], pick: str) -> None:
    print(f"\n{title}\n\n| method | B/token | " + " | ".join(f"T={t:g}" for t in ASKED) + " |")
    print("|---" * (len(ASKED) + 2) + "|")
    for method in methods:
        row = " | ".join(figure(max(getattr(each, pick), 0.0)) for each in errors[method.name])
        print(f"| {method.name} | {method.bytes:.0f} | {row} |")


def print_verdict(room: int, ours: str, others: list[str], errors: dict[str, list[Errors]]) -> None:
    for other in others:
        for pick, what in [("kl", "KL"), ("variation", "total variation")]:
            pairs = [(getattr(a, pick), getattr(b, pick)) for a, b in zip(errors[ours], errors[other], strict=True)]
            smaller = "smaller at every T" if all(a < b for a, b in pairs) else "NOT smaller at every T"
            ratios = ", ".join("∞" if math.isinf(b) else f"{b / a:.2f}" for a, b in pairs)
            print(f"at {room} B: {what} of {ours} against {other}: {smaller} (theirs / ours: {ratios})")


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes and errors of stored vocabulary logits")
    parser.add_argument("--corpora", type=Path, default=CORPORA)
    parser.add_argument("--seconds", type=float, default=150, help="of training")
    parser.add_argument("--model", type=Path, help="a folder to keep the trained model in, or to take it from")
    options = parser.parse_args()
    if not (options.corpora / "lm_english_novels").exists():
        print(f"skipped: {options.corpora / 'lm_english_novels'} is not here; give the folder by --corpora")
        return
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    teacher = make_teacher(options.corpora, options.seconds, options.model)
    logits = teacher.logits
    print(f"held-out perplexity {teacher.perplexity:.0f}; vocabulary {VOCAB_SIZE:,}; {len(logits)} positions")

    start = time.perf_counter()
    target = truncate(logits, k=32, samples=2, generator=torch.Generator())
    middle = time.perf_counter()
    content = pack(target)
    end = time.perf_counter()
    unpack(content, Packing(VOCAB_SIZE, 32, 2))
    done = time.perf_counter()
    micro = [1e6 * seconds / len(logits) for seconds in (middle - start, end - middle, done - end)]
    print(f"microseconds a token, k=32: truncate {micro[0]:.0f}, pack {micro[1]:.0f}, unpack {micro[2]:.0f}")

    rebuilt = teacher.rebuilt.double()
    everything = torch.ones(logits.shape, dtype=torch.bool)
    methods = [Method("exact", 2 * WIDTH, lambda temperature: (rebuilt / temperature).softmax(dim=1), everything)]
    methods += [make(logits, k) for k in (16, 32, 64, 128) for make in (plain, packed)]
    methods += [plain(logits, 20), plain(logits, 67), packed(logits, 96, LARGE - 1)]
    methods += [renormalised(logits, k) for k in (28, 32, 75, 128)]
    methods += [sampled(logits, draws) for draws in (16, 50, 200)]
    errors = {method.name: [measure(logits, method, temperature) for temperature in ASKED] for method in methods}
    print_table("KL(p ‖ r), nats", methods, errors, "kl")
    print_table("Total variation", methods, errors, "variation")
    print_table("Tail mass, largest error", methods, errors, "tail")
    print()
    print_verdict(SMALL, "topk=32 packed", ["topk=20 plain", "renormalised 28"], errors)
    print_verdict(LARGE, "topk=96 packed", ["topk=67 plain", "renormalised 75"], errors)


if __name__ == "__main__":
    main()
