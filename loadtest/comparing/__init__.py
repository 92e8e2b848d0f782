"""Two deployments side by side."""
