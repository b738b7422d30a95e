"""What ONNX and int8 make of a student: ms a text, size and macro-F1, against PyTorch in float32.

Run it:  make bench      or  python -m tests.bench.bench_export [--students bilstm,transformer] [--rows 6000]
                             [--folder DIR] [--small]

On shared SST-2: the teacher and its cache are bench_quality's (with its --folder they are taken from there), a BiLSTM
and a transformer of 2 of MiniLM's layers learn from the cache as recipe hinton says. Each text is read alone on one
thread by each of the three forms in turn, tokenisation included, so that a busy machine slows all; ms are medians over
300 texts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.bench_quality import CORPORA, MINILM, SMALL, TASKS, make_teacher

STUDENTS: dict[str, dict[str, Any]] = {
    "bilstm": {"student": "bilstm", "options": {"word_vectors": "fit"}, "lr": 3e-3, "epochs": 3},
    "transformer": {"student": "transformer", "options": {"init_layers": [1, 6]}, "lr": 3e-4, "epochs": 2},
}
HINTON = {"losses": {"kl": 0.7, "ce": 0.3}, "temperature": "3", "batch_size": 64, "validation": 0.05}
TEXTS, WARM = 300, 10


def make_forms(name: str, task: Path, out: Path, rows: int) -> dict[str, Path]:
    """The trained student, and what it is exported as; made where they are missing."""
    from softlabels.cache import open_cache
    from softlabels.config import StudentOptions
    from softlabels.export import export
    from softlabels.pretrained import resolve_pretrained
    from softlabels.train import train_student

    forms = {"PyTorch float32": out / name, "ONNX float32": out / f"{name}-onnx", "ONNX int8": out / f"{name}-int8"}
    settings = STUDENTS[name] | HINTON | {"rows": rows}
    if name == "transformer":
        settings["options"] = settings["options"] | {"init_from": str(resolve_pretrained(MINILM))}
    if not (out / name / "run.json").exists():
        options = StudentOptions.model_validate(settings)
        train_student(open_cache(task / "cache"), out=out / name, options=options, resume=True, cpu=True)
    for form, run in list(forms.items())[1:]:
        if not (run / "run.json").exists():
            export(out / name, out=run, int8=form.endswith("int8"))
    return forms


def measure(forms: dict[str, Path], test: Path) -> dict[str, dict[str, float]]:
    """ms a text, macro-F1 in %, bytes of each form."""
    import numpy as np
    import torch
    from sklearn.metrics import f1_score

    from softlabels.corpus import encode_labels, read_corpus
    from softlabels.runs import load_run
    from softlabels.students.exported import OnnxStudent

    torch.set_num_threads(1)
    corpus, runs = read_corpus(test), {form: load_run(run) for form, run in forms.items()}
    for form, run in runs.items():
        if isinstance(run.student, OnnxStudent):
            runs[form] = replace(run, student=run.student.with_threads(1))
    times: dict[str, list[float]] = {form: [] for form in runs}
    step = max(1, len(corpus.examples) // TEXTS)
    chosen = corpus.examples[::step][:TEXTS]
    for example in (*chosen[:WARM], *chosen):
        for form, run in runs.items():
            started = time.perf_counter()
            run.logits([example])
            times[form].append(1000 * (time.perf_counter() - started))
    labels = np.array(encode_labels(corpus.examples, next(iter(runs.values())).label_names))
    said = {form: run.logits(corpus.examples).argmax(1) for form, run in runs.items()}
    first = next(iter(said.values()))
    return {
        form: {
            "ms": statistics.median(times[form][WARM:]),
            "f1": 100 * f1_score(labels, said[form], average="macro"),
            "bytes": run.size_on_disk,
            "same": 100 * float((said[form] == first).mean()),
        }
        for form, run in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", default=",".join(STUDENTS))
    parser.add_argument("--rows", type=int, default=6000, help="of the cache, that the students learn from")
    parser.add_argument("--folder", type=Path, default=None, help="bench_quality's, or a new one; what is made stays")
    parser.add_argument("--small", action="store_true", help="a trial of the benchmark itself")
    given = parser.parse_args()
    if not (CORPORA / "sst2").is_dir():
        print(f"skipped: no folder {CORPORA / 'sst2'}")
        return
    from softlabels.progress import quiet

    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        make_teacher("sst2", SMALL if given.small else TASKS["sst2"], folder / "sst2")
        print(
            f"{'student':12} {'form':16} {'ms/text':>8} {'faster':>7} {'size MB':>8} {'macro-F1':>9} {'same class':>11}"
        )
        for name in given.students.split(","):
            with quiet():
                forms = make_forms(name, folder / "sst2", folder / "export", given.rows)
            found = measure(forms, folder / "sst2" / "test.jsonl")
            plain = found["PyTorch float32"]["ms"]
            for form, figures in found.items():
                print(
                    f"{name:12} {form:16} {figures['ms']:8.2f} {plain / figures['ms']:6.1f}x "
                    f"{figures['bytes'] / 1e6:8.1f} {figures['f1']:9.2f} {figures['same']:10.1f}%",
                    flush=True,
                )


if __name__ == "__main__":
    main()
