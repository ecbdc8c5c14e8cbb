"""Saving pictures: what the PNG carries, and that a file is whole or absent."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.image import Image, read_metadata
from sana_edge.system.atomic import check_writable

METADATA = {"prompt": "a house", "negative_prompt": "", "seed": 7, "size": [64, 32], "guidance": 4.5}


def picture(**changes: Any) -> Image:
    pixels = np.arange(32 * 64 * 3, dtype=np.uint32).reshape(32, 64, 3).astype(np.uint8)
    return Image(pixels, 7, {**METADATA, **changes})


def test_save_and_read_back(tmp_path: Path) -> None:
    path = picture().save(tmp_path / "house.png")
    with PILImage.open(path) as image:
        assert np.array_equal(np.asarray(image), picture().pixels)
        assert image.info["Description"] == "a house"
    assert read_metadata(path) == METADATA
    assert os.listdir(tmp_path) == ["house.png"]


def test_permissions_are_those_of_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = picture().save(tmp_path / "house.png")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize(
    "prompt",
    [
        "x" * 10_000,
        "日本の家 🏠 e\u0301 \u202e right to left",
        "nul \0 inside",
        "lone surrogate \udcff",
        "\n\t",
    ],
    ids=["long", "unicode", "nul", "surrogate", "whitespace"],
)
def test_any_prompt_survives(tmp_path: Path, prompt: str) -> None:
    path = picture(prompt=prompt).save(tmp_path / "odd.png")
    assert read_metadata(path)["prompt"] == prompt


def test_equal_pictures_give_equal_bytes() -> None:
    assert picture().png() == picture().png()
    assert picture().png() != picture(seed=8).png()
    assert PILImage.open(io.BytesIO(picture().png())).format == "PNG"


def test_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "house.png"
    path.write_bytes(b"mine")
    with pytest.raises(InvalidInput, match="already exists") as caught:
        picture().save(path)
    assert "--force" in caught.value.hint
    assert path.read_bytes() == b"mine"
    picture().save(path, force=True)
    assert read_metadata(path) == METADATA


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_a_file_that_appears_late_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    assert read_metadata(picture().save(tmp_path / "free.png")) == METADATA
    fsync = os.fsync

    def late(file: int) -> None:
        fsync(file)
        (tmp_path / "late.png").write_bytes(b"mine")

    monkeypatch.setattr(os, "fsync", late)
    with pytest.raises(InvalidInput, match=r"late\.png already exists"):
        picture().save(tmp_path / "late.png")
    assert (tmp_path / "late.png").read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["free.png", "late.png"]


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    for name, problem in (
        ("pipe.png", "not a regular file"),
        ("dangling.png", "regular"),
        ("", "is a folder"),
    ):
        with pytest.raises(InvalidInput, match=problem):
            picture().save(tmp_path / name, force=True)


@pytest.mark.parametrize(
    ("name", "problem"),
    [("missing/a.png", "No such file"), ("file/a.png", "Not a directory"), ("n" * 300 + ".png", "too long")],
    ids=["no-folder", "file-as-folder", "long-name"],
)
def test_unwritable_places(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SanaError, match=problem) as caught:
        picture().save(tmp_path / name)
    assert caught.value.hint
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "old.png").write_bytes(b"mine")
    monkeypatch.setattr(os, call, full)
    for name in ("new.png", "old.png"):
        with pytest.raises(SanaError, match="No space left") as caught:
            picture().save(tmp_path / name, force=True)
        assert "disk is full" in caught.value.hint
    assert os.listdir(tmp_path) == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == b"mine"


def test_full_disk_without_links_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SanaError, match="No space left"):
        picture().save(tmp_path / "house.png")
    assert os.listdir(tmp_path) == []


def test_interruption_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        picture().save(tmp_path / "house.png")
    assert os.listdir(tmp_path) == []


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "house.png")
    assert os.listdir(tmp_path) == []
    with pytest.raises(SanaError, match="cannot write"):
        check_writable(tmp_path / "missing" / "house.png")
    with pytest.raises(SanaError, match="too long"):
        check_writable(tmp_path / ("n" * 300 + ".png"))
    assert os.listdir(tmp_path) == []


def test_foreign_files_have_no_metadata(tmp_path: Path) -> None:
    PILImage.new("RGB", (8, 8)).save(tmp_path / "other.png")
    (tmp_path / "text.png").write_text("no image")
    for name, problem in (
        ("other.png", "no sana-edge metadata"),
        ("text.png", "cannot read"),
        ("none.png", "cannot"),
    ):
        with pytest.raises(InvalidInput, match=problem):
            read_metadata(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jpg", "b.JPEG", "c.webp"])
def test_other_formats_carry_the_metadata(tmp_path: Path, name: str) -> None:
    odd = picture(prompt="日本の家 🏠 \udcff")
    path = odd.save(tmp_path / name)
    with PILImage.open(path) as image:
        assert image.format == ("WEBP" if name == "c.webp" else "JPEG") and image.size == (64, 32)
        description = image.getexif()[0x010E]
    # Pillow reads ASCII tags as Latin-1
    assert description.encode("latin-1").decode() == "日本の家 🏠 ?"
    assert read_metadata(path) == odd.metadata
    assert path.read_bytes() == odd.save(tmp_path / f"again-{name}").read_bytes()
    smaller = odd.save(tmp_path / f"small-{name}", quality=20)
    assert smaller.stat().st_size < path.stat().st_size


def test_a_prompt_too_long_for_a_jpeg(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = picture(prompt="日" * 30_000).save(tmp_path / "long.jpg")
    assert PILImage.open(path).size == (64, 32) and "a .png has it" in caplog.text
    with pytest.raises(InvalidInput, match="no sana-edge metadata"):
        read_metadata(path)


def test_formats_that_are_not_written(tmp_path: Path) -> None:
    for name, quality, problem in (
        ("a.gif", None, r"a\.gif does not end in \.png, \.jpg"),
        ("a.png", 80, "PNG loses nothing"),
        ("a.jpg", 0, "quality is 0"),
        ("a.webp", 101, "quality is 101"),
        ("a.jpg", True, "quality is True"),
    ):
        with pytest.raises(InvalidInput, match=problem):
            picture().save(tmp_path / name, quality=quality)
    assert os.listdir(tmp_path) == []
    # without an ending it is what it always was
    assert PILImage.open(picture().save(tmp_path / "plain")).format == "PNG"


def test_a_picture_shows_itself() -> None:
    made = picture(prompt="a house " * 20)
    assert repr(made) == f"Image(64x32, seed 7, {('a house ' * 20)[:57] + '...'!r})"
    assert repr(Image(made.pixels, 3)) == "Image(64x32, seed 3, '')"
    assert made._repr_png_() == made.png()
    assert np.array_equal(np.asarray(made.pil()), made.pixels) and made.pil().mode == "RGB"


@pytest.mark.parametrize("text", ["5", "null", "[1]", "[" * 100_000, "x"], ids=str)
def test_text_chunks_that_are_no_metadata(tmp_path: Path, text: str) -> None:
    chunks = PngInfo()
    chunks.add_text("sana_edge", text)
    PILImage.new("RGB", (8, 8)).save(tmp_path / "odd.png", pnginfo=chunks)
    with pytest.raises(InvalidInput, match="no sana-edge metadata"):
        read_metadata(tmp_path / "odd.png")
