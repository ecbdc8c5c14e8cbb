"""The Node side of the Electron example, by Node's own test runner, with the real sidecar."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import MODEL, write_command

from sana_edge.store.known_models import BUNDLED


@pytest.mark.slow
def test_node_side(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    write_command(tmp_path, "--model", str(BUNDLED / MODEL))
    environment = {**os.environ, "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])}
    command = [node, "--test", str(Path(__file__).with_name("electron.test.js"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:]
