"""Prompt files: what is read, and the one-line error for everything that cannot be."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from longlive.data.prompts import Script, make_script, read_scripts
from longlive.errors import InputError

EXAMPLES = Path(__file__).parent.parent / "example"


def read(
    path: Path, num_frames: int = 240, block: int = 3, switches: tuple[int, ...] | None = None, fps: int = 16
) -> list[Script]:
    return read_scripts(path, num_frames=num_frames, frames_per_block=block, switch_frames=switches, fps=fps)


def test_only_the_first_videos_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n{"prompt": broken\n')
    settings = {"num_frames": 6, "frames_per_block": 3, "switch_frames": None, "fps": 16}
    assert [script.prompts for script in read_scripts(path, **settings, limit=2)] == [("a",), ("b",)]
    with pytest.raises(InputError, match="line 4"):
        read_scripts(path, **settings)


def test_text_file_has_one_video_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.TXT"
    path.write_bytes("\ufeffA fox.\r\n\r\n  Ein Fuchs läuft; 狐が走る 🦊.  \r\nline\u2028separator\x0bkept".encode())
    scripts = read(path, num_frames=21)
    assert scripts == [
        Script(("A fox.",), (), 21, None, None),
        Script(("Ein Fuchs läuft; 狐が走る 🦊.",), (), 21, None, None),
        Script(("line\u2028separator\x0bkept",), (), 21, None, None),
    ]


def test_json_lines_may_differ_in_everything(tmp_path: Path) -> None:
    (tmp_path / "fox.png").touch()
    lines = [
        {"prompts": ["a", "b", "c"]},
        {"prompt": "a", "seed": 0},
        {"prompts": ["a", "b"], "switch_frame_indices": [40], "num_output_frames": 60, "seed": None},
        {"prompts": ["a", "b", "c"], "switch_frame_indices": " 40, 80 ", "start_from": "fox.png"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes("\r\n\r\n".join(json.dumps(line) for line in lines).encode("utf-8-sig"))
    assert read(path) == [
        Script(("a", "b", "c"), (81, 159), 240, None, None),
        Script(("a",), (), 240, 0, None),
        Script(("a", "b"), (40,), 60, None, None),
        Script(("a", "b", "c"), (40, 80), 240, None, str(tmp_path / "fox.png")),
    ]


@pytest.mark.parametrize(
    ("num_prompts", "num_frames", "block"), [(2, 21, 3), (6, 240, 3), (7, 21, 3), (5, 8, 1), (1, 4, 4)]
)
def test_even_switches_are_at_block_starts(tmp_path: Path, num_prompts: int, num_frames: int, block: int) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompts": ["p"] * num_prompts}))
    (script,) = read(path, num_frames, block)
    edges = [0, *script.switch_frames, num_frames]
    lengths = [end - start for start, end in pairwise(edges)]
    assert len(lengths) == num_prompts
    assert all(edge % block == 0 for edge in edges)
    assert min(lengths) >= block
    assert max(lengths) - min(lengths) <= block


def test_config_switches_serve_lines_without_their_own(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompts": ["a", "b"]}\n{"prompts": ["a", "b"], "switch_frame_indices": [7]}')
    assert [script.switch_frames for script in read(path, switches=(40,))] == [(40,), (7,)]


@pytest.mark.parametrize(
    ("durations", "fps", "ends"),
    [
        ([5, 5, 5], 16, (21, 42, 60)),  # 80, 160, 240 video frames are 20.75, 40.75, 60.75 latents
        ([5, 5, 5], 8, (12, 21, 30)),  # 40, 80, 120 video frames are 10.75, 20.75, 30.75 latents
        ([1.3125], 16, (6,)),  # exactly the 21 video frames of 6 latents
        ([0.01, 0.01], 16, (3, 6)),  # never less than a block
        ([2.1] * 20, 16, tuple(3 * round((2.1 * 16 * i + 3) / 4 / 3) for i in range(1, 21))),  # errors do not add up
    ],
)
def test_durations_are_rounded_to_blocks(
    tmp_path: Path, durations: list[float], fps: int, ends: tuple[int, ...]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompts": ["p"] * len(durations), "durations": durations}))
    (script,) = read(path, fps=fps)
    assert (*script.switch_frames, script.num_frames) == ends


def test_prompts_without_a_file_are_checked_alike() -> None:
    def script(*prompts: str) -> Script:
        return make_script(prompts, num_frames=240, frames_per_block=3, switch_frames=(40,), fps=16)

    assert script(" a ", "b") == Script(("a", "b"), (40,), 240, None, None)
    with pytest.raises(InputError, match=r"^prompt 2 is empty$"):
        script("a", " ")
    with pytest.raises(InputError, match=r"^has 3 prompts and needs 2 switch frames, the config gives 1$"):
        script("a", "b", "c")


def test_examples_are_valid_with_and_without_the_published_switches() -> None:
    long = read(EXAMPLES / "long_example.txt")
    assert 8 <= len(long) <= 10
    assert all(60 <= len(script.prompts[0].split()) <= 100 for script in long)
    for switches in (None, (40, 80, 120, 160, 200)):
        interactive = read(EXAMPLES / "interactive_example.jsonl", switches=switches)
        assert [len(script.prompts) for script in interactive] == [6, 4, 3, 5]
        assert {script.num_frames for script in interactive} == {240}
        assert [script.seed for script in interactive] == [None, None, None, 2024]


TWO = {"prompts": ["a", "b"]}
BAD_LINES = [
    ("{", r"malformed JSON at column 2 \(.*\)"),
    ("[" * 100_000, r"malformed JSON \(.*\)"),
    ('{"seed": ' + "1" * 5000 + "}", r"malformed JSON \(.*\)"),
    ('["a"]', r"needs a JSON object such as .*, found \['a'\]"),
    ({"prompt": "a", "seeed": 1}, "unknown key 'seeed', nearest is 'seed'"),
    ({"prompt": "a", "switch_frames": [1]}, "unknown key 'switch_frames', nearest is 'switch_frame_indices'"),
    ({"prompt": "a", "x\ny": 1}, r"unknown key 'x\\ny', nearest is .*"),
    ({"seed": 1}, "has no 'prompts'"),
    ({"prompts": None}, "has no 'prompts'"),
    ({"prompts": ["a"], "prompt": "a"}, "gives both 'prompt' and 'prompts', needs one of them"),
    ({"prompts": "a"}, "'prompts' must be a list of strings, found 'a'"),
    ({"prompts": []}, r"'prompts' must be a list of strings, found \[\]"),
    ({"prompts": ["a", 5]}, "prompt 2 must be a string, found 5"),
    ({"prompt": ["a"]}, r"prompt 1 must be a string, found \['a'\]"),
    ({"prompts": ["a", " \n"]}, "prompt 2 is empty"),
    ({"prompt": "a\ud800b"}, "prompt 1 holds a lone surrogate, .*"),
    ({**TWO, "switch_frame_indices": [40, 80]}, "has 2 prompts and needs 1 switch frame, gives 2"),
    ({"prompt": "a", "switch_frame_indices": "40"}, "has 1 prompt and needs 0 switch frames, gives 1"),
    ({**TWO, "switch_frame_indices": ""}, "has 2 prompts and needs 1 switch frame, gives 0"),
    ({**TWO, "switch_frame_indices": 40}, "'switch_frame_indices' must be a list .*, found 40"),
    ({**TWO, "switch_frame_indices": ["40"]}, "a switch frame must be a whole number, found '40'"),
    ({**TWO, "switch_frame_indices": "4x"}, "a switch frame must be a whole number, found '4x'"),
    ({**TWO, "switch_frame_indices": "4" * 5000}, r"a switch frame must be a whole number, found '4+\.\.\."),
    ({**TWO, "switch_frame_indices": [40.0]}, "a switch frame must be a whole number, found 40.0"),
    ({**TWO, "switch_frame_indices": [True]}, "a switch frame must be a whole number, found True"),
    ({**TWO, "switch_frame_indices": [0]}, "switch frame 0 is outside the video, accepted are 1 to 239"),
    ({**TWO, "switch_frame_indices": [240]}, "switch frame 240 is outside the video, accepted are 1 to 239"),
    ({**TWO, "switch_frame_indices": [238]}, "prompt 2 would never be shown: .*"),
    ({"prompts": ["a", "b", "c"], "switch_frame_indices": [80, 40]}, "switch frames must increase, found 40 after 80"),
    ({"prompts": ["a", "b", "c"], "switch_frame_indices": [80, 80]}, "switch frames must increase, found 80 after 80"),
    ({"prompts": ["a", "b", "c"], "switch_frame_indices": [40, 41]}, "prompt 2 would never be shown: .*"),
    ({**TWO, "durations": [5]}, r"'durations' must list seconds for 2 prompts, found \[5\]"),
    ({**TWO, "durations": 5}, "'durations' must list seconds for 2 prompts, found 5"),
    ({**TWO, "durations": [5, 0]}, "'durations' must be positive numbers of seconds, found 0"),
    ({**TWO, "durations": [5, -1.5]}, "'durations' must be positive numbers of seconds, found -1.5"),
    ({**TWO, "durations": [5, "5"]}, "'durations' must be positive numbers of seconds, found '5'"),
    ({**TWO, "durations": [5, True]}, "'durations' must be positive numbers of seconds, found True"),
    ({**TWO, "durations": [5, float("nan")]}, "'durations' must be positive numbers of seconds, found nan"),
    ({**TWO, "durations": [5, float("inf")]}, "'durations' must be positive numbers of seconds, found inf"),
    ({**TWO, "durations": [5, 5], "num_output_frames": 60}, "gives both 'durations' and 'num_output_frames', .*"),
    (
        {**TWO, "durations": [5, 5], "switch_frame_indices": [9]},
        "gives both 'durations' and 'switch_frame_indices', .*",
    ),
    ({"prompt": "a", "seed": 1.5}, "'seed' must be a whole number, found 1.5"),
    ({"prompt": "a", "seed": "1"}, "'seed' must be a whole number, found '1'"),
    ({"prompt": "a", "seed": -1}, "'seed' must be from 0 to .*, found -1"),
    ({"prompt": "a", "num_output_frames": 20}, "num_output_frames 20 is not a positive multiple of the 3 frames .*"),
    ({"prompt": "a", "num_output_frames": 0}, "num_output_frames 0 is not a positive multiple of the 3 frames .*"),
    ({"prompt": "a", "num_output_frames": "21"}, "'num_output_frames' must be a whole number, found '21'"),
    ({**TWO, "num_output_frames": 3}, "has 2 prompts, but 3 frames are only 1 block"),
    ({"prompt": "a", "start_from": 1}, "'start_from' must be the path of a picture or clip, found 1"),
    ({"prompt": "a", "start_from": "missing.png"}, "'start_from' is not a file: .*missing.png"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_line_is_named_in_one_line(tmp_path: Path, line: str | dict[str, Any], message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f'{{"prompt": "fine"}}\n\n{text}\n')
    with pytest.raises(InputError) as error:
        read(path)
    assert re.fullmatch(f"{re.escape(str(path))}, line 3: {message}", str(error.value))
    assert len(str(error.value)) < len(str(path)) + 200


def test_config_switches_must_fit_every_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompts": ["a", "b", "c", "d"]}')
    with pytest.raises(InputError, match="line 1: has 4 prompts and needs 3 switch frames, the config gives 5"):
        read(path, switches=(40, 80, 120, 160, 200))
    with pytest.raises(InputError, match="line 1: switch frame 300 is outside the video"):
        read(path, switches=(40, 80, 300))


def test_bad_files(tmp_path: Path) -> None:
    def message(name: str, content: bytes | None) -> str:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError) as error:
            read(path)
        assert str(error.value).startswith(str(path))
        return str(error.value)[len(str(path)) :]

    assert message("empty.txt", b"") == ": holds no prompt"
    assert message("blank.jsonl", b"\xef\xbb\xbf\r\n \n") == ": holds no prompt"
    assert message("latin.txt", b"a fox\nun garc\xf3n\n") == ", line 2: not UTF-8 text (byte 0xf3)"
    assert message("utf16.jsonl", '{"prompt": "a"}'.encode("utf-16")) == ", line 1: not UTF-8 text (byte 0xff)"
    assert message("prompts.json", b"{}").startswith(": prompt files end in .txt")
    assert message("missing.txt", None) == ": cannot be read (No such file or directory)"
    (tmp_path / "folder.txt").mkdir()
    assert message("folder.txt", None) == ": cannot be read (Is a directory)"
