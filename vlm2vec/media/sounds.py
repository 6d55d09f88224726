"""Sounds: from files, bytes or waveforms to 16 kHz mono, cut at the head.

WAV files of whole-number samples are read by Python itself, everything else (and other rates) by PyAV, which `pip install av` brings.
"""

from __future__ import annotations

import io
import os
import wave
from dataclasses import dataclass
from typing import Any

import numpy as np

RATE = 16_000  # samples a second
MAX_SECONDS = 30.0  # what MMEB-V3's audio numbers were made with


@dataclass(frozen=True)
class Sound:
    """A part of a sound: `source` (a path or bytes) from `start` to `end`, in seconds; None is the sound's own beginning or end."""

    source: Any
    start: float | None = None
    end: float | None = None


def read_sound(source: Any, *, max_seconds: float | None = MAX_SECONDS) -> np.ndarray:
    """A sound as (n,) float32 in [-1, 1], 16 kHz, mono.

    Args:
        source: a path, bytes of a file, {"bytes":, "path":}, {"array":, "sampling_rate":}, a one-dimensional float array of 16 kHz, or a
            `Sound`, which is a part of one of these.
        max_seconds: what comes after it is cut off; None keeps everything. Of a `Sound` it counts from its start.

    Raises:
        ValueError: names the sound that cannot be read, or is empty.
    """
    part = source if isinstance(source, Sound) else Sound(source)
    name = sound_name(part.source)
    until = part.end if max_seconds is None else (part.start or 0.0) + max_seconds
    samples = _samples(part.source, name, until if part.end is None else min(part.end, until))
    first, last = (None if at is None else round(at * RATE) for at in (part.start, part.end))
    samples = samples[first:last]
    samples = samples if max_seconds is None else samples[: round(max_seconds * RATE)]
    if not len(samples):
        raise ValueError(f"sound {name}: no samples in it, or in the part from {part.start or 0:g} s")
    return np.ascontiguousarray(samples, dtype=np.float32)


def sound_name(source: Any) -> str:
    """What a message calls a sound."""
    if isinstance(source, Sound):
        return sound_name(source.source)
    if isinstance(source, dict) and source.get("path"):
        return str(source["path"])
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"of {type(source).__name__}"


def _samples(source: Any, name: str, until: float | None) -> np.ndarray:
    """All samples up to `until` seconds, at RATE."""
    if isinstance(source, dict):
        if source.get("array") is not None:
            return resampled(np.asarray(source["array"], dtype=np.float32), int(source.get("sampling_rate") or RATE), name)
        source = source.get("bytes") or source.get("path")
    if isinstance(source, np.ndarray):
        if source.ndim != 1 or source.dtype.kind != "f":
            raise ValueError(f"sound {name}: a waveform is (n,) floats of {RATE} Hz, got {source.dtype} of shape {source.shape}")
        return source.astype(np.float32)
    if not isinstance(source, (str, os.PathLike, bytes, bytearray)):
        raise ValueError(f"sound {name}: expected a path, bytes, a waveform or a dictionary of them")
    try:
        content = bytes(source) if isinstance(source, (bytes, bytearray)) else _content(source)
    except OSError as error:
        raise ValueError(f"sound {name}: cannot be read ({error.strerror})") from error
    try:
        samples, rate = read_wave(content, until)
    except (wave.Error, EOFError, ValueError):
        return _decoded(content, name, until)
    return samples if rate == RATE else _decoded(content, name, until)


def _content(path: str | os.PathLike) -> bytes:
    from vlm2vec.files.documents import require_regular

    require_regular(path)
    with open(path, "rb") as file:
        return file.read()


def read_wave(content: bytes, until: float | None = None) -> tuple[np.ndarray, int]:
    """((n,) float32 mono, samples a second) of a WAV file of 8, 16, 24 or 32 bit integers; wave.Error for any other file."""
    with wave.open(io.BytesIO(content)) as file:
        channels, width, rate, count = file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()
        if until is not None:
            count = min(count, int(np.ceil(until * rate)))
        raw = file.readframes(count)
    raw = raw[: len(raw) // (channels * width) * channels * width]
    if width == 1:
        samples = (np.frombuffer(raw, dtype=np.uint8).astype(np.float32) - 128) / 128
    elif width == 3:
        bytes_ = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 3)
        whole = np.zeros((len(bytes_), 4), dtype=np.uint8)
        whole[:, 1:] = bytes_
        samples = whole.view("<i4")[:, 0].astype(np.float32) / 2**31
    elif width in (2, 4):
        samples = np.frombuffer(raw, dtype=f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
    else:
        raise wave.Error(f"{width} bytes a sample")
    return samples.reshape(-1, channels).mean(axis=1, dtype=np.float32), rate


def resampled(samples: np.ndarray, rate: int, name: str) -> np.ndarray:
    """A mono waveform at RATE. ValueError without PyAV where the rate is another."""
    if rate == RATE:
        return samples
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    return _decoded(file.getvalue(), name, None)


def _decoded(content: bytes, name: str, until: float | None) -> np.ndarray:
    """Any file that FFmpeg reads, at RATE, mono."""
    try:
        import av
    except ImportError:
        raise ValueError(f"sound {name}: {RATE} Hz WAV files are read by themselves, others need PyAV; pip install av") from None
    parts, seconds = [], 0.0
    try:
        with av.open(io.BytesIO(content)) as file:
            if not file.streams.audio:
                raise ValueError(f"sound {name}: no sound in it")
            resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
            for frame in file.decode(file.streams.audio[0]):
                seconds += frame.samples / frame.sample_rate
                parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
                if until is not None and seconds > until + 1:
                    break
            parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"sound {name}: does not decode ({str(error)[:120]})") from error
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
