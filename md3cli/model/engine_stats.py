"""What an engine has done and where its time went."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class EngineStats:
    """Where the time went, in seconds, and how much was done.

    Seconds are the host's. A CUDA device works behind the host: what it takes for pictures, prefixes and
    prompts is seen where the host reads the rows' first decisions, in `prompt_seconds`.
    """

    prefix_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_prefixes: int = 0
    num_prefixes_shared: int = 0
    num_prompt_tokens: int = 0
    num_steps: int = 0
    num_decisions: int = 0
    batch_sizes: list[int] = field(default_factory=list)  # first the planned one, then after each halving
    num_smaller_passes: int = 0  # times that passes were made smaller for want of memory, the batch left as it was
