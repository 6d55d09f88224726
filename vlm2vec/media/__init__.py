"""The one home of pictures and films: nothing outside this package opens a file of either.

    endings     which file names are pictures, which are films
    images      a picture as RGB, or its size from its header: missing and damaged files, pixel limit, transparency, bit depth
    sampling    which frames of a film are taken, and in which order frame files stand
    films       frames of a film: from a film file (PyAV), a folder of frames, or a list
    inline      a picture inside of an HTML page

What is decided here holds for encoding, evaluation, training and plans alike: transparent pixels show what is stored under them
and pictures and films lie as they are stored, both as the reference reads them.
"""
