"""Fixtures of the tests of formats: files in each container."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

pytest.register_assert_rewrite("broken", "checks")


@pytest.fixture
def file(tmp_path) -> Callable[..., Path]:
    """``file(tensors, name="model.safetensors")``: a safetensors file of these tensors; gives its path."""
    from safetensors.torch import save_file

    def save(tensors: Mapping, name: str = "model.safetensors") -> Path:
        save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()}, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def pt(tmp_path) -> Callable[[object], Path]:
    """``pt(content)``: a file that torch.save writes; gives its path."""
    import torch

    def save(content: object) -> Path:
        torch.save(content, tmp_path / "model.pt")
        return tmp_path / "model.pt"

    return save


@pytest.fixture
def npz(tmp_path) -> Callable[..., Path]:
    """``npz(flat, compressed=False)``: a file of big_vision; gives its path."""
    from peers import big_vision

    def save(flat: Mapping, compressed: bool = False) -> Path:
        big_vision.save(flat, tmp_path / "model.npz", compressed)
        return tmp_path / "model.npz"

    return save
