"""The evaluate command: statistics, windows, figures of rendered scenes, and a run from end to end."""

import json
import logging
import math
import random
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from longlive import cli
from longlive.build import make_session_config
from longlive.builtin import BUILTIN, BUILTIN_GENERATOR
from longlive.data.shapes.clips import HELD_OUT, ShapesSwitches, scene_number
from longlive.data.shapes.render import render
from longlive.data.shapes.world import Caption, Look, Scene, scene_of
from longlive.errors import InputError
from longlive.eval.evaluate_config import EvaluateConfig
from longlive.eval.figures import BODY_COUNTS, changed_attributes, jumps
from longlive.eval.judge import CAPTIONED, UNNAMED, Reading, judge_batch
from longlive.eval.report import markdown_table, plot
from longlive.eval.shapes import (
    SWITCH_WINDOWS,
    SwitchReadings,
    evaluate,
    judge_lengths,
    judged_window,
    length_figures,
    length_groups,
    play_switch,
    read_switches,
    switch_figures,
    switch_frame,
)
from longlive.eval.statistics import average, share, spread
from longlive.eval.studio import Studio, batches, cut_windows
from longlive.weights.files import write_safetensors
from longlive.weights.formats import read_dit
from tests.tiny import tiny_models

NUM_SCENES = 32
FIGURE = {"mean", "low", "high", "num"}
ACCURACY = {*CAPTIONED, *BODY_COUNTS, "attributes", "all", "clean", "flicker"}
DRIFT = {"place_px", "tint", "marker_kept", "background"}


def studio(**changes: Any) -> Studio:
    settings = EvaluateConfig(**changes)
    return Studio(tiny_models(), make_session_config(settings), tqdm(disable=True))


def captions(scenes: list[Scene]) -> list[Caption]:
    return [scene.caption for scene in scenes]


def mean(figure: dict[str, float | int | None]) -> float:
    assert figure["mean"] is not None
    return figure["mean"]


# Statistics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_hits", "num", "low", "high"),
    # Newcombe (1998), table I: Wilson's interval without continuity correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_wilson_intervals(num_hits: int, num: int, low: float, high: float) -> None:
    figure = share([True] * num_hits + [False] * (num - num_hits))
    assert figure == pytest.approx({"mean": num_hits / num, "low": low, "high": high, "num": num}, abs=5e-5)
    mirrored = share([False] * num_hits + [True] * (num - num_hits))
    assert mirrored["low"] == pytest.approx(1 - high, abs=5e-5)


def test_shares_of_all_and_none_end_at_the_bound() -> None:
    assert share([True] * 7)["high"] == 1
    assert share([False] * 7)["low"] == 0


def test_averages_have_normal_intervals() -> None:
    figure = average([1.0, 2.0, 3.0, 4.0])
    half = 1.959964 * math.sqrt(5 / 3) / 2
    assert figure == pytest.approx({"mean": 2.5, "low": 2.5 - half, "high": 2.5 + half, "num": 4})
    assert average([1.0, 0.8], 0, 1)["high"] == 1


def test_what_is_undefined_is_none() -> None:
    assert average([]) == share([]) == {"mean": None, "low": None, "high": None, "num": 0}
    assert average([3.0]) == {"mean": 3.0, "low": None, "high": None, "num": 1}
    assert spread([])["median"] is None


def test_quantiles() -> None:
    values = [float(value) for value in range(101)]
    random.Random(0).shuffle(values)
    figure = spread(values)
    assert (figure["mean"], figure["median"], figure["p95"]) == (50, 50, 95)


# Lengths and windows -------------------------------------------------------------------------------------------------


def test_a_window_is_the_five_seconds_before_its_time() -> None:
    assert judged_window(5) == range(0, 81)
    assert judged_window(240) == range(3760, 3841)


@pytest.mark.parametrize(
    ("frames_per_block", "video_frames"), [(3, {1: 9, 81: 81, 82: 93}), (7, {81: 81, 82: 109}), (4, {81: 93, 93: 93})]
)
def test_videos_end_with_a_block(frames_per_block: int, video_frames: dict[int, int]) -> None:
    made = studio(num_frame_per_block=frames_per_block, num_output_frames=frames_per_block)
    assert {wanted: made.whole_blocks(wanted) for wanted in video_frames} == video_frames


def test_drift_is_judged_within_the_longest_length() -> None:
    assert EvaluateConfig().times_s == (5, 10, 20, 30, 39, 60, 120, 240)
    assert EvaluateConfig(lengths_s=(10, 30)).times_s == (5, 10, 20, 30)


def test_only_some_videos_go_on() -> None:
    times = (5, 10, 120, 240)
    config = EvaluateConfig(lengths_s=times, drift_s=(39,), num_prompts=100, num_long_prompts=20)
    assert length_groups(config) == [(range(20), (5, 10, 39, 120, 240)), (range(20, 100), (5, 10, 39, 120))]
    assert length_groups(replace(config, num_prompts=10)) == [(range(10), (5, 10, 39, 120, 240))]
    assert length_groups(replace(config, long_s=240)) == [(range(100), (5, 10, 39, 120, 240))]


@pytest.mark.parametrize(("numbers", "largest"), [(range(152), 50), (range(48, 50), 50), (range(5), 1), (range(0), 4)])
def test_batches_are_even_and_complete(numbers: range, largest: int) -> None:
    found = list(batches(numbers, largest))
    assert [number for batch in found for number in batch] == list(numbers)
    sizes = {len(batch) for batch in found}
    assert not sizes or (max(sizes) <= largest and max(sizes) - min(sizes) <= 1)
    assert len(found) == math.ceil(len(numbers) / largest)


@pytest.mark.parametrize(
    "windows",
    [
        [range(0, 81), range(80, 161), range(300, 381)],
        [range(0, 5), range(2, 7), range(3, 8)],
        [range(17, 20)],
        [range(9, 21), range(21, 33)],
    ],
)
def test_windows_are_cut_from_pieces(windows: list[range]) -> None:
    frames = torch.arange(400).expand(2, -1)
    cut = list(cut_windows(frames.split([9] + [12] * 32 + [7], dim=1), windows))
    assert [window.tolist() for window in cut] == [[list(window)] * 2 for window in windows]


def test_windows_take_no_more_pieces_than_they_need() -> None:
    pieces = iter(torch.zeros(1, 100).split(10, dim=1))
    assert len(list(cut_windows(pieces, [range(5, 25)]))) == 1
    assert len(list(pieces)) == 7


# Figures of what was rendered ----------------------------------------------------------------------------------------


def rendered(scenes: list[Scene], windows: list[range]) -> dict[int, list[Reading]]:
    """Readings of the windows of rendered scenes, by the second at which they end."""
    return {(window.stop - 1) // 16: judge_batch(render(scenes, window.start, window.stop)) for window in windows}


def test_rendered_videos_are_right_and_do_not_drift() -> None:
    config = EvaluateConfig(lengths_s=(5, 240), num_prompts=NUM_SCENES)
    scenes = [scene_number(number, 4, HELD_OUT) for number in range(NUM_SCENES)]
    seen = rendered(scenes, [judged_window(5), judged_window(240)])
    seen[240] = seen[240][:20]
    figures = length_figures(config, seen, taught=seen[5], scenes=scenes)
    for time, num in (("5", NUM_SCENES), ("240", 20)):
        accuracy = figures["length"][time]
        assert {*accuracy} == ACCURACY | {"over_teacher" if time == "5" else "change"}
        assert all(set(figure) == FIGURE for figure in accuracy.values())
        assert accuracy["all"]["num"] == accuracy["attributes"]["num"] == num
        assert all(
            mean(figure) >= 0.99 for name, figure in accuracy.items() if name in {*CAPTIONED, "attributes", "all"}
        )
        assert mean(accuracy["clean"]) >= 0.99
    assert figures["length"]["5"]["over_teacher"] == {"mean": 0, "low": 0, "high": 0, "num": NUM_SCENES}
    assert abs(mean(figures["length"]["240"]["change"])) <= 0.01
    drift = figures["drift"]["240"]
    assert {*figures["drift"]} == {"240"}
    assert {*drift} == DRIFT
    assert mean(drift["place_px"]) < 0.3
    assert mean(drift["marker_kept"]) == 1
    assert mean(drift["tint"]) < 0.02


def test_drift_is_measured_against_the_first_window() -> None:
    scenes = [scene_number(number, 4, HELD_OUT) for number in range(8)]
    videos = render(scenes, 0, 81)
    seen = {5: judge_batch(videos), 10: judge_batch(videos.roll((3, 3), dims=(2, 3)))}
    drift = length_figures(EvaluateConfig(lengths_s=(5, 10)), seen, [], scenes)["drift"]["10"]
    # One axis of a travel, or both: 3 or 4.24 px.
    assert 2.8 < mean(drift["place_px"]) < 4.4
    assert mean(drift["background"]) == 0


def test_wrong_captions_are_counted() -> None:
    scenes = [scene_number(number, 4, HELD_OUT) for number in range(8)]
    seen = judge_batch(render(scenes, 0, 81))
    others = [
        replace(scene, bodies=tuple(replace(body, look=replace(body.look, motion="")) for body in scene.bodies))
        for scene in scenes[:2]
    ]
    config = EvaluateConfig(lengths_s=(5,), num_prompts=8)
    accuracy = length_figures(config, {5: seen}, [], [*others, *scenes[2:]])["length"]["5"]
    assert mean(accuracy["motion"]) == mean(accuracy["all"]) == 0.75
    assert mean(accuracy["attributes"]) == pytest.approx(1 - 2 / (8 * len(CAPTIONED)))
    assert mean(accuracy["colour"]) == 1


def switch_videos(scenes: list[tuple[Scene, Scene]], is_cleared: bool = False) -> Tensor:
    """Rendered switches: the second scene goes on from the first, or is another one with its caption."""
    befores, afters = [before for before, _ in scenes], [after for _, after in scenes]
    if is_cleared:
        afters = [scene_of(after.caption, random.Random(number)) for number, after in enumerate(afters)]
    return torch.cat([render(befores, 0, 81), render(afters, 81, 177)], dim=1)


@pytest.fixture(scope="module")
def switches() -> tuple[list[tuple[Scene, Scene]], list[SwitchReadings]]:
    scenes = ShapesSwitches(NUM_SCENES, 5, 81, HELD_OUT).scenes(range(NUM_SCENES))
    return scenes, read_switches(switch_videos(scenes))


Switches = tuple[list[tuple[Scene, Scene]], list[SwitchReadings]]


def test_rendered_switches_are_right_and_continuous(switches: Switches) -> None:
    scenes, readings = switches
    figures = switch_figures(readings, scenes)
    late = figures["2-4 s"]
    assert {*late} == ACCURACY | {"changed", "unchanged"}
    assert min(mean(late[name]) for name in ("attributes", "changed", "unchanged", "count", "background")) >= 0.99
    # A body that glides to its new place for some time has no motion of the world yet.
    assert mean(figures["0-2 s"]["attributes"]) >= 0.95
    continuity = figures["continuity"]
    assert (mean(continuity["small_jump"]), mean(continuity["lost"])) == (1, 0)
    assert mean(continuity["jump_px"]) < 4
    drift = figures["drift"]
    assert {*drift} == DRIFT - {"background"}
    assert 0 < (drift["place_px"]["num"] or 0) < NUM_SCENES
    assert mean(drift["place_px"]) < 0.5
    assert mean(drift["marker_kept"]) == 1


def test_a_cleared_video_jumps(switches: Switches) -> None:
    scenes = switches[0][:12]
    figures = switch_figures(read_switches(switch_videos(scenes, is_cleared=True)), scenes)
    assert mean(figures["2-4 s"]["attributes"]) >= 0.98
    assert mean(figures["continuity"]["jump_px"]) > 10
    assert mean(figures["continuity"]["small_jump"]) < 0.4
    assert mean(figures["drift"]["marker_kept"]) < 0.6


def test_a_switch_that_does_not_happen_is_seen(switches: Switches) -> None:
    """Videos that go on as before: what the switch should have changed is wrong, the rest right."""
    scenes = switches[0][:12]
    videos = render([before for before, _ in scenes], 0, 177)
    figures = switch_figures(read_switches(videos), scenes)
    for window in SWITCH_WINDOWS:
        assert mean(figures[window]["changed"]) == 0
        assert mean(figures[window]["unchanged"]) >= 0.98
        assert mean(figures[window]["all"]) == 0


def test_changed_attributes_are_told() -> None:
    look = Look("red", "star", "big", "still")
    pair = Caption("grey", (look, replace(look, colour="blue")))
    assert changed_attributes(pair, pair) == []
    other = Caption("white", (look, replace(look, colour="blue", motion="sway")))
    assert set(changed_attributes(pair, other)) == {"background", "motion"}


def test_a_video_without_bodies_has_lost_them() -> None:
    scenes = ShapesSwitches(1, 5, 81, HELD_OUT).scenes([0])
    empty = torch.full((1, 177, 64, 96, 3), 126, dtype=torch.uint8)
    assert mean(switch_figures(read_switches(empty), scenes)["continuity"]["lost"]) == 1


def test_lost_bodies_are_counted_apart() -> None:
    figures = jumps([2.0, 4.0, 12.0, math.inf])
    assert mean(figures["jump_px"]) == 6
    assert mean(figures["small_jump"]) == 0.5
    assert mean(figures["lost"]) == 0.25


# Videos that are made ------------------------------------------------------------------------------------------------


def test_what_becomes_of_the_cache_at_a_switch() -> None:
    """Nothing before the switch depends on it, everything after it does; a cleared video begins anew."""
    config = EvaluateConfig(switch_s=5)
    made = studio()
    prompts = [("a red star", "a blue ring")]
    videos = {
        cache: torch.cat(list(play_switch(config, made, cache, [7], prompts)), dim=1)
        for cache in ("recache", "keep", "clear")
    }
    frame = switch_frame(config, made)
    assert frame == 81
    for one, other in pairwise(videos.values()):
        assert torch.equal(one[:, :frame], other[:, :frame])
        assert not torch.equal(one[:, frame : frame + 96], other[:, frame : frame + 96])
    assert {video.shape[1] - frame for video in videos.values()} == {96, 105}


def flickers(readings: dict[int, list[Reading]]) -> list[float]:
    return [reading.flicker for reading in readings[5]]


def test_videos_follow_from_seed_and_number() -> None:
    config = EvaluateConfig(lengths_s=(5,), num_prompts=2, batch_size=2)
    assert config.model_name == BUILTIN
    made, scenes = studio(), [scene_number(0, 0, HELD_OUT)] * 2
    first, second = flickers(judge_lengths(config, made, scenes))
    assert first != pytest.approx(second, rel=1e-3)  # of the same prompt
    # One by one rounds otherwise, but makes the same videos.
    assert flickers(judge_lengths(replace(config, batch_size=1), made, scenes)) == pytest.approx(
        [first, second], rel=1e-3
    )
    others = flickers(judge_lengths(replace(config, seed=1), made, scenes))
    assert others != pytest.approx([first, second], rel=1e-3)


def test_every_part_and_length_has_figures() -> None:
    config = EvaluateConfig(
        lengths_s=(5, 7),
        drift_s=(6,),
        long_s=6,
        num_prompts=3,
        num_long_prompts=2,
        batch_size=2,
        switch_s=6,
        switch_caches=("clear",),
    )
    figures = evaluate(config, tiny_models())
    assert {name: set(values) for name, values in figures.items()} == {
        "length": {"5", "7"},
        "drift": {"6", "7"},
        "switch": {"clear"},
    }
    assert [figures["length"][time]["all"]["num"] for time in ("5", "7")] == [3, 2]
    assert figures["length"]["7"]["change"]["num"] == 2
    assert set(figures["switch"]["clear"]) == {*SWITCH_WINDOWS, "continuity", "drift"}
    json.dumps(figures, allow_nan=False)


def settings_file(folder: Path, text: str = "model_name: tiny\n") -> str:
    path = folder / "settings.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_from_end_to_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="longlive")
    out, teacher = tmp_path / "out.json", tmp_path / "teacher.safetensors"
    sizes, state = read_dit(BUILTIN_GENERATOR)
    write_safetensors(teacher, state, {"part": "dit", "config": json.dumps(asdict(sizes))})
    command = ["evaluate", "--suite", "shapes", "--seed", "3", "--json", str(out)]
    command += ["--config_path", settings_file(tmp_path), "num_prompts=2", "lengths_s=5", "device=cpu"]
    command += ["parts=world, vae, length, teacher"]
    command += [f"teacher_ckpt={teacher}", "teacher_steps=1", "teacher_guidance=0"]
    assert cli.main(command) == 0
    results = json.loads(out.read_text())
    assert set(results) == {
        *("suite", "seed", "wall_s", "versions", "weights", "config"),
        *("world", "vae", "teacher", "length", "drift"),
    }
    assert (results["suite"], results["seed"], results["config"]["num_prompts"]) == ("shapes", 3, 2)
    assert str(teacher) in results["weights"]
    assert results["wall_s"] > 0
    assert set(results["teacher"]) == ACCURACY
    for part in ("world", "vae"):
        assert set(results[part]) == {*ACCURACY, *UNNAMED, "psnr_db"}
    assert results["world"]["all"]["mean"] == results["world"]["marker"]["mean"] == 1
    assert (results["world"]["psnr_db"]["mean"], results["vae"]["psnr_db"]["num"]) == (None, 2)
    assert results["drift"] == {}
    for figure in results["length"]["5"].values():
        assert set(figure) == FIGURE
    assert "| out | 5 s | 2 |" in capsys.readouterr().err + caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "evaluate needs --json FILE"),
        (["--json", "nowhere/out.json"], "the folder nowhere does not exist"),
        (["--json", "out.json", "--suite", "squares"], "invalid choice: 'squares'"),
        (["--json", "out.json", "--seed", "x"], "seed=x: must be of type int"),
        (["--json", "out.json", "parts=teachers"], "must be some of world, vae, teacher, length, switch"),
        (["--json", "out.json", "parts=[]"], "must be some of world, vae, teacher, length, switch"),
        (["--json", "out.json", "switch_caches=drop"], "must be some of recache, keep, clear"),
        (["--json", "out.json", "lengths_s=4,10"], "must be increasing whole seconds from 5"),
        (["--json", "out.json", "lengths_s=10,5"], "must be increasing whole seconds from 5"),
        (["--json", "out.json", "height=480"], "height=480 width=96: the suite's world is 64x96 px"),
        (["--json", "out.json", "parts=teacher"], "needs the teacher's weights, teacher_ckpt=FILE"),
        (["--json", "out.json", "generator_ckpt=none.safetensors"], "none.safetensors does not exist"),
        (["--json", "out.json", "parts=teacher", "teacher_ckpt=none.safetensors"], "none.safetensors"),
        (["--json", "out.json", "prompt=a cat"], "prompt means nothing to evaluate"),
        (["--json", "out.json", "num_prompts=1"], "num_prompts=1: must be at least 2"),
        (["--json", "out.json", "lenghts_s=5"], "did you mean 'lengths_s'?"),
        (["--compare", "a.json"], "results are named"),
        (["--compare", "a=none.json"], "none.json"),
        (["--compare", "a=settings.yaml"], "settings.yaml: not valid JSON"),
        (["--json", "out.json", "--compare", "a=settings.yaml"], "--compare measures nothing"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *arguments, "--config_path", settings_file(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not (tmp_path / "out.json").exists()


# Reports -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(switches: Switches) -> dict[str, Any]:
    config = EvaluateConfig(lengths_s=(5, 10), num_prompts=4)
    scenes = [scene_number(number, 4, HELD_OUT) for number in range(4)]
    seen = rendered(scenes, [judged_window(5), judged_window(10)])
    pairs, readings = switches
    figures = {
        **length_figures(config, seen, [], scenes),
        "switch": {"recache": switch_figures(readings[:4], pairs[:4])},
    }
    return {"suite": "shapes", **figures}


def test_tables_hold_the_figures(results: dict[str, Any]) -> None:
    taught = {"suite": "shapes", "teacher": results["length"]["5"]}
    table = markdown_table({"ours": results, "theirs": taught})
    lines = table.splitlines()
    assert "| ours | 5 s | 4 | 100.0 (100.0–100.0) | 100.0 (51.0–100.0) |" in table
    assert sum(line.startswith("| theirs | teacher | 4 |") for line in lines) == 1
    assert sum(line.startswith("| ours | recache |") for line in lines) == 1
    assert table.count("\n\n") == 2
    for block in table.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_results_are_compared(results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps(results))
    second.write_text(json.dumps({"suite": "shapes", "length": results["length"], "drift": {}}))
    command = ["evaluate", "--compare", f"with sink={first}", f"without={second}", "--out", str(tmp_path / "docs")]
    assert cli.main(command) == 0
    assert "| with sink | 10 s | 4 |" in (tmp_path / "docs" / "shapes.md").read_text()
    assert (tmp_path / "docs" / "shapes.png").read_bytes().startswith(b"\x89PNG")
    second.write_text("{}")
    assert cli.main(command) == 2
    assert "second.json: holds no results" in capsys.readouterr().err


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither lengths nor switches"):
        plot({"a": {"suite": "shapes"}}, tmp_path / "a.png")
