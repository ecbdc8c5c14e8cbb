"""A whole model folder in full size with random weights, to measure what loading and quantizing it takes.

    python benchmarks/random_model.py random-0.6b --shapes 0.6b
    python benchmarks/random_model.py random-sprint-0.6b --shapes 0.6b --sprint

Pictures from it are noise. Weights are streamed to the disk: memory stays below 3 GB.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shapes import AUTOENCODERS, DENOISERS
from torch import Tensor

from sana_edge.atomic import write_json
from sana_edge.calib.package_writer import copy_files, new_folder, write_shards
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.store.folder import read_json
from sana_edge.store.known_models import BUNDLED
from sana_edge.torch_runtime.load import DTYPES

# the text encoder of all public SANA models
GEMMA_2_2B = {
    "architectures": ["Gemma2Model"],
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
# what the Sprint models have beside their shapes, and their sampler with diffusers' settings
SPRINT: dict[str, Any] = {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}
SCM = {
    "_class_name": "SCMScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "trigflow",
    "sigma_data": 0.5,
}


def write_model(
    output: Path,
    shapes: str,
    *,
    dtype: torch.dtype,
    text_layers: int,
    text_width: int,
    force: bool,
    sprint: bool = False,
    device: str = "cpu",
) -> None:
    """Write the folder.

    Args:
        shapes: a name of `shapes.DENOISERS`.
        dtype: of the denoiser and the autoencoder; the text encoder is bf16, as the public ones.
        text_layers, text_width: Gemma-2-2B has 26 and 2304; the denoiser must read as many channels.
        device: where the weights are drawn; each kind draws its own.
        sprint: a Sprint model, with a guidance embedding, norms of queries and keys, and the SCM sampler.
    """
    tiny = BUNDLED / "sana-tiny"
    config = replace(DENOISERS[shapes], **SPRINT) if sprint else DENOISERS[shapes]
    with new_folder(output, force=force) as folder:
        names = [path.relative_to(tiny).as_posix() for path in tiny.rglob("*.json")]
        kept = ("model_index.json", "scheduler/", "tokenizer/")
        copy_files([name for name in names if name.startswith(kept)], tiny, folder)
        if sprint:
            _make_sprint(folder)
        with torch.device("meta"):
            denoiser = Denoiser(config).to_diffusers()
            autoencoder = Autoencoder(AUTOENCODERS[shapes]).state_dict()
        _component(folder / "transformer", config.to_dict(), denoiser, dtype, device)
        _component(folder / "vae", AUTOENCODERS[shapes].to_dict(), autoencoder, dtype, device)
        text = _text_config(text_layers, text_width)
        _component(folder / "text_encoder", text, _text_shapes(text), torch.bfloat16, device, stem="model")


def _make_sprint(folder: Path) -> None:
    """Name Sprint's pipeline and sampler in place of those that were copied."""
    index = read_json(folder / "model_index.json")
    scheduler = ["diffusers", SCM["_class_name"]]
    changed = {**index, "_class_name": "SanaSprintPipeline", "scheduler": scheduler}
    write_json(folder / "model_index.json", changed)
    write_json(folder / "scheduler" / "scheduler_config.json", SCM)


def _text_config(layers: int, width: int) -> dict[str, Any]:
    vocabulary = GEMMA_2_2B["vocab_size"]
    if width != GEMMA_2_2B["hidden_size"]:
        # a small text encoder for tests
        vocabulary = read_json(BUNDLED / "sana-tiny" / "text_encoder" / "config.json")["vocab_size"]
    return {**GEMMA_2_2B, "hidden_size": width, "num_hidden_layers": layers, "vocab_size": vocabulary}


def _text_shapes(config: Mapping[str, Any]) -> dict[str, Tensor]:
    from transformers import Gemma2Config, Gemma2Model

    with torch.device("meta"):
        return dict(Gemma2Model(Gemma2Config.from_dict(dict(config))).state_dict())


def _component(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: str,
    *,
    stem: str = "diffusion_pytorch_model",
) -> None:
    folder.mkdir()
    write_json(folder / "config.json", dict(config))
    write_shards(random_weights(shapes, dtype, device), folder, stem=stem)


def random_weights(
    shapes: Mapping[str, Tensor], dtype: torch.dtype, device: str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Normal weights that keep activations near 1, the same in every process, one tensor at a time."""
    generator = torch.Generator(device).manual_seed(0)
    for name, like in shapes.items():
        fan_in = like[0].numel() if like.ndim > 1 else 4
        if "embed_tokens" in name:
            fan_in = 1
        tensor = torch.randn(like.shape, generator=generator, dtype=torch.float32, device=device)
        tensor *= 0.5 if "table" in name else fan_in**-0.5
        if "norm" in name and name.endswith("weight") and "layernorm" not in name:
            tensor += 1
        yield name, tensor.to("cpu", dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description="write a model folder with random weights")
    parser.add_argument("output", type=Path)
    parser.add_argument("--shapes", choices=sorted(DENOISERS), default="0.6b")
    parser.add_argument("--sprint", action="store_true", help="a Sprint model: 2 steps without guidance")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="(default: fp16, bf16 with --sprint)")
    parser.add_argument("--text-layers", type=int, default=GEMMA_2_2B["num_hidden_layers"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where weights are drawn")
    parser.add_argument("--force", action="store_true", help="replace the folder")
    args = parser.parse_args()
    width = DENOISERS[args.shapes].caption_channels
    write_model(
        args.output,
        args.shapes,
        # as most public ones
        dtype=DTYPES[args.dtype or ("bf16" if args.sprint else "fp16")],
        text_layers=args.text_layers,
        text_width=width,
        force=args.force,
        sprint=args.sprint,
        device=args.device,
    )
    print(args.output)


if __name__ == "__main__":
    main()
