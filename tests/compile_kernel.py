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

import checkout

checkout.use()

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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        sass, usage = (dump(flag, file.name) for flag in ("-sass", "-res-usage"))
    return {"ptx": built.asm["ptx"], "sass": sass, "usage": usage, "shared": str(built.metadata.shared)}


def dump(flag: str, path: str) -> str:
    tool = [TOOLS / "cuobjdump", flag, path]
    return subprocess.run(tool, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
