"""What happened to a job since a reader last looked, as JSON objects; docs/embedding.md lists them."""

from __future__ import annotations

from typing import Any

from sana_edge.serve.job import Job, Picture, Preview, Stage


class News:
    """One reader's place in a job.

    A reader that is slow misses steps of the progress, and old previews, but no picture and not the end.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.over = False
        self._stage: Stage | None = None
        self._previews = 0
        self._pictures = 0

    def take(self) -> list[dict[str, Any]]:
        """The events since the last call, in order; after the last one ``over`` is true."""
        job = self.job
        # read first: what was written before the end is then seen with it
        finished = job.finished
        events: list[dict[str, Any]] = []
        stage = job.stage
        if stage != self._stage:
            self._stage = stage
            events.append(_progress(stage, job.seconds_left))
        for preview in job.previews:
            if preview.number >= self._previews:
                self._previews = preview.number + 1
                events.append(_preview(job, preview))
        for picture in job.pictures[self._pictures :]:
            events.append(_image(job, picture))
        self._pictures = len(job.pictures)
        if finished and not self.over:
            self.over = True
            events.append(_ending(job))
        return events


def _ending(job: Job) -> dict[str, Any]:
    """The last event of a job."""
    if job.error is None:
        return {"type": "done"}
    kind = "cancelled" if job.state == "cancelled" else "error"
    return {"type": kind, "error": job.error.message, "hint": job.error.hint}


def described(picture: Picture) -> dict[str, Any]:
    """A picture without its bytes."""
    return {
        "picture": picture.index,
        "seed": picture.seed,
        "width": picture.width,
        "height": picture.height,
        "metadata": picture.metadata,
        "timings": {name: round(seconds, 4) for name, seconds in picture.timings.items()},
        "notes": list(picture.notes),
    }


def _progress(stage: Stage, seconds_left: float | None) -> dict[str, Any]:
    left = None if seconds_left is None else round(seconds_left, 2)
    return {
        "type": "progress",
        "stage": stage.name,
        "done": stage.done,
        "count": stage.count,
        "seconds_left": left,
    }


def _preview(job: Job, preview: Preview) -> dict[str, Any]:
    return {
        "type": "preview",
        "picture": preview.picture,
        "step": preview.step + 1,
        "media_type": job.encoding.media_type,
        "b64_json": preview.base64,
    }


def _image(job: Job, picture: Picture) -> dict[str, Any]:
    return {
        "type": "image",
        **described(picture),
        "media_type": job.encoding.media_type,
        "b64_json": picture.base64,
    }
