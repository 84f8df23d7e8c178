"""The settings of a conversion."""

from dataclasses import dataclass, field

from ..errors import InputError

__all__ = ["ConversionArguments"]

_STEPS = ("match_tokens", "sink_tokens", "global_heads", "distill_tokens")
_ABOVE_0 = ("global_every", "distill_epochs", "distill_learning_rate", "distill_batch_size", "distill_block_size")


@dataclass
class ConversionArguments:
    """What is done to an unconverted model before it is trained as an ALiBi model; by default, nothing but ALiBi."""

    match_tokens: int = field(
        default=0,
        metadata={
            "help": "Training tokens on which heads are measured, to match them to slopes and to choose sink_tokens."
        },
    )
    match_heads: bool | None = field(
        default=None,
        metadata={
            "help": "Give heads the slopes that suit how far they look. Default: if match_tokens show that they differ."
        },
    )
    sink_tokens: int | None = field(
        default=None,
        metadata={
            "help": "First tokens of each sequence that carry no bias. Default: 1 if match_tokens show that heads rest "
            "on the first token, else 0."
        },
    )
    global_heads: int = field(
        default=0,
        metadata={
            "help": "Number of heads of a layer that carry no bias; with match_tokens, those that look farthest."
        },
    )
    global_every: int = field(default=1, metadata={"help": "Every n-th layer has global heads; 1: all layers."})
    distill_tokens: int = field(
        default=0,
        metadata={"help": "Training tokens on which each layer's attention is fitted to what the layer gave before."},
    )
    distill_epochs: int = field(default=4, metadata={"help": "How often the layers see these tokens."})
    distill_learning_rate: float = field(default=3e-3, metadata={"help": "Highest learning rate of these fits."})
    distill_batch_size: int = field(default=4, metadata={"help": "Blocks of text a step of these fits."})
    distill_block_size: int = field(
        default=256,
        metadata={
            "help": "Tokens of these blocks, or block_size if that is less. Short blocks make more steps of a text."
        },
    )

    def __post_init__(self) -> None:
        for name in _STEPS:
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0, which leaves it out")
        for name in _ABOVE_0:
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0")

        if self.match_heads and not self.match_tokens:
            raise InputError("match_heads is true and match_tokens 0; give the number of tokens to measure heads on")

    def steps(self) -> list[str]:
        """Fields that ask for more than ALiBi alone."""
        return [name for name in _STEPS if getattr(self, name)]
