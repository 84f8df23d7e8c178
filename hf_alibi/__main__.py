"""`python -m hf_alibi` is `hf-alibi`."""

import sys

from .cli import main

sys.exit(main())
