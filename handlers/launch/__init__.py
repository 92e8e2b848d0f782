"""Starting, watching and ending a server; imports no torch."""
