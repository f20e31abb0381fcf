// The precompiled header needs a target of its own; this is its one source.
