"""``python -m pipeline`` is ``qwen-onnx``."""

import sys

from pipeline.cli import main

sys.exit(main())
