"""Parameters from files and `--set`, and what a person is told about wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from flows.deployments import FLOWS, parameters
from flows.parameters import PRESETS, check, merged, parse
from tasks.runtime.errors import UserError
from tasks.training.pretrain import PretrainConfig


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Crawl(Strict):
    seeds: tuple[str, ...] = ("https://a.example",)
    max_pages: int = Field(100, ge=1)


class Adam(Strict):
    kind: Literal["adam"] = "adam"
    learning_rate: float = 0.1


class Muon(Strict):
    kind: Literal["muon"] = "muon"
    momentum: float = 0.9


class Parameters(Strict):
    crawl: Crawl = Crawl()
    optimiser: Annotated[Adam | Muon, Field(discriminator="kind")] = Adam()
    warmup: float | None = None
    version: str = "champion"


def told(values: dict[str, object]) -> str:
    with pytest.raises(UserError) as error:
        check("pipeline", Parameters, values)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "crawl: {max_pages: 5}\nwarmup: 0.5\n"),
        ("run.toml", "warmup = 0.5\n[crawl]\nmax_pages = 5\n"),
        ("run.json", '{"crawl": {"max_pages": 5}, "warmup": 0.5}'),
    ],
)
def test_settings_are_laid_over_a_file(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    values = merged(str(file), ["crawl.max_pages=7", 'crawl.seeds=["https://b.example"]'])
    assert values == {"crawl": {"max_pages": 7, "seeds": ["https://b.example"]}, "warmup": 0.5}
    check("pipeline", Parameters, values)


def test_an_object_is_merged_into_what_stands_there() -> None:
    values = merged(None, ["crawl.max_pages=7", 'crawl={"seeds": []}'])
    assert values == {"crawl": {"max_pages": 7, "seeds": []}}


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_every_json_value_can_be_set(value: object) -> None:
    assert parse(json.dumps(value)) == value


def test_what_is_not_json_is_a_string() -> None:
    assert merged(None, ["name=v1.2-a", "path=/tmp/x", "empty="]) == {
        "name": "v1.2-a",
        "path": "/tmp/x",
        "empty": "",
    }


def test_an_unknown_key_is_told_with_its_neighbours() -> None:
    assert told({"crawl": {"max_page": 3}}) == (
        "pipeline has no parameter 'crawl.max_page'; did you mean max_pages?"
    )
    assert "did you mean crawl?" in told({"crowl": {}})
    assert "valid names: crawl, optimiser, version, warmup" in told({"xyz": 1})
    assert told({"optimiser": {"kind": "muon", "momentun": 1}}) == (
        "pipeline has no parameter 'optimiser.momentun'; did you mean momentum?"
    )


def test_an_impossible_value_is_told_with_its_bounds() -> None:
    assert told({"crawl": {"max_pages": 0}}) == (
        "crawl.max_pages = 0 is impossible: input should be greater than or equal to 1"
    )
    assert told({"warmup": "soon"}).startswith('warmup = "soon" is impossible: ')


def test_every_mistake_is_told_at_once() -> None:
    assert len(told({"crawl": {"max_pages": 0, "nope": 1}, "warmup": []}).splitlines()) == 3


def test_a_whole_number_where_only_text_is_wanted_is_that_text() -> None:
    values = {"version": 3, "crawl": {"seeds": [7, "https://b.example"], "max_pages": 5}}
    checked = check("pipeline", Parameters, values)
    seeds = ["7", "https://b.example"]
    assert checked == {"version": "3", "crawl": {"seeds": seeds, "max_pages": 5}}
    assert values["version"] == 3
    assert "version = true is impossible" in told({"version": True})
    settings = merged(None, ["version=3", "deploy.canary=2", 'deploy.beside=["other@4"]'])
    deploy = check("deploy", FLOWS["deploy"].params_model, settings)
    assert (deploy["version"], deploy["deploy"]["canary"]) == ("3", "2")


@pytest.mark.parametrize("setting", ["crawl", "=3", "a..b=1", ".a=1"])
def test_a_setting_without_key_or_value_is_refused(setting: str) -> None:
    with pytest.raises(UserError, match="has no key and value"):
        merged(None, [setting])


def test_a_setting_below_a_value_is_refused() -> None:
    with pytest.raises(UserError, match="goes below 'a', which is 3"):
        merged(None, ["a=3", "a.b=4"])


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.yaml", "crawl: [", "cannot be read"),
        ("a.toml", "=", "cannot be read"),
        ("a.json", "{", "cannot be read"),
        ("a.yaml", "- 1", "holds list, not keys and values"),
        ("a.ini", "", "use .yaml, .toml or .json"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str, reason: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UserError) as error:
        merged(str(file), [])
    assert name in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_presets_go_by_name() -> None:
    assert merged("tiny", [])
    with pytest.raises(UserError, match=r"presets are: .*tiny"):
        merged("tinny", [])


def test_marks_that_the_dashboard_leaves_among_keys_are_no_keys() -> None:
    mark = {"__prefect_kind": "none"}
    params = {"pretrain": {"source_weights": {"notes": 2.0} | mark} | mark}
    config = PretrainConfig.model_validate(params["pretrain"])
    assert config.source_weights == {"notes": 2.0}


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.*")))
def test_a_preset_fits_every_flow_that_trains(preset: str) -> None:
    for flow in ("tokenizer", "pretrain", "finetune", "evaluate", "pipeline", "retrain"):
        names = FLOWS[flow].params_model.model_fields
        values = merged(preset, [], names)
        parameters(flow, values)
        assert set(values) == set(names) & set(merged(preset, []))


def test_a_preset_without_anything_for_the_flow_is_refused() -> None:
    with pytest.raises(UserError, match=r"preset 'tiny' holds corpus, .* none of which"):
        merged("tiny", [], FLOWS["deploy"].params_model.model_fields)


def test_a_file_is_taken_whole(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("finetune: {passes: 1}")
    names = FLOWS["pretrain"].params_model.model_fields
    assert merged(str(tmp_path / "mine.yaml"), [], names) == {"finetune": {"passes": 1}}
