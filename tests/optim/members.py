"""The law table's rows of what came in 2026: read by `test_laws.py`."""

from holofunc import optim, random, tree

OPTIMIZERS = {
    "muon-batched": lambda lr: optim.muon(
        lr, adam_learning_rate=lr, conv="batched", ns_coefficients="polar_express", adjust="rms_to_rms"
    ),
    "normuon": lambda lr: optim.normuon(lr, adam_learning_rate=lr, weight_decay=0.01, mask=optim.no_decay_mask),
    "sign_sgd": lambda lr: optim.sign_sgd(lr),
    "signum": lambda lr: optim.signum(lr, weight_decay=0.01),
    "scion": lambda lr: optim.scion(
        lr, radius=1.0, sign_radius=1.0, outputs=lambda p: tree.map(lambda x: x.ndim == 4, p)
    ),
    "nadamw": lambda lr: optim.nadamw(lr),
    "cautious_adamw": lambda lr: optim.cautious_adamw(lr),
    "cautious_adamw-decay": lambda lr: optim.cautious_adamw(lr, cautious_decay=True),
    "laprop": lambda lr: optim.laprop(lr, weight_decay=0.01),
    "stable_adamw": lambda lr: optim.stable_adamw(lr),
    "came": lambda lr: optim.came(lr, b3=0.99, eps2=1e-4),
    "shampoo": lambda lr: optim.shampoo(lr, eps=1e-2, every=2, weight_decay=0.01),
    "shampoo-one-sided": lambda lr: optim.shampoo(lr, eps=1e-2, one_sided=True),
    "kron": lambda lr: optim.kron(lr, key=random.key(0), every=2, weight_decay=0.01),
    "dadapt_adamw": lambda lr: optim.dadapt_adamw(lr, d0=0.1, weight_decay=0.01),
    "lbfgs": lambda lr: optim.lbfgs(lr, memory_size=3),
}
WRAPPERS = {
    "lawa": lambda lr: optim.lawa(optim.adam(lr), size=2, every=2),
    "average_tail": lambda lr: optim.average_tail(optim.adam(lr), start=1),
    "primal_averaging": lambda lr: optim.primal_averaging(optim.rmsprop(lr), decay=0.7),
    "nesterov_updates": lambda lr: optim.nesterov_updates(optim.adam(lr), 0.6),
    "mechanic": lambda lr: optim.mechanic(optim.adam(lr), s_init=0.01),
    "kahan_sum": lambda lr: optim.kahan_sum(optim.adam(lr)),
    "with_adam": lambda lr: optim.with_adam(optim.chain(optim.scale_by_muon(), optim.scale_by_learning_rate(lr)), lr),
}
RULES = {
    "add_cautious_decay": optim.add_cautious_decay(optim.schedules.linear(0.1, 0.0, 10), optim.no_decay_mask),
    "normalize_rms": optim.normalize_rms(),
    "floor_rows": optim.floor_rows(0.5),
    "in_eigenbasis": optim.in_eigenbasis(optim.scale_by_adam(b1=0.0), every=2),
    "in_eigenbasis-kl": optim.in_eigenbasis(optim.scale_by_rms(), every=2, kl=True, eps=1e-2),
    "graft": optim.graft(optim.trace(0.5), optim.scale_by_adam()),
}
ENDS = {
    "decay_independently": lambda lr: optim.chain(optim.sgd(lr), optim.decay_independently(0.01)),
    "keep_norms": lambda lr: optim.chain(optim.sgd(lr), optim.keep_norms()),
    "brake_radial": lambda lr: optim.chain(optim.sgd(lr), optim.brake_radial(0.5)),
    "project": lambda lr: optim.chain(optim.sgd(lr), optim.project(optim.projection_l2_ball)),
}
PARTS = {
    "scale_by_dadapt_adam": "dadapt_adamw",
    "scale_by_stable_adam": "stable_adamw",
    "scale_by_zoom_linesearch": "lbfgs",  # in test_new_rules: it evaluates losses
    "compact_state": "identity",  # in test_compact_state: it has no derivative
}
