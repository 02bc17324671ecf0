"""Reports on Prefect's run pages that quote what is erased."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tasks.runtime.rest import Refused, call
from tasks.runtime.settings import Settings

PAGE = 200  # artifacts asked for at once


def forget_reports(settings: Settings, names: Iterable[str]) -> int | None:
    """Delete the artifacts on run pages that hold one of these names; None without a Prefect."""
    needles = [name for name in names if name]
    api = settings.prefect_api
    quoting: list[str] = []
    try:
        offset = 0
        while found := _artifacts(api, offset):
            quoting += [row["id"] for row in found if _quotes(row, needles)]
            offset += len(found)
        for id in quoting:
            call(f"{api}/artifacts/{id}", method="DELETE")
    except (OSError, Refused):
        return None
    return len(quoting)


def _artifacts(api: str, offset: int) -> list[dict[str, Any]]:
    body = {"limit": PAGE, "offset": offset, "sort": "ID_DESC"}
    return list(call(f"{api}/artifacts/filter", body, timeout=30))


def _quotes(row: dict[str, Any], needles: list[str]) -> bool:
    data = row.get("data")
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    # A table's data come as the JSON of its rows, its slashes plain or not.
    plain = text.replace("\\/", "/")
    return any(needle in plain for needle in needles)
