"""Inference in torch, batched; it knows nothing of galaxies."""

from galmorph.inference.least_squares import LeastSquaresResult, Problem, levenberg_marquardt

__all__ = ["LeastSquaresResult", "Problem", "levenberg_marquardt"]
