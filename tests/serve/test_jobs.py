"""The face for applications: jobs, their events, their pictures, their end."""

from __future__ import annotations

import base64
import io
import threading
from urllib.parse import quote

import PIL.Image
import pytest
from serving import SMALL, Client, FakeLoader, until

from sana_edge.serve.service import Service


def test_a_job_from_its_beginning_to_its_end(real: Client) -> None:
    body = {**SMALL, "steps": 4, "size": "64x64", "images": 2, "preview_every": 2, "output_format": "jpeg"}
    answer = real.post("/v1/jobs", body)
    job = answer.json
    assert answer.status == 202 and job["seed"] == 7
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    events = real.get(f"/v1/jobs/{job['id']}/events").events
    kinds = [kind for kind, _ in events]
    assert kinds.count("preview") == 2 and kinds.count("image") == 2 and kinds[-1] == "done"
    assert events[0][1]["type"] == "progress" and kinds.index("progress") < kinds.index("preview")
    images = [content for kind, content in events if kind == "image"]
    assert [image["seed"] for image in images] == [7, 8]
    assert all(image["metadata"]["steps"] == 4 and image["timings"]["denoise"] > 0 for image in images)
    after = real.get(f"/v1/jobs/{job['id']}?pictures=1").json
    assert after["state"] == "done" and after["seconds_left"] is None and "error" not in after
    for image, picture in zip(images, after["pictures"], strict=True):
        found = real.get(picture["url"])
        assert found.headers["content-type"] == "image/jpeg"
        assert found.body == base64.b64decode(picture["b64_json"]) == base64.b64decode(image["b64_json"])
    assert job["id"] in [one["id"] for one in real.get("/v1/jobs").json["jobs"]]


def test_seconds_that_are_left(real: Client) -> None:
    """Known once a picture of that size was drawn."""
    for _ in range(2):
        job = real.post("/v1/jobs", {**SMALL, "size": "96x64", "steps": 4}).json
        real.get(f"/v1/jobs/{job['id']}/events")
    again = real.post("/v1/jobs", {**SMALL, "size": "96x64", "steps": 4}).json
    assert real.post("/v1/estimate", {**SMALL, "size": "96x64", "steps": 8}).json["seconds"] > 0
    assert real.post("/v1/estimate", {**SMALL, "size": "32x64"}).json == {"seconds": None}
    assert again["seconds_left"] > 0
    progress = [
        content["seconds_left"]
        for kind, content in real.get(f"/v1/jobs/{again['id']}/events").events
        if kind == "progress" and content["stage"] == "denoise"
    ]
    assert progress == sorted(progress, reverse=True)


def test_a_random_seed_is_told(real: Client) -> None:
    body = {name: value for name, value in SMALL.items() if name != "seed"}
    job = real.post("/v1/jobs", {**body, "size": "32x32"}).json
    real.get(f"/v1/jobs/{job['id']}/events")
    assert real.get(f"/v1/jobs/{job['id']}").json["pictures"][0]["seed"] == job["seed"]


def test_jobs_outlive_connections_but_not_delete(fake: Client, service: Service, loader: FakeLoader) -> None:
    loader.gate = threading.Semaphore(0)
    jobs = [fake.post("/v1/jobs", SMALL).json["id"] for _ in range(2)]
    watching = fake.raw(f"GET /v1/jobs/{jobs[0]}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert watching.recv(12) == b"HTTP/1.1 200"
    watching.close()
    # the one that waits ends at once
    assert fake.ask("DELETE", f"/v1/jobs/{jobs[1]}").json["state"] == "cancelled"
    until(lambda: service.queue.running)
    assert fake.get(f"/v1/jobs/{jobs[0]}").json["state"] == "running"
    assert fake.ask("DELETE", f"/v1/jobs/{jobs[0]}").status == 202
    kind, content = fake.get(f"/v1/jobs/{jobs[0]}/events").events[-1]
    assert (kind, content["error"]) == ("cancelled", "the generation was cancelled")


def test_what_is_not_there(fake: Client) -> None:
    for method, path in (
        ("GET", "/v1/jobs/x"),
        ("DELETE", "/v1/jobs/x"),
        ("GET", "/v1/jobs/x/events"),
        ("GET", "/v1/pictures/x/0"),
    ):
        answer = fake.ask(method, path)
        assert answer.status == 404 and answer.json["error"] == "there is no such job"


def test_metrics_and_health(fake: Client, service: Service) -> None:
    fake.post("/v1/images/generations", {**SMALL, "n": 2})
    lines = fake.get("/metrics").body.decode().splitlines()
    assert 'sana_edge_jobs_total{state="done"} 1' in lines
    assert 'sana_edge_pictures_total{model="one"} 2' in lines
    assert 'sana_edge_model_loaded{model="two"} 0' in lines
    assert 'sana_edge_seconds_total{stage="denoise"} 0.2' in lines
    assert fake.get("/health").json["status"] == "ok"
    status = fake.get("/v1/status").json
    assert [model["loaded"] for model in status["models"]] == [True, False, False]
    assert (status["waiting"], status["running"]) == (0, 0)


def test_variations_of_a_picture_that_was_drawn(real: Client) -> None:
    body = {**SMALL, "size": "64x64"}
    job = real.post(
        "/v1/jobs", {**body, "variations": 2, "variation_strength": 0.4, "variation_seed": 50}
    ).json
    real.get(f"/v1/jobs/{job['id']}/events")
    pictures = real.get(f"/v1/jobs/{job['id']}?pictures=1").json["pictures"]
    assert [picture["metadata"]["variation"] for picture in pictures] == [[[50, 0.4]], [[51, 0.4]]]
    again = {**body, "variation": pictures[1]["metadata"]["variation"]}
    made = real.post("/v1/images/generations", again).json["data"][0]
    assert made["b64_json"] == pictures[1]["b64_json"] != pictures[0]["b64_json"]


def test_previews_of_every_step(real: Client, fake: Client) -> None:
    """By the linear map, where it is asked for; the model's own decoder makes the others."""
    found = {}
    for kind in ("linear", "decoded"):
        body = {**SMALL, "steps": 4, "size": "64x64", "preview_every": 1, "preview": kind}
        job = real.post("/v1/jobs", body).json["id"]
        events = real.get(f"/v1/jobs/{job}/events").events
        sizes = [
            PIL.Image.open(io.BytesIO(base64.b64decode(content["b64_json"]))).size
            for name, content in events
            if name == "preview"
        ]
        found[kind] = sizes
    assert found == {"linear": [(128, 128)] * 3, "decoded": [(64, 64)] * 3}
    answer = fake.post("/v1/jobs", {**SMALL, "preview": "both"})
    assert answer.status == 422 and answer.json["error"] == "preview is 'both'"


@pytest.mark.parametrize("index", ["-1", "9" * 5000, "x", "1.5", "\u0663"])
def test_numbers_that_no_picture_has(real: Client, index: str) -> None:
    job = real.post("/v1/jobs", SMALL).json["id"]
    until(lambda: real.get(f"/v1/jobs/{job}").json["state"] == "done")
    answer = real.get(f"/v1/pictures/{job}/{quote(index)}")
    assert answer.status == 404 and "it has 1, from 0" in answer.json["hint"]
