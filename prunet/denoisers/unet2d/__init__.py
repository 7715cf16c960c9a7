"""diffusers' `UNet2DConditionModel`: its forms and pairs, from a config and the parts that a plan removes."""
