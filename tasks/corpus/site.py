"""The embedded corpus site: the standard library's documentation and sources as static pages.

Layout of a rendered directory:
    site.json          what it was rendered from, and the redirects the server answers
    pages/             what the server serves: /library/, /reference/, /source/, robots.txt, …

Pages depend on nothing but the interpreter and RENDERER: rendering twice gives the same bytes and
the same modification times (the interpreter's build date), so ETag and Last-Modified are stable.
"""

from __future__ import annotations

import html
import json
import os
import platform
import shutil
import uuid
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from tasks.corpus.docstring_html import block_html, inline_html
from tasks.corpus.language_docs import Topic, read_topics
from tasks.corpus.module_docs import (
    ClassDoc,
    FunctionDoc,
    Inherited,
    ModuleDoc,
    first_sentence,
)
from tasks.corpus.stdlib_docs import read_modules
from tasks.runtime.errors import UserError

# Raise it whenever rendered bytes change; the server then renders anew.
RENDERER = 3
CRAWL_DELAY = 0.005  # seconds; it is our own machine, a demo should not wait
DUPLICATED = ("json", "pathlib", "textwrap")
REDIRECTS = {
    "/": "/index.html",
    "/library/": "/index.html",
    "/library": "/index.html",
    **{f"/docs/{name}": f"/library/{name}.html" for name in DUPLICATED},
}


def render_site(root: Path) -> int:
    """Render the site into `root` (replaced as a whole); returns the number of pages.

    Raises UserError when `root` holds something else.
    """
    if root.exists() and any(root.iterdir()) and not (root / "site.json").exists():
        raise UserError(f"{root} holds other files; name an empty or new directory for the site")
    pages = dict(_pages(read_modules(), read_topics()))
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.with_name(f"{root.name}.partial-{uuid.uuid4().hex[:8]}")
    stamp = build_date().timestamp()
    try:
        for path, text in pages.items():
            target = partial / "pages" / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text.encode("utf-8", "replace"))
            os.utime(target, (stamp, stamp))
        (partial / "site.json").write_text(json.dumps(_identity() | {"redirects": REDIRECTS}))
        if root.exists():
            shutil.rmtree(root)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(pages)


def is_current(root: Path) -> bool:
    """Whether `root` holds a whole site rendered by this renderer from this interpreter."""
    try:
        rendered = json.loads((root / "site.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return {key: rendered.get(key) for key in _identity()} == _identity()


def build_date() -> datetime:
    """When this interpreter was built: the date its documentation last changed."""
    try:
        return datetime.strptime(platform.python_build()[1], "%b %d %Y %H:%M:%S").replace(
            tzinfo=UTC
        )
    except ValueError:
        return datetime(2024, 1, 1, tzinfo=UTC)


def _identity() -> dict[str, object]:
    return {
        "renderer": RENDERER,
        "python": platform.python_version(),
        "build": list(platform.python_build()),
    }


def _pages(modules: list[ModuleDoc], topics: list[Topic]) -> Iterable[tuple[str, str]]:
    known = {module.name for module in modules}
    order = [module.name for module in modules]
    for position, module in enumerate(modules):
        before = order[position - 1] if position else None
        after = order[position + 1] if position + 1 < len(order) else None
        yield f"/library/{module.name}.html", _module_page(module, known, before, after)
        if module.source is not None:
            yield f"/source/{module.name}.html", _source_page(module)
    for name in DUPLICATED:
        # The same bytes at a second address, as sites with a "latest" tree have.
        module = modules[order.index(name)]
        position = order.index(name)
        yield (
            f"/latest/{name}.html",
            _module_page(module, known, order[position - 1], order[position + 1]),
        )
    letters = _index_entries(modules)
    for letter, entries in letters.items():
        yield f"/library/index-{letter}.html", _letter_page(letter, entries, sorted(letters))
    for topic in topics:
        yield f"/reference/{topic.name}.html", _page(topic.title, topic.body)
    yield "/index.html", _front_page(modules, topics, sorted(letters))
    yield "/search.html", _search_page()
    yield "/private/drafts.html", _page("Drafts", "<p>Nothing here is ready to be read.</p>")
    yield "/robots.txt", _robots()
    yield "/sitemap.xml", _sitemap(modules, topics, sorted(letters))


# --- pages ---------------------------------------------------------------------------------------

_FOOTER = (
    "<p>Rendered from the docstrings and sources of the Python standard library, copyright Python "
    "Software Foundation, under the PSF License Agreement.</p>"
    '<p><a href="/index.html">All modules</a> <a href="/search.html">Search</a> '
    '<a href="/private/calendar/2024-01-01">Calendar</a> '
    '<a href="/private/drafts.html" rel="nofollow">Drafts</a></p>'
)


def _page(title: str, body: str, navigation: str = "", head: str = "") -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n{head}</head>\n<body>\n"
        f'<header><nav><a href="/index.html">Standard library</a>{navigation}</nav></header>\n'
        f"<main>\n<article>\n{body}\n</article>\n</main>\n<footer>{_FOOTER}</footer>\n"
        "</body>\n</html>\n"
    )


def _module_link(name: str) -> str:
    return f'<a href="/library/{name}.html"><code>{name}</code></a>'


def _module_page(module: ModuleDoc, known: set[str], before: str | None, after: str | None) -> str:
    name = module.name
    parts = [f"<h1><code>{name}</code></h1>", block_html(module.doc)]
    parts.append(_see_also(module, known))
    for heading, members in (
        ("Functions", [function.name for function in module.functions]),
        ("Classes", [class_doc.name for class_doc in module.classes]),
    ):
        if members:
            links = ", ".join(f'<a href="#{m}"><code>{name}.{m}</code></a>' for m in members)
            parts.append(f"<p>{heading}: {links}.</p>")
    parts.extend(_functions(name, module.functions, "h2"))
    for class_doc in module.classes:
        parts.extend(_class(name, class_doc))
    navigation = "".join(
        f' <a href="/library/{other}.html">{label}: {other}</a>'
        for label, other in (("Previous", before), ("Next", after))
        if other
    )
    if module.source is not None:
        navigation += f' <a href="/source/{name}.html">Source</a>'
    navigation += f' <a href="/library/index-{_letter(name)}.html">Index</a>'
    title = f"{name}: {module.summary}" if module.summary else name
    return _page(title, "\n".join(part for part in parts if part), navigation)


def _see_also(module: ModuleDoc, known: set[str]) -> str:
    parent = module.name.rpartition(".")[0]
    children = sorted(n for n in known if n.rpartition(".")[0] == module.name)
    related = [n for n in module.imports if n in known and n != parent and n not in children]
    lines = []
    if parent in known:
        lines.append(f"Part of the package {_module_link(parent)}.")
    if children:
        lines.append(f"Submodules: {', '.join(map(_module_link, children))}.")
    if related:
        lines.append(f"See also: {', '.join(map(_module_link, related))}.")
    return "\n".join(f"<p>{line}</p>" for line in lines)


def _functions(owner: str, functions: tuple[FunctionDoc, ...], level: str) -> Iterable[str]:
    """Documented ones with heading and text; the rest as one list of signatures at the end."""
    bare = []
    for function in functions:
        prefix = {"coroutine": "async ", "property": "property "}.get(function.kind, "")
        signature = html.escape(f"{prefix}{owner}.{function.name}{function.signature}", quote=False)
        if not function.doc:
            bare.append(f'<li id="{owner}.{function.name}"><code>{signature}</code></li>')
            continue
        anchor = function.name if level == "h2" else f"{owner}.{function.name}"
        yield (
            f'<section id="{anchor}">\n<{level}><code>{signature}</code></{level}>\n'
            f"{block_html(function.doc)}\n{_also(function.also)}</section>"
        )
    if bare:
        yield "<ul>\n" + "\n".join(bare) + "\n</ul>"


def _also(names: tuple[str, ...]) -> str:
    if not names:
        return ""
    return f"<p>Also available as {', '.join(f'<code>{n}</code>' for n in names)}.</p>\n"


def _class(owner: str, class_doc: ClassDoc) -> Iterable[str]:
    signature = html.escape(f"class {owner}.{class_doc.name}{class_doc.signature}", quote=False)
    yield f'<section id="{class_doc.name}">\n<h2><code>{signature}</code></h2>'
    if class_doc.bases:
        bases = ", ".join(f"<code>{html.escape(base)}</code>" for base in class_doc.bases)
        yield f"<p>Bases: {bases}.</p>"
    if class_doc.doc:
        yield block_html(class_doc.doc)
    if class_doc.also:
        yield _also(class_doc.also)
    yield from _functions(class_doc.name, class_doc.methods, "h3")
    for group in class_doc.inherited:
        yield _inherited(group)
    yield "</section>"


def _inherited(group: Inherited) -> str:
    """What a class has from a base: one line for each method, as its own page tells it in full."""
    name = group.base.rpartition(".")[2]
    items = "\n".join(
        f"<li><code>{name}.{html.escape(method.name + method.signature, quote=False)}</code>: "
        f"{inline_html(first_sentence(method.doc))}</li>"
        for method in group.methods
    )
    return f"<h3>Inherited from <code>{group.base}</code></h3>\n<ul>\n{items}\n</ul>"


def _source_page(module: ModuleDoc) -> str:
    code = html.escape(module.source or "", quote=False)
    return _page(
        f"Source of {module.name}",
        f"<h1>Source of {_module_link(module.name)}</h1>\n<pre><code>{code}</code></pre>",
    )


def _letter(name: str) -> str:
    return name[0].lower()


def _index_entries(modules: list[ModuleDoc]) -> dict[str, list[tuple[str, str, str]]]:
    """Letter → sorted (qualified name, address, one-sentence summary) of all documented names."""
    letters: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for module in modules:
        entries = letters[_letter(module.name)]
        members: list[FunctionDoc | ClassDoc] = [*module.functions, *module.classes]
        for member in members:
            summary = first_sentence(member.doc)
            if summary:
                address = f"/library/{module.name}.html#{member.name}"
                entries.append((f"{module.name}.{member.name}", address, summary))
    return {letter: sorted(letters[letter]) for letter in sorted(letters)}


def _letter_page(letter: str, entries: list[tuple[str, str, str]], letters: list[str]) -> str:
    items = "\n".join(
        f'<li><a href="{address}"><code>{name}</code></a>: {inline_html(summary)}</li>'
        for name, address, summary in entries
    )
    return _page(
        f"Index: {letter.upper()}",
        f"<h1>Index: {letter.upper()}</h1>\n<ul>\n{items}\n</ul>",
        _letter_links(letters),
    )


def _letter_links(letters: list[str]) -> str:
    return "".join(f' <a href="/library/index-{x}.html">{x.upper()}</a>' for x in letters)


def _front_page(modules: list[ModuleDoc], topics: list[Topic], letters: list[str]) -> str:
    items = "\n".join(
        f"<li>{_module_link(m.name)}{': ' + inline_html(m.summary) if m.summary else ''}</li>"
        for m in modules
    )
    language = ", ".join(
        f'<a href="/reference/{t.name}.html">{html.escape(t.title)}</a>' for t in topics
    )
    copies = ", ".join(f'<a href="/latest/{name}.html">{name}</a>' for name in DUPLICATED)
    moved = ", ".join(f'<a href="/docs/{name}">{name}</a>' for name in DUPLICATED)
    return _page(
        "The Python standard library",
        "<h1>The Python standard library</h1>\n"
        f"<p>Every public module of the standard library of Python {platform.python_version()}.</p>"
        f"\n<ul>\n{items}\n</ul>\n<p>The language: {language}.</p>\n"
        f"<p>Latest: {copies}. Old addresses: {moved}.</p>",
        _letter_links(letters),
    )


def _search_page() -> str:
    return _page(
        "Search",
        '<form action="/search.html"><input name="q"></form>\n'
        '<p><a href="/index.html">All modules</a></p>',
        head='<meta name="robots" content="noindex, follow">\n',
    )


# --- files for crawlers; the server puts its own address in place of {base} ----------------------


def _robots() -> str:
    return (
        "User-agent: *\n"
        "Disallow: /private/\n"
        f"Crawl-delay: {CRAWL_DELAY}\n\n"
        "Sitemap: {base}/sitemap.xml\n"
    )


def _sitemap(modules: list[ModuleDoc], topics: list[Topic], letters: list[str]) -> str:
    paths = ["/index.html"]
    paths += [f"/reference/{topic.name}.html" for topic in topics]
    paths += [f"/library/{module.name}.html" for module in modules]
    paths += [f"/library/index-{letter}.html" for letter in letters]
    changed = build_date().date().isoformat()
    urls = "\n".join(
        f"<url><loc>{{base}}{path}</loc><lastmod>{changed}</lastmod></url>" for path in paths
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{urls}\n</urlset>\n'
    )
