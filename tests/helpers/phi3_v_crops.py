"""Phi-3.5-V's views of one picture, as its backbone makes them of a batch."""

from vlm2vec.backbones.phi3_v.images import CLIP_MEAN, CLIP_STD, image_tiles, normalised_views, padded_size


def image_crops(image, num_crops, crop=336):
    """The (1 + h*w, 3, crop, crop) normalised views of an RGB picture, and its padded (height, width)."""
    width, height = padded_size(*image.size, num_crops, crop)
    views = normalised_views(image_tiles(image, num_crops, crop), [(height // crop, width // crop)], CLIP_MEAN, CLIP_STD)
    return views, (height, width)
