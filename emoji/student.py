"""Ships the student of a finished run: its pipeline with the U-Net in half precision, measured beside its teacher.

    prunet run emoji/emoji-sd-small.yaml && python emoji/student.py runs/emoji-sd-small emoji/emoji-sd-small

Writes the folder, its card with the measures of both by the two protocols, and a sheet of the fixed prompts: the
teacher's pictures above the student's; the front page shows its first pictures.
Measures are kept in RUN/measured, so that the same command resumes.
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from export import SHEET_COLUMNS, read_sheet_prompts

from prunet import Drawing, generate
from prunet.evaluation.measures import Measures
from prunet.evaluation.measuring import measure
from prunet.evaluation.protocol import ProtocolFiles, load_protocol, protocol_prompts
from prunet.recipe.recipe import load_recipe
from prunet.student.folder import write_unet
from prunet.training.sheets import grid

HERE = Path(__file__).parent
TEACHER = HERE / "emoji-sd"
PROTOCOLS = ("emoji-train", "emoji-heldout")
METRICS = {"retrieval": "R@1", "clip_score": "score", "kid": "KID"}
ABOUT = HERE / "student-card.md"
SHIPPED = HERE.resolve() / "emoji-sd-small"
FRONT_PAGE, ON_FRONT_PAGE = HERE.parent / "docs" / "student.png", 16


def write_pipeline(run: Path, out: Path) -> UNet2DConditionModel:
    """Copies the run's pipeline, with the U-Net's weights in fp16; returns the U-Net."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(run / "pipeline", out, ignore=shutil.ignore_patterns("*.fp16.*", ".prunet.json"))
    unet = UNet2DConditionModel.from_pretrained(run / "pipeline" / "unet", torch_dtype=torch.float16)
    (out / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    write_unet(unet, out / "unet")
    shutil.copy(TEACHER / "labels.txt", out / "labels.txt")
    return unet


def measured(model: Path, name: str, folder: Path, limit: int) -> Measures:
    """Measures a pipeline by the first prompts of a protocol, unless it is already measured."""
    if (folder / "measures.json").is_file():
        return Measures.load(folder / "measures.json")
    protocol, beside = load_protocol(str(HERE / "protocols" / f"{name}.yaml"))
    prompts = protocol_prompts(protocol, beside, None, limit)
    protocol = protocol.model_copy(update={"kid_subset_size": min(protocol.kid_subset_size, len(prompts))})
    found = measure(model, protocol, prompts, folder, files=ProtocolFiles(beside), batch_size=100)
    assert found is not None
    return found


def table(models: dict[str, Path], run: Path, limit: int) -> str:
    lines = ["| | protocol | " + " | ".join(METRICS.values()) + " |", "|---|---|" + "---:|" * len(METRICS)]
    for protocol in PROTOCOLS:
        for name, model in models.items():
            found = measured(model, protocol, run / "measured" / f"{name}-{protocol}", limit).measures
            cells = [f"{(m := found[metric]).value:.3f} [{m.low:.3f}, {m.high:.3f}]" for metric in METRICS]
            lines.append(f"| {name} | `{protocol}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_sheet(models: dict[str, Path], path: Path) -> None:
    prompts = read_sheet_prompts()
    asked = {"teacher": Drawing(steps=25, guidance_scale=1.5, sampler="dpmsolver++")}
    drawn = [generate(model, prompts, drawing=asked.get(name)) for name, model in models.items()]
    grid(drawn, list(models), prompts, SHEET_COLUMNS).save(path, optimize=True)
    if path.parent.resolve() != SHIPPED:
        return
    first = [row[:ON_FRONT_PAGE] for row in drawn]
    grid(first, list(models), prompts[:ON_FRONT_PAGE], SHEET_COLUMNS).save(FRONT_PAGE, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("out", type=Path, help="the folder that ships")
    parser.add_argument("--limit", type=int, default=200, help="prompts of each protocol (%(default)s)")
    args = parser.parse_args()
    unet, recipe = write_pipeline(args.run, args.out), load_recipe(args.run / "recipe.yaml")
    models = {"teacher": TEACHER, "student": args.out}
    stages = ", then ".join(f"{s.steps:,} steps of {s.batch_size} ({s.objective})" for s in recipe.stages)
    card = args.out / "README.md"
    about = ABOUT.read_text().format(
        table=table(models, args.run, args.limit),
        limit=args.limit,
        drawing=str(recipe.made_for),
        parameters=unet.num_parameters() / 1e6,
        teachers=UNet2DConditionModel.from_pretrained(TEACHER / "unet").num_parameters() / 1e6,
        plan=recipe.plan.name,
        stages=stages,
    )
    card.write_text(card.read_text().rstrip() + "\n\n" + about)
    write_sheet(models, args.out / "samples.png")


if __name__ == "__main__":
    main()
