"""The model card: what a model is, read from the manifests of everything it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.flops import count_parameters
from model.huggingface import load_config
from tasks.evaluation.compression import LABELS
from tasks.registry.models import Version
from tasks.runtime.manifest import Manifest

SCORES = {
    "final_heldout_loss": "loss on held-out documents at the end of training, nats per token",
    "final_loss": "loss on the training text at the end, nats per token",
    "bits_per_byte": "bits per byte of held-out documents",
    "base_bits_per_byte": "… of the base model before fine-tuning",
    "seen_exact": "facts it was taught, in phrasings it was taught: answered exactly",
    "recall_exact": "facts it was taught, in phrasings it never saw: answered exactly",
    "unseen_exact": "facts it was never taught: answered exactly",
    "seen_rouge_l": "ROUGE-L, taught facts in taught phrasings",
    "recall_rouge_l": "ROUGE-L, taught facts in new phrasings",
    "unseen_rouge_l": "ROUGE-L, facts never taught",
}
ELSEWHERE = "not known here; its owner's terms hold for this model, too"
LITTLE = 10e9  # tokens; with less than that read, a model of any size knows little
UNSTATED = "not stated; ask the owner of the text before you pass this model on"

# Not AutoTokenizer: transformers 5 takes Qwen's words for every model of its architecture, whatever
# the directory says.
TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
question = [{"role": "user", "content": "…"}]
ids = tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_tensors="pt", return_dict=False
)
print(tokenizer.decode(model.generate(ids, max_new_tokens=80)[0][ids.shape[1] :]))
"""

CONTINUES = """\
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer("…", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=80)[0]))
"""
GUESSES = """\
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast.from_pretrained(".")
model = AutoModelForMaskedLM.from_pretrained(".")
ids = tokenizer("… <mask> …", return_tensors="pt").input_ids
print(tokenizer.decode(model(ids).logits.argmax(-1)[0]))
"""


def card(
    version: Version, directory: Path, lineage: Sequence[Manifest], file: str | None = None
) -> str:
    """README.md of an exported model. directory: its config.json; lineage: the model's manifest
    first, then all it and its evaluation were made from, as far as the store still has them; file:
    the GGUF file beside it, if that is what was written."""
    made = {manifest.stage: manifest for manifest in reversed(lineage)}  # the nearest of each wins
    causal = load_config(directory).causal
    sections = (
        _head(version, causal),
        _kind(version, causal),
        _about(version, directory, made),
        _data(made),
        _scores(version),
        _limits(version, directory, made),
        _use(file, version.is_base, causal),
        _origin(lineage),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(version: Version, causal: bool) -> str:
    return "\n".join(
        (
            "---",
            "library_name: transformers",
            f"pipeline_tag: {'text-generation' if causal else 'fill-mask'}",
            f"model_name: {version.model}-{version.version}",
            "license: other",
            "tags: [gristmill]",
            "---",
            "",
            f"# {version.model}, version {version.version}",
        )
    )


def _kind(version: Version, causal: bool) -> str:
    if not version.is_base:
        return ""
    does = "continues a text" if causal else "guesses masked words of a text"
    return (
        f"This is a base model: it was pretrained only. It {does} and was never taught to answer "
        f"questions or to follow a conversation; a chat template beside it is for models that are "
        f"fine-tuned from it."
    )


def _about(version: Version, directory: Path, made: Mapping[str, Manifest]) -> str:
    config = load_config(directory)
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    rows: list[tuple[str, object]] = [
        ("architecture", name),
        ("parameters", f"{count_parameters(config).total:,}"),
        ("layers × width", f"{config.layers} × {config.width}"),
        ("context", f"{config.context:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,} pieces"),
    ]
    for stage, words in (("pretrain", "pretrained on"), ("finetune", "fine-tuned on")):
        if stage in made and made[stage].counts["steps"]:
            counts = made[stage].counts
            rows.append((words, f"{counts['tokens']:,} tokens in {counts['steps']:,} steps"))
    if "finetune" in made:
        rows.append(("questions and answers", f"{made['finetune'].counts.get('examples', 0):,}"))
    return f"{_table(('what', 'value'), rows)}"


def _data(made: Mapping[str, Manifest]) -> str:
    lines = ["## Data", *_brought(made)]
    if not _read_here(made):
        return "\n\n".join(lines) if len(lines) > 1 else ""
    if crawl := made.get("crawl"):
        seeds = ", ".join(f"`{seed}`" for seed in crawl.config.get("seeds", ()))
        lines.append(
            f"Crawled from {seeds} on {crawl.created[:10]} (epoch {crawl.config.get('epoch', 0)}): "
            f"{crawl.counts.get('pages', 0):,} pages. Licence: {_crawl_licence(crawl)}."
        )
    for source in made["gather"].config.get("sources", ()) if "gather" in made else ():
        count = made["gather"].counts.get(f"documents_{source['name']}", 0)
        licence = source.get("licence") or UNSTATED
        lines.append(f"Source `{source['name']}`: {count:,} documents. Licence: {licence}.")
    if own := made.get("conversations"):
        calling = own.counts["with_calls"]
        lines.append(
            f"Conversations of its makers: {own.counts['conversations']:,}, of which {calling:,} "
            f"call tools. Licence: {own.config.get('licence') or UNSTATED}."
        )
    if "pii" in made:
        lines.append("Personal data: masked.")
    removed = [
        (stage, rule, f"{count:,}")
        for stage in ("extract", "gather", "language", "quality", "pii-drop", "deduplicate")
        if stage in made
        for rule, count in made[stage].rules.items()
    ]
    if removed:
        lines.append("Removed on the way:\n\n" + _table(("stage", "rule", "documents"), removed))
    if split := made.get("split"):
        counts = split.counts
        lines.append(
            f"Left for training: {counts['train_documents']:,} documents, "
            f"{counts['train_bytes']:,} bytes. Held out: {counts['heldout_documents']:,} documents"
            f", {counts['heldout_bytes']:,} bytes; passages that training shared with them were "
            f"cut out of training."
        )
    return "\n\n".join(lines) if len(lines) > 1 else ""


def _brought(made: Mapping[str, Manifest]) -> list[str]:
    """What was made elsewhere and taken over: weights, a vocabulary."""
    lines = []
    if start := _start(made):
        digest = made["pretrain"].config.get("start_digest", "")[:16]
        how = "goes on from" if _read_here(made) else "has the weights of"
        lines.append(
            f"It {how} the checkpoint `{start}` (SHA-256 `{digest}`…), which was made "
            f"elsewhere. Licence: {ELSEWHERE}."
        )
    if start and (omitted := made["pretrain"].metrics.get("left_out")):
        lines.append(f"Left out of that checkpoint: {omitted}.")
    tokenizer = made["tokenizer"].config if "tokenizer" in made else {}
    if origin := tokenizer.get("import_from"):
        digest = tokenizer.get("import_digest", "")[:16]
        lines.append(
            f"Its vocabulary is that of `{Path(origin).name}` (SHA-256 `{digest}`…), which was "
            f"made elsewhere. Licence: {ELSEWHERE}."
        )
    return lines


def _read_here(made: Mapping[str, Manifest]) -> bool:
    """Whether it learned anything from the corpus, and is not a checkpoint as it was."""
    return "pretrain" not in made or any(
        made[stage].counts["steps"] for stage in ("pretrain", "finetune") if stage in made
    )


def _start(made: Mapping[str, Manifest]) -> str:
    """The name of the checkpoint that pretraining went on from, or nothing."""
    return Path(made["pretrain"].config.get("start_from", "")).name if "pretrain" in made else ""


def _crawl_licence(crawl: Manifest) -> str:
    if list(crawl.config.get("seeds", ())) == ["embedded:stdlib"]:
        return "Python Software Foundation License 2.0 (documentation of the interpreter)"
    return UNSTATED


def _scores(version: Version) -> str:
    scores, rows = version.scores, []
    for name, words in SCORES.items():
        if name not in scores:
            continue
        low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
        span = f"{low:.4g} to {high:.4g}" if low is not None and high is not None else ""
        rows.append((words, f"{scores[name]:.4g}", span))
    for method, words in LABELS.items():
        if f"{method}_bits_per_byte" in scores:
            value = scores[f"{method}_bits_per_byte"]
            rows.append((f"bits per byte of {words}", f"{value:.4g}", ""))
    heads = ("score", "value", "95% interval")
    return f"## Scores\n\n{_table(heads, rows)}" if rows else ""


def _limits(version: Version, directory: Path, made: Mapping[str, Manifest]) -> str:
    config, scores = load_config(directory), version.scores
    parameters = count_parameters(config).total
    start, read = _start(made), made["pretrain"].counts["tokens"] if "pretrain" in made else 0
    so_far = " and has read little" if not start and read < LITTLE else ""
    lines = [
        f"- It has {parameters:,} parameters{so_far}: it writes falsehoods in the manner of what "
        f"it read, without saying so."
    ]
    if start:
        lines.append(f"- What `{start}` had read before is not known here.")
    if "unseen_exact" in scores:
        lines.append(
            f"- Of facts it was never taught it answered {scores['unseen_exact']:.1%} exactly. "
            f"What it does answer it recalls."
        )
    trained = int(made["pretrain"].config.get("sequence", 0)) if read else 0
    if 0 < trained < config.context:
        lines.append(f"- It was trained on {trained} tokens at a time; longer texts are guesswork.")
    if _read_here(made) and (languages := _languages(made)):
        lines.append(f"- It read {languages}{' here' if start else ', and nothing else'}.")
    lines.append("- Nobody tested it for safety, fairness or advice of any kind. It is no product.")
    return "## Limits\n\n" + "\n".join(lines)


def _languages(made: Mapping[str, Manifest]) -> str:
    kept = made["language"].config.get("languages") if "language" in made else None
    return f"text in {', '.join(kept)}" if kept else ""


def _use(file: str | None, base: bool, causal: bool) -> str:
    if file is not None:
        how = '-no-cnv -p "…"' if base else "--jinja -cnv"
        return f"## Use\n\n```\nllama-cli -m {file} {how}\n```"
    if not causal:
        return f"## Use\n\n```python\n{GUESSES}```"
    return f"## Use\n\n```python\n{CONTINUES if base else TRANSFORMERS}```"


def _origin(lineage: Sequence[Manifest]) -> str:
    rows = [(m.stage, f"`{m.fingerprint[:16]}`", m.created[:19], f"`{m.code}`") for m in lineage]
    heads = ("stage", "artifact", "made (UTC)", "code")
    return f"## Made from\n\n{_table(heads, rows)}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    lines += [" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)
