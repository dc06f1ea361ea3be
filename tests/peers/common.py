"""What all peers share: one set of sizes, random weights, inputs, comparisons.

The default sizes all differ, so a swapped pair of tensors cannot have the same shape. With ``**SQUARE`` all
matrices of a tower are square, so only the values can show a missing transpose.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of a two-tower model, under the same names for every peer."""

    embed_dim: int = 24
    image_size: int | tuple[int, int] = 28
    patch: int = 14
    image_width: int = 48
    image_heads: int = 3
    image_depth: int = 2
    image_mlp: float = 2.5
    context_length: int = 16
    vocab: int = 99
    text_width: int = 32
    text_heads: int = 4
    text_depth: int = 3
    text_mlp: float = 3.5

    @property
    def image_hw(self) -> tuple[int, int]:
        size = self.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def image_hidden(self) -> int:
        return int(self.image_width * self.image_mlp)

    @property
    def text_hidden(self) -> int:
        return int(self.text_width * self.text_mlp)


# Projections and MLPs are 48 x 48 and the towers equally wide; heads and depths still differ.
SQUARE = {"embed_dim": 48, "image_width": 48, "image_mlp": 1.0, "text_width": 48, "text_mlp": 1.0}


# ------------------------------------------------------------------------------------------- random weights
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and every stored buffer anew; returns the module, in eval mode.

    Scales keep activations near 1, so outputs differ clearly and stay finite. Counters (0-dim integers) get
    distinct values. Buffers that no state dict holds (masks, position indices) are part of the architecture
    and stay. The class takes part in the seed: two peers with the same seed and keys do not share values.
    """
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    generator = torch.Generator().manual_seed(zlib.crc32(kind.encode()) + seed)
    stored = module.state_dict()
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.copy_(_draw(name, tensor, generator))
        for number, (name, tensor) in enumerate(module.named_buffers()):
            if name not in stored:
                continue
            if tensor.is_floating_point():
                tensor.copy_(_draw(name, tensor, generator))
            elif tensor.ndim == 0:
                tensor.fill_(1000 * (seed + 1) + number)
    return module.eval()


@contextmanager
def _uninitialised() -> Iterator[None]:
    """Modules built inside keep what their memory holds: drawing initial weights takes most of the time."""
    from timm.layers import weight_init

    def leave(tensor: Tensor, *_: object, **__: object) -> Tensor:
        return tensor

    with ExitStack() as stack:
        for name in dir(nn.init):
            if name.endswith("_") and not name.startswith("_"):
                stack.enter_context(patch.object(nn.init, name, leave))
        stack.enter_context(patch.object(weight_init, "_trunc_normal_", leave))
        yield


def randomised(make: Callable[..., nn.Module], *arguments: object, seed: int = 0, **options: object) -> nn.Module:
    """``randomise(make(...), seed)``, without the initial weights that it would replace."""
    with _uninitialised():
        module = make(*arguments, **options)
    return randomise(module, seed)


def _draw(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    last = name.rsplit(".", 1)[-1]
    x = torch.randn(like.shape, generator=generator)
    if last == "running_var":
        return 0.5 + x.abs()
    if last == "logit_scale":
        return 2.0 + 0.3 * x
    if last == "logit_bias":
        return -3.0 + 0.3 * x
    if like.ndim == 1:  # norm weights and layer scales around one; biases, means, class tokens around zero
        return 1.0 + 0.3 * x if last in ("weight", "gamma") else 0.3 * x
    if like.ndim == 0:
        return x
    if any(word in name for word in ("embedding", "pos_embed", "cls_token", "latent", "probe", "query")) and (
        "patch" not in name
    ):
        return 0.5 * x
    gain = 1.35 if like.ndim == 4 else 1.0  # convolutions: a ReLU and a batch norm that normalises nothing follow
    return gain * x * (like.numel() / like.shape[0]) ** -0.5


# ------------------------------------------------------------------------------------------------- comparing
def max_diff(a: object, b: object) -> float:
    """The largest absolute difference; infinite where shapes differ or only one side is finite."""
    x, y = (np.asarray(v.detach().double() if isinstance(v, Tensor) else v, dtype=np.float64) for v in (a, b))
    if x.shape != y.shape or not np.array_equal(np.isfinite(x), np.isfinite(y)):
        return float("inf")
    finite = np.isfinite(x)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return float("inf")
    return float(np.abs(x[finite] - y[finite]).max(initial=0.0))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the model, live: its state dict and the buffers that the state dict leaves out."""
    found = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    return found | {k: v for k, v in model.named_buffers() if k not in found}


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of ``tensors(model)``, for ``assert_unchanged`` later."""
    return {k: v.detach().clone() for k, v in tensors(model).items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bytes: NaN equals the same NaN, and 0.0 differs from -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape or a.device.type != b.device.type:
        return False
    if a.is_meta:
        return True
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def assert_unchanged(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Fail unless the model holds, bit for bit, what ``bits(model)`` returned."""
    after = tensors(model)
    assert list(after) == list(before), "the model's keys changed"
    changed = [k for k in before if not same_bits(after[k], before[k])]
    assert not changed, f"{len(changed)} of {len(before)} tensors changed: {changed[:5]}"


# ---------------------------------------------------------------------------------------------------- inputs
def images(size: int | tuple[int, int] = 28, batch: int = 2, seed: int = 7) -> Tensor:
    """Random images, (batch, 3, height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def tokens(
    context: int = 16, vocab: int = 99, batch: int = 3, seed: int = 11, *, eos: int | None = -1, pad: int = 0
) -> Tensor:
    """Random token ids, (batch, context), int64.

    Each row ends with `eos` at a place of its own, then `pad`; -1 is the last id of the vocabulary, which
    suits both "highest id" and "first eos" pooling. With eos=None a row is full: "last token" pooling.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab - 1, (batch, context), generator=generator)
    if eos is None:
        return ids
    for row in range(batch):
        end = max(1, context - 1 - 3 * row)
        ids[row, end] = vocab - 1 if eos == -1 else eos
        ids[row, end + 1 :] = pad
    return ids
