"""Folders and files of strangers through every command: a picture or one line, soon, in little memory.

Nothing outside of the output, the cache and the temporary folder is written.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from zygote import Zygote

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs limits of memory"),
]

# of a command
CPU, MEMORY = 60, 1 << 30
SUPPORT = Path(__file__).parents[1] / "support"
IMPORTS = (
    "sana_edge.pipeline",
    "sana_edge.torch_runtime.runtime",
    "sana_edge.nets.convert",
    "sana_edge.calib.quantize",
    "sana_edge.export.onnx",
)


class Commands:
    """What the commands do in a place of their own: ``model``, ``out`` and, as their caches, ``cache``."""

    def __init__(self, zygote: Zygote, place: Path) -> None:
        self._zygote, self.place = zygote, place

    def run(self, *words: str) -> tuple[int, str]:
        """The exit code and what was printed, seen to be what a user may see."""
        log = self.place / "log"
        done = self._zygote.run(words, log=str(log), cpu=CPU, memory=MEMORY)
        code, said = int(done["code"]), log.read_bytes().decode(errors="replace")
        assert code in (0, 1, 2), (words, code, said[-2000:])
        assert "Traceback" not in said, (words, said[-3000:])
        if code == 1:
            assert "error: " in said and "hint: " in said.replace("hint:  ", "hint: "), (words, said[-2000:])
            assert "run it again with -v" not in said, (words, said[-2000:])
        assert not any(ord(one) < 32 and one not in "\n\r\t" for one in said), (words, said[-2000:])
        changed = json.loads(Path(f"{log}.changed").read_text())
        allowed = tuple(str(self.place / name) for name in ("out", "cache", "tmp"))
        # a folder that torch makes among the system's temporary ones whatever TMPDIR says
        own = ("/dev/", f"{log}.", "/tmp/torchinductor_")
        outside = [one for one in changed if not one.startswith((*allowed, *own))]
        assert outside == [], (words, outside)
        return code, said

    def all(self, model: Path) -> dict[str, int]:
        """The exit codes of each command that takes a folder."""
        out = self.place / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        draw = ("--steps", "1", "--size", "64x64", "--exact-size", "--offline")
        done = {
            "generate": ("generate", "a", "--model", str(model), *draw, "--output", str(out / "a.png")),
            "int8": ("generate", "a", "--model", str(model), "--int8", *draw, "--output", str(out / "b.png")),
            "quantize": ("quantize", str(model), "--no-calibration", "--output", str(out / "int8")),
            "export": ("export", str(model), "--no-verify", "--output", str(out / "onnx")),
            "convert": ("convert", str(model / "transformer"), "--output", str(out / "converted")),
            "convert vae": ("convert", str(model / "vae"), "--output", str(out / "converted")),
        }
        codes = {name: self.run(*words)[0] for name, words in done.items()}
        hidden = [path for path in out.rglob(".*") if path.name.endswith(".sana-edge")]
        assert hidden == []
        return codes


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Zygote, Path]]:
    place = tmp_path_factory.mktemp("strangers")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_CACHE": str(place / "cache" / "hub")}
    environment |= {"SANA_EDGE_CACHE": str(place / "cache"), "TMPDIR": str(place / "tmp")}
    # on a busy machine threads otherwise reserve 64 MB of address space each, which is limited here
    environment["MALLOC_ARENA_MAX"] = "2"
    environment["PYTHONPATH"] = f"{SUPPORT}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    for name in ("cache", "tmp", "out"):
        (place / name).mkdir()
    process = Zygote("sana_edge.cli.main", IMPORTS, environment)
    yield process, place
    process.close()


@pytest.fixture
def commands(zygote: tuple[Zygote, Path]) -> Commands:
    process, place = zygote
    for name in ("cache", "out"):
        shutil.rmtree(place / name, ignore_errors=True)
        (place / name).mkdir()
    return Commands(process, place)


@pytest.fixture
def model(commands: Commands, tiny_folder: Path) -> Path:
    folder = commands.place / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_folder, folder)
    return folder


def weights(folder: Path, component: str) -> Path:
    return next((folder / component).glob("*.safetensors"))


def change(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


class Runs:
    """Opens a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def deep_json(depth: int) -> str:
    return "[" * depth + "]" * depth


@functools.cache
def zip_bomb(name: str, size: int = 3 << 29) -> bytes:
    """An archive of a name with so many zeros."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w", force_zip64=True) as file,
    ):
        for _ in range(size >> 24):
            file.write(bytes(1 << 24))
    return buffer.getvalue()


def bomb_of(name: str) -> Callable[[Path], None]:
    return lambda path: void(path.write_bytes(zip_bomb(name)))


def void(_: object) -> None: ...


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Runs(path.parent / "ran")}))


def write_deep(path: Path) -> None:
    path.write_bytes(b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".")


def write_object_array(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, x=np.array([Runs(path.parent / "ran")], dtype=object))


def write_expanded(path: Path) -> None:
    """One value that claims to be 40 GB of weights."""
    torch.save({"x_embedder.proj.weight": torch.zeros(1).expand(100_000, 100_000)}, path)


def write_many(path: Path) -> None:
    torch.save({f"blocks.{index}.a": torch.zeros(1) for index in range(20_000)}, path)


FILES: dict[str, Callable[[Path], None]] = {
    "zip bomb, pickle": bomb_of("archive/data.pkl"),
    "zip bomb, storage": bomb_of("archive/data/0"),
    "zip bomb, npy": bomb_of("x.npy"),
    "a pickle": write_pickle,
    "a deep pickle": write_deep,
    "an array of objects": write_object_array,
    "an expanded tensor": write_expanded,
    "many tensors": write_many,
    "a large string": lambda path: void(path.write_bytes(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40))),
}


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".npz", ".safetensors"])
def test_checkpoints(commands: Commands, write: Callable[[Path], None], suffix: str) -> None:
    path = commands.place / "out" / f"mine{suffix}"
    write(path)
    assert commands.run("convert", str(path), "--output", str(commands.place / "out" / "made"))[0] == 1
    words = ("generate", "a", "--steps", "1", "--offline", "--decoder", str(path), "--model", "sana-tiny")
    words += ("--output", str(commands.place / "out" / "a.png"))
    assert commands.run(*words)[0] == 1
    assert not (path.parent / "ran").exists() and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_weights_of_a_folder(commands: Commands, model: Path, write: Callable[[Path], None]) -> None:
    for component, name in (
        ("transformer", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ):
        weights(model, component).unlink()
        write(model / component / name)
    assert {1} == {code for name, code in commands.all(model).items() if name != "convert vae"}
    assert not list(model.rglob("ran"))


HUGE: list[object] = [
    [],
    {},
    None,
    "x" * 1_000_000,
    1e308,
    10**400,
    -1,
    0,
    2**31,
    True,
    [[]] * 1000,
    {"a": {}},
]
CONFIGS = (
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(commands: Commands, model: Path, name: str) -> None:
    """Each value becomes another one; all of them; and what is no object at all."""
    path, text = model / name, (model / name).read_text()
    values = json.loads(text)
    keys, output = sorted(values), str(commands.place / "out" / "a.png")
    texts = [json.dumps({**values, keys[n % len(keys)]: value}) for n, value in enumerate(HUGE)]
    texts += [json.dumps(dict.fromkeys(values, value)) for value in HUGE]
    texts += [deep_json(100_000), '{"a":' * 50_000, "null", '"a"', "NaN", text[:-2], "\ufeff" + text, ""]
    draw = ("--steps", "1", "--size", "64x64", "--exact-size", "--offline", "--output", output, "--force")
    for changed in texts:
        path.write_text(changed)
        commands.run("generate", "a", "--model", str(model), *draw)
    path.write_bytes(text.encode("utf-16"))
    commands.all(model)


@pytest.mark.parametrize("depth", [10, 100, 400, 100_000])
def test_nested_tokenizers(commands: Commands, model: Path, depth: int) -> None:
    path = model / "tokenizer" / "tokenizer.json"
    text = json.loads(path.read_text())
    for key, leaf in (("normalizer", {"type": "NFC"}), ("pre_tokenizer", {"type": "Whitespace"})):
        mine = json.dumps({**text, key: "HERE"})
        inner = key + "s" if key == "normalizer" else "pretokenizers"
        opened = f'{{"type": "Sequence", "{inner}": ['
        path.write_text(mine.replace('"HERE"', opened * depth + json.dumps(leaf) + "]}" * depth))
        commands.all(model)


NAMES = [
    "a\nb",
    "\x1b[31mred",
    b"bad\xff\xfe",
    "a" * 255,
    "\u202egnp.exe",
    "-rf",
    "a b'\"$(x)",
    "con",
    "\x7f\x01",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names(commands: Commands, model: Path, name: str | bytes) -> None:
    """Of the folder, and of files in it, which may be copied along or be named in an index."""
    name = os.fsdecode(name)
    folder = model.rename(commands.place / "cache" / name)
    codes = commands.all(folder)
    assert codes["generate"] == codes["quantize"] == 0
    for place in ("scheduler", "tokenizer", "transformer"):
        (folder / place / name).write_text("{}")
        (folder / place / f"{name[:200]}.json").write_text("{}")
    assert commands.all(folder)["generate"] == 0
    path = weights(folder, "transformer")
    path.rename(path.with_name(f"{name[:200]}.safetensors"))
    commands.all(folder)


@pytest.mark.parametrize(
    "shard", ["../../../secret", "/etc/passwd", "a\nb", "", ".", "x" * 5000, "\0", "con"]
)
def test_names_in_an_index(commands: Commands, model: Path, shard: str) -> None:
    path = weights(model, "transformer")
    names = list(load_file(path))
    path.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    codes = commands.all(model)
    assert {code for name, code in codes.items() if name != "convert vae"} == {1}


VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "largest fp16": lambda tensor: torch.full_like(tensor, 65504.0),
    "largest fp32": lambda tensor: torch.full_like(tensor, torch.finfo(torch.float32).max),
    "denormal": lambda tensor: torch.full_like(tensor, 1e-42),
    "zero": torch.zeros_like,
    "negative": lambda tensor: -tensor.abs() * 1e4,
    "fp16": lambda tensor: tensor.clamp(-60000, 60000).half() * 1000,
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_extreme_weights(commands: Commands, model: Path, values: Callable[..., torch.Tensor]) -> None:
    for component in ("transformer", "vae", "text_encoder"):
        path = weights(model, component)
        before = load_file(path)
        save_file({name: values(tensor).contiguous() for name, tensor in before.items()}, path)
        commands.all(model)
        save_file(before, path)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 1, color: int = 0) -> bytes:
    """A black one, whose pixels are few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    packer, row = zlib.compressobj(9), bytes(1 + (width * depth + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(min(height, 40_000))) + packer.flush()
    parts = (
        chunk(b"IHDR", header),
        *(chunk(*one) for one in chunks),
        chunk(b"IDAT", rows),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BIG = zlib.compress(bytes(200 << 20), 1)
PICTURES: dict[str, Callable[[], bytes]] = {
    "30000 squared": lambda: png(30_000, 30_000),
    "a long row": lambda: png(2**31 - 1, 1)[:200],
    "nothing": lambda: png(0, 0),
    "a compressed text": lambda: png(8, 8, (b"zTXt", b"sana_edge\0\0" + BIG)),
    "an international text": lambda: png(8, 8, (b"iTXt", b"sana_edge\0\1\0\0\0" + BIG)),
    "many texts": lambda: png(8, 8, *[(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000)))] * 200),
    "a profile": lambda: png(8, 8, (b"iCCP", b"a\0\0" + BIG)),
    "deep metadata": lambda: png(8, 8, (b"tEXt", b"sana_edge\0" + deep_json(100_000).encode())),
    "wrong metadata": lambda: png(8, 8, (b"tEXt", b'sana_edge\0{"prompt": [], "model": "/etc"}')),
    "a length of 4 GB": lambda: png(8, 8)[:33] + struct.pack(">I", 2**32 - 1) + b"tEXtsana_edge\0",
    "a gif of many pictures": lambda: gif(5_000),
    "a tiff of 60000 squared": lambda: tiff(60_000),
}


def gif(count: int) -> bytes:
    import PIL.Image

    buffer, frame = io.BytesIO(), PIL.Image.new("P", (4, 4))
    frames = [PIL.Image.new("P", (4, 4), index % 255) for index in range(count)]
    frame.save(buffer, "GIF", save_all=True, append_images=frames)
    return buffer.getvalue()


def tiff(side: int) -> bytes:
    """Its only strip is the file itself."""
    entries = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, side), (279, 4, 1, 2**32 - 1)]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + packed + bytes(4)


@pytest.mark.parametrize("content", PICTURES.values(), ids=PICTURES)
def test_pictures(commands: Commands, content: Callable[[], bytes]) -> None:
    path, output = commands.place / "cache" / "theirs.png", commands.place / "out" / "a.png"
    path.write_bytes(content())
    draw = (
        "--steps",
        "1",
        "--size",
        "64x64",
        "--exact-size",
        "--offline",
        "--output",
        str(output),
        "--force",
    )
    for words in (("a", "--image", str(path)), ("--from", str(path))):
        commands.run("generate", *words, "--model", "sana-tiny", *draw)


def repository(hub: Path, name: str, folder: Path) -> Path:
    """A model as the hub's cache has it."""
    home = hub / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    shutil.copytree(folder, home / "snapshots" / "abc")
    return home


def link_blobs(home: Path, secret: Path) -> None:
    (home / "blobs").symlink_to(secret.parent)


def link_snapshots(home: Path, secret: Path) -> None:
    shutil.move(home / "snapshots", secret.parent / "snapshots")
    (home / "snapshots").symlink_to(secret.parent / "snapshots")


def link_file(home: Path, secret: Path) -> None:
    path = home / "snapshots" / "abc" / "model_index.json"
    path.unlink()
    path.symlink_to(secret)


def link_folder(home: Path, secret: Path) -> None:
    (home / "snapshots" / "abc" / "more").symlink_to(secret.parent)


def link_home(home: Path, secret: Path) -> None:
    shutil.move(home, secret.parent / "home")
    home.symlink_to(secret.parent / "home")


def wrong_ref(home: Path, secret: Path) -> None:
    (home / "refs" / "main").write_text(f"../../../{secret.parent.name}")


def loop(home: Path, secret: Path) -> None:
    shutil.rmtree(home / "snapshots" / "abc")
    (home / "snapshots" / "abc").symlink_to("abc")


CACHES = (link_blobs, link_snapshots, link_file, link_folder, link_home, wrong_ref, loop)


@pytest.mark.parametrize("make", CACHES, ids=lambda one: one.__name__)
def test_a_cache_with_links_that_lead_outside(
    commands: Commands, model: Path, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    secret = tmp_path / "outside" / "secret"
    secret.parent.mkdir()
    secret.write_text("mine")
    home = repository(commands.place / "cache" / "hub", "someone/sana", model)
    make(home, secret)
    before = sorted(secret.parent.rglob("*"))
    draw = ("--steps", "1", "--size", "64x64", "--exact-size", "--offline")
    commands.run("models", "list")
    commands.run("models", "list", "--json")
    commands.run(
        "generate", "a", "--model", "someone/sana", *draw, "--output", str(commands.place / "out/a.png")
    )
    commands.run("models", "pull", "someone/sana")
    commands.run("models", "rm", "someone/sana", "--force")
    assert sorted(secret.parent.rglob("*")) == before and secret.read_text() == "mine"
