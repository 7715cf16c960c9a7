"""Pictures with captions: how one is opened, what makes it unusable, and how it is fitted to a size.

A sample that cannot be used keeps its place and its key, and its `open` raises `BrokenPicture(key, why)`: one `except`
skips, counts and names them all. If it lacks its caption or its picture, `captions` is empty too.
"""

import importlib
import io
import logging
import math
import os
import random
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from prunet.errors import UserError

# Only these decoders: left to itself Pillow takes a "cat.jpg" that holds EPS to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
PICTURE_FILES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".avif", ".heic", ".heif"),
)
MAX_FILE_MIB = 256  # a larger member of a shard is not read into memory
PNG = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
TURNING_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0")

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs would go to the terminal


class BrokenPicture(Exception):
    """This sample cannot be used: skip it, count it, name it."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(key, why)  # both, so that it can be pickled
        self.key, self.why = key, why

    def __str__(self) -> str:
        return f"{self.key}: {self.why}"


@dataclass(frozen=True)
class Picture:
    key: str  # unique and stable: "train/cat.png", "shard-0001.tar/000123", "train.parquet/00000007"
    captions: tuple[str, ...]  # stripped and non-empty; none at all where `open` will raise
    open: Callable[[], Image.Image]  # upright, RGB, transparency over white; raises BrokenPicture


@dataclass(frozen=True, eq=False)
class Fitted:
    pixels: torch.Tensor  # (3, height, width), float32 in [-1, 1]
    original_size: tuple[int, int]  # (height, width) before the resize
    crop_top_left: tuple[int, int]  # (top, left) of the crop in the resized and then flipped picture
    flipped: bool


def fit(
    image: Image.Image,
    size: int | tuple[int, int],
    *,
    crop: Literal["center", "random"] = "center",
    flip: bool = False,
    seed: int = 0,
) -> Fitted:
    """Resize until the picture just covers `size` (a side, or (height, width)), maybe flip it, crop it.

    Bilinear with antialiasing and in the order of the scripts of BK-SDM and SDXL, with the rounding of
    torchvision's Resize and CenterCrop. All chance comes from the seed; asking for flips moves no crop.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if crop not in ("center", "random") or min(height, width) < 1:
        raise UserError(f"fit(size={size!r}, crop={crop!r}): size must be above 0, crop 'center' or 'random'")
    image = to_rgb(image)
    W, H = image.size
    resized_h, resized_w = (height, W * height // H) if H * width <= W * height else (H * width // W, width)
    draw = random.Random(str(seed))  # of the text, because Random(-1) is Random(1)
    flipped = draw.random() < 0.5 and flip
    spare_h, spare_w = resized_h - height, resized_w - width
    top, left = round(spare_h / 2), round(spare_w / 2)
    if crop == "random":
        top, left = int(draw.random() * (spare_h + 1)), int(draw.random() * (spare_w + 1))
    # Only the crop is computed: all of a 1 x 30000 strip, resized to cover 1024 pixels, would take 90 GB.
    x, sx, sy = (spare_w - left if flipped else left), W / resized_w, H / resized_h
    box = (x * sx, top * sy, min(W, (x + width) * sx), min(H, (top + height) * sy))
    image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    image = ImageOps.mirror(image) if flipped else image
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 127.5 - 1
    return Fitted(pixels, (H, W), (top, left), flipped)


def bucket_sizes(size: int, step: int) -> list[tuple[int, int]]:
    """(height, width) of at most `size` squared pixels, square to 4:1, in multiples of a sixteenth of `size`.

    At 1024 these are the shapes in which SDXL was trained (arXiv 2307.01952, appendix I), but for a few between them.
    `step`: what a side must be a multiple of.
    """
    unit = -(-max(step, size // 16) // step) * step
    pairs = {(long, size * size // long // unit * unit) for long in range(size, 2 * size + 1, unit)}
    return sorted({shape for long, short in pairs for shape in ((long, short), (short, long)) if short > 0})


def nearest_size(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose aspect ratio is nearest to the picture's."""
    width, height = image.size
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(height / width)))


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit grey divided by 257, transparency over white. Colour profiles are not applied."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if isinstance(clear := image.info.get("transparency"), int):
            values = np.where(values == clear, 65535, values)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("float or 32-bit pixels, whose range is unknown")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# -- samples: what every source makes of a key, captions and a file ------------------------------------------


def make_picture(key: str, captions: tuple[str, ...], why: str, file: Path | bytes | str) -> Picture:
    return Picture(key, captions, partial(_decode, key, file)) if captions else broken_picture(key, why)


def broken_picture(key: str, why: str) -> Picture:
    return Picture(key, (), partial(_refuse, key, why))


def _refuse(key: str, why: str) -> Image.Image:
    raise BrokenPicture(key, why)


def _decode(key: str, file: Path | bytes | str) -> Image.Image:
    if isinstance(file, str):  # on the Hub; a lost connection is no broken picture and is raised as it is
        with extra("fsspec").open(file, "rb") as remote:
            return _decode(key, remote.read())
    try:
        return _load(file)
    except UnidentifiedImageError:
        why = f"not a picture ({', '.join(_formats())})"
    except Exception as error:  # decoders raise whatever they like
        why = reason_of(error)
    file = b""  # or a list of these errors, with their tracebacks, would keep all the bytes
    raise BrokenPicture(key, why)


def _load(file: Path | bytes) -> Image.Image:
    file = existing_file(file) if isinstance(file, Path) else file
    if (file.stat().st_size if isinstance(file, Path) else len(file)) == 0:
        raise ValueError("the file is empty")
    if isinstance(file, bytes) and len(file) > MAX_FILE_MIB << 20:
        raise ValueError(f"larger than {MAX_FILE_MIB} MiB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what does not matter to the pixels: broken EXIF, sizes that may be bombs
        try:
            return _decoded(io.BytesIO(file) if isinstance(file, bytes) else file)
        except Image.DecompressionBombError as error:
            raise ValueError(str(error).partition(", could be")[0]) from None
        except Exception:
            for lean in _lean_pngs(file):
                with suppress(Exception):
                    return _decoded(io.BytesIO(lean))
            raise


def _decoded(file: io.BytesIO | Path) -> Image.Image:
    with Image.open(file, formats=_formats()) as image:
        with _silent_stderr() if image.format == "TIFF" else nullcontext():
            image.load()  # the first frame of several; beyond 179 million pixels Pillow refuses
        return to_rgb(_upright(image))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """libtiff writes what it finds wrong to file 2, past Python; Pillow raises an error as well."""
    try:
        saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # closed already
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _lean_pngs(file: Path | bytes) -> Iterator[bytes]:
    """A PNG without its texts and profile: Pillow refuses large ones, and whole pixels with them.

    First with those texts that may say how the picture is turned, then without.
    """
    if isinstance(file, Path):
        with open(file, "rb") as opened:
            file = opened.read(MAX_FILE_MIB << 20) if opened.read(len(PNG)) == PNG and not opened.seek(0) else b""
    if not file.startswith(PNG):
        return
    for kept in (TURNING_TEXTS, ()):
        at, chunks = len(PNG), [PNG]
        while at < len(file):
            length, kind = int.from_bytes(file[at : at + 4]), file[at + 4 : at + 8]
            if kind not in PNG_TEXTS or file.startswith(kept, at + 8):
                chunks.append(file[at : at + length + 12])
            at += length + 12
        yield b"".join(chunks)


def existing_file(path: Path) -> Path:
    """The file of that name, be it composed (as typed) or decomposed (as macOS writes it)."""
    for form in (str(path), *(unicodedata.normalize(form, str(path)) for form in ("NFC", "NFD"))):
        if os.path.isfile(form):  # not a folder called cat.png, nor a pipe that would be waited for
            return Path(form)
    raise ValueError("there is no such file")


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # malformed EXIF does not spoil the pixels
        return image


def as_text(name: str) -> str:
    """A file name as text that can be stored, even if it is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def reason_of(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def extra(name: str, where: str = "") -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{where}Parquet files and the Hub need an extra: pip install -e '.[data]'") from None
