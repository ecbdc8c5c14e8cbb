"""Pictures that come with a request: bytes become pixels here, and none is ever read from a path."""

from __future__ import annotations

import base64
import binascii
import io

import PIL.Image
import PIL.ImageOps

from sana_edge.errors import InvalidInput
from sana_edge.init_image import FORMATS

# bytes of a request that may have pictures in it, in base64, too
MAX_UPLOAD = 48 << 20
# the largest that the models draw; larger ones would fill memory while they wait
MAX_PIXELS = 4096 * 4096
_HINT = f"send a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture"


def decode(data: bytes, name: str) -> PIL.Image.Image:
    """A picture of a file's bytes, turned as its EXIF says; of an animation the first.

    Raises:
        InvalidInput: it is no picture, is broken, or has more than `MAX_PIXELS`.
    """
    try:
        opened = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = opened.size
        if width * height <= MAX_PIXELS:
            opened.load()
            turned = PIL.ImageOps.exif_transpose(opened)
            # what Pillow makes no grey of
            return turned.convert("RGBA") if turned.mode == "LAB" else turned
    # decoders of many formats, with errors of their own
    except Exception as error:
        reason = " ".join(str(error).split()).partition("<_io.BytesIO")[0].rstrip()
        raise InvalidInput(f"cannot read the {name}: {reason}", _HINT) from error
    raise InvalidInput(f"the {name} has {width}x{height} pixels", f"send at most {MAX_PIXELS} pixels")


def decode_text(text: str, name: str) -> PIL.Image.Image:
    """`decode` of base64, also as an URL of the kind "data:image/png;base64,"."""
    head, comma, rest = text.partition(",")
    try:
        data = base64.b64decode(rest if comma and head.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(f"the {name} is no base64: {error}", "send the file's bytes as base64") from error
    return decode(data, name)


def transparent(mask: PIL.Image.Image) -> PIL.Image.Image:
    """OpenAI's mask, transparent where it is drawn anew, as one that is white there.

    Raises:
        InvalidInput: it has no alpha.
    """
    if "A" not in mask.getbands() and "transparency" not in mask.info:
        raise InvalidInput("the mask has no alpha", "make transparent what is to be drawn anew")
    return PIL.ImageOps.invert(mask.convert("RGBA").getchannel("A"))
