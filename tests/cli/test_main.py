"""The command line: what goes to stdout and stderr, exit codes, and that nothing heavy is imported early."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image as PILImage

import sana_edge
from sana_edge import read_metadata
from sana_edge.cli.main import main

Capture = pytest.CaptureFixture[str]
PROMPT = "a red house"


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def generate(model: Path, *arguments: str) -> int:
    return main(["generate", "--prompt", PROMPT, "--steps", "1", "--model", str(model), *arguments])


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_default_output_is_named_after_the_seed(cwd: Path, tiny_folder: Path, capsys: Capture) -> None:
    assert generate(tiny_folder, "--seed", "7") == 0
    out, err = capsys.readouterr()
    assert out == "sana-7.png\n"
    assert err.startswith("128x128, seed 7, torch: text ") and err.count("\n") == 1
    metadata = read_metadata("sana-7.png")
    assert (metadata["prompt"], metadata["seed"], metadata["model"]) == (PROMPT, 7, "tiny")


def test_a_random_seed_is_reported(cwd: Path, tiny_folder: Path, capsys: Capture) -> None:
    assert generate(tiny_folder) == 0 and generate(tiny_folder) == 0
    names = capsys.readouterr().out.split()
    assert len(set(names)) == 2
    for name in names:
        assert name == f"sana-{read_metadata(name)['seed']}.png"


def test_json_line_is_enough_to_make_it_again(cwd: Path, tiny_folder: Path, capsys: Capture) -> None:
    changed = ["--negative-prompt", "日本 🏠", "--guidance", "3", "--size", "96x128"]
    assert generate(tiny_folder, *changed, "--json") == 0
    line = json.loads(capsys.readouterr().out)
    made = line.pop("path")
    assert PILImage.open(made).size == (96, 128)
    assert line.pop("timings").keys() == {"text", "denoise", "decode"}
    peak = line.pop("peak_memory")
    assert peak is None or peak > 1_000_000
    assert line.pop("notes") == []
    assert line.pop("version") == sana_edge.__version__
    assert line.pop("model") == "tiny"
    line["size"] = "{}x{}".format(*line["size"])
    again = [f"--{key.replace('_', '-')}={value}" for key, value in line.items()]
    assert len(again) == 9 and "--backend=torch" in again
    assert main(["generate", *again, "--model", str(tiny_folder), "--output", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path(made).read_bytes()


@pytest.mark.parametrize(
    ("output", "images", "names"),
    [
        ("house.png", 1, ["house.png"]),
        ("house.png", 2, ["house-4.png", "house-5.png"]),
        ("{seed}_x.PNG", 2, ["4_x.PNG", "5_x.PNG"]),
        (".", 2, ["sana-4.png", "sana-5.png"]),
    ],
    ids=["file", "files", "pattern", "folder"],
)
def test_output_names(
    cwd: Path, tiny_folder: Path, capsys: Capture, output: str, images: int, names: list[str]
) -> None:
    assert generate(tiny_folder, "--output", output, "--images", str(images), "--seed", "4", "--quiet") == 0
    out, err = capsys.readouterr()
    assert (out.split(), err) == (names, "")
    assert sorted(os.listdir(cwd)) == names


def test_force_replaces(cwd: Path, tiny_folder: Path, capsys: Capture) -> None:
    Path("a.png").write_bytes(b"old")
    assert generate(tiny_folder, "--output", "a.png", "--force") == 0
    assert read_metadata("a.png")["prompt"] == PROMPT


def test_a_bar_only_on_a_terminal(
    cwd: Path, tiny_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for terminal, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", terminal)
        assert generate(tiny_folder, "--seed", "1", "--force") == 0
        assert ("1/1" in terminal.getvalue()) == shown
        assert capsys.readouterr().out == "sana-1.png\n"


def test_notes_are_shown_unless_quiet(cwd: Path, tiny_folder: Path, capsys: Capture) -> None:
    long = ["generate", "--prompt", "house " * 2000, "--steps", "1", "--model", str(tiny_folder)]
    assert main(long) == 0 and "note:  the prompt is too long" in capsys.readouterr().err
    assert main([*long, "--quiet"]) == 0 and capsys.readouterr().err == ""


def test_traceback_only_with_verbose(cwd: Path, capsys: Capture) -> None:
    assert main(["generate", "--prompt", "x", "--model", "nothing"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main(["generate", "--prompt", "x", "--model", "nothing", "-v"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "error: unknown model 'nothing'" in err


SIGNALS = [
    *(pytest.param(getattr(signal, name), marks=pytest.mark.slow) for name in ("SIGINT", "SIGHUP")),
    signal.SIGTERM,
]


@pytest.mark.parametrize("sent", SIGNALS)
def test_an_interruption_exits_with_130_and_leaves_no_file(
    cwd: Path, tiny_folder: Path, sent: signal.Signals
) -> None:
    command = [sys.executable, "-m", "sana_edge", "generate", "--prompt", "x", "--steps", "1000", "-v"]
    with subprocess.Popen(
        [*command, "--model", str(tiny_folder), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background of a shell ignores Ctrl-C, and so would its children
        preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGHUP)],
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if "loaded tiny" in line:
                break
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.endswith("interrupted\n") and "Traceback" not in err
    assert os.listdir(cwd) == []


def test_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"sana-edge {version('sana-edge')}\n"


def test_help_shows_every_default(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    options = re.findall(r" (--[a-z-]+) (?=[A-Z{])", text.split("options:")[1])
    assert {"--size", "--seed", "--output", "--dtype", "--sampler"} <= set(options)
    assert text.count("(default: ") == len(options) - 1, "every option with a value but --prompt"


def test_help_of_engines(capsys: Capture) -> None:
    """What `build` makes, `generate` runs."""
    for command in (["build"], []):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "build TensorRT engines of an exported folder" in text and "cannot" not in text
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--engines DIR" in text and "--trust-engine" in text and "onnxruntime's own TensorRT" in text


@pytest.mark.parametrize(
    "arguments", [[], ["paint"], ["generate"], ["models", "burn"], ["models", "list", "sana-tiny"]], ids=str
)
def test_usage_errors_exit_with_2(capsys: Capture, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: sana-edge")


def test_nothing_heavy_is_imported_early(tmp_path: Path) -> None:
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'httpx'}"
    check = f"assert not {heavy} & set(sys.modules), sys.modules.keys()"
    run = "import sys\nfrom sana_edge.cli.main import main\n"
    run += "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    assert python(f"import sys, sana_edge; {check}").stderr == ""
    for arguments in (["--help"], ["generate", "--help"], ["--version"]):
        result = python(run + check, *arguments)
        assert (result.returncode, result.stderr) == (0, "")
    # a wrong value is found before torch is loaded
    result = python(run + check, "generate", "--prompt", "x", "--size", "0x100")
    assert result.returncode == 0 and result.stderr.startswith("error: size 0x100")


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_what_to_install_where_torch_is_missing(tmp_path: Path, tiny_folder: Path, missing: str) -> None:
    hide = f"import sys; sys.modules[{missing!r}] = None; from sana_edge.cli.main import main; "
    hide += "sys.exit(main(sys.argv[1:]))"
    output = str(tmp_path / "a.png")
    result = python(hide, "generate", "--prompt", "x", "--model", str(tiny_folder), "--output", output)
    assert (result.returncode, result.stdout) == (1, "")
    # a slow machine says what it is at, before
    *_, first, second = result.stderr.splitlines()
    assert first.startswith("error: ") and first.endswith(f"this needs {missing}, which is not installed")
    assert second.startswith("hint: ") and second.endswith("pip install 'sana-edge[torch]'")
    assert python(hide, "models").returncode == 0
    assert "not installed" in python(hide, "doctor").stdout


def test_models(capsys: Capture) -> None:
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out == listed
    assert re.search(r"^sana-0\.6b-1024 +public .*/Sana_600M_1024px_diffusers \[1\]$", listed, re.MULTILINE)
    assert "\n[1] licence: " in listed
    # what is to be downloaded, decoders too
    assert re.search(r"^dc-ae-lite +decoder +(not here, 1\.7 GB|\d+ MB) +mit-han-lab/", listed, re.MULTILINE)
    assert main(["models", "pull"]) == 1
    assert "no model to pull" in capsys.readouterr().err


def test_a_name_that_the_terminal_cannot_show(cwd: Path, tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "sana_edge", "generate", "--prompt", "x", "--steps", "1", "--quiet"]
    command += ["--model", str(tiny_folder), "--output", "é.png"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    result = subprocess.run(command, capture_output=True, timeout=120, check=False, env=environment)
    assert (result.returncode, result.stdout.split(), result.stderr) == (0, [rb"\xe9.png"], b"")
    assert os.listdir(cwd) == ["é.png"]


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "sana_edge", "models"], stdout=write, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(write)
    assert (result.returncode, result.stderr) == (1, b"")


def test_models_pull_prints_where_it_is(tiny_folder: Path, capsys: Capture) -> None:
    assert main(["models", "pull", str(tiny_folder)]) == 0
    assert capsys.readouterr().out == f"{tiny_folder}\n"


def test_doctor(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert f"sana-edge {sana_edge.__version__}" in out and "torch cpu" in out
    assert err == ""


def test_convert_reports_errors(cwd: Path, capsys: Capture) -> None:
    Path("broken.pth").write_bytes(b"no checkpoint")
    for name, message in (
        ("broken.pth", "cannot read broken.pth"),
        ("missing.pth", "missing.pth is no file"),
    ):
        assert main(["convert", name, "--output", "model"]) == 1
        assert message in capsys.readouterr().err
    assert os.listdir(cwd) == ["broken.pth"]


def test_public_names() -> None:
    assert {"Sana", "Image", "Step", "SanaError", "__version__"} <= set(dir(sana_edge))
    for name in sana_edge.__all__:
        assert getattr(sana_edge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Sauna'"):
        _ = sana_edge.Sauna
