"""Pictures as bytes."""

import io

from PIL import Image


def encode(picture: Image.Image, jpeg: int | None) -> bytes:
    """Encodes a picture as a JPEG of quality `jpeg`, or as a PNG if that is None."""
    data = io.BytesIO()
    if jpeg:
        picture.save(data, "JPEG", quality=jpeg)
    else:
        picture.save(data, "PNG")
    return data.getvalue()
