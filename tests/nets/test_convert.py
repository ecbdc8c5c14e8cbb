"""Conversion against diffusers: its models under NVlabs' names, converted, load in diffusers unchanged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from sana_edge.config import AutoencoderConfig, DenoiserConfig
from sana_edge.errors import CheckpointError, InvalidInput, SanaError
from sana_edge.nets.convert import convert

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def denoiser(**changes: object) -> SanaTransformer2DModel:
    settings = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 64,
        "caption_channels": 24,
        "sample_size": 32,
    }
    return SanaTransformer2DModel(**{**settings, **changes})


def nvlabs_denoiser(model: SanaTransformer2DModel) -> dict[str, Tensor]:
    """The tensors of a diffusers model under the names, and in the fused form, of an NVlabs file."""
    state = model.state_dict()
    for i in range(len(model.transformer_blocks)):
        block = f"transformer_blocks.{i}"
        parts = [state.pop(f"{block}.attn1.to_{name}.weight") for name in "qkv"]
        state[f"{block}.attn.qkv.weight"] = torch.cat(parts)
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"{block}.attn2.to_{name}.{leaf}") for name in "kv"]
            state[f"{block}.cross_attn.kv_linear.{leaf}"] = torch.cat(parts)
    replacements = (
        ("attn1.to_out.0", "attn.proj"),
        ("attn1.norm_", "attn."),
        ("attn2.to_q", "cross_attn.q_linear"),
        ("attn2.to_out.0", "cross_attn.proj"),
        ("attn2.norm_", "cross_attn."),
        ("attn.q.", "attn.q_norm."),
        ("attn.k.", "attn.k_norm."),
        ("ff.conv_inverted", "mlp.inverted_conv.conv"),
        ("ff.conv_depth", "mlp.depth_conv.conv"),
        ("ff.conv_point", "mlp.point_conv.conv"),
        ("transformer_blocks", "blocks"),
        ("patch_embed.proj", "x_embedder.proj"),
        ("caption_projection.linear_", "y_embedder.y_proj.fc"),
        ("caption_norm", "attention_y_norm"),
        ("time_embed.emb.", "time_embed."),
        ("time_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("time_embed.guidance_embedder.linear_1", "cfg_embedder.mlp.0"),
        ("time_embed.guidance_embedder.linear_2", "cfg_embedder.mlp.2"),
        ("time_embed.linear", "t_block.1"),
        ("proj_out", "final_layer.linear"),
    )
    result = {}
    for key, tensor in state.items():
        for ours, theirs in replacements:
            key = key.replace(ours, theirs)
        result["final_layer.scale_shift_table" if key == "scale_shift_table" else key] = tensor
    return result


def save_denoiser(path: Path, model: SanaTransformer2DModel, **extra: Tensor) -> Path:
    training_only = {"y_embedder.y_embedding": torch.zeros(3, 24), "logvar_linear.weight": torch.zeros(1, 64)}
    torch.save({"state_dict": {**nvlabs_denoiser(model), **training_only, **extra}, "epoch": 3}, path)
    return path


def autoencoder(**changes: object) -> AutoencoderDC:
    types = ("ResBlock", "ResBlock", "EfficientViTBlock")
    settings = {
        "latent_channels": 8,
        "attention_head_dim": 16,
        "encoder_block_types": types,
        "decoder_block_types": types,
        "encoder_block_out_channels": (8, 16, 32),
        "decoder_block_out_channels": (8, 16, 32),
        "encoder_layers_per_block": (1, 2, 1),
        "decoder_layers_per_block": (2, 1, 3),
        "encoder_qkv_multiscales": ((), (), (5,)),
        "decoder_qkv_multiscales": ((), (), (5,)),
        "upsample_block_type": "interpolate",
        "downsample_block_type": "Conv",
        "scaling_factor": 0.41407,
    }
    return AutoencoderDC(**{**settings, **changes})


def published_autoencoder(model: AutoencoderDC) -> dict[str, Tensor]:
    """The tensors of a diffusers model under the names of the DC-AE authors."""
    state = model.state_dict()
    for query in [key for key in state if key.endswith("attn.to_q.weight")]:
        parts = [state.pop(query.replace("to_q", f"to_{name}")) for name in "qkv"]
        block = query.removesuffix("attn.to_q.weight")
        state[f"{block}context_module.main.qkv.conv.weight"] = torch.cat(parts)[..., None, None]
        state[f"{block}context_module.main.proj.conv.weight"] = state.pop(f"{block}attn.to_out.weight")[
            ..., None, None
        ]
    return {_published_name(key, model.config.downsample_block_type): tensor for key, tensor in state.items()}


def _published_name(key: str, downsample: str) -> str:
    for ours, theirs in (
        (
            "encoder.conv_in.conv",
            "encoder.project_in.conv" if downsample == "Conv" else "encoder.project_in.conv.conv",
        ),
        ("encoder.conv_in", "encoder.project_in.conv"),
        ("encoder.conv_out", "encoder.project_out.main.op_list.0.conv"),
        ("decoder.conv_in", "decoder.project_in.main.conv"),
        ("decoder.norm_out", "decoder.project_out.op_list.0"),
        ("decoder.conv_out.conv", "decoder.project_out.op_list.2.conv.conv"),
        ("decoder.conv_out", "decoder.project_out.op_list.2.conv"),
        ("attn.to_qkv_multiscale.0.proj_in", "context_module.main.aggreg.0.0"),
        ("attn.to_qkv_multiscale.0.proj_out", "context_module.main.aggreg.0.1"),
        ("attn.norm_out", "context_module.main.proj.norm"),
        ("conv_out.conv_inverted", "local_module.main.inverted_conv.conv"),
        ("conv_out.conv_depth", "local_module.main.depth_conv.conv"),
        ("conv_out.conv_point", "local_module.main.point_conv.conv"),
        ("conv_out.norm", "local_module.main.point_conv.norm"),
    ):
        key = key.replace(ours, theirs)
    side, blocks, *place, module, leaf = key.split(".")
    if blocks not in ("down_blocks", "up_blocks"):
        return key
    if len(place) == 2:
        plain = blocks == "down_blocks" and downsample == "Conv"
        names = {"conv1": "conv1.conv", "conv2": "conv2.conv", "norm": "conv2.norm"}
        module = "main." + names.get(module, "conv" if plain else "conv.conv")
    stage, entry, *inner = place
    return ".".join([side, "stages", stage, "op_list", entry, *inner, module, leaf])


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert sorted(ours) == sorted(theirs)
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 1024),
        ({"sample_size": 16}, 512),
        ({"sample_size": 128, "interpolation_scale": 2.0}, 4096),
        ({"qk_norm": "rms_norm_across_heads"}, 1024),
        ({"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}, 1024),
    ],
    ids=["sana", "512", "4k", "sana-1.5", "sprint"],
)
def test_denoiser(tmp_path: Path, changes: dict[str, object], size: int) -> None:
    model = denoiser(**changes)
    file = save_denoiser(tmp_path / "sana.pth", model)
    written = convert(file, tmp_path / "out", size=size, cross_attention_heads=4)
    assert written == [tmp_path / "out/transformer"]
    assert_same(SanaTransformer2DModel.from_pretrained(written[0]), model)
    config = DenoiserConfig.from_dict(json.loads((written[0] / "config.json").read_text()))
    assert config == DenoiserConfig.from_dict(model.config)


def test_dtype_is_kept(tmp_path: Path) -> None:
    model = denoiser().to(torch.bfloat16)
    (folder,) = convert(
        save_denoiser(tmp_path / "a.pth", model), tmp_path / "out", size=1024, cross_attention_heads=4
    )
    assert_same(SanaTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16), model)


def test_size_from_the_position_table(tmp_path: Path) -> None:
    file = save_denoiser(tmp_path / "a.pth", denoiser(), pos_embed=torch.zeros(1, 64 * 64, 64))
    (folder,) = convert(file, tmp_path / "out", cross_attention_heads=4)
    config = DenoiserConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert (config.native_size, config.interpolation_scale) == (2048, 1.0)


def test_size_or_heads_that_are_not_known(tmp_path: Path) -> None:
    file = save_denoiser(tmp_path / "a.pth", denoiser())
    with pytest.raises(InvalidInput, match="does not say on which size"):
        convert(file, tmp_path / "out", cross_attention_heads=4)
    with pytest.raises(InvalidInput, match="size 1000 is none"):
        convert(file, tmp_path / "out", size=1000, cross_attention_heads=4)
    with pytest.raises(InvalidInput, match="width 64 with an unknown number"):
        convert(file, tmp_path / "out", size=1024)
    with pytest.raises(InvalidInput, match="width 64 with 5 cross"):
        convert(file, tmp_path / "out", size=1024, cross_attention_heads=5)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"},
        {"encoder_qkv_multiscales": ((), (), (3,)), "decoder_block_out_channels": (16, 8, 32)},
    ],
    ids=["sana", "pixel-shuffle", "widths"],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_autoencoder(tmp_path: Path, changes: dict[str, object], suffix: str) -> None:
    model = autoencoder(**changes)
    file = tmp_path / f"dc-ae{suffix}"
    state = published_autoencoder(model)
    torch.save({"state_dict": state}, file) if suffix == ".pth" else save_file(state, file)
    written = convert(file, tmp_path / "out")
    assert written == [tmp_path / "out/vae"]
    assert_same(AutoencoderDC.from_pretrained(written[0]), model)
    config = AutoencoderConfig.from_dict(json.loads((written[0] / "config.json").read_text()))
    assert config == AutoencoderConfig.from_dict(model.config)


def test_whole_folder_from_a_base(tmp_path: Path, tiny_folder: Path) -> None:
    base = SanaPipeline.from_pretrained(tiny_folder)
    model = denoiser(caption_channels=base.text_encoder.config.hidden_size)
    file = save_denoiser(tmp_path / "a.pth", model)
    written = convert(file, tmp_path / "out", size=4096, cross_attention_heads=4, base=tiny_folder)
    assert {path.name for path in written} == {path.name for path in tiny_folder.iterdir()}
    pipeline = SanaPipeline.from_pretrained(tmp_path / "out")
    assert_same(pipeline.transformer, model)
    assert_same(pipeline.vae, base.vae)
    assert_same(pipeline.text_encoder, base.text_encoder)
    assert pipeline.scheduler.config.flow_shift == 6.0
    assert pipeline.scheduler.config.use_flow_sigmas


def test_sprint_folder_from_a_base(tmp_path: Path, tiny_folder: Path) -> None:
    model = denoiser(qk_norm="rms_norm_across_heads", guidance_embeds=True, caption_channels=32)
    file = save_denoiser(tmp_path / "a.pth", model)
    convert(file, tmp_path / "out", size=1024, cross_attention_heads=4, base=tiny_folder)
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    scheduler = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert index["_class_name"] == "SanaSprintPipeline"
    assert index["scheduler"] == ["diffusers", "SCMScheduler"]
    assert scheduler["_class_name"] == "SCMScheduler"


def test_existing_output(tmp_path: Path) -> None:
    file = save_denoiser(tmp_path / "a.pth", denoiser())
    keep = tmp_path / "out/transformer/keep.txt"
    keep.parent.mkdir(parents=True)
    keep.touch()
    (tmp_path / "out/other.txt").touch()
    with pytest.raises(InvalidInput, match=r"out.transformer exists"):
        convert(file, tmp_path / "out", size=1024, cross_attention_heads=4)
    assert keep.exists()
    convert(file, tmp_path / "out", size=1024, cross_attention_heads=4, force=True)
    assert sorted(path.name for path in keep.parent.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert (tmp_path / "out/other.txt").exists()


def test_output_that_cannot_be_made(tmp_path: Path) -> None:
    file = save_denoiser(tmp_path / "a.pth", denoiser())
    with pytest.raises(SanaError, match="cannot write"):
        convert(file, file / "out", size=1024, cross_attention_heads=4)


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    file = save_denoiser(tmp_path / "a.pth", denoiser())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(SanaError, match="cannot write"):
            convert(file, tmp_path / "out", size=1024, cross_attention_heads=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [file]


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    torch.save({"state_dict": {"x_embedder.proj.weight": Malicious(tmp_path / "ran")}}, file)
    with pytest.raises(CheckpointError, match=r"cannot read .*a\.pth"):
        convert(file, tmp_path / "out", size=1024)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", [b"", b"garbage that is no pickle", b"\x80\x02]q\x00."])
def test_file_that_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        convert(tmp_path / "a.pth", tmp_path / "out", size=1024)


def test_truncated_file(tmp_path: Path) -> None:
    file = save_denoiser(tmp_path / "a.pth", denoiser())
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"cannot read .*a\.pth"):
        convert(file, tmp_path / "out", size=1024)
    with pytest.raises(CheckpointError, match="is no file"):
        convert(tmp_path / "b.pth", tmp_path / "out", size=1024)


def test_other_keys_are_named(tmp_path: Path) -> None:
    file = save_denoiser(tmp_path / "a.pth", denoiser(), **{"controlnet.0.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 keys are of no SANA denoiser \(controlnet\.0\.weight\)"):
        convert(file, tmp_path / "out", size=1024, cross_attention_heads=4)
    state = nvlabs_denoiser(denoiser())
    del state["blocks.1.attn.proj.bias"]
    torch.save({"state_dict": state}, file)
    with pytest.raises(
        CheckpointError, match=r"1 missing keys \(transformer_blocks\.1\.attn1\.to_out\.0\.bias\)"
    ):
        convert(file, tmp_path / "out", size=1024, cross_attention_heads=4)
    torch.save({"state_dict": {"unet.conv_in.weight": torch.zeros(1)}}, file)
    with pytest.raises(CheckpointError, match=r"no SANA denoiser and no DC-AE .*unet\.conv_in\.weight"):
        convert(file, tmp_path / "out")


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "config-beside"])
def test_a_file_in_diffusers_names(tmp_path: Path, beside: bool) -> None:
    model = denoiser(qk_norm="rms_norm_across_heads", attention_bias=True)
    model.save_pretrained(tmp_path / "mine")
    file = (tmp_path / "mine/diffusion_pytorch_model.safetensors").rename(tmp_path / "mine/tuned.safetensors")
    if not beside:
        (tmp_path / "mine/config.json").unlink()
    options = {} if beside else {"size": 1024, "cross_attention_heads": 4}
    written = convert(file, tmp_path / "out", **options)
    assert_same(SanaTransformer2DModel.from_pretrained(written[0]), model)


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_a_components_folder(tmp_path: Path, sharded: bool) -> None:
    model = autoencoder()
    model.save_pretrained(tmp_path / "vae", max_shard_size="20KB" if sharded else "5GB")
    written = convert(tmp_path / "vae", tmp_path / "out")
    assert_same(AutoencoderDC.from_pretrained(written[0]), model)


def test_a_compiled_and_averaged_denoiser(tmp_path: Path) -> None:
    model, averaged = denoiser(), denoiser()
    states = {
        name: {f"module._orig_mod.{key}": tensor for key, tensor in nvlabs_denoiser(network).items()}
        for name, network in (("state_dict", model), ("state_dict_ema", averaged))
    }
    torch.save({**states, "epoch": 3}, tmp_path / "a.pth")
    options = {"size": 1024, "cross_attention_heads": 4}
    notes: list[str] = []
    written = convert(tmp_path / "a.pth", tmp_path / "ema", tell=notes.append, **options)
    assert_same(SanaTransformer2DModel.from_pretrained(written[0]), averaged)
    assert "--weights raw" in notes[0] and "--base MODEL" in notes[1]
    written = convert(tmp_path / "a.pth", tmp_path / "raw", weights="raw", **options)
    assert_same(SanaTransformer2DModel.from_pretrained(written[0]), model)


@pytest.mark.parametrize("up", ["interpolate", "pixel_shuffle"])
@pytest.mark.parametrize("down", ["Conv", "pixel_unshuffle"])
@pytest.mark.parametrize(
    "empty",
    [
        {"decoder_layers_per_block": (0, 2, 3), "decoder_conv_act_fn": "silu"},
        {
            "decoder_layers_per_block": (0, 2, 3),
            "encoder_layers_per_block": (0, 2, 1),
            "decoder_conv_act_fn": "silu",
        },
    ],
    ids=["decoder", "both"],
)
def test_an_empty_first_stage(tmp_path: Path, up: str, down: str, empty: dict[str, object]) -> None:
    """DC-AE-Lite's: what projects to pixels is an upsampling (`decoder.project_out.2.conv.conv`) of SiLU."""
    model = autoencoder(upsample_block_type=up, downsample_block_type=down, **empty)
    published = published_autoencoder(model)
    both = "encoder_layers_per_block" in empty
    assert not any("conv_out.conv" in key or "conv_in.conv" in key for key in published)
    save_file(published, tmp_path / "lite.safetensors")
    assert "decoder.project_out.op_list.2.conv.conv.weight" in published
    assert not both or f"encoder.project_in.{'' if down == 'Conv' else 'conv.'}conv.weight" in published
    written = convert(tmp_path / "lite.safetensors", tmp_path / "out")
    assert_same(AutoencoderDC.from_pretrained(written[0]), model)


def test_a_base_of_another_model(tmp_path: Path, tiny_folder: Path) -> None:
    file = save_denoiser(tmp_path / "a.pth", denoiser())
    with pytest.raises(
        CheckpointError, match="does not fit: the denoiser reads texts of 24 channels"
    ) as caught:
        convert(file, tmp_path / "out", size=1024, cross_attention_heads=4, base=tiny_folder)
    assert "another --base" in caught.value.hint
    torch.save(published_autoencoder(autoencoder()), tmp_path / "ae.pth")
    with pytest.raises(CheckpointError, match="latents of 32 channels, the autoencoder decodes 8"):
        convert(tmp_path / "ae.pth", tmp_path / "out", base=tiny_folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", ["20000", "9" * 5000])
def test_names_of_endless_layers(tmp_path: Path, number: str) -> None:
    """Names alone, which make modules of each before the weights are looked at."""
    model, path = denoiser(), tmp_path / "model.safetensors"
    more = range(int(number)) if len(number) < 9 else [number]
    save_file({**model.state_dict(), **{f"transformer_blocks.{n}.x": torch.zeros(0) for n in more}}, path)
    with pytest.raises(CheckpointError, match=r"num_layers is 2000\d|unexpected keys"):
        convert(path, tmp_path / "out", size=1024, cross_attention_heads=4)


@pytest.mark.parametrize("number", ["20", "999999999", "9" * 5000])
@pytest.mark.parametrize("published", [True, False])
def test_names_of_endless_stages(tmp_path: Path, published: bool, number: str) -> None:
    model, path = autoencoder(), tmp_path / "model.safetensors"
    state = model.state_dict() if published else published_autoencoder(model)
    names = {True: ("encoder.down_blocks", "decoder.up_blocks"), False: ("encoder.stages", "decoder.stages")}
    extra = {f"{name}.{number}.0.conv1.weight": torch.zeros(1, 1, 1, 1) for name in names[published]}
    save_file({**{k: v.contiguous() for k, v in state.items()}, **extra}, path)
    with pytest.raises(CheckpointError):
        convert(path, tmp_path / "out")
