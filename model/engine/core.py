"""The engine without its thread: sequences in, one step at a time, updates out."""

import logging
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from model.chat import Tokenizer
from model.engine.counters import Counters
from model.engine.draft import Drafter
from model.engine.logprobs import logprobs
from model.engine.pages import PAGE, PageTable
from model.engine.programs import Program
from model.engine.readable import PromptError, require_readable
from model.engine.runner import Runner, Span
from model.engine.sampling import Adjustment, ConstraintError, Sampling, choose_apart
from model.engine.scheduler import Scheduler
from model.engine.sequence import FinishReason, TokenLogprob, Update
from model.engine.sequence import Sequence as Answer
from model.engine.speculation import NgramIndex
from model.engine.text import TextStream
from model.engine.weights import Weights
from model.transformer import Transformer

log = logging.getLogger(__name__)

GRID = 8 * PAGE  # tokens of a prompt read at once in deterministic mode


class Core:
    """Scheduler, network and sampling put together. Not thread-safe: one thread owns it.

    slots: sequences in a batch at most. tokenizer: None when only token ids are wanted. stop_ids:
    tokens that end an answer; None: the tokenizer's. kv_tokens: size of the cache; None: a full
    context for each slot. weights: how they are kept, see `engine.weights`. version: names the
    model; a cache never serves those of another.

    deterministic: the same prompt gives bitwise the same logits whoever else is being answered and
    whatever the cache holds. Every sequence then goes through the network by itself, prompts in
    fixed chunks, so that each sum is always taken in the same order: a batch is no faster than its
    members one after the other.

    speculate: how many tokens to guess at most, by the `draft` model where there is one, else from
    what followed the last ones earlier in the text; the network reads all guesses at once and keeps
    those it would have chosen itself, so answers are the same and only come faster.

    compiled: a step of a single answer becomes a program of its own (`programs`) once there were
    many of them, on so many `threads`; not in deterministic mode, whose bits must not change then.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        *,
        slots: int = 32,
        prefill_tokens: int = 1024,
        kv_tokens: int | None = None,
        weights: Weights = "float32",
        stop_ids: Iterable[int] | None = None,
        version: str = "",
        reuse: bool = True,
        deterministic: bool = False,
        speculate: int = 0,
        draft: Transformer | None = None,
        compiled: bool = False,
        threads: int = 1,
    ) -> None:
        self.config = model.config
        self.tokenizer = tokenizer
        if stop_ids is None:
            stop_ids = tokenizer.stop_ids if tokenizer else ()
        self.stop_ids = frozenset(stop_ids)
        # Rows of a padded output matrix stand for no token.
        self.vocabulary = min(self.config.vocab_size, len(tokenizer) if tokenizer else 2**31)
        self.deterministic = deterministic
        self.speculate = speculate
        per_context = -(-self.config.context // PAGE)
        pages = slots * per_context if kv_tokens is None else -(-kv_tokens // PAGE)
        if pages < per_context:
            raise ValueError(
                f"kv_tokens {kv_tokens} holds not even one context of {self.config.context} tokens"
            )
        self.scheduler = Scheduler(
            PageTable(pages),
            slots=slots,
            budget=max(prefill_tokens, slots * (1 + speculate) + PAGE),
            root=version.encode(),
            reuse=reuse,
            grid=GRID if deterministic else None,
        )
        compiled = compiled and not deterministic
        self.runner = Runner(model, pages, weights, deterministic, compiled)
        self.program = Program(self.runner, threads) if compiled else None
        self.drafter: Drafter | None = None
        if draft is not None and speculate:
            if draft.config.context < self.config.context:
                raise ValueError(
                    f"the draft model's context of {draft.config.context} tokens is shorter than "
                    f"the model's {self.config.context}; draft with another one"
                )
            self.drafter = Drafter(draft, slots, weights)
        self.counters = Counters(pages=pages)

    def sequence(
        self,
        id: str,
        prompt: list[int],
        sampling: Sampling,
        *,
        streamed: bool = True,
        embed: bool = False,
    ) -> Answer:
        """Check a prompt and make the sequence that `add` takes; may be called from any thread.

        embed: no answer is wanted but the mean of the prompt's last hidden states. Raises
        PromptError for an empty prompt, ids outside the vocabulary, or no room for an answer.
        """
        context = self.config.context
        asks = not embed and sampling.max_tokens != 0
        require_readable(prompt, sampling, context, self.vocabulary, asks)
        if sampling.stop and self.tokenizer is None:
            raise PromptError("stop strings need a tokenizer; this engine was made without one")
        text = TextStream(self.tokenizer, sampling.stop) if self.tokenizer else None
        limit = 0
        if asks:
            wanted = context if sampling.max_tokens is None else sampling.max_tokens
            limit = min(wanted, context - len(prompt))
        sequence = Answer(id, prompt, sampling, text, limit, streamed, embed)
        ends = self.ends(sampling)
        sequence.adjustment = Adjustment.of(sampling, prompt, ends, self.vocabulary)
        if self.speculate and not self.deterministic and sequence.adjustment is None:
            sequence.guessed = True
            sequence.lookup = None if self.drafter else NgramIndex()
        return sequence

    def ends(self, sampling: Sampling) -> frozenset[int]:
        """The tokens that end an answer."""
        own = frozenset() if sampling.ignore_eos else self.stop_ids
        return own.union(sampling.stop_ids)

    def add(self, sequence: Answer) -> None:
        sequence.added = time.monotonic()
        self.scheduler.add(sequence)
        self.counters.requests += 1
        self.counters.prompt_tokens += len(sequence.prompt)
        self.counters.waiting += 1

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[Update]:
        """One token for every answer under way, and what the budget leaves of the prompts."""
        updates: list[Update] = []
        before, ended = len(self.scheduler.running), self.counters.ended
        self.scheduler.admit()
        for source, target in self.scheduler.moved:
            self.runner.cache.shift(source, target)
        if self.scheduler.copies:
            self.runner.cache.copy(self.scheduler.copies)
        if admitted := self.scheduler.running[before:]:
            for sequence in admitted:
                sequence.waited = time.monotonic() - sequence.added
                self.counters.cached_tokens += sequence.cached
            self._count()
        if self.speculate:
            self._guess()
        plan = self.scheduler.plan()
        if self.deterministic:
            for sequence, span in plan:
                self._read([(sequence, span)], updates)
        elif plan:
            self._read(plan, updates)
        size = sum(len(span.tokens) for _, span in plan)
        self.counters.count_step(size)
        if size == 1 and self.program is not None and self.runner.single is None:
            self.program.stepped()
        if self.counters.ended != ended:
            self._count()
        return updates

    def abort(self, ids: Iterable[str], reason: FinishReason = "abort") -> list[Update]:
        """Take sequences out, whether waiting or running; ids that have finished are no error."""
        updates = [self._finish(sequence, reason) for sequence in self.scheduler.find(ids)]
        self.counters.aborted += len(updates)
        self._count()
        return updates

    def close(self) -> None:
        """Leave nothing running in the background."""
        if self.program is not None:
            self.program.close()

    def check(self) -> None:
        """Raise AssertionError when the pages do not match the sequences."""
        self.scheduler.check()

    def _count(self) -> None:
        self.counters.running = len(self.scheduler.running)
        self.counters.waiting = len(self.scheduler.waiting)
        self.counters.pages_used = self.counters.pages - self.scheduler.pages.free

    def _guess(self) -> None:
        """Draft the next tokens of the answers under way."""
        wanted = []
        for sequence in self.scheduler.running:
            sequence.draft = []
            if not sequence.guessed or sequence.reading:
                continue
            count = min(self.speculate, sequence.limit - len(sequence.tokens) - 1)
            if sequence.lookup is None:
                wanted.append((sequence, count))
            else:
                sequence.lookup.extend(sequence.known(sequence.lookup.length, sequence.length))
                sequence.draft = sequence.lookup.guess(count)
        if self.drafter is not None:
            self.drafter.keep(self.scheduler.running)
            self.drafter.guess(wanted, self.vocabulary)
        lengths = [len(s.draft) for s in self.scheduler.running if s.draft]
        self.counters.drafts += len(lengths)
        self.counters.drafted_tokens += sum(lengths)

    def _read(self, plan: Sequence[tuple[Answer, Span]], updates: list[Update]) -> None:
        """One pass through the network, and what follows from it."""
        hidden = self.runner.forward([span for _, span in plan])
        ready: list[tuple[Answer, Span]] = []
        rows: list[int] = []
        row = 0
        for sequence, span in plan:
            part = hidden[row : row + len(span.tokens)]
            row += len(span.tokens)
            if not sequence.reading:
                ready.append((sequence, span))
                rows += range(row - len(span.tokens), row)
                continue
            if sequence.needs_whole_prompt:
                self._examine(sequence, span, part)
            self.scheduler.advance(sequence, span.end)
            if sequence.reading:
                continue
            sequence.read = time.monotonic() - sequence.added
            if sequence.limit == 0:
                updates.append(self._finish(sequence, "length"))
            else:
                ready.append((sequence, span))
                rows.append(row - 1)
        if ready:
            if len(rows) < len(hidden):
                hidden = hidden[torch.tensor(rows, device=hidden.device)]
            self._advance(ready, self._logits(hidden), updates)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.runner.logits(hidden)[:, : self.vocabulary]

    def _examine(self, sequence: Answer, span: Span, hidden: Tensor) -> None:
        """Note what is wanted of the prompt itself; hidden (t, C)."""
        if sequence.embed:
            total = hidden.float().sum(0)
            sequence.hidden = total if sequence.hidden is None else sequence.hidden + total
        if sequence.sampling.prompt_logprobs:
            if span.start == 0:
                sequence.prompt_logprobs.append(None)
            following = sequence.prompt[span.start + 1 : span.end + 1]
            if following:
                logits = self._logits(hidden[: len(following)])
                count = sequence.sampling.logprobs or 0
                sequence.prompt_logprobs += logprobs(logits, following, [count] * len(following))

    def _advance(
        self, ready: list[tuple[Answer, Span]], logits: Tensor, updates: list[Update]
    ) -> None:
        """Choose and append what comes next of each sequence, and finish those that end with it.

        logits: for each sequence the row after its last token, then one after each drafted token. A
        drafted token holds if it is the one chosen in its place; the first that is not ends what
        can be known in this step. What fails for one sequence, its form or its numbers, ends that
        one with "error".
        """
        sequences = [sequence for sequence, _ in ready]
        rows = [(s, ahead) for s in sequences for ahead in range(1 + len(s.draft))]
        adjusted = logits
        broken: dict[Answer, Exception] = {}
        if any(s.adjustment for s in sequences):
            adjusted = logits.clone()
            for row, (sequence, _) in enumerate(rows):
                if sequence.adjustment is None:
                    continue
                try:
                    adjusted[row] = sequence.adjustment.apply(logits[row], len(sequence.tokens))
                except Exception as error:
                    broken[sequence] = error
        found = choose_apart(
            adjusted, [s.sampling for s, _ in rows], [s.length + ahead for s, ahead in rows]
        )
        chosen = [token if isinstance(token, int) else 0 for token in found]
        for row, token in enumerate(found) if chosen != found else ():
            if not isinstance(token, int):
                broken.setdefault(rows[row][0], token)
        told = self._logprobs([s for s, _ in rows], logits, chosen)
        row = 0
        for sequence, span in ready:
            reason: FinishReason | None = None
            taken, draft = 0, sequence.draft
            for ahead in range(1 + len(draft)):
                if sequence in broken:
                    break
                try:
                    reason = self._append(sequence, chosen[row + ahead], told.get(row + ahead))
                except Exception as error:
                    broken[sequence] = error
                    break
                taken += 1
                if reason or (ahead < len(draft) and chosen[row + ahead] != draft[ahead]):
                    break
            row += 1 + len(draft)
            self.counters.generation_tokens += taken
            self.counters.accepted_tokens += max(0, taken - 1)
            if sequence in broken:
                updates.append(self._break_off(sequence, broken[sequence]))
                continue
            if sequence.computed < sequence.length - taken:  # else it was the prompt's last token
                self.scheduler.advance(sequence, span.start + taken)
            if reason:
                updates.append(self._finish(sequence, reason))
            elif sequence.streamed and (sequence.parts or sequence.text is None):
                updates.append(self._report(sequence, None))

    def _logprobs(
        self, sequences: list[Answer], logits: Tensor, chosen: list[int]
    ) -> dict[int, TokenLogprob]:
        """Row → what the model thought, for those who asked."""
        asked = [row for row, s in enumerate(sequences) if s.sampling.logprobs is not None]
        if not asked:
            return {}
        found = logprobs(
            logits[asked],
            [chosen[row] for row in asked],
            [sequences[row].sampling.logprobs or 0 for row in asked],
        )
        return dict(zip(asked, found, strict=True))

    def _append(
        self, sequence: Answer, token: int, told: TokenLogprob | None
    ) -> FinishReason | None:
        """Add a chosen token; why the answer ends with it, if it does."""
        sequence.tokens.append(token)
        if told is not None:
            sequence.logprobs.append(told)
            sequence.total_logprob += told.logprob
        if sequence.adjustment is not None:
            sequence.adjustment.push(token)
        text, generated = sequence.text, len(sequence.tokens)
        if token in self.ends(sequence.sampling):
            return "stop"
        sequence.kept = generated
        if text is not None:
            looking = generated > sequence.sampling.min_tokens
            if part := text.push(token, looking):
                sequence.parts.append(part)
            if text.stopped:
                return "stop"
        return "length" if generated >= sequence.limit else None

    def _break_off(self, sequence: Answer, error: Exception) -> Update:
        """End an answer that alone cannot go on."""
        if isinstance(error, ConstraintError):
            sequence.problem = str(error)
        else:
            log.error("a sequence failed; it ends, the others go on", exc_info=error)
        return self._finish(sequence, "error")

    def _finish(self, sequence: Answer, reason: FinishReason) -> Update:
        self.scheduler.remove(sequence)
        self.counters.ended += 1
        sequence.lasted = time.monotonic() - sequence.added
        if sequence.text is not None:
            was_stopped = sequence.text.stopped
            sequence.parts.append(sequence.text.finish())
            if sequence.text.stopped and not was_stopped and reason != "error":
                reason = "stop"
            if sequence.text.stopped and self.tokenizer is not None:
                # Tokens that are all stop string, or beyond it, are not part of the text.
                def characters(count: int) -> int:
                    return len(decode(sequence.tokens[:count]))

                decode, length = self.tokenizer.decode, sequence.text.released
                while characters(sequence.kept) > length <= characters(sequence.kept - 1):
                    sequence.kept -= 1
        return self._report(sequence, reason)

    def _report(self, sequence: Answer, reason: FinishReason | None) -> Update:
        """What is new: text that is certain, and the tokens that are all in it."""
        certain = len(sequence.tokens)
        if reason is None and sequence.text is not None and self.tokenizer is not None:
            held = sequence.text.held
            while held > 0 and certain > sequence.reported:
                certain -= 1
                held -= len(self.tokenizer.token_bytes[sequence.tokens[certain]])
        count = certain - sequence.reported
        update = Update(
            sequence.id,
            "".join(sequence.parts),
            sequence.tokens[sequence.reported : certain],
            reason,
            len(sequence.prompt),
            len(sequence.tokens),
            cached_tokens=sequence.cached,
            kept=min(sequence.kept, certain) - sequence.reported,
            logprobs=sequence.logprobs[:count],
            prompt_logprobs=sequence.prompt_logprobs,
            total_logprob=sequence.total_logprob,
            waited=sequence.waited,
            read=sequence.read,
            lasted=sequence.lasted,
            problem=sequence.problem,
            embedding=None if sequence.hidden is None else sequence.hidden / len(sequence.prompt),
        )
        sequence.logprobs, sequence.prompt_logprobs = sequence.logprobs[count:], []
        sequence.parts.clear()
        sequence.reported = certain
        return update
