"""Masks of one sequence, bool (queries, keys)."""

import torch


def triangle(queries, keys=None):
    keys = queries if keys is None else keys
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def padded(length, left=0, right=0):
    mask = triangle(length)
    mask[:, :left] = False
    mask[:, length - right :] = False
    return mask


def packed(*lengths):
    return torch.block_diag(*(triangle(length) for length in lengths)).bool()


def without(mask, *keys):
    mask = mask.clone()
    mask[:, list(keys)] = False
    return mask
