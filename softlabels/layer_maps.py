"""Which layer of the student learns from which of the teacher's. Layers are numbered from 1; 0 is the embeddings.

A map is a rule of `MAPS`, or written out: [[student, teacher], …], or [[[s1, s2], [t1, t2]], …] for a loss that
compares two layers with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from softlabels.config import suggest
from softlabels.errors import ConfigError
from softlabels.types import LayerPair


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


def map_layers(given: str | Sequence[Any], *, student: int, teacher: int, what: str) -> list[LayerPair]:
    """The pairs of the map `given` for a student and a teacher of so many layers; ConfigError where it doesn't fit.

    >>> [(pair.student, pair.teacher) for pair in map_layers("skip", student=6, teacher=12, what="loss 'pkd'")]
    [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]
    """
    if isinstance(given, str):
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


def _step(student: int, teacher: int, *, rule: str) -> int:
    if teacher % student:
        raise ConfigError(
            f"map '{rule}' needs a teacher whose layers are a multiple of the student's; teacher {teacher}, student "
            f"{student}: write the map out, such as [[1, 2], [2, 4]]"
        )
    return teacher // student
