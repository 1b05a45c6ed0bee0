"""Everything that turns gradients into weight changes; knows tensors and process groups, and no model or config."""

from .matrix_optimizer import SHAPE_SCALES, MatrixOptimizer, Spec, shape_scale
from .muon import Muon, muon_direction
from .orthogonalizers import ORTHOGONALIZERS, Orthogonalizer, PolynomialOrthogonalizer, orthogonalizer
from .polynomials import minimax, polar_express
from .routing import Route, RoutingError, Rule, check_coverage, param_groups, route, routing_rows
from .schedules import SCHEDULES, Schedule, schedule

__all__ = [
    "ORTHOGONALIZERS",
    "SCHEDULES",
    "SHAPE_SCALES",
    "MatrixOptimizer",
    "Muon",
    "Orthogonalizer",
    "PolynomialOrthogonalizer",
    "Route",
    "RoutingError",
    "Rule",
    "Schedule",
    "Spec",
    "check_coverage",
    "minimax",
    "muon_direction",
    "orthogonalizer",
    "param_groups",
    "polar_express",
    "route",
    "routing_rows",
    "schedule",
    "shape_scale",
]
