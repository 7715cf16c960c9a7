"""The distance of a student from its teacher, and the quality of its pictures by protocols, with intervals."""
