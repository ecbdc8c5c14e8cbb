"""What is in the wheel, what an import brings with it, and that every requirement is pinned."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile

import pytest
from built_wheel import MAPPED, ROOT, build_wheel
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sana_edge.store import manifest, package
from sana_edge.store.known_models import BUNDLED

# the weights of sana-tiny, 23 MB, its INT8 package, 14 MB, and that as graphs, 19 MB
MODELS_LIMIT = 58e6
# of these the CUDA build of torch pins its own
PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton")
TORCH_FREE = (
    *("cli.main", "cli.doctor", "config", "errors", "image", "prompt", "pipeline", "system.memory"),
    *("request.request", "runtime", "sampler", "noise.schedules", "noise.variations"),
    *("engines.runtime", "engines.text", "engines.choose", "engines.noise"),
    *("store.hub", "store.known_models", "store.manifest", "store.manifest_files", "store.folder"),
    *("serve.service", "serve.stdio", "evaluate.run"),
)


@pytest.fixture(scope="module", params=["links", "no-links"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, once as it is and once as a checkout without symbolic links gives it."""
    links = request.param == "links"
    return zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("source"), links=links))


def test_wheel_installs_one_name(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    (info,) = {name.split("/")[0] for name in names if not name.startswith("sana_edge/")}
    assert info.endswith(".dist-info")
    assert wheel.read(f"{info}/top_level.txt").split() == [b"sana_edge"]
    assert b"sana-edge = sana_edge.__main__:main" in wheel.read(f"{info}/entry_points.txt")
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_holds_every_file(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "sana_edge"
    expected = {f"sana_edge/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    expected |= {
        f"sana_edge/{path.relative_to(ROOT).as_posix()}"
        for name in MAPPED
        for path in (ROOT / name).rglob("*.py")
    }
    expected |= {f"sana_edge/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "calib").rglob("*.txt")}
    expected |= {"sana_edge/serve/page.html", "sana_edge/bench/page.css"}
    expected |= {"sana_edge/evaluate/judge/detector.safetensors"}
    recipes = (package / "training" / "recipes").glob("*.toml")
    expected |= {path.relative_to(ROOT).as_posix() for path in recipes}
    models = [path for path in (package / "models").rglob("*") if path.is_file()]
    expected |= {path.relative_to(ROOT).as_posix() for path in models}
    expected |= {"sana_edge/py.typed", "sana_edge/include/sana_edge.h"}
    assert {name for name in wheel.namelist() if name.startswith("sana_edge/")} == expected


def test_bundled_models_are_small() -> None:
    models = (ROOT / "sana_edge" / "models").rglob("*")
    assert sum(path.stat().st_size for path in models if path.is_file()) <= MODELS_LIMIT


def test_bundled_graphs_are_those_of_the_bundled_package() -> None:
    """Another package needs the command that sana-tiny's README has."""
    source = manifest.read(BUNDLED / "sana-tiny-int8-onnx").source
    assert source.model == "sana-tiny-int8"
    assert source.checksums == {
        name: package.checksum(BUNDLED / source.model / name)
        for name in ("transformer", "vae", "text_encoder")
    }


def test_links_for_type_checkers() -> None:
    for name in MAPPED:
        assert (ROOT / "sana_edge" / name).samefile(ROOT / name)


@pytest.mark.parametrize(
    "code",
    [
        "import sana_edge",
        "from sana_edge.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "\n".join(f"import sana_edge.{name}" for name in TORCH_FREE),
    ],
    ids=["import", "help", "modules"],
)
def test_imports_bring_no_torch_and_no_network(code: str) -> None:
    unwanted = "{'torch', 'transformers', 'diffusers', 'huggingface_hub', 'http.client', 'ssl'}"
    check = f"\nimport sys; sys.exit(', '.join({unwanted} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True)
    assert done.returncode == 0, f"imports {done.stderr}"


def test_every_requirement_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {canonicalize_name(pin.name) for pin in pins if pin.marker is None or pin.marker.evaluate()}
    missing = {
        name for name in _requirements("sana-edge", {"test"}) if not name.startswith(PINNED_BY_TORCH)
    } - pinned
    assert not missing


def _requirements(name: str, extras: set[str]) -> set[str]:
    """Every distribution that an installed one needs, directly or not, without itself."""
    found: set[str] = set()
    pending = [(name, extra) for extra in ("", *extras)]
    seen = set(pending)
    while pending:
        current, extra = pending.pop()
        for line in importlib.metadata.requires(current) or []:
            requirement = Requirement(line)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            needed = canonicalize_name(requirement.name)
            found.add(needed)
            new = {(needed, wanted) for wanted in ("", *requirement.extras)} - seen
            seen |= new
            pending += new
    return found - {canonicalize_name(name)}
