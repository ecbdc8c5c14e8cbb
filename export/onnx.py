"""`sana-edge export`: a model in, a folder of ONNX graphs out, with one network in memory at a time."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sana_edge import __version__
from sana_edge.engines.onnxruntime import without_telemetry
from sana_edge.errors import InvalidInput, SanaError, export_extra
from sana_edge.export.graph.builder import GraphBuilder
from sana_edge.export.graph.decoder import Size, add_decoder
from sana_edge.export.graph.decoder_parts import add_decoder_part, decoder_parts
from sana_edge.export.graph.denoiser import add_denoiser, add_denoiser_folded
from sana_edge.export.graph.encoder import add_encoder
from sana_edge.export.graph.external_data import ExternalData
from sana_edge.export.graph.ports import ports
from sana_edge.export.graph.projection import add_text_projection
from sana_edge.export.graph.text import add_text_encoder
from sana_edge.export.instruction_file import write_instruction
from sana_edge.export.settings import Settings
from sana_edge.export.source import Source, describe
from sana_edge.nets.autoencoder import LatentDecoder
from sana_edge.nets.quantize import set_graph_activations
from sana_edge.nets.text_encoder import TextEncoder
from sana_edge.nets.text_weights import load_text_model
from sana_edge.progress import Progress, unseen
from sana_edge.store import hub, manifest
from sana_edge.store.folder import PREVIEW_MAP
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.manifest import ENCODER, INSTRUCTION, DecoderPart, Manifest, TextShape
from sana_edge.store.manifest_files import stored_files
from sana_edge.store.preview_map import read_map
from sana_edge.system.atomic import new_folder, write_json
from sana_edge.system.memory import memory_errors
from sana_edge.torch_runtime.device import DTYPES
from sana_edge.torch_runtime.load import load_decoder, load_denoiser, load_encoder
from sana_edge.torch_runtime.tiling import DEFAULT_TILE

# `sana_edge.export.verify.compare.compare`
_Compare = Callable[[Path, ResolvedModel, Manifest], dict[str, Any]]

PARTS = ("text encoder", "instruction", "denoiser", "decoder", "checksums", "comparison")

_README = "README.md"
_CPU = torch.device("cpu")


def export(
    model: str,
    output: Path,
    settings: Settings | None = None,
    *,
    offline: bool = False,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write a model's graphs and what else a program needs to draw with them, whole or not at all.

    Args:
        model: as `sana_edge.Sana.load` takes it; an INT8 one has to be calibrated.
        output: the folder to make.
        revision: of a repository, see `sana_edge.store.hub.resolve`.
        force: replace an exported folder at ``output``; an empty one is replaced anyway.
        progress: called as each of `PARTS` begins; a download is shown on stderr where it is given.

    Returns:
        What stands in the folder's manifest.

    Raises:
        InvalidInput: the model cannot be exported like that, or ``output`` is taken.
        CheckpointError: the model is damaged; the message names the tensor or file.
        SanaError: as `new_folder` and `sana_edge.store.hub.resolve`; there is no room on the disk; or a graph
            differs from the torch modules by more than rounding explains.
        MissingDependency: graphs are to be verified without onnxruntime.
    """
    settings, output = settings or Settings(), output.absolute()
    compare = _comparison() if settings.verify else None
    with new_folder(output, force=force, kind="exported folder", is_kind=_is_ours) as folder:
        found = hub.resolve(
            model,
            int8=settings.int8,
            offline=offline,
            progress=progress is not None,
            revision=revision,
        )
        place = found.path.resolve()
        if output.resolve() in (place, *place.parents):
            raise InvalidInput(f"{output} is where the model is", "choose another --output")
        source = describe(found, int8=settings.int8)
        _check_room(folder, output, source.bytes_of_graphs(settings.dtype))
        with memory_errors(model):
            return _Export(source, folder, settings, progress or unseen).write(compare)


class _Export:
    def __init__(self, source: Source, folder: Path, settings: Settings, progress: Progress) -> None:
        self._source, self._folder, self._settings, self._progress = source, folder, settings, progress
        # (h, w) of latents, None for any
        self._latent: Size | None = None
        if settings.size is not None:
            width, height = settings.size
            cell = source.autoencoder.spatial_compression
            self._latent = (height // cell, width // cell)

    def _begin(self, part: str) -> None:
        self._progress(part, PARTS.index(part), len(PARTS))

    def write(self, compare: _Compare | None) -> Manifest:
        self._copy()
        self._begin("text encoder")
        text, table = self._write_text_encoder()
        self._begin("instruction")
        self._write_instruction()
        self._begin("denoiser")
        self._write_denoiser()
        self._begin("decoder")
        parts = self._write_decoder()
        if self._settings.encoder:
            self._write_encoder()
        self._begin("checksums")
        written = dataclasses.replace(self._manifest(text, parts), text_table_bytes=table)
        if compare is not None:
            self._begin("comparison")
            found = compare(self._folder, self._source.model, written)
            written = dataclasses.replace(written, verification=found)
        manifest.write(written, self._folder)
        return written

    @property
    def _others(self) -> str:
        """What the text encoder and the decoder compute in: fp16 is too narrow for them."""
        return "fp32" if self._settings.dtype == "fp16" else self._settings.dtype

    def _copy(self) -> None:
        for name in self._source.tokenizer() + self._source.terms():
            target = self._folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._source.model.path / name, target)
        found = read_map(self._source.model.path, self._source.denoiser.in_channels)
        if found is not None:
            write_json(self._folder / PREVIEW_MAP, dataclasses.asdict(found))
        text = _readme(self._source, self._settings)
        (self._folder / _README).write_text(text, encoding="utf-8", errors="replace")

    def _write_text_encoder(self) -> tuple[TextShape, int]:
        """Returns its sizes, and the bytes of its embedding table."""
        # as the weights are stored; an INT8 package has few that are not INT8
        model = load_text_model(
            self._source.model.path / "text_encoder",
            dtype=self._source.text_dtype(),
            device=_CPU,
            variant=self._source.model.component_variant("text_encoder"),
        )
        with ExternalData(self._folder / "text_encoder.data") as data:
            graph = GraphBuilder("text_encoder", data, self._others)
            table = add_text_encoder(graph, model)
            graph.save(self._folder / "text_encoder.onnx")
        config = model.config
        shape = TextShape(
            channels=config.hidden_size,
            layers=config.num_hidden_layers,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        )
        return shape, table

    def _write_instruction(self) -> None:
        model = self._source.model
        encoder = TextEncoder.load(
            model.path, dtype=torch.float32, device=_CPU, variant=model.component_variant("text_encoder")
        )
        path = self._folder / INSTRUCTION
        write_instruction(path, encoder)
        # the library makes files that only their owner reads
        path.chmod(self._folder.stat().st_mode & 0o666)

    def _write_denoiser(self) -> None:
        denoiser, _ = load_denoiser(self._source.model, device=_CPU, dtype="fp32")
        set_graph_activations(denoiser)
        # what runs once for a prompt is a part of the denoiser, and shares some of its weights
        with ExternalData(self._folder / "denoiser.data") as data:
            graph = GraphBuilder("text_projection", data, self._settings.dtype)
            add_text_projection(graph, denoiser)
            graph.save(self._folder / "text_projection.onnx")
            for name, add in (("denoiser", add_denoiser), ("denoiser_folded", add_denoiser_folded)):
                graph = GraphBuilder(name, data, self._settings.dtype)
                add(graph, denoiser, self._latent)
                graph.save(self._folder / f"{name}.onnx")

    def _write_decoder(self) -> tuple[DecoderPart, ...]:
        decoder = load_decoder(self._source.model, device=_CPU, dtype=DTYPES["fp32"])
        small = self._settings.size is not None and max(self._settings.size) <= DEFAULT_TILE
        return write_decoder(decoder, self._folder, self._others, self._latent if small else None)

    def _write_encoder(self) -> None:
        encoder = load_encoder(self._source.model, device=_CPU, dtype=DTYPES["fp32"])
        with ExternalData(self._folder / f"{ENCODER}.data") as data:
            graph = GraphBuilder(ENCODER, data, self._others, int8_activations=False)
            add_encoder(graph, encoder, self._source.autoencoder.scaling_factor)
            graph.save(self._folder / f"{ENCODER}.onnx")

    def _manifest(self, text: TextShape, parts: tuple[DecoderPart, ...]) -> Manifest:
        source, names = self._source, [*manifest.GRAPHS, *(part.graph for part in parts)]
        names += [ENCODER] if self._settings.encoder else []
        return Manifest(
            sana_edge=__version__,
            name=source.model.name,
            source=manifest.Source(model=source.model.name, checksums=source.checksums()),
            dtype=self._settings.dtype,
            quantization=source.quantization,
            native_size=source.denoiser.native_size,
            size=self._settings.size,
            latent_channels=source.denoiser.in_channels,
            cell=source.autoencoder.spatial_compression,
            guidance_embeds=source.denoiser.guidance_embeds,
            sampler=source.sampler,
            text=text,
            graphs={name: ports(self._folder / f"{name}.onnx") for name in names},
            # those that a program reads: people may change the others
            files=stored_files(self._folder, without=[_README, *source.terms()]),
            verification=None,
            decoder_parts=parts,
            notes=source.notes,
        )


def write_decoder(
    decoder: LatentDecoder, folder: Path, dtype: str, size: Size | None = None
) -> tuple[DecoderPart, ...]:
    """Write a decoder's graphs, whole and in parts; in one piece alone for one ``size`` of latents."""
    parts = decoder_parts(decoder) if size is None else []
    with ExternalData(folder / "decoder.data") as data:
        graph = GraphBuilder("decoder", data, dtype)
        # of larger pictures it decodes previews, and tiles where parts cannot be
        add_decoder(graph, decoder, size)
        graph.save(folder / "decoder.onnx")
        for part in parts:
            graph = GraphBuilder(part.name, data, dtype)
            add_decoder_part(graph, decoder, part)
            graph.save(folder / f"{part.name}.onnx")
    return tuple(DecoderPart(part.name, part.halo, part.scale, part.values) for part in parts)


def _comparison() -> _Compare:
    """Needs onnxruntime, which nothing else here does."""
    without_telemetry()
    with export_extra():
        from sana_edge.export.verify import compare
    return compare.compare


def _is_ours(folder: Path) -> bool:
    """Whether a folder may be replaced: it has a manifest of this format, whatever else is wrong with it."""
    return manifest.format_of(folder) == manifest.FORMAT


def _check_room(folder: Path, output: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SanaError(
            f"the graphs need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free for {output}",
            "make room, or choose another --output",
        )


def _readme(source: Source, settings: Settings) -> str:
    """What the folder is, for people who find it."""
    size = "any size" if settings.size is None else "{}x{}".format(*settings.size)
    terms = f"; they are in {', '.join(source.terms())}" if source.terms() else ""
    return f"""# {source.model.name} as ONNX graphs

Made by sana-edge {__version__} from {source.origin()}: {source.quantization or settings.dtype}, \
pictures of {size}. manifest.json says what goes in and out.

    sana-edge generate --model THIS_FOLDER --prompt TEXT

Terms of use: {source.licence()}{terms}.
"""
