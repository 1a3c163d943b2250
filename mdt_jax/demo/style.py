"""The style sheet of the page."""

CSS = """
.gradio-container { max-width: 1240px !important; width: 100% !important;
  margin: 0 auto !important; }
.gradio-container main { width: 100% !important; max-width: 1240px !important; }
.figure { gap: 2px !important; }
.caption { margin: 0; font-size: .9rem; font-weight: 500; }
footer { display: none !important; }
#title h1 { margin: 4px 0 0; font-size: 1.5rem; letter-spacing: -.01em; }
#title p { margin: 2px 0 8px; color: var(--body-text-color-subdued); }
.curve { width: 100%; max-width: 340px; display: block; }
.curve .axis { stroke: var(--border-color-primary); stroke-dasharray: 3 3; }
.curve .line { stroke: var(--color-accent); stroke-width: 2.5; }
.curve .tick { fill: var(--body-text-color-subdued); font-size: 10px; }
.status { display: flex; flex-direction: column; gap: 6px; min-height: 34px; }
.status .bar { height: 6px; border-radius: 3px; overflow: hidden;
  background: var(--border-color-primary); }
.status .bar div { height: 100%; background: var(--color-accent); }
.status .problem { color: #b91c1c; }
.dark .status .problem { color: #fca5a5; }
.pixels img { image-rendering: pixelated; }
.hint { color: var(--body-text-color-subdued); font-size: .9rem; }
"""
