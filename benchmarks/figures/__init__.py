"""One figure for each benchmark, drawn from what its JSON file holds: nothing is measured here."""
