"""Everything that turns gradients into weight changes; knows tensors and process groups, and no model or config."""

from .jorge import Jorge, jorge_from_sgd
from .kl_shampoo import KLSOAP, KLShampoo
from .kronecker import KroneckerOptimizer
from .matrix_optimizer import SHAPE_SCALES, MatrixOptimizer, Spec, shape_scale
from .modular import ModularDual, modular_tree
from .muon import Muon, muon_direction
from .orthogonalizers import ORTHOGONALIZERS, Orthogonalizer, PolynomialOrthogonalizer, orthogonalizer
from .polynomials import minimax, polar_express
from .routing import Route, RoutingError, Rule, check_coverage, param_groups, route, routing_rows
from .schedules import SCHEDULES, Schedule, schedule
from .scion import Scion
from .shampoo import Shampoo
from .soap import SOAP

__all__ = [
    "KLSOAP",
    "ORTHOGONALIZERS",
    "SCHEDULES",
    "SHAPE_SCALES",
    "SOAP",
    "Jorge",
    "KLShampoo",
    "KroneckerOptimizer",
    "MatrixOptimizer",
    "ModularDual",
    "Muon",
    "Orthogonalizer",
    "PolynomialOrthogonalizer",
    "Route",
    "RoutingError",
    "Rule",
    "Schedule",
    "Scion",
    "Shampoo",
    "Spec",
    "check_coverage",
    "jorge_from_sgd",
    "minimax",
    "modular_tree",
    "muon_direction",
    "orthogonalizer",
    "param_groups",
    "polar_express",
    "route",
    "routing_rows",
    "schedule",
    "shape_scale",
]
