"""CLIP score by torchmetrics of a CLIP of the real class, and what is no CLIP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana_edge.errors import CheckpointError, ModelNotFound
from sana_edge.evaluate.clip import ClipScore, find_clip
from sana_edge.progress import unseen
from sana_edge.store import downloads, snapshots
from sana_edge.store.folder import component_files
from sana_edge.store.pretrained import resolve_pretrained

TEXTS = ("a red house", "a very " + "long " * 30 + "prompt", "a blue boat")


def pictures(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    for i in range(len(TEXTS)):
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8)).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(len(TEXTS))]


@pytest.mark.slow
def test_clip_score(tmp_path: Path) -> None:
    """As 100 cos by the towers themselves, a text that is too long cut before its end token.

    fp32 through some ten layers: 1e-3 of 100 is about a hundred roundings of 2^-24 of it.
    """
    pytest.importorskip("torchmetrics", exc_type=Exception)
    from tiny_clip import image_processor, tokenizer, write_clip
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPProcessor

    from sana_edge.training.score import Scorer

    write_clip(tmp_path / "clip")
    # the text is read off its end token
    ended = tokenizer()
    ends = [("<bos>", 2), ("<eos>", 1)]
    ended.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A <eos>", special_tokens=ends)
    CLIPProcessor(image_processor(), ended).save_pretrained(tmp_path / "clip")
    paths = pictures(tmp_path)
    found = ClipScore(find_clip(str(tmp_path / "clip"), offline=True, progress=False))
    scores = found.scores(paths, TEXTS, unseen)
    own = Scorer(tmp_path / "clip", device="cpu")
    expected = own.score([Image.open(path).convert("RGB") for path in paths], [[text] for text in TEXTS])
    assert scores == pytest.approx([max(score, 0.0) for (score,) in expected], abs=1e-3)
    assert any(score > 0 for score in scores)
    assert found.cut == own.cut == 1
    # another text, another score
    assert found.score(paths[0], "a blue boat") != pytest.approx(scores[0], abs=1e-3)


@pytest.mark.slow
def test_what_is_no_clip(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics", exc_type=Exception)
    from tiny_clip import image_processor, tokenizer, write_clip

    folder = tmp_path / "clip"
    write_clip(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded as CLIPModel"):
        ClipScore(folder)
    from transformers import SiglipConfig, SiglipModel, SiglipProcessor

    other = tmp_path / "siglip"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**sizes, "vocab_size": 300}, vision_config={**sizes, "image_size": 32, "patch_size": 16}
    )
    SiglipModel(config).save_pretrained(other)
    SiglipProcessor(image_processor(), tokenizer()).save_pretrained(other)
    with pytest.raises(CheckpointError):
        ClipScore(other)


def test_nothing_is_downloaded_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(repository: str, *arguments: object, **options: object) -> Path:
        asked.append(repository)
        raise ModelNotFound("no network")

    monkeypatch.setattr(downloads, "fetch", fetch)
    monkeypatch.setattr(snapshots, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr("sana_edge.evaluate.clip.find_spec", lambda name: True)
    with pytest.raises(ModelNotFound, match="no CLIP was given") as refused:
        find_clip(None, offline=False, progress=False)
    assert "--clip" in refused.value.hint and asked == []
    with pytest.raises(ModelNotFound, match="owner/clip is not on this machine"):
        find_clip("owner/clip", offline=True, progress=False)
    assert asked == []
    with pytest.raises(ModelNotFound, match="no network"):
        find_clip("owner/clip", offline=False, progress=False)
    assert asked == ["owner/clip"]
    with pytest.raises(ModelNotFound, match="no folder, and no repository's name"):
        find_clip("clip", offline=False, progress=False)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_pretrained(str(tmp_path), download=False)


def test_a_repository_is_taken_with_its_processor() -> None:
    names = ["config.json", "model.safetensors", "pytorch_model.bin", "vocab.json", "merges.txt", "README.md"]
    names += ["tokenizer.json", "preprocessor_config.json", "onnx/model.onnx", "tf_model.h5"]
    assert sorted(component_files(names)) == [
        *("config.json", "merges.txt", "model.safetensors", "preprocessor_config.json"),
        *("tokenizer.json", "vocab.json"),
    ]


@pytest.mark.slow
def test_fid_of_pictures_to_others(tmp_path: Path) -> None:
    """With the real Inception and random weights: 0 to itself, more to others."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=Exception)
    from sana_edge.evaluate.fid import FEATURES, Fid, find_inception

    weights = tmp_path / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: {})
        network = inception.FeatureExtractorInceptionV3("random", [str(FEATURES)])
    torch.save(network.state_dict(), weights)
    paths = pictures(tmp_path)
    fid = Fid(paths, find_inception(weights), unseen)
    same = fid.distance(paths, unseen)
    Image.new("RGB", (64, 64), (200, 20, 20)).save(tmp_path / "red.png")
    Image.new("RGB", (64, 64), (20, 20, 200)).save(tmp_path / "blue.png")
    others = fid.distance([tmp_path / "red.png", tmp_path / "blue.png"], unseen)
    assert same == pytest.approx(0, abs=1e-2 * others) and others > 0
    weights.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not the Inception"):
        Fid(paths, weights, unseen)
