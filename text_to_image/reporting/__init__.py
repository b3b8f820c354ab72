"""Pages that show what a run learned and what a model draws: templates, their one style, thumbnails, curves."""
