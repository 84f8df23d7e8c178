"""How much memory a forward pass takes, and whether it is there: asked before long work starts."""

import psutil
import torch
from transformers import PretrainedConfig

from ..errors import InputError

__all__ = ["LOGITS_SLICE", "check_memory", "peak_bytes"]

# Positions whose logits exist at one time: with a vocabulary of 50k, float32 logits take 0.2 GiB.
LOGITS_SLICE = 1024


def peak_bytes(
    config: PretrainedConfig, *, length: int, batch: int, dtype: torch.dtype, sliced_logits: bool = True
) -> int:
    """Rough upper bound, in bytes, of what a pass over (batch, length) tokens takes beside the weights.

    Counts one layer's activations, the logits with their float32 copy and log-softmax, and, if the
    attention implementation is "eager", the (batch, heads, length, length) scores with their float32
    softmax.
    """
    text = config.get_text_config()
    tokens = batch * length
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    total = tokens * (12 * text.hidden_size + 4 * inner) * dtype.itemsize
    total += (min(tokens, LOGITS_SLICE) if sliced_logits else tokens) * text.vocab_size * 12
    if config._attn_implementation == "eager":
        total += batch * text.num_attention_heads * length**2 * (2 * dtype.itemsize + 4)
    return int(total)


def check_memory(
    config: PretrainedConfig,
    *,
    length: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    sliced_logits: bool = True,
    weight_bytes: int = 0,
) -> None:
    """Check that a pass over (batch, length) tokens fits in free memory; raises `InputError` if not.

    `weight_bytes` counts weights that are still to be loaded.
    """
    needed = weight_bytes + peak_bytes(config, length=length, batch=batch, dtype=dtype, sliced_logits=sliced_logits)
    available = _available_bytes(device)
    if needed > available:
        eager = config._attn_implementation == "eager"
        remedy = " or attn_implementation sdpa, which needs no length x length scores" if eager else ""
        raise InputError(
            f"length {length} needs about {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB of memory "
            f"is free; use shorter lengths{remedy}"
        )


def _available_bytes(device: torch.device) -> int:
    """Free bytes on a device, with what torch holds in its cache and can use again."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + reusable)
    return int(psutil.virtual_memory().available)
