"""Pictures as bytes, and how far apart two are."""

import io

import numpy as np
from PIL import Image


def encode(picture: Image.Image, jpeg: int | None) -> bytes:
    """Encodes a picture as a JPEG of quality `jpeg`, or as a PNG if `jpeg` is None."""
    data = io.BytesIO()
    if jpeg:
        picture.save(data, "JPEG", quality=jpeg)
    else:
        picture.save(data, "PNG")
    return data.getvalue()


def picture_rmse(a: Image.Image, b: Image.Image) -> float:
    """Returns the root mean squared error of two pictures of one size, 0 to 1 (full brightness)."""
    x, y = (np.asarray(p.convert("RGB"), dtype=np.float64) / 255 for p in (a, b))
    return float(np.sqrt(((x - y) ** 2).mean()))
