"""ImageReward (Xu et al. 2023, arXiv 2304.05977) through its package, in a process of its own.

The package needs a transformers older than the one here: its Python may be another environment's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

from sana_edge.errors import MissingDependency, ModelNotFound, SanaError
from sana_edge.progress import Progress

FOLDER = Path("~/.cache/ImageReward")
"""Where the package keeps what it downloads."""
FILES = ("ImageReward.pt", "med_config.json")
_INSTALL = "in an environment of its own, whose Python --imagereward-python names: pip install image-reward"
_INSTALL += " clip-anytorch setuptools 'transformers<4.50' 'diffusers<0.33'"
# what is computed there: the package prints to stdout, which is kept for the scores
_PROGRAM = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import ImageReward
model = ImageReward.load(sys.argv[1], med_config=sys.argv[2])
for line in sys.stdin:
    path, text = json.loads(line)
    print(json.dumps(float(model.score(text, path))), file=answers, flush=True)
"""


def find_image_reward(python: str | None) -> Path:
    """The folder of its weights.

    Raises:
        SanaError: they are not there, or the package is not, in this Python.
    """
    if python is None and find_spec("ImageReward") is None:
        raise MissingDependency("ImageReward needs image-reward, which is not installed", _INSTALL)
    folder = FOLDER.expanduser()
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        hint = "`ImageReward.load('ImageReward-v1.0')` in its Python downloads them, once"
        raise ModelNotFound(f"the weights of ImageReward are not here: no {folder / missing[0]}", hint)
    return folder


def image_rewards(
    folder: Path, paths: Sequence[Path], texts: Sequence[str], tell: Progress, python: str | None = None
) -> list[float]:
    """Of each picture and its own prompt, about -2 to 2; nothing is downloaded.

    Raises:
        SanaError: the package cannot be imported, or broke off; the message has its last line.
    """
    command = [python or sys.executable, "-c", _PROGRAM, *(str(folder / name) for name in FILES)]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **offline},
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise SanaError(
            f"cannot start {command[0]}: {error}", "give a Python with --imagereward-python"
        ) from error
    last: deque[str] = deque(maxlen=1)
    asking = Thread(target=_ask, args=(process, paths, texts), daemon=True)
    listening = Thread(target=_listen, args=(process, last), daemon=True)
    found: list[float] = []
    try:
        for thread in (asking, listening):
            thread.start()
        for line in process.stdout or ():
            found.append(float(json.loads(line)))
            tell("ImageReward", len(found), len(paths))
        process.wait()
        listening.join(1)
    finally:
        process.kill()
        process.wait()
    if len(found) != len(paths):
        raise SanaError(f"ImageReward broke off: {last[0] if last else 'without a word'}", _INSTALL)
    return found


def _ask(process: subprocess.Popen[str], paths: Sequence[Path], texts: Sequence[str]) -> None:
    assert process.stdin is not None
    try:
        for path, text in zip(paths, texts, strict=True):
            process.stdin.write(json.dumps([str(path.resolve()), text]) + "\n")
        process.stdin.close()
    except OSError:
        # it ended; what it said last is reported
        pass


def _listen(process: subprocess.Popen[str], last: deque[str]) -> None:
    for line in process.stderr or ():
        if line.strip():
            last.append(line.strip())
