"""The encoder's graph in onnxruntime against the torch encoder, and pictures that start from a picture."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")

from sana_edge import InvalidInput, Sana  # noqa: E402
from sana_edge.config import AutoencoderConfig  # noqa: E402
from sana_edge.export.graph.builder import GraphBuilder  # noqa: E402
from sana_edge.export.graph.encoder import add_encoder  # noqa: E402
from sana_edge.export.graph.external_data import ExternalData  # noqa: E402
from sana_edge.nets.autoencoder import Encoder  # noqa: E402
from sana_edge.nets.quantize import quantize_encoder  # noqa: E402
from sana_edge.store import hub  # noqa: E402
from sana_edge.store.known_models import BUNDLED  # noqa: E402
from sana_edge.torch_runtime.load import load_encoder  # noqa: E402

GRAPHS = "sana-tiny-int8-onnx"
RES, VIT = "ResBlock", "EfficientViTBlock"
PROMPT = "a red house left of a yellow star"
STRIDED = AutoencoderConfig(
    encoder_block_types=(RES, RES, VIT),
    encoder_block_out_channels=(8, 16, 16),
    encoder_layers_per_block=(1, 2, 1),
    encoder_qkv_multiscales=((), (), (5,)),
    decoder_block_types=(RES, RES, VIT),
    decoder_block_out_channels=(8, 16, 16),
    decoder_layers_per_block=(1, 1, 1),
    decoder_qkv_multiscales=((), (), (5,)),
    decoder_norm_types=("rms_norm",) * 3,
    decoder_act_fns=("silu",) * 3,
    downsample_block_type="Conv",
    latent_channels=8,
    attention_head_dim=8,
    scaling_factor=0.41407,
)
UNSHUFFLED = replace(STRIDED, downsample_block_type="pixel_unshuffle", encoder_layers_per_block=(0, 1, 1))
PLAIN = replace(STRIDED, encoder_out_shortcut=False)


@pytest.mark.parametrize("config", [STRIDED, UNSHUFFLED, PLAIN], ids=["strided", "unshuffled", "plain"])
@pytest.mark.parametrize("size", [(4, 4), (24, 40)])
def test_equals_the_module(config: AutoencoderConfig, size: tuple[int, int], tmp_path: Path) -> None:
    encoder = Encoder(config).requires_grad_(False).eval()
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    pixels = torch.randn(1, 3, *size).clamp(-1, 1)
    expected = encoder(pixels.clone().contiguous(memory_format=torch.channels_last)) * config.scaling_factor
    with ExternalData(tmp_path / "encoder.data") as data:
        graph = GraphBuilder("encoder", data, "fp32")
        add_encoder(graph, encoder, config.scaling_factor)
        graph.save(tmp_path / "encoder.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixels": pixels.numpy()})
    # fp32 in another order of sums: 1e-5 of the largest value holds for a module (CONTRIBUTING.md)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_an_int8_encoder_is_near_the_float_one() -> None:
    """8 bits err by 1/127/sqrt(12) of the largest value in each of 8 products: some -30 dB of all."""
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    exact = load_encoder(hub.resolve("sana-tiny"), **options)
    pixels = torch.randn(1, 3, 64, 96).clamp(-1, 1)
    right = exact(pixels.clone())
    for encoder in (
        load_encoder(hub.resolve("sana-tiny", int8=True), **options),
        load_encoder(hub.resolve("sana-tiny"), int8=True, **options),
    ):
        error = (encoder(pixels.clone()) - right).square().mean() / right.square().mean()
        assert 1e-5 < float(error) < 1e-2
    quantize_encoder(exact)
    assert not any(type(layer) is torch.nn.Linear for layer in exact.modules())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_image_to_image_of_the_bundled_graphs(backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
    photo = np.zeros((96, 64, 3), np.uint8)
    photo[:, 32:] = (200, 60, 40)
    mask = np.zeros((96, 64), np.uint8)
    mask[64:] = 255
    options = {"image": photo, "mask": mask, "strength": 0.5, "steps": 4, "seed": 3, "exact_size": True}
    with Sana.load(GRAPHS, backend=backend, device="cpu") as sana:
        found = sana.generate(PROMPT, **options).pixels
    with Sana.load("sana-tiny", int8=True, device="cpu", backend="torch") as sana:
        expected = sana.generate(PROMPT, **options).pixels
    assert np.array_equal(found[:64], photo[:64])
    # as far as INT8 graphs are from torch: see sana_edge/export/verify/agreement.py
    error = np.square(found[64:].astype(float) - expected[64:]).mean()
    assert 10 * np.log10(255**2 / error) > 25


def test_a_folder_without_encoder_says_how_to_make_one(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED / "sana-tiny-int8-onnx", tmp_path / "onnx")
    path = tmp_path / "onnx/manifest.json"
    data = json.loads(path.read_text())
    del data["graphs"]["encoder"]
    path.write_text(json.dumps(data))
    with (
        Sana.load(tmp_path / "onnx", backend="onnxruntime", device="cpu") as sana,
        pytest.raises(InvalidInput, match="was exported without an encoder") as caught,
    ):
        sana.generate(PROMPT, image=np.zeros((64, 64, 3), np.uint8))
    assert "export sana-tiny" in str(caught.value.hint) and "--encoder" in str(caught.value.hint)
