"""The differentiable ops: one file per family, and the choice of backend."""
