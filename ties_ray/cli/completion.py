"""Shell completion of files, names of methods, and fields of a recipe."""

import typing
from collections.abc import Iterator
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem[str]]":
    """Let the shell complete a path; a URI stays as it is."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def methods(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of methods that begin with the incomplete word."""
    from ties_ray import plugins

    return [name for name in plugins.names("methods") if name.startswith(incomplete)]


def executors(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of executors that begin with the incomplete word."""
    from ties_ray import plugins

    return [name for name in sorted(["auto", *plugins.names("executors")]) if name.startswith(incomplete)]


def fields(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the fields of a recipe that begin so, each with its choices or its default: `method.density=0.2`."""
    return sorted(field for field in set(_fields()) if field.startswith(incomplete))


def _fields() -> Iterator[str]:
    from ties_ray import plugins
    from ties_ray.methods import Method
    from ties_ray.outputs import Output
    from ties_ray.recipe.problems import SECTIONS
    from ties_ray.stores import store_class

    for section in ("base", "allow", "bounds", "run"):
        yield from _of_section(section, SECTIONS[section])
    for name in plugins.names("methods"):
        yield from _of_section("method", plugins.load("methods", name, Method))
    for kind in plugins.names("outputs"):
        yield from _of_section("output", plugins.load("outputs", kind, Output))
    for scheme in plugins.names("stores"):
        yield from _of_section(f"storage.{scheme}", store_class(scheme).options)


def _of_section(section: str, model: "type[BaseModel]") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield from (f"{section}.{field.alias or name}={value}" for value in _values(field))


def _values(field: "FieldInfo") -> list[str]:
    """Return the choices of a field, else its default, else the empty text."""
    choices = list(_choices(field.annotation))
    if choices:
        return choices
    default: Any = field.default
    if hasattr(default, "human_readable"):  # a size in bytes
        return [default.human_readable()]
    return [str(default)] if isinstance(default, str | int | float) else [""]


def _choices(annotation: Any) -> Iterator[str]:
    if annotation is bool:
        yield from ("true", "false")
    elif typing.get_origin(annotation) is Literal:
        yield from map(str, typing.get_args(annotation))
    elif typing.get_origin(annotation) in (UnionType, typing.Union):
        for each in typing.get_args(annotation):
            yield from _choices(each)
