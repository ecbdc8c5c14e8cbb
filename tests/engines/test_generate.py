"""From an exported folder to a PNG in a process that has neither torch nor transformers, and wrong pairs."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PILImage

from sana_edge import (
    Cancelled,
    CheckpointError,
    InvalidInput,
    ModelNotFound,
    Sana,
    SanaError,
    Step,
    read_metadata,
)
from sana_edge.cli.main import main
from sana_edge.export.settings import Settings

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
onnx_export = pytest.importorskip("sana_edge.export.onnx", reason="onnx is not installed")

Capture = pytest.CaptureFixture[str]
PROMPT = "a red house left of a yellow star"
TORCH = ("torch", "transformers", "diffusers", "onnx")

# a process that lacks what it is told, as a fresh environment would
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
sys.meta_path.insert(0, Blocked())
from sana_edge.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def without(*modules: str, arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, ",".join(modules), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def assert_same_picture(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> None:
    """fp32 in both: a level moves where a value lies within the rounding of its edge, and by one."""
    assert ours.shape == theirs.shape and theirs.std() > 10
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sana-tiny, exported."""
    return _exported("sana-tiny", tmp_path_factory.mktemp("exported") / "onnx")


@pytest.fixture(scope="module")
def exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _exported(str(tiny_folder), tmp_path_factory.mktemp("exported") / "tiny-onnx")


def _exported(model: str, folder: Path) -> Path:
    onnx_export.export(model, folder, Settings(verify=False))
    return folder


@pytest.fixture(scope="module")
def engine(exported: Path) -> Any:
    with Sana.load(exported, backend="onnxruntime", device="cpu") as sana:
        yield sana


@pytest.fixture(scope="module")
def sana(tiny_folder: Path) -> Any:
    with Sana.load(str(tiny_folder), device="cpu") as sana:
        yield sana


def test_the_command_line_without_torch(bundled: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["generate", "--model", str(bundled), "--prompt", PROMPT, "--seed", "7", "--json"]
    command += ["--backend", "onnxruntime", "--device", "cpu", "--output", str(tmp_path / "a.png")]
    start = time.perf_counter()
    done = without(*TORCH, arguments=command)
    with capsys.disabled():
        print(f"\n  sana-tiny without torch, process start to PNG: {time.perf_counter() - start:.1f} s")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("256x256, seed 7, onnxruntime: text ")
    line = json.loads(done.stdout)
    with Sana.load("sana-tiny", device="cpu") as torch:
        expected = torch.generate(PROMPT, seed=7)
    assert_same_picture(np.asarray(PILImage.open(tmp_path / "a.png")), expected.pixels)
    metadata = read_metadata(tmp_path / "a.png")
    assert metadata == {**expected.metadata, "backend": "onnxruntime"}
    assert line.pop("path") == str(tmp_path / "a.png") and line.pop("notes") == []
    assert line.pop("timings").keys() == {"text", "denoise", "decode"} and line.pop("peak_memory") != 0
    assert line == metadata


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_every_engine_without_torch(exported: Path, sana: Sana, tmp_path: Path, name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed")
    command = [
        "generate",
        "--model",
        f"{exported}{os.sep}",
        "--prompt",
        PROMPT,
        "--seed",
        "3",
        "--steps",
        "2",
    ]
    command += ["--backend", name, "--device", "cpu", "--dtype", "fp32", "--output", str(tmp_path / "a.png")]
    done = without(*TORCH, arguments=command)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'a.png'}\n"), done.stderr
    expected = sana.generate(PROMPT, seed=3, steps=2)
    assert_same_picture(np.asarray(PILImage.open(tmp_path / "a.png")), expected.pixels)
    assert read_metadata(tmp_path / "a.png") == {**expected.metadata, "backend": name}


@pytest.mark.parametrize("options", [(), ("--int8",), ("--model", "sana-tiny-int8-onnx")], ids=str)
def test_the_bundled_model_without_torch(tmp_path: Path, options: tuple[str, ...]) -> None:
    """What `pip install 'sana-edge[onnx]'` draws: the graphs in the package, and it says so."""
    output = ["--seed", "7", "--steps", "2", "--output", str(tmp_path / "a.png"), *options]
    done = without(*TORCH, arguments=["generate", "--prompt", PROMPT, *output])
    assert done.returncode == 0, done.stderr
    metadata = read_metadata(tmp_path / "a.png")
    assert (metadata["model"], metadata["backend"]) == ("sana-tiny-int8", "onnxruntime")
    said = "note:  sana-tiny-int8-onnx, its exported INT8 package, stands in for sana-tiny: this needs torch"
    assert (said in done.stderr) == ("--model" not in options)
    with Sana.load("sana-tiny-int8-onnx", device="cpu", backend="onnxruntime") as graphs:
        expected = graphs.generate(PROMPT, seed=7, steps=2)
    assert np.array_equal(np.asarray(PILImage.open(tmp_path / "a.png")), expected.pixels)


def test_the_bundled_model_on_an_engine(tmp_path: Path) -> None:
    """Who asks for an engine and INT8 gets the graphs; for torch's backends torch is missing."""
    with Sana.load("sana-tiny", int8=True, backend="onnxruntime") as sana:
        assert sana.generate(PROMPT, steps=1).metadata["backend"] == "onnxruntime"
    output = ["--prompt", PROMPT, "--output", str(tmp_path / "a.png"), "--backend", "torch"]
    done = without(*TORCH, arguments=["generate", *output])
    assert done.returncode == 1 and "pip install 'sana-edge[torch]'" in done.stderr


CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "negative prompt": {"negative_prompt": "a blurred green fish"},
    "no guidance": {"guidance": 1.0, "negative_prompt": "ignored"},
    "wide": {"size": (160, 96)},
    "euler": {"sampler": "flow-euler"},
    "cut": {"prompt": "house " * 1667},
    "odd": {"prompt": "lone \udcff surrogate 日本 🏠"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_pictures_and_notes_equal_torch(engine: Sana, sana: Sana, options: dict[str, Any]) -> None:
    options = {"prompt": PROMPT, "seed": 7, "steps": 3, **options}
    found, expected = (one.generate(**options) for one in (engine, sana))
    assert_same_picture(found.pixels, expected.pixels)
    assert found.notes == expected.notes
    assert found.metadata == {**expected.metadata, "backend": "onnxruntime"}


def test_sprint_equals_torch(tiny_sprint_folder: Path, tmp_path: Path) -> None:
    """Its sampler draws noise at every step."""
    folder = _exported(str(tiny_sprint_folder), tmp_path / "sprint")
    with Sana.load(str(folder), backend="onnxruntime") as ours, Sana.load(str(tiny_sprint_folder)) as theirs:
        for options in ({}, {"steps": 4, "guidance": 3.0, "size": (96, 128)}):
            found, expected = (one.generate(PROMPT, seed=7, **options) for one in (ours, theirs))
            assert_same_picture(found.pixels, expected.pixels)


def test_stream_preview_cancel_and_several_images(engine: Sana) -> None:
    images = engine.generate(PROMPT, seed=7, steps=2, images=2)
    assert [image.seed for image in images] == [7, 8]
    assert engine.generate(PROMPT, seed=8, steps=2).png() == images[1].png()
    previews = [step.preview() for step in engine.stream(PROMPT, seed=7, steps=2)]
    assert np.array_equal(previews[-1], images[0].pixels)
    cancel = threading.Event()

    def on_step(step: Step) -> None:
        cancel.set()

    with pytest.raises(Cancelled):
        engine.generate(PROMPT, steps=3, on_step=on_step, cancel=cancel)
    assert engine.native_size == (128, 128) and engine.peak_memory != 0


def test_an_engine_that_fails_leaves_a_model_that_works(
    engine: Sana, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sana_edge.errors import OutOfMemory

    before = engine.generate(PROMPT, seed=1, steps=1)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(OutOfMemory, match="128x128"):
        patched.setattr(engine._runtime, "decode", fail)
        engine.generate(PROMPT, seed=1, steps=1)
    assert engine._runtime is not None and not engine._runtime.graphs._engines
    assert engine.generate(PROMPT, seed=1, steps=1).png() == before.png()


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_closing_frees_the_engines(exported: Path, name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed")
    gc.disable()
    try:
        with Sana.load(str(exported), backend=name, device="cpu") as sana:
            loaded: Any = sana._runtime
            sana.generate(PROMPT, seed=7, steps=1)
            assert len(loaded.graphs.loaded) == 4
        assert loaded.graphs.loaded == ()
        # nothing refers to itself
        alive = weakref.ref(loaded)
        del loaded
        assert alive() is None
    finally:
        gc.enable()


def test_closing_during_a_stream(exported: Path) -> None:
    sana = Sana.load(str(exported), backend="onnxruntime", device="cpu")
    loaded: Any = sana._runtime
    later = sana.stream(PROMPT, seed=7, steps=1)
    with closing(sana.stream(PROMPT, seed=7, steps=2)) as steps:
        next(steps)
        before = loaded.graphs.loaded
        sana.close()
        sana.close()
        assert loaded.graphs.loaded == before != ()
        # nothing was loaded again for it
        assert next(steps).image is not None and loaded.graphs.loaded == before
    assert loaded.graphs.loaded == ()
    # one that had not begun is no worse off, and leaves nothing behind either
    assert [step.image is not None for step in later] == [True]
    assert loaded.graphs.loaded == ()
    with pytest.raises(SanaError, match="this Sana is closed"):
        sana.stream(PROMPT)


def test_closing_while_another_thread_waits(exported: Path) -> None:
    """Its picture was asked for before: it is made, and whoever is last frees the engines."""
    sana = Sana.load(str(exported), backend="onnxruntime", device="cpu")
    loaded: Any = sana._runtime
    expected, found = sana.generate(PROMPT, seed=7, steps=1).png(), []
    waiting = threading.Thread(target=lambda: found.append(sana.generate(PROMPT, seed=7, steps=1).png()))
    with closing(sana.stream(PROMPT, steps=2)) as steps:
        next(steps)
        waiting.start()
        waiting.join(0.3)
        sana.close()
    waiting.join(60)
    assert found == [expected] and loaded.graphs.loaded == ()


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_an_exported_folder_on_a_backend_for_models(exported: Path, backend: str) -> None:
    with pytest.raises(InvalidInput, match=f"backend {backend} runs models, .* is an exported") as caught:
        Sana.load(str(exported), backend=backend)
    assert caught.value.hint == "choose tensorrt, onnxruntime, openvino or auto"


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime", "openvino"])
def test_a_model_on_an_engine(tiny_folder: Path, backend: str) -> None:
    for model in ("sana-tiny", str(tiny_folder)):
        with pytest.raises(InvalidInput, match=f"backend {backend} runs exported folders") as caught:
            Sana.load(model, backend=backend)
        assert caught.value.hint.startswith(f"`sana-edge export {model} --output onnx`")
        assert ("`sana-edge build onnx`" in caught.value.hint) == (backend == "tensorrt")


def test_devices_that_do_not_suit(exported: Path, tiny_folder: Path) -> None:
    with pytest.raises(InvalidInput, match="device npu is for exported folders") as caught:
        Sana.load(str(tiny_folder), device="npu")
    assert "choose auto, cpu, cuda" in caught.value.hint and "export" in caught.value.hint
    with pytest.raises(InvalidInput, match="unknown device 'tpu'"):
        Sana.load(str(exported), device="tpu")
    with pytest.raises(InvalidInput, match="unknown backend 'abacus'"):
        Sana.load(str(exported), backend="abacus")
    with pytest.raises(InvalidInput, match="onnxruntime does not run on device npu"):
        Sana.load(str(exported), backend="onnxruntime", device="npu")
    with pytest.raises(InvalidInput, match="unknown precision 'int4'"):
        Sana.load(str(exported), dtype="int4")


def test_a_name_goes_before_a_folder(tiny_folder: Path, exported: Path, tmp_path: Path) -> None:
    """A folder that is called like a bundled model is given as ./sana-tiny, as with models."""
    shutil.copytree(exported, tmp_path / "sana-tiny")
    code = "from sana_edge.store import hub; print(hub.exported('sana-tiny'), hub.exported('./sana-tiny'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "None sana-tiny\n", done.stderr


def test_damaged_folders(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "onnx"))
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*manifest.json"):
        Sana.load(str(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"onnx has ONNX graphs, but their manifest.json is missing"):
        Sana.load(str(folder))


def test_one_file_of_a_folder(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said without torch and the network, where the folder would work."""
    monkeypatch.chdir(exported)
    for name in (exported / "denoiser.onnx", exported / "manifest.json", "denoiser.onnx"):
        with pytest.raises(ModelNotFound, match="is one file of an exported folder") as caught:
            Sana.load(str(name))
        assert caught.value.hint == f"give the folder: {Path(name).parent}"
    alone = Path(shutil.copy(exported / "denoiser.onnx", tmp_path))
    with pytest.raises(ModelNotFound, match="is no whole model: it is an ONNX graph") as caught:
        Sana.load(str(alone))
    assert "a folder that `sana-edge export " in caught.value.hint
    command = ["generate", "--model", str(alone), "--prompt", PROMPT, "--output", str(tmp_path / "a.png")]
    done = without(*TORCH, arguments=command)
    assert done.returncode == 1 and "it is an ONNX graph" in done.stderr


def test_what_only_models_can_do(exported: Path, tmp_path: Path, capsys: Capture) -> None:
    for command in ("export", "quantize"):
        assert main([command, str(exported), "--output", str(tmp_path / "out")]) == 1
        assert "it is an exported folder, which `sana-edge generate` runs" in capsys.readouterr().err


def test_errors_without_torch_name_the_extra(exported: Path, tiny_folder: Path, tmp_path: Path) -> None:
    output = ["--prompt", PROMPT, "--output", str(tmp_path / "a.png")]
    done = without(*TORCH, arguments=["generate", "--model", str(tiny_folder), *output])
    assert done.returncode == 1 and done.stderr.endswith("or pip install 'sana-edge[torch]'\n")
    # a name that there is not is said before torch is missed
    done = without(*TORCH, arguments=["generate", "--model", "Sana_600M_512px", *output])
    assert done.returncode == 1 and "did you mean sana-0.6b-512?" in done.stderr
    command = ["generate", "--model", str(exported), *output]
    done = without(*TORCH, "onnxruntime", "openvino", arguments=command)
    assert done.returncode == 1 and "is not installed" in done.stderr, done.stderr
    assert "pip install 'sana-edge[" in done.stderr and "Traceback" not in done.stderr
    for backend, extra in (("onnxruntime", "onnx"), ("openvino", "openvino")):
        done = without(*TORCH, backend, arguments=[*command, "--backend", backend])
        assert done.returncode == 1 and f"{backend} is not installed" in done.stderr
        assert f"pip install 'sana-edge[{extra}]'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_engine_is_made_up_for(exported: Path, tmp_path: Path) -> None:
    """auto takes what is there."""
    output = ["--prompt", PROMPT, "--steps", "1", "--output", str(tmp_path / "a.png")]
    for missing, there in (("openvino", "onnxruntime"), ("onnxruntime", "openvino")):
        pytest.importorskip(there, reason=f"{there} is not installed")
        command = ["generate", "-v", "--force", "--model", str(exported), *output]
        done = without(*TORCH, missing, arguments=command)
        assert done.returncode == 0, done.stderr
        assert read_metadata(tmp_path / "a.png")["backend"] == there
    assert "backend onnxruntime cpu is not used: onnxruntime is not installed" in done.stderr
    done = without(*TORCH, arguments=command)
    assert read_metadata(tmp_path / "a.png")["backend"] == "onnxruntime"
    assert "on onnxruntime 1." in done.stderr
    assert "backend openvino cpu is not used: onnxruntime starts faster with a small model" in done.stderr


def test_a_wrong_size_costs_nothing(exported: Path) -> None:
    with Sana.load(str(exported), backend="onnxruntime") as engine, pytest.raises(SanaError, match="100x100"):
        engine.stream(PROMPT, size=(100, 100), exact_size=True)
