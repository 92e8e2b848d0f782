"""Serving: requests in, masks out, whatever the server in front."""
