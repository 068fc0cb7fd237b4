"""Frames of videos: the right one, from any place, in any order, by several threads."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest

from featstore.errors import DecodeError
from featstore.images import video
from featstore.images.decoded import DecodeOptions
from featstore.images.opening import kind_of_file, list_parts
from featstore.images.part import Part


def write_video(path: Path, count: int, *, rate: int = 25, codec: str = "mpeg4", size: int = 48) -> None:
    """A video whose frame number stands in its grey levels: level 5k in the left half, 250 - 5k in the right one."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 12
        if codec in ("mpeg4", "libx264"):
            stream.codec_context.max_b_frames = 2  # so that frames are not stored in the order shown
        if codec == "mpeg4":
            stream.codec_context.qmin = stream.codec_context.qmax = 2
        for number in range(count):
            picture = np.full((size, size, 3), 5 * (number % 50), np.uint8)
            picture[:, size // 2 :] = 250 - 5 * (number % 50)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def number_of(pixels: np.ndarray) -> int:
    return round(float(pixels[8:-8, 4:16].mean()) / 5)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_every_frame_in_any_order(tmp_path: Path, name: str, codec: str) -> None:
    write_video(tmp_path / name, 50, codec=codec)
    assert kind_of_file(tmp_path / name) == "video"
    opened = video.open_video(tmp_path / name)
    assert opened.num_frames == 50
    assert opened.rate == 25
    order = [*range(50), *reversed(range(50)), *np.random.default_rng(0).permutation(50).tolist()]
    found = [number_of(opened.pixels(Part(frame=frame), DecodeOptions()).pixels) for frame in order]
    assert found == order
    assert opened.pixels(Part(), DecodeOptions()).pixels.shape == (48, 48, 3)
    assert opened.num_bytes > 0
    opened.close()


def test_h264_in_a_transport_stream_from_the_first_frame_on(tmp_path: Path) -> None:
    write_video(tmp_path / "a.ts", 30, codec="libx264")
    opened = video.open_video(tmp_path / "a.ts")
    order = [20, 0, 1, 29, 2, 0, *range(30)]
    assert [number_of(opened.pixels(Part(frame=frame), DecodeOptions()).pixels) for frame in order] == order
    opened.close()


@pytest.mark.parametrize("cut", [5, 17])
def test_frames_that_an_edit_list_cuts_off_are_not_counted(tmp_path: Path, cut: int) -> None:
    write_video(tmp_path / "a.mp4", 50, codec="libx264")
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None and packet.pts is not None:
                shift = round(cut / 25 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    opened = video.open_video(tmp_path / "cut.mp4")
    assert opened.num_frames == 50 - cut
    order = [0, 1, 2, 20, 0, *range(50 - cut), *reversed(range(50 - cut))]
    found = [number_of(opened.pixels(Part(frame=frame), DecodeOptions()).pixels) for frame in order]
    assert found == [cut + frame for frame in order]
    opened.close()


def test_frames_without_times_are_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "a.h264", 5, codec="libx264")
    with pytest.raises(DecodeError, match="no times that tell them apart; convert it to MP4 or Matroska"):
        video.open_video(tmp_path / "a.h264")


def test_behind_a_frame_that_does_not_come_none_is_given(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 10)
    opened = video.open_video(tmp_path / "a.mp4")
    opened._numbers = {time: number + (number > 3) for time, number in opened._numbers.items()}  # as if 4 were lost
    assert number_of(opened.pixels(Part(frame=3), DecodeOptions()).pixels) == 3
    with pytest.raises(DecodeError, match="damaged video: frame 6 or one before it is missing"):
        opened.pixels(Part(frame=6), DecodeOptions())
    opened.close()


def test_threads_share_one_video(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 40)
    opened = video.open_video(tmp_path / "a.mp4")
    order = np.random.default_rng(1).integers(0, 40, 60).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda frame: number_of(opened.pixels(Part(frame=frame), DecodeOptions()).pixels), order))
    assert found == order
    opened.close()


def test_facts_and_parts(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 7, rate=10)
    assert video.video_facts(tmp_path / "a.mp4") == (7, 10.0)
    assert list_parts(tmp_path / "a.mp4") == [Part(frame=frame) for frame in range(7)]


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 3)
    opened = video.open_video(tmp_path / "a.mp4")
    with pytest.raises(DecodeError, match="the video has 3 frames; there is no frame 3, counted from 0"):
        opened.pixels(Part(frame=3), DecodeOptions())
    opened.close()
    (tmp_path / "b.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    with pytest.raises(DecodeError, match=r"damaged video \("):
        video.open_video(tmp_path / "b.mp4")
    with av.open(str(tmp_path / "c.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DecodeError, match="the file has no video stream"):
        video.open_video(tmp_path / "c.mkv")


def test_a_cut_video_never_gives_another_frame(tmp_path: Path) -> None:
    write_video(tmp_path / "a.avi", 40)
    whole = (tmp_path / "a.avi").read_bytes()
    for share in (0.5, 0.8, 0.95):
        (tmp_path / "cut.avi").write_bytes(whole[: int(len(whole) * share)])
        try:
            opened = video.open_video(tmp_path / "cut.avi")
        except DecodeError:
            continue
        for frame in range(0, opened.num_frames - 1, 3):
            try:
                pixels = opened.pixels(Part(frame=frame), DecodeOptions()).pixels
            except DecodeError:
                continue
            assert number_of(pixels) == frame
        opened.close()


def test_an_absurd_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", 2)
    monkeypatch.setattr(video, "MAX_PIXELS", 1000)
    with pytest.raises(DecodeError, match="48x48 pixels are above the limit of 1000 for one image"):
        video.open_video(tmp_path / "a.mp4")


def test_videos_need_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DecodeError, match=r"need PyAV: pip install 'featstore\[video\]'"):
        video.open_video(tmp_path / "a.mp4")
