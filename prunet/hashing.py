"""Seeds that are hashes of names."""

import hashlib


def seed_of(*names: int | str) -> int:
    """Returns a seed of 56 bits for what has these names, such as a picture's key and view; seeds are unrelated."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, names)).encode()).digest()[:7], "big")
