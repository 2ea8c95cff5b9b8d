"""The embedded corpora: generated from seeded grammars, no download, the same bytes on every machine.

sentiment: reviews whose label no bag of words gives away; language: sentences with long-distance agreement and an
exactly known entropy; translation: a verb-final language put into a verb-second one. Every word and every sentence is
our own.
"""
