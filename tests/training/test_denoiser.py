"""The denoiser in training computes what the runtime's does, and its gradients do not depend on how."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sana_edge.config import DenoiserConfig
from sana_edge.int8 import ops
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.training import flow
from sana_edge.training.initial import initialise
from sana_edge.training.trained_denoiser import TrainedDenoiser

CONFIG = {
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 24,
    "cross_attention_dim": 48,
    "caption_channels": 20,
    "in_channels": 6,
    "out_channels": 6,
    "sample_size": 4,
}
VARIANTS = [{}, {"interpolation_scale": 2.0}, {"qk_norm": "rms_norm_across_heads"}]


def random_model(checkpointing: bool = False, **changes: object) -> TrainedDenoiser:
    model = TrainedDenoiser(DenoiserConfig.from_dict({**CONFIG, **changes}), checkpointing=checkpointing)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs() -> tuple[Tensor, Tensor, TextFeatures]:
    torch.manual_seed(2)
    mask = torch.tensor([[True] * 5, [True] + [False] * 4, [True] * 3 + [False] * 2])
    features = TextFeatures(torch.randn(3, 5, 20) * mask[..., None], mask)
    return torch.randn(3, 6, 3, 5), torch.tensor([3.0, 500.5, 990.0]), features


def gradients(model: TrainedDenoiser, rows: int = 3) -> dict[str, Tensor]:
    latent, timesteps, features = inputs()
    latent, timesteps = latent[:rows], timesteps[:rows]
    features = TextFeatures(features.embeddings[:rows], features.mask[:rows])
    flow.loss(model(latent, timesteps, features), torch.ones_like(latent)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


# float32 relative L2 of 1e-5: about a hundred roundings of 2^-24 added up, as in CONTRIBUTING
def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * b.norm() + 1e-12)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_training_predicts_what_the_runtime_does(changes: dict[str, object]) -> None:
    model = random_model(**changes)
    runtime = Denoiser(model.config)
    runtime.load_state_dict(model.state_dict())
    latent, timesteps, features = inputs()
    with torch.no_grad():
        context = runtime.text_context([features])
        expected = runtime(latent, runtime.modulation(timesteps), context)
        assert near(model(latent, timesteps, features), expected)


def test_checkpointing_changes_no_gradient() -> None:
    plain, again = gradients(random_model()), gradients(random_model(checkpointing=True))
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_captions_of_one_token_leave_no_parameter_without_a_gradient() -> None:
    model = random_model()
    latent, timesteps, features = inputs()
    alone = TextFeatures(features.embeddings[:, :1], features.mask[:, :1])
    flow.loss(model(latent, timesteps, alone), latent).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    runtime = Denoiser(model.config)
    runtime.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = runtime(latent, runtime.modulation(timesteps), runtime.text_context([alone]))
        assert near(model(latent, timesteps, alone), expected)


def test_triton_gives_the_same_gradients(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from sana_edge.kernels.triton import linear_attention, mix_ffn

    called = set()
    for module, name in ((linear_attention, "relu_linear_attention"), (mix_ffn, "glu_depthwise")):
        inner = getattr(module, name)

        def counted(*args: object, _inner: object = inner, _name: str = name) -> Tensor:
            called.add(_name)
            return _inner(*args)  # type: ignore[operator,no-any-return]

        monkeypatch.setattr(module, name, counted)
    expected = gradients(random_model(num_layers=1), 1)
    assert not called
    monkeypatch.setattr(ops, "_triton_trains", lambda device: True)
    found = gradients(random_model(num_layers=1), 1)
    assert called == {"relu_linear_attention", "glu_depthwise"}
    wrong = [name for name in expected if not near(found[name], expected[name])]
    assert not wrong


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_training_step_on_cuda_is_that_of_the_cpu() -> None:
    expected, model = gradients(random_model()), random_model().cuda()
    latent, timesteps, features = inputs()
    there = TextFeatures(features.embeddings.cuda(), features.mask.cuda())
    flow.loss(model(latent.cuda(), timesteps.cuda(), there), torch.ones_like(latent).cuda()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and near(parameter.grad.cpu(), expected[name]), name


def test_a_new_model_predicts_nothing_and_starts_its_caption_norm_small() -> None:
    model = TrainedDenoiser(DenoiserConfig.from_dict(CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    initialise(model, seed=3, caption_norm=0.01)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model(*inputs()).abs().max() == 0
    assert model.caption_norm.eq(0.01).all()
    other = TrainedDenoiser(DenoiserConfig.from_dict(CONFIG))
    initialise(other, seed=3, caption_norm=0.01)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_noise_is_of_the_row_and_sigma_logit_normal_and_shifted() -> None:
    clean = torch.zeros(2000, 1, 1, 1)
    rows = [torch.Generator().manual_seed(seed) for seed in range(2000)]
    batch = flow.noised(clean, rows, 3.0)
    sigma = batch.timesteps / 1000
    # x_t = sigma noise and target = noise where x_0 = 0
    assert torch.allclose(batch.x_t.flatten(), sigma * batch.target.flatten())
    # the median of sigmoid(N(0, 1)) is 0.5, which a shift of 3 moves to 0.75; the standard error of a median
    # of n draws is 1 / (2 f sqrt(n)), here with density f = 1 / (0.4 · dsigma/dz), dsigma/dz = 0.1875: 0.0053
    assert abs(float(sigma.median()) - 0.75) < 4 * 0.0053
    alone = flow.noised(clean[7:8], [torch.Generator().manual_seed(7)], 3.0)
    assert torch.equal(alone.x_t, batch.x_t[7:8])


def test_the_loss_is_zero_for_the_velocity_itself() -> None:
    clean = torch.randn(2, 3, 4, 4)
    batch = flow.noised(clean, [torch.Generator().manual_seed(seed) for seed in (0, 1)], 1.0)
    sigma = (batch.timesteps / 1000)[:, None, None, None]
    assert torch.allclose(batch.x_t - sigma * batch.target, clean, atol=1e-6)
    assert flow.loss(batch.target, batch.target) == 0
