"""Fixtures: a server that draws with the bundled graphs, and one whose model waits to be let."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import MODEL, Client, FakeLoader, RealLoader, serving

from sana_edge.serve.service import Service


@pytest.fixture(scope="session")
def real() -> Iterator[Client]:
    """The bundled graphs on onnxruntime, under their name and another."""
    service = Service({MODEL: MODEL, "second": MODEL}, RealLoader())
    with serving(service) as client:
        yield client


@pytest.fixture(scope="session")
def idle() -> Iterator[Client]:
    """A server whose model draws nothing worth to be seen, for what needs no server of its own."""
    with serving(Service({"one": "one"}, FakeLoader())) as client:
        yield client


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
def service(loader: FakeLoader) -> Iterator[Service]:
    """Three models, and a queue of two."""
    made = Service({"one": "one", "two": "two", "three": "three"}, loader, limit=2)
    yield made
    made.close()


@pytest.fixture
def fake(service: Service) -> Iterator[Client]:
    with serving(service) as client:
        yield client
