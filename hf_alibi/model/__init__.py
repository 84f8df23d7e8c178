"""From a model of transformers to its ALiBi form, on disk and off."""
