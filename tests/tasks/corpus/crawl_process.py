"""A crawl in a process of its own, to be killed: python crawl_process.py HOME SEED OPTIONS."""

import json
import sys
from pathlib import Path

from loopback_site import Crawler

if __name__ == "__main__":
    home, seed, options = sys.argv[1:]
    result = Crawler(Path(home)).crawl(seed, **json.loads(options))
    print(json.dumps({"content": result.outcome.content, "counts": dict(result.counts)}))
