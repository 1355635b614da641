"""Puts the pictures that benchmarks draw beside the page that shows them."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the benchmarks' pictures to the site."""
    for picture in sorted(Path(config.config_file_path).parent.glob("benchmarks/*.png")):
        files.append(File.generated(config, picture.name, abs_src_path=str(picture)))
    return files
