"""Pictures and captions on their way to a batch: buckets, metadata, cache of latents; bad and broken ones."""

from __future__ import annotations

import json
import os
import random
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
from diffusers.pipelines.sana import pipeline_sana
from PIL import Image

from sana_edge.errors import CheckpointError, InvalidInput, SanaError
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.store import weights
from sana_edge.training import buckets, latent_cache
from sana_edge.training.batches import Batches, choose
from sana_edge.training.frozen import Frozen
from sana_edge.training.imagefolder import Entry, LeftOut, read_entries
from sana_edge.training.latent_cache import LatentCache, Picture
from sana_edge.training.metadata import Metadata, find_metadata
from sana_edge.training.score import probabilities

TABLES = {
    256: pipeline_pixart_alpha.ASPECT_RATIO_256_BIN,
    512: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
    1024: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
    2048: pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN,
    4096: pipeline_sana.ASPECT_RATIO_4096_BIN,
}


def draw(path: Path, width: int = 40, height: int = 40, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (shade, 90, 200)).save(path)


def write_rows(folder: Path, rows: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures with two captions each, of which the third is wide."""
    data = tmp_path / "data"
    for number in range(5):
        draw(data / f"{number}.png", width=120 if number == 2 else 40, shade=number)
    write_rows(data, [{"file_name": f"{n}.png", "captions": [f"a {n}", f"the {n}"]} for n in range(5)])
    return data


@pytest.mark.parametrize("resolution", buckets.RESOLUTIONS)
def test_the_tables_are_those_of_diffusers(resolution: int) -> None:
    expected = {float(k): (int(h), int(w)) for k, (h, w) in TABLES[resolution].items()}
    assert buckets.aspect_ratios(resolution) == expected


def test_a_bucket_is_the_nearest_that_the_autoencoder_can_take() -> None:
    assert buckets.bucket(1000, 1000, 512, 32) == (512, 512)
    assert buckets.bucket(1920, 1080, 1024, 32) == (768, 1344)
    # 240 x 272 is nearest and no multiple of 32
    assert buckets.aspect_ratios(256)[0.88] == (240, 272)
    assert buckets.bucket(100, 88, 256, 32) == (224, 288)
    sides = [side for size in buckets.buckets(256, 32).values() for side in size]
    assert len(sides) == 18 and all(side % 32 == 0 for side in sides)


def test_a_picture_is_covered_cut_in_the_middle_and_turned_upright() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (80, 0, 220, 100))
    assert (np.array(buckets.fit(wide, (64, 64))) == (0, 0, 255)).all()
    clear = Image.new("RGBA", (50, 70), (0, 0, 0, 0))
    assert buckets.fit(clear, (96, 64)).getpixel((5, 5)) == (255, 255, 255)
    turned = Image.new("RGB", (40, 80))
    turned.getexif()[0x0112] = 6
    for width in range(33, 60):
        assert buckets.fit(turned.resize((width, 41)), (352, 736)).size == (736, 352)


def test_metadata_keeps_what_it_was_told_when_the_process_is_killed(folder: Path) -> None:
    (killed,) = find_metadata(folder)
    killed.update("1.png", note="line\u2028separators, too")
    killed.update("3.png", captions=["new"])
    # the last line was not written whole, and another process goes on behind it
    with open(killed.journal, "a") as journal:
        journal.write('{"file_name": "4.png", "capti')
    before = (folder / "metadata.jsonl").read_bytes()
    with Metadata(folder / "metadata.jsonl") as again:
        again.update("0.png", captions=["also"])
        assert (folder / "metadata.jsonl").read_bytes() == before
    assert not again.journal.exists()
    rows = Metadata(folder / "metadata.jsonl").rows
    assert rows["1.png"] == {
        "file_name": "1.png",
        "captions": ["a 1", "the 1"],
        "note": "line\u2028separators, too",
    }
    assert [rows[f"{n}.png"]["captions"] for n in (0, 3, 4)] == [["also"], ["new"], ["a 4", "the 4"]]


def test_metadata_on_a_full_disk_stays_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "metadata.jsonl").read_bytes()

    def full(path: Path, text: str, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SanaError, match="No space left") as caught:
        patch.setattr(Path, "write_text", full)
        with Metadata(folder / "metadata.jsonl") as metadata:
            metadata.update("1.png", captions=["kept"])
    assert "goes on from here" in caught.value.hint
    assert (folder / "metadata.jsonl").read_bytes() == before
    assert Metadata(folder / "metadata.jsonl").rows["1.png"]["captions"] == ["kept"]
    assert not list(folder.glob("*.partial"))


def test_a_row_that_cannot_be_read_is_named(folder: Path) -> None:
    with open(folder / "metadata.jsonl", "a") as file:
        file.write("{\n")
    with pytest.raises(InvalidInput, match="line 6, is not JSON"):
        find_metadata(folder)
    write_rows(folder, [{"file": "0.png"}])
    with pytest.raises(InvalidInput, match="row 1 has no file_name"):
        find_metadata(folder)


def test_captions_are_read_as_lists_or_as_text_and_empty_ones_counted(tmp_path: Path) -> None:
    for name in ("a", "b", "sub/c"):
        draw(tmp_path / f"{name}.png")
    rows = [
        {"file_name": "a.png", "captions": ["one", "  ", " two "], "clip_scores": [20.0, None, 30.0]},
        {"file_name": "b.png", "captions": ["", None]},
        {"file_name": "sub/c.png", "captions": ["three"], "clip_scores": [10.0]},
    ]
    write_rows(tmp_path, rows)
    left_out = LeftOut()
    first, second = read_entries(tmp_path, "train", left_out)
    assert (first.path.name, first.captions, first.scores) == ("a.png", ("one", "two"), ())
    assert (second.path.name, second.captions, second.scores) == ("c.png", ("three",), (10.0,))
    assert list(left_out.lines()) == [
        "skipped 1 picture without a caption: b.png",
        "left out 3 empty captions",
    ]
    write_rows(tmp_path, [{"file_name": "a.png", "text": "plain"}])
    assert [entry.captions for entry in read_entries(tmp_path, "train", LeftOut())] == [("plain",)]


def test_a_folder_without_captions_says_how_to_get_some(folder: Path, tmp_path: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(InvalidInput, match="5 pictures and no captions") as caught:
        read_entries(folder, "train", LeftOut())
    assert "sana_edge.training.caption --data" in caught.value.hint
    with pytest.raises(InvalidInput, match="is not a folder"):
        read_entries(tmp_path / "nothing", "train", LeftOut())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="as an imagefolder"):
        read_entries(tmp_path / "empty", "train", LeftOut())
    with pytest.raises(InvalidInput, match="with a split test"):
        read_entries(folder, "test", LeftOut())


class Encoding:
    """A cache of the tiny model's latents, and how many pictures were encoded."""

    def __init__(self, model: Path, place: Path) -> None:
        self.frozen, self.place, self.count = Frozen.find(str(model)), place, 0

    def open(self) -> LatentCache:
        return LatentCache(self.place, self.frozen.autoencoder_checksum(), 256, 32)

    def load(self) -> Autoencoder:
        model = self.frozen.autoencoder(torch.device("cpu"))
        inner = model.encode

        def encode(pixels: torch.Tensor) -> torch.Tensor:
            self.count += len(pixels)
            return inner(pixels)

        model.encode = encode  # type: ignore[method-assign]
        return model


@pytest.fixture
def encoding(tiny_folder: Path, tmp_path: Path) -> Encoding:
    return Encoding(tiny_folder, tmp_path / "latents")


def test_latents_are_computed_once_by_content(folder: Path, encoding: Encoding) -> None:
    entries, cache, left_out = read_entries(folder, "train", LeftOut()), encoding.open(), LeftOut()
    cache.fill(entries, encoding.load, left_out)
    assert encoding.count == 5 and left_out.enlarged == 5
    sizes = Counter(picture.size for _, picture in cache.lookup(entries))
    assert sizes == {(256, 256): 4, buckets.bucket(120, 40, 256, 32): 1}
    entry, picture = cache.lookup(entries)[0]
    with Image.open(entry.path) as image:
        pixels = torch.from_numpy(np.array(buckets.fit(image, picture.size)))
    with torch.no_grad():
        expected = encoding.load().encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1)[0]
    # fp16: half a unit of 2^-11 of the largest, and what a batch of another size changes in fp32
    assert (cache[picture.key].float() - expected).abs().max() <= 2**-11 * expected.abs().max()
    (folder / "0.png").rename(folder / "renamed.png")
    draw(folder / "1.png", shade=77)
    write_rows(folder, [{"file_name": f"{n}.png", "captions": ["a"]} for n in ("renamed", "1")])
    encoding.count, entries = 0, read_entries(folder, "train", LeftOut())
    again = encoding.open()
    again.fill(entries, encoding.load, LeftOut())
    assert encoding.count == 1 and len(again.lookup(entries)) == 2


def test_another_autoencoder_has_other_latents(
    folder: Path, encoding: Encoding, tiny_sprint_folder: Path
) -> None:
    entries = read_entries(folder, "train", LeftOut())
    encoding.open().fill(entries, encoding.load, LeftOut())
    other = Encoding(tiny_sprint_folder, encoding.place)
    assert other.open().lookup(entries) == []


def test_broken_pictures_are_skipped_named_and_counted(folder: Path, encoding: Encoding) -> None:
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "4.png").write_bytes(b"no picture")
    rows = [{"file_name": f"{n}.png", "captions": ["a"]} for n in (0, 1, 2, 3, 4, "gone")]
    write_rows(folder, rows)
    entries, left_out, cache = read_entries(folder, "train", LeftOut()), LeftOut(), encoding.open()
    cache.fill(entries, encoding.load, left_out)
    assert len(cache.lookup(entries)) == 3
    line = next(left_out.lines())
    assert line.startswith("skipped 3 broken pictures: 3.png (") and "4.png" in line and "gone.png" in line
    left_out.broken = {f"{n}.png": "cut" for n in range(1000)}
    assert next(left_out.lines()).startswith("skipped 1,000 broken pictures: 0.png (cut), ")
    assert next(left_out.lines()).endswith("4.png (cut), ...")


@pytest.mark.parametrize("stop", ["killed", "full"])
def test_what_was_encoded_before_the_end_is_kept(
    folder: Path, encoding: Encoding, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    monkeypatch.setattr(latent_cache, "SHARD", 2)
    monkeypatch.setattr(latent_cache, "_PIXELS", 1)
    entries, save, saved = read_entries(folder, "train", LeftOut()), weights.save_file, []

    def third(tensors: object, path: Path, metadata: object) -> None:
        if len(saved) == 1:
            path.write_bytes(b"half")
            raise KeyboardInterrupt if stop == "killed" else OSError(28, "No space left on device")
        saved.append(path)
        save(tensors, path, metadata)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", third)
        expected = KeyboardInterrupt if stop == "killed" else SanaError
        with pytest.raises(expected):
            encoding.open().fill(entries, encoding.load, LeftOut())
    assert len(list(encoding.place.rglob("latents-*"))) == 1 and not list(encoding.place.rglob("*.partial"))
    encoding.count, cache = 0, encoding.open()
    cache.fill(entries, encoding.load, LeftOut())
    assert encoding.count == 3 and len(cache.lookup(entries)) == 5


def test_a_damaged_shard_is_named(folder: Path, encoding: Encoding) -> None:
    encoding.open().fill(read_entries(folder, "train", LeftOut()), encoding.load, LeftOut())
    (shard,) = encoding.place.rglob("latents-*")
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="is damaged"):
        encoding.open()


def pictures(*counts: int) -> list[tuple[Entry, Picture]]:
    """So many pictures of the first size, of the second and so on."""
    sizes = [(256, 256), (320, 192), (192, 320)]
    return [
        (Entry(Path(f"{b}-{n}"), ("x", "y")), Picture(f"{b}-{n}", sizes[b]))
        for b, count in enumerate(counts)
        for n in range(count)
    ]


def test_every_epoch_has_every_picture_and_a_batch_one_size() -> None:
    data = pictures(10, 3, 1)
    batches = Batches(data, 4, seed=5, tau=1.0, dropout=0.0)
    assert batches.epoch_length == 3 + 1 + 1
    for epoch in range(3):
        found = [batches[step] for step in range(5 * epoch, 5 * epoch + 5)]
        assert {item.key for batch in found for item in batch} == {picture.key for _, picture in data}
        assert all(len(batch) == 4 and len({item.key[0] for item in batch}) == 1 for batch in found)
    assert [batches[step] for step in range(5)] != [batches[step] for step in range(5, 10)]


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    one, other = (Batches(pictures(9, 4), 4, seed=5, tau=1.0, dropout=0.3) for _ in range(2))
    assert one[17] == other[17] and one[2] == other[2] and one[17] != other[2]
    assert Batches(pictures(9, 4), 4, seed=6, tau=1.0, dropout=0.3)[17] != one[17]


# binomial: sqrt(p (1 - p) / n), four of them
def deviation(p: float, n: int) -> float:
    return 4 * float((p * (1 - p) / n) ** 0.5)


def test_captions_are_dropped_as_often_as_asked() -> None:
    batches = Batches(pictures(4), 4, seed=1, tau=1.0, dropout=0.1)
    captions = [item.caption for step in range(1000) for item in batches[step]]
    assert abs(captions.count("") / 4000 - 0.1) < deviation(0.1, 4000)


def test_captions_are_drawn_by_their_scores() -> None:
    scores = (24.0, 25.0, 25.5)
    expected = probabilities(scores, 0.5)
    weights_of = [2.718281828459045 ** (score / 0.5) for score in scores]
    assert expected == pytest.approx([weight / sum(weights_of) for weight in weights_of])
    # far from what exp could hold
    assert probabilities((2000.0, 1990.0), 0.1) == pytest.approx([1.0, 0.0])
    rng = random.Random(0)
    counts = Counter(choose(Entry(Path(), ("a", "b", "c"), scores), 0.5, rng) for _ in range(4000))
    for text, p in zip("abc", expected, strict=True):
        assert abs(counts[text] / 4000 - p) < deviation(p, 4000)
    plain = Counter(choose(Entry(Path(), ("a", "b")), 0.5, rng) for _ in range(4000))
    assert abs(plain["a"] / 4000 - 0.5) < deviation(0.5, 4000)


def test_half_a_surrogate_pair_in_a_caption_is_kept(folder: Path) -> None:
    """A file may have it in an escape; UTF-8 does not."""
    write_rows(folder, [{"file_name": "1.png", "text": "\ud800", "more": "é"}])
    with Metadata(folder / "metadata.jsonl") as metadata:
        metadata.update("1.png", captions=["\udfff"])
    row = Metadata(folder / "metadata.jsonl").rows["1.png"]
    assert row == {"file_name": "1.png", "text": "\ud800", "more": "é", "captions": ["\udfff"]}


def test_reading_a_folder_asks_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[object]()

    def look_up(*arguments: object, **_: object) -> None:
        asked.append(arguments[0])
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    write_rows(folder, [{"file_name": "1.png", "text": "a"}])
    read_entries(folder, "train", LeftOut())
    assert asked == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes by name")
@pytest.mark.parametrize("name", ["metadata.jsonl", ".metadata.jsonl.journal"])
def test_metadata_that_is_a_pipe_or_endless(tmp_path: Path, name: str) -> None:
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / name)
        with pytest.raises(InvalidInput, match="no regular file"):
            Metadata(tmp_path / "metadata.jsonl")
        (tmp_path / name).unlink()


def test_links_beside_the_metadata_stay_what_they_lead_to(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    write_rows(folder, [{"file_name": "1.png", "text": "a"}])
    mine.write_bytes((folder / "metadata.jsonl").read_bytes())
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.jsonl").symlink_to(mine)
    before = mine.read_bytes()
    with Metadata(folder / "metadata.jsonl") as metadata:
        metadata.update("1.png", captions=["b"])
    assert mine.read_bytes() == before
    assert Metadata(folder / "metadata.jsonl").rows["1.png"]["captions"] == ["b"]
    (folder / ".metadata.jsonl.journal").symlink_to(mine)
    with pytest.raises(SanaError, match="it is a link"):
        Metadata(folder / "metadata.jsonl").update("1.png", captions=["c"])
    assert mine.read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes by name")
def test_pipes_and_links_among_latents(tmp_path: Path) -> None:
    home = LatentCache(tmp_path / "latents", "a" * 32, 64, 32).folder
    home.mkdir(parents=True)
    os.mkfifo(home / "files.jsonl")
    LatentCache(tmp_path / "latents", "a" * 32, 64, 32)
    os.mkfifo(home / "latents-a.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        LatentCache(tmp_path / "latents", "a" * 32, 64, 32)
