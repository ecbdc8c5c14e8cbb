"""The denoiser on the fused operations against the INT8 denoiser layer by layer, and what a step launches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_denoiser import CONFIG
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sana_edge.config import DenoiserConfig
from sana_edge.errors import InvalidInput
from sana_edge.fused.denoiser import FusedDenoiser
from sana_edge.fused.text import CAPACITY, FusedText, fuse_text
from sana_edge.int8 import quant
from sana_edge.nets.block import KeysValues
from sana_edge.nets.denoiser import Denoiser, Modulation
from sana_edge.nets.quantize import denoiser_targets, quantize_denoiser
from sana_edge.nets.text_context import TextContext, lay_together
from sana_edge.nets.text_encoder import TextFeatures

CPU = torch.device("cpu")
FORMS = {
    "sana-1.0": CONFIG,
    "sana-1.5": replace(CONFIG, qk_norm="rms_norm_across_heads"),
    "2k": replace(CONFIG, interpolation_scale=1.0),
    "attention-bias": replace(CONFIG, attention_bias=True),
}
HEIGHT, WIDTH = 5, 7
# Two INT8 denoisers whose sums differ in their last bits: a bf16 number moves by 2^-8, and by that an INT8
# value may become its neighbour, 1 / 127 of the row's largest. Where all values do, a layer's error is as
# large as that of INT8 itself, 1.2 %; a velocity of 2 layers with three branches each is off by sqrt(6) times
# that.
HALF_ERROR = 0.03
# In fp32 most velocities differ by 1e-6. Rarely a value becomes its neighbour: a token's row of 64 values
# then moves by 3 / 127 / sqrt(64), 0.3 %, and its later values with it; that may happen a few times.
FULL_ERROR = 0.01


def random_denoiser(config: DenoiserConfig, dtype: torch.dtype, **options: Any) -> Denoiser:
    """INT8, every parameter random, activations near 1."""
    denoiser = Denoiser(config).requires_grad_(False).eval()
    for name, parameter in denoiser.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.normal_(std=0.5 if "table" in name else fan_in**-0.5)
        if "norm" in name:
            parameter.add_(1)
    quantize_denoiser(denoiser, **options)
    return denoiser.to_compute("cpu", dtype)


def features(*lengths: int) -> TextFeatures:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    # padded on the left, as the tokenizer does
    return TextFeatures(torch.randn(len(lengths), max(lengths), 40), mask.flip(1))


def table(denoiser: Denoiser) -> Modulation:
    return denoiser.modulation(torch.tensor([400.0]))[0]


def fused_step(
    denoiser: Denoiser,
    backend: str,
    latent: Tensor,
    step: Modulation,
    context: TextContext,
    guidance: float | None = None,
) -> Tensor:
    fused = FusedDenoiser(denoiser, backend)
    images = len(latent) * (1 if guidance is None else 2)
    return fused.step(
        latent,
        Modulation(step.blocks.float(), step.final.float()),
        fuse_text(context, images, CPU),
        None if guidance is None else torch.tensor(guidance),
        fused.positions(HEIGHT, WIDTH),
        fused.workspace(images, HEIGHT * WIDTH, CPU),
    )


def error(denoiser: Denoiser, backend: str, images: int, *groups: TextFeatures) -> float:
    latent, step, context = (
        torch.randn(images, 8, HEIGHT, WIDTH),
        table(denoiser),
        denoiser.text_context(groups),
    )
    expected = denoiser(latent, step, context)
    return quant.relative_error(fused_step(denoiser, backend, latent, step, context), expected)


# groups of prompts, and how many latents
BATCHES: dict[str, tuple[int, list[tuple[int, ...]]]] = {
    "one": (1, [(7,)]),
    "folded-negative": (2, [(1,), (7,)]),
    "negative": (2, [(5,), (300,)]),
    "folded-prompt": (2, [(7,), (1,)]),
    "both-folded": (2, [(1,), (1,)]),
    "several-images": (6, [(1,), (3, 7, 5)]),
    "uneven-groups": (8, [(4, 9), (3, 7, 1, 5)]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("images", "groups"), BATCHES.values(), ids=BATCHES)
def test_equals_the_denoiser_in_fp32(form: str, images: int, groups: list[tuple[int, ...]]) -> None:
    denoiser = random_denoiser(FORMS[form], torch.float32)
    assert error(denoiser, "torch", images, *(features(*lengths) for lengths in groups)) <= FULL_ERROR


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("form", FORMS)
def test_cuda(form: str) -> None:
    denoiser = random_denoiser(FORMS[form], torch.bfloat16)
    assert error(denoiser, "cuda", 2, features(1), features(7)) <= HALF_ERROR


@pytest.mark.usefixtures("emulated_turing")
def test_cuda_in_fp16_on_turing() -> None:
    denoiser = random_denoiser(CONFIG, torch.float16)
    # fp16 keeps three bits more than bf16
    assert error(denoiser, "cuda", 2, features(4), features(7)) <= HALF_ERROR


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("form", ["sana-1.0", "sana-1.5"])
def test_triton(form: str) -> None:
    denoiser = random_denoiser(FORMS[form], torch.bfloat16)
    assert error(denoiser, "triton", 2, features(1), features(7)) <= HALF_ERROR


@pytest.mark.parametrize("keep", denoiser_targets(Denoiser(CONFIG))[:6])
def test_sub_layers_with_a_kept_layer(keep: str) -> None:
    denoiser = random_denoiser(CONFIG, torch.float32, keep=[keep])
    for groups in ((features(1), features(7)), (features(6), features(3))):
        assert error(denoiser, "torch", 2, *groups) <= FULL_ERROR


@pytest.mark.usefixtures("emulated")
def test_kept_layers_between_cuda_kernels() -> None:
    denoiser = random_denoiser(CONFIG, torch.bfloat16, keep=["blocks.0.out", "blocks.1.expand"])
    assert error(denoiser, "cuda", 2, features(1), features(7)) <= HALF_ERROR


@pytest.mark.parametrize("clamp", [False, True])
def test_the_clamp(clamp: bool) -> None:
    denoiser = random_denoiser(CONFIG, torch.float32)
    denoiser.clamp = clamp
    # what self-attention adds is far beyond the limit
    layer = denoiser.get_submodule("blocks.0.out")
    layer.weight_scale.mul_(1e8)
    assert error(denoiser, "torch", 1, features(5)) <= FULL_ERROR


@pytest.mark.usefixtures("emulated")
def test_static_scales_and_smoothing() -> None:
    names = denoiser_targets(Denoiser(CONFIG))
    scales = dict.fromkeys(names, 0.03)
    denoiser = random_denoiser(CONFIG, torch.bfloat16, input_scales=scales, static=True)
    denoiser.smoothing = torch.rand(2, 2, CONFIG.dim) + 0.5
    assert error(denoiser, "torch", 1, features(5)) <= HALF_ERROR
    assert error(denoiser, "cuda", 1, features(5)) <= HALF_ERROR


@pytest.mark.parametrize("guidance", [1.5, 4.5])
def test_guidance(guidance: float) -> None:
    denoiser = random_denoiser(CONFIG, torch.float32)
    context, step = denoiser.text_context([features(1), features(7)]), table(denoiser)
    latent = torch.randn(2, 8, HEIGHT, WIDTH)
    unguided, prompted = denoiser(torch.cat([latent, latent]), step, context).chunk(2)
    expected = unguided + guidance * (prompted - unguided)
    actual = fused_step(denoiser, "torch", latent, step, context, guidance)
    assert actual.shape == latent.shape and quant.relative_error(actual, expected) <= FULL_ERROR


def test_rows_with_times_of_their_own() -> None:
    denoiser = random_denoiser(CONFIG, torch.float32)
    context, step = denoiser.text_context([features(3, 7)]), denoiser.modulation(torch.tensor([900.0, 30.0]))
    latent = torch.randn(2, 8, HEIGHT, WIDTH)
    actual = fused_step(denoiser, "torch", latent, step, context)
    assert quant.relative_error(actual, denoiser(latent, step, context)) <= FULL_ERROR


def test_the_denoiser_is_left_as_it_was() -> None:
    denoiser = random_denoiser(CONFIG, torch.float32)
    before = copy.deepcopy(denoiser.state_dict())
    error(denoiser, "torch", 2, features(1), features(7))
    for name, tensor in denoiser.state_dict().items():
        assert torch.equal(tensor, before[name])


class Launches(TorchDispatchMode):
    """Counts torch's operations that would be launches on a GPU: not views, and not memory alone."""

    VIEWS = (
        "view",
        "slice",
        "select",
        "unbind",
        "unsqueeze",
        "alias",
        "as_strided",
        "detach",
        "split",
        "transpose",
        "empty",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("aten::") and not name.removeprefix("aten::").removeprefix("_").startswith(
            self.VIEWS
        ):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("form", "groups", "each"),
    [("sana-1.0", [(1,), (7,)], 9), ("sana-1.0", [(5,), (7,)], 9), ("sana-1.5", [(1,), (7,)], 11)],
)
def test_launches_of_a_step(emulated: Any, form: str, groups: list[tuple[int, ...]], each: int) -> None:
    denoiser = random_denoiser(FORMS[form], torch.bfloat16)
    fused, latent = FusedDenoiser(denoiser, "cuda"), torch.randn(1, 8, HEIGHT, WIDTH)
    step = Modulation(*(t.float() for t in (table(denoiser).blocks, table(denoiser).final)))
    text = fuse_text(denoiser.text_context([features(*lengths) for lengths in groups]), 2, CPU)
    space, guidance = fused.workspace(2, HEIGHT * WIDTH, CPU), torch.tensor(4.5)
    emulated.count()
    with Launches() as others, torch.inference_mode():
        fused.step(latent, step, text, guidance, None, space)
    assert others.names == []
    # 28 layers: 255; and what copies a step's inputs is not among them
    assert emulated.count()["launches"] == each * CONFIG.num_layers + 3


@pytest.mark.parametrize("groups", [[(1,), (7,)], [(5,), (7,)], [(3, 7, 5), (4,)]], ids=str)
def test_text_of_all_layers_is_packed_at_once(groups: list[tuple[int, ...]]) -> None:
    """The same tensors as of layers that are apart, in launches whose number no layer adds to."""
    counted = []
    for layers in (2, 5):
        denoiser = random_denoiser(replace(CONFIG, num_layers=layers), torch.float32)
        text = [features(*lengths) for lengths in groups]
        _, expected = fuse_text(denoiser.text_context(text), 6, CPU).pack()
        readers = [denoiser.get_submodule(f"blocks.{n}.cross_kv") for n in range(layers)]
        lay_together(readers, "cpu", torch.float32)  # type: ignore[arg-type]
        context = denoiser.text_context(text)
        with Launches() as found:
            _, packed = fuse_text(context, 6, CPU).pack()
        for ours, theirs in zip(packed, expected, strict=True):
            assert torch.equal(ours, theirs) and ours.is_contiguous()
        counted.append(found.names)
    assert counted[0] == counted[1]
    # of a prompt and a constant: zeros and values of both and of the constants, the length, and a stack
    if groups[0] == (1,):
        assert len(counted[0]) == 8


def test_text_of_all_lengths_has_one_shape() -> None:
    denoiser = random_denoiser(CONFIG, torch.float32)
    shapes = set()
    for lengths in ((2,), (7,), (300,)):
        structure, tensors = fuse_text(denoiser.text_context([features(*lengths)]), 1, CPU).pack()
        shapes.add((structure, *(tensor.shape for tensor in tensors)))
        again = FusedText.unpack(structure, tensors)
        assert again.keys is tensors[0] and again.constants is None and again.readers == (0, 1)
    assert len(shapes) == 1


def test_valid_tokens_come_first() -> None:
    denoiser = random_denoiser(CONFIG, torch.float32)
    context = denoiser.text_context([features(3, 7)])
    (group,) = context.layers[1]
    text = fuse_text(context, 2, CPU)
    assert isinstance(group, KeysValues) and group.mask is not None
    assert text.keys is not None and text.values_transposed is not None and text.lengths is not None
    assert text.keys.shape[3] == CAPACITY and text.lengths.tolist() == [3, 7]
    assert torch.equal(text.keys[1, 0, :, :3], group.keys[0, :, 4:])
    assert torch.equal(text.values_transposed[1, 1, :, :, :7], group.values[1].transpose(1, 2))
    assert not text.keys[:, 0, :, 3:].any() and not text.values_transposed[:, 0, :, :, 3:].any()


def test_texts_that_do_not_fit() -> None:
    denoiser = random_denoiser(CONFIG, torch.float32)
    with pytest.raises(InvalidInput, match="3 latents cannot be split evenly"):
        fuse_text(denoiser.text_context([features(1), features(7)]), 3, CPU)
    with pytest.raises(InvalidInput, match="others between them"):
        fuse_text(denoiser.text_context([features(5), features(1), features(7)]), 3, CPU)
