//! Containers as clones: store, templates, runs.
