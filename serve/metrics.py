"""What the engine and its requests count, in Prometheus' text format.

Names are vLLM's where it has one, with our prefix. Counters restart with a swap: a version has its
own.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.host import ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


class Histogram:
    """Observations counted by upper bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> list[str]:
        total, found = 0, []
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{{labels},le="{bound}"}} {total}')
        return [*found, f"{name}_sum{{{labels}}} {self.sum}", f"{name}_count{{{labels}}} {total}"]


class RequestMetrics:
    """What the requests of one served model came to. Used in the event loop only."""

    def __init__(self) -> None:
        self.first_token = Histogram(SECONDS)
        self.between_tokens = Histogram(SECONDS)
        self.per_token = Histogram(SECONDS)
        self.waiting = Histogram(SECONDS)
        self.whole = Histogram(SECONDS)
        self.prompt_tokens = Histogram(TOKENS)
        self.generation_tokens = Histogram(TOKENS)
        self.finished: Counter[str] = Counter()

    def record(
        self,
        *,
        seconds: float,
        first: float | None,
        waited: float,
        prompt_tokens: int,
        completion_tokens: int,
        reasons: Iterable[str],
    ) -> None:
        """One request that ended. first: seconds until its first token, None if not streamed;
        waited: seconds for a place in the batch.
        """
        self.finished.update(reasons)
        self.whole.observe(seconds)
        self.waiting.observe(waited)
        self.prompt_tokens.observe(prompt_tokens)
        self.generation_tokens.observe(completion_tokens)
        if first is not None:
            self.first_token.observe(first)
            if completion_tokens > 1:
                self.per_token.observe((seconds - first) / (completion_tokens - 1))


def render(served: "Sequence[ServedModel]") -> str:
    """Metrics of every served model, labelled by name and version."""
    lines: list[str] = ["# HELP gristmill_ready 1 when a model is served."]
    lines += ["# TYPE gristmill_ready gauge", f"gristmill_ready {int(bool(served))}"]
    labelled = [
        (f'model="{one.spec.name}",version="{one.spec.version}"', one.engine.counters(), one)
        for one in served
    ]

    def metric(name: str, kind: str, help: str, values: Sequence[float]) -> None:
        lines.extend((f"# HELP gristmill_{name} {help}", f"# TYPE gristmill_{name} {kind}"))
        for (labels, _, _), value in zip(labelled, values, strict=True):
            lines.append(f"gristmill_{name}{{{labels}}} {value}")

    c = [counters for _, counters, _ in labelled]
    metric("num_requests_running", "gauge", "Sequences being generated.", [x.running for x in c])
    metric("num_requests_waiting", "gauge", "Sequences waiting for room.", [x.waiting for x in c])
    usage = [x.pages_used / x.pages for x in c]
    metric("kv_cache_usage_perc", "gauge", "Pages in use, of all (1 is all).", usage)
    for name, help, values in (
        ("requests", "Sequences accepted.", [x.requests for x in c]),
        ("requests_aborted", "Sequences ended early.", [x.aborted for x in c]),
        ("prompt_tokens", "Prompt tokens of accepted sequences.", [x.prompt_tokens for x in c]),
        ("generation_tokens", "Tokens generated.", [x.generation_tokens for x in c]),
        ("prefix_cache_queries", "Prompt tokens looked for.", [x.prompt_tokens for x in c]),
        ("prefix_cache_hits", "Prompt tokens found.", [x.cached_tokens for x in c]),
        ("spec_decode_num_draft_tokens", "Tokens proposed.", [x.drafted_tokens for x in c]),
        ("spec_decode_num_accepted_tokens", "Of these, right.", [x.accepted_tokens for x in c]),
        ("engine_steps", "Steps of the engine.", [x.steps for x in c]),
    ):
        metric(f"{name}_total", "counter", help, values)
    name = "gristmill_request_success_total"
    lines += [f"# HELP {name} Answers, by why they ended.", f"# TYPE {name} counter"]
    for labels, _, one in labelled:
        for reason, count in sorted(one.metrics.finished.items()):
            lines.append(f'{name}{{{labels},finished_reason="{reason}"}} {count}')
    for attribute, name, help in (
        ("first_token", "time_to_first_token_seconds", "Until the first token of a stream."),
        ("between_tokens", "inter_token_latency_seconds", "Between two news of a streamed answer."),
        ("per_token", "request_time_per_output_token_seconds", "The same, a stream's average."),
        ("waiting", "request_queue_time_seconds", "For a place in the batch."),
        ("whole", "e2e_request_latency_seconds", "From a request to the end of its answer."),
        ("prompt_tokens", "request_prompt_tokens", "Prompt tokens of a request."),
        ("generation_tokens", "request_generation_tokens", "Tokens generated for a request."),
    ):
        lines += [f"# HELP gristmill_{name} {help}", f"# TYPE gristmill_{name} histogram"]
        for labels, _, one in labelled:
            lines += getattr(one.metrics, attribute).lines(f"gristmill_{name}", labels)
    return "\n".join(lines) + "\n"
