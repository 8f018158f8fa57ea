"""The device: who may use it (the lease), what lies on it (the ledger), in which phase."""
