"""Denoisers: their parts, which of these a plan can remove, and their features."""

from prunet.torchvision_ops import declare_torchvision_ops

declare_torchvision_ops()  # before diffusers is imported; this room imports it first
