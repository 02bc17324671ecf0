"""What a person says about a crawl: where to start, how far and how politely to go."""

from __future__ import annotations

from pydantic import Field, field_validator

from tasks.corpus.fetch_plan import Limits
from tasks.corpus.site_options import SiteOptions
from tasks.corpus.urls import canonical_pattern, canonical_url, domain_name
from tasks.runtime.fingerprint import place
from tasks.runtime.stage_config import StageConfig

EMBEDDED = "embedded:stdlib"
# With another of these an address is another page: asked otherwise, or judged otherwise. With all
# others (pace, limits, scope, seeds) a later epoch goes on from what is known.
PAGE_SETTINGS = ("user_agent", "sites", "content_types", "honour_opt_outs")


class CrawlOptions(StageConfig):
    """How politely and how far to crawl."""

    domains: tuple[str, ...] = Field(
        (),
        description="Domains, subdomains included, to follow links to besides the seeds' hosts.",
    )
    include: tuple[str, ...] = Field(
        (),
        description="If given, only addresses matching one of these are fetched: a prefix of the "
        "path, /docs/, a glob over the path, `/docs/*.html`, or one over the whole address, "
        "`https://*.example.org/*`.",
    )
    exclude: tuple[str, ...] = Field(
        ("/source/", "/library/index-"),
        description="Addresses never fetched, written like include. The default leaves out the "
        "embedded site's source code, and its alphabetical index, which would show to training "
        "the first sentence of functions that are held out of it.",
    )
    max_pages: int = Field(2000, ge=1, description="Documents after which the crawl stops.")
    max_pages_per_host: int | None = Field(
        None,
        ge=1,
        description="Documents of one host after which it is asked for no more; empty: "
        "one host may fill the whole crawl.",
    )
    max_numbered: int = Field(
        10_000,
        ge=1,
        description="Pages of one host that differ in numbers alone, of those whose path ends in "
        "a month or a day (/calendar/2024/5/17, /05-2024, /20240517). Further ones are taken for "
        "an endless calendar, unless a sitemap names them or an earlier epoch had them; 10,000 "
        "days are 27 years. Articles by date and name are not counted.",
    )
    max_depth: int = Field(16, ge=0, description="Links between a seed and a page, at most.")
    revisit_chance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="In a later epoch, pages that are less likely to have changed, by how often "
        "they did so far, are taken over without asking. 0 asks for every page.",
    )
    keep_stale: int = Field(
        3,
        ge=0,
        description="Later epochs in a row in which a page that cannot be had for a passing reason "
        "(no answer, 429, 5xx) stays as it was. 404, 410 and opt-outs remove it at once.",
    )
    max_redirects: int = Field(5, ge=0, description="Redirects in a row that are followed.")
    max_bytes: int = Field(
        10_000_000, ge=1, description="Size in bytes, after decompression, of the largest page."
    )
    max_delay: float = Field(
        60.0,
        gt=0,
        description="Seconds between requests, or of Retry-After, beyond which a host is left.",
    )
    content_types: tuple[str, ...] = Field(
        ("text/html", "application/xhtml+xml", "text/plain"),
        description="Media types of pages that are kept. With application/pdf among them, links to "
        "PDF files are followed and their text is read.",
    )
    honour_opt_outs: bool = Field(
        True,
        description="Leave out what is reserved from text mining: sites whose robots.txt shuts out "
        "several crawlers of AI companies or says ai-train=no, pages with tdm-reservation or noai.",
    )
    try_sitemap: bool = Field(
        True,
        description="Ask a host once for /sitemap.xml where its robots.txt names no sitemap.",
    )
    sites: tuple[SiteOptions, ...] = Field(
        (), description="Headers, cookies, proxy and delay for single sites."
    )
    user_agent: str = Field(
        "Gristmill/1.0",
        pattern=r"^[A-Za-z_-]+(/\S+)?$",
        description="Name sent to sites; the part before the slash is looked up in robots.txt.",
    )
    contact: str = Field(
        "",
        pattern=r"^[ -~]*$",
        description="E-mail or web address where the owner of a site reaches you; sent with every "
        "request. Give one before crawling sites that are not yours.",
    )
    delay: float = place(
        1.0,
        ge=0,
        description="Seconds between requests to a host whose robots.txt names no Crawl-delay.",
    )
    timeout: float = place(30.0, gt=0, description="Seconds one request may take in all.")
    retries: int = place(2, ge=0, description="Further attempts after a failure that may pass.")
    parallel: int = place(4, ge=1, description="Requests in flight to one host, at most.")
    parallel_total: int = place(
        500, ge=1, description="Requests in flight to all hosts together, at most."
    )
    round_seconds: float = place(
        10.0, gt=0, description="About how long one round of fetching takes."
    )
    segment_bytes: int = place(
        64 * 1024 * 1024, ge=1, description="Size in bytes at which a WARC file is closed."
    )

    @field_validator("domains")
    @classmethod
    def _are_names(cls, domains: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(domain_name, domains))

    @field_validator("include", "exclude")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(canonical_pattern, patterns))


class CrawlConfig(CrawlOptions):
    """What to crawl and how politely."""

    seeds: tuple[str, ...] = Field(
        (EMBEDDED,),
        min_length=1,
        description="Addresses the crawl starts from. embedded:stdlib is the standard library's "
        "documentation on this machine and needs no network.",
    )
    epoch: int = Field(
        0,
        ge=0,
        description="Raise it to crawl again: pages are asked for with If-None-Match and "
        "If-Modified-Since, and if none changed nothing after the crawl runs again. Pace, limits "
        "and scope may be others, seeds be added; with another user_agent, sites, content_types "
        "or honour_opt_outs it starts anew, and says so.",
    )

    @field_validator("seeds")
    @classmethod
    def _are_addresses(cls, seeds: tuple[str, ...]) -> tuple[str, ...]:
        for seed in seeds:
            if seed == EMBEDDED:
                continue
            if seed.startswith("embedded:"):
                raise ValueError(f"seed {seed!r} is not known; the embedded site is {EMBEDDED!r}")
            try:
                canonical_url(seed)
            except ValueError as error:
                raise ValueError(
                    f"seed {seed!r} cannot be crawled: {error}; write it like https://example.org/"
                ) from error
        return seeds

    @property
    def agent(self) -> str:
        """The User-Agent header."""
        return f"{self.user_agent} (+{self.contact})" if self.contact else self.user_agent

    def limits(self) -> Limits:
        return Limits(
            user_agent=self.agent,
            token=self.user_agent.partition("/")[0],
            contact=self.contact,
            delay=self.delay,
            max_delay=self.max_delay,
            timeout=self.timeout,
            max_bytes=self.max_bytes,
            retries=self.retries,
            parallel=self.parallel,
            content_types=self.content_types,
            honour_opt_outs=self.honour_opt_outs,
            try_sitemap=self.try_sitemap,
            sites=tuple(site.resolved() for site in self.sites),
        )
