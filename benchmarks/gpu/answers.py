"""csrc/example.c and csrc/known_answers.c, built and run, by themselves or under compute-sanitizer's tools.

Needs neither torch nor an installed sana-edge: a C compiler, and nvcc for its headers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.steps import Setting
from harness import ROOT
from sana_edge.bench.results import write_json
from sana_edge.errors import SanaError, UnsupportedDevice

CSRC = ROOT / "csrc"
PROGRAMS = ("example", "known_answers")
TOOL = "compute-sanitizer"
# what the tool says where it cannot watch this device, or this kind of machine
REFUSALS = ("Device not supported", "device is not supported", "Unable to find", "No attachable process")
FOUND = 9


def build(library: Path, folder: Path, emulated: bool) -> list[Path]:
    """The programs.

    Raises:
        SanaError: no compiler, or what it says.
    """
    compiler = shutil.which("cc" if emulated else "nvcc")
    if compiler is None:
        raise UnsupportedDevice("there is no nvcc", "this step needs it for the headers of CUDA's runtime")
    folder.mkdir(parents=True, exist_ok=True)
    place = f"-Wl,-rpath,{library.parent}"
    flags = (
        ["-DEMULATED", place, "-lm"]
        if emulated
        else ["-Xlinker", place.removeprefix("-Wl,").replace(",", "=")]
    )
    programs = []
    for name in PROGRAMS:
        programs.append(folder / name)
        command = [compiler, str(CSRC / f"{name}.c"), "-I", str(CSRC), str(library), "-o", str(programs[-1])]
        done = subprocess.run([*command, *flags], capture_output=True, text=True)
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr)
            raise SanaError(f"{name}.c does not build", "the compiler's words are above")
    return programs


def watched(program: Path, tool: str, emulated: bool) -> dict[str, Any]:
    """One program under one tool, "" for none."""
    row: dict[str, Any] = {"program": program.name, "tool": tool}
    prefix: list[str] = []
    if tool and not emulated:
        found = shutil.which(TOOL)
        if found is None:
            return {**row, "status": "refused", "said": f"{TOOL} is not installed"}
        prefix = [found, "--tool", tool, "--error-exitcode", str(FOUND)]
    done = subprocess.run([*prefix, str(program)], capture_output=True, text=True)
    text = (done.stdout + done.stderr).strip()
    print(f"{program.name} {tool}\n{text}", flush=True)
    refused = next((line for line in text.splitlines() if any(said in line for said in REFUSALS)), "")
    if tool and refused and done.returncode:
        return {**row, "status": "refused", "said": refused.strip("= ")}
    status = "passed" if done.returncode == 0 else "failed"
    return {**row, "status": status, "code": done.returncode, "said": text.splitlines()[-1:] or [""]}


def check(setting: Setting, output: Path, tools: str = "") -> None:
    """All programs by themselves, or under all ``tools``; writes as it goes.

    Raises:
        SanaError: one failed; a refusal by the tool is none.
    """
    rows: list[dict[str, Any]] = []
    for program in build(setting.built, setting.scratch / output.stem, setting.dry):
        for tool in tools.split(","):
            rows.append(watched(program, tool, setting.dry))
            write_json(output, {"figure": _figure(rows), "runs": rows})
    if any(row["status"] == "failed" for row in rows):
        raise SanaError(_figure(rows), "the log has what was said")


def _figure(rows: Sequence[dict[str, Any]]) -> str:
    failed = [f"{row['program']} {row['tool']}".strip() for row in rows if row["status"] == "failed"]
    if failed:
        return f"failed: {', '.join(failed)}"
    refused = [row for row in rows if row["status"] == "refused"]
    clean = f"{len(rows) - len(refused)} of {len(rows)} clean"
    return f"{clean}, {len(refused)} refused: {refused[0]['said']}" if refused else clean
