"""The command line: `fastapd demo`, `fastapd run`, `fastapd plan`, `fastapd info`.

Nothing heavy is imported before the command is known: the environment must be set before torch loads its threads.
Annotations are evaluated here, not kept as text: tyro reads those of `_run`'s options, whose types are local names.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from fastapd.config import RunConfig

HELP = """usage: fastapd COMMAND [OPTIONS]

  fastapd demo                     train toy models of superposition, decompose them, show that it worked (a minute)
  fastapd run NAME|FILE [OPTIONS]  run an experiment with the paper's settings, or a config file; `run` alone lists them
  fastapd plan NAME|FILE [OPTIONS] how a step of that run computes attributions, and what it costs; runs nothing
  fastapd info                     versions, devices, native modules, and which backend runs each op and why

Each command takes --help. Exit status: 0 done, 1 nothing was recovered, 2 wrong input, 130 interrupted.
"""


@dataclass
class Demo:
    """Train toy models of superposition (5 features in 2 dimensions), decompose them all at once, show the result.

    The settings are the paper's but for the batch (256 instead of 2048) and a cosine schedule.
    """

    seed: int = 0
    """Seed of every random number."""
    instances: int = 12
    """How many independent targets are decomposed in one batched run."""
    steps: int = 20_000
    """Optimisation steps; below about 12,000 most runs end unrecovered."""
    batch: int = 256
    """Samples per step and instance."""
    out: Path | None = None
    """Run directory; runs/demo, runs/demo-2, ... if not given."""
    threads: int = 1
    """Threads of a step; its operations are too small to be worth sharing."""
    progress: bool = True
    """Whether to show progress bars."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    # Shared cores make spinning OpenMP threads many times slower than sleeping ones; the user's own setting wins.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    commands = {"demo": _demo, "run": _run, "plan": _plan, "info": _info}
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if args else 2
    if args[0] == "--version":
        import fastapd

        print(f"fastapd {fastapd.__version__}")
        return 0
    if args[0] not in commands:
        print(
            f"fastapd: command must be one of {', '.join(commands)}, got {args[0]!r}\n\n{HELP}", end="", file=sys.stderr
        )
        return 2
    from fastapd._env import SettingError
    from fastapd.config import ConfigError
    from fastapd.training import DivergedError

    try:
        return commands[args[0]](args[1:])
    except (ConfigError, SettingError, FileExistsError, FileNotFoundError, NotImplementedError, DivergedError) as error:
        print(f"fastapd: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has gone; so is the place to say it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nfastapd: interrupted; the run directory's status.json says how far it came", file=sys.stderr)
        return 130


def _demo(args: list[str]) -> int:
    import tyro

    from fastapd.experiments import get

    options = tyro.cli(Demo, args=args, prog="fastapd demo")
    paper = get("tms_5-2").model_dump()
    paper |= {"seed": options.seed, "n_instances": options.instances, "steps": options.steps, "batch": options.batch}
    paper["optimiser"]["schedule"] = "cosine"
    from fastapd.config import parse

    return _experiment(parse(paper, "fastapd demo"), options.out, "demo", options.threads, options.progress)


def _run(args: list[str]) -> int:
    import tyro

    from fastapd.config import RunConfig

    if not args or args[0] in ("-h", "--help"):
        return _names("run", args)
    default = _settings(args[0])

    @dataclass
    class Run:
        """Run an experiment: train its target, decompose it, check the result, write a report."""

        config: Annotated[RunConfig, tyro.conf.arg(name="")]
        out: Path | None = None
        """Run directory; runs/NAME, runs/NAME-2, ... if not given."""
        threads: int | None = None
        """Threads of a step; none: as many as torch takes."""
        progress: bool = True
        """Whether to show progress bars."""

    options = tyro.cli(
        Run, args=args[1:], default=Run(default), prog=f"fastapd run {args[0]}", config=(tyro.conf.AvoidSubcommands,)
    )
    return _experiment(options.config, options.out, None, options.threads, options.progress)


def _experiment(config: "RunConfig", out: Path | None, name: str | None, threads: int | None, progress: bool) -> int:
    import torch

    import fastapd
    from fastapd import backends, report
    from fastapd.config import ConfigError
    from fastapd.experiments._run import run_experiment

    started = time.perf_counter()
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"config: threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    running = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    print(f"fastapd {fastapd.__version__}   torch {torch.__version__}   {running}   seed {config.seed}")
    scores = torch.zeros(1, 1, 1)
    forced = backends.forced_backends() or backends.BACKENDS
    native = "cpu" in forced and not backends.explain("batch_topk", scores, 1)["cpu"]
    print(f"backend        {'CPU kernels' if native else 'plain PyTorch reference'} (`fastapd info` explains)")
    outcome = run_experiment(config, out, name, progress and sys.stderr.isatty(), print)
    check = outcome.check
    print(report.format_table(check.columns, check.rows))
    print(f"\nrecovered {check.recovered} of {check.n} instances")
    print(f"  {check.rule}")
    print(f"\npictures       {outcome.directory / 'figures'}")
    print(f"report         {outcome.directory / 'report.html'}")
    print(f"took           {time.perf_counter() - started:.0f} s")
    return 0 if check.recovered else 1


def _names(command: str, args: list[str]) -> int:
    """What may stand behind a command: the registered experiments."""
    from fastapd.experiments import registered

    print(f"usage: fastapd {command} NAME|FILE.yaml [OPTIONS]     (fastapd {command} NAME --help lists the options)\n")
    for name, known in registered().items():
        size = f"C {known.n_components}, {known.n_instances} instances, {known.steps} steps of {known.batch}"
        print(f"  {name:12s} {size}")
    return 0 if args else 2


def _settings(name: str) -> "RunConfig":
    """Of a registered experiment or a config file."""
    from fastapd.config import load
    from fastapd.experiments import get

    return load(name) if name.endswith((".yaml", ".yml")) or os.sep in name else get(name)


def _plan(args: list[str]) -> int:
    import tyro

    from fastapd.config import RunConfig

    if not args or args[0] in ("-h", "--help"):
        return _names("plan", args)
    flags = (tyro.conf.AvoidSubcommands,)
    config = tyro.cli(
        RunConfig, args=args[1:], default=_settings(args[0]), prog=f"fastapd plan {args[0]}", config=flags
    )
    from fastapd import _plan

    print("\n".join(_plan.lines(config)))
    return 0


def _info(args: list[str]) -> int:
    if args:
        known = args[0] in ("-h", "--help")
        print("usage: fastapd info", file=sys.stdout if known else sys.stderr)
        return 0 if known else 2
    from fastapd import _info

    print("\n".join(_info.lines()))
    return 0
