"""Where the text of a window comes from: dataset, student, replay or teacher."""
