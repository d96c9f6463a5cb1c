"""Images as tables hold them: found, read whole, checked by their headers, and decoded as transformers' `load_image` does.

What could only be shown wrong, or would take memory without end, is a bad row: never a white picture, never a crash.
"""

import hashlib
import os
import re
import warnings
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from .cells import BadRow

# Of all that Pillow opens, pictures of one size: no PostScript (which it gives to another program), no icons, no projects.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MOST_PIXELS = 50_000_000  # 150 MB in RGB; the largest that telephones take
MOST_BYTES = 2**28  # of a file
MISSING, DEEP = "missing image", "grey image of more than 8 bits"  # problems with a remedy
LONGEST = 100  # times as long as wide: "shortest edge 224" makes 22,400 pixels of it


@dataclass(frozen=True)
class Hub:
    """A data set on the hub: its rows may name its own files, and what `datasets` keeps of it in `caches`, nothing else."""

    name: str
    caches: tuple[Path, ...] = ()

    def owns(self, path: str) -> bool:
        """Whether an address is one of the data set's own: hf://datasets/NAME, or in an archive there (zip://a.png::hf://...)."""
        own = re.compile(rf"(\w+://[^:]*::)?hf://datasets/{re.escape(self.name)}(@[^/]*)?/")
        return bool(own.match(path)) and ".." not in path.split("/")

    def keeps(self, path: str) -> bool:
        place = Path(path).resolve()
        return os.path.isabs(path) and any(place.is_relative_to(folder.resolve()) for folder in self.caches)


Root = Path | Hub | None  # where relative paths start; None: nowhere


def stored_image(value: Any) -> tuple[bytes | None, str | None]:
    """Content and path of an image that a row holds as bytes, path, or both in a dict; None for what is neither."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
    return (bytes(content) if isinstance(content, bytes | bytearray) else None, path if isinstance(path, str) else None)


def read_content(value: Any, root: Root) -> bytes:
    """The bytes of a row's image; raises BadRow where there are none, or more than a picture has. Addresses are not fetched,
    but for a hub data set's own."""
    content, path = stored_image(value)
    if content is None:
        content = _read(path or "", root)
    if len(content) > MOST_BYTES:
        raise BadRow(f"image of more than {MOST_BYTES >> 20} MiB", path or "embedded")
    return content


def _read(path: str, root: Root) -> bytes:
    try:
        if isinstance(root, Hub) and root.owns(path):
            import fsspec

            with fsspec.open(path, "rb") as file:
                return file.read(MOST_BYTES + 1)
        place = path if isinstance(root, Hub) else os.path.join(root or "", path)
        if isinstance(root, Hub) and not root.keeps(path):
            raise BadRow("image that is none of the data set's own", path or "no path")
        if not (os.path.isabs(place) and os.path.isfile(place)):  # no device, no pipe
            raise BadRow(MISSING, path or "no path")
        with open(place, "rb") as file:
            return file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow("image that cannot be read", path) from error


def decode(content: bytes, path: str | None = None) -> Image.Image:
    """The picture in RGB, upright, the first of several; raises BadRow. Its header is judged before it is decoded."""
    from transformers.image_utils import load_image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about sizes that are judged here, and about broken metadata
            image = Image.open(BytesIO(content), formats=formats())
            if problem := unfit(image):
                raise BadRow(problem, path or "embedded")
            return load_image(image)
    except BadRow:
        raise
    except Image.DecompressionBombError as error:
        raise BadRow(too_large(), path or "embedded") from error
    except Exception as error:  # Pillow raises nearly anything for a broken file
        raise BadRow("image that cannot be read", path or "embedded") from error


def unfit(image: Image.Image) -> str | None:
    """Why a picture that is opened and not yet decoded is not taken; None where it is."""
    short, long = sorted(image.size)
    if short * long > MOST_PIXELS:
        return too_large()
    if long > LONGEST * short:
        return f"image more than {LONGEST} times as long as wide"
    if image.mode[0] in "IF":  # convert("RGB") clips them at 255; which values are black and white only the owner knows
        return DEEP
    return None


def too_large() -> str:
    return f"image of more than {MOST_PIXELS // 10**6} million pixels"


@cache
def formats() -> list[str]:
    """Those of FORMATS that this Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def digest(content: bytes) -> bytes:
    """What tells images apart, whatever their paths: the SHA-256 of the file."""
    return hashlib.sha256(content).digest()
