"""The commands of `hf-alibi`, one file each."""
