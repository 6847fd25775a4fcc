"""Features of texts while an editor is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...distributed import World
from ...progress import Progress
from ...retrieval.network import Network

TOGETHER = 2048  # texts encoded between two reports of progress


class Features:
    """Called with texts, gives their features, each computed once where the encoder stands still. Several processes
    encode a part each."""

    def __init__(self, net: Network, world: World, bf16: bool) -> None:
        self.net, self.world, self.bf16 = net, world, bf16
        self.learning = bool(net.learned)  # gradients flow into the encoder, and nothing can be kept
        self.places: dict[str, int] = {}
        self.table = torch.zeros(0)  # [n, F] fp16

    def precompute(self, texts: Sequence[str], progress: Progress | None) -> None:
        """Compute the features of these texts, once and for all."""
        parts = []
        for start in range(0, len(texts), TOGETHER):
            parts.append(self._encode(texts[start : start + TOGETHER]).half().cpu())
            if progress and self.world.is_main:
                progress(min(start + TOGETHER, len(texts)), len(texts), "encoding texts")
        self.places, self.table = {text: i for i, text in enumerate(texts)}, torch.cat(parts)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Features [n, F] fp32 of texts, computed ahead or not."""
        places = [self.places.get(text) for text in texts]
        new = [i for i, place in enumerate(places) if place is None]
        if len(new) == len(texts):
            return self._encode(texts)
        features = self.table[[place or 0 for place in places]].float().to(self.net.centre.device)
        if new:
            features[new] = self._encode([texts[i] for i in new])
        return features

    def _encode(self, texts: Sequence[str]) -> Tensor:
        own, device = self.world.part(texts), self.net.centre.device
        encode = torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)(self.net.features)
        encode = encode if self.learning else torch.no_grad()(encode)
        features = encode(own) if own else torch.zeros(0, self.net.inputs, device=device)
        return self.world.gathered(features.float(), len(texts))
