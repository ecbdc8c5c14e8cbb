"""Other projects that draw with the same weights: what each is, and the environment that it runs in.

An environment is a folder with the Python that runs this, in which a peer's packages lie over those of this
Python: torch, diffusers and transformers are the same for all, unless a peer asks for others. Torch is held
to the release that is installed, its build (``+cpu``) included, so that no other is fetched.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.results import BASELINE, COMPILED, HALF, INT8, OURS, Say
from sana_edge.bench.machine import versions
from sana_edge.errors import SanaError

# seconds, of packages that are fetched
LIMIT = 1200
SCRIPT = Path(__file__).with_name("peer_process.py")
# what an environment holds, written last
_DONE = "made.json"


@dataclass(frozen=True)
class Peer:
    """How a contender draws.

    by: a name that `peer_process` knows; dtype: of its floats; packages: what its environment has beyond
    this one; made: the folder that it is loaded from is made first; form: of this project's, "float", "int8"
    or "onnx".
    """

    by: str
    dtype: str = "float32"
    packages: tuple[str, ...] = ()
    int8: bool = False
    made: bool = False
    form: str = "float"
    backend: str = "auto"


SDNQ = ("sdnq==0.2.8",)
OPTIMUM = ("optimum-intel[openvino]==2.2.0",)
PEERS = {
    BASELINE: Peer("diffusers"),
    HALF: Peer("diffusers", "bfloat16"),
    COMPILED: Peer("compiled"),
    "sdnq int8": Peer("sdnq", packages=SDNQ),
    "sdnq int8 bf16": Peer("sdnq", "bfloat16", packages=SDNQ),
    "bitsandbytes int8": Peer("bitsandbytes", packages=("bitsandbytes==0.50.2",)),
    "torchao int8": Peer("torchao", packages=("torchao==0.18.0",)),
    "optimum-intel": Peer("optimum", packages=OPTIMUM, made=True),
    "optimum-intel int8": Peer("optimum", packages=OPTIMUM, made=True, int8=True),
    OURS: Peer("sana-edge"),
    INT8: Peer("sana-edge", form="int8", int8=True),
    "openvino int8": Peer("sana-edge", form="onnx", int8=True, backend="openvino"),
    "openvino int8 bf16": Peer("sana-edge", "bfloat16", form="onnx", int8=True, backend="openvino"),
}
"""By the names that results have; the last four are this project's."""


def environment(packages: tuple[str, ...], scratch: Path, say: Say) -> Path:
    """The Python of an environment with these packages, made in ``scratch`` where it is missing.

    Raises:
        SanaError: it cannot be made; with pip's last words.
    """
    if not packages:
        return Path(sys.executable)
    held = [f"{name}=={found}" for name in ("torch", "torchvision") if (found := versions(name)[name])]
    facts = {"packages": packages, "python": sys.version, "held": held, "above": _above()}
    known = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    folder = scratch.absolute() / "environments" / known
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if (folder / _DONE).exists():
        return python
    say(f"making an environment with {', '.join(packages)}")
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    _lay_over(folder)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(held) + "\n", encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-input", *packages]
    _ran([*install, "--constraint", str(constraints)])
    (folder / _DONE).write_text(json.dumps(facts), encoding="utf-8")
    return python


def _above() -> list[str]:
    """Folders of packages that this Python has."""
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


def _lay_over(folder: Path) -> None:
    """Let an environment find this Python's packages behind its own."""
    purelib = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (purelib / "above.pth").write_text("\n".join(_above()) + "\n", encoding="utf-8")


def _ran(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise SanaError(f"pip took more than {LIMIT} s", "look at the connection") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no reason given"]
        raise SanaError(f"pip: {errors[-1].removeprefix('ERROR: ')}", "install it by hand to see why")


def job(peer: Peer, **settings: Any) -> dict[str, Any]:
    """What `peer_process` reads; ``settings`` are those that all contenders share."""
    named = {"by": peer.by, "dtype": peer.dtype, "int8": peer.int8, "backend": peer.backend}
    if peer.by == OURS:
        named["dtype"] = {"float32": "fp32", "bfloat16": "bf16"}[peer.dtype]
    return {**named, "variant": None, "make": None, "made": None, **settings}
