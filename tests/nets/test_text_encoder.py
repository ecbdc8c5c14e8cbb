from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline, SanaSprintPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma2ForCausalLM, Gemma2Model

from sana_edge.errors import CheckpointError
from sana_edge.nets.text_encoder import TextEncoder, TextFeatures
from sana_edge.nets.text_weights import load_text_model
from sana_edge.prompt import CHI

LONG = "a charming flat illustration of a red house left of a yellow star, " * 4
TOO_LONG = "two blue fish above a green tree and a cat on a mat. " * 40
UNICODE = "Ünïcödé 🦊👩‍👩‍👧 中文字 İstanbul ﬁ \u202eאבג\u202c \x00\x1b[31m e\u0301 \U000e0041"
PROMPTS = ("a cat", "", "   A Red HOUSE\n", "... 3 stars?", LONG, TOO_LONG, UNICODE)


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> SanaPipeline:
    return SanaPipeline.from_pretrained(tiny_folder, vae=None, transformer=None)


@pytest.fixture(scope="module")
def encoder(tiny_folder: Path) -> TextEncoder:
    return TextEncoder.load(tiny_folder, dtype=torch.float32, device="cpu")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(tiny_folder / part, tmp_path / part)
    return tmp_path


def load(folder: Path) -> TextEncoder:
    return TextEncoder.load(folder, dtype=torch.float32, device="cpu")


def reference_features(
    reference: SanaPipeline, prompts: Sequence[str], instruction: Sequence[str] | None = CHI
) -> tuple[Tensor, Tensor]:
    """What diffusers gives, padded: embeddings (rows, 300, C) and mask (rows, 300)."""
    with torch.no_grad():
        embeddings, mask, *_ = reference.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            complex_human_instruction=list(instruction) if instruction else None,
        )
    return embeddings, mask.bool()


def assert_same(features: TextFeatures, embeddings: Tensor, mask: Tensor, bound: float = 1e-5) -> None:
    rows, length, _ = features.embeddings.shape
    assert features.mask.dtype == torch.bool
    assert torch.equal(features.mask, mask[:, :length])
    assert not mask[:, length:].any(), "valid tokens were trimmed"
    assert mask[:, length - 1].any(), "padding was left"
    for row in range(rows):
        ours, theirs = features.embeddings[row][mask[row, :length]], embeddings[row][mask[row]]
        assert float((ours - theirs).norm() / theirs.norm()) <= bound, row
    assert not features.embeddings[~features.mask].any()


@pytest.mark.parametrize(
    "prompt", PROMPTS, ids=["short", "empty", "spaces", "signs", "long", "cut", "unicode"]
)
def test_prompt_equals_diffusers(encoder: TextEncoder, reference: SanaPipeline, prompt: str) -> None:
    assert_same(encoder.encode([prompt]), *reference_features(reference, [prompt]))
    negative = encoder.encode([prompt], instruction=None)
    assert_same(negative, *reference_features(reference, [prompt], None))


def test_batch_of_different_lengths_equals_diffusers(encoder: TextEncoder, reference: SanaPipeline) -> None:
    features = encoder.encode(PROMPTS)
    assert_same(features, *reference_features(reference, PROMPTS))
    assert sorted(set(features.mask.sum(1).tolist()))[-1] == 300
    assert_same(encoder.encode(PROMPTS, instruction=None), *reference_features(reference, PROMPTS, None))


def test_negative_prompt_is_encoded_as_the_pipeline_does(
    encoder: TextEncoder, reference: SanaPipeline
) -> None:
    for negative in ("", "blurry, LOW quality"):
        with torch.no_grad():
            _, _, embeddings, mask = reference.encode_prompt(
                "a cat", negative_prompt=negative, complex_human_instruction=list(CHI)
            )
        assert_same(encoder.encode([negative], instruction=None), embeddings, mask.bool())
    assert encoder.encode([""], instruction=None).mask.tolist() == [[True]]


def test_sprint_reads_the_same_text(tiny_sprint_folder: Path) -> None:
    reference = SanaSprintPipeline.from_pretrained(tiny_sprint_folder, vae=None, transformer=None)
    with torch.no_grad():
        embeddings, mask = reference.encode_prompt(list(PROMPTS), complex_human_instruction=list(CHI))
    assert_same(load(tiny_sprint_folder).encode(PROMPTS), embeddings, mask.bool())


@pytest.mark.parametrize(
    ("instruction", "prompt"),
    [
        (("draw a red ho",), "use"),
        (("Two lines", "a yell"), "ow star"),
        (("a cat on a m",), ""),
        (("x",), ""),
    ],
    ids=["merged", "lines", "empty", "one-token"],
)
def test_other_instructions_equal_diffusers(
    encoder: TextEncoder, reference: SanaPipeline, instruction: tuple[str, ...], prompt: str
) -> None:
    prompts = [prompt, TOO_LONG]
    features = encoder.encode(prompts, instruction=instruction)
    assert_same(features, *reference_features(reference, prompts, instruction))
    alone = encoder.encode([prompt], instruction=instruction)
    assert_same(alone, *reference_features(reference, [prompt], instruction))


def test_the_instruction_is_what_the_pipelines_default_to() -> None:
    for pipeline in (SanaPipeline, SanaSprintPipeline):
        default = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
        assert list(CHI) == default


def test_a_prompt_runs_only_its_own_tokens(folder: Path) -> None:
    encoder = load(folder)
    run: list[int] = []
    embedding = encoder._model.embed_tokens
    embedding.register_forward_hook(lambda module, arguments, output: run.append(arguments[0].numel()))
    first = encoder.encode(["a cat"])
    instruction = encoder._tokenizer.encode("\n".join(CHI))
    whole = encoder._tokenizer.encode("\n".join(CHI) + "a cat")
    # the instruction ends in a space that the prompt's first word takes over
    assert whole[: len(instruction)] != instruction
    own = len(whole) - (len(instruction) - 1)
    assert run == [len(instruction), own]
    second = encoder.encode(["a cat"])
    assert run[2:] == [own]
    assert torch.equal(first.embeddings, second.embeddings)


def test_the_kept_instruction_is_not_changed_by_use(folder: Path) -> None:
    encoder = load(folder)
    before = encoder.encode(PROMPTS)
    (prefix,) = encoder._prefixes.values()
    kept = [tensor.clone() for layer in prefix.layers for tensor in layer]
    encoder.encode(["a cat"] * 5)
    encoder.encode([""])
    encoder.encode(["a cat"], instruction=("another one",))
    after = encoder.encode(PROMPTS)
    assert torch.equal(before.embeddings, after.embeddings)
    assert all(
        torch.equal(a, b) for a, b in zip(kept, (t for pair in prefix.layers for t in pair), strict=True)
    )
    assert len(encoder._prefixes) == 2


def test_rows_do_not_depend_on_the_batch(encoder: TextEncoder) -> None:
    together = encoder.encode(["a cat", LONG])
    alone = encoder.encode(["a cat"])
    length = alone.embeddings.shape[1]
    torch.testing.assert_close(together.embeddings[:1, :length], alone.embeddings, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("instruction", [CHI, None], ids=["instruction", "negative"])
def test_tokens_over_the_limit_are_counted(
    encoder: TextEncoder, instruction: tuple[str, ...] | None, capfd: pytest.CaptureFixture[str]
) -> None:
    def valid(prompt: str) -> int:
        return int(encoder.encode([prompt], instruction=instruction).mask.sum())

    unit = "!?"
    tokens = len(encoder._tokenizer.encode(unit, add_special_tokens=False))
    empty = valid("")
    fits = next(n for n in range(1, 400) if empty + n * tokens > 300) - 1
    for units in (0, 1, fits, fits + 1, fits + 50):
        prompt = unit * units
        over = encoder.tokens_over_limit(prompt, instruction=instruction)
        assert over == max(0, empty + units * tokens - 300), units
        assert valid(prompt) == min(300, empty + units * tokens)
    assert encoder.tokens_over_limit("word " * 10_000, instruction=instruction) > 9_000
    assert capfd.readouterr().err == ""


def test_undecodable_arguments_are_read(encoder: TextEncoder) -> None:
    lone = encoder.encode(["a \udcff cat \ud83d"])
    assert torch.equal(lone.embeddings, encoder.encode(["a \ufffd cat \ufffd"]).embeddings)
    pair = encoder.encode(["a \ud83e\udd8a"])
    assert torch.equal(pair.embeddings, encoder.encode(["a 🦊"]).embeddings)


def test_stored_padding_side_does_not_matter(folder: Path, encoder: TextEncoder) -> None:
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    assert config["padding_side"] == "left"
    path.write_text(json.dumps({**config, "padding_side": "right"}))
    assert torch.equal(load(folder).encode(PROMPTS).embeddings, encoder.encode(PROMPTS).embeddings)


def test_a_causal_language_model_or_shards_load_as_the_encoder(folder: Path, encoder: TextEncoder) -> None:
    expected = encoder.encode(["a cat"]).embeddings
    model = Gemma2Model.from_pretrained(folder / "text_encoder")
    language_model = Gemma2ForCausalLM(model.config)
    language_model.model.load_state_dict(model.state_dict())
    for saved, size in ((language_model, "1GB"), (language_model, "40KB"), (model, "40KB")):
        shutil.rmtree(folder / "text_encoder")
        saved.save_pretrained(folder / "text_encoder", max_shard_size=size)
        assert len(list((folder / "text_encoder").glob("*.safetensors"))) > (size == "40KB")
        assert torch.equal(load(folder).encode(["a cat"]).embeddings, expected)


def test_bf16_follows_diffusers_and_a_variant_is_found(folder: Path, tiny_folder: Path) -> None:
    Gemma2Model.from_pretrained(folder / "text_encoder").bfloat16().save_pretrained(
        folder / "text_encoder", variant="bf16"
    )
    encoder = TextEncoder.load(folder, dtype=torch.bfloat16, device="cpu", variant="bf16")
    features = encoder.encode(PROMPTS)
    assert features.embeddings.dtype == torch.bfloat16
    assert not features.embeddings.requires_grad and not features.embeddings.is_inference()
    reference = SanaPipeline.from_pretrained(tiny_folder, vae=None, transformer=None, dtype=torch.bfloat16)
    # bf16 keeps 8 bits: other shapes of the same products round differently
    assert_same(features, *reference_features(reference, PROMPTS), bound=4 * 2**-8)


def test_loading_is_silent(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(tiny_folder)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(state)
    save_file(state, path, {"format": "pt"})


WEIGHTS, CONFIG, TOKENIZER = (
    "text_encoder/model.safetensors",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
)
BREAKS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no-tokenizer": (lambda f: (f / TOKENIZER).unlink(), "tokenizer.json", "missing"),
    "empty-tokenizer": (lambda f: (f / TOKENIZER).write_text("{}"), "tokenizer.json", "read"),
    "cut-tokenizer": (
        lambda f: (f / TOKENIZER).write_bytes((f / TOKENIZER).read_bytes()[:999]),
        TOKENIZER,
        "read",
    ),
    "no-config": (lambda f: (f / CONFIG).unlink(), CONFIG, "missing"),
    "cut-config": (lambda f: (f / CONFIG).write_text("{"), CONFIG, "read"),
    "other-model": (lambda f: edit_json(f / CONFIG, model_type="gemma3"), CONFIG, "gemma3"),
    "bad-value": (lambda f: edit_json(f / CONFIG, hidden_size="wide"), CONFIG, "hidden_size"),
    "bad-heads": (lambda f: edit_json(f / CONFIG, num_attention_heads=0), CONFIG, "num_attention_heads is 0"),
    "no-weights": (lambda f: (f / WEIGHTS).unlink(), "text_encoder", "weights"),
    "cut-weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), WEIGHTS, "read"),
    "lacking-key": (
        lambda f: edit_weights(f / WEIGHTS, lambda s: s.pop("norm.weight")),
        "text_encoder",
        "norm.weight",
    ),
    "extra-key": (
        lambda f: edit_weights(f / WEIGHTS, lambda s: s.update(more=torch.zeros(1))),
        "text_encoder",
        "unexpected keys (more)",
    ),
    "wrong-shape": (
        lambda f: edit_weights(f / WEIGHTS, lambda s: s.update({"norm.weight": torch.zeros(31)})),
        "text_encoder",
        "norm.weight",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_damaged_folder_is_named(folder: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    damage, where, what = BREAKS[name]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(folder) in caught.value.message
    assert where in caught.value.message
    assert what in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert capfd.readouterr().err == ""


def test_a_tokenizer_of_another_model_is_an_error(folder: Path) -> None:
    tokenizer = json.loads((folder / TOKENIZER).read_text())
    tokenizer["post_processor"] = None
    (folder / TOKENIZER).write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="no tokens"):
        load(folder).encode([""], instruction=None)
    edit_json(folder / CONFIG, vocab_size=300)
    edit_weights(
        folder / WEIGHTS, lambda s: s.update({"embed_tokens.weight": s["embed_tokens.weight"][:300].clone()})
    )
    with pytest.raises(CheckpointError, match="vocabulary of 300"):
        load(folder).encode(["a yellow star"])


def test_importing_the_features_needs_no_transformers() -> None:
    code = "import sys, sana_edge.nets.text_encoder; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("value", [2_000_000_000, 0, -1, 2.0, "2", True, [2]])
@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "num_attention_heads"])
def test_a_config_of_numbers_that_no_model_has(
    tiny_folder: Path, tmp_path: Path, key: str, value: object
) -> None:
    """The library would make so many layers."""
    path = tmp_path / "config.json"
    config = json.loads((tiny_folder / "text_encoder" / "config.json").read_text())
    path.write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match=f"{key} is .*, expected a whole number"):
        load_text_model(tmp_path, dtype=torch.float32, device="cpu")
