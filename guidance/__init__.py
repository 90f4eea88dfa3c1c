"""Sampling from the reward-weighted distribution q(x) ∝ p(x)·exp(r(x)/β). Plain PyTorch; knows no ComfyUI."""
