"""What a model costs before it is loaded: parameters by role, bytes by precision, KV and state.

Counts come from a checkpoint's own tensor headers where there is a directory, else from the
configuration of a preset; both are the same table of names and shapes. No torch here.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aprium.model.config import ModelConfig, QuantConfig

# Bits a weight takes, scales included, when every matrix that may be quantised is.
PRECISION_BITS = {"bf16": 16.0, "fp8": 8.0, "nvfp4": 4.5}
