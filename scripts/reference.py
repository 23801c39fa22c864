"""Writes docs/reference/ from the docstrings of the public modules.

    .venv/bin/python scripts/reference.py [--check]

--check writes nothing and ends with a status other than 0 when a page is not what it would write,
or when something public has no docstring. Reads the sources; imports no framework.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe
import griffe2md

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "reference"
MODULES = ("torch", "keras", "tensorflow", "lightning", "huggingface")
HEAD = "<!-- Written by scripts/reference.py from the docstrings; change those. -->\n\n"
LINK = re.compile(r"\[([^\[\]]+)\]\(#([^)]*)\)")
CONFIG = {
    "docstring_section_style": "list",
    "members_order": "alphabetical",
    "show_if_no_docstring": False,
    "inherited_members": False,
    "summary": {"attributes": False, "functions": True, "classes": True, "modules": False},
}


def public_objects(module: griffe.Module) -> Iterator[griffe.Object]:
    """What __all__ names, and the public methods of the classes among it."""
    for name in module.exports or ():
        found = module[str(name)].final_target if module[str(name)].is_alias else module[str(name)]
        yield found
        if found.is_class:
            for member in found.members.values():
                if member.is_function and not member.name.startswith("_"):
                    yield member


def page_of(module: griffe.Module) -> str:
    """A module's page."""

    def anchored(link: re.Match[str]) -> str:
        # As a heading's anchor is spelled; of what has no heading here, the name alone.
        text, path = link.groups()
        if not path.startswith(f"{module.path}."):
            return text
        return f"[{text}](#{re.sub(r'[^a-z0-9_-]', '', path.lower())})"

    return HEAD + LINK.sub(anchored, griffe2md.render_object_docs(module, CONFIG)).strip() + "\n"


def main() -> int:
    """Exit status: 0 written, or all as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    loader = griffe.GriffeLoader(
        search_paths=[ROOT / "python"], docstring_parser=griffe.Parser.google
    )
    package = loader.load("stillframe")
    loader.resolve_aliases(implicit=True)
    complaints = []
    PAGES.mkdir(exist_ok=True)
    for name in MODULES:
        module = package[name]
        complaints += [
            f"{one.path} has no docstring" for one in public_objects(module) if not one.docstring
        ]
        page, text = PAGES / f"{name}.md", page_of(module)
        if not arguments.check:
            page.write_text(text)
        elif not page.exists() or page.read_text() != text:
            complaints.append(f"{page.relative_to(ROOT)} is old: run scripts/reference.py")
    for complaint in complaints:
        print(complaint)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
