"""Analysis of losses, gradients and training: per sample, curvature, influence, populations.

Every function takes the objective that training uses and is pure: it changes no argument, draws from keys, and returns
trees of tensors. Docstrings say what an answer costs in gradients of the same batch.
"""

from holofunc.analysis.attributions import grad_cam, input_gradients, integrated_gradients
from holofunc.analysis.dynamics import (
    Indexed,
    Track,
    TrackedState,
    track_init,
    track_step,
    track_summary,
    track_update,
)
from holofunc.analysis.ensembles import Ensemble, ensemble, resample, soup
from holofunc.analysis.gradients import clipped_grads, per_sample_grad_norms, per_sample_grads
from holofunc.analysis.hessians import (
    as_linear_operator,
    curvature,
    hessian_diagonal,
    hessian_trace,
    hvp,
    sharpness,
)
from holofunc.analysis.influences import Neighbours, influence, nearest, self_influence, tracin
from holofunc.analysis.landscapes import Landscape, filter_normalized, interpolation, loss_landscape
from holofunc.analysis.metagradients import Metagradient, datamodeling_score, metagradient, weighted
from holofunc.analysis.populations import (
    Choice,
    Population,
    PopulationStep,
    best_member,
    create_population,
    fastest_method,
    population,
    population_eval,
)
from holofunc.analysis.reports import Report, explain, label_error_recall, to_csv
from holofunc.analysis.samples import in_eval_mode, per_sample_losses, score_dataset, top_losses
from holofunc.analysis.spectrum import Eigenpairs, SpectralDensity, hessian_eigenvalues, spectral_density
from holofunc.analysis.statistics import NoiseScale, calibrate, gradient_noise_scale
from holofunc.tree import stack, unstack

__all__ = [
    "Choice",
    "Eigenpairs",
    "Ensemble",
    "Indexed",
    "Landscape",
    "Metagradient",
    "Neighbours",
    "NoiseScale",
    "Population",
    "PopulationStep",
    "Report",
    "SpectralDensity",
    "Track",
    "TrackedState",
    "as_linear_operator",
    "best_member",
    "calibrate",
    "clipped_grads",
    "create_population",
    "curvature",
    "datamodeling_score",
    "ensemble",
    "explain",
    "fastest_method",
    "filter_normalized",
    "grad_cam",
    "gradient_noise_scale",
    "hessian_diagonal",
    "hessian_eigenvalues",
    "hessian_trace",
    "hvp",
    "in_eval_mode",
    "influence",
    "input_gradients",
    "integrated_gradients",
    "interpolation",
    "label_error_recall",
    "loss_landscape",
    "metagradient",
    "nearest",
    "per_sample_grad_norms",
    "per_sample_grads",
    "per_sample_losses",
    "population",
    "population_eval",
    "resample",
    "score_dataset",
    "self_influence",
    "sharpness",
    "soup",
    "spectral_density",
    "stack",
    "to_csv",
    "top_losses",
    "tracin",
    "track_init",
    "track_step",
    "track_summary",
    "track_update",
    "unstack",
    "weighted",
]
