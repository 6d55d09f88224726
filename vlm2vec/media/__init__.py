"""The one home of pictures and films: nothing outside this package opens a file of either.

    endings     which file names are pictures, which are films
    sources     where a picture may come from: files, bytes, arrays, undecoded rows of `datasets`, data: URIs, base64, URLs
    images      a picture as 8-bit RGB, or its size from its header: missing and damaged files, pixel limit, orientation,
                transparency, bit depth
    sampling    which frames of a film are taken, and in which order frame files stand
    films       frames of a film with their times: from a film file (PyAV), a folder of frames, or a list
    inline      a picture inside of an HTML page

What is decided here holds for encoding, evaluation, training and plans alike.
"""

from vlm2vec.media.films import Frames, read_frames
from vlm2vec.media.images import measure_picture, open_picture

__all__ = ["Frames", "measure_picture", "open_picture", "read_frames"]
