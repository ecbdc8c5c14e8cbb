"""Pipes and devices that never end, streams that are closed, Ctrl-C while the program is still starting."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sana_edge.calib.prompts import load_prompts
from sana_edge.cli.main import main
from sana_edge.errors import InvalidInput, SanaError
from sana_edge.image import read_metadata
from sana_edge.init_image import read_image
from sana_edge.request.bounds import MAX_PROMPT
from sana_edge.request.request import Request
from sana_edge.store import domain, folder, hub, manifest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs pipes by name, and signals")
COMMAND = [sys.executable, "-m", "sana_edge"]


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A pipe that nobody writes to."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_prompts_of_a_pipe_or_a_device(pipe: Path) -> None:
    for path in (pipe, Path("/dev/zero"), Path("/dev/stdin"), Path("/proc/self/mem")):
        with pytest.raises(InvalidInput):
            load_prompts(path)


@pytest.mark.parametrize(
    "name",
    [
        *("model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json"),
        *("scheduler/scheduler_config.json", "tokenizer/tokenizer.json"),
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_pipes_in_a_model_folder(tiny_folder: Path, tmp_path: Path, pipe: Path, name: str) -> None:
    """Links to one, as an archive may bring them."""
    import shutil

    from sana_edge import Sana

    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    (model / name).unlink()
    (model / name).symlink_to(pipe)
    with pytest.raises(SanaError):
        Sana.load(str(model))


def test_a_decoder_that_is_a_pipe(tiny_folder: Path, pipe: Path) -> None:
    from sana_edge import Sana

    with pytest.raises(SanaError):
        Sana.load(str(tiny_folder), decoder=str(pipe))


def test_pipes_in_other_folders(tmp_path: Path, pipe: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    for name in ("manifest.json", "tokenizer/domain.json", "model_index.json"):
        (tmp_path / name).symlink_to(pipe)
    for read in (manifest.read, domain.read_domain, lambda f: folder.read_json(f / "model_index.json")):
        with pytest.raises(SanaError):
            read(tmp_path)
    assert manifest.format_of(tmp_path) is None
    with pytest.raises(SanaError):
        hub.resolve(str(tmp_path))


def test_pictures_that_are_pipes_or_devices(pipe: Path) -> None:
    from sana_edge.training.imagefolder import open_picture

    for path in (pipe, Path("/dev/zero")):
        for read in (read_metadata, read_image, open_picture):
            with pytest.raises((SanaError, ValueError), match="no regular file"):
                read(path)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_a_prompt_of_ten_million_characters(name: str) -> None:
    with pytest.raises(InvalidInput, match="has 10000000 characters") as caught:
        Request(**{"prompt": "a", name: "a" * 10_000_000})
    assert caught.value.hint == f"give at most {MAX_PROMPT}"
    Request("a " * (MAX_PROMPT // 2))


@pytest.mark.parametrize("seconds", [0.01, 0.05, 0.1, 0.2, 0.4])
def test_ctrl_c_while_starting(tmp_path: Path, seconds: float) -> None:
    """Not while Python itself starts, which has no handler of ours."""
    # says when it begins
    code = "import sys; from sana_edge import __main__; sys.argv[:] = ['sana-edge', 'models', 'list']; "
    code += "print(1, flush=True); sys.exit(__main__.main())"
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(seconds)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert "Traceback" not in err
    assert child.returncode in (0, 130, -signal.SIGINT)


@pytest.mark.parametrize(
    "closed",
    ["2>&-", *(pytest.param(one, marks=pytest.mark.slow) for one in (">&-", "<&-")), "<&- >&- 2>&-"],
)
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    command = f"{sys.executable} -m sana_edge generate 'a red house' --steps 1 --output a.png {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / "a.png").is_file()


QUICK = [("models pull nobody --json", ">/dev/full"), ("--help", "| true")]
SAID = ("--help", "models list", "models pull nobody --json", "paint", "generate x --steps 1 --output -")
PLACES = (">/dev/full", ">/dev/full 2>&1", "| true", "2>&1 | true")


@pytest.mark.parametrize(
    ("words", "place"),
    [
        pytest.param(words, place, marks=[] if (words, place) in QUICK else pytest.mark.slow)
        for words in SAID
        for place in PLACES
    ],
)
def test_what_is_said_cannot_be_written(tmp_path: Path, words: str, place: str) -> None:
    """A full disk is said where it can be; a reader that has gone is not."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs a device that is full")
    command = f"set -o pipefail; {sys.executable} -m sana_edge {words} {place}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode in ((0, 1, 2) if "|" in place else (1, 2))
    assert not re.search("Traceback|Exception ignored|with -v", done.stderr), done.stderr
    if place == ">/dev/full" and words != "paint":
        assert "cannot write what is said: No space left on device\nhint:  the disk is full" in done.stderr


@pytest.mark.parametrize("words", ["models list", "paint"])
@pytest.mark.parametrize("place", ["1</dev/null", "1</dev/null 2</dev/null"])
def test_streams_that_were_opened_for_reading(tmp_path: Path, words: str, place: str) -> None:
    command = f"{sys.executable} -m sana_edge {words} {place}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert not re.search("Traceback|Exception ignored|with -v", done.stderr), done.stderr
    if words == "models list" and "2<" not in place:
        assert done.stderr.startswith("error: cannot write what is said: Bad file descriptor\nhint:  it was")


def test_the_current_folder_is_gone(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    command = f"cd {tmp_path}/here; rmdir ../here; {sys.executable} -m sana_edge generate a --steps 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: cannot write sana-"), done.stderr


def test_no_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("sana_edge.cli.plan.run", refuse)
    assert main(["plan"]) == 1
    assert re.search("error: No usable .*\nhint:  .*TMPDIR", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("variable", "library"), [("HF_HUB_ETAG_TIMEOUT", "huggingface_hub"), ("TQDM_MININTERVAL", "tqdm")]
)
def test_variables_that_a_library_cannot_read(tmp_path: Path, variable: str, library: str) -> None:
    words = {"tqdm": ["generate", "a", "--steps", "1"]}.get(library, ["models", "list"])
    environment = {**os.environ, variable: "abc"}
    done = subprocess.run([*COMMAND, *words], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert re.match(f"error: cannot load {library}: ValueError.*\nhint:  see the variables", done.stderr)
