"""How rotary positions are stretched to a longer context: the settings, without torch.

A model trained on short texts is made to read longer ones by turning slower: all channels (linear),
or those whose whole turn is longer than the texts it was trained on (llama3, yarn). Names and
formulas are Hugging Face's, so that a checkpoint means the same here as there.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    """How positions are stretched, by `factor`.

    linear: every position is divided by it.
    dynamic: the base grows with texts longer than the context. Within the context, beyond which no
        model here reads, it is plain; it is kept so that an export says what the import said.
    llama3: channels that turn more than high_freq_factor times within original_context stay, those
        that turn less than low_freq_factor times are divided, in between is a mixture (Llama 3.1).
    yarn: the same with a ramp over channels instead, from beta_fast turns down to beta_slow
        (arXiv:2309.00071), its ends at whole channels when `truncate`; queries and keys are
        multiplied by attention_factor, by default 0.1 · ln(factor) + 1, or by the ratio of that
        with mscale and with mscale_all_dim before the logarithm (DeepSeek, whose scores are besides
        multiplied by the square of the latter).
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: float
    original_context: int | None = None  # tokens it was trained on before; llama3 and yarn
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def problem(self) -> str | None:
        """What is impossible about it, in one sentence; None: nothing."""
        if self.kind not in SETTINGS:
            return f"rope_scaling {self.kind!r} is not one of {', '.join(SETTINGS)}"
        if not self.factor >= 1:
            return f"rope_scaling factor {self.factor} must be at least 1"
        for name, field in type(self).__dataclass_fields__.items():
            free = name in ("kind", "factor") or name in SETTINGS[self.kind]
            if not free and getattr(self, name) != field.default:
                return f"rope_scaling {name} means nothing for {self.kind}; leave it out"
        if "original_context" in SETTINGS[self.kind] and (self.original_context or 0) < 1:
            return f"rope_scaling {self.kind} needs original_context, the tokens it was trained on"
        if self.kind == "llama3":
            low, high = self.low_freq_factor or 0, self.high_freq_factor or 0
            if not 0 < low < high:
                return (
                    f"rope_scaling low_freq_factor {self.low_freq_factor} must be above 0 and "
                    f"below high_freq_factor {self.high_freq_factor}"
                )
        if not 0 < self.beta_slow <= self.beta_fast:
            return (
                f"rope_scaling beta_slow {self.beta_slow} must be above 0 and at most beta_fast "
                f"{self.beta_fast}"
            )
        if self.attention_factor is not None and self.attention_factor <= 0:
            return f"rope_scaling attention_factor {self.attention_factor} must be above 0"
        return None

    @property
    def magnitude(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    @property
    def latent_score_scale(self) -> float:
        """What DeepSeek's scores are multiplied by beside that."""
        return self._mscale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


LLAMA3 = ("original_context", "low_freq_factor", "high_freq_factor")
YARN = ("original_context", "beta_fast", "beta_slow", "attention_factor", "mscale")
SETTINGS = {  # which fields mean something for a kind
    "linear": (),
    "dynamic": (),
    "llama3": LLAMA3,
    "yarn": (*YARN, "mscale_all_dim", "truncate"),
}
