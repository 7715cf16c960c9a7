"""Networks that turn pictures into features: Inception v3 (torch-fidelity), CLIP (transformers, open_clip) and DINO.

Each is called with pictures and their prompts (None for real pictures), returns named features, and has a `hash` of its
weights, which every result contains.
"""

import importlib
import importlib.util
import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prunet import hashing
from prunet.errors import UserError
from prunet.sampling.pictures import encode
from prunet.teacher.pickles import read_tensors
from prunet.teacher.placing import is_finite
from prunet.teacher.teacher import open_tokenizer
from prunet.torchvision_ops import declare_torchvision_ops

Features = dict[str, Tensor]
INCEPTION_SOURCE = (
    "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release v0.2.0 (pytorch-fid's "
    "pt_inception-2015-12-05-6726825d.pth has the same weights)"
)


@dataclass
class Inception:
    """Inception v3: `pool` (N, 2048) for FID, KID, precision and recall; `logits` (N, 1008) for the Inception score.

    `preprocessing`: how pictures are resized to 299 px for `pool`, as in TensorFlow 1 (torch-fidelity) or as in
    pytorch-fid. For `logits` they are always resized as in torch-fidelity, which defines the Inception score.
    """

    net: nn.Module
    preprocessing: Literal["torch-fidelity", "pytorch-fid"]
    hash: str
    device: torch.device

    @classmethod
    def load(
        cls, weights: Path, preprocessing: Any = "torch-fidelity", device: str | torch.device = "cpu"
    ) -> "Inception":
        """Loads weights from a .pth (opened without unpickling code) or .safetensors.

        Raises:
            UserError: torch-fidelity is not installed, or the file does not hold these weights.
        """
        extractor = torch_fidelity("feature_extractor_inceptionv3")
        state = read_weights("inception", weights, INCEPTION_SOURCE)
        # torch-fidelity unpickles its file, so it gets a file that was written here.
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, Path(folder) / "weights.pth")
            try:
                net = extractor.FeatureExtractorInceptionV3(
                    "inception-v3-compat",
                    ["2048", "logits_unbiased"],
                    feature_extractor_weights_path=str(Path(folder) / "weights.pth"),
                )
            except (RuntimeError, AttributeError, TypeError) as error:
                raise UserError(
                    f"{weights}: not the weights of the Inception network: take {INCEPTION_SOURCE}"
                ) from error
        return cls(net.to(device).eval(), preprocessing, file_hash(weights), torch.device(device))

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str] | None = None) -> Features:
        """Returns `pool` and `logits` of pictures; prompts are not used."""
        if len({picture.size for picture in pictures}) > 1:
            parts = [self([picture]) for picture in pictures]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        pixels = pixels_of(pictures).to(self.device)
        pool, logits = self.net(pixels)
        if self.preprocessing == "pytorch-fid":
            module = torch_fidelity("feature_extractor_inceptionv3")
            with instead(module, "interpolate_bilinear_2d_like_tensorflow1x", _resize_like_pytorch_fid):
                pool, _ = self.net(pixels)
        return {"pool": pool.cpu(), "logits": logits.cpu()}


@contextmanager
def instead(module: Any, name: str, value: Any) -> Iterator[None]:
    """Replaces `name` in `module` by `value` inside `with`: torch-fidelity has no option for weights or resizing."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _resize_like_pytorch_fid(pixels: Tensor, size: tuple[int, int], **_: Any) -> Tensor:
    """Resizes to (B, 3, 299, 299), scaled so that the following (x - 128) / 128 equals pytorch-fid's 2 x / 255 - 1."""
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False) * (256 / 255)


@dataclass
class Clip:
    """CLIP: embeddings `image` (N, D) of pictures and `text` (N, D) of prompts, not normalised."""

    images: Any
    texts: Any
    hash: str

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> "Clip":
        """Loads a transformers folder of a CLIPModel with its tokenizer and preprocessor.

        Raises:
            UserError: not such a folder, or weights that are missing or not finite.
        """
        from transformers import CLIPModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        net, processor = _open(folder, CLIPModel, CLIPImageProcessorPil)
        net, tokenizer = net.to(device).float().eval(), open_tokenizer(folder)

        def images(pictures: Sequence[Image.Image]) -> Tensor:
            pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
            return _tensor(net.get_image_features(pixel_values=pixels.to(device)))

        def texts(prompts: Sequence[str]) -> Tensor:
            tokens = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
            return _tensor(net.get_text_features(input_ids=tokens["input_ids"].to(device)))

        return cls(images, texts, _folder_hash(folder))

    @classmethod
    def load_open_clip(cls, name: str, weights: Path, device: str | torch.device = "cpu") -> "Clip":
        """Loads an open_clip model by name, with weights from a file.

        Raises:
            UserError: open_clip is not installed, or the file does not fit.
        """
        try:
            import open_clip
        except ImportError as error:
            raise UserError("CLIP score needs open_clip, which is not installed: pip install 'prunet[eval]'") from error
        if not weights.is_file():
            raise UserError(f"--weights clip={weights}: no such file")
        try:
            net, _, process = open_clip.create_model_and_transforms(name, pretrained=str(weights), device=device)
        except Exception as error:
            raise UserError(f"{weights}: not the weights of open_clip's {name} ({_first_line(error)})") from error
        net, tokenizer = net.float().eval(), open_clip.get_tokenizer(name)
        return cls(
            lambda pictures: net.encode_image(torch.stack([process(p) for p in pictures]).to(device)),
            lambda prompts: net.encode_text(tokenizer(list(prompts)).to(device)),
            file_hash(weights),
        )

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str] | None = None) -> Features:
        """Returns `image` of pictures and, if there are prompts, their `text`."""
        found = {"image": self.images(pictures).float().cpu()}
        return found if prompts is None else found | {"text": self.texts(prompts).float().cpu()}


@dataclass
class Dino:
    """DINO's vision transformer (arXiv 2104.14294): `image` (N, D), the output of its class token."""

    net: Any
    process: Any
    hash: str
    device: torch.device

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> "Dino":
        """Loads a transformers folder of a ViTModel with its preprocessor.

        Raises:
            UserError: not such a folder, or weights that are missing or not finite.
        """
        from transformers import ViTModel
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        net, processor = _open(folder, ViTModel, ViTImageProcessorPil, add_pooling_layer=False)
        return cls(net.to(device).float().eval(), processor, _folder_hash(folder), torch.device(device))

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str] | None = None) -> Features:
        """Returns `image` of pictures; prompts are not used."""
        pixels = self.process(images=[p.convert("RGB") for p in pictures], return_tensors="pt")["pixel_values"]
        return {"image": self.net(pixel_values=pixels.to(self.device)).last_hidden_state[:, 0].float().cpu()}


def _open(folder: Path, kind: Any, processor: Any, **options: Any) -> tuple[Any, Any]:
    """Opens a transformers folder with a model of the class `kind` and its image processor.

    Raises:
        UserError: not such a folder, or weights that are missing or not finite.
    """
    weights, what = folder / "model.safetensors", kind.__name__
    if not weights.is_file():
        raise UserError(f"{folder}: no {what} there (model.safetensors): give a transformers folder of one")
    try:
        net, info = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
        images = processor.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{folder}: not a {what} of transformers ({_first_line(error)})") from error
    if made_up := sorted(info["missing_keys"]):
        raise UserError(f"{weights} has no {made_up[0]}, which a {what} needs: fetch or copy it again")
    if bad := next((name for name, tensor in net.state_dict().items() if not is_finite(tensor)), None):
        raise UserError(f"{weights}: {bad} has NaN or infinity in it: fetch or copy it again")
    return net, images


def _folder_hash(folder: Path) -> str:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".safetensors") and p.is_file())
    return hashing.hash_of(file_hash(file).encode() for file in files)[:16]


def torch_fidelity(module: str) -> Any:
    """Imports a module of torch-fidelity.

    Raises:
        UserError: not installed.
    """
    try:
        declare_torchvision_ops()
        return importlib.import_module(f"torch_fidelity.{module}")
    except ImportError as error:
        raise UserError("Inception and LPIPS need torch-fidelity: pip install 'prunet[eval]'") from error


def read_weights(name: str, path: Path, source: str) -> dict[str, Tensor]:
    """Reads the tensors in a .pth (opened without unpickling code) or .safetensors; messages name `source`.

    Raises:
        UserError: missing, or not readable.
    """
    if not path.is_file():
        raise UserError(f"--weights {name}={path}: no such file: take {source}")
    try:
        return load_file(path) if path.suffix == ".safetensors" else read_tensors(path)[0]
    except (UserError, SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable as weights: take {source}") from error


def pixels_of(pictures: Sequence[Image.Image]) -> Tensor:
    """Returns the pixels (B, 3, H, W) of pictures of one size, 0 to 255."""
    return torch.stack([torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1) for p in pictures])


def _tensor(output: Any) -> Tensor:
    """Returns the tensor of an output, which transformers 5 wraps in an object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def file_hash(path: Path) -> str:
    """Returns the first 16 digits of a file's SHA-256."""
    return hashing.file_hash(path)[:16]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def prepared(picture: Image.Image, side: int | None, resample: str, jpeg: int | None) -> Image.Image:
    """Prepares a picture for measuring: resizes it to a square without cropping, then stores it as JPEG if asked."""
    if side is None:
        return picture
    picture = picture.convert("RGB").resize((side, side), Image.Resampling[resample.upper()])
    if jpeg is None:
        return picture
    return Image.open(io.BytesIO(encode(picture, jpeg)), formats=("JPEG",)).convert("RGB")
