"""A denoiser's training by a recipe, stage by stage: data, start weights, loop, the model that comes out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.nets.text_encoder import TextEncoder, TextFeatures
from sana_edge.store import hub

from . import flow
from .batches import Batches, Item
from .frozen import Frozen
from .imagefolder import Entry, LeftOut, read_entries
from .initial import component_state, initialise, whiten_captions
from .latent_cache import LatentCache, Picture
from .loop import Loop
from .model_output import write_model
from .optimizers import make_optimizers
from .processes import check_shared, gather_left_out, make_accelerator, say, shard, split_batch
from .recipe import Recipe, Stage
from .state import STATE, ema_state
from .trained_denoiser import TrainedDenoiser


@dataclass(frozen=True)
class Data:
    """Captioned pictures with their latents, and the autoencoder's scaling factor."""

    cache: LatentCache
    pictures: list[tuple[Entry, Picture]]
    scale: float


@dataclass(frozen=True)
class Task:
    """A training.

    Attributes:
        frozen: where the autoencoder and the text encoder are.
        data: an imagefolder, and its split.
        output: gets ``stage-1`` and so on, each with the state, ``log.jsonl`` and in the end ``model``.
        latents: of the caches of latents.
        save_minutes: between two states on disk.
        log_steps: between two lines of ``log.jsonl``.
    """

    recipe: Recipe
    frozen: Frozen
    data: Path
    output: Path
    latents: Path
    split: str = "train"
    save_minutes: float = 5.0
    log_steps: int = 50

    def folder(self, number: int) -> Path:
        """Of stage ``number``, from 1."""
        return self.output / f"stage-{number}"


def train(task: Task, number: int | None = None) -> bool:
    """Train one stage, or all that are not finished; goes on where it stopped. Whether it came to its end.

    Raises:
        InvalidInput: no such stage, no captions, no usable pictures, or a batch that cannot be split.
        SanaError: a file cannot be read or written, or the loss is not finite.
    """
    stages = len(task.recipe.stage)
    if number is not None and not 1 <= number <= stages:
        raise InvalidInput(f"the recipe has no stage {number}", f"choose 1 to {stages}")
    accelerator = make_accelerator(task.recipe.training.precision)
    if accelerator.mixed_precision != task.recipe.training.precision:
        say("this CPU computes in fp32", accelerator)
    for current in range(1, stages + 1) if number is None else (number,):
        model = task.folder(current) / "model"
        if number is None and (model / "model_index.json").exists():
            say(f"stage {current} is finished: {model}", accelerator)
        else:
            finished = _train_stage(task, current, accelerator)
            # what has been trained leaves the memory before the next needs it
            accelerator.free_memory()
            if not finished:
                return False
            if accelerator.is_main_process:
                stage, state = task.recipe.stage[current - 1], ema_state(task.folder(current))
                write_model(model, task.recipe, stage, state, task.frozen)
            say(f"stage {current} is finished: {model}", accelerator)
            accelerator.wait_for_everyone()
    return True


def _train_stage(task: Task, number: int, accelerator: Accelerator) -> bool:
    stage, training = task.recipe.stage[number - 1], task.recipe.training
    rows, parts = split_batch(stage, accelerator.num_processes)
    data = prepare_data(task, stage, accelerator)
    encoder = task.frozen.text_encoder(accelerator.device)
    model = start_model(task, number, data, encoder).to(accelerator.device)
    if training.shard:
        shard(model, accelerator, training)
    loop = Loop(
        model,
        make_optimizers(model, task.recipe.optimizer, stage.learning_rate),
        task.folder(number),
        minutes=stage.minutes,
        steps=stage.steps,
        ema_decay=training.ema,
        warmup=stage.warmup,
        decay_from=stage.decay_from,
        clip=training.clip,
        parts=parts,
        accelerator=accelerator,
    )
    loss = StageLoss(task, stage, data, encoder, loop, rows)
    return loop.run(loss, save_minutes=task.save_minutes, log_steps=task.log_steps)


def prepare_data(task: Task, stage: Stage, accelerator: Accelerator) -> Data:
    """Read the captions, and encode the pictures that have no latent yet; says what is left out."""
    left_out = LeftOut()
    entries = read_entries(task.data, task.split, left_out)
    config = task.frozen.autoencoder_config
    cache = LatentCache(
        task.latents, task.frozen.autoencoder_checksum(), stage.resolution, config.spatial_compression
    )
    cache.fill(
        entries,
        lambda: task.frozen.autoencoder(accelerator.device),
        left_out,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )
    accelerator.wait_for_everyone()
    cache.refresh()
    gather_left_out(left_out, accelerator)
    for line in left_out.lines():
        say(line, accelerator)
    pictures = cache.lookup(entries)
    if not pictures:
        raise InvalidInput(f"{task.data} has no usable pictures", "see which were skipped, and why")
    check_shared(len(pictures), accelerator)
    say(f"{len(pictures):,} pictures, {sum(len(e.captions) for e, _ in pictures):,} captions", accelerator)
    return Data(cache, pictures, config.scaling_factor)


def start_model(task: Task, number: int, data: Data, encoder: TextEncoder) -> TrainedDenoiser:
    """The denoiser of a stage with its start weights, on the CPU."""
    stage, training = task.recipe.stage[number - 1], task.recipe.training
    model = TrainedDenoiser(task.recipe.config(stage), checkpointing=training.checkpointing)
    initialise(model, seed=training.seed, caption_norm=training.caption_norm)
    if (task.folder(number) / STATE).exists():
        # the loop reads all weights from there
        return model
    if stage.start == "previous":
        before = task.folder(number - 1)
        if not (before / STATE).exists():
            raise InvalidInput(
                f"stage {number} starts from stage {number - 1}, and {before / STATE} is missing",
                f"train stage {number - 1} first, or set stage.start to a model",
            )
        model.load_state_dict(ema_state(before))
    elif stage.start != "random":
        found = hub.resolve(stage.start)
        model.load_state_dict(component_state(model.config, found.path / "transformer", found.variant))
    elif training.whiten:
        texts = [caption for entry, _ in data.pictures for caption in entry.captions]
        whiten_captions(model, encoder, texts[:: max(1, len(texts) // training.whiten)][: training.whiten])
    return model


class StageLoss:
    """The loss of a step's part in this process: its rows of the batch, noised and predicted."""

    def __init__(
        self, task: Task, stage: Stage, data: Data, encoder: TextEncoder, loop: Loop, rows: int
    ) -> None:
        captions, self._seed = task.recipe.captions, task.recipe.training.seed
        self._batches = Batches(
            data.pictures, stage.batch, seed=self._seed, tau=captions.tau, dropout=captions.dropout
        )
        self._data, self._encoder, self._loop, self._rows = data, encoder, loop, rows
        self._shift = stage.flow_shift

    def __call__(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        accelerator = self._loop.accelerator
        first = (accelerator.process_index * self._loop.parts + self._loop.part) * self._rows
        numbers = range(first, first + self._rows)
        items = self._batches[step][first : first + self._rows]
        with torch.no_grad(), torch.autocast(accelerator.device.type, enabled=False):
            latents = torch.stack([self._data.cache[item.key] for item in items])
            clean = latents.to(accelerator.device).float() * self._data.scale
            features = encode_captions(self._encoder, items, accelerator.device)
            batch = flow.noised(clean, [generator(self._seed, step, row) for row in numbers], self._shift)
        velocity = self._loop.model(batch.x_t, batch.timesteps, features)
        return flow.loss(velocity, batch.target), {}


def encode_captions(encoder: TextEncoder, items: list[Item], device: torch.device) -> TextFeatures:
    """Features of a batch; a dropped caption keeps its first token alone, as an empty prompt does."""
    features = encoder.encode([item.caption or "a" for item in items])
    mask = features.mask.clone()
    for row, item in enumerate(items):
        if not item.caption:
            mask[row, 1:] = False
    return replace(features, embeddings=features.embeddings.to(device), mask=mask.to(device))


def generator(seed: int, step: int, row: int) -> torch.Generator:
    """Random numbers of one row of one step's whole batch, whichever process computes it."""
    digest = hashlib.sha256(f"{seed} noise {step} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
