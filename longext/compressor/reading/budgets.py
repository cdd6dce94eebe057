"""How many keys each layer and head keeps: the same for all, fewer in later layers, or as heads need them.

Shape legend: B texts, H KV heads, n keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SHAPES = ("ada", "pyramid")
SAFEGUARD = 0.2  # of the even share, kept by every head (AdaKV)
STEEPNESS = 20  # the last layer's budget is the first one's over this much (PyramidKV's beta)


@dataclass(frozen=True)
class Budget:
    """Keys that stay.

    Attributes:
        slots: of a head, on average over layers, `newest` left out.
        ratio: one key stays of so many tokens read; 0 if `slots` says.
        most: slots at most, whatever the ratio is.
        num_layers: of the model.
        newest: slots more of every head, for the newest tokens.
        shape: "even", "pyramid" (falls linearly over the layers; PyramidKV, arXiv 2406.02069) or "ada" (the best scores
            of all heads of a layer; AdaKV, arXiv 2407.11550).
    """

    slots: int
    ratio: int
    most: int
    num_layers: int
    shape: str = "even"
    newest: int = 0

    def at(self, num_read: int) -> int:
        """Return the slots of a head, the mean of the layers, after so many tokens."""
        wanted = -(-num_read // self.ratio) if self.ratio else self.slots
        return min(wanted + self.newest, self.most)

    def of_layer(self, layer: int, num_read: int) -> int:
        """Return the slots of a head of one layer."""
        mean = self.at(num_read)
        if self.shape != "pyramid" or self.num_layers == 1:
            return mean
        first, last = self.largest(mean), 2 * mean - self.largest(mean)
        return round(first - (first - last) * layer / (self.num_layers - 1))

    def largest(self, mean: int) -> int:
        """Return the slots of a head in the largest layer."""
        if self.shape != "pyramid":
            return mean
        chosen = mean - self.newest
        return min(mean + chosen - max(1, chosen // STEEPNESS), self.most)

    def choose(self, scores: torch.Tensor, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (int64 [B, H, m], the keys that stay in the text's order; bool [B, H, m], False where none is there).

        Heads that keep fewer than others are padded at their front.

        Args:
            scores: [B, H, n]; inf for what always stays, -inf for nothing.
            budget: of a head.
        """
        total = scores.shape[-1]
        stays = torch.zeros_like(scores, dtype=torch.bool)
        if self.shape == "ada":
            safe = min(total, int(SAFEGUARD * budget))
            best = scores.scatter(-1, scores.topk(safe, -1).indices, torch.inf) if safe else scores
            chosen = best.masked_fill(scores == -torch.inf, -torch.inf).flatten(1)
            most = min(chosen.shape[-1], budget * scores.shape[1])
            stays = stays.flatten(1).scatter(-1, chosen.topk(most, -1).indices, True).view_as(scores)
        else:
            stays = stays.scatter(-1, scores.topk(min(total, budget), -1).indices, True)
        stays &= scores != -torch.inf
        width = int(stays.sum(-1).max())
        places = torch.arange(total, device=scores.device)
        index = places.where(stays, places.new_tensor(-1)).sort(-1).values[..., total - width :]
        return index.clamp(min=0), index >= 0
