"""What names stand for: models in all their forms, and what is made of what."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sana_edge.bench import measure, models
from sana_edge.bench.measure import Asked
from sana_edge.bench.models import FLOAT, GRAPHS, INT8_GRAPHS, PACKAGE, subjects
from sana_edge.errors import InvalidInput, ModelNotFound
from sana_edge.store.known_models import BUNDLED

EXPORTED = BUNDLED / "sana-tiny-int8-onnx"


def test_the_bundled_model_has_its_package_and_graphs(tmp_path: Path) -> None:
    (found,) = subjects(["sana-tiny"], [], tmp_path)
    assert set(found.folders) == {FLOAT, PACKAGE, INT8_GRAPHS} and found.can(GRAPHS)
    assert found.native == 256 and found.sampler == "flow-dpm"
    ((form, source),) = found.missing(GRAPHS)
    assert form == GRAPHS and source == found.folders[FLOAT]
    # what an earlier run has made
    (found.place / GRAPHS).mkdir(parents=True)
    assert not list(found.missing(GRAPHS)) and found.found(GRAPHS) == str(found.place / GRAPHS)


def test_random_weights(tmp_path: Path) -> None:
    (found,) = subjects([], ["sprint"], tmp_path)
    assert found.sampler == "scm" and found.native == 1024 and "random weights" in found.name
    made = [form for form, _ in found.missing(INT8_GRAPHS)]
    assert made == [FLOAT, PACKAGE, INT8_GRAPHS]
    assert dict(found.missing(GRAPHS))[GRAPHS] == str(found.place / FLOAT)
    assert found.plan(None, None).steps == 2


def test_a_package_joins_its_float_model(tmp_path: Path, tiny_folder: Path) -> None:
    """As what `quantize` made of it, of the same name or not."""
    package = tmp_path / "anything"
    shutil.copytree(BUNDLED / "sana-tiny-int8", package)
    (one,) = subjects([str(package)], [], tmp_path)
    assert set(one.folders) == {PACKAGE} and not one.can(GRAPHS) and one.can(INT8_GRAPHS)
    # sana-tiny brings its own package, and so this one stands alone
    assert len(subjects(["sana-tiny", str(package)], [], tmp_path)) == 2
    assert len(subjects([str(tiny_folder), str(package)], [], tmp_path)) == 2
    graphs, other = subjects([str(EXPORTED), "sana-tiny"], [], tmp_path)
    assert set(graphs.folders) == {INT8_GRAPHS} and graphs.name == "sana-tiny (sana-tiny-int8-onnx)"
    assert other.name == "sana-tiny (sana-tiny, sana-tiny-int8, sana-tiny-int8-onnx)"


def test_a_float_model_and_the_package_made_of_it(tmp_path: Path) -> None:
    float_folder, package = tmp_path / "sana-tiny", tmp_path / "other"
    shutil.copytree(BUNDLED / "sana-tiny", float_folder)
    shutil.copytree(BUNDLED / "sana-tiny-int8", package)
    for order in ([float_folder, package], [package, float_folder]):
        (found,) = subjects(list(map(str, order)), [], tmp_path / "scratch")
        assert found.folders == {FLOAT: str(float_folder), PACKAGE: str(package)}
        assert found.name == "sana-tiny"


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled graphs stand in, as they do for `generate`."""
    monkeypatch.setattr(models, "torch_missing", lambda: "torch")
    monkeypatch.setattr(measure, "torch_missing", lambda: "torch")
    (found,) = subjects(["sana-tiny"], [], tmp_path)
    assert set(found.folders) == {INT8_GRAPHS} and "stands in for sana-tiny" in found.notes[0]
    backends, skipped = measure.usable(["torch", "onnxruntime"])
    assert backends == ["onnxruntime"] and "pip install 'sana-edge[torch]'" in skipped[0]["reason"]
    (work,) = measure.works([found], Asked(backends, [None], None, 1, None), backends)
    assert [row["name"] for row in work["rows"]] == ["onnxruntime int8"]


def test_contenders(tmp_path: Path) -> None:
    found = subjects(["sana-tiny"], ["sprint-tiny"], tmp_path)
    asked = Asked(["torch", "openvino"], [(64, 64), (128, 96)], 3, 2, None, "diffusers")
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    works = measure.works(found, asked, asked.backends)
    assert [(work["model"], *work["size"], work["steps"]) for work in works] == [
        *(("sana-tiny", 64, 64, 3), ("sana-tiny", 128, 96, 3)),
        *((found[1].name, 64, 64, 3), (found[1].name, 128, 96, 3)),
    ]
    names = [row["name"] for row in works[0]["rows"]]
    assert names == [
        "diffusers float",
        *(f"{by} {kind}" for by in asked.backends for kind in ("float", "int8")),
    ]
    assert [work["random_weights"] for work in works] == [False, False, True, True]


@pytest.mark.parametrize(
    ("names", "random", "error", "message"),
    [
        (["sana-tinny"], [], ModelNotFound, "unknown model 'sana-tinny'"),
        (["./nowhere"], [], ModelNotFound, "no folder ./nowhere"),
        ([], ["2.4b"], InvalidInput, "no random weights '2.4b'"),
    ],
)
def test_unknown(
    names: list[str], random: list[str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        subjects(names, random, tmp_path)


def test_sizes_that_a_model_has_not(tmp_path: Path) -> None:
    (found,) = subjects(["sana-tiny"], [], tmp_path)
    with pytest.raises(InvalidInput, match="100x100 is not a multiple of 32"):
        found.plan((100, 100), None)
    with pytest.raises(InvalidInput, match="steps is 0"):
        found.plan(None, 0)


def test_unknown_backend() -> None:
    with pytest.raises(InvalidInput, match="unknown backend 'tensorflow'"):
        measure.usable(["torch", "tensorflow"])
