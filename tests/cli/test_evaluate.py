"""``sana-edge evaluate``: the bundled model without torch on three prompts, and what is refused at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from sana_edge.cli.main import main
from sana_edge.store.known_models import BUNDLED

Capture = pytest.CaptureFixture[str]
MODEL = "sana-tiny-int8-onnx"


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_bundled_model_against_another(cwd: Path, capsys: Capture) -> None:
    """The same graphs in another folder: equal pictures."""
    shutil.copytree(BUNDLED / MODEL, cwd / "other")
    (cwd / "other" / "NOTE.txt").write_text("another folder")
    words = [
        "evaluate",
        MODEL,
        "--against",
        "other",
        "--prompts",
        "sana-tiny",
        "--limit",
        "2",
        "--steps",
        "2",
    ]
    words += ["--metrics", "psnr", "--json", "numbers.json"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == [
        *("2", "prompts", MODEL, "other", "difference", "95", "%", "interval", "p"),
    ]
    assert out.splitlines()[-1].startswith(f"What other in place of {MODEL} cost, over 2 prompts: ")
    assert "pictures are equal to the last bit." in out
    assert f"pictures and results: {MODEL}-evaluation" in err
    facts = json.loads((cwd / "numbers.json").read_text())
    assert facts["metrics"]["psnr"]["equal"] == 2
    assert facts == json.loads((cwd / f"{MODEL}-evaluation" / "results.json").read_text())
    pictures = sorted((cwd / f"{MODEL}-evaluation").glob("*/*.png"))
    assert len(pictures) == 4 and Image.open(pictures[0]).size == (256, 256)
    # again nothing is drawn, and what is printed is the same
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr() == (out, "")
    assert main([*words, "--quiet", "--seed", "5"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "seed was 0, and is 5" in err and "--force" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--metrics", "clip,fidd"], "unknown metric 'fidd'"),
        (["--metrics", "judge"], "metric judge cannot be measured here"),
        (["--metrics", "psnr"], "metric psnr cannot be measured here"),
        (["--metrics", "fid"], "metric fid cannot be measured here"),
        (["--metrics", "fid", "--reference", "none"], "no folder none"),
        (["--limit", "0"], "limit is 0"),
        (["--steps", "0"], "steps is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--seed", str(2**63 - 1)], "seed is 9223372036854775808"),
        (["--size", "9x99999"], "size 9x99999 is too large"),
        (["--int8"], "is an exported folder, which is float or INT8 as it was made"),
        (["--int8", "--against", "sana-tiny"], "there are two comparisons"),
        (["--against", MODEL], "are the same model"),
        (["--against", "sana-tny"], "unknown model 'sana-tny'"),
        (["--metrics", "clip", "--clip", "none"], "'none' is no folder"),
        (["--json", "none/x.json"], "cannot write none/x.json"),
        (["--json", "."], "cannot write .: Is a directory"),
        (["--threads", "0"], "threads is 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(
    cwd: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.setattr("sana_edge.evaluate.clip.find_spec", lambda name: True)
    (cwd / "prompts.txt").write_text("a red house\na blue boat\n")
    assert main(["evaluate", MODEL, "--prompts", "prompts.txt", "--quiet", *arguments]) == 1
    assert says in capsys.readouterr().err
    assert [path.name for path in cwd.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize(
    ("model", "prompts", "says"),
    [
        ("sana-tny", "sana-tiny", "unknown model 'sana-tny'"),
        (MODEL, "empty.txt", "empty.txt has no prompts"),
        (MODEL, "none.txt", "no prompt file none.txt"),
        (MODEL, "genEval2", "did you mean geneval? give a file of prompts, geneval or sana-tiny"),
        (MODEL, "numbers.bin", "is not a text file"),
        (MODEL, "prompts.jsonl", "cannot read the prompts in prompts.jsonl: No such file"),
    ],
)
def test_bad_models_and_prompts(cwd: Path, capsys: Capture, model: str, prompts: str, says: str) -> None:
    (cwd / "empty.txt").write_text("# nothing\n\n")
    (cwd / "numbers.bin").write_bytes(bytes(9))
    assert main(["evaluate", model, "--prompts", prompts, "--quiet"]) == 1
    assert says in capsys.readouterr().err


def test_an_int8_package_has_no_float(cwd: Path, capsys: Capture) -> None:
    assert main(["evaluate", "sana-tiny-int8", "--int8", "--prompts", "sana-tiny", "--quiet"]) == 1
    assert "sana-tiny-int8 is INT8 already" in capsys.readouterr().err


@pytest.mark.slow
def test_float_and_int8_with_a_clip(cwd: Path, capsys: Capture) -> None:
    """sana-tiny on two prompts, with a CLIP of the real class and random weights."""
    pytest.importorskip("torchmetrics", exc_type=Exception)
    from tiny_clip import write_clip

    write_clip(cwd / "clip")
    words = ["evaluate", "sana-tiny", "--int8", "--prompts", "geneval", "--limit", "2", "--steps", "2"]
    assert main([*words, "--clip", "clip", "--output", "out", "--quiet"]) == 0
    out, _ = capsys.readouterr()
    assert "arXiv 2410.10629, Table 5" in out and "CLIP score" in out and "PSNR" in out
    assert out.splitlines()[-1].startswith("What INT8 cost, over 2 prompts: ")
    assert (cwd / "out" / "worst.png").exists()
