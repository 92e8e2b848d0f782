"""Manifests, and what checks them."""
