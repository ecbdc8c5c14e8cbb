"""CPU threads: how many compute, how they wait, and what a fork leaves of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_edge import InvalidInput, Sana
from sana_edge.system import threads
from sana_edge.torch_runtime import device


def test_how_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert threads.cpu_threads(5) == 5 and threads.cpu_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 9}, raising=False)
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    monkeypatch.setattr(threads, "_CGROUP", tmp_path)
    # two cores of two hardware threads, and one that the system says nothing of
    for cpu, siblings in ((0, "0,2"), (2, "0,2"), (1, "1,3"), (3, "1,3")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert threads.cpu_threads() == 3
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert threads.cpu_threads() == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads.cpu_threads() == 3
    monkeypatch.delattr(threads.os, "sched_getaffinity")
    assert threads.cpu_threads() is None


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, "passive"),
        ({"OMP_WAIT_POLICY": "active"}, "active"),
        ({"GOMP_SPINCOUNT": "9"}, None),
        ({"KMP_BLOCKTIME": "200"}, None),
    ],
    ids=str,
)
def test_waiting_is_passive_unless_the_user_decided(given: dict[str, str], policy: str | None) -> None:
    environment = dict(given)
    threads.wait_passively(environment)
    assert environment.get("OMP_WAIT_POLICY") == policy


def test_the_command_waits_passively() -> None:
    code = "import os, sys; from sana_edge.cli.main import main; main(['models', 'list'])"
    code += "; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False passive", done.stderr


@pytest.mark.parametrize(("asked", "quota", "inside"), [(None, 64, 3), (None, 2, 2), (5, 1, 5), (1, 64, 1)])
def test_threads_of_torch(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, quota: int, inside: int
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(device, "quota", lambda: quota)
    try:
        torch.set_num_threads(3)
        with device.torch_threads(asked):
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_of_a_picture(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, before = [], torch.get_num_threads()
    with Sana.load(str(tiny_folder), threads=before + 2) as sana:
        loaded: Any = sana._runtime
        decode = loaded.autoencoder.decode

        def counted(latent: torch.Tensor) -> torch.Tensor:
            found.append(torch.get_num_threads())
            result: torch.Tensor = decode(latent)
            return result

        monkeypatch.setattr(loaded.autoencoder, "decode", counted)
        sana.generate("a red house", steps=1, size=(64, 64), exact_size=True)
    assert found == [before + 2] and torch.get_num_threads() == before


@pytest.mark.parametrize("count", [0, -1, 1025, 1.5, "2", True], ids=repr)
def test_numbers_that_are_none(count: Any) -> None:
    with pytest.raises(InvalidInput, match="threads is"):
        Sana.load(threads=count)


FORKED = """if True:
    import os, sys
    from sana_edge import Sana, SanaError
    model = sys.argv[1]
    sana = Sana.load(model)
    options = {"steps": 2, "size": (64, 64), "exact_size": True, "seed": 1}
    sana.generate("a red house", **options)
    stream = sana.stream("a red house", **options)
    next(stream)
    child = os.fork()
    if not child:
        calls = (lambda: sana.generate("x", **options), lambda: Sana.load(model), lambda: next(stream))
        for call in calls:
            try:
                call()
            except SanaError as error:
                print(error, error.hint)
        sana.close()
        sys.stdout.flush()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    list(stream)
    print(status, sana.generate("a red house", **options).pixels.shape)
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork")
def test_a_fork_is_told(tiny_folder: Path) -> None:
    """It does not hang, and the parent goes on."""
    command = [sys.executable, "-c", FORKED, str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    *told, last = done.stdout.splitlines()
    assert last == "0 (64, 64, 3)", done.stderr
    assert len(told) == 3
    assert all("forked from one that had loaded a model" in line and "spawn" in line for line in told)
