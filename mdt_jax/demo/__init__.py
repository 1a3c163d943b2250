"""A page in the browser that draws, inpaints, edits and looks inside a network."""
