"""What operators see: metrics, spans and the log."""
