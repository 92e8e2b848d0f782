"""Seeing a server work: dashboards as code, and Prometheus on one machine."""
