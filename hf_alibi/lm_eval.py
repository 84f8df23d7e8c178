"""lm-evaluation-harness on converted models: `python -m hf_alibi.lm_eval run --model hf --model_args pretrained=…`.

The harness itself, with the Auto classes that know converted checkpoints; all of its arguments are the same. Needs the
package lm-eval (`pip install 'hf-alibi[lm-eval]'`).
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run the harness. Returns 1, with the remedy on stderr, if it is missing."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        print(f"hf_alibi.lm_eval: error: {error}; pip install 'hf-alibi[lm-eval]'", file=sys.stderr)  # noqa: T201
        return 1
    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
