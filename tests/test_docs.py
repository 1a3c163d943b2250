"""The pages name what exists: links, commands, flags, settings and public names.

These tests parse the pages and the source; they run no command and compute nothing.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
  ROOT / "README.md",
  ROOT / "CONTRIBUTING.md",
  ROOT / "CHANGELOG.md",
  *sorted(DOCS.glob("*.md")),
]
# The changelog also names settings of earlier versions.
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]


def by_name(pages):
  return pytest.mark.parametrize("page", pages, ids=lambda page: page.stem)


@functools.cache
def api_pages():
  spec = importlib.util.spec_from_file_location("api_pages", DOCS / "api_pages.py")
  assert spec is not None and spec.loader is not None
  script = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = script  # its dataclass looks the module up
  spec.loader.exec_module(script)
  return script


@functools.cache
def public_names():
  """The dotted names that the pages of the reference document."""
  script = api_pages()
  text = "\n".join(script.pages().values())
  found = set()
  for module in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
    found |= {f"{module}.{name}" for name in script.definitions(module)}
  return found


def covered(module, name):
  """Whether the reference documents what `from module import name` imports."""
  found = {n.name: n.path for n in api_pages().all_names(module)}
  return found.get(name, f"{module}.{name}") in public_names()


@functools.cache
def anchors(page):
  """Returns the anchors that GitHub, and the site, give to the headings of a page."""
  text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
  headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
  kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
  return {heading.replace(" ", "-") for heading in kept}


@by_name(PAGES)
def test_links_lead_to_files_and_headings(page):
  for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    assert target.exists(), link
    assert not anchor or anchor in anchors(target), link


def _file_of(command):
  """The file that `python -m mdt_jax.COMMAND` runs."""
  path = ROOT / "mdt_jax" / command
  return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def flags_of(command):
  """The flags that a command defines, and those of all commands."""
  found = {"config", "help", "flagfile"}
  for path in (_file_of(command), ROOT / "mdt_jax/cli/__init__.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name = node.args[0] if node.args else None
        is_definition = node.func.attr.startswith(("DEFINE_", "define_alias"))
        if is_definition and isinstance(name, ast.Constant):
          found.add(name.value)
      elif isinstance(node, ast.For) and isinstance(node.iter, (ast.Tuple, ast.List)):
        # for alias, name in (("steps", "num_steps"), …): define_alias(alias, name)
        found |= {
          pair.elts[0].value
          for pair in node.iter.elts
          if isinstance(pair, ast.Tuple) and isinstance(pair.elts[0], ast.Constant)
        }
  return found


def commands(page):
  """Yields (command, flags) of each `python -m mdt_jax.COMMAND …` of a page."""
  text = page.read_text().replace("\\\n", " ")
  for command, rest in re.findall(r"python -m mdt_jax\.(\w+)([^`\n|]*)", text):
    yield command, re.findall(r"(?<=\s)--([\w.]+)", rest.partition(" #")[0])


@by_name(CURRENT)
def test_commands_have_the_flags_that_the_page_shows(page):
  for command, flags in commands(page):
    if command == "COMMAND":
      continue
    assert _file_of(command).exists(), command
    for flag in flags:
      name = flag.removeprefix("no") if flag.startswith("no") else flag
      accepted = flags_of(command)
      assert flag in accepted or name in accepted or flag.startswith("config."), (
        f"mdt_jax.{command} has no --{flag}"
      )


@functools.cache
def settings():
  groups = api_pages().settings()
  names = {setting.name for group in groups.values() for setting in group}
  return names | set(groups)


@by_name(CURRENT)
def test_settings_that_the_page_names_exist(page):
  text = page.read_text()
  named = set(re.findall(r"(?<![\w./_])config\.([a-z]\w*(?:\.[a-z]\w*)*)", text))
  methods = ("update", "json", "py", "yaml")
  for name in sorted(named):
    parts = [part for part in name.split(".") if part not in methods]
    in_group = parts and parts[0] in api_pages().settings()
    known = ".".join(parts[:2] if in_group else parts)  # not the keys of arguments
    assert not parts or known in settings(), f"config.{name}"


def expand(path):
  """Returns the paths of a pattern of bash such as configs/dit_{s,b}2.py."""
  match = re.search(r"{([^{}]*)}", path)
  if not match:
    return [path]
  options = match[1].split(",")
  before, after = path[: match.start()], path[match.end() :]
  return [each for option in options for each in expand(f"{before}{option}{after}")]


FOLDERS = "mdt_jax|tests|launch|benchmarks|docs|configs|colab"


@by_name(CURRENT)
def test_files_that_the_page_names_exist(page):
  text = page.read_text()
  named = set(re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./{{}},*-]+)", text))
  benchmarks = re.findall(r"-m benchmarks\.(\w+)", text)
  named |= {f"benchmarks/{name}.py" for name in benchmarks}
  for pattern in sorted(named):
    for path in expand(pattern.rstrip(".,")):
      # NAME is a file of the reader; mdt_jax/.venv is a folder of a TPU worker.
      if not re.search(r"[A-Z]{3}|…|^mdt_jax/(\.venv|launch|runs)", path):
        assert list(ROOT.glob(path)), path


def test_settings_page_lists_every_setting():
  from mdt_jax.config import default_config

  config = default_config()
  groups = api_pages().settings()
  found = set()
  for name, value in config.items():
    if name in groups:
      found |= {f"{name}.{member}" for member in value}
    else:
      found.add(name)
  listed = [setting for group in groups.values() for setting in group]
  assert {setting.name for setting in listed} == found
  assert [setting.name for setting in listed if not setting.comment] == []


def test_every_module_is_in_the_reference():
  script = api_pages()
  parts = {part for _, parts in script.PAGES.values() for part in parts.split()}
  modules = {
    path.stem
    for path in (ROOT / "mdt_jax").iterdir()
    if (path.suffix == ".py" or path.is_dir()) and not path.name.startswith("_")
  }
  assert modules - script.LEFT_OUT == parts


def test_every_name_in_all_is_in_the_reference():
  missing = []
  for path in sorted((ROOT / "mdt_jax").rglob("__init__.py")):
    module = ".".join(path.parent.relative_to(ROOT).parts)
    if module.removeprefix("mdt_jax.") in api_pages().LEFT_OUT:
      continue
    names = [name.name for name in api_pages().all_names(module)]
    missing += [f"{module}.{name}" for name in names if not covered(module, name)]
  assert missing == ["mdt_jax.__version__"]  # the overview explains this one


def python_blocks(page):
  text = re.sub(r"\n +```", "\n```", page.read_text())  # a block inside a list
  return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@by_name([page for page in CURRENT if python_blocks(page)])
def test_names_that_the_page_imports_are_in_the_reference(page):
  for block in python_blocks(page):
    for node in ast.walk(ast.parse(block)):
      if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mdt_jax"):
        for alias in node.names:
          path = ROOT.joinpath(*node.module.split("."), f"{alias.name}.py")
          assert path.exists() or covered(node.module, alias.name), alias.name
      elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "mdt_jax":
        inside = ROOT / "mdt_jax" / node.attr
        assert inside.is_dir() or covered("mdt_jax", node.attr), node.attr


def test_navigation_has_every_page():
  class Loader(yaml.SafeLoader):
    """Ignores the tags of Python objects in mkdocs.yml."""

  Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
  config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)

  def pages(entries):
    for entry in entries:
      for value in entry.values():
        yield from pages(value) if isinstance(value, list) else [value]

  listed = list(pages(config["nav"]))
  assert len(listed) == len(set(listed))
  generated = {"index.md", "changelog.md", "contributing.md", "settings.md"}
  in_docs = {page.name for page in DOCS.glob("*.md")}
  assert set(listed) == in_docs | generated | {"api/index.md"}
