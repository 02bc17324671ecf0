"""The command `gristmill`: the stack, runs of flows, models and questions."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows import forget as forget_commands
from flows import keys as key_commands
from flows import sequence as sequence_command
from flows.doctor import examine, raise_open_files, report
from flows.processes import mind_signals
from flows.supervisor import ServiceStatus, Supervisor, tail
from tasks.runtime.errors import UserError
from tasks.runtime.progress import duration
from tasks.runtime.rest import Refused, call
from tasks.runtime.settings import Ports, Settings

QUESTION = "What does shutil.copytree do?"
SERVICES = ("prefect", "mlflow", "ray", "site", "worker", "serve", "watcher")
MAIN_PORTS = ("prefect", "mlflow", "ray_dashboard", "site", "serve")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A person's mistake is a sentence, not a traceback."""
    mind_signals()
    parsed = parser().parse_args(arguments)
    try:
        settings = Settings.load(getattr(parsed, "home", None))
        settings.apply()
        command: Callable[[Settings, argparse.Namespace], int] = parsed.command
        return command(settings, parsed)
    except (UserError, Refused) as error:
        print(f"gristmill: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ngristmill: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `gristmill logs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


# The stack


def up(settings: Settings, arguments: argparse.Namespace) -> int:
    """Start the local stack, or mend it."""
    settings = with_ports(settings, arguments)
    raise_open_files()
    findings = [finding for finding in examine(settings, ports=False) if not finding.fine]
    if findings:
        print(report(findings), file=sys.stderr)
    if any(finding.fatal for finding in findings):
        raise UserError("this machine lacks what is listed above; all of it: gristmill doctor")
    settings.save()
    Supervisor(settings, say).up()
    print(addresses(settings))
    return 0


def down(settings: Settings, arguments: argparse.Namespace) -> int:
    """Stop everything that `up` started."""
    Supervisor(settings, say).down()
    return 0


def status(settings: Settings, arguments: argparse.Namespace) -> int:
    """Show every service; 0 only if all are healthy."""
    found = Supervisor(settings).status()
    print(table(found))
    healthy = all(service.state == "healthy" for service in found)
    if healthy:
        print(f"\n{ray_login(settings)}")
    elif all(service.state == "stopped" for service in found):
        print(f"\nnothing runs in {settings.home}; start it: gristmill up")
    else:
        print("\nmend it: gristmill up")
    return 0 if healthy else 1


def doctor(settings: Settings, arguments: argparse.Namespace) -> int:
    """Check disk, memory, ports and versions."""
    findings = examine(with_ports(settings, arguments))
    print(report(findings))
    return 1 if any(finding.fatal and not finding.fine for finding in findings) else 0


def logs(settings: Settings, arguments: argparse.Namespace) -> int:
    """Print the end of a service's log, or a few lines of each."""
    if arguments.service:
        return tail(settings, arguments.service, arguments.lines or 50, arguments.follow)
    for log in sorted((settings.home / "logs").glob("*.log")):
        print(f"== {log}", flush=True)
        tail(settings, log.stem, arguments.lines or 5, follow=False)
    return 0


# Runs


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Trigger a flow's deployment; with --watch, follow it to its end."""
    parameters = checked_parameters(settings, arguments)
    from flows.runs import Runs

    runs = Runs(settings)
    begun = runs.trigger(arguments.flow, parameters)
    print(f"run {begun['name']} of {arguments.flow}: {runs.page(begun)}", flush=True)
    return watch(settings, begun["id"]) if arguments.watch else 0


def watch(settings: Settings, run_id: str) -> int:
    from flows.runs import Runs, Watch

    runs = Runs(settings)
    following = Watch(runs, runs.find(run_id))
    try:
        return following.follow()
    except KeyboardInterrupt:
        name = following.run["name"]
        print(f"\nrun {name} goes on; cancel it with: gristmill cancel {name}")
        return 130


def watch_run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Follow a run that was started elsewhere."""
    return watch(settings, arguments.run)


def cancel(settings: Settings, arguments: argparse.Namespace) -> int:
    """Cancel a run and wait until it has ended."""
    from flows.runs import Runs

    runs = Runs(settings)
    ended = runs.cancel(runs.find(arguments.run))
    print(f"run {ended['name']} {ended['state_name'].lower()}")
    return 0 if ended["state_type"] == "CANCELLED" else 1


def plan(settings: Settings, arguments: argparse.Namespace) -> int:
    """Say which stages are cached, which would run, and why. Nothing runs."""
    parameters = checked_parameters(settings, arguments)
    for stage in deployments(settings).plan(arguments.flow, parameters):
        print(f"{stage.stage:<22} {stage.fingerprint[:12]:<13} {stage.status:<8} {stage.why}")
    return 0


def forecast(settings: Settings, arguments: argparse.Namespace) -> int:
    """Say what a pretraining will cost and reach: memory, operations, time, loss."""
    from flows.forecast import foresee

    values = checked_parameters(settings, arguments)
    parameters = deployments(settings).parameters(arguments.flow, values)
    for name, value in foresee(settings, parameters, arguments, say).rows():
        print(f"{name:<22} {value}")
    return 0


def models(settings: Settings, arguments: argparse.Namespace) -> int:
    """List versions, aliases and scores."""
    reachable(settings.mlflow, "MLflow")
    from tasks.registry import models as registry

    names = registry.models()
    if not names:
        print("no model is registered yet; make one with: gristmill run pipeline --watch")
    for name in names:
        print(name)
        for version in registry.versions(name):
            aliases = ", ".join(version.aliases) or "-"
            artifact, _, fingerprint = version.artifact.partition("/")
            print(f"  version {version.version:<4} {aliases:<24} {artifact}/{fingerprint[:12]}")
            for score in with_intervals(version.scores):
                print(f"  {'':<12} {score}")
    return 0


def export(settings: Settings, arguments: argparse.Namespace) -> int:
    """Write a registered version for other programs: Hugging Face's directory, or GGUF."""
    if settings.mlflow.startswith("http"):
        reachable(settings.mlflow, "MLflow")
    from flows.export import export as write

    print(write(settings, arguments))
    return 0


def with_intervals(scores: Mapping[str, float]) -> list[str]:
    """`name value [low, high]` for each score; NAME_low and NAME_high are ends of NAME's."""
    lines = []
    for name, value in scores.items():
        stem, _, end = name.rpartition("_")
        if end in ("low", "high") and stem in scores:
            continue
        low, high = (scores.get(f"{name}_{end}") for end in ("low", "high"))
        span = f" [{low:.4g}, {high:.4g}]" if low is not None and high is not None else ""
        lines.append(f"{name:<22} {value:.4g}{span}")
    return lines


def ask(settings: Settings, arguments: argparse.Namespace) -> int:
    """Put a question to the served model."""
    from flows.ask import ask as answer

    for piece in answer(settings, arguments.question, arguments.model):
        print(piece, end="", flush=True)
    print()
    return 0


def demo(settings: Settings, arguments: argparse.Namespace) -> int:
    """Everything: check the machine, start the stack, run the pipeline, ask one question."""
    settings = with_ports(settings, arguments)
    print(report(examine(settings, ports=False)))
    up(settings, arguments)
    settings.apply()  # the cluster's token was made by `up`
    arguments.flow, arguments.watch = "pipeline", True
    code = run(settings, arguments)
    if code:
        return code
    from flows.ask import ask as answer

    print(f"\n{addresses(settings)}\n\n> {QUESTION}")
    for piece in answer(settings, QUESTION):
        print(piece, end="", flush=True)
    print('\n\nask more: gristmill ask "…"; stop everything: gristmill down')
    return 0


# Words


def say(line: str) -> None:
    print(line, flush=True)


def addresses(settings: Settings) -> str:
    """Where a person finds everything."""
    rows = (
        ("Prefect", settings.prefect_dashboard),
        ("MLflow", settings.mlflow),
        ("Ray", f"{settings.ray_dashboard}   token: {settings.ray_token_path}"),
        ("endpoint", f"{settings.serve}/v1"),
        ("chat page", f"{settings.serve}/"),
    )
    return "\n".join(f"{name:<10} {url}" for name, url in rows)


def ray_login(settings: Settings) -> str:
    return (
        f"The Ray dashboard at {settings.ray_dashboard} asks for a token; paste what this prints:\n"
        f"  cat {settings.ray_token_path}"
    )


def table(found: list[ServiceStatus]) -> str:
    lines = [f"{'service':<10}{'state':<15}{'pid':<9}{'up for':<14}{'memory':<10}address"]
    for service in found:
        uptime = duration(service.uptime) if service.pid else "-"
        used = f"{service.memory / 1e6:.0f} MB" if service.pid else "-"
        pid = str(service.pid or "-")
        lines.append(
            f"{service.name:<10}{service.state:<15}{pid:<9}{uptime:<14}{used:<10}{service.url}"
        )
    return "\n".join(lines)


def reachable(url: str, name: str) -> None:
    """Raises UserError at once where a client would retry for minutes."""
    try:
        call(f"{url}/health")
    except (OSError, Refused) as error:
        raise UserError(f"{name} does not answer at {url}; start it: gristmill up") from error


def deployments(settings: Settings) -> Any:
    """The module that serves the deployments: `FLOWS`, `parameters` and `plan`."""
    return importlib.import_module(settings.runner)


def checked_parameters(settings: Settings, arguments: argparse.Namespace) -> dict[str, Any]:
    """The run's parameters, checked by the flow's own model before anything is triggered."""
    from flows.parameters import check, merged

    served = deployments(settings).FLOWS
    if arguments.flow not in served:
        raise UserError(f"no flow is called {arguments.flow!r}; there are {', '.join(served)}")
    model = served[arguments.flow].params_model
    values = merged(arguments.config, arguments.set or [], model.model_fields)
    return check(arguments.flow, model, values)


def with_ports(settings: Settings, arguments: argparse.Namespace) -> Settings:
    """The settings with the ports asked for, which are kept for later commands by `up`."""
    chosen: dict[str, int] = {}
    names = list(Ports.model_fields)
    if arguments.base_port:
        chosen = {name: arguments.base_port + offset for offset, name in enumerate(names)}
    for pair in (arguments.ports or "").split(","):
        if not pair:
            continue
        name, _, number = pair.partition("=")
        if name not in names or not number.isdigit():
            raise UserError(f"--ports {pair!r} is not NAME=NUMBER; names are {', '.join(names)}")
        chosen[name] = int(number)
    for name in MAIN_PORTS:
        if getattr(arguments, f"{name}_port") is not None:
            chosen[name] = getattr(arguments, f"{name}_port")
    if not chosen:
        return settings
    try:
        ports = Ports(**(settings.ports.model_dump() | chosen))
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"port {wrong['input']} for {wrong['loc'][0]}: {wrong['msg']}") from error
    numbers = list(ports.model_dump().values())
    for name, number in ports.model_dump().items():
        if numbers.count(number) > 1:
            raise UserError(f"port {number} for {name} is given twice; choose another")
        if 10002 <= number <= 19999:
            raise UserError(f"port {number} for {name} is among Ray's worker ports 10002-19999")
    return settings.model_copy(update={"ports": ports})


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="gristmill", description=__doc__)
    shared = argparse.ArgumentParser(add_help=False)
    for place in (top, shared):
        place.add_argument(
            "--home",
            type=Path,
            default=argparse.SUPPRESS,
            help="where all state lives (default: $GRISTMILL_HOME, else .gristmill/)",
        )
    ports = argparse.ArgumentParser(add_help=False)
    ports.add_argument("--ports", metavar="NAME=N,…", help="ports by name, kept for later commands")
    ports.add_argument("--base-port", type=int, metavar="N", help="all ports, counting up from N")
    for name in MAIN_PORTS:
        option = f"--{name.replace('_', '-')}-port"
        ports.add_argument(option, dest=f"{name}_port", type=int, metavar="N")
    parameters = argparse.ArgumentParser(add_help=False)
    parameters.add_argument(
        "--config",
        metavar="FILE",
        help="YAML, TOML, JSON, or a preset's name, of which what the flow has is taken",
    )
    parameters.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="one parameter: dotted key, JSON value"
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str,
        function: Callable[[Settings, argparse.Namespace], int],
        *parents: argparse.ArgumentParser,
    ) -> argparse.ArgumentParser:
        words = (function.__doc__ or "").strip()
        command = commands.add_parser(
            name, parents=[shared, *parents], help=words, description=words
        )
        command.set_defaults(command=function)
        return command

    add("up", up, ports)
    add("down", down)
    add("status", status)
    add("doctor", doctor, ports)
    command = add("logs", logs)
    command.add_argument("service", nargs="?", choices=SERVICES)
    command.add_argument("-n", "--lines", type=int, metavar="N")
    command.add_argument("-f", "--follow", action="store_true")
    command = add("run", run, parameters)
    command.add_argument("flow")
    command.add_argument("--watch", action="store_true", help="follow it; exit code 0 if completed")
    add("watch", watch_run).add_argument("run", help="name or id of a run")
    add("cancel", cancel).add_argument("run", help="name or id of a run")
    add("plan", plan, parameters).add_argument("flow")
    forget_commands.add_arguments(add("forget", forget_commands.forget))
    command = add("forecast", forecast, parameters)
    command.add_argument(
        "--device-tflops", type=float, default=989, metavar="N", help="of one GPU in bf16"
    )
    command.add_argument("--mfu", type=float, default=0.4, metavar="SHARE", help="used of that")
    command.add_argument("--no-runs", action="store_true", help="no quick runs, so no loss")
    command.set_defaults(flow="pipeline")
    sequence_command.add_arguments(add("sequence", sequence_command.sequence))
    add("models", models)
    command = add("export", export)
    command.add_argument("model", help="MODEL@VERSION: a number or an alias (default: champion)")
    command.add_argument("--format", choices=("hf", "gguf"), default="hf")
    command.add_argument("--out", type=Path, metavar="DIR", help="default: MODEL-VERSION-FORMAT")
    command = add("ask", ask)
    command.add_argument("question")
    command.add_argument("--model", help="which of the served models (default: the first)")
    words = "API keys of the endpoint: create, list, revoke"
    key_commands.add_arguments(commands.add_parser("keys", help=words, description=words), shared)
    add("demo", demo, ports, parameters)
    return top


if __name__ == "__main__":
    sys.exit(main())
