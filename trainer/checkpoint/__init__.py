"""Canonical state on disk: sharded safetensors files and a manifest that is written last."""
