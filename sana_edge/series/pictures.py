"""The pictures that a file of prompts asks for: each with its options, its seed and the name of its file."""

from __future__ import annotations

import os
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.image import format_of
from sana_edge.request.bounds import MAX_IMAGES, MAX_PROMPT, MAX_SEED, plain
from sana_edge.request.request import Request
from sana_edge.series.entries import Bad, Entry, Line
from sana_edge.series.wildcards import Template, Wildcards
from sana_edge.system.json_values import shown

NAME = "{index:05}-{seed}.png"
MOST_PICTURES, MOST_BAD = 100_000, 10_000
_FIELD = re.compile(r"\{(\w+)(?::0?(\d{1,2}))?\}")
_FIELDS = ("index", "seed", "line", "prompt")
# of an entry, what a request does not take as it is
_OWN = ("size", "width", "height", "seed", "seeds", "images", "output", "image", "mask")
# what Windows takes for devices
_RESERVED = re.compile(r"(con|prn|aux|nul|con(in|out)\$|(com|lpt)[\d¹²³]) *(\..*)?", re.IGNORECASE)
_UNFIT = re.compile(r'[<>:"\\|?*\x00-\x1f\x7f]')
# bytes of a part, and of a whole name below its folder, whose own path a system counts, too
_LONGEST, _LONGEST_PATH = 200, 1000


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        index: from 1, over all pictures.
        line: of the prompts, from 1.
        name: of its file, below the folder of the series, with slashes.
        options: of `Request`, JSON values, with prompt and seed; ``image`` and ``mask`` are paths.
    """

    index: int
    line: int
    name: str
    options: dict[str, Any]

    def arguments(self) -> dict[str, Any]:
        """The arguments of `sana_edge.Sana.generate`."""
        size = self.options.get("size")
        return {**self.options, **({} if size is None else {"size": tuple(size)})}

    def request(self) -> Request:
        return Request(**self.arguments())


@dataclass(frozen=True)
class Settings:
    """What holds for all lines.

    Attributes:
        options: of `Request`, for what a line leaves open; without prompt, seed and images.
        images: pictures of a line, or of each of its combinations, that says nothing of it.
        seed: of the first picture; those of lines without seeds count up from it.
        combinations: every text that a template stands for; else a random one, by the picture's seed.
        literal: prompts are no templates.
        name: of files, with ``{index}``, ``{seed}``, ``{line}`` and ``{prompt}``, padded by ``{index:05}``.
        folder: what paths of images in lines are relative to.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    images: int = 1
    seed: int = 0
    combinations: bool = False
    literal: bool = False
    wildcards: Path | None = None
    name: str = NAME
    quality: int | None = None
    folder: Path = Path()


def plan_pictures(lines: Iterable[Line | Bad], settings: Settings) -> tuple[list[Picture], list[Bad]]:
    """All pictures, each checked as far as can be without a model, and the lines that are bad.

    Raises:
        InvalidInput: there are too many, or none, or the name for files is none.
    """
    _check_template(settings.name)
    wildcards = Wildcards(settings.wildcards)
    pictures: list[Picture] = []
    bad: list[Bad] = []
    taken: dict[str, int] = {}
    folders: set[str] = set()
    for line in lines:
        if isinstance(line, Bad):
            bad.append(line)
            _check_bad(bad)
            continue
        number, entry = line
        try:
            new = list(_of_entry(number, entry, settings, wildcards, len(pictures)))
            names = [_key(picture.name) for picture in new]
            _check_names(names, new, taken, folders)
        except _TooMany:
            raise
        except SanaError as error:
            bad.append(Bad(number, f"{error.message}{f' ({error.hint})' if error.hint else ''}"))
            _check_bad(bad)
            continue
        pictures += new
        taken |= dict.fromkeys(names, number)
        folders |= {folder for name in names for folder in _folders(name)}
    if not pictures and not bad:
        raise InvalidInput("there are no prompts: all lines are empty or comments", "write one in each line")
    return pictures, sorted(bad, key=lambda one: one.line)


class _TooMany(InvalidInput):
    """Not a matter of one line."""


def _check_bad(bad: list[Bad]) -> None:
    if len(bad) > MOST_BAD:
        raise _TooMany(f"more than {MOST_BAD} lines are bad, such as {bad[0]}", "give a file of prompts")


def _of_entry(
    number: int, entry: Entry, settings: Settings, wildcards: Wildcards, before: int
) -> Iterator[Picture]:
    if len(entry.prompt) > MAX_PROMPT:
        raise InvalidInput(f"the prompt has {len(entry.prompt)} characters", f"give at most {MAX_PROMPT}")
    template = Template.of([entry.prompt]) if settings.literal else wildcards.template(entry.prompt)
    texts = template.count if settings.combinations else 1
    images = _images(entry, settings)
    total = texts * images
    if before + total > MOST_PICTURES:
        count = before + total
        found = f"up to line {number} there are {count if count < 10**18 else 'more than 10^18'} pictures"
        raise _TooMany(found, f"at most {MOST_PICTURES}; without --combinations a prompt is a random one")
    options = _options(entry, settings)
    known: set[str] = set()
    for position in range(total):
        index = before + position + 1
        seed = _seed(entry, settings, position, index)
        if settings.combinations or template.count == 1:
            text = template.at(position // images)
        else:
            text = template.draw(random.Random(seed))
        values = {**options, "prompt": text, "seed": seed}
        name = _name(entry, settings, total, {"index": index, "seed": seed, "line": number, "prompt": text})
        picture = Picture(index, number, name, values)
        # what differs within a line are prompts and seeds: the rest is checked once
        if text not in known or position == total - 1:
            picture.request()
            known.add(text)
        yield picture


def _images(entry: Entry, settings: Settings) -> int:
    if entry.seeds is not None:
        if entry.seed is not None or entry.images is not None:
            raise InvalidInput("there are seeds beside a seed or images", "give either")
        if not entry.seeds:
            raise InvalidInput("seeds is an empty list", "give one or more, or leave it out")
        return len(entry.seeds)
    images = settings.images if entry.images is None else entry.images
    if type(images) is not int or not 1 <= images <= MAX_IMAGES:
        raise InvalidInput(f"images is {shown(images)}", f"choose a whole number from 1 to {MAX_IMAGES}")
    return images


def _seed(entry: Entry, settings: Settings, position: int, index: int) -> int:
    if entry.seeds is not None:
        seed = entry.seeds[position % len(entry.seeds)]
        if not 0 <= seed <= MAX_SEED:
            hint = f"choose whole numbers from 0 to {MAX_SEED}"
            raise InvalidInput(f"one of the seeds is {shown(seed)}", hint)
        return seed
    if entry.seed is not None:
        return entry.seed + position
    return settings.seed + index - 1


def _options(entry: Entry, settings: Settings) -> dict[str, Any]:
    own = {name: value for name, value in vars(entry).items() if name not in _OWN and value is not None}
    options = {**settings.options, **own}
    if (size := entry.pixels) is not None:
        options["size"] = size
    for name in ("image", "mask"):
        if (given := getattr(entry, name)) is not None:
            options[name] = str(settings.folder / given)
        elif isinstance(options.get(name), os.PathLike):
            options[name] = os.fspath(options[name])
        elif not isinstance(options.get(name), str | None):
            raise InvalidInput(f"{name} is {shown(options[name])}", "give the path of a file")
    # as the model has it
    usual = {"negative_prompt": "", "exact_size": False, "variation": ()}
    asked = {n: plain(v) for n, v in options.items() if v is not None and (n not in usual or v != usual[n])}
    # as JSON has them
    if "size" in asked:
        asked["size"] = list(asked["size"])
    if "variation" in asked:
        asked["variation"] = [list(pair) for pair in asked["variation"]]
    return asked


def _check_template(name: str) -> None:
    for match in _FIELD.finditer(name):
        if match[1] not in _FIELDS:
            raise InvalidInput(f"unknown {match[0]} in the name {name}", f"known are {', '.join(_FIELDS)}")


def _name(entry: Entry, settings: Settings, total: int, values: dict[str, Any]) -> str:
    """The name of a picture's file.

    Raises:
        InvalidInput: it leads out of the folder, is no picture's, or no system takes it.
    """
    template = settings.name if entry.output is None else entry.output
    path = PurePosixPath(template)
    if entry.output is not None:
        if total > 1 and not {"index", "seed", "prompt"} & {m[1] for m in _FIELD.finditer(template)}:
            path = path.with_name(f"{path.stem}-{{seed}}{path.suffix}")
        _check_template(template)

    def value(match: re.Match[str]) -> str:
        found = values[match[1]]
        return _slug(found) if match[1] == "prompt" else f"{found:0{match[2] or 1}}"

    name = unicodedata.normalize("NFC", _FIELD.sub(value, str(path)))
    if not PurePosixPath(name).suffix:
        name += ".png"
    parts = PurePosixPath(name).parts
    if not parts or path.is_absolute() or any(p == ".." or p.startswith(".") for p in parts):
        raise InvalidInput(f"the name {shown(name)} leads out of the folder, or is hidden", "choose another")
    for part in parts:
        if _UNFIT.search(part) or _RESERVED.fullmatch(part) or part != part.strip(" .") or not _fits(part):
            raise InvalidInput(f"the name {shown(part)} is none on every system", "choose another")
    if len(name.encode()) > _LONGEST_PATH:
        raise InvalidInput(f"the name {shown(name)} is too long", "choose a shorter one")
    format_of(Path(name), settings.quality)
    return name


def _fits(part: str) -> bool:
    try:
        return len(part.encode()) <= _LONGEST
    except UnicodeEncodeError:
        return False


def _slug(text: str) -> str:
    """A prompt as a part of a name: letters and digits of any script, at most 60 characters."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", text)).strip("-")
    cut = words[:60].encode(errors="ignore")[:120].decode(errors="ignore")
    return cut.strip("-") or "picture"


def _key(name: str) -> str:
    """Equal for names that are one file on any system."""
    return unicodedata.normalize("NFC", name).casefold()


def _folders(name: str) -> list[str]:
    """Those that a name lies in."""
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def check_folders(folder: Path, pictures: Iterable[Picture]) -> None:
    """See that no folder of a series' pictures is a link, which may lead out of it.

    Raises:
        InvalidInput: one is.
    """
    for inner in {inner for picture in pictures for inner in _folders(picture.name)}:
        if (folder / inner).is_symlink():
            raise InvalidInput(f"{folder / inner} is a link", "choose another --output, or remove it")


def _check_names(
    names: list[str], pictures: list[Picture], taken: Mapping[str, int], folders: set[str]
) -> None:
    """See that no two pictures have one name, and none lies in another, or in the manifest."""
    seen: set[str] = set()
    inside: set[str] = set()
    for name, picture in zip(names, pictures, strict=True):
        if name in taken or name in seen:
            hint = "put {index} in the name, or choose another"
            whose = f"line {taken[name]}" if name in taken else "another of its pictures"
            raise InvalidInput(f"the name {picture.name} is that of {whose}, too", hint)
        seen.add(name)
        inside.update(_folders(name))
    for place in (*inside, *seen):
        both = place in folders if place in seen else place in taken or place == "manifest.jsonl"
        if both or (place in seen and place in inside):
            raise InvalidInput(f"the name {shown(place)} is a file's and a folder's", "choose another")
