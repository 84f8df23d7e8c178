"""What `hf-alibi benchmark` times."""
