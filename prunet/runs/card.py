"""What the model card of a run's student tells."""

from typing import TYPE_CHECKING, Any

from prunet.disk.files import read_label
from prunet.evaluation.results import read_evaluation
from prunet.exports.card import origin
from prunet.runs.steps import read_done
from prunet.words import short

if TYPE_CHECKING:
    from prunet.runs.run import Run


def card_facts(this: "Run") -> dict[str, Any]:
    """What `prunet.exports.card.model_card` is filled with.

    Raises:
        UserError: not evaluated, or of another student.
    """
    result = read_evaluation(this.folder / "evaluation", read_done(this.folder))
    prompts = result["protocol"]["prompts"]
    measures = {name: result["distance"][name] for name in ("before", "after")}
    cache = this.cache_folder / "cache.json"  # which may be deleted when all is done, as the samples may
    source = this.recipe.data.source or []
    pictures = ", ".join(map(short, [source] if isinstance(source, str) else source))
    return {
        **origin(this.teacher),
        "data": pictures or "latents that the teacher drew from prompts",
        "license": this.recipe.export.license,
        "plan": {"name": this.recipe.plan.name, "remove": list(this.recipe.plan.remove)},
        "recipe": this.recipe.model_dump(mode="json"),
        "samples": f"{read_label(cache, ('samples',))['samples']:,}" if cache.is_file() else None,
        "size": this.size,
        "sizes": result["sizes"],
        "loads_in": this.derived.loads_in,
        "works_with": this.derived.works_with,
        "measures": {"prompts": len(prompts), **measures},
        "prompt": prompts[0],
    }
