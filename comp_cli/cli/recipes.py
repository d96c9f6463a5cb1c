"""Options from a TOML file: `--recipe FILE`, or `[tool.comp]` of a pyproject.toml. What is typed goes first.

A table for each command, with its options without their dashes; what stands before the tables is for every command that has
such an option. Relative paths start at the folder of the file.
"""

import inspect
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, get_args

import typer

from .. import api
from ..errors import UsageError
from ..option_values import EMPTY_IS_NONE, check_text, expected, fits, members
from ..options import BUILT_IN
from .output import Output

LIMIT = 2**20  # bytes of a file
PYPROJECT = "pyproject.toml"
NOT_UNASKED = ("allow_pickle", "push_to_hub")  # what a folder that somebody else wrote may not decide
FUNCTIONS = {"env": "environment"}  # of the library, where they are not called as their commands
META = "comp_cli.recipe"  # where a context keeps the name of the file


@dataclass(frozen=True)
class Place:
    """A file with options.

    shown: its name in messages. folder: where its paths start, "" for the current one. table: that holds the options, for
    example "tool.comp"; "" for the whole file. asked: whether it was named on the command line.
    """

    shown: str
    folder: str
    table: str
    asked: bool

    def name(self, *keys: str) -> str:
        """A table as TOML has it, with the file: "comp.toml, [prune]"."""
        path = ".".join(filter(None, (self.table, *keys)))
        return f"{self.shown}, [{path}]" if path else self.shown


class Given(NamedTuple):
    """A value as the parser takes it, and where it stands."""

    value: Any
    where: str


def follow(ctx: typer.Context, path: Path | None) -> Path | None:
    """The callback of --recipe, which the parser calls before it reads other options: they find their defaults here. Raises
    typer.BadParameter where the file cannot be read, or holds what this command line has not."""
    if ctx.resilient_parsing:  # a shell asks for completions
        return path
    try:
        found = open_recipe(path) if path is not None else open_project()
        if found is not None:
            place, content = found
            chosen = read(place, content, ctx)
            ctx.default_map = {name: one.value for name, one in chosen.items()}
            ctx.meta[META] = place, {name: one.where for name, one in chosen.items()}
            Output.asked = Output.asked or ("json" if ctx.default_map.get("as_json") else ctx.default_map.get("form", ""))
    except UsageError as refused:
        hint = None if path is not None else PYPROJECT
        raise typer.BadParameter(refused.message, ctx=ctx, param_hint=hint) from None
    return path


def followed(ctx: typer.Context) -> dict[str, str]:
    """The parameters that have their values from a file, and where those stand: "comp.toml, [prune], ratio"."""
    _, places = ctx.meta.get(META, (None, {}))
    sources = {name: ctx.get_parameter_source(name) for name in places}
    return {name: places[name] for name, found in sources.items() if found is not None and found.name == "DEFAULT_MAP"}


def file_of(ctx: typer.Context) -> Place:
    """The file that a command follows, where it follows one."""
    place: Place = ctx.meta[META][0]
    return place


def open_recipe(path: Path) -> tuple[Place, dict[str, Any]]:
    """The file that was named. Raises UsageError where it cannot be read."""
    path = path.expanduser()
    parent = str(path.parent)
    return Place(str(path), "" if parent == "." else parent, "", True), load(path)


def open_project() -> tuple[Place, dict[str, Any]] | None:
    """The next pyproject.toml that has a table [tool.comp]: in the current folder or above it, up to the root of a repository.
    None where there is none. Raises UsageError for one that cannot be read."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # which the command will say
        return None
    for folder in (here, *here.parents):
        path = folder / PYPROJECT
        if path.is_file():
            up = os.path.relpath(folder, here)
            shown = os.path.join("" if up == "." else up, PYPROJECT)
            tool = load(path, shown).get("tool")
            found = tool.get("comp") if isinstance(tool, dict) else None
            if found is not None and not isinstance(found, dict):
                raise UsageError(f"{shown}, tool.comp: expected a table.")
            if found is not None:
                return Place(shown, "" if up == "." else up, "tool.comp", False), found
        if (folder / ".git").exists():
            return None
    return None


def load(path: Path, shown: str | None = None) -> dict[str, Any]:
    """What a TOML file holds. Raises UsageError where it is none, or cannot be read."""
    about = shown or str(path)
    try:
        if path.exists() and not path.is_file() and path != Path(os.devnull):
            raise UsageError(f"{about}: not a file.")
        with path.open("rb") as file:
            content = file.read(LIMIT + 1)
        if len(content) > LIMIT:
            raise UsageError(f"{about}: larger than {LIMIT // 2**20} MiB, which no recipe is.")
        return tomllib.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{about}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{about}: not valid TOML ({error}).") from None


def read(place: Place, content: dict[str, Any], ctx: typer.Context) -> dict[str, Given]:
    """What the file says of the parameters of the command that runs, by their names. All that stands in it is looked at.

    Raises UsageError for a table or a key that no command has, twice the same, and values of other types than the option's."""
    group: Any = ctx.parent.command if ctx.parent else None
    commands = dict(group.commands)
    chosen: dict[str, Given] = {}
    shared = {key: value for key, value in content.items() if not isinstance(value, dict)}
    own = ctx.command.name
    if unknown := [key for key in content if key not in shared and key not in commands]:
        raise UsageError(f"{place.name(unknown[0])}: no such table{nearest(unknown[0], list(commands))}")
    every = {key for command in commands.values() for key in options(command)}
    for key, value in shared.items():
        if key in commands:
            raise UsageError(f"{place.name()}, {key}: expected a table, found {kind(value)}.")
        if plain(key) not in every:
            raise UsageError(f"{place.name()}, {key}: no such option{nearest(plain(key), every)}")
    for name, command in commands.items():
        found = dict(values(place, (name,), content.get(name, {}), command))
        if name == own:
            known = options(command)
            usable = {key: value for key, value in shared.items() if plain(key) in known}
            chosen = dict(values(place, (), usable, command)) | found
    return chosen


def values(place: Place, keys: tuple[str, ...], table: dict[str, Any], command: Any) -> Iterator[tuple[str, Given]]:
    """Names and values of a command's parameters, of one table. Raises UsageError as `read` does."""
    known = options(command)
    seen: dict[str, str] = {}
    for key, value in table.items():
        about = f"{place.name(*keys)}, {key}"
        if plain(key) not in known:
            raise UsageError(f"{about}: comp {command.name} has no such option{nearest(plain(key), known)}")
        parameter, turned = known[plain(key)]
        if parameter.name in seen:
            raise UsageError(f"{about}: {seen[parameter.name]} says it already.")
        seen[parameter.name] = key
        if parameter.name in NOT_UNASKED and not place.asked:
            raise UsageError(f"{about}: only the command line and a recipe that it names decide this.")
        checked = convert(about, value, parameter, command, place.folder)
        yield parameter.name, Given(not checked if turned else checked, about)


def options(command: Any) -> dict[str, tuple[Any, bool]]:
    """The parameters of a command by their keys, such as "num-samples" or "model", and whether a key says their opposite."""
    found: dict[str, tuple[Any, bool]] = {}
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            found[plain(parameter.name)] = parameter, False
        elif parameter.name not in ("recipe", "help"):
            found |= {option[2:]: (parameter, False) for option in parameter.opts if option.startswith("--")}
            found |= {option[2:]: (parameter, True) for option in parameter.secondary_opts}
    return found


def convert(about: str, value: Any, parameter: Any, command: Any, folder: str) -> Any:
    """A value as the parser takes it from the command line: lists as text with commas, paths from the folder of the file on.
    Raises UsageError where its type is not one that the function of the library takes."""
    annotation, typed = annotations(command, parameter)
    if not fits(value, annotation):
        raise UsageError(f"{about}: expected {expected(annotation).lower()}, found {kind(value)}.")
    if isinstance(value, list) and not parameter.multiple:
        if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in value):
            raise UsageError(f"{about}: expected a list of texts or numbers.")
        value = ",".join(map(str, value))
    if isinstance(value, str):
        check_text(about, value, may_be_empty=parameter.name in EMPTY_IS_NONE)
        if os.PathLike in members(annotation):
            return from_folder(value, folder, certain=Path in typed)
    return str(value) if str in typed and not isinstance(value, str | list) else value


def annotations(command: Any, parameter: Any) -> tuple[Any, tuple[Any, ...]]:
    """What the library says that a parameter may be, and the types that the command line has for it. Options of the terminal,
    which the library lacks, are what the command line says."""
    said = inspect.signature(command.callback).parameters[parameter.name].annotation
    typed = members(get_args(said)[0])
    function = inspect.signature(getattr(api, FUNCTIONS.get(command.name, command.name)))
    known = function.parameters.get(parameter.name)
    return (bool if bool in typed else str) if known is None else known.annotation, typed


def from_folder(path: str, folder: str, *, certain: bool) -> str:
    """A path that starts at a folder. certain: whether it is one; else it may be a name on the hub, and is taken for a path
    where something lies there, or where it begins with a dot or ends with a slash."""
    there = os.path.join(folder, os.path.expanduser(path))
    looks_so = path.startswith((".", "~")) or path.endswith("/") or os.path.exists(there)
    return there if certain or (looks_so and path not in BUILT_IN) else path


def plain(key: str) -> str:
    """A key as options are spelled: num_samples is num-samples."""
    return key.replace("_", "-")


def kind(value: Any) -> str:
    """What a value is called in TOML, with the value where it is short."""
    named = {bool: "a boolean", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a table"}
    return f"{named.get(type(value), 'a date or time')}" + (f" ({value!r})" if isinstance(value, str | float | int) else "")


def nearest(key: str, known: Any) -> str:
    """The end of a sentence about a name that is none."""
    found = get_close_matches(key, sorted(known), n=1)
    return f". Did you mean {found[0]}?" if found else "."
