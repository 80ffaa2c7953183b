"""python -m dsllm"""

import sys

from dsllm.cli import main

sys.exit(main())
