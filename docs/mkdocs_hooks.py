"""mkdocs hooks that make links from docs/ to other files of the repository work on the site as on GitHub.

Cards, pages of tables and pictures in model_cards/ become part of the site, and so do the documents of the root.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
AROUND = ("CHANGELOG.md", "CONTRIBUTING.md", "tests/survival/table.md")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures of model_cards/, and AROUND."""
    found = [path for kind in ("md", "png") for path in (ROOT / "model_cards").rglob(f"*.{kind}")]
    for path in [*found, *(ROOT / name for name in AROUND)]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change links to `../FILE` so that they lead to the added files; the page of a folder is its README.md."""
    if "/" in page.file.src_uri or page.file.src_uri in AROUND:
        return markdown
    markdown = re.sub(r"\]\(\.\./(model_cards/[\w-]+)/?\)", r"](\1/README.md)", markdown)
    return re.sub(r"\]\(\.\./", "](", markdown)
