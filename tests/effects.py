"""Writes the effects of the published plans, which come with the package: python tests/effects.py"""

import json
from pathlib import Path

from test_plan import PUBLISHED, plan_of

from prunet.plan import effect

FOLDER = Path(effect.__file__).parent / "effects"

if __name__ == "__main__":
    for layout, name in PUBLISHED:
        facts = plan_of(layout, name).effect().facts()
        (FOLDER / f"{layout}.{name}.json").write_text(json.dumps(facts, separators=(",", ":")) + "\n")
