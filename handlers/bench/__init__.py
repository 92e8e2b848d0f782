"""What serving costs beyond the model, and how well it groups: one module for each question."""
