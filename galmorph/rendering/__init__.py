"""Rendering in torch: batched, differentiable, PSF-convolved and pixel-integrated."""

from galmorph.rendering.fourier import Component, FourierRenderer, RawImages
from galmorph.rendering.transfer import Transfer, make_transfer

__all__ = ["Component", "FourierRenderer", "RawImages", "Transfer", "make_transfer"]
