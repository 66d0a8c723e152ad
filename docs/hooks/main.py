"""MkDocs' hooks of this site: the pages that are made from the code, and what no page may do.

Pages that are made are never written into the repository; a page that a link or the navigation
names and that is not made any more fails the build, which is strict.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import course
import figures
import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

# What a browser fetches by itself; links that a reader follows are no such thing.
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//[^>]*>"""
    r"""|<link\b(?![^>]*rel=["']?(?:canonical|next|prev|alternate))[^>]*href=["']?(?:https?:)?//[^>]*>"""
)

log = logging.getLogger("mkdocs.hooks.main")  # what MkDocs' strict mode listens to


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the notebooks into the navigation."""
    for section in config.nav or []:
        if isinstance(section, dict) and "Tutorial" in section:
            section["Tutorial"] += [f"tutorial/{path.stem}.md" for path in course.notebooks(ROOT)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    made = course.pages(ROOT) | reference.pages() | figures.files(Path(config.docs_dir))
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the figures where a page asks for them."""
    del config, files
    return figures.placed(markdown, page.file.src_uri.count("/"))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn of what a page would fetch from elsewhere."""
    del config
    for match in _FETCHED.finditer(output):
        log.warning("%s fetches from elsewhere: %s", page.file.src_uri, match[0])
    return output
