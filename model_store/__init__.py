"""Models that the servers load, and how the demo model is made."""
