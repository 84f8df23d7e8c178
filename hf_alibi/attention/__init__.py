"""ALiBi attention: one file a backend, with the signature of transformers' own attention functions."""
