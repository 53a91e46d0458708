"""The same work through several objectives, with intervals."""
