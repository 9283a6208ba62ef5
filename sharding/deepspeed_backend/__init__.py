"""DeepSpeed's ZeRO behind the Engine protocol."""
