"""A search for the settings of a training: many short runs of the same work, each with settings of its own."""
