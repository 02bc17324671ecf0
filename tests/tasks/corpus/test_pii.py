"""Personal data: found with their checksums, left alone where numbers are only numbers."""

import time
from datetime import date
from itertools import pairwise

import pyarrow as pa
import pytest
from documents_of import documents, rows, urls
from hypothesis import given
from hypothesis import strategies as st
from inline_shards import run_inline
from pydantic import ValidationError

from tasks.corpus.personal import KINDS, count, find, is_card, luhn, mask
from tasks.corpus.pii import PIIConfig, drop_pii, pii
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Workspace, stage

EVERY = frozenset(kind.name for kind in KINDS)

AWS_NAMES = (
    "aws_secret_access_key = ",
    'AWS_SECRET_ACCESS_KEY="',
    '"SecretAccessKey": "',
    "<SecretAccessKey>",
    "Secret Access Key: ",
    "Secret_Access_Key=",
)
FOUND = {
    "emails": [
        "jane.doe+news@mail.company.co.uk",
        "Write to x_1@host.io.",
        "_me@host.io_",
        *("foo@münchen.de", "info@почта.рф", "写信给 foo@bar.com或者", "a@xn--mnchen-3ya.de"),
    ],
    "cards": [
        *("4111 1111 1111 1111", "5500-0055-5555-5559", "card 378282246310005 is"),
        *("3782 822463 10005", "3714-496353-98431", "4111.1111.1111.1111"),
        *("5555\u00a05555\u00a05555\u00a04444", "3782\u202f822463\u202f10005"),
        "4111111111111111,5500-0055-5555-5559,3782 822463 10005,5500005555555559",
    ],
    "ibans": [
        "DE89 3704 0044 0532 0130 00",
        "GB82WEST12345698765432",
        "DE89\u00a03704 0044 0532 0130 00",
    ],
    "ip_addresses": [
        *("from 8.8.8.8 today", "93.184.216.34", "[2a00:1450:4001:82f::200e]:443"),
        *("from 2607:f8b0:4005:0805:0000:0000:0000:200e.", "2a00:1450::1/64: down"),
        *("2a00:1450:4001:81b::", "[2a00:1450:4001::]:443"),
    ],
    "telephones": [
        *("+49 30 901820", "call (415) 555-2671 now", "415-555-2671", "+14155552671"),
        *("1-415-555-2671", "1 (415) 555-2671", "(415) 555 2671", "415.555.2671."),
        *(
            "020 7946 0018",
            "(020) 7946 0018",
            "Call 0161 496 0000!",
            "01632 960001",
            "07700 900123",
        ),
        *("030 901820", "030/901820", "(030) 90 18 20", "Tel.: 0171-1234567", "089 / 12 34 56 78"),
        *("01 23 45 67 89", "06.12.34.56.78", "T: 05 61 22 33 44, fax"),
        *("0049 30 901820", "00 33 1 23 45 67 89.", "0044 (0)20 7946 0018", "001-415-555-2671"),
    ],
    "secrets": [
        "AKIA" + "IOSFODNN7ABCDEFG",
        "ghp_" + "a1B2" * 9,
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0." + "x" * 40,
        "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nlQ\n-----END PGP PRIVATE KEY BLOCK-----",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n",
        f"-----BEGIN RSA PRIVATE KEY-----\nDEK-Info: AES-128-CBC,A1\n\n{'aB1/' * 16}\n  aB1=",
        f"-----BEGIN PRIVATE KEY-----\\n{'aB1/' * 16}\\n{'aB1/' * 9} and so on",
        "hf_" + "aBcDe" * 7,
        "npm_" + "a1B2" * 9,
        *(f"{name}{'wJalrXUtnF' * 4}" for name in AWS_NAMES),
        *("xapp-1-" + "A1b2" * 6, "xoxb-" + "123456789012-abcdefghijkl"),
        "https://hooks.slack.com/services/T" + "0ABCDEFGH/B0ABCDEFGH/" + "a1B2" * 6,
        *("gldt-" + "a1B2_" * 4, "GOCSPX-" + "a1B2" * 7, "AIza" + "a1B2c" * 7),
    ],
}
NOTHING = [
    "someone@example.com", "user@localhost", "@decorator", "a @ b", "git@github",
    "4111 1111 1111 1112", "1234567890123456", "0000 0000 0000 0000", "2.7182818284590452",
    "0,4111111111111111", "4111111111111111,55", "1.234,5500000000000004", "4111111111111111.5,",
    "4111111111111111,1234567890123456", "225618707473378,231988790171331,235484153604672",
    "a@b_c.de", "ü@ö", "foo@bar.com_x",
    "2a00:1450:4001::/48", "2a00::", "2a00:1450:b::c::x", "a -----BEGIN PRIVATE KEY----- line",
    "-----BEGIN PRIVATE KEY----- is how it begins.", "-----BEGIN PRIVATE KEY-----\nMIIE...\n",
    "127.0.0.1", "192.168.0.1", "version 1.2.3.4.5", "999.1.1.1", "3.11.0",
    "2024-05-01 12:00:00", "range(1000000)", "0xdeadbeef", "ISBN 978-3-16-148410-0",
    "2001:db8::1", "fe80::1", "std::vector", "2024:05:01 12:00:00", "3c:22:fb:aa:bb:cc",
    "0010 2030 4050 6070", "0020 3040 5060", "00 12 34 56 78 90", "0033 1 2 3", "0x0049 30 901820",
    "2a00::/32", "3fff::x", "12:30:45", "sizes 100-200-3000", "the sk-learn package",
    "DE00 3704 0044 0532 0130 00", "4111.1111.1111.1112", "3782 822463 10006", "hf_hub_download",
    "npm_config_registry", "secret_access_key: str", "a" * 40, "wJalrXUtnF" * 4, "xoxb-token",
    "-----BEGIN PGP PUBLIC KEY BLOCK-----\nmQ\n-----END PGP PUBLIC KEY BLOCK-----",
    # Numbers with a 0 in front, or in groups, that nobody can call.
    "01.02.2024", "01-02-2024 12:30", "2024 01 02 03 04", "v0.12.345678", "0.306.40615",
    "1 200 300 4000", "211-555-0100", "415-911-0100",
    "ISBN 0-306-40615-2", "ISBN 0 306 40615 2", "ISBN 978 0 306 40615 7", "CVE-2021-0123-45678",
    "x = [012 345 678]", "0123 4567 8901", "0001 0002 0003", "0x01 23 45 67 89",
    "00000010: 01 23 45 67 89 ab cd ef", "01 23 45 67 89 0a 1b", "01:23:45 67", "0110 1001 0110",
    "0 12 345 678", "3.14 0123 45678", "$012 3456789", "a[0] 1234 56789",
    "2021-01-02 03:04:05", "00:00:01,234 0567", "ratio 0.123 4567890",
]  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    run_inline(monkeypatch)


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, texts in FOUND.items() for t in texts])
def test_what_is_personal_is_found(kind: str, text: str) -> None:
    found = {name: number for name, number in count(text).items() if number}
    assert found == {kind: 1}


@pytest.mark.parametrize("text", NOTHING)
def test_what_is_not_is_left_alone(text: str) -> None:
    assert not any(count(text).values()), count(text)
    assert mask(text, EVERY) == (text, {})


@given(st.text(alphabet="0123456789", min_size=12, max_size=18))
def test_luhns_digit_accepts_one_number_in_ten(digits: str) -> None:
    assert sum(luhn(digits + last) for last in "0123456789") == 1


@given(st.text(max_size=300))
def test_any_text_is_masked_once_and_for_all(text: str) -> None:
    clean, _ = mask(text, EVERY)
    assert mask(clean, EVERY)[0] == clean


def masked(documents: Manifest, **options) -> Manifest:
    return pii(PIIConfig(action="mask", **options).masking(), documents=documents)


def dropped(documents: Manifest, most: int) -> Manifest:
    config = PIIConfig(action="drop", most=most)
    clean = pii(config.masking(), documents=documents)
    return drop_pii(config.limit(), documents=clean, attributes=clean)


def test_documents_are_masked_or_dropped_by_configuration() -> None:
    given = documents(
        {
            "http://h/a": "Ask jane@company.io or call +49 30 901820.",
            "http://h/b": "Nobody is named here.",
        }
    )
    clean = masked(given)
    assert rows(clean)[0]["text"] == "Ask <email> or call <telephone>."
    assert rows(clean)[0]["bytes"] == len("Ask <email> or call <telephone>.")
    assert clean.metrics == {"masked_emails": 1, "masked_telephones": 1}
    told = [(row["url"], row["emails"], row["ibans"]) for row in rows(clean, "attributes-")]
    assert told == [("http://h/a", 1, 0), ("http://h/b", 0, 0)]
    only = masked(given, kinds=("emails",))
    assert rows(only)[0]["text"] == "Ask <email> or call +49 30 901820."
    assert urls(dropped(given, 2)) == ["http://h/a", "http://h/b"]
    assert urls(dropped(given, 1)) == ["http://h/b"]
    (gone,) = rows(dropped(given, 1), "rejected-")
    assert (gone["rule"], gone["reason"]) == ("pii", "2 finds > 1")
    assert "jane" not in gone["text"]
    with pytest.raises(ValidationError, match="there are secrets, emails"):
        PIIConfig(kinds=("names",))


def test_texts_that_are_one_when_masked_are_judged_each_by_its_own_finds() -> None:
    texts = {"http://h/a": "Ask <email>.", "http://h/b": "Ask jane@company.io."}
    given = documents(texts)
    assert len({row["id"] for row in rows(masked(given))}) == 1
    assert urls(dropped(given, 0)) == ["http://h/a"]


def test_a_card_needs_more_than_a_checksum() -> None:
    assert is_card("4111111111111111")
    assert not is_card("411111111111")


@pytest.mark.parametrize(
    "piece",
    [
        *("4111111111111111.1111111111111,", "4111111111111111,", "4111-1111-1111-1112,"),
        *("2a00:1450:4001:", "2a00::", "-----BEGIN PRIVATE KEY-----\n", "a: b\n", "aB1/"),
        *("a@ü.", "_", "ü-", "a@b.com_", "\\n", "\n"),
    ],
)
def test_no_piece_of_a_find_is_slow_when_repeated(piece: str) -> None:
    text = "-----BEGIN A PRIVATE KEY-----" + piece * (400_000 // len(piece))
    begun = time.process_time()
    mask(text, EVERY)
    assert time.process_time() - begun < 5


def test_many_finds_take_time_in_proportion() -> None:
    text = "Write to jane.doe@mail.company.io or call +49 30 901820 today. " * 20_000
    begun = time.process_time()
    clean, finds = mask(text, EVERY)
    assert time.process_time() - begun < 5  # compared with each other they took minutes
    assert finds == {"emails": 20_000, "telephones": 20_000}
    assert clean == "Write to <email> or call <telephone> today. " * 20_000


def test_many_beginnings_of_one_token_take_time_in_proportion() -> None:
    text = "eyJaaaaaaaaaa-" * 30_000
    begun = time.process_time()
    assert mask(text, EVERY) == (text, {})
    assert time.process_time() - begun < 5  # read again from each of them it took half a minute


@given(
    st.sampled_from(["{0} {1}", "{0}/{1}", "({0}) {1}", "{0}-{1}"]),
    st.from_regex(r"0[1-9][2-9]{1,3}", fullmatch=True),
    st.from_regex(r"[1-9]\d{5,6}", fullmatch=True),
)
def test_a_national_number_is_masked_whole_between_words(form: str, area: str, rest: str) -> None:
    number = form.format(area, rest)
    clean, finds = mask(f"Call {number}, or write.", EVERY)
    if len(set(area + rest)) >= 4:
        assert (clean, finds) == ("Call <telephone>, or write.", {"telephones": 1})
    assert mask(f"Call 1{number}, or x{number}.", EVERY)[1] == {} or "(" in form


@given(st.dates(), st.sampled_from(["%d.%m.%Y", "%d-%m-%Y", "%d %m %Y", "%Y-%m-%d", "%m/%d/%Y"]))
def test_a_date_is_no_telephone(day: date, form: str) -> None:
    text = f"on {day.strftime(form)} at 10"
    assert mask(text, EVERY) == (text, {})


@given(st.lists(st.integers(0, 999), min_size=1, max_size=5), st.sampled_from([".", "-"]))
def test_a_version_is_no_telephone(parts: list[int], separator: str) -> None:
    text = f"since version {separator.join(map(str, parts))} only"
    assert mask(text, EVERY - {"ip_addresses"}) == (text, {})


def test_a_secret_key_is_masked_and_its_name_stays() -> None:
    clean, finds = mask(f"aws_secret_access_key = {'wJalrXUtnF' * 4}\nregion = x", EVERY)
    assert (clean, finds) == ("aws_secret_access_key = <secret>\nregion = x", {"secrets": 1})


@given(st.lists(st.sampled_from([t for texts in FOUND.values() for t in texts]), max_size=8))
def test_finds_never_overlap(pieces: list[str]) -> None:
    text = "".join(pieces)
    spans = sorted((start, end) for _, start, end in find(text))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@stage("tested-titles", version=1, retries=0)
def titled(config: PIIConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    table = work.store.of(documents).read_table("documents-00000.parquet")
    titles = pa.array(["Contact jane@company.io", "A title"])
    place = table.schema.get_field_index("title")
    work.write_table("documents-00000.parquet", table.set_column(place, "title", titles))
    return Outcome()


def test_titles_are_masked_like_text() -> None:
    texts = {"http://h/a": "One.", "http://h/b": "Two."}
    made = titled(PIIConfig(), documents=documents(texts))
    clean = masked(made)
    assert [row["title"] for row in rows(clean)] == ["Contact <email>", "A title"]
    assert clean.metrics == {"masked_emails": 1}
    assert urls(dropped(made, 0)) == ["http://h/b"]
