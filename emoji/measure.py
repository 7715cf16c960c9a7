"""Measures whether a teacher draws what the prompt says (R@1 by emoji-clip), and whether it looks real (KID).

    python emoji/measure.py emoji/emoji-sd --state ~/.cache/prunet/emoji

Three rows of at least a thousand pictures each, all with one guidance scale, which is chosen on training pairs:

    training               (label, style) pairs that the teacher was trained on
    heldout-combinations   labels it knows, in styles that it never saw them in
    heldout-labels         labels it never saw

A picture is right if its own caption is the nearest of a thousand (cosine of emoji-clip's embeddings); the other
captions are pairs of the training split. The real pictures of the same pairs are the ceiling, the same pictures with
shuffled captions the floor. KID compares with those real pictures; its ceiling compares two halves of them.
Pictures that exist for the same weights and settings are not drawn again. On CPU cores they are drawn fastest with
one process per core and one thread each:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 emoji/measure.py emoji/emoji-sd
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from autoencoder import psnr_db
from export import SAMPLER, drawing
from PIL import Image
from shards import SPLITS, Sample, known_samples, read_split, stack_images
from state import pick_device, save_record
from torch import Tensor

from prunet import Teacher, processes
from prunet.evaluation.metrics import cosines, retrieved, squared_mmd
from prunet.evaluation.networks import Clip
from prunet.hashing import hash_of, json_hash
from prunet.intervals import Array
from prunet.sampling.samplers import SAMPLERS
from prunet.sampling.shards import draw_shards, read_shard

NUM_CAPTIONS = 1000
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
NUM_FOR_GUIDANCE = 160
ROWS = ("training", "heldout-combinations", "heldout-labels")

Make = Callable[[list[str], float], list[Image.Image]]


def candidate_captions(samples: list[Sample], train: list[Sample]) -> list[str]:
    """Returns a thousand different captions, first those of `samples`."""
    others = [sample.caption for sample in train]
    random.Random(0).shuffle(others)
    return list(dict.fromkeys([sample.caption for sample in samples] + others))[:NUM_CAPTIONS]


def weights_hash(folder: Path) -> str:
    """Returns the hash of all weights in a folder, which is stored with the measures."""
    return hash_of(file.read_bytes() for file in sorted(folder.rglob("*.safetensors")))


def pair_of(count: int, num_pairs: int) -> Tensor:
    """Returns the number of each picture's pair: all pairs in turn, until there are `count` pictures."""
    return torch.arange(max(count, num_pairs)) % num_pairs


@torch.no_grad()
def embed(network: Callable[[Sequence], Tensor], values: Sequence, batch_size: int = 100) -> Array:
    """Returns embeddings (N, D) of pictures or texts with length sqrt(D), which makes KID's kernel (cosine + 1)^3."""
    parts = [network(values[at : at + batch_size]) for at in range(0, len(values), batch_size)]
    features = torch.nn.functional.normalize(torch.cat(parts).double().cpu(), dim=1)
    return (features * features.shape[1] ** 0.5).numpy()


def measure_row(samples: list[Sample], train: list[Sample], scorer: Clip, make: Make, scale: float, count: int) -> dict:
    order = pair_of(count, len(samples))
    pictures = make([samples[i].caption for i in order], scale)
    ours, theirs = embed(scorer.images, pictures), embed(scorer.images, [sample.picture for sample in samples])
    captions = embed(scorer.texts, candidate_captions(samples, train))
    asked, own = captions[order], captions[: len(samples)]
    shuffled = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
    mixed = torch.randperm(len(theirs), generator=torch.Generator().manual_seed(0))
    half = len(theirs) // 2
    return {
        "pictures": len(pictures),
        "pairs": len(samples),
        "captions": len(captions),
        "r_at_1": retrieved(ours, asked, captions).mean(),
        "real_r_at_1": retrieved(theirs, own, captions).mean(),
        "shuffled_r_at_1": retrieved(ours, captions[shuffled], captions).mean(),
        "score": cosines(ours, asked).mean(),
        "real_score": cosines(theirs, own).mean(),
        "kid": squared_mmd(ours, theirs),
        "real_kid": squared_mmd(theirs[mixed[:half]], theirs[mixed[half:]]),
    }


def choose_guidance(samples: list[Sample], train: list[Sample], scorer: Clip, make: Make) -> dict[float, float]:
    """Returns R@1 by guidance scale on evenly spread training pairs."""
    picked = [samples[int(i * len(samples) / NUM_FOR_GUIDANCE)] for i in range(NUM_FOR_GUIDANCE)]
    captions = embed(scorer.texts, candidate_captions(picked, train))
    prompts = [sample.caption for sample in picked]
    found = {scale: embed(scorer.images, make(prompts, scale)) for scale in GUIDANCE_SCALES}
    own = captions[: len(picked)]
    return {scale: retrieved(images, own, captions).mean() for scale, images in found.items()}


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the pipeline; its settings are FOLDER.yaml")
    parser.add_argument("--data", type=Path, default=here / "data", help="folder of the shards (%(default)s)")
    parser.add_argument("--state", type=Path, default=Path.home() / ".cache/prunet/emoji", help="(%(default)s)")
    parser.add_argument("--pictures", type=int, default=1000, help="a row at least (%(default)s)")
    parser.add_argument("--guidance", type=float, help="take this scale instead of choosing one")
    args = parser.parse_args()
    if not (args.folder / "model_index.json").is_file() or not args.folder.with_suffix(".yaml").is_file():
        parser.error(
            f"{args.folder}: give the folder of a pipeline with its settings beside it, such as emoji/emoji-sd"
        )

    splits = {split: read_split(args.data, split) for split in SPLITS}
    rows = {
        "training": known_samples(args.data, "train"),
        "heldout-combinations": known_samples(args.data, "heldout-combinations"),
        "heldout-labels": splits["heldout-labels"],
    }
    device = pick_device()
    scorer, group = Clip.load(here / "emoji-clip", device), processes.join(device)
    settings = yaml.safe_load(args.folder.with_suffix(".yaml").read_text())["samples"]
    weights, teacher = weights_hash(args.folder), Teacher(args.folder, device=device)

    def make(prompts: list[str], scale: float) -> list[Image.Image]:
        """Draws with all processes; each returns all pictures. The folder's name is a hash of all inputs."""
        how = drawing({**settings, "guidance_scale": scale})
        folder = args.state / "drawn" / json_hash([prompts, str(how), weights])
        size = teacher.native_size
        paths = draw_shards(teacher.pipeline, prompts, folder, how, seed=0, size=size, batch_size=25)
        group.wait_for_everyone()
        return [picture for path in paths for picture, _ in read_shard(path)]

    measures: dict = {"weights": weights, "scorer": weights_hash(here / "emoji-clip")}
    measures |= {"steps": settings["num_inference_steps"], "sampler": SAMPLERS[SAMPLER].__name__}
    scale = args.guidance
    if scale is None:
        measures["r_at_1_by_guidance"] = choose_guidance(rows["training"], splits["train"], scorer, make)
        scale = max(measures["r_at_1_by_guidance"], key=measures["r_at_1_by_guidance"].get)
    measures["guidance_scale"] = scale
    print(json.dumps(measures), flush=True)
    heldout = stack_images(splits["heldout-combinations"] + splits["heldout-labels"])
    measures["psnr_db"], measures["psnr_pictures"] = psnr_db(teacher.vae, heldout), len(heldout)
    for name in ROWS:
        measures[name] = measure_row(rows[name], splits["train"], scorer, make, scale, args.pictures)
        print(name, json.dumps(measures[name], indent=2), flush=True)
    if processes.is_main():
        save_record(measures, args.folder / "measures.json")
    processes.leave()


if __name__ == "__main__":
    main()
