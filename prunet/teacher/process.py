"""The diffusion process: how noise is added to latents, and what the denoiser learns to say about them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DDPM:
    """The process of SD v1, v2 and SDXL (arXiv 2006.11239), of which the denoiser predicts the noise or v.

    `alphas_cumprod` (T,): what is left of the picture's variance at each of T timesteps.
    """

    alphas_cumprod: Tensor
    prediction_type: str  # "epsilon" or "v_prediction"

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device) -> "DDPM":
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def random_timestep(self, generator: torch.Generator) -> Tensor:
        """(), uniform."""
        return torch.randint(0, self.num_timesteps, (), generator=generator)

    def timestep_at(self, level: float) -> int:
        """The timestep at a noise level from 0 to 1."""
        return int(level * self.num_timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Latents (B, C, h, w) at `timestep` (B,)."""
        return add_noise(latents, noise, self.alphas_cumprod[timestep])

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the denoiser should say (B, C, h, w)."""
        return training_target(latents, noise, self.alphas_cumprod[timestep], self.prediction_type)

    def min_snr_weight(self, timestep: Tensor, gamma: float) -> Tensor:
        """(B,)"""
        return min_snr_weight(self.alphas_cumprod[timestep], gamma, self.prediction_type)


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps (DDPM, equation 4). Latents (B, C, h, w), `alpha_bar` (B,)."""
    abar = alpha_bar.view(-1, 1, 1, 1)
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise


def training_target(latents: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """What the denoiser should say: the noise, or v = sqrt(abar) eps - sqrt(1 - abar) x_0 (arXiv 2202.00512)."""
    if prediction_type == "epsilon":
        return noise
    abar = alpha_bar.view(-1, 1, 1, 1)
    return abar.sqrt() * noise - (1 - abar).sqrt() * latents


def min_snr_weight(alpha_bar: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """min(SNR, gamma) / SNR, for v-prediction / (SNR + 1) (arXiv 2303.09556, section 3.4). (B,) to (B,)."""
    snr = alpha_bar / (1 - alpha_bar)
    clipped = snr.clamp(max=gamma)
    # The epsilon form is written over abar so that SNR = 0 (zero terminal SNR) gives 1 and not 0 / 0.
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return torch.where(snr > gamma, gamma / snr.clamp(min=1e-12), torch.ones_like(snr))
