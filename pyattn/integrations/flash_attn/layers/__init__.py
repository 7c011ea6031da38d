"""flash-attn's ``layers``."""
