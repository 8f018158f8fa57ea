"""What people and programs call: the command line `heartmula` and the Python client."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import click
import msgspec

import heartmula_client
from heartmula_client.cli.commands import cli
from heartmula_client.cli.runtime import ExitStatus


async def commands() -> Any:
    """Every command of `heartmula` with its arguments and options, and the exit codes."""
    return {
        "common": _parameters(cli),
        "commands": {name: _parameters(command) for name, command in sorted(cli.commands.items())},
        "exit codes": {
            "failed": ExitStatus.FAILED,
            "away": ExitStatus.UNAVAILABLE,
            "refused": ExitStatus.REFUSED,
            "interrupted": ExitStatus.INTERRUPTED,
        },
    }


_ORDINARY = {"required": False, "nargs": 1, "multiple": False, "envvar": None, "is_flag": False}


def _parameters(command: click.Command) -> Any:
    """Arguments and options by what is typed; of each its type and what is not ordinary."""
    found = {}
    for parameter in command.params:
        described = parameter.to_info_dict()
        special = {name: described[name] for name, usual in _ORDINARY.items() if described.get(name, usual) != usual}
        if isinstance(parameter.default, str | int | float):
            special["default"] = parameter.default
        kind = {name: value for name, value in described["type"].items() if name != "name"}
        typed = " ".join([*parameter.opts, *parameter.secondary_opts])
        found[typed] = {"kind": described["param_type_name"], **kind, **special}
    return found


async def python_client() -> Any:
    """Every public name of the Python client, with its parameters or fields."""
    return {name: _described(getattr(heartmula_client, name)) for name in sorted(heartmula_client.__all__)}


def _described(thing: Any) -> Any:
    if get_origin(thing) is Literal:
        return get_args(thing)
    if not isinstance(thing, type):
        return thing
    if issubclass(thing, msgspec.Struct):
        fields = msgspec.structs.fields(thing)
        return {"fields": {each.encode_name: each.required for each in fields}, "members": _members(thing)}
    bases = [base.__name__ for base in thing.__mro__[1:-1]]
    return {"bases": bases, "parameters": _signature(thing), "members": _members(thing)}


def _members(kind: type) -> Any:
    ours = [base for base in reversed(kind.__mro__) if base.__module__.startswith("heartmula_client.")]
    members = {name: member for base in ours for name, member in vars(base).items()}
    return {
        name: _signature(member) if inspect.isroutine(member) else type(member).__name__
        for name, member in sorted(members.items())
        if not name.startswith("_") and not inspect.ismemberdescriptor(member)
    }


def _signature(called: Callable[..., Any]) -> list[str]:
    """Parameters without their types: `name`, `*`, `name=default`."""
    parameters = inspect.signature(called).parameters.values()
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
    return [f"{'* ' if each.kind is each.KEYWORD_ONLY else ''}{each}" for each in bare]
