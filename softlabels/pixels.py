"""Images on their way through a teacher: rows of a corpus come in, batches of pixels go out.

An image is opened when its batch is next, by threads beside the one that runs the teacher, and its pixels are dropped
once they are in a batch: memory holds two batches of pixels, whatever the corpus. What stays of an image is the hash
by which its row is joined.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from softlabels.cache.format import FieldSpec
from softlabels.errors import CorpusError, TeacherError
from softlabels.images import open_image
from softlabels.tokens import Tokenized
from softlabels.types import Example, ImageBatch, TokenizedExample

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

_THREADS = min(4, os.cpu_count() or 1)  # that open images
_PATCH = 16 * 16  # pixels that count for a token in a batch: those of a ViT's patch


class ImageReader:
    """Opens the images of a corpus for one teacher. `first`, any of them, says what size all have."""

    def __init__(self, processor: BaseImageProcessor, model: nn.Module, *, first: Example) -> None:
        self.processor = processor
        self.shape: tuple[int, ...] | None = None
        pixels = self.read(first)
        self.shape = pixels.shape
        self.tokens = pixels[0].size // _PATCH
        device = next(model.parameters()).device
        self.probe = ImageBatch(torch.from_numpy(pixels[None]), torch.tensor([-100])).to(device)
        self.length = _sequence_length(model, self.probe)

    def read(self, example: Example) -> np.ndarray:
        """(3, height, width) float32. CorpusError names a row whose image is damaged, or of another size."""
        assert example.image is not None
        image = open_image(example.image, row=example.id)
        try:
            pixels = np.ascontiguousarray(self.processor(image, return_tensors="np")["pixel_values"][0], np.float32)
        except Exception as error:
            raise CorpusError(
                f"row '{example.id}': the teacher's image processor does not take {example.image}: {error}"
            ) from error
        if pixels.ndim != 3 or (self.shape is not None and pixels.shape != self.shape):
            raise TeacherError(
                f"row '{example.id}': the teacher's image processor makes pixels of the shape {pixels.shape} of "
                f"{example.image}, and {self.shape} of the first image; a teacher's images have one size: set one, of "
                f"height and width, in its preprocessor_config.json"
            )
        return pixels

    def tokenize(self, examples: Sequence[Example], labels: Sequence[int]) -> Tokenized:
        """The rows of `examples`; their images are not opened yet."""
        places = np.zeros(self.length, np.int32)
        return Tokenized(
            [
                TokenizedExample(row.id, places, None, label, row.text, None, content=Pixels(self, row))
                for row, label in zip(examples, labels, strict=True)
            ],
            truncated=0,
        )

    def expect(self, rows: Sequence[TokenizedExample]) -> None:
        """Begin to open the images of `rows`."""
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="softlabels-images")
        for row in rows:
            _pixels_of(row).begin(pool)
        pool.shutdown(wait=False)  # its threads end with the last of these images

    def batch(self, rows: Sequence[TokenizedExample]) -> ImageBatch:
        """The pixels and labels of `rows`."""
        self.expect(rows)
        pixels = np.empty((len(rows), *(self.shape or ())), np.float32)  # (B, 3, height, width)
        for i, row in enumerate(rows):
            pixels[i] = _pixels_of(row).take()
        return ImageBatch(torch.from_numpy(pixels), torch.tensor([row.label for row in rows], dtype=torch.int64))


class Pixels:
    """The pixels of one row: opened when they are asked for, gone once they were taken."""

    def __init__(self, reader: ImageReader, example: Example) -> None:
        self._reader, self._example = reader, example
        self._coming: Future[np.ndarray] | None = None
        self._hash: int | None = None

    @property
    def tokens(self) -> int:
        return self._reader.tokens

    def hash(self) -> int:
        """xxh3-64 over the float32 pixels; the image is opened for it if it never was."""
        if self._hash is None:
            self._read()
        return cast(int, self._hash)

    def begin(self, pool: ThreadPoolExecutor) -> None:
        """Have `pool` open the image, unless that was begun."""
        if self._coming is None:
            self._coming = pool.submit(self._read)

    def take(self) -> np.ndarray:
        """(3, height, width), once for every `begin`."""
        assert self._coming is not None
        coming, self._coming = self._coming, None
        return coming.result()

    def _read(self) -> np.ndarray:
        pixels = self._reader.read(self._example)
        self._hash = xxhash.xxh3_64_intdigest(pixels.astype("<f4", copy=False).data)
        return pixels


def check_sequence(fields: Mapping[str, FieldSpec], values: Mapping[str, Tensor], *, length: int) -> None:
    """TeacherError where a field has not one vector, or map, for each of the `length` places of a row's sequence."""
    for name, spec in fields.items():
        places = {"row": (), "token": values[name].shape[1:2], "pair": values[name].shape[-2:]}[spec.kind]
        if any(count != length for count in places):
            raise TeacherError(
                f"{name}: the teacher has {' × '.join(map(str, places))} places there, and its hidden states no one "
                f"length: its layers are of different sizes. Capture logits or pooled"
            )


def _pixels_of(row: TokenizedExample) -> Pixels:
    return cast(Pixels, row.content)


def _sequence_length(model: nn.Module, probe: ImageBatch) -> int:
    """How many vectors every hidden state has; 1 where these are maps, or differ."""
    try:
        with torch.no_grad():
            output = model(**probe.model_inputs(), output_hidden_states=True)
    except (ValueError, RuntimeError) as error:
        raise TeacherError(
            f"the teacher does not take pixels of the shape {tuple(probe.pixel_values.shape[1:])}, as its image "
            f"processor makes them: {error}. Are preprocessor_config.json and config.json of the same model?"
        ) from error
    states = getattr(output, "hidden_states", None) or ()
    lengths = {state.shape[1] if state.ndim == 3 else 1 for state in states}
    return lengths.pop() if len(lengths) == 1 else 1
