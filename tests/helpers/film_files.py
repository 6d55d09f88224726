"""Small films for tests: drawn frame by frame, with headers that can be made to lie."""

from fractions import Fraction

import numpy as np
from PIL import Image


def shade(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A frame that tells its number by its brightness: four steps of grey for each."""
    return Image.new("RGB", size, (4 * number,) * 3)


def number_of(frame: Image.Image) -> int:
    """The number of a frame that `shade` drew, after a lossy codec."""
    return round(float(np.asarray(frame.convert("L")).mean()) / 4)


def write_film(path, frames: list, *, rate: int | Fraction = 4, gop: int = 1, times: list[int] | None = None, codec: str = "mpeg4"):
    """A film of these frames; `times` are their time stamps in units of 1 / rate, else 0, 1, 2, ..."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.bit_rate = 4_000_000
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            frame.time_base = Fraction(1) / Fraction(rate)
            frame.pts = number if times is None else times[number]
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def cut_without_encoding(source, path, first: int):
    """The film from frame `first` on, packets copied as they are: all of them stay in the file, and an edit list hides the first."""
    import av

    with av.open(str(source)) as film, av.open(str(path), "w") as out:
        stream = film.streams.video[0]
        copy = out.add_stream_from_template(stream)
        packets = [packet for packet in film.demux(stream) if packet.pts is not None]
        start = packets[first].pts
        for packet in packets:
            packet.pts -= start
            packet.dts -= start
            packet.stream = copy
            out.mux(packet)
    return path


def turn(path, quarter_turns: int):
    """Write a rotation into an mp4's track header: players turn the film clockwise by so many quarters."""
    matrix = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][quarter_turns % 4]
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes of times, ids and volumes stand before the matrix
    for place, value in zip((0, 4, 12, 16), matrix):
        data[at + place : at + place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(bytes(data))
    return path
