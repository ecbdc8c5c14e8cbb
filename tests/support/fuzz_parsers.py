"""Every parser, with a real file of its kind: what the fuzz changes, and what reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import fuzz
import fuzz_remote
import fuzz_training
import numpy as np
import torch
from fuzz import Parser
from safetensors.torch import save_file
from stand_in import StandIn

from sana_edge import Image
from sana_edge.calib.prompts import load_prompts
from sana_edge.calib.statistics import LayerStatistics, Statistics
from sana_edge.config import SamplerConfig
from sana_edge.engines.engine import EngineKind, Settings
from sana_edge.engines.onnxruntime import OnnxRuntime
from sana_edge.engines.openvino.backend import OpenVino
from sana_edge.engines.tensorrt import cache as engine_cache
from sana_edge.engines.tensorrt.cache import Key, Machine
from sana_edge.engines.text import EngineText
from sana_edge.image import read_metadata
from sana_edge.nets.convert import convert
from sana_edge.nets.text_weights import load_text_model
from sana_edge.noise.schedules import sampler_of
from sana_edge.prompt import Text
from sana_edge.request.request import Request
from sana_edge.series.entries import read_file
from sana_edge.series.pictures import Settings as SeriesSettings
from sana_edge.series.pictures import plan_pictures
from sana_edge.series.series import Series
from sana_edge.store import domain, hub, manifest, onnx_values, package, prompt_cache, snapshots
from sana_edge.store.folder import PREVIEW_MAP, read_json
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.identify import identify
from sana_edge.store.known_models import BUNDLED
from sana_edge.store.preview_map import read_map
from sana_edge.store.prompt_cache import Entry, PromptCache
from sana_edge.store.tokenizer import PromptTokenizer
from sana_edge.store.weights import StoredState, load_state
from sana_edge.system import atomic
from sana_edge.torch_runtime.load import load_decoder, load_denoiser

CPU = torch.device("cpu")


def copy_of(*parts: str) -> Callable[[Path], object]:
    """The tiny pipeline; of the bundled models those parts that are named."""

    def prepare(folder: Path) -> None:
        source = BUNDLED / parts[0] if parts else TINY[0]
        for name in parts[1:] or (".",):
            if (source / name).is_dir():
                shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
            else:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / name, folder / name)

    return prepare


# set by the fixture of the session
TINY: list[Path] = []


def model(folder: Path) -> ResolvedModel:
    return ResolvedModel(folder, "model")


def read_denoiser(folder: Path) -> None:
    load_denoiser(hub.resolve(str(folder), progress=False), device=CPU, dtype="auto")


def read_decoder(folder: Path) -> None:
    load_decoder(hub.resolve(str(folder), progress=False), device=CPU, dtype=torch.float32)


def read_weights(folder: Path) -> None:
    identify(folder / "vae" / "diffusion_pytorch_model.safetensors")
    read_decoder(folder)


def read_scheduler(folder: Path) -> None:
    config = SamplerConfig.from_dict(read_json(folder / "scheduler" / "scheduler_config.json"))
    hub.resolve(str(folder), progress=False)
    sampler_of(config, config.kind, 20)


def read_package(folder: Path) -> None:
    package.is_package(folder)
    description = package.describe(folder / "vae")
    if description.quantization is not None:
        package.verify(folder / "vae", description.quantization)
        _ = description.quantization.summary


def read_again_signed(folder: Path) -> None:
    """A package whose weights were changed together with their checksum."""
    config = folder / "vae" / "config.json"
    values = json.loads(config.read_text())
    values[package.KEY]["checksum"] = package.checksum(folder / "vae")
    config.write_text(json.dumps(values))
    read_decoder(folder)


def read_graph(engine: type[EngineKind]) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        names = [path.name for path in folder.glob("*.data")]
        onnx_values.check_values(folder, [GRAPH], names, "")
        engine.probe("cpu", Settings(threads=1)).load(folder / GRAPH).close()

    return read


def write_shards(folder: Path) -> None:
    (folder / "a").mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for index, name in enumerate(names):
        save_file({f"x{index}": torch.zeros(2)}, folder / "a" / name)
    (folder / "a" / "config.json").write_text("{}")
    content = {"metadata": {"total_size": 16}, "weight_map": {"x0": names[0], "x1": names[1]}}
    (folder / "a" / "model.safetensors.index.json").write_text(json.dumps(content))


def read_shards(folder: Path) -> None:
    load_state(folder / "a")
    dict(StoredState(folder / "a"))


def write_checkpoint(folder: Path) -> None:
    torch.save(load_state(TINY[0] / "transformer"), folder / "a.pth")


def read_pth(folder: Path) -> None:
    identify(folder / "a.pth")
    convert(folder / "a.pth", folder / "out", force=True, size=512, cross_attention_heads=2)


PICTURE = Image(
    np.zeros((4, 4, 3), np.uint8),
    7,
    {
        "prompt": "a",
        "negative_prompt": "",
        "seed": 7,
        "size": [32, 32],
        "steps": 2,
        "guidance": 4.5,
        "sampler": "flow-dpm",
        "model": "sana-tiny",
        "dtype": "fp32",
        "backend": "torch",
        "version": "0.1",
        "flow_shift": 3.0,
        "instruction": "x",
        "exact_size": True,
    },
)


def read_picture(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        metadata = read_metadata(folder / name)
        if "prompt" in metadata and "version" in metadata:
            Request.of(**metadata).plan(256, "flow-dpm")
        from sana_edge.cli.main import _parser

        arguments = _parser().parse_args(["generate", "--from", str(folder / name)])
        from sana_edge.cli import again

        again.fill(arguments)

    return read


def read_tokenizer(folder: Path) -> None:
    tokenizer = PromptTokenizer(folder)
    tokenizer.encode("A red house, left of a yellow star! " * 3, limit=300)
    tokenizer.encode("x" * 1000)


def read_domain(folder: Path) -> None:
    found = domain.read_domain(folder)
    if found is not None:
        found.notes("sana-tiny", ("a red house of 3 emoji \U0001f600",), (256, 256))


def read_manifest(folder: Path) -> None:
    manifest.is_exported(folder)
    manifest.format_of(folder)
    described = manifest.read(folder)
    described.export_command(int8=True)
    _ = described.used_graphs


def read_instruction(folder: Path) -> None:
    EngineText(folder, manifest.TextShape(128, 4, 2, 32), lambda ids, keys, values: keys)


KEY = Key("sana-tiny", "ab" * 32, "denoiser", Machine("NVIDIA RTX", (8, 9), "10.16.1.11", "575.64.03"))
OPTIONS = {"profiles": [{"latent": ((1, 2), (3, 4), (5, 6))}], "workspace": 1}


def write_engine(folder: Path) -> None:
    sizes = (engine_cache.Sizes((256, 256), (512, 512), (1024, 1024)),)
    engine_cache.store(folder, KEY, OPTIONS, folder, b"engine", sizes)
    shutil.move(folder / f"{KEY.name}.json", folder / "a.engine.json")
    shutil.move(folder / KEY.name, folder / "a.engine")


def read_engines(folder: Path) -> None:
    for entry in engine_cache.entries(folder):
        entry.rebuild((512, 512))
        engine_cache.is_whole(entry)
        engine_cache.is_whole(entry, quick=True)
    engine_cache.find(folder, KEY, folder)


def write_statistics(folder: Path) -> None:
    layer = LayerStatistics.empty(2, 3)
    layer.update(0, torch.ones(4, 3))
    layer.add_samples(0, [torch.ones(3)])
    Statistics({"a.b": layer}, {"observed": 1, "prompts": 2}, [torch.ones(1, 2, 3, 3)]).save(
        folder / "s.safetensors"
    )


def read_statistics(folder: Path) -> None:
    found = Statistics.load(folder / "s.safetensors")
    found.checksum()
    for layer in found.layers.values():
        layer.update(0, torch.full((2, layer.absmax.shape[1]), 2.0))


def write_series(folder: Path) -> None:
    rows = [
        {"prompt": "a {2::red|__animal__}", "seeds": [1, 2], "size": [64, 64]},
        {"prompt": "b", "seed": 7},
    ]
    (folder / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "p.csv").write_text('prompt,seed,guidance\n"a {b|c}\nd",7,4.5\n')
    (folder / "animal.txt").write_text("cat\n{big|small} dog\n# none\n")
    with Series(read_file(folder / "p.jsonl"), folder, SeriesSettings(wildcards=folder), seed=1) as series:
        list(series.draw(StandIn()))


def read_series(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        pictures, _ = plan_pictures(
            read_file(folder / name), SeriesSettings(wildcards=folder, combinations=True)
        )
        for picture in pictures[:10]:
            picture.request()

    return read


def read_series_manifest(folder: Path) -> None:
    with Series(read_file(folder / "p.jsonl"), folder, SeriesSettings(wildcards=folder)) as series:
        list(series.draw(StandIn(), force=True))


def write_plan(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "plan").write_text(json.dumps({"target": "made", "replaced": ["a"], "new": ["a", "b"]}))


def read_plan(folder: Path) -> None:
    """A folder that a dead process left, with a plan of what it had to rename."""
    scratch = folder / "out" / ".made.x.sana-edge"
    shutil.rmtree(folder / "out")
    (scratch / "new").mkdir(parents=True)
    (scratch / "old").mkdir()
    for name in ("lock", "new/a", "old/a"):
        (scratch / name).touch()
    shutil.copy(folder / "plan", scratch / "plan.json")
    with atomic.new_file(folder / "out" / "file") as path:
        path.touch()
    assert sorted(p.name for p in folder.iterdir()) == ["out", "plan"]


PROMPT: Text = ("a red house", None)
ENTRY = Entry("F32", (1, 3, 4), bytes(48), 0)
KNOWN = f"prompts/{PromptCache(list, 'F32', 4)._key(PROMPT)}.safetensors"


def write_known(folder: Path) -> None:
    with mock.patch.object(prompt_cache, "user_cache", lambda: folder):
        PromptCache(list, "F32", 4).get(PROMPT, lambda: ENTRY)


def read_known(folder: Path) -> None:
    """What is no entry is passed over, and goes."""
    with mock.patch.object(prompt_cache, "user_cache", lambda: folder):
        found = PromptCache(list, "F32", 4).find(PROMPT)
    assert found is None or found.content == ENTRY.content
    assert (folder / KNOWN).exists() == (found is not None)


def write_cache(folder: Path) -> None:
    home = folder / "models--a--b"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    copy_of()(home / "snapshots" / ("0" * 40))


def read_cache(folder: Path) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = str(folder)
    snapshots.repositories()
    snapshots.cached("a/b", None)
    snapshots.cached("a/b", None, "v1")


# the smallest of the bundled ones
GRAPH = "decoder_tail_2.onnx"
BYTES, JSON = fuzz.any_bytes, fuzz.json_file
PARSERS: dict[str, Parser] = {
    "transformer": Parser("transformer/config.json", JSON, copy_of(), read_denoiser, 0.4),
    "vae": Parser("vae/config.json", JSON, copy_of(), read_decoder, 0.4),
    "text encoder": Parser(
        "text_encoder/config.json",
        JSON,
        copy_of(),
        lambda f: load_text_model(f / "text_encoder", dtype=torch.float32, device=CPU),
        0.1,
    ),
    "index": Parser("model_index.json", JSON, copy_of(), lambda f: hub.resolve(str(f), progress=False)),
    "scheduler": Parser("scheduler/scheduler_config.json", JSON, copy_of(), read_scheduler),
    "package": Parser(
        "vae/config.json", JSON, copy_of("sana-tiny-int8", "vae", "transformer"), read_package, 0.3
    ),
    "package denoiser": Parser(
        "transformer/config.json", JSON, copy_of("sana-tiny-int8"), read_denoiser, 0.2
    ),
    "package weights": Parser(
        "vae/diffusion_pytorch_model.safetensors",
        fuzz.safetensors_file,
        copy_of("sana-tiny-int8"),
        read_again_signed,
        0.2,
    ),
    "graph in onnxruntime": Parser(
        GRAPH, BYTES, copy_of("sana-tiny-int8-onnx", GRAPH, "decoder.data"), read_graph(OnnxRuntime), 0.2
    ),
    "graph in openvino": Parser(
        GRAPH, BYTES, copy_of("sana-tiny-int8-onnx", GRAPH, "decoder.data"), read_graph(OpenVino), 0.2
    ),
    "manifest": Parser("manifest.json", JSON, copy_of("sana-tiny-int8-onnx"), read_manifest),
    "instruction": Parser(
        "instruction.safetensors",
        fuzz.safetensors_file,
        copy_of("sana-tiny-int8-onnx", "instruction.safetensors", "tokenizer"),
        read_instruction,
    ),
    "instruction bytes": Parser(
        "instruction.safetensors",
        BYTES,
        copy_of("sana-tiny-int8-onnx", "instruction.safetensors", "tokenizer"),
        read_instruction,
        0.5,
    ),
    "weights": Parser(
        "vae/diffusion_pytorch_model.safetensors", fuzz.safetensors_file, copy_of(), read_weights, 0.5
    ),
    "weights bytes": Parser("vae/diffusion_pytorch_model.safetensors", BYTES, copy_of(), read_weights, 0.5),
    "shards": Parser("a/model.safetensors.index.json", JSON, write_shards, read_shards),
    "shard": Parser("a/model-00001-of-00002.safetensors", fuzz.safetensors_file, write_shards, read_shards),
    "pth": Parser("a.pth", fuzz.checkpoint_file, write_checkpoint, read_pth, 0.15),
    "pth bytes": Parser("a.pth", BYTES, write_checkpoint, read_pth),
    "png": Parser("a.png", fuzz.png_file, lambda f: PICTURE.save(f / "a.png"), read_picture("a.png")),
    "png bytes": Parser("a.png", BYTES, lambda f: PICTURE.save(f / "a.png"), read_picture("a.png")),
    "jpeg bytes": Parser("a.jpg", BYTES, lambda f: PICTURE.save(f / "a.jpg"), read_picture("a.jpg")),
    "webp bytes": Parser("a.webp", BYTES, lambda f: PICTURE.save(f / "a.webp"), read_picture("a.webp")),
    "tokenizer": Parser("tokenizer.json", JSON, copy_of("sana-tiny/tokenizer"), read_tokenizer, 0.7),
    "tokenizer bytes": Parser("tokenizer.json", BYTES, copy_of("sana-tiny/tokenizer"), read_tokenizer, 0.3),
    "tokenizer config": Parser(
        "tokenizer_config.json", JSON, copy_of("sana-tiny/tokenizer"), read_tokenizer, 0.3
    ),
    "domain": Parser("tokenizer/domain.json", JSON, copy_of("sana-tiny", "tokenizer"), read_domain),
    "preview map": Parser(
        PREVIEW_MAP, JSON, copy_of("sana-tiny", PREVIEW_MAP), lambda folder: read_map(folder, 32)
    ),
    "engine": Parser("a.engine.json", JSON, write_engine, read_engines),
    "engine bytes": Parser("a.engine.json", BYTES, write_engine, read_engines),
    "statistics": Parser("s.safetensors", fuzz.statistics_file, write_statistics, read_statistics),
    "statistics bytes": Parser("s.safetensors", BYTES, write_statistics, read_statistics),
    "known prompt": Parser(KNOWN, fuzz.safetensors_file, write_known, read_known, 0.2),
    "known prompt bytes": Parser(KNOWN, BYTES, write_known, read_known, 0.2),
    "prompts": Parser(
        "p.txt",
        BYTES,
        lambda f: (f / "p.txt").write_text("a cat\n# x\nein Hündchen\n"),
        lambda f: load_prompts(f / "p.txt"),
    ),
    "series": Parser("p.jsonl", fuzz.lines_file, write_series, read_series("p.jsonl")),
    "series bytes": Parser("p.jsonl", BYTES, write_series, read_series("p.jsonl")),
    "series table": Parser("p.csv", BYTES, write_series, read_series("p.csv")),
    "wildcards": Parser("animal.txt", BYTES, write_series, read_series("p.jsonl")),
    "series manifest": Parser("manifest.jsonl", fuzz.lines_file, write_series, read_series_manifest),
    "series manifest bytes": Parser("manifest.jsonl", BYTES, write_series, read_series_manifest),
    "plan": Parser("plan", JSON, write_plan, read_plan, 0.3),
    "cache refs": Parser("models--a--b/refs/main", BYTES, write_cache, read_cache, 0.2),
    "cache index": Parser(
        f"models--a--b/snapshots/{'0' * 40}/model_index.json", JSON, write_cache, read_cache, 0.3
    ),
    **fuzz_training.PARSERS,
    **fuzz_remote.PARSERS,
}
