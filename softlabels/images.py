"""Image files of a corpus: found in folders of classes, looked at before any work, opened as RGB by Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from softlabels.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # in folders of classes
_WIDE = ("I", "F")  # Pillow's modes of more than 8 bits a channel, which it cuts off at 255 instead of scaling them


def need_pillow() -> None:
    """ConfigError where images can't be opened."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ConfigError(
            "images are opened by Pillow, which is not installed: pip install 'softlabels[images]'"
        ) from None


def image_fault(path: Path) -> str | None:
    """Why the file is no image that can be used, from its first bytes; None where nothing speaks against it."""
    from PIL import Image

    if not path.is_file():
        return f"there is no file {path}"
    try:
        with Image.open(path) as image:
            if image.mode.startswith(_WIDE):
                return f"{path} has more than 8 bits a channel (Pillow's mode {image.mode}): convert it to 8"
    except Exception as error:  # whatever the decoder of a format gives; Pillow names the file itself
        return str(error) if str(path) in str(error) else f"{path}: {error}"
    return None


def open_image(path: str, *, row: str) -> Image:
    """The image, upright as its EXIF data say, in RGB: grey gets three channels, transparency goes.

    CorpusError with the `row`'s id where it is damaged.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return (ImageOps.exif_transpose(image) or image).convert("RGB")
    except Exception as error:
        raise CorpusError(f"row '{row}': the image {path} cannot be read: {error}. Mend or delete it") from error


def find_class_folders(folder: Path) -> dict[str, list[str]]:
    """Class → the images in the folder of that name inside `folder`, as paths from there with /, sorted."""
    found = {}
    for place in sorted(folder.iterdir()):
        if place.is_dir() and not place.name.startswith("."):
            found[place.name] = [f"{place.name}/{path.name}" for path in _images_in(place)]
    return {name: paths for name, paths in found.items() if paths}


def _images_in(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            yield path
