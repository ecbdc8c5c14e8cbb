"""Completion scripts, in the shells that are installed."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from sana_edge.cli.main import COMMANDS, main

Capture = pytest.CaptureFixture[str]

# what is typed, the last word half, and what it may become
CASES = [
    (["gen"], {"generate"}),
    (["generate", "--exa"], {"--exact-size"}),
    (["generate", "--sampler", "flow"], {"flow-dpm", "flow-euler"}),
    (["generate", "--model", "sana-tiny-int8-"], {"sana-tiny-int8-onnx"}),
    (["generate", "--decoder", "dc"], {"dc-ae-lite"}),
    (["models", "pu"], {"pull"}),
    (["completion", "f"], {"fish"}),
]


def script(shell: str, capsys: Capture) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def run(shell: str, code: str) -> set[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    plain = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run([shell, *plain, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return set(done.stdout.split("\n")) - {""}


@pytest.mark.parametrize(("words", "meant"), CASES, ids=[" ".join(words) for words, _ in CASES])
def test_bash(capsys: Capture, words: list[str], meant: set[str]) -> None:
    typed = " ".join(f"'{word}'" for word in ["sana-edge", *words])
    code = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _sana_edge; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    assert run("bash", f"{script('bash', capsys)}\n{code}") == meant


@pytest.mark.parametrize(("words", "meant"), CASES, ids=[" ".join(words) for words, _ in CASES])
def test_fish(capsys: Capture, words: list[str], meant: set[str]) -> None:
    found = run("fish", f"{script('fish', capsys)}\ncomplete -C 'sana-edge {' '.join(words)}'")
    # a tab, and what it does, follow each
    assert {line.partition("\t")[0] for line in found} == meant


def test_zsh(capsys: Capture) -> None:
    """Its completion needs a terminal: here only that the script is accepted and registers the command."""
    code = f"{script('zsh', capsys)}\nprint -r -- ${{_comps[sana-edge]}}"
    (registered,) = run("zsh", code)
    assert "_sana_edge" in registered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_how_to_use_it(capsys: Capture, shell: str) -> None:
    text = script(shell, capsys)
    assert text.startswith("# to use it: ") and all(name in text for name in COMMANDS)
