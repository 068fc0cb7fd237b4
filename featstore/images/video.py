"""Frames of a video by their number in the order shown, decoded with PyAV from the file in place."""

import threading
import weakref
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from featstore.errors import DecodeError
from featstore.images.decoded import Decoded, DecodeOptions
from featstore.images.part import Part
from featstore.images.sizes import MAX_PIXELS

FORWARD = 64  # so many frames ahead are decoded on the way; beyond that seeking to a key frame is cheaper
CHECKED = 32  # frames decoded at opening to see whether the packets tell when frames are shown; H.264 reorders 16
# AVI keeps no times of showing; FFmpeg works them out of the order of storage, but not for these codecs.
_UNTIMED = ("h264", "hevc", "vvc")


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DecodeError("videos need PyAV: pip install 'featstore[video]'") from error
    return av


class VideoFile:
    """An open video; frame i is the one that FFmpeg decodes as number i from the start.

    Frames are known by their times. These come from the packets, without decoding, where the first frames show that
    the decoder keeps to them; else the whole video is decoded once at opening.

    Raises:
        DecodeError: no video stream, no frames, frames that cannot be told apart, or damaged.
    """

    def __init__(self, path: Path):
        av = _av()
        self._errors = (av.error.FFmpegError, ValueError, IndexError, EOFError)
        self._lock = threading.Lock()
        self._frames: Any = None  # a running decoder, and the number of the frame that it must give next, if known
        self._next: int | None = None
        self._clock = "pts"  # what tells frames apart
        # A file object: nothing that the file says can make FFmpeg open another place.
        self._file = path.open("rb")
        try:
            self._container: Any = None
            self._start()
            size = self._stream.codec_context
            if size.width * size.height > MAX_PIXELS:
                raise DecodeError(
                    f"{size.height}x{size.width} pixels are above the limit of {MAX_PIXELS} for one image"
                )
            self._times = self._list_times()
        except DecodeError:
            self._file.close()
            raise
        except self._errors as error:
            self._file.close()
            raise DecodeError(f"damaged video ({type(error).__name__})") from None
        self._numbers = {time: number for number, time in enumerate(self._times)}
        weakref.finalize(self, self._file.close)

    def _start(self) -> None:
        """Open the container anew: the only way to its start that needs no index and no times."""
        if self._container is not None:
            self._frames = None
            self._container.close()
        self._file.seek(0)
        self._container = _av().open(self._file, mode="r", metadata_errors="replace")
        if not self._container.streams.video:
            raise DecodeError("the file has no video stream")
        self._stream = self._container.streams.video[0]

    def _list_times(self) -> list[int]:
        """Times of all frames in the order shown, in the stream's time base."""
        untimed = "avi" in self._container.format.name.split(",") and self._stream.codec_context.name in _UNTIMED
        stored = () if untimed else self._container.demux(self._stream)
        # What an edit list cuts off is stored and marked, and no frame comes of it.
        found = [packet.pts for packet in stored if packet.size and not packet.is_discard]
        self._start()
        if found and None not in found:
            times = sorted(found)
            first = [frame.pts for frame in islice(self._container.decode(self._stream), CHECKED)]
            self._start()
            if len(set(times)) == len(times) and first == times[:CHECKED]:
                return times
        both = [(frame.pts, frame.dts) for frame in self._container.decode(self._stream)]
        self._start()
        if not both:
            raise DecodeError("the video has no frames")
        for self._clock, clock in zip(("pts", "dts"), zip(*both)):
            if None not in clock and len(set(clock)) == len(clock):
                return list(clock)
        raise DecodeError("the frames of the video have no times that tell them apart; convert it to MP4 or Matroska")

    @property
    def num_frames(self) -> int:
        return len(self._times)

    @property
    def rate(self) -> float:
        """Frames a second, as the stream says; from the times where it does not."""
        rate = self._stream.average_rate or self._stream.guessed_rate
        if not rate and len(self._times) > 1:
            rate = Fraction(len(self._times) - 1) / ((max(self._times) - min(self._times)) * self._stream.time_base)
        return float(rate or 1)

    @property
    def num_bytes(self) -> int:
        return 160 * len(self._times) + 32 * 2**20  # the times, and what a decoder holds of reference frames

    def pixels(self, part: Part, options: DecodeOptions) -> Decoded:
        """Frame `part.frame` (0 without one) as uint8 (H, W, 3).

        Raises:
            DecodeError: no such frame, or it cannot be decoded.
        """
        wanted = part.frame or 0
        if wanted >= len(self._times):
            raise DecodeError(f"the video has {len(self._times)} frames; there is no frame {wanted}, counted from 0")
        with self._lock:
            try:
                return Decoded(self._seek(wanted))
            except DecodeError:
                raise
            except self._errors as error:
                self._frames = None
                raise DecodeError(f"damaged video at frame {wanted} ({type(error).__name__})") from None

    def _seek(self, wanted: int) -> np.ndarray:
        if self._frames is not None and self._next is not None and self._next <= wanted < self._next + FORWARD:
            found = self._forward(wanted)
            if found is not None:
                return found
        # Seeking goes by the order of storage: with reordered frames it may land behind the one that is wanted.
        for back in (0, 16, 128):
            try:
                self._container.seek(self._times[max(0, wanted - back)], stream=self._stream, backward=True)
            except self._errors:
                break  # a container that cannot seek
            self._frames, self._next = self._container.decode(self._stream), None
            found = self._forward(wanted)
            if found is not None:
                return found
        self._start()
        self._frames, self._next = self._container.decode(self._stream), 0
        found = self._forward(wanted)
        if found is None:
            raise DecodeError(f"damaged video: frame {wanted} or one before it is missing")
        return found

    def _forward(self, wanted: int) -> np.ndarray | None:
        """Decode up to a frame; None if it does not come, or not after the ones that are shown before it."""
        for frame in self._frames:
            number = self._numbers.get(getattr(frame, self._clock))
            if number is None or number > wanted or self._next not in (None, number):
                break
            self._next = number + 1
            if number == wanted:
                pixels: np.ndarray = frame.to_ndarray(format="rgb24")
                return pixels
        self._frames = self._next = None
        return None

    def close(self) -> None:
        with self._lock:
            self._frames = None
            self._container.close()
            self._file.close()


def open_video(path: Path) -> VideoFile:
    """Open a video to take frames from it.

    Raises:
        DecodeError: as `VideoFile`.
    """
    return VideoFile(path)


def video_facts(path: Path) -> tuple[int, float]:
    """(number of frames, frames a second).

    Raises:
        DecodeError: as `VideoFile`.
    """
    video = VideoFile(path)
    try:
        return video.num_frames, video.rate
    finally:
        video.close()


def list_parts(path: Path) -> list[Part]:
    """`frame=i` for every frame."""
    return [Part(frame=frame) for frame in range(video_facts(path)[0])]
