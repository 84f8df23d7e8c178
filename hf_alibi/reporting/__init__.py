"""Tables, pictures and reports, made from result files and nothing else."""
