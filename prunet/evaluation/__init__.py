"""How near a student is to its teacher, and how good its pictures are, by protocols with intervals."""
