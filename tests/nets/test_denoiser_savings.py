"""The denoiser's exact savings change nothing, and training works through the same class."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sana_edge.config import DenoiserConfig
from sana_edge.errors import InvalidInput
from sana_edge.nets.block import Constant, KeysValues
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.text_encoder import TextFeatures

CONFIG = DenoiserConfig(
    in_channels=8,
    out_channels=8,
    num_layers=3,
    num_attention_heads=4,
    attention_head_dim=16,
    num_cross_attention_heads=2,
    cross_attention_head_dim=32,
    cross_attention_dim=64,
    caption_channels=40,
    sample_size=8,
    qk_norm="rms_norm_across_heads",
)


@pytest.fixture
def denoiser() -> Denoiser:
    """Every parameter random, norms around 1."""
    torch.manual_seed(0)
    model = Denoiser(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15).add_(1.0 if "norm" in name else 0.0)
    return model


def features(rows: int, length: int) -> TextFeatures:
    return TextFeatures(torch.randn(rows, length, 40), torch.ones(rows, length, dtype=torch.bool))


@torch.no_grad()
def run(denoiser: Denoiser, latent: Tensor, *groups: TextFeatures, time: float = 400.0) -> Tensor:
    step = denoiser.modulation(torch.tensor([time]))[0]
    velocity: Tensor = denoiser(latent, step, denoiser.text_context(groups))
    return velocity


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_text_is_read_once_for_all_steps(denoiser: Denoiser) -> None:
    text, latent = features(1, 5), torch.randn(1, 8, 5, 7)
    with torch.no_grad():
        context, tables = denoiser.text_context([text]), denoiser.modulation(torch.tensor([900.0, 20.0]))
        first, second = (denoiser(latent, tables[index], context) for index in range(2))
        same(first, run(denoiser, latent, text, time=900.0))
        same(second, run(denoiser, latent, text, time=20.0))
        # no step has written to the latent, the context or the tables
        assert torch.equal(denoiser(latent, tables[0], context), first)


def test_padding_is_dropped_whatever_it_holds(denoiser: Denoiser) -> None:
    text, latent = features(1, 6), torch.randn(2, 8, 4, 9)
    padded = TextFeatures(
        torch.cat([torch.full((1, 2, 40), 1e4), text.embeddings, torch.full((1, 290, 40), -1e4)], dim=1),
        (torch.arange(298) >= 2)[None] & (torch.arange(298) < 8)[None],
    )
    assert torch.equal(run(denoiser, latent, padded), run(denoiser, latent, text))
    entry = denoiser.text_context([padded]).layers[0][0]
    assert isinstance(entry, KeysValues) and entry.keys.shape[2] == 6 and entry.mask is None


def test_prompts_of_different_lengths_share_one_mask(denoiser: Denoiser) -> None:
    long, short, latent = features(1, 6), features(1, 3), torch.randn(2, 8, 4, 9)
    embeddings = torch.randn(2, 40, 40)
    embeddings[0, :6], embeddings[1, :3] = long.embeddings[0], short.embeddings[0]
    both = TextFeatures(embeddings, torch.arange(40) < torch.tensor([[6], [3]]))
    entry = denoiser.text_context([both]).layers[0][0]
    assert isinstance(entry, KeysValues) and entry.keys.shape[2] == 6 and entry.mask is not None
    same(run(denoiser, latent, both), run(denoiser, latent, long, short))


def test_the_tables_of_a_schedule_are_those_of_its_steps(denoiser: Denoiser) -> None:
    times = torch.tensor([999, 500, 1])
    with torch.no_grad():
        tables = denoiser.modulation(times)
        assert tables.blocks.shape == (3, 3, 6, 64) and tables.final.shape == (3, 2, 64)
        for index in range(3):
            alone = denoiser.modulation(times[index : index + 1])[0]
            same(tables[index].blocks, alone.blocks)
            same(tables[index].final, alone.final)


def test_rows_may_have_timesteps_of_their_own(denoiser: Denoiser) -> None:
    texts, latent = [features(1, 4), features(1, 7)], torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        rows = denoiser.modulation(torch.tensor([800.0, 30.0]))
        together = denoiser(latent, rows, denoiser.text_context(texts))
    same(together[:1], run(denoiser, latent[:1], texts[0], time=800.0))
    same(together[1:], run(denoiser, latent[1:], texts[1], time=30.0))


def test_a_single_token_is_folded_to_a_constant(denoiser: Denoiser) -> None:
    """Said twice, a token is read by softmax attention, with the same result."""
    token, prompt, latent = features(1, 1), features(1, 5), torch.randn(4, 8, 5, 6)
    twice = TextFeatures(token.embeddings.repeat(1, 2, 1), torch.ones(1, 2, dtype=torch.bool))
    assert isinstance(denoiser.text_context([token]).layers[0][0], Constant)
    assert isinstance(denoiser.text_context([twice]).layers[0][0], KeysValues)
    same(run(denoiser, latent, token, prompt), run(denoiser, latent, twice, prompt))


@pytest.mark.parametrize("negatives", [1, 2])
def test_one_prompt_serves_consecutive_images(denoiser: Denoiser, negatives: int) -> None:
    """Four negative images, then four of two prompts; each as if it had been made alone."""
    groups, latent = [features(negatives, 1), features(2, 5)], torch.randn(8, 8, 4, 4)
    together = run(denoiser, latent, *groups)
    for row in range(8):
        group = groups[row // 4]
        prompt = (row % 4) * len(group.mask) // 4
        alone = TextFeatures(group.embeddings[prompt : prompt + 1], group.mask[prompt : prompt + 1])
        same(together[row : row + 1], run(denoiser, latent[row : row + 1], alone))


@pytest.mark.parametrize(("batch", "rows"), [(3, (1, 1)), (2, (1, 2)), (5, (2,))])
def test_a_batch_that_cannot_be_split_is_refused(
    denoiser: Denoiser, batch: int, rows: tuple[int, ...]
) -> None:
    with pytest.raises(InvalidInput, match=f"{batch} latents"):
        run(denoiser, torch.randn(batch, 8, 4, 4), *(features(count, 3) for count in rows))


def test_a_prompt_without_tokens_is_refused(denoiser: Denoiser) -> None:
    empty = TextFeatures(torch.randn(2, 3, 40), torch.tensor([[True, True, False], [False, False, False]]))
    with pytest.raises(InvalidInput, match="no valid token"):
        denoiser.text_context([empty])


def test_guidance_is_given_where_it_is_embedded_and_only_there(denoiser: Denoiser) -> None:
    with pytest.raises(InvalidInput, match=r"guidance is 4\.5"):
        denoiser.modulation(torch.tensor([1]), 4.5)
    sprint = Denoiser(DenoiserConfig.from_dict(CONFIG.to_dict() | {"guidance_embeds": True}))
    with pytest.raises(InvalidInput, match="none was given"):
        sprint.modulation(torch.tensor([1.0]))


def loss(denoiser: Denoiser, autocast: bool) -> Tensor:
    """A training step's: every row has its own timestep and prompt, one of them a single token."""
    torch.manual_seed(1)
    latent, target = torch.randn(2, 4, 8, 5, 6, dtype=denoiser.patch.weight.dtype)
    text = TextFeatures(torch.randn(4, 7, 40), torch.arange(7) < torch.tensor([[7], [1], [3], [5]]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tables = denoiser.modulation(1000 * torch.rand(4))
        velocity = denoiser(latent, tables, denoiser.text_context([text]))
    assert velocity.dtype == latent.dtype
    return (velocity - target).square().mean()


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_every_parameter_is_trained(denoiser: Denoiser, autocast: bool) -> None:
    value = loss(denoiser, autocast)
    value.backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    # what is trained is what runs: the paths without gradients give the same loss
    with torch.no_grad():
        torch.testing.assert_close(loss(denoiser, autocast), value, rtol=1e-2 if autocast else 1e-5, atol=0)


def test_gradients_are_the_slopes_of_the_loss(denoiser: Denoiser) -> None:
    """Along a random direction, against a central difference in fp64."""
    denoiser.double()
    loss(denoiser, False).backward()
    direction = [torch.randn_like(parameter) for parameter in denoiser.parameters()]
    slope = sum(
        float((parameter.grad * change).sum())
        for parameter, change in zip(denoiser.parameters(), direction, strict=True)
        if parameter.grad is not None
    )

    def shifted(amount: float) -> float:
        with torch.no_grad():
            for parameter, change in zip(denoiser.parameters(), direction, strict=True):
                parameter.add_(change, alpha=amount)
            value = float(loss(denoiser, False))
            for parameter, change in zip(denoiser.parameters(), direction, strict=True):
                parameter.sub_(change, alpha=amount)
        return value

    assert (shifted(1e-4) - shifted(-1e-4)) / 2e-4 == pytest.approx(slope, rel=1e-3)
