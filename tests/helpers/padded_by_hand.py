"""Rows padded by hand and run through a packed model's own layers, with a 2-D mask and the library's own mask making."""

import torch


def padded_rows(model, inputs, side: str):
    """Hidden states (B, D) of the last tokens; None for a family that feeds its layers more than embeddings."""
    backbone, module = model.backbone, model.model
    text = backbone.text_model(module)
    with torch.no_grad():
        singles = [model.pack([f]) for f in model.preprocess(inputs)]
        features = [backbone.vision(module, p) for p in singles]
        if any(backbone.text_kwargs(module, p, f) for p, f in zip(singles, features)):
            return None
        embeds = [backbone.embed(module, p, f) for p, f in zip(singles, features)]
        length = max(len(e) for e in embeds)
        batch = torch.zeros(len(embeds), length, embeds[0].shape[-1])
        mask = torch.zeros(len(embeds), length, dtype=torch.long)
        axes = max(single.position_ids.dim() for single in singles)  # a text's positions may have one axis where a picture's have three
        positions = torch.zeros(*((3,) if axes == 2 else ()), len(embeds), length, dtype=torch.long)
        for i, (e, p) in enumerate(zip(embeds, singles)):
            real = slice(length - len(e), length) if side == "left" else slice(0, len(e))
            batch[i, real], mask[i, real], positions[..., i, real] = e, 1, p.position_ids
        hidden = text(inputs_embeds=batch, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    last = torch.full((len(embeds),), length - 1) if side == "left" else torch.tensor([len(e) - 1 for e in embeds])
    return hidden[torch.arange(len(embeds)), last]
