"""Tables of the documents, from what the JSON files hold: nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.tables import (
    against_peers,
    balance,
    collapse,
    contract_matrix,
    cytology,
    landscape,
    loader,
    multitask,
    needs,
    peak_memory,
    pinn,
    scaling,
    step_cost,
)

Render = Callable[[Mapping[str, Any]], dict[str, str]]
"""Makes the tables of a result, as its JSON file holds it, by name; where there is one only, its name is empty."""

TABLES: dict[str, Render] = {
    "step_cost": step_cost.tables,
    "peak_memory": peak_memory.tables,
    "against_peers": against_peers.tables,
    "scaling": scaling.tables,
    "landscape": landscape.tables,
    "pinn": pinn.tables,
    "multitask": multitask.tables,
    "multitask_sgd": multitask.tables_with_rates,
    "contract_matrix": contract_matrix.tables,
    "loader": loader.tables,
    "collapse_synthetic": collapse.tables,
    "collapse_real": collapse.tables,
    "cytology_real": cytology.tables,
    "cytology_real_low": cytology.tables,
    "cytology_synthetic": cytology.tables_of_means,
    "needs": needs.tables,
    "balance_val": balance.tables,
    "balance_val_bla": balance.tables,
    "balance_test_bla": balance.tables,
}
"""By the name of the file."""
