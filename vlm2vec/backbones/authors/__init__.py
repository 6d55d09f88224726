"""Published embedders, fed as their authors feed them (family option `feeding="authors"`; docs/feeding.md).

    films                 frames of a film and their times, by the rules of Qwen's own tools
    resizing              sizes and resizes of pictures and films, to the bit
    feeding               what the embedders share: the chat template, media in the text, limits
    truncation            cuts that keep the last token
    qwen3_vl_embedding    Qwen3-VL-Embedding
    wemm                  WeMM-Embedding

A `Processing` of this package needs of a model what `vlm2vec.packing.Features` holds: token ids, patches, grids, positions.
"""
