"""What the commands print for people: reports come in, tables and lines of text go out. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def plan_table(plan) -> str:
    def way(size: int | None) -> str:
        return "not given by this model" if size is None else show_size(size)

    speed, pay, disk = plan.speed, plan.payback, plan.disk
    facts: dict[str, Any] = {
        "teacher": f"{plan.teacher} ({plan.task})",
        "rows": f"{plan.rows:,}, of which {plan.sampled:,} were looked at",
        "tokens": f"{plan.tokens:,}",
        "rows cut": f"{100 * plan.truncated:.1f} %",
        "bare forward": f"{speed.rows_per_second:,.1f} rows/s, {_duration(speed.seconds)} ({speed.device})",
        "with captures": f"{speed.rows_per_second_captured:,.1f} rows/s, {_duration(speed.seconds_captured)}",
    }
    if speed.rows_opened_per_second is not None:
        facts["images opened"] = (
            f"{speed.rows_opened_per_second:,.1f} rows/s, ahead of the teacher, which waits for them"
        )
    if plan.maps is not None:
        layers = ", ".join(map(str, plan.maps.layers))
        facts["Q and K"] = f"{way(plan.maps.query_key_bytes)} for layer {layers}"
        facts["attention maps"] = f"{way(plan.maps.map_bytes)} for the same"
    facts["disk"] = f"{show_size(disk.free_bytes)} free at {disk.place}" + ("" if disk.fits else ": IT DOES NOT FIT")
    facts["paid for itself"] = (
        f"after {pay.epochs} epoch(s) of any students, or {pay.students} student(s) of {pay.epochs_each} epochs, each "
        f"of which would keep the teacher busy for {_duration(pay.seconds_each)}"
    )
    sizes = [[name, show_size(size), show_size(size / plan.rows)] for name, size in plan.fields.items()]
    sizes.append(["in all", show_size(plan.bytes), show_size(plan.bytes / plan.rows)])
    parts = [show_facts(facts), lay_out(["field", "size", "a row"], sizes)]
    if plan.kept_mass is not None:
        temperatures = list(next(iter(plan.kept_mass.values()), {}))
        rows = [[f"topk={k}", *(f"{mass[t]:.4f}" for t in temperatures)] for k, mass in plan.kept_mass.items()]
        parts.append(lay_out(["mass kept at", *(f"T={t:g}" for t in temperatures)], rows))
    return "\n\n".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def combine_table(report) -> str:
    if report.how == "rows":
        head, rows = ["cache", "teacher", "rows"], [[str(c.cache), c.teacher, f"{c.rows:,}"] for c in report.caches]
    else:
        head = ["cache", "teacher", "weight", "rows", "shared with the first", "lacks", "left out"]
        rows = [
            [
                str(share.cache),
                share.teacher,
                "–" if share.weight is None else f"{share.weight:.3g}",
                *(f"{count:,}" for count in (share.rows, share.shared, share.lacks, share.left_out)),
            ]
            for share in report.caches
        ]
    joined = sorted({share.joined_by for share in report.caches if share.joined_by})
    facts = {
        "how": report.how + (f", choosing by {report.choose}" if report.choose else ""),
        "rows joined by": "; ".join(joined) or None,
        **{name: getattr(report, name) for name in ("cache", "rows", "new_rows", "fields", "seconds", "bytes")},
    }
    return f"{lay_out(head, rows)}\n\n{show_facts(facts)}"


def fidelity_table(found) -> str:
    head = ["field", "stored as", "typical", "off at most", "mean", "noise at most", "beyond codec", "allowed", ""]
    rows = [
        [
            part.field if part.what == "values" else f"{part.field}: {part.what}",
            part.type,
            *(f"{getattr(part, name):.2g}" for name in ("typical", "largest", "mean", "noise_largest")),
            f"{part.beyond_codec:.2g}",
            f"{part.allowed:.2g}",
            ("ok" if part.within else f"NOT: {part.worst_row}") if part.values else "none seen",
        ]
        for part in found.fields
    ]
    wrong = sorted({part.field for part in found.fields if not part.within})
    verdict = (
        "every field is what its teacher says, within its codec and the noise"
        if found.within
        else f"NOT what the teacher says: {', '.join(wrong)}. Dump these again, into another folder"
    )
    return f"{lay_out(head, rows)}\n\n{found.rows:,} rows, {found.tokens:,} tokens, {found.seconds:.1f} s: {verdict}"


def verdict_line(verdict) -> str:
    lines = [f"note: {note}" for note in verdict.notes]
    lines += [f"{fault.kind}: {fault.message}" for fault in verdict.faults]
    rate = verdict.bytes / max(verdict.seconds, 1e-9)
    read = f"{verdict.shards:,} files, {show_size(verdict.bytes)}, {show_size(rate)}/s"
    good = "all there, and as long as they must be" if verdict.quick else "whole"
    lines.append(
        ("names and sizes" if verdict.quick else read)
        + f": {good if verdict.whole else f'{len(verdict.faults)} fault(s)'}"
    )
    if verdict.removed:
        lines.append(
            f"removed {len(verdict.removed)} file(s) that were proven bad. Give the dump command that made this cache "
            f"again: it writes just what is missing"
        )
    elif any(fault.remove for fault in verdict.faults):
        lines.append(
            "copy these files again from where the cache came from; or give --repair, and then the dump command that "
            "made the cache: it writes just these again"
        )
    return "\n".join(lines)


def show_facts(facts: dict[str, Any]) -> str:
    """`name  value` lines, aligned."""
    width = max(len(name) for name in facts)
    return "\n".join(
        f"{name.replace('_', ' '):{width}}  {_value(name, value)}"
        for name, value in facts.items()
        if value not in (None, {}, [])
    )


def _value(name: str, value: Any) -> str:
    if name.endswith("bytes") and isinstance(value, int):
        return show_size(value)
    if isinstance(value, float):
        return f"{value:.4g}" if name not in ("seconds", "train_seconds") else f"{value:.1f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(key, item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value(name, item) for item in value)
    return str(value)


def show_size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def lay_out(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(line)).rstrip()
        for line in (head, *rows)
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def evaluation_table(found) -> str:
    of_label = {part.name: part for part in found.slices if part.by == "label"}
    taught = any(part.agreement is not None for part in of_label.values())
    head = ["class", "precision", "recall", "f1", "support", *(["agreement"] if taught else [])]
    rows = []
    for name, scores in (*found.classes.items(), *found.averages.items()):
        figures = [f"{scores[key]:.3f}" for key in ("precision", "recall", "f1-score")]
        agreement = of_label[name].agreement if name in found.classes and name in of_label else None
        rows.append([name, *figures, f"{scores['support']:.0f}", *([_share(agreement)] if taught else [])])
    parts = [lay_out(head, rows), _length_table(found.slices), show_facts(_evaluation_facts(found))]
    return "\n\n".join(part for part in (*parts, *map(_test_line, found.tests)) if part)


def _evaluation_facts(found) -> dict[str, Any]:
    def within(name: str, value: float) -> str:
        about = found.intervals.get(name)
        return f"{value:.4f}" + (f"  [{about.low:.4f}, {about.high:.4f}]" if about else "")

    facts: dict[str, Any] = {"rows": found.rows, "accuracy": within("accuracy", found.accuracy)}
    facts["macro_f1"] = within("macro_f1", found.macro_f1)
    if found.calibration is not None:
        facts["calibration error (ECE)"] = within("ece", found.calibration.ece)
    facts |= {"accuracy alone": found.alone} if found.alone else {}
    if found.fidelity is not None:
        facts |= {
            "agreement with the teacher": within("agreement", found.fidelity.agreement),
            "KL to the teacher": found.fidelity.kl,
        }
        facts |= {"teacher's accuracy": found.fidelity.teacher_accuracy}
    if found.teacher_calibration is not None:
        facts |= {"teacher's ECE": found.teacher_calibration.ece}
    facts |= {"parameters": f"{found.parameters:,}"}
    if found.nonzero < found.parameters:
        facts |= {"not zero": f"{found.nonzero:,}"}
    facts |= {"bytes": found.bytes, "ms a text": found.latency.ms}
    if found.latency.times_faster is not None:
        facts |= {"times faster than the teacher": found.latency.times_faster}
    if found.intervals:
        drawn = next(iter(found.intervals.values()))
        facts["in brackets"] = f"{100 * drawn.level:g} % intervals, from {drawn.resamples:,} resamples of the rows"
    return facts | {"kept as": found.kept}


def _length_table(slices: Sequence[Any]) -> str:
    rows = [
        [part.name, f"{part.rows:,}", *map(_share, (part.accuracy, part.f1, part.agreement, part.teacher_accuracy))]
        for part in slices
        if part.by == "length"
    ]
    return lay_out(["length", "rows", "accuracy", "macro-F1", "agreement", "teacher"], rows) if rows else ""


def _test_line(test) -> str:
    """McNemar's test in a sentence."""
    verdict = "no more than chance" if test.p >= 0.05 else "better" if test.difference > 0 else "worse"
    p = "p < 0.0001" if test.p < 0.0001 else f"p = {test.p:.4f}"
    return (
        f"against {test.against}: {100 * test.difference:+.2f} points of accuracy on {test.rows:,} rows, {verdict} "
        f"({p}, McNemar's exact test: right alone in {test.only_this:,}, the other alone in {test.only_other:,})"
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def federation_table(result) -> str:
    """The table of a federation, and the lines below it."""
    head = ["party", "rows", "classes", "teacher", "alone", "together", "gain", "F1 alone", "F1 together"]
    rows = [
        [
            row.party,
            f"{row.rows:,}",
            "/".join(str(count) for count in row.classes.values()) if len(row.classes) <= 6 else str(len(row.classes)),
            *(f"{100 * value:.1f}" for value in (row.teacher_accuracy, row.alone_accuracy, row.accuracy)),
            f"{100 * row.gain:+.1f}",
            *(f"{100 * value:.1f}" for value in (row.alone_macro_f1, row.macro_f1)),
        ]
        for row in result.rows
    ]
    consensus = ", ".join(f"{100 * value:.1f}" for value in result.consensus_accuracy)
    return (
        f"{lay_out(head, rows)}\n\n"
        f"rows: labelled ones of its own, of each class so many; teacher: trained on these; alone: the student on "
        f"these; together: the student on the consensus. Accuracy and macro-F1 in %; the mean gain is "
        f"{100 * result.mean_gain:+.1f}.\n"
        f"The consensus itself has {consensus}% (of each round), over {result.common_rows:,} common rows; "
        f"{show_size(result.shared_bytes)} of logits on these left the parties, those on the test rows, nothing else."
    )


def recipe_table(result) -> str:
    """The table of a recipe, and the line below it."""

    def score(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    kinds = ["hard", "alone", "soft"]
    kinds = [kind for kind in kinds if any(getattr(row, f"accuracy_{kind}") is not None for row in result.rows)]
    scores = [(short, key, kind) for short, key in (("acc", "accuracy"), ("F1", "macro_f1")) for kind in kinds]
    head = ["student", "parameters", "size", *(f"{short} {kind}" for short, _, kind in scores)]
    head += ["teacher", "agree", "ms/text", "faster", "train s"]
    rows = [
        [
            row.student + (f" ({row.seeds} seeds)" if row.seeds > 1 else ""),
            f"{row.parameters:,}",
            show_size(row.bytes),
            *(score(getattr(row, f"{key}_{kind}")) for _, key, kind in scores),
            score(result.teacher_accuracy if row.teacher_accuracy is None else row.teacher_accuracy),
            score(row.agreement),
            f"{row.ms:.2f}",
            "–" if row.times_faster is None else f"{row.times_faster:.{0 if row.times_faster >= 10 else 1}f}x",
            f"{row.train_seconds:.1f}",
        ]
        for row in result.rows
    ]
    said = {
        "hard": "hard: trained on labels alone; ",
        "alone": "alone: trained by itself, on the same losses; ",
        "soft": "soft: on the teacher's cache" + (", together" if "alone" in kinds else ""),
    }
    speed = (
        "the teacher can't be timed on this machine"
        if result.teacher_ms is None
        else f"the teacher has {result.teacher_parameters:,} parameters and takes {result.teacher_ms:.1f} ms a text"
    )
    return (
        f"{lay_out(head, rows)}\n\n{_teachers_line(result.teacher_accuracies, score)}"
        f"{''.join(said[kind] for kind in kinds)}. Accuracy, macro-F1 and agreement in %; "
        f"{speed}.\n{_cost_line(result)}{_compression_table(result.compressed)}"
    )


def _teachers_line(accuracies: Sequence[float | None], score: Callable[[float | None], str]) -> str:
    """Of several teachers what each one's accuracy is."""
    if not accuracies:
        return ""
    each = ", ".join(map(score, accuracies))
    together = f"teacher: what {len(accuracies)} say together; each by itself: {each}"
    return f"{together}. Its size and times are the first one's.\n"


def _compression_table(found: Sequence[Any]) -> str:
    """What pruning and quantising made of the students; nothing where none was compressed."""
    if not found:
        return ""
    head = ["student", "steps", "not zero", "size", "acc", "F1", "agree", "ms/text", "faster", "steps s"]
    rows = [
        [
            row.student,
            row.steps,
            f"{row.nonzero:,}",
            show_size(row.bytes),
            *(f"{100 * share:.1f}" for share in (row.accuracy, row.macro_f1, row.agreement)),
            f"{row.ms:.2f}",
            f"{row.times_faster:.1f}x",
            f"{row.seconds:.1f}",
        ]
        for row in found
    ]
    return f"\n\n{lay_out(head, rows)}\n\nFaster: than the student as it was distilled, in PyTorch; on one thread."


def _cost_line(result) -> str:
    """What the second experiment cost against the first."""
    typical = max(sorted(row.train_seconds for row in result.rows)[len(result.rows) // 2], 1e-3)
    least = min(result.rows, key=lambda row: row.train_seconds)
    first = result.teacher_seconds + typical
    return (
        f"The first experiment cost {first:.0f} s, {result.teacher_seconds:.0f} s of it for the teacher, paid once "
        f"(its training, and one pass over {result.cache_rows:,} rows into {show_size(result.cache_bytes)} of cache); "
        f"the second {typical:.0f} s, {first / typical:.1f} times less (the median student; {least.student}: "
        f"{least.train_seconds:.1f} s)."
    )
