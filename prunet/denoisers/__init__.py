"""What a denoiser is made of, what of it can go, and how its features are caught."""

from prunet.torchvision_ops import declare_torchvision_ops

declare_torchvision_ops()  # before diffusers is imported, which happens in this room first
