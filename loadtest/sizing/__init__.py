"""How much a server holds, and what a rate needs."""
