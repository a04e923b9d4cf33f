"""The command line: ``python -m ppo_runtime`` or ``ppo-core``."""

import logging
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from ppo_runtime import __version__
from ppo_runtime.common.launcher import processes_started, speaks_for_all
from ppo_runtime.demo.options import DEFAULTS, EMBEDDED_LEARNING_RATE, LEARNING_RATE, settle

# Before torch is loaded: on a busy machine, threads that spin while they wait slow each other down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(add_completion=False, no_args_is_help=True, help="PPO for language models.")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ppo-core {__version__}")
        raise typer.Exit


@app.callback()
def _setup(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """PPO for language models."""
    _log_to_terminal()


def _log_to_terminal() -> None:
    level = logging.INFO if speaks_for_all() else logging.ERROR
    logging.basicConfig(
        level=level, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)]
    )
    for noisy in ("httpx", "datasets", "matplotlib", "fsspec"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))


def _else(name: str) -> str:
    return f"; {DEFAULTS[name]} if not given."


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="A transformers directory in place of the embedded model.", exists=True, file_okay=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write; runs/demo-<time> if not given.", file_okay=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help=f"Seed of everything random{_else('seed')}", min=0)] = None,
    steps: Annotated[int | None, typer.Option(help=f"PPO steps{_else('steps')}", min=1)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Continuations per step, an even number{_else('batch_size')}", min=2)
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help=f"Tokens per continuation, at most{_else('new_tokens')}", min=1)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"Adam's; {EMBEDDED_LEARNING_RATE} embedded, else {LEARNING_RATE}.")
    ] = None,
    target: Annotated[float | None, typer.Option(help=f"KL to hold, nats per continuation{_else('target')}")] = None,
    accel: Annotated[
        str | None,
        typer.Option(help=f"Packed weights: auto, eager, onednn; or ipex or compile, or not at all{_else('accel')}"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output, with the options that it was begun with.")
    ] = False,
) -> None:
    """Make a language model's prose more cheerful; under three minutes on two CPU cores."""
    given = {
        "model": model,
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "new_tokens": new_tokens,
        "learning_rate": learning_rate,
        "target": target,
        "accel": accel,
    }
    _or_exit(_demo, given, output, resume)


def _now() -> datetime:
    """The time, the same on all ranks, whose output is one directory."""
    if processes_started() == 1:
        return datetime.now()
    from ppo_runtime.ranks.agreement import agree_largest
    from ppo_runtime.ranks.world import world_from_environment

    return datetime.fromtimestamp(agree_largest(int(time.time()), world_from_environment()))


def _agreed() -> AbstractContextManager[Any]:
    """A block whose errors are those of all ranks; torch is not loaded for it where there is one process."""
    if processes_started() == 1:
        return nullcontext()
    from ppo_runtime.ranks.agreement import all_or_none
    from ppo_runtime.ranks.world import world_from_environment

    return all_or_none(world_from_environment(), phase="the check of the options")


def _demo(given: dict[str, Any], output: Path | None, resume: bool) -> None:
    now = None if output else _now()
    with _agreed():
        if resume and output is None:
            raise ValueError("--resume is given without --output, expected the directory of the run to go on with")
        output = output or Path("runs") / f"demo-{now:%Y%m%d-%H%M%S}"
        options = settle(given, output=output, resume=resume)
    from ppo_runtime.demo.run import run_demo

    run_demo(options, Console())


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A .gguf file, or a wheel that carries one.")],
    output: Annotated[Path, typer.Argument(help="The transformers directory to make.")],
) -> None:
    """Convert a GGUF language model to safetensors, once; needs neither accelerate nor llama.cpp."""
    from ppo_runtime.models.gguf import convert_gguf

    _or_exit(convert_gguf, source, output)
    Console().print(Text.assemble("Wrote ", (str(output), "bold")))


@app.command()
def doctor() -> None:
    """What is installed, tested and working; exit code 0 if the demo can run."""
    from ppo_runtime.doctor import report

    raise typer.Exit(report(Console()))


def _or_exit(command: Any, *args: Any) -> None:
    """Run it; an error that explains itself needs no traceback."""
    from ppo_runtime.accel.backends import AccelError
    from ppo_runtime.ranks.presence import is_agreed

    try:
        command(*args)
    except (ValueError, TypeError, ImportError, OSError, AccelError) as error:
        # Text, since rich would take the brackets of "ppo-core[ipex]" or of a path for markup.
        if speaks_for_all() or not is_agreed(error):  # the first rank says what all have found
            rank = "" if speaks_for_all() else f"rank {os.environ['RANK']}: "
            Console(stderr=True).print(Text.assemble(rank, ("error:", "red"), f" {error}"))
        raise typer.Exit(2) from error


def main() -> None:
    """Entry point."""
    _start(app, "ppo-core" if Path(sys.argv[0]).name != "__main__.py" else "python -m ppo_runtime")


def demo_main() -> None:
    """The demo alone, as ``python -m ppo_runtime.demo``."""
    _log_to_terminal()
    alone = typer.Typer(add_completion=False)
    alone.command()(demo)
    _start(alone, "python -m ppo_runtime.demo")


def _start(commands: typer.Typer, name: str) -> None:
    """Run the command of this process's command line, of whose misuse the first rank tells: it is that of all ranks."""
    try:
        sys.exit(commands(prog_name=name, standalone_mode=speaks_for_all()))
    except _UsageError:
        sys.exit(2)


if __name__ == "__main__":
    main()
