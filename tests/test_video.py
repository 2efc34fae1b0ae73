"""Frames to files and back: every file is decoded again; interruptions, kills and full disks are real ones."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from longlive.data.clips import read_clip
from longlive.errors import InputError
from longlive.inference.video import AnimationWriter, ContactSheet, VideoWriter, check_writable

HEIGHT, WIDTH, FPS = 64, 96, 16


def smooth_frames(num_frames: int, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """Slowly changing colour gradients, every frame different."""
    t, y, x = torch.meshgrid(torch.arange(num_frames), torch.arange(height), torch.arange(width), indexing="ij")
    red, green = 128 + 90 * torch.sin(x / 20 + t / 9), 128 + 90 * torch.cos(y / 15 - t / 7)
    return torch.stack([red, green, 255 * x / width + 0 * t], -1).clamp(0, 255).to(torch.uint8)


def grey_frames(levels: list[int]) -> Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, HEIGHT, WIDTH, 3)


def write(path: Path, frames: Tensor, piece: int = 12, fps: int = FPS) -> None:
    with VideoWriter(path, fps, frames.shape[1], frames.shape[2]) as writer:
        for some in frames.split(piece):
            writer.write(some)


def write_interrupted(path: Path, frames: Tensor, interruption: type[BaseException]) -> None:
    with VideoWriter(path, FPS, HEIGHT, WIDTH) as writer:
        writer.write(frames)
        raise interruption


def decode(path: Path) -> Tensor:
    with av.open(str(path)) as container:
        return torch.from_numpy(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def levels(frames: Tensor) -> list[int]:
    return [round(level) for level in frames.float().mean((1, 2, 3)).tolist()]


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# Writing ---------------------------------------------------------------------------------------------------------


def test_video_holds_the_frames(tmp_path: Path) -> None:
    frames = smooth_frames(49)
    write(tmp_path / "new" / "a.video.mp4", frames)
    assert names(tmp_path / "new") == ["a.video.mp4"]
    path = tmp_path / "new" / "a.video.mp4"
    with av.open(str(path)) as container:
        (stream,) = container.streams
        assert isinstance(stream, av.VideoStream)
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, codec.height, codec.width) == ("h264", "yuv420p", HEIGHT, WIDTH)
        assert (stream.frames, stream.average_rate, stream.start_time) == (49, FPS, 0)
        assert stream.duration is not None
        assert stream.time_base is not None
        assert stream.duration * stream.time_base == Fraction(49, FPS)
        assert [frame.time for frame in container.decode(video=0)] == [i / FPS for i in range(49)]
    assert psnr(decode(path), frames) > 38
    assert psnr(torch.from_numpy(imageio.imread(path, plugin="pyav")), frames) > 38


def test_colours_survive(tmp_path: Path) -> None:
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [90, 200, 30]])
    frames = colours.to(torch.uint8)[:, None, None].expand(-1, HEIGHT, WIDTH, 3)
    write(tmp_path / "a.mp4", frames)
    assert (decode(tmp_path / "a.mp4").int() - frames.int()).abs().max() <= 3
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)  # BT.709, tv


def test_crf_sets_the_quality(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (17, HEIGHT, WIDTH, 3), dtype=torch.uint8)
    for crf in (18, 40):
        with VideoWriter(tmp_path / f"{crf}.mp4", FPS, HEIGHT, WIDTH, crf) as writer:
            writer.write(frames)
    assert (tmp_path / "40.mp4").stat().st_size * 2 < (tmp_path / "18.mp4").stat().st_size


def test_same_frames_give_same_bytes_however_they_are_cut(tmp_path: Path) -> None:
    frames = smooth_frames(40)
    for piece in (1, 12, 40):
        write(tmp_path / f"{piece}.mp4", frames, piece)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_threads_may_take_turns(tmp_path: Path) -> None:
    frames = smooth_frames(40)
    write(tmp_path / "one.mp4", frames)
    with VideoWriter(tmp_path / "turns.mp4", FPS, HEIGHT, WIDTH) as writer:
        for some in frames.split(12):
            with ThreadPoolExecutor(max_workers=1) as thread:
                thread.submit(writer.write, some).result()
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "turns.mp4").read_bytes()


def test_colons_are_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("run:1/a.mp4"), smooth_frames(5))
    assert len(read_clip(Path("run:1/a.mp4"), HEIGHT, WIDTH, FPS)) == 5


def test_frames_need_not_be_contiguous(tmp_path: Path) -> None:
    frames = smooth_frames(17)
    write(tmp_path / "a.mp4", frames)
    write(tmp_path / "b.mp4", frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_interrupted_video_plays_and_the_next_run_replaces_it(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    frames = smooth_frames(30)
    with pytest.raises(interruption):
        write_interrupted(tmp_path / "a.mp4", frames[:22], interruption)
    assert names(tmp_path) == ["a.partial.mp4"]
    partial = decode(tmp_path / "a.partial.mp4")
    assert len(partial) == 22
    assert psnr(partial, frames[:22]) > 38
    write(tmp_path / "a.mp4", frames)
    assert names(tmp_path) == ["a.mp4"]
    assert len(decode(tmp_path / "a.mp4")) == 30


def test_interruption_keeps_an_earlier_video_of_that_name(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", smooth_frames(5))
    earlier = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_interrupted(tmp_path / "a.mp4", smooth_frames(9), KeyboardInterrupt)
    assert (tmp_path / "a.mp4").read_bytes() == earlier


def test_no_frames_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_interrupted(tmp_path / "a.mp4", smooth_frames(0), KeyboardInterrupt)
    with VideoWriter(tmp_path / "b.mp4", FPS, HEIGHT, WIDTH):
        pass
    assert names(tmp_path) == []


def test_killed_video_plays(tmp_path: Path) -> None:
    code = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from test_video import smooth_frames
from longlive.inference.video import VideoWriter
with VideoWriter(sys.argv[1], 16, 64, 96) as writer:
    for frames in smooth_frames(int(sys.argv[2])).split(12):
        writer.write(frames)
    print("written", flush=True)
    sys.stdin.read()
"""
    with run_python(code, tmp_path / "a.mp4", 120, Path(__file__).parent) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.kill()
    assert names(tmp_path) == ["a.partial.mp4"]
    partial = decode(tmp_path / "a.partial.mp4")
    assert len(partial) >= 120 - 3 * FPS  # the encoder and the last fragment held the rest
    assert psnr(partial, smooth_frames(120)[: len(partial)]) > 38


def test_full_disk_is_one_line_and_no_final_file(tmp_path: Path) -> None:
    code = """
import resource, sys, torch
from longlive.errors import InputError
from longlive.inference.video import ContactSheet, VideoWriter
folder, noise = sys.argv[1], torch.randint(0, 256, (48, 64, 96, 3), dtype=torch.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the system refuses what lies beyond, as on a full disk
sheet = ContactSheet(48, 16)
sheet.add(noise)
def video():
    with VideoWriter(folder + "/a.mp4", 16, 64, 96) as writer:
        writer.write(noise)
def short_video():  # all of it waits in the encoder: the disk is full only at the end
    with VideoWriter(folder + "/b.mp4", 16, 64, 96) as writer:
        writer.write(noise[:12])
for make in (
    video,
    short_video,
    lambda: sheet.save(folder + "/a.png", []),
):
    try:
        make()
    except InputError as error:
        print(error)
"""
    (tmp_path / "a.png").write_text("earlier")
    with run_python(code, tmp_path) as process:
        output, _ = process.communicate()
    assert output.splitlines() == [
        f"{tmp_path / 'a.mp4'}: cannot be written (File too large)",
        f"{tmp_path / 'b.mp4'}: cannot be written (File too large)",
        f"{tmp_path / 'a.png'}: cannot write (File too large)",
    ]
    assert names(tmp_path) == ["a.partial.mp4", "a.png", "b.partial.mp4"]
    assert (tmp_path / "a.png").read_text() == "earlier"


def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    code = """
import resource, sys, torch
from longlive.inference.video import ContactSheet, VideoWriter
frames = torch.randint(0, 256, (16, 240, 416, 3), dtype=torch.uint8)  # 4.8 MB
sheet = ContactSheet(16 * 45, 16)
with VideoWriter(sys.argv[1], 16, 240, 416, crf=40) as writer:
    for i in range(45):
        if i == 10:
            early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        writer.write(frames)
        sheet.add(frames)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - early)
"""
    with run_python(code, tmp_path / "a.mp4") as process:
        output, _ = process.communicate()
    grown_kib = int(output)
    assert grown_kib < 20 * 1024  # the 560 frames written meanwhile are 168 MB


def test_unwritable_folder(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert names(tmp_path / "new") == ["folder"]
    assert names(tmp_path / "new" / "folder") == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(InputError, match=rf"^{folder}: cannot be written \((File exists|Not a directory)\)$"):
            check_writable(folder)
        with pytest.raises(InputError):
            VideoWriter(folder / "a.mp4", FPS, HEIGHT, WIDTH)


# Contact sheet ---------------------------------------------------------------------------------------------------

TILE, GAP, ROW = (320, 213), 16, 213 + 30  # px; a row is a tile and its label


def sheet_of(
    path: Path, frames: Tensor, captions: list[tuple[int, str]], total: int = 0, piece: int = 12
) -> Image.Image:
    sheet = ContactSheet(total or len(frames), FPS)
    for some in frames.split(piece):
        sheet.add(some)
    sheet.save(path, captions)
    return Image.open(path)


def tile_levels(sheet: Image.Image, num_tiles: int = 12) -> list[int]:
    corners = [(GAP + i % 4 * (TILE[0] + GAP), GAP + i // 4 * ROW) for i in range(num_tiles)]
    return [sheet.convert("L").getpixel((x + TILE[0] // 2, y + TILE[1] // 2)) for x, y in corners]


def chip_colours(sheet: Image.Image, num_tiles: int = 12) -> list[tuple[int, ...]]:
    """What is below the left corner of each tile: the ground, or the mark of its prompt."""
    spots = [(GAP + i % 4 * (TILE[0] + GAP) + 5, GAP + i // 4 * ROW + TILE[1] + 10) for i in range(num_tiles)]
    return [sheet.getpixel(spot) for spot in spots]


def test_an_animated_picture_shows_the_frames(tmp_path: Path) -> None:
    levels = list(range(20, 240, 11))
    with AnimationWriter(tmp_path / "a.webp", FPS, HEIGHT, WIDTH) as writer:
        writer.write(grey_frames(levels))
        assert names(tmp_path) == ["a.partial.webp"]
    with Image.open(tmp_path / "a.webp") as picture:
        assert (picture.n_frames, picture.info["loop"]) == (len(levels), 0)
        for number, level in enumerate(levels):
            picture.seek(number)
            pixels = np.asarray(picture.convert("RGB"), dtype=int)
            assert pixels.shape == (HEIGHT, WIDTH, 3)
            assert np.abs(pixels - level).max() <= 3
            assert abs(picture.info["duration"] - 1000 / FPS) < 1  # ms
    assert names(tmp_path) == ["a.webp"]


def test_contact_sheet_spreads_its_tiles(tmp_path: Path) -> None:
    frames = grey_frames(list(range(0, 245, 1)))  # frame i is grey level i
    sheet = sheet_of(tmp_path / "a.png", frames, [(0, "a prompt")])
    assert sheet.width == 4 * (TILE[0] + GAP) + GAP
    assert tile_levels(sheet) == [round(i * 244 / 11) for i in range(12)]
    assert len(set(chip_colours(sheet))) == 1
    cut = sheet_of(tmp_path / "b.png", frames, [(0, "a prompt")], piece=100)
    assert cut.tobytes() == sheet.tobytes()
    assert names(tmp_path) == ["a.png", "b.png"]


def test_contact_sheet_marks_the_prompt_of_each_tile(tmp_path: Path) -> None:
    frames = grey_frames([100] * 121)
    captions = [(0, "one"), (56, "two " * 200), (60, "never on a tile"), (62, "three")]  # tiles at 0, 11, …, 55, 66, …
    sheet = sheet_of(tmp_path / "a.png", frames, captions)
    first, second = chip_colours(sheet)[0], chip_colours(sheet)[6]
    assert first != second
    assert chip_colours(sheet) == [first] * 6 + [second] * 6
    shown = sheet_of(tmp_path / "b.png", frames, [(0, "one"), (62, "three")])
    assert sheet.height == shown.height  # prompts of no tile are not listed
    longer = sheet_of(tmp_path / "c.png", frames, [(0, "one"), (62, "three " * 100)])
    assert longer.height > shown.height


def test_contact_sheet_of_an_interrupted_and_of_a_very_short_video(tmp_path: Path) -> None:
    frames = grey_frames(list(range(100)))
    assert tile_levels(sheet_of(tmp_path / "a.png", frames, [], total=1101), 1) == [0]
    short = sheet_of(tmp_path / "b.png", frames[:3], [(0, "狐 🦊\nsecond line"), (2, "")])
    assert tile_levels(short, 3) == [0, 1, 2]
    assert short.width == 3 * (TILE[0] + GAP) + GAP
    ContactSheet(9, FPS).save(tmp_path / "none.png", [])
    assert names(tmp_path) == ["a.png", "b.png"]


# Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".BMP"])
def test_picture_is_covered_and_cropped(tmp_path: Path, suffix: str) -> None:
    wide = np.zeros((100, 400, 3), np.uint8)
    wide[:, 100:300] = (200, 100, 50)  # the middle, which the crop keeps
    Image.fromarray(wide).save(tmp_path / f"a{suffix}", quality=100)
    frames = read_clip(tmp_path / f"a{suffix}", 48, 96, FPS)
    assert frames.dtype == torch.uint8
    assert frames.shape == (1, 48, 96, 3)
    inside = frames[0, :, 2:-2].int() - torch.tensor([200, 100, 50])
    assert inside.abs().max() < 8


def test_picture_is_scaled_with_antialiasing(tmp_path: Path) -> None:
    checkers = (np.indices((512, 768)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checkers).save(tmp_path / "a.png")
    assert (read_clip(tmp_path / "a.png", HEIGHT, WIDTH, FPS).float() - 127.5).abs().max() < 3


def test_picture_modes_and_orientation(tmp_path: Path) -> None:
    upright = Image.new("RGB", (96, 64), "black")
    upright.paste("white", (0, 0, 96, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(read_clip(tmp_path / "turned.png", 64, 96, FPS)[0], torch.from_numpy(np.array(upright)))

    Image.new("RGBA", (96, 64), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_clip(tmp_path / "clear.png", 64, 96, FPS).min() == 255
    Image.fromarray(np.full((64, 96), 128 * 256, np.uint16)).save(tmp_path / "deep.png")
    assert read_clip(tmp_path / "deep.png", 64, 96, FPS).unique().tolist() == [128]


@pytest.mark.parametrize(
    ("source_fps", "num_source", "expected"),
    [
        (16, 21, list(range(21))),
        (16, 24, list(range(3, 24))),  # 1 + 4k of the last
        (8, 5, [i // 2 for i in range(1, 10)]),
        (32, 42, list(range(1, 42, 2))),
        (24, 30, [int(1.5 * i + 0.75) for i in range(3, 20)]),
    ],
)
def test_clip_is_resampled_and_its_end_is_kept(
    tmp_path: Path, source_fps: int, num_source: int, expected: list[int]
) -> None:
    write(tmp_path / "a.mp4", grey_frames([5 * i for i in range(num_source)]), fps=source_fps)
    frames = read_clip(tmp_path / "a.mp4", HEIGHT, WIDTH, FPS)
    assert frames.shape == (len(expected), HEIGHT, WIDTH, 3)
    assert [round(level / 5) for level in levels(frames)] == expected


@pytest.mark.parametrize(("max_frames", "expected"), [(13, 13), (12, 9), (4, 1), (1, 1)])
def test_clip_is_bounded(tmp_path: Path, max_frames: int, expected: int) -> None:
    write(tmp_path / "a.mp4", grey_frames([5 * i for i in range(30)]))
    frames = read_clip(tmp_path / "a.mp4", 32, 32, FPS, max_frames)
    assert [round(level / 5) for level in levels(frames)] == list(range(30 - expected, 30))


def encode_clip(path: Path, frames: Tensor, fps: int, rotation: int | None = None) -> None:
    """A clip as other programs make them."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        if rotation is not None:
            stream.set_display_rotation(rotation)
        container.start_encoding()
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def test_clips_of_other_programs(tmp_path: Path) -> None:
    encode_clip(tmp_path / "raw.h264", grey_frames([5 * i for i in range(17)]).contiguous(), FPS)  # no time stamps
    assert [round(level / 5) for level in levels(read_clip(tmp_path / "raw.h264", 32, 32, FPS))] == list(range(17))

    encode_clip(tmp_path / "coarse.mkv", grey_frames([5 * i for i in range(21)]).contiguous(), FPS)  # milliseconds
    assert [round(level / 5) for level in levels(read_clip(tmp_path / "coarse.mkv", 32, 32, FPS))] == list(range(21))

    encode_clip(tmp_path / "short.mp4", smooth_frames(1), fps=60)
    assert len(read_clip(tmp_path / "short.mp4", 32, 32, FPS)) == 1

    upright = torch.zeros(5, 96, 64, 3, dtype=torch.uint8)
    upright[:, :20] = 255  # white at the top
    encode_clip(tmp_path / "turned.mp4", upright.rot90(-1, (1, 2)).contiguous(), FPS, rotation=90)
    assert psnr(read_clip(tmp_path / "turned.mp4", 96, 64, FPS), upright) > 30


def test_interrupted_video_can_be_continued(tmp_path: Path) -> None:
    frames = smooth_frames(21)
    with pytest.raises(KeyboardInterrupt):
        write_interrupted(tmp_path / "a.mp4", frames, KeyboardInterrupt)
    assert psnr(read_clip(tmp_path / "a.partial.mp4", HEIGHT, WIDTH, FPS), frames) > 38


@pytest.mark.parametrize(
    "name",
    [
        *("text.mp4", "text.png", "cut.mp4", "cut.png", "short.png", "damaged.png", "empty.mp4", "empty.png"),
        *("no_frame.mp4", "sound.mp4", "missing.mp4", "missing.png", "folder.mp4", "folder.png"),
    ],
)
def test_undecodable_clip_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.mp4", smooth_frames(5))
    Image.fromarray(smooth_frames(1)[0].numpy()).save(tmp_path / "a.png")
    for kind in ("mp4", "png"):
        data = (tmp_path / f"a.{kind}").read_bytes()
        (tmp_path / f"text.{kind}").write_text("not a picture")
        (tmp_path / f"cut.{kind}").write_bytes(data[: len(data) // 2])
        (tmp_path / f"empty.{kind}").touch()
        (tmp_path / f"folder.{kind}").mkdir()
    picture = bytearray((tmp_path / "a.png").read_bytes())
    picture[picture.index(b"IDAT") - 2] //= 2  # a shorter length: the next block begins amid the data
    (tmp_path / "damaged.png").write_bytes(picture)
    picture = bytearray((tmp_path / "a.png").read_bytes())
    picture[picture.index(b"IHDR") - 1] //= 2
    (tmp_path / "short.png").write_bytes(picture)
    encode_clip(tmp_path / "no_frame.mp4", smooth_frames(0), FPS)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48_000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.rate = 48_000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(InputError) as error:
        read_clip(tmp_path / name, HEIGHT, WIDTH, FPS)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["mp4", "png"])
def test_forbidden_clip_is_named_in_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    write(tmp_path / "a.mp4", smooth_frames(5))
    Image.fromarray(smooth_frames(1)[0].numpy()).save(tmp_path / "a.png")
    read_clip(path, HEIGHT, WIDTH, FPS)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(
            InputError, match=rf"^{path}: cannot be read as a picture or video \(.*Permission denied.*\)$"
        ):
            read_clip(path, HEIGHT, WIDTH, FPS)
    finally:
        os.seteuid(user)
