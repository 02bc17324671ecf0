"""Bytes to text, with every lie a page may tell about them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.corpus.charset import decode

TEXT = "Grüße aus Köln – naïve café, 100 €. " * 20


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (TEXT.encode(), "text/html; charset=utf-8"),
        (TEXT.encode(), "text/html; charset=iso-8859-1"),  # the commonest lie
        (TEXT.encode("cp1252"), "text/html; charset=ISO-8859-1"),  # the standard reads it so
        (TEXT.encode("cp1252"), 'text/html; charset="windows-1252"'),
        (TEXT.encode("utf-8-sig"), "text/html; charset=ascii"),
        (TEXT.encode("utf-16"), "text/html"),
        (TEXT.encode("utf-32"), ""),
    ],
)
def test_the_text_comes_out_whatever_the_header_says(body: bytes, header: str) -> None:
    assert decode(body, header) == (TEXT, ())


def test_a_meta_element_is_believed_where_no_header_says_otherwise() -> None:
    page = f'<html><head><meta charset="koi8-r"></head><body>{"Привет мир " * 9}</body></html>'
    assert decode(page.encode("koi8-r"))[0] == page


def test_an_escape_encoding_is_not_taken_for_utf8() -> None:
    page = "日本語の文章です。" * 5
    assert decode(page.encode("iso2022_jp"), "text/html; charset=iso-2022-jp")[0] == page


def test_an_unknown_or_wrong_charset_is_mended_and_counted() -> None:
    body = ("Съешь же ещё этих мягких французских булок, да выпей чаю. " * 40).encode("cp1251")
    text, mended = decode(body, "text/html; charset=utf-8; boundary=x")
    assert "французских" in text
    assert mended == ("wrong-charset",)


def test_nul_bytes_go_and_are_counted() -> None:
    assert decode(b"<p>a\x00b</p>") == ("<p>ab</p>", ("nul-bytes",))


@given(st.binary(max_size=300), st.text(max_size=30))
def test_no_bytes_and_no_header_break_it(body: bytes, header: str) -> None:
    text, _ = decode(body, f"text/html; charset={header}")
    assert "\x00" not in text


def test_pieces_of_another_encoding_do_not_spoil_the_page() -> None:
    body = "Grüße aus Köln – naïve. ".encode() * 3 + "café".encode("cp1252") + b" and more"
    text, mended = decode(body, "text/html; charset=utf-8")
    assert text == "Grüße aus Köln – naïve. " * 3 + "café and more"
    assert mended == ("mixed-charset",)
