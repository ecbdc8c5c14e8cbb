"""The metrics by name: which can be asked for, what each needs, and how it measures pictures."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.evaluate.clip import ClipScore, find_clip
from sana_edge.evaluate.fid import Fid, find_inception, reference_pictures
from sana_edge.evaluate.image_reward import find_image_reward, image_rewards
from sana_edge.evaluate.judge.prompts import Prompt
from sana_edge.evaluate.judge.scores import Outcome
from sana_edge.evaluate.measured import Alike, Distance, Measured, Score, Verdicts
from sana_edge.evaluate.paired import Likeness
from sana_edge.evaluate.prompts import PromptSet
from sana_edge.image_metrics import psnr, ssim
from sana_edge.init_image import read_image
from sana_edge.progress import Progress

METRICS = ("judge", "clip", "imagereward", "fid", "psnr")
"""In the order of the table."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class MetricOptions:
    """What metrics are given.

    Attributes:
        metrics: of `METRICS`; None is all that suit what is drawn, and ImageReward where its Python is given.
        clip: a folder or a repository.
        reference: the folder that FID compares with.
        inception: the weights' file of FID.
        python: of ImageReward.
    """

    metrics: tuple[str, ...] | None = None
    clip: str | None = None
    reference: Path | None = None
    inception: Path | None = None
    python: str | None = None
    offline: bool = False
    progress: bool = False


@dataclass(frozen=True)
class Drawn:
    """The pictures of each source, one or two, and what was asked for; all are as long as ``texts``."""

    paths: tuple[Sequence[Path], ...]
    texts: Sequence[str]
    facts: Sequence[Prompt] = ()


Measure = Callable[[Drawn, Progress, Say], Measured]


def parse_metrics(text: str) -> tuple[str, ...]:
    """Names with commas between them.

    Raises:
        InvalidInput: one is none.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            close = difflib.get_close_matches(name, METRICS, n=1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise InvalidInput(f"unknown metric {name!r}", f"{meant}choose of {', '.join(METRICS)}")
    if not names:
        raise InvalidInput("no metric is named", f"choose of {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in names)


def wanted(options: MetricOptions, prompts: PromptSet, *, pair: bool) -> tuple[str, ...]:
    """The metrics to measure.

    Raises:
        InvalidInput: one is asked for that cannot be, whatever is installed.
    """
    refused = {
        "judge": "" if prompts.facts else "it knows sana-tiny's prompts only: add --prompts sana-tiny",
        "fid": "" if options.reference else "give the pictures to compare with by --reference DIR",
        "psnr": "" if pair else "it compares pairs: add --int8, or another model by --against",
    }
    if options.metrics is None:
        refused["imagereward"] = "" if options.python else "its package is seldom here"
        return tuple(name for name in METRICS if not refused.get(name))
    for name in options.metrics:
        if refused.get(name):
            raise InvalidInput(f"metric {name} cannot be measured here", refused[name])
    return options.metrics


def prepare(
    names: Sequence[str], options: MetricOptions, say: Say
) -> tuple[dict[str, Measure], dict[str, str]]:
    """How each is measured, before anything is drawn, and why some cannot be.

    Raises:
        SanaError: none can be measured; it is the first one's.
    """
    ready: dict[str, Measure] = {}
    left_out: dict[str, SanaError] = {}
    for name in names:
        try:
            ready[name] = _PREPARE[name](options)
        except SanaError as error:
            left_out[name] = error
    # where nothing can be measured, the first is raised
    for name, why in list(left_out.items())[0 if ready else 1 :]:
        say(f"{name} is left out: {why.message}{f' ({why.hint})' if why.hint else ''}")
    if left_out and not ready:
        raise next(iter(left_out.values()))
    return ready, {name: why.message for name, why in left_out.items()}


def _clip(options: MetricOptions) -> Measure:
    folder = find_clip(options.clip, offline=options.offline, progress=options.progress)

    def measure(drawn: Drawn, tell: Progress, say: Say) -> Measured:
        clip = ClipScore(folder)
        scores = [clip.scores(paths, drawn.texts, tell) for paths in drawn.paths]
        if clip.cut:
            say(f"{clip.cut // len(scores)} prompts are longer than the CLIP's {clip.limit} tokens: cut")
        return Score("CLIP score", 2, scores)

    return measure


def _image_reward(options: MetricOptions) -> Measure:
    folder = find_image_reward(options.python)

    def measure(drawn: Drawn, tell: Progress, say: Say) -> Measured:
        # at once, as loading takes longest
        paths = [path for of in drawn.paths for path in of]
        found = image_rewards(folder, paths, [*drawn.texts] * len(drawn.paths), tell, options.python)
        size = len(drawn.texts)
        return Score("ImageReward", 3, [found[i : i + size] for i in range(0, len(found), size)])

    return measure


def _fid(options: MetricOptions) -> Measure:
    if options.reference is None:
        raise InvalidInput("FID has nothing to compare with", "give --reference DIR")
    reference, weights = reference_pictures(options.reference), find_inception(options.inception)

    def measure(drawn: Drawn, tell: Progress, say: Say) -> Measured:
        if len(drawn.texts) < 2:
            raise InvalidInput("FID needs at least two pictures", "raise --limit")
        fid = Fid(reference, weights, tell)
        return Distance([fid.distance(paths, tell) for paths in drawn.paths], len(drawn.texts))

    return measure


def _judge(options: MetricOptions) -> Measure:
    # reads weights: not before it is asked for
    from sana_edge.evaluate.judge.detector import judge

    def measure(drawn: Drawn, tell: Progress, say: Say) -> Measured:
        found = []
        for paths in drawn.paths:
            outcomes: list[Outcome] = []
            for path, fact in zip(paths, drawn.facts, strict=True):
                with _named(path):
                    outcomes.append(Outcome(fact, judge(read_image(path))))
                tell("judging", len(outcomes), len(paths))
            found.append(outcomes)
        return Verdicts(found)

    return measure


def _psnr(options: MetricOptions) -> Measure:
    def measure(drawn: Drawn, tell: Progress, say: Say) -> Measured:
        found: list[Likeness] = []
        for first, second in zip(*drawn.paths, strict=True):
            reference, pixels = read_image(first), read_image(second)
            found.append(Likeness(psnr(pixels, reference), ssim(pixels, reference)))
            tell("comparing", len(found), len(drawn.texts))
        return Alike(found, drawn.texts)

    return measure


_PREPARE: dict[str, Callable[[MetricOptions], Measure]] = {
    "judge": _judge,
    "clip": _clip,
    "imagereward": _image_reward,
    "fid": _fid,
    "psnr": _psnr,
}


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A picture that the judge cannot take is named."""
    try:
        yield
    except ValueError as error:
        raise InvalidInput(f"{path}: {error}", "the judge takes square pictures: leave out --size") from error
