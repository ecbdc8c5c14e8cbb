"""`benchmarks/quality_engines.py`: torch and engines on the same INT8 model."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import quality_engines
from sana_edge.evaluate.judge.prompts import COUNTS
from sana_edge.export.settings import Settings
from sana_edge.image import Image as DrawnPicture
from sana_edge.int8 import matmul

onnx_export = pytest.importorskip("sana_edge.export.onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sana-tiny's INT8 package, exported."""
    folder: Path = tmp_path_factory.mktemp("exported") / "onnx"
    onnx_export.export("sana-tiny", folder, Settings(int8=True, verify=False))
    return folder


@pytest.mark.slow
def test_command(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    output, picture = tmp_path / "a.json", tmp_path / "a.png"
    given = ["--exported", str(exported), "--engines", "onnxruntime,onnxruntime:fp32", "--threads", "1"]
    given += ["--steps", "1", "--limit", "1", "--output", str(output), "--sheet", str(picture)]
    assert quality_engines.main(given) == 0
    assert os.environ["OMP_NUM_THREADS"] == "3"
    data = json.loads(output.read_text())
    engines = ["onnxruntime", "onnxruntime:fp32"]
    assert list(data["models"]) == ["torch", "torch static", *engines]
    assert data["models"]["torch"]["quantization"] == "w8a8, per token, calibrated"
    assert data["models"]["torch static"]["quantization"] == "w8a8, per tensor and token, calibrated"
    for name in engines:
        assert data["models"][name]["quantization"] == "w8a8, per tensor and token, calibrated"
        assert "onnxruntime" in data["models"][name]["engine"]
        assert "1 thread" in data["models"][name]["engine"]
    assert list(data["to_torch"]) == ["torch static", *engines]
    assert {"difference", "interval_95", "mcnemar_p", "only_torch"} <= data["to_torch"]["onnxruntime"].keys()
    assert [row["category"] for row in data["results"]] == list(COUNTS)
    assert data["settings"]["threads"] == 1 and str(tmp_path) not in output.read_text()
    alike = {(like["pictures"], like["to"]): like["psnr"]["median"] for like in data["likeness"]}
    assert list(alike) == [
        *((name, "torch") for name in ("torch static", *engines)),
        *((name, "torch static") for name in engines),
    ]
    # the scales are the graphs': an engine is nearer to torch with them than to torch with one for each token
    vnni = not (matmul.int8_refusal("cpu") and matmul.onednn_linear_refusal())
    for name in engines:
        assert alike["torch static", "torch"] > 20
        if vnni:
            assert alike[name, "torch static"] > alike["torch static", "torch"]
            assert alike[name, "torch static"] > alike[name, "torch"]
        else:
            # without VNNI onnxruntime takes other products: 45.3 dB here, 41.5 dB where they saturate
            assert alike[name, "torch static"] > 43
    yardstick = {like["pictures"]: like["to"] for like in data["yardstick"]["likeness"]}
    assert yardstick == {f"{name} bf16": name for name in ("float", "torch", "torch static")}
    assert data["yardstick"]["prompts"] == len(COUNTS)
    # a head, and three rows of two pairs and the two worst, each of three pictures
    assert Image.open(picture).size == (20 + 12 * 228, 104 + 3 * 336)
    printed = capsys.readouterr().out
    named = [line.split()[0] for line in printed.splitlines() if line.startswith(("torch", "onnx"))]
    assert named[:4] == ["torch", "torch", *engines]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_same_prompts_after_an_interruption(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was drawn before is not drawn again."""
    asked: list[str] = []
    drawn = {"model": "m", "dtype": "fp32", "backend": "b", "size": [128, 128], "steps": 1}
    drawn |= {"guidance": 4.5, "sampler": "flow-dpm"}

    class Drawing:
        """A model that draws one grey, stopped once at the seventh picture."""

        def __init__(self, level: int) -> None:
            self.pixels = np.full((128, 128, 3), level, np.uint8)

        def __enter__(self) -> Drawing:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def generate(self, prompt: str, **_: object) -> DrawnPicture:
            asked.append(prompt)
            if len(asked) == 7:
                raise KeyboardInterrupt
            return DrawnPicture(self.pixels, 0, drawn, {"denoise": 1.0})

    def torch(options: object, int8: bool = False, static: bool = False, dtype: str = "auto") -> Drawing:
        return Drawing(100)

    monkeypatch.setattr(quality_engines, "_torch", torch)
    monkeypatch.setattr(quality_engines, "_engine", lambda folder, name: Drawing(101))
    given = ["--exported", str(exported), "--engines", "onnxruntime", "--limit", "1", "--yardstick", "1"]
    given += ["--output", str(tmp_path / "a.json"), "--sheet", str(tmp_path / "a.png")]
    assert quality_engines.main(given) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert quality_engines.main(given) == 0
    first, second, third, *_ = (p.text for p in quality_engines.WORLD.choose(1).values())
    # three sources: two prompts were done, the third is drawn again
    assert asked[:10] == [first] * 3 + [second] * 3 + [third] + [third] * 3
    assert len(asked) == 7 + 4 * 3 + 6 * 6
    data = json.loads((tmp_path / "a.json").read_text())
    near = {(like["pictures"], like["to"]): like for like in data["likeness"]}
    # equal pictures, which have no PSNR, and an error of one level everywhere
    assert near["torch static", "torch"]["psnr"]["median"] is None
    assert near["torch static", "torch"]["equal"] == 6
    assert near["onnxruntime", "torch"]["psnr"]["median"] == round(20 * math.log10(255), 2)
    assert near["onnxruntime", "torch"]["near"] == 1.0
    assert {row["prompt"]: row["psnr"]["torch static to torch"] for row in data["results"]} == dict.fromkeys(
        [p.text for p in quality_engines.WORLD.choose(1).values()]
    )
    assert "equal" in capsys.readouterr().out


def test_a_folder_of_another_model(
    exported: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One with other weights, a float model, a folder that is none, and an engine that is none."""
    output = ["--output", str(tmp_path / "a.json")]
    folder = tmp_path / "onnx"
    onnx_export.export(str(tiny_folder), folder, Settings(verify=False))
    assert quality_engines.main(["--exported", str(folder), *output]) == 1
    captured = capsys.readouterr().err
    assert "was not exported from sana-tiny-int8" in captured and "export sana-tiny --int8" in captured
    assert quality_engines.main(["--exported", str(exported), "--model", str(tiny_folder), *output]) == 1
    assert "is no INT8 package" in capsys.readouterr().err
    assert quality_engines.main(["--exported", str(tiny_folder), *output]) == 1
    assert "manifest.json" in capsys.readouterr().err
    assert quality_engines.main(["--exported", str(exported), "--engines", "abacus", *output]) == 1
    assert "abacus" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()
