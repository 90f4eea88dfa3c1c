"""Small random models of ComfyUI's generator classes, built by the classes themselves from reduced configurations."""

from collections.abc import Iterator
from dataclasses import dataclass

import comfy.model_patcher
import comfy.supported_models
import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Family:
    """One generator class."""

    name: str
    """Of the class in comfy.supported_models."""
    config: dict
    """Of its network."""
    shape: tuple[int, ...]
    """Of a batch of latents."""
    width: int = 32
    """Channels of a text token."""
    tokens: int = 8

    def build(self) -> comfy.model_patcher.ModelPatcher:
        """As loaders make models: inside inference mode."""
        config = getattr(comfy.supported_models, self.name)(dict(self.config))
        config.set_inference_dtype(torch.float32, None)
        with torch.inference_mode():
            model = config.get_model({}, "", device=CPU).eval()
            draw(model.diffusion_model, torch.Generator().manual_seed(0))
        return comfy.model_patcher.ModelPatcher(model, CPU, CPU)

    def conditioning(self, seed: int = 0) -> list:
        return [[torch.randn(1, self.tokens, self.width, generator=torch.Generator().manual_seed(seed)), {}]]

    def empty(self) -> Tensor:
        return torch.zeros(self.shape)


def draw(network: nn.Module, generator: torch.Generator) -> None:
    """Weights of a size that keeps activations near 1; ComfyUI leaves them uninitialised."""
    for name, tensor in parameters(network):
        if tensor.ndim <= 1 and name.endswith(("weight", "scale", "gamma")):
            tensor.fill_(1)
        elif tensor.ndim <= 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.7 * max(1, tensor[0].numel()) ** -0.5)


def parameters(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in network.named_parameters() if tensor.is_floating_point())


WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "in_dim": 16, "out_dim": 16, "dim": 128, "ffn_dim": 128, "text_dim": 32, "num_heads": 1,
    "num_layers": 1, "patch_size": (1, 2, 2), "freq_dim": 64, "eps": 1e-6,
}  # fmt: skip
CAUSAL_WAN = Family("WAN21_CausalAR_T2V", WAN | {"causal_ar": True}, (1, 16, 5, 8, 8))
WAN_5B = Family("WAN22_T2V", WAN | {"in_dim": 48, "out_dim": 48}, (1, 48, 3, 8, 8))
