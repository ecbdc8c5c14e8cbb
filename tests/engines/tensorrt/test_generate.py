"""Pictures through `sana-edge build` and the engine "tensorrt", with stand-ins that onnxruntime computes for.

Nothing here has run with TensorRT.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_edge import Sana, read_metadata
from sana_edge.cli.main import main
from sana_edge.engines.choose import choose
from sana_edge.engines.engine import Settings
from sana_edge.engines.tensorrt import cache
from sana_edge.errors import InvalidInput, SanaError
from sana_edge.export.settings import Settings as ExportSettings

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
onnx_export = pytest.importorskip("sana_edge.export.onnx", reason="onnx is not installed")

Capture = pytest.CaptureFixture[str]
PROMPT = "a red house left of a yellow star"
GPU = "NVIDIA GeForce RTX 4070 Laptop GPU"


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    onnx_export.export(str(tiny_folder), folder, ExportSettings(verify=False))
    return folder


pytestmark = pytest.mark.usefixtures("cache")


def built(folder: Path, *arguments: str) -> None:
    assert main(["build", str(folder), "--quiet", *arguments]) == 0


def test_a_picture(folder: Path, trt: Any, cuda: Any) -> None:
    built(folder)
    with Sana.load(str(folder), backend="tensorrt") as sana:
        found = sana.generate(PROMPT, seed=7, steps=3)
        # a negative prompt makes pairs, and another size
        pair = sana.generate(PROMPT, seed=7, steps=2, negative_prompt="blurred", size=(160, 128))
        assert sana._runtime is not None
        assert sana._runtime.place == f"TensorRT {trt.__version__} on {GPU}, fp32"
    with Sana.load(str(folder), backend="onnxruntime", device="cpu") as sana:
        expected = sana.generate(PROMPT, seed=7, steps=3)
        expected_pair = sana.generate(PROMPT, seed=7, steps=2, negative_prompt="blurred", size=(160, 128))
    for one, other in ((found, expected), (pair, expected_pair)):
        assert one.pixels.std() > 10
        assert np.abs(one.pixels.astype(int) - other.pixels.astype(int)).max() <= 1
        assert one.metadata == {**other.metadata, "backend": "tensorrt"}
        assert one.notes == other.notes
    assert trt.state.executions > 5 and cuda.state.launches > 0


def test_sprint_has_no_folded_engine(tiny_sprint_folder: Path, tmp_path: Path, trt: Any) -> None:
    folder = tmp_path / "sprint"
    onnx_export.export(str(tiny_sprint_folder), folder, ExportSettings(verify=False))
    built(folder)
    assert len(cache.entries(cache.engine_folder())) == 4
    with Sana.load(str(folder)) as sana:
        assert sana.generate(PROMPT, seed=7).metadata["backend"] == "tensorrt"


def test_auto_takes_engines_that_were_built(folder: Path, trt: Any) -> None:
    command = f"sana-edge build {folder} --output {cache.engine_folder()}"
    kind = choose(folder=folder)
    assert (kind.name, kind.device) == ("onnxruntime", "cpu")
    assert kind.reasons["tensorrt cuda"].endswith(f"; build it: {command}")
    for device in ("cuda", "gpu"):
        missing = r"tensorrt cuda: .* has no engine of .*'s text_encoder"
        with pytest.raises(SanaError, match=missing) as caught:
            choose(device=device, folder=folder)
        assert caught.value.hint == f"build it: {command}"
    assert trt.state.built == 0
    built(folder)
    for device in ("auto", "cuda", "gpu"):
        kind = choose(device=device, folder=folder)
        assert (kind.name, kind.device, kind.precision) == ("tensorrt", "cuda", "fp32")
    assert choose(device="cpu", folder=folder).name == "onnxruntime"
    # and none of them is of use to another TensorRT
    trt.__version__ = "99.1.0"
    reason = choose(folder=folder).reasons["tensorrt cuda"]
    assert "is an engine of another TensorRT version" in reason and reason.endswith(command)


def test_one_engine_that_is_missing_or_cut_off(folder: Path, trt: Any) -> None:
    built(folder)
    place = cache.engine_folder()
    entry = next(entry for entry in cache.entries(place) if entry.key.graph == "decoder")
    content = entry.path.read_bytes()
    entry.path.write_bytes(content[:-1])
    command = f"sana-edge build {folder} --output {place}"
    kind = choose(folder=folder)
    assert kind.name == "onnxruntime" and "is damaged" in kind.reasons["tensorrt cuda"]
    # of its own size, that shows when it is loaded
    entry.path.write_bytes(content[:-1] + b" ")
    with pytest.raises(SanaError, match="is damaged") as caught:
        Sana.load(str(folder))
    assert caught.value.hint == f"build it again: {command}"
    entry.path.unlink()
    with pytest.raises(SanaError, match=r"is damaged: 0 bytes") as caught:
        Sana.load(str(folder), backend="tensorrt")
    assert caught.value.hint == f"build it again: {command}"
    entry.path.with_name(f"{entry.path.name}.json").unlink()
    with pytest.raises(SanaError, match=r"has no engine of .*'s decoder") as caught:
        Sana.load(str(folder), backend="tensorrt")
    assert caught.value.hint == f"build it: {command}"


def test_the_command_line(
    folder: Path, tmp_path: Path, trt: Any, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    """`build` says how its engines are used, and that works."""
    place = tmp_path / "my engines"
    assert main(["build", str(folder), "--output", str(place)]) == 0
    told = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("next:  "))
    name, *command = shlex.split(told.removeprefix("next:  ").removesuffix("TEXT"))
    assert name == "sana-edge" and {"--engines", str(place), "--trust-engine"} < set(command)
    command += [PROMPT, "--steps", "1", "--output", str(tmp_path / "a.png")]
    untrusted = [word for word in command if word != "--trust-engine"]
    assert main(untrusted) == 1
    error = capsys.readouterr().err
    assert "is outside of your engine cache" in error and "pass --trust-engine" in error
    assert f"sana-edge build {folder} --output {cache.engine_folder()}" in error
    assert main(command) == 0
    assert read_metadata(tmp_path / "a.png")["backend"] == "tensorrt"
    # a folder of engines asks for them also without the backend
    command.remove("tensorrt")
    command.remove("--backend")
    with caplog.at_level(logging.INFO, "sana_edge"):
        assert main([*command, "--force"]) == 0
    assert f"on TensorRT {trt.__version__} on {GPU}, fp32, backend tensorrt" in caplog.text
    assert main(["build", str(folder)]) == 0
    assert "--trust-engine" not in capsys.readouterr().err
    assert main(["doctor"]) == 0
    own = cache.engine_folder()
    assert f"tensorrt cuda: ok, TensorRT {trt.__version__} on {GPU}, fp32, 5 engines in {own}" in (
        capsys.readouterr().out
    )


def test_engines_that_were_asked_for_are_not_passed_over(
    folder: Path, tmp_path: Path, trt: Any, cuda: Any
) -> None:
    place = tmp_path / "engines"
    with pytest.raises(SanaError, match=f"{place} has no engine of ") as caught:
        Sana.load(str(folder), engines=str(place))
    assert caught.value.hint == f"build it: sana-edge build {folder} --output {place}"
    cuda.state.fails["cudaGetDevice"] = "cudaErrorNoDevice"
    with pytest.raises(SanaError, match="tensorrt cuda: no NVIDIA GPU"):
        Sana.load(str(folder), engines=place, trust_engine=True)
    with pytest.raises(InvalidInput, match="backend openvino does not run the engines in"):
        Sana.load(str(folder), engines=place, backend="openvino")
    with pytest.raises(InvalidInput, match="engines are of exported folders, sana-tiny is none") as refused:
        Sana.load("sana-tiny", engines=place)
    assert "`sana-edge build onnx`" in refused.value.hint


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_engines_that_others_can_write_need_trust(folder: Path, trt: Any) -> None:
    built(folder)
    own = cache.engine_folder()
    own.chmod(0o777)
    kind = choose(folder=folder)
    assert kind.name == "onnxruntime" and "can be written by other users" in kind.reasons["tensorrt cuda"]
    assert choose(folder=folder, settings=Settings(trust_engine=True)).name == "tensorrt"
    with Sana.load(str(folder), backend="tensorrt", trust_engine=True) as sana:
        assert sana.generate(PROMPT, steps=1).metadata["backend"] == "tensorrt"


def test_another_model_precision_or_size(folder: Path, tmp_path: Path, trt: Any) -> None:
    built(folder, "--max", "512x512")
    with pytest.raises(InvalidInput, match=r"graphs' own fp32, not in bf16") as caught:
        Sana.load(str(folder), backend="tensorrt", dtype="bf16")
    assert "`sana-edge export MODEL --dtype bf16 --output DIR`, then `sana-edge build" in caught.value.hint
    with Sana.load(str(folder), backend="tensorrt") as sana:
        with pytest.raises(InvalidInput, match=r"size 640x128 is outside of .* 128x128 to 512x512") as caught:
            sana.generate(PROMPT, size=(640, 128))
        wider = caught.value.hint.partition("build it again: ")[2]
        assert wider.endswith(" --min 128x128 --opt 128x128 --max 640x512")
        assert sana.generate(PROMPT, steps=1).pixels.std() > 10
    # which helps
    assert main([*shlex.split(wider)[1:], "--quiet"]) == 0
    with Sana.load(str(folder), backend="tensorrt") as sana:
        assert sana.generate(PROMPT, steps=1, size=(640, 128)).pixels.std() > 10
    # the same graphs are the same model, wherever they lie
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert choose(folder=moved).name == "tensorrt"
    # and commands name the folder that is there
    for entry in cache.entries(cache.engine_folder()):
        entry.path.write_bytes(entry.path.read_bytes()[:-1])
    assert f"sana-edge build {moved} --output" in choose(folder=moved).reasons["tensorrt cuda"]
