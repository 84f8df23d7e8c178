"""vLLM's plugin: it serves converted models as they are saved."""
