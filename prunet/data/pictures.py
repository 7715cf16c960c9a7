"""Pictures with captions: opening them, recognising unusable ones, and fitting them to a size.

An unusable sample keeps its place and its key, and its `open` raises `BrokenPicture(key, why)`, so that one `except`
can skip, count and name all of them. `captions` is empty if the caption or the picture is missing.
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
from typing_extensions import override

from prunet.errors import UserError

# Only these decoders: otherwise Pillow would start Ghostscript for a "cat.jpg" that contains EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
PICTURE_FILES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".avif", ".heic", ".heif"),
)
MAX_FILE_MIB = 256  # limit for a picture that is read into memory
MOST_PIXELS = 50_000_000  # of a picture that a user names
PNG = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
TURNING_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0")

logging.getLogger("PIL").addHandler(logging.NullHandler())  # otherwise its logs go to the terminal


class BrokenPicture(Exception):
    """Raised for a sample that cannot be used: skip it, count it, name it."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(key, why)  # both, so that it can be pickled
        self.key, self.why = key, why

    @override
    def __str__(self) -> str:
        return f"{self.key}: {self.why}"


@dataclass(frozen=True)
class Picture:
    """One sample of a source, not opened yet."""

    key: str  # unique and stable: "train/cat.png", "shard-0001.tar/000123", "train.parquet/00000007"
    captions: tuple[str, ...]  # stripped and non-empty; no captions where the sample is known to be unusable
    open: Callable[[], Image.Image]  # upright, RGB, transparency over white; raises BrokenPicture


@dataclass(frozen=True, eq=False)
class Fitted:
    """A picture that was resized and cropped, with the values for SDXL's micro-conditioning."""

    pixels: torch.Tensor  # (3, height, width), float32 in [-1, 1]
    original_size: tuple[int, int]  # (height, width) before the resize
    crop_top_left: tuple[int, int]  # (top, left) of the crop, after the resize and the flip
    flipped: bool


def fit(
    image: Image.Image,
    size: int | tuple[int, int],
    *,
    crop: Literal["center", "random"] = "center",
    flip: bool = False,
    seed: int = 0,
) -> Fitted:
    """Resizes a picture until it just covers `size` (a side, or (height, width)), perhaps flips it, and crops it.

    Resizes bilinearly with antialiasing, in the order of the scripts of BK-SDM and SDXL, and rounds sizes as
    torchvision's Resize and CenterCrop do. All randomness comes from `seed`; `flip` does not change the crop.

    Raises:
        UserError: `size` or `crop` is not a valid value.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if crop not in ("center", "random") or min(height, width) < 1:
        raise UserError(f"fit(size={size!r}, crop={crop!r}): size must be above 0, crop 'center' or 'random'")
    image = to_rgb(image)
    W, H = image.size
    resized_h, resized_w = (height, W * height // H) if H * width <= W * height else (H * width // W, width)
    rng = random.Random(str(seed))  # a string, because Random(-1) equals Random(1)
    flipped = rng.random() < 0.5 and flip
    spare_h, spare_w = resized_h - height, resized_w - width
    top, left = round(spare_h / 2), round(spare_w / 2)
    if crop == "random":
        top, left = int(rng.random() * (spare_h + 1)), int(rng.random() * (spare_w + 1))
    # Only the crop is computed: a whole strip of 1 x 30000, resized to cover 1024 pixels, would take 90 GB.
    x, sx, sy = (spare_w - left if flipped else left), W / resized_w, H / resized_h
    box = (x * sx, top * sy, min(W, (x + width) * sx), min(H, (top + height) * sy))
    image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    image = ImageOps.mirror(image) if flipped else image
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 127.5 - 1
    return Fitted(pixels, (H, W), (top, left), flipped)


def bucket_sizes(size: int, step: int) -> list[tuple[int, int]]:
    """Returns (height, width) of shapes from square to 4:1, with at most `size` squared pixels.

    Sides are multiples of `size` / 16 and of `step` pixels. At 1024 these are the shapes that SDXL was trained with
    (arXiv 2307.01952, appendix I), except a few between them.
    """
    unit = -(-max(step, size // 16) // step) * step
    pairs = {(long, size * size // long // unit * unit) for long in range(size, 2 * size + 1, unit)}
    return sorted({shape for long, short in pairs for shape in ((long, short), (short, long)) if short > 0})


def nearest_size(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns the size with the aspect ratio nearest to the picture's."""
    width, height = image.size
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(height / width)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB: 16-bit grey is divided by 257, transparency is over white, colour profiles are ignored.

    Raises:
        ValueError: the pixels are float or 32-bit numbers of unknown range.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if isinstance(clear := image.info.get("transparency"), int):
            values = np.where(values == clear, 65535, values)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("float or 32-bit pixels of unknown range")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# -- samples: every source makes them from a key, captions and a file


def make_picture(key: str, captions: tuple[str, ...], why: str, file: Path | bytes | str) -> Picture:
    """Makes a sample from a file, bytes or a URL of the Hub; without captions it is broken for the reason `why`."""
    return Picture(key, captions, partial(_decode, key, file)) if captions else broken_picture(key, why)


def read_picture(path: Path, name: str) -> Image.Image:
    """Opens a picture that the user gave with the option `name`, as RGB.

    Raises:
        UserError: prunet cannot read the picture, or it has more than `MOST_PIXELS`.
    """
    try:
        with Image.open(path, formats=formats()) as image:
            if math.prod(image.size) > MOST_PIXELS:
                raise UserError(f"{name} {path}: more than {MOST_PIXELS:,} pixels: make it smaller")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        pass  # `_decode` says why it cannot be read, or reads it
    try:
        return _decode(str(path), path)
    except BrokenPicture as error:
        raise UserError(f"{name} {error}") from error


def read_mask(path: Path, name: str) -> Image.Image:
    """Opens a mask that the user gave with the option `name`, as `read_picture` does.

    Raises:
        UserError: as there; or parts are transparent, which programs take for white or for black.
    """
    mask = read_picture(path, name)
    with Image.open(path, formats=formats()) as image:
        opaque = bool((np.asarray(image.convert("RGBA"))[..., 3] == 255).all())
    if not opaque:
        raise UserError(f"{name} {path}: has transparent parts: paint it white where the picture changes, else black")
    return mask


def broken_picture(key: str, why: str) -> Picture:
    """Makes a sample that cannot be used; its `open` raises."""
    return Picture(key, (), partial(_refuse, key, why))


def _refuse(key: str, why: str) -> Image.Image:
    raise BrokenPicture(key, why)


def _decode(key: str, file: Path | bytes | str) -> Image.Image:
    if isinstance(file, str):  # on the Hub; a lost connection is raised unchanged, because the picture is not broken
        with extra("fsspec").open(file, "rb") as remote:
            return _decode(key, remote.read())
    try:
        return _load(file)
    except UnidentifiedImageError:
        why = f"not a picture ({', '.join(formats())})"
    except Exception as error:  # decoders raise errors of any type
        why = reason_of(error)
    file = b""  # otherwise the traceback of each kept error keeps the bytes
    raise BrokenPicture(key, why)


def _load(file: Path | bytes) -> Image.Image:
    file = existing_file(file) if isinstance(file, Path) else file
    if (file.stat().st_size if isinstance(file, Path) else len(file)) == 0:
        raise ValueError("the file is empty")
    if isinstance(file, bytes) and len(file) > MAX_FILE_MIB << 20:
        raise ValueError(f"larger than {MAX_FILE_MIB} MiB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about broken EXIF and large sizes, which do not matter to the pixels
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
    with Image.open(file, formats=formats()) as image:
        with _silent_stderr() if image.format == "TIFF" else nullcontext():
            image.load()  # the first frame of several; Pillow refuses more than 179 million pixels
        return to_rgb(_upright(image))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hides libtiff's messages on file descriptor 2; Pillow also raises an error."""
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
    """Yields a PNG without its texts and profile, because Pillow refuses the whole file if these are large.

    The first result keeps the texts that may tell the picture's orientation, the second does not.
    """
    if isinstance(file, Path):
        with file.open("rb") as opened:
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
    """Returns the file of this name, in composed Unicode (as typed) or decomposed (as macOS writes it).

    Raises:
        ValueError: there is no such file.
    """
    for form in (str(path), *(unicodedata.normalize(form, str(path)) for form in ("NFC", "NFD"))):
        if os.path.isfile(form):  # not a folder called cat.png or a pipe, which would block
            return Path(form)
    raise ValueError("there is no such file")


@cache
def formats() -> list[str]:
    """Returns the formats of pictures that can be read here."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # malformed EXIF does not spoil the pixels
        return image


def as_text(name: str) -> str:
    """Returns a file name as text that can be stored, even if the name is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def reason_of(error: Exception) -> str:
    """Returns the message of an error as one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def extra(name: str, where: str = "") -> ModuleType:
    """Imports a module of the extra `data`; `where` begins the message.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{where}Parquet files and the Hub need an extra: pip install 'prunet[data]'") from None
