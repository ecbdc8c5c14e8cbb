"""What the fused operations of the GPU path compute, composed of `reference`.

Activations between operations are rounded to ``dtype`` where a docstring says so and nowhere else; everything
inside is fp32. ``static_scale``, () fp32, takes the place of the rows' own scales.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.kernels import reference


def quantize_rows(x: Tensor, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows`, or with one given scale: values (..., C) int8, scales (...,) fp32."""
    values, scales = reference.quantize_rows(x)
    if static_scale is None:
        return values, scales
    given = torch.where(scales.isfinite(), static_scale, torch.nan)
    return reference.quantize_tensor(x.float(), static_scale), given


def norm_modulate_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.norm_modulate` of x (B, N, C), not rounded, then `quantize_rows`."""
    return quantize_rows(reference.norm_modulate(x.float(), scale, shift, eps), static_scale)


def w8a8_linear(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    silu: bool = False,
    limit: float | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    constant: Tensor | None = None,
) -> Tensor:
    """`reference.w8a8_linear` with ``constant``, (out,) or (B, 1, out), added last, before rounding."""
    out = reference.w8a8_linear(
        values, scales, weight, weight_scales, bias, silu=silu, limit=limit, gate=gate, residual=residual
    )
    return (out if constant is None else out + constant.float()).to(dtype)


def w8a8_linear_quantize(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    limit: float | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    constant: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    static_scale: Tensor | None = None,
    plain: tuple[int, int] = (0, 0),
    plain_static_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`w8a8_linear`, whose rows then go to INT8: by `norm_modulate_quantize`, or as they are.

    Args:
        scale, shift, eps, static_scale: as of `norm_modulate_quantize`; all rows are left as they are where
            the first two are None.
        plain: first and end of the images whose rows are left as they are.
        plain_static_scale: of these rows.

    Returns:
        The product (..., out) in ``dtype``; values (..., out) int8 and scales (...,) fp32 of its rows.
    """
    product = {"limit": limit, "gate": gate, "residual": residual, "constant": constant}
    out = w8a8_linear(values, scales, weight, weight_scales, bias, dtype, **product)  # type: ignore[arg-type]
    as_it_is = quantize_rows(out, plain_static_scale)
    if scale is None or shift is None:
        return out, *as_it_is
    normed = norm_modulate_quantize(out, scale, shift, eps, static_scale)
    for rows, others in zip(normed, as_it_is, strict=True):
        rows[slice(*plain)] = others[slice(*plain)]
    return out, *normed


def linear_attention_state(k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Sums of ReLU linear attention of (B, N, C) k, v: (B, heads, d + 1, d) fp32.

    Row i of the first d is sum_n ReLU(k_ni) v_n, the last is sum_n ReLU(k_n).
    """
    k32, v32 = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (k.relu(), v))
    return torch.cat([k32.transpose(2, 3) @ v32, k32.sum(2, keepdim=True)], dim=2)


def qkv_linear_attention(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """q, k and v of INT8 tokens (B, N, in) by one weight (3 C, in), rounded to ``dtype``.

    Returns:
        ReLU(q) (B, N, C) in ``dtype``, and the `linear_attention_state` of k and v.
    """
    q, k, v = reference.w8a8_linear(values, scales, weight, weight_scales, bias, dtype).chunk(3, dim=-1)
    return q.relu(), linear_attention_state(k, v, heads)


def qk_norm_linear_attention(
    qkv: Tensor, norm_k: Tensor, heads: int, norm_eps: float
) -> tuple[Tensor, Tensor]:
    """For models that RMS-normalise q and k over all heads: qkv (B, N, 3 C), norm_k (C,) fp32.

    Returns:
        roots (B, N, 2) fp32, 1 / sqrt(mean(q²) + norm_eps) and that of k; and the `linear_attention_state` of
        k · root · norm_k, not rounded, and v.
    """
    q, k, v = qkv.float().chunk(3, dim=-1)
    roots = torch.stack([torch.rsqrt(t.square().mean(-1) + norm_eps) for t in (q, k)], dim=-1)
    return roots, linear_attention_state(k * roots[..., 1:] * norm_k.float(), v, heads)


def linear_attention_finish(
    q: Tensor,
    state: Tensor,
    eps: float,
    roots: Tensor | None = None,
    norm_q: Tensor | None = None,
    static_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q (B, N, C) from a `linear_attention_state`, rounded to q's dtype, then `quantize_rows`.

    ReLU is applied to q; with ``roots`` (B, N, 2) and ``norm_q`` (C,) to q · roots[..., 0] · norm_q.
    """
    q32 = q.float()
    if roots is not None and norm_q is not None:
        q32 = q32 * roots[..., :1] * norm_q.float()
    heads = q32.relu().unflatten(-1, (state.shape[1], -1)).transpose(1, 2)
    read = (heads @ state[:, :, :-1]) / (heads @ state[:, :, -1:].transpose(2, 3) + eps)
    return quantize_rows(read.transpose(1, 2).flatten(2).to(q.dtype), static_scale)


def cross_attention_quantize(
    q: Tensor,
    keys: Tensor,
    values_transposed: Tensor,
    lengths: Tensor,
    norm_q: Tensor | None = None,
    norm_eps: float = 1e-5,
    static_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention on the first keys of each prompt, rounded to q's dtype, then `quantize_rows`.

    Args:
        q: (R, T, C), of all images of a prompt; with ``norm_q`` (C,) RMS-normalised over C, not rounded.
        keys: (R, heads, capacity, d).
        values_transposed: (R, heads, d, capacity).
        lengths: (R,) int32, how many keys count, at least 1.
    """
    q32 = q.float() if norm_q is None else reference.rms_norm(q.float(), norm_q, norm_eps)
    heads = q32.unflatten(-1, (keys.shape[1], -1)).transpose(1, 2)
    slots = torch.arange(keys.shape[2], device=q.device)
    mask = (slots < lengths[:, None])[:, None, None]
    read = reference.cross_attention(heads, keys, values_transposed.transpose(2, 3), mask)
    return quantize_rows(read.transpose(1, 2).flatten(2).to(q.dtype), static_scale)


def dwconv_glu_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    static_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The middle of the Mix-FFN after its SiLU, rounded to x's dtype, then `quantize_rows`.

    Args:
        x: (B, height · width, 2h), SiLU applied: value channels, then gates.
        weight: (3, 3, 2h), one kernel per channel, on CUDA in x's dtype; the image is padded with zeros.
        bias: (2h,).
    """
    image = x.float().transpose(1, 2).unflatten(2, (height, width))
    kernels = weight.float().permute(2, 0, 1).unsqueeze(1)
    mixed = F.conv2d(image, kernels, bias.float(), padding=1, groups=image.shape[1])
    value, gate = mixed.flatten(2).transpose(1, 2).chunk(2, dim=-1)
    return quantize_rows((value * F.silu(gate)).to(x.dtype), static_scale)


def patch_embed(
    latent: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor | None,
    copies: int,
    dtype: torch.dtype,
) -> Tensor:
    """Cells of a latent (B, channels, H, W) to tokens (copies · B, H · W, C): all images, ``copies`` times.

    Args:
        weight: (channels, C) fp32; the latent is rounded to ``dtype`` before it.
        bias: (C,).
        positions: (H · W, C) fp32, added, or None.
    """
    cells = latent.to(dtype).float().flatten(2).transpose(1, 2)
    tokens = cells @ weight + bias
    tokens = tokens if positions is None else tokens + positions
    return tokens.to(dtype).repeat(copies, 1, 1)


def sampler_step(
    x: Tensor, velocity: Tensor, before: Tensor, noise: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """`sana_edge.sampler.Sampler.step` of latents (B, channels, H, W) fp32, each product and sum rounded.

    Args:
        before: the clean latent of the step before, read where its coefficient is not 0.
        noise: also.
        coefficients: (7,) fp32, a row of `sana_edge.sampler.Sampler.table`.

    Returns:
        The latent after the step, and the clean one, at the scale of x.
    """
    _, predict_x, predict_output, carry, clean, previous, noised = coefficients
    x0 = predict_x * x + predict_output * velocity
    result = carry * x + clean * x0
    for factor, tensor in ((previous, before), (noised, noise)):
        result = torch.where(factor != 0, result + factor * tensor, result)
    return result, x0


def velocity_head(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    guidance: Tensor | None,
    size: tuple[int, int],
) -> Tensor:
    """The denoiser's last layer of tokens (B, N, C), (B, channels, H, W) fp32, nothing rounded in between.

    With ``guidance``, () fp32, x has the unguided images, then the prompted ones: u + guidance · (c - u).

    Args:
        scale, shift: as `reference.norm_modulate` takes them.
        weight: (channels, C) fp32.
        bias: (channels,).
    """
    velocity = reference.norm_modulate(x.float(), scale, shift, eps) @ weight.T + bias
    if guidance is not None:
        unguided, prompted = velocity.chunk(2)
        velocity = unguided + guidance * (prompted - unguided)
    out: Tensor = velocity.transpose(1, 2).unflatten(2, size)
    return out
