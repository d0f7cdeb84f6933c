"""Image files to RGB arrays of one size: the decoding that all packers of image files share.

JPEG, PNG and WebP are recognised by their content, not by the name. Images are rotated as EXIF says if asked for. Grey,
palette, CMYK and 16-bit images become RGB, colour profiles are not applied, and what is transparent is laid on white.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin

from arraytp.data.shards import Images
from arraytp.data_prep.options import Exif, Resize

# Memory: an image takes 4 bytes a pixel, up to five times at once; all that are being decoded have no more together.
MAX_PIXELS = 2**26
# Pillow takes a line of 2³¹ bits or more for a lack of memory; a pixel of a PNG has up to 64.
_MAX_SIDE = 2**24
_FORMATS = (
    JpegImagePlugin.JpegImageFile.format,
    PngImagePlugin.PngImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
)
# The byte of a PNG's header that says how many bits a value has.
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
    """A file that is no image that can be used; the message is the reason, without the file's name."""


class _Room:
    """Pixels that may be decoded at once, by all threads."""

    def __init__(self, pixels: int) -> None:
        self._free, self._changed = pixels, threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait for so many, and give them back."""
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
    """Hold room for an image file's pixels while it is worked on: threads together hold no more than `MAX_PIXELS`.

    BrokenImageError as `decode`, from the file's header.
    """
    with _breakage():
        pixels = _checked_pixels(Image.open(io.BytesIO(content), formats=_FORMATS))
    with _ROOM.taken(pixels):
        yield


def _checked_pixels(image: Image.Image) -> int:
    """Return how many pixels an image's header promises, if they are not too many, nor its sides too long."""
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise BrokenImageError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
    if max(image.size) > _MAX_SIDE:
        raise BrokenImageError(f"{image.width} x {image.height} pixels have a side longer than {_MAX_SIDE}")
    return pixels


def decode(content: bytes, exif: Exif = "apply") -> Image.Image:
    """Decode an image file: an opaque RGB image, turned upright as its EXIF orientation says, or not.

    BrokenImageError if it is not JPEG, PNG or WebP, is damaged or truncated, or has more than 2²⁶ pixels, or 2²⁴ on
    a side; MemoryError.
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
    # Nothing is wrong with an image for which there is no memory.
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
    """Bring a PNG's transparent grey or colour to the 8 bits that Pillow brings the pixels to."""
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
    # An image whose EXIF cannot be read is still an image.
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
    """Bring an RGB image to a size, (H, W), bilinearly and with antialiasing where it becomes smaller.

    `resize` says whether to change its aspect, or to cut away what is too much at both ends of the longer side. Returns
    an array of shape (H, W, 3), uint8.
    """
    height, width = size
    if image.size == (width, height):
        return np.asarray(image)
    box = None
    if resize == "shorter-crop":
        scale = min(image.width / width, image.height / height)
        # Rounding must not lead out of the image: Pillow refuses that.
        kept_width, kept_height = min(scale * width, image.width), min(scale * height, image.height)
        left, top = (image.width - kept_width) / 2, (image.height - kept_height) / 2
        box = (left, top, left + kept_width, top + kept_height)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box))
