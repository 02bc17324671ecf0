"""What the engine and its requests count, in Prometheus' text format.

Names and labels are vLLM's where it has them, with our prefix, and our own labels `version` and
`replica`: whoever asks behind the proxy meets one replica of several. Counters restart with a swap:
a version has its own.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.engine.counters import STEP_TOKENS
from serve.responses import Usage

if TYPE_CHECKING:
    from serve.host import ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80)
CHOICES = (1, 2, 5, 10, 20)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


class Histogram:
    """Observations counted by upper bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    @classmethod
    def of(cls, bounds: Sequence[float], counts: Sequence[int], sum: float) -> "Histogram":
        """Of counts that were made elsewhere."""
        made = cls(bounds)
        made.counts, made.sum = list(counts), sum
        return made

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
        self.prefill = Histogram(SECONDS)
        self.decode = Histogram(SECONDS)
        self.inference = Histogram(SECONDS)
        self.whole = Histogram(SECONDS)
        self.choices = Histogram(CHOICES)
        self.limits = Histogram(TOKENS)
        self.prompt_tokens = Histogram(TOKENS)
        self.generation_tokens = Histogram(TOKENS)
        self.finished: Counter[str] = Counter()

    def record(
        self,
        *,
        seconds: float,
        first: float | None,
        usage: Usage,
        choices: int,
        limit: int | None,
    ) -> None:
        """One request that ended. first: seconds until its first token, None if not streamed;
        limit: of tokens for each of its `choices`, where it named one.
        """
        prompt_tokens, completion_tokens = usage.prompt_tokens, usage.completion_tokens
        waited = usage.waited
        self.finished.update(usage.reasons.values())
        self.choices.observe(choices)
        if limit is not None:
            self.limits.observe(limit)
        if usage.lasted and usage.read:  # not of one that was broken off
            self.prefill.observe(usage.read - waited)
            self.decode.observe(usage.lasted - usage.read)
            self.inference.observe(usage.lasted - waited)
        self.whole.observe(seconds)
        self.waiting.observe(waited)
        self.prompt_tokens.observe(prompt_tokens)
        self.generation_tokens.observe(completion_tokens)
        if first is not None:
            self.first_token.observe(first)
            if completion_tokens > 1:
                self.per_token.observe((seconds - first) / (completion_tokens - 1))


class HttpMetrics:
    """Requests by how they were answered, refusals included. Used in the event loop only."""

    def __init__(self) -> None:
        self.answered: Counter[tuple[str, str, int]] = Counter()  # method, handler, status

    def lines(self, replica: str) -> list[str]:
        name = "gristmill_http_requests_total"
        lines = [f"# HELP {name} Requests, by how they were answered.", f"# TYPE {name} counter"]
        for (method, handler, status), count in sorted(self.answered.items()):
            labels = _labels(method=method, handler=handler, status=str(status), replica=replica)
            lines.append(f"{name}{{{labels}}} {count}")
        return lines


def _labels(**values: str) -> str:
    escaped = {
        name: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        for name, value in values.items()
    }
    return ",".join(f'{name}="{value}"' for name, value in escaped.items())


def render(served: "Sequence[ServedModel]", http: HttpMetrics, replica: str) -> str:
    """Metrics of every served model, labelled by name, version and replica."""
    lines: list[str] = ["# HELP gristmill_ready 1 when a model is served."]
    lines += ["# TYPE gristmill_ready gauge"]
    lines += [f"gristmill_ready{{{_labels(replica=replica)}}} {int(bool(served))}"]
    lines += http.lines(replica)
    labelled = [
        (
            _labels(model_name=one.spec.name, version=one.spec.version, replica=replica),
            one.engine.counters(),
            one,
        )
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
        ("spec_decode_num_drafts", "Times that tokens were proposed.", [x.drafts for x in c]),
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
        (
            "prefill",
            "request_prefill_time_seconds",
            "From a place in the batch to the prompt's end.",
        ),
        ("decode", "request_decode_time_seconds", "From there to the end of the answer."),
        ("inference", "request_inference_time_seconds", "Both together."),
        ("whole", "e2e_request_latency_seconds", "From a request to the end of its answer."),
        ("prompt_tokens", "request_prompt_tokens", "Prompt tokens of a request."),
        ("generation_tokens", "request_generation_tokens", "Tokens generated for a request."),
        ("choices", "request_params_n", "Answers a request asked for."),
        ("limits", "request_params_max_tokens", "Tokens a request set as its limit."),
    ):
        lines += [f"# HELP gristmill_{name} {help}", f"# TYPE gristmill_{name} histogram"]
        for labels, _, one in labelled:
            lines += getattr(one.metrics, attribute).lines(f"gristmill_{name}", labels)
    name = "gristmill_iteration_tokens_total"
    lines += [f"# HELP {name} Tokens read in a step of the engine.", f"# TYPE {name} histogram"]
    for labels, x, _ in labelled:
        lines += Histogram.of(STEP_TOKENS, x.steps_of, x.step_tokens).lines(name, labels)
    return "\n".join(lines) + "\n"
