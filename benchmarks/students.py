"""Trains the students of ablations, and measures by two protocols how each draws in several numbers of steps.

    python benchmarks/students.py benchmarks/few-steps.yaml benchmarks/plans.yaml
    python benchmarks/students.py benchmarks/few-steps.yaml --device cuda --workers 14   # at once, on one GPU

Nothing that is finished is done again. Each ablation gets `students.md` in its folder: R@1, score and KID by the
protocols `emoji-train` and `emoji-heldout`, and how far the pictures are from those of the teacher (25 guided steps,
equal noise). Numbers are means over the training seeds, with half of the 95 % interval (Student's t); with one seed,
the interval over the pictures. What is not finished is left out. `students.png` beside it shows the first pictures.

With `--length 0.25` every stage has a quarter of its steps, in folders of its own: short trainings can mislead, so
plans and losses are compared at several lengths.

With `--results FOLDER` the numbers are also kept in a file there, and the table has those that it held before: seeds
can be trained on several machines. What is in the file is not trained again. Numbers of an arm whose recipe has changed
since are dropped from it, and counted.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pool import Jobs, all_done
from student_table import METRICS, PROTOCOLS, Row, Rows, table

from prunet import Drawing, Model, Runtime
from prunet.disk.files import read_json, write_json, write_text
from prunet.evaluation.measures import read_measures
from prunet.evaluation.measuring import measure
from prunet.evaluation.protocol import ProtocolFiles, load_protocol, protocol_prompts
from prunet.hashing import json_hash
from prunet.recipe.recipe import Recipe
from prunet.runs.ablation import Ablation, finish, load_ablation
from prunet.runs.run import Run
from prunet.sampling.shards import read_shard
from prunet.student.folder import save_unet
from prunet.training.sheets import grid

GUIDANCE = 1.5
#: Arm -> steps and guidance scales in which its student draws, if not only as it was made for.
DRAWN = {
    "distilled": [(25, GUIDANCE), (2, GUIDANCE), (2, 1.0), (4, GUIDANCE), (1, 1.0)],
    "distilled longer": [(25, GUIDANCE), (2, GUIDANCE), (2, 1.0), (4, GUIDANCE), (1, 1.0)],
    "guidance": [(25, 1.0), (2, 1.0), (4, 1.0), (1, 1.0)],
    "distilled longer, on paths": [(25, GUIDANCE), (2, GUIDANCE), (4, GUIDANCE)],
    "guidance, on paths": [(25, 1.0), (2, 1.0), (4, 1.0), (1, 1.0)],
    "trajectory, 4 jumps": [(4, 1.0), (8, 1.0)],
    "trajectory, 2 jumps": [(2, 1.0), (1, 1.0), (4, 1.0), (8, 1.0)],
    "trajectory at once": [(2, 1.0), (1, 1.0), (4, 1.0)],
    "trajectory, 2 jumps, LoRA": [(2, 1.0)],
    "trajectory, 1 jump": [(1, 1.0), (2, 1.0)],
}
TEACHER = [(25, GUIDANCE), (8, GUIDANCE), (4, GUIDANCE), (2, GUIDANCE), (1, GUIDANCE)]
#: Pictures of each protocol in the sheet.
SHOWN = 6


def prompts_of(protocol: str, limit: int) -> list[str]:
    """The prompts of a protocol that are measured."""
    chosen, beside = load_protocol(f"emoji/protocols/{protocol}.yaml")
    prompts: list[str] = protocol_prompts(chosen, beside, None, limit)
    return prompts


def keys_of(arm: str, seed: int, drawn: list[tuple[int, float]], args: argparse.Namespace) -> set[tuple[Any, ...]]:
    """The keys of all rows of a student or the teacher."""
    counts = {protocol: len(prompts_of(protocol, args.limit)) for protocol in PROTOCOLS}
    return {(arm, seed, protocol, counts[protocol], *how) for protocol in PROTOCOLS for how in drawn}


def drawn_in(arm: str, recipe: Recipe, args: argparse.Namespace) -> list[tuple[int, float]]:
    """Steps and guidance scales in which the student of an arm draws."""
    made_for = recipe.made_for
    return DRAWN.get(arm, [(made_for.steps, made_for.guidance_scale) if made_for else (args.steps, GUIDANCE)])


def sampler_of(guidance: float) -> str:
    """The protocol's sampler for guided pictures; else the one of few steps, also for students not made for them."""
    return "dpmsolver++" if guidance > 1 else "ddim-trailing"


def place_of(recipe: Recipe, args: argparse.Namespace) -> Path:
    """The folder of what a student drew, named by the recipe's hash: pictures of an earlier recipe are not its own."""
    return Path(recipe.output) / f"measured-{recipe_hash(recipe, args)[:8]}"


def folder_of(place: Path, protocol: str, how: tuple[int, float], args: argparse.Namespace) -> Path:
    return place / f"{protocol}-{args.limit}-{how[0]}-{how[1]:g}"


def measured(model: Path, place: Path, how: tuple[int, float], sampler: str, args: argparse.Namespace) -> None:
    """Measures a model by both protocols in these steps with this guidance, and how far its pictures are from the
    teacher's, unless that was done.
    """
    for protocol in PROTOCOLS:
        folder = folder_of(place, protocol, how, args)
        best = folder_of(args.teachers, protocol, TEACHER[0], args)
        if not (folder / "measures.json").is_file():
            chosen, beside = load_protocol(f"emoji/protocols/{protocol}.yaml")
            prompts = prompts_of(protocol, args.limit)
            chosen = chosen.model_copy(update={"kid_subset_size": min(chosen.kid_subset_size, len(prompts))})
            asked = Drawing(steps=how[0], guidance_scale=how[1], sampler=sampler)
            opening = Model(model, device=args.device)
            measure(opening, chosen, prompts, folder, files=ProtocolFiles(beside), drawing=asked, batch_size=100)
        if (best / "measures.json").is_file():
            distance(folder, best)


def distance(folder: Path, best: Path) -> dict[str, float]:
    """Root of the mean squared difference of pictures from those in `best`, of 1, and half of its 95 % interval."""
    path = folder / "distance.json"
    if not path.is_file():
        apart = ((pictures(folder) - pictures(best)) / 255) ** 2
        each = np.sqrt(apart.mean(axis=(1, 2, 3)))
        write_json(path, {"rmse": float(each.mean()), "half": float(1.96 * each.std() / len(each) ** 0.5)})
    found: dict[str, float] = json.loads(path.read_text())
    return found


def pictures(folder: Path) -> np.ndarray:
    shards = sorted((folder / "pictures").glob("*.tar"))
    return np.stack([np.asarray(picture) for path in shards for picture, _ in read_shard(path)]).astype(np.float32)


def drawable(recipe: Recipe, recipes: list[Recipe], teacher: Path, args: argparse.Namespace) -> Path:
    """Trains a student; returns a pipeline with it, beside its run."""
    run = finished(recipe, recipes, args)
    model = place_of(recipe, args) / "drawn-by"
    if not (model / "unet").is_dir():
        model.mkdir(parents=True, exist_ok=True)
        for part in teacher.iterdir():
            if part.name != "unet" and not (model / part.name).exists():
                (model / part.name).symlink_to(part.resolve())
        save_unet(run.last_unet(), model / "unet", "stage")
    return model


def trained(
    recipe: Recipe, recipes: list[Recipe], drawn: list[tuple[int, float]], teacher: Path, args: argparse.Namespace
) -> None:
    """Trains a student, and measures how it draws."""
    model = drawable(recipe, recipes, teacher, args)
    for how in drawn:
        measured(model, place_of(recipe, args), how, sampler_of(how[1]), args)


def teachers_pictures(source: Path, known: Rows, args: argparse.Namespace) -> None:
    """The first are always drawn, because the students' pictures are compared with them."""
    for how in TEACHER:
        if how == TEACHER[0] or not keys_of("teacher", 0, [how], args) <= known.keys():
            measured(source, args.teachers, how, "dpmsolver++", args)


def finished(recipe: Recipe, recipes: list[Recipe], args: argparse.Namespace, until: str = "distil") -> Run:
    return finish(recipe, Runtime(device=args.device, precision=args.precision), recipes, until=until)


def trained_as_asked(
    ablation: Ablation, recipes: dict[tuple[str, int], Recipe], args: argparse.Namespace
) -> tuple[Ablation, dict[tuple[str, int], Recipe]]:
    """The ablation with this share of the steps of every stage, and in this precision, in folders of its own. The
    caches, and the stages' warm-up, stay the same.
    """
    apart = [f"{args.length:g}"] * (args.length != 1) + [args.precision] * (args.precision != "no")
    if not apart:
        return ablation, recipes

    def shorter(recipe: Recipe) -> Recipe:
        stages = [s.model_copy(update={"steps": max(1, round(s.steps * args.length))}) for s in recipe.stages]
        inside = Path(recipe.output).relative_to(ablation.output)
        return recipe.model_copy(update={"stages": stages, "output": f"{output / inside}"})

    output = Path("-".join([ablation.output, *apart]))
    title = ", ".join([ablation.title, *([f"{args.length:g} of the steps"] if args.length != 1 else [])])
    changed = ablation.model_copy(update={"title": title, "output": f"{output}"})
    return changed, {key: shorter(recipe) for key, recipe in recipes.items()}


def common(a: Recipe, b: Recipe) -> int:
    """How many stages two recipes begin with alike."""
    if a.model_dump(include={"teacher", "plan", "data", "seed"}) != b.model_dump(
        include={"teacher", "plan", "data", "seed"}
    ):
        return 0
    same = [x == y for x, y in zip(a.stages, b.stages, strict=False)]
    return same.index(False) if False in same else len(same)


def caches_of(recipes: list[Recipe], args: argparse.Namespace) -> Jobs:
    """A job for each cache, of the recipe that makes most of it: the last in this order."""

    def paths(recipe: Recipe) -> int:
        return len({(s.paths, s.path_steps, str(s.guidance_scale)) for s in recipe.stages if s.has("paths")})

    in_order = sorted(recipes, key=paths)
    return {f"cache {r.cache}": (partial(finished, r, recipes, args, "cache"), set()) for r in in_order}


def jobs_of(recipes: dict[tuple[str, str, int], Recipe], known: Rows, teacher: Path, args: argparse.Namespace) -> Jobs:
    """The caches, the teacher's pictures, and the students: after all caches, which nothing else should slow down, and
    each after the one with most stages alike.
    """
    every = list(recipes.values())
    jobs = caches_of(every, args)
    caches = set(jobs)
    jobs["teacher"] = (partial(teachers_pictures, teacher, known, args), set())
    if args.caches:
        return jobs
    before: list[tuple[str, Recipe]] = []
    for (title, arm, seed), recipe in recipes.items():
        name = f"{title}: {arm}, seed {seed}"
        alike = max(before, key=lambda other: common(recipe, other[1]), default=None)
        after = {*caches, *([alike[0]] if alike and common(recipe, alike[1]) else [])}
        jobs[name] = (partial(trained, recipe, every, drawn_in(arm, recipe, args), teacher, args), after)
        before.append((name, recipe))
    return jobs


def recipe_hash(recipe: Recipe, args: argparse.Namespace) -> str:
    """Hash of what a student is trained by. It is equal on all machines: of folders only the teachers' names count."""
    trained_by = recipe.model_dump(mode="json", include={"plan", "initialisation", "stages", "seed"})
    for stage in trained_by["stages"]:
        stage["teacher"] = stage["teacher"] and Path(stage["teacher"]["source"]).name
    data = recipe.data.model_dump(mode="json", exclude={"source", "prompts"})
    precision = [args.precision] * (args.precision != "no")  # numbers that were kept before this option stay known
    return json_hash([trained_by, data, Path(recipe.teacher.source).name, *precision], sort_keys=True)


def rows_of(arm: str, seed: int, recipe: Recipe | None, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of a student, or of the teacher, that are measured on this machine."""
    place = place_of(recipe, args) if recipe else args.teachers
    for protocol in PROTOCOLS:
        best = folder_of(args.teachers, protocol, TEACHER[0], args)
        for steps, guidance in drawn_in(arm, recipe, args) if recipe else TEACHER:
            folder = folder_of(place, protocol, (steps, guidance), args)
            if not all((drawn / "measures.json").is_file() for drawn in (folder, best)):
                continue
            measures, apart = read_measures(folder), distance(folder, best)
            found = measures.measures
            yield Row(
                arm=arm,
                seed=seed,
                recipe=recipe_hash(recipe, args) if recipe else "",
                protocol=protocol,
                count=measures.protocol["count"],
                steps=steps,
                guidance=guidance,
                measures={metric: found[metric] for metric in METRICS},
                distance=apart["rmse"],
                half=apart["half"],
            )


def earlier_rows(ablation: Ablation, recipes: dict[tuple[str, int], Recipe], args: argparse.Namespace) -> Rows:
    """The rows in `--results` of arms whose recipes have not changed."""
    path = results_file(ablation, args)
    if path is None or not path.is_file():
        return {}
    rows = [Row.model_validate(row) for row in read_json(path)]
    hashes = {("teacher", 0): ""} | {key: recipe_hash(recipe, args) for key, recipe in recipes.items()}
    kept = {row.key: row for row in rows if hashes.get((row.arm, row.seed)) == row.recipe}
    if len(kept) < len(rows):
        print(f"{path}: {len(rows) - len(kept)} rows of other recipes left out", flush=True)
    return kept


def results_file(ablation: Ablation, args: argparse.Namespace) -> Path | None:
    return args.results / f"{Path(ablation.output).name}.json" if args.results else None


def results(ablation: Ablation, recipes: dict[tuple[str, int], Recipe], args: argparse.Namespace) -> list[Row]:
    """The rows of an ablation in the order of its file, of this machine and of `--results`, which gets all."""
    rows = earlier_rows(ablation, recipes, args) | {row.key: row for row in rows_of("teacher", 0, None, args)}
    for (arm, seed), recipe in recipes.items():
        rows |= {row.key: row for row in rows_of(arm, seed, recipe, args)}
    if path := results_file(ablation, args):
        write_json(path, [row.model_dump(mode="json") for row in rows.values()])
    order = {name: place for place, name in enumerate(["teacher", *ablation.arms])}
    counts = {protocol: len(prompts_of(protocol, args.limit)) for protocol in PROTOCOLS}
    shown = [row for row in rows.values() if row.count == counts[row.protocol]]
    return sorted(shown, key=lambda row: (order[row.arm], row.seed))


def write_sheet(path: Path, arms: dict[str, list[Recipe]], args: argparse.Namespace) -> None:
    """Writes a sheet of the first prompts of both protocols: the teacher, and the first seed of each arm."""
    drawn = {"teacher": (args.teachers, TEACHER[0])}
    drawn |= {arm: (place_of(recipes[0], args), drawn_in(arm, recipes[0], args)[0]) for arm, recipes in arms.items()}
    rows: dict[str, list[Image.Image]] = {}
    captions: list[str] = []
    for name, (place, how) in drawn.items():
        folders = [folder_of(place, protocol, how, args) / "pictures" for protocol in PROTOCOLS]
        if all(any(folder.glob("*.tar")) for folder in folders):  # another worker may have only begun
            shown = [pair for folder in folders for pair in list(read_shard(min(folder.glob("*.tar"))))[:SHOWN]]
            label = f"{name}, {how[0]} step{'s' * (how[0] > 1)}"
            rows[label], captions = [picture for picture, _ in shown], [caption for _, caption in shown]
    if rows:
        grid(list(rows.values()), list(rows), captions).save(path, optimize=True)


def write_tables(loaded: list[tuple[Ablation, dict[tuple[str, int], Recipe]]], args: argparse.Namespace) -> list[str]:
    """Writes table and sheet of each ablation from what is there; returns the tables."""
    texts = []
    for ablation, recipes in loaded:
        texts.append(table(ablation.title, results(ablation, recipes, args), args.limit))
        write_text(Path(ablation.output) / "students.md", texts[-1] + "\n")
        arms: dict[str, list[Recipe]] = {}
        for (arm, seed), recipe in recipes.items():
            if wanted(arm, seed, args):
                arms.setdefault(arm, []).append(recipe)
        write_sheet(Path(ablation.output) / "students.png", arms, args)
    return texts


def wanted(arm: str, seed: int, args: argparse.Namespace) -> bool:
    return (not args.seeds or seed in args.seeds) and (not args.arms or arm in args.arms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablations", type=Path, nargs="+")
    parser.add_argument("--limit", type=int, default=200, help="prompts of each protocol (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", help="these of the ablation's seeds")
    parser.add_argument("--arms", nargs="+", help="these of the ablation's arms")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="no", choices=["no", "bf16"], help="of the training (%(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="of guided students, if not said (%(default)s)")
    parser.add_argument("--length", type=float, default=1, help="share of the steps of every stage (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="students that train at once (%(default)s)")
    parser.add_argument("--caches", action="store_true", help="only make the caches and the teacher's pictures")
    parser.add_argument("--table", action="store_true", help="only write the tables of what is there")
    parser.add_argument("--results", type=Path, help="folder with the numbers of other machines; these are added")
    args = parser.parse_args()
    if args.length <= 0:
        parser.error("--length: give a share of the steps above 0")
    loaded = []
    for path in args.ablations:
        ablation, of = load_ablation(path)
        loaded.append(trained_as_asked(ablation, of, args))
    recipes = {
        (ablation.title, arm, seed): recipe
        for ablation, of in loaded
        for (arm, seed), recipe in of.items()
        if wanted(arm, seed, args)
    }
    if not recipes:
        parser.error("no student left: --arms and --seeds take names and numbers of the ablation's file")
    first = next(iter(recipes.values()))
    if len({recipe.teacher.source for recipe in recipes.values()}) > 1:
        parser.error("the ablations have different teachers: give those of one teacher")
    args.teachers = Path(loaded[0][0].output) / "teacher"
    known = {ablation.title: earlier_rows(ablation, of, args) for ablation, of in loaded}
    left = {
        (title, arm, seed): recipe
        for (title, arm, seed), recipe in recipes.items()
        if not keys_of(arm, seed, drawn_in(arm, recipe, args), args) <= known[title].keys()
    }
    todo = left and not args.table
    jobs = jobs_of(left, known[loaded[0][0].title], Path(first.teacher.source), args) if todo else {}
    for _ in all_done(jobs, args.workers):  # what is finished can be read at any time
        write_tables(loaded, args)
    print("\n".join(write_tables(loaded, args)))


if __name__ == "__main__":
    main()
