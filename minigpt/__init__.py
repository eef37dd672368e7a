"""GPT-2 by hand, with a scale on every block, head and sublayer."""

from minigpt.config import CheckpointError, GPT2Config
from minigpt.generate import generate
from minigpt.model import GPT2
from minigpt.scales import scaled
from minigpt.sweep import Sweep, sweep
from minigpt.tokenizer import Tokenizer

__all__ = ["GPT2", "CheckpointError", "GPT2Config", "Sweep", "Tokenizer", "generate", "scaled", "sweep"]
