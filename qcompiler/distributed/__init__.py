"""Programs of several ranks: what their collectives do, on torch.distributed and in a simulation on one device."""
