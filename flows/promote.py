"""Moving the `champion` alias: by order, or only when the new version is better."""

from __future__ import annotations

import time
from typing import Literal

from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from tasks.evaluation.gates import Decision, is_better
from tasks.registry import models
from tasks.runtime.manifest import Manifest
from tasks.runtime.planning import is_planning
from tasks.runtime.progress import run_logger
from tasks.runtime.settings import Settings
from tasks.runtime.stage_config import StageConfig
from tasks.state.schema import database, gate_decisions


class PromoteConfig(StageConfig):
    """When the new version becomes the champion, which is the one that is served."""

    rule: Literal["always", "if_better"] = Field(
        "if_better",
        description="always: serve what this run made. if_better: only if it beats the champion.",
    )


def promote(
    params: PromoteConfig,
    registered: Manifest,
    report: Manifest,
    champion_report: Manifest | None = None,
) -> models.Version | None:
    """Set the aliases by the rule; returns the champion, new or old.

    `champion_report` holds the champion's scores on the same items as `report`. While planning,
    nothing moves and only a version that is the champion already is returned.
    """
    if is_planning():
        champion = models.find(str(registered.config["model"]), models.CHAMPION)
        known = registered.metrics.get("version")
        return champion if champion and champion.version == known else None
    model = str(registered.metrics["model"])
    challenger = models.get(model, str(registered.metrics["version"]))
    champion = models.find(model, models.CHAMPION)
    if champion is not None and champion.version == challenger.version:
        return champion
    if champion is None:
        decision = Decision(True, f"{model} had no champion")
    elif params.rule == "always":
        decision = Decision(True, "this run asked for it (rule: always)")
    elif champion_report is None:
        decision = Decision(False, "the champion was not scored on the same items")
    else:
        decision = is_better(report, champion_report)
    models.set_alias(
        model, models.CHAMPION if decision.moved else models.CHALLENGER, challenger.version
    )
    record(challenger, champion, decision, report, champion_report)
    return models.get(model, models.CHAMPION)


def record(
    challenger: models.Version,
    champion: models.Version | None,
    decision: Decision,
    report: Manifest,
    champion_report: Manifest | None,
) -> None:
    """Keep the decision in the state database and show it on the run page."""
    scores = {"challenger": report.metrics}
    if champion_report is not None:
        scores["champion"] = champion_report.metrics
    engine = database(Settings.load().database_url)
    with engine.begin() as connection:
        connection.execute(
            gate_decisions.insert().values(
                at=time.time(),
                model=challenger.model,
                challenger=challenger.version,
                champion=champion.version if champion else None,
                moved=decision.moved,
                reason=decision.reason,
                scores=scores,
            )
        )
    engine.dispose()
    before = f"version {champion.version}" if champion else "none"
    after = f"version {challenger.version}" if decision.moved else before
    text = f"Champion of {challenger.model}: {before} → {after}, because {decision.reason}."
    run_logger().info(text)
    create_markdown_artifact(markdown=text, key="promotion", description="the champion alias")
