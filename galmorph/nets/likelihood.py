"""What the pixels do, given what a decoder has drawn, and the units that a network works in."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

__all__ = ["ConstantScale", "DiagonalNormal", "FixedNormal", "RMSScale", "make_scale"]


class DiagonalNormal(nn.Module):
    """Independent normals, one a pixel.

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets import DiagonalNormal
    >>> pixels = DiagonalNormal()((torch.zeros(5, 9, 7), torch.ones(5, 9, 7)))
    >>> pixels.batch_shape, pixels.event_shape
    (torch.Size([5]), torch.Size([9, 7]))
    """

    def forward(self, decoded: tuple[Tensor, Tensor]) -> Distribution:
        """Distribution of images.

        Parameters
        ----------
        decoded : tuple of two Tensors, (..., ny, nx)
            Mean and standard deviation.

        Returns
        -------
        Distribution
            Event shape (ny, nx).
        """
        mean, std = decoded
        return Independent(Normal(mean, std, validate_args=False), 2)


class FixedNormal(nn.Module):
    r"""Independent normals of one standard deviation that is not learned.

    Up to a constant the log-likelihood is the summed squared error over :math:`2 \sigma^2`. With
    :math:`\sigma^2 = 1/2` it is the loss of the published networks; a weight :math:`\beta` of the
    Kullback-Leibler divergence does the same as :math:`\sigma^2` times :math:`\beta`.

    Parameters
    ----------
    std : float
        Of a pixel, in the unit that the network works in.

    Raises
    ------
    ValueError
        If it is not positive and finite.

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets import FixedNormal
    >>> pixels = FixedNormal(0.5**0.5)(torch.zeros(5, 9, 7))
    >>> one = pixels.log_prob(torch.zeros(9, 7)) - pixels.log_prob(torch.full((9, 7), 2.0))
    >>> [round(float(x)) for x in one] == 5 * [4 * 63]
    True
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        if isinstance(std, bool) or not 0 < std < float("inf"):
            raise ValueError(f"noise must be positive and finite, not {std!r}")
        self.std = float(std)

    def forward(self, decoded: Tensor) -> Distribution:
        """Distribution of images.

        Parameters
        ----------
        decoded : Tensor, (..., ny, nx)
            Mean.

        Returns
        -------
        Distribution
            Event shape (ny, nx).
        """
        return Independent(Normal(decoded, torch.full_like(decoded, self.std),
                                  validate_args=False), 2)  # fmt: skip


class ConstantScale(nn.Module):
    """One pixel value for all images is the unit that the network works in.

    Parameters
    ----------
    value : float
        The unit, as 255 for images of eight bits.

    Raises
    ------
    ValueError
        If it is not positive and finite.
    """

    def __init__(self, value: float = 255.0) -> None:
        super().__init__()
        if not 0 < value < float("inf"):
            raise ValueError(f"the scale must be positive and finite, not {value!r}")
        self.value = float(value)

    def forward(self, images: Tensor, good: Tensor) -> Tensor:
        """The unit of each image, (B, 1, 1), the same for all."""
        return torch.full_like(images[:, :1, :1], self.value)


class RMSScale(nn.Module):
    """Each image is measured in units of the root of its mean square.

    Images in any linear unit can be given then; the density that the likelihood
    states is that of the pixels given their root mean square.
    """

    def forward(self, images: Tensor, good: Tensor) -> Tensor:
        """The unit of each image, (B, 1, 1); 1 for an image of zeros.

        Parameters
        ----------
        images : Tensor, (B, ny, nx)
        good : Tensor of bool, (B, ny, nx)
            Pixels that count.
        """
        count = good.sum((1, 2), keepdim=True).clamp(min=1)
        values = torch.where(good, images, 0.0)
        # squares of fluxes in W / m2 / Hz are below what single precision can hold
        peak = values.abs().amax((1, 2), keepdim=True)
        peak = torch.where(peak > 0, peak, 1.0)
        square = (values / peak).square().sum((1, 2), keepdim=True) / count
        return torch.where(square > 0, peak * square.sqrt(), 1.0)


def make_scale(scale: float | str) -> nn.Module:
    """The module for ``scale``: a number, or ``"rms"``.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if scale == "rms":
        return RMSScale()
    if isinstance(scale, (int, float)) and not isinstance(scale, bool):
        return ConstantScale(scale)
    raise ValueError(f"scale must be a positive number or 'rms', not {scale!r}")
