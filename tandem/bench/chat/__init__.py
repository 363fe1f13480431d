"""`tandem bench serve --against`: a seeded chat load on whole systems, and the highest rate that each holds."""
