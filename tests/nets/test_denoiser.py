"""The denoiser against diffusers' SanaTransformer2DModel with random weights, in every public form."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor

from sana_edge.config import DenoiserConfig
from sana_edge.errors import CheckpointError
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.text_encoder import TextFeatures

TINY: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 64,
    "caption_channels": 40,
    "sample_size": 8,
}
SPRINT = {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}
FORMS: dict[str, dict[str, Any]] = {
    "sana-1.0": {},
    "sana-1.5": {"qk_norm": "rms_norm_across_heads"},
    "sprint": SPRINT,
    "2k": {"interpolation_scale": 1.0},
    "4k": {"interpolation_scale": 2.0},
    "attention-bias": {"attention_bias": True, "norm_eps": 1e-3, "out_channels": 16},
}
WIDE = {"num_layers": 1, "caption_channels": 2304, "in_channels": 32, "out_channels": 32, "sample_size": 32}
W1152 = {"num_attention_heads": 36, "attention_head_dim": 32, "num_cross_attention_heads": 16}
W1152 |= {"cross_attention_head_dim": 72, "cross_attention_dim": 1152}
W2240 = {"num_attention_heads": 70, "attention_head_dim": 32, "num_cross_attention_heads": 20}
W2240 |= {"cross_attention_head_dim": 112, "cross_attention_dim": 2240}
GUIDANCE = 4.5


def random_model(**changes: Any) -> SanaTransformer2DModel:
    """Every parameter random: at their initial values norms, biases and tables hide mistakes."""
    with torch.device("meta"):
        model = SanaTransformer2DModel(**TINY | changes)
    positions = model.patch_embed.pos_embed
    model = model.to_empty(device="cpu").eval()
    if positions is not None:
        # to_empty has dropped the one buffer that is computed
        source = SanaTransformer2DModel(**TINY | changes, mlp_ratio=1.0)
        model.patch_embed.pos_embed = source.patch_embed.pos_embed
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.normal_(std=0.5 if "table" in name else fan_in**-0.5)
            if "norm" in name:
                parameter.add_(1)
    return model


def ours(model: SanaTransformer2DModel) -> Denoiser:
    return Denoiser.from_diffusers(DenoiserConfig.from_dict(dict(model.config)), model.state_dict())


def inputs(model: SanaTransformer2DModel, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, captions and masks of four rows; the valid lengths are 3, 7, 1 and 5 of 7."""
    latent = torch.randn(4, model.config.in_channels, height, width)
    mask = torch.arange(7) < torch.tensor([[3], [7], [1], [5]])
    return latent, torch.randn(4, 7, model.config.caption_channels), mask


@torch.no_grad()
def theirs(
    model: SanaTransformer2DModel, latent: Tensor, time: float, captions: Tensor, mask: Tensor
) -> Tensor:
    """One call as the pipelines make it."""
    config = model.config
    timestep = torch.tensor([time] * len(latent)) * config.timestep_scale
    guidance = torch.full((len(latent),), GUIDANCE * config.guidance_embeds_scale)
    output = model(
        latent,
        encoder_hidden_states=captions,
        encoder_attention_mask=mask.long(),
        timestep=timestep,
        guidance=guidance if config.guidance_embeds else None,
    )
    sample: Tensor = output.sample
    return sample


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (9, 4)], ids=lambda size: "{}x{}".format(*size))
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_diffusers_over_a_schedule(form: str, size: tuple[int, int]) -> None:
    """One context and one table of modulations serve all steps; four prompts of different lengths."""
    model = random_model(**FORMS[form])
    denoiser = ours(model)
    latent, captions, mask = inputs(model, *size)
    times = [1.0, 0.53, 0.02] if denoiser.config.guidance_embeds else [999, 487, 3]
    with torch.no_grad():
        context = denoiser.text_context([TextFeatures(captions, mask)])
        tables = denoiser.modulation(
            torch.tensor(times), GUIDANCE if denoiser.config.guidance_embeds else None
        )
        for step, time in enumerate(times):
            expected = theirs(model, latent, time, captions, mask)
            assert error(denoiser(latent, tables[step], context), expected) <= 1e-5
            latent = latent - 0.1 * expected[:, : latent.shape[1]]


def test_timestep_scale_is_applied_where_the_pipelines_apply_it() -> None:
    model = random_model(timestep_scale=0.001)
    denoiser = ours(model)
    latent, captions, mask = inputs(model, 6, 6)
    with torch.no_grad():
        step = denoiser.modulation(torch.tensor([700]))[0]
        actual = denoiser(latent, step, denoiser.text_context([TextFeatures(captions, mask)]))
    assert error(actual, theirs(model, latent, 700, captions, mask)) <= 1e-5

    sprint = random_model(**SPRINT, timestep_scale=0.001)
    unscaled = random_model(**SPRINT)
    unscaled.load_state_dict(sprint.state_dict())
    with torch.no_grad():
        step = ours(sprint).modulation(torch.tensor([0.7]), GUIDANCE)[0]
        actual = ours(sprint)(latent, step, ours(sprint).text_context([TextFeatures(captions, mask)]))
    assert error(actual, theirs(unscaled, latent, 0.7, captions, mask)) <= 1e-5


@pytest.mark.parametrize(("width", "form"), [(W1152, "sana-1.0"), (W2240, "sana-1.5")], ids=["0.6b", "1.6b"])
def test_one_layer_at_full_width_equals_diffusers(width: dict[str, int], form: str) -> None:
    model = random_model(**WIDE, **width, **FORMS[form])
    denoiser = ours(model)
    latent, captions, mask = torch.randn(2, 32, 8, 6), torch.randn(2, 11, 2304), torch.ones(2, 11).bool()
    mask[0, 1:] = False
    with torch.no_grad():
        groups = [TextFeatures(captions[:1], mask[:1]), TextFeatures(captions[1:], mask[1:])]
        actual = denoiser(latent, denoiser.modulation(torch.tensor([611]))[0], denoiser.text_context(groups))
    assert error(actual, theirs(model, latent, 611, captions, mask)) <= 1e-5


def test_wide_images_go_through_the_feed_forward_in_pieces() -> None:
    """More than one piece of channels, the last one shorter: 2 × 64 × 96 tokens, 448 hidden channels."""
    model = random_model(num_layers=1, mlp_ratio=7.0)
    denoiser = ours(model)
    latent, captions, mask = (tensor[:2] for tensor in inputs(model, 64, 96))
    with torch.no_grad():
        context = denoiser.text_context([TextFeatures(captions, mask)])
        actual = denoiser(latent, denoiser.modulation(torch.tensor([50]))[0], context)
    assert error(actual, theirs(model, latent, 50, captions, mask)) <= 1e-5


def test_clamp_limits_the_self_attention_output_in_every_dtype() -> None:
    """diffusers clips in fp16 only; a hook makes it clip in fp32, which is what fp16 weights need."""
    model = random_model()
    last = model.transformer_blocks[-1]
    with torch.no_grad():
        last.attn1.to_out[0].weight.mul_(1e5)
        # keeps the softmax over the text from tipping over at the next rounding error
        last.attn2.to_q.weight.mul_(1e-5)
    denoiser = ours(model)
    latent, captions, mask = inputs(model, 8, 6)

    def run() -> Tensor:
        with torch.no_grad():
            context = denoiser.text_context([TextFeatures(captions, mask)])
            velocity: Tensor = denoiser(latent, denoiser.modulation(torch.tensor([900]))[0], context)
        return velocity

    unclipped = theirs(model, latent, 900, captions, mask)
    assert error(run(), unclipped) <= 1e-5
    last.attn1.register_forward_hook(lambda module, given, output: output.clip(-65504, 65504))
    clipped = theirs(model, latent, 900, captions, mask)
    assert error(clipped, unclipped) > 0.01
    denoiser.clamp = True
    assert error(run(), clipped) <= 1e-5
    # unclipped it is as far away in bf16 as in fp32
    rounded = denoiser.bfloat16()
    latent, captions = latent.bfloat16(), captions.bfloat16()
    assert error(run().float(), clipped) < 0.1 * error(unclipped, clipped)
    rounded.clamp = False
    assert error(run().float(), clipped) > 0.5 * error(unclipped, clipped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_fp32_as_diffusers_is(dtype: torch.dtype) -> None:
    model = random_model()
    latent, captions, mask = inputs(model, 6, 10)
    # the rounding of the inputs and the weights is not what is compared
    model.to(dtype).float()
    latent, captions = latent.to(dtype).float(), captions.to(dtype).float()
    exact = theirs(model, latent, 321, captions, mask)
    model.to(dtype)
    reference = theirs(model, latent.to(dtype), 321, captions.to(dtype), mask)
    denoiser = ours(model)
    with torch.no_grad():
        step = denoiser.modulation(torch.tensor([321]))[0]
        actual = denoiser(latent, step, denoiser.text_context([TextFeatures(captions, mask)]))
    assert actual.dtype == torch.float32
    assert error(actual, exact) <= 1.5 * error(reference.float(), exact)


@pytest.mark.parametrize("form", FORMS)
def test_weights_survive_the_way_to_our_layout_and_back(form: str) -> None:
    state = random_model(**FORMS[form]).state_dict()
    config = DenoiserConfig.from_dict(TINY | FORMS[form])
    returned = Denoiser.from_diffusers(config, state).to_diffusers()
    assert returned.keys() == state.keys()
    assert all(torch.equal(returned[name], tensor) for name, tensor in state.items())
    assert all(tensor.is_contiguous() for tensor in returned.values())


def test_a_wrong_state_dict_is_refused_by_name() -> None:
    state = random_model(**FORMS["sana-1.5"]).state_dict()
    config = DenoiserConfig.from_dict(TINY | FORMS["sana-1.5"])
    name = "transformer_blocks.1.attn1.to_k.weight"
    with pytest.raises(CheckpointError, match=rf"lack {name}"):
        Denoiser.from_diffusers(config, {key: value for key, value in state.items() if key != name})
    with pytest.raises(CheckpointError, match=rf"{name} is \[64, 63\], expected \[64, 64\]"):
        Denoiser.from_diffusers(config, state | {name: state[name][:, 1:]})
    with pytest.raises(CheckpointError, match=r"norm_k\.weight, which nothing reads"):
        Denoiser.from_diffusers(DenoiserConfig.from_dict(TINY), state)


COUNTS = {
    "sana-0.6b": (W1152, 28, None, False, 591_747_872),
    "sana-1.6b": (W2240, 20, None, False, 1_604_462_752),
    "sana-1.5-1.6b": (W2240, 20, "rms_norm_across_heads", False, 1_604_641_952),
    "sana-1.5-4.8b": (W2240, 60, "rms_norm_across_heads", False, 4_721_825_952),
    "sprint-0.6b": (W1152, 28, "rms_norm_across_heads", True, 593_501_216),
    "sprint-1.6b": (W2240, 20, "rms_norm_across_heads", True, 1_610_237_472),
}


@pytest.mark.parametrize("name", COUNTS)
def test_public_models_have_the_published_number_of_parameters(name: str) -> None:
    width, layers, qk_norm, guidance, expected = COUNTS[name]
    form = {"num_layers": layers, "qk_norm": qk_norm, "guidance_embeds": guidance}
    with torch.device("meta"):
        denoiser = Denoiser(DenoiserConfig.from_dict(WIDE | width | form))
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == expected
    assert len(set(itertools.chain(denoiser.state_dict()))) == len(list(denoiser.parameters()))
