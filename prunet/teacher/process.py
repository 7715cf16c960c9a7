"""The diffusion process: how noise is added to latents, and what the denoiser learns to predict."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DDPM:
    """The process of SD v1, v2 and SDXL (arXiv 2006.11239); the denoiser predicts the noise or v.

    `alphas_cumprod` (T,): the picture's share of the variance at each of T timesteps.
    """

    alphas_cumprod: Tensor
    prediction_type: str  # "epsilon" or "v_prediction"

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def to(self, device: torch.device) -> "DDPM":
        """Returns the process with its tensor on `device`."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def random_timestep(self, generator: torch.Generator) -> Tensor:
        """Returns a uniformly random timestep, of shape ()."""
        return torch.randint(0, self.num_timesteps, (), generator=generator)

    def timestep_at(self, level: float) -> int:
        """Returns the timestep at a noise level from 0 to 1."""
        return int(level * self.num_timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Returns noisy latents (B, C, h, w) at `timestep` (B,)."""
        return add_noise(latents, noise, self.alphas_cumprod[timestep])

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Returns the correct output of the denoiser (B, C, h, w) at `timestep` (B,)."""
        return training_target(latents, noise, self.alphas_cumprod[timestep], self.prediction_type)

    def jump_time(self, jumps: int, number: int) -> int:
        """Returns the timestep where jump `number` begins, of `jumps` jumps from pure noise to the clean picture (-1).

        These are the timesteps of a "trailing" sampler (arXiv 2305.08891) if `jumps` divides the number of timesteps.
        """
        return self.num_timesteps - number * self.num_timesteps // jumps - 1

    def signal_and_noise(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Returns factors (B, 1, 1, 1) of picture and noise at `timestep` (B,); -1 is the clean picture."""
        kept = torch.where(timestep < 0, 1.0, self.alphas_cumprod[timestep.clamp(min=0)]).view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def clean(self, noisy: Tensor, output: Tensor, timestep: Tensor) -> Tensor:
        """Returns the clean picture (B, C, h, w) that follows from the denoiser's output."""
        signal, noise = self.signal_and_noise(timestep)
        if self.prediction_type == "epsilon":
            return (noisy - noise * output) / signal
        return signal * noisy - noise * output

    def clean_between(self, noisy: Tensor, landed: Tensor, timestep: Tensor, after: Tensor) -> Tensor:
        """Returns the clean picture with which a step of DDIM leads from `noisy` at `timestep` to `landed` at `after`.

        DDIM: arXiv 2010.02502, equation 12 without noise. Pictures are (B, C, h, w), timesteps (B,).
        """
        (signal, noise), (signal_after, noise_after) = self.signal_and_noise(timestep), self.signal_and_noise(after)
        ratio = noise_after / noise
        return (landed - ratio * noisy) / (signal_after - ratio * signal)

    def snr(self, timestep: Tensor) -> Tensor:
        """Returns the signal-to-noise ratio (B,) at `timestep` (B,)."""
        return self.alphas_cumprod[timestep] / (1 - self.alphas_cumprod[timestep])

    def min_snr_weight(self, timestep: Tensor, gamma: float) -> Tensor:
        """Returns the weights (B,) of the function `min_snr_weight`."""
        return min_snr_weight(self.alphas_cumprod[timestep], gamma, self.prediction_type)


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps (DDPM, equation 4). Latents (B, C, h, w), `alpha_bar` (B,)."""
    abar = alpha_bar.view(-1, 1, 1, 1)
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise


def training_target(latents: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The correct output: the noise, or v = sqrt(abar) eps - sqrt(1 - abar) x_0 (arXiv 2202.00512)."""
    if prediction_type == "epsilon":
        return noise
    abar = alpha_bar.view(-1, 1, 1, 1)
    return abar.sqrt() * noise - (1 - abar).sqrt() * latents


def min_snr_weight(alpha_bar: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """min(SNR, gamma) / SNR, for v-prediction / (SNR + 1) (arXiv 2303.09556, section 3.4). (B,) to (B,)."""
    snr = alpha_bar / (1 - alpha_bar)
    clipped = snr.clamp(max=gamma)
    # In the epsilon form SNR = 0 (zero terminal SNR) gives 1, not 0 / 0.
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return torch.where(snr > gamma, gamma / snr.clamp(min=1e-12), torch.ones_like(snr))
