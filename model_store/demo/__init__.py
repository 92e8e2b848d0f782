"""The demo model: its recipe, and the painter of sample scenes."""
