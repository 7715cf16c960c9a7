"""SHA-256 hashes in hexadecimal, and seeds made from them."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def hash_of(pieces: Iterable[bytes]) -> str:
    """Returns the hash of all pieces, one after the other."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Returns the hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(value: Any, **how: Any) -> str:
    """Returns 16 digits of the hash of a value as JSON. `how`: options of `json.dumps`."""
    return hash_of([json.dumps(value, **how).encode()])[:16]


def seed_of(*names: int | str) -> int:
    """Returns a seed of 56 bits from names, such as a picture's key and view; other names give an unrelated seed."""
    return int(hash_of([" ".join(map(str, names)).encode()])[:14], 16)
