"""Exact fast evaluation of the learned cliques, one file per kind of device."""
