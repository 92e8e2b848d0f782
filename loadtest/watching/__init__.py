"""What a server does meanwhile: its metrics and its memory."""
