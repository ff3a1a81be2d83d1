"""The command line. Nothing heavy is imported until a command needs it.

Exit codes: 0 done, 2 the user's mistake, 1 anything else. Messages go to standard error, results
to standard output. `--debug` shows the traceback behind a message.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from lowmem_cft import __version__
from lowmem_cft.cli import evaluate, machine, reproduce, train

app = typer.Typer(
    name="lowmem-cft",
    help="Fine-tune language models into sentence-embedding models on one small GPU.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

_state = {"debug": False}


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    _state["debug"] = debug


_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "plan": train.plan,
    "demo": train.demo,
    "eval": evaluate.evaluate_model,
    "compare": evaluate.compare,
    "export": train.export,
    "embed": evaluate.embed,
    "doctor": machine.doctor,
    "recipes": machine.recipes,
    "icl-search": evaluate.icl_search,
    "reproduce": reproduce.reproduce,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


_FLAGS = {"overrides": "--set", "sets": "--set-name", "stages": "--stage", "role": "--as"}
"""Arguments whose flags have other names."""


def with_flags(message: str) -> str:
    """An error of the library, which names arguments (`out`), with the flags that stand for them."""
    options = {
        parameter.name
        for command in typer.main.get_group(app).commands.values()
        for parameter in command.params
    } | _FLAGS.keys()

    def flag(quoted: re.Match[str]) -> str:
        name = quoted.group(1)
        if name not in options:
            return quoted.group()
        return _FLAGS.get(name, "--" + name.replace("_", "-"))

    return re.sub(r"`(\w+)`", flag, message)


def _report(error: BaseException, code: int) -> int:
    if _state["debug"]:
        raise error
    text = with_flags(str(error).strip()) or type(error).__name__
    known = isinstance(error, (ValueError, RuntimeError, OSError))
    prefix = "error" if known else f"unexpected {type(error).__name__}"
    suffix = "" if known else " (run again with --debug before the command for the traceback)"
    print(f"lowmem-cft: {prefix}: {text}{suffix}", file=sys.stderr)
    return code


def _exit_code(command: Callable[[], object]) -> int:
    try:
        command()
    except ValueError as error:
        return _report(error, 2)
    except KeyboardInterrupt:
        print("lowmem-cft: stopped", file=sys.stderr)
        return 1
    except Exception as error:  # the outermost door: a message, or all of it with --debug
        return _report(error, 1)
    return 0


def main() -> None:
    """Entry point of the `lowmem-cft` command."""
    sys.exit(_exit_code(app))
