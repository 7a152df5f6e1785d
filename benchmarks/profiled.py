"""One inference of B0 at batch 64, bf16 autocast: `make gpu` reads hardware counters of it."""

from __future__ import annotations

import torch

import effnet_fast

if __name__ == "__main__":
    model = effnet_fast.efficientnet_b0().cuda().eval().to(memory_format=torch.channels_last)
    x = torch.randn(64, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        model(x)
    torch.cuda.synchronize()
