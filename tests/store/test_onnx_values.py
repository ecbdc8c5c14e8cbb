"""Numbers in exported graphs that are not finite are named, and weights lie in the folder alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_edge.errors import CheckpointError
from sana_edge.store import manifest, manifest_files, onnx_values
from sana_edge.store.known_models import BUNDLED

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
DTYPES = {"fp32": 1, "fp16": 10, "fp64": 11, "bf16": 16}


def tensor(name: str, dtype: str, value: float) -> Any:
    """Nine values, the last but one of which is ``value``, as raw bytes."""
    values = np.arange(9, dtype=np.float64)
    values[7] = value
    if dtype == "bf16":
        raw = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        raw = values.astype({"fp32": np.float32, "fp16": np.float16, "fp64": np.float64}[dtype])
    return onnx.helper.make_tensor(name, DTYPES[dtype], [9], raw.tobytes(), raw=True)


def save(path: Path, *initializers: Any, nodes: Any = ()) -> None:
    graph = onnx.helper.make_graph(list(nodes), "g", [], [], initializer=list(initializers))
    onnx.save(onnx.helper.make_model(graph), path)


def check(path: Path, *files: str) -> None:
    onnx_values.check_values(path.parent, [path.name], files, "hint")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_every_dtype(tmp_path: Path, dtype: str, value: float) -> None:
    path = tmp_path / "a.onnx"
    save(path, tensor("good", dtype, 60000.0), tensor("layer/weight", dtype, 1.0))
    check(path)
    save(path, tensor("good", dtype, 60000.0), tensor("layer/weight", dtype, value))
    with pytest.raises(CheckpointError, match=r"a\.onnx: layer/weight has NaN or infinite"):
        check(path)


def test_constants_of_nodes_and_of_graphs_in_them(tmp_path: Path) -> None:
    path, bad = tmp_path / "a.onnx", tensor("", "fp32", np.nan)
    constant = onnx.helper.make_node("Constant", [], ["c"], name="scale", value=bad)
    save(path, nodes=[constant])
    with pytest.raises(CheckpointError, match="scale has NaN"):
        check(path)
    inner = onnx.helper.make_graph([constant], "inner", [], [])
    save(path, nodes=[onnx.helper.make_node("If", ["x"], [], then_branch=inner, else_branch=inner)])
    with pytest.raises(CheckpointError, match="has a loop, a branch or a function"):
        check(path)
    # as numbers, not as bytes
    save(path, onnx.helper.make_tensor("list", 1, [2], [1.0, np.inf]))
    with pytest.raises(CheckpointError, match="list has NaN"):
        check(path)


def test_weights_lie_in_the_folder(tmp_path: Path) -> None:
    path, far = tmp_path / "a.onnx", tensor("w", "fp32", 1.0)
    far.ClearField("raw_data")
    far.data_location = onnx.TensorProto.EXTERNAL
    for location in ("/dev/zero", "../a.data", "a.data"):
        del far.external_data[:]
        far.external_data.add(key="location", value=location)
        save(path, far)
        with pytest.raises(CheckpointError, match="w lies in"):
            check(path, "b.data")
    (tmp_path / "a.data").write_bytes(np.full(9, 2.0, np.float32).tobytes())
    check(path, "a.data")
    (tmp_path / "a.data").write_bytes(np.full(9, np.nan, np.float32).tobytes())
    with pytest.raises(CheckpointError, match="w has NaN"):
        check(path, "a.data")


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    for content in (
        b"\xff" * 40,
        b"\x3a\xff",
        b"\x0f",
        b"\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is no ONNX graph"):
            check(path)


def test_a_loop_behind_what_only_engines_read(tmp_path: Path) -> None:
    """A group, which protobuf has no longer: engines pass over it and run the rest."""
    path = tmp_path / "a.onnx"
    body = onnx.helper.make_graph([], "body", [], [])
    save(path, nodes=[onnx.helper.make_node("Loop", ["n", "t", "x"], ["y"], body=body)])
    whole = path.read_bytes()
    for content in (b"\xa3\x06\xa4\x06" + whole, whole + b"\xa3\x06\xa4\x06"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is no ONNX graph|has a loop"):
            check(path)


def test_an_exported_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that became NaN together with its checksum, when the folder is first loaded."""
    import shutil

    monkeypatch.setenv("SANA_EDGE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "onnx"
    shutil.copytree(BUNDLED / "sana-tiny-int8-onnx", folder)
    manifest_files.verify(folder, manifest.read(folder))
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    weights = [one for one in model.graph.initializer if one.data_type == 1 and one.external_data]
    offset = next(int(entry.value) for entry in weights[3].external_data if entry.key == "offset")
    with open(folder / "decoder.data", "r+b") as file:
        file.seek(offset)
        file.write(np.float32(np.nan).tobytes())
    described = manifest.read(folder)
    files = {**described.files, **manifest_files.stored_files(folder)}
    with pytest.raises(CheckpointError, match=f"{weights[3].name} has NaN"):
        manifest_files.verify(folder, dataclasses.replace(described, files=files))
