"""Workers of Ray: nothing lost and nothing twice, whoever dies; with a stand-in, and with Ray where it is."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_ray import FakeRay
from stand_in import StandInSana

from sana_edge import Sana, SanaError, generate_many
from sana_edge.cli.main import main
from sana_edge.errors import MissingDependency, ModelNotFound
from sana_edge.request.loading import LoadOptions
from sana_edge.series.cluster import Cluster
from sana_edge.series.series import Drawn

LINES = [
    {"prompt": "a house", "seed": 1, "images": 6},
    "a boat",
    "a star",
    "a cat",
    {"prompt": "b", "images": 3},
]
COUNT = 12
Patch = pytest.MonkeyPatch


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(Sana, "load", lambda model, **options: StandInSana())
    return ray


def draw(folder: Path, **options: Any) -> list[Drawn]:
    with Cluster("stand-in", **{"workers": 2, **options}) as cluster:
        return list(generate_many(cluster, LINES, folder, seed=50))


def check(folder: Path, found: list[Drawn]) -> None:
    """All are there, each drawn once."""
    assert sorted(drawn.index for drawn in found) == list(range(1, COUNT + 1))
    assert not any(drawn.error for drawn in found)
    assert len(list(folder.glob("*.png"))) == COUNT
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert len({entry["file"] for entry in lines[1:]}) == len(lines) - 1 == COUNT


def test_two_workers(tmp_path: Path, ray: FakeRay) -> None:
    check(tmp_path, draw(tmp_path))
    assert len(ray.actors) == 2 and ray.started is None
    assert ray.asked == {"num_cpus": 2, "max_restarts": 0, "max_task_retries": 0}
    assert [options.threads for options in ray.options] == [2, 2]


def test_nothing_is_told_to_anybody(ray: FakeRay) -> None:
    with Cluster("stand-in"):
        assert ray.started is not None
        assert (ray.started["include_dashboard"], ray.started["_node_ip_address"]) == (False, "127.0.0.1")
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_the_program_s_way_of_ending_stays(ray: FakeRay, monkeypatch: Patch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    before = signal.getsignal(signal.SIGTERM)
    with Cluster("stand-in"):
        assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("call", range(1, 14))
def test_a_worker_that_dies_at_any_time(tmp_path: Path, ray: FakeRay, call: int) -> None:
    """Also while it loads."""
    ray.dies = lambda number: number == call
    check(tmp_path, draw(tmp_path))
    assert len(ray.actors) == 2 + (ray.calls >= call)


def test_each_third_call_kills(tmp_path: Path, ray: FakeRay) -> None:
    ray.dies = lambda number: number % 3 == 0
    check(tmp_path, draw(tmp_path, batch=2))


def test_pictures_that_kill_workers_fail(
    tmp_path: Path, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fake_ray import Actor

    plain = Actor._call

    def call(self: Actor, name: str, arguments: tuple[Any, ...]) -> Any:
        if name == "draw" and any(picture.index == 4 for picture in arguments[0]):
            ray.dies = lambda number: True
        try:
            return plain(self, name, arguments)
        finally:
            ray.dies = lambda number: False

    monkeypatch.setattr(Actor, "_call", call)
    found = draw(tmp_path)
    failed = [drawn for drawn in found if drawn.error]
    assert [drawn.index for drawn in failed] == [4] and len(found) == COUNT
    assert failed[0].error == "its worker died 3 times: The actor died: SIGKILL."


def test_workers_that_all_die(tmp_path: Path, ray: FakeRay) -> None:
    ray.dies = lambda number: True
    with pytest.raises(SanaError, match="7 workers died in a row: The actor died"):
        draw(tmp_path)
    assert not ray.is_initialized()


def test_a_model_that_no_machine_has(tmp_path: Path, ray: FakeRay, monkeypatch: Patch) -> None:
    def missing(model: str, **options: Any) -> None:
        raise ModelNotFound("unknown model", "pull it")

    monkeypatch.setattr(Sana, "load", missing)
    with pytest.raises(SanaError, match="unknown model"):
        draw(tmp_path)


def test_a_machine_that_lacks_the_model(
    tmp_path: Path, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets no work; the other draws all."""
    answers = iter([False, True])

    def load(model: str, **options: Any) -> StandInSana:
        if next(answers):
            return StandInSana()
        raise ModelNotFound("unknown model", "pull it")

    monkeypatch.setattr(Sana, "load", load)
    check(tmp_path, draw(tmp_path))


@pytest.mark.parametrize(
    ("resources", "workers", "count", "asked"),
    [
        ({"CPU": 2.0}, 3, 3, {"num_cpus": 0.666}),
        ({"CPU": 8.0, "GPU": 2.0}, None, 2, {"num_gpus": 1.0, "num_cpus": 0}),
        ({"CPU": 8.0, "GPU": 1.0}, 2, 2, {"num_gpus": 0.5, "num_cpus": 0}),
        ({"CPU": 8.0}, None, 1, {"num_cpus": 8}),
    ],
)
def test_shares(
    ray: FakeRay, resources: dict[str, float], workers: int | None, count: int, asked: dict[str, float]
) -> None:
    ray.resources = resources
    with Cluster("stand-in", LoadOptions(int8=True), workers=workers):
        assert len(ray.actors) == count and asked.items() <= ray.asked.items()


def test_a_program_keeps_its_own_connection(tmp_path: Path, ray: FakeRay) -> None:
    ray.init()
    check(tmp_path, draw(tmp_path))
    assert ray.is_initialized() and all(actor.dead for actor in ray.actors)


def test_left_in_the_middle(tmp_path: Path, ray: FakeRay) -> None:
    with Cluster("stand-in", workers=2) as cluster:
        drawing = generate_many(cluster, LINES, tmp_path / "a", seed=50)
        next(drawing)
        del drawing
        check(tmp_path / "b", list(generate_many(cluster, LINES, tmp_path / "b", seed=50)))


def test_ray_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency) as caught:
        Cluster("sana-tiny")
    assert caught.value.hint == "pip install 'sana-edge[ray]'"
    (tmp_path / "p.txt").write_text("a house")
    assert main(["generate", "--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path), "--ray"]) == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_a_local_cluster_one_of_whose_workers_is_killed(tmp_path: Path) -> None:
    """By SIGKILL, as the kernel does where memory runs out; pictures are those that one process draws."""
    import psutil

    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, options = "sana-tiny-int8-onnx", {"steps": 2, "size": (64, 64), "exact_size": True}
    found: list[Drawn] = []
    with Cluster(model, workers=2) as cluster:
        for drawn in generate_many(cluster, LINES, tmp_path, seed=50, **options):
            found.append(drawn)
            if len(found) == 3:
                below = psutil.Process().children(recursive=True)
                workers = [p for p in below if "ray::Worker" in " ".join(p.cmdline())]
                assert len(workers) == 2
                workers[0].send_signal(signal.SIGKILL)
    check(tmp_path, found)
    with Sana.load(model) as sana:
        for drawn in found:
            alone = sana.generate(**{**drawn.options, "size": (64, 64)})
            assert drawn.path.read_bytes() == alone.png()
