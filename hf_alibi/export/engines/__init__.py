"""Engines that exported models are compared in: one file each, with `open_engine`."""
