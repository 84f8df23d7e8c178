"""Lets weights that checkpoints hold in another form than models be converted for ALiBi models."""

from .compat import checkpoint_conversions

__all__ = ["register_conversions"]


def register_conversions() -> None:
    """Let weights be renamed and merged while ALiBi models load, and back while they save, as in what they convert.

    Checkpoints hold the experts of most families, among others, in another form than models. transformers looks up what
    to do by the name of a class or by model type, and what it does not find it leaves newly initialized. Calling it
    again changes nothing.
    """
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping

    known = checkpoint_conversions()
    for name in [name for name in known if name != "legacy" and not name.lower().startswith("alibi")]:
        ours = f"Alibi{name}" if name[0].isupper() else f"alibi_{name}"
        if ours not in known:
            register_checkpoint_conversion_mapping(ours, known[name])
