"""What mkdocs calls while it builds the site: it adds pages made from the code, and files outside of docs/."""

from pathlib import PurePosixPath
from typing import Any

import mathml
import reference
import repository
from mkdocs.structure.files import File, Files

#: Page -> function that gives its text.
GENERATED = {
    "reference/recipe.md": reference.recipe_page,
    "reference/cli.md": reference.cli_page,
    "reference/api.md": reference.api_page,
}
#: The section of the navigation for pages that it does not list.
REST = "How to"


def on_config(config: Any) -> None:
    fence = {"name": "math", "class": "math", "format": mathml.fence}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}


def on_files(files: Files, config: Any) -> Files:
    for page, make in GENERATED.items():
        files.append(File.generated(config, page, content=make()))
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    listed = _paths(config.nav, outside=True)
    _list_the_rest(config, set(pages))
    pages |= {page: repository.content(repository.origin(page)) for page in listed}
    for path in sorted(repository.outside(pages) | {repository.origin(page) for page in listed}):
        place, source = repository.place(path), repository.ROOT / path
        text = repository.content(repository.origin(place)) if place.endswith(".md") else source.read_bytes()
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri in GENERATED:
        return markdown
    return mathml.inline(repository.relink(page.file.src_uri, markdown))


def _paths(nav: Any, outside: bool) -> list[str]:
    """The pages in a navigation: those from outside of docs/, or all others."""
    if isinstance(nav, str):
        return [nav] if nav.startswith("repository/") == outside else []
    return [path for part in (nav.values() if isinstance(nav, dict) else nav) for path in _paths(part, outside)]


def _list_the_rest(config: Any, pages: set[str]) -> None:
    section = next(part[REST] for part in config.nav if REST in part)
    section += sorted(pages - set(_paths(config.nav, outside=False)), key=lambda page: PurePosixPath(page).stem)
