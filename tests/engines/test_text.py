"""Prompts without transformers: the same tokens and features as with it, and damaged files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from sana_edge.engines.runtime import EngineRuntime
from sana_edge.engines.text import EngineText
from sana_edge.errors import CheckpointError
from sana_edge.export.settings import Settings
from sana_edge.nets.text_encoder import TextEncoder
from sana_edge.prompt import CHI, token_limit, tokenized_text
from sana_edge.store import manifest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
onnx_export = pytest.importorskip("sana_edge.export.onnx", reason="onnx is not installed")

PROMPTS = (
    "a red house left of a yellow star",
    "",
    "   ",
    "  A RED House \n",
    "İSTANBUL ẞ ΣΑΣ Ǆ",
    "日本の家 🏠 👩‍👩‍👧",
    "e\u0301\u202e\u200d\u00a0nbsp",
    "nul \0 tab\t\r\n line",
    "lone \udcff surrogate \ud83d",
    "\ud83c\udfe0 a pair of surrogates",
    "\ufeff?",
    "<bos> <eos><pad> <unk> special",
    "house " * 400,
    "日" * 900,
    " -> ' \" \\ {x} %s",
    "merges with the instruction's end: ::",
    "a",
)


@pytest.fixture(scope="module")
def exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    onnx_export.export(str(tiny_folder), folder, Settings(verify=False))
    return folder


@pytest.fixture
def damaged(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "damaged"))


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path) -> TextEncoder:
    return TextEncoder.load(tiny_folder, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def ours(exported: Path) -> EngineText:
    return EngineRuntime.load(exported, backend="onnxruntime", device="cpu")._text


@pytest.mark.parametrize("instruction", [CHI, None], ids=["prompt", "negative"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=ascii)
def test_equals_the_text_encoder(
    ours: EngineText, theirs: TextEncoder, prompt: str, instruction: tuple[str, ...] | None
) -> None:
    for truncation in (True, False):
        (expected,) = theirs._tokenize([prompt], instruction, truncation=truncation)
        assert ours._tokenize(prompt, instruction, truncation=truncation) == expected
    assert ours.tokens_over_limit(prompt, instruction=instruction) == theirs.tokens_over_limit(
        prompt, instruction=instruction
    )
    found, wanted = (encoder.encode for encoder in (ours, theirs))
    features = found(prompt, instruction=instruction)
    reference = wanted([prompt], instruction=instruction).embeddings.numpy()
    assert features.dtype == np.float32 and features.shape == reference.shape
    # some hundred fp32 roundings on the way through the layers, as for parity with diffusers
    assert np.linalg.norm(features - reference) <= 1e-5 * np.linalg.norm(reference)


def test_at_most_300_tokens(ours: EngineText) -> None:
    assert ours.encode("house " * 400).shape[1] == 300
    assert ours.encode("house " * 400, instruction=None).shape[1] == 300
    assert ours.encode("", instruction=None).shape[1] == 1
    assert ours.tokens_over_limit("house " * 400) > 0 and ours.tokens_over_limit("house") == 0


def test_what_is_known_of_the_instruction_is_not_run_again(exported: Path) -> None:
    lengths = []

    def run(ids: Any, keys: Any, values: Any) -> Any:
        lengths.append((ids.shape[1], keys.shape[2], values.shape[2]))
        return np.zeros((1, ids.shape[1], shape.channels), np.float32)

    shape = manifest.read(exported).text
    text = EngineText(exported, shape, run)
    text.encode("a cat on a mat")
    text.encode("a cat", instruction=None)
    (own, past, again), (alone, nothing, _) = lengths
    assert own < 20 and past == again > 100
    assert alone < 20 and nothing == 0


def byte_level(template: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _train(tokenizer, pre_tokenizers.ByteLevel.alphabet())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    return tokenizer


def like_gemma(template: str) -> Tokenizer:
    """Byte fallback, spaces written as underscores, no words: as the public model's tokenizer is."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    _train(tokenizer, [], [f"<0x{byte:02X}>" for byte in range(256)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    return tokenizer


def _train(tokenizer: Tokenizer, alphabet: list[str], others: list[str] | None = None) -> None:
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    if others:
        tokenizer.add_tokens(others)
    tokenizer.train_from_iterator(["\n".join(CHI), *PROMPTS[:1]] * 3, trainer)


TOKENIZERS: dict[str, tuple[Callable[[str], Tokenizer], str, dict[str, Any]]] = {
    "gemma": (like_gemma, "<bos> $A", {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}),
    "gemma-fast": (like_gemma, "<bos> $A", {"tokenizer_class": "GemmaTokenizerFast"}),
    "ends": (byte_level, "<bos> $A <eos>", {}),
    "left": (byte_level, "<bos> $A", {"truncation_side": "left"}),
    "padded": (byte_level, "<bos> $A", {"padding_side": "left"}),
}


@pytest.mark.parametrize(("make", "template", "config"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_of_other_kinds(
    damaged: Path, make: Callable[[str], Tokenizer], template: str, config: dict[str, Any]
) -> None:
    shape = manifest.read(damaged).text
    tokenizer = make(template)
    # as a training run may have left them
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(damaged / manifest.TOKENIZER))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    content |= {"pad_token": "<pad>", "unk_token": "<unk>", **config}
    (damaged / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(content))
    wanted = AutoTokenizer.from_pretrained(damaged / "tokenizer")
    before = wanted.encode("\n".join(CHI))
    rewrite_instruction(damaged, before)
    text = EngineText(damaged, shape, lambda ids, keys, values: np.zeros((1, ids.shape[1], 1), np.float32))
    for prompt in PROMPTS:
        for instruction in (CHI, None):
            for truncation in (True, False):
                limit = token_limit(len(before) if instruction else 0) if truncation else None
                text_of = tokenized_text(prompt, instruction)
                row = wanted(text_of, truncation=truncation, max_length=limit, verbose=False).input_ids
                if row:
                    assert text._tokenize(prompt, instruction, truncation=truncation) == row, (
                        prompt,
                        truncation,
                    )


def rewrite_instruction(folder: Path, ids: list[int]) -> None:
    path = folder / manifest.INSTRUCTION
    tensors = load_file(path)
    count = len(ids)
    tensors["ids"] = np.array(ids)
    tensors["hidden"] = np.resize(tensors["hidden"], (1, count, tensors["hidden"].shape[2]))
    for name in ("keys", "values"):
        layers, heads, _, d = tensors[name].shape
        tensors[name] = np.resize(tensors[name], (layers, heads, count, d))
    save_file(tensors, path)


def change(folder: Path, **tensors: Any) -> None:
    path = folder / manifest.INSTRUCTION
    found = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda folder: (folder / manifest.TOKENIZER).unlink(), "tokenizer.json is missing"),
    "broken tokenizer": (lambda folder: (folder / manifest.TOKENIZER).write_text("{"), "cannot be read"),
    "no instruction": (lambda folder: (folder / manifest.INSTRUCTION).unlink(), "cannot read .*instruction"),
    "broken instruction": (
        lambda folder: (folder / manifest.INSTRUCTION).write_bytes(b"\x08" + bytes(20)),
        "cannot read .*instruction",
    ),
    "no keys": (lambda folder: change(folder, keys=None), "keys is missing, expected"),
    "other width": (lambda folder: change(folder, hidden=np.zeros((1, 7, 3), np.float32)), "hidden is"),
    "other ids": (
        lambda folder: change(folder, ids=load_file(folder / manifest.INSTRUCTION)["ids"] + 1),
        "of another tokenizer",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(damaged: Path, damage: Callable[[Path], object], message: str) -> None:
    shape = manifest.read(damaged).text
    damage(damaged)
    with pytest.raises(CheckpointError, match=message) as caught:
        EngineText(damaged, shape, lambda ids, keys, values: keys)
    assert "sana-edge export" in caught.value.hint or "download" in caught.value.hint


def test_a_tokenizer_without_tokens(damaged: Path) -> None:
    shape = manifest.read(damaged).text
    path = damaged / manifest.TOKENIZER
    content = json.loads(path.read_text())
    content["post_processor"] = None
    path.write_text(json.dumps(content))
    rewrite_instruction(damaged, Tokenizer.from_file(str(path)).encode("\n".join(CHI)).ids)
    text = EngineText(damaged, shape, lambda ids, keys, values: keys)
    with pytest.raises(CheckpointError, match="no tokens"):
        text.encode("", instruction=None)


def test_a_half_precision_instruction(exported: Path, damaged: Path) -> None:
    whole = load_file(exported / manifest.INSTRUCTION)
    floats = {name: tensor.astype(np.float16) for name, tensor in whole.items() if name != "ids"}
    change(damaged, **floats)
    text = EngineText(damaged, manifest.read(exported).text, lambda ids, keys, values: keys)
    assert text._instruction.hidden.dtype == np.float32
    assert np.array_equal(text._instruction.hidden, floats["hidden"].astype(np.float32))
