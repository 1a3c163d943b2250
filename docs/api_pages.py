"""Writes the pages of the API reference and of the settings, from the source alone.

`pages()` imports nothing of mdt_jax: it reads `__all__`, definitions and comments from
the syntax trees of the modules. A page of the reference holds directives of
mkdocstrings (`::: mdt_jax.models.mdt`), which docs/site_hooks.py gives to MkDocs.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "mdt_jax"
# Page -> what stands on it: packages with all of their modules, and modules.
PAGES = {
  "models": ("Networks", "models"),
  "diffusion": ("Processes and samplers", "diffusion"),
  "objectives": ("Objectives", "objectives"),
  "data": ("Data", "data"),
  "training": ("Training", "training"),
  "optimizers": ("Optimizers", "optimizers parameter_groups clipping"),
  "sharding": ("Sharding", "sharding chips gpus"),
  "sampling": ("Sampling", "sampling"),
  "evaluation": ("Evaluation", "evaluation"),
  "pretrained": ("Pretrained weights", "pretrained"),
  "checkpoints": ("Checkpoints", "checkpoints"),
  "planning": ("Planning", "planning"),
  "build": (
    "Settings and objects of a run",
    "experiment builders settings setting_groups config recipes train_state "
    "own_parts typed_config setting_limits attention_choice",
  ),
  "basics": (
    "Errors, files and types",
    "errors types paths buckets atomic sizes logs exit_codes",
  ),
}
# Commands, whose flags `--help` lists, their common code, and an old name.
COMMANDS = {"main", "sample", "evaluate", "encode", "convert", "plan", "demo"}
LEFT_OUT = COMMANDS | {"cli", "configs", "conversion", "interrupts"}


@dataclasses.dataclass(frozen=True)
class Name:
  """A public name: where it is imported from, and the module that defines it."""

  name: str
  module: str
  definition: str

  @property
  def path(self) -> str:
    return f"{self.definition}.{self.name}"


def _file_of(module: str) -> Path:
  path = ROOT.joinpath(*module.split("."))
  return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _tree(module: str) -> ast.Module:
  return ast.parse(_file_of(module).read_text())


def modules(part: str) -> list[str]:
  """Returns the public modules of a package, the package first, or the module."""
  path = ROOT / PACKAGE / part
  found = [f"{PACKAGE}.{part}"]
  if path.is_dir():
    names = sorted(file.stem for file in path.glob("[!_]*.py"))
    found += [f"{PACKAGE}.{part}.{name}" for name in names]
  return found


def all_names(module: str) -> list[Name]:
  """Returns the names in `__all__` of a module, and the modules that define them."""
  tree = _tree(module)
  listed: list[str] = []
  defined_in: dict[str, str] = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
      for alias in node.names:
        defined_in.setdefault(alias.asname or alias.name, node.module)
    elif isinstance(node, ast.Assign) and any(
      isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
    ):
      listed = ast.literal_eval(node.value)
  homes = {name: _follow(name, imported) for name, imported in defined_in.items()}
  return [Name(name, module, homes.get(name, module)) for name in listed]


def _follow(name: str, module: str) -> str:
  """Returns the module that defines a name which `module` may import from another."""
  if _file_of(module).name != "__init__.py":
    return module
  return {n.name: n.definition for n in all_names(module)}.get(name, module)


def definitions(module: str) -> list[str]:
  """Returns the public classes, functions and constants that a module defines."""
  found = []
  for node in _tree(module).body:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
      found.append(node.name)
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
      targets = node.targets if isinstance(node, ast.Assign) else [node.target]
      found += [target.id for target in targets if isinstance(target, ast.Name)]
  return [name for name in dict.fromkeys(found) if not name.startswith("_")]


def pages() -> dict[str, str]:
  """Returns the text of each generated page, by its path in the site."""
  found = {"api/index.md": _index(), "settings.md": settings_page()}
  for page, (title, parts) in PAGES.items():
    text = [f"# {title}\n"]
    for part in parts.split():
      for module in modules(part):
        text += _module(module)
    found[f"api/{page}.md"] = "\n".join(text)
  return found


def _module(module: str) -> Iterator[str]:
  names = all_names(module) if _file_of(module).name == "__init__.py" else []
  own = definitions(module)
  if names:
    yield f"## `{module}`\n"
    yield (ast.get_docstring(_tree(module)) or "") + "\n"
    yield "Names to import: " + ", ".join(map(_link, names)) + ".\n"
  elif own:
    yield f"::: {module}\n"


def _link(name: Name) -> str:
  return f"[`{name.name}`][{name.path}]"


def _index() -> str:
  """The names of `mdt_jax`, and where everything else is."""
  text = [
    "# API reference",
    "",
    "`import mdt_jax` gives these names. Shapes in signatures are jaxtyping's:",
    '`Float[Array, "B H W C"]` is an array of floats with four axes.',
    "",
    "| name | defined in |",
    "| --- | --- |",
  ]
  for name in all_names(PACKAGE):
    if name.definition == PACKAGE:
      text.append(f"| `{name.name}` | `{PACKAGE}` |")
    else:
      text.append(f"| {_link(name)} | `{name.definition}` |")
  text += [
    "",
    "`mdt_jax.__version__` is the version of the package. All other public names:",
    "",
  ]
  for page, (title, parts) in PAGES.items():
    listed = ", ".join(f"`{PACKAGE}.{part}`" for part in parts.split())
    text.append(f"- [{title}]({page}.md): {listed}")
  text += ["", "The [settings](../settings.md) have a page of their own."]
  return "\n".join(text)


@dataclasses.dataclass(frozen=True)
class Setting:
  """A setting: its name after `config.`, its type, default and comment."""

  name: str
  type: str
  default: str
  comment: str


def _classes() -> dict[str, tuple[ast.ClassDef, dict[int, str]]]:
  """The classes of settings, each with the comments of its file by line."""
  found = {}
  for module in (*modules("setting_groups"), f"{PACKAGE}.settings"):
    path = _file_of(module)
    with tokenize.open(path) as file:
      comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(file.readline)
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
      }
    for node in _tree(module).body:
      if isinstance(node, ast.ClassDef) and node.name.endswith("Settings"):
        found[node.name] = node, comments
  return found


def settings() -> dict[str, list[Setting]]:
  """Returns the settings by group; those without a group are in the group ""."""
  classes = _classes()
  found = {"": list(_settings_of(*classes["Settings"], ""))}
  for setting in found[""]:
    if setting.type in classes:
      group = list(_settings_of(*classes[setting.type], f"{setting.name}."))
      found[setting.name] = group
  found[""] = [setting for setting in found[""] if setting.type not in classes]
  return found


def _settings_of(
  node: ast.ClassDef, comments: dict[int, str], prefix: str
) -> Iterator[Setting]:
  comment = ""
  for field in node.body:
    if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
      continue
    lines = []
    line = field.lineno - 1
    while line in comments:
      lines.insert(0, comments[line])
      line -= 1
    # Settings that follow one another without a comment share the one above.
    comment = " ".join(lines) or comment
    default = ast.unparse(field.value) if field.value else ""
    kind = ast.unparse(field.annotation)
    yield Setting(f"{prefix}{field.target.id}", kind, default, comment)


def settings_page() -> str:
  """The settings of a run, as tables."""
  text = [
    "# Settings",
    "",
    "In a config file, a setting is `config.NAME = VALUE`; on the command line it is",
    "`--config.NAME=VALUE`. This page is made from the comments of",
    "[`mdt_jax/settings.py`](../mdt_jax/settings.py) and",
    "[`mdt_jax/setting_groups/`](../mdt_jax/setting_groups/__init__.py). A default of",
    "None in `model` means the value of the preset that `config.model.name` chooses.",
    "",
  ]
  for group, members in settings().items():
    text += [f"## {group or 'Without a group'}", ""]
    text += ["| `config.` | default | meaning |", "| --- | --- | --- |"]
    for setting in members:
      cells = (f"`{setting.name}`", f"`{setting.default}`", _plain(setting.comment))
      text.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    text.append("")
  return "\n".join(text)


def _plain(text: str) -> str:
  """Escapes what Markdown would format, outside code spans."""
  parts = text.split("`")
  for character in "*<[":
    parts[::2] = [part.replace(character, f"\\{character}") for part in parts[::2]]
  return "`".join(parts)
