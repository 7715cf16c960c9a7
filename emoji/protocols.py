"""Writes the two protocols of the shipped domain: prompts, and emoji-clip's features of the real pictures.

    python emoji/protocols.py            # into emoji/protocols/; run it again after emoji-clip is trained again

It also writes `known-captions.txt`: two captions of each pair that the teachers were trained on, the second in
alternating forms, for students that are trained without pictures.

`emoji-train` asks for the (label, style) pairs that the teachers were trained on, `emoji-heldout` for labels that they
know in styles that they never saw them in. Prompts are repeated until there are at least `FEWEST`.
"""

from pathlib import Path

import torch
import yaml
from shards import Sample, known_samples

from prunet.evaluation.extraction import preparation, save_features
from prunet.evaluation.networks import Clip
from prunet.evaluation.protocol import Protocol
from prunet.recipe.prompts import prompts_hash

FEWEST = 500
HERE = Path(__file__).parent


def write(name: str, samples: list[Sample], scorer: Clip, folder: Path) -> None:
    pairs = [sample.caption for sample in samples]
    prompts = pairs * -(-FEWEST // len(pairs))
    (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    pictures = [sample.picture for sample in samples]
    parts = [scorer(pictures[at : at + 100])["image"] for at in range(0, len(pictures), 100)]
    protocol = {
        "name": name,
        "description": f"{len(pairs)} (label, style) pairs of the emoji set, measured by emoji-clip",
        "prompts": {"source": "emoji/protocols.py wrote them.", "file": f"{name}.txt", "sha256": prompts_hash(prompts)},
        "seed": 0,
        "sampler": "dpmsolver++",
        "steps": 25,
        "guidance_scale": 1.5,  # the best on training pairs, for emoji-sd
        "metrics": ["clip_score", "retrieval", "kid"],
        "features": "clip",
        "kid_subset_size": min(500, len(pairs)),
        "clip": {"model": "emoji-clip", "source": "It ships in emoji/emoji-clip.", "file": "../emoji-clip"},
        "real": {"source": "emoji/protocols.py wrote them.", "file": f"{name}.safetensors"},
    }
    prepared = preparation(Protocol.model_validate(protocol), "clip")
    label = {"network": scorer.hash, "preparation": prepared, "content": prompts_hash(pairs)[:16]}
    save_features(torch.cat(parts), folder / f"{name}.safetensors", label)
    text = yaml.safe_dump(protocol, sort_keys=False, width=120)
    (folder / f"{name}.yaml").write_text(f"# Written by emoji/protocols.py.\n{text}")
    print(f"{name}: {len(prompts)} prompts, {len(pairs)} pairs")


def write_captions(samples: list[Sample], path: Path) -> None:
    turns = [(sample.caption, sample.captions[i % len(sample.captions)]) for i, sample in enumerate(samples)]
    path.write_text("\n".join(dict.fromkeys(text for pair in turns for text in pair)) + "\n", encoding="utf-8")


def main() -> None:
    folder = HERE / "protocols"
    folder.mkdir(exist_ok=True)
    scorer = Clip.load(HERE / "emoji-clip")
    for name, split in (("emoji-train", "train"), ("emoji-heldout", "heldout-combinations")):
        samples = known_samples(HERE / "data", split)
        write(name, samples, scorer, folder)
        if split == "train":
            write_captions(samples, HERE / "known-captions.txt")


if __name__ == "__main__":
    main()
