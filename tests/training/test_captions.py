"""Captions and CLIP scores by real classes with random weights, written into the metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_clip
import torch
from PIL import Image
from transformers import CLIPModel

from sana_edge.errors import CheckpointError, InvalidInput, SanaError
from sana_edge.training import caption, score
from sana_edge.training.command import start
from sana_edge.training.metadata import Metadata


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    tiny_clip.write_llava(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip.write_clip(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        Image.effect_noise((48, 40 + 4 * number), 90).convert("RGB").save(folder / f"{number}.png")
    return folder


def rows(data: Path) -> dict[str, dict[str, object]]:
    return Metadata(data / "metadata.jsonl").rows


def test_a_folder_without_metadata_gets_captions_and_keeps_those_before(data: Path, llava: Path) -> None:
    captioner = caption.Captioner(llava, tokens=6)
    count, left_out = caption.write_captions(data, captioner, "tiny", 2)
    assert count + left_out.empty == 3
    found = rows(data)
    assert set(found) == {"0.png", "1.png", "2.png"}
    assert all(row["captioned_by"] == ["tiny"] for row in found.values())
    first = {name: row["captions"] for name, row in found.items()}
    assert any(first.values())
    assert caption.write_captions(data, captioner, "tiny", 2)[0] == 0
    caption.write_captions(data, captioner, "other", 2)
    again = rows(data)
    for name, captions in first.items():
        assert again[name]["captions"] == [*captions, *captions]  # type: ignore[misc]
        assert again[name]["captioned_by"] == ["tiny", "other"]


def test_a_caption_is_what_the_model_says_of_its_picture_alone(data: Path, llava: Path) -> None:
    captioner = caption.Captioner(llava, tokens=6)
    pictures = [Image.open(data / f"{number}.png").convert("RGB") for number in range(3)]
    together = captioner.describe(pictures)
    assert together == [captioner.describe([picture])[0] for picture in pictures]
    prompt = captioner.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": caption.PROMPT}]}]
    )
    inputs = captioner.processor(images=pictures[0], text=prompt, return_tensors="pt")
    ids = captioner.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    said = captioner.processor.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert together[0] == " ".join(said.split())


def test_captioning_skips_broken_pictures_and_goes_on_after_a_kill(
    data: Path, llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "1.png").write_bytes(b"no picture")
    captioner = caption.Captioner(llava, tokens=4)
    describe, calls = captioner.describe, []

    def killed(pictures: list[Image.Image]) -> list[str]:
        if calls:
            raise KeyboardInterrupt
        calls.append(len(pictures))
        return describe(pictures)

    monkeypatch.setattr(captioner, "describe", killed)
    with pytest.raises(KeyboardInterrupt):
        caption.write_captions(data, captioner, "tiny", 1)
    assert rows(data)["0.png"]["captioned_by"] == ["tiny"]
    monkeypatch.setattr(captioner, "describe", describe)
    count, left_out = caption.write_captions(data, captioner, "tiny", 1)
    assert count + left_out.empty == 1 and list(left_out.broken) == ["1.png"]
    assert "captioned_by" not in rows(data)["1.png"]


def test_scores_are_those_of_the_clip_and_are_computed_once(data: Path, clip: Path) -> None:
    texts = [["a red house", "blue"], ["", "a"], ["house"]]
    lines = [{"file_name": f"{n}.png", "captions": own, "extra": n} for n, own in enumerate(texts)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scorer = score.Scorer(clip)
    assert score.write_scores(data, scorer, 2)[0] == 3
    found = rows(data)
    processor, model = scorer.processor, CLIPModel.from_pretrained(clip)
    for number, own in enumerate(texts):
        for text, value in zip(own, found[f"{number}.png"]["clip_scores"], strict=True):  # type: ignore[call-overload]
            if not text:
                assert value is None
                continue
            picture = Image.open(data / f"{number}.png").convert("RGB")
            inputs = processor(text=[text], images=picture, return_tensors="pt")
            with torch.no_grad():
                logit = model(**inputs).logits_per_image / model.logit_scale.exp()
            # rounded to four places; batches differ by fp32 roundings, 100 · 1e-6
            assert abs(100 * float(logit) - value) < 5e-5 + 1e-4
    assert [found[f"{n}.png"]["extra"] for n in range(3)] == [0, 1, 2]
    assert score.write_scores(data, scorer, 2)[0] == 0
    metadata = Metadata(data / "metadata.jsonl")
    with metadata:
        metadata.update("2.png", captions=["house", "another"])
    assert score.write_scores(data, scorer, 2)[0] == 1


def test_captions_longer_than_the_clips_text_are_cut_and_counted(
    data: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "a red house and " * 20
    rows_ = [
        {"file_name": "0.png", "captions": [long, "a"]},
        {"file_name": "1.png", "captions": [long + "!"]},
    ]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    parser = score.argparse.ArgumentParser()
    score.add_model_options(parser, "a CLIP")
    assert start(parser, score.run, ["--data", str(data), "--model", str(clip)]) == 0
    said = capsys.readouterr()
    assert "2 captions are longer than the CLIP's 16 tokens: cut" in said.err
    assert said.out == "scored the captions of 2 pictures\n"


def test_a_folder_that_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is not a folder"):
        caption.Captioner(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        score.Scorer(tmp_path)


def test_errors_are_a_line_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(arguments: object) -> None:
        raise SanaError("it broke", "mend it")

    assert start(score.argparse.ArgumentParser(), fail, []) == 1
    assert capsys.readouterr().err == "error: it broke\nhint:  mend it\n"
