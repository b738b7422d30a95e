"""Losses on layers, once more, slowly: loops over plain numbers, written from the formulas of the papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from softlabels.types import MASKED, LayerPair, Signals, layer_field

Vector = list[float]
Matrix = list[Vector]


def softmax(row: Vector) -> Vector:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / math.fsum(powers) for power in powers]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def kl(p: Vector, q: Vector) -> float:
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def lengths(signals: Signals) -> list[int]:
    return [int(row.sum()) for row in signals.mask]


def states(signals: Signals, layer: int) -> list[Matrix]:
    """The hidden states of each text, without padding; texts of padding alone are left out."""
    hidden = signals.get(layer_field("hidden", layer)).tolist()
    return [text[:length] for text, length in zip(hidden, lengths(signals), strict=True) if length]


def heads(signals: Signals, name: str) -> list[list[Matrix]]:
    """[text][head][token][…], without padding in either direction."""
    pairs = name.startswith("attention")
    found = []
    for text, length in zip(signals.get(name).tolist(), lengths(signals), strict=True):
        if length:
            found.append([[row[:length] if pairs else row for row in head[:length]] for head in text])
    return found


def tokens(student: Signals, teacher: Signals, layers: LayerPair) -> Iterator[tuple[Vector, Vector]]:
    for ours, theirs in zip(states(student, layers.student), states(teacher, layers.teacher), strict=True):
        yield from zip(ours, theirs, strict=True)


def hidden_mse(student: Signals, teacher: Signals, layers: LayerPair) -> float:
    return mean([mean([(a - b) ** 2 for a, b in zip(*pair, strict=True)]) for pair in tokens(student, teacher, layers)])


def layer_output(student: Signals, teacher: Signals, layers: LayerPair) -> float:
    return mean(
        [mean([0.5 * (a - b) ** 2 for a, b in zip(*pair, strict=True)]) for pair in tokens(student, teacher, layers)]
    )


def hidden_cosine(student: Signals, teacher: Signals, layers: LayerPair) -> float:
    return mean(
        [1 - dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for a, b in tokens(student, teacher, layers)],
    )


def pkd(student: Signals, teacher: Signals, layers: LayerPair) -> float:
    distances = []
    for ours, theirs in zip(states(student, layers.student), states(teacher, layers.teacher), strict=True):
        a, b = ours[0], theirs[0]
        na, nb = math.sqrt(dot(a, a)), math.sqrt(dot(b, b))
        distances.append(math.fsum((x / na - y / nb) ** 2 for x, y in zip(a, b, strict=True)))
    return mean(distances)


def moments(row: Vector) -> dict[str, float]:
    middle = mean(row)
    return {"mean": middle, "variance": mean([(value - middle) ** 2 for value in row])}


def normalised(row: Vector) -> Vector:
    at = moments(row)
    return [(value - at["mean"]) / math.sqrt(at["variance"] + 1e-12) for value in row]


def feature_map_mse(student: Signals, teacher: Signals, layers: LayerPair) -> float:
    return mean(
        [
            mean([(x - y) ** 2 for x, y in zip(normalised(a), normalised(b), strict=True)])
            for a, b in tokens(student, teacher, layers)
        ]
    )


def feature_statistics(student: Signals, teacher: Signals, layers: LayerPair) -> float:
    total = []
    for ours, theirs in tokens(student, teacher, layers):
        a, b = moments(ours), moments(theirs)
        total.append((a["mean"] - b["mean"]) ** 2 + abs(a["variance"] - b["variance"]))
    return mean(total)


def then(layers: LayerPair) -> LayerPair:
    return layers.then or layers


def gram(student: Signals, teacher: Signals, layers: LayerPair) -> float:
    def grams(signals: Signals, first: int, second: int) -> list[Matrix]:
        found = []
        for one, two in zip(states(signals, first), states(signals, second), strict=True):
            left, right = list(map(list, zip(*one, strict=True))), list(map(list, zip(*two, strict=True)))
            found.append([[dot(a, b) / len(one) for b in right] for a in left])
        return found

    ours = grams(student, layers.student, then(layers).student)
    theirs = grams(teacher, layers.teacher, then(layers).teacher)
    return mean(squares(ours, theirs))


def nst(student: Signals, teacher: Signals, layers: LayerPair) -> float:
    def similarities(signals: Signals, first: int, second: int) -> list[Matrix]:
        return [
            [[dot(a, b) / len(b) for b in two] for a in one]
            for one, two in zip(states(signals, first), states(signals, second), strict=True)
        ]

    ours = similarities(student, layers.student, then(layers).student)
    theirs = similarities(teacher, layers.teacher, then(layers).teacher)
    return mean(squares(ours, theirs))


def squares(ours: list[Matrix], theirs: list[Matrix]) -> list[float]:
    return [
        (a - b) ** 2
        for text_a, text_b in zip(ours, theirs, strict=True)
        for row_a, row_b in zip(text_a, text_b, strict=True)
        for a, b in zip(row_a, row_b, strict=True)
    ]


def scores(signals: Signals, layer: int) -> list[list[Matrix]]:
    return heads(signals, layer_field("attention", layer) + "@scores")


def probs(signals: Signals, layer: int) -> list[list[Matrix]]:
    return [[[softmax(row) for row in head] for head in text] for text in scores(signals, layer)]


def over_heads(maps: list[list[Matrix]]) -> list[list[Matrix]]:
    """Each text's mean map, as its one head."""
    return [
        [[[mean(list(values)) for values in zip(*rows, strict=True)] for rows in zip(*text, strict=True)]]
        for text in maps
    ]


def attention_scores_mse(student: Signals, teacher: Signals, layers: LayerPair, *, mean_heads: bool = False) -> float:
    ours, theirs = scores(student, layers.student), scores(teacher, layers.teacher)
    if mean_heads:
        ours, theirs = over_heads(ours), over_heads(theirs)
    return mean(
        [
            (a - b) ** 2
            for text_a, text_b in zip(ours, theirs, strict=True)
            for head_a, head_b in zip(text_a, text_b, strict=True)
            for row_a, row_b in zip(head_a, head_b, strict=True)
            for a, b in zip(row_a, row_b, strict=True)
            if min(a, b) > MASKED / 2
        ]
    )


def rows(ours: list[list[Matrix]], theirs: list[list[Matrix]]) -> list[list[tuple[Vector, Vector]]]:
    """[text]: the rows of all heads, (student's, teacher's)."""
    return [
        [pair for head_a, head_b in zip(text_a, text_b, strict=True) for pair in zip(head_a, head_b, strict=True)]
        for text_a, text_b in zip(ours, theirs, strict=True)
    ]


def cross_entropy(p: Vector, q: Vector) -> float:
    return -math.fsum(a * math.log(b) for a, b in zip(p, q, strict=True) if a > 0)


def attention_mse(student: Signals, teacher: Signals, layers: LayerPair, *, mean_heads: bool = False) -> float:
    ours, theirs = probs(student, layers.student), probs(teacher, layers.teacher)
    if mean_heads:
        ours, theirs = over_heads(ours), over_heads(theirs)
    return mean([s for a, b in zip(ours, theirs, strict=True) for s in squares(a, b)])


def attention_kl(student: Signals, teacher: Signals, layers: LayerPair, *, mean_heads: bool = False) -> float:
    ours, theirs = probs(student, layers.student), probs(teacher, layers.teacher)
    if mean_heads:
        ours, theirs = over_heads(ours), over_heads(theirs)
    return mean([mean([kl(p, q) for q, p in text]) for text in rows(ours, theirs)])


def attention_ce(student: Signals, teacher: Signals, layers: LayerPair, *, mean_heads: bool = False) -> float:
    ours, theirs = probs(student, layers.student), probs(teacher, layers.teacher)
    if mean_heads:
        ours, theirs = over_heads(ours), over_heads(theirs)
    return mean([cross_entropy(p, q) for text in rows(ours, theirs) for q, p in text])


def attention_scores_ce(student: Signals, teacher: Signals, layers: LayerPair, *, mean_heads: bool = True) -> float:
    ours, theirs = scores(student, layers.student), scores(teacher, layers.teacher)
    if mean_heads:
        ours, theirs = over_heads(ours), over_heads(theirs)
    return mean([cross_entropy(softmax(p), softmax(q)) for text in rows(ours, theirs) for q, p in text])


def relation(kind: str) -> Callable[..., float]:
    def reference(student: Signals, teacher: Signals, layers: LayerPair, *, relation_heads: int | None = None) -> float:
        maps = []
        for signals, layer in ((student, layers.student), (teacher, layers.teacher)):
            vectors = heads(signals, layer_field(kind, layer))
            if relation_heads is not None:
                vectors = [recut(text, relation_heads) for text in vectors]
            maps.append(
                [
                    [[softmax([dot(a, b) / math.sqrt(len(a)) for b in head]) for a in head] for head in text]
                    for text in vectors
                ]
            )
        return mean([mean([kl(p, q) for q, p in text]) for text in rows(*maps)])

    return reference


def recut(text: list[Matrix], relation_heads: int) -> list[Matrix]:
    """A text's heads, joined token by token and cut into `relation_heads`."""
    joined = [[value for head in text for value in head[token]] for token in range(len(text[0]))]
    width = len(joined[0]) // relation_heads
    return [[row[head * width : (head + 1) * width] for row in joined] for head in range(relation_heads)]


REFERENCES: dict[str, Callable[..., Any]] = {
    "hidden_mse": hidden_mse,
    "hidden_cosine": hidden_cosine,
    "pkd": pkd,
    "layer_output": layer_output,
    "feature_map_mse": feature_map_mse,
    "feature_statistics": feature_statistics,
    "gram": gram,
    "nst": nst,
    "attention_scores_mse": attention_scores_mse,
    "attention_scores_ce": attention_scores_ce,
    "attention_mse": attention_mse,
    "attention_kl": attention_kl,
    "attention_ce": attention_ce,
    "query_relation": relation("query"),
    "key_relation": relation("key"),
    "value_relation": relation("value"),
}
