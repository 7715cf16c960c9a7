"""prunet: make a Stable Diffusion model smaller and faster by removing blocks of its U-Net and distilling the rest.

How the data flows::

    Teacher ── config ──> Plan ──> derive() ──> build() ──> student
       └── cache() ──> latents and prompt embeddings ──> distil() ──> evaluate() ──> export()

Each arrow is one function. The result of each can be saved and opened again.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunet.adapters.adapt import adapt
    from prunet.data.cache import Cache
    from prunet.data.encoding import cache
    from prunet.denoisers.condition import Condition
    from prunet.denoisers.form import Form
    from prunet.denoisers.pairs import Pair
    from prunet.errors import UserError
    from prunet.evaluation.evaluation import evaluate
    from prunet.evaluation.measures import Measures
    from prunet.evaluation.measuring import compare, measure
    from prunet.evaluation.protocol import Protocol, ProtocolFiles, load_protocol
    from prunet.evaluation.results import EvaluationResult
    from prunet.exports.folder import export
    from prunet.plan.derived import Derived, derive
    from prunet.plan.plan import Plan, load_plan
    from prunet.recipe.personalization import Personalization
    from prunet.recipe.recipe import Data, Evaluation, Export, Recipe, load_recipe
    from prunet.recipe.stage import Losses, Stage
    from prunet.recipe.values import Drawing
    from prunet.runs.personalization import personalize
    from prunet.runs.run import Run, run
    from prunet.runtime import Runtime
    from prunet.sampling.draw import Model, generate
    from prunet.sampling.start import StartPicture
    from prunet.student.student import build
    from prunet.teacher.conversion import convert
    from prunet.teacher.teacher import Teacher
    from prunet.training.checkpoints import Saving
    from prunet.training.loop import distil
    from prunet.training.sheets import Sheets

__version__ = "0.2.0"

# A name is imported at its first use, so that `prunet --help` does not wait for torch.
_HOME = {
    "UserError": "errors",
    "Teacher": "teacher.teacher",
    "Plan": "plan.plan",
    "Derived": "plan.derived",
    "load_plan": "plan.plan",
    "derive": "plan.derived",
    "build": "student.student",
    "Cache": "data.cache",
    "cache": "data.encoding",
    "distil": "training.loop",
    "evaluate": "evaluation.evaluation",
    "EvaluationResult": "evaluation.results",
    "measure": "evaluation.measuring",
    "Measures": "evaluation.measures",
    "compare": "evaluation.measuring",
    "Protocol": "evaluation.protocol",
    "ProtocolFiles": "evaluation.protocol",
    "load_protocol": "evaluation.protocol",
    "export": "exports.folder",
    "adapt": "adapters.adapt",
    "Model": "sampling.draw",
    "StartPicture": "sampling.start",
    "generate": "sampling.draw",
    "Personalization": "recipe.personalization",
    "personalize": "runs.personalization",
    "convert": "teacher.conversion",
    "Condition": "denoisers.condition",
    "Form": "denoisers.form",
    "Pair": "denoisers.pairs",
    "Data": "recipe.recipe",
    "Stage": "recipe.stage",
    "Losses": "recipe.stage",
    "Drawing": "recipe.values",
    "Evaluation": "recipe.recipe",
    "Export": "recipe.recipe",
    "Saving": "training.checkpoints",
    "Sheets": "training.sheets",
    "Recipe": "recipe.recipe",
    "load_recipe": "recipe.recipe",
    "Runtime": "runtime",
    "Run": "runs.run",
    "run": "runs.run",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prunet' has no attribute {name!r}")
    return getattr(importlib.import_module(f"prunet.{_HOME[name]}"), name)
