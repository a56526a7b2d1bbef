"""The sides of `cross_entropy.py`; as a script, one of them in a process of its own, whose peak memory is measured.

    python benchmarks/sides/cross_entropy_side.py SIDE DTYPE ROWS WIDTH VOCABULARY

Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F
from peak import peak_mib
from torch import Tensor

from mmctx.objectives.linear_cross_entropy import linear_cross_entropy


def has_bf16_products() -> bool:
    """Whether PyTorch has kernels for bf16 matrix products on this processor; without them it multiplies element by element."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Whole logits, widened as Transformers does."""
    if hidden.dtype == torch.bfloat16 and not has_bf16_products():
        # PyTorch's own product would take half an hour: this one has the same memory at its peak and is as fast as it can be.
        logits = F.linear(hidden.float(), weight.float()).bfloat16()
    else:
        logits = F.linear(hidden, weight)  # (N, V)
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def torchs_own(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's chunked loss (2.13 and newer), chunks as it chooses them."""
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=torch.nn.LinearCrossEntropyOptions())


SIDES = {"naive": naive, "torch": torchs_own, "ours": linear_cross_entropy}


def problem(dtype: torch.dtype, rows: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, D), a head (V, D) and labels (N,). Values are bf16 numbers in any type, so that all types have one right loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).bfloat16().to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * 2 / width**0.5).bfloat16().to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def main() -> None:
    side, dtype, *shape = sys.argv[1:]
    torch.set_num_threads(1)
    rows, width, vocabulary = map(int, shape)
    hidden, weight, labels = problem(getattr(torch, dtype), rows, width, vocabulary)
    SIDES[side](hidden[:2], weight[:64], labels[:2] % 64).backward()  # loads the kernels
    hidden.grad = weight.grad = None
    print(json.dumps({"peak_mib": peak_mib(lambda: SIDES[side](hidden, weight, labels).backward())}))


if __name__ == "__main__":
    main()
