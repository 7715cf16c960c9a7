"""How good the students of an ablation draw in few steps: measured by two protocols at several numbers of steps.

    prunet ablate benchmarks/few-steps.yaml --device cpu
    python benchmarks/few_steps.py benchmarks/few-steps.yaml

Writes `few-steps.md` into the ablation's folder; runs that are not finished are left out, and what was measured is not
measured again. Numbers are means over the training seeds, with half of the 95 % interval (Student's t); with one
seed, the interval over the pictures.
"""

import argparse
from pathlib import Path
from typing import Any

from prunet import run
from prunet.disk.files import write_text
from prunet.evaluation.measures import read_measures
from prunet.evaluation.measuring import measure
from prunet.evaluation.protocol import load_protocol, protocol_prompts
from prunet.intervals import Measure, summary
from prunet.runs.ablation import load_ablation
from prunet.runs.run import Run
from prunet.runtime import Runtime

GUIDANCE = 1.5
PROTOCOLS = ("emoji-train", "emoji-heldout")
#: Arm -> steps and guidance scale in which its student draws; those with a guidance scale use the protocol's sampler.
DRAWN = {
    "distilled": [(25, GUIDANCE), (4, GUIDANCE), (2, GUIDANCE), (1, GUIDANCE), (2, 1.0), (1, 1.0)],
    "distilled longer": [(25, GUIDANCE), (4, GUIDANCE), (2, GUIDANCE)],
    "guidance": [(25, 1.0), (4, 1.0), (2, 1.0), (1, 1.0)],
    "trajectory, 4 jumps": [(8, 1.0), (4, 1.0)],
    "trajectory, 2 jumps": [(8, 1.0), (4, 1.0), (2, 1.0), (1, 1.0)],
    "trajectory, 1 jump": [(2, 1.0), (1, 1.0)],
}
AS_MADE = [(2, 1.0)]
TEACHER = [(25, GUIDANCE), (4, GUIDANCE), (2, GUIDANCE), (1, GUIDANCE)]
METRICS = {"retrieval": "R@1", "clip_score": "score", "kid": "KID"}


def measured(
    model: Path, protocol: str, folder: Path, steps: int, guidance: float, sampler: str, limit: int
) -> dict[str, Measure]:
    """Measures a model, or reads what was measured; returns metric -> value, low and high."""
    if (folder / "measures.json").is_file():
        return read_measures(folder).measures
    chosen, beside = load_protocol(f"emoji/protocols/{protocol}.yaml")
    prompts = protocol_prompts(chosen, beside, None, limit)
    chosen = chosen.model_copy(update={"kid_subset_size": min(chosen.kid_subset_size, len(prompts))})
    asked = {"steps": steps, "guidance_scale": guidance, "sampler": sampler}
    return measure(model, chosen, prompts, folder, beside=beside, asked=asked, batch_size=20).measures


def cell(found: list[Measure]) -> str:
    """A metric's mean over seeds with half of its interval; with one seed, the interval over pictures."""
    if len(found) == 1:
        return f"{found[0].value:.3f} [{found[0].low:.3f}, {found[0].high:.3f}]"
    over = summary([f.value for f in found])
    return f"{over.mean:.3f} ± {over.interval:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", type=Path)
    parser.add_argument("--limit", type=int, default=200, help="prompts of each protocol")
    args = parser.parse_args()
    ablation, recipes = load_ablation(args.ablation)
    runtime, output = Runtime(device="cpu", precision="no"), Path(ablation.output)
    done = {}
    for arm in ablation.arms:
        seeds = [s for s in ablation.seeds if Run(recipes[arm, s], runtime).is_done("evaluate")]
        done[arm] = {seed: run(recipes[arm, seed], runtime, until="export") for seed in seeds}
    teacher = Path(next(iter(recipes.values())).teacher.source)
    models: dict[str, Any] = {"teacher": ([teacher], TEACHER, output / "teacher")}
    models |= {arm: (list(runs.values()), DRAWN.get(arm, AS_MADE), None) for arm, runs in done.items() if runs}
    text = [f"# {ablation.title}", ""]
    for protocol in PROTOCOLS:
        text += [f"`{protocol}`, the first {args.limit} prompts:", "", "| | steps | guidance | seeds | "]
        text[-1] += " | ".join(METRICS.values()) + " |"
        text += ["|---|---:|---:|---:|" + "---:|" * len(METRICS)]
        for name, (places, drawn, own) in models.items():
            for steps, guidance in drawn:
                sampler = "ddim-trailing" if name.startswith(("trajectory", "steps")) else "dpmsolver++"
                folder = f"{protocol}-{steps}-{guidance:g}"
                found = [
                    measured(p, protocol, (own or p / "measured") / folder, steps, guidance, sampler, args.limit)
                    for p in places
                ]
                values = " | ".join(cell([f[metric] for f in found]) for metric in METRICS)
                shown = f"{guidance:g}" if guidance > 1 else "none"
                text += [f"| {name} | {steps} | {shown} | {len(found)} | {values} |"]
                write_text(output / "few-steps.md", "\n".join(text) + "\n")
        text += [""]
    print("\n".join(text))


if __name__ == "__main__":
    main()
