"""Pairs that are drawn, kept, drawn again where they are not there, and refused where they are another's."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import Grey
from PIL import Image as PILImage

from sana_edge.errors import InvalidInput, OutOfMemory, SanaError
from sana_edge.evaluate import report
from sana_edge.evaluate.metrics import MetricOptions
from sana_edge.evaluate.pictures import RESULTS, SHEET, Source, fingerprint
from sana_edge.evaluate.prompts import PromptSet
from sana_edge.evaluate.run import Evaluation
from sana_edge.image import Image
from sana_edge.progress import unseen
from sana_edge.system import atomic

FLOAT, INT8 = Source("tiny", "tiny", False, "a" * 64), Source("tiny-int8", "tiny", True, "a" * 64)
PROMPTS = PromptSet("own", ("a red house", "a blue boat", "a green cat", "two yellow stars"))


class Loads:
    """Loads `Grey`, and remembers it by label."""

    def __init__(self, change: Callable[[Grey], None] = lambda model: None) -> None:
        self.models: dict[str, Grey] = {}
        self._change = change

    def __call__(self, source: Source) -> Any:
        self.models[source.label] = Grey(source)
        self._change(self.models[source.label])
        return self.models[source.label]

    @property
    def drawn(self) -> dict[str, int]:
        return {label: len(model.drawn) for label, model in self.models.items()}


def evaluation(folder: Path, **changes: Any) -> Evaluation:
    asked = Evaluation(
        PROMPTS, [FLOAT, INT8], folder / "out", {"seed": 0, "steps": 4}, metrics=MetricOptions(("psnr",))
    )
    return replace(asked, **changes)


def run(asked: Evaluation, loads: Loads | None = None, said: list[str] | None = None) -> report.Report:
    return asked.run(loads or Loads(), tell=unseen, say=[].append if said is None else said.append)


def test_pairs_results_and_the_sheet(tmp_path: Path) -> None:
    loads = Loads()
    found = run(evaluation(tmp_path), loads)
    assert loads.drawn == {"tiny": 4, "tiny-int8": 4}
    out = tmp_path / "out"
    assert sorted(path.name for path in (out / "tiny-int8").iterdir()) == [f"0000{i}.png" for i in range(4)]
    facts = json.loads((out / RESULTS).read_text())
    psnrs = [picture["psnr"] for picture in facts["metrics"]["psnr"]["pictures"]]
    # lighter with each prompt
    assert psnrs == sorted(psnrs, reverse=True)
    assert facts["options"] == {"seed": 0, "steps": 4}
    assert facts["sentence"] == found.sentence()
    assert found.sentence().startswith("What INT8 cost, over 4 prompts: its pictures are ")
    assert "dB from the others in the median (95 % interval " in found.sentence()
    # the worst pair comes first, behind its band: the second picture of its row is that of the last prompt
    page = np.asarray(PILImage.open(io.BytesIO((out / SHEET).read_bytes())).convert("RGB"))
    worst = PILImage.open(out / "tiny-int8" / "00003.png").resize((208, 208), PILImage.Resampling.LANCZOS)
    assert (page[150 : 150 + 208, 248 : 248 + 208] == np.asarray(worst)).all()


def test_what_is_there_is_not_drawn_again(tmp_path: Path) -> None:
    run(evaluation(tmp_path, limit=2))
    loads, said = Loads(), []
    run(evaluation(tmp_path), loads, said)
    assert loads.drawn == {"tiny": 2, "tiny-int8": 2}
    assert said == ["tiny: 2 of 4 pictures are there already", "tiny-int8: 2 of 4 pictures are there already"]
    loads = Loads()
    run(evaluation(tmp_path, limit=3), loads)
    assert loads.drawn == {}


def test_ctrl_c_keeps_what_is_drawn(tmp_path: Path) -> None:
    def interrupt(model: Grey) -> None:
        model.interrupt = 3

    with pytest.raises(KeyboardInterrupt):
        run(evaluation(tmp_path), Loads(interrupt))
    loads = Loads()
    run(evaluation(tmp_path), loads)
    assert loads.drawn == {"tiny": 1, "tiny-int8": 4}


def test_a_float_run_is_used_by_its_comparison(tmp_path: Path) -> None:
    asked = evaluation(tmp_path, sources=[FLOAT], prompts=PROMPTS)
    # nothing that a single model can be measured by is here
    with pytest.raises(InvalidInput, match="psnr"):
        run(asked)
    run(evaluation(tmp_path, limit=1))
    loads = Loads()
    run(evaluation(tmp_path, limit=1, sources=[FLOAT, replace(INT8, label="other", files="c" * 64)]), loads)
    assert loads.drawn == {"other": 1}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no picture"),
        lambda path: PILImage.new("RGB", (32, 32)).save(path),
        lambda path: path.write_bytes((path.parent / "00002.png").read_bytes()),
    ],
    ids=["cut", "empty", "text", "a stranger's", "of another prompt"],
)
def test_a_broken_picture_is_drawn_again(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    run(evaluation(tmp_path))
    path = tmp_path / "out" / "tiny" / "00001.png"
    before = path.read_bytes()
    spoil(path)
    loads = Loads()
    run(evaluation(tmp_path), loads)
    assert loads.models["tiny"].drawn == ["a blue boat"] and list(loads.models) == ["tiny"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"options": {"seed": 0, "steps": 5}}, "steps was 4, and is 5"),
        ({"options": {"seed": 1, "steps": 4}}, "seed was 0, and is 1"),
        ({"loading": {"dtype": "bf16"}}, "dtype was not given, and is 'bf16'"),
        ({"sources": [replace(FLOAT, files="b" * 64), INT8]}, "the files of tiny are others"),
        ({"prompts": PromptSet("own", ("a red house",) * 2)}, "prompts are others"),
    ],
)
def test_another_evaluation_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    run(evaluation(tmp_path))
    picture = (tmp_path / "out" / "tiny" / "00000.png").read_bytes()
    with pytest.raises(InvalidInput, match=says) as refused:
        run(evaluation(tmp_path, **changes))
    assert "--force" in refused.value.hint
    assert (tmp_path / "out" / "tiny" / "00000.png").read_bytes() == picture
    loads = Loads()
    run(evaluation(tmp_path, force=True, **changes), loads)
    assert set(loads.drawn.values()) == {len(changes.get("prompts", PROMPTS).texts)}


def test_a_strangers_folder_is_left_alone(tmp_path: Path) -> None:
    photo = tmp_path / "out" / "tiny" / "00000.png"
    photo.parent.mkdir(parents=True)
    photo.write_text("mine")
    for force in (False, True):
        with pytest.raises(InvalidInput, match="not empty and no evaluation"):
            run(evaluation(tmp_path, force=force))
    assert photo.read_text() == "mine"
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InvalidInput, match="not a folder"):
        run(replace(evaluation(tmp_path), folder=file))


def test_what_drew_nothing_is_in_nobodys_way(tmp_path: Path) -> None:
    """A model that was not whole, and is mended before the next run."""
    first = evaluation(tmp_path)
    with pytest.raises(SanaError, match="damaged"):
        first.run(_damaged, tell=unseen, say=print)
    assert (tmp_path / "out" / "evaluation.json").exists()
    mended = tuple(replace(source, files="of others") for source in first.sources)
    run(replace(first, sources=mended))


def _damaged(source: Source) -> Any:
    raise SanaError("damaged")


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"format": 2}', '{"format": 1, "options": [], "sources": 3}']
)
def test_a_broken_record_is_refused(tmp_path: Path, content: str) -> None:
    run(evaluation(tmp_path))
    (tmp_path / "out" / "evaluation.json").write_text(content)
    with pytest.raises(InvalidInput) as refused:
        run(evaluation(tmp_path))
    assert "--force" in refused.value.hint
    run(evaluation(tmp_path, force=True))


def test_pictures_behind_a_link_are_left_alone(tmp_path: Path) -> None:
    run(evaluation(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00001.png").write_text("mine")
    (tmp_path / "out" / "more").symlink_to(tmp_path / "mine")
    run(evaluation(tmp_path, force=True))
    assert (tmp_path / "mine" / "00001.png").read_text() == "mine"


def test_links_of_an_evaluation_stay_what_they_lead_to(tmp_path: Path) -> None:
    found = run(evaluation(tmp_path))
    (tmp_path / "mine").write_text("mine")
    for path in (tmp_path / "out" / "results.json", found.drawn.paths[0][0]):
        path.unlink()
        path.symlink_to(tmp_path / "mine")
    run(evaluation(tmp_path))
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / "out" / "tiny").rename(tmp_path / "tiny")
    (tmp_path / "out" / "tiny").symlink_to(tmp_path / "tiny")
    with pytest.raises(InvalidInput, match="tiny is a link"):
        run(evaluation(tmp_path))


def test_prompts_that_cannot_be_drawn_are_passed_over(tmp_path: Path) -> None:
    def fail(model: Grey) -> None:
        model.fails = frozenset({"a blue boat"} if model.source.int8 else ())

    found = run(evaluation(tmp_path), Loads(fail))
    assert found.numbers == [0, 2, 3]
    assert found.failed == {"tiny": {}, "tiny-int8": {1: "the numbers overflowed"}}
    said = "tiny-int8: 1 prompts have no picture and are left out, such as 1: the numbers overflowed"
    assert said in found.text()


def test_a_model_that_draws_nothing_ends_the_run(tmp_path: Path) -> None:
    def fail(model: Grey) -> None:
        model.fails = frozenset(PROMPTS.texts)

    with pytest.raises(SanaError, match="overflowed"):
        run(evaluation(tmp_path), Loads(fail))


def test_a_full_disk_says_so_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = atomic.write_bytes

    def full(path: Path, content: bytes, **options: Any) -> None:
        if path.name == "00002.png":
            raise SanaError(f"cannot write {path}: No space left on device", "free some space")
        write(path, content, **options)

    monkeypatch.setattr(atomic, "write_bytes", full)
    with pytest.raises(SanaError, match="No space left"):
        run(evaluation(tmp_path))
    monkeypatch.undo()
    loads = Loads()
    run(evaluation(tmp_path), loads)
    assert loads.drawn == {"tiny": 2, "tiny-int8": 4}


def test_memory_that_is_short_is_no_failure_of_a_prompt(tmp_path: Path) -> None:
    class Short(Grey):
        def generate(self, prompt: str, *, seed: int, **options: Any) -> Image:
            raise OutOfMemory("the denoiser needs 9 GB, 1 GB is free")

    with pytest.raises(OutOfMemory):
        evaluation(tmp_path).run(Short, tell=unseen, say=print)  # type: ignore[arg-type]


def test_equal_models(tmp_path: Path) -> None:
    """No sheet where no pair differs, also not that of an earlier run."""
    same = replace(FLOAT, label="same", files="b" * 64)
    run(evaluation(tmp_path))
    assert (tmp_path / "out" / SHEET).exists()
    found = run(evaluation(tmp_path, sources=[FLOAT, same]))
    assert found.sentence() == (
        "What same in place of tiny cost, over 4 prompts: all of its pictures are equal to the last bit."
    )
    assert not (tmp_path / "out" / SHEET).exists()
    assert json.loads((tmp_path / "out" / RESULTS).read_text())["metrics"]["psnr"]["equal"] == 4


def test_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    large = tmp_path / "sub" / "model.safetensors"
    large.write_bytes(bytes(1 << 20))
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    content = bytearray(1 << 20)
    content[-1] = 1
    large.write_bytes(content)
    second = fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert len({first, second, fingerprint(tmp_path)}) == 3
