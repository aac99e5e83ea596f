"""Deliberately broken parts, one for each fault that the conformance kit must catch, and the sound parts beside them.

`lists` has the broken ones. This module and `records` import no torch, as entry modules must not.
"""
