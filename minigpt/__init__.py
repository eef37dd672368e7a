"""GPT-2 by hand, with a scale on every block, head and sublayer."""

from minigpt import interrupts  # noqa: F401  before what takes long to import
from minigpt.compare import Comparison, compare
from minigpt.config import CheckpointError, GPT2Config
from minigpt.generate import generate
from minigpt.model import GPT2, Block
from minigpt.parameters import scaled
from minigpt.sensitivity import Sensitivity, sensitivity
from minigpt.sweep import Sweep, sweep
from minigpt.tokenizer import Tokenizer

__all__ = [
    "GPT2",
    "Block",
    "CheckpointError",
    "Comparison",
    "GPT2Config",
    "Sensitivity",
    "Sweep",
    "Tokenizer",
    "compare",
    "generate",
    "scaled",
    "sensitivity",
    "sweep",
]
