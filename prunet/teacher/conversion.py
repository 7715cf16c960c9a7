"""Writes the tensors of a pickled checkpoint as safetensors."""

import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from prunet.disk.files import check_writable, new_file
from prunet.errors import UserError
from prunet.teacher.pickles import PICKLES, read_tensors


def convert(path: Path | str, output: Path | str | None = None) -> dict[str, Any]:
    """Writes the tensors of a pickled checkpoint as `.safetensors`; code in the pickle does not run.

    Args:
        path: a file of `torch.save`: tensors by name, or a mapping with these as its `state_dict`.
        output: the new file, which must not exist; by default `path` with the ending `.safetensors`.

    Returns:
        The `output`, the number of `tensors`, their `bytes`, and the names of everything that was `dropped`.

    Raises:
        UserError: the file is missing, damaged, not a pickle of PyTorch, or has no tensors that safetensors can store.
    """
    path = Path(path)
    name = path.stem if path.suffix in PICKLES else path.name  # `model-v1.5` has no ending
    output = path.with_name(f"{name}.safetensors") if output is None else Path(output)
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: not the name of the new file: give NAME.safetensors")
    if os.path.lexists(output):  # also true for a broken link
        raise UserError(f"{output}: exists; delete it first, or give another --output")
    check_writable(output.parent, "--output")
    tensors, dropped = read_tensors(path)
    with new_file(output) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    return {"output": str(output), "tensors": len(tensors), "bytes": size, "dropped": dropped}
