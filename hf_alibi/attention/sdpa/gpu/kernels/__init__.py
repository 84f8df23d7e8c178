"""Triton kernels: the language of a GPU, in which a function takes pointers, strides and sizes one by one.

Arguments of the kernels, in capitals pointers and what is fixed when a kernel is compiled:

- QUERY, KEY, VALUE, OUTPUT, and D_QUERY, D_KEY, D_VALUE, GRAD for their gradients: (batch, heads or key heads, tokens,
  width), with the strides of the first three dimensions after all pointers; the last dimension is dense.
- LSE: float32 (batch, heads, queries), logarithm to base 2 of the sum of exp(logit) with the bias; 0 for a query that
  sees nothing. DELTA: the same shape, the sum of each output times its gradient.
- WINDOW: int32 (batch, heads, query blocks, 4), which keys a block of queries reads, in blocks of BLOCK keys: from and
  to of the first keys of its sequences, from and to of all others.
- CENTROID (batch × key heads, key blocks, WIDTH), RADIUS float32 (batch × key heads, key blocks): of blocks of keys.
- FIRST, LAST: int32 (batch, queries), the run of keys that each query sees, if RUNS; otherwise queries are the last
  tokens of the keys and see all keys up to their own.
- SLOPE: float32 (heads,), nats per token of distance. SINK: (heads,), learned logits, nats.
- `scaling` of the logits and `cap` of them (if CAP) are times log2(e); `tolerance` is a logarithm to base 2. Logits are
  in powers of two, which is what the hardware computes.
- WIDTH, VALUE_WIDTH: of heads; COLUMNS, VALUE_COLUMNS: the powers of two that hold them. ROWS, KEYS: of a tile.
- SKIP: leave out the keys that `tolerance` allows to, by CENTROID and RADIUS; otherwise all keys are read.
- SINK_TOKENS: the first tokens of a sequence that have no bias.
"""
