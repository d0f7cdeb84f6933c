"""Decoding of image files to RGB arrays of one size, shared by all packers of image files.

JPEG, PNG and WebP are recognised by content, not by name. Images are rotated according to EXIF, unless this is turned
off. Grey, palette, CMYK and 16-bit images become RGB, colour profiles are not applied, and transparency is composited
on white.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin

from arraytp.data.shards import Images
from arraytp.data_prep.options import Exif, Resize

# Limits memory: an image takes up to five copies of 4 bytes per pixel; all images being decoded share this limit.
MAX_PIXELS = 2**26
# Pillow reports a line of 2³¹ bits or more as a lack of memory; a PNG's pixel has up to 64 bits.
_MAX_SIDE = 2**24
_FORMATS = (
    JpegImagePlugin.JpegImageFile.format,
    PngImagePlugin.PngImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
)
# The position of the byte in a PNG's header that gives the bits per value.
_PNG_DEPTH = 24
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImageError(Exception):
    """A file is not a usable image; the message is the reason, without the file's name."""


class _Room:
    """The number of pixels that all threads together may decode at once."""

    def __init__(self, pixels: int) -> None:
        self._free, self._changed = pixels, threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait until `pixels` are free, take them, and give them back at the end."""
        with self._changed:
            self._changed.wait_for(lambda: pixels <= self._free)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_ROOM = _Room(MAX_PIXELS)


@contextmanager
def room_for(content: bytes) -> Iterator[None]:
    """Reserve an image file's pixels while it is processed: all threads together reserve at most `MAX_PIXELS`.

    BrokenImageError like `decode`, but from the file's header alone.
    """
    with _breakage():
        pixels = _checked_pixels(Image.open(io.BytesIO(content), formats=_FORMATS))
    with _ROOM.taken(pixels):
        yield


def _checked_pixels(image: Image.Image) -> int:
    """Return the number of pixels stated in an image's header; BrokenImageError if it or a side is too large."""
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise BrokenImageError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
    if max(image.size) > _MAX_SIDE:
        raise BrokenImageError(f"{image.width} x {image.height} pixels have a side longer than {_MAX_SIDE}")
    return pixels


def decode(content: bytes, exif: Exif = "apply") -> Image.Image:
    """Decode an image file to an opaque RGB image; with `exif` "apply", rotated by its EXIF orientation.

    BrokenImageError if it is not JPEG, PNG or WebP, is damaged or truncated, or has more than 2²⁶ pixels, or 2²⁴ on
    a side; MemoryError if memory runs out.
    """
    with _breakage():
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        _checked_pixels(image)
        image.load()
        if image.format == PngImagePlugin.PngImageFile.format:
            _scale_transparent(image, content[_PNG_DEPTH])
        return _to_rgb(_upright(image) if exif == "apply" else image)


@contextmanager
def _breakage() -> Iterator[None]:
    try:
        yield
    # An image for which memory is lacking is not broken.
    except (BrokenImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BrokenImageError("not a JPEG, PNG or WebP image") from None
    # A damaged file makes Pillow raise OSError, SyntaxError, ValueError, struct.error and more.
    except Exception as error:
        if str(error).startswith("out of memory"):
            raise MemoryError from error
        raise BrokenImageError(" ".join(str(error).split()) or type(error).__name__) from error


def _scale_transparent(image: Image.Image, depth: int) -> None:
    """Convert a PNG's transparent grey or colour to 8 bits, as Pillow converts the pixels."""
    transparent = image.info.get("transparency")
    if image.mode == "L" and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // (2**depth - 1)
    elif image.mode == "RGB" and isinstance(transparent, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def _upright(image: Image.Image) -> Image.Image:
    if "exif" not in image.info:
        return image
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    # An image with unreadable EXIF is still usable.
    except Exception:
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        grey = ((deep.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        if "transparency" in image.info:
            grey[deep == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(page, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: tuple[int, int], resize: Resize) -> Images:
    """Resize an RGB image to `size`, (H, W), bilinearly and with antialiasing where it shrinks.

    `resize` says whether to change the aspect ratio, or to crop the longer side equally at both ends. Returns an array
    of shape (H, W, 3), uint8.
    """
    height, width = size
    if image.size == (width, height):
        return np.asarray(image)
    box = None
    if resize == "shorter-crop":
        scale = min(image.width / width, image.height / height)
        # Rounding must not move the box beyond the image, which Pillow refuses.
        kept_width, kept_height = min(scale * width, image.width), min(scale * height, image.height)
        left, top = (image.width - kept_width) / 2, (image.height - kept_height) / 2
        box = (left, top, left + kept_width, top + kept_height)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box))
