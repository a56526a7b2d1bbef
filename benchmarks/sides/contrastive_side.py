"""The sides of `contrastive.py`; as a script, one of them in a process of its own, whose peak memory is measured.

python benchmarks/sides/contrastive_side.py SIDE LOSS PAIRS CHANNELS
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F
from peak import peak_mib
from torch import Tensor

from mmctx.objectives.contrast import Partners, info_nce, pairwise_sigmoid


def theirs(loss: str, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's mean loss."""
    from open_clip.loss import ClipLoss, SigLipLoss

    return ClipLoss()(a, b, scale) if loss == "softmax" else SigLipLoss()(a, b, scale, bias)


def ours(loss: str, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The same."""
    every = torch.ones(len(a), dtype=torch.bool)
    partners = Partners(torch.arange(len(a)), every, every)
    if loss == "softmax":
        return info_nce(a, b, scale, partners) / (2 * len(a))
    return pairwise_sigmoid(a, b, scale, bias, partners) / len(a)


SIDES = {"open_clip": theirs, "ours": ours}


def problem(loss: str, pairs: int, channels: int) -> list[Tensor]:
    """Unit embeddings (B, E) that resemble their partners, the scale and the bias that training would start from."""
    torch.manual_seed(0)
    a = F.normalize(torch.randn(pairs, channels), dim=-1)
    b = F.normalize(a + 0.1 * torch.randn(pairs, channels), dim=-1)
    scale = torch.tensor([1 / 0.07 if loss == "softmax" else 10.0])
    return [tensor.requires_grad_() for tensor in (a, b, scale, torch.tensor([-10.0]))]


def main() -> None:
    side, loss, pairs, channels = sys.argv[1:]
    torch.set_num_threads(1)
    SIDES[side](loss, *problem(loss, 8, int(channels))).backward()  # loads the kernels
    tensors = problem(loss, int(pairs), int(channels))
    print(json.dumps({"peak_mib": peak_mib(lambda: SIDES[side](loss, *tensors).backward())}))


if __name__ == "__main__":
    main()
