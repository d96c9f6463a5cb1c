"""For mkdocs: pages and pictures outside of docs/ become part of the site, under links that work in the repository as well."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = (f"benchmarks/results/*.{kind}" for kind in ("md", "png", "json"))
OUTSIDE = ("*.md", "LICENSE", "scripts/README.md", "benchmarks/README.md", *RESULTS)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them under their paths in the repository, all but the README: the site begins with docs/index.md."""
    root = Path(config.config_file_path).parent
    for path in sorted(path for pattern in OUTSIDE for path in root.glob(pattern)):
        name = path.relative_to(root).as_posix()
        if name != "README.md":
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages: docs/ is the root of the site."""
    here = page.file.src_uri
    in_repository = here if page.file.generated_by else f"docs/{here}"

    def moved(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), link[1]))
        target = "index.md" if target == "README.md" else target.removeprefix("docs/")
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}"

    return re.sub(r"\]\((?!\w+:)([^)#\s]+)", moved, markdown)
