"""Compiles a Triton kernel for a GPU that need not be there: a request in JSON on stdin, its code on stdout.

A process of its own, since the tests' process has Triton's interpreter in place of its compiler.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# the checkout's package, whatever is installed; the root does not stay on the path, see CONTRIBUTING
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sana_edge  # noqa: F401

sys.path.pop(0)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def main() -> int:
    request = json.load(sys.stdin)
    kernel = getattr(importlib.import_module(request["module"]), request["kernel"])
    constexprs = request["constexprs"]
    kinds = {**request["signature"], **dict.fromkeys(constexprs, "constexpr")}
    # a launch learns the same of torch's tensors: their addresses are multiples of 16
    known = {name for name, kind in kinds.items() if kind.startswith("*")} | set(request["multiples"])
    built = triton.compile(
        ASTSource(
            fn=kernel,
            signature={name: kinds[name] for name in kernel.arg_names},
            constexprs=constexprs,
            attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in known},
        ),
        target=GPUTarget("cuda", request["capability"], 32),
        options=request["options"],
    )
    json.dump(code(built), sys.stdout)
    return 0


def code(built: Any) -> dict[str, str]:
    """PTX, machine code, the line that tells registers and stack, and bytes of shared memory."""
    shared = str(built.metadata.shared)
    return {"ptx": built.asm["ptx"], "sass": dump("-sass", built), "usage": usage(built), "shared": shared}


def usage(built: Any) -> str:
    """The line that tells registers and stack of a thread."""
    return dump("-res-usage", built)


def dump(flag: str, built: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        tool = [TOOLS / "cuobjdump", flag, file.name]
        return subprocess.run(tool, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
