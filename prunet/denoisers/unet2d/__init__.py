"""diffusers' `UNet2DConditionModel`: in goes a config and what a plan removes, out come form and pairs."""
