"""Which layer of the student learns from which of the teacher's. Layers are numbered from 1; 0 is the embeddings.

A map is a rule of `MAPS`, or written out: [[student, teacher], …], or [[[s1, s2], [t1, t2]], …] for a loss that
compares two layers with each other. A loss on several layers at once has a rule of `GROUP_MAPS`, or [[student,
[teacher's, …]], …], or [[[student's, …], [teacher's, …]]] where it looks at several on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from softlabels.config import suggest
from softlabels.errors import ConfigError
from softlabels.types import LayerGroup, LayerPair


def _uniform(student: int, teacher: int) -> list[LayerPair]:
    step = _step(student, teacher, rule="uniform")
    return [LayerPair(layer, layer * step) for layer in range(1, student + 1)]


def _skip(student: int, teacher: int) -> list[LayerPair]:
    return _uniform(student, teacher)[:-1]


def _last(student: int, teacher: int) -> list[LayerPair]:
    return [LayerPair(layer, teacher - student + layer) for layer in range(1, student)]


def _same(student: int, teacher: int) -> list[LayerPair]:
    if student != teacher:
        raise ConfigError(f"map 'same' is for as many layers on both sides; student {student}, teacher {teacher}")
    return [LayerPair(layer, layer) for layer in range(1, student + 1)]


def _final(student: int, teacher: int) -> list[LayerPair]:
    return [LayerPair(student, teacher)]


def _embeddings(student: int, teacher: int) -> list[LayerPair]:
    return [LayerPair(0, 0)]


MAPS: Mapping[str, Callable[[int, int], list[LayerPair]]] = {
    "uniform": _uniform,  # TinyBERT (Jiao et al. 2020): g(m) = m · teacher's layers / student's; g(m) = 3m for 4 of 12
    "skip": _skip,  # BERT-PKD (Sun et al. 2019): as uniform, but for the last layer, which the logits teach
    "last": _last,  # BERT-PKD: the teacher's last layers but the very last; 7 to 11 for 6 of 12
    "same": _same,  # MobileBERT (Sun et al. 2020): as deep as the teacher
    "final": _final,  # MiniLM (Wang et al. 2020), DistilBERT's cosine: the last of each
    "embeddings": _embeddings,  # TinyBERT's embedding loss
}


def _all(student: int, teacher: int) -> list[LayerGroup]:
    return [LayerGroup((layer,), tuple(range(1, teacher + 1))) for layer in range(1, student + 1)]


def _buckets(student: int, teacher: int) -> list[LayerGroup]:
    size = _step(student, teacher, rule="buckets", example="[[1, [1, 2]], [2, [3, 4, 5]]]")
    return [
        LayerGroup((layer,), tuple(range((layer - 1) * size + 1, layer * size + 1))) for layer in range(1, student + 1)
    ]


GROUP_MAPS: Mapping[str, Callable[[int, int], list[LayerGroup]]] = {
    "all": _all,  # ALP-KD (Passban et al. 2021), BERT-EMD (Li et al. 2020): each layer with all of the teacher's
    "buckets": _buckets,  # CKD (Wu et al. 2020), regular combination; ALP-NO: the teacher's, split evenly and in order
}


def map_layers(given: str | Sequence[Any], *, student: int, teacher: int, what: str) -> list[LayerPair]:
    """The pairs of the map `given` for a student and a teacher of so many layers; ConfigError where it doesn't fit.

    >>> [(pair.student, pair.teacher) for pair in map_layers("skip", student=6, teacher=12, what="loss 'pkd'")]
    [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]
    """
    if isinstance(given, str):
        if given in GROUP_MAPS:
            raise ConfigError(f"{what} compares pairs of layers: its map is {', '.join(MAPS)}, or pairs; not '{given}'")
        if given not in MAPS:
            raise ConfigError(f"{what}: no map '{given}': there are {', '.join(MAPS)}.{suggest(given, MAPS)}")
        if student > teacher:
            raise ConfigError(f"{what}: map '{given}' needs a student of at most the teacher's {teacher} layers")
        pairs = MAPS[given](student, teacher)
        if not pairs:
            raise ConfigError(f"{what}: map '{given}' leaves out the last layer, and a student of one has no other")
        return pairs
    pairs = [_written_pair(entry, what=what) for entry in given]
    if not pairs:
        raise ConfigError(f"{what}: an empty map; write pairs such as [[1, 2], [2, 4]]")
    for pair in pairs:
        for one in (pair, pair.then):
            if one is not None:
                _check(one.student, student, side="student", what=what)
                _check(one.teacher, teacher, side="teacher", what=what)
    return pairs


def map_groups(
    given: str | Sequence[Any], *, student: int, teacher: int, what: str, together: bool = False, cover: bool = False
) -> list[LayerGroup]:
    """The groups of the map `given`: one for each layer of the student, or with `together` one of all of them.

    `cover` asks that each of the teacher's layers is in one group and no other. ConfigError where it doesn't fit.

    >>> [group.teacher for group in map_groups("buckets", student=2, teacher=6, what="loss 'ckd'")]
    [(1, 2, 3), (4, 5, 6)]
    """
    if isinstance(given, str):
        rules = ["all"] if together else [*GROUP_MAPS]
        if given not in rules:
            form = "[[[1, 2], [1, 2, 3]]]" if together else "[[1, [1, 2]], [2, [3, 4]]]"
            raise ConfigError(f"{what} looks at several layers at once: its map is {' or '.join(rules)}, or {form}")
        groups = GROUP_MAPS[given](student, teacher)
        together_now = LayerGroup(tuple(range(1, student + 1)), groups[0].teacher)
        return [together_now] if together else groups
    groups = [_written_group(entry, together=together, what=what) for entry in given]
    if not groups or (together and len(groups) > 1):
        form = "one entry [[[student's layers], [teacher's layers]]]" if together else "[[1, [1, 2]], [2, [3, 4]]]"
        raise ConfigError(f"{what}: a map of {len(groups)} entries; write {form}")
    for group in groups:
        for side, layers, count in (("student", group.student, student), ("teacher", group.teacher, teacher)):
            for layer in layers:
                _check(layer, count, side=side, what=what)
            _refuse_doubled(layers, side=side, what=what)
    _refuse_doubled([layer for group in groups for layer in group.student], side="student", what=what)
    if cover:
        _refuse_uncovered([layer for group in groups for layer in group.teacher], teacher, what=what)
    return groups


def _written_group(entry: Any, *, together: bool, what: str) -> LayerGroup:
    match entry:
        case [int(ours), [*theirs]] if not together and _are_layers(theirs):
            return LayerGroup((ours,), tuple(theirs))
        case [[*ours], [*theirs]] if together and _are_layers(ours) and _are_layers(theirs):
            return LayerGroup(tuple(ours), tuple(theirs))
    form = "[[student's layers], [teacher's layers]]" if together else "[student's layer, [teacher's layers]]"
    raise ConfigError(f"{what}: {entry} is no entry of its map; write {form}, with one layer or more on each side")


def _are_layers(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _refuse_doubled(layers: Sequence[int], *, side: str, what: str) -> None:
    doubled = sorted({layer for layer in layers if layers.count(layer) > 1})
    if doubled:
        raise ConfigError(f"{what}: layer {doubled[0]} of the {side} is in its map twice: leave it out once")


def _refuse_uncovered(layers: Sequence[int], teacher: int, *, what: str) -> None:
    left_out = [layer for layer in range(1, teacher + 1) if layer not in layers]
    doubled = sorted({layer for layer in layers if layers.count(layer) > 1})
    if left_out or doubled:
        fault = f"no bucket holds layer {left_out[0]}" if left_out else f"two buckets hold layer {doubled[0]}"
        raise ConfigError(f"{what}: {fault} of the teacher; where that is meant, give the term cover: false")


def _written_pair(entry: Any, *, what: str) -> LayerPair:
    match entry:
        case [int(student), int(teacher)]:
            return LayerPair(student, teacher)
        case [[int(s1), int(s2)], [int(t1), int(t2)]]:
            return LayerPair(s1, t1, then=LayerPair(s2, t2))
    raise ConfigError(
        f"{what}: {entry} is no pair of a map; write [student's layer, teacher's layer], or "
        f"[[student's two], [teacher's two]]"
    )


def _check(layer: int, layers: int, *, side: str, what: str) -> None:
    if not 0 <= layer <= layers:
        raise ConfigError(f"{what}: the {side} has no layer {layer}; it has 0 (the embeddings) to {layers}")


def _step(student: int, teacher: int, *, rule: str, example: str = "[[1, 2], [2, 4]]") -> int:
    if teacher % student:
        raise ConfigError(
            f"map '{rule}' needs a teacher whose layers are a multiple of the student's; teacher {teacher}, student "
            f"{student}: write the map out, such as {example}"
        )
    return teacher // student
