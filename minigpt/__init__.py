"""GPT-2 by hand, with a scale and a shift wherever something acts."""

from minigpt import interrupts  # noqa: F401  before what takes long to import
from minigpt.compare import Comparison, compare, compare_logits
from minigpt.config import CheckpointError, GPT2Config
from minigpt.generate import generate
from minigpt.model import GPT2, Block
from minigpt.parameters import scaled
from minigpt.patching import freeze, patch, path_patch, record
from minigpt.readouts import attribution_patching, direct_attribution, logit_difference, logit_lens
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
    "attribution_patching",
    "compare",
    "compare_logits",
    "direct_attribution",
    "freeze",
    "generate",
    "logit_difference",
    "logit_lens",
    "patch",
    "path_patch",
    "record",
    "scaled",
    "sensitivity",
    "sweep",
]
