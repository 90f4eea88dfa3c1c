"""Runs a real ComfyUI with the pack in it, for tests, the demo and a person."""
