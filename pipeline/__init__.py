"""The experiment around the models: data, training, sweeps, tracking and the report."""
