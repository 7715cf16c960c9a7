"""Files outside of docs/ that pages link to: they become part of the site, below repository/, and links lead there."""

import os
import re
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
#: A link or picture in Markdown, but for those with a scheme and those within the page.
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def place(path: str) -> str:
    """Where a file of the repository lies in the site; both with `/`, from their roots. A folder is a page of links."""
    if (ROOT / path).is_dir():
        path += "/index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def content(path: str) -> str:
    """The text of a file of the repository; that of a folder's page."""
    folder = ROOT / path.removesuffix("/index.md")
    if not folder.is_dir():
        return folder.read_text()
    return f"# {folder.name}\n\n" + "".join(f"- [{file.name}]({file.name})\n" for file in sorted(folder.glob("*.*")))


def origin(page: str) -> str:
    """The file of the repository that a page of the site is made from."""
    return page.removeprefix("repository/") if page.startswith("repository/") else f"docs/{page}"


def links(page: str, markdown: str) -> list[str]:
    """The files that a page links to, as paths in the repository."""
    return [_target(page, found[2]) for found in LINK.finditer(markdown)]


def outside(pages: dict[str, str]) -> set[str]:
    """The files outside of docs/ that pages (place in the site -> text) link to, and those that these link to."""
    found: set[str] = set()
    queue = list(pages.items())
    while queue:
        for target in links(*queue.pop()):
            if target in found or target.startswith(("docs/", "..")) or not (ROOT / target).exists():
                continue  # a link that leads nowhere is reported by mkdocs
            found.add(target)
            if place(target).endswith(".md"):
                queue.append((place(target), content(origin(place(target)))))
    return found


def relink(page: str, markdown: str) -> str:
    """The text of a page with its links as they are in the site."""
    here = PurePosixPath(page).parent

    def change(found: re.Match[str]) -> str:
        return f"{found[1]}{os.path.relpath(place(_target(page, found[2])), here)}{found[3] or ''})"

    return LINK.sub(change, markdown)


def _target(page: str, link: str) -> str:
    return os.path.normpath(PurePosixPath(origin(page)).parent / link)
