"""A picture that comes in: pixels of whatever people have, and how they lie on the size that is drawn."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from sana_edge.errors import InvalidInput
from sana_edge.sizes import resized

if TYPE_CHECKING:
    # a path, the bytes of a file, a picture of Pillow or of this library, or (H, W), (H, W, 3 or 4) uint8
    Picture = str | os.PathLike[str] | bytes | PIL.Image.Image | NDArray[np.uint8] | Any

logger = logging.getLogger("sana_edge")

# Pillow knows others, some of which start programs
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# of a camera's largest, and of 8192x8192
MAX_PIXELS = 100_000_000
_HINT = "give a picture file, a picture of Pillow, or an array (H, W, 3) of uint8"


@dataclass(frozen=True, eq=False)
class InitImage:
    """What a generation starts from.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, at the size that is asked for.
        strength: above 0 to 1, the share of the steps that are taken.
        mask: (H, W) uint8, 255 where it is drawn anew, 0 where it stays; None: everywhere anew.
    """

    pixels: NDArray[np.uint8]
    strength: float
    mask: NDArray[np.uint8] | None = None

    def metadata(self) -> dict[str, object]:
        """What tells which image and mask it was; they themselves are not kept."""
        known = {"strength": self.strength, "image_sha256": hashlib.sha256(self.pixels.tobytes()).hexdigest()}
        if self.mask is not None:
            known["mask_sha256"] = hashlib.sha256(self.mask.tobytes()).hexdigest()
        return known

    def skip(self, steps: int) -> int:
        """How many of the steps are left out, as diffusers counts them; one is taken always."""
        return min(int(steps - steps * self.strength), steps - 1)

    def at(self, drawn: tuple[int, int]) -> NDArray[np.float32]:
        """(1, 3, H, W) in [-1, 1] for the encoder, at the size (width, height) that is drawn.

        Stretched to it, as diffusers does; with a mask it lies under what is cut out, so that edges meet.
        """
        pixels = to_size(self.pixels, drawn) if self.mask is None else under(self.pixels, drawn)
        values: NDArray[np.float32] = pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255 * 2 - 1
        return values

    def cells(self, drawn: tuple[int, int], cell: int) -> NDArray[np.float32] | None:
        """The mask for the latent (1, 1, h, w): 1 where any pixel of a cell is drawn anew."""
        if self.mask is None:
            return None
        width, height = drawn
        cells = under(self.mask, drawn).reshape(1, 1, height // cell, cell, width // cell, cell)
        marked: NDArray[np.float32] = (cells.max((3, 5)) > 0).astype(np.float32)
        return marked

    def paste(self, drawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """``drawn`` (H, W, 3) where the mask is 255, the picture itself where it is 0, mixed between."""
        if self.mask is None:
            return drawn
        share = self.mask[..., None].astype(np.float32) / 255
        return np.rint(share * drawn + (1 - share) * self.pixels).astype(np.uint8)


def read_image(image: Picture) -> NDArray[np.uint8]:
    """A picture as pixels (H, W, 3) uint8 RGB: turned as its EXIF says, on white where it is transparent.

    Of an animation the first picture is taken, of 16 bits the upper 8.

    Raises:
        InvalidInput: the file is missing or no picture, or the value is of another kind.
    """
    opened = _opened(image, "image")
    if opened.mode.startswith("I") or opened.mode == "F":
        opened = _eight_bits(opened)
    if "A" in opened.getbands() or "transparency" in opened.info:
        layer = _converted(opened, "RGBA", "image")
        opened = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, "white"), layer)
    return np.array(_converted(opened, "RGB", "image"))


def read_mask(mask: Picture, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A mask for a picture of ``size`` (width, height), as (H, W) uint8: 255 is drawn anew, 0 stays.

    Another size is resized; an array of 0 and 1, or of booleans, is a mask, too.

    Raises:
        InvalidInput: as `read_image`; or it is empty.
    """
    if isinstance(mask, np.ndarray) and mask.ndim == 2 and (mask.dtype == bool or mask.max(initial=0) <= 1):
        mask = (mask > 0).astype(np.uint8) * np.uint8(255)
    opened = _opened(mask, "mask")
    if opened.mode.startswith("I") or opened.mode == "F":
        opened = _eight_bits(opened)
    grey = _converted(opened, "L", "mask")
    values = np.array(grey if grey.size == size else grey.resize(size, PIL.Image.Resampling.BILINEAR))
    if not values.any():
        raise InvalidInput("the mask is black everywhere", "make white what is to be drawn anew")
    return values


def to_size(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) or mask (H, W), stretched to (width, height) by Lanczos, as in diffusers."""
    if size == (pixels.shape[1], pixels.shape[0]):
        return pixels
    return np.array(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.LANCZOS))


def under(pixels: NDArray[np.uint8], drawn: tuple[int, int]) -> NDArray[np.uint8]:
    """What becomes ``pixels`` when it is drawn at ``drawn`` (width, height), then resized and cropped.

    What the crop takes away continues the edges.
    """
    asked = (pixels.shape[1], pixels.shape[0])
    (width, height), (left, top) = resized(drawn, asked)
    rows = (top, height - asked[1] - top)
    columns = (left, width - asked[0] - left)
    return to_size(np.pad(pixels, (rows, columns, (0, 0))[: pixels.ndim], mode="edge"), drawn)


def _opened(image: Picture, what: str) -> PIL.Image.Image:
    """Of any kind, read whole."""
    if isinstance(image, bytes | str | os.PathLike):
        name = "" if isinstance(image, bytes) else f" {os.fspath(image)}"
        try:
            file = io.BytesIO(image) if isinstance(image, bytes) else image
            # a pipe would wait for its writer
            if not isinstance(file, io.BytesIO) and os.path.exists(file) and not os.path.isfile(file):
                raise InvalidInput(f"the {what}{name} is no regular file", _HINT)
            with warnings.catch_warnings():
                # of damaged tags and of many pixels, which are counted here
                warnings.simplefilter("ignore")
                opened = PIL.Image.open(file, formats=FORMATS)
            with opened:
                # to count them takes as long as there are many
                if getattr(opened, "is_animated", False):
                    logger.warning("the %s%s has several pictures: the first one is taken", what, name)
                return _turned(opened, what)
        except FileNotFoundError:
            raise InvalidInput(f"{what}{name} does not exist", "check the path") from None
        except InvalidInput:
            raise
        # decoders of many formats, with errors of their own
        except Exception as error:
            raise InvalidInput(f"cannot read the {what}{name}: {error}", _HINT) from error
    if isinstance(image, PIL.Image.Image):
        try:
            return _turned(image, what)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"cannot read the {what}: {error}", _HINT) from error
    pixels = getattr(image, "pixels", image)
    if not isinstance(pixels, np.ndarray):
        raise InvalidInput(f"the {what} is of type {type(image).__name__}", _HINT)
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not fits or not pixels.size:
        found = f"the {what} is an array {'x'.join(map(str, pixels.shape))} of {pixels.dtype}"
        raise InvalidInput(found, _HINT)
    return PIL.Image.fromarray(pixels)


def _turned(image: PIL.Image.Image, what: str) -> PIL.Image.Image:
    """The pixels, turned as EXIF says; a small file can have more than memory holds."""
    if image.width * image.height > MAX_PIXELS:
        found = f"the {what} has {image.width}x{image.height} pixels"
        raise InvalidInput(found, f"give at most {MAX_PIXELS // 1_000_000} million")
    image.load()
    return PIL.ImageOps.exif_transpose(image)


def _converted(image: PIL.Image.Image, mode: str, what: str) -> PIL.Image.Image:
    try:
        return image.convert(mode)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read the {what}: {error}", "save it in RGB") from error


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Pillow clips more than 8 bits instead of scaling them."""
    values = np.nan_to_num(np.asarray(image, np.float64), nan=0.0)
    most = 65535.0 if image.mode.startswith("I") else 1.0
    return PIL.Image.fromarray(np.rint(np.clip(values / most, 0, 1) * 255).astype(np.uint8))
