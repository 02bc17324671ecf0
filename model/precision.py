"""Which number format a machine trains in."""

from pathlib import Path
from typing import Literal

from model.config import ConfigError

Precision = Literal["auto", "bf16", "fp32"]


def resolve_precision(precision: Precision, device: str = "cpu") -> Literal["bf16", "fp32"]:
    """`auto` is bf16 where the device multiplies it in hardware, else fp32; the others are
    themselves.

    On a CPU that means AMX or AVX-512 BF16 (x86) or BF16 (Arm): elsewhere bf16 is emulated, and
    slower. The result changes the trained model, so it belongs to the identity of a run; `auto`
    does not.

    A machine that describes a run for GPUs elsewhere sees none; `auto` is bf16 then, which every
    data-centre GPU since the A100 multiplies. For older ones say fp32.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise ConfigError(f"precision {precision!r} is not one of auto, bf16, fp32")
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        import torch  # late: a process that only describes a run need not load it

        seen = torch.cuda.is_available()
        if seen and not torch.cuda.is_bf16_supported(including_emulation=False):
            return "fp32"
        return "bf16"
    return "bf16" if cpu_flags() & {"amx_bf16", "avx512_bf16", "bf16"} else "fp32"


def cpu_flags() -> set[str]:
    """The instruction-set flags of this CPU as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    flags = (line for line in lines if line.startswith(("flags", "Features")))
    return set(next(flags, "").partition(":")[2].split())
