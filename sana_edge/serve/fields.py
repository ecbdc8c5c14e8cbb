"""The fields of a request: a JSON object whose values are read one by one, each with its own error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import PIL.Image

from sana_edge.errors import InvalidInput
from sana_edge.image import QUALITY
from sana_edge.request.plan import random_seed
from sana_edge.request.request import Request
from sana_edge.serve import uploads
from sana_edge.serve.job import Encoding, Job
from sana_edge.system import json_values

# pictures of one request
MAX_PICTURES = 10
_SIZE = re.compile(r"(\d{1,9})\s*[xX*]\s*(\d{1,9})")
_FORMATS = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP"}
# of a form, what may look like a number and is none
_TEXTS = ("prompt", "negative_prompt", "instruction", "model", "size", "user")


class Fields:
    """A JSON object; null stands for a field that is left out.

    Raises:
        InvalidInput: of each method, a value of another kind, which names the field.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    @classmethod
    def of_form(cls, items: Iterable[tuple[str, str | bytes]]) -> Fields:
        """The fields of a form, where all is text but files; ``image[]`` is ``image``."""
        values: dict[str, Any] = {}
        for name, value in items:
            name = name.removesuffix("[]")
            if name in values:
                raise InvalidInput(f"there are several fields {shown(name)}", "send one")
            values[name] = value if isinstance(value, bytes) or name in _TEXTS else _plain(value)
        return cls(values)

    @classmethod
    def parse(cls, text: bytes | str) -> Fields:
        """Read an object."""
        try:
            values = json_values.parse(text)
        except ValueError as error:
            raise InvalidInput(f"this is no JSON: {error}", "send a JSON object in UTF-8") from error
        if not isinstance(values, dict):
            raise InvalidInput(f"this is JSON, but no object: {shown(values)}", 'send {"prompt": ...}')
        return cls(values)

    def text(self, *names: str, most: int | None = None) -> str | None:
        """A string, of the first of these names that is there."""
        name, value = self._first(names)
        if value is not None and not isinstance(value, str):
            raise InvalidInput(f"{name} is {shown(value)}", "give a string")
        if value is not None and most is not None and len(value) > most:
            raise InvalidInput(f"{name} has {len(value)} characters", f"give at most {most}")
        return value

    def whole(self, *names: str, low: int | None = None, high: int | None = None) -> int | None:
        """A whole number; JSON does not tell 20.0 from 20."""
        name, value = self._first(names)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise InvalidInput(f"{name} is {shown(value)}", "give a whole number")
        if value is not None and low is not None and high is not None and not low <= value <= high:
            raise InvalidInput(f"{name} is {shown(value)}", f"choose a whole number from {low} to {high}")
        return value

    def number(self, *names: str) -> float | None:
        """A number."""
        name, value = self._first(names)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InvalidInput(f"{name} is {shown(value)}", "give a number")
        return value

    def flag(self, name: str) -> bool:
        """True or false, which it also is where it is left out."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise InvalidInput(f"{name} is {shown(value)}", "give true or false")
        return bool(value)

    def choice(self, name: str, known: Sequence[str]) -> str | None:
        """One of the strings in ``known``."""
        value = self.text(name)
        if value is not None and value not in known:
            raise InvalidInput(f"{name} is {shown(value)}", f"choose {', '.join(known)}")
        return value

    def size(self, name: str = "size") -> tuple[int, int] | None:
        """Width and height in pixels, "WxH" or [W, H]; None for "auto"."""
        value = self.values.get(name)
        if value is None or value == "auto":
            return None
        if isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value):
            return value[0], value[1]
        match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None:
            raise InvalidInput(f"{name} is {shown(value)}", 'give "WIDTHxHEIGHT" in pixels, or "auto"')
        return int(match.group(1)), int(match.group(2))

    def picture(self, name: str) -> PIL.Image.Image | None:
        """A picture: base64, or the bytes of a file that a form has."""
        value = self.values.get(name)
        if isinstance(value, bytes):
            return uploads.decode(value, name)
        text = self.text(name)
        return uploads.decode_text(text, name) if text else None

    def linear(self) -> bool:
        """Whether previews are made by the linear map."""
        return self.choice("preview", ("decoded", "linear")) == "linear"

    def encoding(self, kind: str = "output_format", quality: str = "output_compression") -> Encoding:
        """How pictures are sent."""
        name = self.choice(kind, tuple(_FORMATS)) or "png"
        value = self.whole(quality, low=0, high=100)
        # Pillow's scale begins at 1
        return Encoding(_FORMATS[name], QUALITY if value is None else max(value, 1))

    def request(self, *, images: int | None, size: tuple[int, int] | None, **more: Any) -> Request:
        """The request in the fields that all faces share, by the names that clients have for them.

        Args:
            more: of `Request`, what the face has read by names of its own.
        """
        prompt = self.text("prompt")
        if prompt is None:
            raise InvalidInput("there is no prompt", "say what the picture should show")
        seed = self.whole("seed")
        values: dict[str, Any] = {
            "negative_prompt": self.text("negative_prompt") or "",
            "steps": self.whole("steps", "num_inference_steps"),
            "guidance": self.number("guidance", "guidance_scale", "cfg_scale"),
            "seed": random_seed() if seed is None else seed,
            "sampler": self.text("sampler"),
            "exact_size": self.flag("exact_size"),
            "flow_shift": self.number("flow_shift"),
            "instruction": self.text("instruction"),
            "tile": self.whole("tile"),
            "variations": self.whole("variations", low=1, high=MAX_PICTURES),
            "variation_strength": self.number("variation_strength"),
            "variation_seed": self.whole("variation_seed"),
            "variation": () if self.values.get("variation") is None else self.values["variation"],
            **more,
        }
        return Request(prompt, size=size, images=1 if images is None else images, **values)

    def job(self, known: Callable[[object], str]) -> Job:
        """The job that applications ask for, by both their faces; ``known`` says which model is meant."""
        every = self.whole("preview_every", low=0, high=1000) or 0
        return Job(
            known(self.text("model")),
            self.request(
                images=self.whole("images", "n", low=1, high=MAX_PICTURES),
                size=self.size(),
                image=self.picture("image"),
                mask=self.picture("mask"),
                strength=self.number("strength"),
            ),
            preview=lambda step, steps: every > 0 and (step + 1) % every == 0,
            linear=self.linear(),
            encoding=self.encoding(),
        )

    def _first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        found = (name for name in names if self.values.get(name) is not None)
        name = next(found, names[0])
        return name, self.values.get(name)


def _plain(text: str) -> Any:
    """A number, true, false or null that a form has as text."""
    try:
        value = json_values.parse(text)
    except ValueError:
        return text
    return text if isinstance(value, str | list | dict) else value


def shown(value: Any) -> str:
    """A value for an error, cut; of a form's file that it is one."""
    return "a file" if isinstance(value, bytes) else json_values.shown(value)
