"""How parameters, gradients and optimizer state lie on ranks; knows no data and no logging."""
