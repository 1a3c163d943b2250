"""Hooks of MkDocs, named in mkdocs.yml, for the site that launch/docs.sh builds.

They add the pages that are not in docs/ (README, CONTRIBUTING, CHANGELOG, the settings
and the API reference), lead links to files of the repository to its address, and read
Markdown as GitHub does, so that a page looks the same in both places.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
import api_pages
from address import address

ROOT = Path(__file__).parents[1]
# File of the repository -> page of the site.
OUTSIDE = {
  "README.md": "index.md",
  "CONTRIBUTING.md": "contributing.md",
  "CHANGELOG.md": "changelog.md",
}
# What a browser would fetch from elsewhere when it opens a page.
FOREIGN = re.compile(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?https?://[^>]*>")
FOREIGN_STYLE = re.compile(
  r"<link[^>]*(?=[^>]*rel=\"?(?:stylesheet|preconnect))[^>]*https?://[^>]*>"
)


class _Indentation(Extension):
  """Nests lists by two spaces, as GitHub does; Python-Markdown needs four."""

  def extendMarkdown(self, md: Markdown) -> None:
    md.tab_length = 2
    md.build_parser()  # the parsers of lists read the length when they are built


def on_config(config: MkDocsConfig) -> None:
  # First, because building the parser anew drops what other extensions have added.
  config.markdown_extensions.insert(0, _Indentation())  # type: ignore[arg-type]
  pages = [{title: f"api/{page}.md"} for page, (title, _) in api_pages.PAGES.items()]
  for entry in config.nav or []:
    if "API reference" in entry:
      entry["API reference"] = [{"Overview": "api/index.md"}, *pages]


def on_files(files: Files, config: MkDocsConfig) -> None:
  texts = {page: (ROOT / name).read_text() for name, page in OUTSIDE.items()}
  for page, text in (texts | api_pages.pages()).items():
    files.append(File.generated(config, page, content=text))


def on_page_markdown(markdown: str, page: Page, files: Files, **_: object) -> str:
  source = {site: name for name, site in OUTSIDE.items()}.get(
    page.file.src_uri, f"docs/{page.file.src_uri}"
  )
  here = posixpath.dirname(page.file.src_uri)

  def lead(match: re.Match[str]) -> str:
    path, separator, anchor = match[1].partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    inside = OUTSIDE.get(target, target.removeprefix("docs/"))
    if files.get_file_from_path(inside):
      found = posixpath.relpath(inside, here or ".")
    elif (ROOT / target).exists():
      found = f"{address()}/blob/HEAD/{target}"
    else:
      return match[0]  # MkDocs reports the broken link
    return f"]({found}{separator}{anchor})"

  markdown = _graph_as_table(markdown)
  markdown = re.sub(r"\]\((?!https?:|mailto:|#)([^)\s]+)\)", lead, markdown)
  return "\n".join(_separate_lists(markdown))


def on_post_page(output: str, page: Page, **_: object) -> None:
  for pattern in (FOREIGN, FOREIGN_STYLE):
    if match := pattern.search(output):
      raise PluginError(f"{page.file.src_uri} loads {match[0]} from elsewhere")


def _separate_lists(markdown: str) -> Iterator[str]:
  """Puts an empty line before each list: Python-Markdown needs it, GitHub does not."""
  fence, before = "", ""
  for line in markdown.split("\n"):
    mark = re.match(r" *(```+|~~~+)", line)
    if mark and not fence:
      fence = mark[1]
    elif mark and mark[1].startswith(fence):
      fence = ""
    in_paragraph = re.match(r"(?![-#|<]|\d+\. )\S", before)
    if not fence and in_paragraph and re.match(r"(-|1\.) ", line):
      yield ""
    yield line
    before = line


def _graph_as_table(markdown: str) -> str:
  """Turns a Mermaid graph into a table: the script that draws one is on a CDN."""

  def table(match: re.Match[str]) -> str:
    imports: dict[str, list[str]] = {}
    for upper, lower in re.findall(r"(\w+) --> (\w+)", match[1]):
      imports.setdefault(upper, []).append(lower)
    rows = [f"| `{upper}` | {', '.join(x)} |" for upper, x in imports.items()]
    return "\n".join(["| part | imports |", "| --- | --- |", *rows])

  return re.sub(r"```mermaid\n(.*?)```", table, markdown, flags=re.DOTALL)
