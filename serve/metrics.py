"""What the engine counts, in Prometheus' text format."""

from serve.host import ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(served: ServedModel | None) -> str:
    """Metrics of the served model, labelled by name and version; counters restart with a swap."""
    lines: list[str] = []

    def metric(name: str, kind: str, help: str, value: float) -> None:
        lines.append(f"# HELP gristmill_{name} {help}")
        lines.append(f"# TYPE gristmill_{name} {kind}")
        lines.append(f"gristmill_{name}{labels} {value}")

    labels = ""
    metric("ready", "gauge", "1 when a model is served.", int(served is not None))
    if served is not None:
        labels = f'{{model="{served.spec.name}",version="{served.spec.version}"}}'
        c = served.engine.counters()
        metric("num_requests_running", "gauge", "Sequences being generated.", c.running)
        metric("num_requests_waiting", "gauge", "Sequences waiting for a slot.", c.waiting)
        metric("requests_total", "counter", "Sequences accepted.", c.requests)
        metric("requests_aborted_total", "counter", "Sequences ended early.", c.aborted)
        metric("prompt_tokens_total", "counter", "Prompt tokens read.", c.prompt_tokens)
        metric("generation_tokens_total", "counter", "Tokens generated.", c.generation_tokens)
        metric("engine_steps_total", "counter", "Steps of the engine.", c.steps)
    return "\n".join(lines) + "\n"
