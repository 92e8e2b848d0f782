"""How well grouping does: padding, throughput and waiting, measured and simulated."""
