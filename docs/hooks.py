"""Puts the text and the pictures of the benchmarks on their pages, and reads the roles of docstrings."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SECTION = re.compile(r"^<!-- benchmarks/README\.md: (.+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the benchmarks' pictures to the site."""
    for picture in sorted(BENCHMARKS.glob("*.png")):
        files.append(File.generated(config, f"reproductions/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the sections of benchmarks/README.md where a page names them."""
    return SECTION.sub(lambda match: sections()[match[1]], markdown)


def sections() -> dict[str, str]:
    """Return the sections of benchmarks/README.md by heading; the first one without its heading."""
    first, *others = re.split(r"^## ", (BENCHMARKS / "README.md").read_text(), flags=re.MULTILINE)
    title, _, text = first.partition("\n")
    found = {title.removeprefix("# "): text.strip()}
    for other in others:
        found[other.partition("\n")[0]] = f"## {other.strip()}"
    return found


def on_page_content(html: str, **_: Any) -> str:
    """Show what docstrings mark as ``:class:`~package.Name` `` or ``:math:`x` `` as code, without the mark."""
    return re.sub(r":(?:class|func|meth|data|math):(<code>)~?(?:lightning_prune\.)?", r"\1", html)
