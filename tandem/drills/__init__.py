"""Drills: real processes, real faults, and the promises that hold nevertheless. `tandem drill` runs them."""
