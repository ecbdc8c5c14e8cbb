"""One training loop for all networks: budget, EMA, progress, checkpoints without pickles, resume."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from sana_edge.errors import SanaError, reason
from sana_edge.store.weights import check_state, save_state
from sana_edge.system.regular import append_regular

from .state import STATE, State, damage_named, read_state, under

Loss = Callable[[int, float], tuple[Tensor, dict[str, float]]]
"""loss(step, progress) -> (scalar loss, figures for the log)."""


class Loop:
    """Trains `model` for a budget of minutes or steps; the learning rate follows the share that is spent.

    Several processes (torchrun, `accelerate launch`) each compute the loss of their share of a batch and
    step together; the first of them writes. A model that `fully_shard` has split stays so.

    Args:
        model: float32 module; runs under autocast where `precision` is "bf16" or "fp16".
        optimizers: one or several; each group's `lr` is its peak.
        folder: gets `state.safetensors` (model, EMA, optimizer) and `log.jsonl`; training resumes from it.
        minutes: time budget of this training, earlier runs of the same folder counted in.
        steps: the budget, where there are no minutes.
        ema_decay: 0 keeps no average.
        decay_from: share of the budget after which the rate falls linearly to zero.
        parts: calls of the loss whose mean gradient makes a step; `part` says which it is called for.
        accelerator: of the process; made here where there is none yet.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        folder: Path,
        *,
        minutes: float = 0.0,
        steps: int = 0,
        precision: str = "bf16",
        ema_decay: float = 0.999,
        warmup: int = 100,
        decay_from: float = 0.3,
        clip: float = 1.0,
        parts: int = 1,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = accelerator or Accelerator(mixed_precision=precision)
        sharded = isinstance(model, FSDPModule)
        self.model: nn.Module = model if sharded else self.accelerator.prepare_model(model)
        self.optimizers = [self.accelerator.prepare_optimizer(o) for o in optimizers]
        self.ema_decay = ema_decay
        self.ema = {k: v.detach().clone() for k, v in self._live.items()} if ema_decay else {}
        self.folder, self.minutes, self.steps, self.parts = folder, minutes, steps, parts
        self.warmup, self.decay_from, self.clip = warmup, decay_from, clip
        self.step, self.seconds, self.part, self.mean = 0, 0.0, 0, math.nan
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        folder.mkdir(parents=True, exist_ok=True)
        if self.state_file.exists():
            self.restore()

    @property
    def state_file(self) -> Path:
        return self.folder / STATE

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        return min(1.0, self.seconds / (60 * self.minutes) if self.minutes else self.step / self.steps)

    @property
    def _live(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.accelerator.unwrap_model(self.model).state_dict()
        return state

    def run(self, loss: Loss, *, save_minutes: float = 5.0, log_steps: int = 50) -> bool:
        """Train to the end of the budget, True; Ctrl-C or SIGTERM ends the step, saves and stops, False.

        Raises:
            SanaError: the loss is not finite, or the state cannot be written; the one before it stays.
        """
        saved = time.monotonic()
        with self._bar() as bar, signals() as asked:
            while self.progress < 1 and not self._agreed(asked):
                began = time.monotonic()
                value, figures = self._update(loss)
                self.mean = value if math.isnan(self.mean) else 0.98 * self.mean + 0.02 * value
                self.step += 1
                self.seconds += time.monotonic() - began
                bar.n = round(self.seconds) if self.minutes else self.step
                bar.set_postfix(step=self.step, loss=f"{self.mean:.4f}", refresh=False, **figures)
                bar.update(0)
                if self.step % log_steps == 0:
                    self._log(figures)
                if self._agreed([1] if time.monotonic() - saved > 60 * save_minutes else []):
                    self.save()
                    saved = time.monotonic()
            self.save()
            if self.progress < 1 and self.accelerator.is_main_process:
                bar.write(f"stopped at step {self.step}; the same command goes on from here", file=sys.stderr)
        return self.progress >= 1

    def _bar(self) -> tqdm[Any]:
        spent, unit = (self.seconds, "s") if self.minutes else (self.step, "step")
        total = 60 * self.minutes if self.minutes else self.steps
        hidden = not self.accelerator.is_main_process
        return tqdm(
            total=round(total), initial=round(spent), unit=unit, desc=self.folder.name, disable=hidden
        )

    def _agreed(self, asked: Sequence[int]) -> bool:
        """Whether any process is asked; the clock of the slowest becomes that of all."""
        if self.accelerator.num_processes == 1:
            return bool(asked)
        told = torch.tensor([self.seconds, float(bool(asked))], device=self.accelerator.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        self.seconds = float(told[0])
        return bool(told[1])

    def _update(self, loss: Loss) -> tuple[float, dict[str, float]]:
        self._set_rate()
        total, figures = torch.zeros((), device=self.accelerator.device), dict[str, float]()
        for part in range(self.parts):
            self.part = part
            with self._collecting():
                with self.accelerator.autocast():
                    value, figures = loss(self.step, self.progress)
                self.accelerator.backward(value / self.parts)
            total += value.detach().float() / self.parts
        mean = float(self.accelerator.reduce(total, "mean"))
        if not math.isfinite(mean):
            raise SanaError(
                f"the loss is {mean} at step {self.step + 1}",
                f"lower the learning rate; {self.state_file} has the state before, if it was saved",
            )
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._average()
        return mean, figures

    def _set_rate(self) -> None:
        rate = min(1.0, (self.step + 1) / self.warmup) if self.warmup else 1.0
        if self.progress > self.decay_from:
            rate *= max(0.0, (1 - self.progress) / (1 - self.decay_from))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"]

    def _collecting(self) -> AbstractContextManager[Any]:
        """Around a part: gradients of all but the last stay in their process."""
        if self.part + 1 == self.parts or isinstance(self.model, FSDPModule):
            return contextlib.nullcontext()
        return cast(AbstractContextManager[Any], self.accelerator.no_sync(self.model))

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        live = self._live if self.ema else {}
        for key, kept in self.ema.items():
            own, other = _local(kept), _local(live[key])
            own.lerp_(other, 1 - decay) if own.is_floating_point() else own.copy_(other)

    def _log(self, figures: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        record = {"step": self.step, "minutes": round(self.seconds / 60, 2), "loss": round(self.mean, 5)}
        path = self.folder / "log.jsonl"
        try:
            _append(path, json.dumps(record | {k: round(v, 4) for k, v in figures.items()}))
        except OSError as error:
            raise SanaError(
                f"cannot write {path}: {reason(error)}",
                f"make room; the same command goes on from {self.state_file}, where it was saved last",
            ) from error

    def save(self) -> None:
        """Write the whole state to a temporary name and rename it.

        Raises:
            SanaError: it cannot be written.
        """
        whole = {}
        for name, tensor in self._tensors():
            # all processes gather, one keeps
            value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.accelerator.is_main_process:
                whole[name] = value.cpu() if isinstance(tensor, DTensor) else value
        if self.accelerator.is_main_process:
            numbers: dict[str, object] = {"step": self.step, "seconds": self.seconds, "mean": self.mean}
            if self.accelerator.scaler is not None:
                numbers["scaler"] = json.dumps(self.accelerator.scaler.state_dict())
            save_state(whole, self.state_file, {name: str(number) for name, number in numbers.items()})
        self.accelerator.wait_for_everyone()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for kind, state in (("ema", self.ema), ("model", self._live)):
            yield from ((f"{kind}.{name}", tensor) for name, tensor in state.items())
        for n, optimizer in enumerate(self.optimizers):
            for i, values in optimizer.state_dict()["state"].items():
                for name, value in values.items():
                    yield f"optimizer{n}.{i}.{name}", torch.as_tensor(value)

    @torch.no_grad()
    def restore(self) -> None:
        """Go on from `state_file`.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        with damage_named(self.state_file):
            self._restore(read_state(self.state_file))

    def _restore(self, found: State) -> None:
        tensors = found.tensors
        self.step, self.seconds, self.mean = found.spent.step, found.spent.seconds, found.mean
        if found.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(found.scaler)
        for kind, state in (("ema", self.ema), ("model", self._live)):
            stored = under(tensors, f"{kind}.")
            check_state(state, stored, where=str(self.state_file))
            for name, tensor in state.items():
                _local(tensor).copy_(_local(_like(stored[name], tensor)))
        for n, optimizer in enumerate(self.optimizers):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = optimizer.state_dict()
            state["state"] = {}
            for key, value in under(tensors, f"optimizer{n}.").items():
                i, name = key.split(".", 1)
                like = _like(value, parameters[int(i)]) if value.ndim else value
                state["state"].setdefault(int(i), {})[name] = like
            optimizer.load_state_dict(state)


def _local(tensor: Tensor) -> Tensor:
    """This process' part of a sharded tensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(whole: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, sharded as another of its shape is."""
    if isinstance(tensor, DTensor) and tensor.shape == whole.shape:
        return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)
    return whole


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of being stopped by them in the middle of a step."""
    asked: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: asked.append(number)) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _append(path: Path, line: str) -> None:
    """A line at the end of a file, whose last one a process that was killed may have cut."""
    with append_regular(path) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(f"{line}\n".encode())
