"""Matrices: many small blocks, the precision of globals and units, and repairs."""

from laplace_amort.linalg import blocks
from laplace_amort.linalg.arrowhead import Arrowhead
from laplace_amort.linalg.arrowhead_repair import RepairFunction, repair_head, repair_tails
from laplace_amort.linalg.boost import Boost
from laplace_amort.linalg.modified_cholesky import ModifiedCholesky
from laplace_amort.linalg.repair import NoRepair, Repair, RepairReport
from laplace_amort.linalg.softabs import SoftAbs
from laplace_amort.linalg.whitening import Whitening

__all__ = [
    "Arrowhead",
    "Boost",
    "ModifiedCholesky",
    "NoRepair",
    "Repair",
    "RepairFunction",
    "RepairReport",
    "SoftAbs",
    "Whitening",
    "blocks",
    "repair_head",
    "repair_tails",
]
