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


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("text", [TEXT, "<p>Hello</p>", "日本語の文章です。1" * 50])
def test_wide_encodings_without_a_mark_are_read_where_they_are_declared(
    encoding: str, text: str
) -> None:
    assert decode(text.encode(encoding), f"text/html; charset={encoding}") == (text, ())


def test_utf16_without_a_byte_order_is_little_endian() -> None:
    assert decode(TEXT.encode("utf-16-le"), "text/html; charset=UTF-16") == (TEXT, ())


def test_a_declared_wide_encoding_is_not_believed_of_other_bytes() -> None:
    body = b"<p>some words\x00 and some more of them</p>"
    text = "<p>some words and some more of them</p>"
    assert decode(body, "text/html; charset=utf-16") == (text, ("nul-bytes",))


def test_a_meta_element_is_believed_where_no_header_says_otherwise() -> None:
    page = f'<html><head><meta charset="koi8-r"></head><body>{"Привет мир " * 9}</body></html>'
    assert decode(page.encode("koi8-r"))[0] == page


# What the Encoding Standard (WHATWG) reads under a label, and a text that Python's codec of that
# name, where it has one, reads otherwise or not at all.
WIDER = [
    ("shift_jis", "cp932", "①日本語の文章です。㈱会社～－"),
    ("x-sjis", "cp932", "日本語の文章です。"),
    ("windows-31j", "cp932", "①日本語の文章です。"),
    ("euc-jp", "euc_jis_2004", "①日本語の文章です。"),
    ("x-euc-jp", "euc_jp", "日本語の文章です。"),
    ("euc-kr", "cp949", "똠방각하 한국어 문장입니다 "),
    ("ks_c_5601-1987", "cp949", "똠방각하 한국어 문장입니다 "),
    ("windows-949", "cp949", "한국어 문장입니다 "),
    ("big5", "big5hkscs", "香港嘅喺咗啲文字中文"),
    ("x-x-big5", "big5", "中文文字內容說明"),
    ("gb2312", "gb18030", "中文文字内容说明镕"),
    ("x-gbk", "gbk", "中文文字内容说明"),
    ("gb_2312-80", "gbk", "中文文字内容说明"),
    ("tis-620", "cp874", "ภาษาไทย “คำพูด” … "),
    ("iso-8859-11", "cp874", "ภาษาไทย “คำพูด” … "),
    ("windows-874", "cp874", "ภาษาไทย “คำพูด” … "),
    ("iso-8859-9", "cp1254", "Türkçe “alıntı” – ğüşi "),
    ("latin5", "cp1254", "Türkçe “alıntı” – ğüşi "),
    ("iso-8859-8-i", "iso8859_8", "שלום עולם "),
    ("logical", "iso8859_8", "שלום עולם "),
    ("x-cp1251", "cp1251", "Привет мир "),
    ("x-mac-cyrillic", "mac_cyrillic", "Привет мир "),
    ("x-mac-roman", "mac_roman", "naïve “x” café "),
    ("koi8-ru", "koi8_u", "Привіт, світе: їжак і ґава "),
]


@pytest.mark.parametrize(("label", "encoding", "words"), WIDER)
def test_labels_mean_what_browsers_read_under_them(label: str, encoding: str, words: str) -> None:
    page = f"<html><body>{words * 3}</body></html>"
    body = page.encode(encoding)
    assert decode(body, f"text/html; charset={label}") == (page, ())
    named = f'<meta charset="{label}">'.encode() + body
    assert decode(named)[0].endswith(page)


@pytest.mark.parametrize(
    ("label", "encoding", "words"),
    [
        ("iso-8859-9", "cp1254", "Bu bir Türkçe metindir ve şığ "),
        ("windows-1252", "cp1252", "Grüße aus Köln – naïve. "),
        ("tis-620", "cp874", "ภาษาไทย "),
    ],
)
def test_a_stray_byte_without_a_character_spoils_no_declared_page(
    label: str, encoding: str, words: str
) -> None:
    text = (words * 30).encode(encoding)
    found = decode(text + b"\x81\x90" + text, f"text/html; charset={label}")
    assert found == (f"{words * 30}\x81\x90{words * 30}", ("undecodable-bytes",))


def test_a_charset_that_reads_all_of_the_page_goes_before_one_that_does_not() -> None:
    page = f'<meta charset="shift_jis">{"日本語の文章です。" * 9}'
    assert decode(page.encode("cp932"), "text/html; charset=iso-8859-1") == (page, ())


@pytest.mark.parametrize("label", ["undefined", "idna", "base64", "rot13", "no-such"])
def test_a_label_that_is_no_charset_is_passed_over(label: str) -> None:
    text = "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 40
    found = decode(text.encode("cp1251"), f"text/html; charset={label}")
    assert found == (text, ("wrong-charset",))


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
