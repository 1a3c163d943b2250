"""Plans runs for other machines: the memory that a run needs, and its best speed."""
