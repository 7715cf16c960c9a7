"""The condition: the inputs that tell the denoiser what to draw."""

import torch
from torch import Tensor

#: Tensors that stay in fp32, because half precision cannot represent their numbers.
EXACT = frozenset({"time_ids", "guidance_scale"})


class Condition(dict[str, Tensor]):
    """Named tensors with one row for each sample, or for one sample without that dimension.

    `prompt_embeds` (B, T, D); for SDXL `pooled` (B, P) and `time_ids` (B, 6): original height and width, crop top and
    left, target height and width, in pixels (micro-conditioning, arXiv 2307.01952, section 2.2). Only for
    denoisers that take the guidance scale as an input: `guidance_scale` (B,).
    """

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> "Condition":
        """Returns the condition on `device`, and in `dtype` if given, except for tensors in `EXACT`."""
        kinds = {name: tensor.dtype if name in EXACT else dtype or tensor.dtype for name, tensor in self.items()}
        return Condition({n: t.to(device, kinds[n], non_blocking=non_blocking) for n, t in self.items()})

    def without_prompt(self, empty: "Condition") -> "Condition":
        """Returns the condition with the empty prompt (one row) for each sample; sizes stay."""
        same = {name: row.to(self[name]).expand_as(self[name]) for name, row in empty.items()}
        return Condition({**self, **same})

    def row(self, number: int) -> "Condition":
        """Returns the condition of one sample."""
        return Condition({name: tensor[number] for name, tensor in self.items()})
