"""The stages that train the art's model, at sizes of a second, and the network of its judge."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPProcessor

from judge.network import Detector, detector_loss, targets
from sana_edge import Sana
from sana_edge.config import AutoencoderConfig
from sana_edge.evaluate.judge import detector, scene_prompts
from sana_edge.evaluate.judge.detector import CELLS, SIDE, decode, maps
from sana_edge.evaluate.judge.prompts import COUNTS, Detection, Judgement
from sana_edge.nets.text_encoder import TextEncoder
from sana_edge.store.domain import FILE, read_domain
from sana_edge.training import train_autoencoder as shapes
from sana_edge.training.art import assemble, latents, layout, train_clip, train_denoiser, train_text_encoder
from sana_edge.training.art.pictures import HELD_OUT, SHARD, Pictures
from sana_edge.training.art.scenes import Scene, Thing
from sana_edge.training.art.train_autoencoder import as_pixels, crops, held_out_psnr, liveliness
from train_art_detector import spoilt


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of noise, in the files that `pictures` writes: seven in training, three held out."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    np.save(folder / "pictures-0000000.npy", pixels[:7])
    np.save(folder / "held-out.npy", pixels[7:])
    return folder


def run(module: object, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    module.main()  # type: ignore[attr-defined]


def test_stored_pictures_are_read_by_number(stored: Path) -> None:
    pictures = Pictures(stored)
    assert len(pictures) == 7 and pictures[6].shape == (64, 64, 3)
    assert SHARD % 2 == 0 and HELD_OUT > 0


def test_crops_are_of_the_lively_parts(stored: Path) -> None:
    flat = np.zeros((32, 32, 3), dtype=np.uint8)
    lively = flat.copy()
    lively[8:24, 8:24] = 200
    assert liveliness(lively) > liveliness(flat) == 0
    batch = crops(Pictures(stored), 16, 5, np.random.default_rng(0))
    assert batch.shape == (5, 3, 16, 16) and batch.min() >= -1 and batch.max() <= 1


def test_psnr_is_of_8_bit_values(stored: Path) -> None:
    class Off(torch.nn.Module):
        """Gives pixels back two levels too bright; those at the end stay within the range."""

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels

        def decode(self, latent: torch.Tensor) -> torch.Tensor:
            return latent + 2 / 127.5

    pictures = np.load(stored / "held-out.npy").astype(int)
    errors = (np.minimum(pictures + 2, 255) - pictures) ** 2
    expected = np.mean([10 * np.log10(255**2 / e.mean()) for e in errors])
    # the means of fp32 squares
    assert held_out_psnr(Off(), stored, 3) == pytest.approx(expected, abs=1e-3)


def test_facts_count_from_the_top_left() -> None:
    a, b = Thing("fox", "", "small", 0.7, 0.2, 0.2), Thing("car", "red", "medium", 0.3, 0.7, 0.2)
    names, shades = ["", *layout.kinds()], ["", *layout.COLOURS]
    column = train_text_encoder.facts(Scene("snow", (b, a), "below"))
    assert [names[i] for i in column[:4]] == ["fox", "car", "", ""]
    assert [shades[i] for i in column[4:8]] == ["", "red", "", ""]
    forms = train_text_encoder.FORMS
    assert layout.BACKGROUNDS[column[8]] == "snow" and forms[column[9]] == "column" and column[10] == 0
    beside = Thing("car", "red", "medium", 0.2, 0.25, 0.2)
    row = train_text_encoder.facts(Scene("snow", (a, beside)))
    assert [names[i] for i in row[:2]] == ["car", "fox"] and forms[row[9]] == "row"
    for i in range(50):
        found = train_text_encoder.facts(layout.numbered_scene(i))
        assert all(value < size for value, size in zip(found, train_text_encoder.CLASSES, strict=True))


def test_facts_loss_is_zero_for_what_is_sure() -> None:
    want = torch.tensor([train_text_encoder.facts(layout.numbered_scene(i)) for i in range(5)])
    sizes = train_text_encoder.CLASSES
    one_hot = [torch.nn.functional.one_hot(want[:, i], size) for i, size in enumerate(sizes)]
    loss, right = train_text_encoder.facts_loss(100.0 * torch.cat(one_hot, 1), want)
    assert float(loss) < 1e-6 and right == 1
    loss, right = train_text_encoder.facts_loss(torch.zeros(5, sum(sizes)), want)
    assert float(loss) == pytest.approx(sum(np.log(sizes)), rel=1e-5) and right < 1


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder's training folder after a step or so, and the model folder made of it."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_text_encoder, "lines", lambda count: LINES)
        run(train_text_encoder, patch, "--folder", runs / "text", "--minutes", "0.001", "--batch", "2")
        patch.setattr(assemble, "texts", lambda count: LINES)
        run(assemble, patch, "--runs", runs, "--output", runs / "model", "--text-only")
    return runs


LINES = ["a fox in the snow", "🦊 and a red car", "two teddy bears", "an octopus above the clouds"] * 50


def test_the_text_encoder_loads_with_the_runtime(text: Path) -> None:
    encoder = TextEncoder.load(text / "model", dtype=torch.float32, device="cpu")
    features = encoder.encode(["a fox in the snow", "🦊"])
    assert features.embeddings.shape[2] == train_text_encoder.CONFIG.hidden_size
    assert features.mask.sum(1).tolist()[1] < features.mask.sum(1).tolist()[0]
    domain = read_domain(text / "model")
    assert (
        domain is not None
        and domain.unknown("A red fox, 🦊 🐙") == ["🐙"]
        and (text / "model" / FILE).exists()
    )


def test_latents_and_denoiser_learn_from_files(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: Path
) -> None:
    small = {**shapes.CONFIG.to_dict(), "encoder_block_out_channels": [8, 8, 8, 8, 32, 32]}
    config = AutoencoderConfig.from_dict({**small, "decoder_block_out_channels": [8, 8, 8, 8, 32, 32]})
    monkeypatch.setattr(latents, "CONFIG", config)
    weights = {f"ema.{k}": v.contiguous() for k, v in latents.Autoencoder(config).state_dict().items()}
    (tmp_path / "vae").mkdir()
    save_file(weights, tmp_path / "vae" / "state.safetensors", {"step": "0", "seconds": "0"})
    given = ["--vae", tmp_path / "vae", "--text", text / "model", "--pictures", stored]
    run(latents, monkeypatch, *given, "--folder", tmp_path / "latents")
    found, captions = latents.load(tmp_path / "latents")
    assert found.shape == (7, 32, 2, 2) and captions.starts.shape == (7 * latents.CAPTIONS + 1,)
    encoder = TextEncoder.load(text / "model", dtype=torch.float32, device="cpu")
    wanted = encoder.encode([latents.texts_of(0)[0], latents.texts_of(3)[2]])
    batch = captions.batch([0, 3 * latents.CAPTIONS + 2], [False, False])
    assert (batch.mask == wanted.mask).all()
    # stored as fp16
    assert (batch.embeddings - wanted.embeddings).abs().max() <= 2**-11 * wanted.embeddings.abs().max()
    dropped = captions.batch([0, 20], [True, False])
    assert dropped.mask[0].tolist() == [True] + [False] * (dropped.mask.shape[1] - 1)

    given = ["--folder", tmp_path / "dit", "--latents", tmp_path / "latents", "--minutes", "0.005"]
    run(train_denoiser, monkeypatch, *given, "--batch", "3")

    shutil.copytree(text / "text", tmp_path / "text")
    monkeypatch.setattr(assemble, "AUTOENCODER", config)
    monkeypatch.setattr(assemble, "texts", lambda count: LINES)
    run(assemble, monkeypatch, "--runs", tmp_path, "--output", tmp_path / "model")
    with Sana.load(str(tmp_path / "model")) as sana:
        made = sana.generate("a fox and a zebra", size=(64, 64), steps=2, seed=1)
    assert made.pixels.shape == (64, 64, 3) and len(made.notes) == 2
    assert "does not know: zebra" in made.notes[0] and "256x256, not at 64x64" in made.notes[1]


def test_whitened_features_have_unit_variance() -> None:
    mixing = torch.linalg.qr(torch.randn(128, 128)).Q @ torch.diag(torch.logspace(-0.5, 0.5, 128))
    features = (torch.randn(4096, 128) @ mixing + 3).half()
    model = train_denoiser.Denoiser(train_denoiser.CONFIG)
    train_denoiser.initialise(model)
    train_denoiser.whiten(model, features)
    projected = model.caption_expand(features.float()).detach()
    assert projected.mean(0).abs().max() < 0.05
    # Glorot's variance 2 / (in + out) times the inputs; drawn from 4,096 rows, of 24,576 weights
    wide, narrow = model.caption_expand.weight.shape
    assert float(projected.var(0).mean()) == pytest.approx(2 * narrow / (narrow + wide), rel=0.05)


def test_the_clip_is_a_folder_that_transformers_reads(
    text: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--folder", tmp_path / "clip", "--pictures", stored, "--tokenizer", text / "text" / "tokenizer"]
    run(train_clip, monkeypatch, *given, "--output", tmp_path / "model", "--minutes", "0.001", "--batch", "4")
    model = CLIPModel.from_pretrained(tmp_path / "model")
    processor = CLIPProcessor.from_pretrained(tmp_path / "model")
    assert processor.tokenizer("a 🦊").input_ids[0] == 2 and processor.tokenizer("a 🦊").input_ids[-1] == 1
    picture = np.asarray(Pictures(stored)[0])
    texts = ["a fox in the snow", "two teddy bears"]
    inputs = processor(text=texts, images=[picture], return_tensors="pt", padding=True)
    scores = model(**inputs).logits_per_image
    # the end of a text is what CLIP reads: two texts are two scores
    assert scores.shape == (1, 2) and scores[0, 0].item() != scores[0, 1].item()


def test_targets_lie_in_the_cells_of_their_objects() -> None:
    scene = layout.numbered_scene(5)
    want = targets(scene)
    for thing in scene.things:
        row, column = int(thing.y * CELLS), int(thing.x * CELLS)
        assert int(want["kind"][row, column]) == list(layout.kinds()).index(thing.kind)
        x, y, radius = want["place"][:, row, column].tolist()
        assert (column + 0.5 + x) / CELLS == pytest.approx(thing.x, abs=1e-6)
        assert (row + 0.5 + y) / CELLS == pytest.approx(thing.y, abs=1e-6)
        assert radius == pytest.approx(thing.radius, abs=1e-6)
    assert int((want["kind"] >= 0).sum()) == len(scene.things)


def test_a_detector_learns_a_scene_and_the_judge_reads_it() -> None:
    torch.manual_seed(1)
    picture = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    scene = layout.numbered_scene(2)
    want = {name: value[None] for name, value in targets(scene).items()}
    model = Detector(width=32).train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    pixels = as_pixels(picture[None])
    for _ in range(60):
        loss, right = detector_loss(model(pixels), want)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert right == 1
    # the running statistics become those of the one batch that there is
    with torch.inference_mode():
        for _ in range(60):
            model(pixels)
    found = decode(maps({name: value.numpy() for name, value in model.state_dict().items()}, picture))
    assert sorted(d.kind for d in found.detections) == sorted(t.kind for t in scene.things)
    assert found.background == scene.background
    for thing in scene.things:
        assert any(abs(d.x - thing.x) + abs(d.y - thing.y) < 0.1 for d in found.detections)


def test_numpy_computes_the_network_that_torch_trains() -> None:
    picture = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    weights = detector._weights()
    model = Detector().eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    found = maps(weights, picture)
    with torch.inference_mode():
        expected = model(as_pixels(picture[None]))
    for name in ("centre", "kind", "colour", "place", "background"):
        right, left = getattr(expected, name)[0].numpy(), getattr(found, name)
        # sums of up to 1,152 products in fp32, through eleven layers
        np.testing.assert_allclose(left, right, atol=1e-5 * max(1, abs(right).max()), rtol=0)


def test_spoilt_pictures_stay_in_range() -> None:
    batch = spoilt(torch.rand(4, 3, SIDE, SIDE) * 2 - 1)
    assert batch.shape == (4, 3, SIDE, SIDE) and batch.abs().max() <= 1


def test_prompts_are_held_out_and_checked_by_their_own_scene() -> None:
    made = scene_prompts.prompts()
    assert len(made) == len({p.text for p in made}) == sum(COUNTS.values()) == 553
    assert all(layout.holds(p.scene) for p in made)
    rng = random.Random(0)
    for prompt in rng.sample(made, 100):
        things = prompt.scene.things
        found = tuple(
            Detection(t.kind, t.colour, t.x, t.y, (t.x - 0.1, t.y - 0.1, t.x + 0.1, t.y + 0.1), 0.9)
            for t in things
        )
        assert prompt.check(Judgement("plain", found)) == ""
        assert prompt.check(Judgement("plain", found[1:])) != ""
