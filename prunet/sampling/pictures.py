"""Pictures as bytes."""

import io

from PIL import Image


def encode(picture: Image.Image, jpeg: int | None) -> bytes:
    """The picture as a JPEG of that quality, or as a PNG."""
    data = io.BytesIO()
    if jpeg:
        picture.save(data, "JPEG", quality=jpeg)
    else:
        picture.save(data, "PNG")
    return data.getvalue()
