"""prunet: make a Stable Diffusion model smaller and faster by removing blocks of its U-Net and distilling the rest.

The way of the data::

    Teacher ── config ──> Plan ──> derive() ──> build() ──> student
       └── cache() ──> latents and prompt embeddings ──> distil() ──> evaluate() ──> export()

Every arrow is one function; every box can be saved and opened again.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunet.errors import UserError
    from prunet.evaluation import evaluate
    from prunet.latents import Cache, cache
    from prunet.measuring import compare, measure
    from prunet.pickles import convert
    from prunet.pipeline import export, generate
    from prunet.plan import Derived, Plan, derive, load_plan
    from prunet.protocol import Protocol, load_protocol
    from prunet.recipe import Recipe, load_recipe
    from prunet.runs import Run, run
    from prunet.student import build
    from prunet.teacher import Teacher
    from prunet.training import Runtime, distil

__version__ = "0.1.0"

# Names are imported when they are first used: `prunet --help` should not wait for torch.
_HOME = {
    "UserError": "errors",
    "Teacher": "teacher",
    "Plan": "plan",
    "Derived": "plan",
    "load_plan": "plan",
    "derive": "plan",
    "build": "student",
    "Cache": "latents",
    "cache": "latents",
    "distil": "training",
    "evaluate": "evaluation",
    "measure": "measuring",
    "compare": "measuring",
    "Protocol": "protocol",
    "load_protocol": "protocol",
    "export": "pipeline",
    "generate": "pipeline",
    "convert": "pickles",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Runtime": "training",
    "Run": "runs",
    "run": "runs",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prunet' has no attribute {name!r}")
    return getattr(importlib.import_module(f"prunet.{_HOME[name]}"), name)
