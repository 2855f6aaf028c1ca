"""Hooks of the documentation site (see mkdocs.yml): links that lead out of docs, and the fields of records."""

import os
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ELSEWHERE = {"contributing.md": ROOT / "CONTRIBUTING.md", "changelog.md": ROOT / "CHANGELOG.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages in the root of the repository, and the images outside docs that pages show."""
    for name, path in ELSEWHERE.items():
        if path.exists():
            files.append(File.generated(config, name, abs_src_path=str(path)))
    shown = {
        target
        for file in files.documentation_pages()
        for mark, _, link, _ in LINK.findall(Path(file.abs_src_path or "").read_text(encoding="utf-8"))
        if mark and not (target := _target(file, link)).is_relative_to(DOCS) and target.is_file()
    }
    for path in sorted(shown):
        name = f"elsewhere/{path.relative_to(ROOT)}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where the site has their targets; of a link to a file outside the site, keep only the text."""

    def moved(match: re.Match[str]) -> str:
        mark, text, link, anchor = match[1], match[2], match[3], match[4] or ""
        target = _target(page.file, link)
        if not target.exists():
            return match[0]  # mkdocs says what is missing
        names = {path: name for name, path in ELSEWHERE.items()}
        place = names.get(target) or os.path.relpath(target, DOCS)
        if place.startswith("..") and mark:
            place = f"elsewhere/{target.relative_to(ROOT)}"
        if place.startswith(".."):
            return text
        return f"{mark}[{text}]({os.path.relpath(place, os.path.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(moved, markdown)


def _target(file: File, link: str) -> Path:
    """The file that a relative link points to, resolved from its page's place in the repository."""
    return Path(os.path.normpath(Path(file.abs_src_path or "").parent / link))


class Docstrings(griffe.Extension):
    """Give griffe the sections and lists of fields of this project's docstrings."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Put a blank line above `Args:`, `Returns:` and `Raises:`."""
        if obj.docstring:
            text = re.sub(r"\n+(?=(?:Args|Returns|Raises):\n)", "\n\n", obj.docstring.value)
            obj.docstring.value = text

    def on_class(self, *, cls: griffe.Class, **_: object) -> None:
        """Put `Attributes:` above the lines `name: text` in which a record's docstring lists its fields."""
        if not cls.docstring:
            return
        fields = {name for name, member in cls.members.items() if member.is_attribute}
        parts = []
        for part in cls.docstring.value.split("\n\n"):
            lines = part.split("\n")
            heads = [re.match(r"((?:\w+, )*\w+): ", line) for line in lines if not line.startswith(" ")]
            named = [name for head in heads if head for name in head[1].split(", ")]
            if all(heads) and named and set(named) <= fields:
                part = "Attributes:\n" + "\n".join("    " + line for line in lines)
            parts.append(part)
        cls.docstring.value = "\n\n".join(parts)
