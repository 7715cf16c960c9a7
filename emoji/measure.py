"""Measure a teacher: does it draw what the prompt says (R@1 by emoji-clip), and do its pictures look real (KID)?

    python emoji/measure.py emoji/emoji-sd --state ~/.cache/prunet/emoji

Three rows of at least a thousand pictures each, all with one guidance scale, which is chosen on training pairs:

    training               (label, style) pairs that the teacher was trained on
    heldout-combinations   labels it knows, in styles that it never saw them in
    heldout-labels         labels it never saw

A picture is right if its own caption is the nearest of a thousand (cosine of emoji-clip's embeddings); the other
captions are pairs of the training split. The real pictures of the same pairs are the ceiling, the same pictures with
shuffled captions the floor. KID is against those real pictures, and for the ceiling, between two halves of them.
Pictures already drawn with the same weights and settings are not drawn again.
"""

import argparse
import hashlib
import json
import os
import random
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import yaml
from autoencoder import psnr_db
from diffusers import DiffusionPipeline
from export import SAMPLER, draw, load_for_drawing
from PIL import Image
from rich.progress import track
from score import Scorer, kid, retrieval_at_1
from shards import SPLITS, Sample, known_samples, read_split, stack_images
from state import atomic_save, save_record
from torch import Tensor

from prunet.sampling.samplers import SAMPLERS

NUM_CAPTIONS = 1000
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
NUM_FOR_GUIDANCE = 160
ROWS = ("training", "heldout-combinations", "heldout-labels")


def candidate_captions(samples: list[Sample], train: list[Sample]) -> list[str]:
    """A thousand different captions; those of `samples` come first."""
    others = [sample.caption for sample in train]
    random.Random(0).shuffle(others)
    return list(dict.fromkeys([sample.caption for sample in samples] + others))[:NUM_CAPTIONS]


def weights_hash(folder: Path) -> str:
    """Of all weights in a folder: measures say which ones they are of."""
    files = sorted(folder.rglob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def pair_of(count: int, num_pairs: int) -> Tensor:
    """Which pair the i-th picture shows: all of them in turn, until there are `count` pictures."""
    return torch.arange(max(count, num_pairs)) % num_pairs


def to_tensor(images: Iterable[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)


# --- drawing, in several processes of one thread each: on a CPU that is faster than one process of several threads

CHUNK = 64


_pipe: DiffusionPipeline


def _start_worker(folder: Path) -> None:
    global _pipe
    torch.set_num_threads(1)
    _pipe = load_for_drawing(folder)


def _draw_chunk(prompts: list[str], settings: dict, first_seed: int, path: Path) -> None:
    atomic_save(to_tensor(draw(_pipe, prompts, settings, first_seed)), path)


def drawn(pool: Executor, prompts: list[str], settings: dict, cache: Path, weights: str) -> Tensor:
    """(N, 3, 128, 128) uint8; each chunk is kept in `cache` under the name of all that it depends on."""
    paths, work = [], []
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        name = hashlib.sha256(json.dumps([chunk, settings, start, weights]).encode()).hexdigest()[:16]
        paths.append(cache / f"{name}.pt")
        if not paths[-1].exists():
            work.append(pool.submit(_draw_chunk, chunk, settings, start, paths[-1]))
    for done in track(as_completed(work), total=len(work), description=f"drawing {len(prompts)} pictures"):
        done.result()
    return torch.cat([torch.load(path, weights_only=True) for path in paths])


def measure_row(samples: list[Sample], train: list[Sample], scorer: Scorer, make, count: int) -> dict:
    order = pair_of(count, len(samples))
    pictures, real = make([samples[i].caption for i in order]), stack_images(samples)
    ours, theirs = scorer.embed_images(pictures), scorer.embed_images(real)
    captions = scorer.embed_texts(candidate_captions(samples, train))
    shuffled = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
    mixed = torch.randperm(len(theirs), generator=torch.Generator().manual_seed(0))
    half = len(theirs) // 2
    return {
        "pictures": len(pictures),
        "pairs": len(samples),
        "captions": len(captions),
        "r_at_1": retrieval_at_1(ours, captions, order),
        "real_r_at_1": retrieval_at_1(theirs, captions),
        "shuffled_r_at_1": retrieval_at_1(ours, captions, shuffled),
        "score": (ours * captions[order]).sum(1).mean().item(),
        "real_score": (theirs * captions[: len(theirs)]).sum(1).mean().item(),
        "kid": kid(ours, theirs),
        "real_kid": kid(theirs[mixed[:half]], theirs[mixed[half:]]),
    }


def choose_guidance(samples: list[Sample], train: list[Sample], scorer: Scorer, make) -> dict[float, float]:
    """R@1 by guidance scale on training pairs, evenly spread."""
    picked = [samples[int(i * len(samples) / NUM_FOR_GUIDANCE)] for i in range(NUM_FOR_GUIDANCE)]
    captions = scorer.embed_texts(candidate_captions(picked, train))
    prompts = [sample.caption for sample in picked]
    return {scale: retrieval_at_1(scorer.embed_images(make(prompts, scale)), captions) for scale in GUIDANCE_SCALES}


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
    scorer = Scorer.load(here / "emoji-clip")
    processes = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (args.folder,))
    settings = yaml.safe_load(args.folder.with_suffix(".yaml").read_text())["samples"]
    weights = weights_hash(args.folder)

    def make(prompts: list[str], scale: float) -> Tensor:
        return drawn(pool, prompts, {**settings, "guidance_scale": scale}, args.state / "drawn", weights)

    measures: dict = {"weights": weights, "scorer": weights_hash(here / "emoji-clip")}
    measures |= {"steps": settings["num_inference_steps"], "sampler": SAMPLERS[SAMPLER].__name__}
    scale = args.guidance
    if scale is None:
        measures["r_at_1_by_guidance"] = choose_guidance(rows["training"], splits["train"], scorer, make)
        scale = max(measures["r_at_1_by_guidance"], key=measures["r_at_1_by_guidance"].get)
    measures["guidance_scale"] = scale
    print(measures, flush=True)
    heldout = stack_images(splits["heldout-combinations"] + splits["heldout-labels"])
    measures["psnr_db"], measures["psnr_pictures"] = psnr_db(load_for_drawing(args.folder).vae, heldout), len(heldout)
    for name in ROWS:
        measures[name] = measure_row(
            rows[name], splits["train"], scorer, lambda prompts: make(prompts, scale), args.pictures
        )
        print(name, json.dumps(measures[name], indent=2), flush=True)
    save_record(measures, args.folder / "measures.json")


if __name__ == "__main__":
    main()
