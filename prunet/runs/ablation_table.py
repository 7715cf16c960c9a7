"""The table of an ablation: a row for each arm, with means and intervals over its seeds."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from prunet.disk.values import Value
from prunet.errors import UserError
from prunet.evaluation.protocol import differences
from prunet.evaluation.results import NOISE, EvaluationResult
from prunet.intervals import Summary

#: Columns of the table: (student, key) in evaluation.json, and the title.
MEASURES = {
    ("before", "denoiser"): "denoiser error before",
    ("after", "denoiser"): "denoiser error",
    ("after", "latent"): "latents, MSE",
    ("after", "picture"): "pictures, RMSE",
}


class Arm(Value):
    """The results of the finished runs of an arm: the student's parameters, and measures by `STUDENT/FIELD`.

    `drawn`: how its students draw, if not like the teacher. Their denoisers are not meant to give the teacher's output.
    """

    seeds: list[int]
    parameters: int | None
    measures: dict[str, Summary]
    drawn: str | None = None


class SharedProtocol(Value):
    """The part of the protocol that all runs of an ablation share; empty until a run is finished."""

    size: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    levels: list[float] | None = None
    noise: str | None = None
    precision: str | None = None
    teacher: str | None = None
    prompts: list[str] = Field(default=[])


class AblationResult(Value):
    """The table of an ablation (`ablation.json`), with a row for each arm."""

    title: str
    arms: dict[str, Arm]
    protocol: SharedProtocol


def shared_protocol(done: Mapping[Path, EvaluationResult], *, more: bool = False) -> SharedProtocol:
    """Returns the protocol that all evaluations (by the folder of their run) have; `more` are still to be done.

    Raises:
        UserError: they differ, because another version of prunet or another precision made some of them.
    """
    old = [folder for folder, result in done.items() if result.protocol.noise != NOISE]
    if old and (more or len(old) < len(done)):
        raise UserError(
            "prunet 0.2 evaluated with other noise than this version, and no table can hold both: delete evaluation/ "
            f"in {', '.join(map(str, old))}, and give the same command again"
        )
    protocols = {folder: result.protocol.model_dump(exclude={"seed", "student"}) for folder, result in done.items()}
    for folder, protocol in protocols.items():
        first = next(iter(protocols))
        if apart := differences(protocols[first], protocol):
            values = "; ".join(f"{key} {protocol.get(key)}, not {protocols[first].get(key)}" for key in apart)
            raise UserError(
                f"{folder}: evaluated differently from {first} ({values}), and no table can hold both: delete its "
                "evaluation/, and give the same command again with the options of the first"
            )
    return SharedProtocol.model_validate(next(iter(protocols.values()), {}))


def markdown(result: AblationResult) -> str:
    """Formats the result in Markdown: one row for each arm, with the best (lowest) of each column in bold."""
    lines = [f"# {result.title}", "", "| | parameters (M) | seeds | " + " | ".join(MEASURES.values()) + " |"]
    lines.append("|---|---:|---:|" + "---:|" * len(MEASURES))
    keys = [f"{which}/{key}" for which, key in MEASURES]
    best = {
        key: min((m for a in result.arms.values() if (m := a.measures[key].mean) is not None), default=0)
        for key in keys
    }
    for name, arm in result.arms.items():
        if arm.parameters is None:
            lines.append(f"| {name} | | 0 |" + " |" * len(MEASURES))
            continue
        cells = [_cell(arm.measures[key], best[key]) for key in keys]
        lines.append(f"| {name} | {arm.parameters / 1e6:.2f} | {len(arm.seeds)} | " + " | ".join(cells) + " |")
    if (protocol := result.protocol).prompts:
        lines += [
            "",
            f"Distance from the teacher on {len(protocol.prompts)} held-out prompts at equal seeds, after "
            "distillation unless it says before; mean over the training seeds ± half of its 95 % interval (Student's "
            f"t); lower is nearer. {protocol.sampler}, {protocol.steps} steps, guidance {protocol.guidance_scale}, "
            f"{protocol.size} px.",
        ]
    for drawn in {arm.drawn: None for arm in result.arms.values() if arm.drawn}:
        names = ", ".join(name for name, arm in result.arms.items() if arm.drawn == drawn)
        lines += ["", f"Students draw as they were made for in {names}: {drawn}. Their denoisers are not compared."]
    return "\n".join(lines) + "\n"


def _cell(found: Summary, best: float) -> str:
    if found.mean is None:
        return ""
    mean = f"**{found.mean:.4f}**" if found.mean == best else f"{found.mean:.4f}"
    return mean if found.interval is None else f"{mean} ± {found.interval:.4f}"
