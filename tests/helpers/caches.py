"""Decoding in steps, and what continuous batching is given."""

import torch

# 4 heads: the flattest costs 2^-8 a token; these drop much sooner.
STEEP = [0.5, 0.25, 0.6, 0.3]
SMALL = {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 32, "max_requests_per_batch": 4}


def step(model, ids, cache, sizes, **kwargs):
    """Logits of `ids` in chunks of these sizes."""
    outputs, first = [], 0
    with torch.no_grad():
        for size in sizes:
            chunk = ids[:, first : first + size]
            mask = kwargs.get("attention_mask")
            extra = {} if mask is None else {"attention_mask": mask[:, : first + size]}
            outputs.append(model(chunk, past_key_values=cache, use_cache=True, **extra).logits)
            first += size
    return torch.cat(outputs, dim=1)
