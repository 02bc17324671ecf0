"""A stranger's fifty questions: what functions of the standard library do that people ask about.

The names were written down once, by fame, without looking at which of them the model was taught;
some are in the held-out share. An answer is right when it is the first sentence of the function's
own documentation, up to a tenth of its characters.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Any

from tasks.corpus.stdlib_docs import first_sentence
from tasks.runtime.rest import call

NAMES = """
os.listdir os.path.join os.makedirs os.remove os.getcwd shutil.copytree shutil.rmtree shutil.move
json.dumps json.loads json.load re.match re.sub re.findall re.compile math.sqrt math.factorial
math.gcd random.shuffle random.choice random.randint time.sleep subprocess.run textwrap.wrap
textwrap.dedent collections.Counter collections.OrderedDict itertools.chain itertools.groupby
functools.reduce functools.lru_cache functools.partial datetime.datetime.now glob.glob
tempfile.mkdtemp pickle.dumps csv.reader hashlib.sha256 threading.Thread.start logging.info
argparse.ArgumentParser urllib.parse.urlparse socket.create_connection asyncio.run asyncio.gather
heapq.heappush bisect.bisect_left builtins.sorted builtins.len builtins.print
"""
CLOSE = 0.9


def share_right(serve: str) -> float:
    """Ask the endpoint at this address, print each answer, return the share that was right."""
    right = 0
    names = NAMES.split()
    for name in names:
        question = f"What does {name.removeprefix('builtins.')} do?"
        body = {
            "model": "gristmill",
            "temperature": 0,
            "messages": [{"role": "user", "content": question}],
        }
        reply = call(f"{serve}/v1/chat/completions", body, timeout=60)
        answer = reply["choices"][0]["message"]["content"]
        wanted = first_sentence(inspect.getdoc(_named(name)) or "")
        is_right = _likeness(wanted, answer) > CLOSE
        right += is_right
        print("+" if is_right else "-", question, answer[:90].replace("\n", " "))
    return right / len(names)


def _named(path: str) -> Any:
    """`urllib.parse.urlparse` as an object: the longest prefix that is a module, then names."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:depth]))
        except ImportError:
            continue
        for name in parts[depth:]:
            found = getattr(found, name)
        return found
    raise ImportError(path)


def _likeness(wanted: str, answer: str) -> float:
    return difflib.SequenceMatcher(None, wanted.replace("`", ""), answer.replace("`", "")).ratio()
