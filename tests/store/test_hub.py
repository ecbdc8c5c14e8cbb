"""The hub against huggingface_hub itself and a server on this machine, and against real folders."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from local_hub import COMMIT, Hub, serving, write_model
from safetensors.numpy import save_file

from sana_edge import progress
from sana_edge.cli.main import main
from sana_edge.errors import Cancelled, CheckpointError, InvalidInput, ModelNotFound, SanaError
from sana_edge.store import catalogue, downloads, hub
from sana_edge.store.blobs import RemoteFile, check_small, fetch_blobs
from sana_edge.store.known_models import DECODERS, KNOWN, KnownModel

KNOWN_NAME = "sana-0.6b-512"
REPOSITORY = KNOWN[KNOWN_NAME].repository
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty download cache."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as server:
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(catalogue, "BUNDLED", tmp_path / "bundled")
    return write_model(tmp_path / "bundled" / "sana-tiny")


def test_bundled_name_comes_first(bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "sana-tiny")
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("sana-tiny").path == bundled
    assert hub.resolve("./sana-tiny").path != bundled


def test_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "my-model", variants=True)
    model = hub.resolve(str(folder))
    assert (model.path, model.name, model.info) == (folder, "my-model", None)
    assert [model.component_variant(name) for name in ("transformer", "text_encoder")] == ["fp16", "fp16"]


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "transformer/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ],
)
def test_folder_lacking_a_file(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(str(folder))
    assert name.split("/")[0] in caught.value.message


def test_folder_lacking_a_shard(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", variants=True)
    (folder / "text_encoder/model.fp16-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shard model\.fp16-00002-of-00002\.safetensors"):
        hub.resolve(str(folder))


def test_folder_of_another_kind(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"no model_index\.json") as caught:
        hub.resolve(str(folder / "transformer"))
    assert "one component" in caught.value.hint
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match="holds a FluxPipeline"):
        hub.resolve(str(folder))
    (folder / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*model_index\.json"):
        hub.resolve(str(folder))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sana-0.6b-1025", "did you mean sana-0.6b-1024?"),
        ("sana-tini", "did you mean sana-tiny?"),
        ("Sana_600M_512px", "did you mean sana-0.6b-512?"),
        ("Sana_1600M_4Kpx_BF16", "did you mean sana-1.6b-4096?"),
        ("SANA1.5_4.8B_1024px", "did you mean sana-1.5-4.8b-1024?"),
        ("sana-sprint", "did you mean sana-sprint-0.6b-1024?"),
        ("sprint_600M", "did you mean sana-sprint-0.6b-1024?"),
        ("sana-1.6b-1024-multilang", "did you mean sana-1.6b-1024-multiling?"),
        ("flux", "`sana-edge models list` shows all"),
        ("x" * 5000, "`sana-edge models list` shows all"),
        ("", "shows all"),
        ("a\0b", "shows all"),
        ("./nowhere", "give a folder"),
    ],
)
def test_unknown_name(bundled: Path, name: str, hint: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(name)
    assert hint in caught.value.hint


def test_download_takes_one_variant_and_what_is_needed(server: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "remote", variants=True)
    (folder / "README.md").write_text("a page")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/model.safetensors").write_bytes(b"x")
    server.repositories[REPOSITORY] = folder

    model = hub.resolve(KNOWN_NAME, progress=False)

    assert (model.name, model.variant, model.info) == (KNOWN_NAME, "fp16", KNOWN[KNOWN_NAME])
    files = {path.relative_to(model.path).as_posix() for path in model.path.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors.index.fp16.json",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.fp16-00002-of-00002.safetensors",
    }
    entry = next(entry for entry in catalogue.list_models() if entry.name == KNOWN_NAME)
    assert (entry.origin, entry.path) == ("public", model.path)
    assert entry.size == sum((folder / name).stat().st_size for name in files)


def test_cached_model_needs_no_network(server: Hub, tmp_path: Path) -> None:
    server.repositories["someone/sana-mine"] = write_model(tmp_path / "remote")
    first = hub.resolve("someone/sana-mine", progress=False)
    requests = len(server.fetched)
    server.repositories.clear()
    assert hub.resolve("someone/sana-mine") == first
    assert hub.resolve("someone/sana-mine", offline=True) == first
    assert len(server.fetched) == requests
    assert "someone/sana-mine" in [entry.name for entry in catalogue.list_models()]


def test_incomplete_cache_is_completed(server: Hub, tmp_path: Path) -> None:
    server.repositories["someone/sana-mine"] = write_model(tmp_path / "remote")
    first = hub.resolve("someone/sana-mine", progress=False)
    (first.path / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="offline mode is on"):
        hub.resolve("someone/sana-mine", offline=True)
    hub.resolve("someone/sana-mine", progress=False)
    assert (first.path / "vae/diffusion_pytorch_model.safetensors").is_file()


def test_offline_variable(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories["someone/sana-mine"] = write_model(tmp_path / "remote")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match="offline mode is on"):
        hub.resolve("someone/sana-mine")


def test_unknown_repository(server: Hub) -> None:
    with pytest.raises(ModelNotFound, match="no folder and no repository someone/nothing"):
        hub.resolve("someone/nothing")
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(REPOSITORY.replace("512", "521"))
    assert caught.value.hint == f"did you mean {REPOSITORY}?"


def test_gated_repository(server: Hub) -> None:
    server.gated.add("someone/closed")
    with pytest.raises(ModelNotFound, match="someone/closed is gated") as caught:
        hub.resolve("someone/closed")
    assert "HF_TOKEN" in caught.value.hint


def test_repository_in_another_layout(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote/model.pth").write_bytes(b"")
    server.repositories["someone/raw"] = tmp_path / "remote"
    with pytest.raises(CheckpointError, match=r"someone/raw has no model_index\.json"):
        hub.resolve("someone/raw")


def test_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub() as closed:
        endpoint = closed.endpoint
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    with pytest.raises(SanaError, match="cannot download someone/sana-mine") as caught:
        hub.resolve("someone/sana-mine")
    assert "network" in caught.value.hint


def test_no_network_on_the_command_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with Hub() as closed:
        endpoint = closed.endpoint
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    output = tmp_path / "a.png"
    command = ["generate", "--prompt", "x", "--model", "someone/sana-mine", "--output", str(output)]
    assert main(command) == 1
    out, err = capsys.readouterr()
    error, hint = err.splitlines()
    assert out == "" and not output.exists()
    assert error.startswith("error: cannot download someone/sana-mine")
    assert hint.startswith("hint:  check the network")


@pytest.mark.parametrize("quiet", [False, True], ids=["shown", "quiet"])
def test_a_download_shows_its_progress_unless_quiet(
    server: Hub,
    tiny_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quiet: bool,
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    server.repositories["someone/tiny"] = tiny_folder
    output = str(tmp_path / "a.png")
    command = ["generate", "--prompt", "x", "--steps", "1", "--model", "someone/tiny", "--output", output]
    assert main([*command, "--quiet"] if quiet else command) == 0
    out, err = capfd.readouterr()
    assert out == f"{output}\n"
    assert err == "" if quiet else re.search(r"^someone/tiny: \d+ of \d+ MB$", err, re.MULTILINE)


def test_a_download_is_told_and_cancelled(server: Hub, tmp_path: Path) -> None:
    """Bytes arrive in order; what the listener raises ends the download, which goes on the next time."""
    server.repositories["someone/tiny"] = write_model(tmp_path / "remote")
    seen: list[tuple[str, int, int]] = []

    def cancel(name: str, done: int, count: int) -> None:
        seen.append((name, done, count))
        raise Cancelled("loading was cancelled")

    with pytest.raises(Cancelled):
        hub.resolve("someone/tiny", progress=False, on_progress=cancel)
    assert seen and seen[0][0] == "someone/tiny"
    with pytest.raises(ModelNotFound):
        hub.resolve("someone/tiny", offline=True)
    seen.clear()
    hub.resolve("someone/tiny", progress=False, on_progress=lambda *told: seen.append(told))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2] > 0


def test_removing_a_download(server: Hub, tiny_folder: Path, tmp_path: Path, cache: Path) -> None:
    server.repositories["someone/tiny"] = tiny_folder
    server.repositories[REPOSITORY] = write_model(tmp_path / "remote", variants=True)
    for name in ("someone/tiny", KNOWN_NAME):
        path = hub.resolve(name, progress=False).path
        assert main(["models", "rm", name]) == 1, "nobody to ask"
        assert path.is_dir()
        assert main(["models", "rm", name, "--force"]) == 0
        assert not path.exists()
        with pytest.raises(ModelNotFound, match="not in the cache"):
            downloads.find(name)


@pytest.mark.parametrize("known", [KNOWN[KNOWN_NAME], DECODERS["dc-ae-lite"]], ids=["model", "decoder"])
def test_a_broken_download_of_a_known_model_is_removed(cache: Path, known: KnownModel) -> None:
    blob = cache / f"models--{known.repository.replace('/', '--')}" / "blobs" / "x.incomplete"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"12345")
    found = downloads.find(known.name)
    assert (found.repository, found.size) == (known.repository, 5)
    downloads.remove(found)
    assert not blob.parents[1].exists()


def test_what_is_not_removed(cache: Path, bundled: Path, tmp_path: Path) -> None:
    """The package's own, folders of the user's, and what other programs have downloaded."""
    foreign = cache / "models--someone--other" / "snapshots" / COMMIT
    foreign.mkdir(parents=True)
    (foreign / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    mine = write_model(tmp_path / "mine")
    link = cache / f"models--{REPOSITORY.replace('/', '--')}"
    link.symlink_to(mine)
    for name, problem in (
        ("sana-tiny", "comes with sana-edge"),
        (str(mine), "a folder of yours"),
        ("someone/other", "is not a SANA model"),
        (KNOWN_NAME, "is not a SANA model"),
    ):
        with pytest.raises(InvalidInput, match=problem):
            downloads.find(name)
    for name in ("someone/none", "../mine", "", "a/../../mine", "someone/.."):
        with pytest.raises(ModelNotFound, match="not in the cache"):
            downloads.find(name)
    assert main(["models", "rm"]) == 1
    assert foreign.is_dir() and (mine / "model_index.json").is_file() and bundled.is_dir()


def test_a_question_before_removal(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    folder = cache / f"models--{REPOSITORY.replace('/', '--')}"
    folder.mkdir(parents=True)
    for answer, code in (("", 1), ("n\n", 1), ("y\n", 0)):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        assert main(["models", "rm", KNOWN_NAME]) == code
        assert folder.exists() == (code == 1)
        assert f"remove {REPOSITORY}, 0 MB in {folder}?" in capsys.readouterr().err


def test_cache_in_the_place_of_a_file(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories["someone/sana-mine"] = write_model(tmp_path / "remote")
    (tmp_path / "file").touch()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SanaError, match="cannot store someone/sana-mine") as caught:
        hub.resolve("someone/sana-mine", progress=False)
    assert "HF_HOME" in caught.value.hint


def test_file_system_that_takes_no_more(server: Hub, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    folder = write_model(tmp_path / "remote")
    save_file({"a": np.zeros(1_000_000, np.float32)}, folder / "vae/diffusion_pytorch_model.safetensors")
    server.repositories["someone/sana-mine"] = folder
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(SanaError, match="cannot store someone/sana-mine"):
            hub.resolve("someone/sana-mine", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    hub.resolve("someone/sana-mine", progress=False)


def test_cut_connection_goes_on_in_the_file(server: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "remote")
    save_file({"a": np.arange(6_000_000, dtype=np.float32)}, folder / TRANSFORMER)
    server.repositories["someone/sana-mine"] = folder
    server.cut[TRANSFORMER] = 15_000_000
    model = hub.resolve("someone/sana-mine", progress=False)
    first, second = [asked for name, asked in server.fetched if name == TRANSFORMER]
    assert first == ""
    assert 0 < int(second.removeprefix("bytes=").split("-")[0]) <= 15_000_000
    assert (model.path / TRANSFORMER).read_bytes() == (folder / TRANSFORMER).read_bytes()


def test_killed_download_keeps_whole_files(server: Hub, cache: Path, tmp_path: Path) -> None:
    """A process dies in the middle of a file: what it left is no model, and the next one completes it."""
    folder = write_model(tmp_path / "remote")
    save_file({"a": np.arange(1_000_000, dtype=np.float32)}, folder / TRANSFORMER)
    server.repositories["someone/sana-mine"] = folder
    server.stall[TRANSFORMER] = 1_500_000
    code = "from sana_edge.store.hub import resolve; print(resolve('someone/sana-mine', progress=False).path)"
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HUB_CACHE": str(cache)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    snapshot = cache / "models--someone--sana-mine" / "snapshots" / COMMIT
    deadline = time.monotonic() + 20
    while len(list(snapshot.rglob("*.*"))) < 8:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.kill()
    child.wait()

    with pytest.raises(ModelNotFound, match="or not whole"):
        hub.resolve("someone/sana-mine", offline=True)
    server.stall.clear()
    server.fetched.clear()
    assert hub.resolve("someone/sana-mine", progress=False).path == snapshot
    assert [name for name, _ in server.fetched] == [TRANSFORMER]
    assert (snapshot / TRANSFORMER).read_bytes() == (folder / TRANSFORMER).read_bytes()


def test_a_killed_download_goes_on_in_the_file(server: Hub, cache: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "remote")
    save_file({"a": np.arange(6_000_000, dtype=np.float32)}, folder / TRANSFORMER)
    server.repositories["someone/sana-mine"] = folder
    server.large, server.stall[TRANSFORMER] = True, 15_000_000
    code = "from sana_edge.store.hub import resolve; print(resolve('someone/sana-mine', progress=False).path)"
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HUB_CACHE": str(cache)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    blobs = cache / "models--someone--sana-mine" / "blobs"
    deadline = time.monotonic() + 20
    while not any(path.stat().st_size > 5_000_000 for path in blobs.glob("*.incomplete")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.kill()
    child.wait()
    # of an older run, and shorter
    (left,) = blobs.glob("*.incomplete")
    left.with_name(f"{left.name.partition('.')[0]}.00000000.incomplete").write_bytes(b"x")

    server.stall.clear()
    server.fetched.clear()
    told: list[tuple[int, int]] = []
    path = hub.resolve(
        "someone/sana-mine", progress=False, on_progress=lambda _, done, total: told.append((done, total))
    ).path
    (asked,) = [asked for name, asked in server.fetched if name == TRANSFORMER]
    assert 5_000_000 < int(asked.removeprefix("bytes=").split("-")[0]) <= 15_000_000
    assert (path / TRANSFORMER).read_bytes() == (folder / TRANSFORMER).read_bytes()
    assert list(blobs.glob("*.incomplete")) == []
    whole = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert told[-1] == (whole, whole) and told == sorted(told)


@pytest.mark.parametrize("name", [TRANSFORMER, "vae/config.json"])
def test_what_arrives_otherwise_than_it_is_on_the_hub(server: Hub, tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "remote")
    # equal contents are one blob
    save_file({"b": np.ones(5, np.float32)}, folder / TRANSFORMER)
    (folder / "vae/config.json").write_text('{"in_channels": 3}')
    server.repositories["someone/sana-mine"] = folder
    server.large, server.spoil = True, {name}
    with pytest.raises(SanaError, match=rf"{name} .*did not arrive as it is on the hub"):
        hub.resolve("someone/sana-mine", progress=False)
    server.spoil.clear()
    path = hub.resolve("someone/sana-mine", progress=False).path
    assert (path / name).read_bytes() == (tmp_path / "remote" / name).read_bytes()


@pytest.mark.parametrize(
    "answer",
    [b"<html><body>Please log in", b"[]", b"null", b'{"siblings": 5}', b'{"siblings": [{"rfilename": 7}]}'],
)
def test_an_answer_that_is_not_the_hubs(server: Hub, answer: bytes) -> None:
    server.answer = answer
    with pytest.raises(SanaError) as caught:
        hub.resolve("someone/sana-mine", progress=False)
    assert "someone/sana-mine" in caught.value.message and caught.value.hint


LISTED: dict[str, dict[str, Any]] = {
    "folder above": {"lfs": {"sha256": "../../../mine", "size": 8, "pointerSize": 1}},
    "absolute": {"lfs": {"sha256": "/mine", "size": 8, "pointerSize": 1}},
    "pattern": {"lfs": {"sha256": "*", "size": 8, "pointerSize": 1}},
    "size": {"lfs": {"sha256": "0" * 64, "size": -1, "pointerSize": 1}},
    "huge": {"lfs": {"sha256": "0" * 64, "size": 10**30, "pointerSize": 1}},
    "name": {"rfilename": "transformer/../../../mine.safetensors"},
    "blob": {"lfs": None, "blobId": "../mine"},
}


@pytest.mark.parametrize("change", LISTED.values(), ids=LISTED)
def test_a_listing_that_leads_elsewhere(server: Hub, tmp_path: Path, change: dict[str, Any]) -> None:
    """What is named by a checksum, or by a path, stays in the cache."""
    server.repositories["someone/sana-mine"] = write_model(tmp_path / "remote")
    server.large = True
    (tmp_path / "mine").write_text("mine")
    info = json.loads(server.listing("someone/sana-mine"))
    for sibling in info["siblings"]:
        if sibling["rfilename"] == TRANSFORMER:
            sibling.update(change)
    server.info = json.dumps(info).encode()
    with pytest.raises(SanaError):
        hub.resolve("someone/sana-mine", progress=False)
    assert {path.name for path in tmp_path.iterdir()} <= {"remote", "mine", "cache"}
    assert (tmp_path / "mine").read_text() == "mine"


def test_download_again_asks_for_the_newest(server: Hub, tmp_path: Path) -> None:
    server.repositories["someone/sana-mine"] = write_model(tmp_path / "remote")
    first = hub.resolve("someone/sana-mine", progress=False)
    server.commit = COMMIT[::-1]
    assert hub.resolve("someone/sana-mine").path == first.path
    assert hub.resolve("someone/sana-mine", refresh=True, progress=False).path.name == server.commit


def pinned(cache: Path, *revisions: str, name: str = "someone/sana-mine", main: str = "") -> Path:
    """Snapshots in the cache, as a download of pinned revisions leaves them."""
    home = cache / f"models--{name.replace('/', '--')}"
    for revision in revisions:
        write_model(home / "snapshots" / revision)
    if main:
        (home / "refs").mkdir()
        (home / "refs/main").write_text(main)
    return home / "snapshots"


OTHER = "fedcba9876543210fedcba9876543210fedcba98"


def test_the_only_snapshot_needs_no_reference(cache: Path) -> None:
    snapshots = pinned(cache, COMMIT)
    assert hub.resolve("someone/sana-mine", offline=True).path == snapshots / COMMIT
    assert [model.path for model in catalogue.list_models() if model.origin == "cached"] == [
        snapshots / COMMIT
    ]


def test_revisions_in_the_cache(cache: Path) -> None:
    snapshots = pinned(cache, COMMIT, OTHER)
    with pytest.raises(ModelNotFound, match="not on this machine") as caught:
        hub.resolve("someone/sana-mine", offline=True)
    assert caught.value.hint == f"choose a revision that is here: {COMMIT}, {OTHER}"
    for revision in (OTHER, OTHER[:7]):
        found = hub.resolve("someone/sana-mine", offline=True, revision=revision)
        assert found.path == snapshots / OTHER
    (snapshots.parent / "refs/pr").mkdir(parents=True)
    (snapshots.parent / "refs/pr/1").write_text(COMMIT)
    assert hub.resolve("someone/sana-mine", offline=True, revision="pr/1").path == snapshots / COMMIT
    with pytest.raises(ModelNotFound, match="at revision 1234567 is not on this machine"):
        hub.resolve("someone/sana-mine", offline=True, revision="1234567")


def test_a_reference_to_what_is_gone(cache: Path) -> None:
    snapshots = pinned(cache, COMMIT, main=OTHER)
    assert hub.resolve("someone/sana-mine", offline=True).path == snapshots / COMMIT


def test_a_revision_is_downloaded(server: Hub, tmp_path: Path) -> None:
    server.repositories["someone/sana-mine"] = write_model(tmp_path / "remote")
    found = hub.resolve("someone/sana-mine", progress=False, revision=COMMIT)
    assert found.path.name == COMMIT
    server.fetched.clear()
    assert hub.resolve("someone/sana-mine", progress=False).path == found.path
    assert hub.resolve("someone/sana-mine", progress=False, revision=COMMIT[:8]).path == found.path
    assert server.fetched == []


def test_a_revision_is_pulled(server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.repositories["someone/sana-mine"] = write_model(tmp_path / "remote")
    assert main(["models", "pull", "someone/sana-mine", "--revision", COMMIT, "--quiet"]) == 0
    assert capsys.readouterr().out.strip().endswith(COMMIT)
    assert main(["models", "pull", "someone/sana-mine", "--revision", "../x"]) == 1
    assert "is no branch, tag or commit" in capsys.readouterr().err


@pytest.mark.parametrize("revision", ["", "..", "../../x", "a b", "-x", "/etc"])
def test_what_is_no_revision(cache: Path, revision: str) -> None:
    with pytest.raises(InvalidInput, match="is no branch, tag or commit"):
        hub.resolve("someone/sana-mine", offline=True, revision=revision)


def test_only_repositories_have_revisions(bundled: Path, tmp_path: Path) -> None:
    for model in ("sana-tiny", str(write_model(tmp_path / "model"))):
        with pytest.raises(InvalidInput, match="is of a repository"):
            hub.resolve(model, revision="main")


def test_what_may_not_be_read(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(CheckpointError, match=r"model_index\.json: Permission denied"):
        hub.resolve(str(tiny_folder))


@pytest.mark.parametrize("name", ["models--a\n--\x1b[31mb", "models--a--b c"])
def test_names_of_the_cache_that_no_repository_has(cache: Path, tiny_folder: Path, name: str) -> None:
    shutil.copytree(tiny_folder, cache / name / "snapshots" / "abc")
    assert "cached" not in {model.origin for model in catalogue.list_models()}


def test_a_small_file_that_is_another_removes_nothing_outside(tmp_path: Path) -> None:
    """A cache of somebody else may have links that are none of the library's."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blob, mine = snapshot.parents[1] / "blobs" / "1", tmp_path / "mine"
    blob.parent.mkdir()
    for target, left in ((mine, True), (blob, False)):
        target.write_text("other")
        (snapshot / "config.json").symlink_to(target)
        with pytest.raises(SanaError, match=r"config\.json did not arrive"):
            check_small([RemoteFile("config.json", "0" * 40)], snapshot)
        assert not (snapshot / "config.json").is_symlink() and target.exists() == left


def test_what_was_begun_is_no_link(tmp_path: Path) -> None:
    home, name = tmp_path / "models--a--b", "a" * 64
    (tmp_path / "mine").write_text("mine")
    (home / "blobs").mkdir(parents=True)
    (home / "blobs" / f"{name}.incomplete").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="it is a link"):
        fetch_blobs("a/b", "main", [RemoteFile("w", None, 2, name)], home, lambda _: object)
    assert (tmp_path / "mine").read_text() == "mine"
