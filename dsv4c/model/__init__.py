"""DeepSeek-V4 as plain PyTorch: readable top to bottom, trainable, exportable, and the compiler's specification."""

from dsv4c.model.state import init_state, make_draft, make_step
from dsv4c.model.transformer import Transformer

__all__ = ["Transformer", "init_state", "make_draft", "make_step"]
