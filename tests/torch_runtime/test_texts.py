"""Prompts that torch reads once: the same pictures, from memory, from the disk, and in another process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_edge import CheckpointError, OutOfMemory, Sana
from sana_edge.cli.main import main
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.text_encoder import TextEncoder
from sana_edge.prompt import CHI
from sana_edge.request.request import Request
from sana_edge.store import prompt_cache
from sana_edge.torch_runtime import memory, texts
from sana_edge.torch_runtime.memory import Memory
from sana_edge.torch_runtime.runtime import TorchRuntime

PROMPT = "a red house"
OPTIONS: dict[str, Any] = {"steps": 1, "seed": 3, "size": (64, 64), "exact_size": True}


class Spy:
    """What text encoders and denoisers did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded, self.encoded, self.projected = 0, list[str](), 0
        load, encode, context = TextEncoder.load, TextEncoder.encode, Denoiser.text_context

        def loads(*given: Any, **named: Any) -> TextEncoder:
            self.loaded += 1
            return load(*given, **named)

        def encodes(encoder: TextEncoder, prompts: Any, **named: Any) -> Any:
            self.encoded += prompts
            return encode(encoder, prompts, **named)

        def projects(denoiser: Denoiser, groups: Any) -> Any:
            self.projected += len(groups)
            return context(denoiser, groups)

        monkeypatch.setattr(TextEncoder, "load", loads)
        monkeypatch.setattr(TextEncoder, "encode", encodes)
        monkeypatch.setattr(Denoiser, "text_context", projects)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


TEXTS = {"negative_prompt": "a fish", "instruction": "Draw "}


@pytest.mark.parametrize(
    ("how", "more"),
    [({}, {}), ({"int8": True}, TEXTS), ({"dtype": "bf16"}, TEXTS)],
    ids=["float", "int8", "bf16"],
)
def test_pictures_are_the_same(
    tiny_folder: Path, cache: Path, spy: Spy, how: dict[str, Any], more: dict[str, Any]
) -> None:
    with Sana.load(tiny_folder, prompt_cache=False, **how) as sana:
        assert spy.loaded == 1
        expected = sana.generate(PROMPT, **OPTIONS, **more)
    assert not (cache / "prompts").exists() and len(spy.encoded) == 2
    with Sana.load(tiny_folder, **how) as sana:
        assert spy.loaded == 1
        first, second = (sana.generate(PROMPT, **OPTIONS, **more) for _ in range(2))
    assert spy.loaded == 2 and len(spy.encoded) == 4 and spy.projected == 4
    with Sana.load(tiny_folder, **how) as sana:
        third = sana.generate(PROMPT, **OPTIONS, **more)
    assert spy.loaded == 2 and spy.projected == 6
    for found in (first, second, third):
        assert found.png() == expected.png() and found.notes == expected.notes


def test_a_re_roll_computes_nothing_of_its_text(tiny_folder: Path, cache: Path, spy: Spy) -> None:
    with Sana.load(tiny_folder) as sana:
        pictures = [sana.generate(PROMPT, **{**OPTIONS, "seed": seed}) for seed in (1, 2)]
        assert spy.encoded == ["", PROMPT] and spy.projected == 2
        assert not np.array_equal(pictures[0].pixels, pictures[1].pixels)
        # the negative prompt is known
        sana.generate("a fish", **OPTIONS)
        assert spy.encoded == ["", PROMPT, "a fish"] and spy.projected == 3
        sana.generate(PROMPT, **OPTIONS, guidance=1.0)
        assert len(spy.encoded) == 3 and spy.loaded == 1


def test_a_batch(tiny_folder: Path, cache: Path, spy: Spy) -> None:
    requests = [Request(prompt, **OPTIONS) for prompt in (PROMPT, "a fish", PROMPT)]
    with Sana.load(tiny_folder, prompt_cache=False) as sana:
        expected = sana.batch(requests)
    spy.encoded.clear()
    for _ in range(2):
        with Sana.load(tiny_folder) as sana:
            found = sana.batch(requests)
        assert [one.png() for one in found] == [one.png() for one in expected]
        assert spy.encoded == ["", PROMPT, "a fish"]


def test_a_cut_prompt_is_noted_again(tiny_folder: Path, cache: Path, spy: Spy) -> None:
    for _ in range(2):
        with Sana.load(tiny_folder) as sana:
            found = sana.generate("house " * 1667, **OPTIONS)
        assert any("the prompt is too long: its last" in note for note in found.notes)
    assert spy.loaded == 1


@pytest.mark.slow
@pytest.mark.ci
def test_another_process_loads_no_text_encoder(tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    words = ["generate", PROMPT, "--model", str(tiny_folder), "--seed", "3", "--steps", "1", "--force"]
    # of which the values depend, too
    words += ["--size", "64x64", "--exact-size", "--output", str(output), "--quiet", "--threads", "1"]
    assert main([*words, "--no-prompt-cache"]) == 0
    expected = output.read_bytes()
    assert not (cache / "prompts").exists() and main(words) == 0
    assert output.read_bytes() == expected and len(list((cache / "prompts").iterdir())) == 2
    output.unlink()
    code = """
import sys
from sana_edge.cli.main import main
from sana_edge.nets.text_encoder import TextEncoder
from sana_edge.prompt import CHI
TextEncoder.load = None
code = main(sys.argv[1:])
print({"transformers", "tokenizers"} & set(sys.modules), file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    assert output.read_bytes() == expected


def test_of_another_model(tiny_folder: Path, tmp_path: Path, cache: Path, spy: Spy) -> None:
    """A weight, the tokenizer or the config is another one; a copy is the same."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)

    def draws() -> int:
        before = len(spy.encoded)
        with Sana.load(folder) as sana:
            sana.generate(PROMPT, **OPTIONS)
        return len(spy.encoded) - before

    with Sana.load(tiny_folder) as sana:
        sana.generate(PROMPT, **OPTIONS)
    assert draws() == 0
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    state = load_file(path)
    state["layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(state, path, {"format": "pt"})
    assert draws() == 2
    for name in ("tokenizer/tokenizer.json", "text_encoder/config.json"):
        with open(folder / name, "a") as file:
            file.write("\n")
        assert draws() == 2 and draws() == 0


def test_of_another_way_to_compute(tiny_folder: Path, cache: Path) -> None:
    with Sana.load(tiny_folder) as sana:
        sana.generate(PROMPT, **OPTIONS)
    ways: list[tuple[dict[str, Any], bool]] = [({}, True), ({"threads": 3}, False)]
    for how, known in (*ways, ({"int8": True}, False), ({"dtype": "bf16"}, False)):
        with Sana.load(tiny_folder, **how) as sana:
            assert isinstance(sana._runtime, TorchRuntime) and sana._runtime.texts is not None
            assert sana._runtime.texts.have([("", None), (PROMPT, CHI)]) == known


def test_damage_is_computed_anew(tiny_folder: Path, cache: Path, spy: Spy) -> None:
    with Sana.load(tiny_folder) as sana:
        expected = sana.generate(PROMPT, **OPTIONS).png()
    for path in (cache / "prompts").iterdir():
        content = bytearray(path.read_bytes())
        content[-2] ^= 64
        path.write_bytes(content)
    with Sana.load(tiny_folder) as sana:
        assert sana.generate(PROMPT, **OPTIONS).png() == expected
    assert spy.encoded == ["", PROMPT] * 2


def test_where_memory_is_short(
    tiny_folder: Path, cache: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "together", lambda stages: 1 << 60)
    with Sana.load(tiny_folder) as sana:
        runtime = sana._runtime
        assert isinstance(runtime, TorchRuntime) and runtime.networks.loaded == ()
        first = sana.generate(PROMPT, **OPTIONS)
        assert spy.loaded == 1 and spy.encoded == ["", PROMPT]
        assert sana.generate(PROMPT, **OPTIONS).png() == first.png() and spy.loaded == 1


def test_a_known_prompt_needs_no_room_for_the_text_encoder(
    tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = Memory.stages

    def large(memory: Memory, work: Any) -> list[Any]:
        found = stages(memory, work)
        return [type(s)(s.name, 1 << 50, 0, 0, 0) if s.name == "text" else s for s in found]

    with Sana.load(tiny_folder) as sana:
        sana.generate(PROMPT, **OPTIONS)
    with Sana.load(tiny_folder) as sana:
        monkeypatch.setattr(Memory, "stages", large)
        for in_turn in (False, True):
            sana._runtime.networks.in_turn = in_turn  # type: ignore[union-attr]
            sana.generate(PROMPT, **OPTIONS)
            with pytest.raises(OutOfMemory, match="needs about"):
                sana.generate("a fish", **OPTIONS)


def test_a_text_encoder_that_is_cut_off_shows_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    for cached in (True, False):
        with pytest.raises(CheckpointError, match="cannot read"):
            Sana.load(folder, prompt_cache=cached)


def test_damaged_values_show_with_the_first_new_prompt(
    tiny_folder: Path, tmp_path: Path, cache: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    # NaN in every format
    path.write_bytes(path.read_bytes()[:-4] + b"\xff" * 4)
    with Sana.load(folder) as sana, pytest.raises(CheckpointError, match="NaN"):
        sana.generate(PROMPT, **OPTIONS)
    assert not (cache / "prompts").exists()


def test_an_error_lets_go_of_keys_and_values(tiny_folder: Path, cache: Path, spy: Spy) -> None:
    with Sana.load(tiny_folder) as sana:
        sana.generate(PROMPT, **OPTIONS)
        sana._runtime.release()  # type: ignore[union-attr]
        sana.generate(PROMPT, **OPTIONS)
    assert spy.projected == 4 and len(spy.encoded) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_come_back_to_the_bit(dtype: torch.dtype) -> None:
    values = torch.randn(1, 3, 5).to(dtype)
    entry = prompt_cache.Entry(texts._STORED[dtype], (1, 3, 5), texts._bytes(values), 0)
    content = prompt_cache._file("key", entry)
    again = prompt_cache._parsed(content, "key", entry.dtype, 5)
    found = torch.frombuffer(bytearray(again.content), dtype=dtype).view(1, 3, 5)
    assert torch.equal(found, values)
