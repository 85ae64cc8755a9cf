"""`python -m tokvm.testing.xenserver STATE_DIR`: answer the command in SSH_ORIGINAL_COMMAND."""

import sys

from tokvm.testing.xenserver.persona import main

main(sys.argv[1])
