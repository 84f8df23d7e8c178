"""Converted models in other engines: what each can hold, writing for it, and comparing it with transformers."""
