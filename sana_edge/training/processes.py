"""The processes of a training: one, or several on one machine or many, started by torchrun or accelerate."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from sana_edge.errors import InvalidInput
from sana_edge.torch_runtime.device import computes_bf16

from .imagefolder import LeftOut
from .recipe import Stage, Training
from .trained_denoiser import TrainedDenoiser


def make_accelerator(precision: str) -> Accelerator:
    """This process' place among the others, its device and its precision, which is fp32 on most CPUs."""
    on_cpu = not torch.accelerator.is_available()
    # several processes of a CPU have to be told that they are
    return Accelerator(mixed_precision=cpu_precision(precision) if on_cpu else precision, cpu=on_cpu)


def cpu_precision(wanted: str) -> str:
    """bf16 where the CPU has instructions for it."""
    return wanted if wanted == "bf16" and computes_bf16() else "no"


def shard(model: TrainedDenoiser, accelerator: Accelerator, training: Training) -> None:
    """Spread parameters, gradients and optimizer states over the processes, in place (FSDP2)."""
    from torch.distributed.fsdp import fully_shard

    if accelerator.num_processes == 1:
        raise InvalidInput("training.shard is true, and there is one process", "start it with torchrun")
    for block in model.trained_blocks():
        fully_shard(block, reshard_after_forward=training.gather_twice)
    fully_shard(model, reshard_after_forward=training.gather_twice)


def split_batch(stage: Stage, processes: int) -> tuple[int, int]:
    """Rows of a forward pass, and forward passes of a step, in each process.

    Raises:
        InvalidInput: the batch cannot be split evenly.
    """
    own, rest = divmod(stage.batch, processes)
    if rest:
        raise InvalidInput(
            f"a batch of {stage.batch} cannot be split over {processes} processes",
            f"give stage.batch a multiple of {processes}",
        )
    rows = stage.micro_batch or own
    if own % rows:
        raise InvalidInput(
            f"{own} pictures of a process cannot be split into parts of {rows}",
            "give stage.micro_batch a divisor of them",
        )
    return rows, own // rows


def gather_left_out(left_out: LeftOut, accelerator: Accelerator) -> None:
    """Add what the other processes left out of the pictures; each has read all of the captions."""
    if accelerator.num_processes > 1:
        found: list[Any] = gather_object([(left_out.broken, left_out.enlarged)])
        left_out.enlarged = 0
        for broken, enlarged in found:
            left_out.broken.update(broken)
            left_out.enlarged += enlarged


def check_shared(pictures: int, accelerator: Accelerator) -> None:
    """Refuse machines that see different latents, which would train on different pictures.

    Raises:
        InvalidInput: they do.
    """
    seen = gather_object([pictures]) if accelerator.num_processes > 1 else [pictures]
    if len(set(seen)) > 1:
        raise InvalidInput(
            f"the processes see from {min(seen)} to {max(seen)} pictures",
            "put --data and --latents where all machines see the same files",
        )


def say(line: str, accelerator: Accelerator) -> None:
    """A line on stderr, of the first process."""
    if accelerator.is_main_process:
        print(line, file=sys.stderr)


def device_memory(device: torch.device) -> int:
    """Most bytes that were in use: of the device where it is CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
