"""Steps of fixed shapes compute what plain ones do, whoever pads the batch.

On a CPU the step is computed instead of replayed from a CUDA graph; capture itself is not tested.
"""

from __future__ import annotations

import pytest

from model.engine import Core, Sampling
from model.engine.fixed_steps import FixedSteps, rounded
from tests.model.test_engine import GREEDY, VARIANTS, continued, prompts
from tests.tiny_models import transformer


def test_sizes_are_rounded_to_a_short_list() -> None:
    assert [rounded(count) for count in (1, 2, 3, 4, 5, 31, 33)] == [1, 2, 4, 4, 8, 32, 64]
    assert [rounded(count, 256) for count in (1, 256, 257, 600)] == [256, 256, 512, 1024]


@pytest.mark.parametrize("flags", VARIANTS)
def test_fixed_steps_generate_the_same(flags: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.engine.fixed_steps.SHORTEST", 16)
    model = transformer(**flags)
    core = Core(model, None, slots=5)
    core.runner.fixed = fixed = FixedSteps(core.runner)
    asked = prompts(8)
    for number, prompt in enumerate(asked):
        core.add(core.sequence(str(number), prompt, GREEDY, streamed=False))
    answers = {}
    while core.has_work:
        answers |= {update.id: update.tokens for update in core.step()}
        core.check()
    for number, prompt in enumerate(asked):
        assert answers[str(number)] == continued(model, prompt, GREEDY.max_tokens)
    assert len(fixed._steps) > 1  # several shapes


def test_rows_that_stand_for_nobody_touch_no_page() -> None:
    core = Core(transformer(), None, slots=4, kv_tokens=128)
    core.runner.fixed = FixedSteps(core.runner)
    for number, prompt in enumerate(prompts(3, longest=8)):
        core.add(core.sequence(str(number), prompt, Sampling(max_tokens=8)))
    core.step()
    owned = {place for s in core.scheduler.running for place in places(s.run.first, s.run.count)}
    before = core.runner.cache.data.clone()
    core.step()  # three answers in a batch of four
    changed = (core.runner.cache.data != before).any(dim=(0, 1, 2, 4)).nonzero()[:, 0].tolist()
    assert set(changed) <= owned | {core.runner.spare}
    assert core.runner.spare == 128


def places(first: int, count: int) -> range:
    return range(16 * first, 16 * (first + count))
