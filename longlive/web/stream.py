"""Frames to bytes for a browser: H.264 in fragmented mp4 (ISO/IEC 14496-12), WebP pictures.

The boxes are written here and not by FFmpeg, whose muxer holds back the last frame of a fragment until it has seen the
next: a viewer gets all of a block at once, and a paused one sees its last picture. Time is counted in video frames from
the beginning of a branch, so fragments of several streams of one branch, which the same settings encoded, are one file.
Frames are uint8 RGB [V, H, W, 3] (V = video frames).
"""

import io
import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.codec.context import Flags
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import Colorspace
from PIL import Image

Frames = np.ndarray[Any, np.dtype[np.uint8]]

# zerolatency: every frame comes out at once. One thread: there may be many streams.
_ENCODER = {"preset": "veryfast", "tune": "zerolatency", "threads": "1"}
_COLOUR = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709", "color_range": "tv"}
_SPS, _PPS = 7, 8  # NAL unit types
_KEY_SAMPLE, _OTHER_SAMPLE = 0x02000000, 0x01010000
_THUMBNAIL_PX = 160
_UNITY = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)


class Mp4Stream:
    """One unbroken stream. init: its init segment; mime: what a browser is asked whether it can play."""

    def __init__(self, fps: int, height: int, width: int, crf: int) -> None:
        codec = av.CodecContext.create("libx264", "w")
        assert isinstance(codec, VideoCodecContext)
        codec.height, codec.width, codec.pix_fmt = height, width, "yuv420p"
        codec.time_base, codec.framerate = Fraction(1, fps), Fraction(fps)
        codec.options = {"crf": str(crf), "g": str(2 * fps), **_ENCODER, **_COLOUR}
        codec.flags |= Flags.global_header
        codec.open()
        self._codec = codec
        config = _decoder_config(bytes(codec.extradata or b""))
        self.mime = f'video/mp4; codecs="avc1.{config[1:4].hex()}"'
        self.init = _init_segment(fps, height, width, config)

    def fragment(self, frames: Frames, first_video_frame: int) -> bytes:
        """The next frames as a fragment that begins at `first_video_frame`."""
        samples = []
        for number, pixels in enumerate(frames, start=first_video_frame):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            frame.pts = number
            (packet,) = self._codec.encode(frame)
            samples.append((_with_lengths(bytes(packet)), packet.is_keyframe))
        return _fragment(samples, first_video_frame)


def one_file(init: bytes, fragments: Iterable[bytes]) -> bytes:
    """An ordinary mp4 of the fragments of a branch; the pictures stay as they are."""
    target = io.BytesIO()
    with (
        av.open(io.BytesIO(b"".join([init, *fragments])), "r") as source,
        av.open(target, "w", format="mp4") as container,
    ):
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return target.getvalue()


def webp(pixels: Frames, quality: int = 80) -> bytes:
    """One frame [H, W, 3] as WebP, quickly rather than small."""
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format="WEBP", quality=quality, method=0)
    return target.getvalue()


def thumbnail(pixels: Frames) -> bytes:
    """One frame [H, W, 3] as WebP, at most 160 px wide."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return webp(np.asarray(picture))


def _nal_units(stream: bytes) -> list[bytes]:
    """The units of an Annex B byte stream, which begin with 00 00 01 and never end in 00."""
    return [unit.rstrip(b"\0") for unit in stream.split(b"\0\0\1") if unit.strip(b"\0")]


def _with_lengths(stream: bytes) -> bytes:
    """Annex B to what mp4 holds: every unit behind its length."""
    return b"".join(struct.pack(">I", len(unit)) + unit for unit in _nal_units(stream))


def _decoder_config(extradata: bytes) -> bytes:
    """AVCDecoderConfigurationRecord (ISO/IEC 14496-15) of the parameter sets; profile and level are bytes 1 to 3."""
    units = {unit[0] & 0x1F: unit for unit in _nal_units(extradata)}
    sps, pps = units[_SPS], units[_PPS]
    head = bytes([1, *sps[1:4], 0xFF, 0xE1])
    record = head + struct.pack(">H", len(sps)) + sps + b"\1" + struct.pack(">H", len(pps)) + pps
    return record + bytes([0xFD, 0xF8, 0xF8, 0])  # of the high profiles: 4:2:0, 8 bits, no more sets


def _box(kind: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I", 8 + len(body)) + kind + body


def _full_box(kind: bytes, version: int, flags: int, *content: bytes) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags), *content)


def _init_segment(fps: int, height: int, width: int, decoder_config: bytes) -> bytes:
    """File type and an empty movie of one video track, whose time is counted in frames."""
    entry = struct.pack(">6xH16xHHIII", 1, width, height, 0x480000, 0x480000, 0) + struct.pack(">H32xHh", 1, 24, -1)
    avc1 = _box(b"avc1", entry, _box(b"avcC", decoder_config))
    tables = [_full_box(kind, 0, 0, bytes(4)) for kind in (b"stts", b"stsc", b"stco")]
    samples = _box(
        b"stbl",
        _full_box(b"stsd", 0, 0, struct.pack(">I", 1), avc1),
        *tables,
        _full_box(b"stsz", 0, 0, bytes(8)),
    )
    data = _box(b"dinf", _full_box(b"dref", 0, 0, struct.pack(">I", 1), _full_box(b"url ", 0, 1)))
    media = _box(
        b"mdia",
        _full_box(b"mdhd", 0, 0, struct.pack(">IIIIHH", 0, 0, fps, 0, 0x55C4, 0)),
        _full_box(b"hdlr", 0, 0, struct.pack(">I4s12x", 0, b"vide"), b"video\0"),
        _box(b"minf", _full_box(b"vmhd", 0, 1, bytes(8)), data, samples),
    )
    size = struct.pack(">II", width << 16, height << 16)
    track = _box(
        b"trak", _full_box(b"tkhd", 0, 3, struct.pack(">IIIII8xHHHH", 0, 0, 1, 0, 0, 0, 0, 0, 0), _UNITY, size), media
    )
    movie = _full_box(
        b"mvhd",
        0,
        0,
        struct.pack(">IIIIIHH8x", 0, 0, fps, 0, 0x10000, 0x100, 0),
        _UNITY,
        bytes(24),
        struct.pack(">I", 2),
    )
    defaults = _box(b"mvex", _full_box(b"trex", 0, 0, struct.pack(">IIIII", 1, 1, 1, 0, 0)))
    return _box(b"ftyp", b"iso6", bytes(4), b"iso6avc1mp41") + _box(b"moov", movie, track, defaults)


def _fragment(samples: Sequence[tuple[bytes, bool]], first_video_frame: int) -> bytes:
    """moof and mdat of samples (data, is key frame), each of which lasts one unit of time."""
    header = struct.pack(">I", first_video_frame + 1)
    track = _full_box(b"tfhd", 0, 0x020000, struct.pack(">I", 1))  # offsets count from the moof
    time = _full_box(b"tfdt", 1, 0, struct.pack(">Q", first_video_frame))
    table = b"".join(
        struct.pack(">II", len(data), _KEY_SAMPLE if is_key else _OTHER_SAMPLE) for data, is_key in samples
    )

    def movie(data_offset: int) -> bytes:
        run = _full_box(b"trun", 0, 0x000601, struct.pack(">II", len(samples), data_offset), table)
        return _box(b"moof", _full_box(b"mfhd", 0, 0, header), _box(b"traf", track, time, run))

    return movie(len(movie(0)) + 8) + _box(b"mdat", *(data for data, _ in samples))
