"""Jobs from the queue to their end: order, cancellation, room for models, and what is kept of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from serving import FakeLoader, until

from sana_edge.errors import Cancelled, OutOfMemory, SanaError
from sana_edge.image import read_metadata
from sana_edge.request.request import Request
from sana_edge.serve import service as service_module
from sana_edge.serve import worker as worker_module
from sana_edge.serve.events import News
from sana_edge.serve.job import MAX_PREVIEWS, Job
from sana_edge.serve.queue import Closed, Queue, QueueFull
from sana_edge.serve.service import Service
from sana_edge.system import budget


def job(model: str = "one", preview: Any = lambda step, steps: False, **options: Any) -> Job:
    return Job(model, Request("a house", **{"seed": 7, "steps": 2, **options}), preview=preview)


def test_draws_every_picture_with_its_seed(service: Service) -> None:
    made = service.submit(job(images=3))
    assert made.wait(60) and made.state == "done" and made.error is None
    assert [picture.seed for picture in made.pictures] == [7, 8, 9]
    assert service.ended == {"done": 1} and service.pictures == {"one": 3}


def test_jobs_of_a_model_come_in_order(service: Service, loader: FakeLoader) -> None:
    loader.gate = threading.Semaphore(0)
    jobs = [service.submit(job(steps=1)) for _ in range(3)]
    until(lambda: jobs[0].state == "running")
    assert [one.stage.count for one in jobs[1:]] == [1, 2]
    for done in range(3):
        loader.gate.release()
        assert jobs[done].wait(60)
        assert [one.finished for one in jobs] == [True] * (done + 1) + [False] * (2 - done)


def test_who_sees_an_end_sees_what_follows_from_it() -> None:
    """It is counted, and makes room, before its worker has let go of it."""
    queue, first, second = Queue(0), job(), job()
    seen: list[tuple[bool, str]] = []
    first.on_end = lambda ended: seen.append((ended.finished, ended.state))
    queue.put(first)
    assert queue.take("one", 0) is first and queue.unfinished("one") == [first]
    with pytest.raises(QueueFull, match="1 jobs are unfinished"):
        queue.put(second)
    first.start()
    first.end()
    first.end(SanaError("too late"))
    assert seen == [(False, "done")] and first.state == "done"
    assert queue.running == 0 and queue.unfinished("one") == []
    queue.put(second)
    assert second.stage.count == 0
    queue.done(first)
    assert queue.take("one", 0) is second


def test_full_queue(service: Service, loader: FakeLoader) -> None:
    loader.gate = threading.Semaphore(0)
    for _ in range(3):
        service.submit(job())
    with pytest.raises(QueueFull, match="3 jobs are unfinished") as error:
        service.submit(job())
    assert error.value.retry_after >= 1
    loader.gate.release(100)
    until(lambda: not service.queue.running)
    assert service.submit(job()).wait(60)


def test_cancel_what_waits_and_what_is_drawn(service: Service, loader: FakeLoader) -> None:
    loader.gate = threading.Semaphore(0)
    first, second = service.submit(job()), service.submit(job())
    until(lambda: first.state == "running")
    service.cancel(second)
    assert second.finished and isinstance(second.error, Cancelled) and not second.pictures
    service.cancel(first)
    assert first.wait(60) and first.state == "cancelled"
    assert until(lambda: service.ended["cancelled"] == 2)
    # nothing happens to what has ended
    service.cancel(first)
    assert service.ended == {"cancelled": 2}


def test_another_model_takes_the_place_of_one_that_is_not_used(service: Service, loader: FakeLoader) -> None:
    loader.room = 1
    for model in ("one", "two", "one"):
        assert service.submit(job(model)).wait(60)
        assert loader.loaded == [model]
    assert loader.loads == 3


def test_models_stay_where_there_is_room(service: Service, loader: FakeLoader) -> None:
    for model in ("one", "two", "one", "two"):
        assert service.submit(job(model)).wait(60)
    assert sorted(loader.loaded) == ["one", "two"] and loader.loads == 2


def test_a_model_waits_for_the_one_that_draws(service: Service, loader: FakeLoader) -> None:
    """Whose place it needs."""
    loader.room, loader.gate = 1, threading.Semaphore(0)
    first = service.submit(job("one"))
    until(lambda: first.state == "running" and loader.loaded == ["one"])
    second = service.submit(job("two"))
    until(lambda: second.state == "running")
    assert loader.loaded == ["one"]
    loader.gate.release(100)
    assert first.wait(60) and second.wait(60)
    assert (first.state, second.state) == ("done", "done") and loader.loaded == ["two"]


def test_models_give_way_before_memory_runs_out(
    service: Service, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was used last is the last to go."""
    for model in ("two", "one"):
        assert service.submit(job(model)).wait(60)
    until(lambda: service.workers["one"].used)
    free = {2: 50, 1: 100, 0: 150}
    monkeypatch.setattr(worker_module, "available_memory", lambda: free[len(loader.loaded)])
    monkeypatch.setattr(loader, "size", lambda model: 100)
    assert service.submit(job("three")).wait(60)
    assert loader.loaded == ["one", "three"]


def test_models_give_way_within_a_budget(loader: FakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"one": "one", "two": "two"}
    monkeypatch.setattr(budget, "used_memory", lambda device: 100 * len(loader.loaded))
    monkeypatch.setattr(worker_module, "available_memory", lambda: 10_000)
    monkeypatch.setattr(loader, "size", lambda model: 100)
    for memory, left in ((199, ["two"]), (200, ["one", "two"])):
        service = Service(models, loader, memory=memory)
        for model in models:
            assert service.submit(job(model)).wait(60)
        assert loader.loaded == left
        service.close()


def test_a_picture_gets_the_room_of_other_models(service: Service, loader: FakeLoader) -> None:
    for model in ("one", "two"):
        assert service.submit(job(model)).wait(60)
    loader.models["one"].fails = [OutOfMemory("not enough memory for 64x64")]
    again = service.submit(job("one"))
    assert again.wait(60) and again.state == "done" and loader.loaded == ["one"]
    loader.models["one"].fails = [OutOfMemory("not enough memory for 64x64")]
    alone = service.submit(job("one"))
    assert alone.wait(60) and isinstance(alone.error, OutOfMemory)


def test_idle_model_is_let_go(loader: FakeLoader) -> None:
    service = Service({"one": "one"}, loader, idle=0.05)
    for loads in (1, 2):
        assert service.submit(job()).wait(60)
        until(lambda: not loader.loaded)
        assert loader.loads == loads and not service.workers["one"].loaded
    service.close()


@pytest.mark.parametrize("error", [SanaError("the numbers overflowed", "try bf16"), ValueError("a\nb")])
def test_a_failed_job_is_not_the_end(service: Service, loader: FakeLoader, error: Exception) -> None:
    assert service.submit(job()).wait(60)
    loader.models["one"].fails = [error]
    failed = service.submit(job())
    assert failed.wait(60) and failed.state == "failed" and failed.error is not None
    assert failed.error.message in ("the numbers overflowed", "ValueError: a b")
    # or it would keep what was being computed
    assert failed.error.__traceback__ is None
    after = service.submit(job())
    assert after.wait(60) and after.state == "done"


def test_previews_at_the_steps_that_were_asked_for(service: Service) -> None:
    made = service.submit(job(steps=6, images=2, preview=lambda step, steps: step % 2 == 0))
    assert made.wait(60)
    assert [(preview.picture, preview.step) for preview in made.previews] == [
        (picture, step) for picture in (0, 1) for step in (0, 2, 4)
    ]
    many = service.submit(job(steps=MAX_PREVIEWS + 3, preview=lambda step, steps: True))
    assert many.wait(60) and len(many.previews) == MAX_PREVIEWS
    assert many.previews[-1].number == MAX_PREVIEWS + 1


def test_a_preview_on_demand(service: Service, loader: FakeLoader) -> None:
    loader.gate = threading.Semaphore(0)
    made = service.submit(job(steps=4))
    made.preview_wanted = True
    loader.gate.release(2)
    until(lambda: made.stage.done == 2)
    assert [preview.step for preview in made.previews] == [0]
    loader.gate.release(9)
    assert made.wait(60) and len(made.previews) == 1


def test_a_reader_that_comes_late_has_all_pictures(service: Service) -> None:
    made = service.submit(job(images=2, preview=lambda step, steps: True))
    assert made.wait(60)
    news = News(made)
    assert [event["type"] for event in news.take()] == ["progress", *["preview"] * 2, *["image"] * 2, "done"]
    assert news.over and news.take() == []


def test_time_that_is_left(service: Service, loader: FakeLoader) -> None:
    """From the times of a picture of that size: 0.1 s of steps and as much of decoding."""
    assert service.submit(job()).wait(60)
    loader.gate = threading.Semaphore(0)
    until(lambda: not service.queue.running)
    waiting = service.submit(job(steps=4, images=2))
    assert waiting.seconds_left == pytest.approx(2 * (4 * 0.05 + 0.1))
    for one in loader.models.values():
        one.gate = loader.gate
    loader.gate.release()
    until(lambda: waiting.stage.done == 1)


def test_kept_pictures(tmp_path: Path, loader: FakeLoader) -> None:
    service = Service({"one": "one"}, loader, keep=tmp_path)
    made = service.submit(job(images=2))
    assert made.wait(60)
    files = sorted(tmp_path.iterdir(), key=lambda path: path.stem.rpartition("-")[2])
    assert [read_metadata(path)["seed"] for path in files] == [7, 8]
    assert [path.read_bytes() for path in files] == [picture.data for picture in made.pictures]
    service.close()


def test_a_folder_that_is_gone_is_no_reason_to_lose_the_picture(tmp_path: Path, loader: FakeLoader) -> None:
    file = tmp_path / "file"
    file.touch()
    service = Service({"one": "one"}, loader, keep=file)
    made = service.submit(job())
    assert made.wait(60) and made.state == "done" and len(made.pictures) == 1
    service.close()


def test_finished_jobs_are_forgotten(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    made = service.submit(job(), keep=True)
    assert made.wait(60) and service.find(made.id) is made
    monkeypatch.setattr(service_module, "KEPT_BYTES", made.size)
    newer = service.submit(job(), keep=True)
    assert newer.wait(60)
    assert service.find(made.id) is None and service.find(newer.id) is newer
    monkeypatch.setattr(service_module, "KEPT_SECONDS", -1.0)
    assert service.kept() == []


def test_the_end_is_told_to_all(loader: FakeLoader) -> None:
    service = Service({"one": "one"}, loader)
    loader.gate = threading.Semaphore(0)
    first, second = service.submit(job()), service.submit(job())
    until(lambda: first.state == "running")
    assert service.close()
    assert isinstance(first.error, Cancelled) and isinstance(second.error, Closed)
    assert not loader.loaded
    with pytest.raises(Closed):
        service.submit(job())


def test_names_of_kept_variations(tmp_path: Path, loader: FakeLoader) -> None:
    """Whose seed is the same."""
    service = Service({"one": "one"}, loader, keep=tmp_path)
    assert service.submit(job(variations=2)).wait(60)
    assert sorted(path.stem[-4:] for path in tmp_path.iterdir()) == ["-7-8", "-7-9"]
    service.close()
