"""Peak of live bytes of a real run, to hold plans against."""

import torch

from train.build import build_model
from train.plan.batch import first_batch
from train.plan.live_bytes import LiveBytes
from train.step import ContrastiveStep


def measured(recipe) -> int:
    """Peak of live bytes in the second step of a run."""
    model = build_model(recipe).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))
    batches = [first_batch(recipe, model.processing, 1) for _ in range(2)]
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        for batch in batches:
            live.restart_peak()
            step(batch)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return live.peak
