"""What a model's losses, gradients and training can be asked."""

from holofunc.analysis.curvature import (
    as_linear_operator,
    curvature,
    hessian_diagonal,
    hessian_trace,
    hvp,
    sharpness,
)
from holofunc.analysis.gradients import clipped_grads, per_sample_grad_norms, per_sample_grads
from holofunc.analysis.samples import in_eval_mode, per_sample_losses, score_dataset, top_losses
from holofunc.analysis.spectrum import Eigenpairs, SpectralDensity, hessian_eigenvalues, spectral_density

__all__ = [
    "Eigenpairs",
    "SpectralDensity",
    "as_linear_operator",
    "clipped_grads",
    "curvature",
    "hessian_diagonal",
    "hessian_eigenvalues",
    "hessian_trace",
    "hvp",
    "in_eval_mode",
    "per_sample_grad_norms",
    "per_sample_grads",
    "per_sample_losses",
    "score_dataset",
    "sharpness",
    "spectral_density",
    "top_losses",
]
