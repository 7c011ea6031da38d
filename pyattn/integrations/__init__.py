"""pyattn in the place of what others call: torch, flash-attn, transformers, diffusers, xformers."""
