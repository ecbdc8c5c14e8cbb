"""Recipes: how a denoiser is trained, stage by stage, as data. Packaged ones lie in ``recipes/*.toml``."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from sana_edge.config import DenoiserConfig
from sana_edge.errors import InvalidInput
from sana_edge.system.json_values import Between, Reader, read_bounded, shown

from .buckets import RESOLUTIONS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_T = TypeVar("_T")

# bytes of a file, and characters of a line: a key of thousands of parts takes TOML's reader gigabytes
_LARGEST, _LONGEST = 64 << 10, 1000
_Count = Annotated[int, Between(0, 10**9)]
_Share = Annotated[float, Between(0, 1)]
_Number = Annotated[float, Between(0, 1e9)]
_Numbers = Annotated[tuple[_Number, ...], Between(0, 8)]

PRECISIONS = ("bf16", "fp16", "no")
STORED = ("bf16", "fp16", "fp32")
OPTIMIZERS = ("adamw", "muon", "came")
# keys of a denoiser's config that a stage sets, and those of Sprint, which is distilled
_OF_STAGES = {"sample_size", "interpolation_scale", "guidance_embeds", "guidance_embeds_scale"}


@dataclass(frozen=True)
class Optimizer:
    """``name``: adamw, came (arXiv 2307.02047), or muon (AdamW at half the rate for all but block matrices).

    ``betas`` and ``eps`` have two entries and one for adamw, three and two for came; empty means the usual
    ones. Muon uses them for its AdamW.
    """

    name: str = "adamw"
    betas: _Numbers = ()
    eps: _Numbers = ()
    weight_decay: _Number = 0.0


@dataclass(frozen=True)
class Captions:
    """``dropout``: share of captions left out for guidance; ``tau``: temperature of the caption sampler.

    CLIP scores are 100 cos, so a ``tau`` of 0.1 takes the best caption almost always. Without scores in the
    data every caption is equally likely.
    """

    dropout: _Share = 0.1
    tau: _Number = 0.1


@dataclass(frozen=True)
class Training:
    """What holds for all stages.

    Attributes:
        precision: bf16 or fp16 autocast on fp32 weights, or no; a CPU may take fp32 all the same.
        stored: dtype of the trained model's weights on disk.
        clip: largest norm of a step's gradient.
        ema: decay of the averaged weights per step; 0 keeps no average.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.
        caption_norm: start value of the caption norm's weight (arXiv 2410.10629, section 2.3).
        whiten: captions whose features whiten the caption projection at a random start; 0 leaves it as it is.
        shard: FSDP: parameters, gradients and optimizer states are spread over the processes.
        gather_twice: with ``shard``, free a block's parameters after its forward pass and gather them again.
        seed: of the start weights and of all that is drawn.
    """

    precision: str = "bf16"
    stored: str = "bf16"
    clip: _Number = 0.1
    ema: _Share = 0.9999
    checkpointing: bool = False
    caption_norm: _Number = 0.01
    whiten: _Count = 0
    shard: bool = False
    gather_twice: bool = True
    seed: Annotated[int, Between(0, 2**63 - 1)] = 0


@dataclass(frozen=True)
class Stage:
    """One resolution of the cascade.

    Attributes:
        start: "previous" for the averaged weights of the stage before, "random", or a model as `generate`
            takes it: a name or a folder.
        resolution: 256, 512, 1024, 2048 or 4096: which table of aspect ratios.
        batch: pictures of a step, over all processes.
        micro_batch: pictures of one forward pass of one process; 0 for as many as there are.
        steps, minutes: the budget, one of them.
        learning_rate: after ``warmup`` steps.
        decay_from: share of the budget after which the rate falls linearly to zero; 1 keeps it.
        flow_shift: s in sigma = s u / (1 + (s - 1) u), with u logit-normal.
        interpolation_scale: of the sin-cos position embedding; without it there is none.
    """

    resolution: _Count
    batch: _Count
    learning_rate: _Number
    start: str = "previous"
    micro_batch: _Count = 0
    steps: _Count = 0
    minutes: _Number = 0.0
    warmup: _Count = 0
    decay_from: _Share = 1.0
    flow_shift: Annotated[float, Between(0, 100)] = 3.0
    interpolation_scale: Annotated[float, Between(1e-3, 1e3)] | None = None


@dataclass(frozen=True)
class Recipe:
    """``denoiser`` has the keys of a ``transformer/config.json``, without those that a stage sets.

    ``model`` has the frozen parts, text encoder and autoencoder: a model as `generate` takes it.
    """

    model: str
    denoiser: Mapping[str, Any]
    stage: tuple[Stage, ...]
    captions: Captions = field(default_factory=Captions)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)

    def config(self, stage: Stage) -> DenoiserConfig:
        """The denoiser of a stage."""
        size = {
            "sample_size": stage.resolution // 32,
            "interpolation_scale": stage.interpolation_scale,
        }
        return DenoiserConfig.from_dict({**self.denoiser, **size})


def names() -> list[str]:
    """The packaged recipes."""
    folder = resources.files(__package__) / "recipes"
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".toml"))


def load_recipe(recipe: str, changes: Iterable[str] = ()) -> Recipe:
    """Read a packaged recipe by its name, or a TOML file by its path.

    Args:
        changes: ``table.key=value`` with a TOML value, for example ``stage.batch=8``, which is of all stages.

    Raises:
        InvalidInput: no such recipe, no TOML, an unknown key, or a value out of range.
    """
    content = _read(recipe)
    for change in changes:
        _change(content, change)
    return _recipe(content, recipe)


def _read(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    try:
        if path.suffix == ".toml" or path.exists():
            text = read_bounded(path, _LARGEST).decode()
        elif recipe in names():
            text = (resources.files(__package__) / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8")
        else:
            raise InvalidInput(
                f"no recipe is named {recipe!r}", f"choose {', '.join(names())}, or give the path of a .toml"
            )
        longest = max(map(len, text.splitlines()), default=0)
        if longest > _LONGEST:
            raise ValueError(f"a line has {longest} characters")
        content: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"the recipe {recipe} is not TOML: {error}", "mend the line it names") from error
    except RecursionError:
        raise InvalidInput(f"the recipe {recipe} is nested too deeply", "write tables of values") from None
    # ValueError: too long, no text, or a number of thousands of digits
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read the recipe {recipe}: {error}", "check the path") from error
    return content


def _change(content: dict[str, Any], change: str) -> None:
    place, _, value = change.partition("=")
    table, _, key = place.strip().rpartition(".")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    # ValueError: no TOML, or a number of thousands of digits
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"{change!r} changes nothing: {error}", 'write table.key=value, such as optimizer.name="adamw"'
        ) from error
    tables = content if not table else content.get(table, {})
    for part in tables if isinstance(tables, list) else [tables]:
        if not isinstance(part, dict):
            raise InvalidInput(f"{change!r} changes nothing: {table} is no table", "write table.key=value")
        part[key] = parsed
    if table:
        content[table] = tables


def _recipe(content: dict[str, Any], owner: str) -> Recipe:
    _known(content, {f.name for f in dataclasses.fields(Recipe)}, owner, "")
    keys = {f.name for f in dataclasses.fields(DenoiserConfig)} - _OF_STAGES
    _known(content.get("denoiser", {}), keys, owner, "denoiser.")
    stages = content.get("stage", [])
    if not isinstance(stages, list) or not stages:
        raise InvalidInput(f"{owner} has no stage", "write at least one [[stage]]")
    if not isinstance(content.get("model"), str):
        raise InvalidInput(f"{owner} names no model", 'write model = "sana-0.6b-512", or a folder')
    recipe = Recipe(
        model=content["model"],
        denoiser=content.get("denoiser", {}),
        stage=tuple(_table(Stage, stage, owner, "stage.") for stage in stages),
        captions=_table(Captions, content.get("captions", {}), owner, "captions."),
        optimizer=_table(Optimizer, content.get("optimizer", {}), owner, "optimizer."),
        training=_table(Training, content.get("training", {}), owner, "training."),
    )
    _check(recipe, owner)
    return recipe


def _known(table: Any, names: Iterable[str], owner: str, where: str) -> None:
    if not isinstance(table, dict):
        raise InvalidInput(f"{owner}: {where.rstrip('.')} is {shown(table)}", "write a table")
    for key in table:
        if key not in names:
            raise InvalidInput(
                f"{owner} has an unknown key {where}{key[:80]}", f"known are {', '.join(sorted(names))}"
            )


def _table(cls: type[_T], table: Any, owner: str, where: str) -> _T:
    _known(table, typing.get_type_hints(cls), owner, where)
    reader = Reader(owner, "write a value of that kind", defaults=True, error=InvalidInput)
    found: _T = reader.convert(table, cls, where.rstrip("."))
    return found


def _check(recipe: Recipe, owner: str) -> None:
    def need(fits: bool, key: str, value: object, expected: str) -> None:
        if not fits:
            raise InvalidInput(f"{owner}: {key} is {shown(value)}", f"give {expected}")

    training, captions, optimizer = recipe.training, recipe.captions, recipe.optimizer
    need(training.precision in PRECISIONS, "training.precision", training.precision, " or ".join(PRECISIONS))
    need(training.stored in STORED, "training.stored", training.stored, " or ".join(STORED))
    need(training.clip > 0, "training.clip", training.clip, "a positive number")
    need(0 <= training.ema < 1, "training.ema", training.ema, "0 to less than 1")
    need(0 <= captions.dropout < 1, "captions.dropout", captions.dropout, "0 to less than 1")
    need(captions.tau > 0, "captions.tau", captions.tau, "a positive number")
    need(optimizer.name in OPTIMIZERS, "optimizer.name", optimizer.name, " or ".join(OPTIMIZERS))
    counts = (3, 2) if optimizer.name == "came" else (2, 1)
    for key, count in zip(("betas", "eps"), counts, strict=True):
        value = getattr(optimizer, key)
        need(
            len(value) in (0, count), f"optimizer.{key}", list(value), f"{count} numbers for {optimizer.name}"
        )
    sharded = training.shard and optimizer.name == "came"
    need(not sharded, "training.shard", True, "false with came, whose factors are of whole matrices")
    need(
        recipe.stage[0].start != "previous",
        "stage.start",
        "previous",
        '"random" or a model for the first stage',
    )
    for stage in recipe.stage:
        need(stage.resolution in RESOLUTIONS, "stage.resolution", stage.resolution, f"one of {RESOLUTIONS}")
        need(stage.batch > 0, "stage.batch", stage.batch, "a positive number")
        need(stage.micro_batch >= 0, "stage.micro_batch", stage.micro_batch, "0 or more")
        need(stage.learning_rate > 0, "stage.learning_rate", stage.learning_rate, "a positive number")
        need(stage.flow_shift > 0, "stage.flow_shift", stage.flow_shift, "a positive number")
        need(0 <= stage.decay_from <= 1, "stage.decay_from", stage.decay_from, "0 to 1")
        budgets = (stage.steps > 0) + (stage.minutes > 0)
        need(budgets == 1, "stage.steps", stage.steps, "a positive number for either steps or minutes")
        recipe.config(stage)
