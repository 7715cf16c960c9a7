"""The teacher's adapters on its student. In: a LoRA, an IP-Adapter or a ControlNet. Out: one that fits the student."""
