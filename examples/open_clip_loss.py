"""open_clip: `ClipLoss` swapped. The learnt logit scale gets its gradient; across ranks, pass the process group.

python examples/open_clip_loss.py
"""

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from contrastive_kernels import info_nce


class FusedClipLoss(torch.nn.Module):
    """Takes ClipLoss's place in open_clip's `create_loss`. `group`: where the batch is sharded over ranks."""

    def __init__(self, group=None):
        super().__init__()
        self.group = group

    def forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
        # a bias that all logits share leaves a softmax as it is
        loss = info_nce(image_features, text_features, temperature=1 / logit_scale, symmetric=True, group=self.group)
        return {"contrastive_loss": loss} if output_dict else loss


def run(loss_module):
    torch.manual_seed(0)
    image, text = torch.nn.Linear(48, 32), torch.nn.Linear(24, 32)
    log_scale = torch.nn.Parameter(torch.tensor(2.6593))
    features = F.normalize(image(torch.randn(20, 48)), dim=-1), F.normalize(text(torch.randn(20, 24)), dim=-1)
    loss = loss_module(*features, log_scale.exp(), output_dict=True)["contrastive_loss"]
    loss.backward()
    return {"loss": loss.detach(), "image": image.weight.grad, "text": text.weight.grad, "logit scale": log_scale.grad}


def before():
    return run(ClipLoss())


def after():
    return run(FusedClipLoss())


if __name__ == "__main__":
    one, other = before(), after()
    for name, value in other.items():
        print(f"{name:<12} largest difference {float((value - one[name]).abs().max()):.1e} of {float(value.abs().max()):.1e}")
