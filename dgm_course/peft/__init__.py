"""Parameter-efficient fine-tuning: a frozen base, and a few numbers beside it that are trained in its stead."""

from dgm_course.peft.adapters import PLACEMENTS, Adapter, add_adapters
from dgm_course.peft.files import fingerprint, load_lora, save_lora
from dgm_course.peft.freezing import freeze, train_biases, trainable
from dgm_course.peft.lora import LoRA, activate, add_lora, merge, merged, unmerge
from dgm_course.peft.prefix import Prefix, PrefixAttention, add_prefix, fold

__all__ = [
    "PLACEMENTS",
    "Adapter",
    "LoRA",
    "Prefix",
    "PrefixAttention",
    "activate",
    "add_adapters",
    "add_lora",
    "add_prefix",
    "fingerprint",
    "fold",
    "freeze",
    "load_lora",
    "merge",
    "merged",
    "save_lora",
    "train_biases",
    "trainable",
    "unmerge",
]
