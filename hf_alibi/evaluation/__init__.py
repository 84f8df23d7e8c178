"""How good a model is at which length, and against what."""
