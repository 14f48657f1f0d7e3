"""``python -m ltm_retrofit``: the command line."""

from ltm_retrofit.cli import main

raise SystemExit(main())
