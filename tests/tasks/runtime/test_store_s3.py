"""The artifact store behind S3's protocol, spoken to a real server on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.runtime import store as stores
from tasks.runtime.errors import Unavailable, UserError
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import MANIFEST, Store
from tests.s3_server import S3Server, s3_server

BUCKET = "s3://bucket/some/prefix"


class PartsConfig(StageConfig):
    parts: int = 2
    breaks_at: int = -1


made: list[int] = []


@stage("s3-parts", version=1, retries=0)
def parts_of(config: PartsConfig, work: Workspace) -> Outcome:
    """A file for each number, some scratch, one file from the local disk."""
    for number in range(config.parts):
        if work.has(f"part-{number}.json"):
            continue
        if number == config.breaks_at and number not in made:
            made.append(number)
            raise ConnectionError("the machine went away")
        made.append(number)
        work.write_json(f"part-{number}.json", number)
        work.write_json(f"_state/{number}.json", number)
    local = work.scratch("copy") / "large.bin"
    local.write_bytes(b"x" * 12_000_000)  # more than one part of an upload
    work.put(local, "deep/large.bin")
    return Outcome(counts={"parts": config.parts})


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        running.bucket("bucket")
        yield running


@pytest.fixture(autouse=True)
def home(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GRISTMILL_STORE", f"{BUCKET}/{tmp_path.name}")
    made.clear()
    return tmp_path / "home"


def test_an_artifact_is_made_found_read_and_verified() -> None:
    manifest = parts_of(PartsConfig())
    assert parts_of(PartsConfig()) == manifest and made == [0, 1]
    store = Store.open()
    assert store.find("s3-parts", manifest.fingerprint) == manifest
    assert store.get("s3-parts", manifest.fingerprint[:12]) == manifest
    assert [store.stages(), store.all("s3-parts")] == [["s3-parts"], [manifest]]
    assert manifest.names() == ["deep/large.bin", "part-0.json", "part-1.json", "report.json"]
    assert store.of(manifest).names() == sorted([*manifest.names(), MANIFEST])  # no scratch
    store.verify(manifest)
    copy = store.local(manifest, "deep/large.bin")
    assert copy.read_bytes() == b"x" * 12_000_000
    copy.write_bytes(b"y")
    with pytest.raises(UserError, match="the store is damaged"):
        store.local(manifest, "deep/large.bin")


def test_shards_of_an_attempt_that_broke_off_are_taken_up_and_invisible_until_then() -> None:
    config = PartsConfig(parts=3, breaks_at=2)
    with pytest.raises(ConnectionError):
        parts_of(config)
    store = Store.open()
    assert store.all("s3-parts") == []
    assert len(store.unfinished("s3-parts")) == 1
    assert made == [0, 1, 2]
    manifest = parts_of(config)
    assert made == [0, 1, 2, 2]
    assert store.all("s3-parts") == [manifest]


def test_the_manifest_is_written_last(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = stores.Directory.write_bytes

    def noted(self: stores.Directory, name: str, data: bytes) -> object:
        if name == MANIFEST:
            written.extend(name for name in self.names() if not name.startswith("_"))
        return write(self, name, data)

    monkeypatch.setattr(stores.Directory, "write_bytes", noted)
    manifest = parts_of(PartsConfig(parts=1))
    assert written == manifest.names()


def test_removing_takes_the_manifest_first_and_leaves_the_neighbours() -> None:
    gone, stays = parts_of(PartsConfig(parts=1)), parts_of(PartsConfig(parts=2))
    store = Store.open()
    store.of(gone).remove()
    assert store.all("s3-parts") == [stays]
    store.of(gone).remove()  # nothing is there
    store.verify(stays)


def test_a_copy_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Store.open().directory("s3-parts", "0" * 64)
    with pytest.raises(IsADirectoryError):
        directory.put(tmp_path, "part-0.json")
    source = tmp_path / "source"
    source.write_bytes(b"x" * 3_000_000)

    class Failing:
        def update(self, block: bytes) -> None:
            raise OSError("the disk cannot be read")

    monkeypatch.setattr(stores.hashlib, "sha256", Failing)
    with pytest.raises(OSError, match="cannot be read"):
        directory.put(source, "part-1.json")
    assert directory.names() == []


def test_what_is_wrong_with_the_store_is_one_sentence(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRISTMILL_STORE", "s3://no-such-bucket/prefix")
    with pytest.raises(UserError, match="'s3://no-such-bucket/prefix' lies in a bucket that does"):
        parts_of(PartsConfig())
    monkeypatch.setenv("GRISTMILL_STORE", "s3://")
    with pytest.raises(UserError, match="give s3://BUCKET/PREFIX"):
        parts_of(PartsConfig())
    monkeypatch.setenv("GRISTMILL_STORE", "gopher://bucket/prefix")
    with pytest.raises(UserError, match="use a directory or s3://"):
        parts_of(PartsConfig())


@pytest.mark.slow  # the client tries again for six seconds
def test_a_store_that_does_not_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="check the network and AWS_ENDPOINT_URL"):
        parts_of(PartsConfig())


def test_credentials_that_are_refused_are_what_the_sentence_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with s3_server(INITIAL_NO_AUTH_ACTION_COUNT="0") as strict:
        monkeypatch.setenv("AWS_ENDPOINT_URL", strict.url)
        with pytest.raises(UserError, match=r"access to .* is denied; give credentials"):
            parts_of(PartsConfig())
