"""Puts the pictures that benchmarks draw beside the page that shows them, and reads the roles of docstrings."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the benchmarks' pictures to the site."""
    for picture in sorted(Path(config.config_file_path).parent.glob("benchmarks/*.png")):
        files.append(File.generated(config, picture.name, abs_src_path=str(picture)))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Show what docstrings mark as ``:class:`~package.Name` `` or ``:math:`x` `` as code, without the mark."""
    return re.sub(r":(?:class|func|meth|data|math):(<code>)~?(?:lightning_prune\.)?", r"\1", html)
