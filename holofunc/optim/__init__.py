"""Optimizers as gradient transformations: pure functions ``(init, update)``, composed by `chain`."""

from holofunc.optim import holocron, schedules
from holofunc.optim.accumulation import MultiStepsState as MultiStepsState
from holofunc.optim.accumulation import multi_steps
from holofunc.optim.adam import AdamaxState as AdamaxState
from holofunc.optim.adam import (
    AdamState,
    adam,
    adamax,
    adamw,
    nadam,
    nadamw,
    scale_by_adam,
    scale_by_adamax,
    scale_by_nadam,
    scale_by_yogi,
)
from holofunc.optim.adam import NadamState as NadamState
from holofunc.optim.adam_variants import TadamState as TadamState
from holofunc.optim.adam_variants import (
    laprop,
    scale_by_laprop,
    scale_by_stable_adam,
    scale_by_tadam,
    stable_adamw,
    tadam,
)
from holofunc.optim.adamp import adamp, scale_by_adamp
from holofunc.optim.adan import AdanState as AdanState
from holofunc.optim.adan import adan, scale_by_adan, scale_by_proximal_descent
from holofunc.optim.ademamix import AdEMAMixState as AdEMAMixState
from holofunc.optim.ademamix import SimplifiedAdEMAMixState as SimplifiedAdEMAMixState
from holofunc.optim.ademamix import ademamix, scale_by_ademamix, scale_by_simplified_ademamix, simplified_ademamix
from holofunc.optim.adopt import AcpropState as AcpropState
from holofunc.optim.adopt import AdoptState as AdoptState
from holofunc.optim.adopt import VarianceState as VarianceState
from holofunc.optim.adopt import acprop, adopt, mars, reduce_variance, scale_by_acprop, scale_by_adopt
from holofunc.optim.averaging import EmaParamsState as EmaParamsState
from holofunc.optim.averaging import LawaState as LawaState
from holofunc.optim.averaging import (
    average_tail,
    ema_params,
    incremental_update,
    lawa,
    nesterov_updates,
    periodic_update,
)
from holofunc.optim.base import (
    EmptyState,
    GradientTransformation,
    InitFn,
    PlainUpdateFn,
    UpdateFn,
    apply_updates,
    chain,
    check_transformation,
    flush,
    identity,
    named_chain,
    stateless,
    stateless_with_tree_map,
    with_extra_args_support,
)
from holofunc.optim.capabilities import (
    Accumulates,
    CanSkip,
    KeepsBuffers,
    KeepsCopies,
    KeepsProgress,
    KeepsWeights,
    ReportsHyperparams,
    ScalesLoss,
    TakesHessianProduct,
    TakesSecondGradient,
    TiesWeights,
    eval_buffers,
    eval_params,
    find,
    gave_up,
    looks_twice,
    skipped,
)
from holofunc.optim.cautious import cautious, cautious_adamw
from holofunc.optim.checks import check_params, need_params
from holofunc.optim.clipping import (
    adaptive_grad_clip,
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_value,
    keep_params_nonnegative,
    nan_to_num,
    zero_nans,
)
from holofunc.optim.compact import BlockInt8 as BlockInt8
from holofunc.optim.compact import CompactState as CompactState
from holofunc.optim.compact import KahanState as KahanState
from holofunc.optim.compact import Rounded16 as Rounded16
from holofunc.optim.compact import compact_state, kahan_sum
from holofunc.optim.conditional import ApplyIfState as ApplyIfState
from holofunc.optim.conditional import ConditionState as ConditionState
from holofunc.optim.conditional import (
    apply_if,
    apply_if_finite,
    conditionally_mask,
    conditionally_transform,
    skip_large_updates,
)
from holofunc.optim.constraints import HyperballState as HyperballState
from holofunc.optim.constraints import (
    brake_radial,
    floor_rows,
    keep_norms,
    project,
    projection_box,
    projection_l1_ball,
    projection_l2_ball,
    projection_nonnegative,
    projection_simplex,
)
from holofunc.optim.decay import add_cautious_decay, corrected_decay, decay_independently
from holofunc.optim.factored import CameState as CameState
from holofunc.optim.factored import FactoredState as FactoredState
from holofunc.optim.factored import adafactor, came, scale_by_came, scale_by_factored_rms
from holofunc.optim.flatten import FlattenState as FlattenState
from holofunc.optim.flatten import flatten
from holofunc.optim.from_torch import from_torch
from holofunc.optim.galore import GaloreState as GaloreState
from holofunc.optim.galore import galore, scale_by_galore
from holofunc.optim.hyperparams import HyperparamsState, get_hyperparams, inject_hyperparams, set_hyperparams
from holofunc.optim.labels import Mask, label_by_path, layer_decay, no_decay_mask
from holofunc.optim.layerwise import LarsState as LarsState
from holofunc.optim.layerwise import NovogradState as NovogradState
from holofunc.optim.layerwise import lamb, lars, ralars, scale_by_lars, scale_by_novograd, scale_by_trust_ratio
from holofunc.optim.lbfgs import LbfgsState as LbfgsState
from holofunc.optim.lbfgs import ZoomState as ZoomState
from holofunc.optim.lbfgs import lbfgs, scale_by_lbfgs, scale_by_zoom_linesearch
from holofunc.optim.lookahead import LookaheadState as LookaheadState
from holofunc.optim.lookahead import ScoutState as ScoutState
from holofunc.optim.lookahead import lookahead, scout
from holofunc.optim.loss_scale import LossScaleState as LossScaleState
from holofunc.optim.loss_scale import dynamic_loss_scale
from holofunc.optim.masking import UnfreezeState as UnfreezeState
from holofunc.optim.masking import (
    freeze,
    frozen_layers,
    layers,
    masked,
    partition,
    scale_leaves,
    set_to_zero,
    unfreeze,
    up_to,
)
from holofunc.optim.monitor import MonitorState as MonitorState
from holofunc.optim.monitor import monitor
from holofunc.optim.muon import NEWTON_SCHULZ, muon, orthogonalize, scale_by_muon, suits_muon, with_adam
from holofunc.optim.muon import MuonState as MuonState
from holofunc.optim.muon_variants import NormuonState as NormuonState
from holofunc.optim.muon_variants import normalize_rms, normuon, scale_by_normuon, scion
from holofunc.optim.noise import NoiseState as NoiseState
from holofunc.optim.noise import add_noise
from holofunc.optim.numerics import safe_increment, safe_norm, safe_rms
from holofunc.optim.parameter_free import DogState as DogState
from holofunc.optim.parameter_free import MechanicState as MechanicState
from holofunc.optim.parameter_free import mechanic, scale_by_distance_over_gradients, scale_by_polyak
from holofunc.optim.plateau import PlateauState as PlateauState
from holofunc.optim.plateau import reduce_on_plateau
from holofunc.optim.prodigy import DAdaptState as DAdaptState
from holofunc.optim.prodigy import ProdigyState as ProdigyState
from holofunc.optim.prodigy import dadapt_adamw, prodigy, scale_by_dadapt_adam, scale_by_prodigy
from holofunc.optim.psgd import KronState as KronState
from holofunc.optim.psgd import kron, scale_by_kron
from holofunc.optim.radam import BeliefState as BeliefState
from holofunc.optim.radam import adabelief, radam, scale_by_belief, scale_by_radam
from holofunc.optim.rmsprop import AdadeltaState as AdadeltaState
from holofunc.optim.rmsprop import MadgradState as MadgradState
from holofunc.optim.rmsprop import RmsState as RmsState
from holofunc.optim.rmsprop import RssState as RssState
from holofunc.optim.rmsprop import (
    adadelta,
    adagrad,
    madgrad,
    rmsprop,
    scale_by_adadelta,
    scale_by_madgrad,
    scale_by_rms,
    scale_by_rss,
)
from holofunc.optim.sam import SamState as SamState
from holofunc.optim.sam import sam
from holofunc.optim.schedule_free import PrimalAveragingState as PrimalAveragingState
from holofunc.optim.schedule_free import ScheduleFreeState as ScheduleFreeState
from holofunc.optim.schedule_free import primal_averaging, schedule_free, schedule_free_adamw, schedule_free_sgd
from holofunc.optim.sgd import LionState as LionState
from holofunc.optim.sgd import OptimisticState as OptimisticState
from holofunc.optim.sgd import RpropState as RpropState
from holofunc.optim.sgd import (
    lion,
    rprop,
    scale_by_lion,
    scale_by_optimistic_gradient,
    scale_by_rprop,
    sgd,
    sign_sgd,
    signum,
)
from holofunc.optim.shampoo import EigenbasisState as EigenbasisState
from holofunc.optim.shampoo import GraftState as GraftState
from holofunc.optim.shampoo import ShampooState as ShampooState
from holofunc.optim.shampoo import graft, in_eigenbasis, scale_by_shampoo, shampoo
from holofunc.optim.sm3 import Sm3State as Sm3State
from holofunc.optim.sm3 import scale_by_sm3, sm3
from holofunc.optim.soap import SoapState as SoapState
from holofunc.optim.soap import scale_by_soap, soap
from holofunc.optim.sophia import HutchinsonState as HutchinsonState
from holofunc.optim.sophia import SophiaState as SophiaState
from holofunc.optim.sophia import hutchinson_estimator, scale_by_sophia, sophia
from holofunc.optim.to_torch import TransformationOptimizer, to_torch
from holofunc.optim.transforms import EmaState as EmaState
from holofunc.optim.transforms import (
    LearningRateState,
    ScheduleState,
    TraceState,
    add_decayed_weights,
    centralize,
    ema,
    moving_average,
    normalize_by_update_norm,
    scale,
    scale_by_learning_rate,
    scale_by_param_block_norm,
    scale_by_param_block_rms,
    scale_by_schedule,
    scale_by_sign,
    trace,
)

__all__ = [
    "NEWTON_SCHULZ", "Accumulates", "AdamState", "CanSkip", "EmptyState", "GradientTransformation",
    "HyperparamsState", "InitFn", "KeepsBuffers", "KeepsCopies", "KeepsProgress", "KeepsWeights",
    "LearningRateState", "Mask", "PlainUpdateFn", "ReportsHyperparams", "ScalesLoss", "ScheduleState",
    "TakesHessianProduct", "TakesSecondGradient", "TiesWeights", "TraceState", "TransformationOptimizer", "UpdateFn",
    "acprop", "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamp", "adamw", "adan",
    "adaptive_grad_clip", "add_cautious_decay", "add_decayed_weights", "add_noise", "ademamix", "adopt", "apply_if",
    "apply_if_finite", "apply_updates", "average_tail", "brake_radial", "came", "cautious", "cautious_adamw",
    "centralize", "chain", "check_params", "check_transformation", "clip_by_block_rms", "clip_by_global_norm",
    "clip_by_value", "compact_state", "conditionally_mask", "conditionally_transform", "corrected_decay",
    "dadapt_adamw", "decay_independently", "dynamic_loss_scale", "ema", "ema_params", "eval_buffers", "eval_params",
    "find", "flatten", "floor_rows", "flush", "freeze", "from_torch", "frozen_layers", "galore", "gave_up",
    "get_hyperparams", "graft", "holocron", "hutchinson_estimator", "identity", "in_eigenbasis",
    "incremental_update", "inject_hyperparams", "kahan_sum", "keep_norms", "keep_params_nonnegative", "kron",
    "label_by_path", "lamb", "laprop", "lars", "lawa", "layer_decay", "layers", "lbfgs", "lion", "lookahead",
    "looks_twice", "madgrad", "mars", "masked", "mechanic", "monitor", "moving_average", "multi_steps", "muon",
    "nadam", "nadamw", "named_chain", "nan_to_num", "need_params", "nesterov_updates", "no_decay_mask",
    "normalize_by_update_norm", "normalize_rms", "normuon", "orthogonalize", "partition", "periodic_update",
    "primal_averaging", "prodigy", "project", "projection_box", "projection_l1_ball", "projection_l2_ball",
    "projection_nonnegative", "projection_simplex", "radam", "ralars", "reduce_on_plateau", "reduce_variance",
    "rmsprop", "rprop", "safe_increment", "safe_norm", "safe_rms", "sam", "scale", "scale_by_acprop",
    "scale_by_adadelta", "scale_by_adam", "scale_by_adamax", "scale_by_adamp", "scale_by_adan", "scale_by_ademamix",
    "scale_by_adopt", "scale_by_belief", "scale_by_came", "scale_by_dadapt_adam", "scale_by_distance_over_gradients",
    "scale_by_factored_rms", "scale_by_galore", "scale_by_kron", "scale_by_laprop", "scale_by_lars",
    "scale_by_lbfgs", "scale_by_learning_rate", "scale_by_lion", "scale_by_madgrad", "scale_by_muon",
    "scale_by_nadam", "scale_by_normuon", "scale_by_novograd", "scale_by_optimistic_gradient",
    "scale_by_param_block_norm", "scale_by_param_block_rms", "scale_by_polyak", "scale_by_prodigy",
    "scale_by_proximal_descent", "scale_by_radam", "scale_by_rms", "scale_by_rprop", "scale_by_rss",
    "scale_by_schedule", "scale_by_shampoo", "scale_by_sign", "scale_by_simplified_ademamix", "scale_by_sm3",
    "scale_by_soap", "scale_by_sophia", "scale_by_stable_adam", "scale_by_tadam", "scale_by_trust_ratio",
    "scale_by_yogi", "scale_by_zoom_linesearch", "scale_leaves", "schedule_free", "schedule_free_adamw",
    "schedule_free_sgd", "schedules", "scion", "scout", "set_hyperparams", "set_to_zero", "sgd", "shampoo",
    "sign_sgd", "signum", "simplified_ademamix", "skip_large_updates", "skipped", "sm3", "soap", "sophia",
    "stable_adamw", "stateless", "stateless_with_tree_map", "suits_muon", "tadam", "to_torch", "trace", "unfreeze",
    "up_to", "with_adam", "with_extra_args_support", "zero_nans",
]  # fmt: skip
