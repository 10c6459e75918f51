"""dsv4c: a compiler-centric runtime for DeepSeek-V4."""

__version__ = "0.1.0"
