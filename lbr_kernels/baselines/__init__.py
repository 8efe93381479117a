"""Decoding methods that Local Branch Routing is compared with, each with the call of ``lbr_kernels.generate``."""

from lbr_kernels.baselines.continuous import Mixtures, ThinkingGenerateOutput
from lbr_kernels.baselines.multiplex_thinking import multiplex_thinking
from lbr_kernels.baselines.soft_thinking import PAPER_FILTERS, soft_thinking

__all__ = ["PAPER_FILTERS", "Mixtures", "ThinkingGenerateOutput", "multiplex_thinking", "soft_thinking"]
