"""The teacher's adapters on its student: in goes a LoRA, an IP-Adapter or a ControlNet, out comes one that fits."""
