"""The prompts, the scores and the command of `benchmarks/quality.py`."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
from PIL import Image

import quality
from harness import RESULTS, quality_tables
from harness.results import Diary
from judge import evaluation
from judge.shape_prompts import prompts
from sana_edge.bench.results import header, write_json
from sana_edge.evaluate.judge.prompts import COUNTS, Detection, Judgement, Prompt, relations
from sana_edge.evaluate.judge.scores import Outcome, categories, judgement, overall, shuffled, wilson
from sana_edge.training.layout import draw_scene, held_out, mirrored, training_scene
from sana_edge.training.scenes import COLOURS, KINDS, Scene

SHAPES = evaluation.world("shapes")
# its judge takes a tenth of a second for each picture
BLIND = replace(SHAPES, judge=lambda pixels: Judgement("plain", ()))
BOX = 0.15
SAMPLE = 8000


def seen(*things: tuple[str, str, float, float]) -> Judgement:
    """A judgement of objects (kind, colour, x, y), surest first."""
    return Judgement(
        "plain",
        tuple(Detection(k, c, x, y, (x - BOX, y - BOX, x + BOX, y + BOX), 0.9) for k, c, x, y in things),
    )


def truly(prompt: Prompt) -> Judgement:
    """What a perfect judge sees in the prompt's own scene."""
    return seen(*((t.kind, t.colour, t.x, t.y) for t in prompt.scene.things))


def first(category: str) -> Prompt:
    return next(p for p in prompts() if p.category == category)


def combinations(scene: Scene) -> set[Hashable]:
    """Every combination of a scene, in any category's form."""
    things = scene.things
    pairs = list(itertools.combinations(things, 2))
    shown: set[Hashable] = {(t.kind, t.colour) for t in things}
    shown |= {frozenset((a.kind, b.kind)) for a, b in pairs}
    shown |= {frozenset(((a.kind, a.colour), (b.kind, b.colour))) for a, b in pairs}
    shown |= {(t.kind, sum(o.kind == t.kind for o in things)) for t in things}
    if len(things) == 1:
        shown.add((things[0].kind, things[0].size, scene.background))
    if scene.relation:
        first, second = things[0].kind, things[1].kind
        shown |= {(first, scene.relation, second), (second, mirrored(scene.relation), first)}
    return shown


def hidden(prompt: Prompt) -> set[Hashable]:
    """What of `combinations` no training scene shows."""
    things, scene = prompt.scene.things, prompt.scene
    if prompt.category == "single object":
        return {(things[0].kind, things[0].size, scene.background)}
    if prompt.category == "two objects":
        return {frozenset(t.kind for t in things)}
    if prompt.category == "counting":
        return {(things[0].kind, len(things))}
    if prompt.category == "colours":
        return {(things[0].kind, things[0].colour)}
    if prompt.category == "position":
        return {(things[0].kind, scene.relation, things[1].kind)}
    return {frozenset((t.kind, t.colour) for t in things)}


def test_there_are_553_distinct_prompts() -> None:
    assert len(prompts()) == len({p.text for p in prompts()}) == 553
    assert Counter(p.category for p in prompts()) == COUNTS
    assert all(p.text == p.text.lower().strip() and p.text.isascii() for p in prompts())


def test_prompts_are_the_same_every_time() -> None:
    before = prompts()
    prompts.cache_clear()
    assert prompts() == before


def test_prompts_name_what_is_checked() -> None:
    for prompt in prompts():
        words = prompt.text.replace(".", " ").replace(",", " ").split()
        for want in prompt.wanted:
            assert want.kind in words or f"{want.kind}s" in words, prompt.text
            assert want.colour is None or want.colour in words, prompt.text


def test_split_holds_every_prompt_out() -> None:
    split = held_out()
    held = {
        "single object": split.singles,
        "two objects": split.pairs,
        "counting": split.counts,
        "colours": split.colours,
        "position": split.relations,
    }
    for prompt in prompts():
        assert split.holds(prompt.scene), prompt.text
        if prompt.category in held:
            assert hidden(prompt) <= held[prompt.category], prompt.text
        else:
            assert any((t.kind, t.colour) in split.colours for t in prompt.scene.things), prompt.text


def test_no_training_scene_shows_a_prompts_combination() -> None:
    asked = set().union(*map(hidden, prompts()))
    rng = random.Random(0)
    trained = set().union(*(combinations(training_scene(rng)) for _ in range(SAMPLE)))
    assert not asked & trained
    # the same sample without the split shows most of them
    shown = set().union(*(combinations(draw_scene(rng)) for _ in range(SAMPLE)))
    assert len(asked & shown) > 0.6 * len(asked)


def test_only_one_combination_of_a_prompt_is_held_out() -> None:
    for prompt in prompts():
        if prompt.category not in ("colours", "colour attribution"):
            assert all((t.kind, t.colour) not in held_out().colours for t in prompt.scene.things)
        if prompt.category != "two objects":
            pairs = itertools.combinations((t.kind for t in prompt.scene.things), 2)
            assert all(frozenset(pair) not in held_out().pairs for pair in pairs)


def test_own_scene_is_right_and_an_empty_one_wrong() -> None:
    for prompt in prompts():
        assert prompt.check(truly(prompt)) == ""
        assert prompt.check(seen()).startswith("0 ")


@pytest.mark.parametrize("category", COUNTS)
def test_other_objects_do_no_harm(category: str) -> None:
    prompt = first(category)
    other = next(k for k in KINDS if k not in {w.kind for w in prompt.wanted})
    true = truly(prompt)
    more = Judgement(true.background, (*true.detections, *seen((other, "red", 0.5, 0.1)).detections))
    assert prompt.check(more) == ""


def test_counting_is_exact() -> None:
    prompt = first("counting")
    true = truly(prompt)
    assert prompt.check(replace(true, detections=true.detections[1:])) != ""
    assert prompt.check(replace(true, detections=(*true.detections, true.detections[0]))) != ""


@pytest.mark.parametrize("category", ["colours", "colour attribution"])
def test_each_colour_counts(category: str) -> None:
    prompt = first(category)
    true = truly(prompt)
    for i, detection in enumerate(true.detections):
        changed = list(true.detections)
        changed[i] = replace(detection, colour=next(c for c in COLOURS if c != detection.colour))
        assert prompt.check(replace(true, detections=tuple(changed))) != ""


def test_swapped_places_are_wrong() -> None:
    for prompt in (p for p in prompts() if p.category == "position"):
        a, b = truly(prompt).detections
        swapped = (replace(a, x=b.x, y=b.y, box=b.box), replace(b, x=a.x, y=a.y, box=a.box))
        assert prompt.check(Judgement("plain", swapped)) == f"not {prompt.relation}"


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-0.45, 0.0, {"left of"}),
        (0.45, 0.02, {"right of"}),
        (0.0, -0.45, {"above"}),
        (-0.4, 0.4, {"left of", "below"}),
        (0.03, 0.03, set()),
        (0.0, 0.0, set()),
    ],
)
def test_relations(dx: float, dy: float, expected: set[str]) -> None:
    a, b = seen(("cat", "red", 0.5 + dx, 0.5 + dy), ("car", "red", 0.5, 0.5)).detections
    assert relations(a, b) == expected


def test_wilson_interval() -> None:
    # 8 of 10: the interval of Wilson (1927) at 95 %
    score = wilson([True] * 8 + [False] * 2)
    assert (round(score.low, 4), round(score.high, 4)) == (0.4902, 0.9433)
    assert wilson([True] * 50).high == pytest.approx(1.0)


def test_overall_is_the_mean_of_the_categories() -> None:
    chosen = [p for p in prompts() if p.category in ("single object", "position")]
    outcomes = [Outcome(p, truly(p) if p.category == "position" else seen()) for p in chosen]
    assert overall(categories(outcomes)).share == 0.5


def test_control_tells_a_generator_that_ignores_its_prompt() -> None:
    outcomes = [Outcome(p, truly(p)) for p in prompts()]
    control = shuffled(outcomes)
    assert set(control) == set(COUNTS)
    assert max(control.values()) < 0.2


def test_outcome_survives_json() -> None:
    outcome = Outcome(first("position"), truly(first("position")))
    row = json.loads(json.dumps(outcome.row()))
    assert Outcome(outcome.prompt, judgement(row)).row() == row


def test_diary_goes_on_and_forgets_other_runs(tmp_path: Path) -> None:
    output = tmp_path / "quality.json"
    with Diary(output, {"steps": 20}) as diary:
        diary.add({"number": 0})
        diary.add({"number": 1})
    # the power fails in the middle of a line
    diary.path.write_text(diary.path.read_text()[:-5])
    with Diary(output, {"steps": 20}) as diary:
        assert diary.rows == [{"number": 0}]
    with Diary(output, {"steps": 10}) as diary:
        assert diary.rows == []
        diary.finish()
    assert list(tmp_path.iterdir()) == []


def test_header_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    data = header(
        "benchmarks/quality.py", ["--output", str(tmp_path / "a.json"), f"--sheet={tmp_path}/b.png"]
    )
    assert data["command"] == "python benchmarks/quality.py --output a.json --sheet=b.png"
    assert str(tmp_path) not in json.dumps(data)
    assert {"cpu", "cores", "memory_gb", "os", "gpu", "instructions", "power"} <= set(data["machine"])


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [{"b": 1, "c": "two\n  lines [{"}]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [{"b": 1, "c": "two\n  lines [{"}]}
    assert len(list(tmp_path.iterdir())) == 1


def test_command(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, clip = tmp_path / "quality.json", tmp_path / "clip"
    tiny_clip.write_clip(clip)
    given = [
        "--world",
        "shapes",
        "--model",
        str(tiny_folder),
        "--steps",
        "1",
        "--limit",
        "1",
        "--threads",
        "1",
        "--clip",
        str(clip),
    ]
    assert quality.main([*given, "--output", str(output)]) == 0
    data = json.loads(output.read_text())
    results = data["models"]["tiny"]
    # random weights draw nothing; the true scenes of the same prompts are seen
    assert (results["overall"]["score"], data["ceiling"]["overall"]) == (0.0, 1.0)
    assert str(tmp_path) not in output.read_text() and "paired" not in data
    assert Image.open(tmp_path / "quality.png").size[0] > 1000
    assert set(data["clip"]) == {"tiny", "ceiling"} and "clip" not in data["settings"]
    assert "overall" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "quality.json", "quality.png"]


def test_command_with_int8(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, picture = tmp_path / "quality.json", tmp_path / "quality.png"
    given = ["--world", "shapes", "--model", str(tiny_folder), "--int8"]
    given += ["--steps", "1", "--limit", "1", "--threads", "1"]
    assert quality.main([*given, "--output", str(output), "--sheet", str(picture)]) == 0
    data = json.loads(output.read_text())
    asked = [first(category).text for category in COUNTS]
    assert list(data["models"]) == ["tiny", "tiny-int8"]
    for model in data["models"].values():
        assert [result["prompt"] for result in model["results"]] == asked
        assert model["seconds_per_picture"] > 0
    assert "quantization" not in data["models"]["tiny"]
    assert data["models"]["tiny-int8"]["quantization"].startswith("w8a8")
    found = data["paired"]
    assert (found["float"], found["int8"]) == ("tiny", "tiny-int8")
    assert (found["difference"], found["interval_95"], found["mcnemar_p"]) == (0.0, [0.0, 0.0], 1.0)
    # noise of one step, in INT8 from the same seeds: near, and not equal
    assert [pair["prompt"] for pair in found["pictures"]] == asked
    assert all(25 < pair["psnr"] < 70 and 0.8 < pair["ssim"] < 1 for pair in found["pictures"])
    assert found["psnr"]["worst"] == min(pair["psnr"] for pair in found["pictures"])
    pairs = Image.open(tmp_path / "quality-int8.png")
    # a head, seven rows, two pairs of three pictures
    assert pairs.size == (20 + 6 * 228, 104 + 7 * 336)
    printed = capsys.readouterr().out
    # the table fits a terminal; the circumstances below it may not
    assert max(map(len, printed.partition("**overall**")[0].splitlines())) <= 110
    assert "INT8 less float: +0.0 points" in printed and found["psnr"]["worst_prompt"] in printed
    names = ["quality-int8.png", "quality.json", "quality.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_int8_twice_is_an_error(
    marked_int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(marked_int8), "--int8", "--output", str(tmp_path / "a.json")]
    assert quality.main(given) == 1
    assert "is INT8 already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [marked_int8]


def test_interrupted_run_goes_on(tmp_path: Path) -> None:
    """In the middle of a prompt: both models are asked again for it, and for no other."""
    chosen = SHAPES.choose(1)
    places = {number: place for place, number in enumerate(chosen)}
    asked: list[tuple[str, int]] = []

    def drawing(name: str, level: int) -> evaluation.Source:
        def source(number: int, prompt: Prompt) -> tuple[evaluation.Pixels, dict[str, object]]:
            asked.append((name, number))
            if len(asked) == 6:
                raise KeyboardInterrupt
            return np.full((128, 128, 3), level + (name == "int8") * places[number], np.uint8), {}

        return source

    sources = {name: drawing(name, level) for name, level in (("model", 20), ("int8", 21))}
    output, compared = tmp_path / "quality.json", [quality.COMPARED]
    with pytest.raises(KeyboardInterrupt), Diary(output, {}) as diary:
        evaluation.evaluate(BLIND, evaluation.PICTURES, sources, chosen, diary, compared)
    with Diary(output, {}) as diary:
        outcomes = evaluation.evaluate(BLIND, evaluation.PICTURES, sources, chosen, diary, compared)
        alike, kept = evaluation.likenesses(diary, *compared), evaluation.pictures(diary)
    numbers = list(chosen)
    pairs = [(name, number) for number in numbers for name in sources]
    assert asked == [*pairs[:6], *pairs[4:]]
    for found in outcomes.values():
        assert {number: outcome.prompt for number, outcome in found.items()} == chosen
    # every value is 1 + place off
    expected = {number: 20 * math.log10(255 / (1 + place)) for number, place in places.items()}
    assert {number: like.psnr for number, like in alike.items()} == pytest.approx(expected)
    assert evaluation.worst(alike) == [numbers[-1], numbers[-2]]
    assert kept[numbers[3]]["int8"][5, 5].tolist() == [21 + 3] * 3


def test_pairs_of_the_lowest_psnr_are_kept(tmp_path: Path) -> None:
    """Whichever prompts they are, and only that pair of sources; of the others only those on the sheets."""
    chosen = dict(list(SHAPES.choose(40).items())[:40])
    errors = dict(zip(chosen, random.Random(0).sample(range(1, 41), 40), strict=True))
    pairs = [("int8", "model"), ("engine", "model")]

    def model(number: int, prompt: Prompt) -> tuple[evaluation.Pixels, dict[str, object]]:
        return np.full((128, 128, 3), 100, np.uint8), {}

    def int8(number: int, prompt: Prompt) -> tuple[evaluation.Pixels, dict[str, object]]:
        return np.full((128, 128, 3), 100 + errors[number], np.uint8), {}

    def engine(number: int, prompt: Prompt) -> tuple[evaluation.Pixels, dict[str, object]]:
        return np.full((128, 128, 3), 200 - errors[number], np.uint8), {}

    sources = {"model": model, "int8": int8, "engine": engine}
    with Diary(tmp_path / "quality.json", {}) as diary:
        evaluation.evaluate(BLIND, evaluation.PICTURES, sources, chosen, diary, pairs)
        kept = evaluation.pictures(diary)
        worst, others = (evaluation.worst(evaluation.likenesses(diary, pair)) for pair in pairs)
    assert [errors[number] for number in worst] == [40, 39]
    # the nearer to 100, the nearer to the model
    assert [errors[number] for number in others] == [1, 2]
    shown = evaluation.on_sheet(chosen)
    assert {*worst, *others} | shown <= set(kept)
    assert all(set(kept[number]) == set(sources) for number in shown)
    assert {"model", "int8"} <= set(kept[worst[0]]) and {"model", "engine"} <= set(kept[others[0]])
    assert any(len(drawn) == 2 for number, drawn in kept.items() if number not in shown)
    assert len(kept) < 30


def test_tables() -> None:
    """Without INT8, and with it: the numbers of the JSON in every row."""
    data = json.loads((RESULTS / "quality.json").read_text())
    name = data["settings"]["model"]
    data.pop("paired", None)
    data["models"] = {name: data["models"][name]}
    assert {len(row) for row in quality_tables.quality(data).rows} == {6}
    counts = {"difference": -0.01, "both": 300, "only_float": 12, "only_int8": 34, "neither": 207}
    spread = {"mean": 33.1, "median": 33.2, "worst": 24.5, "worst_prompt": "a red cat"}
    data["models"]["small"] = data["models"][name]
    data["paired"] = {
        "float": name,
        "int8": "small",
        **counts,
        "interval_95": [-0.02, 0.011],
        "mcnemar_p": 0.83,
        "categories": {category: {**counts, "only_int8": 5} for category in COUNTS},
        "psnr": spread,
        "ssim": spread,
    }
    table = quality_tables.quality(data)
    assert [row[0] for row in table.rows] == [*COUNTS, "**overall**"]
    first, *_, last = table.rows
    score = f"{data['models'][name]['overall']['score']:.3f}"
    assert (last[1], last[2], last[4], last[6:8]) == (553, score, score, [12, 34]) and first[6:8] == [12, 5]
    text = "\n".join(table.notes)
    assert "INT8 less float: -1.0 points, 95 % interval -2.0 to +1.1" in text
    assert "12 prompts right only as float, 34 only as INT8: p 0.83" in text
    assert "mean 33.1 dB, median 33.2 dB, worst 24.5 dB" in text and '"a red cat"' in text


def test_the_judge_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """True scenes are right, and most of the blurred ones."""
    output = tmp_path / "a.json"
    assert quality.main(["--judge-only", "--world", "shapes", "--limit", "1", "--output", str(output)]) == 0
    data = json.loads(output.read_text())
    assert data["true scenes"]["overall"]["score"] == 1.0
    assert len(data["true scenes, blurred"]["results"]) == len(COUNTS)
    assert "true scenes: single object 1.000" in capsys.readouterr().out


def test_without_the_art_there_is_no_ceiling(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANA_EDGE_ART", str(tmp_path / "nowhere"))
    output = tmp_path / "quality.json"
    given = ["--model", str(tiny_folder), "--steps", "1", "--limit", "1", "--threads", "1"]
    assert quality.main([*given, "--output", str(output)]) == 0
    data = json.loads(output.read_text())
    art = evaluation.world("art").choose(1)
    asked = [result["prompt"] for result in data["models"]["tiny"]["results"]]
    assert data["ceiling"] is None and asked == [prompt.text for prompt in art.values()]
    assert not set(asked) & {p.text for p in prompts()}
    out, err = capsys.readouterr()
    assert "no ceiling of the judge: the art is not in" in err and "ceiling" not in out
