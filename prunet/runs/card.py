"""The facts in the model card of a run's student."""

from typing import TYPE_CHECKING, Any

from prunet.disk.files import read_label
from prunet.disk.steps import read_steps
from prunet.evaluation.results import read_evaluation
from prunet.exports.card import origin
from prunet.words import short

if TYPE_CHECKING:
    from prunet.plan.derived import Derived
    from prunet.runs.run import Run
    from prunet.teacher.teacher import Teacher


def loads_in(derived: "Derived", teacher: "Teacher") -> dict[str, str]:
    """Maps each program to whether it loads the student (see `prunet.denoisers.unet2d.compatibility.loads_in`).

    `teacher`: the one whose prediction the student learned.
    """
    answers, comfy = dict(derived.loads_in), "ComfyUI, single file"
    if answers.get(comfy) == "yes" and teacher.kind == "sd" and teacher.prediction == "v_prediction":
        answers[comfy] = "yes: with the node ModelSamplingDiscrete set to v_prediction, else it draws noise"
    return answers


def card_facts(this: "Run") -> dict[str, Any]:
    """Returns the facts that `prunet.exports.card.model_card` renders.

    Raises:
        UserError: the student was not evaluated, or another one was.
    """
    result = read_evaluation(this.folder / "evaluation", read_steps(this.folder))
    prompts = result.protocol.prompts
    measures = {name: result.distance[name] for name in ("before", "after")}
    cache = this.cache_folder / "cache.json"  # users may delete cache and data after training
    source = this.recipe.data.source or []
    pictures = ", ".join(map(short, [source] if isinstance(source, str) else source))
    return {
        **origin(this.teacher, *this.teachers),
        "data": pictures or "latents that the teacher drew from prompts",
        "license": this.recipe.export.license,
        "plan": {"name": this.recipe.plan.name, "remove": list(this.recipe.plan.remove)},
        "recipe": this.recipe.model_dump(mode="json"),
        "samples": f"{read_label(cache, ('samples',))['samples']:,}" if cache.is_file() else None,
        "size": this.size,
        "sizes": result.sizes,
        "loads_in": loads_in(this.derived, this.teachers[-1]),
        "works_with": this.derived.works_with,
        "measures": {"prompts": len(prompts), **measures},
        "prompt": prompts[0],
    }
