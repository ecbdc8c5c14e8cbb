"""One training loop for all networks: time budget, EMA, progress, checkpoints without pickles, resume."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .files import replacing

Loss = Callable[[int, float], tuple[Tensor, dict[str, float]]]
"""loss(step, progress) -> (scalar loss, figures for the log)."""


class Loop:
    """Trains `model` for a budget of minutes; the learning rate follows the share that is spent.

    Args:
        model: float32 module; runs under bf16 autocast where `precision` is "bf16".
        optimizers: one or several; each group's `lr` is its peak.
        folder: gets `state.safetensors` (model, EMA, optimizer) and `log.jsonl`; training resumes from it.
        minutes: time budget of this training, earlier runs of the same folder counted in.
        decay_from: share of the budget after which the rate falls linearly to zero.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        folder: Path,
        *,
        minutes: float,
        precision: str = "bf16",
        ema_decay: float = 0.999,
        warmup: int = 100,
        decay_from: float = 0.3,
        clip: float = 1.0,
    ) -> None:
        self.accelerator = Accelerator(mixed_precision=precision)
        self.model: nn.Module = self.accelerator.prepare_model(model)
        self.optimizers = [self.accelerator.prepare_optimizer(o) for o in optimizers]
        self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.folder, self.minutes, self.ema_decay = folder, minutes, ema_decay
        self.warmup, self.decay_from, self.clip = warmup, decay_from, clip
        self.step, self.seconds = 0, 0.0
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        folder.mkdir(parents=True, exist_ok=True)
        if self.state_file.exists():
            self.restore()

    @property
    def state_file(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        return min(1.0, self.seconds / (60 * self.minutes))

    def run(self, loss: Loss, *, save_minutes: float = 5.0, log_steps: int = 50) -> None:
        """Trains to the end of the budget; Ctrl-C or SIGTERM ends the step, saves and stops."""
        bar = tqdm(
            total=round(60 * self.minutes), initial=round(self.seconds), unit="s", desc=self.folder.name
        )
        saved, mean = time.monotonic(), math.nan
        with bar, signals() as asked:
            while self.progress < 1 and not asked:
                began = time.monotonic()
                value, figures = self._update(loss)
                mean = value if math.isnan(mean) else 0.98 * mean + 0.02 * value
                self.step += 1
                self.seconds += time.monotonic() - began
                bar.n = round(self.seconds)
                if self.step % log_steps == 0:
                    self._log(mean, figures)
                    bar.set_postfix(step=self.step, loss=f"{mean:.4f}", **figures)
                if time.monotonic() - saved > 60 * save_minutes:
                    self.save()
                    saved = time.monotonic()
            self.save()
            if asked:
                bar.write(f"stopped at step {self.step}; the same command goes on from here")

    def _update(self, loss: Loss) -> tuple[float, dict[str, float]]:
        rate = min(1.0, (self.step + 1) / self.warmup)
        if self.progress > self.decay_from:
            rate *= max(0.0, (1 - self.progress) / (1 - self.decay_from))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"]
        with self.accelerator.autocast():
            value, figures = loss(self.step, self.progress)
        self.accelerator.backward(value)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        live = self.accelerator.unwrap_model(self.model).state_dict()
        for key, kept in self.ema.items():
            kept.lerp_(live[key], 1 - decay) if kept.is_floating_point() else kept.copy_(live[key])
        return float(value.detach()), figures

    def _log(self, mean: float, figures: dict[str, float]) -> None:
        record = {"step": self.step, "minutes": round(self.seconds / 60, 2), "loss": round(mean, 5)}
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(record | {k: round(v, 4) for k, v in figures.items()}) + "\n")

    def save(self) -> None:
        """Writes the whole state to a temporary name and renames it."""
        tensors = {f"ema.{k}": v for k, v in self.ema.items()}
        tensors |= {
            f"model.{k}": v for k, v in self.accelerator.unwrap_model(self.model).state_dict().items()
        }
        for n, optimizer in enumerate(self.optimizers):
            for i, values in optimizer.state_dict()["state"].items():
                for name, v in values.items():
                    tensors[f"optimizer{n}.{i}.{name}"] = torch.as_tensor(v)
        whole = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        with replacing(self.state_file) as partial:
            save_file(whole, partial, {"step": str(self.step), "seconds": str(self.seconds)})

    def restore(self) -> None:
        """Goes on from `state_file`."""
        with safe_open(self.state_file, "pt") as file:
            meta = file.metadata()
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        for key in self.ema:
            self.ema[key].copy_(tensors[f"ema.{key}"])
        self.accelerator.unwrap_model(self.model).load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
        for n, optimizer in enumerate(self.optimizers):
            state = optimizer.state_dict()
            state["state"] = {}
            for key, v in tensors.items():
                if key.startswith(f"optimizer{n}."):
                    _, i, name = key.split(".", 2)
                    state["state"].setdefault(int(i), {})[name] = v
            optimizer.load_state_dict(state)


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


def ema_state(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a training folder."""
    with safe_open(folder / "state.safetensors", "pt") as file:
        return {k[4:]: file.get_tensor(k) for k in file.keys() if k.startswith("ema.")}  # noqa: SIM118
