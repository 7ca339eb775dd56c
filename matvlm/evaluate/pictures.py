"""Images of questions as they come from a task: files that nobody has decoded yet, or pixels.

All questions of a task exist before the first is answered, so an image is decoded for its batch only and then let go.
"""

from __future__ import annotations

import io
from hashlib import sha256

from PIL import Image, ImageFile


def key(image: Image.Image) -> str:
    """Hexadecimal sha256, equal for equal images: of the file, or of the pixels where there is no file any more.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    content = encoded(image)
    if content is None:
        content = f"{image.mode} {image.size} ".encode() + image.tobytes()
    return sha256(content).hexdigest()


def decode(image: Image.Image) -> Image.Image:
    """RGB pixels of ``image``, which itself keeps none that it did not have.

    Raises:
        OSError, ValueError, SyntaxError: PIL's, for a file that is cut off or no image.
    """
    content = encoded(image)
    if content is None:
        return image.convert("RGB")
    with Image.open(io.BytesIO(content)) as opened:
        return opened.convert("RGB")


def encoded(image: Image.Image) -> bytes | None:
    """The image's file, if it has one still: our tasks' images give it, PIL's have it until they are decoded."""
    if hasattr(image, "encoded"):
        return bytes(image.encoded())
    if not isinstance(image, ImageFile.ImageFile) or image.fp is None:
        return None
    place = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(place)
    return bytes(content)
