"""What is known of a model without its weights, here or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sana_edge.errors import ModelNotFound
from sana_edge.plan.model import facts_of, folder_facts
from sana_edge.store import hub
from sana_edge.store.tiny_autoencoder import TinyAutoencoderConfig


def test_a_folder(tiny_folder: Path, tiny_sprint_folder: Path) -> None:
    facts = facts_of(str(tiny_folder))
    assert facts.denoiser.num_layers == 2 and facts.sampler == "flow-dpm" and not facts.int8
    assert facts.path == tiny_folder and facts.download == 0 < facts.disk
    assert facts.stored["denoiser"].dtype == "fp32"
    assert facts_of(str(tiny_sprint_folder)).sampler == "scm"


def test_bundled_packages() -> None:
    assert facts_of("sana-tiny", int8=True).int8 and not facts_of("sana-tiny").int8
    assert facts_of("sana-tiny").stored["text"].dtype == "fp16"


def test_a_public_model_that_is_not_here() -> None:
    facts = facts_of("sana-sprint-1.6b-1024")
    assert facts.path is None and facts.sampler == "scm" and facts.denoiser.guidance_embeds
    assert facts.download == facts.disk > 9e9
    by_repository = facts_of("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers")
    assert by_repository.name == "sana-1.6b-1024-bf16" and by_repository.stored["denoiser"].dtype == "bf16"
    lite = facts_of("sana-1.6b-1024", decoder="dc-ae-lite")
    assert lite.download > facts_of("sana-1.6b-1024").download
    assert lite.stored["decoder"].bytes != facts.stored["decoder"].bytes


@pytest.mark.parametrize("model", ["sana-1.6b-1042", "someone/else", "./nowhere"])
def test_what_is_no_model(model: str) -> None:
    with pytest.raises(ModelNotFound):
        facts_of(model)


def test_another_decoder(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "decoder"
    folder.mkdir()
    config = {"_class_name": "AutoencoderTiny", "latent_channels": 32}
    config |= {"decoder_block_out_channels": [8] * 6, "num_decoder_blocks": [1] * 6}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(next((tiny_folder / "vae").glob("*.safetensors")), folder)
    facts = facts_of(str(tiny_folder), decoder=str(folder))
    assert isinstance(facts.decoder, TinyAutoencoderConfig) and facts.encoder is not None


def test_damage_is_left_to_who_reads_it(tiny_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_folder, copy)
    next((copy / "transformer").glob("*.safetensors")).write_bytes(b"none")
    (copy / "text_encoder" / "config.json").write_text('{"hidden_size": "wide"}')
    facts = folder_facts(hub.ResolvedModel(copy, "damaged"))
    assert facts.stored["denoiser"].bytes == 0 and facts.text["hidden_size"] == 2304
