"""Hook of the site: the README's picture, which lies in figures/."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PICTURES = ("figures/attack_success.png",)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """`files` with the pictures that pages show."""
    for picture in PICTURES:
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files
