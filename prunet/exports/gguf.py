"""Tensors of a single file as GGUF, with the weights of matrices in 8 or 4 bits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from prunet.extras import need

#: GGML's types of matrices: blocks of 32 weights with a scale of 16 bits, so 8.5 and 4.5 bits per weight.
Bits = Literal["q8_0", "q4_0"]
BLOCK = 32
#: stable-diffusion.cpp leaves these as they are when it quantises by itself.
KEPT = ("time_embed.", "label_emb.", "embedding", "positional_")


def write_gguf(tensors: Mapping[str, Tensor], path: Path, bits: Bits) -> None:
    """Writes tensors by name: matrices in `bits`, convolutions and embeddings in 16 bits, vectors in 32."""
    gguf = need("gguf", "gguf", "--gguf")
    writer = gguf.GGUFWriter(path, arch="sd")
    kinds = gguf.GGMLQuantizationType
    for name, tensor in tensors.items():
        if not tensor.numel():  # a mark without contents
            tensor = tensor.new_zeros(1)
        kind = kinds.F32 if tensor.ndim < 2 else kinds.F16
        if tensor.ndim == 2 and tensor.shape[-1] % BLOCK == 0 and not any(word in name for word in KEPT):
            kind = kinds[bits.upper()]
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
