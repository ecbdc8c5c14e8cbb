from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model
from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

from sana_edge.calib.package_component import write_config, write_weights
from sana_edge.errors import CheckpointError, InvalidInput, SanaError
from sana_edge.int8 import quant, text_linear
from sana_edge.int8.text_linear import WeightOnlyLinear, multiply_dequantized, multiply_digits, split_digits
from sana_edge.kernels.reference import w8a8_linear
from sana_edge.nets import text_weights
from sana_edge.nets.text_encoder import TextEncoder
from sana_edge.nets.text_weights import MappedEmbedding, load_text_model, quantize_text_state, text_targets
from sana_edge.prompt import CHI
from sana_edge.store.known_models import BUNDLED
from sana_edge.store.package import Quantization
from sana_edge.store.weights import load_state
from sana_edge.training.train_text_encoder import captions

PROMPTS = ("a red house left of a yellow star", "", "two blue fish above a green tree, " * 20)

# half of the low digit's step of absmax / (127 * 254); the fp32 reciprocal, product and difference before it
# are off by less than a hundredth of that
DIGITS = 1.01 / (2 * 127 * 254)
BF16 = 2.0**-8


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A float model to change, its weights large and uneven enough for rounding to show."""
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(tiny_folder / part, tmp_path / "float" / part)
    return tmp_path / "float"


@pytest.fixture
def no_vnni(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU on which torch multiplies INT8 one number at a time."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    text_linear.choose_product.cache_clear()
    yield
    text_linear.choose_product.cache_clear()


def load(folder: Path, dtype: torch.dtype = torch.float32, *, int8: bool = True) -> TextEncoder:
    return TextEncoder.load(folder, dtype=dtype, device="cpu", int8=int8)


def make_package(folder: Path, **options: Any) -> Path:
    """The INT8 package of a float folder, beside it."""
    target = folder.with_name("package")
    shutil.copytree(folder / "tokenizer", target / "tokenizer")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    state = dict(quantize_text_state(folder / "text_encoder", **options))
    quantization = Quantization("token", kept=tuple(options.get("keep", ())))
    write_weights(target / "text_encoder", state.items())
    write_config(target / "text_encoder", config, quantization)
    return target


def activations(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """With an outlier channel, a row of zeros, a tiny row and one that is too small to have a scale."""
    x = torch.randn(rows, width)
    x[:, 3] *= 100
    x[0] *= 0
    x[1 % rows] *= 1e-30
    x[2 % rows] *= 1e-38
    return x.to(dtype)


def scaled(absmax: Tensor) -> Tensor:
    """Whether rows have a scale; smaller ones become 0."""
    return absmax >= 127 * 2.0**-126


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_two_digits_hold_an_activation(rows: int) -> None:
    x = activations(rows, 37, torch.float32)
    digits, steps = split_digits(x)
    high, low = digits.double().chunk(2)
    assert digits.dtype == torch.int8 and digits.shape == (2 * rows, 37)
    assert digits.min() >= -127
    error = (steps.double() * (254 * high + low) - x.double()).abs()
    absmax = x.abs().amax(1, keepdim=True).double()
    assert (error <= torch.where(scaled(absmax), DIGITS * absmax, absmax)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_both_products_equal_the_dequantized_weight(rows: int, dtype: torch.dtype) -> None:
    x = activations(rows, 36, dtype)
    weight = torch.randn(21, 36)
    weight[5] = 0
    values, scales = quant.quantize_weight(weight)
    exact = values.double() * scales.double()[:, None]
    expected, sizes = x.double() @ exact.T, x.double().abs() @ exact.abs().T
    unit = BF16 if dtype == torch.bfloat16 else 2.0**-24
    # sums as float, times step, times scale: each rounds once, 2^-24 of no more than `sizes`; then the result
    rounding = (8 * 2.0**-24 + unit) * sizes + 1e-37
    absmax = x.double().abs().amax(1, keepdim=True)
    digits = multiply_digits(x, values, scales)
    bound = 1.01 * DIGITS * absmax * exact.abs().sum(1) + rounding
    assert ((digits.double() - expected).abs() <= torch.where(scaled(absmax), bound, sizes)).all()
    # weights and result are rounded to the dtype; sums of 36 products in fp32
    product = multiply_dequantized(x, values, scales)
    assert ((product.double() - expected).abs() <= (2 * unit + 36 * 2.0**-24) * sizes + 1e-37).all()
    assert digits.dtype == product.dtype == dtype
    assert not digits[:, 5].any() and not product[:, 5].any()


def test_a_layer_has_bias_batches_and_keeps_its_dtypes() -> None:
    weight, bias, x = torch.randn(21, 36), torch.randn(21), torch.randn(2, 3, 36)
    values, scales = quant.quantize_weight(weight)
    layer = WeightOnlyLinear(values, scales, bias)
    expected = x @ (values * scales[:, None]).T + bias
    assert quant.relative_error(layer(x), expected) < 1e-4
    unpacked = multiply_dequantized(x[0], values, scales, bias)
    assert quant.relative_error(unpacked, expected[0]) < 36 * 2.0**-24
    half = layer.to(torch.bfloat16)
    assert half.weight_scale.dtype == torch.float32 and half.weight.dtype == torch.int8
    out = half(x.bfloat16())
    assert out.dtype == torch.bfloat16 and out.shape == (2, 3, 21)
    # the input's, the output's and their products' rounding
    assert quant.relative_error(out.float(), expected) < 2 * BF16


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_show(bad: float) -> None:
    x = torch.randn(4, 36)
    x[2, 5] = bad
    values, scales = quant.quantize_weight(torch.randn(21, 36))
    out = multiply_digits(x, values, scales)
    assert not out[2].isfinite().any() and out[[0, 1, 3]].isfinite().all()


def test_pieces_of_rows_are_quantized_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 36)
    monkeypatch.setattr(text_linear, "_PIECE_BYTES", 7 * 4 * 36)
    for part, whole in zip(
        text_linear.quantize_weight(weight, "x"), quant.quantize_weight(weight), strict=True
    ):
        assert torch.equal(part, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gathered_row_is_the_tables(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    table = torch.randn(50, 33).to(stored)
    save_file({"table": table}, tmp_path / "model.safetensors")
    mapped = MappedEmbedding(load_state(tmp_path)["table"], dtype=dtype)
    embedding = Gemma2TextScaledWordEmbedding(50, 33, 0, embed_scale=33**0.5)
    embedding.weight = nn.Parameter(table.to(dtype), requires_grad=False)
    ids = torch.tensor([[0, 49, 7], [7, 7, 1]])
    assert torch.equal(mapped(ids), embedding(ids))
    assert mapped(ids).dtype == dtype and not mapped.state_dict()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs the resident size of the process")
@pytest.mark.parametrize("int8", [False, True])
def test_only_the_rows_of_a_prompt_are_read(tmp_path: Path, int8: bool) -> None:
    config = Gemma2Config(
        hidden_size=2304, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, vocab_size=256_000,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Gemma2Model(config).state_dict().items()}
    write_sparse(tmp_path / "model.safetensors", shapes)
    before = resident_bytes()
    model = load_text_model(tmp_path, dtype=torch.bfloat16, device="cpu", int8=int8)
    ids = torch.arange(0, 256_000, 1000)[None]
    assert not model.embed_tokens(ids).any()
    # 256 rows touch at most 64 KiB each of a table of 1.2 GB
    assert resident_bytes() - before < 100e6


def write_sparse(path: Path, shapes: Mapping[str, torch.Size]) -> None:
    """A file of bf16 zeros that take no place on the disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        entries[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [end, end := end + 2 * shape.numel()],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_every_projection_is_int8_and_features_stay(folder: Path) -> None:
    encoder, reference = load(folder), load(folder, int8=False)
    layers = {n: m for n, m in encoder._model.named_modules() if isinstance(m, WeightOnlyLinear)}
    assert list(layers) == text_targets(2) and len(layers) == 14
    assert not any(isinstance(module, nn.Linear) for module in encoder._model.modules())
    assert not any(tensor.is_meta for tensor in encoder._model.state_dict().values())
    ours, theirs = encoder.encode(PROMPTS), reference.encode(PROMPTS)
    assert torch.equal(ours.mask, theirs.mask)
    # a product is off by absmax / (127 * sqrt(12) * rms) of it, 0.6 % for rows of 32 to 64 normal weights; 14
    # of them in quadrature are 2.2 %, and attention scores of this model pass theirs on up to twice as large
    error = quant.relative_error(ours.embeddings, theirs.embeddings)
    assert 1e-4 < error < 2 * 0.022


@pytest.mark.usefixtures("no_vnni")
def test_a_cpu_without_int8_instructions_gives_the_same_features(folder: Path) -> None:
    product = text_linear.choose_product("cpu")
    assert product.name == "dequantized" and "VNNI" in product.reason
    features = load(folder).encode(PROMPTS).embeddings
    text_linear.choose_product.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
        digits = load(folder).encode(PROMPTS).embeddings
    # as above, of activations with absmax / (64516 * sqrt(3) * rms), at most sqrt(64) for a row of 64: 7e-5
    assert quant.relative_error(digits, features) < 2 * 14**0.5 * 7e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kept_instruction_changes_nothing(folder: Path, dtype: torch.dtype) -> None:
    encoder = load(folder, dtype)
    assert encoder.encode(PROMPTS).embeddings.dtype == dtype
    for prompt in PROMPTS:
        (row,) = encoder._tokenize([prompt], CHI, truncation=True)
        with torch.no_grad():
            whole = encoder._hidden_states([row], None)
            behind = encoder._hidden_states([row], encoder._prefix("\n".join(CHI)))
        # fp32 sums in another order may tip a low digit: one in 300 of them, by 1 / 32258 of absmax
        bound = 1e-5 if dtype == torch.float32 else 4 * BF16
        assert quant.relative_error(behind, whole) < bound


def test_rows_do_not_depend_on_the_batch(folder: Path) -> None:
    encoder = load(folder)
    together, alone = encoder.encode(PROMPTS).embeddings[:1], encoder.encode(PROMPTS[:1]).embeddings
    assert quant.relative_error(together[:, : alone.shape[1]], alone) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_package_is_what_loading_makes(folder: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    model = Gemma2Model.from_pretrained(folder / "text_encoder").to(stored)
    shutil.rmtree(folder / "text_encoder")
    model.save_pretrained(folder / "text_encoder", max_shard_size="40KB")
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 1
    made, read = load(folder, dtype), load(make_package(folder), dtype, int8=False)
    assert torch.equal(made.encode(PROMPTS).embeddings, read.encode(PROMPTS).embeddings)
    ours, theirs = made._model.state_dict(), read._model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_int8_form_has_the_named_tensors(folder: Path) -> None:
    state = dict(quantize_text_state(folder / "text_encoder"))
    floats = load_file(folder / "text_encoder" / "model.safetensors")
    targets = text_targets(2)
    assert set(state) == set(floats) | {f"{name}.weight_scale" for name in targets}
    for name in targets:
        values, scales = quant.quantize_weight(floats[f"{name}.weight"])
        assert torch.equal(state[f"{name}.weight"], values)
        assert torch.equal(state[f"{name}.weight_scale"], scales)
    rest = [name for name in floats if name.removesuffix(".weight") not in targets]
    assert {state[name].dtype for name in rest} <= {torch.float16, torch.bfloat16}


def test_biases_and_kept_layers_stay_float(folder: Path) -> None:
    config = Gemma2Config.from_pretrained(folder / "text_encoder")
    config.attention_bias = True
    model = Gemma2Model(config)
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(tensor)
    model.save_pretrained(folder / "text_encoder")
    kept = "layers.1.self_attn.k_proj"
    read = load(make_package(folder, keep=[kept]), int8=False)
    assert isinstance(read._model.get_submodule(kept), nn.Linear)
    assert isinstance(read._model.get_submodule("layers.0.self_attn.k_proj"), WeightOnlyLinear)
    stored = model.layers[0].self_attn.k_proj.bias.half().float()
    assert torch.equal(read._model.get_submodule("layers.0.self_attn.k_proj").bias, stored)
    reference = load(folder, int8=False).encode(PROMPTS).embeddings
    # as in the test of features
    assert quant.relative_error(read.encode(PROMPTS).embeddings, reference) < 2 * 0.022


def test_a_causal_language_model_is_quantized_as_the_encoder(folder: Path) -> None:
    expected = load(folder).encode(PROMPTS).embeddings
    path = folder / "text_encoder" / "model.safetensors"
    state = {f"model.{name}": tensor for name, tensor in load_file(path).items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path, {"format": "pt"})
    assert torch.equal(load(folder).encode(PROMPTS).embeddings, expected)


def test_a_row_of_zeros_is_loaded(folder: Path) -> None:
    edit(folder, lambda s: s["layers.0.mlp.up_proj.weight"][3].zero_())
    encoder = load(folder)
    layer = encoder._model.get_submodule("layers.0.mlp.up_proj")
    assert not layer.weight[3].any() and layer.weight_scale[3] == 1
    assert encoder.encode(PROMPTS).embeddings.isfinite().all()


def test_sana_tiny_loses_less_than_to_bf16() -> None:
    prompts = list(itertools.islice(captions(12345), 6))
    folder = BUNDLED / "sana-tiny"
    exact, half = load(folder, int8=False), load(folder, torch.bfloat16, int8=False)
    features = [encoder.encode(prompts).embeddings for encoder in (exact, half, load(folder))]
    rounded, int8 = (quant.relative_error(other, features[0]) for other in features[1:])
    assert 0 < int8 < rounded


def test_a_filled_bitsandbytes_layer_is_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    values, scales = quant.quantize_weight(torch.randn(48, 64))
    bias, x = torch.randn(48), torch.randn(5, 64).clamp(-5, 5)
    capfd.readouterr()
    filled = text_linear.to_bitsandbytes(WeightOnlyLinear(values, scales, bias))
    assert torch.equal(filled.weight.CB, values)
    # its scheme, below its outliers: rows of fp16 in INT8, the result in fp16
    expected = w8a8_linear(*quant.quantize_rows(x.half()), values, scales, bias)
    for _ in range(2):
        assert quant.relative_error(filled(x), expected) < 2 * 2.0**-11
    assert text_linear.bitsandbytes_refusal("cpu") == ""
    assert capfd.readouterr().err == ""


def test_the_ways_to_multiply_say_why() -> None:
    # of what this machine has: both answers are right somewhere
    assert text_linear.choose_product("cpu").name in ("digits", "dequantized")
    assert text_linear.choose_product("cpu").reason
    if not importlib.util.find_spec("bitsandbytes"):
        assert "sana-edge[int8-cuda]" in text_linear.bitsandbytes_refusal("cpu")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(state)
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize(
    "name", ["layers.1.mlp.down_proj.weight", "layers.0.input_layernorm.weight", "embed_tokens.weight"]
)
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_weight_that_is_not_finite_is_named(folder: Path, name: str, bad: float) -> None:
    edit(folder, lambda s: s[name].view(-1)[5].fill_(bad))
    for use in (load, lambda f: list(quantize_text_state(f / "text_encoder"))):
        with pytest.raises(CheckpointError, match=rf"{name}.*(NaN|infinite)") as caught:
            use(folder)
        assert caught.value.hint


def test_what_cannot_be_quantized_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidInput, match=r"layers\.9"):
        next(quantize_text_state(folder / "text_encoder", keep=["layers.9.mlp.up_proj"]))
    made = make_package(folder)
    with pytest.raises(SanaError, match="quantized already"):
        next(quantize_text_state(made / "text_encoder"))
    name = "layers.1.mlp.up_proj.weight"
    edit(folder, lambda s: s.update({name: s[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"{name} is int8"):
        load(folder, int8=False)
    for change, found in (
        (lambda s: s.pop(name), f"missing.*{name}"),
        (lambda s: s.update(more=torch.zeros(1)), "unexpected.*more"),
        (lambda s: s.update({name: torch.zeros(64, 31)}), rf"{name} is \(64, 31\)"),
    ):
        edit(folder, change)
        with pytest.raises(CheckpointError, match=found):
            next(quantize_text_state(folder / "text_encoder"))


NAME = "layers.1.mlp.up_proj"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no-scale": (lambda s: s.pop(f"{NAME}.weight_scale"), f"{NAME}.weight_scale"),
    "short-scale": (
        lambda s: s.update({f"{NAME}.weight_scale": torch.ones(63)}),
        rf"{NAME}.weight_scale is \(63,\)",
    ),
    "zero-scale": (lambda s: s[f"{NAME}.weight_scale"].zero_(), f"{NAME}.weight_scale"),
    "float-weight": (lambda s: s.update({f"{NAME}.weight": torch.zeros(64, 32)}), f"{NAME}.weight"),
    "int8-norm": (lambda s: s.update({"norm.weight": torch.zeros(32, dtype=torch.int8)}), r"norm\.weight"),
    "lacking": (lambda s: s.pop(f"{NAME}.weight"), f"{NAME}.weight"),
    "more": (lambda s: s.update({"more.weight": torch.zeros(1)}), r"more\.weight"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_package_that_does_not_fit_is_refused(folder: Path, name: str) -> None:
    damage, found = DAMAGE[name]
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    state = dict(quantize_text_state(folder / "text_encoder"))
    damage(state)
    shutil.rmtree(folder / "text_encoder")
    write_weights(folder / "text_encoder", state.items())
    write_config(folder / "text_encoder", config, Quantization("token"))
    with pytest.raises(CheckpointError, match=found):
        load(folder)


def test_a_changed_package_is_refused(folder: Path) -> None:
    made = make_package(folder)
    (path,) = (made / "text_encoder").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        load(made)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the mappings of the process")
def test_float_weights_are_let_go_layer_by_layer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Gemma2Model.from_pretrained(folder / "text_encoder")
    shutil.rmtree(folder / "text_encoder")
    model.save_pretrained(folder / "text_encoder", max_shard_size="20KB")
    quantize, mapped = text_weights.quantize_weight, list[int]()

    def count(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        mapped.append(Path("/proc/self/maps").read_text().count("-of-0000"))
        return quantize(weight, name)

    monkeypatch.setattr(text_weights, "quantize_weight", count)
    encoder = load(folder)
    # the embedding and the layer that is being quantized, of more files
    assert len(mapped) == 14 and max(mapped) <= 2 < len(list((folder / "text_encoder").glob("*.safetensors")))
    assert encoder.encode(["a cat"]).embeddings.isfinite().all()
