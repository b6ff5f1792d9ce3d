"""Images with labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from tfkern import files
from tfkern.data.corrupt import generator
from tfkern.train.tasks.batches import Item, Sizes, Task, batches_of, check_number

_PATCH = 16  # the largest patch that is chosen: ViT's


def images(
    data: Path, sizes: Sizes, *, patch_size: int | None = None, validation: float = 0.1
) -> Task:
    """An encoder that tells the class of an image from its patches (Dosovitskiy et al. 2021).

    `data` is "digits", the 8 x 8 digits of scikit-learn, or an .npz file with "images" (N, C, H, H)
    and "labels" (N,), integers. Batches have float32 from -1 to 1: uint8 pixels are divided by
    127.5, the digits' by 8, less 1; pixels that are floats are taken as they are. The classes are
    the labels in their order. `length` has no meaning.

    Args:
        patch_size: the side of a patch, a divisor of H. If None, the largest one up to H / 4 and
            16.
        validation: the share of images that is kept apart, chosen by the seed.

    Raises:
        ValueError: arrays of other shapes or types, or pixels that are out of range.
    """
    check_number("validation", validation, 0, 0.5)
    pixels, labels = _digits() if str(data) == "digits" else _read(data)
    size = pixels.shape[-1]
    if patch_size is None:
        patch_size = max(p for p in range(1, _PATCH + 1) if not size % p and p <= max(size // 4, 1))
    if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(f"patch_size must be a positive integer, got {patch_size!r}")
    if size % patch_size:
        raise ValueError(f"patch_size must divide the side {size} of images, got {patch_size}")
    classes, labels = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"{data}: there must be two labels at least, got {classes.tolist()}")
    places = generator(sizes.seed).permutation(len(pixels))
    count = int(validation * len(pixels))
    if not 0 < count < len(pixels):
        raise ValueError(
            f"{data}: {count} of {len(pixels)} images are for validation: give more images, or "
            f"another share than validation = {validation}"
        )

    def make(part: np.ndarray) -> tuple[Images, None]:
        return Images(pixels, labels, part), None

    config = {
        "architecture": "encoder",
        "head": "classification",
        "classes": len(classes),
        "image_size": size,
        "patch_size": patch_size,
        "channels": pixels.shape[1],
    }
    batches = batches_of(make, places[count:], places[:count], sizes)
    return Task(*batches, config, None, tuple(classes.tolist()))


@dataclass(frozen=True)
class Images:
    """Some of many images.

    Attributes:
        pixels: (N, C, H, H) float32 in [-1, 1], or uint8.
        labels: (N,) int64.
        places: which of them.
    """

    pixels: np.ndarray
    labels: np.ndarray
    places: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Item:
        place = self.places[i]
        pixels = self.pixels[place]
        if pixels.dtype == np.uint8:
            pixels = pixels.astype(np.float32) / 127.5 - 1
        return {"tokens": pixels, "targets": np.array(self.labels[place])}


def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("data digits needs scikit-learn, which is not installed") from None
    found = load_digits()
    pixels = (found.images / 8 - 1).astype(np.float32)
    return pixels[:, None], found.target


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    files.regular(path)
    try:
        with np.load(path, allow_pickle=False) as found:
            pixels, labels = found["images"], found["labels"]
    except (OSError, BadZipFile, KeyError, ValueError, AttributeError, TypeError) as error:
        told = files.one_line(error)
        raise ValueError(f"{path} is no .npz file with images and labels: {told}") from None
    if pixels.ndim != 4 or not pixels.size or pixels.shape[2] != pixels.shape[3]:
        raise ValueError(f"{path}: images must be (N, C, H, H), got {pixels.shape}")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: labels must be {len(pixels)} integers, got {labels.dtype} {labels.shape}"
        )
    if pixels.dtype == np.uint8:
        return pixels, labels
    if pixels.dtype.kind != "f":
        raise ValueError(f"{path}: images must be uint8 or floats, got {pixels.dtype}")
    if not (abs(pixels) <= 1).all():  # also refuses NaN
        raise ValueError(
            f"{path}: images that are floats must lie in [-1, 1], got {pixels.min():.6g} to "
            f"{pixels.max():.6g}"
        )
    return pixels.astype(np.float32), labels
