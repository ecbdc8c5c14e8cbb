"""A job: one request to one model, how far it is, and its pictures, for any number of readers."""

from __future__ import annotations

import base64
import dataclasses
import io
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from sana_edge.errors import Cancelled, SanaError
from sana_edge.image import QUALITY, Image
from sana_edge.request.request import Request

State = Literal["queued", "running", "done", "failed", "cancelled"]
MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
# the newest that a job keeps, more than the three of each of ten pictures that OpenAI's clients can ask for
MAX_PREVIEWS = 32


@dataclass(frozen=True)
class Encoding:
    """What pictures are sent as: "PNG", "JPEG" or "WEBP", the last two with a quality of 1 to 100."""

    kind: str = "PNG"
    quality: int = QUALITY

    @property
    def media_type(self) -> str:
        return MEDIA_TYPES[self.kind]


@dataclass(frozen=True)
class Picture:
    """A finished picture as the bytes of a file, and what `Image` says about it."""

    index: int
    data: bytes
    seed: int
    width: int
    height: int
    metadata: dict[str, Any]
    timings: dict[str, float]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, image: Image, index: int, encoding: Encoding) -> Picture:
        height, width = image.pixels.shape[:2]
        data = image.encode(encoding.kind, encoding.quality)
        return cls(index, data, image.seed, width, height, image.metadata, image.timings, image.notes)

    @property
    def base64(self) -> str:
        return base64.b64encode(self.data).decode("ascii")


@dataclass(frozen=True)
class Preview:
    """What a picture will be, after ``step`` (from 0) of its steps; ``number`` counts a job's previews."""

    number: int
    picture: int
    step: int
    data: bytes

    @property
    def base64(self) -> str:
        return base64.b64encode(self.data).decode("ascii")


@dataclass(frozen=True)
class Stage:
    """What a job is doing: "queued", "loading", "text", "denoise" or "decode", and how much of it is done."""

    name: str
    done: int = 0
    count: int = 0


def never(step: int, steps: int) -> bool:
    """No previews."""
    return False


@dataclass(eq=False)
class Job:
    """One request and what has come of it. The worker writes, any thread reads; tuples are replaced whole.

    Attributes:
        model: the name of a model that is served.
        request: with its seed.
        preview: whether to make one after a step, told the step, from 0, and the steps of a picture.
        linear: previews are made by the model's linear map, see `sana_edge.generation.Step.preview`.
        encoding: of pictures and previews.
        ended: when it ended, seconds since 1970; set last, so that who sees it sees the rest.
        on_end: told of the end once, before ``ended`` is set: who sees that has what it does behind it.
        seconds_left: None where nobody can tell.
    """

    model: str
    request: Request
    preview: Callable[[int, int], bool] = never
    linear: bool = False
    encoding: Encoding = field(default_factory=Encoding)
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    created: float = field(default_factory=time.time)
    state: State = "queued"
    stage: Stage = Stage("queued")
    seconds_left: float | None = None
    pictures: tuple[Picture, ...] = ()
    previews: tuple[Preview, ...] = ()
    error: SanaError | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
    ended: float | None = None
    on_end: Callable[[Job], None] | None = None
    # a reader wants one preview after the next step
    preview_wanted: bool = False
    _watchers: tuple[Callable[[], None], ...] = ()
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def finished(self) -> bool:
        return self.ended is not None

    @property
    def size(self) -> int:
        """Bytes that the job keeps."""
        return sum(len(picture.data) for picture in self.pictures) + sum(len(p.data) for p in self.previews)

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call ``watcher`` after each change, on the thread that made it; it must be quick."""
        with self._lock:
            self._watchers = (*self._watchers, watcher)

    @contextmanager
    def watched(self, watcher: Callable[[], None]) -> Iterator[None]:
        """`watch`, until the end of the block."""
        self.watch(watcher)
        try:
            yield
        finally:
            with self._lock:
                self._watchers = tuple(one for one in self._watchers if one is not watcher)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; False after ``timeout`` seconds without one."""
        done = threading.Event()
        with self.watched(lambda: done.set() if self.finished else None):
            return self.finished or done.wait(timeout)

    def progress(self, name: str, done: int, count: int) -> None:
        """Take progress of a load or a generation."""
        stage = name if name in ("denoise", "decode") else "loading"
        self._change(stage=Stage(stage, done, count))

    def show(self, pixels: NDArray[np.uint8], picture: int, step: int) -> None:
        """Take a preview, (H, W, 3) RGB."""
        buffer = io.BytesIO()
        # the size of one that is soon forgotten matters less than the time
        options = {"compress_level": 1} if self.encoding.kind == "PNG" else {"quality": self.encoding.quality}
        PIL.Image.fromarray(pixels).save(buffer, self.encoding.kind, **options)
        number = self.previews[-1].number + 1 if self.previews else 0
        new = Preview(number, picture, step, buffer.getvalue())
        self._change(previews=(*self.previews[1 - MAX_PREVIEWS :], new))

    def take(self, image: Image) -> Picture:
        """Take a finished picture."""
        picture = Picture.of(image, len(self.pictures), self.encoding)
        self._change(pictures=(*self.pictures, picture))
        return picture

    def start(self) -> None:
        """A worker has taken it."""
        with self._lock:
            if self.ended is None:
                self.state, self.stage = "running", Stage("text")
        self._change()

    def wait_behind(self, ahead: int) -> None:
        """It is queued, and ``ahead`` others come first."""
        self._change(stage=Stage("queued", 0, ahead))

    def expect(self, seconds_left: float | None) -> None:
        """Take an estimate of the time that is left."""
        self._change(seconds_left=seconds_left)

    def end(self, error: SanaError | None = None) -> None:
        """The last change; of several ends the first counts."""
        with self._lock:
            if self.ended is not None:
                return
            self.state = (
                "done" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"
            )
            self.error, self.seconds_left = error, None
            # pixels that nobody needs any more
            self.request = dataclasses.replace(self.request, image=None, mask=None, strength=None)
            if self.on_end is not None:
                self.on_end(self)
            self.ended = time.time()
        self._change()

    def _change(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)
        for watcher in self._watchers:
            watcher()
