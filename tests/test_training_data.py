"""What training draws from: prompts, pairs, their order, clips of latents and of pixels."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from longlive.data.clips import ClipWriter, LatentClips, LatentSource, PixelClips, PixelSource
from longlive.data.order import Order
from longlive.data.prompts import read_index, read_pairs, read_prompts
from longlive.errors import InputError
from longlive.inference.video import VideoWriter

FOLDER = "FOLDER"  # stands for the test's folder in expected messages


def write_lines(path: Path, *lines: str | dict[str, Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def check_message(error: pytest.ExceptionInfo[InputError], folder: Path, message: str) -> None:
    assert re.fullmatch(message, str(error.value).replace(str(folder), FOLDER))  # which has no line break


def latents(seed: int = 0, num_frames: int = 3) -> Tensor:
    return torch.randn(num_frames, 4, 2, 5, generator=torch.Generator().manual_seed(seed))


def trajectory(seed: int = 0, num_steps: int = 2) -> Tensor:
    return torch.stack([latents(100 * seed + step + 1) for step in range(num_steps)])


# Prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_of_both_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff A fox. \r\n\r\n狐\u2028が走る\n".encode())
    assert read_prompts(tmp_path / "a.txt") == ["A fox.", "狐\u2028が走る"]
    lines = [{"prompt": " one "}, "", {"prompts": ["two", "three"], "switch_frame_indices": [40], "seed": 1}]
    assert read_prompts(str(write_lines(tmp_path / "b.jsonl", *lines))) == ["one", "two"]


def test_pairs_of_two_files_and_of_one(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.txt", "one", "two")
    second = write_lines(tmp_path / "b.txt", "1", "", "2")
    assert read_pairs(first, second) == [("one", "1"), ("two", "2")]
    lines = [{"prompts": ["one", "1"]}, {"prompts": ["two", "2"], "seed": 3}]
    both = write_lines(tmp_path / "c.jsonl", *lines)
    assert read_pairs(both, None) == read_pairs(first, second)
    assert read_pairs(both, both) == [("one", "one"), ("two", "two")]


BAD_FILES: list[tuple[str, bytes | None, str]] = [
    ("a.txt", None, "cannot be read .No such file or directory."),
    ("a.txt", b"", "holds no prompt"),
    ("a.jsonl", b"\n \n", "holds no prompt"),
    ("a.csv", b"a,b", "prompt files end in .*"),
]
BAD_LINES: list[tuple[str, bytes, str]] = [
    ("a.txt", b"gar\xe7on", "not UTF-8 text .byte 0xe7."),
    ("a.jsonl", b'{"prompts": ["a", "b"]', "malformed JSON at column 23 .*"),
    ("a.jsonl", b'["a", "b"]', "needs a JSON object such as .*"),
    ("a.jsonl", b'{"prompts": ["a", ""]}', "prompt 2 is empty"),
    ("a.jsonl", b'{"promts": ["a", "b"]}', "unknown key 'promts', nearest is 'prompts'"),
    ("a.jsonl", b'{"seed": 1}', "has no 'prompts'"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_prompt_file(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_prompts(path)
    check_message(error, tmp_path, f"FOLDER/{name}: {message}")
    good = write_lines(tmp_path / "good.txt", "one")
    for pair in ((path, good), (good, path)):
        with pytest.raises(InputError) as error:
            read_pairs(*pair)
        check_message(error, tmp_path, f"FOLDER/{name}: {message}")


@pytest.mark.parametrize(("name", "line", "message"), BAD_LINES)
def test_bad_prompt_line(tmp_path: Path, name: str, line: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"prompts": ["a", "b"]}\n\n' + line + b"\n")
    with pytest.raises(InputError) as error:
        read_prompts(path)
    check_message(error, tmp_path, f"FOLDER/{name}, line 3: {message}")
    with pytest.raises(InputError) as error:
        read_pairs(path, path if name == "a.txt" else None)
    check_message(error, tmp_path, f"FOLDER/{name}, line 3: {message}")


def test_what_is_no_pair(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.txt", "one", "two")
    second = write_lines(tmp_path / "b.txt", "1", "2", "3")
    with pytest.raises(InputError) as error:
        read_pairs(first, second)
    check_message(error, tmp_path, "FOLDER/a.txt has 2 prompts and FOLDER/b.txt has 3; .*")
    with pytest.raises(InputError) as error:
        read_pairs(first, None)
    check_message(error, tmp_path, "FOLDER/a.txt: pairs need a second file, .*")
    for line, count in (({"prompt": "a"}, "1 prompt"), ({"prompts": ["a", "b", "c"]}, "3 prompts")):
        path = write_lines(tmp_path / "c.jsonl", {"prompts": ["a", "b"]}, line)
        with pytest.raises(InputError) as error:
            read_pairs(path, None)
        check_message(error, tmp_path, f"FOLDER/c.jsonl, line 2: has {count}, a pair needs 2")


# Order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_items", [1, 2, 7, 100])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_every_epoch_holds_each_item_once(num_items: int, seed: int) -> None:
    order = Order(num_items, seed)
    for epoch in (0, 1, 2, 10**12):
        items = [order[epoch * num_items + i] for i in range(num_items)]
        assert sorted(items) == list(range(num_items))


def test_order_is_a_function_of_seed_and_number() -> None:
    stream = [Order(50, seed=3)[n] for n in range(200)]  # a new one for each
    order = Order(50, seed=3)
    assert [order[n] for n in reversed(range(200))] == stream[::-1]
    epochs = [tuple(stream[start : start + 50]) for start in range(0, 200, 50)]
    assert len(set(epochs)) == 4
    assert tuple(range(50)) not in epochs
    other = Order(50, seed=4)
    assert len({tuple(other[epoch * 50 + i] for i in range(50)) for epoch in range(4)} | set(epochs)) == 8


def test_order_stays_the_same_in_later_versions() -> None:
    order = Order(8, seed=0)
    assert [order[n] for n in range(16)] == [0, 4, 5, 2, 1, 7, 6, 3, 6, 0, 1, 7, 5, 2, 3, 4]


# Clips of latents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_written_clips_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    writer = ClipWriter(tmp_path / "new" / "clips", dtype)
    for number, prompt in enumerate(["A fox.", '狐\u2028"x"', "c"]):
        states = trajectory(number)
        writer.add(prompt, states[-1], states)  # which share memory
    assert writer.num_clips == 3
    clips: LatentSource = LatentClips(writer.index)
    assert isinstance(clips, LatentClips)
    assert (len(clips), clips.shape, clips.num_steps) == (3, (3, 4, 2, 5), 2)
    batch = clips.batch([2, 0, 2])
    assert batch.prompts == ["c", "A fox.", "c"]
    assert clips.batch([1]).prompts == ['狐\u2028"x"']
    expected = torch.stack([trajectory(number) for number in (2, 0, 2)]).to(dtype).float()
    assert batch.trajectory is not None
    assert batch.trajectory.dtype == batch.latents.dtype == torch.float32
    assert torch.equal(batch.trajectory, expected)
    assert torch.equal(batch.latents, expected[:, -1])
    assert (tmp_path / "new" / "clips" / "000000.safetensors").stat().st_size < 600 + 360 * dtype.itemsize


def test_clips_need_no_trajectory_and_may_lie_anywhere(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    save_file({"latents": latents(0)}, tmp_path / "far" / "a.safetensors")
    save_file({"latents": latents(1)}, tmp_path / "b.safetensors")
    lines = [
        {"prompt": "a", "latents": "far/a.safetensors"},
        "",
        {"prompt": "b", "latents": str(tmp_path / "b.safetensors")},
    ]
    clips = LatentClips(write_lines(tmp_path / "index.jsonl", *lines))
    assert (len(clips), clips.num_steps) == (2, 0)
    batch = clips.batch([1, 0])
    assert batch.trajectory is None
    assert torch.equal(batch.latents, torch.stack([latents(1), latents(0)]))
    batch.latents.zero_()  # memory of its own
    assert torch.equal(clips.batch([1]).latents[0], latents(1))


BAD_CLIPS: list[tuple[dict[str, Tensor] | bytes, str]] = [
    (b"", "cannot be read as safetensors .*"),
    (b"not a safetensors file", "cannot be read as safetensors .*"),
    ({"x": latents()}, r"needs latents \[F, C, h, w\], found None"),
    ({"latents": latents()[0]}, r"needs latents .*, found \[4, 2, 5\]"),
    ({"latents": latents()[:0]}, r"needs latents .*, found \[0, 4, 2, 5\]"),
    ({"latents": latents().int()}, "latents are I32, accepted are .*"),
    ({"latents": latents(), "trajectory": latents()}, r"needs trajectory .*, found \[3, 4, 2, 5\]"),
    ({"latents": latents(), "trajectory": trajectory()[:0]}, r"needs trajectory .*, found \[0, 3, .*"),
    ({"latents": latents(num_frames=2)}, r"has .*\[2, 4, 2, 5\].*, the first clip .*\[3, 4, 2, 5\].*"),
    ({"latents": latents(), "trajectory": trajectory()}, "has .*trajectory.*, the first clip .*"),
]


@pytest.mark.parametrize(("content", "message"), BAD_CLIPS)
def test_bad_clip_is_named_when_the_index_is_read(
    tmp_path: Path, content: dict[str, Tensor] | bytes, message: str
) -> None:
    save_file({"latents": latents()}, tmp_path / "good.safetensors")
    if isinstance(content, bytes):
        (tmp_path / "bad.safetensors").write_bytes(content)
    else:
        save_file(content, tmp_path / "bad.safetensors")
    lines = [{"prompt": "a", "latents": f"{name}.safetensors"} for name in ("good", "good", "bad")]
    path = write_lines(tmp_path / "index.jsonl", *lines)
    with pytest.raises(InputError) as error:
        LatentClips(path)
    check_message(error, tmp_path, f"FOLDER/index.jsonl, line 3: FOLDER/bad.safetensors: {message}")


def test_cut_clip_is_named_when_the_index_is_read(tmp_path: Path) -> None:
    writer = ClipWriter(tmp_path)
    writer.add("a", latents())
    file = tmp_path / "000000.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match=rf"line 1: {file}: cannot be read as safetensors"):
        LatentClips(writer.index)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "latents": "missing.safetensors"}, "'latents' is not a file: FOLDER/missing.safetensors"),
        ({"prompt": "a", "latents": "."}, "'latents' is not a file: FOLDER"),
        ({"prompt": "a", "latents": 3}, "'latents' must be the path of a file, found 3"),
        ({"prompt": "a"}, "has no 'latents'"),
        ({"latents": "index.jsonl"}, "has no 'prompt'"),
        ({"prompt": " ", "latents": "index.jsonl"}, "prompt 1 is empty"),
        ({"prompt": ["a"], "latents": "index.jsonl"}, r"prompt 1 must be a string, found \['a'\]"),
        ({"prompt": "a", "latent": "index.jsonl"}, "unknown key 'latent', nearest is 'latents'"),
        ("[]", r"needs a JSON object such as .*, found \[\]"),
        ('{"prompt": "a"', "malformed JSON at column 15 .*"),
    ],
)
def test_bad_index_line(tmp_path: Path, line: str | dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "index.jsonl", {"prompt": "a", "latents": "index.jsonl"}, line)
    with pytest.raises(InputError) as error:
        read_index(path, "latents")
    check_message(error, tmp_path, f"FOLDER/index.jsonl, line 2: {message}")


@pytest.mark.parametrize(
    ("name", "message"), [("a.txt", "an index ends in .jsonl .*"), ("a.jsonl", "cannot be read .*")]
)
def test_bad_index(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        LatentClips(tmp_path / name)
    check_message(error, tmp_path, f"FOLDER/{name}: {message}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    bad = trajectory()
    bad[1, 0, 0, 0, 0] = value
    save_file({"latents": latents()}, tmp_path / "a.safetensors")
    save_file({"latents": latents(), "trajectory": bad}, tmp_path / "b.safetensors")
    path = write_lines(tmp_path / "index.jsonl", {"prompt": "a", "latents": "b.safetensors"})
    with pytest.raises(InputError) as error:
        LatentClips(path).batch([0])
    message = "NaN or infinite values in trajectory"
    check_message(error, tmp_path, f"FOLDER/index.jsonl, line 1: FOLDER/b.safetensors: {message}")
    with pytest.raises(InputError) as error:
        ClipWriter(tmp_path / "new").add("a", latents(), bad)
    check_message(error, tmp_path, f"FOLDER/new/000000.safetensors: {message}")


def test_clip_gone_after_opening_is_named(tmp_path: Path) -> None:
    writer = ClipWriter(tmp_path)
    writer.add("a", latents())
    clips = LatentClips(writer.index)
    (tmp_path / "000000.safetensors").unlink()
    with pytest.raises(InputError, match=r"line 1: .*000000.safetensors: cannot be read as safetensors"):
        clips.batch([0])


# Writing clips ---------------------------------------------------------------------------------------------------


KILLED_IN_THE_MIDDLE = """
import os, signal, sys, torch
from longlive.data.clips import ClipWriter

def killed(*arguments, replace=os.replace):
    if sys.argv[2] == "renamed":
        replace(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

writer = ClipWriter(sys.argv[1])
for number in range(2):
    writer.add(f"clip {number}", torch.full((3, 4, 2, 5), float(number)))
os.replace = killed
writer.add("lost", torch.zeros(3, 4, 2, 5))
"""


@pytest.mark.parametrize("moment", ["written", "renamed"])
def test_writer_goes_on_after_a_kill(tmp_path: Path, moment: str) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED_IN_THE_MIDDLE, str(tmp_path), moment], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "000002.safetensors").exists() == (moment == "renamed")
    writer = ClipWriter(tmp_path)
    assert writer.num_clips == 2
    writer.add("clip 2", torch.full((3, 4, 2, 5), 2.0))
    batch = LatentClips(writer.index).batch([0, 1, 2])
    assert batch.prompts == ["clip 0", "clip 1", "clip 2"]
    assert batch.latents[:, 0, 0, 0, 0].tolist() == [0, 1, 2]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", *3 * [".safetensors"]]


@pytest.mark.parametrize("num_bytes", [1, 20, "all but one"])
@pytest.mark.parametrize("num_before", [0, 2])
def test_line_cut_off_is_dropped(tmp_path: Path, num_before: int, num_bytes: int | str) -> None:
    writer = ClipWriter(tmp_path)
    for number in range(num_before + 1):
        writer.add(f"clip {number}", latents(number))
    *before, last = writer.index.read_bytes().splitlines(keepends=True)
    kept = last[:-1] if isinstance(num_bytes, str) else last[:num_bytes]
    writer.index.write_bytes(b"".join(before) + kept)
    writer = ClipWriter(tmp_path)
    assert writer.num_clips == num_before
    writer.add("again", latents(9))
    assert ClipWriter(tmp_path).num_clips == num_before + 1
    batch = LatentClips(writer.index).batch(range(num_before + 1))
    assert batch.prompts == [*(f"clip {number}" for number in range(num_before)), "again"]
    assert torch.equal(batch.latents[-1], latents(9))


def test_writer_keeps_to_one_shape(tmp_path: Path) -> None:
    ClipWriter(tmp_path).add("a", latents(), trajectory())
    writer = ClipWriter(tmp_path)
    for bad in ((latents(), None), (latents(), trajectory(num_steps=3)), (latents(num_frames=2), None)):
        with pytest.raises(InputError, match=r"000001.safetensors: has .*, the first clip .*"):
            writer.add("b", *bad)
    with pytest.raises(InputError, match="needs latents"):
        ClipWriter(tmp_path / "new").add("b", latents()[None])
    assert ClipWriter(tmp_path).num_clips == 1


def test_writer_leaves_the_clips_of_others_alone(tmp_path: Path) -> None:
    writer = ClipWriter(tmp_path)
    writer.add("a", latents())
    writer.add("b", latents())
    first, second = writer.index.read_text().splitlines(keepends=True)
    writer.index.write_text(second)
    with pytest.raises(InputError, match="write to a new folder"):
        ClipWriter(tmp_path)
    writer.index.write_text(first + "not JSON\n")
    with pytest.raises(InputError, match="line 2: malformed JSON"):
        ClipWriter(tmp_path)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as error:
        ClipWriter(tmp_path / "file")
    check_message(error, tmp_path, "FOLDER/file/clips.jsonl: cannot be written .*")
    writer = ClipWriter(tmp_path / "gone")
    writer.index.unlink()
    writer.index.parent.rmdir()
    with pytest.raises(InputError) as error:
        writer.add("a", latents())
    check_message(error, tmp_path, "FOLDER/gone/000000.safetensors: cannot be written .No such file or directory.")


# Clips of pixels -------------------------------------------------------------------------------------------------


HEIGHT, WIDTH, FPS = 32, 48, 16


def write_videos(folder: Path) -> Path:
    """Grey videos of 9 and 5 frames, frame i at 10 + 20 i, and a red picture."""
    for num_frames in (9, 5):
        levels = torch.arange(10, 10 + 20 * num_frames, 20, dtype=torch.uint8)
        with VideoWriter(folder / f"{num_frames}.mp4", FPS, HEIGHT, WIDTH) as writer:
            writer.write(levels[:, None, None, None].expand(-1, HEIGHT, WIDTH, 3))
    Image.new("RGB", (100, 100), (255, 0, 0)).save(folder / "a.png")
    files = ["9.mp4", "5.mp4", str(folder / "a.png")]
    return write_lines(folder / "index.jsonl", *({"prompt": file[-5:], "video": file} for file in files))


def test_pixels_of_videos(tmp_path: Path) -> None:
    clips = PixelClips(write_videos(tmp_path), HEIGHT, WIDTH, num_video_frames=5, fps=FPS)
    source: PixelSource = clips
    assert (len(source), clips.prompts) == (3, ["9.mp4", "5.mp4", "a.png"])
    pixels = source.pixels([1, 0])
    assert pixels.shape == (2, 5, 3, HEIGHT, WIDTH)
    assert pixels.dtype == torch.float32
    expected = torch.arange(10, 110, 20) / 127.5 - 1  # the first frames of both
    assert (pixels - expected[:, None, None, None]).abs().max() < 0.03


def test_pixels_of_pictures_at_another_size(tmp_path: Path) -> None:
    pixels = PixelClips(write_videos(tmp_path), 16, 8, num_video_frames=1, fps=FPS).pixels([2])
    assert pixels.shape == (1, 1, 3, 16, 8)
    assert torch.equal(pixels.amax((0, 1, 3, 4)), torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(pixels.amin((0, 1, 3, 4)), torch.tensor([1.0, -1.0, -1.0]))


def test_videos_are_read_at_the_rate_asked_for(tmp_path: Path) -> None:
    pixels = PixelClips(write_videos(tmp_path), HEIGHT, WIDTH, num_video_frames=4, fps=FPS // 2).pixels([0])
    levels = (pixels.mean((0, 2, 3, 4)) + 1) * 127.5
    assert (levels - torch.tensor([30.0, 70.0, 110.0, 150.0])).abs().max() < 3


def test_bad_video_is_named(tmp_path: Path) -> None:
    index = write_videos(tmp_path)
    clips = PixelClips(index, HEIGHT, WIDTH, num_video_frames=9, fps=FPS)
    assert clips.pixels([0]).shape[1] == 9
    for item, name, num_frames in ((1, "5.mp4", 5), (2, "a.png", 1)):
        with pytest.raises(InputError) as error:
            clips.pixels([0, item])
        message = f"FOLDER/{name}: too short, {num_frames} of the 9 frames needed at 16 fps"
        check_message(error, tmp_path, f"FOLDER/index.jsonl, line {item + 1}: {message}")
    (tmp_path / "5.mp4").write_text("not a video")
    with pytest.raises(InputError) as error:
        clips.pixels([1])
    message = "FOLDER/index.jsonl, line 2: FOLDER/5.mp4: cannot be read as a picture or video .*"
    check_message(error, tmp_path, message)
    (tmp_path / "5.mp4").unlink()
    with pytest.raises(InputError, match=r"line 2: 'video' is not a file: .*5.mp4"):
        PixelClips(index, HEIGHT, WIDTH, num_video_frames=9, fps=FPS)
