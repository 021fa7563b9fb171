"""Images between files, PIL and tensors: the only place that knows uint8 HWC.

Shapes: B batch, H W image size in px.
"""

from __future__ import annotations

import functools
import stat
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from tavq.base.files import atomic_write

MIN_SIDE_PX = 8
BAND_PIXELS = 2**22  # converted at once, in large images
MAX_PIXELS = 89_478_485
"""Larger images are not decoded. It is the size above which Pillow warns of a decompression bomb."""
UNKNOWN_GREY = 0.6  # in [-1, 1]; the part of a partial image that is not known yet
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are decoded. EPS is not among them: Pillow starts Ghostscript to read it."""
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


ImageSource = str | Path | Image.Image | np.ndarray
"""What a caller may give as an image: a path, a PIL image, or an array (see `open_image`)."""


class UnreadableImageError(ValueError):
    """An image that cannot be used: truncated, no image at all, or too small."""


def open_images(sources: ImageSource | Sequence[ImageSource]) -> list[Image.Image]:
    """Open one image or several, see `open_image`; an array (n, H, W, channels) is n images."""
    if isinstance(sources, str | Path | Image.Image):
        return [open_image(sources)]
    if isinstance(sources, np.ndarray) and sources.ndim < 4:
        return [open_image(sources)]
    return [open_image(source) for source in sources]


def open_image(source: ImageSource) -> Image.Image:
    """Turn a path, a PIL image or an array into an upright 8-bit RGB image at its own size.

    Args:
        source: an array is (H, W), (H, W, 3) or (H, W, 4), uint8 or floats in [0, 1].

    Raises:
        FileNotFoundError: no such file.
        UnreadableImageError: no image, or one that is too small or too large.
        TypeError: `source` is none of these.
    """
    if isinstance(source, str | Path):
        return load_image(source)
    if isinstance(source, np.ndarray):
        source = _array_to_pil(source)
    if not isinstance(source, Image.Image):
        raise TypeError(f"got a {type(source).__name__} as an image; give a path, a PIL image or an array")
    return to_rgb(source)


def _array_to_pil(array: np.ndarray) -> Image.Image:
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not shape_fits:
        raise UnreadableImageError(f"array of shape {array.shape}, expected (H, W), (H, W, 3) or (H, W, 4)")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and 0 <= array.min() and array.max() <= 1):
            raise UnreadableImageError("array of floats outside [0, 1]; scale it, or give uint8")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UnreadableImageError(f"array of {array.dtype}, expected uint8, or floats in [0, 1]")
    return Image.fromarray(array)


def load_image(source: str | Path | BinaryIO) -> Image.Image:
    """Read an image file of any of `FORMATS`, whatever its name, as an upright 8-bit RGB image.

    Args:
        source: a path or an open binary file.

    Returns:
        PIL image of mode RGB, at its own size (EXIF orientation applied, see `to_rgb`).

    Raises:
        FileNotFoundError: `source` is a path at which nothing lies.
        UnreadableImageError: the file is truncated, is no image, is no regular file, is smaller than 8 px a
            side, or has more than `MAX_PIXELS`.
    """
    name = str(source) if isinstance(source, str | Path) else getattr(source, "name", "image")
    try:
        if isinstance(source, str | Path) and not stat.S_ISREG(Path(source).stat().st_mode):
            raise UnreadableImageError("not a regular file")  # reading from a pipe could wait for ever
        with Image.open(source, formats=_known_formats()) as image:
            _check_pixels(image)
            image.load()
            return to_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no image at {name}; expected a file such as photo.jpg, check the path"
        ) from None
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).split())
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not an image of a known format ({', '.join(_known_formats())})"
        raise UnreadableImageError(f"{name}: {reason}; replace the file or take it out") from error


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow was built with; older ones know no AVIF."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_pixels(image: Image.Image) -> None:
    """Refuse an image that is too large by its header, before any pixel is decoded."""
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise UnreadableImageError(
            f"image is {image.width} x {image.height} px, that is {pixels / 1e6:.0f} million pixels, and at "
            f"most {MAX_PIXELS / 1e6:.0f} million are read"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL image to 8-bit RGB: upright by EXIF, transparency over white, 16 bit scaled to 8.

    Raises:
        UnreadableImageError: a side is shorter than 8 px, or the samples are floating point.
    """
    if min(image.size) < MIN_SIDE_PX:
        raise UnreadableImageError(
            f"image is {image.width} x {image.height} px, at least {MIN_SIDE_PX} px a side are needed; "
            "use a larger one"
        )
    if image.mode == "F":
        raise UnreadableImageError(
            "image has floating-point samples of unknown range, 8 or 16 bit is expected; convert it"
        )
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)

    # Band by band: the steps between take up to 25 bytes a pixel.
    rgb = Image.new("RGB", image.size)
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(_band_to_rgb(band), (0, top))
    return rgb


def _band_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: 0..65535 -> 0..255
        levels = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def squash(image: Image.Image, size_px: int) -> Image.Image:
    """Resize an image to the square as RGB (antialiased bicubic; nothing is cropped).

    Squashing twice to the same size changes nothing, so an image may be squashed as soon as it is read.
    """
    rgb = image if image.mode == "RGB" else to_rgb(image)
    if rgb.size == (size_px, size_px):
        return rgb
    return rgb.resize((size_px, size_px), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image, size_px: int) -> Tensor:
    """Squash an image to the square, see `squash`.

    Args:
        image: any PIL image.
        size_px: side of the square.

    Returns:
        (3, size_px, size_px) float32 in [-1, 1].
    """
    return from_pixels(to_pixels(image, size_px))


def to_pixels(image: Image.Image, size_px: int) -> Tensor:
    """Squash an image to the square, as `to_tensor` does, but keep bytes: (3, size_px, size_px) uint8."""
    pixels_HWC = np.array(squash(image, size_px), dtype=np.uint8)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()


def from_pixels(pixels: Tensor) -> Tensor:
    """Bytes 0..255 of any shape -> float32 in [-1, 1]."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(images_BCHW: Tensor) -> Tensor:
    """Map images from [-1, 1] to 0..255, rounded; what a decoder overshoots is clipped.

    Args:
        images_BCHW: (B, 3, H, W), float.

    Returns:
        (B, 3, H, W) uint8 on the same device.
    """
    if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
        raise ValueError(
            f"images have shape {tuple(images_BCHW.shape)}, expected (B, 3, H, W); add the batch axis"
        )
    scaled = (images_BCHW.detach().to(torch.float32) + 1.0) * 127.5
    return scaled.round().clamp_(0, 255).to(torch.uint8)


def to_pil(images_BCHW: Tensor) -> list[Image.Image]:
    """Turn (B, 3, H, W) floats in [-1, 1] into B RGB images (rounded; overshoot clipped)."""
    pixels_BHWC = to_uint8(images_BCHW).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(pixels_HWC)) for pixels_HWC in pixels_BHWC]


def blend(image: Image.Image, background: Image.Image | None, weight: Tensor) -> Image.Image:
    """Show `image` where `weight` (1, 1, h, w) is 1, and `background` (grey if None) where it is 0."""
    size = image.width
    alpha = F.interpolate(weight, size=(size, size), mode="nearest")
    if background is None:
        behind = torch.full((1, 3, size, size), UNKNOWN_GREY)
    else:
        behind = to_tensor(background, size)[None]
    return to_pil(alpha * to_tensor(image, size)[None] + (1 - alpha) * behind)[0]


def write_png(image: Image.Image, path: Path, fields: PngInfo | None = None) -> None:
    """Write an image as PNG, atomically; `fields` are text fields to store in it."""
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=fields)


def grid(images: Sequence[Image.Image], columns: int, gap_px: int = 2) -> Image.Image:
    """Lay images of one size out row by row on white, `gap_px` apart.

    Raises:
        ValueError: no image, fewer than one column, or images of unlike size.
    """
    if not images or columns < 1:
        raise ValueError(f"got {len(images)} images and {columns} columns, expected at least one of each")
    width, height = images[0].size
    if any(image.size != (width, height) for image in images):
        raise ValueError(f"images differ in size from the first, {width} x {height} px; resize them before")

    rows = -(-len(images) // columns)
    sheet_size = (columns * (width + gap_px) - gap_px, rows * (height + gap_px) - gap_px)
    sheet = Image.new("RGB", sheet_size, "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        sheet.paste(image, (column * (width + gap_px), row * (height + gap_px)))
    return sheet
