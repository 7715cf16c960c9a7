"""What tells the denoiser what to draw."""

import torch
from torch import Tensor

#: Numbers that half precision cannot hold (sizes in pixels) stay in fp32.
EXACT = frozenset({"time_ids"})


class Condition(dict[str, Tensor]):
    """Named tensors with one row for each sample, or for one sample without that dimension.

    `prompt_embeds` (B, T, D); for SDXL `pooled` (B, P) and `time_ids` (B, 6): original height and width, crop top and
    left, target height and width, in pixels (micro-conditioning, arXiv 2307.01952, section 2.2).
    """

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> "Condition":
        """On `device`; in `dtype` if one is given, but for what needs full precision."""
        kinds = {name: tensor.dtype if name in EXACT else dtype or tensor.dtype for name, tensor in self.items()}
        return Condition({n: t.to(device, kinds[n], non_blocking=non_blocking) for n, t in self.items()})

    def without_prompt(self, empty: "Condition") -> "Condition":
        """The same with the empty prompt's one row for each sample; sizes stay."""
        same = {name: row.to(self[name]).expand_as(self[name]) for name, row in empty.items()}
        return Condition({**self, **same})

    def row(self, number: int) -> "Condition":
        """That of one sample."""
        return Condition({name: tensor[number] for name, tensor in self.items()})
