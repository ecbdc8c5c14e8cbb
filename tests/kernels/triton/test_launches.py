"""Every Triton kernel that the products launch compiles, fits a block's shared memory and spills nothing.

`triton_launches` runs the callers. The Triton that is found compiles: CONTRIBUTING says how to take another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from sana_edge.config import DenoiserConfig

ROOT = Path(__file__).parents[3]
SUPPORT = ROOT / "tests" / "support"
# the public models' shapes, and the one in the repository
BIG = DenoiserConfig()
SMALL = DenoiserConfig(
    num_attention_heads=36,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
)
TINY = DenoiserConfig.from_dict(
    json.loads((ROOT / "sana_edge/models/sana-tiny/transformer/config.json").read_text())
)
NORMED = "rms_norm_across_heads"
CONFIGS = {
    "1.6b": BIG,
    "1.5, sprint 1.6b": replace(BIG, qk_norm=NORMED),
    "2k": replace(BIG, interpolation_scale=1.0),
    "0.6b": SMALL,
    "sprint 0.6b": replace(SMALL, qk_norm=NORMED),
    "sana-tiny": TINY,
}
# with guidance, its negative prompt empty and folded; with another; without; without and empty
TEXTS = (["constant", "keys"], ["keys", "keys"], ["keys"], ["constant"])
# fp16 is always clamped
DTYPES = (("float16", False), ("bfloat16", True), ("bfloat16", False))
PICTURES = [1, 2, 3, 4]
# cells of 512 to 2048 pixels in steps of 32; Triton sees their product, and which sides divide by 16
CELLS = range(16, 65)
SIZES = list({(h * w, h % 16 == 0, w % 16 == 0): [h, w] for h, w in product(CELLS, CELLS)}.values())
# whole and broken tiles of every kind, for what does not depend on the size
FEW = [[16, 16], [17, 17], [32, 33]]
# multiprocessors of small and large devices of a capability
PROCESSORS = {80: [56, 108], 86: [16, 82], 89: [20, 76, 128], 90: [114, 132], 120: [26, 82, 170]}
# KiB that a block can have (CUDA C++ Programming Guide, technical specifications)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
# bytes of a thread that may wait on the stack where residual and constant meet, see test_triton_w8a8_linear;
# more with the layout of 9.0's sums
STACK = {80: 64, 86: 64, 89: 64, 90: 576, 120: 64}


def form(config: DenoiserConfig, text: list[str], dtype: str = "bfloat16", clamp: bool = False,
         static: bool = False) -> dict[str, Any]:  # fmt: skip
    return {"config": config.to_dict(), "text": text, "dtype": dtype, "clamp": clamp, "static": static}


def launches(cache: Path, **request: Any) -> list[dict[str, Any]]:
    asked = {"processors": [76], "pictures": PICTURES, "trained": [], "compiled": None, **request}
    done = subprocess.run(
        [sys.executable, SUPPORT / "triton_launches.py"],
        input=json.dumps(asked),
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def _triton() -> tuple[int, ...]:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


def check(rows: list[dict[str, Any]], capability: int) -> None:
    failed = [row for row in rows if "error" in row]
    assert not failed, f"{len(failed)} of {len(rows)}: {failed[0]['launch']}\n{failed[0]['error']}"
    for row in rows:
        assert row["shared"] <= SHARED[capability] << 10, row
        # of the Triton that constraints.txt has; 3.6 puts up to 104 bytes of some products on the stack
        if _triton() < (3, 7):
            continue
        met = "'PER_TOKEN'" in row["launch"] and "'p_constant': None" not in row["launch"]
        assert 0 <= row["stack"] <= (STACK[capability] if met else 0), row


def test_a_sample_compiles(tmp_path: Path) -> None:
    """A product with a folded negative prompt whose tiles reach into several pictures."""
    pytest.importorskip("triton", reason="triton is not installed")
    asked = {"capability": 89, "forms": [form(TINY, TEXTS[0])], "sizes": [[17, 17]], "pictures": [1]}
    rows = launches(tmp_path, **asked, compiled="'PER_TOKEN': True")
    assert len(rows) == 1
    check(rows, 89)


@pytest.mark.slow
@pytest.mark.parametrize("capability", PROCESSORS)
def test_all_compile(tmp_path: Path, capability: int) -> None:
    """All forms at few sizes, and of the form that launches most one size of each class of all of them."""
    pytest.importorskip("triton", reason="triton is not installed")
    everything = [
        form(config, text, *dtype, static)
        for config, text, dtype, static in product(CONFIGS.values(), TEXTS, DTYPES, (False, True))
    ]
    trained = [
        {"dtype": dtype, "size": [2, 8, 8], "channels": 192, "heads": 6, "hidden": 480}
        for dtype in ("float32", "bfloat16", "float16")
    ]
    widest = [form(config, TEXTS[0], *dtype) for config in CONFIGS.values() for dtype in DTYPES[::2]]
    asked = {"capability": capability, "processors": PROCESSORS[capability], "trained": trained}
    rows = launches(tmp_path, **asked, forms=everything, sizes=FEW, widest=widest, classes=SIZES)
    # every kernel that a step or a training launches
    assert len({row["launch"].partition(" ")[0] for row in rows}) >= 11
    check(rows, capability)


@pytest.mark.parametrize("script", ["compile_kernel", "triton_launches"])
def test_the_checkout_is_compiled(tmp_path: Path, script: str) -> None:
    """Another installation of the package comes first on the path and is not taken."""
    pytest.importorskip("triton", reason="triton is not installed")
    installed = tmp_path / "sana_edge"
    installed.mkdir()
    (installed / "__init__.py").write_text("raise ImportError('the installed package')")
    code = f"import {script}, sana_edge.kernels; print(sana_edge.kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=SUPPORT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == ROOT / "kernels/__init__.py"
