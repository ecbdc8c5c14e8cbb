"""Fields of any kind and value become a request, or an error that names them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import FakeLoader

from sana_edge.errors import InvalidInput
from sana_edge.serve import automatic1111
from sana_edge.serve.fields import Fields, shown
from sana_edge.serve.job import Job
from sana_edge.serve.service import Service

NAMES = (
    *("prompt", "negative_prompt", "model", "seed", "steps", "num_inference_steps", "guidance", "cfg_scale"),
    *("size", "width", "height", "n", "images", "batch_size", "n_iter", "sampler", "sampler_name"),
    *("exact_size", "flow_shift", "instruction", "preview_every", "output_format", "output_compression"),
    *(
        "image",
        "preview",
        "variations",
        "variation",
        "variation_seed",
        "variation_strength",
        "subseed",
        "subseed_strength",
        "mask",
        "strength",
        "init_images",
        "override_settings",
        "enable_hr",
        "styles",
        "type",
        "id",
        "another",
    ),
)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 1, 64, 2**31, 2**63, 10**400, 1e308]))
TEXTS = st.one_of(
    st.text(), st.sampled_from(["64x64", "auto", "png", "flow-dpm", "\ud800", "Euler a", "one"])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inside: st.one_of(st.lists(inside, max_size=3), st.dictionaries(st.text(), inside, max_size=3)),
    max_leaves=5,
)
BODIES = st.fixed_dictionaries(
    {"prompt": st.one_of(st.just("a house"), VALUES)}, optional=dict.fromkeys(NAMES[1:], VALUES)
)

SERVICE = Service({"one": "one", "two": "two"}, FakeLoader())
FACES: dict[str, Callable[[Fields], Job]] = {
    "jobs": lambda asked: asked.job(SERVICE.known),
    "automatic1111": lambda asked: automatic1111._job(asked, SERVICE, "one")[0],
}


@pytest.mark.parametrize("face", FACES.values(), ids=FACES)
@given(body=BODIES)
@settings(max_examples=40, deadline=None, database=None, derandomize=True)
def test_any_body(face: Callable[[Fields], Job], body: dict[str, Any]) -> None:
    try:
        job = face(Fields.parse(json.dumps(body)))
    except InvalidInput as error:
        assert error.hint and "\n" not in error.message and len(error.message) < 500
    else:
        assert job.model in SERVICE.workers and 1 <= job.request.images <= 10
        assert job.request.seed is not None and job.request.prompt == body["prompt"]


@given(text=st.one_of(st.binary(), st.text().map(lambda text: text.encode(errors="surrogatepass"))))
@settings(max_examples=40, deadline=None, database=None, derandomize=True)
def test_any_bytes(text: bytes) -> None:
    try:
        Fields.parse(text)
    except InvalidInput as error:
        assert error.hint


def test_what_stands_for_what() -> None:
    """The first name that has a value counts; null is nothing, and 20.0 is 20."""
    asked = Fields({"prompt": "a house", "steps": None, "num_inference_steps": 20.0, "guidance_scale": 3})
    request = asked.request(images=None, size=None)
    assert (request.steps, request.guidance, request.images) == (20, 3, 1)
    assert type(request.steps) is int
    for size in ("64x32", " 64 X 32 ", [64, 32]):
        assert Fields({"size": size}).size() == (64, 32)
    assert Fields({"size": "auto"}).size() is None
    assert Fields({"output_compression": 0, "output_format": "jpg"}).encoding().quality == 1


def test_values_in_errors_are_short() -> None:
    assert len(shown("x" * 1000)) == 80 and shown(10**5000) == "a huge number" and shown(b"x") == "a file"
