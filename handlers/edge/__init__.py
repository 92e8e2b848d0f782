"""The process in front of a server: strict HTTP, limits, CORS, and forms and JSON made the one call of handlers.

Both servers' own front ends are fixed binaries. What reaches them through here is a whole request with one length,
from a client that was fast enough, with JSON that no parser falls over. Imports neither torch nor numpy.
"""
