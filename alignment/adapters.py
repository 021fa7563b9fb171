"""Other people's VQ models as the alignment sees them: three feature maps, a codebook, a reconstruction.

The base model's code, its keys and its file format stay untouched: an adapter captures what passes through
the model's own forward pass with hooks. A new one is a subclass of `Adapter` that names the modules to
hook.

Shapes: B batch, E code width, K codes, h w token grid, H W image size in px, C channels of a stage.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.base.files import atomic_write

from .config import NUM_LEVELS
from .projections import TextProjections


class Captured:
    """What an adapter captured of one forward pass of its base; filled when the `capture` block ends."""

    features: list[Tensor]
    """Three maps (B, E, h, w) before quantisation, as the look-up sees them, shallow first."""
    ids: Tensor
    """(B, h, w) int64 of the last level."""
    quantizer_loss: Tensor
    """Scalar: the base's own codebook and commitment loss; 0 where it reports none."""
    shared_activations: tuple[Tensor, ...]
    """Activations of the base through which both reconstruction and alignment send their gradient."""


class Adapter(nn.Module, ABC):
    """Captures from a base that calls `quant_conv` and then `quantize`, as taming-transformers' models do.

    Levels 1 and 2 are taken from two stages of the base's encoder (by default in its last block, behind
    global attention), averaged to the token grid and brought to width E by 1x1 convolutions of the adapter.
    Level 3 is the latent that the base quantises.

    Args:
        base: the model; it is trained in place, and its class and keys stay as they are.
        image_size_px: side of the images it will see.
        stages: names of two submodules of the base, shallow first, each called once a forward pass.
    """

    latent_module = "quant_conv"
    quantizer_module = "quantize"

    def __init__(self, base: nn.Module, image_size_px: int, stages: tuple[str, ...] | None = None):
        super().__init__()
        self.base: Any = base  # a class of another library, whose parts torch's types do not know
        self.image_size_px = image_size_px
        self.check()
        self.stages = self.default_stages() if stages is None else stages
        absent = sorted(set(self.stages) - set(dict(base.named_modules())))
        if absent or len(self.stages) != NUM_LEVELS - 1:
            raise ValueError(
                f"stages are {', '.join(self.stages)}, expected {NUM_LEVELS - 1} submodules of "
                f"{type(base).__name__}; see its named_modules()"
            )
        code_dim = self.codebook.shape[1]
        self.heads = nn.ModuleList(nn.Conv2d(channels, code_dim, 1) for channels in self._stage_channels())

    @property
    def codebook(self) -> Tensor:
        """(K, E) as the look-up sees it, differentiable."""
        return self.base.quantize.embedding.weight

    @property
    def decode_size_px(self) -> int:
        """Side of the reconstructions, where it is not that of the images."""
        return self.image_size_px

    @property
    def projections(self) -> TextProjections | None:
        """The base's own projections of codes to text; None where it has none."""
        return None

    def check(self) -> None:
        """Refuse a base whose codebook no gradient reaches."""
        if not self.codebook.requires_grad:
            raise ValueError(
                f"the codebook of {type(self.base).__name__} takes no gradient (moved by averages, or "
                "frozen), so "
                "text cannot reach it; make it a parameter that the quantiser loss trains"
            )

    def default_stages(self) -> tuple[str, ...]:
        """The modules that levels 1 and 2 are taken from where the user names none; here they must be "
        "named."""
        return ()

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the base as its own library does."""

    def decoded_images(self, output: Any) -> Tensor:
        """The reconstructions in what the base's forward returns."""
        return output[0] if isinstance(output, tuple) else output

    def parse_quantizer_output(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """The ids, in any shape, and the loss in what the base's quantiser returns."""
        _, loss, (*_, ids) = output
        return ids, loss

    def normalize_for_lookup(self, latents: Tensor) -> Tensor:
        """Maps (B, E, h, w) as the look-up compares them with `codebook`."""
        return latents

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Vectors of the codebook (B, E, h, w) -> images (B, 3, H, W) in [-1, 1], but for over-shoot."""
        return self.base.decode(codes)

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Captured]:
        """Run the base: images (B, 3, H, W) in [-1, 1] -> reconstructions, and what was captured."""
        with self.capture() as captured:
            output = self.base(images)
        return self.decoded_images(output), captured

    @contextlib.contextmanager
    def capture(self) -> Iterator[Captured]:
        """Capture from the one forward pass of the base that the block makes, wherever the call stands."""
        captured = Captured()
        with self._outputs(*self.stages, self.latent_module, self.quantizer_module) as outputs:
            yield captured

        ids, loss = self.parse_quantizer_output(outputs[self.quantizer_module])
        latents = self.to_map(outputs[self.latent_module], ids)
        maps = [self.to_map(outputs[name], ids) for name in self.stages]
        h, w = latents.shape[-2:]
        levels = [
            head(F.adaptive_avg_pool2d(stage, (h, w))) for head, stage in zip(self.heads, maps, strict=True)
        ]
        captured.features = [self.normalize_for_lookup(level) for level in (*levels, latents)]
        captured.ids = ids.reshape(len(latents), h, w)
        captured.quantizer_loss = latents.new_zeros(()) if loss is None else loss
        # As it came: a reshaped copy would lie beside the base's own path, and take no gradient from it.
        captured.shared_activations = (outputs[self.stages[0]],)

    def to_map(self, output: Tensor, ids: Tensor) -> Tensor:
        """What a hooked module returns -> (B, C, h, w); `ids` as the quantiser returned them."""
        return output

    @contextlib.contextmanager
    def _outputs(self, *names: str) -> Iterator[dict[str, Any]]:
        """Collect by name what submodules return; the hooks go when the block ends."""
        outputs: dict[str, Any] = {}
        with contextlib.ExitStack() as hooks:
            for name in dict.fromkeys(names):
                module = self.base.get_submodule(name)
                hook = partial(_store_output, outputs, name)
                hooks.callback(module.register_forward_hook(hook).remove)
            yield outputs
        silent = [name for name in names if name not in outputs]
        if silent:
            raise ValueError(
                f"{type(self.base).__name__} did not call {', '.join(silent)} in its forward pass; name "
                "other stages"
            )

    @torch.no_grad()
    def _stage_channels(self) -> list[int]:
        size = self.image_size_px
        was_training = self.base.training
        self.base.eval()
        with self._outputs(*self.stages, self.quantizer_module) as outputs:
            self.base(torch.zeros(1, 3, size, size, device=self.codebook.device))
        self.base.train(was_training)
        ids, _ = self.parse_quantizer_output(outputs[self.quantizer_module])
        return [self.to_map(outputs[name], ids).shape[1] for name in self.stages]


class DiffusersAdapter(Adapter):
    """`diffusers.VQModel`."""

    def default_stages(self) -> tuple[str, ...]:
        """The middle block's attention (its first residual block where it has none) and its end."""
        attention = self.base.encoder.mid_block.attentions[0] is not None
        first = "attentions.0" if attention else "resnets.0"
        return f"encoder.mid_block.{first}", "encoder.mid_block.resnets.1"

    def decoded_images(self, output: Any) -> Tensor:
        return output.sample

    def decode_codes(self, codes: Tensor) -> Tensor:
        return self.base.decode(codes, force_not_quantize=True).sample

    def save(self, directory: Path) -> None:
        self.base.register_to_config(sample_size=self.image_size_px)
        self.base.save_pretrained(directory)


class TamingAdapter(Adapter):
    """VQModel of CompVis/taming-transformers; saved as `model.ckpt`, which its `init_from_ckpt` loads."""

    def default_stages(self) -> tuple[str, ...]:
        return "encoder.mid.attn_1", "encoder.mid.block_2"

    def save(self, directory: Path) -> None:
        with atomic_write(directory / "model.ckpt") as path:
            torch.save({"state_dict": self.base.state_dict()}, path)


class LlamaGenAdapter(Adapter):
    """VQModel of FoundationVision/LlamaGen; saved as `model.pt`, which its scripts load by --vq-ckpt."""

    def default_stages(self) -> tuple[str, ...]:
        return "encoder.mid.1", "encoder.mid.2"

    @property
    def codebook(self) -> Tensor:
        weight = self.base.quantize.embedding.weight
        return F.normalize(weight, dim=-1) if self.base.quantize.l2_norm else weight

    def normalize_for_lookup(self, latents: Tensor) -> Tensor:
        return F.normalize(latents, dim=1) if self.base.quantize.l2_norm else latents

    def parse_quantizer_output(self, output: Any) -> tuple[Tensor, Tensor | None]:
        _, (*losses, _usage), (*_, ids) = output
        return ids, None if losses[0] is None else sum(losses)  # in evaluation it computes none

    def save(self, directory: Path) -> None:
        with atomic_write(directory / "model.pt") as path:
            torch.save({"model": self.base.state_dict()}, path)


class VectorQuantizeAdapter(Adapter):
    """Any model around one `vector_quantize_pytorch.VectorQuantize` that returns its reconstruction first.

    Unless stages are named, all levels start from the latent, each with a 1x1 convolution of its own. Saved
    as `model.pt`, the plain state dict.
    """

    def check(self) -> None:
        found = {name: module for name, module in self.base.named_modules() if is_vector_quantize(module)}
        if len(found) != 1:
            raise ValueError(f"{type(self.base).__name__} holds {len(found)} VectorQuantize, expected one")
        ((self.quantizer_module, layer),) = found.items()
        self.latent_module = f"{self.quantizer_module}.project_in".lstrip(".")
        if not isinstance(layer._codebook.embed, nn.Parameter):
            raise ValueError(
                "VectorQuantize keeps its codebook in a buffer moved by averages, so text cannot reach it; "
                "build it with learnable_codebook=True, ema_update=False"
            )
        if layer.heads > 1 or layer._codebook.affine_param or layer._codebook.vq_bridge is not None:
            raise ValueError(
                "VectorQuantize has several heads, affine_param or a vq_bridge, so its look-up sees other "
                "codes than its codebook; build it without"
            )

    def default_stages(self) -> tuple[str, ...]:
        return self.latent_module, self.latent_module

    @property
    def codebook(self) -> Tensor:
        return self.base.get_submodule(self.quantizer_module)._codebook.embed[0]

    def parse_quantizer_output(self, output: Any) -> tuple[Tensor, Tensor | None]:
        _, ids, loss = output
        return ids, loss.sum()

    def decode_codes(self, codes: Tensor) -> Tensor:
        raise ValueError(
            f"nobody knows which part of {type(self.base).__name__} decodes; its ids can be captioned, not "
            "decoded"
        )

    def to_map(self, output: Tensor, ids: Tensor) -> Tensor:
        if output.ndim == 4:
            return output
        grid = ids.shape[1:] if ids.ndim == 3 else (ids.shape[1], 1)
        return output.transpose(1, 2).unflatten(2, tuple(grid))

    def save(self, directory: Path) -> None:
        with atomic_write(directory / "model.pt") as path:
            torch.save(self.base.state_dict(), path)


def _store_output(outputs: dict[str, Any], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    outputs[name] = output


def is_vector_quantize(module: nn.Module) -> bool:
    """Whether it is `vector_quantize_pytorch.VectorQuantize`, told without importing that package."""
    kind = type(module)
    return kind.__name__ == "VectorQuantize" and kind.__module__.startswith("vector_quantize_pytorch")


def adapt(base: nn.Module, image_size_px: int, stages: tuple[str, ...] | None = None) -> Adapter:
    """The adapter that fits `base`, found by its structure.

    Raises:
        TypeError: no adapter fits.
        ValueError: the base cannot be aligned as it is; the message names the setting to change.
    """
    modules = dict(base.named_modules())
    fitting: type[Adapter]
    if any(is_vector_quantize(module) for module in modules.values()):
        fitting = VectorQuantizeAdapter
    elif "quantize.embedding" in modules and "encoder.mid_block" in modules:
        fitting = DiffusersAdapter
    elif "quantize.embedding" in modules and "encoder.mid.block_2" in modules:
        fitting = TamingAdapter
    elif "quantize.embedding" in modules and hasattr(base.quantize, "l2_norm"):
        fitting = LlamaGenAdapter
    else:
        raise TypeError(
            f"{type(base).__name__} is no diffusers, taming or LlamaGen VQModel and holds no VectorQuantize; "
            "write a subclass of tavq.alignment.adapters.Adapter"
        )
    return fitting(base, image_size_px, stages)
